//! The Node and its patches by table.

use super::super::status::{Health, conditions};
use super::*;
use std::time::UNIX_EPOCH;

pub(in crate::node) fn config() -> NodeConfig {
    let taint = Taint {
        key: "virtual-kubelet.io/provider".into(),
        value: Some("mock".into()),
        effect: "NoSchedule".into(),
        time_added: None,
    };
    NodeConfig {
        name: "mylin-45-3-host1".into(),
        instance: "i-1".into(),
        node_type: "gpu&hbm80g".into(),
        site: "mylin".into(),
        batch: "pbs".into(),
        job_id: Some("45[3].pbshost".into()),
        walltime: Some(Duration::from_secs(3600)),
        first_start: UNIX_EPOCH + Duration::from_secs(1_700_000_000),
        publish_walltime: true,
        labels: [("rack".to_owned(), "r7".to_owned()), ("type".to_owned(), "mine".to_owned())].into(),
        annotations: [("note".to_owned(), "x y".to_owned())].into(),
        taints: vec![taint],
        hostname: "host1.site".into(),
        internal_ip: "10.1.2.3".into(),
        capacity: Capacity {
            cpus: 2,
            memory_bytes: 4 * 1024 * 1024 * 1024 + 1023,
            memory_reserved_bytes: 1024,
            pods: 110,
            ephemeral_storage_bytes: 2048,
            gpus: [("nvidia.com/gpu".to_owned(), 4)].into(),
        },
        declared_features: Vec::new(),
        daemon_port: None,
        info: NodeSystemInfo::default(),
    }
}

fn timing() -> Timing {
    let at = |second| UNIX_EPOCH + Duration::from_millis(1_700_000_000_700) + Duration::from_secs(second);
    Timing { deadline: at(3600), cordon: at(3480), drain: at(3540) }
}

fn made(config: &NodeConfig, moment: &Moment<'_>) -> Node {
    node(config, moment, &Health::default(), conditions(&[], &Health::default(), Timestamp::UNIX_EPOCH))
}

fn with_end(timing: &Timing) -> Moment<'_> {
    Moment { timing: Some(timing), alivetime: Some(3478), ..Moment::default() }
}

#[test]
fn the_node_has_the_labels_that_pods_select_by() {
    let labels = made(&config(), &with_end(&timing())).metadata.labels.unwrap();
    let got: Vec<(&str, &str)> = labels.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
    assert_eq!(
        got,
        [
            ("jiriaf.alivetime", "3478"),
            ("jiriaf.batch", "pbs"),
            ("jiriaf.jobid", "45-3.pbshost"),
            ("jiriaf.nodetype", "gpu-hbm80g"),
            ("jiriaf.site", "mylin"),
            ("jiriaf.walltime", "3600"),
            ("kubernetes.io/hostname", "mylin-45-3-host1"),
            ("kubernetes.io/role", "agent"),
            ("rack", "r7"),
            ("type", "virtual-kubelet"),
        ]
    );
}

#[test]
fn annotations_are_whole_seconds_in_utc() {
    let annotations = made(&config(), &with_end(&timing())).metadata.annotations.unwrap();
    let got: Vec<(&str, &str)> = annotations.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
    assert_eq!(
        got,
        [
            ("jiriaf.deadline", "2023-11-14T23:13:20Z"),
            ("jiriaf.drain", "2023-11-14T23:12:20Z"),
            ("jiriaf.instance", "i-1"),
            ("note", "x y"),
        ]
    );
}

#[test]
fn a_deadline_that_is_learnt_after_the_start_brings_the_walltime_with_it() {
    let unknown = NodeConfig { walltime: None, ..config() };
    let labels = |moment: &Moment<'_>| made(&unknown, moment).metadata.labels.unwrap();
    assert_eq!(labels(&Moment::default()).get("jiriaf.walltime"), None);
    assert_eq!(labels(&with_end(&timing()))["jiriaf.walltime"], "3600");
    let expected = Expected::default();
    let patch = upkeep_patch(&unknown, &expected, &with_end(&timing()), None);
    assert_eq!(patch["metadata"]["labels"]["jiriaf.walltime"], "3600");
    let hidden = NodeConfig { publish_walltime: false, ..unknown.clone() };
    let patch = upkeep_patch(&hidden, &expected, &with_end(&timing()), None);
    assert_eq!(patch["metadata"]["labels"]["jiriaf.walltime"], Value::Null);
}

