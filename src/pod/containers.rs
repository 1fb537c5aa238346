//! The containers of a pod, of whichever list of its spec they are: init containers and sidecars, the main ones, and
//! ephemeral ones. Their names differ over all three lists (core/v1 validation), so a name finds one.

use std::borrow::Cow;

use k8s_openapi::api::core::v1::{Container, EphemeralContainer, Pod, PodSpec};

/// In which list of the spec a container is, and what that makes of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// An init container that has to end before what comes after it starts.
    Init,
    /// An init container with restartPolicy Always: what comes after it starts once this has started.
    Sidecar,
    /// One of `spec.containers`.
    Main,
    /// One that was added to a pod that runs (`kubectl debug`). It says nothing about the pod's phase.
    Ephemeral,
}

impl Kind {
    /// The list of the spec, as its field is called.
    #[must_use]
    pub fn field(self) -> &'static str {
        match self {
            Self::Init | Self::Sidecar => "initContainers",
            Self::Main => "containers",
            Self::Ephemeral => "ephemeralContainers",
        }
    }
}

/// All containers: init containers in their order, then the main ones, then ephemeral ones.
pub fn all(spec: &PodSpec) -> impl Iterator<Item = (Kind, Cow<'_, Container>)> {
    let init = spec.init_containers.iter().flatten().map(|container| (init_kind(container), container));
    let main = spec.containers.iter().map(|container| (Kind::Main, container));
    let ephemeral = spec.ephemeral_containers.iter().flatten();
    init.chain(main)
        .map(|(kind, container)| (kind, Cow::Borrowed(container)))
        .chain(ephemeral.map(|container| (Kind::Ephemeral, Cow::Owned(as_container(container)))))
}

/// All containers of a pod; none where it has no spec.
pub fn of(pod: &Pod) -> impl Iterator<Item = (Kind, Cow<'_, Container>)> {
    pod.spec.iter().flat_map(all)
}

/// The container of this name.
#[must_use]
pub fn find<'a>(pod: &'a Pod, name: &str) -> Option<(Kind, Cow<'a, Container>)> {
    of(pod).find(|(_, container)| container.name == name)
}

/// Whether an init container is a sidecar (kubelet's `IsRestartableInitContainer`).
fn init_kind(container: &Container) -> Kind {
    if container.restart_policy.as_deref() == Some("Always") { Kind::Sidecar } else { Kind::Init }
}

/// An ephemeral container has a container's fields, of which the API server lets few be used.
fn as_container(from: &EphemeralContainer) -> Container {
    let from = from.clone();
    Container {
        args: from.args,
        command: from.command,
        env: from.env,
        env_from: from.env_from,
        image: from.image,
        image_pull_policy: from.image_pull_policy,
        name: from.name,
        security_context: from.security_context,
        stdin: from.stdin,
        stdin_once: from.stdin_once,
        termination_message_path: from.termination_message_path,
        termination_message_policy: from.termination_message_policy,
        tty: from.tty,
        volume_mounts: from.volume_mounts,
        working_dir: from.working_dir,
        // Neither restarts, probes, hooks, ports nor resources (core/v1 validation, allowedEphemeralContainerFields).
        ..Container::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{from_value, json};

    #[test]
    fn containers_come_in_the_order_of_their_starts() {
        let pod: Pod = from_value(json!({"metadata": {}, "spec": {
            "containers": [{"name": "m1"}, {"name": "m2"}],
            "initContainers": [{"name": "i1"}, {"name": "s1", "restartPolicy": "Always"}, {"name": "i2", "restartPolicy": "Never"}],
            "ephemeralContainers": [{"name": "e1", "image": "busybox", "targetContainerName": "m1"}],
        }}))
        .unwrap();
        let got: Vec<(Kind, String)> = of(&pod).map(|(kind, c)| (kind, c.name.clone())).collect();
        let wanted = [
            (Kind::Init, "i1"),
            (Kind::Sidecar, "s1"),
            (Kind::Init, "i2"),
            (Kind::Main, "m1"),
            (Kind::Main, "m2"),
            (Kind::Ephemeral, "e1"),
        ];
        assert_eq!(got, wanted.map(|(kind, name)| (kind, name.to_owned())));
        let (kind, found) = find(&pod, "e1").unwrap();
        assert_eq!((kind, found.image.as_deref()), (Kind::Ephemeral, Some("busybox")));
        assert!(find(&pod, "none").is_none());
    }
}
