//! What the batch system granted on this host. Knows nothing of Kubernetes.
//!
//! [`detect`] finds out once; [`Tracker`] follows the time limit, which may move; [`render`] shows it.

pub mod ask;
mod cgroup;
pub mod command;
pub mod deadline;
pub mod delegation;
pub mod duration;
mod environment;
pub mod gauge;
mod gpu_models;
pub mod pace;
mod pbs;
mod pbs_text;
pub mod report;
mod resources;
mod slurm;
mod slurm_config;
#[cfg(test)]
pub(crate) mod stand_in;
pub mod topology;
mod tracker;
pub mod usage;

use std::time::{Duration, SystemTime};

use serde::{Serialize, Serializer};

pub use ask::{AskError, Question};
pub use deadline::Deadline;
pub use duration::{Walltime, format_clock, parse_walltime};
pub use environment::Environment;
pub use gpu_models::{GpuModel, gpu_models};
pub(crate) use pbs::{find_pbs, find_qstat};
pub use report::render;
pub use resources::{Gpu, Roots, Vendor};
pub use slurm::{TimeLeft, expand_hosts, parse_time_left};
pub use tracker::{Tracker, TrackerHandle, TrackerSettings, first_deadline};

/// What passes between SIGTERM and SIGKILL where Slurm does not tell, and what is assumed without a batch system:
/// Slurm's default of 30 s, less what its signals were seen to be late.
const KILL_WAIT: Duration = Duration::from_secs(25);

/// The same for PBS. Its kill_delay is 10 s by default and not visible to a job; the shortest that was measured was 8.1 s.
const PBS_KILL_WAIT: Duration = Duration::from_secs(8);

/// Which batch system runs the job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BatchSystem {
    /// Slurm.
    Slurm,
    /// OpenPBS or PBS Pro.
    Pbs,
    /// Torque, which shares PBS's variables and commands.
    Torque,
    /// None: a process of its own.
    None,
}

impl BatchSystem {
    /// Its name as a label: Torque is `pbs` too.
    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            Self::Slurm => "slurm",
            Self::Pbs | Self::Torque => "pbs",
            Self::None => "none",
        }
    }

    /// Whether what it says of the time that is left takes a kill that is under way into account. Slurm moves the end of
    /// a job that it cancels or preempts (`%e`). PBS leaves start and walltime as they are: right after a qdel the job is
    /// still `R`, with all of its walltime.
    #[must_use]
    pub fn tells_of_a_kill(self) -> bool {
        matches!(self, Self::Slurm | Self::None)
    }

    /// Which batch system's job this is. The variables of two at once come from a submission out of a job of the other
    /// that passed its environment on (`qsub -V`, sbatch); the names of the cgroups then tell which one it is, and
    /// Slurm is assumed where they do not.
    fn of(env: &Environment, cgroup: impl FnOnce() -> Option<&'static str>) -> Self {
        let slurm = env.filled("SLURM_JOB_ID").or_else(|| env.filled("SLURM_JOBID")).is_some();
        let pbs = env.filled("PBS_JOBID").is_some();
        match (slurm, pbs) {
            (false, false) => Self::None,
            (true, false) => Self::Slurm,
            (true, true) if cgroup() != Some("pbs") => Self::Slurm,
            _ if pbs::is_torque(env) => Self::Torque,
            _ => Self::Pbs,
        }
    }
}

impl Serialize for BatchSystem {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(match self {
            Self::Torque => "torque",
            other => other.label(),
        })
    }
}

/// A value, and where it was learnt.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Fact<T> {
    /// The value.
    pub value: T,
    /// A variable's name, a command and what of its answer was used, or a file.
    pub source: String,
}

impl<T> Fact<T> {
    /// A value that was learnt from `source`.
    pub fn new(value: T, source: impl Into<String>) -> Self {
        Self { value, source: source.into() }
    }
}

/// When the batch system ends the job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TimeLimit {
    /// At this moment.
    Ends(SystemTime),
    /// Never: the job has no time limit, or there is no batch system.
    Unlimited,
    /// It could not be learnt, for this reason.
    Unknown(String),
}

