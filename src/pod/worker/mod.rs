//! One pod's life on this Node: prepared, run, restarted, ended, reported, removed.
//!
//! [`spawn`] starts a worker; [`Command`]s come from the manager, [`Note`]s go back to it. The worker is one loop: it
//! waits for whatever comes next, changes its containers' states, and publishes the status that follows from them.

mod prepare;
mod run;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Pod, PodStatus};
use tokio::sync::mpsc;
use tokio::time::Instant;

use self::prepare::{PrepareError, Prepared};
use self::run::{Order, Told};
use super::backoff::{self, BackOff, Next};
use super::context::Context;
use super::directory;
use super::events::Kind;
use super::outcome::Outcome;
use super::publisher::Publisher;
use super::record::{ContainerRecord, Record};
use super::status::{self, ContainerRuntime, Ending, State, StatusInput, Terminated, container_id};
use crate::container::{ContainerId, ContainerSpec, End, Event, Supervisor};

/// Commands that may wait for a worker. The manager only ever sends the newest copy of a pod.
const COMMANDS: usize = 16;

/// Events of a pod's containers that may wait; a supervisor waits for room.
const TOLD: usize = 64;

/// A start that takes longer than this is announced as ContainerCreating; a quicker one saves the API server a write.
const ANNOUNCE_AFTER: Duration = Duration::from_millis(100);

/// First wait for an object that a pod needs and that is not there; doubled up to [`PREPARE_MOST`].
const PREPARE_FIRST: Duration = Duration::from_millis(500);

/// Longest wait between looks for a missing object: one small read by each waiting pod.
const PREPARE_MOST: Duration = Duration::from_secs(5);

/// kubelet gives a forced deletion at least a second (kuberuntime_container.go, minimumGracePeriodInSeconds is 2; the
/// pod workers' own least is 1).
const FORCED_GRACE: Duration = Duration::from_secs(1);

/// terminationGracePeriodSeconds when a pod names none (core/v1 default).
const DEFAULT_GRACE: Duration = Duration::from_secs(30);

/// Waits between tries to delete a pod that has ended.
const DELETE_RETRY: Duration = Duration::from_secs(2);

/// What the manager tells a worker.
#[derive(Debug)]
pub enum Command {
    /// The pod as it is now.
    Update(Box<Pod>),
    /// The pod's object is gone.
    Gone,
    /// The allocation ends: containers are given this long, then killed.
    Shutdown(Duration),
}

/// What a worker tells the manager.
#[derive(Debug)]
pub enum Note {
    /// The pod has ended: what it held is free.
    Ended(String),
    /// The final status is acknowledged, or will never be (false).
    Reported(String, Box<Outcome>),
    /// The pod is gone and nothing of it is left.
    Finished(String),
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

/// Why a pod is being stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Why {
    /// Somebody deleted it.
    Deleted,
    /// Its object is gone.
    Gone,
    /// The allocation ends.
    Shutdown,
}

struct Stop {
    why: Why,
    kill_at: Instant,
}

struct Container {
    name: String,
    run: Option<mpsc::Sender<Order>>,
    restart_at: Option<Instant>,
    back_off: BackOff,
}

type Preparing = tokio::task::JoinHandle<Result<Prepared, PrepareError>>;

