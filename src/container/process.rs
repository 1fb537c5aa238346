//! Processes as /proc shows them (proc(5)): who they are across reuse of their number, and whose children.

use std::fs;
use std::path::Path;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Facts of /proc/PID/stat.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stat {
    /// The state's letter: R, S, D, Z, T, …
    pub state: char,
    /// The parent.
    pub parent: i32,
    /// Start time in clock ticks since boot.
    pub start: u64,
}

/// Reads /proc/PID/stat; none when there is no such process.
#[must_use]
pub fn stat(pid: i32) -> Option<Stat> {
    parse_stat(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

/// The command's name stands in parentheses and may hold blanks and parentheses, so fields count from the last one.
fn parse_stat(text: &str) -> Option<Stat> {
    let mut fields = text.get(text.rfind(')')? + 1..)?.split_ascii_whitespace();
    let state = fields.next()?.chars().next()?;
    let parent = fields.next()?.parse().ok()?;
    // Field 22 of the whole line; `ppid` was field 4.
    let start = fields.nth(17)?.parse().ok()?;
    Some(Stat { state, parent, start })
}

/// The start time of a process in clock ticks since boot; none when there is no such process.
#[must_use]
pub fn start_time(pid: i32) -> Option<u64> {
    stat(pid).map(|stat| stat.start)
}

/// The id of this boot; empty where the kernel does not tell.
#[must_use]
pub fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .map_or_else(|_| String::new(), |id| id.trim().to_owned())
}

/// The children of a process, of all its threads.
#[must_use]
pub fn children(pid: i32) -> Vec<i32> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let mut found = Vec::new();
    let mut readable = false;
    for task in tasks {
        if let Ok(list) = fs::read_to_string(task.path().join("children")) {
            readable = true;
            found.extend(list.split_ascii_whitespace().filter_map(|pid| pid.parse::<i32>().ok()));
        }
    }
    // A kernel without CONFIG_PROC_CHILDREN has no such file: look at every process then.
    if readable {
        found
    } else {
        all().into_iter().filter(|p| stat(*p).is_some_and(|s| s.parent == pid)).collect()
    }
}

/// All processes that are visible.
#[must_use]
pub fn all() -> Vec<i32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

/// The children of a process, their children, and so on; parents before children.
#[must_use]
pub fn descendants(pid: i32) -> Vec<i32> {
    let mut found = children(pid);
    let mut next = 0;
    while let Some(pid) = found.get(next).copied() {
        for child in children(pid) {
            if !found.contains(&child) {
                found.push(child);
            }
        }
        next += 1;
    }
    found
}

/// SIGKILL to a process and all its descendants.
pub fn kill_tree(pid: i32) {
    for pid in std::iter::once(pid).chain(descendants(pid)) {
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
    }
}

/// The value of a variable in the environment that a process of ours was started with.
#[must_use]
pub fn variable(pid: i32, name: &str) -> Option<String> {
    let environment = fs::read(format!("/proc/{pid}/environ")).ok()?;
    environment.split(|byte| *byte == 0).find_map(|entry| {
        let entry = std::str::from_utf8(entry).ok()?;
        entry.strip_prefix(name)?.strip_prefix('=').map(str::to_owned)
    })
}

/// A process for a message: its number, name and state.
#[must_use]
pub fn describe(pid: i32) -> String {
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    let state = stat(pid).map_or('?', |stat| stat.state);
    format!("{pid} ({}, state {state})", name.trim())
}

/// A process, across reuse of its number: `<pid> <start time> <boot id>` in a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// Process id.
    pub pid: i32,
    /// Start time in clock ticks since boot.
    pub start: u64,
    /// The boot's id.
    pub boot: String,
}

impl Identity {
    /// This process.
    #[must_use]
    pub fn own() -> Self {
        let pid = nix::unistd::getpid().as_raw();
        Self { pid, start: start_time(pid).unwrap_or_default(), boot: boot_id() }
    }

    /// Reads what [`std::fmt::Display`] wrote.
    #[must_use]
    pub fn read(path: &Path) -> Option<Self> {
        let text = fs::read_to_string(path).ok()?;
        let mut words = text.split_ascii_whitespace();
        let pid = words.next()?.parse().ok()?;
        let start = words.next()?.parse().ok()?;
        Some(Self { pid, start, boot: words.next().unwrap_or_default().to_owned() })
    }

    /// Whether the process still is there (and no zombie).
    #[must_use]
    pub fn is_alive(&self) -> bool {
        if self.boot != boot_id() {
            return false;
        }
        match stat(self.pid) {
            Some(stat) => stat.start == self.start && stat.state != 'Z',
            // Where /proc is mounted with hidepid=2 (proc(5)), a process that is not dumpable is hidden even from its own
            // user.
            None => kill(Pid::from_raw(self.pid), None).is_ok(),
        }
    }
}

impl std::fmt::Display for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {} {}", self.pid, self.start, self.boot)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_commands_name_may_hold_anything() {
        let line = "42 (a) (b) S) R 7 42 42 0 -1 4194304 100 0 0 0 0 0 0 0 20 0 1 0 98765 1000 10";
        assert_eq!(parse_stat(line), Some(Stat { state: 'R', parent: 7, start: 98765 }));
        for bad in ["", "42 (x", "42 (x)", "42 (x) R"] {
            assert_eq!(parse_stat(bad), None, "{bad}");
        }
    }

    #[test]
    fn this_process_knows_itself_and_its_child() {
        let mut child =
            std::process::Command::new("sleep").arg("60").env("JIRIAF_TEST_MARK", "x y").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let own = Identity::own();
        assert!(own.is_alive());
        assert!(children(own.pid).contains(&pid));
        // execve(2) wakes the parent a moment before the kernel shows the new environment.
        let mark = std::iter::repeat_with(|| variable(pid, "JIRIAF_TEST_MARK")).take(100_000).find_map(|m| m);
        assert_eq!(mark.as_deref(), Some("x y"));
        kill_tree(pid);
        child.wait().unwrap();
        assert!(!Identity { pid, start: 1, boot: own.boot }.is_alive());
    }
}
