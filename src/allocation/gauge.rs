//! How much memory the job may still take on this host before the kernel kills something of it.
//!
//! Each limited cgroup from the pilot's own level up has something that the kernel cannot take back: what is charged to it less the
//! pages of files. (A kubelet takes only those away that were not used lately. But here all pods have one cgroup: files' pages
//! outlive the pod that read them, and pods would be evicted for what they cannot give back, one after another.) The one with
//! the least room counts. Where no cgroup limits the job, it is the host's memory.

use std::path::PathBuf;

use super::cgroup;
use super::resources::{self, Roots, read_small};
use super::usage::value;

/// Memory at one moment, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Room {
    /// What there is in all.
    pub limit: u64,
    /// What is left of it.
    pub available: u64,
}

/// Looks at the job's memory.
#[derive(Debug, Clone)]
pub struct MemoryGauge {
    levels: Vec<Level>,
    /// Where the kernel counts whom it has killed in the pilot's own cgroup, in which its pods are too.
    killed: Option<PathBuf>,
    proc: PathBuf,
}

#[derive(Debug, Clone)]
struct Level {
    v2: bool,
    directory: PathBuf,
    limit: u64,
}

impl MemoryGauge {
    /// Finds out once where to look.
    #[must_use]
    pub fn new(roots: &Roots) -> Self {
        let levels = cgroup::memory_levels(roots);
        let host = resources::mem_total(roots);
        let own = levels.last().map(|(v2, directory, _)| {
            directory.join(if *v2 { "memory.events" } else { "memory.oom_control" })
        });
        // More than the host has is no limit.
        let limited = levels.into_iter().filter_map(|(v2, directory, limit)| {
            let limit = limit.filter(|limit| host.is_none_or(|host| *limit <= host))?;
            Some(Level { v2, directory, limit })
        });
        let levels: Vec<Level> = limited.collect();
        // Who has no limit is in a cgroup with others, whose ends are no business of this job's.
        let killed = own.filter(|_| !levels.is_empty());
        Self { levels, killed, proc: roots.proc.clone() }
    }

    /// The least limit that a cgroup sets: the kernel kills something of the job when it takes more. None where none does.
    #[must_use]
    pub fn limit(&self) -> Option<u64> {
        self.levels.iter().map(|level| level.limit).min()
    }

    /// What is left now; none where nothing can be read.
    #[must_use]
    pub fn room(&self) -> Option<Room> {
        let level = self.levels.iter().filter_map(Level::room).min_by_key(|room| room.available);
        level.or_else(|| {
            let meminfo = read_small(&self.proc.join("meminfo"))?;
            let bytes = |name| value(&meminfo, name).map(|kib| kib << 10);
            Some(Room { limit: bytes("MemTotal")?, available: bytes("MemAvailable")? })
        })
    }

    /// How many processes of the job the kernel has killed for want of memory.
    #[must_use]
    pub fn oom_kills(&self) -> u64 {
        let text = self.killed.as_ref().and_then(|file| read_small(file));
        text.and_then(|text| value(&text, "oom_kill")).unwrap_or(0)
    }
}

impl Level {
    fn room(&self) -> Option<Room> {
        let (usage, files) = match self.v2 {
            true => ("memory.current", ["inactive_file", "active_file"]),
            false => ("memory.usage_in_bytes", ["total_inactive_file", "total_active_file"]),
        };
        let usage: u64 = read_small(&self.directory.join(usage))?.trim().parse().ok()?;
        let stat = read_small(&self.directory.join("memory.stat"))?;
        let files: u64 = files.iter().filter_map(|name| value(&stat, name)).sum();
        Some(Room { limit: self.limit, available: self.limit.saturating_sub(usage.saturating_sub(files)) })
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::allocation::stand_in::{self, write_cgroup as write};

    fn host(cgroup: &str) -> (tempfile::TempDir, Roots) {
        let (directory, roots) = stand_in::host(cgroup);
        fs::write(roots.proc.join("meminfo"), "MemTotal: 1000 kB\nMemFree: 1 kB\nMemAvailable: 400 kB\n")
            .unwrap();
        (directory, roots)
    }

    #[test]
    fn the_level_with_the_least_room_counts_and_old_files_are_no_use_v1() {
        let (_guard, roots) = host("4:memory:/slurm/uid_7/job_1/step_batch/task_0\n");
        let job = "memory/slurm/uid_7/job_1";
        let level = |path: &str, limit: &str, usage: &str, files: &str| {
            write(&roots, &format!("{path}/memory.limit_in_bytes"), limit);
            write(&roots, &format!("{path}/memory.usage_in_bytes"), usage);
            write(
                &roots,
                &format!("{path}/memory.stat"),
                &format!("cache 9\ntotal_inactive_file {files}\ntotal_active_file 1000\n"),
            );
            write(
                &roots,
                &format!("{path}/memory.oom_control"),
                "oom_kill_disable 0\nunder_oom 0\noom_kill 1\n",
            );
        };
        level(job, "800000", "700000", "100000");
        level(&format!("{job}/step_batch"), "500000", "490000", "300000");
        level(&format!("{job}/step_batch/task_0"), "9223372036854771712", "480000", "0");
        let gauge = MemoryGauge::new(&roots);
        assert_eq!(gauge.limit(), Some(500_000));
        assert_eq!(gauge.room(), Some(Room { limit: 800_000, available: 201_000 }));
        assert_eq!(gauge.oom_kills(), 1);
    }

    #[test]
    fn the_same_of_v2() {
        let (_guard, roots) = host("0::/system.slice/slurmstepd.scope/job_1/step_0\n");
        let job = "system.slice/slurmstepd.scope/job_1";
        write(&roots, &format!("{job}/memory.max"), "500000\n");
        write(&roots, &format!("{job}/memory.current"), "450000\n");
        write(&roots, &format!("{job}/memory.stat"), "anon 4\ninactive_file 50000\n");
        write(&roots, &format!("{job}/memory.events"), "low 0\noom 3\noom_kill 2\n");
        write(&roots, &format!("{job}/step_0/memory.max"), "max\n");
        write(&roots, &format!("{job}/step_0/memory.events"), "low 0\noom 3\noom_kill 2\n");
        let gauge = MemoryGauge::new(&roots);
        assert_eq!(gauge.room(), Some(Room { limit: 500_000, available: 100_000 }));
        assert_eq!(gauge.oom_kills(), 2);
    }

    #[test]
    fn without_a_limit_it_is_the_hosts_memory() {
        let (_guard, roots) = host("0::/user.slice\n");
        let gauge = MemoryGauge::new(&roots);
        assert_eq!(gauge.limit(), None);
        assert_eq!(gauge.room(), Some(Room { limit: 1000 << 10, available: 400 << 10 }));
        fs::remove_file(roots.proc.join("meminfo")).unwrap();
        assert_eq!((gauge.room(), gauge.oom_kills()), (None, 0));
    }
}
