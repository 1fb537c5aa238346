//! The third stage: turns itself into the container's program.
//!
//! Started by the supervisor before the container is known, with an empty environment and a socket as standard input, on
//! which the settings come. All that must happen between fork and exec happens here, in a process of its own: so nothing
//! needs `pre_exec` or unsafe code. A program that cannot be run is told on the socket; a successful exec closes it.

use std::fs;
use std::io::{self, Write as _};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigSet, SigmaskHow, sigprocmask};
use nix::sys::stat::{Mode, umask};
use nix::unistd::{Pid, dup2_stderr, dup2_stdin, dup2_stdout, getpid, setpgid, setsid};

use super::descriptors;
use super::exec::exec;
use super::log::{self, LogLimits};
use super::protocol::{LINE_BYTES, Launch, Session, StartError, Stdin, line};

/// pbs_attach asks the MOM of its own host.
const ATTACH_LIMIT: Duration = Duration::from_secs(5);

/// The `launch` stage's main.
#[must_use]
pub fn launch() -> ExitCode {
    let Ok(copy) = io::stdin().as_fd().try_clone_to_owned() else { return ExitCode::from(128) };
    let socket = UnixStream::from(copy);
    let (mut text, mut given) = (Vec::new(), Vec::new());
    let read = read_settings(&socket, &mut text, &mut given);
    if text.is_empty() {
        // The supervisor is gone, or has no use for it: nothing was to be started.
        return ExitCode::SUCCESS;
    }
    let launch: Launch = match read
        .map_err(|e| e.to_string())
        .and_then(|()| serde_json::from_slice(&text).map_err(|e| e.to_string()))
    {
        Ok(launch) => launch,
        Err(problem) => {
            return fail(&socket, &StartError::Other { what: "reading what to start".to_owned(), problem });
        }
    };
    let error = become_container(&launch, given.into_iter().next(), socket.as_raw_fd())
        .err()
        .unwrap_or_else(|| exec(&launch.argv, &launch.env));
    fail(&socket, &error)
}

