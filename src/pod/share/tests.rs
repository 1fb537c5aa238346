use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::core::v1::Pod;
use proptest::prelude::*;
use serde_json::{Value, from_value, json};

use super::*;
use crate::pod::admission::{self, Load, NodeFacts};

/// A host of so many NUMA nodes, with so many cores each of so many threads, numbered as Linux mostly does: the first thread of
/// each core, then the second ones.
fn host(nodes: usize, cores: usize, threads: usize) -> Vec<Processor> {
    let all = nodes * cores;
    let mut processors: Vec<Processor> = (0..threads)
        .flat_map(|thread| {
            (0..all).map(move |core| Processor { number: thread * all + core, core, node: core / cores })
        })
        .collect();
    processors.sort();
    processors
}

fn grant(processors: Vec<Processor>, gpus: usize) -> Grant {
    let gpus = (0..gpus).map(|n| format!("GPU-{n}")).collect();
    Grant { processors, devices: [(NVIDIA.to_owned(), gpus)].into() }
}

fn container(name: &str, requests: Value, limits: Value) -> Value {
    json!({"name": name, "resources": {"requests": requests, "limits": limits}})
}

/// A container of a Guaranteed pod.
fn whole(name: &str, cpus: &str) -> Value {
    let resources = json!({"cpu": cpus, "memory": "1Mi"});
    container(name, resources.clone(), resources)
}

fn pod(init: Value, containers: Value) -> Pod {
    from_value(json!({"metadata": {"name": "p"}, "spec": {"initContainers": init, "containers": containers}}))
        .unwrap()
}

fn plain(container: Value) -> Pod {
    pod(json!([]), json!([container]))
}

#[test]
fn the_class_of_a_pod_is_kubernetes() {
    let both = |cpu: &str| json!({"cpu": cpu, "memory": "1Gi"});
    let none = || json!({});
    let table = [
        (vec![container("a", none(), none())], Qos::BestEffort),
        (vec![container("a", both("1"), both("1"))], Qos::Guaranteed),
        (vec![container("a", none(), both("500m"))], Qos::Guaranteed),
        (vec![container("a", both("1"), both("2"))], Qos::Burstable),
        (vec![container("a", json!({"cpu": "1"}), none())], Qos::Burstable),
        (vec![container("a", none(), json!({"cpu": "1"}))], Qos::Burstable),
        (vec![container("a", both("1"), both("1")), container("b", none(), none())], Qos::Burstable),
        (vec![container("a", json!({"cpu": "1000m", "memory": "1Gi"}), both("1"))], Qos::Guaranteed),
        (
            vec![container("a", json!({"nvidia.com/gpu": "1"}), json!({"nvidia.com/gpu": "1"}))],
            Qos::BestEffort,
        ),
    ];
    for (containers, wanted) in table {
        assert_eq!(qos(&pod(json!([]), json!(containers))), wanted, "{containers:?}");
    }
}

#[test]
fn cpus_are_taken_near_each_other() {
    let two_nodes = host(2, 4, 2);
    let without = |gone: &[usize]| -> Vec<Processor> {
        two_nodes.iter().filter(|cpu| !gone.contains(&cpu.number)).copied().collect()
    };
    let table: [(Vec<usize>, usize, Option<Vec<usize>>); 9] = [
        // A core's two threads.
        (vec![], 2, Some(vec![0, 8])),
        (vec![], 4, Some(vec![0, 1, 8, 9])),
        // A whole node.
        (vec![], 8, Some(vec![0, 1, 2, 3, 8, 9, 10, 11])),
        // Of two nodes that have enough, the one that has less.
        (vec![4, 12], 2, Some(vec![5, 13])),
        // The thread of a core that is broken already, not a whole core.
        (vec![0], 1, Some(vec![8])),
        (vec![0], 3, Some(vec![1, 8, 9])),
        // More than any node has: all of the one that has most, then of the other.
        (vec![], 10, Some(vec![0, 1, 2, 3, 4, 8, 9, 10, 11, 12])),
        (vec![], 16, Some((0..16).collect())),
        (vec![3], 16, None),
    ];
    for (gone, count, wanted) in table {
        assert_eq!(cpus::take(&without(&gone), count), wanted, "{count} without {gone:?}");
    }
    assert_eq!(cpus::take(&[], 0), Some(vec![]));
}

