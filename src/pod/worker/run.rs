//! One run of one container: from its supervisor's first word to its last.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::sync::{mpsc, watch};

use crate::container::{ContainerSpec, Event, Supervisor};
use crate::pod::context::{Context, OutputLine};

/// What a run is told.
#[derive(Debug)]
pub enum Order {
    /// SIGTERM now, SIGKILL after this long. A later order may only shorten it.
    Terminate(Duration),
    /// The run's end is recorded: the supervisor may go.
    Acknowledge,
}

/// What a run tells: which container (index in the pod's spec), which run of it, and what happened.
pub type Told = (usize, u32, Event);

/// Orders that may wait. A run gets a handful in its life.
const ORDERS: usize = 16;

/// Starts `spec`, if there is one, follows the supervisor and tells the worker what happens. Returns where to send orders.
pub fn follow(
    context: Arc<Context>,
    supervisor: Supervisor,
    (index, restart): (usize, u32),
    (pod, container): (String, String),
    spec: Option<ContainerSpec>,
    told: mpsc::Sender<Told>,
) -> mpsc::Sender<Order> {
    let (orders_tx, orders) = mpsc::channel(ORDERS);
    tokio::spawn(async move {
        let mut supervisor = supervisor;
        if let Some(spec) = spec {
            supervisor.start(spec).await;
        }
        let name = (pod, container);
        drive(context, supervisor, (index, restart), name, told, orders).await;
    });
    orders_tx
}

async fn drive(
    context: Arc<Context>,
    mut supervisor: Supervisor,
    (index, restart): (usize, u32),
    (pod, container): (String, String),
    told: mpsc::Sender<Told>,
    mut orders: mpsc::Receiver<Order>,
) {
    let mut drain = context.drain.clone();
    let mut ordered = false;
    loop {
        let event = tokio::select! {
            biased;
            order = orders.recv() => {
                match order {
                    Some(Order::Terminate(grace)) => {
                        ordered = true;
                        supervisor.terminate(grace).await;
                    }
                    // Without a worker nobody waits for this container: it ends as if its pod were deleted.
                    Some(Order::Acknowledge) => {}
                    None => return,
                }
                continue;
            }
            event = supervisor.next() => event,
            moved = next_drain(&mut drain) => {
                supervisor.set_drain(moved).await;
                continue;
            }
        };
        match event {
            Event::Output { stderr, line } => {
                if let Some(output) = &context.output {
                    let line = OutputLine { pod: pod.clone(), container: container.clone(), stderr, line };
                    // A terminal that is gone takes no more lines; the log has them all.
                    let _ = output.send(line).await;
                }
            }
            Event::Ended(_) if !ordered && !context.policy.hold_end.is_zero() => {
                hold(context.policy.hold_end, &mut context.draining.clone(), &mut orders).await;
                if told.send((index, restart, event)).await.is_err() {
                    return;
                }
                break;
            }
            Event::Ended(_) | Event::StartFailed(_) | Event::Lost { .. } => {
                if told.send((index, restart, event)).await.is_err() {
                    return;
                }
                break;
            }
            Event::Started { .. } => {
                if told.send((index, restart, event)).await.is_err() {
                    return;
                }
            }
        }
    }
    while let Some(order) = orders.recv().await {
        if matches!(order, Order::Acknowledge) {
            supervisor.acknowledge().await;
            return;
        }
    }
}

/// Waits out the time in which the batch system's SIGTERM, sent to every process of the job, may reach the pilot too.
async fn hold(limit: Duration, draining: &mut watch::Receiver<bool>, orders: &mut mpsc::Receiver<Order>) {
    tokio::select! {
        () = tokio::time::sleep(limit) => {}
        _ = draining.wait_for(|draining| *draining) => {}
        _ = orders.recv() => {}
    }
}

/// The drain time, when it has moved to a known moment.
async fn next_drain(drain: &mut watch::Receiver<Option<SystemTime>>) -> SystemTime {
    loop {
        if drain.changed().await.is_err() {
            return std::future::pending().await;
        }
        if let Some(moment) = *drain.borrow_and_update() {
            return moment;
        }
    }
}
