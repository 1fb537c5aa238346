//! Programs that join a container, and clients of its input and output: the real binary's supervisors.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use jiriaf_pilot::container::{
    ContainerId, ContainerSpec, Event, ExecStdio, LogLimits, MARK, Session, StartError, Stdio, Supervisor,
    Supervisors, process, terminal,
};

const SOON: Duration = Duration::from_secs(20);

struct Bed {
    dir: tempfile::TempDir,
    mark: String,
    /// Variables of the container's.
    env: Vec<(String, String)>,
}

impl Bed {
    fn new(name: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("c")).unwrap();
        let env = vec![("PATH".into(), std::env::var("PATH").unwrap())];
        Self { dir, mark: format!("sessions-{name}-{}", std::process::id()), env }
    }

    /// In a job of PBS whose pbs_attach notes how it was called, with the session of the process that it was given, and
    /// then does this.
    fn on_pbs(mut self, then: &str) -> Self {
        use std::os::unix::fs::PermissionsExt as _;
        let bin = self.dir.path().join("bin");
        std::fs::create_dir(&bin).unwrap();
        let calls = self.dir.path().join("calls");
        let script = format!(
            "#!/bin/sh\necho \"$*\" in session $(ps -o sid= -p \"$4\") >> {}\n{then}\n",
            calls.display()
        );
        std::fs::write(bin.join("pbs_attach"), script).unwrap();
        std::fs::set_permissions(bin.join("pbs_attach"), std::fs::Permissions::from_mode(0o755)).unwrap();
        self.env = vec![
            ("PATH".into(), format!("{}:{}", bin.display(), std::env::var("PATH").unwrap())),
            ("PBS_JOBID".into(), "123.pbs".into()),
            ("CALLS".into(), calls.display().to_string()),
        ];
        self
    }

    /// How pbs_attach was called.
    fn calls(&self) -> Vec<String> {
        let text = std::fs::read_to_string(self.dir.path().join("calls")).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }

    async fn start(&self, script: &str, stdio: Stdio, session: Session) -> Supervisor {
        let here = self.dir.path().join("c");
        let spec = ContainerSpec {
            argv: vec!["bash".into(), "-c".into(), script.into()],
            env: [
                self.env.clone(),
                vec![("INSIDE".into(), "yes".into()), (MARK.into(), format!("{}/x", self.mark))],
            ]
            .concat(),
            working_dir: here.clone(),
            log: here.join("logs/0.log"),
            container_dir: here,
            log_limits: LogLimits::default(),
            session,
            oom_score_adj: None,
            open_files: None,
            stop_signal: None,
            no_new_privs: false,
            cpus: Vec::new(),
            cgroup: None,
            orphan_timeout: SOON,
            drain_at: None,
            grace: Duration::from_millis(100),
            forward_output: false,
            stdio,
            view: None,
        };
        let binary = PathBuf::from(env!("CARGO_BIN_EXE_jiriaf-pilot"));
        let all = Supervisors::new(&self.dir.path().join("state"), self.mark.clone()).unwrap();
        let id = ContainerId { pod_uid: "0a-1".into(), name: "c1".into(), restart: 0 };
        let mut supervisor = all.with_executable(binary).spawn(id).unwrap();
        supervisor.start(spec).await;
        assert!(matches!(next(&mut supervisor).await, Event::Started { .. }));
        supervisor
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("c/logs/0.log")).unwrap_or_default()
    }

    fn left(&self) -> Vec<String> {
        let marked = |pid: &i32| {
            process::variable(*pid, MARK).is_some_and(|mark| mark.starts_with(&format!("{}/", self.mark)))
        };
        let alive = |pid: &i32| process::stat(*pid).is_some_and(|stat| stat.state != 'Z');
        process::all().into_iter().filter(marked).filter(alive).map(process::describe).collect()
    }
}

async fn next(supervisor: &mut Supervisor) -> Event {
    tokio::time::timeout(SOON, supervisor.next()).await.expect("an event in time")
}

/// Ends the container; a supervisor whose end nobody acknowledges waits for a pilot.
async fn finish(mut supervisor: Supervisor) {
    supervisor.terminate(Duration::ZERO).await;
    while !matches!(next(&mut supervisor).await, Event::Ended(_)) {}
    supervisor.acknowledge().await;
}

async fn ended_with(mut supervisor: Supervisor, code: i32) {
    let end = next(&mut supervisor).await;
    assert!(matches!(&end, Event::Ended(end) if end.exit_code == code && end.log_lines_lost == 0), "{end:?}");
    supervisor.acknowledge().await;
}

fn words(text: &[&str]) -> Vec<String> {
    text.iter().map(|word| (*word).to_owned()).collect()
}

