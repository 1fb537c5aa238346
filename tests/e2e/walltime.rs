//! The walltime: what a job's own limit does, and what becomes of pods when it is moved.

use std::path::Path;

use jiff::Timestamp;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::harness::{
    ApiProxy, Namespace, Options, Pilot, api, condition, container, job, pod_spec, read, seconds,
    shared_directory, wait_for, wait_until,
};

/// Ends by itself at a SIGTERM, and not before.
const UNTIL_TERM: &str = "trap 'exit 0' TERM\nsleep 1000 &\nwait\n";

#[test]
fn a_job_of_two_minutes_drains_its_pods_before_the_limit_and_completes() {
    let namespace = Namespace::new("walltime");
    let mut pilot = Pilot::sbatch(Options::new("walltime").minutes(2));
    let end = pilot.end_time();
    namespace.config_map("wait", &[("run.sh", UNTIL_TERM)]);

    // No retry is allowed, so one failure that counted would fail the Job.
    let mut work = job(&pilot, "work", 0, pod_spec("Never", &[container("c1", "wait")]));
    work["spec"]["podFailurePolicy"] =
        json!({"rules": [{"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget"}]}]});
    let jobs = api::grouped("batch/v1", &namespace.name, "jobs");
    jobs.create(&work);
    let mut spec = pod_spec("Always", &[container("c1", "wait")]);
    pilot.place(&mut spec);
    api::grouped("apps/v1", &namespace.name, "deployments").create(&json!({
        "metadata": {"name": "service"},
        "spec": {"selector": {"matchLabels": {"app": "service"}},
            "template": {"metadata": {"labels": {"app": "service"}}, "spec": spec}},
    }));
    wait_until("both pods run", seconds(30), || on_node(&namespace, &pilot, "Running").len() == 2);

    // alivetime is sampled all along.
    loop {
        let before = Timestamp::now();
        let Some(alivetime) = pilot.alivetime() else { break };
        // To the drain, which comes 30 s before the end. One second for squeue, which answers in whole ones.
        let promised = before.as_second() + alivetime;
        assert!(
            promised <= end.as_second() - 30 + 1,
            "alivetime {alivetime} at {before}; the job ends at {end}"
        );
        assert!(before < end, "the node is still there at the limit");
        std::thread::sleep(seconds(1));
    }

    let failed = on_node(&namespace, &pilot, "Failed");
    assert_eq!(failed.len(), 2, "{failed:#?}");
    for pod in &failed {
        assert_eq!(pod["status"]["reason"], "Terminated", "{pod:#}");
        assert_eq!(condition(pod, "DisruptionTarget")["status"], "True", "{pod:#}");
    }
    let work = jobs.get("work").unwrap();
    assert_eq!(condition(&work, "Failed"), Value::Null, "{:#}", work["status"]);
    // The two, and a replacement for each that stays Pending.
    let pods = namespace.of("pods").list("");
    assert!(pods.len() <= 4, "a storm of {} pods", pods.len());

    let state = pilot.wait_job_over(seconds(30));
    assert_eq!((state.state(), state.field("ExitCode")), ("COMPLETED", "0:0"), "{}", pilot.output());
    wait_until("the lease is gone", seconds(5), || pilot.lease().is_none());
    assert_eq!(pilot.processes(), Vec::<(i32, String)>::new());
}

#[test]
fn the_example_of_a_job_goes_on_in_the_next_allocation_and_its_disruptions_count_for_nothing() {
    let namespace = Namespace::new("disruption");
    let mut first = Pilot::local(Options::new("disruption"), 600);
    let example = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/examples/job-disruption.yaml");
    let agent = "kubernetes.io/role: agent";
    let text = read(&example);
    assert!(text.contains(agent) && text.contains("args: [\"3\"]"), "{text}");
    // On these pilots alone, and long enough to be there at the end of the first.
    let text = text.replace(agent, &format!("{agent}\n        jiriaf.site: {}", first.site));
    namespace.apply(&text.replace("args: [\"3\"]", "args: [\"10\"]"));
    wait_until("two of its three pods run", seconds(30), || {
        on_node(&namespace, &first, "Running").len() == 2
    });
    first.signal(Signal::SIGTERM);
    assert_eq!(first.wait_exit(seconds(40)), Some(0), "{}", first.output());
    let disrupted = on_node(&namespace, &first, "Failed");
    assert_eq!(disrupted.len(), 2, "{disrupted:#?}");
    for pod in &disrupted {
        assert_eq!(condition(pod, "DisruptionTarget")["status"], "True", "{pod:#}");
    }

    let site = Some(first.site.clone());
    let second = Pilot::local(Options { site, ..Options::new("disruption") }, 600);
    let jobs = api::grouped("batch/v1", &namespace.name, "jobs");
    // After an ignored failure the Job controller waits as after any other: 10 s at first.
    let done = wait_for("the Job is complete", seconds(120), || {
        let job = jobs.get("work").unwrap();
        assert_eq!(condition(&job, "Failed"), Value::Null, "{:#}", job["status"]);
        (condition(&job, "Complete")["status"] == "True").then_some(job)
    });
    assert_eq!(done["status"]["succeeded"], 3, "{:#}", done["status"]);
    // Failures that count against backoffLimit are counted here.
    assert_eq!(done["status"]["failed"], Value::Null, "{:#}", done["status"]);
    assert_eq!(on_node(&namespace, &second, "Succeeded").len(), 3);
}

