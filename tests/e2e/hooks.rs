//! preStop hooks: before the SIGTERM, within the grace, also when the allocation ends.

use serde_json::{Value, json};

use crate::harness::{Namespace, Options, Pilot, container, pod_spec, read, seconds, wait_until};

/// Notes its SIGTERM and ends.
const NOTES_TERM: &str = "trap 'echo term >>order; exit 0' TERM\nsleep 1000 &\nwait\n";

fn hooked(namespace: &Namespace, pilot: &Pilot, name: &str, hook: &Value) {
    namespace.config_map(name, &[("run.sh", NOTES_TERM)]);
    let mut container = container("c1", name);
    container["lifecycle"] = json!({"preStop": hook});
    namespace.pod_on(pilot, name, pod_spec("Never", &[container]));
    namespace.wait_phase(name, "Running", seconds(30));
}

#[test]
fn a_pre_stop_hook_runs_before_sigterm_and_one_that_fails_is_told() {
    let namespace = Namespace::new("hooks");
    let pilot = Pilot::local(Options::new("hooks"), 600);
    // The container's directory goes with the pod, so what happened is noted beside it.
    let order = pilot.home.join("order");
    let note = |what: &str| format!("echo {what} >>{}", order.display());
    let script = format!("trap '{}; exit 0' TERM\nsleep 1000 &\nwait\n", note("term"));
    namespace.config_map("good", &[("run.sh", &script)]);
    let mut good = container("c1", "good");
    good["env"] = json!([{"name": "WHAT", "value": "hook"}]);
    // In the container's surroundings.
    let command = json!(["sh", "-c", note("$WHAT")]);
    good["lifecycle"] = json!({"preStop": {"exec": {"command": command}}});
    namespace.pod_on(&pilot, "good", pod_spec("Never", &[good]));
    hooked(&namespace, &pilot, "bad", &json!({"exec": {"command": ["sh", "-c", "echo because; exit 9"]}}));
    namespace.wait_phase("good", "Running", seconds(30));

    namespace.of("pods").delete("good", Some(20));
    namespace.of("pods").delete("bad", Some(20));
    namespace.wait_gone("good", seconds(15));
    namespace.wait_gone("bad", seconds(15));
    assert_eq!(read(&order), "hook\nterm\n");
    wait_until("the failure is told", seconds(10), || {
        let told = |(reason, text): &(String, String)| {
            reason == "FailedPreStopHook" && text.contains("exit code 9") && text.contains("because")
        };
        namespace.events("bad").iter().any(told)
    });
}

#[test]
fn a_pre_stop_hook_that_takes_too_long_ends_with_the_grace() {
    let namespace = Namespace::new("hooklong");
    let pilot = Pilot::local(Options::new("hooklong"), 600);
    hooked(&namespace, &pilot, "p", &json!({"exec": {"command": ["sleep", "3671"]}}));
    let begin = std::time::Instant::now();
    namespace.of("pods").delete("p", Some(3));
    namespace.wait_gone("p", seconds(15));
    assert!(begin.elapsed() >= seconds(3), "the hook has all of the grace");
    assert!(!pilot.processes().iter().any(|(_, line)| line.contains("3671")), "{:?}", pilot.processes());
}

#[test]
fn the_allocations_end_runs_pre_stop_hooks_and_waits_for_none_beyond_its_time() {
    let namespace = Namespace::new("hookdrain");
    // The least time with room for two pods: the drain begins 30 s before the end, and half of it is for the pods.
    let begin = std::time::Instant::now();
    let mut pilot = Pilot::local(Options::new("hookdrain"), 60);
    let order = pilot.pod_directory("quick").join("containers/c1/order");
    hooked(&namespace, &pilot, "quick", &json!({"exec": {"command": ["sh", "-c", "echo hook >>order"]}}));
    // As long as the pod's grace lets it be, and longer than the end does.
    hooked(&namespace, &pilot, "slow", &json!({"sleep": {"seconds": 29}}));
    let code = pilot.wait_exit(seconds(90));
    assert!(
        begin.elapsed() < seconds(60),
        "the batch system would have killed it after {:?}",
        begin.elapsed()
    );
    assert_eq!(code, Some(0), "{}", pilot.output());
    // Directories of pods that the end cut short stay.
    assert_eq!(read(&order), "hook\nterm\n");
    let slow = pilot.pod_directory("slow").join("containers/c1/order");
    assert_eq!(read(&slow), "term\n", "the script has a moment after a hook that was cut off");
    assert_eq!(pilot.processes(), Vec::<(i32, String)>::new());
}
