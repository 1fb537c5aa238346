//! What the API server is told of a pod, and what follows from its answer.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::PodStatus;
use tokio::time::Instant;

use super::start::ended_before;
use super::{Container, DELETE_RETRY, Note, Worker};
use crate::pod::containers;
use crate::pod::context::on_disk;
use crate::pod::directory;
use crate::pod::outcome::Outcome;
use crate::pod::roster::{ContainerView, PodView};
use crate::pod::status::{self, ContainerRuntime, State, StatusInput};

impl Worker {
    pub(super) fn status(&self) -> PodStatus {
        let ending = self.stop.as_ref().filter(|_| self.all_still()).and_then(|stop| stop.ending.clone());
        let containers: Vec<ContainerRuntime> = self
            .containers
            .iter()
            .map(|container| {
                let record = self.record.containers.get(&container.name).cloned().unwrap_or_default();
                // A run that is due has its number and has not begun: what Kubernetes counts are starts.
                let due = matches!(record.state, State::Waiting { .. })
                    && ended_before(&record, self.record.uid(), &container.name).is_none();
                ContainerRuntime {
                    name: container.name.clone(),
                    state: record.state,
                    last: record.last,
                    restart_count: if due { record.restart.saturating_sub(1) } else { record.restart },
                    image_id: self.image_id(&container.name),
                    again: record.again && self.stop.is_none(),
                    started: record.started,
                    ready: record.ready,
                }
            })
            .collect();
        let unknown = PodStatus::default();
        let previous = self.record.last_status.as_ref().or(self.record.pod.status.as_ref());
        status::status(&StatusInput {
            pod: &self.record.pod,
            previous: previous.unwrap_or(&unknown),
            containers: &containers,
            pod_ip: Some(&self.context.identity.ip),
            host_ip: Some(&self.context.identity.ip),
            start_time: self.record.admitted,
            directory_ready: self.record.directory.is_some(),
            ending: ending.as_ref(),
            now: Timestamp::now(),
        })
    }

    /// What runs in the place of the container's image; nothing where it is a script.
    fn image_id(&self, container: &str) -> String {
        let found = containers::find(&self.record.pod, container);
        found.map(|(_, container)| self.context.images.id(&container)).unwrap_or_default()
    }

    /// Sends the status as it is now, and returns it; none while nobody is to be told.
    pub(super) fn publish(&mut self) -> Option<PodStatus> {
        if self.stop.as_ref().is_some_and(|stop| stop.gone) || self.announce_at.is_some() {
            return None;
        }
        let status = self.status();
        let terminal = matches!(status.phase.as_deref(), Some("Succeeded" | "Failed"));
        if terminal && !self.ended {
            self.ended = true;
            self.record.last_status = Some(status.clone());
        }
        self.publisher.publish(status.clone());
        Some(status)
    }

    /// Enters the pod as it is now where others look.
    pub(super) fn show(&self, published: Option<PodStatus>) {
        let mut pod = self.record.pod.clone();
        pod.status = Some(self.record.last_status.clone().or(published).unwrap_or_else(|| self.status()));
        let view = |container: &Container| {
            let record = self.record.containers.get(&container.name).cloned().unwrap_or_default();
            let view = ContainerView {
                state: record.state,
                last: record.last,
                restart: record.restart,
                run: container.run.as_ref().and(container.handle.clone()),
                probed: Arc::clone(&container.probed),
            };
            (container.name.clone(), view)
        };
        self.context.roster.put(
            self.record.uid(),
            PodView {
                pod,
                admitted: self.record.admitted,
                directory: self.record.directory.clone(),
                isolated: self.context.policy.isolation.isolates(&self.record.pod),
                containers: self.containers.iter().map(view).collect(),
            },
        );
    }

    /// Tells whoever makes ports reachable whether the pod is to be reached.
    pub(super) fn note_ports(&self) {
        if let Some(ports) = &self.context.ports {
            let mut states = self.record.containers.values().map(|container| &container.state);
            ports.note(&self.record.pod, !self.ended && states.any(|s| s.is_running()));
        }
    }

