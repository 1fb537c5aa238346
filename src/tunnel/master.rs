//! One connection: an ssh that runs, and what is asked of it.

use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::process::{ChildStdin, Command};
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};

use super::ssh::{self, Ask};
use super::url::Settings;
use crate::allocation::Environment;
use crate::allocation::command::{CommandError, Kept, Program, keep};

/// How long ssh may take from its start until it can be asked: its own limit for the connection, and as long again for
/// jump hosts and authentication (LDAP and Kerberos of a busy login host take seconds).
const READY_LIMIT: Duration = Duration::from_secs(2 * ssh::CONNECT_SECONDS as u64);

/// How often the control socket is looked for meanwhile. A connection takes some 100 ms.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// How long one forward may take. The far side answers in one round trip.
const ASK_LIMIT: Duration = Duration::from_secs(10);

/// How long a killed ssh is waited for.
const KILLED_WAIT: Duration = Duration::from_secs(1);

/// How much of a line without an end is kept.
const LINE_BYTES: usize = 4096;

/// What starts a connection.
pub struct Start<'a> {
    /// Where ssh is.
    pub program: &'a Path,
    /// Which tunnel of several it is.
    pub index: usize,
    /// Whither.
    pub settings: &'a Settings,
    /// Where its sockets are.
    pub directory: &'a Path,
    /// Its environment.
    pub env: &'a Environment,
}

/// An ssh that runs. Dropping it ends it, and so does the end of this process, of whatever kind.
pub struct Master {
    kept: Kept,
    /// The shell beside ssh ends it when this is closed.
    _stdin: Option<ChildStdin>,
    /// Ends when ssh does.
    reader: JoinHandle<()>,
    last: Arc<Mutex<Option<String>>>,
    program: PathBuf,
    index: usize,
    directory: PathBuf,
    env: Environment,
}

impl Master {
    /// Starts ssh, and waits until it is connected.
    ///
    /// # Errors
    /// What ssh says is wrong.
    pub async fn connect(start: &Start<'_>) -> Result<Self, String> {
        let control = start.directory.join(ssh::control_socket(start.index));
        for socket in [control.clone(), start.directory.join(ssh::api_socket(start.index))] {
            match std::fs::remove_file(&socket) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(format!("{}: {error}", socket.display()));
                }
                _ => {}
            }
        }
        let mut master = Self::start(start).map_err(|error| format!("ssh cannot be started: {error}"))?;
        let until = Instant::now() + READY_LIMIT;
        loop {
            // ssh makes the socket when it is connected and authenticated.
            if control.exists() {
                return Ok(master);
            }
            if timeout(LOOK_EVERY, &mut master.reader).await.is_ok() {
                return Err(master.end().await);
            }
            if Instant::now() > until {
                let said = master.said().map(|line| format!("; it said: {line}")).unwrap_or_default();
                return Err(format!("ssh was not connected within {} s{said}", READY_LIMIT.as_secs()));
            }
        }
    }

    fn start(start: &Start<'_>) -> io::Result<Self> {
        let mut command = Command::new("/bin/sh");
        command
            .args(ssh::master(&start.program.to_string_lossy(), start.settings, start.index))
            .current_dir(start.directory)
            .env_clear()
            .envs(start.env.iter())
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            // With its jump hosts' clients it is ended as one; and Ctrl-C in a terminal is for the pilot.
            .process_group(0)
            .kill_on_drop(true);
        let mut kept = keep(&mut command)?;
        let last = Arc::new(Mutex::new(None));
        let stderr = kept.child.stderr.take();
        Ok(Self {
            _stdin: kept.child.stdin.take(),
            reader: tokio::spawn(listen(stderr, Arc::clone(&last))),
            kept,
            last,
            program: start.program.to_owned(),
            index: start.index,
            directory: start.directory.to_owned(),
            env: start.env.clone(),
        })
    }

    fn said(&self) -> Option<String> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Forgets what ssh has said: it did not keep it from working.
    pub fn forget(&self) {
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Waits until ssh ends. Cancel safe; once only.
    pub async fn ended(&mut self) {
        let _ = (&mut self.reader).await;
    }

    /// Ends what is left; why ssh ended.
    pub async fn end(mut self) -> String {
        self.kill();
        let _ = timeout(KILLED_WAIT, self.kept.child.wait()).await;
        self.said().unwrap_or_else(|| "ssh ended without a word".to_owned())
    }

    fn kill(&self) {
        // None once it was waited for: then its number may be another's.
        if let Some(pid) = self.kept.child.id().and_then(|id| i32::try_from(id).ok()) {
            let _ = killpg(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }

    /// Has a port of the far side lead to `port` here; the far side's port.
    ///
    /// # Errors
    /// Why it was refused.
    pub async fn remote(&self, bind: &str, far: u16, port: u16) -> Result<u16, String> {
        let stdout = self.ask(&Ask::Remote { bind, far, port }).await?;
        if far != 0 {
            return Ok(far);
        }
        ssh::allocated_port(&stdout).ok_or_else(|| "ssh does not tell which port sshd chose".to_owned())
    }

    /// Asks one thing of it; what ssh prints.
    ///
    /// # Errors
    /// Why it was refused.
    pub async fn ask(&self, ask: &Ask<'_>) -> Result<String, String> {
        let args = ssh::control(self.index, ask);
        let program = Program::at(&self.program, &self.env).directory(&self.directory);
        let output = match program.args(args.iter().map(String::as_str)).run(ASK_LIMIT).await {
            Ok(output) => output,
            Err(CommandError::TimedOut { limit, .. }) => {
                return Err(format!("the far side did not answer within {} s", limit.as_secs()));
            }
            Err(error) => return Err(error.to_string()),
        };
        if output.status.success() { Ok(output.stdout) } else { Err(ssh::refusal(&output.stderr)) }
    }
}

impl Drop for Master {
    fn drop(&mut self) {
        self.reader.abort();
        self.kill();
    }
}

/// Keeps the last line that may say why ssh ends, until ssh ends.
async fn listen(stderr: Option<impl AsyncRead + Unpin>, last: Arc<Mutex<Option<String>>>) {
    let Some(mut stderr) = stderr else { return };
    let (mut line, mut bytes) = (Vec::new(), [0; 1024]);
    while let Ok(n @ 1..) = stderr.read(&mut bytes).await {
        for byte in &bytes[..n] {
            if *byte == b'\n' {
                keep_line(&line, &last);
                line.clear();
            } else if line.len() < LINE_BYTES {
                line.push(*byte);
            }
        }
    }
    keep_line(&line, &last);
}

fn keep_line(line: &[u8], last: &Mutex<Option<String>>) {
    if let Some(text) = ssh::telling(&String::from_utf8_lossy(line)) {
        tracing::debug!(line = text, "ssh says");
        *last.lock().unwrap_or_else(PoisonError::into_inner) = Some(text);
    }
}
