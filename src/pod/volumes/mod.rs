//! A pod's volumes: what they come to ([`contents`]), what each container sees of them ([`plan`]), both pure; then the disk
//! ([`write()`]), and what becomes of it while the pod lives ([`keeper`]).
//!
//! Each place is relative to one of four roots and never leaves it: no planned path is absolute or holds
//! `..`. Whoever writes them resolves them beneath the root all the same.
//!
//! Sources: `pkg/volume/{configmap,secret,projected,downwardapi}`, `pkg/volume/util/atomic_writer.go` (which
//! paths are refused), `operationexecutor` (the texts).

#[cfg(test)]
mod disk_tests;
mod hostpath;
pub mod keeper;
pub mod memory;
mod paths;
mod planner;
mod refresh;
mod script;
mod sources;
mod storage;
mod subpath;
#[cfg(test)]
mod tests;
mod usage;
mod write;
mod writer;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use k8s_openapi::api::core::v1::Pod;

use super::containers;
use super::directory::container_dir;
use super::environment::{Facts, Objects};
pub use hostpath::HostPath;
pub use planner::{Ground, plan, sub_paths};
pub use refresh::Layout;
pub use script::{ImageError, Script, script};
pub use sources::content;
pub use subpath::SubPathError;

pub use write::{Target, WriteError, write};

/// What a place is relative to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Root {
    /// The container's own directory.
    Container,
    /// The pod's directory, for what its containers share.
    Pod,
    /// Where the pod's emptyDirs in memory are, each in a directory of its name.
    Memory,
    /// The user's home directory: what is there already, and was not written by us, is never replaced.
    Home,
}

/// A path beneath a root.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Place {
    /// Beneath which root.
    pub root: Root,
    /// Relative, of plain names alone. Empty: the root itself.
    pub path: PathBuf,
}

/// A file of a volume, where a container sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlannedFile {
    /// Where.
    pub place: Place,
    /// The volume.
    pub volume: String,
    /// Its path within the volume.
    pub name: String,
    /// By which volumeMount (its index in the container) it comes.
    pub mount: usize,
    /// How it gets there.
    pub by: By,
}

/// How a file of a volume gets to where a container sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum By {
    /// By a [`PlannedView`]: it follows the volume.
    View,
    /// Written into the home directory, and again when it changes.
    Home,
    /// Written once, for a `subPath`: it stays as it was when the container started.
    Copy,
}

/// A directory to be made, with what is above it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlannedDir {
    /// Where.
    pub place: Place,
    /// Its permission bits, whatever the umask.
    pub mode: u32,
}

/// A symbolic link of ours to a directory, or with a `subPath` to something in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlannedLink {
    /// Where.
    pub place: Place,
    /// The volume: an emptyDir or a hostPath.
    pub volume: String,
    /// What of it; empty for all.
    pub sub: PathBuf,
}

/// A directory that shows a volume's files, in the same layout as the volume's own and by hard links to it. In the home
/// directory they are plain files, beside the user's own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlannedView {
    /// Where.
    pub place: Place,
    /// The volume.
    pub volume: String,
}

/// A mount as a kubelet would have it made, for a container that has a view of the file system of its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlannedMount {
    /// What is mounted: a directory or a file of the host, absolute.
    pub source: PathBuf,
    /// Where, absolute.
    pub target: PathBuf,
    /// Whether nothing can be written there.
    pub read_only: bool,
    /// Whether the source is named as it really is.
    pub real: bool,
}

/// What one container's directory is to hold. To be made in this order: `dirs`, `links`, `views`, `files`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ContainerPlan {
    /// The container's name.
    pub container: String,
    /// Directories, each after those above it.
    pub dirs: Vec<PlannedDir>,
    /// Links to directories.
    pub links: Vec<PlannedLink>,
    /// Views of volumes' files.
    pub views: Vec<PlannedView>,
    /// All files that the container sees.
    pub files: Vec<PlannedFile>,
    /// The same as mounts, outer ones first. Mounts at `~` are not among them: their files are in the home directory itself,
    /// beside the user's own.
    pub mounts: Vec<PlannedMount>,
    /// Directories in volumes of files that other volumes are mounted on (pkg/volume/util/nested_volumes.go).
    pub nested: BTreeSet<(String, PathBuf)>,
    /// Why this container cannot start; nothing else is planned then.
    pub problem: Option<MountProblem>,
}

