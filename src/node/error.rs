//! What can go wrong between this pilot and its Node.

use std::time::Duration;

use thiserror::Error;

use super::api::{CallError, Kind};

/// Why the Node could not be registered, changed or removed.
#[derive(Debug, Error)]
pub enum NodeError {
    /// Another pilot that lives has a Node of this name.
    #[error(
        "node name {name} is held by another pilot that is alive (job {job}, instance {instance}, its Lease was \
         renewed {} s ago); give this one a name of its own with --node-name (NODENAME), or end that job",
        .renewed_ago.as_secs()
    )]
    HeldByPilot {
        /// The name.
        name: String,
        /// The other pilot's job, `?` where it has none.
        job: String,
        /// The other pilot's instance.
        instance: String,
        /// Since the other pilot renewed its Lease, by this host's clock; whole seconds.
        renewed_ago: Duration,
    },
    /// A Node of this name exists that no pilot made.
    #[error(
        "node {name} exists and was not made by jiriaf-pilot (its kubelet says {kubelet_version:?}), so it is not \
         touched; give the pilot another name with --node-name (NODENAME), or `kubectl delete node {name}` if \
         nothing runs behind it"
    )]
    NotAPilots {
        /// The name.
        name: String,
        /// `status.nodeInfo.kubeletVersion` of the Node that is there.
        kubelet_version: String,
    },
    /// The credential is not accepted, or lacks a right.
    #[error("the API server refuses {what} for node {name}: {source}")]
    Refused {
        /// The Node.
        name: String,
        /// What was tried.
        what: &'static str,
        /// What the API server said.
        #[source]
        source: CallError,
    },
    /// The API server does not accept what was sent.
    #[error(
        "the API server does not accept {what} for node {name}: {source}; check --label, --taint and --annotation"
    )]
    Rejected {
        /// The Node.
        name: String,
        /// What was tried.
        what: &'static str,
        /// What the API server said.
        #[source]
        source: CallError,
    },
    /// The API server did not do what was asked within the time given.
    #[error(
        "node {name}: {what} did not succeed within {waited:.1?}: {source}; is the API server reachable from this host?"
    )]
    OutOfTime {
        /// The Node.
        name: String,
        /// What was tried.
        what: &'static str,
        /// For how long it was tried.
        waited: Duration,
        /// How the last try failed.
        #[source]
        source: CallError,
    },
    /// The Node is no more, or no longer this pilot's. The upkeep registers it again or gives it up.
    #[error("node {name} was deleted or is not this pilot's any more; it is looked at again")]
    Gone {
        /// The Node.
        name: String,
    },
}

impl NodeError {
    /// Whether the credential is not accepted, or lacks a right.
    #[must_use]
    pub fn is_forbidden(&self) -> bool {
        matches!(self, Self::Refused { .. })
    }

    /// What a call that failed for good means to the one who asked for it; `waited` is for how long it was tried.
    pub(super) fn of_call(name: &str, what: &'static str, waited: Duration, source: CallError) -> Self {
        let name = name.to_owned();
        match source.kind() {
            Kind::Forbidden | Kind::Unauthorized => Self::Refused { name, what, source },
            Kind::Invalid => Self::Rejected { name, what, source },
            Kind::Passing | Kind::NotFound | Kind::Exists | Kind::Conflict => {
                Self::OutOfTime { name, what, waited, source }
            }
        }
    }
}
