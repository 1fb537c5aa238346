//! Whose credential it is: a node's own by TLS bootstrap, a site's, the sweeper's; and certificates that the cluster signs.
//! The manifests of docs/cluster/ are what is tested here, as they are.

use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::path::{Path, PathBuf};
use std::process::Command;

use jiff::{SignedDuration, Timestamp};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, User};
use serde_json::{Value, json};

use crate::harness::{
    ALICE, ApiServer, Https, Namespace, Options, Output, Pilot, api, bed, condition, read, run, seconds,
    shared_directory, unique, wait_for, wait_until,
};

/// Applies a manifest of docs/cluster/, without what would run by itself.
fn apply(manifest: &str) {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/cluster").join(manifest);
    let text = read(&file);
    let parts: Vec<&str> = text.split("\n---\n").filter(|part| !part.contains("kind: CronJob")).collect();
    let directory = shared_directory();
    let file = directory.path().join(manifest);
    std::fs::write(&file, parts.join("\n---\n")).unwrap();
    let output = bed().kubectl(&["apply", "-f", file.to_str().unwrap()]);
    assert!(output.success, "{manifest}: {}", output.text);
}

/// The pilots' kubeconfig with another token, in a file that alice can read.
pub fn kubeconfig(directory: &Path, token: &str) -> String {
    let mut config: Value = serde_json::from_str(&bed().pilot_kubeconfig(None)).unwrap();
    config["users"][0]["user"] = json!({"token": token});
    let file = directory.join("kubeconfig");
    std::fs::write(&file, config.to_string()).unwrap();
    file.to_str().unwrap().to_owned()
}

/// The token of a ServiceAccount.
fn token(namespace: &str, account: &str) -> String {
    let request = json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest",
        "spec": {"expirationSeconds": 3600}});
    let answer = api::namespaced(namespace, &format!("serviceaccounts/{account}/token")).create(&request);
    answer["status"]["token"].as_str().unwrap().to_owned()
}

/// A bootstrap token as docs/cluster/README.md makes it: its id and the whole.
pub fn bootstrap_token() -> (String, String) {
    apply("tls-bootstrap.yaml");
    let letters: String = unique("").chars().filter(char::is_ascii_alphanumeric).collect();
    let id = format!("{letters:0>6}");
    let id = id[id.len() - 6..].to_owned();
    let secret = format!("{letters:s>16}");
    let secrets = api::namespaced("kube-system", "secrets");
    // An earlier run may have had this process id.
    secrets.delete(&format!("bootstrap-token-{id}"), None);
    secrets.create(&json!({
        "metadata": {"name": format!("bootstrap-token-{id}")},
        "type": "bootstrap.kubernetes.io/token",
        "stringData": {"token-id": id, "token-secret": secret, "usage-bootstrap-authentication": "true",
            "auth-extra-groups": "system:bootstrappers:jiriaf"},
    }));
    let token = format!("{id}.{secret}");
    (id, token)
}

/// The requests of this signer that concern a node: its own, or its bootstrapper's while it has none.
fn requests(signer: &str, user: &str) -> Vec<Value> {
    let all = api::cluster_grouped("certificates.k8s.io/v1", "certificatesigningrequests").list("");
    let ours =
        |request: &Value| request["spec"]["signerName"] == signer && request["spec"]["username"] == user;
    all.into_iter().filter(ours).collect()
}

const CLIENT: &str = "kubernetes.io/kube-apiserver-client-kubelet";
const SERVING: &str = "kubernetes.io/kubelet-serving";

