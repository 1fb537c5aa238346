//! Pilots that nobody uses: they give their allocation back, and never while a pod is there.

use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::cordon::NoCordon;
use crate::harness::{
    Namespace, Options, Pilot, api, bed, container, pod_spec, read, seconds, shared_directory, wait_for,
    wait_until,
};

/// Waits until the pilot has left by itself: exit code 0, and nothing of it in the cluster.
fn left(pilot: &mut Pilot, words: &str) {
    assert_eq!(pilot.wait_exit(seconds(60)), Some(0), "{}", pilot.output());
    let output = pilot.output();
    let mut lines = output.lines().filter(|line| line.starts_with("Ended early: "));
    let line = lines.next().unwrap_or_else(|| panic!("it does not say why it ended:\n{output}"));
    assert!(line.contains(words), "{line}");
    assert_eq!(pilot.nodes(), Vec::<Value>::new());
    assert!(pilot.lease().is_none());
    assert_eq!(pilot.processes(), Vec::<(i32, String)>::new());
}

#[test]
fn a_pilot_leaves_when_no_pod_has_run_for_a_while_and_not_while_one_runs_or_waits() {
    let namespace = Namespace::new("idle");
    // Isolated tests of this machine may take seconds from one pod to the next, but not eight.
    let mut pilot = Pilot::local(Options::new("idle").arg("--idle-timeout=8s"), 600);
    // No pod has come for longer than that: this limit is another one's.
    let start = SystemTime::now();
    wait_until("more than the limit is over", seconds(30), || start.elapsed().unwrap() > seconds(10));
    // It runs for longer than that, and so would it have been waiting.
    namespace.script_on(&pilot, "long", "sleep 10\n");
    namespace.wait_phase("long", "Succeeded", seconds(60));
    let mut spec = pod_spec("Never", &[container("c1", "missing")]);
    spec["automountServiceAccountToken"] = json!(false);
    namespace.pod_on(&pilot, "waits", spec);
    let waited = wait_for("it waits for its ConfigMap", seconds(30), || {
        let pod = namespace.pod("waits")?;
        (pod["status"]["containerStatuses"][0]["state"]["waiting"]["reason"] == "ContainerCreating")
            .then(SystemTime::now)
    });
    wait_until("it has waited", seconds(30), || waited.elapsed().unwrap() > seconds(10));
    assert!(!pilot.ended(), "{}", pilot.output());
    namespace.config_map("missing", &[("run.sh", "exit 0\n")]);
    namespace.wait_phase("waits", "Succeeded", seconds(30));

    left(&mut pilot, "no pod ran for");
    assert!(pilot.row("long").contains("  Succeeded  "), "{}", pilot.output());
}

#[test]
fn a_pilot_to_which_none_ever_comes_leaves_and_pods_that_are_no_work_do_not_hold_it() {
    let namespace = Namespace::new("idle-first");
    let options = Options::new("idle-first").arg("--idle-timeout-first=15s").arg("--idle-timeout=1h");
    let mut pilot = Pilot::local(options, 600);
    // Everywhere and for ever, by its nature.
    namespace.config_map("daemon", &[("run.sh", "trap 'exit 0' TERM\nsleep 1000 & wait\n")]);
    let mut spec = pod_spec("Always", &[container("c1", "daemon")]);
    pilot.place(&mut spec);
    api::grouped("apps/v1", &namespace.name, "daemonsets").create(&json!({
        "metadata": {"name": "daemon"},
        "spec": {"selector": {"matchLabels": {"app": "daemon"}},
            "template": {"metadata": {"labels": {"app": "daemon"}}, "spec": spec}},
    }));
    // And one that is not taken.
    let mut elsewhere = pod_spec("Never", &[container("c1", "daemon")]);
    elsewhere["nodeName"] = pilot.node.as_str().into();
    elsewhere["nodeSelector"] = json!({"jiriaf.site": "elsewhere"});
    elsewhere["tolerations"] = json!([{"operator": "Exists"}]);
    namespace.of("pods").create(&json!({"metadata": {"name": "refused"}, "spec": elsewhere}));
    namespace.wait_phase("refused", "Failed", seconds(30));
    wait_until("the daemon runs", seconds(30), || {
        namespace.of("pods").list("app=daemon").iter().any(|pod| pod["status"]["phase"] == "Running")
    });
    left(&mut pilot, "no pod came for");
}

