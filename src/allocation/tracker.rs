//! Follows the deadline: asks the batch system again and again, and tells whoever listens when it moved.
//!
//! A limit may move in both directions at any time (`scontrol update`, qalter, preemption), and no batch system tells
//! its jobs. It is asked about every two minutes, at once when its warning signal came or the clock jumped (in turn, where
//! that happened to many pilots), and when somebody wants to know. While it does not answer, what was known holds; nothing here ever ends the pilot.

use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::time::{Instant, MissedTickBehavior};
use tracing::{info, warn};

use super::ask::{Answer, AskError, Question};
use super::deadline::{Answering, Deadline, Known, clock_gap};
use super::environment::Environment;
use super::pace::{POLL, Pace, first_delay, next_delay};
use super::{Allocation, command, report};

/// How often the clock is looked at for gaps.
const TICK: Duration = Duration::from_secs(5);

/// The least time between two questions, however many signals come: PBS itself makes a user wait 200 ms who asks twice
/// in one second.
const SPACING: Duration = Duration::from_secs(1);

/// No interval is ever shorter, whatever a setting says: nothing may spin.
const SHORTEST_POLL: Duration = Duration::from_millis(50);

/// How many may wait for an answer at a time: the drain and the pilot's own settings are two.
const MAX_WAITING: usize = 16;

/// What a tracker goes by.
#[derive(Clone, Debug)]
pub struct TrackerSettings {
    /// `--walltime`, counted from the first start.
    pub walltime: Option<Duration>,
    /// When the pilot was started for the first time.
    pub first_start: SystemTime,
    /// When a credential ends that cannot be renewed.
    pub credential_expiry: Option<SystemTime>,
    /// `--signal-lead`: what passes between the batch system's SIGUSR1 and the end.
    pub signal_lead: Option<Duration>,
    /// Between two questions of the job's first task.
    pub poll: Duration,
    /// How long one command of the batch system may take.
    pub command_limit: Duration,
    /// How often the clock is looked at for gaps.
    pub tick: Duration,
    /// That clock.
    pub wall: fn() -> SystemTime,
}

impl TrackerSettings {
    /// No end but the batch system's, a question every two minutes.
    #[must_use]
    pub fn new(first_start: SystemTime) -> Self {
        Self {
            walltime: None,
            first_start,
            credential_expiry: None,
            signal_lead: None,
            poll: POLL,
            command_limit: command::LIMIT,
            tick: TICK,
            wall: SystemTime::now,
        }
    }

    /// When the walltime of ours is over.
    fn walltime_end(&self) -> Option<SystemTime> {
        self.first_start.checked_add(self.walltime?)
    }
}

/// The deadline as it is known right after detection, without a question.
#[must_use]
pub fn first_deadline(
    allocation: &Allocation,
    settings: &TrackerSettings,
    now: SystemTime,
) -> Option<Deadline> {
    first_known(allocation, settings, now).deadline()
}

fn first_known(allocation: &Allocation, settings: &TrackerSettings, now: SystemTime) -> Known {
    Known::new(allocation.limit.clone(), now, settings.walltime_end(), settings.credential_expiry)
}

/// Tells a tracker to ask.
#[derive(Clone, Debug)]
pub struct TrackerHandle {
    shared: Arc<Shared>,
    waiting: mpsc::Sender<oneshot::Sender<Option<Deadline>>>,
}

#[derive(Debug, Default)]
struct Shared {
    wake: Notify,
    signalled: AtomicBool,
    /// What was told of the credential's end, until the task has taken it.
    credential: Mutex<Option<Option<SystemTime>>>,
}

impl TrackerHandle {
    /// Asks the batch system at once.
    pub fn ask_now(&self) {
        self.shared.wake.notify_one();
    }

    /// The batch system's warning signal came: asks at once, and where the batch system tells no end, the deadline is
    /// now + `signal_lead`.
    pub fn signalled(&self) {
        self.shared.signalled.store(true, Ordering::Release);
        self.shared.wake.notify_one();
    }

    /// The credential ends then, and could not be renewed; `None`: it was renewed after all.
    pub fn credential_expires(&self, at: Option<SystemTime>) {
        *self.shared.credential.lock().unwrap_or_else(PoisonError::into_inner) = Some(at);
        self.shared.wake.notify_one();
    }

