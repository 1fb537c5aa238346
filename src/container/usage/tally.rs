//! What a set of processes has used, its ended ones included, over many samples.
//!
//! A process that ends while the set is read must not count twice: once as itself, once in the cutime of the process that
//! waited for it. So whoever may wait for a process is read before it. Its time then may be missing from a sample, which
//! the next one has.
//!
//! What nobody waits for (SIGCHLD ignored, SA_NOCLDWAIT, the end of a pid namespace) is in no cutime. What had been seen
//! of it is kept as lost, once a second look has shown that it has come to nobody.

use std::collections::{HashMap, HashSet};

use nix::errno::Errno;
use nix::sys::signal::kill;
use nix::unistd::Pid;

use super::files::{Files, Memory, Opened, Stat};

/// Processes of one container that are followed; what is beyond is not counted. Linux has 4 194 304 at most, and each of
/// them costs a few reads.
const MAX_PROCESSES: usize = 20_000;

/// What only counts up; CPU time in clock ticks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Counted {
    pub(super) cpu: u64,
    pub(super) minor_faults: u64,
    pub(super) major_faults: u64,
}

impl Counted {
    fn with(self, other: Self, join: impl Fn(u64, u64) -> u64) -> Self {
        Self {
            cpu: join(self.cpu, other.cpu),
            minor_faults: join(self.minor_faults, other.minor_faults),
            major_faults: join(self.major_faults, other.major_faults),
        }
    }

    pub(super) fn plus(self, other: Self) -> Self {
        self.with(other, u64::saturating_add)
    }

    pub(super) fn less(self, other: Self) -> Self {
        self.with(other, u64::saturating_sub)
    }

    pub(super) fn at_least(self, other: Self) -> Self {
        self.with(other, u64::max)
    }

    fn any(self) -> bool {
        self != Self::default()
    }
}

/// A process of the set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Process {
    pub(super) pid: i32,
    group: i32,
    start: u64,
    own: Counted,
    ended: Counted,
    /// None for a zombie.
    pub(super) memory: Option<Memory>,
}

impl Process {
    fn new(pid: i32, stat: &Stat) -> Self {
        let own = Counted { cpu: stat.own, minor_faults: stat.minor_faults, major_faults: stat.major_faults };
        let ended = Counted {
            cpu: stat.ended,
            minor_faults: stat.ended_minor_faults,
            major_faults: stat.ended_major_faults,
        };
        Self { pid, group: stat.group, start: stat.start, own, ended, memory: None }
    }

    /// What tells it from another process of the same number.
    fn identity(&self) -> (i32, u64) {
        (self.pid, self.start)
    }
}

/// One look at the set.
#[derive(Debug, Default)]
struct Look {
    /// The supervisor, whose ended children count, but not itself.
    root: Option<Process>,
    processes: Vec<Process>,
}

impl Look {
    fn total(&self) -> Counted {
        let ended = self.root.map(|root| root.ended).unwrap_or_default();
        self.processes.iter().fold(ended, |sum, process| sum.plus(process.own).plus(process.ended))
    }

    fn all(&self) -> impl Iterator<Item = &Process> {
        self.root.iter().chain(&self.processes)
    }
}

/// What of `before` is not in `now`.
fn gone<'a>(before: &'a Look, now: &Look) -> Vec<&'a Process> {
    let there: HashSet<_> = now.processes.iter().map(Process::identity).collect();
    before.processes.iter().filter(|process| !there.contains(&process.identity())).collect()
}

/// What those that are gone had used, less what has come to those that are there: what cannot have been waited for.
fn missing(gone: &[&Process], before: &Look, now: &Look) -> Counted {
    let used = gone.iter().fold(Counted::default(), |sum, process| sum.plus(process.own).plus(process.ended));
    if !used.any() {
        return used;
    }
    let earlier: HashMap<_, _> = before.all().map(|process| (process.identity(), process.ended)).collect();
    let came = now.all().fold(Counted::default(), |sum, process| {
        let had = earlier.get(&process.identity()).copied().unwrap_or_default();
        sum.plus(process.ended.less(had))
    });
    used.less(came)
}

