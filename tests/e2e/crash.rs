//! What becomes of containers when a process of ours dies.

use std::time::Instant;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::harness::{ApiProxy, Namespace, Options, PbsJob, Pilot, seconds, wait_for, wait_until};

#[test]
fn a_pod_whose_supervisor_is_killed_fails_with_a_reason_and_leaves_nothing_behind() {
    let namespace = Namespace::new("supervisor");
    let pilot = Pilot::local(Options::new("supervisor"), 600);
    namespace.script_on(&pilot, "p", "(setsid sleep 3631 &)\nsleep 3632\n");
    let sleeps = || pilot.processes().iter().filter(|(_, line)| line.starts_with("sleep 363")).count();
    wait_until("the script sleeps", seconds(30), || sleeps() == 2);
    namespace.wait_phase("p", "Running", seconds(10));
    let [supervisor] = pilot.stages("supervise")[..] else { panic!("one supervisor was expected") };
    kill(Pid::from_raw(supervisor), Signal::SIGKILL).unwrap();

    let pod = namespace.wait_phase("p", "Failed", seconds(20));
    let ended = &pod["status"]["containerStatuses"][0]["state"]["terminated"];
    let said = format!("{} {}", ended["reason"], ended["message"]);
    assert!(said.to_lowercase().contains("supervisor"), "{:#}", pod["status"]);
    wait_until("nothing is left", seconds(5), || sleeps() == 0);
}

#[test]
fn a_killed_pilot_comes_back_and_reports_what_ended_meanwhile_and_what_still_runs() {
    let namespace = Namespace::new("pilot");
    let pilot = Pilot::local(Options::new("pilot"), 600);
    let go = pilot.home.join("go");
    let runs = pilot.home.join("runs");
    // Each says that it ran; they end when they are told to, by their names' codes.
    for code in [0, 3, 4] {
        let (go, runs) = (go.display(), runs.display());
        let script =
            format!("echo {code} >>{runs}\nuntil [ -e {go}.{code} ]; do sleep 0.05; done\nexit {code}\n");
        namespace.script_on(&pilot, &format!("p{code}"), &script);
        namespace.wait_phase(&format!("p{code}"), "Running", seconds(30));
    }
    let [first] = pilot.stages("pilot")[..] else { panic!("one pilot was expected") };
    // One ends while no pilot is there to see it: the pilot is stopped before, and killed after.
    kill(Pid::from_raw(first), Signal::SIGSTOP).unwrap();
    std::fs::write(pilot.home.join("go.3"), "").unwrap();
    std::thread::sleep(seconds(1)); // nothing shows the script's end but the pilot, which is stopped
    kill(Pid::from_raw(first), Signal::SIGKILL).unwrap();

    wait_for("another pilot", seconds(30), || {
        pilot.stages("pilot").first().copied().filter(|second| *second != first)
    });
    let exit_code = |pod: &str, phase: &str| {
        let pod = namespace.wait_phase(pod, phase, seconds(30));
        pod["status"]["containerStatuses"][0]["state"]["terminated"]["exitCode"].clone()
    };
    assert_eq!(exit_code("p3", "Failed"), 3);
    std::fs::write(pilot.home.join("go.0"), "").unwrap();
    assert_eq!(exit_code("p0", "Succeeded"), 0);
    std::fs::write(pilot.home.join("go.4"), "").unwrap();
    assert_eq!(exit_code("p4", "Failed"), 4);
    // The fourth comes after the crash.
    namespace.script_on(&pilot, "p5", "exit 5\n");
    assert_eq!(exit_code("p5", "Failed"), 5);
    assert_eq!(std::fs::read_to_string(&runs).unwrap().lines().count(), 3, "nothing ran twice");
}

