//! The pilot's speed and size, measured from outside: a real control plane, a watcher of its own, scripts that
//! note their first and last moment. Start it with `tests/bench/run`, which brings up what it needs.
//!
//! Moments are readings of the one wall clock of this host: bash's `$EPOCHREALTIME` in the scripts, and
//! `SystemTime` where an event of the watch arrives. What each figure counts from and to stands beside it in
//! [`series`], [`weight`], [`node_api`] and [`endings`]; [`floors`] measures what the API server and the kernel alone take.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // what cannot be measured ends the program

#[allow(dead_code, unused_imports)] // it serves the end-to-end tests first
#[path = "../e2e/harness/mod.rs"]
mod harness;

mod audit;
mod endings;
mod floors;
mod node_api;
mod pods;
mod report;
mod series;
mod statistics;
mod watch;
mod weight;

use harness::{Namespace, Options, Pilot};
use report::{Figure, Report};
use series::{Place, Series};
use watch::Watcher;

/// How much is measured. Each number can be set by itself: `--samples=50`.
struct Size {
    /// Pods one at a time, in each series.
    samples: usize,
    /// Rounds of 50 pods at once.
    rounds: usize,
    /// Seconds of idleness that are watched.
    idle: u64,
    /// Pilots that are ended.
    endings: usize,
    /// Whether the Node's own API alone is measured.
    node_api: bool,
    /// Whether pods with much in them alone are measured.
    pods: bool,
}

/// Pods at once, and containers whose weight is taken.
const MANY: usize = 50;

/// Longer than a whole run: no drain of the measured pilot comes in between. In seconds.
const WALLTIME: u32 = 7200;

fn main() {
    let size = size(std::env::args().skip(1));
    let mut report = Report::new(&harness::bed().binary());
    if size.node_api {
        node_api(&mut report, size.samples);
        report.push(Figure::size("static binary", report.binary_bytes, 10.0));
        return report.print();
    }
    let watcher = Watcher::start();
    if size.pods {
        much(&mut report, &watcher, size.samples);
        return report.print();
    }
    let floors = floors::measure(&watcher, size.samples);
    floors.tell(&mut report);

    let namespace = Namespace::new("bench");
    let pilot = Pilot::local(Options::new("bench"), WALLTIME);
    weight::settle();
    let empty = weight::of(&pilot);
    weight::idle(&mut report, &pilot, size.idle);

    let place = Place { watcher: &watcher, namespace: &namespace, pilot: &pilot };
    let run = |label: &str, script, token| Series { place, label: label.to_owned(), script, token };
    let seen = run("seen", series::ONE_SECOND, false).one_at_a_time(size.samples);
    let short = run("short", series::SHORT, false).one_at_a_time(size.samples);
    let token = run("token", series::SHORT, true).one_at_a_time(size.samples);
    let burst: Vec<_> = (0..size.rounds)
        .flat_map(|round| run(&format!("burst{round}"), series::ONE_SECOND, false).at_once(MANY))
        .collect();
    series::tell(&mut report, &floors, &seen, &short, &token, &burst);

    weight::settle();
    weight::tell(&mut report, &run("heavy", series::SLEEP, false), MANY, empty);
    drop(pilot);
    drop(namespace);

    much(&mut report, &watcher, size.samples);

    node_api(&mut report, size.samples);
    endings::measure(&mut report, &watcher, size.endings);
    report.push(Figure::size("static binary", report.binary_bytes, 10.0));
    report.print();
}

/// Pods with much in them, on a pilot of their own.
fn much(report: &mut Report, watcher: &Watcher, samples: usize) {
    let namespace = Namespace::new("much");
    let pilot = Pilot::local(Options::new("much"), WALLTIME);
    pods::large(report, watcher, &namespace, &pilot, samples.div_ceil(10));
    pods::probed(report, watcher, &namespace, &pilot);
    pods::limited(report, watcher, &namespace, &pilot);
}

/// With a pilot of its own: what the pods before did to its memory and files is no part of it.
fn node_api(report: &mut Report, samples: usize) {
    let namespace = Namespace::new("node-api");
    let pilot = Pilot::local(Options::new("node-api"), WALLTIME);
    node_api::measure(report, &namespace, &pilot, samples);
}

fn size(arguments: impl Iterator<Item = String>) -> Size {
    let mut size = Size { samples: 200, rounds: 4, idle: 60, endings: 20, node_api: false, pods: false };
    for argument in arguments {
        let number = |text: &str| text.parse().unwrap_or_else(|_| usage(&argument));
        match argument.split_once('=').unwrap_or((&argument, "")) {
            ("--quick", "") => size = Size { samples: 10, rounds: 1, idle: 10, endings: 4, ..size },
            ("--samples", n) => size.samples = number(n),
            ("--rounds", n) => size.rounds = number(n),
            ("--idle", n) => size.idle = number(n) as u64,
            ("--endings", n) => size.endings = number(n),
            ("--node-api", "") => size.node_api = true,
            ("--pods", "") => size.pods = true,
            // cargo gives it to every bench target.
            ("--bench", "") => {}
            _ => usage(&argument),
        }
    }
    size
}

fn usage(argument: &str) -> ! {
    eprintln!(
        "{argument}: not known; tests/bench/run [--quick] [--samples=N] [--rounds=N] [--idle=SECONDS] [--endings=N] [--node-api] [--pods]"
    );
    std::process::exit(2);
}
