//! A container in user, mount, PID and UTS namespaces of its own (user_namespaces(7), mount_namespaces(7),
//! pid_namespaces(7), uts_namespaces(7)).
//!
//! The third stage makes the namespaces ([`namespaces`]) and what is seen in them ([`view`]), then starts [`init`], the
//! first process of the PID namespace, and is gone. Init mounts /proc, starts the container's program by a stage of its
//! own (`become`), reaps, and ends when the program ends: then the kernel kills whatever else is there. What the supervisor
//! has to know on the way comes as [`Word`]s on a pipe. A program that joins the container (exec) enters the namespaces in
//! its third stage and needs no init. [`problem`] tells at the pilot's start whether a host permits all this.
//!
//! No helper program, no `pre_exec` and no unsafe code: each step between two processes is an exec of this binary.

mod init;
pub(super) mod namespaces;
mod place;
mod trial;
pub(super) mod view;

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, Stdio};

use nix::sys::signal::Signal;
use nix::sys::wait::WaitStatus;
use nix::unistd::Pid;
use rustix::fs::{MemfdFlags, memfd_create};
use serde::{Deserialize, Serialize};

pub use self::init::init;
pub use self::trial::{problem, try_namespaces};
use super::protocol::{Launch, StartError, line};
use super::{MARK, descriptors};

/// The file of a container's directory that appears at the termination message's path.
pub const TERMINATION_LOG: &str = "termination-log";

/// Words of one container: four short lines.
const WORDS_BYTES: usize = 4096;

/// What the stages tell the supervisor. Numbers of processes are the host's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Word {
    /// The PID namespace's first process.
    Init(i32),
    /// The program's process, before its exec.
    Program(i32),
    /// The program has ended by itself.
    Exited(i32),
    /// A signal has ended the program.
    Killed(i32),
}

impl Word {
    /// Says it; where nobody listens, the supervisor is gone and kills what it left.
    pub(super) fn say(self, words: BorrowedFd<'_>) {
        // A pipe takes so little at once (pipe(7), PIPE_BUF).
        let _ = rustix::io::write(words, &line(&self));
    }
}

/// The supervisor's end of the pipe.
pub(super) struct Words {
    pipe: File,
    text: Vec<u8>,
    /// The PID namespace's first process.
    pub(super) init: Option<i32>,
    /// The program's process.
    pub(super) program: Option<i32>,
    /// How the program ended.
    pub(super) end: Option<WaitStatus>,
    /// Whether more may come.
    pub(super) open: bool,
}

impl Words {
    /// The pipe: the end that is read here, and the one that the stages write.
    pub(super) fn new() -> io::Result<(Self, OwnedFd)> {
        let (ours, theirs) = io::pipe()?;
        super::peer::set_nonblocking(ours.as_fd())?;
        let pipe = File::from(OwnedFd::from(ours));
        let words = Self { pipe, text: Vec::new(), init: None, program: None, end: None, open: true };
        Ok((words, theirs.into()))
    }

    /// Takes what was said until now.
    pub(super) fn hear(&mut self) {
        let mut bytes = [0; 256];
        while self.open && self.text.len() < WORDS_BYTES {
            match self.pipe.read(&mut bytes) {
                Ok(0) => self.open = false,
                Ok(n) => self.text.extend_from_slice(&bytes[..n]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(_) => self.open = false,
            }
        }
        let Some(end) = self.text.iter().rposition(|byte| *byte == b'\n') else {
            // No word of ours is so long, and the next one has to be heard.
            if self.text.len() >= WORDS_BYTES {
                self.text.clear();
            }
            return;
        };
        let rest = self.text.split_off(end + 1);
        for word in std::mem::replace(&mut self.text, rest).split(|byte| *byte == b'\n') {
            match serde_json::from_slice(word) {
                // Ours come before the program's first instruction. What comes later may be the program's, and would have
                // others signalled or entered in its place.
                Ok(Word::Init(pid)) if pid > 1 => drop(self.init.get_or_insert(pid)),
                Ok(Word::Program(pid)) if pid > 1 => drop(self.program.get_or_insert(pid)),
                Ok(Word::Exited(code)) => self.end = Some(WaitStatus::Exited(Pid::from_raw(0), code)),
                Ok(Word::Killed(signal)) => self.end = Some(killed(signal)),
                Ok(Word::Init(_) | Word::Program(_)) | Err(_) => {}
            }
        }
    }
}

impl AsFd for Words {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pipe.as_fd()
    }
}

