//! A PBS job's walltime, as qstat tells it, or does not.

use std::time::Instant;

use jiff::Timestamp;
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::harness::{
    Namespace, Options, PbsJob, Pilot, condition, container, pod_spec, read, seconds, wait_until,
};

/// What was measured at least between PBS's SIGTERM and its SIGKILL (8.1 s).
const KILL_DELAY: std::time::Duration = seconds(8);

/// What the Node says of the deadline: seconds from now.
fn left(pilot: &Pilot) -> i64 {
    let nodes = pilot.nodes();
    let deadline = nodes[0]["metadata"]["annotations"]["jiriaf.deadline"].as_str().expect("a deadline");
    deadline.parse::<Timestamp>().unwrap().as_second() - Timestamp::now().as_second()
}

#[test]
fn a_walltime_in_broken_json_is_known_and_followed_when_it_changes() {
    let job = PbsJob::new(1, "00:05:00");
    job.mode("broken-json");
    let pilot = Pilot::pbs(Options::new("pbs-json"), &job);
    assert!((280..=300).contains(&left(&pilot)), "{} s are left", left(&pilot));
    // qalter, up and down. SIGUSR1: the pilot asks at once.
    job.walltime("01:00:00");
    pilot.signal(Signal::SIGUSR1);
    wait_until("the deadline moves away", seconds(15), || (3500..=3600).contains(&left(&pilot)));
    wait_until("alivetime follows", seconds(15), || pilot.alivetime().is_some_and(|now| now > 3000));
    job.walltime("00:20:00");
    job.mode("json");
    // A site's script may have the other signal sent.
    pilot.signal(Signal::SIGUSR2);
    wait_until("the deadline comes near", seconds(15), || (1100..=1200).contains(&left(&pilot)));
    wait_until("alivetime follows", seconds(15), || pilot.alivetime().is_some_and(|now| now < 1200));
    assert!(!pilot.output().contains("crashed"), "{}", pilot.output());
}

#[test]
fn the_answers_of_a_real_openpbs_are_understood_and_followed_when_they_change() {
    let job = PbsJob::new(1, "");
    job.recorded("qstat-f-running", "00:05:00");
    let pilot = Pilot::pbs(Options::new("pbs-recorded"), &job);
    assert!((280..=300).contains(&left(&pilot)), "{} s are left", left(&pilot));
    let capacity = pilot.nodes()[0]["status"]["capacity"].clone();
    assert_eq!((&capacity["cpu"], &capacity["memory"]), (&"1".into(), &"500Mi".into()), "{capacity:#}");
    // Of a job whose variables hold quotes, line ends, backslashes, numbers and nothing at all.
    job.recorded("quirks/qstat-f.55.pbshost", "02:00:00");
    pilot.signal(Signal::SIGUSR1);
    wait_until("the deadline moves away", seconds(15), || (7100..=7200).contains(&left(&pilot)));
    wait_until("alivetime follows", seconds(15), || pilot.alivetime().is_some_and(|now| now > 6000));
}

#[test]
fn a_torque_that_knows_no_json_is_asked_for_text() {
    let job = PbsJob::new(1, "00:10:00");
    job.mode("torque");
    let pilot = Pilot::pbs(Options::new("torque"), &job);
    assert!((580..=600).contains(&left(&pilot)), "{} s are left", left(&pilot));
}

#[test]
fn a_pilot_whose_qstat_fails_or_hangs_goes_on_with_what_it_knew_and_says_so() {
    let job = PbsJob::new(1, "00:10:00");
    let pilot = Pilot::pbs(Options::new("pbs-lost"), &job);
    let asked = |mode: &str| {
        let before = job.calls().len();
        job.mode(mode);
        pilot.signal(Signal::SIGUSR1);
        wait_until("qstat is asked", seconds(15), || job.calls().len() > before);
    };
    asked("refused");
    wait_until("a warning says so", seconds(15), || pilot.output().contains("Connection refused"));
    asked("hang");
    // Its limit is 10 s; nothing may be left of it.
    wait_until("the hanging qstat is ended", seconds(30), || {
        pilot.processes().iter().all(|(_, line)| !line.starts_with("sleep 3600"))
    });
    assert!((500..=600).contains(&left(&pilot)), "{} s are left", left(&pilot));
    assert_eq!(condition(&pilot.nodes()[0], "Ready")["status"], "True");
    // It listens again as soon as there is an answer.
    job.walltime("00:30:00");
    asked("json");
    wait_until("the deadline moves", seconds(15), || left(&pilot) > 1500);
}

