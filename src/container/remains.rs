//! What is left when something went wrong: processes without a supervisor, supervisors without a pilot.

use std::fs;
use std::io::Write as _;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::MARK;
use super::process::{self, Identity};
use super::protocol::{Order, line};
use super::supervisor::{IDENTITY, SOCKET};

/// Rounds of looking and killing: a process that forks faster than this is killed with its parent in the next one.
const ROUNDS: usize = 50;

/// Whether a mark belongs to a pilot or a run.
pub(super) fn is_marked(mark: &str, prefix: &str) -> bool {
    mark.strip_prefix(prefix).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

fn marked(prefix: &str) -> Vec<i32> {
    let own = nix::unistd::getpid().as_raw();
    let all = process::all().into_iter().filter(|pid| *pid != own);
    all.filter(|pid| process::variable(*pid, MARK).is_some_and(|mark| is_marked(&mark, prefix)))
        .filter(|pid| process::stat(*pid).is_some_and(|stat| stat.state != 'Z'))
        .collect()
}

fn kill_marked(prefix: &str) -> usize {
    let found = marked(prefix);
    for pid in &found {
        let _ = kill(Pid::from_raw(*pid), Signal::SIGKILL);
    }
    found.len()
}

/// Kills every process whose environment carries the mark; how many there were.
#[must_use]
pub fn end_marked(prefix: &str) -> usize {
    let mut killed = 0;
    for _ in 0..ROUNDS {
        match kill_marked(prefix) {
            0 => break,
            found => killed = killed.max(found),
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    killed
}

/// As [`end_marked`], without holding the pilot up.
pub(super) async fn end_marked_until_gone(prefix: &str) -> usize {
    let mut killed = 0;
    for _ in 0..ROUNDS {
        match kill_marked(prefix) {
            0 => break,
            found => killed = killed.max(found),
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    killed
}

/// Whether a process is one of the supervisors whose state is in `directory`.
#[must_use]
pub fn is_supervisor(directory: &Path, pid: i32) -> bool {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let known = entries
        .filter_map(|entry| Identity::read(&entry.path().join(IDENTITY)))
        .any(|i| i.pid == pid && i.is_alive());
    // One that has just begun has not written its file yet; its command line tells (proc(5): arguments end with NUL).
    known || {
        let arguments = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        arguments.split(|byte| *byte == 0).nth(1) == Some(b"supervise")
    }
}

/// Ends the containers of all supervisors whose state is in `directory`: SIGTERM, SIGKILL after `grace`, then the
/// supervisors. For a guardian that gives up.
pub fn end_supervisors(directory: &Path, grace: Duration) {
    let entries: Vec<_> = fs::read_dir(directory).into_iter().flatten().flatten().collect();
    let mut waiting = Vec::new();
    for entry in entries {
        let Some(identity) = Identity::read(&entry.path().join(IDENTITY)).filter(Identity::is_alive) else {
            continue;
        };
        let Ok(opened) = fs::File::open(entry.path()) else { continue };
        let path = format!("/proc/self/fd/{}/{SOCKET}", opened.as_raw_fd());
        if let Ok(mut stream) = UnixStream::connect(path) {
            let _ = stream.write_all(&line(&Order::Terminate(grace)));
            waiting.push((identity, stream));
        }
    }
    let end = Instant::now() + grace + Duration::from_secs(3);
    while Instant::now() < end
        && waiting.iter().any(|(identity, _)| !process::children(identity.pid).is_empty())
    {
        std::thread::sleep(Duration::from_millis(50));
    }
    for (identity, _) in waiting {
        process::kill_tree(identity.pid);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_is_matched_by_whole_parts() {
        assert!(is_marked("node-1/uid/c/0", "node-1"));
        assert!(is_marked("node-1/uid/c/0", "node-1/uid/c/0"));
        assert!(!is_marked("node-10/uid/c/0", "node-1"));
        assert!(!is_marked("node-1/uid/c/01", "node-1/uid/c/0"));
    }
}
