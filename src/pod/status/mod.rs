//! The status of a pod: one pure function of what its containers do.
//!
//! Sources: kubelet's `generateAPIPodStatus`, `getPhase` (kubelet_pods.go), `status/generate.go` (the
//! conditions), `status/status_manager.go` (`mergePodStatus`, `normalizeStatus`, `TerminatePod`),
//! `nodeshutdown_manager.go`.

mod conditions;
mod containers;
#[cfg(test)]
mod init_tests;
mod patch;
mod phase;
#[cfg(test)]
mod tests;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{ContainerStatus, HostIP, Pod, PodIP, PodStatus};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use serde::{Deserialize, Serialize};

pub use patch::patch;
pub use phase::{Phase, should_restart};

/// Reason of a pod that is rejected because the node is about to end.
pub const NODE_SHUTDOWN: &str = "NodeShutdown";
/// What kubelet says to a pod that it rejects because the node is shutting down.
pub const NODE_SHUTDOWN_REJECTED: &str = "Pod was rejected as the node is shutting down.";
/// Reason of a pod that was ended because the node is shutting down.
pub const TERMINATED: &str = "Terminated";
/// What kubelet says of a pod that was ended because the node is shutting down.
pub const TERMINATED_MESSAGE: &str = "Pod was terminated in response to imminent node shutdown.";
/// Reason of a container that was killed because it took more memory than it may.
pub const OOM_KILLED: &str = "OOMKilled";
/// Reason of the DisruptionTarget condition that a node itself writes.
pub const TERMINATION_BY_KUBELET: &str = "TerminationByKubelet";

/// What is known of a pod.
#[derive(Debug, Clone, Copy)]
pub struct StatusInput<'a> {
    /// The Pod as the API server has it. Its own status counts for the conditions of others and for a
    /// terminal phase, which is final.
    pub pod: &'a Pod,
    /// The status that this function gave before; after a restart of the pilot, the Pod's.
    pub previous: &'a PodStatus,
    /// Its containers, in any order. One that is missing is reported as waiting (`ContainerCreating`).
    pub containers: &'a [ContainerRuntime],
    /// The pod's address, which is the node's.
    pub pod_ip: Option<&'a str>,
    /// The node's address.
    pub host_ip: Option<&'a str>,
    /// When the pilot first saw the pod. One that the status has already is kept.
    pub start_time: Timestamp,
    /// Whether the pod's directory is made, so that containers could start (kubelet: the sandbox).
    pub directory_ready: bool,
    /// What is to become of the pod, whatever its containers say.
    pub ending: Option<&'a Ending>,
    /// Now.
    pub now: Timestamp,
}

/// What is to become of a pod. While one of its containers runs, the phase does not change yet: a terminal
/// phase says that nothing runs any more.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Ending {
    /// It was never started. `reason` and `message` as admission gave them; the message gets kubelet's
    /// prefix. With reason [`NODE_SHUTDOWN`] it gets a DisruptionTarget condition too, which kubelet lacks
    /// and Jobs need.
    Rejected {
        /// Why, in one word.
        reason: String,
        /// Why, in a sentence.
        message: String,
    },
    /// It was deleted: no container starts again. Succeeded if all of them ended with 0, else Failed.
    Deleted,
    /// It was ended because the allocation ends: Failed, unless it had succeeded before. Whatever the exit
    /// codes: a script that traps SIGTERM and exits 0 has not done its work. So it is not for a pod whose
    /// containers had all ended by themselves before the end began.
    NodeShutdown,
    /// It was ended for another reason (its deadline, an eviction): Failed, unless it had succeeded before.
    Failed {
        /// Why, in one word.
        reason: String,
        /// Why, in a sentence.
        message: String,
        /// The reason of a DisruptionTarget condition, where it is no fault of the pod's.
        disruption: Option<String>,
    },
}

/// What one container does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContainerRuntime {
    /// Its name in the pod.
    pub name: String,
    /// What it does now.
    pub state: State,
    /// How it ended the time before, where it was restarted or is waiting to be.
    pub last: Option<Terminated>,
    /// How often it was started again.
    pub restart_count: u32,
    /// The path of its script; empty while unknown.
    pub image_id: String,
    /// Whether it starts again after its end, whatever its policy says: its image changed, or a probe failed.
    pub again: bool,
    /// Whether it has started, once it runs: its startup probe has succeeded, where it has one.
    pub started: bool,
    /// Whether its readiness probe succeeds, where it has one; counts while it runs and has started.
    pub ready: bool,
}

