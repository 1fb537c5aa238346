//! Keeps a pod's volumes true while it lives: ConfigMaps and Secrets that change, labels and annotations, tokens that end;
//! and looks whether the pod has more on disk than it may.
//!
//! [`Keeper`] is what the pod's worker has: one task, which begins a second after the containers, so that a short pod costs
//! nothing. Each of its steps asks what is not as it should be, so that nothing that happened meanwhile is missed.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Pod, Volume};
use tokio::sync::{Mutex, mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::refresh::{self, Layout, Refreshed};
use super::storage::Limits;
use super::{VolumeError, memory};
use crate::pod::context::{Context, reading_disk};
use crate::pod::environment::References;
use crate::pod::events::Kind as EventKind;
use crate::pod::objects::Held;
use crate::pod::objects::watches::{Key, Version, Watched};
use crate::pod::worker::prepare_again;

/// The keeper begins so long after the containers: most short pods are over by then.
const BEGIN: Duration = Duration::from_secs(1);

/// Between looks at what pods have on disk (kubelet's evictionMonitoringPeriod, pkg/kubelet/kubelet.go).
const LOOK: Duration = Duration::from_secs(10);

/// The first wait after something that failed and may work again; doubled up to [`RETRY_MOST`].
const RETRY_FIRST: Duration = Duration::from_secs(2);
const RETRY_MOST: Duration = Duration::from_secs(60);

/// How long the end of a pod waits for what is being written: on a disk that hangs it is left behind.
const END_LIMIT: Duration = Duration::from_secs(2);

/// The longest sleep: clocks may jump, and tokens end by the clock.
const SLEEP_MOST: Duration = Duration::from_secs(300);

/// What was found and concerns the pod as a whole. One is sent once a pod.
const FOUND: usize = 1;

/// What the keeper tells the worker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Found {
    /// There is more on disk than the pod may have: it is to be evicted, with this message.
    Exceeded {
        /// kubelet's own words.
        message: String,
    },
}

/// What one pod has read, and whose turn it is: who reads and writes its volumes has it for as long as that takes, so that
/// what was read later is what stays.
pub type Turn = Arc<Mutex<Held>>;

/// What the keeper's task goes by.
#[derive(Clone)]
struct Input {
    pod: Arc<Pod>,
    directory: Arc<PathBuf>,
    layout: Option<Arc<Layout>>,
}

/// A pod's keeper, in the hands of its worker.
pub struct Keeper {
    turn: Turn,
    input: Option<watch::Sender<Input>>,
    task: Option<JoinHandle<()>>,
    found_tx: mpsc::Sender<Found>,
    found: mpsc::Receiver<Found>,
}

impl Default for Keeper {
    fn default() -> Self {
        let (found_tx, found) = mpsc::channel(FOUND);
        Self { turn: Turn::default(), input: None, task: None, found_tx, found }
    }
}

impl Keeper {
    /// For whoever prepares the pod.
    #[must_use]
    pub fn turn(&self) -> Turn {
        Arc::clone(&self.turn)
    }

    /// The pod was prepared: its volumes are kept from now on. `layout` is what its preparation gave; none after a crash of
    /// the pilot, when its containers go on: the keeper then finds it out.
    pub fn keep(&mut self, context: &Arc<Context>, pod: &Pod, directory: PathBuf, layout: Option<Layout>) {
        if !has_to_be_kept(pod) {
            return;
        }
        let input =
            Input { pod: Arc::new(slim(pod)), directory: Arc::new(directory), layout: layout.map(Arc::new) };
        if let Some(sender) = self.input.as_ref().filter(|sender| !sender.is_closed()) {
            sender.send_if_modified(|old| {
                let layout = input.layout.clone().or(old.layout.take());
                let new = *old.pod != *input.pod || old.layout != layout || old.directory != input.directory;
                *old = Input { layout, ..input };
                new
            });
            return;
        }
        let (sender, receiver) = watch::channel(input);
        self.input = Some(sender);
        let keep = Keep {
            context: Arc::clone(context),
            input: receiver,
            turn: Arc::clone(&self.turn),
            found: self.found_tx.clone(),
            layout: None,
            watched: BTreeMap::new(),
            handled: BTreeMap::new(),
            applied: None,
            complaint: None,
            wait: RETRY_FIRST,
            not_before: None,
            look_at: None,
        };
        self.task = Some(tokio::spawn(keep.run()));
    }

