//! This pilot as a Kubernetes Node: registration, status, lease, alivetime.
//!
//! [`register`] makes the Node, or takes up this pilot's own, and keeps it true until [`NodeHandle::remove`].

pub mod alivetime;
pub mod info;
pub mod labels;
pub mod lease;
pub mod object;
mod upkeep;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{Node, NodeSystemInfo};
use kube::api::{DeleteParams, Patch, PatchParams, PostParams, Preconditions};
use serde_json::json;
use tokio::sync::watch;

use self::alivetime::{Plan, plan};
use self::lease::LeaseKeeper;
use self::object::{INSTANCE, Readiness};

pub use self::alivetime::Timing;
pub use self::object::{Capacity, NodeConfig};

/// Longest wait for one call.
const CALL_LIMIT: Duration = Duration::from_secs(10);

/// Tries of the registration itself; the API server has answered just before.
const REGISTER_TRIES: u32 = 5;

/// Why a Node cannot be.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// The API server refused or could not be reached.
    #[error("Node {node}: {what} failed: {}", said(source))]
    Api {
        /// The Node.
        node: String,
        /// What was done.
        what: &'static str,
        /// What the API server said.
        source: Box<kube::Error>,
    },
    /// No answer in time.
    #[error("Node {node}: {what}: the API server did not answer within {} s", CALL_LIMIT.as_secs())]
    TimedOut {
        /// The Node.
        node: String,
        /// What was done.
        what: &'static str,
    },
    /// Another pilot has the name.
    #[error(
        "Node {node} exists and belongs to another pilot that is alive (job {job}, lease renewed {age} s ago); choose \
         another name with --node-name (NODENAME)"
    )]
    Taken {
        /// The Node.
        node: String,
        /// The other pilot's job.
        job: String,
        /// Seconds since its sign of life.
        age: u64,
    },
    /// The name is that of a Node that no pilot made.
    #[error("Node {node} exists and is no pilot's; choose another name with --node-name (NODENAME)")]
    Foreign {
        /// The Node.
        node: String,
    },
}

impl NodeError {
    /// Whether the credential lacks a right.
    #[must_use]
    pub fn is_forbidden(&self) -> bool {
        matches!(self, Self::Api { source, .. } if code(source) == Some(403) || code(source) == Some(401))
    }
}

/// What went wrong in the API server's own words; kube's would show the whole Status object.
fn said(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) if matches!(status.code, 401 | 403) => {
            format!(
                "{} (HTTP {}); the credential needs the rights of docs/cluster/",
                status.message, status.code
            )
        }
        kube::Error::Api(status) => format!("{} (HTTP {})", status.message, status.code),
        other => crate::cluster::causes(other),
    }
}

fn code(error: &kube::Error) -> Option<u16> {
    match error {
        kube::Error::Api(status) => Some(status.code),
        _ => None,
    }
}

/// What is known of the Node and changes.
#[derive(Debug, Clone)]
struct State {
    uid: String,
    cordoned: bool,
    readiness: Readiness,
    with_role: bool,
    /// The Node is being removed: nothing is written any more.
    leaving: bool,
}

struct Inner {
    client: kube::Client,
    config: NodeConfig,
    info: NodeSystemInfo,
    timing: watch::Receiver<Option<Timing>>,
    state: Mutex<State>,
    labels: watch::Sender<BTreeMap<String, String>>,
    leaving: watch::Sender<bool>,
}

/// The Node of this pilot.
#[derive(Clone)]
pub struct NodeHandle {
    inner: Arc<Inner>,
}