struct Worker {
    context: Arc<Context>,
    record: Record,
    containers: Vec<Container>,
    commands: mpsc::Receiver<Command>,
    notes: mpsc::Sender<Note>,
    told_tx: mpsc::Sender<Told>,
    told: mpsc::Receiver<Told>,
    publisher: Publisher,
    stop: Option<Stop>,
    preparing: Option<Preparing>,
    prepared: Option<Prepared>,
    /// Supervisors that were started while the pod was being prepared.
    ready: Vec<Option<Supervisor>>,
    prepare_at: Option<Instant>,
    prepare_delay: Duration,
    announce_at: Option<Instant>,
    delete_at: Option<Instant>,
    complaint: Option<String>,
    ended: bool,
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
        let publisher = Publisher::spawn(context.api.clone(), record.pod.clone(), context.draining.clone());
        let spec = record.pod.spec.clone().unwrap_or_default();
        let containers: Vec<Container> = spec
            .containers
            .iter()
            .map(|c| Container {
                name: c.name.clone(),
                run: None,
                restart_at: None,
                back_off: BackOff::default(),
            })
            .collect();
        let ready = containers.iter().map(|_| None).collect();
        Self {
            context,
            record,
            containers,
            commands,
            notes,
            told_tx,
            told,
            publisher,
            stop: None,
            preparing: None,
            prepared: None,
            ready,
            prepare_at: None,
            prepare_delay: PREPARE_FIRST,
            announce_at: None,
            delete_at: None,
            complaint: None,
            ended: false,
            reported: false,
        }
    }

    async fn run(mut self, start: Start) {
        let fresh = matches!(start, Start::Fresh);
        self.begin(start);
        if fresh && self.stop.is_none() {
            // The reads are on their way before this thread spends a millisecond on processes: both take about as long.
            tokio::task::yield_now().await;
            for index in 0..self.containers.len() {
                self.ready[index] = self.spawn_supervisor(index);
            }
        }
        loop {
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
                result = join(&mut self.preparing) => self.on_prepared(result),
                () = self.publisher.changed() => {}
                () = sleep_until(wake) => self.on_wake(Instant::now()).await,
            }
        }
        self.clear_away().await;
        let _ = self.notes.send(Note::Finished(self.record.uid().to_owned())).await;
    }

    // ---- beginning -------------------------------------------------------------------------------------------

    fn begin(&mut self, start: Start) {
        let names: Vec<String> = self.containers.iter().map(|c| c.name.clone()).collect();
        for name in names {
            self.record.containers.entry(name).or_default();
        }
        match start {
            Start::Fresh => {
                self.announce_at = Some(Instant::now() + ANNOUNCE_AFTER);
                self.prepare();
            }
            Start::Resumed(supervisors) => self.resume(supervisors),
        }
        if self.record.pod.metadata.deletion_timestamp.is_some() {
            self.stop_for(Why::Deleted, deletion_grace(&self.record.pod));
        }
    }

    /// Takes up a pod of before the crash: what still has a supervisor goes on, what lost it is lost.
    fn resume(&mut self, supervisors: Vec<(ContainerId, Supervisor)>) {
        for (id, supervisor) in supervisors {
            let index = self.containers.iter().position(|c| c.name == id.name);
            let current = self.record.containers.get(&id.name).map(|c| c.restart);
            match index {
                Some(index) if current == Some(id.restart) => self.follow(index, supervisor, None),
                // A run that was already over when the pilot crashed; dropping the supervisor ends it.
                _ => tracing::debug!(container = %id, "a supervisor of an earlier run is let go"),
            }
        }
        let uid = self.record.uid().to_owned();
        let mut unprepared = false;
        for index in 0..self.containers.len() {
            let container = &self.containers[index];
            let Some(record) = self.record.containers.get_mut(&container.name) else { continue };
            if container.run.is_some() || is_over(&record.state) {
                continue;
            }
            if record.launched {
                let message = "the container's supervisor was gone when the pilot came back after a crash";
                let id = container_id(&uid, &container.name, record.restart);
                record.state = unknown_end("ContainerStatusUnknown", message, record, id);
                record.launched = false;
                self.after_end(index);
            } else {
                unprepared = true;
            }
        }
        if unprepared && self.record.last_status.is_none() {
            self.prepare();
        }
        for index in 0..self.containers.len() {
            let container = &self.containers[index];
            let state = self.record.containers.get(&container.name).map(|c| &c.state);
            if container.run.is_none() && container.restart_at.is_none() && state.is_some_and(is_over) {
                self.after_end(index);
            }
        }
    }

    /// Starts the reading of the pod's objects, its directory and volumes.
    fn prepare(&mut self) {
        self.prepare_at = None;
        let context = Arc::clone(&self.context);
        let pod = self.record.pod.clone();
        let directory = self.record.directory.clone();
        self.preparing = Some(tokio::spawn(async move { prepare::prepare(&context, &pod, directory).await }));
    }

    fn spawn_supervisor(&mut self, index: usize) -> Option<Supervisor> {
        let name = &self.containers[index].name;
        let restart = self.record.containers.get(name).map_or(0, |c| c.restart);
        let id = ContainerId { pod_uid: self.record.uid().to_owned(), name: name.clone(), restart };
        match self.context.supervisors.spawn(id) {
            Ok(supervisor) => Some(supervisor),
            Err(error) => {
                self.complain("FailedCreate", &format!("no supervisor could be started: {error}"));
                None
            }
        }
    }

    // ---- what happens ----------------------------------------------------------------------------------------

    fn on_command(&mut self, command: Command) {
        match command {
            Command::Update(pod) => {
                let image_changed = images(&self.record.pod) != images(&pod);
                self.record.pod = *pod;
                if self.record.pod.metadata.deletion_timestamp.is_some() {
                    self.stop_for(Why::Deleted, deletion_grace(&self.record.pod));
                } else if image_changed && self.stop.is_none() && self.has_waiting() {
                    self.prepare();
                }
            }
            Command::Gone => self.stop_for(Why::Gone, FORCED_GRACE),
            Command::Shutdown(grace) => {
                let own = self.record.pod.spec.as_ref().and_then(|s| s.termination_grace_period_seconds);
                let own = own.map_or(DEFAULT_GRACE, |s| Duration::from_secs(u64::try_from(s).unwrap_or(0)));
                self.stop_for(Why::Shutdown, grace.min(own));
            }
        }
    }

    fn on_prepared(&mut self, result: Result<Prepared, PrepareError>) {
        self.preparing = None;
        if self.stop.is_some() {
            return;
        }
        match result {
            Ok(prepared) => {
                self.complaint = None;
                self.prepare_delay = PREPARE_FIRST;
                self.record.directory = Some(prepared.directory.clone());
                for note in &prepared.notes {
                    self.context.events.record(
                        &self.record.pod,
                        None,
                        Kind::Warning,
                        "FailedToRetrieveToken",
                        note,
                    );
                }
                self.prepared = Some(prepared);
                for index in 0..self.containers.len() {
                    let name = &self.containers[index].name;
                    let waits = self.record.containers.get(name).is_some_and(|c| !is_over(&c.state));
                    if waits
                        && self.containers[index].run.is_none()
                        && self.containers[index].restart_at.is_none()
                    {
                        self.start(index);
                    }
                }
            }
            Err(error) => {
                // A supervisor without work would only hold memory.
                self.ready.iter_mut().for_each(|ready| *ready = None);
                self.complain(error.reason(), &error.to_string());
                for container in self.record.containers.values_mut() {
                    if !container.launched && !is_over(&container.state) && container.restart == 0 {
                        // kubelet says why in an event, and leaves the container's own message empty.
                        container.state = waiting("ContainerCreating", "");
                    }
                }
                self.announce_at = None;
                self.prepare_at = Some(Instant::now() + self.prepare_delay);
                self.prepare_delay = (self.prepare_delay * 2).min(PREPARE_MOST);
            }
        }
    }

    /// Starts the run that the record names; what it needs is prepared.
    fn start(&mut self, index: usize) {
        let name = self.containers[index].name.clone();
        let Some(prepared) = &self.prepared else { return };
        let restart = self.record.containers.get(&name).map_or(0, |c| c.restart);
        let spec = match prepare::spec(&self.context, &self.record.pod, index, restart, prepared) {
            Ok(spec) => spec,
            Err(error) => {
                self.ready[index] = None;
                self.complain("Failed", &format!("Error: {error}"));
                self.set_waiting(&name, error.reason(), &error.to_string());
                self.announce_at = None;
                if error.may_pass() {
                    self.prepare_at = Some(Instant::now() + self.prepare_delay);
                    self.prepare_delay = (self.prepare_delay * 2).min(PREPARE_MOST);
                }
                return;
            }
        };
        let Some(supervisor) = self.ready[index].take().or_else(|| self.spawn_supervisor(index)) else {
            self.set_waiting(&name, "CreateContainerError", "no supervisor could be started");
            self.prepare_at = Some(Instant::now() + self.prepare_delay);
            self.prepare_delay = (self.prepare_delay * 2).min(PREPARE_MOST);
            return;
        };
        if let Some(record) = self.record.containers.get_mut(&name) {
            record.launched = true;
            record.log_lines_lost = 0;
        }
        if let Err(error) = self.context.records.save(&self.record) {
            // What is not recorded must not start: after a crash nobody would know of it.
            let message = format!("the pilot's state cannot be written: {error}; make room in --state-dir");
            if let Some(record) = self.record.containers.get_mut(&name) {
                record.launched = false;
            }
            self.complain("FailedCreate", &message);
            self.set_waiting(&name, "CreateContainerError", &message);
            self.prepare_at = Some(Instant::now() + PREPARE_MOST);
            return;
        }
        self.follow(index, supervisor, Some(spec));
    }

    fn follow(&mut self, index: usize, supervisor: Supervisor, spec: Option<ContainerSpec>) {
        let name = self.containers[index].name.clone();
        let restart = self.record.containers.get(&name).map_or(0, |c| c.restart);
        let pod = self.record.pod.metadata.name.clone().unwrap_or_default();
        let told = self.told_tx.clone();
        let orders =
            run::follow(Arc::clone(&self.context), supervisor, (index, restart), (pod, name), spec, told);
        self.containers[index].run = Some(orders);
    }

    fn on_told(&mut self, (index, restart, event): Told) {
        let name = self.containers[index].name.clone();
        let id = container_id(self.record.uid(), &name, restart);
        let Some(record) = self.record.containers.get_mut(&name) else { return };
        if record.restart != restart {
            return;
        }
        let (state, kind, reason, message) = match event {
            Event::Started { at, .. } => {
                record.state = State::Running { started_at: timestamp(at), id };
                self.announce_at = None;
                let message = format!("Started container {name}");
                self.context.events.record(&self.record.pod, Some(&name), Kind::Normal, "Started", &message);
                return;
            }
            Event::Ended(end) => {
                record.log_lines_lost = end.log_lines_lost;
                let why =
                    end.log_error.clone().unwrap_or_else(|| "the file system did not answer".to_owned());
                let lost =
                    format!("{} lines of the log of container {name} were lost: {why}", end.log_lines_lost);
                (
                    State::Terminated(terminated(&end, id)),
                    Kind::Warning,
                    "LogLinesLost",
                    Some(lost).filter(|_| end.log_lines_lost > 0),
                )
            }
            Event::StartFailed(error) => {
                let mut state = unknown_end("StartError", &error.to_string(), record, id);
                if let State::Terminated(ended) = &mut state {
                    ended.exit_code = error.exit_code();
                }
                (state, Kind::Warning, "Failed", Some(format!("Error: {error}")))
            }
            Event::Lost { message } => (
                unknown_end("SupervisorLost", &message, record, id),
                Kind::Warning,
                "SupervisorLost",
                Some(message),
            ),
            Event::Output { .. } => return,
        };
        record.state = state;
        if let Some(message) = message {
            self.context.events.record(&self.record.pod, Some(&name), kind, reason, &message);
        }
        let Some(record) = self.record.containers.get_mut(&name) else { return };
        record.launched = false;
        self.announce_at = None;
        let acknowledge = self.containers[index].run.take();
        self.after_end(index);
        self.publish();
        self.save();
        if let Some(orders) = acknowledge {
            let _ = orders.try_send(Order::Acknowledge);
        }
    }

    /// What follows from a container's end: nothing, or a restart now or later.
    fn after_end(&mut self, index: usize) {
        if self.stop.is_some() || self.record.last_status.is_some() {
            return;
        }
        let container = &mut self.containers[index];
        let Some(record) = self.record.containers.get_mut(&container.name) else { return };
        let State::Terminated(end) = record.state.clone() else { return };
        let spec = self.record.pod.spec.as_ref();
        let again = spec.is_some_and(|spec| {
            spec.containers
                .get(index)
                .is_some_and(|container| status::should_restart(spec, container, end.exit_code))
        });
        if !again {
            return;
        }
        let Next::Wait { wait, until } = container.back_off.next(end.finished_at, Timestamp::now()) else {
            container.restart_at = Some(Instant::now());
            return;
        };
        let delay = Duration::try_from(until.duration_since(Timestamp::now())).unwrap_or_default();
        container.restart_at = Some(Instant::now() + delay);
        let part = |text: &Option<String>| text.clone().unwrap_or_default();
        let meta = &self.record.pod.metadata;
        let (pod, namespace, uid) = (part(&meta.name), part(&meta.namespace), part(&meta.uid));
        let message = backoff::message(wait, &container.name, &pod, &namespace, &uid);
        record.last = Some(end);
        record.state = waiting("CrashLoopBackOff", &message);
        let text = format!(
            "Back-off restarting failed container {} in pod {pod}_{namespace}({uid})",
            container.name
        );
        self.context.events.record(&self.record.pod, Some(&container.name), Kind::Warning, "BackOff", &text);
    }

    async fn on_wake(&mut self, now: Instant) {
        if self.announce_at.is_some_and(|at| at <= now) {
            self.announce_at = None;
        }
        if self.prepare_at.is_some_and(|at| at <= now) && self.preparing.is_none() {
            self.prepare();
        }
        let due: Vec<usize> = (0..self.containers.len())
            .filter(|i| self.containers[*i].restart_at.is_some_and(|at| at <= now))
            .collect();
        for index in due {
            self.containers[index].restart_at = None;
            // This start counts for the next wait.
            let name = self.containers[index].name.clone();
            if let Some(record) = self.record.containers.get_mut(&name) {
                let last = record.last.as_ref().map(|end| end.finished_at);
                if !is_over(&record.state) {
                    let _ = self.containers[index]
                        .back_off
                        .next(last.unwrap_or(Timestamp::now()), Timestamp::now());
                }
                if let State::Terminated(end) = &record.state {
                    record.last = Some(end.clone());
                    record.state = waiting("ContainerCreating", "");
                }
                record.restart += 1;
            }
            // Secrets and ConfigMaps may have changed since; a kubelet reads them anew too.
            if self.preparing.is_none() {
                self.prepare();
            }
        }
        if self.delete_at.is_some_and(|at| at <= now) {
            self.delete().await;
        }
    }

    // ---- stopping --------------------------------------------------------------------------------------------

    fn stop_for(&mut self, why: Why, grace: Duration) {
        let kill_at = Instant::now() + grace;
        let first = self.stop.is_none();
        let stop = self.stop.get_or_insert(Stop { why, kill_at });
        let shorter = kill_at < stop.kill_at;
        stop.kill_at = stop.kill_at.min(kill_at);
        if why == Why::Gone {
            stop.why = Why::Gone;
        }
        if !first && !shorter {
            return;
        }
        self.preparing = None;
        self.prepare_at = None;
        self.announce_at = None;
        self.ready.iter_mut().for_each(|ready| *ready = None);
        for container in &mut self.containers {
            container.restart_at = None;
            if let Some(orders) = &container.run {
                // The channel holds more orders than a pod's life gives; one that is full has its Terminate already.
                let _ = orders.try_send(Order::Terminate(grace));
                if first {
                    let text = format!("Stopping container {}", container.name);
                    let name = Some(container.name.as_str());
                    self.context.events.record(&self.record.pod, name, Kind::Normal, "Killing", &text);
                }
            }
        }
    }

    // ---- status ----------------------------------------------------------------------------------------------

    fn status(&self) -> PodStatus {
        let ending = match &self.stop {
            Some(stop) if stop.why == Why::Shutdown && self.all_still() => Some(Ending::NodeShutdown),
            Some(_) if self.all_still() => Some(Ending::Deleted),
            _ => None,
        };
        let containers: Vec<ContainerRuntime> = self
            .containers
            .iter()
            .map(|container| {
                let record = self.record.containers.get(&container.name).cloned().unwrap_or_default();
                ContainerRuntime {
                    name: container.name.clone(),
                    state: record.state,
                    last: record.last,
                    restart_count: record.restart,
                    image_id: String::new(),
                }
            })
            .collect();
        let unknown = PodStatus::default();
        let previous = self.record.last_status.as_ref().or(self.record.pod.status.as_ref());
        status::status(&StatusInput {
            pod: &self.record.pod,
            previous: previous.unwrap_or(&unknown),
            containers: &containers,
            pod_ip: Some(&self.context.identity.ip),
            host_ip: Some(&self.context.identity.ip),
            start_time: self.record.admitted,
            directory_ready: self.record.directory.is_some(),
            ending: ending.as_ref(),
            now: Timestamp::now(),
        })
    }

    fn publish(&mut self) {
        if self.stop.as_ref().is_some_and(|stop| stop.why == Why::Gone) || self.announce_at.is_some() {
            return;
        }
        let status = self.status();
        let terminal = matches!(status.phase.as_deref(), Some("Succeeded" | "Failed"));
        if terminal && !self.ended {
            self.ended = true;
            self.record.last_status = Some(status.clone());
            let _ = self.notes.try_send(Note::Ended(self.record.uid().to_owned()));
        }
        self.publisher.publish(status);
    }

    /// Publishes, and takes the steps that only wait for the API server's word.
    async fn settle(&mut self) {
        let before = self.ended;
        self.publish();
        if self.ended && !before {
            self.save();
        }
        let answer = self.publisher.state();
        if self.ended
            && !self.reported
            && (self.publisher.is_acknowledged() || answer.gone || answer.refused.is_some())
        {
            self.reported = true;
            self.report(self.publisher.is_acknowledged() && answer.refused.is_none()).await;
        }
        let deleted = self.record.pod.metadata.deletion_timestamp.is_some();
        if self.reported
            && deleted
            && self.delete_at.is_none()
            && self.stop.as_ref().is_none_or(|s| s.why != Why::Gone)
        {
            self.delete().await;
        }
    }

    async fn report(&self, acknowledged: bool) {
        let outcome = self.outcome(acknowledged);
        let _ = self.notes.send(Note::Reported(self.record.uid().to_owned(), Box::new(outcome))).await;
    }

    fn outcome(&self, reported: bool) -> Outcome {
        let status = self.record.last_status.clone().unwrap_or_else(|| self.status());
        Outcome::new(&self.record.pod, &status, reported, |name| {
            let record = self.record.containers.get(name).cloned().unwrap_or_default();
            let log = self.record.directory.as_ref().map_or_else(PathBuf::new, |directory| {
                directory.join("containers").join(name).join("logs").join(format!("{}.log", record.restart))
            });
            (log, record.log_lines_lost)
        })
    }

    async fn delete(&mut self) {
        let part = |text: &Option<String>| text.clone().unwrap_or_default();
        let meta = &self.record.pod.metadata;
        let (namespace, name, uid) = (part(&meta.namespace), part(&meta.name), part(&meta.uid));
        self.delete_at = Some(Instant::now() + DELETE_RETRY);
        if let Err(error) = self.context.api.delete(&namespace, &name, &uid).await {
            tracing::warn!(pod = name, namespace, %error, "the pod has ended but could not be deleted; it is tried again");
        }
    }

    async fn clear_away(&mut self) {
        if let Some(found) = self.record.directory.clone() {
            let uid = self.record.uid().to_owned();
            let kept = self.context.places.kept.clone();
            let path = found.clone();
            let removed = tokio::task::spawn_blocking(move || directory::remove(&path, &uid, &kept)).await;
            if let Ok(Err(error)) = removed {
                tracing::warn!(path = %found.display(), %error, "the directory of a pod that is gone could not be removed");
            }
        }
        self.context.records.remove(self.record.uid());
    }

    // ---- small things ----------------------------------------------------------------------------------------

    /// No container runs and none will start.
    fn all_still(&self) -> bool {
        self.preparing.is_none() && self.containers.iter().all(|c| c.run.is_none() && c.restart_at.is_none())
    }

    fn is_finished(&self) -> bool {
        self.all_still() && self.stop.as_ref().is_some_and(|stop| stop.why == Why::Gone)
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
        let timers = [self.announce_at, self.prepare_at, self.delete_at];
        let restarts = self.containers.iter().map(|c| c.restart_at);
        timers.into_iter().chain(restarts).flatten().min()
    }
}

