//! The end of a pod's directory: its logs are kept, its files in the home directory go, then all the rest.

use std::fs::{self, DirBuilder, Permissions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;

use super::{
    DirectoryError, HOME_FILES, Marker, Occupant, cut, kept_name, look, make_kept, read_marker, store,
    suffixed,
};
use crate::files;
use crate::pod::volumes::memory;

/// What the name of a directory begins with that is being removed.
pub(super) const TRASH: &str = ".trash-";

/// Bytes of a kept log's name; file systems take 255 (NAME_MAX), and a pod's container may call a log what it likes.
const LOG_NAME_MOST: usize = 250;

/// Moves a pod's logs to the kept directory and removes the rest, with the pod's files in `home` (none: they stay).
/// Returns the places of the kept logs.
///
/// The directory is renamed first, and only then looked at for good: meanwhile another pod may be given the name. One
/// that a newer pod has moved aside is found too.
///
/// # Errors
/// When the directory is not this pod's or cannot be removed, or when a log cannot be kept: the directory stays then,
/// and the error names its place.
pub fn remove(
    directory: &Path,
    uid: &str,
    kept: &Path,
    home: Option<&Path>,
) -> Result<Vec<PathBuf>, DirectoryError> {
    let fail = |path: &Path, source| DirectoryError { path: path.to_owned(), source };
    let aside = directory.file_name().map(|name| suffixed(&name.to_string_lossy(), uid));
    let aside = aside.map_or_else(|| directory.to_owned(), |name| directory.with_file_name(name));
    let mut foreign = false;
    for place in [directory, &aside] {
        match look(place).map_err(|source| fail(place, source))? {
            Occupant::None => {}
            Occupant::Pod(marker) if marker.uid == uid => {
                if let Some(trash) = set_aside(place, &marker, kept).map_err(|source| fail(place, source))? {
                    return finish(&trash, place, &marker, kept, home);
                }
            }
            Occupant::Pod(_) | Occupant::Foreign => foreign |= place == directory,
        }
    }
    // A pilot may have died between the renaming and the removal.
    let trash = kept.join(trash_name(uid));
    if let Some(marker) = read_marker(&trash).filter(|marker| marker.uid == uid) {
        return finish(&trash, directory, &marker, kept, home);
    }
    if foreign {
        let problem = "it carries another pod's marker or none; left alone";
        return Err(fail(directory, io::Error::other(problem)));
    }
    // Somebody may have removed the directory alone.
    let store = store(kept, uid);
    let Some(marker) = read_marker(&store).filter(|marker| marker.uid == uid) else { return Ok(Vec::new()) };
    let mut logs = Vec::new();
    keep_all_logs(&store, &marker, kept, &mut logs).map_err(|source| fail(&store, source))?;
    remove_store(&store).map_err(|source| fail(&store, source))?;
    Ok(logs)
}

/// Removes a pod's files in the store, and the store with those of the last one.
fn remove_store(store: &Path) -> io::Result<()> {
    match remove_tree(store) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    if let Some(all) = store.parent() {
        // Goes only when it is empty.
        let _ = fs::remove_dir(all);
    }
    Ok(())
}

/// As [`keep_logs`], also where directories are closed.
fn keep_all_logs(from: &Path, marker: &Marker, kept: &Path, logs: &mut Vec<PathBuf>) -> io::Result<()> {
    match keep_logs(from, marker, kept, logs) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            unlock(from);
            keep_logs(from, marker, kept, logs)
        }
        done => done,
    }
}

/// Removes what was renamed; gives it back to its place when something in it would be lost.
fn finish(
    trash: &Path,
    place: &Path,
    marker: &Marker,
    kept: &Path,
    home: Option<&Path>,
) -> Result<Vec<PathBuf>, DirectoryError> {
    let mut logs = Vec::new();
    let store = store(kept, &marker.uid);
    let saved = home
        .map_or(Ok(()), |home| remove_home_files(trash, home))
        .and_then(|()| keep_all_logs(trash, marker, kept, &mut logs))
        .and_then(|()| keep_all_logs(&store, marker, kept, &mut logs));
    if let Err(error) = saved {
        let path = give_back(trash, place, marker);
        let source = io::Error::new(error.kind(), format!("the directory stays: {error}"));
        return Err(DirectoryError { path, source });
    }
    if let Err(error) = memory::remove(&marker.uid) {
        tracing::warn!(uid = marker.uid, %error, "what a pod had in memory could not be removed");
    }
    remove_store(&store).map_err(|source| DirectoryError { path: store.clone(), source })?;
    remove_tree(trash).map_err(|source| DirectoryError { path: trash.to_owned(), source })?;
    Ok(logs)
}

