//! The first process of `run`: takes the batch system's signals, restarts a crashed pilot.
//!
//! A job script's `exec` leaves no shell behind that could restart anything, and Slurm signals only its direct child: so
//! `run` begins as this small, single-threaded process. It starts the pilot, forwards signals to it, starts it again when
//! it crashes, ends what a dead supervisor leaves, and exits with the pilot's code. Should the pilot still be there when
//! the deadline comes, it is killed with all that it has.

use std::ffi::OsString;
use std::fs;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant, SystemTime};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use signal_hook::iterator::Signals;

use crate::container::{end_supervisors, is_supervisor, process};

/// A pilot that crashes more often than this within [`CRASH_WINDOW`] will not live by being started once more.
const CRASHES: usize = 3;

/// The time in which crashes are counted.
const CRASH_WINDOW: Duration = Duration::from_secs(600);

/// A pilot that is still there so long before the deadline hangs: it means to be gone a second before
/// ([`crate::drain::SAFETY`]), and its last half second goes to a last try of removing the Node.
const LAST_MOMENT: Duration = Duration::from_millis(250);

/// A guardian that looks so long after the deadline stood still itself, and the pilot with it: their job was suspended, or
/// their host was. While they are, Slurm moves the end of the job.
const STOOD_STILL: Duration = Duration::from_secs(3);

/// What a pilot gets then to learn where its end is now: it asks for some seconds, and what it learns may be a drain.
const REPRIEVE: Duration = Duration::from_secs(15);

/// What containers get when the guardian gives up: what Kubernetes gives a pod that names no grace (30 s) would be more
/// than a batch system's kill wait allows for.
const GIVE_UP_GRACE: Duration = Duration::from_secs(5);

/// How often a pilot that cannot be started again is tried, and the pause between: less than a batch system's kill wait.
const START_TRIES: u32 = 20;

/// See [`START_TRIES`].
const START_PAUSE: Duration = Duration::from_millis(250);

/// A pilot that has said nothing for this long gets its signals all the same.
const SILENCE: Duration = Duration::from_secs(2);

/// Longest line of a pilot: a time and a path (at most 4096 bytes, PATH_MAX), with room to spare.
const LINE_BYTES: usize = 64 * 1024;

/// How often the guardian looks at children that nobody knows, while there are such.
const LOOK_AGAIN: Duration = Duration::from_millis(200);

/// What process lists show.
const NAME: &str = "jiriaf-pilot";

/// Set for a pilot that is started again, to the number of restarts.
pub const RESTARTED: &str = "JIRIAF_RESTARTED";

/// Tells a pilot that is started again when it was asked to end, in milliseconds since 1970: what is left of the batch
/// system's kill wait counts from there.
pub const ASKED: &str = "JIRIAF_ASKED_TO_END";

/// Hands the pilot what the guardian has read of the file of `--config`, at each start the same.
pub const SETTINGS: &str = "JIRIAF_CONFIG_SETTINGS";

/// What the pilot tells its guardian.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Word {
    /// When the batch system begins to kill.
    deadline: Option<SystemTime>,
    /// Where the supervisors' state is.
    supervisors: Option<PathBuf>,
}

/// The pilot's line to its guardian.
pub struct GuardianLink {
    stream: Mutex<(UnixStream, Word)>,
}

impl GuardianLink {
    /// Takes over the socket that is standard input, and gives standard input to nobody.
    ///
    /// # Errors
    /// When standard input is no socket: nobody's guardian has started this process.
    pub fn from_stdin() -> io::Result<Self> {
        let copy = io::stdin().as_fd().try_clone_to_owned()?;
        let stream = UnixStream::from(copy);
        stream.peer_addr()?;
        // The guardian reads at once; one that is stopped must not stop the pilot.
        stream.set_nonblocking(true)?;
        nix::unistd::dup2_stdin(fs::File::open("/dev/null")?)?;
        Ok(Self { stream: Mutex::new((stream, Word::default())) })
    }

