//! The environment of a container: the pilot's own, less what is secret or would mislead, then the Pod's.

mod container;
mod env_files;
mod fields;
mod missing;
mod references;
mod services;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

pub use container::{Additions, ContainerEnv, EnvInput, Skipped, container_env};
pub use env_files::EnvFiles;
pub use fields::{field_value, resource_value};
pub use missing::{Missing, missing};
pub use references::{References, TokenRef, references, volume_references};
pub use services::{Service, ServicePort, service_variables};

/// Names and values, each name once, in name order.
pub type Vars = Vec<(String, String)>;

/// What was read for a pod by its [`References`]. What is missing here was not found (or, for a token, was
/// denied).
#[derive(Clone, Default)]
pub struct Objects {
    /// ConfigMaps by name.
    pub config_maps: BTreeMap<String, Arc<ConfigMap>>,
    /// Secrets by name.
    pub secrets: BTreeMap<String, Arc<Secret>>,
    /// Service account tokens. One that is absent is left out of its volume.
    pub tokens: BTreeMap<TokenRef, String>,
}

impl std::fmt::Debug for Objects {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // What is in them is secret: their names alone are shown.
        f.debug_struct("Objects")
            .field("config_maps", &self.config_maps.keys())
            .field("secrets", &self.secrets.keys())
            .field("tokens", &self.tokens.keys())
            .finish()
    }
}

/// What the downward API tells of the node.
#[derive(Debug, Clone, Default)]
pub struct Facts {
    /// The node's name.
    pub node_name: String,
    /// The pod's addresses, the first one first. Ours are the node's.
    pub pod_ips: Vec<String>,
    /// The node's addresses.
    pub host_ips: Vec<String>,
    /// The node's allocatable resources: what a missing limit means.
    pub allocatable: BTreeMap<String, Quantity>,
}

/// Why a container's environment or command line cannot be made. The container waits with reason
/// [`ConfigError::REASON`]; the texts are those of kubelet's `makeEnvironmentVariables`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// A ConfigMap that is not optional does not exist.
    #[error("configmap {0:?} not found")]
    ConfigMapNotFound(String),
    /// A Secret that is not optional does not exist.
    #[error("secret {0:?} not found")]
    SecretNotFound(String),
    /// An object has no such key.
    #[error("couldn't find key {key} in {kind} {namespace}/{name}")]
    KeyNotFound {
        /// `ConfigMap` or `Secret`.
        kind: &'static str,
        /// Its namespace.
        namespace: String,
        /// Its name.
        name: String,
        /// The key that was wanted.
        key: String,
    },
    /// A fieldRef to what the downward API does not know.
    #[error("unsupported fieldPath: {0}")]
    Field(String),
    /// A resourceFieldRef to what the downward API does not know.
    #[error("unsupported container resource : {0}")]
    Resource(String),
    /// A resourceFieldRef names a container that the pod does not have.
    #[error("container {0} not found")]
    ContainerNotFound(String),
    /// A quantity that cannot be read.
    #[error(transparent)]
    Quantity(#[from] super::quantity::QuantityError),
    /// `valueFrom` of a kind that is not supported.
    #[error(
        "variable {0}: this valueFrom is not supported: wanted configMapKeyRef, secretKeyRef, fieldRef, resourceFieldRef or fileKeyRef"
    )]
    Source(String),
    /// The file of a fileKeyRef cannot be read, or is none of this form; whether the key is optional or not.
    #[error("couldn't parse env file: {0}")]
    EnvFile(String),
    /// The file of a fileKeyRef has no such key, or nothing for it.
    #[error("environment variable key {key:?} not found in file {file:?}")]
    EnvFileKey {
        /// The key that was wanted.
        key: String,
        /// Volume and path.
        file: String,
    },
    /// A variable (by its name) or a list (`command`, `args`) that no process can be given.
    #[error("{0} holds a NUL byte, which no process can be given: put such data in a file")]
    Nul(String),
    /// A value that grew out of bounds.
    #[error("{what}: {source}")]
    TooLong {
        /// The variable or the list (`command`, `args`).
        what: String,
        /// What happened.
        source: super::expansion::TooLong,
    },
}

impl ConfigError {
    /// The reason of a container that waits because of this (kubelet's `ErrCreateContainerConfig`).
    pub const REASON: &'static str = "CreateContainerConfigError";
}

/// Names that are dropped from the pilot's environment: the pilot's own settings and credentials.
const DROPPED: [&str; 4] = ["KUBECONFIG", "SLURM_JWT", "SSH_AUTH_SOCK", "PBS_JOBCOOKIE"];
/// Beginnings of names that are dropped: settings of the pilot, of its predecessors, and of the process
/// manager and step that the pilot itself is (an `srun` or `mpirun` in a pod would take them for its own).
const DROPPED_PREFIXES: [&str; 8] =
    ["JIRIAF_", "APISERVER_", "KUBELET_", "VKUBELET_", "PMI_", "PMIX_", "SLURM_CPU_BIND", "SLURM_MEM_PER_"];
/// Ends of names that are dropped: secrets by their name.
const DROPPED_SUFFIXES: [&str; 4] = ["_TOKEN", "_SECRET", "_SECRET_KEY", "_PASSWORD"];

/// What a container gets of the pilot's environment: all but what is secret or would mislead, and that too
/// where `pass` (`--pass-env`) names it. HOME stays. In name order; of a name that comes twice the last.
#[must_use]
pub fn inherited(pilot: impl IntoIterator<Item = (String, String)>, pass: &[String]) -> Vars {
    let kept: BTreeMap<String, String> =
        pilot.into_iter().filter(|(name, _)| pass.contains(name) || !is_dropped(name)).collect();
    kept.into_iter().collect()
}

fn is_dropped(name: &str) -> bool {
    DROPPED.contains(&name)
        || DROPPED_PREFIXES.iter().any(|prefix| name.starts_with(prefix))
        || DROPPED_SUFFIXES.iter().any(|suffix| name.ends_with(suffix))
}
