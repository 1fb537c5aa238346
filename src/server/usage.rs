//! What all pods use: one [`Usages`] remembers each container's figures from one question to the next.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use super::metrics::{ContainerUsage, Counted, PodUsage, Snapshot};
use crate::allocation::Roots;
use crate::allocation::usage::JobMeter;
use crate::container::usage::{Meter, PgidFiles, Rate, Target, Usage, sample};
use crate::pod::directory::container_dir;
use crate::pod::roster::PodView;
use crate::pod::status::State;

/// A question so soon after another one gets its answer: two scrapers at once cost no more than one.
const SAME: Duration = Duration::from_millis(200);

/// What is remembered of all pods' use.
pub struct Usages {
    node: String,
    started_at: SystemTime,
    memory: u64,
    job: JobMeter,
    job_rate: Rate,
    pgids: PgidFiles,
    pods: BTreeMap<String, PodMeters>,
    last: Option<(Instant, Snapshot)>,
}

#[derive(Default)]
struct PodMeters {
    ended: Counted,
    containers: BTreeMap<String, Run>,
}

struct Run {
    number: u32,
    meter: Meter,
    counted: Counted,
}

impl Usages {
    /// Of the Node of this name, whose pilot began then and was granted so much memory.
    #[must_use]
    pub fn new(node: String, started_at: SystemTime, memory: u64) -> Self {
        Self {
            node,
            started_at,
            memory,
            job: JobMeter::new(&Roots::default()),
            job_rate: Rate::default(),
            pgids: PgidFiles::default(),
            pods: BTreeMap::new(),
            last: None,
        }
    }

    /// Measures all running containers.
    pub fn sample(&mut self, views: &[Arc<PodView>]) -> Snapshot {
        if let Some((_, snapshot)) = self.last.as_ref().filter(|(at, _)| at.elapsed() < SAME) {
            return snapshot.clone();
        }
        let mut pods = self.enter(views);
        let usages = self.measure(&pods);
        let mut usages = usages.into_iter();
        for (pod, view) in &mut pods {
            let Some(meters) = self.pods.get_mut(&pod.uid) else { continue };
            for (name, started_at) in running(view) {
                let (Some(usage), Some(run)) = (usages.next(), meters.containers.get_mut(name)) else {
                    break;
                };
                run.counted = Counted::of(&usage);
                pod.containers.push(ContainerUsage {
                    name: name.to_owned(),
                    started_at,
                    usage,
                    log_bytes: None,
                });
            }
        }
        let usage = self.job.sample();
        let nano_cores = usage.as_ref().and_then(|usage| self.job_rate.update(Instant::now(), usage.cpu));
        let snapshot = Snapshot {
            node: self.node.clone(),
            started_at: self.started_at,
            usage,
            nano_cores,
            memory_limit: Some(self.memory),
            pods: pods.into_iter().map(|(pod, _)| pod).collect(),
        };
        self.last = Some((Instant::now(), snapshot.clone()));
        snapshot
    }

    /// The pods that have running containers, each with its meters in place; those of pods that are gone go.
    fn enter<'a>(&mut self, views: &'a [Arc<PodView>]) -> Vec<(PodUsage, &'a PodView)> {
        let uid = |view: &PodView| view.pod.metadata.uid.clone().unwrap_or_default();
        self.pods.retain(|known, _| views.iter().any(|view| uid(view) == *known));
        let mut pods = Vec::new();
        for view in views {
            let uid = uid(view);
            let meters = self.pods.entry(uid.clone()).or_default();
            for (name, container) in &view.containers {
                let old = meters.containers.get(name).filter(|run| run.number != container.restart);
                if let Some(ended) = old {
                    meters.ended = meters.ended.and(ended.counted);
                    meters.containers.remove(name);
                }
                meters.containers.entry(name.clone()).or_insert_with(|| Run {
                    number: container.restart,
                    meter: Meter::default(),
                    counted: Counted::default(),
                });
            }
            if running(view).next().is_none() {
                continue;
            }
            // A container that waits to run again, or has ended for good, keeps what it used: counters never go down.
            let still = |name: &String| !running(view).any(|(running, _)| running == name);
            let still = meters.containers.iter().filter(|(name, _)| still(name));
            let ended = still.fold(meters.ended, |sum, (_, run)| sum.and(run.counted));
            let meta = &view.pod.metadata;
            let pod = PodUsage {
                namespace: meta.namespace.clone().unwrap_or_default(),
                name: meta.name.clone().unwrap_or_default(),
                uid,
                started_at: view.admitted.into(),
                ended,
                containers: Vec::new(),
            };
            pods.push((pod, view.as_ref()));
        }
        pods
    }

    fn measure(&mut self, pods: &[(PodUsage, &PodView)]) -> Vec<Usage> {
        // Each meter is lent out for the measurement.
        let mut lent: Vec<(String, String, i32, std::path::PathBuf, Meter)> = Vec::new();
        for (pod, view) in pods {
            let Some(meters) = self.pods.get_mut(&pod.uid) else { continue };
            for (name, _) in running(view) {
                let Some(run) = meters.containers.get_mut(name) else { continue };
                let supervisor =
                    view.containers.get(name).and_then(|c| c.run.as_ref()).map_or(0, |r| r.supervisor);
                let directory = view.directory.as_deref().unwrap_or_else(|| Path::new("/nonexistent"));
                let directory = container_dir(directory, name);
                lent.push((
                    pod.uid.clone(),
                    name.to_owned(),
                    supervisor,
                    directory,
                    std::mem::take(&mut run.meter),
                ));
            }
        }
        let mut targets: Vec<Target<'_>> = lent
            .iter_mut()
            .map(|(_, _, supervisor, directory, meter)| Target { supervisor: *supervisor, directory, meter })
            .collect();
        let usages = sample(&mut targets, &self.pgids);
        for (uid, name, _, _, meter) in lent {
            if let Some(run) = self.pods.get_mut(&uid).and_then(|pod| pod.containers.get_mut(&name)) {
                run.meter = meter;
            }
        }
        usages
    }
}