fn images(pod: &Pod) -> Vec<Option<String>> {
    pod.spec.iter().flat_map(|s| s.containers.iter().map(|c| c.image.clone())).collect()
}

/// The grace that a deletion leaves: the API server's own count, else the pod's.
fn deletion_grace(pod: &Pod) -> Duration {
    let seconds = pod.metadata.deletion_grace_period_seconds.map(|s| u64::try_from(s).unwrap_or(0));
    seconds.map_or(DEFAULT_GRACE, Duration::from_secs).max(FORCED_GRACE)
}

fn waiting(reason: &str, message: &str) -> State {
    State::Waiting { reason: reason.to_owned(), message: message.to_owned() }
}

fn is_over(state: &State) -> bool {
    matches!(state, State::Terminated(_))
}

fn timestamp(at: SystemTime) -> Timestamp {
    Timestamp::try_from(at).unwrap_or_else(|_| Timestamp::now())
}

fn terminated(end: &End, id: String) -> Terminated {
    let message = if end.survivors.is_empty() {
        String::new()
    } else {
        format!("processes in uninterruptible sleep could not be ended: {}", end.survivors.join(", "))
    };
    Terminated {
        exit_code: end.exit_code,
        signal: end.signal,
        reason: None,
        message,
        started_at: Some(timestamp(end.started_at)),
        finished_at: timestamp(end.finished_at),
        id,
    }
}

/// The end of a run of which nobody saw the end: it began when it was last seen to run.
fn unknown_end(reason: &str, message: &str, record: &ContainerRecord, id: String) -> State {
    let started_at = match &record.state {
        State::Running { started_at, .. } => Some(*started_at),
        State::Waiting { .. } | State::Terminated(_) => None,
    };
    State::Terminated(Terminated {
        exit_code: 137,
        signal: None,
        reason: Some(reason.to_owned()),
        message: message.to_owned(),
        started_at,
        finished_at: Timestamp::now(),
        id,
    })
}

async fn join(preparing: &mut Option<Preparing>) -> Result<Prepared, PrepareError> {
    match preparing {
        Some(handle) => match handle.await {
            Ok(result) => result,
            Err(error) => Err(PrepareError::Aborted(error.to_string())),
        },
        None => std::future::pending().await,
    }
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}
