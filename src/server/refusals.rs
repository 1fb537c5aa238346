//! How often the log says that a request was refused: any user of the host can cause it.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Refusals that are logged in a minute; of more, only their number: any user of the host can cause them.
const REFUSALS: u32 = 10;

/// How many refusals were logged in this minute.
#[derive(Default)]
pub struct Refusals(Mutex<Option<(Instant, u32, u32)>>);

impl Refusals {
    /// Whether this one is logged: then, how many were not before it.
    pub fn note(&self, now: Instant) -> Option<u32> {
        let mut window = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (begin, logged, suppressed) = window.get_or_insert((now, 0, 0));
        if now.duration_since(*begin) >= Duration::from_secs(60) {
            (*begin, *logged) = (now, 0);
        }
        if *logged >= REFUSALS {
            *suppressed += 1;
            return None;
        }
        *logged += 1;
        Some(std::mem::take(suppressed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_of_refusals_does_not_fill_the_jobs_output() {
        let refusals = Refusals::default();
        let now = Instant::now();
        let logged = (0..1000).filter(|_| refusals.note(now).is_some()).count();
        assert_eq!(logged, 10);
        assert_eq!(refusals.note(now + Duration::from_secs(61)), Some(990));
    }
}
