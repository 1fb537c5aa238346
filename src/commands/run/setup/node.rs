//! The Node as the settings and the allocation make it.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use tokio::sync::watch;

use super::SetupError;
use super::state::PilotState;
use crate::allocation::duration::Walltime;
use crate::allocation::topology::Cpu;
use crate::allocation::{Allocation, BatchSystem, GpuModel, Task, TimeLimit, Vendor};
use crate::cli::RunArgs;
use crate::node::labels::{NameParts, check_node_name, label_value};
use crate::node::{self, NodeConfig};
use crate::pod::admission::NodeFacts;
use crate::pod::context::Places;
use crate::pod::isolation::Isolation;
use crate::pod::pressure;
use crate::pod::share::{self, Grant, Processor};

/// The label jiriaf.site: as set, else the batch cluster's name.
pub(in crate::commands) fn site(args: &RunArgs, allocation: &Allocation) -> String {
    let set = args.site.clone().filter(|site| !site.is_empty());
    let site = set.or_else(|| allocation.cluster.as_ref().map(|cluster| cluster.value.clone()));
    site.unwrap_or_else(|| "local".to_owned())
}

/// The Node's name: as set, else made of site, job and host.
///
/// # Errors
/// When the name that is set leaves no room for the numbers of the job's tasks.
pub(in crate::commands) fn node_name(
    args: &RunArgs,
    site: &str,
    allocation: &Allocation,
) -> Result<String, SetupError> {
    let Task { rank, tasks, .. } = allocation.task;
    match args.node_name.as_deref().filter(|name| !name.is_empty()) {
        // Several tasks of a job may share a NODENAME that the job script exports.
        Some(name) if tasks > 1 => {
            // The longest of all, so that either each task has a name or none.
            let longest = format!("{name}-{}", rank.max(tasks - 1));
            check_node_name(&longest).map_err(|error| {
                let why =
                    format!("each of this job's {tasks} tasks adds -<its number> to the name that is set");
                SetupError::Setting(format!("{error}: {why}"))
            })?;
            Ok(format!("{name}-{rank}"))
        }
        Some(name) => Ok(name.to_owned()),
        None => {
            let job = allocation.job_id.as_ref().map(|j| j.value.as_str());
            // Slurm names each of a job's hosts; PBS does not tell a task its host's name, and two of its hosts may be one.
            let pbs = matches!(allocation.batch, BatchSystem::Pbs | BatchSystem::Torque);
            Ok(node::labels::node_name(&NameParts {
                site,
                job,
                restart: allocation.restart_count,
                host: &allocation.host,
                task: (pbs && rank > 0).then_some(rank),
            }))
        }
    }
}

/// The name of the Node of the job's first pilot, where this is another one: as that one makes it.
pub(super) fn leader_name(args: &RunArgs, site: &str, allocation: &Allocation) -> Option<String> {
    if allocation.task.rank == 0 || allocation.task.tasks < 2 {
        return None;
    }
    let first = allocation.hosts.as_ref()?.value.first()?;
    let host = first.split('.').next().unwrap_or(first).to_owned();
    let task = Task { rank: 0, ..allocation.task };
    node_name(args, site, &Allocation { host, task, ..allocation.clone() }).ok()
}

/// Pods at once: kubelet's own default is 110 (kubelet config, maxPods); virtual-kubelet-cmd said 1000.
pub(super) const PODS: u32 = 1000;

pub(super) fn node_config(
    args: &RunArgs,
    name: &str,
    site: &str,
    ip: &str,
    allocation: &Allocation,
    state: &PilotState,
    places: &Places,
) -> NodeConfig {
    let gpus = &allocation.gpus.value;
    let node_type = args.node_type.clone().filter(|t| !t.is_empty());
    let node_type = node_type.unwrap_or_else(|| if gpus.is_empty() { "cpu" } else { "gpu" }.to_owned());
    let taint = |taint: &crate::cli::Taint| k8s_openapi::api::core::v1::Taint {
        key: taint.key.clone(),
        value: taint.value.clone(),
        effect: taint.effect.clone(),
        time_added: None,
    };
    let taints = if args.no_taint { Vec::new() } else { args.taints.iter().map(taint).collect() };
    NodeConfig {
        name: name.to_owned(),
        node_type,
        site: site.to_owned(),
        batch: allocation.batch.label().to_owned(),
        job_id: allocation.job_id.as_ref().map(|job| job.value.clone()),
        labels: args.labels.iter().cloned().collect(),
        annotations: args.annotations.iter().cloned().collect(),
        taints,
        hostname: allocation.host.clone(),
        internal_ip: ip.to_owned(),
        capacity: capacity(allocation, &places.pods),
        daemon_port: None,
        declared_features: Vec::new(),
        instance: state.instance.clone(),
        walltime: allocated(args, allocation, state),
        first_start: state.first_start,
        publish_walltime: args.pods.walltime != Some(Walltime::Zero),
        info: node::info::node_info(Path::new("/")),
    }
}

