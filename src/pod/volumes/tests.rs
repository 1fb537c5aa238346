use std::path::Path;
use std::sync::Arc;

use proptest::prelude::*;
use serde_json::{Value, from_value, json};

use super::*;
use crate::pod::environment::TokenRef;

/// A pod with containers that have these volumeMounts, and these volumes.
pub(super) fn pod(containers: Value, volumes: Value) -> Pod {
    from_value(json!({
        "metadata": {"name": "p", "namespace": "ns", "labels": {"app": "x"}},
        "spec": {"containers": containers, "volumes": volumes},
    }))
    .unwrap()
}

pub(super) fn one(mounts: Value, volumes: Value) -> Pod {
    pod(json!([{"name": "c1", "image": "v", "volumeMounts": mounts}]), volumes)
}

pub(super) fn mount(name: &str, path: &str) -> Value {
    json!({"name": name, "mountPath": path})
}

pub(super) fn objects() -> Objects {
    let mut objects = Objects::default();
    let config = json!({"data": {"b.sh": "echo b", "a.sh": "echo a"}, "binaryData": {"blob": "AAEC"}});
    objects.config_maps.insert("cm".to_owned(), from_value(config).map(Arc::new).unwrap());
    objects
        .config_maps
        .insert("one".to_owned(), from_value(json!({"data": {"s.sh": "x"}})).map(Arc::new).unwrap());
    objects
        .config_maps
        .insert("bad".to_owned(), from_value(json!({"data": {"../x": "x"}})).map(Arc::new).unwrap());
    objects
        .secrets
        .insert("s".to_owned(), from_value(json!({"data": {"pw": "cGFzcw=="}})).map(Arc::new).unwrap());
    let token = TokenRef { audience: None, expiration_seconds: 3607 };
    objects.tokens.insert(token, "tok".to_owned());
    objects
}

fn ground() -> Ground<'static> {
    Ground { directory: Path::new("/pods/p"), home: Path::new("/home/u") }
}

fn planned(pod: &Pod) -> Result<Vec<ContainerPlan>, VolumeError> {
    Ok(all(pod, &objects(), &ground())?.1)
}

/// What the volumes come to, and the plans of all containers.
pub(super) fn all(
    pod: &Pod,
    objects: &Objects,
    ground: &Ground<'_>,
) -> Result<(Contents, Vec<ContainerPlan>), VolumeError> {
    let contents = contents(pod, objects, &Objects::default(), &Facts::default())?.contents;
    let plans = containers::of(pod).map(|(_, container)| {
        let sub_paths = sub_paths(&container, &|_| None).expect("sub paths");
        plan(&container, &contents, &sub_paths, ground)
    });
    let plans = plans.collect::<Result<Vec<_>, _>>()?;
    Ok((contents, plans))
}

/// The files of the only container: root, path, mode, contents.
fn files(pod: &Pod) -> Vec<(Root, String, u32, String)> {
    let (contents, mut plans) = all(pod, &objects(), &ground()).expect("planned");
    let plan = plans.remove(0);
    let shown = plan.files.iter().map(|file| {
        let Content::Files(files) = &contents[&file.volume] else { panic!("{file:?}") };
        let entry = &files[&file.name];
        let path = file.place.path.to_str().unwrap().to_owned();
        (file.place.root, path, entry.mode, String::from_utf8_lossy(&entry.data).into_owned())
    });
    shown.collect()
}

fn file(path: &str, mode: u32, data: &str) -> (Root, String, u32, String) {
    (Root::Container, path.to_owned(), mode, data.to_owned())
}

