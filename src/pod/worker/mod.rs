//! One pod's life on this Node: prepared, run, restarted, ended, reported, removed.
//!
//! [`spawn`] starts a worker; [`Command`]s come from the manager, [`Note`]s go back to it. The worker is one loop: it
//! waits for whatever comes next, changes its containers' states, and publishes the status that follows from them.

mod happen;
mod network;
mod order;
mod prepare;
mod report;
mod run;
mod spec;
mod start;
mod state;
mod stop;
mod termination;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use tokio::sync::mpsc;
use tokio::time::Instant;

pub use self::prepare::prepare_again;
use self::prepare::{Attempt, PrepareError};
use self::run::{Order, Told};
use self::state::waiting;
use self::stop::Stop;
use super::backoff::BackOff;
use super::containers;
use super::context::Context;
use super::environment::Missing;
use super::events::Kind;
use super::outcome::Outcome;
use super::probe::{Probes, Report, Tally};
use super::publisher::Publisher;
use super::record::Record;
use super::session::RunHandle;
use super::status::State;
use super::volumes::keeper::Keeper;
use crate::container::{ContainerId, Supervisor};

/// Commands that may wait for a worker. The manager only ever sends the newest copy of a pod.
const COMMANDS: usize = 16;

/// Events of a pod's containers that may wait; a supervisor waits for room.
const TOLD: usize = 64;

/// What probes have found out that may wait; a probe waits for room.
const REPORTS: usize = 64;

/// A start that takes longer than this is announced as ContainerCreating; a quicker one saves the API server a write.
const ANNOUNCE_AFTER: Duration = Duration::from_millis(100);

/// First wait for an object that a pod needs and that is not there; doubled up to [`PREPARE_MOST`].
const PREPARE_FIRST: Duration = Duration::from_millis(500);

/// Longest wait between looks for a missing object: one small read by each waiting pod.
const PREPARE_MOST: Duration = Duration::from_secs(5);

/// The grace of a pod whose object is gone (pod_workers.go, calculateEffectiveGracePeriod: at least a second). Its programs
/// have `run::LEAST_GRACE` all the same.
const FORCED_GRACE: Duration = Duration::from_secs(1);

/// terminationGracePeriodSeconds when a pod names none (core/v1 default).
const DEFAULT_GRACE: Duration = Duration::from_secs(30);

/// Ten years: longer than any allocation. The API server sets no upper bound on terminationGracePeriodSeconds, and a
/// moment so far ahead cannot be told.
const GRACE_MOST: Duration = Duration::from_secs(10 * 366 * 24 * 3600);

/// Waits between tries to delete a pod that has ended.
pub(super) const DELETE_RETRY: Duration = Duration::from_secs(2);

/// What the manager tells a worker.
#[derive(Debug)]
pub enum Command {
    /// The pod as it is now.
    Update(Box<Pod>),
    /// The pod's object is gone.
    Gone,
    /// The job's memory runs short, and this pod gives way: what it is told.
    Evict(String),
    /// The allocation ends: containers are given this long, then killed.
    Shutdown(Duration),
}

/// What a worker tells the manager.
#[derive(Debug)]
pub enum Note {
    /// The pod has ended: what it held is free. Its outcome is not reported yet.
    Ended(String, Box<Outcome>),
    /// The final status is acknowledged, or will never be (false).
    Reported(String, Box<Outcome>),
    /// The pod is gone and nothing of it is left but its logs; its outcome tells where they are.
    Finished(String, Option<Box<Outcome>>),
}

/// How a worker begins.
pub enum Start {
    /// A pod that was just admitted.
    Fresh,
    /// A pod of before a crash, with the supervisors that are still there.
    Resumed(Vec<(ContainerId, Supervisor)>),
}

/// Starts the worker of a pod.
#[must_use]
pub fn spawn(
    context: Arc<Context>,
    record: Record,
    start: Start,
    notes: mpsc::Sender<Note>,
) -> mpsc::Sender<Command> {
    let (commands_tx, commands) = mpsc::channel(COMMANDS);
    let worker = Worker::new(context, record, commands, notes);
    tokio::spawn(worker.run(start));
    commands_tx
}

