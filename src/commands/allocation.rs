//! `jiriaf-pilot allocation`: prints what was granted on this host, and where each fact was learnt.

use std::io::Write;
use std::process::ExitCode;
use std::time::{Duration, SystemTime};

use crate::allocation::report::Report;
use crate::allocation::{
    Allocation, Deadline, DetectSettings, Environment, TrackerSettings, detect, first_deadline, render,
};

/// Prints the allocation of this process, as a table or as JSON; `walltime` is `--walltime`, counted from now.
///
/// The exit code is 0, or 1 when standard output cannot be written.
pub async fn run(json: bool, walltime: Option<Duration>) -> ExitCode {
    let now = SystemTime::now();
    let env = Environment::from_process();
    let settings = DetectSettings { ask_always: true, ..DetectSettings::new(now) };
    let allocation = detect(&env, &settings).await;
    let tracked = TrackerSettings { walltime, ..TrackerSettings::new(now) };
    let now = SystemTime::now();
    let deadline = first_deadline(&allocation, &tracked, now);
    match print(&mut std::io::stdout().lock(), &allocation, deadline.as_ref(), now, json) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(%error, "cannot write to standard output");
            ExitCode::FAILURE
        }
    }
}

fn print(
    out: &mut impl Write,
    allocation: &Allocation,
    deadline: Option<&Deadline>,
    now: SystemTime,
    json: bool,
) -> std::io::Result<()> {
    if json {
        serde_json::to_writer_pretty(&mut *out, &Report::new(allocation, deadline, now))?;
        writeln!(out)?;
    } else {
        out.write_all(render(allocation, deadline, now).as_bytes())?;
    }
    out.flush()
}
