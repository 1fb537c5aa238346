//! The registered Node in the hands of the rest of the pilot: cordon, uncordon, remove.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use kube::api::{DeleteParams, Patch, PatchParams, Preconditions};
use serde_json::json;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::alivetime::Published;
use super::api::{CALL_LIMIT, CallError, Kind, call};
use super::error::NodeError;
use super::shared::{NodeState, Shared};
use super::status::{Health, NotReady};
use super::upkeep;

/// Tries for a change that somebody waits for, where another hand came between: rare, and never often in a row.
const TRIES: u32 = 5;

/// First pause between two tries at removing the Node; it doubles up to one second.
const REMOVE_PAUSE: Duration = Duration::from_millis(100);

/// How long the upkeep may take to end what it is doing before it is broken off: a write takes milliseconds.
const STOP_LIMIT: Duration = Duration::from_secs(1);

/// kubelet's reason for a Node that is not ready (`pkg/kubelet/nodestatus/setters.go`).
pub const NOT_READY_REASON: &str = "KubeletNotReady";

/// kubelet's words at its end (`pkg/kubelet/nodeshutdown`).
pub const SHUTTING_DOWN: &str = "node is shutting down";

/// What became of the Node at its removal.
#[derive(Debug)]
pub enum Removal {
    /// Node and Lease are gone.
    Removed,
    /// The credential may not delete the Node. It is left cordoned and not ready, and its Lease is gone; the next
    /// pilot of that name takes it over at once. `source` is what the API server said.
    LeftBehind {
        /// Why the Node could not be deleted.
        source: CallError,
    },
    /// The Node is another pilot's by now, and was not touched.
    NotOurs,
}

/// This pilot's Node. Made by [`super::registration::register`].
pub struct NodeHandle {
    shared: Arc<Shared>,
    tasks: Mutex<Vec<JoinHandle<()>>>,
}

impl std::fmt::Debug for NodeHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NodeHandle")
            .field("name", &self.name())
            .field("state", &self.state().borrow())
            .finish()
    }
}

impl NodeHandle {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self { shared, tasks: Mutex::default() }
    }

    /// The Node's name.
    #[must_use]
    pub fn name(&self) -> &str {
        self.shared.name()
    }

    /// Follows the Node's labels as the API server last acknowledged or showed them.
    #[must_use]
    pub fn labels(&self) -> watch::Receiver<BTreeMap<String, String>> {
        self.shared.labels.subscribe()
    }

    /// Follows the Node's uid, and whether another pilot has taken the Node over.
    #[must_use]
    pub fn state(&self) -> watch::Receiver<NodeState> {
        self.shared.state.subscribe()
    }

    /// Starts the tasks that keep the Node true: Lease, status, labels, registration. They run until
    /// [`Self::remove`]. A second call does nothing. To be called in a tokio runtime.
    pub fn spawn_upkeep(&self) {
        let mut tasks = self.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        if tasks.is_empty() {
            tasks.push(tokio::spawn(upkeep::keep_lease(Arc::clone(&self.shared))));
            tasks.push(tokio::spawn(upkeep::keep_node(Arc::clone(&self.shared))));
            tasks.push(tokio::spawn(upkeep::keep_watch(Arc::clone(&self.shared))));
        }
    }

    /// Changes what the Node's status says of its health; the upkeep writes it at once when it differs.
    pub fn change_health(&self, change: impl FnOnce(&mut Health)) {
        change(&mut self.shared.health());
        self.shared.wake.notify_one();
    }

    /// Cordons the Node. On success the API server has acknowledged it, and the scheduler sends nothing more
    /// (what it bound before may still arrive). A Node that is registered again is cordoned too.
    ///
    /// At most [`CALL_LIMIT`]; the caller may call again.
    ///
    /// # Errors
    /// [`NodeError::Refused`] without the right; [`NodeError::Gone`] when the Node is no more or another's;
    /// [`NodeError::OutOfTime`] when the API server did not do it.
    pub async fn cordon(&self) -> Result<(), NodeError> {
        self.set_unschedulable(true, "cordoning the Node").await
    }

    /// Takes the cordon away again, acknowledged by the API server as for [`Self::cordon`].
    ///
    /// # Errors
    /// Those of [`Self::cordon`].
    pub async fn uncordon(&self) -> Result<(), NodeError> {
        self.set_unschedulable(false, "uncordoning the Node").await
    }

    async fn set_unschedulable(&self, wanted: bool, what: &'static str) -> Result<(), NodeError> {
        self.shared.unschedulable.store(wanted, Ordering::Relaxed);
        let started = Instant::now();
        let tried = tokio::time::timeout(CALL_LIMIT, settle_unschedulable(&self.shared)).await;
        let Err(error) = tried.unwrap_or(Err(CallError::NoAnswer)) else {
            tracing::info!(node = self.name(), "{what}: done");
            return Ok(());
        };
        match error.kind() {
            Kind::NotFound | Kind::Conflict | Kind::Invalid => {
                self.shared.suspect_now();
                Err(NodeError::Gone { name: self.name().to_owned() })
            }
            _ => Err(NodeError::of_call(self.name(), what, started.elapsed(), error)),
        }
    }

    /// Ends the upkeep and deletes Node and Lease; what is gone already is no error. To be called once, last.
    ///
    /// Where the credential may not delete the Node (NodeRestriction), it is left cordoned and not ready, and its
    /// Lease is let go. What fails otherwise is tried again until `limit` is over.
    ///
    /// # Errors
    /// [`NodeError::OutOfTime`] when the API server did not do it within `limit`.
    pub async fn remove(&self, limit: Duration) -> Result<Removal, NodeError> {
        let started = Instant::now();
        self.stop_upkeep((limit / 4).min(STOP_LIMIT)).await;
        if self.shared.is_taken() {
            return Ok(Removal::NotOurs);
        }
        let mut pause = REMOVE_PAUSE;
        loop {
            let left = limit.saturating_sub(started.elapsed());
            let tried = tokio::time::timeout(left, remove_once(&self.shared)).await;
            let source = match tried {
                Ok(Ok(removal)) => {
                    if matches!(removal, Removal::Removed) {
                        tracing::info!(node = self.name(), "removed Node and Lease");
                    }
                    return Ok(removal);
                }
                Ok(Err(error)) => error,
                Err(_) => CallError::NoAnswer,
            };
            let waited = started.elapsed();
            let left = limit.saturating_sub(waited);
            if left < REMOVE_PAUSE {
                let name = self.name().to_owned();
                return Err(NodeError::OutOfTime { name, what: "the removal", waited, source });
            }
            // Half of what is left at most: an API server that comes back in the last second is still told.
            tokio::time::sleep(pause.min(left / 2)).await;
            pause = (pause * 2).min(Duration::from_secs(1));
        }
    }

    /// A task that is in the middle of a call may end it, lest a Node be created after it was deleted.
    async fn stop_upkeep(&self, limit: Duration) {
        self.shared.stop.send_replace(true);
        let mut tasks = std::mem::take(&mut *self.tasks.lock().unwrap_or_else(PoisonError::into_inner));
        let all = futures::future::join_all(tasks.iter_mut());
        if tokio::time::timeout(limit, all).await.is_err() {
            tasks.iter().for_each(JoinHandle::abort);
        }
    }
}

