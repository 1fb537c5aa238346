//! The Node object and the patches to it, made of values: no call is made here.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use k8s_openapi::api::core::v1::{
    ContainerImage, DaemonEndpoint, Node, NodeAddress, NodeCondition, NodeDaemonEndpoints, NodeSpec,
    NodeStatus, NodeSystemInfo, Taint,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::jiff::Timestamp;
use serde_json::{Map, Value, json};

use super::alivetime::{Timing, whole_seconds};
use super::labels::label_value;
use super::status::Health;

/// Annotation: which pilot made this Node. It outlives a crash of the pilot and differs for every run.
pub const INSTANCE: &str = "jiriaf.instance";
/// Annotation: when the batch system begins to kill (RFC 3339, UTC, whole seconds).
pub const DEADLINE: &str = "jiriaf.deadline";
/// Annotation: when the pods are ended (RFC 3339, UTC, whole seconds).
pub const DRAIN: &str = "jiriaf.drain";
/// Label: the whole seconds that a pod can count on.
pub const ALIVETIME: &str = "jiriaf.alivetime";
/// Label: the whole seconds that were granted.
pub const WALLTIME: &str = "jiriaf.walltime";
/// Label: the batch system's job.
pub const JOB_ID: &str = "jiriaf.jobid";
/// Label that kubectl shows as the role. NodeRestriction forbids it to a node's own credential.
pub const ROLE: &str = "kubernetes.io/role";
/// Label of virtual kubelets, and its value.
pub(super) const TYPE: (&str, &str) = ("type", "virtual-kubelet");

/// What the allocation grants, and so what the scheduler may give away.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Capacity {
    /// Number of CPUs.
    pub cpus: usize,
    /// Bytes of memory. Published in Ki, which JIRIAF's tools read (bare bytes they show as 0); the API server
    /// itself makes `1Gi` of a whole one, which they read too.
    pub memory_bytes: u64,
    /// What of the memory no pod gets.
    pub memory_reserved_bytes: u64,
    /// Number of pods.
    pub pods: u32,
    /// Bytes for the pods' directories and logs. Published in Ki.
    pub ephemeral_storage_bytes: u64,
    /// Extended resources by name, such as `nvidia.com/gpu`, and how many of each.
    pub gpus: BTreeMap<String, u32>,
}

impl Capacity {
    /// As a Node's status has it, for capacity and allocatable alike.
    #[must_use]
    pub fn quantities(&self) -> BTreeMap<String, Quantity> {
        let kibibytes = |bytes: u64| Quantity(format!("{}Ki", bytes / 1024));
        let mut all: BTreeMap<String, Quantity> =
            self.gpus.iter().map(|(name, count)| (name.clone(), Quantity(count.to_string()))).collect();
        all.insert("cpu".to_owned(), Quantity(self.cpus.to_string()));
        all.insert("memory".to_owned(), kibibytes(self.memory_bytes));
        all.insert("pods".to_owned(), Quantity(self.pods.to_string()));
        all.insert("ephemeral-storage".to_owned(), kibibytes(self.ephemeral_storage_bytes));
        all
    }

    /// What pods may have of it.
    #[must_use]
    pub fn allocatable(&self) -> BTreeMap<String, Quantity> {
        let memory_bytes = self.memory_bytes.saturating_sub(self.memory_reserved_bytes);
        Self { memory_bytes, ..self.clone() }.quantities()
    }
}

