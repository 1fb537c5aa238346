//! What other users of the host can see.

use crate::harness::{ALICE, BOB, Namespace, Options, Pilot, as_user, marked, read, run, seconds};
use serde_json::json;

#[test]
fn another_user_can_read_nothing_of_a_pod_whatever_the_umask() {
    let namespace = Namespace::new("private");
    // As lax as it gets: slurmd hands the submitter's umask on.
    let pilot = Pilot::sbatch(Options::new("private").env("SLURM_UMASK", "0000"));
    namespace
        .of("secrets")
        .create(&json!({"metadata": {"name": "key"}, "stringData": {"key": "s3cr3t-value"}}));
    namespace.config_map("p", &[("run.sh", "echo from-the-log; cat secret/key; sleep 600\n")]);
    let spec = json!({
        "restartPolicy": "Never", "automountServiceAccountToken": false, "terminationGracePeriodSeconds": 1,
        "containers": [{"name": "c1", "image": "p", "command": ["bash"],
            "env": [{"name": "FROM_SECRET",
                "valueFrom": {"secretKeyRef": {"name": "key", "key": "key"}}}],
            "volumeMounts": [{"name": "p", "mountPath": "job"}, {"name": "key", "mountPath": "secret"}]}],
        "volumes": [{"name": "p", "configMap": {"name": "p"}}, {"name": "key", "secret": {"secretName": "key"}}],
    });
    namespace.pod_on(&pilot, "p", spec);
    namespace.wait_phase("p", "Running", seconds(30));
    let container = pilot.pod_directory("p").join("containers/c1");
    // It is there for its owner.
    assert_eq!(read(&container.join("secret/key")), "s3cr3t-value");

    // Nothing below the pilot's home, which itself may be entered, but for the job's output.
    let mut find = as_user(BOB, "find");
    find.arg(&pilot.home).args(["-mindepth", "1", "-readable", "-not", "-name", "pilot.out"]);
    let readable = run(&mut find).stdout;
    assert_eq!(readable, "", "bob can read this of alice's");
    // Nor of the state, wherever that is on this host.
    let mut find = as_user(BOB, "find");
    find.args(["/tmp", "/var/tmp", "/dev/shm", "/run", "-user", ALICE, "-path", "*jiriaf*", "-readable"]);
    let readable = run(&mut find).stdout;
    assert_eq!(readable, "", "bob can read this of the pilots' state");

    // Not in an argument list, which everybody can read.
    let mark = format!("TEST_PILOT={}", pilot.home.file_name().unwrap().to_str().unwrap());
    for (pid, line) in marked(&mark) {
        assert!(!line.contains("s3cr3t"), "process {pid}: {line}");
    }
    assert!(!pilot.output().contains("s3cr3t"), "{}", pilot.output());
}

#[test]
fn a_pod_cannot_read_the_memory_of_the_pilot_that_runs_it() {
    let namespace = Namespace::new("dumpable");
    let pilot = Pilot::local(Options::new("dumpable"), 600);
    namespace.script_on(&pilot, "p", "exec sleep 3671\n");
    namespace.wait_phase("p", "Running", seconds(30));
    let stages = [pilot.stages("run"), pilot.stages("pilot"), pilot.stages("supervise")];
    assert!(stages.iter().all(|stage| stage.len() == 1), "guardian, pilot, supervisor: {stages:?}");
    let read_as_alice = |pid: i32, file: &str| {
        let output = run(as_user(ALICE, "head").args(["-c", "1", &format!("/proc/{pid}/{file}")]));
        (output.success, output.text)
    };
    for pid in stages.iter().flatten() {
        for file in ["environ", "mem", "maps", "auxv"] {
            let (success, text) = read_as_alice(*pid, file);
            assert!(!success && text.contains("Permission denied"), "/proc/{pid}/{file}: {text}");
        }
    }
    // Of what is not the pilot's own, its user can.
    let processes = pilot.processes();
    let script = processes.iter().find(|(_, line)| line.starts_with("sleep 3671"));
    let script = script.unwrap_or_else(|| panic!("no sleep: {processes:?}")).0;
    assert!(read_as_alice(script, "environ").0, "{:?}", read_as_alice(script, "environ"));
}
