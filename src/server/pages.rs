//! What only tells: `/pods`, `/configz`, `/stats/summary`, the metrics, and a page for a person.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use http::{Response, StatusCode};
use jiff::Timestamp;
use k8s_openapi::List;
use k8s_openapi::api::core::v1::Pod;
use tokio::sync::watch;

use super::body::{Answer, text, typed};
use super::metrics::host::{Disk, Network, Processes};
use super::metrics::summary::{Extra, summary};
use super::metrics::{CONTENT_TYPE, Snapshot, probes, resource};
use super::route::Route;
use super::usage::Usages;
use crate::allocation::Deadline;
use crate::node::Timing;
use crate::pilot_metrics::{Now, PilotMetrics};
use crate::pod::context::reading_disk;
use crate::pod::directory::log_path;
use crate::pod::roster::{PodView, Roster};

/// How long the figures of the pods' file system are waited for.
const DISK_LIMIT: Duration = Duration::from_millis(500);

/// This pilot, as it tells of itself.
#[derive(Clone)]
pub struct About {
    /// The Node's name.
    pub node: String,
    /// The site.
    pub site: String,
    /// The batch system.
    pub batch: String,
    /// The batch job.
    pub job: Option<String>,
    /// This host.
    pub host: String,
    /// Where the pods' directories are.
    pub pods: PathBuf,
    /// The memory that was granted, in bytes.
    pub memory: u64,
    /// The CPUs that were granted.
    pub cpus: usize,
    /// When this pilot began.
    pub started_at: SystemTime,
    /// The deadline and what follows from it.
    pub timing: watch::Receiver<Option<Timing>>,
    /// The deadline as the batch system told it.
    pub deadline: watch::Receiver<Option<Deadline>>,
}

/// The pages.
pub struct Pages {
    /// What is told of.
    about: About,
    /// The pilot's own figures.
    pub metrics: PilotMetrics,
    usages: Arc<tokio::sync::Mutex<Usages>>,
}

impl Pages {
    /// The pages of one pilot.
    #[must_use]
    pub fn new(about: About, metrics: PilotMetrics) -> Self {
        let usages = Usages::new(about.node.clone(), about.started_at, about.memory);
        Self { about, metrics, usages: Arc::new(tokio::sync::Mutex::new(usages)) }
    }

    /// The answer to a route that only tells.
    pub async fn page(&self, route: &Route, query: Option<&str>, roster: &Arc<Roster>) -> Response<Answer> {
        let plain = CONTENT_TYPE_RESOURCE;
        match route {
            Route::Pods => json(&list(roster.all().iter().map(|view| view.pod.clone()).collect())),
            Route::RunningPods => {
                let running = roster.all().into_iter().filter(|view| is_running(view));
                json(&list(running.map(|view| view.pod.clone()).collect()))
            }
            Route::Config => json(&self.config()),
            Route::Summary => self.summary(query, roster).await,
            Route::ResourceMetrics => {
                typed(StatusCode::OK, plain, resource::render(&self.sample(roster).await))
            }
            Route::ProbeMetrics => typed(StatusCode::OK, plain, probes::render(&roster.all())),
            Route::Metrics => self.own(roster),
            Route::Page => text(StatusCode::OK, self.overview(roster).await),
            _ => text(StatusCode::NOT_FOUND, "404 page not found\n"),
        }
    }

    /// What the pods and the job use now. One at a time: each reads all of /proc that is ours.
    async fn sample(&self, roster: &Arc<Roster>) -> Snapshot {
        let mut usages = Arc::clone(&self.usages).lock_owned().await;
        let pods = roster.all();
        let sampled = tokio::task::spawn_blocking(move || usages.sample(&pods));
        sampled.await.unwrap_or_else(|_| {
            // The runtime ends.
            Snapshot {
                node: self.about.node.clone(),
                started_at: self.about.started_at,
                usage: None,
                nano_cores: None,
                memory_limit: None,
                pods: Vec::new(),
            }
        })
    }

    async fn summary(&self, query: Option<&str>, roster: &Arc<Roster>) -> Response<Answer> {
        let brief = super::find::query(query)
            .any(|(name, value)| name == "only_cpu_and_memory" && matches!(value.as_str(), "true" | "1"));
        let mut snapshot = self.sample(roster).await;
        let extra = if brief { None } else { Some(self.extra(&mut snapshot, roster).await) };
        json(&summary(&snapshot, extra.as_ref(), SystemTime::now()))
    }

    async fn extra(&self, snapshot: &mut Snapshot, roster: &Arc<Roster>) -> Extra {
        let mut logs = Vec::new();
        for pod in &snapshot.pods {
            let view = roster.get(&pod.uid);
            for container in &pod.containers {
                let path = view.as_ref().and_then(|view| {
                    let run = view.containers.get(&container.name)?.restart;
                    log_path(view.directory.as_ref()?, &container.name, run).parent().map(PathBuf::from)
                });
                logs.push(path.unwrap_or_default());
            }
        }
        let pods = self.about.pods.clone();
        // A home directory that hangs costs the summary these figures, not an answer.
        let read = reading_disk(move || Disk::read(&pods, &logs));
        let disk = match tokio::time::timeout(DISK_LIMIT, read).await {
            Ok(Ok(disk)) => disk,
            Ok(Err(_)) | Err(_) => Disk::default(),
        };
        let containers = snapshot.pods.iter_mut().flat_map(|pod| pod.containers.iter_mut());
        for (container, bytes) in containers.zip(&disk.log_bytes) {
            container.log_bytes = *bytes;
        }
        Extra { disk, network: Network::read(), processes: Processes::read() }
    }

