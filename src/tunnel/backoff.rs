//! How long a tunnel that failed is left alone: a schedule, and the chance that keeps many pilots apart.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::time::Duration;

/// The wait after the first failure. sshd's own start takes less.
const FIRST: Duration = Duration::from_secs(1);

/// The longest wait. A login host that was rebooted is used again within it; one that counts failed logins (fail2ban's
/// default is 5 in 10 minutes) sees at most ten in that time.
const MOST: Duration = Duration::from_secs(60);

/// A tunnel that was up for so long starts anew; one that falls at once each time does not.
pub const STEADY: Duration = Duration::from_secs(60);

/// The wait after `failures` failures in a row before the last one: doubled each time up to [`MOST`], of which between
/// half and all is taken, by `chance` in 0..1: a login host that comes back is not met by all pilots of a job at once.
#[must_use]
pub fn delay(failures: u32, chance: f64) -> Duration {
    let doubled = FIRST.saturating_mul(1u32.checked_shl(failures.min(16)).unwrap_or(u32::MAX)).min(MOST);
    doubled.mul_f64(0.5 + chance.clamp(0.0, 1.0) / 2.0)
}

/// A number in 0..1 that differs each time.
#[must_use]
pub fn chance() -> f64 {
    // std seeds each RandomState anew: enough chance for a jitter, without a crate for it.
    let bits = u32::try_from(RandomState::new().build_hasher().finish() >> 32).unwrap_or_default();
    f64::from(bits) / f64::from(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_a_minute() {
        let seconds: Vec<_> = (0..8).map(|failures| delay(failures, 1.0).as_secs()).collect();
        assert_eq!(seconds, [1, 2, 4, 8, 16, 32, 60, 60]);
        assert_eq!(delay(u32::MAX, 1.0), MOST);
    }

    #[test]
    fn chance_takes_between_half_and_all() {
        assert_eq!(delay(3, 0.0), Duration::from_secs(4));
        for _ in 0..100 {
            let wait = delay(3, chance());
            assert!(wait >= Duration::from_secs(4) && wait <= Duration::from_secs(8), "{wait:?}");
        }
        assert_ne!(chance(), chance());
    }
}
