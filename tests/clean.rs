//! `jiriaf-pilot clean` from outside: what dead pilots left goes, what is anybody else's stays.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::BTreeMap;
use std::fs::{self, File, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use jiriaf_pilot::container::process::{boot_id, start_time};
use jiriaf_pilot::pod::directory::{Liveness, Marker, ProcessIdentity, claim};

/// A user's home and state root, in which nothing is yet.
struct Place {
    root: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        for (name, mode) in [("home", 0o755), ("state", 0o700)] {
            fs::create_dir(root.path().join(name)).unwrap();
            fs::set_permissions(root.path().join(name), Permissions::from_mode(mode)).unwrap();
        }
        Self { root }
    }

    fn home(&self) -> PathBuf {
        self.root.path().join("home")
    }

    fn state(&self, pilot: &str) -> PathBuf {
        self.root.path().join("state").join(pilot)
    }

    fn clean(&self, more: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_jiriaf-pilot"))
            .arg("clean")
            .args(more)
            .env_clear()
            .env("HOME", self.home())
            .env("SLURMD_NODENAME", "n1")
            .env("JIRIAF_STATE_DIR", self.root.path().join("state"))
            .output()
            .unwrap()
    }

    /// A pilot's state with one pod in it, and its lock.
    fn pilot(&self, name: &str, uid: &str, guardian: &ProcessIdentity) -> File {
        let state = self.state(name);
        fs::create_dir_all(state.join("pods")).unwrap();
        fs::create_dir_all(state.join("containers")).unwrap();
        fs::write(state.join("pods").join(format!("{uid}.json")), "{}").unwrap();
        let pilot = serde_json::json!({
            "version": 1, "instance": "i", "boot": boot_id(), "guardian": guardian,
            "first_start": {"secs_since_epoch": 1_700_000_000, "nanos_since_epoch": 0}, "first_left": null,
        });
        fs::write(state.join("pilot.json"), pilot.to_string()).unwrap();
        File::create(state.join("lock")).unwrap()
    }

    /// A pod's directory with a log in it.
    fn pod(&self, name: &str, uid: &str, host: &str, node: &str, pilot: &ProcessIdentity) -> PathBuf {
        let marker = Marker {
            uid: uid.to_owned(),
            namespace: "default".to_owned(),
            name: name.to_owned(),
            job: Some("7".to_owned()),
            host: host.to_owned(),
            node: Some(node.to_owned()),
            cluster: None,
            pilot: pilot.clone(),
        };
        let directory = claim(&self.home(), &marker, |_| Liveness::Alive).unwrap();
        fs::create_dir_all(directory.join("containers/c/logs")).unwrap();
        fs::write(directory.join("containers/c/logs/0.log"), "a line\n").unwrap();
        directory
    }

    /// Every file beneath it, with its text.
    fn all(&self) -> BTreeMap<PathBuf, Option<String>> {
        let mut waiting = vec![self.root.path().to_owned()];
        let mut found = BTreeMap::new();
        while let Some(path) = waiting.pop() {
            if path.is_dir() {
                waiting.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
            }
            found.insert(path.clone(), fs::read_to_string(&path).ok());
        }
        found
    }
}

fn dead() -> ProcessIdentity {
    ProcessIdentity { pid: i32::MAX, start: 1, boot: boot_id() }
}

fn alive() -> ProcessIdentity {
    let pid = i32::try_from(std::process::id()).unwrap();
    ProcessIdentity { pid, start: start_time(pid).unwrap(), boot: boot_id() }
}

/// Killed whatever becomes of the test.
struct Container(Child);

impl Container {
    fn start(mark: &str) -> Self {
        let mut command = Command::new("sleep");
        command.arg("300").env("JIRIAF_CONTAINER", mark).stdout(Stdio::null());
        Self(command.spawn().unwrap())
    }

