//! From files to what is to run: Pods, Jobs, ConfigMaps and Secrets.
//!
//! [`read`] takes the texts of all files at once, so that nothing starts while anything is wrong. What the API server
//! would do to an object before anybody sees it is done here: the default namespace, `stringData`, its checks of names.

#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::fmt;

use k8s_openapi::ByteString;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{ConfigMap, Pod, PodSpec, Secret};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::pod::containers;

/// Longest name of a pod, and longest key of a ConfigMap (DNS subdomain, RFC 1123, as apimachinery's validation has it).
const SUBDOMAIN: usize = 253;

/// Longest name of a container, a namespace, and a Job (whose pods' names are its own and more): a DNS label.
const LABEL: usize = 63;

/// One file's text.
#[derive(Debug, Clone)]
pub struct Source {
    /// The file's name as it was given; `-` is standard input.
    pub name: String,
    /// What is in it.
    pub text: String,
}

/// All that the manifests hold.
#[derive(Debug, Default)]
pub struct Manifests {
    /// Pods, in the order of the files.
    pub pods: Vec<Pod>,
    /// Jobs, in the order of the files.
    pub jobs: Vec<Job>,
    /// ConfigMaps.
    pub config_maps: Vec<ConfigMap>,
    /// Secrets, `stringData` merged into `data`.
    pub secrets: Vec<Secret>,
    /// What is not looked at: kind and name.
    pub ignored: Vec<String>,
}

/// Why manifests cannot be played.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ManifestError {
    /// A document is no good.
    #[error("{place}: {problem}")]
    Document {
        /// File and document.
        place: Place,
        /// What is wrong, and what is wanted.
        problem: String,
    },
    /// There is nothing to run.
    #[error("{files}: there is neither a Pod nor a Job to run{}", if ignored.is_empty() { String::new() } else { format!(" (ignored: {ignored})") })]
    Nothing {
        /// The files.
        files: String,
        /// What was found instead.
        ignored: String,
    },
    /// A pod wants an object that is not there and, without a cluster, never will be.
    #[error(
        "{pod} wants the {kind} {object}, which is in none of the files; add it, or mark it `optional: true`"
    )]
    Missing {
        /// Pod or Job.
        pod: String,
        /// ConfigMap or Secret.
        kind: &'static str,
        /// Its namespace and name.
        object: String,
    },
}

/// A document in a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The file.
    pub file: String,
    /// The document, from 1.
    pub document: usize,
    /// The item of a List, from 1.
    pub item: Option<usize>,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, document {}", self.file, self.document)?;
        self.item.map_or(Ok(()), |item| write!(f, ", item {item}"))
    }
}

impl Place {
    fn error(&self, problem: impl Into<String>) -> ManifestError {
        ManifestError::Document { place: self.clone(), problem: problem.into() }
    }
}

/// Reads an object from what the YAML said. By way of JSON text, as the API server sends it: a second kind of reader for all
/// of Kubernetes' types would make the program half as large again. What does not fit is shown.
fn object<T: DeserializeOwned>(value: &Value, place: &Place) -> Result<T, ManifestError> {
    let text = serde_json::to_string_pretty(value).map_err(|error| place.error(error.to_string()))?;
    serde_json::from_str(&text).map_err(|error| {
        let said = error.to_string();
        let problem = said.split(" at line ").next().unwrap_or_default();
        let shown = text.lines().nth(error.line().saturating_sub(1)).unwrap_or_default().trim();
        place.error(format!("{problem}, in {shown}"))
    })
}

/// Reads all files. `new_uid` makes a name that no other object has.
///
/// # Errors
/// When a document does not parse, a name is no good or taken, an object is missing, or there is nothing to run.
pub fn read(sources: &[Source], mut new_uid: impl FnMut() -> String) -> Result<Manifests, ManifestError> {
    let mut all = Manifests::default();
    for source in sources {
        for (index, (first_line, text)) in documents(&source.text).into_iter().enumerate() {
            let place = Place { file: source.name.clone(), document: index + 1, item: None };
            let value: Value = parse(text, first_line, &place)?;
            if value.get("kind").and_then(Value::as_str) == Some("List") {
                let items = value.get("items").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
                for (index, item) in items.iter().enumerate() {
                    let place = Place { item: Some(index + 1), ..place.clone() };
                    let item = with_text_quantities(item.clone());
                    all.take(&place, &item, &mut new_uid)?;
                }
            } else {
                all.take(&place, &with_text_quantities(value), &mut new_uid)?;
            }
        }
    }
    if all.pods.is_empty() && all.jobs.is_empty() {
        let files = sources.iter().map(|s| s.name.as_str()).collect::<Vec<_>>().join(", ");
        return Err(ManifestError::Nothing { files, ignored: all.ignored.join(", ") });
    }
    all.check_references()?;
    Ok(all)
}

