//! The memory limit of this process's cgroup: the smallest one from its own level up to the root.
//!
//! Slurm sets the limit at the step's or the job's level and none at the task's, so the own level alone tells nothing.
//! Paths are never built: Slurm's names change with its version.

use std::path::{Path, PathBuf};

use super::resources::{Roots, read_small};

/// The deepest path that is walked: deeper ones than this are no cgroups of a batch system.
const MAX_LEVELS: usize = 64;

/// From here on a number is cgroup v1's way to write "no limit" (the largest page-aligned i64).
const NO_LIMIT: u64 = 1 << 60;

/// A limit and the file in which it stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct MemoryLimit {
    pub(super) bytes: u64,
    /// `cgroup v1 memory.limit_in_bytes` or `cgroup v2 memory.max`.
    pub(super) kind: &'static str,
    pub(super) file: PathBuf,
}

/// A hierarchy in which this process has a cgroup of the wanted controller.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Membership {
    v2: bool,
    path: String,
}

/// Reads /proc/PID/cgroup (cgroups(7)): `4:memory:/a/b` is v1, `0::/a/b` is v2, which has all controllers.
fn memberships(text: &str, controller: &str) -> Vec<Membership> {
    let lines = text.lines().filter_map(|line| {
        let mut fields = line.splitn(3, ':');
        let (number, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
        let v2 = number == "0" && controllers.is_empty();
        let named = controllers.split(',').any(|other| other == controller);
        (v2 || named).then(|| Membership { v2, path: path.to_owned() })
    });
    lines.collect()
}

/// Where a hierarchy is mounted, and which of its directories is seen there.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Mount {
    v2: bool,
    root: String,
    point: PathBuf,
}

/// Reads a controller's hierarchies of /proc/PID/mountinfo (proc_pid_mountinfo(5)).
fn mounts(text: &str, controller: &str) -> Vec<Mount> {
    let lines = text.lines().filter_map(|line| {
        let (before, after) = line.split_once(" - ")?;
        let mut before = before.split(' ').skip(3);
        let (root, point) = (before.next()?, before.next()?);
        let mut after = after.split(' ');
        let (kind, options) = (after.next()?, after.nth(1).unwrap_or_default());
        let v2 = kind == "cgroup2";
        let named = kind == "cgroup" && options.split(',').any(|option| option == controller);
        // Blanks and the like are written as octal escapes; a hierarchy mounted at such a place is not looked for.
        (v2 || named).then(|| Mount { v2, root: root.to_owned(), point: PathBuf::from(point) })
    });
    lines.collect()
}

/// The path below the mount point that stands for `path` of the hierarchy; what is outside of the mount (another cgroup
/// namespace, a container) is the mount point itself.
fn below(mount: &Mount, path: &str) -> Vec<String> {
    let root = mount.root.trim_end_matches('/');
    let rest = match path.strip_prefix(root) {
        Some(rest) if rest.is_empty() || rest.starts_with('/') => rest,
        _ => "",
    };
    let components: Vec<_> = rest.split('/').filter(|part| !part.is_empty()).map(str::to_owned).collect();
    if components.iter().any(|part| part == "..") { Vec::new() } else { components }
}

/// A cgroup of this process: where its hierarchy is mounted, and the way from there.
struct Own {
    mount: Mount,
    components: Vec<String>,
}

/// This process's cgroups of a controller; none where /proc does not tell.
fn own(roots: &Roots, controller: &str) -> Vec<Own> {
    let Some(text) = read_small(&roots.proc.join("self/cgroup")) else { return Vec::new() };
    let mountinfo = read_small(&roots.proc.join("self/mountinfo"));
    let mut mounts = mountinfo.map(|text| mounts(&text, controller)).unwrap_or_default();
    if mounts.is_empty() {
        // The usual places, should mountinfo not be there.
        let usual = [
            (true, roots.cgroup.clone()),
            (true, roots.cgroup.join("unified")),
            (false, roots.cgroup.join(controller)),
        ];
        mounts.extend(usual.map(|(v2, point)| Mount { v2, root: "/".to_owned(), point }));
    }
    let own = memberships(&text, controller).into_iter().flat_map(|membership| {
        let mounts = mounts.iter().filter(move |mount| mount.v2 == membership.v2);
        mounts.map(move |mount| Own { mount: mount.clone(), components: below(mount, &membership.path) })
    });
    own.collect()
}

