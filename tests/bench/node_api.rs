//! The Node's own API: how fast a log leaves the node, how long a program in a container, a scrape and a line to
//! a follower take.
//!
//! The client is the one of the end-to-end tests: no client library's time is in the figures, and none of the
//! TLS handshake with the client, since each clock starts on a connection that is ready. What the API server itself
//! dials is in them.

use std::io::{BufRead as _, BufReader, ErrorKind, Read, Write as _};
use std::time::{Duration, Instant, SystemTime};

use serde_json::{Value, json};

use crate::harness::https::{Https, read_exec, read_head, status};
use crate::harness::{Namespace, Pilot, container, pod_spec, seconds, wait_until};
use crate::report::{Figure, Report};
use crate::statistics::Samples;

/// Lines of the log that is read, each of 128 bytes: with their time stamps some 42 MB in five files.
const LINES: usize = 250_000;
const LINE_BYTES: usize = 128;

/// Reads of the whole log.
const READS: usize = 10;

/// Containers that are measured by a scrape.
const CONTAINERS: usize = 100;

/// Scrapes so soon after another get its answer: what is asked later is measured anew.
const BETWEEN_SCRAPES: Duration = Duration::from_millis(250);

/// Measures all of it on a pilot without other pods.
pub fn measure(report: &mut Report, namespace: &Namespace, pilot: &Pilot, samples: usize) {
    let node = Https::node(pilot).as_admin();
    logs(report, namespace, pilot, &node);
    follower(report, namespace, pilot, &node, samples);
    exec(report, namespace, pilot, &node, samples);
    scrape(report, namespace, pilot, &node, samples);
}

fn logs(report: &mut Report, namespace: &Namespace, pilot: &Pilot, node: &Https) {
    let line = "x".repeat(LINE_BYTES - 1);
    let script = format!("yes {line} | head -n {LINES}\n");
    namespace.script_on(pilot, "logs", &script);
    namespace.wait_phase("logs", "Succeeded", seconds(60));
    let path = format!("/containerLogs/{}/logs/c1", namespace.name);
    let mut rates = Samples::default();
    let mut buffer = vec![0; 1 << 20];
    // The first one fills the page cache.
    for index in 0..=READS {
        let mut connection = node.connect().unwrap();
        let start = Instant::now();
        connection.write_all(node.head("GET", &path).as_bytes()).unwrap();
        assert_eq!(status(&read_head(&mut connection).unwrap()), 200);
        let mut bytes = 0;
        loop {
            match connection.read(&mut buffer) {
                Ok(0) => break,
                Ok(n) => bytes += n,
                Err(error) if error.kind() == ErrorKind::UnexpectedEof => break,
                Err(error) => panic!("{path}: {error}"),
            }
        }
        let took = start.elapsed();
        // The chunks' framing is a ten thousandth of it.
        assert!(bytes >= LINES * LINE_BYTES, "{bytes} of {} bytes", LINES * LINE_BYTES);
        if index > 0 {
            rates.number((LINES * LINE_BYTES) as f64 / took.as_secs_f64() / 1e6);
        }
    }
    namespace.of("pods").delete("logs", None);
    report.push(Figure::number("a log out of the node", "MB/s", rates.quantile(50)).at_least(300.0));
}

fn follower(report: &mut Report, namespace: &Namespace, pilot: &Pilot, node: &Https, samples: usize) {
    namespace.script_on(pilot, "follow", "while sleep 0.05; do echo $EPOCHREALTIME; done\n");
    namespace.wait_phase("follow", "Running", seconds(30));
    let path = format!("/containerLogs/{}/follow/c1?follow=true&tailLines=0", namespace.name);
    let mut connection = BufReader::new(node.open("GET", &path).unwrap());
    let mut seen = Samples::default();
    let mut line = String::new();
    while seen.len() < samples {
        line.clear();
        assert_ne!(connection.read_line(&mut line).unwrap(), 0, "the follower was left");
        let now = SystemTime::now();
        // Between the lines stand the chunks' sizes.
        if line.trim().len() == "1795544303.123456".len() && line.contains('.') {
            seen.push(crate::series::moment(line.trim()), now);
        }
    }
    namespace.of("pods").delete("follow", Some(1));
    report.push(Figure::times("a line → a follower of the log sees it", &seen).goal(50.0, None));
}