fn null() -> OwnedFd {
    OwnedFd::from(File::options().read(true).write(true).open("/dev/null").unwrap())
}

fn pipe() -> (File, OwnedFd) {
    let (read, write) = std::io::pipe().unwrap();
    (File::from(OwnedFd::from(read)), write.into())
}

#[tokio::test]
async fn a_program_runs_in_the_containers_surroundings() {
    let bed = Bed::new("surroundings");
    let mut supervisor = bed.start("sleep 600", Stdio::Null, Session::Own).await;
    let (their_input, mut input) = {
        let (read, write) = std::io::pipe().unwrap();
        (OwnedFd::from(read), File::from(OwnedFd::from(write)))
    };
    let (mut stdout, theirs) = pipe();
    let (mut stderr, their_errors) = pipe();
    let script = "echo $INSIDE; pwd; cat; echo oops >&2; exit 7";
    let stdio = ExecStdio::Pipes([their_input, theirs, their_errors]);
    supervisor.exec(5, words(&["sh", "-c", script]), stdio).await;
    input.write_all(b"typed\n").unwrap();
    drop(input);
    assert_eq!(next(&mut supervisor).await, Event::ExecEnded { id: 5, exit_code: 7 });
    let (mut out, mut errors) = (String::new(), String::new());
    stdout.read_to_string(&mut out).unwrap();
    stderr.read_to_string(&mut errors).unwrap();
    assert_eq!(out, format!("yes\n{}\ntyped\n", bed.dir.path().join("c").display()));
    assert_eq!(errors, "oops\n");
    // Neither its log nor its process group is the container's.
    assert_eq!(bed.log(), "");
    finish(supervisor).await;
}

#[tokio::test]
async fn what_a_program_leaves_behind_ends_with_the_container() {
    let bed = Bed::new("left");
    let mut supervisor = bed.start("sleep 600", Stdio::Null, Session::Own).await;
    let script = "setsid sleep 600 </dev/null >/dev/null 2>&1 & exit 0";
    let pipes = || ExecStdio::Pipes([null(), null(), null()]);
    supervisor.exec(1, words(&["bash", "-c", script]), pipes()).await;
    assert_eq!(next(&mut supervisor).await, Event::ExecEnded { id: 1, exit_code: 0 });
    supervisor.exec(2, words(&["sleep", "600"]), pipes()).await;
    while bed.left().len() < 3 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    supervisor.terminate(Duration::from_millis(50)).await;
    assert_eq!(next(&mut supervisor).await, Event::ExecEnded { id: 2, exit_code: 137 });
    assert!(matches!(next(&mut supervisor).await, Event::Ended(_)));
    supervisor.acknowledge().await;
    assert_eq!(bed.left(), Vec::<String>::new());
}

#[tokio::test]
async fn a_program_that_is_not_there_is_named_and_a_signal_ends_one() {
    let bed = Bed::new("missing");
    let mut supervisor = bed.start("sleep 600", Stdio::Null, Session::Own).await;
    let pipes = || ExecStdio::Pipes([null(), null(), null()]);
    supervisor.exec(1, words(&["no-such-program"]), pipes()).await;
    let error = StartError::NotFound { program: "no-such-program".into() };
    assert_eq!(next(&mut supervisor).await, Event::ExecFailed { id: 1, error });
    supervisor.exec(2, words(&["sleep", "600"]), pipes()).await;
    // Before its exec the third stage has its own way with signals.
    while !bed.left().iter().any(|process| process.contains("sleep")) || bed.left().len() < 2 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    supervisor.signal_exec(2, nix::sys::signal::Signal::SIGHUP).await;
    assert_eq!(next(&mut supervisor).await, Event::ExecEnded { id: 2, exit_code: 129 });
    finish(supervisor).await;
}

async fn terminal_in(session: Session) {
    let bed = Bed::new("terminal");
    let mut supervisor = bed.start("sleep 600", Stdio::Null, session).await;
    let (ours, theirs) = terminal::open().unwrap();
    terminal::resize(&ours, 101, 33).unwrap();
    let script = "tty; stty size; read line; echo got $line; exit 3";
    supervisor.exec(1, words(&["bash", "-c", script]), ExecStdio::Terminal(theirs)).await;
    let mut ours = File::from(ours);
    ours.write_all(b"hello\n").unwrap();
    assert_eq!(next(&mut supervisor).await, Event::ExecEnded { id: 1, exit_code: 3 });
    let (mut bytes, mut text) = ([0; 512], String::new());
    // The terminal's end is an error (EIO), after all that was written.
    loop {
        match ours.read(&mut bytes) {
            Ok(n) => text += &String::from_utf8_lossy(&bytes[..n]),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            Err(_) => break,
        }
    }
    assert!(text.contains("/dev/pts/") && text.contains("33 101") && text.contains("got hello"), "{text:?}");
    finish(supervisor).await;
}