/// The documents of a stream, each with the number of its first line (from 0). A line that begins with `---` begins a
/// document wherever it stands (YAML 1.2, 9.1.2); what holds nothing but comments and directives is none.
fn documents(text: &str) -> Vec<(usize, &str)> {
    let mut found = Vec::new();
    let (mut start, mut first_line, mut offset) = (0, 0, 0);
    for (number, line) in text.split_inclusive('\n').enumerate() {
        let is_marker = line
            .strip_prefix("---")
            .is_some_and(|rest| rest.is_empty() || rest.starts_with(char::is_whitespace));
        if is_marker {
            found.push((first_line, &text[start..offset]));
            (start, first_line) = (offset, number);
        }
        offset += line.len();
    }
    found.push((first_line, &text[start..]));
    let holds_something = |text: &str| {
        text.lines().any(|line| {
            let line = line.trim();
            !line.is_empty() && !line.starts_with(['#', '%']) && line != "---" && line != "..."
        })
    };
    found.retain(|(_, text)| holds_something(text));
    found
}

fn parse(text: &str, first_line: usize, place: &Place) -> Result<Value, ManifestError> {
    serde_saphyr::from_str(text).map_err(|error| {
        // Once more with as many empty lines before it as the file has: the parser then names the file's own line.
        let padded = format!("{}{text}", "\n".repeat(first_line));
        let error = serde_saphyr::from_str::<Value>(&padded).err().unwrap_or(error);
        let text = error.to_string();
        place.error(text.strip_prefix("error: ").unwrap_or(&text))
    })
}

/// Numbers under `resources` as text: the API server takes both, and our types take text.
fn with_text_quantities(mut value: Value) -> Value {
    fn walk(value: &mut Value, within: bool) {
        match value {
            Value::Object(map) => {
                for (key, value) in map {
                    walk(value, within || key == "resources" || key == "sizeLimit");
                }
            }
            Value::Array(items) => items.iter_mut().for_each(|item| walk(item, within)),
            Value::Number(number) if within => *value = Value::String(number.to_string()),
            _ => {}
        }
    }
    walk(&mut value, false);
    value
}

/// What must be text and was written as a number or a boolean. The API server refuses it; a YAML reader that is asked for
/// text would take it.
fn not_text(value: &Value) -> Option<String> {
    fn is_wrong(value: &Value) -> bool {
        matches!(value, Value::Number(_) | Value::Bool(_))
    }
    fn walk(value: &Value, path: &str) -> Option<String> {
        match value {
            Value::Object(map) => map.iter().find_map(|(key, value)| {
                let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                let wrong = match (key.as_str(), value) {
                    ("command" | "args", Value::Array(items)) => {
                        items.iter().position(is_wrong).map(|i| format!("{path}[{i}]"))
                    }
                    (
                        "labels" | "annotations" | "nodeSelector" | "data" | "stringData" | "matchLabels",
                        Value::Object(map),
                    ) => map.iter().find(|(_, v)| is_wrong(v)).map(|(k, _)| format!("{path}.{k}")),
                    ("env", Value::Array(items)) => items
                        .iter()
                        .position(|item| item.get("value").is_some_and(is_wrong))
                        .map(|i| format!("{path}[{i}].value")),
                    _ => None,
                };
                wrong.or_else(|| walk(value, &path))
            }),
            Value::Array(items) => {
                items.iter().enumerate().find_map(|(i, item)| walk(item, &format!("{path}[{i}]")))
            }
            _ => None,
        }
    }
    walk(value, "")
}