/// Registers the Node and begins to keep it true.
///
/// # Errors
/// When the API server refuses, or the name belongs to somebody else.
pub async fn register(
    client: kube::Client,
    config: NodeConfig,
    timing: watch::Receiver<Option<Timing>>,
) -> Result<NodeHandle, NodeError> {
    let state = State {
        uid: String::new(),
        cordoned: false,
        readiness: Readiness::ready(Timestamp::now()),
        with_role: true,
        leaving: false,
    };
    let (labels, _) = watch::channel(object::labels(&config, None, true));
    let (leaving, _) = watch::channel(false);
    let info = info::system_info();
    let inner = Arc::new(Inner { client, config, info, timing, state: Mutex::new(state), labels, leaving });
    let published = inner.register().await?;
    // The sign of life comes before the first pod: without it the node controller taints the Node.
    let mut lease = LeaseKeeper::new(inner.client.clone(), &inner.config.name);
    let uid = inner.lock().uid.clone();
    if let Err(error) = inner.call("making the Lease", lease.renew(&uid)).await {
        tracing::warn!(%error, "the Lease is not made yet; it is tried again");
    }
    upkeep::spawn(&inner, lease, published);
    Ok(NodeHandle { inner })
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn nodes(&self) -> kube::Api<Node> {
        kube::Api::all(self.client.clone())
    }

    async fn call<T>(
        &self,
        what: &'static str,
        request: impl Future<Output = Result<T, kube::Error>>,
    ) -> Result<T, NodeError> {
        let node = || self.config.name.clone();
        match tokio::time::timeout(CALL_LIMIT, request).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(source)) => Err(NodeError::Api { node: node(), what, source: Box::new(source) }),
            Err(_) => Err(NodeError::TimedOut { node: node(), what }),
        }
    }

    /// The Node as it should be now, and the alivetime in it.
    fn wanted(&self) -> (Node, Option<alivetime::Published>) {
        let state = self.lock().clone();
        let timing = *self.timing.borrow();
        let published = timing.map(|timing| {
            let value = match plan(SystemTime::now(), timing.drain, None) {
                Plan::Write(value) => value,
                Plan::Wait(_) | Plan::Done => 0,
            };
            alivetime::Published { value, drain: timing.drain }
        });
        let labels = object::labels(&self.config, published.map(|p| p.value), state.with_role);
        let now = Timestamp::now();
        let node = object::node(
            &self.config,
            labels,
            timing.as_ref(),
            &self.info,
            &state.readiness,
            state.cordoned,
            now,
        );
        (node, published)
    }

    fn took(&self, node: &Node) {
        self.lock().uid = node.metadata.uid.clone().unwrap_or_default();
        self.labels.send_replace(node.metadata.labels.clone().unwrap_or_default());
    }

    /// Makes the Node, or takes up one that is this pilot's. Returns the alivetime that it was given.
    async fn register(&self) -> Result<Option<alivetime::Published>, NodeError> {
        let mut last = None;
        for _ in 0..REGISTER_TRIES {
            let (node, published) = self.wanted();
            match self.call("registration", self.nodes().create(&PostParams::default(), &node)).await {
                Ok(made) => {
                    self.took(&made);
                    tracing::info!(node = self.config.name, uid = made.metadata.uid, "Node made");
                    return Ok(published);
                }
                Err(NodeError::Api { source, .. }) if code(&source) == Some(409) => {
                    if let Some(published) = self.adopt().await? {
                        return Ok(published);
                    }
                }
                // NodeRestriction names the label that it refuses.
                Err(NodeError::Api { source, .. })
                    if code(&source) == Some(403)
                        && self.lock().with_role
                        && source.to_string().contains(object::ROLE) =>
                {
                    tracing::warn!(
                        "this credential may not set the label {}; the Node is registered without it, and pods that \
                         select it do not come here",
                        object::ROLE
                    );
                    self.lock().with_role = false;
                }
                Err(error) if error.is_forbidden() => return Err(error),
                Err(error) => {
                    tracing::warn!(%error, "the Node is not registered yet; it is tried again");
                    last = Some(error);
                    tokio::time::sleep(Duration::from_secs(1)).await;
                }
            }
        }
        Err(last
            .unwrap_or_else(|| NodeError::TimedOut { node: self.config.name.clone(), what: "registration" }))
    }

    /// Takes up a Node of this name that is there already; none when it has just gone.
    async fn adopt(&self) -> Result<Option<Option<alivetime::Published>>, NodeError> {
        let name = &self.config.name;
        let Some(found) = self.call("looking at the Node", self.nodes().get_opt(name)).await? else {
            return Ok(None);
        };
        let annotation = found.metadata.annotations.as_ref().and_then(|all| all.get(INSTANCE)).cloned();
        let Some(instance) = annotation else { return Err(NodeError::Foreign { node: name.clone() }) };
        if instance != self.config.instance {
            let leases: kube::Api<Lease> = kube::Api::namespaced(self.client.clone(), lease::NAMESPACE);
            let lease = self.call("looking at the Lease", leases.get_opt(name)).await?;
            let age = lease.and_then(|lease| lease::age(&lease, Timestamp::now()));
            if let Some(age) = age.filter(|age| *age < lease::DURATION) {
                let labels = found.metadata.labels.unwrap_or_default();
                let job = labels.get("jiriaf.jobid").cloned().unwrap_or_else(|| "?".to_owned());
                return Err(NodeError::Taken { node: name.clone(), job, age: age.as_secs() });
            }
            tracing::warn!(
                node = name,
                "a Node of this name is left from a pilot that is dead; it is replaced"
            );
            let uid = found.metadata.uid.clone();
            self.delete(uid.as_deref()).await?;
            return Ok(None);
        }
        let (wanted, published) = self.wanted();
        let body = json!({
            "metadata": {"labels": wanted.metadata.labels, "annotations": wanted.metadata.annotations},
            "spec": {"unschedulable": wanted.spec.as_ref().and_then(|s| s.unschedulable)},
        });
        let params = PatchParams::default();
        let taken =
            self.call("taking up the Node", self.nodes().patch(name, &params, &Patch::Merge(&body))).await?;
        self.took(&taken);
        self.patch_status().await?;
        tracing::info!(node = name, uid = taken.metadata.uid, "Node taken up");
        Ok(Some(published))
    }

    async fn patch_status(&self) -> Result<(), NodeError> {
        let readiness = self.lock().readiness.clone();
        let status = object::status(&self.config, &self.info, &readiness, Timestamp::now());
        let body = json!({"status": status});
        let params = PatchParams::default();
        let patch = Patch::Strategic(&body);
        let request = async { self.nodes().patch_status(&self.config.name, &params, &patch).await };
        self.call("writing the status", request).await.map(drop)
    }

    async fn patch_metadata(&self, timing: Option<&Timing>, alivetime: Option<u64>) -> Result<(), NodeError> {
        let body = object::metadata_patch(&self.config, timing, alivetime);
        let params = PatchParams::default();
        let patch = Patch::Merge(&body);
        let request = async { self.nodes().patch_metadata(&self.config.name, &params, &patch).await };
        let answer = self.call("writing the labels", request).await?;
        self.labels.send_replace(answer.metadata.labels.unwrap_or_default());
        Ok(())
    }

    async fn delete(&self, uid: Option<&str>) -> Result<(), NodeError> {
        let params = DeleteParams {
            preconditions: uid
                .map(|uid| Preconditions { uid: Some(uid.to_owned()), ..Preconditions::default() }),
            ..DeleteParams::default()
        };
        match self.call("removal", self.nodes().delete(&self.config.name, &params)).await {
            Ok(_) => Ok(()),
            // 409: a Node of another uid has the name now.
            Err(NodeError::Api { source, .. }) if matches!(code(&source), Some(404 | 409)) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

impl NodeHandle {
    /// The Node's labels as they were last acknowledged.
    #[must_use]
    pub fn labels(&self) -> watch::Receiver<BTreeMap<String, String>> {
        self.inner.labels.subscribe()
    }

    /// Takes no more pods, acknowledged by the API server.
    ///
    /// # Errors
    /// When the API server does not answer or refuses.
    pub async fn cordon(&self) -> Result<(), NodeError> {
        self.set_unschedulable(true).await
    }

    /// Takes pods again, acknowledged by the API server.
    ///
    /// # Errors
    /// When the API server does not answer or refuses.
    pub async fn uncordon(&self) -> Result<(), NodeError> {
        self.set_unschedulable(false).await
    }

    async fn set_unschedulable(&self, wanted: bool) -> Result<(), NodeError> {
        // First here, so that a Node that is made anew meanwhile is cordoned too.
        self.inner.lock().cordoned = wanted;
        let body = json!({"spec": {"unschedulable": wanted.then_some(true)}});
        let params = PatchParams::default();
        let patch = Patch::Merge(&body);
        let request = async { self.inner.nodes().patch(&self.inner.config.name, &params, &patch).await };
        self.inner.call("cordoning", request).await.map(drop)
    }

    /// Removes Lease and Node within `limit`. A credential that may not delete the Node leaves it cordoned, not ready and
    /// without a Lease, and says so.
    ///
    /// # Errors
    /// When the Node could not be removed in time.
    pub async fn remove(&self, limit: Duration) -> Result<(), NodeError> {
        let inner = &self.inner;
        inner.lock().leaving = true;
        inner.leaving.send_replace(true);
        let what = "removal";
        let timed_out = |_| NodeError::TimedOut { node: inner.config.name.clone(), what };
        tokio::time::timeout(limit, self.remove_now()).await.map_err(timed_out)?
    }

    async fn remove_now(&self) -> Result<(), NodeError> {
        let inner = &self.inner;
        let uid = inner.lock().uid.clone();
        let mut pause = Duration::from_millis(200);
        // Until the caller's limit is over: the API server may come back in the last second.
        loop {
            let lease = LeaseKeeper::new(inner.client.clone(), &inner.config.name);
            let released = inner.call("letting the Lease go", lease.release()).await;
            let removed = match released {
                Ok(()) => inner.delete(Some(&uid)).await,
                Err(error) if error.is_forbidden() => inner.delete(Some(&uid)).await,
                Err(error) => Err(error),
            };
            match removed {
                Ok(()) => return Ok(()),
                Err(error) if error.is_forbidden() => {
                    inner.lock().readiness = Readiness::shutting_down(Timestamp::now());
                    inner.patch_status().await?;
                    tracing::warn!(
                        node = inner.config.name,
                        "this credential may not delete its Node; it is left cordoned, not ready and without a Lease"
                    );
                    return Ok(());
                }
                Err(error) => {
                    tracing::warn!(%error, "the Node could not be removed; it is tried again");
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(Duration::from_secs(1));
                }
            }
        }
    }
}
