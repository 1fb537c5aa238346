use std::future::Future;

use serde_json::{Value, from_value, json};

use super::*;
use crate::pod::session::Request;

const S: Verdict = Verdict::Success;
const F: Verdict = Verdict::Failure;

fn settings(probe: Value) -> Settings {
    Settings::new(&from_value(probe).unwrap())
}

/// The cases of kubelet's worker_test.go: what follows from a row of verdicts, and whether the probe goes on.
#[test]
fn a_state_changes_after_enough_verdicts_in_a_row() {
    type Case = (&'static str, Kind, u32, u32, bool, &'static [Verdict], &'static [Option<Verdict>], bool);
    let table: [Case; 9] = [
        (
            "TestFailureThreshold",
            Kind::Readiness,
            1,
            3,
            false,
            &[S, S, F, F, F, F, S, F, F, S, F, F, F],
            &[Some(S), None, None, None, Some(F), None, Some(S), None, None, None, None, None, Some(F)],
            false,
        ),
        (
            "TestSuccessThreshold",
            Kind::Readiness,
            3,
            1,
            false,
            &[S, S, S, S, F, S, S, F, S, S, S],
            &[None, None, Some(S), None, Some(F), None, None, None, None, None, Some(S)],
            false,
        ),
        ("TestStartupProbeSuccessThreshold", Kind::Startup, 1, 3, false, &[S, F], &[Some(S), None], true),
        (
            "TestStartupProbeFailureThreshold",
            Kind::Startup,
            1,
            3,
            false,
            &[F, F, F, S],
            &[None, None, Some(F), None],
            true,
        ),
        (
            "TestOnHoldOnLivenessOrStartupCheckFailure",
            Kind::Liveness,
            1,
            1,
            false,
            &[F, S, F],
            &[Some(F), None, None],
            true,
        ),
        (
            "TestResultRunOnLivenessCheckFailure",
            Kind::Liveness,
            1,
            3,
            false,
            &[S, F, F, S, F, F, F],
            &[None, None, None, None, None, None, Some(F)],
            true,
        ),
        ("an interrupted row counts anew", Kind::Startup, 1, 2, false, &[F, S], &[None, Some(S)], true),
        (
            "readiness of before a crash stays",
            Kind::Readiness,
            1,
            2,
            true,
            &[S, F, F],
            &[None, None, Some(F)],
            false,
        ),
        (
            "readiness fails quietly at first",
            Kind::Readiness,
            1,
            1,
            false,
            &[F, F, S],
            &[None, None, Some(S)],
            false,
        ),
    ];
    for (name, kind, success, failure, ready, verdicts, wanted, over) in table {
        let settings = settings(json!({"successThreshold": success, "failureThreshold": failure}));
        let mut thresholds = Thresholds::new(kind, &settings, ready);
        let got: Vec<_> = verdicts.iter().map(|verdict| thresholds.note(*verdict)).collect();
        assert_eq!(got, wanted, "{name}");
        assert_eq!(thresholds.over, over, "{name}");
    }
}

#[test]
fn what_is_left_out_has_the_api_servers_default() {
    let got = settings(json!({}));
    let seconds = Duration::from_secs;
    assert_eq!((got.initial_delay, got.timeout, got.period), (seconds(0), seconds(1), seconds(10)));
    assert_eq!((got.success_threshold, got.failure_threshold, got.grace), (1, 3, None));
    let got = settings(json!({"periodSeconds": i32::MAX, "initialDelaySeconds": i32::MAX,
        "timeoutSeconds": -1, "terminationGracePeriodSeconds": 7}));
    assert!(Instant::now().checked_add(got.period + got.initial_delay).is_some());
    assert_eq!((got.timeout, got.grace), (seconds(1), Some(seconds(7))));
}

#[test]
fn the_first_probe_waits_for_its_delay_from_the_containers_start() {
    let start = Instant::now();
    let at = |seconds: u64| start + Duration::from_secs(seconds);
    let settings = settings(json!({"initialDelaySeconds": 5, "periodSeconds": 10}));
    let table = [
        (Kind::Startup, 0, 5),
        (Kind::Readiness, 3, 5),
        // Held back by a startup probe, or a pilot that was away.
        (Kind::Readiness, 8, 8),
        (Kind::Liveness, 8, 15),
        (Kind::Liveness, 15, 15),
        (Kind::Liveness, 26, 35),
    ];
    for (kind, now, wanted) in table {
        assert_eq!(settings.first(kind, start, at(now)) - start, at(wanted) - start, "{kind:?} at {now}");
    }
}

#[test]
fn complaints_come_seldom_after_the_first() {
    let mut complaints = Complaints::default();
    let start = Instant::now();
    let taken = |complaints: &mut Complaints, at: u64| complaints.take(start + Duration::from_secs(at));
    assert_eq!((0..100).filter(|at| taken(&mut complaints, *at)).count(), 25);
    assert!(taken(&mut complaints, 300) && !taken(&mut complaints, 301));
}

pub(super) fn container(value: Value) -> Container {
    let mut container: Container = from_value(value).unwrap();
    container.name = "c1".to_owned();
    container
}

/// An HTTP answer.
pub(super) fn answer(status: &str, headers: &str, body: &str) -> String {
    format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\n{headers}\r\n{body}", body.len())
}

/// A run whose programs end as `exit` says of their first word and how often they ran.
struct Run {
    probes: Probes,
    reports: mpsc::Receiver<Report>,
    calls: mpsc::UnboundedReceiver<String>,
    tally: Arc<Tally>,
}

fn start(container: Container, ready: bool, exit: impl Fn(&str, usize) -> i32 + Send + 'static) -> Run {
    let (run, mut requests) = RunHandle::new(1);
    let (calls_tx, calls) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        let mut counts = std::collections::BTreeMap::<String, usize>::new();
        while let Some(request) = requests.recv().await {
            if let Request::Exec { argv, ended, .. } = request {
                let count = counts.entry(argv[0].clone()).or_default();
                *count += 1;
                let _ = ended.send(Ok(exit(&argv[0], *count)));
                let _ = calls_tx.send(argv[0].clone());
            }
        }
    });
    let (reports_tx, reports) = mpsc::channel(8);
    let subject = Subject {
        events: Events::to_log(),
        pod: Pod::default(),
        container,
        index: 2,
        restart: 1,
        run,
        started_at: SystemTime::now(),
        started: false,
        ready,
        tally: Arc::default(),
    };
    let tally = Arc::clone(&subject.tally);
    Run { probes: spawn(subject, reports_tx), reports, calls, tally }
}

