//! The Node's Lease: as long as it is renewed, the Node controller holds the Node for alive.
//!
//! As kubelet does it (`k8s.io/component-helpers/apimachinery/lease/controller.go`): written from the last copy
//! without reading first, read again after a conflict, owned by the Node. Otherwise than kubelet's, it follows a
//! Node that was deleted and made anew: a Lease that is owned by a uid that is gone is collected as garbage at
//! once, so it is written with the new uid, or made anew.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::time::Duration;

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta, OwnerReference};
use k8s_openapi::jiff::Timestamp;
use kube::Api;
use kube::api::PostParams;

use super::api::{CallError, Kind, call};

/// The namespace of all Nodes' Leases (`NamespaceNodeLease`).
pub const NAMESPACE: &str = "kube-node-lease";

/// How long a Lease holds: kubelet's default nodeLeaseDurationSeconds (`pkg/kubelet/apis/config/v1beta1`). The
/// Node controller waits for 50 s.
pub const DURATION: Duration = Duration::from_secs(40);

/// Time between two renewals: a quarter of the duration (`nodeLeaseRenewIntervalFraction`, `pkg/kubelet`).
pub const RENEW_EVERY: Duration = Duration::from_secs(10);

/// Thousandths of the interval by which it is stretched at random, so that the pilots of one job drift apart
/// (kubelet: 4 %).
const JITTER_PERMILLE: u32 = 40;

/// Tries for one renewal (kubelet's `maxUpdateRetries` is 5; three of 10 s each still end before the Lease does).
const TRIES: u32 = 3;

/// Pause between the tries for one renewal.
const PAUSE: Duration = Duration::from_secs(1);

/// The time to the next renewal after so many, by chance.
#[must_use]
pub fn next_renewal(renewals: u64) -> Duration {
    renewal_after(renewals, chance())
}

/// Chance, of a thousand.
pub(super) fn chance() -> u32 {
    // std seeds each RandomState anew: enough chance for a jitter, without a crate for it.
    u32::try_from(RandomState::new().build_hasher().finish() % 1001).unwrap_or_default()
}

/// The time to the next renewal after so many; `chance` is of a thousand.
///
/// The first comes somewhere within the interval: the jitter alone needs hours until pilots that began at the same
/// moment have drifted apart.
#[must_use]
pub fn renewal_after(renewals: u64, chance: u32) -> Duration {
    let chance = chance.min(1000);
    match renewals {
        0 | 1 => RENEW_EVERY * chance / 1000,
        _ => RENEW_EVERY + RENEW_EVERY * JITTER_PERMILLE * chance / 1_000_000,
    }
}

/// The Lease as it is to be written now: the last copy, if there is one, renewed and owned by the Node `uid`.
#[must_use]
pub fn renewed(last: Option<&Lease>, node: &str, uid: &str, now: Timestamp) -> Lease {
    let mut lease = last.cloned().unwrap_or_default();
    lease.metadata = ObjectMeta {
        name: Some(node.to_owned()),
        namespace: Some(NAMESPACE.to_owned()),
        owner_references: Some(vec![OwnerReference {
            api_version: "v1".to_owned(),
            kind: "Node".to_owned(),
            name: node.to_owned(),
            uid: uid.to_owned(),
            ..OwnerReference::default()
        }]),
        ..lease.metadata
    };
    lease.spec = Some(LeaseSpec {
        holder_identity: Some(node.to_owned()),
        lease_duration_seconds: i32::try_from(DURATION.as_secs()).ok(),
        renew_time: Some(MicroTime(now)),
        ..lease.spec.unwrap_or_default()
    });
    lease
}

/// When a Lease was renewed last.
#[must_use]
pub fn renew_time(lease: &Lease) -> Option<Timestamp> {
    lease.spec.as_ref()?.renew_time.as_ref().map(|time| time.0)
}

/// What a renewal found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    /// The Lease as it was left.
    AsLeft,
    /// The Lease had been deleted or written by somebody else: the Node may be gone too.
    Disturbed,
}

