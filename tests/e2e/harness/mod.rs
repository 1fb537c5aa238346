//! What the end-to-end tests share. A test makes a [`Namespace`] and a [`Pilot`] of its own, creates pods that
//! only that pilot fits, and waits for conditions with [`wait_for`], never for a time to pass. So tests run
//! side by side.

pub mod api;
mod api_server;
mod host;
pub mod https;
mod kubectl;
mod namespace;
mod pbs;
mod pilot;
mod proxy;
pub mod spdy;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

pub use api_server::ApiServer;
pub use host::{Output, Tmpfs, as_user, marked, run, shared_directory};
pub use https::Https;
pub use kubectl::{Ended, Kubectl, Terminal, Way};
pub use namespace::{Namespace, container, job, pod_spec};
pub use pbs::PbsJob;
pub use pilot::{JobState, Options, Pilot, condition, slurm};
pub use proxy::ApiProxy;

/// The ordinary user who submits the pilots.
pub const ALICE: &str = "jiriaf-alice";
/// Another ordinary user of the same host.
pub const BOB: &str = "jiriaf-bob";

/// Where tests/run has brought up the real things: `cluster/` (tests/cluster/up), `slurm/` (tests/slurm/up)
/// and `bin/jiriaf-pilot`.
pub struct Bed {
    directory: PathBuf,
}

/// The bed that JIRIAF_TEST_BED names.
pub fn bed() -> &'static Bed {
    static BED: OnceLock<Bed> = OnceLock::new();
    BED.get_or_init(|| {
        let directory = std::env::var_os("JIRIAF_TEST_BED").map(PathBuf::from);
        let directory =
            directory.expect("JIRIAF_TEST_BED names no test bed: start the tests with tests/run --e2e");
        Bed { directory }
    })
}

impl Bed {
    /// The kubeconfig of cluster-admin.
    pub fn admin_kubeconfig(&self) -> PathBuf {
        self.directory.join("cluster/admin.kubeconfig")
    }

    /// The text of the pilots' kubeconfig, for another API server's URL where one is given.
    pub fn pilot_kubeconfig(&self, server: Option<&str>) -> String {
        let file = self.directory.join("cluster/pilot.kubeconfig");
        let mut config: serde_json::Value = serde_json::from_str(&read(&file)).unwrap();
        if let Some(server) = server {
            config["clusters"][0]["cluster"]["server"] = server.into();
        }
        config.to_string()
    }

    /// Host and port of the API server.
    pub fn api_server(&self) -> String {
        let config: serde_json::Value = serde_json::from_str(&self.pilot_kubeconfig(None)).unwrap();
        let server = config["clusters"][0]["cluster"]["server"].as_str().unwrap();
        server.trim_start_matches("https://").to_owned()
    }

    /// The value of SLURM_CONF.
    pub fn slurm_conf(&self) -> PathBuf {
        self.directory.join("slurm/slurm.conf")
    }

    /// The binary under test, where every user can execute it.
    pub fn binary(&self) -> PathBuf {
        self.directory.join("bin/jiriaf-pilot")
    }

    /// A job script (`slurm/pilot.sh`) or a stand-in (`stand-ins/qstat`), where every user can read it.
    pub fn script(&self, name: &str) -> PathBuf {
        self.directory.join("scripts").join(name)
    }

    /// A recorded answer, such as `pbs/qstat-f-running.json`.
    pub fn fixture(&self, name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
    }

    /// kubectl as cluster-admin, at most 30 s.
    pub fn kubectl(&self, arguments: &[&str]) -> Output {
        run(self.kubectl_command().args(arguments))
    }

    /// `kubectl apply -f -` in a namespace; a refusal is the test's failure.
    pub fn apply(&self, namespace: &str, yaml: &str) {
        let mut command = self.kubectl_command();
        let output = host::run_with_input(command.args(["apply", "-n", namespace, "-f", "-"]), yaml);
        assert!(output.success, "kubectl apply: {}\n{yaml}", output.text);
    }

    /// kubectl as cluster-admin in a namespace, ended after so many seconds. Add arguments and variables, or another
    /// `--kubeconfig`: the last one counts.
    pub fn kubectl_within(&self, namespace: &str, limit: u32) -> Command {
        let mut command = Command::new("timeout");
        command.args(["-k", "1", &limit.to_string()]);
        self.kubectl_of(&mut command, namespace);
        command
    }

    /// As [`Bed::kubectl_within`], as the last arguments of a command that runs another.
    pub fn kubectl_of<'a>(&self, command: &'a mut Command, namespace: &str) -> &'a mut Command {
        command.arg(self.directory.join("cluster/bin/kubectl"));
        command.arg("--kubeconfig").arg(self.admin_kubeconfig()).args(["--namespace", namespace])
    }

    fn kubectl_command(&self) -> Command {
        let mut command = Command::new("timeout");
        command.args(["-k", "1", "30"]).arg(self.directory.join("cluster/bin/kubectl"));
        command.arg("--kubeconfig").arg(self.admin_kubeconfig());
        command
    }
}

/// Waits until `condition` gives something, and fails the test when it has not within `limit`.
#[track_caller]
pub fn wait_for<T>(what: &str, limit: Duration, mut condition: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(start.elapsed() < limit, "waited {limit:?} in vain: {what}");
        std::thread::sleep(Duration::from_millis(75));
    }
}

/// As [`wait_for`], for a condition that is true or false.
#[track_caller]
pub fn wait_until(what: &str, limit: Duration, mut condition: impl FnMut() -> bool) {
    wait_for(what, limit, || condition().then_some(()));
}

/// Seconds as a Duration.
pub const fn seconds(n: u64) -> Duration {
    Duration::from_secs(n)
}

/// A name that no other test of this or an earlier run has: `<label>-<pid><number>`.
pub fn unique(label: &str) -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!("{label}-{}x{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}

/// The text of a file; its absence is the test's failure.
pub fn read(file: &Path) -> String {
    std::fs::read_to_string(file).unwrap_or_else(|error| panic!("{}: {error}", file.display()))
}
