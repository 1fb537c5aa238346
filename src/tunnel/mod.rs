//! Ways through a firewall: OpenSSH clients that are kept running, and what they forward. Nothing of Kubernetes.
//!
//! [`spawn`] starts one for each `--tunnel` and gives [`Tunnels`]: their [`Status`], and a local address that leads to the
//! API server. What `--tunnel` says is read by [`url`], what ssh is told and says is in [`ssh`].

pub mod backoff;
mod keeper;
mod master;
mod peer;
mod relay;
pub mod ssh;
pub mod url;

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::sync::watch;
use tokio::task::AbortHandle;

use self::keeper::Keeper;
use self::relay::Relay;
pub use self::url::Settings;
use crate::allocation::Environment;
use crate::files;

/// How one tunnel is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Status {
    /// `ssh://user@login:port`, without options.
    pub name: String,
    /// Whether ssh is connected and everything that it must forward is forwarded.
    pub up: bool,
    /// Since when that is so.
    pub since: SystemTime,
    /// The login host's name, as ssh's own configuration resolves it.
    pub far_host: String,
    /// The login host's address, where it is known.
    pub far_address: Option<IpAddr>,
    /// The port of the login host that leads to the Node's own, while the tunnel is up.
    pub far_port: Option<u16>,
    /// What keeps it down.
    pub problem: Option<String>,
    /// Further ports of this host that are forwarded, and the login host's ports that lead there.
    pub ports: BTreeMap<u16, u16>,
}

/// Why there are no tunnels.
#[derive(Debug, thiserror::Error)]
pub enum TunnelError {
    /// No ssh.
    #[error(
        "no program `ssh` in PATH ({path}), which --tunnel (JIRIAF_TUNNEL) wants: install OpenSSH's client or add its \
         directory to the job's PATH"
    )]
    NoSsh {
        /// Where it was looked for.
        path: String,
    },
    /// The directory of the control sockets is no good.
    #[error("{path}: {problem}; choose another place with --state-dir", path = path.display())]
    Directory {
        /// The directory.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// There is no local port for the API server.
    #[error("no port of 127.0.0.1 can be taken for the way to the API server: {0}")]
    Listen(#[source] std::io::Error),
    /// None came up in time.
    #[error(
        "no tunnel came up within {waited} s: {problems}; does `ssh -o BatchMode=yes` from this host to there work without \
         a question?"
    )]
    Down {
        /// Seconds that were waited.
        waited: u64,
        /// Each tunnel and what keeps it down.
        problems: String,
    },
}

/// The tunnels of this process. They end when this is dropped.
#[derive(Debug)]
pub struct Tunnels {
    statuses: watch::Receiver<Vec<Status>>,
    ports: watch::Sender<BTreeSet<u16>>,
    api: Option<SocketAddr>,
    settings: Vec<Settings>,
    tasks: Vec<AbortHandle>,
}

/// Starts a tunnel for each of `settings`. `node_port` is this host's port that the far sides lead to, and `api` the host
/// and port of the API server as the login hosts know it. Control sockets are kept in `state_dir`.
///
/// # Errors
/// When there is no ssh, or no place for its sockets. That a tunnel does not come up is no error here: see
/// [`Tunnels::wait`].
pub async fn spawn(
    settings: Vec<Settings>,
    node_port: Option<u16>,
    api: (String, u16),
    state_dir: &Path,
    env: &Environment,
) -> Result<Tunnels, TunnelError> {
    let program = env
        .find_program("ssh")
        .ok_or_else(|| TunnelError::NoSsh { path: env.get("PATH").unwrap_or("not set").to_owned() })?;
    let path = state_dir.join("tunnels");
    let wrong = |problem: String| TunnelError::Directory { path: path.clone(), problem };
    files::private_dir(&path).map_err(|error| wrong(error.to_string()))?;
    let directory = Arc::new(std::fs::File::open(&path).map_err(|error| wrong(error.to_string()))?);

    let (statuses_tx, statuses) = watch::channel(settings.iter().map(Settings::at_first).collect());
    let (ports, _) = watch::channel(BTreeSet::new());
    let statuses_tx = Arc::new(statuses_tx);
    let kept = settings.clone();
    let carriers: Vec<usize> =
        settings.iter().enumerate().filter(|(_, s)| s.api).map(|(index, _)| index).collect();
    let mut tasks = Vec::new();
    let mut local = None;
    if !carriers.is_empty() {
        let relay =
            Relay::listen(carriers, statuses.clone(), directory).await.map_err(TunnelError::Listen)?;
        local = Some(relay.address());
        tasks.push(tokio::spawn(relay.run()).abort_handle());
    }
    for (index, settings) in settings.into_iter().enumerate() {
        let keeper = Keeper {
            index,
            node_port,
            api: settings.api.then(|| api.clone()),
            settings,
            program: program.clone(),
            directory: path.clone(),
            env: env.clone(),
            statuses: Arc::clone(&statuses_tx),
            ports: ports.subscribe(),
        };
        tasks.push(tokio::spawn(keeper.keep()).abort_handle());
    }
    Ok(Tunnels { statuses, ports, api: local, settings: kept, tasks })
}

impl Tunnels {
    /// Follows all tunnels, in the order of the settings.
    #[must_use]
    pub fn statuses(&self) -> watch::Receiver<Vec<Status>> {
        self.statuses.clone()
    }

    /// The address on this host that leads to the API server, where a tunnel carries it. It stays the same while tunnels
    /// come and go; several that are up stand in for each other.
    #[must_use]
    pub fn api(&self) -> Option<SocketAddr> {
        self.api
    }

    /// What was set, in the same order.
    #[must_use]
    pub fn settings(&self) -> &[Settings] {
        &self.settings
    }

    /// Says which further ports of this host are to be forwarded, by the tunnels that do so ([`Settings::pod_ports`]).
    /// Each has a hundred at most.
    #[must_use]
    pub fn ports(&self) -> watch::Sender<BTreeSet<u16>> {
        self.ports.clone()
    }

    /// Waits until a tunnel is up: one that carries the API server, where any does.
    ///
    /// # Errors
    /// [`TunnelError::Down`] after `limit`, with what keeps each down.
    pub async fn wait(&self, limit: Duration) -> Result<(), TunnelError> {
        let any = self.api.is_none();
        let mut statuses = self.statuses();
        let up = statuses.wait_for(|all| {
            all.iter().zip(&self.settings).any(|(status, settings)| status.up && (any || settings.api))
        });
        if matches!(tokio::time::timeout(limit, up).await, Ok(Ok(_))) {
            return Ok(());
        }
        let problems: Vec<String> = self.statuses.borrow().iter().map(Status::describe).collect();
        Err(TunnelError::Down { waited: limit.as_secs(), problems: problems.join("; ") })
    }
}

impl Drop for Tunnels {
    fn drop(&mut self) {
        self.tasks.iter().for_each(AbortHandle::abort);
    }
}

impl Status {
    /// One line for people.
    #[must_use]
    pub fn describe(&self) -> String {
        match (&self.problem, self.up) {
            (_, true) => format!("{} is up", self.name),
            (Some(problem), false) => format!("{}: {problem}", self.name),
            (None, false) => format!("{} is not up yet", self.name),
        }
    }
}
