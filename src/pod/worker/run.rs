//! One run of one container: from its supervisor's first word to its last.

use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use k8s_openapi::api::core::v1::Pod;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use crate::container::{ContainerSpec, Event, Supervisor};
use crate::pod::context::{Context, OutputLine};
use crate::pod::events::Kind;
use crate::pod::handler::Hook;
use crate::pod::session::{Joined, Request, RunHandle};

/// What a kubelet leaves a container between SIGTERM and SIGKILL after its preStop hook
/// (kuberuntime_manager.go, minimumGracePeriodInSeconds).
const LEAST_GRACE: Duration = Duration::from_secs(2);

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

/// What a run belongs to.
pub struct Of {
    /// The container's index in the pod's spec.
    pub index: usize,
    /// Which run of it.
    pub restart: u32,
    /// The pod, for events.
    pub pod: Pod,
    /// The container's name.
    pub container: String,
    /// What is done before its SIGTERM.
    pub pre_stop: Option<Hook>,
}

/// Starts `spec`, if there is one, follows the supervisor and tells the worker what happens. Returns where to send orders,
/// and how others join the run.
pub fn follow(
    context: Arc<Context>,
    supervisor: Supervisor,
    of: Of,
    spec: Option<ContainerSpec>,
    told: mpsc::Sender<Told>,
) -> (mpsc::Sender<Order>, RunHandle) {
    let (orders_tx, orders) = mpsc::channel(ORDERS);
    let (handle, requests) = RunHandle::new(supervisor.pid());
    let run = Run {
        context,
        supervisor,
        of,
        told,
        orders,
        requests,
        handle: handle.clone(),
        joined: Joined::default(),
        hook: None,
        ordered: false,
    };
    tokio::spawn(run.live(spec));
    (orders_tx, handle)
}

/// A preStop hook that runs.
struct Running {
    end: Pin<Box<dyn Future<Output = Result<(), String>> + Send>>,
    /// When it is waited for no longer.
    until: Instant,
    /// When the grace is over, of which the hook is a part.
    kill_at: Instant,
}

struct Run {
    context: Arc<Context>,
    supervisor: Supervisor,
    of: Of,
    told: mpsc::Sender<Told>,
    orders: mpsc::Receiver<Order>,
    requests: mpsc::Receiver<Request>,
    handle: RunHandle,
    joined: Joined,
    hook: Option<Running>,
    /// Whether its end was asked for.
    ordered: bool,
}

impl Run {
    async fn live(mut self, spec: Option<ContainerSpec>) {
        if let Some(spec) = spec {
            self.supervisor.start(spec).await;
        }
        let mut drain = self.context.drain.clone();
        loop {
            let event = tokio::select! {
                biased;
                order = self.orders.recv() => {
                    match order {
                        Some(Order::Terminate(grace)) => self.terminate(grace).await,
                        Some(Order::Acknowledge) => {}
                        // Without a worker nobody waits for this container: it ends as if its pod were deleted.
                        None => return,
                    }
                    continue;
                }
                event = self.supervisor.next() => event,
                Some(request) = self.requests.recv() => {
                    self.joined.ask(&mut self.supervisor, request).await;
                    continue;
                }
                result = hook_end(&mut self.hook) => {
                    self.hooked(result).await;
                    continue;
                }
                moved = next_drain(&mut drain) => {
                    self.supervisor.set_drain(moved).await;
                    continue;
                }
            };
            let Some(event) = self.joined.take(event) else { continue };
            match event {
                Event::Output { stderr, line } => {
                    if let Some(output) = &self.context.output {
                        let pod = self.of.pod.metadata.name.clone().unwrap_or_default();
                        let container = self.of.container.clone();
                        // A terminal that is gone takes no more lines; the log has them all.
                        let _ = output.send(OutputLine { pod, container, stderr, line }).await;
                    }
                    continue;
                }
                Event::Ended(_) if !self.ordered && !self.context.policy.hold_end.is_zero() => {
                    let mut draining = self.context.draining.clone();
                    hold(self.context.policy.hold_end, &mut draining, &mut self.orders).await;
                }
                _ => {}
            }
            let over = matches!(event, Event::Ended(_) | Event::StartFailed(_) | Event::Lost { .. });
            if over {
                // Nobody joins it any more; who waits for a program in it is told.
                self.requests.close();
                while self.requests.try_recv().is_ok() {}
                self.joined = Joined::default();
                self.hook = None;
            }
            if self.told.send((self.of.index, self.of.restart, event)).await.is_err() {
                return;
            }
            if over {
                break;
            }
        }
        while let Some(order) = self.orders.recv().await {
            if matches!(order, Order::Acknowledge) {
                self.supervisor.acknowledge().await;
                return;
            }
        }
    }

    /// The end was asked for: a preStop hook first, within the grace.
    async fn terminate(&mut self, grace: Duration) {
        let first = !std::mem::replace(&mut self.ordered, true);
        let now = Instant::now();
        let kill_at = now + grace;
        // A drain has no time to give away: what the program has after its hook is a part of the grace.
        let draining = *self.context.draining.borrow();
        let until = if draining { now + grace.saturating_sub(LEAST_GRACE) } else { kill_at };
        if let Some(hook) = &mut self.hook {
            hook.kill_at = hook.kill_at.min(kill_at);
            hook.until = hook.until.min(until);
            return;
        }
        match self.of.pre_stop.take() {
            Some(hook) if first && until > now => {
                let end = Box::pin(hook.run(self.handle.clone()));
                self.hook = Some(Running { end, until, kill_at });
            }
            _ => self.supervisor.terminate(grace).await,
        }
    }

    /// The hook is over, or the grace is.
    async fn hooked(&mut self, result: Result<(), String>) {
        let Some(hook) = self.hook.take() else { return };
        if let Err(problem) = result {
            let text = format!("PreStopHook failed: {problem}");
            let name = Some(self.of.container.as_str());
            self.context.events.record(&self.of.pod, name, Kind::Warning, "FailedPreStopHook", &text);
        }
        let left = hook.kill_at.saturating_duration_since(Instant::now());
        let least = if *self.context.draining.borrow() { Duration::ZERO } else { LEAST_GRACE };
        self.supervisor.terminate(left.max(least)).await;
    }
}

/// Waits for the hook's end, as long as the grace leaves it.
async fn hook_end(hook: &mut Option<Running>) -> Result<(), String> {
    let Some(Running { end, until, .. }) = hook else { return std::future::pending().await };
    match tokio::time::timeout_at(*until, end).await {
        Ok(result) => result,
        Err(_) => Err("it took longer than the grace leaves it".to_owned()),
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