    /// Asks at once and waits for the answer: the deadline after it. None when there is no deadline, and when no answer
    /// came to a question that was put after this call: what was known before may be older than a kill that is under way.
    pub async fn ask_and_wait(&self, limit: Duration) -> Option<Deadline> {
        let (answer, answered) = oneshot::channel();
        // Full: so many others wait already that this is no pilot's drain.
        self.waiting.try_send(answer).ok()?;
        tokio::time::timeout(limit, answered).await.ok()?.ok()?
    }
}

/// The task that follows the deadline. It ends when no receiver and no handle is left.
#[derive(Debug)]
pub struct Tracker {
    question: Question,
    env: Environment,
    settings: TrackerSettings,
    pace: Pace,
    known: Known,
    published: watch::Sender<Option<Deadline>>,
    shared: Arc<Shared>,
    waiting: mpsc::Receiver<oneshot::Sender<Option<Deadline>>>,
}

type Asking = Pin<Box<dyn Future<Output = Result<Answer, AskError>> + Send>>;

impl Tracker {
    /// Starts to follow the deadline. The channel holds what is known already; it is marked as changed when the
    /// deadline, what tells it, or whether it is confirmed changes.
    ///
    /// It must be called within a Tokio runtime.
    pub fn spawn(
        allocation: &Allocation,
        env: Environment,
        settings: TrackerSettings,
    ) -> (watch::Receiver<Option<Deadline>>, TrackerHandle) {
        let known = first_known(allocation, &settings, SystemTime::now());
        let (published, deadline) = watch::channel(known.deadline());
        let (sender, waiting) = mpsc::channel(MAX_WAITING);
        let shared = Arc::new(Shared::default());
        let handle = TrackerHandle { shared: shared.clone(), waiting: sender };
        let pace = Pace::of(allocation, settings.poll.max(SHORTEST_POLL));
        let mut told = SystemTime::now().duration_since(settings.first_start).ok();
        if let super::TimeLimit::Unknown(reason) = &allocation.limit.value {
            warn_lost(reason, known.deadline().as_ref());
            told = None;
        }
        if !matches!(allocation.question, Question::Slurm { .. }) {
            // Torque's PBS_WALLTIME is counted from our own start, which is later than the job's.
            told = None;
        }
        let question = allocation.question.clone();
        let tracker = Self { question, env, settings, pace, known, published, shared, waiting };
        let first = if allocation.asked { tracker.delay(0, 0) } else { first_delay(&pace, told) };
        tokio::spawn(tracker.follow(first));
        (deadline, handle)
    }

    async fn follow(mut self, first: Duration) {
        let nobody = self.question == Question::Nobody;
        let mut count = 0;
        let mut next = Instant::now() + first;
        let mut last_asked: Option<Instant> = None;
        let mut asking: Option<Asking> = None;
        // Those who wait for the question that is under way, and those who came after it was put.
        let (mut now_waiting, mut later_waiting) = (Vec::new(), Vec::new());
        let mut again = false;
        let (every, wall) = (self.settings.tick.max(SHORTEST_POLL), self.settings.wall);
        let mut tick = tokio::time::interval(every);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut before = wall();

        loop {
            let wanted = tokio::select! {
                answer = async { match asking.as_mut() { Some(asking) => asking.await, None => std::future::pending().await } } => {
                    asking = None;
                    let answered = self.take(answer);
                    for waiting in now_waiting.drain(..) {
                        answer_to(waiting, answered.then_some(&self.known));
                    }
                    count += 1;
                    next = Instant::now() + self.delay(count, self.known.failures());
                    std::mem::take(&mut again).then_some(Duration::ZERO)
                }
                () = tokio::time::sleep_until(next), if asking.is_none() && !nobody => {
                    now_waiting.append(&mut later_waiting);
                    last_asked = Some(Instant::now());
                    let (question, env, limit) =
                        (self.question.clone(), self.env.clone(), self.settings.command_limit);
                    asking = Some(Box::pin(async move { question.ask(&env, limit).await }));
                    None
                }
                _ = tick.tick() => {
                    let now = wall();
                    let gap = clock_gap(before, now, every);
                    if gap {
                        info!(
                            from = report::format_time(before),
                            to = report::format_time(now),
                            "the clock jumped: the host was suspended, this process was stopped, or the clock was set"
                        );
                    }
                    before = now;
                    gap.then(|| self.turn(count))
                }
                () = self.shared.wake.notified() => {
                    let credential = self.shared.credential.lock().unwrap_or_else(PoisonError::into_inner).take();
                    if let Some(at) = credential {
                        self.known.credential(at);
                        self.publish();
                    }
                    if self.shared.signalled.swap(false, Ordering::AcqRel) {
                        self.known.signalled(SystemTime::now(), self.settings.signal_lead);
                        self.publish();
                        Some(self.turn(count))
                    } else {
                        Some(Duration::ZERO)
                    }
                }
                Some(waiting) = self.waiting.recv(), if later_waiting.len() < MAX_WAITING => {
                    if nobody { answer_to(waiting, Some(&self.known)) } else { later_waiting.push(waiting) }
                    Some(Duration::ZERO)
                }
                () = self.published.closed() => return,
            };
            if wanted.is_some() && asking.is_some() {
                again = true;
            } else if let Some(turn) = wanted {
                let now = Instant::now();
                let spacing = SPACING.min(self.pace.poll);
                next = next.min(last_asked.map_or(now, |last| now.max(last + spacing)) + turn);
            }
        }
    }

