//! A fleet of pilots on a simulated clock: their own planning functions, and no processes.
//!
//! What is counted is what an API server, a Slurm controller and each user's share of it get to see, second by second. Each
//! pilot's writes follow from its own plans alone, so they are run pilot by pilot; the questions of one user share a limiter, so
//! they are run in their order.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use jiriaf_pilot::allocation::pace::{POLL, Pace, first_delay, next_delay, seed};
use jiriaf_pilot::drain::{Leads, Stagger};
use jiriaf_pilot::node::Timing;
use jiriaf_pilot::node::alivetime::{Plan, Published, plan};
use jiriaf_pilot::node::leader::next_look;
use jiriaf_pilot::node::lease::{RENEW_EVERY, renewal_after};
use jiriaf_pilot::node::spread::Part;
use jiriaf_pilot::node::status::is_old;

/// slurmctld's limiter, where a site has it on (slurm.conf(5), rl_bucket_size and rl_refill_rate).
const BUCKET: f64 = 30.0;
const REFILL: f64 = 2.0;

/// How long squeue may take: then the pilot gives the question up, as one that the limiter holds back.
const COMMAND_LIMIT: f64 = 10.0;

/// From a pilot's start to its Node: an API server that is asked for its version, and what a kubelet asks.
const REGISTRATION: f64 = 0.2;

/// `--signal=USR1@180`, which Slurm sends up to half a minute early.
const SIGNAL: f64 = 180.0;

/// Seconds from 0, the maintenance's end.
type Seconds = f64;

/// splitmix64: chance that is the same for the same seed.
pub struct Chance(u64);

impl Chance {
    /// Begins with a seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// From 0 up to `most`.
    fn up_to(&mut self, most: f64) -> f64 {
        (self.next() >> 11) as f64 / (1_u64 << 53) as f64 * most
    }

    fn permille(&mut self) -> u32 {
        u32::try_from(self.next() % 1001).unwrap_or_default()
    }
}

/// Jobs of one kind, of one or several users. Each that ends is followed by another.
#[derive(Clone, Copy)]
pub struct Kind {
    /// How many users have such jobs.
    pub users: u32,
    /// How many each has at a time.
    pub jobs: u32,
    /// Nodes of each job, and pilots.
    pub nodes: u32,
    /// Its time limit.
    pub minutes: u32,
    /// All jobs of a user are one array, and start at the same moment; else they come one by one.
    pub array: bool,
    /// Within how many seconds after the maintenance all of them have started.
    pub fill: f64,
}

/// How the pilots are.
#[derive(Clone, Copy)]
pub struct Ways {
    /// As they are; else as they would be if nothing were spread.
    pub spread: bool,
    /// Whether slurmctld's limiter is on.
    pub limiter: bool,
}

/// What was counted, a number for each second.
pub struct Counts {
    seconds: usize,
    /// Nodes that were made.
    pub nodes: Vec<u32>,
    /// Nodes that were removed.
    pub removals: Vec<u32>,
    /// Writes of labels, annotations, statuses and cordons.
    pub writes: Vec<u32>,
    /// Writes of Leases.
    pub leases: Vec<u32>,
    /// Reads of the Node of a job's first pilot.
    pub looks: Vec<u32>,
    /// Questions to the batch system.
    pub questions: Vec<u32>,
    /// The same by user.
    pub users: BTreeMap<u32, Vec<u32>>,
    /// Those that the limiter refused, by user.
    pub refused: BTreeMap<u32, u32>,
    /// Pilots, second by second.
    pub pilots: Vec<u32>,
}

impl Counts {
    fn new(seconds: usize) -> Self {
        let none = vec![0; seconds];
        Self {
            seconds,
            nodes: none.clone(),
            removals: none.clone(),
            writes: none.clone(),
            leases: none.clone(),
            looks: none.clone(),
            questions: none.clone(),
            users: BTreeMap::new(),
            refused: BTreeMap::new(),
            pilots: none,
        }
    }
}

fn count(of: &mut [u32], at: Seconds) {
    // What comes after the end of the simulation is nothing that it tells.
    if let Some(second) = of.get_mut(at as usize) {
        *second += 1;
    }
}

/// What a second sees: on average, 99 of a hundred times, and at most.
pub struct Rate {
    /// On average.
    pub mean: f64,
    /// No more than this in 99 of 100 seconds.
    pub p99: u32,
    /// At most.
    pub peak: u32,
}

/// The rate of what was counted.
pub fn rate(of: &[u32]) -> Rate {
    let mut sorted = of.to_vec();
    sorted.sort_unstable();
    let mean = of.iter().map(|n| f64::from(*n)).sum::<f64>() / of.len() as f64;
    Rate { mean, p99: sorted[(sorted.len() - 1) * 99 / 100], peak: sorted[sorted.len() - 1] }
}

#[derive(Clone)]
struct Job {
    user: u32,
    number: u64,
    start: Seconds,
    nodes: u32,
    minutes: u32,
    array: u32,
    /// Of the signal, the same for all jobs that started at the same moment.
    early: f64,
}

