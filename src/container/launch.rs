//! The third stage: turns itself into the container's program.
//!
//! Started by the supervisor before the container is known, with an empty environment and a socket as standard input, on
//! which the settings come. All that must happen between fork and exec happens here, in a process of its own: so nothing
//! needs `pre_exec` or unsafe code. A program that cannot be run is told on the socket; a successful exec closes it.

use std::fs;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{OFlag, openat};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigSet, SigmaskHow, sigprocmask};
use nix::sys::stat::{Mode, umask};
use nix::unistd::{Pid, dup2_stderr, dup2_stdin, dup2_stdout, getpid, setpgid, setsid};

use super::descriptors;
use super::exec::exec;
use super::isolation::{self, Handed, OwnHanded, Word};
use super::log::{self, LogLimits};
use super::protocol::{LINE_BYTES, Launch, Namespaces, Session, StartError, Stdin, line};
use super::{affinity, cgroup};

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
    match &launch.place {
        Namespaces::Outer => {
            let error = become_container(&launch, None, given.into_iter().next(), socket.as_raw_fd())
                .err()
                .unwrap_or_else(|| exec(&launch.argv, &launch.env));
            fail(&socket, &error)
        }
        Namespaces::New(_) | Namespaces::Of(_) => match start_in_namespaces(launch, given, &socket) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => fail(&socket, &error),
        },
    }
}

/// Starts the next stage in namespaces, new ones or a container's, and is done.
fn start_in_namespaces(
    mut launch: Launch,
    mut given: Vec<OwnedFd>,
    socket: &UnixStream,
) -> Result<(), StartError> {
    let io = |what: &'static str| {
        move |error: io::Error| StartError::Other { what: what.to_owned(), problem: error.to_string() }
    };
    let missing = || io("a container in namespaces")(io::ErrorKind::UnexpectedEof.into());
    let words = given.pop().ok_or_else(missing)?;
    let answer = socket.as_fd().try_clone_to_owned().map_err(io("the way to complain"))?;
    let place = std::mem::take(&mut launch.place);
    launch.in_namespaces = true;
    let settings = isolation::settings(&launch).map_err(io("handing the settings on"))?;
    let own = match (&place, &launch.container_dir) {
        (Namespaces::New(view), Some(directory)) => {
            make_log(&launch, view.owner.as_deref());
            isolation::namespaces::separate(view)?;
            let open = |path: &Path| fs::File::open(path).map(OwnedFd::from);
            let (proc, own) = (open(Path::new("/proc")), open(directory));
            isolation::view::build(view, Some(directory))?;
            Some(OwnHanded {
                words: words.try_clone().map_err(io("the pipe for words"))?,
                proc: proc.map_err(io("/proc"))?,
                directory: own.map_err(io("the container's directory"))?,
            })
        }
        (Namespaces::Of(init), _) => {
            isolation::namespaces::enter(*init)?;
            isolation::namespaces::give_capabilities_up()?;
            None
        }
        (Namespaces::New(_) | Namespaces::Outer, _) => return Err(missing()),
    };
    let handed = Handed { answer, settings, own, stdin: given.into_iter().next() };
    isolation::start(&launch, &handed, &words)
}

/// The main of the stage that becomes a program in namespaces: what it needs comes on its standard input.
#[must_use]
pub fn become_program() -> ExitCode {
    let stdin = io::stdin();
    let Ok(Handed { answer, settings, own, stdin: given }) = Handed::receive(stdin.as_fd()) else {
        return ExitCode::from(128);
    };
    let socket = UnixStream::from(answer);
    let mut text = Vec::new();
    let read = fs::File::from(settings).read_to_end(&mut text);
    let mut launch: Launch =
        match read.map_err(serde_json::Error::io).and_then(|_| serde_json::from_slice(&text)) {
            Ok(launch) => launch,
            Err(error) => {
                let what = "reading what to become".to_owned();
                return fail(&socket, &StartError::Other { what, problem: error.to_string() });
            }
        };
    // A pod's directory is reached by a link of ours; shells show the path that was meant when they are told of it.
    launch.env.retain(|(name, _)| name != "PWD");
    launch.env.push(("PWD".to_owned(), launch.working_dir.display().to_string()));
    let error = become_container(&launch, own, given, socket.as_raw_fd())
        .err()
        .unwrap_or_else(|| exec(&launch.argv, &launch.env));
    fail(&socket, &error)
}

/// The log is there from the start, also for a container that says nothing. One that cannot be made holds nothing up.
fn make_log(launch: &Launch, owner: Option<&str>) {
    if let Some(path) = &launch.log {
        let _ = log::open(path, owner);
        log::forget_old(path, LogLimits::default().files, owner);
    }
}

/// Says which process this is on the host, and writes its group's number there.
fn name_own_group(own: &OwnHanded) -> io::Result<()> {
    // The host's /proc tells each process its number there.
    let pid = nix::fcntl::readlinkat(&own.proc, "self")?;
    let text = pid.to_string_lossy();
    let pid: i32 = text.parse().map_err(|_| io::Error::other(format!("/proc/self leads to {text:?}")))?;
    Word::Program(pid).say(own.words.as_fd());
    let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_TRUNC | OFlag::O_CLOEXEC;
    let file = openat(&own.directory, "pgid", flags, Mode::from_bits_truncate(0o666))?;
    fs::File::from(file).write_all(format!("{pid}\n").as_bytes())
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

/// All that comes before the exec. `own` is there for a container's own program in namespaces.
fn become_container(
    launch: &Launch,
    own: Option<OwnHanded>,
    given: Option<OwnedFd>,
    keep: RawFd,
) -> Result<(), StartError> {
    let terminal = launch.stdin == Stdin::Terminal;
    match launch.session {
        // A terminal belongs to a session, whose first process this must be.
        Session::Own => setsid().map(drop).map_err(other("making a session"))?,
        Session::Shared if terminal => {
            setsid().map_err(other("making a session"))?;
            // In a PID namespace pbs_attach knows neither the process nor its session by the host's numbers. There is
            // no need either: whatever is there ends with init, which is in the job's session.
            if !launch.in_namespaces {
                attach_to_job(&launch.env);
            }
        }
        Session::Shared => {
            setpgid(Pid::from_raw(0), Pid::from_raw(0)).map_err(other("making a process group"))?
        }
    }
    umask(Mode::from_bits_truncate(0o022));
    if let Some(own) = own {
        name_own_group(&own).map_err(|error| StartError::Other {
            what: "writing pgid into the container's directory".to_owned(),
            problem: error.to_string(),
        })?;
    } else if let Some(dir) = &launch.container_dir {
        let pgid = dir.join("pgid");
        fs::write(&pgid, format!("{}\n", getpid())).map_err(|error| StartError::Other {
            what: format!("writing {}", pgid.display()),
            problem: error.to_string(),
        })?;
        make_log(launch, None);
    }
    if let Some(adjustment) = launch.oom_score_adj {
        // Raising it needs no right; where it fails all the same, the container runs as it is.
        let _ = fs::write("/proc/self/oom_score_adj", adjustment.to_string());
    }
    cgroup::enter(&launch.doors);
    affinity::set_own(&launch.cpus);
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
