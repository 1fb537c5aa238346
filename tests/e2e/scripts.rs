//! The job scripts that users copy: each is run here as it is in the repository. slurm/pilot.sh is what the
//! other tests use.

use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt;

use serde_json::Value;

use crate::harness::{
    Namespace, Options, PbsJob, Pilot, container, pod_spec, seconds, slurm, unique, wait_for, wait_until,
};

/// Runs one pod on each Node of the pilots.
#[track_caller]
fn one_pod_on_each(namespace: &Namespace, pilot: &Pilot) {
    namespace.config_map("p", &[("run.sh", "exit 0\n")]);
    let nodes: Vec<Value> = pilot.nodes().iter().map(|node| node["metadata"]["name"].clone()).collect();
    for (number, node) in nodes.iter().enumerate() {
        let mut spec = pod_spec("Never", &[container("c1", "p")]);
        spec["nodeSelector"]["kubernetes.io/hostname"] = node.clone();
        namespace.pod_on(pilot, &format!("p{number}"), spec);
    }
    for (number, node) in nodes.iter().enumerate() {
        let pod = namespace.wait_phase(&format!("p{number}"), "Succeeded", seconds(30));
        assert_eq!(pod["spec"]["nodeName"], *node, "{:#}", pod["spec"]);
    }
}

#[test]
fn pilot_multinode_makes_one_node_of_each_of_two_slurm_nodes_and_ends_both() {
    let namespace = Namespace::new("multinode");
    let mut pilot =
        Pilot::sbatch(Options { nodes: 2, script: "slurm/pilot-multinode.sh", ..Options::new("multinode") });
    let names: BTreeSet<String> =
        pilot.nodes().iter().map(|node| node["metadata"]["name"].to_string()).collect();
    assert_eq!(names.len(), 2, "{names:?}");
    one_pod_on_each(&namespace, &pilot);
    pilot.scancel();
    pilot.wait_job_over(seconds(40));
    assert_eq!(pilot.nodes(), Vec::<serde_json::Value>::new());
    assert_eq!(pilot.processes(), Vec::<(i32, String)>::new());
}

#[test]
fn pbs_pilot_runs_pods_until_a_sigterm_and_knows_its_walltime_from_qstat() {
    let namespace = Namespace::new("pbs");
    let job = PbsJob::new(1, "00:05:00");
    let mut pilot = Pilot::pbs(Options::new("pbs"), &job);
    assert!(job.calls().iter().any(|call| call.contains(&job.id)), "{:?}", job.calls());
    let labels = &pilot.nodes()[0]["metadata"]["labels"];
    assert_eq!(labels["jiriaf.batch"], "pbs", "{labels:#}");
    namespace.script_on(&pilot, "p", "exit 0\n");
    namespace.wait_phase("p", "Succeeded", seconds(30));
    pilot.qdel();
    assert_eq!(pilot.wait_exit(seconds(15)), Some(0));
    assert_eq!(pilot.nodes(), Vec::<serde_json::Value>::new());
}

/// One pilot on each of two hosts, by what JIRIAF_LAUNCH names; the exit code that the script has in the end.
fn pilots_of_two_hosts(label: &'static str, launch: &str) -> Option<i32> {
    let namespace = Namespace::new(label);
    let job = PbsJob::new(2, "00:05:00");
    let options = Options { nodes: 2, ..Options::new(label) }.env("JIRIAF_LAUNCH", launch);
    let mut pilot = Pilot::pbs(options, &job);
    assert_eq!(pilot.nodes().len(), 2);
    one_pod_on_each(&namespace, &pilot);
    pilot.qdel();
    let code = pilot.wait_exit(seconds(20));
    assert_eq!(pilot.nodes(), Vec::<serde_json::Value>::new());
    assert_eq!(pilot.processes(), Vec::<(i32, String)>::new());
    let left = std::fs::read_dir(&pilot.home).unwrap().flatten().map(|entry| entry.file_name());
    let left: Vec<_> = left.filter(|name| name.to_string_lossy().starts_with(".jiriaf-pilot-env")).collect();
    assert!(left.is_empty(), "{left:?}");
    code
}

#[test]
fn pbs_pilot_starts_one_pilot_a_host_by_pbsdsh_and_waits_for_all_of_them() {
    pilots_of_two_hosts("pbsdsh", "pbsdsh");
}