#[tokio::test]
async fn a_program_has_a_terminal_of_its_own() {
    terminal_in(Session::Own).await;
    terminal_in(Session::Shared).await;
}

async fn read_until(file: &mut File, wanted: &str) -> String {
    let (mut bytes, mut text, end) = ([0; 4096], String::new(), Instant::now() + SOON);
    while !text.contains(wanted) {
        assert!(Instant::now() < end, "{wanted:?} in {text:?}");
        let n = file.read(&mut bytes).unwrap();
        assert!(n > 0, "{wanted:?} in {text:?}");
        text += &String::from_utf8_lossy(&bytes[..n]);
    }
    text
}

#[tokio::test]
async fn who_types_into_a_terminal_that_nobody_reads_is_not_held_up() {
    let bed = Bed::new("typed");
    let mut supervisor = bed.start("sleep 600", Stdio::Null, Session::Own).await;
    let (ours, theirs) = terminal::open().unwrap();
    supervisor.exec(1, words(&["sleep", "600"]), ExecStdio::Terminal(theirs)).await;
    let mut ours = File::from(ours);
    let mut written = 0;
    let refused = loop {
        match ours.write(&b"line\n".repeat(1000)) {
            Ok(n) => written += n,
            Err(error) => break error,
        }
        assert!(written < 100 << 20, "the terminal takes everything");
    };
    assert_eq!(refused.kind(), std::io::ErrorKind::WouldBlock);
    finish(supervisor).await;
}

#[tokio::test]
async fn an_attached_client_gives_input_and_ends_it_once() {
    let bed = Bed::new("attach");
    let mut supervisor = bed.start("cat; exit 4", Stdio::Input { once: true }, Session::Own).await;
    let (their_input, mut input) = {
        let (read, write) = std::io::pipe().unwrap();
        (OwnedFd::from(read), File::from(OwnedFd::from(write)))
    };
    let (mut stdout, theirs) = pipe();
    supervisor.attach(true, [their_input, theirs, null()]).await;
    input.write_all(b"to the container\n").unwrap();
    read_until(&mut stdout, "to the container\n").await;
    drop(input);
    ended_with(supervisor, 4).await;
    // The client learns of the end by that of its output.
    assert_eq!(stdout.read(&mut [0; 16]).unwrap(), 0);
    assert!(bed.log().ends_with("stdout F to the container\n"), "{}", bed.log());
}

#[tokio::test]
async fn a_container_may_be_a_terminal() {
    let bed = Bed::new("tty");
    let stdio = Stdio::Terminal { input: true, once: false };
    let mut supervisor = bed.start("tty; read line; echo got $line; exit 5", stdio, Session::Own).await;
    let (their_input, mut input) = {
        let (read, write) = std::io::pipe().unwrap();
        (OwnedFd::from(read), File::from(OwnedFd::from(write)))
    };
    let (mut stdout, theirs) = pipe();
    supervisor.attach(true, [their_input, theirs, null()]).await;
    input.write_all(b"hi\n").unwrap();
    read_until(&mut stdout, "got hi").await;
    ended_with(supervisor, 5).await;
    assert!(bed.log().contains("/dev/pts/") && bed.log().contains("got hi"), "{}", bed.log());
}

#[tokio::test]
async fn a_client_that_takes_nothing_holds_no_container_up() {
    let bed = Bed::new("slow");
    let script = "for i in $(seq 1 20000); do echo line $i of many; done; exit 0";
    let mut supervisor =
        bed.start(&format!("read go; {script}"), Stdio::Input { once: false }, Session::Own).await;
    let (their_input, mut input) = {
        let (read, write) = std::io::pipe().unwrap();
        (OwnedFd::from(read), File::from(OwnedFd::from(write)))
    };
    let (_never_read, theirs) = pipe();
    supervisor.attach(true, [their_input, theirs, null()]).await;
    input.write_all(b"go\n").unwrap();
    ended_with(supervisor, 0).await;
    assert!(bed.log().contains("line 20000 of many"));
}

/// A program that ends well when the last call of pbs_attach was for itself, as the first process of its session.
const CALLED: &str = r#"test "$(tail -n 1 "$CALLS")" = "-j 123.pbs -p $$ in session $$""#;

async fn runs_in_a_terminal(supervisor: &mut Supervisor, id: u64) {
    let (_ours, theirs) = terminal::open().unwrap();
    supervisor.exec(id, words(&["bash", "-c", CALLED]), ExecStdio::Terminal(theirs)).await;
    assert_eq!(next(supervisor).await, Event::ExecEnded { id, exit_code: 0 });
}

