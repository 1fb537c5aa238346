//! The deadline: the moment at which the batch system begins to kill. What is known of it, and when to ask again,
//! without any asking; `tracker` does that.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::time::{Duration, SystemTime};

use serde::Serialize;

use super::ask::Answer;
use super::{Allocation, Fact, Task, TimeLimit};

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

/// Ends that differ by no more are the same: what is left is told in whole seconds, of which the question may straddle
/// one or two. The later one is right, since each is computed from before the question.
const SAME: Duration = Duration::from_secs(2);

/// A tick of the clock that comes later than this means that the process or the host stood still.
const GAP: Duration = Duration::from_secs(30);

/// When the batch system (or something else) ends this pilot's time.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Deadline {
    /// The moment.
    #[serde(serialize_with = "super::report::time")]
    pub at: SystemTime,
    /// What tells it.
    pub source: String,
    /// When that was learnt.
    #[serde(serialize_with = "super::report::time")]
    pub learnt: SystemTime,
    /// Whether the last question to the batch system was answered.
    pub confirmed: bool,
}

/// The earliest end of all that are known, and what tells it.
///
/// `signalled` is the end that a warning signal promises. Ends of the same moment: the batch system's word counts.
#[must_use]
pub fn combine(
    batch: &Fact<TimeLimit>,
    walltime_end: Option<SystemTime>,
    credential: Option<SystemTime>,
    signalled: Option<SystemTime>,
) -> Option<Fact<SystemTime>> {
    let batch = match batch.value {
        TimeLimit::Ends(at) => Some(Fact::new(at, batch.source.clone())),
        TimeLimit::Unlimited | TimeLimit::Unknown(_) => None,
    };
    let others = [
        (signalled, "the warning signal and --signal-lead"),
        (walltime_end, "--walltime"),
        (credential, "expiry of the credential"),
    ];
    let others = others.into_iter().filter_map(|(at, source)| Some(Fact::new(at?, source)));
    batch.into_iter().chain(others).min_by_key(|end| end.value)
}

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
/// others together ask about as often as it does, each at least every 30 min. Without answers the waits double up to 15 min; a first task then waits no longer than a tenth of
/// what is left.
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

/// Whether the clock of the wall moved otherwise than the interval between two ticks explains: a suspended host, a
/// stopped process, or a clock that was set.
#[must_use]
pub fn clock_gap(before: SystemTime, now: SystemTime, interval: Duration) -> bool {
    match now.duration_since(before) {
        Ok(passed) => passed > interval + GAP,
        Err(backwards) => backwards.duration() > GAP,
    }
}

/// What changed in the batch system's answering: each is worth one line of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answering {
    /// Nothing.
    Same,
    /// It stopped answering.
    Lost,
    /// It answers again.
    Regained,
}

/// All that is known of the end.
#[derive(Clone, Debug)]
pub(super) struct Known {
    batch: Fact<TimeLimit>,
    learnt: SystemTime,
    failures: u32,
    walltime_end: Option<SystemTime>,
    credential: Option<SystemTime>,
    signalled: Option<SystemTime>,
}

impl Known {
    /// What is known at the start: at `learnt` the batch system's limit was `batch`.
    pub(super) fn new(
        batch: Fact<TimeLimit>,
        learnt: SystemTime,
        walltime_end: Option<SystemTime>,
        credential: Option<SystemTime>,
    ) -> Self {
        let failures = u32::from(matches!(batch.value, TimeLimit::Unknown(_)));
        Self { batch, learnt, failures, walltime_end, credential, signalled: None }
    }

    /// When the credential ends, as it is known now.
    pub(super) fn credential(&mut self, at: Option<SystemTime>) {
        self.credential = at;
    }

    pub(super) fn failures(&self) -> u32 {
        self.failures
    }

    /// The deadline, where there is one.
    pub(super) fn deadline(&self) -> Option<Deadline> {
        let end = combine(&self.batch, self.walltime_end, self.credential, self.signalled)?;
        Some(Deadline {
            at: end.value,
            source: end.source,
            learnt: self.learnt,
            confirmed: self.failures == 0,
        })
    }

    /// The batch system answered. A limit that was lifted clears the end; an end clears what a signal promised.
    pub(super) fn answered(&mut self, answer: Answer, now: SystemTime) -> Answering {
        let same = match (&self.batch.value, &answer.limit) {
            (TimeLimit::Ends(known), TimeLimit::Ends(told)) => {
                let difference = known.duration_since(*told).or_else(|_| told.duration_since(*known));
                difference.is_ok_and(|difference| difference <= SAME) && known >= told
            }
            _ => false,
        };
        if !same {
            self.batch = Fact::new(answer.limit, answer.source);
        }
        if matches!(self.batch.value, TimeLimit::Ends(_)) {
            self.signalled = None;
        }
        self.learnt = now;
        let before = std::mem::take(&mut self.failures);
        if before > 0 { Answering::Regained } else { Answering::Same }
    }

    /// The batch system did not answer: what is known holds.
    pub(super) fn unanswered(&mut self) -> Answering {
        let before = self.failures;
        self.failures = before.saturating_add(1);
        if before == 0 { Answering::Lost } else { Answering::Same }
    }

