//! What `play` needs before the first pod: the allocation, its deadline, directories, and a manager fed from files.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use k8s_openapi::api::core::v1::PodStatus;
use tokio::sync::{mpsc, watch};

use super::manifests::Manifests;
use crate::allocation::duration::Walltime;
use crate::allocation::{
    self, BatchSystem, Deadline, DetectSettings, Environment, Tracker, TrackerHandle, TrackerSettings,
};
use crate::cli::PodArgs;
use crate::commands::run::setup::{
    Memory, SetupError, capacity, default_state_dir, grant, instance, isolation, place, places, policy,
    private, spawn_housekeeping, this_process,
};
use crate::container::Supervisors;
use crate::drain::Leads;
use crate::node::Timing;
use crate::pod::admission::NodeFacts;
use crate::pod::api::{Api, Files};
use crate::pod::context::{Context, Identity, OutputLine, Policy};
use crate::pod::environment;
use crate::pod::events::Events;
use crate::pod::manager::{self, Manager};
use crate::pod::pressure::Kills;
use crate::pod::record::Records;
use crate::pod::services::Services;
use crate::pod::source::PodEvent;

/// Statuses, pods and lines that may wait; whoever sends waits for room.
const WAITING: usize = 64;

/// Between SIGTERM and the end where no batch system says: the default grace of a pod is 30 s, and somebody waits.
const NO_BATCH_BUDGET: Duration = Duration::from_secs(60);

/// All that runs while pods are played.
pub struct Stage {
    /// The pods.
    pub manager: Manager,
    /// What all pods share.
    pub context: Arc<Context>,
    /// Where pods are handed in.
    pub events: mpsc::Sender<PodEvent>,
    /// What the pods' statuses come to, by uid.
    pub statuses: mpsc::Receiver<(String, PodStatus)>,
    /// What containers write.
    pub output: mpsc::Receiver<OutputLine>,
    /// This host as admission sees it.
    pub facts: NodeFacts,
    /// The deadline and what follows from it.
    pub timing: watch::Receiver<Option<Timing>>,
    /// Who knows the deadline.
    pub tracker: TrackerHandle,
    /// Turned true when the drain begins.
    pub draining: watch::Sender<bool>,
    /// Between SIGTERM and the SIGKILL that follows it.
    pub kill_wait: Duration,
    _state: StateDir,
    _facts: watch::Sender<NodeFacts>,
}

/// A directory that goes when `play` does.
struct StateDir(PathBuf);

