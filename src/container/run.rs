//! One run of a container, from the third stage to the death of its last process.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant, SystemTime};

use nix::sys::signal::{Signal, kill, killpg};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use super::cgroup::Cgroup;
use super::isolation::Words;
use super::log::{Log, Output};
use super::output::{Outputs, Sink};
use super::peer::set_nonblocking;
use super::protocol::{
    ContainerSpec, End, Event, Launch, Namespaces, Session, StartError, Stdin, Stdio, line,
};
use super::sessions::name_terminal;
use super::{affinity, descriptors, process, terminal};

/// What got SIGKILL and is there after this long sleeps in the kernel (state D) or is not ours to kill (setuid).
const SURVIVORS_LIMIT: Duration = Duration::from_secs(2);

/// However often new processes are found (a program that forks faster than it is killed), the end is told after this.
const KILL_LIMIT: Duration = Duration::from_secs(10);

/// While something is being killed, /proc is looked at again this often.
const KILL_INTERVAL: Duration = Duration::from_micros(300);

/// How long the log's writer is waited for at the end.
const LOG_LIMIT: Duration = Duration::from_secs(2);

/// How long the third stage, which only reads, may take to take its settings.
const LAUNCH_LIMIT: Duration = Duration::from_secs(5);

/// What the third stage says is one short line.
const ANSWER_BYTES: usize = 64 * 1024;

/// The third stage, waiting for what to start: that takes the start of its process off the way of a pod.
pub(super) struct Launcher {
    pub(super) pid: i32,
    socket: UnixStream,
    outputs: Outputs,
}

impl Launcher {
    pub(super) fn spawn() -> io::Result<Self> {
        Self::spawn_with(std::process::Stdio::piped(), std::process::Stdio::piped())
    }

    /// With outputs that somebody else reads.
    pub(super) fn spawn_with(stdout: std::process::Stdio, stderr: std::process::Stdio) -> io::Result<Self> {
        let (socket, theirs) = UnixStream::pair()?;
        let mut child = Command::new("/proc/self/exe")
            .arg0("jiriaf-pilot")
            .arg("launch")
            // The container's comes down the socket: so no LD_ variable of its touches our own program.
            .env_clear()
            .stdin(std::process::Stdio::from(OwnedFd::from(theirs)))
            .stdout(stdout)
            .stderr(stderr)
            .spawn()?;
        let outputs = Outputs::new(&mut child)?;
        Ok(Self { pid: i32::try_from(child.id()).unwrap_or(i32::MAX), socket, outputs })
    }

    /// Tells the third stage what it is to become, with the descriptor that its standard input is made of, and for
    /// namespaces the pipe for words. Returns the socket on which it may still complain.
    pub(super) fn launch(
        mut self,
        launch: &Launch,
        stdin: Option<&OwnedFd>,
        words: Option<&OwnedFd>,
    ) -> io::Result<(UnixStream, Outputs)> {
        self.socket.set_write_timeout(Some(LAUNCH_LIMIT))?;
        let text = line(launch);
        let beside: Vec<_> = stdin.into_iter().chain(words).map(|fd| fd.as_fd()).collect();
        let sent = descriptors::send(self.socket.as_fd(), &text, &beside)?;
        self.socket.write_all(&text[sent..])?;
        self.socket.set_nonblocking(true)?;
        Ok((self.socket, self.outputs))
    }
}

/// What a program that is run in a container besides its own shares with it.
#[derive(Clone)]
pub(super) struct Surroundings {
    pub(super) env: Vec<(String, String)>,
    pub(super) working_dir: PathBuf,
    pub(super) session: Session,
    pub(super) oom_score_adj: Option<i32>,
    pub(super) open_files: Option<u64>,
    pub(super) no_new_privs: bool,
    pub(super) cpus: Vec<usize>,
    pub(super) doors: Vec<PathBuf>,
    /// Whether the container is in namespaces of its own; their first process once it is known.
    pub(super) isolated: bool,
    pub(super) init: Option<i32>,
}

