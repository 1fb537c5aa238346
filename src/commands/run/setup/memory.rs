//! What pods are told of the job's memory, and who looks at it.

use std::sync::Arc;

use tokio::sync::watch;

use crate::allocation::gauge::MemoryGauge;
use crate::allocation::{Allocation, BatchSystem, Roots, delegation};
use crate::container::Delegation;
use crate::node::NodeHandle;
use crate::pod::context::Context;
use crate::pod::manager::Manager;
use crate::pod::pressure::{self, Gauge, Room, Setup};

struct JobGauge(MemoryGauge);

impl Gauge for JobGauge {
    fn room(&self) -> Option<Room> {
        self.0.room().map(|room| Room { limit: room.limit, available: room.available })
    }

    fn oom_kills(&self) -> u64 {
        self.0.oom_kills()
    }
}

/// The job's memory on this host.
pub struct Memory {
    gauge: Arc<JobGauge>,
    /// What was granted, where nothing but the pilot holds the pods to it.
    grant: Option<u64>,
    cpus: usize,
}

impl Memory {
    /// Finds out where to look.
    #[must_use]
    pub fn of(allocation: &Allocation) -> Self {
        let gauge = MemoryGauge::new(&Roots::default());
        let limit = gauge.limit().or_else(|| gauge.room().map(|host| host.limit));
        // PBS without its cgroups hook and Slurm without ConstrainRAMSpace say a figure and leave it at that.
        let grant = Some(allocation.memory.value)
            .filter(|grant| *grant > 0 && limit.is_none_or(|limit| *grant < limit));
        Self { gauge: Arc::new(JobGauge(gauge)), grant, cpus: allocation.cpus.value.len() }
    }

    /// What tells of it.
    #[must_use]
    pub fn gauge(&self) -> Arc<dyn Gauge> {
        Arc::clone(&self.gauge) as Arc<dyn Gauge>
    }

    /// Has it looked at while containers run. `pressure` is told when it runs short.
    pub fn watch(self, context: &Arc<Context>, manager: &Manager, pressure: watch::Sender<bool>) {
        let setup = Setup {
            context: Arc::clone(context),
            gauge: self.gauge(),
            grant: self.grant,
            cpus: self.cpus,
            manager: manager.clone(),
            pressure,
        };
        pressure::spawn(setup);
    }
}

/// Where the batch system lets the job make cgroups of its own. Before anything is started: in v2 the processes move.
pub(super) fn delegation(allocation: &Allocation) -> Option<Delegation> {
    if allocation.batch == BatchSystem::None {
        return None;
    }
    let found = delegation::find(&Roots::default())?;
    tracing::info!(
        ?found,
        "the batch system lets this job make cgroups: the kernel holds the containers' limits"
    );
    Some(Delegation { v2: found.v2, memory: found.memory, cpu: found.cpu, cpuset: found.cpuset })
}

/// The Node says MemoryPressure while it is so.
pub fn tell_node(node: &Arc<NodeHandle>, mut pressure: watch::Receiver<bool>) {
    let node = Arc::clone(node);
    tokio::spawn(async move {
        while pressure.changed().await.is_ok() {
            let short = *pressure.borrow_and_update();
            node.change_health(|health| health.memory_pressure = short);
        }
    });
}
