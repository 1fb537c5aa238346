//! Pods that come to a Node past the scheduler, and which it does not take.

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::harness::{
    Namespace, Options, Pilot, api, condition, container, job, pod_spec, seconds, wait_until,
};

/// Binds a pod of this spec to the pilot's Node as somebody who names the Node does, and waits until it is
/// refused.
fn refused(namespace: &Namespace, pilot: &Pilot, name: &str, change: Value) -> Value {
    let mut spec = pod_spec("Never", &[container("c1", "work")]);
    spec["nodeName"] = pilot.node.as_str().into();
    spec["tolerations"] = json!([{"operator": "Exists"}]);
    for (field, value) in change.as_object().unwrap() {
        spec[field] = value.clone();
    }
    namespace.of("pods").create(&json!({"metadata": {"name": name}, "spec": spec}));
    let pod = namespace.wait_phase(name, "Failed", seconds(30));
    assert!(
        pod["status"]["message"].as_str().unwrap_or_default().starts_with("Pod was rejected: "),
        "{:#}",
        pod["status"]
    );
    // Nothing ran, and Kubernetes' own conditions do not say otherwise.
    assert_ne!(condition(&pod, "Ready")["status"], "True", "{:#}", pod["status"]);
    assert!(!pilot.pod_directory(name).exists());
    pod
}

#[test]
fn pods_that_do_not_fit_the_node_fail_with_kubelets_reasons() {
    let namespace = Namespace::new("misfit");
    namespace.config_map("work", &[("run.sh", "exit 0\n")]);
    let pilot = Pilot::local(Options::new("misfit"), 600);
    let pod = refused(&namespace, &pilot, "elsewhere", json!({"nodeSelector": {"jiriaf.site": "elsewhere"}}));
    assert_eq!(pod["status"]["reason"], "NodeAffinity", "{:#}", pod["status"]);

    let mut large = container("c1", "work");
    large["resources"] = json!({"requests": {"cpu": "1000"}});
    let pod = refused(&namespace, &pilot, "large", json!({"containers": [large]}));
    assert_eq!(pod["status"]["reason"], "OutOfcpu", "{:#}", pod["status"]);
    assert!(pod["status"]["message"].as_str().unwrap().contains("requested: 1000000"), "{:#}", pod["status"]);

    // What it has no way to run it says by name.
    let mut raw = container("c1", "work");
    raw["volumeDevices"] = json!([{"name": "disk", "devicePath": "/dev/x"}]);
    let disk = json!([{"name": "work", "configMap": {"name": "work"}}, {"name": "disk", "persistentVolumeClaim": {"claimName": "none"}}]);
    let pod = refused(&namespace, &pilot, "raw", json!({"containers": [raw], "volumes": disk}));
    assert!(pod["status"]["message"].as_str().unwrap().contains("volumeDevices"), "{:#}", pod["status"]);
    // It takes what fits, as before.
    namespace.script_on(&pilot, "fits", "exit 0\n");
    namespace.wait_phase("fits", "Succeeded", seconds(30));
}

#[test]
fn a_pod_that_may_run_longer_than_the_pilot_lives_is_refused_and_its_job_does_not_spin() {
    let namespace = Namespace::new("walltime-out");
    namespace.config_map("work", &[("run.sh", "exit 0\n")]);
    let pilot = Pilot::local(Options::new("walltime-out"), 600);
    let pod = refused(&namespace, &pilot, "long", json!({"activeDeadlineSeconds": 10_000}));
    assert_eq!(pod["status"]["reason"], "OutOfWalltime", "{:#}", pod["status"]);
    let message = pod["status"]["message"].as_str().unwrap();
    assert!(message.contains("activeDeadlineSeconds: 10000,"), "{message}");
    // Until the drain, a minute before the end, and not what a label of some time ago says.
    let (_, rest) = message.split_once("pods are ended: ").unwrap();
    let left: u64 = rest.split_once(" s;").unwrap().0.parse().unwrap();
    assert!((450..=540).contains(&left), "{message}");

    let limited = |seconds: u64| {
        let mut spec = pod_spec("Never", &[container("c1", "work")]);
        spec["activeDeadlineSeconds"] = json!(seconds);
        spec
    };
    namespace.pod_on(&pilot, "fits", limited(left / 2));
    namespace.wait_phase("fits", "Succeeded", seconds(30));

    // It is no disruption, so it counts: whoever asks for too much is told so, and not tried for ever.
    let mut work = job(&pilot, "work", 1, limited(10_000));
    work["spec"]["podFailurePolicy"] =
        json!({"rules": [{"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget"}]}]});
    let jobs = api::grouped("batch/v1", &namespace.name, "jobs");
    jobs.create(&work);
    wait_until("the Job has given up", seconds(90), || {
        condition(&jobs.get("work").unwrap(), "Failed")["reason"] == "BackoffLimitExceeded"
    });
    let pods = namespace.of("pods").list("job-name=work");
    assert_eq!(pods.len(), 2, "{pods:#?}");
    assert!(pods.iter().all(|pod| pod["status"]["reason"] == "OutOfWalltime"), "{pods:#?}");
}

#[test]
fn a_pilot_of_some_namespaces_takes_no_pods_of_others() {
    let (own, other) = (Namespace::new("own-ns"), Namespace::new("other-ns"));
    let pilot = Pilot::local(Options::new("namespaces").env("JIRIAF_NAMESPACES", &own.name), 600);
    own.script_on(&pilot, "p", "exit 0\n");
    own.wait_phase("p", "Succeeded", seconds(30));
    other.script_on(&pilot, "q", "exit 0\n");
    let pod = other.wait_phase("q", "Failed", seconds(30));
    let message = pod["status"]["message"].as_str().unwrap_or_default();
    assert!(message.contains("--namespaces") && message.contains(&other.name), "{:#}", pod["status"]);
    assert!(!pilot.pod_directory("q").exists());
}

#[test]
fn pods_whose_refusal_is_held_back_are_told_of_it_before_the_pilots_end() {
    let namespace = Namespace::new("held-back");
    namespace.config_map("work", &[("run.sh", "exit 0\n")]);
    let mut pilot = Pilot::local(Options::new("held-back"), 600);
    let owner = namespace.of("configmaps").get("work").unwrap()["metadata"]["uid"].clone();
    let names: Vec<String> = (0..7).map(|number| format!("p{number}")).collect();
    // The more pods of one controller are refused the later each is told: the last one after 32 s.
    for name in &names {
        let mut spec = pod_spec("Never", &[container("c1", "work")]);
        spec["nodeName"] = pilot.node.as_str().into();
        spec["nodeSelector"] = json!({"jiriaf.site": "elsewhere"});
        spec["tolerations"] = json!([{"operator": "Exists"}]);
        let by = json!({"apiVersion": "v1", "kind": "ConfigMap", "name": "work", "uid": owner, "controller": true});
        namespace
            .of("pods")
            .create(&json!({"metadata": {"name": name, "ownerReferences": [by]}, "spec": spec}));
    }
    wait_until("the last one is refused", seconds(10), || {
        pilot.output().lines().any(|line| line.contains("pod refused") && line.contains("\"p6\""))
    });
    assert_eq!(namespace.pod("p6").unwrap()["status"]["phase"], "Pending");
    pilot.signal(Signal::SIGTERM);
    assert_eq!(pilot.wait_exit(seconds(20)), Some(0), "{}", pilot.output());
    for name in &names {
        let pod = namespace.pod(name).unwrap();
        assert_eq!(pod["status"]["reason"], "NodeAffinity", "{name}: {:#}", pod["status"]);
    }
}
