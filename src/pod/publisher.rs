//! Statuses on their way to the API server: the latest one of each pod, until it is acknowledged.
//!
//! [`Publisher::publish`] never waits. One task a pod sends what is newest, so a status that was overtaken costs nothing.

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Pod, PodStatus};
use tokio::sync::watch;

use super::api::{Api, ApiError, Patched};
use super::status;

/// First wait after a failure; doubled up to [`RETRY_MOST`].
const RETRY_FIRST: Duration = Duration::from_millis(200);

/// Longest wait between tries. An API server that comes back is told within this time; during a drain, within a second.
const RETRY_MOST: Duration = Duration::from_secs(5);

/// As [`RETRY_MOST`], while the pilot drains.
const RETRY_DRAINING: Duration = Duration::from_secs(1);

/// Tries of a status that the API server calls invalid (422). The second is made upon a fresh copy.
const INVALID_TRIES: u32 = 3;

/// What the API server is known to have.
#[derive(Debug, Clone, Default)]
pub struct Acknowledged {
    /// The number of the last status that it has; numbers come from [`Publisher::publish`].
    pub number: u64,
    /// The pod is no more.
    pub gone: bool,
    /// It refuses the last status for good.
    pub refused: Option<String>,
}

/// Sends the statuses of one pod.
pub struct Publisher {
    wanted: watch::Sender<(u64, Option<Arc<PodStatus>>)>,
    acknowledged: watch::Receiver<Acknowledged>,
    number: u64,
    last: Option<Arc<PodStatus>>,
}

impl Publisher {
    /// Starts the task that sends the statuses of `pod`. `draining` turns true when time is short.
    #[must_use]
    pub fn spawn(api: Api, pod: Pod, draining: watch::Receiver<bool>) -> Self {
        let (wanted, wanted_rx) = watch::channel((0, None));
        let (acknowledged_tx, acknowledged) = watch::channel(Acknowledged::default());
        tokio::spawn(send_all(api, pod, wanted_rx, acknowledged_tx, draining));
        Self { wanted, acknowledged, number: 0, last: None }
    }

    /// Asks that the API server have this status; one that equals the last is not sent again.
    pub fn publish(&mut self, status: PodStatus) {
        if self.last.as_deref() == Some(&status) {
            return;
        }
        let status = Arc::new(status);
        self.number += 1;
        self.last = Some(Arc::clone(&status));
        // The task ends only when the pod is gone; then there is nobody to tell.
        let _ = self.wanted.send((self.number, Some(status)));
    }

    /// Whether the last status that was published is acknowledged.
    #[must_use]
    pub fn is_acknowledged(&self) -> bool {
        self.acknowledged.borrow().number == self.number
    }

    /// What is known of the API server's copy.
    #[must_use]
    pub fn state(&self) -> Acknowledged {
        self.acknowledged.borrow().clone()
    }

    /// Waits until the API server has taken or refused something.
    pub async fn changed(&mut self) {
        if self.acknowledged.changed().await.is_err() {
            // The task has ended: nothing will change any more.
            std::future::pending::<()>().await;
        }
    }
}

async fn send_all(
    api: Api,
    mut pod: Pod,
    mut wanted: watch::Receiver<(u64, Option<Arc<PodStatus>>)>,
    acknowledged: watch::Sender<Acknowledged>,
    mut draining: watch::Receiver<bool>,
) {
    let mut failures = 0u32;
    let mut invalid = 0u32;
    while failures > 0 || wanted.changed().await.is_ok() {
        let (number, Some(status)) = wanted.borrow_and_update().clone() else { continue };
        let base = pod.status.clone().unwrap_or_default();
        let uid = pod.metadata.uid.clone().unwrap_or_default();
        let Some(patch) = status::patch(&base, &status, &uid) else {
            failures = 0;
            acknowledged.send_modify(|a| a.number = number);
            continue;
        };
        match api.patch_status(&pod, &patch, &status).await {
            Ok(Patched::Acknowledged(answer)) => {
                if failures > 0 {
                    tracing::info!(pod = name(&pod), failures, "the pod's status was taken at last");
                }
                (failures, invalid) = (0, 0);
                pod.status = answer.status;
                acknowledged.send_modify(|a| *a = Acknowledged { number, gone: false, refused: None });
            }
            Ok(Patched::Gone) => {
                acknowledged.send_modify(|a| *a = Acknowledged { number, gone: true, refused: None });
                return;
            }
            Err(error) => {
                failures += 1;
                if failures == 1 {
                    tracing::warn!(pod = name(&pod), %error, "the pod's status was not taken; it is sent again until it is");
                }
                if error.code() == Some(422) {
                    invalid += 1;
                    if !refresh(&api, &mut pod).await {
                        acknowledged.send_modify(|a| *a = Acknowledged { number, gone: true, refused: None });
                        return;
                    }
                    if invalid >= INVALID_TRIES {
                        tracing::error!(pod = name(&pod), %error, "the API server calls the pod's status invalid; given up");
                        (failures, invalid) = (0, 0);
                        acknowledged.send_modify(|a| a.refused = Some(error.to_string()));
                        continue;
                    }
                }
                if !wait(failures, &mut wanted, &mut draining).await {
                    return;
                }
            }
        }
    }
}

fn name(pod: &Pod) -> String {
    let part = |text: &Option<String>| text.clone().unwrap_or_default();
    format!("{}/{}", part(&pod.metadata.namespace), part(&pod.metadata.name))
}

/// Takes the API server's own copy as what the next patch is made against; false when the pod is no more (a patch with
/// another pod's uid is answered with 422, too).
async fn refresh(api: &Api, pod: &mut Pod) -> bool {
    let part = |text: &Option<String>| text.clone().unwrap_or_default();
    let found: Result<Option<Pod>, ApiError> =
        api.pod(&part(&pod.metadata.namespace), &part(&pod.metadata.name), &part(&pod.metadata.uid)).await;
    match found {
        Ok(Some(fresh)) => {
            pod.status = fresh.status;
            true
        }
        Ok(None) => matches!(api, Api::Files(_)),
        Err(_) => true,
    }
}

/// Waits for the next try: less when the pilot drains, and not at all when the drain begins meanwhile or a newer status
/// is wanted. False when nobody wants this pod's statuses any more.
async fn wait(
    failures: u32,
    wanted: &mut watch::Receiver<(u64, Option<Arc<PodStatus>>)>,
    draining: &mut watch::Receiver<bool>,
) -> bool {
    let most = if *draining.borrow_and_update() { RETRY_DRAINING } else { RETRY_MOST };
    let delay = RETRY_FIRST.saturating_mul(1 << failures.min(8)).min(most);
    tokio::select! {
        () = tokio::time::sleep(delay) => true,
        Ok(()) = draining.changed() => true,
        newer = wanted.changed() => newer.is_ok(),
    }
}
