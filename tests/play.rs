//! `jiriaf-pilot play`, the real binary upon real manifests: what it prints, what it returns, and that nothing is left.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nix::fcntl::OFlag;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};

/// A user's home with nothing in it.
struct Home(tempfile::TempDir);

impl Home {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_jiriaf-pilot"));
        command.arg("play").args(args).env_clear().stdin(Stdio::null());
        command.env("HOME", self.path()).env("PATH", std::env::var("PATH").unwrap());
        command.env("TMPDIR", self.path());
        command
    }

    fn play(&self, args: &[&str]) -> Played {
        Played::new(self.command(args).output().unwrap())
    }

    fn play_text(&self, manifest: &str) -> Played {
        let file = self.path().join("manifest.yaml");
        fs::write(&file, manifest).unwrap();
        self.play(&[file.to_str().unwrap()])
    }

    /// No pod directory, no state and no process is left.
    fn is_clean(&self) {
        let state = fs::read_dir(self.path().join(format!("jiriaf-pilot-{}", nix::unistd::getuid())));
        assert_eq!(state.into_iter().flatten().count(), 0, "state is left");
        let left: Vec<String> = fs::read_dir(self.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| {
                name != ".jiriaf-pilot" && name != "manifest.yaml" && !name.starts_with("jiriaf-pilot-")
            })
            .collect();
        assert!(left.is_empty(), "{left:?}");
        let home = format!("HOME={}", self.path().display());
        let processes = fs::read_dir("/proc").unwrap().flatten().filter(|entry| {
            fs::read(entry.path().join("environ"))
                .is_ok_and(|env| env.split(|byte| *byte == 0).any(|var| var == home.as_bytes()))
        });
        assert_eq!(processes.count(), 0, "processes are left");
    }
}

struct Played {
    code: i32,
    out: String,
    err: String,
}

impl Played {
    fn new(output: Output) -> Self {
        Self {
            code: output.status.code().unwrap(),
            out: String::from_utf8(output.stdout).unwrap(),
            err: String::from_utf8(output.stderr).unwrap(),
        }
    }

    /// Everything, for a test that fails.
    fn all(&self) -> String {
        format!("exit {}\n--- stdout\n{}--- stderr\n{}", self.code, self.out, self.err)
    }

    /// The log that the table names in the row with this text.
    fn log(&self, row: &str) -> String {
        let line =
            self.out.lines().rfind(|line| line.contains(row)).unwrap_or_else(|| panic!("{}", self.all()));
        fs::read_to_string(line.split_whitespace().last().unwrap()).unwrap()
    }
}

fn example(name: &str) -> String {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("docs/examples").join(name);
    fs::read_to_string(path).unwrap()
}

/// A ConfigMap `s` with a script, and an object that runs it.
fn with_script(script: &str, object: &str) -> String {
    let indented: String = script.lines().map(|line| format!("    {line}\n")).collect();
    format!(
        "kind: ConfigMap\napiVersion: v1\nmetadata: {{name: s}}\ndata:\n  run.sh: |\n{indented}---\n{object}\n"
    )
}

const SPEC: &str = "containers: [{name: c, image: s, command: [bash], volumeMounts: [{name: s, mountPath: s}]}], volumes: [{name: s, configMap: {name: s}}]";

fn pod(name: &str, extra: &str) -> String {
    format!("kind: Pod\napiVersion: v1\nmetadata: {{name: {name}}}\nspec: {{{extra} {SPEC}}}")
}

fn job(spec: &str, policy: &str) -> String {
    format!(
        "kind: Job\napiVersion: batch/v1\nmetadata: {{name: j}}\nspec: {{{spec} template: {{spec: {{restartPolicy: {policy}, {SPEC}}}}}}}"
    )
}

#[test]
fn the_first_pod_says_hello_and_leaves_its_log() {
    let home = Home::new();
    let played = home.play_text(&example("first-pod.yaml"));
    assert_eq!(played.code, 0, "{}", played.all());
    let lines: Vec<&str> = played.out.lines().collect();
    assert!(lines[0].starts_with("hello | Hello from first-pod on "), "{}", played.all());
    assert!(lines.contains(&"hello | step 4 of 4"), "{}", played.all());
    assert!(lines.last().unwrap().starts_with("first-pod  Succeeded  hello      exit 0"), "{}", played.all());
    assert!(played.log("first-pod ").contains("step 4 of 4"));
    assert_eq!(played.err, "", "no progress line and no log where nobody watches");
    home.is_clean();
}