#[test]
fn whole_cpus_of_guaranteed_pods_are_their_own_and_the_others_share_the_rest() {
    let mut ledger = Ledger::new(grant(host(1, 4, 1), 0));
    let own = ledger.take("a", &plain(whole("c", "2"))).unwrap();
    assert_eq!(own.containers["c"].cpus, [0, 1]);
    let small = container("c", json!({"cpu": "500m"}), json!({"cpu": "1"}));
    ledger.take("b", &plain(small.clone())).unwrap();
    ledger.take("c", &plain(small)).unwrap();
    ledger.take("d", &plain(json!({"name": "c"}))).unwrap();
    let placement = ledger.placement();
    let cpus = |uid: &str| placement.cpus(uid, "c").to_vec();
    // Those with a limit of one are not put on the same one.
    assert_eq!((cpus("a"), cpus("b"), cpus("c")), (vec![0, 1], vec![2], vec![3]));
    assert_eq!((cpus("d"), cpus("nobody")), (vec![2, 3], vec![2, 3]));
    // One that comes later moves nobody, whatever its uid.
    ledger.take("Z", &plain(container("c", json!({}), json!({"cpu": "1"})))).unwrap();
    assert_eq!(
        ["a", "b", "c"].map(|uid| ledger.placement().cpus(uid, "c").to_vec()),
        ["a", "b", "c"].map(cpus)
    );
    ledger.release("Z");
    assert!(ledger.release("a"));
    assert_eq!(ledger.placement().cpus("d", "c"), [0, 1, 2, 3]);
    assert!(!ledger.release("d"), "it had no place of its own");
    // A fraction of a CPU is nobody's own, nor are whole ones where the pod is not Guaranteed.
    let guaranteed = json!({"cpu": "1500m", "memory": "1Mi"});
    let half = ledger.take("e", &plain(container("c", guaranteed.clone(), guaranteed))).unwrap();
    assert_eq!((half.containers["c"].cpus.len(), half.containers["c"].most), (0, Some(2)));
    let burstable = ledger.take("f", &plain(container("c", json!({"cpu": "2"}), json!({})))).unwrap();
    assert_eq!((burstable.containers["c"].cpus.len(), burstable.containers["c"].asked), (0, Some(2)));
}

#[test]
fn init_containers_take_nobodys_place_and_who_goes_moves_nobody() {
    let mut ledger = Ledger::new(grant(host(1, 2, 1), 0));
    let limited = |name: &str| container(name, json!({}), json!({"cpu": "1"}));
    let both = pod(json!([limited("i")]), json!([limited("c")]));
    ledger.take("a", &both).unwrap();
    ledger.take("b", &both).unwrap();
    let placed = |ledger: &mut Ledger, uid: &str| ledger.placement().cpus(uid, "c").to_vec();
    assert_eq!((placed(&mut ledger, "a"), placed(&mut ledger, "b")), (vec![0], vec![1]));
    ledger.release("a");
    assert_eq!(placed(&mut ledger, "b"), [1]);
    ledger.take("c", &both).unwrap();
    assert_eq!((placed(&mut ledger, "b"), placed(&mut ledger, "c")), (vec![1], vec![0]));
    // Near each other among those that are equally taken.
    let mut numa = Ledger::new(grant(host(2, 2, 2), 0));
    numa.take("a", &plain(container("c", json!({}), json!({"cpu": "4"})))).unwrap();
    assert_eq!(numa.placement().cpus("a", "c"), [0, 1, 4, 5]);
}

#[test]
fn without_named_cpus_nobody_is_put_anywhere() {
    let mut ledger = Ledger::new(grant(Vec::new(), 1));
    let share = ledger.take("a", &plain(whole("c", "2"))).unwrap();
    assert!(share.containers["c"].cpus.is_empty() && ledger.placement().cpus("a", "c").is_empty());
    let threads = variables(share.containers.get("c"), 0, &BTreeMap::new(), &[]);
    assert!(threads.contains(&("OMP_NUM_THREADS".to_owned(), "2".to_owned())), "{threads:?}");
}

