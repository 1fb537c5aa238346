//! Who joins a container while it runs: programs that are run in it besides its own, and clients that listen to its
//! output and give it input. All of it is the supervisor's, so that nothing of it outlives the container.
//!
//! A client that does not take its output loses some of it; the container never waits for one.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, killpg};
use nix::sys::wait::WaitStatus;
use nix::unistd::Pid;

use super::isolation::Words;
use super::log::Output;
use super::output::Sink;
use super::peer::set_nonblocking;
use super::protocol::{Event, ExecSpec, Launch, Namespaces, StartError, Stdin};
use super::run::{Launcher, Surroundings, output_event, start_error};

/// Programs that may run in one container besides its own: more than a crowd of people and probes, and a bound.
const EXECS: usize = 256;

/// Clients that may be attached to one container.
const ATTACHED: usize = 64;

/// One read of a client's input: a pipe's atomic write is less, its whole buffer four times that (pipe(7)).
const INPUT_BYTES: usize = 16 * 1024;

/// What the third stage says is one short line.
const ANSWER_BYTES: usize = 64 * 1024;

/// Everybody who has joined a container.
#[derive(Default)]
pub(super) struct Sessions {
    execs: Vec<Exec>,
    attached: Vec<Attached>,
    /// Input that the container has not taken yet; none is read before it has.
    pending: Vec<u8>,
}

/// A program that runs besides the container's own.
struct Exec {
    id: u64,
    pid: i32,
    /// Where the third stage names the process that it has started in the container's namespaces, until it has.
    words: Option<Words>,
    /// On which the third stage complains when it cannot become the program.
    socket: UnixStream,
}

/// A client of the container's input and output.
struct Attached {
    input: Option<File>,
    outputs: [Option<File>; 2],
    lost: [u64; 2],
}

impl Sessions {
    /// Starts a program; tells why it cannot be.
    pub(super) fn exec(
        &mut self,
        spec: ExecSpec,
        given: Vec<OwnedFd>,
        surroundings: Option<Surroundings>,
    ) -> Option<Event> {
        let id = spec.id;
        let problem = match surroundings {
            None => "the container does not run".to_owned(),
            Some(_) if self.execs.len() >= EXECS => format!("{EXECS} other programs run in it already"),
            Some(surroundings) => match start(spec, given, surroundings) {
                Ok(exec) => {
                    self.execs.push(exec);
                    return None;
                }
                Err(error) => error.to_string(),
            },
        };
        let error = StartError::Other { what: "running a program in the container".to_owned(), problem };
        Some(Event::ExecFailed { id, error })
    }

    /// A signal to such a program's process group.
    pub(super) fn signal(&mut self, id: u64, signal: i32) {
        let Ok(signal) = Signal::try_from(signal) else { return };
        self.execs.iter_mut().for_each(Exec::learn);
        // It is not reaped yet, so its number is still its own.
        if let Some(exec) = self.execs.iter().find(|exec| exec.id == id) {
            let _ = killpg(Pid::from_raw(exec.pid), signal);
        }
    }

    /// Takes note of a child's end; tells it when it was such a program.
    pub(super) fn note(&mut self, pid: i32, status: WaitStatus) -> Option<Event> {
        self.execs.iter_mut().for_each(Exec::learn);
        let index = self.execs.iter().position(|exec| exec.pid == pid)?;
        let exec = self.execs.swap_remove(index);
        let mut answer = Vec::new();
        let _ = exec.socket.set_nonblocking(true);
        let _ = (&exec.socket).take(ANSWER_BYTES as u64).read_to_end(&mut answer);
        if let Some(error) = start_error(&answer) {
            return Some(Event::ExecFailed { id: exec.id, error });
        }
        let exit_code = match status {
            WaitStatus::Exited(_, code) => code,
            WaitStatus::Signaled(_, signal, _) => 128 + signal as i32,
            _ => 137,
        };
        Some(Event::ExecEnded { id: exec.id, exit_code })
    }

