//! Which files, directories and links the volumes of a pod come to, before any of them is written.
//!
//! Each place is relative to one of three roots and never leaves it: no planned path is absolute or holds
//! `..`. Whoever writes them resolves them beneath the root all the same.
//!
//! Sources: `pkg/volume/{configmap,secret,projected,downwardapi}`, `pkg/volume/util/atomic_writer.go` (which
//! paths are refused), `operationexecutor` (the texts).

mod paths;
mod script;
mod sources;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use k8s_openapi::api::core::v1::{Container, Pod, Volume, VolumeMount};

use super::containers;
use super::environment::{Facts, Objects};
pub use script::{ImageError, script};

/// What a place is relative to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Root {
    /// The container's own directory.
    Container,
    /// The pod's directory, for what its containers share.
    Pod,
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

/// A file to be written.
#[derive(Clone, PartialEq, Eq)]
pub struct PlannedFile {
    /// Where.
    pub place: Place,
    /// Its permission bits, whatever the umask.
    pub mode: u32,
    /// What is in it. May be secret.
    pub data: Vec<u8>,
    /// By which volumeMount (its index in the container) it comes.
    pub mount: usize,
    /// Its path within the volume.
    pub name: String,
}

impl std::fmt::Debug for PlannedFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // What is in the file may be a secret: its length alone is shown.
        f.debug_struct("PlannedFile")
            .field("place", &self.place)
            .field("mode", &format_args!("{:#o}", self.mode))
            .field("bytes", &self.data.len())
            .finish_non_exhaustive()
    }
}

/// A directory to be made, with what is above it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlannedDir {
    /// Where.
    pub place: Place,
    /// Its permission bits, whatever the umask.
    pub mode: u32,
}

/// A symbolic link of ours to a directory that the pod's containers share.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlannedLink {
    /// Where.
    pub place: Place,
    /// What it holds: a relative path from the link's directory, which stays in the pod's directory.
    pub target: PathBuf,
}

/// What one container's directory is to hold. To be made in this order: `dirs`, `links`, `files`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ContainerPlan {
    /// The container's name.
    pub container: String,
    /// Directories, each after those above it.
    pub dirs: Vec<PlannedDir>,
    /// Links to what is shared.
    pub links: Vec<PlannedLink>,
    /// Files.
    pub files: Vec<PlannedFile>,
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
    /// A volume of a kind that a process node cannot serve.
    #[error(
        "volume {volume:?} is of kind {kind}, which jiriaf-pilot does not support: use configMap, secret, projected, downwardAPI or emptyDir, or name the host's path in the script"
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

/// Mode of the directories that mounts are made in. The pod's own directory above them is 0700.
const DIR_MODE: u32 = 0o755;
/// Mode of an emptyDir, as kubelet makes it.
const EMPTY_DIR_MODE: u32 = 0o777;
/// Names in a container's directory that are the pilot's.
const RESERVED: [&str; 2] = ["logs", "pgid"];

/// Plans the volumes of all containers of a pod, in the spec's order. Volumes that no container mounts are
/// skipped, as a kubelet skips them. What two containers mount beneath the same emptyDir at the same path is
/// theirs to agree on: the later container's files win.
///
/// # Errors
/// The first thing that is missing or cannot be served.
pub fn plan(pod: &Pod, objects: &Objects, facts: &Facts) -> Result<Vec<ContainerPlan>, VolumeError> {
    let Some(spec) = &pod.spec else { return Ok(Vec::new()) };
    let volumes: BTreeMap<&str, &Volume> =
        spec.volumes.iter().flatten().map(|volume| (volume.name.as_str(), volume)).collect();
    let mut payloads = BTreeMap::new();
    let mounted: BTreeSet<String> = containers::all(spec)
        .flat_map(|(_, container)| container.volume_mounts.clone().unwrap_or_default())
        .map(|mount| mount.name)
        .collect();
    // In the spec's order, so that the same thing is named first each time.
    for volume in spec.volumes.iter().flatten() {
        if mounted.contains(volume.name.as_str()) {
            let content = sources::content(volume, pod, objects, facts)?;
            payloads.insert(volume.name.as_str(), content);
        }
    }
    containers::all(spec).map(|(_, container)| Planner::new(&container).plan(&volumes, &payloads)).collect()
}

