//! PBS (OpenPBS, PBS Pro) and Torque: what a job's environment says, and qstat.
//!
//! No variable tells the walltime there (Torque's PBS_WALLTIME aside), so qstat is asked. The end is `stime +
//! Resource_List.walltime`: `walltime - resources_used.walltime` is late, since the used time is only counted every
//! 10 to 120 s. While a job is suspended its walltime stands still, so the end told here may then be early; never late.

use std::collections::BTreeSet;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use super::ask::{Answer, AskError, whole_seconds};
use super::command::{CommandError, Program};
use super::duration::{parse_pbs_size, parse_pbs_time};
use super::environment::{self, Environment};
use super::pbs_text::{Described, Json, parse_json, parse_text};
use super::{Fact, Job, Task, TimeLimit};

/// Where PBS says where it is installed (pbs.conf(8B)); PBS_CONF_FILE overrides it.
const CONFIGURATION: &str = "/etc/pbs.conf";

/// The most that is read of a configuration or a node file: one line a process, so a large job's is some 100 KiB.
const MAX_FILE: u64 = 1 << 20;

/// A job as qstat told it.
#[derive(Clone, Debug)]
pub(super) struct QstatJob(Described);

/// Asks qstat for this job, and returns it with the moment of the question (whole seconds).
///
/// # Errors
/// See [`AskError`].
pub(super) async fn ask(
    env: &Environment,
    job: &str,
    torque: bool,
    limit: Duration,
) -> Result<(QstatJob, SystemTime), AskError> {
    let searched = env.clone();
    let locate = move || {
        find_qstat(&searched).ok_or_else(|| CommandError::NotFound {
            program: "qstat".to_owned(),
            path: format!(
                "PBS_EXEC of {}, PATH {}, PBS_O_PATH {}",
                configuration(&searched).display(),
                searched.get("PATH").unwrap_or("not set"),
                searched.get("PBS_O_PATH").unwrap_or("not set"),
            ),
        })
    };
    // qstat prints times in its caller's time zone, without saying which.
    let mut program = Program::located("qstat", env, locate).set("TZ", "UTC");
    let not_known = |reason| AskError::NotKnown { command: "qstat", job: job.to_owned(), reason };
    let mut broken = None;

    let asked = whole_seconds(SystemTime::now());
    if !torque {
        let output = program.args(["-f", "-F", "json", job]).run(limit).await?;
        match parse_json(&output.stdout, job) {
            Json::Job(job) => return Ok((QstatJob(job), asked)),
            // Unknown (153), finished (35), or the server cannot be reached (255): standard error says which.
            Json::NoJob => return Err(not_known(output.reason())),
            Json::Broken(why) => broken = Some(why),
        }
        program = Program::at(&output.program, env).set("TZ", "UTC");
    }
    let asked = whole_seconds(SystemTime::now());
    let output = program.args(["-f", job]).run(limit).await?;
    if let Some(job) = parse_text(&output.stdout, job) {
        return Ok((QstatJob(job), asked));
    }
    let output = output.success()?;
    Err(not_known(match broken {
        Some(why) => format!("neither its JSON ({why}) nor its text has the job"),
        None => output.reason(),
    }))
}

fn configuration(env: &Environment) -> PathBuf {
    PathBuf::from(env.filled("PBS_CONF_FILE").unwrap_or(CONFIGURATION))
}

/// PBS's own qstat first: in PATH there may be Slurm's wrapper of that name (slurm-wlm-torque). PBS_O_PATH, the PATH
/// of the submission, comes last: it is another host's, but a job's own PATH often lacks PBS altogether.
pub(crate) fn find_qstat(env: &Environment) -> Option<PathBuf> {
    find_pbs("qstat", env)
}

/// Another of PBS's programs, in the same places.
pub(crate) fn find_pbs(name: &str, env: &Environment) -> Option<PathBuf> {
    let installed = read_bounded(&configuration(env)).as_deref().and_then(pbs_exec).map(str::to_owned);
    let installed = installed.or_else(|| env.filled("PBS_EXEC").map(str::to_owned));
    installed
        .map(|prefix| Path::new(&prefix).join("bin").join(name))
        .filter(|program| environment::is_program(program))
        .or_else(|| env.find_program(name))
        .or_else(|| environment::find_in(env.filled("PBS_O_PATH")?, name))
}