    /// The pod as it is now.
    pub fn update(&self, pod: &Pod) {
        let Some(input) = &self.input else { return };
        let meta = |pod: &Pod| (pod.metadata.labels.clone(), pod.metadata.annotations.clone());
        // Statuses come by the same way, many times as often.
        if meta(&input.borrow().pod) != meta(pod) {
            input.send_modify(|input| input.pod = Arc::new(slim(pod)));
        }
    }

    /// Waits for something that concerns the pod.
    pub async fn found(&mut self) -> Found {
        match self.found.recv().await {
            Some(found) => found,
            None => std::future::pending().await,
        }
    }

    /// The pod has ended: nothing is kept any more, and what it had in memory goes. Waits for what is being written.
    pub async fn end(&mut self, pod: &Pod) {
        // The task sees that nobody tells it anything any more.
        self.input = None;
        if let Some(task) = self.task.take() {
            let _ = tokio::time::timeout(END_LIMIT, task).await;
        }
        if !volumes(pod).any(is_in_memory) {
            return;
        }
        let uid = pod.metadata.uid.clone().unwrap_or_default();
        // No disk that hangs holds this up: it is the kernel's memory.
        let removing = tokio::task::spawn_blocking(move || memory::remove(&uid));
        if let Ok(Ok(Err(error))) = tokio::time::timeout(END_LIMIT, removing).await {
            tracing::warn!(%error, "an emptyDir in memory could not be removed; `jiriaf-pilot clean` tries again");
        }
    }
}

fn volumes(pod: &Pod) -> impl Iterator<Item = &Volume> {
    pod.spec.iter().flat_map(|spec| spec.volumes.iter().flatten())
}

fn is_in_memory(volume: &Volume) -> bool {
    volume.empty_dir.as_ref().is_some_and(|empty| empty.medium.as_deref() == Some("Memory"))
}

/// Whether anything in a pod's volumes may change or grow.
fn has_to_be_kept(pod: &Pod) -> bool {
    volumes(pod).any(|volume| {
        volume.config_map.is_some()
            || volume.secret.is_some()
            || volume.projected.is_some()
            || volume.downward_api.is_some()
    }) || !Limits::of(pod).is_empty()
}

/// What a keeper needs of a pod: it is held for as long as the pod lives.
fn slim(pod: &Pod) -> Pod {
    let mut slim = Pod { metadata: pod.metadata.clone(), spec: pod.spec.clone(), status: None };
    slim.metadata.managed_fields = None;
    if let Some(spec) = &mut slim.spec {
        let init = spec.init_containers.iter_mut().flatten();
        for container in spec.containers.iter_mut().chain(init) {
            // A resourceFieldRef names a container's resources. Mounts are asked for again after a crash alone.
            container.lifecycle = None;
            container.liveness_probe = None;
            container.readiness_probe = None;
            container.startup_probe = None;
        }
        spec.affinity = None;
        spec.tolerations = None;
        spec.topology_spread_constraints = None;
    }
    slim
}

struct Keep {
    context: Arc<Context>,
    input: watch::Receiver<Input>,
    turn: Turn,
    found: mpsc::Sender<Found>,
    /// What the keeper found out itself; what the worker says counts before it.
    layout: Option<Arc<Layout>>,
    watched: BTreeMap<Key, Watched>,
    /// What a watch told when the object was last read because of it.
    handled: BTreeMap<Key, Version>,
    /// The pod whose labels and annotations are in the files.
    applied: Option<Arc<Pod>>,
    complaint: Option<String>,
    wait: Duration,
    not_before: Option<Instant>,
    look_at: Option<Instant>,
}

