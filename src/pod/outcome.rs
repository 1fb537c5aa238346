//! How pods ended: kept as JSON files beside the logs, and as the table that a job's output ends with.
//!
//! Kubernetes deletes a Node's pods within a minute of the Node, so this is where an outcome is looked up afterwards.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Pod, PodStatus};
use serde::{Deserialize, Serialize};

use super::containers::{self, Kind};
use super::directory;
use crate::files;

/// Outcomes that are remembered for the table. A whole-day pilot with short pods ends thousands; their files stay.
pub const REMEMBERED: usize = 1000;

/// How a pod ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outcome {
    /// The pod's namespace.
    pub namespace: String,
    /// The pod's name.
    pub name: String,
    /// The pod's uid.
    pub uid: String,
    /// Succeeded or Failed.
    pub phase: String,
    /// The pod's reason, such as Terminated.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The pod's message.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// Whether the API server has acknowledged the status.
    pub reported: bool,
    /// Its containers.
    pub containers: Vec<ContainerOutcome>,
}

/// How a container ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerOutcome {
    /// The container's name.
    pub name: String,
    /// Its exit code, where it ran.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<i32>,
    /// Why it ended or why it never ran.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// How often it was restarted.
    pub restarts: i32,
    /// When it started.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub started_at: Option<Timestamp>,
    /// When it ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub finished_at: Option<Timestamp>,
    /// Lines of output that could not be written.
    pub log_lines_lost: u64,
    /// Its last log.
    pub log: PathBuf,
}

impl Outcome {
    /// The outcome that a final status tells; `logs` gives each container's log and its lost lines.
    #[must_use]
    pub fn new(pod: &Pod, status: &PodStatus, reported: bool, logs: impl Fn(&str) -> (PathBuf, u64)) -> Self {
        // Init containers that have done their work say nothing of the end; one that has not is why there was no more.
        let init = status.init_container_statuses.iter().flatten().filter(|status| {
            let end = status.state.as_ref().and_then(|state| state.terminated.as_ref());
            let kind = containers::find(pod, &status.name).map(|(kind, _)| kind);
            kind == Some(Kind::Init) && end.is_some_and(|end| end.exit_code != 0)
        });
        let containers = init.chain(status.container_statuses.iter().flatten()).map(|container| {
            let state = container.state.as_ref();
            let ended = state.and_then(|s| s.terminated.as_ref());
            let waiting = state.and_then(|s| s.waiting.as_ref());
            let (log, log_lines_lost) = logs(&container.name);
            ContainerOutcome {
                name: container.name.clone(),
                exit_code: ended.map(|e| e.exit_code),
                reason: ended
                    .and_then(|e| e.reason.clone())
                    .or_else(|| waiting.and_then(|w| w.reason.clone())),
                restarts: container.restart_count,
                started_at: ended.and_then(|e| e.started_at.as_ref()).map(|t| t.0),
                finished_at: ended.and_then(|e| e.finished_at.as_ref()).map(|t| t.0),
                log_lines_lost,
                log,
            }
        });
        Self {
            namespace: pod.metadata.namespace.clone().unwrap_or_default(),
            name: pod.metadata.name.clone().unwrap_or_default(),
            uid: pod.metadata.uid.clone().unwrap_or_default(),
            phase: status.phase.clone().unwrap_or_default(),
            reason: status.reason.clone(),
            message: status.message.clone(),
            reported,
            containers: containers.collect(),
        }
    }

    /// A pod that had not ended when the time was over.
    #[must_use]
    pub fn running(pod: &Pod) -> Self {
        let status = PodStatus {
            phase: Some("Running".to_owned()),
            reason: Some("NotEnded".to_owned()),
            ..PodStatus::default()
        };
        Self::new(pod, &status, false, |_| (PathBuf::new(), 0))
    }

    /// Writes the outcome into the kept directory.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn keep(&self, kept: &Path) -> std::io::Result<PathBuf> {
        directory::make_kept(kept)?;
        let name = directory::kept_name(&self.namespace, &self.name, &self.uid);
        let path = kept.join(format!("{name}.json"));
        files::write_atomic(&path, &serde_json::to_vec_pretty(self)?, 0o600)?;
        Ok(path)
    }

    /// One line: for the log and for an event.
    #[must_use]
    pub fn summary(&self) -> String {
        let mut text = self.phase.clone();
        if let Some(reason) = &self.reason {
            let _ = write!(text, " ({reason})");
        }
        for container in &self.containers {
            let _ = write!(text, "; {} {}", container.name, container.how());
        }
        text
    }
}

