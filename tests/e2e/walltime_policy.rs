//! docs/cluster/walltime-policy.yaml: what it makes of pods, and what the scheduler makes of that.

use std::path::Path;

use serde_json::{Value, json};

use crate::harness::{
    Namespace, Options, Pilot, api, bed, condition, container, job, pod_spec, read, seconds, unique,
    wait_until,
};

const ADMISSION: &str = "admissionregistration.k8s.io/v1";
const TAINT: &str = "virtual-kubelet.io/provider";

/// The policy for one namespace: it would be for all that other tests make, too. Gone at drop.
struct Policy(String);

impl Policy {
    fn of(namespace: &Namespace) -> Self {
        let policy = Self(unique("walltime"));
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/cluster/walltime-policy.yaml");
        let text = read(&file);
        let (all, own) = ("spec: {policyName: jiriaf-walltime}", "{name: jiriaf-walltime}");
        assert!(text.contains(all) && text.matches(own).count() == 2, "{text}");
        let one = format!(
            "spec: {{policyName: {}, matchResources: {{namespaceSelector: {{matchLabels: {{kubernetes.io/metadata.name: {}}}}}}}}}",
            policy.0, namespace.name
        );
        let text = text.replace(all, &one).replace(own, &format!("{{name: {}}}", policy.0));
        namespace.apply(&text);
        wait_until("the policy holds", seconds(30), || {
            let spec = limited(json!({"tolerations": [{"operator": "Exists"}]}));
            !terms(&made(namespace, &spec)).is_null()
        });
        policy
    }
}

impl Drop for Policy {
    fn drop(&mut self) {
        for kind in ["mutatingadmissionpolicybindings", "mutatingadmissionpolicies"] {
            api::cluster_grouped(ADMISSION, kind).delete(&self.0, None);
        }
    }
}

/// A spec with a limit of 1000 s and these fields, for no scheduler that is there: other tests' pilots would take it.
fn limited(fields: Value) -> Value {
    let mut spec = json!({"activeDeadlineSeconds": 1000, "schedulerName": "none",
        "containers": [{"name": "c1", "image": "x"}]});
    for (field, value) in fields.as_object().unwrap() {
        spec[field] = value.clone();
    }
    spec
}

/// What the API server makes of a pod.
fn made(namespace: &Namespace, spec: &Value) -> Value {
    let name = unique("p");
    let pod = namespace.of("pods").create(&json!({"metadata": {"name": name}, "spec": spec}));
    namespace.of("pods").delete(&name, Some(0));
    pod
}

fn terms(pod: &Value) -> Value {
    let affinity = &pod["spec"]["affinity"]["nodeAffinity"];
    affinity["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"].clone()
}

