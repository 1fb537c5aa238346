//! A pilot of a test's own: in a real Slurm job, or started by hand.

use std::collections::HashMap;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, User};
use serde_json::{Value, json};

use super::host::{as_user_without_limit, home, places};
use super::{ALICE, Output, PbsJob, api, as_user, bed, marked, run, seconds, unique, wait_for, wait_until};

/// How long a job may wait for a free node: other tests' jobs of some minutes may hold all of them.
const QUEUE_LIMIT: Duration = seconds(600);
/// How long a pilot may take from its start to a Ready Node, on a machine that is busy with other tests.
const START_LIMIT: Duration = seconds(60);

/// What a test wants of its pilot.
pub struct Options {
    /// Begins the names of all that belongs to this pilot.
    pub label: &'static str,
    /// The allocation's time in minutes (Slurm knows no less than one).
    pub minutes: u32,
    /// Nodes of the job; [`Pilot::sbatch`] waits until as many are Ready.
    pub nodes: u32,
    /// The job script, within the repository.
    pub script: &'static str,
    /// JIRIAF_SITE; a unique one when none is given.
    pub site: Option<String>,
    /// More options of sbatch, or of `jiriaf-pilot run`.
    pub arguments: Vec<String>,
    /// More environment at submission, or other values of what the harness sets.
    pub environment: Vec<(String, String)>,
    /// Another URL of the API server, such as [`super::ApiProxy::url`].
    pub server: Option<String>,
}

impl Options {
    /// One node for ten minutes by slurm/pilot.sh.
    pub fn new(label: &'static str) -> Self {
        Self {
            label,
            minutes: 10,
            nodes: 1,
            script: "slurm/pilot.sh",
            site: None,
            arguments: Vec::new(),
            environment: Vec::new(),
            server: None,
        }
    }

    /// Another time, in minutes.
    pub fn minutes(mut self, minutes: u32) -> Self {
        self.minutes = minutes;
        self
    }

    /// One variable more.
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.environment.push((name.into(), value.into()));
        self
    }

    /// One argument more.
    pub fn arg(mut self, argument: &str) -> Self {
        self.arguments.push(argument.into());
        self
    }
}

/// A running pilot, as alice. Ended at drop.
pub struct Pilot {
    /// Its JIRIAF_SITE, by which pods select it.
    pub site: String,
    /// Its HOME, under which pods have their directories.
    pub home: PathBuf,
    /// Its Slurm job, if it has one.
    pub job: Option<u32>,
    /// Its Node's name; the first when there are several.
    pub node: String,
    child: Option<Child>,
}

/// What `scontrol show job` says.
pub struct JobState(HashMap<String, String>);

impl JobState {
    /// A field such as `ExitCode`, `EndTime`, `Reason`; empty when there is none.
    pub fn field(&self, name: &str) -> &str {
        self.0.get(name).map_or("", String::as_str)
    }

    /// `RUNNING`, `COMPLETED`, `CANCELLED`, …
    pub fn state(&self) -> &str {
        self.field("JobState")
    }
}

impl Pilot {
    /// Submits a pilot and waits until its Nodes are Ready.
    #[track_caller]
    pub fn sbatch(options: Options) -> Self {
        let mut pilot = Self::submit(&options);
        pilot.wait_ready(options.nodes as usize);
        pilot
    }

    /// Submits a pilot, and waits until its job has started, or ended already.
    #[track_caller]
    pub fn submit(options: &Options) -> Self {
        Self::submit_with(options, &[])
    }

    /// As [`Pilot::submit`], with arguments for the script.
    #[track_caller]
    pub fn submit_with(options: &Options, arguments: &[&str]) -> Self {
        let (mut pilot, environment) = Self::prepare(options);
        let mut command = as_user(ALICE, "sbatch");
        command
            .arg("--parsable")
            .arg(format!("--time={}", options.minutes))
            .arg(format!("--nodes={}", options.nodes))
            // Whole nodes: Slurm would give each job of one CPU the same first CPU of this host.
            .arg("--exclusive")
            .arg(format!("--job-name={}", options.label))
            .arg(format!("--chdir={}", pilot.home.display()))
            .arg(format!("--output={}", pilot.output_file().display()))
            .args(&options.arguments)
            .arg(bed().script(options.script))
            .args(arguments)
            .envs(environment);
        pilot.started_as_job(&run_until_accepted(&mut command));
        pilot
    }