    /// The batch system's warning signal came. It counts where the batch system tells no end (it does not answer, or
    /// knows of no limit), and the first one counts: a second one is no longer life.
    pub(super) fn signalled(&mut self, now: SystemTime, lead: Option<Duration>) {
        if matches!(self.batch.value, TimeLimit::Ends(_)) || self.signalled.is_some() {
            return;
        }
        if let Some(end) = lead.and_then(|lead| now.checked_add(lead)) {
            self.signalled = Some(end);
            self.learnt = now;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::time::UNIX_EPOCH;

    fn at(seconds: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(seconds)
    }

    fn secs(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn ends(seconds: u64) -> Answer {
        Answer { limit: TimeLimit::Ends(at(seconds)), source: "squeue %L".to_owned() }
    }

    fn unlimited() -> Answer {
        Answer { limit: TimeLimit::Unlimited, source: "squeue %L".to_owned() }
    }

    fn known(limit: TimeLimit) -> Known {
        Known::new(Fact::new(limit, "batch"), at(0), None, None)
    }

    #[test]
    fn the_earliest_end_is_the_deadline() {
        let batch = |limit| Fact::new(limit, "batch");
        let table = [
            (TimeLimit::Ends(at(100)), None, None, None, Some((100, "batch"))),
            (TimeLimit::Ends(at(100)), Some(90), None, None, Some((90, "--walltime"))),
            (TimeLimit::Ends(at(100)), Some(100), Some(100), None, Some((100, "batch"))),
            (TimeLimit::Ends(at(100)), Some(200), Some(50), None, Some((50, "expiry of the credential"))),
            (TimeLimit::Unlimited, None, None, None, None),
            (TimeLimit::Unknown("x".into()), Some(90), None, None, Some((90, "--walltime"))),
            (
                TimeLimit::Unlimited,
                Some(90),
                None,
                Some(30),
                Some((30, "the warning signal and --signal-lead")),
            ),
        ];
        for (limit, walltime, credential, signal, expected) in table {
            let end = combine(&batch(limit.clone()), walltime.map(at), credential.map(at), signal.map(at));
            let expected = expected.map(|(seconds, source)| Fact::new(at(seconds), source));
            assert_eq!(end, expected, "{limit:?}");
        }
    }

    #[test]
    fn a_moved_limit_is_followed_both_ways_and_a_lifted_one_clears() {
        let mut known = known(TimeLimit::Ends(at(1000)));
        for (answer, end) in [(ends(500), Some(500)), (ends(2000), Some(2000)), (unlimited(), None)] {
            known.answered(answer, at(10));
            assert_eq!(known.deadline().map(|deadline| deadline.at), end.map(at));
        }
    }

    #[test]
    fn an_end_that_wavers_by_a_second_stands_still() {
        let mut known = known(TimeLimit::Ends(at(1000)));
        for told in [999, 998, 1000, 999] {
            known.answered(ends(told), at(10));
            assert_eq!(known.deadline().unwrap().at, at(1000));
        }
        known.answered(ends(1001), at(10));
        assert_eq!(known.deadline().unwrap().at, at(1001));
        known.answered(ends(997), at(10));
        assert_eq!(known.deadline().unwrap().at, at(997));
    }

    #[test]
    fn without_an_answer_the_last_end_holds_and_one_line_says_so() {
        let mut known = known(TimeLimit::Ends(at(1000)));
        assert_eq!(known.unanswered(), Answering::Lost);
        assert_eq!(known.unanswered(), Answering::Same);
        let deadline = known.deadline().unwrap();
        assert_eq!((deadline.at, deadline.confirmed), (at(1000), false));
        assert_eq!(known.answered(ends(1000), at(50)), Answering::Regained);
        let deadline = known.deadline().unwrap();
        assert_eq!((deadline.confirmed, deadline.learnt), (true, at(50)));
        assert_eq!(known.answered(ends(1000), at(60)), Answering::Same);
    }

    #[test]
    fn a_signal_makes_an_end_only_where_none_is_known() {
        let mut informed = known(TimeLimit::Ends(at(1000)));
        informed.signalled(at(10), Some(secs(60)));
        assert_eq!(informed.deadline().unwrap().at, at(1000));

        let mut blind = known(TimeLimit::Unknown("no squeue".into()));
        blind.signalled(at(10), None);
        assert_eq!(blind.deadline(), None);
        blind.signalled(at(10), Some(secs(60)));
        blind.signalled(at(40), Some(secs(60)));
        assert_eq!(blind.deadline().unwrap().at, at(70));
        assert!(!blind.deadline().unwrap().confirmed);
        // The batch system says that there is no limit: the promise holds.
        blind.answered(unlimited(), at(50));
        assert_eq!(blind.deadline().unwrap().at, at(70));
        // It says when: that counts.
        blind.answered(ends(500), at(55));
        assert_eq!(blind.deadline().unwrap().at, at(500));
    }

    #[test]
    fn a_signal_counts_beside_a_walltime_of_ours() {
        let unknown = Fact::new(TimeLimit::Unknown("x".into()), "batch");
        let mut known = Known::new(unknown, at(0), Some(at(1000)), None);
        known.signalled(at(10), Some(secs(60)));
        assert_eq!(known.deadline().unwrap().at, at(70));
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

    #[test]
    fn a_late_tick_and_a_clock_that_was_set_are_gaps() {
        let tick = secs(5);
        assert!(!clock_gap(at(100), at(105), tick));
        assert!(!clock_gap(at(100), at(135), tick));
        assert!(clock_gap(at(100), at(136), tick));
        assert!(!clock_gap(at(100), at(90), tick));
        assert!(clock_gap(at(100), at(60), tick));
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