/// The containers of a pod that run, and since when.
fn running(view: &PodView) -> impl Iterator<Item = (&str, SystemTime)> {
    view.containers.iter().filter_map(|(name, container)| match (&container.state, &container.run) {
        (State::Running { started_at, .. }, Some(_)) => Some((name.as_str(), (*started_at).into())),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;

    use super::*;
    use crate::pod::roster::ContainerView;
    use crate::pod::session::RunHandle;

    fn view(containers: &[(&str, u32, bool)]) -> Arc<PodView> {
        let container = |(name, restart, runs): &(&str, u32, bool)| {
            let at = Timestamp::UNIX_EPOCH;
            let state = if *runs {
                State::Running { started_at: at, id: String::new() }
            } else {
                State::Waiting { reason: "CrashLoopBackOff".to_owned(), message: String::new() }
            };
            // Nothing of this process is a container.
            let run = runs.then(|| RunHandle::new(i32::MAX).0);
            (
                (*name).to_owned(),
                ContainerView { state, last: None, restart: *restart, run, probed: Arc::default() },
            )
        };
        let pod = serde_json::json!({"metadata": {"name": "p", "namespace": "n", "uid": "u"}});
        Arc::new(PodView {
            pod: serde_json::from_value(pod).unwrap(),
            admitted: Timestamp::UNIX_EPOCH,
            directory: None,
            isolated: false,
            containers: containers.iter().map(container).collect(),
        })
    }

    #[test]
    fn a_pods_counters_keep_what_its_ended_containers_used() {
        let mut usages = Usages::new("n1".to_owned(), SystemTime::UNIX_EPOCH, 0);
        let mut pod_of = |containers: &[(&str, u32, bool)], c1_used: u64| {
            usages.last = None;
            let snapshot = usages.sample(&[view(containers)]);
            // What a meter would have found.
            if let Some(run) = usages.pods.get_mut("u").and_then(|pod| pod.containers.get_mut("c1")) {
                run.counted.cpu += Duration::from_secs(c1_used);
                run.counted.page_faults += c1_used;
            }
            snapshot.pods.first().map(|pod| (pod.ended.cpu.as_secs(), pod.ended.page_faults))
        };
        assert_eq!(pod_of(&[("c1", 0, true), ("c2", 0, true)], 5), Some((0, 0)));
        // It waits to be started again, with its number or the next one's.
        assert_eq!(pod_of(&[("c1", 0, false), ("c2", 0, true)], 0), Some((5, 5)));
        assert_eq!(pod_of(&[("c1", 1, false), ("c2", 0, true)], 0), Some((5, 5)));
        assert_eq!(pod_of(&[("c1", 1, true), ("c2", 0, true)], 2), Some((5, 5)));
        assert_eq!(pod_of(&[("c1", 1, false), ("c2", 0, true)], 0), Some((7, 7)));
        // Nothing runs: nothing is told.
        assert_eq!(pod_of(&[("c1", 1, false), ("c2", 0, false)], 0), None);
        assert_eq!(pod_of(&[("c1", 1, false), ("c2", 1, true)], 0), Some((7, 7)));
    }
}
