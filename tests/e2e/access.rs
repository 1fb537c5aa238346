//! Who may: on a compute node that is shared every user can reach the Node's own port. Nobody who is nobody gets
//! anything by any way in, and who is somebody gets what the cluster gives them.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::process::Command;

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use serde_json::{Value, json};

use crate::harness::https::{Https, read_head};
use crate::harness::{
    BOB, Namespace, Options, Pilot, api, as_user, run, seconds, shared_directory, wait_until,
};

/// Each way in, for one pod of a namespace.
fn routes(namespace: &str) -> Vec<String> {
    let plain = [
        "/",
        "/healthz",
        "/healthz/log",
        "/pods",
        "/pods/",
        "/runningpods/",
        "/configz",
        "/stats/summary",
        "/stats/",
        "/metrics",
        "/metrics/resource",
        "/metrics/probes",
        "/metrics/cadvisor",
        "/metrics/resource/",
        "//metrics/resource",
        "/metrics//resource",
        "/logs/",
        "/checkpoint/x/y/z",
        "/debug/pprof/",
        "/debug/x",
        "/nothing",
        "/%2e%2e/pods",
        "/metrics/resource/../../pods",
        "/pods?x=/metrics/resource",
    ];
    let pod = format!("{namespace}/p");
    let mut routes: Vec<String> = plain.map(str::to_owned).to_vec();
    routes.extend([
        format!("/containerLogs/{pod}/c1"),
        format!("/containerLogs/{pod}/c1?follow=true"),
        format!("/exec/{pod}/c1?command=id&output=1&input=1&tty=1"),
        format!("/attach/{pod}/c1?output=1&input=1"),
        format!("/run/{pod}/c1?cmd=id"),
        format!("/portForward/{pod}?port=22"),
    ]);
    routes
}

const METHODS: [&str; 6] = ["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"];

/// The headers of a request as curl takes them: none, and those of each way to upgrade a connection.
const HEADERS: [&[&str]; 4] = [
    &[],
    &["Connection: Upgrade", "Upgrade: SPDY/3.1", "X-Stream-Protocol-Version: v4.channel.k8s.io"],
    &[
        "Connection: Upgrade",
        "Upgrade: websocket",
        "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
        "Sec-WebSocket-Protocol: v5.channel.k8s.io",
    ],
    // What a proxy in front of an API server would be believed.
    &["X-Remote-User: admin", "X-Remote-Group: system:masters", "Impersonate-User: admin"],
];

/// A pilot with a pod `p` that runs.
fn pilot_with_pod(label: &'static str, options: Options) -> (Namespace, Pilot) {
    let namespace = Namespace::new(label);
    let pilot = Pilot::local(options, 600);
    namespace.script_on(&pilot, "p", "echo s3cr3t-line; exec sleep 600\n");
    namespace.wait_phase("p", "Running", seconds(30));
    (namespace, pilot)
}

/// Asks as a user of this host with curl, and returns the status of each route, with the route.
fn statuses(
    mut curl: Command,
    node: &Https,
    method: &str,
    headers: &[&str],
    routes: &[String],
) -> Vec<(String, String)> {
    curl.args(["-sk", "--path-as-is", "--max-time", "50", "-X", method, "-w", "%{http_code}\n"]);
    for header in headers {
        curl.args(["-H", header]);
    }
    for route in routes {
        curl.args(["-o", "/dev/null"]).arg(format!("https://{}{route}", node.address));
    }
    let output = run(&mut curl);
    let answers: Vec<&str> = output.stdout.lines().collect();
    assert_eq!(answers.len(), routes.len(), "{method} {headers:?}: {}", output.text);
    routes.iter().cloned().zip(answers.into_iter().map(str::to_owned)).collect()
}

fn curl_of(user: Option<&str>) -> Command {
    match user {
        Some(user) => as_user(user, "curl"),
        None => Command::new("curl"),
    }
}

