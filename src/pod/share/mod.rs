//! What of the allocation a pod has to itself: CPUs and GPUs. Pure: the manager asks the [`Ledger`] as it admits one pod after
//! another, and the pod's record keeps the answer.
//!
//! Sources: `pkg/kubelet/cm/cpumanager` (policy_static.go: who gets CPUs of his own; cpu_assignment.go: which),
//! `pkg/kubelet/cm/devicemanager`.

mod cpus;
mod ledger;
mod placement;
#[cfg(test)]
mod tests;
mod variables;
mod wish;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

pub use ledger::{Ledger, Shortage};
pub use placement::Placement;
pub use variables::variables;
pub use wish::{Qos, is_gpu, qos};

/// NVIDIA's GPUs, as its device plugin calls them.
pub const NVIDIA: &str = "nvidia.com/gpu";
/// AMD's.
pub const AMD: &str = "amd.com/gpu";
/// Intel's.
pub const INTEL: &str = "gpu.intel.com/i915";

/// A CPU (a hardware thread), and with which others it belongs together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Processor {
    /// Its number, as the kernel counts.
    pub number: usize,
    /// Its core: equal for the threads of one, and for no others.
    pub core: usize,
    /// Its NUMA node.
    pub node: usize,
}

/// What there is to hand out.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Grant {
    /// The CPUs of the job on this host.
    pub processors: Vec<Processor>,
    /// GPUs by the resource that counts them. Nothing may be read into their names.
    pub devices: BTreeMap<String, Vec<String>>,
}

/// What a pod has, by its containers' names.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Share {
    /// Its containers that have anything; the others run in the pool and see no GPU.
    pub containers: BTreeMap<String, ContainerShare>,
}

/// What a container has.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerShare {
    /// CPUs of its own, in order; none: it runs in the pool.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub cpus: Vec<usize>,
    /// Of how many CPUs of the pool it may use the time: its limit, rounded up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub most: Option<usize>,
    /// How many it asks for, rounded up, where it neither has its own nor a limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub asked: Option<usize>,
    /// Whether it is an init container, which is gone when those come that stay.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub passes: bool,
    /// Its GPUs by their resource.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub devices: BTreeMap<String, Vec<String>>,
}
