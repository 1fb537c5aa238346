//! Containers, by what they do: the real binary's supervisors, driven as the pilot drives them.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant, SystemTime};

use jiriaf_pilot::container::{
    ContainerId, ContainerSpec, End, Event, LogLimits, MARK, Session, StartError, Stdio, Supervisor,
    Supervisors, process,
};
use nix::fcntl::{FcntlArg, FdFlag};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const SOON: Duration = Duration::from_secs(20);

struct Bed {
    dir: tempfile::TempDir,
    all: Supervisors,
    mark: String,
}

impl Bed {
    fn new(name: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mark = format!("test-{name}-{}", std::process::id());
        let all = Self::supervisors(dir.path(), &mark);
        fs::create_dir(dir.path().join("c")).unwrap();
        Self { dir, all, mark }
    }

    fn supervisors(dir: &Path, mark: &str) -> Supervisors {
        Supervisors::new(&dir.join("state"), mark.to_owned()).unwrap().with_executable(
            std::env::var_os("TEST_BINARY")
                .map_or_else(|| PathBuf::from(env!("CARGO_BIN_EXE_jiriaf-pilot")), PathBuf::from),
        )
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join("c").join(name)
    }

    fn spec(&self, script: &str) -> ContainerSpec {
        ContainerSpec {
            argv: vec!["bash".into(), "-c".into(), script.into()],
            env: vec![
                ("PATH".into(), std::env::var("PATH").unwrap()),
                (MARK.into(), format!("{}/{}", self.mark, id(0))),
            ],
            working_dir: self.path(""),
            container_dir: self.path(""),
            log: self.path("logs/0.log"),
            log_limits: LogLimits::default(),
            session: Session::Own,
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
            stdio: Stdio::Null,
            view: None,
        }
    }

    async fn start(&self, spec: &ContainerSpec) -> Supervisor {
        let mut supervisor = self.all.spawn(id(0)).unwrap();
        supervisor.start(spec.clone()).await;
        supervisor
    }

    fn log(&self) -> String {
        fs::read_to_string(self.path("logs/0.log")).unwrap_or_default()
    }

    /// The log's lines of one stream, without time stamps.
    fn lines(&self) -> Vec<String> {
        self.log().lines().map(|l| l.splitn(4, ' ').nth(3).unwrap().to_owned()).collect()
    }

    /// The processes that carry the mark.
    fn left(&self) -> Vec<String> {
        let marked = |pid: &i32| {
            process::variable(*pid, MARK).is_some_and(|mark| mark.starts_with(&format!("{}/", self.mark)))
        };
        let alive = |pid: &i32| process::stat(*pid).is_some_and(|stat| stat.state != 'Z');
        process::all().into_iter().filter(marked).filter(alive).map(process::describe).collect()
    }
}

fn id(restart: u32) -> ContainerId {
    ContainerId { pod_uid: "0a-1".into(), name: "c1".into(), restart }
}

async fn next(supervisor: &mut Supervisor) -> Event {
    tokio::time::timeout(SOON, supervisor.next()).await.expect("an event in time")
}

async fn started(supervisor: &mut Supervisor) -> i32 {
    match next(supervisor).await {
        Event::Started { pid, .. } => pid,
        other => panic!("{other:?}"),
    }
}

async fn ended(supervisor: &mut Supervisor) -> End {
    match next(supervisor).await {
        Event::Ended(end) => end,
        other => panic!("{other:?}"),
    }
}

async fn run(bed: &Bed, spec: &ContainerSpec) -> End {
    let mut supervisor = bed.start(spec).await;
    started(&mut supervisor).await;
    let end = ended(&mut supervisor).await;
    supervisor.acknowledge().await;
    end
}