#[test]
fn where_all_is_taken_the_others_run_beside() {
    let mut ledger = Ledger::new(grant(host(1, 2, 1), 0));
    ledger.take("a", &plain(whole("c", "2"))).unwrap();
    ledger.take("b", &plain(json!({"name": "c"}))).unwrap();
    let placement = ledger.placement();
    assert_eq!(placement.cpus("b", "c"), [0, 1]);
    let shortage = ledger.take("c", &plain(whole("c", "1"))).unwrap_err();
    assert_eq!(shortage, Shortage { resource: "cpu".to_owned(), wanted: 1, left: 0 });
}

#[test]
fn init_containers_leave_theirs_to_those_that_come_and_sidecars_stay() {
    let mut ledger = Ledger::new(grant(host(1, 8, 1), 0));
    let mut sidecar = whole("s", "1");
    sidecar["restartPolicy"] = json!("Always");
    let pod =
        pod(json!([whole("i", "3"), sidecar, whole("j", "2")]), json!([whole("a", "2"), whole("b", "2")]));
    let share = ledger.take("u", &pod).unwrap();
    let cpus = |name: &str| share.containers[name].cpus.iter().copied().collect::<BTreeSet<_>>();
    let held: BTreeSet<usize> = ["i", "s", "j", "a", "b"].into_iter().flat_map(cpus).collect();
    // 1 of the sidecar, 4 of the two: what the init containers had is among them.
    assert_eq!(held.len(), 5, "{share:?}");
    assert!(
        cpus("a").is_disjoint(&cpus("b"))
            && cpus("s").is_disjoint(&cpus("a"))
            && cpus("s").is_disjoint(&cpus("j"))
    );
    assert_eq!((cpus("i").len(), cpus("j").len()), (3, 2));
}

#[test]
fn what_a_pod_had_before_a_crash_it_has_again() {
    let wants = |cpus: &str| {
        let mut one = whole("c", cpus);
        for map in ["requests", "limits"] {
            one["resources"][map]["nvidia.com/gpu"] = json!("1");
        }
        plain(one)
    };
    let mut before = Ledger::new(grant(host(1, 4, 1), 2));
    let (a, b) = (before.take("a", &wants("1")).unwrap(), before.take("b", &wants("2")).unwrap());
    let mut after = Ledger::new(grant(host(1, 4, 1), 2));
    assert_eq!(after.restore("b", &b), b);
    let new = after.take("c", &wants("1")).unwrap();
    assert!(b.containers["c"].cpus.iter().all(|cpu| !new.containers["c"].cpus.contains(cpu)));
    assert_ne!(b.containers["c"].devices, new.containers["c"].devices);
    // What somebody else has by now is not handed out twice.
    assert!(after.restore("a", &a).containers["c"].devices[NVIDIA].is_empty());
}

#[test]
fn a_cpuset_that_shrinks_leaves_what_is_there() {
    let mut ledger = Ledger::new(grant(host(1, 4, 1), 0));
    ledger.take("a", &plain(whole("c", "2"))).unwrap();
    ledger.regrant(host(1, 4, 1).into_iter().filter(|cpu| cpu.number != 0).collect());
    assert_eq!(ledger.placement().cpus("a", "c"), [1]);
    ledger.regrant(host(1, 4, 1).into_iter().filter(|cpu| cpu.number > 1).collect());
    // Nothing of its own is left: it runs with the others, until that is back.
    assert_eq!(ledger.placement().cpus("a", "c"), [2, 3]);
    let before = ledger.placement().renewed();
    ledger.regrant(host(1, 4, 1));
    assert_eq!(ledger.placement().cpus("a", "c"), [0, 1]);
    assert!(ledger.placement().renewed() > before, "all are put in their places again");
}

