//! CPUs, memory and GPUs that this process may use: never what the host has when less was granted.

use std::collections::BTreeSet;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::environment::Environment;
use super::{Fact, cgroup, topology};

/// The most that is read of a file of /proc or a cgroup: mountinfo of a host with many containers is some 100 KiB.
const MAX_FILE: u64 = 1 << 20;

/// The highest CPU number that is believed: Linux has at most 8192 CPUs.
const MAX_CPU: usize = 8191;

/// The most GPUs that are listed: no host has more, and each becomes a part of the environment.
const MAX_GPUS: usize = 1024;

/// The variables of one vendor, and the file that its driver makes.
struct Visible {
    vendor: Vendor,
    /// In this order: the first one that is there counts.
    variables: &'static [&'static str],
    device: &'static str,
}

/// Batch systems set these to what was granted. NVIDIA's and AMD's second variable says the same one level lower.
const VISIBLE: [Visible; 3] = [
    Visible {
        vendor: Vendor::Nvidia,
        variables: &["CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES"],
        device: "nvidiactl",
    },
    Visible {
        vendor: Vendor::Amd,
        variables: &["ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"],
        device: "kfd",
    },
    Visible { vendor: Vendor::Intel, variables: &["ZE_AFFINITY_MASK"], device: "dri" },
];

/// Where the kernel's files are; tests have theirs elsewhere.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Roots {
    /// /proc
    pub proc: PathBuf,
    /// /sys/fs/cgroup, used where mountinfo tells nothing.
    pub cgroup: PathBuf,
    /// /dev
    pub dev: PathBuf,
    /// /sys
    pub sys: PathBuf,
}

impl Default for Roots {
    fn default() -> Self {
        Self { proc: "/proc".into(), cgroup: "/sys/fs/cgroup".into(), dev: "/dev".into(), sys: "/sys".into() }
    }
}

/// Who made a GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Vendor {
    /// NVIDIA: CUDA_VISIBLE_DEVICES.
    Nvidia,
    /// AMD: ROCR_VISIBLE_DEVICES.
    Amd,
    /// Intel: ZE_AFFINITY_MASK.
    Intel,
}

/// A GPU that was granted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Gpu {
    /// Who made it.
    pub vendor: Vendor,
    /// Its name in the vendor's variable: a number, a UUID, a part of a GPU. Nothing may be read into it.
    pub id: String,
}

/// Reads a small file; absent when it cannot be read.
pub(super) fn read_small(path: &Path) -> Option<String> {
    let mut text = String::new();
    std::fs::File::open(path).ok()?.take(MAX_FILE).read_to_string(&mut text).ok()?;
    Some(text)
}

/// The CPUs of the affinity mask, cut down to the grant where the batch system does not confine its jobs to theirs.
pub(super) fn cpus(roots: &Roots, grant: Option<Fact<usize>>) -> Fact<Vec<usize>> {
    match allowed_cpus(roots) {
        Some(allowed) => cut_to_grant(roots, allowed, grant),
        None => {
            // Without /proc nothing is known of numbers: the first of them, as many as were granted, or one.
            let (count, source) = match grant {
                Some(grant) => (grant.value.clamp(1, MAX_CPU), grant.source),
                None => (1, "nothing".to_owned()),
            };
            let source = format!("{source} ({} cannot be read)", roots.proc.join("self/status").display());
            Fact::new((0..count).collect(), source)
        }
    }
}

/// The CPUs of this process's affinity mask; none where /proc does not tell.
pub(super) fn allowed_cpus(roots: &Roots) -> Option<Vec<usize>> {
    let status = read_small(&roots.proc.join("self/status"))?;
    parse_cpu_list(status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?)
}

fn cut_to_grant(roots: &Roots, allowed: Vec<usize>, grant: Option<Fact<usize>>) -> Fact<Vec<usize>> {
    match grant {
        Some(grant) if grant.value > 0 && grant.value < allowed.len() => {
            let source = format!(
                "{}: the first {} of the {} CPUs of the affinity mask, which is wider than the grant",
                grant.source,
                grant.value,
                allowed.len()
            );
            Fact::new(topology::first(topology::of(roots, &allowed), grant.value), source)
        }
        _ => Fact::new(allowed, "affinity mask"),
    }
}

