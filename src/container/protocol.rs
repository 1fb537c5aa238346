//! What pilot, supervisor and third stage say to each other: one JSON text a line, on Unix sockets.

use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use super::cgroup::CgroupSpec;
use super::log::LogLimits;

/// Longest line that is taken. An argument list and an environment are at most 2 MiB (execve(2), ARG_MAX at the usual
/// stack limit), a little more in JSON.
pub(super) const LINE_BYTES: usize = 8 << 20;

/// One run of one container.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ContainerId {
    /// The pod's uid.
    pub pod_uid: String,
    /// The container's name.
    pub name: String,
    /// Which run: 0, then one more each restart.
    pub restart: u32,
}

impl ContainerId {
    /// The name of the run's state directory. Neither a uid nor a container's name holds a dot or a slash.
    #[must_use]
    pub fn directory_name(&self) -> String {
        format!("{}.{}.{}", self.pod_uid, self.name, self.restart)
    }

    /// Reads what [`ContainerId::directory_name`] made.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        let mut parts = name.split('.');
        let (pod_uid, container, restart) = (parts.next()?, parts.next()?, parts.next()?);
        let whole = parts.next().is_none() && !pod_uid.is_empty() && !container.is_empty();
        whole.then_some(())?;
        Some(Self { pod_uid: pod_uid.to_owned(), name: container.to_owned(), restart: restart.parse().ok()? })
    }
}

impl std::fmt::Display for ContainerId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}/{}", self.pod_uid, self.name, self.restart)
    }
}

/// Where a container's processes stand among sessions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Session {
    /// A session of their own.
    Own,
    /// The pilot's session, in a process group of their own: PBS tracks and kills a job by its sessions.
    Shared,
}

/// What a supervisor starts. It may hold secrets, so it travels on a socket alone.
#[derive(Clone, Serialize, Deserialize)]
pub struct ContainerSpec {
    /// Program and arguments.
    pub argv: Vec<String>,
    /// The whole environment.
    pub env: Vec<(String, String)>,
    /// Where the program starts.
    pub working_dir: PathBuf,
    /// Where `pgid` is written.
    pub container_dir: PathBuf,
    /// The log.
    pub log: PathBuf,
    /// How large it grows.
    pub log_limits: LogLimits,
    /// Where the processes stand among sessions.
    pub session: Session,
    /// The kernel's choice when memory runs out (proc(5)); raised only.
    pub oom_score_adj: Option<i32>,
    /// How many descriptors a process may have, where that is not what the pilot has (the soft RLIMIT_NOFILE).
    #[serde(default)]
    pub open_files: Option<u64>,
    /// What asks it to end, where that is not SIGTERM (signal(7)).
    #[serde(default)]
    pub stop_signal: Option<i32>,
    /// Whether no program of it may ever have more rights than it begins with (prctl(2), PR_SET_NO_NEW_PRIVS).
    #[serde(default)]
    pub no_new_privs: bool,
    /// The CPUs on which it runs; none: wherever the pilot may.
    #[serde(default)]
    pub cpus: Vec<usize>,
    /// A cgroup of its own, where there can be one.
    #[serde(default)]
    pub cgroup: Option<CgroupSpec>,
    /// How long the container goes on without a pilot.
    pub orphan_timeout: Duration,
    /// When it ends without a pilot at the latest.
    pub drain_at: Option<SystemTime>,
    /// Between SIGTERM and SIGKILL when it ends without a pilot.
    pub grace: Duration,
    /// Whether each line is told to the pilot besides being logged.
    pub forward_output: bool,
    /// What the program reads and writes.
    pub stdio: Stdio,
    /// What the container sees in namespaces of its own; none: it runs in the pilot's.
    #[serde(default)]
    pub view: Option<View>,
}

/// What a container in namespaces of its own sees besides the host's file system.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct View {
    /// What is mounted, outer places first.
    pub mounts: Vec<ViewMount>,
    /// Directories that appear empty.
    pub hidden: Vec<PathBuf>,
    /// Directories beneath hidden ones that appear all the same, where they are there.
    pub shown: Vec<PathBuf>,
    /// Where the file `termination-log` of the container's directory appears.
    pub termination_log: Option<PathBuf>,
    /// The numbers that this process's user and group have in it, where they are not their own.
    #[serde(default)]
    pub ids: Option<(u32, u32)>,
    /// What the kernel calls the host there (uname(2)); none: as outside.
    #[serde(default)]
    pub hostname: Option<String>,
    /// Files that are written at each start.
    #[serde(default)]
    pub files: Vec<ViewFile>,
    /// The name of a directory, wherever it is: only beneath it may what the container calls its own be written for it. It could
    /// put a link to another pod's files in the log's place.
    #[serde(default)]
    pub owner: Option<String>,
}

