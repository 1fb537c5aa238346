//! What a pod needs before its containers can start: its objects, its directory, its volumes, its scripts.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Container, Pod};

use super::network::of_pod;
use super::spec::{Made, sub_paths};
use crate::pod::api::ApiError;
use crate::pod::containers;
use crate::pod::context::{Context, Identity, on_disk};
use crate::pod::directory::{self, DirectoryError, Liveness, Marker, Occupant};
use crate::pod::environment::{Facts, Missing, Objects, missing, references, volume_references};
use crate::pod::events::Kind;
use crate::pod::isolation::{self, Choice};
use crate::pod::network::{HostnameError, Network};
use crate::pod::objects::{self, Held, Read, ReadError, Unanswered};
use crate::pod::security;
use crate::pod::share::Share;
use crate::pod::volumes::keeper::Turn;
use crate::pod::volumes::{
    self, ContainerPlan, Ground, ImageError, Layout, MountProblem, PlannedMount, VolumeError, WriteError,
};

/// Everything that the starts of a pod's containers need.
pub struct Prepared {
    /// The pod's directory.
    pub directory: PathBuf,
    /// What the environment and the volumes are made of.
    pub(super) objects: Objects,
    pub(super) facts: Facts,
    /// The variables of Services.
    pub(super) services: BTreeMap<String, String>,
    /// The containers' scripts, by their names.
    pub(super) scripts: BTreeMap<String, Result<PathBuf, ImageError>>,
    /// Containers that cannot start for their volumes.
    pub(super) problems: BTreeMap<String, MountProblem>,
    /// The containers' mounts, by their names, for a container with a view of the file system of its own: outer ones first,
    /// with sources as they really are.
    pub mounts: BTreeMap<String, Vec<PlannedMount>>,
    /// Who sees which volume, for the keeper.
    pub layout: Layout,
    /// What was left out, for an event.
    pub notes: Vec<String>,
    /// What its containers get in namespaces of their own; none: they have none.
    pub(super) network: Option<Network>,
    /// What these see of what is hidden: the pod's own part.
    pub(super) shown: Vec<PathBuf>,
    /// What of the allocation the pod has to itself.
    pub(super) share: Share,
}

impl Prepared {
    /// Whether the pod had this container when it was prepared.
    pub fn has(&self, container: &str) -> bool {
        self.scripts.contains_key(container) || self.problems.contains_key(container)
    }

    /// What the environment of a container names and is not there.
    pub fn missing(&self, container: &Container) -> Vec<Missing> {
        missing(container, &self.objects)
    }
}

/// Why a pod cannot start yet.
#[derive(Debug, thiserror::Error)]
pub enum PrepareError {
    /// An object could not be read.
    #[error("{what}: {source}")]
    Api {
        /// Which one.
        what: String,
        /// What the API server said.
        source: ApiError,
    },
    /// A volume cannot be set up.
    #[error("{0}")]
    Volume(#[from] VolumeError),
    /// The pod's directory cannot be had.
    #[error("{0}")]
    Directory(#[from] DirectoryError),
    /// A file of a volume cannot be written.
    #[error("{path}: {source}; make room or choose another place with --pods-dir", path = path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file of a volume would stand where somebody else's does.
    #[error(
        "{path}: {source}; remove it, or mount the volume at another place", path = path.display()
    )]
    Occupied {
        /// The file.
        path: PathBuf,
        /// What is there.
        source: io::Error,
    },
    /// A file of the host's, which the pod's is made of, cannot be read.
    #[error("reading {path}: {source}", path = path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It has no hostname.
    #[error("{0}")]
    Hostname(#[from] HostnameError),
    /// The preparation was ended from outside.
    #[error("preparing the pod came to no end: {0}")]
    Aborted(String),
}

impl PrepareError {
    /// The event's reason, as kubelet names it.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Directory(_) | Self::Read { .. } | Self::Hostname(_) | Self::Aborted(_) => {
                "FailedCreatePodSandBox"
            }
            Self::Api { .. } | Self::Volume(_) | Self::Write { .. } | Self::Occupied { .. } => {
                VolumeError::REASON
            }
        }
    }

    /// Whether anything but another Pod could mend it: an object that appears, a right, room on a disk.
    pub fn may_pass(&self) -> bool {
        match self {
            Self::Volume(error) => error.may_mend(),
            Self::Hostname(_) => false,
            Self::Api { .. }
            | Self::Directory(_)
            | Self::Write { .. }
            | Self::Occupied { .. }
            | Self::Read { .. }
            | Self::Aborted(_) => true,
        }
    }
}

