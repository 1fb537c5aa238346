//! The end, carried out: cordon, SIGTERM, grace, SIGKILL, every final status, Lease and Node, the table.
//!
//! [`end`] returns before the deadline whatever happens; what could not be done by then is said.

use std::io::Write as _;
use std::process::ExitCode;
use std::time::{Duration, SystemTime};

use tokio::time::Instant;

use super::holds;
use super::setup::Pilot;
use super::signals::{Signal, Signals};
use crate::allocation::BatchSystem;
use crate::drain::{self, SAFETY, Share};
use crate::idle::Rest;
use crate::node::Removal;
use crate::pod::manager::{Counts, Gate};
use crate::pod::outcome;

/// How long the batch system is asked at most whether more time is left than the SIGTERM allows for.
const ASK_LIMIT: Duration = Duration::from_secs(2);

/// A deadline nearer than this is as good as over.
const OVER: Duration = Duration::from_secs(2);

/// How long somebody at a terminal waits at most, where no deadline is nearer: the default grace of a pod is 30 s.
const INTERRUPT_BUDGET: Duration = Duration::from_secs(60);

/// What is left to containers after a second SIGINT.
const HURRY: Duration = Duration::from_secs(1);

/// How long Jobs' tracking finalizers may take: the Job controller answers in a second or two when it lives.
const FINALIZERS_LIMIT: Duration = Duration::from_secs(3);

/// Longest wait for the events that are still to be sent.
const EVENTS_LIMIT: Duration = Duration::from_secs(2);

/// Longer than any pod's own grace may be cut to: "no cut yet".
const NO_CUT: Duration = Duration::from_secs(24 * 3600);

/// Why a pilot ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The drain time has come.
    Deadline,
    /// SIGTERM or SIGHUP.
    Terminated,
    /// SIGINT.
    Interrupted,
    /// Another pilot has the Node: this one was out of reach for longer than its Lease holds.
    Taken,
    /// Nobody has worked here for long enough, and the Node is cordoned.
    Idle(Rest),
    /// After a crash: the API server takes this pilot or its Node no more.
    Refused,
}

/// Ends everything and says how it went.
pub async fn end(pilot: Pilot, why: End, mut signals: Signals) -> ExitCode {
    let start = Instant::now();
    let deadline = pilot.timing.borrow().as_ref().map(|t| t.deadline);
    let budget = first_budget(why, deadline, SystemTime::now(), pilot.kill_wait);
    tracing::info!(?why, seconds = budget.as_secs(), "draining: pods are ended");
    // What the guardian goes by from here on: the limit's own SIGTERM comes after the deadline.
    pilot.link.set_deadline(SystemTime::now().checked_add(budget));
    pilot.draining.send_replace(true);
    // The drain is now: what the Node says of the time that is left must not say more.
    let now = SystemTime::now();
    pilot.timing_tx.send_modify(|timing| {
        if let Some(timing) = timing {
            (timing.cordon, timing.drain) = (timing.cordon.min(now), timing.drain.min(now));
        }
    });
    pilot.manager.gate(Gate::Holding).await;
    let asks = asks(why, pilot.batch);
    // Until the batch system has said whether more time is left, pods have their own grace.
    let first_grace = if asks { NO_CUT } else { drain::share(budget).grace };
    pilot.manager.shutdown(first_grace).await;
    let mut work: Work<'_> = Box::pin(carry_out(&pilot, asks, start, budget));
    let mut terminated = why == End::Terminated;
    let mut interrupts = u32::from(why == End::Interrupted);
    let done = loop {
        tokio::select! {
            done = &mut work => break done,
            signal = signals.next() => match signal {
                Signal::Interrupt => {
                    interrupts += 1;
                    if interrupts > 1 {
                        tracing::warn!("hurrying: containers are killed in {} s", HURRY.as_secs());
                        pilot.manager.shutdown(HURRY).await;
                    }
                }
                Signal::Terminate if terminated => tracing::info!("another SIGTERM changes nothing"),
                Signal::Terminate => {
                    terminated = true;
                    let left = budget.saturating_sub(start.elapsed());
                    if pilot.kill_wait < left {
                        tracing::warn!(seconds = pilot.kill_wait.as_secs(), "SIGTERM: less time is left than was known");
                        pilot.link.set_deadline(SystemTime::now().checked_add(pilot.kill_wait));
                        let share = drain::share(pilot.kill_wait);
                        pilot.manager.shutdown(share.grace).await;
                        work = Box::pin(carry_on(&pilot, Instant::now(), share));
                    }
                }
                Signal::Ask => {}
            },
        }
    };
    report(&pilot, why, &done).await
}