/// A file that is written for a container, in its directory, and appears over one of the host's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ViewFile {
    /// Its name in the container's directory.
    pub name: String,
    /// Where it appears; absolute.
    pub target: PathBuf,
    /// What it begins with.
    pub head: String,
    /// Whether what the host has at that place follows.
    pub host: bool,
    /// What it ends with.
    pub tail: String,
}

/// One mount of a [`View`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ViewMount {
    /// A directory or a file of the host; absolute.
    pub source: PathBuf,
    /// Where it appears; absolute.
    pub target: PathBuf,
    /// Whether nothing can be written there.
    pub read_only: bool,
    /// Whether the source is named as it really is, so that no link may be on the way to it: one that is has been put there
    /// since it was looked at.
    #[serde(default)]
    pub real: bool,
}

/// What a program's standard input is, and whether all three are a terminal.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Stdio {
    /// Standard input is /dev/null; the outputs are pipes.
    #[default]
    Null,
    /// Standard input is a pipe.
    Input {
        /// Whether it ends with the first client that ends it (`stdinOnce`).
        once: bool,
    },
    /// All three are one terminal.
    Terminal {
        /// Whether anybody may type there (`stdin`).
        input: bool,
        /// Whether it ends with the first client that ends it (`stdinOnce`).
        once: bool,
    },
}

impl std::fmt::Debug for ContainerSpec {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Arguments and environment may be secret.
        f.debug_struct("ContainerSpec").field("container_dir", &self.container_dir).finish_non_exhaustive()
    }
}

/// How a container ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct End {
    /// The first process' own exit code; 128+n when signal n ended it.
    pub exit_code: i32,
    /// The signal that ended it.
    pub signal: Option<i32>,
    /// When its program began.
    pub started_at: SystemTime,
    /// When its first process ended.
    pub finished_at: SystemTime,
    /// Lines of output that could not be written.
    pub log_lines_lost: u64,
    /// Why not.
    pub log_error: Option<String>,
    /// Processes in uninterruptible sleep, which no signal ends.
    pub survivors: Vec<String>,
    /// Whether the kernel has killed any of its processes because its cgroup was full.
    #[serde(default)]
    pub oom_killed: bool,
}

/// Why a container's program never began.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum StartError {
    /// There is no such program, or not where it was looked for.
    #[error("{program}: not found; is it installed on this host and in PATH?")]
    NotFound {
        /// The program.
        program: String,
    },
    /// It is there, and what would run it is not.
    #[error("{program}: {problem}")]
    Interpreter {
        /// The program.
        program: String,
        /// What is not there, and the way out.
        problem: String,
    },
    /// It may not be run.
    #[error("{program}: {problem}; is it executable, and not on a file system mounted noexec?")]
    NotExecutable {
        /// The program.
        program: String,
        /// The kernel's words.
        problem: String,
    },
    /// The kernel does not know its format.
    #[error(
        "{program}: not a program of this machine; a script's first line names its interpreter, such as #!/bin/bash, or give command: [\"bash\"]"
    )]
    Format {
        /// The program.
        program: String,
    },
    /// The working directory cannot be entered.
    #[error("working directory {path}: {problem}")]
    WorkingDirectory {
        /// The directory.
        path: String,
        /// The kernel's words.
        problem: String,
    },
    /// Something else was refused.
    #[error("{what}: {problem}")]
    Other {
        /// What was done.
        what: String,
        /// The kernel's words.
        problem: String,
    },
}

impl StartError {
    /// The exit code that shells give: 127 for what is not there, 126 for what cannot be run, 128 otherwise.
    #[must_use]
    pub fn exit_code(&self) -> i32 {
        match self {
            Self::NotFound { .. } | Self::Interpreter { .. } => 127,
            Self::NotExecutable { .. } | Self::Format { .. } => 126,
            Self::WorkingDirectory { .. } | Self::Other { .. } => 128,
        }
    }
}

/// What a supervisor tells.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Event {
    /// The program runs.
    Started {
        /// Its process.
        pid: i32,
        /// When.
        at: SystemTime,
    },
    /// The program never began.
    StartFailed(StartError),
    /// A line of output.
    Output {
        /// Whether it came on standard error.
        stderr: bool,
        /// The line without its end.
        line: String,
    },
    /// A program that was run in the container besides has ended; 128+n when signal n ended it.
    ExecEnded {
        /// Which one.
        id: u64,
        /// Its exit code.
        exit_code: i32,
    },
    /// A program that was to run in the container besides never began.
    ExecFailed {
        /// Which one.
        id: u64,
        /// Why.
        error: StartError,
    },
    /// The container is over and nothing of it is left.
    Ended(End),
    /// The supervisor itself is gone. Never sent; what the pilot makes of a closed socket.
    Lost {
        /// What is known of it.
        message: String,
    },
}