/// Which part of a job this process is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Task {
    /// SLURM_PROCID or PBS_NODENUM: 0 is the batch script, and the one that asks the batch system most.
    pub rank: u32,
    /// How many nodes the job (or the step of srun) has.
    pub nodes: u32,
    /// How many tasks were started together with this one.
    pub tasks: u32,
    /// How many jobs the job's array has, where that is told; 1 without an array.
    pub array: u32,
}

/// What was granted on this host.
#[derive(Clone, Debug, Serialize)]
pub struct Allocation {
    /// Which batch system runs the job.
    pub batch: BatchSystem,
    /// The job's id as the batch system writes it: `1234`, `45[3].pbshost`.
    pub job_id: Option<Fact<String>>,
    /// The array job and this job's index in it: `120_3`, `45[].pbshost 3`.
    pub array: Option<Fact<String>>,
    /// How often the job was started before: a requeued job keeps its id.
    pub restart_count: u32,
    /// The batch system's name for its cluster.
    pub cluster: Option<Fact<String>>,
    /// This host's short name: Slurm's own name for the node, else the host name up to its first dot.
    pub host: String,
    /// The job's hosts, where they are known.
    pub hosts: Option<Fact<Vec<String>>>,
    /// Which part of the job this process is.
    pub task: Task,
    /// When the batch system ends the job, as it said at detection.
    pub limit: Fact<TimeLimit>,
    /// When the job started, in UTC.
    #[serde(serialize_with = "report::optional_time")]
    pub started: Option<Fact<SystemTime>>,
    /// The numbers of the CPUs that this process may use.
    pub cpus: Fact<Vec<usize>>,
    /// Whether they are all that it may use: else the batch system named a number alone, and jobs on this host share its CPUs.
    #[serde(skip)]
    pub cpus_are_named: bool,
    /// What these CPUs belong to.
    pub topology: Vec<topology::Cpu>,
    /// The memory that this process may use, in bytes; 0 where it could not be learnt.
    pub memory: Fact<u64>,
    /// The GPUs that were granted.
    pub gpus: Fact<Vec<Gpu>>,
    /// Whom to ask for the time limit.
    #[serde(skip)]
    pub question: Question,
    /// Whether the limit is the answer to that question, not a variable that may have been true once.
    #[serde(skip)]
    pub asked: bool,
}

/// What [`detect`] goes by.
#[derive(Clone, Debug)]
pub struct DetectSettings {
    /// Where the kernel's files are.
    pub roots: Roots,
    /// How long a command of the batch system may take.
    pub command_limit: Duration,
    /// When the pilot was started for the first time: the job began at this moment at the latest.
    pub first_start: SystemTime,
    /// Ask the batch system even where the environment tells the limit: it does not follow a change.
    pub ask_always: bool,
}

impl DetectSettings {
    /// The kernel's own files, 10 s for a command, and no question where the environment tells the limit.
    #[must_use]
    pub fn new(first_start: SystemTime) -> Self {
        Self { roots: Roots::default(), command_limit: command::LIMIT, first_start, ask_always: false }
    }
}

/// What a batch system's environment says of a job, its time limit aside.
#[derive(Clone, Debug)]
struct Job {
    id: Option<Fact<String>>,
    array: Option<Fact<String>>,
    restart_count: u32,
    cluster: Option<Fact<String>>,
    host: Option<String>,
    hosts: Option<Fact<Vec<String>>>,
    task: Task,
    started: Option<Fact<SystemTime>>,
    /// How many CPUs were granted here.
    cpus: Option<Fact<usize>>,
    /// How many GPUs were granted here.
    gpus: Option<Fact<usize>>,
    /// What is known of granted memory here, in bytes.
    memory: Vec<Fact<u64>>,
}

impl Job {
    /// No job.
    fn none() -> Self {
        Self {
            id: None,
            array: None,
            restart_count: 0,
            cluster: None,
            host: None,
            hosts: None,
            task: Task { rank: 0, nodes: 1, tasks: 1, array: 1 },
            started: None,
            cpus: None,
            gpus: None,
            memory: Vec::new(),
        }
    }
}

