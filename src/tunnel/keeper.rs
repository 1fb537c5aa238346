//! Keeps one tunnel: connects, forwards, tells how it is, and begins anew when it falls.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::sync::watch;
use tokio::time::{Instant, timeout};

use super::Status;
use super::backoff::{STEADY, chance, delay};
use super::master::{Master, Start};
use super::ssh::{self, Ask};
use super::url::Settings;
use crate::allocation::Environment;
use crate::allocation::command::Program;

/// Further ports that one tunnel forwards: each is a listening socket of sshd on a login host that others use too.
pub const MAX_PORTS: usize = 100;

/// How long a port that the far side refused is left alone.
const PORT_RETRY: Duration = Duration::from_secs(60);

/// How long the login host's name and address may take to be found.
const RESOLVE_LIMIT: Duration = Duration::from_secs(5);

/// One tunnel and all that it needs.
pub struct Keeper {
    pub index: usize,
    pub settings: Settings,
    pub node_port: Option<u16>,
    pub api: Option<(String, u16)>,
    pub program: PathBuf,
    pub directory: PathBuf,
    pub env: Environment,
    pub statuses: Arc<watch::Sender<Vec<Status>>>,
    pub ports: watch::Receiver<BTreeSet<u16>>,
}

impl Keeper {
    /// Until the task is aborted.
    pub async fn keep(mut self) {
        let name = self.settings.name();
        let (mut failures, mut told_down) = (0u32, false);
        loop {
            let ((), connected) = tokio::join!(self.resolve(), self.connect());
            let problem = match connected {
                Ok((mut master, far_port)) => {
                    let since = Instant::now();
                    self.up(far_port);
                    tracing::info!(tunnel = name, far_port, "the tunnel is up");
                    (failures, told_down) = (failures.saturating_add(1), false);
                    self.hold(&mut master).await;
                    if since.elapsed() >= STEADY {
                        failures = 0;
                    }
                    master.end().await
                }
                Err(problem) => {
                    failures = failures.saturating_add(1);
                    problem
                }
            };
            let wait = delay(failures.saturating_sub(1), chance());
            if told_down {
                tracing::debug!(tunnel = name, problem, retry_in = ?wait, "the tunnel is still down");
            } else {
                tracing::warn!(
                    tunnel = name,
                    problem,
                    "the tunnel is down; it is tried again until it is up"
                );
                told_down = true;
            }
            self.down(problem);
            tokio::time::sleep(wait).await;
        }
    }

    /// Connects, and asks for what the tunnel is for: the far side's port for the Node's own, where there is one. All of it
    /// is given or nothing is.
    async fn connect(&self) -> Result<(Master, Option<u16>), String> {
        let start = Start {
            program: &self.program,
            index: self.index,
            settings: &self.settings,
            directory: &self.directory,
            env: &self.env,
        };
        let master = Master::connect(&start).await?;
        if let Some((host, port)) = &self.api {
            let asked = master.ask(&Ask::Api { host, port: *port }).await;
            asked.map_err(|said| format!("the way to the API server cannot be opened: {said}"))?;
        }
        let mut far_port = None;
        if let Some(port) = self.node_port {
            let Settings { bind, remote_port: far, .. } = &self.settings;
            far_port = Some(master.remote(bind, *far, port).await.map_err(|said| {
                let which = if *far == 0 { "a port".to_owned() } else { format!("port {far}") };
                format!("the far side does not open {which} at {bind}: {said}")
            })?);
        }
        master.forget();
        Ok((master, far_port))
    }

