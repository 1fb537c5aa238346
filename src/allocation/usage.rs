//! What the job uses on this host: CPU time and memory of its cgroup, or the host's where it has none.
//!
//! [`JobMeter::new`] finds out once where the figures come from; [`JobMeter::sample`] reads them. Slurm and PBS give a job
//! a cgroup where they are set up to (`TaskPlugin=task/cgroup`, the cgroups hook). Elsewhere, and in a session of one's
//! own, the host's figures are all that there is: they hold what others do there too.

use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use nix::unistd::{SysconfVar, sysconf};

use super::cgroup;
use super::resources::{Roots, read_small};

/// CPU time is never shown as zero: who reads it takes that for a figure that is missing (the metrics server does).
const CPU_AT_LEAST: Duration = Duration::from_millis(1);

/// The same of memory: a page.
const MEMORY_AT_LEAST: u64 = 4096;

/// What was used until now, and where that stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JobUsage {
    /// When it was read.
    pub at: SystemTime,
    /// CPU time; never decreases, never zero.
    pub cpu: Duration,
    /// Where it was read, in words.
    pub cpu_source: String,
    /// Memory.
    pub memory: JobMemory,
    /// Where it was read, in words.
    pub memory_source: String,
}

/// Memory in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct JobMemory {
    /// All of it, with what the kernel keeps of files.
    pub usage: u64,
    /// Less what the kernel would give up first: files' pages that were not used lately. Never zero.
    pub working_set: u64,
    /// Anonymous memory.
    pub rss: u64,
    /// Page faults, the minor ones and all.
    pub page_faults: u64,
    /// Page faults that waited for a disk.
    pub major_page_faults: u64,
}

/// Where CPU time stands.
#[derive(Debug, Clone, PartialEq, Eq)]
enum CpuSource {
    /// cgroup v1, cpuacct.usage: nanoseconds.
    V1(PathBuf),
    /// cgroup v2, cpu.stat: usage_usec.
    V2(PathBuf),
    /// /proc/stat.
    Host(PathBuf),
}

/// Where memory stands.
#[derive(Debug, Clone, PartialEq, Eq)]
enum MemorySource {
    /// cgroup v1's directory: memory.usage_in_bytes, memory.stat.
    V1(PathBuf),
    /// cgroup v2's directory: memory.current, memory.stat.
    V2(PathBuf),
    /// /proc/meminfo, /proc/vmstat.
    Host(PathBuf),
}

/// Reads what the job uses.
#[derive(Debug)]
pub struct JobMeter {
    cpu: CpuSource,
    memory: MemorySource,
    /// The most that was shown.
    shown: Duration,
}

impl JobMeter {
    /// Looks for the job's cgroup.
    #[must_use]
    pub fn new(roots: &Roots) -> Self {
        let cpu = cgroup::job_directories(roots, "cpuacct").into_iter().map(|(v2, directory)| {
            if v2 {
                CpuSource::V2(directory.join("cpu.stat"))
            } else {
                CpuSource::V1(directory.join("cpuacct.usage"))
            }
        });
        let memory = cgroup::job_directories(roots, "memory").into_iter().map(|(v2, directory)| {
            if v2 { MemorySource::V2(directory) } else { MemorySource::V1(directory) }
        });
        // A hierarchy may be there without the file: a v2 controller that is not delegated.
        let cpu = cpu.into_iter().find(|source| source.read().is_some());
        let memory = memory.into_iter().find(|source| source.read().is_some());
        Self {
            cpu: cpu.unwrap_or_else(|| CpuSource::Host(roots.proc.clone())),
            memory: memory.unwrap_or_else(|| MemorySource::Host(roots.proc.clone())),
            shown: CPU_AT_LEAST,
        }
    }