/// What the set has used until its last look.
#[derive(Debug, Default)]
pub(super) struct Tally {
    last: Look,
    lost: Counted,
}

impl Tally {
    pub(super) fn total(&self) -> Counted {
        self.last.total().plus(self.lost)
    }

    pub(super) fn processes(&self) -> &[Process] {
        &self.last.processes
    }

    pub(super) fn has_group(&self, group: i32) -> bool {
        self.last.processes.iter().any(|process| process.group == group)
    }

    /// When the oldest of them started, in clock ticks since boot; for a tree its supervisor.
    pub(super) fn oldest(&self) -> Option<u64> {
        self.last.all().map(|process| process.start).min()
    }

    /// Looks at the tree below `supervisor`.
    pub(super) fn count_tree(&mut self, files: &mut Files, supervisor: i32) {
        self.count(|before| look_at_tree(files, supervisor, before));
    }

    /// Looks at the processes of `group`, which are `pids` and those that were there before.
    pub(super) fn count_group(&mut self, files: &mut Files, group: i32, pids: &[i32]) {
        self.count(|before| look_at_group(files, group, pids, before));
    }

    fn count(&mut self, mut look: impl FnMut(&Look) -> Look) {
        let mut now = look(&self.last);
        let ended = gone(&self.last, &now);
        if missing(&ended, &self.last, &now).any() {
            // Somebody may have waited for them after having been read: that is seen now. If still more have ended
            // meanwhile, the same holds for them, and nothing is known.
            let again = look(&self.last);
            let still = gone(&self.last, &again);
            if still == ended {
                self.lost = self.lost.plus(missing(&still, &self.last, &again));
            }
            now = again;
        }
        self.last = now;
    }
}

/// Parents before children. Whoever inherits a process whose parent has ended is an ancestor of it, and was read too.
fn look_at_tree(files: &mut Files, supervisor: i32, before: &Look) -> Look {
    let mut look = Look::default();
    let mut found = Vec::new();
    let opened = Opened::new(supervisor);
    let root = opened.as_ref().and_then(|opened| files.stat_of(opened));
    if root.is_none() && kill(Pid::from_raw(supervisor), None) == Err(Errno::ESRCH) {
        return look;
    }
    // Its first thread starts and inherits all its children: the other one writes the log.
    if !opened.is_some_and(|opened| files.children_of(&opened, 1, &mut found)) {
        // A kernel without these lists, or one that hides a process that is not dumpable (hidepid, proc(5)).
        found = files.children_by_parent(supervisor);
    }
    look.root = root.map(|root| Process::new(supervisor, &root));
    let mut next = 0;
    let mut overlooked = before.processes.iter();
    let mut seen = HashSet::new();
    loop {
        let Some(pid) = found.get(next).copied() else {
            // A list that changes while it is read may leave out a child that lives (proc(5)).
            let Some(process) = overlooked.next() else { break };
            let lives = !seen.contains(&process.pid)
                && files.stat(process.pid).is_some_and(|stat| stat.start == process.start);
            if lives {
                found.push(process.pid);
            }
            continue;
        };
        next += 1;
        if !seen.insert(pid) || look.processes.len() >= MAX_PROCESSES {
            continue;
        }
        let Some((opened, process, stat)) = read(files, pid) else { continue };
        look.processes.push(process);
        // One that has just ended has no list either.
        let listed = stat.zombie || files.children_of(&opened, stat.threads, &mut found);
        if !listed && files.stat_of(&opened).is_some() {
            found.extend(files.children_by_parent(pid));
        }
    }
    look
}

/// Reads all of one process but its children.
fn read(files: &mut Files, pid: i32) -> Option<(Opened, Process, Stat)> {
    let opened = Opened::new(pid)?;
    let stat = files.stat_of(&opened)?;
    let mut process = Process::new(pid, &stat);
    if !stat.zombie {
        process.memory = files.memory_of(&opened);
    }
    Some((opened, process, stat))
}