#[test]
fn a_pod_that_comes_in_the_last_moment_runs() {
    let namespace = Namespace::new("idle-late");
    let mut pilot = Pilot::local(Options::new("idle-late").arg("--idle-timeout=2s"), 600);
    namespace.script_on(&pilot, "early", "until [ -e ../../../end ]; do sleep 0.1; done\n");
    namespace.wait_phase("early", "Running", seconds(30));
    let policy = NoCordon::of(&pilot.node);
    std::fs::write(pilot.home.join("end"), "").unwrap();
    let refused = || pilot.output().contains("the Node's cordon could not be changed");
    wait_until("it is idle, and its cordon is refused", seconds(30), refused);

    namespace.config_map("late", &[("run.sh", "exit 0\n")]);
    let mut spec = pod_spec("Never", &[container("c1", "late")]);
    spec["nodeName"] = pilot.node.as_str().into();
    namespace.pod_on(&pilot, "late", spec.clone());
    namespace.wait_phase("late", "Succeeded", seconds(30));
    assert!(pilot.output().contains("a pod came in the last moment"), "{}", pilot.output());
    // Another one by way of the scheduler: the Node is open.
    namespace.script_on(&pilot, "later", "exit 0\n");
    namespace.wait_phase("later", "Succeeded", seconds(30));
    drop(policy);

    // Once more, when the cordon is acknowledged: as one that the scheduler bound by what it knew before.
    wait_until("it is idle, and its Node cordoned", seconds(30), || {
        pilot.nodes()[0]["spec"]["unschedulable"] == true
    });
    namespace.pod_on(&pilot, "last", spec);
    namespace.wait_phase("last", "Succeeded", seconds(30));
    left(&mut pilot, "no pod ran for");
}

#[test]
fn the_clock_goes_on_after_a_crash_of_the_pilot() {
    let directory = shared_directory();
    std::fs::set_permissions(directory.path(), std::os::unix::fs::PermissionsExt::from_mode(0o1777)).unwrap();
    let state = directory.path().join("state");
    let options = Options::new("idle-crash").arg("--idle-timeout-first=30s");
    let mut pilot = Pilot::local(options.env("JIRIAF_STATE_DIR", state.to_str().unwrap()), 600);
    let file: PathBuf = state.join(&pilot.node).join("pilot.json");
    let since = wait_for("the idle time is written", seconds(30), || {
        let state: Value = serde_json::from_str(&read(&file)).ok()?;
        let seconds = state["idle"]["since"]["secs_since_epoch"].as_u64()?;
        Some(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds))
    });
    wait_until("two thirds of it are over", seconds(30), || since.elapsed().unwrap() > seconds(20));
    kill(Pid::from_raw(pilot.stages("pilot")[0]), Signal::SIGKILL).unwrap();
    left(&mut pilot, "no pod came for");
    // Begun anew, it would have been 50 s and the last wait for pods.
    assert!(since.elapsed().unwrap() < seconds(50), "{:?}\n{}", since.elapsed(), pilot.output());
}

#[test]
fn a_slurm_job_whose_pilot_is_idle_is_completed_long_before_its_limit() {
    let namespace = Namespace::new("idle-slurm");
    let mut pilot = Pilot::sbatch(Options::new("idle-slurm").env("JIRIAF_IDLE_TIMEOUT", "10s"));
    namespace.script_on(&pilot, "p", "exit 0\n");
    namespace.wait_phase("p", "Succeeded", seconds(30));
    let state = pilot.wait_job_over(seconds(60));
    assert_eq!((state.state(), state.field("ExitCode")), ("COMPLETED", "0:0"), "{}", pilot.output());
    assert!(pilot.output().contains("Ended early: no pod ran for"), "{}", pilot.output());
    assert_eq!(pilot.nodes(), Vec::<Value>::new());
    assert!(bed().kubectl(&["get", "node", &pilot.node]).text.contains("NotFound"));
}
