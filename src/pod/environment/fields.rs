//! The downward API: what a fieldRef and a resourceFieldRef tell a container of its pod and node.
//!
//! Sources: kubelet's `podFieldSelectorRuntimeValue` (kubelet_pods.go), `pkg/fieldpath`,
//! `pkg/api/v1/resource/helpers.go`.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt::Write as _;

use k8s_openapi::api::core::v1::{Container, Pod, ResourceFieldSelector};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

use super::{ConfigError, Facts};
use crate::pod::containers;
use crate::pod::quantity::{self, Amount};

/// The value of a fieldRef. `metadata.labels` and `metadata.annotations` as a whole are meant for files.
///
/// # Errors
/// When the path is none that the downward API knows.
pub fn field_value(path: &str, pod: &Pod, facts: &Facts) -> Result<String, ConfigError> {
    let meta = &pod.metadata;
    let spec = pod.spec.as_ref();
    if let Some((map, key)) = path.strip_suffix("']").and_then(|path| path.split_once("['")) {
        let map = match map {
            "metadata.labels" => &meta.labels,
            "metadata.annotations" => &meta.annotations,
            _ => return Err(ConfigError::Field(path.to_owned())),
        };
        return Ok(map.as_ref().and_then(|map| map.get(key)).cloned().unwrap_or_default());
    }
    Ok(match path {
        "metadata.name" => meta.name.clone().unwrap_or_default(),
        "metadata.namespace" => meta.namespace.clone().unwrap_or_default(),
        "metadata.uid" => meta.uid.clone().unwrap_or_default(),
        "metadata.labels" => map_text(meta.labels.as_ref()),
        "metadata.annotations" => map_text(meta.annotations.as_ref()),
        "spec.nodeName" => facts.node_name.clone(),
        "spec.serviceAccountName" => {
            spec.and_then(|spec| spec.service_account_name.clone()).unwrap_or_default()
        }
        "status.hostIP" => facts.host_ips.first().cloned().unwrap_or_default(),
        "status.hostIPs" => facts.host_ips.join(","),
        "status.podIP" => facts.pod_ips.first().cloned().unwrap_or_default(),
        "status.podIPs" => facts.pod_ips.join(","),
        _ => return Err(ConfigError::Field(path.to_owned())),
    })
}

/// `key="value"` lines in key order, as `fieldpath.FormatMap` writes them.
fn map_text(map: Option<&BTreeMap<String, String>>) -> String {
    let mut text = String::new();
    for (key, value) in map.into_iter().flatten() {
        if !text.is_empty() {
            text.push('\n');
        }
        text.push_str(key);
        text.push_str("=\"");
        for character in value.chars() {
            match character {
                '"' => text.push_str("\\\""),
                '\\' => text.push_str("\\\\"),
                '\n' => text.push_str("\\n"),
                '\r' => text.push_str("\\r"),
                '\t' => text.push_str("\\t"),
                other if other.is_control() => {
                    // Writing to a String does not fail.
                    let _ = write!(text, "\\u{:04x}", u32::from(other));
                }
                other => text.push(other),
            }
        }
        text.push('"');
    }
    text
}

/// The value of a resourceFieldRef, in its divisor, rounded up. A missing limit of CPU, memory or ephemeral
/// storage is the node's allocatable; a missing request is the limit where one is set (the API server fills
/// that in), else 0.
///
/// # Errors
/// When the resource is none that the downward API knows, the container it names does not exist, or a
/// quantity cannot be read.
pub fn resource_value(
    selector: &ResourceFieldSelector,
    pod: &Pod,
    container: Option<&Container>,
    facts: &Facts,
) -> Result<String, ConfigError> {
    let named = selector.container_name.as_deref().filter(|name| !name.is_empty());
    let container = match named {
        None => container.map(Cow::Borrowed).ok_or_else(|| ConfigError::ContainerNotFound(String::new()))?,
        Some(name) => {
            let found = containers::find(pod, name);
            found.ok_or_else(|| ConfigError::ContainerNotFound(name.to_owned()))?.1
        }
    };
    let unsupported = || ConfigError::Resource(selector.resource.clone());
    let (side, resource) = selector.resource.split_once('.').ok_or_else(unsupported)?;
    let plain = matches!(resource, "cpu" | "memory" | "ephemeral-storage");
    if !plain && !resource.starts_with("hugepages-") {
        return Err(unsupported());
    }
    let resources = container.resources.as_ref();
    let limit = resources.and_then(|resources| resources.limits.as_ref()?.get(resource));
    let value = match side {
        "limits" => {
            let limit = amount(limit)?;
            if limit.is_zero() && plain { amount(facts.allocatable.get(resource))? } else { limit }
        }
        "requests" => {
            let request = resources.and_then(|resources| resources.requests.as_ref()?.get(resource));
            amount(request.or(limit))?
        }
        _ => return Err(unsupported()),
    };
    let divisor = amount(selector.divisor.as_ref())?;
    Ok(quantity::divided(resource, value, divisor).to_string())
}

