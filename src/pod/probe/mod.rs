//! Probes (core/v1 Probe): whether a container has started, lives, and is ready. [`spawn`] begins those of one run.
//!
//! Sources: kubelet's `prober/{worker,prober,prober_manager}.go`. A task a probe: it sleeps, asks ([`prober`]), counts
//! ([`Thresholds`]) and reports what changed.

mod grpc;
mod hpack;
mod prober;
mod tally;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use k8s_openapi::api::core::v1::{Container, Pod, Probe};
use tokio::sync::{mpsc, watch};
use tokio::task::AbortHandle;
use tokio::time::Instant;

use self::prober::Outcome;
pub use self::tally::Tally;
use super::events::{Events, Kind as EventKind};
use super::session::RunHandle;

/// How often a probe that comes to no verdict is tried at once (prober.go, maxProbeRetries).
const TRIES: usize = 3;

/// Complaints of one probe that are events at once; then one for each [`COMPLAINT_REFILL`]. As a kubelet's recorder
/// (client-go, tools/record/events_cache.go, defaultSpamBurst and defaultSpamQPS): a hundred pods that fail every second
/// would be a hundred writes a second.
const COMPLAINTS: u32 = 25;

/// See [`COMPLAINTS`].
const COMPLAINT_REFILL: Duration = Duration::from_secs(300);

/// The API server takes any 32-bit number of seconds; a moment so far away cannot always be computed.
const LONGEST: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// What a probe is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Whether the container has started; holds the others back.
    Startup,
    /// Whether it has to be started again.
    Liveness,
    /// Whether it may be sent work.
    Readiness,
}

impl Kind {
    /// As kubelet's events begin (prober_manager.go).
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Startup => "Startup",
            Self::Liveness => "Liveness",
            Self::Readiness => "Readiness",
        }
    }
}

/// What probes have found out about a run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Found {
    /// The startup probe succeeded.
    Started,
    /// It became ready, or is so no more.
    Ready(bool),
    /// It has to be ended; told once for a run.
    Failed {
        /// Startup or liveness.
        kind: Kind,
        /// What a kubelet says of it: `Container c1 failed liveness probe`.
        message: String,
        /// The probe's own grace, where it has one.
        grace: Option<Duration>,
    },
}

/// What is told to the worker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// The container's index in the pod's containers.
    pub index: usize,
    /// Which run of it.
    pub restart: u32,
    /// What was found.
    pub found: Found,
}

/// The run that is probed.
pub struct Subject {
    /// Where complaints go.
    pub events: Events,
    /// The pod, for events.
    pub pod: Pod,
    /// The container.
    pub container: Container,
    /// Its index in the pod's containers.
    pub index: usize,
    /// Which run of it.
    pub restart: u32,
    /// By which programs are run in it.
    pub run: RunHandle,
    /// When it started: delays count from here.
    pub started_at: SystemTime,
    /// Whether its startup probe has succeeded before (a pilot that was started again).
    pub started: bool,
    /// Whether it was ready before.
    pub ready: bool,
    /// Where the verdicts are counted.
    pub tally: Arc<Tally>,
}

/// The probes of one run. They end when this is dropped.
#[derive(Debug, Default)]
pub struct Probes {
    tasks: Vec<(Kind, AbortHandle)>,
}

impl Probes {
    /// A run without probes.
    #[must_use]
    pub fn none() -> Self {
        Self::default()
    }

    /// The pod is being deleted: startup and liveness have no more to say, readiness goes on (worker.go, doProbe).
    pub fn stopping(&self) {
        let over = self.tasks.iter().filter(|(kind, _)| *kind != Kind::Readiness);
        over.for_each(|(_, task)| task.abort());
    }
}

impl Drop for Probes {
    fn drop(&mut self) {
        self.tasks.iter().for_each(|(_, task)| task.abort());
    }
}

