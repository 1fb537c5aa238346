//! The beginning of a pod's containers: at first, after a crash of the pilot, and again after an end.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use std::{fs, io};

use jiff::Timestamp;
use tokio::time::Instant;

use super::prepare::{self, Attempt, Prepared};
use super::run::Order;
use super::state::{is_over, unknown_end, waiting};
use super::stop::{Stop, Why};
use super::termination::LastWord;
use super::{ANNOUNCE_AFTER, PREPARE_FIRST, PREPARE_MOST, Start, Worker, deletion_grace, own_grace};
use super::{order, run, spec};
use crate::container::{ContainerId, ContainerSpec, Supervisor};
use crate::pod::backoff;
use crate::pod::containers::{self, Kind};
use crate::pod::directory;
use crate::pod::environment::Skipped;
use crate::pod::events;
use crate::pod::handler::Hook;
use crate::pod::record::ContainerRecord;
use crate::pod::status::{State, container_id};

impl Worker {
    pub(super) fn begin(&mut self, start: Start) {
        self.enter_records();
        self.count_deadline();
        match start {
            Start::Fresh => {
                self.announce_at = Some(Instant::now() + ANNOUNCE_AFTER);
                self.prepare();
            }
            Start::Resumed(supervisors) => {
                let ending = self.record.ending.clone();
                let (stops, grace) = (ending.is_some(), own_grace(&self.record.pod));
                if stops {
                    self.stop = Some(Stop { gone: false, ending, kill_at: Instant::now() + grace });
                }
                self.resume(supervisors);
                if stops {
                    self.end_runs(grace, false);
                }
            }
        }
        if self.record.pod.metadata.deletion_timestamp.is_some() {
            self.stop_for(Why::Deleted, deletion_grace(&self.record.pod));
        }
    }

    /// Gives each container a record, the first time that it is seen.
    pub(super) fn enter_records(&mut self) {
        let has_init = self.containers.iter().any(|c| matches!(c.kind, Kind::Init | Kind::Sidecar));
        for container in &self.containers {
            self.record.containers.entry(container.name.clone()).or_insert_with(|| {
                let mut record = ContainerRecord::default();
                // kubelet_pods.go, convertToAPIContainerStatuses: the default of all but ephemeral containers.
                if has_init && container.kind != Kind::Ephemeral {
                    record.state = waiting("PodInitializing", "");
                }
                record
            });
        }
    }

