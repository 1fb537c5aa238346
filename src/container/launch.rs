//! The third stage: turns itself into the container's program.
//!
//! Started by the supervisor with the container's environment and a socket as standard input. All that must happen
//! between fork and exec happens here, in a process of its own: so nothing needs `pre_exec` or unsafe code. A program
//! that cannot be run is told on the socket; a successful exec closes it.

use std::ffi::CString;
use std::fs;
use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::signal::SigSet;
use nix::sys::stat::{Mode, umask};
use nix::unistd::{Pid, dup2_stdin, execv, getpid, setpgid, setsid};

use super::log;
use super::protocol::{LINE_BYTES, Launch, Session, StartError, line};

/// A script that was just written may still be open for writing in a process between fork and exec (ETXTBSY).
const BUSY_LIMIT: Duration = Duration::from_millis(200);

/// Where programs are looked for when a container has no PATH: as glibc and musl do, less the latter's /usr/local.
const DEFAULT_PATH: &str = "/bin:/usr/bin";

/// The `launch` stage's main.
#[must_use]
pub fn launch() -> ExitCode {
    let Ok(copy) = io::stdin().as_fd().try_clone_to_owned() else { return ExitCode::from(128) };
    let socket = UnixStream::from(copy);
    let mut text = Vec::new();
    let read = BufReader::new((&socket).take(LINE_BYTES as u64)).read_until(b'\n', &mut text);
    let launch: Launch = match read
        .map_err(|e| e.to_string())
        .and_then(|_| serde_json::from_slice(&text).map_err(|e| e.to_string()))
    {
        Ok(launch) => launch,
        Err(problem) => {
            return fail(&socket, &StartError::Other { what: "reading what to start".to_owned(), problem });
        }
    };
    let error = become_container(&launch).err().unwrap_or_else(|| exec(&launch));
    fail(&socket, &error)
}

fn fail(mut socket: &UnixStream, error: &StartError) -> ExitCode {
    let _ = socket.write_all(&line(error));
    ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(128))
}

fn other(what: &str) -> impl Fn(Errno) -> StartError {
    let what = what.to_owned();
    move |errno| StartError::Other { what: what.clone(), problem: errno.desc().to_owned() }
}

fn become_container(launch: &Launch) -> Result<(), StartError> {
    match launch.session {
        Session::Own => setsid().map(drop).map_err(other("making a session"))?,
        Session::Shared => {
            setpgid(Pid::from_raw(0), Pid::from_raw(0)).map_err(other("making a process group"))?
        }
    }
    umask(Mode::from_bits_truncate(0o022));
    let pgid = launch.container_dir.join("pgid");
    fs::write(&pgid, format!("{}\n", getpid())).map_err(|error| StartError::Other {
        what: format!("writing {}", pgid.display()),
        problem: error.to_string(),
    })?;
    // The log is there from the start, also for a container that says nothing. One that cannot be made holds nothing up.
    let _ = log::open(&launch.log);
    if let Some(adjustment) = launch.oom_score_adj {
        // Raising it needs no right; where it fails all the same, the container runs as it is.
        let _ = fs::write("/proc/self/oom_score_adj", adjustment.to_string());
    }
    let null = fs::OpenOptions::new().read(true).custom_flags(0).open("/dev/null");
    let null =
        null.map_err(|error| StartError::Other { what: "/dev/null".to_owned(), problem: error.to_string() })?;
    dup2_stdin(&null).map_err(other("standard input"))?;
    std::env::set_current_dir(&launch.working_dir).map_err(|error| StartError::WorkingDirectory {
        path: launch.working_dir.display().to_string(),
        problem: error.to_string(),
    })?;
    reset_ignored_signals();
    Ok(())
}

/// A signal that was ignored when a shell starts can never be trapped by it. What has a handler becomes default by exec
/// (execve(2)), and std's exec resets SIGPIPE and the mask, so each ignored signal is given a handler.
fn reset_ignored_signals() {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let handler = Arc::new(AtomicBool::new(false));
    for signal in ignored(&status) {
        // Those that refuse a handler cannot be ignored either.
        let _ = signal_hook::flag::register(signal, Arc::clone(&handler));
    }
}

