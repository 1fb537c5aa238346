//! What the Node's tasks share: what is to be published, and what the API server is known to have.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Instant, SystemTime};

use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{Node, NodeCondition};
use k8s_openapi::jiff::Timestamp;
use kube::Api;
use kube::api::PostParams;
use tokio::sync::{Notify, watch};

use super::alivetime::{Plan, Published, Timing, plan};
use super::api::{CallError, Kind, Trouble, call};
use super::lease;
use super::object::{self, Expected, Moment, NodeConfig, ROLE};
use super::spread::Part;
use super::status::{Health, conditions};

/// The Node as others in the pilot need to know it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NodeState {
    /// The Node's uid: another one once it was deleted and registered again.
    pub uid: String,
    /// The instance of another pilot that has taken the Node over, after this one was out of reach for longer
    /// than its Lease. Nothing is written to the Node any more.
    pub taken_by: Option<String>,
}

/// What the writer knows of the API server's copy. One writer at a time: whoever holds the lock.
#[derive(Debug)]
pub(super) struct Writer {
    /// Labels and annotations as last acknowledged; `None` where they must be written whatever they are.
    pub published: Option<Published>,
    /// The conditions as last seen at the API server.
    pub observed: Vec<NodeCondition>,
    /// The health as last acknowledged, and when.
    pub status: Option<(Health, Instant)>,
    /// Failures in a row.
    pub trouble: Trouble,
}

pub(super) struct Shared {
    pub config: NodeConfig,
    /// Its own part of what is spread over a fleet.
    pub part: Part,
    pub nodes: Api<Node>,
    pub leases: Api<Lease>,
    pub client: kube::Client,
    pub timing: watch::Receiver<Option<Timing>>,
    pub state: watch::Sender<NodeState>,
    /// The Node's labels as last seen at the API server.
    pub labels: watch::Sender<BTreeMap<String, String>>,
    pub stop: watch::Sender<bool>,
    /// Something changed that the upkeep should look at now.
    pub wake: Notify,
    /// The Node may be gone or another's: the upkeep reads it before it writes again.
    pub suspect: AtomicBool,
    /// Whether the Node is to be cordoned, also when it is registered again.
    pub unschedulable: AtomicBool,
    /// Whether the credential may not set `kubernetes.io/role`.
    pub without_role: AtomicBool,
    pub writer: tokio::sync::Mutex<Writer>,
    health: Mutex<Health>,
    /// The Node's resource version as last seen. Every write carries it: a pilot that was frozen while another
    /// took its Node over must not write to it once more before it has noticed.
    version: Mutex<Option<String>>,
}

impl Shared {
    pub fn new(client: kube::Client, config: NodeConfig, timing: watch::Receiver<Option<Timing>>) -> Self {
        Self {
            nodes: Api::all(client.clone()),
            leases: Api::namespaced(client.clone(), lease::NAMESPACE),
            client,
            part: Part::of(&config.name),
            config,
            timing,
            state: watch::Sender::default(),
            labels: watch::Sender::default(),
            stop: watch::Sender::default(),
            wake: Notify::new(),
            suspect: AtomicBool::new(false),
            unschedulable: AtomicBool::new(false),
            without_role: AtomicBool::new(false),
            writer: tokio::sync::Mutex::new(Writer {
                published: None,
                observed: Vec::new(),
                status: None,
                trouble: Trouble::new("writing the Node"),
            }),
            health: Mutex::default(),
            version: Mutex::default(),
        }
    }

    pub fn name(&self) -> &str {
        &self.config.name
    }

    pub fn uid(&self) -> String {
        self.state.borrow().uid.clone()
    }

    pub fn is_taken(&self) -> bool {
        self.state.borrow().taken_by.is_some()
    }

    pub fn timing_now(&self) -> Option<Timing> {
        *self.timing.borrow()
    }

    pub fn health(&self) -> MutexGuard<'_, Health> {
        lock(&self.health)
    }

    /// Uid and resource version of the Node as last seen: the metadata that every patch begins with.
    pub fn expected(&self) -> Expected {
        Expected { uid: self.uid(), version: lock(&self.version).clone() }
    }

    /// Remembers which version of the Node was seen, and its labels. An event of the watch may come after the answer to a later
    /// write: versions are numbers that grow (KEP-5504), and an older one is passed over.
    pub fn saw(&self, node: &Node) {
        let mut last = lock(&self.version);
        let number = |version: &Option<String>| version.as_ref().and_then(|v| v.parse::<u64>().ok());
        if number(&node.metadata.resource_version) >= number(&last) {
            last.clone_from(&node.metadata.resource_version);
            let now = node.metadata.labels.clone().unwrap_or_default();
            self.labels.send_if_modified(|labels| {
                let moved = *labels != now;
                *labels = now;
                moved
            });
        }
    }

    /// Has the upkeep read the Node before it writes again.
    pub fn suspect_now(&self) {
        self.suspect.store(true, Ordering::Relaxed);
        self.wake.notify_one();
    }

    /// What is to be published with this value of alivetime.
    pub fn moment<'a>(&self, timing: Option<&'a Timing>, alivetime: Option<u64>) -> Moment<'a> {
        Moment {
            timing,
            alivetime,
            without_role: self.without_role.load(Ordering::Relaxed),
            unschedulable: self.unschedulable.load(Ordering::Relaxed),
        }
    }

    /// What a Node that is written whole says of the end, at this moment.
    pub fn fresh(&self, now: SystemTime) -> Published {
        let timing = self.timing_now();
        let value = match plan(now, timing.as_ref(), self.config.publish_walltime, None, self.part) {
            Plan::Write(value) => value,
            Plan::Wait(_) => None,
        };
        Published { timing, value, at: now }
    }

    /// Creates the Node; without `kubernetes.io/role` where that is what the API server minds.
    pub async fn post(&self) -> Result<(Node, Published, Health), CallError> {
        let health = self.health().clone();
        let made = conditions(&[], &health, Timestamp::now());
        loop {
            let fresh = self.fresh(SystemTime::now());
            let moment = self.moment(fresh.timing.as_ref(), fresh.value);
            let node = object::node(&self.config, &moment, &health, made.clone());
            match call(self.nodes.create(&PostParams::default(), &node)).await {
                Ok(node) => return Ok((node, fresh, health)),
                Err(error) if self.role_refused(&error) => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Notes and says that the label `kubernetes.io/role` is refused; true once at most, so that it ends a loop.
    pub fn role_refused(&self, error: &CallError) -> bool {
        let refused = error.kind() == Kind::Forbidden && error.message().contains(ROLE);
        let first = refused && !self.without_role.swap(true, Ordering::Relaxed);
        if first {
            let node = self.name();
            tracing::warn!(node, %error, "this credential may not set the label {ROLE}; the Node goes without it");
        }
        first
    }

    /// Takes over what the API server has just acknowledged of the whole Node.
    pub async fn record(&self, node: &Node, published: Published, health: Health) {
        let mut writer = self.writer.lock().await;
        writer.published = Some(published);
        writer.status = Some((health, Instant::now()));
        writer.observed = observed(node);
        drop(writer);
        self.saw(node);
        let uid = super::api::uid(node);
        self.state.send_modify(|state| state.uid = uid);
    }
}

/// Locks what nothing can leave half done.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The conditions that a Node has at the API server.
pub(super) fn observed(node: &Node) -> Vec<NodeCondition> {
    node.status.as_ref().and_then(|status| status.conditions.clone()).unwrap_or_default()
}
