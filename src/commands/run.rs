//! `run`: the guardian's and the pilot's beginnings, and the pilot's one loop from its first sign of life to its last.

mod cordon;
mod end;
pub(super) mod setup;
pub(super) mod signals;

use std::ffi::OsString;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::sync::watch;
use tokio::time::Instant;

use self::cordon::{Cordon, Why};
use self::end::End;
use self::setup::{Begun, Pilot, SetupError, Way};
use self::signals::{Signal, Signals};
use crate::allocation::TrackerHandle;
use crate::cli::RunArgs;
use crate::cli::config::Origins;
use crate::drain::{self, Phase};
use crate::guardian::{self, GuardianLink};
use crate::idle::Look;
use crate::node::{NodeHandle, Timing};
use crate::pod::manager::Counts;

/// A refused credential in a batch job is not worth a quick exit: a chain of jobs would spin through its allocation.
const REFUSED_PAUSE: Duration = Duration::from_secs(60);

/// A wall clock that jumps (suspend) is looked at again within the minute.
const LOOK_AGAIN: Duration = Duration::from_secs(30);

/// No look comes so late on a host that is merely busy.
const STOOD_STILL: Duration = Duration::from_secs(5);

/// How long the batch system is asked after a suspension. The guardian waits for longer; a SIGTERM that comes meanwhile
/// waits, which costs no more than this of its kill wait.
const STANDSTILL_ASK: Duration = Duration::from_secs(3);

/// What an API server gets that a pilot with pods to end has not reached yet after a crash. One that is there answers within
/// milliseconds, and then the Node goes too. It is a part of the kill wait, of which PBS gives 8 s.
const LAST_TRY: Duration = Duration::from_secs(2);

/// Starts the guardian, which starts the pilot with the same arguments, and with what `--config`'s file said now: what the
/// file says later is for later pilots, since one that is started again after a crash has to find its Node and its pods.
#[must_use]
pub fn guard(args: &RunArgs, command_line: Vec<OsString>, origins: &Origins) -> ExitCode {
    if let Err(error) = setup::check_settings(args) {
        let error = error.to_string();
        eprintln!("error: {error}{}", origins.note(&error));
        return ExitCode::from(2);
    }
    guardian::run(pilot_arguments(command_line), origins.handed())
}