/// Reads a list of CPUs as the kernel writes it: `0-3,8,10-11`.
pub(super) fn parse_cpu_list(text: &str) -> Option<Vec<usize>> {
    let mut cpus = BTreeSet::new();
    for range in text.trim().split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
        if first > last || last > MAX_CPU {
            return None;
        }
        cpus.extend(first..=last);
    }
    Some(cpus.into_iter().collect())
}

/// Writes a list of CPUs as the kernel does: `0-3,8`.
pub(super) fn format_cpu_list(cpus: &[usize]) -> String {
    let mut ranges: Vec<(usize, usize)> = Vec::new();
    for &cpu in cpus {
        match ranges.last_mut() {
            Some((_, last)) if *last + 1 == cpu => *last = cpu,
            _ => ranges.push((cpu, cpu)),
        }
    }
    let ranges = ranges.iter().map(|(first, last)| match first == last {
        true => first.to_string(),
        false => format!("{first}-{last}"),
    });
    ranges.collect::<Vec<_>>().join(",")
}

/// The least of what the cgroup, the batch system and the host say, in bytes.
pub(super) fn memory(roots: &Roots, grants: Vec<Fact<u64>>) -> Fact<u64> {
    let host = mem_total(roots);
    let limit = cgroup::memory_limit(roots, host)
        .map(|limit| Fact::new(limit.bytes, format!("{} at {}", limit.kind, limit.file.display())));
    let host = host.map(|bytes| Fact::new(bytes, "MemTotal of the host"));
    // Of equals the first: the enforced one.
    let known = limit.into_iter().chain(grants).chain(host).filter(|fact| fact.value > 0);
    known.min_by_key(|fact| fact.value).unwrap_or_else(|| {
        Fact::new(0, format!("nothing ({} cannot be read)", roots.proc.join("meminfo").display()))
    })
}

/// The host's memory in bytes.
pub(super) fn mem_total(roots: &Roots) -> Option<u64> {
    read_small(&roots.proc.join("meminfo")).and_then(|text| parse_mem_total(&text))
}