fn required(terms: Value) -> Value {
    json!({"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}})
}

#[test]
fn pods_with_a_limit_that_may_come_to_pilots_get_the_affinity_and_others_are_left_alone() {
    let namespace = Namespace::new("policy");
    let _policy = Policy::of(&namespace);
    let tolerates = json!([{"key": TAINT, "operator": "Exists"}]);
    let long = json!({"key": "jiriaf.alivetime", "operator": "Gt", "values": ["999"]});
    let endless = json!({"key": "jiriaf.alivetime", "operator": "DoesNotExist"});
    let both = json!([{"matchExpressions": [long]}, {"matchExpressions": [endless]}]);
    let site = json!({"key": "jiriaf.site", "operator": "In", "values": ["a", "b"]});
    let other = json!({"key": "disk", "operator": "Exists"});
    let field = json!({"key": "metadata.name", "operator": "In", "values": ["n1"]});
    let with = |affinity: Value| limited(json!({"tolerations": tolerates, "affinity": affinity}));
    let toleration = |toleration: Value| limited(json!({"tolerations": [toleration]}));
    let selecting = |selector: Value| limited(json!({"nodeSelector": selector}));
    let shortest = json!({"tolerations": tolerates, "activeDeadlineSeconds": 1});
    let table: Vec<(&str, Value, Value)> = vec![
        ("tolerates", toleration(tolerates[0].clone()), both.clone()),
        (
            "tolerates by value",
            toleration(json!({"key": TAINT, "value": "mock", "effect": "NoSchedule"})),
            both.clone(),
        ),
        ("tolerates all", toleration(json!({"operator": "Exists"})), both.clone()),
        ("tolerates another value", toleration(json!({"key": TAINT, "value": "other"})), Value::Null),
        (
            "tolerates another effect",
            toleration(json!({"key": TAINT, "operator": "Exists", "effect": "NoExecute"})),
            Value::Null,
        ),
        ("tolerates another taint", toleration(json!({"key": "gpu", "operator": "Exists"})), Value::Null),
        ("neither tolerates nor selects", limited(json!({})), Value::Null),
        ("selects", selecting(json!({"jiriaf.site": "a"})), both.clone()),
        ("selects by type", selecting(json!({"type": "virtual-kubelet"})), both.clone()),
        ("selects others", selecting(json!({"type": "metal"})), Value::Null),
        (
            "has no limit",
            limited(json!({"tolerations": tolerates, "activeDeadlineSeconds": null})),
            Value::Null,
        ),
        (
            "the least",
            limited(shortest),
            json!([{"matchExpressions": [{"key": "jiriaf.alivetime", "operator": "Gt", "values": ["0"]}]},
                {"matchExpressions": [endless]}]),
        ),
        (
            "selects by affinity",
            limited(json!({"affinity": required(json!([{"matchExpressions": [site]}]))})),
            json!([{"matchExpressions": [site, long]}, {"matchExpressions": [site, endless]}]),
        ),
        (
            "each of its terms, and none that matches nothing",
            with(required(json!([{"matchExpressions": [site, other]}, {}, {"matchFields": [field]}]))),
            json!([
                {"matchExpressions": [site, other, long]}, {"matchExpressions": [long], "matchFields": [field]},
                {"matchExpressions": [site, other, endless]}, {"matchExpressions": [endless], "matchFields": [field]},
            ]),
        ),
        ("no term that matches anything", with(required(json!([{}]))), json!([{}])),
        (
            "asks for a time itself",
            with(required(json!([{"matchExpressions": [site]},
            {"matchExpressions": [{"key": "jiriaf.alivetime", "operator": "Gt", "values": ["5"]}]}]))),
            json!([{"matchExpressions": [site]},
            {"matchExpressions": [{"key": "jiriaf.alivetime", "operator": "Gt", "values": ["5"]}]}]),
        ),
        (
            "selects a time itself",
            limited(json!({"tolerations": tolerates, "nodeSelector": {"jiriaf.alivetime": "100"}})),
            Value::Null,
        ),
    ];
    for (what, spec, wanted) in table {
        assert_eq!(terms(&made(&namespace, &spec)), wanted, "{what}");
    }
    // What else an affinity says stays.
    let preferred = json!([{"weight": 7, "preference": {"matchExpressions": [other]}}]);
    let pods = json!({"requiredDuringSchedulingIgnoredDuringExecution": [
        {"topologyKey": "kubernetes.io/hostname", "labelSelector": {"matchLabels": {"a": "b"}}}]});
    let affinity = json!({"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": preferred},
        "podAntiAffinity": pods});
    let pod = made(&namespace, &with(affinity));
    let affinity = &pod["spec"]["affinity"];
    assert_eq!(terms(&pod), both);
    assert_eq!(affinity["nodeAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"], preferred);
    assert_eq!(affinity["podAntiAffinity"], pods);
}

#[test]
fn the_scheduler_passes_over_pilots_that_end_too_early() {
    let namespace = Namespace::new("policy-works");
    let _policy = Policy::of(&namespace);
    let short = Pilot::local(Options::new("policy-works"), 300);
    // Another Node of the same site and host.
    let same = || {
        let options = Options { site: Some(short.site.clone()), ..Options::new("policy-works") };
        options.env("NODENAME", &unique("policy-works"))
    };
    namespace.config_map("work", &[("run.sh", "exit 0\n")]);
    let spec = |seconds: u64| {
        let mut spec = pod_spec("Never", &[container("c1", "work")]);
        spec["activeDeadlineSeconds"] = json!(seconds);
        spec
    };
    // No pilot has so much time; where it is known how much it has.
    namespace.pod_on(&short, "endless", spec(10_000));
    namespace.pod_on(&short, "long", spec(1000));
    namespace.pod_on(&short, "fits", spec(60));
    let node_of = |pod: &Value| pod["spec"]["nodeName"].as_str().unwrap_or_default().to_owned();
    assert_eq!(node_of(&namespace.wait_phase("fits", "Succeeded", seconds(30))), short.node);
    for name in ["long", "endless"] {
        wait_until("the scheduler says why not", seconds(30), || {
            let scheduled = condition(&namespace.pod(name).unwrap(), "PodScheduled");
            let message = scheduled["message"].as_str().unwrap_or_default().to_owned();
            scheduled["reason"] == "Unschedulable"
                && message.contains("didn't match Pod's node affinity/selector")
        });
    }

    let mut long = Pilot::start_local(&same(), 3600);
    wait_until("it comes to the pilot that lives long", seconds(60), || {
        long.nodes().len() == 2 && namespace.pod("long").unwrap()["status"]["phase"] == "Succeeded"
    });
    long.node = node_of(&namespace.pod("long").unwrap());
    assert_ne!(long.node, short.node);
    // A Job's pods go the same way.
    let jobs = api::grouped("batch/v1", &namespace.name, "jobs");
    let mut work = job(&short, "work", 0, spec(1000));
    (work["spec"]["completions"], work["spec"]["parallelism"]) = (json!(4), json!(4));
    jobs.create(&work);
    wait_until("the Job is complete", seconds(60), || {
        condition(&jobs.get("work").unwrap(), "Complete")["status"] == "True"
    });
    let pods = namespace.of("pods").list("job-name=work");
    assert!(pods.len() == 4 && pods.iter().all(|pod| node_of(pod) == long.node), "{pods:#?}");

    // A node that says nothing of its end is one that may take it.
    assert_eq!(namespace.pod("endless").unwrap()["spec"]["nodeName"], Value::Null);
    let _silent = Pilot::start_run(&same(), &["--walltime=0"]);
    let pod = namespace.wait_phase("endless", "Succeeded", seconds(60));
    assert!(node_of(&pod) != short.node && node_of(&pod) != long.node, "{pod:#}");
    assert!(bed().kubectl(&["get", "node", &node_of(&pod), "-o", "yaml"]).success);
}
