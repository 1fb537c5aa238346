//! Whether a pod may run here: kubelet's own checks, with its reasons and texts.
//!
//! Sources: `pkg/kubelet/lifecycle/predicate.go`, `AdmissionCheck` in `pkg/scheduler/eventhandlers.go` (the
//! order: resources, affinity, node name, host ports, taints), `component-helpers` nodeaffinity.

mod affinity;
mod isolation;
mod load;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use k8s_openapi::api::core::v1::{Container, Pod, PodSpec, Taint, Toleration};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

pub use load::Load;

use super::containers;
use super::isolation::{Choice, Isolation};
use super::pressure::eviction;
use super::quantity::{self, Amount};
use super::security;
use super::share::is_gpu;
use super::status::{NODE_SHUTDOWN, NODE_SHUTDOWN_REJECTED};

/// The reason of a pod that wants more time than its node has.
const OUT_OF_WALLTIME: &str = "OutOfWalltime";

/// What admission knows of the node.
#[derive(Debug, Clone, Default)]
pub struct NodeFacts {
    /// Its name.
    pub name: String,
    /// Its labels as they are published now.
    pub labels: BTreeMap<String, String>,
    /// Its taints.
    pub taints: Vec<Taint>,
    /// What it has to give.
    pub allocatable: BTreeMap<String, Quantity>,
    /// Whose pods it takes (`--namespaces`); none: everybody's.
    pub namespaces: Option<BTreeSet<String>>,
    /// Whether it takes none any more because the allocation ends.
    pub shutting_down: bool,
    /// Which pods have namespaces of their own.
    pub isolation: Isolation,
    /// Whether its memory runs short.
    pub memory_pressure: bool,
    /// How long until the drain, as it is known now and not as a label has it, which may lag; none where no end is known.
    pub time_left: Option<Duration>,
}

/// Why a pod is rejected. The status puts `Pod was rejected: ` before the message.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{reason}: {message}")]
pub struct Rejection {
    /// In one word, as in the Pod's `status.reason`.
    pub reason: String,
    /// In a sentence.
    pub message: String,
}

fn rejected(reason: &str, message: impl Into<String>) -> Result<(), Rejection> {
    Err(Rejection { reason: reason.to_owned(), message: message.into() })
}

fn predicate(name: &str, text: &str) -> Result<(), Rejection> {
    rejected(name, format!("Predicate {name} failed: {text}"))
}

/// Whether `pod` may run on `node` beside what runs there already.
///
/// # Errors
/// The first reason against it.
pub fn admit(pod: &Pod, node: &NodeFacts, running: &Load) -> Result<(), Rejection> {
    let Some(spec) = &pod.spec else {
        return rejected("UnsupportedPodSpec", "the Pod has no spec");
    };
    if node.shutting_down {
        return rejected(NODE_SHUTDOWN, NODE_SHUTDOWN_REJECTED);
    }
    if node.memory_pressure && !eviction::takes(pod) {
        return rejected("Evicted", "The node had condition: [MemoryPressure]. ");
    }
    namespace(pod, node)?;
    supported(spec, node.isolation.choose(pod.metadata.annotations.as_ref()) == Choice::Isolated)?;
    isolation::check(pod, spec, &node.isolation)?;
    resources(spec, node, running)?;
    walltime(spec, node)?;
    if !affinity::matches(spec, node) {
        return predicate("NodeAffinity", "node(s) didn't match Pod's node affinity/selector");
    }
    if spec.node_name.as_ref().is_some_and(|name| !name.is_empty() && *name != node.name) {
        return predicate("NodeName", "node(s) didn't match the requested node name");
    }
    if running.has_port_of(spec) {
        return predicate("NodePorts", "node(s) didn't have free ports for the requested pod ports");
    }
    // A kubelet looks at NoExecute taints alone; the others are the scheduler's.
    let untolerated = node
        .taints
        .iter()
        .filter(|taint| taint.effect == "NoExecute")
        .any(|taint| !spec.tolerations.iter().flatten().any(|toleration| tolerates(toleration, taint)));
    if untolerated {
        return predicate("TaintToleration", "node(s) had taints that the pod didn't tolerate");
    }
    Ok(())
}

fn namespace(pod: &Pod, node: &NodeFacts) -> Result<(), Rejection> {
    let Some(allowed) = &node.namespaces else { return Ok(()) };
    let own = pod.metadata.namespace.as_deref().unwrap_or("default");
    if allowed.contains(own) {
        return Ok(());
    }
    let allowed: Vec<&str> = allowed.iter().map(String::as_str).collect();
    rejected(
        "NamespaceNotAllowed",
        format!(
            "namespace {own:?} is none of those whose pods this pilot takes ({}): start the pilot with --namespaces={own}, or run the pod in one of them",
            allowed.join(", ")
        ),
    )
}

