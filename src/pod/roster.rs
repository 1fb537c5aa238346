//! The pods of this Node as they are now, for those who only look: the Node's own API, metrics. Each pod's worker keeps
//! its own entry true.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use tokio::sync::watch;

use super::probe::Tally;
use super::session::RunHandle;
use super::status::{State, Terminated};

/// All pods, by uid.
#[derive(Debug)]
pub struct Roster {
    pods: Mutex<BTreeMap<String, Arc<PodView>>>,
    changes: watch::Sender<u64>,
}

impl Default for Roster {
    fn default() -> Self {
        Self { pods: Mutex::default(), changes: watch::Sender::new(0) }
    }
}

/// A pod as it is now.
#[derive(Debug, Clone)]
pub struct PodView {
    /// The pod, with its status as this pilot last made it.
    pub pod: Pod,
    /// When it was admitted.
    pub admitted: Timestamp,
    /// Its directory, once there is one.
    pub directory: Option<PathBuf>,
    /// Whether its containers are isolated: what of it is read must lie in its own part of the store.
    pub isolated: bool,
    /// Its containers, by name.
    pub containers: BTreeMap<String, ContainerView>,
}

/// A container as it is now.
#[derive(Debug, Clone)]
pub struct ContainerView {
    /// What it does.
    pub state: State,
    /// How its last run but one ended.
    pub last: Option<Terminated>,
    /// The number of its run, whose log has that name.
    pub restart: u32,
    /// Its run, while there is one.
    pub run: Option<RunHandle>,
    /// How its probes went.
    pub probed: Arc<Tally>,
}

impl PodView {
    /// What others wait for: the phase, and for each container which run of it there is.
    fn outline(&self) -> (Option<String>, Vec<(u32, bool)>) {
        let phase = self.pod.status.as_ref().and_then(|status| status.phase.clone());
        (phase, self.containers.values().map(|c| (c.restart, c.run.is_some())).collect())
    }
}

impl Roster {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Arc<PodView>>> {
        // Nobody panics with the lock held; a panic ends the process.
        self.pods.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Enters a pod, or what has become of it.
    pub fn put(&self, uid: &str, view: PodView) {
        let new = view.outline();
        let old = self.lock().insert(uid.to_owned(), Arc::new(view)).map(|old| old.outline());
        // Who waits for a pod's end or a container's next run is not woken by all else.
        if old.as_ref() != Some(&new) {
            self.changes.send_modify(|n| *n = n.wrapping_add(1));
        }
    }

    /// The pod is gone.
    pub fn remove(&self, uid: &str) {
        self.lock().remove(uid);
        self.changes.send_modify(|n| *n = n.wrapping_add(1));
    }

    /// Tells when some pod's phase or runs change.
    #[must_use]
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// The pod of this uid.
    #[must_use]
    pub fn get(&self, uid: &str) -> Option<Arc<PodView>> {
        self.lock().get(uid).cloned()
    }

    /// All pods.
    #[must_use]
    pub fn all(&self) -> Vec<Arc<PodView>> {
        self.lock().values().cloned().collect()
    }

    /// The pod of this name; of several, the one that was admitted last.
    #[must_use]
    pub fn find(&self, namespace: &str, name: &str) -> Option<Arc<PodView>> {
        let all = self.lock();
        let named = all.values().filter(|view| {
            let meta = &view.pod.metadata;
            meta.namespace.as_deref() == Some(namespace) && meta.name.as_deref() == Some(name)
        });
        named.max_by_key(|view| view.admitted).cloned()
    }
}