#[test]
fn a_bootstrap_token_becomes_a_nodes_identity_that_survives_a_crash_and_leaves_its_node_to_a_sweeper() {
    let (id, token) = bootstrap_token();
    let directory = shared_directory();
    let file = kubeconfig(directory.path(), &token);
    let mut pilot = Pilot::local(Options::new("tls").env("JIRIAF_BOOTSTRAP_KUBECONFIG", &file), 600);
    let name = pilot.node.clone();
    let asked = requests(CLIENT, &format!("system:bootstrap:{id}"));
    assert_eq!(asked.len(), 1, "{asked:#?}");
    // Ten minutes of walltime, and an hour beyond.
    let lasts = asked[0]["spec"]["expirationSeconds"].as_i64().unwrap();
    assert!((4100..=4200).contains(&lasts), "{lasts}");
    let node = api::cluster("nodes").get(&name).unwrap();
    assert!(
        node["metadata"]["labels"]["kubernetes.io/role"].is_null(),
        "NodeRestriction forbids it: {node:#}"
    );

    // Key and certificate are the user's alone.
    let uid = User::from_name(ALICE).unwrap().unwrap().uid;
    let kept = Path::new("/tmp").join(format!("jiriaf-pilot-{uid}")).join(&name).join("client.pem");
    assert_eq!(std::fs::metadata(&kept).unwrap().permissions().mode() & 0o7777, 0o600);

    // A node's identity reads the objects of its own pods.
    let namespace = Namespace::new("tls");
    namespace.script_on(&pilot, "p", "exit 0\n");
    namespace.wait_phase("p", "Succeeded", seconds(30));

    let [crashes] = pilot.stages("pilot")[..] else { panic!("one pilot was expected") };
    kill(Pid::from_raw(crashes), Signal::SIGKILL).unwrap();
    wait_until("the certificate is taken up again", seconds(30), || {
        pilot.output().contains("the one that was kept")
            && pilot.output().matches("adopted the Node").count() == 1
    });
    namespace.script_on(&pilot, "q", "exit 0\n");
    namespace.wait_phase("q", "Succeeded", seconds(30));
    assert_eq!(requests(CLIENT, &format!("system:bootstrap:{id}")).len(), 1);

    pilot.signal(Signal::SIGTERM);
    assert_eq!(pilot.wait_exit(seconds(30)), Some(0), "{}", pilot.output());
    let node = api::cluster("nodes").get(&name).unwrap();
    assert_eq!(node["spec"]["unschedulable"], true);
    let ready = condition(&node, "Ready");
    assert_eq!(
        (&ready["status"], &ready["reason"]),
        (&json!("False"), &json!("KubeletNotReady")),
        "{ready:#}"
    );
    assert_eq!(ready["message"], "node is shutting down");
    assert_eq!(pilot.lease(), None);
    assert!(pilot.output().contains("a sweeper removes it"), "{}", pilot.output());
    assert!(!kept.exists());
}

#[test]
fn a_bootstrap_token_that_is_no_good_is_refused_by_name() {
    let directory = shared_directory();
    let file = kubeconfig(directory.path(), "abcdef.0123456789abcdef");
    let options = Options::new("bad-token").env("JIRIAF_BOOTSTRAP_KUBECONFIG", &file);
    let mut pilot = Pilot::start_local(&options, 600);
    assert_eq!(pilot.wait_exit(seconds(30)), Some(1), "{}", pilot.output());
    assert!(
        pilot.output().contains("refuses the credential") && pilot.output().contains(&file),
        "{}",
        pilot.output()
    );
    assert!(!pilot.output().contains("0123456789abcdef"), "{}", pilot.output());
}

/// The certificate of the CA that signs for the cluster.
fn cluster_ca() -> PathBuf {
    bed().admin_kubeconfig().with_file_name("pki").join("ca.crt")
}

/// An API server that wants the cluster's CA to have signed a Node's certificate, for the address that it dials.
pub fn strict_api_server() -> ApiServer {
    ApiServer::start(&[&format!("--kubelet-certificate-authority={}", cluster_ca().display())])
}

/// `kubectl logs` of a pod by another API server.
pub fn logs_by(server: &ApiServer, namespace: &str, pod: &str) -> Output {
    let mut kubectl = bed().kubectl_within(namespace, 30);
    run(kubectl.arg("--kubeconfig").arg(server.kubeconfig()).args(["logs", pod]))
}

