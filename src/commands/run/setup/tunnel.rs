//! `--tunnel`: the tunnels of a pilot, and what the Node and the pods say of them.
//!
//! [`open`] starts them before the API server is reached, [`follow_node`] keeps the Node's endpoint and its condition
//! `TunnelDown`, [`follow_pods`] forwards what pods declare. What is said is decided by [`health`] and [`endpoint`].

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use super::SetupError;
use crate::allocation::Environment;
use crate::cli::RunArgs;
use crate::cluster::Kube;
use crate::node::{Endpoint, Further, NodeConfig, NodeHandle};
use crate::pod::api::Api;
use crate::pod::ports::{self, Exposed, Ports};
use crate::tunnel::{self, Settings, Status, Tunnels};

/// The condition that says whether a tunnel is down.
const CONDITION: &str = "TunnelDown";

/// How much of all tunnels' problems goes into the condition's message.
const MAX_MESSAGE: usize = 1024;

/// How long tunnels are waited for by which only the Node is reached: the pilot works without them, and the Node says that
/// they are down. One connection takes no longer.
const NODE_ONLY: Duration = Duration::from_secs(15);

/// Most names and addresses that a serving certificate is asked for. A name may stand for many login hosts, a few of which
/// are seen in a job's time; and each one more is a request that somebody may have to approve.
const MAX_REACHED_AT: usize = 16;

/// Pause before annotations are sent again that were not taken.
const ANNOTATE_RETRY: Duration = Duration::from_secs(5);

/// Starts the tunnels, where there are any, and leads the way to the API server through them. `node_port` is the port of
/// this host at which the Node's own API is served.
///
/// # Errors
/// When they cannot be started. One that does not come up is no error here: [`wait`] waits for it.
pub(in crate::commands) async fn open(
    args: &RunArgs,
    kube: &mut Kube,
    node_port: Option<u16>,
    state_dir: &Path,
    env: &Environment,
) -> Result<Option<Tunnels>, SetupError> {
    if args.tunnels.is_empty() {
        return Ok(None);
    }
    let opened = tunnel::spawn(args.tunnels.clone(), node_port, kube.host_port(), state_dir, env).await;
    let tunnels = opened.map_err(|error| SetupError::Host(error.to_string()))?;
    if let Some(address) = tunnels.api() {
        kube.lead_through(address);
    }
    Ok(Some(tunnels))
}

/// Waits until a tunnel is up that leads to the API server, or for a moment where none does.
///
/// # Errors
/// When none is in time, with what keeps each down.
pub(super) async fn wait(tunnels: Option<&Tunnels>, limit: Duration) -> Result<(), SetupError> {
    match tunnels {
        Some(tunnels) if tunnels.api().is_some() => {
            tunnels.wait(limit).await.map_err(|error| SetupError::Host(error.to_string()))
        }
        Some(tunnels) => {
            let _ = tunnels.wait(limit.min(NODE_ONLY)).await;
            Ok(())
        }
        None => Ok(()),
    }
}

/// The address under which the Node is registered: a login host's.
pub(super) fn address(tunnels: &Tunnels) -> Option<String> {
    let statuses = tunnels.statuses();
    let all = statuses.borrow();
    let known = all.iter().find(|status| status.up).or_else(|| all.first());
    known.and_then(|status| status.far_address).map(|address| address.to_string())
}

/// Makes the Node say from the first that its own API is reached through a tunnel.
pub(super) fn lead_to(config: &mut NodeConfig, tunnels: &Tunnels) {
    config.hostname.clone_from(&config.internal_ip);
    config.daemon_port = endpoint(&tunnels.statuses().borrow(), true).port;
}

/// The names and addresses by which the Node is reached, now and later: `own`, and the address of each login host, since the
/// Node takes another's when a tunnel falls. With `fixed`, its address stays as it is.
pub(super) fn reached_at(
    own: Vec<String>,
    tunnels: Option<&Tunnels>,
    fixed: bool,
) -> watch::Receiver<Vec<String>> {
    let (sender, reached_at) = watch::channel(own);
    if let Some(tunnels) = tunnels.filter(|_| !fixed) {
        let mut statuses = tunnels.statuses();
        sender.send_modify(|known| {
            add_far_addresses(known, &statuses.borrow_and_update());
        });
        tokio::spawn(async move {
            while statuses.changed().await.is_ok() {
                let all = statuses.borrow_and_update().clone();
                sender.send_if_modified(|known| add_far_addresses(known, &all));
            }
        });
    }
    reached_at
}

/// Adds the login hosts' addresses that are new; whether there were any. Those that were seen stay: a name that stands for
/// several hosts gives each of them in turn.
fn add_far_addresses(known: &mut Vec<String>, all: &[Status]) -> bool {
    let before = known.len();
    for address in all.iter().filter_map(|status| status.far_address).map(|address| address.to_string()) {
        if known.len() < MAX_REACHED_AT && !known.contains(&address) {
            known.push(address);
        }
    }
    known.len() > before
}

