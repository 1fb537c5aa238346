//! How pods ended: told, remembered for the table, kept as files.

use k8s_openapi::api::core::v1::Pod;

use super::State;
use crate::pod::context::on_disk;
use crate::pod::events::{ENDED, Kind};
use crate::pod::outcome::{Outcome, REMEMBERED};

/// Outcomes whose files may be under way at once; more wait only for a file system that hangs.
const WRITES: usize = REMEMBERED;

impl State {
    pub(super) fn ended_event(&self, pod: &Pod, outcome: &Outcome) {
        let kind = if outcome.phase == "Succeeded" { Kind::Normal } else { Kind::Warning };
        self.context.events.record(pod, None, kind, ENDED, &outcome.summary());
    }

    pub(super) fn remember(&mut self, outcome: Outcome) {
        tracing::info!(
            namespace = outcome.namespace,
            pod = outcome.name,
            reported = outcome.reported,
            "pod ended: {}",
            outcome.summary()
        );
        self.keep(&outcome);
        if self.outcomes.len() >= REMEMBERED {
            self.outcomes.pop_front();
            self.forgotten += 1;
        }
        self.outcomes.push_back(outcome);
    }

    /// Writes an outcome beside the kept logs.
    pub(super) fn keep(&mut self, outcome: &Outcome) {
        let kept = self.context.places.kept.clone();
        let file = outcome.clone();
        self.writes.retain(|_, write| !write.is_finished());
        if self.writes.len() >= WRITES && !self.writes.contains_key(&outcome.uid) {
            tracing::warn!(pod = file.name, path = %kept.display(), "the pod's outcome is not kept as a file: too many wait to be written");
            return;
        }
        let before = self.writes.remove(&outcome.uid);
        // A hung home directory must not stop the manager; a file that cannot be written is said once, in the log.
        let write = tokio::spawn(async move {
            // The newer one of the same pod must come last.
            if let Some(before) = before {
                let _ = before.await;
            }
            let written = on_disk(move || {
                if let Err(error) = file.keep(&kept) {
                    tracing::warn!(pod = file.name, path = %kept.display(), %error, "the pod's outcome could not be kept as a file");
                }
            });
            let _ = written.await;
        });
        self.writes.insert(outcome.uid.clone(), write);
    }
}