impl Keep {
    async fn run(mut self) {
        // What changes before the keeper begins is not in the files.
        let first = Arc::clone(&self.input.borrow_and_update().pod);
        self.applied = Some(first);
        let begin = Instant::now() + BEGIN;
        while Instant::now() < begin {
            if self.sleep(begin).await.is_err() {
                return;
            }
        }
        let begun = self.input.borrow().pod.clone();
        self.look_at = (!Limits::of(&begun).is_empty()).then(Instant::now);
        loop {
            let input = self.input.borrow_and_update().clone();
            let now = Instant::now();
            if self.look_at.is_some_and(|at| at <= now) {
                let over = Self::over(self.input.clone());
                tokio::select! {
                    () = self.look(&input) => {}
                    Err(Over) = over => return,
                }
            }
            let wake = match self.step(&input).await {
                Ok(wake) => wake,
                // The worker has let go.
                Err(Over) => return,
            };
            let wake = [wake, self.look_at, Some(now + SLEEP_MOST)].into_iter().flatten().min();
            if self.sleep(wake.unwrap_or(now + SLEEP_MOST)).await.is_err() {
                return;
            }
        }
    }

    /// Waits until something has changed or it is time.
    async fn sleep(&mut self, until: Instant) -> Result<(), Over> {
        let changed = async {
            if self.watched.is_empty() {
                return std::future::pending().await;
            }
            let all = self.watched.values_mut().map(|watched| Box::pin(watched.changed()));
            futures::future::select_all(all).await;
        };
        tokio::select! {
            changed = self.input.changed() => changed.map_err(|_| Over),
            () = changed => Ok(()),
            () = tokio::time::sleep_until(until) => Ok(()),
        }
    }

    /// Makes true what is not, and says when to look again.
    async fn step(&mut self, input: &Input) -> Result<Option<Instant>, Over> {
        let now = Instant::now();
        if let Some(at) = self.not_before.filter(|at| *at > now) {
            return Ok(Some(at));
        }
        self.not_before = None;
        let turn = Arc::clone(&self.turn);
        let mut held = tokio::select! {
            held = turn.lock() => held,
            Err(Over) = Self::over(self.input.clone()) => return Err(Over),
        };
        let Some(layout) = input.layout.clone().or_else(|| self.layout.clone()) else {
            // After a crash of the pilot: the pod's preparation is done again, which writes what has changed.
            drop(held);
            return self.find_out(input).await;
        };
        let pod = Arc::clone(&input.pod);
        let namespace = pod.metadata.namespace.clone().unwrap_or_default();
        let followed = refresh::followed(&pod, &layout);
        self.follow(&followed, &namespace, &held);
        let applied = self.applied.get_or_insert_with(|| Arc::clone(&pod)).clone();
        let moved = applied.metadata.labels != pod.metadata.labels
            || applied.metadata.annotations != pod.metadata.annotations;
        let clock = Timestamp::now();
        let is_stale = |volume: &Volume, wants: &References| {
            moved && refresh::tells_of_metadata(volume)
                || held.due(&wants.tokens, clock)
                || refresh::keys(wants, &namespace).iter().any(|key| self.is_news(key, &held))
        };
        let stale: BTreeSet<String> = followed
            .iter()
            .filter(|(_, (volume, wants))| is_stale(volume, wants))
            .map(|(name, _)| (*name).to_owned())
            .collect();
        if !stale.is_empty() {
            let told: Vec<(Key, Version)> =
                self.watched.iter().map(|(key, watched)| (key.clone(), watched.version())).collect();
            let mut done = Refreshed::default();
            // One by one: what is the matter with one volume holds no other up.
            for name in &stale {
                let read = tokio::select! {
                    read = refresh::read(&self.context, &pod, name, &mut held) => read,
                    Err(Over) = Self::over(self.input.clone()) => return Err(Over),
                };
                // What is being written is never left half done.
                let one = match read {
                    Ok(read) => {
                        let (context, directory) = (&self.context, &input.directory);
                        refresh::apply(context, &pod, directory, &layout, name, read, &mut held).await
                    }
                    Err(failed) => failed,
                };
                done.again |= one.again;
                done.complaints.extend(one.complaints);
            }
            drop(held);
            self.complain(&pod, &done.complaints);
            if done.again {
                return Ok(Some(self.later()));
            }
            self.handled.extend(told);
            self.wait = RETRY_FIRST;
            self.applied = Some(pod);
            return Ok(Some(now));
        }
        self.wait = RETRY_FIRST;
        self.applied = Some(Arc::clone(&pod));
        let tokens = followed.values().flat_map(|(_, wants)| &wants.tokens);
        let next = tokens.filter_map(|token| held.tokens.get(token)?.refresh_at()).min();
        Ok(next.map(|at| {
            let left = Duration::try_from(at.duration_since(clock)).unwrap_or_default();
            now + left.clamp(RETRY_FIRST, SLEEP_MOST)
        }))
    }

