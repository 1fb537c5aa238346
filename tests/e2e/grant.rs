//! The Node against what was granted: less than the host has.

use std::os::unix::fs::PermissionsExt;

use serde_json::Value;

use crate::harness::{Options, Pilot, bed, read, shared_directory};

/// `300Mi` in bytes; the API server writes what it was given in the largest unit that fits.
fn bytes(quantity: &Value) -> u64 {
    let text = quantity.as_str().unwrap_or_else(|| panic!("{quantity} is no quantity"));
    let units = [("Ki", 10), ("Mi", 20), ("Gi", 30)];
    let read =
        units.iter().find_map(|(unit, shift)| Some(text.strip_suffix(unit)?.parse::<u64>().ok()? << shift));
    read.unwrap_or_else(|| panic!("{text} is in no unit of bytes"))
}

#[test]
fn the_node_has_what_slurm_granted_and_allocation_says_the_same_with_where_it_was_learnt() {
    // The job script's own word for the pilot: it notes what `allocation` says there, then is the pilot.
    let directory = shared_directory();
    let noting = directory.path().join("jiriaf-pilot");
    let binary = bed().binary();
    let script = format!(
        "#!/bin/bash\n{0} allocation -o json >\"$HOME/allocation.json\" &&\n{0} allocation >\"$HOME/allocation.txt\" &&\nexec {0} \"$@\"\n",
        binary.display()
    );
    std::fs::write(&noting, script).unwrap();
    std::fs::set_permissions(&noting, std::fs::Permissions::from_mode(0o755)).unwrap();
    // --oversubscribe takes the harness's --exclusive back, with which a job has all CPUs of its node.
    let options = Options::new("grant").arg("--oversubscribe").arg("--cpus-per-task=1").arg("--mem=300M");
    let pilot = Pilot::sbatch(options.env("JIRIAF_PILOT", noting.to_str().unwrap()));

    let node = pilot.nodes().remove(0);
    for part in ["capacity", "allocatable"] {
        assert_eq!(node["status"][part]["cpu"], "1", "{:#}", node["status"]);
        let memory = bytes(&node["status"][part]["memory"]);
        assert!(memory > 0 && memory <= 300 << 20, "{:#}", node["status"]);
    }
    // It would draw kube-proxy and other DaemonSets.
    let labels = &node["metadata"]["labels"];
    assert_eq!(labels["kubernetes.io/os"], Value::Null, "{labels:#}");
    assert_eq!(labels["jiriaf.jobid"], pilot.job.unwrap().to_string(), "{labels:#}");

    let text = read(&pilot.home.join("allocation.json"));
    let said: Value = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"));
    assert_eq!(said["batch"], "slurm", "{said:#}");
    assert_eq!(said["job_id"]["value"], pilot.job.unwrap().to_string(), "{said:#}");
    assert_eq!(said["cpus"]["value"].as_array().unwrap().len(), 1, "{said:#}");
    let memory = said["memory"]["value"].as_u64().unwrap();
    assert_eq!(memory >> 10, bytes(&node["status"]["capacity"]["memory"]) >> 10, "{said:#}");
    // By the cgroup or the affinity mask where Slurm confines its jobs, else by its variables; never the host's.
    let source = |fact: &str| said[fact]["source"].as_str().unwrap_or_default();
    assert!(["affinity mask", "SLURM_"].iter().any(|word| source("cpus").contains(word)), "{said:#}");
    assert!(["cgroup", "SLURM_"].iter().any(|word| source("memory").contains(word)), "{said:#}");
    assert!(source("deadline").contains("squeue"), "{said:#}");
    let left = said["remaining_seconds"].as_i64().unwrap();
    assert!((540..=600).contains(&left), "{left} s of ten minutes: {said:#}");

    let table = read(&pilot.home.join("allocation.txt"));
    for fact in ["cpus", "memory", "deadline"] {
        let row = table.lines().find(|line| line.to_lowercase().starts_with(fact));
        assert!(row.is_some_and(|row| row.ends_with(source(fact))), "{fact}: {}\n{table}", source(fact));
    }
}