/// PBS_EXEC of pbs.conf.
fn pbs_exec(configuration: &str) -> Option<&str> {
    let value = configuration.lines().find_map(|line| line.trim().strip_prefix("PBS_EXEC="))?;
    Some(value.trim().trim_matches('"')).filter(|value| value.starts_with('/'))
}

pub(super) fn read_bounded(path: &Path) -> Option<String> {
    let mut text = String::new();
    std::fs::File::open(path).ok()?.take(MAX_FILE).read_to_string(&mut text).ok()?;
    Some(text)
}

impl QstatJob {
    fn get(&self, name: &str) -> Option<&str> {
        self.0.attributes.get(name).map(|value| value.trim()).filter(|value| !value.is_empty())
    }

    /// When this run of the job began: PBS's stime, Torque's start_time. It changes with each requeue.
    pub(super) fn started(&self) -> Option<SystemTime> {
        self.get("stime").or_else(|| self.get("start_time")).and_then(parse_ctime)
    }

    /// How often the job was started before.
    pub(super) fn restart_count(&self) -> Option<u32> {
        Some(self.get("run_count")?.parse::<u32>().ok()?.saturating_sub(1))
    }

    /// When the job ends, when this was asked at `asked` (whole seconds) and the job had begun at `begun` at the latest.
    pub(super) fn answer(&self, asked: SystemTime, begun: SystemTime) -> Result<Answer, AskError> {
        let unreadable =
            |what: String| AskError::Unreadable { command: "qstat", job: self.0.id.clone(), what };
        let ends = |from: SystemTime, after: Duration, source: &str| {
            let end = from.checked_add(after).ok_or_else(|| unreadable(format!("{after:?} are left")))?;
            Ok(Answer { limit: TimeLimit::Ends(end), source: source.to_owned() })
        };
        if let Some(remaining) = self.get("Walltime.Remaining") {
            let remaining = parse_pbs_time(remaining)
                .ok_or_else(|| unreadable(format!("Walltime.Remaining is `{remaining}`")))?;
            return ends(asked, remaining, "qstat Walltime.Remaining");
        }
        let Some(walltime) = self.get("Resource_List.walltime") else {
            let source = "qstat: no Resource_List.walltime".to_owned();
            return Ok(Answer { limit: TimeLimit::Unlimited, source });
        };
        let walltime = parse_pbs_time(walltime)
            .ok_or_else(|| unreadable(format!("Resource_List.walltime is `{walltime}`")))?;
        let state = self.get("job_state").unwrap_or("unknown");
        let started =
            self.started().ok_or_else(|| unreadable(format!("no start time (job state {state})")))?;
        // A start after our own is a clock that differs, or a qstat that does not heed TZ: ours is the safe one.
        ends(started.min(begun), walltime, "qstat: stime + Resource_List.walltime")
    }

    /// Its hosts, each once, in the batch system's order.
    fn hosts(&self) -> Vec<String> {
        let mut seen = BTreeSet::new();
        let hosts = self.get("exec_host").into_iter().flat_map(exec_hosts);
        hosts.filter(|host| seen.insert(host.clone())).collect()
    }