/// What a process node cannot do at all is refused by name rather than left out silently.
fn supported(spec: &PodSpec, isolated: bool) -> Result<(), Rejection> {
    if let Some(os) = &spec.os
        && os.name != "linux"
    {
        return rejected("PodOSNotSupported", "Failed to admit pod as the OS field doesn't match node OS");
    }
    let restarts_all = |container: &Container| {
        let rules = container.restart_policy_rules.iter().flatten();
        rules.into_iter().any(|rule| rule.action == "RestartAllContainers")
    };
    let field = if containers::all(spec).any(|(_, container)| restarts_all(&container)) {
        "restartPolicyRules[].action RestartAllContainers"
    } else if spec.resource_claims.as_ref().is_some_and(|claims| !claims.is_empty()) {
        "spec.resourceClaims"
    } else if containers::all(spec)
        .any(|(_, container)| container.volume_devices.as_ref().is_some_and(|devices| !devices.is_empty()))
    {
        "spec.containers[].volumeDevices"
    } else {
        return security::check(spec, security::Us::now(), isolated)
            .or_else(|unsupported| rejected("UnsupportedPodSpec", unsupported.to_string()));
    };
    rejected(
        "UnsupportedPodSpec",
        format!("{field} is not supported by jiriaf-pilot: leave it out, or run the pod on another node"),
    )
}

/// Whether what is left of each resource is enough (noderesources `fitsRequest`).
fn resources(spec: &PodSpec, node: &NodeFacts, running: &Load) -> Result<(), Rejection> {
    let unreadable = |error: quantity::QuantityError| Rejection {
        reason: "UnexpectedAdmissionError".to_owned(),
        message: error.to_string(),
    };
    let allocatable = |resource: &str| -> Result<Option<Amount>, Rejection> {
        node.allocatable
            .get(resource)
            .map(|quantity| quantity::parse(&quantity.0))
            .transpose()
            .map_err(unreadable)
    };
    if let Some(most) = allocatable("pods")? {
        let used = i64::try_from(running.pods()).unwrap_or(i64::MAX);
        if used >= most.units() {
            return insufficient("pods", 1, used, most.units());
        }
    }
    let requests = load::requests(spec).map_err(unreadable)?;
    // CPU, memory and ephemeral storage first, as kubelet names them first.
    let first = ["cpu", "memory", "ephemeral-storage"];
    let others = requests.keys().map(String::as_str).filter(|resource| !first.contains(resource));
    for resource in first.into_iter().chain(others) {
        let Some(requested) = requests.get(resource).filter(|requested| !requested.is_zero()) else {
            continue;
        };
        let capacity = match allocatable(resource)? {
            Some(capacity) => capacity,
            // Extended resources that the node does not have are not the node's to check: but a pod that wants a GPU is not to
            // run without one.
            None if is_extended(resource) && !is_gpu(resource) => continue,
            None => Amount::ZERO,
        };
        let used = running.used(resource);
        if used.plus(*requested) > capacity {
            let number = |amount: Amount| if resource == "cpu" { amount.millis() } else { amount.units() };
            return insufficient(resource, number(*requested), number(used), number(capacity));
        }
    }
    Ok(())
}

/// Whether the pod's own limit ends it before the drain does. A kubelet knows of no end of its node, so the reason is ours,
/// formed as its `OutOf…` are (pkg/kubelet/lifecycle/predicate.go).
fn walltime(spec: &PodSpec, node: &NodeFacts) -> Result<(), Rejection> {
    let (Some(wanted), Some(left)) = (spec.active_deadline_seconds, node.time_left) else { return Ok(()) };
    // The API server takes none below 1 (ValidatePodSpec).
    if Duration::from_secs(u64::try_from(wanted).unwrap_or(0)) <= left {
        return Ok(());
    }
    rejected(
        OUT_OF_WALLTIME,
        format!(
            "Node didn't have enough time: activeDeadlineSeconds: {wanted}, left until its pods are ended: {} s; set a smaller \
             activeDeadlineSeconds, or require nodes that live longer (node affinity: jiriaf.alivetime Gt {})",
            left.as_secs(),
            wanted - 1
        ),
    )
}

fn insufficient(resource: &str, requested: i64, used: i64, capacity: i64) -> Result<(), Rejection> {
    rejected(
        &format!("OutOf{resource}"),
        format!(
            "Node didn't have enough resource: {resource}, requested: {requested}, used: {used}, capacity: {capacity}"
        ),
    )
}

/// Whether it is an extended resource: named with a domain that is not Kubernetes' own (`IsExtendedResourceName`).
fn is_extended(resource: &str) -> bool {
    resource
        .split_once('/')
        .is_some_and(|(domain, _)| domain != "kubernetes.io" && !domain.ends_with(".kubernetes.io"))
        && !resource.starts_with("requests.")
}

/// Whether a toleration tolerates a taint (`Toleration.ToleratesTaint`). Its seconds do not matter here.
fn tolerates(toleration: &Toleration, taint: &Taint) -> bool {
    let set = |text: &Option<String>| text.clone().unwrap_or_default();
    let effect = set(&toleration.effect);
    if !effect.is_empty() && effect != taint.effect {
        return false;
    }
    let key = set(&toleration.key);
    if !key.is_empty() && key != taint.key {
        return false;
    }
    let (own, taints) = (set(&toleration.value), set(&taint.value));
    match set(&toleration.operator).as_str() {
        "" | "Equal" => own == taints,
        "Exists" => true,
        // Beta since 1.36 (TaintTolerationComparisonOperators): numbers are compared.
        operator @ ("Lt" | "Gt") => match (own.parse::<i64>(), taints.parse::<i64>()) {
            (Ok(own), Ok(taints)) => {
                if operator == "Lt" {
                    taints < own
                } else {
                    taints > own
                }
            }
            _ => false,
        },
        _ => false,
    }
}
