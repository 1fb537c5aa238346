use serde_json::{Value, from_value, json};

use super::*;

fn pod(spec: Value) -> Pod {
    let mut spec = spec;
    spec.as_object_mut().unwrap().entry("containers").or_insert(json!([{"name": "c"}]));
    from_value(json!({"metadata": {"name": "p", "namespace": "ns"}, "spec": spec})).unwrap()
}

fn requesting(requests: Value) -> Pod {
    pod(json!({"containers": [{"name": "c", "resources": {"requests": requests}}]}))
}

fn node() -> NodeFacts {
    let map = |pairs: &[(&str, &str)]| -> BTreeMap<String, String> {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    };
    NodeFacts {
        name: "n1".to_owned(),
        labels: map(&[
            ("kubernetes.io/role", "agent"),
            ("jiriaf.nodetype", "cpu"),
            ("jiriaf.site", "mylin"),
            ("jiriaf.alivetime", "100"),
            ("word", "x1"),
        ]),
        taints: Vec::new(),
        allocatable: map(&[("cpu", "2"), ("memory", "1Gi"), ("pods", "3"), ("x.org/gpu", "1")])
            .into_iter()
            .map(|(key, value)| (key, Quantity(value)))
            .collect(),
        namespaces: None,
        shutting_down: false,
        memory_pressure: false,
        isolation: Isolation::default(),
        time_left: None,
    }
}

#[track_caller]
fn assert_rejected(pod: &Pod, node: &NodeFacts, running: &Load, reason: &str, message: &str) {
    let got = admit(pod, node, running).expect_err(reason);
    assert_eq!((got.reason.as_str(), got.message.as_str()), (reason, message));
}

#[test]
fn the_seed_documents_pod_is_admitted() {
    let pod = pod(json!({
        "nodeSelector": {"kubernetes.io/role": "agent"},
        "affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [
            {"matchExpressions": [
                {"key": "jiriaf.nodetype", "operator": "In", "values": ["cpu"]},
                {"key": "jiriaf.site", "operator": "In", "values": ["mylin"]},
                {"key": "jiriaf.alivetime", "operator": "Gt", "values": ["10"]},
            ]},
        ]}}},
        "tolerations": [{"key": "virtual-kubelet.io/provider", "value": "mock", "effect": "NoSchedule"}],
    }));
    assert_eq!(admit(&pod, &node(), &Load::default()), Ok(()));
}

#[test]
fn what_does_not_fit_is_rejected_with_the_kubelets_words() {
    let busy = Load::of([&requesting(json!({"cpu": "1500m", "memory": "512Mi", "x.org/gpu": "1"}))]);
    for (wanted, reason, message) in [
        (
            json!({"cpu": "501m"}),
            "OutOfcpu",
            "Node didn't have enough resource: cpu, requested: 501, used: 1500, capacity: 2000",
        ),
        (
            json!({"memory": "1Gi"}),
            "OutOfmemory",
            "Node didn't have enough resource: memory, requested: 1073741824, used: 536870912, capacity: 1073741824",
        ),
        (
            json!({"x.org/gpu": "1"}),
            "OutOfx.org/gpu",
            "Node didn't have enough resource: x.org/gpu, requested: 1, used: 1, capacity: 1",
        ),
        (
            json!({"hugepages-2Mi": "2Mi"}),
            "OutOfhugepages-2Mi",
            "Node didn't have enough resource: hugepages-2Mi, requested: 2097152, used: 0, capacity: 0",
        ),
        (
            json!({"ephemeral-storage": "1"}),
            "OutOfephemeral-storage",
            "Node didn't have enough resource: ephemeral-storage, requested: 1, used: 0, capacity: 0",
        ),
        (
            json!({"cpu": "x"}),
            "UnexpectedAdmissionError",
            "quantity \"x\" cannot be read (it does not begin with a number): wanted a number such as 2, 0.5, 100m, 512Mi, 2Gi, 1k or 1e3",
        ),
    ] {
        assert_rejected(&requesting(wanted), &node(), &busy, reason, message);
    }
    for fits in [
        json!({"cpu": "500m", "memory": "512Mi"}),
        json!({"unknown.org/thing": "5"}),
        json!({"cpu": "0", "ephemeral-storage": "0"}),
        json!({}),
    ] {
        assert_eq!(admit(&requesting(fits.clone()), &node(), &busy), Ok(()), "{fits}");
    }
}