impl From<WriteError> for PrepareError {
    fn from(error: WriteError) -> Self {
        match error {
            WriteError::Io { path, source } if source.kind() == io::ErrorKind::AlreadyExists => {
                Self::Occupied { path, source }
            }
            WriteError::Io { path, source } => Self::Write { path, source },
            WriteError::Volume(error) => Self::Volume(error),
        }
    }
}

/// What became of a preparation.
pub struct Attempt {
    /// The pod's directory, as soon as it has one.
    pub directory: Option<PathBuf>,
    /// Whether all is there; what is missing may be there at the next try.
    pub result: Result<Prepared, PrepareError>,
}

/// Reads the pod's objects and makes its directory and volumes. What containers that are `running` have copied stays as it
/// is. The `turn` is held throughout, so that the keeper of the pod's volumes neither reads nor writes meanwhile.
pub async fn prepare(
    context: &Context,
    (pod, share): (&Pod, &Share),
    known: Option<PathBuf>,
    turn: Turn,
    running: BTreeSet<String>,
) -> Attempt {
    let mut held = turn.lock().await;
    let (read, directory, services) = tokio::join!(
        read_objects(context, pod, Unanswered::Last, &mut held),
        claim(context, pod, known),
        service_variables(context, pod)
    );
    match (read, directory) {
        (Ok(read), Ok(directory)) => {
            let result =
                fill(context, (pod, share), directory.clone(), (read, services), running, &mut held).await;
            Attempt { directory: Some(directory), result }
        }
        (Err(error), Ok(directory)) => Attempt { directory: Some(directory), result: Err(error) },
        (_, Err(error)) => Attempt { directory: None, result: Err(error) },
    }
}

/// The same for a pod whose containers have gone on without the pilot: only what follows is written.
///
/// # Errors
/// In words: when something is missing, or the directory is not the pod's any more.
pub async fn prepare_again(
    context: &Context,
    pod: &Pod,
    directory: PathBuf,
    turn: &Turn,
) -> Result<Layout, String> {
    let mut held = turn.lock().await;
    let uid = pod.metadata.uid.clone().unwrap_or_default();
    let marked = directory.clone();
    let ours = blocking(move || directory::read_marker(&marked).is_some_and(|marker| marker.uid == uid));
    if !ours.await.map_err(|error| error.to_string())? {
        return Err(format!("{} is not the pod's directory any more", directory.display()));
    }
    let (read, services) = tokio::join!(
        read_objects(context, pod, Unanswered::Fails, &mut held),
        service_variables(context, pod)
    );
    let read = read.map_err(|error| error.to_string())?;
    let running = containers::of(pod).map(|(_, container)| container.name.clone()).collect();
    let prepared =
        fill(context, (pod, &Share::default()), directory, (read, services), running, &mut held).await;
    prepared.map(|prepared| prepared.layout).map_err(|error| error.to_string())
}

async fn read_objects(
    context: &Context,
    pod: &Pod,
    unanswered: Unanswered,
    held: &mut Held,
) -> Result<Read, PrepareError> {
    let wanted = references(pod);
    let read = objects::read(&context.api, pod, &wanted, held, unanswered, Timestamp::now()).await;
    read.map_err(|ReadError { what, source }| PrepareError::Api { what, source })
}

