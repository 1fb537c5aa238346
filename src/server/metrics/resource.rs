//! The text of `/metrics/resource`, from which the metrics server and Prometheus learn what is used.
//!
//! Labels stand as `container, pod, namespace` and `namespace, pod`: the pod's name is second in both, where the
//! virtual kubelet's end-to-end tests look for it (`test/e2e/basic.go`, TestGetMetricsResource). metrics-server and
//! Prometheus take them in any order. Swap is left out: a process's share of it is not to be had cheaply.

use std::time::Duration;

use super::text::{Quoted, Text, since_epoch};
use super::{ContainerUsage, PodUsage, Snapshot};

/// The text; samples of one name stand together, as the format wants it.
#[must_use]
pub fn render(snapshot: &Snapshot) -> String {
    // A sample has some 110 bytes, and a container has three.
    let containers: usize = snapshot.pods.iter().map(|pod| pod.containers.len()).sum();
    let mut text = Text::with_capacity(2048 + containers * 512);
    let containers = || {
        let pairs = |pod| move |container| (pod, container);
        snapshot.pods.iter().flat_map(move |pod: &PodUsage| pod.containers.iter().map(pairs(pod)))
    };
    text.family(
        "container_cpu_usage_seconds_total",
        "counter",
        "CPU time used by the container, in core-seconds.",
    );
    for (pod, container) in containers() {
        text.container("container_cpu_usage_seconds_total", pod, container);
        text.value(&seconds(container.usage.cpu), Some(container.usage.at));
    }
    text.family(
        "container_memory_working_set_bytes",
        "gauge",
        "Memory of the container's processes that cannot be reclaimed, in bytes.",
    );
    for (pod, container) in containers() {
        text.container("container_memory_working_set_bytes", pod, container);
        text.value(&container.usage.working_set, Some(container.usage.at));
    }
    text.family(
        "container_start_time_seconds",
        "gauge",
        "Start of the container, in seconds since the Unix epoch.",
    );
    for (pod, container) in containers() {
        text.container("container_start_time_seconds", pod, container);
        text.value(&seconds(since_epoch(container.started_at)), None);
    }
    if let Some(usage) = &snapshot.usage {
        text.family(
            "node_cpu_usage_seconds_total",
            "counter",
            "CPU time used by the job on this host, in core-seconds.",
        );
        text.push("node_cpu_usage_seconds_total");
        text.value(&seconds(usage.cpu), Some(usage.at));
        text.family(
            "node_memory_working_set_bytes",
            "gauge",
            "Memory of the job on this host that cannot be reclaimed, in bytes.",
        );
        text.push("node_memory_working_set_bytes");
        text.value(&usage.memory.working_set, Some(usage.at));
    }
    let pods = || snapshot.pods.iter().filter_map(|pod| Some((pod, pod.at()?)));
    text.family("pod_cpu_usage_seconds_total", "counter", "CPU time used by the pod, in core-seconds.");
    for (pod, at) in pods() {
        text.pod("pod_cpu_usage_seconds_total", pod);
        text.value(&seconds(pod.counted().cpu), Some(at));
    }
    text.family(
        "pod_memory_working_set_bytes",
        "gauge",
        "Memory of the pod's processes that cannot be reclaimed, in bytes.",
    );
    for (pod, at) in pods() {
        text.pod("pod_memory_working_set_bytes", pod);
        text.value(&pod.sum(|usage| usage.working_set), Some(at));
    }
    text.family("resource_scrape_error", "gauge", "1 if something could not be measured, 0 otherwise.");
    text.push("resource_scrape_error");
    text.value(&u8::from(snapshot.usage.is_none()), None);
    text.into_string()
}

