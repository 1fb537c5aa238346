//! The cluster's Services, as far as containers are told of them: addresses and ports.
//!
//! [`Services::variables`] makes the variables of a pod. The first pod starts the watch; nothing else of the pilot needs it.
//! The watch is written here and not kube-runtime's: it reads three fields of each Service, and another instance of a
//! watcher for a type of its own would be more of the binary than this file.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use futures::FutureExt as _;
use http::{Request, StatusCode};
use http_body_util::BodyExt as _;
use kube::client::Body;
use serde::Deserialize;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout, timeout_at};

use super::environment::{Service, ServicePort, service_variables};

/// Services of one page: some hundred kilobytes at most sites.
const PAGE: usize = 100;

/// The most that a page or an event may be: an object of etcd is at most 1.5 MiB (its request limit).
const MOST_BYTES: usize = 16 << 20;

/// Services that are kept: some 300 bytes each, so 3 MB. Pods of a namespace with more than its share of these find
/// theirs by DNS.
const MOST_SERVICES: usize = 10_000;

/// How long the API server keeps a watch (kube-rs and client-go: 5 to 10 minutes).
const WATCH_SECONDS: u64 = 290;

/// What a watch that says nothing is given beyond its time, before its connection counts as lost.
const WATCH_MARGIN: Duration = Duration::from_secs(20);

/// Longest wait for one page.
const LIST_LIMIT: Duration = Duration::from_secs(30);

/// The waits; tests have shorter ones.
#[derive(Debug, Clone, Copy)]
struct Waits {
    /// How long the first pods wait for the first list. A kubelet waits without a limit; a pilot's pods have a walltime.
    first_list: Duration,
    /// Between attempts, at first; each is twice the one before.
    again: Duration,
    /// The longest between attempts.
    most: Duration,
    /// How long a denial is taken for an answer.
    denied: Duration,
}

const WAITS: Waits = Waits {
    first_list: Duration::from_secs(2),
    again: Duration::from_secs(1),
    most: Duration::from_secs(60),
    denied: Duration::from_secs(300),
};

/// With more namespaces than these, one watch of all Services is less than one of each.
pub const MOST_WATCHES: usize = 8;

/// Namespace and name.
type Key = (Box<str>, Box<str>);

/// The cluster's Services; `play` has none.
#[derive(Clone, Default)]
pub struct Services(Option<Arc<Inner>>);

struct Inner {
    client: kube::Client,
    waits: Waits,
    scopes: Vec<Scope>,
    known: Mutex<BTreeMap<Key, Service>>,
    /// How many scopes have not been listed yet; each is counted down once.
    unlisted: watch::Sender<usize>,
    /// When the first pod came.
    began: OnceLock<Instant>,
    /// Whether somebody was told of what lacks, once for all scopes.
    told: OnceLock<()>,
}

/// What one watch is of.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Scope {
    /// All Services.
    All,
    /// Those of a namespace.
    Namespace(String),
    /// default/kubernetes, the API server's own, which every pod is told of.
    Kubernetes,
}

