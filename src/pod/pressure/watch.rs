//! The one task that looks at memory, while containers run.

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use tokio::sync::watch;
use tokio::time::Instant;

use super::eviction::{self, Consumer};
use super::{Gauge, Room, kept_free, pace};
use crate::container::usage::weight::{self, Scales, Weight};
use crate::pod::containers;
use crate::pod::context::Context;
use crate::pod::events::Kind;
use crate::pod::manager::Manager;
use crate::pod::quantity;
use crate::pod::session::RunHandle;
use crate::pod::status::{OOM_KILLED, State};

/// Between two weighings of containers with a limit: one over it is ended within two seconds.
const WEIGH: Duration = Duration::from_secs(1);

/// How long the Node says MemoryPressure after the last time. A kubelet says it for five minutes, in a cluster of machines that
/// stay; of an allocation of an hour that would be much.
const TRANSITION: Duration = Duration::from_secs(60);

/// How long the end of an evicted pod is waited for, before another is looked for: a killed process gives its memory back at
/// some GB a second.
const RELIEF: Duration = Duration::from_secs(5);

/// What the kernel counts of a process is up to this much behind (percpu counters), so nothing near its limit is let pass
/// unweighed.
const NEAR: u64 = 8 << 20;

/// What the task goes by.
pub struct Setup {
    /// The pods, and where events go.
    pub context: Arc<Context>,
    /// The job's memory.
    pub gauge: Arc<dyn Gauge>,
    /// What was granted, where no cgroup holds the job to it.
    pub grant: Option<u64>,
    /// Who evicts.
    pub manager: Manager,
    /// Whether memory is short.
    pub pressure: watch::Sender<bool>,
}

/// Starts the task.
pub fn spawn(setup: Setup) {
    tokio::spawn(Watch { setup, weighed: None, pressed: None, kills: 0, in_all: 0 }.run());
}

/// A container that runs.
struct Running {
    pod: Pod,
    name: String,
    run: RunHandle,
    limit: Option<u64>,
}

struct Watch {
    setup: Setup,
    weighed: Option<Instant>,
    /// When memory was short last.
    pressed: Option<Instant>,
    /// Processes that the kernel has killed, as last seen.
    kills: u64,
    /// What all containers weighed at most when they were last weighed.
    in_all: u64,
}

impl Watch {
    async fn run(mut self) {
        self.kills = self.setup.gauge.oom_kills();
        let mut changes = self.setup.context.roster.changes();
        loop {
            changes.mark_unchanged();
            let running = self.running();
            if running.is_empty() && self.pressed.is_none() {
                self.in_all = 0;
                if changes.changed().await.is_err() {
                    return;
                }
                continue;
            }
            let wants = self.setup.grant.is_some() || running.iter().any(|one| one.limit.is_some());
            if wants && self.weighed.is_none_or(|at| at.elapsed() >= WEIGH) {
                self.weighed = Some(Instant::now());
                self.weigh(&running).await;
            }
            self.tell_kills();
            let room = self.room();
            let short = room.filter(|room| room.available < kept_free(room.limit));
            if let Some(room) = short {
                self.pressed = Some(Instant::now());
                self.setup.pressure.send_if_modified(|on| !std::mem::replace(on, true));
                self.relieve(&running, room).await;
            } else if self.pressed.is_some_and(|at| at.elapsed() >= TRANSITION) {
                self.pressed = None;
                self.setup.pressure.send_if_modified(|on| std::mem::replace(on, false));
            }
            tokio::time::sleep(room.map_or(WEIGH, pace)).await;
        }
    }

    fn running(&self) -> Vec<Running> {
        let mut running = Vec::new();
        for view in self.setup.context.roster.all() {
            for (name, container) in &view.containers {
                if let (State::Running { .. }, Some(run)) = (&container.state, &container.run) {
                    let limit = limit(&view.pod, name);
                    running.push(Running {
                        pod: view.pod.clone(),
                        name: name.clone(),
                        run: run.clone(),
                        limit,
                    });
                }
            }
        }
        running
    }

    /// What is left: by the cgroup or the host, and of the grant where nothing else holds the job to it.
    fn room(&self) -> Option<Room> {
        let room = self.setup.gauge.room();
        let granted =
            self.setup.grant.map(|limit| Room { limit, available: limit.saturating_sub(self.in_all) });
        room.into_iter().chain(granted).min_by_key(|room| room.available)
    }

