//! The job scripts that users copy, with stand-ins for the batch systems' commands: what would be submitted and started.
//! tests/e2e/scripts.rs runs them with the real ones.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// What a script said, and what it came to.
struct Said {
    code: Option<i32>,
    text: String,
}

/// A home with stand-ins, first in PATH, that note how they are called.
struct Desk {
    root: tempfile::TempDir,
}

impl Desk {
    fn new() -> Self {
        let desk = Self { root: tempfile::tempdir().unwrap() };
        fs::create_dir(desk.root.path().join("bin")).unwrap();
        fs::create_dir(desk.root.path().join(".kube")).unwrap();
        fs::write(desk.root.path().join(".kube/config"), "").unwrap();
        desk
    }

    /// A command that notes its arguments, one a line, and then does this.
    fn stand_in(&self, name: &str, body: &str) {
        let log = self.root.path().join(format!("{name}.calls"));
        let text =
            format!("#!/bin/bash\n{{ echo CALL; printf '%s\\n' \"$@\"; }} >>'{}'\n{body}\n", log.display());
        self.install(name, &text);
    }

    fn install(&self, name: &str, text: &str) {
        let path = self.root.path().join("bin").join(name);
        fs::write(&path, text).unwrap();
        fs::set_permissions(path, Permissions::from_mode(0o755)).unwrap();
    }

    /// The arguments of each call so far.
    fn calls(&self, name: &str) -> Vec<Vec<String>> {
        let text = fs::read_to_string(self.root.path().join(format!("{name}.calls"))).unwrap_or_default();
        let calls = text.split("CALL\n").skip(1);
        calls.map(|call| call.lines().map(str::to_owned).collect()).collect()
    }

    fn run(&self, script: &Path, arguments: &[&str], environment: &[(&str, &str)]) -> Said {
        let path = format!("{}:/usr/bin:/bin", self.root.path().join("bin").display());
        let output = Command::new("bash")
            .arg(script)
            .args(arguments)
            .env_clear()
            .env("PATH", path)
            .env("HOME", self.root.path())
            .env("JIRIAF_PILOT", self.root.path().join("bin/pilot"))
            .envs(environment.iter().copied())
            .current_dir(self.root.path())
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let text = [output.stdout, output.stderr].map(|text| String::from_utf8(text).unwrap()).concat();
        Said { code: output.status.code(), text }
    }

    /// The settings files that qsub-pilot keeps.
    fn settings(&self) -> usize {
        fs::read_dir(self.root.path().join(".config/jiriaf-pilot/jobs")).map_or(0, Iterator::count)
    }
}

fn script(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

/// The value behind an option.
fn after<'a>(call: &'a [String], option: &str) -> Option<&'a str> {
    let at = call.iter().position(|argument| argument == option)?;
    call.get(at + 1).map(String::as_str)
}

/// A qsub that gives its jobs numbers, and refuses those from this one on.
fn qsub(desk: &Desk, refused: usize) {
    let body = format!(
        "number=$(grep -c '^CALL$' \"$HOME/qsub.calls\")\n\
         [ \"${{1:-}}\" != --version ] || {{ echo 'pbs_version = 23.06'; exit 0; }}\n\
         [ \"$number\" -le {refused} ] || {{ echo 'qsub: no more jobs' >&2; exit 38; }}\necho \"$number.pbshost\""
    );
    desk.stand_in("qsub", &body);
}

#[test]
fn a_chain_of_pbs_jobs_waits_each_for_the_one_before_it() {
    let desk = Desk::new();
    qsub(&desk, 100);
    let arguments = ["--nodes", "2", "--walltime", "2:00:00", "--chain", "3", "--", "-N", "mine"];
    let said = desk.run(&script("pbs/qsub-pilot"), &arguments, &[]);
    assert_eq!(said.code, Some(0), "{}", said.text);
    // The first call asks for the version.
    let calls = &desk.calls("qsub")[1..];
    assert_eq!(said.text.lines().collect::<Vec<_>>(), ["2.pbshost", "3.pbshost", "4.pbshost"]);
    let waits: Vec<_> = calls.iter().map(|call| after(call, "-W")).collect();
    assert_eq!(waits, [None, Some("depend=afterany:2.pbshost"), Some("depend=afterany:3.pbshost")]);
    for call in calls {
        assert_eq!(
            after(call, "-l"),
            Some("select=2:ncpus=2:mpiprocs=1:mem=2gb,place=scatter,walltime=2:00:00")
        );
        assert_eq!(after(call, "-v"), after(&calls[0], "-v"));
        assert_eq!(after(call, "-N"), Some("mine"));
        assert!(call.last().unwrap().ends_with("pbs/pilot.sh"), "{call:?}");
        assert!(!call.contains(&"-J".to_owned()), "{call:?}");
    }
    assert_eq!(desk.settings(), 1);
}