#[test]
fn each_container_sees_its_own_gpus_and_no_others() {
    let names = |pairs: &[(String, String)]| -> Vec<String> {
        pairs.iter().map(|(name, value)| format!("{name}={value}")).collect()
    };
    let granted: BTreeMap<String, Vec<String>> =
        [(NVIDIA.to_owned(), vec!["GPU-a".to_owned(), "MIG-b/1/0".to_owned()])].into();
    let with = |resource: &str, devices: &[&str]| ContainerShare {
        devices: [(resource.to_owned(), devices.iter().map(ToString::to_string).collect())].into(),
        ..ContainerShare::default()
    };
    let nvidia = with(NVIDIA, &["MIG-b/1/0"]);
    assert_eq!(
        names(&variables(Some(&nvidia), 4, &granted, &[])),
        [
            "CUDA_VISIBLE_DEVICES=MIG-b/1/0",
            "NVIDIA_VISIBLE_DEVICES=MIG-b/1/0",
            "CUDA_DEVICE_ORDER=PCI_BUS_ID"
        ]
    );
    assert_eq!(
        names(&variables(None, 4, &granted, &[])),
        ["CUDA_VISIBLE_DEVICES=-1", "NVIDIA_VISIBLE_DEVICES=void"]
    );
    // Slurm sets the variables of all vendors: what is inherited of a vendor of whom there is nothing is overruled too.
    let inherited = [("ZE_AFFINITY_MASK".to_owned(), "0,1".to_owned())];
    let said = names(&variables(Some(&nvidia), 4, &granted, &inherited));
    assert_eq!(said.last().unwrap(), "ZE_AFFINITY_MASK=999");
    assert!(variables(None, 4, &BTreeMap::new(), &[]).is_empty());
    let amd: BTreeMap<_, _> = [(AMD.to_owned(), vec!["2".to_owned(), "3".to_owned(), "5".to_owned()])].into();
    assert_eq!(
        names(&variables(Some(&with(AMD, &["3", "5"])), 4, &amd, &[])),
        ["ROCR_VISIBLE_DEVICES=3,5", "HIP_VISIBLE_DEVICES=0,1", "GPU_DEVICE_ORDINAL=0,1"]
    );
}

#[test]
fn threads_are_as_many_as_the_cpus_of_whoever_is_confined() {
    let threads = |share: Option<&ContainerShare>, cpus| {
        let variables = variables(share, cpus, &BTreeMap::new(), &[]);
        variables.iter().find(|(name, _)| name == "OMP_NUM_THREADS").map(|(_, value)| value.clone())
    };
    let own = ContainerShare { cpus: vec![1, 2], ..ContainerShare::default() };
    let most = ContainerShare { most: Some(3), ..ContainerShare::default() };
    let asked = ContainerShare { asked: Some(3), ..ContainerShare::default() };
    assert_eq!(threads(Some(&own), 2).as_deref(), Some("2"));
    assert_eq!(threads(Some(&most), 3).as_deref(), Some("3"));
    assert_eq!(threads(Some(&asked), 8).as_deref(), Some("3"));
    assert_eq!(threads(Some(&asked), 2).as_deref(), Some("2"));
    assert_eq!(threads(None, 8), None);
}

/// What happens to a node: a pod comes, or one of those that are there goes.
#[derive(Debug, Clone)]
enum Step {
    Comes { kind: usize, cpus: usize, gpus: usize },
    Goes(usize),
    Crash,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => (0..4_usize, 0..5_usize, 0..3_usize).prop_map(|(kind, cpus, gpus)| Step::Comes { kind, cpus, gpus }),
        3 => (0..8_usize).prop_map(Step::Goes),
        1 => Just(Step::Crash),
    ];
    prop::collection::vec(step, 0..60)
}

fn wanted(kind: usize, cpus: usize, gpus: usize) -> Pod {
    let mut both = json!({"cpu": cpus.to_string(), "memory": "1Mi"});
    let mut requests = json!({"cpu": format!("{}m", cpus * 300)});
    if gpus > 0 {
        both[NVIDIA] = json!(gpus.to_string());
        requests[NVIDIA] = json!(gpus.to_string());
    }
    let own = container("c", both.clone(), both.clone());
    match kind {
        0 => plain(own),
        1 => plain(container("c", requests, json!({}))),
        2 => pod(json!([container("i", both.clone(), both)]), json!([own, whole("d", "1")])),
        _ => pod(json!([]), json!([own, whole("d", "2")])),
    }
}

