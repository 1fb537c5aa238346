//! Whether the job may make cgroups of its own below the one that it is in (delegation: cgroups(7), systemd's
//! Documentation/CGROUP_DELEGATION).
//!
//! Slurm's and PBS's own cgroups are root's, and then there is none. Where a site gives its jobs one (a scope of the user's
//! systemd, a hook that changes the owner), v1 is ready for use; in v2 a cgroup with processes of its own has no controllers for
//! those below it, so the job's processes move into one of those first.

use std::fs;
use std::path::{Path, PathBuf};

use nix::unistd::{AccessFlags, access};

use super::cgroup;
use super::resources::{Roots, read_small};

/// Where the pilot itself is in v2.
const LEAF: &str = "jiriaf-pilot";

/// Processes may be born while the others move.
const PASSES: usize = 5;

/// Directories in which cgroups may be made, by controller.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Delegated {
    /// Whether it is the unified hierarchy.
    pub v2: bool,
    /// For memory.
    pub memory: Option<PathBuf>,
    /// For CPU time.
    pub cpu: Option<PathBuf>,
    /// For which CPUs.
    pub cpuset: Option<PathBuf>,
}

/// Looks for such directories, and in v2 makes room there. None where the kernel lets this user make none.
#[must_use]
pub fn find(roots: &Roots) -> Option<Delegated> {
    // Root may do so everywhere, and would do it in the host's own cgroups. A pilot is an ordinary user's.
    if nix::unistd::geteuid().is_root() {
        return None;
    }
    of_unified(roots).or_else(|| of_v1(roots))
}

fn is_writable(path: &Path) -> bool {
    access(path, AccessFlags::W_OK).is_ok()
}

fn of_v1(roots: &Roots) -> Option<Delegated> {
    let of = |controller: &str| {
        let own = cgroup::own_directories(roots, controller);
        own.into_iter().find(|(v2, directory)| !v2 && is_writable(directory)).map(|(_, directory)| directory)
    };
    let found = Delegated { v2: false, memory: of("memory"), cpu: of("cpu"), cpuset: of("cpuset") };
    (found != Delegated::default()).then_some(found)
}

fn of_unified(roots: &Roots) -> Option<Delegated> {
    let own = cgroup::own_directories(roots, "memory").into_iter().find(|(v2, _)| *v2)?.1;
    // After a crash of the pilot it is in its place already.
    let root = if own.ends_with(LEAF) { own.parent()?.to_owned() } else { own };
    let files = ["cgroup.procs", "cgroup.subtree_control"].map(|name| root.join(name));
    if !is_writable(&root) || !files.iter().all(|file| is_writable(file)) {
        return None;
    }
    let there = read_small(&root.join("cgroup.controllers")).unwrap_or_default();
    let wanted =
        ["memory", "cpu", "cpuset"].into_iter().filter(|name| there.split_whitespace().any(|c| c == *name));
    let wanted: Vec<&str> = wanted.collect();
    if wanted.is_empty() {
        return None;
    }
    make_room(&root)?;
    let enabled = |name: &str| {
        (wanted.contains(&name) && fs::write(root.join("cgroup.subtree_control"), format!("+{name}")).is_ok())
            .then(|| root.clone())
    };
    let found =
        Delegated { v2: true, memory: enabled("memory"), cpu: enabled("cpu"), cpuset: enabled("cpuset") };
    (found.memory.is_some() || found.cpu.is_some() || found.cpuset.is_some()).then_some(found)
}

/// Moves all processes of a cgroup into one below it.
fn make_room(root: &Path) -> Option<()> {
    let leaf = root.join(LEAF);
    if !leaf.is_dir() {
        fs::create_dir(&leaf).ok()?;
    }
    for _ in 0..PASSES {
        let processes = read_small(&root.join("cgroup.procs"))?;
        if processes.trim().is_empty() {
            return Some(());
        }
        for process in processes.lines() {
            // One that has ended meanwhile needs no place; one of another user's stays, and then there is no room.
            let _ = fs::write(leaf.join("cgroup.procs"), process);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::allocation::stand_in::host;

    #[test]
    fn v1_is_used_where_the_own_directory_may_be_written_to() {
        let (_guard, roots) = host("4:memory:/job\n3:cpu,cpuacct:/job\n2:cpuset:/other\n");
        fs::create_dir_all(roots.cgroup.join("memory/job")).unwrap();
        fs::create_dir_all(roots.cgroup.join("cpu/job")).unwrap();
        let found = of_v1(&roots).unwrap();
        assert_eq!(
            (found.memory, found.cpu),
            (Some(roots.cgroup.join("memory/job")), Some(roots.cgroup.join("cpu/job")))
        );
        assert_eq!((found.v2, found.cpuset), (false, None));
        let (_guard, roots) = host("4:memory:/job\n");
        assert_eq!(of_v1(&roots), None);
    }

    #[test]
    fn in_v2_the_processes_move_into_a_leaf_and_what_is_there_is_enabled() {
        let (_guard, roots) = host("0::/job\n");
        let job = roots.cgroup.join("job");
        fs::create_dir_all(&job).unwrap();
        for (file, text) in [
            ("cgroup.procs", ""),
            ("cgroup.subtree_control", ""),
            ("cgroup.controllers", "cpuset memory pids\n"),
            ("memory.max", "max\n"),
        ] {
            fs::write(job.join(file), text).unwrap();
        }
        let found = of_unified(&roots).unwrap();
        assert_eq!(
            (found.v2, found.memory, found.cpu, found.cpuset),
            (true, Some(job.clone()), None, Some(job.clone()))
        );
        assert!(job.join(LEAF).is_dir());
        // Processes that do not go: here the file is no cgroup's, and says so for ever.
        fs::write(job.join("cgroup.procs"), "17\n").unwrap();
        assert_eq!(of_unified(&roots), None);
        // After a crash.
        fs::write(job.join("cgroup.procs"), "").unwrap();
        fs::write(roots.proc.join("self/cgroup"), format!("0::/job/{LEAF}\n")).unwrap();
        assert_eq!(of_unified(&roots).unwrap().memory, Some(job));
    }
}
