//! What of a status has to be sent: the body of a strategic merge patch.
//!
//! Such a patch leaves alone what it does not name, so what vanished is sent as null. `conditions` merges by
//! type; `podIPs` and `hostIPs` merge by ip, so that a changed address would be added to the old one unless
//! the list is told to be replaced; `containerStatuses` is sent whole (API: pkg types.go, `patchStrategy`).

use k8s_openapi::api::core::v1::{PodCondition, PodStatus};
use serde::Serialize;
use serde_json::{Map, Value, json};

use super::conditions::{DISRUPTION_TARGET, OURS};

/// The patch of a Pod's `status` subresource that makes what the API server has (`old`, as last
/// acknowledged) into `new`; nothing when they do not differ in what is the node's. `uid` makes the API
/// server refuse it (409) when the name belongs to another Pod by now.
#[must_use]
pub fn patch(old: &PodStatus, new: &PodStatus, uid: &str) -> Option<Value> {
    let mut body = Map::new();
    field(&mut body, "phase", old.phase.as_ref(), new.phase.as_ref());
    field(&mut body, "reason", old.reason.as_ref(), new.reason.as_ref());
    field(&mut body, "message", old.message.as_ref(), new.message.as_ref());
    field(&mut body, "hostIP", old.host_ip.as_ref(), new.host_ip.as_ref());
    field(&mut body, "podIP", old.pod_ip.as_ref(), new.pod_ip.as_ref());
    field(&mut body, "startTime", old.start_time.as_ref(), new.start_time.as_ref());
    field(&mut body, "containerStatuses", old.container_statuses.as_ref(), new.container_statuses.as_ref());
    let (old_init, new_init) = (&old.init_container_statuses, &new.init_container_statuses);
    field(&mut body, "initContainerStatuses", old_init.as_ref(), new_init.as_ref());
    let (old_debug, new_debug) = (&old.ephemeral_container_statuses, &new.ephemeral_container_statuses);
    field(&mut body, "ephemeralContainerStatuses", old_debug.as_ref(), new_debug.as_ref());
    list(&mut body, "hostIPs", old.host_ips.as_deref(), new.host_ips.as_deref());
    list(&mut body, "podIPs", old.pod_ips.as_deref(), new.pod_ips.as_deref());
    conditions(&mut body, old, new);
    field(
        &mut body,
        "observedGeneration",
        old.observed_generation.as_ref(),
        new.observed_generation.as_ref(),
    );
    if body.is_empty() {
        return None;
    }
    Some(json!({"metadata": {"uid": uid}, "status": body}))
}

fn field<T: Serialize + PartialEq>(
    body: &mut Map<String, Value>,
    name: &str,
    old: Option<&T>,
    new: Option<&T>,
) {
    if old != new {
        body.insert(name.to_owned(), new.map_or(Value::Null, value));
    }
}

fn list<T: Serialize + PartialEq>(
    body: &mut Map<String, Value>,
    name: &str,
    old: Option<&[T]>,
    new: Option<&[T]>,
) {
    if old.unwrap_or_default() == new.unwrap_or_default() {
        return;
    }
    let mut items: Vec<Value> = new.unwrap_or_default().iter().map(value).collect();
    items.push(json!({"$patch": "replace"}));
    body.insert(name.to_owned(), Value::Array(items));
}

/// Each of our conditions that changed, whole, with null for what it no longer has.
fn conditions(body: &mut Map<String, Value>, old: &PodStatus, new: &PodStatus) {
    let find = |status: &PodStatus, kind: &str| -> Option<PodCondition> {
        status.conditions.iter().flatten().find(|condition| condition.type_ == kind).cloned()
    };
    let mut changed = Vec::new();
    for kind in OURS.into_iter().chain([DISRUPTION_TARGET]) {
        let (before, after) = (find(old, kind), find(new, kind));
        let Some(after) = after.filter(|after| Some(after) != before.as_ref()) else { continue };
        let mut after = value(&after);
        if let (Some(Value::Object(before)), Value::Object(after)) = (before.as_ref().map(value), &mut after)
        {
            for name in before.keys() {
                after.entry(name.clone()).or_insert(Value::Null);
            }
        }
        changed.push(after);
    }
    if !changed.is_empty() {
        body.insert("conditions".to_owned(), Value::Array(changed));
    }
}

/// The JSON of an API type. These cannot fail: their keys are strings.
fn value<T: Serialize>(value: &T) -> Value {
    serde_json::to_value(value).unwrap_or(Value::Null)
}
