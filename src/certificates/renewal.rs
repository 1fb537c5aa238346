//! When a certificate is to be replaced by a newer one.
//!
//! [`plan`] decides; whoever keeps a certificate asks it again after each wait.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::time::{Duration, SystemTime};

use super::pair::Validity;

/// Longest wait before it is looked at again: a host may be suspended, and a deadline may move.
const LOOK_EVERY: Duration = Duration::from_secs(60);

/// A certificate that holds so long beyond the deadline will do: what is left to be said takes seconds.
const SPARE: Duration = Duration::from_secs(300);

/// What is to be done about a certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Plan {
    /// Nothing for so long.
    Wait(Duration),
    /// Ask for the next.
    Renew,
}

/// Between 70 and 90 % of a certificate's life (client-go's, `util/certificate/certificate_manager.go`): `chance` from 0 to
/// 1000 is its jitter, drawn once for each certificate. One that outlives the deadline is never replaced.
#[must_use]
pub fn plan(validity: Validity, deadline: Option<SystemTime>, now: SystemTime, chance: u32) -> Plan {
    let life = validity.until.duration_since(validity.from).unwrap_or_default();
    let permille = 700 + chance.min(1000) / 5;
    let at = validity.from.checked_add(life / 1000 * permille).unwrap_or(validity.until);
    let wait = at.duration_since(now).unwrap_or_default();
    let enough = deadline.and_then(|d| d.checked_add(SPARE)).is_some_and(|end| validity.until >= end);
    if wait > Duration::ZERO {
        Plan::Wait(wait.min(LOOK_EVERY))
    } else if enough {
        Plan::Wait(LOOK_EVERY)
    } else {
        Plan::Renew
    }
}

/// A number from 0 to 999, by chance: std seeds each RandomState anew.
#[must_use]
pub fn chance() -> u32 {
    u32::try_from(RandomState::new().build_hasher().finish() % 1000).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(second)
    }

    #[test]
    fn a_certificate_is_renewed_between_70_and_90_percent_of_its_life() {
        let life = Validity { from: at(0), until: at(10_000) };
        let look = Plan::Wait(LOOK_EVERY);
        assert_eq!(plan(life, None, at(100), 0), look);
        assert_eq!(plan(life, None, at(6_990), 0), Plan::Wait(Duration::from_secs(10)));
        assert_eq!(plan(life, None, at(7_000), 0), Plan::Renew);
        assert_eq!(plan(life, None, at(8_900), 1000), look);
        assert_eq!(plan(life, None, at(9_000), 1000), Plan::Renew);
        assert_eq!(plan(life, None, at(20_000), 500), Plan::Renew);
    }

    #[test]
    fn one_that_outlives_the_deadline_is_left_until_the_deadline_moves() {
        let life = Validity { from: at(0), until: at(10_000) };
        assert_eq!(plan(life, Some(at(9_700)), at(8_000), 0), Plan::Wait(LOOK_EVERY));
        assert_eq!(plan(life, Some(at(9_701)), at(8_000), 0), Plan::Renew);
    }
}
