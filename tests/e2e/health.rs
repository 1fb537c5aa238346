//! What probes of each kind ask, and what their events say. The rules of thresholds are tested in src/pod/probe.

use serde_json::{Value, json};

use crate::harness::{Namespace, Options, Pilot, container, pod_spec, read, seconds, wait_until};

fn events(namespace: &Namespace, pod: &str) -> Vec<(String, String)> {
    namespace.events(pod)
}

fn restarts(namespace: &Namespace, pod: &str) -> Value {
    namespace.pod(pod).unwrap_or_default()["status"]["containerStatuses"][0]["restartCount"].clone()
}

#[test]
fn a_liveness_probe_that_fails_starts_the_container_again_and_says_why() {
    let namespace = Namespace::new("liveness");
    let pilot = Pilot::local(Options::new("liveness"), 600);
    namespace
        .config_map("p", &[("run.sh", "echo run >>$JIRIAF_POD_DIR/runs; while :; do sleep 0.2; done\n")]);
    let mut probed = container("c1", "p");
    // The first run fails once the second probe is over; later ones live.
    let command = "n=$(wc -l <$JIRIAF_POD_DIR/runs); echo \"run $n is $WORD\"; [ $n -gt 1 ]";
    probed["env"] = json!([{"name": "WORD", "value": "sick"}]);
    probed["livenessProbe"] = json!({"exec": {"command": ["sh", "-c", command]}, "periodSeconds": 1,
        "failureThreshold": 2, "terminationGracePeriodSeconds": 1});
    namespace.pod_on(&pilot, "p", pod_spec("Always", &[probed]));
    wait_until("it is started again", seconds(40), || restarts(&namespace, "p") == 1);
    assert_eq!(read(&pilot.pod_directory("p").join("runs")), "run\nrun\n");
    wait_until("an event says why", seconds(10), || {
        events(&namespace, "p").iter().any(|(reason, message)| {
            reason == "Unhealthy" && message == "Liveness probe failed: run 1 is sick\n"
        })
    });
    // The second run is left alone.
    std::thread::sleep(seconds(3));
    assert_eq!(restarts(&namespace, "p"), 1);
}

#[test]
fn a_program_that_is_too_slow_is_killed_and_a_startup_probe_holds_liveness_back() {
    let namespace = Namespace::new("startup");
    let pilot = Pilot::local(Options::new("startup"), 600);
    namespace.config_map("p", &[("run.sh", "while :; do sleep 0.2; done\n")]);
    let mut probed = container("c1", "p");
    let slow = "echo $$ >>$JIRIAF_POD_DIR/slow; exec sleep 600";
    probed["startupProbe"] =
        json!({"exec": {"command": ["sh", "-c", slow]}, "periodSeconds": 1, "failureThreshold": 2});
    probed["livenessProbe"] =
        json!({"exec": {"command": ["sh", "-c", "touch $JIRIAF_POD_DIR/asked"]}, "periodSeconds": 1});
    let mut spec = pod_spec("Never", &[probed]);
    spec["terminationGracePeriodSeconds"] = json!(2);
    namespace.pod_on(&pilot, "p", spec);
    namespace.wait_phase("p", "Failed", seconds(40));
    let directory = pilot.pod_directory("p");
    assert!(!directory.join("asked").exists(), "liveness was asked before the container had started");
    let slow = read(&directory.join("slow"));
    let slow: Vec<&str> = slow.lines().collect();
    assert_eq!(slow.len(), 2, "{slow:?}");
    let live = slow.iter().filter(|pid| std::path::Path::new("/proc").join(pid).exists());
    assert_eq!(live.count(), 0, "{slow:?}");
    wait_until("an event says why", seconds(10), || {
        events(&namespace, "p").iter().any(|(reason, message)| {
            reason == "Unhealthy"
                && message.starts_with("Startup probe failed: command timed out: ")
                && message.ends_with(" timed out after 1s")
        })
    });
}

#[test]
fn a_server_is_asked_at_the_hosts_loopback_address() {
    let namespace = Namespace::new("probe-http");
    let pilot = Pilot::local(Options::new("probe-http"), 600);
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let script = format!(
        "mkdir www; echo well >www/healthz; cd www; exec python3 -m http.server --bind 127.0.0.1 {port}\n"
    );
    namespace.config_map("p", &[("run.sh", &script)]);
    let mut probed = container("c1", "p");
    probed["ports"] = json!([{"name": "web", "containerPort": port}]);
    probed["startupProbe"] =
        json!({"tcpSocket": {"port": "web"}, "periodSeconds": 1, "failureThreshold": 30});
    probed["livenessProbe"] = json!({"httpGet": {"path": "/healthz", "port": "web"}, "periodSeconds": 1, "failureThreshold": 1,
        "terminationGracePeriodSeconds": 1});
    namespace.pod_on(&pilot, "p", pod_spec("Always", &[probed]));
    namespace.wait_phase("p", "Running", seconds(30));
    let log = pilot.pod_directory("p").join("containers/c1/logs/0.log");
    wait_until("it is asked", seconds(20), || read(&log).contains("GET /healthz HTTP/1.1\" 200"));
    assert_eq!(restarts(&namespace, "p"), 0);
    std::fs::remove_file(pilot.pod_directory("p").join("containers/c1/www/healthz")).unwrap();
    wait_until("it is started again", seconds(30), || restarts(&namespace, "p") == 1);
    wait_until("an event says why", seconds(10), || {
        events(&namespace, "p").iter().any(|(reason, message)| {
            reason == "Unhealthy"
                && message == "Liveness probe failed: HTTP probe failed with statuscode: 404"
        })
    });
}