    /// Publishes, and takes the steps that only wait for the API server's word.
    pub(super) async fn settle(&mut self) {
        let before = self.ended;
        let published = self.publish();
        self.show(published);
        self.note_ports();
        if self.ended && !before {
            self.save();
        }
        if self.ended && !self.ended_told {
            self.ended_told = true;
            self.keeper.end(&self.record.pod).await;
            let outcome = Box::new(self.outcome(false, None));
            // Waits for room: many pods end in the same moment, and one whose end is not known holds its resources.
            let _ = self.notes.send(Note::Ended(self.record.uid().to_owned(), outcome)).await;
        }
        let answer = self.publisher.state();
        if self.ended
            && !self.reported
            && (self.publisher.is_acknowledged() || answer.gone || answer.refused.is_some())
        {
            self.reported = true;
            self.report(self.publisher.is_acknowledged() && answer.refused.is_none()).await;
        }
        let deleted = self.record.pod.metadata.deletion_timestamp.is_some();
        if self.reported
            && deleted
            && self.delete_at.is_none()
            && self.stop.as_ref().is_none_or(|stop| !stop.gone)
        {
            self.delete().await;
        }
    }

    pub(super) async fn report(&self, acknowledged: bool) {
        let outcome = self.outcome(acknowledged, None);
        let _ = self.notes.send(Note::Reported(self.record.uid().to_owned(), Box::new(outcome))).await;
    }

    /// How the pod ended; `kept` is where its logs went, when its directory is gone.
    fn outcome(&self, reported: bool, kept: Option<&Path>) -> Outcome {
        let status = self.record.last_status.clone().unwrap_or_else(|| self.status());
        let meta = &self.record.pod.metadata;
        let part = |text: &Option<String>| text.clone().unwrap_or_default();
        let kept_name = directory::kept_name(&part(&meta.namespace), &part(&meta.name), self.record.uid());
        Outcome::new(&self.record.pod, &status, reported, |name| {
            let record = self.record.containers.get(name).cloned().unwrap_or_default();
            let log = match (kept, &self.record.directory) {
                (Some(kept), _) => kept.join(format!("{kept_name}.{name}.{}.log", record.restart)),
                (None, Some(directory)) => directory::log_path(directory, name, record.restart),
                (None, None) => PathBuf::new(),
            };
            (log, record.log_lines_lost)
        })
    }

    pub(super) async fn delete(&mut self) {
        let part = |text: &Option<String>| text.clone().unwrap_or_default();
        let meta = &self.record.pod.metadata;
        let (namespace, name, uid) = (part(&meta.namespace), part(&meta.name), part(&meta.uid));
        self.delete_at = Some(Instant::now() + DELETE_RETRY);
        if let Err(error) = self.context.api.delete(&namespace, &name, &uid).await {
            tracing::warn!(pod = name, namespace, %error, "the pod has ended but could not be deleted; it is tried again");
        }
    }

    /// Removes the pod's directory and record. Its outcome, with the place of its logs; none when the one that was
    /// reported still holds. A pod whose object went first has its outcome only from here.
    pub(super) async fn clear_away(&self) -> Option<Outcome> {
        self.context.records.remove(self.record.uid());
        let told = self.ended && self.reported;
        let Some(found) = self.record.directory.clone() else {
            return (!told).then(|| self.outcome(false, None));
        };
        let uid = self.record.uid().to_owned();
        let kept = self.context.places.kept.clone();
        let path = found.clone();
        let home = self.context.places.home.clone();
        let removed = on_disk(move || directory::remove(&path, &uid, &kept, Some(&home))).await;
        if let Ok(Err(error)) = removed {
            tracing::warn!(path = %found.display(), %error, "the directory of a pod that is gone could not be removed");
            return (!told).then(|| self.outcome(false, None));
        }
        let acknowledged = told && self.publisher.state().refused.is_none();
        Some(self.outcome(acknowledged, Some(&self.context.places.kept)))
    }
}
