//! The containers' own statuses.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{
    Container, ContainerState, ContainerStateRunning, ContainerStateTerminated, ContainerStateWaiting,
    ContainerStatus,
};

use super::{ContainerRuntime, Ending, State, StatusInput, Terminated, seconds, some};
use crate::pod::containers::{self, Kind};

/// All containers' termination messages together (kubelet's `MaxPodTerminationMessageLogLength`).
const MESSAGE_BYTES: usize = 12 * 1024;
/// The exit code of a container of which nothing is known (kubelet's `TerminatePod`).
const UNKNOWN_EXIT_CODE: i32 = 137;

/// The statuses of a pod's containers, by the lists of its spec.
#[derive(Debug, Clone, PartialEq, Default)]
pub(super) struct Statuses {
    /// In the spec's order (kubelet's `SortInitContainerStatuses`).
    pub(super) init: Vec<ContainerStatus>,
    /// Sorted by name.
    pub(super) main: Vec<ContainerStatus>,
    /// Sorted by name.
    pub(super) ephemeral: Vec<ContainerStatus>,
}

impl Statuses {
    /// Those that the pod's phase and conditions go by.
    pub(super) fn find(&self, name: &str) -> Option<&ContainerStatus> {
        self.init.iter().chain(&self.main).find(|status| status.name == name)
    }

    /// Whether one of all containers runs.
    pub(super) fn someone_runs(&self) -> bool {
        let running = |status: &ContainerStatus| status.state.as_ref().is_some_and(|s| s.running.is_some());
        self.init.iter().chain(&self.main).chain(&self.ephemeral).any(running)
    }

    /// A pod that is over has no containers of which nobody knows what became: but what never came to its turn stays waiting
    /// (kubelet's `TerminatePod`, `hasPodInitialized`, `initializedContainers`). Nothing changes while one of them runs.
    pub(super) fn close(&mut self) {
        if self.someone_runs() {
            return;
        }
        let ended = |status: &ContainerStatus| {
            let end = |state: &Option<ContainerState>| state.as_ref().and_then(|s| s.terminated.clone());
            end(&status.state).or_else(|| end(&status.last_state)).map(|end| end.exit_code)
        };
        let began = |status: &ContainerStatus| ended(status).is_some() || status.restart_count > 0;
        // Where nothing stood before them, or nothing does any more, main containers had their turn.
        let main_began = self.main.iter().any(began);
        if main_began || self.init.last().is_none_or(|last| last.ready && ended(last) == Some(0)) {
            self.main.iter_mut().for_each(close);
        }
        let reached = if main_began {
            self.init.len()
        } else {
            // The first one had its turn in any case.
            self.init.iter().rposition(began).map_or(1, |at| at + 1)
        };
        self.init.iter_mut().take(reached).for_each(close);
        self.ephemeral.iter_mut().for_each(close);
    }
}

/// One status for each container of the spec.
pub(super) fn statuses(input: &StatusInput<'_>) -> Statuses {
    let mut all = Statuses::default();
    let count = containers::of(input.pod).count();
    let limit = MESSAGE_BYTES / count.max(1);
    let known: BTreeMap<&str, &ContainerRuntime> =
        input.containers.iter().map(|container| (container.name.as_str(), container)).collect();
    for (kind, container) in containers::of(input.pod) {
        let status = one(kind, &container, known.get(container.name.as_str()).copied(), limit);
        match kind {
            Kind::Init | Kind::Sidecar => all.init.push(status),
            Kind::Main => all.main.push(status),
            Kind::Ephemeral => all.ephemeral.push(status),
        }
    }
    let ends = input.ending.is_some_and(|ending| !matches!(ending, Ending::Rejected { .. }));
    if ends {
        all.close();
    }
    all.main.sort_by(|a, b| a.name.cmp(&b.name));
    all.ephemeral.sort_by(|a, b| a.name.cmp(&b.name));
    all
}

