//! What happens to a pod: commands, its containers' starts and ends, the clock.

use std::time::Duration;

use jiff::Timestamp;
use tokio::time::Instant;

use super::run::{Order, Told};
use super::state::{ended, is_over, timestamp, unknown_end, waiting};
use super::{ANNOUNCE_AFTER, Command, FORCED_GRACE, Stop, Why, Worker, deletion_grace, own_grace};
use crate::container::Event;
use crate::pilot_metrics::StartedFrom;
use crate::pod::backoff::{self, Next};
use crate::pod::containers;
use crate::pod::events::Kind;
use crate::pod::status::{self, State, container_id};
use crate::pod::volumes::keeper::Found;
use k8s_openapi::api::core::v1::Pod;

impl Worker {
    pub(super) fn on_command(&mut self, command: Command) {
        match command {
            Command::Update(pod) => {
                let image_changed = images(&self.record.pod) != images(&pod);
                self.record.pod = *pod;
                self.keeper.update(&self.record.pod);
                if self.record.pod.metadata.deletion_timestamp.is_some() {
                    self.stop_for(Why::Deleted, deletion_grace(&self.record.pod));
                } else if image_changed && self.stop.is_none() && self.has_waiting() {
                    self.prepare();
                }
            }
            Command::Gone => self.stop_for(Why::Gone, FORCED_GRACE),
            Command::Shutdown(grace) => {
                self.stop_for(Why::Shutdown, grace.min(own_grace(&self.record.pod)));
            }
        }
    }

    pub(super) fn on_told(&mut self, (index, restart, event): Told) {
        let name = self.containers[index].name.clone();
        let id = container_id(self.record.uid(), &name, restart);
        if self.record.containers.get(&name).is_none_or(|record| record.restart != restart) {
            return;
        }
        let over = matches!(event, Event::Ended(_) | Event::StartFailed(_) | Event::Lost { .. });
        if over && self.stop.is_none() && *self.context.draining.borrow() {
            // The end that was held back is let go by the same drain whose command is still on its way; that one
            // shortens the grace of the containers that are left. This one needs no order.
            let run = self.containers[index].run.take();
            self.stop_for(Why::Shutdown, own_grace(&self.record.pod));
            self.containers[index].run = run;
        }
        let Some(record) = self.record.containers.get_mut(&name) else { return };
        let (state, kind, reason, message) = match event {
            Event::Started { at, .. } => {
                record.state = State::Running { started_at: timestamp(at), id };
                self.announce_at = None;
                let message = format!("Started container {name}");
                self.context.events.record(&self.record.pod, Some(&name), Kind::Normal, "Started", &message);
                self.context.metrics.container_started();
                self.measure_start();
                return;
            }
            Event::Ended(end) => {
                record.log_lines_lost = end.log_lines_lost;
                let why =
                    end.log_error.clone().unwrap_or_else(|| "the file system did not answer".to_owned());
                let lost =
                    format!("{} lines of the log of container {name} were lost: {why}", end.log_lines_lost);
                (
                    State::Terminated(ended(&end, id)),
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
            Event::Output { .. } | Event::ExecEnded { .. } | Event::ExecFailed { .. } => return,
        };
        record.state = state;
        self.context.metrics.container_ended();
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

    /// What the keeper of the pod's volumes has found.
    pub(super) fn on_found(&mut self, found: Found) {
        match found {
            // CALL POINT: the pod is to end here as evicted (Ending::Failed, reason `Evicted`, this message, DisruptionTarget
            // TerminationByKubelet), with a grace of 1 s (eviction_manager.go, immediateEvictionGracePeriodSeconds).
            Found::Exceeded { message } => {
                self.context.events.record(&self.record.pod, None, Kind::Warning, "Evicted", &message);
            }
        }
    }

    /// How long the pod's first start took, once all of its containers run.
    fn measure_start(&self) {
        let all = self.record.containers.values();
        if !all.clone().all(|c| c.restart == 0 && matches!(c.state, State::Running { .. })) {
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
        let again = spec.is_some_and(|spec| {
            let found = containers::find(&self.record.pod, &container.name);
            found.is_some_and(|(_, container)| status::should_restart(spec, &container, end.exit_code))
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

    pub(super) async fn on_wake(&mut self, now: Instant) {
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
            // A start that takes no time is told when it has happened, as at first.
            self.announce_at = Some(now + ANNOUNCE_AFTER);
            // Secrets and ConfigMaps may have changed since; a kubelet reads them anew too.
            if self.preparing.is_none() {
                self.prepare();
            }
        }
        if self.delete_at.is_some_and(|at| at <= now) {
            self.delete().await;
        }
    }

    pub(super) fn stop_for(&mut self, why: Why, grace: Duration) {
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
        // A preparation that is under way is waited for: it may have made the pod's directory.
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
}

fn images(pod: &Pod) -> Vec<Option<String>> {
    containers::of(pod).map(|(_, container)| container.image.clone()).collect()
}