/// The time from now until somebody kills us, as far as is known at once.
fn first_budget(why: End, deadline: Option<SystemTime>, now: SystemTime, kill_wait: Duration) -> Duration {
    let left = deadline.map(|d| d.duration_since(now).unwrap_or_default());
    match why {
        // A limit that was lowered to what is over already: the batch system sends SIGTERM and waits, too.
        End::Deadline => left.filter(|left| *left > OVER).unwrap_or(kill_wait),
        // At the limit itself the deadline is over when the SIGTERM comes, and the kill wait is what is left.
        End::Terminated => kill_wait,
        End::Interrupted | End::Taken | End::Idle(_) | End::Refused => {
            left.unwrap_or(INTERRUPT_BUDGET).min(INTERRUPT_BUDGET)
        }
    }
}

/// How long the batch system is asked: of a short budget no more than the containers and the report can spare.
fn ask_limit(budget: Duration) -> Duration {
    ASK_LIMIT.min(budget / 4)
}

/// Whether the batch system is asked if more time is left than its SIGTERM allows for.
fn asks(why: End, batch: BatchSystem) -> bool {
    why == End::Terminated && batch.tells_of_a_kill()
}

/// How far the end came.
struct Done {
    /// Pods that had not ended when the time was over.
    running: usize,
    /// Final statuses that the API server never acknowledged.
    unreported: usize,
    /// Pods that never ran here, of whose rejection the API server never heard.
    refused: usize,
    /// What became of the Node.
    node: Result<Removal, String>,
}

type Work<'a> = std::pin::Pin<Box<dyn Future<Output = Done> + 'a>>;

async fn carry_on(pilot: &Pilot, start: Instant, share: Share) -> Done {
    tokio::select! {
        done = finish(pilot, start, share) => done,
        never = cordon(pilot) => never,
    }
}

async fn carry_out(pilot: &Pilot, asks: bool, start: Instant, budget: Duration) -> Done {
    tokio::select! {
        done = end_pods(pilot, asks, start, budget) => done,
        never = cordon(pilot) => never,
    }
}

