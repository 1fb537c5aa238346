//! Volumes on disk: what containers see of them, and what becomes of it when they change.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt as _, symlink};
use std::path::Path;
use std::sync::Arc;

use serde_json::{Value, from_value, json};

use super::tests::{all, mount, objects, one, pod};
use super::*;

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
        Target { ground: self.ground(), contents: self.ground().directory, uid: &self.uid, group: None }
    }

    /// Writes what the pod's volumes come to; the containers in `running` run.
    fn write(
        &self,
        pod: &Pod,
        objects: &Objects,
        running: &[&str],
    ) -> Result<(Vec<ContainerPlan>, BTreeMap<String, MountProblem>), String> {
        let (contents, mut plans) = all(pod, objects, &self.ground()).map_err(|error| error.to_string())?;
        let running = running.iter().map(|name| (*name).to_owned()).collect();
        let problems =
            write(&self.target(), &contents, &mut plans, &running).map_err(|error| error.to_string())?;
        Ok((plans, problems))
    }

    /// What the keeper does when objects have changed.
    fn update(&self, pod: &Pod, plans: &[ContainerPlan], objects: &Objects) {
        let contents = contents(pod, objects, &Objects::default(), &Facts::default()).unwrap().contents;
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
    objects.config_maps.insert("cm".to_owned(), from_value(json!({"data": data})).map(Arc::new).unwrap());
    objects
}

#[test]
fn an_update_reaches_all_containers_and_names_follow() {
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
    let inode = |path: &Path| fs::metadata(path).unwrap().ino();
    let one = inode(&disk.pod.path().join("volumes/v/a"));
    assert_eq!(
        [inode(&disk.at("c1", "etc/x/a")), inode(&disk.pod.path().join("volumes/e/conf/a"))],
        [one, one]
    );
    assert_eq!(fs::read_link(disk.at("c1", "etc/x/a")).unwrap(), Path::new("..data/a"));
    fs::write(disk.at("c1", "etc/x/result"), "mine").unwrap();
    fs::write(disk.home.path().join("keys/own"), "mine").unwrap();

    disk.update(&pod, &plans, &with(json!({"a": "2", "c": "2"})));
    assert_eq!((seen("a"), seen("b"), seen("c")), (is(Some("2")), is(None), is(Some("2"))));
    assert_eq!(disk.read("c3", "one").as_deref(), Some("1"), "a subPath does not follow");
    assert_eq!(disk.read("c1", "etc/x/result").as_deref(), Some("mine"));
    let home = |name: &str| fs::read_to_string(disk.home.path().join("keys").join(name)).ok();
    assert_eq!((home("a").as_deref(), home("b"), home("c").as_deref()), (Some("2"), None, Some("2")));
    assert_eq!(home("own").as_deref(), Some("mine"));

    // A file that went while nobody kept the volume goes with the next start.
    fs::write(disk.home.path().join("keys/own"), "mine").unwrap();
    disk.write(&pod, &with(json!({"a": "2"})), &["c3"]).unwrap();
    assert_eq!((home("a").as_deref(), home("c"), home("own").as_deref()), (Some("2"), None, Some("mine")));

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

#[test]
fn what_a_pod_has_in_memory_goes_with_its_directory() {
    use crate::pod::directory::{self, Liveness, Marker, ProcessIdentity};
    let (pods, disk) = (tempfile::tempdir().unwrap(), Disk::new("removed"));
    let marker = Marker {
        uid: disk.uid.clone(),
        namespace: "ns".to_owned(),
        name: "p".to_owned(),
        job: None,
        host: "h".to_owned(),
        node: None,
        cluster: None,
        pilot: ProcessIdentity { pid: 1, start: 2, boot: "b".to_owned() },
    };
    let claimed = directory::claim(pods.path(), &marker, |_| Liveness::Alive).unwrap();
    let pod = one(json!([mount("e", "m")]), json!([{"name": "e", "emptyDir": {"medium": "Memory"}}]));
    let ground = Ground { directory: &claimed, home: disk.home.path() };
    let (contents, mut plans) = all(&pod, &objects(), &ground).unwrap();
    write(
        &Target { ground, contents: ground.directory, ..disk.target() },
        &contents,
        &mut plans,
        &BTreeSet::new(),
    )
    .unwrap();
    let real = plans[0].mounts[0].source.clone();
    fs::write(real.join("x"), "x").unwrap();
    directory::remove(&claimed, &disk.uid, &pods.path().join("kept/job"), None).unwrap();
    assert!(!real.exists() && !claimed.exists());
}