fn amount(quantity: Option<&Quantity>) -> Result<Amount, ConfigError> {
    quantity.map_or(Ok(Amount::ZERO), |quantity| Ok(quantity::parse(&quantity.0)?))
}

#[cfg(test)]
mod tests {
    use serde_json::{from_value, json};

    use super::*;

    fn pod() -> Pod {
        from_value(json!({
            "metadata": {
                "name": "p1", "namespace": "ns", "uid": "u-1",
                "labels": {"app": "a", "b/c": "x\"y\n"}, "annotations": {"k": "v"},
            },
            "spec": {
                "serviceAccountName": "default",
                "containers": [
                    {"name": "c1", "resources": {
                        "limits": {"cpu": "1500m", "hugepages-2Mi": "4Mi"}, "requests": {"memory": "1Mi"}}},
                    {"name": "c2", "resources": {"limits": {"memory": "2Gi"}}},
                ],
            },
        }))
        .unwrap()
    }

    fn facts() -> Facts {
        Facts {
            node_name: "n1".to_owned(),
            pod_ips: vec!["10.0.0.1".to_owned(), "fd00::1".to_owned()],
            host_ips: vec!["10.0.0.2".to_owned()],
            allocatable: [("cpu", "8"), ("memory", "16Gi")]
                .map(|(name, value)| (name.to_owned(), Quantity(value.to_owned())))
                .into(),
        }
    }

    #[test]
    fn fields_have_their_values() {
        for (path, wanted) in [
            ("metadata.name", "p1"),
            ("metadata.namespace", "ns"),
            ("metadata.uid", "u-1"),
            ("metadata.labels['app']", "a"),
            ("metadata.labels['none']", ""),
            ("metadata.annotations['k']", "v"),
            ("metadata.labels", "app=\"a\"\nb/c=\"x\\\"y\\n\""),
            ("metadata.annotations", "k=\"v\""),
            ("spec.nodeName", "n1"),
            ("spec.serviceAccountName", "default"),
            ("status.hostIP", "10.0.0.2"),
            ("status.hostIPs", "10.0.0.2"),
            ("status.podIP", "10.0.0.1"),
            ("status.podIPs", "10.0.0.1,fd00::1"),
        ] {
            assert_eq!(field_value(path, &pod(), &facts()).as_deref(), Ok(wanted), "{path}");
        }
        for path in ["", "spec", "metadata.name['x']", "status.phase", "']", "['"] {
            assert_eq!(field_value(path, &pod(), &facts()), Err(ConfigError::Field(path.to_owned())));
        }
    }

    #[test]
    fn resources_are_divided_and_default_to_the_node() {
        let pod = pod();
        let c1 = &pod.spec.as_ref().unwrap().containers[0];
        for (container, resource, divisor, wanted) in [
            ("", "limits.cpu", None, Ok("2")),
            ("", "limits.cpu", Some("1m"), Ok("1500")),
            ("", "limits.memory", Some("1Gi"), Ok("16")),
            ("", "requests.memory", None, Ok("1048576")),
            ("", "requests.cpu", Some("1m"), Ok("1500")),
            ("", "limits.ephemeral-storage", None, Ok("0")),
            ("", "limits.hugepages-2Mi", Some("2Mi"), Ok("2")),
            ("", "limits.hugepages-1Gi", None, Ok("0")),
            ("c2", "limits.memory", Some("1Mi"), Ok("2048")),
            ("c2", "limits.cpu", None, Ok("8")),
            ("c2", "requests.cpu", None, Ok("0")),
            ("c9", "limits.cpu", None, Err("container c9 not found")),
            ("", "limits.pods", None, Err("unsupported container resource : limits.pods")),
            ("", "cpu", None, Err("unsupported container resource : cpu")),
        ] {
            let selector = ResourceFieldSelector {
                container_name: Some(container.to_owned()),
                divisor: divisor.map(|divisor: &str| Quantity(divisor.to_owned())),
                resource: resource.to_owned(),
            };
            let got = resource_value(&selector, &pod, Some(c1), &facts()).map_err(|error| error.to_string());
            assert_eq!(
                got,
                wanted.map(str::to_owned).map_err(str::to_owned),
                "{container} {resource} {divisor:?}"
            );
        }
    }
}
