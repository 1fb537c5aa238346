//! The cordon: pods that come after it, pods that come while it is not acknowledged, and a deadline that moves away.
//!
//! The pilots are those of PBS jobs whose walltime the test moves: no test waits for a time to pass.

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::harness::{
    Namespace, Options, PbsJob, Pilot, api, bed, condition, container, pod_spec, seconds, unique, wait_until,
};

/// A pilot of a one-hour job that takes no more pods in its last half hour, and ends them in its last ten seconds.
fn of_an_hour(label: &'static str) -> (PbsJob, Pilot) {
    let job = PbsJob::new(1, "01:00:00");
    let options = Options::new(label).env("JIRIAF_CORDON_BEFORE", "30m").env("JIRIAF_DRAIN_BEFORE", "10s");
    let pilot = Pilot::pbs(options, &job);
    (job, pilot)
}

/// Moves the job's end, as qalter does, and has the pilot ask for it.
fn move_end(job: &PbsJob, pilot: &Pilot, walltime: &str) {
    job.walltime(walltime);
    pilot.signal(Signal::SIGUSR1);
}

fn is_cordoned(pilot: &Pilot) -> bool {
    pilot.nodes()[0]["spec"]["unschedulable"] == true
}

/// A pod that is bound already, as one that was on its way when the cordon came.
fn bound(namespace: &Namespace, pilot: &Pilot, name: &str) {
    namespace.config_map(name, &[("run.sh", "exit 0\n")]);
    let mut spec = pod_spec("Never", &[container("c1", name)]);
    spec["nodeName"] = pilot.node.as_str().into();
    namespace.pod_on(pilot, name, spec);
}

/// What a pod says that the pilot did not take because its end is near.
fn assert_rejected(pilot: &Pilot, name: &str, pod: &Value) {
    assert_eq!(pod["status"]["reason"], "NodeShutdown", "{pod:#}");
    assert_eq!(
        pod["status"]["message"], "Pod was rejected: Pod was rejected as the node is shutting down.",
        "{pod:#}"
    );
    assert_eq!(condition(pod, "DisruptionTarget")["status"], "True", "{pod:#}");
    assert!(!pilot.pod_directory(name).exists(), "nothing of it was started");
}

#[test]
fn after_the_cordon_pods_are_rejected_while_those_that_run_go_on_and_taken_again_when_the_end_moves_away() {
    let namespace = Namespace::new("cordon");
    let (job, pilot) = of_an_hour("cordon");
    let script = "until [ -e ../../../end ]; do sleep 0.1; done\n";
    namespace.script_on(&pilot, "early", script);
    namespace.wait_phase("early", "Running", seconds(30));

    move_end(&job, &pilot, "00:20:00");
    wait_until("the node is cordoned", seconds(30), || is_cordoned(&pilot));
    bound(&namespace, &pilot, "late");
    assert_rejected(&pilot, "late", &namespace.wait_phase("late", "Failed", seconds(30)));
    // What the scheduler has to place finds no node meanwhile.
    namespace.script_on(&pilot, "waits", "exit 0\n");
    wait_until("no node fits", seconds(30), || {
        let pod = namespace.pod("waits").unwrap_or_default();
        condition(&pod, "PodScheduled")["reason"] == "Unschedulable"
    });
    assert_eq!(namespace.pod("early").unwrap()["status"]["phase"], "Running");
    assert!(is_cordoned(&pilot), "the drain has not come: this pilot lives");

    move_end(&job, &pilot, "01:00:00");
    wait_until("the node is open again", seconds(30), || !is_cordoned(&pilot));
    namespace.wait_phase("waits", "Succeeded", seconds(60));
    bound(&namespace, &pilot, "again");
    namespace.wait_phase("again", "Succeeded", seconds(30));
    std::fs::write(pilot.home.join("end"), "").unwrap();
    namespace.wait_phase("early", "Succeeded", seconds(30));
}

/// A policy by which nobody can cordon one Node. Gone at drop.
pub struct NoCordon(String);

const ADMISSION: &str = "admissionregistration.k8s.io/v1";

impl NoCordon {
    /// Makes it, and waits until it holds.
    pub fn of(node: &str) -> Self {
        let policy = Self(unique("no-cordon"));
        let name = &policy.0;
        api::cluster_grouped(ADMISSION, "validatingadmissionpolicies").create(&json!({
            "metadata": {"name": name},
            "spec": {
                "matchConstraints": {"resourceRules": [{"apiGroups": [""], "apiVersions": ["v1"],
                    "operations": ["UPDATE"], "resources": ["nodes"], "resourceNames": [node]}]},
                "validations": [{"expression": "!object.spec.?unschedulable.orValue(false)",
                    "message": "no cordon in this test"}]},
        }));
        api::cluster_grouped(ADMISSION, "validatingadmissionpolicybindings").create(&json!({
            "metadata": {"name": name},
            "spec": {"policyName": name, "validationActions": ["Deny"]},
        }));
        // kubectl's own cordon exits 0 when it is refused.
        let cordon = ["patch", "node", node, "--dry-run=server", "-p", "{\"spec\":{\"unschedulable\":true}}"];
        wait_until("the policy holds", seconds(30), || !bed().kubectl(&cordon).success);
        policy
    }
}

impl Drop for NoCordon {
    fn drop(&mut self) {
        for kind in ["validatingadmissionpolicybindings", "validatingadmissionpolicies"] {
            api::cluster_grouped(ADMISSION, kind).delete(&self.0, None);
        }
    }
}

#[test]
fn until_the_cordon_is_acknowledged_pods_that_arrive_wait() {
    let namespace = Namespace::new("held");
    let (job, pilot) = of_an_hour("held");
    let policy = NoCordon::of(&pilot.node);
    let refusals = || pilot.output().matches("the Node's cordon could not be changed").count();
    move_end(&job, &pilot, "00:20:00");
    wait_until("the cordon is refused", seconds(30), || refusals() > 0);

    for name in ["deleted", "held"] {
        bound(&namespace, &pilot, name);
    }
    // Two more tries: a pod that were rejected or started would be so by now.
    let before = refusals();
    wait_until("the cordon is tried again and again", seconds(30), || refusals() > before + 1);
    assert!(!is_cordoned(&pilot));
    for name in ["deleted", "held"] {
        let pod = namespace.pod(name).unwrap();
        assert_eq!(pod["status"]["phase"], "Pending", "{pod:#}");
        assert_eq!(pod["status"]["containerStatuses"], Value::Null, "{pod:#}");
    }
    // One that is gone meanwhile is forgotten.
    namespace.of("pods").delete("deleted", Some(0));
    namespace.wait_gone("deleted", seconds(30));

    drop(policy);
    assert_rejected(&pilot, "held", &namespace.wait_phase("held", "Failed", seconds(60)));
    assert!(is_cordoned(&pilot), "rejected before the scheduler knew");
    let rejected = |name| namespace.events(name).iter().any(|(reason, _)| reason == "NodeShutdown");
    wait_until("an event says so", seconds(10), || rejected("held"));
    assert!(!rejected("deleted"));
}