    /// Tells that the signal handlers are in place: signals are held back until the first word.
    pub fn ready(&self) {
        self.tell(|_| {});
    }

    /// Tells when the batch system begins to kill.
    pub fn set_deadline(&self, deadline: Option<SystemTime>) {
        self.tell(|word| word.deadline = deadline);
    }

    /// Tells where the supervisors' state is.
    pub fn set_supervisors(&self, directory: &Path) {
        self.tell(|word| word.supervisors = Some(directory.to_owned()));
    }

    fn tell(&self, change: impl FnOnce(&mut Word)) {
        let mut guard = self.stream.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let (stream, word) = &mut *guard;
        change(word);
        if let Ok(mut line) = serde_json::to_vec(word) {
            line.push(b'\n');
            // A guardian that is gone needs to know nothing.
            let _ = stream.write_all(&line);
        }
    }
}

/// A line on standard error; one that nobody takes (a full disk, a terminal that is gone) ends nothing.
macro_rules! say {
    ($($part:tt)*) => {{
        let _ = writeln!(io::stderr(), $($part)*);
    }};
}

/// Runs the pilot with these arguments and these settings of a file until it ends for good.
#[must_use]
pub fn run(arguments: Vec<OsString>, settings: Option<String>) -> ExitCode {
    keep(Path::new("/proc/self/exe"), &arguments, settings)
}

/// As [`run`], with another program than this one: for tests.
#[must_use]
pub fn guard(program: &Path, arguments: &[OsString]) -> ExitCode {
    keep(program, arguments, None)
}

fn keep(program: &Path, arguments: &[OsString], settings: Option<String>) -> ExitCode {
    match Guardian::begin(settings).and_then(|mut guardian| guardian.guard(program, arguments)) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            say!("error: the guardian cannot go on: {error}");
            ExitCode::from(1)
        }
    }
}

struct Guardian {
    wake: UnixStream,
    signals: Signals,
    word: Word,
    crashes: Vec<Instant>,
    /// Signals that no pilot has got yet.
    pending: Vec<i32>,
    /// The first signal that asks for the end, and when it came.
    asked: Option<(i32, SystemTime)>,
    /// For [`SETTINGS`].
    settings: Option<String>,
}

struct Pilot {
    pid: Pid,
    stream: UnixStream,
    text: Vec<u8>,
    started: Instant,
    /// Whether it has its handlers, which its first word tells.
    listens: bool,
    /// Signals that came in its life.
    signals: Vec<i32>,
}

impl Pilot {
    /// How long a signal still waits: one without its handlers would die by it.
    fn deaf_for(&self) -> Duration {
        if self.listens { Duration::ZERO } else { SILENCE.saturating_sub(self.started.elapsed()) }
    }
}

/// The pilot has a handler for each: one that it had none for would end it, and count as a crash.
const FORWARDED: [Signal; 5] =
    [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGUSR1, Signal::SIGUSR2];

impl Guardian {
    fn begin(settings: Option<String>) -> io::Result<Self> {
        nix::sys::prctl::set_dumpable(false)?;
        nix::sys::prctl::set_child_subreaper(true)?;
        let (wake, write) = UnixStream::pair()?;
        wake.set_nonblocking(true)?;
        let signals = Signals::new(FORWARDED.map(|signal| signal as i32))?;
        for signal in FORWARDED.into_iter().chain([Signal::SIGCHLD]) {
            signal_hook::low_level::pipe::register(signal as i32, write.try_clone()?)?;
        }
        Ok(Self {
            wake,
            signals,
            word: Word::default(),
            crashes: Vec::new(),
            pending: Vec::new(),
            asked: None,
            settings,
        })
    }

