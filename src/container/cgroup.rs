//! A cgroup of its own for a container, where the batch system lets its jobs have such (delegation): there the kernel holds the
//! limits, exactly and at once. Elsewhere affinity and a look every second do.
//!
//! Sources: cgroups(7); Linux' `Documentation/admin-guide/cgroup-v2.rst` and `cgroup-v1/`; the kubelet's
//! `pkg/kubelet/cm/cgroup_manager_linux.go`.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// The period of a CPU limit in microseconds: the kernel's own, and the kubelet's.
const PERIOD: u64 = 100_000;

/// The least quota that the kernel takes: a millisecond.
const LEAST_QUOTA: u64 = 1000;

/// A cgroup goes once its last process is reaped, which the kernel may do a moment later.
const REMOVE_TRIES: u32 = 20;
const REMOVE_PAUSE: Duration = Duration::from_millis(5);

/// Directories in which a job may make cgroups of its own; one for all controllers in v2, one for each in v1.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Delegation {
    /// Whether it is the unified hierarchy.
    pub v2: bool,
    /// For memory.
    pub memory: Option<PathBuf>,
    /// For CPU time.
    pub cpu: Option<PathBuf>,
    /// For which CPUs.
    pub cpuset: Option<PathBuf>,
}

/// What a container may take.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of memory.
    pub memory: Option<u64>,
    /// Thousandths of a CPU.
    pub cpu_millis: Option<u64>,
}

/// A container's cgroup, to be made.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CgroupSpec {
    /// Its directories.
    pub directories: Vec<PathBuf>,
    /// What is written into which file of theirs, in this order.
    pub settings: Vec<(PathBuf, String)>,
    /// Where the kernel counts whom it has killed.
    pub events: Option<PathBuf>,
    /// Where its CPUs stand.
    pub cpus: Option<PathBuf>,
}

impl Delegation {
    /// The cgroup of one run of a container: `name` is no other's.
    #[must_use]
    pub fn plan(&self, name: &str, limits: Limits, cpus: &[usize]) -> CgroupSpec {
        let mut spec = CgroupSpec::default();
        let own = |directory: &Option<PathBuf>| directory.as_ref().map(|directory| directory.join(name));
        let (memory, cpu, cpuset) = (own(&self.memory), own(&self.cpu), own(&self.cpuset));
        for directory in [&memory, &cpu, &cpuset].into_iter().flatten() {
            if !spec.directories.contains(directory) {
                spec.directories.push(directory.clone());
            }
        }
        let v2 = self.v2;
        let mut set =
            |directory: &Path, file: &str, value: String| spec.settings.push((directory.join(file), value));
        if let (Some(directory), Some(bytes)) = (&memory, limits.memory) {
            if v2 {
                // As a kubelet does: no swap, and all of a container goes together.
                set(directory, "memory.swap.max", "0".to_owned());
                set(directory, "memory.oom.group", "1".to_owned());
                set(directory, "memory.max", bytes.to_string());
            } else {
                set(directory, "memory.limit_in_bytes", bytes.to_string());
            }
        }
        if let (Some(directory), Some(millis)) = (&cpu, limits.cpu_millis) {
            let quota = (millis.saturating_mul(PERIOD) / 1000).max(LEAST_QUOTA);
            if v2 {
                set(directory, "cpu.max", format!("{quota} {PERIOD}"));
            } else {
                set(directory, "cpu.cfs_period_us", PERIOD.to_string());
                set(directory, "cpu.cfs_quota_us", quota.to_string());
            }
        }
        if let Some(directory) = &cpuset
            && !cpus.is_empty()
        {
            set(directory, "cpuset.cpus", list(cpus));
        }
        spec.events =
            memory.map(|directory| directory.join(if v2 { "memory.events" } else { "memory.oom_control" }));
        spec.cpus = cpuset.map(|directory| directory.join("cpuset.cpus"));
        spec
    }
}

/// CPUs as the kernel takes them.
fn list(cpus: &[usize]) -> String {
    cpus.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
}

/// A container's cgroup that was made. It goes when this is dropped, once nothing runs in it.
#[derive(Debug, Default)]
pub(super) struct Cgroup {
    spec: CgroupSpec,
}