/// Finds out what was granted on this host. It never fails: what cannot be learnt is unknown, with the reason.
pub async fn detect(env: &Environment, settings: &DetectSettings) -> Allocation {
    let batch = BatchSystem::of(env, || cgroup::names_batch_system(&settings.roots.proc));
    let hostname = hostname(env);
    let job_id =
        |names: &[&str]| names.iter().find_map(|name| env.filled(name)).unwrap_or_default().to_owned();
    // What a command says begins with the command's name.
    let by_command = |source: &str| ["squeue", "qstat"].iter().any(|command| source.starts_with(command));
    let (question, job, answer) = match batch {
        BatchSystem::None => {
            let question = Question::Nobody;
            let answer = question.ask(env, settings.command_limit).await;
            (question, Job::none(), answer)
        }
        BatchSystem::Slurm => {
            let component = slurm::component(env);
            let job = component.unwrap_or_else(|| job_id(&["SLURM_JOB_ID", "SLURM_JOBID"]));
            let question = Question::Slurm { job };
            let told = slurm::limit_from_environment(env);
            let answer = match told {
                Some(told) if !settings.ask_always => Ok(told),
                Some(told) => Ok(question.ask(env, settings.command_limit).await.unwrap_or(told)),
                None => question.ask(env, settings.command_limit).await,
            };
            (question, slurm::describe(env), answer)
        }
        BatchSystem::Pbs | BatchSystem::Torque => {
            let (job, torque) = (job_id(&["PBS_JOBID"]), batch == BatchSystem::Torque);
            let told = pbs::ask(env, &job, torque, settings.command_limit).await;
            let described = pbs::describe(env, &hostname, told.as_ref().ok().map(|(job, _)| job));
            let answer = told.and_then(|(job, asked)| job.answer(asked, settings.first_start));
            let answer = match answer {
                Err(error) => pbs::limit_from_environment(env, settings.first_start).ok_or(error),
                answer => answer,
            };
            (Question::Pbs { job, torque, begun: settings.first_start }, described, answer)
        }
    };
    let limit = match answer {
        Ok(answer) => Fact::new(answer.limit, answer.source),
        Err(error) => Fact::new(TimeLimit::Unknown(error.to_string()), "not learnt"),
    };
    let cpus = resources::cpus(&settings.roots, job.cpus);
    Allocation {
        asked: batch == BatchSystem::None || by_command(&limit.source),
        batch,
        job_id: job.id,
        array: job.array,
        restart_count: job.restart_count,
        cluster: job.cluster,
        host: job.host.unwrap_or(hostname),
        hosts: job.hosts,
        task: job.task,
        limit,
        started: job.started,
        cpus_are_named: resources::allowed_cpus(&settings.roots).as_ref() == Some(&cpus.value),
        topology: topology::of(&settings.roots, &cpus.value),
        cpus,
        memory: resources::memory(&settings.roots, job.memory),
        gpus: resources::gpus(env, &settings.roots, job.gpus),
        question,
    }
}

/// The host's name up to its first dot.
fn hostname(env: &Environment) -> String {
    let name = nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok());
    let name = name.or_else(|| env.filled("HOSTNAME").map(str::to_owned)).unwrap_or_default();
    let short = name.split('.').next().unwrap_or_default();
    if short.is_empty() { "localhost".to_owned() } else { short.to_owned() }
}

/// What passes between the batch system's SIGTERM and its SIGKILL, less a margin. Slurm is asked once, where this node's
/// slurm.conf does not say.
pub async fn kill_wait(env: &Environment, batch: BatchSystem) -> Fact<Duration> {
    match batch {
        BatchSystem::Slurm => {
            if let Some(wait) = slurm_config::kill_wait_of_node(env) {
                return Fact::new(less_margin(wait), "KillWait of slurm.conf, less a margin");
            }
            match slurm_config::ask_kill_wait(env, command::LIMIT).await {
                Ok(wait) => Fact::new(less_margin(wait), "KillWait of scontrol show config, less a margin"),
                Err(error) => Fact::new(KILL_WAIT, format!("assumed: {error}")),
            }
        }
        BatchSystem::Pbs | BatchSystem::Torque => {
            Fact::new(PBS_KILL_WAIT, "assumed: PBS tells its kill_delay (10 s by default) to no job")
        }
        BatchSystem::None => Fact::new(KILL_WAIT, "assumed: no batch system"),
    }
}

/// Less 10 %, at least 2 s.
fn less_margin(wait: Duration) -> Duration {
    wait.saturating_sub((wait / 10).max(Duration::from_secs(2)))
}

#[cfg(test)]
#[path = "detect_tests.rs"]
mod tests;