    /// Ends containers that are over their limits.
    async fn weigh(&mut self, running: &[Running]) {
        let all = self.setup.grant.is_some();
        let wanted = running.iter().map(|one| (one.limit, one.run.supervisor));
        let wanted: Vec<_> = wanted.map(|(limit, pid)| (limit.is_some() || all).then_some(pid)).collect();
        let limits: Vec<_> = running.iter().map(|one| one.limit).collect();
        let weighing = tokio::task::spawn_blocking(move || {
            let mut scales = Scales::default();
            let weigh = |pid: &Option<i32>| pid.map(|pid| scales.weigh(pid)).unwrap_or_default();
            let weights: Vec<Weight> = wanted.iter().map(weigh).collect();
            let over = weights.iter().zip(limits).map(|(weight, limit)| {
                // What is shared counts for each process: near the limit it is weighed exactly.
                let limit = limit.filter(|limit| weight.at_most.saturating_add(NEAR) > *limit)?;
                Some(weight::exactly(&weight.processes)).filter(|bytes| *bytes > limit)
            });
            (over.collect::<Vec<_>>(), weights.iter().map(|weight| weight.at_most).sum::<u64>())
        });
        let Ok((over, in_all)) = weighing.await else { return };
        self.in_all = in_all;
        for (one, bytes) in running.iter().zip(over) {
            let (Some(bytes), Some(limit)) = (bytes, one.limit) else { continue };
            let message = format!(
                "Container {} was using {} KiB of memory, and its limit is {} KiB",
                one.name,
                bytes.div_ceil(1024),
                limit / 1024
            );
            let meta = &one.pod.metadata;
            tracing::warn!(
                namespace = meta.namespace,
                pod = meta.name,
                "{message}: it is ended as {OOM_KILLED}"
            );
            self.setup.context.events.record(&one.pod, Some(&one.name), Kind::Warning, OOM_KILLED, &message);
            one.run.out_of_memory(message);
        }
    }

    /// Evicts the pod that a kubelet would, and waits for what that gives.
    async fn relieve(&mut self, running: &[Running], room: Room) {
        let supervisors: Vec<i32> = running.iter().map(|one| one.run.supervisor).collect();
        let weighing = tokio::task::spawn_blocking(move || {
            let mut scales = Scales::default();
            supervisors.into_iter().map(|pid| scales.weigh(pid).at_most).collect::<Vec<_>>()
        });
        let Ok(weights) = weighing.await else { return };
        let mut consumers: Vec<Consumer> = Vec::new();
        for (one, weight) in running.iter().zip(weights) {
            let entry = (one.name.clone(), weight);
            match consumers.iter_mut().find(|known| known.pod.metadata.uid == one.pod.metadata.uid) {
                Some(known) => known.containers.push(entry),
                None => consumers.push(Consumer { pod: one.pod.clone(), containers: vec![entry] }),
            }
        }
        let Some(first) = eviction::first(&consumers) else { return };
        let message = eviction::message(first, kept_free(room.limit), room.available);
        let uid = first.uid().to_owned();
        self.setup.manager.evict(&uid, message).await;
        let roster = &self.setup.context.roster;
        let mut changes = roster.changes();
        let gone = async {
            let runs = |uid: &str| {
                roster.get(uid).is_some_and(|view| view.containers.values().any(|c| c.run.is_some()))
            };
            while runs(&uid) && changes.changed().await.is_ok() {}
        };
        let _ = tokio::time::timeout(RELIEF, gone).await;
    }

    /// Says what it means when the kernel has killed something of the job.
    fn tell_kills(&mut self) {
        let kills = self.setup.gauge.oom_kills();
        if kills > self.kills {
            tracing::warn!(
                kills,
                "the kernel has killed a process of this job because its memory was used up: Slurm will call the whole job \
                 OUT_OF_MEMORY, whatever the pilot exits with. Give pods memory limits, or the job more memory"
            );
        }
        self.kills = kills;
    }
}

/// The container's memory limit in bytes.
fn limit(pod: &Pod, name: &str) -> Option<u64> {
    let (_, container) = containers::find(pod, name)?;
    let limit = container.resources.as_ref()?.limits.as_ref()?.get("memory")?;
    quantity::bytes(limit).ok()?.try_into().ok().filter(|limit| *limit > 0)
}