impl Cgroup {
    /// Makes it. What the kernel does not take is left out: the pilot weighs every container with a limit, and sets its affinity,
    /// in any case.
    pub(super) fn make(mut spec: CgroupSpec) -> Self {
        spec.directories.retain(|directory| match fs::create_dir(directory) {
            // A run of before, of which nobody has cleared up.
            Err(error) => error.kind() == io::ErrorKind::AlreadyExists,
            Ok(()) => true,
        });
        for directory in &spec.directories {
            // In v1 a cpuset begins with neither CPUs nor memory, and takes no process.
            for file in ["cpuset.mems", "cpuset.cpus"] {
                let own = directory.join(file);
                let above = directory.parent().map(|parent| parent.join(file));
                if fs::read_to_string(&own).is_ok_and(|text| text.trim().is_empty())
                    && let Some(text) = above.and_then(|above| fs::read_to_string(above).ok())
                    && !text.trim().is_empty()
                {
                    let _ = fs::write(&own, text.trim());
                }
            }
        }
        for (file, value) in &spec.settings {
            let _ = fs::write(file, value);
        }
        Self { spec }
    }

    /// Where a process writes its number to be in it.
    pub(super) fn doors(&self) -> Vec<PathBuf> {
        self.spec.directories.iter().map(|directory| directory.join("cgroup.procs")).collect()
    }

    /// Whether the kernel has killed anything in it for want of memory.
    pub(super) fn has_oom_kill(&self) -> bool {
        let text =
            self.spec.events.as_ref().and_then(|file| fs::read_to_string(file).ok()).unwrap_or_default();
        let count = text.lines().find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse::<u64>().ok());
        count.is_some_and(|count| count > 0)
    }

    /// It runs on these CPUs from now on.
    pub(super) fn set_cpus(&self, cpus: &[usize]) {
        if let Some(file) = self.spec.cpus.as_ref().filter(|_| !cpus.is_empty()) {
            let _ = fs::write(file, list(cpus));
        }
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        for directory in &self.spec.directories {
            for _ in 0..REMOVE_TRIES {
                match fs::remove_dir(directory) {
                    Err(error) if error.raw_os_error() == Some(nix::errno::Errno::EBUSY as i32) => {
                        std::thread::sleep(REMOVE_PAUSE);
                    }
                    // Where it cannot be removed, it goes with the job's own.
                    Ok(()) | Err(_) => break,
                }
            }
        }
    }
}

/// Goes into a cgroup by its doors.
pub(super) fn enter(doors: &[PathBuf]) {
    for door in doors {
        // 0 is whoever writes. What cannot be entered holds nothing up: see [`Cgroup::make`].
        let _ = fs::write(door, "0");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_container_has_a_directory_a_hierarchy_and_what_the_kernel_calls_its_limits() {
        let limits = Limits { memory: Some(1 << 20), cpu_millis: Some(1500) };
        let names = |spec: &CgroupSpec| -> Vec<String> {
            spec.settings.iter().map(|(file, value)| format!("{}={value}", file.display())).collect()
        };
        let all = Some(PathBuf::from("/cg"));
        let v2 = Delegation { v2: true, memory: all.clone(), cpu: all.clone(), cpuset: all };
        let spec = v2.plan("c", limits, &[0, 2]);
        assert_eq!(spec.directories, [PathBuf::from("/cg/c")]);
        assert_eq!(
            names(&spec),
            [
                "/cg/c/memory.swap.max=0",
                "/cg/c/memory.oom.group=1",
                "/cg/c/memory.max=1048576",
                "/cg/c/cpu.max=150000 100000",
                "/cg/c/cpuset.cpus=0,2",
            ]
        );
        let v1 = Delegation { v2: false, memory: Some("/m".into()), cpu: Some("/u".into()), cpuset: None };
        let spec = v1.plan("c", limits, &[0]);
        assert_eq!(spec.directories, [PathBuf::from("/m/c"), PathBuf::from("/u/c")]);
        assert_eq!(
            names(&spec),
            [
                "/m/c/memory.limit_in_bytes=1048576",
                "/u/c/cpu.cfs_period_us=100000",
                "/u/c/cpu.cfs_quota_us=150000"
            ]
        );
        assert_eq!(spec.events, Some("/m/c/memory.oom_control".into()));
        let tiny = v1.plan("c", Limits { memory: None, cpu_millis: Some(1) }, &[]);
        assert_eq!(tiny.settings[1].1, "1000");
    }

    #[test]
    fn a_place_that_takes_nothing_holds_nothing_up() {
        let spec = Delegation { memory: Some("/nonexistent".into()), ..Delegation::default() }.plan(
            "c",
            Limits { memory: Some(1), cpu_millis: None },
            &[],
        );
        let cgroup = Cgroup::make(spec);
        assert!(cgroup.doors().is_empty() && !cgroup.has_oom_kill());
        enter(&["/nonexistent/door".into()]);
    }
}
