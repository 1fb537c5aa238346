//! When to ask the batch system again, as a pilot alone and as one among many, without any asking: `tracker` does that.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::time::Duration;

use super::{Allocation, Task};

/// Between two questions when all is well: half of what sites ask of their users at most (a question in 60 s), and the
/// time within which a changed limit is noticed.
pub const POLL: Duration = Duration::from_secs(120);

/// The longest time between two questions of the tasks that are not a job's first, however many nodes it has, and of the
/// jobs of an array, however many there are.
const POLL_OF_OTHERS: Duration = Duration::from_secs(30 * 60);

/// All jobs of an array together ask no more often than this: slurmctld's limiter, where a site has it on, gives a user two
/// requests a second (slurm.conf(5), rl_refill_rate), and half of them are left to the user.
const ARRAY_POLL: Duration = Duration::from_secs(1);

/// What each of the pilots adds that want an answer at the same moment, since all of them got the same signal: the same
/// limiter's two a second; its 30 at once (rl_bucket_size) are left to the user.
const ASK_EACH: Duration = Duration::from_millis(500);

/// The most that a question waits for its turn, and no more than a quarter of what is left: the warning signal of our scripts
/// comes 180 s before the end, and the cordon 120 s before it.
const ASK_MOST: Duration = Duration::from_secs(45);

/// The same for the start of pilots that a batch system starts together: a hundred Nodes a second, each of which costs an
/// API server some ten requests …
const START_EACH: Duration = Duration::from_millis(10);

/// … and no pilot of the largest job waits longer for its turn.
const START_MOST: Duration = Duration::from_secs(10);

/// The longest time between two questions while the batch system does not answer.
const BACK_OFF: Duration = Duration::from_secs(15 * 60);

/// The first wait after a question without an answer when no end is known at all: then an answer matters most.
const FIRST_RETRY: Duration = Duration::from_secs(10);

/// Near the end a question is never asked more often than this for want of an answer.
const NEAR_END: Duration = Duration::from_secs(30);

/// How a pilot paces its questions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pace {
    /// Its rank among the pilots of the job.
    pub rank: u32,
    /// The job's nodes, each with a pilot.
    pub nodes: u32,
    /// The jobs of its array; 1 without one.
    pub array: u32,
    /// Makes its jitter its own: see [`seed`].
    pub seed: u64,
    /// Between two questions of rank 0.
    pub poll: Duration,
}

impl Pace {
    /// The pace of an allocation's pilot, when the first of a job asks every `poll`.
    #[must_use]
    pub fn of(allocation: &Allocation, poll: Duration) -> Self {
        let Task { rank, nodes, array, .. } = allocation.task;
        let job = allocation.job_id.as_ref().map_or("", |id| id.value.as_str());
        Self { rank, nodes, array, seed: seed(job, &allocation.host, rank), poll }
    }

    /// How long this pilot waits with a question that all pilots of its job and array want to put at the same moment, when
    /// so much is left. Near the end, and where none is known, there is no time to wait.
    #[must_use]
    pub fn turn_to_ask(&self, count: u64, left: Option<Duration>) -> Duration {
        let most = ASK_MOST.min(left.unwrap_or_default() / 4);
        self.together(ASK_EACH).min(most).mul_f64(self.chance(count))
    }

    /// How long this pilot waits at its start for the others of its job and array.
    #[must_use]
    pub fn turn_to_start(&self) -> Duration {
        self.spread_of_starts().mul_f64(self.chance(u64::MAX))
    }

    /// Over how long the starts of the job's and array's pilots are spread, and so are their ends.
    #[must_use]
    pub fn spread_of_starts(&self) -> Duration {
        self.together(START_EACH).min(START_MOST)
    }

    /// So much for each of the others that do the same at the same moment.
    fn together(&self, each: Duration) -> Duration {
        each.saturating_mul(self.nodes.max(1).saturating_mul(self.array.max(1)) - 1)
    }

