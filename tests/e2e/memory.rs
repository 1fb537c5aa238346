//! Memory: limits of containers, and what happens when the job's own runs short.

use serde_json::{Value, json};

use crate::harness::{
    ALICE, Namespace, Options, Pilot, as_user, condition, container, pod_spec, run as host_run, seconds,
    wait_until,
};

/// Takes so many million bytes, notes that in `full`, and sleeps.
fn takes(million: u32) -> String {
    format!("x=$(head -c {million}000000 /dev/zero | tr '\\0' a)\necho full >full\nsleep 600\n")
}

fn run(namespace: &Namespace, pilot: &Pilot, name: &str, script: &str, resources: &Value) {
    namespace.config_map(name, &[("run.sh", script)]);
    let mut one = container("c1", name);
    one["resources"] = resources.clone();
    namespace.pod_on(pilot, name, pod_spec("Never", &[one]));
}

fn is_full(pilot: &Pilot, name: &str) -> bool {
    pilot.pod_directory(name).join("containers/c1/full").exists()
}

#[test]
fn a_container_over_its_memory_limit_is_ended_as_oom_killed_and_what_is_shared_counts_once() {
    let namespace = Namespace::new("oom");
    let pilot = Pilot::local(Options::new("oom"), 600);
    // Four processes that share 60 MB: 240 MB by each one's own figure.
    let forks = "x=$(head -c 60000000 /dev/zero | tr '\\0' a)\nfor i in 1 2 3; do (sleep 600; :) & done\necho full >full\nwait\n";
    run(&namespace, &pilot, "forks", forks, &json!({"limits": {"memory": "150Mi"}}));
    wait_until("it has forked", seconds(30), || is_full(&pilot, "forks"));
    run(&namespace, &pilot, "hog", &takes(200), &json!({"limits": {"memory": "100Mi"}}));
    let pod = namespace.wait_phase("hog", "Failed", seconds(30));
    let status = &pod["status"]["containerStatuses"][0]["state"]["terminated"];
    assert_eq!((&status["reason"], &status["exitCode"]), (&json!("OOMKilled"), &json!(137)), "{status:#}");
    assert!(status["message"].as_str().unwrap().contains("its limit is 102400 KiB"), "{status:#}");
    wait_until("an event says so too", seconds(10), || {
        namespace.events("hog").iter().any(|(reason, _)| reason == "OOMKilled")
    });
    assert_eq!(namespace.pod("forks").unwrap()["status"]["phase"], "Running");
}

#[test]
fn a_container_that_is_ended_for_its_memory_starts_again_by_its_policy() {
    let namespace = Namespace::new("oomagain");
    let pilot = Pilot::local(Options::new("oomagain").arg("--crash-loop-back-off-max=1s"), 600);
    namespace.config_map("hog", &[("run.sh", &takes(200))]);
    let mut one = container("c1", "hog");
    one["resources"] = json!({"limits": {"memory": "100Mi"}});
    namespace.pod_on(&pilot, "p", pod_spec("OnFailure", &[one]));
    wait_until("it was started again", seconds(40), || {
        let status = namespace.pod("p").unwrap()["status"]["containerStatuses"][0].clone();
        status["restartCount"].as_i64() >= Some(1)
            && status["lastState"]["terminated"]["reason"] == "OOMKilled"
    });
}

#[test]
fn a_pod_that_eats_all_of_a_jobs_memory_is_evicted_before_the_kernel_kills_anything() {
    let namespace = Namespace::new("hog");
    // --oversubscribe takes the harness's --exclusive back, with which a job has all of its node.
    let options = Options::new("hog").arg("--oversubscribe").arg("--cpus-per-task=2").arg("--mem=500M");
    let mut pilot = Pilot::sbatch(options);
    run(
        &namespace,
        &pilot,
        "quiet",
        "echo full >full\nsleep 600\n",
        &json!({"requests": {"memory": "20Mi"}}),
    );
    wait_until("it sleeps", seconds(30), || is_full(&pilot, "quiet"));
    // As fast as a program can: tail keeps what has no line ends.
    run(&namespace, &pilot, "hog", "head -c 3000000000 /dev/zero | tail\n", &json!({}));
    let pod = namespace.wait_phase("hog", "Failed", seconds(60));
    assert_eq!(pod["status"]["reason"], "Evicted", "{:#}\n{}", pod["status"], pilot.output());
    let message = pod["status"]["message"].as_str().unwrap();
    assert!(
        message.contains("low on resource: memory") && message.contains("Container c1 was using"),
        "{message}"
    );
    assert_eq!(condition(&pod, "DisruptionTarget")["reason"], "TerminationByKubelet", "{:#}", pod["status"]);
    wait_until("the Node says so", seconds(20), || {
        condition(&pilot.nodes()[0], "MemoryPressure")["status"] == "True"
    });
    assert_eq!(namespace.pod("quiet").unwrap()["status"]["phase"], "Running");
    // One single kill of the kernel's would make the whole job OUT_OF_MEMORY.
    assert!(!pilot.output().contains("the kernel has killed"), "{}", pilot.output());
    let number = pilot.job.unwrap().to_string();
    let interrupted = host_run(as_user(ALICE, "scancel").args(["--batch", "--signal=INT", &number]));
    assert!(interrupted.success, "{}", interrupted.text);
    let job = pilot.wait_job_over(seconds(60));
    assert_eq!(job.state(), "COMPLETED", "{}", pilot.output());
}
