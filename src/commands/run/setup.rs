//! From the command line to a registered Node: each step either works or says what to do about it.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::allocation::duration::Walltime;
use crate::allocation::{self, Allocation, BatchSystem, DetectSettings, Environment, TimeLimit};
use crate::allocation::{Deadline, Tracker, TrackerHandle, TrackerSettings, Vendor};
use crate::cli::{PodArgs, PodsLayout, RunArgs};
use crate::cluster::{ClusterError, Kube};
use crate::container::{Session, Supervisors};
use crate::drain::{LEAST_TIME, Leads};
use crate::files;
use crate::guardian::GuardianLink;
use crate::node::{self, NodeConfig, NodeHandle, Timing};
use crate::pod::admission::NodeFacts;
use crate::pod::api::{Api, Cluster};
use crate::pod::context::{Context, Identity, Places, Policy, on_disk};
use crate::pod::directory::{self, ProcessIdentity};
use crate::pod::events::Events;
use crate::pod::manager::{self, Manager};
use crate::pod::record::Records;
use crate::pod::{environment, source};

/// How long a container goes on without a pilot; the guardian has started another one long before.
const ORPHAN_TIMEOUT: Duration = Duration::from_secs(60);

/// On PBS each end of a container is held back so long: its SIGTERM reaches all processes of a job within 15 ms.
const PBS_HOLD: Duration = Duration::from_millis(250);

/// Between two looks for logs that are too old or too many: a pilot lives for days, and its pods fill the directory.
const PRUNE_EVERY: Duration = Duration::from_secs(3600);

/// Pods at once: kubelet's own default is 110 (kubelet config, maxPods); virtual-kubelet-cmd said 1000.
const PODS: u32 = 1000;

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
    /// The guardian.
    pub link: Arc<GuardianLink>,
    /// This pilot's directory.
    pub state_dir: PathBuf,
    /// Held while the pilot lives.
    _holds: Holds,
}

/// What is held only so that nobody else takes it.
struct Holds {
    _lock: Flock<File>,
    _port: Option<OwnedFd>,
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
    #[error(
        "only {left} s are left until {deadline} ({source_name}), and a pilot needs {} s to register and to drain; ask \
         for more walltime", LEAST_TIME.as_secs()
    )]
    TooLate {
        /// Seconds left.
        left: u64,
        /// The deadline, RFC 3339.
        deadline: String,
        /// Where it was learnt.
        source_name: String,
    },
    /// There is no way to the API server.
    #[error("{0}")]
    Cluster(#[from] ClusterError),
    /// The Node cannot be registered.
    #[error("{0}")]
    Node(#[from] node::NodeError),
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
            Self::Node(error) => error.is_forbidden(),
            _ => false,
        }
    }
}

/// The checks that need neither network nor batch system; also made before the guardian starts anything.
///
/// # Errors
/// When a setting is no good: its flag, its value, and what is wanted.
pub fn check_settings(args: &RunArgs) -> Result<(), SetupError> {
    if let Some(name) = args.node_name.as_deref() {
        node::labels::check_node_name(name).map_err(|error| SetupError::Setting(error.to_string()))?;
    }
    match (&args.tls_cert_file, &args.tls_private_key_file) {
        (None, None) => {}
        (Some(cert), Some(key)) => {
            for (flag, file) in [("--tls-cert-file", cert), ("--tls-private-key-file", key)] {
                File::open(file).map_err(|error| {
                    SetupError::Setting(format!(
                        "invalid value '{}' for '{flag}': {error}; a readable PEM file is wanted",
                        file.display()
                    ))
                })?;
            }
        }
        _ => {
            return Err(SetupError::Setting(
                "--tls-cert-file and --tls-private-key-file are given together or not at all".to_owned(),
            ));
        }
    }
    Ok(())
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

/// What survives a crash of the pilot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::commands) struct PilotState {
    version: u32,
    /// A name of this pilot that no other has.
    instance: String,
    /// The boot in which it began.
    pub boot: String,
    /// Its guardian, which is there before the pilot and after each crash of it: `clean` asks whether it lives.
    #[serde(default)]
    pub guardian: Option<ProcessIdentity>,
    first_start: SystemTime,
    /// The time that was left at the first start, in seconds: the leads are a part of it.
    first_left: Option<u64>,
}

const PILOT_STATE_VERSION: u32 = 1;

