//! Probes: when a container counts as started and ready, and when it is ended for its health. The probes themselves are
//! tested in src/pod/probe.

use serde_json::{Value, json};

use crate::harness::{
    Namespace, Options, Pilot, api, bed, condition, container, pod_spec, seconds, wait_for, wait_until,
};

fn pilot(label: &'static str) -> Pilot {
    let mut options = Options::new(label);
    options.arguments.push("--crash-loop-back-off-max=1s".to_owned());
    Pilot::local(options, 600)
}

/// A probe by a shell command, once a second.
fn shell(command: &str) -> Value {
    json!({"exec": {"command": ["sh", "-c", command]}, "periodSeconds": 1, "failureThreshold": 1})
}

/// A container that sleeps, with these probes, in a pod of this restart policy.
fn probed(namespace: &Namespace, pilot: &Pilot, name: &str, policy: &str, probes: &[(&str, Value)]) {
    namespace.config_map(name, &[("run.sh", "sleep 1000\n")]);
    let mut container = container("c1", name);
    for (kind, probe) in probes {
        container[*kind] = probe.clone();
    }
    let mut spec = pod_spec(policy, &[container]);
    spec["terminationGracePeriodSeconds"] = json!(1);
    namespace.pod_on(pilot, name, spec);
}

fn first(pod: &Value) -> &Value {
    &pod["status"]["containerStatuses"][0]
}

fn wait_first(namespace: &Namespace, name: &str, what: &str, holds: impl Fn(&Value) -> bool) -> Value {
    wait_for(what, seconds(30), || namespace.pod(name).filter(|pod| holds(first(pod))))
}

#[test]
fn endpoints_follow_the_readiness_probe() {
    let namespace = Namespace::new("ready");
    let pilot = pilot("ready");
    let gate = pilot.home.join("gate");
    let test = format!("test -e {}", gate.display());
    namespace.config_map("p", &[("run.sh", "sleep 1000\n")]);
    let mut container = container("c1", "p");
    container["readinessProbe"] = shell(&test);
    let mut spec = pod_spec("Always", &[container]);
    pilot.place(&mut spec);
    let labelled = json!({"metadata": {"name": "p", "labels": {"app": "ready"}}, "spec": spec});
    namespace.of("pods").create(&labelled);
    let port = json!([{"port": 80, "targetPort": 8080}]);
    let service = json!({"metadata": {"name": "s"}, "spec": {"selector": {"app": "ready"}, "ports": port}});
    namespace.of("services").create(&service);
    // Whether the Service's endpoints name the pod as ready.
    let listed = || {
        let slices = api::grouped("discovery.k8s.io/v1", &namespace.name, "endpointslices");
        let found = slices.list("kubernetes.io/service-name=s");
        let endpoint = found.first()?["endpoints"].get(0)?.clone();
        endpoint["conditions"]["ready"].as_bool()
    };
    let pod = wait_first(&namespace, "p", "a start without readiness", |one| one["started"] == true);
    assert_eq!(first(&pod)["ready"], false, "{:#}", pod["status"]);
    assert_eq!(condition(&pod, "Ready")["reason"], "ContainersNotReady", "{:#}", pod["status"]);
    wait_until("an endpoint that is not ready", seconds(20), || listed() == Some(false));
    std::fs::write(&gate, "").unwrap();
    let pod = wait_first(&namespace, "p", "readiness", |one| one["ready"] == true);
    assert_eq!(condition(&pod, "Ready")["status"], "True", "{:#}", pod["status"]);
    wait_until("an endpoint that is ready", seconds(20), || listed() == Some(true));
    std::fs::remove_file(&gate).unwrap();
    wait_first(&namespace, "p", "the end of readiness", |one| one["ready"] == false);
    wait_until("an endpoint that is not ready", seconds(20), || listed() == Some(false));
    let told = |(reason, text): &(String, String)| {
        reason == "Unhealthy" && text.starts_with("Readiness probe failed")
    };
    wait_until("the event", seconds(10), || namespace.events("p").iter().any(told));
}

#[test]
fn a_readiness_gate_waits_for_whoever_sets_its_condition() {
    let namespace = Namespace::new("gate");
    let pilot = pilot("gate");
    namespace.config_map("p", &[("run.sh", "sleep 1000\n")]);
    let mut spec = pod_spec("Always", &[container("c1", "p")]);
    spec["readinessGates"] = json!([{"conditionType": "example.org/fed"}]);
    namespace.pod_on(&pilot, "p", spec);
    let pod = namespace.wait_phase("p", "Running", seconds(30));
    assert_eq!(condition(&pod, "ContainersReady")["status"], "True");
    assert_eq!(condition(&pod, "Ready")["reason"], "ReadinessGatesNotReady", "{:#}", pod["status"]);
    let set = json!({"status": {"conditions": [{"type": "example.org/fed", "status": "True"}]}});
    let patched = bed().kubectl(&[
        "-n",
        &namespace.name,
        "patch",
        "pod",
        "p",
        "--subresource=status",
        "-p",
        &set.to_string(),
    ]);
    assert!(patched.success, "{}", patched.text);
    wait_until("the pod is ready", seconds(20), || {
        namespace.pod("p").is_some_and(|pod| condition(&pod, "Ready")["status"] == "True")
    });
}

