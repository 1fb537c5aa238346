//! What a pod may have on disk: sizeLimits of its emptyDirs, `ephemeral-storage` limits of its containers (pkg/kubelet/eviction,
//! localStorageEviction: the order and the texts).

use std::path::Path;

use k8s_openapi::api::core::v1::{Container, Pod, Volume};

use super::{VOLUMES, usage};
use crate::pod::containers::{self, Kind};
use crate::pod::directory::container_dir;
use crate::pod::quantity;

const RESOURCE: &str = "ephemeral-storage";

/// A limit in bytes, and as a kubelet writes it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Limit {
    of: String,
    bytes: u64,
    text: String,
}

/// What a pod may have on disk.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Limits {
    /// Of emptyDirs.
    volumes: Vec<Limit>,
    /// Of main containers: what is in their directories, logs among it.
    containers: Vec<Limit>,
    /// Of all together, where any container has one.
    pod: Option<Limit>,
    /// What counts for that.
    all_containers: Vec<String>,
    all_volumes: Vec<String>,
}

impl Limits {
    pub(super) fn of(pod: &Pod) -> Self {
        let volumes = || pod.spec.iter().flat_map(|spec| spec.volumes.iter().flatten());
        let on_disk = |volume: &&Volume| {
            volume
                .empty_dir
                .as_ref()
                .is_some_and(|empty| empty.medium.as_deref().unwrap_or_default().is_empty())
        };
        let mut limits = Self {
            volumes: volumes().filter_map(volume_limit).collect(),
            all_volumes: volumes().filter(on_disk).map(|volume| volume.name.clone()).collect(),
            ..Self::default()
        };
        // PodLimits: the sum of those that stay, or what an init container may have beside the sidecars before it.
        let (mut sum, mut most, mut texts) = (0_u64, 0_u64, Vec::new());
        for (kind, container) in containers::of(pod) {
            limits.all_containers.push(container.name.clone());
            let Some(limit) = container_limit(&container) else { continue };
            texts.push(limit.text.clone());
            match kind {
                Kind::Init => most = most.max(sum.saturating_add(limit.bytes)),
                Kind::Sidecar | Kind::Main => sum = sum.saturating_add(limit.bytes),
                Kind::Ephemeral => {}
            }
            if kind == Kind::Main {
                limits.containers.push(limit);
            }
        }
        let bytes = sum.max(most);
        let text = if texts.len() == 1 { texts.remove(0) } else { quantity::binary(bytes) };
        limits.pod = (bytes > 0).then_some(Limit { of: String::new(), bytes, text });
        limits
    }

    /// Whether there is nothing to look at.
    pub(super) fn is_empty(&self) -> bool {
        self.volumes.is_empty() && self.pod.is_none()
    }

    /// Looks at the disk: what the pod is told when it is over one of its limits.
    pub(super) fn exceeded(&self, directory: &Path) -> Option<String> {
        let volume = |name: &str| directory.join(VOLUMES).join(name);
        let over =
            self.volumes.iter().find(|limit| usage::used(&volume(&limit.of), limit.bytes) > limit.bytes);
        if let Some(Limit { of, text, .. }) = over {
            return Some(format!("Usage of EmptyDir volume {of:?} exceeds the limit {text:?}. "));
        }
        let pods = self.pod.as_ref()?;
        let mut total = 0_u64;
        let mut over = None;
        for name in &self.all_containers {
            let used = usage::used(&container_dir(directory, name), pods.bytes);
            total = total.saturating_add(used);
            over =
                over.or_else(|| self.containers.iter().find(|limit| limit.of == *name && used > limit.bytes));
        }
        for name in &self.all_volumes {
            total = total.saturating_add(usage::used(&volume(name), pods.bytes));
        }
        if total > pods.bytes {
            let text = &pods.text;
            return Some(format!(
                "Pod ephemeral local storage usage exceeds the total limit of containers {text}. "
            ));
        }
        over.map(|Limit { of, text, .. }| {
            format!("Container {of} exceeded its local ephemeral storage limit {text:?}. ")
        })
    }
}

