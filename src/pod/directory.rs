//! A pod's directory: whose it is, and what becomes of it.
//!
//! [`claim`] gives a pod its directory. A directory is a pod's only with our marker in it; whatever else bears the
//! wanted name (a directory of the user's, a live pod of another namespace or another host) is never touched.

mod removal;
mod store;

use std::fs::{self, DirBuilder, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

pub use self::removal::{remove, remove_home_files};
pub use self::store::{contents, keep_in_store, store};
use crate::files;

/// The marker's name in a pod's directory.
pub const MARKER: &str = ".jiriaf-pilot.json";

/// Where logs and outcomes go, beneath the pods directory.
pub const KEPT: &str = ".jiriaf-pilot";

/// How long kept logs stay: long enough to come back after a weekend.
const KEEP_AGE: Duration = Duration::from_secs(7 * 24 * 3600);

/// How much is kept in all (bytes): home directories have quotas of some tens of GiB.
const KEEP_BYTES: u64 = 1 << 30;

/// Bytes of [`kept_name`]: 200 less a container's name (63, a DNS label), a log's (`4294967295.log.9`) and two dots.
/// A namespace's name (63) and a uid leave the pod's own no less than 45.
const KEPT_NAME_MOST: usize = 119;

/// Where the files that a pod wrote into the home directory are listed, in the pod's directory.
pub const HOME_FILES: &str = ".home-files";

/// A container's directory, beneath its pod's.
#[must_use]
pub fn container_dir(directory: &Path, container: &str) -> PathBuf {
    directory.join("containers").join(container)
}

/// The log of one run of a container.
#[must_use]
pub fn log_path(directory: &Path, container: &str, run: u32) -> PathBuf {
    container_dir(directory, container).join("logs").join(format!("{run}.log"))
}

/// A marker is some hundred bytes; anything larger is not ours.
const MARKER_BYTES: u64 = 64 * 1024;

/// Says whose a directory is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Marker {
    /// The pod's uid.
    pub uid: String,
    /// The pod's namespace.
    pub namespace: String,
    /// The pod's name.
    pub name: String,
    /// The batch job, where there is one.
    pub job: Option<String>,
    /// The host on which the pod runs.
    pub host: String,
    /// The Node's name; none for `play`.
    pub node: Option<String>,
    /// The URL of the API server that knows the pod; none for `play`.
    #[serde(default)]
    pub cluster: Option<String>,
    /// The pilot's process, so that another pilot on this host sees whether it lives.
    pub pilot: ProcessIdentity,
}

/// A process, across reuse of its number.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessIdentity {
    /// Process id.
    pub pid: i32,
    /// Start time in clock ticks since boot (proc(5), field 22 of stat).
    pub start: u64,
    /// The boot's id.
    pub boot: String,
}

/// What stands at the wanted place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Occupant {
    /// Nothing.
    None,
    /// Something without our marker.
    Foreign,
    /// A pod's directory.
    Pod(Box<Marker>),
}

/// Whether the pod of a marker may still be alive; asked only for another pod's directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Liveness {
    /// It runs, or nobody can say that it does not.
    Alive,
    /// The pod is no more.
    Gone,
}

/// Whether the API server of `cluster` is the one to ask about the pod of `other`. Another cluster's would say of each
/// pod that it is gone, and pilots of several clusters may share a home directory.
#[must_use]
pub fn is_of_cluster(other: &Marker, cluster: Option<&str>) -> bool {
    other.node.is_some() && other.cluster.is_some() && other.cluster.as_deref() == cluster
}

/// Whether a pod that nobody can be asked about may be alive: its pilot is gone only where that was on this host, and
/// the boot is another or the process is no more. `start` is the start time of the process that has its number now.
#[must_use]
pub fn process_liveness(other: &Marker, host: &str, boot: &str, start: Option<u64>) -> Liveness {
    let lives = other.pilot.boot == boot && start == Some(other.pilot.start);
    if other.host != host || lives { Liveness::Alive } else { Liveness::Gone }
}

/// What to do to give `uid` its directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Claim {
    /// The directory is this pod's already (the pilot was restarted).
    Keep,
    /// The place is free.
    Make,
    /// Move the leftover aside to this name, then make the directory.
    MoveAside(String),
    /// Leave what is there and take the other name.
    UseSuffix,
}

