//! The TCP ports that running pods declare, for whoever makes them reachable from elsewhere (`run --tunnel`).
//!
//! A worker keeps its pod in [`Ports`] while a container runs; [`annotations`] is what the pod is told of it.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::core::v1::Pod;
use tokio::sync::watch;

use super::containers;

/// What begins the annotation of a forwarded port; its number follows.
pub const ANNOTATION: &str = "jiriaf.tunnel/";

/// A pod that runs and declares ports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exposed {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its declared TCP ports.
    pub ports: BTreeSet<u16>,
}

/// The pods that run and declare ports, by uid.
#[derive(Debug, Clone, Default)]
pub struct Ports(watch::Sender<BTreeMap<String, Exposed>>);

impl Ports {
    /// Follows them.
    #[must_use]
    pub fn subscribe(&self) -> watch::Receiver<BTreeMap<String, Exposed>> {
        self.0.subscribe()
    }

    /// Notes that a pod runs, or does not any more.
    pub fn note(&self, pod: &Pod, runs: bool) {
        let uid = pod.metadata.uid.as_deref().unwrap_or_default();
        self.0.send_if_modified(|all| {
            if !runs {
                return all.remove(uid).is_some();
            }
            // What a pod declares never changes (core/v1: a pod's ports are immutable).
            let ports = if all.contains_key(uid) { BTreeSet::new() } else { declared(pod) };
            if ports.is_empty() {
                return false;
            }
            let part = |text: &Option<String>| text.clone().unwrap_or_default();
            let (namespace, name) = (part(&pod.metadata.namespace), part(&pod.metadata.name));
            all.insert(uid.to_owned(), Exposed { namespace, name, ports });
            true
        });
    }
}

/// The TCP ports that a pod's containers declare; TCP is the default protocol (core/v1).
#[must_use]
pub fn declared(pod: &Pod) -> BTreeSet<u16> {
    let ports = containers::of(pod).flat_map(|(_, container)| container.ports.clone().unwrap_or_default());
    let tcp = ports.filter(|port| matches!(port.protocol.as_deref(), None | Some("TCP")));
    tcp.filter_map(|port| u16::try_from(port.container_port).ok()).filter(|port| *port != 0).collect()
}

/// The annotations of a pod whose ports are reached at `host` by the ports that `forwards` names.
#[must_use]
pub fn annotations(
    pod: &Exposed,
    host: &str,
    forwards: &BTreeMap<u16, u16>,
) -> BTreeMap<String, Option<String>> {
    let host = if host.contains(':') { format!("[{host}]") } else { host.to_owned() };
    let far = pod.ports.iter().filter_map(|port| Some((port, forwards.get(port)?)));
    far.map(|(port, far)| (format!("{ANNOTATION}{port}"), Some(format!("{host}:{far}")))).collect()
}

/// What is to be sent so that a pod that was told `before` has `now`: what is gone is taken out. Nothing where they agree.
#[must_use]
pub fn difference(
    before: &BTreeMap<String, Option<String>>,
    now: &BTreeMap<String, Option<String>>,
) -> BTreeMap<String, Option<String>> {
    let gone = before.keys().filter(|key| !now.contains_key(*key)).map(|key| (key.clone(), None));
    let new = now.iter().filter(|(key, value)| before.get(*key) != Some(value));
    gone.chain(new.map(|(key, value)| (key.clone(), value.clone()))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn pod() -> Pod {
        serde_json::from_value(json!({
            "metadata": {"uid": "u", "name": "p", "namespace": "n"},
            "spec": {"containers": [
                {"name": "a", "ports": [{"containerPort": 8080}, {"containerPort": 53, "protocol": "UDP"}]},
                {"name": "b", "ports": [{"containerPort": 9090, "protocol": "TCP"}, {"containerPort": 8080}]},
                {"name": "c"},
            ]},
        }))
        .unwrap()
    }

    #[test]
    fn tcp_ports_of_all_containers_count_once() {
        assert_eq!(declared(&pod()), BTreeSet::from([8080, 9090]));
        assert_eq!(declared(&Pod::default()), BTreeSet::new());
    }

    #[test]
    fn a_pod_is_known_while_it_runs_and_told_of_once() {
        let ports = Ports::default();
        let mut seen = ports.subscribe();
        ports.note(&pod(), false);
        assert!(!seen.has_changed().unwrap());
        ports.note(&pod(), true);
        assert_eq!(seen.borrow_and_update()["u"].ports, BTreeSet::from([8080, 9090]));
        ports.note(&pod(), true);
        assert!(!seen.has_changed().unwrap());
        ports.note(&pod(), false);
        assert!(seen.borrow_and_update().is_empty());
        let mut bare = pod();
        bare.spec = None;
        ports.note(&bare, true);
        assert!(!seen.has_changed().unwrap());
    }

    #[test]
    fn a_pod_is_told_where_each_forwarded_port_is_reached() {
        let exposed = Exposed { namespace: "n".into(), name: "p".into(), ports: [8080, 9090].into() };
        let told = annotations(&exposed, "login.site.org", &BTreeMap::from([(8080, 31080), (1, 2)]));
        let far = |text: &str| Some(text.to_owned());
        assert_eq!(told, BTreeMap::from([("jiriaf.tunnel/8080".to_owned(), far("login.site.org:31080"))]));
        let six = annotations(&exposed, "2001:db8::1", &BTreeMap::from([(9090, 5)]));
        assert_eq!(six["jiriaf.tunnel/9090"], far("[2001:db8::1]:5"));
        let change = difference(&told, &six);
        assert_eq!(change["jiriaf.tunnel/8080"], None);
        assert_eq!((change.len(), &change["jiriaf.tunnel/9090"]), (2, &far("[2001:db8::1]:5")));
        assert!(difference(&six, &six).is_empty());
    }
}
