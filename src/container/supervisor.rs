//! The supervisor: starts one container, owns its output and its end, outlives a crash of the pilot.
//!
//! One thread waits in poll(2) for the pilot, the third stage, the container's output, its children's deaths and its own
//! clock; another one writes the log. It is a child subreaper, so whatever its container detaches is its child, and the
//! end of the container is the end of all of them. SIGTERM and its like are survived by handlers, never by ignoring
//! them: what is ignored stays ignored in the container.

use std::fs;
use std::io::{self, Read as _};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{ChildStderr, ChildStdout, Command, ExitCode, Stdio};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant, SystemTime};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, killpg};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, dup2_stdin};

use super::log::{Log, Output};
use super::peer::Peer;
use super::process::{self, Identity};
use super::protocol::{ContainerSpec, End, Event, Launch, Order, StartError, line};

/// The file with the supervisor's identity, in its state directory.
pub(super) const IDENTITY: &str = "pid";

/// The supervisor's socket, in its state directory.
pub(super) const SOCKET: &str = "s";

/// Pilots that may be connected: the one that started it, the one that found it again, and one more that looks.
const PEERS: usize = 4;

/// How long processes that no signal ends (state D) are waited for.
const SURVIVORS_LIMIT: Duration = Duration::from_secs(2);

/// How long the log's writer is waited for at the end.
const LOG_LIMIT: Duration = Duration::from_secs(2);

/// How long the end is kept for a pilot that does not come back: three restarts of the pilot by its guardian.
const KEEP_LIMIT: Duration = Duration::from_secs(600);

/// One read of output.
const READ_BYTES: usize = 64 * 1024;

/// Signals that are survived.
const SURVIVED: [i32; 6] = [
    libc_signal(Signal::SIGTERM),
    libc_signal(Signal::SIGINT),
    libc_signal(Signal::SIGHUP),
    libc_signal(Signal::SIGUSR1),
    libc_signal(Signal::SIGUSR2),
    libc_signal(Signal::SIGQUIT),
];

const fn libc_signal(signal: Signal) -> i32 {
    signal as i32
}

/// The `supervise` stage's main: `supervise <state directory of this run>`, the pilot's socket as standard input.
#[must_use]
pub fn supervise() -> ExitCode {
    let Some(directory) = std::env::args_os().nth(2) else {
        eprintln!("error: a supervisor is started by the pilot, not by hand");
        return ExitCode::from(2);
    };
    match Supervisor::begin(Path::new(&directory)).and_then(Supervisor::run) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("jiriaf-pilot: supervisor {}: {error}", directory.display());
            ExitCode::from(1)
        }
    }
}

/// A container that was started.
struct Running {
    pid: i32,
    /// Open until the third stage's exec.
    launch: Option<UnixStream>,
    launch_text: Vec<u8>,
    stdout: Option<ChildStdout>,
    stderr: Option<ChildStderr>,
    log: Log,
    started_at: Option<SystemTime>,
    /// How the first process ended, and when.
    first: Option<(WaitStatus, SystemTime)>,
    kill_at: Option<Instant>,
    forward: bool,
    orphan_timeout: Duration,
    grace: Duration,
}

struct Supervisor {
    peers: Vec<Peer>,
    listener: UnixListener,
    wake: UnixStream,
    /// Everything that a pilot must know, for one that comes later.
    told: Vec<Event>,
    running: Option<Running>,
    over: Option<Instant>,
    drain_at: Option<SystemTime>,
    alone_since: Option<Instant>,
    /// How long the end is kept while nobody is connected: not at all where nobody will come back.
    keep: Duration,
    done: bool,
}

/// Who becomes readable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    Wake,
    Listener,
    Peer(usize),
    Launch,
    Stdout,
    Stderr,
}