#[test]
fn a_pilot_that_crashes_again_and_again_is_given_up_and_leaves_nothing_running() {
    let namespace = Namespace::new("give-up");
    let mut pilot = Pilot::local(Options::new("give-up"), 600);
    namespace.script_on(&pilot, "p", "(setsid sleep 3651 &)\nsleep 3652\n");
    namespace.wait_phase("p", "Running", seconds(30));
    let mut last = None;
    for _ in 0..4 {
        let next = wait_for("a pilot to kill", seconds(30), || {
            pilot.stages("pilot").first().copied().filter(|next| Some(*next) != last)
        });
        kill(Pid::from_raw(next), Signal::SIGKILL).unwrap();
        last = Some(next);
    }
    assert_eq!(pilot.wait_exit(seconds(20)), Some(1), "{}", pilot.output());
    assert_eq!(pilot.processes(), Vec::<(i32, String)>::new());
    assert!(pilot.output().contains("crashed"), "{}", pilot.output());
}

/// Traps SIGTERM, and says in this file that the trap ran to its end.
fn trapped(file: &std::path::Path) -> String {
    format!("trap 'sleep 1; echo yes >{}; exit 3' TERM\nsleep 3671 &\nwait\n", file.display())
}

#[test]
fn a_pilot_that_comes_back_while_the_api_server_is_away_still_ends_its_pods_when_it_is_asked_to() {
    let namespace = Namespace::new("away");
    let proxy = ApiProxy::start();
    // PBS: 8 s from its SIGTERM to its SIGKILL.
    let job = PbsJob::new(1, "01:00:00");
    let options = Options { server: Some(proxy.url()), ..Options::new("away") };
    let mut pilot = Pilot::pbs(options, &job);
    let marker = pilot.home.join("trapped");
    namespace.script_on(&pilot, "p", &trapped(&marker));
    namespace.wait_phase("p", "Running", seconds(30));
    proxy.cut();
    let [first] = pilot.stages("pilot")[..] else { panic!("one pilot was expected") };
    kill(Pid::from_raw(first), Signal::SIGKILL).unwrap();
    wait_until("another pilot has taken the pod up", seconds(30), || {
        let output = pilot.output();
        let back = output.split("it is started again").nth(1).unwrap_or_default();
        back.contains("taking up the pods") && back.contains("API server does not answer")
    });
    assert!(!marker.exists());

    let start = Instant::now();
    pilot.signal(Signal::SIGTERM);
    assert_eq!(pilot.wait_exit(seconds(60)), Some(1), "{}", pilot.output());
    assert!(start.elapsed() < seconds(8), "{:?}: {}", start.elapsed(), pilot.output());
    assert!(marker.exists(), "the script's trap did not run to its end: {}", pilot.output());
    let row = pilot.row("p");
    assert!(row.contains("  Failed (Terminated) NOT REPORTED  ") && row.contains("  exit 3  "), "{row}");
    let kept = pilot.kept_outcome("p");
    assert_eq!((&kept["reason"], &kept["reported"]), (&"Terminated".into(), &false.into()), "{kept:#}");
    assert_eq!(pilot.processes(), Vec::<(i32, String)>::new());
}

#[test]
fn a_pilot_that_is_asked_to_end_while_it_comes_back_reports_its_pods_and_removes_its_node() {
    let namespace = Namespace::new("back");
    let mut pilot = Pilot::local(Options::new("back"), 600);
    let marker = pilot.home.join("trapped");
    namespace.script_on(&pilot, "p", &trapped(&marker));
    namespace.wait_phase("p", "Running", seconds(30));
    let [first] = pilot.stages("pilot")[..] else { panic!("one pilot was expected") };
    kill(Pid::from_raw(first), Signal::SIGKILL).unwrap();
    wait_until("the pilot is started again", seconds(10), || pilot.output().contains("it is started again"));
    pilot.signal(Signal::SIGTERM);
    assert_eq!(pilot.wait_exit(seconds(40)), Some(0), "{}", pilot.output());
    assert!(marker.exists(), "the script's trap did not run to its end: {}", pilot.output());
    let pod = namespace.wait_phase("p", "Failed", seconds(5));
    assert_eq!(pod["status"]["reason"], "Terminated", "{:#}", pod["status"]);
    assert_eq!(pilot.nodes(), Vec::<Value>::new());
    assert_eq!(pilot.processes(), Vec::<(i32, String)>::new());
}
