//! What a pilot is given wrongly, and what the world refuses: a message that names the thing and the way out,
//! exit code 2 for what was typed and 1 for what is refused, and nothing registered.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::harness::{
    Namespace, Options, PbsJob, Pilot, Tmpfs, api, bed, seconds, shared_directory, unique, wait_until,
};

/// No refusal needs longer, on a busy machine.
const LIMIT: Duration = seconds(30);

/// Runs a pilot that must not come to life, and checks that its last words hold all of `wanted`.
#[track_caller]
fn refused(options: &Options, arguments: &[&str], code: i32, wanted: &[&str]) {
    let mut pilot = Pilot::start_run(options, arguments);
    let got = pilot.wait_exit(LIMIT);
    let output = pilot.output();
    assert_eq!(got, Some(code), "{output}");
    for word in wanted {
        assert!(output.contains(word), "{word:?} is not in: {output}");
    }
    assert!(!output.contains("panicked") && !output.contains("RUST_BACKTRACE"), "{output}");
    assert_eq!(pilot.nodes(), Vec::<Value>::new());
    assert_eq!(pilot.processes(), Vec::<(i32, String)>::new());
}

/// A kubeconfig for alice, of this content.
fn kubeconfig(directory: &Path, content: &str) -> String {
    let file = directory.join("kubeconfig");
    std::fs::write(&file, content).unwrap();
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o644)).unwrap();
    file.to_str().unwrap().to_owned()
}

/// The pilots' kubeconfig with another token.
fn with_token(token: &str) -> String {
    let mut config: Value = serde_json::from_str(&bed().pilot_kubeconfig(None)).unwrap();
    config["users"][0]["user"] = json!({"token": token});
    config.to_string()
}

#[test]
fn what_was_typed_wrongly_is_named_and_exits_2() {
    let options = Options::new("usage");
    refused(&options, &["--bogus"], 2, &["--bogus", "--help"]);
    refused(&options, &["--walltime=soon"], 2, &["--walltime", "soon"]);
    refused(&options, &["--node-name=Not_A_Name"], 2, &["--node-name", "Not_A_Name"]);
    refused(&options, &["--drain-before=1 fortnight"], 2, &["--drain-before", "1 fortnight"]);
    refused(&options, &["--drain-before=4s"], 2, &["--drain-before", "4s", "5 s"]);
    refused(&options, &["--cordon-before=20s", "--drain-before=60s"], 2, &["--cordon-before", "20s", "60 s"]);
    refused(&options, &["--signal-lead=0"], 2, &["--signal-lead", "5 s"]);
    refused(&options, &["--kill-wait=2s"], 2, &["--kill-wait", "2s", "3 s"]);
    refused(&Options::new("usage").env("JIRIAF_WALLTIME", "1h 1h x"), &[], 2, &["--walltime", "1h 1h x"]);
    refused(&options, &["--label=a=b c"], 2, &["--label", "a=b c"]);
    refused(&options, &["--label=a b=c"], 2, &["--label", "a b=c"]);
    refused(&options, &["--annotation=a b=c"], 2, &["--annotation", "a b=c"]);
    refused(&options, &["--taint=a b:NoSchedule"], 2, &["--taint", "a b:NoSchedule"]);
    refused(&options, &["--taint=a=1:NoSchedule,a=2:NoSchedule"], 2, &["--taint", "a=1:NoSchedule"]);
    refused(&Options::new("usage").env("JIRIAF_NAMESPACES", "a, B"), &[], 2, &["--namespaces", "\"B\""]);
    let shared = format!("a{}", "b".repeat(62));
    let tasks = |name: &str| {
        let options = Options::new("usage").env("NODENAME", name).env("SLURM_JOB_ID", "999999");
        options.env("SLURM_STEP_NUM_TASKS", "2").env("SLURM_JOB_END_TIME", "4000000000")
    };
    refused(&tasks(&shared), &[], 2, &[&format!("{shared}-1"), "63 bytes", "NODENAME"]);
    refused(&options, &["--port=70000"], 2, &["--port", "70000"]);
}

