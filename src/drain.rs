//! The end: when the pilot stops taking pods, when it ends those that it has, and how the time that is left is shared.
//!
//! [`Timing::new`] and [`share`] decide; `commands::run` carries it out.

use std::hash::{DefaultHasher, Hasher as _};
use std::time::{Duration, SystemTime};

use crate::node::Timing;

/// Less than this at the start is not worth a Node: the shortest drain needs 30 s of it.
pub const LEAST_TIME: Duration = Duration::from_secs(45);

/// The pilot is gone this long before the deadline, whatever happens.
pub const SAFETY: Duration = Duration::from_secs(1);

/// The shortest drain that `--drain-before` may ask for, and the shortest `--signal-lead`. Half of it is the containers',
/// and the last second nobody's ([`SAFETY`]): 1.5 s stay for the kernel, the statuses, Lease and Node. With less than 1 s
/// the guardian would kill everything before the drain had begun.
pub const LEAST_DRAIN: Duration = Duration::from_secs(5);

/// The shortest `--kill-wait`: what the shortest of Slurm's leaves. slurmd gives 5 s at least, less a margin of 2 s.
pub const LEAST_KILL_WAIT: Duration = Duration::from_secs(3);

/// What of [`LEAST_TIME`] is not the drain's: for the start and a first pod. A Node that lives only to be drained is not
/// worth one either, and a chain of jobs that each make such a one would spin.
const LEAST_LIFE: Duration = Duration::from_secs(15);

/// The most that is kept for reporting. The API server answers in milliseconds, but it may be restarting.
const REPORT_MOST: Duration = Duration::from_secs(15);

/// How long before the deadline the pilot stops taking pods, and ends those it has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Leads {
    /// Before the deadline: no more pods.
    pub cordon: Duration,
    /// Before the deadline: pods are ended.
    pub drain: Duration,
}

impl Leads {
    /// The leads for an allocation that had `left` when the pilot started: cordon 20 % but 40 s to 120 s, drain 10 % but
    /// 30 s to 60 s, unless the settings say otherwise. The cordon never comes after the drain.
    #[must_use]
    pub fn new(left: Duration, cordon: Option<Duration>, drain: Option<Duration>) -> Self {
        let second = Duration::from_secs(1);
        let drain = drain.unwrap_or_else(|| (left / 10).clamp(30 * second, 60 * second));
        let cordon = cordon.unwrap_or_else(|| (left / 5).clamp(40 * second, 120 * second));
        Self { cordon: cordon.max(drain), drain }
    }

    /// The moments that belong to a deadline.
    #[must_use]
    pub fn timing(&self, deadline: SystemTime) -> Timing {
        let before = |lead| deadline.checked_sub(lead).unwrap_or(SystemTime::UNIX_EPOCH);
        Timing { deadline, cordon: before(self.cordon), drain: before(self.drain) }
    }
}

/// How much earlier than its leads say one pilot of a fleet is cordoned and drained, so that not all of them are at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stagger(Duration);

impl Stagger {
    /// This Node's part of `--stagger`, from none of it to nearly all: the same after every restart, since it comes of the name.
    #[must_use]
    pub fn of(node: &str, all: Duration) -> Self {
        // SipHash of the standard library with its fixed keys; names differ in their last digits, and it mixes those well.
        let mut hasher = DefaultHasher::new();
        hasher.write(node.as_bytes());
        let part = u32::try_from(hasher.finish() >> 48).unwrap_or(0);
        Self((all / (1 << 16)).saturating_mul(part))
    }

    /// The moments that belong to a deadline which was learnt at `now`, when those of `before` held.
    ///
    /// What it takes leaves [`LEAST_LIFE`] before the cordon. As time goes by less and less is left, so a cordon that has its
    /// moment already keeps it: a deadline that moves by a second must not open a Node that is cordoned.
    #[must_use]
    pub fn timing(
        self,
        leads: Leads,
        deadline: SystemTime,
        now: SystemTime,
        before: Option<&Timing>,
    ) -> Timing {
        let plain = leads.timing(deadline);
        let until_plain = |moment: SystemTime| plain.cordon.duration_since(moment).unwrap_or_default();
        let room = until_plain(now).saturating_sub(LEAST_LIFE);
        let kept = before.map_or(Duration::ZERO, |before| until_plain(before.cordon));
        let shift = self.0.min(room.max(kept));
        Leads { cordon: leads.cordon.saturating_add(shift), drain: leads.drain.saturating_add(shift) }
            .timing(deadline)
    }
}

/// Why what is left at the start is too little for a Node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TooLittle {
    /// Less than any pilot needs.
    #[error("a pilot needs {} s to register and to drain", LEAST_TIME.as_secs())]
    Time,
    /// The drain would begin at once, or nearly.
    #[error(
        "--drain-before={}s (JIRIAF_DRAIN_BEFORE) and the {} s that a pilot needs before that are more",
        .0.as_secs(), LEAST_LIFE.as_secs()
    )]
    Drain(Duration),
    /// The Node would be cordoned from the start.
    #[error(
        "with --cordon-before={}s (JIRIAF_CORDON_BEFORE) no pod would ever be taken", .0.as_secs()
    )]
    Cordon(Duration),
    /// The pilots whose part is large would drain in the first half of their time.
    #[error(
        "--stagger={}s (JIRIAF_STAGGER) is more than half of that: pilots that get much of it would hardly take pods", .0.as_secs()
    )]
    Stagger(Duration),
}

