//! The deadline on its way to all whom it concerns.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::sync::watch;

use crate::allocation::{Allocation, Deadline};
use crate::drain::{Leads, Stagger};
use crate::guardian::GuardianLink;
use crate::node::Timing;

pub(in crate::commands) fn rfc3339(at: SystemTime) -> String {
    jiff::Timestamp::try_from(at)
        .and_then(|t| t.round(jiff::Unit::Second))
        .map_or_else(|_| "?".to_owned(), |t| t.to_string())
}

pub(super) fn say_what_was_granted(
    allocation: &Allocation,
    node: &str,
    deadline: Option<&Deadline>,
    kill_wait: Duration,
) {
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        node,
        host = allocation.host,
        batch = allocation.batch.label(),
        job = allocation.job_id.as_ref().map(|j| j.value.as_str()),
        cpus = allocation.cpus.value.len(),
        memory_mib = allocation.memory.value >> 20,
        gpus = allocation.gpus.value.len(),
        deadline = deadline.map(|d| rfc3339(d.at)),
        deadline_from = deadline.map(|d| d.source.as_str()),
        kill_wait = kill_wait.as_secs(),
        "allocation"
    );
}

/// Whom a deadline that moves concerns.
pub(super) struct Followers {
    pub(super) timing: Arc<watch::Sender<Option<Timing>>>,
    pub(super) drain: watch::Sender<Option<SystemTime>>,
    pub(super) link: Arc<GuardianLink>,
    pub(super) draining: watch::Receiver<bool>,
    pub(super) kill_wait: Duration,
}

/// Hands a deadline that moves to everybody whom it concerns, until the drain: that goes by a budget of its own.
pub(super) async fn follow_deadline(
    mut deadline: watch::Receiver<Option<Deadline>>,
    leads: Leads,
    stagger: Stagger,
    followers: Followers,
) {
    while deadline.changed().await.is_ok() {
        let now = deadline.borrow_and_update().clone();
        let before = *followers.timing.borrow();
        let next = now.as_ref().map(|d| stagger.timing(leads, d.at, SystemTime::now(), before.as_ref()));
        let moved = before.map(|t| t.deadline) != next.as_ref().map(|t| t.deadline);
        if !moved || *followers.draining.borrow() {
            continue;
        }
        tracing::info!(
            deadline = now.as_ref().map(|d| rfc3339(d.at)),
            from = now.as_ref().map(|d| d.source.as_str()),
            drain = next.as_ref().map(|t| rfc3339(t.drain)),
            "the deadline has moved"
        );
        // A limit that was lowered to what is over already still leaves the batch system's kill wait for a drain.
        let least = SystemTime::now().checked_add(followers.kill_wait);
        followers.link.set_deadline(now.map(|d| least.map_or(d.at, |least| d.at.max(least))));
        followers.drain.send_replace(next.as_ref().map(|t| t.drain));
        followers.timing.send_replace(next);
    }
}
