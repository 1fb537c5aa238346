//! What is to be done, what runs, and how it went.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, SystemTime};

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{ContainerStatus, Pod, PodStatus};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use tokio::time::Instant;

use super::job::{JobRun, Progress, Slot};
use super::manifests::Manifests;
use super::setup::Stage;
use super::show;
use crate::commands::run::setup::instance;
use crate::pod::admission::{self, Load};
use crate::pod::context::OutputLine;
use crate::pod::outcome::{Outcome, REMEMBERED};
use crate::pod::source::PodEvent;

/// How long a pod's directory and files may take, on a slow file system.
const CREATING_LIMIT: Duration = Duration::from_secs(15);

/// How long a container may wait for anything else: a script or a key that is not there, and that nobody will add.
const OTHER_LIMIT: Duration = Duration::from_secs(2);

/// terminationGracePeriodSeconds when a pod names none (core/v1).
const GRACE_SECONDS: i64 = 30;

/// Programs that were not found and are remembered for the hints.
const MISSING: usize = 100;

/// A pod that runs.
struct Live {
    pod: Pod,
    job: Option<(usize, Slot)>,
    /// The container that waits for its start.
    waits: Option<Waits>,
    deleted: bool,
    /// The exit code of the first run that failed; a restart hides it.
    failed: Option<u8>,
}

/// A container that waits for its start.
struct Waits {
    since: Instant,
    limit: Duration,
    why: String,
}

/// All work of a `play`.
pub struct Work {
    pods: VecDeque<Pod>,
    jobs: Vec<JobRun>,
    several: bool,
    live: BTreeMap<String, Live>,
    outcomes: VecDeque<Outcome>,
    forgotten: u64,
    /// The exit codes of failed pods, with their Job, in the order of their ends; a Job's first failure only.
    failures: Vec<(Option<usize>, u8)>,
    missing: BTreeMap<(String, String), String>,
}

impl Work {
    /// The work that the manifests ask for.
    pub fn new(manifests: Manifests) -> Self {
        let pods: VecDeque<Pod> = manifests.pods.into_iter().collect();
        let jobs: Vec<JobRun> = manifests.jobs.into_iter().map(JobRun::new).collect();
        let all = jobs.iter().fold(pods.len(), |sum, job| sum.saturating_add(job.completions() as usize));
        Self {
            pods,
            jobs,
            several: all > 1,
            live: BTreeMap::new(),
            outcomes: VecDeque::new(),
            forgotten: 0,
            failures: Vec::new(),
            missing: BTreeMap::new(),
        }
    }

    /// Whether there is more than one pod, so that lines must name theirs.
    pub fn is_several(&self) -> bool {
        self.several
    }

    /// Names of the pods that run.
    pub fn running(&self) -> Vec<String> {
        self.live.values().map(|live| name(&live.pod).to_owned()).collect()
    }

    /// How many pods have not started, as far as is known.
    pub fn waiting(&self) -> usize {
        self.pods.len() + self.jobs.iter().map(|job| job.waiting() as usize).sum::<usize>()
    }

    /// How many pods have ended.
    pub fn ended(&self) -> usize {
        self.outcomes.len() + usize::try_from(self.forgotten).unwrap_or(usize::MAX)
    }

    /// How the last pods ended, oldest first.
    pub fn outcomes(&self) -> Vec<Outcome> {
        self.outcomes.iter().cloned().collect()
    }

    /// How many ended before those.
    pub fn forgotten(&self) -> u64 {
        self.forgotten
    }

    /// The program that a container's shell did not find.
    pub fn missing_program(&self, pod: &str, container: &str) -> Option<&str> {
        self.missing.get(&(pod.to_owned(), container.to_owned())).map(String::as_str)
    }

    /// Nothing runs, and nothing more is to be started.
    pub fn is_over(&self, draining: bool) -> bool {
        let nothing_to_start =
            self.pods.is_empty() && self.jobs.iter().all(|job| job.progress() != Progress::Running);
        self.live.is_empty() && (draining || nothing_to_start)
    }

