//! The cordon: whether pods are taken, here and as the API server knows it.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use crate::node::{NodeError, NodeHandle};
use crate::pod::manager::{Gate, Manager};

type Turning = std::pin::Pin<Box<dyn Future<Output = Result<(), NodeError>> + Send>>;

/// Why no pods are taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Why {
    /// The deadline is near. Pods that come all the same are rejected.
    Deadline,
    /// Nobody works here. Pods that come all the same are work: they wait for the cordon's end.
    Idle,
}

/// The gate that belongs to a cordon which the API server has acknowledged.
const fn gate(why: Option<Why>) -> Gate {
    match why {
        None => Gate::Open,
        Some(Why::Idle) => Gate::Holding,
        Some(Why::Deadline) => Gate::Closed,
    }
}

/// The cordon, and what is being asked of the API server.
pub(super) struct Cordon {
    node: Arc<NodeHandle>,
    manager: Manager,
    why: Option<Why>,
    /// When the API server acknowledged what holds now.
    settled: Instant,
    turning: Option<Turning>,
}

impl Cordon {
    pub(super) fn new(node: Arc<NodeHandle>, manager: Manager) -> Self {
        Self { node, manager, why: None, settled: Instant::now(), turning: None }
    }

    /// Begins to close or open. Until the API server has acknowledged it, pods that arrive wait: those that the scheduler
    /// binds in the moment of opening come before the answer does.
    pub(super) async fn want(&mut self, why: Option<Why>) {
        if self.why == why {
            return;
        }
        match (self.why, why) {
            (_, Some(Why::Deadline)) => tracing::info!("no more pods are taken: the deadline is near"),
            (Some(Why::Idle), None) => tracing::info!("a pod came in the last moment; pods are taken again"),
            _ => {}
        }
        let was = std::mem::replace(&mut self.why, why);
        if was.is_some() != why.is_some() {
            self.manager.gate(Gate::Holding).await;
            self.ask(Duration::ZERO);
        } else if self.turning.is_none() {
            self.manager.gate(gate(why)).await;
        }
    }

    /// Since when the cordon is acknowledged; none while it is not.
    pub(super) fn closed_since(&self) -> Option<Instant> {
        (self.why.is_some() && self.turning.is_none()).then_some(self.settled)
    }

    fn ask(&mut self, pause: Duration) {
        let (node, closed) = (Arc::clone(&self.node), self.why.is_some());
        self.turning = Some(Box::pin(async move {
            tokio::time::sleep(pause).await;
            if closed { node.cordon().await } else { node.uncordon().await }
        }));
    }

    /// Waits for the API server's answer; for ever when nothing is asked.
    pub(super) async fn turn(&mut self) {
        let Some(turning) = &mut self.turning else { return std::future::pending().await };
        let (closed, result) = (self.why.is_some(), turning.await);
        self.turning = None;
        match result {
            Ok(()) => {
                self.settled = Instant::now();
                if !closed {
                    tracing::info!("the Node is open: pods are taken again");
                }
                self.manager.gate(gate(self.why)).await;
            }
            Err(error) => {
                tracing::warn!(%error, closed, "the Node's cordon could not be changed; it is tried again");
                self.ask(Duration::from_secs(1));
            }
        }
    }
}
