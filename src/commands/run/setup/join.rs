//! A pilot, put together: at its Node, or after a crash without it.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use tokio::sync::{mpsc, watch};

use super::cpus;
use super::deadline::rfc3339;
use super::memory::{self, Memory};
use super::node::{facts, follow, grant, leader_name};
use super::reach::{self, Entered, Way};
use super::state::{guardian_process, keep_state};
use super::{Begun, Pilot, SetupError, sessions, tunnel};
use crate::allocation::{self, BatchSystem};
use crate::certificates;
use crate::cli::{PodArgs, RunArgs};
use crate::cluster;
use crate::container::Session;
use crate::idle::{Idle, Limits};
use crate::node::{self, NodeHandle};
use crate::pilot_metrics::PilotMetrics;
use crate::pod::admission::NodeFacts;
use crate::pod::api::{Api, Cluster};
use crate::pod::context::{Context, Identity, Policy, Shares, on_disk};
use crate::pod::directory;
use crate::pod::events::Events;
use crate::pod::isolation::Isolation;
use crate::pod::manager::{self, Manager};
use crate::pod::objects::watches;
use crate::pod::pressure::Kills;
use crate::pod::services::Services;
use crate::pod::{environment, source};

/// How long a container goes on without a pilot; the guardian has started another one long before.
const ORPHAN_TIMEOUT: Duration = Duration::from_secs(60);

/// On PBS each end of a container is held back so long: its SIGTERM reaches all processes of a job within 15 ms.
const PBS_HOLD: Duration = Duration::from_millis(250);

/// Between two looks for logs that are too old or too many: a pilot lives for days, and its pods fill the directory.
const PRUNE_EVERY: Duration = Duration::from_secs(3600);

/// Begins to take pods.
#[must_use]
pub fn join(args: &RunArgs, mut begun: Begun, way: Way, entered: Entered) -> Pilot {
    let Entered { node, facts, api } = entered;
    node.spawn_upkeep();
    let node = Arc::new(node);
    let (ledger, placement, shares) = manager::shares(grant(&begun.allocation));
    let memory = Memory::of(&begun.allocation);
    let (pressure_tx, pressure) = watch::channel(false);
    let (cpus_tx, cpus) = watch::channel(begun.allocation.cpus.value.len());
    let context = context(args, &begun, &way, &facts, (shares, &memory));
    if let Some(tunnels) = &begun.holds.tunnels {
        tunnel::follow_node(&node, tunnels, args.advertise_address.is_some());
        if let Some(ports) = &context.ports {
            tunnel::follow_pods(context.api.clone(), ports, tunnels);
        }
    }
    memory::tell_node(&node, pressure.clone());
    api.serve(&context, &begun.allocation, &begun.site);
    spawn_housekeeping(&context);
    sessions::watch(&begun.allocation, &begun.env, &context);
    if let (Some(leader), Some(job)) =
        (leader_name(args, &begun.site, &begun.allocation), &begun.allocation.job_id)
    {
        let tracker = begun.tracker.clone();
        let follow =
            node::leader::follow(way.client.clone(), leader, job.value.clone(), move || tracker.ask_now());
        tokio::spawn(follow);
    }
    let manager = manager::spawn(manager::Setup {
        context: Arc::clone(&context),
        pods: source::watch(way.client, &begun.name),
        facts: follow(facts, node.labels(), pressure, cpus),
        recovered: std::mem::take(&mut begun.recovered),
        ledger,
        placement,
    });
    memory.watch(&context, &manager, pressure_tx);
    cpus::watch(&begun.allocation, &manager, &node, cpus_tx);
    let known = *begun.timing.borrow();
    tracing::info!(
        node = begun.name,
        cordon = known.map(|t| rfc3339(t.cordon)),
        drain = known.map(|t| rfc3339(t.drain)),
        "Node registered; pods are taken until the cordon and ended at the drain"
    );
    // Pods can come from now on.
    let limits = Limits::new(args.idle_timeout, args.idle_timeout_first);
    let idle = Idle::new(limits, begun.state.idle, SystemTime::now(), Instant::now());
    let idle = idle.map(|idle| (idle, keep_state(&begun.state_dir, begun.state.clone())));
    Pilot { idle, ..pilot(begun, Some(node), manager, context) }
}

/// Takes up the pods of before a crash to end them, while the API server is away: it is told of them should it come back.
///
/// # Errors
/// When certificates or keys of the kubeconfig are no good.
pub async fn leave(args: &RunArgs, mut begun: Begun) -> Result<Pilot, SetupError> {
    let own = args.bootstrap_kubeconfig.as_ref();
    let own =
        own.and_then(|_| certificates::bootstrap::kept_kube(&begun.kube, &begun.name, &begun.state_dir));
    let metrics = PilotMetrics::new();
    let client = cluster::counting(own.as_ref().unwrap_or(&begun.kube).client()?, metrics.clone());
    // Statuses name it; no pod starts any more.
    let ip = reach::address(args, &begun).await.unwrap_or_else(|_| "127.0.0.1".to_owned());
    let facts = facts(&reach::config(args, &begun, &ip), args, &begun.isolation);
    let (ledger, placement, shares) = manager::shares(grant(&begun.allocation));
    let memory = Memory::of(&begun.allocation);
    let context = context(args, &begun, &Way { client, ip, metrics }, &facts, (shares, &memory));
    spawn_housekeeping(&context);
    let (_, pods) = mpsc::channel(1);
    let (_, facts) = watch::channel(facts);
    let recovered = std::mem::take(&mut begun.recovered);
    let manager = manager::spawn(manager::Setup {
        context: Arc::clone(&context),
        pods,
        facts,
        recovered,
        ledger,
        placement,
    });
    memory.watch(&context, &manager, watch::channel(false).0);
    Ok(pilot(begun, None, manager, context))
}