/// The smallest memory limit above this process that is below the host's memory, where there is one.
pub(super) fn memory_limit(roots: &Roots, host: Option<u64>) -> Option<MemoryLimit> {
    own(roots, "memory")
        .iter()
        .flat_map(|own| limits(&own.mount, &own.components))
        .filter(|limit| limit.bytes < NO_LIMIT && host.is_none_or(|host| limit.bytes <= host))
        .min_by_key(|limit| limit.bytes)
}

/// The directories of this process's memory cgroups, from the hierarchy's root to its own level: whether they are v2's, and
/// their limits.
pub(super) fn memory_levels(roots: &Roots) -> Vec<(bool, PathBuf, Option<u64>)> {
    let mut levels = Vec::new();
    for own in own(roots, "memory") {
        let name = if own.mount.v2 { "memory.max" } else { "memory.limit_in_bytes" };
        for directory in directories(&own.mount, &own.components) {
            // A hierarchy may be there without the controller: v2 beside v1.
            let Some(limit) = read_small(&directory.join(name)) else { continue };
            levels.push((own.mount.v2, directory, parse_limit(&limit).filter(|limit| *limit < NO_LIMIT)));
        }
    }
    levels
}

/// The directories of this process's own cgroups of a controller, and whether they are v2's.
pub(super) fn own_directories(roots: &Roots, controller: &str) -> Vec<(bool, PathBuf)> {
    let own = own(roots, controller).into_iter().filter_map(|own| {
        let directory = directories(&own.mount, &own.components).last()?;
        Some((own.mount.v2, directory))
    });
    own.collect()
}

/// The directories of the batch job's own cgroup that have a controller's files, and whether they are cgroup v2's. Of the
/// whole job on this host, not of the step or task that this process is in.
pub(super) fn job_directories(roots: &Roots, controller: &str) -> Vec<(bool, PathBuf)> {
    let job = |own: Own| {
        let levels = own.components.iter().take(MAX_LEVELS).position(|name| is_job(name)).map(|at| at + 1);
        // PBS has no word in the job's own name, but in the one above: `…/pbs_jobs.service/jobid/12.server`.
        let above = own.components.iter().take(MAX_LEVELS).position(|name| name == "jobid").map(|at| at + 2);
        let levels = levels.or(above).filter(|levels| *levels <= own.components.len())?;
        let path: PathBuf = own.components.iter().take(levels).collect();
        Some((own.mount.v2, own.mount.point.join(path)))
    };
    own(roots, controller).into_iter().filter_map(job).collect()
}

/// Slurm's name of a job's cgroup, in v1 (`/slurm/uid_7/job_1`) and v2 (`slurmstepd.scope/job_1`).
fn is_job(name: &str) -> bool {
    name.strip_prefix("job_").is_some_and(|id| !id.is_empty() && id.bytes().all(|byte| byte.is_ascii_digit()))
}

/// The limits of a cgroup and all above it.
fn limits(mount: &Mount, components: &[String]) -> Vec<MemoryLimit> {
    let (kind, name) = if mount.v2 {
        ("cgroup v2 memory.max", "memory.max")
    } else {
        ("cgroup v1 memory.limit_in_bytes", "memory.limit_in_bytes")
    };
    let directories = directories(mount, components);
    let read = |directory: PathBuf| {
        let file = directory.join(name);
        let bytes = parse_limit(&read_small(&file)?)?;
        Some(MemoryLimit { bytes, kind, file })
    };
    directories.filter_map(read).collect()
}

/// A cgroup's directory and those above it, the root's first.
fn directories(mount: &Mount, components: &[String]) -> impl Iterator<Item = PathBuf> {
    let levels = components.len().min(MAX_LEVELS);
    (0..=levels).map(|depth| {
        let path: PathBuf = components.iter().take(depth).collect();
        if depth == 0 { mount.point.clone() } else { mount.point.join(path) }
    })
}

/// Reads a limit in bytes; `max` is none.
fn parse_limit(text: &str) -> Option<u64> {
    text.trim().parse().ok()
}

