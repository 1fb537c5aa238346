//! A Job as `play` runs it: pods one after another, as many at once as it allows, tried again as often as it allows.
//!
//! Pure: [`JobRun::next`] says which pod to start, [`JobRun::ended`] takes in how one ended. What is simpler than in
//! Kubernetes: each completion is a slot of its own, also where completionMode is NonIndexed.

use std::time::{Duration, SystemTime};

use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{EnvVar, Pod, PodSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

/// backoffLimit when a Job names none (batch/v1).
const BACKOFF_LIMIT: i32 = 6;

/// Wait before the first retry. Kubernetes waits 10 s, doubled up to 6 min; somebody at a terminal waits less.
const RETRY_FIRST: Duration = Duration::from_secs(1);

/// Longest wait before a retry.
const RETRY_MOST: Duration = Duration::from_secs(60);

/// Where a pod puts its completion index (batch/v1, Indexed completion).
const INDEX: &str = "batch.kubernetes.io/job-completion-index";

/// A pod's place in its Job: the completion, and the how-manieth try.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slot {
    index: u32,
    attempt: u32,
}

/// How far a Job is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// More is to come.
    Running,
    /// All completions succeeded.
    Complete,
    /// More pods failed than it allows.
    Failed,
}

/// A Job under way.
#[derive(Debug)]
pub struct JobRun {
    job: Job,
    completions: u32,
    parallelism: u32,
    limit: u32,
    indexed: bool,
    next: u32,
    retries: Vec<(SystemTime, Slot)>,
    active: u32,
    succeeded: u32,
    failures: u32,
}

impl JobRun {
    /// A Job that has not begun.
    #[must_use]
    pub fn new(job: Job) -> Self {
        let spec = job.spec.clone().unwrap_or_default();
        let count = |number: i32| u32::try_from(number).unwrap_or(0);
        let parallelism = count(spec.parallelism.unwrap_or(1));
        // Without completions a Job is done when its pods are (batch/v1: a work queue).
        let completions = spec.completions.map_or(parallelism, count);
        Self {
            completions,
            parallelism,
            limit: count(spec.backoff_limit.unwrap_or(BACKOFF_LIMIT)),
            indexed: spec.completion_mode.as_deref() == Some("Indexed"),
            job,
            next: 0,
            retries: Vec::new(),
            active: 0,
            succeeded: 0,
            failures: 0,
        }
    }

    /// How many pods it makes when none fails.
    #[must_use]
    pub fn completions(&self) -> u32 {
        self.completions
    }

    /// How many pods it is still to start, as far as is known.
    #[must_use]
    pub fn waiting(&self) -> u32 {
        match self.progress() {
            Progress::Running => self.completions.saturating_sub(self.succeeded + self.active),
            Progress::Complete | Progress::Failed => 0,
        }
    }

    /// How far it is.
    #[must_use]
    pub fn progress(&self) -> Progress {
        if self.failures > self.limit {
            Progress::Failed
        } else if self.succeeded >= self.completions {
            Progress::Complete
        } else {
            Progress::Running
        }
    }

    /// The next pod to start, if one may start at `now`. It counts as started.
    pub fn next(&mut self, now: SystemTime) -> Option<Slot> {
        if self.progress() != Progress::Running || self.active >= self.parallelism {
            return None;
        }
        let slot = if let Some(due) = self.retries.iter().position(|(at, _)| *at <= now) {
            self.retries.remove(due).1
        } else if self.next < self.completions {
            self.next += 1;
            Slot { index: self.next - 1, attempt: 0 }
        } else {
            return None;
        };
        self.active += 1;
        Some(slot)
    }

    /// A pod that [`next`](Self::next) gave could not be started yet: it is the next one again.
    pub fn put_back(&mut self, slot: Slot) {
        self.active -= 1;
        self.retries.insert(0, (SystemTime::UNIX_EPOCH, slot));
    }

    /// Takes in a pod's end.
    pub fn ended(&mut self, slot: Slot, succeeded: bool, now: SystemTime) {
        self.active = self.active.saturating_sub(1);
        if succeeded {
            self.succeeded += 1;
            return;
        }
        self.failures += 1;
        let doubled = RETRY_FIRST.saturating_mul(1 << (self.failures - 1).min(16));
        let again = Slot { attempt: slot.attempt + 1, ..slot };
        self.retries.push((now + doubled.min(RETRY_MOST), again));
    }

    /// Whether a pod of restartPolicy OnFailure has been restarted too often (the Job controller's
    /// pastBackoffLimitOnFailure: at the limit, or at the first restart where the limit is 0).
    #[must_use]
    pub fn is_past_limit(&self, restarts: u32) -> bool {
        restarts > 0 && restarts >= self.limit
    }