#[test]
fn config_maps_become_files_with_their_modes() {
    let all = one(json!([mount("v", "stress/job1")]), json!([{"name": "v", "configMap": {"name": "cm"}}]));
    assert_eq!(
        files(&all),
        [
            file("stress/job1/a.sh", 0o644, "echo a"),
            file("stress/job1/b.sh", 0o644, "echo b"),
            file("stress/job1/blob", 0o644, "\0\u{1}\u{2}"),
        ]
    );
    let some = one(
        json!([mount("v", "/etc/x")]),
        json!([{"name": "v", "configMap": {"name": "cm", "defaultMode": 0o600, "items": [
            {"key": "a.sh", "path": "sub/run"}, {"key": "b.sh", "path": "b", "mode": 0o755}]}}]),
    );
    assert_eq!(files(&some), [file("etc/x/b", 0o755, "echo b"), file("etc/x/sub/run", 0o600, "echo a")]);
    let plan = planned(&some).unwrap().remove(0);
    let dirs: Vec<_> = plan.dirs.iter().map(|dir| dir.place.path.to_str().unwrap()).collect();
    assert_eq!(dirs, ["etc", "etc/x"], "each after those above it; what is in a view are links");
}

#[test]
fn secrets_tokens_and_the_downward_api() {
    let secret = one(
        json!([mount("v", "~/keys")]),
        json!([{"name": "v", "secret": {"secretName": "s", "defaultMode": 0o400}}]),
    );
    assert_eq!(files(&secret), [(Root::Home, "keys/pw".to_owned(), 0o400, "pass".to_owned())]);

    let api_access = one(
        json!([mount("v", "/var/run/secrets/kubernetes.io/serviceaccount")]),
        json!([{"name": "v", "projected": {"defaultMode": 0o640, "sources": [
            {"serviceAccountToken": {"path": "token", "expirationSeconds": 3607}},
            {"serviceAccountToken": {"path": "denied", "audience": "vault"}},
            {"configMap": {"name": "one", "items": [{"key": "s.sh", "path": "ca.crt"}]}},
            {"secret": {"name": "gone", "optional": true}},
            {"downwardAPI": {"items": [
                {"path": "namespace", "fieldRef": {"fieldPath": "metadata.namespace"}},
                {"path": "labels", "mode": 0o444, "fieldRef": {"fieldPath": "metadata.labels"}},
                {"path": "cpu", "resourceFieldRef": {"containerName": "c1", "resource": "limits.cpu"}},
            ]}},
        ]}}]),
    );
    let base = "var/run/secrets/kubernetes.io/serviceaccount";
    assert_eq!(
        files(&api_access),
        [
            file(&format!("{base}/ca.crt"), 0o640, "x"),
            file(&format!("{base}/cpu"), 0o640, "0"),
            file(&format!("{base}/labels"), 0o444, "app=\"x\""),
            file(&format!("{base}/namespace"), 0o640, "ns"),
            file(&format!("{base}/token"), 0o640, "tok"),
        ]
    );

    let downward = one(
        json!([mount("v", "info")]),
        json!([{"name": "v", "downwardAPI": {"items": [
            {"path": "name", "fieldRef": {"fieldPath": "metadata.name"}}]}}]),
    );
    assert_eq!(files(&downward), [file("info/name", 0o644, "p")]);
}

#[test]
fn an_empty_dir_is_shared_and_mounts_beneath_it_go_inside() {
    let pod = pod(
        json!([
            {"name": "c1", "volumeMounts": [mount("v", "/data/conf"), mount("e", "/data")]},
            {"name": "c2", "volumeMounts": [mount("e", "a/b"), mount("f", "a/b/c/d")]},
        ]),
        json!([{"name": "e", "emptyDir": {}}, {"name": "f", "emptyDir": {}},
            {"name": "v", "configMap": {"name": "one"}}]),
    );
    let plans = planned(&pod).unwrap();
    let place = |root, path: &str| Place { root, path: PathBuf::from(path) };
    let link = |root, path: &str, volume: &str| PlannedLink {
        place: place(root, path),
        volume: volume.to_owned(),
        sub: PathBuf::new(),
    };
    assert_eq!(plans[0].links, [link(Root::Container, "data", "e")]);
    assert_eq!(plans[0].files[0].place, place(Root::Pod, "volumes/e/conf/s.sh"));
    assert_eq!(plans[1].links, [link(Root::Container, "a/b", "e"), link(Root::Pod, "volumes/e/c/d", "f"),]);
    let shared = |plan: &ContainerPlan| -> Vec<(String, u32)> {
        let dirs = plan.dirs.iter().filter(|dir| dir.place.root == Root::Pod);
        dirs.map(|dir| (dir.place.path.to_str().unwrap().to_owned(), dir.mode)).collect()
    };
    let wanted = |pairs: &[(&str, u32)]| -> Vec<(String, u32)> {
        pairs.iter().map(|(path, mode)| ((*path).to_owned(), *mode)).collect()
    };
    assert_eq!(shared(&plans[0]), wanted(&[("volumes/e/conf", 0o755)]));
    assert_eq!(shared(&plans[1]), wanted(&[("volumes/e/c", 0o755)]));
}

