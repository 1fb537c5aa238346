//! The example that JIRIAF's users begin with.

use serde_json::Value;

use crate::harness::{Namespace, Options, Pilot, read, seconds, wait_until};

/// As users write it, to the letter.
const EXAMPLE: &str = r##"
kind: ConfigMap
apiVersion: v1
metadata: {name: direct-stress}
data:
  stress.sh: |
    #!/bin/bash
    stress --timeout $1 --cpu $2 # test memory
---
apiVersion: v1
kind: Pod
metadata: {name: p1, labels: {app: new-test-pod}}
spec:
  containers:
    - name: c1
      image: direct-stress # the name of one of the volumeMounts
      command: ["bash"]
      args: ["300", "2"]
      volumeMounts:
        - {name: direct-stress, mountPath: stress/job1} # root: $HOME/p1/containers/c1
  volumes:
    - {name: direct-stress, configMap: {name: direct-stress}}
  nodeSelector: {kubernetes.io/role: agent}
  tolerations:
    - {key: virtual-kubelet.io/provider, value: mock, effect: NoSchedule}
  affinity:
    nodeAffinity:
      requiredDuringSchedulingIgnoredDuringExecution:
        nodeSelectorTerms:
          - matchExpressions:
              - {key: jiriaf.nodetype, operator: In, values: [cpu]}
              - {key: jiriaf.site, operator: In, values: [mylin]}
              - {key: jiriaf.alivetime, operator: Gt, values: ["10"]}
"##;

/// The stress processes of a pilot: the parent, and a worker for each CPU.
fn stress(pilot: &Pilot) -> Vec<String> {
    let processes = pilot.processes().into_iter().map(|(_, line)| line);
    processes.filter(|line| line.starts_with("stress ")).collect()
}

#[test]
fn the_seed_example_runs_as_it_is_written_twice_in_a_row_at_the_plain_path_and_leaves_no_stress_behind() {
    let namespace = Namespace::new("seed");
    // The one test whose site is not its own, because the example names it.
    let pilot = Pilot::sbatch(Options { site: Some("mylin".into()), ..Options::new("seed") });
    let container = pilot.home.join("p1/containers/c1");
    let mut uids = Vec::new();
    for _ in 0..2 {
        namespace.apply(EXAMPLE);
        wait_until("stress and its workers run", seconds(30), || stress(&pilot).len() >= 3);
        assert!(stress(&pilot)[0].starts_with("stress --timeout 300 --cpu 2"), "{:?}", stress(&pilot));
        let pod = namespace.wait_phase("p1", "Running", seconds(10));
        assert_eq!(pod["spec"]["restartPolicy"], "Always", "the example names none");
        // At the plain path is this pod's directory, whatever becomes of the first one's.
        let marker = read(&pilot.home.join("p1/.jiriaf-pilot.json"));
        let marker: Value = serde_json::from_str(&marker).unwrap_or_else(|error| panic!("{error}: {marker}"));
        assert_eq!(marker["uid"], pod["metadata"]["uid"], "{marker:#}");
        uids.push(marker["uid"].clone());
        assert!(read(&container.join("stress/job1/stress.sh")).contains("stress --timeout"));
        let pgid: i32 = read(&container.join("pgid")).trim_end().parse().unwrap();
        assert!(pgid > 1, "pgid is {pgid}");
        namespace.of("pods").delete("p1", Some(5));
        namespace.wait_gone("p1", seconds(20));
        assert_eq!(stress(&pilot), Vec::<String>::new(), "when the pod is gone");
        // The next one comes at once, whether the directory has gone or not.
    }
    assert_ne!(uids[0], uids[1], "the second pod is another one");
    wait_until("the pod's directory is gone", seconds(10), || !pilot.home.join("p1").exists());
}

#[test]
fn the_seed_example_that_is_to_run_once_succeeds() {
    let namespace = Namespace::new("seed-once");
    let pilot = Pilot::sbatch(Options::new("seed-once"));
    let once = EXAMPLE
        .replace("spec:\n  containers:", "spec:\n  restartPolicy: Never\n  containers:")
        .replace(r#"["300", "2"]"#, r#"["2", "2"]"#)
        .replace("mylin", &pilot.site);
    namespace.apply(&once);
    wait_until("stress runs", seconds(30), || {
        stress(&pilot).first().is_some_and(|line| line.starts_with("stress --timeout 2 --cpu 2"))
    });
    namespace.wait_phase("p1", "Succeeded", seconds(30));
}