    /// Reads the figures; none where nothing can be read.
    pub fn sample(&mut self) -> Option<JobUsage> {
        let at = SystemTime::now();
        let (cpu, mut memory) = (self.cpu.read()?, self.memory.read()?);
        self.shown = self.shown.max(cpu);
        memory.working_set = memory.working_set.max(MEMORY_AT_LEAST);
        memory.usage = memory.usage.max(memory.working_set);
        Some(JobUsage {
            at,
            cpu: self.shown,
            cpu_source: self.cpu.describe(),
            memory,
            memory_source: self.memory.describe(),
        })
    }
}

impl CpuSource {
    fn read(&self) -> Option<Duration> {
        match self {
            Self::V1(file) => read_small(file)?.trim().parse().ok().map(Duration::from_nanos),
            Self::V2(file) => value(&read_small(file)?, "usage_usec").map(Duration::from_micros),
            Self::Host(proc) => host_cpu(&read_small(&proc.join("stat"))?, ticks_per_second()),
        }
    }

    fn describe(&self) -> String {
        match self {
            Self::V1(file) => format!("the job's cgroup v1, {}", file.display()),
            Self::V2(file) => format!("the job's cgroup v2, {}", file.display()),
            Self::Host(proc) => format!("the host, {}", proc.join("stat").display()),
        }
    }
}

impl MemorySource {
    fn read(&self) -> Option<JobMemory> {
        match self {
            Self::V1(directory) => {
                let usage = read_small(&directory.join("memory.usage_in_bytes"))?.trim().parse().ok()?;
                // The `total_` figures include the cgroups below, as the usage does.
                cgroup_memory(usage, &read_small(&directory.join("memory.stat"))?, "total_")
            }
            Self::V2(directory) => {
                let usage = read_small(&directory.join("memory.current"))?.trim().parse().ok()?;
                cgroup_memory(usage, &read_small(&directory.join("memory.stat"))?, "")
            }
            Self::Host(proc) => {
                let faults = read_small(&proc.join("vmstat")).unwrap_or_default();
                host_memory(&read_small(&proc.join("meminfo"))?, &faults)
            }
        }
    }

    fn describe(&self) -> String {
        match self {
            Self::V1(directory) => format!("the job's cgroup v1, {}", directory.display()),
            Self::V2(directory) => format!("the job's cgroup v2, {}", directory.display()),
            Self::Host(proc) => format!("the host, {}", proc.join("meminfo").display()),
        }
    }
}

/// The number after a name at the beginning of a line: `name 12`, `name: 12 kB`.
pub(super) fn value(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| {
        let rest = line.strip_prefix(name)?;
        let rest = rest.strip_prefix(':').unwrap_or(rest);
        rest.starts_with([' ', '\t']).then(|| rest.split_ascii_whitespace().next()?.parse().ok())?
    })
}

/// What cAdvisor makes of a cgroup for a kubelet: the working set is the usage less the inactive file pages. `total` is
/// what the names of v1 begin with.
fn cgroup_memory(usage: u64, stat: &str, total: &str) -> Option<JobMemory> {
    let stat_value = |name: &str| value(stat, &format!("{total}{name}"));
    let inactive = stat_value("inactive_file")?;
    Some(JobMemory {
        usage,
        working_set: usage.saturating_sub(inactive),
        // v1 and v2 have different names for anonymous memory.
        rss: stat_value("rss").or_else(|| stat_value("anon")).unwrap_or_default(),
        page_faults: stat_value("pgfault").unwrap_or_default(),
        major_page_faults: stat_value("pgmajfault").unwrap_or_default(),
    })
}

/// The same of the whole host (proc_meminfo(5)).
fn host_memory(meminfo: &str, vmstat: &str) -> Option<JobMemory> {
    let bytes = |name| value(meminfo, name).map(|kib| kib << 10);
    let usage = bytes("MemTotal")?.saturating_sub(bytes("MemFree")?);
    Some(JobMemory {
        usage,
        working_set: usage.saturating_sub(bytes("Inactive(file)").unwrap_or_default()),
        rss: bytes("AnonPages").unwrap_or_default(),
        page_faults: value(vmstat, "pgfault").unwrap_or_default(),
        major_page_faults: value(vmstat, "pgmajfault").unwrap_or_default(),
    })
}