    /// Forwards the further ports that are wanted until ssh ends.
    async fn hold(&mut self, master: &mut Master) {
        let (mut have, mut refused) = (BTreeMap::new(), BTreeSet::new());
        let mut follows = true;
        loop {
            let mut retry = None;
            if self.settings.pod_ports {
                let wanted = self.ports.borrow_and_update().clone();
                self.reconcile(master, &wanted, &mut have, &mut refused).await;
                retry = (!refused.is_empty()).then(|| Instant::now() + PORT_RETRY);
            }
            let again = async {
                match retry {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = master.ended() => return,
                changed = self.ports.changed(), if follows && self.settings.pod_ports => follows = changed.is_ok(),
                () = again => {}
            }
        }
    }

    async fn reconcile(
        &self,
        master: &Master,
        wanted: &BTreeSet<u16>,
        have: &mut BTreeMap<u16, u16>,
        refused: &mut BTreeSet<u16>,
    ) {
        let (bind, tunnel) = (self.settings.bind.as_str(), self.settings.name());
        let change = changes(wanted, have);
        for port in change.cancel {
            if let Err(problem) = master.ask(&Ask::Cancel { bind, far: 0, port }).await {
                tracing::debug!(tunnel, port, problem, "a port could not be taken back");
            }
            have.remove(&port);
        }
        refused.retain(|port| wanted.contains(port));
        if change.too_many > 0 {
            tracing::warn!(
                tunnel,
                left_out = change.too_many,
                "a tunnel forwards {MAX_PORTS} ports of pods and no more"
            );
        }
        for port in change.add {
            match master.remote(bind, 0, port).await {
                Ok(far) => {
                    refused.remove(&port);
                    have.insert(port, far);
                }
                Err(problem) => {
                    if refused.insert(port) {
                        tracing::warn!(
                            tunnel,
                            port,
                            problem,
                            "a pod's port is not forwarded; it is tried again"
                        );
                    }
                }
            }
        }
        self.tell(|status| {
            let changed = status.ports != *have;
            status.ports.clone_from(have);
            changed
        });
    }

    /// Finds the login host's real name and address; what is not found stays as it was.
    async fn resolve(&self) {
        let args = ssh::resolve(&self.settings);
        let program = Program::at(&self.program, &self.env).directory(&self.directory);
        let asked = program.args(args.iter().map(String::as_str)).run(RESOLVE_LIMIT).await;
        let known = asked.ok().filter(|output| output.status.success());
        let known = known.and_then(|output| ssh::host_name(&output.stdout).map(str::to_owned));
        let host = known.unwrap_or_else(|| self.settings.host.clone());
        let address = match self.settings.address {
            Some(address) => Some(address),
            None => address_of(&host).await,
        };
        self.tell(|status| {
            let address = address.or(status.far_address);
            let changed = status.far_host != host || status.far_address != address;
            (status.far_host, status.far_address) = (host, address);
            changed
        });
    }

    fn up(&self, far_port: Option<u16>) {
        self.tell(|status| {
            (status.up, status.since) = (true, SystemTime::now());
            (status.far_port, status.problem) = (far_port, None);
            true
        });
    }

    fn down(&self, problem: String) {
        self.tell(|status| {
            if !status.up && status.problem.as_ref() == Some(&problem) {
                return false;
            }
            if status.up {
                status.since = SystemTime::now();
            }
            (status.up, status.far_port, status.problem) = (false, None, Some(problem));
            status.ports.clear();
            true
        });
    }

    /// Changes this tunnel's status; those who follow are woken where `change` says that it did.
    fn tell(&self, change: impl FnOnce(&mut Status) -> bool) {
        self.statuses.send_if_modified(|all| all.get_mut(self.index).is_some_and(change));
    }
}

/// The address of a host; IPv4 first, which every Node has.
async fn address_of(host: &str) -> Option<IpAddr> {
    let found = timeout(RESOLVE_LIMIT, tokio::net::lookup_host((host, 0))).await.ok()?.ok()?;
    let mut all: Vec<IpAddr> = found.map(|socket| socket.ip()).collect();
    all.sort_by_key(IpAddr::is_ipv6);
    all.first().copied()
}

/// What is to be asked for.
#[derive(Debug, PartialEq, Eq)]
struct Changes {
    cancel: Vec<u16>,
    add: Vec<u16>,
    too_many: usize,
}

fn changes(wanted: &BTreeSet<u16>, have: &BTreeMap<u16, u16>) -> Changes {
    let cancel: Vec<u16> = have.keys().copied().filter(|port| !wanted.contains(port)).collect();
    let mut add: Vec<u16> = wanted.iter().copied().filter(|port| !have.contains_key(port)).collect();
    let room = MAX_PORTS.saturating_sub(have.len() - cancel.len());
    let too_many = add.len().saturating_sub(room);
    add.truncate(room);
    Changes { cancel, add, too_many }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_differs_is_asked_for() {
        let have = BTreeMap::from([(80, 31080), (81, 31081)]);
        let change = changes(&BTreeSet::from([81, 82, 83]), &have);
        assert_eq!(change, Changes { cancel: vec![80], add: vec![82, 83], too_many: 0 });
        assert_eq!(
            changes(&BTreeSet::from([80, 81]), &have),
            Changes { cancel: vec![], add: vec![], too_many: 0 }
        );
    }

    #[test]
    fn a_tunnel_forwards_a_hundred_ports_and_no_more() {
        let wanted: BTreeSet<u16> = (1..=150).collect();
        let have = BTreeMap::from([(1, 31001), (999, 31999)]);
        let change = changes(&wanted, &have);
        assert_eq!((change.add.len(), change.too_many, change.cancel), (99, 50, vec![999]));
    }
}
