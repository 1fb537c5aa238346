//! A namespace of a test's own, and short ways to write pods.

use serde_json::{Value, json};

use super::{Pilot, api, bed, seconds, unique, wait_for, wait_until};

/// A namespace in which the pilots may read Secrets, ConfigMaps and tokens. Deleted at drop.
pub struct Namespace {
    /// Its name.
    pub name: String,
}

impl Namespace {
    /// Makes one, and waits until Kubernetes has given it its ServiceAccount and CA.
    pub fn new(label: &str) -> Self {
        let name = unique(label);
        api::cluster("namespaces").create(&json!({"metadata": {"name": name}}));
        api::grouped("rbac.authorization.k8s.io/v1", &name, "rolebindings").create(&json!({
            "metadata": {"name": "jiriaf-pilot"},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole",
                "name": "jiriaf-pilot-workload"},
            "subjects": [{"kind": "ServiceAccount", "name": "jiriaf-pilot", "namespace": "jiriaf"}],
        }));
        wait_until("the namespace has its default ServiceAccount and CA", seconds(30), || {
            api::namespaced(&name, "serviceaccounts").get("default").is_some()
                && api::namespaced(&name, "configmaps").get("kube-root-ca.crt").is_some()
        });
        Self { name }
    }

    /// `kubectl apply` of YAML in this namespace.
    pub fn apply(&self, yaml: &str) {
        bed().apply(&self.name, yaml);
    }

    /// A ConfigMap of text files.
    pub fn config_map(&self, name: &str, files: &[(&str, &str)]) {
        let data: serde_json::Map<String, Value> =
            files.iter().map(|(file, text)| ((*file).to_owned(), Value::from(*text))).collect();
        self.of("configmaps").create(&json!({"metadata": {"name": name}, "data": data}));
    }

    /// A pod of this spec on this pilot, and on no other.
    pub fn pod_on(&self, pilot: &Pilot, name: &str, mut spec: Value) -> Value {
        pilot.place(&mut spec);
        self.of("pods").create(&json!({"metadata": {"name": name}, "spec": spec}))
    }

    /// The simplest pod: one container `c1` that runs this script with bash, once (restartPolicy Never). Its
    /// ConfigMap, volume and image have the pod's name; it is mounted at `job`.
    pub fn script_on(&self, pilot: &Pilot, name: &str, script: &str) -> Value {
        self.config_map(name, &[("run.sh", script)]);
        self.pod_on(pilot, name, pod_spec("Never", &[container("c1", name)]))
    }

    /// Objects of the core group in this namespace: `of("pods")`.
    pub fn of(&self, resource: &str) -> api::Collection {
        api::namespaced(&self.name, resource)
    }

    /// The pod as it is now.
    pub fn pod(&self, name: &str) -> Option<Value> {
        self.of("pods").get(name)
    }

    /// A pod that runs, does not heed SIGTERM, and has a grace of ten minutes.
    pub fn stubborn_pod(&self, pilot: &Pilot, name: &str) {
        self.config_map(name, &[("run.sh", "trap '' TERM\nwhile :; do sleep 0.2; done\n")]);
        let mut spec = pod_spec("Never", &[container("c1", name)]);
        spec["terminationGracePeriodSeconds"] = json!(600);
        self.pod_on(pilot, name, spec);
        self.wait_phase(name, "Running", seconds(30));
    }

    /// Adds ephemeral containers to a pod, as kubectl debug does.
    #[track_caller]
    pub fn add_ephemeral(&self, pod: &str, containers: &Value) {
        let patch = json!({"spec": {"ephemeralContainers": containers}}).to_string();
        let words =
            ["-n", &self.name, "patch", "pod", pod, "--subresource=ephemeralcontainers", "--type=strategic"];
        let patched = bed().kubectl(&[&words[..], &["-p", &patch]].concat());
        assert!(patched.success, "{}", patched.text);
    }

    /// Waits until the pod is in this phase, and returns it. A pod in another terminal phase fails the test at
    /// once.
    #[track_caller]
    pub fn wait_phase(&self, name: &str, phase: &str, limit: std::time::Duration) -> Value {
        wait_for(&format!("pod {name} is {phase}"), limit, || {
            let pod = self.pod(name).unwrap_or_else(|| panic!("pod {name} is gone before it was {phase}"));
            let now = pod["status"]["phase"].as_str().unwrap_or_default();
            assert!(
                now == phase || !matches!(now, "Succeeded" | "Failed"),
                "pod {name} is {now}, not {phase}: {:#}",
                pod["status"]
            );
            (now == phase).then_some(pod.clone())
        })
    }

    /// Waits until there is no such pod.
    #[track_caller]
    pub fn wait_gone(&self, name: &str, limit: std::time::Duration) {
        wait_until(&format!("pod {name} is gone"), limit, || self.pod(name).is_none());
    }

    /// Reason and message of the events about an object of this name.
    pub fn events(&self, name: &str) -> Vec<(String, String)> {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let events = self.of("events").list("").into_iter();
        let about = events.filter(|event| event["involvedObject"]["name"] == name);
        about.map(|event| (text(&event["reason"]), text(&event["message"]))).collect()
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let shown = bed().kubectl(&["-n", &self.name, "get", "pods,events", "-o", "wide"]).text;
            eprintln!("--- namespace {} ---\n{shown}", self.name);
        }
        api::cluster("namespaces").delete(&self.name, None);
    }
}

/// A container that runs the scripts of `volume` (a ConfigMap's name, see [`pod_spec`]) with bash.
pub fn container(name: &str, volume: &str) -> Value {
    json!({"name": name, "image": volume, "command": ["bash"],
        "volumeMounts": [{"name": volume, "mountPath": "job"}]})
}

/// A pod's spec, with a configMap volume for each volumeMount's name. No service account token, unless the
/// test takes the field out.
pub fn pod_spec(restart_policy: &str, containers: &[Value]) -> Value {
    let mut names: Vec<&str> = containers
        .iter()
        .flat_map(|container| container["volumeMounts"].as_array().into_iter().flatten())
        .filter_map(|mount| mount["name"].as_str())
        .collect();
    names.sort_unstable();
    names.dedup();
    let volumes: Vec<Value> =
        names.iter().map(|name| json!({"name": name, "configMap": {"name": name}})).collect();
    json!({"restartPolicy": restart_policy, "automountServiceAccountToken": false,
        "containers": containers, "volumes": volumes})
}

/// A batch Job of one pod of this spec, placed on the pilot.
pub fn job(pilot: &Pilot, name: &str, backoff_limit: u32, mut spec: Value) -> Value {
    pilot.place(&mut spec);
    json!({"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name},
        "spec": {"backoffLimit": backoff_limit, "template": {"spec": spec}}})
}