/// Decides; `liveness` is that of the occupant's pod.
#[must_use]
pub fn decide(uid: &str, name: &str, occupant: &Occupant, liveness: Liveness) -> Claim {
    match occupant {
        Occupant::None => Claim::Make,
        Occupant::Foreign => Claim::UseSuffix,
        Occupant::Pod(marker) if marker.uid == uid => Claim::Keep,
        Occupant::Pod(marker) => match liveness {
            Liveness::Alive => Claim::UseSuffix,
            Liveness::Gone => Claim::MoveAside(suffixed(name, &marker.uid)),
        },
    }
}

/// `<name>.<first 8 characters of uid>`. A pod's name may hold dots, but a uid's first eight characters tell them apart.
#[must_use]
pub fn suffixed(name: &str, uid: &str) -> String {
    let short: String = uid.chars().filter(char::is_ascii_alphanumeric).take(8).collect();
    format!("{name}.{short}")
}

/// What stands at `path`.
///
/// # Errors
/// When the file system does not answer.
pub fn look(path: &Path) -> io::Result<Occupant> {
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Occupant::None),
        Err(error) => Err(error),
        Ok(metadata) if !metadata.is_dir() => Ok(Occupant::Foreign),
        Ok(_) => Ok(read_marker(path).map_or(Occupant::Foreign, |marker| Occupant::Pod(Box::new(marker)))),
    }
}

/// The marker in `directory`, where there is a readable one.
#[must_use]
pub fn read_marker(directory: &Path) -> Option<Marker> {
    let path = directory.join(MARKER);
    let metadata = fs::symlink_metadata(&path).ok()?;
    if !metadata.is_file() || metadata.len() > MARKER_BYTES {
        return None;
    }
    serde_json::from_slice(&fs::read(path).ok()?).ok()
}

/// Gives the pod of `marker` its directory under `parent` and returns it. `liveness` is asked about the pod whose
/// directory stands at the plain name, if any.
///
/// # Errors
/// When no directory could be made; the message names the path and the way out.
pub fn claim(
    parent: &Path,
    marker: &Marker,
    liveness: impl Fn(&Marker) -> Liveness,
) -> Result<PathBuf, DirectoryError> {
    let plain = parent.join(&marker.name);
    let fail = |path: &Path, source| DirectoryError { path: path.to_owned(), source };
    DirBuilder::new().recursive(true).mode(0o700).create(parent).map_err(|source| fail(parent, source))?;
    let suffix = parent.join(suffixed(&marker.name, &marker.uid));
    if read_marker(&suffix).is_some_and(|found| found.uid == marker.uid) {
        return Ok(suffix);
    }
    // Twice: a directory may appear between the look and the mkdir, by another pilot on a shared home.
    for _ in 0..2 {
        let occupant = look(&plain).map_err(|source| fail(&plain, source))?;
        let alive = match &occupant {
            Occupant::Pod(found) if found.uid != marker.uid => liveness(found),
            _ => Liveness::Alive,
        };
        let target = match decide(&marker.uid, &marker.name, &occupant, alive) {
            Claim::Keep => return Ok(plain),
            Claim::Make => &plain,
            Claim::MoveAside(name) => {
                let aside = parent.join(&name);
                fs::rename(&plain, &aside).map_err(|source| fail(&aside, source))?;
                &plain
            }
            Claim::UseSuffix => &suffix,
        };
        match make(target, marker) {
            Ok(()) => return Ok(target.clone()),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(source) => return Err(fail(target, source)),
        }
    }
    make(&suffix, marker).map_err(|source| fail(&suffix, source))?;
    Ok(suffix)
}

/// An exclusive mkdir, 0700 whatever the umask, then the marker.
fn make(path: &Path, marker: &Marker) -> io::Result<()> {
    DirBuilder::new().mode(0o700).create(path)?;
    let filled = fs::set_permissions(path, Permissions::from_mode(0o700))
        .and_then(|()| serde_json::to_vec_pretty(marker).map_err(io::Error::from))
        .and_then(|bytes| files::write_atomic(&path.join(MARKER), &bytes, 0o600));
    if filled.is_err() {
        // Without its marker the directory would be nobody's; it is empty, so nothing is lost.
        let _ = fs::remove_dir_all(path);
    }
    filled
}

/// The name of a kept file: namespace, pod (cut where it is long), and enough of the uid to tell two of one name apart.
/// A container's name and a log's follow; the whole stays below 200 bytes.
#[must_use]
pub fn kept_name(namespace: &str, name: &str, uid: &str) -> String {
    let short: String = suffixed("", uid);
    let room = KEPT_NAME_MOST.saturating_sub(namespace.len() + 1 + short.len());
    let name = cut(name, room);
    format!("{namespace}.{name}{short}")
}

