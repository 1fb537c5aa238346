//! The label `jiriaf.alivetime`: the whole seconds that a pod can count on, published so that it never
//! overstates and needs few writes. [`plan`] decides; `upkeep` writes.
//!
//! A label stands still while time runs, so what is published is what will remain when the next value takes
//! its place: the seconds that remain now, less the time to the next refresh, less what a write may take. It is
//! then true at every moment in between, and falls short by no more than one such step.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::spread::Part;

/// The times that the end of this pilot is made of, as last learnt. They may move while the job runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timing {
    /// When the batch system begins to kill.
    pub deadline: SystemTime,
    /// When the pilot stops taking pods.
    pub cordon: SystemTime,
    /// When the pilot begins to end the pods that it has: what `jiriaf.alivetime` counts down to.
    pub drain: SystemTime,
}

/// What the API server is known to have: the outcome of the last write that it acknowledged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Published {
    /// The times behind the annotations `jiriaf.deadline` and `jiriaf.drain`; `None` where there are none.
    pub timing: Option<Timing>,
    /// The value of `jiriaf.alivetime` in seconds; `None` where the label is absent.
    pub value: Option<u64>,
    /// When that write was begun.
    pub at: SystemTime,
}

/// What to do now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Plan {
    /// Write this value of `jiriaf.alivetime` (`None`: no such label) together with the annotations.
    Write(Option<u64>),
    /// Nothing is due for this long. At most [`LONGEST_WAIT`].
    Wait(Duration),
}

/// Seconds that a write may take until every reader sees it. API servers promise writes under 1 s at the 99th
/// percentile (Kubernetes' API call latency SLO), and watchers see them milliseconds later.
const WRITE_SECS: u64 = 2;

/// How much earlier still a refresh begins, so that the timer's own lateness (tokio counts in milliseconds)
/// does not make it late. It also puts the refreshes just after a whole second, so that rounding costs nothing.
const TIMER_SLACK: Duration = Duration::from_millis(50);

/// Longest step between two values in seconds: one write a minute is what a cluster with hundreds of pilots
/// is asked to take.
const LONGEST_STEP: u64 = 60;

/// Shortest step between two values in seconds: one write in ten seconds, as often as the Lease is renewed.
const SHORTEST_STEP: u64 = 10;

/// A step is one twentieth (5 %) of what remains, within the two limits above.
const STEP_PART: u64 = 20;

/// A deadline that moves is published at once, but not twice within this time: a source that flickers must not
/// flood the API server.
const MOVE_LIMIT: Duration = Duration::from_secs(1);

/// No plan looks further ahead than this. Timers do not run while a host is suspended, and the clock may be
/// set: a look each 10 s, as often as the Lease is renewed, notices either.
pub const LONGEST_WAIT: Duration = Duration::from_secs(10);

/// How much the label may fall short of the whole seconds that remain: one step and one write.
/// max(10 s, min(60 s, 5 %)) + 2 s.
#[must_use]
pub fn tolerance(remaining: u64) -> u64 {
    step(remaining) + WRITE_SECS
}

fn step(remaining: u64) -> u64 {
    (remaining / STEP_PART).clamp(SHORTEST_STEP, LONGEST_STEP)
}

/// Seconds since the epoch, whole: the annotations carry whole seconds, and label and annotation must agree.
pub(super) fn whole_seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// The time from `now` until the drain time's whole second; nothing when it has passed.
fn remaining(now: SystemTime, drain: SystemTime) -> Duration {
    let drain = UNIX_EPOCH + Duration::from_secs(whole_seconds(drain));
    drain.duration_since(now).unwrap_or_default()
}

/// What to publish now: never more than what will remain when the next value is seen, after `part` of a step.
#[must_use]
pub fn value(now: SystemTime, drain: SystemTime, part: Part) -> u64 {
    let left = remaining(now, drain).as_secs();
    let seconds = Duration::from_secs;
    left.saturating_sub(part.between(seconds(SHORTEST_STEP), seconds(step(left))).as_secs() + WRITE_SECS)
}

/// Decides whether the label (and with it the annotations) must be written now.
///
/// `timing` is what was learnt last, `None` where no end is known. `publish` says whether the label is wanted
/// at all (`--walltime 0`: it is not). `last` is what the API server has, `None` where that is not known.
///
/// The first value of a Node, and the first after a move, stands for `part` of a step only: many pilots that begin, or
/// learn of a move, at the same moment would else write at the same moment once a minute.
#[must_use]
pub fn plan(
    now: SystemTime,
    timing: Option<&Timing>,
    publish: bool,
    last: Option<&Published>,
    part: Part,
) -> Plan {
    let ends = timing.filter(|_| publish);
    let first = ends.map(|t| value(now, t.drain, part));
    let Some(last) = last else { return Plan::Write(first) };
    // A clock that was set back says nothing about when the last write was: it does not hold a write back.
    let since = now.duration_since(last.at).unwrap_or(Duration::MAX);
    if stamps(last.timing.as_ref()) != stamps(timing) || last.value.is_some() != first.is_some() {
        return after(MOVE_LIMIT.saturating_sub(since), first);
    }
    let fresh = ends.map(|t| value(now, t.drain, Part::ALL));
    let (Some(timing), Some(published)) = (timing, last.value) else { return Plan::Wait(LONGEST_WAIT) };
    let left = remaining(now, timing.drain);
    if left.as_secs().saturating_sub(published) > tolerance(left.as_secs()) {
        return after(MOVE_LIMIT.saturating_sub(since), fresh); // Only a clock that was set back leads here.
    }
    if published == 0 {
        return Plan::Wait(LONGEST_WAIT); // Nothing is ever overstated by 0.
    }
    let refresh_at = Duration::from_secs(published + WRITE_SECS) + TIMER_SLACK;
    after(left.saturating_sub(refresh_at), fresh)
}

fn after(wait: Duration, fresh: Option<u64>) -> Plan {
    if wait.is_zero() { Plan::Write(fresh) } else { Plan::Wait(wait.min(LONGEST_WAIT)) }
}

/// What the annotations say of a timing: a move of less than a second moves nothing.
fn stamps(timing: Option<&Timing>) -> Option<(u64, u64)> {
    timing.map(|t| (whole_seconds(t.deadline), whole_seconds(t.drain)))
}

/// How long to wait before a failed write is tried again: 1, 2, 4, 8, then 10 s each time. The label may
/// overstate by then, so it is tried as often as the API server can be asked to bear.
#[must_use]
pub fn retry_after(failures: u32) -> Duration {
    Duration::from_secs((1_u64 << failures.saturating_sub(1).min(4)).min(10))
}

#[cfg(test)]
mod tests;