/// What the allocation offers, with the room that the pods directory has.
pub(in crate::commands) fn capacity(allocation: &Allocation, pods: &Path) -> node::Capacity {
    let mut gpus: BTreeMap<String, u32> = BTreeMap::new();
    for gpu in &allocation.gpus.value {
        *gpus.entry(resource(gpu.vendor).to_owned()).or_default() += 1;
    }
    node::Capacity {
        cpus: allocation.cpus.value.len(),
        memory_bytes: allocation.memory.value,
        memory_reserved_bytes: pressure::own_need(allocation.memory.value)
            + pressure::kept_free(allocation.memory.value),
        pods: PODS,
        ephemeral_storage_bytes: free_bytes(pods),
        gpus,
    }
}

/// What there is to hand out to pods.
pub(in crate::commands) fn grant(allocation: &Allocation) -> Grant {
    let mut devices: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for gpu in &allocation.gpus.value {
        devices.entry(resource(gpu.vendor).to_owned()).or_default().push(gpu.id.clone());
    }
    // Of CPUs that the batch system did not name, other jobs on this host would be given the same ones.
    let named = if allocation.cpus_are_named { processors(&allocation.topology) } else { Vec::new() };
    Grant { processors: named, devices }
}

pub(super) fn processors(cpus: &[Cpu]) -> Vec<Processor> {
    cpus.iter().map(|cpu| Processor { number: cpu.number, core: cpu.core, node: cpu.node }).collect()
}

/// What kind of GPUs there are, in the labels that the vendors' own tools give a Node: gpu-feature-discovery (memory in MiB) and
/// AMD's node labeller (memory in GiB).
pub(super) fn gpu_labels(models: &[GpuModel]) -> BTreeMap<String, String> {
    let mut labels = BTreeMap::new();
    for model in models {
        let (product, memory, text) = match model.vendor {
            Vendor::Nvidia => (
                "nvidia.com/gpu.product",
                "nvidia.com/gpu.memory",
                model.memory_mib.map(|mib| mib.to_string()),
            ),
            Vendor::Amd => (
                "amd.com/gpu.product-name",
                "amd.com/gpu.vram",
                model.memory_mib.map(|mib| format!("{}G", mib.div_ceil(1024))),
            ),
            Vendor::Intel => continue,
        };
        labels.insert(product.to_owned(), label_value(&model.product));
        labels.extend(text.map(|text| (memory.to_owned(), text)));
    }
    labels
}

/// The walltime label: what `--walltime` says, else what the batch system granted, else what was left at the first start.
/// `None` where no end is known yet; the label then comes with the deadline.
pub(super) fn allocated(args: &RunArgs, allocation: &Allocation, state: &PilotState) -> Option<Duration> {
    let granted = match (&allocation.limit.value, &allocation.started) {
        (TimeLimit::Ends(end), Some(started)) => end.duration_since(started.value).ok(),
        _ => None,
    };
    match args.pods.walltime {
        Some(Walltime::Limit(duration)) => Some(duration),
        Some(Walltime::Zero) => None,
        None => granted.or(state.first_left.map(Duration::from_secs)),
    }
}

/// The resource that a vendor's device plugin offers.
pub(super) fn resource(vendor: Vendor) -> &'static str {
    match vendor {
        Vendor::Nvidia => share::NVIDIA,
        Vendor::Amd => share::AMD,
        Vendor::Intel => share::INTEL,
    }
}

pub(super) fn free_bytes(path: &Path) -> u64 {
    nix::sys::statvfs::statvfs(path).map_or(0, |s| s.blocks_available().saturating_mul(s.fragment_size()))
}

pub(super) fn facts(config: &NodeConfig, args: &RunArgs, isolation: &Isolation) -> NodeFacts {
    NodeFacts {
        name: config.name.clone(),
        labels: config.labels.clone(),
        taints: config.taints.clone(),
        allocatable: config.capacity.allocatable(),
        namespaces: (!args.namespaces.is_empty()).then(|| args.namespaces.iter().cloned().collect()),
        shutting_down: false,
        memory_pressure: false,
        isolation: isolation.clone(),
        time_left: None,
    }
}

