//! Whether this host permits what isolation needs: it is done once, and undone by its end.

use std::io::{self, Read as _, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use super::super::descriptors;
use super::super::protocol::{StartError, View, ViewMount, line};
use super::namespaces::{REFUSED, separate};
use super::{other, view};

/// It takes some milliseconds; a host that is busy may take longer, and one that hangs must hold no pilot up.
const LIMIT: Duration = Duration::from_secs(5);

/// Between two looks whether it is over.
const LOOK_EVERY: Duration = Duration::from_millis(1);

/// What it says is one short line.
const ANSWER_BYTES: u64 = 64 * 1024;

/// Why containers cannot be isolated on this host; none when they can. Blocks for some milliseconds.
#[must_use]
pub fn problem() -> Option<String> {
    let started = Command::new("/proc/self/exe")
        .arg0("jiriaf-pilot")
        .arg("try-namespaces")
        .env_clear()
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn();
    let mut child = match started {
        Ok(child) => child,
        Err(error) => return Some(format!("no trial could be made: {error}")),
    };
    let end = Instant::now() + LIMIT;
    let status = loop {
        match child.try_wait() {
            Ok(Some(status)) => break status,
            Ok(None) if Instant::now() < end => std::thread::sleep(LOOK_EVERY),
            Ok(None) => {
                let _ = child.kill();
                let _ = child.wait();
                return Some(format!("a trial did not end within {} s", LIMIT.as_secs()));
            }
            Err(error) => return Some(format!("a trial came to no end: {error}")),
        }
    };
    if status.success() {
        return None;
    }
    let mut answer = Vec::new();
    let _ = child.stdout.take().map(|out| out.take(ANSWER_BYTES).read_to_end(&mut answer));
    let said = serde_json::from_slice::<StartError>(&answer).map(|error| error.to_string());
    Some(said.unwrap_or_else(|_| format!("a trial ended with {status}; {REFUSED}")))
}

/// The trial's main: namespaces, a hostname, a mount in a directory that is not there, and init.
#[must_use]
pub fn try_namespaces() -> ExitCode {
    match attempt() {
        Ok(code) => code,
        Err(error) => {
            let _ = io::stdout().write_all(&line(&error));
            ExitCode::FAILURE
        }
    }
}

fn attempt() -> Result<ExitCode, StartError> {
    separate(&View { hostname: Some("jiriaf-pilot-trial".to_owned()), ..View::default() })?;
    let mounts = vec![ViewMount {
        source: PathBuf::from("/dev"),
        target: PathBuf::from("/.jiriaf-pilot-trial/dev"),
        read_only: true,
        real: false,
    }];
    view::build(&View { mounts, ..View::default() }, None)?;
    let failed = |error: io::Error| other("starting a process in the namespaces", &error);
    let (ours, theirs) = UnixStream::pair().map_err(failed)?;
    descriptors::send(ours.as_fd(), b"t", &[]).map_err(failed)?;
    let status = Command::new("/proc/self/exe")
        .arg0("jiriaf-pilot")
        .arg("init")
        .env_clear()
        .stdin(Stdio::from(std::os::fd::OwnedFd::from(theirs)))
        .status()
        .map_err(failed)?;
    Ok(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