async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !holds() {
        assert!(begin.elapsed() < SOON, "{what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

#[tokio::test]
async fn exit_codes_are_the_first_processes_own() {
    for (script, code, signal) in [
        ("exit 0", 0, None),
        ("exit 7", 7, None),
        ("exit 255", 255, None),
        ("kill -9 $$", 137, Some(9)),
        ("kill -TERM $$", 143, Some(15)),
        ("echo oops >&2", 0, None),
        ("(sleep 0.05; exit 3) & exit 4", 4, None),
    ] {
        let bed = Bed::new("codes");
        let before = SystemTime::now();
        let end = run(&bed, &bed.spec(script)).await;
        assert_eq!((end.exit_code, end.signal), (code, signal), "{script}");
        assert!(before <= end.started_at && end.started_at <= end.finished_at, "{end:?}");
        assert_eq!(end.survivors, Vec::<String>::new());
        assert_eq!(fs::read_dir(bed.dir.path().join("state")).unwrap().count(), 0, "its state is gone");
    }
}

#[tokio::test]
async fn what_cannot_be_executed_is_named() {
    let bed = Bed::new("refused");
    let write = |name: &str, text: &str, mode: u32| {
        jiriaf_pilot::files::write_atomic(&bed.path(name), text.as_bytes(), mode).unwrap();
    };
    write("plain", "echo\n", 0o755);
    write("closed", "#!/bin/sh\n", 0o644);
    write("dos", "#!/bin/sh\r\necho\n", 0o755);
    for (program, code, words) in [
        ("no-such-program", 127, "not found"),
        ("./none", 127, "not found"),
        ("./plain", 126, "#!/bin/bash"),
        ("./closed", 126, "executable"),
        ("./dos", 127, "carriage returns"),
        ("", 127, "not found"),
    ] {
        let mut spec = bed.spec("");
        spec.argv = vec![program.into()];
        let mut supervisor = bed.start(&spec).await;
        let Event::StartFailed(error) = next(&mut supervisor).await else { panic!("{program} started") };
        assert_eq!(error.exit_code(), code, "{program}: {error}");
        let text = error.to_string();
        assert!(text.contains(program) && text.contains(words), "{program}: {text}");
        supervisor.acknowledge().await;
    }
    let mut spec = bed.spec("true");
    spec.working_dir = bed.path("nowhere");
    let mut supervisor = bed.start(&spec).await;
    let event = next(&mut supervisor).await;
    assert!(matches!(event, Event::StartFailed(StartError::WorkingDirectory { .. })), "{event:?}");
    supervisor.acknowledge().await;
}

#[tokio::test]
async fn a_script_that_daemonizes_leaves_nothing() {
    let bed = Bed::new("daemon");
    let script = "setsid bash -c '(exec <&- >&- 2>&-; env -i setsid sleep 4242 & env -i nohup sleep 4242 &) &' & sleep 0.2; pgrep -c -x -f 'sleep 4242'; exit 5";
    let end = run(&bed, &bed.spec(script)).await;
    assert_eq!(end.exit_code, 5);
    assert_eq!(bed.lines(), ["2"], "both daemons ran");
    // Without the mark in their environment: by name.
    assert!(!Command::new("pgrep").args(["-x", "-f", "sleep 4242"]).status().unwrap().success());
    assert_eq!(end.survivors, Vec::<String>::new());
    assert_eq!(bed.left(), Vec::<String>::new());
}

#[tokio::test]
async fn a_trap_on_sigterm_runs_within_the_grace() {
    let bed = Bed::new("trap");
    let spec =
        bed.spec("trap 'sleep 0.3; echo trapped; exit 9' TERM; echo ready; while :; do sleep 1000; done");
    let mut supervisor = bed.start(&spec).await;
    started(&mut supervisor).await;
    until("ready", || bed.log().contains("ready")).await;
    supervisor.terminate(Duration::from_secs(10)).await;
    supervisor.terminate(Duration::from_secs(10)).await;
    let end = ended(&mut supervisor).await;
    assert_eq!(end.exit_code, 9);
    assert_eq!(bed.lines().iter().filter(|l| *l == "trapped").count(), 1, "{}", bed.log());
    supervisor.acknowledge().await;
}

#[tokio::test]
async fn a_container_is_asked_to_end_by_the_signal_that_it_names() {
    let bed = Bed::new("signal");
    let usr1 = Some(nix::sys::signal::Signal::SIGUSR1 as i32);
    let script = "trap '' TERM; trap 'exit 6' USR1; echo ready; while :; do sleep 0.02; done";
    let spec = ContainerSpec { stop_signal: usr1, ..bed.spec(script) };
    let mut supervisor = bed.start(&spec).await;
    started(&mut supervisor).await;
    until("ready", || bed.log().contains("ready")).await;
    supervisor.terminate(SOON).await;
    assert_eq!(ended(&mut supervisor).await.exit_code, 6);
    supervisor.acknowledge().await;
}

#[tokio::test]
async fn a_container_that_ignores_sigterm_is_gone_at_the_graces_end() {
    let bed = Bed::new("deaf");
    let spec = bed.spec("trap '' TERM; setsid sleep 1000 & echo ready; while :; do sleep 1; done");
    let mut supervisor = bed.start(&spec).await;
    started(&mut supervisor).await;
    until("ready", || bed.log().contains("ready")).await;
    let begin = Instant::now();
    supervisor.terminate(Duration::from_secs(100)).await;
    supervisor.terminate(Duration::from_millis(500)).await;
    let end = ended(&mut supervisor).await;
    let took = begin.elapsed();
    assert!(took >= Duration::from_millis(490) && took < Duration::from_millis(900), "{took:?}");
    assert_eq!((end.exit_code, end.signal), (137, Some(9)));
    assert_eq!(bed.left(), Vec::<String>::new());
    supervisor.acknowledge().await;
}

#[tokio::test]
async fn output_is_complete_and_in_order() {
    let bed = Bed::new("output");
    let mut spec = bed.spec("for i in {1..300}; do echo line $i; done; head -c 5000000 /dev/zero | tr '\\0' x | fold -w 99; echo; printf end");
    spec.log_limits.bytes = 100 << 20;
    let end = run(&bed, &spec).await;
    assert_eq!((end.log_lines_lost, end.log_error), (0, None));
    let lines = bed.lines();
    for n in 1..=300 {
        assert_eq!(lines[n - 1], format!("line {n}"));
    }
    assert_eq!(lines.iter().map(|l| l.bytes().filter(|b| *b == b'x').count()).sum::<usize>(), 5_000_000);
    assert_eq!(lines.last().map(String::as_str), Some("end"));
}

#[tokio::test]
async fn a_container_starts_in_order() {
    use std::os::unix::fs::PermissionsExt;
    let bed = Bed::new("order");
    let spec = bed.spec(
        "echo $(cat pgid) $$ $(ps -o pgid= -o sid= $$); readlink /proc/self/fd/0; grep SigIgn /proc/self/status; grep SigBlk /proc/self/status; umask; ls /proc/self/fd | wc -l; echo $JIRIAF_CONTAINER",
    );
    // As a batch system or a shell leaves one open.
    let inherited = fs::File::open("/dev/zero").unwrap();
    nix::fcntl::fcntl(&inherited, FcntlArg::F_SETFD(FdFlag::empty())).unwrap();
    run(&bed, &spec).await;
    drop(inherited);
    let lines = bed.lines();
    let ids: Vec<&str> = lines[0].split_whitespace().collect();
    assert!(ids.len() == 4 && ids.iter().all(|i| *i == ids[0]), "{ids:?}");
    assert_eq!(lines[1], "/dev/null");
    // 32 and 33 are the C library's own: it lets nobody change them.
    let ignored = u64::from_str_radix(lines[2].split_whitespace().nth(1).unwrap(), 16).unwrap();
    assert_eq!(ignored & !(0b11 << 31), 0, "{}", lines[2]);
    assert!(lines[3].ends_with("0000000000000000"), "{}", lines[3]);
    assert_eq!(lines[4], "0022");
    assert_eq!(lines[5], "4", "no descriptor of ours: 0, 1, 2 and the directory that ls reads");
    assert_eq!(lines[6], format!("{}/{}", bed.mark, id(0)));
    let mode = |name: &str| fs::metadata(bed.path(name)).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode("pgid"), mode("logs"), mode("logs/0.log")), (0o644, 0o700, 0o600));
}