/// The Node as admission sees it, with its labels as they are published, whether its memory runs short, and its CPUs.
pub(super) fn follow(
    mut facts: NodeFacts,
    mut labels: watch::Receiver<BTreeMap<String, String>>,
    mut pressure: watch::Receiver<bool>,
    mut cpus: watch::Receiver<usize>,
) -> watch::Receiver<NodeFacts> {
    facts.labels.clone_from(&labels.borrow_and_update());
    let (facts_tx, facts) = watch::channel(facts);
    tokio::spawn(async move {
        loop {
            tokio::select! {
                changed = labels.changed() => if changed.is_err() { return },
                Ok(()) = pressure.changed() => {}
                Ok(()) = cpus.changed() => {
                    let now = Quantity(cpus.borrow_and_update().to_string());
                    facts_tx.send_modify(|facts| drop(facts.allocatable.insert("cpu".to_owned(), now)));
                }
            }
            let (now, short) = (labels.borrow_and_update().clone(), *pressure.borrow_and_update());
            facts_tx.send_modify(|facts| (facts.labels, facts.memory_pressure) = (now, short));
        }
    });
    facts
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::allocation::{DetectSettings, Environment, detect};
    use crate::cli::run_args;

    /// The name of a task of Slurm job 7 on host n1, with this NODENAME.
    async fn name_of(given: &str, rank: &str, tasks: &str) -> Result<String, SetupError> {
        let env = Environment::from_pairs([
            ("SLURM_JOB_ID", "7"),
            ("SLURM_JOB_END_TIME", "4000000000"),
            ("SLURMD_NODENAME", "n1"),
            ("SLURM_PROCID", rank),
            ("SLURM_STEP_NUM_TASKS", tasks),
        ]);
        let allocation = detect(&env, &DetectSettings::new(std::time::SystemTime::now())).await;
        let args = if given.is_empty() { run_args(&[]) } else { run_args(&["--node-name", given]) };
        node_name(&args, "mylin", &allocation)
    }

    #[tokio::test]
    async fn a_name_that_several_tasks_share_gets_the_number_of_each() {
        assert_eq!(name_of("", "3", "4").await.unwrap(), "mylin-7-n1");
        assert_eq!(name_of("mine", "0", "1").await.unwrap(), "mine");
        assert_eq!(name_of("mine", "0", "4").await.unwrap(), "mine-0");
        assert_eq!(name_of("mine", "3", "4").await.unwrap(), "mine-3");
    }

    #[tokio::test]
    async fn the_first_pilots_name_is_the_one_that_it_gives_itself() {
        let of = async |rank: &str, tasks: &str, arguments: &[&str]| {
            let env = Environment::from_pairs([
                ("SLURM_JOB_ID", "7"),
                ("SLURM_JOB_END_TIME", "4000000000"),
                ("SLURM_JOB_NODELIST", "n[2-9]"),
                ("SLURMD_NODENAME", if rank == "0" { "n2" } else { "n5" }),
                ("SLURM_PROCID", rank),
                ("SLURM_STEP_NUM_TASKS", tasks),
            ]);
            let allocation = detect(&env, &DetectSettings::new(std::time::SystemTime::now())).await;
            let args = run_args(arguments);
            (node_name(&args, "mylin", &allocation).unwrap(), leader_name(&args, "mylin", &allocation))
        };
        for arguments in [&[][..], &["--node-name", "mine"]] {
            let (first, none) = of("0", "8", arguments).await;
            assert_eq!(none, None);
            let (other, leader) = of("3", "8", arguments).await;
            assert_ne!(other, first);
            assert_eq!(leader, Some(first));
        }
        assert_eq!(of("0", "1", &[]).await.1, None);
    }

    #[tokio::test]
    async fn a_name_without_room_for_the_longest_number_is_refused_by_all_tasks_alike() {
        let (room_for_one, room_for_two) = ("n".repeat(61), "n".repeat(60));
        assert_eq!(name_of(&room_for_one, "9", "10").await.unwrap().len(), 63);
        assert_eq!(name_of(&room_for_two, "10", "11").await.unwrap().len(), 63);
        for rank in ["0", "10"] {
            let error = name_of(&room_for_one, rank, "11").await.unwrap_err();
            let text = error.to_string();
            assert_eq!(error.exit_code(), 2, "{text}");
            let wanted = [&format!("{room_for_one}-10"), "63 bytes", "NODENAME", "11 tasks"];
            assert!(wanted.iter().all(|word| text.contains(word)), "{text}");
        }
        // One task adds nothing.
        assert_eq!(name_of(&"n".repeat(63), "0", "1").await.unwrap().len(), 63);
    }
}