    /// A client joins.
    pub(super) fn attach(&mut self, takes_input: bool, given: Vec<OwnedFd>) {
        let mut given = given.into_iter().map(File::from);
        let (input, stdout, stderr) = (given.next(), given.next(), given.next());
        // Of a container that says nothing, those who have left are only noticed here.
        self.attached.retain(|client| !client.has_left());
        if self.attached.len() >= ATTACHED {
            let words = format!("jiriaf-pilot: {ATTACHED} clients are attached to this container already\n");
            if let Some(mut stderr) = stderr.or(stdout).filter(|file| set_nonblocking(file.as_fd()).is_ok()) {
                let _ = stderr.write_all(words.as_bytes());
            }
            return;
        }
        for file in [&input, &stdout, &stderr].into_iter().flatten() {
            if set_nonblocking(file.as_fd()).is_err() {
                return;
            }
        }
        let input = input.filter(|_| takes_input);
        self.attached.push(Attached { input, outputs: [stdout, stderr], lost: [0, 0] });
    }

    /// Where clients' input comes from, while the container has taken all that came before.
    pub(super) fn inputs(&self) -> impl Iterator<Item = (usize, BorrowedFd<'_>)> {
        let wanted = self.pending.is_empty();
        let all = self.attached.iter().enumerate().filter(move |_| wanted);
        all.filter_map(|(index, client)| Some((index, client.input.as_ref()?.as_fd())))
    }

    /// Whether input waits to be taken by the container.
    pub(super) fn has_input(&self) -> bool {
        !self.pending.is_empty()
    }

    /// A client has input, or has ended it.
    pub(super) fn on_input(&mut self, index: usize, stdin: &mut Option<File>, once: bool) {
        let Some(client) = self.attached.get_mut(index) else { return };
        let mut bytes = [0; INPUT_BYTES];
        let Some(read) = client.input.as_mut().map(|input| input.read(&mut bytes)) else { return };
        match read {
            Ok(n) if n > 0 => {
                self.pending.extend_from_slice(&bytes[..n]);
                self.feed(stdin);
            }
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Ok(_) | Err(_) => {
                client.input = None;
                if once {
                    *stdin = None;
                }
            }
        }
    }

