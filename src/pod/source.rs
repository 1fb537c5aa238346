//! Where pods come from: one watch of the pods bound to this Node.
//!
//! [`watch`] starts it. Lost connections, expired resource versions and relists are kube-runtime's; what was deleted
//! while nobody watched is found by the relist.

use std::collections::BTreeSet;

use futures::{Stream, StreamExt};
use k8s_openapi::api::core::v1::Pod;
use kube::runtime::{WatchStreamExt, watcher};
use tokio::sync::mpsc;

/// Pods that may wait for the manager. A relist may bring hundreds; the watch waits for room.
const QUEUE: usize = 256;

/// What the watch tells.
#[derive(Debug)]
pub enum PodEvent {
    /// A pod is new or has changed.
    Applied(Box<Pod>),
    /// The pod of this uid is gone.
    Deleted(String),
    /// A relist is complete; these uids are all there are.
    Listed(BTreeSet<String>),
}

/// Watches the pods bound to `node`.
#[must_use]
pub fn watch(client: kube::Client, node: &str) -> mpsc::Receiver<PodEvent> {
    let config = watcher::Config::default().fields(&format!("spec.nodeName={node}"));
    let stream = watcher(kube::Api::<Pod>::all(client), config).default_backoff();
    let (events_tx, events) = mpsc::channel(QUEUE);
    tokio::spawn(forward(stream, events_tx));
    events
}

async fn forward(
    stream: impl Stream<Item = Result<watcher::Event<Pod>, watcher::Error>> + Send,
    events: mpsc::Sender<PodEvent>,
) {
    let mut stream = std::pin::pin!(stream);
    let mut listed = BTreeSet::new();
    let mut failing = false;
    while let Some(event) = stream.next().await {
        let event = match event {
            Ok(event) => event,
            Err(error) => {
                if !failing {
                    tracing::warn!(%error, "the watch of this Node's pods is interrupted; it is tried again");
                }
                failing = true;
                continue;
            }
        };
        if failing {
            tracing::info!("the watch of this Node's pods goes on");
            failing = false;
        }
        let sent = match event {
            watcher::Event::Init => {
                listed.clear();
                Ok(())
            }
            watcher::Event::InitApply(pod) => {
                listed.extend(pod.metadata.uid.clone());
                events.send(PodEvent::Applied(Box::new(pod))).await
            }
            watcher::Event::InitDone => events.send(PodEvent::Listed(std::mem::take(&mut listed))).await,
            watcher::Event::Apply(pod) => events.send(PodEvent::Applied(Box::new(pod))).await,
            watcher::Event::Delete(pod) => match pod.metadata.uid {
                Some(uid) => events.send(PodEvent::Deleted(uid)).await,
                None => Ok(()),
            },
        };
        if sent.is_err() {
            return;
        }
    }
}
