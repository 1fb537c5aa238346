//! What pods with much in them take: a large ConfigMap, many containers, probes. Issue by issue these figures are goals of
//! their own; the others must not grow with them.

use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::time::{Duration, SystemTime};

use serde_json::{Value, json};

use crate::harness::{Namespace, Pilot, pod_spec, seconds, wait_until};
use crate::report::{Figure, Report};
use crate::series::moment;
use crate::statistics::Samples;
use crate::watch::Watcher;
use crate::weight;

/// Containers of a pod with many.
const CONTAINERS: usize = 20;

/// Bytes of a ConfigMap that is as large as Kubernetes lets one be (its own limit is 1 MiB of data), less the script.
const LARGE: usize = 1_000_000;

/// Pods that probe, or have limits.
const PODS: usize = 100;

/// How long the pilot is watched meanwhile.
const WATCHED: Duration = Duration::from_secs(20);

/// A pod of 20 containers that all mount a ConfigMap of 1 MiB: from its binding to the last container's first line.
pub fn large(report: &mut Report, watcher: &Watcher, namespace: &Namespace, pilot: &Pilot, count: usize) {
    let text = "x".repeat(LARGE);
    namespace.config_map("large", &[("run.sh", "echo $EPOCHREALTIME >time\n"), ("data.txt", &text)]);
    let mut samples = Samples::default();
    for index in 0..count {
        let name = format!("large-{index}");
        let container = |n: usize| {
            json!({"name": format!("c{n}"), "image": "large/run.sh", "command": ["bash"],
                "volumeMounts": [{"name": "large", "mountPath": "job"}]})
        };
        let containers: Vec<Value> = (0..CONTAINERS).map(container).collect();
        create(namespace, pilot, &name, pod_spec("Never", &containers));
        watcher.wait("ended", &namespace.name, &name, |seen| seen.ended);
        let bound = watcher.seen(&namespace.name, &name).bound.unwrap();
        let first = |n: usize| {
            let file = pilot.pod_directory(&name).join(format!("containers/c{n}/time"));
            moment(
                std::fs::read_to_string(&file)
                    .unwrap_or_else(|error| panic!("{}: {error}", file.display()))
                    .trim(),
            )
        };
        samples.push(bound, (0..CONTAINERS).map(first).max().unwrap());
        namespace.of("pods").delete(&name, None);
        namespace.wait_gone(&name, seconds(30));
    }
    let name = "20 containers, ConfigMap of 1 MiB: bound → the last one's first line";
    report.push(Figure::times(name, &samples).goal(100.0, None));
}

/// 100 pods that probe an HTTP server every second: processor time of guardian and pilot.
pub fn probed(report: &mut Report, watcher: &Watcher, namespace: &Namespace, pilot: &Pilot) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let mut stream = stream;
            let _ = stream.read(&mut [0; 1024]);
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok");
        }
    });
    let probe = json!({"livenessProbe": {"httpGet": {"port": port, "path": "/"}, "periodSeconds": 1}});
    let name = "100 pods that probe every second: CPU of guardian and pilot";
    watched(report, watcher, namespace, pilot, (&probe, name, 5.0));
}

/// 100 pods with a memory limit, weighed every second: processor time of guardian and pilot.
pub fn limited(report: &mut Report, watcher: &Watcher, namespace: &Namespace, pilot: &Pilot) {
    let limit = json!({"resources": {"limits": {"memory": "64Mi"}}});
    let name = "100 pods with a memory limit: CPU of guardian and pilot";
    watched(report, watcher, namespace, pilot, (&limit, name, 1.0));
}

/// Many pods that do nothing, with containers that have this besides.
fn watched(
    report: &mut Report,
    watcher: &Watcher,
    namespace: &Namespace,
    pilot: &Pilot,
    (besides, name, most): (&Value, &str, f64),
) {
    namespace.config_map("quiet", &[("run.sh", "exec sleep 600\n")]);
    // Each pod a name of its own: the watcher remembers them.
    let pod = |index: usize| format!("quiet-{}-{index}", name.len());
    for index in 0..PODS {
        let mut container = json!({"name": "c1", "image": "quiet", "command": ["bash"],
            "volumeMounts": [{"name": "quiet", "mountPath": "job"}]});
        for (key, value) in besides.as_object().into_iter().flatten() {
            container[key] = value.clone();
        }
        create(namespace, pilot, &pod(index), pod_spec("Never", &[container]));
    }
    for index in 0..PODS {
        watcher.wait("running", &namespace.name, &pod(index), |seen| seen.running);
    }
    weight::settle();
    let share = weight::processor_share(pilot, WATCHED);
    report.push(Figure::number(name, "% of a core", share).at_most(most));
    let pods = namespace.of("pods");
    for index in 0..PODS {
        pods.delete(&pod(index), Some(1));
    }
    wait_until("these pods are gone", seconds(60), || pods.list("").is_empty());
    namespace.of("configmaps").delete("quiet", None);
}

fn create(namespace: &Namespace, pilot: &Pilot, name: &str, mut spec: Value) -> SystemTime {
    spec["nodeName"] = pilot.node.as_str().into();
    pilot.place(&mut spec);
    let asked = SystemTime::now();
    namespace.of("pods").create(&json!({"metadata": {"name": name}, "spec": spec}));
    asked
}