proptest! {
    /// No CPU and no GPU is ever two pods' own, in any order of starts, ends and crashes; what admission lets in finds room; and
    /// what nobody has is back when all are gone.
    #[test]
    fn nothing_is_handed_out_twice(nodes in 1..3_usize, cores in 1..5_usize, threads in 1..3_usize, steps in steps()) {
        let grant = grant(host(nodes, cores, threads), 3);
        let quantity = |n: usize| k8s_openapi::apimachinery::pkg::api::resource::Quantity(n.to_string());
        let node = NodeFacts {
            allocatable: [
                ("cpu", grant.processors.len()), ("memory", 1 << 40), (NVIDIA, 3), ("pods", 1000),
            ].map(|(name, n)| (name.to_owned(), quantity(n))).into(),
            ..NodeFacts::default()
        };
        let mut ledger = Ledger::new(grant.clone());
        let mut there: Vec<(String, Pod, Share)> = Vec::new();
        for (number, step) in steps.into_iter().enumerate() {
            match step {
                Step::Comes { kind, cpus, gpus } => {
                    let (uid, pod) = (format!("u{number}"), wanted(kind, cpus, gpus));
                    let load = Load::of(there.iter().map(|(_, pod, _)| pod));
                    let admitted = admission::admit(&pod, &node, &load).is_ok();
                    match ledger.take(&uid, &pod) {
                        Ok(share) => {
                            if admitted {
                                there.push((uid, pod, share));
                            } else {
                                ledger.release(&uid);
                            }
                        }
                        Err(shortage) => prop_assert!(!admitted, "admitted, and {shortage}"),
                    }
                }
                Step::Goes(which) => {
                    if !there.is_empty() {
                        let (uid, _, _) = there.remove(which % there.len());
                        ledger.release(&uid);
                    }
                }
                Step::Crash => {
                    ledger = Ledger::new(grant.clone());
                    for (uid, _, share) in &there {
                        prop_assert_eq!(&ledger.restore(uid, share), share);
                    }
                }
            }
            let of = |share: &Share| -> BTreeSet<usize> {
                share.containers.values().flat_map(|c| c.cpus.clone()).collect()
            };
            let gpus = |share: &Share| -> BTreeSet<String> {
                share.containers.values().flat_map(|c| c.devices.values().flatten().cloned()).collect()
            };
            // Nor are they two containers' of one pod that run at the same time.
            for (_, _, share) in &there {
                let staying = || share.containers.values().filter(|c| !c.passes);
                let cpus: Vec<usize> = staying().flat_map(|c| c.cpus.clone()).collect();
                prop_assert_eq!(cpus.len(), cpus.iter().collect::<BTreeSet<_>>().len(), "{:?}", share);
                let gpus: Vec<String> = staying().flat_map(|c| c.devices.values().flatten().cloned()).collect();
                prop_assert_eq!(gpus.len(), gpus.iter().collect::<BTreeSet<_>>().len(), "{:?}", share);
            }
            let sum: usize = there.iter().map(|(_, _, share)| of(share).len()).sum();
            let all: BTreeSet<usize> = there.iter().flat_map(|(_, _, share)| of(share)).collect();
            prop_assert_eq!(sum, all.len(), "a CPU is two pods'");
            let sum: usize = there.iter().map(|(_, _, share)| gpus(share).len()).sum();
            let devices: BTreeSet<String> = there.iter().flat_map(|(_, _, share)| gpus(share)).collect();
            prop_assert_eq!(sum, devices.len(), "a GPU is two pods'");
            // Nobody else runs on what is somebody's own, as long as there is anything else.
            let placement = ledger.placement();
            if all.len() < grant.processors.len() {
                prop_assert!(placement.cpus("nobody", "c").iter().all(|cpu| !all.contains(cpu)));
            }
        }
        for (uid, _, _) in there {
            ledger.release(&uid);
        }
        let placement = ledger.placement();
        prop_assert_eq!(placement.cpus("nobody", "c").len(), grant.processors.len());
    }
}
