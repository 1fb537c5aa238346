//! The table on standard output, and the same as JSON in target/bench.json.

use std::path::Path;

use serde_json::{Value, json};

use crate::statistics::Samples;

/// One row.
pub struct Figure {
    name: String,
    unit: String,
    samples: Option<usize>,
    p50: f64,
    p99: Option<f64>,
    floor: Option<f64>,
    goal: Option<f64>,
    goal_p99: Option<f64>,
    /// Whether more is better.
    at_least: bool,
}

impl Figure {
    /// Milliseconds of many samples.
    pub fn times(name: &str, samples: &Samples) -> Self {
        Self {
            samples: Some(samples.len()),
            p99: Some(samples.quantile(99)),
            ..Self::number(name, "ms", samples.quantile(50))
        }
    }

    /// What is measured without a pilot.
    pub fn floor(name: &str, samples: &Samples) -> Self {
        Self::times(&format!("floor: {name}"), samples)
    }

    /// One number.
    pub fn number(name: &str, unit: &str, value: f64) -> Self {
        Self {
            name: name.to_owned(),
            unit: unit.to_owned(),
            samples: None,
            p50: value,
            p99: None,
            floor: None,
            goal: None,
            goal_p99: None,
            at_least: false,
        }
    }

    /// A file's size, and the most megabytes that it should have.
    pub fn size(name: &str, bytes: u64, most: f64) -> Self {
        Self::number(name, "MB", bytes as f64 / 1e6).at_most(most)
    }

    /// What it would be with no pilot in between.
    pub fn floor_is(mut self, floor: f64) -> Self {
        self.floor = Some(floor);
        self
    }

    /// What it should be at most.
    pub fn at_most(self, goal: f64) -> Self {
        self.goal(goal, None)
    }

    /// What it should be at least.
    pub fn at_least(self, goal: f64) -> Self {
        Self { at_least: true, ..self.goal(goal, None) }
    }

    /// What the median, and the 99th percentile, should be at most.
    pub fn goal(mut self, p50: f64, p99: Option<f64>) -> Self {
        (self.goal, self.goal_p99) = (Some(p50), p99);
        self
    }

    /// Whether each goal is reached; None without a goal.
    fn reached(&self) -> Option<bool> {
        let p99 = self.goal_p99.zip(self.p99).is_none_or(|(goal, value)| value <= goal);
        let p50 = |goal: f64| if self.at_least { self.p50 >= goal } else { self.p50 <= goal };
        self.goal.map(|goal| p50(goal) && p99)
    }

    fn row(&self) -> String {
        let both = |first: Option<f64>, second: Option<f64>| match (first, second) {
            (Some(first), Some(second)) => format!("{} / {}", number(first), number(second)),
            (Some(one), None) => number(one),
            _ => "–".to_owned(),
        };
        let ratio = self.floor.filter(|floor| *floor > 0.0);
        let ratio = ratio.map_or_else(|| "–".to_owned(), |floor| format!("{:.1} ×", self.p50 / floor));
        let goal = both(self.goal, self.goal_p99);
        let verdict = match self.reached() {
            Some(true) => "reached",
            Some(false) => "missed",
            None => "",
        };
        format!(
            "| {} | {} | {} | {} | {ratio} | {} | {verdict} |",
            self.name,
            self.unit,
            both(Some(self.p50), self.p99),
            both(self.floor, None),
            if self.at_least { format!("≥ {goal}") } else { goal },
        )
    }

    fn json(&self) -> Value {
        json!({"name": self.name, "unit": self.unit, "samples": self.samples, "p50": self.p50, "p99": self.p99,
            "floor": self.floor, "goal": self.goal, "goalP99": self.goal_p99, "atLeast": self.at_least, "reached": self.reached()})
    }
}

/// Two significant decimals below ten, one below a hundred, none above.
fn number(value: f64) -> String {
    match value.abs() {
        v if v == v.trunc() => format!("{value:.0}"),
        v if v < 0.1 => format!("{value:.4}"),
        v if v < 10.0 => format!("{value:.2}"),
        v if v < 100.0 => format!("{value:.1}"),
        _ => format!("{value:.0}"),
    }
}

/// All rows, and the machine that they come from.
pub struct Report {
    figures: Vec<Figure>,
    machine: Value,
    /// The size of the binary under test.
    pub binary_bytes: u64,
}

impl Report {
    /// An empty table for this machine and binary.
    pub fn new(binary: &Path) -> Self {
        let binary_bytes = binary.metadata().unwrap().len();
        Self { figures: Vec::new(), machine: machine(), binary_bytes }
    }

    /// One more row. It is shown at once too: a run takes minutes.
    pub fn push(&mut self, figure: Figure) {
        if figure.samples == Some(0) {
            return;
        }
        eprintln!("{}", figure.row());
        self.figures.push(figure);
    }

    /// Prints the table, and writes the JSON where JIRIAF_BENCH_JSON says.
    pub fn print(&self) {
        let text = |name: &str| self.machine[name].as_str().unwrap_or_default().to_owned();
        println!(
            "{} cores ({}), {} GB of memory, {}\n",
            self.machine["cores"],
            text("processor"),
            self.machine["memoryGB"],
            text("kernel")
        );
        println!(
            "Load average when it began: {} (what else runs here is measured too)\n",
            text("loadAverage")
        );
        println!("| figure | unit | p50 / p99 | floor | ratio | goal | |");
        println!("| --- | --- | --- | --- | --- | --- | --- |");
        for figure in &self.figures {
            println!("{}", figure.row());
        }
        let figures: Vec<Value> = self.figures.iter().map(Figure::json).collect();
        let all = json!({"machine": self.machine, "figures": figures});
        let path = std::env::var("JIRIAF_BENCH_JSON").unwrap_or_else(|_| "target/bench.json".to_owned());
        std::fs::write(&path, format!("{all:#}\n")).unwrap_or_else(|error| panic!("{path}: {error}"));
        println!("\nAs JSON: {path}");
    }
}

fn machine() -> Value {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let after = |text: &str, name: &str| {
        let line = text.lines().find(|line| line.starts_with(name)).unwrap_or_default();
        line.split_once(':').map_or_else(String::new, |(_, value)| value.trim().to_owned())
    };
    let memory = after(&read("/proc/meminfo"), "MemTotal");
    let kilobytes: f64 = memory.trim_end_matches(" kB").parse().unwrap_or(0.0);
    json!({
        "cores": std::thread::available_parallelism().map_or(0, usize::from),
        "processor": after(&read("/proc/cpuinfo"), "model name"),
        "memoryGB": (kilobytes * 1024.0 / 1e9).round(),
        "loadAverage": read("/proc/loadavg").split(' ').next().unwrap_or_default(),
        "kernel": format!("Linux {}", read("/proc/sys/kernel/osrelease").trim()),
    })
}