/// The pilot's arguments: those of `run`, with the subcommand's name replaced.
fn pilot_arguments(command_line: Vec<OsString>) -> Vec<OsString> {
    let mut args: Vec<OsString> = command_line.into_iter().skip(1).collect();
    // A file may be named as the subcommand is.
    let is_value = |at: usize| at > 0 && (args[at - 1] == "--log" || args[at - 1] == "--config");
    if let Some(at) = (0..args.len()).find(|at| args[*at] == "run" && !is_value(*at)) {
        args[at] = OsString::from("pilot");
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
    let begun = tokio::select! {
        begun = setup::begin(&args, link) => begun,
        // A pilot that was started again has pods to end: a signal waits until it can.
        signal = signals.until_end(), if !setup::restarted() => return in_vain(signal),
    };
    let mut begun = match begun {
        Ok(begun) => begun,
        Err(error) => return failed(&error, &mut signals).await,
    };
    let came = if setup::restarted() {
        come_back(&args, begun, &mut signals).await
    } else {
        let way = tokio::select! {
            way = setup::reach(&args, &mut begun) => way,
            signal = signals.until_end() => return in_vain(signal),
        };
        come(&args, begun, way).await.map(|pilot| (pilot, None))
    };
    let (mut pilot, called) = match came {
        Ok(came) => came,
        Err(error) => return failed(&error, &mut signals).await,
    };
    let end = match (called, pilot.node.clone()) {
        (Some(end), _) => end,
        (None, Some(node)) => watch_over(&mut pilot, &node, &mut signals).await,
        (None, None) => End::Refused,
    };
    end::end(pilot, end, signals).await
}

fn in_vain(signal: Signal) -> ExitCode {
    tracing::warn!(?signal, "ended before the Node was registered");
    ExitCode::SUCCESS
}

/// Registers the Node. A signal waits meanwhile: a Node that is half registered would be left behind.
async fn come(args: &RunArgs, begun: Begun, way: Result<Way, SetupError>) -> Result<Pilot, SetupError> {
    let way = way?;
    let entered = setup::register(args, &begun, &way).await?;
    Ok(setup::join(args, begun, way, entered))
}

/// A pilot that was started again has pods to end, and a Node to remove. So it comes back to its Node also when its end was
/// called for meanwhile; when the API server stays away, it ends its pods without. What called for the end, if anything
/// did.
async fn come_back(
    args: &RunArgs,
    mut begun: Begun,
    signals: &mut Signals,
) -> Result<(Pilot, Option<End>), SetupError> {
    if let Some(ago) = setup::asked_to_end() {
        begun.spend_kill_wait(ago);
    }
    let (timing, tracker) = begun.clock();
    let mut called = None;
    let entered = tokio::select! {
        entered = async {
            let way = setup::reach(args, &mut begun).await?;
            let entered = setup::register(args, &begun, &way).await?;
            Ok::<_, SetupError>(Some((way, entered)))
        } => entered,
        () = out_of_patience(signals, timing, &tracker, &mut called) => Ok(None),
    };
    let end = called.map(|(end, at)| {
        begun.spend_kill_wait(at.elapsed());
        end
    });
    match entered {
        Ok(Some((way, entered))) => Ok((setup::join(args, begun, way, entered), end)),
        Ok(None) => Ok((setup::leave(args, begun).await?, end)),
        Err(error) if begun.has_pods() => {
            tracing::error!("{error}; the pods of before the crash are ended");
            Ok((setup::leave(args, begun).await?, end))
        }
        Err(error) => Err(error),
    }
}

/// Waits until the end is called for, notes that in `called`, and gives the API server a last moment.
async fn out_of_patience(
    signals: &mut Signals,
    mut timing: watch::Receiver<Option<Timing>>,
    tracker: &TrackerHandle,
    called: &mut Option<(End, Instant)>,
) {
    let end = loop {
        let (phase, wait) = drain::phase(timing.borrow_and_update().as_ref(), SystemTime::now());
        if phase == Phase::Draining {
            break End::Deadline;
        }
        tokio::select! {
            signal = signals.next() => match signal {
                Signal::Ask => tracker.signalled(),
                Signal::Terminate => break End::Terminated,
                Signal::Interrupt => break End::Interrupted,
            },
            Ok(()) = timing.changed() => {}
            () = tokio::time::sleep(wait.unwrap_or(Duration::MAX).min(LOOK_AGAIN)) => {}
        }
    };
    *called = Some((end, Instant::now()));
    tokio::time::sleep(LAST_TRY).await;
    tracing::warn!(?end, "the API server is still away: the pods of before the crash are ended without it");
}

/// Where an idle time may end the pilot it is looked at so often at least: what of it outlives a crash is written by then.
const LOOK_FOR_WORK: Duration = Duration::from_secs(10);

/// What an idle pilot waits for once its cordon is acknowledged: pods that the scheduler bound by what it knew before are on
/// their way for milliseconds, and for longer where API server and scheduler are busy.
const LAST_PODS: Duration = Duration::from_secs(5);

/// How long the API server is waited for with the cordon of an idle pilot. Longer than one that is upgraded is away; after it
/// the hours are worth more than a Node that is removed.
const CORDON_PATIENCE: Duration = Duration::from_secs(600);

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
async fn watch_over(pilot: &mut Pilot, node: &Arc<NodeHandle>, signals: &mut Signals) -> End {
    let mut timing = pilot.timing.clone();
    let mut counts = pilot.manager.counts();
    let mut cordon = Cordon::new(Arc::clone(node), pilot.manager.clone());
    let mut node = node.state();
    let mut over = None;
    let mut awaited = SystemTime::now();
    loop {
        if node.borrow_and_update().taken_by.is_some() {
            return End::Taken;
        }
        let (phase, wait) = drain::phase(timing.borrow_and_update().as_ref(), SystemTime::now());
        if phase != Phase::Open && stood_still(awaited, SystemTime::now()) {
            ask_after_standstill(pilot, &mut timing).await;
            awaited = SystemTime::now();
            continue;
        }
        if phase == Phase::Draining {
            return End::Deadline;
        }
        let mut wait = wait.unwrap_or(Duration::MAX).min(LOOK_AGAIN);
        let look = look_for_work(pilot, &mut counts);
        if let Look::Over(rest) = look {
            let since = *over.get_or_insert_with(|| {
                tracing::info!("{rest}: no more pods are taken, and the pilot ends");
                Instant::now()
            });
            let closed = cordon.closed_since();
            let left = closed.map_or(CORDON_PATIENCE.saturating_sub(since.elapsed()), |closed| {
                LAST_PODS.saturating_sub(closed.elapsed())
            });
            if left.is_zero() {
                return End::Idle(rest);
            }
            wait = wait.min(left);
        } else {
            over = None;
        }
        if pilot.idle.is_some() {
            wait = wait.min(LOOK_FOR_WORK);
        }
        if let Look::Waiting(Some(left)) = look {
            wait = wait.min(left);
        }
        cordon
            .want(match (phase, look) {
                (Phase::Cordoned, _) => Some(Why::Deadline),
                (_, Look::Over(_)) => Some(Why::Idle),
                _ => None,
            })
            .await;
        awaited = SystemTime::now() + wait;
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
            Ok(()) = counts.changed(), if pilot.idle.is_some() => {}
            _ = timing.changed() => {}
            _ = node.changed() => {}
            () = tokio::time::sleep(wait) => {}
        }
    }
}

