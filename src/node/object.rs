//! The Node object as this pilot wants it: pure functions of its configuration and the time.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{
    DaemonEndpoint, Node, NodeAddress, NodeCondition, NodeDaemonEndpoints, NodeSpec, NodeStatus,
    NodeSystemInfo, Taint,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use serde_json::{Map, Value, json};

use super::alivetime::Timing;

/// Says whose Node it is.
pub const INSTANCE: &str = "jiriaf.instance";

/// Seconds that a pod can count on.
pub const ALIVETIME: &str = "jiriaf.alivetime";

/// Seconds that were granted.
pub const WALLTIME: &str = "jiriaf.walltime";

const DEADLINE: &str = "jiriaf.deadline";
const DRAIN: &str = "jiriaf.drain";

/// A label that a node's own credential may not set (NodeRestriction).
pub const ROLE: &str = "kubernetes.io/role";

/// What a Node is made from.
#[derive(Debug, Clone)]
pub struct NodeConfig {
    /// Its name.
    pub name: String,
    /// Labels beside those that every pilot has.
    pub labels: BTreeMap<String, String>,
    /// Annotations beside those that every pilot has.
    pub annotations: BTreeMap<String, String>,
    /// Its taints.
    pub taints: Vec<Taint>,
    /// The host's name.
    pub hostname: String,
    /// The host's address.
    pub internal_ip: String,
    /// What it offers.
    pub capacity: Capacity,
    /// The port of the Node's own API, where it is served.
    pub daemon_port: Option<u16>,
    /// A name of this pilot that no other has, kept over a crash.
    pub instance: String,
    /// The walltime that was granted.
    pub walltime: Option<Duration>,
    /// Whether walltime and alivetime are published.
    pub publish_walltime: bool,
}

/// What a Node offers.
#[derive(Debug, Clone)]
pub struct Capacity {
    /// CPUs.
    pub cpus: usize,
    /// Memory, in bytes.
    pub memory_bytes: u64,
    /// Pods at once.
    pub pods: u32,
    /// Room for pods' files, in bytes.
    pub ephemeral_storage_bytes: u64,
    /// GPUs by resource name.
    pub gpus: BTreeMap<String, u32>,
}

impl Capacity {
    /// As a Node's status has it. Memory is in Ki: readers of Node lists parse that.
    #[must_use]
    pub fn quantities(&self) -> BTreeMap<String, Quantity> {
        let mut all = BTreeMap::from([
            ("cpu".to_owned(), Quantity(self.cpus.to_string())),
            ("memory".to_owned(), Quantity(format!("{}Ki", self.memory_bytes / 1024))),
            ("pods".to_owned(), Quantity(self.pods.to_string())),
            ("ephemeral-storage".to_owned(), Quantity(format!("{}Ki", self.ephemeral_storage_bytes / 1024))),
        ]);
        all.extend(self.gpus.iter().map(|(name, count)| (name.clone(), Quantity(count.to_string()))));
        all
    }
}

/// What a Node's status says of the pilot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Readiness {
    /// Whether it is ready.
    pub ready: bool,
    /// The condition's reason.
    pub reason: String,
    /// The condition's message.
    pub message: String,
    /// Since when.
    pub since: Timestamp,
}

impl Readiness {
    /// Ready, in kubelet's words (nodestatus/setters.go).
    #[must_use]
    pub fn ready(now: Timestamp) -> Self {
        Self {
            ready: true,
            reason: "KubeletReady".to_owned(),
            message: "kubelet is posting ready status".to_owned(),
            since: now,
        }
    }

    /// About to go, in kubelet's words (nodeshutdown_manager_linux.go).
    #[must_use]
    pub fn shutting_down(now: Timestamp) -> Self {
        Self {
            ready: false,
            reason: "KubeletNotReady".to_owned(),
            message: "node is shutting down".to_owned(),
            since: now,
        }
    }
}

