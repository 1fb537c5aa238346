//! The state directories of pilots on this host, and which of the pilots live.
//!
//! A pilot holds the lock in its directory. Between a crash and its restart nobody does: then its guardian lives.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg, OFlag};

use crate::commands::file_systems;
use crate::commands::run::setup;
use crate::container::process::{self, Identity};
use crate::pod::directory::ProcessIdentity;

/// A pilot writes who it is a moment after it has made its lock, or, where the batch system hangs, after some 10 s.
const BEGINNING: Duration = Duration::from_secs(60);

/// Whether somebody still uses a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Life {
    /// Its pilot lives.
    Live,
    /// Its pilot is no more.
    Dead,
    /// Nobody here can say, for this reason: left alone.
    Unknown(String),
}

/// A pilot's state directory.
#[derive(Debug)]
pub struct State {
    /// Where it is.
    pub path: PathBuf,
    /// The pilot's name: that of its Node.
    pub name: String,
    /// Whether it lives.
    pub life: Life,
    /// Held while a dead pilot's directory is looked at, so that none of its name begins meanwhile.
    _lock: Option<Flock<File>>,
}

impl State {
    /// The uids of the pods that it tells of.
    pub fn pods(&self) -> Vec<String> {
        let names = |directory: &str| {
            let entries = fs::read_dir(self.path.join(directory)).into_iter().flatten().flatten();
            entries.filter_map(|entry| entry.file_name().into_string().ok()).collect::<Vec<_>>()
        };
        // `pods/<uid>.json` and `containers/<uid>.<container>.<restart count>`.
        let all = names("pods").into_iter().chain(names("containers"));
        let mut uids: Vec<String> = all
            .filter_map(|name| Some(name.split('.').next()?.to_owned()))
            .filter(|uid| !uid.is_empty())
            .collect();
        uids.sort();
        uids.dedup();
        uids
    }
}

/// What is known of a state directory, to judge its life by.
#[derive(Debug, Clone)]
struct Signs {
    /// None: there is no lock.
    lock: Option<Lock>,
    /// Whether pilot.json tells of a guardian that lives; none when there is no such file.
    guardian: Option<bool>,
    /// Whether it began in this boot of this host.
    this_boot: bool,
    /// Whether other hosts may share it.
    network: Option<&'static str>,
    age: Duration,
}

#[derive(Debug, Clone)]
enum Lock {
    Held,
    Free,
    Broken(String),
}

/// None: not a pilot's.
fn judge(signs: &Signs) -> Option<Life> {
    if signs.lock.is_none() && signs.guardian.is_none() {
        return None;
    }
    Some(match (&signs.lock, signs.guardian, signs.network) {
        (Some(Lock::Held), ..) | (_, Some(true), _) => Life::Live,
        (Some(Lock::Broken(why)), ..) => Life::Unknown(format!("its lock cannot be tried: {why}")),
        (_, Some(false), Some(kind)) if !signs.this_boot => {
            Life::Unknown(format!("on {kind}, and of another host or of before a reboot"))
        }
        (_, None, Some(kind)) => Life::Unknown(format!("on {kind}, and it does not say of which host")),
        (_, None, None) if signs.age < BEGINNING => Life::Live,
        _ => Life::Dead,
    })
}

/// The pilots' directories beneath `root`, which must be ours alone: what it says is acted upon.
///
/// # Errors
/// When the root is somebody else's or cannot be read; none there is no error.
pub fn find(root: &Path, now: SystemTime) -> io::Result<Vec<State>> {
    let metadata = match fs::symlink_metadata(root) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    if !metadata.is_dir() || !is_ours(&metadata) || metadata.mode() & 0o022 != 0 {
        return Err(io::Error::other("not a directory that you alone can write to; left alone"));
    }
    let mut found = Vec::new();
    for entry in fs::read_dir(root)? {
        let path = entry?.path();
        let Ok(metadata) = fs::symlink_metadata(&path) else { continue };
        let Some(name) = path.file_name().and_then(|name| name.to_str()).map(str::to_owned) else { continue };
        if !metadata.is_dir() || !is_ours(&metadata) {
            continue;
        }
        let (lock, held) = try_lock(&path.join("lock"));
        let state = setup::read_state(&path);
        let signs = Signs {
            lock,
            guardian: state.as_ref().map(|state| state.guardian.as_ref().is_some_and(is_alive)),
            this_boot: state.as_ref().is_some_and(|state| state.boot == process::boot_id()),
            network: file_systems::network(&path),
            age: metadata.modified().ok().and_then(|at| now.duration_since(at).ok()).unwrap_or_default(),
        };
        if let Some(life) = judge(&signs) {
            let held = held.filter(|_| life == Life::Dead);
            found.push(State { path, name, life, _lock: held });
        }
    }
    found.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(found)
}

/// Whether a file is this user's.
pub fn is_ours(metadata: &fs::Metadata) -> bool {
    metadata.uid() == nix::unistd::geteuid().as_raw()
}

/// Whether the process of a marker or of a pilot's state lives, on this host.
pub fn is_alive(process: &ProcessIdentity) -> bool {
    Identity { pid: process.pid, start: process.start, boot: process.boot.clone() }.is_alive()
}

fn try_lock(path: &Path) -> (Option<Lock>, Option<Flock<File>>) {
    let flags = (OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK).bits();
    let file = match OpenOptions::new().read(true).write(true).custom_flags(flags).open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return (None, None),
        Err(error) => return (Some(Lock::Broken(error.to_string())), None),
    };
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(held) => (Some(Lock::Free), Some(held)),
        Err((_, Errno::EWOULDBLOCK)) => (Some(Lock::Held), None),
        Err((_, error)) => (Some(Lock::Broken(error.to_string())), None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_surely_dead_is_dead() {
        let old = Duration::from_secs(3600);
        let signs = |lock: Option<Lock>, guardian, this_boot, network, age| Signs {
            lock,
            guardian,
            this_boot,
            network,
            age,
        };
        let unknown = |signs: &Signs| matches!(judge(signs), Some(Life::Unknown(_)));
        let free = || Some(Lock::Free);
        assert_eq!(judge(&signs(None, None, false, None, old)), None, "not a pilot's");
        assert_eq!(judge(&signs(Some(Lock::Held), Some(false), true, None, old)), Some(Life::Live));
        assert_eq!(
            judge(&signs(free(), Some(true), true, None, old)),
            Some(Life::Live),
            "between two pilots"
        );
        assert_eq!(judge(&signs(free(), Some(false), true, None, old)), Some(Life::Dead));
        assert_eq!(judge(&signs(free(), Some(false), false, None, old)), Some(Life::Dead), "before a reboot");
        assert_eq!(judge(&signs(None, Some(false), true, None, old)), Some(Life::Dead));
        assert_eq!(judge(&signs(free(), None, false, None, Duration::ZERO)), Some(Life::Live), "just begins");
        assert_eq!(judge(&signs(free(), None, false, None, old)), Some(Life::Dead));
        assert!(unknown(&signs(free(), Some(false), false, Some("NFS"), old)), "may be another host's");
        assert_eq!(judge(&signs(free(), Some(false), true, Some("NFS"), old)), Some(Life::Dead));
        assert!(unknown(&signs(free(), None, false, Some("NFS"), old)));
        assert!(unknown(&signs(Some(Lock::Broken("ENOLCK".to_owned())), Some(false), true, None, old)));
    }
}
