//! The variables of one container, by kubelet's order: `envFrom`, then `env`; later ones win.

use std::collections::BTreeMap;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{ConfigMap, Container, EnvVarSource, Pod, Secret};

use super::{ConfigError, EnvFiles, Facts, Objects, Vars, field_value, resource_value};
use crate::pod::expansion::{self, Expand, Values};

/// What the pilot adds to every container. A Pod's own variable of the same name wins, but for the mark.
#[derive(Debug, Clone, Default)]
pub struct Additions {
    /// `JIRIAF_POD_DIR`: the pod's directory.
    pub pod_dir: String,
    /// `JIRIAF_CONTAINER_DIR`: the container's directory.
    pub container_dir: String,
    /// `JIRIAF_TERMINATION_LOG`: the file whose content becomes the container's termination message.
    pub termination_log: String,
    /// `JIRIAF_DRAIN_TIME`, in seconds since 1970; absent where there is no drain time.
    pub drain_time: Option<Timestamp>,
    /// `HOSTNAME`, which container runtimes set (containerd, `containerSpecOpts`): `$(HOSTNAME)` does not know it. None: what
    /// is inherited stays.
    pub hostname: Option<String>,
    /// What the container is told of its share, in the place of what is inherited.
    pub share: Vec<(String, String)>,
    /// `JIRIAF_CONTAINER`: the mark by which what is left of a container is found.
    pub mark: String,
}

/// What the environment of a container is made of.
#[derive(Clone, Copy)]
pub struct EnvInput<'a> {
    /// The pod.
    pub pod: &'a Pod,
    /// One of its containers.
    pub container: &'a Container,
    /// What was read for the pod.
    pub objects: &'a Objects,
    /// What the downward API tells of the node.
    pub facts: &'a Facts,
    /// What is left of the pilot's environment ([`super::inherited`]).
    pub inherited: &'a [(String, String)],
    /// What the pilot adds.
    pub additions: &'a Additions,
    /// Which references in `env` are replaced.
    pub expand: Expand,
    /// The variables of the Services that the pod is told of.
    pub services: &'a BTreeMap<String, String>,
    /// What the files of `fileKeyRef`s hold.
    pub files: &'a EnvFiles,
}

/// The environment of one container.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct ContainerEnv {
    /// All of it, each name once, in name order.
    pub vars: Vars,
    /// What `$(NAME)` in `command` and `args` may name: the Pod's variables, those of Services and the pilot's
    /// additions, not what is inherited from the batch job.
    pub declared: Vars,
    /// What of `envFrom` was left out, for an event.
    pub skipped: Vec<Skipped>,
}

/// Keys of one source of `envFrom` that can be no variable's name. An API server lets neither such a key nor such a prefix
/// through, and kubelet 1.36 looks no more; a prefix in the files of `play` has met no API server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Skipped {
    /// `configMap` or `secret`.
    kind: &'static str,
    namespace: String,
    name: String,
    /// With the prefix, in order.
    keys: Vec<String>,
}

impl Skipped {
    /// The event's reason, as older kubelets had it.
    pub const REASON: &'static str = "InvalidEnvironmentVariableNames";
}

impl std::fmt::Display for Skipped {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { kind, namespace, name, keys } = self;
        write!(
            f,
            "Keys [{}] from the EnvFrom {kind} {namespace}/{name} were skipped since they are considered invalid \
             environment variable names.",
            keys.join(", ")
        )
    }
}

impl std::fmt::Debug for ContainerEnv {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Values may be secret: names alone are shown.
        let names: Vec<&str> = self.vars.iter().map(|(name, _)| name.as_str()).collect();
        f.debug_struct("ContainerEnv")
            .field("vars", &names)
            .field("skipped", &self.skipped)
            .finish_non_exhaustive()
    }
}

impl ContainerEnv {
    /// The value of a variable.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&str> {
        find(&self.vars, name)
    }

    /// The value of a variable that the Pod declares or the pilot adds.
    #[must_use]
    pub fn get_declared(&self, name: &str) -> Option<&str> {
        find(&self.declared, name)
    }
}

