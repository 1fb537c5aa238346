//! The allocation's end, as Slurm makes it.

use std::time::Instant;

use serde_json::json;

use crate::harness::{Namespace, Options, Pilot, condition, read, seconds, slurm, wait_until};

#[test]
fn a_cancelled_job_ends_its_pods_reports_them_and_removes_its_node() {
    let namespace = Namespace::new("scancel");
    let mut pilot = Pilot::sbatch(Options::new("scancel"));
    let marker = pilot.home.join("trapped");
    namespace.script_on(
        &pilot,
        "p",
        &format!("trap 'sleep 1; echo yes >{}; exit 3' TERM\nsleep 600 &\nwait\n", marker.display()),
    );
    namespace.wait_phase("p", "Running", seconds(30));

    pilot.scancel();
    let pod = namespace.wait_phase("p", "Failed", seconds(35));
    assert_eq!(pod["status"]["reason"], "Terminated", "{:#}", pod["status"]);
    assert_eq!(condition(&pod, "DisruptionTarget")["status"], "True", "{:#}", pod["status"]);
    assert_eq!(read(&marker), "yes\n", "the script's trap ran to its end");

    // Within KillWait: the batch system did not have to kill anything.
    let job = pilot.wait_job_over(seconds(30));
    assert_eq!(job.state(), "CANCELLED");
    assert_eq!(pilot.nodes(), Vec::<serde_json::Value>::new());
    wait_until("the lease is gone", seconds(5), || pilot.lease().is_none());
    assert_eq!(pilot.processes(), Vec::<(i32, String)>::new());

    // Where the outcome is looked up once Kubernetes has deleted the pod: the job's output, a file, an event.
    let row = pilot.row("p");
    let log = pilot.pod_directory("p").join("containers/c1/logs/0.log");
    assert!(row.contains("  Failed (Terminated)  ") && row.contains("  exit 3  "), "{row}");
    assert!(row.ends_with(log.to_str().unwrap()) && log.exists(), "{row}");
    let kept = pilot.kept_outcome("p");
    assert_eq!((&kept["phase"], &kept["reason"]), (&json!("Failed"), &json!("Terminated")), "{kept:#}");
    assert_eq!(kept["reported"], true, "{kept:#}");
    assert_eq!(kept["containers"][0]["exit_code"], 3, "{kept:#}");
    assert_eq!(kept["containers"][0]["log"], log.to_str().unwrap(), "{kept:#}");
    let ended = ("PodEnded".to_owned(), "Failed (Terminated); c1 exit 3".to_owned());
    let events = namespace.events("p");
    assert!(events.contains(&ended), "{events:?}");
}

#[test]
fn a_cancelled_job_ends_a_stubborn_pod_before_slurm_kills_it_however_much_of_its_limit_is_left() {
    let namespace = Namespace::new("stubborn");
    let mut pilot = Pilot::sbatch(Options::new("stubborn"));
    namespace.stubborn_pod(&pilot, "p");

    // KillWait is 30 s.
    let start = Instant::now();
    pilot.scancel();
    let pod = namespace.wait_phase("p", "Failed", seconds(30));
    assert_eq!(pod["status"]["reason"], "Terminated", "{:#}", pod["status"]);
    assert_eq!(pod["status"]["containerStatuses"][0]["state"]["terminated"]["exitCode"], 137, "{pod:#}");
    assert_eq!(pilot.wait_job_over(seconds(30)).state(), "CANCELLED");
    assert!(start.elapsed() < seconds(30), "{:?}: {}", start.elapsed(), pilot.output());
    assert_eq!(pilot.nodes(), Vec::<serde_json::Value>::new());
    assert_eq!(pilot.processes(), Vec::<(i32, String)>::new());
}

#[test]
fn a_requeued_job_comes_back_with_another_node_name() {
    let mut pilot = Pilot::sbatch(Options::new("requeue").arg("--requeue"));
    let first = pilot.node.clone();
    slurm(&["scontrol", "requeue", &pilot.job.unwrap().to_string()]);
    wait_until("the first node is gone", seconds(40), || {
        pilot.nodes().iter().all(|node| node["metadata"]["name"] != first.as_str())
    });
    // Slurm lets a requeued job wait for a while.
    wait_until("the job runs again", seconds(240), || {
        let state = pilot.job_state();
        state.state() == "RUNNING" && state.field("Restarts") == "1"
    });
    pilot.wait_ready(1);
    assert_ne!(pilot.node, first);
}