/// Writes the volumes into the pod's directory and finds the scripts.
async fn fill(
    context: &Context,
    (pod, share): (&Pod, &Share),
    directory: PathBuf,
    (read, services): (Read, BTreeMap<String, String>),
    running: BTreeSet<String>,
    held: &mut Held,
) -> Result<Prepared, PrepareError> {
    let Read { objects, versions, denied: notes } = read;
    let facts = context.facts();
    let home = context.places.home.clone();
    let ground = Ground { directory: &directory, home: &home };
    let choice = context.policy.isolation.choose(pod.metadata.annotations.as_ref());
    let network = match choice {
        Choice::Isolated => Some(of_pod(pod, &facts).await?),
        Choice::Plain | Choice::Instead(_) => None,
    };
    let volumes::Found { mut contents, kept, left_out } =
        volumes::contents(pod, &objects, &held.last, &facts)?;
    let mut plans = Vec::new();
    let mut scripts = BTreeMap::new();
    for (kind, container) in containers::of(pod) {
        let made = Made {
            objects: &objects,
            facts: &facts,
            services: &services,
            directory: &directory,
            network: network.as_ref(),
            share,
        };
        let missing = container.volume_mounts.iter().flatten().find_map(|mount| left_out.get(&mount.name));
        let plan = match (missing, sub_paths(context, pod, &container, &made)) {
            (Some(error), _) => ContainerPlan::refused(&container.name, error.clone()),
            (None, Err(problem)) => ContainerPlan::refused(&container.name, problem),
            (None, Ok(sub_paths)) => match volumes::plan(&container, &contents, &sub_paths, &ground) {
                // The others have begun without it.
                Err(error) if kind == containers::Kind::Ephemeral => {
                    ContainerPlan::refused(&container.name, error)
                }
                plan => plan?,
            },
        };
        if plan.problem.is_none() {
            scripts.insert(container.name.clone(), volumes::script(&container, &plan, &mut contents));
        }
        plans.push(plan);
    }
    let layout = Layout::of(&plans, scripts.values().filter_map(|script| script.as_ref().ok()));
    let scripts = scripts
        .into_iter()
        .map(|(name, script)| {
            let path = script.map(|script| volumes::absolute(&script.place, &name, &ground));
            (name, path)
        })
        .collect();
    if let Choice::Instead(why) = &choice {
        context.events.record(pod, None, Kind::Warning, isolation::REASON, why);
    }
    for error in kept.values() {
        context.events.record(pod, None, Kind::Warning, VolumeError::REASON, &error.to_string());
    }
    for note in network.iter().flat_map(|network| &network.notes) {
        context.events.record(pod, None, Kind::Warning, Network::REASON, note);
    }
    let (uid, group) = (pod.metadata.uid.clone().unwrap_or_default(), security::fs_group(pod));
    let at = directory.clone();
    let (kept_directory, isolated) = (context.places.kept.clone(), network.is_some());
    let written = blocking(move || {
        let ground = Ground { directory: &at, home: &home };
        let beneath = directory::contents(&at, &uid, &kept_directory);
        let target = volumes::Target { ground, contents: &beneath, uid: &uid, group };
        let problems = volumes::write(&target, &contents, &mut plans, &running)?;
        let mut shown = Vec::new();
        if isolated {
            let memory = volumes::memory::parents().into_iter().map(|parent| parent.join(&uid));
            shown.extend(std::iter::once(beneath.clone()).chain(memory));
        }
        Ok::<_, WriteError>((problems, plans, shown))
    });
    let (problems, plans, shown) = written.await??;
    let mounts = plans.into_iter().map(|plan| (plan.container, plan.mounts)).collect();
    let spec_volumes = pod.spec.iter().flat_map(|spec| spec.volumes.iter().flatten());
    let not_made = volume_references(spec_volumes.filter(|volume| kept.contains_key(&volume.name)));
    held.note(pod, versions, objects.clone(), &not_made);
    Ok(Prepared {
        directory,
        objects,
        facts,
        services,
        scripts,
        problems,
        mounts,
        layout,
        notes,
        network,
        shown,
        share: share.clone(),
    })
}

/// What the pod is told of Services; enableServiceLinks is true where nothing is said (core/v1 defaults.go).
async fn service_variables(context: &Context, pod: &Pod) -> BTreeMap<String, String> {
    let links = pod.spec.as_ref().and_then(|spec| spec.enable_service_links).unwrap_or(true);
    context.services.variables(pod.metadata.namespace.as_deref().unwrap_or_default(), links).await
}

/// The pod's directory: the known one after a restart, else a new one.
async fn claim(context: &Context, pod: &Pod, known: Option<PathBuf>) -> Result<PathBuf, PrepareError> {
    let marker = marker(&context.identity, pod);
    if let Some(known) = known {
        let uid = marker.uid.clone();
        let ours = move || directory::read_marker(&known).filter(|m| m.uid == uid).map(|_| known);
        if let Some(known) = blocking(ours).await? {
            return Ok(known);
        }
    }
    let parent = context.places.parent(&marker.namespace);
    let plain = parent.join(&marker.name);
    let found = blocking(move || directory::look(&plain).unwrap_or(Occupant::None)).await?;
    let liveness = match &found {
        Occupant::Pod(other) if other.uid != marker.uid => liveness(context, other).await,
        _ => Liveness::Alive,
    };
    // Only what was asked about may be moved aside; another that came meanwhile counts as alive.
    let asked = match found {
        Occupant::Pod(other) => Some(other),
        _ => None,
    };
    let home = context.places.home.clone();
    // Where files of pods may have to be hidden from others, they lie in the kept directory.
    let store = context.policy.isolation.stores().then(|| context.places.kept.clone());
    Ok(blocking(move || claim_at(&parent, &marker, asked.as_deref(), liveness, &home, store.as_deref()))
        .await??)
}

