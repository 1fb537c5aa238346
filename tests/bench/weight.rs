//! What a pilot takes while nothing happens: memory, processor time, writes to the API server.

use std::path::PathBuf;
use std::time::Duration;

use nix::sys::time::TimeSpec;
use nix::time::{clock_getcpuclockid, clock_gettime};
use nix::unistd::Pid;

use crate::audit;
use crate::harness::{Pilot, bed};
use crate::report::{Figure, Report};
use crate::series::Series;

/// The memory of the processes of this pilot that are the binary: guardian, pilot, supervisors.
#[derive(Clone, Copy)]
pub struct Weight {
    /// Proportional set size: pages that several processes share count once in all (proc(5)). In bytes.
    bytes: u64,
    processes: usize,
}

/// Lets what follows a start or an end (threads that wait for more work for 10 s, sockets) come to rest.
pub fn settle() {
    std::thread::sleep(Duration::from_secs(12));
}

/// Weighs the pilot as it is now. Processes that are not dumpable show this to root alone.
pub fn of(pilot: &Pilot) -> Weight {
    let own = own_processes(pilot);
    Weight { bytes: own.iter().map(|pid| proportional_set_size(*pid)).sum(), processes: own.len() }
}

fn own_processes(pilot: &Pilot) -> Vec<i32> {
    let binary = bed().binary().canonicalize().unwrap();
    let all = pilot.processes().into_iter().map(|(pid, _)| pid);
    all.filter(|pid| std::fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|exe| exe == binary)).collect()
}

fn proportional_set_size(pid: i32) -> u64 {
    let path = PathBuf::from(format!("/proc/{pid}/smaps_rollup"));
    let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let line = text.lines().find_map(|line| line.strip_prefix("Pss:")).expect("smaps_rollup has Pss");
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

/// Processor time and writes of so many seconds without pods, into the table.
pub fn idle(report: &mut Report, pilot: &Pilot, seconds: u64) {
    let processes = own_processes(pilot);
    let before = processor_time(&processes);
    let writes_before = audit::writes();
    std::thread::sleep(Duration::from_secs(seconds));
    let used = processor_time(&processes) - before;
    let writes = audit::writes().since(&writes_before);
    let share = used.as_secs_f64() / seconds as f64 * 100.0;
    report.push(Figure::number("idle CPU of guardian and pilot", "% of a core", share).at_most(0.03));
    let a_minute = 60.0 / seconds as f64;
    let leases = writes.of("leases") as f64 * a_minute;
    let others = writes.all() as f64 * a_minute - leases;
    report.push(Figure::number("idle writes of the Lease", "a minute", leases).at_most(6.0).floor_is(6.0));
    report.push(Figure::number("idle writes of anything else", "a minute", others).at_most(1.0));
}

/// The share of a core, in percent, that guardian and pilot take for so long.
pub fn processor_share(pilot: &Pilot, time: Duration) -> f64 {
    let stages = [pilot.stages("run"), pilot.stages("pilot")].concat();
    let before = processor_time(&stages);
    std::thread::sleep(time);
    (processor_time(&stages) - before).as_secs_f64() / time.as_secs_f64() * 100.0
}

/// By the processes' own clocks, which the kernel keeps in nanoseconds; threads that have ended are in them.
fn processor_time(processes: &[i32]) -> Duration {
    let of = |pid: &i32| {
        let clock = clock_getcpuclockid(Pid::from_raw(*pid)).unwrap();
        let time: TimeSpec = clock_gettime(clock).unwrap();
        Duration::from(time)
    };
    processes.iter().map(of).sum()
}

/// Memory with no pods, and what each of so many running containers adds, into the table. The container's own
/// process (sleep) is not counted.
pub fn tell(report: &mut Report, series: &Series, count: usize, empty: Weight) {
    let mega = |bytes: f64| bytes / 1e6;
    assert_eq!(empty.processes, 2, "a pilot without pods is a guardian and a pilot");
    let no_pods = mega(empty.bytes as f64);
    report.push(Figure::number("memory, no pods (guardian and pilot)", "MB", no_pods).at_most(8.0));
    let after = of(series.place.pilot);
    let name = "memory, no pods, after all pods above";
    report.push(Figure::number(name, "MB", mega(after.bytes as f64)));
    series.start(count);
    settle();
    let full = of(series.place.pilot);
    assert_eq!(full.processes, empty.processes + count, "a supervisor for each container");
    let each = (full.bytes as f64 - after.bytes as f64) / count as f64;
    report.push(Figure::number("memory, each container more", "MB", mega(each)).at_most(0.5));
}