/// Writes whether the scheduler is to keep away; after a conflict, mostly the Node controller's hand, again.
async fn settle_unschedulable(shared: &Shared) -> Result<(), CallError> {
    let mut tries = 0;
    loop {
        tries += 1;
        match write_unschedulable(shared).await {
            Err(error) if error.kind() == Kind::Conflict && tries < TRIES => {
                // Whose the Node is now decides.
                if !upkeep::reread(shared).await? || shared.is_taken() {
                    return Err(error);
                }
            }
            done => return done,
        }
    }
}

async fn write_unschedulable(shared: &Shared) -> Result<(), CallError> {
    let wanted = shared.unschedulable.load(Ordering::Relaxed).then_some(true);
    let patch = json!({"metadata": shared.expected(), "spec": {"unschedulable": wanted}});
    let node =
        call(shared.nodes.patch(shared.name(), &PatchParams::default(), &Patch::Merge(&patch))).await?;
    shared.saw(&node);
    Ok(())
}

/// Writes the status as it is now, the labels with it as they are; after a conflict once more.
async fn write_health(shared: &Shared) -> Result<(), CallError> {
    match write_health_once(shared).await {
        Err(error) if error.kind() == Kind::Conflict => {
            let there = upkeep::reread(shared).await?;
            if !there || shared.is_taken() { Err(error) } else { write_health_once(shared).await }
        }
        done => done,
    }
}

async fn write_health_once(shared: &Shared) -> Result<(), CallError> {
    let mut writer = shared.writer.lock().await;
    let health = shared.health().clone();
    let published: Published = writer.published.unwrap_or_else(|| shared.fresh(SystemTime::now()));
    upkeep::write(shared, &mut writer, published, Some(health)).await
}

/// One try at removing Node and Lease.
async fn remove_once(shared: &Shared) -> Result<Removal, CallError> {
    let name = shared.name();
    let expected = shared.expected();
    let params = DeleteParams {
        preconditions: Some(Preconditions { uid: Some(expected.uid), resource_version: expected.version }),
        ..DeleteParams::default()
    };
    let removal = match call(shared.nodes.delete(name, &params)).await {
        Ok(_) => Removal::Removed,
        Err(error) => match error.kind() {
            Kind::NotFound => Removal::Removed,
            Kind::Conflict => return not_that_one(shared, error).await,
            Kind::Forbidden => {
                leave_behind(shared).await?;
                Removal::LeftBehind { source: error }
            }
            _ => return Err(error),
        },
    };
    match call(shared.leases.delete(name, &DeleteParams::default())).await {
        Err(error) if error.kind() == Kind::Forbidden => {
            // It runs out by itself, and goes with the Node.
            tracing::warn!(node = name, %error, "this credential may not delete the Lease");
        }
        Err(error) if error.kind() != Kind::NotFound => return Err(error),
        _ => {}
    }
    Ok(removal)
}

/// Not the Node or the version that we know: another pilot's, or ours that somebody else wrote to.
async fn not_that_one(shared: &Shared, conflict: CallError) -> Result<Removal, CallError> {
    let Some(node) = call(shared.nodes.get_opt(shared.name())).await? else { return Ok(Removal::Removed) };
    if !super::identity::still_ours(&node, &shared.uid(), &shared.config.instance) {
        return Ok(Removal::NotOurs);
    }
    shared.saw(&node);
    shared.state.send_modify(|state| state.uid = super::api::uid(&node));
    Err(conflict)
}

async fn leave_behind(shared: &Shared) -> Result<(), CallError> {
    tracing::info!(
        node = shared.name(),
        "this credential may not delete the Node, so it is left for a sweeper"
    );
    shared.unschedulable.store(true, Ordering::Relaxed);
    settle_unschedulable(shared).await?;
    shared.health().not_ready.get_or_insert_with(|| NotReady {
        reason: NOT_READY_REASON.to_owned(),
        message: SHUTTING_DOWN.to_owned(),
    });
    write_health(shared).await
}

#[cfg(test)]
mod tests;