#[test]
fn the_number_of_pods_is_limited() {
    let small = requesting(json!({}));
    let two = Load::of([&small, &small]);
    assert_eq!(admit(&small, &node(), &two), Ok(()));
    let three = Load::of([&small, &small, &small]);
    let message = "Node didn't have enough resource: pods, requested: 1, used: 3, capacity: 3";
    assert_rejected(&small, &node(), &three, "OutOfpods", message);
}

#[test]
fn requests_are_summed_and_limits_stand_in() {
    let spec = pod(json!({
        "containers": [
            {"name": "a", "resources": {"requests": {"cpu": "100m"}, "limits": {"cpu": "1", "memory": "1Mi"}}},
            {"name": "b", "resources": {"requests": {"cpu": "200m"}}},
        ],
        "initContainers": [{"name": "i", "resources": {"requests": {"cpu": "250m", "memory": "3Mi"}}}],
        "overhead": {"cpu": "10m"},
    }))
    .spec
    .unwrap();
    let got = load::requests(&spec).unwrap();
    assert_eq!(got["cpu"].millis(), 310);
    assert_eq!(got["memory"].units(), 3 << 20);
    // A sidecar runs beside the main containers, and beside the init containers after it.
    let cpu = |cpu: &str, policy: Option<&str>| json!({"name": cpu, "restartPolicy": policy, "resources": {"requests": {"cpu": cpu}}});
    for (init, wanted) in [
        (vec![cpu("100m", Some("Always"))], 150),
        (vec![cpu("100m", Some("Always")), cpu("70m", None)], 170),
        (vec![cpu("70m", None), cpu("100m", Some("Always"))], 150),
        (vec![cpu("300m", None), cpu("100m", Some("Always"))], 300),
    ] {
        let spec = pod(json!({"initContainers": init, "containers": [cpu("50m", None)]})).spec.unwrap();
        assert_eq!(load::requests(&spec).unwrap()["cpu"].millis(), wanted, "{init:?}");
    }
}

#[test]
fn affinity_follows_kubernetes() {
    let term = |expressions: Value| json!([{"matchExpressions": expressions}]);
    let one = |key: &str, operator: &str, values: &[&str]| {
        term(json!([{"key": key, "operator": operator, "values": values}]))
    };
    for (terms, fits) in [
        (one("jiriaf.site", "In", &["a", "mylin"]), true),
        (one("jiriaf.site", "In", &["a"]), false),
        (one("none", "In", &["a"]), false),
        (one("jiriaf.site", "NotIn", &["a"]), true),
        (one("jiriaf.site", "NotIn", &["mylin"]), false),
        (one("none", "NotIn", &["a"]), true),
        (one("jiriaf.site", "Exists", &[]), true),
        (one("none", "Exists", &[]), false),
        (one("none", "DoesNotExist", &[]), true),
        (one("jiriaf.site", "DoesNotExist", &[]), false),
        (one("jiriaf.alivetime", "Gt", &["99"]), true),
        (one("jiriaf.alivetime", "Gt", &["100"]), false),
        (one("jiriaf.alivetime", "Lt", &["101"]), true),
        (one("jiriaf.alivetime", "Lt", &["100"]), false),
        (one("none", "Gt", &["1"]), false),
        (one("word", "Gt", &["1"]), false),
        (one("jiriaf.alivetime", "Gt", &["x"]), false),
        (one("jiriaf.alivetime", "Gt", &["1", "2"]), false),
        (one("jiriaf.site", "Like", &["mylin"]), false),
        (json!([{}]), false),
        (json!([]), false),
        (
            json!([{"matchExpressions": [{"key": "none", "operator": "Exists"}]},
                {"matchFields": [{"key": "metadata.name", "operator": "In", "values": ["n1"]}]}]),
            true,
        ),
        (json!([{"matchFields": [{"key": "metadata.name", "operator": "NotIn", "values": ["n1"]}]}]), false),
        (json!([{"matchFields": [{"key": "metadata.uid", "operator": "NotIn", "values": ["n1"]}]}]), false),
        (
            term(
                json!([{"key": "jiriaf.site", "operator": "Exists"}, {"key": "none", "operator": "Exists"}]),
            ),
            false,
        ),
    ] {
        let affinity = json!({"nodeAffinity":
            {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}});
        let pod = pod(json!({"affinity": affinity}));
        let got = admit(&pod, &node(), &Load::default());
        assert_eq!(got.is_ok(), fits, "{terms}");
    }
    let other = pod(json!({"nodeSelector": {"jiriaf.site": "elsewhere"}}));
    let message = "Predicate NodeAffinity failed: node(s) didn't match Pod's node affinity/selector";
    assert_rejected(&other, &node(), &Load::default(), "NodeAffinity", message);
}

