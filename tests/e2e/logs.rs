//! `kubectl logs`, through the API server from the Node's own API.

use std::time::{Duration, UNIX_EPOCH};

use jiff::Timestamp;

use crate::harness::{
    Https, Kubectl, Namespace, Options, Pilot, bed, container, pod_spec, seconds, wait_until,
};

/// How long kubectl may take on a machine that is busy with other tests.
const SLOW: Duration = seconds(60);

/// `kubectl logs` with these arguments: what it shows.
#[track_caller]
fn logs(namespace: &Namespace, arguments: &[&str]) -> String {
    let mut command = bed().kubectl_within(&namespace.name, 60);
    let ended = Kubectl::run(command.arg("logs").args(arguments), SLOW);
    assert_eq!(ended.code, 0, "{arguments:?}: {}", ended.said());
    ended.text()
}

/// The same, for what is refused: in which words.
#[track_caller]
fn refusal(namespace: &Namespace, arguments: &[&str]) -> String {
    let mut command = bed().kubectl_within(&namespace.name, 60);
    let ended = Kubectl::run(command.arg("logs").args(arguments), SLOW);
    assert_ne!(ended.code, 0, "{arguments:?}: {}", ended.said());
    ended.stderr
}

/// A follower of a pod's log.
fn follow(namespace: &Namespace, pod: &str) -> Kubectl {
    Kubectl::start(bed().kubectl_within(&namespace.name, 120).args(["logs", "-f", pod]))
}

/// Shell that waits for a file of the test's.
fn until(file: &std::path::Path) -> String {
    format!("until [ -e {} ]; do sleep 0.05; done\n", file.display())
}

#[test]
fn a_follower_sees_a_line_at_once_and_ends_with_the_container() {
    let namespace = Namespace::new("follow");
    let pilot = Pilot::local(Options::new("follow"), 600);
    let (go, end) = (pilot.home.join("go"), pilot.home.join("end"));
    let lines = "for n in {1..40}; do echo $EPOCHREALTIME; sleep 0.05; done\n";
    let script = format!("echo ready\n{}{lines}echo all\n{}echo bye\n", until(&go), until(&end));
    namespace.script_on(&pilot, "p", &script);
    namespace.wait_phase("p", "Running", seconds(30));
    let mut follower = follow(&namespace, "p");
    follower.wait_text("ready\n", SLOW);
    std::fs::write(go, "").unwrap();
    follower.wait_text("all\n", SLOW);

    let mut delays: Vec<Duration> = Vec::new();
    for (at, line) in follower.lines() {
        let Some((whole, parts)) = line.split_once('.') else { continue };
        let written = Duration::new(whole.parse().unwrap(), parts.parse::<u32>().unwrap() * 1000);
        delays.push(at.duration_since(UNIX_EPOCH + written).unwrap_or_default());
    }
    assert_eq!(delays.len(), 40, "{}", follower.text());
    delays.sort();
    println!("from the script to the follower: median {:?}, most {:?}", delays[20], delays[39]);
    // 50 ms on a machine with nothing else to do; a second, where seven other tests run.
    assert!(delays[20] < seconds(1), "{delays:?}");

    std::fs::write(end, "").unwrap();
    let ended = follower.wait_end(SLOW);
    assert_eq!(ended.code, 0, "{}", ended.said());
    assert!(ended.text().ends_with("all\nbye\n"), "{}", ended.text());
}