#[test]
fn an_array_of_pbs_jobs_is_one_submission() {
    let desk = Desk::new();
    qsub(&desk, 100);
    let said = desk.run(&script("pbs/qsub-pilot"), &["--array", "8"], &[]);
    assert_eq!(said.code, Some(0), "{}", said.text);
    let calls = desk.calls("qsub");
    assert_eq!(calls.len(), 2, "{calls:?}");
    assert_eq!(after(&calls[1], "-J"), Some("1-8"));
}

#[test]
fn what_qsub_pilot_cannot_submit_is_said_and_jobs_that_wait_keep_their_settings() {
    let desk = Desk::new();
    for arguments in
        [["--chain", "0"], ["--chain", "101"], ["--chain", "x"], ["--array", "1"], ["--array", "1-8"]]
    {
        let said = desk.run(&script("pbs/qsub-pilot"), &arguments, &[]);
        assert_eq!(said.code, Some(2), "{}", said.text);
        assert!(said.text.contains("wanted"), "{}", said.text);
    }
    // The version's call counts as the first.
    for (refused, code, kept) in [(1, Some(1), 0), (3, Some(1), 1)] {
        let desk = Desk::new();
        qsub(&desk, refused);
        let said = desk.run(&script("pbs/qsub-pilot"), &["--chain", "5"], &[]);
        assert_eq!((said.code, desk.settings()), (code, kept), "{}", said.text);
        assert!(said.text.contains(&format!("number {refused} of the chain")), "{}", said.text);
    }
}

/// A pilot that says what it was started as.
const PILOT: &str = "echo \"pilot $* node=${PBS_NODENUM:-} site=${JIRIAF_SITE-unset} kubeconfig=${KUBECONFIG-unset} \
                     pods=${JIRIAF_PODS_DIR-unset} lead=${JIRIAF_SIGNAL_LEAD-unset}\"\nsleep \"0.${PBS_NODENUM:-0}\"\nexit \"${PBS_NODENUM:-0}\"";

#[test]
fn the_job_scripts_leave_to_the_file_and_the_defaults_what_nobody_has_set() {
    let desk = Desk::new();
    desk.stand_in("pilot", PILOT);
    // What remains of srun: the task.
    desk.stand_in("srun", "while [ \"${1#-}\" != \"$1\" ]; do shift; done\nexec \"$@\"");
    let many = [("SLURM_JOB_NUM_NODES", "4"), ("SLURM_JOB_ID", "7")];
    for (name, lead, environment) in [
        ("slurm/pilot.sh", "180", &[][..]),
        ("slurm/pilot-multinode.sh", "180", &many),
        ("pbs/pilot.sh", "unset", &[]),
    ] {
        let said = desk.run(&script(name), &[], environment);
        let wanted = format!("pilot run node= site=unset kubeconfig=unset pods=unset lead={lead}\n");
        assert_eq!((said.code, said.text.as_str()), (Some(0), wanted.as_str()), "{name}");
        let set = [environment, &[("JIRIAF_SITE", "here"), ("KUBECONFIG", "/k")]].concat();
        let said = desk.run(&script(name), &[], &set);
        assert!(said.text.contains("site=here kubeconfig=/k"), "{name}: {}", said.text);
    }
    let call = &desk.calls("srun")[0];
    for option in [
        "--nodes=4",
        "--ntasks-per-node=1",
        "--overlap",
        "--wait=0",
        "--kill-on-bad-exit=0",
        "--cpu-bind=none",
        "--mpi=none",
    ] {
        assert!(call.iter().any(|argument| argument == option), "{option}: {call:?}");
    }
}

