//! `play`: the Pods and Jobs of manifests, here and now, by the same pipeline as `run`.
//!
//! What differs from a cluster: there is no scheduler, so pods start as soon as they fit; nobody will ever add a missing
//! object, so a pod that cannot start fails; and a Pod that names no restartPolicy is run once.

mod job;
mod manifests;
mod setup;
mod show;
mod terminal;
mod work;

use std::io::Read;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, SystemTime};

use tokio::time::Instant;

use self::manifests::{Manifests, Source};
use self::setup::Stage;
use self::terminal::{Printer, Show};
use self::work::Work;
use crate::cli::PlayArgs;
use crate::commands::run::setup::{become_pilot, instance};
use crate::commands::run::signals::{Signal, Signals};
use crate::drain::{self, Phase, Share};

/// Most of a file that is read. An object of a cluster has at most 1.5 MiB (etcd's request limit), and a file holds some.
const FILE_BYTES: u64 = 16 << 20;

/// How long somebody at a terminal waits at most: as for `run`.
const INTERRUPT_BUDGET: Duration = Duration::from_secs(60);

/// What is left to containers after a second SIGINT.
const HURRY: Duration = Duration::from_secs(1);

/// How long the directories of pods that have ended may take to go; a slow shared file system is told of then.
const CLEAR_LIMIT: Duration = Duration::from_secs(10);

/// How often the progress line is drawn, and pods that wait are looked at.
const TICK: Duration = Duration::from_secs(1);

/// Runs `play`: 0 when all work succeeded, else the first failed container's exit code, or 1.
#[must_use]
pub fn run(args: PlayArgs) -> ExitCode {
    let manifests = match load(&args.files) {
        Ok(manifests) => manifests,
        Err(error) => {
            eprintln!("error: {error}");
            return ExitCode::from(1);
        }
    };
    for ignored in &manifests.ignored {
        eprintln!("ignored: {ignored} (play runs Pods and Jobs, with their ConfigMaps and Secrets)");
    }
    if let Err(error) = become_pilot() {
        eprintln!("error: {error}");
        return ExitCode::from(1);
    }
    let runtime =
        match tokio::runtime::Builder::new_current_thread().enable_all().max_blocking_threads(8).build() {
            Ok(runtime) => runtime,
            Err(error) => {
                eprintln!("error: {error}");
                return ExitCode::from(1);
            }
        };
    let code = runtime.block_on(play(&args, manifests));
    // A file system that hangs may hold a blocking thread for ever.
    runtime.shutdown_background();
    code
}

fn load(files: &[std::path::PathBuf]) -> Result<Manifests, String> {
    let sources = files.iter().map(|file| read_source(file)).collect::<Result<Vec<_>, _>>()?;
    manifests::read(&sources, instance).map_err(|error| error.to_string())
}

fn read_source(file: &Path) -> Result<Source, String> {
    let name = if file == Path::new("-") { "standard input".to_owned() } else { file.display().to_string() };
    let mut text = String::new();
    let read = if file == Path::new("-") {
        std::io::stdin().take(FILE_BYTES + 1).read_to_string(&mut text)
    } else {
        std::fs::File::open(file).and_then(|file| file.take(FILE_BYTES + 1).read_to_string(&mut text))
    };
    match read {
        Ok(_) if text.len() as u64 > FILE_BYTES => {
            Err(format!("{name}: more than {} MiB; split it into several files", FILE_BYTES >> 20))
        }
        Ok(_) => Ok(Source { name, text }),
        Err(error) => Err(format!("{name}: {error}; a readable YAML or JSON file is wanted")),
    }
}

async fn play(args: &PlayArgs, manifests: Manifests) -> ExitCode {
    let fail = |error: &dyn std::fmt::Display, code: u8| {
        eprintln!("error: {error}");
        ExitCode::from(code)
    };
    let mut signals = match Signals::listen() {
        Ok(signals) => signals,
        Err(error) => return fail(&error, 1),
    };
    let mut stage = tokio::select! {
        stage = setup::start(&args.pods, &manifests) => match stage {
            Ok(stage) => stage,
            Err(error) => return fail(&error, error.exit_code()),
        },
        _ = signals.until_end() => return ExitCode::from(1),
    };
    let mut work = Work::new(manifests);
    let printer = match Printer::start(work.is_several()) {
        Ok(printer) => printer,
        Err(error) => return fail(&error, 1),
    };
    watch_over(&mut stage, &mut work, &printer, &mut signals).await;
    let code = work.exit_code();
    let last = async {
        clear_away(&mut stage, &mut work, &printer).await;
        show::result(&work, &stage, &printer).await;
        printer.finish().await;
    };
    // A terminal that takes nothing holds up the last lines and the table, until somebody has enough of it.
    tokio::select! {
        () = last => {}
        () = interrupted(&mut signals) => {}
    }
    ExitCode::from(code)
}

async fn interrupted(signals: &mut Signals) {
    while signals.next().await != Signal::Interrupt {}
}

