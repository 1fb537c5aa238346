//! Which CPUs are threads of one core, and which cores are of one NUMA node (sysfs-devices-system-cpu, numa(7)).

use std::collections::BTreeMap;

use serde::Serialize;

use super::resources::{Roots, allowed_cpus, parse_cpu_list, read_small};

/// A CPU (a hardware thread), and what it belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Cpu {
    /// The kernel's number.
    pub number: usize,
    /// The lowest number of its core's threads, so that no two cores of a host have one.
    pub core: usize,
    /// The NUMA node.
    pub node: usize,
}

/// The most NUMA nodes that are looked for: the kernel's own limit is 1024, and hosts have at most some dozens.
const MAX_NODES: usize = 1024;

/// What these CPUs belong to. Where the host does not say, each is a core of its own, and all are of one node.
pub(super) fn of(roots: &Roots, cpus: &[usize]) -> Vec<Cpu> {
    let nodes = nodes(roots);
    let cpu = |number: &usize| {
        let siblings =
            roots.sys.join(format!("devices/system/cpu/cpu{number}/topology/thread_siblings_list"));
        let siblings = read_small(&siblings).and_then(|text| parse_cpu_list(&text));
        let core = siblings.and_then(|siblings| siblings.first().copied()).unwrap_or(*number);
        Cpu { number: *number, core, node: nodes.get(number).copied().unwrap_or(0) }
    };
    cpus.iter().map(cpu).collect()
}

/// The node of each CPU. Of `online` nodes: one that is only possible has no directory.
fn nodes(roots: &Roots) -> BTreeMap<usize, usize> {
    let root = roots.sys.join("devices/system/node");
    let online = read_small(&root.join("online")).and_then(|text| parse_cpu_list(&text)).unwrap_or_default();
    let mut nodes = BTreeMap::new();
    for node in online.into_iter().take(MAX_NODES) {
        let list = read_small(&root.join(format!("node{node}/cpulist")));
        // A node of memory alone has an empty list.
        for cpu in list.and_then(|text| parse_cpu_list(&text)).unwrap_or_default() {
            nodes.insert(cpu, node);
        }
    }
    nodes
}

/// The first `count` of these CPUs, whole cores of the first nodes: where the batch system does not confine its jobs, what is
/// taken of the host is at least compact.
pub(super) fn first(mut cpus: Vec<Cpu>, count: usize) -> Vec<usize> {
    cpus.sort_by_key(|cpu| (cpu.node, cpu.core, cpu.number));
    let mut first: Vec<usize> = cpus.into_iter().take(count).map(|cpu| cpu.number).collect();
    first.sort_unstable();
    first
}

/// Those of `granted` that this process may use now. All, where nobody can say.
#[must_use]
pub fn still_there(roots: &Roots, granted: &[Cpu]) -> Vec<Cpu> {
    let allowed = allowed_cpus(roots);
    let is_there = |cpu: &&Cpu| allowed.as_ref().is_none_or(|allowed| allowed.contains(&cpu.number));
    granted.iter().filter(is_there).copied().collect()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn host(files: &[(&str, &str)]) -> (tempfile::TempDir, Roots) {
        let directory = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = directory.path().join("devices/system").join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let roots = Roots { sys: directory.path().to_owned(), ..Roots::default() };
        (directory, roots)
    }

    #[test]
    fn threads_of_a_core_and_cores_of_a_node_are_known() {
        let siblings = |cpu| format!("cpu/cpu{cpu}/topology/thread_siblings_list");
        let (_guard, roots) = host(&[
            (&siblings(0), "0,4\n"),
            (&siblings(1), "1,5\n"),
            (&siblings(4), "0,4\n"),
            (&siblings(5), "1,5\n"),
            ("node/online", "0-1,3\n"),
            ("node/node0/cpulist", "0,4\n"),
            ("node/node1/cpulist", "1,5\n"),
            ("node/node3/cpulist", "\n"),
        ]);
        let cpu = |number, core, node| Cpu { number, core, node };
        assert_eq!(of(&roots, &[0, 1, 4, 5]), [cpu(0, 0, 0), cpu(1, 1, 1), cpu(4, 0, 0), cpu(5, 1, 1)]);
        assert_eq!(first(of(&roots, &[0, 1, 4, 5]), 2), [0, 4]);
        assert_eq!(first(of(&roots, &[0, 1, 4, 5]), 9), [0, 1, 4, 5]);
    }

    #[test]
    fn what_is_gone_is_known_and_what_was_not_granted_is_not_taken() {
        let (_guard, mut roots) = host(&[]);
        let granted = of(&roots, &[0, 1, 2]);
        roots.proc = roots.sys.join("proc");
        assert_eq!(still_there(&roots, &granted), granted);
        fs::create_dir_all(roots.proc.join("self")).unwrap();
        fs::write(roots.proc.join("self/status"), "Name:\tx\nCpus_allowed_list:\t1-3\n").unwrap();
        assert_eq!(still_there(&roots, &granted), granted[1..]);
    }

    #[test]
    fn a_host_that_does_not_say_has_one_core_a_cpu() {
        let (_guard, roots) = host(&[]);
        let cpu = |number| Cpu { number, core: number, node: 0 };
        assert_eq!(of(&roots, &[2, 7]), [cpu(2), cpu(7)]);
        assert_eq!(first(of(&roots, &[2, 7]), 1), [2]);
    }
}
