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

#[test]
fn items_modes_and_binary_data_are_as_kubernetes_says() {
    let namespace = Namespace::new("items");
    let pilot = Pilot::local(Options::new("items"), 300);
    namespace.config_map(
        "p",
        &[("run.sh", "stat -Lc '%a %n' f/* >$JIRIAF_POD_DIR/modes; cat f/b >$JIRIAF_POD_DIR/b\n")],
    );
    namespace.of("configmaps").create(&json!({"metadata": {"name": "files"},
        "data": {"one": "1", "two": "2"}, "binaryData": {"bytes": "AP8="}}));
    let mut reads = container("c1", "p");
    reads["volumeMounts"].as_array_mut().unwrap().push(json!({"name": "files", "mountPath": "f"}));
    let mut spec = pod_spec("Never", &[reads]);
    let items = json!([{"key": "one", "path": "a", "mode": 0o640}, {"key": "bytes", "path": "b"}]);
    volume(&mut spec, "files", json!({"configMap": {"name": "files", "defaultMode": 0o400, "items": items}}));
    namespace.pod_on(&pilot, "p", spec);
    namespace.wait_phase("p", "Succeeded", seconds(30));
    assert_eq!(read(&pilot.pod_directory("p").join("modes")), "640 f/a\n400 f/b\n");
    assert_eq!(std::fs::read(pilot.pod_directory("p").join("b")).unwrap(), [0, 255]);
}

#[test]
fn a_mount_in_the_home_directory_is_taken_as_written_and_replaces_nothing() {
    let namespace = Namespace::new("home");
    let pilot = Pilot::local(Options::new("home"), 300);
    let keys = pilot.home.join("keys");
    let script = format!("mkdir {0} && echo mine >{0}/own", keys.display());
    assert!(run(as_user(ALICE, "sh").args(["-c", &script])).success);
    namespace.config_map("p", &[("run.sh", "cat ~/keys/new >seen\nsleep 600\n")]);
    let reads = |object: &str| {
        let mut reads = container("c1", "p");
        reads["volumeMounts"].as_array_mut().unwrap().push(json!({"name": object, "mountPath": "~/keys"}));
        pod_spec("Never", &[reads])
    };

    // Beside what is there already.
    namespace.config_map("keys", &[("new", "value")]);
    namespace.pod_on(&pilot, "p", reads("keys"));
    namespace.wait_phase("p", "Running", seconds(30));
    assert_eq!(read(&keys.join("new")), "value");
    wait_until("the script has read it", seconds(10), || {
        std::fs::read_to_string(pilot.pod_directory("p").join("containers/c1/seen"))
            .is_ok_and(|t| t == "value")
    });

    // In the place of the user's own file: never.
    namespace.config_map("own", &[("own", "the pod's")]);
    namespace.pod_on(&pilot, "q", reads("own"));
    wait_until("an event says why it waits", seconds(20), || {
        namespace.events("q").iter().any(|(reason, message)| {
            reason == "FailedMount" && message.contains("keys/own") && message.contains("never replaced")
        })
    });
    assert_eq!(namespace.pod("q").unwrap()["status"]["phase"], "Pending");
    // Nor what another pod has there.
    namespace.pod_on(&pilot, "r", reads("keys"));
    wait_until("an event says why it waits", seconds(20), || {
        namespace.events("r").iter().any(|(_, message)| message.contains("keys/new"))
    });

    for pod in ["q", "r", "p"] {
        namespace.of("pods").delete(pod, Some(1));
        namespace.wait_gone(pod, seconds(20));
    }
    wait_until("the pod's file is gone", seconds(10), || !keys.join("new").exists());
    assert_eq!(read(&keys.join("own")), "mine\n");
}

