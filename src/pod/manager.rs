//! All pods of this Node: who is admitted, who is refused, who has ended.
//!
//! [`spawn`] starts the manager and returns its [`Manager`] handle. It alone decides on admission, one pod after
//! another, so that no resource is promised twice.

mod closing;
mod lost;
mod outcomes;
mod refusals;
mod shares;
#[cfg(test)]
mod tests;
mod turned_away;
mod work;

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use futures::StreamExt as _;
use futures::future::{BoxFuture, join_all};
use futures::stream::FuturesUnordered;
use k8s_openapi::api::core::v1::Pod;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use self::refusals::Owners;
pub use self::shares::shares;
use super::admission::{self, Load, NodeFacts, Rejection};
use super::context::Context;
use super::outcome::Outcome;
use super::record::Record;
use super::share::{Ledger, Placement, Processor};
use super::source::PodEvent;
use super::status::{Ending, NODE_SHUTDOWN, NODE_SHUTDOWN_REJECTED};
use super::worker::{self, Command, Note, Start};
use crate::container::{ContainerId, Supervisor};

/// Requests that may wait for the manager.
const REQUESTS: usize = 16;

/// Notes of workers that may wait.
const NOTES: usize = 256;

/// Pods that wait while the cordon is being acknowledged. The scheduler binds some hundred a second at most.
const HELD: usize = 1000;

/// How long the last summary waits for the files of outcomes: the process ends right after it.
const WRITES_LIMIT: Duration = Duration::from_millis(500);

/// Whether pods are taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gate {
    /// Pods are admitted.
    Open,
    /// Pods wait: the cordon, or its end, is not acknowledged yet.
    Holding,
    /// Pods are rejected as on a node that is shut down.
    Closed,
}

enum Request {
    Gate(Gate),
    Shutdown { grace: Duration },
    Evict { uid: String, message: String },
    Regrant(Vec<Processor>),
    Outcomes { late: bool, answer: oneshot::Sender<Summary> },
}

/// What has become of the pods so far.
#[derive(Debug, Clone, Default)]
pub struct Summary {
    /// The outcomes, oldest first; at most [`crate::pod::outcome::REMEMBERED`].
    pub outcomes: Vec<Outcome>,
    /// Outcomes that are not among them any more.
    pub forgotten: u64,
}

/// How many pods are where.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Pods that have not ended.
    pub active: usize,
    /// Pods for which the pilot is here: those that have not ended and those that wait at the gate, less those that are on
    /// every Node and never leave ([`work`]).
    pub working: usize,
    /// Pods that have ended and whose final status is not acknowledged.
    pub unreported: usize,
    /// Pods that never ran here and whose final status is not acknowledged: refused, lost, or deleted before they came.
    pub refused: usize,
    /// Pods that have ended and that their Job has not counted yet: they carry its tracking finalizer.
    pub tracked: usize,
    /// Pods of which something is left, if only a directory.
    pub known: usize,
    /// The first list of pods has been seen.
    pub listed: bool,
}

/// A pod of before a crash, and its supervisors that are still there.
pub type Recovered = (Record, Vec<(ContainerId, Supervisor)>);

/// Holds a finished pod until its Job has counted it (batch/v1).
const JOB_TRACKING: &str = "batch.kubernetes.io/job-tracking";

/// The manager's handle.
#[derive(Clone)]
pub struct Manager {
    requests: mpsc::Sender<Request>,
    counts: watch::Receiver<Counts>,
}

impl Manager {
    /// Opens or closes the gate.
    pub async fn gate(&self, gate: Gate) {
        let _ = self.requests.send(Request::Gate(gate)).await;
    }

    /// Ends all pods: SIGTERM now, SIGKILL after `grace` or the pod's own grace. May be called again with less.
    pub async fn shutdown(&self, grace: Duration) {
        let _ = self.requests.send(Request::Shutdown { grace }).await;
    }

    /// Ends a pod because the job's memory runs short.
    pub async fn evict(&self, uid: &str, message: String) {
        let _ = self.requests.send(Request::Evict { uid: uid.to_owned(), message }).await;
    }

    /// The job's CPUs are these now.
    pub async fn regrant(&self, processors: Vec<Processor>) {
        let _ = self.requests.send(Request::Regrant(processors)).await;
    }

    /// How many pods are where, and when that changes.
    #[must_use]
    pub fn counts(&self) -> watch::Receiver<Counts> {
        self.counts.clone()
    }

