//! From the command line to a registered Node: each step either works or says what to do about it.

mod api;
mod deadline;
mod node;
mod places;
mod settings;
mod state;
mod tunnel;

use std::fs::File;
use std::io;
use std::net::TcpListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use nix::fcntl::Flock;
use rustls::pki_types::CertificateDer;
use tokio::sync::watch;

pub(in crate::commands) use self::api::take_port;
pub(in crate::commands) use self::deadline::rfc3339;
use self::deadline::{Followers, follow_deadline, say_what_was_granted};
pub(in crate::commands) use self::node::{capacity, node_name, site};
use self::node::{facts, follow_labels, node_config};
pub use self::places::default_state_dir;
pub(in crate::commands) use self::places::{place, places, private, take_lock};
pub(in crate::commands) use self::settings::check_settings;
pub use self::state::restarted;
pub(in crate::commands) use self::state::{PilotState, instance, read_state, this_process};
use self::state::{guardian_process, load_state, recover, save_state};
pub(in crate::commands) use self::tunnel::open as open_tunnels;
use crate::allocation::duration::Walltime;
use crate::allocation::{self, Allocation, BatchSystem, DetectSettings, Environment};
use crate::allocation::{Deadline, Tracker, TrackerHandle, TrackerSettings};
use crate::certificates::{self, BootstrapError, CertificateError};
use crate::cli::RunArgs;
use crate::cluster::{self, ClusterError, Kube};
use crate::container::{Session, Supervisors};
use crate::drain::{self, Leads, TooLittle};
use crate::guardian::GuardianLink;
use crate::node::{NodeError, NodeHandle, Timing};
use crate::pilot_metrics::PilotMetrics;
use crate::pod::api::{Api, Cluster};
use crate::pod::context::{Context, Identity, Places, Policy, on_disk};
use crate::pod::directory;
use crate::pod::events::Events;
use crate::pod::manager::{self, Manager};
use crate::pod::record::Records;
use crate::pod::{environment, source};
use crate::tunnel::Tunnels;

/// How long a container goes on without a pilot; the guardian has started another one long before.
const ORPHAN_TIMEOUT: Duration = Duration::from_secs(60);

/// On PBS each end of a container is held back so long: its SIGTERM reaches all processes of a job within 15 ms.
const PBS_HOLD: Duration = Duration::from_millis(250);

/// Between two looks for logs that are too old or too many: a pilot lives for days, and its pods fill the directory.
const PRUNE_EVERY: Duration = Duration::from_secs(3600);

/// A pilot that lives, with all that it is made of.
pub struct Pilot {
    /// The Node.
    pub node: Arc<NodeHandle>,
    /// The pods.
    pub manager: Manager,
    /// What all pods share.
    pub context: Arc<Context>,
    /// Who knows the deadline.
    pub tracker: TrackerHandle,
    /// The deadline and what follows from it.
    pub timing: watch::Receiver<Option<Timing>>,
    /// Moves it.
    pub timing_tx: Arc<watch::Sender<Option<Timing>>>,
    /// Turned true when the drain begins.
    pub draining: watch::Sender<bool>,
    /// Between the batch system's SIGTERM and its SIGKILL.
    pub kill_wait: Duration,
    /// Who sends them.
    pub batch: BatchSystem,
    /// The guardian.
    pub link: Arc<GuardianLink>,
    /// This pilot's directory.
    pub state_dir: PathBuf,
    /// Held while the pilot lives.
    _holds: Holds,
}

/// What is held while the pilot lives.
struct Holds {
    _lock: Flock<File>,
    tunnels: Option<Tunnels>,
}

