//! Whether and when a container starts again: a changed image, a sidecar that fails on the way, a crash of the pilot in
//! between.

use std::path::Path;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::harness::{
    ApiProxy, Namespace, Options, Pilot, bed, read, seconds, shared_directory, wait_for, wait_until,
};

/// A pilot on which the image `busybox` is the host's shell; the directory holds its table.
fn pilot(mut options: Options) -> (Pilot, tempfile::TempDir) {
    let site = shared_directory();
    let table = site.path().join("images.yaml");
    std::fs::write(&table, "images:\n- {name: busybox, run: host}\n").unwrap();
    options = options.env("JIRIAF_IMAGES", table.to_str().unwrap());
    (Pilot::local(options, 600), site)
}

fn shell(name: &str, script: &str) -> Value {
    json!({"name": name, "image": "busybox:1", "command": ["bash", "-c", script]})
}

fn spec(policy: &str, containers: &[Value]) -> Value {
    json!({"restartPolicy": policy, "automountServiceAccountToken": false, "terminationGracePeriodSeconds": 20,
        "containers": containers})
}

fn set_image(namespace: &Namespace, container: &str, image: &str) {
    let change = format!("{container}={image}");
    let done = bed().kubectl(&["-n", &namespace.name, "set", "image", "pod/p", &change]);
    assert!(done.success, "{}", done.text);
}

fn status<'a>(pod: &'a Value, list: &str) -> &'a Value {
    &pod["status"][list][0]
}

fn lines(file: &Path) -> usize {
    if file.exists() { read(file).lines().count() } else { 0 }
}

/// What the pilot has worked, in ticks of 10 ms.
fn cpu_ticks(pilot: &Pilot) -> u64 {
    let [process] = pilot.stages("pilot")[..] else { panic!("one pilot was expected") };
    let stat = read(Path::new(&format!("/proc/{process}/stat")));
    // utime and stime (proc(5)), after the name, which may hold anything.
    let after = stat.rsplit_once(')').unwrap().1;
    after.split_whitespace().skip(11).take(2).map(|ticks| ticks.parse::<u64>().unwrap()).sum()
}

/// Kills the pilot and waits until another one has begun.
fn crash(pilot: &Pilot) {
    let [first] = pilot.stages("pilot")[..] else { panic!("one pilot was expected") };
    kill(Pid::from_raw(first), Signal::SIGKILL).unwrap();
    wait_for("another pilot", seconds(30), || {
        pilot.stages("pilot").first().copied().filter(|second| *second != first)
    });
}

#[test]
fn an_image_that_nothing_runs_costs_nothing_until_it_is_changed() {
    let namespace = Namespace::new("stuck");
    let (pilot, _site) = pilot(Options::new("stuck"));
    let mut container = shell("c1", "sleep 1000");
    container["image"] = json!("nosuch:1");
    namespace.pod_on(&pilot, "p", spec("Always", &[container]));
    let waits = |pod: &Value| {
        pod["status"]["containerStatuses"][0]["state"]["waiting"]["reason"] == "ErrImageNeverPull"
    };
    wait_until("it waits", seconds(20), || namespace.pod("p").is_some_and(|pod| waits(&pod)));
    // Another pod's whole life gives it time to be tried over and over, which would be seen in the pilot's work.
    let before = cpu_ticks(&pilot);
    namespace.pod_on(&pilot, "other", spec("Never", &[shell("c1", "sleep 1.5")]));
    namespace.wait_phase("other", "Succeeded", seconds(20));
    let worked = cpu_ticks(&pilot) - before;
    assert!(worked < 25, "the pilot worked {worked} ticks of 10 ms");

    set_image(&namespace, "c1", "busybox:1");
    let pod = namespace.wait_phase("p", "Running", seconds(20));
    let one = status(&pod, "containerStatuses");
    assert_eq!((&one["restartCount"], &one["image"]), (&json!(0), &json!("busybox:1")), "{one:#}");
    let generation = &pod["metadata"]["generation"];
    wait_until("the change is acknowledged", seconds(10), || {
        namespace.pod("p").is_some_and(|pod| pod["status"]["observedGeneration"] == *generation)
    });
}

