//! What the pilot writes, by the API server's own count: its audit log, which tests/bench/run has it keep for the
//! pilot's identity alone.

use std::collections::BTreeMap;
use std::path::PathBuf;

/// Requests that change something, by resource.
#[derive(Default)]
pub struct Writes(BTreeMap<String, usize>);

impl Writes {
    /// How many of them were about this resource.
    pub fn of(&self, resource: &str) -> usize {
        self.0.get(resource).copied().unwrap_or(0)
    }

    /// How many there were.
    pub fn all(&self) -> usize {
        self.0.values().sum()
    }

    /// What came since `before`.
    pub fn since(&self, before: &Self) -> Self {
        let more = self.0.iter().map(|(resource, count)| (resource.clone(), count - before.of(resource)));
        Self(more.collect())
    }
}

/// All of the pilots' writes until now.
pub fn writes() -> Writes {
    let path = std::env::var_os("JIRIAF_BENCH_AUDIT").map(PathBuf::from);
    let path =
        path.expect("JIRIAF_BENCH_AUDIT names the API server's audit log: start this with tests/bench/run");
    let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let mut writes = Writes::default();
    for line in text.lines() {
        // The last line may be half written.
        let Ok(event) = serde_json::from_str::<serde_json::Value>(line) else { continue };
        if matches!(event["verb"].as_str(), Some("create" | "update" | "patch" | "delete")) {
            let resource = event["objectRef"]["resource"].as_str().unwrap_or_default();
            *writes.0.entry(resource.to_owned()).or_default() += 1;
        }
    }
    writes
}
