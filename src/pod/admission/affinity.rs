//! nodeSelector and the required node affinity.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{NodeSelectorRequirement, NodeSelectorTerm, PodSpec};

use super::NodeFacts;

/// The seconds that a node has left, as its label.
const ALIVETIME: &str = "jiriaf.alivetime";

/// Whether the pod wants a node like this (component-helpers `GetRequiredNodeAffinity`).
pub(super) fn matches(spec: &PodSpec, node: &NodeFacts) -> bool {
    let selected =
        spec.node_selector.iter().flatten().all(|(key, value)| node.labels.get(key) == Some(value));
    let required = spec
        .affinity
        .as_ref()
        .and_then(|affinity| affinity.node_affinity.as_ref())
        .and_then(|affinity| affinity.required_during_scheduling_ignored_during_execution.as_ref());
    selected
        && required.is_none_or(|selector| selector.node_selector_terms.iter().any(|term| holds(term, node)))
}

/// Whether all of a term's requirements hold. An empty term matches nothing.
fn holds(term: &NodeSelectorTerm, node: &NodeFacts) -> bool {
    let expressions = term.match_expressions.as_deref().unwrap_or_default();
    let fields = term.match_fields.as_deref().unwrap_or_default();
    if expressions.is_empty() && fields.is_empty() {
        return false;
    }
    let names = BTreeMap::from([("metadata.name".to_owned(), node.name.clone())]);
    expressions
        .iter()
        .all(|requirement| lives_long(requirement, node) || requirement_holds(requirement, &node.labels))
        && fields.iter().all(|requirement| {
            // The API takes In and NotIn alone here, with one value.
            matches!(requirement.operator.as_str(), "In" | "NotIn")
                && names.contains_key(&requirement.key)
                && requirement_holds(requirement, &names)
        })
}

/// Whether the node lives longer than a requirement of its alivetime asks. The label that the scheduler went by may have been
/// written anew while the pod was on its way, each time with less; what is really left is more than either.
fn lives_long(requirement: &NodeSelectorRequirement, node: &NodeFacts) -> bool {
    let (Some(left), Some([value])) = (node.time_left, requirement.values.as_deref()) else { return false };
    requirement.key == ALIVETIME
        && requirement.operator == "Gt"
        && node.labels.contains_key(ALIVETIME)
        && value.parse::<u64>().is_ok_and(|value| left.as_secs() > value)
}

/// One requirement (apimachinery `labels.Requirement.Matches`).
fn requirement_holds(requirement: &NodeSelectorRequirement, labels: &BTreeMap<String, String>) -> bool {
    let label = labels.get(&requirement.key);
    let values = requirement.values.as_deref().unwrap_or_default();
    match requirement.operator.as_str() {
        "In" => label.is_some_and(|label| values.contains(label)),
        "NotIn" => !label.is_some_and(|label| values.contains(label)),
        "Exists" => label.is_some(),
        "DoesNotExist" => label.is_none(),
        operator @ ("Gt" | "Lt") => {
            let (Some(label), [value]) = (label, values) else { return false };
            let (Ok(label), Ok(value)) = (label.parse::<i64>(), value.parse::<i64>()) else { return false };
            if operator == "Gt" { label > value } else { label < value }
        }
        _ => false,
    }
}
