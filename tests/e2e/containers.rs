//! Init containers, sidecars, ephemeral containers: in which order they start and end, and what the status says of them.

use serde_json::{Value, json};

use crate::harness::{
    Namespace, Options, Pilot, bed, condition, container, pod_spec, read, run, seconds, wait_for, wait_until,
};

/// A pod whose containers all run scripts of the ConfigMap `work`, each that of its own name.
fn spec(policy: &str, init: &[Value], main: &[Value]) -> Value {
    let mut spec = pod_spec(policy, &[init, main].concat());
    spec["initContainers"] = json!(init);
    spec["containers"] = json!(main);
    spec
}

fn scripted(name: &str) -> Value {
    let mut container = container(name, "work");
    container["image"] = json!(format!("work/{name}"));
    container
}

fn sidecar(name: &str) -> Value {
    let mut container = scripted(name);
    container["restartPolicy"] = json!("Always");
    container
}

/// A pilot whose crash loops are short.
fn pilot(label: &'static str) -> Pilot {
    let mut options = Options::new(label);
    options.arguments.push("--crash-loop-back-off-max=1s".to_owned());
    Pilot::local(options, 600)
}

/// Notes what happens in a file beside the pod's directory, which goes with it.
fn note(pilot: &Pilot, what: &str) -> String {
    format!("echo {what} >>{}\n", pilot.home.join("order").display())
}

fn order(pilot: &Pilot) -> String {
    let file = pilot.home.join("order");
    if file.exists() { read(&file) } else { String::new() }
}

fn statuses<'a>(pod: &'a Value, list: &str) -> &'a Vec<Value> {
    pod["status"][list].as_array().unwrap_or_else(|| panic!("no {list}: {:#}", pod["status"]))
}

#[test]
fn init_containers_run_one_after_another_and_before_all_else() {
    let namespace = Namespace::new("init");
    let pilot = pilot("init");
    let once = pilot.home.join("once");
    // The second one fails the first time.
    let flaky = format!(
        "{}[ -e {once} ] && exit 0\ntouch {once}\nexit 4\n",
        note(&pilot, "second"),
        once = once.display()
    );
    namespace.config_map(
        "work",
        &[
            ("first", &note(&pilot, "first")),
            ("second", &flaky),
            ("main", &note(&pilot, "main")),
            ("other", &note(&pilot, "main")),
        ],
    );
    let init = [scripted("first"), scripted("second")];
    namespace.pod_on(&pilot, "p", spec("OnFailure", &init, &[scripted("main"), scripted("other")]));
    let pod = namespace.wait_phase("p", "Succeeded", seconds(30));
    assert_eq!(order(&pilot), "first\nsecond\nsecond\nmain\nmain\n");
    let init = statuses(&pod, "initContainerStatuses");
    let told: Vec<(&str, u64, bool, i64)> = init
        .iter()
        .map(|one| {
            let code = one["state"]["terminated"]["exitCode"].as_i64().unwrap_or(-1);
            let count = one["restartCount"].as_u64().unwrap();
            (one["name"].as_str().unwrap(), count, one["ready"].as_bool().unwrap(), code)
        })
        .collect();
    assert_eq!(told, [("first", 0, true, 0), ("second", 1, true, 0)]);
    assert_eq!(init[1]["lastState"]["terminated"]["exitCode"], 4, "{init:#?}");
    assert_eq!(condition(&pod, "Initialized")["reason"], "PodCompleted", "{:#}", pod["status"]);
}