    /// What has become of the pods whose final status is acknowledged.
    pub async fn summary(&self) -> Summary {
        self.outcomes(false).await
    }

    /// What has become of all pods, also of those whose final status was never acknowledged or that have not ended.
    pub async fn final_summary(&self) -> Summary {
        self.outcomes(true).await
    }

    async fn outcomes(&self, late: bool) -> Summary {
        let (answer_tx, answer) = oneshot::channel();
        let _ = self.requests.send(Request::Outcomes { late, answer: answer_tx }).await;
        answer.await.unwrap_or_default()
    }
}

/// What the manager starts with.
pub struct Setup {
    /// What all pods share.
    pub context: Arc<Context>,
    /// Where pods come from.
    pub pods: mpsc::Receiver<PodEvent>,
    /// The Node as admission sees it.
    pub facts: watch::Receiver<NodeFacts>,
    /// Pods of before a crash, and the supervisors that are still there.
    pub recovered: Vec<Recovered>,
    /// What there is to hand out.
    pub ledger: Ledger,
    /// Where it is told who runs where.
    pub placement: watch::Sender<Arc<Placement>>,
}

/// Starts the manager.
#[must_use]
pub fn spawn(setup: Setup) -> Manager {
    let (requests_tx, requests) = mpsc::channel(REQUESTS);
    let (notes_tx, notes) = mpsc::channel(NOTES);
    // Known before the manager's first turn: an end that begins at once must not find that there is nothing to wait for.
    let taken_up = setup.recovered.len();
    let first = Counts { active: taken_up, working: taken_up, known: taken_up, ..Counts::default() };
    let (counts_tx, counts) = watch::channel(first);
    let state = State {
        context: setup.context,
        facts: setup.facts,
        notes_tx,
        notes,
        pods: HashMap::new(),
        refused: HashMap::new(),
        told: FuturesUnordered::new(),
        owners: Owners::default(),
        gate: Gate::Open,
        held: VecDeque::new(),
        outcomes: VecDeque::new(),
        writes: HashMap::new(),
        forgotten: 0,
        shutdown: None,
        listed: false,
        counts: counts_tx,
        ledger: setup.ledger,
        placement: setup.placement,
    };
    tokio::spawn(state.run(setup.pods, requests, setup.recovered));
    Manager { requests: requests_tx, counts }
}

struct Entry {
    commands: mpsc::Sender<Command>,
    pod: Pod,
    /// Whether the pilot is here for its sake.
    works: bool,
    ended: bool,
    reported: bool,
    /// How it ended, until that is reported.
    outcome: Option<Outcome>,
}

/// A pod that never ran here; dropped when it is gone.
struct Refused {
    /// Says whether the pod is deleted.
    deleted: watch::Sender<bool>,
    /// Its final status is acknowledged, or will never be.
    told: bool,
}

struct State {
    context: Arc<Context>,
    facts: watch::Receiver<NodeFacts>,
    notes_tx: mpsc::Sender<Note>,
    notes: mpsc::Receiver<Note>,
    pods: HashMap<String, Entry>,
    /// Pods that never ran here, by uid.
    refused: HashMap<String, Refused>,
    /// Which of them were told.
    told: FuturesUnordered<BoxFuture<'static, String>>,
    owners: Owners,
    gate: Gate,
    held: VecDeque<Pod>,
    outcomes: VecDeque<Outcome>,
    /// Outcomes' files that are being written, by uid.
    writes: HashMap<String, JoinHandle<()>>,
    forgotten: u64,
    shutdown: Option<Instant>,
    listed: bool,
    counts: watch::Sender<Counts>,
    ledger: Ledger,
    placement: watch::Sender<Arc<Placement>>,
}

impl State {
    async fn run(
        mut self,
        mut pods: mpsc::Receiver<PodEvent>,
        mut requests: mpsc::Receiver<Request>,
        recovered: Vec<Recovered>,
    ) {
        for (mut record, supervisors) in recovered {
            if record.last_status.is_none() {
                record.share = self.ledger.restore(record.uid(), &record.share);
            }
            self.start(record, Start::Resumed(supervisors));
        }
        self.place();
        loop {
            tokio::select! {
                biased;
                request = requests.recv() => match request {
                    Some(request) => self.on_request(request).await,
                    None => return,
                },
                Some(note) = self.notes.recv() => self.on_note(note),
                Some(uid) = self.told.next() => {
                    if let Some(refused) = self.refused.get_mut(&uid) {
                        refused.told = true;
                    }
                }
                // Where no more come, those that are there still have their ends.
                Some(event) = pods.recv() => self.on_pod(event).await,
            }
            self.count();
        }
    }