#[test]
fn a_key_or_a_path_that_would_leave_the_volume_never_gets_to_the_host() {
    let namespace = Namespace::new("leave");
    let pilot = Pilot::local(Options::new("leave"), 300);
    // Kubernetes takes neither such a key nor such a path.
    for key in ["..", "../escaped", "a/../../escaped"] {
        let object = json!({"metadata": {"name": "keys"}, "data": {key: "x"}});
        assert!(namespace.of("configmaps").try_create(&object).is_err(), "{key} was taken");
    }
    namespace.config_map("p", &[("run.sh", "exit 0\n")]);
    let mut spec = pod_spec("Never", &[container("c1", "p")]);
    pilot.place(&mut spec);
    for path in ["../escaped", "a/../../escaped", "/escaped"] {
        let items = json!([{"key": "run.sh", "path": path}]);
        volume(&mut spec, "p", json!({"configMap": {"name": "p", "items": items}}));
        let pod = json!({"metadata": {"name": "p"}, "spec": spec});
        assert!(namespace.of("pods").try_create(&pod).is_err(), "{path} was taken");
    }
}

#[test]
fn a_link_that_a_script_leaves_for_its_next_run_leads_nothing_outside() {
    let namespace = Namespace::new("link");
    let pilot = Pilot::local(Options::new("link"), 300);
    let outside = pilot.home.join("outside");
    // The first run puts a link where the volume is; the second would write through it.
    let script = format!(
        "[ -e $JIRIAF_POD_DIR/once ] && exit 0\ntouch $JIRIAF_POD_DIR/once\nmkdir {0}\nrm -rf f\nln -s {0} f\nexit 1\n",
        outside.display()
    );
    namespace.config_map("p", &[("run.sh", &script)]);
    namespace.config_map("files", &[("planted", "x")]);
    let mut links = container("c1", "p");
    links["volumeMounts"].as_array_mut().unwrap().push(json!({"name": "files", "mountPath": "f"}));
    let spec = pod_spec("OnFailure", &[links]);
    namespace.pod_on(&pilot, "p", spec);
    wait_until("the second run, or a word why not", seconds(60), || {
        let pod = namespace.pod("p").unwrap_or_default();
        pod["status"]["phase"] == "Succeeded" || namespace.events("p").iter().any(|(r, _)| r == "FailedMount")
    });
    assert_eq!(std::fs::read_dir(&outside).unwrap().count(), 0, "something was written through the link");
    namespace.of("pods").delete("p", Some(1));
    namespace.wait_gone("p", seconds(20));
    wait_until("the pod's directory is gone", seconds(10), || !pilot.pod_directory("p").exists());
    assert!(outside.exists(), "what the link leads to is no part of the pod's directory");
}

#[test]
fn containers_of_a_pod_run_side_by_side_and_share_an_empty_directory() {
    let namespace = Namespace::new("two");
    let pilot = Pilot::local(Options::new("two"), 300);
    let waits = "touch shared/$1; until [ -e shared/$2 ]; do sleep 0.05; done; exit $3\n";
    namespace.config_map("p", &[("a.sh", waits), ("z.sh", "exit 99\n")]);
    let two: Vec<Value> = [("c1", ["a", "b", "0"]), ("c2", ["b", "a", "5"])]
        .map(|(name, args)| {
            let mut one = container(name, "p");
            // One of several files.
            one["image"] = "p/a.sh".into();
            one["args"] = json!(args);
            one["volumeMounts"]
                .as_array_mut()
                .unwrap()
                .push(json!({"name": "shared", "mountPath": "shared"}));
            one
        })
        .into();
    let mut spec = pod_spec("Never", &two);
    volume(&mut spec, "shared", json!({"emptyDir": {}}));
    namespace.pod_on(&pilot, "p", spec);
    let pod = namespace.wait_phase("p", "Failed", seconds(30));
    let code =
        |index: usize| pod["status"]["containerStatuses"][index]["state"]["terminated"]["exitCode"].clone();
    assert_eq!((code(0), code(1)), (0.into(), 5.into()), "{:#}", pod["status"]);
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
