//! How often probes succeeded and failed, for `/metrics/probes`.

use std::sync::atomic::{AtomicU64, Ordering};

use super::{Kind, Verdict};

/// The probes of one container, over all its runs that this pilot has seen.
#[derive(Debug, Default)]
pub struct Tally {
    counts: [[AtomicU64; 2]; 3],
}

impl Tally {
    /// A probe has come to a verdict. One that went wrong itself is not counted (worker.go, doProbe).
    pub(super) fn count(&self, kind: Kind, verdict: Verdict) {
        self.counts[kind as usize][verdict as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// What was counted, by the values of the labels `probe_type` and `result`; what never happened is left out
    /// (prober_manager.go, ProberResults).
    pub fn counted(&self) -> impl Iterator<Item = (&'static str, &'static str, u64)> {
        let kinds = [Kind::Startup, Kind::Liveness, Kind::Readiness];
        let verdicts = [(Verdict::Success, "successful"), (Verdict::Failure, "failed")];
        kinds
            .into_iter()
            .flat_map(move |kind| verdicts.map(|(verdict, result)| (kind, verdict, result)))
            .map(|(kind, verdict, result)| {
                let count = self.counts[kind as usize][verdict as usize].load(Ordering::Relaxed);
                (kind.name(), result, count)
            })
            .filter(|(_, _, count)| *count > 0)
    }
}

#[cfg(test)]
impl Tally {
    /// Of two liveness probes and one for readiness.
    pub(crate) fn example() -> Self {
        let tally = Self::default();
        tally.count(Kind::Liveness, Verdict::Success);
        tally.count(Kind::Liveness, Verdict::Success);
        tally.count(Kind::Readiness, Verdict::Failure);
        tally
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn verdicts_are_counted_by_kind() {
        let tally = Tally::default();
        assert_eq!(tally.counted().count(), 0);
        tally.count(Kind::Readiness, Verdict::Failure);
        tally.count(Kind::Readiness, Verdict::Failure);
        tally.count(Kind::Liveness, Verdict::Success);
        tally.count(Kind::Startup, Verdict::Failure);
        let wanted = [("Startup", "failed", 1), ("Liveness", "successful", 1), ("Readiness", "failed", 2)];
        assert_eq!(tally.counted().collect::<Vec<_>>(), wanted);
    }
}
