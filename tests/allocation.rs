//! `jiriaf-pilot allocation` from outside, without a batch system and in a job that PBS's stand-in tells of.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{SystemTime, UNIX_EPOCH};

use nix::sched::{CpuSet, sched_getaffinity};
use nix::unistd::Pid;
use serde_json::Value;

/// The command in an environment that holds these variables and no others.
fn allocation(arguments: &[&str], environment: &[(&str, &str)]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_jiriaf-pilot"));
    command.arg("allocation").args(arguments).env_clear().env("PATH", "/usr/bin:/bin");
    command.envs(environment.iter().copied()).output().unwrap()
}

/// What it printed, when all went well.
#[track_caller]
fn printed(arguments: &[&str], environment: &[(&str, &str)]) -> String {
    let output = allocation(arguments, environment);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!((output.status.code(), errors.as_ref()), (Some(0), ""), "{arguments:?}");
    String::from_utf8(output.stdout).unwrap()
}

fn json(arguments: &[&str], environment: &[(&str, &str)]) -> Value {
    let text = printed(&[arguments, &["-o", "json"]].concat(), environment);
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

/// The value and the source in the row of the table about `what`. Columns are two blanks apart or more.
#[track_caller]
fn row<'a>(table: &'a str, what: &str) -> Vec<&'a str> {
    let line = table.lines().find_map(|line| line.strip_prefix(what)?.strip_prefix("  "));
    let line = line.unwrap_or_else(|| panic!("no row {what} in\n{table}"));
    line.split("  ").map(str::trim).filter(|cell| !cell.is_empty()).collect()
}

/// A directory with a qstat that is first in PATH, and the value of that PATH.
fn qstat(walltime: &str) -> (tempfile::TempDir, String) {
    let directory = tempfile::tempdir().unwrap();
    let stand_in = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/pbs/qstat");
    let copy = directory.path().join("qstat");
    fs::copy(stand_in, &copy).unwrap();
    fs::set_permissions(&copy, Permissions::from_mode(0o755)).unwrap();
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    write(directory.path(), "stime", &now.to_string());
    write(directory.path(), "walltime", walltime);
    let path = format!("{}:/usr/bin:/bin", directory.path().display());
    (directory, path)
}

fn write(directory: &Path, name: &str, text: &str) {
    fs::write(directory.join(name), text).unwrap();
}

#[test]
fn without_a_batch_system_it_prints_what_this_process_may_use() {
    let mask = sched_getaffinity(Pid::this()).unwrap();
    let cpus = (0..CpuSet::count()).filter(|cpu| mask.is_set(*cpu).unwrap()).count();
    let table = printed(&[], &[]);
    assert!(row(&table, "batch system")[0].starts_with("none: no SLURM_JOB_ID"), "{table}");
    assert_eq!(row(&table, "time limit")[0], "none", "{table}");
    assert_eq!(row(&table, "deadline"), ["none"], "{table}");
    assert!(row(&table, "CPUs")[0].starts_with(&format!("{cpus}: ")), "{table}");
    assert_eq!(row(&table, "CPUs")[1], "affinity mask", "{table}");
    assert_eq!(row(&table, "memory").len(), 2, "a value and where it was learnt: {table}");
    assert_eq!(row(&table, "GPUs"), ["none", "no visible-devices variable"], "{table}");
    assert!(!table.lines().any(|line| line.starts_with("job ")), "{table}");

    let said = json(&[], &[]);
    assert_eq!(said["batch"], "none", "{said:#}");
    assert_eq!(said["limit"]["value"]["kind"], "unlimited", "{said:#}");
    assert_eq!(said["cpus"]["value"].as_array().unwrap().len(), cpus, "{said:#}");
    for fact in ["limit", "cpus", "memory", "gpus"] {
        assert!(said[fact]["source"].as_str().is_some_and(|source| !source.is_empty()), "{fact}: {said:#}");
    }
    assert!(said["memory"]["value"].as_u64().unwrap() > 1 << 20, "{said:#}");
    for absent in ["job_id", "deadline", "remaining_seconds"] {
        assert_eq!(said[absent], Value::Null, "{said:#}");
    }
}

#[test]
fn a_walltime_of_ones_own_is_the_deadline_and_gpus_are_those_that_are_visible() {
    let own = [("JIRIAF_WALLTIME", "2h"), ("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b")];
    let table = printed(&[], &own);
    assert_eq!(row(&table, "deadline")[1], "--walltime", "{table}");
    assert!(["02:00:00", "01:59:59"].contains(&row(&table, "remaining")[0]), "{table}");
    assert_eq!(row(&table, "GPUs"), ["2: Nvidia GPU-a, Nvidia GPU-b", "CUDA_VISIBLE_DEVICES"], "{table}");
    let said = json(&["--walltime", "30m"], &own);
    assert!((1790..=1800).contains(&said["remaining_seconds"].as_u64().unwrap()), "{said:#}");
    assert_eq!(said["gpus"]["value"][1]["id"], "GPU-b", "{said:#}");
}

#[test]
fn in_a_pbs_job_each_fact_names_qstat_or_the_variable_that_told_it() {
    let (_directory, path) = qstat("00:10:00");
    let job = [
        ("PATH", path.as_str()),
        ("PBS_CONF_FILE", "/nonexistent/pbs.conf"),
        ("PBS_JOBID", "7.pbshost"),
        ("PBS_NODENUM", "0"),
    ];
    let table = printed(&[], &job);
    assert_eq!(row(&table, "batch system"), ["pbs", "environment"], "{table}");
    assert_eq!(row(&table, "job"), ["7.pbshost", "PBS_JOBID"], "{table}");
    assert_eq!(row(&table, "deadline")[1], "qstat: stime + Resource_List.walltime", "{table}");

    let said = json(&[], &job);
    assert!((580..=600).contains(&said["remaining_seconds"].as_u64().unwrap()), "{said:#}");
    assert_eq!(said["deadline"]["confirmed"], true, "{said:#}");
    assert_eq!(said["hosts"]["value"][0], "pbshost", "{said:#}");
    // What the answer grants, on a host that has more.
    assert_eq!(said["cpus"]["value"].as_array().unwrap().len(), 1, "{said:#}");
    assert_eq!(said["memory"]["value"], 512_000 * 1024, "{said:#}");
    assert_eq!(said["memory"]["source"], "qstat exec_vnode mem", "{said:#}");
}

#[test]
fn a_batch_system_that_does_not_answer_is_named_and_the_rest_is_told() {
    let (directory, path) = qstat("00:10:00");
    write(directory.path(), "mode", "refused");
    let job =
        [("PATH", path.as_str()), ("PBS_CONF_FILE", "/nonexistent/pbs.conf"), ("PBS_JOBID", "7.pbshost")];
    let said = json(&[], &job);
    assert_eq!(said["limit"]["value"]["kind"], "unknown", "{said:#}");
    assert!(said["limit"]["value"]["why"].as_str().unwrap().contains("Connection refused"), "{said:#}");
    assert_eq!(said["deadline"], Value::Null, "{said:#}");
    assert!(!said["cpus"]["value"].as_array().unwrap().is_empty(), "{said:#}");
}

#[test]
fn what_was_typed_wrongly_is_named_and_exits_2() {
    for (arguments, wanted) in [(["-o", "xml"], "xml"), (["--walltime", "soon"], "soon")] {
        let output = allocation(&arguments, &[]);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{errors}");
        assert!(errors.contains(wanted) && output.stdout.is_empty(), "{errors}");
    }
}
