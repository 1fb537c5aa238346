//! Pilots that end with pods on them: what is lost, and what is left behind.

use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::json;

use crate::harness::{Namespace, Options, Pilot, container, pod_spec, seconds};
use crate::report::{Figure, Report};
use crate::watch::Watcher;

/// Pods of each pilot.
const PODS: usize = 4;

/// Pilots that end side by side. Some wait for their walltime, so the two cores are not busy all the time.
const SIDE_BY_SIDE: usize = 10;

/// The least walltime that a pilot takes is 45 s; it drains 30 s before its end. In seconds.
const WALLTIME: u32 = 50;

/// Notes that it was told to end, and takes a moment for it.
const TRAPPING: &str = "trap 'sleep 0.2; echo $EPOCHREALTIME >ended; exit 0' TERM\nsleep 600 &\nwait\n";

#[derive(Default)]
struct Lost {
    /// Scripts that were not told, or not let to their end.
    pods: usize,
    /// Pods whose final status no watcher saw.
    statuses: usize,
    nodes: usize,
    leases: usize,
    processes: usize,
    /// Pilots that ended by another exit code than 0.
    exits: usize,
}

/// Ends so many pilots, one half by SIGTERM, one half at their walltime, and puts what was lost into the table.
pub fn measure(report: &mut Report, watcher: &Watcher, endings: usize) {
    let namespace = Namespace::new("endings");
    namespace.config_map("script", &[("run.sh", TRAPPING)]);
    let mut all = Lost::default();
    let numbers: Vec<usize> = (0..endings).collect();
    for wave in numbers.chunks(SIDE_BY_SIDE) {
        let namespace = &namespace;
        let lost: Vec<Lost> = std::thread::scope(|scope| {
            let start = |number: &usize| {
                let number = *number;
                scope.spawn(move || one(watcher, namespace, number))
            };
            let threads: Vec<_> = wave.iter().map(start).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        for lost in lost {
            all.pods += lost.pods;
            all.statuses += lost.statuses;
            all.nodes += lost.nodes;
            all.leases += lost.leases;
            all.processes += lost.processes;
            all.exits += lost.exits;
        }
    }
    let mut tell = |what: &str, count: usize| {
        let name = format!("{endings} endings: {what}");
        report.push(Figure::number(&name, &format!("of {}", endings * PODS), count as f64).at_most(0.0));
    };
    tell("pods lost", all.pods);
    tell("statuses lost", all.statuses);
    let mut tell = |what: &str, count: usize| {
        let name = format!("{endings} endings: {what}");
        report.push(Figure::number(&name, &format!("of {endings}"), count as f64).at_most(0.0));
    };
    tell("Nodes left behind", all.nodes);
    tell("Leases left behind", all.leases);
    tell("processes left behind", all.processes);
    tell("exit codes other than 0", all.exits);
}

fn one(watcher: &Watcher, namespace: &Namespace, number: usize) -> Lost {
    let mut pilot = Pilot::local(Options::new("ending"), WALLTIME);
    let names: Vec<String> = (0..PODS).map(|index| format!("ending{number}-{index}")).collect();
    for name in &names {
        let mut spec = pod_spec("Never", &[container("c1", "script")]);
        spec["nodeName"] = pilot.node.as_str().into();
        pilot.place(&mut spec);
        namespace.of("pods").create(&json!({"metadata": {"name": name}, "spec": spec}));
    }
    for name in &names {
        watcher.wait("running", &namespace.name, name, |seen| seen.running);
    }
    if number.is_multiple_of(2) {
        pilot.signal(Signal::SIGTERM);
    }
    let code = pilot.wait_exit(Duration::from_secs(WALLTIME.into()) + seconds(10));
    // The pilot has gone: what its watchers have not been sent by now was never written.
    std::thread::sleep(Duration::from_millis(200));
    let mut lost = Lost { exits: usize::from(code != Some(0)), ..Lost::default() };
    for name in &names {
        let seen = watcher.seen(&namespace.name, name);
        lost.statuses += usize::from(seen.ended.is_none());
        // The directory stays where nobody deleted the pod.
        let ended = pilot.pod_directory(name).join("containers/c1/ended");
        lost.pods += usize::from(!ended.exists());
    }
    lost.nodes = pilot.nodes().len();
    lost.leases = usize::from(pilot.lease().is_some());
    lost.processes = pilot.processes().len();
    lost
}
