//! What a pod's status says of what its scripts did.

use crate::harness::{Namespace, Options, Pilot, seconds};

#[test]
fn a_script_that_exits_7_makes_its_pod_failed_with_exit_code_7() {
    let namespace = Namespace::new("exit7");
    let pilot = Pilot::sbatch(Options::new("exit7"));
    namespace.script_on(&pilot, "p7", "exit 7\n");
    let pod = namespace.wait_phase("p7", "Failed", seconds(30));
    let ended = &pod["status"]["containerStatuses"][0]["state"]["terminated"];
    assert_eq!(ended["exitCode"], 7, "{:#}", pod["status"]);
    assert_eq!(ended["reason"], "Error", "{:#}", pod["status"]);
}

#[test]
fn a_script_that_writes_to_stderr_and_exits_0_makes_its_pod_succeeded() {
    let namespace = Namespace::new("stderr");
    let pilot = Pilot::local(Options::new("stderr"), 300);
    namespace.script_on(&pilot, "p", "echo nothing is wrong >&2\n");
    let pod = namespace.wait_phase("p", "Succeeded", seconds(30));
    let ended = &pod["status"]["containerStatuses"][0]["state"]["terminated"];
    assert_eq!(ended["exitCode"], 0, "{:#}", pod["status"]);
}
