//! How the pilots of a fleet keep out of step: those that begin at the same moment, as at a maintenance's end, would else
//! write to the API server at the same moments for as long as they live.

use std::hash::{DefaultHasher, Hasher as _};
use std::time::Duration;

/// A Node's own part of whatever is spread over a fleet: from none of it to all of it, and the same after a restart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part(u16);

impl Part {
    /// None of it.
    pub const NONE: Self = Self(0);

    /// All of it.
    pub const ALL: Self = Self(u16::MAX);

    /// The part of the Node with this name.
    #[must_use]
    pub fn of(node: &str) -> Self {
        // SipHash of the standard library with its fixed keys. The last two bytes: `drain::Stagger` takes the first.
        let mut hasher = DefaultHasher::new();
        hasher.write(node.as_bytes());
        Self(u16::try_from(hasher.finish() & u64::from(u16::MAX)).unwrap_or(0))
    }

    /// The time of this part between the least and the most.
    #[must_use]
    pub fn between(self, least: Duration, most: Duration) -> Duration {
        least + most.saturating_sub(least).saturating_mul(u32::from(self.0)) / u32::from(u16::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fleets_parts_fill_the_whole_evenly_and_stay() {
        let (least, most) = (Duration::from_secs(10), Duration::from_secs(60));
        assert_eq!(Part::NONE.between(least, most), least);
        assert_eq!(Part::ALL.between(least, most), most);
        assert_eq!(Part::ALL.between(most, least), most, "never less than the least");
        let mut fifths = [0; 5];
        for number in 0..1000 {
            let part = Part::of(&format!("mysite-{}-n{}", 4000 + number / 8, number % 8));
            let at = part.between(least, most);
            assert!((least..=most).contains(&at));
            fifths[usize::try_from((at.as_secs() - 10) / 10).unwrap().min(4)] += 1;
        }
        assert!(fifths.iter().all(|count| (160..240).contains(count)), "{fifths:?}");
        // Another process says the same.
        assert_eq!(Part::of("mysite-1234-n1"), Part::of("mysite-1234-n1"));
    }
}
