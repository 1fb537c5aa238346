//! The one task that looks at memory, while containers run.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::eviction::{self, Consumer};
use super::{Gauge, Room, kept_free, pace};
use crate::container::usage::weight::{self, Scales};
use crate::pod::containers;
use crate::pod::context::Context;
use crate::pod::events::Kind;
use crate::pod::manager::Manager;
use crate::pod::quantity;
use crate::pod::roster::PodView;
use crate::pod::session::RunHandle;
use crate::pod::status::OOM_KILLED;
use crate::pod::volumes;

/// Between two weighings of containers with a limit: one over it is ended within two seconds.
const WEIGH: Duration = Duration::from_secs(1);

/// How long a weighing is waited for. One that takes longer (a process whose memory cannot be looked at for now) is taken when it
/// is there, and none other begins before.
const WEIGH_LIMIT: Duration = Duration::from_millis(300);

/// An exact weighing of a container is not repeated before so many times what it took are over: it walks its processes' page
/// tables, and holds them up meanwhile.
const WEIGH_REST: u32 = 20;

/// How long the Node says MemoryPressure after the last time. A kubelet says it for five minutes, in a cluster of machines that
/// stay; of an allocation of an hour that would be much.
const TRANSITION: Duration = Duration::from_secs(60);

/// How long the end of an evicted pod is waited for before another is chosen: a killed process gives its memory back at some GB
/// a second. One that is there for longer (a process that the kernel cannot end) does not count any more.
const RELIEF: Duration = Duration::from_secs(5);

/// While an evicted pod is ending, and nothing else can be done.
const RELIEF_LOOK: Duration = Duration::from_millis(20);

/// What the kernel counts of a process is up to this much behind (percpu counters), so nothing near its limit is let pass
/// unweighed.
const NEAR: u64 = 8 << 20;

/// How long the search for the one to be evicted weighs exactly: memory fills meanwhile.
const CHOICE: Duration = Duration::from_millis(50);

/// What the task goes by.
pub struct Setup {
    /// The pods, and where events go.
    pub context: Arc<Context>,
    /// The job's memory.
    pub gauge: Arc<dyn Gauge>,
    /// What was granted, where no cgroup holds the job to it.
    pub grant: Option<u64>,
    /// How many CPUs may fill it.
    pub cpus: usize,
    /// Who evicts.
    pub manager: Manager,
    /// Whether memory is short.
    pub pressure: watch::Sender<bool>,
}

/// Starts the task.
pub fn spawn(setup: Setup) {
    let kills = setup.gauge.oom_kills();
    let watch = Watch {
        setup,
        weighed: None,
        weighing: None,
        rests: HashMap::new(),
        in_all: 0,
        pressed: None,
        evicted: None,
        stays: Vec::new(),
        kills,
    };
    tokio::spawn(watch.run());
}

/// A container with a supervisor, whatever its state says: its program may run before that is told.
#[derive(Clone)]
struct Running {
    view: Arc<PodView>,
    name: String,
    run: RunHandle,
    limit: Option<u64>,
}

impl Running {
    fn uid(&self) -> &str {
        self.view.pod.metadata.uid.as_deref().unwrap_or_default()
    }
}

/// What a weighing found.
struct Weighed {
    /// Containers over their limits, and what they weigh.
    over: Vec<(Running, u64)>,
    /// What all containers weigh, exactly where that could matter.
    in_all: u64,
    /// Supervisors of containers that were weighed exactly, and how long that took.
    took: Vec<(i32, Duration)>,
}

struct Watch {
    setup: Setup,
    weighed: Option<Instant>,
    weighing: Option<JoinHandle<Weighed>>,
    /// Until when containers are not weighed exactly again, by their supervisors.
    rests: HashMap<i32, Instant>,
    in_all: u64,
    /// When memory was short last.
    pressed: Option<Instant>,
    /// The pod that was evicted last, and when.
    evicted: Option<(String, Instant)>,
    /// Pods that were evicted and are there for ever.
    stays: Vec<String>,
    /// Processes that the kernel has killed, as last seen.
    kills: u64,
}