    fn lives(&mut self) -> bool {
        self.0.try_wait().unwrap().is_none()
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

fn unique(uid: &str) -> String {
    format!("{uid}-{}", std::process::id())
}

#[test]
fn files_in_the_store_go_with_their_pod_and_without_it() {
    use jiriaf_pilot::pod::directory::{keep_in_store, read_marker, store};
    let place = Place::new();
    let dead = dead();
    let kept = place.home().join(".jiriaf-pilot/7");
    fs::create_dir(place.home().join(".jiriaf-pilot")).unwrap();
    fs::set_permissions(place.home().join(".jiriaf-pilot"), Permissions::from_mode(0o700)).unwrap();
    for (name, uid) in [("p1", "aaaaaaaa-1"), ("p2", "bbbbbbbb-1")] {
        let directory = place.pod(name, uid, "n1", "gone", &dead);
        let marker = read_marker(&directory).unwrap();
        fs::remove_dir_all(directory.join("containers")).unwrap();
        keep_in_store(&directory, &marker, &kept).unwrap();
        fs::create_dir_all(directory.join("containers/c/logs")).unwrap();
        fs::write(directory.join("containers/c/logs/0.log"), "a line\n").unwrap();
    }
    fs::remove_dir_all(place.home().join("p2")).unwrap();
    let output = place.clean(&[]);
    assert!(output.status.success(), "{output:?}");
    assert!(!place.home().join("p1").exists() && !store(&kept, "").exists(), "{output:?}");
    let mut logs: Vec<_> = fs::read_dir(&kept).unwrap().map(|e| e.unwrap().file_name()).collect();
    logs.sort();
    assert_eq!(logs, ["default.p1.aaaaaaaa.c.0.log", "default.p2.bbbbbbbb.c.0.log"]);
}

#[test]
fn what_a_dead_pilot_left_goes_and_its_logs_are_kept() {
    let place = Place::new();
    let uid = unique("aaaaaaaa");
    drop(place.pilot("site-7-n1", &uid, &dead()));
    let pod = place.pod("p1", &uid, "n1", "site-7-n1", &dead());
    let mut container = Container::start(&format!("site-7-n1/{uid}/c/0"));
    let output = place.clean(&[]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output));
    assert!(!place.state("site-7-n1").exists() && !pod.exists(), "{}", text(&output));
    assert!(!container.lives());
    let kept = place.home().join(".jiriaf-pilot/7/default.p1.aaaaaaaa.c.0.log");
    assert_eq!(fs::read_to_string(kept).unwrap(), "a line\n");
    assert!(text(&output).contains("2 things removed"), "{}", text(&output));
}

#[test]
fn a_live_pilots_is_kept_whether_it_holds_its_lock_or_its_guardian_restarts_it() {
    let place = Place::new();
    let (locked, guarded) = (unique("aaaaaaaa"), unique("bbbbbbbb"));
    let lock = place.pilot("locked", &locked, &dead());
    lock.try_lock().unwrap();
    drop(place.pilot("guarded", &guarded, &alive()));
    // The markers' processes are gone, as that of a pilot of before a crash is.
    let pods = [
        place.pod("p1", &locked, "n1", "locked", &dead()),
        place.pod("p2", &guarded, "n1", "guarded", &dead()),
    ];
    let mut container = Container::start(&format!("locked/{locked}/c/0"));
    let before = place.all();
    let output = place.clean(&[]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output));
    assert!(pods.iter().all(|pod| pod.exists()));
    assert!(container.lives());
    assert_eq!(place.all(), before);
}

#[test]
fn what_is_not_a_pilots_or_of_another_host_is_untouched() {
    let place = Place::new();
    let other_boot = ProcessIdentity { boot: "another".to_owned(), ..dead() };
    place.pod("elsewhere", "cccccccc-1", "n2", "site-7-n2", &other_boot);
    // A user's own directories, one of them a renamed pod's.
    fs::create_dir_all(place.home().join("bin")).unwrap();
    fs::write(place.home().join("bin/tool"), "x").unwrap();
    let renamed = place.pod("p3", "dddddddd-1", "n1", "gone", &dead());
    fs::rename(renamed, place.home().join("results")).unwrap();
    fs::create_dir_all(place.state("notes")).unwrap();
    fs::write(place.state("notes").join("text"), "mine").unwrap();
    // A link to a pod's directory elsewhere.
    let outside = Place::new();
    let target = outside.pod("p4", "eeeeeeee-1", "n1", "gone", &dead());
    std::os::unix::fs::symlink(&target, place.home().join("p4")).unwrap();
    let (before, outside_before) = (place.all(), outside.all());
    let output = place.clean(&[]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output));
    assert_eq!(place.all(), before, "{}", text(&output));
    assert_eq!(outside.all(), outside_before);
}

#[test]
fn a_dry_run_removes_nothing_and_names_all() {
    let place = Place::new();
    let uid = unique("ffffffff");
    drop(place.pilot("site-7-n1", &uid, &dead()));
    let pod = place.pod("p1", &uid, "n1", "site-7-n1", &dead());
    let mut container = Container::start(&format!("site-7-n1/{uid}/c/0"));
    let before = place.all();
    let output = place.clean(&["--dry-run"]);
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(place.all(), before);
    assert!(container.lives());
    let said = text(&output);
    for path in [&pod, &place.state("site-7-n1")] {
        assert!(said.contains(&format!("would remove: {}", path.display())), "{said}");
    }
}

#[test]
fn a_state_root_that_others_can_write_to_is_not_acted_upon() {
    let place = Place::new();
    drop(place.pilot("site-7-n1", "aaaaaaaa-2", &dead()));
    let root: &Path = &place.root.path().join("state");
    fs::set_permissions(root, Permissions::from_mode(0o777)).unwrap();
    let before = place.all();
    let output = place.clean(&[]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output).contains(&root.display().to_string()), "{}", text(&output));
    assert_eq!(place.all(), before);
}

#[test]
fn what_cannot_be_removed_is_named() {
    let place = Place::new();
    let pod = place.pod("p1", "aaaaaaaa-3", "n1", "gone", &dead());
    // A mount would be in the way; an ordinary user is stopped by a directory without the write bit, root by nothing.
    if nix::unistd::geteuid().is_root() {
        return;
    }
    fs::create_dir(pod.join("closed")).unwrap();
    fs::write(pod.join("closed/file"), "").unwrap();
    fs::set_permissions(pod.join("closed"), Permissions::from_mode(0o500)).unwrap();
    let output = place.clean(&[]);
    fs::set_permissions(pod.join("closed"), Permissions::from_mode(0o700)).unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output).contains(&pod.display().to_string()), "{}", text(&output));
}
