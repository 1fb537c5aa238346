//! One run of one container: from its supervisor's first word to its last.

use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use k8s_openapi::api::core::v1::Pod;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use super::spec;
use super::termination::LastWord;
use crate::container::{ContainerSpec, End, Event, StartError, Supervisor};
use crate::pod::context::{Context, OutputLine};
use crate::pod::events::Kind;
use crate::pod::handler::Hook;
use crate::pod::session::{Joined, Request, RunHandle};

/// The least that a kubelet leaves a container between SIGTERM and SIGKILL, however short its grace is or whatever its
/// preStop hook has taken of it (kuberuntime_manager.go, minimumGracePeriodInSeconds). A drain has no time to give away.
const LEAST_GRACE: Duration = Duration::from_secs(2);

/// SIGKILL's number (signal(7)).
const KILLED: i32 = 9;

/// What a run is told.
#[derive(Debug)]
pub enum Order {
    /// The preStop hook and SIGTERM, SIGKILL after this long. A later order may only shorten it.
    Terminate {
        /// Between this moment and SIGKILL.
        grace: Duration,
        /// Whether SIGTERM waits for [`Order::Turn`], at most as long as the grace.
        waits: bool,
    },
    /// What it waited for has ended.
    Turn,
    /// SIGKILL, at once: its memory is needed.
    Kill,
    /// The run's end is recorded: the supervisor may go.
    Acknowledge,
}

/// What a run tells: which container (its index in the worker), which run of it, and what happened.
pub type Told = (usize, u32, Happened);

/// What happened to a run.
#[derive(Debug)]
pub enum Happened {
    /// It runs, and its postStart hook has succeeded.
    Started(SystemTime),
    /// It is over, with its termination message, and whether it was killed for its memory.
    Ended(End, String, bool),
    /// Its program never began.
    StartFailed(StartError),
    /// Its supervisor is gone.
    Lost(String),
}

/// Orders that may wait. A run gets a handful in its life.
const ORDERS: usize = 16;

/// What a run belongs to.
pub struct Of {
    /// The container's index in the worker.
    pub index: usize,
    /// Which run of it.
    pub restart: u32,
    /// The pod, for events.
    pub pod: Pod,
    /// The container's name.
    pub container: String,
    /// What is done once it has started.
    pub post_start: Option<Hook>,
    /// What is done before its SIGTERM.
    pub pre_stop: Option<Hook>,
    /// Where its last word is.
    pub last_word: Option<LastWord>,
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
        post_start: None,
        started: None,
        ending: None,
        sent: false,
        killed: false,
        over_limit: None,
    };
    tokio::spawn(run.live(spec));
    (orders_tx, handle)
}

type Hooked = Pin<Box<dyn Future<Output = Result<(), String>> + Send + Sync>>;

/// The time between the order to end and SIGTERM.
struct Ending {
    /// A preStop hook that runs.
    hook: Option<Hooked>,
    /// Whether it waits for others to end first.
    waits: bool,
    /// When SIGTERM waits no longer.
    until: Instant,
    /// When the grace is over, of which all this is a part.
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
    post_start: Option<Hooked>,
    /// When it started, until its postStart hook has succeeded.
    started: Option<SystemTime>,
    /// Its end was asked for, and SIGTERM was not sent yet.
    ending: Option<Ending>,
    /// Whether it was.
    sent: bool,
    /// Whether it was killed, with nothing before.
    killed: bool,
    /// Why it is killed, where it has more memory than it may.
    over_limit: Option<String>,
}

