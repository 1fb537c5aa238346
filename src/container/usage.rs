//! CPU and memory of containers: of the whole process tree below each supervisor, ended processes included.
//!
//! [`sample`] measures any number of running containers at once; what one of them has used until now is kept in its
//! [`Meter`], one for each run, since figures that count up may never go down.
//!
//! **CPU** is utime and stime of what lives, and cutime and cstime of the same and of the supervisor, which hold what
//! was waited for. They have the kernel's clock ticks (10 ms); within the kernel they are nanoseconds, so nothing is
//! lost by short processes. /proc/PID/schedstat has nanoseconds, but of one thread only and of none that ended, and a
//! second file for each process: at the 15 s of the metrics server a tick is less than a thousandth of a CPU.
//!
//! **Memory** is a sum over processes. What a kubelet shows is a cgroup's, which counts each page once. As near as that
//! is had cheaply: anonymous memory of all, and of what is shared (shmem, mapped files) that of the process which has the
//! most, since processes of one container share the same segments and libraries. PSS would also divide what a fork
//! shares until it is written to; but for it the kernel walks all page tables (some 0.3 ms for 50 MB, holding the
//! process's mmap lock), while a whole scrape of 100 containers may take 10 ms. So a tree that forks with a large heap
//! shows that heap once for each process. Page cache is not in it: it belongs to no process.

mod files;
mod pgid;
mod tally;
pub mod weight;

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use files::{Files, Memory};
use tally::{Counted, Tally};

pub use pgid::PgidFiles;

/// The least CPU time that is shown: the metrics server drops a pod of which a container has none (its
/// `checkContainerMetrics`), and a process that has just begun has less than a clock tick. fork and exec take about this.
const CPU_AT_LEAST: Duration = Duration::from_millis(1);

/// The least memory that is shown, for the same reason: a page.
const MEMORY_AT_LEAST: u64 = 4096;

/// A rate is measured over at least this long where there is an earlier sample: half of cAdvisor's interval in a
/// kubelet (`housekeepingInterval`, 10 s), and 500 clock ticks.
const RATE_OVER: Duration = Duration::from_secs(5);

/// A rate of less than this, 20 clock ticks, says nothing.
const RATE_AT_LEAST: Duration = Duration::from_millis(200);

/// Foreign process groups of one container that are remembered: a script names one, or two when it starts anew.
const GROUPS: usize = 16;

/// What a container uses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Usage {
    /// When it was measured.
    pub at: SystemTime,
    /// CPU time since the container's start; never decreases, never zero.
    pub cpu: Duration,
    /// Billionths of a CPU in use lately; none at the first sample.
    pub nano_cores: Option<u64>,
    /// Memory in bytes that cannot be taken back: anonymous and shared memory. Never zero.
    pub working_set: u64,
    /// The same with mapped files.
    pub usage: u64,
    /// Anonymous memory alone.
    pub rss: u64,
    /// Page faults since the start, the minor ones.
    pub page_faults: u64,
    /// Page faults that waited for a disk.
    pub major_page_faults: u64,
    /// Processes, without zombies.
    pub processes: u64,
}

/// A running container that is to be measured.
pub struct Target<'a> {
    /// Its supervisor's process.
    pub supervisor: i32,
    /// Its directory, with the file `pgid`.
    pub directory: &'a Path,
    /// What is known of this run.
    pub meter: &'a mut Meter,
}

/// What one run of a container has used until its last sample.
#[derive(Debug, Default)]
pub struct Meter {
    tree: Tally,
    groups: BTreeMap<i32, Group>,
    /// Of groups that are no longer remembered.
    forgotten: Counted,
    shown: Counted,
    rate: Rate,
}

/// A process group outside of the tree.
#[derive(Debug, Default)]
struct Group {
    tally: Tally,
    /// What it had used before it became the container's.
    before: Counted,
}

impl Group {
    fn total(&self) -> Counted {
        self.tally.total().less(self.before)
    }
}