/// Removes the files that the pod of `directory` wrote into the home directory; what is there no more, or is no
/// regular file any more, is left.
///
/// # Errors
/// When a file or the list of them cannot be read or removed.
pub fn remove_home_files(directory: &Path, home: &Path) -> io::Result<()> {
    let list = directory.join(HOME_FILES);
    if fs::symlink_metadata(&list).is_err_and(|error| error.kind() == io::ErrorKind::NotFound) {
        return Ok(());
    }
    files::Root::open(home)?.remove_own(&list)
}

/// The name of a directory that is being removed.
fn trash_name(uid: &str) -> String {
    format!("{TRASH}{}", files::uid_name(uid))
}

/// Renames the directory to where no pod is given one, into the kept directory, or beside itself where that is another
/// file system or cannot be made. None when it was not this pod's any more; it is given back then.
fn set_aside(place: &Path, marker: &Marker, kept: &Path) -> io::Result<Option<PathBuf>> {
    let name = trash_name(&marker.uid);
    let mut trash = kept.join(&name);
    if make_kept(kept).and_then(|()| move_directory(place, &trash)).is_err() {
        trash = place.with_file_name(&name);
        match move_directory(place, &trash) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            moved => moved?,
        }
    }
    match read_marker(&trash) {
        Some(found) if found.uid == marker.uid => Ok(Some(trash)),
        other => {
            give_back(&trash, place, &other.unwrap_or_else(|| marker.clone()));
            Ok(None)
        }
    }
}

/// A directory without write permission cannot be moved to another one (rename(2), EACCES: its `..` changes).
fn move_directory(from: &Path, to: &Path) -> io::Result<()> {
    match fs::rename(from, to) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            permit(from)?;
            fs::rename(from, to)
        }
        moved => moved,
    }
}

/// Back to its place, or to the one beside it where somebody has taken that. Returns where it is now.
fn give_back(trash: &Path, place: &Path, marker: &Marker) -> PathBuf {
    for target in [place.to_owned(), place.with_file_name(suffixed(&marker.name, &marker.uid))] {
        // The mkdir is exclusive, and whoever comes now sees a directory that is not his.
        let made = DirBuilder::new().mode(0o700).create(&target);
        if made.is_ok() && fs::rename(trash, &target).is_ok() {
            return target;
        }
        if made.is_ok() {
            let _ = fs::remove_dir(&target);
        }
    }
    trash.to_owned()
}

fn keep_logs(directory: &Path, marker: &Marker, kept: &Path, moved: &mut Vec<PathBuf>) -> io::Result<()> {
    let name = kept_name(&marker.namespace, &marker.name, &marker.uid);
    for container in entries(&directory.join("containers"))?.into_iter().flatten() {
        let container = container?;
        // A link may lead to what is not the pod's.
        if !container.file_type()?.is_dir() {
            continue;
        }
        for log in entries(&container.path().join("logs"))?.into_iter().flatten() {
            let log = log?;
            if !log.file_type()?.is_file() {
                continue;
            }
            let file = format!("{name}.{}.{}", container.file_name().display(), log.file_name().display());
            let target = kept.join(cut(&file, LOG_NAME_MOST));
            make_kept(kept).and_then(|()| fs::rename(log.path(), &target)).map_err(|error| {
                let problem = format!("its log {} cannot be kept: {error}", target.display());
                io::Error::new(error.kind(), problem)
            })?;
            moved.push(target);
        }
    }
    Ok(())
}

/// What is in a directory; nothing where there is none or a link stands there, which may lead anywhere.
fn entries(directory: &Path) -> io::Result<Option<fs::ReadDir>> {
    match fs::symlink_metadata(directory) {
        Ok(metadata) if metadata.is_dir() => fs::read_dir(directory).map(Some),
        Err(error) if !matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            Err(error)
        }
        _ => Ok(None),
    }
}

/// Removes a tree, directories without write permission too.
pub(super) fn remove_tree(path: &Path) -> io::Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            unlock(path);
            fs::remove_dir_all(path)
        }
        done => done,
    }
}

