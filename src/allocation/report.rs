//! What `jiriaf-pilot allocation` prints: what was granted, and where each fact was learnt.

use std::collections::BTreeSet;
use std::time::{Duration, SystemTime};

use serde::ser::SerializeStruct;
use serde::{Serialize, Serializer};

use super::resources::format_cpu_list;
use super::{Allocation, Deadline, Fact, Task, TimeLimit, format_clock};

/// How many host names and GPUs are printed before the rest is counted.
const SHOWN: usize = 8;

/// A moment in RFC 3339, UTC, whole seconds.
#[must_use]
pub fn format_time(moment: SystemTime) -> String {
    let rounded = super::ask::whole_seconds(moment);
    jiff::Timestamp::try_from(rounded)
        .map_or_else(|_| "beyond the year 9999".to_owned(), |time| time.to_string())
}

pub(super) fn time<S: Serializer>(moment: &SystemTime, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&format_time(*moment))
}

pub(super) fn optional_time<S: Serializer>(
    fact: &Option<Fact<SystemTime>>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    fact.as_ref().map(|fact| Fact::new(format_time(fact.value), fact.source.clone())).serialize(serializer)
}

impl Serialize for TimeLimit {
    /// `{"kind": "ends", "at": TIME}`, `{"kind": "unlimited"}` or `{"kind": "unknown", "why": TEXT}`.
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let (kind, detail) = match self {
            Self::Ends(at) => ("ends", Some(("at", format_time(*at)))),
            Self::Unlimited => ("unlimited", None),
            Self::Unknown(why) => ("unknown", Some(("why", why.clone()))),
        };
        let mut map = serializer.serialize_struct("TimeLimit", 1 + usize::from(detail.is_some()))?;
        map.serialize_field("kind", kind)?;
        if let Some((name, value)) = detail {
            map.serialize_field(name, &value)?;
        }
        map.end()
    }
}

/// The allocation and the deadline as one JSON object: times in RFC 3339 (UTC), `remaining_seconds` in whole seconds,
/// memory in bytes.
#[derive(Serialize)]
pub struct Report<'a> {
    #[serde(flatten)]
    allocation: &'a Allocation,
    deadline: Option<&'a Deadline>,
    remaining_seconds: Option<u64>,
}

impl<'a> Report<'a> {
    /// Of this allocation with this deadline, at this moment.
    #[must_use]
    pub fn new(allocation: &'a Allocation, deadline: Option<&'a Deadline>, now: SystemTime) -> Self {
        let remaining_seconds = deadline.map(|deadline| remaining(deadline, now).as_secs());
        Self { allocation, deadline, remaining_seconds }
    }
}

fn remaining(deadline: &Deadline, now: SystemTime) -> Duration {
    deadline.at.duration_since(now).unwrap_or_default()
}

/// A table for people: what, its value, where it was learnt.
#[must_use]
pub fn render(allocation: &Allocation, deadline: Option<&Deadline>, now: SystemTime) -> String {
    let mut rows: Vec<[String; 3]> = Vec::new();
    let mut row =
        |what: &str, value: String, source: &str| rows.push([what.to_owned(), value, source.to_owned()]);
    let a = allocation;

    let batch = match a.batch {
        super::BatchSystem::Torque => "torque".to_owned(),
        super::BatchSystem::None => "none: no SLURM_JOB_ID, no PBS_JOBID".to_owned(),
        batch => batch.label().to_owned(),
    };
    row("batch system", batch, "environment");
    for (what, fact) in [("job", &a.job_id), ("array", &a.array), ("cluster", &a.cluster)] {
        if let Some(fact) = fact {
            row(what, fact.value.clone(), &fact.source);
        }
    }
    if a.restart_count > 0 {
        row("restarts", a.restart_count.to_string(), "");
    }
    row("host", a.host.clone(), "");
    if let Some(hosts) = &a.hosts {
        row("hosts", format!("{}: {}", hosts.value.len(), list(&hosts.value)), &hosts.source);
    }
    if a.task.nodes > 1 || a.task.tasks > 1 {
        let Task { rank, nodes, tasks, .. } = a.task;
        row("task", format!("rank {rank} of {tasks} tasks on {nodes} nodes"), "environment");
    }
    if let Some(started) = &a.started {
        row("started", format_time(started.value), &started.source);
    }
    let limit = match &a.limit.value {
        TimeLimit::Ends(at) => format!("ends {}", format_time(*at)),
        TimeLimit::Unlimited => "none".to_owned(),
        TimeLimit::Unknown(why) => format!("unknown: {why}"),
    };
    row("time limit", limit, &a.limit.source);
    match deadline {
        Some(deadline) => {
            row("deadline", format_time(deadline.at), &deadline.source);
            row("remaining", format_clock(remaining(deadline, now)), "");
        }
        None => row("deadline", "none".to_owned(), ""),
    }
    let cores: BTreeSet<usize> = a.topology.iter().map(|cpu| cpu.core).collect();
    let nodes: BTreeSet<usize> = a.topology.iter().map(|cpu| cpu.node).collect();
    row("CPUs", format!("{}: {}", a.cpus.value.len(), format_cpu_list(&a.cpus.value)), &a.cpus.source);
    row(
        "cores",
        format!("{} on {} NUMA node{}", cores.len(), nodes.len(), plural(nodes.len())),
        "/sys/devices/system",
    );
    row("memory", format_bytes(a.memory.value), &a.memory.source);
    let gpus: Vec<_> = a.gpus.value.iter().map(|gpu| format!("{:?} {}", gpu.vendor, gpu.id)).collect();
    let gpus = if gpus.is_empty() { "none".to_owned() } else { format!("{}: {}", gpus.len(), list(&gpus)) };
    row("GPUs", gpus, &a.gpus.source);
    table(&rows)
}