#[test]
fn a_job_that_loses_the_api_server_before_its_end_still_ends_in_time_and_says_what_was_not_reported() {
    let namespace = Namespace::new("cut");
    let proxy = ApiProxy::start();
    let options = Options { server: Some(proxy.url()), ..Options::new("cut").minutes(2) };
    let mut pilot = Pilot::sbatch(options);
    let end = pilot.end_time();
    namespace.script_on(&pilot, "p", UNTIL_TERM);
    namespace.wait_phase("p", "Running", seconds(30));

    wait_until("the last 32 s", seconds(120), || Timestamp::now().as_second() >= end.as_second() - 32);
    proxy.cut();
    pilot.wait_job_over(seconds(40));
    assert!(Timestamp::now() <= end, "the job was over after its limit");
    assert_eq!(pilot.processes(), Vec::<(i32, String)>::new());
    let row = pilot.row("p");
    assert!(row.contains("  Failed (Terminated) NOT REPORTED  ") && row.contains("  exit 0  "), "{row}");
    let kept = pilot.kept_outcome("p");
    assert_eq!((&kept["reason"], &kept["reported"]), (&json!("Terminated"), &json!(false)), "{kept:#}");
    let state = pilot.job_state();
    assert_eq!(state.field("ExitCode"), "1:0", "{}", pilot.output());
}

#[test]
fn alivetime_and_drain_follow_a_time_limit_that_is_raised_and_lowered() {
    let namespace = Namespace::new("limit");
    let mut pilot = Pilot::sbatch(Options::new("limit").minutes(5));
    let first = pilot.alivetime().unwrap();
    assert!((180..300).contains(&first), "{first}");
    namespace.script_on(&pilot, "p", UNTIL_TERM);
    namespace.wait_phase("p", "Running", seconds(30));
    pilot.update("TimeLimit=60");
    // Asked every two minutes, with jitter.
    wait_until("alivetime rises", seconds(150), || pilot.alivetime().is_some_and(|now| now > 2400));

    // In a minute or two the job is over. Slurm's warning signal makes the pilot ask at once.
    let left = pilot.end_time().duration_since(Timestamp::now()).as_secs();
    pilot.update(&format!("TimeLimit={}", (3600 - left) / 60 + 2));
    pilot.warn();
    let end = pilot.end_time().as_second();
    // 30 s before the end, whichever end there is; squeue answers in whole seconds.
    wait_until("the drain comes near", seconds(15), || (end - 32..=end - 30).contains(&drain_time(&pilot)));
    wait_until("alivetime falls", seconds(15), || pilot.alivetime().is_some_and(|now| now < 120));
    let drain = drain_time(&pilot);
    let pod = namespace.wait_phase("p", "Failed", seconds(130));
    assert_eq!(pod["status"]["reason"], "Terminated", "{:#}", pod["status"]);
    let ended = &pod["status"]["containerStatuses"][0]["state"]["terminated"]["finishedAt"];
    let ended = ended.as_str().unwrap().parse::<Timestamp>().unwrap().as_second();
    assert!((drain..drain + 10).contains(&ended), "the pod ended at {ended}, the drain was at {drain}");
    let state = pilot.wait_job_over(seconds(30));
    assert_eq!((state.state(), state.field("ExitCode")), ("COMPLETED", "0:0"), "{}", pilot.output());
}