impl Watch {
    async fn run(mut self) {
        let mut changes = self.setup.context.roster.changes();
        loop {
            changes.mark_unchanged();
            let running = self.running();
            self.tell_kills();
            let wait = if running.is_empty() {
                self.in_all = 0;
                (self.evicted, self.weighed) = (None, None);
                self.stays.clear();
                self.rests.clear();
                self.pressed.map(|at| (at + TRANSITION).saturating_duration_since(Instant::now()))
            } else {
                Some(self.look(&running).await)
            };
            if self.pressed.is_some_and(|at| at.elapsed() >= TRANSITION) {
                self.pressed = None;
                self.setup.pressure.send_if_modified(|on| std::mem::replace(on, false));
            }
            tokio::select! {
                changed = changes.changed() => if changed.is_err() { return },
                () = tokio::time::sleep(wait.unwrap_or(Duration::MAX)), if wait.is_some() => {}
            }
        }
    }

    /// Looks at all that runs, and says how long to wait for the next look.
    async fn look(&mut self, running: &[Running]) -> Duration {
        let wants = self.setup.grant.is_some() || running.iter().any(|one| one.limit.is_some());
        if wants {
            self.weigh(running).await;
        }
        let room = self.room();
        let mut wait = room.map_or(WEIGH, |room| pace(room, self.setup.cpus));
        if let Some(room) = room.filter(|room| room.available < kept_free(room.limit)) {
            self.pressed = Some(Instant::now());
            self.setup.pressure.send_if_modified(|on| !std::mem::replace(on, true));
            wait = self.relieve(running, room).await;
        }
        let due =
            self.weighed.filter(|_| wants).map(|at| (at + WEIGH).saturating_duration_since(Instant::now()));
        due.map_or(wait, |due| wait.min(due.max(Duration::from_millis(10))))
    }