#[tokio::test]
async fn a_dead_supervisor_is_told_and_its_container_is_ended() {
    let bed = Bed::new("lost");
    let mut supervisor = bed.start(&bed.spec("setsid sleep 1000 & echo ready; wait")).await;
    started(&mut supervisor).await;
    until("ready", || bed.log().contains("ready")).await;
    kill(Pid::from_raw(supervisor.pid()), Signal::SIGKILL).unwrap();
    let Event::Lost { message } = next(&mut supervisor).await else { panic!("not lost") };
    assert!(message.contains("SIGKILL"), "{message}");
    assert_eq!(bed.left(), Vec::<String>::new());
    supervisor.acknowledge().await;
    bed.all.spawn(id(0)).expect("the place is free again");
}

#[tokio::test]
async fn a_supervisor_survives_the_signals_of_a_batch_system() {
    let bed = Bed::new("signals");
    let mut supervisor = bed.start(&bed.spec("sleep 0.3; exit 6")).await;
    started(&mut supervisor).await;
    for signal in [
        Signal::SIGTERM,
        Signal::SIGINT,
        Signal::SIGHUP,
        Signal::SIGUSR1,
        Signal::SIGUSR2,
        Signal::SIGQUIT,
        Signal::SIGPIPE,
    ] {
        kill(Pid::from_raw(supervisor.pid()), signal).unwrap();
    }
    assert_eq!(ended(&mut supervisor).await.exit_code, 6);
    supervisor.acknowledge().await;
}

