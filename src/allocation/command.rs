//! Runs a batch system's program: with a time limit, a bounded answer, and an error that says what happened.
//!
//! The pilot is a child subreaper and reaps whatever ends below it. Children started here are waited for here:
//! the reaper asks [`is_ours`] and leaves them alone. What runs for as long as the pilot is started by [`keep`].
//!
//! Looking a program up and starting it can hang for as long as the file system that it is on. Both happen on a thread
//! of the runtime's blocking pool, so that the time limit holds then too and the pilot goes on. A runtime with such a
//! thread does not end by being dropped: it must be shut down in the background, or the process must exit.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::process::Child;
use tokio::sync::Semaphore;
use tokio::time::{Instant, timeout, timeout_at};

use super::environment::Environment;

/// How long squeue, scontrol or qstat may take: they answer in some 10 ms, and a hung server blocks them for as
/// long as it hangs.
pub const LIMIT: Duration = Duration::from_secs(10);

/// How much of a program's output is kept. A job's full description is some 10 KiB; a job with a large
/// environment (`qsub -V`) stays well below.
const MAX_OUTPUT: u64 = 1 << 20;

/// How long a killed program is waited for: one in uninterruptible sleep is left to the runtime's orphan queue.
const KILLED_WAIT: Duration = Duration::from_secs(1);

/// How much of a program's error output goes into a message.
const MAX_REASON: usize = 300;

/// How many programs may be on their way into being at a time, each with a thread: one that a hung file system holds
/// must not become one more every few minutes.
static STARTS: Semaphore = Semaphore::const_new(4);

static OURS: Mutex<BTreeSet<i32>> = Mutex::new(BTreeSet::new());

/// How many children are being started whose number is not known yet.
static UNNAMED: AtomicUsize = AtomicUsize::new(0);

/// Whether this process is, or may be, a child of ours that [`Program::run`] waits for: whoever else reaps must leave it
/// alone. While one is being started (some 1 ms; longer when a file system hangs) it may be any, so a stray that was
/// left alone for that must be looked at again later.
#[must_use]
pub fn is_ours(pid: i32) -> bool {
    // In this order: a child is registered before it is no longer unnamed.
    UNNAMED.load(Ordering::SeqCst) > 0 || OURS.lock().unwrap_or_else(PoisonError::into_inner).contains(&pid)
}

/// A child that is being started.
struct Unnamed;

impl Unnamed {
    fn new() -> Self {
        UNNAMED.fetch_add(1, Ordering::SeqCst);
        Self
    }
}

impl Drop for Unnamed {
    fn drop(&mut self) {
        UNNAMED.fetch_sub(1, Ordering::SeqCst);
    }
}

/// An entry of the registry behind [`is_ours`], which goes when the child is no longer waited for.
#[derive(Debug)]
struct Registered(i32);

impl Registered {
    fn new(pid: i32) -> Self {
        OURS.lock().unwrap_or_else(PoisonError::into_inner).insert(pid);
        Self(pid)
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        OURS.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.0);
    }
}

/// A child that goes on until somebody ends it. Until this is dropped, [`is_ours`] knows it.
#[derive(Debug)]
pub struct Kept {
    /// The child.
    pub child: Child,
    _registered: Option<Registered>,
}

/// Starts a child that goes on. Blocks for as long as the file system of its program hangs.
///
/// # Errors
/// When it cannot be started.
pub fn keep(command: &mut tokio::process::Command) -> std::io::Result<Kept> {
    let unnamed = Unnamed::new();
    let child = command.spawn()?;
    let registered = child.id().and_then(|id| i32::try_from(id).ok()).map(Registered::new);
    drop(unnamed);
    Ok(Kept { child, _registered: registered })
}

