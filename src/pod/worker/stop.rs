//! The end of a pod, or of one of its containers, that somebody asks for: its deletion, the allocation's end, its own
//! deadline, an eviction, a probe that fails, or that its work is done.

use std::time::Duration;

use jiff::Timestamp;
use tokio::time::Instant;

use super::order::{self, Line, Standing};
use super::run::Order;
use super::{Worker, own_grace};
use crate::pod::containers::Kind;
use crate::pod::events;
use crate::pod::status::{Ending, State};

/// Reason of a pod that was active longer than it may be, and what a kubelet says of it (active_deadline.go).
const DEADLINE_EXCEEDED: &str = "DeadlineExceeded";
const DEADLINE_MESSAGE: &str = "Pod was active on the node longer than the specified deadline";

/// A pod that is being stopped. No container of it starts again.
pub(super) struct Stop {
    /// Its object is gone: nobody is told anything.
    pub(super) gone: bool,
    /// What becomes of it, whatever its containers say; none: they say it.
    pub(super) ending: Option<Ending>,
    /// When its containers are killed.
    pub(super) kill_at: Instant,
}

/// Why a pod is being stopped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Why {
    /// Somebody deleted it.
    Deleted,
    /// Its object is gone.
    Gone,
    /// The allocation ends.
    Shutdown,
    /// Its work is over: only what goes beside it still runs.
    Complete,
    /// It ends as failed, with this reason and message, and the reason of a DisruptionTarget condition if there is one.
    Failed { reason: String, message: String, disruption: Option<String> },
}

impl Why {
    fn ending(self) -> Option<Ending> {
        match self {
            Self::Deleted | Self::Gone => Some(Ending::Deleted),
            Self::Shutdown => Some(Ending::NodeShutdown),
            Self::Complete => None,
            Self::Failed { reason, message, disruption } => {
                Some(Ending::Failed { reason, message, disruption })
            }
        }
    }
}

impl Worker {
    /// Stops the pod: hooks and SIGTERM now, SIGKILL after `grace`. What was asked for first decides how it ends; a later
    /// call may only shorten the grace.
    pub(super) fn stop_for(&mut self, why: Why, grace: Duration) {
        let kill_at = Instant::now() + grace;
        let first = self.stop.is_none();
        let gone = why == Why::Gone;
        let stop = self.stop.get_or_insert_with(|| Stop { gone, ending: why.ending(), kill_at });
        let shorter = kill_at < stop.kill_at;
        stop.kill_at = stop.kill_at.min(kill_at);
        stop.gone |= gone;
        if !first && !shorter {
            return;
        }
        // After a crash its containers' exit codes must not decide.
        if first && let Some(ending @ Ending::Failed { .. }) = &stop.ending {
            self.record.ending = Some(ending.clone());
            self.save();
        }
        self.end_runs(grace, first);
    }

    /// Has all containers that run end within `grace`, each when its turn comes, and none start again.
    pub(super) fn end_runs(&mut self, grace: Duration, tell: bool) {
        // A preparation that is under way is waited for: it may have made the pod's directory.
        self.prepare_at = None;
        self.announce_at = None;
        self.deadline_at = None;
        let turns = order::may_end(&self.line());
        for (index, container) in self.containers.iter_mut().enumerate() {
            container.restart_at = None;
            container.supervisor = None;
            container.probes.stopping();
            if let Some(orders) = &container.run {
                // The channel holds more orders than a pod's life gives; one that is full has its Terminate already.
                let _ = orders.try_send(Order::Terminate { grace, waits: !turns.contains(&index) });
                if tell {
                    let text = format!("Stopping container {}", container.name);
                    let name = Some(container.name.as_str());
                    self.context.events.record(
                        &self.record.pod,
                        name,
                        events::Kind::Normal,
                        "Killing",
                        &text,
                    );
                }
            }
        }
    }

    /// A container of a pod that is being stopped has ended: the next sidecar's turn may have come.
    pub(super) fn next_turns(&mut self) {
        if self.stop.is_none() {
            return;
        }
        for index in order::may_end(&self.line()) {
            let container = &self.containers[index];
            if let Some(orders) = container.run.as_ref().filter(|_| container.kind == Kind::Sidecar) {
                let _ = orders.try_send(Order::Turn);
            }
        }
    }

