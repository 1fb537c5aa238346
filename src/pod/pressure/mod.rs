//! Memory: containers over their limits end as OOMKilled, and when the job's memory runs short a pod is evicted before the kernel
//! kills something.
//!
//! Sources: `pkg/kubelet/eviction` (helpers.go: the order and the texts; eviction_manager.go: what a Node under pressure still
//! takes), `pkg/kubelet/kuberuntime` (OOMKilled).

pub mod eviction;
mod watch;

use std::sync::Mutex;
use std::time::Duration;

pub use watch::{Setup, spawn};

/// Memory of the job at one moment, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Room {
    /// What there is.
    pub limit: u64,
    /// What is left of it.
    pub available: u64,
}

/// What tells of the job's memory.
pub trait Gauge: Send + Sync {
    /// What is left now; none where nobody knows.
    fn room(&self) -> Option<Room>;
    /// How many processes of the job the kernel has killed for want of memory.
    fn oom_kills(&self) -> u64;
}

/// What no pod is to take, so that the kernel never has to kill: a twentieth, at most 1 GiB; at least 64 MiB, which the fastest
/// program takes in the time between two looks, or a tenth of a job that is smaller than that.
#[must_use]
pub fn kept_free(limit: u64) -> u64 {
    (limit / 20).clamp(SMALL.min(limit / 10), LARGE)
}

const SMALL: u64 = 64 << 20;
const LARGE: u64 = 1 << 30;

/// What the pilot and the supervisors need: a hundredth, 16 MiB to 512 MiB (0.5 MiB a container, 1000 of them), and never more
/// than a tenth.
#[must_use]
pub fn own_need(limit: u64) -> u64 {
    (limit / 100).clamp((16 << 20).min(limit / 10), 512 << 20)
}

/// How long to wait for the next look: what fills memory with all of these CPUs has not passed the threshold by then. At least
/// 10 ms, so that looking costs little; at most a second.
#[must_use]
pub fn pace(room: Room, cpus: usize) -> Duration {
    let above = room.available.saturating_sub(kept_free(room.limit));
    Duration::from_nanos(above / bytes_a_nanosecond(cpus))
        .clamp(Duration::from_millis(10), Duration::from_secs(1))
}

/// How fast programs fill memory: one thread was seen to take 2.6 GB a second of new pages; many are held up by the memory's own
/// 100 GB a second or so. A GB a second is a byte a nanosecond.
fn bytes_a_nanosecond(cpus: usize) -> u64 {
    u64::try_from(cpus).unwrap_or(1).saturating_mul(3).clamp(4, 100)
}

/// The kernel's kills, each of which explains one container's end.
pub struct Kills {
    gauge: std::sync::Arc<dyn Gauge>,
    state: Mutex<Explained>,
}

/// How many kills need no explanation any more, how many there were at the last look, and since when.
struct Explained {
    explained: u64,
    seen: u64,
    since: std::time::Instant,
}

/// A kill explains ends within this time of it: a container whose first process it was ends at once, and one that went on
/// without one of its processes was not killed by it.
const EXPLAINS: Duration = Duration::from_secs(5);

impl Kills {
    /// Those from now on.
    #[must_use]
    pub fn new(gauge: std::sync::Arc<dyn Gauge>) -> Self {
        let seen = gauge.oom_kills();
        let state = Mutex::new(Explained { explained: seen, seen, since: std::time::Instant::now() });
        Self { gauge, state }
    }

    /// Forgets kills of a while ago. To be called now and then.
    pub fn settle(&self) {
        self.settle_at(std::time::Instant::now());
    }

    fn settle_at(&self, now: std::time::Instant) {
        let kills = self.gauge.oom_kills();
        let mut state = self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if kills != state.seen {
            (state.seen, state.since) = (kills, now);
        } else if now.saturating_duration_since(state.since) >= EXPLAINS {
            state.explained = kills;
        }
    }

    /// Whether there is one that explains nothing yet; it explains what the caller asks for.
    #[must_use]
    pub fn explain(&self) -> bool {
        // Nobody panics with the lock held.
        let mut state = self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let more = self.gauge.oom_kills() > state.explained;
        state.explained += u64::from(more);
        more
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn what_is_kept_free_goes_by_what_there_is() {
        for (limit, free, own) in [
            (100 * MIB, 10 * MIB, 10 * MIB),
            (400 * MIB, 40 * MIB, 16 * MIB),
            (1000 * MIB, 64 * MIB, 16 * MIB),
            (4000 * MIB, 200 * MIB, 40 * MIB),
            (500_000 * MIB, 1024 * MIB, 512 * MIB),
        ] {
            assert_eq!((kept_free(limit), own_need(limit)), (free, own), "{limit}");
        }
        assert_eq!((kept_free(0), own_need(0)), (0, 0));
    }

    #[test]
    fn the_less_is_left_the_more_often_it_is_looked() {
        let ms = |limit: u64, available: u64| pace(Room { limit, available }, 1).as_millis();
        assert_eq!(ms(100_000 * MIB, 90_000 * MIB), 1000);
        assert_eq!(ms(4000 * MIB, 2200 * MIB), 524);
        assert_eq!(ms(4000 * MIB, 300 * MIB), 26);
        assert_eq!(ms(4000 * MIB, 200 * MIB), 10);
        assert_eq!(ms(4000 * MIB, 0), 10);
        // Many CPUs fill it faster.
        let many = |cpus| pace(Room { limit: 100_000 * MIB, available: 11_024 * MIB }, cpus).as_millis();
        assert_eq!((many(1), many(8), many(256)), (1000, 436, 104));
    }

    struct Counter(AtomicU64);

    impl Gauge for Counter {
        fn room(&self) -> Option<Room> {
            None
        }
        fn oom_kills(&self) -> u64 {
            self.0.load(Ordering::Relaxed)
        }
    }

    #[test]
    fn a_kill_explains_one_end() {
        let counter = Arc::new(Counter(AtomicU64::new(7)));
        let kills = Kills::new(Arc::clone(&counter) as Arc<dyn Gauge>);
        assert!(!kills.explain(), "what was before");
        counter.0.store(9, Ordering::Relaxed);
        assert!(kills.explain() && kills.explain() && !kills.explain());
        // One that ended no container explains nothing later.
        let now = std::time::Instant::now();
        counter.0.store(10, Ordering::Relaxed);
        kills.settle_at(now);
        kills.settle_at(now + Duration::from_secs(6));
        assert!(!kills.explain());
    }
}