#[test]
fn what_is_mounted_is_named_so_that_a_file_can_be_opened() {
    let mut within = mount("v", "/b");
    within["subPath"] = json!("s");
    for (volume, wanted) in [
        (json!({"name": "v", "hostPath": {"path": "/etc/hosts"}}), ["/etc/hosts", "/etc/hosts/s"]),
        (json!({"name": "v", "emptyDir": {}}), ["/pods/p/volumes/v", "/pods/p/volumes/v/s"]),
    ] {
        let plans = planned(&one(json!([mount("v", "/a"), within]), json!([volume]))).unwrap();
        let sources: Vec<&str> = plans[0].mounts.iter().map(|mount| mount.source.to_str().unwrap()).collect();
        assert_eq!(sources, wanted, "no slash at the end");
    }
}

#[test]
fn what_is_missing_keeps_the_pod_waiting() {
    for (source, wanted) in [
        (
            json!({"configMap": {"name": "gone"}}),
            "MountVolume.SetUp failed for volume \"v\" : configmap \"gone\" not found",
        ),
        (
            json!({"secret": {"secretName": "gone"}}),
            "MountVolume.SetUp failed for volume \"v\" : secret \"gone\" not found",
        ),
        (
            json!({"projected": {"sources": [{"configMap": {"name": "gone"}}]}}),
            "MountVolume.SetUp failed for volume \"v\" : configmap \"gone\" not found",
        ),
        (
            json!({"configMap": {"name": "cm", "items": [{"key": "k", "path": "k"}]}}),
            "MountVolume.SetUp failed for volume \"v\" : configmap references non-existent config key: k",
        ),
        (
            json!({"secret": {"secretName": "s", "items": [{"key": "k", "path": "k"}]}}),
            "MountVolume.SetUp failed for volume \"v\" : references non-existent secret key: k",
        ),
        (
            json!({"configMap": {"name": "bad"}}),
            "MountVolume.SetUp failed for volume \"v\" : invalid path: must not contain '..': ../x",
        ),
        (
            json!({"configMap": {"name": "cm", "items": [{"key": "a.sh", "path": "/a"}]}}),
            "MountVolume.SetUp failed for volume \"v\" : invalid path: must be relative path: /a",
        ),
        (
            json!({"downwardAPI": {"items": [{"path": "x", "fieldRef": {"fieldPath": "spec.x"}}]}}),
            "MountVolume.SetUp failed for volume \"v\" : unsupported fieldPath: spec.x",
        ),
    ] {
        let mut volume = source.clone();
        volume["name"] = json!("v");
        let error = planned(&one(json!([mount("v", "m")]), json!([volume]))).expect_err(wanted);
        assert_eq!(error.to_string(), wanted);
        assert!(error.may_mend());
        assert_eq!(planned(&one(json!([]), json!([volume]))).map(|plans| plans.len()), Ok(1), "not mounted");
    }
    for source in [
        json!({"name": "v", "configMap": {"name": "gone", "optional": true}}),
        json!({"name": "v", "secret": {"secretName": "gone", "optional": true}}),
        json!({"name": "v", "configMap": {"name": "cm", "optional": true, "items": [{"key": "k", "path": "k"}]}}),
    ] {
        let plan = planned(&one(json!([mount("v", "m")]), json!([source]))).expect("optional").remove(0);
        assert!(plan.files.is_empty());
        assert_eq!(plan.dirs.len(), 1, "the mountPath is there all the same");
    }
}

