//! The Node as an object that somebody else may touch.

use nix::sys::signal::Signal;
use serde_json::Value;

use crate::harness::{Namespace, Options, Pilot, api, seconds, wait_for, wait_until};

#[test]
fn a_node_that_somebody_deletes_is_registered_anew_with_its_lease() {
    let mut pilot = Pilot::local(Options::new("anew"), 600);
    let nodes = api::cluster("nodes");
    let first = nodes.get(&pilot.node).unwrap()["metadata"]["uid"].clone();
    nodes.delete(&pilot.node, None);
    let second = wait_for("another Node", seconds(20), || {
        let node = nodes.get(&pilot.node)?;
        (node["metadata"]["uid"] != first).then_some(node)
    });
    let uid = second["metadata"]["uid"].clone();
    // An owner reference to the old uid would let the garbage collector take the Lease away.
    wait_until("a Lease that belongs to it", seconds(20), || {
        pilot.lease().is_some_and(|lease| lease["metadata"]["ownerReferences"][0]["uid"] == uid)
    });
    pilot.wait_ready(1);
    let node = nodes.get(&pilot.node).unwrap();
    assert!(node["metadata"]["labels"]["jiriaf.alivetime"].is_string(), "{node:#}");

    let namespace = Namespace::new("anew");
    namespace.script_on(&pilot, "p", "exit 0\n");
    namespace.wait_phase("p", "Succeeded", seconds(30));
    pilot.signal(Signal::SIGTERM);
    assert_eq!(pilot.wait_exit(seconds(30)), Some(0), "{}", pilot.output());
    assert_eq!(pilot.nodes(), Vec::<Value>::new());
}

#[test]
fn a_pod_goes_on_while_its_node_is_registered_anew() {
    let namespace = Namespace::new("goes-on");
    let pilot = Pilot::local(Options::new("goes-on"), 600);
    let go = pilot.home.join("go");
    namespace.script_on(&pilot, "p", &format!("until [ -e {} ]; do sleep 0.1; done\nexit 5\n", go.display()));
    namespace.wait_phase("p", "Running", seconds(30));
    let nodes = api::cluster("nodes");
    let first = nodes.get(&pilot.node).unwrap()["metadata"]["uid"].clone();
    nodes.delete(&pilot.node, None);
    wait_until("another Node", seconds(20), || {
        nodes.get(&pilot.node).is_some_and(|node| node["metadata"]["uid"] != first)
    });
    // Kubernetes deletes the pods of a Node that is gone for 40 s; this one was back before.
    std::fs::write(&go, "").unwrap();
    let pod = namespace.wait_phase("p", "Failed", seconds(20));
    let ended = &pod["status"]["containerStatuses"][0]["state"]["terminated"];
    assert_eq!(ended["exitCode"], 5, "{:#}", pod["status"]);
}