/// Why a program gave no answer.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// No such program in PATH.
    #[error("no program `{program}` in PATH ({path}): add the batch system's commands to the job's PATH")]
    NotFound {
        /// Its name.
        program: String,
        /// Where it was looked for.
        path: String,
    },
    /// It could not be started.
    #[error("cannot start {}: {source}", program.display())]
    Start {
        /// Its path.
        program: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Its output could not be read.
    #[error("cannot read the answer of {}: {source}", program.display())]
    Read {
        /// Its path.
        program: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// It gave no answer in time and was killed.
    #[error("{} gave no answer in {} s and was killed: is the batch system's server down?",
        program.display(), limit.as_secs_f64())]
    TimedOut {
        /// Its path.
        program: PathBuf,
        /// How long it was waited for.
        limit: Duration,
    },
    /// It ended with something other than 0.
    #[error("{} failed ({status}): {reason}", program.display())]
    Failed {
        /// Its path.
        program: PathBuf,
        /// How it ended.
        status: ExitStatus,
        /// The first line that it wrote to standard error.
        reason: String,
    },
}

/// What a program answered, whatever its exit code.
#[derive(Debug)]
pub struct Output {
    /// Its path.
    pub program: PathBuf,
    /// How it ended.
    pub status: ExitStatus,
    /// Its standard output, at most 1 MiB of it, as UTF-8.
    pub stdout: String,
    /// Its standard error, in the same way.
    pub stderr: String,
}

impl Output {
    /// The first line of its standard error that is not empty, cut to a length that fits a message.
    #[must_use]
    pub fn reason(&self) -> String {
        let line = self.stderr.lines().map(str::trim).find(|line| !line.is_empty());
        line.unwrap_or("it said nothing on standard error").chars().take(MAX_REASON).collect()
    }

    /// This output, if the program ended with 0.
    ///
    /// # Errors
    /// [`CommandError::Failed`] with the first line of its standard error.
    pub fn success(self) -> Result<Self, CommandError> {
        if self.status.success() {
            return Ok(self);
        }
        let reason = self.reason();
        Err(CommandError::Failed { program: self.program, status: self.status, reason })
    }
}

type Locate = Box<dyn FnOnce() -> Result<PathBuf, CommandError> + Send>;

/// A program that is about to be run.
pub struct Program {
    name: PathBuf,
    locate: Locate,
    args: Vec<String>,
    env: BTreeMap<String, String>,
    directory: Option<PathBuf>,
}

/// A program that runs.
struct Started {
    path: PathBuf,
    child: Child,
    pid: Option<i32>,
    _registered: Option<Registered>,
}

impl Program {
    /// The program of this name in the environment's PATH, with that environment.
    #[must_use]
    pub fn find(name: &str, env: &Environment) -> Self {
        let (wanted, searched) = (name.to_owned(), env.clone());
        Self::located(name, env, move || {
            searched.find_program(&wanted).ok_or_else(|| CommandError::NotFound {
                path: searched.get("PATH").unwrap_or("not set").to_owned(),
                program: wanted,
            })
        })
    }

    /// The program at this path, with that environment.
    #[must_use]
    pub fn at(path: &Path, env: &Environment) -> Self {
        let found = path.to_owned();
        Self::located(&path.to_string_lossy(), env, move || Ok(found))
    }

    /// The program that `locate` finds, which may take its time, with that environment.
    pub fn located(
        name: &str,
        env: &Environment,
        locate: impl FnOnce() -> Result<PathBuf, CommandError> + Send + 'static,
    ) -> Self {
        let env = env.iter().map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
        Self { name: PathBuf::from(name), locate: Box::new(locate), args: Vec::new(), env, directory: None }
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<'a>(mut self, args: impl IntoIterator<Item = &'a str>) -> Self {
        self.args.extend(args.into_iter().map(str::to_owned));
        self
    }

    /// Starts it in this directory.
    #[must_use]
    pub fn directory(mut self, path: &Path) -> Self {
        self.directory = Some(path.to_owned());
        self
    }

    /// Sets a variable of its environment.
    #[must_use]
    pub fn set(mut self, name: &str, value: &str) -> Self {
        self.env.insert(name.to_owned(), value.to_owned());
        self
    }