impl Manifests {
    fn take(
        &mut self,
        place: &Place,
        value: &Value,
        new_uid: &mut impl FnMut() -> String,
    ) -> Result<(), ManifestError> {
        let Some(kind) = value.get("kind").and_then(Value::as_str) else {
            return Err(place.error("there is no `kind`; a Pod, a Job, a ConfigMap or a Secret is wanted"));
        };
        if !matches!(kind, "Pod" | "Job" | "ConfigMap" | "Secret") {
            let name = value.pointer("/metadata/name").and_then(Value::as_str).unwrap_or("-");
            self.ignored.push(format!("{kind} {name}"));
            return Ok(());
        }
        if let Some(path) = not_text(value) {
            return Err(
                place.error(format!("{kind}: {path} must be text; write it in quotes, as in \"300\""))
            );
        }
        match kind {
            "Pod" => {
                let mut pod: Pod = object(value, place)?;
                let uid = new_uid();
                complete(&mut pod.metadata, uid, SUBDOMAIN, place)?;
                // A status in a file is of another pod's life.
                pod.status = None;
                check_pod(pod.spec.as_ref(), place)?;
                if self.pods.iter().any(|other| is_same(&other.metadata, &pod.metadata)) {
                    return Err(place.error(format!("there are two Pods {}", full_name(&pod.metadata))));
                }
                self.pods.push(pod);
            }
            "Job" => {
                let mut job: Job = object(value, place)?;
                let uid = new_uid();
                complete(&mut job.metadata, uid, LABEL, place)?;
                let spec = job.spec.as_ref().and_then(|spec| spec.template.spec.as_ref());
                check_pod(spec, place)?;
                if !matches!(spec.and_then(|s| s.restart_policy.as_deref()), Some("Never" | "OnFailure")) {
                    return Err(place.error("a Job's template wants restartPolicy Never or OnFailure"));
                }
                if self.jobs.iter().any(|other| is_same(&other.metadata, &job.metadata)) {
                    return Err(place.error(format!("there are two Jobs {}", full_name(&job.metadata))));
                }
                self.jobs.push(job);
            }
            "ConfigMap" => {
                let mut map: ConfigMap = object(value, place)?;
                complete(&mut map.metadata, String::new(), SUBDOMAIN, place)?;
                let text = map.data.iter().flatten().map(|(key, _)| key);
                check_keys(text.chain(map.binary_data.iter().flatten().map(|(key, _)| key)), place)?;
                self.config_maps.push(map);
            }
            _ => {
                let mut secret: Secret = object(value, place)?;
                complete(&mut secret.metadata, String::new(), SUBDOMAIN, place)?;
                // The API server merges stringData over data (core/v1, Secret).
                let text = secret.string_data.take().unwrap_or_default();
                let data = secret.data.get_or_insert_default();
                data.extend(text.into_iter().map(|(key, text)| (key, ByteString(text.into_bytes()))));
                check_keys(data.keys(), place)?;
                self.secrets.push(secret);
            }
        }
        Ok(())
    }

    /// Without a cluster nobody will ever make what is missing, so a pod would wait for it for ever.
    fn check_references(&self) -> Result<(), ManifestError> {
        let keys = |all: Vec<&ObjectMeta>| all.into_iter().map(full_name).collect::<BTreeSet<_>>();
        let maps = keys(self.config_maps.iter().map(|o| &o.metadata).collect());
        let secrets = keys(self.secrets.iter().map(|o| &o.metadata).collect());
        let pods = self.pods.iter().map(|pod| ("Pod", &pod.metadata, pod.spec.as_ref()));
        let jobs = self.jobs.iter().map(|job| {
            ("Job", &job.metadata, job.spec.as_ref().and_then(|spec| spec.template.spec.as_ref()))
        });
        for (what, meta, spec) in pods.chain(jobs) {
            for (kind, name) in spec.map(references).unwrap_or_default() {
                let namespace = meta.namespace.as_deref().unwrap_or_default();
                let object = format!("{namespace}/{name}");
                let known = if kind == "ConfigMap" { &maps } else { &secrets };
                if !known.contains(&object) {
                    return Err(ManifestError::Missing {
                        pod: format!("{what} {}", full_name(meta)),
                        kind,
                        object,
                    });
                }
            }
        }
        Ok(())
    }
}