    /// How long to wait with a question that all pilots of the job and its array want to put now: they got the same signal,
    /// or were suspended together.
    fn turn(&self, count: u64) -> Duration {
        self.pace.turn_to_ask(count, self.left())
    }

    fn left(&self) -> Option<Duration> {
        Some(self.known.deadline()?.at.duration_since(SystemTime::now()).unwrap_or_default())
    }

    fn delay(&self, count: u64, failures: u32) -> Duration {
        next_delay(&self.pace, count, failures, self.left())
    }

    /// Takes the answer, or its want; whether there was one.
    fn take(&mut self, answer: Result<Answer, AskError>) -> bool {
        let answered = answer.is_ok();
        match answer {
            Ok(answer) => {
                let source = answer.source.clone();
                if self.known.answered(answer, SystemTime::now()) == Answering::Regained {
                    info!(source, "the batch system tells the job's time limit again");
                }
            }
            Err(error) => {
                if self.known.unanswered() == Answering::Lost {
                    warn_lost(&error.to_string(), self.known.deadline().as_ref());
                }
            }
        }
        self.publish();
        answered
    }

    fn publish(&self) {
        let deadline = self.known.deadline();
        self.published.send_if_modified(|published| {
            let told = |deadline: &Option<Deadline>| {
                deadline.as_ref().map(|d| (d.at, d.source.clone(), d.confirmed))
            };
            let moved = published.as_ref().map(|d| d.at) != deadline.as_ref().map(|d| d.at);
            let changed = told(published) != told(&deadline);
            if moved {
                let text = |deadline: &Option<Deadline>| {
                    deadline.as_ref().map_or("none".to_owned(), |d| report::format_time(d.at))
                };
                let source = deadline.as_ref().map_or("", |d| d.source.as_str());
                info!(from = text(published), to = text(&deadline), source, "the deadline moved");
            }
            *published = deadline;
            changed
        });
    }
}

fn answer_to(waiting: oneshot::Sender<Option<Deadline>>, known: Option<&Known>) {
    // Whoever asked has given up: the answer is in the watch channel.
    let _ = waiting.send(known.and_then(Known::deadline));
}

