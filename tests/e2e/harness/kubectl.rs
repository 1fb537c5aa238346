//! kubectl that runs beside the test: it is told things, and what it says is read as it comes.

use std::fs::File;
use std::io::{Read, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt as _;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, SystemTime};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

use super::{bed, wait_for, wait_until};

/// kubectl by one of the ways from it to the Node.
#[derive(Default)]
pub struct Way {
    /// Another API server's.
    pub kubeconfig: Option<PathBuf>,
    /// Variables of kubectl's.
    pub environment: Vec<(&'static str, &'static str)>,
}

impl Way {
    /// kubectl in a namespace, at most three minutes.
    pub fn kubectl(&self, namespace: &str) -> Command {
        let mut command = Command::new("timeout");
        command.args(["-k", "1", "180"]);
        self.add(&mut command, namespace);
        command
    }

    /// The same as the last arguments of a command that runs another.
    fn add(&self, command: &mut Command, namespace: &str) {
        bed().kubectl_of(command, namespace).envs(self.environment.iter().copied());
        if let Some(file) = &self.kubeconfig {
            command.arg("--kubeconfig").arg(file);
        }
    }
}

/// A kubectl that runs. Ended at drop.
pub struct Kubectl {
    child: Child,
    input: Option<File>,
    stdout: Arc<Mutex<Vec<Piece>>>,
    stderr: Arc<Mutex<Vec<Piece>>>,
    readers: Vec<JoinHandle<()>>,
}

/// What came at once, and when.
struct Piece {
    at: SystemTime,
    bytes: Vec<u8>,
}

/// How kubectl ended.
pub struct Ended {
    /// Its exit code; 128 + n for a signal.
    pub code: i32,
    /// What it wrote to standard output.
    pub stdout: Vec<u8>,
    /// What it wrote to standard error.
    pub stderr: String,
}

impl Ended {
    /// Standard output as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// All that was said, for a message.
    pub fn said(&self) -> String {
        format!("exit code {}\n{}\n{}", self.code, self.text(), self.stderr)
    }
}

impl Kubectl {
    /// Starts the command with pipes.
    pub fn start(command: &mut Command) -> Self {
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
        let input = child.stdin.take().map(|pipe| File::from(OwnedFd::from(pipe)));
        let (stdout, stderr) = (Arc::default(), Arc::default());
        let readers = vec![
            keep(child.stdout.take().unwrap(), Arc::clone(&stdout)),
            keep(child.stderr.take().unwrap(), Arc::clone(&stderr)),
        ];
        Self { child, input, stdout, stderr, readers }
    }

    /// What the command says with this on standard input, at its end.
    pub fn run_with(command: &mut Command, input: &[u8], limit: Duration) -> Ended {
        let mut kubectl = Self::start(command);
        let pipe = kubectl.input.take();
        thread::scope(|scope| {
            // Whoever does not want all of it closes the pipe.
            scope.spawn(move || pipe.map(|mut pipe| pipe.write_all(input)));
            kubectl.wait_end(limit)
        })
    }

    /// What the command says with nothing on standard input, at its end.
    pub fn run(command: &mut Command, limit: Duration) -> Ended {
        Self::run_with(command, b"", limit)
    }

    /// Types or pipes a text.
    pub fn say(&mut self, text: &str) {
        self.input.as_mut().expect("its input is open").write_all(text.as_bytes()).unwrap();
    }

    /// Ends its standard input.
    pub fn close_input(&mut self) {
        self.input = None;
    }

    /// What it has written to standard output.
    pub fn text(&self) -> String {
        text(&self.stdout)
    }

    /// What it has written to standard error.
    pub fn errors(&self) -> String {
        text(&self.stderr)
    }

    /// The lines of standard output, each with the moment at which its end came.
    pub fn lines(&self) -> Vec<(SystemTime, String)> {
        let (mut lines, mut line) = (Vec::new(), Vec::new());
        for piece in self.stdout.lock().unwrap().iter() {
            for byte in &piece.bytes {
                if *byte == b'\n' {
                    lines.push((piece.at, String::from_utf8_lossy(&line).into_owned()));
                    line.clear();
                } else {
                    line.push(*byte);
                }
            }
        }
        lines
    }

