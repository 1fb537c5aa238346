//! `run`: the guardian's and the pilot's beginnings, and the pilot's one loop from its first sign of life to its last.

mod end;
pub(super) mod setup;
pub(super) mod signals;

use std::ffi::OsString;
use std::process::ExitCode;
use std::time::{Duration, SystemTime};

use tokio::sync::watch;

use self::end::End;
use self::setup::{Pilot, SetupError};
use self::signals::{Signal, Signals};
use crate::cli::RunArgs;
use crate::drain::{self, Phase};
use crate::guardian::{self, GuardianLink};
use crate::pod::manager::Gate;

/// A refused credential in a batch job is not worth a quick exit: a chain of jobs would spin through its allocation.
const REFUSED_PAUSE: Duration = Duration::from_secs(60);

/// Starts the guardian, which starts the pilot with the same arguments.
#[must_use]
pub fn guard(args: &RunArgs, command_line: Vec<OsString>) -> ExitCode {
    if let Err(error) = setup::check_settings(args) {
        eprintln!("error: {error}");
        return ExitCode::from(2);
    }
    guardian::run(pilot_arguments(command_line))
}

/// The pilot's arguments: those of `run`, with the subcommand's name replaced.
fn pilot_arguments(command_line: Vec<OsString>) -> Vec<OsString> {
    let mut args: Vec<OsString> = command_line.into_iter().skip(1).collect();
    if let Some(command) = args.iter_mut().find(|arg| *arg == "run") {
        *command = OsString::from("pilot");
    }
    args
}

/// The pilot proper.
#[must_use]
pub fn pilot(args: RunArgs) -> ExitCode {
    if let Err(error) = setup::become_pilot() {
        eprintln!("error: {error}");
        return ExitCode::from(1);
    }
    let link = match GuardianLink::from_stdin() {
        Ok(link) => link,
        Err(error) => {
            eprintln!("error: the pilot is started by `jiriaf-pilot run`, not by hand ({error})");
            return ExitCode::from(2);
        }
    };
    let runtime =
        match tokio::runtime::Builder::new_current_thread().enable_all().max_blocking_threads(8).build() {
            Ok(runtime) => runtime,
            Err(error) => {
                eprintln!("error: the pilot cannot start: {error}");
                return ExitCode::from(1);
            }
        };
    let code = runtime.block_on(live(args, link));
    // A file system that hangs may hold a blocking thread for ever.
    runtime.shutdown_background();
    code
}

/// From the first sign of life to the last.
async fn live(args: RunArgs, link: GuardianLink) -> ExitCode {
    let mut signals = match Signals::listen() {
        Ok(signals) => signals,
        Err(error) => {
            tracing::error!(%error, "signals cannot be received");
            return ExitCode::from(1);
        }
    };
    link.ready();
    let pilot = tokio::select! {
        pilot = setup::start(&args, link) => pilot,
        signal = signals.until_end() => {
            tracing::warn!(?signal, "ended before the Node was registered");
            return ExitCode::SUCCESS;
        }
    };
    let mut pilot = match pilot {
        Ok(pilot) => pilot,
        Err(error) => return failed(&error, &mut signals).await,
    };
    let end = watch_over(&mut pilot, &mut signals).await;
    end::end(pilot, end, signals).await
}

async fn failed(error: &SetupError, signals: &mut Signals) -> ExitCode {
    tracing::error!("{error}");
    if error.is_refusal() && std::env::var_os("SLURM_JOB_ID").or(std::env::var_os("PBS_JOBID")).is_some() {
        tracing::info!(
            seconds = REFUSED_PAUSE.as_secs(),
            "waiting before exit, so that a chain of jobs does not spin"
        );
        tokio::select! {
            () = tokio::time::sleep(REFUSED_PAUSE) => {}
            _ = signals.until_end() => {}
        }
    }
    ExitCode::from(error.exit_code())
}

/// Waits for the end, cordoning the Node on the way when its time comes.
async fn watch_over(pilot: &mut Pilot, signals: &mut Signals) -> End {
    let mut timing = pilot.timing.clone();
    let mut node = pilot.node.state();
    let mut cordon = Cordon::Open;
    loop {
        if node.borrow_and_update().taken_by.is_some() {
            return End::Taken;
        }
        let (phase, wait) = drain::phase(timing.borrow_and_update().as_ref(), SystemTime::now());
        match phase {
            Phase::Draining => return End::Deadline,
            Phase::Cordoned => cordon.close(pilot).await,
            Phase::Open => cordon.open(pilot).await,
        }
        // A wall clock that jumps (suspend) is looked at again within the minute.
        let wait = wait.unwrap_or(Duration::MAX).min(Duration::from_secs(30));
        let retry = if cordon == Cordon::Closing { wait.min(Duration::from_secs(1)) } else { wait };
        tokio::select! {
            signal = signals.next() => match signal {
                Signal::Ask => {
                    tracing::info!("SIGUSR1: the batch system is asked at once");
                    pilot.tracker.signalled();
                }
                Signal::Terminate => return End::Terminated,
                Signal::Interrupt => return End::Interrupted,
            },
            _ = timing.changed() => {}
            _ = node.changed() => {}
            () = tokio::time::sleep(retry) => {}
        }
    }
}

/// How far the cordon is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cordon {
    Open,
    /// Asked for, not acknowledged: pods wait.
    Closing,
    Closed,
}

impl Cordon {
    async fn close(&mut self, pilot: &Pilot) {
        if *self == Self::Open {
            tracing::info!("no more pods are taken: the deadline is near");
            pilot.manager.gate(Gate::Holding).await;
            *self = Self::Closing;
        }
        if *self == Self::Closing {
            match pilot.node.cordon().await {
                Ok(()) => {
                    pilot.manager.gate(Gate::Closed).await;
                    *self = Self::Closed;
                }
                Err(error) => tracing::warn!(%error, "the Node could not be cordoned; it is tried again"),
            }
        }
    }

    /// The deadline has moved away: pods are taken again.
    async fn open(&mut self, pilot: &Pilot) {
        if *self == Self::Open {
            return;
        }
        match pilot.node.uncordon().await {
            Ok(()) => {
                tracing::info!("the deadline has moved away; pods are taken again");
                pilot.manager.gate(Gate::Open).await;
                *self = Self::Open;
            }
            Err(error) => tracing::warn!(%error, "the Node could not be uncordoned; it is tried again"),
        }
    }
}

/// Waits until a value holds, or the time is over; whether it holds.
async fn holds<T>(
    receiver: &mut watch::Receiver<T>,
    limit: Duration,
    wanted: impl FnMut(&T) -> bool,
) -> bool {
    matches!(tokio::time::timeout(limit, receiver.wait_for(wanted)).await, Ok(Ok(_)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pilot_gets_the_arguments_of_run() {
        let words = |text: &str| text.split(' ').map(OsString::from).collect::<Vec<_>>();
        let got = pilot_arguments(words("jiriaf-pilot --log debug run --site run"));
        assert_eq!(got, words("--log debug pilot --site run"));
    }
}
