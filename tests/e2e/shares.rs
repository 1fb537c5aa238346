//! What of the allocation a pod has to itself: CPUs and GPUs.

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::harness::{
    Namespace, Options, Pilot, container, pod_spec, read, seconds, shared_directory, wait_for, wait_until,
};

/// A pod that notes what it has and sleeps; all its containers ask for `resources`.
fn noting(namespace: &Namespace, pilot: &Pilot, name: &str, resources: &Value) -> Value {
    let mut one = container("c1", "script");
    one["resources"] = resources.clone();
    namespace.pod_on(pilot, name, pod_spec("Never", &[one]));
    let pod = namespace.wait_phase(name, "Running", seconds(30));
    wait_until("it has noted", seconds(10), || noted(pilot, name, "cpus").exists());
    pod
}

const SCRIPT: &str = "env >env
sed -n 's/^Cpus_allowed_list:[[:space:]]*//p' /proc/self/status >cpus.new && mv cpus.new cpus
sleep 600 & wait\n";

fn noted(pilot: &Pilot, pod: &str, file: &str) -> std::path::PathBuf {
    pilot.pod_directory(pod).join("containers/c1").join(file)
}

fn cpus(pilot: &Pilot, pod: &str) -> String {
    read(&noted(pilot, pod, "cpus")).trim().to_owned()
}

/// Where the pod's script runs now, and what it started.
fn now(pilot: &Pilot, pod: &str) -> Vec<String> {
    let group = read(&noted(pilot, pod, "pgid"));
    let group: i32 = group.trim().parse().unwrap();
    let of = |pid: i32| {
        let status = std::fs::read_to_string(Path::new(&format!("/proc/{pid}/status"))).unwrap_or_default();
        let list = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
        list.map(|list| list.trim().to_owned())
    };
    let children =
        std::fs::read_to_string(format!("/proc/{group}/task/{group}/children")).unwrap_or_default();
    let children = children.split_whitespace().map(|pid| pid.parse().unwrap());
    std::iter::once(group).chain(children).filter_map(of).collect()
}

fn variable(pilot: &Pilot, pod: &str, name: &str) -> Option<String> {
    let env = read(&noted(pilot, pod, "env"));
    env.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('=').map(ToOwned::to_owned))
}

/// How many CPUs a list as the kernel writes it has.
fn count(list: &str) -> usize {
    let range = |range: &str| match range.split_once('-') {
        Some((first, last)) => last.parse::<usize>().unwrap() - first.parse::<usize>().unwrap() + 1,
        None => 1,
    };
    list.split(',').map(range).sum()
}

/// A pod that names its Node, so that nobody has counted before.
fn past_the_scheduler(namespace: &Namespace, pilot: &Pilot, name: &str, mut spec: Value) {
    pilot.place(&mut spec);
    spec["nodeName"] = pilot.node.clone().into();
    namespace.of("pods").create(&json!({"metadata": {"name": name}, "spec": spec}));
}

fn both(resources: &Value) -> Value {
    json!({"requests": resources, "limits": resources})
}

#[test]
fn a_guaranteed_pod_has_cpus_of_its_own_and_the_others_share_the_rest() {
    let namespace = Namespace::new("cpus");
    let pilot = Pilot::local(Options::new("cpus"), 600);
    namespace.config_map("script", &[("run.sh", SCRIPT)]);
    noting(&namespace, &pilot, "before", &json!({}));
    let all = cpus(&pilot, "before");
    assert!(count(&all) >= 2, "this test wants two CPUs: {all}");
    assert_eq!(variable(&pilot, "before", "OMP_NUM_THREADS"), None);

    noting(&namespace, &pilot, "own", &both(&json!({"cpu": "1", "memory": "10Mi"})));
    let own = cpus(&pilot, "own");
    assert_eq!(count(&own), 1, "{own}");
    assert_eq!(variable(&pilot, "own", "OMP_NUM_THREADS").as_deref(), Some("1"));
    noting(&namespace, &pilot, "after", &json!({}));
    assert_eq!(count(&cpus(&pilot, "after")), count(&all) - 1);
    // What runs already moves away, with what it started.
    let elsewhere = cpus(&pilot, "after");
    wait_until("the first pod has moved", seconds(10), || {
        now(&pilot, "before") == [elsewhere.as_str(), elsewhere.as_str()]
    });
    assert_eq!(now(&pilot, "own"), [own.as_str(), own.as_str()]);

    // The same after a crash of the pilot.
    let [first] = pilot.stages("pilot")[..] else { panic!("one pilot was expected") };
    kill(Pid::from_raw(first), Signal::SIGKILL).unwrap();
    wait_for("another pilot", seconds(30), || {
        pilot.stages("pilot").first().copied().filter(|second| *second != first)
    });
    noting(&namespace, &pilot, "later", &json!({}));
    assert_eq!(cpus(&pilot, "later"), elsewhere, "{}", pilot.output());
    assert_eq!(now(&pilot, "own"), [own.as_str(), own.as_str()]);

    // What it had is everybody's again.
    namespace.of("pods").delete("own", Some(1));
    namespace.wait_gone("own", seconds(20));
    wait_until("the others have all", seconds(10), || {
        ["before", "after", "later"].iter().all(|pod| now(&pilot, pod) == [all.as_str(), all.as_str()])
    });
}

