//! Where a container sees which volume: pure, from its volumeMounts and from what the volumes come to.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use k8s_openapi::api::core::v1::{Container, VolumeMount};

use super::{
    By, ContainerPlan, Content, Contents, EmptyDir, Files, Place, PlannedDir, PlannedFile, PlannedLink,
    PlannedMount, PlannedView, Root, SubPathError, VOLUMES, VolumeError, absolute, paths, subpath, writer,
};

use crate::pod::network;

/// Mode of the directories that mounts are made in. The pod's own directory above them is 0700.
const DIR_MODE: u32 = 0o755;
/// Names in a container's directory that are the pilot's.
const RESERVED: [&str; 5] = ["logs", "pgid", "termination-log", network::FILES[0], network::FILES[1]];

/// Where a pod is.
#[derive(Debug, Clone, Copy)]
pub struct Ground<'a> {
    /// Its directory.
    pub directory: &'a Path,
    /// The user's home directory.
    pub home: &'a Path,
}

/// Plans the volumes of a container. What two containers mount beneath the same emptyDir at the same path is theirs to agree
/// on: the later container's files win. `sub_paths` are the mounts' subPaths, by their index, as [`subpath::sub_path`] gives
/// them.
///
/// # Errors
/// The first mount that cannot be served.
pub fn plan(
    container: &Container,
    contents: &Contents,
    sub_paths: &BTreeMap<usize, PathBuf>,
    ground: &Ground<'_>,
) -> Result<ContainerPlan, VolumeError> {
    let plan = ContainerPlan { container: container.name.clone(), ..ContainerPlan::default() };
    let planner =
        Planner { container, ground, plan, outer: Vec::new(), dirs: BTreeMap::new(), names: Vec::new() };
    planner.plan(contents, sub_paths)
}

/// A mount that others may lie beneath.
struct Outer<'a> {
    mounted: Place,
    volume: &'a str,
    is: Is,
}

enum Is {
    /// A link to this place of ours: what is mounted beneath belongs into it.
    Ours(Place),
    /// A link to something of the host's.
    Host,
    /// A view of files.
    View,
}

struct Planner<'a> {
    container: &'a Container,
    ground: &'a Ground<'a>,
    plan: ContainerPlan,
    /// Outer ones first.
    outer: Vec<Outer<'a>>,
    dirs: BTreeMap<Place, u32>,
    /// Links and files, with the volumeMount that they come by.
    names: Vec<(Place, &'a str)>,
}

impl<'a> Planner<'a> {
    fn plan(
        mut self,
        contents: &Contents,
        sub_paths: &BTreeMap<usize, PathBuf>,
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
            let Some(content) = contents.get(&mount.name) else {
                return Err(self.refused(mount, "the Pod has no volume of this name"));
            };
            let sub = sub_paths.get(&index).filter(|sub| !sub.as_os_str().is_empty());
            self.mount(place, index, mount, content, sub.map(PathBuf::as_path))?;
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
        place: Place,
        index: usize,
        mount: &'a VolumeMount,
        content: &Content,
        sub: Option<&Path>,
    ) -> Result<(), VolumeError> {
        let real = self.really(&place, mount)?;
        let read_only = mount.read_only == Some(true);
        let volume = self.ground.directory.join(VOLUMES).join(&mount.name);
        match (content, sub) {
            (Content::Files(files), None) => {
                self.show(&real, index, mount, files)?;
                // configmap.go, GetAttributes, and its like: such volumes are read-only whatever the mount says.
                self.note_mount(&place, volume, true);
                self.outer.push(Outer { mounted: place, volume: &mount.name, is: Is::View });
            }
            (Content::Files(files), Some(sub)) => {
                self.copy(&real, index, mount, files, sub)?;
                let source = absolute(&real, &self.container.name, self.ground);
                self.note_mount(&place, source, true);
            }
            (Content::Empty(EmptyDir { memory, .. }), sub) => {
                self.link(&real, mount, sub)?;
                self.note_mount(&place, within(&volume, sub), read_only);
                let ours = match memory {
                    true => Place { root: Root::Memory, path: PathBuf::from(&mount.name) },
                    false => Place { root: Root::Pod, path: Path::new(VOLUMES).join(&mount.name) },
                };
                let ours = Place { root: ours.root, path: ours.path.join(sub.unwrap_or(Path::new(""))) };
                self.outer.push(Outer { mounted: place, volume: &mount.name, is: Is::Ours(ours) });
            }
            (Content::Host(host), sub) => {
                self.link(&real, mount, sub)?;
                self.note_mount(&place, within(&host.path, sub), read_only);
                self.outer.push(Outer { mounted: place, volume: &mount.name, is: Is::Host });
            }
        }
        Ok(())
    }

