//! Volumes and directories: what a pod gets, and what it cannot reach.

use serde_json::{Value, json};

use crate::harness::{
    ALICE, Namespace, Options, Pilot, as_user, container, pod_spec, read, run, seconds, wait_until,
};

#[test]
fn two_pods_of_one_name_in_two_namespaces_run_side_by_side() {
    let (first, second) = (Namespace::new("same-a"), Namespace::new("same-b"));
    let pilot = Pilot::local(Options::new("same"), 300);
    for (namespace, word) in [(&first, "first"), (&second, "second")] {
        namespace.script_on(&pilot, "p", &format!("echo {word} >word\nsleep 600\n"));
        namespace.wait_phase("p", "Running", seconds(30));
    }
    let uid = second.pod("p").unwrap()["metadata"]["uid"].as_str().unwrap()[..8].to_owned();
    let words = || {
        let word = |directory: &str| {
            std::fs::read_to_string(pilot.home.join(directory).join("containers/c1/word")).ok()
        };
        word("p").zip(word(&format!("p.{uid}")))
    };
    wait_until("both scripts have written", seconds(5), || {
        words() == Some(("first\n".to_owned(), "second\n".to_owned()))
    });
}

#[test]
fn a_pod_named_like_a_directory_of_the_users_own_leaves_it_untouched() {
    let namespace = Namespace::new("own");
    let pilot = Pilot::local(Options::new("own"), 300);
    let own = pilot.home.join("bin");
    let script = format!("mkdir {0} && echo mine >{0}/tool", own.display());
    assert!(run(as_user(ALICE, "sh").args(["-c", &script])).success);
    namespace.script_on(&pilot, "bin", "exit 0\n");
    namespace.wait_phase("bin", "Succeeded", seconds(30));
    namespace.of("pods").delete("bin", None);
    namespace.wait_gone("bin", seconds(20));
    let entries: Vec<_> = std::fs::read_dir(&own).unwrap().flatten().map(|entry| entry.file_name()).collect();
    assert_eq!(entries, ["tool"]);
    assert_eq!(read(&own.join("tool")), "mine\n");
}

#[test]
fn a_mount_path_with_dots_writes_nothing_outside_and_says_why() {
    let namespace = Namespace::new("dots");
    let pilot = Pilot::local(Options::new("dots"), 300);
    namespace.config_map("p", &[("run.sh", "exit 0\n")]);
    let mut outside = container("c1", "p");
    outside["volumeMounts"][0]["mountPath"] = "../../../escaped".into();
    namespace.pod_on(&pilot, "p", pod_spec("Never", &[outside]));
    wait_until("an event or the status names the path", seconds(20), || {
        let status = namespace.pod("p").unwrap_or_default()["status"].to_string();
        status.contains("../escaped")
            || namespace.events("p").iter().any(|(_, message)| message.contains("../escaped"))
    });
    assert!(!pilot.home.join("escaped").exists());
    assert_ne!(namespace.pod("p").unwrap()["status"]["phase"], "Succeeded");
}

#[test]
fn a_secret_that_appears_late_lets_its_pod_start() {
    let namespace = Namespace::new("late");
    let pilot = Pilot::local(Options::new("late"), 300);
    namespace.config_map("p", &[("run.sh", "cat late/key >seen\n")]);
    let mut waits = container("c1", "p");
    waits["volumeMounts"].as_array_mut().unwrap().push(json!({"name": "late", "mountPath": "late"}));
    let mut spec = pod_spec("Never", &[waits]);
    volume(&mut spec, "late", json!({"secret": {"secretName": "wanted-secret"}}));
    namespace.pod_on(&pilot, "p", spec);
    wait_until("an event names the secret", seconds(20), || {
        namespace.events("p").iter().any(|(_, message)| message.contains("wanted-secret"))
    });
    assert_eq!(namespace.pod("p").unwrap()["status"]["phase"], "Pending");
    namespace
        .of("secrets")
        .create(&json!({"metadata": {"name": "wanted-secret"}, "stringData": {"key": "value"}}));
    // Asked for again with a growing delay.
    namespace.wait_phase("p", "Succeeded", seconds(60));
    assert_eq!(read(&pilot.pod_directory("p").join("containers/c1/seen")), "value");
}

#[test]
fn an_optional_config_map_that_is_missing_is_an_empty_directory() {
    let namespace = Namespace::new("optional");
    let pilot = Pilot::local(Options::new("optional"), 300);
    namespace.config_map("p", &[("run.sh", "[ -d perhaps ] && [ -z \"$(ls perhaps)\" ]\n")]);
    let mut reads = container("c1", "p");
    reads["volumeMounts"].as_array_mut().unwrap().push(json!({"name": "perhaps", "mountPath": "perhaps"}));
    let mut spec = pod_spec("Never", &[reads]);
    volume(&mut spec, "perhaps", json!({"configMap": {"name": "perhaps", "optional": true}}));
    namespace.pod_on(&pilot, "p", spec);
    namespace.wait_phase("p", "Succeeded", seconds(30));
}

/// Makes the spec's volume of this name one of this kind.
fn volume(spec: &mut Value, name: &str, kind: Value) {
    for volume in spec["volumes"].as_array_mut().unwrap() {
        if volume["name"] == name {
            *volume = kind.clone();
            volume["name"] = name.into();
        }
    }
}