#[tokio::test]
async fn a_new_pilot_finds_what_runs_and_what_ended_meanwhile() {
    let bed = Bed::new("found");
    let mut one = bed.start(&bed.spec("sleep 0.2; exit 8")).await;
    started(&mut one).await;
    let mut two = bed.all.spawn(id(1)).unwrap();
    two.start(bed.spec("sleep 1000")).await;
    let pid = started(&mut two).await;
    let waiting = bed.all.spawn(id(2)).unwrap();
    drop((one, two, waiting));
    tokio::time::sleep(Duration::from_millis(500)).await;

    let all = Bed::supervisors(bed.dir.path(), &bed.mark);
    let mut found = all.find().await.unwrap();
    found.sort_by(|a, b| a.0.cmp(&b.0));
    assert_eq!(found.iter().map(|f| f.0.restart).collect::<Vec<_>>(), [0, 1]);
    let (_, mut two) = found.pop().unwrap();
    let (_, mut one) = found.pop().unwrap();
    started(&mut one).await;
    assert_eq!(ended(&mut one).await.exit_code, 8);
    one.acknowledge().await;
    assert_eq!(started(&mut two).await, pid);
    two.terminate(Duration::ZERO).await;
    assert!(ended(&mut two).await.signal.is_some());
    two.acknowledge().await;
    assert_eq!(fs::read_dir(bed.dir.path().join("state")).unwrap().count(), 0);
}

#[tokio::test]
async fn a_supervisor_that_died_unseen_leaves_nothing_to_be_found() {
    let bed = Bed::new("unseen");
    let mut dead = bed.start(&bed.spec("setsid sleep 1000 & echo ready; wait")).await;
    started(&mut dead).await;
    until("ready", || bed.log().contains("ready")).await;
    // One that lives and answers nobody.
    let mut deaf = bed.all.spawn(id(1)).unwrap();
    deaf.start(bed.spec("sleep 1000")).await;
    started(&mut deaf).await;
    fs::remove_file(bed.dir.path().join("state").join(id(1).directory_name()).join("s")).unwrap();
    kill(Pid::from_raw(dead.pid()), Signal::SIGKILL).unwrap();
    let gone = |pid: i32| process::stat(pid).is_none_or(|stat| stat.state == 'Z');
    until("dead", || gone(dead.pid())).await;

    let all = Bed::supervisors(bed.dir.path(), &bed.mark);
    assert_eq!(all.find().await.unwrap().len(), 0);
    assert_eq!(bed.left(), Vec::<String>::new());
    until("the deaf one is gone", || gone(deaf.pid())).await;
    assert_eq!(fs::read_dir(bed.dir.path().join("state")).unwrap().count(), 0);
}

#[tokio::test]
async fn without_a_pilot_a_container_ends_by_itself() {
    for (orphan, drain) in [(Duration::from_millis(200), None), (SOON, Some(Duration::from_millis(200)))] {
        let bed = Bed::new("orphan");
        let mut spec = bed.spec("echo ready; sleep 1000");
        spec.orphan_timeout = orphan;
        spec.drain_at = drain.map(|d| SystemTime::now() + d);
        let mut supervisor = bed.start(&spec).await;
        started(&mut supervisor).await;
        drop(supervisor);
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert!(!bed.left().is_empty());
        until("ended", || bed.left().is_empty()).await;
        // How it ended is kept for a pilot that comes back.
        let (_, mut found) = bed.all.find().await.unwrap().pop().expect("the supervisor keeps the end");
        started(&mut found).await;
        assert!(ended(&mut found).await.signal.is_some());
        found.acknowledge().await;
    }
}

