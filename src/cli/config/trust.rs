//! Who may change a file: whoever can decides what runs as the user. [`only_ours`] goes the way to it, link by link.
//!
//! The rules are those that sshd has for what stands in a home directory (its StrictModes): the file and each directory on
//! the way belong to root or to the user, and nobody else may write to them.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

/// As many links as the kernel itself follows (path_resolution(7)).
const LINKS: usize = 40;

/// What lies on the way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Directory,
    Link,
    File,
    Other,
}

/// Goes the way from the root to the file, and says what is wrong with it.
///
/// # Errors
/// The first thing that is missing, is no file, or that others may change: a whole sentence with the way out.
pub(super) fn only_ours(path: &Path) -> Result<(), String> {
    let me = nix::unistd::geteuid().as_raw();
    let whole = std::path::absolute(path).map_err(|error| error.to_string())?;
    let mut rest: VecDeque<OsString> = parts(&whole);
    let mut at = PathBuf::from("/");
    let mut links = 0;
    look(&at, false, &whole, me)?;
    while let Some(part) = rest.pop_front() {
        if part == ".." {
            at.pop();
            continue;
        }
        at.push(&part);
        if look(&at, false, &whole, me)? == Kind::Link {
            links += 1;
            if links > LINKS {
                return Err("too many symbolic links lead to it".to_owned());
            }
            let target = fs::read_link(&at).map_err(|error| format!("{}: {error}", at.display()))?;
            at.pop();
            if target.is_absolute() {
                at = PathBuf::from("/");
            }
            for part in parts(&target).into_iter().rev() {
                rest.push_front(part);
            }
        }
    }
    look(&at, true, &whole, me).map(|_| ())
}

fn parts(path: &Path) -> VecDeque<OsString> {
    path.components()
        .filter_map(|component| match component {
            Component::Normal(part) => Some(part.to_owned()),
            Component::ParentDir => Some(OsString::from("..")),
            _ => None,
        })
        .collect()
}

/// Looks at one thing on the way to `whole`; the `last` is to be a file.
fn look(path: &Path, last: bool, whole: &Path, me: u32) -> Result<Kind, String> {
    let found = fs::symlink_metadata(path).map_err(|error| {
        if path == whole { error.to_string() } else { format!("{}: {error}", path.display()) }
    })?;
    let kind = match found.file_type() {
        kind if kind.is_dir() => Kind::Directory,
        kind if kind.is_symlink() => Kind::Link,
        kind if kind.is_file() => Kind::File,
        _ => Kind::Other,
    };
    match problem(kind, last, (found.uid(), found.mode()), me) {
        None => Ok(kind),
        Some(problem) => Err(format!("{} {problem}", path.display())),
    }
}

/// What is wrong with one thing on the way, if anything is.
fn problem(kind: Kind, last: bool, (owner, mode): (u32, u32), me: u32) -> Option<String> {
    const WHY: &str = "whoever may change it decides what runs as you";
    if last && kind != Kind::File {
        return Some("is no regular file".to_owned());
    }
    if owner != 0 && owner != me {
        return Some(format!(
            "belongs to the user {owner}: {WHY}; root or you are wanted as its owner, so copy the file to a place of your own"
        ));
    }
    // In a sticky directory others may add entries, and not touch those that are there.
    let sticky = kind == Kind::Directory && mode & 0o1000 != 0;
    if kind != Kind::Link && mode & 0o022 != 0 && !sticky {
        return Some(format!("may be written by others (mode {:04o}): {WHY}; chmod go-w it", mode & 0o7777));
    }
    None
}

#[cfg(test)]
mod tests {
    use std::fs::Permissions;
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    #[test]
    fn what_others_may_change_is_refused() {
        const ME: u32 = 1000;
        for (kind, last, owner, mode, words) in [
            (Kind::File, true, ME, 0o600, None),
            (Kind::File, true, 0, 0o644, None),
            (Kind::File, true, ME, 0o664, Some("0664")),
            (Kind::File, true, ME, 0o646, Some("chmod go-w")),
            (Kind::File, true, 0, 0o666, Some("0666")),
            (Kind::File, true, 1001, 0o600, Some("user 1001")),
            (Kind::Directory, false, 0, 0o755, None),
            (Kind::Directory, false, 0, 0o1777, None),
            (Kind::Directory, false, 1001, 0o1777, Some("user 1001")),
            (Kind::Directory, false, ME, 0o2775, Some("2775")),
            (Kind::Directory, true, ME, 0o755, Some("no regular file")),
            (Kind::Other, true, ME, 0o600, Some("no regular file")),
            (Kind::Link, false, ME, 0o777, None),
            (Kind::Link, false, 1001, 0o777, Some("user 1001")),
        ] {
            let found = problem(kind, last, (owner, mode), ME);
            assert_eq!(found.is_some(), words.is_some(), "{kind:?} {owner} {mode:o}: {found:?}");
            assert!(
                found.unwrap_or_default().contains(words.unwrap_or_default()),
                "{kind:?} {owner} {mode:o}"
            );
        }
    }

    #[test]
    fn each_directory_on_the_way_is_looked_at_also_behind_links() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        fs::create_dir_all(root.join("open/own")).unwrap();
        fs::create_dir(root.join("good")).unwrap();
        fs::write(root.join("open/own/site.toml"), "").unwrap();
        fs::write(root.join("good/site.toml"), "").unwrap();
        fs::set_permissions(root.join("open"), Permissions::from_mode(0o777)).unwrap();
        for (link, target) in [
            // The file is in order, and the link to it lies where others may put another.
            ("open/link.toml", "../good/site.toml"),
            ("good/direct.toml", "site.toml"),
            ("good/round.toml", "../open/link.toml"),
            ("good/loop.toml", "loop.toml"),
            ("good/dangling.toml", "nothing.toml"),
            ("good/up.toml", ".."),
            ("good/in.toml", "../open/own/site.toml"),
        ] {
            symlink(target, root.join(link)).unwrap();
        }
        for (path, words) in [
            ("good/site.toml", None),
            ("good/../good/site.toml", None),
            ("good/direct.toml", None),
            ("open/own/site.toml", Some("0777")),
            ("open/link.toml", Some("0777")),
            ("good/round.toml", Some("0777")),
            ("good/in.toml", Some("0777")),
            ("good/loop.toml", Some("too many")),
            ("good/dangling.toml", Some("No such file")),
            ("good/up.toml", Some("no regular file")),
            ("good", Some("no regular file")),
            ("good/site.toml/more", Some("Not a directory")),
        ] {
            let found = only_ours(&root.join(path));
            let text = found.as_ref().err().cloned().unwrap_or_default();
            assert_eq!(found.is_err(), words.is_some(), "{path}: {text}");
            assert!(text.contains(words.unwrap_or_default()), "{path}: {text}");
        }
    }
}