    fn count(&self) {
        let counts = Counts {
            active: self.pods.values().filter(|e| !e.ended).count(),
            working: self.pods.values().filter(|e| !e.ended && e.works).count()
                + self.held.iter().filter(|pod| work::is_work(pod)).count(),
            unreported: self.pods.values().filter(|e| e.ended && !e.reported).count(),
            refused: self.refused.values().filter(|refused| !refused.told).count(),
            tracked: self.pods.values().filter(|e| e.reported && is_tracked(&e.pod)).count(),
            known: self.pods.len(),
            listed: self.listed,
        };
        self.counts.send_if_modified(|old| std::mem::replace(old, counts) != counts);
    }

    /// Tells a worker. A worker that must make room first may itself wait until a note of its own is taken, so notes are
    /// taken meanwhile.
    async fn tell(&mut self, uid: &str, command: Command) {
        let Some(commands) = self.pods.get(uid).map(|entry| entry.commands.clone()) else { return };
        loop {
            tokio::select! {
                biased;
                room = commands.reserve() => {
                    // Without room the worker is gone.
                    if let Ok(room) = room {
                        room.send(command);
                    }
                    return;
                }
                Some(note) = self.notes.recv() => self.on_note(note),
            }
        }
    }

    async fn on_request(&mut self, request: Request) {
        match request {
            Request::Gate(gate) => {
                self.gate = gate;
                if gate != Gate::Holding {
                    for pod in std::mem::take(&mut self.held) {
                        self.arrived(pod);
                    }
                }
            }
            Request::Shutdown { grace } => {
                self.shutdown = Some(Instant::now() + grace);
                for uid in self.uids(|_, entry| !entry.ended) {
                    self.tell(&uid, Command::Shutdown(grace)).await;
                }
            }
            Request::Evict { uid, message } => self.tell(&uid, Command::Evict(message)).await,
            Request::Regrant(processors) => {
                self.ledger.regrant(processors);
                self.place();
            }
            Request::Outcomes { late, answer } => {
                let mut outcomes: Vec<Outcome> = self.outcomes.iter().cloned().collect();
                let forgotten = self.forgotten;
                if !late {
                    let _ = answer.send(Summary { outcomes, forgotten });
                    return;
                }
                let running = self.pods.values().filter(|entry| !entry.ended);
                let running: Vec<Outcome> = running.map(|entry| Outcome::running(&entry.pod)).collect();
                running.iter().for_each(|outcome| self.keep(outcome));
                outcomes.extend(self.pods.values().filter_map(|entry| entry.outcome.clone()));
                outcomes.extend(running);
                let writes = join_all(std::mem::take(&mut self.writes).into_values());
                tokio::spawn(async move {
                    if tokio::time::timeout(WRITES_LIMIT, writes).await.is_err() {
                        tracing::warn!(
                            "not all outcomes could be written as files in time; the table has them"
                        );
                    }
                    let _ = answer.send(Summary { outcomes, forgotten });
                });
            }
        }
    }

    fn uids(&self, wanted: impl Fn(&str, &Entry) -> bool) -> Vec<String> {
        self.pods.iter().filter(|(uid, entry)| wanted(uid, entry)).map(|(uid, _)| uid.clone()).collect()
    }

    fn on_note(&mut self, note: Note) {
        match note {
            Note::Ended(uid, outcome) => {
                // Kept at once: a pilot that is killed before the status is acknowledged leaves the file.
                self.keep(&outcome);
                if let Some(entry) = self.pods.get_mut(&uid) {
                    entry.ended = true;
                    entry.outcome = Some(*outcome);
                }
                self.release(&uid);
            }
            Note::Reported(uid, outcome) => {
                if let Some(entry) = self.pods.get_mut(&uid) {
                    (entry.ended, entry.reported) = (true, true);
                    entry.outcome = None;
                    let pod = entry.pod.clone();
                    self.ended_event(&pod, &outcome);
                }
                self.remember(*outcome);
            }
            Note::Finished(uid, outcome) => {
                let entry = self.pods.remove(&uid);
                self.release(&uid);
                let Some(outcome) = outcome else { return };
                match entry {
                    // Its object went before its end could be reported, so nothing of it was told yet.
                    Some(entry) if !entry.reported => {
                        self.ended_event(&entry.pod, &outcome);
                        self.remember(*outcome);
                    }
                    _ => {
                        self.keep(&outcome);
                        if let Some(old) = self.outcomes.iter_mut().find(|old| old.uid == uid) {
                            *old = *outcome;
                        }
                    }
                }
            }
        }
    }

