//! The states of a container that the worker makes.

use std::time::SystemTime;

use jiff::Timestamp;

use crate::container::End;
use crate::pod::record::ContainerRecord;
use crate::pod::status::{State, Terminated};

/// It does not run yet, or not again yet.
pub(super) fn waiting(reason: &str, message: &str) -> State {
    State::Waiting { reason: reason.to_owned(), message: message.to_owned() }
}

/// Whether it has ended.
pub(super) fn is_over(state: &State) -> bool {
    matches!(state, State::Terminated(_))
}

/// A moment of the system clock.
pub(super) fn timestamp(at: SystemTime) -> Timestamp {
    Timestamp::try_from(at).unwrap_or_else(|_| Timestamp::now())
}

/// The end that the supervisor saw, and the container's termination message.
pub(super) fn ended(end: &End, last_word: &str, id: String) -> Terminated {
    let stuck =
        || format!("processes in uninterruptible sleep could not be ended: {}", end.survivors.join(", "));
    let message = match (end.survivors.is_empty(), last_word) {
        (true, word) => word.to_owned(),
        (false, "") => stuck(),
        (false, word) => format!("{}: {word}", stuck()),
    };
    Terminated {
        exit_code: end.exit_code,
        signal: end.signal,
        reason: None,
        message,
        started_at: Some(timestamp(end.started_at)),
        finished_at: timestamp(end.finished_at),
        id,
    }
}

/// The end of a run of which nobody saw the end: it began when it was last seen to run.
pub(super) fn unknown_end(reason: &str, message: &str, record: &ContainerRecord, id: String) -> State {
    let started_at = match &record.state {
        State::Running { started_at, .. } => Some(*started_at),
        State::Waiting { .. } | State::Terminated(_) => None,
    };
    State::Terminated(Terminated {
        exit_code: 137,
        signal: None,
        reason: Some(reason.to_owned()),
        message: message.to_owned(),
        started_at,
        finished_at: Timestamp::now(),
        id,
    })
}