    fn running(&self) -> Vec<Running> {
        let mut running = Vec::new();
        for view in self.setup.context.roster.all() {
            for (name, container) in &view.containers {
                let Some(run) = container.run.clone() else { continue };
                let limit = limit(&view.pod, name);
                running.push(Running { view: Arc::clone(&view), name: name.clone(), run, limit });
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

    /// Weighs, where that is due, and ends containers that are over their limits.
    async fn weigh(&mut self, running: &[Running]) {
        if self.weighing.is_none() {
            if self.weighed.is_some_and(|at| at.elapsed() < WEIGH) {
                return;
            }
            self.weighed = Some(Instant::now());
            self.rests.retain(|supervisor, _| running.iter().any(|one| one.run.supervisor == *supervisor));
            let (running, rests, grant) = (running.to_vec(), self.rests.clone(), self.setup.grant);
            self.weighing = Some(tokio::task::spawn_blocking(move || weigh(running, &rests, grant)));
        }
        let Some(weighing) = &mut self.weighing else { return };
        let Ok(weighed) = tokio::time::timeout(WEIGH_LIMIT, weighing).await else { return };
        self.weighing = None;
        let Ok(weighed) = weighed else { return };
        self.in_all = weighed.in_all;
        for (supervisor, took) in weighed.took {
            self.rests.insert(supervisor, Instant::now() + took * WEIGH_REST);
        }
        for (one, bytes) in weighed.over {
            let message = format!(
                "Container {} was using {} KiB of memory, and its limit is {} KiB",
                one.name,
                bytes.div_ceil(1024),
                one.limit.unwrap_or_default() / 1024
            );
            let meta = &one.view.pod.metadata;
            tracing::warn!(
                namespace = meta.namespace,
                pod = meta.name,
                "{message}: it is ended as {OOM_KILLED}"
            );
            let events = &self.setup.context.events;
            events.record(&one.view.pod, Some(&one.name), Kind::Warning, OOM_KILLED, &message);
            one.run.out_of_memory(message);
        }
    }

    /// Evicts the pod that a kubelet would, once the one before is gone, and says when to look again.
    async fn relieve(&mut self, running: &[Running], room: Room) -> Duration {
        if let Some((uid, at)) = self.evicted.take() {
            if is_there(&uid, running) && at.elapsed() < RELIEF {
                self.evicted = Some((uid, at));
                return RELIEF_LOOK;
            }
            if is_there(&uid, running) {
                self.stays.push(uid);
            } else if self.setup.grant.is_some() {
                // What is known of the containers' weight is of before it went.
                self.weighed = None;
                return Duration::ZERO;
            }
        }
        let candidates: Vec<Running> =
            running.iter().filter(|one| !self.stays.iter().any(|uid| uid == one.uid())).cloned().collect();
        let choosing = tokio::task::spawn_blocking(move || consumers(candidates));
        let Ok(Ok(consumers)) = tokio::time::timeout(WEIGH, choosing).await else { return WEIGH };
        let Some(first) = eviction::first(&consumers) else { return WEIGH };
        let message = eviction::message(first, kept_free(room.limit), room.available);
        let uid = first.uid().to_owned();
        self.setup.manager.evict(&uid, message).await;
        self.evicted = Some((uid, Instant::now()));
        RELIEF_LOOK
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
        self.setup.context.kills.settle();
    }
}

/// Whether anything of a pod is there yet: its processes, or what it has in memory without any.
fn is_there(uid: &str, running: &[Running]) -> bool {
    running.iter().any(|one| one.uid() == uid)
        || volumes::memory::parents().iter().any(|parent| parent.join(uid).exists())
}

/// Weighs containers: at most, and exactly those that are near their limits; all of them where the grant is nearly used up by
/// what they weigh at most.
fn weigh(running: Vec<Running>, rests: &HashMap<i32, Instant>, grant: Option<u64>) -> Weighed {
    let mut scales = Scales::default();
    let weights: Vec<_> = running
        .iter()
        .map(|one| match one.limit.is_some() || grant.is_some() {
            true => scales.weigh(one.run.supervisor),
            false => weight::Weight::default(),
        })
        .collect();
    let at_most: u64 = weights.iter().map(|weight| weight.at_most).sum();
    let nearly_used = grant.is_some_and(|grant| at_most.saturating_add(kept_free(grant)) > grant);
    let mut weighed = Weighed { over: Vec::new(), in_all: 0, took: Vec::new() };
    for (one, found) in running.into_iter().zip(weights) {
        let near = one.limit.is_some_and(|limit| found.at_most.saturating_add(NEAR) > limit);
        let rests = rests.get(&one.run.supervisor).is_some_and(|until| *until > Instant::now());
        let mut bytes = found.at_most;
        if near && !rests || nearly_used {
            let begun = std::time::Instant::now();
            bytes = weight::exactly(&found.processes);
            weighed.took.push((one.run.supervisor, begun.elapsed()));
            if near && one.limit.is_some_and(|limit| bytes > limit) {
                weighed.over.push((one, bytes));
            }
        }
        weighed.in_all = weighed.in_all.saturating_add(bytes);
    }
    weighed
}

/// What each pod takes: exactly, as far as there is time, the heaviest first.
fn consumers(running: Vec<Running>) -> Vec<Consumer> {
    let mut scales = Scales::default();
    let mut weighed: Vec<_> =
        running.into_iter().map(|one| (scales.weigh(one.run.supervisor), one)).collect();
    weighed.sort_by_key(|(weight, _)| std::cmp::Reverse(weight.at_most));
    let begun = std::time::Instant::now();
    let mut consumers: Vec<Consumer> = Vec::new();
    for (found, one) in weighed {
        let has_time = begun.elapsed() < CHOICE;
        let bytes = if has_time { weight::exactly(&found.processes) } else { found.at_most };
        let entry = (one.name.clone(), bytes);
        match consumers.iter_mut().find(|known| known.uid() == one.uid()) {
            Some(known) => known.containers.push(entry),
            None => {
                let besides = volumes::memory_used(one.uid());
                consumers.push(Consumer { pod: one.view.pod.clone(), containers: vec![entry], besides });
            }
        }
    }
    consumers
}

/// The container's memory limit in bytes.
fn limit(pod: &Pod, name: &str) -> Option<u64> {
    let (_, container) = containers::find(pod, name)?;
    let limit = container.resources.as_ref()?.limits.as_ref()?.get("memory")?;
    quantity::bytes(limit).ok()?.try_into().ok().filter(|limit| *limit > 0)
}