    async fn on_pod(&mut self, event: PodEvent) {
        match event {
            PodEvent::Applied(pod) => {
                let uid = pod.metadata.uid.clone().unwrap_or_default();
                if let Some(entry) = self.pods.get_mut(&uid) {
                    entry.pod.clone_from(&pod);
                    self.tell(&uid, Command::Update(pod)).await;
                } else {
                    self.arrived(*pod);
                }
            }
            PodEvent::Deleted(uid) => {
                self.refused.remove(&uid);
                self.held.retain(|pod| pod.metadata.uid.as_deref() != Some(&uid));
                self.tell(&uid, Command::Gone).await;
            }
            PodEvent::Listed(all) => {
                self.listed = true;
                self.refused.retain(|uid, _| all.contains(uid));
                self.held.retain(|pod| pod.metadata.uid.as_ref().is_some_and(|uid| all.contains(uid)));
                for uid in self.uids(|uid, _| !all.contains(uid)) {
                    self.tell(&uid, Command::Gone).await;
                }
            }
        }
    }

    /// A pod that is not ours yet.
    fn arrived(&mut self, pod: Pod) {
        let uid = pod.metadata.uid.clone().unwrap_or_default();
        let deleted = pod.metadata.deletion_timestamp.is_some();
        if let Some(refused) = self.refused.get(&uid) {
            refused.deleted.send_if_modified(|known| deleted && !std::mem::replace(known, true));
            return;
        }
        if self.pods.contains_key(&uid) {
            return;
        }
        let terminal = pod.status.as_ref().and_then(|s| s.phase.as_deref()).is_some_and(is_terminal);
        if terminal {
            if deleted {
                self.close(pod, None, Duration::ZERO);
            }
            return;
        }
        if lost::was_started(&pod) {
            self.lost(pod);
            return;
        }
        if deleted {
            // It never started here, so there is nothing to end. A Job counts it by its final status.
            let status = self.final_status(&pod, &Ending::Deleted, &[]);
            self.close(pod, Some(status), Duration::ZERO);
            return;
        }
        match self.gate {
            Gate::Holding
                if let Some(known) =
                    self.held.iter_mut().find(|held| held.metadata.uid == pod.metadata.uid) =>
            {
                *known = pod;
                return;
            }
            Gate::Holding if self.held.len() < HELD => {
                self.held.push_back(pod);
                return;
            }
            Gate::Holding | Gate::Closed => {
                let rejection = Rejection {
                    reason: NODE_SHUTDOWN.to_owned(),
                    message: NODE_SHUTDOWN_REJECTED.to_owned(),
                };
                self.refuse(pod, rejection);
                return;
            }
            Gate::Open => {}
        }
        let load = Load::of(self.pods.values().filter(|e| !e.ended).map(|e| &e.pod));
        let facts = self.node_now();
        let admitted = admission::admit(&pod, &facts, &load);
        match admitted {
            Ok(()) => self.admitted(pod),
            Err(rejection) => self.refuse(pod, rejection),
        }
    }

    /// The Node as it is at this moment.
    fn node_now(&self) -> NodeFacts {
        let drain = *self.context.drain.borrow();
        let time_left = drain.map(|drain| drain.duration_since(SystemTime::now()).unwrap_or_default());
        NodeFacts { time_left, ..self.facts.borrow().clone() }
    }

    fn start(&mut self, record: Record, start: Start) {
        let uid = record.uid().to_owned();
        let pod = record.pod.clone();
        let commands = worker::spawn(Arc::clone(&self.context), record, start, self.notes_tx.clone());
        if let Some(until) = self.shutdown {
            let _ = commands.try_send(Command::Shutdown(until.saturating_duration_since(Instant::now())));
        }
        let works = work::is_work(&pod);
        self.pods.insert(uid, Entry { commands, pod, works, ended: false, reported: false, outcome: None });
    }
}

fn is_tracked(pod: &Pod) -> bool {
    pod.metadata.finalizers.iter().flatten().any(|finalizer| finalizer == JOB_TRACKING)
}

fn is_terminal(phase: &str) -> bool {
    matches!(phase, "Succeeded" | "Failed")
}
