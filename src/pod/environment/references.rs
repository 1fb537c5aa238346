//! Which ConfigMaps, Secrets and tokens a pod needs, so that each can be read by its name.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::core::v1::{Container, Pod, Volume};

use crate::pod::containers;

/// How long a service account token lives where the projection does not say (the API's default).
const TOKEN_SECONDS: i64 = 3600;

/// One service account token that a projected volume wants.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TokenRef {
    /// For whom it is; none: the API server.
    pub audience: Option<String>,
    /// How long it shall live, in seconds.
    pub expiration_seconds: i64,
}

impl TokenRef {
    /// What a projection asks for.
    #[must_use]
    pub fn of(projection: &k8s_openapi::api::core::v1::ServiceAccountTokenProjection) -> Self {
        Self {
            audience: projection.audience.clone().filter(|audience| !audience.is_empty()),
            expiration_seconds: projection.expiration_seconds.unwrap_or(TOKEN_SECONDS),
        }
    }
}

/// Everything outside the Pod that its containers need. An object is optional when every use of it is.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct References {
    /// ConfigMaps by name; whether all uses are optional.
    pub config_maps: BTreeMap<String, bool>,
    /// Secrets by name; whether all uses are optional.
    pub secrets: BTreeMap<String, bool>,
    /// Service account tokens.
    pub tokens: BTreeSet<TokenRef>,
}

impl References {
    fn config_map(&mut self, name: &str, optional: Option<bool>) {
        note(&mut self.config_maps, name, optional);
    }

    fn secret(&mut self, name: &str, optional: Option<bool>) {
        note(&mut self.secrets, name, optional);
    }
}

fn note(uses: &mut BTreeMap<String, bool>, name: &str, optional: Option<bool>) {
    *uses.entry(name.to_owned()).or_insert(true) &= optional.unwrap_or(false);
}

/// What `pod` needs: by `env` and `envFrom` of its containers, and by the volumes that a container mounts (a
/// kubelet skips the others too: `desired_state_of_world_populator.go`).
#[must_use]
pub fn references(pod: &Pod) -> References {
    let mut found = References::default();
    let Some(spec) = &pod.spec else { return found };
    let mut mounted = BTreeSet::new();
    for (_, container) in containers::all(spec) {
        of_environment(&container, &mut found);
        mounted.extend(container.volume_mounts.iter().flatten().map(|mount| mount.name.clone()));
    }
    for volume in spec.volumes.iter().flatten() {
        if mounted.contains(volume.name.as_str()) {
            of_volume(volume, &mut found);
        }
    }
    found
}

/// What these volumes need.
#[must_use]
pub fn volume_references<'a>(volumes: impl IntoIterator<Item = &'a Volume>) -> References {
    let mut found = References::default();
    volumes.into_iter().for_each(|volume| of_volume(volume, &mut found));
    found
}

fn of_environment(container: &Container, found: &mut References) {
    for source in container.env_from.iter().flatten() {
        if let Some(source) = &source.config_map_ref {
            found.config_map(&source.name, source.optional);
        }
        if let Some(source) = &source.secret_ref {
            found.secret(&source.name, source.optional);
        }
    }
    for source in container.env.iter().flatten().filter_map(|var| var.value_from.as_ref()) {
        if let Some(source) = &source.config_map_key_ref {
            found.config_map(&source.name, source.optional);
        }
        if let Some(source) = &source.secret_key_ref {
            found.secret(&source.name, source.optional);
        }
    }
}

fn of_volume(volume: &Volume, found: &mut References) {
    if let Some(source) = &volume.config_map {
        found.config_map(&source.name, source.optional);
    }
    if let Some(source) = &volume.secret
        && let Some(name) = &source.secret_name
    {
        found.secret(name, source.optional);
    }
    let Some(projected) = &volume.projected else { return };
    for source in projected.sources.iter().flatten() {
        if let Some(source) = &source.config_map {
            found.config_map(&source.name, source.optional);
        }
        if let Some(source) = &source.secret {
            found.secret(&source.name, source.optional);
        }
        if let Some(source) = &source.service_account_token {
            found.tokens.insert(TokenRef::of(source));
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{from_value, json};

    use super::*;

    #[test]
    fn everything_that_a_pod_uses_is_named_once() {
        let pod: Pod = from_value(json!({
            "metadata": {"name": "p"},
            "spec": {
                "containers": [{
                    "name": "a",
                    "envFrom": [
                        {"configMapRef": {"name": "cm-from", "optional": true}},
                        {"secretRef": {"name": "s-from"}},
                    ],
                    "env": [
                        {"name": "A", "valueFrom": {"configMapKeyRef": {"name": "cm-key", "key": "k"}}},
                        {"name": "B", "valueFrom": {"secretKeyRef": {"name": "s-key", "key": "k", "optional": true}}},
                        {"name": "C", "valueFrom": {"configMapKeyRef": {"name": "cm-from", "key": "k"}}},
                    ],
                    "volumeMounts": [{"name": "v1", "mountPath": "a"}, {"name": "v2", "mountPath": "b"}],
                }, {
                    "name": "b",
                    "volumeMounts": [{"name": "v3", "mountPath": "/c"}],
                }],
                "volumes": [
                    {"name": "v1", "configMap": {"name": "cm-vol"}},
                    {"name": "v2", "secret": {"secretName": "s-vol", "optional": true}},
                    {"name": "v3", "projected": {"sources": [
                        {"serviceAccountToken": {"path": "token", "expirationSeconds": 3607}},
                        {"serviceAccountToken": {"path": "vault", "audience": "vault"}},
                        {"configMap": {"name": "kube-root-ca.crt"}},
                        {"secret": {"name": "s-proj", "optional": true}},
                        {"downwardAPI": {"items": []}},
                    ]}},
                    {"name": "unused", "configMap": {"name": "cm-unused"}},
                ],
            },
        }))
        .unwrap();
        let found = references(&pod);
        let wanted = |pairs: &[(&str, bool)]| -> BTreeMap<String, bool> {
            pairs.iter().map(|(name, optional)| ((*name).to_owned(), *optional)).collect()
        };
        assert_eq!(
            found.config_maps,
            wanted(&[("cm-from", false), ("cm-key", false), ("cm-vol", false), ("kube-root-ca.crt", false)])
        );
        assert_eq!(
            found.secrets,
            wanted(&[("s-from", false), ("s-key", true), ("s-proj", true), ("s-vol", true)])
        );
        let tokens: Vec<_> =
            found.tokens.iter().map(|token| (token.audience.as_deref(), token.expiration_seconds)).collect();
        assert_eq!(tokens, [(None, 3607), (Some("vault"), 3600)]);
    }
}
