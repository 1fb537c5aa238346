//! The supervisor: starts one container, owns its output and its end, outlives a crash of the pilot.
//!
//! One thread waits in poll(2) for the pilot, the third stage, the container's output, its children's deaths and its own
//! clock; another one writes the log. It is a child subreaper, so whatever its container detaches is its child, and the
//! end of the container is the end of all of them. SIGTERM and its like are survived by handlers, never by ignoring
//! them: what is ignored stays ignored in the container.

use std::fs;
use std::io::{self, Read as _};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant, SystemTime};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;
use nix::unistd::dup2_stdin;

use super::log::Output;
use super::peer::Peer;
use super::process::Identity;
use super::protocol::{ContainerSpec, Event, Order, StartError, line};
use super::run::{Launcher, Running, end_tree, reap};
use super::sessions::{Listeners, Sessions};

/// The file with the supervisor's identity, in its state directory.
pub(super) const IDENTITY: &str = "pid";

/// The supervisor's socket, in its state directory.
pub(super) const SOCKET: &str = "s";

/// Pilots that may be connected: the one that started it, the one that found it again, and one more that looks.
const PEERS: usize = 4;

/// How long the end is kept for a pilot that does not come back: three restarts of the pilot by its guardian.
const KEEP_LIMIT: Duration = Duration::from_secs(600);

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

