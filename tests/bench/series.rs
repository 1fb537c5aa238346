//! Pods from their binding to their end, one at a time and many at once.

use std::sync::Barrier;
use std::time::{Duration, SystemTime};

use serde_json::{Value, json};

use crate::floors::Floors;
use crate::harness::{Namespace, Pilot, container, pod_spec, wait_until};
use crate::report::{Figure, Report};
use crate::statistics::Samples;
use crate::watch::Watcher;

/// Notes its first and last moment, a second apart: Running is seen in between.
pub const ONE_SECOND: &str = "begin=$EPOCHREALTIME\nsleep 1\necho \"$begin $EPOCHREALTIME\" >times\n";

/// Is over at once.
pub const SHORT: &str = "begin=$EPOCHREALTIME\necho \"$begin $EPOCHREALTIME\" >times\n";

/// Takes no memory of its own: bash becomes sleep.
pub const SLEEP: &str = "exec sleep 600\n";

/// After each pod that stands alone: what follows its end (an event, its supervisor's good-bye) is not the next
/// one's burden.
const PAUSE: Duration = Duration::from_millis(50);

/// Connections that create pods at once. More would measure TLS handshakes.
const CREATORS: usize = 5;

/// Where pods are made, run and seen.
#[derive(Clone, Copy)]
pub struct Place<'a> {
    pub watcher: &'a Watcher,
    pub namespace: &'a Namespace,
    pub pilot: &'a Pilot,
}

/// Pods of one kind.
pub struct Series<'a> {
    pub place: Place<'a>,
    /// Begins the pods' names; the name of their ConfigMap.
    pub label: String,
    pub script: &'static str,
    /// Whether the pods have the service account's token, as every pod has that does not say otherwise.
    pub token: bool,
}

/// The moments of one pod.
pub struct Moments {
    asked: SystemTime,
    bound: SystemTime,
    first: SystemTime,
    running: Option<SystemTime>,
    last: SystemTime,
    succeeded: SystemTime,
}

impl Series<'_> {
    /// So many pods, each after the end of the one before.
    pub fn one_at_a_time(&self, count: usize) -> Vec<Moments> {
        self.place.namespace.config_map(&self.label, &[("run.sh", self.script)]);
        let moments = (0..count)
            .map(|index| {
                let name = self.name(index);
                let asked = self.create(&name);
                self.wait_ended(&name);
                std::thread::sleep(PAUSE);
                self.moments(&name, asked)
            })
            .collect();
        self.clear();
        moments
    }

    /// So many pods, created at the same time.
    pub fn at_once(&self, count: usize) -> Vec<Moments> {
        let asked = self.create_at_once(count);
        let names: Vec<String> = (0..count).map(|index| self.name(index)).collect();
        names.iter().for_each(|name| self.wait_ended(name));
        let moments = names.iter().zip(asked).map(|(name, asked)| self.moments(name, asked)).collect();
        self.clear();
        moments
    }

    /// Creates them, and returns when each was asked for.
    fn create_at_once(&self, count: usize) -> Vec<SystemTime> {
        self.place.namespace.config_map(&self.label, &[("run.sh", self.script)]);
        let barrier = Barrier::new(CREATORS);
        let mut asked: Vec<(usize, SystemTime)> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..CREATORS)
                .map(|first| {
                    let barrier = &barrier;
                    scope.spawn(move || {
                        // The connection is open before the clock runs.
                        self.place.namespace.of("configmaps").get(&self.label);
                        barrier.wait();
                        let mine = (first..count).step_by(CREATORS);
                        mine.map(|index| (index, self.create(&self.name(index)))).collect::<Vec<_>>()
                    })
                })
                .collect();
            threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
        });
        asked.sort_by_key(|(index, _)| *index);
        asked.into_iter().map(|(_, at)| at).collect()
    }

    /// Creates them and waits until the watcher has seen all of them run.
    pub fn start(&self, count: usize) {
        self.create_at_once(count);
        for index in 0..count {
            self.place
                .watcher
                .wait("running", &self.place.namespace.name, &self.name(index), |seen| seen.running);
        }
    }

    fn name(&self, index: usize) -> String {
        format!("{}-{index}", self.label)
    }

    fn create(&self, name: &str) -> SystemTime {
        let pod = self.pod(name);
        let pods = self.place.namespace.of("pods");
        let asked = SystemTime::now();
        pods.create(&pod);
        asked
    }

    fn pod(&self, name: &str) -> Value {
        let mut spec = pod_spec("Never", &[container("c1", &self.label)]);
        // Bound as it is created: the scheduler's time is no part of what is measured.
        spec["nodeName"] = self.place.pilot.node.as_str().into();
        if self.token {
            spec.as_object_mut().unwrap().remove("automountServiceAccountToken");
        }
        self.place.pilot.place(&mut spec);
        json!({"metadata": {"name": name, "labels": {"series": self.label}}, "spec": spec})
    }

    fn wait_ended(&self, name: &str) {
        self.place.watcher.wait("ended", &self.place.namespace.name, name, |seen| seen.ended);
    }

    fn moments(&self, name: &str, asked: SystemTime) -> Moments {
        let seen = self.place.watcher.seen(&self.place.namespace.name, name);
        assert_eq!(seen.status["phase"], "Succeeded", "{name}: {:#}", seen.status);
        let times = self.place.pilot.pod_directory(name).join("containers/c1/times");
        let text =
            std::fs::read_to_string(&times).unwrap_or_else(|error| panic!("{}: {error}", times.display()));
        let (first, last) = text.trim().split_once(' ').unwrap();
        Moments {
            asked,
            bound: seen.bound.unwrap(),
            first: moment(first),
            running: seen.running,
            last: moment(last),
            succeeded: seen.ended.unwrap(),
        }
    }

    /// Deletes the pods and waits until nothing of them is left.
    fn clear(&self) {
        let pods = self.place.namespace.of("pods");
        let selector = format!("series={}", self.label);
        for pod in pods.list(&selector) {
            pods.delete(pod["metadata"]["name"].as_str().unwrap(), None);
        }
        wait_until("the series is gone", crate::harness::seconds(120), || pods.list(&selector).is_empty());
    }
}

