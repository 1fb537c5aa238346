//! The containers' own statuses.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{
    Container, ContainerState, ContainerStateRunning, ContainerStateTerminated, ContainerStateWaiting,
    ContainerStatus,
};

use super::{ContainerRuntime, Ending, State, StatusInput, Terminated, seconds, some};

/// All containers' termination messages together (kubelet's `MaxPodTerminationMessageLogLength`).
const MESSAGE_BYTES: usize = 12 * 1024;
/// The exit code of a container of which nothing is known (kubelet's `TerminatePod`).
const UNKNOWN_EXIT_CODE: i32 = 137;

/// One status for each container of the spec, sorted by name.
pub(super) fn statuses(input: &StatusInput<'_>) -> Vec<ContainerStatus> {
    let containers = input.pod.spec.as_ref().map_or(&[][..], |spec| &spec.containers);
    let limit = MESSAGE_BYTES / containers.len().max(1);
    let known: BTreeMap<&str, &ContainerRuntime> =
        input.containers.iter().map(|container| (container.name.as_str(), container)).collect();
    let ends = input.ending.is_some_and(|ending| !matches!(ending, Ending::Rejected { .. }));
    let someone_runs =
        input.containers.iter().any(|container| matches!(container.state, State::Running { .. }));
    let mut all: Vec<ContainerStatus> = containers
        .iter()
        .map(|container| {
            let mut status = one(container, known.get(container.name.as_str()).copied(), limit);
            if ends && !someone_runs {
                close(&mut status);
            }
            status
        })
        .collect();
    all.sort_by(|a, b| a.name.cmp(&b.name));
    all
}

fn one(container: &Container, runtime: Option<&ContainerRuntime>, limit: usize) -> ContainerStatus {
    let mut status = ContainerStatus {
        name: container.name.clone(),
        image: container.image.clone().unwrap_or_default(),
        started: Some(false),
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
            // Without probes a container is ready while it runs.
            status.ready = true;
            status.started = Some(true);
            let running = ContainerStateRunning { started_at: Some(seconds(*started_at)) };
            status.state = Some(ContainerState { running: Some(running), ..ContainerState::default() });
        }
        State::Terminated(end) => {
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