/// The default state directory: node-local, one a user.
#[must_use]
pub fn default_state_dir(env: &Environment) -> PathBuf {
    let tmp = env.get("TMPDIR").filter(|dir| Path::new(dir).is_dir()).unwrap_or("/tmp").to_owned();
    Path::new(&tmp).join(format!("jiriaf-pilot-{}", nix::unistd::getuid()))
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
    let kube = Kube::load(args.kubeconfig.as_deref(), home.as_deref()).await?;

    let site = site(args, &allocation);
    let name = node_name(args, &site, &allocation);
    let state_root = args.pods.state_dir.clone().unwrap_or_else(|| default_state_dir(&env));
    let state_dir = state_root.join(&name);
    private("state directory", &state_root)?;
    private("state directory", &state_dir)?;
    let lock = take_lock(&state_dir)?;
    let port = take_port(args.port)?;
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
        credential_expiry: kube.expires,
        signal_lead: args.signal_lead,
        ..TrackerSettings::new(state.first_start)
    };
    let (mut deadline, tracker) = Tracker::spawn(&allocation, env.clone(), settings);
    let first = deadline.borrow_and_update().clone();
    let left = first.as_ref().map(|d| d.at.duration_since(SystemTime::now()).unwrap_or_default());
    if let (Some(first), Some(left)) = (&first, left)
        && state.first_left.is_none()
        && left < LEAST_TIME
    {
        return Err(SetupError::TooLate {
            left: left.as_secs(),
            deadline: rfc3339(first.at),
            source_name: first.source.clone(),
        });
    }
    state.first_left = state.first_left.or(left.map(|left| left.as_secs()));
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
    let client = kube.connect(patience).await?;
    let ip = match &args.advertise_address {
        Some(ip) => ip.clone(),
        None => {
            let (host, port) = kube.host_port();
            let found = node::info::advertise_address(&host, port).await;
            found.map_err(|error| SetupError::Host(error.to_string()))?.to_string()
        }
    };
    let holds = Holds { _lock: lock, _port: port };
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
    tokio::spawn(follow_deadline(deadline, leads, followers));

    let config = node_config(args, &name, &site, &ip, &allocation, &state, &places);
    let facts = facts(&config, args);
    let node = node::register(client.clone(), config, timing.clone(), args.startup_timeout).await?;
    node.spawn_upkeep();
    let node = Arc::new(node);

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
        policy: policy(allocation.batch),
        output: None,
    });
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
        link,
        state_dir,
        _holds: ready.holds,
    })
}

/// The label jiriaf.site: as set, else the batch cluster's name.
pub(in crate::commands) fn site(args: &RunArgs, allocation: &Allocation) -> String {
    let set = args.site.clone().filter(|site| !site.is_empty());
    let site = set.or_else(|| allocation.cluster.as_ref().map(|cluster| cluster.value.clone()));
    site.unwrap_or_else(|| "local".to_owned())
}

/// The Node's name: as set, else made of site, job and host.
pub(in crate::commands) fn node_name(args: &RunArgs, site: &str, allocation: &Allocation) -> String {
    match args.node_name.as_deref().filter(|name| !name.is_empty()) {
        // Several tasks of a job may share a NODENAME that the job script exports.
        Some(name) if allocation.task.tasks > 1 => format!("{name}-{}", allocation.task.rank),
        Some(name) => name.to_owned(),
        None => {
            let job = allocation.job_id.as_ref().map(|j| j.value.as_str());
            // Slurm names each of a job's hosts; PBS does not tell a task its host's name, and two of its hosts may be one.
            let pbs = matches!(allocation.batch, BatchSystem::Pbs | BatchSystem::Torque);
            node::labels::node_name(&node::labels::NameParts {
                site,
                job,
                restart: allocation.restart_count,
                host: &allocation.host,
                task: (pbs && allocation.task.rank > 0).then_some(allocation.task.rank),
            })
        }
    }
}

pub(in crate::commands) fn place(
    what: &'static str,
    path: &Path,
    problem: &dyn std::fmt::Display,
    mend: &'static str,
) -> SetupError {
    SetupError::Place { what, path: path.to_owned(), problem: problem.to_string(), mend }
}

/// Makes a directory that is ours alone.
pub(in crate::commands) fn private(what: &'static str, path: &Path) -> Result<(), SetupError> {
    if let Some(parent) = path.parent() {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(parent)
            .map_err(|error| place(what, parent, &error, "choose another place with --state-dir"))?;
    }
    files::private_dir(path)
        .map_err(|error| place(what, path, &error, "choose another place with --state-dir"))
}

