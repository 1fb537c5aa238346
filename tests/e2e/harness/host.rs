//! Programs and processes of this host, as other users.

use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use super::bed;

/// How a program ended.
pub struct Output {
    /// Whether its exit code is 0.
    pub success: bool,
    /// Its exit code; 128 + n for a signal.
    pub code: i32,
    /// What it wrote to standard output.
    pub stdout: String,
    /// What it wrote to standard error, after standard output.
    pub text: String,
}

/// Runs a command to its end. Wrap what may hang in `timeout`; [`as_user`] does.
pub fn run(command: &mut Command) -> Output {
    use std::os::unix::process::ExitStatusExt;
    let output = command.stdin(Stdio::null()).output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    let text = format!("{stdout}{}", String::from_utf8_lossy(&output.stderr));
    let code = output.status.code().unwrap_or_else(|| 128 + output.status.signal().unwrap_or(0));
    Output { success: output.status.success(), code, stdout, text }
}

/// As [`run`], with text on standard input (less than a pipe holds, 64 KiB).
pub fn run_with_input(command: &mut Command, input: &str) -> Output {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("{command:?}: {error}"));
    // The pipe is closed at the statement's end.
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    let text = format!("{stdout}{}", String::from_utf8_lossy(&output.stderr));
    Output { success: output.status.success(), code: output.status.code().unwrap_or(-1), stdout, text }
}

/// A command as another user, in what a login would give: HOME, USER, PATH, besides SLURM_CONF, and ended
/// after a minute. Add arguments, more variables and a directory as with any command.
pub fn as_user(user: &str, program: &str) -> Command {
    let mut command = user_environment(user);
    command.args(["timeout", "-k", "1", "60", program]);
    command
}

/// As [`as_user`], for what runs until it is ended.
pub fn as_user_without_limit(user: &str, program: &str) -> Command {
    let mut command = user_environment(user);
    command.arg(program);
    command
}

fn user_environment(user: &str) -> Command {
    // setpriv execs, so the child that a test has is the program itself; runuser stays between.
    let mut command = Command::new("setpriv");
    command
        .args([&format!("--reuid={user}"), &format!("--regid={user}"), "--init-groups", "--"])
        .env_clear()
        .current_dir("/");
    command
        .env("HOME", home(user))
        .env("USER", user)
        .env("LOGNAME", user)
        .env("SHELL", "/bin/bash")
        .env("LANG", "C.UTF-8")
        .env("PATH", "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin")
        .env("SLURM_CONF", bed().slurm_conf());
    command
}

/// A small file system of its own in memory, where every user can write. Unmounted at drop.
pub struct Tmpfs(tempfile::TempDir);

impl Tmpfs {
    /// One of so many KiB, with more options of mount(8) or none.
    pub fn new(kib: u32, options: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let options = format!("size={kib}k,mode=0777{}{options}", if options.is_empty() { "" } else { "," });
        let mut mount = Command::new("mount");
        let output = run(mount.args(["-t", "tmpfs", "-o", &options, "jiriaf-test"]).arg(directory.path()));
        assert!(output.success, "mount: {}", output.text);
        std::fs::set_permissions(directory.path(), std::os::unix::fs::PermissionsExt::from_mode(0o777)).ok();
        Self(directory)
    }

    /// Where it is.
    pub fn path(&self) -> &std::path::Path {
        self.0.path()
    }

    /// Leaves no room on it.
    pub fn fill(&self) {
        let mut file = std::fs::File::create(self.path().join("full")).unwrap();
        while file.write_all(&[b'x'; 4096]).is_ok() {}
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        // Lazily: a failed test's pilot may still be there.
        let _ = run(Command::new("umount").arg("-l").arg(self.path()));
    }
}

/// A directory that every user can read, for files that a test writes.
pub fn shared_directory() -> tempfile::TempDir {
    use std::os::unix::fs::PermissionsExt;
    let directory = tempfile::tempdir().unwrap();
    std::fs::set_permissions(directory.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    directory
}

/// A user's home directory.
pub fn home(user: &str) -> PathBuf {
    // As useradd makes it on Debian.
    PathBuf::from("/home").join(user)
}

/// The processes, but for those that are ending, whose environment at their start held `mark`, with their
/// command lines.
pub fn marked(mark: &str) -> Vec<(i32, String)> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else {
            continue;
        };
        // Whatever cannot be read is no longer there: the tests run as root.
        let Ok(environment) = std::fs::read(entry.path().join("environ")) else { continue };
        if environment.split(|byte| *byte == 0).any(|variable| variable == mark.as_bytes()) {
            let command_line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
            found.push((pid, String::from_utf8_lossy(&command_line).replace('\0', " ")));
        }
    }
    found
}

/// What /proc says of where a process stands.
pub struct Place {
    /// Its id.
    pub pid: i32,
    /// Its parent's id.
    pub parent: i32,
    /// Its session's id.
    pub session: i32,
    /// Its program's name, at most 15 bytes.
    pub name: String,
}

/// All processes of this host, each after its parent.
pub fn places() -> Vec<Place> {
    let mut places: Vec<Place> = std::fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .filter_map(|entry| place(&std::fs::read_to_string(entry.path().join("stat")).ok()?))
        .collect();
    // Pids rise from parent to child, but for the wrap at 4 million, which no test lives to see.
    places.sort_by_key(|place| place.pid);
    places
}

/// proc(5): pid (name) state ppid pgrp session …, where the name may hold blanks and parentheses.
fn place(stat: &str) -> Option<Place> {
    let (pid, rest) = stat.split_once(" (")?;
    let (name, rest) = rest.rsplit_once(") ")?;
    let mut fields = rest.split(' ').skip(1);
    let parent = fields.next()?.parse().ok()?;
    let session = fields.nth(1)?.parse().ok()?;
    Some(Place { pid: pid.parse().ok()?, parent, session, name: name.into() })
}