/// Keeps what the Node says of its tunnels until the pilot ends. With `fixed`, its address stays as it is.
pub(super) fn follow_node(node: &Arc<NodeHandle>, tunnels: &Tunnels, fixed: bool) {
    let (node, mut statuses) = (Arc::clone(node), tunnels.statuses());
    tokio::spawn(async move {
        loop {
            let all = statuses.borrow_and_update().clone();
            node.change_health(|health_now| {
                health_now.further = vec![health(&all)];
                health_now.endpoint = Some(endpoint(&all, fixed));
            });
            if statuses.changed().await.is_err() {
                return;
            }
        }
    });
}

/// The condition that tells how the tunnels are.
fn health(all: &[Status]) -> Further {
    let down: Vec<String> = all.iter().filter(|status| !status.up).map(Status::describe).collect();
    let reason = match down.len() {
        0 => "TunnelsAreUp",
        some if some < all.len() => "SomeTunnelsAreDown",
        _ => "AllTunnelsAreDown",
    };
    let message = if down.is_empty() { "every tunnel is up".to_owned() } else { down.join("; ") };
    let message = message.chars().take(MAX_MESSAGE).collect();
    Further { kind: CONDITION, holds: !down.is_empty(), reason, message }
}

/// Where the Node's own API is reached: through the first tunnel that is up. Nowhere while none is: the far port may be
/// another's by then.
fn endpoint(all: &[Status], fixed: bool) -> Endpoint {
    let used = all.iter().find(|status| status.up && status.far_port.is_some());
    let address = used.and_then(|status| status.far_address).filter(|_| !fixed);
    Endpoint { ip: address.map(|ip| ip.to_string()), port: used.and_then(|status| status.far_port) }
}

/// The ports of pods, where a tunnel forwards them.
pub(super) fn pod_ports(tunnels: Option<&Tunnels>) -> Option<Ports> {
    tunnels.filter(|tunnels| tunnels.settings().iter().any(|s| s.pod_ports)).map(|_| Ports::default())
}

/// Forwards what running pods declare, and tells each pod where it is reached, until the pilot ends.
pub(super) fn follow_pods(api: Api, ports: &Ports, tunnels: &Tunnels) {
    let follower = PodPorts {
        api,
        pods: ports.subscribe(),
        statuses: tunnels.statuses(),
        wanted: tunnels.ports(),
        settings: tunnels.settings().to_vec(),
        told: BTreeMap::new(),
        complained: false,
    };
    tokio::spawn(follower.follow());
}

struct PodPorts {
    api: Api,
    pods: watch::Receiver<BTreeMap<String, Exposed>>,
    statuses: watch::Receiver<Vec<Status>>,
    wanted: watch::Sender<BTreeSet<u16>>,
    settings: Vec<Settings>,
    /// What each pod was told.
    told: BTreeMap<String, (Exposed, Annotations)>,
    complained: bool,
}

type Annotations = BTreeMap<String, Option<String>>;

impl PodPorts {
    async fn follow(mut self) {
        loop {
            let pods = self.pods.borrow_and_update().clone();
            let wanted: BTreeSet<u16> = pods.values().flat_map(|pod| pod.ports.iter().copied()).collect();
            self.wanted.send_if_modified(|old| std::mem::replace(old, wanted.clone()) != wanted);
            let (host, forwards) = forwards(&self.statuses.borrow_and_update(), &self.settings);
            let now: BTreeMap<String, (Exposed, Annotations)> = pods
                .into_iter()
                .map(|(uid, pod)| {
                    let told = ports::annotations(&pod, &host, &forwards);
                    (uid, (pod, told))
                })
                .collect();
            let all_told = self.tell(now).await;
            let again = async {
                if all_told { std::future::pending().await } else { tokio::time::sleep(ANNOTATE_RETRY).await }
            };
            let go_on = tokio::select! {
                changed = self.pods.changed() => changed.is_ok(),
                changed = self.statuses.changed() => changed.is_ok(),
                () = again => true,
            };
            if !go_on {
                return;
            }
        }
    }

    /// Whether every pod that runs has been told.
    async fn tell(&mut self, now: BTreeMap<String, (Exposed, Annotations)>) -> bool {
        let nothing = Annotations::new();
        let gone: Vec<String> = self.told.keys().filter(|uid| !now.contains_key(*uid)).cloned().collect();
        for uid in gone {
            // One try: the pod has ended, and mostly it goes itself.
            if let Some((pod, before)) = self.told.remove(&uid) {
                let _ = self.send(&uid, &pod, &ports::difference(&before, &nothing)).await;
            }
        }
        let mut all = true;
        for (uid, (pod, annotations)) in now {
            let before = self.told.get(&uid).map_or(&nothing, |(_, before)| before);
            if self.send(&uid, &pod, &ports::difference(before, &annotations)).await {
                self.told.insert(uid, (pod, annotations));
            } else {
                all = false;
            }
        }
        all
    }