fn find<'a>(vars: &'a [(String, String)], name: &str) -> Option<&'a str> {
    let at = vars.binary_search_by(|(this, _)| this.as_str().cmp(name)).ok()?;
    vars.get(at).map(|(_, value)| value.as_str())
}

/// Makes the environment of a container.
///
/// `$NAME`, `${NAME}` and `~` (JIRIAF's rules) are replaced in a variable's literal `value` only, never in
/// what comes from a ConfigMap or a Secret: data is not code.
///
/// # Errors
/// When something that is not optional is missing or cannot be a variable.
pub fn container_env(input: &EnvInput<'_>) -> Result<ContainerEnv, ConfigError> {
    let mut skipped = Vec::new();
    let mut declared = added(input.additions);
    from_objects(input, &mut declared, &mut skipped)?;
    let mut inherited: BTreeMap<&str, &str> =
        input.inherited.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
    inherited.extend(input.additions.hostname.as_deref().map(|name| ("HOSTNAME", name)));
    inherited.extend(input.additions.share.iter().map(|(name, value)| (name.as_str(), value.as_str())));

    for var in input.container.env.iter().flatten() {
        let value = match (var.value.as_deref().unwrap_or(""), &var.value_from) {
            ("", Some(source)) => match from_source(source, &var.name, input)? {
                Some(value) => value,
                None => continue,
            },
            (text, _) => {
                let set = |name: &str| declared.get(name).or_else(|| input.services.get(name)).cloned();
                let all =
                    |name: &str| set(name).or_else(|| inherited.get(name).map(|value| (*value).to_owned()));
                let home = all("HOME");
                let values = Values { declared: &set, environment: &all, home: home.as_deref() };
                expansion::expand(text, input.expand, &values).map_err(|source| ConfigError::TooLong {
                    what: format!("variable {}", var.name),
                    source,
                })?
            }
        };
        declared.insert(var.name.clone(), value);
    }
    // The pod's own variables come first; what the pilot itself has of such names is of another cluster.
    for (name, value) in input.services {
        declared.entry(name.clone()).or_insert_with(|| value.clone());
    }
    // The mark finds what is left of a container: no Pod may take it away.
    declared.insert("JIRIAF_CONTAINER".to_owned(), input.additions.mark.clone());
    for (name, value) in &declared {
        if value.contains('\0') {
            return Err(ConfigError::Nul(format!("variable {name}")));
        }
    }

    let mut all: BTreeMap<String, String> =
        inherited.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    all.extend(declared.clone());
    Ok(ContainerEnv { vars: all.into_iter().collect(), declared: declared.into_iter().collect(), skipped })
}

fn added(additions: &Additions) -> BTreeMap<String, String> {
    let mut vars = BTreeMap::from([
        ("JIRIAF_POD_DIR".to_owned(), additions.pod_dir.clone()),
        ("JIRIAF_CONTAINER_DIR".to_owned(), additions.container_dir.clone()),
        ("JIRIAF_TERMINATION_LOG".to_owned(), additions.termination_log.clone()),
    ]);
    if let Some(drain) = additions.drain_time {
        vars.insert("JIRIAF_DRAIN_TIME".to_owned(), drain.as_second().to_string());
    }
    vars
}

