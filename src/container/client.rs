//! The pilot's side of its supervisors.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream as StdStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::time::Instant;

use super::MARK;
use super::process::{self, Identity};
use super::protocol::{ContainerId, ContainerSpec, Event, ExecSpec, Order, line};
use super::remains;
use super::supervisor::{IDENTITY, SOCKET};
use crate::files;

/// How long a supervisor that has closed its socket may take to be dead.
const DEATH_LIMIT: Duration = Duration::from_secs(1);

/// How long a supervisor of before a crash may take to answer. It is a loop that never blocks.
const GREETING_LIMIT: Duration = Duration::from_secs(5);

/// A child of the pilot that nobody knows may be a helper that a library has just started (an exec credential plugin):
/// only what is there for longer is taken for the remains of a dead supervisor. What carries our mark never waits.
const UNKNOWN_LIMIT: Duration = Duration::from_secs(60);

/// How often children that nobody knows are looked at.
const LOOK_EVERY: Duration = Duration::from_secs(10);

/// Supervisors cannot be started or found.
#[derive(Debug, thiserror::Error)]
#[error("{path}: {source}", path = path.display())]
pub struct SupervisorsError {
    /// The directory or program.
    pub path: PathBuf,
    /// Why.
    pub source: io::Error,
}

/// Starts supervisors and finds them again.
pub struct Supervisors {
    directory: PathBuf,
    executable: PathBuf,
    mark: String,
    known: Arc<Known>,
}

/// The supervisors that are children of this process.
#[derive(Default)]
struct Known {
    pids: Mutex<BTreeMap<i32, ()>>,
    look: tokio::sync::Notify,
}