impl Supervisor {
    fn begin(directory: &Path) -> io::Result<Self> {
        nix::sys::prctl::set_dumpable(false)?;
        nix::sys::prctl::set_child_subreaper(true)?;
        let flag = Arc::new(AtomicBool::new(false));
        for signal in SURVIVED {
            signal_hook::flag::register(signal, Arc::clone(&flag))?;
        }
        let (wake, write) = UnixStream::pair()?;
        wake.set_nonblocking(true)?;
        write.set_nonblocking(true)?;
        signal_hook::low_level::pipe::register(Signal::SIGCHLD as i32, write)?;
        // The pilot's socket moves away from standard input, which no child may inherit.
        let pilot = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
        dup2_stdin(fs::File::open("/dev/null")?)?;
        // A socket's path has 108 bytes at most (unix(7)), so it is named from within its directory.
        std::env::set_current_dir(directory)?;
        let listener = UnixListener::bind(SOCKET)?;
        listener.set_nonblocking(true)?;
        crate::files::write_atomic(Path::new(IDENTITY), Identity::own().to_string().as_bytes(), 0o600)?;
        Ok(Self {
            peers: vec![Peer::new(pilot)?],
            listener,
            wake,
            told: Vec::new(),
            running: None,
            over: None,
            drain_at: None,
            alone_since: None,
            keep: KEEP_LIMIT,
            done: false,
        })
    }

    fn run(mut self) -> io::Result<()> {
        while !self.done {
            let (readable, writable) = self.wait()?;
            for source in readable {
                self.on_readable(source);
            }
            for index in writable {
                if let Some(peer) = self.peers.get_mut(index) {
                    peer.flush();
                }
            }
            self.on_peers();
            self.on_children();
            self.on_clock();
        }
        Ok(())
    }

    // ---- waiting ---------------------------------------------------------------------------------------------

    fn wait(&self) -> io::Result<(Vec<Source>, Vec<usize>)> {
        let mut sources = vec![Source::Wake, Source::Listener];
        let mut fds = vec![
            PollFd::new(self.wake.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.listener.as_fd(), PollFlags::POLLIN),
        ];
        for (index, peer) in self.peers.iter().enumerate() {
            let mut flags = PollFlags::POLLIN;
            flags.set(PollFlags::POLLOUT, peer.has_more());
            sources.push(Source::Peer(index));
            fds.push(PollFd::new(peer.as_fd(), flags));
        }
        let mut busy = false;
        if let Some(running) = &self.running {
            if let Some(launch) = &running.launch {
                sources.push(Source::Launch);
                fds.push(PollFd::new(launch.as_fd(), PollFlags::POLLIN));
            }
            // A terminal that takes no more holds the output up, as a pipe would; a log that hangs does not.
            let full = running.forward && self.peers.iter().any(Peer::is_full);
            busy = !running.log.has_room() || full;
            if !busy {
                if let Some(stdout) = &running.stdout {
                    sources.push(Source::Stdout);
                    fds.push(PollFd::new(stdout.as_fd(), PollFlags::POLLIN));
                }
                if let Some(stderr) = &running.stderr {
                    sources.push(Source::Stderr);
                    fds.push(PollFd::new(stderr.as_fd(), PollFlags::POLLIN));
                }
            }
        }
        match poll(&mut fds, self.timeout(busy)) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
        let mut readable = Vec::new();
        let mut writable = Vec::new();
        for (source, fd) in sources.into_iter().zip(&fds) {
            let events = fd.revents().unwrap_or(PollFlags::empty());
            if events.intersects(PollFlags::POLLIN | PollFlags::POLLHUP | PollFlags::POLLERR) {
                readable.push(source);
            }
            if let (Source::Peer(index), true) = (source, events.contains(PollFlags::POLLOUT)) {
                writable.push(index);
            }
        }
        Ok((readable, writable))
    }