/// Takes the lock that says that the owner of a state directory lives, until it is dropped; `clean` goes by it.
pub(in crate::commands) fn take_lock(state_dir: &Path) -> Result<Flock<File>, SetupError> {
    let path = state_dir.join("lock");
    let mend =
        "another pilot on this host has this Node's name; give this one another with --node-name (NODENAME)";
    let open = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(&path);
    let file = open.map_err(|error| place("lock", &path, &error, "choose another place with --state-dir"))?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock)
        .map_err(|(_, error)| place("lock", &path, &format!("held by another process ({error})"), mend))
}

/// Keeps the port for the Node's own API. It is bound but not listened on, so nobody can connect.
pub(in crate::commands) fn take_port(port: u16) -> Result<Option<OwnedFd>, SetupError> {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrIn, bind, socket};
    use std::os::fd::AsRawFd;
    if port == 0 {
        return Ok(None);
    }
    let taken = || -> nix::Result<OwnedFd> {
        let socket = socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
        bind(socket.as_raw_fd(), &SockaddrIn::new(0, 0, 0, 0, port))?;
        Ok(socket)
    };
    taken().map(Some).map_err(|error| {
        SetupError::Host(format!(
            "port {port} of --port (KUBELET_PORT) cannot be taken: {}; name a free port, or 0",
            error.desc()
        ))
    })
}

/// The places of pods; the pods directory is made and written to, so that a full or read-only one is known at once.
pub(in crate::commands) fn places(
    args: &PodArgs,
    env: &Environment,
    job: Option<&str>,
    name: &str,
) -> Result<Places, SetupError> {
    let home = env.get("HOME").map(PathBuf::from).ok_or_else(|| {
        SetupError::Setting("HOME is not set; set it to your home directory (pods see it too)".to_owned())
    })?;
    let pods = args.pods_dir.clone().unwrap_or_else(|| home.clone());
    let mend = "make room or permit writing there, or choose another place with --pods-dir (JIRIAF_PODS_DIR)";
    let fail = |error: io::Error| place("pods directory", &pods, &error, mend);
    fs::DirBuilder::new().recursive(true).mode(0o700).create(&pods).map_err(fail)?;
    let pods = fs::canonicalize(&pods).map_err(fail)?;
    let kept_root = pods.join(directory::KEPT);
    let kept = kept_root.join(node::labels::label_value(job.unwrap_or(name)));
    directory::make_kept(&kept).map_err(fail)?;
    let probe = kept.join(format!(".probe-{}", std::process::id()));
    fs::write(&probe, [0u8; 4096]).map_err(fail)?;
    fs::remove_file(&probe).map_err(fail)?;
    Ok(Places { pods, namespaced: args.pods_layout == PodsLayout::Namespaced, kept, home })
}

fn load_state(state_dir: &Path) -> Result<PilotState, SetupError> {
    let path = state_dir.join("pilot.json");
    let boot = crate::container::process::boot_id();
    let fresh = || PilotState {
        version: PILOT_STATE_VERSION,
        instance: instance(),
        boot: boot.clone(),
        guardian: Some(guardian_process()),
        first_start: SystemTime::now(),
        first_left: None,
    };
    let restarted = restarted();
    match fs::read(&path) {
        Ok(bytes) => match serde_json::from_slice::<PilotState>(&bytes) {
            // Only a pilot that its guardian has restarted takes up the old life; anyone else begins a new one.
            Ok(state) if state.version == PILOT_STATE_VERSION && state.boot == boot && restarted => Ok(state),
            Ok(_) => Ok(fresh()),
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "the pilot's state cannot be read; it begins anew");
                Ok(fresh())
            }
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(fresh()),
        Err(error) => Err(place("state directory", &path, &error, "choose another place with --state-dir")),
    }
}

/// The state of the pilot whose directory this is; none where there is none that can be read.
pub(in crate::commands) fn read_state(state_dir: &Path) -> Option<PilotState> {
    let bytes = fs::read(state_dir.join("pilot.json")).ok()?;
    serde_json::from_slice(&bytes).ok()
}

fn save_state(state_dir: &Path, state: &PilotState) -> Result<(), SetupError> {
    let path = state_dir.join("pilot.json");
    let bytes = serde_json::to_vec_pretty(state).map_err(io::Error::from);
    bytes.and_then(|bytes| files::write_atomic(&path, &bytes, 0o600)).map_err(|error| {
        place("state directory", &path, &error, "make room there or choose another with --state-dir")
    })
}

/// A name that no other pilot or pod has: the kernel makes one at each read.
pub(in crate::commands) fn instance() -> String {
    fs::read_to_string("/proc/sys/kernel/random/uuid").map_or_else(
        |_| format!("{}-{:?}", std::process::id(), SystemTime::now()),
        |uuid| uuid.trim().to_owned(),
    )
}

