//! What a pod's containers ask for.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Container, Pod, ResourceRequirements};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

use super::{AMD, INTEL, NVIDIA};
use crate::pod::containers::{self, Kind};
use crate::pod::quantity::{self, Amount};

/// How a pod stands when something runs short (component-helpers' qos.go, `ComputePodQOS`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Qos {
    /// It asks for nothing.
    BestEffort,
    /// It asks for something.
    Burstable,
    /// Each container has limits of CPU and memory, and asks for just these.
    Guaranteed,
}

/// What one container asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Wish {
    pub(super) container: String,
    pub(super) kind: Kind,
    /// CPUs of its own.
    pub(super) own: usize,
    /// How many CPUs' time it may use.
    pub(super) most: Option<usize>,
    /// How many it asks for.
    pub(super) asked: Option<usize>,
    /// GPUs by their resource.
    pub(super) devices: BTreeMap<String, usize>,
}

/// Whether the resource counts GPUs.
#[must_use]
pub fn is_gpu(resource: &str) -> bool {
    [NVIDIA, AMD, INTEL].contains(&resource)
}

/// The class of a pod. Ephemeral containers have no resources and do not count.
#[must_use]
pub fn qos(pod: &Pod) -> Qos {
    let Some(spec) = &pod.spec else { return Qos::BestEffort };
    let containers: Vec<_> = containers::all(spec).filter(|(kind, _)| *kind != Kind::Ephemeral).collect();
    let own = containers.iter().map(|(_, container)| container.resources.as_ref());
    // A pod's own resources go before those of its containers.
    let all: Vec<Option<&ResourceRequirements>> = match &spec.resources {
        Some(pods) if pods.requests.is_some() || pods.limits.is_some() => vec![Some(pods)],
        _ => own.collect(),
    };
    let amount = |of: Option<&BTreeMap<String, Quantity>>, name: &str| {
        let found = of.and_then(|of| of.get(name)).and_then(|quantity| quantity::parse(&quantity.0).ok());
        found.unwrap_or(Amount::ZERO)
    };
    let (mut asks, mut guaranteed) = (false, !all.is_empty());
    for resources in all {
        for name in ["cpu", "memory"] {
            let limit = amount(resources.and_then(|r| r.limits.as_ref()), name);
            let request = request(resources, name);
            asks |= !limit.is_zero() || !request.is_zero();
            guaranteed &= !limit.is_zero() && limit == request;
        }
    }
    match (asks, guaranteed) {
        (_, true) => Qos::Guaranteed,
        (true, false) => Qos::Burstable,
        (false, false) => Qos::BestEffort,
    }
}

/// What is asked for; a limit without a request is one (core/v1 defaults.go).
pub(super) fn request(resources: Option<&ResourceRequirements>, name: &str) -> Amount {
    let of = |map: Option<&BTreeMap<String, Quantity>>| {
        map.and_then(|map| map.get(name)).and_then(|quantity| quantity::parse(&quantity.0).ok())
    };
    resources.and_then(|r| of(r.requests.as_ref()).or_else(|| of(r.limits.as_ref()))).unwrap_or(Amount::ZERO)
}

/// What the containers ask for, in the order in which they start.
pub(super) fn wishes(pod: &Pod) -> Vec<Wish> {
    let guaranteed = qos(pod) == Qos::Guaranteed;
    let Some(spec) = &pod.spec else { return Vec::new() };
    let all = containers::all(spec).filter(|(kind, _)| *kind != Kind::Ephemeral);
    all.map(|(kind, container)| wish(kind, &container, guaranteed)).collect()
}

fn wish(kind: Kind, container: &Container, guaranteed: bool) -> Wish {
    let resources = container.resources.as_ref();
    let asked = request(resources, "cpu");
    let whole = asked.millis() % 1000 == 0;
    let limit = resources.and_then(|r| r.limits.as_ref()?.get("cpu"));
    let limit = limit.and_then(|quantity| quantity::parse(&quantity.0).ok()).filter(|limit| !limit.is_zero());
    let names = resources.into_iter().flat_map(|r| r.requests.iter().chain(&r.limits).flatten());
    let devices = names
        .filter(|(name, _)| is_gpu(name))
        .map(|(name, _)| (name.clone(), count(request(resources, name))))
        .filter(|(_, count)| *count > 0);
    Wish {
        container: container.name.clone(),
        kind,
        // policy_static.go, guaranteedCPUs: whole CPUs in a Guaranteed pod.
        own: if guaranteed && whole { count(asked) } else { 0 },
        most: limit.map(|limit| count(limit).max(1)),
        asked: Some(count(asked)).filter(|asked| *asked > 0),
        devices: devices.collect(),
    }
}

/// In whole units, rounded up.
fn count(amount: Amount) -> usize {
    usize::try_from(amount.units()).unwrap_or(0)
}
