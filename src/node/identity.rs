//! Whose Node is it? What is found under this pilot's name decides whether it is registered, adopted or refused.
//! Decisions only; `registration` makes the calls.

use std::time::Duration;

use k8s_openapi::api::core::v1::Node;
use k8s_openapi::jiff::Timestamp;

use super::lease::{DURATION, RENEW_EVERY};
use super::object::{INSTANCE, JOB_ID, TYPE};

/// Whose an existing Node of our name is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Owner {
    /// This very pilot's, from before a crash.
    Us,
    /// Another pilot's, alive or dead.
    Pilot(OtherPilot),
    /// Something else's: a kubelet's, another virtual kubelet's. Never touched.
    Stranger {
        /// `status.nodeInfo.kubeletVersion`, which tells a person what it is.
        kubelet_version: String,
    },
}

/// Another pilot, as its Node describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OtherPilot {
    /// Its instance.
    pub instance: String,
    /// Its job, `?` where it has none.
    pub job: String,
    /// Whether it let the Node go at its end (cordoned and not ready), only lacking the right to delete it.
    pub let_go: bool,
}

/// Tells whose a Node is.
#[must_use]
pub fn owner(node: &Node, instance: &str) -> Owner {
    let label = |key: &str| node.metadata.labels.as_ref().and_then(|labels| labels.get(key)).cloned();
    let made_by = node.metadata.annotations.as_ref().and_then(|a| a.get(INSTANCE)).filter(|i| !i.is_empty());
    match made_by {
        Some(made_by) if made_by == instance => Owner::Us,
        Some(made_by) if label(TYPE.0).as_deref() == Some(TYPE.1) => Owner::Pilot(OtherPilot {
            instance: made_by.clone(),
            job: label(JOB_ID).unwrap_or_else(|| "?".to_owned()),
            let_go: let_go(node),
        }),
        _ => Owner::Stranger {
            kubelet_version: node
                .status
                .as_ref()
                .and_then(|s| s.node_info.as_ref())
                .map(|i| i.kubelet_version.clone())
                .unwrap_or_default(),
        },
    }
}

fn let_go(node: &Node) -> bool {
    let cordoned = node.spec.as_ref().and_then(|s| s.unschedulable).unwrap_or(false);
    let conditions = node.status.iter().filter_map(|s| s.conditions.as_ref()).flatten();
    cordoned && conditions.into_iter().any(|c| c.type_ == "Ready" && c.status == "False")
}

/// Whether a Node that was ours still is, seen by its uid and instance while the pilot runs. Somebody who strips
/// the annotation from the very Node that we registered does not take it away.
#[must_use]
pub fn still_ours(node: &Node, uid: &str, instance: &str) -> bool {
    match node.metadata.annotations.as_ref().and_then(|a| a.get(INSTANCE)) {
        Some(made_by) => made_by == instance,
        None => node.metadata.uid.as_deref() == Some(uid),
    }
}

/// Whether the pilot behind a Lease lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Life {
    /// It renews its Lease.
    Alive,
    /// It has not renewed its Lease for as long as a Lease holds.
    Stale,
    /// It has to be watched longer before that can be told.
    Unclear,
}