/// The labels, with alivetime where it is given.
#[must_use]
pub fn labels(config: &NodeConfig, alivetime: Option<u64>, with_role: bool) -> BTreeMap<String, String> {
    let mut labels = BTreeMap::from([
        // The hostname label is what pods select a Node by, so it is the Node's name as on a kubelet.
        ("kubernetes.io/hostname".to_owned(), config.name.clone()),
        ("type".to_owned(), "virtual-kubelet".to_owned()),
    ]);
    if with_role {
        labels.insert(ROLE.to_owned(), "agent".to_owned());
    }
    labels.extend(config.labels.clone());
    if let Some(alivetime) = alivetime.filter(|_| config.publish_walltime) {
        labels.insert(ALIVETIME.to_owned(), alivetime.to_string());
        if let Some(walltime) = config.walltime {
            labels.insert(WALLTIME.to_owned(), walltime.as_secs().to_string());
        }
    }
    labels
}

/// The annotations.
#[must_use]
pub fn annotations(config: &NodeConfig, timing: Option<&Timing>) -> BTreeMap<String, String> {
    let mut annotations = config.annotations.clone();
    annotations.insert(INSTANCE.to_owned(), config.instance.clone());
    if let Some(timing) = timing {
        annotations.insert(DEADLINE.to_owned(), rfc3339(timing.deadline));
        annotations.insert(DRAIN.to_owned(), rfc3339(timing.drain));
    }
    annotations
}

fn rfc3339(at: SystemTime) -> String {
    Timestamp::try_from(at)
        .map(|t| Timestamp::from_second(t.as_second()).unwrap_or(t).to_string())
        .unwrap_or_default()
}

/// The whole Node, as it is registered.
#[must_use]
pub fn node(
    config: &NodeConfig,
    labels: BTreeMap<String, String>,
    timing: Option<&Timing>,
    info: &NodeSystemInfo,
    readiness: &Readiness,
    cordoned: bool,
    now: Timestamp,
) -> Node {
    Node {
        metadata: ObjectMeta {
            name: Some(config.name.clone()),
            labels: Some(labels),
            annotations: Some(annotations(config, timing)),
            ..ObjectMeta::default()
        },
        spec: Some(NodeSpec {
            taints: Some(config.taints.clone()),
            unschedulable: cordoned.then_some(true),
            ..NodeSpec::default()
        }),
        status: Some(status(config, info, readiness, now)),
    }
}

/// The Node's status.
#[must_use]
pub fn status(
    config: &NodeConfig,
    info: &NodeSystemInfo,
    readiness: &Readiness,
    now: Timestamp,
) -> NodeStatus {
    let address =
        |kind: &str, address: &str| NodeAddress { type_: kind.to_owned(), address: address.to_owned() };
    NodeStatus {
        capacity: Some(config.capacity.quantities()),
        allocatable: Some(config.capacity.quantities()),
        conditions: Some(conditions(readiness, now)),
        addresses: Some(vec![
            address("InternalIP", &config.internal_ip),
            address("Hostname", &config.hostname),
        ]),
        daemon_endpoints: config.daemon_port.map(|port| NodeDaemonEndpoints {
            kubelet_endpoint: Some(DaemonEndpoint { port: i32::from(port) }),
        }),
        node_info: Some(info.clone()),
        ..NodeStatus::default()
    }
}

/// In kubelet's order, Ready last (nodestatus/setters.go).
fn conditions(readiness: &Readiness, now: Timestamp) -> Vec<NodeCondition> {
    let whole = |at: Timestamp| Some(Time(Timestamp::from_second(at.as_second()).unwrap_or(at)));
    let condition = |kind: &str, status: &str, reason: &str, message: &str| NodeCondition {
        type_: kind.to_owned(),
        status: status.to_owned(),
        reason: Some(reason.to_owned()),
        message: Some(message.to_owned()),
        last_heartbeat_time: whole(now),
        last_transition_time: whole(readiness.since),
    };
    let ready = if readiness.ready { "True" } else { "False" };
    vec![
        condition(
            "MemoryPressure",
            "False",
            "KubeletHasSufficientMemory",
            "kubelet has sufficient memory available",
        ),
        condition("DiskPressure", "False", "KubeletHasNoDiskPressure", "kubelet has no disk pressure"),
        condition("PIDPressure", "False", "KubeletHasSufficientPID", "kubelet has sufficient PID available"),
        condition("Ready", ready, &readiness.reason, &readiness.message),
    ]
}