impl Meter {
    /// Takes a foreign group's new figures.
    fn add_group(&mut self, group: i32, started: u64, counted: impl FnOnce(&mut Tally)) {
        let first = !self.groups.contains_key(&group);
        if first
            && self.groups.len() >= GROUPS
            && let Some((_, oldest)) = self.groups.pop_first()
        {
            self.forgotten = self.forgotten.plus(oldest.total());
        }
        let group = self.groups.entry(group).or_default();
        counted(&mut group.tally);
        // One that is older than the container was doing something else before.
        if first && group.tally.oldest().is_some_and(|oldest| oldest < started) {
            group.before = group.tally.total();
        }
    }

    /// All that counts up, never less than what was shown before.
    fn settle(&mut self) -> Counted {
        let groups = self.groups.values().map(Group::total);
        let sum = groups.fold(self.tree.total().plus(self.forgotten), Counted::plus);
        self.shown = self.shown.at_least(sum);
        self.shown
    }
}

/// Two earlier samples of CPU time: one that is old enough to measure a rate from, one that will be.
#[derive(Debug, Default)]
pub struct Rate {
    old: Option<(Instant, Duration)>,
    new: Option<(Instant, Duration)>,
}

impl Rate {
    /// Takes a sample and tells the rate in billionths of a CPU.
    pub fn update(&mut self, now: Instant, cpu: Duration) -> Option<u64> {
        let age = |sample: &(Instant, Duration)| now.saturating_duration_since(sample.0);
        if self.new.as_ref().is_none_or(|new| age(new) >= RATE_OVER) {
            self.old = self.new.take();
            self.new = Some((now, cpu));
        }
        // Without one that is old enough, any that there is.
        let from = self.old.or(self.new)?;
        let passed = age(&from);
        if passed < RATE_AT_LEAST {
            return None;
        }
        let used = cpu.saturating_sub(from.1).as_nanos();
        u64::try_from(used * 1_000_000_000 / passed.as_nanos()).ok()
    }
}

/// Measures all running containers; the answers are in the order of `targets`. A group that one names and another one's
/// tree holds stays with the tree, so none may be left out. Reads nothing but /proc itself; the `pgid` files,
/// which may lie on a file server, are read by `pgids`.
#[must_use]
pub fn sample(targets: &mut [Target<'_>], pgids: &PgidFiles) -> Vec<Usage> {
    let directories: Vec<PathBuf> = targets.iter().map(|target| target.directory.to_owned()).collect();
    let reading = pgids.begin(&directories);
    let mut files = Files::default();
    let mut trees: Vec<(SystemTime, Memory)> = Vec::with_capacity(targets.len());
    for target in targets.iter_mut() {
        let at = SystemTime::now();
        target.meter.tree.count_tree(&mut files, target.supervisor);
        let mut memory = Memory::default();
        for process in target.meter.tree.processes() {
            memory.add(process.memory);
        }
        trees.push((at, memory));
    }
    let named = pgids.end(reading, &directories);
    // A group that is a tree's own is counted already.
    let foreign: Vec<Option<i32>> = targets
        .iter()
        .zip(named)
        .map(|(target, group)| group.filter(|group| !target.meter.tree.has_group(*group)))
        .collect();
    if foreign.iter().any(Option::is_some) {
        add_groups(targets, &foreign, &mut files, &mut trees);
    }
    let now = Instant::now();
    let finish = |target: &mut Target<'_>, (at, memory): (SystemTime, Memory)| {
        let counted = target.meter.settle();
        let cpu = files::ticks(counted.cpu).max(CPU_AT_LEAST);
        let working_set = (memory.anonymous + memory.shared).max(MEMORY_AT_LEAST);
        Usage {
            at,
            cpu,
            nano_cores: target.meter.rate.update(now, cpu),
            working_set,
            usage: working_set + memory.files,
            rss: memory.anonymous,
            page_faults: counted.minor_faults,
            major_page_faults: counted.major_faults,
            processes: memory.processes,
        }
    };
    targets.iter_mut().zip(trees).map(|(target, tree)| finish(target, tree)).collect()
}

