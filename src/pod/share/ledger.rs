//! Who has what. Nothing is handed out twice, in whatever order pods come and go.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::core::v1::Pod;

use super::placement::Placement;
use super::wish::{Wish, wishes};
use super::{ContainerShare, Grant, Processor, Share, cpus};
use crate::pod::containers::Kind;

/// Too little is left. Admission has counted before, so this is seen only where the allocation has shrunk.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{wanted} of {resource} are wanted to itself, and {left} are left")]
pub struct Shortage {
    /// `cpu`, or the resource that counts GPUs.
    pub resource: String,
    /// How many.
    pub wanted: usize,
    /// How many nobody has.
    pub left: usize,
}

/// What there is, and who has what of it.
#[derive(Debug, Clone, Default)]
pub struct Ledger {
    grant: Grant,
    /// By the pods' uids. A pod that has nothing to itself is there too, for its limits.
    held: BTreeMap<String, Held>,
    /// How many pods have come.
    came: u64,
    /// Where containers with a limit were put in the pool, by uid and name: they stay there for as long as it holds them.
    put: BTreeMap<(String, String), Vec<usize>>,
    /// How often all have to go to their places anew.
    renewed: u64,
}

/// What a pod has.
#[derive(Debug, Clone)]
struct Held {
    /// Which of all that have come it is.
    came: u64,
    share: Share,
}

impl Ledger {
    /// Nothing is handed out yet.
    #[must_use]
    pub fn new(grant: Grant) -> Self {
        Self { grant, ..Self::default() }
    }

    /// Gives a pod its share.
    ///
    /// # Errors
    /// When too little is left; nothing is taken then.
    pub fn take(&mut self, uid: &str, pod: &Pod) -> Result<Share, Shortage> {
        let wishes = wishes(pod);
        // Where nothing is known of which CPUs are the job's, nobody has any to himself.
        let is_known = !self.grant.processors.is_empty();
        let own = |wish: &Wish| if is_known { wish.own } else { 0 };
        let own = split(&wishes, own, self.free_cpus(), |free, count| {
            let left = free.len();
            cpus::take(free, count).ok_or(Shortage { resource: "cpu".to_owned(), wanted: count, left })
        })?;
        let mut share = Share::default();
        for wish in &wishes {
            let cpus = own.get(&wish.container).cloned().unwrap_or_default();
            let most = wish.most.filter(|_| cpus.is_empty());
            let asked = wish.asked.filter(|_| cpus.is_empty() && most.is_none());
            if !cpus.is_empty() || most.is_some() || asked.is_some() {
                let passes = wish.kind == Kind::Init;
                let container = ContainerShare { cpus, most, asked, passes, devices: BTreeMap::new() };
                share.containers.insert(wish.container.clone(), container);
            }
        }
        let resources: BTreeSet<&String> = wishes.iter().flat_map(|wish| wish.devices.keys()).collect();
        for resource in resources {
            let want = |wish: &Wish| wish.devices.get(resource).copied().unwrap_or(0);
            let given = split(&wishes, want, self.free_devices(resource), |free, count| {
                let left = free.len();
                let taken = free.get(..count).map(<[String]>::to_vec);
                taken.ok_or(Shortage { resource: resource.clone(), wanted: count, left })
            })?;
            for (container, devices) in given {
                let passes = wishes.iter().any(|wish| wish.container == container && wish.kind == Kind::Init);
                let own = share.containers.entry(container).or_default();
                own.passes = passes;
                own.devices.insert(resource.clone(), devices);
            }
        }
        self.enter(uid, share.clone());
        Ok(share)
    }

    fn enter(&mut self, uid: &str, share: Share) {
        self.came += 1;
        self.held.insert(uid.to_owned(), Held { came: self.came, share });
    }