    fn guard(&mut self, program: &Path, arguments: &[OsString]) -> io::Result<u8> {
        let mut restarts = 0u32;
        loop {
            let started = self.start(program, arguments, restarts);
            let watched = started.and_then(|mut pilot| self.watch(&mut pilot).map(|status| (pilot, status)));
            // Nobody is left who would end the pods.
            let (pilot, status) = watched.inspect_err(|_| self.kill_all(GIVE_UP_GRACE))?;
            let code = match status {
                Ended::Exit(code) => {
                    // What it leaves was detached by something that it ran.
                    self.kill_all(Duration::ZERO);
                    return Ok(code);
                }
                Ended::TooLate => {
                    say!("error: the pilot was still there at the deadline; it and all its pods are killed");
                    self.kill_all(Duration::ZERO);
                    return Ok(1);
                }
                Ended::Crash(signal) if is_asked_for(signal, &pilot.signals) => {
                    say!(
                        "error: the pilot died by {signal}, the signal that asks it to end, before it could handle it; its \
                         pods are ended"
                    );
                    self.kill_all(GIVE_UP_GRACE);
                    return Ok(1);
                }
                Ended::Crash(signal) => signal,
            };
            let now = Instant::now();
            self.crashes.retain(|crash| now.duration_since(*crash) < CRASH_WINDOW);
            self.crashes.push(now);
            if self.crashes.len() > CRASHES {
                say!(
                    "error: the pilot crashed ({code}) {} times within {} minutes; its pods are ended",
                    self.crashes.len(),
                    CRASH_WINDOW.as_secs() / 60
                );
                self.kill_all(GIVE_UP_GRACE);
                return Ok(1);
            }
            restarts += 1;
            // The one that was asked is dead: the next one has to end too.
            if let Some((signal, _)) = self.asked.filter(|(signal, _)| !self.pending.contains(signal)) {
                self.pending.push(signal);
            }
            say!("warning: the pilot crashed ({code}); it is started again, its pods go on");
        }
    }

    /// What killed the pilot, such as a want of memory, may keep the next one from starting for a moment.
    fn start(&self, program: &Path, arguments: &[OsString], restarts: u32) -> io::Result<Pilot> {
        let mut again = if restarts == 0 { 0 } else { START_TRIES };
        loop {
            match start(program, arguments, restarts, self.asked.map(|(_, at)| at), self.settings.as_deref())
            {
                Err(_) if again > 0 => std::thread::sleep(START_PAUSE),
                done => return done,
            }
            again -= 1;
        }
    }

    /// Until the pilot has ended.
    fn watch(&mut self, pilot: &mut Pilot) -> io::Result<Ended> {
        let mut strays = false;
        let mut reprieve: Option<(SystemTime, Instant)> = None;
        loop {
            let last = self.word.deadline.and_then(|deadline| deadline.checked_sub(LAST_MOMENT));
            let mut left = last.map(|last| last.duration_since(SystemTime::now()).unwrap_or_default());
            if let (Some(at), Some(Duration::ZERO)) = (last, left) {
                // Its last words first: the deadline may have moved.
                self.hear(pilot);
                let moved = self.word.deadline.and_then(|d| d.checked_sub(LAST_MOMENT)) != last;
                let over = SystemTime::now().duration_since(at).unwrap_or_default();
                let given =
                    reprieve.filter(|(deadline, _)| *deadline == at).map(|(_, since)| since.elapsed());
                let more = reprieve_left(over, given);
                if !moved && more.is_zero() {
                    let _ = kill(pilot.pid, Signal::SIGKILL);
                    return Ok(Ended::TooLate);
                }
                if !moved {
                    if given.is_none() {
                        say!(
                            "warning: this job stood still until after its deadline; the pilot asks whether it has moved"
                        );
                        reprieve = Some((at, Instant::now()));
                    }
                    left = Some(more);
                }
            }
            let mut wait = left.unwrap_or(Duration::MAX);
            if strays {
                wait = wait.min(LOOK_AGAIN);
            }
            if !self.pending.is_empty() {
                wait = wait.min(pilot.deaf_for());
            }
            let timeout = if wait == Duration::MAX {
                PollTimeout::NONE
            } else {
                // A millisecond more, so that the moment has come when poll returns.
                PollTimeout::try_from(wait + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX)
            };
            let mut fds = [
                PollFd::new(self.wake.as_fd(), PollFlags::POLLIN),
                PollFd::new(pilot.stream.as_fd(), PollFlags::POLLIN),
            ];
            match poll(&mut fds, timeout) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
            let mut bytes = [0; 64];
            while self.wake.read(&mut bytes).is_ok_and(|n| n == bytes.len()) {}
            let heard = self.hear(pilot);
            self.take_signals(pilot);
            if let Some(ended) = reap(pilot.pid) {
                // What came together with a crash is for the next pilot.
                self.take_signals(pilot);
                return Ok(ended);
            }
            self.forward(pilot);
            strays = self.end_strays(pilot.pid);
            if !heard {
                // A pilot that has closed its line is about to end: wait for its death without spinning.
                std::thread::sleep(Duration::from_millis(10));
            }
        }
    }

