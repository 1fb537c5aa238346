//! Containers that start again while what they are made of cannot be read, or is gone; and what has no say in that.

use std::path::PathBuf;
use std::time::Instant;

use serde_json::{Value, json};

use crate::harness::{
    ApiProxy, Namespace, Options, Pilot, container, pod_spec, read, seconds, wait_for, wait_until,
};

/// Runs until the file `go` is there, which it takes away, and fails; each run leaves a line in `runs`.
struct Again {
    go: PathBuf,
    runs: PathBuf,
}

impl Again {
    fn new(pilot: &Pilot) -> Self {
        Self { go: pilot.home.join("go"), runs: pilot.home.join("runs") }
    }

    fn script(&self) -> String {
        format!(
            "cat conf/a >>{runs}; echo >>{runs}\nuntil rm {go} 2>/dev/null; do sleep 0.05; done\nexit 1\n",
            runs = self.runs.display(),
            go = self.go.display()
        )
    }

    fn runs(&self) -> Vec<String> {
        let text = std::fs::read_to_string(&self.runs).unwrap_or_default();
        text.lines().map(ToOwned::to_owned).collect()
    }

    #[track_caller]
    fn run_again(&self) {
        let before = self.runs().len();
        std::fs::write(&self.go, "").unwrap();
        wait_until("it runs again", seconds(40), || self.runs().len() > before);
    }
}

/// A pod whose container `c1` runs the script of the ConfigMap `script`, and sees the Secret `conf`.
fn spec() -> Value {
    let mut one = container("c1", "script");
    one["volumeMounts"].as_array_mut().unwrap().push(json!({"name": "conf", "mountPath": "conf"}));
    let mut spec = pod_spec("Always", &[one]);
    spec["volumes"].as_array_mut().unwrap().retain(|volume| volume["name"] != "conf");
    spec["volumes"].as_array_mut().unwrap().push(json!({"name": "conf", "secret": {"secretName": "conf"}}));
    spec
}

fn secret(namespace: &Namespace, value: &str) {
    namespace.of("secrets").create(&json!({"metadata": {"name": "conf"}, "stringData": {"a": value}}));
}

fn pilot(mut options: Options) -> Pilot {
    options.arguments.push("--crash-loop-back-off-max=1s".to_owned());
    Pilot::local(options, 600)
}

#[test]
fn a_container_that_ends_while_the_api_server_is_away_starts_again_with_what_was_read_last() {
    let namespace = Namespace::new("away");
    let proxy = ApiProxy::start();
    let pilot = pilot(Options { server: Some(proxy.url()), ..Options::new("away") });
    let again = Again::new(&pilot);
    namespace.config_map("script", &[("run.sh", &again.script())]);
    secret(&namespace, "one");
    namespace.pod_on(&pilot, "p", spec());
    namespace.wait_phase("p", "Running", seconds(30));
    // What the volume was given later counts, not what the first start read.
    namespace.of("secrets").merge("conf", &json!({"stringData": {"a": "two"}}));
    let file = pilot.pod_directory("p").join("containers/c1/conf/a");
    wait_until("the volume follows", seconds(20), || {
        std::fs::read_to_string(&file).is_ok_and(|t| t == "two")
    });
    proxy.cut();
    again.run_again();
    again.run_again();
    assert_eq!(again.runs(), ["one", "two", "two"], "{}", pilot.output());
    proxy.restore();
    wait_until("its restarts are told", seconds(40), || {
        namespace.pod("p").unwrap()["status"]["containerStatuses"][0]["restartCount"] == 2
    });
    assert!(pilot.output().contains("what was read last is used"), "{}", pilot.output());
}