/// What openssl says of a server's certificate, which this authority should have signed for this very address.
fn verify(address: SocketAddr, authority: &Path) -> Output {
    let (to, ip) = (address.to_string(), address.ip().to_string());
    let mut openssl = Command::new("timeout");
    openssl.args(["10", "openssl", "s_client", "-verify_return_error", "-connect", &to, "-verify_ip", &ip]);
    run(openssl.arg("-CAfile").arg(authority))
}

/// Approves what a Node asks to serve with, until something holds.
pub fn approve_until(pilot: &Pilot, what: &str, mut holds: impl FnMut() -> bool) {
    let user = format!("system:node:{}", pilot.node);
    wait_until(what, seconds(60), || {
        for request in requests(SERVING, &user) {
            if request["status"]["conditions"].is_null() {
                let name = request["metadata"]["name"].as_str().unwrap();
                let output = bed().kubectl(&["certificate", "approve", name]);
                assert!(output.success, "{}", output.text);
            }
        }
        holds()
    });
}

#[test]
fn a_serving_certificate_is_used_once_somebody_approves_it() {
    let (_, token) = bootstrap_token();
    let directory = shared_directory();
    let file = kubeconfig(directory.path(), &token);
    let port = TcpListener::bind("0.0.0.0:0").unwrap().local_addr().unwrap().port();
    let options =
        Options::new("serving").env("JIRIAF_BOOTSTRAP_KUBECONFIG", &file).arg(&format!("--port={port}"));
    let pilot = Pilot::local(options, 600);
    let namespace = Namespace::new("serving");
    namespace.script_on(&pilot, "p", "echo served\n");
    namespace.wait_phase("p", "Succeeded", seconds(30));
    let (address, strict) = (Https::node(&pilot).address, strict_api_server());
    let user = format!("system:node:{}", pilot.node);
    let request =
        wait_for("a request for a serving certificate", seconds(10), || requests(SERVING, &user).pop());
    let name = request["metadata"]["name"].as_str().unwrap().to_owned();
    assert_eq!(request["spec"]["usages"], json!(["digital signature", "server auth"]));
    wait_until("the way out is said", seconds(40), || {
        pilot.output().contains(&format!("kubectl certificate approve {name}"))
    });
    let before = verify(address, &cluster_ca());
    assert!(!before.success && before.text.contains("verify error"), "{}", before.text);
    let refused = logs_by(&strict, &namespace.name, "p");
    assert!(!refused.success && refused.text.contains("x509"), "{}", refused.text);

    let output = bed().kubectl(&["certificate", "approve", &name]);
    assert!(output.success, "{}", output.text);
    wait_until("the certificate is used", seconds(40), || verify(address, &cluster_ca()).success);
    let logs = logs_by(&strict, &namespace.name, "p");
    assert!(logs.success && logs.text.contains("served"), "{}", logs.text);
    // It is for this address and for no other.
    let other = SocketAddr::new("127.0.0.1".parse().unwrap(), port);
    let mismatch = verify(other, &cluster_ca()).text;
    assert!(address == other || mismatch.contains("IP address mismatch"), "{mismatch}");
    assert_eq!(requests(SERVING, &user).len(), 1);
}

