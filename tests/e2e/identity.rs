//! The Node as an object that somebody else may touch.

use std::os::unix::fs::PermissionsExt;

use jiff::Timestamp;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::harness::{
    ApiProxy, Namespace, Options, Pilot, api, bed, seconds, shared_directory, unique, wait_for, wait_until,
};

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

#[test]
fn what_happens_while_the_api_server_is_away_is_made_good_when_it_is_back() {
    let namespace = Namespace::new("away");
    let proxy = ApiProxy::start();
    let options = Options { server: Some(proxy.url()), ..Options::new("away") };
    let pilot = Pilot::local(options, 600);
    let go = pilot.home.join("go");
    for pod in ["ends", "deleted"] {
        let script = format!("until [ -e {}.{pod} ]; do sleep 0.1; done\nexit 4\n", go.display());
        namespace.script_on(&pilot, pod, &script);
        namespace.wait_phase(pod, "Running", seconds(30));
    }
    proxy.cut();
    std::fs::write(pilot.home.join("go.ends"), "").unwrap();
    namespace.of("pods").delete("deleted", Some(0));
    namespace.script_on(&pilot, "comes", "exit 0\n");
    std::thread::sleep(seconds(3)); // nothing can show that the pilot sees nothing
    assert_eq!(namespace.pod("ends").unwrap()["status"]["phase"], "Running");
    proxy.restore();
    namespace.wait_phase("comes", "Succeeded", seconds(60));
    let pod = namespace.wait_phase("ends", "Failed", seconds(60));
    let ended = &pod["status"]["containerStatuses"][0]["state"]["terminated"];
    assert_eq!(ended["exitCode"], 4, "{:#}", pod["status"]);
    wait_until("nothing is left of the deleted pod", seconds(30), || pilot.stages("supervise").is_empty());
}

#[test]
fn a_credential_that_ends_before_the_walltime_is_the_deadline() {
    let request = json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest",
        "spec": {"expirationSeconds": 600}});
    let answer = api::namespaced("jiriaf", "serviceaccounts/jiriaf-pilot/token").create(&request);
    let mut config: Value = serde_json::from_str(&bed().pilot_kubeconfig(None)).unwrap();
    config["users"][0]["user"] = json!({"token": answer["status"]["token"]});
    let directory = shared_directory();
    let file = directory.path().join("kubeconfig");
    std::fs::write(&file, config.to_string()).unwrap();
    let pilot = Pilot::local(Options::new("token-end").env("KUBECONFIG", file.to_str().unwrap()), 3600);
    let node = &pilot.nodes()[0];
    let deadline = node["metadata"]["annotations"]["jiriaf.deadline"].as_str().unwrap();
    let wanted: Timestamp = answer["status"]["expirationTimestamp"].as_str().unwrap().parse().unwrap();
    let got: Timestamp = deadline.parse().unwrap();
    assert!((got.as_second() - wanted.as_second()).abs() <= 2, "{deadline} is not {wanted}");
    assert!(pilot.alivetime().unwrap() < 600);
}

#[test]
fn a_pilot_that_was_frozen_while_another_took_its_node_over_ends_and_leaves_the_node_alone() {
    let name = unique("frozen");
    let nodes = api::cluster("nodes");
    let mut first = Pilot::local(Options::new("frozen").env("NODENAME", &name), 600);
    let [frozen] = first.stages("pilot")[..] else { panic!("one pilot was expected") };
    kill(Pid::from_raw(frozen), Signal::SIGSTOP).unwrap();

    // As if on another host, which shares no state.
    let elsewhere = shared_directory();
    std::fs::set_permissions(elsewhere.path(), std::fs::Permissions::from_mode(0o777)).unwrap();
    let state = elsewhere.path().join("state");
    let options = Options::new("frozen").env("NODENAME", &name);
    let mut second = Pilot::start_local(&options.env("JIRIAF_STATE_DIR", state.to_str().unwrap()), 600);
    let instance = |node: &Value| node["metadata"]["annotations"]["jiriaf.instance"].clone();
    let before = instance(&nodes.get(&name).unwrap());
    // A Lease holds for 40 s, and 12 s more tell a dead pilot from one whose clock is wrong.
    wait_until("the second pilot has the Node", seconds(80), || !second.nodes().is_empty());
    second.wait_ready(1);
    let taken = instance(&nodes.get(&name).unwrap());
    assert_ne!(taken, before);

    kill(Pid::from_raw(frozen), Signal::SIGCONT).unwrap();
    assert_eq!(first.wait_exit(seconds(40)), Some(1), "{}", first.output());
    assert!(first.output().contains("another pilot has taken the Node over"), "{}", first.output());
    let node = nodes.get(&name).unwrap();
    assert_eq!(instance(&node), taken);
    assert_eq!(node["metadata"]["labels"]["jiriaf.site"], second.site.as_str());
    assert!(node["spec"]["unschedulable"].is_null(), "{:#}", node["spec"]);
    let namespace = Namespace::new("frozen");
    namespace.script_on(&second, "p", "exit 0\n");
    namespace.wait_phase("p", "Succeeded", seconds(30));
    second.signal(Signal::SIGTERM);
    assert_eq!(second.wait_exit(seconds(30)), Some(0), "{}", second.output());
    assert_eq!(nodes.get(&name), None);
}
