//! `kubectl exec`, `attach`, `run` and `cp`, through the API server to the Node's own API.

use std::collections::BTreeSet;
use std::io::Read as _;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

use crate::harness::{
    Ended, Kubectl, Namespace, Options, Pilot, Terminal, Way, api, bed, container, pod_spec, seconds,
    shared_directory, wait_until,
};

/// How long kubectl may take on a machine that is busy with other tests.
const SLOW: Duration = seconds(60);
/// And with much to carry.
const LONG: Duration = seconds(180);

/// `kubectl exec` in a container of a pod, with input.
#[track_caller]
fn exec_by(way: &Way, namespace: &Namespace, options: &[&str], argv: &[&str], input: &[u8]) -> Ended {
    let mut command = way.kubectl(&namespace.name);
    command.arg("exec").args(options).arg("--").args(argv);
    Kubectl::run_with(&mut command, input, LONG)
}

fn exec(namespace: &Namespace, options: &[&str], argv: &[&str]) -> Ended {
    exec_by(&Way::default(), namespace, options, argv, b"")
}

/// Shell that waits for a file of the test's.
fn until(file: &Path) -> String {
    format!("until [ -e {} ]; do sleep 0.05; done\n", file.display())
}

/// A pod that runs until the test is over, and its pilot.
fn pod(label: &'static str) -> (Namespace, Pilot) {
    let namespace = Namespace::new(label);
    let pilot = Pilot::local(Options::new(label), 600);
    namespace.script_on(&pilot, "p", "sleep 3600\n");
    namespace.wait_phase("p", "Running", seconds(30));
    (namespace, pilot)
}

/// Bytes without a pattern.
pub fn noise(size: usize, mut seed: u64) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(size + 8);
    while bytes.len() < size {
        // Marsaglia's xorshift.
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        bytes.extend_from_slice(&seed.to_le_bytes());
    }
    bytes.truncate(size);
    bytes
}

/// What every way must carry: exit codes, both outputs, input and output of so many bytes.
pub fn exec_works(way: &Way, namespace: &Namespace, size: usize) {
    let ended = exec_by(way, namespace, &["p"], &["sh", "-c", "echo out; echo err >&2; exit 42"], b"");
    assert_eq!((ended.code, ended.text().as_str()), (42, "out\n"), "{}", ended.said());
    assert!(ended.stderr.starts_with("err\n"), "{}", ended.stderr);
    let ended = exec_by(way, namespace, &["p"], &["true"], b"");
    assert_eq!(ended.code, 0, "{}", ended.said());
    // What came in goes out again, and its end is passed on.
    let bytes = noise(size, 7);
    let ended = exec_by(way, namespace, &["-i", "p"], &["sh", "-c", "cat; exit 3"], &bytes);
    assert_eq!(ended.code, 3, "{}", ended.stderr);
    assert!(ended.stdout == bytes, "{} of {size} bytes came back, or others", ended.stdout.len());
    // And a program need not take all of it.
    let ended = exec_by(way, namespace, &["-i", "p"], &["head", "-c", "5"], &bytes);
    assert!(ended.code == 0 && ended.stdout == bytes[..5], "{}", ended.said());
    // The end does not wait for what the program leaves behind, nor for the end of what is typed.
    let mut command = way.kubectl(&namespace.name);
    let mut typing =
        Kubectl::start(command.args(["exec", "-i", "p", "--", "sh", "-c", "sleep 3600 & echo left; exit 6"]));
    let ended = typing.wait_end(SLOW);
    assert_eq!((ended.code, ended.text().as_str()), (6, "left\n"), "{}", ended.said());
}

