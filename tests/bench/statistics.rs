//! Quantiles of what was measured.

use std::time::{Duration, SystemTime};

/// Milliseconds, in the order they came.
#[derive(Default, Clone)]
pub struct Samples(Vec<f64>);

impl Samples {
    /// One more: how long it was from `from` to `to`; negative when `to` was earlier.
    pub fn push(&mut self, from: SystemTime, to: SystemTime) {
        let milliseconds = match to.duration_since(from) {
            Ok(later) => later.as_secs_f64() * 1e3,
            Err(error) => -error.duration().as_secs_f64() * 1e3,
        };
        self.0.push(milliseconds);
    }

    /// One more, as a duration.
    pub fn add(&mut self, took: Duration) {
        self.0.push(took.as_secs_f64() * 1e3);
    }

    /// One more that is no time.
    pub fn number(&mut self, value: f64) {
        self.0.push(value);
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// The least value that at least `percent` of all do not exceed (nearest rank); NaN without samples.
    pub fn quantile(&self, percent: usize) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let rank = (sorted.len() * percent).div_ceil(100).max(1);
        sorted.get(rank - 1).copied().unwrap_or(f64::NAN)
    }
}