    /// Takes up what a pod of before a crash had: what of it is still there and nobody else's. A container whose CPUs are all
    /// gone runs in the pool.
    pub fn restore(&mut self, uid: &str, share: &Share) -> Share {
        let cpus: BTreeSet<usize> = self.free_cpus().iter().map(|cpu| cpu.number).collect();
        let mut share = share.clone();
        for container in share.containers.values_mut() {
            container.cpus.retain(|cpu| cpus.contains(cpu));
            for (resource, devices) in &mut container.devices {
                let free = self.free_devices(resource);
                devices.retain(|device| free.contains(device));
            }
        }
        self.enter(uid, share.clone());
        share
    }

    /// The pod has ended. Whether that changes where others run.
    pub fn release(&mut self, uid: &str) -> bool {
        let gone = self.held.remove(uid);
        gone.is_some_and(|held| {
            held.share.containers.values().any(|c| !c.cpus.is_empty() || c.most.is_some())
        })
    }

    /// The CPUs of the job are others now (a cpuset that has changed). Who had one that is gone has it again once it is back; until
    /// then he has less, or runs in the pool.
    pub fn regrant(&mut self, processors: Vec<Processor>) {
        self.grant.processors = processors;
        // The kernel may have given all processes the whole cpuset (before Linux 6.2 it does).
        self.renewed += 1;
    }

    /// Where each container runs. What has a place keeps it while it can.
    pub fn placement(&mut self) -> Placement {
        let mut held: Vec<(&String, &Held)> = self.held.iter().collect();
        held.sort_by_key(|(_, held)| held.came);
        let held = held.into_iter().map(|(uid, held)| (uid.as_str(), &held.share));
        Placement::new(&self.grant.processors, &self.free_cpus(), held, &mut self.put, self.renewed)
    }

    fn free_cpus(&self) -> Vec<Processor> {
        let containers = self.held.values().flat_map(|held| held.share.containers.values());
        let held: BTreeSet<usize> = containers.flat_map(|container| &container.cpus).copied().collect();
        self.grant.processors.iter().filter(|cpu| !held.contains(&cpu.number)).copied().collect()
    }

    fn free_devices(&self, resource: &str) -> Vec<String> {
        let containers = self.held.values().flat_map(|held| held.share.containers.values());
        let held: BTreeSet<&String> = containers.filter_map(|c| c.devices.get(resource)).flatten().collect();
        let all = self.grant.devices.get(resource).into_iter().flatten();
        all.filter(|device| !held.contains(device)).cloned().collect()
    }
}

/// A thing of which containers have some.
trait Numbered: Clone {
    type Name: Clone + PartialEq;
    fn name(&self) -> Self::Name;
}

impl Numbered for Processor {
    type Name = usize;
    fn name(&self) -> usize {
        self.number
    }
}

impl Numbered for String {
    type Name = Self;
    fn name(&self) -> Self {
        self.clone()
    }
}

/// Takes what the pod wants at once, near each other, and splits it among its containers. Init containers have gone when the main
/// ones start, and leave theirs to them; sidecars stay (policy_static.go, AllocatePod).
fn split<T: Numbered>(
    wishes: &[Wish],
    want: impl Fn(&Wish) -> usize,
    free: Vec<T>,
    take: impl Fn(&[T], usize) -> Result<Vec<T::Name>, Shortage>,
) -> Result<BTreeMap<String, Vec<T::Name>>, Shortage> {
    let (mut stays, mut most) = (0, 0);
    for wish in wishes {
        let count = want(wish);
        match wish.kind {
            Kind::Init => most = most.max(stays + count),
            Kind::Sidecar | Kind::Main | Kind::Ephemeral => stays += count,
        }
    }
    let total = most.max(stays);
    if total == 0 {
        return Ok(BTreeMap::new());
    }
    let pods = take(&free, total)?;
    let mut left: Vec<T> = free.into_iter().filter(|one| pods.contains(&one.name())).collect();
    let mut given = BTreeMap::new();
    for wish in wishes {
        let count = want(wish);
        if count == 0 {
            continue;
        }
        let taken = take(&left, count)?;
        if wish.kind != Kind::Init {
            left.retain(|one| !taken.contains(&one.name()));
        }
        given.insert(wish.container.clone(), taken);
    }
    Ok(given)
}