    /// Until the next thing that only the clock brings.
    fn timeout(&self, busy: bool) -> PollTimeout {
        let now = Instant::now();
        let mut next: Option<Duration> = busy.then_some(Duration::from_millis(20));
        let mut add = |left: Duration| next = Some(next.map_or(left, |n| n.min(left)));
        if let Some(kill_at) = self.running.as_ref().and_then(|r| r.kill_at) {
            add(kill_at.saturating_duration_since(now));
        }
        if let Some(over) = self.over {
            add((over + self.kept()).saturating_duration_since(now));
        }
        if let (Some(since), Some(running)) = (self.alone_since, &self.running) {
            add((since + running.orphan_timeout).saturating_duration_since(now));
            if let Some(at) = self.drain_at {
                add(at.duration_since(SystemTime::now()).unwrap_or_default());
            }
        }
        match next {
            // A millisecond more, so that the moment has come when poll returns.
            Some(left) => PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX),
            None => PollTimeout::NONE,
        }
    }

    // ---- what comes in ---------------------------------------------------------------------------------------

    fn on_readable(&mut self, source: Source) {
        match source {
            Source::Wake => {
                let mut bytes = [0; 64];
                while self.wake.read(&mut bytes).is_ok_and(|n| n == bytes.len()) {}
            }
            Source::Listener => self.accept(),
            Source::Peer(index) => {
                if let Some(peer) = self.peers.get_mut(index) {
                    peer.receive();
                }
            }
            Source::Launch => self.on_launch(),
            Source::Stdout => self.on_output(Output::Stdout),
            Source::Stderr => self.on_output(Output::Stderr),
        }
    }

    fn accept(&mut self) {
        let Ok((stream, _)) = self.listener.accept() else { return };
        let Ok(mut peer) = Peer::new(stream) else { return };
        if !peer.is_same_user() || self.peers.len() >= PEERS {
            return;
        }
        for event in &self.told {
            peer.send(&line(event));
        }
        self.peers.push(peer);
    }

    fn on_peers(&mut self) {
        let mut orders = Vec::new();
        for peer in &mut self.peers {
            orders.extend(peer.orders());
        }
        self.peers.retain(|peer| !peer.is_closed());
        for order in orders {
            match order {
                Order::Start(spec) => self.start(*spec),
                Order::Terminate(grace) => self.terminate(grace),
                Order::Drain(at) => self.drain_at = Some(at),
                // Only the end can be acknowledged: a pilot that gives up before is one that has gone.
                Order::Acknowledge => self.done = self.over.is_some() || self.running.is_none(),
            }
        }
        if self.peers.is_empty() {
            self.alone_since.get_or_insert_with(Instant::now);
            // Nothing was started and nobody will ask for it.
            if self.running.is_none() && self.over.is_none() {
                self.done = true;
            }
        } else {
            self.alone_since = None;
        }
    }

    fn tell(&mut self, event: Event) {
        let bytes = line(&event);
        for peer in &mut self.peers {
            peer.send(&bytes);
        }
        if !matches!(event, Event::Output { .. }) {
            self.told.push(event);
        }
    }

    // ---- the container ---------------------------------------------------------------------------------------

    fn start(&mut self, spec: ContainerSpec) {
        if self.running.is_some() || self.over.is_some() {
            return;
        }
        self.drain_at = spec.drain_at;
        if spec.orphan_timeout.is_zero() {
            self.keep = Duration::ZERO;
        }
        match spawn(&spec) {
            Ok(running) => self.running = Some(running),
            Err(error) => {
                let what = "starting the container's process".to_owned();
                self.finish(Event::StartFailed(StartError::Other { what, problem: error.to_string() }));
            }
        }
    }

    /// The third stage has something to say, or has become the program.
    fn on_launch(&mut self) {
        let Some(running) = &mut self.running else { return };
        let Some(launch) = &mut running.launch else { return };
        let mut bytes = [0; 4096];
        match launch.read(&mut bytes) {
            Ok(0) => {
                running.launch = None;
                if running.launch_text.is_empty() {
                    let at = SystemTime::now();
                    running.started_at = Some(at);
                    let pid = running.pid;
                    self.tell(Event::Started { pid, at });
                }
            }
            Ok(n) if running.launch_text.len() < 64 * 1024 => {
                running.launch_text.extend_from_slice(&bytes[..n])
            }
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Ok(_) | Err(_) => running.launch = None,
        }
    }

    fn on_output(&mut self, output: Output) {
        let mut lines = Vec::new();
        let Some(running) = &mut self.running else { return };
        let forward = running.forward;
        read_output(running, output, &mut |line| {
            if forward {
                lines.push(String::from_utf8_lossy(line).into_owned());
            }
        });
        for line in lines {
            self.tell(Event::Output { stderr: output == Output::Stderr, line });
        }
    }

    fn on_children(&mut self) {
        let first = reap(self.running.as_ref().map(|r| r.pid));
        let Some(running) = &mut self.running else { return };
        if let Some(status) = first {
            running.first = Some((status, SystemTime::now()));
        }
        if running.first.is_some() {
            self.end();
        }
    }

    fn terminate(&mut self, grace: Duration) {
        let Some(running) = &mut self.running else {
            // Nothing was started yet, and nothing will be.
            self.done = self.over.is_none();
            return;
        };
        let kill_at = Instant::now() + grace;
        let first = running.kill_at.is_none();
        running.kill_at = Some(running.kill_at.map_or(kill_at, |known| known.min(kill_at)));
        if first {
            let group = Pid::from_raw(running.pid);
            // The group may not be made yet; then the third stage alone is there to be told.
            if killpg(group, Signal::SIGTERM).is_err() {
                let _ = nix::sys::signal::kill(group, Signal::SIGTERM);
            }
            // A stopped process acts on its SIGTERM when it goes on.
            let _ = killpg(group, Signal::SIGCONT);
        }
    }

    /// Kills what is left of the container and tells how it ended.
    fn end(&mut self) {
        let Some(mut running) = self.running.take() else { return };
        let survivors = end_tree(&mut running);
        // The tree is dead, so the socket has its end: this reads at most what is in it (64 KiB, then the end).
        for _ in 0..20 {
            if running.launch.is_none() {
                break;
            }
            self.running = Some(running);
            self.on_launch();
            let Some(again) = self.running.take() else { return };
            running = again;
        }
        let mut lines: Vec<(bool, String)> = Vec::new();
        let forward = running.forward;
        for output in [Output::Stdout, Output::Stderr] {
            let mut keep = |line: &[u8]| {
                if forward {
                    lines.push((output == Output::Stderr, String::from_utf8_lossy(line).into_owned()));
                }
            };
            while read_output(&mut running, output, &mut keep) {}
            running.log.close(output, &mut keep);
        }
        for (stderr, line) in lines {
            self.tell(Event::Output { stderr, line });
        }
        let log = running.log.finish(LOG_LIMIT);
        if let Some(error) = start_error(&running) {
            self.finish(Event::StartFailed(error));
            return;
        }
        let (status, finished_at) = running.first.unwrap_or((WaitStatus::StillAlive, SystemTime::now()));
        let (exit_code, signal) = match status {
            WaitStatus::Exited(_, code) => (code, None),
            WaitStatus::Signaled(_, signal, _) => (128 + signal as i32, Some(signal as i32)),
            _ => (137, None),
        };
        self.finish(Event::Ended(End {
            exit_code,
            signal,
            started_at: running.started_at.unwrap_or(finished_at),
            finished_at,
            log_lines_lost: log.lost,
            log_error: log.error,
            survivors,
        }));
    }

    fn finish(&mut self, event: Event) {
        self.over = Some(Instant::now());
        self.tell(event);
    }

    fn kept(&self) -> Duration {
        if self.peers.is_empty() { self.keep } else { KEEP_LIMIT }
    }

    // ---- the clock -------------------------------------------------------------------------------------------

    fn on_clock(&mut self) {
        let now = Instant::now();
        if self.over.is_some_and(|over| now >= over + self.kept()) {
            self.done = true;
            return;
        }
        let Some(running) = &self.running else { return };
        if running.kill_at.is_some_and(|at| now >= at) {
            self.end();
            return;
        }
        if let Some(since) = self.alone_since
            && running.kill_at.is_none()
        {
            let orphaned = now >= since + running.orphan_timeout;
            let drained = self.drain_at.is_some_and(|at| SystemTime::now() >= at);
            if orphaned || drained {
                let grace = running.grace;
                self.terminate(grace);
            }
        }
    }
}

