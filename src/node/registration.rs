//! How the pilot gets its Node: a new one, its own from before a crash, or a dead pilot's.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime};

use k8s_openapi::api::core::v1::Node;
use k8s_openapi::jiff::Timestamp;
use kube::api::{Patch, PatchParams};
use serde_json::Value;
use tokio::sync::watch;

use super::alivetime::Timing;
use super::api::{CallError, Kind, Trouble, call};
use super::error::NodeError;
use super::handle::NodeHandle;
use super::identity::{Life, OtherPilot, Owner, life, owner};
use super::lease;
use super::object::{NodeConfig, adoption_patch, status, status_patch};
use super::shared::{Shared, observed};
use super::status::conditions;

/// First pause between two tries, and the longest: kubelet's at its registration
/// (`pkg/kubelet/kubelet_node_status.go`).
const PAUSES: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(7));

/// How often another pilot's Lease is looked at while it is unclear whether that pilot lives.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// Why one try brought no Node.
enum Failure {
    /// A call failed; its kind says whether another try may help.
    Call(&'static str, CallError),
    /// No other try would help.
    Final(NodeError),
}

/// Registers the Node, or adopts the one that is there if it is ours.
///
/// A Node of the same name is adopted when this very pilot made it (its annotation `jiriaf.instance`), or when
/// another pilot made it that is dead: it let the Node go, or has not renewed its Lease for 40 s, which may take
/// as long to tell. `timing` is the end as last learnt; it is followed for as long as the upkeep runs.
///
/// What may pass (no connection, overload) is tried again for `limit`; the time that it takes to tell whether
/// another pilot lives does not count.
///
/// # Errors
/// [`NodeError::HeldByPilot`] and [`NodeError::NotAPilots`] when the name is another's, [`NodeError::Refused`]
/// at once when the credential does not do, [`NodeError::Rejected`] when the Node is not valid,
/// [`NodeError::OutOfTime`] after `limit`.
pub async fn register(
    client: kube::Client,
    config: NodeConfig,
    timing: watch::Receiver<Option<Timing>>,
    limit: Duration,
) -> Result<NodeHandle, NodeError> {
    let shared = Shared::new(client, config, timing);
    let mut started = Instant::now();
    let mut trouble = Trouble::new("registering the Node");
    let mut dead = None;
    let mut pause = PAUSES.0;
    loop {
        let known_dead = dead.clone();
        let (what, source) = match enter(&shared, &mut dead).await {
            Ok(()) => break,
            Err(Failure::Final(error)) => return Err(error),
            Err(Failure::Call(what, source)) => (what, source),
        };
        if dead != known_dead {
            started = Instant::now(); // Watching another pilot's Lease is not waiting for the API server.
        }
        let waited = started.elapsed();
        // A Node that comes, goes or changes between two calls is looked at again.
        let hopeless = matches!(source.kind(), Kind::Forbidden | Kind::Unauthorized | Kind::Invalid);
        if hopeless || waited + pause > limit {
            return Err(NodeError::of_call(shared.name(), what, waited, source));
        }
        trouble.failed(shared.name(), &source);
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(PAUSES.1);
    }
    trouble.worked(shared.name());
    Ok(NodeHandle::new(Arc::new(shared)))
}

/// One try. `dead` remembers a pilot whose death was told, so that it is not watched again.
async fn enter(shared: &Shared, dead: &mut Option<String>) -> Result<(), Failure> {
    match shared.post().await {
        Ok((node, published, health)) => {
            tracing::info!(node = shared.name(), uid = super::api::uid(&node), "registered the Node");
            shared.record(&node, published, health).await;
            return Ok(());
        }
        Err(error) if error.kind() == Kind::Exists => {}
        Err(error) => return Err(Failure::Call("creating the Node", error)),
    }
    let existing = get(shared).await?;
    let name = shared.name().to_owned();
    match owner(&existing, &shared.config.instance) {
        Owner::Us => adopt(shared, &existing, false).await,
        Owner::Stranger { kubelet_version } => {
            Err(Failure::Final(NodeError::NotAPilots { name, kubelet_version }))
        }
        Owner::Pilot(other) => {
            if dead.as_deref() != Some(&other.instance) {
                await_death(shared, &other).await?;
                *dead = Some(other.instance.clone());
            }
            // The Node controller may have written to it meanwhile; another new pilot may have taken it.
            let existing = get(shared).await?;
            match owner(&existing, &shared.config.instance) {
                Owner::Pilot(same) if same.instance == other.instance => {
                    tracing::warn!(
                        node = name,
                        job = other.job,
                        instance = other.instance,
                        "the pilot that had this Node is dead; its Node is taken over"
                    );
                    adopt(shared, &existing, true).await
                }
                _ => Err(Failure::Call("taking over the Node", taken_meanwhile())),
            }
        }
    }
}

async fn get(shared: &Shared) -> Result<Node, Failure> {
    call(shared.nodes.get(shared.name())).await.map_err(|error| Failure::Call("reading the Node", error))
}

/// What the API server would have said had the patch been sent: the Node is another's by now.
fn taken_meanwhile() -> CallError {
    let status = kube::core::Status::failure("the Node changed while it was looked at", "Conflict");
    CallError::Answer(Box::new(kube::core::Status { code: 409, ..status }))
}

/// Returns once the other pilot is known to be dead. At most as long as a Lease holds.
async fn await_death(shared: &Shared, other: &OtherPilot) -> Result<(), Failure> {
    let started = Instant::now();
    let mut first = None;
    loop {
        let lease = call(shared.leases.get_opt(shared.name())).await;
        let lease = lease.map_err(|error| Failure::Call("reading the Lease", error))?;
        if other.let_go && lease.is_none() {
            return Ok(());
        }
        let current = lease.as_ref().and_then(lease::renew_time);
        let seen_first = *first.get_or_insert(current);
        match life(seen_first, current, Timestamp::now(), started.elapsed()) {
            Life::Stale => return Ok(()),
            Life::Alive => {
                let ago = current.map(|renewed| Timestamp::now().duration_since(renewed));
                let ago = ago.and_then(|ago| Duration::try_from(ago).ok()).unwrap_or_default();
                return Err(Failure::Final(NodeError::HeldByPilot {
                    name: shared.name().to_owned(),
                    job: other.job.clone(),
                    instance: other.instance.clone(),
                    renewed_ago: Duration::from_secs(ago.as_secs()),
                }));
            }
            Life::Unclear => {}
        }
        if started.elapsed() < LOOK_EVERY {
            let (node, job) = (shared.name(), &other.job);
            tracing::info!(
                node,
                job,
                "another pilot has a Node of this name; looking whether it lives, up to 40 s"
            );
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// Makes an existing Node ours. See [`adoption_patch`] for `anew`.
async fn adopt(shared: &Shared, existing: &Node, anew: bool) -> Result<(), Failure> {
    if !anew {
        let cordoned = existing.spec.as_ref().and_then(|spec| spec.unschedulable).unwrap_or(false);
        shared.unschedulable.store(cordoned, Ordering::Relaxed);
    }
    let params = PatchParams::default();
    let mut keep_taints = false;
    let published = loop {
        let fresh = shared.fresh(SystemTime::now());
        let moment = shared.moment(fresh.timing.as_ref(), fresh.value);
        let mut patch = adoption_patch(&shared.config, &moment, existing, anew);
        if keep_taints && let Some(spec) = patch["spec"].as_object_mut() {
            spec.remove("taints");
        }
        let has_taints = patch["spec"].get("taints").is_some_and(Value::is_array);
        match call(shared.nodes.patch(shared.name(), &params, &Patch::Merge(&patch))).await {
            Ok(_) => break fresh,
            Err(error) if shared.role_refused(&error) => {}
            Err(error) if error.kind() == Kind::Forbidden && has_taints => {
                let node = shared.name();
                tracing::warn!(node, %error, "this credential may not change the Node's taints; they stay as they were");
                keep_taints = true;
            }
            Err(error) => return Err(Failure::Call("adopting the Node", error)),
        }
    };
    let health = shared.health().clone();
    let made = conditions(&observed(existing), &health, Timestamp::now());
    let patch =
        status_patch(&super::api::uid(existing), Some(existing), &status(&shared.config, &health, made));
    let node = call(shared.nodes.patch_status(shared.name(), &params, &Patch::Strategic(&patch))).await;
    let node = node.map_err(|error| Failure::Call("writing the Node's status", error))?;
    tracing::info!(node = shared.name(), uid = super::api::uid(&node), "adopted the Node that was there");
    shared.record(&node, published, health).await;
    Ok(())
}