struct Supervisor {
    peers: Vec<Peer>,
    listener: UnixListener,
    wake: UnixStream,
    /// Everything that a pilot must know, for one that comes later.
    told: Vec<Event>,
    /// The third stage, until there is something to start.
    launcher: Option<Launcher>,
    running: Option<Running>,
    sessions: Sessions,
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
    /// A container in namespaces.
    Words,
    Output(Output),
    /// A client has input.
    Input(usize),
    /// The container takes input.
    Stdin,
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
            launcher: Some(Launcher::spawn()?),
            running: None,
            sessions: Sessions::default(),
            over: None,
            drain_at: None,
            alone_since: None,
            keep: KEEP_LIMIT,
            done: false,
        })
    }

    fn run(mut self) -> io::Result<()> {
        let result = self.watch();
        // Nothing of ours is left behind: neither a third stage without work nor, after an error, a container.
        if self.launcher.is_some() || self.running.is_some() {
            let _ = end_tree(|_, _| {});
        }
        result
    }

    fn watch(&mut self) -> io::Result<()> {
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
            if let Some(words) = running.words() {
                sources.push(Source::Words);
                fds.push(PollFd::new(words.as_fd(), PollFlags::POLLIN));
            }
            // A terminal that takes no more holds the output up, as a pipe would; a log that hangs does not.
            let full = running.forward && self.peers.iter().any(Peer::is_full);
            for (index, fd) in self.sessions.inputs() {
                sources.push(Source::Input(index));
                fds.push(PollFd::new(fd, PollFlags::POLLIN));
            }
            if let Some(stdin) = running.stdin.as_ref().filter(|_| self.sessions.has_input()) {
                sources.push(Source::Stdin);
                fds.push(PollFd::new(stdin.as_fd(), PollFlags::POLLOUT));
            }
            busy = !running.log.has_room() || full;
            if !busy {
                for output in [Output::Stdout, Output::Stderr] {
                    if let Some(fd) = running.outputs.fd(output) {
                        sources.push(Source::Output(output));
                        fds.push(PollFd::new(fd, PollFlags::POLLIN));
                    }
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
            match source {
                Source::Peer(index) if events.contains(PollFlags::POLLOUT) => writable.push(index),
                Source::Stdin if events.contains(PollFlags::POLLOUT) => readable.push(source),
                _ => {}
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
            add(running.orphan_timeout.saturating_sub(now.duration_since(since)));
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
            Source::Words => {
                if let Some(running) = &mut self.running {
                    running.hear_words();
                }
            }
            Source::Output(output) => self.on_output(output),
            Source::Input(index) => {
                if let Some(running) = &mut self.running {
                    self.sessions.on_input(index, &mut running.stdin, running.stdin_once);
                }
            }
            Source::Stdin => {
                if let Some(running) = &mut self.running {
                    self.sessions.feed(&mut running.stdin);
                }
            }
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
        for (order, given) in orders {
            match order {
                Order::Start(spec) => self.start(*spec),
                Order::Terminate(grace) => self.terminate(grace),
                Order::Kill => match &mut self.running {
                    Some(running) => running.kill(),
                    None => self.done = self.over.is_none(),
                },
                Order::Drain(at) => self.drain_at = Some(at),
                Order::Cpus(cpus) => {
                    if let Some(running) = &mut self.running {
                        running.set_cpus(cpus);
                    }
                }
                // Only the end can be acknowledged: a pilot that gives up before is one that has gone.
                Order::Acknowledge => self.done = self.over.is_some() || self.running.is_none(),
                Order::Exec(spec) => {
                    let surroundings = self.running.as_ref().map(|running| running.surroundings.clone());
                    if let Some(failed) = self.sessions.exec(spec, given, surroundings) {
                        self.tell(failed);
                    }
                }
                Order::Signal { id, signal } => self.sessions.signal(id, signal),
                Order::Attach { input } if self.running.is_some() => self.sessions.attach(input, given),
                Order::Resize { columns, rows } => {
                    let terminal = self.running.as_ref().and_then(|running| running.terminal.as_ref());
                    let _ = terminal.map(|terminal| super::terminal::resize(terminal, columns, rows));
                }
                // The descriptors close, which tells the client.
                Order::Attach { .. } => {}
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
        // A pilot that comes later knows of no client of before.
        if !matches!(event, Event::Output { .. } | Event::ExecEnded { .. } | Event::ExecFailed { .. }) {
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
        // A signal to the whole session may have ended the first one.
        let launcher = self.launcher.take().map_or_else(Launcher::spawn, Ok);
        match launcher.and_then(|launcher| Running::start(launcher, spec)) {
            Ok(running) => self.running = Some(running),
            Err(error) => {
                let _ = end_tree(|_, _| {});
                let what = "starting the container's process".to_owned();
                self.finish(Event::StartFailed(StartError::Other { what, problem: error.to_string() }));
            }
        }
    }

    fn on_launch(&mut self) {
        let event = self.running.as_mut().and_then(Running::hear_launch);
        if let Some(event) = event {
            self.tell(event);
        }
    }

    fn on_output(&mut self, output: Output) {
        let Some(running) = &mut self.running else { return };
        let mut listeners = Listeners::new(&mut self.sessions, running.forward);
        running.outputs.read(output, &mut running.log, &mut listeners);
        for event in listeners.events {
            self.tell(event);
        }
    }

    fn on_children(&mut self) {
        let mut ended = Vec::new();
        reap(|pid, status| {
            if let Some(running) = &mut self.running {
                running.note(pid, status);
            }
            ended.extend(self.sessions.note(pid, status));
            self.launcher.take_if(|launcher| launcher.pid == pid);
        });
        for event in ended {
            self.tell(event);
        }
        if self.running.as_ref().is_some_and(|running| running.first.is_some()) {
            self.end();
        }
    }

    fn terminate(&mut self, grace: Duration) {
        match &mut self.running {
            Some(running) => running.terminate(grace),
            // Nothing was started yet, and nothing will be.
            None => self.done = self.over.is_none(),
        }
    }

    fn end(&mut self) {
        let Some(running) = self.running.take() else { return };
        let mut told = Vec::new();
        let mut listeners = Listeners::new(&mut self.sessions, running.forward);
        let end = running.end(&mut listeners, &mut |event| told.push(event));
        told.append(&mut listeners.events);
        told.extend(self.sessions.end());
        for event in told {
            self.tell(event);
        }
        self.finish(end);
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
            && !running.terminated
        {
            let orphaned = now.duration_since(since) >= running.orphan_timeout;
            let drained = self.drain_at.is_some_and(|at| SystemTime::now() >= at);
            if orphaned || drained {
                let grace = running.grace;
                self.terminate(grace);
            }
        }
    }
}