#[test]
fn an_init_container_that_fails_for_good_fails_the_pod_and_the_rest_never_runs() {
    let namespace = Namespace::new("initfail");
    let pilot = pilot("initfail");
    let waits = format!("{}sleep 1000\n", note(&pilot, "side"));
    namespace.config_map("work", &[("side", &waits), ("bad", "exit 6\n"), ("main", &note(&pilot, "main"))]);
    let mut spec = spec("Never", &[sidecar("side"), scripted("bad")], &[scripted("main")]);
    spec["terminationGracePeriodSeconds"] = json!(1);
    namespace.pod_on(&pilot, "p", spec);
    let pod = namespace.wait_phase("p", "Failed", seconds(30));
    assert_eq!(order(&pilot), "side\n");
    assert_eq!(statuses(&pod, "initContainerStatuses")[1]["state"]["terminated"]["exitCode"], 6);
    // Nothing of it runs when it says so.
    let side = &statuses(&pod, "initContainerStatuses")[0];
    assert!(side["state"]["terminated"].is_object(), "{side:#}");
    let main = &statuses(&pod, "containerStatuses")[0];
    assert_eq!(main["state"]["waiting"]["reason"], "PodInitializing", "{main:#}");
}

#[test]
fn a_sidecar_starts_before_starts_again_and_ends_after_the_others() {
    let namespace = Namespace::new("sidecar");
    let pilot = pilot("sidecar");
    let until_term = |name: &str| {
        let term = note(&pilot, &format!("{name}-ends"));
        format!("trap '{}; exit 3' TERM\n{}sleep 1000 &\nwait\n", term.trim(), note(&pilot, name))
    };
    let again = pilot.home.join("again");
    let outer = format!(
        "[ -e {again} ] || {{ touch {again}; exit 1; }}\n{}",
        until_term("outer"),
        again = again.display()
    );
    // The main container waits until the outer sidecar has been started again.
    let main = format!(
        "until grep -q outer {order}; do sleep 0.05; done\n{}exit 5\n",
        note(&pilot, "main"),
        order = pilot.home.join("order").display()
    );
    namespace.config_map("work", &[("outer", &outer), ("inner", &until_term("inner")), ("main", &main)]);
    namespace.pod_on(&pilot, "p", spec("Never", &[sidecar("outer"), sidecar("inner")], &[scripted("main")]));
    let pod = namespace.wait_phase("p", "Failed", seconds(40));
    let lines = order(&pilot);
    assert!(lines.ends_with("main\ninner-ends\nouter-ends\n"), "{lines}");
    let init = statuses(&pod, "initContainerStatuses");
    assert_eq!(init[0]["restartCount"], 1, "{init:#?}");
    assert_eq!(statuses(&pod, "containerStatuses")[0]["state"]["terminated"]["exitCode"], 5);
    // What sidecars end with says nothing about the pod: a success is one.
    namespace.config_map("fine", &[("main", "exit 0\n")]);
    let mut fine = container("main", "fine");
    fine["image"] = json!("fine");
    namespace.pod_on(&pilot, "q", spec("Never", &[sidecar("inner")], &[fine]));
    namespace.wait_phase("q", "Succeeded", seconds(40));
}

#[test]
fn a_containers_own_restart_policy_and_rules_go_before_the_pods() {
    let namespace = Namespace::new("rules");
    let pilot = pilot("rules");
    let again = "[ -e once-$N ] && exit 0\ntouch once-$N\nexit $N\n";
    namespace.config_map("work", &[("run", again)]);
    let with = |name: &str, code: u32, policy: Value, rules: Value| {
        let mut container = scripted(name);
        container["image"] = json!("work");
        container["env"] = json!([{"name": "N", "value": code.to_string()}]);
        if !policy.is_null() {
            container["restartPolicy"] = policy;
        }
        if !rules.is_null() {
            container["restartPolicyRules"] = rules;
        }
        container
    };
    let on = |codes: &[u32]| json!([{"action": "Restart", "exitCodes": {"operator": "In", "values": codes}}]);
    let containers = [
        with("plain", 41, Value::Null, Value::Null),
        with("failure", 42, json!("OnFailure"), Value::Null),
        with("named", 43, json!("Never"), on(&[43])),
        with("other", 44, json!("Never"), on(&[43])),
    ];
    namespace.pod_on(&pilot, "p", pod_spec("Never", &containers));
    let pod = namespace.wait_phase("p", "Failed", seconds(40));
    let told: Vec<(&str, u64, i64)> = statuses(&pod, "containerStatuses")
        .iter()
        .map(|one| {
            let code = one["state"]["terminated"]["exitCode"].as_i64().unwrap_or(-1);
            (one["name"].as_str().unwrap(), one["restartCount"].as_u64().unwrap(), code)
        })
        .collect();
    assert_eq!(told, [("failure", 1, 0), ("named", 1, 0), ("other", 0, 44), ("plain", 0, 41)]);
}

