//! Jobs of many pilots, and what Slurm does to a whole job while its pilots run: arrays, several nodes, heterogeneous jobs,
//! suspension, preemption.

use std::collections::BTreeSet;

use jiff::Timestamp;
use serde_json::Value;

use crate::harness::{
    ALICE, Namespace, Options, Pilot, as_user, bed, condition, container, pod_spec, run, seconds, slurm,
    wait_for, wait_until,
};

fn name_of(node: &Value) -> String {
    node["metadata"]["name"].as_str().unwrap().to_owned()
}

fn alivetime(node: &Value) -> Option<i64> {
    node["metadata"]["labels"]["jiriaf.alivetime"].as_str()?.parse().ok()
}

/// When a Node says that its pods will be ended, in seconds since 1970.
fn drain(node: &Value) -> i64 {
    let moment = node["metadata"]["annotations"]["jiriaf.drain"].as_str().expect("a drain time");
    moment.parse::<Timestamp>().unwrap().as_second()
}

/// A pod of this script on one Node of the pilots.
fn pod_on_node(namespace: &Namespace, pilot: &Pilot, name: &str, node: &str, script: &str) {
    namespace.config_map(name, &[("run.sh", script)]);
    let mut spec = pod_spec("Never", &[container("c1", name)]);
    spec["nodeSelector"]["kubernetes.io/hostname"] = node.into();
    namespace.pod_on(pilot, name, spec);
}

#[test]
fn an_array_of_eight_pilots_on_two_nodes_runs_a_pod_on_each_and_all_are_completed() {
    const TASKS: usize = 8;
    let namespace = Namespace::new("array8");
    let all = slurm(&["sinfo", "-h", "-N", "-p", "debug", "-o", "%N"]);
    let others: Vec<&str> =
        all.lines().map(str::trim).filter(|name| *name != "n1" && *name != "n2").collect();
    // On two nodes of two CPUs, one each: four at a time. Each leaves when it has nothing to do any more.
    let options = Options::new("array8")
        .env("JIRIAF_IDLE_TIMEOUT", "5s")
        .arg(&format!("--array=1-{TASKS}"))
        .arg("--oversubscribe")
        .arg("--cpus-per-task=1")
        .arg("--mem=400")
        .arg(&format!("--exclude={}", others.join(",")));
    let pilot = Pilot::submit(&options);
    let mut seen = BTreeSet::new();
    let mut hosts = BTreeSet::new();
    // Other tests may hold the nodes for some minutes.
    wait_until("each task has had its Node", seconds(900), || {
        for node in pilot.nodes() {
            let name = name_of(&node);
            if node["spec"]["unschedulable"] != true && seen.insert(name.clone()) {
                hosts.insert(name.rsplit('-').next().unwrap().to_owned());
                pod_on_node(&namespace, &pilot, &format!("p{}", seen.len()), &name, "exit 0\n");
            }
        }
        seen.len() == TASKS
    });
    for number in 1..=TASKS {
        namespace.wait_phase(&format!("p{number}"), "Succeeded", seconds(60));
    }
    // Another test may hold one of them all the while.
    assert!(hosts.is_subset(&BTreeSet::from(["n1".to_owned(), "n2".to_owned()])), "{hosts:?}");
    wait_until("all Nodes are gone", seconds(60), || pilot.nodes().is_empty());
    let states = wait_for("all jobs are over", seconds(60), || {
        let all = slurm(&["scontrol", "show", "job", "-o", &pilot.job.unwrap().to_string()]);
        let states: Vec<String> = all
            .split_whitespace()
            .filter_map(|field| field.strip_prefix("JobState="))
            .map(str::to_owned)
            .collect();
        (!states.iter().any(|state| state == "RUNNING" || state == "COMPLETING")).then_some(states)
    });
    assert_eq!(states, vec!["COMPLETED"; TASKS]);
    assert_eq!(pilot.processes(), Vec::<(i32, String)>::new());
}

#[test]
fn a_lowered_limit_is_seen_by_all_pilots_of_a_job_within_some_minutes() {
    const NODES: u32 = 4;
    let options = Options { nodes: NODES, script: "slurm/pilot-multinode.sh", ..Options::new("lowered") };
    let pilot = Pilot::sbatch(options.minutes(120).env("JIRIAF_LOG", "debug"));
    assert!(pilot.nodes().iter().all(|node| alivetime(node).is_some_and(|left| left > 6000)));
    wait_until("the others have seen the first one's Node", seconds(30), || {
        pilot.output().matches("found the job's first pilot").count() == NODES as usize - 1
    });
    pilot.update("TimeLimit=30");
    // The first asks within 132 s, the others look at its Node within 75 s more; by themselves they ask every six minutes
    // at the most often.
    wait_until("each label has fallen", seconds(240), || {
        let nodes = pilot.nodes();
        nodes.len() == NODES as usize
            && nodes.iter().all(|node| alivetime(node).is_some_and(|left| left < 1800))
    });
    let output = pilot.output();
    let told = output.lines().filter(|line| line.contains("the job's first pilot tells another end"));
    assert_eq!(told.count(), NODES as usize - 1, "{output}");
}

