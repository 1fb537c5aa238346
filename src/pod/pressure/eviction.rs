//! Whom a kubelet evicts first when memory runs short, and what it says (pkg/kubelet/eviction/helpers.go).

use std::cmp::Reverse;

use k8s_openapi::api::core::v1::{Pod, Toleration};

use crate::pod::containers;
use crate::pod::quantity;
use crate::pod::share::{Qos, qos};

/// Pods of this priority and above are never evicted (pkg/apis/scheduling, SystemCriticalPriority).
const CRITICAL: i32 = 2_000_000_000;

/// The taint that the Node controller gives a Node under pressure.
const TAINT: &str = "node.kubernetes.io/memory-pressure";

/// A pod that runs, and what its containers take, in bytes.
#[derive(Debug, Clone)]
pub struct Consumer {
    /// The pod.
    pub pod: Pod,
    /// The containers' names, and what they take.
    pub containers: Vec<(String, u64)>,
}

impl Consumer {
    fn usage(&self) -> u64 {
        self.containers.iter().map(|(_, bytes)| bytes).sum()
    }

    /// The pod's uid.
    #[must_use]
    pub fn uid(&self) -> &str {
        self.pod.metadata.uid.as_deref().unwrap_or_default()
    }
}

/// What the pod asks for, in bytes.
fn request(pod: &Pod) -> u64 {
    let spec = pod.spec.as_ref();
    let own = spec.and_then(|spec| spec.resources.as_ref()).and_then(|r| r.requests.as_ref()?.get("memory"));
    if let Some(own) = own {
        return quantity::bytes(own).ok().and_then(|bytes| u64::try_from(bytes).ok()).unwrap_or(0);
    }
    containers::of(pod).map(|(_, container)| container_request(&container)).sum()
}

fn container_request(container: &k8s_openapi::api::core::v1::Container) -> u64 {
    let requests = container.resources.as_ref().and_then(|resources| {
        let of = |map: &Option<std::collections::BTreeMap<_, _>>| map.as_ref()?.get("memory").cloned();
        of(&resources.requests).or_else(|| of(&resources.limits))
    });
    requests.and_then(|quantity| quantity::bytes(&quantity).ok()?.try_into().ok()).unwrap_or(0)
}

fn priority(pod: &Pod) -> i32 {
    pod.spec.as_ref().and_then(|spec| spec.priority).unwrap_or(0)
}

/// The one to be evicted: of those that take more than they ask for (else of all), that of the lowest priority, and of equals the
/// one that is furthest above its request. Never a critical one.
#[must_use]
pub fn first(consumers: &[Consumer]) -> Option<&Consumer> {
    let candidates = consumers.iter().filter(|consumer| priority(&consumer.pod) < CRITICAL);
    candidates.min_by_key(|consumer| {
        let (usage, request) = (i128::from(consumer.usage()), i128::from(request(&consumer.pod)));
        (usage <= request, priority(&consumer.pod), Reverse(usage - request))
    })
}

/// A number of bytes as Kubernetes writes it.
fn quantity(bytes: u64) -> String {
    match bytes {
        0 => "0".to_owned(),
        bytes => format!("{}Ki", bytes.div_ceil(1024)),
    }
}

/// What the pod is told.
#[must_use]
pub fn message(consumer: &Consumer, threshold: u64, available: u64) -> String {
    let mut message = format!(
        "The node was low on resource: memory. Threshold quantity: {}, available: {}. ",
        quantity(threshold),
        quantity(available)
    );
    for (name, usage) in &consumer.containers {
        let found = containers::find(&consumer.pod, name);
        let request = found.map_or(0, |(_, container)| container_request(&container));
        if *usage > request {
            message.push_str(&format!(
                "Container {name} was using {}, request is {}, has larger consumption of memory. ",
                quantity(*usage),
                quantity(request)
            ));
        }
    }
    message
}

