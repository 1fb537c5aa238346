//! What the pods of a node take of it.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::core::v1::{Pod, PodSpec, ResourceRequirements};

use crate::pod::containers::{self, Kind};
use crate::pod::quantity::{self, Amount, QuantityError};

/// The resources that a pod takes, by their names.
pub type Requests = BTreeMap<String, Amount>;

/// What the admitted pods that are not over take together.
#[derive(Debug, Clone, Default)]
pub struct Load {
    pods: usize,
    requests: Requests,
    ports: BTreeSet<HostPort>,
}

/// Protocol, address and number of a port on the host.
type HostPort = (String, String, i32);

impl Load {
    /// What these pods take. What of them cannot be read counts as nothing: it was refused before.
    pub fn of<'a>(pods: impl IntoIterator<Item = &'a Pod>) -> Self {
        let mut load = Self::default();
        for pod in pods {
            load.add(pod);
        }
        load
    }

    /// Adds a pod.
    pub fn add(&mut self, pod: &Pod) {
        self.pods += 1;
        let Some(spec) = &pod.spec else { return };
        for (resource, amount) in requests(spec).unwrap_or_default() {
            let sum = self.requests.entry(resource).or_default();
            *sum = sum.plus(amount);
        }
        self.ports.extend(ports(spec));
    }

    /// How many pods there are.
    #[must_use]
    pub fn pods(&self) -> usize {
        self.pods
    }

    /// How much of a resource they take.
    #[must_use]
    pub fn used(&self, resource: &str) -> Amount {
        self.requests.get(resource).copied().unwrap_or_default()
    }

    /// Whether one of them has a host port that `spec` wants (nodeports: `HostPortInfo.CheckConflict`).
    pub(super) fn has_port_of(&self, spec: &PodSpec) -> bool {
        ports(spec).any(|(protocol, ip, port)| {
            self.ports.iter().any(|(their_protocol, their_ip, their_port)| {
                *their_protocol == protocol
                    && *their_port == port
                    && (*their_ip == ip || ip == ANY || their_ip == ANY)
            })
        })
    }
}

/// All addresses of the host.
const ANY: &str = "0.0.0.0";

/// Those of containers that are there for all of the pod's life (the scheduler's `util.GetHostPorts`).
fn ports(spec: &PodSpec) -> impl Iterator<Item = HostPort> {
    let lasting = containers::all(spec).filter(|(kind, _)| matches!(kind, Kind::Sidecar | Kind::Main));
    lasting.flat_map(|(_, container)| container.into_owned().ports.unwrap_or_default()).filter_map(|port| {
        let number = port.host_port.filter(|number| *number > 0)?;
        let protocol = port.protocol.unwrap_or_else(|| "TCP".to_owned());
        let ip = port.host_ip.filter(|ip| !ip.is_empty()).unwrap_or_else(|| ANY.to_owned());
        Some((protocol, ip, number))
    })
}

/// What a pod requests (component-helpers `PodRequests`): the sum over its containers and sidecars, or the most that one
/// init container wants beside the sidecars that have started before it, where that is more; its own `resources` go before;
/// `overhead` comes on top. A limit without a request is a request.
///
/// # Errors
/// When a quantity cannot be read.
pub fn requests(spec: &PodSpec) -> Result<Requests, QuantityError> {
    let (mut sum, mut most) = (Requests::new(), Requests::new());
    for (kind, container) in containers::all(spec) {
        for (resource, amount) in of(container.resources.as_ref())? {
            match kind {
                Kind::Init => {
                    let beside = sum.get(&resource).copied().unwrap_or_default().plus(amount);
                    let most = most.entry(resource).or_default();
                    *most = beside.max(*most);
                }
                Kind::Sidecar | Kind::Main => {
                    let total = sum.entry(resource).or_default();
                    *total = total.plus(amount);
                }
                // They take what is left over (core/v1 validation: no resources).
                Kind::Ephemeral => {}
            }
        }
    }
    for (resource, amount) in most {
        let total = sum.entry(resource).or_default();
        *total = amount.max(*total);
    }
    sum.extend(of(spec.resources.as_ref())?);
    for (resource, quantity) in spec.overhead.iter().flatten() {
        let total = sum.entry(resource.clone()).or_default();
        *total = total.plus(quantity::parse(&quantity.0)?);
    }
    Ok(sum)
}

fn of(resources: Option<&ResourceRequirements>) -> Result<Requests, QuantityError> {
    let mut all = Requests::new();
    let Some(resources) = resources else { return Ok(all) };
    for (resource, quantity) in resources.limits.iter().chain(&resources.requests).flatten() {
        all.insert(resource.clone(), quantity::parse(&quantity.0)?);
    }
    Ok(all)
}
