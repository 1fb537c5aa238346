//! How long a rejection is held back: a controller that replaces each rejected pod must not be able to spin.

use std::collections::BTreeMap;
use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use tokio::time::Instant;

/// Owners whose rejections are remembered. The one forgotten starts anew with no delay.
const OWNERS: usize = 1000;

/// The longest delay of a rejection: a controller that replaces each rejected pod makes one a minute.
const REJECT_MOST: Duration = Duration::from_secs(60);

/// An owner without rejections for so long starts anew.
const REJECT_FORGET: Duration = Duration::from_secs(600);

/// The controllers whose pods were rejected lately, by uid.
#[derive(Default)]
pub(super) struct Owners(BTreeMap<String, Refusals>);

struct Refusals {
    count: u32,
    last: Instant,
}

impl Owners {
    /// How long this pod's rejection is held back; the more of its owner's pods were rejected, the longer.
    pub(super) fn delay(&mut self, pod: &Pod, now: Instant) -> Duration {
        let owners = pod.metadata.owner_references.iter().flatten();
        let Some(owner) = owners.filter(|o| o.controller == Some(true)).map(|o| o.uid.clone()).next() else {
            return Duration::ZERO;
        };
        self.0.retain(|_, refusals| now.duration_since(refusals.last) < REJECT_FORGET);
        while self.0.len() >= OWNERS {
            self.0.pop_first();
        }
        let refusals = self.0.entry(owner).or_insert(Refusals { count: 0, last: now });
        refusals.last = now;
        refusals.count += 1;
        refusal_delay(refusals.count)
    }
}

/// None for the first, then 1, 2, 4 … 60 s.
fn refusal_delay(count: u32) -> Duration {
    match count {
        0 | 1 => Duration::ZERO,
        n => Duration::from_secs(1u64.checked_shl(n - 2).unwrap_or(u64::MAX)).min(REJECT_MOST),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_more_pods_of_an_owner_are_refused_the_later() {
        let seconds: Vec<u64> = (1..=9).map(|n| refusal_delay(n).as_secs()).collect();
        assert_eq!(seconds, [0, 1, 2, 4, 8, 16, 32, 60, 60]);
        assert_eq!(refusal_delay(u32::MAX), REJECT_MOST);
    }
}