    /// Starts `jiriaf-pilot run` by hand for so many seconds, with no batch system, and waits until its Node is
    /// Ready.
    #[track_caller]
    pub fn local(options: Options, walltime: u32) -> Self {
        let mut pilot = Self::start_local(&options, walltime);
        pilot.wait_ready(1);
        pilot
    }

    /// As [`Pilot::local`], without waiting.
    pub fn start_local(options: &Options, walltime: u32) -> Self {
        Self::start_run(options, &[&format!("--walltime={walltime}")])
    }

    /// Starts `jiriaf-pilot run` by hand with these arguments and the options' own, without waiting.
    pub fn start_run(options: &Options, arguments: &[&str]) -> Self {
        let binary = bed().binary();
        let mut command = as_user_without_limit(ALICE, binary.to_str().unwrap());
        command.arg("run").args(arguments).args(&options.arguments);
        Self::start(options, command)
    }

    /// Starts pbs/pilot.sh as a PBS job would, with stand-ins for qstat and pbsdsh, and waits until its Nodes
    /// are Ready.
    #[track_caller]
    pub fn pbs(mut options: Options, job: &PbsJob) -> Self {
        options.environment.splice(0..0, job.environment());
        // A PBS job is a session of its own.
        let mut command = as_user_without_limit(ALICE, "setsid");
        command.arg("bash").arg(bed().script("pbs/pilot.sh"));
        let mut pilot = Self::start(&options, command);
        pilot.wait_ready(options.nodes as usize);
        pilot
    }

    /// Submits pbs/pilot.sh with pbs/qsub-pilot, to the qsub that Slurm has, and waits until its Node is Ready.
    /// The job starts in alice's real home: only what the settings file brings along tells it of this pilot's.
    #[track_caller]
    pub fn qsub(options: Options) -> Self {
        let (mut pilot, environment) = Self::prepare(&options);
        let mut command = as_user(ALICE, bed().script("pbs/qsub-pilot").to_str().unwrap());
        command
            .arg("--nodes")
            .arg(options.nodes.to_string())
            .arg("--walltime")
            .arg(format!("0:{:02}:00", options.minutes))
            // Less than the nodes of the test Slurm have.
            .args(["--mem", "1gb", "--", "-j", "oe", "-o"])
            .arg(pilot.output_file())
            .args(&options.arguments)
            .current_dir(&pilot.home)
            .envs(environment)
            .env("KUBECONFIG", pilot.home.join(".kube/config"))
            .env("JIRIAF_PODS_DIR", &pilot.home);
        pilot.started_as_job(&run_until_accepted(&mut command));
        pilot.wait_ready(options.nodes as usize);
        pilot
    }

    /// Runs another subcommand to its end, in the place of a pilot of these options.
    pub fn ask(options: &Options, arguments: &[&str]) -> Output {
        let (pilot, environment) = Self::prepare(options);
        let mut command = as_user(ALICE, bed().binary().to_str().unwrap());
        command.args(arguments).args(&options.arguments).current_dir(&pilot.home).envs(environment);
        run(&mut command)
    }

    fn start(options: &Options, mut command: Command) -> Self {
        let (mut pilot, environment) = Self::prepare(options);
        let output = std::fs::File::create(pilot.output_file()).unwrap();
        command
            .current_dir(&pilot.home)
            .envs(environment)
            .stdin(Stdio::null())
            .stdout(output.try_clone().unwrap())
            .stderr(output);
        pilot.child = Some(command.spawn().unwrap());
        pilot
    }

    /// Takes the job's id from what sbatch or qsub said, and waits until it runs.
    fn started_as_job(&mut self, answer: &str) {
        let id = answer.trim().split([';', '.']).next().unwrap_or_default();
        self.job = Some(id.parse().unwrap_or_else(|error| panic!("the submission said {answer:?}: {error}")));
        wait_until("the job starts", QUEUE_LIMIT, || self.job_state().state() != "PENDING");
    }