#[test]
fn a_containers_last_word_is_its_file_or_the_end_of_its_log() {
    let namespace = Namespace::new("lastword");
    let pilot = pilot("lastword");
    namespace.config_map(
        "work",
        &[
            ("file", "echo -n DONE >$JIRIAF_TERMINATION_LOG\nexit 0\n"),
            ("log", "echo noise; echo why >&2; exit 2\n"),
            ("fine", "echo fine; exit 0\n"),
        ],
    );
    let fallback = |name: &str| {
        let mut container = scripted(name);
        container["terminationMessagePolicy"] = json!("FallbackToLogsOnError");
        container
    };
    namespace.pod_on(&pilot, "p", pod_spec("Never", &[scripted("file"), fallback("log"), fallback("fine")]));
    let pod = namespace.wait_phase("p", "Failed", seconds(30));
    let message = |name: &str| {
        let one = statuses(&pod, "containerStatuses").iter().find(|one| one["name"] == name).unwrap();
        one["state"]["terminated"]["message"].clone()
    };
    assert_eq!(message("file"), "DONE");
    assert_eq!(message("log"), "noise\nwhy\n");
    assert_eq!(message("fine"), Value::Null);
}

#[test]
fn a_pods_own_deadline_ends_it_and_may_be_lowered() {
    let namespace = Namespace::new("deadline");
    let pilot = pilot("deadline");
    namespace.config_map("work", &[("run", "sleep 1000\n")]);
    let with = |limit: u32| {
        let mut container = scripted("c1");
        container["image"] = json!("work");
        let mut spec = pod_spec("Always", &[container]);
        spec["activeDeadlineSeconds"] = json!(limit);
        spec["terminationGracePeriodSeconds"] = json!(1);
        spec
    };
    namespace.pod_on(&pilot, "short", with(2));
    namespace.pod_on(&pilot, "lowered", with(500));
    namespace.wait_phase("lowered", "Running", seconds(30));
    namespace.of("pods").merge("lowered", &json!({"spec": {"activeDeadlineSeconds": 3}}));
    for name in ["short", "lowered"] {
        let pod = namespace.wait_phase(name, "Failed", seconds(30));
        assert_eq!(pod["status"]["reason"], "DeadlineExceeded", "{:#}", pod["status"]);
        let said = pod["status"]["message"].as_str().unwrap();
        assert_eq!(said, "Pod was active on the node longer than the specified deadline");
        assert_eq!(pod["status"]["observedGeneration"], pod["metadata"]["generation"], "{:#}", pod["status"]);
        assert!(statuses(&pod, "containerStatuses")[0]["state"]["terminated"].is_object());
    }
    let told = |(reason, _): &(String, String)| reason == "DeadlineExceeded";
    wait_until("the event", seconds(10), || namespace.events("short").iter().any(told));
}

