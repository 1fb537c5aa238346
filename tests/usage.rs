//! What containers use, measured on real ones: the real binary's supervisors, driven as the pilot drives them.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use jiriaf_pilot::container::usage::{Meter, PgidFiles, Target, Usage, sample};
use jiriaf_pilot::container::{
    ContainerId, ContainerSpec, Event, LogLimits, Session, Supervisor, Supervisors,
};

const SOON: Duration = Duration::from_secs(20);

/// Burns the given CPU seconds and ends.
const BURN: &str = r#"burn() { perl -e '$s = shift; 1 while (times)[0] + (times)[1] < $s' "$1"; }; "#;

struct Bed {
    dir: tempfile::TempDir,
    all: Supervisors,
    pgids: PgidFiles,
}

struct Container {
    supervisor: Supervisor,
    dir: PathBuf,
    meter: Meter,
}

impl Bed {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mark = format!("usage-{}", std::process::id());
        let all = Supervisors::new(&dir.path().join("state"), mark)
            .unwrap()
            .with_executable(PathBuf::from(env!("CARGO_BIN_EXE_jiriaf-pilot")));
        Self { dir, all, pgids: PgidFiles::default() }
    }

    async fn start(&self, name: &str, script: &str) -> Container {
        let dir = self.dir.path().join(name);
        fs::create_dir(&dir).unwrap();
        let id = ContainerId { pod_uid: "0a-1".into(), name: name.into(), restart: 0 };
        let mut supervisor = self.all.spawn(id).unwrap();
        let spec = ContainerSpec {
            argv: vec!["bash".into(), "-c".into(), format!("{BURN}{script}")],
            env: vec![("PATH".into(), std::env::var("PATH").unwrap())],
            working_dir: dir.clone(),
            container_dir: dir.clone(),
            log: dir.join("0.log"),
            log_limits: LogLimits::default(),
            session: Session::Own,
            oom_score_adj: None,
            open_files: None,
            stop_signal: None,
            no_new_privs: false,
            cpus: Vec::new(),
            cgroup: None,
            orphan_timeout: Duration::ZERO,
            drain_at: None,
            grace: Duration::from_millis(100),
            forward_output: false,
            stdio: jiriaf_pilot::container::Stdio::Null,
            view: None,
        };
        supervisor.start(spec).await;
        let event = tokio::time::timeout(SOON, supervisor.next()).await.unwrap();
        assert!(matches!(event, Event::Started { .. }), "{event:?}");
        Container { supervisor, dir, meter: Meter::default() }
    }

    fn sample(&self, containers: &mut [Container]) -> Vec<Usage> {
        let mut targets: Vec<_> = containers
            .iter_mut()
            .map(|c| Target { supervisor: c.supervisor.pid(), directory: &c.dir, meter: &mut c.meter })
            .collect();
        sample(&mut targets, &self.pgids)
    }

    /// Samples until something holds.
    fn until(&self, container: &mut Container, holds: impl Fn(&Usage) -> bool) -> Usage {
        let end = Instant::now() + SOON;
        loop {
            let usage = self.sample(std::slice::from_mut(container)).remove(0);
            if holds(&usage) {
                return usage;
            }
            assert!(Instant::now() < end, "{usage:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

fn wait_for(path: &Path) {
    let end = Instant::now() + SOON;
    while !path.exists() {
        assert!(Instant::now() < end, "{} is not there", path.display());
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn seconds(usage: &Usage) -> f64 {
    usage.cpu.as_secs_f64()
}

#[tokio::test]
async fn processes_that_have_ended_count_however_they_detached() {
    let bed = Bed::new();
    let script = "burn 0.3; (burn 0.3); setsid bash -c '(setsid sleep 60 &) ; exit'; \
         export -f burn; setsid bash -c 'burn 0.4 &' ; sleep 2; touch done; sleep 60; :";
    let mut container = bed.start("a", script).await;
    wait_for(&container.dir.join("done"));
    // Left are bash, its sleep and the detached one.
    let usage = bed.until(&mut container, |usage| seconds(usage) >= 0.95 && usage.processes == 3);
    assert!(seconds(&usage) < 1.5, "{usage:?}");
    assert!(usage.page_faults > 500, "{usage:?}");
}

#[tokio::test]
async fn a_detached_process_that_burns_is_seen_burning() {
    let bed = Bed::new();
    let mut container = bed.start("a", "(setsid bash -c 'while :; do :; done' &); sleep 60").await;
    let usage = bed.until(&mut container, |usage| seconds(usage) > 0.4);
    assert!(usage.nano_cores.unwrap() > 100_000_000, "{usage:?}");
}

#[tokio::test]
async fn memory_is_what_was_touched_by_all_of_them() {
    let bed = Bed::new();
    let script = "perl -e 'vec($x, 50 << 20, 8) = 1; open F, \">x\"; sleep 60' & \
         (setsid perl -e 'vec($x, 30 << 20, 8) = 1; open F, \">y\"; sleep 60' &) ; sleep 60; :";
    let mut container = bed.start("a", script).await;
    wait_for(&container.dir.join("x"));
    wait_for(&container.dir.join("y"));
    let usage = bed.until(&mut container, |usage| usage.processes == 4);
    let mib = usage.working_set >> 20;
    assert!((80..90).contains(&mib), "{mib} MiB: {usage:?}");
    assert!(usage.rss <= usage.working_set && usage.working_set <= usage.usage, "{usage:?}");
}

#[tokio::test]
async fn a_container_that_has_just_begun_has_figures() {
    let bed = Bed::new();
    let mut containers = vec![bed.start("a", "exec sleep 60").await];
    let usage = bed.sample(&mut containers).remove(0);
    assert!(usage.cpu > Duration::ZERO && usage.working_set > 0, "{usage:?}");
    assert_eq!(usage.processes, 1);
    assert!(seconds(&usage) < 0.1, "the supervisor's own time is not its container's: {usage:?}");
}

#[tokio::test]
async fn nothing_goes_down_or_counts_twice_while_processes_come_and_go() {
    let bed = Bed::new();
    let script = "work() { while :; do burn 0.01; (burn 0.01; burn 0.01 & wait); done; }; work & work & work";
    let mut container = bed.start("a", script).await;
    let start = Instant::now();
    let cpus = u32::try_from(std::thread::available_parallelism().unwrap().get()).unwrap();
    let first = bed.sample(std::slice::from_mut(&mut container)).remove(0);
    let mut last = first.clone();
    let mut samples = 0;
    while start.elapsed() < Duration::from_secs(4) {
        let usage = bed.sample(std::slice::from_mut(&mut container)).remove(0);
        assert!(usage.cpu >= last.cpu && usage.page_faults >= last.page_faults, "{last:?} {usage:?}");
        // Ticks are cut off for each process, so what they hold may come at once.
        let most = start.elapsed() * cpus + Duration::from_millis(300);
        assert!(usage.cpu <= most, "{usage:?} in {:?}", start.elapsed());
        last = usage;
        samples += 1;
    }
    assert!(samples > 300, "{samples}");
    // What was burnt is there: this container has the CPUs nearly for itself, or shares them with other tests.
    assert!((last.cpu - first.cpu).as_secs_f64() > 0.8, "{last:?}");
}

#[tokio::test]
async fn processes_that_nobody_waits_for_count() {
    let bed = Bed::new();
    let script = r#"exec perl -e '$SIG{CHLD} = "IGNORE";
        for (1..4) { if (!fork) { 1 while (times)[0] + (times)[1] < 0.4; exit } sleep 1 }
        open F, ">done"; sleep 60'"#;
    let mut container = bed.start("a", script).await;
    let end = container.dir.join("done");
    while !end.exists() {
        bed.sample(std::slice::from_mut(&mut container));
        std::thread::sleep(Duration::from_millis(10));
    }
    let usage = bed.sample(std::slice::from_mut(&mut container)).remove(0);
    assert!((1.2..1.8).contains(&seconds(&usage)), "{usage:?}");
}

/// A process group that is nobody's child here, as a Docker container's is.
struct Foreign(Child);

impl Foreign {
    fn new(script: &str) -> Self {
        Self(Command::new("bash").args(["-c", script]).process_group(0).spawn().unwrap())
    }
}

impl Drop for Foreign {
    fn drop(&mut self) {
        let group = nix::unistd::Pid::from_raw(i32::try_from(self.0.id()).unwrap());
        let _ = nix::sys::signal::killpg(group, nix::sys::signal::Signal::SIGKILL);
        let _ = self.0.wait();
    }
}

#[tokio::test]
async fn the_group_that_pgid_names_counts_once_and_keeps_its_figures() {
    let bed = Bed::new();
    let mut containers = vec![bed.start("a", "sleep 60; :").await, bed.start("b", "sleep 60; :").await];
    for container in &mut containers {
        let before = bed.until(container, |usage| usage.processes == 2);
        assert!(seconds(&before) < 0.1, "{before:?}");
    }
    let marker = bed.dir.path().join("burnt");
    let burn = "perl -e '1 while (times)[0] + (times)[1] < 0.5'";
    let foreign = Foreign::new(&format!(
        "{burn}; perl -e 'vec($x, 50 << 20, 8) = 1; open F, \">{}\"; sleep 60' & sleep 60; :",
        marker.display()
    ));
    wait_for(&marker);
    for container in &containers {
        fs::write(container.dir.join("pgid"), format!("{}\n", foreign.0.id())).unwrap();
    }
    let both = bed.sample(&mut containers);
    assert!(seconds(&both[0]) >= 0.5 && seconds(&both[0]) < 0.9, "{both:?}");
    assert!(both[0].working_set > 50 << 20 && both[0].processes == 5, "{both:?}");
    assert!(seconds(&both[1]) < 0.1 && both[1].processes == 2, "counted by the other: {both:?}");
    drop(foreign);
    let after = bed.sample(&mut containers);
    assert!(after[0].cpu >= both[0].cpu && after[0].working_set < 50 << 20, "{after:?}");
    assert_eq!(after[0].processes, 2);
}

#[tokio::test]
async fn a_group_of_another_container_stays_with_it() {
    let bed = Bed::new();
    let mut containers = vec![
        bed.start("a", "sleep 60; :").await,
        bed.start("b", "burn 0.4; sleep 60 & touch done; wait").await,
    ];
    wait_for(&containers[1].dir.join("done"));
    for container in &mut containers {
        bed.until(container, |usage| usage.processes == 2);
    }
    fs::copy(containers[1].dir.join("pgid"), containers[0].dir.join("pgid")).unwrap();
    let usage = bed.sample(&mut containers);
    assert!(seconds(&usage[0]) < 0.2 && usage[0].processes == 2, "{usage:?}");
    assert!(seconds(&usage[1]) >= 0.4 && usage[1].processes == 2, "{usage:?}");
}