#[tokio::test]
async fn on_pbs_the_session_of_a_terminal_is_made_known_to_the_job_and_no_other_is() {
    // What it says of itself changes nothing.
    for then in ["exit 0", "exit 1"] {
        let bed = Bed::new("pbs").on_pbs(then);
        let mut supervisor = bed.start("sleep 600", Stdio::Null, Session::Shared).await;
        let pipes = ExecStdio::Pipes([null(), null(), null()]);
        supervisor.exec(1, words(&["true"]), pipes).await;
        assert_eq!(next(&mut supervisor).await, Event::ExecEnded { id: 1, exit_code: 0 });
        assert_eq!(bed.calls(), Vec::<String>::new(), "these are in the job's session");
        runs_in_a_terminal(&mut supervisor, 2).await;
        assert_eq!(bed.calls().len(), 1);
        finish(supervisor).await;
    }
}

#[tokio::test]
async fn on_pbs_a_container_that_is_a_terminal_is_made_known_to_the_job() {
    let bed = Bed::new("pbs-tty").on_pbs("exit 0");
    let stdio = Stdio::Terminal { input: false, once: false };
    ended_with(bed.start(CALLED, stdio, Session::Shared).await, 0).await;
    assert_eq!(bed.calls().len(), 1);
}

#[tokio::test]
async fn a_pbs_attach_that_hangs_is_ended_and_the_terminal_comes_all_the_same() {
    let bed = Bed::new("pbs-hangs").on_pbs("exec sleep 599");
    let mut supervisor = bed.start("sleep 600", Stdio::Null, Session::Shared).await;
    runs_in_a_terminal(&mut supervisor, 1).await;
    let own = format!("{}/", bed.dir.path().display());
    let hanging = |pid: &i32| {
        process::variable(*pid, "PATH").is_some_and(|path| path.starts_with(&own))
            && process::describe(*pid).contains("sleep 599")
    };
    assert_eq!(process::all().into_iter().filter(hanging).count(), 0);
    finish(supervisor).await;
}

#[tokio::test]
async fn without_pbs_attach_a_terminal_comes_too() {
    let mut bed = Bed::new("pbs-none");
    bed.env.push(("PBS_JOBID".into(), "123.pbs".into()));
    let mut supervisor = bed.start("sleep 600", Stdio::Null, Session::Shared).await;
    let (_ours, theirs) = terminal::open().unwrap();
    supervisor.exec(1, words(&["true"]), ExecStdio::Terminal(theirs)).await;
    assert_eq!(next(&mut supervisor).await, Event::ExecEnded { id: 1, exit_code: 0 });
    finish(supervisor).await;
}

/// All that comes until its end, which must come soon: where it does not, a read would wait for ever.
fn all_of(mut file: File) -> String {
    let (sender, all) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let mut text = String::new();
        let read = file.read_to_string(&mut text);
        let _ = sender.send(read.map(|_| text));
    });
    all.recv_timeout(SOON).expect("an end in time").unwrap()
}

#[tokio::test]
async fn sixty_four_clients_may_be_attached_and_one_more_is_told_so() {
    let bed = Bed::new("crowd");
    let mut supervisor =
        bed.start("read go; echo $go; exit 0", Stdio::Input { once: false }, Session::Own).await;
    let (their_input, mut input) = {
        let (read, write) = std::io::pipe().unwrap();
        (OwnedFd::from(read), File::from(OwnedFd::from(write)))
    };
    let mut their_input = Some(their_input);
    let mut clients = Vec::new();
    for _ in 0..64 {
        let ((stdout, theirs), (stderr, their_errors)) = (pipe(), pipe());
        let stdin = their_input.take();
        supervisor.attach(stdin.is_some(), [stdin.unwrap_or_else(null), theirs, their_errors]).await;
        clients.push((stdout, stderr));
    }
    let ((stdout, theirs), (stderr, their_errors)) = (pipe(), pipe());
    supervisor.attach(false, [null(), theirs, their_errors]).await;
    assert_eq!(all_of(stderr), "jiriaf-pilot: 64 clients are attached to this container already\n");
    assert_eq!(all_of(stdout), "");
    // Who leaves makes room, also at a container that says nothing.
    drop(clients.pop());
    let ((stdout, theirs), (stderr, their_errors)) = (pipe(), pipe());
    supervisor.attach(false, [null(), theirs, their_errors]).await;
    clients.push((stdout, stderr));
    input.write_all(b"on\n").unwrap();
    ended_with(supervisor, 0).await;
    for (stdout, _) in clients {
        assert_eq!(all_of(stdout), "on\n");
    }
}
