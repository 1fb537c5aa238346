//! What all pods of a pilot share.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::JoinError;

use super::api::Api;
use super::directory::ProcessIdentity;
use super::environment::Facts;
use super::events::Events;
use super::expansion::Expand;
use super::images::Images;
use super::isolation::Isolation;
use super::ports::Ports;
use super::pressure::Kills;
use super::record::Records;
use super::roster::Roster;
use super::services::Services;
use super::share::Placement;
use crate::container::{Delegation, Session, Supervisors};
use crate::pilot_metrics::PilotMetrics;

/// How many pieces of work on the pods directory go on at once: half of the runtime's blocking threads. A home directory
/// that hangs holds these, and name resolution and the batch system's programs still have theirs.
const ON_DISK: usize = 4;

static DISK: Semaphore = Semaphore::const_new(ON_DISK);

/// How many of those who only read (logs for kubectl, sizes for metrics) are at work at once: a quarter of the threads, and
/// never those of pods that start or end.
const READING: usize = 2;

static READERS: Semaphore = Semaphore::const_new(READING);

/// Works on the pods directory, in a thread that may be held up, after those that were there before.
///
/// # Errors
/// When the work panics or the runtime ends.
pub async fn on_disk<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, JoinError> {
    in_turn(&DISK, work).await
}

/// As [`on_disk`], for whom no pod waits: two hundred followers of logs hold up no pod's start.
///
/// # Errors
/// When the work panics or the runtime ends.
pub async fn reading_disk<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, JoinError> {
    in_turn(&READERS, work).await
}

async fn in_turn<T: Send + 'static>(
    room: &'static Semaphore,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, JoinError> {
    // The semaphore is never closed. The thread holds the permit: whoever waits for it may have given up.
    let permit = room.acquire().await;
    tokio::task::spawn_blocking(move || {
        let _permit = permit;
        work()
    })
    .await
}

/// A line of a container's output on its way to the terminal (`play`).
#[derive(Debug, Clone)]
pub struct OutputLine {
    /// The pod's name.
    pub pod: String,
    /// The container's name.
    pub container: String,
    /// Whether it came on standard error.
    pub stderr: bool,
    /// The line, without its end.
    pub line: String,
}

/// What all pods of a pilot share.
pub struct Context {
    /// Where objects come from and statuses go.
    pub api: Api,
    /// Where events go.
    pub events: Events,
    /// The Services that containers are told of.
    pub services: Services,
    /// Starts containers.
    pub supervisors: Arc<Supervisors>,
    /// What survives a crash.
    pub records: Records,
    /// This pilot's Node, host and job.
    pub identity: Identity,
    /// Where pod directories are.
    pub places: Places,
    /// The environment that containers start from: the pilot's own, less what is secret or misleading.
    pub inherited: Vec<(String, String)>,
    /// What is replaced in args and env values.
    pub expand: Expand,
    /// What containers do whose image is no script of theirs.
    pub images: Images,
    /// Where containers run, and which GPUs there are.
    pub shares: Shares,
    /// Whom the kernel has killed for want of memory.
    pub kills: Arc<Kills>,
    /// What the Node offers, for resourceFieldRef.
    pub allocatable: BTreeMap<String, Quantity>,
    /// When the pods will be ended, where that is known.
    pub drain: watch::Receiver<Option<SystemTime>>,
    /// True once the pilot drains.
    pub draining: watch::Receiver<bool>,
    /// The pods as they are now, for those who only look.
    pub roster: Arc<Roster>,
    /// This pilot's own figures.
    pub metrics: PilotMetrics,
    /// How containers start and end.
    pub policy: Policy,
    /// The ports that running pods declare, where somebody makes them reachable.
    pub ports: Option<Ports>,
    /// Where output goes besides the log.
    pub output: Option<mpsc::Sender<OutputLine>>,
}

impl Context {
    /// What the downward API tells of the node.
    #[must_use]
    pub fn facts(&self) -> Facts {
        Facts {
            node_name: self.identity.node.clone().unwrap_or_else(|| self.identity.host.clone()),
            pod_ips: vec![self.identity.ip.clone()],
            host_ips: vec![self.identity.ip.clone()],
            allocatable: self.allocatable.clone(),
        }
    }
}

/// What all pods know of each other's shares.
#[derive(Debug, Clone)]
pub struct Shares {
    /// Where each container runs, and when that changes. The manager says so.
    pub placement: watch::Receiver<Arc<Placement>>,
    /// The job's GPUs by their resource.
    pub devices: BTreeMap<String, Vec<String>>,
}

/// This pilot's Node, host and job.
#[derive(Debug, Clone)]
pub struct Identity {
    /// The Node's name; none for `play`.
    pub node: Option<String>,
    /// The API server's URL, which tells clusters apart; none for `play`.
    pub cluster: Option<String>,
    /// The Node's address.
    pub ip: String,
    /// This host's name.
    pub host: String,
    /// The batch job.
    pub job: Option<String>,
    /// The pilot's process.
    pub process: ProcessIdentity,
    /// The mark that every container's environment begins with.
    pub mark: String,
}

/// Where pod directories are.
#[derive(Debug, Clone)]
pub struct Places {
    /// The pods directory.
    pub pods: PathBuf,
    /// Whether a namespace has a directory of its own.
    pub namespaced: bool,
    /// Where logs and outcomes are kept: `<pods>/.jiriaf-pilot/<job>`.
    pub kept: PathBuf,
    /// The user's home directory.
    pub home: PathBuf,
}

/// How containers start and end.
#[derive(Debug, Clone)]
pub struct Policy {
    /// A session of its own, or the pilot's (PBS kills by session).
    pub session: Session,
    /// How long a container goes on without a pilot.
    pub orphan_timeout: Duration,
    /// How long a container's end is held back, to see whether the allocation ended too (PBS signals both).
    pub hold_end: Duration,
    /// The limit of open files that containers get back, where the pilot raised its own.
    pub open_files: Option<u64>,
    /// The longest wait of a crash loop.
    pub back_off_max: Duration,
    /// Which pods have namespaces of their own.
    pub isolation: Isolation,
    /// Where containers may have cgroups of their own.
    pub delegation: Option<Delegation>,
}

impl Places {
    /// The directory in which the pods of a namespace have theirs.
    #[must_use]
    pub fn parent(&self, namespace: &str) -> PathBuf {
        if self.namespaced { self.pods.join(namespace) } else { self.pods.clone() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;

    #[tokio::test]
    async fn a_disk_that_hangs_leaves_other_work_its_threads() {
        let mut doors = Vec::new();
        let (began_tx, began) = channel();
        let mut works = Vec::new();
        for _ in 0..ON_DISK + 1 {
            let (door_tx, door) = channel::<()>();
            let began = began_tx.clone();
            doors.push(door_tx);
            works.push(tokio::spawn(on_disk(move || {
                let _ = began.send(());
                let _ = door.recv();
            })));
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert_eq!(began.try_iter().count(), ON_DISK);
        // Whoever gives up does not free what its thread still holds.
        works[0].abort();
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert_eq!(began.try_iter().count(), 0);
        drop(doors);
        for work in works.drain(1..) {
            work.await.unwrap().unwrap();
        }
        assert_eq!(began.try_iter().count(), 1);
    }
}
