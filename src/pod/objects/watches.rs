//! One watch for each ConfigMap and Secret that running pods have in their volumes, shared by all of them.
//!
//! As a kubelet's `pkg/kubelet/util/manager/watch_based_manager.go`, with less: what is watched is the object's metadata
//! alone, and only its version is told. Whoever wants the object reads it, so that nothing is held here. A watch begins with
//! the object as it is (resourceVersion 0), so that no change is missed between the reading and the watch, and so that a
//! list is never needed: the right to `watch` one object by its name is enough. Without it the object's metadata are read
//! every minute.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use futures::StreamExt as _;
use kube::api::{GetParams, WatchParams};
use kube::core::{Request, WatchEvent};
use serde::Deserialize;
use tokio::sync::{Semaphore, watch};
use tokio::task::AbortHandle;
use tokio::time::Instant;

use super::chance;
use crate::pod::api::CALL_LIMIT;

/// Watches at once: each has a connection of its own, here and at the API server. Beyond it objects are read every
/// minute.
pub const MOST: usize = 256;

/// The same where connections go through a tunnel, which has room for 64.
pub const MOST_BY_TUNNEL: usize = 24;

/// How often things are tried.
#[derive(Debug, Clone, Copy)]
struct Pace {
    /// Between two looks at an object that is not watched.
    poll: Duration,
    /// The wait after a watch that failed, doubled each time.
    first: Duration,
    /// The longest such wait.
    most: Duration,
    /// A watch that was up for so long begins anew without a longer wait.
    steady: Duration,
}

/// A kubelet that does not watch looks every minute or so too (configMapAndSecretChangeDetectionStrategy: Cache).
const PACE: Pace = Pace {
    poll: Duration::from_secs(60),
    first: Duration::from_secs(1),
    most: Duration::from_secs(30),
    steady: Duration::from_secs(60),
};

/// Which kind of object.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// A ConfigMap.
    ConfigMap,
    /// A Secret.
    Secret,
}

/// Which object.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    /// Its kind.
    pub kind: Kind,
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
}

impl Key {
    fn collection(&self) -> Request {
        let plural = match self.kind {
            Kind::ConfigMap => "configmaps",
            Kind::Secret => "secrets",
        };
        Request::new(format!("/api/v1/namespaces/{}/{plural}", self.namespace))
    }
}

/// What is known of an object.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Version {
    /// Nothing yet.
    #[default]
    Unknown,
    /// It is not there.
    Absent,
    /// Its resourceVersion.
    At(String),
}

/// All watches of a pilot.
#[derive(Clone)]
pub struct Watches {
    client: kube::Client,
    pace: Pace,
    room: Arc<Semaphore>,
    refused: Arc<AtomicBool>,
    shared: Arc<Mutex<BTreeMap<Key, Weak<Shared>>>>,
}

struct Shared {
    version: watch::Receiver<Version>,
    task: AbortHandle,
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// An object that is watched for as long as anybody has this.
pub struct Watched {
    /// Which one.
    pub key: Key,
    version: watch::Receiver<Version>,
    _shared: Arc<Shared>,
}

impl Watched {
    /// What is known of it now.
    #[must_use]
    pub fn version(&self) -> Version {
        self.version.borrow().clone()
    }

    /// Waits until more is known.
    pub async fn changed(&mut self) {
        if self.version.changed().await.is_err() {
            std::future::pending().await
        }
    }
}

impl Watches {
    /// Watches through `client`, at most so many objects at once.
    #[must_use]
    pub fn new(client: kube::Client, most: usize) -> Self {
        let room = Arc::new(Semaphore::new(most));
        Self { client, pace: PACE, room, refused: Arc::default(), shared: Arc::default() }
    }