#[test]
fn a_liveness_probe_that_fails_starts_the_container_again() {
    let namespace = Namespace::new("live");
    let pilot = pilot("live");
    // Well until somebody takes the file away; each run makes it anew.
    namespace.config_map("p", &[("run.sh", "touch alive; trap 'exit 0' TERM; sleep 1000 & wait\n")]);
    let mut container = container("c1", "p");
    container["livenessProbe"] = shell("test -e alive");
    let alive = |pilot: &Pilot| pilot.pod_directory("p").join("containers/c1/alive");
    // Exit code 0 at its end is no reason to leave it so.
    namespace.pod_on(&pilot, "p", pod_spec("OnFailure", &[container]));
    namespace.wait_phase("p", "Running", seconds(30));
    wait_until("it lives", seconds(20), || alive(&pilot).exists());
    std::fs::remove_file(alive(&pilot)).unwrap();
    let pod = wait_first(&namespace, "p", "a second run", |one| {
        one["restartCount"] == 1 && one["state"]["running"].is_object()
    });
    assert_eq!(first(&pod)["lastState"]["terminated"]["exitCode"], 0, "{:#}", pod["status"]);
    let text = "Container c1 failed liveness probe, will be restarted";
    wait_until("the event", seconds(10), || namespace.events("p").iter().any(|(_, said)| said == text));
    // The count goes on over the runs.
    let path = format!("/api/v1/nodes/{}/proxy/metrics/probes", pilot.node);
    wait_until("both results are counted", seconds(20), || {
        let metrics = bed().kubectl(&["get", "--raw", &path]).stdout;
        let labels = |result| format!(r#"probe_type="Liveness",result="{result}"}} "#);
        ["failed", "successful"].iter().all(|result| metrics.contains(&labels(result)))
    });
    // Under Never it is the end.
    probed(&namespace, &pilot, "q", "Never", &[("livenessProbe", shell("exit 1"))]);
    let pod = namespace.wait_phase("q", "Failed", seconds(30));
    assert_eq!(first(&pod)["restartCount"], 0, "{:#}", pod["status"]);
}

#[test]
fn a_startup_probe_holds_the_others_back_and_its_own_grace_counts() {
    let namespace = Namespace::new("startup");
    let pilot = pilot("startup");
    let gate = pilot.home.join("gate");
    let patient = |command: String| {
        let mut probe = shell(&command);
        probe["failureThreshold"] = json!(100);
        probe
    };
    let startup = patient(format!("test -e {}", gate.display()));
    // A liveness probe that would end it at once.
    let liveness = shell(&format!("test -e {}", gate.display()));
    probed(&namespace, &pilot, "p", "Never", &[("startupProbe", startup), ("livenessProbe", liveness)]);
    let told =
        |(reason, text): &(String, String)| reason == "Unhealthy" && text.starts_with("Startup probe failed");
    wait_until("the startup probe has failed", seconds(20), || namespace.events("p").iter().any(told));
    let pod = namespace.pod("p").unwrap();
    assert_eq!((&first(&pod)["started"], &first(&pod)["ready"]), (&json!(false), &json!(false)));
    assert!(first(&pod)["state"]["running"].is_object(), "{:#}", pod["status"]);
    std::fs::write(&gate, "").unwrap();
    wait_first(&namespace, "p", "the start", |one| one["started"] == true && one["ready"] == true);

    // It ignores SIGTERM; the pod's own grace is longer than the test waits.
    namespace.config_map("q", &[("run.sh", "trap '' TERM; while :; do sleep 1; done\n")]);
    let mut container = container("c1", "q");
    container["startupProbe"] = shell("exit 1");
    container["startupProbe"]["terminationGracePeriodSeconds"] = json!(1);
    let mut spec = pod_spec("Never", &[container]);
    spec["terminationGracePeriodSeconds"] = json!(500);
    namespace.pod_on(&pilot, "q", spec);
    let pod = namespace.wait_phase("q", "Failed", seconds(30));
    assert_eq!(first(&pod)["state"]["terminated"]["exitCode"], 137, "{:#}", pod["status"]);
}

#[test]
fn a_sidecar_gates_by_its_startup_probe() {
    let namespace = Namespace::new("sidegate");
    let pilot = pilot("sidegate");
    let gate = pilot.home.join("gate");
    namespace.config_map("work", &[("side", "sleep 1000\n"), ("main", "exit 0\n")]);
    let part = |name: &str| {
        let mut container = container(name, "work");
        container["image"] = json!(format!("work/{name}"));
        container
    };
    let mut side = part("side");
    side["restartPolicy"] = json!("Always");
    side["startupProbe"] = shell(&format!("test -e {}", gate.display()));
    side["startupProbe"]["failureThreshold"] = json!(100);
    let mut spec = pod_spec("Never", &[part("main")]);
    spec["initContainers"] = json!([side]);
    spec["terminationGracePeriodSeconds"] = json!(1);
    namespace.pod_on(&pilot, "p", spec);
    let pod = wait_for("the sidecar runs", seconds(30), || {
        let pod = namespace.pod("p")?;
        pod["status"]["initContainerStatuses"][0]["state"]["running"].is_object().then_some(pod)
    });
    assert_eq!(pod["status"]["phase"], "Pending", "{:#}", pod["status"]);
    assert_eq!(first(&pod)["state"]["waiting"]["reason"], "PodInitializing", "{:#}", pod["status"]);
    std::fs::write(&gate, "").unwrap();
    namespace.wait_phase("p", "Succeeded", seconds(30));
}
