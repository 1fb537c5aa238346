//! Which CPUs go together.

use std::collections::{BTreeMap, BTreeSet};

use super::Processor;

/// Takes `count` of the `free` CPUs, near each other: of one NUMA node where one has enough (of several the fullest), else of
/// as few as possible; whole cores, then the threads of cores that are shared already. In order; none where there are too few.
pub(super) fn take(free: &[Processor], count: usize) -> Option<Vec<usize>> {
    if count > free.len() {
        return None;
    }
    let mut by_node: BTreeMap<usize, Vec<Processor>> = BTreeMap::new();
    for processor in free {
        by_node.entry(processor.node).or_default().push(*processor);
    }
    let mut taken = BTreeSet::new();
    while taken.len() < count {
        let left = count - taken.len();
        // The node that has just enough; else the one that has most.
        let enough = by_node.iter().filter(|(_, free)| free.len() >= left);
        let node = enough.min_by_key(|(node, free)| (free.len(), **node));
        let node =
            node.or_else(|| by_node.iter().max_by_key(|(node, free)| (free.len(), usize::MAX - **node)));
        let node = *node?.0;
        let free = by_node.remove(&node)?;
        taken.extend(within(&free, left.min(free.len()), all_of(&free)));
    }
    Some(taken.into_iter().collect())
}

/// How many threads each core has that is not broken: the most that any has.
fn all_of(free: &[Processor]) -> usize {
    cores(free).values().map(Vec::len).max().unwrap_or(1)
}

fn cores(free: &[Processor]) -> BTreeMap<usize, Vec<usize>> {
    let mut cores: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    for processor in free {
        cores.entry(processor.core).or_default().push(processor.number);
    }
    cores
}

/// Of one node's free CPUs, of which there are enough.
fn within(free: &[Processor], count: usize, whole: usize) -> Vec<usize> {
    let cores = cores(free);
    let mut taken: Vec<usize> = Vec::with_capacity(count);
    let (full, broken): (Vec<_>, Vec<_>) = cores.values().partition(|threads| threads.len() == whole);
    let mut full = full.into_iter();
    while count - taken.len() >= whole
        && let Some(threads) = full.next()
    {
        taken.extend(threads);
    }
    // Less than a core is left, or no whole one: what others have begun already, the fullest first.
    let mut broken = broken;
    broken.sort_by_key(|threads| std::cmp::Reverse(threads.len()));
    for threads in broken.into_iter().chain(full) {
        taken.extend(threads.iter().take(count - taken.len()));
    }
    taken
}