impl Known {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<i32, ()>> {
        self.pids.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Supervisors {
    /// Keeps the supervisors' state in `directory`, which is made when it is not there. `mark` begins the mark of every
    /// container ([`MARK`]).
    ///
    /// # Errors
    /// When the directory cannot be made or is not ours alone.
    pub fn new(directory: &Path, mark: String) -> Result<Self, SupervisorsError> {
        files::private_dir(directory).map_err(|error| SupervisorsError {
            path: directory.to_owned(),
            source: io::Error::other(error),
        })?;
        // This binary, also when its file is replaced while the job runs.
        let executable = PathBuf::from("/proc/self/exe");
        Ok(Self { directory: directory.to_owned(), executable, mark, known: Arc::default() })
    }

    /// Takes another binary than this process' own for supervisors: for tests.
    #[must_use]
    pub fn with_executable(mut self, executable: PathBuf) -> Self {
        self.executable = executable;
        self
    }

    /// Starts the supervisor of one run; it waits for what to start.
    ///
    /// # Errors
    /// When its state directory or its process cannot be made.
    pub fn spawn(&self, id: ContainerId) -> Result<Supervisor, SupervisorsError> {
        let directory = self.directory.join(id.directory_name());
        let fail = |path: &Path, source| SupervisorsError { path: path.to_owned(), source };
        // A run has its number once; what is left of one that was never started may go.
        let _ = fs::remove_dir_all(&directory);
        files::private_dir(&directory).map_err(|error| fail(&directory, io::Error::other(error)))?;
        let (ours, theirs) = StdStream::pair().map_err(|error| fail(&directory, error))?;
        let child = Command::new(&self.executable)
            .arg0("jiriaf-pilot")
            .arg("supervise")
            .arg(&directory)
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            .spawn()
            .map_err(|error| fail(&self.executable, error))?;
        let pid = i32::try_from(child.id()).unwrap_or(i32::MAX);
        self.known.lock().insert(pid, ());
        let owner = Owner { child: Some(child), pid, known: Arc::clone(&self.known) };
        Supervisor::new(id, ours, directory.clone(), owner, &self.mark)
            .map_err(|error| fail(&directory, error))
    }

    /// Connects to the supervisors of before a crash. What is left of dead ones is removed.
    ///
    /// # Errors
    /// When the directory cannot be read.
    pub async fn find(&self) -> Result<Vec<(ContainerId, Supervisor)>, SupervisorsError> {
        let fail = |source| SupervisorsError { path: self.directory.clone(), source };
        let mut found = Vec::new();
        for entry in fs::read_dir(&self.directory).map_err(fail)?.flatten() {
            let Some(id) = entry.file_name().to_str().and_then(ContainerId::parse) else { continue };
            let identity = Identity::read(&entry.path().join(IDENTITY)).filter(Identity::is_alive);
            if let Some(Identity { pid, .. }) = identity {
                if let Some(supervisor) = self.connect(&id, &entry.path(), pid).await {
                    found.push((id, supervisor));
                    continue;
                }
                // Not to be left running beside another run of the same container.
                tracing::warn!(container = %id, pid, "a supervisor does not answer; it is killed with its container");
                process::kill_tree(pid);
            }
            let _ = remains::end_marked_until_gone(&format!("{}/{id}", self.mark)).await;
            let _ = fs::remove_dir_all(entry.path());
        }
        Ok(found)
    }

    async fn connect(&self, id: &ContainerId, directory: &Path, pid: i32) -> Option<Supervisor> {
        // A path of any length, although a socket's has 108 bytes at most (unix(7)).
        let opened = fs::File::open(directory).ok()?;
        let path = format!("/proc/self/fd/{}/{SOCKET}", opened.as_raw_fd());
        let stream = tokio::time::timeout(GREETING_LIMIT, UnixStream::connect(path)).await.ok()?.ok()?;
        let stream = stream.into_std().ok()?;
        let owner = Owner { child: None, pid, known: Arc::clone(&self.known) };
        Supervisor::new(id.clone(), stream, directory.to_owned(), owner, &self.mark).ok()
    }

    /// Ends, for ever, what dead supervisors leave to this process (which is a child subreaper), and reaps it.
    /// `is_ours` tells the children that somebody else in this process started and waits for.
    pub async fn reap_strays(&self, is_ours: impl Fn(i32) -> bool) {
        let mut seen: BTreeMap<i32, Instant> = BTreeMap::new();
        let mut deaths = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::child()).ok();
        loop {
            let death = async {
                match &mut deaths {
                    Some(deaths) => deaths.recv().await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                _ = death => {}
                () = self.known.look.notified() => {}
                () = tokio::time::sleep(LOOK_EVERY) => {}
            }
            self.look_for_strays(&mut seen, &is_ours);
        }
    }

    fn look_for_strays(&self, seen: &mut BTreeMap<i32, Instant>, is_ours: &impl Fn(i32) -> bool) {
        let children = process::children(nix::unistd::getpid().as_raw());
        seen.retain(|pid, _| children.contains(pid));
        for pid in children {
            if self.known.lock().contains_key(&pid) || is_ours(pid) {
                continue;
            }
            let first = *seen.entry(pid).or_insert_with(Instant::now);
            let marked =
                process::variable(pid, MARK).is_some_and(|mark| remains::is_marked(&mark, &self.mark));
            let zombie = process::stat(pid).is_some_and(|stat| stat.state == 'Z');
            if zombie && first.elapsed() > DEATH_LIMIT {
                let _ = waitpid(Pid::from_raw(pid), Some(WaitPidFlag::WNOHANG));
            } else if marked || first.elapsed() > UNKNOWN_LIMIT {
                tracing::warn!(
                    process = process::describe(pid),
                    "the remains of a dead supervisor are killed"
                );
                process::kill_tree(pid);
                // Its children come to this process now; they are looked for in a moment.
                self.known.look.notify_one();
            } else if zombie {
                self.known.look.notify_waiters();
            }
        }
    }
}

/// A supervisor's process.
struct Owner {
    child: Option<Child>,
    pid: i32,
    known: Arc<Known>,
}

impl Drop for Owner {
    fn drop(&mut self) {
        // From here on the reaper takes care of it.
        self.known.lock().remove(&self.pid);
        self.known.look.notify_one();
    }
}

/// What a program that is run in a container besides its own has for standard input, output and error.
#[derive(Debug)]
pub enum ExecStdio {
    /// One terminal for all three.
    Terminal(OwnedFd),
    /// Each its own.
    Pipes([OwnedFd; 3]),
}

/// The supervisor of one run of one container. Dropping it lets it go: it ends its container after its orphan timeout.
pub struct Supervisor {
    id: ContainerId,
    reader: BufReader<OwnedReadHalf>,
    writer: OwnedWriteHalf,
    partial: Vec<u8>,
    directory: PathBuf,
    owner: Owner,
    mark: String,
    over: bool,
}

impl Supervisor {
    fn new(
        id: ContainerId,
        stream: StdStream,
        directory: PathBuf,
        owner: Owner,
        mark: &str,
    ) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        let (reader, writer) = UnixStream::from_std(stream)?.into_split();
        let mark = format!("{mark}/{id}");
        Ok(Self {
            id,
            reader: BufReader::new(reader),
            writer,
            partial: Vec::new(),
            directory,
            owner,
            mark,
            over: false,
        })
    }

    /// Which run it is.
    #[must_use]
    pub fn id(&self) -> &ContainerId {
        &self.id
    }

    /// The supervisor's own process.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.owner.pid
    }

    async fn order(&mut self, order: &Order) {
        // A supervisor that is gone is told of by `next`.
        let _ = self.writer.write_all(&line(order)).await;
    }

    /// Starts the container.
    pub async fn start(&mut self, spec: ContainerSpec) {
        self.order(&Order::Start(Box::new(spec))).await;
    }

    /// SIGTERM to the container's process group now, SIGKILL to its whole tree after `grace`. A later call may only
    /// shorten it.
    pub async fn terminate(&mut self, grace: Duration) {
        self.order(&Order::Terminate(grace)).await;
    }

