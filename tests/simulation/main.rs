//! What a fleet of pilots costs an API server and a batch system, by simulation (docs/performance.md has the same for 10,000
//! pilots over a day): a change of any schedule that breaks a budget fails here.

#[allow(dead_code, reason = "what only examples/simulation.rs wants")]
mod model;

use model::{Chance, Counts, HOUR, Ways, leases_of, rate, run};

const SECONDS: usize = 3600;

/// Which budgets are kept.
fn broken(counts: &Counts, ways: Ways) -> Vec<String> {
    let pilots = f64::from(rate(&counts.pilots).peak);
    let mut broken = Vec::new();
    let mut hold = |what: &str, got: f64, most: f64| {
        if got > most {
            broken.push(format!("{what}: {got:.1}, at most {most:.1}"));
        }
    };
    // A Lease each 10 s, and each Node's first.
    hold("Leases a second", rate(&counts.leases).mean, leases_of(pilots) * 1.02);
    // A label once a minute and a status along with it; more of them in the last minutes of half-hour jobs.
    hold("writes a second", rate(&counts.writes).mean, pilots / 60.0 * 1.6);
    // An array of three hundred starts, is cordoned and ends: 10 ms for each.
    const AT_ONCE: f64 = 100.0;
    hold("Nodes in one second", f64::from(rate(&counts.nodes).peak), AT_ONCE * 1.3);
    hold("removals in one second", f64::from(rate(&counts.removals).peak), AT_ONCE * 1.3);
    // Chance makes peaks: twice the mean is normal for so few.
    hold(
        "Leases in one second",
        f64::from(rate(&counts.leases).peak),
        leases_of(pilots) * 1.4 + AT_ONCE * 1.3,
    );
    hold("writes in one second", f64::from(rate(&counts.writes).peak), pilots / 60.0 * 3.0 + AT_ONCE * 1.3);
    // Each first pilot of a job every two minutes, the others of a job together as often.
    let mut worst = counts.users.values().map(|user| rate(user));
    let peak = worst.clone().map(|rate| rate.peak).max().unwrap_or_default();
    hold("questions of one user in one second", f64::from(peak), 30.0);
    hold("questions of one user a second", worst.by_ref().map(|rate| rate.mean).fold(0.0, f64::max), 1.1);
    // slurmctld's limiter, where it is on, refuses hardly one. It does when many are warned of their end at once: three hundred
    // in 45 s, of whom it answers 120.
    for (user, refused) in &counts.refused {
        let asked: u32 = counts.users[user].iter().sum();
        hold("refused questions of a hundred", f64::from(100 * refused) / f64::from(asked), 8.0);
    }
    if ways.spread {
        hold("reads of first pilots' Nodes", rate(&counts.looks).mean, pilots / 60.0 * 1.05);
    }
    broken
}

#[test]
fn five_hundred_pilots_keep_their_budgets_for_an_hour() {
    for seed in 1..=5 {
        let ways = Ways { spread: true, limiter: true };
        let counts = run(&HOUR, SECONDS, &mut Chance::new(seed), ways);
        assert!(rate(&counts.pilots).peak >= 490, "{}", rate(&counts.pilots).peak);
        assert_eq!(broken(&counts, ways), Vec::<String>::new(), "seed {seed}");
    }
}

#[test]
fn without_any_spreading_they_would_not() {
    let ways = Ways { spread: false, limiter: true };
    let counts = run(&HOUR, SECONDS, &mut Chance::new(1), ways);
    let broken = broken(&counts, ways);
    println!("{broken:#?}");
    for what in ["Leases in one second", "writes in one second", "questions of one user in", "refused"] {
        assert!(broken.iter().any(|line| line.starts_with(what)), "{what} is not among {broken:#?}");
    }
}
