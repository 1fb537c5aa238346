//! What survives a crash of the pilot: who it is, since when, and the pods that it had.

use std::fs;
use std::io;
use std::path::Path;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use super::SetupError;
use super::places::place;
use crate::container::Supervisors;
use crate::files;
use crate::idle::Kept;
use crate::pod::context::on_disk;
use crate::pod::directory::ProcessIdentity;
use crate::pod::manager;
use crate::pod::record::Records;

/// What survives a crash of the pilot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::commands) struct PilotState {
    version: u32,
    /// A name of this pilot that no other has.
    pub(super) instance: String,
    /// The boot in which it began.
    pub boot: String,
    /// Its guardian, which is there before the pilot and after each crash of it: `clean` asks whether it lives.
    #[serde(default)]
    pub guardian: Option<ProcessIdentity>,
    pub(super) first_start: SystemTime,
    /// The time that was left at the first start, in seconds: the leads are a part of it.
    pub(super) first_left: Option<u64>,
    /// Since when no pod ran, where somebody wants to know.
    #[serde(default)]
    pub(in crate::commands::run) idle: Kept,
}

pub(super) const PILOT_STATE_VERSION: u32 = 1;

pub(super) fn load_state(state_dir: &Path) -> Result<PilotState, SetupError> {
    let path = state_dir.join("pilot.json");
    let boot = crate::container::process::boot_id();
    let fresh = || PilotState {
        version: PILOT_STATE_VERSION,
        instance: instance(),
        boot: boot.clone(),
        guardian: Some(guardian_process()),
        first_start: SystemTime::now(),
        first_left: None,
        idle: Kept::default(),
    };
    let restarted = restarted();
    match fs::read(&path) {
        Ok(bytes) => match serde_json::from_slice::<PilotState>(&bytes) {
            // Only a pilot that its guardian has restarted takes up the old life; anyone else begins a new one.
            Ok(state) if state.version == PILOT_STATE_VERSION && state.boot == boot && restarted => Ok(state),
            Ok(_) => Ok(fresh()),
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "the pilot's state cannot be read; it begins anew");
                Ok(fresh())
            }
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(fresh()),
        Err(error) => Err(place("state directory", &path, &error, "choose another place with --state-dir")),
    }
}

/// The state of the pilot whose directory this is; none where there is none that can be read.
pub(in crate::commands) fn read_state(state_dir: &Path) -> Option<PilotState> {
    let bytes = fs::read(state_dir.join("pilot.json")).ok()?;
    serde_json::from_slice(&bytes).ok()
}

pub(super) fn save_state(state_dir: &Path, state: &PilotState) -> Result<(), SetupError> {
    let path = state_dir.join("pilot.json");
    let bytes = serde_json::to_vec_pretty(state).map_err(io::Error::from);
    bytes.and_then(|bytes| files::write_atomic(&path, &bytes, 0o600)).map_err(|error| {
        place("state directory", &path, &error, "make room there or choose another with --state-dir")
    })
}

/// Writes the state whenever it changes, the newest last. A disk that hangs holds up nothing but that.
pub(super) fn keep_state(state_dir: &Path, state: PilotState) -> watch::Sender<PilotState> {
    let state_dir = state_dir.to_owned();
    let (changes, mut state) = watch::channel(state);
    tokio::spawn(async move {
        while state.changed().await.is_ok() {
            let (now, dir) = (state.borrow_and_update().clone(), state_dir.clone());
            if let Ok(Err(error)) = on_disk(move || save_state(&dir, &now)).await {
                tracing::warn!(%error, "the pilot's state could not be written; after a crash its idle time begins anew");
            }
        }
    });
    changes
}

/// A name that no other pilot or pod has: the kernel makes one at each read.
pub(in crate::commands) fn instance() -> String {
    fs::read_to_string("/proc/sys/kernel/random/uuid").map_or_else(
        |_| format!("{}-{:?}", std::process::id(), SystemTime::now()),
        |uuid| uuid.trim().to_owned(),
    )
}

/// This process, as markers name it.
pub(in crate::commands) fn this_process() -> ProcessIdentity {
    identity(nix::unistd::getpid().as_raw())
}

/// The guardian of this process, whose child it is.
pub(super) fn guardian_process() -> ProcessIdentity {
    identity(nix::unistd::getppid().as_raw())
}

pub(super) fn identity(pid: i32) -> ProcessIdentity {
    ProcessIdentity {
        pid,
        start: crate::container::process::start_time(pid).unwrap_or_default(),
        boot: crate::container::process::boot_id(),
    }
}

/// Whether the guardian has started this pilot again.
pub fn restarted() -> bool {
    std::env::var_os(crate::guardian::RESTARTED).is_some()
}

/// How long ago the pilot before this one was asked to end.
#[must_use]
pub fn asked_to_end() -> Option<Duration> {
    let at = std::env::var(crate::guardian::ASKED).ok()?.parse().ok()?;
    let at = SystemTime::UNIX_EPOCH.checked_add(Duration::from_millis(at))?;
    Some(SystemTime::now().duration_since(at).unwrap_or_default())
}

/// The pods of before a crash, each with the supervisors that are still there. A pilot that no guardian has restarted
/// begins anew: what an earlier one of the same name left is ended and forgotten.
pub(super) async fn recover(
    supervisors: &Supervisors,
    all: &Records,
    restarted: bool,
) -> Vec<manager::Recovered> {
    let mut records = all.load();
    let mut found = match supervisors.find().await {
        Ok(found) => found,
        Err(error) => {
            tracing::error!(%error, "the supervisors of before the crash cannot be found");
            Vec::new()
        }
    };
    if !restarted {
        for record in std::mem::take(&mut records) {
            all.remove(record.uid());
        }
    } else if !records.is_empty() {
        tracing::info!(
            pods = records.len(),
            supervisors = found.len(),
            "taking up the pods of before the crash"
        );
    }
    let mut recovered = Vec::new();
    for record in records {
        let (mine, others): (Vec<_>, Vec<_>) =
            found.into_iter().partition(|(id, _)| id.pod_uid == record.uid());
        found = others;
        recovered.push((record, mine));
    }
    for (id, mut supervisor) in found {
        tracing::warn!(container = %id, "a supervisor without a pod's record is ended");
        supervisor.terminate(Duration::ZERO).await;
    }
    recovered
}
