//! A pod that was started here and whose pilot is gone with its state: what is known of its containers.

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;

use crate::pod::containers;
use crate::pod::status::{self, ContainerRuntime, Terminated};

/// Whether some container of the pod has a state that only a start gives.
pub(super) fn was_started(pod: &Pod) -> bool {
    let statuses = status::container_statuses(pod);
    statuses.into_iter().any(|c| {
        c.restart_count > 0
            || c.state.as_ref().is_some_and(|s| s.running.is_some() || s.terminated.is_some())
            || c.last_state.as_ref().is_some_and(|s| s.terminated.is_some())
    })
}

/// Its containers, ended: those that were seen to end as they ended, the others by nobody knows what.
pub(super) fn containers(pod: &Pod, message: &str) -> Vec<ContainerRuntime> {
    let names = containers::of(pod).map(|(_, container)| container.name.clone());
    let known = |name: &str| {
        let mut all = status::container_statuses(pod);
        all.find(|c| c.name == name).cloned().unwrap_or_default()
    };
    names
        .map(|name| {
            let old = known(&name);
            let seen = old.state.as_ref().and_then(|s| s.terminated.as_ref());
            let running = old.state.as_ref().and_then(|s| s.running.as_ref());
            let end = Terminated {
                exit_code: seen.map_or(137, |t| t.exit_code),
                signal: seen.and_then(|t| t.signal),
                reason: seen.map_or(Some("ContainerStatusUnknown".to_owned()), |t| t.reason.clone()),
                message: seen.map_or(Some(message.to_owned()), |t| t.message.clone()).unwrap_or_default(),
                started_at: seen
                    .and_then(|t| t.started_at.as_ref())
                    .or_else(|| running.and_then(|r| r.started_at.as_ref()))
                    .map(|t| t.0),
                finished_at: seen.and_then(|t| t.finished_at.as_ref()).map_or_else(Timestamp::now, |t| t.0),
                id: old.container_id.clone().unwrap_or_default(),
            };
            ContainerRuntime {
                name,
                state: status::State::Terminated(end),
                last: None,
                restart_count: u32::try_from(old.restart_count).unwrap_or(0),
                image_id: old.image_id.clone(),
                again: false,
                started: false,
                ready: false,
            }
        })
        .collect()
}