    /// Watches an object, with whoever watches it already.
    #[must_use]
    pub fn follow(&self, key: &Key) -> Watched {
        let mut all = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        let known = all.get(key).and_then(Weak::upgrade);
        let shared = known.unwrap_or_else(|| {
            // What nobody watches any more leaves no trace.
            all.retain(|_, shared| shared.strong_count() > 0);
            let (version_tx, version) = watch::channel(Version::Unknown);
            let follower = Follower {
                client: self.client.clone(),
                pace: self.pace,
                key: key.clone(),
                room: Arc::clone(&self.room),
                refused: Arc::clone(&self.refused),
                version: version_tx,
            };
            let task = tokio::spawn(follower.run()).abort_handle();
            let shared = Arc::new(Shared { version, task });
            all.insert(key.clone(), Arc::downgrade(&shared));
            shared
        });
        let mut version = shared.version.clone();
        version.mark_unchanged();
        if *version.borrow() != Version::Unknown {
            version.mark_changed();
        }
        Watched { key: key.clone(), version, _shared: shared }
    }
}

/// What is read of an object.
#[derive(Debug, Clone, Deserialize)]
struct Seen {
    metadata: SeenMetadata,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
struct SeenMetadata {
    name: Option<String>,
    resource_version: Option<String>,
}

struct Follower {
    client: kube::Client,
    pace: Pace,
    key: Key,
    room: Arc<Semaphore>,
    /// Somebody was told that watches are refused.
    refused: Arc<AtomicBool>,
    version: watch::Sender<Version>,
}

impl Follower {
    async fn run(self) {
        let mut wait = self.pace.first;
        loop {
            let Ok(room) = Arc::clone(&self.room).try_acquire_owned() else {
                self.look().await;
                tokio::time::sleep(spread(self.pace.poll)).await;
                continue;
            };
            let began = Instant::now();
            let ended = self.watch().await;
            drop(room);
            match ended {
                Err(kube::Error::Api(status)) if status.code == 403 => {
                    if !self.refused.swap(true, Ordering::Relaxed) {
                        tracing::warn!(
                            namespace = self.key.namespace,
                            name = self.key.name,
                            "ConfigMaps and Secrets may not be watched, so changes are seen within a minute instead of at once: grant `watch` as docs/cluster/pilot.yaml does"
                        );
                    }
                    self.look().await;
                    tokio::time::sleep(spread(self.pace.poll)).await;
                    continue;
                }
                Err(error) => {
                    tracing::debug!(key = ?self.key, %error, "a watch has ended; it begins again");
                }
                Ok(()) => {}
            }
            if began.elapsed() >= self.pace.steady {
                wait = self.pace.first;
            }
            tokio::time::sleep(spread(wait)).await;
            wait = (wait * 2).min(self.pace.most);
        }
    }

    /// One watch, until it ends.
    async fn watch(&self) -> Result<(), kube::Error> {
        // With bookmarks an API server with the feature WatchList takes it for a list, which one on an old etcd refuses
        // (apiserver's cacher.go, isListWatchRequest).
        let params = WatchParams::default().disable_bookmarks();
        let params = params.fields(&format!("metadata.name={}", self.key.name));
        let request =
            self.key.collection().watch_metadata(&params, "0").map_err(kube::Error::BuildRequest)?;
        let began = tokio::time::timeout(CALL_LIMIT, self.client.request_events::<Seen>(request)).await;
        // An answer that does not come is as a watch that ended.
        let Ok(began) = began else { return Ok(()) };
        let mut events = std::pin::pin!(began?);
        while let Some(event) = events.next().await {
            match event? {
                WatchEvent::Added(seen) | WatchEvent::Modified(seen) => self.tell(seen),
                WatchEvent::Deleted(seen) if self.is_it(&seen) => {
                    self.set(Version::Absent);
                }
                WatchEvent::Deleted(_) | WatchEvent::Bookmark(_) => {}
                WatchEvent::Error(status) => return Err(kube::Error::Api(status)),
            }
        }
        Ok(())
    }

    /// One look, for an object that cannot be watched.
    async fn look(&self) {
        let Ok(request) = self.key.collection().get_metadata(&self.key.name, &GetParams::default()) else {
            return;
        };
        match tokio::time::timeout(CALL_LIMIT, self.client.request::<Seen>(request)).await {
            Ok(Ok(seen)) => self.tell(seen),
            Ok(Err(kube::Error::Api(status))) if status.code == 404 => self.set(Version::Absent),
            Ok(Err(error)) => tracing::debug!(key = ?self.key, %error, "an object could not be looked at"),
            Err(_) => {}
        }
    }

    fn is_it(&self, seen: &Seen) -> bool {
        seen.metadata.name.as_ref().is_none_or(|name| *name == self.key.name)
    }

    fn tell(&self, seen: Seen) {
        if self.is_it(&seen)
            && let Some(version) = seen.metadata.resource_version
        {
            self.set(Version::At(version));
        }
    }

