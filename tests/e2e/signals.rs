//! Signals to a pilot that was started by hand.

use std::time::Instant;

use nix::sys::signal::Signal;
use serde_json::Value;

use crate::harness::{Namespace, Options, Pilot, seconds, wait_until};

/// A pod whose script takes no notice of SIGTERM, and a pilot with it.
fn with_stubborn_pod(label: &'static str) -> (Namespace, Pilot) {
    let namespace = Namespace::new(label);
    let pilot = Pilot::local(Options::new(label), 600);
    namespace.script_on(
        &pilot,
        "p",
        "trap 'echo asked >>$JIRIAF_POD_DIR/asked' TERM\ntouch $JIRIAF_POD_DIR/deaf\nwhile :; do sleep 0.2; done\n",
    );
    namespace.wait_phase("p", "Running", seconds(30));
    // A script runs before its trap is set.
    let deaf = pilot.pod_directory("p").join("deaf");
    wait_until("the script has its trap", seconds(10), || deaf.exists());
    (namespace, pilot)
}

/// Waits until the script has had its SIGTERM: the drain is under way.
fn wait_drain(pilot: &Pilot) {
    let asked = pilot.pod_directory("p").join("asked");
    wait_until("the script gets SIGTERM", seconds(10), || asked.exists());
}

fn gone(pilot: &mut Pilot, namespace: &Namespace) {
    let pod = namespace.wait_phase("p", "Failed", seconds(5));
    assert_eq!(pod["status"]["containerStatuses"][0]["state"]["terminated"]["exitCode"], 137, "{pod:#}");
    assert_eq!(pilot.nodes(), Vec::<Value>::new());
    assert_eq!(pilot.processes(), Vec::<(i32, String)>::new());
}

#[test]
fn a_second_sigint_hurries() {
    let (namespace, mut pilot) = with_stubborn_pod("sigint");
    pilot.signal(Signal::SIGINT);
    wait_drain(&pilot);
    // The pod has 30 s of grace, which its script would use up.
    let start = Instant::now();
    pilot.signal(Signal::SIGINT);
    assert_eq!(pilot.wait_exit(seconds(30)), Some(0), "{}", pilot.output());
    assert!(start.elapsed() < seconds(12), "{:?}", start.elapsed());
    gone(&mut pilot, &namespace);
}

#[test]
fn a_second_sigterm_changes_nothing() {
    let namespace = Namespace::new("sigterm");
    let mut pilot = Pilot::local(Options::new("sigterm"), 600);
    let script = "trap 'echo asked >>$JIRIAF_POD_DIR/asked; sleep 4; echo whole >../done; exit 6' TERM\nsleep 600 &\nwait\n";
    namespace.script_on(
        &pilot,
        "p",
        &script.replace("../done", &pilot.home.join("done").display().to_string()),
    );
    namespace.wait_phase("p", "Running", seconds(30));
    pilot.signal(Signal::SIGTERM);
    wait_drain(&pilot);
    for signal in [Signal::SIGTERM, Signal::SIGHUP, Signal::SIGTERM] {
        pilot.signal(signal);
    }
    assert_eq!(pilot.wait_exit(seconds(30)), Some(0), "{}", pilot.output());
    assert!(pilot.home.join("done").exists(), "the trap did not run to its end: {}", pilot.output());
    let pod = namespace.wait_phase("p", "Failed", seconds(5));
    assert_eq!(pod["status"]["containerStatuses"][0]["state"]["terminated"]["exitCode"], 6, "{pod:#}");
    assert_eq!(pilot.nodes(), Vec::<Value>::new());
}