/// Cordons the Node and closes the gate. Until the cordon is acknowledged pods that arrive wait; rejecting them would
/// bring a storm of replacements. On a Node that is another pilot's they wait for ever: they are that pilot's.
async fn cordon(pilot: &Pilot) -> Done {
    let Some(node) = &pilot.node else { return std::future::pending().await };
    let state = node.state();
    loop {
        if state.borrow().taken_by.is_some() {
            return std::future::pending().await;
        }
        let Err(error) = node.cordon().await else { break };
        tracing::warn!(%error, "the Node could not be cordoned; it is tried again");
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    pilot.manager.gate(Gate::Closed).await;
    std::future::pending().await
}

async fn end_pods(pilot: &Pilot, asks: bool, start: Instant, budget: Duration) -> Done {
    if !asks {
        return finish(pilot, start, drain::share(budget)).await;
    }
    let asked = pilot.tracker.ask_and_wait(ask_limit(budget)).await;
    let more =
        asked.and_then(|d| d.at.duration_since(SystemTime::now()).ok()).map(|left| left + start.elapsed());
    let whole = more.unwrap_or_default().max(budget);
    if whole > budget {
        tracing::info!(seconds = whole.as_secs(), "the batch system leaves more time than its kill wait");
        pilot.link.set_deadline(SystemTime::now().checked_add(whole.saturating_sub(start.elapsed())));
    }
    let share = drain::share(whole);
    pilot.manager.shutdown(share.grace.saturating_sub(start.elapsed())).await;
    finish(pilot, start, share).await
}

async fn finish(pilot: &Pilot, start: Instant, share: Share) -> Done {
    let left = |until: Duration| until.saturating_sub(start.elapsed());
    let mut counts = pilot.manager.counts();
    let told = |c: &Counts| c.active == 0 && c.unreported == 0 && c.refused == 0;
    if holds(&mut counts, left(share.report), told).await {
        holds(&mut counts, left(share.report).min(FINALIZERS_LIMIT), |c| c.tracked == 0).await;
    }
    pilot.context.events.flush(left(share.report).min(EVENTS_LIMIT)).await;
    let node = match &pilot.node {
        Some(node) => node.remove(left(share.end).max(SAFETY / 2)).await.map_err(|error| error.to_string()),
        None => Err("the pilot did not come back to it after a crash".to_owned()),
    };
    let now = *counts.borrow();
    Done { running: now.active, unreported: now.unreported, refused: now.refused, node }
}

async fn report(pilot: &Pilot, why: End, done: &Done) -> ExitCode {
    if done.running == 0 {
        // What is left says something only of pods that did not end; `clean` takes care of those.
        let _ = std::fs::remove_dir_all(&pilot.state_dir);
    }
    let summary = pilot.manager.final_summary().await;
    let table = outcome::table(&summary.outcomes);
    // Output that nobody takes (a full disk, a terminal that is gone) must not keep the pilot from its end.
    let mut output = std::io::stdout().lock();
    if let End::Idle(rest) = why {
        let _ = writeln!(output, "Ended early: {rest}. What is left of the allocation is given back.");
    }
    let _ = if table.is_empty() { writeln!(output, "No pods ran.") } else { write!(output, "{table}") };
    if summary.forgotten > 0 {
        let kept = pilot.context.places.kept.display();
        let _ = writeln!(output, "… and {} before them: see {kept}", summary.forgotten);
    }
    let _ = output.flush();
    drop(output);
    let strays = crate::container::end_marked(&pilot.context.identity.mark);
    if strays > 0 {
        tracing::warn!(strays, "processes that had left their containers were killed");
    }
    let mut code = ExitCode::SUCCESS;
    if done.running > 0 {
        tracing::error!(
            pods = done.running,
            "the time was over before these pods had ended; the batch system kills them"
        );
        code = ExitCode::from(1);
    }
    if done.unreported > 0 {
        tracing::error!(
            pods = done.unreported,
            kept = %pilot.context.places.kept.display(),
            "final statuses that the API server never acknowledged; the rows NOT REPORTED above and the kept files have them"
        );
        code = ExitCode::from(1);
    }
    if done.refused > 0 {
        tracing::error!(
            pods = done.refused,
            "pods that never ran here and whose final status the API server never acknowledged"
        );
        code = ExitCode::from(1);
    }
    match &done.node {
        Ok(Removal::Removed) => tracing::info!("Node and Lease are removed"),
        Ok(Removal::LeftBehind { .. }) => {
            tracing::info!(
                node = pilot.context.identity.node,
                "the Node is left cordoned, not ready and without a Lease; a sweeper removes it (docs/cluster/sweeper.yaml), \
                 or kubectl delete node"
            );
        }
        Ok(Removal::NotOurs) => {
            tracing::error!(
                node = pilot.context.identity.node,
                "another pilot has taken the Node over, and it is left alone; this pilot was out of reach for longer \
                 than its Lease holds, or another was given the same --node-name (NODENAME)"
            );
            code = ExitCode::from(1);
        }
        Err(problem) => {
            tracing::error!(node = pilot.context.identity.node, problem, "the Node could not be removed");
            code = ExitCode::from(1);
        }
    }
    code
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_budget_is_what_is_left_before_somebody_kills_us() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1000);
        let s = Duration::from_secs;
        assert_eq!(first_budget(End::Deadline, Some(now + s(30)), now, s(27)), s(30));
        assert_eq!(first_budget(End::Deadline, Some(now - s(9)), now, s(27)), s(27));
        assert_eq!(first_budget(End::Terminated, Some(now + s(3000)), now, s(27)), s(27));
        assert_eq!(first_budget(End::Terminated, Some(now - s(3)), now, s(27)), s(27));
        assert_eq!(first_budget(End::Interrupted, None, now, s(27)), s(60));
        assert_eq!(first_budget(End::Taken, None, now, s(27)), s(60));
        assert_eq!(first_budget(End::Interrupted, Some(now + s(20)), now, s(27)), s(20));
    }

    #[test]
    fn a_batch_system_that_does_not_answer_leaves_time_for_the_shortest_drain() {
        assert_eq!(ask_limit(Duration::from_secs(27)), ASK_LIMIT);
        let share = drain::share(drain::LEAST_KILL_WAIT);
        assert!(ask_limit(drain::LEAST_KILL_WAIT) <= share.grace / 2, "{share:?}");
    }

    #[test]
    fn only_a_batch_system_that_knows_of_the_kill_is_asked_for_more_time() {
        use BatchSystem::{None, Pbs, Slurm, Torque};
        let asked = [Slurm, None, Pbs, Torque].map(|batch| asks(End::Terminated, batch));
        assert_eq!(asked, [true, true, false, false]);
        assert!(!asks(End::Deadline, Slurm) && !asks(End::Interrupted, Slurm));
    }
}