/// The first line of /proc/stat (proc_stat(5)): user nice system idle iowait irq softirq steal guest guest_nice, in clock
/// ticks; guests are in user and nice already, and what was stolen was not used.
fn host_cpu(stat: &str, per_second: u64) -> Option<Duration> {
    let mut fields = stat.lines().next()?.strip_prefix("cpu ")?.split_ascii_whitespace();
    let mut next = || fields.next()?.parse::<u64>().ok();
    let (user, nice, system, _idle, _iowait) = (next()?, next()?, next()?, next()?, next());
    let (irq, softirq) = (next().unwrap_or_default(), next().unwrap_or_default());
    let ticks = [user, nice, system, irq, softirq].into_iter().fold(0, u64::saturating_add);
    let rest = Duration::from_nanos(ticks % per_second * 1_000_000_000 / per_second);
    Some(Duration::from_secs(ticks / per_second) + rest)
}

fn ticks_per_second() -> u64 {
    // USER_HZ (time(7)).
    sysconf(SysconfVar::CLK_TCK)
        .ok()
        .flatten()
        .and_then(|n| n.try_into().ok())
        .filter(|n| *n > 0)
        .unwrap_or(100)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::allocation::stand_in;
    use proptest::prelude::*;
    use std::fs;

    fn host(cgroup: &str) -> (tempfile::TempDir, Roots) {
        let (directory, roots) = stand_in::host(cgroup);
        let stat = "cpu  100 20 30 9000 50 6 7 800 90 10\ncpu0 1 2 3 4 5 6 7 8 9 10\nbtime 1\n";
        fs::write(roots.proc.join("stat"), stat).unwrap();
        let meminfo = "MemTotal:       1000 kB\nMemFree:         300 kB\nActive(file):     90 kB\n\
             Inactive(file):  200 kB\nAnonPages:       150 kB\n";
        fs::write(roots.proc.join("meminfo"), meminfo).unwrap();
        fs::write(roots.proc.join("vmstat"), "pgfault 77\npgmajfault 5\n").unwrap();
        (directory, roots)
    }

    fn write(roots: &Roots, file: &str, text: &str) {
        let file = roots.cgroup.join(file);
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(file, text).unwrap();
    }

    const HOST: JobMemory = JobMemory {
        usage: 700 << 10,
        working_set: 500 << 10,
        rss: 150 << 10,
        page_faults: 77,
        major_page_faults: 5,
    };

    #[test]
    fn without_a_job_s_cgroup_the_host_is_shown() {
        for cgroup in ["0::/user.slice/session-3.scope\n", "4:memory:/\n", ""] {
            let (_guard, roots) = host(cgroup);
            let usage = JobMeter::new(&roots).sample().unwrap();
            assert_eq!((usage.cpu, usage.memory), (Duration::from_millis(1630), HOST));
            assert!(usage.cpu_source.starts_with("the host, "), "{}", usage.cpu_source);
            assert!(usage.memory_source.starts_with("the host, "), "{}", usage.memory_source);
        }
    }

    #[test]
    fn the_jobs_cgroup_counts_v1() {
        let (_guard, roots) = host(
            "4:memory:/slurm/uid_7/job_1/step_0/task_0\n2:cpu,cpuacct:/slurm/uid_7/job_1/step_0/task_0\n",
        );
        write(&roots, "cpuacct/slurm/uid_7/job_1/cpuacct.usage", "123456789\n");
        write(&roots, "memory/slurm/uid_7/job_1/memory.usage_in_bytes", "900000\n");
        let stat = "cache 1\nrss 2\ninactive_file 3\ntotal_cache 500000\ntotal_rss 400000\ntotal_pgfault 12\n\
             total_pgmajfault 1\ntotal_inactive_file 300000\n";
        write(&roots, "memory/slurm/uid_7/job_1/memory.stat", stat);
        let usage = JobMeter::new(&roots).sample().unwrap();
        assert_eq!(usage.cpu, Duration::from_nanos(123_456_789));
        let memory = JobMemory {
            usage: 900_000,
            working_set: 600_000,
            rss: 400_000,
            page_faults: 12,
            major_page_faults: 1,
        };
        assert_eq!(usage.memory, memory);
        assert!(usage.cpu_source.starts_with("the job's cgroup v1, "), "{}", usage.cpu_source);
    }

    #[test]
    fn the_jobs_cgroup_counts_v2() {
        let job = "system.slice/slurmstepd.scope/job_1";
        let (_guard, roots) = host(&format!("0::/{job}/step_0/user/task_0\n"));
        write(&roots, &format!("{job}/cpu.stat"), "usage_usec 5000000\nuser_usec 4000000\n");
        write(&roots, &format!("{job}/memory.current"), "900000\n");
        write(
            &roots,
            &format!("{job}/memory.stat"),
            "anon 400000\nfile 7\ninactive_file 900001\npgfault 3\npgmajfault 2\n",
        );
        let usage = JobMeter::new(&roots).sample().unwrap();
        assert_eq!(usage.cpu, Duration::from_secs(5));
        // More inactive than used cannot be; the least is shown.
        assert_eq!((usage.memory.usage, usage.memory.working_set), (900_000, MEMORY_AT_LEAST));
        assert_eq!(usage.memory.rss, 400_000);
        assert!(usage.memory_source.starts_with("the job's cgroup v2, "), "{}", usage.memory_source);
    }

    #[test]
    fn a_controller_that_the_job_has_not_is_the_host_s() {
        let (_guard, roots) = host("2:cpuacct:/\n4:memory:/slurm/uid_7/job_1/step_0\n");
        write(&roots, "memory/slurm/uid_7/job_1/memory.usage_in_bytes", "900000\n");
        write(&roots, "memory/slurm/uid_7/job_1/memory.stat", "total_inactive_file 0\n");
        let usage = JobMeter::new(&roots).sample().unwrap();
        assert_eq!((usage.cpu, usage.memory.usage), (Duration::from_millis(1630), 900_000));
    }

    #[test]
    fn cpu_time_never_goes_down_and_is_never_zero() {
        let (_guard, roots) = host("0::/job_1\n");
        write(&roots, "job_1/cpu.stat", "usage_usec 0\n");
        let mut meter = JobMeter::new(&roots);
        for (used, shown) in [(0, 1000), (5000, 5000), (4000, 5000), (6000, 6000)] {
            write(&roots, "job_1/cpu.stat", &format!("usage_usec {used}\n"));
            assert_eq!(meter.sample().unwrap().cpu, Duration::from_micros(shown), "{used}");
        }
    }

    #[test]
    fn a_host_without_proc_has_no_figures() {
        let (_guard, roots) = host("");
        let mut meter = JobMeter::new(&roots);
        fs::remove_file(roots.proc.join("stat")).unwrap();
        assert_eq!(meter.sample(), None);
    }

    #[test]
    fn this_host_is_read() {
        let mut meter = JobMeter::new(&Roots::default());
        let usage = meter.sample().unwrap();
        assert!(usage.cpu > CPU_AT_LEAST && usage.memory.working_set > 1 << 20, "{usage:?}");
        assert!(usage.memory.working_set <= usage.memory.usage, "{usage:?}");
    }

    proptest! {
        #[test]
        fn no_file_makes_a_parser_panic(text in "(?s).{0,200}", lines in "(cpu|anon|MemTotal:|inactive_file)[0-9 ]{0,90}\n") {
            for text in [&text, &lines] {
                host_cpu(text, 100);
                host_memory(text, text);
                cgroup_memory(1, text, "");
            }
        }
    }
}
