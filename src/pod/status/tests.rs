use k8s_openapi::api::core::v1::PodCondition;
use serde_json::{Value, from_value, json, to_value};

use super::*;

fn at(second: i64) -> Timestamp {
    Timestamp::from_millisecond(second * 1_000 + 250).unwrap()
}

/// A pod with containers `b` and `a` (in this order).
fn pod(policy: &str) -> Pod {
    from_value(json!({
        "metadata": {"name": "p", "namespace": "ns", "uid": "u", "generation": 3},
        "spec": {"restartPolicy": policy, "containers": [
            {"name": "b", "image": "wf"}, {"name": "a", "image": "prom"}]},
        "status": {"phase": "Pending", "qosClass": "BestEffort", "conditions": [
            {"type": "PodScheduled", "status": "True", "lastTransitionTime": "2020-01-01T00:00:00Z"},
            {"type": "example.org/gate", "status": "False", "reason": "Other"}]},
    }))
    .unwrap()
}

fn waiting(reason: &str) -> State {
    State::Waiting { reason: reason.to_owned(), message: String::new() }
}

fn running() -> State {
    State::Running { started_at: at(100), id: "id".to_owned() }
}

fn end(exit_code: i32) -> Terminated {
    Terminated {
        exit_code,
        signal: None,
        reason: None,
        message: String::new(),
        started_at: Some(at(100)),
        finished_at: at(200),
        id: "id".to_owned(),
    }
}

fn ended(exit_code: i32) -> State {
    State::Terminated(end(exit_code))
}

fn container(name: &str, state: State, last: Option<i32>) -> ContainerRuntime {
    ContainerRuntime {
        name: name.to_owned(),
        state,
        last: last.map(end),
        restart_count: u32::from(last.is_some()),
        image_id: "/s.sh".to_owned(),
        again: false,
        started: true,
        ready: true,
    }
}

fn both(b: State, a: State) -> Vec<ContainerRuntime> {
    vec![container("b", b, None), container("a", a, None)]
}

struct Case<'a> {
    pod: &'a Pod,
    previous: &'a PodStatus,
    containers: &'a [ContainerRuntime],
    ending: Option<Ending>,
    now: i64,
}

fn computed(case: &Case<'_>) -> PodStatus {
    status(&StatusInput {
        pod: case.pod,
        previous: case.previous,
        containers: case.containers,
        pod_ip: Some("10.0.0.1"),
        host_ip: Some("10.0.0.1"),
        start_time: at(50),
        directory_ready: true,
        ending: case.ending.as_ref(),
        now: at(case.now),
    })
}

fn simple(pod: &Pod, containers: &[ContainerRuntime], ending: Option<Ending>) -> PodStatus {
    computed(&Case { pod, previous: &PodStatus::default(), containers, ending, now: 300 })
}

fn get<'a>(status: &'a PodStatus, kind: &str) -> &'a PodCondition {
    status.conditions.iter().flatten().find(|condition| condition.type_ == kind).expect(kind)
}

#[test]
fn the_phase_follows_the_kubelets_rules() {
    let cases: Vec<(&str, ContainerRuntime, ContainerRuntime, &str)> = {
        let c = |state: State, last: Option<i32>| container("x", state, last);
        let create = || c(waiting("ContainerCreating"), None);
        let loops = |last: i32| c(waiting("CrashLoopBackOff"), Some(last));
        vec![
            ("Never", create(), create(), "Pending"),
            ("Never", create(), c(running(), None), "Pending"),
            ("Never", create(), c(ended(0), None), "Pending"),
            ("Never", c(running(), None), c(running(), None), "Running"),
            ("Never", c(running(), None), c(ended(7), None), "Running"),
            ("Never", c(ended(0), None), c(ended(0), None), "Succeeded"),
            ("Never", c(ended(0), None), c(ended(7), None), "Failed"),
            ("OnFailure", c(ended(0), None), c(ended(0), None), "Succeeded"),
            ("OnFailure", c(ended(0), None), c(ended(7), None), "Running"),
            ("OnFailure", c(ended(0), None), loops(7), "Running"),
            ("OnFailure", loops(7), loops(7), "Running"),
            ("OnFailure", c(running(), Some(7)), c(ended(0), None), "Running"),
            ("Always", c(ended(0), None), c(ended(0), None), "Running"),
            ("Always", loops(0), loops(0), "Running"),
            ("Always", loops(7), create(), "Pending"),
        ]
    };
    for (policy, mut b, mut a, wanted) in cases {
        "b".clone_into(&mut b.name);
        "a".clone_into(&mut a.name);
        let containers = [b, a];
        let got = simple(&pod(policy), &containers, None);
        assert_eq!(got.phase.as_deref(), Some(wanted), "{policy} {containers:?}");
    }
    assert_eq!(simple(&pod("Never"), &[], None).phase.as_deref(), Some("Pending"), "nothing known");
}