    /// Takes those variables out of its environment for whose names `unwanted` holds.
    #[must_use]
    pub fn without(mut self, unwanted: impl Fn(&str) -> bool) -> Self {
        self.env.retain(|name, _| !unwanted(name));
        self
    }

    /// Finds and starts it, in a process group of its own. Blocks.
    fn start(self) -> Result<Started, CommandError> {
        let path = (self.locate)()?;
        let mut command = tokio::process::Command::new(&path);
        command
            .args(&self.args)
            .env_clear()
            .envs(&self.env)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .kill_on_drop(true);
        if let Some(directory) = &self.directory {
            command.current_dir(directory);
        }
        let unnamed = Unnamed::new();
        match command.spawn() {
            Ok(child) => {
                let pid = child.id().and_then(|id| i32::try_from(id).ok());
                let registered = pid.map(Registered::new);
                drop(unnamed);
                Ok(Started { path, child, pid, _registered: registered })
            }
            Err(source) => Err(CommandError::Start { program: path, source }),
        }
    }

    /// Runs it and reads what it says. When the limit is over its whole process group is killed.
    ///
    /// # Errors
    /// Any but [`CommandError::Failed`]: that it ended with something other than 0 is no error here, see
    /// [`Output::success`].
    pub async fn run(self, limit: Duration) -> Result<Output, CommandError> {
        let until = Instant::now() + limit;
        let name = self.name.clone();
        let start = async {
            // Never closed; if it were, the limit of starts would be gone and nothing else.
            let permit = STARTS.acquire().await;
            tokio::task::spawn_blocking(move || {
                let started = self.start();
                drop(permit);
                started
            })
            .await
        };
        let mut started = match timeout_at(until, start).await {
            Ok(Ok(started)) => started?,
            Ok(Err(join)) => {
                return Err(CommandError::Start { program: name, source: std::io::Error::other(join) });
            }
            // Should it come into being after all, it is killed as it is dropped.
            Err(_) => return Err(CommandError::TimedOut { program: name, limit }),
        };
        let (stdout, stderr) = (started.child.stdout.take(), started.child.stderr.take());
        let answer = async {
            let (stdout, stderr) = tokio::try_join!(read(stdout), read(stderr))?;
            Ok::<_, std::io::Error>((started.child.wait().await?, stdout, stderr))
        };
        match timeout_at(until, answer).await {
            Ok(Ok((status, stdout, stderr))) => Ok(Output { program: started.path, status, stdout, stderr }),
            Ok(Err(source)) => Err(CommandError::Read { program: started.path, source }),
            Err(_) => {
                if let Some(pid) = started.pid {
                    // Gone already, or not ours any more: then there is nothing to kill.
                    let _ = killpg(Pid::from_raw(pid), Signal::SIGKILL);
                }
                let _ = timeout(KILLED_WAIT, started.child.wait()).await;
                Err(CommandError::TimedOut { program: started.path, limit })
            }
        }
    }
}