    /// 0 when all Pods and Jobs succeeded, else the exit code of the first container that failed, or 1.
    pub fn exit_code(&self) -> u8 {
        let counts =
            |job: &Option<usize>| job.is_none_or(|job| self.jobs[job].progress() != Progress::Complete);
        if let Some((_, code)) = self.failures.iter().find(|(job, _)| counts(job)) {
            return *code;
        }
        let all = self.pods.is_empty()
            && self.live.is_empty()
            && self.jobs.iter().all(|job| job.progress() == Progress::Complete);
        u8::from(!all)
    }

    /// Starts all pods that may start now and for which there is room.
    pub async fn start(&mut self, stage: &Stage, now: SystemTime) {
        while let Some(pod) = self.pods.pop_front() {
            if let Err(pod) = self.try_start(stage, pod, None).await {
                self.pods.push_front(*pod);
                break;
            }
        }
        for index in 0..self.jobs.len() {
            while let Some(slot) = self.jobs[index].next(now) {
                let pod = self.jobs[index].pod(slot, instance());
                if self.try_start(stage, pod, Some((index, slot))).await.is_err() {
                    self.jobs[index].put_back(slot);
                    break;
                }
            }
        }
    }

    /// Starts a pod, or gives it back when it must wait for others to end. One that can never run here fails.
    async fn try_start(
        &mut self,
        stage: &Stage,
        pod: Pod,
        job: Option<(usize, Slot)>,
    ) -> Result<(), Box<Pod>> {
        let pod = as_stored(pod, Timestamp::now());
        let load = Load::of(self.live.values().map(|live| &live.pod));
        match admission::admit(&pod, &stage.facts, &load) {
            Ok(()) => {
                let uid = pod.metadata.uid.clone().unwrap_or_default();
                let _ = stage.events.send(PodEvent::Applied(Box::new(pod.clone()))).await;
                let live = Live { pod, job, waits: None, deleted: false, failed: None };
                self.live.insert(uid, live);
                Ok(())
            }
            // A scheduler would leave it pending until others have ended.
            Err(_) if !self.live.is_empty() => Err(Box::new(pod)),
            Err(rejection) => {
                let status = PodStatus {
                    phase: Some("Failed".to_owned()),
                    reason: Some(rejection.reason),
                    message: Some(rejection.message),
                    ..PodStatus::default()
                };
                let outcome = Outcome::new(&pod, &status, true, |_| Default::default());
                self.record(outcome, job, None, stage).await;
                Ok(())
            }
        }
    }

    /// Takes in a pod's new status.
    pub async fn on_status(&mut self, uid: &str, status: PodStatus, stage: &Stage) {
        let Some(live) = self.live.get_mut(uid) else { return };
        let containers = || status.container_statuses.iter().flatten();
        let restarts: u32 = containers().map(|c| u32::try_from(c.restart_count).unwrap_or(0)).sum();
        if live.failed.is_none() {
            live.failed = containers().find_map(failed_run);
        }
        let waiting = containers().find_map(|container| {
            let waiting = container.state.as_ref()?.waiting.as_ref()?;
            // Such a container has run, and will run again.
            (waiting.reason.as_deref() != Some("CrashLoopBackOff")).then_some((container, waiting))
        });
        live.waits = waiting.map(|(container, waiting)| {
            let reason = waiting.reason.as_deref().unwrap_or("ContainerCreating");
            let message = waiting.message.as_deref().unwrap_or_default();
            Waits {
                since: live.waits.as_ref().map_or_else(Instant::now, |waits| waits.since),
                limit: if reason == "ContainerCreating" { CREATING_LIMIT } else { OTHER_LIMIT },
                why: format!("{}: {reason}: {message}", container.name),
            }
        });
        if let Some((index, _)) = live.job
            && self.jobs[index].is_past_limit(restarts)
            && !live.deleted
        {
            self.jobs[index].fail();
            self.end_failed_jobs(stage).await;
        }
    }

    /// Takes in a line of output.
    pub fn on_line(&mut self, line: Option<&OutputLine>) {
        let Some(line) = line.filter(|line| line.stderr) else { return };
        if let Some(program) = show::not_found(&line.line)
            && self.missing.len() < MISSING
        {
            self.missing.insert((line.pod.clone(), line.container.clone()), program.to_owned());
        }
    }