#[test]
fn restart_policies_and_rules() {
    for (policy, exit_code, wanted) in [
        ("Always", 0, true),
        ("Always", 1, true),
        ("OnFailure", 0, false),
        ("OnFailure", 1, true),
        ("Never", 0, false),
        ("Never", 1, false),
        ("", 1, true),
    ] {
        let spec = pod(policy).spec.unwrap();
        assert_eq!(should_restart(&spec, &spec.containers[0], exit_code), wanted, "{policy} {exit_code}");
    }
    let spec = pod("Never").spec.unwrap();
    for (own, exit_code, wanted) in [
        (json!({"name": "c", "restartPolicy": "Always"}), 0, true),
        (json!({"name": "c", "restartPolicy": "OnFailure"}), 0, false),
        (
            json!({"name": "c", "restartPolicy": "Never", "restartPolicyRules": [
                {"action": "Restart", "exitCodes": {"operator": "In", "values": [42]}}]}),
            42,
            true,
        ),
        (
            json!({"name": "c", "restartPolicy": "Never", "restartPolicyRules": [
                {"action": "Restart", "exitCodes": {"operator": "NotIn", "values": [42]}}]}),
            42,
            false,
        ),
    ] {
        let container = from_value(own.clone()).unwrap();
        assert_eq!(should_restart(&spec, &container, exit_code), wanted, "{own} {exit_code}");
    }
}

#[test]
fn container_statuses_are_sorted_and_true() {
    let mut killed = end(137);
    killed.signal = Some(9);
    killed.reason = Some("OOMKilled".to_owned());
    killed.message = format!("x{}", "é".repeat(10_000));
    let mut a = container("a", State::Terminated(killed), Some(7));
    a.restart_count = 4;
    let got = simple(&pod("Never"), &[container("b", running(), None), a], None);
    let statuses = to_value(got.container_statuses.unwrap()).unwrap();
    assert_eq!(
        statuses[1],
        json!({
            "name": "b", "image": "wf", "imageID": "/s.sh", "containerID": "id", "ready": true,
            "started": true, "restartCount": 0, "lastState": {}, "state": {"running": {"startedAt": "1970-01-01T00:01:40Z"}},
        })
    );
    let message = statuses[0]["state"]["terminated"]["message"].as_str().unwrap();
    assert_eq!(message.len(), 6 * 1024 - 1, "12 KiB for two containers, no half characters");
    assert_eq!(statuses[0]["state"]["terminated"]["reason"], "OOMKilled");
    assert_eq!(statuses[0]["state"]["terminated"]["signal"], 9);
    assert_eq!(statuses[0]["lastState"]["terminated"]["exitCode"], 7);
    assert_eq!((&statuses[0]["restartCount"], &statuses[0]["ready"]), (&json!(4), &json!(false)));

    let got = simple(&pod("Never"), &both(ended(0), ended(3)), None);
    let reason = |index: usize| {
        let statuses = got.container_statuses.as_ref().unwrap();
        let end = statuses[index].state.as_ref().unwrap().terminated.as_ref().unwrap();
        (end.exit_code, end.reason.clone().unwrap())
    };
    assert_eq!([reason(0), reason(1)], [(3, "Error".to_owned()), (0, "Completed".to_owned())]);
}