/// Permits its owner everything in all directories of a tree. What is refused shows when the tree is removed.
fn unlock(tree: &Path) {
    let mut waiting = vec![tree.to_owned()];
    while let Some(path) = waiting.pop() {
        if permit(&path).is_err() {
            continue;
        }
        for entry in fs::read_dir(&path).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                waiting.push(entry.path());
            }
        }
    }
}

/// Gives a directory's owner read, write and search permission. A link is not followed: what is opened is a directory,
/// and its mode is changed by way of the descriptor (proc(5), /proc/pid/fd), since one that may not be read can only be
/// opened with O_PATH, which fchmod(2) refuses.
fn permit(path: &Path) -> io::Result<()> {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let directory = open(path, flags, Mode::empty())?;
    let same = PathBuf::from(format!("/proc/self/fd/{}", directory.as_raw_fd()));
    let mode = fs::metadata(&same)?.permissions().mode();
    if mode & 0o700 == 0o700 {
        return Ok(());
    }
    fs::set_permissions(&same, Permissions::from_mode(mode & 0o7777 | 0o700))
}

#[cfg(test)]
mod tests {
    use super::super::tests::marker;
    use super::super::{KEPT, Liveness, claim};
    use super::*;
    use std::os::unix::fs::symlink;

    const UID: &str = "aaaaaaaa-1";

    fn pod(root: &Path, uid: &str) -> PathBuf {
        let directory = claim(root, &marker(uid), |_| Liveness::Gone).unwrap();
        fs::create_dir_all(directory.join("containers/c1/logs")).unwrap();
        fs::write(directory.join("containers/c1/logs/0.log"), uid).unwrap();
        directory
    }

    #[test]
    fn removing_keeps_the_logs_and_refuses_what_is_not_ours() {
        let root = tempfile::tempdir().unwrap();
        let directory = pod(root.path(), UID);
        let kept = root.path().join(KEPT).join("7");
        assert!(remove(&directory, "cccccccc", &kept, None).is_err());
        let logs = remove(&directory, UID, &kept, None).unwrap();
        assert_eq!(logs, vec![kept.join("default.p1.aaaaaaaa.c1.0.log")]);
        assert!(!directory.exists());
        assert_eq!(fs::read_to_string(&logs[0]).unwrap(), UID);
        assert_eq!(fs::read_dir(&kept).unwrap().count(), 1, "nothing is left in the trash");
        assert!(remove(&directory, UID, &kept, None).unwrap().is_empty());
    }

    #[test]
    fn a_directory_that_a_newer_pod_moved_aside_is_found_and_the_newer_one_stays() {
        let root = tempfile::tempdir().unwrap();
        let old = pod(root.path(), UID);
        let new = pod(root.path(), "bbbbbbbb-1");
        assert_eq!(old, new);
        let kept = root.path().join(KEPT).join("7");
        let logs = remove(&old, UID, &kept, None).unwrap();
        assert_eq!(fs::read_to_string(&logs[0]).unwrap(), UID);
        assert!(!root.path().join("p1.aaaaaaaa").exists());
        assert_eq!(fs::read_to_string(new.join("containers/c1/logs/0.log")).unwrap(), "bbbbbbbb-1");
    }

    #[test]
    fn what_was_taken_by_mistake_goes_back_and_never_over_another() {
        let root = tempfile::tempdir().unwrap();
        let kept = root.path().join(KEPT).join("7");
        // The look saw one pod's marker, and another pod's directory was renamed.
        let directory = pod(root.path(), "bbbbbbbb-1");
        assert_eq!(set_aside(&directory, &marker(UID), &kept).unwrap(), None);
        assert_eq!(read_marker(&directory).unwrap().uid, "bbbbbbbb-1");
        // Somebody has the place meanwhile.
        let trash = root.path().join(".trash-x");
        fs::rename(&directory, &trash).unwrap();
        fs::create_dir(&directory).unwrap();
        let now = give_back(&trash, &directory, &marker("bbbbbbbb-1"));
        assert_eq!(now, root.path().join("p1.bbbbbbbb"));
        assert_eq!(fs::read_dir(&directory).unwrap().count(), 0);
    }