fn claim_at(
    parent: &Path,
    marker: &Marker,
    asked: Option<&Marker>,
    liveness: Liveness,
    home: &Path,
    store: Option<&Path>,
) -> Result<PathBuf, DirectoryError> {
    let answer = |other: &Marker| if Some(other) == asked { liveness } else { Liveness::Alive };
    let claimed = directory::claim(parent, marker, answer)?;
    if let Some(kept) = store {
        directory::keep_in_store(&claimed, marker, kept)
            .map_err(|source| DirectoryError { path: directory::store(kept, &marker.uid), source })?;
    }
    // A pod whose pilot died has left its files in the home directory too, where they would be in the way of this one's.
    if let Some(gone) = asked.filter(|_| liveness == Liveness::Gone) {
        let aside = parent.join(directory::suffixed(&gone.name, &gone.uid));
        if directory::read_marker(&aside).is_some_and(|found| found.uid == gone.uid)
            && let Err(error) = directory::remove_home_files(&aside, home)
        {
            tracing::warn!(path = %aside.display(), %error, "files of a pod that is gone could not be removed");
        }
        // What it had in memory on this host takes room for nobody.
        if let Err(error) = volumes::memory::remove(&gone.uid) {
            tracing::warn!(uid = gone.uid, %error, "memory of a pod that is gone could not be freed");
        }
    }
    Ok(claimed)
}

pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, PrepareError> {
    on_disk(work).await.map_err(|error| PrepareError::Aborted(error.to_string()))
}

fn marker(identity: &Identity, pod: &Pod) -> Marker {
    let part = |text: &Option<String>| text.clone().unwrap_or_default();
    Marker {
        uid: part(&pod.metadata.uid),
        namespace: part(&pod.metadata.namespace),
        name: part(&pod.metadata.name),
        job: identity.job.clone(),
        host: identity.host.clone(),
        node: identity.node.clone(),
        cluster: identity.cluster.clone(),
        pilot: identity.process.clone(),
    }
}

/// Whether the pod of another directory may still be alive.
async fn liveness(context: &Context, other: &Marker) -> Liveness {
    if directory::is_of_cluster(other, context.identity.cluster.as_deref()) {
        return match context.api.pod(&other.namespace, &other.name, &other.uid).await {
            Ok(None) => Liveness::Gone,
            // Alive, or nobody can say.
            Ok(Some(_)) | Err(_) => Liveness::Alive,
        };
    }
    let start = crate::container::process::start_time(other.pilot.pid);
    directory::process_liveness(other, &context.identity.host, &context.identity.process.boot, start)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_only_another_pod_could_mend_is_not_tried_again() {
        let text = || "a".to_owned();
        let (container, mount, path, problem) = (text(), text(), text(), text());
        let full = || io::Error::from(io::ErrorKind::StorageFull);
        let table = [
            (VolumeError::NotFound { volume: text(), kind: "secret", name: text() }.into(), true),
            (VolumeError::Content { volume: text(), problem: text() }.into(), true),
            (VolumeError::Kind { volume: text(), kind: text() }.into(), false),
            (VolumeError::Name { volume: text(), problem: "a" }.into(), false),
            (VolumeError::Mount { container, mount, path, problem }.into(), false),
            (PrepareError::Write { path: PathBuf::new(), source: full() }, true),
            (PrepareError::Occupied { path: PathBuf::new(), source: full() }, true),
            (PrepareError::Read { path: PathBuf::new(), source: full() }, true),
            (HostnameError::Long { fqdn: text() }.into(), false),
            (PrepareError::Aborted(text()), true),
        ];
        for (error, wanted) in table {
            let error: PrepareError = error;
            assert_eq!(error.may_pass(), wanted, "{error}");
        }
    }
}
