//! Cgroups of containers, where a job may make them: here in one that the test makes and gives away, as a batch system would. The
//! supervisors are the binary's, driven as the pilot drives them.

use std::path::PathBuf;
use std::time::Duration;

use jiriaf_pilot::container::{
    ContainerId, ContainerSpec, Delegation, End, Event, Limits, LogLimits, Session, Stdio, Supervisor,
    Supervisors,
};

use crate::harness::bed;

const SOON: Duration = Duration::from_secs(20);

/// A cgroup of v1's three hierarchies.
struct Given {
    delegation: Delegation,
    directories: Vec<PathBuf>,
}

impl Given {
    fn new(name: &str) -> Self {
        let make = |controller: &str| {
            let path = PathBuf::from(format!(
                "/sys/fs/cgroup/{controller}/jiriaf-test-{name}-{}",
                std::process::id()
            ));
            std::fs::create_dir(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
            path
        };
        let (memory, cpu, cpuset) = (make("memory"), make("cpu"), make("cpuset"));
        for file in ["cpuset.cpus", "cpuset.mems"] {
            let all = std::fs::read_to_string(format!("/sys/fs/cgroup/cpuset/{file}")).unwrap();
            std::fs::write(cpuset.join(file), all).unwrap();
        }
        let directories = vec![memory.clone(), cpu.clone(), cpuset.clone()];
        let delegation = Delegation { v2: false, memory: Some(memory), cpu: Some(cpu), cpuset: Some(cpuset) };
        Self { delegation, directories }
    }

    /// Whether nothing of any container is left.
    fn is_empty(&self) -> bool {
        let has_none =
            |path: &PathBuf| std::fs::read_dir(path).unwrap().flatten().all(|entry| !entry.path().is_dir());
        self.directories.iter().all(has_none)
    }
}

impl Drop for Given {
    fn drop(&mut self) {
        for directory in &self.directories {
            let _ = std::fs::remove_dir(directory);
        }
    }
}

struct Bed {
    directory: tempfile::TempDir,
    supervisors: Supervisors,
    given: Given,
}

impl Bed {
    fn new(name: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir(directory.path().join("c")).unwrap();
        let mark = format!("test-{name}-{}", std::process::id());
        let supervisors =
            Supervisors::new(&directory.path().join("state"), mark).unwrap().with_executable(bed().binary());
        Self { directory, supervisors, given: Given::new(name) }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join("c").join(name)
    }

    fn spec(&self, script: &str, limits: Limits, cpus: &[usize]) -> ContainerSpec {
        ContainerSpec {
            argv: vec!["bash".into(), "-c".into(), script.into()],
            env: vec![("PATH".into(), std::env::var("PATH").unwrap())],
            working_dir: self.path(""),
            container_dir: self.path(""),
            log: self.path("logs/0.log"),
            log_limits: LogLimits::default(),
            session: Session::Own,
            oom_score_adj: None,
            open_files: None,
            stop_signal: None,
            no_new_privs: false,
            cpus: cpus.to_vec(),
            cgroup: Some(self.given.delegation.plan("u.c.0", limits, cpus)),
            orphan_timeout: SOON,
            drain_at: None,
            grace: Duration::from_millis(100),
            forward_output: false,
            stdio: Stdio::Null,
            view: None,
        }
    }

    async fn start(&self, spec: ContainerSpec) -> Supervisor {
        let id = ContainerId { pod_uid: "u".into(), name: "c".into(), restart: 0 };
        let mut supervisor = self.supervisors.spawn(id).unwrap();
        supervisor.start(spec).await;
        supervisor
    }

    async fn run(&self, spec: ContainerSpec) -> End {
        let mut supervisor = self.start(spec).await;
        loop {
            match tokio::time::timeout(SOON, supervisor.next()).await.expect("an event in time") {
                Event::Ended(end) => {
                    supervisor.acknowledge().await;
                    return end;
                }
                Event::Started { .. } => {}
                other => panic!("{other:?}"),
            }
        }
    }