#[test]
fn what_cannot_be_served_is_refused_by_name() {
    let cm = json!({"name": "v", "configMap": {"name": "cm"}});
    let empty = json!({"name": "v", "emptyDir": {}});
    for (mounts, volumes, wanted) in [
        (
            json!([mount("v", "m")]),
            json!([{"name": "v", "emptyDir": {"medium": "HugePages"}}]),
            "medium HugePages",
        ),
        (
            json!([mount("v", "m")]),
            json!([{"name": "v", "projected": {"sources": [{"clusterTrustBundle": {"path": "x"}}]}}]),
            "kind projected.clusterTrustBundle",
        ),
        (
            json!([mount("v", "m")]),
            json!([{"name": "v", "projected": {"sources": [{"podCertificate": {"keyType": "ED25519", "signerName": "a/b"}}]}}]),
            "kind projected.podCertificate",
        ),
        (
            json!([mount("v", "/data"), mount("w", "/data/conf")]),
            json!([{"name": "v", "hostPath": {"path": "/scratch"}}, {"name": "w", "configMap": {"name": "cm"}}]),
            "beneath the hostPath volume \"v\"",
        ),
        (
            json!([mount("v", "~/x")]),
            json!([{"name": "v", "hostPath": {"path": "/scratch"}}]),
            "home directory",
        ),
        (
            json!([mount("v", "m")]),
            json!([{"name": "v", "persistentVolumeClaim": {"claimName": "c"}}]),
            "kind persistentVolumeClaim",
        ),
        (json!([mount("v", "m")]), json!([{"name": "v", "nfs": {"server": "s", "path": "/"}}]), "kind nfs"),
        (json!([mount("v", "a/../../b")]), json!([cm]), "holds `..`"),
        (json!([mount("v", "~/..")]), json!([cm]), "holds `..`"),
        (
            json!([mount("../../v", "m")]),
            json!([{"name": "../../v", "emptyDir": {"medium": "Memory"}}]),
            "DNS label",
        ),
        (json!([mount("w", "m")]), json!([cm]), "no volume of this name"),
        (json!([mount("v", "logs")]), json!([cm]), "logs"),
        (json!([mount("v", "/pgid")]), json!([empty]), "pgid"),
        (json!([mount("v", "etc-hosts")]), json!([empty]), "etc-hosts"),
        (json!([mount("v", "~/x")]), json!([empty]), "home directory"),
        (json!([mount("v", "/")]), json!([empty]), "container's directory itself"),
        (json!([mount("v", "m"), mount("v", "/m/")]), json!([cm]), "same path"),
        (json!([mount("v", "m"), mount("v", "m/a.sh")]), json!([cm]), "same path"),
        (
            json!([mount("v", "m"), mount("w", "/m")]),
            json!([empty, {"name": "w", "emptyDir": {}}]),
            "same path",
        ),
    ] {
        let error = planned(&one(mounts.clone(), volumes)).expect_err(wanted);
        assert!(error.to_string().contains(wanted), "{mounts}: {error}");
        assert!(!error.may_mend(), "{mounts}");
    }
}

