//! Manifests and state files that lie: pods whose names, paths, keys and numbers are anything, and records that were damaged.
//! Nothing panics, and nothing is written outside of the pod's directory and the home directory.
//!
//! `PROPTEST_CASES=100000 cargo test --release --lib hostile` runs more of them.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::sync::Arc;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Container, Pod, PodStatus};
use proptest::prelude::*;
use serde_json::{Value, from_value, json};

use super::admission::{self, Load, NodeFacts};
use super::environment::{
    Additions, EnvFiles, EnvInput, Facts, Objects, container_env, missing, references, volume_references,
};
use super::handler::Hook;
use super::images::Images;
use super::isolation::{Isolation, Mode};
use super::record::{Record, Records};
use super::status::{self, ContainerRuntime, Ending, State, StatusInput, Terminated};
use super::volumes::{self, Ground, Target};
use super::{command_line, containers, expansion::Expand, network};

/// What may stand in the place of any text.
const TEXTS: [&str; 25] = [
    "",
    ".",
    "..",
    "/",
    "//",
    "../../outside/x",
    "/../outside",
    "a/../../outside",
    "..data",
    "..data/x",
    "a/..data",
    "..x",
    "logs",
    "logs/0.log",
    "pgid",
    "termination-log",
    "etc-hosts",
    "~",
    "~/../outside",
    "~/x",
    "$(A)$(B)$$(C)",
    "a\0b",
    "é\u{202e}\n",
    "c2",
    "v2",
];

/// Everything that has to do with files and variables, once.
fn base() -> Value {
    let mounts = json!([
        {"name": "v1", "mountPath": "/etc/one"}, {"name": "v2", "mountPath": "two", "subPath": "k1"},
        {"name": "v3", "mountPath": "/etc/one/three", "subPathExpr": "$(A)/x"}, {"name": "v4", "mountPath": "~/four"},
        {"name": "v5", "mountPath": "/data"}, {"name": "v5", "mountPath": "/data/in", "readOnly": true}]);
    let one = |name: &str, image: &str| {
        json!({"name": name, "image": image, "command": ["bash"], "args": ["$(A)", "~/x", "$B"], "workingDir": "w",
            "volumeMounts": mounts,
            "env": [{"name": "A", "value": "a"}, {"name": "B", "valueFrom": {"configMapKeyRef": {"name": "m", "key": "k1"}}},
                {"name": "C", "valueFrom": {"resourceFieldRef": {"resource": "limits.cpu", "divisor": "1m"}}},
                {"name": "D", "valueFrom": {"fieldRef": {"fieldPath": "metadata.labels['l']"}}},
                {"name": "E", "valueFrom": {"fileKeyRef": {"volumeName": "v5", "path": "f", "key": "K", "optional": true}}}],
            "envFrom": [{"prefix": "P_", "secretRef": {"name": "s"}}],
            "ports": [{"containerPort": 80, "hostPort": 8080, "name": "web"}],
            "resources": {"requests": {"cpu": "100m"}, "limits": {"cpu": "1", "memory": "1Mi"}},
            "lifecycle": {"preStop": {"httpGet": {"port": "web", "path": "/x"}}, "stopSignal": "SIGUSR1"},
            "terminationMessagePath": "/dev/termination-log"})
    };
    json!({
        "metadata": {"name": "p", "namespace": "n", "uid": "u", "labels": {"l": "v"}, "generation": 1},
        "spec": {
            "restartPolicy": "OnFailure", "activeDeadlineSeconds": 10, "terminationGracePeriodSeconds": 3,
            "initContainers": [one("c0", "v1"), {"name": "s0", "image": "v2", "restartPolicy": "Always"}],
            "containers": [one("c1", "v1/k1"), one("c2", "busybox")],
            "hostname": "h", "subdomain": "s", "hostAliases": [{"ip": "1.2.3.4", "hostnames": ["a"]}],
            "dnsConfig": {"searches": ["x"], "options": [{"name": "ndots", "value": "5"}]},
            "securityContext": {"fsGroup": 0, "runAsUser": 0},
            "volumes": [
                {"name": "v1", "configMap": {"name": "m", "defaultMode": 420}},
                {"name": "v2", "secret": {"secretName": "s", "items": [{"key": "k1", "path": "a/b", "mode": 256}]}},
                {"name": "v3", "emptyDir": {"sizeLimit": "1Mi"}},
                {"name": "v4", "projected": {"sources": [{"configMap": {"name": "m"}}, {"secret": {"name": "s", "optional": true}},
                    {"downwardAPI": {"items": [{"path": "labels", "fieldRef": {"fieldPath": "metadata.labels"}}]}},
                    {"serviceAccountToken": {"path": "token", "audience": "a"}}]}},
                {"name": "v5", "emptyDir": {}}]},
        "status": {"phase": "Pending", "containerStatuses": [{"name": "c1", "image": "", "imageID": "", "ready": true, "restartCount": 3}]},
    })
}

