//! kill -9 of the pilot at random moments, in every phase of its pods, also while the API server is away and during the
//! drain: nothing runs twice, nothing is lost, every exit code and restart count is right.
//!
//! `JIRIAF_CRASHES` says how many kills (50), `JIRIAF_SEED` which moments; a failure names the seed.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::harness::{ApiProxy, Namespace, Options, Pilot, container, pod_spec, read, seconds, wait_for};

/// Kills that a guardian bears: a fourth within ten minutes is one too many.
const KILLS: usize = 3;

/// Pilots at work at once: each costs the machine's two cores some tenths of a second a start.
const PILOTS: usize = 3;

/// A kill comes at most so long after the pilot's (or the pods') start. Init containers, restarts and ends lie within.
const LATEST_MS: u64 = 1500;

/// xorshift64*: enough for moments, and the same for the same seed.
struct Moments(u64);

impl Moments {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) % limit
    }
}

#[test]
fn kills_at_random_moments_lose_nothing_and_repeat_nothing() {
    let number =
        |name: &str, default: u64| std::env::var(name).ok().map_or(default, |text| text.parse().expect(name));
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64;
    let seed = number("JIRIAF_SEED", now | 1);
    let rounds = (number("JIRIAF_CRASHES", 50) as usize).div_ceil(KILLS);
    println!("JIRIAF_SEED={seed}");
    let next = std::sync::atomic::AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..PILOTS {
            scope.spawn(|| {
                loop {
                    let round = next.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
                    if round >= rounds {
                        return;
                    }
                    let moments =
                        Moments(seed.wrapping_add((round as u64 + 1).wrapping_mul(0x9E37_79B9)) | 1);
                    eprintln!("round {round} of seed {seed}");
                    one_round(round, moments);
                }
            });
        }
    });
}

fn one_round(round: usize, mut moments: Moments) {
    let namespace = Namespace::new("random");
    let away = round % 3 == 1;
    let drains = round % 3 == 2;
    let proxy = away.then(ApiProxy::start);
    let mut options = Options::new("random");
    options.arguments.push("--crash-loop-back-off-max=1s".to_owned());
    options.server = proxy.as_ref().map(ApiProxy::url);
    let mut pilot = Pilot::local(options, 600);
    let runs = pilot.home.join("runs");
    let go = pilot.home.join("go");
    create_pods(&namespace, &pilot, &runs, &go);

    let mut last = None;
    for n in 0..KILLS {
        let pid = wait_for("a pilot to kill", seconds(30), || {
            pilot.stages("pilot").first().copied().filter(|next| Some(*next) != last)
        });
        std::thread::sleep(Duration::from_millis(moments.below(LATEST_MS))); // the moment is what is tested
        if let Some(proxy) = proxy.as_ref().filter(|_| n == 1) {
            proxy.cut();
        }
        if drains && n == 2 {
            pilot.signal(Signal::SIGTERM);
            std::thread::sleep(Duration::from_millis(moments.below(300)));
        }
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        last = Some(pid);
        if let Some(proxy) = proxy.as_ref().filter(|_| n == 1) {
            std::thread::sleep(Duration::from_millis(moments.below(LATEST_MS)));
            proxy.restore();
        }
    }
    if drains {
        let code = pilot.wait_exit(seconds(60));
        assert_eq!(code, Some(0), "{}", pilot.output());
    } else {
        std::fs::write(&go, "").unwrap();
    }
    for name in ["steps", "retry", "long", "side"] {
        check(&namespace, &pilot, name, &runs, drains);
    }
    if drains {
        assert_eq!(pilot.processes(), Vec::<(i32, String)>::new());
    }
}