    /// SIGKILL to its whole tree now.
    pub async fn kill(&mut self) {
        self.order(&Order::Kill).await;
    }

    /// Has all of the container run on these CPUs from now on.
    pub async fn set_cpus(&mut self, cpus: Vec<usize>) {
        self.order(&Order::Cpus(cpus)).await;
    }

    /// Tells when the container ends at the latest should the pilot be gone.
    pub async fn set_drain(&mut self, at: SystemTime) {
        self.order(&Order::Drain(at)).await;
    }

    /// Runs another program in the container's surroundings: its environment, directory and limits. `stdio` are its
    /// standard input, output and error, or one terminal. Its end is told with `id`.
    pub async fn exec(&mut self, id: u64, argv: Vec<String>, stdio: ExecStdio) {
        let terminal = matches!(stdio, ExecStdio::Terminal(_));
        let order = Order::Exec(ExecSpec { id, argv, terminal });
        match stdio {
            ExecStdio::Terminal(terminal) => self.order_with(&order, &[terminal.as_fd()]).await,
            ExecStdio::Pipes([stdin, stdout, stderr]) => {
                self.order_with(&order, &[stdin.as_fd(), stdout.as_fd(), stderr.as_fd()]).await;
            }
        }
    }

    /// A signal to the process group of a program that was started by [`Supervisor::exec`].
    pub async fn signal_exec(&mut self, id: u64, signal: Signal) {
        self.order(&Order::Signal { id, signal: signal as i32 }).await;
    }

    /// Joins the container: what it writes from now on goes to the last two descriptors as well, and what comes from the
    /// first is its input, where it takes any. They close when it ends.
    pub async fn attach(&mut self, takes_input: bool, [input, stdout, stderr]: [OwnedFd; 3]) {
        let order = Order::Attach { input: takes_input };
        self.order_with(&order, &[input.as_fd(), stdout.as_fd(), stderr.as_fd()]).await;
    }

    /// Tells the container's own terminal how large it is.
    pub async fn resize(&mut self, columns: u16, rows: u16) {
        self.order(&Order::Resize { columns, rows }).await;
    }

    async fn order_with(&mut self, order: &Order, descriptors: &[BorrowedFd<'_>]) {
        let text = line(order);
        let socket: &UnixStream = self.writer.as_ref();
        let send = || super::descriptors::send(socket.as_fd(), &text, descriptors);
        // A supervisor that is gone is told of by `next`.
        let Ok(sent) = socket.async_io(tokio::io::Interest::WRITABLE, send).await else { return };
        let _ = self.writer.write_all(&text[sent..]).await;
    }

    /// What happens next; cancel safe. After the last event it waits for ever.
    pub async fn next(&mut self) -> Event {
        if self.over {
            return std::future::pending().await;
        }
        loop {
            // What was read stays in `partial` when this is cancelled.
            let read = self.reader.read_until(b'\n', &mut self.partial).await;
            if !matches!(read, Ok(n) if n > 0) {
                self.over = true;
                return Event::Lost { message: self.bury().await };
            }
            if self.partial.last() != Some(&b'\n') {
                continue;
            }
            let text = std::mem::take(&mut self.partial);
            if let Ok(event) = serde_json::from_slice::<Event>(&text) {
                self.over = matches!(event, Event::Ended(_) | Event::StartFailed(_) | Event::Lost { .. });
                return event;
            }
        }
    }

    /// The supervisor is gone before its container: ends what it leaves, and says what is known.
    async fn bury(&mut self) -> String {
        let end = Instant::now() + DEATH_LIMIT;
        let mut how = "is gone".to_owned();
        loop {
            match waitpid(Pid::from_raw(self.owner.pid), Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::Signaled(_, signal, _)) => how = format!("was killed by {signal}"),
                Ok(WaitStatus::Exited(_, code)) => how = format!("exited with {code}"),
                Ok(_) if Instant::now() < end => {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                    continue;
                }
                Ok(_) | Err(_) => {}
            }
            break;
        }
        self.owner.child = None;
        let killed = remains::end_marked_until_gone(&self.mark).await;
        let _ = fs::remove_dir_all(&self.directory);
        format!(
            "the container's supervisor (process {}) {how}, so nobody knows how the container would have ended; what it \
             left ({killed} processes) was killed",
            self.owner.pid
        )
    }

    /// The end is recorded: the supervisor goes, and its state with it.
    pub async fn acknowledge(mut self) {
        self.order(&Order::Acknowledge).await;
        let end = Instant::now() + DEATH_LIMIT;
        while let Ok(WaitStatus::StillAlive) =
            waitpid(Pid::from_raw(self.owner.pid), Some(WaitPidFlag::WNOHANG))
        {
            if Instant::now() > end {
                break;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let _ = fs::remove_dir_all(&self.directory);
    }
}