/// A real-time signal has no name in nix: its exit code says it.
fn killed(signal: i32) -> WaitStatus {
    Signal::try_from(signal).map_or_else(
        |_| WaitStatus::Exited(Pid::from_raw(0), 128 + signal),
        |signal| WaitStatus::Signaled(Pid::from_raw(0), signal, false),
    )
}

/// What a stage hands to the next one, as descriptors on a socket that is its standard input: numbers in an argument
/// could not be made descriptors again by safe code. In this order.
pub(super) struct Handed {
    /// On which the stages complain; closed by the program's exec.
    pub(super) answer: OwnedFd,
    /// The [`Launch`], as JSON: too large for a socket that nobody reads yet.
    pub(super) settings: OwnedFd,
    /// Of a container's own program, not of one that joins it.
    pub(super) own: Option<OwnHanded>,
    /// What its standard input is made of, where something is.
    pub(super) stdin: Option<OwnedFd>,
}

/// The part of [`Handed`] that only a container's own program gets.
pub(super) struct OwnHanded {
    /// Where [`Word`]s go.
    pub(super) words: OwnedFd,
    /// The host's /proc, in which a process finds its number there.
    pub(super) proc: OwnedFd,
    /// The container's directory, which a volume may cover.
    pub(super) directory: OwnedFd,
}

impl Handed {
    fn send(&self, socket: &UnixStream) -> io::Result<()> {
        let mut all = vec![self.answer.as_fd(), self.settings.as_fd()];
        if let Some(own) = &self.own {
            all.extend([own.words.as_fd(), own.proc.as_fd(), own.directory.as_fd()]);
        }
        all.extend(self.stdin.as_ref().map(AsFd::as_fd));
        let flag = if self.own.is_some() { b"o" } else { b"j" };
        descriptors::send(socket.as_fd(), flag, &all).map(drop)
    }

    /// Takes what [`Handed::send`] sent.
    pub(super) fn receive(socket: BorrowedFd<'_>) -> io::Result<Self> {
        let (flag, given) = receive_one(socket)?;
        let mut given = given.into_iter();
        let mut next = || given.next().ok_or_else(|| io::Error::other("a descriptor did not come along"));
        let (answer, settings) = (next()?, next()?);
        let own = match flag {
            b'o' => Some(OwnHanded { words: next()?, proc: next()?, directory: next()? }),
            _ => None,
        };
        Ok(Self { answer, settings, own, stdin: given.next() })
    }
}