/// Adds the groups that `pgid` files name: each process once, whoever names it.
fn add_groups(
    targets: &mut [Target<'_>],
    foreign: &[Option<i32>],
    files: &mut Files,
    trees: &mut [(SystemTime, Memory)],
) {
    let processes = targets.iter().flat_map(|target| target.meter.tree.processes());
    let mut known: HashSet<i32> = processes.map(|process| process.pid).collect();
    known.extend(targets.iter().map(|target| target.supervisor));
    let mut wanted: HashSet<i32> = foreign.iter().flatten().copied().collect();
    let found = files.groups(&wanted, &known);
    for ((target, group), (_, memory)) in targets.iter_mut().zip(foreign).zip(trees) {
        // The first container that names a group has it.
        let Some(group) = group.filter(|group| wanted.remove(group)) else { continue };
        let pids = found.get(&group).map(Vec::as_slice).unwrap_or_default();
        let started = target.meter.tree.oldest().unwrap_or(0);
        target.meter.add_group(group, started, |tally| tally.count_group(files, group, pids));
        if let Some(group) = target.meter.groups.get(&group) {
            for process in group.tally.processes() {
                memory.add(process.memory);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_measured_over_some_seconds() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let cpu = Duration::from_millis;
        let mut rate = Rate::default();
        assert_eq!(rate.update(at(0), cpu(100)), None);
        assert_eq!(rate.update(at(100), cpu(200)), None, "too near to say anything");
        assert_eq!(rate.update(at(1000), cpu(600)), Some(500_000_000), "what there is");
        assert_eq!(rate.update(at(10_000), cpu(20_100)), Some(2_000_000_000));
        // The one of 10 s is too new; that of 0 s is kept for it.
        assert_eq!(rate.update(at(11_000), cpu(20_100)), Some(1_818_181_818));
        assert_eq!(rate.update(at(15_000), cpu(20_100)), Some(0));
        // Somebody asks after an hour, and asks again at once.
        assert_eq!(rate.update(at(3_615_000), cpu(380_100)), Some(100_000_000));
        assert_eq!(rate.update(at(3_615_001), cpu(380_100)), Some(99_999_972));
    }

    fn used(cpu: u64) -> Counted {
        Counted { cpu, minor_faults: cpu * 2, major_faults: 0 }
    }

    #[test]
    fn what_is_shown_never_goes_down() {
        let mut meter = Meter { forgotten: used(5), ..Meter::default() };
        assert_eq!(meter.settle(), used(5));
        meter.forgotten = used(3);
        assert_eq!(meter.settle(), used(5));
        meter.forgotten = used(6);
        assert_eq!(meter.settle(), used(6));
    }

    #[test]
    fn groups_are_remembered_within_a_limit() {
        let mut meter = Meter::default();
        let own = nix::unistd::getpgrp().as_raw();
        let pid = nix::unistd::getpid().as_raw();
        for group in 1000..1100 {
            meter.add_group(group, 0, |tally| tally.count_group(&mut Files::default(), own, &[pid]));
        }
        assert_eq!(meter.groups.len(), GROUPS);
        assert!(
            meter.forgotten.minor_faults > 84 && meter.settle().minor_faults > meter.forgotten.minor_faults
        );
    }

    #[test]
    fn a_group_older_than_the_container_brings_nothing_along() {
        let mut meter = Meter::default();
        let own = nix::unistd::getpgrp().as_raw();
        let pid = nix::unistd::getpid().as_raw();
        meter.add_group(own, u64::MAX, |tally| tally.count_group(&mut Files::default(), own, &[pid]));
        assert_eq!(meter.settle(), Counted::default());
        let burner: Vec<u8> = vec![1; 4 << 20];
        meter.add_group(own, u64::MAX, |tally| tally.count_group(&mut Files::default(), own, &[pid]));
        assert!(meter.settle().minor_faults > 0, "{}", burner.len());
    }
}
