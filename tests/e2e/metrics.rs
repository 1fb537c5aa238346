//! What the Node tells of its use: to the real metrics-server and so to `kubectl top` and to a
//! HorizontalPodAutoscaler, and to whoever asks by himself.

use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};

use crate::harness::{
    ALICE, Https, Namespace, Options, Output, Pilot, api, as_user, bed, container, pod_spec, read, seconds,
    shared_directory, wait_for, wait_until,
};

/// Some half of a core.
const BURN: &str = "while :; do i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; sleep 0.05; done\n";

/// A metrics-server, and what the cluster knows of it. Ended at drop.
struct MetricsServer {
    child: Child,
    _directory: tempfile::TempDir,
}

const METRICS_API: &str = "v1beta1.metrics.k8s.io";

impl MetricsServer {
    fn start() -> Self {
        let cluster = bed().admin_kubeconfig();
        let cluster = cluster.parent().unwrap();
        let objects = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cluster/metrics-server/objects.yaml");
        let output = bed().kubectl(&["apply", "-f", objects.to_str().unwrap()]);
        assert!(output.success, "{}", output.text);
        let request = json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest",
            "spec": {"expirationSeconds": 3600}});
        let answer = api::namespaced("kube-system", "serviceaccounts/metrics-server/token").create(&request);
        let mut config: Value = serde_json::from_str(&bed().pilot_kubeconfig(None)).unwrap();
        config["users"][0]["user"] = json!({"token": answer["status"]["token"]});
        let directory = shared_directory();
        let kubeconfig = directory.path().join("kubeconfig");
        std::fs::write(&kubeconfig, config.to_string()).unwrap();

        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let log = std::fs::File::create(cluster.join("log/metrics-server.log")).unwrap();
        let kubeconfig = kubeconfig.display();
        let child = Command::new(cluster.join("metrics-server/metrics-server"))
            .args([
                format!("--kubeconfig={kubeconfig}"),
                format!("--authentication-kubeconfig={kubeconfig}"),
                format!("--authorization-kubeconfig={kubeconfig}"),
                format!("--secure-port={port}"),
                format!("--cert-dir={}", directory.path().display()),
            ])
            // The Nodes' certificates are their own.
            .args(["--bind-address=127.0.0.1", "--kubelet-insecure-tls", "--kubelet-use-node-status-port"])
            // The least that it takes.
            .args([
                "--kubelet-preferred-address-types=InternalIP",
                "--metric-resolution=10s",
                "--kubelet-request-timeout=5s",
            ])
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        let server = Self { child, _directory: directory };
        let ready = Https::api_server_at(([127, 0, 0, 1], port).into());
        // Two scrapes. An API that is announced and does not answer keeps namespaces from being deleted.
        wait_until("the metrics-server is ready", seconds(90), || {
            ready.try_get("/readyz").is_ok_and(|answer| answer.status == 200)
        });
        api::cluster_grouped("apiregistration.k8s.io/v1", "apiservices").create(&json!({
            "apiVersion": "apiregistration.k8s.io/v1", "kind": "APIService", "metadata": {"name": METRICS_API},
            "spec": {"group": "metrics.k8s.io", "version": "v1beta1", "groupPriorityMinimum": 100,
                "versionPriority": 100, "insecureSkipTLSVerify": true,
                "service": {"name": "metrics-server", "namespace": "kube-system", "port": port}}}));
        server
    }
}

