//! The job scripts that users copy: each is run here as it is in the repository. slurm/pilot.sh is what the
//! other tests use.

use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt;

use serde_json::Value;

use crate::harness::{Namespace, Options, PbsJob, Pilot, container, pod_spec, seconds};

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

#[test]
fn pbs_pilot_starts_one_pilot_a_host_by_pbsdsh_and_waits_for_all_of_them() {
    let namespace = Namespace::new("pbsdsh");
    let job = PbsJob::new(2, "00:05:00");
    let mut pilot = Pilot::pbs(Options { nodes: 2, ..Options::new("pbsdsh") }, &job);
    assert_eq!(pilot.nodes().len(), 2);
    one_pod_on_each(&namespace, &pilot);
    pilot.qdel();
    pilot.wait_exit(seconds(20));
    assert_eq!(pilot.nodes(), Vec::<serde_json::Value>::new());
    assert_eq!(pilot.processes(), Vec::<(i32, String)>::new());
    let left = std::fs::read_dir(&pilot.home).unwrap().flatten().map(|entry| entry.file_name());
    let left: Vec<_> = left.filter(|name| name.to_string_lossy().starts_with(".jiriaf-pilot-env")).collect();
    assert!(left.is_empty(), "{left:?}");
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