    /// Ends one container, which starts again by its restart policy, or whatever that says where `again`.
    pub(super) fn kill(&mut self, index: usize, message: &str, grace: Duration, again: bool) {
        let container = &self.containers[index];
        let Some(orders) = container.run.as_ref().filter(|_| self.stop.is_none()) else { return };
        if let Some(record) = self.record.containers.get_mut(&container.name) {
            record.again |= again;
        }
        self.save();
        let _ = orders.try_send(Order::Terminate { grace, waits: false });
        let text = if again { format!("{message}, will be restarted") } else { message.to_owned() };
        let name = Some(container.name.as_str());
        self.context.events.record(&self.record.pod, name, events::Kind::Normal, "Killing", &text);
    }

    /// What the containers do, for those who decide on their order.
    pub(super) fn line(&self) -> Line {
        let standing = |container: &super::Container| {
            let record = self.record.containers.get(&container.name);
            if container.run.is_some() {
                return Standing::Runs { started: record.is_some_and(|record| record.started) };
            }
            if container.restart_at.is_some() {
                return Standing::BackOff;
            }
            match record.map(|record| &record.state) {
                Some(State::Terminated(end)) => Standing::Over { succeeded: end.exit_code == 0 },
                _ => Standing::Due,
            }
        };
        self.containers.iter().map(|container| (container.kind, standing(container))).collect()
    }

    /// How many of the containers are passed: before the last one that has begun, nobody waits for any of them
    /// (computeInitContainerActions goes from the last to the first).
    pub(super) fn passed(&self) -> usize {
        let begun = |container: &super::Container| {
            let record = self.record.containers.get(&container.name);
            container.kind != Kind::Ephemeral
                && (container.run.is_some() || record.is_some_and(|record| record.has_begun()))
        };
        let main = self.containers.iter().position(|container| container.kind == Kind::Main);
        let last = self.containers.iter().rposition(begun).unwrap_or(0);
        // Main containers do not wait for each other.
        main.map_or(last, |main| last.min(main))
    }

    /// Where the pod's work is over, ends what goes beside it.
    pub(super) fn finish_if_complete(&mut self) {
        if self.stop.is_none() && self.record.last_status.is_none() && order::is_complete(&self.line()) {
            self.stop_for(Why::Complete, own_grace(&self.record.pod));
        }
    }

    /// Counts the pod's `activeDeadlineSeconds` anew, which may be lowered while it runs.
    pub(super) fn count_deadline(&mut self) {
        let limit = self.record.pod.spec.as_ref().and_then(|spec| spec.active_deadline_seconds);
        let Some(limit) = limit.filter(|_| self.stop.is_none() && !self.ended) else {
            self.deadline_at = None;
            return;
        };
        let told = self.record.pod.status.as_ref().and_then(|status| status.start_time.as_ref());
        let started = told.map_or(self.record.admitted, |time| time.0);
        let left = time_left(limit, started, Timestamp::now());
        // One that is too far ahead to be told never comes.
        self.deadline_at = Instant::now().checked_add(left);
    }

    /// The pod was active for as long as it may be.
    pub(super) fn exceed_deadline(&mut self) {
        self.deadline_at = None;
        if self.stop.is_some() || self.ended {
            return;
        }
        let (reason, message) = (DEADLINE_EXCEEDED, DEADLINE_MESSAGE);
        self.context.events.record(&self.record.pod, None, events::Kind::Normal, reason, message);
        let why = Why::Failed { reason: reason.to_owned(), message: message.to_owned(), disruption: None };
        self.stop_for(why, own_grace(&self.record.pod));
    }
}

/// What is left of `limit` seconds that began at `started`.
fn time_left(limit: i64, started: Timestamp, now: Timestamp) -> Duration {
    let limit = Duration::from_secs(u64::try_from(limit).unwrap_or(0));
    limit.saturating_sub(Duration::try_from(now.duration_since(started)).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_deadline_counts_from_the_pods_start() {
        let at = |second| Timestamp::from_second(second).unwrap();
        for (limit, now, wanted) in
            [(10, 103, 7), (10, 110, 0), (10, 500, 0), (0, 100, 0), (-1, 100, 0), (10, 90, 10)]
        {
            assert_eq!(time_left(limit, at(100), at(now)).as_secs(), wanted, "{limit} at {now}");
        }
        assert_eq!(time_left(i64::MAX, at(100), at(100)).as_secs(), i64::MAX as u64);
    }
}