/// Reads `MemTotal:  16305404 kB`, in bytes.
fn parse_mem_total(text: &str) -> Option<u64> {
    let value = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    value.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// The GPUs of the visible-devices variables. The host's own are never counted.
pub(super) fn gpus(env: &Environment, roots: &Roots, grant: Option<Fact<usize>>) -> Fact<Vec<Gpu>> {
    let present = |visible: &Visible| roots.dev.join(visible.device).exists();
    let mut gpus = choose_gpus(env, &VISIBLE.map(|visible| (visible.vendor, present(&visible))));
    // Where the two contradict each other, less counts: what was set by hand, or inherited from another job, is no grant.
    if let Some(grant) = grant.filter(|grant| grant.value < gpus.value.len()) {
        gpus.source = format!(
            "{}: the first {} of the {} of {}, which names more than were granted",
            grant.source,
            grant.value,
            gpus.value.len(),
            gpus.source
        );
        gpus.value.truncate(grant.value);
    }
    gpus
}

/// Slurm without AutoDetect sets the variables of all vendors to one list (gres.conf(5), Flags): it is the list of the
/// vendor whose driver is present, else of the first.
fn choose_gpus(env: &Environment, present: &[(Vendor, bool)]) -> Fact<Vec<Gpu>> {
    let mut lists: Vec<(Vendor, &str, Vec<String>)> = Vec::new();
    let mut empty = None;
    for Visible { vendor, variables, .. } in &VISIBLE {
        let Some((name, value)) = variables.iter().find_map(|name| Some((*name, env.get(name)?))) else {
            continue;
        };
        let ids = parse_visible(value);
        if ids.is_empty() {
            empty = empty.or(Some(name));
            continue;
        }
        let is_present = |vendor: Vendor| present.contains(&(vendor, true));
        match lists.iter_mut().find(|(_, _, other)| *other == ids) {
            Some(known) if is_present(*vendor) && !is_present(known.0) => *known = (*vendor, name, ids),
            Some(_) => {}
            None => lists.push((*vendor, name, ids)),
        }
    }
    if lists.is_empty() {
        let source = match empty {
            Some(name) => format!("{name} names none"),
            None => "no visible-devices variable".to_owned(),
        };
        return Fact::new(Vec::new(), source);
    }
    let source = lists.iter().map(|(_, name, _)| *name).collect::<Vec<_>>().join(", ");
    let gpus =
        lists.into_iter().flat_map(|(vendor, _, ids)| ids.into_iter().map(move |id| Gpu { vendor, id }));
    Fact::new(gpus.take(MAX_GPUS).collect(), source)
}

/// The names in a visible-devices variable. `NoDevFiles` (Slurm), `-1`, `none`, `void` and nothing at all stand for no
/// GPU; `all` says nothing of a grant. What follows `-1` is not visible either (CUDA's rule).
fn parse_visible(value: &str) -> Vec<String> {
    let mut ids: Vec<String> = Vec::new();
    for id in value.split(',').map(str::trim).filter(|id| !id.is_empty()) {
        match id {
            "-1" => break,
            "NoDevFiles" | "none" | "void" | "all" => {}
            id if ids.iter().any(|known| known == id) => {}
            id => ids.push(id.to_owned()),
        }
    }
    ids
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn cpu_lists_are_read_and_written_as_the_kernel_does() {
        for (text, cpus) in [("0", vec![0]), ("0-3,8", vec![0, 1, 2, 3, 8]), ("\t2,4-5\n", vec![2, 4, 5])] {
            assert_eq!(parse_cpu_list(text), Some(cpus.clone()));
            assert_eq!(format_cpu_list(&cpus), text.trim());
        }
        for text in ["", "3-1", "a", "0-99999999", "1,,2"] {
            assert_eq!(parse_cpu_list(text), None, "{text}");
        }
    }

    #[test]
    fn a_mask_wider_than_the_grant_is_cut_and_says_so() {
        let roots = Roots { sys: "/nonexistent".into(), ..Roots::default() };
        let mask = || vec![2, 3, 4, 5];
        let grant = |cpus| Some(Fact::new(cpus, "SLURM_CPUS_ON_NODE"));
        assert_eq!(cut_to_grant(&roots, mask(), None), Fact::new(mask(), "affinity mask"));
        assert_eq!(cut_to_grant(&roots, mask(), grant(4)).source, "affinity mask");
        assert_eq!(cut_to_grant(&roots, mask(), grant(9)).value, mask());
        let cut = cut_to_grant(&roots, mask(), grant(2));
        assert_eq!(cut.value, [2, 3]);
        assert!(cut.source.starts_with("SLURM_CPUS_ON_NODE"), "{}", cut.source);
    }

    #[test]
    fn the_least_memory_that_is_known_counts() {
        let directory = tempfile::tempdir().unwrap();
        let proc = directory.path().join("proc");
        std::fs::create_dir(&proc).unwrap();
        let roots = Roots {
            proc: proc.clone(),
            cgroup: "/nonexistent".into(),
            dev: "/nonexistent".into(),
            sys: "/nonexistent".into(),
        };
        let source = |grants: &[(u64, &str)]| {
            let grants = grants.iter().map(|(bytes, source)| Fact::new(*bytes, *source)).collect();
            memory(&roots, grants)
        };
        assert_eq!(source(&[]).value, 0);
        std::fs::write(proc.join("meminfo"), "MemTotal:        2000 kB\nMemFree: 1 kB\n").unwrap();
        assert_eq!(source(&[]), Fact::new(2_048_000, "MemTotal of the host"));
        assert_eq!(source(&[(1000, "a"), (500, "b"), (0, "c")]), Fact::new(500, "b"));
        assert_eq!(source(&[(9_999_999, "a")]).source, "MemTotal of the host");
    }

    #[test]
    fn gpus_are_what_the_variables_name() {
        let nobody = [(Vendor::Nvidia, false), (Vendor::Amd, false), (Vendor::Intel, false)];
        let gpus = |pairs: &[(&str, &str)], present: &[(Vendor, bool)]| {
            let fact = choose_gpus(&Environment::from_pairs(pairs.iter().copied()), present);
            let gpus: Vec<_> = fact.value.iter().map(|gpu| format!("{:?} {}", gpu.vendor, gpu.id)).collect();
            (gpus.join(", "), fact.source)
        };
        let table: [(&[(&str, &str)], &str); 9] = [
            (&[], ""),
            (&[("CUDA_VISIBLE_DEVICES", "0,1")], "Nvidia 0, Nvidia 1"),
            (&[("CUDA_VISIBLE_DEVICES", "GPU-5ab, MIG-77/1/0")], "Nvidia GPU-5ab, Nvidia MIG-77/1/0"),
            (&[("CUDA_VISIBLE_DEVICES", "0,-1,1")], "Nvidia 0"),
            (&[("CUDA_VISIBLE_DEVICES", "0,0")], "Nvidia 0"),
            (&[("CUDA_VISIBLE_DEVICES", ""), ("NVIDIA_VISIBLE_DEVICES", "3")], ""),
            (&[("NVIDIA_VISIBLE_DEVICES", "all")], ""),
            (&[("ROCR_VISIBLE_DEVICES", "1"), ("HIP_VISIBLE_DEVICES", "0")], "Amd 1"),
            (
                &[("CUDA_VISIBLE_DEVICES", "0"), ("ZE_AFFINITY_MASK", "0.0,1.1")],
                "Nvidia 0, Intel 0.0, Intel 1.1",
            ),
        ];
        for (pairs, expected) in table {
            assert_eq!(gpus(pairs, &nobody).0, expected, "{pairs:?}");
        }
        for none in ["NoDevFiles", "-1", "", "void", "none"] {
            let (found, source) = gpus(&[("CUDA_VISIBLE_DEVICES", none)], &nobody);
            assert_eq!((found.as_str(), source.as_str()), ("", "CUDA_VISIBLE_DEVICES names none"));
        }
        // One list in all variables is one set of GPUs.
        let all =
            [("CUDA_VISIBLE_DEVICES", "0,1"), ("ROCR_VISIBLE_DEVICES", "0,1"), ("ZE_AFFINITY_MASK", "0,1")];
        assert_eq!(gpus(&all, &nobody).0, "Nvidia 0, Nvidia 1");
        assert_eq!(
            gpus(&all, &[(Vendor::Amd, true)]),
            ("Amd 0, Amd 1".into(), "ROCR_VISIBLE_DEVICES".into())
        );
    }

    #[test]
    fn of_lists_that_contradict_each_other_the_shorter_counts() {
        let env = Environment::from_pairs([("CUDA_VISIBLE_DEVICES", "0,1,2")]);
        let roots = Roots { dev: "/nonexistent".into(), ..Roots::default() };
        let count = |grant: Option<usize>| {
            let fact = gpus(&env, &roots, grant.map(|grant| Fact::new(grant, "SLURM_GPUS_ON_NODE")));
            (fact.value.len(), fact.source)
        };
        assert_eq!(count(None), (3, "CUDA_VISIBLE_DEVICES".to_owned()));
        assert_eq!(count(Some(4)).0, 3);
        let (cut, source) = count(Some(1));
        assert_eq!(cut, 1);
        assert!(source.starts_with("SLURM_GPUS_ON_NODE: the first 1 of the 3 of CUDA"), "{source}");
    }

    proptest! {
        #[test]
        fn no_text_makes_a_parser_panic(text in ".{0,60}", list in "[0-9,-]{0,30}") {
            for text in [&text, &list] {
                let _ = parse_cpu_list(text);
                let _ = parse_mem_total(text);
                let _ = parse_visible(text);
            }
        }

        #[test]
        fn a_cpu_list_is_read_back(cpus in proptest::collection::btree_set(0usize..300, 1..40)) {
            let cpus: Vec<usize> = cpus.into_iter().collect();
            prop_assert_eq!(parse_cpu_list(&format_cpu_list(&cpus)), Some(cpus));
        }
    }
}