/// `envFrom`, in order: later ones win.
fn from_objects(
    input: &EnvInput<'_>,
    vars: &mut BTreeMap<String, String>,
    skipped: &mut Vec<Skipped>,
) -> Result<(), ConfigError> {
    for source in input.container.env_from.iter().flatten() {
        let mut pairs: Vec<(&String, String)> = Vec::new();
        let (mut kind, mut from) = ("configMap", "");
        if let Some(reference) = &source.config_map_ref {
            from = &reference.name;
            if let Some(object) = config_map(&reference.name, reference.optional, input.objects)? {
                pairs.extend(object.data.iter().flatten().map(|(key, value)| (key, value.clone())));
            }
        } else if let Some(reference) = &source.secret_ref
            && let Some(object) = secret(&reference.name, reference.optional, input.objects)?
        {
            (kind, from) = ("secret", &reference.name);
            pairs.extend(object.data.iter().flatten().map(|(key, value)| (key, text_of(&value.0))));
        }
        let mut keys = Vec::new();
        for (key, value) in pairs {
            let name = format!("{}{key}", source.prefix.as_deref().unwrap_or(""));
            // Keys of a ConfigMap may hold `-` and `.`, which Kubernetes takes in names too.
            if is_name(&name) {
                vars.insert(name, value);
            } else {
                keys.push(name);
            }
        }
        if !keys.is_empty() {
            let namespace = input.pod.metadata.namespace.clone().unwrap_or_default();
            skipped.push(Skipped { kind, namespace, name: from.to_owned(), keys });
        }
    }
    Ok(())
}

/// Whether an environment can carry such a name (apimachinery's `IsRelaxedEnvVarName`: printable ASCII but
/// for `=`).
fn is_name(name: &str) -> bool {
    !name.is_empty() && name.bytes().all(|byte| matches!(byte, b' '..=b'~') && byte != b'=')
}

/// The value of a `valueFrom`; nothing when it is optional and missing.
fn from_source(
    source: &EnvVarSource,
    variable: &str,
    input: &EnvInput<'_>,
) -> Result<Option<String>, ConfigError> {
    let namespace = || input.pod.metadata.namespace.clone().unwrap_or_default();
    if let Some(field) = &source.field_ref {
        return field_value(&field.field_path, input.pod, input.facts).map(Some);
    }
    if let Some(selector) = &source.resource_field_ref {
        return resource_value(selector, input.pod, Some(input.container), input.facts).map(Some);
    }
    if let Some(file) = &source.file_key_ref {
        return input.files.value(&file.volume_name, &file.path, &file.key, file.optional == Some(true));
    }
    if let Some(key) = &source.config_map_key_ref {
        let Some(object) = config_map(&key.name, key.optional, input.objects)? else { return Ok(None) };
        return match object.data.as_ref().and_then(|data| data.get(&key.key)) {
            Some(value) => Ok(Some(value.clone())),
            None if key.optional == Some(true) => Ok(None),
            None => Err(ConfigError::KeyNotFound {
                kind: "ConfigMap",
                namespace: namespace(),
                name: key.name.clone(),
                key: key.key.clone(),
            }),
        };
    }
    if let Some(key) = &source.secret_key_ref {
        let Some(object) = secret(&key.name, key.optional, input.objects)? else { return Ok(None) };
        return match object.data.as_ref().and_then(|data| data.get(&key.key)) {
            Some(value) => Ok(Some(text_of(&value.0))),
            None if key.optional == Some(true) => Ok(None),
            None => Err(ConfigError::KeyNotFound {
                kind: "Secret",
                namespace: namespace(),
                name: key.name.clone(),
                key: key.key.clone(),
            }),
        };
    }
    Err(ConfigError::Source(variable.to_owned()))
}

fn config_map<'a>(
    name: &str,
    optional: Option<bool>,
    objects: &'a Objects,
) -> Result<Option<&'a ConfigMap>, ConfigError> {
    match objects.config_maps.get(name) {
        None if optional != Some(true) => Err(ConfigError::ConfigMapNotFound(name.to_owned())),
        found => Ok(found.map(AsRef::as_ref)),
    }
}

fn secret<'a>(
    name: &str,
    optional: Option<bool>,
    objects: &'a Objects,
) -> Result<Option<&'a Secret>, ConfigError> {
    match objects.secrets.get(name) {
        None if optional != Some(true) => Err(ConfigError::SecretNotFound(name.to_owned())),
        found => Ok(found.map(AsRef::as_ref)),
    }
}

/// A secret's bytes as text. What is no UTF-8 is replaced: variables that are not text belong in files.
fn text_of(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