#[test]
fn no_user_of_the_host_gets_anything_from_any_route_by_any_method_without_a_credential() {
    let (namespace, pilot) = pilot_with_pod("nobody", Options::new("nobody"));
    let node = Https::node(&pilot);
    let routes = routes(&namespace.name);
    // Another user; root, who is nobody to the cluster; and the pilot's own.
    for user in [Some(BOB), None, Some(crate::harness::ALICE)] {
        for method in METHODS {
            for headers in HEADERS {
                let curl = curl_of(user);
                for (route, status) in statuses(curl, &node, method, headers, &routes) {
                    assert_eq!(status, "401", "{method} {route} with {headers:?} as {user:?}");
                }
            }
        }
    }
    let answer = node.get("/pods");
    assert_eq!((answer.status, answer.body.trim()), (401, "Unauthorized"));
    // The listener is on all addresses: nor is it another on loopback.
    let mut loopback = node.clone();
    loopback.address.set_ip([127, 0, 0, 1].into());
    assert_eq!(loopback.get("/pods").status, 401);
    // A log line says who asked, and a flood of them does not fill the job's output.
    let output = pilot.output();
    assert!(output.contains("a request to the Node's API is refused"), "{output}");
    assert!(output.matches("a request to the Node's API is refused").count() < 100, "{output}");
    assert_eq!(node.as_admin().get("/pods").status, 200);
}

/// A certificate and its key for the cluster's administrator, signed by a CA of our own, and that CA's.
fn forged() -> (String, String, String) {
    let mut ca = CertificateParams::default();
    // The name of the cluster's own.
    ca.distinguished_name.push(DnType::CommonName, "jiriaf-test-ca");
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca = CertifiedIssuer::self_signed(ca, KeyPair::generate().unwrap()).unwrap();
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, "admin");
    params.distinguished_name.push(DnType::OrganizationName, "system:masters");
    params.extended_key_usages.push(rcgen::ExtendedKeyUsagePurpose::ClientAuth);
    let key = KeyPair::generate().unwrap();
    (params.signed_by(&key, &ca).unwrap().pem(), key.serialize_pem(), ca.pem())
}

#[test]
fn client_ca_file_names_who_signs_for_clients_and_the_clusters_own_ca_does_not_any_more() {
    let (certificate, key, ca) = forged();
    let directory = shared_directory();
    let file = directory.path().join("client-ca.crt");
    std::fs::write(&file, ca).unwrap();
    let options = Options::new("client-ca").arg("--client-ca-file").arg(file.to_str().unwrap());
    let (namespace, pilot) = pilot_with_pod("client-ca", options);
    let node = Https::node(&pilot);
    let logs = format!("/containerLogs/{}/p/c1", namespace.name);
    let theirs = node.certificate(&certificate, &key).get(&logs);
    assert_eq!((theirs.status, theirs.body.as_str()), (200, "s3cr3t-line\n"));
    assert_eq!(node.as_admin().get(&logs).status, 401);
}

#[test]
fn what_the_cluster_has_not_given_is_no_credential() {
    let (namespace, pilot) = pilot_with_pod("forged", Options::new("forged"));
    let node = Https::node(&pilot);
    let (certificate, key, _) = forged();
    let made_up = "eyJhbGciOiJSUzI1NiJ9.eyJzdWIiOiJhZG1pbiJ9.c2lnbmF0dXJl";
    let impostors = [
        node.certificate(&certificate, &key),
        node.token(made_up),
        node.token("x"),
        node.token(&"x".repeat(20_000)),
        node.token(""),
        node.header("Authorization", "Basic YWRtaW46YWRtaW4="),
        // A certificate of the API server's own: signed by the CA, but for servers.
        {
            let pki = crate::harness::bed().admin_kubeconfig().with_file_name("pki");
            let read = |name: &str| crate::harness::read(&pki.join(name));
            node.certificate(&read("apiserver.crt"), &read("apiserver.key"))
        },
    ];
    for (index, impostor) in impostors.iter().enumerate() {
        for route in routes(&namespace.name) {
            let answer = impostor.get(&route);
            assert_eq!(answer.status, 401, "{route} of impostor {index}: {}", answer.body);
            assert!(!answer.body.contains("s3cr3t"), "{}", answer.body);
        }
    }
    // Whoever owns a forged certificate may still have a true token.
    let admin = node.as_admin();
    assert_eq!(admin.get("/pods").status, 200);
}