    fn noted(&self, name: &str) -> String {
        std::fs::read_to_string(self.path(name)).unwrap_or_default().trim().to_owned()
    }
}

#[tokio::test]
async fn the_kernel_ends_a_container_that_takes_more_memory_than_its_limit_at_once() {
    let bed = Bed::new("memory");
    let limits = Limits { memory: Some(50 << 20), cpu_millis: None };
    let hog = "exec head -c 1000000000 /dev/zero | exec tail";
    let end = bed.run(bed.spec(&format!("{hog}; exit $?"), limits, &[])).await;
    assert!(end.oom_killed && end.exit_code == 137, "{end:?}");
    assert!(bed.given.is_empty());
    let quiet = bed.run(bed.spec("exit 3", limits, &[])).await;
    assert!(!quiet.oom_killed && quiet.exit_code == 3, "{quiet:?}");
}

#[tokio::test]
async fn a_share_of_cpu_time_is_held_and_a_cpuset_cannot_be_widened() {
    let bed = Bed::new("cpu");
    // Turns for a while; what it was given of that is its share.
    let script = "taskset -pc 0-1023 $$ >/dev/null 2>&1
sed -n 's/^Cpus_allowed_list:[[:space:]]*//p' /proc/self/status >cpus
s=$EPOCHREALTIME; until [ \"$(( ${EPOCHREALTIME/./} - ${s/./} ))\" -gt 1500000 ]; do :; done
times >times";
    let limits = Limits { memory: None, cpu_millis: Some(300) };
    let end = bed.run(bed.spec(script, limits, &[1])).await;
    assert_eq!(end.exit_code, 0, "{end:?}");
    assert_eq!(bed.noted("cpus"), "1");
    // `0m0.450s 0m0.000s`: user and system.
    let times = bed.noted("times");
    let seconds = |text: &str| text.trim_start_matches("0m").trim_end_matches('s').parse::<f64>().unwrap();
    let used: f64 = times.lines().next().unwrap().split_whitespace().map(seconds).sum();
    assert!((0.2..0.9).contains(&used), "{used} s of 1.5 s with a share of 0.3: {times}");
    assert!(bed.given.is_empty());
}

#[tokio::test]
async fn what_exec_starts_is_in_the_containers_cgroup_too_and_a_new_placement_holds() {
    let bed = Bed::new("exec");
    let mut supervisor = bed.start(bed.spec("sleep 600 & wait", Limits::default(), &[0])).await;
    let started = tokio::time::timeout(SOON, supervisor.next()).await.unwrap();
    assert!(matches!(started, Event::Started { .. }), "{started:?}");
    supervisor.set_cpus(vec![1]).await;
    let null = || std::fs::File::options().read(true).write(true).open("/dev/null").unwrap().into();
    let script = "cat /proc/self/cgroup >cgroups; sed -n 's/^Cpus_allowed_list:[[:space:]]*//p' /proc/self/status >cpus";
    let words = ["bash", "-c", script].map(ToOwned::to_owned).to_vec();
    supervisor.exec(7, words, jiriaf_pilot::container::ExecStdio::Pipes([null(), null(), null()])).await;
    let end = tokio::time::timeout(SOON, supervisor.next()).await.unwrap();
    assert_eq!(end, Event::ExecEnded { id: 7, exit_code: 0 });
    let own = bed.noted("cgroups");
    assert_eq!(own.lines().filter(|line| line.ends_with("/u.c.0")).count(), 3, "{own}");
    assert_eq!(bed.noted("cpus"), "1");
    supervisor.kill().await;
    let end = tokio::time::timeout(SOON, supervisor.next()).await.unwrap();
    assert!(matches!(&end, Event::Ended(end) if end.exit_code == 137 && !end.oom_killed), "{end:?}");
    supervisor.acknowledge().await;
    assert!(bed.given.is_empty());
}
