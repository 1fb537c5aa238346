//! Which pods a Node is there for, and which are there because of the Node.

use k8s_openapi::api::core::v1::Pod;

/// Whether a pod is work. Those of a DaemonSet and a kubelet's mirror pods come with the Node and stay until it goes, so they
/// are none; `kubectl drain` passes them over in the same way (kubectl, `pkg/drain/filters.go`).
pub(super) fn is_work(pod: &Pod) -> bool {
    let owners = pod.metadata.owner_references.iter().flatten();
    let mut controllers = owners.filter(|owner| owner.controller == Some(true));
    let mirror = pod.metadata.annotations.as_ref().is_some_and(|all| all.contains_key(MIRROR));
    !mirror && !controllers.any(|owner| owner.kind == "DaemonSet")
}

/// On the pod that stands for a static one (core/v1, `MirrorPodAnnotationKey`).
const MIRROR: &str = "kubernetes.io/config.mirror";

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, from_value, json};

    #[test]
    fn pods_that_come_with_the_node_are_no_work() {
        let owned = |kind: &str, controller: Value| json!({"ownerReferences": [{"apiVersion": "v1", "kind": kind, "name": "o", "uid": "u", "controller": controller}]});
        for (metadata, work) in [
            (json!({}), true),
            (owned("Job", json!(true)), true),
            (owned("DaemonSet", json!(true)), false),
            // An owner that does not control it is no more than a reason to be collected.
            (owned("DaemonSet", json!(null)), true),
            (json!({"annotations": {"kubernetes.io/config.mirror": "x"}}), false),
            (json!({"annotations": {"kubernetes.io/config.source": "api"}}), true),
        ] {
            let pod: Pod = from_value(json!({"metadata": metadata})).unwrap();
            assert_eq!(is_work(&pod), work, "{metadata}");
        }
    }
}
