//! The pilot's own figures, the text of `/metrics`.
//!
//! [`PilotMetrics`] is cheap to clone and to count with, from anywhere; [`PilotMetrics::render`] adds what is only known
//! when somebody asks. Labels have few values each: nothing that a client chooses may become one.

use std::fmt::Error;
use std::sync::Arc;
use std::time::Duration;

use prometheus_client::encoding::prometheus_text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Registry, Unit};

/// What all names begin with.
const PREFIX: &str = "jiriaf_pilot";

/// Bounds of the start latencies, in seconds: a start takes some 20 ms, the service level objective for pods is 5 s, and
/// missing objects are tried for again every 5 s.
const START_BOUNDS: [f64; 14] =
    [0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0];

/// The phases of pods.
const PHASES: [&str; 5] = ["Pending", "Running", "Succeeded", "Failed", "Unknown"];

type Label = (&'static str, &'static str);
type Labels = [Label; 2];

/// From when a start is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StartedFrom {
    /// The scheduler's binding, as the pod's condition PodScheduled has it, in whole seconds.
    Bound,
    /// The pilot's admission.
    Admitted,
}

/// What is only known at the moment of a scrape.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Now<'a> {
    /// How many pods are in each phase; phases that are not named have none.
    pub pods: &'a [(&'a str, u64)],
    /// Until the drain; none where there is no deadline.
    pub until_drain: Option<Duration>,
    /// Where the deadline was learnt.
    pub deadline_source: Option<&'a str>,
    /// How old the last answer of the batch system is.
    pub answer_age: Option<Duration>,
}

/// The pilot's own figures.
#[derive(Debug, Clone)]
pub struct PilotMetrics {
    registry: Arc<Registry>,
    start: Family<[Label; 1], Histogram, fn() -> Histogram>,
    api_errors: Family<Labels, Counter>,
    containers_started: Counter,
    containers_ended: Counter,
    requests: Family<Labels, Counter>,
}

impl Default for PilotMetrics {
    fn default() -> Self {
        Self::new()
    }
}

impl PilotMetrics {
    /// All at zero.
    #[must_use]
    pub fn new() -> Self {
        let start = Family::new_with_constructor((|| Histogram::new(START_BOUNDS)) as fn() -> Histogram);
        let (api_errors, requests) = (Family::default(), Family::default());
        let (containers_started, containers_ended) = (Counter::default(), Counter::default());
        let mut registry = Registry::with_prefix(PREFIX);
        registry.register(
            "build",
            "The version that runs",
            Info::new([("version", env!("CARGO_PKG_VERSION"))]),
        );
        registry.register_with_unit(
            "pod_start",
            "Time until all containers of a pod had started, since it was bound or admitted",
            Unit::Seconds,
            start.clone(),
        );
        registry.register(
            "api_errors",
            "Calls to the API server that failed, by verb and class of the status; none is no answer",
            api_errors.clone(),
        );
        registry.register("containers_started", "Runs of containers that began", containers_started.clone());
        registry.register("containers_ended", "Runs of containers that ended", containers_ended.clone());
        registry.register(
            "http_requests",
            "Requests to the Node's API by route and status",
            requests.clone(),
        );
        // Both are there from the start, so that a rate has a beginning.
        for label in ["admitted", "bound"] {
            drop(start.get_or_create(&[("since", label)]));
        }
        Self {
            registry: Arc::new(registry),
            start,
            api_errors,
            containers_started,
            containers_ended,
            requests,
        }
    }

    /// All containers of a pod have started.
    pub fn pod_started(&self, from: StartedFrom, after: Duration) {
        let since = match from {
            StartedFrom::Bound => "bound",
            StartedFrom::Admitted => "admitted",
        };
        self.start.get_or_create(&[("since", since)]).observe(after.as_secs_f64());
    }

    /// A call to the API server failed, with this HTTP status if there was an answer.
    pub fn api_error(&self, verb: &'static str, status: Option<u16>) {
        let class = status.map_or("none", class);
        self.api_errors.get_or_create(&[("verb", verb), ("class", class)]).inc();
    }

    /// A container's program began.
    pub fn container_started(&self) {
        self.containers_started.inc();
    }

    /// A container's tree has ended.
    pub fn container_ended(&self) {
        self.containers_ended.inc();
    }

    /// A request to the Node's own API was answered. `route` is the pattern that it fell under, never the path itself.
    pub fn request(&self, route: &'static str, status: u16) {
        self.requests.get_or_create(&[("route", route), ("code", code(status))]).inc();
    }

    /// The text of `/metrics`.
    ///
    /// # Errors
    /// Never: it is written to memory.
    pub fn render(&self, now: &Now<'_>) -> Result<String, Error> {
        let mut text = String::new();
        encode(&mut text, &self.registry)?;
        encode(&mut text, &at_scrape(now))?;
        Ok(text)
    }
}