impl Drop for MetricsServer {
    fn drop(&mut self) {
        api::cluster_grouped("apiregistration.k8s.io/v1", "apiservices").delete(METRICS_API, None);
        if std::thread::panicking() {
            let log = bed().admin_kubeconfig().with_file_name("log/metrics-server.log");
            let log = read(&log);
            let end: Vec<&str> = log.lines().rev().take(20).collect();
            eprintln!("--- metrics-server, the last line first ---\n{}", end.join("\n"));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The row of `kubectl top` that begins with `name`: its columns; None while there is none.
fn top(arguments: &[&str], name: &str) -> Option<Vec<String>> {
    let Output { success, stdout, .. } = bed().kubectl(&[&["top"], arguments].concat());
    let row = stdout.lines().find(|line| line.starts_with(name) && success)?;
    Some(row.split_whitespace().map(str::to_owned).collect())
}

/// A number before its unit: `512m`, `3Mi`, `25%`.
fn figure(text: &str) -> u64 {
    text.trim_end_matches(|letter: char| !letter.is_ascii_digit()).parse().unwrap_or(0)
}

#[test]
fn kubectl_top_and_an_autoscaler_go_by_what_the_pods_use() {
    let namespace = Namespace::new("top");
    let pilot = Pilot::local(Options::new("top"), 900);
    // With 8 MB of memory of its own: bash alone has less than one.
    let script = format!("x=$(head -c 8000000 /dev/zero | tr '\\0' x)\n{BURN}");
    namespace.config_map("burn", &[("run.sh", &script)]);
    let mut burner = container("c1", "burn");
    burner["resources"] = json!({"requests": {"cpu": "50m", "memory": "16Mi"}});
    let mut spec = pod_spec("Always", &[burner]);
    spec["terminationGracePeriodSeconds"] = json!(1);
    pilot.place(&mut spec);
    let labels = json!({"app": "burn"});
    namespace_create(
        &namespace,
        "apps/v1",
        "deployments",
        &json!({"metadata": {"name": "burn"}, "spec": {
        "replicas": 1, "selector": {"matchLabels": labels},
        "template": {"metadata": {"labels": labels}, "spec": spec}}}),
    );
    let pods = || namespace.of("pods").list("app=burn");
    let pod = wait_for("the burner runs", seconds(60), || {
        let pod = pods().into_iter().next()?;
        (pod["status"]["phase"] == "Running").then(|| pod["metadata"]["name"].as_str().unwrap().to_owned())
    });
    let _server = MetricsServer::start();

    let ns = namespace.name.as_str();
    let row = wait_for("kubectl top pod shows the burner", seconds(120), || top(&["pod", "-n", ns], &pod));
    // Half of a core, on a machine with two that may be busy.
    assert!((50..=1100).contains(&figure(&row[1])), "{row:?}");
    assert!((8..=100).contains(&figure(&row[2])), "{row:?}");
    let row = wait_for("kubectl top pod tells containers apart", seconds(30), || {
        top(&["pod", "-n", ns, "--containers"], &pod)
    });
    assert_eq!(row[1], "c1", "{row:?}");
    let row = wait_for("kubectl top node shows the Node", seconds(60), || top(&["node"], &pilot.node));
    assert!(figure(&row[1]) >= 50 && figure(&row[2]) > 0 && figure(&row[3]) > 0, "{row:?}");

    namespace_create(
        &namespace,
        "autoscaling/v2",
        "horizontalpodautoscalers",
        &json!({
        "metadata": {"name": "burn"}, "spec": {"minReplicas": 1, "maxReplicas": 2,
            "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": "burn"},
            "metrics": [{"type": "Resource", "resource": {"name": "cpu",
                "target": {"type": "Utilization", "averageUtilization": 50}}}]}}),
    );
    wait_until("there are two burners that run", seconds(90), || {
        let pods = pods();
        pods.len() == 2 && pods.iter().all(|pod| pod["status"]["phase"] == "Running")
    });
}

/// Creates an object of any group in the namespace.
fn namespace_create(namespace: &Namespace, group_version: &str, resource: &str, object: &Value) {
    api::grouped(group_version, &namespace.name, resource).create(object);
}

/// The value of a sample whose line begins so, in the text of Prometheus.
fn sample(text: &str, name_and_labels: &str) -> Option<f64> {
    let line = text.lines().find(|line| line.starts_with(name_and_labels))?;
    line[name_and_labels.len()..].split_whitespace().next()?.parse().ok()
}

/// The CPU seconds of a container `c1`, by the Node itself.
fn cpu(node: &Https, namespace: &Namespace, pod: &str) -> f64 {
    // A question so soon after another one gets its answer.
    std::thread::sleep(Duration::from_millis(210));
    let text = node.get("/metrics/resource").body;
    let labels = format!("{{container=\"c1\",pod=\"{pod}\",namespace=\"{}\"}}", namespace.name);
    sample(&text, &format!("container_cpu_usage_seconds_total{labels}"))
        .unwrap_or_else(|| panic!("nothing of {labels}: {text}"))
}

#[test]
fn cpu_of_children_that_ended_counts_and_never_decreases() {
    let namespace = Namespace::new("cpu");
    let pilot = Pilot::local(Options::new("cpu"), 600);
    let script = "for n in {1..12}; do bash -c 'i=0; while [ $i -lt 60000 ]; do i=$((i+1)); done'; done\n\
        times >times.new; mv times.new times\nexec sleep 600\n";
    namespace.script_on(&pilot, "p", script);
    namespace.wait_phase("p", "Running", seconds(30));
    let node = Https::node(&pilot).as_admin();
    let times = pilot.pod_directory("p").join("containers/c1/times");
    let mut before = 0.0;
    wait_until("the children are through", seconds(120), || {
        let now = cpu(&node, &namespace, "p");
        assert!(now >= before, "{now} after {before}");
        before = now;
        times.exists()
    });
    // bash's own account: the shell's user and system time, and its children's: `0m0.012s 0m0.003s`.
    let told: f64 = read(&times)
        .split_whitespace()
        .map(|time| {
            let (minutes, seconds) = time.trim_end_matches('s').split_once('m').unwrap();
            minutes.parse::<f64>().unwrap() * 60.0 + seconds.parse::<f64>().unwrap()
        })
        .sum();
    let counted = cpu(&node, &namespace, "p");
    assert!(told > 0.1, "{told}");
    // The supervisor's own few milliseconds are in it; clock ticks are 10 ms.
    assert!((told - 0.05..told + 0.5).contains(&counted), "{counted} of {told} s");
}

#[test]
fn the_process_group_that_a_pgid_file_names_is_counted() {
    let namespace = Namespace::new("pgid");
    let pilot = Pilot::local(Options::new("pgid"), 600);
    namespace.script_on(&pilot, "p", "exec sleep 600\n");
    namespace.wait_phase("p", "Running", seconds(30));
    let node = Https::node(&pilot).as_admin();
    assert!(cpu(&node, &namespace, "p") < 0.5);
    // As what a Docker daemon starts: nothing of it descends from the container.
    let mut burner = as_user(ALICE, "bash");
    let mut burner = burner.args(["-c", BURN]).spawn().unwrap();
    // `timeout` makes a group of its own, which bears its pid.
    let group = burner.id();
    let file = pilot.pod_directory("p").join("containers/c1/pgid");
    std::fs::write(file, format!("{group}\n")).unwrap();
    wait_until("the group's CPU counts", seconds(30), || cpu(&node, &namespace, "p") > 1.0);
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(burner.id().try_into().unwrap()),
        nix::sys::signal::Signal::SIGTERM,
    )
    .unwrap();
    burner.wait().unwrap();
    // And stays when it has ended.
    let ended = cpu(&node, &namespace, "p");
    assert!(ended > 1.0 && cpu(&node, &namespace, "p") >= ended);
}

#[test]
fn the_nodes_pages_tell_of_its_pods_by_the_api_servers_proxy_too() {
    let namespace = Namespace::new("pages");
    let pilot = Pilot::local(Options::new("pages"), 600);
    namespace.script_on(&pilot, "p", BURN);
    namespace.script_on(&pilot, "q", "exit 0\n");
    namespace.wait_phase("p", "Running", seconds(30));
    namespace.wait_phase("q", "Succeeded", seconds(30));
    let proxied = |path: &str| {
        let path = format!("/api/v1/nodes/{}/proxy{path}", pilot.node);
        let output = bed().kubectl(&["get", "--raw", &path]);
        assert!(output.success, "{path}: {}", output.text);
        output.stdout
    };
    let json = |path: &str| -> Value { serde_json::from_str(&proxied(path)).unwrap() };
    let names = |list: &Value| -> Vec<String> {
        let items = list["items"].as_array().unwrap().iter();
        let mut names: Vec<String> =
            items.map(|pod| pod["metadata"]["name"].as_str().unwrap().to_owned()).collect();
        names.sort();
        names
    };

    let pods = json("/pods");
    assert_eq!((&pods["kind"], &pods["apiVersion"]), (&json!("PodList"), &json!("v1")), "{pods:#}");
    assert_eq!(names(&pods), ["p", "q"]);
    let p = pods["items"].as_array().unwrap().iter().find(|pod| pod["metadata"]["name"] == "p").unwrap();
    assert_eq!(p["status"]["phase"], "Running", "{p:#}");
    assert_eq!(names(&json("/runningpods/")), ["p"]);
    assert_eq!(proxied("/healthz"), "ok");
    let config = json("/configz");
    assert_eq!(config["kubeletconfig"]["authentication"]["anonymous"]["enabled"], false, "{config:#}");

    let summary =
        wait_for("the summary has rates", seconds(30), || {
            std::thread::sleep(Duration::from_millis(300));
            let summary = json("/stats/summary");
            let pod =
                &summary["pods"].as_array().unwrap().iter().find(|pod| pod["podRef"]["name"] == "p").unwrap()
                    ["containers"][0];
            (pod["cpu"]["usageNanoCores"].as_u64().unwrap_or(0) > 0).then(|| summary.clone())
        });
    assert_eq!(summary["node"]["nodeName"], pilot.node.as_str(), "{summary:#}");
    assert!(summary["node"]["cpu"]["usageCoreNanoSeconds"].as_u64().unwrap() > 0, "{summary:#}");
    let pod = summary["pods"].as_array().unwrap().iter().find(|pod| pod["podRef"]["name"] == "p").unwrap();
    assert_eq!(pod["podRef"]["namespace"], namespace.name.as_str());
    assert!(pod["containers"][0]["memory"]["workingSetBytes"].as_u64().unwrap() > 100_000, "{pod:#}");
    let brief = json("/stats/summary?only_cpu_and_memory=true");
    assert!(brief["node"]["fs"].is_null() && !summary["node"]["fs"].is_null(), "{brief:#}");

    let metrics = proxied("/metrics");
    assert_eq!(sample(&metrics, "jiriaf_pilot_pods{phase=\"Running\"}"), Some(1.0), "{metrics}");
    assert!(sample(&metrics, "jiriaf_pilot_until_drain_seconds").unwrap() > 60.0, "{metrics}");
    let page = proxied("/");
    for wanted in [pilot.node.as_str(), pilot.site.as_str(), "deadline 20", "NAMESPACE", "c1"] {
        assert!(page.contains(wanted), "{wanted}: {page}");
    }
}
