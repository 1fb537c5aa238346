//! The planner by table, and by simulation: a moved clock runs it over whole jobs.

use super::*;
use proptest::prelude::*;

/// For a Node whose part of a step is all of it.
fn plan(now: SystemTime, timing: Option<&Timing>, publish: bool, last: Option<&Published>) -> Plan {
    super::plan(now, timing, publish, last, Part::ALL)
}

fn at(millis: u64) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(1_800_000_000) + Duration::from_millis(millis)
}

fn ending(drain_millis: u64) -> Timing {
    let drain = at(drain_millis);
    Timing { deadline: drain + Duration::from_secs(60), cordon: drain, drain }
}

fn published(drain_millis: u64, value: u64, millis: u64) -> Published {
    Published { timing: Some(ending(drain_millis)), value: Some(value), at: at(millis) }
}

#[test]
fn the_value_leaves_room_for_the_next_write() {
    for (left, want) in [
        (3600, 3538),
        (1200, 1138),
        (1000, 948),
        (400, 378),
        (200, 188),
        (100, 88),
        (13, 1),
        (12, 0),
        (5, 0),
        (0, 0),
    ] {
        assert_eq!(value(at(0), at(left * 1000), Part::ALL), want, "{left} s left");
    }
    assert_eq!(value(at(5000), at(0), Part::ALL), 0, "the drain time has passed");
}

#[test]
fn the_first_value_stands_for_a_part_of_a_step_and_the_next_ones_for_whole_ones() {
    let end = ending(3_600_000);
    let first = |part, last| super::plan(at(0), Some(&end), true, last, part);
    assert_eq!(first(Part::NONE, None), Plan::Write(Some(3588)));
    assert_eq!(first(Part::ALL, None), Plan::Write(Some(3538)));
    // A move is a beginning too.
    let before = published(9_000_000, 8000, 0);
    let moved = super::plan(at(2000), Some(&end), true, Some(&before), Part::NONE);
    assert_eq!(moved, Plan::Write(Some(3586)));
    let last = published(3_600_000, 3588, 0);
    let next = super::plan(at(10_000), Some(&end), true, Some(&last), Part::NONE);
    assert_eq!(next, Plan::Write(Some(3528)));
    // Near the end nothing is left to be spread.
    assert_eq!(super::plan(at(3_500_000), Some(&end), true, None, Part::NONE), Plan::Write(Some(88)));
}

#[test]
fn a_thousand_pilots_that_begin_at_once_write_evenly_over_the_minute() {
    let mut seconds = std::collections::BTreeMap::<u64, u32>::new();
    for number in 0..1000 {
        let part = Part::of(&format!("mysite-{number}-n1"));
        let world = World {
            drain: 14_400_000,
            latencies: vec![4],
            timer_late: 1,
            part: Some(part),
            ..World::default()
        };
        for write in world.run(7_200_000).iter().skip(1) {
            *seconds.entry(write.begun / 1000).or_default() += 1;
        }
    }
    // Of the 50 s over which they are spread, each has some 20.
    let most = seconds.values().max().unwrap();
    assert!(*most < 45, "{most} in one second");
}

#[test]
fn what_is_not_known_to_be_there_is_written() {
    assert_eq!(plan(at(0), Some(&ending(3_600_000)), true, None), Plan::Write(Some(3538)));
    assert_eq!(plan(at(0), None, true, None), Plan::Write(None));
    assert_eq!(plan(at(0), Some(&ending(3_600_000)), false, None), Plan::Write(None));
}

#[test]
fn without_an_end_nothing_is_due() {
    let none = Published { timing: None, value: None, at: at(0) };
    assert_eq!(plan(at(1_000_000), None, true, Some(&none)), Plan::Wait(LONGEST_WAIT));
    let unlabelled = Published { timing: Some(ending(90_000)), value: None, at: at(0) };
    assert_eq!(plan(at(80_000), Some(&ending(90_000)), false, Some(&unlabelled)), Plan::Wait(LONGEST_WAIT));
}

#[test]
fn an_end_that_comes_or_goes_is_written_at_once() {
    let none = Published { timing: None, value: None, at: at(0) };
    assert_eq!(plan(at(5000), Some(&ending(105_000)), true, Some(&none)), Plan::Write(Some(88)));
    assert_eq!(plan(at(5000), Some(&ending(105_000)), false, Some(&none)), Plan::Write(None));
    assert_eq!(plan(at(5000), None, true, Some(&published(105_000, 88, 0))), Plan::Write(None));
}