/// Why the program never began, where the third stage said so or died on the way.
fn start_error(running: &Running) -> Option<StartError> {
    if running.started_at.is_some() {
        return None;
    }
    if let Ok(error) = serde_json::from_slice(&running.launch_text) {
        return Some(error);
    }
    // It was ended before it became the program: by a deletion, or by somebody else's signal.
    if running.kill_at.is_some() || matches!(running.first, Some((WaitStatus::Signaled(..), _))) {
        return None;
    }
    Some(StartError::Other {
        what: "starting the container".to_owned(),
        problem: "its first stage said nothing".to_owned(),
    })
}

fn spawn(spec: &ContainerSpec) -> io::Result<Running> {
    let (ours, theirs) = UnixStream::pair()?;
    let mut child = Command::new("/proc/self/exe")
        .arg0("jiriaf-pilot")
        .arg("launch")
        .env_clear()
        .envs(spec.env.iter().map(|(name, value)| (name, value)))
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let launch = Launch {
        argv: spec.argv.clone(),
        working_dir: spec.working_dir.clone(),
        container_dir: spec.container_dir.clone(),
        log: spec.log.clone(),
        session: spec.session,
        oom_score_adj: spec.oom_score_adj,
    };
    io::Write::write_all(&mut (&ours), &line(&launch))?;
    ours.set_nonblocking(true)?;
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    for fd in [stdout.as_ref().map(AsFd::as_fd), stderr.as_ref().map(AsFd::as_fd)].into_iter().flatten() {
        super::peer::set_nonblocking(fd)?;
    }
    Ok(Running {
        pid: i32::try_from(child.id()).unwrap_or(i32::MAX),
        launch: Some(ours),
        launch_text: Vec::new(),
        stdout,
        stderr,
        log: Log::new(spec.log.clone(), spec.log_limits),
        started_at: None,
        first: None,
        kill_at: None,
        forward: spec.forward_output,
        orphan_timeout: spec.orphan_timeout,
        grace: spec.grace,
    })
}