/// Why the pilot did not come to life.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// A setting is no good.
    #[error("{0}")]
    Setting(String),
    /// A setting is well formed, and this host cannot do what it says.
    #[error("{0}")]
    Host(String),
    /// A place on disk is no good.
    #[error("{what} {path}: {problem}; {mend}", path = path.display())]
    Place {
        /// What it is for.
        what: &'static str,
        /// Where.
        path: PathBuf,
        /// What is wrong.
        problem: String,
        /// The way out.
        mend: &'static str,
    },
    /// Too little time is left.
    #[error("only {left} s are left until {deadline} ({source_name}), and {why}; {}", .why.mend())]
    TooLate {
        /// Seconds left.
        left: u64,
        /// The deadline, RFC 3339.
        deadline: String,
        /// Where it was learnt.
        source_name: String,
        /// What it is too little for.
        why: TooLittle,
    },
    /// There is no way to the API server.
    #[error("{0}")]
    Cluster(#[from] ClusterError),
    /// There is no certificate for the Node's own API.
    #[error("{0}")]
    Certificate(#[from] CertificateError),
    /// There is no node's identity.
    #[error("{0}")]
    Bootstrap(#[from] BootstrapError),
    /// The Node cannot be registered.
    #[error("{0}")]
    Node(#[from] NodeError),
}

impl SetupError {
    /// 2 for a setting, 1 for what the world refuses.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        if matches!(self, Self::Setting(_)) { 2 } else { 1 }
    }

    /// Whether the API server refused the credential.
    #[must_use]
    pub fn is_refusal(&self) -> bool {
        match self {
            Self::Cluster(ClusterError::Refused { .. } | ClusterError::Expired { .. }) => true,
            Self::Bootstrap(error) => error.is_refusal(),
            Self::Node(error) => error.is_forbidden(),
            _ => false,
        }
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

/// What a process must be before it is a pilot: unreadable to other processes of the user, and the one to whom the
/// processes of a dead supervisor come.
///
/// # Errors
/// When the kernel refuses.
pub fn become_pilot() -> io::Result<()> {
    nix::sys::prctl::set_dumpable(false)?;
    nix::sys::prctl::set_child_subreaper(true)?;
    Ok(())
}

/// All that comes before the Node: nothing of it is seen by anybody, so it may be broken off.
pub struct Ready {
    url: String,
    client: kube::Client,
    allocation: Allocation,
    env: Environment,
    site: String,
    name: String,
    ip: String,
    places: Places,
    state: PilotState,
    state_dir: PathBuf,
    listener: TcpListener,
    authorities: Vec<CertificateDer<'static>>,
    holds: Holds,
    deadline: watch::Receiver<Option<Deadline>>,
    first: Option<Deadline>,
    tracker: TrackerHandle,
    kill_wait: Duration,
    link: GuardianLink,
    supervisors: Supervisors,
    records: Records,
    recovered: Vec<manager::Recovered>,
}

/// Finds out what was granted, takes up what is there of before a crash, and reaches the API server.
///
/// # Errors
/// When something that the pilot needs is not there; nothing is registered then.
pub async fn prepare(args: &RunArgs, link: GuardianLink) -> Result<Ready, SetupError> {
    check_settings(args)?;
    let env = Environment::from_process();

    let allocation = allocation::detect(&env, &DetectSettings::new(SystemTime::now())).await;
    let home = env.get("HOME").map(PathBuf::from);
    let mut kube = Kube::load(args.way_in(), home.as_deref()).await?;

    let site = site(args, &allocation);
    let name = node_name(args, &site, &allocation)?;
    let state_root = args.pods.state_dir.clone().unwrap_or_else(|| default_state_dir(&env));
    let state_dir = state_root.join(&name);
    private("state directory", &state_root)?;
    private("state directory", &state_dir)?;
    let lock = take_lock(&state_dir)?;
    let listener = take_port(args.port)?;
    let authorities = api::client_authorities(args.client_ca_file.as_deref(), &kube)?;
    let places = places(&args.pods, &env, allocation.job_id.as_ref().map(|j| j.value.as_str()), &name)?;
    let mut state = load_state(&state_dir)?;
    link.set_supervisors(&state_dir.join("containers"));

    // The deadline: known before anything is registered.
    let walltime = match args.pods.walltime {
        Some(Walltime::Limit(duration)) => Some(duration),
        Some(Walltime::Zero) | None => None,
    };
    let settings = TrackerSettings {
        walltime,
        // A bootstrap credential may expire once it has done its work.
        credential_expiry: kube.expires.filter(|_| args.bootstrap_kubeconfig.is_none()),
        signal_lead: args.signal_lead,
        ..TrackerSettings::new(state.first_start)
    };
    let (mut deadline, tracker) = Tracker::spawn(&allocation, env.clone(), settings);
    let first = deadline.borrow_and_update().clone();
    let left = first.as_ref().map(|d| d.at.duration_since(SystemTime::now()).unwrap_or_default());
    if let (Some(first), Some(left)) = (&first, left)
        && state.first_left.is_none()
        && let Err(why) = drain::suffices(left, args.cordon_before, args.drain_before)
    {
        return Err(SetupError::TooLate {
            left: left.as_secs(),
            deadline: rfc3339(first.at),
            source_name: first.source.clone(),
            why,
        });
    }
    // Where the end was not known then, it is what there would have been of it.
    let whole = first.as_ref().map(|d| d.at.duration_since(state.first_start).unwrap_or_default());
    state.first_left = state.first_left.or(whole.map(|whole| whole.as_secs()));
    save_state(&state_dir, &state)?;
    let kill_wait = match args.kill_wait {
        Some(given) => given,
        None => allocation::kill_wait(&env, allocation.batch).await.value,
    };
    say_what_was_granted(&allocation, &name, first.as_ref(), kill_wait);

    // First of all: a supervisor without a pilot ends its container after a while, and the API server may be away.
    let mend = "choose another place with --state-dir";
    let supervisors = Supervisors::new(&state_dir.join("containers"), name.clone())
        .map_err(|error| place("state directory", &state_dir, &error, mend))?;
    let records = Records::open(&state_dir.join("pods"))
        .map_err(|error| place("state directory", &state_dir, &error, mend))?;
    let recovered = recover(&supervisors, &records, restarted()).await;
    link.set_deadline(first.as_ref().map(|d| d.at));
    // A pilot that has pods to lose does not give the API server up before its time is over.
    let patience = if recovered.is_empty() { args.startup_timeout } else { left.unwrap_or(Duration::MAX) };
    let node_port = Some(api::port_of(&listener)?);
    let tunnels = tunnel::open(args, &mut kube, node_port, &state_dir, &env).await?;
    tunnel::wait(tunnels.as_ref(), patience).await?;
    let client = match &args.bootstrap_kubeconfig {
        None => kube.connect(patience).await?,
        Some(_) => {
            let (known, told) = (deadline.clone(), tracker.clone());
            let end = move || known.borrow().as_ref().map(|d| d.at);
            let expires = move |at| told.credential_expires(at);
            certificates::bootstrap::connect(&kube, &name, &state_dir, patience, end, expires).await?
        }
    };
    let far = tunnels.as_ref().and_then(tunnel::address);
    let ip = match args.advertise_address.clone().or(far) {
        Some(ip) => ip,
        None => {
            let (host, port) = kube.host_port();
            let found = crate::node::info::advertise_address(&host, port).await;
            found.map_err(|error| SetupError::Host(error.to_string()))?.to_string()
        }
    };
    let holds = Holds { _lock: lock, tunnels };
    Ok(Ready {
        url: kube.url(),
        client,
        allocation,
        env,
        site,
        name,
        ip,
        places,
        state,
        state_dir,
        listener,
        authorities,
        holds,
        deadline,
        first,
        tracker,
        kill_wait,
        link,
        supervisors,
        records,
        recovered,
    })
}

/// Registers the Node and begins to take pods.
///
/// # Errors
/// When the API server refuses the Node; nothing is registered then.
pub async fn join(args: &RunArgs, ready: Ready) -> Result<Pilot, SetupError> {
    let Ready { client, allocation, env, site, name, ip, places, state, state_dir, deadline, first, .. } =
        ready;
    let metrics = PilotMetrics::new();
    let client = cluster::counting(client, metrics.clone());
    let leads = Leads::new(
        state.first_left.map_or(Duration::MAX, Duration::from_secs),
        args.cordon_before,
        args.drain_before,
    );
    let (timing_tx, timing) = watch::channel(first.as_ref().map(|d| leads.timing(d.at)));
    let (drain_tx, drain) = watch::channel(timing.borrow().as_ref().map(|t| t.drain));
    let link = Arc::new(ready.link);
    let timing_tx = Arc::new(timing_tx);
    let (draining_tx, draining) = watch::channel(false);
    let followers = Followers {
        timing: Arc::clone(&timing_tx),
        drain: drain_tx,
        link: Arc::clone(&link),
        draining: draining.clone(),
        kill_wait: ready.kill_wait,
    };
    let known_deadline = deadline.clone();
    tokio::spawn(follow_deadline(deadline, leads, followers));

    let mut config = node_config(args, &name, &site, &ip, &allocation, &state, &places);
    config.daemon_port = Some(api::port_of(&ready.listener)?);
    config.declared_features = api::declared_features(&client).await;
    if let Some(tunnels) = &ready.holds.tunnels {
        tunnel::lead_to(&mut config, tunnels);
    }
    // By the login host where tunnels lead here, and from beside it in any case.
    let mut reached_at = vec![config.hostname.clone(), ip.clone(), allocation.host.clone()];
    reached_at.dedup();
    let fixed_address = args.advertise_address.is_some();
    let reached_at = tunnel::reached_at(reached_at, ready.holds.tunnels.as_ref(), fixed_address);
    let api = api::prepare(api::Parts {
        args,
        client: client.clone(),
        listener: ready.listener,
        authorities: &ready.authorities,
        node: &name,
        reached_at,
        timing: timing.clone(),
        deadline: known_deadline,
    })?;
    let facts = facts(&config, args);
    let node = crate::node::register(client.clone(), config, timing.clone(), args.startup_timeout).await?;
    node.spawn_upkeep();
    let node = Arc::new(node);
    let ports = tunnel::pod_ports(ready.holds.tunnels.as_ref());

    let mark = name.clone();
    let context = Arc::new(Context {
        api: Api::Cluster(Cluster::new(client.clone(), draining.clone())),
        events: Events::to_cluster(client.clone(), &name),
        supervisors: Arc::new(ready.supervisors),
        records: ready.records,
        identity: Identity {
            node: Some(name.clone()),
            cluster: Some(ready.url),
            ip,
            host: allocation.host.clone(),
            job: allocation.job_id.as_ref().map(|j| j.value.clone()),
            // A crash of the pilot changes nothing about whose a directory is.
            process: guardian_process(),
            mark,
        },
        places,
        inherited: environment::inherited(
            env.iter().map(|(name, value)| (name.to_owned(), value.to_owned())),
            &args.pods.pass_env,
        ),
        expand: args.pods.expand.into(),
        allocatable: facts.allocatable.clone(),
        drain,
        draining,
        roster: Arc::default(),
        metrics,
        policy: Policy { open_files: raise_open_files(), ..policy(allocation.batch) },
        ports,
        output: None,
    });
    if let Some(tunnels) = &ready.holds.tunnels {
        tunnel::follow_node(&node, tunnels, fixed_address);
        if let Some(ports) = &context.ports {
            tunnel::follow_pods(context.api.clone(), ports, tunnels);
        }
    }
    api.serve(&context, &allocation, &site);
    spawn_housekeeping(&context);
    let manager = manager::spawn(manager::Setup {
        context: Arc::clone(&context),
        pods: source::watch(client, &name),
        facts: follow_labels(facts, node.labels()),
        recovered: ready.recovered,
    });
    let known = *timing.borrow();
    tracing::info!(
        node = name,
        cordon = known.map(|t| rfc3339(t.cordon)),
        drain = known.map(|t| rfc3339(t.drain)),
        "Node registered; pods are taken until the cordon and ended at the drain"
    );
    let (tracker, kill_wait) = (ready.tracker, ready.kill_wait);
    let draining = draining_tx;
    Ok(Pilot {
        node,
        manager,
        context,
        tracker,
        timing,
        timing_tx,
        draining,
        kill_wait,
        batch: allocation.batch,
        link,
        state_dir,
        _holds: ready.holds,
    })
}

/// How containers start and end under a batch system.
pub(in crate::commands) fn policy(batch: BatchSystem) -> Policy {
    let pbs = matches!(batch, BatchSystem::Pbs | BatchSystem::Torque);
    Policy {
        session: if pbs { Session::Shared } else { Session::Own },
        orphan_timeout: ORPHAN_TIMEOUT,
        hold_end: if pbs { PBS_HOLD } else { Duration::ZERO },
        open_files: None,
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