#[test]
fn a_session_that_a_script_makes_is_made_known_to_the_job_within_a_second_or_so() {
    let namespace = Namespace::new("session");
    let job = PbsJob::new(1, "00:10:00");
    let pilot = Pilot::pbs(Options::new("session"), &job);
    namespace.script_on(&pilot, "p", "sleep 3671 &\nsetsid sleep 3672 &\nwait\n");
    namespace.wait_phase("p", "Running", seconds(30));
    wait_until("the script has made a session", seconds(10), || pilot.sessions("sleep 3672").len() == 1);
    let made = Instant::now();
    let session = pilot.sessions("sleep 3672")[0];
    assert_ne!(session, pilot.session());
    wait_until("PBS is told", seconds(10), || !job.attached().is_empty());
    assert!(made.elapsed() < seconds(3), "{:?}", made.elapsed());
    // Once, and no other: the job's own session is known.
    assert_eq!(job.attached(), [format!("-j {} -p {session} session {session}", job.id)]);
    namespace.of("pods").delete("p", Some(1));
    namespace.wait_gone("p", seconds(20));
    assert_eq!(job.attached().len(), 1);
}

#[test]
fn a_qdel_ends_a_stubborn_pod_before_pbs_kills_it_however_much_walltime_is_left() {
    let namespace = Namespace::new("qdel");
    let job = PbsJob::new(1, "01:00:00");
    let mut pilot = Pilot::pbs(Options::new("qdel"), &job);
    namespace.stubborn_pod(&pilot, "p");

    // qstat goes on to say that an hour is left, as a real one does.
    let start = Instant::now();
    pilot.qdel();
    assert_eq!(pilot.wait_exit(seconds(30)), Some(0), "{}", pilot.output());
    assert!(start.elapsed() < KILL_DELAY, "{:?}: {}", start.elapsed(), pilot.output());
    let pod = namespace.wait_phase("p", "Failed", seconds(5));
    assert_eq!(pod["status"]["reason"], "Terminated", "{:#}", pod["status"]);
    assert_eq!(pod["status"]["containerStatuses"][0]["state"]["terminated"]["exitCode"], 137, "{pod:#}");
    assert_eq!(pilot.nodes(), Vec::<Value>::new());
    assert_eq!(pilot.processes(), Vec::<(i32, String)>::new());
}

#[test]
fn pods_whose_processes_pbs_ends_itself_are_disrupted_and_neither_succeed_nor_start_again() {
    let namespace = Namespace::new("sweep");
    let job = PbsJob::new(1, "00:10:00");
    let mut pilot = Pilot::pbs(Options::new("sweep"), &job);
    let runs = pilot.home.join("runs");
    let script = format!("trap 'exit 0' TERM\necho ran >>{}\nsleep 3661 &\nwait\n", runs.display());
    namespace.config_map("trap", &[("run.sh", &script)]);
    for (name, policy) in [("always", "Always"), ("never", "Never")] {
        namespace.pod_on(&pilot, name, pod_spec(policy, &[container("c1", "trap")]));
        namespace.wait_phase(name, "Running", seconds(30));
    }
    // What is in another session gets no signal from PBS, and outlives the job.
    wait_until("both scripts sleep", seconds(10), || pilot.sessions("sleep 3661").len() == 2);
    for program in ["sleep 3661", "bash "] {
        assert_eq!(pilot.sessions(program), [pilot.session(); 2], "{program}: {:?}", pilot.processes());
    }

    pilot.qdel();
    assert_eq!(pilot.wait_exit(KILL_DELAY), Some(0), "{}", pilot.output());
    for name in ["never", "always"] {
        let pod = namespace.wait_phase(name, "Failed", seconds(5));
        assert_eq!(pod["status"]["reason"], "Terminated", "{:#}", pod["status"]);
        assert_eq!(condition(&pod, "DisruptionTarget")["status"], "True", "{:#}", pod["status"]);
        let container = &pod["status"]["containerStatuses"][0];
        assert_eq!(container["state"]["terminated"]["exitCode"], 0, "{container:#}");
        assert_eq!(container["restartCount"], 0, "{container:#}");
    }
    assert_eq!(read(&runs), "ran\nran\n", "one of them ran twice");
    assert_eq!(pilot.nodes(), Vec::<Value>::new());
    assert_eq!(pilot.processes(), Vec::<(i32, String)>::new());
}
