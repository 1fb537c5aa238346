//! emptyDirs in memory: directories of ours in /dev/shm, which the kernel keeps in memory.
//!
//! `/dev/shm/jiriaf-pilot-<user id>/<pod uid>/<volume>`. Everybody may make things in /dev/shm: the first directory is made
//! by an exclusive mkdir and is ours alone (0700), or it is not used. Where another user has taken the name, one with a
//! number is ours; whoever removes looks at all of them.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use crate::files;

/// The file system in memory that every Linux has (tmpfs; POSIX shared memory needs it).
const SHM: &str = "/dev/shm";
/// Names that are tried: another user would have to guess them.
const NAMES: u32 = 8;
/// Entries of /dev/shm that are looked at.
const MOST: usize = 100_000;

fn prefix() -> String {
    format!("jiriaf-pilot-{}", nix::unistd::geteuid())
}

/// The directories of this user's that hold pods' volumes: for whoever has to hide them.
#[must_use]
pub fn parents() -> Vec<PathBuf> {
    parents_in(Path::new(SHM))
}

fn parents_in(shm: &Path) -> Vec<PathBuf> {
    let prefix = prefix();
    let mine = nix::unistd::geteuid().as_raw();
    let entries = fs::read_dir(shm).into_iter().flatten().flatten().take(MOST);
    let mut found: Vec<PathBuf> = entries
        .filter(|entry| {
            let name = entry.file_name();
            let name = name.to_string_lossy();
            let rest = name.strip_prefix(&prefix);
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
        })
        // Of a directory entry, without following links.
        .filter(|entry| {
            entry
                .metadata()
                .is_ok_and(|found| found.is_dir() && found.uid() == mine && found.mode() & 0o077 == 0)
        })
        .map(|entry| entry.path())
        .collect();
    found.sort();
    found
}

/// Makes the directory of a pod's volume, or finds it.
///
/// # Errors
/// When it cannot be made.
pub(super) fn make(uid: &str, volume: &str, mode: u32) -> io::Result<PathBuf> {
    make_in(Path::new(SHM), uid, volume, mode)
}

/// Makes the directory in which all pods' volumes in memory are, where there is none. It stays: it hides what is in it from
/// isolated pods, and one that is made anew would be hidden from none that runs.
///
/// # Errors
/// When it cannot be made.
pub fn prepare() -> io::Result<PathBuf> {
    prepare_in(Path::new(SHM))
}

fn prepare_in(shm: &Path) -> io::Result<PathBuf> {
    parents_in(shm).into_iter().next().map_or_else(|| make_parent(shm), Ok)
}

fn make_in(shm: &Path, uid: &str, volume: &str, mode: u32) -> io::Result<PathBuf> {
    let parent = prepare_in(shm)?;
    let pod = parent.join(files::uid_name(uid));
    files::private_dir(&pod).map_err(io::Error::other)?;
    let path = pod.join(volume);
    match fs::create_dir(&path) {
        Ok(()) => fs::set_permissions(&path, fs::Permissions::from_mode(mode))?,
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(error),
    }
    Ok(path)
}

fn make_parent(shm: &Path) -> io::Result<PathBuf> {
    let plain = shm.join(prefix());
    let mut problem = match files::private_dir(&plain) {
        Ok(()) => return Ok(plain),
        Err(error) => error,
    };
    for _ in 0..NAMES {
        let path = shm.join(format!("{}.{:08x}", prefix(), number()));
        match files::private_dir(&path) {
            Ok(()) => return Ok(path),
            Err(error) => problem = error,
        }
    }
    Err(io::Error::other(problem))
}

/// A number that nobody guesses: std seeds each RandomState anew.
fn number() -> u32 {
    use std::hash::{BuildHasher as _, Hasher as _, RandomState};
    u32::try_from(RandomState::new().build_hasher().finish() >> 32).unwrap_or_default()
}