    /// The mount for a container with a view of its own.
    fn note_mount(&mut self, place: &Place, source: PathBuf, read_only: bool) {
        if place.root == Root::Home {
            return;
        }
        let given = self.container.volume_mounts.iter().flatten();
        let is_absolute = given
            .filter(|mount| paths::mount_place(&mount.mount_path).is_ok_and(|other| other == *place))
            .any(|mount| mount.mount_path.starts_with('/'));
        let target = if is_absolute {
            Path::new("/").join(&place.path)
        } else {
            absolute(place, &self.container.name, self.ground)
        };
        self.plan.mounts.push(PlannedMount { source, target, read_only, real: false });
    }

    /// All of a volume's files.
    fn show(
        &mut self,
        real: &Place,
        index: usize,
        mount: &'a VolumeMount,
        files: &Files,
    ) -> Result<(), VolumeError> {
        self.make_dir(real);
        let by = if real.root == Root::Home { By::Home } else { By::View };
        for name in files.keys() {
            let place = Place { root: real.root, path: real.path.join(name) };
            self.check_reserved(&place, mount)?;
            if by == By::Home {
                self.make_dir_above(&place);
                self.names.push((place.clone(), &mount.name));
            }
            self.plan.files.push(PlannedFile {
                place,
                volume: mount.name.clone(),
                name: name.clone(),
                mount: index,
                by,
            });
        }
        if by == By::View {
            let tops = writer::tops(files).into_iter().chain([writer::DATA]);
            self.names.extend(
                tops.map(|top| (Place { root: real.root, path: real.path.join(top) }, mount.name.as_str())),
            );
        }
        self.plan.views.push(PlannedView { place: real.clone(), volume: mount.name.clone() });
        Ok(())
    }

    /// What a subPath names of a volume's files: one of them, those of a directory, or an empty directory, which is what a
    /// kubelet makes of a name that is not there (kubelet_pods.go, makeMounts).
    fn copy(
        &mut self,
        real: &Place,
        index: usize,
        mount: &'a VolumeMount,
        files: &Files,
        sub: &Path,
    ) -> Result<(), VolumeError> {
        let chosen: Vec<(&String, Place)> = files
            .keys()
            .filter_map(|name| {
                let beneath = Path::new(name).strip_prefix(sub).ok()?;
                let path =
                    if beneath.as_os_str().is_empty() { real.path.clone() } else { real.path.join(beneath) };
                Some((name, Place { root: real.root, path }))
            })
            .collect();
        let is_file = chosen.iter().any(|(_, place)| place == real);
        if is_file && real.path.as_os_str().is_empty() {
            return Err(self
                .refused(mount, "a file cannot be the container's directory itself: use another mountPath"));
        }
        if !is_file {
            self.make_dir(real);
        }
        for (name, place) in chosen {
            self.check_reserved(&place, mount)?;
            self.make_dir_above(&place);
            self.names.push((place.clone(), &mount.name));
            let (volume, name) = (mount.name.clone(), name.clone());
            self.plan.files.push(PlannedFile { place, volume, name, mount: index, by: By::Copy });
        }
        Ok(())
    }

