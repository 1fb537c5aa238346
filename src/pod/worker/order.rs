//! In which order the containers of a pod start and end: decided, as values.
//!
//! Sources: `computeInitContainerActions` and `computePodActions` (kuberuntime), `kuberuntime_termination_order.go`.

use crate::pod::containers::Kind;

/// What a container does, as far as others wait for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// It has not run yet, or is due to run again.
    Due,
    /// It has ended and runs again after a while.
    BackOff,
    /// It runs, or is being started.
    Runs {
        /// Whether what comes after it may start.
        started: bool,
    },
    /// It has ended and does not run again.
    Over {
        /// Whether by exit code 0.
        succeeded: bool,
    },
}

/// The containers of a pod in their order ([`crate::pod::containers::all`]).
pub type Line = Vec<(Kind, Standing)>;

/// Which of those that are due may start now. Of the containers before `passed` nobody waits for any, since one that came
/// after them has begun already: none of them runs again but sidecars.
pub fn startable(line: &Line, passed: usize) -> Vec<usize> {
    let (mut may, mut open) = (Vec::new(), true);
    for (index, (kind, standing)) in line.iter().enumerate() {
        let due = *standing == Standing::Due;
        match kind {
            Kind::Init if index < passed => {}
            Kind::Sidecar if index < passed => may.extend(due.then_some(index)),
            Kind::Init => {
                may.extend((due && open).then_some(index));
                open &= *standing == Standing::Over { succeeded: true };
            }
            Kind::Sidecar => {
                may.extend((due && open).then_some(index));
                open &= *standing == Standing::Runs { started: true };
            }
            Kind::Main => may.extend((due && open).then_some(index)),
            // Also while the pod is still being initialized, or can never be: that is when one wants to look.
            Kind::Ephemeral => may.extend(due.then_some(index)),
        }
    }
    may
}

/// Whether the pod's work is over, so that what still runs of it (sidecars, ephemeral containers) is to end: an init
/// container has failed for good, or no main container runs or will.
pub fn is_complete(line: &Line) -> bool {
    let failed = |(kind, standing): &(Kind, Standing)| {
        *kind == Kind::Init && *standing == Standing::Over { succeeded: false }
    };
    let mut main = line.iter().filter(|(kind, _)| *kind == Kind::Main);
    line.iter().any(failed) || main.all(|(_, standing)| matches!(standing, Standing::Over { .. }))
}

/// Which of the containers that run may be sent their stop signal now that the pod ends: a sidecar waits for the main
/// containers, and for the sidecars after it.
pub fn may_end(line: &Line) -> Vec<usize> {
    let runs = |standing: &Standing| matches!(standing, Standing::Runs { .. });
    let main = line.iter().any(|(kind, standing)| *kind == Kind::Main && runs(standing));
    let last = line.iter().rposition(|(kind, standing)| *kind == Kind::Sidecar && runs(standing));
    let turn = |(index, (kind, standing)): &(usize, &(Kind, Standing))| {
        runs(standing) && (*kind != Kind::Sidecar || !main && last == Some(*index))
    };
    line.iter().enumerate().filter(turn).map(|(index, _)| index).collect()
}

#[cfg(test)]
mod tests {
    use super::Standing::{BackOff, Due, Over, Runs};
    use super::*;

    const STARTED: Standing = Runs { started: true };
    const STARTING: Standing = Runs { started: false };
    const DONE: Standing = Over { succeeded: true };
    const FAILED: Standing = Over { succeeded: false };

    fn line(standings: [Standing; 6]) -> Line {
        let kinds = [Kind::Init, Kind::Sidecar, Kind::Init, Kind::Main, Kind::Main, Kind::Ephemeral];
        kinds.into_iter().zip(standings).collect()
    }

    #[test]
    fn containers_start_one_after_another_until_all_is_initialized() {
        let cases: [([Standing; 6], usize, &[usize]); 17] = [
            ([Due, Due, Due, Due, Due, DONE], 0, &[0]),
            ([STARTED, Due, Due, Due, Due, DONE], 0, &[]),
            ([BackOff, Due, Due, Due, Due, DONE], 0, &[]),
            ([FAILED, Due, Due, Due, Due, DONE], 0, &[]),
            ([DONE, Due, Due, Due, Due, DONE], 0, &[1]),
            ([DONE, STARTING, Due, Due, Due, DONE], 0, &[]),
            ([DONE, STARTED, Due, Due, Due, DONE], 0, &[2]),
            ([DONE, STARTED, DONE, Due, Due, DONE], 0, &[3, 4]),
            // A sidecar that failed before all was initialized is waited for again.
            ([DONE, BackOff, Due, Due, Due, DONE], 0, &[]),
            // Afterwards each goes by itself, and init containers never run again.
            ([DONE, BackOff, DONE, Due, STARTED, DONE], 3, &[3]),
            ([DONE, Due, DONE, STARTED, Due, DONE], 3, &[1, 4]),
            ([Due, Due, Due, STARTED, STARTED, DONE], 3, &[1]),
            // Whoever debugs waits for nobody.
            ([FAILED, Due, Due, Due, Due, Due], 0, &[5]),
            // What has begun after a sidecar does not wait for it again.
            ([DONE, BackOff, Due, Due, Due, DONE], 2, &[2]),
            ([DONE, Due, BackOff, Due, Due, DONE], 2, &[1]),
            ([DONE, BackOff, DONE, Due, Due, DONE], 2, &[3, 4]),
            ([DONE, BackOff, FAILED, Due, Due, DONE], 2, &[]),
        ];
        for (standings, passed, wanted) in cases {
            assert_eq!(startable(&line(standings), passed), wanted, "{standings:?}");
        }
    }

    #[test]
    fn the_work_is_over_when_nothing_of_it_runs_or_will() {
        let cases = [
            ([Due, Due, Due, Due, Due, Due], false),
            ([FAILED, Due, Due, Due, Due, Due], true),
            ([BackOff, Due, Due, Due, Due, Due], false),
            ([DONE, STARTED, FAILED, Due, Due, Due], true),
            ([DONE, STARTED, DONE, DONE, STARTED, STARTED], false),
            ([DONE, STARTED, DONE, DONE, BackOff, STARTED], false),
            ([DONE, STARTED, DONE, DONE, FAILED, STARTED], true),
            ([DONE, BackOff, DONE, DONE, DONE, DONE], true),
        ];
        for (standings, wanted) in cases {
            assert_eq!(is_complete(&line(standings)), wanted, "{standings:?}");
        }
    }

    #[test]
    fn sidecars_end_last_and_in_reverse() {
        let kinds = [Kind::Sidecar, Kind::Init, Kind::Sidecar, Kind::Main, Kind::Ephemeral];
        let cases: [([Standing; 5], &[usize]); 5] = [
            ([STARTED, DONE, STARTED, STARTED, STARTED], &[3, 4]),
            ([STARTED, DONE, STARTED, DONE, STARTED], &[2, 4]),
            ([STARTED, DONE, DONE, DONE, DONE], &[0]),
            // Before all was initialized, the init container that runs ends at once.
            ([STARTED, STARTED, Due, Due, Due], &[0, 1]),
            ([BackOff, DONE, STARTED, Due, Due], &[2]),
        ];
        for (standings, wanted) in cases {
            let line: Line = kinds.into_iter().zip(standings).collect();
            assert_eq!(may_end(&line), wanted, "{standings:?}");
        }
    }
}
