//! The manager with no cluster: statuses go into a channel, which takes one at a time.

use std::collections::BTreeMap;
use std::time::SystemTime;

use k8s_openapi::api::core::v1::PodStatus;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use tokio::time::timeout;

use super::*;
use crate::container::{Session, Supervisors};
use crate::pod::api::{Api, Files};
use crate::pod::context::{Identity, Places, Policy};
use crate::pod::directory::ProcessIdentity;
use crate::pod::events::Events;
use crate::pod::expansion::Expand;
use crate::pod::pressure::{Gauge, Kills, Room};
use crate::pod::record::Records;
use crate::pod::share::Grant;

const SOON: Duration = Duration::from_secs(10);

struct Case {
    manager: Manager,
    pods: mpsc::Sender<PodEvent>,
    statuses: mpsc::Receiver<(String, PodStatus)>,
    draining: watch::Sender<bool>,
    // Dropping these would end or change what is tested.
    _facts: watch::Sender<NodeFacts>,
    _drain: watch::Sender<Option<SystemTime>>,
    _directory: tempfile::TempDir,
}

struct Nothing;

impl Gauge for Nothing {
    fn room(&self) -> Option<Room> {
        None
    }
    fn oom_kills(&self) -> u64 {
        0
    }
}

fn case() -> Case {
    let directory = tempfile::tempdir().unwrap();
    let within = |name: &str| directory.path().join(name);
    let (statuses_tx, statuses) = mpsc::channel(1);
    let (draining, draining_rx) = watch::channel(false);
    let (drain_tx, drain) = watch::channel(None);
    let (facts_tx, facts) = watch::channel(NodeFacts::default());
    let (pods, pods_rx) = mpsc::channel(16);
    let (ledger, placement, shares) = shares(Grant::default());
    let context = Arc::new(Context {
        api: Api::Files(Files::new([], [], statuses_tx)),
        events: Events::to_log(),
        services: Default::default(),
        supervisors: Arc::new(Supervisors::new(&within("containers"), "test".to_owned()).unwrap()),
        records: Records::open(&within("pods")).unwrap(),
        identity: Identity {
            node: None,
            cluster: None,
            ip: "127.0.0.1".to_owned(),
            host: "host".to_owned(),
            job: None,
            process: ProcessIdentity { pid: 1, start: 0, boot: String::new() },
            mark: "test".to_owned(),
        },
        places: Places {
            pods: within("home"),
            namespaced: false,
            kept: within("kept"),
            home: within("home"),
        },
        inherited: Vec::new(),
        expand: Expand::default(),
        images: Default::default(),
        allocatable: BTreeMap::new(),
        shares,
        kills: Arc::new(Kills::new(Arc::new(Nothing))),
        drain,
        draining: draining_rx,
        roster: Arc::default(),
        metrics: crate::pilot_metrics::PilotMetrics::new(),
        policy: Policy {
            session: Session::Own,
            orphan_timeout: Duration::ZERO,
            hold_end: Duration::ZERO,
            open_files: None,
            back_off_max: crate::pod::backoff::LONGEST,
            isolation: Default::default(),
            delegation: None,
        },
        ports: None,
        output: None,
    });
    let manager = spawn(Setup { context, pods: pods_rx, facts, recovered: Vec::new(), ledger, placement });
    Case { manager, pods, statuses, draining, _facts: facts_tx, _drain: drain_tx, _directory: directory }
}

/// A pod of one and the same controller.
fn owned(uid: &str) -> Pod {
    let mut pod = Pod::default();
    (pod.metadata.uid, pod.metadata.name) = (Some(uid.to_owned()), Some(uid.to_owned()));
    pod.metadata.owner_references = Some(vec![OwnerReference {
        uid: "controller".to_owned(),
        controller: Some(true),
        ..OwnerReference::default()
    }]);
    pod
}

async fn refused(counts: &mut watch::Receiver<Counts>, wanted: usize) {
    let wait = counts.wait_for(|counts| counts.refused == wanted);
    assert!(timeout(SOON, wait).await.is_ok(), "{:?}, not {wanted} refused", counts.borrow());
}

#[tokio::test]
async fn refused_pods_are_waited_for_and_a_drain_ends_their_delays() {
    let mut case = case();
    let mut counts = case.manager.counts();
    case.manager.gate(Gate::Closed).await;
    for number in 0..7 {
        case.pods.send(PodEvent::Applied(Box::new(owned(&format!("u{number}"))))).await.unwrap();
    }
    // The first is told at once; the last would be in 32 s.
    refused(&mut counts, 6).await;
    case.draining.send_replace(true);
    // Nobody takes the next status yet.
    let mut none = counts.clone();
    assert!(timeout(Duration::from_millis(100), none.wait_for(|c| c.refused < 6)).await.is_err());
    for _ in 0..7 {
        let (_, status) = timeout(SOON, case.statuses.recv()).await.unwrap().unwrap();
        assert_eq!(status.reason.as_deref(), Some(NODE_SHUTDOWN));
    }
    refused(&mut counts, 0).await;
    // One that comes now is not held back for a minute either.
    case.pods.send(PodEvent::Applied(Box::new(owned("u7")))).await.unwrap();
    timeout(SOON, case.statuses.recv()).await.unwrap().unwrap();
    refused(&mut counts, 0).await;
}

#[tokio::test]
async fn a_refused_pod_that_is_gone_is_waited_for_no_longer() {
    let case = case();
    let mut counts = case.manager.counts();
    case.manager.gate(Gate::Closed).await;
    for uid in ["u0", "u1", "u2"] {
        case.pods.send(PodEvent::Applied(Box::new(owned(uid)))).await.unwrap();
    }
    refused(&mut counts, 2).await;
    case.pods.send(PodEvent::Deleted("u2".to_owned())).await.unwrap();
    refused(&mut counts, 1).await;
}