/// What is made anew for each scrape, so that nothing stays that is no longer true.
fn at_scrape(now: &Now<'_>) -> Registry {
    let mut registry = Registry::with_prefix(PREFIX);
    let pods = Family::<[(&str, String); 1], prometheus_client::metrics::gauge::Gauge>::default();
    for phase in PHASES {
        let count = now.pods.iter().filter(|(name, _)| *name == phase).map(|(_, count)| *count).sum::<u64>();
        pods.get_or_create(&[("phase", phase.to_owned())]).set(i64::try_from(count).unwrap_or(i64::MAX));
    }
    registry.register("pods", "Pods of this Node by phase", pods);
    let mut seconds = |name, help, value: Option<Duration>| {
        if let Some(value) = value {
            registry.register_with_unit(name, help, Unit::Seconds, ConstGauge::new(value.as_secs_f64()));
        }
    };
    seconds("until_drain", "Time until the pods are ended; absent without a deadline", now.until_drain);
    seconds("batch_answer_age", "Age of the batch system's last answer", now.answer_age);
    if let Some(source) = now.deadline_source {
        registry.register(
            "deadline",
            "Where the deadline was learnt",
            Info::new([("source", source.to_owned())]),
        );
    }
    registry
}

/// The class of an HTTP status that is an error.
fn class(status: u16) -> &'static str {
    match status / 100 {
        3 => "3xx",
        4 => "4xx",
        5 => "5xx",
        _ => "other",
    }
}

/// The statuses that the Node's API answers with, each by itself; a label has no other values.
fn code(status: u16) -> &'static str {
    match status {
        101 => "101",
        200 => "200",
        400 => "400",
        401 => "401",
        403 => "403",
        404 => "404",
        405 => "405",
        413 => "413",
        422 => "422",
        429 => "429",
        431 => "431",
        500 => "500",
        503 => "503",
        504 => "504",
        _ => "other",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::server::metrics::text_check;

    fn lines(text: &str, prefix: &str) -> Vec<String> {
        text.lines().filter(|line| line.starts_with(prefix)).map(str::to_owned).collect()
    }

    #[test]
    fn a_new_pilot_has_a_valid_text() {
        let text = PilotMetrics::new().render(&Now::default()).unwrap();
        let samples = text_check::samples(&text);
        assert!(samples.iter().all(|sample| sample.name.starts_with("jiriaf_pilot_")), "{text}");
        assert!(samples.iter().all(|sample| sample.millis.is_none()));
        let version = env!("CARGO_PKG_VERSION");
        assert_eq!(
            lines(&text, "jiriaf_pilot_build"),
            [format!("jiriaf_pilot_build_info{{version=\"{version}\"}} 1")]
        );
        assert_eq!(lines(&text, "jiriaf_pilot_pods{").len(), PHASES.len());
        for absent in ["until_drain", "deadline_info", "batch_answer_age"] {
            assert!(!text.contains(absent), "{text}");
        }
    }

    #[test]
    fn what_was_counted_is_told() {
        let metrics = PilotMetrics::new();
        let elsewhere = metrics.clone();
        elsewhere.pod_started(StartedFrom::Admitted, Duration::from_millis(25));
        elsewhere.pod_started(StartedFrom::Admitted, Duration::from_secs(1000));
        elsewhere.api_error("patch", Some(409));
        elsewhere.api_error("patch", Some(422));
        elsewhere.api_error("patch", None);
        elsewhere.container_started();
        elsewhere.container_started();
        elsewhere.container_ended();
        elsewhere.request("/metrics/resource", 200);
        elsewhere.request("/exec", 418);
        let now = Now {
            pods: &[("Running", 3)],
            until_drain: Some(Duration::from_millis(90_500)),
            deadline_source: Some("squeue %e"),
            answer_age: Some(Duration::from_secs(12)),
        };
        let text = metrics.render(&now).unwrap();
        text_check::samples(&text);
        for line in [
            "# HELP jiriaf_pilot_pods Pods of this Node by phase.",
            "# TYPE jiriaf_pilot_pods gauge",
            "jiriaf_pilot_pods{phase=\"Running\"} 3",
            "jiriaf_pilot_pods{phase=\"Failed\"} 0",
            "jiriaf_pilot_until_drain_seconds 90.5",
            "jiriaf_pilot_deadline_info{source=\"squeue %e\"} 1",
            "jiriaf_pilot_batch_answer_age_seconds 12.0",
            "# TYPE jiriaf_pilot_pod_start_seconds histogram",
            "jiriaf_pilot_pod_start_seconds_bucket{since=\"admitted\",le=\"0.02\"} 0",
            "jiriaf_pilot_pod_start_seconds_bucket{since=\"admitted\",le=\"0.03\"} 1",
            "jiriaf_pilot_pod_start_seconds_bucket{since=\"admitted\",le=\"300\"} 1",
            "jiriaf_pilot_pod_start_seconds_bucket{since=\"admitted\",le=\"+Inf\"} 2",
            "jiriaf_pilot_pod_start_seconds_count{since=\"admitted\"} 2",
            "jiriaf_pilot_pod_start_seconds_count{since=\"bound\"} 0",
            "# TYPE jiriaf_pilot_api_errors_total counter",
            "jiriaf_pilot_api_errors_total{verb=\"patch\",class=\"4xx\"} 2",
            "jiriaf_pilot_api_errors_total{verb=\"patch\",class=\"none\"} 1",
            "jiriaf_pilot_containers_started_total 2",
            "jiriaf_pilot_containers_ended_total 1",
            "jiriaf_pilot_http_requests_total{route=\"/metrics/resource\",code=\"200\"} 1",
            "jiriaf_pilot_http_requests_total{route=\"/exec\",code=\"other\"} 1",
        ] {
            assert!(text.lines().any(|other| other == line), "{line}\nis not in\n{text}");
        }
    }
}