struct Container {
    name: String,
    kind: containers::Kind,
    run: Option<mpsc::Sender<Order>>,
    /// By which others join that run.
    handle: Option<RunHandle>,
    /// A supervisor that was started while the pod was being prepared.
    supervisor: Option<Supervisor>,
    restart_at: Option<Instant>,
    /// It cannot start as the pod is: nothing but a change of the pod mends that.
    stuck: bool,
    back_off: BackOff,
    probes: Probes,
    /// How the probes of all its runs went.
    probed: Arc<Tally>,
}

impl Container {
    fn new(name: &str, kind: containers::Kind, context: &Context) -> Self {
        Self {
            name: name.to_owned(),
            kind,
            run: None,
            handle: None,
            supervisor: None,
            restart_at: None,
            stuck: false,
            back_off: BackOff::new(context.policy.back_off_max),
            probes: Probes::none(),
            probed: Arc::default(),
        }
    }
}

type Preparing = tokio::task::JoinHandle<Attempt>;

struct Worker {
    context: Arc<Context>,
    record: Record,
    containers: Vec<Container>,
    commands: mpsc::Receiver<Command>,
    notes: mpsc::Sender<Note>,
    told_tx: mpsc::Sender<Told>,
    told: mpsc::Receiver<Told>,
    reports_tx: mpsc::Sender<Report>,
    reports: mpsc::Receiver<Report>,
    publisher: Publisher,
    keeper: Keeper,
    stop: Option<Stop>,
    preparing: Option<Preparing>,
    /// The pod has changed since that began.
    outdated: bool,
    /// A preparation has just begun: supervisors may be started meanwhile.
    eager: bool,
    prepare_at: Option<Instant>,
    /// The pod cannot be prepared as it is now.
    stuck: bool,
    prepare_delay: Duration,
    announce_at: Option<Instant>,
    delete_at: Option<Instant>,
    /// When `activeDeadlineSeconds` are over.
    deadline_at: Option<Instant>,
    complaint: Option<String>,
    /// What was told of as missing: at most what the pod's environments name.
    told_missing: BTreeSet<Missing>,
    ended: bool,
    /// The manager knows that it has ended.
    ended_told: bool,
    reported: bool,
}

impl Worker {
    fn new(
        context: Arc<Context>,
        record: Record,
        commands: mpsc::Receiver<Command>,
        notes: mpsc::Sender<Note>,
    ) -> Self {
        let (told_tx, told) = mpsc::channel(TOLD);
        let (reports_tx, reports) = mpsc::channel(REPORTS);
        let publisher = Publisher::spawn(context.api.clone(), record.pod.clone(), context.draining.clone());
        let containers: Vec<Container> =
            containers::of(&record.pod).map(|(kind, c)| Container::new(&c.name, kind, &context)).collect();
        Self {
            context,
            record,
            containers,
            commands,
            notes,
            told_tx,
            told,
            reports_tx,
            reports,
            publisher,
            keeper: Keeper::default(),
            stop: None,
            preparing: None,
            outdated: false,
            eager: false,
            prepare_at: None,
            stuck: false,
            prepare_delay: PREPARE_FIRST,
            announce_at: None,
            delete_at: None,
            deadline_at: None,
            complaint: None,
            told_missing: BTreeSet::new(),
            ended: false,
            ended_told: false,
            reported: false,
        }
    }

