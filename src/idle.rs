//! Hours that nobody uses are given back: since when no pod has run, and whether that is long enough to leave.
//!
//! [`Idle::look`] decides; `commands::run` looks, and ends the pilot once the Node is cordoned and still nobody came.

use std::fmt;
use std::time::{Duration, Instant, SystemTime};

/// Of the time between two looks so much counts at most. The pilot looks each half minute; where more is between, it was
/// stopped (a suspended job), and no pod could come meanwhile.
const LONGEST_GAP: Duration = Duration::from_secs(60);

/// An idle time is worth a write to disk once it has lasted so long: pods that follow each other closely cost none.
const WORTH_KEEPING: Duration = Duration::from_secs(10);

/// How long a pilot stays without work; `None` is for ever.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Limits {
    /// Since the last pod ended (`--idle-timeout`).
    pub after: Option<Duration>,
    /// Since the pilot can take pods, where none ever came (`--idle-timeout-first`).
    pub first: Option<Duration>,
}

impl Limits {
    /// The limits that the settings make: 0 is for ever.
    #[must_use]
    pub fn new(after: Duration, first: Duration) -> Self {
        let set = |limit: Duration| Some(limit).filter(|limit| !limit.is_zero());
        Self { after: set(after), first: set(first) }
    }
}

/// What of the idle time outlives a crash of the pilot.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Kept {
    /// Whether a pod ever ran.
    pub ran: bool,
    /// Since when none runs; `None` when one did, or not for long.
    pub since: Option<SystemTime>,
}

/// What a look finds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Look {
    /// There is work.
    Busy,
    /// There is none, and it is to be waited for: so long at most, for ever where it is not said.
    Waiting(Option<Duration>),
    /// There has been none for long enough.
    Over(Rest),
}

/// An idle time that was long enough.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rest {
    /// How long nobody worked.
    pub idle: Duration,
    /// Whether somebody ever did.
    pub ran: bool,
}

impl fmt::Display for Rest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (what, setting) =
            if self.ran { ("ran", "--idle-timeout") } else { ("came", "--idle-timeout-first") };
        write!(f, "no pod {what} for {} s ({setting})", self.idle.as_secs())
    }
}

/// The clock of the idle time. It goes by the monotonic clock, so a wall clock that is set moves nothing.
#[derive(Debug)]
pub struct Idle {
    limits: Limits,
    ran: bool,
    /// Whether there was work at the last look.
    busy: bool,
    /// So far; none while there is work.
    idle: Duration,
    looked: Instant,
    kept: Kept,
}

impl Idle {
    /// A clock that begins now, or goes on from what was kept before a crash; `None` where no limit is set.
    #[must_use]
    pub fn new(limits: Limits, kept: Kept, wall: SystemTime, now: Instant) -> Option<Self> {
        if limits == Limits::default() {
            return None;
        }
        let idle = kept.since.and_then(|since| wall.duration_since(since).ok()).unwrap_or_default();
        Some(Self { limits, ran: kept.ran, busy: false, idle, looked: now, kept })
    }

    /// Looks, whether there is work or not.
    pub fn look(&mut self, work: bool, now: Instant) -> Look {
        let gap = now.saturating_duration_since(self.looked).min(LONGEST_GAP);
        self.looked = now;
        if work {
            (self.ran, self.busy, self.idle) = (true, true, Duration::ZERO);
            return Look::Busy;
        }
        // The pilot looks when a pod ends.
        if !std::mem::take(&mut self.busy) {
            self.idle = self.idle.saturating_add(gap);
        }
        let limit = if self.ran { self.limits.after } else { self.limits.first };
        match limit {
            Some(limit) if self.idle >= limit => Look::Over(Rest { idle: self.idle, ran: self.ran }),
            limit => Look::Waiting(limit.map(|limit| limit.saturating_sub(self.idle))),
        }
    }