    /// Notes the signals that came. Each waits once at most, as in the kernel (signal(7)).
    fn take_signals(&mut self, pilot: &mut Pilot) {
        for signal in self.signals.pending() {
            if asks_for_the_end(signal) {
                self.asked.get_or_insert_with(|| (signal, SystemTime::now()));
            }
            for list in [&mut self.pending, &mut pilot.signals] {
                if !list.contains(&signal) {
                    list.push(signal);
                }
            }
        }
    }

    fn forward(&mut self, pilot: &Pilot) {
        if pilot.deaf_for().is_zero() {
            for signal in self.pending.drain(..) {
                send(pilot.pid, signal);
            }
        }
    }

    /// Takes what the pilot says; false when it says nothing any more.
    fn hear(&mut self, pilot: &mut Pilot) -> bool {
        let mut bytes = [0; 4096];
        loop {
            match pilot.stream.read(&mut bytes) {
                Ok(0) => return false,
                Ok(n) if pilot.text.len() + n <= LINE_BYTES => pilot.text.extend_from_slice(&bytes[..n]),
                // No line of a pilot's is so long.
                Ok(_) => pilot.text.clear(),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => break,
            }
        }
        if let Some(end) = pilot.text.iter().rposition(|byte| *byte == b'\n') {
            let whole: Vec<u8> = pilot.text.drain(..=end).collect();
            if let Some(word) =
                whole.split(|b| *b == b'\n').filter_map(|l| serde_json::from_slice(l).ok()).next_back()
            {
                // A pilot that is started again has not said yet where they are, and they are there all the same.
                let known = self.word.supervisors.take();
                self.word = word;
                self.word.supervisors = self.word.supervisors.take().or(known);
                pilot.listens = true;
            }
        }
        true
    }

    /// Kills children that are neither the pilot nor supervisors: the remains of dead supervisors. Whether there were any.
    fn end_strays(&self, pilot: Pid) -> bool {
        let own = nix::unistd::getpid().as_raw();
        let mut found = false;
        for pid in process::children(own).into_iter().filter(|pid| *pid != pilot.as_raw()) {
            let known = self.word.supervisors.as_ref().is_some_and(|directory| is_supervisor(directory, pid));
            if !known {
                found = true;
                process::kill_tree(pid);
            }
        }
        found
    }