    /// A home of its own for alice, with a kubeconfig; and the environment that goes with it.
    fn prepare(options: &Options) -> (Self, Vec<(String, String)>) {
        let name = unique(options.label);
        let directory = home(ALICE).join(&name);
        let site = options.site.clone().unwrap_or_else(|| name.clone());
        let alice = User::from_name(ALICE).unwrap().expect("tests/slurm/up makes the user");
        let own = |path: &Path, mode: u32| {
            chown(path, Some(alice.uid.as_raw()), Some(alice.gid.as_raw())).unwrap();
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
        };
        let kubeconfig = directory.join(".kube/config");
        std::fs::create_dir_all(directory.join(".kube")).unwrap();
        std::fs::write(&kubeconfig, bed().pilot_kubeconfig(options.server.as_deref())).unwrap();
        own(&kubeconfig, 0o600);
        own(&directory.join(".kube"), 0o700);
        // Others may look in, so that what is private has to be so by itself.
        own(&directory, 0o755);

        let variable = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        let mut environment = vec![
            variable("HOME", directory.to_str().unwrap()),
            variable("JIRIAF_PILOT", bed().binary().to_str().unwrap()),
            variable("JIRIAF_SITE", &site),
            variable("JIRIAF_NODETYPE", "cpu"),
            variable("TEST_PILOT", &name),
        ];
        // All tests hold with isolated containers too: JIRIAF_TEST_ISOLATION=namespaces tests/run --e2e.
        environment
            .extend(std::env::var("JIRIAF_TEST_ISOLATION").map(|mode| variable("JIRIAF_ISOLATION", &mode)));
        environment.extend(options.environment.iter().cloned());
        (Self { site, home: directory, job: None, node: String::new(), child: None }, environment)
    }

    /// Waits until so many Nodes of this pilot's site are Ready.
    #[track_caller]
    pub fn wait_ready(&mut self, count: usize) {
        let what = format!("{count} Ready node(s) of site {}", self.site);
        let ready = wait_for(&what, START_LIMIT, || {
            let ready: Vec<String> = self
                .nodes()
                .iter()
                .filter(|node| condition(node, "Ready")["status"] == "True")
                .filter_map(|node| node["metadata"]["name"].as_str().map(str::to_owned))
                .collect();
            assert!(ready.len() >= count || !self.ended(), "the pilot ended before its node was Ready");
            (ready.len() >= count).then_some(ready)
        });
        self.node = ready[0].clone();
    }

    /// The Nodes of this pilot's site, as they are now.
    pub fn nodes(&self) -> Vec<Value> {
        api::cluster("nodes").list(&format!("jiriaf.site={}", self.site))
    }

    /// The Lease of this pilot's Node.
    pub fn lease(&self) -> Option<Value> {
        api::grouped("coordination.k8s.io/v1", "kube-node-lease", "leases").get(&self.node)
    }

    /// Makes a pod's spec fit this pilot alone: the node selector and the toleration.
    pub fn place(&self, spec: &mut Value) {
        spec["nodeSelector"]["jiriaf.site"] = self.site.as_str().into();
        let toleration = json!({"key": "virtual-kubelet.io/provider", "operator": "Exists"});
        match spec["tolerations"].as_array_mut() {
            Some(tolerations) => tolerations.push(toleration),
            None => spec["tolerations"] = json!([toleration]),
        }
    }

    /// A pod's directory, with the default layout.
    pub fn pod_directory(&self, pod: &str) -> PathBuf {
        self.home.join(pod)
    }

    /// What the pilot has written so far.
    pub fn output(&self) -> String {
        std::fs::read(self.output_file())
            .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
            .unwrap_or_default()
    }

    /// The rows of the table that the pilot's output ends with; none before its end. What it logs afterwards has no
    /// columns.
    pub fn table(&self) -> Vec<String> {
        let output = self.output();
        let rows = output.lines().skip_while(|line| !line.starts_with("POD ")).skip(1);
        rows.take_while(|row| columns(row).count() >= 5).map(str::to_owned).collect()
    }

    /// The table's row of a pod with one container.
    #[track_caller]
    pub fn row(&self, pod: &str) -> String {
        let ending = format!("/{pod}");
        let mut rows = self.table();
        rows.retain(|row| columns(row).next().is_some_and(|name| name.ends_with(&ending)));
        let [row] = rows.as_slice() else {
            panic!("one row of pod {pod} was expected: {rows:?}\n{}", self.output())
        };
        row.clone()
    }

