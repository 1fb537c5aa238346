//! The deadline: the moment at which the batch system begins to kill, and what is known of it. `pace` says when to ask again,
//! and `tracker` asks.

use std::time::{Duration, SystemTime};

use serde::Serialize;

use super::ask::Answer;
use super::{Fact, TimeLimit};

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

    #[test]
    fn a_late_tick_and_a_clock_that_was_set_are_gaps() {
        let tick = secs(5);
        assert!(!clock_gap(at(100), at(105), tick));
        assert!(!clock_gap(at(100), at(135), tick));
        assert!(clock_gap(at(100), at(136), tick));
        assert!(!clock_gap(at(100), at(90), tick));
        assert!(clock_gap(at(100), at(60), tick));
    }
}
