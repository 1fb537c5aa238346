//! The phase of a pod, with its reason and message.

use k8s_openapi::api::core::v1::{Container, ContainerState, ContainerStatus, PodSpec};

use super::containers::Statuses;
use super::{
    Ending, NODE_SHUTDOWN, NODE_SHUTDOWN_REJECTED, StatusInput, TERMINATED, TERMINATED_MESSAGE,
    TERMINATION_BY_KUBELET,
};
use crate::pod::containers::{self, Kind};

/// Where a pod is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Phase {
    /// Not all of its containers have started.
    Pending,
    /// All have started, and at least one runs or will run again.
    Running,
    /// All have ended with exit code 0. Final.
    Succeeded,
    /// All have ended, at least one not with exit code 0; or the node ended it. Final.
    Failed,
}

impl Phase {
    /// As the API writes it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "Pending",
            Self::Running => "Running",
            Self::Succeeded => "Succeeded",
            Self::Failed => "Failed",
        }
    }

    /// Reads what the API wrote; what it does not know is Pending.
    #[must_use]
    pub fn parse(text: Option<&str>) -> Self {
        match text {
            Some("Running") => Self::Running,
            Some("Succeeded") => Self::Succeeded,
            Some("Failed") => Self::Failed,
            _ => Self::Pending,
        }
    }

    /// Whether it is final.
    #[must_use]
    pub fn is_terminal(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed)
    }
}

/// Whether a container that ended with `exit_code` runs again, by its own restartPolicy and rules where it has
/// them, else by the pod's (kubelet's `ContainerShouldRestart`).
#[must_use]
pub fn should_restart(spec: &PodSpec, container: &Container, exit_code: i32) -> bool {
    if let Some(own) = container.restart_policy.as_deref() {
        let rules = container.restart_policy_rules.as_deref().unwrap_or_default();
        let matching = rules.iter().find(|rule| {
            let Some(codes) = &rule.exit_codes else { return false };
            let named = codes.values.iter().flatten().any(|value| *value == exit_code);
            match codes.operator.as_str() {
                "In" => named,
                "NotIn" => !named,
                _ => false,
            }
        });
        if matching.is_some_and(|rule| rule.action == "Restart") {
            return true;
        }
        if matches!(own, "Always" | "OnFailure" | "Never") {
            return by_policy(own, exit_code);
        }
    }
    by_policy(spec.restart_policy.as_deref().unwrap_or("Always"), exit_code)
}

fn by_policy(policy: &str, exit_code: i32) -> bool {
    match policy {
        "Never" => false,
        "OnFailure" => exit_code != 0,
        _ => true,
    }
}

/// The phase, and what goes with it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Outcome {
    pub(super) phase: Phase,
    pub(super) reason: Option<String>,
    pub(super) message: Option<String>,
    /// Whether the pod was over before.
    pub(super) was_final: bool,
    /// Reason and message of a DisruptionTarget condition to be set now.
    pub(super) disruption: Option<(String, String)>,
}

/// What becomes of the pod, by its containers and by what was decided over it.
pub(super) fn outcome(input: &StatusInput<'_>, statuses: &Statuses) -> Outcome {
    let api = input.pod.status.as_ref();
    let previous = [Some(input.previous), api]
        .into_iter()
        .flatten()
        .find(|status| Phase::parse(status.phase.as_deref()).is_terminal())
        .unwrap_or(input.previous);
    let before = Phase::parse(previous.phase.as_deref());
    // A terminal phase is final, with its reason: the API server would even take it back (Always).
    if before.is_terminal() {
        return Outcome {
            phase: before,
            reason: previous.reason.clone(),
            message: previous.message.clone(),
            was_final: true,
            disruption: None,
        };
    }

    let someone_runs = statuses.someone_runs();
    let by_containers = match by_containers(input, statuses) {
        // A terminal phase says that nothing runs any more: a sidecar may outlive the others for a moment
        // (status_manager.go, `updateStatusInternal`).
        phase if phase.is_terminal() && someone_runs => before,
        // A pod that was deleted before its turn came has no other end (status_manager.go, `TerminatePod`).
        Phase::Pending if !someone_runs && matches!(input.ending, Some(Ending::Deleted)) => Phase::Failed,
        phase => phase,
    };
    let decided = input.ending.and_then(decision);
    let (phase, reason, message, disruption) = match decided {
        // Its end is on its way; it is not over while something of it runs.
        Some(_) if someone_runs => (by_containers, None, None, None),
        Some((reason, message, disruption)) => (Phase::Failed, Some(reason), Some(message), disruption),
        None => (by_containers, None, None, None),
    };
    if reason.is_none() && phase == before {
        return Outcome {
            phase,
            reason: previous.reason.clone(),
            message: previous.message.clone(),
            was_final: false,
            disruption: None,
        };
    }
    Outcome { phase, reason, message, was_final: false, disruption }
}