    /// The outcome of a pod that is kept as a JSON file beside the logs.
    #[track_caller]
    pub fn kept_outcome(&self, pod: &str) -> Value {
        let kept = std::fs::read_dir(self.home.join(".jiriaf-pilot")).unwrap().flatten();
        let files = kept.flat_map(|job| std::fs::read_dir(job.path()).unwrap().flatten());
        let files =
            files.map(|file| file.path()).filter(|file| file.extension().is_some_and(|e| e == "json"));
        let mut outcomes: Vec<Value> =
            files.map(|file| serde_json::from_str(&super::read(&file)).unwrap()).collect();
        outcomes.retain(|outcome| outcome["name"] == pod);
        let [outcome] = outcomes.as_slice() else {
            panic!("one outcome of pod {pod} was expected: {outcomes:#?}")
        };
        outcome.clone()
    }

    /// The pilot's own processes and those of its containers that are there now: (pid, command line).
    pub fn processes(&self) -> Vec<(i32, String)> {
        let name = self.home.file_name().unwrap().to_str().unwrap();
        marked(&format!("TEST_PILOT={name}"))
    }

    /// The sessions of those processes of the pilot and its containers whose command line begins with `program`. The
    /// session of a [`Pilot::pbs`] job is [`Pilot::session`].
    pub fn sessions(&self, program: &str) -> Vec<i32> {
        let mut ours = self.processes();
        ours.retain(|(_, line)| line.starts_with(program));
        let places = places();
        let session = |pid: i32| places.iter().find(|place| place.pid == pid).map(|place| place.session);
        ours.iter().filter_map(|(pid, _)| session(*pid)).collect()
    }

    /// The session that a pilot was started in by [`Pilot::pbs`].
    pub fn session(&self) -> i32 {
        self.child.as_ref().expect("the pilot was started by hand").id().try_into().unwrap()
    }

    /// The processes that descend from a pilot that was started by hand, whose first argument is `word`:
    /// `pilot`, `supervise`.
    pub fn stages(&self, word: &str) -> Vec<i32> {
        let child = self.child.as_ref().expect("the pilot was started by hand");
        let mut family = vec![i32::try_from(child.id()).unwrap()];
        for place in places() {
            if family.contains(&place.parent) {
                family.push(place.pid);
            }
        }
        family.retain(|pid| {
            let command_line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            command_line.split(|byte| *byte == 0).nth(1) == Some(word.as_bytes())
        });
        family
    }

    /// What Slurm says of the job.
    pub fn job_state(&self) -> JobState {
        let output = slurm(&["scontrol", "show", "job", "-o", &self.job_id()]);
        JobState(
            output
                .split_whitespace()
                .filter_map(|field| field.split_once('='))
                .map(|(name, value)| (name.to_owned(), value.to_owned()))
                .collect(),
        )
    }

    /// When Slurm will end the job, as it says now.
    pub fn end_time(&self) -> jiff::Timestamp {
        let state = self.job_state();
        let local: jiff::civil::DateTime = state.field("EndTime").parse().unwrap();
        local.to_zoned(jiff::tz::TimeZone::system()).unwrap().timestamp()
    }

    /// The label `jiriaf.alivetime` of the pilot's Node, in seconds; None when there is no Node or no label.
    pub fn alivetime(&self) -> Option<i64> {
        let node = api::cluster("nodes").get(&self.node)?;
        node["metadata"]["labels"]["jiriaf.alivetime"].as_str().map(|seconds| seconds.parse().unwrap())
    }

    /// `scontrol update` of the job: `update("TimeLimit=5")`.
    pub fn update(&self, setting: &str) {
        slurm(&["scontrol", "update", &format!("JobId={}", self.job_id()), setting]);
    }

    /// The warning signal of a job script's `--signal`, now.
    pub fn warn(&self) {
        slurm(&["scancel", "--batch", "--signal=USR1", &self.job_id()]);
    }

    /// `scancel`, by its owner.
    pub fn scancel(&self) {
        let output = run(as_user(ALICE, "scancel").arg(self.job_id()));
        assert!(output.success, "scancel: {}", output.text);
    }

    /// Sends a signal to a pilot that was started by hand.
    pub fn signal(&self, signal: Signal) {
        let child = self.child.as_ref().expect("the pilot was started by hand");
        kill(Pid::from_raw(child.id().try_into().unwrap()), signal).unwrap();
    }