#[test]
fn conditions_say_what_a_kubelet_says() {
    let row = |status: &PodStatus, kind: &str| {
        let found = get(status, kind);
        (
            found.status.clone(),
            found.reason.clone().unwrap_or_default(),
            found.message.clone().unwrap_or_default(),
        )
    };
    let text = |status: &str, reason: &str, message: &str| {
        (status.to_owned(), reason.to_owned(), message.to_owned())
    };
    let unready = "containers with unready status: [b a]";
    for (b, a, can_start, initialized, ready) in [
        (
            waiting("ContainerCreating"),
            waiting("ContainerCreating"),
            "True",
            "",
            text("False", "ContainersNotReady", unready),
        ),
        (
            running(),
            waiting("ContainerCreating"),
            "True",
            "",
            text("False", "ContainersNotReady", "containers with unready status: [a]"),
        ),
        (running(), running(), "True", "", text("True", "", "")),
        (ended(0), ended(0), "False", "PodCompleted", text("False", "PodCompleted", "")),
        (ended(0), ended(1), "False", "", text("False", "PodFailed", "")),
    ] {
        let got = simple(&pod("Never"), &both(b, a), None);
        assert_eq!(row(&got, "PodReadyToStartContainers"), text(can_start, "", ""));
        assert_eq!(row(&got, "Initialized"), text("True", initialized, ""));
        assert_eq!(row(&got, "Ready"), ready);
        assert_eq!(row(&got, "ContainersReady"), ready);
        assert_eq!(row(&got, "PodScheduled"), text("True", "", ""));
        assert_eq!(get(&got, "Ready").observed_generation, Some(3));
        assert_eq!(got.observed_generation, Some(3));
        let order: Vec<_> =
            got.conditions.iter().flatten().map(|condition| condition.type_.as_str()).collect();
        assert_eq!(
            order,
            [
                "example.org/gate",
                "PodReadyToStartContainers",
                "Initialized",
                "Ready",
                "ContainersReady",
                "PodScheduled"
            ]
        );
    }
}

#[test]
fn readiness_gates_hold_ready_back() {
    let mut pod = pod("Always");
    for (gate, wanted) in [
        ("none", "corresponding condition of pod readiness gate \"none\" does not exist."),
        (
            "example.org/gate",
            "the status of pod readiness gate \"example.org/gate\" is not \"True\", but False",
        ),
    ] {
        pod.spec.as_mut().unwrap().readiness_gates =
            Some(from_value(json!([{"conditionType": gate}])).unwrap());
        let got = simple(&pod, &both(running(), running()), None);
        assert_eq!(get(&got, "ContainersReady").status, "True");
        let ready = get(&got, "Ready");
        assert_eq!((ready.status.as_str(), ready.message.as_deref()), ("False", Some(wanted)));
        assert_eq!(ready.reason.as_deref(), Some("ReadinessGatesNotReady"));
    }
}

#[test]
fn transition_times_move_only_with_the_status() {
    let pod = pod("Never");
    let first = simple(&pod, &both(waiting("x"), waiting("x")), None);
    let time = |status: &PodStatus, kind: &str| get(status, kind).last_transition_time.clone().unwrap().0;
    let scheduled: Timestamp = "2020-01-01T00:00:00Z".parse().unwrap();
    assert_eq!(time(&first, "PodScheduled"), scheduled, "the scheduler's own");
    assert_eq!(time(&first, "Ready"), Timestamp::from_second(300).unwrap(), "whole seconds");

    let half = both(running(), waiting("x"));
    let second = computed(&Case { pod: &pod, previous: &first, containers: &half, ending: None, now: 400 });
    assert_eq!(time(&second, "Ready"), time(&first, "Ready"), "the message changed, not the status");
    let full = both(running(), running());
    let third = computed(&Case { pod: &pod, previous: &second, containers: &full, ending: None, now: 500 });
    assert_eq!(time(&third, "Ready"), Timestamp::from_second(500).unwrap());
    assert_eq!(time(&third, "Initialized"), time(&first, "Initialized"));
    assert_eq!(third.start_time, first.start_time);
}

#[test]
fn addresses_and_times_are_there_and_others_fields_stay() {
    let got = to_value(simple(&pod("Never"), &both(running(), running()), None)).unwrap();
    assert_eq!(got["hostIP"], "10.0.0.1");
    assert_eq!(got["hostIPs"], json!([{"ip": "10.0.0.1"}]));
    assert_eq!(got["podIPs"], json!([{"ip": "10.0.0.1"}]));
    assert_eq!(got["podIP"], "10.0.0.1");
    assert_eq!(got["startTime"], "1970-01-01T00:00:50Z");
    assert_eq!(got["qosClass"], "BestEffort");
}