impl ContainerOutcome {
    fn how(&self) -> String {
        let mut text = match (self.exit_code, &self.reason) {
            (Some(code), _) => format!("exit {code}"),
            (None, Some(reason)) => reason.clone(),
            (None, None) => "never ran".to_owned(),
        };
        if self.restarts > 0 {
            let _ = write!(text, ", {} restarts", self.restarts);
        }
        if self.log_lines_lost > 0 {
            let _ = write!(text, ", {} log lines lost", self.log_lines_lost);
        }
        text
    }
}

/// The table that a pilot's output ends with. Empty when nothing ran.
#[must_use]
pub fn table(outcomes: &[Outcome]) -> String {
    let mut rows = vec![["POD", "PHASE", "CONTAINER", "ENDED", "RAN", "LOG"].map(str::to_owned)];
    for outcome in outcomes {
        let pod = if outcome.namespace == "default" {
            outcome.name.clone()
        } else {
            format!("{}/{}", outcome.namespace, outcome.name)
        };
        let mut phase = outcome.phase.clone();
        if let Some(reason) = &outcome.reason {
            let _ = write!(phase, " ({reason})");
        }
        if !outcome.reported {
            phase.push_str(" NOT REPORTED");
        }
        if outcome.containers.is_empty() {
            rows.push([
                pod.clone(),
                phase.clone(),
                "-".to_owned(),
                "-".to_owned(),
                "-".to_owned(),
                "-".to_owned(),
            ]);
        }
        for container in &outcome.containers {
            let ran = match (container.started_at, container.finished_at) {
                (Some(start), Some(end)) => {
                    format!("{:.0?}s", (end - start).total(jiff::Unit::Second).unwrap_or(0.0))
                }
                _ => "-".to_owned(),
            };
            let log = container.log.display().to_string();
            rows.push([pod.clone(), phase.clone(), container.name.clone(), container.how(), ran, log]);
        }
    }
    if rows.len() == 1 {
        return String::new();
    }
    aligned(&rows)
}

/// Columns as wide as their widest cell; the last one is left as it is.
fn aligned<const N: usize>(rows: &[[String; N]]) -> String {
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: [usize; N] = std::array::from_fn(width);
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(widths) {
            let _ = write!(line, "{cell:<width$}  ");
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(name: &str, code: Option<i32>) -> Outcome {
        Outcome {
            namespace: "default".to_owned(),
            name: name.to_owned(),
            uid: "aaaaaaaa-1".to_owned(),
            phase: "Failed".to_owned(),
            reason: None,
            message: None,
            reported: true,
            containers: vec![ContainerOutcome {
                name: "c1".to_owned(),
                exit_code: code,
                reason: Some("Error".to_owned()),
                restarts: 0,
                started_at: "2026-01-01T00:00:00Z".parse().ok(),
                finished_at: "2026-01-01T00:00:05Z".parse().ok(),
                log_lines_lost: 0,
                log: PathBuf::from("/home/a/p1/containers/c1/logs/0.log"),
            }],
        }
    }

    #[test]
    fn the_table_says_how_each_container_ended_and_where_its_log_is() {
        let text = table(&[outcome("p1", Some(7)), outcome("a-longer-name", None)]);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 3);
        assert!(
            lines[1].contains("exit 7") && lines[1].contains("5s") && lines[1].ends_with("0.log"),
            "{text}"
        );
        assert!(lines[2].contains("Error"), "{text}");
        assert_eq!(table(&[]), "");
    }

    #[test]
    fn an_init_container_that_failed_is_named_and_one_that_has_done_its_work_is_not() {
        let pod = serde_json::from_value(serde_json::json!({"metadata": {}, "spec": {
            "initContainers": [{"name": "done"}, {"name": "failed"}, {"name": "side", "restartPolicy": "Always"}],
            "containers": [{"name": "main"}]}}));
        let end = |name: &str, code: i32| {
            let state = serde_json::json!({"terminated": {"exitCode": code, "reason": "Error"}});
            serde_json::json!({"name": name, "state": state, "image": "", "imageID": "", "ready": false, "restartCount": 0})
        };
        let status = serde_json::from_value(serde_json::json!({"phase": "Failed",
            "initContainerStatuses": [end("done", 0), end("failed", 6), end("side", 143)],
            "containerStatuses": [{"name": "main", "state": {"waiting": {"reason": "PodInitializing"}}, "image": "",
                "imageID": "", "ready": false, "restartCount": 0}]}));
        let outcome = Outcome::new(&pod.unwrap(), &status.unwrap(), true, |name| (PathBuf::from(name), 0));
        assert_eq!(outcome.summary(), "Failed; failed exit 6; main PodInitializing");
    }

    #[test]
    fn what_was_not_reported_is_said() {
        let mut lost = outcome("p1", Some(0));
        lost.reported = false;
        assert!(table(&[lost]).contains("NOT REPORTED"));
    }
}
