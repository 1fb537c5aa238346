//! The end of a Node against an API server that is a function.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::watch;

use super::super::object::tests::config;
use super::*;
use crate::cluster::stand_in::client_of;

type Calls = Arc<Mutex<Vec<(String, String, Value)>>>;

const NODE: &str = "/api/v1/nodes/mylin-45-3-host1";
const LEASE: &str = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases/mylin-45-3-host1";

/// A Node of ours at an API server that forbids what `forbidden` says of method and path.
fn handle(forbidden: fn(&str, &str) -> bool) -> (NodeHandle, Calls) {
    let calls = Calls::default();
    let seen = Arc::clone(&calls);
    let client = client_of(move |method, path, body| {
        let path = path.split('?').next().unwrap_or_default();
        let body = serde_json::from_str(body).unwrap_or_default();
        seen.lock().unwrap().push((method.to_owned(), path.to_owned(), body));
        if forbidden(method, path) {
            let status = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
                "message": "no", "reason": "Forbidden", "code": 403});
            return (403, status);
        }
        let answer = json!({"kind": "Node", "apiVersion": "v1",
            "metadata": {"name": "mylin-45-3-host1", "uid": "u", "resourceVersion": "7"}});
        (
            200,
            if method == "DELETE" {
                json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success"})
            } else {
                answer
            },
        )
    });
    let (_, timing) = watch::channel(None);
    let shared = Arc::new(Shared::new(client, config(), timing));
    shared.state.send_modify(|state| state.uid = "u".to_owned());
    (NodeHandle::new(shared), calls)
}

fn of(calls: &Calls, method: &str, path: &str) -> Vec<Value> {
    let calls = calls.lock().unwrap();
    calls.iter().filter(|(m, p, _)| m == method && p == path).map(|(_, _, body)| body.clone()).collect()
}

#[tokio::test]
async fn a_credential_that_may_delete_removes_node_and_lease() {
    let (node, calls) = handle(|_, _| false);
    assert!(matches!(node.remove(Duration::from_secs(5)).await, Ok(Removal::Removed)));
    assert_eq!(of(&calls, "DELETE", NODE)[0]["preconditions"]["uid"], "u");
    assert_eq!(of(&calls, "DELETE", LEASE).len(), 1);
    assert!(of(&calls, "PATCH", NODE).is_empty());
}

#[tokio::test]
async fn a_nodes_own_identity_leaves_its_node_cordoned_not_ready_and_without_a_lease() {
    let (node, calls) = handle(|method, path| method == "DELETE" && path == NODE);
    let left = node.remove(Duration::from_secs(5)).await;
    assert!(matches!(left, Ok(Removal::LeftBehind { .. })), "{left:?}");
    assert_eq!(of(&calls, "PATCH", NODE)[0]["spec"]["unschedulable"], true);
    let status = &of(&calls, "PATCH", &format!("{NODE}/status"))[0]["status"];
    let conditions = status["conditions"].as_array().unwrap();
    let ready = conditions.iter().find(|condition| condition["type"] == "Ready").unwrap();
    assert_eq!(
        (&ready["status"], &ready["reason"], &ready["message"]),
        (&json!("False"), &json!("KubeletNotReady"), &json!("node is shutting down"))
    );
    assert_eq!(of(&calls, "DELETE", LEASE).len(), 1);
    // The Lease goes last: without it nobody takes the status for a living pilot's.
    assert_eq!(calls.lock().unwrap().last().map(|(_, path, _)| path.clone()), Some(LEASE.to_owned()));
}

#[tokio::test]
async fn a_lease_that_may_not_be_deleted_runs_out_by_itself() {
    let (node, calls) = handle(|method, _| method == "DELETE");
    assert!(matches!(node.remove(Duration::from_secs(5)).await, Ok(Removal::LeftBehind { .. })));
    assert_eq!(of(&calls, "DELETE", LEASE).len(), 1);
}
