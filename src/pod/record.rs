//! What a pilot must know of its pods after a crash: one file a pod in the state directory.
//!
//! A record is written before the pod's first container starts and at each start and end, and removed when the pod is
//! gone. So a pod that was started is never admitted again, and nothing runs twice.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Pod, PodStatus};
use serde::{Deserialize, Serialize};

use super::share::Share;
use super::status::{Ending, State, Terminated};
use crate::files;

/// The version of the files' form; a pilot of another form does not guess.
pub const VERSION: u32 = 1;

/// A record is a Pod (at most 1.5 MiB, etcd's limit) and some hundred bytes a container.
const RECORD_BYTES: u64 = 8 << 20;

/// A pod as this pilot has it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// The form of this file.
    pub version: u32,
    /// The Pod as it was last seen.
    pub pod: Pod,
    /// Its directory, once it has one.
    pub directory: Option<PathBuf>,
    /// When it was admitted: the status' startTime.
    pub admitted: Timestamp,
    /// Its containers by name.
    pub containers: BTreeMap<String, ContainerRecord>,
    /// Its final status, once it has one: a terminal phase stays.
    pub last_status: Option<PodStatus>,
    /// What becomes of it, whatever its containers say: it is being evicted, or was active too long.
    #[serde(default)]
    pub ending: Option<Ending>,
    /// What of the allocation it has to itself.
    #[serde(default)]
    pub share: Share,
}

/// A container as this pilot has it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ContainerRecord {
    /// Which run it is: 0, then one more a restart.
    pub restart: u32,
    /// Whether this run's supervisor was told to start it.
    pub launched: bool,
    /// The state of this run.
    pub state: State,
    /// How the run before it ended.
    pub last: Option<Terminated>,
    /// Lines of this run's output that could not be written.
    pub log_lines_lost: u64,
    /// Whether this run has started: its startup probe has succeeded, where it has one.
    #[serde(default)]
    pub started: bool,
    /// Whether this run is ready: its readiness probe succeeds, where it has one.
    #[serde(default)]
    pub ready: bool,
    /// Whether it is ended to be started again (a probe failed, its image changed), so that its exit code does not decide.
    #[serde(default)]
    pub again: bool,
}

impl Default for ContainerRecord {
    fn default() -> Self {
        let state = State::Waiting { reason: "ContainerCreating".to_owned(), message: String::new() };
        Self {
            restart: 0,
            launched: false,
            state,
            last: None,
            log_lines_lost: 0,
            started: false,
            ready: false,
            again: false,
        }
    }
}

impl ContainerRecord {
    /// Whether any run of it has begun.
    #[must_use]
    pub fn has_begun(&self) -> bool {
        let waits = matches!(self.state, State::Waiting { .. });
        self.launched || !waits || self.restart > 0 || self.last.is_some()
    }
}

impl Record {
    /// A pod that is being admitted.
    #[must_use]
    pub fn new(pod: Pod, admitted: Timestamp) -> Self {
        Self {
            version: VERSION,
            pod,
            directory: None,
            admitted,
            containers: BTreeMap::new(),
            last_status: None,
            ending: None,
            share: Share::default(),
        }
    }

    /// The pod's uid.
    #[must_use]
    pub fn uid(&self) -> &str {
        self.pod.metadata.uid.as_deref().unwrap_or_default()
    }
}

/// The records of one pilot.
#[derive(Debug, Clone)]
pub struct Records {
    directory: PathBuf,
}

impl Records {
    /// Keeps records in `directory`, which is made (0700) when it is not there.
    ///
    /// # Errors
    /// When the directory cannot be made or is not ours alone.
    pub fn open(directory: &Path) -> io::Result<Self> {
        files::private_dir(directory).map_err(io::Error::other)?;
        Ok(Self { directory: directory.to_owned() })
    }

    fn path(&self, uid: &str) -> PathBuf {
        self.directory.join(format!("{}.json", files::uid_name(uid)))
    }

    /// Writes one record, whole or not at all.
    ///
    /// # Errors
    /// When it cannot be written; the caller does not start what it could not record.
    pub fn save(&self, record: &Record) -> io::Result<()> {
        files::write_atomic(&self.path(record.uid()), &serde_json::to_vec(record)?, 0o600)
    }

    /// Removes the record of a pod that is gone.
    pub fn remove(&self, uid: &str) {
        if let Err(error) = fs::remove_file(self.path(uid))
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(uid, %error, "the record of a pod that is gone could not be removed");
        }
    }

    /// Reads all records; one that cannot be read is named in the log and left where it is.
    #[must_use]
    pub fn load(&self) -> Vec<Record> {
        let entries = fs::read_dir(&self.directory).into_iter().flatten().flatten();
        let paths =
            entries.map(|entry| entry.path()).filter(|path| path.extension().is_some_and(|e| e == "json"));
        paths.filter_map(|path| match read(&path) {
            Ok(record) => Some(record),
            Err(error) => {
                tracing::error!(path = %path.display(), %error, "a pod's record cannot be read; its pod will be reported as lost");
                None
            }
        })
        .collect()
    }
}

fn read(path: &Path) -> io::Result<Record> {
    if fs::metadata(path)?.len() > RECORD_BYTES {
        return Err(io::Error::other(format!("larger than {RECORD_BYTES} bytes")));
    }
    let record: Record = serde_json::from_str(&fs::read_to_string(path)?)?;
    if record.version == VERSION {
        Ok(record)
    } else {
        Err(io::Error::other(format!("it has version {}, this pilot reads {VERSION}", record.version)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn pod(uid: &str) -> Pod {
        let mut pod = Pod::default();
        pod.metadata.uid = Some(uid.to_owned());
        pod.metadata.name = Some("p1".to_owned());
        pod
    }

    #[test]
    fn a_record_comes_back_as_it_was_and_nobody_else_reads_it() {
        let root = tempfile::tempdir().unwrap();
        let records = Records::open(&root.path().join("pods")).unwrap();
        let mut record = Record::new(pod("11-22"), "2026-01-01T00:00:00Z".parse().unwrap());
        record
            .containers
            .insert("c1".to_owned(), ContainerRecord { restart: 3, launched: true, ..Default::default() });
        records.save(&record).unwrap();
        assert_eq!(records.load(), vec![record]);
        let mode = fs::metadata(root.path().join("pods/11-22.json")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        records.remove("11-22");
        assert!(records.load().is_empty());
    }

    #[test]
    fn what_cannot_be_read_is_left_alone_and_hides_nothing() {
        let root = tempfile::tempdir().unwrap();
        let records = Records::open(&root.path().join("pods")).unwrap();
        records.save(&Record::new(pod("ok"), "2026-01-01T00:00:00Z".parse().unwrap())).unwrap();
        fs::write(root.path().join("pods/torn.json"), "{\"version\":1,").unwrap();
        fs::write(root.path().join("pods/newer.json"), "{\"version\":99}").unwrap();
        assert_eq!(records.load().len(), 1);
        assert!(root.path().join("pods/torn.json").exists());
    }

    #[test]
    fn a_uid_cannot_leave_the_directory() {
        let records = Records { directory: PathBuf::from("/state/pods") };
        assert_eq!(records.path("../../etc/passwd"), PathBuf::from("/state/pods/etcpasswd.json"));
    }
}