/// Says once that the batch system does not tell the limit, and what follows from that.
fn warn_lost(reason: &str, deadline: Option<&Deadline>) {
    match deadline {
        Some(deadline) => warn!(
            reason,
            deadline = report::format_time(deadline.at),
            source = deadline.source,
            "the batch system does not tell the job's time limit: the last known deadline holds; it is asked again"
        ),
        None => warn!(
            reason,
            "the batch system does not tell the job's time limit, and no deadline is known: the job may be killed \
             without a drain; give --walltime, or --signal-lead with the batch system's warning signal; it is asked again"
        ),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU64;

    use super::*;
    use crate::allocation::stand_in::StandIn;
    use crate::allocation::{DetectSettings, TimeLimit, detect};

    /// A job whose squeue tells what the file `left` holds and counts its questions.
    async fn job(left: &str) -> (StandIn, Environment, Allocation) {
        let stand_in = StandIn::new();
        tell(&stand_in, left);
        stand_in.rewrite(
            "squeue",
            r#"cd "$(dirname "$0")"; echo asked >>count; read -r left <left || exit 1
            [ "$left" = hang ] && exec sleep 60
            echo "7 $left""#,
        );
        let env = stand_in.environment([("SLURM_JOB_ID", "7")]);
        let allocation = detect(&env, &DetectSettings::new(SystemTime::now())).await;
        (stand_in, env, allocation)
    }

    fn tell(stand_in: &StandIn, left: &str) {
        let (new, file) = (stand_in.path().join("new"), stand_in.path().join("left"));
        std::fs::write(&new, format!("{left}\n")).unwrap();
        std::fs::rename(new, file).unwrap();
    }

    fn settings(poll: u64) -> TrackerSettings {
        let now = SystemTime::now();
        let command_limit = Duration::from_secs(5);
        TrackerSettings { poll: Duration::from_millis(poll), command_limit, ..TrackerSettings::new(now) }
    }

    fn left(deadline: Option<&Deadline>) -> u64 {
        deadline.unwrap().at.duration_since(SystemTime::now()).unwrap_or_default().as_secs()
    }

    async fn until(
        channel: &mut watch::Receiver<Option<Deadline>>,
        holds: impl FnMut(&Option<Deadline>) -> bool,
    ) -> Option<Deadline> {
        let wait = channel.wait_for(holds);
        tokio::time::timeout(Duration::from_secs(20), wait).await.unwrap().unwrap().clone()
    }

    #[tokio::test]
    async fn a_changed_limit_is_noticed_within_the_poll_interval() {
        let (stand_in, env, allocation) = job("10:00").await;
        let (mut channel, _handle) = Tracker::spawn(&allocation, env, settings(100));
        assert!((590..=600).contains(&left(channel.borrow().as_ref())));
        tell(&stand_in, "05:00");
        until(&mut channel, |d| left(d.as_ref()) < 400).await;
        tell(&stand_in, "1-00:00:00");
        until(&mut channel, |d| left(d.as_ref()) > 80_000).await;
        tell(&stand_in, "UNLIMITED");
        until(&mut channel, Option::is_none).await;
    }

    #[tokio::test]
    async fn what_was_known_holds_while_nobody_answers() {
        let (stand_in, env, allocation) = job("10:00").await;
        let (mut channel, _handle) = Tracker::spawn(&allocation, env, settings(100));
        for answer in ["NOT_SET", "INVALID", "soon"] {
            tell(&stand_in, answer);
            let deadline = until(&mut channel, |d| !d.as_ref().unwrap().confirmed).await;
            assert!((500..=600).contains(&left(deadline.as_ref())), "{answer}");
            tell(&stand_in, "10:00");
            until(&mut channel, |d| d.as_ref().unwrap().confirmed).await;
        }
        std::fs::remove_file(stand_in.path().join("squeue")).unwrap();
        until(&mut channel, |d| !d.as_ref().unwrap().confirmed).await;
    }

    #[tokio::test]
    async fn a_credential_that_was_not_renewed_is_a_deadline_until_it_is() {
        let (_stand_in, env, allocation) = job("10:00").await;
        let (mut channel, handle) = Tracker::spawn(&allocation, env, settings(3_600_000));
        handle.credential_expires(SystemTime::now().checked_add(Duration::from_secs(60)));
        let deadline = until(&mut channel, |d| left(d.as_ref()) <= 60).await;
        assert_eq!(deadline.unwrap().source, "expiry of the credential");
        handle.credential_expires(None);
        until(&mut channel, |d| left(d.as_ref()) > 500).await;
    }

    #[tokio::test]
    async fn a_signal_asks_at_once() {
        let (stand_in, env, allocation) = job("10:00").await;
        let (mut channel, handle) = Tracker::spawn(&allocation, env, settings(3_600_000));
        tell(&stand_in, "01:00");
        handle.signalled();
        until(&mut channel, |d| left(d.as_ref()) <= 60).await;
        tell(&stand_in, "20:00");
        assert!(left(handle.ask_and_wait(Duration::from_secs(10)).await.as_ref()) > 1000);
    }

    #[tokio::test]
    async fn a_clock_that_jumps_asks_at_once() {
        static AHEAD: AtomicU64 = AtomicU64::new(0);
        fn wall() -> SystemTime {
            SystemTime::now() + Duration::from_secs(AHEAD.load(Ordering::Relaxed))
        }
        let (stand_in, env, allocation) = job("10:00").await;
        let tick = Duration::from_millis(50);
        let settings = TrackerSettings { tick, wall, ..settings(3_600_000) };
        let (mut channel, _handle) = Tracker::spawn(&allocation, env, settings);
        let questions = || std::fs::read_to_string(stand_in.path().join("count")).unwrap().lines().count();
        tell(&stand_in, "05:00");
        tokio::time::sleep(4 * tick).await;
        assert_eq!(questions(), 1, "the one of detection: a clock that goes on evenly asks nothing");
        // The host was suspended.
        AHEAD.store(3600, Ordering::Relaxed);
        until(&mut channel, |d| left(d.as_ref()) <= 300).await;
        // The clock was set back.
        tell(&stand_in, "20:00");
        AHEAD.store(0, Ordering::Relaxed);
        until(&mut channel, |d| left(d.as_ref()) > 1000).await;
        assert_eq!(questions(), 3);
    }

    #[tokio::test]
    async fn a_signal_is_an_end_where_squeue_hangs_and_waiting_is_bounded() {
        let (stand_in, env, mut allocation) = job("10:00").await;
        allocation.limit.value = TimeLimit::Unknown("for a test".into());
        tell(&stand_in, "hang");
        let settings = TrackerSettings { signal_lead: Some(Duration::from_secs(90)), ..settings(3_600_000) };
        let (mut channel, handle) = Tracker::spawn(&allocation, env, settings);
        assert!(channel.borrow().is_none());
        handle.ask_now();
        tokio::time::sleep(Duration::from_millis(200)).await;
        // While the question is under way.
        handle.signalled();
        let deadline = until(&mut channel, Option::is_some).await;
        assert!((80..=90).contains(&left(deadline.as_ref())));
        let began = Instant::now();
        // What was known before is not the answer.
        assert_eq!(handle.ask_and_wait(Duration::from_millis(300)).await, None);
        assert!(began.elapsed() < Duration::from_secs(2));
    }

    #[tokio::test]
    async fn a_question_without_an_answer_leaves_who_asked_without_one() {
        let (stand_in, env, allocation) = job("10:00").await;
        let (channel, handle) = Tracker::spawn(&allocation, env, settings(3_600_000));
        for answer in ["INVALID", "soon"] {
            tell(&stand_in, answer);
            assert_eq!(handle.ask_and_wait(Duration::from_secs(10)).await, None, "{answer}");
            // For everybody else it holds.
            assert!(left(channel.borrow().as_ref()) > 500, "{answer}");
        }
    }

    #[tokio::test]
    async fn a_question_that_was_under_way_is_not_the_answer() {
        let (stand_in, env, allocation) = job("10:00").await;
        // The answer is what was true when it was asked.
        stand_in.rewrite(
            "squeue",
            r#"cd "$(dirname "$0")"; read -r left <left; touch asked; sleep 0.5; echo "7 $left""#,
        );
        let (_channel, handle) = Tracker::spawn(&allocation, env, settings(3_600_000));
        handle.ask_now();
        while !stand_in.path().join("asked").exists() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        tell(&stand_in, "01:00");
        assert!(left(handle.ask_and_wait(Duration::from_secs(10)).await.as_ref()) <= 60);
    }

    #[tokio::test]
    async fn many_signals_make_few_questions() {
        let (stand_in, env, allocation) = job("10:00").await;
        let (_channel, handle) = Tracker::spawn(&allocation, env, settings(3_600_000));
        for _ in 0..50 {
            handle.signalled();
            handle.ask_now();
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let count = std::fs::read_to_string(stand_in.path().join("count")).unwrap().lines().count();
        assert!((2..=4).contains(&count), "{count} questions");
    }

    #[tokio::test]
    async fn without_a_batch_system_the_walltime_is_the_end() {
        let env = Environment::from_pairs([("PATH", "/nonexistent")]);
        let allocation = detect(&env, &DetectSettings::new(SystemTime::now())).await;
        let settings = TrackerSettings { walltime: Some(Duration::from_secs(60)), ..settings(100) };
        let expected = settings.first_start + Duration::from_secs(60);
        let (channel, handle) = Tracker::spawn(&allocation, env, settings);
        let deadline = handle.ask_and_wait(Duration::from_secs(5)).await.unwrap();
        assert_eq!((deadline.at, deadline.source.as_str()), (expected, "--walltime"));
        assert!(deadline.confirmed);
        assert_eq!(channel.borrow().as_ref(), Some(&deadline));
    }
}