/// What a volume comes to.
enum Content {
    /// Files by their paths in it.
    Files(BTreeMap<String, Entry>),
    /// An emptyDir.
    Shared,
}

/// One file of a volume.
struct Entry {
    data: Vec<u8>,
    mode: u32,
}

struct Planner<'a> {
    container: &'a Container,
    plan: ContainerPlan,
    /// Where emptyDirs are mounted, and where they really are; deepest last.
    shared: Vec<(Place, Place)>,
    dirs: BTreeMap<Place, u32>,
}

impl<'a> Planner<'a> {
    fn new(container: &'a Container) -> Self {
        let plan = ContainerPlan { container: container.name.clone(), ..ContainerPlan::default() };
        Self { container, plan, shared: Vec::new(), dirs: BTreeMap::new() }
    }

    fn plan(
        mut self,
        volumes: &BTreeMap<&str, &Volume>,
        contents: &BTreeMap<&str, Content>,
    ) -> Result<ContainerPlan, VolumeError> {
        let mut mounts = Vec::new();
        for (index, mount) in self.container.volume_mounts.iter().flatten().enumerate() {
            let place = paths::mount_place(&mount.mount_path)
                .map_err(|problem| self.refused(mount, problem.to_string()))?;
            mounts.push((place, index, mount));
        }
        // Outer mounts first: what is mounted beneath an emptyDir belongs into it.
        mounts.sort_by_key(|(place, index, _)| (place.path.components().count(), *index));
        for (place, index, mount) in mounts {
            let content = match contents.get(mount.name.as_str()) {
                Some(content) if volumes.contains_key(mount.name.as_str()) => content,
                _ => return Err(self.refused(mount, "the Pod has no volume of this name")),
            };
            self.mount(&place, index, mount, content)?;
        }
        self.check_conflicts()?;
        self.plan.dirs = self.dirs.into_iter().map(|(place, mode)| PlannedDir { place, mode }).collect();
        Ok(self.plan)
    }

    fn refused(&self, mount: &VolumeMount, problem: impl Into<String>) -> VolumeError {
        VolumeError::Mount {
            container: self.container.name.clone(),
            mount: mount.name.clone(),
            path: mount.mount_path.clone(),
            problem: problem.into(),
        }
    }

    fn mount(
        &mut self,
        place: &Place,
        index: usize,
        mount: &VolumeMount,
        content: &Content,
    ) -> Result<(), VolumeError> {
        let set = |text: &Option<String>| text.as_ref().is_some_and(|text| !text.is_empty());
        if set(&mount.sub_path) || set(&mount.sub_path_expr) {
            return Err(self.refused(
                mount,
                "subPath is not supported by jiriaf-pilot yet: mount the volume, or use `items` to choose its files",
            ));
        }
        let real = self.really(place);
        match content {
            Content::Shared => self.link(place, &real, mount),
            Content::Files(files) => {
                self.make_dir(&real, DIR_MODE);
                for (name, entry) in files {
                    let file = Place { root: real.root, path: real.path.join(name) };
                    if is_reserved(&file) {
                        return Err(self.refused(mount, reserved_text(&file)));
                    }
                    if let Some(parent) = file.path.parent() {
                        self.make_dir(&Place { root: file.root, path: parent.to_owned() }, DIR_MODE);
                    }
                    self.plan.files.push(PlannedFile {
                        place: file,
                        mode: entry.mode,
                        data: entry.data.clone(),
                        mount: index,
                        name: name.clone(),
                    });
                }
                Ok(())
            }
        }
    }