/// This process, as markers name it.
pub(in crate::commands) fn this_process() -> ProcessIdentity {
    identity(nix::unistd::getpid().as_raw())
}

/// The guardian of this process, whose child it is.
fn guardian_process() -> ProcessIdentity {
    identity(nix::unistd::getppid().as_raw())
}

fn identity(pid: i32) -> ProcessIdentity {
    ProcessIdentity {
        pid,
        start: crate::container::process::start_time(pid).unwrap_or_default(),
        boot: crate::container::process::boot_id(),
    }
}

pub(in crate::commands) fn rfc3339(at: SystemTime) -> String {
    jiff::Timestamp::try_from(at)
        .and_then(|t| t.round(jiff::Unit::Second))
        .map_or_else(|_| "?".to_owned(), |t| t.to_string())
}

fn say_what_was_granted(
    allocation: &Allocation,
    node: &str,
    deadline: Option<&Deadline>,
    kill_wait: Duration,
) {
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        node,
        host = allocation.host,
        batch = allocation.batch.label(),
        job = allocation.job_id.as_ref().map(|j| j.value.as_str()),
        cpus = allocation.cpus.value.len(),
        memory_mib = allocation.memory.value >> 20,
        gpus = allocation.gpus.value.len(),
        deadline = deadline.map(|d| rfc3339(d.at)),
        deadline_from = deadline.map(|d| d.source.as_str()),
        kill_wait = kill_wait.as_secs(),
        "allocation"
    );
}

/// Whom a deadline that moves concerns.
struct Followers {
    timing: Arc<watch::Sender<Option<Timing>>>,
    drain: watch::Sender<Option<SystemTime>>,
    link: Arc<GuardianLink>,
    draining: watch::Receiver<bool>,
    kill_wait: Duration,
}

/// Hands a deadline that moves to everybody whom it concerns, until the drain: that goes by a budget of its own.
async fn follow_deadline(
    mut deadline: watch::Receiver<Option<Deadline>>,
    leads: Leads,
    followers: Followers,
) {
    while deadline.changed().await.is_ok() {
        let now = deadline.borrow_and_update().clone();
        let next = now.as_ref().map(|d| leads.timing(d.at));
        let moved =
            followers.timing.borrow().as_ref().map(|t| t.deadline) != next.as_ref().map(|t| t.deadline);
        if !moved || *followers.draining.borrow() {
            continue;
        }
        tracing::info!(
            deadline = now.as_ref().map(|d| rfc3339(d.at)),
            from = now.as_ref().map(|d| d.source.as_str()),
            drain = next.as_ref().map(|t| rfc3339(t.drain)),
            "the deadline has moved"
        );
        // A limit that was lowered to what is over already still leaves the batch system's kill wait for a drain.
        let least = SystemTime::now().checked_add(followers.kill_wait);
        followers.link.set_deadline(now.map(|d| least.map_or(d.at, |least| d.at.max(least))));
        followers.drain.send_replace(next.as_ref().map(|t| t.drain));
        followers.timing.send_replace(next);
    }
}

fn node_config(
    args: &RunArgs,
    name: &str,
    site: &str,
    ip: &str,
    allocation: &Allocation,
    state: &PilotState,
    places: &Places,
) -> NodeConfig {
    let gpus = &allocation.gpus.value;
    let node_type = args.node_type.clone().filter(|t| !t.is_empty());
    let node_type = node_type.unwrap_or_else(|| if gpus.is_empty() { "cpu" } else { "gpu" }.to_owned());
    let taint = |taint: &crate::cli::Taint| k8s_openapi::api::core::v1::Taint {
        key: taint.key.clone(),
        value: taint.value.clone(),
        effect: taint.effect.clone(),
        time_added: None,
    };
    let taints = if args.no_taint { Vec::new() } else { args.taints.iter().map(taint).collect() };
    NodeConfig {
        name: name.to_owned(),
        node_type,
        site: site.to_owned(),
        batch: allocation.batch.label().to_owned(),
        job_id: allocation.job_id.as_ref().map(|job| job.value.clone()),
        labels: args.labels.iter().cloned().collect(),
        annotations: args.annotations.iter().cloned().collect(),
        taints,
        hostname: allocation.host.clone(),
        internal_ip: ip.to_owned(),
        capacity: capacity(allocation, &places.pods),
        daemon_port: None,
        instance: state.instance.clone(),
        walltime: allocated(args, allocation, state),
        publish_walltime: args.pods.walltime != Some(Walltime::Zero),
        info: node::info::node_info(Path::new("/")),
    }
}