#[test]
fn a_moved_end_is_written_at_once_but_not_twice_a_second() {
    let last = published(3_600_000, 3538, 10_000);
    assert_eq!(plan(at(11_000), Some(&ending(1_000_000)), true, Some(&last)), Plan::Write(Some(938)));
    assert_eq!(plan(at(11_000), Some(&ending(9_000_000)), true, Some(&last)), Plan::Write(Some(8927)));
    let wait = plan(at(10_400), Some(&ending(1_000_000)), true, Some(&last));
    assert_eq!(wait, Plan::Wait(Duration::from_millis(600)));
    // A part of a second is not in the annotations, and moves nothing.
    assert!(matches!(plan(at(11_000), Some(&ending(3_600_900)), true, Some(&last)), Plan::Wait(_)));
    // A deadline that moves under the same drain time changes an annotation.
    let later = Timing { deadline: at(3_800_000), ..ending(3_600_000) };
    assert!(matches!(plan(at(11_000), Some(&later), true, Some(&last)), Plan::Write(_)));
}

#[test]
fn a_clock_that_was_set_is_followed() {
    let last = published(3_600_000, 3538, 0);
    assert_eq!(plan(at(2_000_000), Some(&ending(3_600_000)), true, Some(&last)), Plan::Write(Some(1538)));
    let behind = Published { at: at(1_000_000), value: Some(2538), ..last };
    assert_eq!(plan(at(500_000), Some(&ending(3_600_000)), true, Some(&behind)), Plan::Write(Some(3038)));
}

#[test]
fn a_published_nought_needs_no_more_writes() {
    let last = published(100_000, 0, 90_000);
    for millis in [91_000, 100_000, 500_000] {
        assert_eq!(plan(at(millis), Some(&ending(100_000)), true, Some(&last)), Plan::Wait(LONGEST_WAIT));
    }
}

#[test]
fn failed_writes_are_tried_again_at_bounded_intervals() {
    let waits: Vec<u64> =
        [1, 2, 3, 4, 5, 50, u32::MAX].into_iter().map(|n| retry_after(n).as_secs()).collect();
    assert_eq!(waits, [1, 2, 4, 8, 10, 10, 10]);
    assert_eq!(retry_after(0).as_secs(), 1);
}

/// One write as the simulated API server saw it; times in milliseconds.
#[derive(Debug, Clone, Copy)]
struct Write {
    begun: u64,
    seen: u64,
    value: u64,
}

/// What goes wrong in a simulated job; times in milliseconds.
#[derive(Debug, Clone, Default)]
struct World {
    drain: u64,
    latencies: Vec<u64>,
    timer_late: u64,
    /// Writes begun within these spans fail.
    outages: Vec<(u64, u64)>,
    /// At these times the drain time becomes another, in order.
    moves: Vec<(u64, u64)>,
    /// The Node's part of a step; all of it where none is set.
    part: Option<Part>,
}

impl World {
    fn drain_at(&self, millis: u64) -> u64 {
        self.moves.iter().rev().find(|(when, _)| *when <= millis).map_or(self.drain, |(_, drain)| *drain)
    }

    /// Whole seconds until the drain time, as known at that moment.
    fn left(&self, millis: u64) -> u64 {
        self.drain_at(millis).saturating_sub(millis) / 1000
    }

    /// Runs the planner as `upkeep` does until some time after the drain time.
    fn run(&self, until: u64) -> Vec<Write> {
        let (mut now, mut last, mut failures, mut writes) = (0_u64, None, 0_u32, Vec::new());
        let mut latencies = self.latencies.iter().cycle();
        for _ in 0..100_000 {
            if now > until {
                return writes;
            }
            let timing = ending(self.drain_at(now));
            let part = self.part.unwrap_or(Part::ALL);
            match super::plan(at(now), Some(&timing), true, last.as_ref(), part) {
                Plan::Wait(wait) => {
                    let wake = now + u64::try_from(wait.as_millis()).unwrap() + self.timer_late.max(1);
                    let moved = self.moves.iter().map(|(when, _)| *when).find(|when| *when > now);
                    now = moved.map_or(wake, |m| m.min(wake));
                }
                Plan::Write(value) => {
                    let seen = now + latencies.next().unwrap();
                    if self.outages.iter().any(|(from, to)| (*from..*to).contains(&now)) {
                        failures += 1;
                        now = seen + u64::try_from(retry_after(failures).as_millis()).unwrap();
                        continue;
                    }
                    failures = 0;
                    writes.push(Write { begun: now, seen, value: value.unwrap() });
                    last = Some(Published { timing: Some(timing), value, at: at(now) });
                    now = seen;
                }
            }
        }
        panic!("the planner spins");
    }
}