/// `steps`: an init container, then exit 3. `retry`: fails twice, then succeeds. `long`: runs until it may end, by exit 7.
/// `side`: a sidecar beside a main container that ends with 5.
fn create_pods(namespace: &Namespace, pilot: &Pilot, runs: &Path, go: &Path) {
    let note = format!("echo \"$JIRIAF_CONTAINER\" >>{}\n", runs.display());
    let until_go = format!("until [ -e {} ]; do sleep 0.05; done\n", go.display());
    namespace.config_map(
        "work",
        &[
            ("prepare", &format!("{note}sleep 0.3\n")),
            ("fails", &format!("{note}sleep 0.3\nexit 3\n")),
            ("retries", &format!("{note}sleep 0.1\necho x >>tries\n[ $(wc -l <tries) = 3 ]\n")),
            ("waits", &format!("{note}{until_go}exit 7\n")),
            ("beside", &format!("{note}sleep 1000\n")),
            ("main", &format!("{note}sleep 0.5\nexit 5\n")),
        ],
    );
    let part = |name: &str| {
        let mut container = container(name, "work");
        container["image"] = json!(format!("work/{name}"));
        container
    };
    let mut sidecar = part("beside");
    sidecar["restartPolicy"] = json!("Always");
    let with = |policy: &str, init: &[Value], main: Value| {
        let mut spec = pod_spec(policy, &[main]);
        spec["initContainers"] = json!(init);
        spec["terminationGracePeriodSeconds"] = json!(1);
        spec
    };
    namespace.pod_on(pilot, "steps", with("Never", &[part("prepare")], part("fails")));
    namespace.pod_on(pilot, "retry", with("OnFailure", &[], part("retries")));
    namespace.pod_on(pilot, "long", with("Never", &[], part("waits")));
    namespace.pod_on(pilot, "side", with("Never", &[sidecar], part("main")));
}

fn check(namespace: &Namespace, pilot: &Pilot, name: &str, runs: &Path, drains: bool) {
    let pod = wait_for(&format!("the end of {name}"), seconds(60), || {
        let pod = namespace.pod(name)?;
        let phase = pod["status"]["phase"].as_str()?;
        matches!(phase, "Succeeded" | "Failed").then_some(pod)
    });
    let says = || format!("{name}: {:#}\n{}\n{}", pod["status"], read_or_empty(runs), pilot.output());
    let drained = pod["status"]["reason"] == "Terminated";
    assert!(!drained || drains, "{}", says());
    let wanted: BTreeMap<&str, i64> = match name {
        "steps" => [("prepare", 0), ("fails", 3)].into(),
        "retry" => [("retries", 0)].into(),
        "long" => [("waits", 7)].into(),
        _ => [("main", 5)].into(),
    };
    let uid = pod["metadata"]["uid"].as_str().unwrap();
    let statuses = ["initContainerStatuses", "containerStatuses"];
    for one in statuses.iter().flat_map(|list| pod["status"][*list].as_array().into_iter().flatten()) {
        let container = one["name"].as_str().unwrap();
        let mine = format!("/{uid}/{container}/");
        let mut numbers: Vec<u64> = read_or_empty(runs)
            .lines()
            .filter_map(|line| line.split_once(&mine).map(|(_, number)| number.parse().unwrap()))
            .collect();
        let count = numbers.len();
        numbers.sort_unstable();
        numbers.dedup();
        assert_eq!(numbers.len(), count, "{container} ran twice with one number: {}", says());
        let restarts = one["restartCount"].as_u64().unwrap();
        assert!(count == 0 || restarts == count as u64 - 1, "{container}: {count} runs: {}", says());
        if drained {
            continue;
        }
        if let Some(code) = wanted.get(container) {
            assert_eq!(one["state"]["terminated"]["exitCode"], json!(code), "{container}: {}", says());
            assert_eq!(restarts, if container == "retries" { 2 } else { 0 }, "{container}: {}", says());
        } else {
            // The sidecar ends by its SIGTERM, and is not started again for it.
            assert_eq!(one["state"]["terminated"]["exitCode"], 143, "{}", says());
        }
    }
    let phase = if name == "retry" { "Succeeded" } else { "Failed" };
    assert!(drained || pod["status"]["phase"] == phase, "{}", says());
}

fn read_or_empty(file: &Path) -> String {
    if file.exists() { read(file) } else { String::new() }
}