/// `kubectl cp` of so many bytes there and back.
pub fn cp_works(way: &Way, namespace: &Namespace, pilot: &Pilot, size: usize) {
    let bytes = noise(size, 11);
    let directory = shared_directory();
    let (there, back) = (directory.path().join("there"), directory.path().join("back"));
    std::fs::write(&there, &bytes).unwrap();
    let inside = pilot.pod_directory("p").join("containers/c1/copied");
    let remote = format!("p:{}", inside.display());
    for (from, to) in [(there.to_str().unwrap(), remote.as_str()), (&remote, back.to_str().unwrap())] {
        let ended = Kubectl::run(way.kubectl(&namespace.name).args(["cp", from, to]), LONG);
        assert_eq!(ended.code, 0, "{}", ended.said());
    }
    for file in [&inside, &back] {
        assert!(std::fs::read(file).unwrap() == bytes, "{} has other bytes", file.display());
    }
}

#[test]
fn exec_hands_over_exit_codes_both_outputs_and_twenty_megabytes_each_way() {
    let (namespace, _pilot) = pod("exec");
    exec_works(&Way::default(), &namespace, 20_000_000);
    let ended = exec(&namespace, &["p"], &["no-such-program", "x"]);
    assert_ne!(ended.code, 0);
    assert!(ended.stderr.contains("no-such-program"), "{}", ended.stderr);
    let ended = exec(&namespace, &["p"], &["sh", "-c", "kill -9 $$"]);
    assert_eq!(ended.code, 137, "{}", ended.said());
}

#[test]
fn cp_carries_a_hundred_megabytes_both_ways() {
    let (namespace, pilot) = pod("cp");
    cp_works(&Way::default(), &namespace, &pilot, 100_000_000);
}

#[test]
fn exec_enters_the_containers_environment_and_directory() {
    let namespace = Namespace::new("surroundings");
    let pilot = Pilot::local(Options::new("surroundings"), 600);
    namespace.config_map("p", &[("run.sh", "pwd\nulimit -Sn\nenv\nsleep 3600\n")]);
    let mut with = container("c1", "p");
    with["env"] = json!([{"name": "COLOR", "value": "deep blue"}]);
    namespace.pod_on(&pilot, "p", pod_spec("Never", &[with, container("c2", "p")]));
    namespace.wait_phase("p", "Running", seconds(30));
    // The shell's own, and what belongs to a process.
    let lines = |text: &str| -> BTreeSet<String> {
        let own =
            |line: &&str| !["_=", "SHLVL=", "PWD=", "OLDPWD="].iter().any(|name| line.starts_with(name));
        text.lines().filter(own).map(str::to_owned).collect()
    };
    // The pilot's own limit is higher, and is not theirs.
    let open_files = |stage: &str| {
        let pid = *pilot.stages(stage).first().expect("it runs");
        let limits = std::fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
        let line = limits.lines().find(|line| line.starts_with("Max open files")).unwrap();
        line.split_whitespace().nth(3).unwrap().parse::<u64>().unwrap()
    };
    let (theirs, own) = (open_files("run"), open_files("pilot"));
    assert!(own >= theirs && own >= 4096, "{theirs}, {own}");
    for name in ["c1", "c2"] {
        let ended = exec(&namespace, &["p", "-c", name], &["bash", "-c", "pwd; ulimit -Sn; env"]);
        let mut command = bed().kubectl_within(&namespace.name, 60);
        let logged = Kubectl::run(command.args(["logs", "p", "-c", name]), SLOW);
        assert_eq!(lines(&ended.text()), lines(&logged.text()), "{}", ended.said());
        assert_eq!(ended.text().contains("COLOR=deep blue\n"), name == "c1", "{}", ended.text());
        let directory = pilot.pod_directory("p").join("containers").join(name);
        assert!(ended.text().starts_with(directory.to_str().unwrap()), "{}", ended.text());
        assert!(ended.text().contains(&format!("\n{theirs}\n")), "{theirs}: {}", ended.text());
    }
}

