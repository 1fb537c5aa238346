//! Memory of pods in a job whose batch system names a figure and holds nobody to it: `jiriaf-pilot play`, which looks after its pods
//! as `run` does.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// A job that was granted so many MiB.
struct Job(tempfile::TempDir);

impl Job {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn file(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Plays the pods to their ends: what was printed on standard output.
    fn play(&self, mebibytes: u32, arguments: &[&str], manifest: &str) -> String {
        let file = self.file("manifest.yaml");
        std::fs::write(&file, manifest).unwrap();
        let played = Command::new(env!("CARGO_BIN_EXE_jiriaf-pilot"))
            .arg("play")
            .args(arguments)
            .arg(&file)
            .env_clear()
            .env("HOME", self.0.path())
            .env("TMPDIR", self.0.path())
            .env("PATH", std::env::var("PATH").unwrap())
            .env("SLURM_JOB_ID", "1")
            .env("SLURM_JOB_END_TIME", "4000000000")
            .env("SLURM_MEM_PER_NODE", mebibytes.to_string())
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        println!("{}", text(played.stderr));
        text(played.stdout)
    }
}

/// Makes `x` of so many million bytes.
fn takes(million: u32) -> String {
    format!("x=$(head -c {million}000000 /dev/zero | tr '\\0' a)")
}

/// A Pod, the scripts of whose containers are in a ConfigMap beside it; `containers` are the spec's lines, and name these as images.
fn pod(name: &str, scripts: &[(&str, &str)], spec: &str) -> String {
    let data: String = scripts
        .iter()
        .map(|(file, script)| {
            let lines: String = script.lines().map(|line| format!("    {line}\n")).collect();
            format!("  {file}: |\n{lines}")
        })
        .collect();
    format!(
        "---\napiVersion: v1\nkind: ConfigMap\nmetadata: {{name: {name}}}\ndata:\n{data}---\napiVersion: v1\nkind: Pod\n\
         metadata: {{name: {name}}}\nspec:\n  volumes: [{{name: s, configMap: {{name: {name}}}}}]\n{spec}"
    )
}

fn container(name: &str, script: &str, resources: &str) -> String {
    format!(
        "  - {{name: {name}, image: s/{script}, command: [bash], volumeMounts: [{{name: s, mountPath: s}}], resources: {resources}}}\n"
    )
}

/// The row of the table that a pod has.
fn row<'a>(out: &'a str, pod: &str) -> &'a str {
    out.lines()
        .find(|line| line.starts_with(&format!("{pod} ")))
        .unwrap_or_else(|| panic!("no row of {pod}:\n{out}"))
}

fn quoted(path: &Path) -> String {
    format!("'{}'", path.display())
}

#[test]
fn one_pod_that_takes_all_is_evicted_and_no_other() {
    let job = Job::new();
    let mark = quoted(&job.file("hog.pid"));
    let hog = format!("{}\necho $$ >{mark}\n{}\nsleep 60", takes(10), takes(900));
    // Others are there when the hog goes, and a while after.
    let small = format!(
        "{}\nuntil [ -s {mark} ]; do sleep 0.1; done\nwhile kill -0 $(cat {mark}) 2>/dev/null; do sleep 0.1; done\nsleep 2",
        takes(40)
    );
    let mut manifest =
        pod("hog", &[("run", &hog)], &format!("  containers:\n{}", container("c", "run", "{}")));
    for name in ["a", "b", "c"] {
        manifest +=
            &pod(name, &[("run", &small)], &format!("  containers:\n{}", container("c", "run", "{}")));
    }
    let out = job.play(800, &[], &manifest);
    assert!(row(&out, "hog").contains("Failed"), "{out}");
    for name in ["a", "b", "c"] {
        assert!(row(&out, name).contains("Succeeded"), "{out}");
    }
}

#[test]
fn what_processes_share_counts_once() {
    let job = Job::new();
    // 20 processes that share 40 MB: 800 MB by each one's own figure.
    let forks = format!("{}\nfor i in $(seq 20); do (sleep 4; :) & done\nwait", takes(40));
    let manifest =
        pod("forks", &[("run", &forks)], &format!("  containers:\n{}", container("c", "run", "{}")));
    let out = job.play(500, &[], &manifest);
    assert!(row(&out, "forks").contains("Succeeded"), "{out}");
}

#[test]
fn init_containers_and_those_that_start_again_have_their_limits_too() {
    let job = Job::new();
    let survived = job.file("survived");
    let hog = format!("{}\nsleep 20\necho x >>{}", takes(200), quoted(&survived));
    let limited = "{limits: {memory: 100Mi}}";
    let spec = |policy: &str, init: &str, main: &str| {
        format!("  restartPolicy: {policy}\n  initContainers:\n{init}  containers:\n{main}")
    };
    let quiet = container("c", "quiet", "{}");
    let mut manifest = pod(
        "init",
        &[("hog", &hog), ("quiet", "exit 0")],
        &spec("Never", &container("i", "hog", limited), &quiet),
    );
    // Fails the first time, takes too much the second time, and is content the third time.
    let runs = quoted(&job.file("runs"));
    let again =
        format!("echo x >>{runs}\ncase $(wc -l <{runs}) in 1) exit 1 ;; 2) {hog} ;; *) exit 0 ;; esac");
    manifest += &pod(
        "again",
        &[("again", &again)],
        &format!("  restartPolicy: OnFailure\n  containers:\n{}", container("c", "again", limited)),
    );
    let out = job.play(4000, &["--crash-loop-back-off-max=1s"], &manifest);
    assert!(!survived.exists(), "{out}");
    assert!(row(&out, "init").contains("Failed") && row(&out, "again").contains("Succeeded"), "{out}");
}

#[test]
fn a_pod_that_is_ending_does_not_take_what_is_left() {
    let job = Job::new();
    let survived = job.file("survived");
    let trap = format!(
        "trap \"{}; sleep 8; echo x >{}; exit 0\" TERM\nsleep 60 & wait",
        takes(900),
        survived.display()
    );
    let manifest = pod(
        "p",
        &[("run", &trap)],
        &format!(
            "  activeDeadlineSeconds: 1\n  terminationGracePeriodSeconds: 30\n  containers:\n{}",
            container("c", "run", "{}")
        ),
    );
    let out = job.play(700, &[], &manifest);
    assert!(row(&out, "p").contains("Failed"), "{out}");
    assert!(!survived.exists(), "{out}");
}