/// A job in which nothing moves and no write fails keeps every promise at every moment.
fn keeps_all_promises(world: &World) {
    let until = world.drain + 30_000;
    let writes = world.run(until);
    for (i, write) in writes.iter().enumerate() {
        // The label stands from `seen` until the next one is seen. It overstates most at the end of that
        // time, and falls short most at its beginning.
        let end = writes.get(i + 1).map_or(until, |next| next.seen);
        assert!(write.value <= world.left(end), "{write:?} overstates: {} left at {end}", world.left(end));
        let left = world.left(write.seen);
        assert!(left - write.value <= tolerance(left), "{write:?} falls short: {left} left");
        // Once the refreshes have found the whole second, parts of a second cost next to nothing either.
        let exact = world.drain.saturating_sub(write.seen).saturating_sub(write.value * 1000);
        let twentieth = (world.drain.saturating_sub(write.seen) / 20).clamp(10_000, 60_000);
        assert!(i == 0 || exact <= twentieth + 2_060, "{write:?} falls short by {exact} ms");
    }
    for (i, pair) in writes.windows(2).enumerate() {
        let gap = pair[1].begun - pair[0].begun;
        let whole = world.left(pair[0].begun) >= 1200 && (i > 0 || world.part.is_none());
        let least = if whole { 60_000 } else { 10_000 };
        assert!(gap + 60 >= least, "{pair:?}: {gap} ms apart");
    }
    assert_eq!(writes.last().unwrap().value, 0, "the last word is 0");
}

#[test]
fn an_hour_takes_some_hundred_writes() {
    let world = World { drain: 3_600_000, latencies: vec![4], timer_late: 1, ..World::default() };
    keeps_all_promises(&world);
    let writes = world.run(3_700_000);
    assert_eq!(writes.iter().filter(|w| w.begun < 2_400_000).count(), 41, "one a minute at first");
    assert!(writes.len() < 110, "{} writes", writes.len());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn the_label_is_true_at_every_moment_of_a_job(
        drain in 0_u64..12_000_000,
        latencies in prop::collection::vec(prop_oneof![0_u64..20, 0_u64..=2000], 1..50),
        timer_late in 0_u64..45,
        name in prop::option::of("[a-z]{1,8}"),
    ) {
        // The annotation's second is whole, and so the label's drain time is too.
        let part = name.map(|name| Part::of(&name));
        keeps_all_promises(&World { drain: drain / 1000 * 1000, latencies, timer_late, part, ..World::default() });
    }

    #[test]
    fn a_moved_end_is_true_again_within_five_seconds(
        drain in 600_000_u64..6_000_000,
        moves in prop::collection::vec((0_u64..600_000, 0_u64..6_000_000), 1..6),
        latencies in prop::collection::vec(0_u64..=2000, 1..20),
        name in "[a-z]{1,8}",
    ) {
        let mut moves: Vec<(u64, u64)> = moves.into_iter().map(|(w, d)| (w, (w + d) / 1000 * 1000)).collect();
        moves.sort_unstable();
        let part = Some(Part::of(&name));
        let world = World { drain: drain / 1000 * 1000, latencies, moves, timer_late: 5, part, ..World::default() };
        let until = world.moves.last().unwrap().1.max(600_000) + 30_000;
        let writes = world.run(until);
        // A write that is under way (2 s), the limit of one a second, and the write itself (2 s).
        let settled = |now: u64| world.moves.iter().all(|(when, _)| now < *when || now > *when + 5_000);
        for now in (3_000..until).step_by(500).filter(|now| settled(*now)) {
            let label = writes.iter().rev().find(|w| w.seen <= now).unwrap().value;
            let left = world.left(now);
            prop_assert!(label <= left, "{label} at {now}, {left} left");
            prop_assert!(left - label <= tolerance(left), "{label} at {now}, {left} left");
        }
        for pair in writes.windows(2) {
            prop_assert!(pair[1].begun - pair[0].begun >= 1000, "{pair:?}");
        }
    }

    #[test]
    fn after_an_outage_the_label_is_true_again_within_a_retry(
        drain in 100_000_u64..4_000_000,
        from in 0_u64..3_000_000,
        length in 0_u64..600_000,
        latency in 0_u64..=2000,
    ) {
        let drain = drain / 1000 * 1000;
        let outages = vec![(from, from + length)];
        let world = World { drain, latencies: vec![latency], outages, timer_late: 5, ..World::default() };
        let writes = world.run(drain.max(from + length) + 60_000);
        // The longest retry (10 s), the attempt before it and the write itself.
        for now in (from + length + 14_001..drain + 30_000).step_by(500) {
            let label = writes.iter().rev().find(|w| w.seen <= now).unwrap().value;
            let left = world.left(now);
            prop_assert!(label <= left, "{label} at {now}, {left} left");
            prop_assert!(left - label <= tolerance(left), "{label} at {now}, {left} left");
        }
    }
}
