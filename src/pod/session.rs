//! A container that runs, for those who join it: kubectl exec and attach, hooks, probes. [`RunHandle`] reaches the run's
//! supervisor through the task that follows it.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use nix::sys::signal::Signal;
use tokio::io::AsyncReadExt as _;
use tokio::net::unix::pipe;
use tokio::sync::{mpsc, oneshot};

use crate::container::{Event, ExecStdio, StartError, Supervisor};

/// Requests that may wait for a run: its supervisor takes each at once.
const REQUESTS: usize = 64;

/// How a program that was run in a container ended: its exit code, or why it never began.
pub type ExecEnd = Result<i32, StartError>;

/// What a run is asked by others than its worker.
pub enum Request {
    /// Run a program.
    Exec {
        /// Names it in later requests.
        id: u64,
        /// Program and arguments.
        argv: Vec<String>,
        /// What it reads and writes.
        stdio: ExecStdio,
        /// Is told its end.
        ended: oneshot::Sender<ExecEnd>,
    },
    /// A signal to the program's process group.
    Signal {
        /// Which program.
        id: u64,
        /// The signal.
        signal: Signal,
    },
    /// The container's own terminal has another size.
    Resize {
        /// Columns.
        columns: u16,
        /// Rows.
        rows: u16,
    },
    /// It has more memory than its limit: all of it is to be killed, and this is why.
    OutOfMemory {
        /// For people.
        message: String,
    },
    /// Join the container's input and output.
    Attach {
        /// Whether there is input.
        input: bool,
        /// Where input comes from, where standard output and standard error go.
        descriptors: [OwnedFd; 3],
    },
}

/// A run that can be joined.
#[derive(Debug, Clone)]
pub struct RunHandle {
    requests: mpsc::Sender<Request>,
    /// The process of its supervisor.
    pub supervisor: i32,
}

/// The container has ended, so nobody can join it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the container has ended")]
pub struct Gone;

/// A program that runs in a container.
pub struct Exec {
    id: u64,
    requests: mpsc::Sender<Request>,
    ended: oneshot::Receiver<ExecEnd>,
}

impl RunHandle {
    /// The handle of a run, and where its requests come out.
    #[must_use]
    pub fn new(supervisor: i32) -> (Self, mpsc::Receiver<Request>) {
        let (requests, receiver) = mpsc::channel(REQUESTS);
        (Self { requests, supervisor }, receiver)
    }

    /// Runs a program in the container's surroundings.
    ///
    /// # Errors
    /// When the container has ended.
    pub async fn exec(&self, argv: Vec<String>, stdio: ExecStdio) -> Result<Exec, Gone> {
        let id = next_id();
        let (ended_tx, ended) = oneshot::channel();
        let request = Request::Exec { id, argv, stdio, ended: ended_tx };
        self.requests.send(request).await.map_err(|_| Gone)?;
        Ok(Exec { id, requests: self.requests.clone(), ended })
    }

    /// Tells the container's own terminal how large it is.
    pub async fn resize(&self, columns: u16, rows: u16) {
        let _ = self.requests.send(Request::Resize { columns, rows }).await;
    }

    /// Kills all of the container, which then has ended as OOMKilled.
    pub fn out_of_memory(&self, message: String) {
        // A run whose channel is full is told by the next look, a second later.
        let _ = self.requests.try_send(Request::OutOfMemory { message });
    }

    /// Joins the container's input and output; the descriptors close when it ends.
    ///
    /// # Errors
    /// When the container has ended.
    pub async fn attach(&self, input: bool, descriptors: [OwnedFd; 3]) -> Result<(), Gone> {
        self.requests.send(Request::Attach { input, descriptors }).await.map_err(|_| Gone)
    }
}

impl Exec {
    /// Waits for the program's end; cancel safe.
    ///
    /// # Errors
    /// When the container's supervisor is gone.
    pub async fn ended(&mut self) -> Result<ExecEnd, Gone> {
        (&mut self.ended).await.map_err(|_| Gone)
    }

    /// A signal to the program's process group.
    pub async fn signal(&self, signal: Signal) {
        let _ = self.requests.send(Request::Signal { id: self.id, signal }).await;
    }
}

/// Differs from those of an earlier pilot, whose programs may still run under the same supervisor.
fn next_id() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    (u64::from(std::process::id()) << 32) | (NEXT.fetch_add(1, Ordering::Relaxed) & 0xffff_ffff)
}

