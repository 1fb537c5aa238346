//! `jiriaf.alivetime`: whole seconds that a pod can count on, never overstated, with few writes.
//!
//! [`plan`] publishes what will remain at the next refresh, and refreshes before then. The label so falls short of the
//! truth by at most the refresh interval and the allowance for a slow write, and is never above it.

use std::time::{Duration, SystemTime};

/// The moments at which a pilot changes what it does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timing {
    /// The batch system begins to kill.
    pub deadline: SystemTime,
    /// No more pods are taken.
    pub cordon: SystemTime,
    /// The pods are ended: what alivetime counts to.
    pub drain: SystemTime,
}

/// A write may take so long before the label that it replaces overstates.
const WRITE_ALLOWANCE: Duration = Duration::from_secs(2);

/// Between writes while much time is left: one a minute.
const SLOWEST: Duration = Duration::from_secs(60);

/// Between writes in the last minutes.
const QUICKEST: Duration = Duration::from_secs(10);

/// The label as it was last acknowledged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Published {
    /// Its value, in seconds.
    pub value: u64,
    /// The drain time that it was made for.
    pub drain: SystemTime,
}

/// What to do about the label.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Plan {
    /// Publish this many seconds now.
    Write(u64),
    /// Nothing for so long.
    Wait(Duration),
    /// Nothing more, unless the drain time moves: the label says 0.
    Done,
}

/// Between two writes when so much is left: 5 % of it, 10 s to 60 s.
fn interval(left: Duration) -> Duration {
    (left / 20).clamp(QUICKEST, SLOWEST)
}

/// What to do now. A drain time that has moved is published at once.
#[must_use]
pub fn plan(now: SystemTime, drain: SystemTime, last: Option<Published>) -> Plan {
    let left = drain.duration_since(now).unwrap_or_default();
    if let Some(last) = last.filter(|last| last.drain == drain) {
        if last.value == 0 {
            return Plan::Done;
        }
        // The write must be through before what is left falls to the value.
        let refresh = Duration::from_secs(last.value) + WRITE_ALLOWANCE;
        if left > refresh {
            return Plan::Wait(left.saturating_sub(refresh));
        }
    }
    Plan::Write(whole_seconds_up(left.saturating_sub(interval(left) + WRITE_ALLOWANCE)))
}

/// Up, so that what is lost to whole seconds is not added to what the interval takes.
fn whole_seconds_up(duration: Duration) -> u64 {
    duration.as_secs() + u64::from(duration.subsec_nanos() > 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const START: SystemTime = SystemTime::UNIX_EPOCH;

    /// Lives through a job with a clock of its own. `latency` is how long a write takes until it is seen.
    fn live(total: Duration, latency: Duration, moves: &[(Duration, Duration)]) -> (u64, Vec<Duration>) {
        let step = Duration::from_millis(100);
        let mut now = START;
        let mut drain = START + total;
        let mut seen: Option<Published> = None;
        let mut coming: Option<(SystemTime, Published)> = None;
        let mut writes = Vec::new();
        let mut moves = moves.iter().peekable();
        while now < drain {
            if let Some((at, to)) = moves.peek()
                && now >= START + *at
            {
                drain = START + *to;
                moves.next();
            }
            if let Some((at, published)) = coming
                && now >= at
            {
                seen = Some(published);
                coming = None;
            }
            if coming.is_none()
                && let Plan::Write(value) = plan(now, drain, seen)
            {
                writes.push(now.duration_since(START).unwrap());
                coming = Some((now + latency, Published { value, drain }));
            }
            if let Some(seen) = seen.filter(|seen| seen.drain == drain) {
                let left = drain.duration_since(now).unwrap_or_default();
                assert!(seen.value as f64 <= left.as_secs_f64() + 0.0001, "{} > {left:?}", seen.value);
                let short = left.as_secs_f64() - seen.value as f64;
                let allowed = (left.as_secs_f64() / 20.0).clamp(10.0, 60.0) + 2.0;
                // Right after a write `left` was a little more than now, and so was what is allowed.
                assert!(short <= allowed * 1.06, "{short} short with {left:?} left");
            }
            now += step;
        }
        (seen.map_or(0, |seen| seen.value), writes)
    }

    #[test]
    fn a_day_has_at_most_one_write_a_minute_until_the_last_minutes() {
        let day = Duration::from_secs(24 * 3600);
        let (last, writes) = live(day, Duration::from_millis(100), &[]);
        assert_eq!(last, 0);
        let early = writes.iter().filter(|at| **at < day - Duration::from_secs(1200)).count();
        assert!(early <= 24 * 60 + 1, "{early}");
        let late = writes.len() - early;
        assert!(late <= 60, "{late} writes in the last 20 minutes");
        for pair in writes.windows(2) {
            assert!(pair[1] - pair[0] >= Duration::from_millis(7900), "{pair:?}");
        }
    }

    #[test]
    fn a_moved_drain_time_is_published_at_once() {
        let drain = START + Duration::from_secs(1000);
        let last = Some(Published { value: 900, drain });
        assert!(matches!(plan(START, drain, last), Plan::Wait(_)));
        let earlier = START + Duration::from_secs(100);
        assert_eq!(plan(START, earlier, last), Plan::Write(88));
        assert_eq!(plan(START + Duration::from_secs(200), earlier, last), Plan::Write(0));
        let done = Some(Published { value: 0, drain: earlier });
        assert_eq!(plan(START, earlier, done), Plan::Done);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        #[test]
        fn it_never_overstates(total in 30u64..3000, latency in 0u64..1900, at in 0u64..2000, to in 1u64..4000) {
            let moves = [(Duration::from_secs(at), Duration::from_secs(to))];
            live(Duration::from_secs(total), Duration::from_millis(latency), &moves);
        }
    }
}