/// Tells whether the pilot behind a Lease lives, from the renewal time seen at first, the one seen now, and for
/// how long it was watched. Another host's clock is not trusted: a Lease that looks old is still watched for one
/// renewal, and one that looks as if from the future for its whole duration.
#[must_use]
pub fn life(first: Option<Timestamp>, current: Option<Timestamp>, now: Timestamp, watched: Duration) -> Life {
    if current != first && current.is_some() {
        return Life::Alive;
    }
    // One renewal with its jitter of 4 %, and a call that takes a second or two.
    let renewal = RENEW_EVERY + Duration::from_secs(2);
    let age = current.map_or(DURATION, |renewed| now.duration_since(renewed).try_into().unwrap_or_default());
    if watched >= DURATION || (age >= DURATION && watched >= renewal) { Life::Stale } else { Life::Unclear }
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::api::core::v1::{NodeCondition, NodeSpec, NodeStatus, NodeSystemInfo};
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

    fn found(labels: &[(&str, &str)], instance: Option<&str>) -> Node {
        let map =
            |pairs: &[(&str, &str)]| pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        Node {
            metadata: ObjectMeta {
                uid: Some("u1".into()),
                labels: Some(map(labels)),
                annotations: instance.map(|i| map(&[(INSTANCE, i)])),
                ..ObjectMeta::default()
            },
            status: Some(NodeStatus {
                node_info: Some(NodeSystemInfo {
                    kubelet_version: "v1.35.1".into(),
                    ..NodeSystemInfo::default()
                }),
                ..NodeStatus::default()
            }),
            ..Node::default()
        }
    }

    #[test]
    fn a_node_belongs_to_whom_it_says() {
        let pilot = [("type", "virtual-kubelet"), ("jiriaf.jobid", "4711")];
        assert_eq!(owner(&found(&pilot, Some("me")), "me"), Owner::Us);
        let other = OtherPilot { instance: "other".into(), job: "4711".into(), let_go: false };
        assert_eq!(owner(&found(&pilot, Some("other")), "me"), Owner::Pilot(other));
        let stranger = Owner::Stranger { kubelet_version: "v1.35.1".into() };
        assert_eq!(owner(&found(&[], None), "me"), stranger, "a kubelet");
        assert_eq!(owner(&found(&pilot, None), "me"), stranger, "another virtual kubelet");
        assert_eq!(owner(&found(&[], Some("other")), "me"), stranger, "no virtual kubelet");
        assert_eq!(owner(&found(&pilot, Some("")), ""), stranger, "an empty instance is nobody's");
    }

    #[test]
    fn a_node_that_was_let_go_is_cordoned_and_not_ready() {
        let mut node = found(&[("type", "virtual-kubelet")], Some("other"));
        let gone = |node: &Node| matches!(owner(node, "me"), Owner::Pilot(p) if p.let_go);
        assert!(!gone(&node));
        node.spec = Some(NodeSpec { unschedulable: Some(true), ..NodeSpec::default() });
        assert!(!gone(&node));
        let ready = |status: &str| {
            vec![NodeCondition { type_: "Ready".into(), status: status.into(), ..NodeCondition::default() }]
        };
        node.status = Some(NodeStatus { conditions: Some(ready("Unknown")), ..NodeStatus::default() });
        assert!(!gone(&node), "a pilot that is out of reach may come back");
        node.status = Some(NodeStatus { conditions: Some(ready("False")), ..NodeStatus::default() });
        assert!(gone(&node));
    }

    #[test]
    fn a_node_stays_ours_until_another_signs_it() {
        assert!(still_ours(&found(&[], Some("me")), "u0", "me"), "made anew by ourselves");
        assert!(still_ours(&found(&[], None), "u1", "me"), "somebody took the annotation off");
        assert!(!still_ours(&found(&[], None), "u0", "me"));
        assert!(!still_ours(&found(&[], Some("other")), "u1", "me"));
    }

    #[test]
    fn a_lease_tells_life_from_death_without_trusting_clocks() {
        let at = |second: i64| Timestamp::from_second(second).unwrap();
        let secs = Duration::from_secs;
        for (first, current, now, watched, want) in [
            (Some(1000), Some(1009), 1009, 9, Life::Alive),
            (None, Some(1009), 1009, 9, Life::Alive),
            // Renewed 5 s before the first look: the rest of its 40 s is waited for.
            (Some(995), Some(995), 1018, 18, Life::Unclear),
            (Some(995), Some(995), 1034, 34, Life::Unclear),
            (Some(995), Some(995), 1035, 35, Life::Stale),
            // Long dead by our clock: still watched for one renewal.
            (Some(10), Some(10), 1011, 11, Life::Unclear),
            (Some(10), Some(10), 1012, 12, Life::Stale),
            // Its clock is ahead.
            (Some(5000), Some(5000), 1039, 39, Life::Unclear),
            (Some(5000), Some(5000), 1040, 40, Life::Stale),
            // No Lease at all: a living pilot makes it anew within one renewal.
            (None, None, 1011, 11, Life::Unclear),
            (None, None, 1012, 12, Life::Stale),
            (Some(1000), None, 1012, 12, Life::Stale),
        ] {
            let told = life(first.map(at), current.map(at), at(now), secs(watched));
            assert_eq!(told, want, "{first:?} {current:?} after {watched} s");
        }
    }
}