/// The oldest first: no process is older than its parent.
fn look_at_group(files: &mut Files, group: i32, pids: &[i32], before: &Look) -> Look {
    let known = before.processes.iter().map(|process| process.pid);
    let mut order: Vec<(u64, i32)> = known
        .chain(pids.iter().copied())
        .filter_map(|pid| files.stat(pid).filter(|stat| stat.group == group).map(|stat| (stat.start, pid)))
        .collect();
    order.sort_unstable();
    order.dedup();
    order.truncate(MAX_PROCESSES);
    let processes = order.into_iter().filter_map(|(start, pid)| {
        let (_, process, _) = read(files, pid)?;
        (process.group == group && process.start == start).then_some(process)
    });
    Look { root: None, processes: processes.collect() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process(pid: i32, own: u64, ended: u64) -> Process {
        let cpu = |cpu| Counted { cpu, ..Counted::default() };
        Process { pid, group: 1, start: 1, own: cpu(own), ended: cpu(ended), memory: None }
    }

    fn look(root_ended: u64, processes: &[(i32, u64, u64)]) -> Look {
        let processes = processes.iter().map(|(pid, own, ended)| process(*pid, *own, *ended)).collect();
        Look { root: Some(process(1, 1000, root_ended)), processes }
    }

    /// The totals after each of `looks`; the last one is seen for as long as it is asked for.
    fn totals(looks: Vec<Vec<Look>>) -> Vec<u64> {
        let mut tally = Tally::default();
        let mut totals = Vec::new();
        for looks in looks {
            let mut looks = looks.into_iter();
            tally.count(|_| looks.next().unwrap());
            totals.push(tally.total().cpu);
        }
        totals
    }

    #[test]
    fn a_process_that_was_waited_for_counts_on_in_its_parent() {
        // 3 is waited for by 2; then 2 by the supervisor. The supervisor's own time does not count.
        let looks = vec![
            vec![look(0, &[(2, 10, 0), (3, 50, 5)])],
            vec![look(0, &[(2, 11, 57)])],
            vec![look(69, &[])],
        ];
        assert_eq!(totals(looks), [65, 68, 69]);
    }

    #[test]
    fn what_nobody_waits_for_is_not_forgotten() {
        // 3, 4 and 5 each burn 50 and are let go by 2, which ignores SIGCHLD.
        let looks = vec![
            vec![look(0, &[(2, 10, 0), (3, 50, 0)])],
            vec![look(0, &[(2, 10, 0), (4, 50, 0)]), look(0, &[(2, 10, 0), (4, 50, 0)])],
            vec![look(0, &[(2, 10, 0), (5, 50, 0)]), look(0, &[(2, 12, 0), (5, 50, 0)])],
            vec![look(0, &[(2, 12, 0)]), look(0, &[(2, 12, 0)])],
        ];
        assert_eq!(totals(looks), [60, 110, 162, 162]);
    }

    #[test]
    fn a_wait_between_two_reads_counts_once() {
        // 3 ends and is waited for after its parent was read: the second look sees it there.
        let looks = vec![
            vec![look(0, &[(2, 10, 0), (3, 50, 0)])],
            vec![look(0, &[(2, 10, 0)]), look(0, &[(2, 10, 50)])],
            vec![look(0, &[(2, 10, 50)])],
        ];
        assert_eq!(totals(looks), [60, 60, 60]);
    }

    #[test]
    fn while_processes_end_nothing_is_called_lost() {
        // At the second look its parent, which has its time, is gone as well, and not yet in the supervisor's.
        let looks = vec![
            vec![look(0, &[(2, 10, 0), (3, 50, 0)])],
            vec![look(0, &[(2, 10, 0)]), look(0, &[])],
            vec![look(60, &[])],
        ];
        assert_eq!(totals(looks), [60, 0, 60]);
    }

    #[test]
    fn a_number_that_is_used_again_is_another_process() {
        let mut second = look(50, &[(2, 1, 0)]);
        second.processes[0].start = 2;
        assert_eq!(totals(vec![vec![look(0, &[(2, 50, 0)])], vec![second]]), [50, 51]);
    }
}