/// The token of a new ServiceAccount with these rights on nodes: verb and subresource.
fn account(namespace: &Namespace, name: &str, node: &str, rights: &[(&str, &str)]) -> String {
    namespace.of("serviceaccounts").create(&json!({"metadata": {"name": name}}));
    let full = format!("{}-{name}", namespace.name);
    if !rights.is_empty() {
        let rules: Vec<Value> = rights
            .iter()
            .map(|(verb, resource)| json!({"apiGroups": [""], "resources": [resource], "verbs": [verb]}))
            .collect();
        let rbac = "rbac.authorization.k8s.io/v1";
        api::cluster_grouped(rbac, "clusterroles")
            .create(&json!({"metadata": {"name": full}, "rules": rules}));
        api::cluster_grouped(rbac, "clusterrolebindings").create(&json!({
            "metadata": {"name": full},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": full},
            "subjects": [{"kind": "ServiceAccount", "name": name, "namespace": namespace.name}],
        }));
    }
    // A Node remembers a refusal for 30 s: it is asked once the API server knows the rights.
    for (verb, resource) in rights {
        let (resource, subresource) = resource.split_once('/').unwrap();
        wait_until("the rights are known", seconds(20), || {
            let review = json!({"apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview", "spec": {
                "user": format!("system:serviceaccount:{}:{name}", namespace.name),
                "resourceAttributes": {"verb": verb, "resource": resource, "subresource": subresource,
                    "version": "v1", "name": node}}});
            let answer =
                api::cluster_grouped("authorization.k8s.io/v1", "subjectaccessreviews").create(&review);
            answer["status"]["allowed"] == true
        });
    }
    let request = json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest",
        "spec": {"expirationSeconds": 3600}});
    let answer = namespace.of(&format!("serviceaccounts/{name}/token")).create(&request);
    answer["status"]["token"].as_str().unwrap().to_owned()
}

/// Roles that a test made, which belong to no namespace.
struct Roles<'a>(&'a Namespace, &'a [&'a str]);

impl Drop for Roles<'_> {
    fn drop(&mut self) {
        for name in self.1 {
            let full = format!("{}-{name}", self.0.name);
            for kind in ["clusterrolebindings", "clusterroles"] {
                api::cluster_grouped("rbac.authorization.k8s.io/v1", kind).delete(&full, None);
            }
        }
    }
}

#[test]
fn each_right_opens_what_it_names_and_nothing_else() {
    let (namespace, pilot) = pilot_with_pod("rights", Options::new("rights"));
    let _roles =
        Roles(&namespace, &["reader", "metrics", "pods", "stats", "health", "config", "creator", "log"]);
    let node = Https::node(&pilot);
    let holder =
        |name: &str, rights: &[(&str, &str)]| node.token(&account(&namespace, name, &pilot.node, rights));
    let ns = &namespace.name;
    let exec = format!("/exec/{ns}/p/c1?command=id&output=1");
    let logs = format!("/containerLogs/{ns}/p/c1");

    // A kubelet's words for who has no right.
    let none = holder("none", &[]);
    let user = format!("system:serviceaccount:{ns}:none");
    for (method, path, verb, subresources) in [
        ("GET", "/pods", "get", "pods proxy"),
        ("GET", "/metrics/resource", "get", "metrics"),
        ("GET", "/stats/summary", "get", "stats"),
        ("GET", "/healthz", "get", "healthz proxy"),
        ("GET", "/configz", "get", "configz proxy"),
        ("GET", "/", "get", "proxy"),
        ("GET", "/nothing", "get", "proxy"),
        ("DELETE", "/pods", "delete", "pods proxy"),
        ("PUT", "/metrics", "update", "metrics"),
        ("GET", logs.as_str(), "get", "proxy"),
        ("GET", exec.as_str(), "create", "proxy"),
        ("POST", exec.as_str(), "create", "proxy"),
    ] {
        let answer = none.ask(method, path);
        let words =
            format!("Forbidden (user={user}, verb={verb}, resource=nodes, subresource(s)=[{subresources}])");
        assert_eq!((answer.status, answer.body.trim()), (403, words.as_str()), "{method} {path}");
    }

    // Reading by `get nodes/proxy` runs no program, whatever way it is asked for.
    let reader = holder("reader", &[("get", "nodes/proxy")]);
    for path in ["/pods", "/", "/healthz", "/configz", logs.as_str()] {
        assert_eq!(reader.get(path).status, 200, "{path}");
    }
    assert!(reader.get(&logs).body.contains("s3cr3t-line"));
    for path in [
        exec.clone(),
        format!("/attach/{ns}/p/c1?output=1"),
        format!("/portForward/{ns}/p?port=22"),
        format!("/run/{ns}/p/c1?cmd=id"),
    ] {
        for method in ["GET", "POST"] {
            for asked in [
                reader.clone(),
                reader.websocket("v5.channel.k8s.io"),
                reader.header("Connection", "Upgrade").header("Upgrade", "SPDY/3.1"),
            ] {
                let answer = asked.ask(method, &path);
                assert_eq!(answer.status, 403, "{method} {path}: {}", answer.body);
                assert!(answer.body.contains("verb=create, resource=nodes"), "{}", answer.body);
            }
        }
    }
    assert_eq!(reader.get("/metrics/resource").status, 403);

    // The fine-grained rights.
    let all = [
        "/pods",
        "/runningpods/",
        "/metrics",
        "/metrics/resource",
        "/metrics/probes",
        "/stats/summary",
        "/healthz",
        "/configz",
        "/",
        logs.as_str(),
    ];
    for (name, right, opens) in [
        ("metrics", "nodes/metrics", &["/metrics", "/metrics/resource", "/metrics/probes"][..]),
        ("pods", "nodes/pods", &["/pods", "/runningpods/"]),
        ("stats", "nodes/stats", &["/stats/summary"]),
        ("health", "nodes/healthz", &["/healthz"]),
        ("config", "nodes/configz", &["/configz"]),
        ("log", "nodes/log", &[]),
    ] {
        let holder = holder(name, &[("get", right)]);
        for path in all {
            let answer = holder.get(path);
            let wanted = if opens.contains(&path) { 200 } else { 403 };
            assert_eq!(answer.status, wanted, "{path} with {right}: {}", answer.body);
        }
    }

    // `create nodes/proxy` alone runs programs, and reads nothing.
    let creator = holder("creator", &[("create", "nodes/proxy")]);
    assert_eq!(creator.websocket("v5.channel.k8s.io").get(&exec).status, 101);
    assert_eq!(creator.get("/pods").status, 403);
}