#[test]
fn the_stress_example_plays_from_standard_input() {
    let home = Home::new();
    let manifest = example("direct-stress.yaml").replace(r#"["300", "2"]"#, r#"["1", "1"]"#);
    let installed =
        std::env::split_paths(&std::env::var_os("PATH").unwrap()).any(|dir| dir.join("stress").is_file());
    let mut child = home
        .command(&["-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(manifest.as_bytes()).unwrap();
    let played = Played::new(child.wait_with_output().unwrap());
    if installed {
        assert_eq!(played.code, 0, "{}", played.all());
        assert!(played.out.contains("c1 | stress: info"), "{}", played.all());
    } else {
        assert_eq!(played.code, 127, "{}", played.all());
    }
    home.is_clean();
}

#[test]
fn a_program_that_is_not_there_is_named() {
    let home = Home::new();
    let manifest =
        example("direct-stress.yaml").replace("    stress --timeout", "    stress-of-nobody --timeout");
    let played = home.play_text(&manifest);
    assert_eq!(played.code, 127, "{}", played.all());
    assert!(
        played.err.contains("hint: p1/c1: exit 127: a program that the script calls is not installed on this host: stress-of-nobody"),
        "{}",
        played.all()
    );
}

#[test]
fn several_pods_name_themselves_and_the_first_failure_is_the_exit_code() {
    let home = Home::new();
    let script = "echo out of $HOSTNAME; echo err >&2; [[ $PWD == */b/* ]] && { sleep 0.5; exit 9; }; [[ $PWD == */c/* ]] && exit 7; exit 0";
    let played = home.play_text(&with_script(
        script,
        &format!("{}\n---\n{}\n---\n{}", pod("a", ""), pod("b", ""), pod("c", "")),
    ));
    assert_eq!(played.code, 7, "{}", played.all());
    assert!(played.out.contains("a/c | out of"), "{}", played.all());
    assert!(played.err.contains("b/c | err\n"), "{}", played.all());
    assert!(played.out.contains("exit 9") && played.out.contains("exit 7"), "{}", played.all());
    home.is_clean();
}

#[test]
fn all_lines_come_in_order_before_the_table() {
    let home = Home::new();
    let played = home.play_text(&with_script("seq 20000", &pod("p", "")));
    let numbers: Vec<u32> =
        played.out.lines().filter_map(|line| line.strip_prefix("c | ")?.parse().ok()).collect();
    assert_eq!(numbers, (1..=20000).collect::<Vec<_>>());
    let lines: Vec<&str> = played.out.lines().collect();
    assert!(lines[20000].starts_with("POD "), "{}", lines[20000]);
}

#[test]
fn secrets_and_string_data_reach_the_container() {
    let home = Home::new();
    let secret = "kind: Secret\napiVersion: v1\nmetadata: {name: k}\ndata: {a: b25l, b: eA==}\nstringData: {b: two}\n---\n";
    let object =
        pod("p", "").replace("command: [bash]", "command: [bash], envFrom: [{secretRef: {name: k}}]");
    let played = home.play_text(&format!("{secret}{}", with_script("echo $a $b", &object)));
    assert!(played.out.contains("c | one two\n"), "{}", played.all());
}

#[test]
fn a_prefix_that_can_begin_no_variables_name_leaves_the_keys_out_and_is_told() {
    let home = Home::new();
    let keys = "kind: ConfigMap\napiVersion: v1\nmetadata: {name: k}\ndata: {A: one}\n---\n";
    let both = "envFrom: [{configMapRef: {name: k}}, {prefix: 'P=', configMapRef: {name: k}}]";
    let object = pod("p", "").replace("command: [bash]", &format!("command: [bash], {both}"));
    let played = home.play_text(&format!("{keys}{}", with_script("echo $A; env | grep -c ^P=", &object)));
    assert!(played.out.contains("c | one\n") && played.out.contains("c | 0\n"), "{}", played.all());
    let told =
        ["InvalidEnvironmentVariableNames", "Keys [P=A] from the EnvFrom configMap default/k were skipped"];
    assert!(told.iter().all(|words| played.err.contains(words)), "{}", played.all());
}

#[test]
fn a_job_retries_until_it_succeeds() {
    let home = Home::new();
    let script = "f=$HOME/.tries-$JOB_COMPLETION_INDEX; n=$(cat $f 2>/dev/null || echo 0); echo $((n+1)) > $f; [ $n -ge 1 ] || exit 3; rm $f";
    let played = home.play_text(&with_script(
        script,
        &job("completions: 2, parallelism: 2, completionMode: Indexed, backoffLimit: 4,", "Never"),
    ));
    assert_eq!(played.code, 0, "{}", played.all());
    assert_eq!(played.out.matches("exit 3").count(), 2, "{}", played.all());
    assert!(played.out.contains("j-0-1") && played.out.contains("j-1-1"), "{}", played.all());
    home.is_clean();
}

#[test]
fn a_job_that_fails_too_often_fails() {
    let home = Home::new();
    let played = home.play_text(&with_script("exit 5", &job("backoffLimit: 1,", "Never")));
    assert_eq!(played.code, 5, "{}", played.all());
    assert_eq!(played.out.matches("exit 5").count(), 2, "{}", played.all());
    let played = home.play_text(&with_script("exit 5", &job("backoffLimit: 1,", "OnFailure")));
    assert_eq!(played.code, 5, "{}", played.all());
    home.is_clean();
}

#[test]
fn a_pod_restarts_only_when_it_says_so() {
    let home = Home::new();
    let script = "f=$HOME/.count; echo x >> $f; [ $(wc -l < $f) -ge 2 ] && { rm $f; exit 0; }; exit 1";
    let played = home.play_text(&with_script(script, &pod("p", "restartPolicy: OnFailure,")));
    assert_eq!(played.code, 0, "{}", played.all());
    assert!(played.out.contains("1 restarts"), "{}", played.all());
    home.is_clean();
}

#[test]
fn pods_that_do_not_fit_together_run_one_after_another() {
    let home = Home::new();
    let cpus = std::thread::available_parallelism().unwrap();
    let script = "mkdir $HOME/.only || exit 1; sleep 0.3; rmdir $HOME/.only";
    let object = |name| {
        pod(name, "")
            .replace("command: [bash]", &format!("command: [bash], resources: {{requests: {{cpu: {cpus}}}}}"))
    };
    let played = home.play_text(&with_script(script, &format!("{}\n---\n{}", object("a"), object("b"))));
    assert_eq!(played.code, 0, "{}", played.all());
    let huge = object("a").replace(&format!("cpu: {cpus}"), "cpu: 100000");
    let played = home.play_text(&with_script(script, &huge));
    assert_eq!(played.code, 1, "{}", played.all());
    assert!(
        played.out.contains("OutOfcpu") && played.err.contains("requested: 100000000"),
        "{}",
        played.all()
    );
}

#[test]
fn bad_manifests_start_nothing() {
    let home = Home::new();
    let good = with_script("touch $HOME/started", &pod("p", ""));
    for (bad, wanted) in [
        ("kind: [\n", "manifest.yaml, document 3: "),
        ("kind: Pod\napiVersion: v1\nmetadata: {name: q}\nspec: {containers: 3}\n", "document 3"),
        ("apiVersion: v1\n", "no `kind`"),
        ("kind: Pod\napiVersion: v1\nmetadata: {name: ../q}\nspec: {containers: [{name: c}]}\n", "../q"),
    ] {
        let played = home.play_text(&format!("{good}---\n{bad}"));
        assert_eq!(played.code, 1, "{}", played.all());
        assert!(
            played.err.starts_with("error: ") && played.err.contains(wanted),
            "{wanted}: {}",
            played.all()
        );
        assert_eq!(played.out, "");
    }
    home.is_clean();
    let absent = home.play(&["/no/such/file.yaml"]);
    assert_eq!(absent.code, 1, "{}", absent.all());
    assert!(absent.err.contains("/no/such/file.yaml: No such file"), "{}", absent.all());
    assert_eq!(home.play(&[]).code, 2);
    assert_eq!(home.play(&["--walltime", "soon", "a.yaml"]).code, 2);
}

#[test]
fn a_pod_that_can_never_start_is_given_up() {
    let home = Home::new();
    let played = home.play_text(&with_script("true", &pod("p", "").replace("image: s", "image: ubuntu")));
    assert_eq!(played.code, 1, "{}", played.all());
    assert!(
        played.err.contains("p: c: ErrImageNeverPull: ") && played.err.contains("given up"),
        "{}",
        played.all()
    );
    home.is_clean();
}

#[test]
fn a_key_or_a_path_that_would_leave_its_volume_is_refused_and_nothing_is_written_outside() {
    // A cluster's API server takes neither. Here nobody has looked at them before.
    let home = Home::new();
    let good = with_script("touch $HOME/started", &pod("p", ""));
    for key in ["../x", "a/../../../x", "..", "../../../../x", "/x"] {
        let played = home.play_text(&good.replace("run.sh", &format!("{key:?}")));
        assert_eq!(played.code, 1, "{}", played.all());
        let wanted = format!("manifest.yaml, document 1: the key {key:?} is no good: ");
        assert!(played.err.starts_with("error: ") && played.err.contains(&wanted), "{}", played.all());
        let secret =
            format!("kind: Secret\napiVersion: v1\nmetadata: {{name: k}}\nstringData: {{{key:?}: x}}\n---\n");
        let played = home.play_text(&format!("{secret}{good}"));
        assert_eq!((played.code, played.err.contains(&wanted)), (1, true), "{}", played.all());
    }
    let items = "configMap: {name: s, items: [{key: run.sh, path: ../../../x}]}";
    let played = home.play_text(&good.replace("configMap: {name: s}", items));
    assert_eq!(played.code, 1, "{}", played.all());
    assert!(played.err.contains("must not contain '..': ../../../x"), "{}", played.all());
    // Neither `x` nor `started`.
    home.is_clean();
}

#[test]
fn pods_and_jobs_of_several_files_and_of_standard_input_run_together() {
    let home = Home::new();
    let file = |name: &str, text: &str| {
        let path = home.path().join(".jiriaf-pilot").join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    };
    // The script is in a file of its own: objects are looked for in all of them.
    let script = with_script("echo here; [[ $PWD == */a/* ]] && exit 3; exit 0", "");
    let (scripts, pods) = (file("scripts.yaml", &script), file("a.yaml", &pod("a", "")));
    let mut child = home
        .command(&[&pods, "-", &scripts])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let input = format!("{}\n---\n{}", job("completions: 2,", "Never"), pod("b", ""));
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let played = Played::new(child.wait_with_output().unwrap());
    assert_eq!(played.code, 3, "{}", played.all());
    for pod in ["a", "b", "j-0", "j-1"] {
        assert!(played.out.contains(&format!("{pod}/c | here\n")), "{pod}: {}", played.all());
    }
    assert_eq!(played.out.matches("  Succeeded  ").count(), 3, "{}", played.all());
    home.is_clean();
}

/// A terminal, and what a program opens of it.
fn terminal() -> (fs::File, Stdio) {
    let ours = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
    grantpt(&ours).unwrap();
    unlockpt(&ours).unwrap();
    let name = ptsname(&ours, Vec::new()).unwrap().into_string().unwrap();
    let mut options = fs::File::options();
    options.read(true).write(true).custom_flags(OFlag::O_NOCTTY.bits());
    (fs::File::from(ours), Stdio::from(options.open(name).unwrap()))
}

#[test]
fn on_a_terminal_a_line_says_what_runs_and_how_much_walltime_is_left() {
    let home = Home::new();
    // Each pod waits for a file of its own, where nothing else looks.
    let go = home.path().join(".jiriaf-pilot/go");
    fs::create_dir_all(go.parent().unwrap()).unwrap();
    let script = format!(
        "n=b; [[ $PWD == */a/* ]] && n=a; echo ready; until [ -e {}.$n ]; do sleep 0.05; done; echo done",
        go.display()
    );
    let file = home.path().join("manifest.yaml");
    fs::write(&file, with_script(&script, &format!("{}\n---\n{}", pod("a", ""), pod("b", "")))).unwrap();

    let (mut ours, theirs) = terminal();
    let mut command = home.command(&["--walltime", "10m", file.to_str().unwrap()]);
    let child = command.stdout(Stdio::piped()).stderr(theirs).spawn().unwrap();
    // The terminal ends for us when nobody has it open any more.
    drop(command);
    let shown = Arc::new(Mutex::new(String::new()));
    let screen = Arc::clone(&shown);
    let reader = std::thread::spawn(move || {
        let mut bytes = [0; 4096];
        // Its end is an error (EIO).
        while let Ok(n) = ours.read(&mut bytes) {
            screen.lock().unwrap().push_str(&String::from_utf8_lossy(&bytes[..n]));
        }
    });
    let shows = |wanted: &[&str]| {
        let begun = Instant::now();
        while !wanted.iter().any(|text| shown.lock().unwrap().contains(text)) {
            assert!(begun.elapsed() < Duration::from_secs(20), "{wanted:?}: {:?}", shown.lock().unwrap());
            std::thread::sleep(Duration::from_millis(20));
        }
    };
    shows(&["running: a, b; 9m 5", "running: b, a; 9m 5"]);
    fs::write(go.with_extension("b"), "").unwrap();
    shows(&["running: a; 1 ended; 9m "]);
    fs::write(go.with_extension("a"), "").unwrap();

    let played = Played::new(child.wait_with_output().unwrap());
    reader.join().unwrap();
    let shown = shown.lock().unwrap();
    assert_eq!(played.code, 0, "{}{shown:?}", played.all());
    // The line is gone at the end, and was never where the output is.
    assert!(shown.ends_with("\r\u{1b}[2K"), "{shown:?}");
    assert!(played.out.contains("a/c | ready\n") && !played.out.contains('\u{1b}'), "{}", played.all());
    home.is_clean();
}

#[test]
fn other_kinds_are_named_and_ignored() {
    let home = Home::new();
    let service = "kind: Service\napiVersion: v1\nmetadata: {name: web}\nspec: {}\n---\n";
    let played = home.play_text(&format!("{service}{}", with_script("true", &pod("p", ""))));
    assert_eq!(played.code, 0, "{}", played.all());
    assert!(played.err.starts_with("ignored: Service web"), "{}", played.all());
}

/// Starts a play and waits until its container says `ready`.
fn start_and_wait(
    home: &Home,
    manifest: &str,
    args: &[&str],
) -> (Child, BufReader<std::process::ChildStdout>) {
    let file = home.path().join("manifest.yaml");
    fs::write(&file, manifest).unwrap();
    let mut args = args.to_vec();
    args.push(file.to_str().unwrap());
    let mut child = home.command(&args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut out = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    out.read_line(&mut line).unwrap();
    assert_eq!(line, "c | ready\n");
    (child, out)
}

fn rest(mut child: Child, out: BufReader<std::process::ChildStdout>) -> (i32, String) {
    let lines: Vec<String> = out.lines().map(Result::unwrap).collect();
    (child.wait().unwrap().code().unwrap(), lines.join("\n"))
}

const TRAP: &str = "trap 'echo saving; sleep 0.3; echo saved; exit 3' TERM\necho ready\nsleep 1000 & wait";

#[test]
fn ctrl_c_and_sigterm_give_the_script_its_time() {
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        let home = Home::new();
        let (child, out) = start_and_wait(&home, &with_script(TRAP, &pod("p", "")), &[]);
        kill(Pid::from_raw(child.id().try_into().unwrap()), signal).unwrap();
        let (code, text) = rest(child, out);
        assert!(text.starts_with("c | saving\nc | saved\nPOD"), "{signal}: {text}");
        assert_eq!(code, 3, "{text}");
        home.is_clean();
    }
}

#[test]
fn a_second_ctrl_c_hurries() {
    let home = Home::new();
    let script = "trap '' TERM\necho ready\nfor i in {1..1000}; do sleep 0.1; done";
    let (child, out) = start_and_wait(&home, &with_script(script, &pod("p", "")), &[]);
    let pid = Pid::from_raw(child.id().try_into().unwrap());
    let begun = Instant::now();
    kill(pid, Signal::SIGINT).unwrap();
    std::thread::sleep(Duration::from_millis(500));
    kill(pid, Signal::SIGINT).unwrap();
    let (code, text) = rest(child, out);
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    assert_eq!(code, 137, "{text}");
    home.is_clean();
}

#[test]
fn the_walltime_ends_the_pods_in_time() {
    let home = Home::new();
    let begun = Instant::now();
    let (child, out) = start_and_wait(&home, &with_script(TRAP, &pod("p", "")), &["--walltime", "4"]);
    let (code, text) = rest(child, out);
    let took = begun.elapsed();
    assert!(took > Duration::from_millis(1500) && took < Duration::from_secs(4), "{took:?}");
    assert!(text.contains("c | saved"), "{text}");
    assert_eq!(code, 3, "{text}");
    home.is_clean();
}

#[test]
fn nothing_goes_on_when_play_is_killed() {
    let home = Home::new();
    let (mut child, _out) = start_and_wait(&home, &with_script(TRAP, &pod("p", "")), &[]);
    child.kill().unwrap();
    child.wait().unwrap();
    let home_var = format!("HOME={}", home.path().display());
    let runs = || {
        fs::read_dir("/proc").unwrap().flatten().any(|entry| {
            fs::read(entry.path().join("environ"))
                .is_ok_and(|env| env.split(|byte| *byte == 0).any(|var| var == home_var.as_bytes()))
        })
    };
    let begun = Instant::now();
    while runs() && begun.elapsed() < Duration::from_secs(40) {
        std::thread::sleep(Duration::from_millis(100));
    }
    assert!(!runs(), "the container outlived play");
}