impl Text {
    fn container(&mut self, name: &str, pod: &PodUsage, container: &ContainerUsage) {
        let (container, pod, namespace) =
            (Quoted(&container.name), Quoted(&pod.name), Quoted(&pod.namespace));
        self.write(format_args!(r#"{name}{{container={container},pod={pod},namespace={namespace}}}"#));
    }

    fn pod(&mut self, name: &str, pod: &PodUsage) {
        let (pod, namespace) = (Quoted(&pod.name), Quoted(&pod.namespace));
        self.write(format_args!(r#"{name}{{namespace={namespace},pod={pod}}}"#));
    }
}

/// Seconds with all that a duration holds: a float would lose nanoseconds of a long time.
fn seconds(duration: Duration) -> impl std::fmt::Display {
    struct Seconds(Duration);
    impl std::fmt::Display for Seconds {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            write!(f, "{}.{:09}", self.0.as_secs(), self.0.subsec_nanos())
        }
    }
    Seconds(duration)
}

#[cfg(test)]
mod tests {
    use super::super::{example, text_check};
    use super::*;

    #[test]
    fn the_text_is_what_the_metrics_server_reads() {
        let wanted = "\
# HELP container_cpu_usage_seconds_total CPU time used by the container, in core-seconds.
# TYPE container_cpu_usage_seconds_total counter
container_cpu_usage_seconds_total{container=\"c1\",pod=\"p\",namespace=\"default\"} 0.001000000 1700000100001
container_cpu_usage_seconds_total{container=\"c2\",pod=\"p\",namespace=\"default\"} 2.500000007 1700000100002
# HELP container_memory_working_set_bytes Memory of the container's processes that cannot be reclaimed, in bytes.
# TYPE container_memory_working_set_bytes gauge
container_memory_working_set_bytes{container=\"c1\",pod=\"p\",namespace=\"default\"} 4096 1700000100001
container_memory_working_set_bytes{container=\"c2\",pod=\"p\",namespace=\"default\"} 52428800 1700000100002
# HELP container_start_time_seconds Start of the container, in seconds since the Unix epoch.
# TYPE container_start_time_seconds gauge
container_start_time_seconds{container=\"c1\",pod=\"p\",namespace=\"default\"} 1700000000.250000000
container_start_time_seconds{container=\"c2\",pod=\"p\",namespace=\"default\"} 1700000000.250000000
# HELP node_cpu_usage_seconds_total CPU time used by the job on this host, in core-seconds.
# TYPE node_cpu_usage_seconds_total counter
node_cpu_usage_seconds_total 12345.678000000 1700000100007
# HELP node_memory_working_set_bytes Memory of the job on this host that cannot be reclaimed, in bytes.
# TYPE node_memory_working_set_bytes gauge
node_memory_working_set_bytes 8000 1700000100007
# HELP pod_cpu_usage_seconds_total CPU time used by the pod, in core-seconds.
# TYPE pod_cpu_usage_seconds_total counter
pod_cpu_usage_seconds_total{namespace=\"default\",pod=\"p\"} 12.501000007 1700000100002
# HELP pod_memory_working_set_bytes Memory of the pod's processes that cannot be reclaimed, in bytes.
# TYPE pod_memory_working_set_bytes gauge
pod_memory_working_set_bytes{namespace=\"default\",pod=\"p\"} 52432896 1700000100002
# HELP resource_scrape_error 1 if something could not be measured, 0 otherwise.
# TYPE resource_scrape_error gauge
resource_scrape_error 0
";
        let text = render(&example());
        assert_eq!(text, wanted);
        assert_eq!(text_check::samples(&text).len(), 11);
    }

    #[test]
    fn a_pod_without_containers_and_a_node_that_cannot_be_measured_are_left_out() {
        let mut snapshot = example();
        snapshot.usage = None;
        snapshot.pods[0].containers.clear();
        let text = render(&snapshot);
        let samples = text_check::samples(&text);
        assert_eq!(samples.len(), 1, "{samples:?}");
        assert!(text.ends_with("resource_scrape_error 1\n"));
    }

    #[test]
    fn any_name_stays_within_its_quotes() {
        let mut snapshot = example();
        snapshot.pods[0].name = "a\"b\\c\nd} 1".into();
        let text = render(&snapshot);
        let samples = text_check::samples(&text);
        assert_eq!(samples.len(), 11);
        assert!(samples.iter().any(|s| s.labels.get("pod").is_some_and(|pod| pod == "a\"b\\c\nd} 1")));
    }

    #[test]
    fn the_virtual_kubelets_test_finds_the_pods_name_second() {
        let text = render(&example());
        for name in ["pod_cpu_usage_seconds_total{", "container_cpu_usage_seconds_total{"] {
            let line = text.lines().find(|line| line.starts_with(name)).unwrap();
            assert!(line.split(',').nth(1).unwrap().starts_with("pod=\"p\""), "{line}");
        }
    }
}