    /// From 0 to 1, another one for each count, and always the same.
    fn chance(&self, count: u64) -> f64 {
        f64::from(u32::try_from(hash(&(self.seed, count)) >> 32).unwrap_or(0)) / f64::from(u32::MAX)
    }

    /// What `base` becomes where others of the job or the array ask as well.
    fn spread_out(&self, base: Duration) -> Duration {
        let of_array = if self.array > 1 { base.max(ARRAY_POLL.saturating_mul(self.array)) } else { base };
        let spread = if self.rank == 0 { 1 } else { self.nodes.max(1) };
        of_array.saturating_mul(spread).min(POLL_OF_OTHERS.max(base))
    }
}

/// How long to wait before the first question, when what is known was told so long ago; none: nothing is known.
///
/// A variable of a job that has just started is true, so the pilots that start with it ask at different times within the
/// regular interval. One that is older may not be (a pilot that was restarted, a limit that was changed since), and an
/// unknown limit is wanted: as soon as after a question without an answer.
#[must_use]
pub fn first_delay(pace: &Pace, told: Option<Duration>) -> Duration {
    let soon = FIRST_RETRY.min(pace.poll);
    if told.is_none_or(|ago| ago > FIRST_RETRY) {
        return next_delay(pace, 0, 1, None);
    }
    let regular = pace.spread_out(pace.poll);
    soon + regular.saturating_sub(soon).mul_f64(pace.chance(0))
}

/// A number that differs between jobs and their tasks.
#[must_use]
pub fn seed(job: &str, host: &str, rank: u32) -> u64 {
    hash(&(job, host, rank))
}

fn hash(value: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}

