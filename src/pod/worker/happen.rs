//! What happens to a pod: commands, its containers' starts and ends, the clock.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use tokio::time::Instant;

use super::run::{Happened, Order, Told};
use super::state::{ended, is_over, timestamp, unknown_end, waiting};
use super::stop::Why;
use super::{ANNOUNCE_AFTER, Command, Container, FORCED_GRACE, Worker, deletion_grace, own_grace};
use crate::pilot_metrics::StartedFrom;
use crate::pod::backoff::{self, BackOff, Next};
use crate::pod::containers::{self, Kind};
use crate::pod::events;
use crate::pod::pressure::eviction;
use crate::pod::probe::{self, Found, Probes, Report, Subject};
use crate::pod::status::{self, OOM_KILLED, State, TERMINATION_BY_KUBELET, container_id};
use crate::pod::volumes::keeper;

/// Reason of a pod that is over a limit of its own (kubelet's eviction/helpers.go).
const EVICTED: &str = "Evicted";

/// What such a pod has to end (eviction_manager.go, immediateEvictionGracePeriodSeconds).
const EVICTION_GRACE: Duration = Duration::from_secs(1);

impl Worker {
    pub(super) fn on_command(&mut self, command: Command) {
        match command {
            Command::Update(pod) => self.update(*pod),
            Command::Gone => self.stop_for(Why::Gone, FORCED_GRACE),
            Command::Evict(message) => self.evict(message),
            Command::Shutdown(grace) => {
                self.stop_for(Why::Shutdown, grace.min(own_grace(&self.record.pod)));
            }
        }
    }

    /// The pod has changed: what a kubelet lets change of one that runs.
    fn update(&mut self, pod: Pod) {
        let old = std::mem::replace(&mut self.record.pod, pod);
        self.keeper.update(&self.record.pod);
        if self.record.pod.metadata.deletion_timestamp.is_some() {
            self.stop_for(Why::Deleted, deletion_grace(&self.record.pod));
            // After a crash of the pilot, what has ended meanwhile must not start again before the API server has said so.
            if old.metadata.deletion_timestamp.is_none() && !self.all_still() {
                self.save();
            }
        }
        if self.stop.is_some() {
            return;
        }
        self.count_deadline();
        // Only ephemeral containers are ever added, and nothing is taken away.
        let added = containers::of(&self.record.pod)
            .filter(|(_, new)| self.containers.iter().all(|c| c.name != new.name));
        let added: Vec<Container> =
            added.map(|(kind, new)| Container::new(&new.name, kind, &self.context)).collect();
        self.containers.extend(added);
        self.enter_records();
        if images(&old) != images(&self.record.pod) {
            self.stuck = false;
            self.containers.iter_mut().for_each(|container| container.stuck = false);
            self.restart_changed(&old);
            // What waits may be mended by it.
            if self.preparing.is_some() {
                self.outdated = true;
            } else if self.has_waiting() {
                self.prepare();
            }
        }
        self.advance();
    }

    /// A container whose image is another now starts again with it (kuberuntime's `containerChanged`).
    fn restart_changed(&mut self, old: &Pod) {
        let before = images(old);
        let now = images(&self.record.pod);
        for index in 0..self.containers.len() {
            let name = self.containers[index].name.clone();
            let kind = self.containers[index].kind;
            if before.get(&name) == now.get(&name) {
                continue;
            }
            // The failures of another program do not count, nor does a wait for them: a kubelet's back-off goes by the
            // container's definition too (kuberuntime/helpers.go, GetBackoffKey).
            let container = &mut self.containers[index];
            container.back_off = BackOff::new(self.context.policy.back_off_max);
            container.restart_at = container.restart_at.map(|_| Instant::now());
            // An init container that runs goes on as it is (computeInitContainerActions).
            if kind == Kind::Init {
                continue;
            }
            let what = if kind == Kind::Sidecar { "Init container" } else { "Container" };
            let message = format!("{what} {name} definition changed");
            self.kill(index, &message, own_grace(&self.record.pod), true);
        }
    }