#[test]
fn a_kubeconfig_that_cannot_be_used_is_named_and_exits_1() {
    let directory = shared_directory();
    let own =
        |content: &str| Options::new("kubeconfig").env("KUBECONFIG", &kubeconfig(directory.path(), content));
    let mends = "KUBECONFIG";
    refused(&own("clusters: [\n"), &["--walltime=300"], 1, &["kubeconfig", mends]);
    refused(&own("{}"), &["--walltime=300"], 1, &["kubeconfig", mends]);
    let missing = Options::new("kubeconfig").env("KUBECONFIG", "/nonexistent/config");
    refused(&missing, &["--walltime=300"], 1, &["/nonexistent/config", mends]);

    let unreadable = own("{}");
    let file = directory.path().join("kubeconfig");
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600)).unwrap();
    refused(&unreadable, &["--walltime=300"], 1, &["ermission denied", file.to_str().unwrap(), mends]);
}

#[test]
fn a_credential_that_is_expired_unknown_or_without_rights_is_refused_with_exit_1() {
    let namespace = Namespace::new("credential");
    let directory = shared_directory();
    let own =
        |content: &str| Options::new("credential").env("KUBECONFIG", &kubeconfig(directory.path(), content));

    let part = |value: Value| URL_SAFE_NO_PAD.encode(value.to_string());
    let old = json!({"exp": 1_600_000_000, "sub": "system:serviceaccount:a:b"});
    let expired = format!("{}.{}.{}", part(json!({"alg": "RS256"})), part(old), part(json!("none")));
    refused(&own(&with_token(&expired)), &["--walltime=300"], 1, &["expired", "2020-09-13", "get a new one"]);

    refused(&own(&with_token("nobody")), &["--walltime=300"], 1, &["401", "docs/cluster"]);

    let request = json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}});
    let answer = api::namespaced(&namespace.name, "serviceaccounts/default/token").create(&request);
    let powerless = answer["status"]["token"].as_str().unwrap();
    refused(&own(&with_token(powerless)), &["--walltime=300"], 1, &["forbidden", "docs/cluster"]);
}

#[test]
fn an_api_server_that_cannot_be_reached_is_tried_for_the_startup_timeout() {
    let options = Options { server: Some("https://127.0.0.1:1".into()), ..Options::new("unreachable") };
    let start = Instant::now();
    let arguments = ["--walltime=300", "--startup-timeout=2s"];
    refused(&options, &arguments, 1, &["https://127.0.0.1:1", "cannot be reached", "jiriaf-pilot check"]);
    assert!(start.elapsed() < seconds(10), "{:?}", start.elapsed());
}