/// Which batch system the names of this process's cgroups speak of.
pub(super) fn names_batch_system(proc: &Path) -> Option<&'static str> {
    let text = read_small(&proc.join("self/cgroup"))?;
    ["slurm", "pbs"].into_iter().find(|name| text.contains(name))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::allocation::stand_in::{host, write_cgroup as write};
    use proptest::prelude::*;
    use std::fs;

    #[test]
    fn the_smallest_limit_of_all_levels_counts_v1() {
        let (_guard, roots) =
            host("9:name=systemd:/\n4:cpu,memory:/slurm/uid_7/job_1/step_batch/task_0\n0::/\n");
        write(&roots, "memory/memory.limit_in_bytes", "9223372036854771712\n");
        write(&roots, "memory/slurm/uid_7/job_1/memory.limit_in_bytes", "400000000\n");
        write(&roots, "memory/slurm/uid_7/job_1/step_batch/memory.limit_in_bytes", "300000000\n");
        write(
            &roots,
            "memory/slurm/uid_7/job_1/step_batch/task_0/memory.limit_in_bytes",
            "9223372036854771712\n",
        );
        let limit = memory_limit(&roots, Some(1 << 40)).unwrap();
        assert_eq!((limit.bytes, limit.kind), (300_000_000, "cgroup v1 memory.limit_in_bytes"));
        assert!(limit.file.ends_with("step_batch/memory.limit_in_bytes"));
        // More than the host has is no limit.
        assert_eq!(memory_limit(&roots, Some(200_000_000)), None);
    }

    #[test]
    fn the_smallest_limit_of_all_levels_counts_v2() {
        let (_guard, roots) = host("0::/system.slice/slurmstepd.scope/job_1/step_0/user/task_0\n");
        let job = "system.slice/slurmstepd.scope/job_1";
        write(&roots, &format!("{job}/memory.max"), "500000000\n");
        write(&roots, &format!("{job}/step_0/memory.max"), "max\n");
        write(&roots, &format!("{job}/step_0/user/task_0/memory.max"), "max\n");
        let limit = memory_limit(&roots, None).unwrap();
        assert_eq!((limit.bytes, limit.kind), (500_000_000, "cgroup v2 memory.max"));
    }

    #[test]
    fn the_mount_tells_where_the_hierarchy_is() {
        let (_guard, roots) = host("0::/\n5:memory:/docker/abc/job_1\n");
        let point = roots.cgroup.join("odd/place");
        let mountinfo = format!(
            "30 20 0:26 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n\
             31 20 0:27 /docker/abc {} rw,nosuid shared:9 - cgroup cgroup rw,memory\n",
            point.display()
        );
        fs::write(roots.proc.join("self/mountinfo"), mountinfo).unwrap();
        write(&roots, "odd/place/job_1/memory.limit_in_bytes", "1000000\n");
        assert_eq!(memory_limit(&roots, None).unwrap().bytes, 1_000_000);
    }

    #[test]
    fn a_path_outside_of_the_mount_is_the_mount() {
        let mount = Mount { v2: true, root: "/a".into(), point: "/m".into() };
        assert_eq!(below(&mount, "/a/b/c"), ["b", "c"]);
        assert!(below(&mount, "/ab/c").is_empty());
        assert!(below(&mount, "/a/../x").is_empty());
        let whole = Mount { root: "/".into(), ..mount };
        assert_eq!(below(&whole, "/a"), ["a"]);
        assert!(below(&whole, "/../x").is_empty());
    }

    #[test]
    fn the_jobs_own_level_is_found_under_each_batch_system() {
        let cases = [
            ("4:memory:/slurm_n1/uid_7/job_12/step_batch/task_0\n", "memory/slurm_n1/uid_7/job_12", false),
            (
                "0::/system.slice/slurmstepd.scope/job_12/step_0/user/task_0\n",
                "system.slice/slurmstepd.scope/job_12",
                true,
            ),
            (
                "4:memory:/pbs_jobs.service/jobid/34.pbs.site.org\n",
                "memory/pbs_jobs.service/jobid/34.pbs.site.org",
                false,
            ),
        ];
        for (cgroup, wanted, v2) in cases {
            let (_guard, roots) = host(cgroup);
            let found = job_directories(&roots, "memory");
            assert!(found.contains(&(v2, roots.cgroup.join(wanted))), "{found:?}");
        }
        for other in
            ["0::/user.slice/user-7.slice/session-3.scope\n", "0::/\n", "4:memory:/x/jobid\n", "0::/job_x\n"]
        {
            let (_guard, roots) = host(other);
            assert!(job_directories(&roots, "memory").is_empty(), "{other}");
        }
    }

    #[test]
    fn a_host_without_cgroups_has_no_limit() {
        let (_guard, roots) = host("");
        assert_eq!(memory_limit(&roots, None), None);
        fs::remove_file(roots.proc.join("self/cgroup")).unwrap();
        assert_eq!(memory_limit(&roots, None), None);
    }

    proptest! {
        #[test]
        fn no_file_makes_a_parser_panic(text in "(?s).{0,200}", lines in "([0-9:a-z/, -]{0,30}\n){0,4}") {
            for text in [&text, &lines] {
                memberships(text, "memory");
                mounts(text, "memory");
                parse_limit(text);
            }
        }
    }
}