    /// Only when the worker has let go.
    async fn over(mut input: watch::Receiver<Input>) -> Result<(), Over> {
        while input.changed().await.is_ok() {}
        Err(Over)
    }

    fn later(&mut self) -> Instant {
        let at = Instant::now() + self.wait;
        self.wait = (self.wait * 2).min(RETRY_MOST);
        self.not_before = Some(at);
        at
    }

    /// Whether a watch knows of another version than the one that is in the files.
    fn is_news(&self, key: &Key, held: &Held) -> bool {
        let Some(told) = self.watched.get(key).map(Watched::version) else { return false };
        told != Version::Unknown
            && held.versions.get(key) != Some(&told)
            && self.handled.get(key) != Some(&told)
    }

    /// Watches what may change, and nothing else.
    fn follow(&mut self, followed: &BTreeMap<&str, (&Volume, References)>, namespace: &str, held: &Held) {
        let Some(watches) = self.context.api.watches() else { return };
        let wanted: BTreeSet<Key> = followed
            .values()
            .flat_map(|(_, wants)| refresh::keys(wants, namespace))
            .filter(|key| !held.immutable.contains(key))
            .collect();
        self.watched.retain(|key, _| wanted.contains(key));
        for key in wanted {
            self.watched.entry(key).or_insert_with_key(|key| watches.follow(key));
        }
    }

    /// What a preparation would have told.
    async fn find_out(&mut self, input: &Input) -> Result<Option<Instant>, Over> {
        let again = prepare_again(&self.context, &input.pod, input.directory.to_path_buf(), &self.turn);
        let prepared = tokio::select! {
            prepared = again => prepared,
            Err(Over) = Self::over(self.input.clone()) => return Err(Over),
        };
        match prepared {
            Ok(layout) => {
                self.wait = RETRY_FIRST;
                self.layout = Some(Arc::new(layout));
                Ok(Some(Instant::now()))
            }
            Err(problem) => {
                self.complain(&input.pod, &[problem]);
                Ok(Some(self.later()))
            }
        }
    }

    fn complain(&mut self, pod: &Pod, complaints: &[String]) {
        let Some(message) = complaints.first() else {
            self.complaint = None;
            return;
        };
        if self.complaint.as_ref() != Some(message) {
            self.complaint = Some(message.clone());
            self.context.events.record(pod, None, EventKind::Warning, VolumeError::REASON, message);
        }
    }

    /// Looks at what the pod has on disk. That it is too much is told once, and no more looks follow.
    async fn look(&mut self, input: &Input) {
        self.look_at = Some(Instant::now() + LOOK);
        let directory = Arc::clone(&input.directory);
        let limits = Limits::of(&input.pod);
        let found = reading_disk(move || limits.exceeded(&directory));
        if let Ok(Some(message)) = found.await {
            self.look_at = None;
            let _ = self.found.try_send(Found::Exceeded { message });
        }
    }
}

/// The worker has let go.
struct Over;

#[cfg(test)]
mod tests {
    use serde_json::{Value, from_value, json};

    use super::*;

    fn pod(volumes: Value) -> Pod {
        from_value(json!({"metadata": {"name": "p"}, "spec": {"containers": [], "volumes": volumes}}))
            .unwrap()
    }

    #[test]
    fn a_pod_whose_volumes_never_change_costs_nothing() {
        for (volume, wanted) in [
            (json!({"emptyDir": {}}), false),
            (json!({"hostPath": {"path": "/x"}}), false),
            (json!({"emptyDir": {"sizeLimit": "1Mi"}}), true),
            (json!({"configMap": {"name": "c"}}), true),
            (json!({"downwardAPI": {}}), true),
        ] {
            let mut volume = volume;
            volume["name"] = json!("v");
            assert_eq!(has_to_be_kept(&pod(json!([volume]))), wanted, "{volume}");
        }
    }
}