/// Renews one Node's Lease.
#[derive(Debug)]
pub struct Keeper {
    api: Api<Lease>,
    node: String,
    last: Option<Lease>,
}

impl Keeper {
    /// Nothing is called yet.
    #[must_use]
    pub fn new(client: kube::Client, node: &str) -> Self {
        Self { api: Api::namespaced(client, NAMESPACE), node: node.to_owned(), last: None }
    }

    /// Renews the Lease for the Node with this uid: some tries, a second apart.
    ///
    /// # Errors
    /// The last try's, after three.
    pub async fn renew(&mut self, uid: &str) -> Result<Found, CallError> {
        let mut found = Found::AsLeft;
        let mut tries = 0;
        loop {
            tries += 1;
            let error = match self.write(uid).await {
                Ok(lease) => {
                    self.last = Some(lease);
                    return Ok(found);
                }
                Err(error) => error,
            };
            let pause = match error.kind() {
                Kind::NotFound | Kind::Conflict | Kind::Exists => {
                    if self.last.take().is_some() {
                        found = Found::Disturbed;
                    }
                    Duration::ZERO
                }
                _ => PAUSE,
            };
            if tries >= TRIES {
                return Err(error);
            }
            tokio::time::sleep(pause).await;
        }
    }

    /// One try: the last copy is put; without one, what is there is read first, or a new one is made.
    async fn write(&mut self, uid: &str) -> Result<Lease, CallError> {
        let params = PostParams::default();
        if self.last.is_none() {
            self.last = call(self.api.get_opt(&self.node)).await?;
        }
        let lease = renewed(self.last.as_ref(), &self.node, uid, Timestamp::now());
        match self.last {
            Some(_) => call(self.api.replace(&self.node, &params, &lease)).await,
            None => call(self.api.create(&params, &lease)).await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    #[test]
    fn a_new_lease_is_held_by_and_owned_by_the_node() {
        let lease = renewed(None, "n1", "u1", at(7));
        let spec = lease.spec.unwrap();
        assert_eq!(spec.holder_identity.as_deref(), Some("n1"));
        assert_eq!(spec.lease_duration_seconds, Some(40));
        assert_eq!(spec.renew_time, Some(MicroTime(at(7))));
        let owners = lease.metadata.owner_references.unwrap();
        assert_eq!((owners.len(), owners[0].kind.as_str(), owners[0].uid.as_str()), (1, "Node", "u1"));
        assert_eq!(lease.metadata.namespace.as_deref(), Some("kube-node-lease"));
    }

    #[test]
    fn a_renewal_keeps_the_version_and_follows_the_nodes_uid() {
        let mut lease = renewed(None, "n1", "u1", at(7));
        lease.metadata.resource_version = Some("42".into());
        let again = renewed(Some(&lease), "n1", "u2", at(17));
        assert_eq!(again.metadata.resource_version.as_deref(), Some("42"));
        assert_eq!(again.metadata.owner_references.as_ref().unwrap()[0].uid, "u2");
        assert_eq!(again.metadata.owner_references.as_ref().unwrap().len(), 1);
        assert_eq!(renew_time(&again), Some(at(17)));
    }

    #[test]
    fn renewals_are_ten_seconds_and_a_little_apart() {
        for renewals in 1..100 {
            let wait = next_renewal(renewals);
            let least = if renewals == 1 { Duration::ZERO } else { RENEW_EVERY };
            assert!(wait >= least && wait <= Duration::from_millis(10_400), "{wait:?}");
        }
        let seconds = |renewals, chance| renewal_after(renewals, chance).as_secs_f64();
        assert_eq!(
            (seconds(1, 0), seconds(1, 1000)),
            (0.0, 10.0),
            "the first parts those that began together"
        );
        assert_eq!((seconds(2, 0), seconds(2, 1000)), (10.0, 10.4));
    }
}