    pub(super) fn on_told(&mut self, (index, restart, happened): Told) {
        let name = self.containers[index].name.clone();
        let id = container_id(self.record.uid(), &name, restart);
        if self.record.containers.get(&name).is_none_or(|record| record.restart != restart) {
            return;
        }
        if let Happened::Started(at) = happened {
            return self.on_started(index, timestamp(at), id);
        }
        if self.stop.is_none() && *self.context.draining.borrow() {
            // The end that was held back is let go by the same drain whose command is still on its way; that one
            // shortens the grace of the containers that are left. This one needs no order.
            let run = self.containers[index].run.take();
            self.stop_for(Why::Shutdown, own_grace(&self.record.pod));
            self.containers[index].run = run;
        }
        let Some(record) = self.record.containers.get_mut(&name) else { return };
        let (state, reason, message) = match happened {
            Happened::Started(_) => return,
            Happened::Ended(end, last_word, out_of_memory) => {
                record.log_lines_lost = end.log_lines_lost;
                let why =
                    end.log_error.clone().unwrap_or_else(|| "the file system did not answer".to_owned());
                let lost =
                    format!("{} lines of the log of container {name} were lost: {why}", end.log_lines_lost);
                let lost = Some(lost).filter(|_| end.log_lines_lost > 0);
                let mut terminated = ended(&end, &last_word, id);
                terminated.reason = out_of_memory.then(|| OOM_KILLED.to_owned());
                (State::Terminated(terminated), "LogLinesLost", lost)
            }
            Happened::StartFailed(error) => {
                let mut state = unknown_end("StartError", &error.to_string(), record, id);
                if let State::Terminated(ended) = &mut state {
                    ended.exit_code = error.exit_code();
                }
                (state, "Failed", Some(format!("Error: {error}")))
            }
            Happened::Lost(message) => {
                (unknown_end("SupervisorLost", &message, record, id), "SupervisorLost", Some(message))
            }
        };
        record.state = state;
        record.launched = false;
        (record.started, record.ready) = (false, false);
        self.context.metrics.container_ended();
        if let Some(message) = message {
            let warning = events::Kind::Warning;
            self.context.events.record(&self.record.pod, Some(&name), warning, reason, &message);
        }
        self.announce_at = None;
        let acknowledge = self.containers[index].run.take();
        self.containers[index].probes = Probes::none();
        self.after_end(index);
        self.finish_if_complete();
        self.next_turns();
        self.publish();
        self.save();
        if let Some(orders) = acknowledge {
            let _ = orders.try_send(Order::Acknowledge);
        }
        self.advance();
    }

    /// A container runs.
    fn on_started(&mut self, index: usize, started_at: Timestamp, id: String) {
        let name = self.containers[index].name.clone();
        let kind = self.containers[index].kind;
        let found = containers::find(&self.record.pod, &name).map(|(_, container)| container.into_owned());
        let (Some(record), Some(container)) = (self.record.containers.get_mut(&name), found) else { return };
        // A run of before a crash of the pilot goes on as it stood.
        let goes_on = matches!(&record.state, State::Running { id: before, .. } if *before == id);
        let again = record.again;
        record.state = State::Running { started_at, id };
        if !goes_on {
            record.started = container.startup_probe.is_none();
            record.ready = container.readiness_probe.is_none();
            record.again = false;
        }
        let (started, ready, restart) = (record.started, record.ready, record.restart);
        if let Some(run) = self.containers[index].handle.clone() {
            let subject = Subject {
                events: self.context.events.clone(),
                pod: self.record.pod.clone(),
                container,
                index,
                restart,
                run,
                started_at: started_at.into(),
                started,
                ready,
                tally: Arc::clone(&self.containers[index].probed),
            };
            // What a crash of the pilot must not do again or take back.
            let hooked = subject.container.lifecycle.as_ref().is_some_and(|all| all.post_start.is_some());
            let probed =
                subject.container.startup_probe.is_some() || subject.container.readiness_probe.is_some();
            self.containers[index].probes = probe::spawn(subject, self.reports_tx.clone());
            if (hooked || probed || again) && !goes_on {
                self.save();
            }
        }
        // An init container that is over in no time is not worth a write of its own.
        if kind != Kind::Init {
            self.announce_at = None;
        }
        let message = format!("Started container {name}");
        let normal = events::Kind::Normal;
        self.context.events.record(&self.record.pod, Some(&name), normal, "Started", &message);
        self.context.metrics.container_started();
        self.measure_start();
        self.advance();
    }

    /// A probe has found something out.
    pub(super) fn on_report(&mut self, report: Report) {
        let Report { index, restart, found } = report;
        let (name, kind) = (self.containers[index].name.clone(), self.containers[index].kind);
        let record = self.record.containers.get_mut(&name);
        let Some(record) =
            record.filter(|record| record.restart == restart && self.containers[index].run.is_some())
        else {
            return;
        };
        match found {
            Found::Started => record.started = true,
            Found::Ready(ready) => record.ready = ready,
            Found::Failed { message, grace, .. } => {
                let grace = grace.unwrap_or_else(|| own_grace(&self.record.pod));
                // A sidecar always starts again, which its event does not say (computeInitContainerActions).
                if kind == Kind::Sidecar {
                    return self.kill(
                        index,
                        &format!("Init {}", message.replacen('C', "c", 1)),
                        grace,
                        false,
                    );
                }
                return self.kill(index, &message, grace, self.restarts_what_failed(&name));
            }
        }
        self.save();
        self.advance();
    }

    /// Whether a container that was ended by its probes starts again: by its policy, not by its exit code, which is that of
    /// its stop signal (computePodActions).
    fn restarts_what_failed(&self, name: &str) -> bool {
        let own = containers::find(&self.record.pod, name)
            .and_then(|(_, container)| container.restart_policy.clone());
        let pods = || self.record.pod.spec.as_ref().and_then(|spec| spec.restart_policy.clone());
        own.or_else(pods).as_deref() != Some("Never")
    }