/// A container that was started.
pub(super) struct Running {
    /// The third stage, which becomes the program; in namespaces it only starts them.
    pid: i32,
    /// What comes from a container in namespaces.
    words: Option<Words>,
    /// Open until the third stage's exec.
    pub(super) launch: Option<UnixStream>,
    answer: Vec<u8>,
    pub(super) outputs: Outputs,
    pub(super) log: Log,
    started_at: Option<SystemTime>,
    /// How the first process ended, and when.
    pub(super) first: Option<(WaitStatus, SystemTime)>,
    /// When it is killed.
    pub(super) kill_at: Option<Instant>,
    /// Whether its end was asked for.
    pub(super) terminated: bool,
    pub(super) forward: bool,
    pub(super) orphan_timeout: Duration,
    pub(super) grace: Duration,
    stop_signal: Signal,
    /// Our end of the program's standard input, where it has one.
    pub(super) stdin: Option<File>,
    /// Whether that ends with the first client that ends it.
    pub(super) stdin_once: bool,
    /// Our end of the program's terminal, where it has one.
    pub(super) terminal: Option<File>,
    pub(super) surroundings: Surroundings,
    /// Whether it was given other CPUs while it was being started.
    moved: bool,
    cgroup: Cgroup,
}

impl Running {
    /// Gives the third stage what it is to become.
    pub(super) fn start(launcher: Launcher, spec: ContainerSpec) -> io::Result<Self> {
        let pid = launcher.pid;
        let owner = spec.view.as_ref().and_then(|view| view.owner.clone());
        let log = Log::new(spec.log.clone(), spec.log_limits).owned_by(owner);
        let cgroup = spec.cgroup.map(Cgroup::make).unwrap_or_default();
        let surroundings = Surroundings {
            env: spec.env.clone(),
            working_dir: spec.working_dir.clone(),
            session: spec.session,
            oom_score_adj: spec.oom_score_adj,
            open_files: spec.open_files,
            no_new_privs: spec.no_new_privs,
            cpus: spec.cpus.clone(),
            doors: cgroup.doors(),
            isolated: spec.view.is_some(),
            init: None,
        };
        let (words, their_words) = match &spec.view {
            Some(_) => Words::new().map(|(ours, theirs)| (Some(ours), Some(theirs)))?,
            None => (None, None),
        };
        let ends = Ends::make(spec.stdio)?;
        let mut env = spec.env;
        if ends.terminal.is_some() {
            name_terminal(&mut env);
        }
        let launch = Launch {
            argv: spec.argv,
            env,
            working_dir: spec.working_dir,
            container_dir: Some(spec.container_dir),
            log: Some(spec.log),
            session: spec.session,
            oom_score_adj: spec.oom_score_adj,
            open_files: spec.open_files,
            no_new_privs: spec.no_new_privs,
            cpus: spec.cpus,
            doors: cgroup.doors(),
            stdin: ends.kind,
            place: spec.view.map_or(Namespaces::Outer, Namespaces::New),
            in_namespaces: false,
        };
        let (socket, outputs) = launcher.launch(&launch, ends.theirs.as_ref(), their_words.as_ref())?;
        Ok(Self {
            pid,
            words,
            launch: Some(socket),
            answer: Vec::new(),
            outputs: ends.outputs.unwrap_or(outputs),
            log,
            started_at: None,
            first: None,
            kill_at: None,
            terminated: false,
            forward: spec.forward_output,
            orphan_timeout: spec.orphan_timeout,
            grace: spec.grace,
            stop_signal: spec.stop_signal.and_then(|n| Signal::try_from(n).ok()).unwrap_or(Signal::SIGTERM),
            stdin: ends.input,
            terminal: ends.terminal,
            stdin_once: ends.once,
            surroundings,
            moved: false,
            cgroup,
        })
    }