impl ContainerPlan {
    /// Of a container that cannot start.
    #[must_use]
    pub fn refused(container: &str, problem: impl Into<MountProblem>) -> Self {
        Self { container: container.to_owned(), problem: Some(problem.into()), ..Self::default() }
    }
}

/// Why one container cannot have its mounts, while the pod's others may. It waits with reason CreateContainerConfigError.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MountProblem {
    /// What it takes of a volume.
    #[error("{0}")]
    SubPath(#[from] SubPathError),
    /// A volume of an ephemeral container's.
    #[error("{0}")]
    Volume(#[from] VolumeError),
}

impl MountProblem {
    /// Whether anything but another Pod could mend it.
    #[must_use]
    pub fn may_mend(&self) -> bool {
        match self {
            Self::SubPath(error) => error.may_mend(),
            Self::Volume(error) => error.may_mend(),
        }
    }
}

/// What a volume comes to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Content {
    /// Files by their paths in it.
    Files(Files),
    /// An emptyDir.
    Empty(EmptyDir),
    /// A hostPath.
    Host(HostPath),
}

/// The files of a volume, by their paths in it.
pub type Files = BTreeMap<String, Entry>;

/// What volumes come to, by their names.
pub type Contents = BTreeMap<String, Content>;

/// One file of a volume.
#[derive(Clone, PartialEq, Eq)]
pub struct Entry {
    /// What is in it. May be secret.
    pub data: Vec<u8>,
    /// Its permission bits, whatever the umask.
    pub mode: u32,
}

impl std::fmt::Debug for Entry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // What is in the file may be a secret: its length alone is shown.
        write!(f, "Entry({} bytes, {:#o})", self.data.len(), self.mode)
    }
}

/// A directory that the pod's containers share, empty at first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EmptyDir {
    /// In memory, not on disk.
    pub memory: bool,
    /// The most bytes in it, where there is a limit.
    pub limit: Option<u64>,
}

/// Why a pod's volumes cannot be set up. The containers wait (`ContainerCreating`) with an event of reason
/// [`VolumeError::REASON`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum VolumeError {
    /// An object that is not optional does not exist (yet).
    #[error("MountVolume.SetUp failed for volume {volume:?} : {kind} {name:?} not found")]
    NotFound {
        /// The volume that wants it.
        volume: String,
        /// `configmap` or `secret`.
        kind: &'static str,
        /// Its name.
        name: String,
    },
    /// The objects are there, but something in them is missing or cannot be used.
    #[error("MountVolume.SetUp failed for volume {volume:?} : {problem}")]
    Content {
        /// The volume.
        volume: String,
        /// What is the matter with it.
        problem: String,
    },
    /// A volume whose name cannot be one.
    #[error("volume {volume:?}: {problem}")]
    Name {
        /// The volume.
        volume: String,
        /// What is the matter with it.
        problem: &'static str,
    },
    /// A volume of a kind that a process node cannot serve.
    #[error(
        "volume {volume:?} is of kind {kind}, which jiriaf-pilot does not support: use configMap, secret, projected, downwardAPI, emptyDir or hostPath"
    )]
    Kind {
        /// The volume.
        volume: String,
        /// Its kind, as the Pod spells it.
        kind: String,
    },
    /// A volumeMount that cannot be honoured.
    #[error("container {container:?}: volumeMount {mount:?} at {path:?}: {problem}")]
    Mount {
        /// The container.
        container: String,
        /// The volumeMount's name.
        mount: String,
        /// Its mountPath.
        path: String,
        /// What is the matter with it.
        problem: String,
    },
}

