//! What is in a volume: files from ConfigMaps, Secrets, tokens and the downward API.

use std::collections::BTreeMap;

use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::{
    ConfigMap, DownwardAPIVolumeFile, EmptyDirVolumeSource, KeyToPath, Pod, ProjectedVolumeSource, Secret,
    Volume, VolumeProjection,
};

use super::{Content, EmptyDir, Entry, Files, VolumeError, hostpath, paths};
use crate::pod::environment::{Facts, Objects, TokenRef, field_value, resource_value};
use crate::pod::{quantity, security};

/// The mode of files where nothing else is said (API: `ConfigMapVolumeSourceDefaultMode` and its like).
const DEFAULT_MODE: i32 = 0o644;
/// The bits that a mode may have.
const MODE_BITS: u32 = 0o777;

/// Where a volume's files come from.
pub(super) struct Source<'a> {
    volume: &'a str,
    pod: &'a Pod,
    objects: &'a Objects,
    facts: &'a Facts,
}

/// What is in `volume`.
///
/// # Errors
/// When an object or a key in it is missing, or the volume is of a kind that is not served.
pub fn content(volume: &Volume, pod: &Pod, objects: &Objects, facts: &Facts) -> Result<Content, VolumeError> {
    let source = Source { volume: &volume.name, pod, objects, facts };
    let mut files = Files::new();
    if let Some(from) = &volume.empty_dir {
        return empty_dir(&volume.name, from).map(Content::Empty);
    } else if let Some(from) = &volume.host_path {
        return hostpath::plan(from)
            .map(Content::Host)
            .map_err(|problem| VolumeError::content(&volume.name, problem));
    } else if let Some(from) = &volume.config_map {
        source.config_map(&from.name, from.items.as_deref(), from.default_mode, from.optional, &mut files)?;
    } else if let Some(from) = &volume.secret {
        let name = from.secret_name.as_deref().unwrap_or_default();
        source.secret(name, from.items.as_deref(), from.default_mode, from.optional, &mut files)?;
    } else if let Some(from) = &volume.projected {
        source.projected(from, &mut files)?;
    } else if let Some(from) = &volume.downward_api {
        source.downward(from.items.as_deref(), from.default_mode, &mut files)?;
    } else {
        return Err(VolumeError::Kind { volume: volume.name.clone(), kind: kind(volume) });
    }
    if security::fs_group(pod).is_some() {
        // pkg/volume/volume_linux.go, changeFilePermission: what is read-only is the group's to read.
        files.values_mut().for_each(|entry| entry.mode |= 0o440);
    }
    Ok(Content::Files(files))
}

fn empty_dir(volume: &str, from: &EmptyDirVolumeSource) -> Result<EmptyDir, VolumeError> {
    let memory = match from.medium.as_deref().unwrap_or_default() {
        "" => false,
        "Memory" => true,
        // emptydir/empty_dir.go, SetUpAt; hugepages want a mount of the kernel's.
        other => {
            return Err(VolumeError::Kind {
                volume: volume.to_owned(),
                kind: format!("emptyDir with medium {other}"),
            });
        }
    };
    let limit = match &from.size_limit {
        Some(limit) => quantity::parse(&limit.0)
            .map_err(|error| VolumeError::content(volume, error.to_string()))?
            .units(),
        None => 0,
    };
    Ok(EmptyDir { memory, limit: u64::try_from(limit).ok().filter(|limit| *limit > 0) })
}

/// The kind of a volume as the Pod spells it: the one field besides its name.
fn kind(volume: &Volume) -> String {
    let fields = serde_json::to_value(volume).ok();
    let kind = fields
        .as_ref()
        .and_then(|fields| fields.as_object())
        .and_then(|fields| fields.keys().find(|name| name.as_str() != "name").cloned());
    kind.unwrap_or_else(|| "(none)".to_owned())
}