impl TooLittle {
    /// The way out.
    #[must_use]
    pub fn mend(self) -> &'static str {
        match self {
            Self::Time => "ask for more walltime",
            Self::Drain(_) | Self::Cordon(_) | Self::Stagger(_) => "ask for more walltime, or set it lower",
        }
    }
}

/// Whether an allocation that has `left` is worth a Node, with these settings.
///
/// # Errors
/// Why not.
pub fn suffices(
    left: Duration,
    cordon: Option<Duration>,
    drain: Option<Duration>,
    stagger: Duration,
) -> Result<(), TooLittle> {
    if left < LEAST_TIME {
        return Err(TooLittle::Time);
    }
    match (cordon, drain) {
        (_, Some(drain)) if left < drain.saturating_add(LEAST_LIFE) => Err(TooLittle::Drain(drain)),
        (Some(cordon), _) if left <= cordon => Err(TooLittle::Cordon(cordon)),
        _ if stagger > left / 2 => Err(TooLittle::Stagger(stagger)),
        // The leads that are not set are part of the time: Leads::new.
        _ => Ok(()),
    }
}

/// Where in its life a pilot is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// Takes pods.
    Open,
    /// Takes no more pods.
    Cordoned,
    /// Ends the pods that it has.
    Draining,
}

/// The phase at `now`, and how long until the next one; no wait when there is none to come.
#[must_use]
pub fn phase(timing: Option<&Timing>, now: SystemTime) -> (Phase, Option<Duration>) {
    let Some(timing) = timing else { return (Phase::Open, None) };
    let until = |moment: SystemTime| moment.duration_since(now).ok().filter(|left| !left.is_zero());
    match (until(timing.cordon), until(timing.drain)) {
        (_, None) => (Phase::Draining, None),
        (None, wait) => (Phase::Cordoned, wait),
        (wait, Some(_)) => (Phase::Open, wait),
    }
}

/// How a drain shares what is left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Share {
    /// Containers may take this long after their SIGTERM; then SIGKILL.
    pub grace: Duration,
    /// Reporting may take until this long after the drain's start.
    pub report: Duration,
    /// The Node is removed and the pilot gone by then, counted from the drain's start.
    pub end: Duration,
}