/// Everything that this pilot's Node says, but for what changes while it runs.
#[derive(Debug, Clone, PartialEq)]
pub struct NodeConfig {
    /// The Node's name: valid by [`super::labels::check_node_name`].
    pub name: String,
    /// Which pilot this is: kept over a crash of the pilot, different for every run of it.
    pub instance: String,
    /// Label `jiriaf.nodetype`, made valid here.
    pub node_type: String,
    /// Label `jiriaf.site`, made valid here.
    pub site: String,
    /// Label `jiriaf.batch`: `slurm`, `pbs` or `none`.
    pub batch: String,
    /// Label `jiriaf.jobid`, made valid here; no label without a job.
    pub job_id: Option<String>,
    /// Label `jiriaf.walltime` in whole seconds, where there is a deadline and [`Self::publish_walltime`]; `None`
    /// where the deadline was not known at the start: it is then what there is of it from [`Self::first_start`].
    pub walltime: Option<Duration>,
    /// When this pilot was first started.
    pub first_start: SystemTime,
    /// Whether `jiriaf.walltime` and `jiriaf.alivetime` are published at all (`--walltime 0`: they are not).
    pub publish_walltime: bool,
    /// Further labels of the user's, checked by [`super::labels::check_label`]. Ours win.
    pub labels: BTreeMap<String, String>,
    /// Further annotations of the user's, their keys checked by [`super::labels::check_key`]. Ours win.
    pub annotations: BTreeMap<String, String>,
    /// Taints that the Node is made with.
    pub taints: Vec<Taint>,
    /// Address of type Hostname; empty leaves it out.
    pub hostname: String,
    /// Address of type InternalIP.
    pub internal_ip: String,
    /// What the allocation grants.
    pub capacity: Capacity,
    /// Port of the kubelet's API; `None` as long as nobody listens. [`Health::endpoint`] stands before it.
    pub daemon_port: Option<u16>,
    /// Features that the Node declares, sorted.
    pub declared_features: Vec<String>,
    /// `status.nodeInfo`, see [`super::info::node_info`].
    pub info: NodeSystemInfo,
}

/// What changes while the pilot runs, as it is to be published now.
#[derive(Debug, Clone, Copy, Default)]
pub struct Moment<'a> {
    /// The end, as last learnt.
    pub timing: Option<&'a Timing>,
    /// The value of `jiriaf.alivetime` in seconds.
    pub alivetime: Option<u64>,
    /// Whether `kubernetes.io/role` is left out because the credential may not set it.
    pub without_role: bool,
    /// Whether the scheduler is to keep away.
    pub unschedulable: bool,
}

/// The whole Node, as it is registered.
#[must_use]
pub fn node(
    config: &NodeConfig,
    moment: &Moment<'_>,
    health: &Health,
    conditions: Vec<NodeCondition>,
) -> Node {
    let present =
        |map: BTreeMap<String, Option<String>>| map.into_iter().filter_map(|(k, v)| Some((k, v?))).collect();
    Node {
        metadata: ObjectMeta {
            name: Some(config.name.clone()),
            labels: Some(present(labels(config, moment))),
            annotations: Some(present(annotations(config, moment))),
            ..ObjectMeta::default()
        },
        spec: Some(NodeSpec {
            taints: (!config.taints.is_empty()).then(|| config.taints.clone()),
            unschedulable: moment.unschedulable.then_some(true),
            ..NodeSpec::default()
        }),
        status: Some(status(config, health, conditions)),
    }
}

/// The Node's labels; `None` where one must not be there.
fn labels(config: &NodeConfig, moment: &Moment<'_>) -> BTreeMap<String, Option<String>> {
    let mut labels: BTreeMap<String, Option<String>> =
        config.labels.iter().map(|(k, v)| (k.clone(), Some(v.clone()))).collect();
    let some = |text: &str| Some(label_value(text)).filter(|value| !value.is_empty());
    // As every kubelet has it by default: unique, so that a spread over hosts is one over Nodes.
    labels.insert("kubernetes.io/hostname".to_owned(), Some(config.name.clone()));
    labels.insert(TYPE.0.to_owned(), Some(TYPE.1.to_owned()));
    labels.insert("jiriaf.nodetype".to_owned(), some(&config.node_type));
    labels.insert("jiriaf.site".to_owned(), some(&config.site));
    labels.insert("jiriaf.batch".to_owned(), some(&config.batch));
    labels.insert(JOB_ID.to_owned(), config.job_id.as_deref().and_then(some));
    if !moment.without_role {
        labels.insert(ROLE.to_owned(), Some("agent".to_owned()));
    }
    labels.extend(countdown(config, moment));
    labels
}