type Decision = (String, String, Option<(String, String)>);

fn decision(ending: &Ending) -> Option<Decision> {
    match ending {
        Ending::Deleted => None,
        Ending::Rejected { reason, message } => {
            let disruption = (reason == NODE_SHUTDOWN)
                .then(|| (TERMINATION_BY_KUBELET.to_owned(), NODE_SHUTDOWN_REJECTED.to_owned()));
            Some((reason.clone(), format!("Pod was rejected: {message}"), disruption))
        }
        Ending::NodeShutdown => Some((
            TERMINATED.to_owned(),
            TERMINATED_MESSAGE.to_owned(),
            Some((TERMINATION_BY_KUBELET.to_owned(), TERMINATED_MESSAGE.to_owned())),
        )),
        Ending::Failed { reason, message, disruption } => Some((
            reason.clone(),
            message.clone(),
            disruption.as_ref().map(|disruption| (disruption.clone(), message.clone())),
        )),
    }
}

/// What of a container's status counts for the phase.
enum Stands {
    /// It runs; whether it has started.
    Runs { started: bool },
    /// It has ended, or waits to run again: how it ended last.
    Ended { exit_code: i32, waits: bool },
    /// It has not run yet.
    Waits,
}

fn stands(status: Option<&ContainerStatus>) -> Stands {
    let Some(status) = status else { return Stands::Waits };
    let end = |state: &Option<ContainerState>| {
        state.as_ref().and_then(|state| state.terminated.as_ref()).map(|end| end.exit_code)
    };
    if status.state.as_ref().is_some_and(|state| state.running.is_some()) {
        Stands::Runs { started: status.started == Some(true) }
    } else if let Some(exit_code) = end(&status.state) {
        Stands::Ended { exit_code, waits: false }
    } else if let Some(exit_code) = end(&status.last_state) {
        Stands::Ended { exit_code, waits: true }
    } else {
        Stands::Waits
    }
}