/// Shares `budget`, the time from now until somebody kills us: min(15 s, half) is kept for reporting, and the last
/// second for nothing at all.
#[must_use]
pub fn share(budget: Duration) -> Share {
    let kept = REPORT_MOST.min(budget / 2);
    let end = budget.saturating_sub(SAFETY);
    // Removing the Lease and the Node is two calls; they get the last tenth of what is kept, at most 2 s.
    let remove = (kept / 10).min(Duration::from_secs(2));
    Share { grace: budget - kept, report: end.saturating_sub(remove), end }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn leads_are_a_part_of_the_time_within_bounds() {
        for (left, cordon, drain) in
            [(60, 40, 30), (118, 40, 30), (250, 50, 30), (400, 80, 40), (3600, 120, 60)]
        {
            assert_eq!(
                Leads::new(s(left), None, None),
                Leads { cordon: s(cordon), drain: s(drain) },
                "{left}"
            );
        }
        assert_eq!(Leads::new(s(3600), Some(s(10)), Some(s(20))), Leads { cordon: s(20), drain: s(20) });
    }

    #[test]
    fn a_node_that_would_take_no_pod_is_not_worth_one() {
        let set = |cordon: u64, drain: u64| {
            (Some(cordon).filter(|n| *n > 0).map(s), Some(drain).filter(|n| *n > 0).map(s))
        };
        let table = [
            (44, set(0, 0), Err(TooLittle::Time)),
            (45, set(0, 0), Ok(())),
            (44, set(5, 5), Err(TooLittle::Time)),
            (45, set(0, 5), Ok(())),
            (600, set(0, 600), Err(TooLittle::Drain(s(600)))),
            (600, set(900, 600), Err(TooLittle::Drain(s(600)))),
            (600, set(0, 586), Err(TooLittle::Drain(s(586)))),
            (600, set(0, 585), Ok(())),
            (600, set(600, 0), Err(TooLittle::Cordon(s(600)))),
            (600, set(599, 300), Ok(())),
            (600, (None, Some(Duration::MAX)), Err(TooLittle::Drain(Duration::MAX))),
        ];
        for (left, (cordon, drain), wanted) in table {
            assert_eq!(
                suffices(s(left), cordon, drain, Duration::ZERO),
                wanted,
                "{left} {cordon:?} {drain:?}"
            );
            if wanted.is_ok() {
                let leads = Leads::new(s(left), cordon, drain);
                assert!(leads.drain <= leads.cordon && leads.cordon < s(left), "{left} {leads:?}");
            }
        }
        assert_eq!(suffices(s(600), None, None, s(300)), Ok(()));
        assert_eq!(suffices(s(600), None, None, s(301)), Err(TooLittle::Stagger(s(301))));
        assert_eq!(suffices(s(45), None, None, s(22)), Ok(()));
        let text = TooLittle::Stagger(s(301)).to_string();
        assert!(text.contains("--stagger=301s") && text.contains("JIRIAF_STAGGER"), "{text}");
        let text = TooLittle::Drain(s(600)).to_string();
        assert!(text.contains("--drain-before=600s") && text.contains("JIRIAF_DRAIN_BEFORE"), "{text}");
        let text = TooLittle::Cordon(s(600)).to_string();
        assert!(text.contains("--cordon-before=600s") && text.contains("JIRIAF_CORDON_BEFORE"), "{text}");
    }

    #[test]
    fn a_fleet_drains_evenly_over_its_stagger_and_each_pilot_always_at_the_same_time() {
        let part = |name: &str| Stagger::of(name, s(1000)).0;
        let mut quarters = [0; 4];
        for number in 0..1000 {
            let name = format!("mysite-{}-n{}", 4000 + number / 8, number % 8);
            assert!(part(&name) < s(1000));
            quarters[usize::try_from(part(&name).as_secs() / 250).unwrap().min(3)] += 1;
        }
        assert!(quarters.iter().all(|count| (200..300).contains(count)), "{quarters:?}");
        assert_eq!(Stagger::of("n", Duration::ZERO), Stagger(Duration::ZERO));
        // Another process says the same.
        assert_eq!(part("mysite-1234-n1").as_secs(), 258);
    }

    #[test]
    fn what_a_stagger_takes_leaves_the_least_and_moves_no_cordon_back_and_forth() {
        let start = SystemTime::UNIX_EPOCH + s(100_000);
        let leads = Leads { cordon: s(120), drain: s(60) };
        let of = |part| Stagger(s(part));
        let timing = |part, left, now, before: Option<&Timing>| {
            let timing = of(part).timing(leads, start + s(left), start + s(now), before);
            assert_eq!(timing.drain, timing.cordon + s(60), "the cordon is as long before the drain as ever");
            assert_eq!(timing.deadline, start + s(left));
            timing
        };
        let cordon = |timing: &Timing| timing.cordon.duration_since(start).unwrap().as_secs();
        let first = timing(300, 3600, 0, None);
        assert_eq!(cordon(&first), 3600 - 120 - 300);
        assert_eq!(cordon(&timing(0, 3600, 0, None)), 3600 - 120);
        // Too little is left for all of it, or for any.
        assert_eq!(cordon(&timing(300, 200, 0, None)), LEAST_LIFE.as_secs());
        assert_eq!(cordon(&timing(300, 130, 0, None)), 10);
        // Cordoned since a minute, the deadline moves by a second.
        for moved in [3599, 3601] {
            let again = timing(300, moved, 3240, Some(&first));
            assert!(cordon(&again).abs_diff(cordon(&first)) <= 1, "{again:?}");
        }
        // It moves away, or comes near.
        assert_eq!(cordon(&timing(300, 7200, 3240, Some(&first))), 7200 - 120 - 300);
        let near = timing(300, 1000, 800, Some(&first));
        assert_eq!(cordon(&near), 800 + LEAST_LIFE.as_secs());
        assert_eq!(cordon(&timing(300, 1001, 810, Some(&near))), cordon(&near));
        assert_eq!(cordon(&timing(300, 3600, 810, Some(&near))), cordon(&first));
    }

    #[test]
    fn the_shortest_drains_leave_time_to_report() {
        for least in [LEAST_DRAIN, LEAST_KILL_WAIT] {
            let share = share(least);
            let report = share.report.saturating_sub(share.grace);
            assert!(report >= Duration::from_millis(350), "{share:?}");
        }
    }

    #[test]
    fn phases_follow_one_another() {
        let deadline = SystemTime::UNIX_EPOCH + s(1000);
        let timing = Leads { cordon: s(40), drain: s(30) }.timing(deadline);
        let at = |left| phase(Some(&timing), deadline - s(left));
        assert_eq!(at(100), (Phase::Open, Some(s(60))));
        assert_eq!(at(40), (Phase::Cordoned, Some(s(10))));
        assert_eq!(at(30), (Phase::Draining, None));
        assert_eq!(phase(Some(&timing), deadline + s(5)), (Phase::Draining, None));
        assert_eq!(phase(None, deadline), (Phase::Open, None));
    }

    #[test]
    fn a_budget_is_shared_and_ends_before_the_deadline() {
        assert_eq!(share(s(60)), Share { grace: s(45), report: Duration::from_millis(57_500), end: s(59) });
        assert_eq!(share(s(8)).grace, s(4));
        for seconds in 0..120 {
            let budget = s(seconds);
            let got = share(budget);
            assert!(got.report <= got.end && got.end <= budget && got.grace <= budget, "{seconds}");
            assert!(budget < LEAST_KILL_WAIT || got.grace < got.report, "{seconds}");
        }
    }
}