/// What the allocation offers, with the room that the pods directory has.
pub(in crate::commands) fn capacity(allocation: &Allocation, pods: &Path) -> node::Capacity {
    let mut gpus: BTreeMap<String, u32> = BTreeMap::new();
    for gpu in &allocation.gpus.value {
        *gpus.entry(resource(gpu.vendor).to_owned()).or_default() += 1;
    }
    node::Capacity {
        cpus: allocation.cpus.value.len(),
        memory_bytes: allocation.memory.value,
        pods: PODS,
        ephemeral_storage_bytes: free_bytes(pods),
        gpus,
    }
}

/// The walltime label: what `--walltime` says, else what the batch system granted, else what was left at the first start.
fn allocated(args: &RunArgs, allocation: &Allocation, state: &PilotState) -> Option<Duration> {
    let granted = match (&allocation.limit.value, &allocation.started) {
        (TimeLimit::Ends(end), Some(started)) => end.duration_since(started.value).ok(),
        _ => None,
    };
    match args.pods.walltime {
        Some(Walltime::Limit(duration)) => Some(duration),
        Some(Walltime::Zero) => None,
        None => granted.or(state.first_left.map(Duration::from_secs)),
    }
}

/// The resource that a vendor's device plugin offers.
fn resource(vendor: Vendor) -> &'static str {
    match vendor {
        Vendor::Nvidia => "nvidia.com/gpu",
        Vendor::Amd => "amd.com/gpu",
        Vendor::Intel => "gpu.intel.com/i915",
    }
}

fn free_bytes(path: &Path) -> u64 {
    nix::sys::statvfs::statvfs(path).map_or(0, |s| s.blocks_available().saturating_mul(s.fragment_size()))
}

fn facts(config: &NodeConfig, args: &RunArgs) -> NodeFacts {
    NodeFacts {
        name: config.name.clone(),
        labels: config.labels.clone(),
        taints: config.taints.clone(),
        allocatable: config.capacity.quantities(),
        namespaces: (!args.namespaces.is_empty()).then(|| args.namespaces.iter().cloned().collect()),
        shutting_down: false,
    }
}

/// How containers start and end under a batch system.
pub(in crate::commands) fn policy(batch: BatchSystem) -> Policy {
    let pbs = matches!(batch, BatchSystem::Pbs | BatchSystem::Torque);
    Policy {
        session: if pbs { Session::Shared } else { Session::Own },
        orphan_timeout: ORPHAN_TIMEOUT,
        hold_end: if pbs { PBS_HOLD } else { Duration::ZERO },
    }
}

/// The Node as admission sees it, with its labels as they are published.
fn follow_labels(
    mut facts: NodeFacts,
    mut labels: watch::Receiver<BTreeMap<String, String>>,
) -> watch::Receiver<NodeFacts> {
    facts.labels.clone_from(&labels.borrow_and_update());
    let (facts_tx, facts) = watch::channel(facts);
    tokio::spawn(async move {
        while labels.changed().await.is_ok() {
            let now = labels.borrow_and_update().clone();
            facts_tx.send_modify(|facts| facts.labels = now);
        }
    });
    facts
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

/// Whether the guardian has started this pilot again.
pub fn restarted() -> bool {
    std::env::var_os(crate::guardian::RESTARTED).is_some()
}

/// The pods of before a crash, each with the supervisors that are still there. A pilot that no guardian has restarted
/// begins anew: what an earlier one of the same name left is ended and forgotten.
async fn recover(supervisors: &Supervisors, all: &Records, restarted: bool) -> Vec<manager::Recovered> {
    let mut records = all.load();
    let mut found = match supervisors.find().await {
        Ok(found) => found,
        Err(error) => {
            tracing::error!(%error, "the supervisors of before the crash cannot be found");
            Vec::new()
        }
    };
    if !restarted {
        for record in std::mem::take(&mut records) {
            all.remove(record.uid());
        }
    } else if !records.is_empty() {
        tracing::info!(
            pods = records.len(),
            supervisors = found.len(),
            "taking up the pods of before the crash"
        );
    }
    let mut recovered = Vec::new();
    for record in records {
        let (mine, others): (Vec<_>, Vec<_>) =
            found.into_iter().partition(|(id, _)| id.pod_uid == record.uid());
        found = others;
        recovered.push((record, mine));
    }
    for (id, mut supervisor) in found {
        tracing::warn!(container = %id, "a supervisor without a pod's record is ended");
        supervisor.terminate(Duration::ZERO).await;
    }
    recovered
}