/// Reads all, keeps the first [`MAX_OUTPUT`] bytes, so that a talkative program does not block on a full pipe.
async fn read(pipe: Option<impl AsyncRead + Unpin>) -> std::io::Result<String> {
    let Some(mut pipe) = pipe else { return Ok(String::new()) };
    let mut kept = Vec::new();
    (&mut pipe).take(MAX_OUTPUT).read_to_end(&mut kept).await?;
    tokio::io::copy(&mut pipe, &mut tokio::io::sink()).await?;
    Ok(String::from_utf8_lossy(&kept).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::allocation::stand_in::StandIn;

    #[tokio::test]
    async fn a_program_gets_this_environment_and_no_other() {
        let stand_in = StandIn::new().script("squeue", r#"echo "$A|$B|$HOME|$C""#);
        let env = stand_in.environment([("A", "1"), ("B", "2")]);
        let program = Program::find("squeue", &env).set("C", "3").without(|name| name == "B");
        let output = program.run(LIMIT).await.unwrap().success().unwrap();
        assert_eq!(output.stdout, "1|||3\n");
    }

    #[tokio::test]
    async fn a_failure_tells_the_first_line_of_standard_error() {
        let stand_in = StandIn::new().script("squeue", "echo; echo 'slurm_load_jobs error: no' >&2; exit 3");
        let output = Program::find("squeue", &stand_in.environment([])).run(LIMIT).await.unwrap();
        assert_eq!(output.status.code(), Some(3));
        let message = output.success().unwrap_err().to_string();
        assert!(message.contains("slurm_load_jobs error: no"), "{message}");
        assert!(message.contains("exit status: 3"), "{message}");
    }

    #[tokio::test]
    async fn an_absent_program_is_named() {
        let stand_in = StandIn::new();
        let error = Program::find("no-such-squeue", &stand_in.environment([])).run(LIMIT).await.unwrap_err();
        assert!(error.to_string().contains("no-such-squeue"), "{error}");
    }

    #[tokio::test]
    async fn a_program_that_hangs_is_killed_with_its_children() {
        let stand_in = StandIn::new().script("squeue", "sleep 300 & echo $! >\"$OUT\"; wait");
        let out = stand_in.path().join("pid");
        let env = stand_in.environment([("OUT", out.to_str().unwrap())]);
        let began = Instant::now();
        let error = Program::find("squeue", &env).run(Duration::from_millis(500)).await.unwrap_err();
        assert!(matches!(error, CommandError::TimedOut { .. }), "{error}");
        assert!(began.elapsed() < Duration::from_secs(5));
        let child: i32 = std::fs::read_to_string(out).unwrap().trim().parse().unwrap();
        let gone = || match std::fs::read_to_string(format!("/proc/{child}/stat")) {
            Ok(stat) => stat.contains(") Z "), // killed; whoever adopted it has not reaped it yet
            Err(_) => true,
        };
        for _ in 0..100 {
            if gone() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        assert!(gone(), "the grandchild {child} lives on");
    }

    #[tokio::test]
    async fn a_child_is_registered_while_it_runs_and_not_afterwards() {
        let stand_in =
            StandIn::new().script("squeue", "echo $$ >\"$OUT.new\"; mv \"$OUT.new\" \"$OUT\"; sleep 1");
        let out = stand_in.path().join("pid");
        let env = stand_in.environment([("OUT", out.to_str().unwrap())]);
        let run = tokio::spawn(Program::find("squeue", &env).run(LIMIT));
        let pid: i32 = loop {
            if let Ok(text) = std::fs::read_to_string(&out) {
                break text.trim().parse().unwrap();
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        };
        assert!(is_ours(pid));
        run.await.unwrap().unwrap();
        // Tests beside this one start programs too.
        while UNNAMED.load(Ordering::SeqCst) > 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        assert!(!OURS.lock().unwrap().contains(&pid));
    }

    #[tokio::test]
    async fn a_file_system_that_hangs_costs_the_time_limit_and_no_more() {
        let env = StandIn::new().environment([]);
        let (release, held) = std::sync::mpsc::channel::<()>();
        let program = Program::located("squeue", &env, move || {
            let _ = held.recv();
            Ok(PathBuf::from("/nonexistent"))
        });
        let began = Instant::now();
        let error = program.run(Duration::from_millis(200)).await.unwrap_err();
        assert!(matches!(error, CommandError::TimedOut { .. }), "{error}");
        assert!(began.elapsed() < Duration::from_secs(2));
        drop(release);
    }

    #[tokio::test]
    async fn endless_output_is_cut() {
        let stand_in = StandIn::new().script("squeue", "head -c 3000000 /dev/zero");
        let output = Program::find("squeue", &stand_in.environment([])).run(LIMIT).await.unwrap();
        assert_eq!(output.stdout.len() as u64, MAX_OUTPUT);
    }
}