    fn set(&self, version: Version) {
        self.version.send_if_modified(|old| {
            let new = *old != version;
            *old = version;
            new
        });
    }
}

/// Between half of it and all, so that not all pilots come at once to an API server that is back.
fn spread(wait: Duration) -> Duration {
    wait.mul_f64(0.5 + chance() / 2.0)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU32;

    use serde_json::{Value, json};

    use super::*;
    use crate::cluster::stand_in::client_of;

    fn key() -> Key {
        Key { kind: Kind::Secret, namespace: "ns".to_owned(), name: "s".to_owned() }
    }

    fn seen(version: u32) -> Value {
        json!({"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1",
            "metadata": {"name": "s", "resourceVersion": version.to_string()}})
    }

    /// Counts (watches, looks). A watch is answered by `watch`, a look by a new version each time.
    fn server(watch: (u16, Value)) -> (kube::Client, Arc<(AtomicU32, AtomicU32)>) {
        let counts: Arc<(AtomicU32, AtomicU32)> = Arc::default();
        let counted = Arc::clone(&counts);
        let client = client_of(move |method, path, _| {
            let (path, query) = path.split_once('?').unwrap_or((path, ""));
            assert_eq!(method, "GET");
            if query.contains("watch=true") {
                assert_eq!(path, "/api/v1/namespaces/ns/secrets");
                assert!(query.contains("fieldSelector=metadata.name%3Ds&resourceVersion=0"), "{query}");
                counted.0.fetch_add(1, Ordering::Relaxed);
                return watch.clone();
            }
            assert_eq!(path, "/api/v1/namespaces/ns/secrets/s");
            (200, seen(100 + counted.1.fetch_add(1, Ordering::Relaxed)))
        });
        (client, counts)
    }

    fn counts(counts: &(AtomicU32, AtomicU32)) -> (u32, u32) {
        (counts.0.load(Ordering::Relaxed), counts.1.load(Ordering::Relaxed))
    }

    async fn version(watched: &mut Watched) -> Version {
        watched.changed().await;
        watched.version()
    }

    /// As [`PACE`], in hundredths of a second.
    fn quick(client: kube::Client, most: usize) -> Watches {
        let hundredths = |n: u64| Duration::from_millis(n * 10);
        let pace =
            Pace { poll: hundredths(60), first: hundredths(1), most: hundredths(30), steady: PACE.steady };
        Watches { pace, ..Watches::new(client, most) }
    }

    #[tokio::test]
    async fn one_watch_serves_all_and_ends_with_the_last() {
        let (client, server) = server((200, json!({"type": "ADDED", "object": seen(7)})));
        let watches = quick(client, 1);
        let (mut one, mut two) = (watches.follow(&key()), watches.follow(&key()));
        let wanted = Version::At("7".to_owned());
        assert_eq!((version(&mut one).await, version(&mut two).await), (wanted.clone(), wanted.clone()));
        assert_eq!(version(&mut watches.follow(&key())).await, wanted, "who comes later is told at once");
        assert_eq!(counts(&server), (1, 0));
        // The watch has ended, as each does after some minutes: it begins again, and nothing is new.
        assert!(tokio::time::timeout(Duration::from_millis(200), one.changed()).await.is_err());
        let before = counts(&server).0;
        assert!(before > 1);
        drop(one);
        tokio::time::sleep(Duration::from_millis(700)).await;
        assert!(counts(&server).0 > before, "somebody still has it");
        drop(two);
        let before = counts(&server);
        tokio::time::sleep(Duration::from_millis(700)).await;
        assert_eq!(counts(&server), before, "nobody has it");
    }

    #[tokio::test]
    async fn what_may_not_or_cannot_be_watched_is_looked_at_now_and_then() {
        let forbidden = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
            "message": "no", "reason": "Forbidden", "code": 403});
        for (most, tried) in [(1, true), (0, false)] {
            let (client, server) = server((403, forbidden.clone()));
            let mut watched = quick(client, most).follow(&key());
            assert_eq!(version(&mut watched).await, Version::At("100".to_owned()));
            let began = Instant::now();
            assert_eq!(version(&mut watched).await, Version::At("101".to_owned()));
            let took = began.elapsed();
            assert!(took >= Duration::from_millis(280), "{took:?}");
            assert_eq!(counts(&server), (if tried { 2 } else { 0 }, 2));
        }
    }

    #[tokio::test]
    async fn an_object_that_goes_is_absent_and_a_watch_that_fails_is_tried_again_later_and_later() {
        let (client, _) = server((200, json!({"type": "DELETED", "object": seen(8)})));
        let mut watched = quick(client, 1).follow(&key());
        assert_eq!(version(&mut watched).await, Version::Absent);
        let error = json!({"type": "ERROR", "object": {"kind": "Status", "apiVersion": "v1", "metadata": {},
            "status": "Failure", "message": "too old", "reason": "Expired", "code": 410}});
        let (client, server) = server((200, error));
        let watched = quick(client, 1).follow(&key());
        tokio::time::sleep(Duration::from_secs(1)).await;
        let tries = counts(&server).0;
        assert!((4..14).contains(&tries), "{tries}");
        assert_eq!(watched.version(), Version::Unknown);
    }
}