#[test]
fn a_rejected_pod_failed_before_it_began() {
    let reject = |reason: &str, message: &str| Ending::Rejected {
        reason: reason.to_owned(),
        message: message.to_owned(),
    };
    let got = simple(&pod("Always"), &[], Some(reject("OutOfcpu", "Node didn't have enough resource: cpu")));
    assert_eq!(got.phase.as_deref(), Some("Failed"));
    assert_eq!(got.reason.as_deref(), Some("OutOfcpu"));
    assert_eq!(got.message.as_deref(), Some("Pod was rejected: Node didn't have enough resource: cpu"));
    assert_eq!((got.container_statuses.as_ref(), got.pod_ip.as_ref()), (None, None));
    assert!(got.conditions.iter().flatten().all(|condition| condition.type_ != "DisruptionTarget"));

    let got = simple(&pod("Always"), &[], Some(reject(NODE_SHUTDOWN, NODE_SHUTDOWN_REJECTED)));
    assert_eq!(
        got.message.as_deref(),
        Some("Pod was rejected: Pod was rejected as the node is shutting down.")
    );
    let disruption = get(&got, "DisruptionTarget");
    assert_eq!(
        (disruption.status.as_str(), disruption.reason.as_deref()),
        ("True", Some("TerminationByKubelet"))
    );
}

#[test]
fn a_drained_pod_ends_as_the_kubelets_node_shutdown_ends_it() {
    for policy in ["Always", "OnFailure", "Never"] {
        for (b, a) in [
            (ended(143), ended(143)),
            (ended(0), ended(0)),
            (waiting("CrashLoopBackOff"), ended(0)),
            (waiting("ContainerCreating"), waiting("ContainerCreating")),
        ] {
            let got = simple(&pod(policy), &both(b.clone(), a), Some(Ending::NodeShutdown));
            assert_eq!(got.phase.as_deref(), Some("Failed"), "{policy} {b:?}");
            assert_eq!(got.reason.as_deref(), Some("Terminated"));
            let message = "Pod was terminated in response to imminent node shutdown.";
            assert_eq!(got.message.as_deref(), Some(message));
            let disruption = to_value(get(&got, "DisruptionTarget")).unwrap();
            assert_eq!(
                disruption,
                json!({"type": "DisruptionTarget", "status": "True", "reason": "TerminationByKubelet",
                    "message": message, "observedGeneration": 3, "lastTransitionTime": "1970-01-01T00:05:00Z"})
            );
            let statuses = got.container_statuses.unwrap();
            assert!(
                statuses.iter().all(|status| status.state.as_ref().unwrap().terminated.is_some()),
                "nothing waits any more"
            );
        }
    }
}

#[test]
fn a_pod_is_not_over_while_a_container_runs() {
    let pod = pod("Never");
    let before = simple(&pod, &both(running(), running()), None);
    for ending in [
        Ending::NodeShutdown,
        Ending::Failed { reason: "DeadlineExceeded".into(), message: "m".into(), disruption: None },
    ] {
        let containers = both(running(), ended(143));
        let got = computed(&Case {
            pod: &pod,
            previous: &before,
            containers: &containers,
            ending: Some(ending),
            now: 400,
        });
        assert_eq!((got.phase.as_deref(), got.reason.as_deref()), (Some("Running"), None));
        assert!(got.conditions.iter().flatten().all(|condition| condition.type_ != "DisruptionTarget"));
    }
}

#[test]
fn a_deleted_pod_ends_by_its_exit_codes() {
    for (b, a, wanted) in [
        (ended(0), ended(0), "Succeeded"),
        (ended(0), ended(143), "Failed"),
        (ended(0), waiting("ContainerCreating"), "Failed"),
        (running(), ended(0), "Running"),
    ] {
        let got = simple(&pod("Always"), &both(b, a), Some(Ending::Deleted));
        assert_eq!((got.phase.as_deref(), got.reason.as_deref()), (Some(wanted), None));
    }
    let again = [container("b", waiting("CrashLoopBackOff"), Some(7)), container("a", ended(0), None)];
    let got = simple(&pod("Always"), &again, Some(Ending::Deleted));
    let b = &got.container_statuses.as_ref().unwrap()[1];
    assert_eq!(b.state.as_ref().unwrap().terminated.as_ref().unwrap().exit_code, 7, "as it ended last");
    let never = simple(&pod("Always"), &[], Some(Ending::Deleted));
    let a = &never.container_statuses.as_ref().unwrap()[0];
    let unknown = a.state.as_ref().unwrap().terminated.as_ref().unwrap();
    assert_eq!((unknown.exit_code, unknown.reason.as_deref()), (137, Some("ContainerStatusUnknown")));
}

