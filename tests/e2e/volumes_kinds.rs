//! Kinds of volumes, what of them is mounted, and what a securityContext may ask for.

use std::os::unix::fs::MetadataExt as _;

use serde_json::{Value, json};

use crate::harness::{
    ALICE, Namespace, Options, Pilot, as_user, container, pod_spec, read, run, seconds, shared_directory,
    unique, wait_until,
};

/// A pod of one container that runs this script, with these volumes and mounts beside the script's.
fn with(namespace: &Namespace, pilot: &Pilot, script: &str, mounts: Value, volumes: Value) {
    pod(namespace, pilot, "p", script, mounts, volumes, &json!({}));
}

fn pod(
    namespace: &Namespace,
    pilot: &Pilot,
    name: &str,
    script: &str,
    mounts: Value,
    volumes: Value,
    security: &Value,
) {
    namespace.config_map(name, &[("run.sh", script)]);
    let mut one = container("c1", name);
    one["env"] = json!([{"name": "POD", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
        {"name": "EMPTY", "value": ""}]);
    one["volumeMounts"].as_array_mut().unwrap().extend(mounts.as_array().unwrap().clone());
    if let Some(own) = security.get("container") {
        one["securityContext"] = own.clone();
    }
    let mut spec = pod_spec("Never", &[one]);
    spec["volumes"] = json!([{"name": name, "configMap": {"name": name}}]);
    spec["volumes"].as_array_mut().unwrap().extend(volumes.as_array().unwrap().clone());
    if let Some(whole) = security.get("pod") {
        spec["securityContext"] = whole.clone();
    }
    namespace.pod_on(pilot, name, spec);
}

#[test]
fn host_paths_are_reached_and_one_that_is_not_what_the_pod_says_waits() {
    let namespace = Namespace::new("hostpath");
    let pilot = Pilot::local(Options::new("hostpath"), 600);
    let scratch = pilot.home.join("scratch");
    assert!(
        run(as_user(ALICE, "sh").args(["-c", &format!("mkdir {0}; echo x >{0}/file", scratch.display())]))
            .success
    );
    let mounts = json!([{"name": "d", "mountPath": "/scratch"}, {"name": "f", "mountPath": "one"},
        {"name": "new", "mountPath": "new"}, {"name": "null", "mountPath": "null"}]);
    let host =
        |name: &str, path: &str, kind: &str| json!({"name": name, "hostPath": {"path": path, "type": kind}});
    let scratch_path = scratch.display().to_string();
    let volumes = json!([
        host("d", &scratch_path, ""),
        host("f", &format!("{scratch_path}/file"), "File"),
        host("new", &format!("{scratch_path}/made/deep"), "DirectoryOrCreate"),
        host("null", "/dev/null", "CharDevice"),
    ]);
    with(&namespace, &pilot, "cat one >scratch/copy; echo y >new/result; echo z >null\n", mounts, volumes);
    namespace.wait_phase("p", "Succeeded", seconds(30));
    assert_eq!(read(&scratch.join("copy")), "x\n");
    assert_eq!(read(&scratch.join("made/deep/result")), "y\n");

    let volumes = json!([host("d", &format!("{scratch_path}/later"), "Directory")]);
    pod(&namespace, &pilot, "q", "exit 0\n", json!([{"name": "d", "mountPath": "d"}]), volumes, &json!({}));
    let wanted = format!(
        "MountVolume.SetUp failed for volume \"d\" : hostPath type check failed: {scratch_path}/later is not a directory"
    );
    wait_until("an event says what it is not", seconds(20), || {
        namespace.events("q").contains(&("FailedMount".to_owned(), wanted.clone()))
    });
    assert!(run(as_user(ALICE, "mkdir").arg(scratch.join("later"))).success);
    namespace.wait_phase("q", "Succeeded", seconds(30));
    namespace.of("pods").delete("p", Some(1));
    namespace.wait_gone("p", seconds(20));
    assert_eq!(read(&scratch.join("file")), "x\n", "what is the host's stays");
}

#[test]
fn sub_paths_choose_what_is_mounted_and_a_missing_variable_keeps_the_container_waiting() {
    let namespace = Namespace::new("subpath");
    let pilot = Pilot::local(Options::new("subpath"), 600);
    namespace.config_map("conf", &[("a", "1"), ("b", "2")]);
    let mounts = json!([
        {"name": "e", "mountPath": "/out", "subPathExpr": "all/$(POD)"},
        {"name": "e", "mountPath": "whole"},
        {"name": "conf", "mountPath": "/etc/app/a.conf", "subPath": "a"},
    ]);
    let volumes = json!([{"name": "e", "emptyDir": {}}, {"name": "conf", "configMap": {"name": "conf"}}]);
    let script = "echo said >out/x && [ $(cat whole/all/p/x) = said ] && [ $(cat etc/app/a.conf) = 1 ]
[ $? = 0 ] && [ ! -L etc/app/a.conf ] && [ ! -e etc/app/b ]\n";
    with(&namespace, &pilot, script, mounts, volumes.clone());
    namespace.wait_phase("p", "Succeeded", seconds(30));

    let mounts = json!([{"name": "e", "mountPath": "/out", "subPathExpr": "$(EMPTY)/x"}]);
    pod(&namespace, &pilot, "q", "exit 0\n", mounts, volumes, &json!({}));
    wait_until("the container says what is missing", seconds(20), || {
        let pod = namespace.pod("q").unwrap();
        let waiting = &pod["status"]["containerStatuses"][0]["state"]["waiting"];
        waiting["reason"] == "CreateContainerConfigError" && waiting["message"] == "missing value for EMPTY"
    });
    assert_eq!(namespace.pod("q").unwrap()["status"]["phase"], "Pending");
}

#[test]
fn a_directory_in_memory_is_private_shared_by_the_pod_and_gone_with_its_end() {
    let namespace = Namespace::new("memory");
    let pilot = Pilot::local(Options::new("memory"), 600);
    let mark = unique("in-memory");
    let mounts = json!([{"name": "m", "mountPath": "/cache"}]);
    let volumes = json!([{"name": "m", "emptyDir": {"medium": "Memory", "sizeLimit": "64Mi"}}]);
    let script = format!(
        "echo x >cache/{mark}; readlink -f cache >$JIRIAF_POD_DIR/place; until [ -e go ]; do sleep 0.1; done\n"
    );
    with(&namespace, &pilot, &script, mounts, volumes);
    namespace.wait_phase("p", "Running", seconds(30));
    let place = pilot.pod_directory("p").join("place");
    wait_until("the script has written", seconds(10), || place.exists() && !read(&place).is_empty());
    let place = std::path::PathBuf::from(read(&place).trim_end());
    assert!(place.starts_with("/dev/shm") && place.join(&mark).exists(), "{}", place.display());
    let parent = place.parent().unwrap().parent().unwrap();
    assert_eq!(std::fs::metadata(parent).unwrap().mode() & 0o7777, 0o700);
    std::fs::write(pilot.pod_directory("p").join("containers/c1/go"), "").unwrap();
    namespace.wait_phase("p", "Succeeded", seconds(20));
    wait_until("it is gone, though the pod is still there", seconds(10), || !place.exists());
    assert!(pilot.pod_directory("p").exists());
}

#[test]
fn a_directory_that_grows_over_its_limit_is_found() {
    let namespace = Namespace::new("limit");
    let pilot = Pilot::local(Options::new("limit"), 600);
    let mounts = json!([{"name": "small", "mountPath": "/small"}]);
    let volumes = json!([{"name": "small", "emptyDir": {"sizeLimit": "1Mi"}}]);
    with(&namespace, &pilot, "head -c 2M /dev/zero >small/x; sleep 600\n", mounts, volumes);
    namespace.wait_phase("p", "Running", seconds(30));
    let wanted = "Usage of EmptyDir volume \"small\" exceeds the limit \"1Mi\". ".to_owned();
    wait_until("the pod is told to be evicted", seconds(30), || {
        namespace.events("p").contains(&("Evicted".to_owned(), wanted.clone()))
    });
}

#[test]
fn a_container_that_writes_more_than_its_ephemeral_storage_limit_is_evicted() {
    let namespace = Namespace::new("scratch");
    let pilot = Pilot::local(Options::new("scratch"), 600);
    namespace.config_map("p", &[("run.sh", "head -c 3M /dev/zero >file; sleep 600\n")]);
    let mut one = container("c1", "p");
    one["resources"] = json!({"limits": {"ephemeral-storage": "2Mi"}});
    namespace.pod_on(&pilot, "p", pod_spec("Never", &[one]));
    let pod = namespace.wait_phase("p", "Failed", seconds(40));
    assert_eq!(pod["status"]["reason"], "Evicted", "{:#}", pod["status"]);
    // All containers' limit together is the pod's, which is looked at first.
    let wanted = "Pod ephemeral local storage usage exceeds the total limit of containers 2Mi. ";
    assert_eq!(pod["status"]["message"], wanted, "{:#}", pod["status"]);
}

#[test]
fn pods_live_where_a_variable_of_the_job_says() {
    let namespace = Namespace::new("tmpdir");
    let scratch = shared_directory();
    std::fs::set_permissions(scratch.path(), std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
    let options = Options::new("tmpdir")
        .env("SLURM_TMPDIR", scratch.path().to_str().unwrap())
        .env("JIRIAF_PODS_DIR", "$SLURM_TMPDIR/pods");
    let pilot = Pilot::local(options, 600);
    namespace.script_on(&pilot, "p", "pwd >$JIRIAF_POD_DIR/where\n");
    namespace.wait_phase("p", "Succeeded", seconds(30));
    let place = scratch.path().join("pods/p");
    assert_eq!(read(&place.join("where")).trim(), place.join("containers/c1").to_str().unwrap());
}

#[test]
fn a_security_context_is_honoured_harmless_or_refused_by_name() {
    let namespace = Namespace::new("security");
    let pilot = Pilot::local(Options::new("security"), 600);
    let id = |flag: &str| run(as_user(ALICE, "id").arg(flag)).text.trim().parse::<i64>().unwrap();
    let (user, group) = (id("-u"), id("-g"));
    let honoured = json!({
        "pod": {"runAsUser": user, "runAsGroup": group, "runAsNonRoot": true, "fsGroup": group,
            "seccompProfile": {"type": "RuntimeDefault"}},
        "container": {"allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]}, "readOnlyRootFilesystem": true},
    });
    let script = "grep -q 'NoNewPrivs:\t1' /proc/self/status && [ $(stat -c %a e/) = 2777 ]\n";
    let mounts = json!([{"name": "e", "mountPath": "e"}]);
    pod(&namespace, &pilot, "p", script, mounts, json!([{"name": "e", "emptyDir": {}}]), &honoured);
    namespace.wait_phase("p", "Succeeded", seconds(30));

    for (name, security, wanted) in [
        ("user", json!({"pod": {"runAsUser": 4242}}), "spec.securityContext.runAsUser: 4242"),
        ("group", json!({"pod": {"fsGroup": 4242}}), "spec.securityContext.fsGroup: 4242"),
        (
            "added",
            json!({"container": {"capabilities": {"add": ["NET_ADMIN"]}}}),
            "spec.containers[0].securityContext.capabilities.add: NET_ADMIN",
        ),
    ] {
        pod(&namespace, &pilot, name, "exit 0\n", json!([]), json!([]), &security);
        let pod = namespace.wait_phase(name, "Failed", seconds(30));
        assert_eq!(pod["status"]["reason"], "UnsupportedPodSpec", "{:#}", pod["status"]);
        let message = pod["status"]["message"].as_str().unwrap_or_default();
        assert!(message.contains(wanted), "{message}");
    }
}
