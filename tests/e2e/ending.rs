//! The allocation's end, as Slurm makes it.

use crate::harness::{Namespace, Options, Pilot, condition, read, seconds, wait_until};

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
    assert!(pilot.output().contains("Terminated"), "the table names how the pod ended:\n{}", pilot.output());
}
