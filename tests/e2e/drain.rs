//! The end of an allocation finds pods in any phase: none is left, none is run again, each says how it ended.

use std::time::Instant;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::harness::{Namespace, Options, Pilot, read, seconds, shared_directory, wait_until};

fn shell(name: &str, script: &str) -> Value {
    json!({"name": name, "image": "busybox:1", "command": ["bash", "-c", script]})
}

/// Pods that are initialized, in back-off, waiting for an image and for an object, and one with sidecars; then the pilot is
/// asked to end. What the sidecars' pod has noted, once the pilot is gone.
fn drained(label: &'static str, crash: bool) -> String {
    let namespace = Namespace::new(label);
    let site = shared_directory();
    let table = site.path().join("images.yaml");
    std::fs::write(&table, "images:\n- {name: busybox, run: host}\n").unwrap();
    let mut pilot = Pilot::local(Options::new(label).env("JIRIAF_IMAGES", table.to_str().unwrap()), 600);
    let notes = pilot.home.join("notes");
    let note = |what: &str| format!("echo {what} >>{}", notes.display());
    let until_term = |name: &str, first: &str| {
        format!("{first}; trap 'sleep 0.3; {}; exit 0' TERM; sleep 1000 & wait", note(name))
    };
    let mut side = shell("side", &until_term("side-ends", ":"));
    side["restartPolicy"] = json!("Always");
    let mut nosuch = shell("c1", "sleep 1000");
    nosuch["image"] = json!("nosuch:1");
    let mut missing = shell("c1", "sleep 1000");
    missing["volumeMounts"] = json!([{"name": "missing", "mountPath": "v"}]);
    let pods = [
        ("runs", vec![side], until_term("main-ends", &note("main"))),
        ("inits", vec![shell("init", "exec sleep 1000")], "exit 0".to_owned()),
        ("loops", vec![], "exit 3".to_owned()),
    ];
    for (name, init, script) in pods {
        let mut spec = json!({"automountServiceAccountToken": false, "containers": [shell("c1", &script)]});
        spec["initContainers"] = json!(init);
        namespace.pod_on(&pilot, name, spec);
    }
    for (name, container) in [("image", nosuch), ("object", missing)] {
        let volumes = json!([{"name": "missing", "configMap": {"name": "missing"}}]);
        let spec =
            json!({"automountServiceAccountToken": false, "containers": [container], "volumes": volumes});
        namespace.pod_on(&pilot, name, spec);
    }
    let first = |pod: &str, list: &str| namespace.pod(pod).map(|pod| pod["status"][list][0]["state"].clone());
    let waits = |pod: &str, reason: &str| {
        first(pod, "containerStatuses").is_some_and(|state| state["waiting"]["reason"] == reason)
    };
    namespace.wait_phase("runs", "Running", seconds(20));
    wait_until("all are where they are to be", seconds(20), || {
        waits("loops", "CrashLoopBackOff")
            && waits("image", "ErrImageNeverPull")
            && waits("object", "ContainerCreating")
            && first("inits", "initContainerStatuses").is_some_and(|state| state["running"].is_object())
    });

    let (stages, start) = (pilot.stages("pilot"), Instant::now());
    pilot.signal(Signal::SIGTERM);
    if crash {
        wait_until("it drains", seconds(10), || pilot.output().contains("draining"));
        // Those that have not begun have no record: a pilot that crashes before it has told their end refuses them instead.
        for name in ["image", "object"] {
            namespace.wait_phase(name, "Failed", seconds(5));
        }
        kill(Pid::from_raw(stages[0]), Signal::SIGKILL).unwrap();
    }
    assert_eq!(pilot.wait_exit(seconds(25)), Some(0), "{}", pilot.output());
    assert!(start.elapsed() < seconds(15), "{:?}", start.elapsed());
    assert_eq!(pilot.processes(), Vec::<(i32, String)>::new());
    // The exit code of the first container, where it has one.
    let ends = [
        ("runs", "containerStatuses", json!(0)),
        ("runs", "initContainerStatuses", json!(0)),
        ("inits", "initContainerStatuses", json!(143)),
        ("inits", "containerStatuses", Value::Null),
        ("loops", "containerStatuses", json!(3)),
        ("image", "containerStatuses", json!(137)),
        ("object", "containerStatuses", json!(137)),
    ];
    for (name, list, code) in ends {
        let pod = namespace.wait_phase(name, "Failed", seconds(5));
        assert_eq!(pod["status"]["reason"], "Terminated", "{name}: {:#}", pod["status"]);
        assert_eq!(
            pod["status"][list][0]["state"]["terminated"]["exitCode"], code,
            "{name}: {:#}",
            pod["status"]
        );
    }
    let loops = namespace.pod("loops").unwrap();
    assert_eq!(loops["status"]["containerStatuses"][0]["restartCount"], 1, "{:#}", loops["status"]);
    // The table says which container kept the pod from its work.
    assert!(pilot.output().contains("exit 143"), "{}", pilot.output());
    read(&notes)
}

#[test]
fn the_end_finds_pods_in_any_phase_and_leaves_none() {
    assert_eq!(drained("drain", false), "main\nmain-ends\nside-ends\n");
}

#[test]
fn a_crash_of_the_pilot_during_the_drain_runs_nothing_twice() {
    assert_eq!(drained("redrain", true), "main\nmain-ends\nside-ends\n");
}