    /// Waits until it has written this to standard output.
    #[track_caller]
    pub fn wait_text(&mut self, wanted: &str, limit: Duration) {
        wait_until(&format!("kubectl shows {wanted:?}"), limit, || {
            let shown = self.text();
            let ended = self.child.try_wait().unwrap();
            assert!(
                shown.contains(wanted) || ended.is_none() || self.readers.iter().any(|r| !r.is_finished()),
                "kubectl ended with {ended:?} before it showed {wanted:?}: {shown}\n{}",
                self.errors()
            );
            shown.contains(wanted)
        });
    }

    /// Waits for its end.
    #[track_caller]
    pub fn wait_end(&mut self, limit: Duration) -> Ended {
        let status = wait_for("kubectl ends", limit, || self.child.try_wait().unwrap());
        for reader in self.readers.drain(..) {
            reader.join().unwrap();
        }
        let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
        let pieces = std::mem::take(&mut *self.stdout.lock().unwrap());
        Ended {
            code,
            stdout: pieces.into_iter().flat_map(|piece| piece.bytes).collect(),
            stderr: self.errors(),
        }
    }
}

impl Drop for Kubectl {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("--- kubectl said ---\n{}\n{}", end_of(&self.text()), end_of(&self.errors()));
        }
        if self.child.try_wait().unwrap().is_none() {
            // timeout(1) hands it on.
            let _ = kill(Pid::from_raw(self.child.id().try_into().unwrap()), Signal::SIGTERM);
            let _ = self.child.wait();
        }
    }
}

/// A terminal in which a command runs.
pub struct Terminal {
    /// What runs in it: what is typed is its input, what is shown its standard output.
    pub kubectl: Kubectl,
    ours: File,
}

impl Terminal {
    /// Starts kubectl with these arguments in a terminal of this size, which is its own.
    pub fn start(way: &Way, namespace: &str, arguments: &[&str], (columns, rows): (u16, u16)) -> Self {
        let ours = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
        grantpt(&ours).unwrap();
        unlockpt(&ours).unwrap();
        let name = ptsname(&ours, Vec::new()).unwrap().into_string().unwrap();
        let ours = File::from(ours);
        let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(&ours, size).unwrap();
        // timeout(1) in a group of its own could not give kubectl the terminal; kubectl leads the session that has it,
        // so it is told when the size changes.
        let mut command = Command::new("timeout");
        command.args(["--foreground", "-k", "1", "120", "setsid", "--ctty", "--wait"]);
        way.add(&mut command, namespace);
        command.args(arguments).env("TERM", "xterm");
        let open = || {
            use std::os::unix::fs::OpenOptionsExt as _;
            let mut options = std::fs::OpenOptions::new();
            let flags = nix::fcntl::OFlag::O_NOCTTY.bits();
            Stdio::from(options.read(true).write(true).custom_flags(flags).open(&name).unwrap())
        };
        command.stdin(open()).stdout(open()).stderr(open());
        let child = command.spawn().unwrap();
        // The terminal ends for us when nobody has it open any more: the command must not.
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let stdout = Arc::default();
        let readers = vec![keep(ours.try_clone().unwrap(), Arc::clone(&stdout))];
        let input = Some(ours.try_clone().unwrap());
        Self { kubectl: Kubectl { child, input, stdout, stderr: Arc::default(), readers }, ours }
    }

    /// Gives the terminal another size.
    pub fn resize(&self, columns: u16, rows: u16) {
        let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(&self.ours, size).unwrap();
    }
}

fn keep(mut from: impl Read + Send + 'static, into: Arc<Mutex<Vec<Piece>>>) -> JoinHandle<()> {
    thread::spawn(move || {
        let mut bytes = vec![0; 64 * 1024];
        // A terminal's end is an error (EIO).
        while let Ok(n) = from.read(&mut bytes) {
            if n == 0 {
                break;
            }
            into.lock().unwrap().push(Piece { at: SystemTime::now(), bytes: bytes[..n].to_vec() });
        }
    })
}

fn text(pieces: &Mutex<Vec<Piece>>) -> String {
    let bytes: Vec<u8> = pieces.lock().unwrap().iter().flat_map(|piece| piece.bytes.clone()).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// What a message has room for.
fn end_of(text: &str) -> String {
    let skip = text.chars().count().saturating_sub(2000);
    text.chars().skip(skip).collect()
}
