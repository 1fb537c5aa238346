//! The Node's Lease: the sign of life that the node controller watches.
//!
//! 40 s, renewed every 10 s (kubelet config, nodeLeaseDurationSeconds; kubelet renews at a quarter of it). The last copy
//! is written back without reading first; a conflict is read again. A Lease whose owner is a Node that is gone is
//! collected at once, so it is made anew when the Node's uid changes.

use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta, OwnerReference};
use kube::api::{DeleteParams, PostParams};

/// How long a Lease holds.
pub const DURATION: Duration = Duration::from_secs(40);

/// Between renewals.
pub const RENEW: Duration = Duration::from_secs(10);

/// The namespace of Nodes' Leases.
pub const NAMESPACE: &str = "kube-node-lease";

/// Renews one Node's Lease.
pub struct LeaseKeeper {
    api: kube::Api<Lease>,
    node: String,
    last: Option<Lease>,
}

impl LeaseKeeper {
    /// The Lease of `node`.
    #[must_use]
    pub fn new(client: kube::Client, node: &str) -> Self {
        Self { api: kube::Api::namespaced(client, NAMESPACE), node: node.to_owned(), last: None }
    }

    /// Renews the Lease, or makes it.
    ///
    /// # Errors
    /// When the API server does not answer or refuses.
    pub async fn renew(&mut self, node_uid: &str) -> Result<(), kube::Error> {
        if self.last.as_ref().is_some_and(|lease| owner(lease) != Some(node_uid)) {
            // Collected with the Node that owned it, or about to be.
            self.last = None;
        }
        if let Some(last) = &self.last {
            let renewed = self.wanted(node_uid, last.metadata.resource_version.clone());
            match self.api.replace(&self.node, &PostParams::default(), &renewed).await {
                Ok(lease) => {
                    self.last = Some(lease);
                    return Ok(());
                }
                Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => self.last = None,
                Err(error) => return Err(error),
            }
        }
        let found = self.api.get_opt(&self.node).await?;
        self.last = Some(match found {
            None => self.api.create(&PostParams::default(), &self.wanted(node_uid, None)).await?,
            Some(found) => {
                let wanted = self.wanted(node_uid, found.metadata.resource_version);
                self.api.replace(&self.node, &PostParams::default(), &wanted).await?
            }
        });
        Ok(())
    }

    /// Lets the Lease go. One that is gone is no error.
    ///
    /// # Errors
    /// When the API server does not answer or refuses.
    pub async fn release(&self) -> Result<(), kube::Error> {
        match self.api.delete(&self.node, &DeleteParams::default()).await {
            Ok(_) => Ok(()),
            Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
            Err(error) => Err(error),
        }
    }

    fn wanted(&self, node_uid: &str, resource_version: Option<String>) -> Lease {
        Lease {
            metadata: ObjectMeta {
                name: Some(self.node.clone()),
                namespace: Some(NAMESPACE.to_owned()),
                resource_version,
                owner_references: Some(vec![OwnerReference {
                    api_version: "v1".to_owned(),
                    kind: "Node".to_owned(),
                    name: self.node.clone(),
                    uid: node_uid.to_owned(),
                    ..OwnerReference::default()
                }]),
                ..ObjectMeta::default()
            },
            spec: Some(LeaseSpec {
                holder_identity: Some(self.node.clone()),
                lease_duration_seconds: i32::try_from(DURATION.as_secs()).ok(),
                renew_time: Some(MicroTime(Timestamp::now())),
                ..LeaseSpec::default()
            }),
        }
    }
}

fn owner(lease: &Lease) -> Option<&str> {
    lease.metadata.owner_references.iter().flatten().map(|owner| owner.uid.as_str()).next()
}

/// How long ago a Lease was renewed; none when it never was.
#[must_use]
pub fn age(lease: &Lease, now: Timestamp) -> Option<Duration> {
    let renewed = lease.spec.as_ref()?.renew_time.as_ref()?.0;
    Some(Duration::try_from(now.duration_since(renewed)).unwrap_or_default())
}