/// The signals of the line `SigIgn:` (proc(5)), bit n-1 for signal n. Real-time signals are left alone.
fn ignored(status: &str) -> Vec<i32> {
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:")).map(str::trim);
    let mask = mask.and_then(|mask| u64::from_str_radix(mask, 16).ok()).unwrap_or(0);
    (1..=31).filter(|signal| mask & (1 << (signal - 1)) != 0).collect()
}

/// By execv, and not by std's exec: glibc's execvp gives a script without a `#!` line to sh, musl's does not. Whatever
/// this program is built with, such a script is refused and told what it lacks.
fn exec(launch: &Launch) -> StartError {
    let Some(program) = launch.argv.first() else {
        return StartError::NotFound { program: String::new() };
    };
    let text = |text: &str| {
        CString::new(text).map_err(|_| StartError::Other {
            what: format!("{text:?}"),
            problem: "a NUL cannot be part of a command line".to_owned(),
        })
    };
    let argv: Result<Vec<CString>, StartError> = launch.argv.iter().map(|arg| text(arg)).collect();
    let argv = match argv {
        Ok(argv) => argv,
        Err(error) => return error,
    };
    // As std's exec does; ignored signals have been seen to.
    let _ = SigSet::empty().thread_set_mask();
    let path = std::env::var("PATH").unwrap_or_else(|_| DEFAULT_PATH.to_owned());
    let mut denied = None;
    for file in candidates(program, &path) {
        let Ok(file) = text(&file) else { continue };
        match exec_file(&file, &argv) {
            // As execvp(3): the search goes on, and a file that may not be run is told of when nothing else is found.
            Errno::ENOENT | Errno::ENOTDIR => {}
            errno @ Errno::EACCES => denied = Some(errno),
            errno => return explain(program, &errno.into()),
        }
    }
    explain(program, &denied.unwrap_or(Errno::ENOENT).into())
}

/// Where a program may be: as it is written when it holds a slash, else in the directories of PATH, an empty one being
/// the working directory (execvp(3)).
fn candidates(program: &str, path: &str) -> Vec<String> {
    if program.is_empty() || program.contains('/') {
        return vec![program.to_owned()];
    }
    let directory = |directory: &str| {
        if directory.is_empty() { format!("./{program}") } else { format!("{directory}/{program}") }
    };
    path.split(':').map(directory).collect()
}

fn exec_file(file: &CString, argv: &[CString]) -> Errno {
    let start = Instant::now();
    loop {
        let Err(errno) = execv(file, argv);
        if errno != Errno::ETXTBSY || start.elapsed() > BUSY_LIMIT {
            return errno;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn explain(program: &str, error: &io::Error) -> StartError {
    let program = program.to_owned();
    match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::ENOENT | Errno::ENOTDIR) => StartError::NotFound { program },
        Some(Errno::EACCES | Errno::EPERM) => {
            StartError::NotExecutable { program, problem: error.to_string() }
        }
        Some(Errno::ENOEXEC) => StartError::Format { program },
        _ => StartError::Other { what: program, problem: error.to_string() },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ignored_signals_are_read_from_the_mask() {
        assert_eq!(ignored("Name:\tx\nSigIgn:\t0000000000001201\n"), [1, 10, 13]);
        assert!(ignored("").is_empty());
    }

    #[test]
    fn a_program_without_a_slash_is_looked_for_in_the_path() {
        assert_eq!(candidates("bash", "/bin::/usr/bin"), ["/bin/bash", "./bash", "/usr/bin/bash"]);
        assert_eq!(candidates("./x", "/bin"), ["./x"]);
        assert_eq!(candidates("", "/bin"), [""]);
    }

    #[test]
    fn a_program_that_cannot_run_is_explained() {
        let code = |errno: Errno| explain("x", &io::Error::from(errno)).exit_code();
        assert_eq!(code(Errno::ENOENT), 127);
        assert_eq!(code(Errno::EACCES), 126);
        assert_eq!(code(Errno::ENOEXEC), 126);
        assert_eq!(code(Errno::E2BIG), 128);
    }
}