impl Source<'_> {
    fn config_map(
        &self,
        name: &str,
        items: Option<&[KeyToPath]>,
        mode: Option<i32>,
        optional: Option<bool>,
        files: &mut Files,
    ) -> Result<(), VolumeError> {
        let optional = optional == Some(true);
        let Some(object) = self.objects.config_maps.get(name) else {
            return self.absent("configmap", name, optional);
        };
        let all = config_map_data(object);
        self.choose(&all, items, mode, optional, "configmap references non-existent config key", files)
    }

    fn secret(
        &self,
        name: &str,
        items: Option<&[KeyToPath]>,
        mode: Option<i32>,
        optional: Option<bool>,
        files: &mut Files,
    ) -> Result<(), VolumeError> {
        let optional = optional == Some(true);
        let Some(object) = self.objects.secrets.get(name) else {
            return self.absent("secret", name, optional);
        };
        let all = secret_data(object);
        self.choose(&all, items, mode, optional, "references non-existent secret key", files)
    }

    fn absent(&self, kind: &'static str, name: &str, optional: bool) -> Result<(), VolumeError> {
        if optional {
            return Ok(());
        }
        Err(VolumeError::NotFound { volume: self.volume.to_owned(), kind, name: name.to_owned() })
    }

    /// All keys, or those that `items` names.
    fn choose(
        &self,
        all: &BTreeMap<&str, &[u8]>,
        items: Option<&[KeyToPath]>,
        mode: Option<i32>,
        optional: bool,
        missing: &str,
        files: &mut Files,
    ) -> Result<(), VolumeError> {
        let Some(items) = items.filter(|items| !items.is_empty()) else {
            for (key, data) in all {
                self.put(key, data.to_vec(), mode, files)?;
            }
            return Ok(());
        };
        for item in items {
            match all.get(item.key.as_str()) {
                Some(data) => self.put(&item.path, data.to_vec(), item.mode.or(mode), files)?,
                None if optional => {}
                None => return Err(VolumeError::content(self.volume, format!("{missing}: {}", item.key))),
            }
        }
        Ok(())
    }

    fn put(
        &self,
        path: &str,
        data: Vec<u8>,
        mode: Option<i32>,
        files: &mut Files,
    ) -> Result<(), VolumeError> {
        let path = paths::file_path(path).map_err(|problem| VolumeError::content(self.volume, problem))?;
        let mode = u32::try_from(mode.unwrap_or(DEFAULT_MODE)).unwrap_or_default() & MODE_BITS;
        // Of two files at one path the later wins, as in kubelet's payload.
        files.insert(path, Entry { data, mode });
        Ok(())
    }

    fn projected(&self, from: &ProjectedVolumeSource, files: &mut Files) -> Result<(), VolumeError> {
        for source in from.sources.iter().flatten() {
            self.projection(source, from.default_mode, files)?;
        }
        Ok(())
    }

    fn projection(
        &self,
        from: &VolumeProjection,
        mode: Option<i32>,
        files: &mut Files,
    ) -> Result<(), VolumeError> {
        if let Some(from) = &from.config_map {
            self.config_map(&from.name, from.items.as_deref(), mode, from.optional, files)
        } else if let Some(from) = &from.secret {
            self.secret(&from.name, from.items.as_deref(), mode, from.optional, files)
        } else if let Some(from) = &from.downward_api {
            self.downward(from.items.as_deref(), mode, files)
        } else if let Some(from) = &from.service_account_token {
            // A token that was denied is left out; whoever asked for it says so in an event.
            match self.objects.tokens.get(&TokenRef::of(from)) {
                // Whom the pod names as its user or group gets it to himself (projected.go, collectData).
                Some(token)
                    if security::fs_group(self.pod).is_some() || security::fs_user(self.pod).is_some() =>
                {
                    self.put(&from.path, token.clone().into_bytes(), Some(0o600), files)
                }
                Some(token) => self.put(&from.path, token.clone().into_bytes(), mode, files),
                None => Ok(()),
            }
        } else if from.cluster_trust_bundle.is_some() {
            Err(VolumeError::Kind {
                volume: self.volume.to_owned(),
                kind: "projected.clusterTrustBundle".to_owned(),
            })
        } else if from.pod_certificate.is_some() {
            Err(VolumeError::Kind {
                volume: self.volume.to_owned(),
                kind: "projected.podCertificate".to_owned(),
            })
        } else {
            Ok(())
        }
    }

    fn downward(
        &self,
        items: Option<&[DownwardAPIVolumeFile]>,
        mode: Option<i32>,
        files: &mut Files,
    ) -> Result<(), VolumeError> {
        for item in items.into_iter().flatten() {
            let value = if let Some(field) = &item.field_ref {
                field_value(&field.field_path, self.pod, self.facts)
            } else if let Some(selector) = &item.resource_field_ref {
                resource_value(selector, self.pod, None, self.facts)
            } else {
                return Err(VolumeError::content(
                    self.volume,
                    format!("{}: neither fieldRef nor resourceFieldRef is given", item.path),
                ));
            };
            let value = value.map_err(|error| VolumeError::content(self.volume, error.to_string()))?;
            self.put(&item.path, value.into_bytes(), item.mode.or(mode), files)?;
        }
        Ok(())
    }
}

fn config_map_data(object: &ConfigMap) -> BTreeMap<&str, &[u8]> {
    let text = object.data.iter().flatten().map(|(key, value)| (key.as_str(), value.as_bytes()));
    let binary =
        object.binary_data.iter().flatten().map(|(key, ByteString(value))| (key.as_str(), value.as_slice()));
    binary.chain(text).collect()
}

fn secret_data(object: &Secret) -> BTreeMap<&str, &[u8]> {
    object.data.iter().flatten().map(|(key, ByteString(value))| (key.as_str(), value.as_slice())).collect()
}