#[test]
fn the_script_is_the_volumes_file() {
    let volumes = json!([{"name": "v", "configMap": {"name": "one"}}, {"name": "w", "configMap": {"name": "cm"}},
        {"name": "e", "emptyDir": {}},
        {"name": "tls", "configMap": {"name": "cm", "items": [{"key": "a.sh", "path": "tls.key"}]}},
        {"name": "two", "configMap": {"name": "cm", "items": [
            {"key": "a.sh", "path": "run.sh"}, {"key": "b.sh", "path": "tls.crt"}]}},
        {"name": "keys", "configMap": {"name": "cm", "items": [
            {"key": "a.sh", "path": "monkey.sh"}, {"key": "b.sh", "path": "x.pem"}]}}]);
    let names = ["v", "w", "e", "tls", "two", "keys"];
    let mounts: Vec<Value> = names.iter().map(|name| mount(name, name)).collect();
    let pod = one(json!(mounts), volumes);
    let (contents, plans) = all(&pod, &objects(), &ground()).unwrap();
    let chosen = |image: &str| {
        let mut container = pod.spec.as_ref().unwrap().containers[0].clone();
        container.image = Some(image.to_owned());
        let mut contents = contents.clone();
        script(&container, &plans[0], &mut contents).map(|script| {
            let (volume, name) = script.follows.expect("it follows its volume");
            for (other, content) in &contents {
                let Content::Files(files) = content else { continue };
                for (file, entry) in files {
                    let wanted = if (other, file) == (&volume, &name) { 0o755 } else { 0o644 };
                    assert_eq!(entry.mode, wanted, "{other}/{file}");
                }
            }
            script.place.path.to_str().unwrap().to_owned()
        })
    };
    for (image, wanted) in [
        ("v", "v/s.sh"),
        ("w/a.sh", "w/a.sh"),
        ("w", "w/blob"),
        ("tls", "tls/tls.key"),
        ("two", "two/run.sh"),
        ("two/tls.crt", "two/tls.crt"),
        ("keys/monkey.sh", "keys/monkey.sh"),
    ] {
        assert_eq!(chosen(image).as_deref(), Ok(wanted), "{image}");
    }
    for (image, wanted) in [
        ("nginx:latest", "must be one of v, w, e, tls, two, keys"),
        ("", "names none of the container's volumeMounts"),
        ("docker.io/nginx", "names none"),
        ("v/other.sh", "has no file \"other.sh\": it has s.sh"),
        ("e", "it has no files"),
        ("keys", "it has monkey.sh, x.pem"),
    ] {
        let error = chosen(image).expect_err(image).to_string();
        assert!(error.contains(wanted), "{image}: {error}");
    }
}

#[test]
fn a_script_is_executable_for_its_readers_alone() {
    let volume = json!([{"name": "v", "configMap": {"name": "one", "defaultMode": 0o640}}]);
    let pod = one(json!([mount("v", "v")]), volume);
    let (mut contents, plans) = all(&pod, &objects(), &ground()).unwrap();
    script(&pod.spec.as_ref().unwrap().containers[0], &plans[0], &mut contents).unwrap();
    let Content::Files(files) = &contents["v"] else { panic!("{contents:?}") };
    assert_eq!(files["s.sh"].mode, 0o750);
}

#[test]
fn a_files_contents_are_never_shown() {
    let pod = one(json!([mount("v", "v")]), json!([{"name": "v", "secret": {"secretName": "s"}}]));
    let shown = format!("{:?}", all(&pod, &objects(), &ground()).unwrap());
    assert!(!shown.contains("pass") && !shown.contains("112"), "{shown}");
}

#[test]
fn a_volume_whose_object_is_gone_stays_as_it_was_made() {
    let volumes = json!([
        {"name": "v", "secret": {"secretName": "s"}},
        {"name": "w", "configMap": {"name": "one", "items": [{"key": "s.sh", "path": "s.sh"}]}},
        {"name": "x", "configMap": {"name": "cm"}},
    ]);
    let pod = one(json!([mount("v", "v"), mount("w", "w"), mount("x", "x")]), volumes);
    let (last, mut now) = (objects(), objects());
    now.secrets.remove("s");
    let other = json!({"data": {"other": "y"}});
    now.config_maps.insert("one".to_owned(), from_value(other.clone()).map(Arc::new).unwrap());
    now.config_maps.insert("cm".to_owned(), from_value(other).map(Arc::new).unwrap());
    let found = contents(&pod, &now, &last, &Facts::default()).unwrap();
    let names = |volume: &str| match &found.contents[volume] {
        Content::Files(files) => files.keys().cloned().collect::<Vec<_>>(),
        other => panic!("{other:?}"),
    };
    assert_eq!(
        (names("v"), names("w"), names("x")),
        (vec!["pw".into()], vec!["s.sh".into()], vec!["other".into()])
    );
    let kept: Vec<String> = found.kept.values().map(ToString::to_string).collect();
    assert_eq!(kept.len(), 2, "{kept:?}");
    assert!(kept[0].contains("secret \"s\" not found") && kept[1].contains("s.sh"), "{kept:?}");
    // What was never there is waited for.
    assert!(contents(&pod, &now, &Objects::default(), &Facts::default()).is_err());
}