#[test]
fn walltime_nought_hides_the_labels_and_keeps_the_annotations() {
    let hidden = NodeConfig { publish_walltime: false, ..config() };
    let node = made(&hidden, &with_end(&timing()));
    let labels = node.metadata.labels.unwrap();
    assert!(!labels.contains_key(WALLTIME) && !labels.contains_key(ALIVETIME));
    assert!(node.metadata.annotations.unwrap().contains_key(DRAIN));
}

#[test]
fn without_an_end_there_is_neither_label_nor_annotation() {
    let node = made(&config(), &Moment::default());
    let (labels, annotations) = (node.metadata.labels.unwrap(), node.metadata.annotations.unwrap());
    assert!(!labels.contains_key(WALLTIME) && !labels.contains_key(ALIVETIME));
    assert!(!annotations.contains_key(DRAIN) && !annotations.contains_key(DEADLINE));
}

#[test]
fn role_and_job_are_left_out_where_they_cannot_be() {
    let bare = NodeConfig { job_id: None, ..config() };
    let labels = made(&bare, &Moment { without_role: true, ..Moment::default() }).metadata.labels.unwrap();
    assert!(!labels.contains_key(ROLE) && !labels.contains_key(JOB_ID));
}

#[test]
fn capacity_is_in_the_units_that_jiriaf_reads() {
    let status = made(&config(), &Moment::default()).status.unwrap();
    let capacity = status.capacity.unwrap();
    let got: Vec<(&str, &str)> = capacity.iter().map(|(k, v)| (k.as_str(), v.0.as_str())).collect();
    assert_eq!(
        got,
        [
            ("cpu", "2"),
            ("ephemeral-storage", "2Ki"),
            ("memory", "4194304Ki"),
            ("nvidia.com/gpu", "4"),
            ("pods", "110")
        ]
    );
    // What the pilot needs itself is nobody's.
    let mut less = capacity.clone();
    less.insert("memory".to_owned(), Quantity("4194303Ki".to_owned()));
    assert_eq!(status.allocatable.unwrap(), less);
}

#[test]
fn addresses_and_port_are_there_when_they_are_known() {
    let status = made(&config(), &Moment::default()).status.unwrap();
    let addresses: Vec<_> = status.addresses.unwrap().into_iter().map(|a| (a.type_, a.address)).collect();
    let pair = |kind: &str, address: &str| (kind.to_owned(), address.to_owned());
    assert_eq!(addresses, [pair("InternalIP", "10.1.2.3"), pair("Hostname", "host1.site")]);
    assert!(status.daemon_endpoints.is_none());
    let listening = NodeConfig { daemon_port: Some(10250), hostname: String::new(), ..config() };
    let status = made(&listening, &Moment::default()).status.unwrap();
    assert_eq!(status.daemon_endpoints.unwrap().kubelet_endpoint.unwrap().port, 10250);
    assert_eq!(status.addresses.unwrap().len(), 1);
}

#[test]
fn spec_holds_the_taint_and_the_cordon() {
    let spec = made(&config(), &Moment { unschedulable: true, ..Moment::default() }).spec.unwrap();
    assert_eq!(spec.taints.unwrap()[0].key, "virtual-kubelet.io/provider");
    assert_eq!(spec.unschedulable, Some(true));
    let free = NodeConfig { taints: vec![], ..config() };
    let spec = made(&free, &Moment::default()).spec.unwrap();
    assert_eq!((spec.taints, spec.unschedulable), (None, None));
}

#[test]
fn the_upkeep_writes_only_what_moves_and_takes_away_what_is_gone() {
    let end = timing();
    let expected = Expected { uid: "u1".into(), version: Some("7".into()) };
    let patch = upkeep_patch(&config(), &expected, &with_end(&end), None);
    assert_eq!(
        patch,
        json!({"metadata": {
            "uid": "u1", "resourceVersion": "7",
            "labels": {"jiriaf.alivetime": "3478", "jiriaf.walltime": "3600"},
            "annotations": {"jiriaf.deadline": "2023-11-14T23:13:20Z", "jiriaf.drain": "2023-11-14T23:12:20Z",
                            "jiriaf.instance": "i-1"},
        }})
    );
    let patch = upkeep_patch(&config(), &expected, &Moment::default(), None);
    assert_eq!(patch["metadata"]["labels"], json!({"jiriaf.alivetime": null, "jiriaf.walltime": null}));
    assert_eq!(patch["metadata"]["annotations"]["jiriaf.drain"], Value::Null);
    let status = status(&config(), &Health::default(), vec![]);
    let both = upkeep_patch(&config(), &expected, &with_end(&end), Some(&status));
    assert_eq!(both["status"]["capacity"]["cpu"], "2");
}

