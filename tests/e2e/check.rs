//! `jiriaf-pilot check` against a real API server: what it answers of the credential, the rights, the clock and the
//! Node's name. What it says where there is none is in tests/check.rs.

use std::path::Path;

use serde_json::{Value, json};

use crate::harness::{
    Namespace, Options, Output, Pilot, api, bed, read, seconds, shared_directory, unique, wait_for,
};

/// What `check` says to a pilot of these options, of the Node's name and the workload's namespace that are given.
fn check(options: &Options, node: &str, namespace: &str) -> Output {
    Pilot::ask(options, &["check", "--walltime", "600", "--node-name", node, "--namespaces", namespace])
}

/// The same with another kubeconfig.
fn with_kubeconfig(label: &'static str, directory: &Path, config: &str) -> Options {
    let file = directory.join("kubeconfig");
    std::fs::write(&file, config).unwrap();
    // Alice reads it, so everybody may: one line warns of that, and nothing else changes by it.
    Options::new(label).env("KUBECONFIG", file.to_str().unwrap())
}

fn has_line(said: &Output, verdict: &str, thing: &str, words: &str) -> bool {
    said.stdout.lines().any(|line| {
        let rest = line.strip_prefix(verdict).and_then(|rest| rest.trim_start().strip_prefix(thing));
        rest.is_some_and(|rest| rest.trim_start().starts_with(words))
    })
}

/// That there is a line about `thing` that goes on with `words`.
#[track_caller]
fn line(said: &Output, verdict: &str, thing: &str, words: &str) {
    assert!(has_line(said, verdict, thing, words), "no line `{verdict} {thing} {words}` in\n{}", said.text);
}

#[test]
fn the_credential_of_docs_cluster_has_nothing_in_its_way_and_nothing_too_much() {
    let namespace = Namespace::new("check");
    let node = unique("check");
    let said = check(&Options::new("check"), &node, &namespace.name);
    line(&said, "ok", "API server", "answers as v1.");
    line(&said, "ok", "clock", "");
    line(&said, "ok", "credential", "is that of system:serviceaccount:jiriaf:jiriaf-pilot");
    line(&said, "ok", "credential", "expires in");
    line(&said, "ok", "node name", &format!("{node} is free"));
    line(&said, "ok", "rights", "all ");
    line(&said, "ok", "rights", "none that would be too much");
    assert!(said.stdout.ends_with(" 0 in the way\n"), "{}", said.text);
    assert_eq!(said.code, 0, "{}", said.text);
    assert_eq!(api::cluster("nodes").get(&node), None, "nothing is registered");
}

#[test]
fn a_cluster_admins_kubeconfig_is_warned_of() {
    let namespace = Namespace::new("check-admin");
    let directory = shared_directory();
    let options = with_kubeconfig("check-admin", directory.path(), &read(&bed().admin_kubeconfig()));
    let said = check(&options, &unique("check-admin"), &namespace.name);
    line(&said, "warn", "rights", "may * * (cluster-wide): cluster-admin for every pod that runs here -> ");
    line(&said, "ok", "rights", "all ");
    // It would run.
    assert_eq!(said.code, 0, "{}", said.text);
}

#[test]
fn each_right_that_is_missing_is_named_with_what_cannot_be_done_without_it() {
    let namespace = Namespace::new("check-rights");
    let accounts = api::namespaced(&namespace.name, "serviceaccounts");
    accounts.create(&json!({"metadata": {"name": "pilot"}}));
    let request = json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}});
    let answer = api::namespaced(&namespace.name, "serviceaccounts/pilot/token").create(&request);
    let mut config: Value = serde_json::from_str(&bed().pilot_kubeconfig(None)).unwrap();
    config["users"][0]["user"] = json!({"token": answer["status"]["token"]});
    let directory = shared_directory();
    let options = with_kubeconfig("check-rights", directory.path(), &config.to_string());
    let node = unique("check-rights");

    let said = check(&options, &node, &namespace.name);
    assert_eq!(said.code, 1, "{}", said.text);
    for (verdict, words) in [
        ("FAIL", "may not create nodes (cluster-wide): "),
        ("FAIL", "may not list pods (cluster-wide): pods are not seen -> grant it as docs/cluster/ does"),
        ("FAIL", "may not patch pods/status (cluster-wide): no pod's status can be reported"),
        (
            "FAIL",
            &format!("may not get configmaps in namespace {}: pods there get no scripts", namespace.name),
        ),
        ("FAIL", "may not update leases.coordination.k8s.io in namespace kube-node-lease: "),
        ("warn", "may not watch services in namespace default: containers get no variables for Services"),
    ] {
        line(&said, verdict, "rights", words);
    }

    // All that docs/cluster/pilot.yaml grants, but for asking who may use the Node's own API.
    let account = json!([{"kind": "ServiceAccount", "name": "pilot", "namespace": namespace.name}]);
    let role =
        |kind: &str, name: &str| json!({"apiGroup": "rbac.authorization.k8s.io", "kind": kind, "name": name});
    let rbac = "rbac.authorization.k8s.io/v1";
    let everywhere = api::cluster_grouped(rbac, "clusterrolebindings");
    let cluster_wide = json!({"metadata": {"name": node}, "subjects": account,
        "roleRef": role("ClusterRole", "jiriaf-pilot")});
    everywhere.create(&cluster_wide);
    let leases = json!({"metadata": {"name": node}, "subjects": account,
        "roleRef": role("Role", "jiriaf-pilot-leases")});
    api::grouped(rbac, "kube-node-lease", "rolebindings").create(&leases);
    let workload = json!({"metadata": {"name": "own"}, "subjects": account,
        "roleRef": role("ClusterRole", "jiriaf-pilot-workload")});
    api::grouped(rbac, &namespace.name, "rolebindings").create(&workload);
    // The API server hears of its own bindings a moment later.
    let said = wait_for("nothing is in the way any more", seconds(30), || {
        let said = check(&options, &node, &namespace.name);
        (said.code == 0).then_some(said)
    });
    line(
        &said,
        "warn",
        "rights",
        "may not create subjectaccessreviews.authorization.k8s.io (cluster-wide): the Node's API answers nobody",
    );
    line(&said, "warn", "rights", "may not create tokenreviews.authentication.k8s.io (cluster-wide): ");
    assert!(
        !has_line(&said, "FAIL", "rights", "") && !has_line(&said, "ok", "rights", "all "),
        "{}",
        said.text
    );
    everywhere.delete(&node, None);
    api::grouped(rbac, "kube-node-lease", "rolebindings").delete(&node, None);
}

#[test]
fn a_nodes_name_that_is_taken_is_told_with_whose_it_is() {
    let namespace = Namespace::new("check-name");
    let pilot = Pilot::local(Options::new("check-name"), 600);
    let said = check(&Options::new("check-name"), &pilot.node, &namespace.name);
    line(&said, "warn", "node name", &format!("{} is the Node of a pilot that lives", pilot.node));
    assert_eq!(said.code, 0, "{}", said.text);

    let strange = unique("kubelet");
    let nodes = api::cluster("nodes");
    nodes.create(&json!({"metadata": {"name": strange}, "spec": {"unschedulable": true}}));
    let said = check(&Options::new("check-name"), &strange, &namespace.name);
    nodes.delete(&strange, None);
    line(&said, "FAIL", "node name", &format!("{strange} is a Node that no pilot made -> "));
    assert_eq!(said.code, 1, "{}", said.text);
}