    /// What the keeper of the pod's volumes has found.
    pub(super) fn on_found(&mut self, found: keeper::Found) {
        match found {
            // As a kubelet's evictPod: never a critical one.
            keeper::Found::Exceeded { .. } if eviction::is_critical(&self.record.pod) => {}
            keeper::Found::Exceeded { message } => {
                let warning = events::Kind::Warning;
                self.context.events.record(&self.record.pod, None, warning, EVICTED, &message);
                // Without a DisruptionTarget condition: the pod is over its own limit (eviction_manager.go, evictPod).
                let why = Why::Failed { reason: EVICTED.to_owned(), message, disruption: None };
                self.stop_for(why, EVICTION_GRACE);
            }
        }
    }

    /// The job's memory runs short, and this pod gives way: at once, before the kernel kills whomever it likes. One that is ending
    /// already ends as what it was to be, but now.
    fn evict(&mut self, message: String) {
        if self.ended {
            return;
        }
        let (warning, meta) = (events::Kind::Warning, &self.record.pod.metadata);
        tracing::warn!(namespace = meta.namespace, pod = meta.name, "pod evicted: {message}");
        self.context.events.record(&self.record.pod, None, warning, EVICTED, &message);
        let runs: Vec<_> = self.containers.iter().filter_map(|container| container.run.clone()).collect();
        // Before the SIGTERM that stopping a pod begins with: this one has no time.
        for orders in runs {
            let _ = orders.try_send(Order::Kill);
        }
        let disruption = Some(TERMINATION_BY_KUBELET.to_owned());
        self.stop_for(Why::Failed { reason: EVICTED.to_owned(), message, disruption }, EVICTION_GRACE);
    }

    /// How long the pod's first start took, once all of its containers run.
    fn measure_start(&self) {
        let mut all = self.containers.iter().filter(|container| container.kind == Kind::Main);
        let runs = |container: &Container| {
            let record = self.record.containers.get(&container.name);
            record.is_some_and(|c| c.restart == 0 && c.state.is_running())
        };
        if !all.all(runs) {
            return;
        }
        let since =
            |from: Timestamp| Duration::try_from(Timestamp::now().duration_since(from)).unwrap_or_default();
        self.context.metrics.pod_started(StartedFrom::Admitted, since(self.record.admitted));
        let conditions = self.record.pod.status.iter().flat_map(|s| s.conditions.iter().flatten());
        let bound =
            conditions.filter(|c| c.type_ == "PodScheduled").find_map(|c| c.last_transition_time.clone());
        if let Some(bound) = bound {
            self.context.metrics.pod_started(StartedFrom::Bound, since(bound.0));
        }
    }

    /// What follows from a container's end: nothing, or a restart now or later.
    pub(super) fn after_end(&mut self, index: usize) {
        if self.stop.is_some() || self.record.last_status.is_some() {
            return;
        }
        let container = &mut self.containers[index];
        let Some(record) = self.record.containers.get_mut(&container.name) else { return };
        let State::Terminated(end) = record.state.clone() else { return };
        let spec = self.record.pod.spec.as_ref();
        let by_policy = || {
            let found = spec.zip(containers::find(&self.record.pod, &container.name));
            found
                .is_some_and(|(spec, (_, container))| status::should_restart(spec, &container, end.exit_code))
        };
        let again = match container.kind {
            Kind::Ephemeral => false,
            // One that has succeeded is done for good.
            Kind::Init => end.exit_code != 0 && by_policy(),
            Kind::Sidecar | Kind::Main => record.again || by_policy(),
        };
        if !again {
            return;
        }
        let Next::Wait { wait, until } = container.back_off.next(end.finished_at, Timestamp::now()) else {
            container.restart_at = Some(Instant::now());
            if record.again {
                // Nobody is to see it end: by its policy alone it would be over for good.
                record.last = Some(end);
                record.state = waiting("ContainerCreating", "");
            }
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
        let warning = events::Kind::Warning;
        self.context.events.record(&self.record.pod, Some(&container.name), warning, "BackOff", &text);
    }

    pub(super) async fn on_wake(&mut self, now: Instant) {
        if self.announce_at.is_some_and(|at| at <= now) {
            self.announce_at = None;
        }
        if self.prepare_at.is_some_and(|at| at <= now) && self.preparing.is_none() {
            self.prepare();
            // What is missing may be missing for hours: no process waits for it.
            self.eager = false;
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
            // A start that takes no time is told when it has happened, as at first.
            self.announce_at = Some(now + ANNOUNCE_AFTER);
        }
        // Secrets and ConfigMaps may have changed since; a kubelet reads them anew too.
        self.advance();
        if self.deadline_at.is_some_and(|at| at <= now) {
            self.exceed_deadline();
        }
        if self.delete_at.is_some_and(|at| at <= now) {
            self.delete().await;
        }
    }
}

/// The images of the containers by their names. Ephemeral ones, which only ever come, do not count.
fn images(pod: &Pod) -> BTreeMap<String, Option<String>> {
    let fixed = containers::of(pod).filter(|(kind, _)| *kind != Kind::Ephemeral);
    fixed.map(|(_, container)| (container.name.clone(), container.image.clone())).collect()
}