#[test]
fn a_part_of_a_log_is_chosen_by_lines_time_and_bytes() {
    let namespace = Namespace::new("parts");
    let pilot = Pilot::local(Options::new("parts"), 600);
    let go = pilot.home.join("go");
    let script =
        format!("echo one; echo two >&2; sleep 0.1; echo three\n{}echo four; printf five", until(&go));
    namespace.script_on(&pilot, "p", &script);
    wait_until("three lines", SLOW, || logs(&namespace, &["p"]) == "one\ntwo\nthree\n");
    // A time of whole seconds is kubectl's only one.
    let three = Timestamp::now();
    wait_until("a later second", seconds(5), || Timestamp::now().as_second() > three.as_second() + 1);
    std::fs::write(go, "").unwrap();
    namespace.wait_phase("p", "Succeeded", seconds(30));

    // The last line is told as it was written: without an end.
    assert_eq!(logs(&namespace, &["p"]), "one\ntwo\nthree\nfour\nfive");
    assert_eq!(logs(&namespace, &["p", "--tail=2"]), "four\nfive");
    assert_eq!(logs(&namespace, &["p", "--tail=0"]), "");
    assert_eq!(logs(&namespace, &["p", "--tail=100"]), "one\ntwo\nthree\nfour\nfive");
    assert_eq!(logs(&namespace, &["p", "--limit-bytes=6"]), "one\ntw");
    assert_eq!(logs(&namespace, &["p", "--since=1h"]), "one\ntwo\nthree\nfour\nfive");
    let between = Timestamp::from_second(three.as_second() + 1).unwrap();
    assert_eq!(logs(&namespace, &["p", &format!("--since-time={between}")]), "four\nfive");
    assert_eq!(logs(&namespace, &["p", &format!("--since-time={between}"), "--tail=1"]), "five");
    let stamped = logs(&namespace, &["p", "--timestamps"]);
    let mut stamps = Vec::new();
    for (line, text) in stamped.lines().zip(["one", "two", "three", "four", "five"]) {
        let (stamp, rest) = line.split_once(' ').unwrap();
        assert_eq!(rest, text, "{stamped}");
        stamps.push(stamp.parse::<Timestamp>().unwrap());
    }
    assert!(
        stamps.len() == 5 && stamps.is_sorted() && stamps[2] <= three && stamps[3] >= between,
        "{stamped}"
    );
    // Nothing is as young as that, once two seconds are over.
    wait_until("it is all old", seconds(10), || logs(&namespace, &["p", "--since=1s"]).is_empty());
}