#[test]
fn pbs_pilot_starts_one_pilot_a_host_by_pbs_tmrsh_and_exits_as_they_do() {
    assert_eq!(pilots_of_two_hosts("tmrsh", "pbs_tmrsh"), Some(0));
}

#[test]
fn an_array_of_pilots_is_a_node_for_each_task_and_one_scancel_ends_all() {
    const TASKS: usize = 3;
    let namespace = Namespace::new("array");
    let options = Options::new("array").arg(&format!("--array=1-{TASKS}"));
    let mut pilot = Pilot::submit(&options);
    // Other tests may hold the nodes for some minutes.
    wait_until("each task has its Node", seconds(600), || pilot.nodes().len() == TASKS);
    pilot.wait_ready(TASKS);
    let ids: BTreeSet<String> = pilot
        .nodes()
        .iter()
        .map(|node| node["metadata"]["labels"]["jiriaf.jobid"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(ids.len(), TASKS, "{ids:?}");
    one_pod_on_each(&namespace, &pilot);
    pilot.scancel();
    wait_until("all are gone", seconds(40), || pilot.nodes().is_empty());
    assert_eq!(pilot.processes(), Vec::<(i32, String)>::new());
}

#[test]
fn each_pilot_of_a_chain_submits_the_next_which_comes_when_it_is_gone() {
    let namespace = Namespace::new("chain");
    // As if it had been run by hand: the rest is the job's own.
    let options = Options { script: "slurm/pilot-chain.sh", ..Options::new("chain") };
    let name = unique("chain");
    let options = options
        .env("JIRIAF_LINKS", "2")
        .env("JIRIAF_PAUSE", "1")
        .arg("--dependency=singleton")
        .arg(&format!("--job-name={name}"));
    let mut pilot =
        Pilot::submit_with(&options, &["--link", "2", "--exclusive", &format!("--job-name={name}")]);
    pilot.wait_ready(1);
    // Each with its state, or why it waits.
    let queued = || {
        let all = slurm(&["squeue", "-h", "-n", &name, "-o", "%A %R"]);
        let lines = all.lines().filter_map(|line| line.trim().split_once(' '));
        lines.map(|(id, why)| (id.to_owned(), why.to_owned())).collect::<Vec<_>>()
    };
    let next = wait_for("the next one waits for this one alone", seconds(30), || {
        queued().into_iter().find(|(_, why)| why == "(Dependency)").map(|(id, _)| id)
    });
    let first = pilot.node.clone();
    pilot.scancel();
    wait_until("the next one has its Node", seconds(600), || {
        pilot.nodes().iter().any(|node| node["metadata"]["name"] != *first)
    });
    wait_until("the first one's is gone", seconds(40), || pilot.nodes().len() == 1);
    assert_eq!(pilot.nodes()[0]["metadata"]["labels"]["jiriaf.jobid"], *next);
    // It was the last.
    assert_eq!(queued().len(), 1, "{:?}", queued());
    one_pod_on_each(&namespace, &pilot);
    pilot.job = Some(next.parse().unwrap());
    pilot.scancel();
    pilot.wait_job_over(seconds(40));
    assert_eq!(pilot.nodes(), Vec::<serde_json::Value>::new());
}

#[test]
fn qsub_pilot_hands_the_settings_over_in_a_file_that_only_the_owner_can_read() {
    let namespace = Namespace::new("qsub");
    let pilot = Pilot::qsub(Options::new("qsub").env("JIRIAF_LABELS", "test/from=settings"));
    let labels = &pilot.nodes()[0]["metadata"]["labels"];
    assert_eq!(labels["test/from"], "settings", "{labels:#}");
    let jobs = std::fs::read_dir(pilot.home.join(".config/jiriaf-pilot/jobs")).unwrap();
    let files: Vec<_> = jobs.flatten().collect();
    let [file] = files.as_slice() else { panic!("one settings file was expected: {files:?}") };
    assert_eq!(file.metadata().unwrap().permissions().mode() & 0o777, 0o600);
    let text = std::fs::read_to_string(file.path()).unwrap();
    assert!(text.contains("export KUBECONFIG=") && text.contains("export PBS_WALLTIME=600\n"), "{text}");
    one_pod_on_each(&namespace, &pilot);
}