#[test]
fn a_port_in_use_is_named_and_exits_1() {
    let taken = std::net::TcpListener::bind("0.0.0.0:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let flag = format!("--port={port}");
    refused(
        &Options::new("port"),
        &["--walltime=300", &flag],
        1,
        &[&port.to_string(), "--port", "Address already in use"],
    );
}

#[test]
fn a_pods_directory_that_is_full_or_read_only_is_named_and_exits_1() {
    let full = Tmpfs::new(64, "");
    full.fill();
    let read_only = Tmpfs::new(64, "ro");
    for (place, problem) in [(&full, "No space left"), (&read_only, "Read-only")] {
        let path = place.path().to_str().unwrap();
        let options = Options::new("pods-dir").env("JIRIAF_PODS_DIR", path);
        refused(&options, &["--walltime=300"], 1, &[path, problem, "--pods-dir"]);
    }
}

#[test]
fn a_state_directory_that_cannot_be_written_is_named_and_exits_1() {
    let read_only = Tmpfs::new(64, "ro");
    let path = read_only.path().join("state");
    let options = Options::new("state-dir").env("JIRIAF_STATE_DIR", path.to_str().unwrap());
    refused(&options, &["--walltime=300"], 1, &[path.to_str().unwrap(), "Read-only", "--state-dir"]);
}

#[test]
fn a_refused_credential_in_a_batch_job_does_not_let_a_chain_of_jobs_spin() {
    let directory = shared_directory();
    let config = kubeconfig(directory.path(), &with_token("nobody"));
    let job = PbsJob::new(1, "00:05:00");
    let mut options = Options::new("spin").env("KUBECONFIG", &config);
    options.environment.extend(job.environment());
    let mut pilot = Pilot::start_run(&options, &[]);
    wait_until("it says that it waits", seconds(30), || pilot.output().contains("waiting before exit"));
    assert!(!pilot.ended());
    pilot.signal(Signal::SIGTERM);
    assert_eq!(pilot.wait_exit(seconds(10)), Some(1), "{}", pilot.output());
}

#[test]
fn less_time_than_a_pilot_needs_exits_1() {
    refused(&Options::new("short"), &["--walltime=30"], 1, &["s are left", "45", "walltime"]);
}

#[test]
fn leads_as_long_as_the_time_that_is_left_are_named_and_exit_1() {
    let options = Options::new("leads");
    let drain = ["--walltime=300", "--drain-before=5m"];
    refused(&options, &drain, 1, &["s are left", "--drain-before=300s", "walltime"]);
    let stagger = ["--walltime=300", "--stagger=3m"];
    refused(&options, &stagger, 1, &["s are left", "--stagger=180s", "walltime"]);
    let cordon = ["--walltime=300", "--cordon-before=10m"];
    refused(&options, &cordon, 1, &["s are left", "--cordon-before=600s", "walltime"]);
}

#[test]
fn a_squeue_that_hangs_delays_a_pilot_by_its_limit_and_no_more() {
    let directory = shared_directory();
    let squeue = directory.path().join("squeue");
    std::fs::write(&squeue, "#!/bin/sh\nexec sleep 4711\n").unwrap();
    std::fs::set_permissions(&squeue, std::fs::Permissions::from_mode(0o755)).unwrap();
    let path = format!("{}:/usr/local/bin:/usr/bin:/bin", directory.path().display());
    // A number that no job of the test bed has.
    let options = Options::new("squeue").env("PATH", &path).env("SLURM_JOB_ID", "999999");
    let start = Instant::now();
    let pilot = Pilot::local(options, 300);
    assert!(start.elapsed() < seconds(20), "{:?}", start.elapsed());
    assert!(pilot.output().contains("squeue"), "a warning names squeue: {}", pilot.output());
    assert_eq!(pilot.nodes()[0]["metadata"]["labels"]["jiriaf.batch"], "slurm");
    wait_until("no squeue is left hanging", seconds(15), || {
        pilot.processes().iter().all(|(_, line)| !line.starts_with("sleep 4711"))
    });
}

#[test]
fn a_node_name_that_another_pilot_holds_is_refused_and_the_first_lives_on() {
    let name = unique("held");
    let first = Pilot::local(Options::new("held").env("NODENAME", &name), 300);
    let node = api::cluster("nodes");
    let uid = node.get(&name).unwrap()["metadata"]["uid"].clone();
    // On the same host, and as if on another one, which shares no state.
    let elsewhere = shared_directory();
    std::fs::set_permissions(elsewhere.path(), std::fs::Permissions::from_mode(0o777)).unwrap();
    let state = elsewhere.path().join("state");
    for options in
        [Options::new("held"), Options::new("held").env("JIRIAF_STATE_DIR", state.to_str().unwrap())]
    {
        refused(&options.env("NODENAME", &name), &["--walltime=300"], 1, &[&name, "--node-name", "NODENAME"]);
    }
    assert_eq!(node.get(&name).unwrap()["metadata"]["uid"], uid);
    let namespace = Namespace::new("held");
    namespace.script_on(&first, "p", "exit 0\n");
    namespace.wait_phase("p", "Succeeded", seconds(30));
}

#[test]
fn a_node_that_is_no_pilots_is_left_alone() {
    let name = unique("foreign");
    let nodes = api::cluster("nodes");
    nodes.create(&json!({"metadata": {"name": name, "labels": {"own": "yes"}}}));
    refused(&Options::new("foreign").env("NODENAME", &name), &["--walltime=300"], 1, &[&name, "--node-name"]);
    let labels = nodes.get(&name).unwrap()["metadata"]["labels"].clone();
    nodes.delete(&name, None);
    assert_eq!(labels, json!({"own": "yes"}));
}