#[test]
fn what_an_ephemeral_container_alone_mounts_keeps_nobody_else_waiting() {
    let volumes =
        json!([{"name": "v", "configMap": {"name": "cm"}}, {"name": "gone", "secret": {"secretName": "g"}}]);
    let mut pod = one(json!([mount("v", "v")]), volumes);
    let debugger = json!([{"name": "d", "volumeMounts": [mount("gone", "g"), mount("v", "v")]}]);
    pod.spec.as_mut().unwrap().ephemeral_containers = from_value(debugger).unwrap();
    let found = contents(&pod, &objects(), &Objects::default(), &Facts::default()).unwrap();
    assert!(found.contents.contains_key("v") && found.left_out.contains_key("gone"), "{found:?}");
    // What another mounts too is waited for.
    let shared = json!([{"name": "c1", "volumeMounts": [mount("gone", "g")]}]);
    pod.spec.as_mut().unwrap().containers = from_value(shared).unwrap();
    assert!(contents(&pod, &objects(), &Objects::default(), &Facts::default()).is_err());
}

fn beneath(place: &Place) -> bool {
    place.path.components().all(|component| matches!(component, std::path::Component::Normal(_)))
}

proptest! {
    #[test]
    fn nothing_planned_ever_leaves_its_root(
        paths in prop::collection::vec("[./~ab]{0,8}", 1..4),
        kinds in prop::collection::vec(0..5u8, 4),
        subs in prop::collection::vec(prop::option::of("[./ab]{0,5}"), 4),
        keys in prop::collection::vec("[./ab]{0,6}", 1..3),
    ) {
        let mut objects = Objects::default();
        let data: serde_json::Map<String, Value> =
            keys.iter().map(|key| (key.clone(), json!("x"))).collect();
        objects.config_maps.insert("cm".to_owned(), from_value(json!({"data": data})).map(Arc::new).unwrap());
        let mounts: Vec<Value> = (0..paths.len())
            .map(|n| json!({"name": format!("v{n}"), "mountPath": paths[n], "subPath": subs[n]}))
            .collect();
        let volumes: Vec<Value> = (0..paths.len())
            .map(|n| {
                let mut volume = match kinds[n] {
                    0 => json!({"emptyDir": {}}),
                    1 => json!({"emptyDir": {"medium": "Memory"}}),
                    2 => json!({"hostPath": {"path": format!("/{}", paths[n])}}),
                    _ => json!({"configMap": {"name": "cm"}}),
                };
                volume["name"] = json!(format!("v{n}"));
                volume
            })
            .collect();
        let pod = one(json!(mounts), json!(volumes));
        if sub_paths(&pod.spec.as_ref().unwrap().containers[0], &|_| None).is_err() {
            return Ok(());
        }
        let Ok((_, plans)) = all(&pod, &objects, &ground()) else {
            return Ok(());
        };
        for plan in &plans {
            prop_assert!(plan.files.iter().all(|file| beneath(&file.place)));
            prop_assert!(plan.dirs.iter().all(|dir| beneath(&dir.place)));
            prop_assert!(plan.links.iter().all(|link| beneath(&link.place)));
            prop_assert!(plan.views.iter().all(|view| beneath(&view.place)));
            prop_assert!(plan.mounts.iter().all(|mount| mount.target.is_absolute() && mount.source.is_absolute()));
        }
    }
}