#[test]
fn each_job_of_a_slurm_chain_submits_the_next_with_the_same_options_until_none_are_left() {
    let desk = Desk::new();
    desk.stand_in("pilot", PILOT);
    desk.stand_in("sbatch", "echo Submitted batch job 7");
    let chain = script("slurm/pilot-chain.sh");
    let file = chain.to_str().unwrap();
    let options = ["--time=4:00:00", "--job-name=two words"];
    let said = desk.run(&chain, &options, &[("JIRIAF_LINKS", "2")]);
    assert_eq!((said.code, said.text.as_str()), (Some(0), "Submitted batch job 7\n"));
    let first = [&["--dependency=singleton"][..], &options, &[file, "--link", "2"], &options].concat();
    assert_eq!(desk.calls("sbatch"), std::slice::from_ref(&first));

    // The job: its script gets what stands behind its file.
    let job = [("SLURM_JOB_ID", "7"), ("SLURM_JOB_NUM_NODES", "1"), ("JIRIAF_LINKS", "2")];
    let run = |arguments: &[&str], more: &[(&str, &str)]| desk.run(&chain, arguments, &[&job, more].concat());
    let said = run(&first[4..], &[]);
    assert_eq!(said.code, Some(0), "{}", said.text);
    assert!(said.text.contains("pilot run "), "{}", said.text);
    let head = ["--dependency=singleton", "--begin=now+300"];
    let second = [&head[..], &options, &[file, "--link", "1"], &options].concat();
    assert_eq!(desk.calls("sbatch").last().unwrap(), &second);

    // The last one, and one that was requeued, submit none.
    let last = [&["--link", "1"], &options[..]].concat();
    assert!(run(&last, &[]).text.starts_with("pilot run "));
    assert!(run(&first[4..], &[("SLURM_RESTART_COUNT", "1")]).text.starts_with("pilot run "));
    // An array would submit as many chains as it has tasks; pilots of several nodes want srun.
    for more in [("SLURM_ARRAY_JOB_ID", "7"), ("SLURM_JOB_NUM_NODES", "2")] {
        assert_eq!(run(&first[4..], &[more]).code, Some(2), "{more:?}");
    }
    assert_eq!(desk.calls("sbatch").len(), 2);
    // A compute node that may not submit has its pilot all the same.
    desk.stand_in("sbatch", "echo denied >&2; exit 1");
    let said = run(&first[4..], &[]);
    assert!(said.text.contains("pilot run ") && said.text.contains("ends with this one"), "{}", said.text);
}

#[test]
fn pbs_tmrsh_starts_one_pilot_a_host_and_the_worst_exit_code_is_the_jobs() {
    let desk = Desk::new();
    desk.stand_in("pilot", PILOT);
    desk.install("pbs_tmrsh", &fs::read_to_string(script("tests/pbs/pbs_tmrsh")).unwrap());
    let hosts = desk.root.path().join("hosts[1]");
    // A host is in the list as often as it has processes.
    fs::write(&hosts, "b\nb\nc\nb\nc\na\n").unwrap();
    let environment =
        [("PBS_NODEFILE", hosts.to_str().unwrap()), ("PBS_JOBID", "45[1].pbshost"), ("JIRIAF_SITE", "here")];
    let said = desk.run(
        &script("pbs/pilot.sh"),
        &[],
        &[&environment[..], &[("JIRIAF_LAUNCH", "pbs_tmrsh")]].concat(),
    );
    let mut lines: Vec<_> = said.text.lines().collect();
    lines.sort_unstable();
    let numbers: Vec<_> = lines.iter().filter_map(|line| line.split(' ').nth(2)).collect();
    assert_eq!(numbers, ["node=0", "node=2", "node=5"], "{}", said.text);
    assert!(lines.iter().all(|line| line.contains("site=here")), "{}", said.text);
    // That of the one that was started first and ends last.
    assert_eq!(said.code, Some(5), "{}", said.text);
    let left = fs::read_dir(desk.root.path()).unwrap().flatten();
    assert!(left.into_iter().all(|entry| !entry.file_name().to_string_lossy().contains("env.")));
    let said =
        desk.run(&script("pbs/pilot.sh"), &[], &[&environment[..], &[("JIRIAF_LAUNCH", "rsh")]].concat());
    assert_eq!(said.code, Some(2), "{}", said.text);
    assert!(said.text.contains("pbs_tmrsh is wanted"), "{}", said.text);
}