/// How long to wait before question `count`, after `failures` questions in a row without an answer, when `left` remains
/// until the end, where one is known.
///
/// The first task of a job asks every [`POLL`] to 1.1 of it, in a large array once a second in turn with its other jobs. The
/// others together ask about as often as it does, each at least every 30 min. Without answers the waits double up to 15 min; a
/// first task then waits no longer than a tenth of what is left.
#[must_use]
pub fn next_delay(pace: &Pace, count: u64, failures: u32, left: Option<Duration>) -> Duration {
    let first = pace.rank == 0;
    let jitter = pace.chance(count);
    let regular = pace.spread_out(pace.poll);
    if failures == 0 {
        // Never earlier than the poll interval: that is what a site's limit is about.
        let factor = if first { 1.0 + jitter / 10.0 } else { 0.75 + jitter / 2.0 };
        return regular.mul_f64(factor).max(pace.poll);
    }
    let base = if left.is_some() { regular } else { pace.spread_out(FIRST_RETRY.min(pace.poll)) };
    // 2^10 is beyond every bound.
    let doubled = base.saturating_mul(1 << (failures - 1).min(10)).min(BACK_OFF.max(base));
    let bound = match left {
        Some(left) if first => (left / 10).max(pace.spread_out(NEAR_END.min(pace.poll))),
        _ => doubled,
    };
    doubled.min(bound).mul_f64(0.75 + jitter / 4.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn secs(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn pace(rank: u32, nodes: u32) -> Pace {
        Pace { rank, nodes, array: 1, seed: seed("120", "n1", rank), poll: POLL }
    }

    #[test]
    fn pilots_that_start_together_ask_first_at_different_times() {
        let of = |job: u32, array| Pace { array, seed: seed(&job.to_string(), "n1", 0), ..pace(0, 1) };
        let mut tenths = [0; 10];
        for job in 0..1000 {
            let wait = first_delay(&of(job, 1), Some(secs(1)));
            assert!((secs(10)..=POLL).contains(&wait), "{wait:?}");
            tenths[usize::try_from((wait.as_secs() - 10) / 11).unwrap().min(9)] += 1;
            // What is old, or not known at all, is asked for soon.
            assert!(first_delay(&of(job, 1), Some(secs(11))) <= secs(10));
            assert!(first_delay(&of(job, 1), None) <= secs(10));
        }
        assert!(tenths.iter().all(|count| (70..130).contains(count)), "{tenths:?}");
    }

    #[test]
    fn a_large_array_asks_once_a_second_and_a_small_one_as_its_jobs_would() {
        let wait = |array| next_delay(&Pace { array, ..pace(0, 1) }, 1, 0, Some(secs(7200)));
        assert!(wait(100) <= POLL.mul_f64(1.1));
        assert!((secs(1000)..=secs(1100)).contains(&wait(1000)), "{:?}", wait(1000));
        // Nor when it is not answered, as by a limiter, or near its end.
        let unanswered = |left| next_delay(&Pace { array: 1000, ..pace(0, 1) }, 1, 3, Some(secs(left)));
        assert!(unanswered(300) >= secs(700) && unanswered(86_400) >= secs(700));
        assert!((POLL_OF_OTHERS..=POLL_OF_OTHERS.mul_f64(1.1)).contains(&wait(u32::MAX)));
    }

    #[test]
    fn who_is_alone_has_its_turn_at_once_and_no_turn_comes_late() {
        let of = |rank, nodes, array| Pace { array, ..pace(rank, nodes) };
        let hour = Some(secs(3600));
        assert_eq!(of(0, 1, 1).turn_to_ask(3, hour), Duration::ZERO);
        assert_eq!(of(0, 0, 0).turn_to_start(), Duration::ZERO);
        for rank in 0..64 {
            assert!(of(rank, 64, 1).turn_to_ask(3, hour) <= secs(32));
            assert!(of(rank, 64, 1).turn_to_ask(3, Some(secs(20))) <= secs(5));
            assert_eq!(of(rank, 64, 1).turn_to_ask(3, None), Duration::ZERO, "an end is wanted");
            assert!(of(rank, 64, 1).turn_to_start() <= Duration::from_millis(630));
            assert!(of(rank, 64, 1000).turn_to_start() <= START_MOST);
        }
        for (left, half) in [(3600, 15), (80, 10)] {
            let turn = |rank: &u32| of(*rank, 64, 1).turn_to_ask(3, Some(secs(left)));
            let late = (0..64).filter(|rank| turn(rank) > secs(half)).count();
            assert!((20..44).contains(&late), "{late} of 64 in the second half");
        }
    }

    #[test]
    fn waits_grow_without_answers_and_shrink_towards_the_end() {
        let first = pace(0, 1);
        let wait = |failures, left: Option<u64>| next_delay(&first, 1, failures, left.map(secs));
        assert!(wait(1, None) <= secs(10));
        assert!(wait(3, None) > wait(2, None));
        assert!(wait(60, None) <= BACK_OFF && wait(60, None) >= BACK_OFF.mul_f64(0.7));
        assert!(wait(60, Some(3600)) <= secs(360));
        assert!(wait(60, Some(0)) <= secs(30) && wait(60, Some(0)) >= secs(20));
    }

    #[test]
    fn the_tasks_of_a_large_job_do_not_ask_at_once() {
        let waits: Vec<_> =
            (1..100).map(|rank| next_delay(&pace(rank, 100), 0, 0, Some(secs(7200)))).collect();
        assert!(waits.iter().all(|wait| *wait >= secs(1300)), "{waits:?}");
        let distinct: std::collections::BTreeSet<_> = waits.iter().map(Duration::as_secs).collect();
        assert!(distinct.len() > 50, "{distinct:?}");
    }

    proptest! {
        #[test]
        fn waits_stay_within_their_bounds(
            rank in 0u32..3000, nodes in 0u32..3000, count: u64, failures in 0u32..5000, left in proptest::option::of(0u64..10_000_000),
        ) {
            let wait = next_delay(&pace(rank, nodes), count, failures, left.map(secs));
            prop_assert!(wait >= secs(7));
            prop_assert!(wait <= POLL_OF_OTHERS.mul_f64(1.25));
            if failures == 0 {
                prop_assert!(wait >= POLL);
                prop_assert!(rank > 0 || wait <= POLL.mul_f64(1.1));
            }
            if let (0, Some(left)) = (rank, left) && failures > 0 {
                prop_assert!(wait <= secs(left / 10 + 1).max(secs(30)));
            }
        }
    }
}