    /// Takes up a pod of before the crash: what still has a supervisor goes on, what lost it is lost.
    pub(super) fn resume(&mut self, supervisors: Vec<(ContainerId, Supervisor)>) {
        for (id, supervisor) in supervisors {
            let index = self.containers.iter().position(|c| c.name == id.name);
            let current = self.record.containers.get(&id.name).map(|c| c.restart);
            match index {
                Some(index) if current == Some(id.restart) => self.follow(index, supervisor, None),
                // A run that was already over when the pilot crashed; dropping the supervisor ends it.
                _ => tracing::debug!(container = %id, "a supervisor of an earlier run is let go"),
            }
        }
        // Their supervisors will tell that they run; until then the API server has the truth.
        let runs = |container: &super::Container| {
            let record = self.record.containers.get(&container.name);
            record.is_some_and(|record| record.state.is_running())
        };
        if self.containers.iter().any(|container| container.run.is_some() && !runs(container)) {
            self.announce_at = Some(Instant::now() + ANNOUNCE_AFTER);
        }
        // The order to end may have died with the pilot, while it waited for a preStop hook.
        for container in &self.containers {
            if let Some(orders) = container.run.as_ref()
                && self
                    .record
                    .containers
                    .get(&container.name)
                    .is_some_and(|record| record.again && record.state.is_running())
            {
                let _ =
                    orders.try_send(Order::Terminate { grace: own_grace(&self.record.pod), waits: false });
            }
        }
        let uid = self.record.uid().to_owned();
        for index in 0..self.containers.len() {
            let container = &self.containers[index];
            let Some(record) = self.record.containers.get_mut(&container.name) else { continue };
            if container.run.is_some() || is_over(&record.state) {
                continue;
            }
            if record.launched && !began(self.record.directory.as_deref(), &container.name, record.restart) {
                // The pilot died between noting the start and asking for it.
                record.launched = false;
            }
            if record.launched {
                let message = "the container's supervisor was gone when the pilot came back after a crash";
                let id = container_id(&uid, &container.name, record.restart);
                record.state = unknown_end("ContainerStatusUnknown", message, record, id);
                record.launched = false;
                self.after_end(index);
            } else if let Some(ended) = ended_before(record, &uid, &container.name) {
                // It waited to run again; that wait counts the run, and begins the next one.
                if self.record.last_status.is_none() {
                    let left = left_of_wait(ended, Timestamp::now(), self.context.policy.back_off_max);
                    self.containers[index].restart_at = Some(Instant::now() + left);
                }
            }
        }
        // Containers that go on still see what changes.
        if let Some(directory) = self.record.directory.clone()
            && self.containers.iter().any(|container| container.run.is_some())
        {
            self.keeper.keep(&self.context, &self.record.pod, directory, None);
        }
        for index in 0..self.containers.len() {
            let container = &self.containers[index];
            let state = self.record.containers.get(&container.name).map(|c| &c.state);
            if container.run.is_none() && container.restart_at.is_none() && state.is_some_and(is_over) {
                self.after_end(index);
            }
        }
        self.finish_if_complete();
        self.advance();
    }

    /// Prepares the starts of those containers whose turn it is.
    pub(super) fn advance(&mut self) {
        let idle = self.stop.is_none() && self.record.last_status.is_none() && self.preparing.is_none();
        if idle && !self.stuck && self.prepare_at.is_none() && !self.startable().is_empty() {
            self.prepare();
        }
    }

    /// Whose turn it is to start.
    fn startable(&self) -> Vec<usize> {
        let mut turns = order::startable(&self.line(), self.passed());
        turns.retain(|index| !self.containers[*index].stuck);
        turns
    }

    /// Starts the reading of the pod's objects, its directory and volumes.
    pub(super) fn prepare(&mut self) {
        self.prepare_at = None;
        let context = Arc::clone(&self.context);
        let (pod, share) = (self.record.pod.clone(), self.record.share.clone());
        let directory = self.record.directory.clone();
        let turn = self.keeper.turn();
        let running = self.containers.iter().filter(|c| c.run.is_some()).map(|c| c.name.clone()).collect();
        self.preparing = Some(tokio::spawn(async move {
            prepare::prepare(&context, (&pod, &share), directory, turn, running).await
        }));
        self.eager = true;
    }