#[test]
fn a_job_whose_pilot_is_told_no_limit_drains_by_the_limits_own_sigterm_and_is_timeout() {
    use std::os::unix::fs::PermissionsExt as _;
    let namespace = Namespace::new("blind");
    let directory = shared_directory();
    let squeue = directory.path().join("squeue");
    std::fs::write(&squeue, "#!/bin/sh\necho 'no slurmctld today' >&2\nexit 1\n").unwrap();
    std::fs::set_permissions(&squeue, std::fs::Permissions::from_mode(0o755)).unwrap();
    let path = format!("{}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", directory.path().display());
    // The warning signal, which would tell of an end too, goes to nobody: it is for steps, and there are none.
    let options = Options::new("blind").minutes(1).env("PATH", &path).arg("--signal=USR1@10");
    let mut pilot = Pilot::sbatch(options);
    // All that it knows of is its credential's end, a day away.
    let alivetime = pilot.alivetime();
    assert!(alivetime.is_some_and(|seconds| seconds > 3600), "{alivetime:?}: {}", pilot.output());
    assert!(pilot.output().contains("no slurmctld today"), "{}", pilot.output());
    // It takes no notice of SIGTERM: what ends it is the pilot, in the middle of the kill wait.
    namespace.config_map("p", &[("run.sh", "trap '' TERM\nwhile :; do sleep 0.2; done\n")]);
    let mut spec = pod_spec("Never", &[container("c1", "p")]);
    spec["terminationGracePeriodSeconds"] = json!(600);
    namespace.pod_on(&pilot, "p", spec);
    namespace.wait_phase("p", "Running", seconds(30));
    let end = pilot.end_time().as_second();

    // Slurm looks at its limits once in half a minute.
    let pod = namespace.wait_phase("p", "Failed", seconds(150));
    assert!(Timestamp::now().as_second() >= end, "the pod ended before the limit: {}", pilot.output());
    assert_eq!(pod["status"]["reason"], "Terminated", "{:#}", pod["status"]);
    let state = pilot.wait_job_over(seconds(30));
    // By the pilot, not by Slurm's SIGKILL: its last line is there, and nothing is left behind.
    assert_eq!(state.state(), "TIMEOUT", "{}", pilot.output());
    assert!(pilot.row("p").contains("  exit 137  "), "{}", pilot.row("p"));
    assert!(pilot.output().contains("Node and Lease are removed"), "{}", pilot.output());
    assert_eq!(pilot.nodes(), Vec::<Value>::new());
    assert_eq!(pilot.processes(), Vec::<(i32, String)>::new());
}

#[test]
fn walltime_0_publishes_no_time_and_still_drains_before_slurms_limit() {
    let namespace = Namespace::new("zero");
    let mut pilot = Pilot::sbatch(Options::new("zero").minutes(2).env("JIRIAF_WALLTIME", "0"));
    let end = pilot.end_time();
    let labels = pilot.nodes()[0]["metadata"]["labels"].clone();
    for label in ["jiriaf.walltime", "jiriaf.alivetime"] {
        assert_eq!(labels[label], Value::Null, "{labels:#}");
    }
    namespace.script_on(&pilot, "p", UNTIL_TERM);
    namespace.wait_phase("p", "Running", seconds(30));
    wait_until("the drain ends the pod", seconds(130), || on_node(&namespace, &pilot, "Failed").len() == 1);
    assert!(Timestamp::now() < end, "the job's limit was there first");
    let state = pilot.wait_job_over(seconds(40));
    assert_eq!((state.state(), state.field("ExitCode")), ("COMPLETED", "0:0"), "{}", pilot.output());
    assert_eq!(pilot.nodes(), Vec::<Value>::new());
}

#[test]
fn a_stagger_moves_the_drain_and_what_is_told_of_it_and_a_crash_does_not() {
    let options = Options::new("stagger").arg("--stagger=10m").arg("--drain-before=60s");
    let pilot = Pilot::local(options, 1800);
    let moment = |name: &str| {
        let node = pilot.nodes()[0].clone();
        let text =
            node["metadata"]["annotations"][name].as_str().unwrap_or_else(|| panic!("{name}")).to_owned();
        text.parse::<Timestamp>().unwrap().as_second()
    };
    let (deadline, drain) = (moment("jiriaf.deadline"), drain_time(&pilot));
    assert!((60..660).contains(&(deadline - drain)), "{} s", deadline - drain);
    let said = pilot.output();
    let said = said.lines().find(|line| line.contains("--stagger")).expect("it says so");
    let (_, earlier) = said.split_once("seconds=").unwrap();
    // The annotations hold whole seconds.
    assert!(
        (deadline - drain - 60 - earlier.parse::<i64>().unwrap()).abs() <= 1,
        "{said}, {} s",
        deadline - drain
    );
    let left = drain - Timestamp::now().as_second();
    assert!(
        pilot.alivetime().is_some_and(|alivetime| alivetime <= left),
        "{left} s: {:?}",
        pilot.alivetime()
    );

    kill(Pid::from_raw(pilot.stages("pilot")[0]), Signal::SIGKILL).unwrap();
    wait_until("it has its Node again", seconds(30), || pilot.output().contains("adopted the Node"));
    assert_eq!((moment("jiriaf.deadline"), drain_time(&pilot)), (deadline, drain));
}

/// When the Node says that its pods will be ended, in seconds since 1970.
fn drain_time(pilot: &Pilot) -> i64 {
    let node = pilot.nodes()[0].clone();
    let moment = node["metadata"]["annotations"]["jiriaf.drain"].as_str().expect("a drain time");
    moment.parse::<Timestamp>().unwrap().as_second()
}

/// The pods that were bound to the pilot and are in this phase.
fn on_node(namespace: &Namespace, pilot: &Pilot, phase: &str) -> Vec<Value> {
    let mut pods = namespace.of("pods").list("");
    pods.retain(|pod| pod["spec"]["nodeName"] == pilot.node.as_str() && pod["status"]["phase"] == phase);
    pods
}