/// The labels that change with the end.
fn countdown(config: &NodeConfig, moment: &Moment<'_>) -> BTreeMap<String, Option<String>> {
    let timing = moment.timing.filter(|_| config.publish_walltime);
    let learnt = |timing: &Timing| timing.deadline.duration_since(config.first_start).ok();
    let walltime = timing.and_then(|timing| config.walltime.or_else(|| learnt(timing)));
    let walltime = walltime.map(|walltime| walltime.as_secs().to_string());
    let alivetime = moment.alivetime.filter(|_| timing.is_some()).map(|seconds| seconds.to_string());
    [(WALLTIME.to_owned(), walltime), (ALIVETIME.to_owned(), alivetime)].into()
}

fn annotations(config: &NodeConfig, moment: &Moment<'_>) -> BTreeMap<String, Option<String>> {
    let mut all: BTreeMap<String, Option<String>> =
        config.annotations.iter().map(|(k, v)| (k.clone(), Some(v.clone()))).collect();
    all.extend(stamps(config, moment));
    all
}

/// The annotations of our own.
fn stamps(config: &NodeConfig, moment: &Moment<'_>) -> BTreeMap<String, Option<String>> {
    let stamp = |time: fn(&Timing) -> SystemTime| moment.timing.and_then(|timing| rfc3339(time(timing)));
    [
        (INSTANCE.to_owned(), Some(config.instance.clone())),
        (DEADLINE.to_owned(), stamp(|t| t.deadline)),
        (DRAIN.to_owned(), stamp(|t| t.drain)),
    ]
    .into()
}

/// RFC 3339 in UTC with whole seconds; `None` past the year 9999.
fn rfc3339(time: SystemTime) -> Option<String> {
    let seconds = i64::try_from(whole_seconds(time)).ok()?;
    Some(Timestamp::from_second(seconds).ok()?.to_string())
}

/// The whole status.
#[must_use]
pub fn status(config: &NodeConfig, health: &Health, conditions: Vec<NodeCondition>) -> NodeStatus {
    let cpus = health.cpus.unwrap_or(config.capacity.cpus);
    let capacity = Capacity { cpus, ..config.capacity.clone() };
    let (ip, hostname, port) = match &health.endpoint {
        // By default the API server dials the address of type Hostname first (`--kubelet-preferred-address-types`).
        Some(endpoint) => {
            let ip = endpoint.ip.as_ref().unwrap_or(&config.internal_ip);
            (ip, ip, endpoint.port)
        }
        None => (&config.internal_ip, &config.hostname, config.daemon_port),
    };
    let address =
        |kind: &str, address: &str| NodeAddress { type_: kind.to_owned(), address: address.to_owned() };
    let mut addresses = vec![address("InternalIP", ip), address("Hostname", hostname)];
    addresses.retain(|a| !a.address.is_empty());
    NodeStatus {
        capacity: Some(capacity.quantities()),
        allocatable: Some(capacity.allocatable()),
        addresses: Some(addresses),
        conditions: Some(conditions),
        daemon_endpoints: port.map(|port| NodeDaemonEndpoints {
            kubelet_endpoint: Some(DaemonEndpoint { port: i32::from(port) }),
        }),
        node_info: Some(config.info.clone()),
        images: None::<Vec<ContainerImage>>,
        declared_features: (!config.declared_features.is_empty()).then(|| config.declared_features.clone()),
        ..NodeStatus::default()
    }
}

/// Which Node, and which version of it, a patch is meant for: the API server refuses it for any other.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize)]
pub struct Expected {
    /// The Node's uid.
    pub uid: String,
    /// The resource version that was seen last; `None` where any will do.
    #[serde(rename = "resourceVersion", skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
}

