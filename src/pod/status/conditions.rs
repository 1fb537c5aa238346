//! The conditions of a pod: the node's own five, DisruptionTarget, and those of others, which stay.

use k8s_openapi::api::core::v1::{ContainerState, ContainerStatus, PodCondition};

use super::containers::Statuses;
use super::phase::Outcome;
use super::{Phase, StatusInput, seconds};
use crate::pod::containers::{self, Kind};

/// The conditions that the node writes (kubelet's `PodConditionsByKubelet`).
pub(super) const OURS: [&str; 5] =
    ["PodReadyToStartContainers", "Initialized", "Ready", "ContainersReady", "PodScheduled"];
/// Set by whoever disrupts a pod: by the node too, but not by it alone.
pub(super) const DISRUPTION_TARGET: &str = "DisruptionTarget";

/// What a condition says.
struct Verdict {
    holds: bool,
    reason: Option<&'static str>,
    message: Option<String>,
}

impl Verdict {
    fn of(holds: bool) -> Self {
        Self { holds, reason: None, message: None }
    }
}

/// All conditions, those of others first (as they are in the API server's copy), then ours in kubelet's order.
pub(super) fn conditions(
    input: &StatusInput<'_>,
    statuses: &Statuses,
    outcome: &Outcome,
) -> Vec<PodCondition> {
    let api = input.pod.status.as_ref().and_then(|status| status.conditions.as_deref()).unwrap_or_default();
    let previous = input.previous.conditions.as_deref().unwrap_or_default();
    let old = |kind: &str| find(previous, kind).or_else(|| find(api, kind));

    let mut all: Vec<PodCondition> =
        api.iter().filter(|condition| !OURS.contains(&condition.type_.as_str())).cloned().collect();
    let disrupted = find(api, DISRUPTION_TARGET).or_else(|| find(previous, DISRUPTION_TARGET));
    if let Some(disruption) = disruption(input, outcome, disrupted) {
        all.retain(|condition| condition.type_ != DISRUPTION_TARGET);
        all.push(disruption);
    }

    let containers = containers_ready(input, statuses, outcome.phase);
    let ready = ready(input, &all, containers_ready(input, statuses, outcome.phase));
    let initialized = initialized(input, statuses, outcome.phase);
    // A pod that is over has nothing to start containers in (kubelet: its sandbox is gone).
    let can_start = input.directory_ready && !outcome.phase.is_terminal();
    let verdicts = [Verdict::of(can_start), initialized, ready, containers, Verdict::of(true)];
    for (kind, verdict) in OURS.into_iter().zip(verdicts) {
        all.push(condition(kind, verdict, input, old(kind)));
    }
    all
}

fn find<'a>(conditions: &'a [PodCondition], kind: &str) -> Option<&'a PodCondition> {
    conditions.iter().find(|condition| condition.type_ == kind)
}

fn condition(
    kind: &str,
    verdict: Verdict,
    input: &StatusInput<'_>,
    old: Option<&PodCondition>,
) -> PodCondition {
    let status = if verdict.holds { "True" } else { "False" };
    let since = old
        .filter(|old| old.status == status)
        .and_then(|old| old.last_transition_time.clone())
        .unwrap_or_else(|| seconds(input.now));
    PodCondition {
        last_probe_time: None,
        last_transition_time: Some(since),
        message: verdict.message,
        observed_generation: input.pod.metadata.generation,
        reason: verdict.reason.map(str::to_owned),
        status: status.to_owned(),
        type_: kind.to_owned(),
    }
}

/// The DisruptionTarget condition that is to be set now, or that we set before.
fn disruption(
    input: &StatusInput<'_>,
    outcome: &Outcome,
    old: Option<&PodCondition>,
) -> Option<PodCondition> {
    let Some((reason, message)) = &outcome.disruption else {
        return old.cloned();
    };
    let verdict = Verdict { message: Some(message.clone()), ..Verdict::of(true) };
    let mut new = condition(DISRUPTION_TARGET, verdict, input, old);
    new.reason = Some(reason.clone());
    Some(new)
}

/// `GeneratePodInitializedCondition`: every container has a status here, so none is unknown.
fn initialized(input: &StatusInput<'_>, statuses: &Statuses, phase: Phase) -> Verdict {
    if phase == Phase::Succeeded {
        return Verdict { reason: Some("PodCompleted"), ..Verdict::of(true) };
    }
    let began = |status: &ContainerStatus| {
        let state = |state: &Option<ContainerState>| {
            state.as_ref().is_some_and(|state| state.running.is_some() || state.terminated.is_some())
        };
        state(&status.state) || state(&status.last_state)
    };
    // Once a main container has started, a sidecar that starts again takes nothing back.
    if statuses.main.iter().any(began) {
        return Verdict::of(true);
    }
    let incomplete = names(input, |kind, name| {
        let done = |status: &ContainerStatus| match kind {
            Kind::Sidecar => status.started == Some(true),
            _ => status.ready,
        };
        matches!(kind, Kind::Init | Kind::Sidecar) && !statuses.find(name).is_some_and(done)
    });
    unless_none("ContainersNotInitialized", "containers with incomplete status", &incomplete)
}

fn containers_ready(input: &StatusInput<'_>, statuses: &Statuses, phase: Phase) -> Verdict {
    match phase {
        Phase::Succeeded => return Verdict { reason: Some("PodCompleted"), ..Verdict::of(false) },
        Phase::Failed => return Verdict { reason: Some("PodFailed"), ..Verdict::of(false) },
        Phase::Pending | Phase::Running => {}
    }
    let unready = names(input, |kind, name| {
        matches!(kind, Kind::Sidecar | Kind::Main) && !statuses.find(name).is_some_and(|status| status.ready)
    });
    unless_none("ContainersNotReady", "containers with unready status", &unready)
}

/// The names of the containers of which `wanted` holds, in the spec's order, which is how kubelet names them.
fn names(input: &StatusInput<'_>, wanted: impl Fn(Kind, &str) -> bool) -> Vec<String> {
    containers::of(input.pod)
        .filter(|(kind, container)| wanted(*kind, &container.name))
        .map(|(_, container)| container.name.clone())
        .collect()
}

fn unless_none(reason: &'static str, what: &str, names: &[String]) -> Verdict {
    if names.is_empty() {
        return Verdict::of(true);
    }
    Verdict { holds: false, reason: Some(reason), message: Some(format!("{what}: [{}]", names.join(" "))) }
}

fn ready(input: &StatusInput<'_>, all: &[PodCondition], containers: Verdict) -> Verdict {
    if !containers.holds {
        return containers;
    }
    let gates = input.pod.spec.iter().flat_map(|spec| spec.readiness_gates.iter().flatten());
    let unmet: Vec<String> = gates
        .filter_map(|gate| match find(all, &gate.condition_type) {
            None => Some(format!(
                "corresponding condition of pod readiness gate {:?} does not exist.",
                gate.condition_type
            )),
            Some(condition) if condition.status != "True" => Some(format!(
                "the status of pod readiness gate {:?} is not \"True\", but {}",
                gate.condition_type, condition.status
            )),
            Some(_) => None,
        })
        .collect();
    if unmet.is_empty() {
        return Verdict::of(true);
    }
    Verdict { holds: false, reason: Some("ReadinessGatesNotReady"), message: Some(unmet.join(", ")) }
}