impl Run {
    async fn live(mut self, spec: Option<ContainerSpec>) {
        let spec_cpus = spec.as_ref().map(|spec| spec.cpus.clone()).unwrap_or_default();
        if let Some(spec) = spec {
            // An earlier run's message is not this one's.
            if let Some(word) = self.of.last_word.as_ref().filter(|_| self.of.restart > 0) {
                word.clear().await;
            }
            self.supervisor.start(spec).await;
        }
        let mut drain = self.context.drain.clone();
        let mut placement = self.context.shares.placement.clone();
        placement.mark_changed();
        // A run of before a crash of the pilot may be elsewhere than it should be by now.
        let mut placed = (placement.borrow().renewed(), spec_cpus);
        loop {
            let event = tokio::select! {
                biased;
                order = self.orders.recv() => {
                    match order {
                        Some(Order::Terminate { grace, waits }) => self.terminate(grace, waits).await,
                        Some(Order::Turn) => self.turn().await,
                        Some(Order::Kill) => {
                            (self.ending, self.sent, self.killed) = (None, true, true);
                            self.supervisor.kill().await;
                        }
                        Some(Order::Acknowledge) => {}
                        // Without a worker nobody waits for this container: it ends as if its pod were deleted.
                        None => return,
                    }
                    continue;
                }
                event = self.supervisor.next() => event,
                Some(request) = self.requests.recv() => {
                    if let Request::OutOfMemory { message } = &request {
                        self.over_limit = Some(message.clone());
                    }
                    self.joined.ask(&mut self.supervisor, request).await;
                    continue;
                }
                result = hook_end(&mut self.post_start) => {
                    self.post_started(result).await;
                    if !self.tell_started().await {
                        return;
                    }
                    continue;
                }
                step = next_step(&mut self.ending) => {
                    self.step(step).await;
                    continue;
                }
                moved = next_drain(&mut drain) => {
                    self.supervisor.set_drain(moved).await;
                    continue;
                }
                Ok(()) = placement.changed() => {
                    let renewed = placement.borrow_and_update().renewed();
                    let now = (renewed, spec::cpus(&self.context, &self.of.pod, &self.of.container));
                    if now != placed {
                        self.supervisor.set_cpus(now.1.clone()).await;
                        placed = now;
                    }
                    continue;
                }
            };
            let Some(event) = self.joined.take(event) else { continue };
            match event {
                Event::Output { stderr, line } => self.show(stderr, line).await,
                Event::Started { at, .. } => {
                    self.started = Some(at);
                    match self.of.post_start.take() {
                        Some(hook) if !self.is_ordered() => {
                            self.post_start = Some(Box::pin(hook.run(self.handle.clone())));
                        }
                        _ => {
                            if !self.tell_started().await {
                                return;
                            }
                        }
                    }
                }
                Event::Ended(_) | Event::StartFailed(_) | Event::Lost { .. } => {
                    if self.over(event).await {
                        break;
                    }
                    return;
                }
                Event::ExecEnded { .. } | Event::ExecFailed { .. } => {}
            }
        }
        while let Some(order) = self.orders.recv().await {
            if matches!(order, Order::Acknowledge) {
                self.supervisor.acknowledge().await;
                return;
            }
        }
    }

    /// A line for the terminal of `play`.
    async fn show(&self, stderr: bool, line: String) {
        if let Some(output) = &self.context.output {
            let pod = self.of.pod.metadata.name.clone().unwrap_or_default();
            let container = self.of.container.clone();
            // A terminal that is gone takes no more lines; the log has them all.
            let _ = output.send(OutputLine { pod, container, stderr, line }).await;
        }
    }

    async fn tell(&self, happened: Happened) -> bool {
        self.told.send((self.of.index, self.of.restart, happened)).await.is_ok()
    }

    /// Tells that it runs, once; whether anybody listens.
    async fn tell_started(&mut self) -> bool {
        match self.started.take() {
            Some(at) => self.tell(Happened::Started(at)).await,
            None => true,
        }
    }

    /// The run is over: tells how; whether anybody listens.
    async fn over(&mut self, event: Event) -> bool {
        let ended = matches!(event, Event::Ended(_));
        if ended && !self.is_ordered() && !self.context.policy.hold_end.is_zero() {
            let mut draining = self.context.draining.clone();
            hold(self.context.policy.hold_end, &mut draining, &mut self.orders).await;
        }
        // Nobody joins it any more; who waits for a program in it is told.
        self.requests.close();
        while self.requests.try_recv().is_ok() {}
        self.joined = Joined::default();
        (self.ending, self.post_start) = (None, None);
        let happened = match event {
            Event::Ended(end) => {
                let mut message = match self.of.last_word.take() {
                    Some(word) => word.read(end.exit_code).await,
                    None => String::new(),
                };
                let by_us = self.over_limit.take().filter(|_| end.signal == Some(KILLED));
                // In a cgroup of its own a kill is the container's in any case.
                let out_of_memory = by_us.is_some()
                    || end.oom_killed && end.exit_code == 128 + KILLED
                    || !self.sent && end.exit_code == 128 + KILLED && self.context.kills.explain();
                if let Some(why) = by_us.filter(|_| message.is_empty()) {
                    message = why;
                }
                Happened::Ended(end, message, out_of_memory)
            }
            Event::StartFailed(error) => Happened::StartFailed(error),
            Event::Lost { message } => Happened::Lost(message),
            _ => return true,
        };
        // What ended during its postStart hook did run.
        self.tell_started().await && self.tell(happened).await
    }

