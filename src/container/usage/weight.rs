//! What the processes of a container weigh, for limits: cheaply every second, exactly where that seems too much.
//!
//! **At most** is the resident memory of all (statm's second number): what processes share counts for each. **Exactly** is what
//! cannot be taken back, anonymous and shared memory, of which each process has its part (Pss_Anon and Pss_Shmem of
//! /proc/PID/smaps_rollup, since Linux 5.4). Mapped files are no part of it: the kernel would drop their pages before it
//! killed anybody. For that figure the kernel walks all page tables: some 0.3 ms for 50 MB.

use std::fs;

use super::files::{Files, Opened, Stat};

/// The most processes of one container that are weighed: a tree with more is a fork bomb, and its first ones weigh enough.
const PROCESSES: usize = 10_000;

/// A container's processes, and what they weigh at most.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Weight {
    /// In bytes: never less than they really weigh.
    pub at_most: u64,
    /// The processes.
    pub processes: Vec<i32>,
}

/// Weighs containers, with one buffer for all of them.
#[derive(Default)]
pub struct Scales(Files);

impl Scales {
    /// All that descends from a supervisor, without it.
    pub fn weigh(&mut self, supervisor: i32) -> Weight {
        let mut at_most = 0;
        let processes = self.walk(supervisor, |_, stat| at_most += stat.resident);
        Weight { at_most, processes }
    }

    /// The same processes, each with its session.
    pub(in crate::container) fn sessions(&mut self, supervisor: i32) -> Vec<(i32, i32)> {
        let mut sessions = Vec::new();
        self.walk(supervisor, |pid, stat| sessions.push((pid, stat.session)));
        sessions
    }

    fn walk(&mut self, supervisor: i32, mut each: impl FnMut(i32, &Stat)) -> Vec<i32> {
        let mut processes = Vec::new();
        let Some(process) = Opened::new(supervisor) else { return processes };
        // The supervisor's own children all come from its first thread; those that were orphaned do too (prctl(2)).
        if !self.0.children_of(&process, 1, &mut processes) {
            processes = self.0.children_by_parent(supervisor);
        }
        let mut next = 0;
        while let Some(pid) = processes.get(next).copied().filter(|_| next < PROCESSES) {
            next += 1;
            let Some(process) = Opened::new(pid) else { continue };
            let Some(stat) = self.0.stat_of(&process) else { continue };
            each(pid, &stat);
            if !self.0.children_of(&process, stat.threads, &mut processes) {
                let children = self.0.children_by_parent(pid);
                processes.extend(children);
            }
        }
        processes
    }
}

/// What these processes weigh, exactly. One that cannot be looked into (a setuid program) counts with what it has resident.
#[must_use]
pub fn exactly(processes: &[i32]) -> u64 {
    let weigh = |pid: &i32| {
        let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok();
        rollup.and_then(|text| parse_rollup(&text)).unwrap_or_else(|| resident(*pid))
    };
    processes.iter().map(weigh).sum()
}

fn resident(pid: i32) -> u64 {
    let process = Opened::new(pid);
    process.and_then(|process| Files::default().stat_of(&process)).map_or(0, |stat| stat.resident)
}

/// Reads smaps_rollup, in bytes. Before Linux 5.4 it has the whole Pss alone.
fn parse_rollup(text: &str) -> Option<u64> {
    let kib = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
    };
    match (kib("Pss_Anon"), kib("Pss_Shmem")) {
        (Some(anonymous), Some(shared)) => Some(anonymous + shared),
        _ => kib("Pss"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mapped_files_are_no_part_of_it() {
        let text = "00400000-7ffd5 ---p 00000000 00:00 0 [rollup]\nRss:    1300 kB\nPss:     700 kB\nPss_Dirty:  300 kB\n\
                    Pss_Anon:     200 kB\nPss_File:     400 kB\nPss_Shmem:    100 kB\nSwap:   0 kB\n";
        assert_eq!(parse_rollup(text), Some(300 << 10));
        let old = "55d-7ff ---p 00000000 00:00 0 [rollup]\nRss: 1300 kB\nPss:     700 kB\n";
        assert_eq!(parse_rollup(old), Some(700 << 10));
        assert_eq!(parse_rollup(""), None);
    }

    #[test]
    fn a_tree_weighs_what_its_processes_hold() {
        let inner = "x=$(head -c 20000000 /dev/zero | tr '\\0' a); sleep 600 & wait";
        let mut outer =
            std::process::Command::new("bash").args(["-c", "bash -c \"$0\"; true", inner]).spawn().unwrap();
        let pid = i32::try_from(outer.id()).unwrap();
        let found = (0..200).any(|_| {
            std::thread::sleep(std::time::Duration::from_millis(50));
            let weight = Scales::default().weigh(pid);
            let exact = exactly(&weight.processes);
            exact > 20_000_000 && exact < 60_000_000 && weight.at_most >= exact
        });
        let weight = Scales::default().weigh(pid);
        crate::container::process::kill_tree(pid);
        let _ = outer.wait();
        assert!(found, "{weight:?}");
    }
}