#[test]
fn a_pod_that_may_run_longer_than_the_node_lives_is_refused_with_both_numbers() {
    let left = |millis| NodeFacts { time_left: Some(Duration::from_millis(millis)), ..node() };
    let limited = |seconds: i64| pod(json!({"activeDeadlineSeconds": seconds}));
    for (node, seconds, fits) in [
        (left(100_000), 99, true),
        (left(100_000), 100, true),
        (left(99_999), 100, false),
        (left(100_000), 101, false),
        (left(100_000), i64::from(i32::MAX), false),
        (left(0), 1, false),
        // No end is known.
        (node(), i64::from(i32::MAX), true),
    ] {
        let got = admit(&limited(seconds), &node, &Load::default());
        assert_eq!(got.is_ok(), fits, "{:?} {seconds}: {got:?}", node.time_left);
    }
    // One that asks for no time is taken to the last second.
    assert_eq!(admit(&pod(json!({})), &left(0), &Load::default()), Ok(()));
    let message = "Node didn't have enough time: activeDeadlineSeconds: 3600, left until its pods are ended: 99 s; set a smaller \
        activeDeadlineSeconds, or require nodes that live longer (node affinity: jiriaf.alivetime Gt 3599)";
    assert_rejected(&limited(3600), &left(99_999), &Load::default(), "OutOfWalltime", message);
}

#[test]
fn an_alivetime_that_was_written_anew_while_the_pod_was_on_its_way_does_not_turn_it_away() {
    let wants = |operator: &str, value: &str| {
        let terms = json!([{"matchExpressions": [{"key": "jiriaf.alivetime", "operator": operator, "values": [value]}]}]);
        pod(json!({"affinity": {"nodeAffinity":
            {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}}}))
    };
    // The label says 100 by now; 150 s are really left.
    let node = NodeFacts { time_left: Some(Duration::from_millis(150_900)), ..node() };
    for (operator, value, fits) in [
        ("Gt", "99", true),
        ("Gt", "149", true),
        ("Gt", "150", false),
        ("Gt", "x", false),
        ("Lt", "101", true),
        ("In", "150", false),
    ] {
        let got = admit(&wants(operator, value), &node, &Load::default());
        assert_eq!(got.is_ok(), fits, "{operator} {value}");
    }
    // Without the label the scheduler sends none.
    let mut bare = node;
    bare.labels.remove("jiriaf.alivetime");
    assert!(admit(&wants("Gt", "10"), &bare, &Load::default()).is_err());
}