#[test]
fn a_changed_image_does_not_wait_for_the_end_of_a_crash_loops_back_off() {
    let namespace = Namespace::new("loop");
    let (pilot, _site) = pilot(Options::new("loop"));
    let gate = pilot.home.join("gate");
    let script = format!("[ -e {} ] || exit 3; sleep 1000", gate.display());
    namespace.pod_on(&pilot, "p", spec("Always", &[shell("c1", &script)]));
    wait_until("it is in back-off", seconds(20), || {
        let pod = namespace.pod("p").unwrap();
        status(&pod, "containerStatuses")["state"]["waiting"]["reason"] == "CrashLoopBackOff"
    });
    std::fs::write(&gate, "").unwrap();
    set_image(&namespace, "c1", "busybox:2");
    // The first wait is 10 s.
    let pod = wait_for("it runs at once", seconds(5), || {
        namespace.pod("p").filter(|pod| status(pod, "containerStatuses")["state"]["running"].is_object())
    });
    let one = status(&pod, "containerStatuses");
    assert_eq!(
        (&one["restartCount"], &one["lastState"]["terminated"]["exitCode"]),
        (&json!(2), &json!(3)),
        "{one:#}"
    );
}

#[test]
fn what_came_after_a_sidecar_goes_on_while_that_fails_and_its_last_end_is_told_at_the_end() {
    let namespace = Namespace::new("passed");
    let (pilot, _site) = pilot(Options::new("passed"));
    let (died, gate) = (pilot.home.join("died"), pilot.home.join("gate"));
    let mut side = shell("side", &format!("sleep 0.3; echo died >>{}; exit 1", died.display()));
    side["restartPolicy"] = json!("Always");
    // Begins after the sidecar has, and ends when that is in its back-off.
    let init =
        shell("init", &format!("until [ $(wc -l <{}) = 2 ]; do sleep 0.05; done; sleep 0.5", died.display()));
    std::fs::write(&died, "").unwrap();
    std::fs::set_permissions(&died, std::os::unix::fs::PermissionsExt::from_mode(0o666)).unwrap();
    let mut spec =
        spec("Never", &[shell("c1", &format!("until [ -e {} ]; do sleep 0.05; done", gate.display()))]);
    spec["initContainers"] = json!([side, init]);
    namespace.pod_on(&pilot, "p", spec);
    wait_until("the sidecar is in back-off", seconds(20), || lines(&died) == 2);
    // The first wait is 10 s; a kubelet starts the main container meanwhile.
    let pod = namespace.wait_phase("p", "Running", seconds(6));
    let side = status(&pod, "initContainerStatuses");
    assert_eq!(side["state"]["waiting"]["reason"], "CrashLoopBackOff", "{side:#}");
    std::fs::write(&gate, "").unwrap();
    let pod = namespace.wait_phase("p", "Succeeded", seconds(20));
    let side = status(&pod, "initContainerStatuses");
    assert_eq!(side["state"]["terminated"]["exitCode"], 1, "{side:#}");
}

#[test]
fn a_changed_image_outlives_a_crash_of_the_pilot_in_the_pre_stop_hook() {
    let namespace = Namespace::new("hooked");
    let (pilot, _site) = pilot(Options::new("hooked"));
    let (hooked, gate, runs) = (pilot.home.join("hooked"), pilot.home.join("gate"), pilot.home.join("runs"));
    let mut container = shell("c1", &format!("echo run >>{}; exec sleep 1000", runs.display()));
    let hook = format!("echo >>{}; until [ -e {} ]; do sleep 0.05; done", hooked.display(), gate.display());
    container["lifecycle"] = json!({"preStop": {"exec": {"command": ["bash", "-c", hook]}}});
    namespace.pod_on(&pilot, "p", spec("Never", &[container]));
    namespace.wait_phase("p", "Running", seconds(20));
    set_image(&namespace, "c1", "busybox:2");
    wait_until("the hook runs", seconds(20), || lines(&hooked) == 1);
    crash(&pilot);
    std::fs::write(&gate, "").unwrap();
    wait_until("the new one runs", seconds(30), || lines(&runs) == 2);
    let pod = wait_for("its status", seconds(20), || {
        namespace.pod("p").filter(|pod| status(pod, "containerStatuses")["restartCount"] == 1)
    });
    let one = status(&pod, "containerStatuses");
    assert_eq!((&one["image"], &pod["status"]["phase"]), (&json!("busybox:2"), &json!("Running")), "{one:#}");
}