    /// Ends pods whose containers cannot start; what to say of each.
    pub async fn give_up_waiting(&mut self, stage: &Stage, now: Instant) -> Vec<String> {
        let mut texts = Vec::new();
        for live in self.live.values_mut().filter(|live| !live.deleted) {
            let Some(waits) = &live.waits else { continue };
            if now.duration_since(waits.since) > waits.limit {
                let why = waits.why.trim_end_matches([':', ' ']);
                texts.push(format!("{}: {why}; it cannot start and is given up", name(&live.pod)));
                live.failed = Some(1);
                delete(live, stage).await;
            }
        }
        texts
    }

    /// Takes in the ends of pods; their directories go, and their logs are kept.
    pub async fn collect(&mut self, stage: &Stage) {
        if self.live.is_empty() {
            return;
        }
        for outcome in stage.manager.summary().await.outcomes {
            let Some(live) = self.live.remove(&outcome.uid) else { continue };
            let _ = stage.events.send(PodEvent::Deleted(outcome.uid.clone())).await;
            self.record(outcome, live.job, live.failed, stage).await;
        }
    }

    async fn record(
        &mut self,
        outcome: Outcome,
        job: Option<(usize, Slot)>,
        code: Option<u8>,
        stage: &Stage,
    ) {
        let succeeded = outcome.phase == "Succeeded";
        if !succeeded
            && !self.failures.iter().any(|(failed, _)| failed.is_some() && *failed == job.map(|j| j.0))
        {
            self.failures.push((job.map(|(index, _)| index), code.unwrap_or_else(|| failed_code(&outcome))));
        }
        if self.outcomes.len() >= REMEMBERED {
            self.outcomes.pop_front();
            self.forgotten += 1;
        }
        self.outcomes.push_back(outcome);
        if let Some((index, slot)) = job {
            self.jobs[index].ended(slot, succeeded, SystemTime::now());
            self.end_failed_jobs(stage).await;
        }
    }

    /// The pods of a Job that has failed are deleted, as the Job controller does.
    async fn end_failed_jobs(&mut self, stage: &Stage) {
        for live in self.live.values_mut().filter(|live| !live.deleted) {
            if live.job.is_some_and(|(index, _)| self.jobs[index].progress() == Progress::Failed) {
                delete(live, stage).await;
            }
        }
    }
}

/// The exit code of a container's last or current run, where it failed.
fn failed_run(container: &ContainerStatus) -> Option<u8> {
    let runs = [&container.last_state, &container.state];
    let ended = runs.into_iter().flatten().filter_map(|state| state.terminated.as_ref());
    ended.map(|ended| ended.exit_code).find(|code| *code != 0).and_then(|code| u8::try_from(code).ok())
}

/// The exit code of the container that failed first, 1 where none has one.
fn failed_code(outcome: &Outcome) -> u8 {
    let failed = outcome.containers.iter().filter(|c| c.exit_code.is_some_and(|code| code != 0));
    let first = failed.min_by_key(|c| c.finished_at);
    first.and_then(|c| c.exit_code).and_then(|code| u8::try_from(code).ok()).unwrap_or(1)
}

async fn delete(live: &mut Live, stage: &Stage) {
    live.deleted = true;
    let grace = live.pod.spec.as_ref().and_then(|spec| spec.termination_grace_period_seconds);
    live.pod.metadata.deletion_timestamp = Some(Time(Timestamp::now()));
    live.pod.metadata.deletion_grace_period_seconds = Some(grace.unwrap_or(GRACE_SECONDS));
    let _ = stage.events.send(PodEvent::Applied(Box::new(live.pod.clone()))).await;
}

fn name(pod: &Pod) -> &str {
    pod.metadata.name.as_deref().unwrap_or_default()
}

/// The pod as it would be stored and bound: with what the API server fills in, and without what a scheduler alone looks
/// at. A Pod that names no restartPolicy is run once; the API server would say Always, and it would never end.
fn as_stored(mut pod: Pod, now: Timestamp) -> Pod {
    pod.metadata.creation_timestamp = Some(Time(now));
    if let Some(spec) = &mut pod.spec {
        spec.restart_policy.get_or_insert_with(|| "Never".to_owned());
        spec.termination_grace_period_seconds.get_or_insert(GRACE_SECONDS);
        spec.node_name = None;
        spec.node_selector = None;
        spec.affinity = None;
        spec.tolerations = None;
    }
    pod
}
