//! What the Node tells of its use: the texts of `/metrics/resource`, `/stats/summary`, `/metrics/probes` and `/metrics`.
//!
//! [`resource::render`] and [`summary::summary`] make texts of a [`Snapshot`] and ask nobody; [`host`] reads what only the
//! summary has. [`probes::render`] tells what the pods' probes counted.

pub mod host;
pub mod probes;
pub mod resource;
pub mod summary;
mod text;
#[cfg(test)]
pub(crate) mod text_check;

use std::time::{Duration, SystemTime};

use crate::allocation::usage::JobUsage;
use crate::container::usage::Usage;

pub use prometheus_client::encoding::prometheus_text::CONTENT_TYPE;

/// What the Node and its pods use at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// The Node's name.
    pub node: String,
    /// When the pilot began.
    pub started_at: SystemTime,
    /// The job on this host; none where it could not be measured.
    pub usage: Option<JobUsage>,
    /// Billionths of a CPU that the job uses, where that is known yet.
    pub nano_cores: Option<u64>,
    /// The memory that was granted, in bytes.
    pub memory_limit: Option<u64>,
    /// The pods that have running containers.
    pub pods: Vec<PodUsage>,
}

/// What a pod uses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodUsage {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its uid.
    pub uid: String,
    /// When it was admitted.
    pub started_at: SystemTime,
    /// Of runs that are over: a pod's counters never go down, whatever becomes of its containers.
    pub ended: Counted,
    /// Its running containers.
    pub containers: Vec<ContainerUsage>,
}

impl PodUsage {
    /// What it has used since it began.
    fn counted(&self) -> Counted {
        self.containers.iter().fold(self.ended, |sum, container| sum.and(Counted::of(&container.usage)))
    }

    /// Its running containers' figures added up.
    fn sum(&self, of: impl Fn(&Usage) -> u64) -> u64 {
        self.containers.iter().map(|container| of(&container.usage)).sum()
    }

    /// When the last of its containers was measured.
    fn at(&self) -> Option<SystemTime> {
        self.containers.iter().map(|container| container.usage.at).max()
    }
}

/// What only ever grows.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counted {
    /// CPU time.
    pub cpu: Duration,
    /// Pages that were mapped.
    pub page_faults: u64,
    /// Those that came from a disk.
    pub major_page_faults: u64,
}

impl Counted {
    /// Of one run of a container.
    #[must_use]
    pub fn of(usage: &Usage) -> Self {
        Self { cpu: usage.cpu, page_faults: usage.page_faults, major_page_faults: usage.major_page_faults }
    }

    /// Both together.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self {
            cpu: self.cpu + other.cpu,
            page_faults: self.page_faults + other.page_faults,
            major_page_faults: self.major_page_faults + other.major_page_faults,
        }
    }
}

/// What a container uses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContainerUsage {
    /// Its name.
    pub name: String,
    /// When this run of it began.
    pub started_at: SystemTime,
    /// What this run has used.
    pub usage: Usage,
    /// The size of its logs, where that was read.
    pub log_bytes: Option<u64>,
}

/// A pod with two containers, in a Node, for tests.
#[cfg(test)]
fn example() -> Snapshot {
    use crate::allocation::usage::JobMemory;
    let at = |millis| SystemTime::UNIX_EPOCH + Duration::from_millis(millis);
    let usage = |millis: u64, cpu: u64, memory: u64| Usage {
        at: at(1_700_000_100_000 + millis),
        cpu: Duration::from_nanos(cpu),
        nano_cores: Some(250_000_000),
        working_set: memory,
        usage: memory + 1000,
        rss: memory - 10,
        page_faults: 7,
        major_page_faults: 1,
        processes: 3,
    };
    let container = |name: &str, usage| ContainerUsage {
        name: name.to_owned(),
        started_at: at(1_700_000_000_250),
        usage,
        log_bytes: Some(123),
    };
    Snapshot {
        node: "site-1-n1".into(),
        started_at: at(1_690_000_000_000),
        usage: Some(JobUsage {
            at: at(1_700_000_100_007),
            cpu: Duration::from_millis(12_345_678),
            cpu_source: String::new(),
            memory: JobMemory {
                usage: 9_000,
                working_set: 8_000,
                rss: 7_000,
                page_faults: 60,
                major_page_faults: 5,
            },
            memory_source: String::new(),
        }),
        nano_cores: Some(1_500_000_000),
        memory_limit: Some(20_000),
        pods: vec![PodUsage {
            namespace: "default".into(),
            name: "p".into(),
            uid: "0a-1".into(),
            started_at: at(1_700_000_000_000),
            ended: Counted { cpu: Duration::from_secs(10), page_faults: 100, major_page_faults: 10 },
            containers: vec![
                container("c1", usage(1, 1_000_000, 4096)),
                container("c2", usage(2, 2_500_000_007, 50 << 20)),
            ],
        }],
    }
}
