//! Whom a kubelet evicts first when memory runs short, and what it says (pkg/kubelet/eviction/helpers.go).

use std::cmp::Reverse;
use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Container, Pod, Toleration};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

use crate::pod::admission::Load;
use crate::pod::containers;
use crate::pod::quantity;
use crate::pod::share::{Qos, qos};

/// Pods of this priority and above are never evicted (pkg/apis/scheduling, SystemCriticalPriority).
const CRITICAL: i32 = 2_000_000_000;

/// The taint that the Node controller gives a Node under pressure.
const TAINT: &str = "node.kubernetes.io/memory-pressure";

/// A pod that runs, and what it takes, in bytes.
#[derive(Debug, Clone)]
pub struct Consumer {
    /// The pod.
    pub pod: Pod,
    /// The containers' names, and what they take.
    pub containers: Vec<(String, u64)>,
    /// What it has in memory that no process holds: emptyDirs.
    pub besides: u64,
}

impl Consumer {
    fn usage(&self) -> u64 {
        self.containers.iter().map(|(_, bytes)| bytes).sum::<u64>().saturating_add(self.besides)
    }

    /// The pod's uid.
    #[must_use]
    pub fn uid(&self) -> &str {
        self.pod.metadata.uid.as_deref().unwrap_or_default()
    }
}

/// What the pod asks for, in bytes, as admission counts it.
fn request(pod: &Pod) -> u64 {
    u64::try_from(Load::of([pod]).used("memory").units()).unwrap_or(0)
}

/// What a container asks for: in bytes, and as it is written.
fn container_request(container: &Container) -> (u64, String) {
    let of = |map: &Option<BTreeMap<String, Quantity>>| map.as_ref()?.get("memory").cloned();
    let found = container.resources.as_ref().and_then(|r| of(&r.requests).or_else(|| of(&r.limits)));
    found.map_or((0, "0".to_owned()), |found| {
        (quantity::bytes(&found).unwrap_or(0).try_into().unwrap_or(0), found.0)
    })
}

/// Whether the pod is never evicted.
#[must_use]
pub fn is_critical(pod: &Pod) -> bool {
    priority(pod) >= CRITICAL
}

fn priority(pod: &Pod) -> i32 {
    pod.spec.as_ref().and_then(|spec| spec.priority).unwrap_or(0)
}

/// The one to be evicted: of those that take more than they ask for (else of all), that of the lowest priority, and of equals the
/// one that is furthest above its request. Never a critical one.
#[must_use]
pub fn first(consumers: &[Consumer]) -> Option<&Consumer> {
    let candidates = consumers.iter().filter(|consumer| !is_critical(&consumer.pod));
    candidates.min_by_key(|consumer| {
        let (usage, request) = (i128::from(consumer.usage()), i128::from(request(&consumer.pod)));
        (usage <= request, priority(&consumer.pod), Reverse(usage - request))
    })
}

/// What the pod is told.
#[must_use]
pub fn message(consumer: &Consumer, threshold: u64, available: u64) -> String {
    let mut message = format!(
        "The node was low on resource: memory. Threshold quantity: {}, available: {}. ",
        quantity::binary(threshold),
        quantity::binary(available)
    );
    let larger = |what: &str, usage: u64, request: &str| {
        format!(
            "{what} was using {}, request is {request}, has larger consumption of memory. ",
            quantity::binary(usage)
        )
    };
    let spec = consumer.pod.spec.as_ref();
    if let Some(own) = spec.and_then(|spec| spec.resources.as_ref()?.requests.as_ref()?.get("memory")) {
        let name = consumer.pod.metadata.name.as_deref().unwrap_or_default();
        message.push_str(&larger(&format!("Pod {name}"), consumer.usage(), &own.0));
    }
    for (name, usage) in &consumer.containers {
        let found = containers::find(&consumer.pod, name).map(|(_, container)| container_request(&container));
        let (request, text) = found.unwrap_or((0, "0".to_owned()));
        if *usage > request {
            message.push_str(&larger(&format!("Container {name}"), *usage, &text));
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
        || is_critical(pod)
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
        Consumer {
            pod: from_value(pod).unwrap(),
            containers: vec![("c".to_owned(), usage * MIB)],
            besides: 0,
        }
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
            "The node was low on resource: memory. Threshold quantity: 100Mi, available: 5000. Container c was using 3Mi, request \
             is 1Mi, has larger consumption of memory. "
        );
        // An init container's request counts where it is the larger one, and what nobody holds counts too.
        let mut init = consumer("a", 0, json!({"memory": "1Mi"}), 3);
        let first = json!([{"name": "i", "resources": {"requests": {"memory": "10Mi"}}}]);
        init.pod.spec.as_mut().unwrap().init_containers = from_value(first).unwrap();
        assert_eq!(request(&init.pod), 10 * MIB);
        init.besides = 30 * MIB;
        assert_eq!(init.usage(), 33 * MIB);
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