    /// The third stage has something to say, or has become the program: its end of the socket is closed by exec.
    pub(super) fn hear_launch(&mut self) -> Option<Event> {
        let mut bytes = [0; 1024];
        loop {
            match self.launch.as_mut()?.read(&mut bytes) {
                Ok(0) => break,
                Ok(n) if self.answer.len() < ANSWER_BYTES => self.answer.extend_from_slice(&bytes[..n]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return None,
                Ok(_) | Err(_) => break,
            }
        }
        self.launch = None;
        if !self.answer.is_empty() {
            return None;
        }
        self.hear_words();
        if self.moved {
            // The third stage went by what it had been told before.
            self.set_cpus(self.surroundings.cpus.clone());
        }
        let at = SystemTime::now();
        self.started_at = Some(at);
        if self.terminated && self.first.is_none() {
            self.send_term();
        }
        Some(Event::Started { pid: self.program(), at })
    }

    /// The program's process, and its process group.
    fn program(&self) -> i32 {
        self.words.as_ref().and_then(|words| words.program).unwrap_or(self.pid)
    }

    /// Where a container in namespaces says how its program ended.
    pub(super) fn words(&self) -> Option<&Words> {
        self.words.as_ref().filter(|words| words.open)
    }

    /// A container in namespaces has said something.
    pub(super) fn hear_words(&mut self) {
        let Some(words) = &mut self.words else { return };
        words.hear();
        self.surroundings.init = words.init;
        if let Some(end) = words.end {
            self.first.get_or_insert((end, SystemTime::now()));
        }
    }

    /// SIGTERM once, and SIGKILL after `grace`; a later call may only shorten it.
    pub(super) fn terminate(&mut self, grace: Duration) {
        // A grace of centuries is one without end.
        let kill_at = Instant::now().checked_add(grace);
        self.kill_at = self.kill_at.into_iter().chain(kill_at).min();
        if !self.terminated {
            self.terminated = true;
            // Before its exec it would die by it without a word of the program's own.
            if self.started_at.is_some() {
                self.send_term();
            }
        }
    }

    /// SIGKILL as soon as the caller looks at the clock, with no SIGTERM before it.
    pub(super) fn kill(&mut self) {
        self.terminated = true;
        self.kill_at = Some(Instant::now());
    }

    /// All of the container runs on these CPUs from now on.
    pub(super) fn set_cpus(&mut self, cpus: Vec<usize>) {
        self.moved = self.started_at.is_none();
        self.cgroup.set_cpus(&cpus);
        affinity::set_all(|| process::descendants(nix::unistd::getpid().as_raw()), &cpus);
        self.surroundings.cpus = cpus;
    }

    fn send_term(&self) {
        let group = Pid::from_raw(self.program());
        let _ = killpg(group, self.stop_signal);
        // What is stopped (by reading a terminal, or by job control) acts on its SIGTERM when it goes on.
        let all = process::descendants(nix::unistd::getpid().as_raw());
        if all.iter().any(|pid| process::stat(*pid).is_some_and(|stat| stat.state == 'T')) {
            let _ = killpg(group, Signal::SIGCONT);
        }
    }

    /// Kills what is left of the container and tells how it ended. `sink` gets the rest of its output, `told` what is
    /// still to be told before.
    pub(super) fn end(mut self, sink: &mut dyn Sink, told: &mut dyn FnMut(Event)) -> Event {
        let survivors = end_tree(|pid, status| self.note(pid, status));
        // The tree is dead, so the socket has its end.
        if let Some(event) = self.hear_launch() {
            told(event);
        }
        self.outputs.read_rest(&mut self.log, sink);
        let log = self.log.finish(LOG_LIMIT);
        if let Some(error) = self.start_error() {
            return Event::StartFailed(error);
        }
        // A first process that no signal ends counts as killed.
        let (exit_code, signal, finished_at) = match self.first {
            Some((WaitStatus::Exited(_, code), at)) => (code, None, at),
            Some((WaitStatus::Signaled(_, signal, _), at)) => (128 + signal as i32, Some(signal as i32), at),
            _ => (137, Some(Signal::SIGKILL as i32), SystemTime::now()),
        };
        Event::Ended(End {
            exit_code,
            signal,
            started_at: self.started_at.unwrap_or(finished_at),
            finished_at,
            log_lines_lost: log.lost,
            log_error: log.error,
            survivors,
            oom_killed: self.cgroup.has_oom_kill(),
        })
    }

    /// Takes note of a child's end.
    pub(super) fn note(&mut self, pid: i32, status: WaitStatus) {
        self.hear_words();
        // The end of init without a word of the program's is that of the container.
        let first = self.words.as_ref().and_then(|words| words.init).unwrap_or(self.pid);
        if pid == first {
            self.first.get_or_insert((status, SystemTime::now()));
        }
    }

    /// Why the program never began, where the third stage said so.
    fn start_error(&self) -> Option<StartError> {
        start_error(&self.answer)
    }
}

/// What the third stage said before it could become the program; nothing when it did.
pub(super) fn start_error(answer: &[u8]) -> Option<StartError> {
    if answer.is_empty() {
        return None;
    }
    Some(serde_json::from_slice(answer).unwrap_or_else(|_| StartError::Other {
        what: "starting the program".to_owned(),
        problem: String::from_utf8_lossy(answer).into_owned(),
    }))
}

/// The two ends of a program's standard input.
struct Ends {
    kind: Stdin,
    theirs: Option<OwnedFd>,
    input: Option<File>,
    once: bool,
    terminal: Option<File>,
    /// Instead of the pipes.
    outputs: Option<Outputs>,
}

impl Ends {
    fn make(stdio: Stdio) -> io::Result<Self> {
        let none =
            Self { kind: Stdin::Null, theirs: None, input: None, once: false, terminal: None, outputs: None };
        match stdio {
            Stdio::Null => Ok(none),
            Stdio::Input { once } => {
                let (theirs, ours) = io::pipe()?;
                set_nonblocking(ours.as_fd())?;
                let input = Some(File::from(OwnedFd::from(ours)));
                Ok(Self { kind: Stdin::Given, theirs: Some(theirs.into()), input, once, ..none })
            }
            Stdio::Terminal { input, once } => {
                let (ours, theirs) = terminal::open()?;
                let input = if input { Some(File::from(ours.try_clone()?)) } else { None };
                let terminal = Some(File::from(ours.try_clone()?));
                let outputs = Some(Outputs::of_terminal(ours)?);
                Ok(Self { kind: Stdin::Terminal, theirs: Some(theirs), input, once, terminal, outputs })
            }
        }
    }
}

/// A line of output, to be told.
pub(super) fn output_event(output: Output, line: &[u8]) -> Event {
    Event::Output { stderr: output == Output::Stderr, line: String::from_utf8_lossy(line).into_owned() }
}

/// Reaps all children that have ended.
pub(super) fn reap(mut ended: impl FnMut(i32, WaitStatus)) {
    loop {
        match waitpid(Pid::from_raw(-1), Some(WaitPidFlag::WNOHANG)) {
            Err(nix::errno::Errno::EINTR) => {}
            Ok(WaitStatus::StillAlive) | Err(_) => return,
            Ok(status) => {
                if let Some(pid) = status.pid() {
                    ended(pid.as_raw(), status);
                }
            }
        }
    }
}

/// Kills and reaps until no child is left. What cannot be killed is named.
pub(super) fn end_tree(mut ended: impl FnMut(i32, WaitStatus)) -> Vec<String> {
    let own = nix::unistd::getpid().as_raw();
    let start = Instant::now();
    let mut condemned: Vec<i32> = Vec::new();
    loop {
        reap(&mut ended);
        let left = process::descendants(own);
        if left.is_empty() {
            return Vec::new();
        }
        for pid in &left {
            let _ = kill(Pid::from_raw(*pid), Signal::SIGKILL);
        }
        let past = start.elapsed();
        let stuck = left.iter().all(|pid| condemned.contains(pid));
        if past >= KILL_LIMIT || past >= SURVIVORS_LIMIT && stuck {
            return left.into_iter().map(process::describe).collect();
        }
        condemned = left;
        std::thread::sleep(KILL_INTERVAL);
    }
}
