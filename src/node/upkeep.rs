//! What keeps a Node true while the pilot lives: Lease, status, labels, and the Node itself should somebody delete it.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use futures::StreamExt;
use k8s_openapi::api::core::v1::Node;
use kube::core::PartialObjectMeta;
use kube::runtime::{WatchStreamExt, watcher};
use tokio::sync::Notify;

use super::alivetime::{Plan, Published, plan};
use super::lease::{LeaseKeeper, RENEW};
use super::{Inner, NodeError, code};

/// Between statuses when nothing changes (kubelet config, nodeStatusReportFrequency).
const STATUS_EVERY: Duration = Duration::from_secs(300);

/// First wait after a failed write; doubled up to [`RETRY_MOST`].
const RETRY_FIRST: Duration = Duration::from_secs(1);

/// Longest wait between tries: a quarter of the Lease.
const RETRY_MOST: Duration = Duration::from_secs(10);

/// Starts the tasks; they end when the Node leaves.
pub(super) fn spawn(inner: &Arc<Inner>, lease: LeaseKeeper, published: Option<Published>) {
    let gone = Arc::new(Notify::new());
    tokio::spawn(until_leaving(Arc::clone(inner), keep_lease(Arc::clone(inner), lease, Arc::clone(&gone))));
    tokio::spawn(until_leaving(Arc::clone(inner), keep_status(Arc::clone(inner), Arc::clone(&gone))));
    tokio::spawn(until_leaving(
        Arc::clone(inner),
        keep_alivetime(Arc::clone(inner), published, Arc::clone(&gone)),
    ));
    tokio::spawn(until_leaving(Arc::clone(inner), watch_node(Arc::clone(inner), Arc::clone(&gone))));
    tokio::spawn(until_leaving(Arc::clone(inner), register_again(Arc::clone(inner), gone)));
}

async fn until_leaving(inner: Arc<Inner>, work: impl Future<Output = ()>) {
    let mut leaving = inner.leaving.subscribe();
    tokio::select! {
        () = work => {}
        _ = leaving.wait_for(|leaving| *leaving) => {}
    }
}

/// Says a failure once for each run of failures, and its end.
struct Complaint {
    what: &'static str,
    failures: u32,
}

impl Complaint {
    fn new(what: &'static str) -> Self {
        Self { what, failures: 0 }
    }

    /// Notes how a try went; how long to wait before the next one when it failed.
    fn note(&mut self, result: &Result<(), NodeError>, gone: &Notify) -> Option<Duration> {
        match result {
            Ok(()) => {
                if self.failures > 0 {
                    tracing::info!(failures = self.failures, "{} works again", self.what);
                }
                self.failures = 0;
                None
            }
            Err(error) => {
                if matches!(error, NodeError::Api { source, .. } if code(source) == Some(404)) {
                    gone.notify_one();
                }
                if self.failures == 0 {
                    tracing::warn!(%error, "{} failed; it is tried again until it works", self.what);
                }
                self.failures = self.failures.saturating_add(1);
                let factor = 1u32 << (self.failures - 1).min(6);
                Some((RETRY_FIRST * factor).min(RETRY_MOST))
            }
        }
    }
}

async fn keep_lease(inner: Arc<Inner>, mut lease: LeaseKeeper, gone: Arc<Notify>) {
    let mut complaint = Complaint::new("renewing the Lease");
    let mut turn = 0u32;
    loop {
        // Spread a little (kubelet: 4 %), so that the pilots of one job do not all write in the same moment.
        turn = turn.wrapping_add(1);
        let spread = RENEW.mul_f64(0.04 * f64::from((turn.wrapping_mul(2_654_435_761)) >> 16 & 0xff) / 255.0);
        tokio::time::sleep(RENEW - spread).await;
        loop {
            let uid = inner.lock().uid.clone();
            let result = inner.call("renewing the Lease", lease.renew(&uid)).await;
            match complaint.note(&result, &gone) {
                None => break,
                Some(wait) => tokio::time::sleep(wait).await,
            }
        }
    }
}