#[test]
fn anonymous_metrics_open_the_resource_metrics_to_a_get_and_nothing_else() {
    let (namespace, pilot) =
        pilot_with_pod("anonymous", Options::new("anonymous").arg("--anonymous-metrics"));
    let node = Https::node(&pilot);
    for method in METHODS {
        for headers in HEADERS {
            for (route, status) in
                statuses(curl_of(Some(BOB)), &node, method, headers, &routes(&namespace.name))
            {
                // Slashes around a path name nothing else.
                let open = method == "GET" && route.trim_matches('/') == "metrics/resource";
                assert_eq!(status, if open { "200" } else { "401" }, "{method} {route} with {headers:?}");
            }
        }
    }
    let scraped = node.get("/metrics/resource").body;
    assert!(scraped.contains("container_cpu_usage_seconds_total{container=\"c1\",pod=\"p\""), "{scraped}");
}

#[test]
fn only_tls_1_2_and_1_3_are_spoken() {
    let (_namespace, pilot) = pilot_with_pod("tls-old", Options::new("tls-old"));
    let node = Https::node(&pilot);
    let handshake = |version: &str| {
        let mut openssl = Command::new("timeout");
        openssl.args(["20", "openssl", "s_client", "-connect", &node.address.to_string(), version]);
        // Else the client itself would refuse what is old.
        openssl.args(["-cipher", "ALL:@SECLEVEL=0"]);
        run(&mut openssl)
    };
    for version in ["-tls1_2", "-tls1_3"] {
        let output = handshake(version);
        assert!(output.success && output.text.contains("Cipher is"), "{version}: {}", output.text);
        assert!(!output.text.contains("Cipher is (NONE)"), "{version}: {}", output.text);
    }
    for version in ["-tls1", "-tls1_1"] {
        let output = handshake(version);
        assert!(!output.success, "{version}: {}", output.text);
        // It is the server that refuses.
        assert!(output.text.contains("SSL alert number"), "{version}: {}", output.text);
    }
}