    /// An emptyDir or a hostPath: a link to it.
    fn link(&mut self, real: &Place, mount: &'a VolumeMount, sub: Option<&Path>) -> Result<(), VolumeError> {
        if real.root == Root::Home {
            return Err(self.refused(
                mount,
                "an emptyDir or a hostPath is a link that goes with its pod and cannot be in the home directory: use a mountPath without `~`",
            ));
        }
        if real.path.as_os_str().is_empty() {
            return Err(self.refused(
                mount,
                "an emptyDir or a hostPath cannot be the container's directory itself: use another mountPath",
            ));
        }
        self.check_reserved(real, mount)?;
        self.make_dir_above(real);
        self.names.push((real.clone(), &mount.name));
        self.plan.links.push(PlannedLink {
            place: real.clone(),
            volume: mount.name.clone(),
            sub: sub.unwrap_or(Path::new("")).to_owned(),
        });
        Ok(())
    }

    /// Where `place` really is, when it lies beneath another mount.
    fn really(&mut self, place: &Place, mount: &VolumeMount) -> Result<Place, VolumeError> {
        for outer in self.outer.iter().rev().filter(|outer| outer.mounted.root == place.root) {
            let Ok(beneath) = place.path.strip_prefix(&outer.mounted.path) else { continue };
            // At the very mountPath of another: a conflict, which is told as one.
            if beneath.as_os_str().is_empty() {
                continue;
            }
            match &outer.is {
                Is::Ours(target) => {
                    return Ok(Place { root: target.root, path: target.path.join(beneath) });
                }
                Is::Host => {
                    let problem = format!(
                        "it lies beneath the hostPath volume {:?}, so that it would be made in the host's own directory: use a mountPath outside of it",
                        outer.volume
                    );
                    return Err(self.refused(mount, problem));
                }
                Is::View => {
                    self.plan.nested.insert((outer.volume.to_owned(), beneath.to_owned()));
                    break;
                }
            }
        }
        Ok(place.clone())
    }

    /// A directory and those above it.
    fn make_dir(&mut self, place: &Place) {
        for path in place.path.ancestors().filter(|path| !path.as_os_str().is_empty()) {
            // What the volumes themselves are is made with them.
            let depth = path.components().count();
            if place.root == Root::Pod && depth <= 2 || place.root == Root::Memory && depth <= 1 {
                break;
            }
            self.dirs.entry(Place { root: place.root, path: path.to_owned() }).or_insert(DIR_MODE);
        }
    }

    fn make_dir_above(&mut self, place: &Place) {
        if let Some(above) = place.path.parent() {
            self.make_dir(&Place { root: place.root, path: above.to_owned() });
        }
    }

    fn check_reserved(&self, place: &Place, mount: &VolumeMount) -> Result<(), VolumeError> {
        let first = place.path.components().next();
        let reserved = place.root == Root::Container
            && first.is_some_and(|first| RESERVED.iter().any(|name| first.as_os_str() == *name));
        if !reserved {
            return Ok(());
        }
        let problem = format!(
            "{} is kept for the pilot's own `pgid` and `logs` in a container's directory: use another mountPath",
            place.path.display()
        );
        Err(self.refused(mount, problem))
    }

    /// Nothing may be two things at once: a file of two volumes, a file and a directory, a link and either.
    fn check_conflicts(&self) -> Result<(), VolumeError> {
        let mut taken: BTreeSet<&Place> = BTreeSet::new();
        for (place, mount) in &self.names {
            if !taken.insert(place) || self.dirs.contains_key(place) {
                return Err(VolumeError::Mount {
                    container: self.container.name.clone(),
                    mount: (*mount).to_owned(),
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

/// A volume, or what a mount takes of it. `join` of nothing would leave a slash at the end, by which a file cannot be opened.
fn within(volume: &Path, sub: Option<&Path>) -> PathBuf {
    sub.map_or_else(|| volume.to_owned(), |sub| volume.join(sub))
}

/// The subPaths of a container's mounts, by their index; `value` is a variable of its environment.
///
/// # Errors
/// The first that cannot be used.
pub fn sub_paths(
    container: &Container,
    value: &dyn Fn(&str) -> Option<String>,
) -> Result<BTreeMap<usize, PathBuf>, SubPathError> {
    let mut found = BTreeMap::new();
    for (index, mount) in container.volume_mounts.iter().flatten().enumerate() {
        if let Some(path) = subpath::sub_path(mount, value)? {
            found.insert(index, path);
        }
    }
    Ok(found)
}
