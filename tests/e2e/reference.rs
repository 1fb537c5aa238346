//! docs/reference-pod.md names every field of a Pod that the API server knows.

use std::collections::BTreeSet;

use serde_json::Value;

use crate::harness::{bed, read};

/// Parts of a Pod that are the scheduler's or that of kinds of volumes which are named whole.
const WHOLE: [&str; 6] = [
    "Affinity",
    "Toleration",
    "TopologySpreadConstraint",
    "PodResourceClaim",
    "PodSchedulingGroup",
    "VolumeProjection",
];

const PREFIX: &str = "io.k8s.api.core.v1.";

#[test]
fn the_docs_name_every_field_of_a_pod() {
    let answer = bed().kubectl(&["get", "--raw", "/openapi/v3/api/v1"]);
    assert!(answer.success, "{}", answer.text);
    let document: Value = serde_json::from_str(&answer.text).unwrap();
    let schemas = &document["components"]["schemas"];
    let page = read(&std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/reference-pod.md"));
    let named: BTreeSet<&str> = page.split('`').skip(1).step_by(2).collect();
    let mut missing = BTreeSet::new();
    let (mut next, mut seen) = (vec!["PodSpec".to_owned()], BTreeSet::new());
    while let Some(kind) = next.pop() {
        if !seen.insert(kind.clone()) {
            continue;
        }
        let fields =
            schemas[format!("{PREFIX}{kind}")]["properties"].as_object().cloned().unwrap_or_default();
        assert!(!fields.is_empty(), "{kind} has no fields");
        for (field, schema) in fields {
            let known = named.iter().any(|name| *name == field || name.starts_with(&format!("{field}:")));
            if !known {
                missing.insert(format!("{kind}.{field}"));
            }
            let text = schema.to_string();
            let parts = text.split(PREFIX).skip(1).filter_map(|rest| rest.split('"').next());
            // Kinds of volumes that are not served are named, and their fields are not.
            let served = ["ConfigMap", "Secret", "DownwardAPI", "Projected", "EmptyDir", "HostPath"];
            let wanted = parts.filter(|part| {
                !WHOLE.contains(part)
                    && (!part.ends_with("VolumeSource") || served.iter().any(|kind| part.starts_with(kind)))
            });
            next.extend(wanted.map(str::to_owned));
        }
    }
    assert_eq!(missing, BTreeSet::new(), "docs/reference-pod.md does not name them");
}