#[test]
fn a_limit_of_one_cpu_is_held() {
    let namespace = Namespace::new("limit");
    let pilot = Pilot::local(Options::new("limit"), 600);
    namespace.config_map("script", &[("run.sh", SCRIPT)]);
    noting(&namespace, &pilot, "p", &json!({"limits": {"cpu": "700m"}}));
    noting(&namespace, &pilot, "q", &json!({"limits": {"cpu": "1"}}));
    let (p, q) = (cpus(&pilot, "p"), cpus(&pilot, "q"));
    assert_eq!((count(&p), count(&q)), (1, 1));
    assert_ne!(p, q, "two limits are put on two CPUs");
    assert_eq!(variable(&pilot, "p", "OPENBLAS_NUM_THREADS").as_deref(), Some("1"));
}

#[test]
fn each_pod_sees_its_own_gpu_and_one_that_asked_for_none_sees_none() {
    let namespace = Namespace::new("gpus");
    let options = Options::new("gpus").env("CUDA_VISIBLE_DEVICES", "GPU-aaa,GPU-bbb");
    let pilot = Pilot::local(options, 600);
    namespace.config_map("script", &[("run.sh", SCRIPT)]);
    assert_eq!(pilot.nodes()[0]["status"]["capacity"]["nvidia.com/gpu"], "2");
    let one = json!({"limits": {"nvidia.com/gpu": "1"}});
    noting(&namespace, &pilot, "p", &one);
    noting(&namespace, &pilot, "q", &one);
    noting(&namespace, &pilot, "none", &json!({}));
    let visible = |pod: &str| variable(&pilot, pod, "CUDA_VISIBLE_DEVICES").unwrap();
    let mut seen = [visible("p"), visible("q")];
    seen.sort();
    assert_eq!(seen, ["GPU-aaa", "GPU-bbb"]);
    assert_eq!(visible("none"), "-1");
    assert_eq!(variable(&pilot, "p", "CUDA_DEVICE_ORDER").as_deref(), Some("PCI_BUS_ID"));
    // The third has to wait for one of them, or go elsewhere.
    let mut third = container("c1", "script");
    third["resources"] = one.clone();
    past_the_scheduler(&namespace, &pilot, "third", pod_spec("Never", &[third]));
    let refused = namespace.wait_phase("third", "Failed", seconds(20));
    assert_eq!(refused["status"]["reason"], "OutOfnvidia.com/gpu", "{:#}", refused["status"]);
    let freed = visible("p");
    namespace.of("pods").delete("p", Some(1));
    namespace.wait_gone("p", seconds(20));
    noting(&namespace, &pilot, "fourth", &one);
    assert_eq!(visible("fourth"), freed);
}

#[test]
fn slurms_gpus_are_handed_out_one_by_one() {
    let namespace = Namespace::new("gres");
    let pilot = Pilot::sbatch(Options::new("gres").arg("--gres=gpu:2"));
    namespace.config_map("script", &[("run.sh", SCRIPT)]);
    let node = pilot.nodes().remove(0);
    assert_eq!(node["status"]["capacity"]["nvidia.com/gpu"], "2", "{:#}", node["status"]);
    let one = json!({"limits": {"nvidia.com/gpu": "1"}});
    noting(&namespace, &pilot, "p", &one);
    noting(&namespace, &pilot, "q", &one);
    noting(&namespace, &pilot, "none", &json!({}));
    let visible = |pod: &str, name: &str| variable(&pilot, pod, name).unwrap();
    let mut seen = [visible("p", "CUDA_VISIBLE_DEVICES"), visible("q", "CUDA_VISIBLE_DEVICES")];
    seen.sort();
    assert_eq!(seen, ["0", "1"]);
    // Slurm without AutoDetect sets the variables of all vendors.
    assert_eq!(
        (visible("p", "ROCR_VISIBLE_DEVICES"), visible("p", "ZE_AFFINITY_MASK")),
        ("-1".into(), "999".into())
    );
    assert_eq!(
        (visible("none", "CUDA_VISIBLE_DEVICES"), visible("none", "GPU_DEVICE_ORDINAL")),
        ("-1".into(), "-1".into())
    );
}