    /// Ends a [`Pilot::pbs`] as PBS does at qdel and at the walltime: SIGTERM to all of its session.
    pub fn qdel(&self) {
        let child = self.child.as_ref().expect("the pilot was started by Pilot::pbs");
        super::pbs::terminate(child.id().try_into().unwrap());
    }

    /// Whether the job, or the process, is over.
    pub fn ended(&mut self) -> bool {
        match &mut self.child {
            Some(child) => child.try_wait().unwrap().is_some(),
            None => !matches!(self.job_state().state(), "PENDING" | "RUNNING" | "COMPLETING" | "SUSPENDED"),
        }
    }

    /// Waits until the job is over, and returns what Slurm says of it then.
    #[track_caller]
    pub fn wait_job_over(&mut self, limit: Duration) -> JobState {
        wait_until("the job is over", limit, || self.ended());
        self.job_state()
    }

    /// Waits until a pilot that was started by hand has ended, and returns its exit code.
    #[track_caller]
    pub fn wait_exit(&mut self, limit: Duration) -> Option<i32> {
        wait_until("the pilot has ended", limit, || self.ended());
        self.child.as_mut().and_then(|child| child.wait().unwrap().code())
    }

    fn output_file(&self) -> PathBuf {
        self.home.join("pilot.out")
    }

    fn job_id(&self) -> String {
        self.job.expect("the pilot is a Slurm job").to_string()
    }

    /// Ends the pilot in its own time, and then by force.
    fn end(&mut self) {
        if let Some(child) = &self.child {
            let pid = Pid::from_raw(child.id().try_into().unwrap());
            for signal in [Signal::SIGTERM, Signal::SIGKILL] {
                // It may have ended meanwhile.
                let _ = kill(pid, signal);
                for _ in 0..400 {
                    if self.ended() {
                        return;
                    }
                    std::thread::sleep(Duration::from_millis(100));
                }
            }
        } else if let Some(job) = self.job {
            let _ = run(as_user(ALICE, "scancel").arg(job.to_string()));
            // Slurm itself ends it KillWait (30 s) later.
            for _ in 0..450 {
                if self.ended() {
                    return;
                }
                std::thread::sleep(Duration::from_millis(100));
            }
        }
    }
}

impl Drop for Pilot {
    fn drop(&mut self) {
        let failed = std::thread::panicking();
        if failed {
            eprintln!("--- output of pilot {} (job {:?}) ---\n{}", self.site, self.job, self.output());
            for (pid, command_line) in self.processes() {
                eprintln!("--- process {pid}: {command_line}");
            }
        }
        if (self.job.is_some() || self.child.is_some()) && !self.ended() {
            self.end();
        }
        for (pid, _) in self.processes() {
            // What a broken pilot left behind must not burden the tests that follow.
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        // What a pilot could not remove, on purpose of the test or not.
        for node in self.nodes() {
            api::cluster("nodes").delete(node["metadata"]["name"].as_str().unwrap_or_default(), None);
        }
        // A failed test's files are of use to whoever looks.
        if !failed {
            let _ = std::fs::remove_dir_all(&self.home);
        }
    }
}

/// The cells of a table's row: two blanks are between them.
fn columns(row: &str) -> impl Iterator<Item = &str> {
    row.split("  ").map(str::trim).filter(|cell| !cell.is_empty())
}

/// A Node's or Pod's condition of this type, or null.
pub fn condition(object: &Value, kind: &str) -> Value {
    let conditions = object["status"]["conditions"].as_array();
    conditions.into_iter().flatten().find(|condition| condition["type"] == kind).cloned().unwrap_or_default()
}

/// A Slurm command as root; its failure is the test's.
pub fn slurm(words: &[&str]) -> String {
    let mut command = Command::new("timeout");
    command.args(["-k", "1", "30"]).args(words).env("SLURM_CONF", bed().slurm_conf());
    let output = run(&mut command);
    assert!(output.success, "{words:?}: {}", output.text);
    output.stdout
}

/// The answer to a submission; slurmctld may be too busy for a moment to give one.
fn run_until_accepted(command: &mut Command) -> String {
    wait_for("the batch system accepts the job", seconds(60), || {
        let output = run(command);
        assert!(output.success || output.text.contains("try again"), "{command:?}: {}", output.text);
        output.success.then_some(output.stdout)
    })
}