/// The patch by which the upkeep moves labels and annotations (JSON merge patch) and, with `status`, the status
/// with them (strategic merge patch to `/status`, which takes metadata too:
/// `pkg/registry/core/node/strategy.go`).
#[must_use]
pub fn upkeep_patch(
    config: &NodeConfig,
    expected: &Expected,
    moment: &Moment<'_>,
    status: Option<&NodeStatus>,
) -> Value {
    let mut patch = json!({"metadata": expected});
    patch["metadata"]["labels"] = json!(countdown(config, moment));
    patch["metadata"]["annotations"] = json!(stamps(config, moment));
    if let Some(status) = status {
        patch["status"] = json!(status);
        undial(&mut patch, status);
    }
    patch
}

/// A strategic merge patch leaves alone what it does not name: a port that leads nowhere any more is taken out.
fn undial(patch: &mut Value, status: &NodeStatus) {
    if status.daemon_endpoints.is_none() {
        patch["status"]["daemonEndpoints"] = Value::Null;
    }
}

/// The status alone (strategic merge patch to `/status`). Resources that `existing` has and this pilot has not
/// (another's GPUs) are taken out.
#[must_use]
pub fn status_patch(uid: &str, existing: Option<&Node>, status: &NodeStatus) -> Value {
    let mut patch = json!({"metadata": {"uid": uid}, "status": status});
    let old = existing.and_then(|node| node.status.as_ref());
    for (field, had) in [
        ("capacity", old.and_then(|s| s.capacity.as_ref())),
        ("allocatable", old.and_then(|s| s.allocatable.as_ref())),
    ] {
        let Some(new) = patch["status"][field].as_object_mut() else { continue };
        add_nulls(new, had.into_iter().flat_map(BTreeMap::keys));
    }
    undial(&mut patch, status);
    patch
}

/// The patch (JSON merge patch) that makes an existing Node ours. With `anew` it was a dead pilot's: then its
/// labels, taints and cordon go too; otherwise it was ours before a crash, and what others did to it stays.
/// The resource version in it lets only one pilot of several adopt a Node.
#[must_use]
pub fn adoption_patch(config: &NodeConfig, moment: &Moment<'_>, existing: &Node, anew: bool) -> Value {
    let mut labels = object(json!(labels(config, moment)));
    let mut spec = Map::new();
    if anew {
        // Labels of Kubernetes' own names are others': topology, roles given by an administrator.
        let old = existing.metadata.labels.iter().flatten().map(|(key, _)| key);
        add_nulls(&mut labels, old.filter(|key| !key.contains("kubernetes.io/")));
        spec.insert("unschedulable".to_owned(), Value::Null);
        let old = existing.spec.as_ref().and_then(|s| s.taints.clone()).unwrap_or_default();
        let taints = adopted_taints(config, &old);
        if taints != old {
            spec.insert("taints".to_owned(), json!(taints));
        }
    }
    json!({
        "metadata": {
            "uid": existing.metadata.uid,
            "resourceVersion": existing.metadata.resource_version,
            "labels": labels,
            "annotations": annotations(config, moment),
        },
        "spec": spec,
    })
}

/// The taints of an adopted Node: ours, and those that controllers keep (`node.kubernetes.io/not-ready`).
fn adopted_taints(config: &NodeConfig, old: &[Taint]) -> Vec<Taint> {
    let kept = old.iter().filter(|taint| taint.key.starts_with("node.kubernetes.io/"));
    let mut taints: Vec<Taint> = config.taints.clone();
    taints.extend(
        kept.filter(|k| !config.taints.iter().any(|t| t.key == k.key && t.effect == k.effect)).cloned(),
    );
    taints
}

fn add_nulls<'a>(map: &mut Map<String, Value>, keys: impl Iterator<Item = &'a String>) {
    for key in keys {
        map.entry(key.clone()).or_insert(Value::Null);
    }
}

fn object(value: Value) -> Map<String, Value> {
    if let Value::Object(map) = value { map } else { Map::new() }
}

#[cfg(test)]
pub(super) mod tests;
