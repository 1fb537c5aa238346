//! Where pods' files lie when containers may be isolated: all beneath one directory, which a view can hide.
//!
//! `<kept>/store/<uid>/` has `containers/` and `volumes/`, and the pod's own directory has links of ours to both, so that
//! every path stays what it is. What the pod writes beside them lies in its directory, as ever.

use std::fs::{self, DirBuilder, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};

use super::{MARKER, Marker, make_kept, read_marker};
use crate::files;

/// Beneath the kept directory: where the pods' files are.
const STORE: &str = "store";

/// What lies in the store.
const STORED: [&str; 2] = ["containers", "volumes"];

/// Where the files of a pod are when they are stored.
#[must_use]
pub fn store(kept: &Path, uid: &str) -> PathBuf {
    kept.join(STORE).join(files::uid_name(uid))
}

/// Stores the files of a pod whose directory was just made. One that has files already stays as it is.
///
/// # Errors
/// When the store or a link cannot be made.
pub fn keep_in_store(directory: &Path, marker: &Marker, kept: &Path) -> io::Result<()> {
    if fs::symlink_metadata(directory.join(STORED[0])).is_ok_and(|found| !found.is_symlink()) {
        return Ok(());
    }
    make_kept(kept)?;
    let store = store(kept, &marker.uid);
    for place in store.parent().into_iter().chain([store.as_path()]) {
        match DirBuilder::new().mode(0o700).create(place) {
            Ok(()) => fs::set_permissions(place, Permissions::from_mode(0o700))?,
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
    }
    // So that it is known whose it is when the pod's directory is gone.
    files::write_atomic(&store.join(MARKER), &serde_json::to_vec_pretty(marker)?, 0o600)?;
    for name in STORED {
        let target = store.join(name);
        match DirBuilder::new().mode(0o700).create(&target) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        match symlink(&target, directory.join(name)) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

/// The directory in which a pod's `containers/` and `volumes/` are: the store, where it has one. Its directory's links are not
/// asked: any pod of this user can change them.
#[must_use]
pub fn contents(directory: &Path, uid: &str, kept: &Path) -> PathBuf {
    let store = store(kept, uid);
    if read_marker(&store).is_some_and(|marker| marker.uid == uid) { store } else { directory.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::super::tests::marker;
    use super::super::{KEPT, Liveness, claim, remove};
    use super::*;

    #[test]
    fn a_stored_pod_has_its_files_at_the_usual_paths_and_goes_with_all_of_them() {
        let root = tempfile::tempdir().unwrap();
        let kept = root.path().join(KEPT).join("7");
        let marker = marker("aaaaaaaa-1");
        let directory = claim(root.path(), &marker, |_| Liveness::Gone).unwrap();
        assert_eq!(contents(&directory, &marker.uid, &kept), directory);
        for _ in 0..2 {
            keep_in_store(&directory, &marker, &kept).unwrap();
        }
        let store = kept.join("store/aaaaaaaa-1");
        assert_eq!(contents(&directory, &marker.uid, &kept), store);
        assert_eq!(fs::metadata(&store).unwrap().permissions().mode() & 0o777, 0o700);
        fs::create_dir_all(store.join("containers/c1/logs")).unwrap();
        fs::write(directory.join("containers/c1/logs/0.log"), "line").unwrap();
        // One that is moved aside keeps its files.
        let aside = root.path().join("p1.aaaaaaaa");
        fs::rename(&directory, &aside).unwrap();
        assert_eq!(fs::read_to_string(aside.join("containers/c1/logs/0.log")).unwrap(), "line");
        let logs = remove(&directory, &marker.uid, &kept, None).unwrap();
        assert_eq!(logs, [kept.join("default.p1.aaaaaaaa.c1.0.log")]);
        assert_eq!(fs::read_to_string(&logs[0]).unwrap(), "line");
        assert_eq!(fs::read_dir(&kept).unwrap().count(), 1, "neither the store nor the trash is left");
        assert!(!aside.exists());
    }

    #[test]
    fn a_pod_whose_directory_somebody_removed_leaves_nothing_in_the_store() {
        let root = tempfile::tempdir().unwrap();
        let kept = root.path().join(KEPT).join("7");
        let marker = marker("aaaaaaaa-1");
        let directory = claim(root.path(), &marker, |_| Liveness::Gone).unwrap();
        keep_in_store(&directory, &marker, &kept).unwrap();
        fs::create_dir_all(directory.join("containers/c1/logs")).unwrap();
        fs::write(directory.join("containers/c1/logs/0.log"), "line").unwrap();
        fs::remove_dir_all(&directory).unwrap();
        let logs = remove(&directory, &marker.uid, &kept, None).unwrap();
        assert_eq!(logs.len(), 1);
        assert!(!kept.join("store").exists());
    }

    #[test]
    fn files_that_are_there_stay_and_a_link_of_the_pods_own_is_not_followed() {
        let root = tempfile::tempdir().unwrap();
        let outside = tempfile::tempdir().unwrap();
        let kept = root.path().join(KEPT).join("7");
        let marker = marker("aaaaaaaa-1");
        let directory = claim(root.path(), &marker, |_| Liveness::Gone).unwrap();
        fs::create_dir(directory.join("containers")).unwrap();
        keep_in_store(&directory, &marker, &kept).unwrap();
        assert_eq!(contents(&directory, &marker.uid, &kept), directory);
        fs::remove_dir(directory.join("containers")).unwrap();
        fs::create_dir_all(outside.path().join("c1/logs")).unwrap();
        fs::write(outside.path().join("c1/logs/thesis"), "mine").unwrap();
        symlink(outside.path(), directory.join("containers")).unwrap();
        assert_eq!(contents(&directory, &marker.uid, &kept), directory);
        assert!(remove(&directory, &marker.uid, &kept, None).unwrap().is_empty());
        assert_eq!(fs::read_to_string(outside.path().join("c1/logs/thesis")).unwrap(), "mine");
    }
}