    /// An emptyDir: one directory of the pod, and a link to it.
    fn link(&mut self, place: &Place, real: &Place, mount: &VolumeMount) -> Result<(), VolumeError> {
        let target = Place { root: Root::Pod, path: Path::new("volumes").join(&mount.name) };
        let depth = |path: &Path| path.components().count().saturating_sub(1);
        let up = match real.root {
            // `containers/<name>/` is two below the pod's directory.
            Root::Container => depth(&real.path) + 2,
            Root::Pod => depth(&real.path),
            Root::Home => {
                return Err(self.refused(
                    mount,
                    "an emptyDir goes with its pod and cannot be in the home directory: use a mountPath without `~`",
                ));
            }
        };
        let Some(parent) = real.path.parent() else {
            return Err(self.refused(
                mount,
                "an emptyDir cannot be the container's directory itself: use another mountPath",
            ));
        };
        if is_reserved(real) {
            return Err(self.refused(mount, reserved_text(real)));
        }
        self.make_dir(&Place { root: real.root, path: parent.to_owned() }, DIR_MODE);
        self.make_dir(&Place { root: Root::Pod, path: PathBuf::from("volumes") }, DIR_MODE);
        self.dirs.insert(target.clone(), EMPTY_DIR_MODE);
        let link: PathBuf = std::iter::repeat_n("..", up).collect();
        self.plan.links.push(PlannedLink { place: real.clone(), target: link.join(&target.path) });
        self.shared.push((place.clone(), target));
        Ok(())
    }

    /// Where `place` really is, when it lies beneath an emptyDir.
    fn really(&self, place: &Place) -> Place {
        self.shared
            .iter()
            .rev()
            .filter(|(mounted, _)| mounted.root == place.root)
            .find_map(|(mounted, target)| {
                let beneath = place.path.strip_prefix(&mounted.path).ok()?;
                // At the very mountPath of another emptyDir: the same link, which is a conflict.
                (!beneath.as_os_str().is_empty())
                    .then(|| Place { root: target.root, path: target.path.join(beneath) })
            })
            .unwrap_or_else(|| place.clone())
    }

    /// A directory and those above it.
    fn make_dir(&mut self, place: &Place, mode: u32) {
        for path in place.path.ancestors().filter(|path| !path.as_os_str().is_empty()) {
            self.dirs.entry(Place { root: place.root, path: path.to_owned() }).or_insert(mode);
        }
    }

    /// Nothing may be two things at once: a file of two volumes, a file and a directory, a link and either.
    fn check_conflicts(&self) -> Result<(), VolumeError> {
        let links = self.plan.links.iter().map(|link| {
            let volume = link.target.file_name().unwrap_or_default().to_string_lossy();
            (&link.place, volume.into_owned())
        });
        let files = self.plan.files.iter().map(|file| {
            let mount = self.container.volume_mounts.iter().flatten().nth(file.mount);
            (&file.place, mount.map(|mount| mount.name.clone()).unwrap_or_default())
        });
        let mut taken: BTreeSet<&Place> = BTreeSet::new();
        for (place, mount) in links.chain(files) {
            if !taken.insert(place) || self.dirs.contains_key(place) {
                return Err(VolumeError::Mount {
                    container: self.container.name.clone(),
                    mount,
                    path: place.path.display().to_string(),
                    problem:
                        "something else is at the same path: give each volumeMount a mountPath of its own"
                            .to_owned(),
                });
            }
        }
        Ok(())
    }
}

/// Whether a place in the container's directory is one of the pilot's own files.
fn is_reserved(place: &Place) -> bool {
    let first = place.path.components().next();
    place.root == Root::Container
        && first.is_some_and(|first| RESERVED.iter().any(|name| first.as_os_str() == *name))
}

fn reserved_text(place: &Place) -> String {
    format!(
        "{} is kept for the pilot's own `pgid` and `logs` in a container's directory: use another mountPath",
        place.path.display()
    )
}
