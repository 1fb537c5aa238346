//! On which CPUs processes run (sched_setaffinity(2)).

use std::fs;

use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

/// A tree that forks while it is gone over is gone over again, at most so often: what forks faster inherits the new mask from
/// some parent sooner or later.
const PASSES: usize = 5;

/// The mask of these CPUs; none where there are none, or one has a number that the mask has no bit for (1024 and more).
fn mask(cpus: &[usize]) -> Option<CpuSet> {
    if cpus.is_empty() || cpus.iter().any(|cpu| *cpu >= CpuSet::count()) {
        return None;
    }
    let mut set = CpuSet::new();
    for cpu in cpus {
        set.set(*cpu).ok()?;
    }
    Some(set)
}

/// Has this process, and whatever it becomes, run on these CPUs. A cpuset that has shrunk meanwhile may hold none of them: then
/// it runs where it may.
pub(super) fn set_own(cpus: &[usize]) {
    if let Some(mask) = mask(cpus) {
        let _ = sched_setaffinity(Pid::from_raw(0), &mask);
    }
}

/// The same for all threads of these processes, which are asked for again until no new ones are among them.
pub(super) fn set_all(processes: impl Fn() -> Vec<i32>, cpus: &[usize]) {
    let Some(mask) = mask(cpus) else { return };
    let mut known: Vec<i32> = Vec::new();
    for _ in 0..PASSES {
        let threads: Vec<i32> = processes().into_iter().flat_map(threads).collect();
        let new: Vec<i32> = threads.iter().filter(|thread| !known.contains(thread)).copied().collect();
        if new.is_empty() {
            return;
        }
        for thread in &new {
            // One that has ended meanwhile needs no CPU.
            let _ = sched_setaffinity(Pid::from_raw(*thread), &mask);
        }
        known = threads;
    }
}

fn threads(process: i32) -> Vec<i32> {
    let entries = fs::read_dir(format!("/proc/{process}/task")).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mask_that_cannot_be_told_is_left_alone() {
        assert!(mask(&[]).is_none() && mask(&[0, 1024]).is_none());
        let set = mask(&[0, 5]).unwrap();
        assert!(set.is_set(0).unwrap() && set.is_set(5).unwrap() && !set.is_set(1).unwrap());
    }
}
