//! From the command line to a registered Node: each step either works or says what to do about it.
//!
//! [`begin`] needs neither network nor API server, [`reach`] and [`register`] do, and [`join`] makes a pilot of it. A pilot
//! that was started again and does not reach the API server in time has pods to end all the same: [`leave`].

mod api;
mod cpus;
mod deadline;
mod isolation;
mod join;
mod memory;
mod node;
mod places;
mod reach;
mod sessions;
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
pub(in crate::commands) use self::isolation::isolation;
pub use self::join::{join, leave};
pub(in crate::commands) use self::join::{policy, spawn_housekeeping};
pub(in crate::commands) use self::memory::Memory;
pub(in crate::commands) use self::node::{capacity, grant, node_name, site};
pub use self::places::default_state_dir;
pub(in crate::commands) use self::places::{by_variable, place, places, private, take_lock};
pub use self::reach::{Way, reach, register};
pub(in crate::commands) use self::settings::check_settings;
pub(in crate::commands) use self::state::{PilotState, instance, read_state, this_process};
pub use self::state::{asked_to_end, restarted};
use self::state::{load_state, recover, save_state};
pub(in crate::commands) use self::tunnel::open as open_tunnels;
use crate::allocation::duration::Walltime;
use crate::allocation::pace::Pace;
use crate::allocation::{self, Allocation, BatchSystem, DetectSettings, Environment};
use crate::allocation::{Deadline, GpuModel, Tracker, TrackerHandle, TrackerSettings};
use crate::certificates::{BootstrapError, CertificateError};
use crate::cli::RunArgs;
use crate::cluster::{ClusterError, Kube};
use crate::container::{Delegation, Supervisors};
use crate::drain::{self, Leads, Stagger, TooLittle};
use crate::guardian::GuardianLink;
use crate::idle::Idle;
use crate::node::{NodeError, NodeHandle, Timing};
use crate::pod::context::{Context, Places};
use crate::pod::isolation::Isolation;
use crate::pod::manager::{self, Manager};
use crate::pod::record::Records;
use crate::tunnel::Tunnels;

/// A pilot that lives, with all that it is made of.
pub struct Pilot {
    /// The Node; none when the API server was not reached any more after a crash.
    pub node: Option<Arc<NodeHandle>>,
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
    /// Since when nobody works, where that may end the pilot; and who writes what of it outlives a crash.
    pub idle: Option<(Idle, watch::Sender<PilotState>)>,
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

/// All that comes before the API server.
pub struct Begun {
    kube: Kube,
    allocation: Allocation,
    env: Environment,
    site: String,
    name: String,
    places: Places,
    state: PilotState,
    state_dir: PathBuf,
    listener: TcpListener,
    authorities: Vec<CertificateDer<'static>>,
    holds: Holds,
    deadline: watch::Receiver<Option<Deadline>>,
    timing: watch::Receiver<Option<Timing>>,
    timing_tx: Arc<watch::Sender<Option<Timing>>>,
    drain: watch::Receiver<Option<SystemTime>>,
    draining: watch::Sender<bool>,
    tracker: TrackerHandle,
    kill_wait: Duration,
    link: Arc<GuardianLink>,
    supervisors: Arc<Supervisors>,
    records: Records,
    recovered: Vec<manager::Recovered>,
    isolation: Isolation,
    delegation: Option<Delegation>,
    /// Which GPUs there are, once the vendors' tools were asked.
    models: Vec<GpuModel>,
}

impl Begun {
    /// Whether there are pods of before a crash.
    #[must_use]
    pub fn has_pods(&self) -> bool {
        !self.recovered.is_empty()
    }

    /// The deadline's moments, and who knows the deadline.
    #[must_use]
    pub fn clock(&self) -> (watch::Receiver<Option<Timing>>, TrackerHandle) {
        (self.timing.clone(), self.tracker.clone())
    }

    /// So much of the kill wait is over.
    pub fn spend_kill_wait(&mut self, over: Duration) {
        self.kill_wait = self.kill_wait.saturating_sub(over);
    }
}

/// Finds out what was granted, and takes up what is there of before a crash.
///
/// # Errors
/// When something that the pilot needs is not there.
pub async fn begin(args: &RunArgs, link: GuardianLink) -> Result<Begun, SetupError> {
    check_settings(args)?;
    let env = Environment::from_process();

    let allocation = allocation::detect(&env, &DetectSettings::new(SystemTime::now())).await;
    let home = env.get("HOME").map(PathBuf::from);
    let kube = Kube::load(args.way_in(), home.as_deref()).await?;

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
    let isolation = isolation(&args.pods, &places, &state_dir).await;
    let delegation = memory::delegation(&allocation);
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
        && let Err(why) = drain::suffices(left, args.cordon_before, args.drain_before, args.stagger)
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
    if !restarted() {
        // A batch system starts all pilots of a job, and of an array, at the same moment.
        tokio::time::sleep(Pace::of(&allocation, Duration::ZERO).turn_to_start()).await;
    }
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
    let link = Arc::new(link);
    let leads = Leads::new(
        state.first_left.map_or(Duration::MAX, Duration::from_secs),
        args.cordon_before,
        args.drain_before,
    );
    // Pilots that began together end together, and a thousand drains in one second are as bad as a thousand starts.
    let together = Pace::of(&allocation, Duration::ZERO).spread_of_starts();
    let stagger = Stagger::of(&name, args.stagger.max(together));
    // From the first start, so that a crash moves nothing.
    let known = first.as_ref().map(|d| stagger.timing(leads, d.at, state.first_start, None));
    if let (Some(known), false) = (&known, args.stagger.is_zero()) {
        let lead = known.deadline.duration_since(known.drain).unwrap_or_default();
        let earlier = lead.saturating_sub(leads.drain).as_secs();
        tracing::info!(seconds = earlier, "--stagger: this pilot drains earlier by its part of it");
    }
    let (timing_tx, timing) = watch::channel(known);
    let (drain_tx, drain) = watch::channel(timing.borrow().as_ref().map(|t| t.drain));
    let timing_tx = Arc::new(timing_tx);
    let (draining, draining_rx) = watch::channel(false);
    let followers = Followers {
        timing: Arc::clone(&timing_tx),
        drain: drain_tx,
        link: Arc::clone(&link),
        draining: draining_rx,
        kill_wait,
    };
    tokio::spawn(follow_deadline(deadline.clone(), leads, stagger, followers));
    Ok(Begun {
        kube,
        allocation,
        env,
        site,
        name,
        places,
        state,
        state_dir,
        listener,
        authorities,
        holds: Holds { _lock: lock, tunnels: None },
        deadline,
        timing,
        timing_tx,
        drain,
        draining,
        tracker,
        kill_wait,
        link,
        supervisors: Arc::new(supervisors),
        records,
        recovered,
        isolation,
        delegation,
        models: Vec::new(),
    })
}
