//! Where a path leads in a file system as it is: links are followed, and what is not there is told.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};

/// Links that are followed on one path (path_resolution(7)).
const MOST_LINKS: usize = 40;

/// A path, as far as it is there.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Found {
    /// What is there: no component of it is a link.
    pub(super) there: PathBuf,
    /// What is missing beneath it: plain names.
    pub(super) missing: Vec<OsString>,
}

/// Follows an absolute path.
///
/// # Errors
/// When it runs into a circle of links or a directory that cannot be searched.
pub(super) fn find(path: &Path) -> io::Result<Found> {
    let mut there = PathBuf::from("/");
    let mut missing: Vec<OsString> = Vec::new();
    let mut ahead: VecDeque<PathBuf> = path.components().map(|c| PathBuf::from(c.as_os_str())).collect();
    let mut links = 0;
    while let Some(component) = ahead.pop_front() {
        match component.components().next() {
            Some(Component::Normal(name)) if !missing.is_empty() => missing.push(name.to_owned()),
            Some(Component::Normal(name)) => {
                let next = there.join(name);
                match fs::symlink_metadata(&next) {
                    Ok(found) if found.is_symlink() => {
                        links += 1;
                        if links > MOST_LINKS {
                            return Err(io::Error::other("too many links on the way"));
                        }
                        let target = fs::read_link(&next)?;
                        if target.is_absolute() {
                            there = PathBuf::from("/");
                        }
                        for part in target.components().rev() {
                            ahead.push_front(PathBuf::from(part.as_os_str()));
                        }
                    }
                    Ok(_) => there = next,
                    // Beneath a file nothing is either.
                    Err(error)
                        if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) =>
                    {
                        missing.push(name.to_owned());
                    }
                    Err(error) => return Err(error),
                }
            }
            Some(Component::ParentDir) => {
                if missing.pop().is_none() {
                    there.pop();
                }
            }
            Some(Component::RootDir | Component::CurDir | Component::Prefix(_)) | None => {}
        }
    }
    Ok(Found { there, missing })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn links_are_followed_and_what_is_missing_is_told() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path().canonicalize().unwrap();
        fs::create_dir_all(root.join("run/x")).unwrap();
        fs::create_dir(root.join("var")).unwrap();
        symlink("../run", root.join("var/run")).unwrap();
        symlink(root.join("run/./x/../x"), root.join("absolute")).unwrap();
        symlink("circle", root.join("circle")).unwrap();
        symlink("nowhere/deep", root.join("dangling")).unwrap();
        let missing = |names: &[&str]| names.iter().map(OsString::from).collect::<Vec<_>>();
        for (path, there, rest) in [
            ("run/x", "run/x", vec![]),
            ("var/run/x", "run/x", vec![]),
            ("var/run/secrets/io/account", "run", missing(&["secrets", "io", "account"])),
            ("absolute", "run/x", vec![]),
            ("absolute/y", "run/x", missing(&["y"])),
            ("dangling/z", "", missing(&["nowhere", "deep", "z"])),
        ] {
            let wanted = Found { there: root.join(there).components().collect(), missing: rest };
            assert_eq!(find(&root.join(path)).unwrap(), wanted, "{path}");
        }
        assert!(find(&root.join("circle/x")).is_err());
        assert_eq!(find(Path::new("/../..")).unwrap(), Found { there: "/".into(), missing: vec![] });
    }
}