fn exec(report: &mut Report, namespace: &Namespace, pilot: &Pilot, node: &Https, samples: usize) {
    namespace.script_on(pilot, "exec", "exec sleep 6000\n");
    namespace.wait_phase("exec", "Running", seconds(30));
    let websocket = "v5.channel.k8s.io";
    let by_server =
        format!("/api/v1/namespaces/{}/pods/exec/exec?container=c1&command=true&stdout=true", namespace.name);
    let by_node = format!("/exec/{}/exec/c1?command=true&output=1", namespace.name);
    let round_trips = |server: Https, path: &str| {
        let mut times = Samples::default();
        // The first ones ask for rights and fill caches.
        for index in 0..samples + 3 {
            let mut connection = server.connect().unwrap();
            let start = Instant::now();
            connection.write_all(server.head("GET", path).as_bytes()).unwrap();
            assert_eq!(status(&read_head(&mut connection).unwrap()), 101);
            let (_, end) = read_exec(&mut connection).unwrap();
            let took = start.elapsed();
            assert_eq!(end["status"], "Success", "{end}");
            if index >= 3 {
                times.add(took);
            }
        }
        times
    };
    let direct = round_trips(node.websocket(websocket), &by_node);
    let proxied = round_trips(Https::api_server().websocket(websocket), &by_server);
    report.push(Figure::times("exec of true, at the Node's port", &direct));
    report.push(Figure::times("exec of true, at the API server", &proxied).goal(30.0, None));
    namespace.of("pods").delete("exec", Some(1));
}

fn scrape(report: &mut Report, namespace: &Namespace, pilot: &Pilot, node: &Https, samples: usize) {
    namespace.config_map("scrape", &[("run.sh", crate::series::SLEEP)]);
    let each = 10;
    for index in 0..CONTAINERS / each {
        let containers: Vec<Value> =
            (0..each).map(|number| container(&format!("c{number}"), "scrape")).collect();
        let mut spec = pod_spec("Never", &containers);
        spec["terminationGracePeriodSeconds"] = json!(1);
        namespace.pod_on(pilot, &format!("scrape{index}"), spec);
    }
    for index in 0..CONTAINERS / each {
        namespace.wait_phase(&format!("scrape{index}"), "Running", seconds(60));
    }
    let mut times = Samples::default();
    for index in 0..samples + 3 {
        std::thread::sleep(BETWEEN_SCRAPES);
        let mut connection = node.connect().unwrap();
        let start = Instant::now();
        connection.write_all(node.head("GET", "/metrics/resource").as_bytes()).unwrap();
        let head = read_head(&mut connection).unwrap();
        let length = head.to_ascii_lowercase();
        let length = length.split_once("content-length: ").and_then(|(_, rest)| rest.lines().next());
        let mut body = vec![0; length.expect("the answer's length is told").parse().unwrap()];
        connection.read_exact(&mut body).unwrap();
        let took = start.elapsed();
        let text = String::from_utf8_lossy(&body);
        assert_eq!(text.matches("\ncontainer_cpu_usage_seconds_total{").count(), CONTAINERS, "{text}");
        if index >= 3 {
            times.add(took);
        }
    }
    let name = format!("a scrape of /metrics/resource, {CONTAINERS} containers");
    report.push(Figure::times(&name, &times).goal(10.0, None));
    for index in 0..CONTAINERS / each {
        namespace.of("pods").delete(&format!("scrape{index}"), None);
    }
    wait_until("the containers are gone", seconds(60), || namespace.of("pods").list("").is_empty());
}