/// Removes what a pod has in memory.
///
/// # Errors
/// When something of it cannot be removed.
pub fn remove(uid: &str) -> io::Result<()> {
    remove_in(Path::new(SHM), uid)
}

fn remove_in(shm: &Path, uid: &str) -> io::Result<()> {
    let name = files::uid_name(uid);
    if name.is_empty() {
        return Ok(());
    }
    let mut result = Ok(());
    for parent in parents_in(shm) {
        let path = parent.join(&name);
        if let Err(error) = remove_tree(&path)
            && error.kind() != io::ErrorKind::NotFound
        {
            result = Err(io::Error::new(error.kind(), format!("{}: {error}", path.display())));
        }
    }
    result
}

/// Removes a tree, directories without write permission too.
fn remove_tree(path: &Path) -> io::Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            let mut waiting = vec![path.to_owned()];
            let mut seen = HashSet::new();
            while let Some(directory) = waiting.pop() {
                let Ok(found) = fs::symlink_metadata(&directory) else { continue };
                if !found.is_dir() || !seen.insert((found.dev(), found.ino())) {
                    continue;
                }
                let _ = fs::set_permissions(&directory, fs::Permissions::from_mode(0o700));
                waiting.extend(fs::read_dir(&directory).into_iter().flatten().flatten().map(|e| e.path()));
            }
            fs::remove_dir_all(path)
        }
        done => done,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn a_volume_is_private_and_goes_with_all_that_is_in_it() {
        let shm = tempfile::tempdir().unwrap();
        let made = make_in(shm.path(), "u-1", "v", 0o777).unwrap();
        assert_eq!(made, shm.path().join(prefix()).join("u-1/v"));
        let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o7777;
        assert_eq!((mode(&made), mode(&shm.path().join(prefix()))), (0o777, 0o700));
        fs::create_dir(made.join("locked")).unwrap();
        fs::write(made.join("locked/x"), "x").unwrap();
        fs::set_permissions(made.join("locked"), fs::Permissions::from_mode(0o0)).unwrap();
        assert_eq!(make_in(shm.path(), "u-1", "v", 0o777).unwrap(), made, "found again");
        make_in(shm.path(), "u-2", "v", 0o777).unwrap();
        remove_in(shm.path(), "u-1").unwrap();
        remove_in(shm.path(), "u-1").unwrap();
        assert!(!made.exists() && shm.path().join(prefix()).join("u-2/v").exists());
        remove_in(shm.path(), "u-2").unwrap();
        let left: Vec<_> =
            fs::read_dir(shm.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left, [prefix().as_str()], "their directory stays, and hides what comes");
        assert_eq!(fs::read_dir(shm.path().join(prefix())).unwrap().count(), 0);
    }

    #[test]
    fn what_another_put_there_is_not_used_and_does_not_stand_in_the_way() {
        let (shm, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        symlink(outside.path(), shm.path().join(prefix())).unwrap();
        let open = shm.path().join(format!("{}.1", prefix()));
        fs::create_dir(&open).unwrap();
        fs::set_permissions(&open, fs::Permissions::from_mode(0o777)).unwrap();
        fs::create_dir(shm.path().join(format!("{}0", prefix()))).unwrap();
        let made = make_in(shm.path(), "u-1", "v", 0o777).unwrap();
        let parent = made.parent().unwrap().parent().unwrap();
        assert!(parent != open && parent.to_string_lossy().contains(&format!("{}.", prefix())), "{made:?}");
        assert_eq!(make_in(shm.path(), "u-1", "v", 0o777).unwrap(), made, "found again");
        assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 0);
        remove_in(shm.path(), "u-1").unwrap();
        assert!(!made.exists() && open.exists());
    }

    #[test]
    fn a_uid_is_no_path() {
        let shm = tempfile::tempdir().unwrap();
        assert!(make_in(shm.path(), "../../x", "v", 0o700).unwrap().starts_with(shm.path().join(prefix())));
        remove_in(shm.path(), "../..").unwrap();
        assert!(shm.path().exists());
    }
}