impl VolumeError {
    /// The reason of the event (kubelet's `FailedMountVolume`).
    pub const REASON: &'static str = "FailedMount";

    /// Whether a change of a ConfigMap or Secret could mend it; else only another Pod could.
    #[must_use]
    pub fn may_mend(&self) -> bool {
        matches!(self, Self::NotFound { .. } | Self::Content { .. })
    }

    fn content(volume: &str, problem: impl Into<String>) -> Self {
        Self::Content { volume: volume.to_owned(), problem: problem.into() }
    }
}

/// What the volumes of a pod come to.
#[derive(Debug, Default)]
pub struct Found {
    /// Those that can be served.
    pub contents: Contents,
    /// Volumes that stay as they are, since what they are made of is gone or incomplete, and why.
    pub kept: BTreeMap<String, VolumeError>,
    /// Volumes of ephemeral containers alone that cannot be served, and why.
    pub left_out: BTreeMap<String, VolumeError>,
}

/// What the volumes come to that a container mounts; the others are skipped, as a kubelet skips them
/// (`desired_state_of_world_populator.go`). One that was made of the `last` objects and cannot be made of these is kept: in
/// a kubelet too it stays mounted.
///
/// # Errors
/// The first thing that is missing or cannot be served, in the spec's order; what ephemeral containers alone mount is no
/// reason, since they came when the pod had begun.
pub fn contents(pod: &Pod, objects: &Objects, last: &Objects, facts: &Facts) -> Result<Found, VolumeError> {
    let mut found = Found::default();
    let Some(spec) = &pod.spec else { return Ok(found) };
    let (mut mounted, mut by_others) = (BTreeSet::new(), BTreeSet::new());
    for (kind, container) in containers::all(spec) {
        for mount in container.volume_mounts.iter().flatten() {
            mounted.insert(mount.name.clone());
            if kind != containers::Kind::Ephemeral {
                by_others.insert(mount.name.clone());
            }
        }
    }
    // An API server takes no other; the manifests of `play` have met none.
    let is_label = |name: &str| {
        (1..=63).contains(&name.len()) && name.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-'))
    };
    let volumes = spec.volumes.iter().flatten().filter(|volume| mounted.contains(&volume.name));
    if let Some(wrong) = volumes.clone().find(|volume| !is_label(&volume.name)) {
        let problem = "its name must be a DNS label: at most 63 of a-z, 0-9 and `-`";
        return Err(VolumeError::Name { volume: wrong.name.clone(), problem });
    }
    for volume in volumes {
        let made = content(volume, pod, objects, facts).or_else(|error| {
            let last = content(volume, pod, last, facts).ok().filter(|_| error.may_mend());
            let kept = last.ok_or_else(|| error.clone())?;
            found.kept.insert(volume.name.clone(), error);
            Ok(kept)
        });
        match made {
            Ok(content) => {
                found.contents.insert(volume.name.clone(), content);
            }
            Err(error) if !by_others.contains(&volume.name) => {
                found.left_out.insert(volume.name.clone(), error);
            }
            Err(error) => return Err(error),
        }
    }
    Ok(found)
}

/// What a pod's emptyDirs hold in memory.
#[must_use]
pub fn memory_used(uid: &str) -> u64 {
    memory::parents().iter().map(|parent| usage::used(&parent.join(uid), u64::MAX)).sum()
}

/// A place in the file system.
#[must_use]
pub fn absolute(place: &Place, container: &str, ground: &Ground<'_>) -> PathBuf {
    match place.root {
        Root::Container => container_dir(ground.directory, container).join(&place.path),
        Root::Pod => ground.directory.join(&place.path),
        // By the link in the pod's directory.
        Root::Memory => ground.directory.join(VOLUMES).join(&place.path),
        Root::Home => ground.home.join(&place.path),
    }
}

/// The directory of the pod's that holds its volumes.
pub(super) const VOLUMES: &str = "volumes";
