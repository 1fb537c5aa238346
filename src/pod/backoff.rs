//! The crash loop's back-off of one container, as a kubelet counts it: 10 s, twice as long each time, at
//! most 300 s or what the pilot was told; forgotten when the container ran for 600 s.
//!
//! Sources: `pkg/kubelet/kubelet.go` (the numbers), `client-go/util/flowcontrol/backoff.go` (the counting),
//! `kuberuntime_manager.go` `doBackOff` (what is counted from where).

use std::time::Duration;

use jiff::Timestamp;

/// The first wait (kubelet.go: the crash loop begins with 10 s).
pub const FIRST: Duration = Duration::from_secs(10);
/// The longest wait (kubelet.go: 300 s unless configured otherwise).
pub const LONGEST: Duration = Duration::from_secs(300);
/// A run that was longer is no crash (kubelet.go: `crashLoopBackOff.HasExpiredFunc`, whatever the longest wait).
const STEADY: Duration = Duration::from_secs(600);

/// How one container of one pod has fared.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackOff {
    last: Option<Step>,
    longest: Duration,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Step {
    wait: Duration,
    /// When the wait was last made longer: the moment of a restart.
    set: Timestamp,
}

/// Whether a container may start again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// Now. The next wait was made longer already.
    Start,
    /// Not before `until`.
    Wait {
        /// The whole wait, counted from the container's end; what the message names.
        wait: Duration,
        /// When it is over.
        until: Timestamp,
    },
}

impl BackOff {
    /// One that never waits longer than `longest`: the first wait is cut to it too (kubelet.go, `newCrashLoopBackOff`).
    #[must_use]
    pub fn new(longest: Duration) -> Self {
        Self { last: None, longest }
    }

    /// Decides, for a container that ended at `finished_at` and is to run again. Ask once for each start: an
    /// answer of [`Next::Start`] counts as one.
    pub fn next(&mut self, finished_at: Timestamp, now: Timestamp) -> Next {
        let live = self.last.as_ref().filter(|step| since(step.set, finished_at) <= STEADY);
        let wait = match live {
            None => FIRST.min(self.longest),
            Some(step) => {
                let until = finished_at.saturating_add(step.wait).unwrap_or(Timestamp::MAX);
                if now < until {
                    return Next::Wait { wait: step.wait, until };
                }
                (step.wait * 2).min(self.longest)
            }
        };
        self.last = Some(Step { wait, set: now });
        Next::Start
    }
}

/// The message of a container that waits with reason `CrashLoopBackOff`.
#[must_use]
pub fn message(wait: Duration, container: &str, pod: &str, namespace: &str, uid: &str) -> String {
    format!(
        "back-off {} restarting failed container={container} pod={pod}_{namespace}({uid})",
        go_duration(wait)
    )
}

/// Whole seconds as Go writes a duration: `10s`, `1m20s`, `5m0s`.
fn go_duration(duration: Duration) -> String {
    let seconds = duration.as_secs();
    match seconds / 60 {
        0 => format!("{seconds}s"),
        minutes => format!("{minutes}m{}s", seconds % 60),
    }
}

/// How long after `earlier` `later` is; nothing when it is before.
fn since(earlier: Timestamp, later: Timestamp) -> Duration {
    Duration::try_from(later.duration_since(earlier)).unwrap_or(Duration::ZERO)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    #[test]
    fn a_container_that_keeps_failing_waits_ever_longer() {
        let mut back_off = BackOff::new(LONGEST);
        let mut now = 1_000;
        assert_eq!(back_off.next(at(now), at(now)), Next::Start, "the first restart is at once");
        for wait in [10, 20, 40, 80, 160, 300, 300] {
            let wanted = Next::Wait { wait: Duration::from_secs(wait), until: at(now + wait as i64) };
            assert_eq!(back_off.next(at(now), at(now)), wanted);
            assert_eq!(back_off.next(at(now), at(now + wait as i64 - 1)), wanted, "asking changes nothing");
            assert_eq!(back_off.next(at(now), at(now + wait as i64)), Next::Start);
            now += wait as i64;
        }
    }

    #[test]
    fn the_longest_wait_may_be_cut() {
        let mut back_off = BackOff::new(Duration::from_secs(3));
        assert_eq!(back_off.next(at(0), at(0)), Next::Start);
        for now in [0, 3, 6] {
            let wanted = Next::Wait { wait: Duration::from_secs(3), until: at(now + 3) };
            assert_eq!(back_off.next(at(now), at(now)), wanted);
            assert_eq!(back_off.next(at(now), at(now + 3)), Next::Start);
        }
    }

    #[test]
    fn the_time_it_ran_counts_towards_the_wait_only_from_its_end() {
        let mut back_off = BackOff::new(LONGEST);
        back_off.next(at(0), at(0));
        // Ran 100 s: the wait still begins at its end.
        assert_eq!(
            back_off.next(at(100), at(105)),
            Next::Wait { wait: Duration::from_secs(10), until: at(110) }
        );
    }

    #[test]
    fn a_long_run_forgets_the_failures() {
        let mut back_off = BackOff::new(LONGEST);
        back_off.next(at(0), at(0));
        back_off.next(at(0), at(10));
        let mut stable = back_off.clone();
        assert_eq!(stable.next(at(10 + 601), at(611)), Next::Start);
        assert_eq!(stable.next(at(612), at(612)), Next::Wait { wait: FIRST, until: at(622) }, "begins anew");
        assert!(matches!(back_off.next(at(10 + 600), at(610)), Next::Wait { .. }), "600 s are not enough");
    }

    #[test]
    fn the_message_is_the_kubelets() {
        for (seconds, wanted) in [(10, "10s"), (80, "1m20s"), (160, "2m40s"), (300, "5m0s")] {
            assert_eq!(
                message(Duration::from_secs(seconds), "c1", "p1", "ns", "u-1"),
                format!("back-off {wanted} restarting failed container=c1 pod=p1_ns(u-1)")
            );
        }
    }
}