#[test]
fn a_post_start_hook_comes_before_running_and_one_that_fails_ends_the_container() {
    let namespace = Namespace::new("poststart");
    let pilot = pilot("poststart");
    namespace.config_map("work", &[("run", "sleep 1000\n")]);
    let with = |hook: &str| {
        let mut container = scripted("c1");
        container["image"] = json!("work");
        container["lifecycle"] = json!({"postStart": {"exec": {"command": ["sh", "-c", hook]}}});
        let mut spec = pod_spec("Never", &[container]);
        spec["terminationGracePeriodSeconds"] = json!(1);
        spec
    };
    let gate = pilot.home.join("gate");
    let waits = format!("touch here; until [ -e {} ]; do sleep 0.05; done", gate.display());
    namespace.pod_on(&pilot, "good", with(&waits));
    let here = pilot.pod_directory("good").join("containers/c1/here");
    wait_until("the hook runs", seconds(20), || here.exists());
    assert_eq!(namespace.pod("good").unwrap()["status"]["phase"], "Pending");
    std::fs::write(&gate, "").unwrap();
    namespace.wait_phase("good", "Running", seconds(20));
    namespace.pod_on(&pilot, "bad", with("exit 3"));
    namespace.wait_phase("bad", "Failed", seconds(20));
    let told =
        |(reason, text): &(String, String)| reason == "FailedPostStartHook" && text.contains("exit code 3");
    wait_until("the event", seconds(10), || namespace.events("bad").iter().any(told));
}

#[test]
fn a_changed_image_starts_the_container_again_with_it() {
    let namespace = Namespace::new("image");
    let pilot = pilot("image");
    let say = |what: &str| format!("{}sleep 1000\n", note(&pilot, what));
    namespace.config_map("work", &[("old", &say("old")), ("new", &say("new"))]);
    let mut spec = pod_spec("Never", &[scripted("old")]);
    spec["terminationGracePeriodSeconds"] = json!(1);
    namespace.pod_on(&pilot, "p", spec);
    wait_until("the old one runs", seconds(20), || order(&pilot) == "old\n");
    bed().kubectl(&["-n", &namespace.name, "set", "image", "pod/p", "old=work/new"]);
    wait_until("the new one runs", seconds(20), || order(&pilot) == "old\nnew\n");
    let pod = wait_for("its status", seconds(20), || {
        let pod = namespace.pod("p")?;
        (statuses(&pod, "containerStatuses")[0]["restartCount"] == 1).then_some(pod)
    });
    let one = &statuses(&pod, "containerStatuses")[0];
    assert_eq!((&one["image"], &pod["status"]["phase"]), (&json!("work/new"), &json!("Running")), "{one:#}");
    let told = |(_, text): &(String, String)| text == "Container old definition changed, will be restarted";
    wait_until("the event", seconds(10), || namespace.events("p").iter().any(told));
}

#[test]
fn an_ephemeral_container_joins_a_pod_that_runs_and_does_not_count() {
    let namespace = Namespace::new("debug");
    let pilot = pilot("debug");
    let gate = pilot.home.join("gate");
    let waits = format!("until [ -e {} ]; do sleep 0.05; done\n", gate.display());
    namespace.config_map("work", &[("run", &waits), ("look", "echo looked; exit 9\n")]);
    let mut main = scripted("c1");
    main["image"] = json!("work/run");
    namespace.pod_on(&pilot, "p", pod_spec("Never", &[main]));
    namespace.wait_phase("p", "Running", seconds(20));
    let added = json!([{"name": "debugger", "image": "work/look",
        "command": ["bash"], "targetContainerName": "c1",
        "volumeMounts": [{"name": "work", "mountPath": "job"}]}]);
    namespace.add_ephemeral("p", &added);
    let pod = wait_for("the debugger's end", seconds(20), || {
        let pod = namespace.pod("p")?;
        let one = pod["status"]["ephemeralContainerStatuses"].get(0)?.clone();
        one["state"]["terminated"].is_object().then_some(pod)
    });
    assert_eq!(statuses(&pod, "ephemeralContainerStatuses")[0]["state"]["terminated"]["exitCode"], 9);
    assert_eq!(pod["status"]["phase"], "Running", "{:#}", pod["status"]);
    let logs = run(&mut kubectl_logs(&namespace));
    assert_eq!(logs.text.trim(), "looked");
    std::fs::write(&gate, "").unwrap();
    namespace.wait_phase("p", "Succeeded", seconds(20));
}

fn kubectl_logs(namespace: &Namespace) -> std::process::Command {
    let mut command = bed().kubectl_within(&namespace.name, 30);
    command.args(["logs", "p", "-c", "debugger"]);
    command
}