#[test]
fn node_name_and_host_ports() {
    let elsewhere = pod(json!({"nodeName": "n2"}));
    let message = "Predicate NodeName failed: node(s) didn't match the requested node name";
    assert_rejected(&elsewhere, &node(), &Load::default(), "NodeName", message);
    assert_eq!(admit(&pod(json!({"nodeName": "n1"})), &node(), &Load::default()), Ok(()));

    let with_port = |port: Value| pod(json!({"containers": [{"name": "c", "ports": [port]}]}));
    let taken = Load::of([
        &with_port(json!({"containerPort": 1, "hostPort": 80})),
        &with_port(json!({"containerPort": 1, "hostPort": 81, "hostIP": "10.0.0.1"})),
    ]);
    for (port, fits) in [
        (json!({"containerPort": 80}), true),
        (json!({"containerPort": 1, "hostPort": 80}), false),
        (json!({"containerPort": 1, "hostPort": 80, "hostIP": "10.0.0.9"}), false),
        (json!({"containerPort": 1, "hostPort": 80, "protocol": "UDP"}), true),
        (json!({"containerPort": 1, "hostPort": 81}), false),
        (json!({"containerPort": 1, "hostPort": 81, "hostIP": "10.0.0.2"}), true),
        (json!({"containerPort": 1, "hostPort": 82}), true),
    ] {
        let got = admit(&with_port(port.clone()), &node(), &taken);
        assert_eq!(got.is_ok(), fits, "{port}");
        assert!(got.is_ok() || got.is_err_and(|rejection| rejection.reason == "NodePorts"));
    }

    // A sidecar has its ports for as long as the pod lives; an init container gives them back.
    let init = |policy: Option<&str>| {
        let one =
            json!({"name": "i", "restartPolicy": policy, "ports": [{"containerPort": 1, "hostPort": 90}]});
        pod(json!({"initContainers": [one], "containers": [{"name": "c"}]}))
    };
    let wants = with_port(json!({"containerPort": 1, "hostPort": 90}));
    for (policy, fits) in [(Some("Always"), false), (None, true)] {
        let got = admit(&wants, &node(), &Load::of([&init(policy)]));
        assert_eq!(got.is_ok(), fits, "{policy:?}");
        assert_eq!(admit(&init(policy), &node(), &Load::of([&wants])).is_ok(), fits, "{policy:?}");
    }
}

#[test]
fn only_no_execute_taints_count_and_tolerations_lift_them() {
    let tainted = |effect: &str| NodeFacts {
        taints: vec![Taint {
            key: "k".to_owned(),
            value: Some("v".to_owned()),
            effect: effect.to_owned(),
            time_added: None,
        }],
        ..node()
    };
    assert_eq!(admit(&pod(json!({})), &tainted("NoSchedule"), &Load::default()), Ok(()));
    for (toleration, fits) in [
        (json!({"key": "k", "operator": "Equal", "value": "v", "effect": "NoExecute"}), true),
        (json!({"key": "k", "value": "v"}), true),
        (json!({"key": "k", "value": "w"}), false),
        (json!({"key": "k", "operator": "Exists"}), true),
        (json!({"operator": "Exists"}), true),
        (json!({"key": "j", "operator": "Exists"}), false),
        (json!({"key": "k", "operator": "Exists", "effect": "NoSchedule"}), false),
        (json!({"key": "k", "operator": "Odd", "value": "v"}), false),
    ] {
        let got = admit(&pod(json!({"tolerations": [toleration]})), &tainted("NoExecute"), &Load::default());
        assert_eq!(got.is_ok(), fits, "{toleration}");
    }
    let message = "Predicate TaintToleration failed: node(s) had taints that the pod didn't tolerate";
    assert_rejected(&pod(json!({})), &tainted("NoExecute"), &Load::default(), "TaintToleration", message);
}

#[test]
fn namespaces_shutdown_and_unsupported_fields() {
    let node_of = |names: &[&str]| NodeFacts {
        namespaces: Some(names.iter().map(|name| (*name).to_owned()).collect()),
        ..node()
    };
    assert_eq!(admit(&pod(json!({})), &node_of(&["ns"]), &Load::default()), Ok(()));
    let got = admit(&pod(json!({})), &node_of(&["a", "b"]), &Load::default()).unwrap_err();
    assert_eq!(got.reason, "NamespaceNotAllowed");
    assert!(got.message.contains("\"ns\"") && got.message.contains("a, b"), "{}", got.message);

    let ending = NodeFacts { shutting_down: true, ..node() };
    let message = "Pod was rejected as the node is shutting down.";
    assert_rejected(&pod(json!({})), &ending, &Load::default(), "NodeShutdown", message);

    for (spec, reason) in [
        (json!({"os": {"name": "windows"}}), "PodOSNotSupported"),
        (
            json!({"containers": [{"name": "c", "restartPolicy": "Never", "restartPolicyRules": [
                {"action": "RestartAllContainers", "exitCodes": {"operator": "In", "values": [42]}}]}]}),
            "UnsupportedPodSpec",
        ),
        (json!({"resourceClaims": [{"name": "i"}]}), "UnsupportedPodSpec"),
    ] {
        let got = admit(&pod(spec.clone()), &node(), &Load::default()).unwrap_err();
        assert_eq!(got.reason, reason, "{spec}");
    }
    assert_eq!(admit(&pod(json!({"os": {"name": "linux"}})), &node(), &Load::default()), Ok(()));
}

