//! The first process of a container's PID namespace: mounts /proc, starts the program, reaps, ends with it.
//!
//! It handles no signal, so that none of the container's own reaches it, and of the host's only SIGKILL
//! (pid_namespaces(7)). When it ends, the kernel kills all that is left in the namespace.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::process::{Command, ExitCode, Stdio};

use nix::mount::{MsFlags, mount};
use nix::unistd::{dup2_stderr, dup2_stdin, dup2_stdout};
use rustix::process::{WaitOptions, wait};

use super::super::protocol::{StartError, line};
use super::{Handed, Word, namespaces, other, receive_one};

/// The stage's main: a socket is its standard input, with the pipe for words, and then what the next stage takes from it.
#[must_use]
pub fn init() -> ExitCode {
    let Ok(socket) = io::stdin().as_fd().try_clone_to_owned() else { return ExitCode::from(128) };
    let Ok((kind, given)) = receive_one(socket.as_fd()) else { return ExitCode::from(128) };
    if let Err(error) = mount_proc() {
        return refuse(&socket, kind, &error);
    }
    let Some(words) = given.into_iter().next() else {
        // A trial wants no more.
        return ExitCode::SUCCESS;
    };
    let mark = std::env::vars_os().next();
    let spawned = namespaces::give_capabilities_up().and_then(|()| {
        let mut command = Command::new("/proc/self/exe");
        command.arg0("jiriaf-pilot").arg("become").env_clear().envs(mark).stdin(Stdio::inherit());
        command.spawn().map_err(|error| other("starting the stage that becomes the program", &error))
    });
    let program = match spawned {
        // In this namespace: what waitpid tells.
        Ok(child) => i32::try_from(child.id()).unwrap_or(i32::MAX),
        Err(error) => return refuse(&socket, kind, &error),
    };
    drop(socket);
    // The outputs end with the container's own processes, which may close them while they run.
    if let Ok(null) = File::options().read(true).write(true).open("/dev/null") {
        let _ = (dup2_stdin(&null), dup2_stdout(&null), dup2_stderr(&null));
    }
    watch(program, &words)
}

fn mount_proc() -> Result<(), StartError> {
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("proc"), "/proc", Some("proc"), flags, None::<&str>)
        .map_err(|errno| other("mounting /proc", &errno.desc()))
}

/// Says why there will be no program: to the supervisor, or to whoever makes a trial.
fn refuse(socket: &OwnedFd, kind: u8, error: &StartError) -> ExitCode {
    let answer = if kind == b't' {
        io::stdout().as_fd().try_clone_to_owned()
    } else {
        Handed::receive(socket.as_fd()).map(|handed| handed.answer)
    };
    if let Ok(answer) = answer {
        let _ = rustix::io::write(&answer, &line(error));
    }
    ExitCode::from(128)
}

fn watch(program: i32, words: &OwnedFd) -> ExitCode {
    loop {
        match wait(WaitOptions::empty()) {
            Ok(Some((pid, status))) if pid.as_raw_nonzero().get() == program => {
                let word = match (status.exit_status(), status.terminating_signal()) {
                    (Some(code), _) => Word::Exited(code),
                    (None, Some(signal)) => Word::Killed(signal),
                    (None, None) => continue,
                };
                word.say(words.as_fd());
                return ExitCode::SUCCESS;
            }
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            // No child is left and the program's end was not seen: that cannot be; the supervisor sees this end.
            Err(_) => return ExitCode::from(128),
        }
    }
}