    /// What the job was granted on the host with this name, or of this number among its hosts.
    fn grant(&self, hostname: &str, number: usize) -> Grant {
        let hosts = self.hosts();
        let short = |name: &str| name.split('.').next().unwrap_or(name).to_ascii_lowercase();
        let named = hosts.iter().find(|host| short(host) == short(hostname));
        let only = if hosts.len() == 1 { hosts.first() } else { None };
        // PBS's name for a host may differ from its own.
        let this = named.or(only).or_else(|| hosts.get(number));
        let chunk_hosts: Vec<String> = self.get("exec_host").into_iter().flat_map(exec_hosts).collect();
        let chunks = self.get("exec_vnode").map(parse_exec_vnode).unwrap_or_default();
        // The two lists go side by side, a chunk to a host (pbs_job_attributes(7B)).
        let mine = || chunks.iter().zip(&chunk_hosts).filter(|(_, host)| Some(*host) == this);
        let paired = chunks.len() == chunk_hosts.len() && mine().next().is_some();
        let alone = hosts.len() <= 1;
        let sum = |of: fn(&Chunk) -> Option<u64>| -> Option<u64> {
            let mut total = 0u64;
            for (chunk, _) in mine() {
                total = total.checked_add(of(chunk)?)?;
            }
            Some(total).filter(|total| *total > 0)
        };
        let (cpus, memory) =
            if paired { (sum(|chunk| chunk.ncpus), sum(|chunk| chunk.mem)) } else { (None, None) };
        let total = |name: &str| self.get(name).filter(|_| alone);
        Grant {
            cpus: cpus
                .map(|cpus| Fact::new(cpus, "qstat exec_vnode ncpus"))
                .or_else(|| {
                    let cpus = total("Resource_List.ncpus")?.parse().ok()?;
                    Some(Fact::new(cpus, "qstat Resource_List.ncpus"))
                })
                .and_then(|fact: Fact<u64>| Some(Fact::new(usize::try_from(fact.value).ok()?, fact.source))),
            memory: memory.map(|bytes| Fact::new(bytes, "qstat exec_vnode mem")).or_else(|| {
                let bytes = parse_pbs_size(total("Resource_List.mem")?)?;
                Some(Fact::new(bytes, "qstat Resource_List.mem"))
            }),
        }
    }
}

struct Grant {
    cpus: Option<Fact<usize>>,
    memory: Option<Fact<u64>>,
}

/// The resources of one chunk of exec_vnode; a chunk that is spread over vnodes of its host is summed up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Chunk {
    ncpus: Option<u64>,
    mem: Option<u64>,
}

/// The host of each chunk of `host/0*4+host2/1`.
fn exec_hosts(text: &str) -> impl Iterator<Item = String> {
    text.split('+')
        .map(|part| part.trim().split('/').next().unwrap_or_default())
        .filter(|host| !host.is_empty())
        .map(|host| host.to_owned())
}

/// Reads `(vn1:ncpus=4:mem=8gb)+(a:ncpus=1+b:ncpus=1)`: a chunk in each pair of brackets.
fn parse_exec_vnode(text: &str) -> Vec<Chunk> {
    let chunks = text.split('(').skip(1).map(|chunk| chunk.split(')').next().unwrap_or_default());
    chunks
        .map(|chunk| {
            let mut sum = Chunk::default();
            for (name, value) in chunk.split(['+', ':']).filter_map(|part| part.split_once('=')) {
                let (total, value) = match name {
                    "ncpus" => (&mut sum.ncpus, value.parse().ok()),
                    "mem" => (&mut sum.mem, parse_pbs_size(value)),
                    _ => continue,
                };
                if let Some(value) = value {
                    *total = Some(total.unwrap_or(0).saturating_add(value));
                }
            }
            sum
        })
        .collect()
}

/// Reads a time as ctime(3) writes it, in UTC: `Tue Nov 24 06:48:39 2026`.
fn parse_ctime(text: &str) -> Option<SystemTime> {
    const MONTHS: [&str; 12] =
        ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    let [_, month, day, clock, year] = text.split_whitespace().collect::<Vec<_>>().try_into().ok()?;
    let month = MONTHS.iter().position(|name| *name == month)?;
    let [hour, minute, second] = clock.split(':').collect::<Vec<_>>().try_into().ok()?;
    let moment = jiff::civil::DateTime::new(
        year.parse().ok()?,
        i8::try_from(month + 1).ok()?,
        day.parse().ok()?,
        hour.parse().ok()?,
        minute.parse().ok()?,
        second.parse().ok()?,
        0,
    );
    let moment = moment.ok()?.to_zoned(jiff::tz::TimeZone::UTC).ok()?;
    Some(SystemTime::from(moment.timestamp()))
}