/// A terminal in a container has its size, follows its changes and passes Ctrl-C.
pub fn terminal_works(way: &Way, namespace: &Namespace, pilot: &Pilot) {
    let arguments = ["exec", "-it", "p", "--", "bash", "--norc"];
    let mut terminal = Terminal::start(way, &namespace.name, &arguments, (101, 33));
    terminal.kubectl.say("tty; stty size\n");
    terminal.kubectl.wait_text("/dev/pts/", SLOW);
    terminal.kubectl.wait_text("33 101\r\n", SLOW);
    terminal.resize(120, 44);
    wait_until("the new size arrives", SLOW, || {
        terminal.kubectl.say("stty size\n");
        terminal.kubectl.text().contains("44 120\r\n")
    });
    let sleeps = || pilot.processes().iter().any(|(_, line)| line.starts_with("sleep 4711"));
    terminal.kubectl.say("sleep 4711\n");
    wait_until("it sleeps", SLOW, sleeps);
    terminal.kubectl.say("\x03");
    terminal.kubectl.say("echo code=$?\n");
    terminal.kubectl.wait_text("code=130\r\n", SLOW);
    assert!(!sleeps());
    terminal.kubectl.say("seq -f 'line %.0f' 1 20000; exit 7\n");
    let ended = terminal.kubectl.wait_end(SLOW);
    assert_eq!(ended.code, 7, "{}", ended.said());
    let all: String = (1..=20_000).map(|n| format!("line {n}\r\n")).collect();
    assert!(ended.text().contains(&all), "{} characters are not all", ended.text().len());
}

#[test]
fn a_terminal_has_its_size_follows_its_changes_and_passes_ctrl_c() {
    let (namespace, pilot) = pod("terminal");
    terminal_works(&Way::default(), &namespace, &pilot);
}