/// Begins the probes of a run. Without a startup probe it counts as started, and without a readiness probe it is ready once
/// it has started; neither is reported.
#[must_use]
pub fn spawn(subject: Subject, reports: mpsc::Sender<Report>) -> Probes {
    let container = &subject.container;
    let probes = [
        (Kind::Startup, container.startup_probe.clone()),
        (Kind::Liveness, container.liveness_probe.clone()),
        (Kind::Readiness, container.readiness_probe.clone()),
    ];
    if probes.iter().all(|(_, probe)| probe.is_none()) {
        return Probes::none();
    }
    let started = subject.started || container.startup_probe.is_none();
    let begun = Instant::now();
    let started_at = begun.checked_sub(subject.started_at.elapsed().unwrap_or_default()).unwrap_or(begun);
    let (gate, _) = watch::channel(started);
    let gate = Arc::new(gate);
    let subject = Arc::new(subject);
    let mut tasks = Vec::new();
    for (kind, probe) in probes {
        let Some(probe) = probe.filter(|_| kind != Kind::Startup || !started) else { continue };
        let settings = Settings::new(&probe);
        let watcher = Watcher {
            kind,
            thresholds: Thresholds::new(kind, &settings, subject.ready),
            settings,
            probe,
            complaints: Complaints::default(),
            subject: Arc::clone(&subject),
            reports: reports.clone(),
            gate: Arc::clone(&gate),
        };
        tasks.push((kind, tokio::spawn(watcher.watch(started_at)).abort_handle()));
    }
    Probes { tasks }
}

/// The numbers of a probe. An API server fills in what is left out (core/v1 defaults.go, SetDefaults_Probe); manifests of
/// `play` have met none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Settings {
    initial_delay: Duration,
    timeout: Duration,
    period: Duration,
    success_threshold: u32,
    failure_threshold: u32,
    grace: Option<Duration>,
}

impl Settings {
    fn new(probe: &Probe) -> Self {
        let count = |given: Option<i32>, default: u32| {
            given.and_then(|n| u32::try_from(n).ok()).filter(|n| *n > 0).unwrap_or(default)
        };
        let seconds = |given, default| Duration::from_secs(count(given, default).into()).min(LONGEST);
        let grace = probe.termination_grace_period_seconds.and_then(|s| u64::try_from(s).ok());
        Self {
            initial_delay: seconds(probe.initial_delay_seconds, 0),
            timeout: seconds(probe.timeout_seconds, 1),
            period: seconds(probe.period_seconds, 10),
            success_threshold: count(probe.success_threshold, 1),
            failure_threshold: count(probe.failure_threshold, 3),
            grace: grace.map(|s| Duration::from_secs(s).min(LONGEST)),
        }
    }

    /// When the first probe is due of a container that started at `started_at`, when nothing holds it back at `now`. What was
    /// held back goes on at the times it would have had (a kubelet's ticker), but readiness at once
    /// (prober_manager.go, UpdatePodStatus).
    fn first(&self, kind: Kind, started_at: Instant, now: Instant) -> Instant {
        let due = started_at + self.initial_delay;
        if kind == Kind::Readiness || due >= now {
            return due.max(now);
        }
        let late = (now - due).as_nanos() % self.period.as_nanos().max(1);
        if late == 0 {
            return now;
        }
        now + self.period - Duration::from_nanos(u64::try_from(late).unwrap_or(0))
    }
}

/// What one probe has said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Success,
    Failure,
}

/// Counts verdicts: the state of a probe changes when there were enough of one kind in a row (worker.go, doProbe).
#[derive(Debug)]
struct Thresholds {
    kind: Kind,
    success: u32,
    failure: u32,
    last: Option<Verdict>,
    run: u32,
    /// The probe's state; a startup probe has none at first.
    result: Option<Verdict>,
    over: bool,
}

impl Thresholds {
    fn new(kind: Kind, settings: &Settings, ready: bool) -> Self {
        let result = match kind {
            Kind::Startup => None,
            Kind::Liveness => Some(Verdict::Success),
            Kind::Readiness if ready => Some(Verdict::Success),
            Kind::Readiness => Some(Verdict::Failure),
        };
        let (success, failure) = (settings.success_threshold, settings.failure_threshold);
        Self { kind, success, failure, last: None, run: 0, result, over: false }
    }

    /// Takes a verdict; the probe's state, when it has changed.
    fn note(&mut self, verdict: Verdict) -> Option<Verdict> {
        if self.over {
            return None;
        }
        self.run = if self.last == Some(verdict) { self.run.saturating_add(1) } else { 1 };
        self.last = Some(verdict);
        let enough = match verdict {
            Verdict::Success => self.success,
            Verdict::Failure => self.failure,
        };
        if self.run < enough {
            return None;
        }
        // What has started has started, and what has failed will be ended: no probe disturbs it any more.
        self.over = self.kind == Kind::Startup || self.kind == Kind::Liveness && verdict == Verdict::Failure;
        (self.result.replace(verdict) != Some(verdict)).then_some(verdict)
    }
}