/// As much of a Service as is kept, or of a Status that stands in its place.
#[derive(Deserialize)]
struct Object {
    #[serde(default)]
    metadata: Meta,
    #[serde(default)]
    spec: Spec,
    code: Option<u16>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct Meta {
    name: String,
    namespace: String,
    resource_version: String,
    #[serde(rename = "continue")]
    more: String,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct Spec {
    #[serde(rename = "clusterIP")]
    cluster_ip: String,
    ports: Vec<Port>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Port {
    name: String,
    port: u16,
    protocol: String,
}

#[derive(Deserialize)]
struct List {
    metadata: Meta,
    #[serde(default)]
    items: Vec<Object>,
}

#[derive(Deserialize)]
struct Event {
    #[serde(rename = "type")]
    kind: String,
    object: Object,
}

/// Why a list or a watch ended.
#[derive(Debug)]
enum Trouble {
    /// The credential may not.
    Denied(String),
    /// What was known is too old to go on from: list again.
    Stale,
    /// Anything else; tried again.
    Failed(String),
}

impl Scope {
    fn path(&self) -> String {
        match self {
            Self::All => "/api/v1/services?".to_owned(),
            // A namespace is a DNS label: nothing in it wants an escape.
            Self::Namespace(name) => format!("/api/v1/namespaces/{name}/services?"),
            Self::Kubernetes => {
                "/api/v1/namespaces/default/services?fieldSelector=metadata.name%3Dkubernetes&".to_owned()
            }
        }
    }

    fn holds(&self, (namespace, name): &Key) -> bool {
        match self {
            Self::All => true,
            Self::Namespace(own) => **namespace == **own,
            Self::Kubernetes => &**namespace == "default" && &**name == "kubernetes",
        }
    }

    fn text(&self) -> String {
        match self {
            Self::All => "of all namespaces".to_owned(),
            Self::Namespace(name) => format!("of namespace {name}"),
            Self::Kubernetes => "default/kubernetes".to_owned(),
        }
    }
}

/// Which watches see the Services of these namespaces (none: of all) and the API server's.
fn scopes(namespaces: &[String]) -> Vec<Scope> {
    let names: BTreeSet<&String> = namespaces.iter().collect();
    if names.is_empty() || names.len() > MOST_WATCHES {
        return vec![Scope::All];
    }
    let own = (!names.iter().any(|name| *name == "default")).then_some(Scope::Kubernetes);
    names.into_iter().map(|name| Scope::Namespace(name.clone())).chain(own).collect()
}

impl Services {
    /// Those that pods of `namespaces` (none: of any) are told of. Nothing is asked before the first pod comes.
    #[must_use]
    pub fn of_cluster(client: kube::Client, namespaces: &[String]) -> Self {
        Self::waiting(client, namespaces, WAITS)
    }

    fn waiting(client: kube::Client, namespaces: &[String], waits: Waits) -> Self {
        let scopes = scopes(namespaces);
        let (unlisted, _) = watch::channel(scopes.len());
        let (known, began, told) = (Mutex::default(), OnceLock::new(), OnceLock::new());
        Self(Some(Arc::new(Inner { client, waits, scopes, known, unlisted, began, told })))
    }

    /// The variables of a pod in this namespace: always those of default/kubernetes, those of its namespace's Services where
    /// `links` (enableServiceLinks) says so (kubelet_pods.go, getServiceEnvVarMap). Waits for the first list, 2 s from the
    /// first pod on; what is not known by then is left out.
    pub async fn variables(&self, namespace: &str, links: bool) -> BTreeMap<String, String> {
        let Some(inner) = &self.0 else { return BTreeMap::new() };
        let until = *inner.began.get_or_init(|| {
            for scope in inner.scopes.clone() {
                tokio::spawn(Arc::clone(inner).follow(scope));
            }
            Instant::now() + inner.waits.first_list
        });
        let mut unlisted = inner.unlisted.subscribe();
        let _ = timeout_at(until, unlisted.wait_for(|unlisted| *unlisted == 0)).await;
        let known = inner.known.lock().unwrap_or_else(PoisonError::into_inner);
        let api_server = known.get_key_value(&("default".into(), "kubernetes".into()));
        let beneath = (namespace.into(), "".into());
        let own = known.range(beneath..).take_while(|((of, _), _)| &**of == namespace && links);
        // Of two named kubernetes the namespace's own counts.
        let told: BTreeMap<&str, &Service> =
            api_server.into_iter().chain(own).map(|((_, name), service)| (&**name, service)).collect();
        service_variables(told)
    }
}

impl Inner {
    /// Lists and watches, for as long as the pilot lives.
    async fn follow(self: Arc<Self>, scope: Scope) {
        let mut listed = false;
        let mut wait = self.waits.again;
        let mut version = None;
        loop {
            let result = match version.take() {
                None => self.list(&scope).await,
                Some(from) => self.watch(&scope, from).await,
            };
            let denied = matches!(result, Err((_, Trouble::Denied(_))));
            if !listed && (result.is_ok() || denied) {
                listed = true;
                self.unlisted.send_modify(|unlisted| *unlisted = unlisted.saturating_sub(1));
            }
            match result {
                Ok(next) => {
                    wait = self.waits.again;
                    version = Some(next);
                }
                Err((_, Trouble::Stale)) => {
                    // At once, but never in a circle.
                    sleep(wait).await;
                    wait = (wait * 2).min(self.waits.most);
                }
                Err((_, Trouble::Denied(why))) => {
                    if self.told.set(()).is_ok() {
                        tracing::warn!(
                            services = scope.text(),
                            why,
                            "Services may not be listed and watched: containers get no variables for them; grant it as \
                             docs/cluster/pilot.yaml does"
                        );
                    }
                    sleep(self.waits.denied).await;
                }
                Err((from, Trouble::Failed(why))) => {
                    tracing::debug!(
                        services = scope.text(),
                        why,
                        "Services are not watched; it is tried again"
                    );
                    version = from;
                    sleep(wait).await;
                    wait = (wait * 2).min(self.waits.most);
                }
            }
        }
    }

    /// Reads all of a scope; from which version a watch goes on.
    async fn list(&self, scope: &Scope) -> Result<String, (Option<String>, Trouble)> {
        let (mut found, mut more) = (BTreeMap::new(), String::new());
        loop {
            let token = percent_encoding::utf8_percent_encode(&more, percent_encoding::NON_ALPHANUMERIC);
            let uri = format!("{}limit={PAGE}&continue={token}", scope.path());
            let page = timeout(LIST_LIMIT, self.page(&uri)).await;
            let page = page.unwrap_or_else(|_| Err(Trouble::Failed("no answer in time".to_owned())));
            let List { metadata, items } = page.map_err(|trouble| (None, trouble))?;
            found.extend(items.into_iter().filter_map(service));
            if metadata.more.is_empty() {
                let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
                known.retain(|key, _| !scope.holds(key));
                found.into_iter().for_each(|(key, service)| keep(&mut known, key, service));
                return Ok(metadata.resource_version);
            }
            more = metadata.more;
        }
    }

    async fn page(&self, uri: &str) -> Result<List, Trouble> {
        let mut body = self.get(uri).await?;
        let mut text = Vec::new();
        while let Some(data) = next(&mut body).await? {
            text.extend_from_slice(&data);
            if text.len() > MOST_BYTES {
                return Err(Trouble::Failed(format!("a page is larger than {MOST_BYTES} bytes")));
            }
        }
        serde_json::from_slice(&text).map_err(|error| Trouble::Failed(error.to_string()))
    }

    /// Follows changes until the API server ends the watch; from which version the next goes on.
    async fn watch(&self, scope: &Scope, mut from: String) -> Result<String, (Option<String>, Trouble)> {
        let uri = format!(
            "{}watch=true&allowWatchBookmarks=true&timeoutSeconds={WATCH_SECONDS}&resourceVersion={from}",
            scope.path()
        );
        let end = Instant::now() + Duration::from_secs(WATCH_SECONDS) + WATCH_MARGIN;
        let begun = timeout_at(end, self.get(&uri)).await;
        let mut body = match begun.unwrap_or_else(|_| Err(Trouble::Failed("no answer in time".to_owned()))) {
            Ok(body) => body,
            Err(trouble) => return Err((Some(from), trouble)),
        };
        let mut line = Vec::new();
        loop {
            let data = match timeout_at(end, next(&mut body)).await {
                Ok(Ok(Some(data))) => data,
                // Its time is over.
                Ok(Ok(None)) | Err(_) => return Ok(from),
                Ok(Err(trouble)) => return Err((Some(from), trouble)),
            };
            let mut rest = &data[..];
            while let Some(end) = memchr::memchr(b'\n', rest) {
                line.extend_from_slice(&rest[..end]);
                rest = &rest[end + 1..];
                match self.event(&line) {
                    Ok(Some(version)) => from = version,
                    Ok(None) => {}
                    Err(trouble) => return Err((Some(from), trouble)),
                }
                line.clear();
                // A large object is no reason to hold as much for ever.
                line.shrink_to(64 * 1024);
            }
            line.extend_from_slice(rest);
            if line.len() > MOST_BYTES {
                return Err((None, Trouble::Failed(format!("an event is larger than {MOST_BYTES} bytes"))));
            }
        }
    }

    /// Takes one event; the version that it brings.
    fn event(&self, line: &[u8]) -> Result<Option<String>, Trouble> {
        if line.iter().all(u8::is_ascii_whitespace) {
            return Ok(None);
        }
        let event: Event =
            serde_json::from_slice(line).map_err(|error| Trouble::Failed(error.to_string()))?;
        let object = event.object;
        if event.kind == "ERROR" {
            return Err(match object.code {
                Some(403) => Trouble::Denied("the API server ended the watch".to_owned()),
                // 410 Gone; whatever else is said of a watch, a list is the way on.
                _ => Trouble::Stale,
            });
        }
        let version = object.metadata.resource_version.clone();
        if event.kind != "BOOKMARK" {
            let key = (object.metadata.namespace.as_str().into(), object.metadata.name.as_str().into());
            let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
            match service(object).filter(|_| event.kind != "DELETED") {
                Some((key, service)) => keep(&mut known, key, service),
                None => drop(known.remove(&key)),
            }
        }
        Ok(Some(version).filter(|version| !version.is_empty()))
    }

    async fn get(&self, uri: &str) -> Result<Body, Trouble> {
        let request = Request::get(uri).body(Body::empty());
        let request = request.map_err(|error| Trouble::Failed(error.to_string()))?;
        // Boxed: the client's future is large, and this one waits most of the time.
        let answer = self.client.send(request).boxed().await;
        let answer = answer.map_err(|error| Trouble::Failed(crate::cluster::explain(&error)))?;
        match answer.status() {
            StatusCode::OK => Ok(answer.into_body()),
            StatusCode::FORBIDDEN => Err(Trouble::Denied("403 Forbidden".to_owned())),
            StatusCode::GONE => Err(Trouble::Stale),
            status => Err(Trouble::Failed(status.to_string())),
        }
    }
}

/// The next bytes of an answer; none at its end.
async fn next(body: &mut Body) -> Result<Option<bytes::Bytes>, Trouble> {
    loop {
        match body.frame().await {
            None => return Ok(None),
            Some(Ok(frame)) => {
                if let Ok(data) = frame.into_data() {
                    return Ok(Some(data));
                }
            }
            Some(Err(error)) => return Err(Trouble::Failed(error.to_string())),
        }
    }
}

/// What is kept of a Service; nothing of one without an address (helpers.go, IsServiceIPSet).
fn service(object: Object) -> Option<(Key, Service)> {
    let Spec { cluster_ip, ports } = object.spec;
    if cluster_ip.is_empty() || cluster_ip == "None" || ports.is_empty() {
        return None;
    }
    let ports = ports.into_iter().map(|port| {
        let protocol = if port.protocol.is_empty() { "tcp".to_owned() } else { port.protocol.to_lowercase() };
        ServicePort { name: port.name.into(), port: port.port, protocol: protocol.into() }
    });
    let Meta { namespace, name, .. } = object.metadata;
    Some(((namespace.into(), name.into()), Service { ip: cluster_ip.into(), ports: ports.collect() }))
}

fn keep(known: &mut BTreeMap<Key, Service>, key: Key, service: Service) {
    static TOLD: OnceLock<()> = OnceLock::new();
    if known.len() < MOST_SERVICES || known.contains_key(&key) {
        known.insert(key, service);
    } else if TOLD.set(()).is_ok() {
        tracing::warn!(
            most = MOST_SERVICES,
            "there are more Services than are kept: containers get no variables for the others; --namespaces makes them fewer"
        );
    }
}

#[cfg(test)]
mod tests;