#[test]
fn a_slow_reader_gets_all_that_a_program_wrote_before_its_end() {
    let (namespace, _pilot) = pod("slow");
    let size = 20_000_000;
    let script = format!("head -c {size} /dev/zero; exit 4");
    let mut command = Way::default().kubectl(&namespace.name);
    command.args(["exec", "p", "--", "bash", "-c", &script]).stdin(Stdio::null()).stdout(Stdio::piped());
    let mut kubectl = command.spawn().unwrap();
    let mut output = kubectl.stdout.take().unwrap();
    let (mut bytes, mut got) = (vec![0; 32 * 1024], 0);
    loop {
        let n = output.read(&mut bytes).unwrap();
        if n == 0 {
            break;
        }
        got += n;
        // At most 3 MB/s: what is on its way fills all buffers, and is more than a moment's work when the program ends.
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!((got, kubectl.wait().unwrap().code()), (size, Some(4)));
}

#[test]
fn what_exec_started_is_gone_with_its_container_and_an_ended_one_is_not_entered() {
    let namespace = Namespace::new("gone");
    let pilot = Pilot::local(Options::new("gone"), 600);
    let go = pilot.home.join("go");
    namespace.config_map("c1", &[("run.sh", &until(&go))]);
    namespace.config_map("c2", &[("run.sh", "sleep 3600\n")]);
    namespace.pod_on(&pilot, "p", pod_spec("Never", &[container("c1", "c1"), container("c2", "c2")]));
    namespace.wait_phase("p", "Running", seconds(30));
    let script = "trap '' TERM HUP; (setsid sleep 4321 &); sleep 4321; exit 0";
    let mut command = bed().kubectl_within(&namespace.name, 120);
    let mut joined = Kubectl::start(command.args(["exec", "p", "-c", "c1", "--", "bash", "-c", script]));
    let mut terminal = Terminal::start(
        &Way::default(),
        &namespace.name,
        &["exec", "-it", "p", "-c", "c1", "--", "bash", "-c", "trap '' HUP; sleep 4321; exit 0"],
        (80, 24),
    );
    let sleeps = || pilot.processes().iter().filter(|(_, line)| line.starts_with("sleep 4321")).count();
    wait_until("they sleep", SLOW, || sleeps() == 3);
    std::fs::write(go, "").unwrap();
    for kubectl in [&mut joined, &mut terminal.kubectl] {
        let ended = kubectl.wait_end(SLOW);
        assert_ne!(ended.code, 0, "{}", ended.said());
    }
    wait_until("nothing is left of them", seconds(10), || sleeps() == 0);
    wait_until("an exec is refused", SLOW, || {
        let ended = exec(&namespace, &["p", "-c", "c1"], &["true"]);
        ended.code != 0 && ended.stderr.contains(r#"container not found ("c1")"#)
    });
    assert_eq!(exec(&namespace, &["p", "-c", "c2"], &["true"]).code, 0, "the other one goes on");
}

#[test]
fn what_a_client_that_is_killed_has_started_ends() {
    let (namespace, pilot) = pod("hang-up");
    let mut command = bed().kubectl_within(&namespace.name, 120);
    let joined = Kubectl::start(command.args(["exec", "p", "--", "sleep", "4322"]));
    let sleeps = || pilot.processes().iter().any(|(_, line)| line.starts_with("sleep 4322"));
    wait_until("it sleeps", SLOW, sleeps);
    drop(joined);
    wait_until("it has ended", SLOW, || !sleeps());
}

#[test]
fn attach_reaches_a_containers_own_input_and_output_and_leaves_it_running() {
    let namespace = Namespace::new("attach");
    let pilot = Pilot::local(Options::new("attach"), 600);
    attach_works(&Way::default(), &namespace, &pilot);
    // The API server passes the WebSocket on, where the Node says that it takes one.
    let status = api::cluster("nodes").get(&pilot.node).expect("it is there")["status"].clone();
    assert_eq!(status["declaredFeatures"], json!(["ExtendWebSocketsToKubelet"]), "{status}");
    let output = pilot.output();
    assert_eq!(joined(&output, "attach", "WebSocket", "v5.channel.k8s.io"), 2, "{output}");
}

/// How many sessions of this kind came that way.
pub fn joined(output: &str, action: &str, transport: &str, protocol: &str) -> usize {
    let fields = [
        "a user joins a container".to_owned(),
        format!("action=\"{action}\""),
        format!("transport=\"{transport}\""),
        format!("protocol=\"{protocol}\""),
    ];
    output.lines().filter(|line| fields.iter().all(|field| line.contains(field))).count()
}

/// Two clients see what a container writes and give it input, which ends with neither of them.
pub fn attach_works(way: &Way, namespace: &Namespace, pilot: &Pilot) {
    let script = "while read -r line; do echo \"got $line\"; echo \"error $line\" >&2; [ $line != quit ] || exit 0; done\n";
    namespace.config_map("attached", &[("run.sh", script)]);
    let mut with = container("c1", "attached");
    with["stdin"] = json!(true);
    namespace.pod_on(pilot, "attached", pod_spec("Never", &[with]));
    namespace.wait_phase("attached", "Running", seconds(30));
    let attach = || Kubectl::start(way.kubectl(&namespace.name).args(["attach", "-i", "attached"]));
    let mut first = attach();
    first.say("one\n");
    first.wait_text("got one\n", SLOW);
    wait_until("the other output", SLOW, || first.errors().contains("error one\n"));
    // Its input ends with it; that of the container does not.
    first.close_input();
    let mut second = attach();
    second.say("two\n");
    second.wait_text("got two\n", SLOW);
    // Whoever is attached sees what comes, whoever asked for it.
    first.wait_text("got two\n", SLOW);
    drop(first);
    second.say("quit\n");
    let ended = second.wait_end(SLOW);
    assert_eq!(ended.code, 0, "{}", ended.said());
    assert!(ended.text().ends_with("got quit\n"), "{}", ended.text());
    namespace.wait_phase("attached", "Succeeded", seconds(30));
    let logged = Kubectl::run(way.kubectl(&namespace.name).args(["logs", "attached"]), SLOW);
    let outputs: Vec<_> =
        logged.text().lines().filter(|line| line.starts_with("got")).map(str::to_owned).collect();
    assert_eq!(outputs, ["got one", "got two", "got quit"]);
}

#[test]
fn attach_reaches_a_containers_own_terminal() {
    let namespace = Namespace::new("attach-tty");
    let pilot = Pilot::local(Options::new("attach-tty"), 600);
    namespace.config_map("p", &[("run.sh", "exec bash --norc -i\n")]);
    let mut with = container("c1", "p");
    with["stdin"] = json!(true);
    with["tty"] = json!(true);
    namespace.pod_on(&pilot, "p", pod_spec("Never", &[with]));
    namespace.wait_phase("p", "Running", seconds(30));
    let mut terminal = Terminal::start(&Way::default(), &namespace.name, &["attach", "-it", "p"], (101, 33));
    terminal.kubectl.say("echo $((6 * 7)); tty\n");
    terminal.kubectl.wait_text("42\r\n", SLOW);
    terminal.kubectl.wait_text("/dev/pts/", SLOW);
    wait_until("the size arrives", SLOW, || {
        terminal.kubectl.say("stty size\n");
        terminal.kubectl.text().contains("33 101\r\n")
    });
    terminal.resize(120, 44);
    wait_until("the new size arrives", SLOW, || {
        terminal.kubectl.say("stty size\n");
        terminal.kubectl.text().contains("44 120\r\n")
    });
    terminal.kubectl.say("exit 0\n");
    let ended = terminal.kubectl.wait_end(SLOW);
    assert_eq!(ended.code, 0, "{}", ended.said());
    namespace.wait_phase("p", "Succeeded", seconds(30));
}

#[test]
fn run_with_input_gives_its_input_to_the_pod_and_shows_what_that_says() {
    let namespace = Namespace::new("run");
    let pilot = Pilot::local(Options::new("run"), 600);
    namespace.config_map("p", &[("run.sh", "while read -r line; do echo \"got $line\"; done; exit 5\n")]);
    let mut spec = pod_spec("Never", &[container("p", "p")]);
    pilot.place(&mut spec);
    let overrides = format!("--overrides={}", json!({"apiVersion": "v1", "spec": spec}));
    let mut command = bed().kubectl_within(&namespace.name, 120);
    command.args(["run", "p", "-i", "--rm", "--restart=Never", "--image=p", "--pod-running-timeout=60s"]);
    command.args(["--override-type=strategic", &overrides]);
    let ended = Kubectl::run_with(&mut command, b"one\ntwo\n", LONG);
    assert_eq!(ended.code, 5, "{}", ended.said());
    assert!(ended.text().contains("got one\ngot two\n"), "{}", ended.said());
    namespace.wait_gone("p", seconds(30));
}

#[test]
fn after_a_crash_of_the_pilot_logs_and_exec_reach_the_containers_that_went_on() {
    let namespace = Namespace::new("crash-exec");
    let pilot = Pilot::local(Options::new("crash-exec"), 600);
    let go = pilot.home.join("go");
    namespace.script_on(&pilot, "p", &format!("echo before\n{}echo after\nsleep 3600\n", until(&go)));
    namespace.wait_phase("p", "Running", seconds(30));
    assert_eq!(exec(&namespace, &["p"], &["true"]).code, 0);
    let [first] = pilot.stages("pilot")[..] else { panic!("one pilot was expected") };
    kill(Pid::from_raw(first), Signal::SIGKILL).unwrap();
    wait_until("exec works again", SLOW, || {
        let ended = exec(&namespace, &["p"], &["sh", "-c", "echo joined; exit 9"]);
        (ended.code, ended.text().as_str()) == (9, "joined\n")
    });
    assert_ne!(pilot.stages("pilot"), [first]);
    let mut follower = Kubectl::start(bed().kubectl_within(&namespace.name, 120).args(["logs", "-f", "p"]));
    follower.wait_text("before\n", SLOW);
    std::fs::write(go, "").unwrap();
    follower.wait_text("before\nafter\n", SLOW);
    assert_eq!(namespace.pod("p").unwrap()["status"]["containerStatuses"][0]["restartCount"], 0);
}