/// `$EPOCHREALTIME`: seconds and six decimals since 1970.
pub fn moment(text: &str) -> SystemTime {
    let micros: u64 = text.replace(['.', ','], "").parse().unwrap_or_else(|error| panic!("{text}: {error}"));
    SystemTime::UNIX_EPOCH + Duration::from_micros(micros)
}

/// The figures of all series, into the table.
pub fn tell(
    report: &mut Report,
    floors: &Floors,
    seen: &[Moments],
    short: &[Moments],
    token: &[Moments],
    burst: &[Moments],
) {
    let start = floors.read.quantile(50) + floors.execs.quantile(50);
    let patch = floors.patch.quantile(50);
    let bound = |pods: &[Moments]| samples(pods, |pod| Some((pod.bound, pod.first)));
    let asked = |pods: &[Moments]| samples(pods, |pod| Some((pod.asked, pod.first)));
    let running = samples(seen, |pod| pod.running.map(|running| (pod.first, running)));
    let end = |pods: &[Moments]| samples(pods, |pod| Some((pod.last, pod.succeeded)));
    let one = "bound → first line";
    report.push(Figure::times(one, &bound(seen)).floor_is(start).goal(8.0, Some(20.0)));
    report.push(Figure::times("create sent → first line", &asked(seen)));
    report.push(Figure::times("bound → first line, short script", &bound(short)).floor_is(start));
    let with_token = start + floors.token.quantile(50);
    report.push(Figure::times("bound → first line, with a token", &bound(token)).floor_is(with_token));
    report.push(Figure::times("first line → Running seen", &running).floor_is(patch).goal(8.0, None));
    let last = "last line → Succeeded seen";
    report.push(Figure::times(last, &end(seen)).floor_is(patch).goal(8.0, Some(30.0)));
    report.push(Figure::times("last line → Succeeded seen, short script", &end(short)).floor_is(patch));
    report.push(Figure::times("50 at once: bound → first line", &bound(burst)).goal(200.0, None));
    report.push(Figure::times("50 at once: last line → Succeeded seen", &end(burst)).goal(100.0, None));
}

fn samples(pods: &[Moments], between: impl Fn(&Moments) -> Option<(SystemTime, SystemTime)>) -> Samples {
    let mut samples = Samples::default();
    for (from, to) in pods.iter().filter_map(between) {
        samples.push(from, to);
    }
    samples
}