/// The ConfigMaps and Secrets that a pod cannot start without.
fn references(spec: &PodSpec) -> Vec<(&'static str, String)> {
    let mut found = Vec::new();
    let mut note = |kind, name: Option<&String>, optional: Option<bool>| {
        if let Some(name) = name.filter(|name| !name.is_empty() && optional != Some(true)) {
            found.push((kind, name.clone()));
        }
    };
    for volume in spec.volumes.iter().flatten() {
        if let Some(map) = &volume.config_map {
            note("ConfigMap", Some(&map.name), map.optional);
        }
        if let Some(secret) = &volume.secret {
            note("Secret", secret.secret_name.as_ref(), secret.optional);
        }
        for source in volume.projected.iter().flat_map(|p| p.sources.iter().flatten()) {
            if let Some(map) = &source.config_map {
                note("ConfigMap", Some(&map.name), map.optional);
            }
            if let Some(secret) = &source.secret {
                note("Secret", Some(&secret.name), secret.optional);
            }
        }
    }
    for (_, container) in containers::all(spec) {
        for source in container.env_from.iter().flatten() {
            if let Some(map) = &source.config_map_ref {
                note("ConfigMap", Some(&map.name), map.optional);
            }
            if let Some(secret) = &source.secret_ref {
                note("Secret", Some(&secret.name), secret.optional);
            }
        }
        for source in container.env.iter().flatten().filter_map(|env| env.value_from.as_ref()) {
            if let Some(key) = &source.config_map_key_ref {
                note("ConfigMap", Some(&key.name), key.optional);
            }
            if let Some(key) = &source.secret_key_ref {
                note("Secret", Some(&key.name), key.optional);
            }
        }
    }
    found
}

fn is_same(one: &ObjectMeta, other: &ObjectMeta) -> bool {
    one.namespace == other.namespace && one.name == other.name
}

fn full_name(meta: &ObjectMeta) -> String {
    format!("{}/{}", meta.namespace.as_deref().unwrap_or_default(), meta.name.as_deref().unwrap_or_default())
}

/// Namespace and name as the API server would fill them in and check them: both become parts of paths.
fn complete(meta: &mut ObjectMeta, uid: String, most: usize, place: &Place) -> Result<(), ManifestError> {
    let namespace = meta.namespace.get_or_insert_with(|| "default".to_owned());
    if !is_name(namespace, LABEL) || namespace.contains('.') {
        return Err(place.error(format!(
            "the namespace {namespace:?} is no good: at most {LABEL} of a-z, 0-9 and '-' are wanted"
        )));
    }
    if meta.name.is_none()
        && let Some(prefix) = &meta.generate_name
    {
        meta.name = Some(format!("{prefix}{}", uid.get(..5).unwrap_or("00000")));
    }
    match meta.name.as_deref() {
        Some(name) if is_name(name, most) => {}
        Some(name) => {
            return Err(place.error(format!(
                "the name {name:?} is no good: at most {most} of a-z, 0-9, '-' and '.' are wanted, a letter or digit first and last"
            )));
        }
        None => return Err(place.error("there is no metadata.name")),
    }
    meta.uid = Some(uid);
    meta.deletion_timestamp = None;
    meta.finalizers = None;
    Ok(())
}

fn is_name(name: &str, most: usize) -> bool {
    let edge = |byte: Option<&u8>| byte.is_some_and(u8::is_ascii_alphanumeric);
    let bytes = name.as_bytes();
    name.len() <= most
        && edge(bytes.first())
        && edge(bytes.last())
        && !name.contains("..")
        && bytes.iter().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'-' | b'.'))
}

/// Keys of ConfigMaps and Secrets become names of files and variables (apimachinery's validation, IsConfigMapKey).
fn check_keys<'a>(mut keys: impl Iterator<Item = &'a String>, place: &Place) -> Result<(), ManifestError> {
    let is_good = |key: &str| {
        let letter = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
        (1..=SUBDOMAIN).contains(&key.len())
            && key.bytes().all(letter)
            && key != "."
            && !key.starts_with("..")
    };
    match keys.find(|key| !is_good(key)) {
        None => Ok(()),
        Some(key) => Err(place.error(format!(
            "the key {key:?} is no good: at most {SUBDOMAIN} letters, digits, '-', '_' and '.' are wanted, not '.' alone \
             and not '..' first"
        ))),
    }
}

fn check_pod(spec: Option<&PodSpec>, place: &Place) -> Result<(), ManifestError> {
    let Some(spec) = spec.filter(|spec| !spec.containers.is_empty()) else {
        return Err(place.error("there is no container in spec.containers"));
    };
    let mut seen = BTreeSet::new();
    for (_, container) in containers::all(spec) {
        if !is_name(&container.name, LABEL) || container.name.contains('.') {
            return Err(place.error(format!(
                "the container name {:?} is no good: at most {LABEL} of a-z, 0-9 and '-' are wanted",
                container.name
            )));
        }
        if !seen.insert(container.name.clone()) {
            return Err(place.error(format!("there are two containers {:?}", container.name)));
        }
    }
    match spec.restart_policy.as_deref() {
        None | Some("Always" | "OnFailure" | "Never") => Ok(()),
        Some(other) => {
            Err(place.error(format!("restartPolicy {other:?} is none of Always, OnFailure and Never")))
        }
    }
}