fn leaves<'a>(value: &'a mut Value, all: &mut Vec<&'a mut Value>) {
    match value {
        Value::Object(fields) => fields.values_mut().for_each(|field| leaves(field, all)),
        Value::Array(items) => items.iter_mut().for_each(|item| leaves(item, all)),
        leaf => all.push(leaf),
    }
}

/// Puts something else in the place of some texts and numbers.
fn damage(mut pod: Value, changes: &[(usize, usize, i64)]) -> Value {
    let mut all = Vec::new();
    leaves(&mut pod, &mut all);
    for (at, text, number) in changes {
        let at = at % all.len();
        match &mut *all[at] {
            Value::String(old) => *old = TEXTS[text % TEXTS.len()].to_owned(),
            Value::Number(old) => *old = (*number).into(),
            _ => {}
        }
    }
    pod
}

/// Objects of every name that the pod wants, with keys that are anything.
fn objects(pod: &Pod, keys: &[usize]) -> Objects {
    let wanted = references(pod);
    let keys: Vec<&str> = keys.iter().map(|key| TEXTS[key % TEXTS.len()]).chain(["k1", "run.sh"]).collect();
    let data: BTreeMap<&str, &str> = keys.iter().map(|key| (*key, "value")).collect();
    let encoded: BTreeMap<&str, &str> = keys.iter().map(|key| (*key, "dmFsdWU=")).collect();
    let map = |name: &String| {
        (name.clone(), from_value(json!({"metadata": {}, "data": data})).map(Arc::new).unwrap())
    };
    let secret = |name: &String| {
        (name.clone(), from_value(json!({"metadata": {}, "data": encoded})).map(Arc::new).unwrap())
    };
    Objects {
        config_maps: wanted.config_maps.keys().map(map).collect(),
        secrets: wanted.secrets.keys().map(secret).collect(),
        tokens: wanted.tokens.into_iter().map(|token| (token, "token".to_owned())).collect(),
    }
}

/// Whatever is done with a pod before anything of it runs.
fn digest(pod: &Pod, objects: &Objects, root: &Path) {
    let (directory, home) = (root.join("pods/p"), root.join("home"));
    let facts = Facts::default();
    let isolation = Isolation { mode: Mode::Namespaces, ..Isolation::default() };
    let node = NodeFacts { name: "n".to_owned(), isolation, ..NodeFacts::default() };
    let _ = admission::admit(pod, &node, &Load::of([pod]));
    let _ = network::network(pod, &facts.pod_ips, "search x\n");
    let ground = Ground { directory: &directory, home: &home };
    let names: Vec<String> = containers::of(pod).map(|(_, container)| container.name.clone()).collect();
    for name in &names {
        let Some((_, container)) = containers::find(pod, name) else { continue };
        of_container(pod, &container, objects, &facts, &directory);
    }
    for volume in pod.spec.iter().flat_map(|spec| spec.volumes.iter().flatten()) {
        let _ = volume_references([volume]);
    }
    let Ok(volumes::Found { mut contents, .. }) = volumes::contents(pod, objects, objects, &facts) else {
        return;
    };
    let mut plans = Vec::new();
    for (_, container) in containers::of(pod) {
        let Ok(sub_paths) = volumes::sub_paths(&container, &|_| Some("../x".to_owned())) else { continue };
        let Ok(plan) = volumes::plan(&container, &contents, &sub_paths, &ground) else { continue };
        let _ = volumes::script(&container, &plan, &mut contents);
        plans.push(plan);
    }
    // Twice, as for a container that starts again.
    for _ in 0..2 {
        let target = Target { ground, contents: &directory, uid: "u", group: None };
        let _ = volumes::write(&target, &contents, &mut plans, &BTreeSet::new());
    }
}

