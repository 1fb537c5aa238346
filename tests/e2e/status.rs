//! What a pod's status says of what its scripts did.

use crate::harness::{Namespace, Options, Pilot, read, seconds};

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

#[test]
fn two_hundred_lines_of_output_are_all_in_the_log_in_order() {
    let namespace = Namespace::new("lines");
    let pilot = Pilot::local(Options::new("lines"), 300);
    namespace.script_on(&pilot, "p", "for i in $(seq 200); do echo line $i; done\n");
    namespace.wait_phase("p", "Succeeded", seconds(30));
    let log = read(&pilot.pod_directory("p").join("containers/c1/logs/0.log"));
    // The CRI format: time, stream, F for a full line, the line.
    let lines: Vec<&str> =
        log.lines().filter_map(|line| line.split_once(" stdout F ")).map(|(_, l)| l).collect();
    let wanted: Vec<String> = (1..=200).map(|number| format!("line {number}")).collect();
    assert_eq!(lines, wanted);
}