/// Whether a Node under memory pressure takes the pod (eviction_manager.go, Admit): one that asks for something, a critical one,
/// or one that tolerates it.
#[must_use]
pub fn takes(pod: &Pod) -> bool {
    let tolerates = |toleration: &Toleration| {
        let set = |text: &Option<String>| text.clone().unwrap_or_default();
        let (key, effect, operator) =
            (set(&toleration.key), set(&toleration.effect), set(&toleration.operator));
        (effect.is_empty() || effect == "NoSchedule")
            && match key.as_str() {
                "" => operator == "Exists",
                key => key == TAINT && (operator == "Exists" || set(&toleration.value).is_empty()),
            }
    };
    qos(pod) != Qos::BestEffort
        || priority(pod) >= CRITICAL
        || pod.spec.iter().flat_map(|spec| spec.tolerations.iter().flatten()).any(tolerates)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, from_value, json};

    use super::*;

    const MIB: u64 = 1 << 20;

    fn consumer(uid: &str, priority: i32, requests: Value, usage: u64) -> Consumer {
        let pod = json!({"metadata": {"uid": uid}, "spec": {"priority": priority, "containers": [
            {"name": "c", "resources": {"requests": requests}}]}});
        Consumer { pod: from_value(pod).unwrap(), containers: vec![("c".to_owned(), usage * MIB)] }
    }

    #[test]
    fn who_takes_more_than_he_asked_for_goes_first() {
        let asks = |memory: &str| json!({"memory": memory});
        let table = [
            // The largest is within its request.
            (vec![("a", 0, asks("1Gi"), 900), ("b", 0, asks("10Mi"), 20)], "b"),
            // By priority among those that are not.
            (vec![("a", 5, json!({}), 900), ("b", 0, json!({}), 20)], "b"),
            // Then by how far.
            (vec![("a", 0, asks("500Mi"), 600), ("b", 0, asks("10Mi"), 200)], "b"),
            // Where all are within theirs, by priority again.
            (vec![("a", 1, asks("1Gi"), 900), ("b", 0, asks("1Gi"), 100)], "b"),
            (vec![("a", CRITICAL, json!({}), 900), ("b", 100, asks("1Gi"), 20)], "b"),
        ];
        for (pods, wanted) in table {
            let all: Vec<_> = pods
                .iter()
                .map(|(uid, priority, asks, usage)| consumer(uid, *priority, asks.clone(), *usage))
                .collect();
            assert_eq!(first(&all).unwrap().uid(), wanted, "{pods:?}");
        }
        assert!(first(&[consumer("a", CRITICAL, json!({}), 9)]).is_none());
    }

    #[test]
    fn the_words_are_a_kubelets() {
        let one = consumer("a", 0, json!({"memory": "1Mi"}), 3);
        assert_eq!(
            message(&one, 100 * MIB, 5000),
            "The node was low on resource: memory. Threshold quantity: 102400Ki, available: 5Ki. Container c was using \
             3072Ki, request is 1024Ki, has larger consumption of memory. "
        );
        let within = consumer("a", 0, json!({"memory": "1Gi"}), 3);
        assert!(message(&within, MIB, 0).ends_with("available: 0. "));
    }

    #[test]
    fn pressure_keeps_out_who_asks_for_nothing() {
        let pod = |spec: Value| from_value::<Pod>(json!({"spec": spec})).unwrap();
        let asks = json!([{"name": "c", "resources": {"requests": {"cpu": "1m"}}}]);
        let nothing = json!([{"name": "c"}]);
        let table = [
            (json!({"containers": asks}), true),
            (json!({"containers": nothing}), false),
            (json!({"containers": nothing, "priority": CRITICAL}), true),
            (json!({"containers": nothing, "tolerations": [{"operator": "Exists"}]}), true),
            (json!({"containers": nothing, "tolerations": [{"key": TAINT, "operator": "Exists"}]}), true),
            (
                json!({"containers": nothing, "tolerations": [{"key": TAINT, "operator": "Exists", "effect": "NoExecute"}]}),
                false,
            ),
            (json!({"containers": nothing, "tolerations": [{"key": "other", "operator": "Exists"}]}), false),
        ];
        for (spec, wanted) in table {
            assert_eq!(takes(&pod(spec.clone())), wanted, "{spec}");
        }
    }
}
