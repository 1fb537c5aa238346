//! Where each container runs.

use std::collections::BTreeMap;

use super::Share;

/// The CPUs of each container, at one moment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Placement {
    /// All of the job's on this host.
    all: Vec<usize>,
    /// What nobody has to himself. All, where nothing would be left.
    pool: Vec<usize>,
    /// Those of containers that do not run in the whole pool, by their pods' uids and their names.
    placed: BTreeMap<String, BTreeMap<String, Vec<usize>>>,
}

impl Placement {
    /// Containers with a limit get as many CPUs of the pool, those that the fewest others have. In the order in which the pods
    /// came, so that one that comes moves nobody.
    pub(super) fn new<'a>(
        all: Vec<usize>,
        mut pool: Vec<usize>,
        held: impl Iterator<Item = (&'a str, &'a Share)>,
    ) -> Self {
        if pool.is_empty() {
            pool.clone_from(&all);
        }
        let mut takers: BTreeMap<usize, usize> = pool.iter().map(|cpu| (*cpu, 0)).collect();
        let mut placed: BTreeMap<String, BTreeMap<String, Vec<usize>>> = BTreeMap::new();
        for (uid, share) in held {
            for (name, container) in &share.containers {
                let cpus = match (&container.cpus, container.most) {
                    (own, _) if !own.is_empty() => own.clone(),
                    (_, Some(most)) if most < pool.len() => least_taken(&mut takers, most),
                    _ => continue,
                };
                placed.entry(uid.to_owned()).or_default().insert(name.clone(), cpus);
            }
        }
        Self { all, pool, placed }
    }

    /// The CPUs of a container, in order. None: nothing is known of the job's CPUs, so nothing is to be set.
    #[must_use]
    pub fn cpus(&self, uid: &str, container: &str) -> &[usize] {
        self.placed.get(uid).and_then(|pod| pod.get(container)).unwrap_or(&self.pool)
    }

    /// Whether these are all that the job has.
    #[must_use]
    pub fn is_all(&self, cpus: &[usize]) -> bool {
        self.all == cpus
    }
}

fn least_taken(takers: &mut BTreeMap<usize, usize>, most: usize) -> Vec<usize> {
    let mut by_takers: Vec<(usize, usize)> = takers.iter().map(|(cpu, takers)| (*takers, *cpu)).collect();
    by_takers.sort_unstable();
    let mut cpus: Vec<usize> = by_takers.into_iter().take(most).map(|(_, cpu)| cpu).collect();
    for cpu in &cpus {
        *takers.entry(*cpu).or_default() += 1;
    }
    cpus.sort_unstable();
    cpus
}