fn plural(count: usize) -> &'static str {
    if count == 1 { "" } else { "s" }
}

/// The first few, and how many more there are.
fn list(items: &[String]) -> String {
    let shown = items.iter().take(SHOWN).map(String::as_str).collect::<Vec<_>>().join(", ");
    match items.len().checked_sub(SHOWN) {
        Some(more) if more > 0 => format!("{shown} and {more} more"),
        _ => shown,
    }
}

/// In the unit that people use for it.
fn format_bytes(bytes: u64) -> String {
    const UNITS: [(&str, u32); 3] = [("GiB", 30), ("MiB", 20), ("KiB", 10)];
    match UNITS.iter().find(|(_, shift)| bytes >= 1 << shift) {
        Some((unit, shift)) => {
            let tenths = (u128::from(bytes) * 10) >> shift;
            format!("{}.{} {unit}", tenths / 10, tenths % 10)
        }
        None => format!("{bytes} bytes"),
    }
}

/// Columns as wide as their widest cell, two blanks between them. A cell that is very long does not widen the others.
fn table(rows: &[[String; 3]]) -> String {
    const WIDEST: usize = 48;
    let width = |column: usize| {
        let cells = rows.iter().map(|row| row.get(column).map_or(0, |cell| cell.chars().count()));
        cells.filter(|width| *width <= WIDEST).max().unwrap_or(0)
    };
    let (first, second) = (width(0), width(1));
    let mut text = String::new();
    for [what, value, source] in rows {
        let line = format!("{what:first$}  {value:second$}  {source}");
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::allocation::topology::Cpu;
    use crate::allocation::{BatchSystem, Gpu, Question, Vendor};
    use std::time::UNIX_EPOCH;

    fn allocation() -> Allocation {
        Allocation {
            batch: BatchSystem::Slurm,
            job_id: Some(Fact::new("120".to_owned(), "SLURM_JOB_ID")),
            array: None,
            restart_count: 1,
            cluster: None,
            host: "n1".to_owned(),
            hosts: Some(Fact::new((1..=20).map(|n| format!("n{n}")).collect(), "SLURM_JOB_NODELIST")),
            task: Task { rank: 3, nodes: 20, tasks: 20, array: 1 },
            limit: Fact::new(TimeLimit::Ends(UNIX_EPOCH + Duration::from_secs(7200)), "squeue %L"),
            started: Some(Fact::new(UNIX_EPOCH, "SLURM_JOB_START_TIME")),
            cpus: Fact::new(vec![0, 1, 2, 5], "affinity mask"),
            cpus_are_named: true,
            topology: [(0, 0, 0), (1, 1, 0), (2, 0, 0), (5, 5, 1)]
                .map(|(number, core, node)| Cpu { number, core, node })
                .into(),
            memory: Fact::new(3 << 29, "SLURM_MEM_PER_NODE"),
            gpus: Fact::new(vec![Gpu { vendor: Vendor::Amd, id: "0".to_owned() }], "ROCR_VISIBLE_DEVICES"),
            question: Question::Nobody,
            asked: true,
        }
    }

    fn deadline() -> Deadline {
        Deadline {
            at: UNIX_EPOCH + Duration::from_secs(7200),
            source: "squeue %L".to_owned(),
            learnt: UNIX_EPOCH,
            confirmed: true,
        }
    }

    #[test]
    fn people_read_what_was_granted_and_where_it_was_learnt() {
        let now = UNIX_EPOCH + Duration::from_secs(3599);
        let text = render(&allocation(), Some(&deadline()), now);
        for line in [
            "job           120",
            "hosts         20: n1, n2, n3, n4, n5, n6, n7, n8 and 12 more",
            "remaining     01:00:01",
            "CPUs          4: 0-2,5",
            "cores         3 on 2 NUMA nodes",
            "memory        1.5 GiB",
            "GPUs          1: Amd 0",
        ] {
            assert!(text.contains(line), "{line} is not in\n{text}");
        }
        let memory = text.lines().find(|line| line.starts_with("memory")).unwrap();
        assert!(memory.ends_with("SLURM_MEM_PER_NODE"), "{memory}");
    }

    #[test]
    fn programs_read_times_in_utc_seconds_and_bytes() {
        let now = UNIX_EPOCH + Duration::from_secs(3600);
        let json = serde_json::to_value(Report::new(&allocation(), Some(&deadline()), now)).unwrap();
        assert_eq!(json["batch"], "slurm");
        assert_eq!(json["limit"]["value"]["kind"], "ends");
        assert_eq!(json["limit"]["value"]["at"], "1970-01-01T02:00:00Z");
        assert_eq!(json["started"]["value"], "1970-01-01T00:00:00Z");
        assert_eq!(json["deadline"]["at"], "1970-01-01T02:00:00Z");
        assert_eq!(json["remaining_seconds"], 3600);
        assert_eq!(json["memory"]["value"], 3u64 << 29);
        assert_eq!(json["gpus"]["value"][0]["vendor"], "amd");
        assert_eq!(json["cpus"]["value"][3], 5);
        assert!(json.get("question").is_none());
        let none = serde_json::to_value(Report::new(&allocation(), None, now)).unwrap();
        assert!(none["deadline"].is_null() && none["remaining_seconds"].is_null());
    }
}