#[test]
fn each_container_has_a_log_and_what_has_none_is_refused_in_a_kubelets_words() {
    let namespace = Namespace::new("containers");
    let pilot = Pilot::local(Options::new("containers"), 600);
    let scripts = [("one", "echo from one\n"), ("two", "echo from two\n")];
    for (name, script) in scripts {
        namespace.config_map(name, &[("run.sh", script)]);
    }
    let both: Vec<_> = scripts.iter().map(|(name, _)| container(name, name)).collect();
    namespace.pod_on(&pilot, "p", pod_spec("Never", &both));
    // A volume that is not there keeps this one from starting.
    namespace.pod_on(&pilot, "waits", pod_spec("Never", &[container("c1", "missing")]));
    namespace.wait_phase("p", "Succeeded", seconds(30));

    assert_eq!(logs(&namespace, &["p"]), "from one\n", "the first is the default");
    assert_eq!(logs(&namespace, &["p", "-c", "two"]), "from two\n");
    // kubectl asks for both at once, and shows them as they come.
    let all = logs(&namespace, &["p", "--all-containers", "--prefix"]);
    let mut lines: Vec<&str> = all.lines().collect();
    lines.sort_unstable();
    assert_eq!(lines, ["[pod/p/one] from one", "[pod/p/two] from two"]);
    let unknown = refusal(&namespace, &["p", "-c", "three"]);
    assert!(unknown.contains("container three is not valid for pod p"), "{unknown}");
    let previous = refusal(&namespace, &["p", "-c", "one", "--previous"]);
    assert!(previous.contains(r#"previous terminated container "one" in pod "p" not found"#), "{previous}");
    wait_until("it waits for its volume", seconds(30), || {
        let mut command = bed().kubectl_within(&namespace.name, 60);
        let ended = Kubectl::run(command.args(["logs", "waits"]), SLOW);
        ended.stderr.contains(r#"container "c1" in pod "waits" is waiting to start: ContainerCreating"#)
    });
}

#[test]
fn the_log_of_the_run_before_is_there_while_the_next_one_runs() {
    let namespace = Namespace::new("previous");
    let pilot = Pilot::local(Options::new("previous"), 600);
    // The first run crashes, the second stays.
    let mark = pilot.home.join("ran");
    let mark = mark.display();
    let script = format!("if [ -e {mark} ]; then echo second; sleep 3600; fi\n>{mark}\necho first\nexit 3\n");
    namespace.config_map("p", &[("run.sh", &script)]);
    namespace.pod_on(&pilot, "p", pod_spec("Always", &[container("c1", "p")]));
    wait_until("the second run", SLOW, || {
        let pod = namespace.pod("p").unwrap();
        let status = &pod["status"]["containerStatuses"][0];
        status["restartCount"] == 1 && status["state"]["running"].is_object()
    });
    assert_eq!(logs(&namespace, &["p", "--previous"]), "first\n");
    wait_until("the second run's line", SLOW, || logs(&namespace, &["p"]) == "second\n");
}

#[test]
fn a_follower_loses_nothing_in_a_rotation_and_all_that_is_kept_can_be_read() {
    let namespace = Namespace::new("rotation");
    let pilot = Pilot::local(Options::new("rotation"), 600);
    let go = pilot.home.join("go");
    let (count, filler) = (190_000, "x".repeat(80));
    // 10 MiB is a file's end, five are kept: with its time stamps this is 27 MB.
    let script = format!("echo ready\n{}seq -f '%010.0f {filler}' 1 {count}\n", until(&go));
    namespace.script_on(&pilot, "p", &script);
    namespace.wait_phase("p", "Running", seconds(30));
    let mut follower = follow(&namespace, "p");
    follower.wait_text("ready\n", SLOW);
    std::fs::write(go, "").unwrap();
    let ended = follower.wait_end(seconds(120));
    namespace.wait_phase("p", "Succeeded", seconds(30));

    let kept = std::fs::read_dir(pilot.pod_directory("p").join("containers/c1/logs")).unwrap().count();
    assert!((3..=5).contains(&kept), "{kept} files");
    assert_eq!(ended.code, 0, "{}", ended.stderr);
    for (who, shown) in [("a follower", ended.text()), ("a reader", logs(&namespace, &["p"]))] {
        let mut lines = shown.lines();
        assert_eq!(lines.next(), Some("ready"), "{who}");
        for n in 1..=count {
            let line = lines.next().unwrap_or_else(|| panic!("{who} has no line {n}"));
            assert!(line.len() == 91 && line[..10].parse() == Ok(n), "{who} has {line:?} for line {n}");
        }
        assert_eq!(lines.next(), None, "{who}");
    }
    assert_eq!(logs(&namespace, &["p", "--tail=1"]), format!("{count:010} {filler}\n"));
}

#[test]
fn the_summary_tells_how_much_log_each_container_has() {
    let namespace = Namespace::new("log-sizes");
    let pilot = Pilot::local(Options::new("log-sizes"), 600);
    // More than one file, and next to nothing.
    let much =
        "yes 'a line of some length, of which there are many' | head -n 200000\necho all\nexec sleep 600\n";
    namespace.config_map("much", &[("run.sh", much)]);
    namespace.config_map("little", &[("run.sh", "echo all\nexec sleep 600\n")]);
    let containers = [container("c1", "much"), container("c2", "little")];
    namespace.pod_on(&pilot, "p", pod_spec("Never", &containers));
    namespace.wait_phase("p", "Running", seconds(30));
    for name in ["c1", "c2"] {
        wait_until("all is in the log", SLOW, || {
            logs(&namespace, &["p", "-c", name, "--tail=1"]).trim_end() == "all"
        });
    }
    let kept = |name: &str| -> u64 {
        let directory = pilot.pod_directory("p").join("containers").join(name).join("logs");
        std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().metadata().unwrap().len()).sum()
    };
    assert!(kept("c1") > (10 << 20), "{} bytes in more than one file", kept("c1"));
    let admin = Https::node(&pilot).as_admin();
    let summary: serde_json::Value = serde_json::from_str(&admin.get("/stats/summary").body).unwrap();
    let told = summary["pods"][0]["containers"].as_array().unwrap();
    for name in ["c1", "c2"] {
        let one = told.iter().find(|one| one["name"] == name).unwrap();
        assert_eq!(one["logs"]["usedBytes"], kept(name), "{name}: {summary:#}");
    }
}