fn volume_limit(volume: &Volume) -> Option<Limit> {
    let limit = volume.empty_dir.as_ref()?.size_limit.as_ref()?;
    let bytes = u64::try_from(quantity::bytes(limit).ok()?).ok().filter(|bytes| *bytes > 0)?;
    Some(Limit { of: volume.name.clone(), bytes, text: limit.0.clone() })
}

fn container_limit(container: &Container) -> Option<Limit> {
    let limit = container.resources.as_ref()?.limits.as_ref()?.get(RESOURCE)?;
    let bytes = u64::try_from(quantity::bytes(limit).ok()?).ok().filter(|bytes| *bytes > 0)?;
    Some(Limit { of: container.name.clone(), bytes, text: limit.0.clone() })
}

#[cfg(test)]
mod tests {
    use std::fs;

    use serde_json::{Value, from_value, json};

    use super::*;

    fn pod(volumes: Value, containers: Value) -> Pod {
        from_value(json!({"metadata": {"name": "p"}, "spec": {"containers": containers, "volumes": volumes}}))
            .unwrap()
    }

    fn limited(name: &str, limit: &str) -> Value {
        json!({"name": name, "resources": {"limits": {RESOURCE: limit}}})
    }

    #[test]
    fn limits_are_told_as_the_pod_writes_them() {
        let volumes = json!([
            {"name": "a", "emptyDir": {}},
            {"name": "b", "emptyDir": {"sizeLimit": "1Mi"}},
            {"name": "c", "emptyDir": {"sizeLimit": "0", "medium": "Memory"}},
            {"name": "d", "emptyDir": {"sizeLimit": "2G", "medium": "Memory"}},
        ]);
        let limits = Limits::of(&pod(volumes, json!([])));
        let told: Vec<_> = limits.volumes.iter().map(|l| (l.of.as_str(), l.bytes, l.text.as_str())).collect();
        assert_eq!(told, [("b", 1 << 20, "1Mi"), ("d", 2_000_000_000, "2G")]);
        assert_eq!((limits.all_volumes, limits.pod), (vec!["a".to_owned(), "b".to_owned()], None));
        let two =
            Limits::of(&pod(json!([]), json!([limited("a", "1Gi"), limited("b", "512Mi"), {"name": "c"}])));
        assert_eq!(
            two.pod.unwrap(),
            Limit { of: String::new(), bytes: 1536 << 20, text: "1536Mi".to_owned() }
        );
        assert!(Limits::of(&pod(json!([]), json!([{"name": "c"}]))).is_empty());
    }

    #[test]
    fn the_words_are_a_kubelets() {
        let root = tempfile::tempdir().unwrap();
        let write = |path: &str, kib: usize| {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, vec![1; kib << 10]).unwrap();
        };
        let volumes =
            json!([{"name": "v", "emptyDir": {"sizeLimit": "100Ki"}}, {"name": "w", "emptyDir": {}}]);
        let limits = Limits::of(&pod(volumes, json!([limited("c", "300Ki"), limited("d", "700Ki")])));
        assert_eq!(limits.exceeded(root.path()), None);
        write("containers/c/logs/0.log", 350);
        assert_eq!(
            limits.exceeded(root.path()).unwrap(),
            "Container c exceeded its local ephemeral storage limit \"300Ki\". "
        );
        write("volumes/w/file", 800);
        assert_eq!(
            limits.exceeded(root.path()).unwrap(),
            "Pod ephemeral local storage usage exceeds the total limit of containers 1000Ki. "
        );
        write("volumes/v/file", 200);
        assert_eq!(
            limits.exceeded(root.path()).unwrap(),
            "Usage of EmptyDir volume \"v\" exceeds the limit \"100Ki\". "
        );
    }
}