#[test]
fn a_dead_pilots_node_is_made_ours_through_and_through() {
    let mut old = made(&config(), &with_end(&timing()));
    old.metadata.uid = Some("u1".into());
    old.metadata.resource_version = Some("7".into());
    let labels = old.metadata.labels.as_mut().unwrap();
    labels.insert("old".into(), "x".into());
    labels.insert("topology.kubernetes.io/zone".into(), "z".into());
    let taint = |key: &str| Taint { key: key.into(), effect: "NoSchedule".into(), ..Taint::default() };
    old.spec.as_mut().unwrap().taints = Some(vec![taint("old"), taint("node.kubernetes.io/unreachable")]);
    let ours = NodeConfig { job_id: None, instance: "i-2".into(), ..config() };

    let patch = adoption_patch(&ours, &Moment::default(), &old, true);
    let labels = &patch["metadata"]["labels"];
    for gone in ["old", JOB_ID, ALIVETIME, WALLTIME] {
        assert_eq!(labels.get(gone), Some(&Value::Null), "{gone}");
    }
    assert_eq!(labels.get("topology.kubernetes.io/zone"), None, "others' labels stay");
    assert_eq!(labels["jiriaf.site"], "mylin");
    assert_eq!(patch["metadata"]["resourceVersion"], "7");
    assert_eq!(patch["metadata"]["annotations"]["jiriaf.instance"], "i-2");
    assert_eq!(patch["spec"].get("unschedulable"), Some(&Value::Null));
    let taints: Vec<_> =
        patch["spec"]["taints"].as_array().unwrap().iter().map(|t| t["key"].clone()).collect();
    assert_eq!(taints, ["virtual-kubelet.io/provider", "node.kubernetes.io/unreachable"]);
}

#[test]
fn our_own_node_keeps_what_others_did_to_it() {
    let mut old = made(&config(), &Moment { unschedulable: true, ..Moment::default() });
    old.metadata.labels.as_mut().unwrap().insert("theirs".into(), "x".into());
    let patch = adoption_patch(&config(), &Moment::default(), &old, false);
    assert_eq!(patch["spec"], json!({}));
    assert_eq!(patch["metadata"]["labels"].get("theirs"), None);
}

#[test]
fn a_status_takes_out_what_a_dead_pilot_had() {
    let old = made(&config(), &Moment::default());
    let ours = NodeConfig { capacity: Capacity { cpus: 1, ..Capacity::default() }, ..config() };
    let patch = status_patch("u1", Some(&old), &status(&ours, &Health::default(), vec![]));
    assert_eq!(patch["status"]["capacity"].get("nvidia.com/gpu"), Some(&Value::Null));
    assert_eq!(patch["status"]["allocatable"]["cpu"], "1");
    assert_eq!(patch["status"].get("daemonEndpoints"), Some(&Value::Null));
}

#[test]
fn the_way_through_a_tunnel_is_what_the_node_says_while_there_is_one() {
    use super::super::status::Endpoint;
    let through = |ip: Option<&str>, port| Health {
        endpoint: Some(Endpoint { ip: ip.map(str::to_owned), port }),
        ..Health::default()
    };
    let up = status(&config(), &through(Some("198.51.100.7"), Some(31000)), vec![]);
    assert_eq!(up.daemon_endpoints.as_ref().unwrap().kubelet_endpoint.as_ref().unwrap().port, 31000);
    // The API server dials the first of these by its own order of types.
    assert!(up.addresses.as_ref().unwrap().iter().all(|a| a.address == "198.51.100.7"), "{up:?}");
    let given = status(&config(), &through(None, Some(31000)), vec![]);
    assert!(given.addresses.unwrap().iter().all(|a| a.address == config().internal_ip));
    let down = status(&config(), &through(None, None), vec![]);
    let expected = Expected { uid: "u1".into(), version: None };
    let patch = upkeep_patch(&config(), &expected, &Moment::default(), Some(&down));
    assert_eq!(
        patch["status"].get("daemonEndpoints"),
        Some(&Value::Null),
        "a port that leads nowhere is dialled"
    );
}