fn one(
    kind: Kind,
    container: &Container,
    runtime: Option<&ContainerRuntime>,
    limit: usize,
) -> ContainerStatus {
    let mut status = ContainerStatus {
        name: container.name.clone(),
        image: container.image.clone().unwrap_or_default(),
        // Of ephemeral containers nobody says whether they have started: nothing waits for them.
        started: (kind != Kind::Ephemeral).then_some(false),
        // The API server answers `{}` where there is none; anything else would look like a change.
        last_state: Some(ContainerState::default()),
        ..ContainerStatus::default()
    };
    let Some(runtime) = runtime else {
        status.state = Some(waiting("ContainerCreating", "", limit));
        return status;
    };
    status.image_id.clone_from(&runtime.image_id);
    status.restart_count = i32::try_from(runtime.restart_count).unwrap_or(i32::MAX);
    if let Some(last) = &runtime.last {
        status.last_state = Some(terminated(last, limit));
    }
    match &runtime.state {
        State::Waiting { reason, message } => {
            status.container_id = runtime.last.as_ref().and_then(|last| some(&last.id));
            status.state = Some(waiting(reason, message, limit));
        }
        State::Running { started_at, id } => {
            status.container_id = some(id);
            if kind != Kind::Ephemeral {
                status.started = Some(runtime.started);
                // An init container is ready by its end (kubelet's `UpdatePodStatus`).
                status.ready = kind != Kind::Init && runtime.started && runtime.ready;
            }
            let running = ContainerStateRunning { started_at: Some(seconds(*started_at)) };
            status.state = Some(ContainerState { running: Some(running), ..ContainerState::default() });
        }
        State::Terminated(end) => {
            status.ready = kind == Kind::Init && end.exit_code == 0;
            status.container_id = some(&end.id);
            status.state = Some(terminated(end, limit));
        }
    }
    status
}

/// A pod that is over has no waiting containers: one that waited to run again ended as it did last, one that
/// never ran ends as unknown.
fn close(status: &mut ContainerStatus) {
    if status.state.as_ref().is_some_and(|state| state.terminated.is_some()) {
        return;
    }
    if status.last_state.as_ref().is_some_and(|last| last.terminated.is_some()) {
        status.state = status.last_state.replace(ContainerState::default());
        return;
    }
    let unknown = ContainerStateTerminated {
        exit_code: UNKNOWN_EXIT_CODE,
        reason: Some("ContainerStatusUnknown".to_owned()),
        message: Some("The container could not be located when the pod was terminated".to_owned()),
        ..ContainerStateTerminated::default()
    };
    status.state = Some(ContainerState { terminated: Some(unknown), ..ContainerState::default() });
}

fn waiting(reason: &str, message: &str, limit: usize) -> ContainerState {
    let waiting = ContainerStateWaiting { reason: some(reason), message: some(cut(message, limit)) };
    ContainerState { waiting: Some(waiting), ..ContainerState::default() }
}

fn terminated(end: &Terminated, limit: usize) -> ContainerState {
    let usual = if end.exit_code == 0 { "Completed" } else { "Error" };
    let terminated = ContainerStateTerminated {
        container_id: some(&end.id),
        exit_code: end.exit_code,
        finished_at: Some(seconds(end.finished_at)),
        message: some(cut(&end.message, limit)),
        reason: Some(end.reason.clone().unwrap_or_else(|| usual.to_owned())),
        signal: end.signal,
        started_at: end.started_at.map(seconds),
    };
    ContainerState { terminated: Some(terminated), ..ContainerState::default() }
}

/// At most `limit` bytes of `text`, never half a character.
fn cut(text: &str, limit: usize) -> &str {
    if text.len() <= limit {
        return text;
    }
    // A character has at most four bytes.
    (0..4).find_map(|back| text.get(..limit.checked_sub(back)?)).unwrap_or_default()
}