#[test]
fn a_secret_that_is_deleted_stays_in_its_volume_and_holds_back_only_who_names_it_in_its_environment() {
    let namespace = Namespace::new("deleted");
    let pilot = pilot(Options::new("deleted"));
    let again = Again::new(&pilot);
    let gate = pilot.home.join("gate");
    let waits = format!("until [ -e {} ]; do sleep 0.05; done\nexit 1\n", gate.display());
    namespace.config_map("script", &[("run.sh", &again.script())]);
    namespace.config_map("waits", &[("run.sh", &waits)]);
    secret(&namespace, "one");
    let mut spec = spec();
    let mut two = container("c2", "waits");
    two["envFrom"] = json!([{"secretRef": {"name": "conf"}}]);
    let volume = pod_spec("Always", std::slice::from_ref(&two))["volumes"][0].clone();
    spec["volumes"].as_array_mut().unwrap().push(volume);
    spec["containers"].as_array_mut().unwrap().push(two);
    namespace.pod_on(&pilot, "p", spec);
    namespace.wait_phase("p", "Running", seconds(30));
    namespace.of("secrets").delete("conf", None);
    again.run_again();
    assert_eq!(again.runs(), ["one", "one"]);
    assert_eq!(read(&pilot.pod_directory("p").join("containers/c1/conf/a")), "one");
    wait_until("an event names the secret", seconds(20), || {
        namespace
            .events("p")
            .iter()
            .any(|(reason, message)| reason == "FailedMount" && message.contains("conf"))
    });
    std::fs::write(&gate, "").unwrap();
    wait_until("the other one waits for it", seconds(40), || {
        let pod = namespace.pod("p").unwrap();
        let status = pod["status"]["containerStatuses"].as_array().unwrap();
        let two = status.iter().find(|one| one["name"] == "c2").unwrap().clone();
        two["state"]["waiting"]["reason"] == "CreateContainerConfigError"
    });
    // It is not the reason that nothing starts any more.
    again.run_again();
    secret(&namespace, "back");
    std::fs::remove_file(&gate).unwrap();
    let ready = "all run again";
    wait_until(ready, seconds(60), || {
        let pod = namespace.pod("p").unwrap();
        pod["status"]["containerStatuses"]
            .as_array()
            .unwrap()
            .iter()
            .all(|one| one["state"]["running"].is_object())
    });
    again.run_again();
    assert_eq!(again.runs().last().unwrap(), "back");
}

#[test]
fn an_ephemeral_container_that_cannot_be_mounted_keeps_no_other_from_starting_again() {
    let namespace = Namespace::new("unmounted");
    let pilot = pilot(Options::new("unmounted"));
    let again = Again::new(&pilot);
    namespace.config_map("script", &[("run.sh", &again.script())]);
    secret(&namespace, "one");
    namespace.pod_on(&pilot, "p", spec());
    namespace.wait_phase("p", "Running", seconds(30));
    let added = json!([{"name": "debugger", "image": "script",
        "volumeMounts": [{"name": "script", "mountPath": "../../../escaped"}]}]);
    namespace.add_ephemeral("p", &added);
    let waiting = wait_for("the debugger says why it waits", seconds(20), || {
        let pod = namespace.pod("p")?;
        let one = pod["status"]["ephemeralContainerStatuses"].get(0)?["state"]["waiting"].clone();
        one["message"].as_str().is_some_and(|message| message.contains("../escaped")).then_some(one)
    });
    assert_eq!(waiting["reason"], "CreateContainerConfigError", "{waiting:#}");
    again.run_again();
    again.run_again();
}

#[test]
fn a_program_has_two_seconds_after_sigterm_however_short_its_grace_is() {
    let namespace = Namespace::new("least");
    let pilot = pilot(Options::new("least"));
    let done = pilot.home.join("done");
    let script = format!("trap 'sleep 1.5; echo yes >{}; exit 0' TERM\nsleep 600 &\nwait\n", done.display());
    namespace.script_on(&pilot, "p", &script);
    namespace.wait_phase("p", "Running", seconds(30));
    wait_until("the script sleeps", seconds(10), || {
        pilot.processes().iter().any(|(_, line)| line.starts_with("sleep 600"))
    });
    let start = Instant::now();
    namespace.of("pods").delete("p", Some(1));
    namespace.wait_gone("p", seconds(20));
    assert_eq!(read(&done), "yes\n", "after {:?}", start.elapsed());
}