    fn own(&self, roster: &Roster) -> Response<Answer> {
        let mut phases: Vec<(&str, u64)> = Vec::new();
        let all = roster.all();
        for view in &all {
            let phase = phase(view);
            match phases.iter_mut().find(|(name, _)| *name == phase) {
                Some((_, count)) => *count += 1,
                None => phases.push((phase, 1)),
            }
        }
        let deadline = self.about.deadline.borrow().clone();
        let now = SystemTime::now();
        let at = Now {
            pods: &phases,
            until_drain: self.about.timing.borrow().map(|t| t.drain.duration_since(now).unwrap_or_default()),
            deadline_source: deadline.as_ref().map(|deadline| deadline.source.as_str()),
            answer_age: deadline.as_ref().map(|d| now.duration_since(d.learnt).unwrap_or_default()),
        };
        match self.metrics.render(&at) {
            Ok(rendered) => typed(StatusCode::OK, CONTENT_TYPE, rendered),
            Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
        }
    }

    fn config(&self) -> serde_json::Value {
        // The few settings that a kubelet has too, under its names.
        serde_json::json!({"kubeletconfig": {
            "kind": "KubeletConfiguration",
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "authentication": {"anonymous": {"enabled": false}, "webhook": {"enabled": true, "cacheTTL": "2m0s"}},
            "authorization": {"mode": "Webhook", "webhook": {"cacheAuthorizedTTL": "5m0s", "cacheUnauthorizedTTL": "30s"}},
            "nodeStatusReportFrequency": "5m0s",
            "nodeLeaseDurationSeconds": 40,
            "containerLogMaxSize": "10Mi",
            "containerLogMaxFiles": 5,
            "enableServer": true,
            "shutdownGracePeriod": self.shutdown_grace(),
        }})
    }

    fn shutdown_grace(&self) -> String {
        let grace =
            self.about.timing.borrow().map(|t| t.deadline.duration_since(t.drain).unwrap_or_default());
        format!("{}s", grace.unwrap_or_default().as_secs())
    }

    /// What a person wants to know first.
    async fn overview(&self, roster: &Arc<Roster>) -> String {
        let snapshot = self.sample(roster).await;
        let about = &self.about;
        let mut page = String::new();
        let job = about.job.as_deref().unwrap_or("none");
        let _ = writeln!(page, "jiriaf-pilot {}: Node {}", env!("CARGO_PKG_VERSION"), about.node);
        let _ = writeln!(
            page,
            "site {}, batch system {}, job {job}, host {}",
            about.site, about.batch, about.host
        );
        let _ = writeln!(page, "granted: {} CPUs, {} of memory", about.cpus, mebibytes(about.memory));
        if let Some(usage) = &snapshot.usage {
            let cores = snapshot.nano_cores.map_or_else(|| "?".to_owned(), cores);
            let _ =
                writeln!(page, "in use:  {cores} CPUs, {} of memory", mebibytes(usage.memory.working_set));
        }
        let timing = *about.timing.borrow();
        let deadline = about.deadline.borrow().clone();
        match (timing, deadline) {
            (Some(timing), Some(deadline)) => {
                let _ = writeln!(page, "deadline {} ({})", moment(timing.deadline), deadline.source);
                let _ = writeln!(
                    page,
                    "no pods are taken from {}, pods are ended at {}",
                    moment(timing.cordon),
                    moment(timing.drain)
                );
            }
            _ => page.push_str("no deadline is known\n"),
        }
        page.push('\n');
        let _ = writeln!(
            page,
            "{:<20} {:<36} {:<10} {:<20} {:>8} {:>8} {:>10}",
            "NAMESPACE", "POD", "PHASE", "CONTAINER", "RESTARTS", "CPU", "MEMORY"
        );
        for view in roster.all() {
            let meta = &view.pod.metadata;
            let uid = meta.uid.as_deref().unwrap_or_default();
            let used = snapshot.pods.iter().find(|pod| pod.uid == uid);
            for (name, container) in &view.containers {
                let usage =
                    used.and_then(|pod| pod.containers.iter().find(|c| c.name == *name)).map(|c| &c.usage);
                let cpu = usage.and_then(|u| u.nano_cores).map(cores);
                let _ = writeln!(
                    page,
                    "{:<20} {:<36} {:<10} {:<20} {:>8} {:>8} {:>10}",
                    meta.namespace.as_deref().unwrap_or_default(),
                    meta.name.as_deref().unwrap_or_default(),
                    phase(&view),
                    name,
                    container.restart,
                    cpu.unwrap_or_else(|| "-".to_owned()),
                    usage.map_or_else(|| "-".to_owned(), |u| mebibytes(u.working_set)),
                );
            }
        }
        page
    }
}

/// What Prometheus' and the metrics server's parsers take (the text format of version 0.0.4).
const CONTENT_TYPE_RESOURCE: &str = "text/plain; version=0.0.4; charset=utf-8";

fn list(items: Vec<Pod>) -> List<Pod> {
    List { items, metadata: Default::default() }
}

fn json(value: &impl serde::Serialize) -> Response<Answer> {
    match serde_json::to_string(value) {
        Ok(body) => typed(StatusCode::OK, "application/json", body),
        Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
    }
}

fn phase(view: &PodView) -> &str {
    view.pod.status.as_ref().and_then(|status| status.phase.as_deref()).unwrap_or("Pending")
}

fn is_running(view: &PodView) -> bool {
    view.containers.values().any(|container| container.state.is_running())
}

fn moment(at: SystemTime) -> String {
    Timestamp::try_from(at).map_or_else(|_| "never".to_owned(), |at| format!("{at:.0}"))
}

fn cores(nano_cores: u64) -> String {
    format!("{}.{:03}", nano_cores / 1_000_000_000, nano_cores / 1_000_000 % 1000)
}

fn mebibytes(bytes: u64) -> String {
    format!("{}Mi", bytes >> 20)
}