/// Whether a look that was due at `awaited` comes so late that this pilot was stopped: its job was suspended, or the host.
fn stood_still(awaited: SystemTime, now: SystemTime) -> bool {
    now.duration_since(awaited).is_ok_and(|late| late > STOOD_STILL)
}

/// Slurm moves the end of a job that was suspended, so what was known before is asked for anew before anything is ended by it.
async fn ask_after_standstill(pilot: &Pilot, timing: &mut watch::Receiver<Option<Timing>>) {
    tracing::info!("this pilot stood still for a while; the batch system is asked whether the end has moved");
    let known = timing.borrow().map(|timing| timing.deadline);
    let told = pilot.tracker.ask_and_wait(STANDSTILL_ASK).await;
    if told.map(|told| told.at) != known {
        // It is on its way here already.
        let _ = tokio::time::timeout(Duration::from_secs(1), timing.changed()).await;
    }
}

/// Whether there is work for this pilot, and how long there has been none; what of it outlives a crash is kept.
fn look_for_work(pilot: &mut Pilot, counts: &mut watch::Receiver<Counts>) -> Look {
    let Some((idle, keep)) = &mut pilot.idle else { return Look::Busy };
    let counts = *counts.borrow_and_update();
    let now = Instant::now().into_std();
    let look = idle.look(counts.working > 0, now);
    if let Some(kept) = idle.to_keep(SystemTime::now()) {
        keep.send_modify(|state| state.idle = kept);
    }
    match look {
        // Pods of before a crash, or of before this pilot, may be there.
        Look::Over(_) if !counts.listed => Look::Waiting(None),
        look => look,
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
    use crate::allocation::{self, DetectSettings, Environment, Tracker, TrackerSettings};

    #[test]
    fn the_pilot_gets_the_arguments_of_run() {
        let words = |text: &str| text.split(' ').map(OsString::from).collect::<Vec<_>>();
        let got = pilot_arguments(words("jiriaf-pilot --log debug run --site run"));
        assert_eq!(got, words("--log debug pilot --site run"));
        let got = pilot_arguments(words("jiriaf-pilot --config run run"));
        assert_eq!(got, words("--config run pilot"));
    }

    #[test]
    fn a_loop_that_looks_late_stood_still() {
        let at = |seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        assert!(
            !stood_still(at(100), at(100)) && !stood_still(at(100), at(105)) && !stood_still(at(100), at(50))
        );
        assert!(stood_still(at(100), at(106)));
    }

    #[tokio::test]
    async fn the_drain_time_ends_the_patience_of_a_pilot_that_came_back() {
        let now = SystemTime::now();
        let env = Environment::from_pairs([("PATH", "/nonexistent")]);
        let found = allocation::detect(&env, &DetectSettings::new(now)).await;
        let (_deadline, tracker) = Tracker::spawn(&found, env, TrackerSettings::new(now));
        let mut signals = Signals::listen().unwrap();
        let at = |seconds| {
            let moment = now + Duration::from_secs(seconds);
            Some(Timing { deadline: moment, cordon: moment, drain: moment })
        };
        let (moved, timing) = watch::channel(at(3600));
        let mut called = None;
        let patience = out_of_patience(&mut signals, timing, &tracker, &mut called);
        // Its drain time comes near while it waits.
        let near = async {
            moved.send_replace(at(0));
            std::future::pending::<()>().await
        };
        let soon = LAST_TRY + Duration::from_secs(10);
        let waited = tokio::time::timeout(soon, async {
            tokio::select! { () = patience => {}, () = near => {} }
        });
        waited.await.unwrap();
        assert_eq!(called.map(|(end, _)| end), Some(End::Deadline));
    }
}