#[test]
fn a_terminal_phase_is_final() {
    let pod = pod("Always");
    for (phase, reason) in [("Failed", Some("Terminated")), ("Succeeded", None)] {
        let previous = PodStatus {
            phase: Some(phase.to_owned()),
            reason: reason.map(str::to_owned),
            ..PodStatus::default()
        };
        for ending in [None, Some(Ending::Deleted), Some(Ending::NodeShutdown)] {
            let containers = both(running(), running());
            let got =
                computed(&Case { pod: &pod, previous: &previous, containers: &containers, ending, now: 1 });
            assert_eq!((got.phase.as_deref(), got.reason.as_deref()), (Some(phase), reason));
            assert_eq!(get(&got, "Ready").status, "False");
        }
        // The API server's word counts as well as our own.
        let mut known = pod.clone();
        known.status.as_mut().unwrap().phase = Some(phase.to_owned());
        let got = simple(&known, &both(running(), running()), None);
        assert_eq!(got.phase.as_deref(), Some(phase));
        let got = simple(&known, &[], None);
        assert_eq!(got.container_statuses, None, "of what is over nothing new is made up");
    }
}

#[test]
fn disruption_stays_once_it_is_said() {
    let pod = pod("Never");
    let containers = both(ended(143), ended(143));
    let first = simple(&pod, &containers, Some(Ending::NodeShutdown));
    let again =
        computed(&Case { pod: &pod, previous: &first, containers: &containers, ending: None, now: 999 });
    assert_eq!(again, first);
    assert_eq!(patch(&first, &again, "u"), None);
}

#[test]
fn the_patch_holds_what_changed_and_null_for_what_vanished() {
    let pod = pod("Always");
    let old = simple(&pod, &both(waiting("ContainerCreating"), running()), None);
    assert_eq!(patch(&old, &old, "u"), None, "nothing changed");

    let containers = both(running(), running());
    let new = computed(&Case { pod: &pod, previous: &old, containers: &containers, ending: None, now: 400 });
    let body = patch(&old, &new, "u").unwrap();
    assert_eq!(body["metadata"], json!({"uid": "u"}));
    let names: Vec<&str> = body["status"].as_object().unwrap().keys().map(String::as_str).collect();
    assert_eq!(names, ["conditions", "containerStatuses", "phase"]);
    assert_eq!(
        body["status"]["conditions"],
        json!(["Ready", "ContainersReady"].map(|kind| json!({"type": kind, "status": "True",
            "reason": null, "message": null, "observedGeneration": 3,
            "lastTransitionTime": "1970-01-01T00:06:40Z"})))
    );
    assert_eq!(body["status"]["containerStatuses"].as_array().map(Vec::len), Some(2), "sent whole");
}

#[test]
fn reason_message_and_addresses_that_vanish_are_taken_back() {
    let old: PodStatus = from_value(json!({"phase": "Pending", "reason": "R", "message": "M",
        "qosClass": "BestEffort", "podIP": "1.1.1.1", "podIPs": [{"ip": "1.1.1.1"}]}))
    .unwrap();
    let new: PodStatus = from_value(json!({"phase": "Pending", "podIP": "2.2.2.2",
        "podIPs": [{"ip": "2.2.2.2"}], "hostIPs": [{"ip": "2.2.2.2"}]}))
    .unwrap();
    assert_eq!(
        patch(&old, &new, "u").map(|body: Value| body["status"].clone()),
        Some(json!({"reason": null, "message": null, "podIP": "2.2.2.2",
            "podIPs": [{"ip": "2.2.2.2"}, {"$patch": "replace"}],
            "hostIPs": [{"ip": "2.2.2.2"}, {"$patch": "replace"}]}))
    );
}

#[test]
fn others_conditions_are_not_sent() {
    let pod = pod("Never");
    let new = simple(&pod, &both(running(), running()), None);
    let body = patch(&PodStatus::default(), &new, "u").unwrap();
    let kinds: Vec<&str> = body["status"]["conditions"]
        .as_array()
        .unwrap()
        .iter()
        .map(|condition| condition["type"].as_str().unwrap())
        .collect();
    assert!(!kinds.contains(&"example.org/gate"), "{kinds:?}");
    assert_eq!(body["status"].get("qosClass"), None);
}

#[test]
fn ids_name_the_pod_the_container_and_the_run() {
    assert_eq!(container_id("u", "c1", 2), "jiriaf://u/c1/2");
}