/// As much of a text as fits into so many bytes, in whole characters.
fn cut(text: &str, most: usize) -> &str {
    let end = text.char_indices().map(|(at, c)| at + c.len_utf8()).take_while(|end| *end <= most).last();
    &text[..end.unwrap_or(0)]
}

/// Makes the kept directory and its parent, 0700.
///
/// # Errors
/// When they cannot be made.
pub fn make_kept(kept: &Path) -> io::Result<()> {
    for path in [kept.parent(), Some(kept)].into_iter().flatten() {
        match DirBuilder::new().mode(0o700).create(path) {
            Ok(()) => fs::set_permissions(path, Permissions::from_mode(0o700))?,
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Removes kept files that are too old, then the oldest until the rest is small enough. What a removal that was broken
/// off has left for as long goes too.
pub fn prune_kept(root: &Path, now: SystemTime) {
    for path in old_trash(root, now) {
        let _ = removal::remove_tree(&path);
    }
    for path in superfluous(root, now) {
        let _ = fs::remove_file(&path);
        if let Some(job) = path.parent() {
            // Goes only when it is empty.
            let _ = fs::remove_dir(job);
        }
    }
}

/// Directories whose removal began longer ago than logs are kept: their inode changed when they were renamed.
fn old_trash(root: &Path, now: SystemTime) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let now = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    for job in fs::read_dir(root).into_iter().flatten().flatten() {
        for entry in fs::read_dir(job.path()).into_iter().flatten().flatten() {
            let trash = entry.file_name().to_string_lossy().starts_with(removal::TRASH);
            let Some(metadata) = entry.metadata().ok().filter(|metadata| trash && metadata.is_dir()) else {
                continue;
            };
            let renamed = Duration::from_secs(u64::try_from(metadata.ctime()).unwrap_or_default());
            if now.saturating_sub(renamed) > KEEP_AGE {
                found.push(entry.path());
            }
        }
    }
    found
}

/// The kept files that [`prune_kept`] removes.
#[must_use]
pub fn superfluous(root: &Path, now: SystemTime) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for job in fs::read_dir(root).into_iter().flatten().flatten() {
        for file in fs::read_dir(job.path()).into_iter().flatten().flatten() {
            let Ok(metadata) = file.metadata() else { continue };
            if metadata.is_file() {
                found.push((metadata.modified().unwrap_or(now), metadata.len(), file.path()));
            }
        }
    }
    too_much(found, now)
}

/// Which of the files (time of change, bytes, path) go.
fn too_much(mut files: Vec<(SystemTime, u64, PathBuf)>, now: SystemTime) -> Vec<PathBuf> {
    files.sort_by_key(|file| std::cmp::Reverse(file.0));
    let mut total = 0u64;
    let mut gone = Vec::new();
    for (changed, bytes, path) in files {
        total = total.saturating_add(bytes);
        if total > KEEP_BYTES || now.duration_since(changed).is_ok_and(|age| age > KEEP_AGE) {
            gone.push(path);
        }
    }
    gone
}

/// A pod's directory could not be had.
#[derive(Debug, thiserror::Error)]
#[error("{path}: {source}; make room or permit writing there, or choose another place with --pods-dir", path = path.display())]
pub struct DirectoryError {
    /// The directory.
    pub path: PathBuf,
    /// Why.
    pub source: io::Error,
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn marker(uid: &str) -> Marker {
        Marker {
            uid: uid.to_owned(),
            namespace: "default".to_owned(),
            name: "p1".to_owned(),
            job: Some("7".to_owned()),
            host: "n1".to_owned(),
            node: Some("site-7-n1".to_owned()),
            cluster: Some("https://a:6443".to_owned()),
            pilot: ProcessIdentity { pid: 1, start: 2, boot: "b".to_owned() },
        }
    }

    #[test]
    fn a_directory_without_our_marker_is_never_touched() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("p1")).unwrap();
        fs::write(root.path().join("p1/thesis.tex"), "years of work").unwrap();
        let got = claim(root.path(), &marker("aaaaaaaa-1"), |_| Liveness::Gone).unwrap();
        assert_eq!(got, root.path().join("p1.aaaaaaaa"));
        assert_eq!(fs::read_to_string(root.path().join("p1/thesis.tex")).unwrap(), "years of work");
    }

    #[test]
    fn a_leftover_is_moved_aside_and_the_plain_name_is_used() {
        let root = tempfile::tempdir().unwrap();
        let old = claim(root.path(), &marker("aaaaaaaa-1"), |_| Liveness::Alive).unwrap();
        fs::write(old.join("result"), "42").unwrap();
        let new = claim(root.path(), &marker("bbbbbbbb-1"), |_| Liveness::Gone).unwrap();
        assert_eq!(new, root.path().join("p1"));
        assert_eq!(fs::read_to_string(root.path().join("p1.aaaaaaaa/result")).unwrap(), "42");
        assert_eq!(fs::metadata(&new).unwrap().permissions().mode() & 0o777, 0o700);
    }

    #[test]
    fn a_live_pod_keeps_its_directory() {
        let root = tempfile::tempdir().unwrap();
        claim(root.path(), &marker("aaaaaaaa-1"), |_| Liveness::Alive).unwrap();
        let other = claim(root.path(), &marker("bbbbbbbb-1"), |_| Liveness::Alive).unwrap();
        assert_eq!(other, root.path().join("p1.bbbbbbbb"));
        let again = claim(root.path(), &marker("bbbbbbbb-1"), |_| Liveness::Gone).unwrap();
        assert_eq!(again, other, "a restarted pilot finds what it had");
    }

    #[test]
    fn a_link_in_the_way_is_not_followed() {
        let root = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/", root.path().join("p1")).unwrap();
        let got = claim(root.path(), &marker("aaaaaaaa-1"), |_| Liveness::Gone).unwrap();
        assert_eq!(got, root.path().join("p1.aaaaaaaa"));
    }

    #[test]
    fn only_the_pods_own_cluster_is_asked_about_it() {
        let other = marker("aaaaaaaa-1");
        assert!(is_of_cluster(&other, Some("https://a:6443")));
        assert!(!is_of_cluster(&other, Some("https://b:6443")));
        assert!(!is_of_cluster(&other, None));
        let mut old = serde_json::to_value(&other).unwrap();
        old.as_object_mut().unwrap().remove("cluster");
        let old: Marker = serde_json::from_value(old).unwrap();
        assert!(!is_of_cluster(&old, Some("https://a:6443")) && !is_of_cluster(&old, None));
        // Host, boot, the start of the process with its number.
        for (host, boot, start, wanted) in [
            ("n1", "b", Some(2), Liveness::Alive),
            ("n1", "b", Some(3), Liveness::Gone),
            ("n1", "b", None, Liveness::Gone),
            ("n1", "c", Some(2), Liveness::Gone),
            ("n2", "c", None, Liveness::Alive),
        ] {
            assert_eq!(process_liveness(&other, host, boot, start), wanted, "{host} {boot} {start:?}");
        }
    }

    #[test]
    fn a_kept_name_is_short_and_keeps_the_uid() {
        assert_eq!(kept_name("default", "p1", "aaaaaaaa-1"), "default.p1.aaaaaaaa");
        let long = kept_name(&"n".repeat(63), &"p".repeat(253), "aaaaaaaa-1");
        assert_eq!(long.len(), KEPT_NAME_MOST);
        assert!(long.ends_with("p.aaaaaaaa"));
        assert!(format!("{long}.{}.4294967295.log.9", "c".repeat(63)).len() <= 200);
    }

    #[test]
    fn a_removal_that_was_broken_off_goes_with_the_old_logs() {
        let root = tempfile::tempdir().unwrap();
        let trash = root.path().join("7/.trash-aaaaaaaa-1");
        fs::create_dir_all(trash.join("a")).unwrap();
        fs::create_dir_all(root.path().join("8/other")).unwrap();
        let now = SystemTime::now();
        prune_kept(root.path(), now);
        assert!(trash.exists());
        prune_kept(root.path(), now + 2 * KEEP_AGE);
        assert!(!trash.exists());
        assert!(root.path().join("8/other").exists());
    }

    #[test]
    fn old_and_superfluous_logs_go_oldest_first() {
        let now = SystemTime::now();
        let day = Duration::from_secs(24 * 3600);
        let files = vec![
            (now - day, 600 << 20, PathBuf::from("b")),
            (now, 600 << 20, PathBuf::from("a")),
            (now - 8 * day, 1, PathBuf::from("c")),
        ];
        assert_eq!(too_much(files, now), vec![PathBuf::from("b"), PathBuf::from("c")]);
    }
}