/// How many complaints may be events: a bucket of tokens.
#[derive(Debug)]
struct Complaints {
    left: u32,
    refilled: Option<Instant>,
}

impl Default for Complaints {
    fn default() -> Self {
        Self { left: COMPLAINTS, refilled: None }
    }
}

impl Complaints {
    fn take(&mut self, now: Instant) -> bool {
        let since = *self.refilled.get_or_insert(now);
        let periods = (now - since).as_secs() / COMPLAINT_REFILL.as_secs();
        if periods > 0 {
            self.left = self.left.saturating_add(u32::try_from(periods).unwrap_or(u32::MAX)).min(COMPLAINTS);
            self.refilled = Some(now);
        }
        let granted = self.left > 0;
        self.left = self.left.saturating_sub(1);
        granted
    }
}

/// One probe of one run.
struct Watcher {
    kind: Kind,
    settings: Settings,
    probe: Probe,
    thresholds: Thresholds,
    complaints: Complaints,
    subject: Arc<Subject>,
    reports: mpsc::Sender<Report>,
    /// Whether the container has started.
    gate: Arc<watch::Sender<bool>>,
}

impl Watcher {
    async fn watch(mut self, started_at: Instant) {
        if self.kind != Kind::Startup && self.gate.subscribe().wait_for(|started| *started).await.is_err() {
            return;
        }
        let mut at = self.settings.first(self.kind, started_at, Instant::now());
        while !self.thresholds.over {
            tokio::time::sleep_until(at).await;
            let Some(verdict) = self.ask().await else { return };
            if let Some(verdict) = verdict {
                self.subject.tally.count(self.kind, verdict);
            }
            if let Some(result) = verdict.and_then(|verdict| self.thresholds.note(verdict)) {
                let Subject { index, restart, .. } = *self.subject;
                let report = Report { index, restart, found: self.found(result) };
                if self.reports.send(report).await.is_err() {
                    return;
                }
                if self.kind == Kind::Startup && result == Verdict::Success {
                    self.gate.send_replace(true);
                }
            }
            // A probe that took longer than its period is followed by the next at once, as by a ticker.
            at = (at + self.settings.period).max(Instant::now());
        }
    }

    fn found(&self, result: Verdict) -> Found {
        match (self.kind, result) {
            (Kind::Readiness, result) => Found::Ready(result == Verdict::Success),
            (_, Verdict::Success) => Found::Started,
            (kind, Verdict::Failure) => {
                let name = &self.subject.container.name;
                // kuberuntime_manager.go, computePodActions.
                let message = format!("Container {name} failed {} probe", kind.name().to_ascii_lowercase());
                Found::Failed { kind, message, grace: self.settings.grace }
            }
        }
    }

    /// Asks once; none when the container has ended, and no verdict where the probe itself went wrong (prober.go, probe).
    async fn ask(&mut self) -> Option<Option<Verdict>> {
        let name = self.kind.name();
        let mut problem = String::new();
        for _ in 0..TRIES {
            match prober::run(&self.subject.container, &self.subject.run, &self.probe, self.settings.timeout)
                .await
            {
                Outcome::Success => return Some(Some(Verdict::Success)),
                Outcome::Warning(output) => {
                    self.complain("ProbeWarning", &format!("{name} probe warning: {output}"));
                    return Some(Some(Verdict::Success));
                }
                Outcome::Failure(output) => {
                    self.complain("Unhealthy", &format!("{name} probe failed: {output}"));
                    return Some(Some(Verdict::Failure));
                }
                Outcome::Unknown(error) => problem = error,
                Outcome::Gone => return None,
            }
        }
        let text = format!("{name} probe errored and resulted in unknown state: {problem}");
        self.complain("Unhealthy", &text);
        Some(None)
    }

    fn complain(&mut self, reason: &str, message: &str) {
        if self.complaints.take(Instant::now()) {
            let Subject { events, pod, container, .. } = &*self.subject;
            events.record(pod, Some(&container.name), EventKind::Warning, reason, message);
        }
    }
}
