//! Ten thousand pilots over a day, without processes: what an API server and a batch system get to see each second.
//!
//! `cargo run --example simulation -- [SEED]` prints the table of docs/performance.md; `-- SEED unspread` the same for pilots
//! that would keep to no order among themselves.

#[allow(dead_code, reason = "what only the test wants")]
#[path = "../tests/simulation/model.rs"]
mod model;

use model::{Chance, Counts, DAY, Rate, Ways, rate, run};

const SECONDS: usize = 86_400;

fn main() {
    let seed = std::env::args().nth(1).and_then(|seed| seed.parse().ok()).unwrap_or(1);
    let spread = std::env::args().nth(2).is_none_or(|way| way != "unspread");
    let counts = run(&DAY, SECONDS, &mut Chance::new(seed), Ways { spread, limiter: true });
    let pilots = rate(&counts.pilots);
    println!("seed {seed}: {:.0} pilots on average, {} at most\n", pilots.mean, pilots.peak);
    println!("| a second | mean | p99 | peak |");
    println!("| --- | --- | --- | --- |");
    type Row = (&'static str, fn(&Counts) -> Rate);
    let rows: [Row; 8] = [
        ("Nodes made", |c| rate(&c.nodes)),
        ("Nodes and Leases removed", |c| rate(&c.removals)),
        ("writes of labels, statuses and cordons", |c| rate(&c.writes)),
        ("writes of Leases", |c| rate(&c.leases)),
        ("reads of first pilots' Nodes", |c| rate(&c.looks)),
        ("questions to the batch system", |c| rate(&c.questions)),
        ("… of the user with the array of 1000", |c| rate(&c.users[&0])),
        ("… of any other user, the most", |c| {
            let all: Vec<Rate> = c.users.iter().skip(1).map(|(_, user)| rate(user)).collect();
            Rate {
                mean: all.iter().map(|rate| rate.mean).fold(0.0, f64::max),
                p99: all.iter().map(|rate| rate.p99).max().unwrap_or(0),
                peak: all.iter().map(|rate| rate.peak).max().unwrap_or(0),
            }
        }),
    ];
    for (name, of) in rows {
        let rate = of(&counts);
        println!("| {name} | {:.1} | {} | {} |", rate.mean, rate.p99, rate.peak);
    }
    let asked: u32 = counts.questions.iter().sum();
    let refused: u32 = counts.refused.values().sum();
    println!("\nA limiter of 30 and 2/s for each user refuses {refused} of {asked} questions,");
    println!(
        "of {} of {} users (user: questions): {:?}",
        counts.refused.len(),
        counts.users.len(),
        counts.refused
    );
    let most = counts.writes.iter().enumerate().max_by_key(|(_, n)| **n).unwrap_or((0, &0));
    println!("The most writes come in second {}.", most.0);
}