    /// Ends the Job: it has failed.
    pub fn fail(&mut self) {
        self.failures = self.failures.max(self.limit.saturating_add(1));
    }

    /// The pod of a slot.
    #[must_use]
    pub fn pod(&self, slot: Slot, uid: String) -> Pod {
        let template = self.job.spec.as_ref().map(|spec| spec.template.clone()).unwrap_or_default();
        let name = self.job.metadata.name.clone().unwrap_or_default();
        let mut meta = ObjectMeta {
            name: Some(match slot.attempt {
                0 => format!("{name}-{}", slot.index),
                attempt => format!("{name}-{}-{attempt}", slot.index),
            }),
            namespace: self.job.metadata.namespace.clone(),
            uid: Some(uid),
            labels: template.metadata.as_ref().and_then(|m| m.labels.clone()),
            annotations: template.metadata.and_then(|m| m.annotations),
            ..ObjectMeta::default()
        };
        let labels = meta.labels.get_or_insert_default();
        labels.insert("batch.kubernetes.io/job-name".to_owned(), name.clone());
        labels.insert("job-name".to_owned(), name);
        let mut spec = template.spec.unwrap_or_default();
        if self.indexed {
            labels.insert(INDEX.to_owned(), slot.index.to_string());
            meta.annotations.get_or_insert_default().insert(INDEX.to_owned(), slot.index.to_string());
            add_index(&mut spec, slot.index);
        }
        Pod { metadata: meta, spec: Some(spec), status: None }
    }
}

fn add_index(spec: &mut PodSpec, index: u32) {
    for container in spec.init_containers.iter_mut().flatten().chain(&mut spec.containers) {
        let env = container.env.get_or_insert_default();
        if env.iter().all(|var| var.name != "JOB_COMPLETION_INDEX") {
            let value = Some(index.to_string());
            env.push(EnvVar { name: "JOB_COMPLETION_INDEX".to_owned(), value, value_from: None });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(spec: &str) -> JobRun {
        let text = format!(
            "apiVersion: batch/v1\nkind: Job\nmetadata: {{name: j, namespace: default}}\nspec: {{{spec}, template: {{spec: {{containers: [{{name: c}}]}}}}}}\n"
        );
        JobRun::new(serde_saphyr::from_str(&text).unwrap())
    }

    fn name(job: &JobRun, slot: Slot) -> String {
        job.pod(slot, "u".to_owned()).metadata.name.unwrap()
    }

    #[test]
    fn as_many_pods_run_at_once_as_it_allows() {
        let now = SystemTime::UNIX_EPOCH;
        let mut job = run("completions: 3, parallelism: 2");
        let first = job.next(now).unwrap();
        let second = job.next(now).unwrap();
        assert_eq!((name(&job, first), name(&job, second)), ("j-0".to_owned(), "j-1".to_owned()));
        assert_eq!(job.next(now), None);
        job.ended(second, true, now);
        let third = job.next(now).unwrap();
        job.ended(first, true, now);
        assert_eq!(job.progress(), Progress::Running);
        job.ended(third, true, now);
        assert_eq!((job.progress(), job.next(now)), (Progress::Complete, None));
    }

    #[test]
    fn a_failed_pod_is_tried_again_later_until_the_limit() {
        let mut now = SystemTime::UNIX_EPOCH;
        let mut job = run("backoffLimit: 2");
        let mut names = Vec::new();
        while job.progress() == Progress::Running {
            let slot = job.next(now).unwrap();
            names.push(name(&job, slot));
            job.ended(slot, false, now);
            assert_eq!(job.next(now), None, "not at once");
            now += Duration::from_secs(60);
        }
        assert_eq!(names, ["j-0", "j-0-1", "j-0-2"]);
        assert_eq!((job.progress(), job.next(now)), (Progress::Failed, None));
    }

    #[test]
    fn an_indexed_pod_knows_its_index_and_one_put_back_comes_again() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1);
        let mut job = run("completions: 2, parallelism: 2, completionMode: Indexed");
        let first = job.next(now).unwrap();
        job.put_back(first);
        assert_eq!(job.next(now), Some(first));
        let second = job.next(now).unwrap();
        let pod = job.pod(second, "u".to_owned());
        let env = pod.spec.unwrap().containers[0].env.clone().unwrap();
        assert_eq!(env[0].value.as_deref(), Some("1"));
    }

    #[test]
    fn restarts_count_against_the_limit() {
        assert!(run("backoffLimit: 0").is_past_limit(1) && !run("backoffLimit: 0").is_past_limit(0));
        assert!(run("backoffLimit: 2").is_past_limit(2) && !run("backoffLimit: 2").is_past_limit(1));
    }
}