fn exec_probe(name: &str, failures: i32) -> Value {
    json!({"exec": {"command": [name]}, "periodSeconds": 1, "failureThreshold": failures, "terminationGracePeriodSeconds": 4})
}

async fn next<T>(wanted: impl Future<Output = Option<T>>) -> T {
    tokio::time::timeout(Duration::from_secs(20), wanted).await.unwrap().unwrap()
}

#[tokio::test]
async fn a_startup_probe_holds_the_others_back() {
    let container = container(json!({"startupProbe": exec_probe("startup", 5),
        "readinessProbe": exec_probe("readiness", 1), "livenessProbe": exec_probe("liveness", 1)}));
    let exit = |name: &str, count: usize| match (name, count) {
        ("startup", 1) => 1,
        ("liveness", 2..) => 1,
        _ => 0,
    };
    let mut run = start(container, false, exit);
    let found: [Found; 3] =
        [next(run.reports.recv()).await, next(run.reports.recv()).await, next(run.reports.recv()).await].map(
            |report| {
                assert_eq!((report.index, report.restart), (2, 1));
                report.found
            },
        );
    let message = "Container c1 failed liveness probe".to_owned();
    let failed = Found::Failed { kind: Kind::Liveness, message, grace: Some(Duration::from_secs(4)) };
    assert_eq!(found, [Found::Started, Found::Ready(true), failed]);
    let mut calls = Vec::new();
    while let Ok(call) = run.calls.try_recv() {
        calls.push(call);
    }
    assert_eq!(calls[..3], ["startup", "startup", "readiness"], "{calls:?}");
    let counted: Vec<_> = run.tally.counted().filter(|(kind, ..)| *kind != "Readiness").collect();
    let wanted = [
        ("Startup", "successful", 1),
        ("Startup", "failed", 1),
        ("Liveness", "successful", 1),
        ("Liveness", "failed", 1),
    ];
    assert_eq!(counted, wanted);
}