#[tokio::test]
async fn a_log_that_cannot_be_written_is_counted_and_holds_nothing_up() {
    let bed = Bed::new("full");
    let mut spec = bed.spec("for i in {1..1000}; do echo line $i; done; exit 3");
    spec.log = PathBuf::from("/dev/full");
    let end = run(&bed, &spec).await;
    assert_eq!((end.exit_code, end.log_lines_lost), (3, 1000));
    assert!(end.log_error.unwrap().contains("No space left"));

    // A file system that hangs: a pipe that nobody reads.
    let bed = Bed::new("hung");
    let pipe = bed.path("pipe");
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let _reader = fs::OpenOptions::new().read(true).write(true).open(&pipe).unwrap();
    let mut spec = bed.spec("yes | head -n 200000; exit 4");
    spec.log = pipe;
    let begin = Instant::now();
    let end = run(&bed, &spec).await;
    assert_eq!(end.exit_code, 4);
    assert!(end.log_lines_lost > 100_000, "{end:?}");
    assert!(end.log_error.is_some());
    assert!(begin.elapsed() < Duration::from_secs(8), "{:?}", begin.elapsed());
}

#[tokio::test]
async fn output_can_be_had_as_events() {
    let bed = Bed::new("forward");
    let mut spec = bed.spec("for i in {1..20000}; do echo line $i; done; echo err >&2; exit 2");
    spec.forward_output = true;
    let mut supervisor = bed.start(&spec).await;
    started(&mut supervisor).await;
    let mut lines = Vec::new();
    let end = loop {
        match next(&mut supervisor).await {
            Event::Output { line, .. } => lines.push(line),
            Event::Ended(end) => break end,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(end.exit_code, 2);
    assert_eq!(lines.len(), 20001);
    lines.retain(|l| l != "err");
    assert_eq!(lines[19999], "line 20000");
    supervisor.acknowledge().await;
}

#[tokio::test]
async fn strays_are_ended_and_own_children_are_not() {
    let bed = Bed::new("strays");
    let mut supervisor = bed.start(&bed.spec("sleep 1000")).await;
    started(&mut supervisor).await;
    // Other tests' supervisors are children of this process too: only one is nobody's.
    let mut stray = Command::new("sleep").arg("1000").env(MARK, format!("{}/x", bed.mark)).spawn().unwrap();
    let pid = stray.id().cast_signed();
    // A supervisor that is let go makes the reaper look.
    drop(bed.all.spawn(id(1)).unwrap());
    let reaper = bed.all.reap_strays(|child| child != pid);
    let _ = tokio::time::timeout(Duration::from_millis(100), reaper).await;
    assert!(process::stat(pid).is_none_or(|stat| stat.state == 'Z'));
    let _ = stray.wait();
    supervisor.terminate(Duration::ZERO).await;
    assert!(ended(&mut supervisor).await.signal.is_some());
    supervisor.acknowledge().await;
}

/// A container whose third stage hangs at writing `pgid`, as it would on a file server that does not answer.
async fn hanging(bed: &Bed) -> Supervisor {
    assert!(Command::new("mkfifo").arg(bed.path("pgid")).status().unwrap().success());
    bed.start(&bed.spec("sleep 1000")).await
}

#[tokio::test]
async fn a_third_stage_that_hangs_is_killed_at_the_graces_end() {
    let bed = Bed::new("hang");
    let mut supervisor = hanging(&bed).await;
    let begin = Instant::now();
    supervisor.terminate(Duration::from_millis(300)).await;
    let end = loop {
        if let Event::Ended(end) = next(&mut supervisor).await {
            break end;
        }
    };
    let took = begin.elapsed();
    assert!(took >= Duration::from_millis(290) && took < Duration::from_millis(2000), "{took:?}");
    assert_eq!((end.exit_code, end.signal), (137, Some(9)));
    supervisor.acknowledge().await;
}

#[tokio::test]
async fn a_sigterm_before_the_program_began_reaches_the_program() {
    let bed = Bed::new("early");
    let mut supervisor = hanging(&bed).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    supervisor.terminate(SOON).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(!process::children(supervisor.pid()).is_empty(), "it was not ended");
    assert!(!fs::read_to_string(bed.path("pgid")).unwrap().is_empty(), "the third stage goes on");
    started(&mut supervisor).await;
    assert_eq!(ended(&mut supervisor).await.signal, Some(15));
    supervisor.acknowledge().await;
}

#[tokio::test]
async fn a_supervisor_without_work_leaves_nothing() {
    let bed = Bed::new("idle");
    let supervisor = bed.all.spawn(id(0)).unwrap();
    let pid = supervisor.pid();
    until("the third stage waits", || process::children(pid).len() == 1).await;
    let launcher = process::children(pid);
    drop(supervisor);
    until("gone", || {
        let gone = |pid: &i32| process::stat(*pid).is_none_or(|stat| stat.state == 'Z');
        gone(&pid) && launcher.iter().all(gone)
    })
    .await;
}