impl Job {
    fn end(&self) -> Seconds {
        self.start + f64::from(self.minutes) * 60.0
    }

    fn pace(&self, rank: u32, ways: Ways) -> Pace {
        let array = if ways.spread { self.array } else { 1 };
        let (job, host) = (self.number.to_string(), format!("n{rank}"));
        Pace { rank, nodes: self.nodes, array, seed: seed(&job, &host, rank), poll: POLL }
    }
}

fn clock(at: Seconds) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(1_800_000_000) + Duration::from_secs_f64(at)
}

fn seconds_of(moment: SystemTime) -> Seconds {
    moment.duration_since(clock(0.0)).unwrap_or_default().as_secs_f64()
}

/// All jobs that start within so many seconds.
fn jobs(kinds: &[Kind], seconds: usize, chance: &mut Chance) -> Vec<Job> {
    let (mut all, mut number, mut first_user) = (Vec::new(), 4000, 0);
    for kind in kinds {
        for user in first_user..first_user + kind.users {
            // An array starts whole; of other jobs each has a beginning of its own.
            let chains = if kind.array { 1 } else { kind.jobs };
            for _ in 0..chains {
                let mut start = chance.up_to(kind.fill);
                while start < seconds as f64 {
                    let early = chance.up_to(30.0);
                    let (together, array) = if kind.array { (kind.jobs, kind.jobs) } else { (1, 1) };
                    for _ in 0..together {
                        number += 1;
                        let (nodes, minutes) = (kind.nodes, kind.minutes);
                        all.push(Job { user, number, start, nodes, minutes, array, early });
                    }
                    // It drains a minute before its end, and the scheduler fills the gap.
                    start += f64::from(kind.minutes) * 60.0 - 55.0 + chance.up_to(60.0);
                }
            }
        }
        first_user += kind.users;
    }
    all
}

/// Runs a fleet for so many seconds.
pub fn run(kinds: &[Kind], seconds: usize, chance: &mut Chance, ways: Ways) -> Counts {
    let mut counts = Counts::new(seconds);
    let mut by_user: BTreeMap<u32, Vec<Question>> = BTreeMap::new();
    for job in jobs(kinds, seconds, chance) {
        for rank in 0..job.nodes {
            let pace = job.pace(rank, ways);
            let turn = if ways.spread { pace.turn_to_start().as_secs_f64() } else { 0.0 };
            let start = job.start + turn;
            let gone = keep_node(&job, rank, start, chance, ways, &mut counts);
            let until = (gone as usize).min(seconds);
            counts.pilots[(start as usize).min(until)..until].iter_mut().for_each(|n| *n += 1);
            if ways.spread && rank > 0 {
                let (mut at, mut looks) = (start + REGISTRATION, 0);
                while at < gone {
                    count(&mut counts.looks, at);
                    looks += 1;
                    // Half of the first looks come before the first pilot has.
                    let found = looks > 1 || chance.permille() > 500;
                    at += next_look(looks, found, chance.permille()).as_secs_f64();
                }
            }
            let first = if ways.spread {
                first_delay(&pace, Some(Duration::from_secs(1)))
            } else {
                next_delay(&pace, 0, 1, None)
            };
            let at = start + first.as_secs_f64();
            let signal = job.end() - SIGNAL - job.early;
            let asks = by_user.entry(job.user).or_default();
            asks.push(Question {
                pace,
                at,
                gone,
                end: job.end(),
                signal: Some(signal),
                count: 0,
                failures: 0,
            });
            if !ways.spread {
                // KillWait, which was asked for at the start.
                let at = start;
                asks.push(Question { pace, at, gone: at, end: at, signal: None, count: 0, failures: 0 });
            }
        }
    }
    for (user, questions) in by_user {
        ask(user, questions, ways, &mut counts);
    }
    counts
}

/// One pilot's Node from its registration until it is gone.
fn keep_node(
    job: &Job,
    rank: u32,
    start: Seconds,
    chance: &mut Chance,
    ways: Ways,
    counts: &mut Counts,
) -> Seconds {
    let leads = Leads::new(Duration::from_secs(u64::from(job.minutes) * 60), None, None);
    let name = format!("site-{}-n{rank}", job.number);
    let part = if ways.spread { Part::of(&name) } else { Part::ALL };
    let together = if ways.spread { job.pace(rank, ways).spread_of_starts() } else { Duration::ZERO };
    let timing = Stagger::of(&name, together).timing(leads, clock(job.end()), clock(start), None);
    let drain = seconds_of(timing.drain);
    let registered = start + REGISTRATION;
    // Pods end within a second or two of their SIGTERM.
    let gone = drain + 1.0 + chance.up_to(1.0);

    count(&mut counts.nodes, registered);
    count(&mut counts.removals, gone);
    count(&mut counts.writes, seconds_of(timing.cordon));

    let (mut at, mut renewals) = (registered, 0);
    while at < gone && (at as usize) < counts.seconds {
        count(&mut counts.leases, at);
        renewals += 1;
        let renewals = if ways.spread { renewals } else { u64::MAX };
        at += renewal_after(renewals, chance.permille()).max(Duration::from_millis(1)).as_secs_f64();
    }

    labels(timing, part, registered, gone, counts);
    gone
}