fn of_container(pod: &Pod, container: &Container, objects: &Objects, facts: &Facts, directory: &Path) {
    let files = EnvFiles::read(container, |volume| directory.join("volumes").join(volume));
    let env = container_env(&EnvInput {
        pod,
        container,
        objects,
        facts,
        inherited: &[],
        additions: &Additions::default(),
        expand: Expand::Jiriaf,
        services: &BTreeMap::new(),
        files: &files,
    });
    if let Ok(env) = env {
        let _ = command_line::argv(container, "/s", &env, Expand::Jiriaf);
    }
    let _ = missing(container, objects);
    let _ = Images::default().id(container);
    let _ = (Hook::pre_stop(pod, &container.name), Hook::post_start(pod, &container.name));
}

fn statuses(pod: &Pod) {
    let end = Terminated {
        exit_code: 1,
        signal: None,
        reason: None,
        message: "é".repeat(10_000),
        started_at: None,
        finished_at: Timestamp::UNIX_EPOCH,
        id: String::new(),
    };
    let containers: Vec<ContainerRuntime> = containers::of(pod)
        .map(|(_, container)| ContainerRuntime {
            name: container.name.clone(),
            state: State::Terminated(end.clone()),
            last: Some(end.clone()),
            restart_count: u32::MAX,
            image_id: String::new(),
            again: false,
            started: true,
            ready: true,
        })
        .collect();
    for ending in [None, Some(Ending::Deleted), Some(Ending::NodeShutdown)] {
        let status = status::status(&StatusInput {
            pod,
            previous: &PodStatus::default(),
            containers: &containers,
            pod_ip: None,
            host_ip: None,
            start_time: Timestamp::UNIX_EPOCH,
            directory_ready: true,
            ending: ending.as_ref(),
            now: Timestamp::UNIX_EPOCH,
        });
        let _ = status::patch(&PodStatus::default(), &status, "u");
    }
}

fn tree(root: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(root).unwrap().map(|entry| entry.unwrap().file_name());
    entries.map(|name| name.to_string_lossy().into_owned()).collect()
}

fn changes() -> impl Strategy<Value = Vec<(usize, usize, i64)>> {
    prop::collection::vec(
        (any::<usize>(), any::<usize>(), prop::sample::select(vec![i64::MIN, -1, 0, 1, 0o7777, i64::MAX])),
        0..6,
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]

    #[test]
    fn a_hostile_manifest_writes_nothing_outside(changes in changes(), keys in prop::collection::vec(any::<usize>(), 0..4)) {
        let Ok(pod) = from_value::<Pod>(damage(base(), &changes)) else { return Ok(()) };
        let root = tempfile::tempdir().unwrap();
        for directory in ["pods/p", "home", "outside"] {
            fs::create_dir_all(root.path().join(directory)).unwrap();
        }
        digest(&pod, &objects(&pod, &keys), root.path());
        statuses(&pod);
        prop_assert_eq!(tree(root.path()), BTreeSet::from(["home", "outside", "pods"].map(str::to_owned)));
        prop_assert_eq!(tree(&root.path().join("pods")), BTreeSet::from(["p".to_owned()]));
        prop_assert!(tree(&root.path().join("outside")).is_empty());
    }

    #[test]
    fn a_damaged_state_file_is_named_and_left(changes in changes(), cut in any::<usize>(), flip in any::<(usize, u8)>()) {
        let root = tempfile::tempdir().unwrap();
        let records = Records::open(&root.path().join("pods")).unwrap();
        let pod: Pod = from_value(base()).unwrap();
        let record = serde_json::to_value(Record::new(pod, Timestamp::UNIX_EPOCH)).unwrap();
        let mut bytes = serde_json::to_vec(&damage(record, &changes)).unwrap();
        let at = flip.0 % bytes.len();
        bytes[at] ^= flip.1;
        bytes.truncate(cut % (bytes.len() * 4));
        fs::write(root.path().join("pods/u.json"), &bytes).unwrap();
        for record in records.load() {
            // What can be read has its place by its uid, and nowhere else.
            let _ = records.save(&record);
        }
        prop_assert_eq!(tree(root.path()), BTreeSet::from(["pods".to_owned()]));
    }
}