    /// Starts the supervisors of those whose turn it is, while what they need is read.
    pub(super) fn spawn_supervisors(&mut self) {
        for index in self.startable() {
            if self.containers[index].supervisor.is_none() {
                self.containers[index].supervisor = self.spawn_supervisor(index);
            }
        }
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

    pub(super) fn on_prepared(&mut self, attempt: Attempt) {
        self.preparing = None;
        // Known also when something else is missing, so that it goes with the pod.
        self.record.directory = attempt.directory.or(self.record.directory.take());
        let outdated = std::mem::take(&mut self.outdated);
        if self.stop.is_some() {
            return;
        }
        if outdated {
            // It has found the scripts of other images.
            return self.prepare();
        }
        match attempt.result {
            Ok(mut prepared) => {
                let (directory, layout) = (prepared.directory.clone(), std::mem::take(&mut prepared.layout));
                self.keeper.keep(&self.context, &self.record.pod, directory, Some(layout));
                for note in &prepared.notes {
                    self.context.events.record(
                        &self.record.pod,
                        None,
                        events::Kind::Warning,
                        "FailedToRetrieveToken",
                        note,
                    );
                }
                for index in self.startable() {
                    // One that came while this was prepared has its turn with the next preparation.
                    if prepared.has(&self.containers[index].name) {
                        self.start(index, &prepared);
                    }
                }
                if self.prepare_at.is_none() {
                    if self.containers.iter().all(|container| !container.stuck) {
                        self.complaint = None;
                    }
                    self.prepare_delay = PREPARE_FIRST;
                    self.advance();
                }
            }
            Err(error) => {
                // A supervisor without work would only hold memory.
                self.containers.iter_mut().for_each(|container| container.supervisor = None);
                self.complain(error.reason(), &error.to_string());
                for index in self.startable() {
                    let container = self.record.containers.get_mut(&self.containers[index].name);
                    if let Some(container) = container.filter(|container| container.restart == 0) {
                        // kubelet says why in an event, and leaves the container's own message empty. What it said of an
                        // earlier try does not hold any more.
                        let State::Waiting { reason, message } = &mut container.state else { continue };
                        if reason != "PodInitializing" {
                            "ContainerCreating".clone_into(reason);
                        }
                        message.clear();
                    }
                }
                self.announce_at = None;
                // What no object can mend is told once; all of them would be read again every few seconds for ever.
                self.stuck = !error.may_pass();
                if error.may_pass() {
                    self.prepare_at = Some(Instant::now() + self.prepare_delay);
                    self.prepare_delay = (self.prepare_delay * 2).min(PREPARE_MOST);
                }
            }
        }
    }

    /// Starts the run that the record names; what it needs is prepared.
    fn start(&mut self, index: usize, prepared: &Prepared) {
        let name = self.containers[index].name.clone();
        let restart = self.record.containers.get(&name).map_or(0, |c| c.restart);
        self.tell_missing(&name, prepared);
        let (spec, skipped) = match spec::spec(&self.context, &self.record.pod, &name, restart, prepared) {
            Ok(made) => made,
            Err(error) => {
                self.containers[index].supervisor = None;
                self.complain("Failed", &format!("Error: {error}"));
                self.set_waiting(&name, error.reason(), &error.to_string());
                self.announce_at = None;
                if error.may_pass() {
                    self.prepare_at = Some(Instant::now() + self.prepare_delay);
                    self.prepare_delay = (self.prepare_delay * 2).min(PREPARE_MOST);
                } else {
                    self.containers[index].stuck = true;
                }
                return;
            }
        };
        for keys in skipped {
            let (pod, message) = (&self.record.pod, keys.to_string());
            self.context.events.record(pod, None, events::Kind::Warning, Skipped::REASON, &message);
        }
        let Some(supervisor) =
            self.containers[index].supervisor.take().or_else(|| self.spawn_supervisor(index))
        else {
            self.set_waiting(&name, "CreateContainerError", "no supervisor could be started");
            self.prepare_at = Some(Instant::now() + self.prepare_delay);
            self.prepare_delay = (self.prepare_delay * 2).min(PREPARE_MOST);
            return;
        };
        if let Some(record) = self.record.containers.get_mut(&name) {
            record.launched = true;
            record.log_lines_lost = 0;
            (record.started, record.ready) = (false, false);
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

    /// Events for what a container's environment names and is not there, once each.
    fn tell_missing(&mut self, container: &str, prepared: &Prepared) {
        let found = containers::find(&self.record.pod, container);
        let missing = found.map(|(_, container)| prepared.missing(&container)).unwrap_or_default();
        for one in missing {
            if self.told_missing.insert(one.clone()) {
                let warning = events::Kind::Warning;
                self.context.events.record(&self.record.pod, None, warning, &one.reason, &one.message);
            }
        }
    }

    pub(super) fn follow(&mut self, index: usize, supervisor: Supervisor, spec: Option<ContainerSpec>) {
        let name = self.containers[index].name.clone();
        let record = self.record.containers.get(&name);
        let restart = record.map_or(0, |c| c.restart);
        // What ran before a crash of the pilot has had its hook.
        let ran = record.is_some_and(|c| c.state.is_running());
        let pod = self.record.pod.clone();
        let told = self.told_tx.clone();
        let last_word = self.record.directory.as_ref().and_then(|directory| {
            let own = directory::container_dir(directory, &name);
            let log = directory::log_path(directory, &name, restart);
            let owner = self.context.policy.isolation.isolates(&pod).then(|| self.record.uid().to_owned());
            let found = containers::find(&pod, &name);
            found.map(|(_, container)| LastWord::of(&container, &own, log).owned_by(owner))
        });
        let post_start = Hook::post_start(&pod, &name).filter(|_| !ran);
        let pre_stop = Hook::pre_stop(&pod, &name);
        let of = run::Of { index, restart, pod, container: name, post_start, pre_stop, last_word };
        let (orders, handle) = run::follow(Arc::clone(&self.context), supervisor, of, spec, told);
        let container = &mut self.containers[index];
        (container.run, container.handle) = (Some(orders), Some(handle));
    }
}

/// Whether a run may have begun: its log is made before its program runs.
fn began(directory: Option<&Path>, container: &str, restart: u32) -> bool {
    directory.is_some_and(|directory| {
        let found = fs::symlink_metadata(directory::log_path(directory, container, restart));
        // What cannot be looked at may be there.
        !matches!(found, Err(error) if error.kind() == io::ErrorKind::NotFound)
    })
}

/// When the run that a waiting record names has ended already: its next one waits and has no number yet.
pub(super) fn ended_before(record: &ContainerRecord, uid: &str, name: &str) -> Option<Timestamp> {
    let last = record.last.as_ref().filter(|_| matches!(record.state, State::Waiting { .. }))?;
    (last.id == container_id(uid, name, record.restart)).then_some(last.finished_at)
}

/// What is left of the back-off of a run that ended at `ended`. How long it was is not recorded: as a kubelet that starts
/// again, the pilot counts from the shortest.
fn left_of_wait(ended: Timestamp, now: Timestamp, longest: Duration) -> Duration {
    let over = Duration::try_from(now.duration_since(ended)).unwrap_or_default();
    backoff::FIRST.min(longest).saturating_sub(over)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pod::status::Terminated;

    fn at(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    #[test]
    fn a_record_in_back_off_names_the_run_that_has_ended() {
        let ended = at("2026-01-01T00:00:00Z");
        let end = |restart| Terminated {
            exit_code: 1,
            signal: None,
            reason: None,
            message: String::new(),
            started_at: None,
            finished_at: ended,
            id: container_id("u1", "c1", restart),
        };
        let waits = waiting("CrashLoopBackOff", "back-off 20s");
        let record = |restart, last, state| ContainerRecord { restart, last, state, ..Default::default() };
        let table = [
            (record(1, Some(end(1)), waits.clone()), Some(ended)),
            // The wait is over and the next run has its number.
            (record(2, Some(end(1)), waits.clone()), None),
            (record(0, None, waits), None),
            (record(1, Some(end(1)), State::Terminated(end(1))), None),
        ];
        for (record, wanted) in table {
            assert_eq!(ended_before(&record, "u1", "c1"), wanted, "{record:?}");
        }
    }

    #[test]
    fn the_rest_of_a_wait_is_never_more_than_the_wait() {
        let ended = at("2026-01-01T00:00:10Z");
        let left = |now: &str| left_of_wait(ended, at(now), backoff::LONGEST).as_secs();
        assert_eq!(left("2026-01-01T00:00:13Z"), 7);
        assert_eq!(left("2026-01-01T01:00:00Z"), 0);
        // The clock went back.
        assert_eq!(left("2026-01-01T00:00:00Z"), backoff::FIRST.as_secs());
        // Where no wait is longer than two seconds.
        assert_eq!(left_of_wait(ended, ended, Duration::from_secs(2)).as_secs(), 2);
    }
}