async fn keep_status(inner: Arc<Inner>, gone: Arc<Notify>) {
    let mut complaint = Complaint::new("writing the Node's status");
    loop {
        tokio::time::sleep(STATUS_EVERY).await;
        while let Some(wait) = {
            let result = inner.patch_status().await;
            complaint.note(&result, &gone)
        } {
            tokio::time::sleep(wait).await;
        }
    }
}

/// Keeps alivetime and the annotations true.
async fn keep_alivetime(inner: Arc<Inner>, published: Option<Published>, gone: Arc<Notify>) {
    let mut complaint = Complaint::new("writing the Node's labels");
    let mut timing = inner.timing.clone();
    let mut last = published;
    // What the registration has not published: a deadline that was not known then.
    let mut known = timing.borrow_and_update().is_some();
    loop {
        let now = *timing.borrow_and_update();
        let next = match now {
            None if known => {
                let result = inner.patch_metadata(None, None).await;
                let wait = complaint.note(&result, &gone);
                known = wait.is_some();
                last = last.filter(|_| known);
                wait
            }
            None => None,
            Some(timing) => {
                let value = match plan(SystemTime::now(), timing.drain, last) {
                    Plan::Wait(wait) => Err(Some(wait)),
                    Plan::Done => Err(None),
                    Plan::Write(value) => Ok(value),
                };
                match value {
                    Err(wait) => wait,
                    Ok(value) => {
                        let result = inner.patch_metadata(Some(&timing), Some(value)).await;
                        let wait = complaint.note(&result, &gone);
                        if wait.is_none() {
                            known = true;
                            last = Some(Published { value, drain: timing.drain });
                        }
                        wait.or(Some(Duration::ZERO))
                    }
                }
            }
        };
        tokio::select! {
            changed = timing.changed() => {
                if changed.is_err() {
                    return;
                }
            }
            () = async {
                match next {
                    // A wall clock that jumps (suspend) is looked at again within the minute.
                    Some(wait) => tokio::time::sleep(wait.min(Duration::from_secs(60))).await,
                    None => std::future::pending().await,
                }
            } => {}
        }
    }
}

/// Watches this one Node, where the credential may; else a write that answers 404 tells.
async fn watch_node(inner: Arc<Inner>, gone: Arc<Notify>) {
    let config = watcher::Config::default().fields(&format!("metadata.name={}", inner.config.name));
    let nodes = kube::Api::<PartialObjectMeta<Node>>::all(inner.client.clone());
    let stream = watcher(nodes, config);
    let mut stream = std::pin::pin!(stream.default_backoff());
    let mut seen = false;
    while let Some(event) = stream.next().await {
        match event {
            Ok(watcher::Event::Init) => seen = false,
            Ok(watcher::Event::InitApply(_) | watcher::Event::Apply(_)) => seen = true,
            Ok(watcher::Event::Delete(_)) => gone.notify_one(),
            Ok(watcher::Event::InitDone) if !seen => gone.notify_one(),
            Ok(watcher::Event::InitDone) => {}
            Err(error) => {
                if error.to_string().contains("orbidden") {
                    tracing::info!(
                        "this credential may not watch its Node; a deletion is noticed at the next write"
                    );
                    return;
                }
            }
        }
    }
}

async fn register_again(inner: Arc<Inner>, gone: Arc<Notify>) {
    loop {
        gone.notified().await;
        // It may have been made again already, by the word of another task.
        let uid = inner.lock().uid.clone();
        let found = inner.call("looking at the Node", inner.nodes().get_opt(&inner.config.name)).await;
        if matches!(&found, Ok(Some(node)) if node.metadata.uid.as_deref() == Some(&uid)) {
            continue;
        }
        tracing::warn!(node = inner.config.name, "somebody has deleted the Node; it is registered anew");
        if let Err(error) = inner.register().await {
            tracing::error!(%error, "the Node could not be registered anew; it is tried again");
            tokio::time::sleep(RETRY_MOST).await;
            gone.notify_one();
        }
    }
}
