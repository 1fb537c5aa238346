//! The watcher: when each pod's states were first seen, by one watch of all pods on a connection and a thread
//! of its own.

use std::collections::HashMap;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant, SystemTime};

use futures::io::AsyncBufReadExt;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};
use serde_json::Value;

use crate::harness::bed;

/// What the watcher saw of one pod, and when.
#[derive(Default, Clone)]
pub struct Seen {
    /// It was on a Node.
    pub bound: Option<SystemTime>,
    /// Its phase was Running.
    pub running: Option<SystemTime>,
    /// Its phase was Succeeded or Failed.
    pub ended: Option<SystemTime>,
    /// The object was gone.
    pub gone: Option<SystemTime>,
    /// Each resource version.
    pub versions: Vec<(String, SystemTime)>,
    /// The last status.
    pub status: Value,
}

type Pods = Arc<(Mutex<HashMap<(String, String), Seen>>, Condvar)>;

/// A watch of all pods that runs as long as the program.
pub struct Watcher(Pods);

/// Longer than any pod here takes on a busy machine.
const LIMIT: Duration = Duration::from_secs(60);

impl Watcher {
    /// Starts it.
    pub fn start() -> Self {
        let pods = Pods::default();
        let shared = Arc::clone(&pods);
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(follow(&shared));
        });
        Self(pods)
    }

    /// Waits until `ready` finds what it looks for in what was seen of the pod.
    #[track_caller]
    pub fn wait<T>(&self, what: &str, namespace: &str, name: &str, ready: impl Fn(&Seen) -> Option<T>) -> T {
        let key = (namespace.to_owned(), name.to_owned());
        let (mutex, news) = &*self.0;
        let mut pods = mutex.lock().unwrap();
        let start = Instant::now();
        loop {
            if let Some(found) = pods.get(&key).and_then(&ready) {
                return found;
            }
            let left = LIMIT.saturating_sub(start.elapsed());
            assert!(
                !left.is_zero(),
                "pod {namespace}/{name}: not {what} in {LIMIT:?}: {}",
                self.status(&pods, &key)
            );
            pods = news.wait_timeout(pods, left).unwrap().0;
        }
    }

    fn status(&self, pods: &HashMap<(String, String), Seen>, key: &(String, String)) -> String {
        pods.get(key).map_or_else(|| "never seen".to_owned(), |seen| seen.status.to_string())
    }

    /// What was seen of the pod until now.
    pub fn seen(&self, namespace: &str, name: &str) -> Seen {
        let pods = self.0.0.lock().unwrap();
        pods.get(&(namespace.to_owned(), name.to_owned())).cloned().unwrap_or_default()
    }
}

/// How often the API server may end the watch in one run. It closes those that fall behind while the machine is busy
/// (its cacher's buffer of a watcher is full); more than this means that something else is wrong.
const INTERRUPTIONS: usize = 20;

async fn follow(pods: &Pods) {
    let kubeconfig = Kubeconfig::read_from(bed().admin_kubeconfig()).unwrap();
    let mut config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await.unwrap();
    // Nothing may happen for a while.
    config.read_timeout = None;
    let client = Client::try_from(config).unwrap();
    let mut version = String::new();
    for _ in 0..INTERRUPTIONS {
        one_watch(&client, pods, &mut version).await;
        // Nothing is lost: it goes on behind the last event. What happened in between is seen late, and a figure that
        // was taken then is the worse for it, so it is said.
        eprintln!("the API server ended the watch at resource version {version}: it is begun again there");
    }
    panic!("the API server ended the watch {INTERRUPTIONS} times: nothing more can be measured");
}

/// Notes events until the API server ends the watch; `version` is what was seen last.
async fn one_watch(client: &Client, pods: &Pods, version: &mut String) {
    // A whole run takes less than these two hours.
    let path = format!("/api/v1/pods?watch=1&timeoutSeconds=7200&resourceVersion={version}");
    let request = http::Request::get(path).body(Vec::new()).unwrap();
    let mut lines = std::pin::pin!(client.request_stream(request).await.unwrap());
    let mut line = Vec::new();
    loop {
        line.clear();
        let read = lines.read_until(b'\n', &mut line).await;
        // The moment is taken before the event is looked into.
        let now = SystemTime::now();
        if !read.is_ok_and(|length| length > 0) {
            return;
        }
        let event: Value = serde_json::from_slice(&line).unwrap();
        assert_ne!(event["type"], "ERROR", "the watch cannot go on: {}", event["object"]);
        event["object"]["metadata"]["resourceVersion"].as_str().unwrap_or_default().clone_into(version);
        note(pods, &event, now);
    }
}

fn note(pods: &Pods, event: &Value, now: SystemTime) {
    let pod = &event["object"];
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let key = (text(&pod["metadata"]["namespace"]), text(&pod["metadata"]["name"]));
    let (mutex, news) = &**pods;
    let mut pods = mutex.lock().unwrap();
    let seen = pods.entry(key).or_default();
    if event["type"] == "DELETED" {
        seen.gone = Some(now);
    }
    if pod["spec"]["nodeName"].is_string() {
        seen.bound.get_or_insert(now);
    }
    match pod["status"]["phase"].as_str() {
        Some("Running") => {
            seen.running.get_or_insert(now);
        }
        Some("Succeeded" | "Failed") => {
            seen.ended.get_or_insert(now);
        }
        _ => {}
    }
    seen.versions.push((text(&pod["metadata"]["resourceVersion"]), now));
    seen.status = pod["status"].clone();
    news.notify_all();
}