#[test]
fn each_part_of_a_heterogeneous_job_goes_by_its_own_limit() {
    let options = Options { script: "slurm/pilot-multinode.sh", ..Options::new("het") }.minutes(20);
    let options = options.arg("--ntasks-per-node=1").arg(":").arg("--nodes=2").arg("--exclusive");
    let options = options.arg("--ntasks-per-node=1").arg("--time=10");
    let mut pilot = Pilot::submit(&options);
    pilot.wait_ready(3);
    let mut left: Vec<i64> = pilot.nodes().iter().filter_map(alivetime).collect();
    left.sort_unstable();
    assert_eq!(left.len(), 3, "{left:?}");
    assert!(left[0] > 300 && left[1] < 600, "{left:?}");
    assert!((900..1200).contains(&left[2]), "{left:?}");
    let ids: BTreeSet<String> =
        pilot.nodes().iter().map(|node| node["metadata"]["labels"]["jiriaf.jobid"].to_string()).collect();
    assert_eq!(ids.len(), 1, "one job: {ids:?}");
    pilot.scancel();
    wait_until("all are gone", seconds(60), || pilot.nodes().is_empty() && pilot.processes().is_empty());
}

#[test]
fn a_job_that_was_suspended_beyond_its_first_end_goes_on_and_ends_in_time() {
    let namespace = Namespace::new("suspend");
    let mut pilot = Pilot::sbatch(Options::new("suspend").minutes(2));
    let (first_end, first_drain) = (pilot.end_time().as_second(), drain(&pilot.nodes()[0]));
    let counted = pilot.home.join("counted");
    let lines = || std::fs::read_to_string(&counted).unwrap_or_default().lines().count();
    let count = format!("while :; do echo >>{}; sleep 1 & wait $!; done\n", counted.display());
    let pod = namespace.script_on(&pilot, "p", &format!("trap 'exit 0' TERM\n{count}"));
    namespace.wait_phase("p", "Running", seconds(30));
    let uid = pod["metadata"]["uid"].clone();
    let job = pilot.job.unwrap().to_string();
    wait_until("the script runs", seconds(10), || lines() > 2);
    slurm(&["scontrol", "suspend", &job]);
    wait_until("the Node controller has given the Node up", seconds(90), || {
        condition(&pilot.nodes()[0], "Ready")["status"] == "Unknown"
    });
    wait_until("the first end is over", seconds(150), || Timestamp::now().as_second() > first_end + 5);
    slurm(&["scontrol", "resume", &job]);
    let end = pilot.end_time().as_second();
    assert!(end > first_end + 30, "Slurm moved the end from {first_end} to {end}");
    wait_until("the Node is ready", seconds(30), || {
        condition(&pilot.nodes()[0], "Ready")["status"] == "True"
    });
    wait_until("the drain has moved", seconds(15), || {
        let now = drain(&pilot.nodes()[0]);
        now > first_drain + 30 && now <= end - 29
    });
    let node = &pilot.nodes()[0];
    let left = end - 30 - Timestamp::now().as_second();
    assert!(alivetime(node).is_some_and(|told| told <= left + 1 && told + 16 >= left), "{left}: {node:#}");
    let renewed = || {
        let lease = pilot.lease().expect("a Lease");
        lease["spec"]["renewTime"].as_str().unwrap().parse::<Timestamp>().unwrap()
    };
    assert!(Timestamp::now().duration_since(renewed()).as_secs() <= 12, "{}", renewed());
    // Not cordoned for good by the time in which it stood still.
    if left > 20 {
        wait_until("pods are taken", seconds(10), || pilot.nodes()[0]["spec"]["unschedulable"] != true);
    }
    let before = lines();
    wait_until("the script goes on", seconds(10), || lines() > before);
    let pod = namespace.pod("p").unwrap();
    assert_eq!((&pod["status"]["phase"], &pod["metadata"]["uid"]), (&"Running".into(), &uid), "{pod:#}");
    let state = pilot.wait_job_over(seconds(150));
    assert_eq!((state.state(), state.field("ExitCode")), ("COMPLETED", "0:0"), "{}", pilot.output());
    let over = Timestamp::now().as_second();
    assert!(over > first_end + 30 && over <= end, "over at {over}, the end is {end}");
    assert_eq!(namespace.pod("p").unwrap()["status"]["reason"], "Terminated");
}

#[test]
fn a_preempted_job_uses_its_grace_time() {
    let namespace = Namespace::new("preempt");
    let options = Options { script: "slurm/pilot-multinode.sh", ..Options::new("preempt") };
    let mut pilot = Pilot::sbatch(options.minutes(30));
    // Longer than KillWait would allow, shorter than GraceTime.
    let slow = "trap 'sleep 33; exit 0' TERM\nsleep 1000 &\nwait\n";
    namespace.config_map("p", &[("run.sh", slow)]);
    let mut spec = pod_spec("Never", &[container("c1", "p")]);
    spec["terminationGracePeriodSeconds"] = 60.into();
    namespace.pod_on(&pilot, "p", spec);
    namespace.wait_phase("p", "Running", seconds(30));
    let node = pilot.job_state().field("NodeList").to_owned();
    let mut urgent = as_user(ALICE, "sbatch");
    urgent.env("SLURM_CONF", bed().slurm_conf()).args(["--parsable", "-p", "urgent", "--exclusive"]);
    urgent.args(["-w", &node, "--time=1", "--chdir=/tmp", "--output=/dev/null", "--wrap=true"]);
    let submitted = run(&mut urgent);
    assert!(submitted.success, "{}", submitted.text);
    let pod = namespace.wait_phase("p", "Failed", seconds(90));
    assert_eq!(pod["status"]["reason"], "Terminated", "{:#}", pod["status"]);
    let ended = &pod["status"]["containerStatuses"][0]["state"]["terminated"];
    assert_eq!(ended["exitCode"], 0, "it came to its end: {ended:#}\n{}", pilot.output());
    let state = pilot.wait_job_over(seconds(60));
    assert!(["PREEMPTED", "COMPLETED", "CANCELLED"].contains(&state.state()), "{}", state.state());
    assert_eq!(pilot.nodes(), Vec::<Value>::new());
    assert_eq!(pilot.processes(), Vec::<(i32, String)>::new());
}
