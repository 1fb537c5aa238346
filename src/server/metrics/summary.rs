//! The answer to `/stats/summary`, in the words of the kubelet's `stats/v1alpha1` (types.go of k8s.io/kubelet).
//!
//! What the pilot cannot know (swap, pressure, a container's own file system, a pod's own network) is left out, as the
//! kubelet leaves out what its runtime does not tell.

use std::time::{Duration, SystemTime};

use k8s_openapi::jiff::Timestamp;
use serde::Serialize;

use super::host::{Disk, FileSystem, Interface, Network, Processes};
use super::{ContainerUsage, PodUsage, Snapshot};

/// What is told besides CPU and memory; `?only_cpu_and_memory=true` asks for none of it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Extra {
    /// The pods' file system. The sizes of logs are in the [`Snapshot`].
    pub disk: Disk,
    /// The host's network.
    pub network: Network,
    /// The host's processes.
    pub processes: Processes,
}

/// The whole answer.
#[derive(Debug, Serialize)]
pub struct Summary {
    node: NodeStats,
    pods: Vec<PodStats>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct NodeStats {
    node_name: String,
    start_time: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    cpu: Option<Cpu>,
    #[serde(skip_serializing_if = "Option::is_none")]
    memory: Option<Memory>,
    #[serde(skip_serializing_if = "Option::is_none")]
    network: Option<NetworkStats>,
    #[serde(skip_serializing_if = "Option::is_none")]
    fs: Option<Fs>,
    #[serde(skip_serializing_if = "Option::is_none")]
    rlimit: Option<Rlimit>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct PodStats {
    pod_ref: PodRef,
    start_time: String,
    containers: Vec<ContainerStats>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cpu: Option<Cpu>,
    #[serde(skip_serializing_if = "Option::is_none")]
    memory: Option<Memory>,
    /// The one name that the kubelet writes with underscores.
    #[serde(rename = "process_stats", skip_serializing_if = "Option::is_none")]
    process_stats: Option<ProcessStats>,
}

#[derive(Debug, Serialize)]
struct PodRef {
    name: String,
    namespace: String,
    uid: String,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct ContainerStats {
    name: String,
    start_time: String,
    cpu: Cpu,
    memory: Memory,
    #[serde(skip_serializing_if = "Option::is_none")]
    logs: Option<Fs>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Cpu {
    time: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    usage_nano_cores: Option<u64>,
    usage_core_nano_seconds: u64,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Memory {
    time: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    available_bytes: Option<u64>,
    usage_bytes: u64,
    working_set_bytes: u64,
    rss_bytes: u64,
    page_faults: u64,
    major_page_faults: u64,
}

#[derive(Debug, Serialize)]
struct NetworkStats {
    time: String,
    #[serde(flatten)]
    default: Interface,
    interfaces: Vec<Interface>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Fs {
    time: String,
    available_bytes: u64,
    capacity_bytes: u64,
    used_bytes: u64,
    inodes_free: u64,
    inodes: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    inodes_used: Option<u64>,
}

#[derive(Debug, Serialize)]
struct Rlimit {
    time: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    maxpid: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    curproc: Option<u64>,
}

#[derive(Debug, Serialize)]
struct ProcessStats {
    process_count: u64,
}

/// Kubernetes' time: RFC 3339, whole seconds, UTC (metav1.Time).
fn time(at: SystemTime) -> String {
    let at = at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let seconds = i64::try_from(at.as_secs()).unwrap_or(i64::MAX);
    Timestamp::from_second(seconds).unwrap_or(Timestamp::MAX).to_string()
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// The answer as of `now`; without `extra` it has CPU and memory alone.
#[must_use]
pub fn summary(snapshot: &Snapshot, extra: Option<&Extra>, now: SystemTime) -> Summary {
    let file_system = extra.and_then(|extra| extra.disk.file_system);
    let pods = snapshot.pods.iter().map(|pod| pod_stats(pod, file_system, extra.is_some(), now));
    Summary { node: node_stats(snapshot, extra, now), pods: pods.collect() }
}

fn node_stats(snapshot: &Snapshot, extra: Option<&Extra>, now: SystemTime) -> NodeStats {
    let cpu = snapshot.usage.as_ref().map(|usage| Cpu {
        time: time(usage.at),
        usage_nano_cores: snapshot.nano_cores,
        usage_core_nano_seconds: nanos(usage.cpu),
    });
    let memory = snapshot.usage.as_ref().map(|usage| Memory {
        time: time(usage.at),
        available_bytes: snapshot.memory_limit.map(|limit| limit.saturating_sub(usage.memory.working_set)),
        usage_bytes: usage.memory.usage,
        working_set_bytes: usage.memory.working_set,
        rss_bytes: usage.memory.rss,
        page_faults: usage.memory.page_faults,
        major_page_faults: usage.memory.major_page_faults,
    });
    NodeStats {
        node_name: snapshot.node.clone(),
        start_time: time(snapshot.started_at),
        cpu,
        memory,
        network: extra.map(|extra| NetworkStats {
            time: time(now),
            default: extra.network.default.clone().unwrap_or_default(),
            interfaces: extra.network.interfaces.clone(),
        }),
        fs: extra.and_then(|extra| extra.disk.file_system).map(|found| Fs {
            inodes_used: Some(found.inodes.saturating_sub(found.inodes_free)),
            ..fs(&found, found.used, now)
        }),
        rlimit: extra.map(|extra| Rlimit {
            time: time(now),
            maxpid: extra.processes.most,
            curproc: extra.processes.now,
        }),
    }
}

/// A part of the file system that has `used` bytes.
fn fs(found: &FileSystem, used: u64, now: SystemTime) -> Fs {
    Fs {
        time: time(now),
        available_bytes: found.available,
        capacity_bytes: found.capacity,
        used_bytes: used,
        inodes_free: found.inodes_free,
        inodes: found.inodes,
        inodes_used: None,
    }
}

fn pod_stats(pod: &PodUsage, file_system: Option<FileSystem>, all: bool, now: SystemTime) -> PodStats {
    let counted = pod.counted();
    // A sum of rates is one only when each of them is known.
    let rates = pod.containers.iter().map(|container| container.usage.nano_cores);
    let cpu = pod.at().map(|at| Cpu {
        time: time(at),
        usage_nano_cores: rates.sum(),
        usage_core_nano_seconds: nanos(counted.cpu),
    });
    let memory = pod.at().map(|at| Memory {
        time: time(at),
        available_bytes: None,
        usage_bytes: pod.sum(|usage| usage.usage),
        working_set_bytes: pod.sum(|usage| usage.working_set),
        rss_bytes: pod.sum(|usage| usage.rss),
        page_faults: counted.page_faults,
        major_page_faults: counted.major_page_faults,
    });
    let containers = pod.containers.iter().map(|container| container_stats(container, file_system, now));
    PodStats {
        pod_ref: PodRef { name: pod.name.clone(), namespace: pod.namespace.clone(), uid: pod.uid.clone() },
        start_time: time(pod.started_at),
        containers: containers.collect(),
        cpu,
        memory,
        process_stats: all.then(|| ProcessStats { process_count: pod.sum(|usage| usage.processes) }),
    }
}

fn container_stats(
    container: &ContainerUsage,
    file_system: Option<FileSystem>,
    now: SystemTime,
) -> ContainerStats {
    let usage = &container.usage;
    ContainerStats {
        name: container.name.clone(),
        start_time: time(container.started_at),
        cpu: Cpu {
            time: time(usage.at),
            usage_nano_cores: usage.nano_cores,
            usage_core_nano_seconds: nanos(usage.cpu),
        },
        memory: Memory {
            time: time(usage.at),
            available_bytes: None,
            usage_bytes: usage.usage,
            working_set_bytes: usage.working_set,
            rss_bytes: usage.rss,
            page_faults: usage.page_faults,
            major_page_faults: usage.major_page_faults,
        },
        logs: file_system.zip(container.log_bytes).map(|(found, used)| fs(&found, used, now)),
    }
}

#[cfg(test)]
mod tests {
    use super::super::example;
    use super::*;
    use serde_json::json;

    fn now() -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_millis(1_700_000_200_999)
    }

    fn only_cpu_and_memory() -> serde_json::Value {
        let memory = |time: &str, bytes: u64, usage: u64, rss: u64, faults: u64, major: u64| {
            json!({
                "time": time, "usageBytes": usage, "workingSetBytes": bytes, "rssBytes": rss,
                "pageFaults": faults, "majorPageFaults": major,
            })
        };
        let cpu = |time: &str, rate: u64, total: u64| json!({"time": time, "usageNanoCores": rate, "usageCoreNanoSeconds": total});
        let at = "2023-11-14T22:15:00Z";
        let mut node_memory = memory(at, 8000, 9000, 7000, 60, 5);
        node_memory["availableBytes"] = json!(12000);
        json!({
            "node": {
                "nodeName": "site-1-n1", "startTime": "2023-07-22T04:26:40Z",
                "cpu": cpu(at, 1_500_000_000, 12_345_678_000_000), "memory": node_memory,
            },
            "pods": [{
                "podRef": {"name": "p", "namespace": "default", "uid": "0a-1"},
                "startTime": "2023-11-14T22:13:20Z",
                "containers": [
                    {
                        "name": "c1", "startTime": "2023-11-14T22:13:20Z",
                        "cpu": cpu(at, 250_000_000, 1_000_000), "memory": memory(at, 4096, 5096, 4086, 7, 1),
                    },
                    {
                        "name": "c2", "startTime": "2023-11-14T22:13:20Z",
                        "cpu": cpu(at, 250_000_000, 2_500_000_007), "memory": memory(at, 52_428_800, 52_429_800, 52_428_790, 7, 1),
                    },
                ],
                "cpu": cpu(at, 500_000_000, 12_501_000_007),
                "memory": memory(at, 52_432_896, 52_434_896, 52_432_876, 114, 12),
            }],
        })
    }

    #[test]
    fn cpu_and_memory_alone_can_be_asked_for() {
        let found = serde_json::to_value(summary(&example(), None, now())).unwrap();
        assert_eq!(found, only_cpu_and_memory());
    }

    #[test]
    fn the_whole_has_file_system_network_processes_and_logs() {
        let eth0 = Interface { name: "eth0".into(), rx_bytes: 1, rx_errors: 2, tx_bytes: 3, tx_errors: 4 };
        let file_system =
            FileSystem { available: 600, capacity: 1000, used: 400, inodes_free: 70, inodes: 100 };
        let extra = Extra {
            disk: Disk { file_system: Some(file_system), log_bytes: Vec::new() },
            network: Network { default: Some(eth0.clone()), interfaces: vec![eth0] },
            processes: Processes { most: Some(32768), now: Some(345) },
        };
        let found = serde_json::to_value(summary(&example(), Some(&extra), now())).unwrap();
        let mut wanted = only_cpu_and_memory();
        let time = "2023-11-14T22:16:40Z";
        let interface = json!({"name": "eth0", "rxBytes": 1, "rxErrors": 2, "txBytes": 3, "txErrors": 4});
        let mut network = interface.clone();
        network["time"] = json!(time);
        network["interfaces"] = json!([interface]);
        wanted["node"]["network"] = network;
        wanted["node"]["fs"] = json!({
            "time": time, "availableBytes": 600, "capacityBytes": 1000, "usedBytes": 400,
            "inodesFree": 70, "inodes": 100, "inodesUsed": 30,
        });
        wanted["node"]["rlimit"] = json!({"time": time, "maxpid": 32768, "curproc": 345});
        wanted["pods"][0]["process_stats"] = json!({"process_count": 6});
        for index in 0..2 {
            wanted["pods"][0]["containers"][index]["logs"] = json!({
                "time": time, "availableBytes": 600, "capacityBytes": 1000, "usedBytes": 123,
                "inodesFree": 70, "inodes": 100,
            });
        }
        assert_eq!(found, wanted);
    }

    #[test]
    fn what_is_not_known_is_left_out() {
        let mut snapshot = example();
        snapshot.usage = None;
        snapshot.pods[0].containers[0].usage.nano_cores = None;
        let found = serde_json::to_value(summary(&snapshot, Some(&Extra::default()), now())).unwrap();
        assert!(found["node"].get("cpu").is_none() && found["node"].get("fs").is_none(), "{found}");
        assert!(found["pods"][0]["cpu"].get("usageNanoCores").is_none(), "{found}");
        snapshot.pods[0].containers.clear();
        let found = serde_json::to_value(summary(&snapshot, None, now())).unwrap();
        assert_eq!(found["pods"][0]["containers"], json!([]));
        assert!(found["pods"][0].get("cpu").is_none(), "{found}");
    }
}