/// One byte and the descriptors beside it: never those of the next byte.
fn receive_one(socket: BorrowedFd<'_>) -> io::Result<(u8, Vec<OwnedFd>)> {
    let (mut byte, mut given) = ([0], Vec::new());
    loop {
        match descriptors::receive(socket, &mut byte, &mut given) {
            Ok((1, _)) => return Ok((byte[0], given)),
            Ok(_) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// The settings, in memory that has no name.
pub(super) fn settings(launch: &Launch) -> io::Result<OwnedFd> {
    let mut file = File::from(memfd_create("launch", MemfdFlags::CLOEXEC)?);
    file.write_all(&line(launch))?;
    io::Seek::rewind(&mut file)?;
    Ok(file.into())
}

/// Starts the next stage with a socket as its standard input and our outputs. The container's mark, by which what is left
/// of one is found, is its whole environment.
fn stage(name: &str, socket: OwnedFd, launch: &Launch) -> io::Result<Child> {
    let mark = launch.env.iter().rev().find(|(name, _)| name == MARK);
    // Resolved in the child, also where the /proc of this process is no longer its own.
    Command::new("/proc/self/exe")
        .arg0("jiriaf-pilot")
        .arg(name)
        .env_clear()
        .envs(mark.map(|(name, value)| (name, value)))
        .stdin(Stdio::from(socket))
        .spawn()
}

/// Starts init, or the stage that becomes a program which joins; both are the supervisor's children when this process is
/// gone, which is a moment later.
pub(super) fn start(launch: &Launch, handed: &Handed, words: &OwnedFd) -> Result<(), StartError> {
    let failed = |error: io::Error| other("starting a process in the namespaces", &error);
    let (ours, theirs) = UnixStream::pair().map_err(failed)?;
    let init = handed.own.is_some();
    if init {
        descriptors::send(ours.as_fd(), b"i", &[words.as_fd()]).map_err(failed)?;
    }
    handed.send(&ours).map_err(failed)?;
    let child = stage(if init { "init" } else { "become" }, theirs.into(), launch).map_err(failed)?;
    let pid = i32::try_from(child.id()).unwrap_or(i32::MAX);
    if init { Word::Init(pid) } else { Word::Program(pid) }.say(words.as_fd());
    Ok(())
}

fn other(what: &str, problem: &dyn std::fmt::Display) -> StartError {
    StartError::Other { what: what.to_owned(), problem: problem.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_come_whole_and_in_any_pieces() {
        let (mut words, theirs) = Words::new().unwrap();
        words.hear();
        assert!(words.open && words.init.is_none());
        Word::Init(41).say(theirs.as_fd());
        let mut theirs = File::from(theirs);
        theirs.write_all(b"{\"Program\":").unwrap();
        words.hear();
        assert_eq!((words.init, words.program), (Some(41), None));
        theirs.write_all(b"42}\n").unwrap();
        Word::Killed(15).say(theirs.as_fd());
        drop(theirs);
        words.hear();
        assert_eq!((words.program, words.open), (Some(42), false));
        assert!(matches!(words.end, Some(WaitStatus::Signaled(_, Signal::SIGTERM, _))));
        assert!(matches!(killed(35), WaitStatus::Exited(_, 163)));
    }

    #[test]
    fn what_the_program_says_in_our_place_changes_no_process_and_stops_no_word() {
        let (mut words, theirs) = Words::new().unwrap();
        let mut theirs = File::from(theirs);
        theirs.write_all(b"{\"Program\":1}\n").unwrap();
        Word::Init(41).say(theirs.as_fd());
        Word::Program(42).say(theirs.as_fd());
        theirs.write_all(b"{\"Program\":7}\n{\"Init\":8}\n").unwrap();
        theirs.write_all(&[b'x'; WORDS_BYTES + 300]).unwrap();
        words.hear();
        words.hear();
        assert_eq!((words.init, words.program), (Some(41), Some(42)));
        theirs.write_all(b"\n").unwrap();
        Word::Exited(3).say(theirs.as_fd());
        words.hear();
        assert!(matches!(words.end, Some(WaitStatus::Exited(_, 3))));
    }

    #[test]
    fn what_is_handed_on_arrives_in_its_place() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let file = |text: &str| {
            let mut file = File::from(memfd_create("x", MemfdFlags::CLOEXEC).unwrap());
            file.write_all(text.as_bytes()).unwrap();
            io::Seek::rewind(&mut file).unwrap();
            OwnedFd::from(file)
        };
        let own = OwnHanded { words: file("words"), proc: file("proc"), directory: file("directory") };
        for (own, stdin) in [(Some(own), None), (None, Some(file("stdin"))), (None, None)] {
            let sent = Handed { answer: file("answer"), settings: file("settings"), own, stdin };
            let has = (sent.own.is_some(), sent.stdin.is_some());
            sent.send(&ours).unwrap();
            let got = Handed::receive(theirs.as_fd()).unwrap();
            assert_eq!((got.own.is_some(), got.stdin.is_some()), has);
            let mut all = vec![("answer", got.answer), ("settings", got.settings)];
            if let Some(own) = got.own {
                all.extend([("words", own.words), ("proc", own.proc), ("directory", own.directory)]);
            }
            all.extend(got.stdin.map(|stdin| ("stdin", stdin)));
            for (wanted, fd) in all {
                let mut text = String::new();
                File::from(fd).read_to_string(&mut text).unwrap();
                assert_eq!(text, wanted);
            }
        }
    }
}