#[test]
fn a_certificate_of_files_is_served_and_read_again_when_they_change() {
    let directory = shared_directory();
    let (certificate, key) = (directory.path().join("tls.crt"), directory.path().join("tls.key"));
    // For all addresses that this host may advertise.
    let addresses = run(Command::new("hostname").arg("-I")).stdout;
    let names: Vec<String> =
        ["127.0.0.1"].into_iter().chain(addresses.split_whitespace()).map(|ip| format!("IP:{ip}")).collect();
    let names = format!("subjectAltName={}", names.join(","));
    // As whoever renews certificates puts them in place; and what alice's pilot may read.
    let renew = || {
        let alice = User::from_name(ALICE).unwrap().unwrap();
        let [new_key, new_certificate] = ["new.key", "new.crt"].map(|name| directory.path().join(name));
        let mut openssl = Command::new("openssl");
        openssl.args([
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:P-256",
            "-nodes",
            "-days",
            "1",
        ]);
        openssl.args(["-subj", "/CN=node", "-addext", &names]);
        openssl.arg("-keyout").arg(&new_key).arg("-out").arg(&new_certificate);
        let made = run(&mut openssl);
        assert!(made.success, "{}", made.text);
        chown(&new_key, Some(alice.uid.as_raw()), None).unwrap();
        std::fs::rename(new_key, &key).unwrap();
        std::fs::rename(new_certificate, &certificate).unwrap();
        let trusted = directory.path().join(unique("trusted"));
        std::fs::copy(&certificate, &trusted).unwrap();
        trusted
    };
    let first = renew();
    let options = Options::new("tls-files")
        .arg(&format!("--tls-cert-file={}", certificate.display()))
        .arg(&format!("--tls-private-key-file={}", key.display()));
    let pilot = Pilot::local(options, 600);
    let address = Https::node(&pilot).address;
    let served = verify(address, &first);
    assert!(served.success, "{}", served.text);
    let second = renew();
    assert!(!verify(address, &second).success, "openssl takes anything");
    // The files are looked at once a minute.
    wait_until("the new certificate is served", seconds(90), || verify(address, &second).success);
    assert!(!verify(address, &first).success);
}

#[test]
fn a_token_file_is_read_again_when_it_changes() {
    // A token that is bound to a Secret dies with it.
    let secrets = api::namespaced("jiriaf", "secrets");
    let bound = unique("bound");
    let secret = secrets.create(&json!({"metadata": {"name": bound}}));
    let request = json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest",
        "spec": {"expirationSeconds": 3600, "boundObjectRef": {"kind": "Secret", "apiVersion": "v1", "name": bound,
            "uid": secret["metadata"]["uid"]}}});
    let first = api::namespaced("jiriaf", "serviceaccounts/jiriaf-pilot/token").create(&request);
    let directory = shared_directory();
    let token_file = directory.path().join("token");
    std::fs::write(&token_file, first["status"]["token"].as_str().unwrap()).unwrap();
    let file = kubeconfig(directory.path(), "");
    let mut config: Value = serde_json::from_str(&read(Path::new(&file))).unwrap();
    config["users"][0]["user"] = json!({"tokenFile": token_file});
    std::fs::write(&file, config.to_string()).unwrap();
    let pilot = Pilot::local(Options::new("token-file").env("KUBECONFIG", &file), 600);
    // The Node is Ready a moment before its Lease is there.
    wait_until("the first token has made the Lease", seconds(30), || pilot.lease().is_some());

    std::fs::write(&token_file, token("jiriaf", "jiriaf-pilot")).unwrap();
    secrets.delete(&bound, None);
    // The API server itself goes by what it knew of a token for 10 s.
    let dead = Timestamp::now().checked_add(SignedDuration::from_secs(20)).unwrap();
    wait_until("the Lease is renewed by the new token", seconds(120), || {
        let lease = pilot.lease().expect("the Lease is there");
        lease["spec"]["renewTime"].as_str().unwrap().parse::<Timestamp>().unwrap() > dead
    });
    let namespace = Namespace::new("token-file");
    namespace.script_on(&pilot, "p", "exit 0\n");
    namespace.wait_phase("p", "Succeeded", seconds(60));
}

/// A name that a site may have: without a `-`.
fn site(label: &str) -> String {
    unique(label).replace('-', "")
}

/// kubectl as a ServiceAccount.
fn kubectl_as(user: &str, arguments: &[&str]) -> Output {
    let user = format!("--as={user}");
    bed().kubectl(&[&[user.as_str()], arguments].concat())
}

