//! Volumes of running pods: they follow what they are made of.

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::harness::{
    Namespace, Options, Pilot, api, container, pod_spec, read, seconds, wait_for, wait_until,
};

/// A container that sleeps, with these mounts beside its script's.
fn sleeper(name: &str, mounts: &[(&str, &str)]) -> Value {
    let mut sleeper = container(name, "script");
    for (volume, path) in mounts {
        let mount = json!({"name": volume, "mountPath": path});
        sleeper["volumeMounts"].as_array_mut().unwrap().push(mount);
    }
    sleeper
}

/// Makes the spec's volume of this name this one.
fn volume(spec: &mut Value, name: &str, mut kind: Value) {
    kind["name"] = name.into();
    let volumes = spec["volumes"].as_array_mut().unwrap();
    volumes.retain(|volume| volume["name"] != name);
    volumes.push(kind);
}

fn text(path: &Path) -> Option<String> {
    std::fs::read_to_string(path).ok()
}

/// How long it takes until all of these files hold this.
#[track_caller]
fn time_until(paths: &[std::path::PathBuf], wanted: Option<&str>) -> Duration {
    let start = Instant::now();
    wait_until(&format!("{paths:?} hold {wanted:?}"), seconds(20), || {
        paths.iter().all(|path| text(path).as_deref() == wanted)
    });
    start.elapsed()
}

#[test]
fn an_update_of_a_config_map_and_of_a_secret_appears_whole_within_two_seconds() {
    let namespace = Namespace::new("update");
    let pilot = Pilot::local(Options::new("update"), 600);
    // Whoever reads both files of one state reads the same version in both.
    let script = "trap 'exit 0' TERM
while :; do
    d=$(readlink -f etc/conf/..data)
    a=$(cat $d/a 2>/dev/null) b=$(cat $d/b 2>/dev/null)
    [ -n \"$a\" ] && [ -n \"$b\" ] && [ \"$a\" != \"$b\" ] && echo \"$a $b\" >>torn
    sleep 0.01
done\n";
    namespace.config_map("script", &[("run.sh", script)]);
    namespace.config_map("conf", &[("a", "1"), ("b", "1"), ("gone", "x")]);
    let secret = json!({"metadata": {"name": "key"}, "stringData": {"pw": "first"}});
    namespace.of("secrets").create(&secret);
    let mounts = [("conf", "/etc/conf"), ("key", "keys"), ("key", "~/keys")];
    let mut spec = pod_spec("Never", &[sleeper("c1", &mounts), sleeper("c2", &mounts[..2])]);
    volume(&mut spec, "key", json!({"secret": {"secretName": "key", "defaultMode": 0o400}}));
    namespace.pod_on(&pilot, "p", spec);
    namespace.wait_phase("p", "Running", seconds(30));
    let both = |path: &str| {
        ["c1", "c2"].map(|name| pilot.pod_directory("p").join("containers").join(name).join(path))
    };
    assert_eq!(text(&both("etc/conf/a")[0]).as_deref(), Some("1"));

    // Also before the watch has begun.
    namespace.of("configmaps").merge("conf", &json!({"data": {"a": "2", "b": "2"}}));
    time_until(&both("etc/conf/a"), Some("2"));
    for version in ["3", "4", "5"] {
        namespace.of("configmaps").merge("conf", &json!({"data": {"a": version, "b": version}}));
        let took = time_until(&both("etc/conf/a"), Some(version));
        assert!(took < seconds(2), "{took:?}");
    }
    namespace.of("configmaps").merge("conf", &json!({"data": {"gone": null, "new": "x"}}));
    time_until(&both("etc/conf/new"), Some("x"));
    time_until(&both("etc/conf/gone"), None);
    namespace.of("secrets").merge("key", &json!({"stringData": {"pw": "second"}}));
    let took = time_until(&both("keys/pw"), Some("second"));
    assert!(took < seconds(2), "{took:?}");
    time_until(&[pilot.home.join("keys/pw")], Some("second"));

    // What is deleted leaves the files as they are, and an event says so.
    namespace.of("configmaps").delete("conf", None);
    wait_until("an event says what is missing", seconds(20), || {
        namespace.events("p").iter().any(|(reason, message)| {
            reason == "FailedMount" && message.contains("configmap \"conf\" not found")
        })
    });
    assert_eq!(both("etc/conf/a").map(|path| text(&path)), ["5", "5"].map(|text| Some(text.to_owned())));
    assert_eq!(both("torn").map(|path| text(&path)), [None, None], "no reader saw half an update");
    namespace.of("pods").delete("p", Some(5));
    namespace.wait_gone("p", seconds(20));
    wait_until("its file in the home directory is gone", seconds(10), || {
        !pilot.home.join("keys/pw").exists()
    });
}

#[test]
fn labels_annotations_and_optional_objects_are_followed_and_immutable_ones_stay() {
    let namespace = Namespace::new("labels");
    let pilot = Pilot::local(Options::new("labels"), 600);
    namespace.config_map("script", &[("run.sh", "sleep 600\n")]);
    namespace.of("secrets").create(&json!({"metadata": {"name": "key"}, "stringData": {"pw": "first"}}));
    let fixed = json!({"metadata": {"name": "fixed"}, "data": {"x": "1"}, "immutable": true});
    namespace.of("configmaps").create(&fixed);
    let field = |path: &str, field: &str| json!({"path": path, "fieldRef": {"fieldPath": field}});
    let sources = json!([
        {"downwardAPI": {"items": [field("labels", "metadata.labels"), field("note", "metadata.annotations['note']")]}},
        {"configMap": {"name": "late", "optional": true}},
        {"configMap": {"name": "fixed"}},
        {"secret": {"name": "key", "items": [{"key": "pw", "path": "deep/pw", "mode": 256}]}},
        {"serviceAccountToken": {"path": "token", "expirationSeconds": 600}},
    ]);
    let mut spec = pod_spec("Never", &[sleeper("c1", &[("all", "all")])]);
    volume(&mut spec, "all", json!({"projected": {"sources": sources, "defaultMode": 0o440}}));
    namespace.pod_on(&pilot, "p", spec);
    namespace.wait_phase("p", "Running", seconds(30));
    let at = |name: &str| pilot.pod_directory("p").join("containers/c1/all").join(name);
    assert_eq!(
        (read(&at("labels")), read(&at("note")), read(&at("x"))),
        (String::new(), String::new(), "1".to_owned())
    );
    let review = json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview",
        "spec": {"token": read(&at("token"))}});
    let answer = api::cluster_grouped("authentication.k8s.io/v1", "tokenreviews").create(&review);
    let account = format!("system:serviceaccount:{}:default", namespace.name);
    assert_eq!(answer["status"]["user"]["username"], account.as_str(), "{answer:#}");

    namespace
        .of("pods")
        .merge("p", &json!({"metadata": {"labels": {"color": "red"}, "annotations": {"note": "n1"}}}));
    time_until(&[at("labels")], Some("color=\"red\""));
    assert_eq!(read(&at("note")), "n1", "both at once");
    let mode = std::fs::metadata(at("deep/pw")).unwrap().permissions().mode() & 0o7777;
    assert_eq!((read(&at("deep/pw")), mode), ("first".to_owned(), 0o400));
    namespace.of("secrets").merge("key", &json!({"stringData": {"pw": "second"}}));
    time_until(&[at("deep/pw")], Some("second"));
    namespace.config_map("late", &[("y", "late")]);
    let took = time_until(&[at("y")], Some("late"));
    assert!(took < seconds(2), "{took:?}");
    assert_eq!(read(&at("x")), "1");
    namespace.of("configmaps").delete("late", None);
    time_until(&[at("y")], None);
    assert!(read(&at("token")).split('.').count() == 3);
}

