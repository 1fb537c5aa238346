//! Pods that do not run here: refused, or lost with the state of the pilot that had started them.

use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Pod, PodStatus};
use tokio::sync::{oneshot, watch};
use tokio::time::Instant;

use super::{Refused, State, closing, lost};
use crate::pod::admission::Rejection;
use crate::pod::events::Kind;
use crate::pod::status::{self, ContainerRuntime, Ending, StatusInput};

impl State {
    /// Refuses a pod, the later the more of its owner's pods were refused.
    pub(super) fn refuse(&mut self, pod: Pod, rejection: Rejection) {
        let delay = self.owners.delay(&pod, Instant::now());
        tracing::warn!(
            namespace = pod.metadata.namespace,
            pod = pod.metadata.name,
            reason = rejection.reason,
            delay = delay.as_secs(),
            "pod refused: {}",
            rejection.message
        );
        self.context.events.record(&pod, None, Kind::Warning, &rejection.reason, &rejection.message);
        let ending = Ending::Rejected { reason: rejection.reason, message: rejection.message };
        let status = self.final_status(&pod, &ending, &[]);
        self.close(pod, Some(status), delay);
    }

    /// A pod that somebody started here and that this pilot knows nothing of: it is not started a second time.
    pub(super) fn lost(&mut self, pod: Pod) {
        let message =
            "The container could not be located: the pilot that had started it is gone with its state";
        tracing::warn!(namespace = pod.metadata.namespace, pod = pod.metadata.name, "{message}");
        let containers = lost::containers(&pod, message);
        let status = self.final_status(&pod, &Ending::Deleted, &containers);
        self.close(pod, Some(status), Duration::ZERO);
    }

    pub(super) fn final_status(
        &self,
        pod: &Pod,
        ending: &Ending,
        containers: &[ContainerRuntime],
    ) -> PodStatus {
        let unknown = PodStatus::default();
        status::status(&StatusInput {
            pod,
            previous: pod.status.as_ref().unwrap_or(&unknown),
            containers,
            pod_ip: Some(&self.context.identity.ip),
            host_ip: Some(&self.context.identity.ip),
            start_time: Timestamp::now(),
            directory_ready: false,
            ending: Some(ending),
            now: Timestamp::now(),
        })
    }

    /// Ends a pod that does not run here: its final status after `delay`, and its deletion once somebody asks for that.
    pub(super) fn close(&mut self, pod: Pod, status: Option<PodStatus>, delay: Duration) {
        let uid = pod.metadata.uid.clone().unwrap_or_default();
        let (deleted, deleted_rx) = watch::channel(pod.metadata.deletion_timestamp.is_some());
        self.refused.insert(uid.clone(), Refused { deleted, told: status.is_none() });
        let (told_tx, told) = oneshot::channel();
        self.told.push(Box::pin(async move {
            let _ = told.await;
            uid
        }));
        let (api, draining) = (self.context.api.clone(), self.context.draining.clone());
        let status = status.map(|status| (status, delay));
        tokio::spawn(closing::close(api, pod, status, draining, deleted_rx, told_tx));
    }
}