    #[test]
    fn a_removal_that_was_broken_off_is_finished() {
        let root = tempfile::tempdir().unwrap();
        let kept = root.path().join(KEPT).join("7");
        let directory = pod(root.path(), UID);
        let trash = set_aside(&directory, &marker(UID), &kept).unwrap().unwrap();
        assert_eq!(remove(&directory, UID, &kept, None).unwrap().len(), 1);
        assert!(!trash.exists());
    }

    #[test]
    fn directories_without_permissions_go_and_links_in_them_are_not_followed() {
        let root = tempfile::tempdir().unwrap();
        let outside = tempfile::tempdir().unwrap();
        fs::set_permissions(outside.path(), Permissions::from_mode(0o500)).unwrap();
        let directory = pod(root.path(), UID);
        let locked = directory.join("a/b");
        fs::create_dir_all(&locked).unwrap();
        symlink(outside.path(), directory.join("a/link")).unwrap();
        for path in [locked.clone(), directory.join("a"), directory.clone()] {
            fs::set_permissions(&path, Permissions::from_mode(0o555)).unwrap();
        }
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o7777;
        // Asked directly too: root, as whom tests may run, is refused nothing.
        unlock(&directory);
        assert_eq!((mode(&locked), mode(&directory), mode(outside.path())), (0o755, 0o755, 0o500));
        fs::set_permissions(&locked, Permissions::from_mode(0o000)).unwrap();
        fs::set_permissions(&directory, Permissions::from_mode(0o555)).unwrap();
        remove(&directory, UID, &root.path().join(KEPT).join("7"), None).unwrap();
        assert!(!directory.exists());
        assert_eq!(mode(outside.path()), 0o500);
    }

    #[test]
    fn the_pods_files_in_the_home_directory_go_and_only_they() {
        let root = tempfile::tempdir().unwrap();
        let home = tempfile::tempdir().unwrap();
        let kept = root.path().join(KEPT).join("7");
        let own = files::Root::open(home.path()).unwrap();
        fs::write(home.path().join("thesis"), "mine").unwrap();
        for _ in 0..2 {
            let directory = pod(root.path(), UID);
            own.write_own(Path::new("x/key"), b"secret", 0o600, &directory.join(HOME_FILES)).unwrap();
            remove(&directory, UID, &kept, Some(home.path())).unwrap();
            assert!(!home.path().join("x/key").exists());
        }
        assert_eq!(fs::read_to_string(home.path().join("thesis")).unwrap(), "mine");
    }

    #[test]
    fn a_directory_whose_log_cannot_be_kept_stays() {
        let root = tempfile::tempdir().unwrap();
        let directory = pod(root.path(), UID);
        let kept = root.path().join(KEPT).join("7");
        // A directory stands where the log would go.
        fs::create_dir_all(kept.join("default.p1.aaaaaaaa.c1.0.log/full")).unwrap();
        let error = remove(&directory, UID, &kept, None).unwrap_err();
        assert_eq!(error.path, directory);
        assert!(error.to_string().contains("cannot be kept"), "{error}");
        assert_eq!(fs::read_to_string(directory.join("containers/c1/logs/0.log")).unwrap(), UID);
    }

    #[test]
    fn long_names_are_kept_and_a_link_in_the_place_of_logs_is_no_log() {
        let root = tempfile::tempdir().unwrap();
        let outside = tempfile::tempdir().unwrap();
        fs::write(outside.path().join("thesis"), "mine").unwrap();
        let long = Marker { namespace: "n".repeat(63), name: "p".repeat(240), ..marker(UID) };
        let directory = claim(root.path(), &long, |_| Liveness::Gone).unwrap();
        let logs = directory.join("containers").join("c".repeat(63)).join("logs");
        fs::create_dir_all(&logs).unwrap();
        fs::write(logs.join("0.log"), "line").unwrap();
        fs::write(logs.join("é".repeat(120)), "line").unwrap();
        fs::create_dir_all(directory.join("containers/linked")).unwrap();
        symlink(outside.path(), directory.join("containers/linked/logs")).unwrap();
        let kept = remove(&directory, UID, &root.path().join(KEPT).join("7"), None).unwrap();
        assert_eq!(kept.len(), 2);
        assert!(kept.iter().all(|log| log.file_name().unwrap().len() <= LOG_NAME_MOST));
        assert_eq!(fs::read_to_string(outside.path().join("thesis")).unwrap(), "mine");
    }
}