/// kubelet's `getPhase`.
fn by_containers(input: &StatusInput<'_>, statuses: &Statuses) -> Phase {
    let Some(spec) = &input.pod.spec else { return Phase::Pending };
    let (mut pending_init, mut pending_sidecars, mut waiting, mut running) = (0, 0, 0, 0);
    let (mut stopped, mut final_ones, mut succeeded, mut initialized) = (0, 0, 0, false);
    for (kind, container) in containers::all(spec) {
        let stands = stands(statuses.find(&container.name));
        let decided = input.containers.iter().any(|one| one.name == container.name && one.again);
        let again = |exit_code| decided || should_restart(spec, &container, exit_code);
        match (kind, stands) {
            // One that has succeeded is over, whatever its policy.
            (Kind::Ephemeral, _) | (Kind::Init, Stands::Ended { exit_code: 0, .. }) => {}
            (Kind::Init, Stands::Ended { exit_code, .. }) => {
                if !again(exit_code) {
                    return Phase::Failed;
                }
                // It counts neither as pending nor as running: what comes after it does.
            }
            (Kind::Init, _) => pending_init += 1,
            (Kind::Sidecar, Stands::Runs { started }) => {
                pending_sidecars += u32::from(!started);
                running += 1;
            }
            // Sidecars that have ended say nothing about the phase.
            (Kind::Sidecar, Stands::Ended { .. }) => {}
            (Kind::Sidecar, Stands::Waits) => {
                pending_sidecars += 1;
                waiting += 1;
            }
            (Kind::Main, Stands::Runs { .. }) => {
                running += 1;
                initialized = true;
            }
            (Kind::Main, Stands::Ended { exit_code, waits }) => {
                initialized = true;
                stopped += 1;
                final_ones += u32::from(!again(exit_code));
                succeeded += u32::from(exit_code == 0 && !waits);
            }
            (Kind::Main, Stands::Waits) => waiting += 1,
        }
    }
    let no_more_starts = input.ending.is_some();
    let will_run_again = stopped != final_ones && !no_more_starts;
    if pending_init > 0 || pending_sidecars > 0 && !initialized || waiting > 0 || running + stopped == 0 {
        Phase::Pending
    } else if running > 0 || will_run_again {
        Phase::Running
    } else if stopped == succeeded {
        Phase::Succeeded
    } else {
        Phase::Failed
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::PodStatus;
    use serde_json::{Value, from_value, json};

    use super::super::{ContainerRuntime, State, Terminated, status};
    use super::*;

    fn states() -> Vec<(State, Option<Terminated>)> {
        let now = jiff::Timestamp::UNIX_EPOCH;
        let end = |exit_code| Terminated {
            exit_code,
            signal: None,
            reason: None,
            message: String::new(),
            started_at: None,
            finished_at: now,
            id: String::new(),
        };
        let waiting = || State::Waiting { reason: String::new(), message: String::new() };
        vec![
            (waiting(), None),
            (waiting(), Some(end(0))),
            (waiting(), Some(end(7))),
            (State::Running { started_at: now, id: String::new() }, None),
            (State::Running { started_at: now, id: String::new() }, Some(end(7))),
            (State::Terminated(end(0)), None),
            (State::Terminated(end(7)), Some(end(0))),
        ]
    }

    #[test]
    fn over_every_combination_a_final_phase_means_that_nothing_runs_or_will() {
        let endings = [
            None,
            Some(Ending::Deleted),
            Some(Ending::NodeShutdown),
            Some(Ending::Failed { reason: "R".into(), message: "M".into(), disruption: Some("D".into()) }),
        ];
        for policy in ["Always", "OnFailure", "Never"] {
            let containers: Value = json!([{"name": "a"}, {"name": "b"}]);
            let pod: k8s_openapi::api::core::v1::Pod = from_value(
                json!({"metadata": {}, "spec": {"restartPolicy": policy, "containers": containers}}),
            )
            .unwrap();
            for (a, last_a) in states() {
                for (b, last_b) in states() {
                    for ending in &endings {
                        let one = |name: &str, state: &State, last: &Option<Terminated>| ContainerRuntime {
                            name: name.to_owned(),
                            state: state.clone(),
                            last: last.clone(),
                            restart_count: 0,
                            image_id: String::new(),
                            again: false,
                            started: true,
                            ready: true,
                        };
                        let got = status(&StatusInput {
                            pod: &pod,
                            previous: &PodStatus::default(),
                            containers: &[one("a", &a, &last_a), one("b", &b, &last_b)],
                            pod_ip: None,
                            host_ip: None,
                            start_time: jiff::Timestamp::UNIX_EPOCH,
                            directory_ready: true,
                            ending: ending.as_ref(),
                            now: jiff::Timestamp::UNIX_EPOCH,
                        });
                        let says = format!("{policy} {a:?} {b:?} {ending:?}: {:?}", got.phase);
                        let terminal = Phase::parse(got.phase.as_deref()).is_terminal();
                        let running = [&a, &b].iter().any(|state| matches!(state, State::Running { .. }));
                        assert!(!(terminal && running), "{says}");
                        if ending.is_some() {
                            assert_eq!(terminal, !running, "what is to end ends: {says}");
                        } else if policy == "Always" {
                            assert!(!terminal, "{says}");
                        }
                        let disrupted =
                            got.conditions.iter().flatten().any(|one| one.type_ == "DisruptionTarget");
                        assert!(!disrupted || terminal, "{says}");
                    }
                }
            }
        }
    }
}