    /// What is to be written for the pilot after a crash, where that is something else than at the last call.
    pub fn to_keep(&mut self, wall: SystemTime) -> Option<Kept> {
        let since = (self.idle >= WORTH_KEEPING).then(|| wall.checked_sub(self.idle)).flatten();
        let differs = self.ran != self.kept.ran || since.is_some() != self.kept.since.is_some();
        differs.then(|| {
            self.kept = Kept { ran: self.ran, since };
            self.kept
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    const NEW: Kept = Kept { ran: false, since: None };

    struct Case {
        idle: Idle,
        start: Instant,
    }

    impl Case {
        fn new(after: u64, first: u64, kept: Kept, wall: SystemTime) -> Self {
            let start = Instant::now();
            Self { idle: Idle::new(Limits::new(s(after), s(first)), kept, wall, start).unwrap(), start }
        }

        fn look(&mut self, work: bool, at: u64) -> Look {
            self.idle.look(work, self.start + s(at))
        }
    }

    const fn over(idle: u64, ran: bool) -> Look {
        Look::Over(Rest { idle: s(idle), ran })
    }

    #[test]
    fn without_limits_there_is_no_clock() {
        let now = Instant::now();
        assert!(Idle::new(Limits::new(s(0), s(0)), NEW, SystemTime::UNIX_EPOCH, now).is_none());
    }

    #[test]
    fn the_clock_begins_anew_with_each_end() {
        let mut case = Case::new(50, 100, NEW, SystemTime::UNIX_EPOCH);
        assert_eq!(case.look(false, 40), Look::Waiting(Some(s(60))));
        assert_eq!(case.look(true, 50), Look::Busy);
        assert_eq!(case.look(true, 110), Look::Busy);
        assert_eq!(case.look(false, 120), Look::Waiting(Some(s(50))));
        assert_eq!(case.look(false, 169), Look::Waiting(Some(s(1))));
        assert_eq!(case.look(true, 170), Look::Busy);
        assert_eq!(case.look(false, 171), Look::Waiting(Some(s(50))));
        assert_eq!(case.look(false, 221), over(50, true));
        // It stays over until there is work.
        assert_eq!(case.look(false, 227), over(56, true));
        assert_eq!(case.look(true, 228), Look::Busy);
        assert_eq!(case.look(false, 229), Look::Waiting(Some(s(50))));
    }

    #[test]
    fn each_limit_holds_for_its_own_time_alone() {
        let mut first = Case::new(0, 30, NEW, SystemTime::UNIX_EPOCH);
        assert_eq!(first.look(false, 30), over(30, false));
        assert_eq!(first.look(true, 31), Look::Busy);
        assert_eq!(first.look(false, 60), Look::Waiting(None));
        assert_eq!(first.look(false, 90), Look::Waiting(None));
        let mut after = Case::new(30, 0, NEW, SystemTime::UNIX_EPOCH);
        assert_eq!(after.look(false, 60), Look::Waiting(None));
        assert_eq!(after.look(true, 61), Look::Busy);
        assert_eq!(after.look(false, 62), Look::Waiting(Some(s(30))));
        assert_eq!(after.look(false, 92), over(30, true));
        let said = |ran| Rest { idle: s(90), ran }.to_string();
        assert_eq!(said(true), "no pod ran for 90 s (--idle-timeout)");
        assert_eq!(said(false), "no pod came for 90 s (--idle-timeout-first)");
    }

    #[test]
    fn time_in_which_the_pilot_was_stopped_hardly_counts() {
        let mut case = Case::new(3600, 3600, NEW, SystemTime::UNIX_EPOCH);
        assert_eq!(case.look(false, 10_000), Look::Waiting(Some(s(3540))));
        // A clock that went backwards counts nothing.
        assert_eq!(case.look(false, 9000), Look::Waiting(Some(s(3540))));
    }

    #[test]
    fn after_a_crash_the_clock_goes_on() {
        let wall = SystemTime::UNIX_EPOCH + s(1_000_000);
        let since = |ago: u64, ran| Kept { ran, since: Some(wall - s(ago)) };
        assert_eq!(Case::new(100, 200, since(60, true), wall).look(false, 10), Look::Waiting(Some(s(30))));
        assert_eq!(Case::new(100, 200, since(60, false), wall).look(false, 10), Look::Waiting(Some(s(130))));
        assert_eq!(Case::new(100, 200, since(500, true), wall).look(false, 0), over(500, true));
        // A wall clock that was set back, and pods that ran to the end.
        let ahead = Kept { ran: true, since: Some(wall + s(60)) };
        assert_eq!(Case::new(100, 200, ahead, wall).look(false, 10), Look::Waiting(Some(s(90))));
        let busy = Kept { ran: true, since: None };
        assert_eq!(Case::new(100, 200, busy, wall).look(false, 10), Look::Waiting(Some(s(90))));
    }

    #[test]
    fn what_is_kept_changes_with_what_matters_and_never_says_longer_than_it_is() {
        let wall = SystemTime::UNIX_EPOCH + s(1_000_000);
        let mut case = Case::new(100, 100, NEW, wall);
        let mut step = |work, at| {
            case.look(work, at);
            case.idle.to_keep(wall + s(at))
        };
        assert_eq!(step(false, 9), None);
        assert_eq!(step(false, 10), Some(Kept { ran: false, since: Some(wall) }));
        assert_eq!(step(false, 30), None);
        // The first pod is kept at once: a crash must not make it one that never came.
        assert_eq!(step(true, 31), Some(Kept { ran: true, since: None }));
        // Pods that follow each other closely.
        assert_eq!(step(false, 35), None);
        assert_eq!(step(true, 36), None);
        assert_eq!(step(false, 37), None);
        assert_eq!(step(false, 60), Some(Kept { ran: true, since: Some(wall + s(37)) }));
        // What was kept of the idle time before must not count for the next.
        assert_eq!(step(true, 61), Some(Kept { ran: true, since: None }));
    }
}