/// What a container does now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum State {
    /// It does not run yet, or not again yet.
    Waiting {
        /// Why, in one word: `ContainerCreating`, `CrashLoopBackOff`, …
        reason: String,
        /// Why, in a sentence; empty for none.
        message: String,
    },
    /// It runs.
    Running {
        /// Since when.
        started_at: Timestamp,
        /// Which run of it: see [`container_id`].
        id: String,
    },
    /// It has ended.
    Terminated(Terminated),
}

impl State {
    /// Whether it runs.
    #[must_use]
    pub fn is_running(&self) -> bool {
        matches!(self, Self::Running { .. })
    }
}

/// How a container ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Terminated {
    /// The script's own exit code; 128+n for a signal.
    pub exit_code: i32,
    /// The signal that ended it, where one did.
    pub signal: Option<i32>,
    /// In one word; none: `Completed` or `Error`, by the exit code.
    pub reason: Option<String>,
    /// In a sentence; empty for none.
    pub message: String,
    /// When it started; none when it never did.
    pub started_at: Option<Timestamp>,
    /// When it ended.
    pub finished_at: Timestamp,
    /// Which run of it: see [`container_id`].
    pub id: String,
}

/// The id of one run of a container, as Kubernetes wants it (`<runtime>://<id>`).
#[must_use]
pub fn container_id(pod_uid: &str, container: &str, restart_count: u32) -> String {
    format!("jiriaf://{pod_uid}/{container}/{restart_count}")
}

/// The status of a pod. What others write in it (their conditions, qosClass, claims) stays as it is.
#[must_use]
pub fn status(input: &StatusInput<'_>) -> PodStatus {
    let api = input.pod.status.clone().unwrap_or_default();
    let mut statuses = containers::statuses(input);
    let outcome = phase::outcome(input, &statuses);
    // Nothing of a pod that was rejected ever was; of one that is long over nothing may be known any more.
    let rejected = matches!(input.ending, Some(Ending::Rejected { .. }));
    if outcome.phase.is_terminal() && !rejected {
        statuses.close();
    }

    // What is not the node's: kept from the API server's latest.
    let mut new = api;
    new.conditions = Some(conditions::conditions(input, &statuses, &outcome));
    if outcome.was_final && input.containers.is_empty() {
        let before = input.previous;
        new.container_statuses = before.container_statuses.clone().or(new.container_statuses);
        new.init_container_statuses = before.init_container_statuses.clone().or(new.init_container_statuses);
        let ephemeral = before.ephemeral_container_statuses.clone();
        new.ephemeral_container_statuses = ephemeral.or(new.ephemeral_container_statuses);
    } else if !rejected {
        let some = |list: Vec<ContainerStatus>| (!list.is_empty()).then_some(list);
        new.container_statuses = Some(statuses.main);
        new.init_container_statuses = some(statuses.init);
        new.ephemeral_container_statuses = some(statuses.ephemeral);
    }
    new.phase = Some(outcome.phase.as_str().to_owned());
    new.reason = outcome.reason;
    new.message = outcome.message;
    new.observed_generation = input.pod.metadata.generation.or(new.observed_generation);
    new.start_time =
        input.previous.start_time.clone().or(new.start_time).or_else(|| Some(seconds(input.start_time)));
    if let Some(ip) = input.host_ip {
        new.host_ip = Some(ip.to_owned());
        new.host_ips = Some(vec![HostIP { ip: ip.to_owned() }]);
    }
    // A pod that was rejected never had an address.
    if let (Some(ip), false) = (input.pod_ip, rejected) {
        new.pod_ip = Some(ip.to_owned());
        new.pod_ips = Some(vec![PodIP { ip: ip.to_owned() }]);
    }
    new
}

/// A moment as the API server keeps it, in whole seconds (`normalizeStatus`): else every comparison with what
/// it sends back would show a change.
fn seconds(at: Timestamp) -> Time {
    Time(Timestamp::from_second(at.as_second()).unwrap_or(at))
}

/// What the API server's copy says of all the pod's containers: init containers, main ones and ephemeral ones.
pub fn container_statuses(pod: &Pod) -> impl Iterator<Item = &ContainerStatus> {
    pod.status.iter().flat_map(|status| {
        let init = status.init_container_statuses.iter().flatten();
        let main = status.container_statuses.iter().flatten();
        init.chain(main).chain(status.ephemeral_container_statuses.iter().flatten())
    })
}

/// An empty text is no text.
fn some(text: &str) -> Option<String> {
    (!text.is_empty()).then(|| text.to_owned())
}
