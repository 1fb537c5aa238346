//! When a service account's token is replaced (`pkg/kubelet/token/token_manager.go`).

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};

use super::chance;

/// No token is used for longer than this (maxTTL).
const MOST: SignedDuration = SignedDuration::from_hours(24);
/// The most that is taken from its time by chance, so that not all pods of a Node ask at once (maxJitter).
const JITTER: Duration = Duration::from_secs(10);
/// Between tries after a failure. A kubelet tries when it looks at the pod again, after 60 s to 90 s.
const RETRY: SignedDuration = SignedDuration::from_secs(30);

/// A token and when another should take its place.
pub struct HeldToken {
    /// The token.
    pub token: String,
    expires: Option<Timestamp>,
    refresh_at: Option<Timestamp>,
}

impl std::fmt::Debug for HeldToken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HeldToken").field("expires", &self.expires).finish_non_exhaustive()
    }
}

impl HeldToken {
    /// A token that was just given, for so many seconds. One of which nobody says when it ends is not replaced; none is
    /// replaced at once, however wrong the clock of this host is.
    #[must_use]
    pub fn new(token: String, expires: Option<Timestamp>, life: i64, now: Timestamp) -> Self {
        let jitter = JITTER.mul_f64(chance());
        let refresh_at = expires.map(|expires| refresh_at(expires, life, jitter).max(later(now, RETRY)));
        Self { token, expires, refresh_at }
    }

    /// Whether it is time for another.
    #[must_use]
    pub fn is_due(&self, now: Timestamp) -> bool {
        self.refresh_at.is_some_and(|at| now >= at)
    }

    /// When it is time for another.
    #[must_use]
    pub fn refresh_at(&self) -> Option<Timestamp> {
        self.refresh_at
    }

    pub(super) fn is_expired(&self, now: Timestamp) -> bool {
        self.expires.is_some_and(|expires| now > expires)
    }

    /// The next try after one that failed.
    pub(super) fn try_later(&mut self, now: Timestamp) {
        self.refresh_at = Some(later(now, RETRY));
    }
}

fn later(from: Timestamp, by: SignedDuration) -> Timestamp {
    from.checked_add(by).unwrap_or(Timestamp::MAX)
}

/// When a token that ends at `expires` and lives for `life` seconds is replaced: when 80 % of its life are over, or after
/// a day, whichever comes first (requiresRefresh).
fn refresh_at(expires: Timestamp, life: i64, jitter: Duration) -> Timestamp {
    let jitter = SignedDuration::try_from(jitter).unwrap_or(SignedDuration::ZERO);
    let back = |by: SignedDuration| expires.checked_sub(by).unwrap_or(Timestamp::MIN);
    let issued = back(SignedDuration::from_secs(life));
    let by_age = later(issued, MOST.saturating_sub(jitter));
    let by_life = back(SignedDuration::from_secs(life.saturating_mul(20) / 100).saturating_add(jitter));
    by_age.min(by_life)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_replaced_at_80_percent_of_its_life_or_after_a_day() {
        let issued: Timestamp = "2026-01-01T00:00:00Z".parse().unwrap();
        for (life, jitter, wanted) in [
            (600, 0, 480),
            (600, 10, 470),
            (3607, 0, 3607 - 721),
            (100_000, 0, 80_000),
            (86_400 * 2, 0, 86_400),
            (86_400 * 2, 5, 86_395),
        ] {
            let expires = issued + SignedDuration::from_secs(life);
            let at = refresh_at(expires, life, Duration::from_secs(jitter));
            assert_eq!(at.duration_since(issued).as_secs(), wanted, "{life} {jitter}");
        }
        assert!(refresh_at(issued, i64::MAX, JITTER) <= issued, "no overflow");
    }

    #[test]
    fn a_clock_that_is_wrong_makes_no_storm_of_requests() {
        let now: Timestamp = "2026-01-01T12:00:00Z".parse().unwrap();
        let hours_ago = now - SignedDuration::from_hours(2);
        let token = HeldToken::new("t".to_owned(), Some(hours_ago), 3600, now);
        assert!(!token.is_due(now + SignedDuration::from_secs(29)));
        assert!(token.is_due(now + SignedDuration::from_secs(30)));
    }

    #[test]
    fn a_token_without_an_end_is_kept() {
        let token = HeldToken::new("t".to_owned(), None, 600, Timestamp::MIN);
        assert!(!token.is_due(Timestamp::MAX) && !token.is_expired(Timestamp::MAX));
        assert!(!format!("{token:?}").contains("\"t\""));
    }
}
