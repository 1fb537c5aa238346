use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt as _, symlink};

use proptest::prelude::*;
use serde_json::{Value, from_value, json};

use super::*;
use crate::pod::environment::TokenRef;

/// A pod with containers that have these volumeMounts, and these volumes.
fn pod(containers: Value, volumes: Value) -> Pod {
    from_value(json!({
        "metadata": {"name": "p", "namespace": "ns", "labels": {"app": "x"}},
        "spec": {"containers": containers, "volumes": volumes},
    }))
    .unwrap()
}

fn one(mounts: Value, volumes: Value) -> Pod {
    pod(json!([{"name": "c1", "image": "v", "volumeMounts": mounts}]), volumes)
}

fn mount(name: &str, path: &str) -> Value {
    json!({"name": name, "mountPath": path})
}

fn objects() -> Objects {
    let mut objects = Objects::default();
    let config = json!({"data": {"b.sh": "echo b", "a.sh": "echo a"}, "binaryData": {"blob": "AAEC"}});
    objects.config_maps.insert("cm".to_owned(), from_value(config).unwrap());
    objects.config_maps.insert("one".to_owned(), from_value(json!({"data": {"s.sh": "x"}})).unwrap());
    objects.config_maps.insert("bad".to_owned(), from_value(json!({"data": {"../x": "x"}})).unwrap());
    objects.secrets.insert("s".to_owned(), from_value(json!({"data": {"pw": "cGFzcw=="}})).unwrap());
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
fn all(
    pod: &Pod,
    objects: &Objects,
    ground: &Ground<'_>,
) -> Result<(Contents, Vec<ContainerPlan>), VolumeError> {
    let contents = contents(pod, objects, &Facts::default())?;
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
        (json!([mount("w", "m")]), json!([cm]), "no volume of this name"),
        (json!([mount("v", "logs")]), json!([cm]), "logs"),
        (json!([mount("v", "/pgid")]), json!([empty]), "pgid"),
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

fn beneath(place: &Place) -> bool {
    place.path.components().all(|component| matches!(component, std::path::Component::Normal(_)))
}

proptest! {
    #[test]
    fn nothing_planned_ever_leaves_its_root(
        paths in prop::collection::vec("[./~ab]{0,8}", 1..4),
        kinds in prop::collection::vec(any::<bool>(), 4),
        keys in prop::collection::vec("[./ab]{0,6}", 1..3),
    ) {
        let mut objects = Objects::default();
        let data: serde_json::Map<String, Value> =
            keys.iter().map(|key| (key.clone(), json!("x"))).collect();
        objects.config_maps.insert("cm".to_owned(), from_value(json!({"data": data})).unwrap());
        let mounts: Vec<Value> =
            paths.iter().enumerate().map(|(index, path)| mount(&format!("v{index}"), path)).collect();
        let volumes: Vec<Value> = (0..paths.len())
            .map(|index| {
                let name = format!("v{index}");
                if kinds[index] {
                    json!({"name": name, "emptyDir": {}})
                } else {
                    json!({"name": name, "configMap": {"name": "cm"}})
                }
            })
            .collect();
        let Ok((_, plans)) = all(&one(json!(mounts), json!(volumes)), &objects, &ground()) else {
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

// ---- on disk ----

/// A pod's directory and a home directory.
struct Disk {
    pod: tempfile::TempDir,
    home: tempfile::TempDir,
    uid: String,
}

impl Disk {
    fn new(uid: &str) -> Self {
        let new = || tempfile::tempdir().unwrap();
        Self { pod: new(), home: new(), uid: format!("test-{uid}-{}", std::process::id()) }
    }

    fn ground(&self) -> Ground<'_> {
        Ground { directory: self.pod.path(), home: self.home.path() }
    }

    fn target(&self) -> Target<'_> {
        Target { ground: self.ground(), uid: &self.uid, group: None }
    }

    /// Writes what the pod's volumes come to; the containers in `running` run.
    fn write(
        &self,
        pod: &Pod,
        objects: &Objects,
        running: &[&str],
    ) -> Result<(Vec<ContainerPlan>, BTreeMap<String, SubPathError>), String> {
        let (contents, mut plans) = all(pod, objects, &self.ground()).map_err(|error| error.to_string())?;
        let running = running.iter().map(|name| (*name).to_owned()).collect();
        let problems =
            write(&self.target(), &contents, &mut plans, &running).map_err(|error| error.to_string())?;
        Ok((plans, problems))
    }

    /// What the keeper does when objects have changed.
    fn update(&self, pod: &Pod, plans: &[ContainerPlan], objects: &Objects) {
        let contents = contents(pod, objects, &Facts::default()).unwrap();
        let failed = super::write::update(&self.target(), &contents, &Layout::of(plans, std::iter::empty()));
        assert!(failed.is_empty(), "{failed:?}");
    }

    fn at(&self, container: &str, path: &str) -> PathBuf {
        container_dir(self.pod.path(), container).join(path)
    }

    fn read(&self, container: &str, path: &str) -> Option<String> {
        fs::read_to_string(self.at(container, path)).ok()
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = memory::remove(&self.uid);
    }
}

fn with(data: Value) -> Objects {
    let mut objects = objects();
    objects.config_maps.insert("cm".to_owned(), from_value(json!({"data": data})).unwrap());
    objects
}

#[test]
fn one_rename_updates_all_containers_and_names_follow() {
    let disk = Disk::new("follow");
    let volumes = json!([{"name": "v", "configMap": {"name": "cm"}}, {"name": "e", "emptyDir": {}}]);
    let pod = pod(
        json!([
            {"name": "c1", "volumeMounts": [mount("v", "/etc/x")]},
            {"name": "c2", "volumeMounts": [mount("e", "data"), mount("v", "data/conf"), mount("v", "~/keys")]},
            {"name": "c3", "volumeMounts": [{"name": "v", "mountPath": "one", "subPath": "a"}]},
        ]),
        volumes,
    );
    let (plans, problems) = disk.write(&pod, &with(json!({"a": "1", "b": "1"})), &[]).unwrap();
    assert!(problems.is_empty());
    let seen = |path: &str| {
        [disk.read("c1", &format!("etc/x/{path}")), disk.read("c2", &format!("data/conf/{path}"))]
    };
    let is = |text: Option<&str>| [text.map(str::to_owned), text.map(str::to_owned)];
    assert_eq!((seen("a"), seen("b")), (is(Some("1")), is(Some("1"))));
    assert_eq!(disk.read("c3", "one").as_deref(), Some("1"));
    let link = |path: &Path| fs::read_link(path).unwrap();
    assert_eq!(link(&disk.at("c1", "etc/x/..data")), Path::new("../../../../volumes/v/..data"));
    assert_eq!(link(&disk.at("c1", "etc/x/a")), Path::new("..data/a"));
    assert_eq!(link(&disk.pod.path().join("volumes/e/conf/..data")), Path::new("../../../volumes/v/..data"));
    fs::write(disk.at("c1", "etc/x/result"), "mine").unwrap();
    fs::write(disk.home.path().join("keys/own"), "mine").unwrap();

    disk.update(&pod, &plans, &with(json!({"a": "2", "c": "2"})));
    assert_eq!((seen("a"), seen("b"), seen("c")), (is(Some("2")), is(None), is(Some("2"))));
    assert_eq!(disk.read("c3", "one").as_deref(), Some("1"), "a subPath does not follow");
    assert_eq!(disk.read("c1", "etc/x/result").as_deref(), Some("mine"));
    let home = |name: &str| fs::read_to_string(disk.home.path().join("keys").join(name)).ok();
    assert_eq!((home("a").as_deref(), home("b"), home("c").as_deref()), (Some("2"), None, Some("2")));
    assert_eq!(home("own").as_deref(), Some("mine"));

    // The next start of one container leaves what another has copied.
    disk.write(&pod, &with(json!({"a": "3"})), &["c3"]).unwrap();
    assert_eq!(disk.read("c3", "one").as_deref(), Some("1"));
    disk.write(&pod, &with(json!({"a": "3"})), &[]).unwrap();
    assert_eq!(disk.read("c3", "one").as_deref(), Some("3"));
}

#[test]
fn a_large_config_map_of_many_containers_is_on_disk_once() {
    let disk = Disk::new("large");
    let containers: Vec<Value> =
        (0..20).map(|n| json!({"name": format!("c{n}"), "volumeMounts": [mount("v", "/etc/x")]})).collect();
    let pod = pod(json!(containers), json!([{"name": "v", "configMap": {"name": "cm"}}]));
    disk.write(&pod, &with(json!({"big": "x".repeat(1 << 20)})), &[]).unwrap();
    assert_eq!(disk.read("c19", "etc/x/big").map(|text| text.len()), Some(1 << 20));
    assert!(usage::used(disk.pod.path(), u64::MAX) < 2 << 20);
}

#[test]
fn sub_paths_of_directories_are_made_and_never_leave_them() {
    let (disk, outside) = (Disk::new("sub"), tempfile::tempdir().unwrap());
    let host = tempfile::tempdir().unwrap();
    fs::write(host.path().join("file"), "the host's").unwrap();
    symlink(outside.path(), host.path().join("out")).unwrap();
    let sub = |name: &str, path: &str, sub: &str| json!({"name": name, "mountPath": path, "subPath": sub});
    let pod = pod(
        json!([
            {"name": "c1", "volumeMounts": [sub("e", "/data", "a/b"), sub("h", "/file", "file"), mount("h", "/host")]},
            {"name": "c2", "volumeMounts": [sub("h", "/x", "out/made")]},
            {"name": "c3", "volumeMounts": [mount("v", "/data/conf"), sub("e", "/data", "c")]},
        ]),
        json!([
            {"name": "e", "emptyDir": {}},
            {"name": "h", "hostPath": {"path": host.path(), "type": "Directory"}},
            {"name": "v", "configMap": {"name": "one"}},
        ]),
    );
    let (plans, problems) = disk.write(&pod, &objects(), &[]).unwrap();
    assert_eq!(problems.keys().collect::<Vec<_>>(), ["c2"], "{problems:?}");
    let problem = problems["c2"].to_string();
    assert!(
        problem.starts_with("failed to create subPath directory for volumeMount \"h\" of container \"c2\""),
        "{problem}"
    );
    assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 0);
    assert_eq!(fs::read_link(disk.at("c1", "data")).unwrap(), Path::new("../../volumes/e/a/b"));
    assert_eq!(fs::metadata(disk.pod.path().join("volumes/e/a/b")).unwrap().mode() & 0o7777, 0o777);
    assert_eq!(disk.read("c1", "file").as_deref(), Some("the host's"));
    assert_eq!(fs::read_link(disk.at("c1", "host")).unwrap(), host.path());
    assert_eq!(disk.read("c3", "data/conf/s.sh").as_deref(), Some("x"));
    let real = |path: &Path| fs::canonicalize(path).unwrap();
    let mounts: Vec<(PathBuf, PathBuf)> =
        plans[0].mounts.iter().map(|mount| (mount.target.clone(), mount.source.clone())).collect();
    assert_eq!(
        mounts,
        [
            (PathBuf::from("/data"), real(&disk.pod.path().join("volumes/e/a/b"))),
            (PathBuf::from("/file"), real(&host.path().join("file"))),
            (PathBuf::from("/host"), real(host.path())),
        ]
    );
}

#[test]
fn sub_paths_of_files_are_a_file_a_directory_or_an_empty_one() {
    let disk = Disk::new("copies");
    let items = json!([{"key": "a.sh", "path": "d/x"}, {"key": "b.sh", "path": "d/e/y"}]);
    let sub = |path: &str, sub: &str| json!({"name": "v", "mountPath": path, "subPath": sub});
    let pod = one(
        json!([sub("m1", "d"), sub("m2/f", "d/e/y"), sub("m3", "none")]),
        json!([{"name": "v", "configMap": {"name": "cm", "items": items}}]),
    );
    let (plans, _) = disk.write(&pod, &objects(), &[]).unwrap();
    assert_eq!(disk.read("c1", "m1/x").as_deref(), Some("echo a"));
    assert_eq!(disk.read("c1", "m1/e/y").as_deref(), Some("echo b"));
    assert_eq!(disk.read("c1", "m2/f").as_deref(), Some("echo b"));
    assert_eq!(fs::read_dir(disk.at("c1", "m3")).unwrap().count(), 0);
    assert!(plans[0].mounts.iter().all(|mount| mount.read_only));
    // Relative mountPaths are beneath the container's directory also there.
    assert_eq!(plans[0].mounts[0].target, disk.at("c1", "m1"));
}

#[test]
fn an_empty_dir_in_memory_is_reached_by_links_and_goes() {
    let disk = Disk::new("memory");
    let pod = pod(
        json!([
            {"name": "c1", "volumeMounts": [mount("e", "/data"), mount("v", "/data/conf")]},
            {"name": "c2", "volumeMounts": [mount("e", "data")]},
        ]),
        json!([{"name": "e", "emptyDir": {"medium": "Memory"}}, {"name": "v", "configMap": {"name": "one"}}]),
    );
    let (plans, _) = disk.write(&pod, &objects(), &[]).unwrap();
    fs::write(disk.at("c1", "data/x"), "shared").unwrap();
    assert_eq!(disk.read("c2", "data/x").as_deref(), Some("shared"));
    assert_eq!(disk.read("c2", "data/conf/s.sh").as_deref(), Some("x"), "what is mounted beneath is in it");
    let real = fs::canonicalize(disk.at("c1", "data")).unwrap();
    assert!(real.starts_with("/dev/shm") && plans[0].mounts[0].source == real, "{}", real.display());
    disk.write(&pod, &objects(), &[]).unwrap();
    assert_eq!(disk.read("c1", "data/x").as_deref(), Some("shared"), "another start leaves it");
    memory::remove(&disk.uid).unwrap();
    assert!(!real.exists());
}

#[test]
fn host_paths_are_what_the_pod_says_or_the_pod_waits() {
    let (disk, host) = (Disk::new("host"), tempfile::tempdir().unwrap());
    let of = |path: &Path, kind: &str| {
        one(json!([mount("v", "m")]), json!([{"name": "v", "hostPath": {"path": path, "type": kind}}]))
    };
    let gone = host.path().join("gone");
    let error = disk.write(&of(&gone, "Directory"), &objects(), &[]).unwrap_err();
    let wanted = format!(
        "MountVolume.SetUp failed for volume \"v\" : hostPath type check failed: {} is not a directory",
        gone.display()
    );
    assert_eq!(error, wanted);
    disk.write(&of(&gone, "DirectoryOrCreate"), &objects(), &[]).unwrap();
    fs::write(disk.at("c1", "m/x"), "y").unwrap();
    assert_eq!(fs::read_to_string(gone.join("x")).unwrap(), "y");
}

#[test]
fn volumes_of_an_fs_group_are_the_groups() {
    let disk = Disk::new("group");
    let group = nix::unistd::getegid().as_raw();
    let mut pod = one(
        json!([mount("v", "m"), mount("e", "e"), mount("t", "t")]),
        json!([{"name": "v", "configMap": {"name": "one", "defaultMode": 0o600}}, {"name": "e", "emptyDir": {}},
            {"name": "t", "projected": {"sources": [{"serviceAccountToken": {"path": "token", "expirationSeconds": 3607}}]}}]),
    );
    pod.spec.as_mut().unwrap().security_context = from_value(json!({"fsGroup": group})).unwrap();
    let (contents, mut plans) = all(&pod, &objects(), &disk.ground()).unwrap();
    let target = Target { group: crate::pod::security::fs_group(&pod), ..disk.target() };
    write(&target, &contents, &mut plans, &BTreeSet::new()).unwrap();
    let mode = |path: &str| {
        let found = fs::metadata(disk.at("c1", path)).unwrap();
        assert_eq!(found.gid(), group);
        found.mode() & 0o7777
    };
    assert_eq!((mode("m/s.sh"), mode("e"), mode("t/token")), (0o640, 0o2777, 0o640));
}

#[test]
fn a_path_in_the_volume_that_another_is_mounted_on_is_there_for_the_mount() {
    let disk = Disk::new("nested");
    let pod = one(
        json!([mount("v", "/etc/x"), mount("w", "/etc/x/deep/y")]),
        json!([{"name": "v", "configMap": {"name": "one"}}, {"name": "w", "configMap": {"name": "cm"}}]),
    );
    disk.write(&pod, &objects(), &[]).unwrap();
    assert!(disk.pod.path().join("volumes/v/deep/y").is_dir());
    assert_eq!(disk.read("c1", "etc/x/deep/y/a.sh").as_deref(), Some("echo a"));
    assert_eq!(disk.read("c1", "etc/x/s.sh").as_deref(), Some("x"));
}