impl Drop for StateDir {
    fn drop(&mut self) {
        // What cannot be removed is found by `clean`.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Sets the stage for the objects of `manifests`.
///
/// # Errors
/// When a directory is no good or HOME is not set.
pub async fn start(args: &PodArgs, manifests: &Manifests) -> Result<Stage, SetupError> {
    let env = Environment::from_process();
    let now = SystemTime::now();
    let found = allocation::detect(&env, &DetectSettings::new(now)).await;
    let job = found.job_id.as_ref().map(|job| job.value.clone());
    let places = places(args, &env, job.as_deref(), "play")?;

    let root = args.state_dir.clone().unwrap_or_else(|| default_state_dir(&env));
    private("state directory", &root)?;
    let mark = format!("play-{}", instance());
    let state = StateDir(root.join(&mark));
    private("state directory", &state.0)?;
    let isolation = isolation(args, &places, &state.0).await;
    let mend = "choose another place with --state-dir";
    let fail = |error: &dyn std::fmt::Display| place("state directory", &state.0, error, mend);
    let supervisors =
        Supervisors::new(&state.0.join("containers"), mark.clone()).map_err(|error| fail(&error))?;
    let records = Records::open(&state.0.join("pods")).map_err(|error| fail(&error))?;

    let walltime = match args.walltime {
        Some(Walltime::Limit(duration)) => Some(duration),
        Some(Walltime::Zero) | None => None,
    };
    let settings = TrackerSettings { walltime, ..TrackerSettings::new(now) };
    let (deadline, tracker) = Tracker::spawn(&found, env.clone(), settings);
    let first = deadline.borrow().as_ref().map(|d| d.at.duration_since(now).unwrap_or_default());
    let leads = leads(first.unwrap_or(Duration::MAX));
    let timing_now = deadline.borrow().as_ref().map(|d| leads.timing(d.at));
    let (drain_tx, drain) = watch::channel(timing_now.as_ref().map(|t| t.drain));
    let (timing_tx, timing) = watch::channel(timing_now);
    tokio::spawn(follow(deadline, leads, timing_tx, drain_tx));
    let kill_wait = match found.batch {
        BatchSystem::None => NO_BATCH_BUDGET,
        batch => allocation::kill_wait(&env, batch).await.value,
    };

    let facts = NodeFacts {
        allocatable: capacity(&found, &places.pods).allocatable(),
        isolation: isolation.clone(),
        ..NodeFacts::default()
    };
    let (statuses_tx, statuses) = mpsc::channel(WAITING);
    let (output_tx, output) = mpsc::channel(WAITING);
    let (events, pods) = mpsc::channel(WAITING);
    let (draining, draining_rx) = watch::channel(false);
    let (facts_tx, facts_rx) = watch::channel(facts.clone());
    let memory = Memory::of(&found);
    let (ledger, placement, shares) = manager::shares(grant(&found));
    let context = Arc::new(Context {
        api: Api::Files(Files::new(manifests.config_maps.clone(), manifests.secrets.clone(), statuses_tx)),
        events: Events::to_log(),
        services: Services::default(),
        supervisors: Arc::new(supervisors),
        records,
        identity: Identity {
            node: None,
            cluster: None,
            ip: "127.0.0.1".to_owned(),
            host: found.host.clone(),
            job,
            process: this_process(),
            mark,
        },
        places,
        inherited: environment::inherited(
            env.iter().map(|(name, value)| (name.to_owned(), value.to_owned())),
            &args.pass_env,
        ),
        expand: args.expand.into(),
        images: args.images.clone().unwrap_or_default(),
        allocatable: facts.allocatable.clone(),
        shares,
        kills: Arc::new(Kills::new(memory.gauge())),
        drain,
        draining: draining_rx,
        // Nobody starts `play` again, so its containers end with it.
        roster: Arc::default(),
        metrics: crate::pilot_metrics::PilotMetrics::new(),
        policy: Policy { orphan_timeout: Duration::ZERO, isolation, ..policy(args, found.batch) },
        ports: None,
        output: Some(output_tx),
    });
    spawn_housekeeping(&context);
    let manager = manager::spawn(manager::Setup {
        context: Arc::clone(&context),
        pods,
        facts: facts_rx,
        recovered: Vec::new(),
        ledger,
        placement,
    });
    memory.watch(&context, &manager, watch::channel(false).0);
    Ok(Stage {
        manager,
        context,
        events,
        statuses,
        output,
        facts,
        timing,
        tracker,
        draining,
        kill_wait,
        _state: state,
        _facts: facts_tx,
    })
}

/// As for a pilot, but never more than half of the time: somebody may try out a walltime of ten seconds.
fn leads(left: Duration) -> Leads {
    let usual = Leads::new(left, None, None);
    Leads { cordon: usual.cordon.min(left / 2), drain: usual.drain.min(left / 2) }
}

/// Hands on a deadline that moves.
async fn follow(
    mut deadline: watch::Receiver<Option<Deadline>>,
    leads: Leads,
    timing: watch::Sender<Option<Timing>>,
    drain: watch::Sender<Option<SystemTime>>,
) {
    while deadline.changed().await.is_ok() {
        let next = deadline.borrow_and_update().as_ref().map(|d| leads.timing(d.at));
        drain.send_replace(next.as_ref().map(|t| t.drain));
        timing.send_replace(next);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_short_walltime_is_half_work() {
        let s = Duration::from_secs;
        assert_eq!(leads(s(10)), Leads { cordon: s(5), drain: s(5) });
        assert_eq!(leads(s(3600)), Leads::new(s(3600), None, None));
    }
}