#[test]
fn volumes_are_followed_again_after_a_crash_of_the_pilot() {
    let namespace = Namespace::new("recrash");
    let pilot = Pilot::local(Options::new("recrash"), 600);
    namespace.config_map("script", &[("run.sh", "sleep 600\n")]);
    namespace.config_map("conf", &[("a", "1")]);
    let mut one = sleeper("c1", &[("conf", "conf")]);
    one["volumeMounts"]
        .as_array_mut()
        .unwrap()
        .push(json!({"name": "conf", "mountPath": "copy", "subPath": "a"}));
    namespace.pod_on(&pilot, "p", pod_spec("Never", &[one]));
    namespace.wait_phase("p", "Running", seconds(30));
    let [first] = pilot.stages("pilot")[..] else { panic!("one pilot was expected") };
    kill(Pid::from_raw(first), Signal::SIGKILL).unwrap();
    namespace.of("configmaps").merge("conf", &json!({"data": {"a": "2"}}));
    wait_for("another pilot", seconds(30), || {
        pilot.stages("pilot").first().copied().filter(|second| *second != first)
    });
    let at = |path: &str| pilot.pod_directory("p").join("containers/c1").join(path);
    time_until(&[at("conf/a")], Some("2"));
    namespace.of("configmaps").merge("conf", &json!({"data": {"a": "3"}}));
    time_until(&[at("conf/a")], Some("3"));
    assert_eq!(read(&at("copy")), "1", "what a subPath has copied stays");
}

#[test]
fn without_the_right_to_watch_changes_are_seen_all_the_same() {
    let namespace = Namespace::new("nowatch");
    let rbac = |resource: &str| api::grouped("rbac.authorization.k8s.io/v1", &namespace.name, resource);
    rbac("rolebindings").delete("jiriaf-pilot", None);
    rbac("roles").create(&json!({"metadata": {"name": "get"},
        "rules": [{"apiGroups": [""], "resources": ["configmaps", "secrets"], "verbs": ["get"]}]}));
    rbac("rolebindings").create(&json!({
        "metadata": {"name": "get"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "get"},
        "subjects": [{"kind": "ServiceAccount", "name": "jiriaf-pilot", "namespace": "jiriaf"}]}));
    let pilot = Pilot::local(Options::new("nowatch"), 600);
    namespace.config_map("script", &[("run.sh", "sleep 600\n")]);
    namespace.config_map("conf", &[("a", "1")]);
    namespace.pod_on(&pilot, "p", pod_spec("Never", &[sleeper("c1", &[("conf", "conf")])]));
    namespace.wait_phase("p", "Running", seconds(30));
    wait_until("the pilot says so", seconds(10), || pilot.output().contains("may not be watched"));
    namespace.of("configmaps").merge("conf", &json!({"data": {"a": "2"}}));
    let path = pilot.pod_directory("p").join("containers/c1/conf/a");
    wait_until("the change is seen", seconds(75), || text(&path).as_deref() == Some("2"));
    assert_eq!(pilot.output().matches("may not be watched").count(), 1);
}