    async fn run(mut self, start: Start) {
        self.begin(start);
        loop {
            if std::mem::take(&mut self.eager) && self.stop.is_none() {
                // The reads are on their way before this thread spends a millisecond on processes: both take about as
                // long.
                tokio::task::yield_now().await;
                self.spawn_supervisors();
            }
            self.settle().await;
            if self.is_finished() {
                break;
            }
            let wake = self.wake_at();
            tokio::select! {
                biased;
                command = self.commands.recv() => match command {
                    Some(command) => self.on_command(command),
                    // The pilot is leaving; supervisors end their containers when it is gone.
                    None => return,
                },
                Some(told) = self.told.recv() => self.on_told(told),
                Some(report) = self.reports.recv() => self.on_report(report),
                attempt = join(&mut self.preparing) => self.on_prepared(attempt),
                () = self.publisher.changed() => {}
                found = self.keeper.found() => self.on_found(found),
                () = sleep_until(wake) => self.on_wake(Instant::now()).await,
            }
        }
        self.context.roster.remove(self.record.uid());
        self.keeper.end(&self.record.pod).await;
        let outcome = self.clear_away().await.map(Box::new);
        let _ = self.notes.send(Note::Finished(self.record.uid().to_owned(), outcome)).await;
    }

    /// No container runs and none will start.
    fn all_still(&self) -> bool {
        self.preparing.is_none() && self.containers.iter().all(|c| c.run.is_none() && c.restart_at.is_none())
    }

    fn is_finished(&self) -> bool {
        self.all_still() && self.stop.as_ref().is_some_and(|stop| stop.gone)
            || self.reported && self.publisher.state().gone
    }

    fn has_waiting(&self) -> bool {
        self.record.containers.values().any(|c| matches!(c.state, State::Waiting { .. }))
    }

    fn set_waiting(&mut self, name: &str, reason: &str, message: &str) {
        if let Some(record) = self.record.containers.get_mut(name) {
            record.state = waiting(reason, message);
        }
    }

    /// An event for what keeps the pod waiting, once for each different complaint.
    fn complain(&mut self, reason: &str, message: &str) {
        if self.complaint.as_deref() == Some(message) {
            return;
        }
        self.complaint = Some(message.to_owned());
        self.context.events.record(&self.record.pod, None, Kind::Warning, reason, message);
    }

    fn save(&self) {
        if let Err(error) = self.context.records.save(&self.record) {
            tracing::warn!(uid = self.record.uid(), %error, "the pod's record could not be written");
        }
    }

    fn wake_at(&self) -> Option<Instant> {
        let timers = [self.announce_at, self.prepare_at, self.delete_at, self.deadline_at];
        let restarts = self.containers.iter().map(|c| c.restart_at);
        timers.into_iter().chain(restarts).flatten().min()
    }
}

/// The grace that a deletion leaves: the API server's own count, else the pod's.
fn deletion_grace(pod: &Pod) -> Duration {
    grace(pod.metadata.deletion_grace_period_seconds).max(FORCED_GRACE)
}

/// The grace that the pod asks for.
fn own_grace(pod: &Pod) -> Duration {
    grace(pod.spec.as_ref().and_then(|spec| spec.termination_grace_period_seconds))
}

fn grace(seconds: Option<i64>) -> Duration {
    let seconds = seconds.map(|s| u64::try_from(s).unwrap_or(0));
    seconds.map_or(DEFAULT_GRACE, Duration::from_secs).min(GRACE_MOST)
}

async fn join(preparing: &mut Option<Preparing>) -> Attempt {
    match preparing {
        Some(handle) => handle.await.unwrap_or_else(|error| Attempt {
            directory: None,
            result: Err(PrepareError::Aborted(error.to_string())),
        }),
        None => std::future::pending().await,
    }
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_grace_without_end_is_still_a_moment_that_can_be_told() {
        let seconds = |seconds| grace(seconds).as_secs();
        assert_eq!([seconds(None), seconds(Some(0)), seconds(Some(-5)), seconds(Some(90))], [30, 0, 0, 90]);
        assert_eq!(grace(Some(i64::MAX)), GRACE_MOST);
        assert!(Instant::now().checked_add(GRACE_MOST).is_some());
        let mut pod = Pod::default();
        pod.metadata.deletion_grace_period_seconds = Some(0);
        assert_eq!(deletion_grace(&pod), FORCED_GRACE);
        pod.metadata.deletion_grace_period_seconds = Some(i64::MAX);
        assert_eq!(deletion_grace(&pod), GRACE_MOST);
    }
}
