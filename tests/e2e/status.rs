//! What a pod's status says of what its scripts did.

use crate::harness::{Namespace, Options, Pilot, bed, read, seconds, wait_until};

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

#[test]
fn kubectl_describe_tells_a_pods_story() {
    let namespace = Namespace::new("story");
    let pilot = Pilot::local(Options::new("story"), 600);
    namespace.script_on(&pilot, "p", "sleep 600\n");
    namespace.wait_phase("p", "Running", seconds(30));
    namespace.of("pods").delete("p", Some(2));
    namespace.wait_gone("p", seconds(20));
    wait_until("the events of a life", seconds(10), || {
        let events = namespace.events("p");
        let has = |reason: &str, text: &str| events.iter().any(|(r, m)| r == reason && m.contains(text));
        has("Scheduled", "")
            && has("Started", "Started container c1")
            && has("Killing", "Stopping container c1")
    });

    namespace.script_on(&pilot, "q", "echo hello; exit 2\n");
    namespace.wait_phase("q", "Failed", seconds(30));
    let described = bed().kubectl(&["-n", &namespace.name, "describe", "pod", "q"]).text;
    for wanted in ["Exit Code:    2", "Started container c1", "QoS Class"] {
        assert!(described.contains(wanted), "{wanted:?} is not in {described}");
    }
    let node = bed().kubectl(&["describe", "node", &pilot.node]).text;
    for wanted in ["jiriaf.site=", "virtual-kubelet.io/provider=mock:NoSchedule", "Ready", "InternalIP"] {
        assert!(node.contains(wanted), "{wanted:?} is not in {node}");
    }
}