/// What all pods share.
fn context(
    args: &RunArgs,
    begun: &Begun,
    way: &Way,
    facts: &NodeFacts,
    (shares, memory): (Shares, &Memory),
) -> Arc<Context> {
    let name = &begun.name;
    let variables = begun.env.iter().map(|(name, value)| (name.to_owned(), value.to_owned()));
    let draining = begun.draining.subscribe();
    // Each watch has a connection of its own, for which a tunnel has less room.
    let tunnelled = begun.holds.tunnels.is_some();
    let watches = if tunnelled { watches::MOST_BY_TUNNEL } else { watches::MOST };
    Arc::new(Context {
        api: Api::Cluster(Cluster::new(way.client.clone(), draining.clone()).with_watches(watches)),
        events: Events::to_cluster(way.client.clone(), name),
        services: Services::of_cluster(way.client.clone(), &args.namespaces),
        supervisors: Arc::clone(&begun.supervisors),
        records: begun.records.clone(),
        identity: Identity {
            node: Some(name.clone()),
            cluster: Some(begun.kube.url()),
            ip: way.ip.clone(),
            host: begun.allocation.host.clone(),
            job: begun.allocation.job_id.as_ref().map(|j| j.value.clone()),
            // A crash of the pilot changes nothing about whose a directory is.
            process: guardian_process(),
            mark: name.clone(),
        },
        places: begun.places.clone(),
        inherited: environment::inherited(variables, &args.pods.pass_env),
        expand: args.pods.expand.into(),
        images: args.pods.images.clone().unwrap_or_default(),
        allocatable: facts.allocatable.clone(),
        shares,
        kills: Arc::new(Kills::new(memory.gauge())),
        drain: begun.drain.clone(),
        draining,
        roster: Arc::default(),
        metrics: way.metrics.clone(),
        policy: Policy {
            open_files: raise_open_files(),
            isolation: begun.isolation.clone(),
            delegation: begun.delegation.clone(),
            ..policy(&args.pods, begun.allocation.batch)
        },
        ports: tunnel::pod_ports(begun.holds.tunnels.as_ref()),
        output: None,
    })
}

fn pilot(begun: Begun, node: Option<Arc<NodeHandle>>, manager: Manager, context: Arc<Context>) -> Pilot {
    Pilot {
        node,
        manager,
        context,
        tracker: begun.tracker,
        timing: begun.timing,
        timing_tx: begun.timing_tx,
        draining: begun.draining,
        kill_wait: begun.kill_wait,
        batch: begun.allocation.batch,
        idle: None,
        link: begun.link,
        state_dir: begun.state_dir,
        _holds: begun.holds,
    }
}

/// Descriptors that a pilot wants: 300 connections to the Node's API with a log or a session each, 200 forwarded ones, and
/// two a container. The soft limit is mostly 1024, for the sake of programs that use select(2); the hard one is higher.
const OPEN_FILES: u64 = 8192;

/// Raises this process's soft limit of open files. What it was is returned where it changed: containers get it back.
fn raise_open_files() -> Option<u64> {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).ok()?;
    let wanted = OPEN_FILES.min(hard);
    if soft >= wanted {
        return None;
    }
    // Where it is refused, connections are refused when there is no descriptor for them.
    setrlimit(Resource::RLIMIT_NOFILE, wanted, hard).ok()?;
    Some(soft)
}

/// How containers start and end under a batch system.
pub(in crate::commands) fn policy(pods: &PodArgs, batch: BatchSystem) -> Policy {
    let pbs = matches!(batch, BatchSystem::Pbs | BatchSystem::Torque);
    Policy {
        session: if pbs { Session::Shared } else { Session::Own },
        orphan_timeout: ORPHAN_TIMEOUT,
        hold_end: if pbs { PBS_HOLD } else { Duration::ZERO },
        open_files: None,
        back_off_max: pods.crash_loop_back_off_max,
        isolation: Isolation::default(),
        delegation: None,
    }
}

/// What goes on beside the pods: remains of dead supervisors are ended, old logs go.
pub(in crate::commands) fn spawn_housekeeping(context: &Arc<Context>) {
    let supervisors = Arc::clone(&context.supervisors);
    tokio::spawn(async move { supervisors.reap_strays(allocation::command::is_ours).await });
    let kept_root = context.places.pods.join(directory::KEPT);
    tokio::spawn(async move {
        let mut hourly = tokio::time::interval(PRUNE_EVERY);
        hourly.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            hourly.tick().await;
            let root = kept_root.clone();
            if on_disk(move || directory::prune_kept(&root, SystemTime::now())).await.is_err() {
                return;
            }
        }
    });
}