/// Reads one line, with the descriptors that come along.
fn read_settings(socket: &UnixStream, text: &mut Vec<u8>, given: &mut Vec<OwnedFd>) -> io::Result<()> {
    let mut bytes = [0; 16 * 1024];
    while text.last() != Some(&b'\n') && text.len() < LINE_BYTES {
        match descriptors::receive(socket.as_fd(), &mut bytes, given) {
            Ok((0, _)) => break,
            Ok((n, _)) => text.extend_from_slice(&bytes[..n]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn fail(mut socket: &UnixStream, error: &StartError) -> ExitCode {
    let _ = socket.write_all(&line(error));
    ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(128))
}

fn other(what: &str) -> impl Fn(Errno) -> StartError {
    let what = what.to_owned();
    move |errno| StartError::Other { what: what.clone(), problem: errno.desc().to_owned() }
}

fn become_container(launch: &Launch, given: Option<OwnedFd>, keep: RawFd) -> Result<(), StartError> {
    let terminal = launch.stdin == Stdin::Terminal;
    match launch.session {
        // A terminal belongs to a session, whose first process this must be.
        Session::Own => setsid().map(drop).map_err(other("making a session"))?,
        Session::Shared if terminal => {
            setsid().map_err(other("making a session"))?;
            attach_to_job(&launch.env);
        }
        Session::Shared => {
            setpgid(Pid::from_raw(0), Pid::from_raw(0)).map_err(other("making a process group"))?
        }
    }
    umask(Mode::from_bits_truncate(0o022));
    if let Some(dir) = &launch.container_dir {
        let pgid = dir.join("pgid");
        fs::write(&pgid, format!("{}\n", getpid())).map_err(|error| StartError::Other {
            what: format!("writing {}", pgid.display()),
            problem: error.to_string(),
        })?;
    }
    // The log is there from the start, also for a container that says nothing. One that cannot be made holds nothing up.
    if let Some(path) = &launch.log {
        let _ = log::open(path);
        log::forget_old(path, LogLimits::default().files);
    }
    if let Some(adjustment) = launch.oom_score_adj {
        // Raising it needs no right; where it fails all the same, the container runs as it is.
        let _ = fs::write("/proc/self/oom_score_adj", adjustment.to_string());
    }
    if let Some(limit) = launch.open_files {
        let (_, hard) =
            getrlimit(Resource::RLIMIT_NOFILE).map_err(other("reading the limit of open files"))?;
        setrlimit(Resource::RLIMIT_NOFILE, limit.min(hard), hard)
            .map_err(other("setting the limit of open files"))?;
    }
    set_stdin(launch.stdin, given)?;
    close_inherited(keep);
    std::env::set_current_dir(&launch.working_dir).map_err(|error| StartError::WorkingDirectory {
        path: launch.working_dir.display().to_string(),
        problem: error.to_string(),
    })?;
    reset_ignored_signals();
    if launch.no_new_privs {
        nix::sys::prctl::set_no_new_privs().map_err(other("giving up any new privileges"))?;
    }
    Ok(())
}

fn set_stdin(stdin: Stdin, given: Option<OwnedFd>) -> Result<(), StartError> {
    let missing = || StartError::Other {
        what: "standard input".to_owned(),
        problem: "the descriptor that was to come along did not".to_owned(),
    };
    match stdin {
        Stdin::Null => {
            let null = fs::File::open("/dev/null").map_err(|error| StartError::Other {
                what: "/dev/null".to_owned(),
                problem: error.to_string(),
            })?;
            dup2_stdin(&null).map_err(other("standard input"))
        }
        Stdin::Given => dup2_stdin(given.ok_or_else(missing)?).map_err(other("standard input")),
        Stdin::Terminal => {
            let terminal = given.ok_or_else(missing)?;
            rustix::process::ioctl_tiocsctty(&terminal).map_err(|error| StartError::Other {
                what: "taking the terminal".to_owned(),
                problem: error.to_string(),
            })?;
            dup2_stdin(&terminal).map_err(other("standard input"))?;
            dup2_stdout(&terminal).map_err(other("standard output"))?;
            dup2_stderr(&terminal).map_err(other("standard error"))
        }
    }
}

/// PBS tracks and kills a job by its sessions: one that is new to it must be told (pbs_attach(8)). Where there is no such
/// program the session still ends with its container, by the supervisor.
fn attach_to_job(env: &[(String, String)]) {
    let value = |name: &str| env.iter().rev().find(|(n, _)| n == name).map(|(_, value)| value.as_str());
    let Some(job) = value("PBS_JOBID") else { return };
    let command = std::process::Command::new("pbs_attach")
        .args(["-j", job, "-p", &getpid().to_string()])
        .env("PATH", value("PATH").unwrap_or_default())
        .stdin(std::process::Stdio::null())
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .spawn();
    let Ok(mut child) = command else { return };
    let end = Instant::now() + ATTACH_LIMIT;
    while matches!(child.try_wait(), Ok(None)) {
        if Instant::now() >= end {
            let _ = child.kill();
            let _ = child.wait();
            return;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A signal that was ignored when a shell starts can never be trapped by it. What has a handler becomes default by exec
/// (execve(2)), so each ignored signal is given a handler (std ignores SIGPIPE itself).
fn reset_ignored_signals() {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let handler = Arc::new(AtomicBool::new(false));
    for signal in ignored(&status) {
        // Those that refuse a handler cannot be ignored either.
        let _ = signal_hook::flag::register(signal, Arc::clone(&handler));
    }
    let _ = sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None);
}

/// Descriptors that came down from the batch system or a shell and were never meant for a container.
fn close_inherited(keep: RawFd) {
    let entries = fs::read_dir("/proc/self/fd").into_iter().flatten().flatten();
    let open: Vec<RawFd> = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
    for fd in open.into_iter().filter(|fd| *fd > 2 && *fd != keep) {
        // The listing's own is closed by now.
        let _ = nix::unistd::close(fd);
    }
}

/// The signals of the line `SigIgn:` (proc(5)), bit n-1 for signal n. Real-time signals are left alone.
fn ignored(status: &str) -> Vec<i32> {
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:")).map(str::trim);
    let mask = mask.and_then(|mask| u64::from_str_radix(mask, 16).ok()).unwrap_or(0);
    (1..=31).filter(|signal| mask & (1 << (signal - 1)) != 0).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ignored_signals_are_read_from_the_mask() {
        assert_eq!(ignored("Name:\tx\nSigIgn:\t0000000000001201\n"), [1, 10, 13]);
        assert!(ignored("").is_empty());
    }
}