#[test]
fn what_isolation_alone_gives_or_takes_is_refused_elsewhere() {
    use crate::pod::isolation::{ANNOTATION, Mode};
    let node_of = |mode, problem: Option<&str>| NodeFacts {
        isolation: Isolation { mode, problem: problem.map(str::to_owned), hidden: Vec::new() },
        ..node()
    };
    let (none, all, asked) = (Mode::None, Mode::Namespaces, Mode::Annotation);
    let aliases = json!({"hostAliases": [{"ip": "1.2.3.4", "hostnames": ["a"]}]});
    let dns = json!({"dnsPolicy": "None", "dnsConfig": {"nameservers": ["1.2.3.4"]}});
    let searches = json!({"dnsPolicy": "ClusterFirst", "dnsConfig": {"searches": ["x"]}});
    let (pid, share) = (json!({"hostPID": true}), json!({"shareProcessNamespace": true}));
    let plain = json!({"hostAliases": [], "dnsConfig": {}, "dnsPolicy": "ClusterFirst", "hostPID": false,
        "shareProcessNamespace": false, "runtimeClassName": "x", "hostNetwork": true, "hostIPC": true, "hostname": "h"});
    // Mode, the host's problem, whether the pod asks, the pod; words of the message, none where it is admitted.
    type Row<'a> = (Mode, Option<&'a str>, bool, &'a Value, &'a [&'a str]);
    let table: [Row<'_>; 21] = [
        (none, None, false, &plain, &[]),
        (all, None, false, &plain, &[]),
        (none, None, false, &aliases, &["spec.hostAliases ", "--isolation=namespaces", "jiriaf.isolation"]),
        (none, None, true, &aliases, &["spec.hostAliases ", "--isolation=namespaces"]),
        (none, None, false, &dns, &["spec.dnsPolicy None ", "leave it out"]),
        (none, None, false, &searches, &["spec.dnsConfig ", "leave it out"]),
        (all, None, false, &aliases, &[]),
        (all, None, false, &dns, &[]),
        (all, None, false, &searches, &[]),
        (all, Some("EPERM"), false, &aliases, &["another node", "EPERM"]),
        (asked, None, false, &aliases, &["give the pod the annotation jiriaf.isolation: namespaces"]),
        (asked, None, true, &aliases, &[]),
        (asked, Some("EPERM"), true, &dns, &["another node", "EPERM"]),
        (none, None, false, &pid, &[]),
        (none, None, false, &share, &[]),
        (asked, None, false, &pid, &[]),
        (asked, None, true, &pid, &["spec.hostPID ", "take the annotation"]),
        (asked, None, true, &share, &["spec.shareProcessNamespace ", "take the annotation"]),
        (all, None, false, &pid, &["spec.hostPID ", "a node whose pilot has no --isolation=namespaces"]),
        (all, None, true, &share, &["spec.shareProcessNamespace ", "a node whose pilot has no"]),
        (all, Some("EPERM"), false, &share, &[]),
    ];
    for (mode, problem, asks, spec, words) in table {
        let mut pod = pod(spec.clone());
        if asks {
            pod.metadata.annotations = Some([(ANNOTATION.to_owned(), "namespaces".to_owned())].into());
        }
        let got = admit(&pod, &node_of(mode, problem), &Load::default());
        let right = match &got {
            Ok(()) => words.is_empty(),
            Err(error) => {
                error.reason == "UnsupportedPodSpec"
                    && !words.is_empty()
                    && words.iter().all(|word| error.message.contains(word))
            }
        };
        assert!(right, "{mode:?} {problem:?} {asks} {spec}: {got:?}");
    }
}