#[test]
fn what_is_no_request_is_refused_and_harms_nobody() {
    let (namespace, pilot) = pilot_with_pod("malformed", Options::new("malformed"));
    let node = Https::node(&pilot);
    let admin = node.as_admin();
    let before = pilot.stages("pilot");
    let ns = &namespace.name;
    let mut follower = admin.open("GET", &format!("/containerLogs/{ns}/p/c1?follow=true")).unwrap();
    assert!(read_head(&mut follower).unwrap().starts_with("HTTP/1.1 200"));

    let long = "x".repeat(300_000);
    let many: String = (0..500).map(|n| format!("X-{n}: y\r\n")).collect();
    for (what, request) in [
        ("no HTTP", b"\x00\xff\xfe nothing\r\n\r\n".to_vec()),
        ("no version", b"GET /pods\r\n\r\n".to_vec()),
        ("another version", b"GET /pods HTTP/9.9\r\n\r\n".to_vec()),
        ("HTTP/2 without a word", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec()),
        ("a long path", format!("GET /{long} HTTP/1.1\r\nHost: x\r\n\r\n").into_bytes()),
        ("a long header", format!("GET /pods HTTP/1.1\r\nHost: x\r\nX: {long}\r\n\r\n").into_bytes()),
        ("many headers", format!("GET /pods HTTP/1.1\r\nHost: x\r\n{many}\r\n").into_bytes()),
        ("no header", b"GET /pods HTTP/1.1\r\nHost x\r\n\r\n".to_vec()),
        ("a blank in a name", b"GET /pods HTTP/1.1\r\nHo st: x\r\n\r\n".to_vec()),
        ("a length below 0", b"POST /pods HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n".to_vec()),
        (
            "two lengths",
            b"POST /pods HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nxx".to_vec(),
        ),
    ] {
        for client in [&node, &admin] {
            // No answer but an end is one that is as good, for what is no HTTP.
            match client.try_raw(&request) {
                Ok(answer) => assert!((400..500).contains(&answer.status), "{what}: {}", answer.head),
                Err(error) => {
                    assert!(!matches!(error.kind(), std::io::ErrorKind::WouldBlock), "{what}: {error}")
                }
            }
        }
    }
    // What is no TLS.
    for bytes in [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec(),
        vec![0; 100_000],
        b"\x16\x03\x01\xff\xff\x01".repeat(4000),
    ] {
        let mut stream = TcpStream::connect(node.address).unwrap();
        stream.set_read_timeout(Some(seconds(20))).unwrap();
        // It may be closed before all is sent.
        let _ = stream.write_all(&bytes);
        let _ = stream.read(&mut [0; 1000]);
    }
    for (path, status, words) in [
        ("/nothing".to_owned(), 404, "404 page not found"),
        // A kubelet's words, each handler's own.
        (format!("/containerLogs/{ns}/q/c1"), 404, "pod \"q\" does not exist"),
        (format!("/containerLogs/{ns}/p/c2"), 404, "container \"c2\" not found in pod \"p\""),
        (format!("/containerLogs/{ns}/p/c1?tailLines=x"), 400, r#"{"message": "Unable to decode query."}"#),
        (format!("/containerLogs/{ns}/p/c1?tailLines=-1"), 422, r#"{"message": "Invalid request."}"#),
        (format!("/exec/{ns}/p/c1?command=id"), 400, "you must specify at least 1 of stdin, stdout, stderr"),
        (format!("/exec/{ns}/q/c1?command=id&output=1"), 404, "pod does not exist"),
        (format!("/exec/{ns}/p/another-uid/c1?command=id&output=1"), 500, "container not found (\"c1\")"),
        (format!("/portForward/{ns}/p/another-uid?port=1"), 404, "pod not found"),
        (format!("/exec/{ns}/p/c2?command=id&output=1"), 500, "container not found (\"c2\")"),
        (format!("/attach/{ns}/p/c2?output=1"), 500, &format!("container c2 not found in pod p_{ns}")),
        (format!("/portForward/{ns}/q?port=1"), 404, "pod does not exist"),
        (format!("/exec/{ns}/p/c1?command=id&output=1"), 400, "Upgrade request required"),
        (format!("/exec/{ns}/p/c1?output=1"), 400, "you must specify a command"),
        (format!("/run/{ns}/p/c1?cmd=id"), 405, ""),
        ("/pods/%00%ff".to_owned(), 404, ""),
    ] {
        let answer = admin.get(&path);
        assert_eq!(answer.status, status, "{path}: {}", answer.body);
        assert!(answer.body.contains(words), "{path}: {}", answer.body);
    }
    let h2c = admin.header("Connection", "Upgrade").header("Upgrade", "h2c");
    assert_eq!(h2c.get(&format!("/exec/{ns}/p/c1?command=id&output=1")).status, 400);
    // The log says who asked for what, and claims no session that never was.
    let output = pilot.output();
    let refused = |needles: &[&str]| {
        output.lines().any(|line| line.contains("is refused") && needles.iter().all(|n| line.contains(n)))
    };
    assert!(!output.contains("joins a container"), "{output}");
    assert!(refused(&["user=\"admin\"", "status=404"]), "{output}");
    assert!(refused(&["is no request", "from="]), "{output}");

    // Nobody else noticed.
    assert_eq!(pilot.stages("pilot"), before);
    assert_eq!(admin.get("/healthz").body, "ok");
    namespace.of("pods").delete("p", Some(1));
    let mut shown = Vec::new();
    let _ = follower.read_to_end(&mut shown);
    assert!(String::from_utf8_lossy(&shown).contains("s3cr3t-line"), "{shown:?}");
}
