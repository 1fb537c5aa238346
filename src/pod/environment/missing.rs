//! Which ConfigMaps, Secrets and keys a container's environment names that are not there: for events.
//!
//! A kubelet says nothing of what is optional, and of the rest only that the container waits. The names of these events
//! are virtual-kubelet's (`internal/podutils/env.go`), which those who come from it may look for.

use k8s_openapi::api::core::v1::Container;

use super::Objects;

/// One thing that is missing: an event's reason and text.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Missing {
    /// The reason, such as `OptionalSecretNotFound`.
    pub reason: String,
    /// What is missing.
    pub message: String,
}

/// What is missing for `container`, in the order in which it names it.
#[must_use]
pub fn missing(container: &Container, objects: &Objects) -> Vec<Missing> {
    let mut all = Vec::new();
    let mut note =
        |kind: &str, name: &str, key: Option<&str>, optional: Option<bool>, found: (bool, bool)| {
            let need = if optional == Some(true) { "Optional" } else { "Mandatory" };
            let lower = kind.to_ascii_lowercase();
            match (found, key) {
                ((false, _), _) => all.push(Missing {
                    reason: format!("{need}{kind}NotFound"),
                    message: format!("{lower} {name:?} not found"),
                }),
                ((true, false), Some(key)) => all.push(Missing {
                    reason: format!("{need}{kind}KeyNotFound"),
                    message: format!("key {key:?} does not exist in {lower} {name:?}"),
                }),
                _ => {}
            }
        };
    for source in container.env_from.iter().flatten() {
        if let Some(from) = &source.config_map_ref {
            let found = objects.config_maps.contains_key(&from.name);
            note("ConfigMap", &from.name, None, from.optional, (found, true));
        }
        if let Some(from) = &source.secret_ref {
            let found = objects.secrets.contains_key(&from.name);
            note("Secret", &from.name, None, from.optional, (found, true));
        }
    }
    for source in container.env.iter().flatten().filter_map(|var| var.value_from.as_ref()) {
        if let Some(from) = &source.config_map_key_ref {
            let object = objects.config_maps.get(&from.name);
            let has =
                object.and_then(|object| object.data.as_ref()).is_some_and(|d| d.contains_key(&from.key));
            note("ConfigMap", &from.name, Some(&from.key), from.optional, (object.is_some(), has));
        }
        if let Some(from) = &source.secret_key_ref {
            let object = objects.secrets.get(&from.name);
            let has =
                object.and_then(|object| object.data.as_ref()).is_some_and(|d| d.contains_key(&from.key));
            note("Secret", &from.name, Some(&from.key), from.optional, (object.is_some(), has));
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use serde_json::{from_value, json};

    #[test]
    fn what_is_missing_is_named_and_whether_it_matters() {
        let container: Container = from_value(json!({"name": "c",
        "envFrom": [{"configMapRef": {"name": "m"}}, {"secretRef": {"name": "none", "optional": true}}],
        "env": [
            {"name": "A", "valueFrom": {"configMapKeyRef": {"name": "m", "key": "k"}}},
            {"name": "B", "valueFrom": {"configMapKeyRef": {"name": "m", "key": "no", "optional": true}}},
            {"name": "C", "valueFrom": {"secretKeyRef": {"name": "gone", "key": "k"}}},
            {"name": "D", "value": "plain"},
        ]}))
        .unwrap();
        let map = from_value(json!({"metadata": {"name": "m"}, "data": {"k": "v"}})).map(Arc::new).unwrap();
        let objects = Objects { config_maps: [("m".to_owned(), map)].into(), ..Objects::default() };
        let got: Vec<(String, String)> =
            missing(&container, &objects).into_iter().map(|one| (one.reason, one.message)).collect();
        let wanted = [
            ("OptionalSecretNotFound", "secret \"none\" not found"),
            ("OptionalConfigMapKeyNotFound", "key \"no\" does not exist in configmap \"m\""),
            ("MandatorySecretNotFound", "secret \"gone\" not found"),
        ];
        assert_eq!(got, wanted.map(|(reason, message)| (reason.to_owned(), message.to_owned())));
    }
}
