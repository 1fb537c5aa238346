//! Pods' shares: taken as they are admitted, given back at their end.

use std::sync::Arc;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use tokio::sync::watch;

use super::State;
use crate::pod::admission::Rejection;
use crate::pod::context::Shares;
use crate::pod::record::Record;
use crate::pod::share::{Grant, Ledger, Placement};
use crate::pod::worker::Start;

/// A ledger of a grant, where it is told who runs where, and what all pods know of it.
#[must_use]
pub fn shares(grant: Grant) -> (Ledger, watch::Sender<Arc<Placement>>, Shares) {
    let devices = grant.devices.clone();
    let mut ledger = Ledger::new(grant);
    let (placement_tx, placement) = watch::channel(Arc::new(ledger.placement()));
    (ledger, placement_tx, Shares { placement, devices })
}

impl State {
    /// A pod that may run: it gets its share, and starts.
    pub(super) fn admitted(&mut self, pod: Pod) {
        let uid = pod.metadata.uid.clone().unwrap_or_default();
        let share = match self.ledger.take(&uid, &pod) {
            Ok(share) => share,
            Err(shortage) => {
                // What a kubelet says when its CPU or device manager finds less than admission counted.
                let message = format!("Allocate failed due to {shortage}, which is unexpected");
                return self
                    .refuse(pod, Rejection { reason: "UnexpectedAdmissionError".to_owned(), message });
            }
        };
        if !share.containers.is_empty() {
            self.place();
        }
        tracing::info!(namespace = pod.metadata.namespace, pod = pod.metadata.name, uid, "pod admitted");
        self.start(Record { share, ..Record::new(pod, Timestamp::now()) }, Start::Fresh);
    }

    /// A pod has ended, or is gone: what it had is free.
    pub(super) fn release(&mut self, uid: &str) {
        if self.ledger.release(uid) {
            self.place();
        }
    }

    /// Tells who runs where now.
    pub(super) fn place(&mut self) {
        let now = Arc::new(self.ledger.placement());
        self.placement.send_if_modified(|old| std::mem::replace(old, Arc::clone(&now)) != now);
    }
}