/// The merge patch (RFC 7386) of labels and annotations: what is not wanted any more is null.
#[must_use]
pub fn metadata_patch(config: &NodeConfig, timing: Option<&Timing>, alivetime: Option<u64>) -> Value {
    let alivetime = alivetime.filter(|_| config.publish_walltime);
    let walltime = alivetime.and(config.walltime).map(|walltime| walltime.as_secs().to_string());
    let annotations = annotations(config, timing);
    let mut changed = Map::new();
    for name in [DEADLINE, DRAIN] {
        changed.insert(name.to_owned(), json!(annotations.get(name)));
    }
    json!({"metadata": {
        "labels": {ALIVETIME: alivetime.map(|seconds| seconds.to_string()), WALLTIME: walltime},
        "annotations": changed,
    }})
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> NodeConfig {
        NodeConfig {
            name: "site-7-n1".to_owned(),
            labels: BTreeMap::from([("jiriaf.site".to_owned(), "mylin".to_owned())]),
            annotations: BTreeMap::new(),
            taints: Vec::new(),
            hostname: "n1".to_owned(),
            internal_ip: "10.0.0.1".to_owned(),
            capacity: Capacity {
                cpus: 2,
                memory_bytes: 8 << 30,
                pods: 10,
                ephemeral_storage_bytes: 1 << 30,
                gpus: BTreeMap::from([("nvidia.com/gpu".to_owned(), 4)]),
            },
            daemon_port: None,
            instance: "i".to_owned(),
            walltime: Some(Duration::from_secs(3600)),
            publish_walltime: true,
        }
    }

    #[test]
    fn a_node_has_the_labels_that_pods_select_and_no_os_label() {
        let labels = labels(&config(), Some(3500), true);
        assert_eq!(labels.get("kubernetes.io/role").map(String::as_str), Some("agent"));
        assert_eq!(labels.get(ALIVETIME).map(String::as_str), Some("3500"));
        assert_eq!(labels.get(WALLTIME).map(String::as_str), Some("3600"));
        assert!(!labels.contains_key("kubernetes.io/os"), "it would draw kube-proxy and other DaemonSets");
        let mut silent = config();
        silent.publish_walltime = false;
        let labels = super::labels(&silent, Some(3500), false);
        assert!(
            !labels.contains_key(ALIVETIME) && !labels.contains_key(WALLTIME) && !labels.contains_key(ROLE)
        );
    }

    #[test]
    fn capacity_is_written_as_readers_parse_it() {
        let all = config().capacity.quantities();
        assert_eq!(all["cpu"].0, "2");
        assert_eq!(all["memory"].0, "8388608Ki");
        assert_eq!(all["nvidia.com/gpu"].0, "4");
    }

    #[test]
    fn ready_is_the_last_condition() {
        let now = Timestamp::UNIX_EPOCH;
        let all = conditions(&Readiness::shutting_down(now), now);
        let kinds: Vec<&str> = all.iter().map(|c| c.type_.as_str()).collect();
        assert_eq!(kinds, ["MemoryPressure", "DiskPressure", "PIDPressure", "Ready"]);
        assert_eq!(all[3].status, "False");
    }

    #[test]
    fn a_deadline_that_is_gone_takes_its_labels_along() {
        let patch = metadata_patch(&config(), None, None);
        assert_eq!(patch["metadata"]["labels"][ALIVETIME], Value::Null);
        assert_eq!(patch["metadata"]["annotations"][DEADLINE], Value::Null);
    }
}
