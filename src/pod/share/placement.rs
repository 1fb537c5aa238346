//! Where each container runs.

use std::collections::BTreeMap;

use super::{Processor, Share};

/// The CPUs of each container, at one moment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Placement {
    /// What nobody has to himself. All, where nothing would be left.
    pool: Vec<usize>,
    /// Those of containers that do not run in the whole pool, by their pods' uids and their names.
    placed: BTreeMap<String, BTreeMap<String, Vec<usize>>>,
    /// Changes when all have to go to their places anew.
    renewed: u64,
}

impl Placement {
    /// Containers with a limit get as many CPUs of the pool, near each other among those that the fewest others have. `put` is
    /// where they are already: whoever is in the pool, on as many CPUs as he may have, stays. So one that comes or goes
    /// moves nobody else.
    pub(super) fn new<'a>(
        all: &[Processor],
        free: &[Processor],
        held: impl Iterator<Item = (&'a str, &'a Share)>,
        put: &mut BTreeMap<(String, String), Vec<usize>>,
        renewed: u64,
    ) -> Self {
        let pool = if free.is_empty() { all } else { free };
        let there: Vec<usize> = all.iter().map(|cpu| cpu.number).collect();
        let numbers: Vec<usize> = pool.iter().map(|cpu| cpu.number).collect();
        let mut placed: BTreeMap<String, BTreeMap<String, Vec<usize>>> = BTreeMap::new();
        let (mut still, mut new) = (BTreeMap::new(), Vec::new());
        for (uid, share) in held {
            for (name, container) in &share.containers {
                let mut own = container.cpus.clone();
                own.retain(|cpu| there.contains(cpu));
                if !own.is_empty() {
                    placed.entry(uid.to_owned()).or_default().insert(name.clone(), own);
                    continue;
                }
                // One whose own CPUs are all gone for now runs in the pool.
                let Some(most) = container.most.filter(|most| *most < numbers.len()) else { continue };
                let key = (uid.to_owned(), name.clone());
                match put
                    .remove(&key)
                    .filter(|cpus| cpus.len() == most && cpus.iter().all(|cpu| numbers.contains(cpu)))
                {
                    Some(cpus) => drop(still.insert(key, (cpus, container.passes))),
                    None => new.push((key, most, container.passes)),
                }
            }
        }
        let mut takers: BTreeMap<usize, usize> = numbers.iter().map(|cpu| (*cpu, 0)).collect();
        // Init containers are gone when those come that stay.
        for (cpus, _) in still.values().filter(|(_, passes)| !passes) {
            cpus.iter().for_each(|cpu| *takers.entry(*cpu).or_default() += 1);
        }
        for (key, most, passes) in new {
            let cpus = least_taken(pool, &takers, most);
            if !passes {
                cpus.iter().for_each(|cpu| *takers.entry(*cpu).or_default() += 1);
            }
            still.insert(key, (cpus, passes));
        }
        *put = still.into_iter().map(|(key, (cpus, _))| (key, cpus)).collect();
        for ((uid, name), cpus) in &*put {
            placed.entry(uid.clone()).or_default().insert(name.clone(), cpus.clone());
        }
        Self { pool: numbers, placed, renewed }
    }

    /// The CPUs of a container, in order. None: nothing is known of the job's CPUs, so nothing is to be set.
    #[must_use]
    pub fn cpus(&self, uid: &str, container: &str) -> &[usize] {
        self.placed.get(uid).and_then(|pod| pod.get(container)).unwrap_or(&self.pool)
    }

    /// Changes when all have to go to their places anew.
    #[must_use]
    pub fn renewed(&self) -> u64 {
        self.renewed
    }
}

fn least_taken(pool: &[Processor], takers: &BTreeMap<usize, usize>, most: usize) -> Vec<usize> {
    let taken = |cpu: &Processor| takers.get(&cpu.number).copied().unwrap_or(0);
    let mut by_takers: Vec<&Processor> = pool.iter().collect();
    by_takers.sort_by_key(|cpu| (taken(cpu), cpu.node, cpu.core, cpu.number));
    let mut cpus: Vec<usize> = by_takers.into_iter().take(most).map(|cpu| cpu.number).collect();
    cpus.sort_unstable();
    cpus
}