/// Reads once from one of the outputs; whether more may be there. At its end it is closed.
fn read_output(running: &mut Running, output: Output, line: &mut dyn FnMut(&[u8])) -> bool {
    let mut bytes = [0; READ_BYTES];
    let read = match output {
        Output::Stdout => running.stdout.as_mut().map(|pipe| pipe.read(&mut bytes)),
        Output::Stderr => running.stderr.as_mut().map(|pipe| pipe.read(&mut bytes)),
    };
    match read {
        Some(Ok(n)) if n > 0 => {
            running.log.take(output, &bytes[..n], line);
            true
        }
        Some(Err(error)) if error.kind() == io::ErrorKind::Interrupted => true,
        Some(Err(error)) if error.kind() == io::ErrorKind::WouldBlock => false,
        Some(Ok(_) | Err(_)) => {
            match output {
                Output::Stdout => running.stdout = None,
                Output::Stderr => running.stderr = None,
            }
            false
        }
        None => false,
    }
}

/// Reaps all children that have ended; how the first process did, if it is among them.
fn reap(first: Option<i32>) -> Option<WaitStatus> {
    let mut found = None;
    loop {
        match waitpid(Pid::from_raw(-1), Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::StillAlive) | Err(_) => return found,
            Ok(status) => {
                if status.pid().map(Pid::as_raw) == first && first.is_some() {
                    found = Some(status);
                }
            }
        }
    }
}

/// Kills and reaps until no child is left. Processes that no signal ends are named.
fn end_tree(running: &mut Running) -> Vec<String> {
    let own = nix::unistd::getpid().as_raw();
    let start = Instant::now();
    loop {
        if let Some(status) = reap(Some(running.pid)) {
            running.first.get_or_insert((status, SystemTime::now()));
        }
        let left = process::descendants(own);
        if left.is_empty() {
            return Vec::new();
        }
        for pid in &left {
            let _ = nix::sys::signal::kill(Pid::from_raw(*pid), Signal::SIGKILL);
        }
        if start.elapsed() > SURVIVORS_LIMIT {
            let stuck: Vec<i32> =
                left.into_iter().filter(|pid| process::stat(*pid).is_some_and(|s| s.state == 'D')).collect();
            let hopeless = start.elapsed() > 5 * SURVIVORS_LIMIT;
            if hopeless {
                return process::descendants(own).into_iter().map(process::describe).collect();
            }
            if !stuck.is_empty() {
                return stuck.into_iter().map(process::describe).collect();
            }
        }
        std::thread::sleep(Duration::from_micros(300));
    }
}