/// The programs that run in one container, as the task that follows it knows them.
#[derive(Default)]
pub struct Joined {
    waiting: Vec<(u64, oneshot::Sender<ExecEnd>)>,
}

impl Joined {
    /// Hands a request to the supervisor.
    pub async fn ask(&mut self, supervisor: &mut Supervisor, request: Request) {
        match request {
            Request::Exec { id, argv, stdio, ended } => {
                self.waiting.retain(|(_, ended)| !ended.is_closed());
                self.waiting.push((id, ended));
                supervisor.exec(id, argv, stdio).await;
            }
            Request::Signal { id, signal } => supervisor.signal_exec(id, signal).await,
            Request::Resize { columns, rows } => supervisor.resize(columns, rows).await,
            Request::Attach { input, descriptors } => supervisor.attach(input, descriptors).await,
            // The run itself notes why it is killed.
            Request::OutOfMemory { .. } => supervisor.kill().await,
        }
    }

    /// Takes the end of such a program; any other event is given back.
    pub fn take(&mut self, event: Event) -> Option<Event> {
        let (id, end) = match event {
            Event::ExecEnded { id, exit_code } => (id, Ok(exit_code)),
            Event::ExecFailed { id, error } => (id, Err(error)),
            event => return Some(event),
        };
        if let Some(index) = self.waiting.iter().position(|(waiting, _)| *waiting == id) {
            let _ = self.waiting.swap_remove(index).1.send(end);
        }
        None
    }
}

/// What a program leaves in its pipes when it ends is read at once; a process that it left behind may hold them open, and
/// is waited for no longer than this.
pub const REST_LIMIT: Duration = Duration::from_millis(250);

/// Runs a program in a container with no input; how it ended, and the first `limit` bytes of its output, both streams as
/// they came. Dropping it leaves the program to SIGHUP.
///
/// # Errors
/// When the container ends first.
pub async fn run_to_end(
    container: &RunHandle,
    argv: Vec<String>,
    limit: usize,
) -> Result<(ExecEnd, Vec<u8>), Gone> {
    run_or(Signal::SIGHUP, container, argv, limit).await
}

/// As [`run_to_end`]; dropping it sends the program's process group this signal.
///
/// # Errors
/// When the container ends first.
pub async fn run_or(
    dropped: Signal,
    container: &RunHandle,
    argv: Vec<String>,
    limit: usize,
) -> Result<(ExecEnd, Vec<u8>), Gone> {
    let pipes = || -> std::io::Result<_> {
        let null = std::fs::File::open("/dev/null")?;
        let (read, write) = std::io::pipe()?;
        let stdio = ExecStdio::Pipes([null.into(), write.try_clone()?.into(), write.into()]);
        Ok((pipe::Receiver::from_owned_fd(read.into())?, stdio))
    };
    let (mut output, stdio) = match pipes() {
        Ok(both) => both,
        Err(error) => {
            let error =
                StartError::Other { what: "pipes for the program".to_owned(), problem: error.to_string() };
            return Ok((Err(error), Vec::new()));
        }
    };
    let mut exec = container.exec(argv, stdio).await?;
    let mut hang_up = HangUp(dropped, Some((exec.id, exec.requests.clone())));
    let (mut kept, mut bytes, mut open) = (Vec::new(), [0; 4096], true);
    let end = loop {
        tokio::select! {
            read = output.read(&mut bytes), if open => match read {
                Ok(n) if n > 0 => keep(&mut kept, &bytes[..n], limit),
                _ => open = false,
            },
            end = exec.ended() => break end?,
        }
    };
    hang_up.1 = None;
    while let Ok(Ok(n)) = tokio::time::timeout(REST_LIMIT, output.read(&mut bytes)).await {
        if n == 0 || kept.len() >= limit {
            break;
        }
        keep(&mut kept, &bytes[..n], limit);
    }
    Ok((end, kept))
}

fn keep(kept: &mut Vec<u8>, bytes: &[u8], limit: usize) {
    let room = limit.saturating_sub(kept.len()).min(bytes.len());
    kept.extend_from_slice(&bytes[..room]);
}

/// A program whose caller has gone is told by a signal, as by a terminal that hangs up.
struct HangUp(Signal, Option<(u64, mpsc::Sender<Request>)>);

impl Drop for HangUp {
    fn drop(&mut self) {
        if let Some((id, requests)) = self.1.take() {
            // A channel that is full belongs to a container with worse troubles.
            let _ = requests.try_send(Request::Signal { id, signal: self.0 });
        }
    }
}