#[test]
fn a_sites_pilots_write_to_their_own_nodes_leases_and_pods_and_to_no_others() {
    apply("admission-policy.yaml");
    let (own, other) = (site("own"), site("other"));
    for site in [&own, &other] {
        api::namespaced("jiriaf-sites", "serviceaccounts").create(&json!({"metadata": {"name": site}}));
    }
    let namespace = Namespace::new("sites");
    for site in [&own, &other] {
        api::grouped("rbac.authorization.k8s.io/v1", &namespace.name, "rolebindings").create(&json!({
            "metadata": {"name": site},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "jiriaf-pilot-workload"},
            "subjects": [{"kind": "ServiceAccount", "name": site, "namespace": "jiriaf-sites"}],
        }));
    }
    let us = format!("system:serviceaccount:jiriaf-sites:{own}");
    let them = format!("system:serviceaccount:jiriaf-sites:{other}");
    let stranger = format!(r#"{{"apiVersion":"v1","kind":"Node","metadata":{{"name":"{own}-x"}}}}"#);
    let directory = shared_directory();
    let file = directory.path().join("node.json");
    std::fs::write(&file, &stranger).unwrap();
    let create = ["create", "--dry-run=server", "-f", file.to_str().unwrap()];
    wait_until("the policy is in force", seconds(30), || !kubectl_as(&them, &create).success);

    // A pilot of the site does all that a pilot does.
    let config = kubeconfig(directory.path(), &token("jiriaf-sites", &own));
    let options = Options { site: Some(own.clone()), ..Options::new("sites") };
    let mut pilot = Pilot::local(options.env("KUBECONFIG", &config), 600);
    assert!(pilot.node.starts_with(&format!("{own}-")), "{}", pilot.node);
    let go = pilot.home.join("go");
    let script = format!("until [ -e {} ]; do sleep 0.1; done\n", go.display());
    namespace.config_map("p", &[("run.sh", &script)]);
    let mut spec = crate::harness::pod_spec("Never", &[crate::harness::container("c1", "p")]);
    // With a token of its ServiceAccount, which is made for this pod.
    spec.as_object_mut().unwrap().remove("automountServiceAccountToken");
    namespace.pod_on(&pilot, "p", spec);
    namespace.wait_phase("p", "Running", seconds(30));

    let (node, ns) = (pilot.node.as_str(), namespace.name.as_str());
    let cordon = r#"{"spec":{"unschedulable":true}}"#;
    let lease = ["-n", "kube-node-lease", "delete", "lease", node];
    for arguments in [
        &["delete", "node", node][..],
        &["patch", "node", node, "-p", cordon],
        &["label", "--overwrite", "node", node, &format!("jiriaf.site={other}")],
        &lease,
        &["-n", ns, "delete", "pod", "p", "--wait=false"],
        &create,
        &["-n", ns, "create", "token", "default"],
    ] {
        let refused = kubectl_as(&them, arguments);
        assert!(
            !refused.success && refused.text.contains("denied request"),
            "{arguments:?}: {}",
            refused.text
        );
    }
    for (collection, name) in [(api::cluster("nodes"), node), (namespace.of("pods"), "p")] {
        let status = json!({"status": {"phase": "Failed"}});
        let refused = collection.try_merge_status_as(&them, name, &status).unwrap_err().to_string();
        assert!(refused.contains("denied request"), "{name}: {refused}");
    }
    // Its own may not become another site's, nor others than it names so.
    let moved = kubectl_as(&us, &["label", "--overwrite", "node", node, &format!("jiriaf.site={other}")]);
    assert!(moved.text.contains(&format!("whose label jiriaf.site is {own}")), "{}", moved.text);
    let unlabelled = kubectl_as(&us, &create);
    assert!(!unlabelled.success && unlabelled.text.contains("denied request"), "{}", unlabelled.text);

    std::fs::write(&go, "").unwrap();
    namespace.wait_phase("p", "Succeeded", seconds(30));
    pilot.signal(Signal::SIGTERM);
    assert_eq!(pilot.wait_exit(seconds(30)), Some(0), "{}", pilot.output());
    assert_eq!(pilot.nodes(), Vec::<Value>::new());
    assert!(!pilot.output().contains("denied request"), "{}", pilot.output());
}

