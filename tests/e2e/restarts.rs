//! Containers that start again, and those that cannot start.

use crate::harness::{Namespace, Options, Pilot, condition, container, pod_spec, read, seconds, wait_for};

#[test]
fn a_script_that_fails_is_restarted_with_kubelets_back_off() {
    let namespace = Namespace::new("backoff");
    let pilot = Pilot::local(Options::new("backoff"), 600);
    namespace.config_map("p", &[("run.sh", "echo run >>$JIRIAF_POD_DIR/runs; echo said; exit 3\n")]);
    namespace.pod_on(&pilot, "p", pod_spec("Always", &[container("c1", "p")]));
    let pod = wait_for("the back-off after two restarts", seconds(60), || {
        let pod = namespace.pod("p")?;
        let state = &pod["status"]["containerStatuses"][0];
        (state["restartCount"].as_u64()? >= 2 && state["state"]["waiting"].is_object()).then_some(pod)
    });
    let state = &pod["status"]["containerStatuses"][0];
    assert_eq!(state["state"]["waiting"]["reason"], "CrashLoopBackOff", "{state:#}");
    let message = state["state"]["waiting"]["message"].as_str().unwrap_or_default();
    assert!(
        message.starts_with("back-off ") && message.contains(" restarting failed container=c1 pod=p_"),
        "{message}"
    );
    assert_eq!(state["lastState"]["terminated"]["exitCode"], 3, "{state:#}");
    assert_eq!(pod["status"]["phase"], "Running");
    assert_eq!(condition(&pod, "Ready")["status"], "False", "{:#}", pod["status"]);
    // One run and one log for each start.
    let runs = read(&pilot.pod_directory("p").join("runs")).lines().count();
    assert_eq!(Some(runs as u64), state["restartCount"].as_u64().map(|count| count + 1));
    let logs = pilot.pod_directory("p").join("containers/c1/logs");
    assert!(read(&logs.join("1.log")).contains("said"));
    assert!(
        namespace.events("p").iter().any(|(reason, _)| reason == "BackOff"),
        "{:?}",
        namespace.events("p")
    );
    namespace.of("pods").delete("p", None);
    namespace.wait_gone("p", seconds(20));
}

#[test]
fn on_failure_restarts_a_failure_and_leaves_a_success() {
    let namespace = Namespace::new("onfailure");
    let pilot = Pilot::local(Options::new("onfailure"), 600);
    let second = "[ -e $JIRIAF_POD_DIR/once ] && exit 0\ntouch $JIRIAF_POD_DIR/once\nexit 9\n";
    namespace.config_map("p", &[("run.sh", second)]);
    namespace.pod_on(&pilot, "p", pod_spec("OnFailure", &[container("c1", "p")]));
    let pod = namespace.wait_phase("p", "Succeeded", seconds(60));
    let state = &pod["status"]["containerStatuses"][0];
    assert_eq!(state["restartCount"], 1, "{state:#}");
    assert_eq!(state["state"]["terminated"]["exitCode"], 0, "{state:#}");
    assert_eq!(state["lastState"]["terminated"]["exitCode"], 9, "{state:#}");
}

#[test]
fn a_program_that_is_not_there_ends_its_container_with_127_and_says_so() {
    let namespace = Namespace::new("missing");
    let pilot = Pilot::local(Options::new("missing"), 600);
    namespace.config_map("p", &[("run.sh", "exit 0\n")]);
    let mut missing = container("c1", "p");
    missing["command"] = serde_json::json!(["no-such-program"]);
    namespace.pod_on(&pilot, "p", pod_spec("Never", &[missing]));
    let pod = namespace.wait_phase("p", "Failed", seconds(30));
    let ended = &pod["status"]["containerStatuses"][0]["state"]["terminated"];
    assert_eq!(ended["exitCode"], 127, "{:#}", pod["status"]);
    assert_eq!(ended["reason"], "StartError", "{:#}", pod["status"]);
    let message = ended["message"].as_str().unwrap_or_default();
    assert!(message.contains("no-such-program") && message.contains("PATH"), "{message}");
}

#[test]
fn a_script_without_an_interpreters_line_and_a_command_says_what_is_missing() {
    let namespace = Namespace::new("no-line");
    let pilot = Pilot::local(Options::new("no-line"), 600);
    namespace.config_map("p", &[("run.sh", "exit 0\n")]);
    let mut bare = container("c1", "p");
    bare.as_object_mut().unwrap().remove("command");
    namespace.pod_on(&pilot, "p", pod_spec("Never", &[bare]));
    let pod = namespace.wait_phase("p", "Failed", seconds(30));
    let ended = &pod["status"]["containerStatuses"][0]["state"]["terminated"];
    assert!(ended["message"].as_str().unwrap_or_default().contains("#!"), "{:#}", pod["status"]);
}

#[test]
fn an_image_that_names_no_volume_mount_waits_and_says_what_would_be_accepted() {
    let namespace = Namespace::new("image");
    let pilot = Pilot::local(Options::new("image"), 600);
    namespace.config_map("p", &[("run.sh", "exit 0\n")]);
    let mut wrong = container("c1", "p");
    wrong["image"] = "docker.io/library/busybox".into();
    namespace.pod_on(&pilot, "p", pod_spec("Never", &[wrong]));
    let waiting = wait_for("the container waits for its image", seconds(30), || {
        let pod = namespace.pod("p")?;
        let waiting = pod["status"]["containerStatuses"][0]["state"]["waiting"].clone();
        (waiting["reason"] == "ErrImageNeverPull").then_some(waiting)
    });
    assert!(waiting["message"].as_str().unwrap_or_default().contains("volumeMount"), "{waiting:#}");
    // It waits without asking for anything: the time that passes is what is looked at.
    let [process] = pilot.stages("pilot")[..] else { panic!("one pilot was expected") };
    let ticks = || -> u64 {
        let stat = read(format!("/proc/{process}/stat").as_ref());
        stat.rsplit(") ").next().unwrap().split(' ').skip(11).take(2).map(|n| n.parse::<u64>().unwrap()).sum()
    };
    let before = ticks();
    std::thread::sleep(seconds(2));
    assert!(ticks() - before < 20, "a fifth of a second in two: {}", pilot.output());
}