#[tokio::test]
async fn a_startup_probe_that_fails_is_told_once_and_stops() {
    let container =
        container(json!({"startupProbe": exec_probe("startup", 1), "livenessProbe": exec_probe("l", 1)}));
    let mut run = start(container, false, |_, _| 1);
    let Found::Failed { kind, message, .. } = next(run.reports.recv()).await.found else { panic!() };
    assert_eq!((kind, message.as_str()), (Kind::Startup, "Container c1 failed startup probe"));
    assert!(tokio::time::timeout(Duration::from_millis(1500), run.reports.recv()).await.is_err());
    assert_eq!(run.calls.len(), 1);
}

#[tokio::test]
async fn readiness_alone_goes_on_while_a_pod_is_deleted() {
    let container =
        container(json!({"readinessProbe": exec_probe("r", 1), "livenessProbe": exec_probe("l", 1)}));
    let mut run = start(container, true, |name, count| i32::from(name == "l" || count > 1));
    run.probes.stopping();
    assert_eq!(next(run.reports.recv()).await.found, Found::Ready(false));
    assert!(run.probes.tasks.iter().any(|(kind, task)| *kind == Kind::Liveness && task.is_finished()));
    drop(run.probes);
    assert!(next(async { Some(run.reports.recv().await) }).await.is_none());
}

#[tokio::test]
async fn a_container_without_probes_has_no_tasks() {
    assert!(start(container(json!({})), false, |_, _| 0).probes.tasks.is_empty());
}

/// Answers every request, as a pod's server would, from a thread of its own.
fn busy_server() -> u16 {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        while let Ok((mut stream, _)) = listener.accept() {
            let _ = std::io::Read::read(&mut stream, &mut [0; 1024]);
            let _ = std::io::Write::write_all(&mut stream, answer("200 OK", "", "ok").as_bytes());
        }
    });
    port
}

/// The issue's limit is 5 % of a core; the unoptimised build keeps it too.
#[tokio::test]
async fn a_hundred_pods_that_probe_every_second_cost_little() {
    const SECONDS: u64 = 4;
    let port = busy_server();
    let probes = json!({"readinessProbe": {"httpGet": {"port": port}, "periodSeconds": 1},
        "livenessProbe": {"tcpSocket": {"port": port}, "periodSeconds": 1}});
    let clock = nix::time::ClockId::CLOCK_THREAD_CPUTIME_ID;
    // Starts and first allocations apart.
    let mut runs: Vec<Run> = (0..100).map(|_| start(container(probes.clone()), false, |_, _| 0)).collect();
    for run in &mut runs {
        assert_eq!(next(run.reports.recv()).await.found, Found::Ready(true));
    }
    let before = Duration::from(clock.now().unwrap());
    tokio::time::sleep(Duration::from_secs(SECONDS)).await;
    let used = Duration::from(clock.now().unwrap()) - before;
    assert!(runs.iter_mut().all(|run| run.reports.try_recv().is_err()), "a probe failed");
    println!("{:.2} % of a core", used.as_secs_f64() / SECONDS as f64 * 100.0);
    assert!(used.as_secs_f64() < SECONDS as f64 * 0.25, "{used:?} in {SECONDS} s");
}