/// A Node as a pilot would have left it.
fn leave(name: &str, labelled: bool, ready: &str, since: Timestamp, renewed: Option<Timestamp>) {
    let labels = if labelled { json!({"jiriaf.site": "sweeper-test"}) } else { json!({}) };
    let since = since.strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
    api::cluster("nodes").create(&json!({
        "metadata": {"name": name, "labels": labels},
        "spec": {"unschedulable": true},
        "status": {"conditions": [{"type": "Ready", "status": ready, "reason": "Test", "message": "",
            "lastHeartbeatTime": since, "lastTransitionTime": since}]},
    }));
    if let Some(renewed) = renewed {
        api::grouped("coordination.k8s.io/v1", "kube-node-lease", "leases").create(&json!({
            "metadata": {"name": name},
            "spec": {"holderIdentity": name, "leaseDurationSeconds": 40,
                "renewTime": renewed.strftime("%Y-%m-%dT%H:%M:%S.000000Z").to_string()},
        }));
    }
}

#[test]
fn the_sweeper_removes_nodes_that_pilots_left_long_ago_and_no_others() {
    apply("sweeper.yaml");
    let base = unique("sweep");
    let now = Timestamp::now();
    let old = now.checked_sub(SignedDuration::from_mins(60)).unwrap();
    let name = |what: &str| format!("{base}-{what}");
    leave(&name("let-go"), true, "False", old, None);
    leave(&name("dead"), true, "Unknown", old, Some(old));
    leave(&name("alive"), true, "False", old, Some(now));
    leave(&name("just-ended"), true, "False", now, None);
    leave(&name("ready"), true, "True", old, Some(old));
    leave(&name("not-a-pilots"), false, "False", old, None);

    // The Node controller taints what is not ready; the sweeper leaves alone what changes under its eyes.
    let all = ["let-go", "dead", "alive", "just-ended", "ready", "not-a-pilots"];
    let version =
        |what: &&str| api::cluster("nodes").get(&name(what)).unwrap()["metadata"]["resourceVersion"].clone();
    let mut before = Vec::new();
    wait_until("the Nodes are as the Node controller wants them", seconds(30), || {
        std::thread::sleep(seconds(2));
        let now: Vec<Value> = all.iter().map(version).collect();
        std::mem::replace(&mut before, now.clone()) == now
    });

    let directory = shared_directory();
    let config = kubeconfig(directory.path(), &token("jiriaf", "jiriaf-sweeper"));
    let script = api::namespaced("jiriaf", "configmaps").get("jiriaf-sweeper").unwrap();
    let script = script["data"]["sweep.sh"].as_str().unwrap().to_owned();
    let programs = bed().admin_kubeconfig().with_file_name("bin");
    let path = format!("{}:{}", programs.display(), std::env::var("PATH").unwrap());
    let output = run(Command::new("timeout").args(["60", "sh", "-c", &script]).env_clear().envs([
        ("PATH", path.as_str()),
        ("KUBECONFIG", &config),
        ("MINUTES", "15"),
        ("HOME", "/tmp"),
    ]));
    assert!(output.success, "{}", output.text);

    let refused =
        kubectl_as("system:serviceaccount:jiriaf:jiriaf-sweeper", &["delete", "node", &name("ready")]);
    let left: Vec<&str> =
        all.into_iter().filter(|what| api::cluster("nodes").get(&name(what)).is_some()).collect();
    for what in all {
        api::cluster("nodes").delete(&name(what), None);
        api::grouped("coordination.k8s.io/v1", "kube-node-lease", "leases").delete(&name(what), None);
    }
    assert_eq!(left, ["alive", "just-ended", "ready", "not-a-pilots"], "{}", output.text);
    assert!(!refused.success && refused.text.contains("not Ready"), "{}", refused.text);
    assert!(output.text.contains(&format!("removed Node {}", name("dead"))), "{}", output.text);
}