    /// Ends everything that is left, with `grace` for the containers.
    fn kill_all(&self, grace: Duration) {
        if let Some(directory) = &self.word.supervisors {
            end_supervisors(directory, grace);
        }
        let own = nix::unistd::getpid().as_raw();
        // Bounded: what is left after a second is in uninterruptible sleep.
        for _ in 0..100 {
            let left = process::descendants(own);
            for pid in &left {
                let _ = kill(Pid::from_raw(*pid), Signal::SIGKILL);
            }
            while matches!(waitpid(Pid::from_raw(-1), Some(WaitPidFlag::WNOHANG)), Ok(status) if status != WaitStatus::StillAlive)
            {
            }
            if left.is_empty() {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// How a pilot ended.
enum Ended {
    Exit(u8),
    Crash(Signal),
    TooLate,
}

fn start(
    program: &Path,
    arguments: &[OsString],
    restarts: u32,
    asked: Option<SystemTime>,
    settings: Option<&str>,
) -> io::Result<Pilot> {
    let (ours, theirs) = UnixStream::pair()?;
    ours.set_nonblocking(true)?;
    let mut command = Command::new(program);
    command.arg0(NAME);
    command.args(arguments).stdin(Stdio::from(OwnedFd::from(theirs)));
    if restarts > 0 {
        command.env(RESTARTED, restarts.to_string());
    } else {
        command.env_remove(RESTARTED);
    }
    match asked.and_then(|at| at.duration_since(SystemTime::UNIX_EPOCH).ok()) {
        Some(at) => command.env(ASKED, at.as_millis().to_string()),
        None => command.env_remove(ASKED),
    };
    match settings {
        Some(settings) => command.env(SETTINGS, settings),
        None => command.env_remove(SETTINGS),
    };
    let child = command.spawn()?;
    Ok(Pilot {
        pid: Pid::from_raw(i32::try_from(child.id()).unwrap_or(i32::MAX)),
        stream: ours,
        text: Vec::new(),
        started: Instant::now(),
        listens: false,
        signals: Vec::new(),
    })
}

/// Whether a pilot's death by this signal is an end that was asked for, not a crash.
fn is_asked_for(signal: Signal, came: &[i32]) -> bool {
    asks_for_the_end(signal as i32) && came.contains(&(signal as i32))
}

fn asks_for_the_end(signal: i32) -> bool {
    [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP].iter().any(|end| *end as i32 == signal)
}

fn send(pid: Pid, signal: i32) {
    if let Ok(signal) = Signal::try_from(signal) {
        let _ = kill(pid, signal);
    }
}

/// Reaps all children that have ended; how the pilot did, if it is among them.
fn reap(pilot: Pid) -> Option<Ended> {
    let mut found = None;
    loop {
        match waitpid(Pid::from_raw(-1), Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::Exited(pid, code)) if pid == pilot => {
                found = Some(Ended::Exit(u8::try_from(code).unwrap_or(1)));
            }
            Ok(WaitStatus::Signaled(pid, signal, _)) if pid == pilot => found = Some(Ended::Crash(signal)),
            Ok(WaitStatus::StillAlive) | Err(_) => return found,
            Ok(_) => {}
        }
    }
}

/// How much longer a pilot is let live that is there so long after its last moment; `given`: how long ago it was granted that.
fn reprieve_left(over: Duration, given: Option<Duration>) -> Duration {
    match given {
        Some(given) => REPRIEVE.saturating_sub(given),
        None if over > STOOD_STILL => REPRIEVE,
        None => Duration::ZERO,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_signal_that_came_and_means_the_end_is_no_crash() {
        let came = [Signal::SIGTERM as i32, Signal::SIGUSR1 as i32, Signal::SIGHUP as i32];
        for (signal, asked) in [
            (Signal::SIGTERM, true),
            (Signal::SIGHUP, true),
            (Signal::SIGINT, false),
            (Signal::SIGUSR1, false),
            (Signal::SIGKILL, false),
            (Signal::SIGSEGV, false),
        ] {
            assert_eq!(is_asked_for(signal, &came), asked, "{signal}");
        }
    }

    #[test]
    fn a_pilot_that_stood_still_over_its_deadline_gets_time_to_ask_once() {
        let secs = Duration::from_secs;
        for (over, given, more) in [
            (0, None, 0),
            (3, None, 0),
            (4, None, 15),
            (3600, None, 15),
            (3605, Some(5), 10),
            (3615, Some(15), 0),
            (3700, Some(100), 0),
        ] {
            assert_eq!(reprieve_left(secs(over), given.map(secs)), secs(more), "{over} {given:?}");
        }
    }
}
