//! Pods with init containers and sidecars: the cases of kubelet's own tables (kubelet_pods_test.go,
//! `TestPodPhaseWithRestart…InitContainers`; status/generate_test.go).

use serde_json::{from_value, json};

use super::*;

/// An init container `i`, a sidecar `s`, a main container `m`.
fn pod(policy: &str) -> Pod {
    from_value(json!({
        "metadata": {"name": "p", "generation": 5},
        "spec": {"restartPolicy": policy,
            "initContainers": [{"name": "i"}, {"name": "s", "restartPolicy": "Always"}],
            "containers": [{"name": "m"}]},
    }))
    .unwrap()
}

/// What a container does, in a word: `-` waits, `r` runs and has started, `s` runs and has not, a number is how it ended, a
/// number in brackets how it ended before it waits to run again.
fn runtime(name: &str, word: &str) -> ContainerRuntime {
    let end = |code: &str| Terminated {
        exit_code: code.parse().unwrap(),
        signal: None,
        reason: None,
        message: String::new(),
        started_at: None,
        finished_at: Timestamp::UNIX_EPOCH,
        id: "id".to_owned(),
    };
    let running = || State::Running { started_at: Timestamp::UNIX_EPOCH, id: "id".to_owned() };
    let waiting = |reason: &str| State::Waiting { reason: reason.to_owned(), message: String::new() };
    let (state, last) = match word {
        "-" => (waiting("PodInitializing"), None),
        "r" | "s" => (running(), None),
        again if again.starts_with('(') => {
            (waiting("CrashLoopBackOff"), Some(end(again.trim_matches(['(', ')']))))
        }
        code => (State::Terminated(end(code)), None),
    };
    ContainerRuntime {
        name: name.to_owned(),
        state,
        last,
        restart_count: 0,
        image_id: String::new(),
        again: false,
        started: word != "s",
        ready: true,
    }
}

fn of(policy: &str, words: [&str; 3], previous: &PodStatus, ending: Option<&Ending>) -> PodStatus {
    let containers: Vec<ContainerRuntime> =
        ["i", "s", "m"].into_iter().zip(words).map(|(name, word)| runtime(name, word)).collect();
    status(&StatusInput {
        pod: &pod(policy),
        previous,
        containers: &containers,
        pod_ip: None,
        host_ip: None,
        start_time: Timestamp::UNIX_EPOCH,
        directory_ready: true,
        ending,
        now: Timestamp::UNIX_EPOCH,
    })
}

fn condition(status: &PodStatus, kind: &str) -> (String, String, String) {
    let found = status.conditions.iter().flatten().find(|one| one.type_ == kind).unwrap();
    assert_eq!(found.observed_generation, Some(5), "{kind}");
    let text = |text: &Option<String>| text.clone().unwrap_or_default();
    (found.status.clone(), text(&found.reason), text(&found.message))
}

#[test]
fn the_phase_with_init_containers_and_sidecars() {
    let cases = [
        // Nothing has run, or the first one runs.
        ("Never", ["-", "-", "-"], "Pending"),
        ("Never", ["r", "-", "-"], "Pending"),
        ("Never", ["0", "-", "-"], "Pending"),
        ("Never", ["0", "s", "-"], "Pending"),
        ("Never", ["0", "r", "-"], "Pending"),
        ("Never", ["0", "r", "r"], "Running"),
        // An init container that fails ends the pod only where it does not run again, and once nothing runs.
        ("Never", ["1", "-", "-"], "Failed"),
        ("OnFailure", ["1", "-", "-"], "Pending"),
        ("OnFailure", ["(1)", "-", "-"], "Pending"),
        ("Always", ["(1)", "-", "-"], "Pending"),
        ("Never", ["1", "r", "-"], "Pending"),
        // Sidecars that end or start again change nothing once the pod is initialized.
        ("Never", ["0", "(1)", "r"], "Running"),
        ("Never", ["0", "s", "r"], "Running"),
        ("Never", ["0", "137", "r"], "Running"),
        // The main containers decide, whatever the sidecars ended with, and not while one runs.
        ("Never", ["0", "r", "0"], "Running"),
        ("Never", ["0", "137", "0"], "Succeeded"),
        ("Never", ["0", "137", "1"], "Failed"),
        ("OnFailure", ["0", "r", "(1)"], "Running"),
        ("Always", ["0", "r", "(0)"], "Running"),
    ];
    for (policy, words, wanted) in cases {
        // A terminal phase is not told while something runs: the one before holds.
        let before = if words[2] == "-" { "Pending" } else { "Running" };
        let previous = PodStatus { phase: Some(before.to_owned()), ..PodStatus::default() };
        let got = of(policy, words, &previous, None);
        assert_eq!(got.phase.as_deref(), Some(wanted), "{policy} {words:?}");
    }
}

