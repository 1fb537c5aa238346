//! Events: what a person looks for in `kubectl describe pod`.
//!
//! [`Events`] never waits: entries go through a bounded queue to one task, and what does not fit is counted.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use k8s_openapi::api::core::v1::{ObjectReference, Pod};
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use tokio::sync::mpsc;

use super::containers;

/// Entries that may wait. kubelet's own burst is 100 (kubelet config, eventBurst); a drain of many pods needs more.
const QUEUE: usize = 512;

/// An event's note holds at most 1,024 bytes (events.k8s.io/v1).
const NOTE_BYTES: usize = 1024;

/// The reason of the event that tells how a pod ended.
pub const ENDED: &str = "PodEnded";

/// Whether an event is a complaint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Something happened as it should.
    Normal,
    /// Somebody should look.
    Warning,
}

struct Entry {
    about: ObjectReference,
    kind: Kind,
    reason: String,
    message: String,
}

/// Where events go.
#[derive(Clone)]
pub struct Events {
    queue: mpsc::Sender<Entry>,
    lost: Arc<AtomicU64>,
}

impl Events {
    /// Sends events to the API server.
    #[must_use]
    pub fn to_cluster(client: kube::Client, node: &str) -> Self {
        let reporter = Reporter { controller: "jiriaf-pilot".to_owned(), instance: Some(node.to_owned()) };
        let recorder = Recorder::new(client, reporter);
        Self::with(move |entry| {
            let recorder = recorder.clone();
            async move {
                let event = Event {
                    type_: match entry.kind {
                        Kind::Normal => EventType::Normal,
                        Kind::Warning => EventType::Warning,
                    },
                    reason: entry.reason,
                    note: Some(entry.message),
                    action: "Running".to_owned(),
                    secondary: None,
                };
                let sent =
                    tokio::time::timeout(super::api::CALL_LIMIT, recorder.publish(&event, &entry.about));
                if let Ok(Err(error)) = sent.await {
                    tracing::debug!(reason = event.reason, %error, "an event was not taken by the API server");
                }
            }
        })
    }

    /// Writes complaints to the log; for `play`. How a pod ended stands in the table.
    #[must_use]
    pub fn to_log() -> Self {
        Self::with(|entry| async move {
            if entry.kind == Kind::Warning && entry.reason != ENDED {
                let pod = entry.about.name.unwrap_or_default();
                tracing::warn!(pod, reason = entry.reason, "{}", entry.message);
            }
        })
    }

    fn with<F: Future<Output = ()> + Send>(send: impl Fn(Entry) -> F + Send + Sync + 'static) -> Self {
        let (queue, mut entries) = mpsc::channel::<Entry>(QUEUE);
        tokio::spawn(async move {
            while let Some(entry) = entries.recv().await {
                send(entry).await;
            }
        });
        Self { queue, lost: Arc::default() }
    }

    /// Records an event about a pod, or about one of its containers.
    pub fn record(&self, pod: &Pod, container: Option<&str>, kind: Kind, reason: &str, message: &str) {
        let about = ObjectReference {
            api_version: Some("v1".to_owned()),
            kind: Some("Pod".to_owned()),
            namespace: pod.metadata.namespace.clone(),
            name: pod.metadata.name.clone(),
            uid: pod.metadata.uid.clone(),
            resource_version: None,
            field_path: container.map(|name| {
                let kind = containers::find(pod, name).map_or(containers::Kind::Main, |(kind, _)| kind);
                format!("spec.{}{{{name}}}", kind.field())
            }),
        };
        let entry = Entry { about, kind, reason: reason.to_owned(), message: cut(message) };
        if self.queue.try_send(entry).is_err() {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Waits until the queue is empty, or `limit` is over.
    pub async fn flush(&self, limit: std::time::Duration) {
        let empty = async {
            while self.queue.capacity() < QUEUE {
                tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            }
        };
        let _ = tokio::time::timeout(limit, empty).await;
        let lost = self.lost.load(Ordering::Relaxed);
        if lost > 0 {
            tracing::warn!(lost, "events were dropped because the API server took them too slowly");
        }
    }
}

fn cut(message: &str) -> String {
    if message.len() <= NOTE_BYTES {
        return message.to_owned();
    }
    let mut end = NOTE_BYTES - '…'.len_utf8();
    while !message.is_char_boundary(end) {
        end -= 1;
    }
    format!("{}…", &message[..end])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_message_is_cut_to_what_an_event_holds() {
        let long = "ä".repeat(NOTE_BYTES);
        let got = cut(&long);
        assert!(got.len() <= NOTE_BYTES && got.ends_with('…'), "{}", got.len());
        assert_eq!(cut("short"), "short");
    }
}