/// Whether the variables of a job are Torque's: PBS sets none of these. (Torque sets PBS_WALLTIME too, but so may a
/// wrapper in front of PBS, for hosts without qstat.)
pub(super) fn is_torque(env: &Environment) -> bool {
    ["PBS_NUM_PPN", "PBS_NP", "PBS_VNODENUM"].iter().any(|name| env.filled(name).is_some())
}

/// The walltime that Torque tells in the environment, counted from the pilot's first start, which is somewhat after the
/// job's: what there is when qstat does not answer.
pub(super) fn limit_from_environment(env: &Environment, first_start: SystemTime) -> Option<Answer> {
    let walltime = parse_pbs_time(env.filled("PBS_WALLTIME")?)?;
    let end = first_start.checked_add(walltime)?;
    let source = "PBS_WALLTIME, counted from the pilot's first start".to_owned();
    Some(Answer { limit: TimeLimit::Ends(end), source })
}

/// What the environment, the node file and qstat's answer, where there is one, say of the job; its time limit aside.
pub(super) fn describe(env: &Environment, hostname: &str, qstat: Option<&QstatJob>) -> Job {
    let id = env.filled("PBS_JOBID").map(|id| Fact::new(id.to_owned(), "PBS_JOBID"));
    let server = id.as_ref().and_then(|id| {
        let server = id.value.split('.').nth(1).filter(|server| !server.is_empty())?;
        Some(Fact::new(server.to_owned(), "PBS_JOBID"))
    });
    let node_file = env.filled("PBS_NODEFILE").and_then(|path| {
        let hosts = unique_lines(&read_bounded(Path::new(path))?);
        (!hosts.is_empty()).then(|| Fact::new(hosts, "PBS_NODEFILE"))
    });
    // Tasks of pbsdsh have no node file.
    let hosts = node_file.or_else(|| {
        let hosts = qstat?.hosts();
        (!hosts.is_empty()).then(|| Fact::new(hosts, "qstat exec_host"))
    });
    let rank: u32 = env.number("PBS_NODENUM").unwrap_or(0);
    let nodes = hosts.as_ref().and_then(|hosts| u32::try_from(hosts.value.len()).ok());
    let nodes = nodes.or_else(|| env.number("PBS_NUM_NODES")).unwrap_or(1).max(1);
    let grant = qstat.map(|job| job.grant(hostname, usize::try_from(rank).unwrap_or(0)));
    let variable = |name: &str| {
        let cpus = env.number::<usize>(name).filter(|cpus| *cpus > 0)?;
        Some(Fact::new(cpus, name))
    };
    let (cpus, memory) = grant.map_or((None, None), |grant| (grant.cpus, grant.memory));
    Job {
        gpus: None,
        id,
        array: env
            .filled("PBS_ARRAY_ID")
            .zip(env.filled("PBS_ARRAY_INDEX"))
            .map(|(array, index)| Fact::new(format!("{array} {index}"), "PBS_ARRAY_ID, PBS_ARRAY_INDEX")),
        restart_count: qstat.and_then(QstatJob::restart_count).unwrap_or(0),
        cluster: server.or_else(|| {
            let server = env.filled("PBS_SERVER")?.split('.').next()?;
            Some(Fact::new(server.to_owned(), "PBS_SERVER"))
        }),
        host: None,
        // One pilot a host: the host's number tells who asks first. PBS_TASKNUM would not, since with pbsdsh the
        // job's script is task 1 and no pilot. How many jobs an array has PBS does not tell.
        task: Task { rank, nodes, tasks: nodes, array: 1 },
        hosts,
        started: qstat.and_then(QstatJob::started).map(|started| Fact::new(started, "qstat stime")),
        // NCPUS is the first chunk's alone: less than the grant at worst.
        cpus: cpus.or_else(|| variable("PBS_NUM_PPN")).or_else(|| variable("NCPUS")),
        memory: memory.into_iter().collect(),
    }
}

fn unique_lines(text: &str) -> Vec<String> {
    let mut seen = BTreeSet::new();
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    lines.filter(|line| seen.insert(*line)).map(str::to_owned).collect()
}

#[cfg(test)]
#[path = "pbs_tests.rs"]
mod tests;