/// The label's writes, and the status'.
fn labels(timing: Timing, part: Part, registered: Seconds, gone: Seconds, counts: &mut Counts) {
    let first = plan(clock(registered), Some(&timing), true, None, part);
    let Plan::Write(value) = first else { return };
    let mut last = Published { timing: Some(timing), value, at: clock(registered) };
    let (mut at, mut status) = (registered, registered);
    while at < gone && (at as usize) < counts.seconds {
        let plan = plan(clock(at), Some(&timing), true, Some(&last), part);
        let age = Duration::from_secs_f64(at - status);
        let due = is_old(age, matches!(plan, Plan::Write(_)), part);
        match plan {
            Plan::Wait(wait) if !due => {
                at += wait.as_secs_f64() + 0.001;
                continue;
            }
            Plan::Wait(_) => {}
            Plan::Write(value) => last = Published { value, at: clock(at), ..last },
        }
        count(&mut counts.writes, at);
        if due {
            status = at;
        }
    }
}

/// What a pilot asks next.
struct Question {
    pace: Pace,
    at: Seconds,
    gone: Seconds,
    end: Seconds,
    /// When the warning signal comes, until it has.
    signal: Option<Seconds>,
    count: u64,
    failures: u32,
}

/// The questions of one user's pilots, in their order.
fn ask(user: u32, mut all: Vec<Question>, ways: Ways, counts: &mut Counts) {
    let mut seconds = vec![0; counts.seconds];
    let (mut tokens, mut filled, mut refused) = (BUCKET, 0.0, 0);
    // Times of one clock, in whole microseconds: floats have no order.
    let key = |at: Seconds| (at * 1e6) as u64;
    let due = |question: &Question| question.signal.map_or(question.at, |signal| question.at.min(signal));
    let mut next: BinaryHeap<Reverse<(u64, usize)>> =
        all.iter().enumerate().map(|(i, question)| Reverse((key(due(question)), i))).collect();
    while let Some(Reverse((_, i))) = next.pop() {
        let question = &mut all[i];
        let now = due(question);
        if now > question.gone || now >= counts.seconds as f64 {
            continue;
        }
        if question.signal == Some(now) {
            question.signal = None;
            let left = Some(Duration::from_secs_f64(question.end - now));
            let turn = question.pace.turn_to_ask(question.count, left).as_secs_f64();
            question.at = question.at.min(now + if ways.spread { turn } else { 0.0 });
            next.push(Reverse((key(due(question)), i)));
            continue;
        }
        count(&mut counts.questions, now);
        count(&mut seconds, now);
        tokens = (tokens + (now - filled) * REFILL).min(BUCKET);
        filled = now;
        let mut done = now;
        if tokens >= 1.0 {
            tokens -= 1.0;
            question.failures = 0;
        } else {
            refused += 1;
            if ways.limiter {
                question.failures += 1;
                done += COMMAND_LIMIT;
            }
        }
        question.count += 1;
        let left = Duration::from_secs_f64((question.end - done).max(0.0));
        let wait = next_delay(&question.pace, question.count, question.failures, Some(left));
        question.at = done + wait.as_secs_f64();
        next.push(Reverse((key(due(question)), i)));
    }
    if refused > 0 {
        counts.refused.insert(user, refused);
    }
    counts.users.insert(user, seconds);
}

/// The Leases that a fleet of so many pilots renews in a second.
pub fn leases_of(pilots: f64) -> f64 {
    pilots / RENEW_EVERY.as_secs_f64()
}

const fn kind(users: u32, jobs: u32, nodes: u32, minutes: u32) -> Kind {
    Kind { users, jobs, nodes, minutes, array: false, fill: 1800.0 }
}

/// Ten thousand pilots of some hundred users.
pub const DAY: [Kind; 8] = [
    // A thousand that wait for the end of the maintenance, and start in one second.
    Kind { array: true, fill: 0.0, ..kind(1, 1000, 1, 240) },
    kind(1, 200, 1, 1440),
    kind(25, 2, 64, 1440),
    kind(10, 2, 64, 240),
    kind(50, 5, 8, 240),
    kind(20, 50, 1, 1440),
    kind(20, 50, 1, 240),
    kind(10, 32, 1, 30),
];

/// Five hundred, in which an hour has all that a day has.
pub const HOUR: [Kind; 5] = [
    Kind { array: true, fill: 0.0, ..kind(1, 300, 1, 40) },
    Kind { fill: 60.0, ..kind(1, 1, 64, 30) },
    Kind { fill: 300.0, ..kind(2, 4, 8, 240) },
    Kind { fill: 300.0, ..kind(1, 40, 1, 1440) },
    Kind { fill: 300.0, ..kind(2, 16, 1, 30) },
];
