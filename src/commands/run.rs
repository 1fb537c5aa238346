//! `run`: the guardian's and the pilot's beginnings, and the pilot's one loop from its first sign of life to its last.

mod end;
pub(super) mod setup;
pub(super) mod signals;

use std::ffi::OsString;
use std::process::ExitCode;
use std::sync::Arc;
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
    let ready = tokio::select! {
        ready = setup::prepare(&args, link) => ready,
        // A pilot that was started again has pods to end: a signal waits until it can.
        signal = signals.until_end(), if !setup::restarted() => {
            tracing::warn!(?signal, "ended before the Node was registered");
            return ExitCode::SUCCESS;
        }
    };
    // From here on a signal waits: a Node that is half registered would be left behind.
    let pilot = match ready {
        Ok(ready) => setup::join(&args, ready).await,
        Err(error) => Err(error),
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
    let mut cordon = Cordon::new(pilot);
    loop {
        if node.borrow_and_update().taken_by.is_some() {
            return End::Taken;
        }
        let (phase, wait) = drain::phase(timing.borrow_and_update().as_ref(), SystemTime::now());
        if phase == Phase::Draining {
            return End::Deadline;
        }
        cordon.want(phase == Phase::Cordoned).await;
        // A wall clock that jumps (suspend) is looked at again within the minute.
        let wait = wait.unwrap_or(Duration::MAX).min(Duration::from_secs(30));
        tokio::select! {
            signal = signals.next() => match signal {
                Signal::Ask => {
                    tracing::info!("a warning signal: the batch system is asked at once");
                    pilot.tracker.signalled();
                }
                Signal::Terminate => return End::Terminated,
                Signal::Interrupt => return End::Interrupted,
            },
            // Beside the signals: an API server that does not answer must not hold them up.
            () = cordon.turn() => {}
            _ = timing.changed() => {}
            _ = node.changed() => {}
            () = tokio::time::sleep(wait) => {}
        }
    }
}

type Turning = std::pin::Pin<Box<dyn Future<Output = Result<(), crate::node::NodeError>> + Send>>;

/// The cordon: whether pods are taken, here and as the API server knows it.
struct Cordon {
    node: Arc<crate::node::NodeHandle>,
    manager: crate::pod::manager::Manager,
    closed: bool,
    /// What is being asked of the API server.
    turning: Option<(bool, Turning)>,
}

impl Cordon {
    fn new(pilot: &Pilot) -> Self {
        Self { node: Arc::clone(&pilot.node), manager: pilot.manager.clone(), closed: false, turning: None }
    }

    /// Begins to close or open. Until a cordon is acknowledged, pods that arrive wait.
    async fn want(&mut self, closed: bool) {
        let target = self.turning.as_ref().map_or(self.closed, |(target, _)| *target);
        if target == closed {
            return;
        }
        if closed {
            tracing::info!("no more pods are taken: the deadline is near");
            self.manager.gate(Gate::Holding).await;
        }
        self.ask(closed, Duration::ZERO);
    }

    fn ask(&mut self, closed: bool, pause: Duration) {
        let node = Arc::clone(&self.node);
        let request = async move {
            tokio::time::sleep(pause).await;
            if closed { node.cordon().await } else { node.uncordon().await }
        };
        self.turning = Some((closed, Box::pin(request)));
    }

    /// Waits for the API server's answer; for ever when nothing is asked.
    async fn turn(&mut self) {
        let Some((closed, turning)) = &mut self.turning else { return std::future::pending().await };
        let (closed, result) = (*closed, turning.await);
        self.turning = None;
        match result {
            Ok(()) => {
                self.closed = closed;
                if !closed {
                    tracing::info!("the deadline has moved away; pods are taken again");
                }
                self.manager.gate(if closed { Gate::Closed } else { Gate::Open }).await;
            }
            Err(error) => {
                tracing::warn!(%error, closed, "the Node's cordon could not be changed; it is tried again");
                self.ask(closed, Duration::from_secs(1));
            }
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
