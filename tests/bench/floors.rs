//! What the API server and the kernel alone take here: the same steps without a pilot, in the same run.

use std::process::{Command, Stdio};
use std::time::{Instant, SystemTime};

use serde_json::json;

use crate::harness::{Namespace, api, bed};
use crate::report::{Figure, Report};
use crate::statistics::Samples;
use crate::watch::Watcher;

/// The floors, in milliseconds.
pub struct Floors {
    /// One GET of a ConfigMap, from its start to its answer.
    pub read: Samples,
    /// One PATCH of a pod's status, from its start until the watcher sees it.
    pub patch: Samples,
    /// One create of a bound pod, from its start until the watcher sees it.
    pub create: Samples,
    /// Three executions of the static binary that do nothing (`--version`), one after the other.
    pub execs: Samples,
    /// One TokenRequest, from its start to its answer.
    pub token: Samples,
    /// bash by itself, from its start to its script's first line: a part of every start that is measured here.
    pub bash: Samples,
}

/// A Node that nobody has: what is bound to it stays as it is, until the pod garbage collector comes (40 s).
const NO_NODE: &str = "jiriaf-bench-no-node";

/// Measures each of them `samples` times.
pub fn measure(watcher: &Watcher, samples: usize) -> Floors {
    let namespace = Namespace::new("floor");
    namespace.config_map("script", &[("run.sh", crate::series::SHORT)]);
    let config_maps = namespace.of("configmaps");
    let read = repeat(samples, |_| {
        config_maps.get("script");
    });

    let pods = namespace.of("pods");
    let mut create = Samples::default();
    for index in 0..samples {
        let name = format!("create{index}");
        let start = SystemTime::now();
        pods.create(&idle_pod(&name, json!(NO_NODE)));
        create.push(start, watcher.wait("seen", &namespace.name, &name, |seen| seen.bound));
    }
    pods.create(&idle_pod("patched", json!(null)));
    let status = api::namespaced(&namespace.name, "pods/patched");
    let mut patch = Samples::default();
    for index in 0..samples {
        let start = SystemTime::now();
        let answer = status.merge("status", &json!({"status": {"message": index.to_string()}}));
        let version = answer["metadata"]["resourceVersion"].as_str().unwrap().to_owned();
        let seen = watcher.wait("patched", &namespace.name, "patched", |seen| {
            seen.versions.iter().find(|(known, _)| *known == version).map(|(_, at)| *at)
        });
        patch.push(start, seen);
    }

    let binary = bed().binary();
    let execs = repeat(samples, |_| {
        for _ in 0..3 {
            let mut command = Command::new(&binary);
            let status = command.arg("--version").stdout(Stdio::null()).status().unwrap();
            assert!(status.success(), "{} --version: {status}", binary.display());
        }
    });
    let tokens = namespace.of("serviceaccounts/default/token");
    let token = repeat(samples, |_| {
        tokens.create(&json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest",
            "spec": {"expirationSeconds": 3600}}));
    });
    let mut bash = Samples::default();
    for _ in 0..samples {
        let start = SystemTime::now();
        let output = Command::new("bash").args(["-c", "echo $EPOCHREALTIME"]).output().unwrap();
        bash.push(start, crate::series::moment(String::from_utf8_lossy(&output.stdout).trim()));
    }
    Floors { read, patch, create, execs, token, bash }
}

impl Floors {
    /// Into the table.
    pub fn tell(&self, report: &mut Report) {
        report.push(Figure::floor("one GET of a ConfigMap", &self.read));
        report.push(Figure::floor("three execs of the static binary", &self.execs));
        report.push(Figure::floor("bash until its first line", &self.bash));
        report.push(Figure::floor("one status PATCH until a watcher sees it", &self.patch));
        report.push(Figure::floor("one create until a watcher sees it", &self.create));
        report.push(Figure::floor("one TokenRequest", &self.token));
    }
}

fn repeat(times: usize, mut what: impl FnMut(usize)) -> Samples {
    let mut samples = Samples::default();
    // The first ones open a connection and fill caches.
    for index in 0..times + 3 {
        let start = Instant::now();
        what(index);
        if index >= 3 {
            samples.add(start.elapsed());
        }
    }
    samples
}

fn idle_pod(name: &str, node: serde_json::Value) -> serde_json::Value {
    // The selector keeps the scheduler from placing it.
    json!({"metadata": {"name": name}, "spec": {"nodeName": node, "nodeSelector": {"jiriaf.site": "none"},
        "restartPolicy": "Never", "automountServiceAccountToken": false,
        "containers": [{"name": "c1", "image": "none"}]}})
}
