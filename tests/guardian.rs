//! The guardian, with shell scripts in the pilot's place.
//!
//! This test binary runs itself as the guardian: the pilot's script is in the environment.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const SCRIPT: &str = "GUARDIAN_TEST_SCRIPT";

/// Not a test of its own: the process that the tests start.
#[test]
fn guardian_process() {
    let Some(script) = std::env::var_os(SCRIPT) else { return };
    let code = jiriaf_pilot::guardian::guard(Path::new("/bin/bash"), &["-c".into(), script]);
    let code = (0..=255).find(|n| ExitCode::from(*n) == code).unwrap_or(99);
    std::process::exit(i32::from(code));
}

struct Guardian {
    child: Child,
    output: BufReader<std::process::ChildStdout>,
}

impl Guardian {
    fn start(script: &str) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "guardian_process", "--nocapture"])
            .env(SCRIPT, script)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        Self { child, output }
    }

    /// The next line that begins with `pilot`.
    fn line(&mut self) -> String {
        loop {
            let mut line = String::new();
            assert_ne!(self.output.read_line(&mut line).unwrap(), 0, "the output has ended");
            if let Some(at) = line.find("pilot ") {
                return line[at..].trim().to_owned();
            }
        }
    }

    fn code(&mut self) -> i32 {
        self.child.wait().unwrap().code().unwrap()
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id().cast_signed()), signal).unwrap();
    }
}

fn is_running(name: &str) -> bool {
    Command::new("pgrep").args(["-x", "-f", name]).stdout(Stdio::null()).status().unwrap().success()
}

#[test]
fn the_pilots_exit_code_is_the_guardians_and_strays_are_ended() {
    let mut guardian = Guardian::start("setsid sleep 7001 & sleep 0.1; exit 2");
    assert_eq!(guardian.code(), 2);
    assert!(!is_running("sleep 7001"));
}

#[test]
fn a_pilot_that_is_killed_is_started_again() {
    let mut guardian = Guardian::start(
        "echo pilot ${JIRIAF_RESTARTED:-0}; [ \"$JIRIAF_RESTARTED\" = 2 ] || kill -9 $$; exit 0",
    );
    for n in 0..3 {
        assert_eq!(guardian.line(), format!("pilot {n}"));
    }
    assert_eq!(guardian.code(), 0);
}

#[test]
fn a_pilot_that_always_dies_is_given_up() {
    let mut guardian = Guardian::start("echo pilot $JIRIAF_RESTARTED; setsid sleep 7002 & kill -6 $$");
    assert_eq!(guardian.code(), 1);
    assert!(!is_running("sleep 7002"));
}

#[test]
fn signals_reach_the_pilot_and_wait_for_one_that_has_its_handlers() {
    let mut guardian = Guardian::start(
        "echo pilot up; sleep 0.3; trap 'echo pilot term; exit 3' TERM; trap 'echo pilot usr1' USR1; echo '{\"deadline\":null,\"supervisors\":null}' >&0; while :; do sleep 0.02; done",
    );
    assert_eq!(guardian.line(), "pilot up");
    guardian.signal(Signal::SIGUSR1);
    assert_eq!(guardian.line(), "pilot usr1");
    guardian.signal(Signal::SIGTERM);
    assert_eq!(guardian.line(), "pilot term");
    assert_eq!(guardian.code(), 3);
}

#[test]
fn a_pilot_that_crashes_after_it_was_asked_to_end_hands_that_on_to_the_next() {
    let mut guardian = Guardian::start(
        "if [ \"$JIRIAF_RESTARTED\" ]; then trap 'echo pilot again; exit 4' TERM; \
            [ $(( $(date +%s%3N) - JIRIAF_ASKED_TO_END )) -lt 5000 ] && echo pilot asked; \
        else trap 'echo pilot term; kill -9 $$' TERM; fi; \
        echo '{\"deadline\":null,\"supervisors\":null}' >&0; echo pilot up; while :; do sleep 0.02; done",
    );
    assert_eq!(guardian.line(), "pilot up");
    guardian.signal(Signal::SIGTERM);
    assert_eq!(guardian.line(), "pilot term");
    assert_eq!(guardian.line(), "pilot asked");
    let mut next = guardian.line();
    if next == "pilot up" {
        next = guardian.line();
    }
    assert_eq!(next, "pilot again");
    assert_eq!(guardian.code(), 4);
}

#[test]
fn a_silent_pilot_gets_its_signals_after_a_while_and_its_death_by_them_is_no_crash() {
    let mut guardian = Guardian::start("echo pilot up; exec sleep 7006");
    assert_eq!(guardian.line(), "pilot up");
    let begin = Instant::now();
    guardian.signal(Signal::SIGTERM);
    assert_eq!(guardian.code(), 1);
    let took = begin.elapsed();
    assert!(took > Duration::from_millis(1000) && took < Duration::from_millis(3500), "{took:?}");
    let mut rest = String::new();
    guardian.output.read_to_string(&mut rest).unwrap();
    assert!(!rest.contains("pilot up"), "{rest}");
}

#[test]
fn at_the_deadline_nothing_is_left() {
    let mut guardian = Guardian::start(
        "trap '' TERM; at=$(( $(date +%s%3N) + 1500 )); echo \"{\\\"deadline\\\":{\\\"secs_since_epoch\\\":$(( at / 1000 )),\\\"nanos_since_epoch\\\":$(( at % 1000 * 1000000 ))},\\\"supervisors\\\":null}\" >&0; setsid sleep 7003 & echo pilot up; while :; do sleep 1; done",
    );
    assert_eq!(guardian.line(), "pilot up");
    let begin = Instant::now();
    assert_eq!(guardian.code(), 1);
    assert!(begin.elapsed() > Duration::from_millis(300) && begin.elapsed() < Duration::from_millis(1400));
    assert!(!is_running("sleep 7003"));
}

#[test]
fn a_live_supervisor_outlives_the_pilot_and_a_dead_ones_tree_does_not() {
    let dir = tempfile::tempdir().unwrap();
    let supervisor = dir.path().join("containers/u.c.0");
    fs::create_dir_all(&supervisor).unwrap();
    // The first pilot leaves a child that has a supervisor's file, and one that has none.
    let script = format!(
        "cd {dir}; echo '{{\"deadline\":null,\"supervisors\":\"{dir}/containers\"}}' >&0; \
         if [ -z \"$JIRIAF_RESTARTED\" ]; then sleep 7004 & p=$!; sleep 7005 & \
         echo \"$p $(cut -d' ' -f22 /proc/$p/stat) $(cat /proc/sys/kernel/random/boot_id)\" > containers/u.c.0/pid; kill -9 $$; fi; \
         sleep 0.5; pgrep -x -f 'sleep 7004' >/dev/null && echo pilot supervisor lives; pgrep -x -f 'sleep 7005' > /dev/null || echo pilot stray is gone; exit 0",
        dir = dir.path().display()
    );
    let mut guardian = Guardian::start(&script);
    assert_eq!(guardian.line(), "pilot supervisor lives");
    assert_eq!(guardian.line(), "pilot stray is gone");
    assert_eq!(guardian.code(), 0);
    assert!(!is_running("sleep 7004"), "the end of the pilot is the end of all");
}