#[test]
fn what_the_vendors_tool_says_of_the_gpus_is_in_the_nodes_labels() {
    let tools = shared_directory();
    let tool = tools.path().join("nvidia-smi");
    std::fs::write(&tool, "#!/bin/sh\necho 'NVIDIA A100-SXM4-40GB, 40960'\n").unwrap();
    std::fs::set_permissions(&tool, std::fs::Permissions::from_mode(0o755)).unwrap();
    let path = format!("{}:/usr/bin:/bin", tools.path().display());
    let options = Options::new("smi").env("CUDA_VISIBLE_DEVICES", "0").env("PATH", &path);
    let pilot = Pilot::local(options, 600);
    let labels = pilot.nodes()[0]["metadata"]["labels"].clone();
    assert_eq!(labels["nvidia.com/gpu.product"], "NVIDIA-A100-SXM4-40GB", "{labels:#}");
    assert_eq!(labels["nvidia.com/gpu.memory"], "40960", "{labels:#}");
}

#[test]
fn a_gpu_that_the_node_has_not_is_not_promised() {
    let namespace = Namespace::new("nogpu");
    let pilot = Pilot::local(Options::new("nogpu"), 600);
    namespace.config_map("script", &[("run.sh", SCRIPT)]);
    let mut one = container("c1", "script");
    one["resources"] = json!({"limits": {"amd.com/gpu": "1"}});
    past_the_scheduler(&namespace, &pilot, "p", pod_spec("Never", &[one]));
    let refused = namespace.wait_phase("p", "Failed", seconds(20));
    assert_eq!(refused["status"]["reason"], "OutOfamd.com/gpu", "{:#}", refused["status"]);
}

#[test]
fn cpus_that_are_taken_away_from_the_job_are_no_longer_offered() {
    let namespace = Namespace::new("shrunk");
    let pilot = Pilot::local(Options::new("shrunk"), 600);
    namespace.config_map("script", &[("run.sh", SCRIPT)]);
    noting(&namespace, &pilot, "p", &both(&json!({"cpu": "1", "memory": "10Mi"})));
    let own: usize = cpus(&pilot, "p").parse().unwrap();
    let all = pilot.nodes()[0]["status"]["capacity"]["cpu"].as_str().unwrap().parse::<usize>().unwrap();
    // As a batch system does it: the pilot's mask has less, and just what the pod had to itself is gone.
    let [process] = pilot.stages("pilot")[..] else { panic!("one pilot was expected") };
    let mut mask = nix::sched::CpuSet::new();
    (0..all).filter(|cpu| *cpu != own).for_each(|cpu| mask.set(cpu).unwrap());
    let set_mask = |mask: &nix::sched::CpuSet| {
        for thread in std::fs::read_dir(format!("/proc/{process}/task")).unwrap().flatten() {
            let thread: i32 = thread.file_name().to_str().unwrap().parse().unwrap();
            nix::sched::sched_setaffinity(Pid::from_raw(thread), mask).unwrap();
        }
    };
    set_mask(&mask);
    let offered = |wanted: usize| {
        let status = &pilot.nodes()[0]["status"];
        let wanted = wanted.to_string();
        status["capacity"]["cpu"] == wanted.as_str() && status["allocatable"]["cpu"] == wanted.as_str()
    };
    wait_until("the Node offers what is left", seconds(30), || offered(all - 1));
    wait_until("the pod has moved", seconds(10), || {
        now(&pilot, "p").iter().all(|list| !list.contains(&own.to_string()))
    });
    mask.set(own).unwrap();
    set_mask(&mask);
    wait_until("and what has come back", seconds(30), || offered(all));
}

#[test]
fn two_pods_of_a_slurm_job_have_cpus_of_their_own_among_the_jobs() {
    let namespace = Namespace::new("slurmcpus");
    let pilot = Pilot::sbatch(Options::new("slurmcpus").arg("--cpus-per-task=2"));
    namespace.config_map("script", &[("run.sh", SCRIPT)]);
    let own = both(&json!({"cpu": "1", "memory": "10Mi"}));
    noting(&namespace, &pilot, "p", &own);
    noting(&namespace, &pilot, "q", &own);
    let (p, q) = (cpus(&pilot, "p"), cpus(&pilot, "q"));
    assert_eq!((count(&p), count(&q)), (1, 1));
    assert_ne!(p, q);
    // The job's are those of the pilot, which Slurm has confined.
    let processes = pilot.processes();
    let (process, _) = processes.iter().find(|(_, line)| line.starts_with("jiriaf-pilot pilot")).unwrap();
    let status = read(Path::new(&format!("/proc/{process}/status")));
    let jobs = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")).unwrap().trim();
    let numbers = |list: &str| -> Vec<usize> {
        let range = |range: &str| {
            let (first, last) = range.split_once('-').unwrap_or((range, range));
            first.parse::<usize>().unwrap()..=last.parse::<usize>().unwrap()
        };
        list.split(',').flat_map(range).collect()
    };
    assert!(
        numbers(&p).iter().chain(&numbers(&q)).all(|cpu| numbers(jobs).contains(cpu)),
        "{p} {q} of {jobs}"
    );
}
