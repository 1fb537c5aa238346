//! The end of a pod that does not run here: refused, lost, or deleted before it came.

use std::time::Duration;

use k8s_openapi::api::core::v1::{Pod, PodStatus};
use tokio::sync::{oneshot, watch};

use crate::pod::api::Api;
use crate::pod::publisher::Publisher;
use crate::pod::worker::DELETE_RETRY;

/// The longest delay of a rejection in a drain, which is over soon: a controller that replaces each rejected pod makes one
/// a second then.
const DRAINING_MOST: Duration = Duration::from_secs(1);

/// Publishes the final status, if there is one to be told, after its delay; deletes the pod once it is marked as deleted,
/// as a kubelet does. `deleted` says so, and is closed when the pod is gone. Returns when nothing is left to do. `told` is
/// dropped when the status is acknowledged, or will never be.
pub(super) async fn close(
    api: Api,
    pod: Pod,
    status: Option<(PodStatus, Duration)>,
    mut draining: watch::Receiver<bool>,
    mut deleted: watch::Receiver<bool>,
    told: oneshot::Sender<()>,
) {
    if let Some((status, delay)) = status {
        let delay = if *draining.borrow_and_update() { delay.min(DRAINING_MOST) } else { delay };
        // Nobody is spared by a delay once the pod is deleted, and once the pilot drains none is left for later.
        tokio::select! {
            () = tokio::time::sleep(delay) => {}
            Ok(()) = draining.changed() => {}
            known = is_deleted(&mut deleted) => if !known { return },
        }
        let mut publisher = Publisher::spawn(api.clone(), pod.clone(), draining);
        publisher.publish(status);
        loop {
            let answer = publisher.state();
            if answer.gone {
                return;
            }
            if publisher.is_acknowledged() || answer.refused.is_some() {
                break;
            }
            tokio::select! {
                () = publisher.changed() => {}
                () = is_gone(deleted.clone()) => return,
            }
        }
    }
    drop(told);
    if !is_deleted(&mut deleted).await {
        return;
    }
    let part = |text: Option<String>| text.unwrap_or_default();
    let (namespace, name) = (part(pod.metadata.namespace), part(pod.metadata.name));
    let uid = part(pod.metadata.uid);
    let mut failures = 0u32;
    while let Err(error) = api.delete(&namespace, &name, &uid).await {
        failures += 1;
        if failures == 1 {
            tracing::warn!(namespace, pod = name, %error, "a pod that is over could not be deleted; it is tried again");
        }
        tokio::select! {
            () = tokio::time::sleep(DELETE_RETRY) => {}
            () = is_gone(deleted.clone()) => return,
        }
    }
}

/// Waits until the pod is deleted; false when it is gone.
async fn is_deleted(deleted: &mut watch::Receiver<bool>) -> bool {
    deleted.wait_for(|deleted| *deleted).await.is_ok()
}

/// Waits until the pod is gone, deleted or not.
async fn is_gone(mut deleted: watch::Receiver<bool>) {
    while deleted.changed().await.is_ok() {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pod::api::Files;
    use tokio::sync::mpsc;
    use tokio::time::timeout;

    const LONG: Duration = Duration::from_secs(3600);
    const SOON: Duration = Duration::from_secs(10);

    struct Case {
        deleted: watch::Sender<bool>,
        draining: watch::Sender<bool>,
        told: oneshot::Receiver<()>,
        statuses: mpsc::Receiver<(String, PodStatus)>,
        task: tokio::task::JoinHandle<()>,
    }

    fn case(delay: Duration) -> Case {
        let (statuses_tx, statuses) = mpsc::channel(8);
        let api = Api::Files(Files::new([], [], statuses_tx));
        let mut pod = Pod::default();
        pod.metadata.uid = Some("u1".to_owned());
        let status = PodStatus { phase: Some("Failed".to_owned()), ..PodStatus::default() };
        let (deleted, deleted_rx) = watch::channel(false);
        let (draining, draining_rx) = watch::channel(false);
        let (told_tx, told) = oneshot::channel();
        let task = tokio::spawn(close(api, pod, Some((status, delay)), draining_rx, deleted_rx, told_tx));
        Case { deleted, draining, told, statuses, task }
    }

    #[tokio::test]
    async fn a_refused_pod_that_is_deleted_does_not_wait_for_its_delay() {
        let mut case = case(LONG);
        case.deleted.send_replace(true);
        let told = timeout(SOON, case.statuses.recv()).await.unwrap().unwrap();
        assert_eq!((told.0.as_str(), told.1.phase.as_deref()), ("u1", Some("Failed")));
        timeout(SOON, case.task).await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn a_drain_ends_the_delay_of_a_refused_pod() {
        let mut case = case(LONG);
        assert!(timeout(Duration::from_millis(50), &mut case.told).await.is_err());
        case.draining.send_replace(true);
        timeout(SOON, case.statuses.recv()).await.unwrap().unwrap();
        // Nobody says anything by it but by dropping it.
        assert!(timeout(SOON, case.told).await.unwrap().is_err());
        case.task.abort();
    }

    #[tokio::test]
    async fn the_deletion_waits_until_somebody_asks_for_it() {
        let mut case = case(Duration::ZERO);
        timeout(SOON, case.statuses.recv()).await.unwrap().unwrap();
        assert!(timeout(Duration::from_millis(50), &mut case.task).await.is_err());
        case.deleted.send_replace(true);
        timeout(SOON, case.task).await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn nothing_is_told_of_a_pod_that_is_gone() {
        let mut case = case(LONG);
        drop(case.deleted);
        timeout(SOON, case.task).await.unwrap().unwrap();
        assert!(case.statuses.recv().await.is_none());
    }
}