#[test]
fn the_conditions_name_what_is_not_complete_and_what_is_not_ready() {
    let none = PodStatus::default();
    let not = |what: &str| {
        (
            "False".to_owned(),
            "ContainersNotInitialized".to_owned(),
            format!("containers with incomplete status: [{what}]"),
        )
    };
    let yes = ("True".to_owned(), String::new(), String::new());
    let cases = [
        (["-", "-", "-"], not("i s"), Some("s m")),
        (["r", "-", "-"], not("i s"), Some("s m")),
        (["0", "s", "-"], not("s"), Some("s m")),
        (["0", "r", "-"], yes.clone(), Some("m")),
        (["0", "r", "r"], yes.clone(), None),
        // What was initialized stays so.
        (["0", "(1)", "r"], yes.clone(), Some("s")),
        (["0", "s", "r"], yes.clone(), Some("s")),
    ];
    for (words, initialized, unready) in cases {
        let got = of("Always", words, &none, None);
        assert_eq!(condition(&got, "Initialized"), initialized, "{words:?}");
        let (ready, reason, message) = condition(&got, "ContainersReady");
        match unready {
            None => assert_eq!(ready, "True", "{words:?}"),
            Some(names) => {
                let wanted = format!("containers with unready status: [{names}]");
                assert_eq!((reason.as_str(), message), ("ContainersNotReady", wanted), "{words:?}");
            }
        }
        assert_eq!(condition(&got, "Ready").0, ready, "{words:?}");
    }
    let done = of("Never", ["0", "0", "0"], &none, None);
    assert_eq!(condition(&done, "Initialized").1, "PodCompleted");
    let failed = of("Never", ["1", "-", "-"], &none, None);
    assert_eq!(condition(&failed, "Initialized"), not("i s"));
    assert_eq!(condition(&failed, "Ready").1, "PodFailed");
}

#[test]
fn each_list_has_its_own_statuses_and_says_what_has_started() {
    let got = of("Always", ["0", "s", "-"], &PodStatus::default(), None);
    let told: Vec<(String, Option<bool>, bool)> = got
        .init_container_statuses
        .iter()
        .chain(&got.container_statuses)
        .flatten()
        .map(|one| (one.name.clone(), one.started, one.ready))
        .collect();
    let wanted = [("i", Some(false), true), ("s", Some(false), false), ("m", Some(false), false)];
    assert_eq!(told, wanted.map(|(name, started, ready)| (name.to_owned(), started, ready)));
    assert_eq!(got.ephemeral_container_statuses, None);
}

#[test]
fn a_pod_that_is_ended_early_says_of_what_never_had_its_turn_that_it_waits() {
    let ended = |words| of("Always", words, &PodStatus::default(), Some(&Ending::Deleted));
    let reasons = |got: &PodStatus| -> Vec<String> {
        let all = got.init_container_statuses.iter().chain(&got.container_statuses).flatten();
        all.map(|one| {
            let state = one.state.clone().unwrap();
            let waiting = state.waiting.and_then(|waiting| waiting.reason);
            waiting.or(state.terminated.and_then(|end| end.reason)).unwrap()
        })
        .collect()
    };
    for (words, wanted) in [
        (["143", "-", "-"], ["Error", "PodInitializing", "PodInitializing"]),
        (["0", "(1)", "-"], ["Completed", "Error", "PodInitializing"]),
        (["0", "-", "143"], ["Completed", "ContainerStatusUnknown", "Error"]),
        // The first one had its turn (initializedContainers).
        (["-", "-", "-"], ["ContainerStatusUnknown", "PodInitializing", "PodInitializing"]),
    ] {
        let got = ended(words);
        assert_eq!(reasons(&got), wanted, "{words:?}");
        assert_eq!(got.phase.as_deref(), Some("Failed"), "{words:?}");
    }
}

#[test]
fn a_sidecar_that_waited_to_run_again_is_over_with_its_pod() {
    let got = of("Never", ["0", "(1)", "0"], &PodStatus::default(), None);
    assert_eq!(got.phase.as_deref(), Some("Succeeded"));
    let side = &got.init_container_statuses.as_ref().unwrap()[1];
    let end = side.state.as_ref().and_then(|state| state.terminated.as_ref());
    assert_eq!(end.map(|end| end.exit_code), Some(1), "{side:?}");
    // It stays so when all that is known is told again, as after a crash of the pilot.
    let again = of("Never", ["0", "(1)", "0"], &got, None);
    assert_eq!(again, got);
}

#[test]
fn a_main_container_that_could_not_start_had_its_turn_where_all_before_it_was_done() {
    let mut pod = pod("Always");
    pod.spec.as_mut().unwrap().init_containers.as_mut().unwrap().pop();
    let containers = [runtime("i", "0"), runtime("m", "-")];
    let got = status(&StatusInput {
        pod: &pod,
        previous: &PodStatus::default(),
        containers: &containers,
        pod_ip: None,
        host_ip: None,
        start_time: Timestamp::UNIX_EPOCH,
        directory_ready: true,
        ending: Some(&Ending::Deleted),
        now: Timestamp::UNIX_EPOCH,
    });
    let state = got.container_statuses.unwrap()[0].state.clone().unwrap();
    assert_eq!(state.terminated.unwrap().reason.as_deref(), Some("ContainerStatusUnknown"));
}
