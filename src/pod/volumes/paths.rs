//! Which paths a mountPath and a volume's file may have.

use std::path::{Component, Path, PathBuf};

use super::{Place, Root};

/// The longest path (kubelet's `maxPathLength`).
const MOST_PATH_BYTES: usize = 4096;
/// The longest name of a file (kubelet's `maxFileNameLength`).
const MOST_NAME_BYTES: usize = 255;

/// Why a mountPath is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum MountPathError {
    #[error(
        "the mountPath holds `..`, which would leave the container's directory: write the path without it"
    )]
    Parent,
    #[error(
        "the mountPath is longer than {MOST_PATH_BYTES} bytes, or a name in it longer than {MOST_NAME_BYTES}"
    )]
    TooLong,
    #[error("the mountPath holds a NUL byte")]
    Nul,
}

/// Where a mountPath leads: `/etc/x` and `etc/x` into the container's directory, `~/x` into the home
/// directory.
pub(super) fn mount_place(mount_path: &str) -> Result<Place, MountPathError> {
    let (root, rest) = match mount_path.strip_prefix('~') {
        Some(rest) if rest.is_empty() || rest.starts_with('/') => (Root::Home, rest),
        _ => (Root::Container, mount_path),
    };
    if rest.contains('\0') {
        return Err(MountPathError::Nul);
    }
    if rest.len() > MOST_PATH_BYTES {
        return Err(MountPathError::TooLong);
    }
    let mut path = PathBuf::new();
    for component in Path::new(rest).components() {
        match component {
            Component::Normal(name) if name.len() > MOST_NAME_BYTES => return Err(MountPathError::TooLong),
            Component::Normal(name) => path.push(name),
            Component::ParentDir => return Err(MountPathError::Parent),
            Component::CurDir | Component::RootDir | Component::Prefix(_) => {}
        }
    }
    Ok(Place { root, path })
}

/// The path of a file in its volume, cleaned, or what is the matter with it (kubelet's `validatePath`).
pub(super) fn file_path(path: &str) -> Result<String, String> {
    if path.is_empty() {
        return Err("invalid path: must not be empty: \"\"".to_owned());
    }
    if path.starts_with('/') {
        return Err(format!("invalid path: must be relative path: {path}"));
    }
    if path.len() > MOST_PATH_BYTES {
        return Err(format!("invalid path: must be less than or equal to {MOST_PATH_BYTES} characters"));
    }
    if path.contains('\0') {
        return Err("invalid path: must not contain a NUL byte".to_owned());
    }
    let mut clean = Vec::new();
    for name in path.split('/') {
        if name == ".." {
            return Err(format!("invalid path: must not contain '..': {path}"));
        }
        if name.len() > MOST_NAME_BYTES {
            return Err(format!(
                "invalid path: filenames must be less than or equal to {MOST_NAME_BYTES} characters"
            ));
        }
        if !name.is_empty() && name != "." {
            clean.push(name);
        }
    }
    if path.starts_with("..") {
        return Err(format!("invalid path: must not start with '..': {path}"));
    }
    if clean.is_empty() {
        return Err(format!("invalid path: must name a file: {path}"));
    }
    Ok(clean.join("/"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn mount_paths_lead_into_their_root() {
        for (mount_path, root, path) in [
            ("stress/job1", Root::Container, "stress/job1"),
            ("/docker-stress", Root::Container, "docker-stress"),
            ("/etc/x/", Root::Container, "etc/x"),
            ("./a//b/.", Root::Container, "a/b"),
            ("", Root::Container, ""),
            ("/", Root::Container, ""),
            ("~", Root::Home, ""),
            ("~/x/y", Root::Home, "x/y"),
            ("~//x", Root::Home, "x"),
            ("~x", Root::Container, "~x"),
            ("a/~/b", Root::Container, "a/~/b"),
            ("..a/b..", Root::Container, "..a/b.."),
        ] {
            assert_eq!(
                mount_place(mount_path),
                Ok(Place { root, path: PathBuf::from(path) }),
                "{mount_path}"
            );
        }
        for mount_path in ["..", "../x", "a/../b", "/..", "~/..", "~/../x", "a/.."] {
            assert_eq!(mount_place(mount_path), Err(MountPathError::Parent), "{mount_path}");
        }
        assert_eq!(mount_place("a\0b"), Err(MountPathError::Nul));
        assert_eq!(mount_place(&"x".repeat(256)), Err(MountPathError::TooLong));
        assert_eq!(mount_place(&"x/".repeat(2049)), Err(MountPathError::TooLong));
    }

    #[test]
    fn files_that_would_leave_their_volume_are_refused() {
        for (path, wanted) in [
            ("a", Ok("a")),
            ("a/b", Ok("a/b")),
            ("./a//b", Ok("a/b")),
            ("a..b", Ok("a..b")),
            ("", Err("invalid path: must not be empty: \"\"")),
            ("/a", Err("invalid path: must be relative path: /a")),
            ("..", Err("invalid path: must not contain '..': ..")),
            ("../a", Err("invalid path: must not contain '..': ../a")),
            ("a/../b", Err("invalid path: must not contain '..': a/../b")),
            ("..data", Err("invalid path: must not start with '..': ..data")),
            (".", Err("invalid path: must name a file: .")),
        ] {
            assert_eq!(file_path(path), wanted.map(str::to_owned).map_err(str::to_owned), "{path}");
        }
        assert!(file_path(&"x".repeat(256)).is_err());
        assert!(file_path(&"x/".repeat(2049)).is_err());
    }

    fn is_beneath(path: &Path) -> bool {
        path.components().all(|component| matches!(component, Component::Normal(_)))
    }

    proptest! {
        #[test]
        fn no_path_ever_leaves_its_root(text in "[./~a\\x00]{0,12}|.{0,20}") {
            if let Ok(place) = mount_place(&text) {
                prop_assert!(is_beneath(&place.path));
            }
            if let Ok(path) = file_path(&text) {
                prop_assert!(is_beneath(Path::new(&path)) && !path.is_empty());
            }
        }
    }
}
