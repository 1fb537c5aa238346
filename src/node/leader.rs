//! The first pilot of a job asks the batch system every two minutes, the others rarely. These look at the Node of the first
//! instead: when the end that stands there moves, each asks for itself.
//!
//! What the Node says is a hint and no more. The first pilot's end may come of its own settings, and whoever may write to
//! Nodes could else move the end of pilots that are not theirs.

use std::time::{Duration, SystemTime};

use k8s_openapi::api::core::v1::Node;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::jiff::Timestamp;
use kube::Api;
use kube::api::GetParams;

use super::api::{Kind, call};
use super::labels::label_value;
use super::lease::chance;
use super::object::{DEADLINE, JOB_ID};

/// Between two looks: with the question that follows, others know of a moved end some three minutes after it at most. It is one
/// read of one object's metadata out of the API server's memory; a watch would be a connection that stands all the time.
pub const LOOK_EVERY: Duration = Duration::from_secs(60);

/// An end that moves by no more has not moved: what is left is told in whole seconds, and computed anew each time.
const SAME: Duration = Duration::from_secs(5);

/// The pilots of a job start together, and the first one's Node may be the last to come: it is looked for so many times more
/// often, for a minute or so.
const SOON: u32 = 10;

/// The time until the next look after so many, `chance` of a thousand: three to five quarters of the interval, so that the
/// pilots of a job do not look, nor then ask, at the same moment. `found`: whether the Node was seen yet.
#[must_use]
pub fn next_look(looks: u32, found: bool, chance: u32) -> Duration {
    let every = if found || looks > SOON { LOOK_EVERY } else { LOOK_EVERY / SOON };
    every * (750 + chance.min(1000) / 2) / 1000
}

/// The end as the first pilot's Node says it.
#[derive(Debug, Default)]
pub struct Leader {
    /// What it said last; the outer none: it was not seen yet.
    seen: Option<Option<SystemTime>>,
}

impl Leader {
    /// Takes what the Node of this name says now; whether the end has moved since the last look. A Node of another job is
    /// none.
    pub fn look(&mut self, node: &ObjectMeta, job: &str) -> bool {
        let labels = node.labels.as_ref();
        if labels.and_then(|labels| labels.get(JOB_ID)).map(String::as_str) != Some(&*label_value(job)) {
            return false;
        }
        let told = node.annotations.as_ref().and_then(|annotations| annotations.get(DEADLINE));
        let told = told.and_then(|told| told.parse::<Timestamp>().ok()).map(SystemTime::from);
        let moved = match (self.seen, told) {
            (None, _) | (Some(None), None) => false,
            (Some(Some(before)), Some(now)) => {
                let by = before.duration_since(now).or_else(|_| now.duration_since(before));
                by.is_ok_and(|by| by > SAME)
            }
            (Some(_), _) => true,
        };
        if moved || self.seen.is_none() {
            self.seen = Some(told);
        }
        moved
    }
}

/// Looks at the Node of a job's first pilot for as long as this one lives, and says when the end that stands there moves.
/// Ends where the credential may not read other Nodes than its own.
pub async fn follow(client: kube::Client, leader: String, job: String, moved: impl Fn() + Send) {
    let nodes: Api<Node> = Api::all(client);
    let (mut known, mut looks) = (Leader::default(), 0_u32);
    loop {
        looks = looks.saturating_add(1);
        let first = known.seen.is_none();
        match call(nodes.get_metadata_with(&leader, &GetParams::any())).await {
            Ok(node) if known.look(&node.metadata, &job) => {
                tracing::info!(leader, "the job's first pilot tells another end; the batch system is asked");
                moved();
            }
            Ok(_) if first && known.seen.is_some() => tracing::debug!(leader, "found the job's first pilot"),
            Ok(_) => {}
            Err(error) if error.kind() == Kind::Forbidden => {
                tracing::info!(
                    leader,
                    %error,
                    "this credential may not read the Node of the job's first pilot; the batch system is asked every half hour"
                );
                return;
            }
            // It is not there yet, or not any more, or nobody answers: the batch system is asked now and then all the same.
            Err(error) => tracing::debug!(leader, %error, "the Node of the job's first pilot was not read"),
        }
        tokio::time::sleep(next_look(looks, known.seen.is_some(), chance())).await;
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn node(job: &str, deadline: Option<&str>) -> ObjectMeta {
        let map = |name: &str, value: &str| BTreeMap::from([(name.to_owned(), value.to_owned())]);
        ObjectMeta {
            labels: Some(map(JOB_ID, job)),
            annotations: deadline.map(|deadline| map(DEADLINE, deadline)),
            ..ObjectMeta::default()
        }
    }

    #[test]
    fn an_end_that_moves_is_told_once_and_a_first_look_tells_nothing() {
        let mut leader = Leader::default();
        let mut look = |deadline| leader.look(&node("120", deadline), "120");
        assert!(!look(Some("2026-11-24T06:53:39Z")));
        assert!(!look(Some("2026-11-24T06:53:39Z")));
        assert!(!look(Some("2026-11-24T06:53:42Z")), "rounding");
        assert!(look(Some("2026-11-24T06:53:45Z")), "what creeps has moved in the end");
        assert!(look(Some("2026-11-24T05:00:00Z")));
        assert!(!look(Some("2026-11-24T05:00:00Z")));
        assert!(look(None), "the limit was lifted");
        assert!(!look(None));
        assert!(!look(None) && look(Some("2026-11-24T05:00:00Z")));
    }

    #[test]
    fn another_jobs_node_and_one_that_cannot_be_read_say_nothing() {
        let mut leader = Leader::default();
        assert!(!leader.look(&node("120", Some("2026-11-24T06:53:39Z")), "120"));
        assert!(!leader.look(&node("121", Some("2026-11-24T05:00:00Z")), "120"));
        assert!(!leader.look(&ObjectMeta::default(), "120"));
        // PBS writes brackets, which are no label.
        let mut leader = Leader::default();
        let job = "45[3].pbshost";
        assert!(!leader.look(&node(&label_value(job), Some("2026-11-24T06:53:39Z")), job));
        assert!(leader.look(&node(&label_value(job), Some("2026-11-24T05:00:00Z")), job));
        assert!(
            leader.look(&node(&label_value(job), Some("soon")), job),
            "as if it were lifted: one question more"
        );
    }

    #[test]
    fn looks_are_about_a_minute_apart() {
        let seconds = |looks, found, chance| next_look(looks, found, chance).as_secs_f64();
        assert_eq!((seconds(1, true, 0), seconds(1, true, 1000), seconds(9, true, 9999)), (45.0, 75.0, 75.0));
        // One that has not come yet is looked for more often, for a while.
        assert_eq!((seconds(1, false, 0), seconds(10, false, 1000), seconds(11, false, 0)), (4.5, 7.5, 45.0));
    }
}
