//! The example that JIRIAF's users begin with.

use crate::harness::{Namespace, Options, Pilot, read, seconds, wait_for, wait_until};

/// As users write it, but for the time that stress takes.
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
  restartPolicy: Never
  containers:
    - name: c1
      image: direct-stress # the name of one of the volumeMounts
      command: ["bash"]
      args: ["TIME", "2"]
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

#[test]
fn the_seed_example_runs_and_succeeds_at_the_plain_path_twice_in_a_row() {
    let namespace = Namespace::new("seed");
    // The one test whose site is not its own, because the example names it.
    let pilot = Pilot::sbatch(Options { site: Some("mylin".into()), ..Options::new("seed") });
    for _ in 0..2 {
        namespace.apply(&EXAMPLE.replace("TIME", "2"));
        let container = pilot.home.join("p1/containers/c1");
        wait_until("stress runs", seconds(30), || {
            pilot.processes().iter().any(|(_, command)| command.starts_with("stress --timeout 2 --cpu 2"))
        });
        assert!(read(&container.join("stress/job1/stress.sh")).contains("stress --timeout"));
        let pgid: i32 = read(&container.join("pgid")).trim_end().parse().unwrap();
        assert!(pgid > 1, "pgid is {pgid}");
        namespace.wait_phase("p1", "Succeeded", seconds(30));
        namespace.of("pods").delete("p1", None);
        namespace.wait_gone("p1", seconds(30));
        wait_until("the pod's directory is gone", seconds(10), || !pilot.home.join("p1").exists());
    }
}

#[test]
fn a_deleted_seed_example_leaves_no_stress_behind() {
    let namespace = Namespace::new("seed-deleted");
    let pilot = Pilot::sbatch(Options::new("seed-deleted"));
    namespace.apply(&EXAMPLE.replace("TIME", "300").replace("mylin", &pilot.site));
    let running = || -> Vec<i32> {
        let processes = pilot.processes();
        processes.into_iter().filter(|(_, line)| line.starts_with("stress ")).map(|(pid, _)| pid).collect()
    };
    // The parent and its two workers.
    wait_for("stress and its workers run", seconds(30), || (running().len() >= 3).then_some(()));
    namespace.wait_phase("p1", "Running", seconds(10));
    namespace.of("pods").delete("p1", Some(5));
    namespace.wait_gone("p1", seconds(20));
    assert_eq!(running(), Vec::<i32>::new(), "of stress, when the pod is gone");
}