/// What a supervisor is told.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) enum Order {
    /// Start this.
    Start(Box<ContainerSpec>),
    /// SIGTERM now, SIGKILL after this long.
    Terminate(Duration),
    /// SIGKILL now, with no SIGTERM before it.
    Kill,
    /// The drain time has moved.
    Drain(SystemTime),
    /// Run on these CPUs from now on, all that there is of it.
    Cpus(Vec<usize>),
    /// The end is recorded: go.
    Acknowledge,
    /// Run another program in the container's surroundings. Its standard input, output and error come along as
    /// descriptors, or one terminal.
    Exec(ExecSpec),
    /// A signal to the process group of such a program.
    Signal { id: u64, signal: i32 },
    /// Somebody listens to the container's output from now on, and may give it input. Descriptors come along: where input
    /// comes from, where standard output goes, where standard error goes.
    Attach { input: bool },
    /// The container's own terminal has another size.
    Resize { columns: u16, rows: u16 },
}

impl Order {
    /// Whether descriptors come along.
    pub(super) fn takes_descriptors(&self) -> bool {
        matches!(self, Self::Exec(_) | Self::Attach { .. })
    }
}

/// A program that is run in a container besides its own.
#[derive(Clone, Serialize, Deserialize)]
pub(super) struct ExecSpec {
    /// Names it in what is told of it.
    pub id: u64,
    /// Program and arguments.
    pub argv: Vec<String>,
    /// Whether one terminal comes along, instead of three descriptors.
    pub terminal: bool,
}

impl std::fmt::Debug for ExecSpec {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Arguments may be secret.
        f.debug_struct("ExecSpec").field("id", &self.id).finish_non_exhaustive()
    }
}

/// What the third stage is told.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Launch {
    pub argv: Vec<String>,
    pub env: Vec<(String, String)>,
    pub working_dir: PathBuf,
    /// Where `pgid` is written; nowhere for a program that runs besides the container's own.
    pub container_dir: Option<PathBuf>,
    /// The log, which is there from the start.
    pub log: Option<PathBuf>,
    pub session: Session,
    pub oom_score_adj: Option<i32>,
    pub open_files: Option<u64>,
    pub no_new_privs: bool,
    #[serde(default)]
    pub cpus: Vec<usize>,
    /// Files into which it writes itself, to be in the container's cgroup.
    #[serde(default)]
    pub doors: Vec<PathBuf>,
    /// What the descriptor that comes along is for.
    pub stdin: Stdin,
    /// Whether in namespaces, and which. The pipe for [`super::isolation::Word`]s comes along then, last.
    #[serde(default)]
    pub place: Namespaces,
    /// Whether it is in namespaces already; the stage before has taken `place` then.
    #[serde(default)]
    pub in_namespaces: bool,
}

/// In which namespaces the third stage's program runs.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) enum Namespaces {
    /// The supervisor's.
    #[default]
    Outer,
    /// New ones, with this view.
    New(View),
    /// Those of this process, the first one of a container.
    Of(i32),
}

/// What the third stage makes its standard input of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Stdin {
    /// /dev/null.
    Null,
    /// The descriptor that comes along.
    Given,
    /// The terminal that comes along, which becomes its outputs too, and that of a new session.
    Terminal,
}

/// One JSON text and a line end. JSON holds no raw line ends.
pub(super) fn line<T: Serialize>(message: &T) -> Vec<u8> {
    let mut line = serde_json::to_vec(message).unwrap_or_default();
    line.push(b'\n');
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directorys_name_tells_the_run() {
        let id = ContainerId { pod_uid: "a-b".to_owned(), name: "c1".to_owned(), restart: 12 };
        assert_eq!(id.directory_name(), "a-b.c1.12");
        assert_eq!(ContainerId::parse("a-b.c1.12"), Some(id));
        for bad in ["", "a.b", "a.b.c", "a.b.1.2", ".b.1", "a..1"] {
            assert_eq!(ContainerId::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_spec_shows_no_secret() {
        let spec = ContainerSpec {
            argv: vec!["hush".to_owned()],
            env: vec![("KEY".to_owned(), "hush".to_owned())],
            working_dir: PathBuf::new(),
            container_dir: PathBuf::new(),
            log: PathBuf::new(),
            log_limits: LogLimits::default(),
            session: Session::Own,
            oom_score_adj: None,
            open_files: None,
            stop_signal: None,
            no_new_privs: false,
            cpus: Vec::new(),
            cgroup: None,
            orphan_timeout: Duration::ZERO,
            drain_at: None,
            grace: Duration::ZERO,
            forward_output: false,
            stdio: Stdio::Null,
            view: None,
        };
        assert!(!format!("{spec:?}").contains("hush"));
    }
}