#[test]
fn a_crash_of_the_pilot_after_a_changed_image_leaves_the_new_run_alone() {
    let namespace = Namespace::new("changed");
    let (pilot, _site) = pilot(Options::new("changed"));
    let runs = pilot.home.join("runs");
    // Nothing but the image's change has the state written when the new run begins.
    let container = shell("c1", &format!("echo run >>{}; exec sleep 1000", runs.display()));
    namespace.pod_on(&pilot, "p", spec("Never", &[container]));
    namespace.wait_phase("p", "Running", seconds(20));
    set_image(&namespace, "c1", "busybox:2");
    let second = |pod: &Value| {
        let one = status(pod, "containerStatuses");
        one["restartCount"] == 1 && one["state"]["running"].is_object()
    };
    wait_until("the new one runs", seconds(30), || namespace.pod("p").is_some_and(|pod| second(&pod)));
    crash(&pilot);
    namespace.pod_on(&pilot, "q", spec("Never", &[shell("c1", "exit 0")]));
    namespace.wait_phase("q", "Succeeded", seconds(30));
    let pod = namespace.pod("p").unwrap();
    assert!(second(&pod) && pod["status"]["phase"] == "Running", "{:#}", pod["status"]);
    assert_eq!(lines(&runs), 2);
}

#[test]
fn a_pod_that_is_being_evicted_ends_so_after_a_crash_of_the_pilot() {
    let namespace = Namespace::new("evicted");
    let (pilot, _site) = pilot(Options::new("evicted"));
    let (trapped, gate) = (pilot.home.join("trapped"), pilot.home.join("gate"));
    // Its exit code alone would be a success.
    let script = format!(
        "trap 'echo >>{}; until [ -e {} ]; do sleep 0.05; done; exit 0' TERM; head -c 2M /dev/zero >small/x; sleep 1000 & wait",
        trapped.display(),
        gate.display()
    );
    let mut container = shell("c1", &script);
    container["volumeMounts"] = json!([{"name": "small", "mountPath": "small"}]);
    let mut spec = spec("Never", &[container]);
    spec["volumes"] = json!([{"name": "small", "emptyDir": {"sizeLimit": "1Mi"}}]);
    namespace.pod_on(&pilot, "p", spec);
    wait_until("it is asked to end", seconds(40), || lines(&trapped) == 1);
    crash(&pilot);
    std::fs::write(&gate, "").unwrap();
    let pod = namespace.wait_phase("p", "Failed", seconds(30));
    assert_eq!(pod["status"]["reason"], "Evicted", "{:#}", pod["status"]);
}

#[test]
fn a_deleted_pod_does_not_start_again_after_a_crash_of_the_pilot_while_the_api_server_is_away() {
    let namespace = Namespace::new("gone");
    let proxy = ApiProxy::start();
    let (pilot, _site) = pilot(Options { server: Some(proxy.url()), ..Options::new("gone") });
    let (trapped, gate, runs) =
        (pilot.home.join("trapped"), pilot.home.join("gate"), pilot.home.join("runs"));
    let script = format!(
        "echo run >>{}; trap 'echo >>{}; until [ -e {} ]; do sleep 0.05; done; exit 3' TERM; sleep 1000 & wait",
        runs.display(),
        trapped.display(),
        gate.display()
    );
    namespace.pod_on(&pilot, "p", spec("Always", &[shell("c1", &script)]));
    namespace.wait_phase("p", "Running", seconds(20));
    namespace.of("pods").delete("p", None);
    wait_until("it is asked to end", seconds(20), || lines(&trapped) == 1);
    proxy.cut();
    crash(&pilot);
    std::fs::write(&gate, "").unwrap();
    wait_until("its script has ended", seconds(20), || {
        !pilot.processes().iter().any(|(_, line)| line.starts_with("bash"))
    });
    proxy.restore();
    namespace.wait_gone("p", seconds(60));
    assert_eq!(lines(&runs), 1, "it was started again: {}", pilot.output());
}