    fn is_ordered(&self) -> bool {
        self.sent || self.ending.is_some()
    }

    /// The end was asked for: a preStop hook first, and others before it, within the grace.
    async fn terminate(&mut self, grace: Duration, waits: bool) {
        if self.killed {
            return;
        }
        if self.sent {
            return self.supervisor.terminate(grace.max(self.least())).await;
        }
        let now = Instant::now();
        let kill_at = now + grace;
        // A drain has no time to give away: what the program has after its hook is a part of the grace.
        let draining = *self.context.draining.borrow();
        let until = if draining { now + grace.saturating_sub(LEAST_GRACE) } else { kill_at };
        match &mut self.ending {
            Some(ending) => {
                ending.kill_at = ending.kill_at.min(kill_at);
                ending.until = ending.until.min(until);
                ending.waits &= waits;
            }
            None => {
                // A kubelet's pod worker stops waiting for it too.
                self.post_start = None;
                let hook = self.of.pre_stop.take().filter(|_| until > now);
                let hook = hook.map(|hook| Box::pin(hook.run(self.handle.clone())) as Hooked);
                self.ending = Some(Ending { hook, waits, until, kill_at });
            }
        }
        self.proceed(false).await;
    }

    async fn turn(&mut self) {
        if let Some(ending) = &mut self.ending {
            ending.waits = false;
        }
        self.proceed(false).await;
    }

    /// The preStop hook is over, or the time for it is.
    async fn step(&mut self, step: Step) {
        let over = matches!(step, Step::TimeOver);
        let problem = match (step, &mut self.ending) {
            (Step::Hooked(result), Some(ending)) => {
                ending.hook = None;
                result.err()
            }
            (Step::TimeOver, Some(ending)) => {
                ending.hook.take().map(|_| "it took longer than the grace leaves it".to_owned())
            }
            (_, None) => None,
        };
        if let Some(problem) = problem {
            self.warn("FailedPreStopHook", &format!("PreStopHook failed: {problem}"));
        }
        self.proceed(over).await;
    }

    /// Sends SIGTERM when nothing stands before it, or at any rate when `now`.
    async fn proceed(&mut self, now: bool) {
        let Some(ending) = self.ending.take_if(|ending| now || ending.hook.is_none() && !ending.waits) else {
            return;
        };
        self.sent = true;
        let left = ending.kill_at.saturating_duration_since(Instant::now());
        self.supervisor.terminate(left.max(self.least())).await;
    }

    /// What the program is owed after SIGTERM at any rate.
    fn least(&self) -> Duration {
        if *self.context.draining.borrow() { Duration::ZERO } else { LEAST_GRACE }
    }

    /// The postStart hook is over. A container whose hook fails is ended.
    async fn post_started(&mut self, result: Result<(), String>) {
        self.post_start = None;
        let Err(problem) = result else { return };
        self.warn("FailedPostStartHook", &format!("PostStartHook failed: {problem}"));
        let name = Some(self.of.container.as_str());
        self.context.events.record(&self.of.pod, name, Kind::Normal, "Killing", "FailedPostStartHook");
        self.terminate(super::own_grace(&self.of.pod), false).await;
    }

    fn warn(&self, reason: &str, text: &str) {
        let name = Some(self.of.container.as_str());
        self.context.events.record(&self.of.pod, name, Kind::Warning, reason, text);
    }
}

/// What comes next on the way to SIGTERM.
enum Step {
    /// The preStop hook has ended.
    Hooked(Result<(), String>),
    /// The grace leaves no more time.
    TimeOver,
}

async fn next_step(ending: &mut Option<Ending>) -> Step {
    let Some(Ending { hook, until, .. }) = ending else { return std::future::pending().await };
    tokio::select! {
        result = hook_end(hook) => Step::Hooked(result),
        () = tokio::time::sleep_until(*until) => Step::TimeOver,
    }
}

async fn hook_end(hook: &mut Option<Hooked>) -> Result<(), String> {
    match hook {
        Some(hook) => hook.await,
        None => std::future::pending().await,
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