    /// Gives the container the input that waits.
    pub(super) fn feed(&mut self, stdin: &mut Option<File>) {
        while !self.pending.is_empty() {
            let Some(file) = stdin else {
                self.pending.clear();
                return;
            };
            match file.write(&self.pending) {
                Ok(n) => {
                    self.pending.drain(..n);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // Nobody reads it any more.
                Err(_) => {
                    *stdin = None;
                    self.pending.clear();
                }
            }
        }
    }

    /// Everybody goes: the container is over and all of its processes are dead.
    pub(super) fn end(&mut self) -> Vec<Event> {
        for client in &mut self.attached {
            client.give(Output::Stdout, &[]);
            client.give(Output::Stderr, &[]);
        }
        self.attached.clear();
        self.pending.clear();
        self.execs.drain(..).map(|exec| Event::ExecEnded { id: exec.id, exit_code: 137 }).collect()
    }
}

fn start(spec: ExecSpec, given: Vec<OwnedFd>, surroundings: Surroundings) -> io::Result<Exec> {
    let missing = || io::Error::other("its descriptors did not come along");
    let mut given = given.into_iter();
    let stdin = given.next().ok_or_else(missing)?;
    let launcher = if spec.terminal {
        Launcher::spawn_with(std::process::Stdio::null(), std::process::Stdio::null())?
    } else {
        let (stdout, stderr) = (given.next().ok_or_else(missing)?, given.next().ok_or_else(missing)?);
        Launcher::spawn_with(stdout.into(), stderr.into())?
    };
    let pid = launcher.pid;
    let mut env = surroundings.env;
    if spec.terminal {
        name_terminal(&mut env);
    }
    let place = match surroundings.init {
        Some(init) => Namespaces::Of(init),
        None if surroundings.isolated => return Err(io::Error::other("its namespaces are not there yet")),
        None => Namespaces::Outer,
    };
    let (words, their_words) = match surroundings.init {
        Some(_) => Words::new().map(|(ours, theirs)| (Some(ours), Some(theirs)))?,
        None => (None, None),
    };
    let launch = Launch {
        argv: spec.argv,
        env,
        working_dir: surroundings.working_dir,
        container_dir: None,
        log: None,
        session: surroundings.session,
        oom_score_adj: surroundings.oom_score_adj,
        open_files: surroundings.open_files,
        no_new_privs: surroundings.no_new_privs,
        cpus: surroundings.cpus,
        doors: surroundings.doors,
        stdin: if spec.terminal { Stdin::Terminal } else { Stdin::Given },
        place,
        in_namespaces: false,
    };
    let (socket, _) = launcher.launch(&launch, Some(&stdin), their_words.as_ref())?;
    Ok(Exec { id: spec.id, pid, words, socket })
}

impl Exec {
    /// In namespaces the third stage is not the program: it starts it, names it and is gone.
    fn learn(&mut self) {
        let Some(words) = &mut self.words else { return };
        words.hear();
        if let Some(pid) = words.program {
            (self.pid, self.words) = (pid, None);
        }
    }
}

/// A batch job has no terminal, so its environment names none; programs such as vi and top want a name. containerd's.
pub(super) fn name_terminal(env: &mut Vec<(String, String)>) {
    if !env.iter().any(|(name, value)| name == "TERM" && !value.is_empty() && value != "dumb") {
        env.retain(|(name, _)| name != "TERM");
        env.push(("TERM".to_owned(), "xterm".to_owned()));
    }
}

impl Attached {
    /// Gives a client what it takes at once.
    fn give(&mut self, output: Output, bytes: &[u8]) {
        let index = output as usize;
        if self.lost[index] > 0 {
            let notice = format!("\n[jiriaf-pilot: {} bytes were not taken in time]\n", self.lost[index]);
            if self.put(index, notice.as_bytes()) == notice.len() {
                self.lost[index] = 0;
            }
        }
        let taken = if self.lost[index] > 0 { 0 } else { self.put(index, bytes) };
        self.lost[index] += (bytes.len() - taken) as u64;
    }

    fn put(&mut self, index: usize, bytes: &[u8]) -> usize {
        let Some(file) = &mut self.outputs[index] else { return bytes.len() };
        let mut taken = 0;
        while taken < bytes.len() {
            match file.write(&bytes[taken..]) {
                Ok(n) => taken += n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return taken,
                Err(_) => {
                    self.outputs[index] = None;
                    return bytes.len();
                }
            }
        }
        taken
    }

    /// Whether the other ends of its outputs are closed.
    fn has_left(&self) -> bool {
        self.outputs.iter().flatten().any(|file| {
            let mut fds = [PollFd::new(file.as_fd(), PollFlags::empty())];
            let _ = poll(&mut fds, PollTimeout::ZERO);
            fds[0].revents().is_some_and(|events| events.contains(PollFlags::POLLERR))
        })
    }

    fn is_gone(&self) -> bool {
        self.input.is_none() && self.outputs.iter().all(Option::is_none)
    }
}

/// Clients and, for `play`, the pilot, as takers of a container's output.
pub(super) struct Listeners<'a> {
    sessions: &'a mut Sessions,
    forward: bool,
    /// Lines for the pilot.
    pub(super) events: Vec<Event>,
}

impl<'a> Listeners<'a> {
    pub(super) fn new(sessions: &'a mut Sessions, forward: bool) -> Self {
        Self { sessions, forward, events: Vec::new() }
    }
}

impl Sink for Listeners<'_> {
    fn bytes(&mut self, output: Output, bytes: &[u8]) {
        for client in &mut self.sessions.attached {
            client.give(output, bytes);
        }
        self.sessions.attached.retain(|client| !client.is_gone());
    }

    fn line(&mut self, output: Output, line: &[u8]) {
        if self.forward {
            self.events.push(output_event(output, line));
        }
    }
}
