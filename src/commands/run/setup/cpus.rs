//! The job's CPUs while the pilot runs: a batch system may take some away, or give them back.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use super::node::processors;
use crate::allocation::{Allocation, Roots, topology};
use crate::node::NodeHandle;
use crate::pod::manager::Manager;

/// Between two looks at the affinity mask: one small file.
const LOOK: Duration = Duration::from_secs(10);

/// Looks at the CPUs, and tells whoever counts on them: who hands them out, admission (`cpus`) and the Node.
pub fn watch(allocation: &Allocation, manager: &Manager, node: &Arc<NodeHandle>, cpus: watch::Sender<usize>) {
    if !allocation.cpus_are_named {
        return;
    }
    let (granted, manager, node) = (allocation.topology.clone(), manager.clone(), Arc::clone(node));
    tokio::spawn(async move {
        let mut known = granted.clone();
        loop {
            tokio::time::sleep(LOOK).await;
            // What was never granted is not taken, also where the mask has grown.
            let now = topology::still_there(&Roots::default(), &granted);
            if now == known || now.is_empty() {
                continue;
            }
            tracing::warn!(
                before = known.len(),
                now = now.len(),
                "the CPUs that this job may use have changed: pods are moved, and the Node offers what is there"
            );
            manager.regrant(processors(&now)).await;
            cpus.send_replace(now.len());
            node.change_health(|health| health.cpus = Some(now.len()));
            known = now;
        }
    });
}