    async fn send(&mut self, uid: &str, pod: &Exposed, change: &Annotations) -> bool {
        if change.is_empty() {
            return true;
        }
        match self.api.annotate(&pod.namespace, &pod.name, uid, change).await {
            Ok(()) => {
                self.complained = false;
                true
            }
            Err(error) => {
                if !self.complained {
                    tracing::warn!(pod = pod.name, namespace = pod.namespace, %error, "a pod could not be told where its ports are reached; it is tried again");
                }
                self.complained = true;
                false
            }
        }
    }
}

/// Where pods' ports are reached: the first tunnel that forwards any.
fn forwards(all: &[Status], settings: &[Settings]) -> (String, BTreeMap<u16, u16>) {
    let used = all.iter().zip(settings).find(|(status, settings)| status.up && settings.pod_ports);
    used.map_or_else(Default::default, |(status, settings)| {
        // An address that is set is what others use; else the name says more than what it resolves to here.
        let host = settings.address.map_or_else(|| status.far_host.clone(), |address| address.to_string());
        (host, status.ports.clone())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::SystemTime;

    fn status(name: &str, up: bool, port: Option<u16>) -> Status {
        Status {
            name: name.to_owned(),
            up,
            since: SystemTime::UNIX_EPOCH,
            far_host: format!("{name}.site.org"),
            far_address: Some([198, 51, 100, 7].into()),
            far_port: port,
            problem: (!up).then(|| "Connection refused".to_owned()),
            ports: BTreeMap::from([(8080, 31080)]),
        }
    }

    #[test]
    fn the_condition_says_which_tunnels_are_down_and_why() {
        let up = health(&[status("a", true, None), status("b", true, None)]);
        assert_eq!((up.holds, up.reason), (false, "TunnelsAreUp"));
        let some = health(&[status("a", true, None), status("b", false, None)]);
        assert_eq!((some.holds, some.reason), (true, "SomeTunnelsAreDown"));
        assert_eq!(some.message, "b: Connection refused");
        assert_eq!(health(&[status("a", false, None)]).reason, "AllTunnelsAreDown");
    }

    #[test]
    fn the_node_is_dialled_through_the_first_tunnel_that_is_up() {
        let all = [status("a", false, None), status("b", true, None), status("c", true, Some(31000))];
        assert_eq!(endpoint(&all, false), Endpoint { ip: Some("198.51.100.7".into()), port: Some(31000) });
        // --advertise-address holds.
        assert_eq!(endpoint(&all, true), Endpoint { ip: None, port: Some(31000) });
        assert_eq!(endpoint(&all[..2], false), Endpoint { ip: None, port: None });
    }

    #[test]
    fn the_node_is_reached_at_every_login_host_whether_its_tunnel_is_up_or_not() {
        let at =
            |last: u8, up| Status { far_address: Some([198, 51, 100, last].into()), ..status("a", up, None) };
        let mut known = vec!["node-1".to_owned(), "198.51.100.7".to_owned()];
        let unknown = Status { far_address: None, ..status("c", false, None) };
        assert!(add_far_addresses(&mut known, &[at(7, true), at(8, false), unknown.clone()]));
        assert_eq!(known, ["node-1", "198.51.100.7", "198.51.100.8"]);
        assert!(!add_far_addresses(&mut known, &[at(8, true), unknown]), "nothing is new");
        // One of a name's hosts after the other.
        assert!(add_far_addresses(&mut known, &[at(9, true)]));
        assert_eq!(known.len(), 4);
        for last in 10..100 {
            add_far_addresses(&mut known, &[at(last, true)]);
        }
        assert_eq!(known.len(), MAX_REACHED_AT);
    }

    #[test]
    fn pods_are_reached_through_a_tunnel_that_forwards_their_ports() {
        let all = [status("a", true, None), status("b", true, None)];
        let settings = |urls: [&str; 2]| urls.map(|url| tunnel::url::parse(url).unwrap());
        let (host, ports) = forwards(&all, &settings(["ssh://a", "ssh://b?ports=pods"]));
        assert_eq!((host.as_str(), ports[&8080]), ("b.site.org", 31080));
        assert!(forwards(&all, &settings(["ssh://a", "ssh://b"])).1.is_empty());
        let given = forwards(&all, &settings(["ssh://a?ports=pods&address=203.0.113.9", "ssh://b"])).0;
        assert_eq!(given, "203.0.113.9");
    }
}