/// A drain under way.
struct Drain {
    start: Instant,
    share: Share,
    interrupts: u32,
}

/// Starts what may start and follows it, until all is done or the time is over.
async fn watch_over(stage: &mut Stage, work: &mut Work, printer: &Printer, signals: &mut Signals) {
    let mut counts = stage.manager.counts();
    let mut timing = stage.timing.clone();
    let mut tick = tokio::time::interval(TICK);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
    let mut draining: Option<Drain> = None;
    loop {
        work.collect(stage).await;
        if draining.is_none() {
            work.start(stage, SystemTime::now()).await;
        }
        if work.is_over(draining.is_some()) {
            return;
        }
        let (phase, wait) = drain::phase(timing.borrow_and_update().as_ref(), SystemTime::now());
        if phase == Phase::Draining && draining.is_none() {
            let left = stage.timing.borrow().as_ref().map(|t| t.deadline);
            let left = left.map(|at| at.duration_since(SystemTime::now()).unwrap_or_default());
            remark(printer, "The walltime is nearly over: pods are ended.").await;
            draining = Some(begin_drain(stage, left.unwrap_or_default(), 0).await);
            continue;
        }
        let give_up = draining.as_ref().map(|d| d.start + d.share.report);
        tokio::select! {
            signal = signals.next() => match (signal, &mut draining) {
                (Signal::Ask, _) => stage.tracker.signalled(),
                (Signal::Terminate, Some(_)) => {}
                (Signal::Interrupt, Some(drain)) => {
                    drain.interrupts += 1;
                    if drain.interrupts > 1 {
                        remark(printer, "Hurrying: containers are killed in a second.").await;
                        stage.manager.shutdown(HURRY).await;
                    }
                }
                (signal, None) => {
                    let budget = budget(stage, signal);
                    remark(printer, "Ending the pods; Ctrl-C again kills them.").await;
                    draining = Some(begin_drain(stage, budget, u32::from(signal == Signal::Interrupt)).await);
                }
            },
            Some((uid, status)) = stage.statuses.recv() => work.on_status(&uid, status, stage).await,
            _ = counts.changed() => {}
            line = next_line(printer, &mut stage.output) => work.on_line(line.as_ref()),
            _ = tick.tick() => {
                for text in work.give_up_waiting(stage, Instant::now()).await {
                    remark(printer, &text).await;
                }
                show::progress(work, stage, printer);
            }
            _ = timing.changed() => {}
            // A wall clock that jumps is looked at again at the next tick.
            () = tokio::time::sleep(wait.unwrap_or(TICK).min(TICK)) => {}
            () = until(give_up) => {
                remark(printer, "The time is over before all pods have ended; what is left of them is killed.").await;
                return;
            }
        }
    }
}

/// The time from a signal until somebody kills us.
fn budget(stage: &Stage, signal: Signal) -> Duration {
    let left = stage.timing.borrow().as_ref().map(|t| t.deadline.duration_since(SystemTime::now()));
    let left = left.map_or(Duration::MAX, Result::unwrap_or_default);
    match signal {
        Signal::Terminate => stage.kill_wait,
        Signal::Interrupt | Signal::Ask => left.min(INTERRUPT_BUDGET),
    }
}

async fn begin_drain(stage: &Stage, budget: Duration, interrupts: u32) -> Drain {
    let share = drain::share(budget);
    stage.draining.send_replace(true);
    stage.manager.shutdown(share.grace).await;
    Drain { start: Instant::now(), share, interrupts }
}

async fn remark(printer: &Printer, text: &str) {
    // A terminal that takes nothing must not hold up the drain.
    let _ = printer.show.send_timeout(Show::Remark(text.to_owned()), TICK).await;
}

/// Takes the next line when the terminal has room for it. Nothing is lost when it is not waited for to the end.
async fn next_line(
    printer: &Printer,
    output: &mut tokio::sync::mpsc::Receiver<crate::pod::context::OutputLine>,
) -> Option<crate::pod::context::OutputLine> {
    let Ok(room) = printer.show.reserve().await else { return std::future::pending().await };
    let Some(line) = output.recv().await else { return std::future::pending().await };
    room.send(Show::Line(line.clone()));
    Some(line)
}

/// Waits until the directories of ended pods are gone and their logs are kept, then shows what is left to show.
async fn clear_away(stage: &mut Stage, work: &mut Work, printer: &Printer) {
    let mut counts = stage.manager.counts();
    let _ = tokio::time::timeout(CLEAR_LIMIT, counts.wait_for(|counts| counts.known == 0)).await;
    while let Ok(line) = stage.output.try_recv() {
        work.on_line(Some(&line));
        if printer.show.send(Show::Line(line)).await.is_err() {
            break;
        }
    }
    let strays = crate::container::end_marked(&stage.context.identity.mark);
    if strays > 0 {
        tracing::warn!(strays, "processes that had left their containers were killed");
    }
}

async fn until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}
