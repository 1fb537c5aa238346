//! What was planned, on disk. Nothing leaves its root, by no `..` and no link.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::io;
use std::path::{Path, PathBuf};

use super::refresh::Layout;
use super::{
    By, ContainerPlan, Content, Contents, EmptyDir, Files, Ground, MountProblem, Place, PlannedLink,
    PlannedView, Root, SubPathError, VOLUMES, VolumeError, absolute, hostpath, memory, subpath, writer,
};
use crate::files;
use crate::pod::directory;

/// Mode of the directories that mounts are made in. The pod's own directory above them is 0700.
const DIR_MODE: u32 = 0o755;
/// Mode of an emptyDir, as kubelet makes it (emptydir/empty_dir.go).
const EMPTY_DIR_MODE: u32 = 0o777;

/// Why volumes cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// A file or directory cannot be made.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Something of the host's is not what the Pod says.
    #[error("{0}")]
    Volume(#[from] VolumeError),
}

fn fail(path: &Path) -> impl Fn(io::Error) -> WriteError {
    let path = path.to_owned();
    move |source| WriteError::Io { path: path.clone(), source }
}

/// Whose volumes, and where.
#[derive(Debug, Clone, Copy)]
pub struct Target<'a> {
    /// Where the pod is.
    pub ground: Ground<'a>,
    /// Where its `containers/` and `volumes/` really are ([`directory::contents`]).
    pub contents: &'a Path,
    /// Its uid.
    pub uid: &'a str,
    /// The group that its volumes are to have.
    pub group: Option<u32>,
}

/// Makes the volumes and what the containers see of them. Files that a subPath has copied stay as they are for the
/// containers in `running`. Returns the containers that cannot start, and fills in where the mounts' sources really are.
///
/// # Errors
/// The first that cannot be made.
pub fn write(
    target: &Target<'_>,
    contents: &Contents,
    plans: &mut [ContainerPlan],
    running: &BTreeSet<String>,
) -> Result<BTreeMap<String, MountProblem>, WriteError> {
    let mut roots = Roots::open(target)?;
    for (name, content) in contents {
        roots.volume(name, content)?;
    }
    for (volume, path) in plans.iter().flat_map(|plan| &plan.nested) {
        // Only for mounts: one that cannot be made is missed by nobody else.
        let _ = roots.pod.create_dir_all(&Path::new(VOLUMES).join(volume).join(path), DIR_MODE);
    }
    let mut problems = BTreeMap::new();
    for plan in plans.iter_mut() {
        let own = Path::new("containers").join(&plan.container);
        let logs = own.join("logs");
        roots.pod.create_dir_all(&logs, 0o700).map_err(fail(&target.ground.directory.join(&logs)))?;
        let made = roots.container(plan, contents, running.contains(&plan.container))?;
        if let Some(problem) = made.map(MountProblem::from).or(plan.problem.clone()) {
            problems.insert(plan.container.clone(), problem);
        }
        for mount in &mut plan.mounts {
            // One that is not there yet (a hostPath of no type) is named as the Pod has it.
            if let Ok(real) = std::fs::canonicalize(&mount.source) {
                (mount.source, mount.real) = (real, true);
            }
        }
    }
    Ok(problems)
}

/// Makes volumes hold what they come to now, and lets all who see them follow. What goes wrong with one volume does not hold
/// up the others.
pub(super) fn update(target: &Target<'_>, contents: &Contents, layout: &Layout) -> Vec<(String, WriteError)> {
    let mut roots = match Roots::open(target) {
        Ok(roots) => roots,
        Err(error) => return vec![(String::new(), error)],
    };
    let mut failed = Vec::new();
    for (name, content) in contents {
        let Content::Files(files) = content else { continue };
        if let Err(error) = roots.update(name, files, layout) {
            failed.push((name.clone(), error));
        }
    }
    failed
}

/// Where a pod's files are made.
struct Roots<'a> {
    target: &'a Target<'a>,
    pod: files::Root,
    home: Option<files::Root>,
    /// Of emptyDirs in memory.
    memory: BTreeMap<String, PathBuf>,
    /// Files that volumes had and do not have any more.
    removed: BTreeMap<String, Vec<PathBuf>>,
    /// The one that was worked in last.
    open_memory: Option<files::Root>,
}

impl<'a> Roots<'a> {
    fn open(target: &'a Target<'a>) -> Result<Self, WriteError> {
        let pod = files::Root::open(target.contents).map_err(fail(target.contents))?;
        Ok(Self {
            target,
            pod,
            home: None,
            memory: BTreeMap::new(),
            removed: BTreeMap::new(),
            open_memory: None,
        })
    }

    /// One volume's own directory.
    fn volume(&mut self, name: &str, content: &Content) -> Result<(), WriteError> {
        let path = Path::new(VOLUMES).join(name);
        let at = self.target.ground.directory.join(&path);
        match content {
            Content::Files(files) => {
                let written = self.files(name, files)?;
                self.removed.insert(name.to_owned(), written.removed);
                Ok(())
            }
            Content::Empty(EmptyDir { memory: false, .. }) => {
                self.make(Path::new(VOLUMES), DIR_MODE, &at)?;
                let made = self.pod.beneath(&path, EMPTY_DIR_MODE).map_err(fail(&at))?;
                self.target.group.map_or(Ok(()), |group| made.set_group(group)).map_err(fail(&at))
            }
            Content::Empty(EmptyDir { memory: true, .. }) => {
                let in_memory = |source: io::Error| WriteError::Io {
                    path: at.clone(),
                    source: io::Error::new(
                        source.kind(),
                        format!("no room in memory (medium: Memory) in /dev/shm: {source}"),
                    ),
                };
                let made = memory::make(self.target.uid, name, EMPTY_DIR_MODE).map_err(in_memory)?;
                if let Some(group) = self.target.group {
                    files::Root::open(&made).and_then(|made| made.set_group(group)).map_err(in_memory)?;
                }
                let volumes = self.pod.beneath(Path::new(VOLUMES), DIR_MODE).map_err(fail(&at))?;
                volumes.relink(&made, OsStr::new(name)).map_err(fail(&at))?;
                self.memory.insert(name.to_owned(), made);
                Ok(())
            }
            Content::Host(host) => {
                Ok(hostpath::check(host).map_err(|problem| VolumeError::content(name, problem))?)
            }
        }
    }

    fn make(&self, path: &Path, mode: u32, at: &Path) -> Result<(), WriteError> {
        self.pod.create_dir_all(path, mode).map_err(fail(at))
    }

    /// A volume of files.
    fn files(&self, name: &str, files: &Files) -> Result<writer::Written, WriteError> {
        let path = Path::new(VOLUMES).join(name);
        let at = self.target.ground.directory.join(&path);
        self.make(Path::new(VOLUMES), DIR_MODE, &at)?;
        let root = self.pod.beneath(&path, DIR_MODE).map_err(fail(&at))?;
        self.target.group.map_or(Ok(()), |group| root.set_group(group)).map_err(fail(&at))?;
        writer::write(&root, files, self.target.group).map_err(fail(&at))
    }

    /// What one container sees. Something else than a volume that is in its way is told as its problem.
    fn container(
        &mut self,
        plan: &ContainerPlan,
        contents: &Contents,
        running: bool,
    ) -> Result<Option<SubPathError>, WriteError> {
        let ground = self.target.ground;
        for dir in &plan.dirs {
            let at = absolute(&dir.place, &plan.container, &ground);
            let (root, path) = self.at(&dir.place, &plan.container)?;
            root.create_dir_all(&path, dir.mode).map_err(fail(&at))?;
        }
        for link in &plan.links {
            let at = absolute(&link.place, &plan.container, &ground);
            let to = match self.leads_to(link, contents, &plan.container) {
                Ok(to) => to,
                Err(problem) => return Ok(Some(problem)),
            };
            let (root, path) = self.at(&link.place, &plan.container)?;
            root.symlink(&to, &path).map_err(fail(&at))?;
        }
        for view in plan.views.iter().filter(|view| view.place.root != Root::Home) {
            if let Some(Content::Files(files)) = contents.get(&view.volume) {
                self.show(view, &plan.container, files)?;
            }
        }
        for view in plan.views.iter().filter(|view| view.place.root == Root::Home) {
            let removed = self.removed.get(&view.volume).cloned().unwrap_or_default();
            self.remove_home(&view.place, &removed)?;
        }
        for file in plan.files.iter().filter(|file| file.by == By::Home || file.by == By::Copy && !running) {
            if let Some(Content::Files(files)) = contents.get(&file.volume)
                && let Some(entry) = files.get(&file.name)
            {
                self.file(&file.place, &plan.container, entry)?;
            }
        }
        Ok(None)
    }

    /// A file of a container's own.
    fn file(&mut self, place: &Place, container: &str, entry: &super::Entry) -> Result<(), WriteError> {
        let at = absolute(place, container, &self.target.ground);
        let (group, list) = (self.target.group, self.target.ground.directory.join(directory::HOME_FILES));
        let (root, path) = self.at(place, container)?;
        if place.root == Root::Home {
            return root.write_own(&path, &entry.data, entry.mode, &list).map_err(fail(&at));
        }
        root.write(&path, &entry.data, entry.mode).map_err(fail(&at))?;
        group.map_or(Ok(()), |group| root.set_file_group(&path, group, entry.mode)).map_err(fail(&at))
    }

    /// What a link to a directory holds. Relative where it stays in the pod's directory, which may be moved.
    fn leads_to(
        &self,
        link: &PlannedLink,
        contents: &Contents,
        container: &str,
    ) -> Result<PathBuf, SubPathError> {
        let directory = self.target.ground.directory;
        let base = match contents.get(&link.volume) {
            Some(Content::Host(host)) => host.path.clone(),
            _ => directory.join(VOLUMES).join(&link.volume),
        };
        if !link.sub.as_os_str().is_empty()
            && let Err(problem) = subpath::resolve(&base, &link.sub, &link.volume, container)
        {
            return Err(problem);
        }
        let to = match contents.get(&link.volume) {
            Some(Content::Host(host)) if link.sub.as_os_str().is_empty() => host.path.clone(),
            Some(Content::Host(host)) => host.path.join(&link.sub),
            _ => self.to_volume(&link.place, &Path::new(&link.volume).join(&link.sub)),
        };
        Ok(to)
    }

    /// The way from a place to something in the pod's volumes.
    fn to_volume(&self, from: &Place, path: &Path) -> PathBuf {
        let depth = from.path.components().count().saturating_sub(1);
        let up = match from.root {
            // `containers/<name>/` is two below the pod's directory.
            Root::Container => depth + 2,
            Root::Pod => depth,
            Root::Memory | Root::Home => {
                return self.target.ground.directory.join(VOLUMES).join(path);
            }
        };
        let up: PathBuf = std::iter::repeat_n("..", up).collect();
        up.join(VOLUMES).join(path)
    }

    fn show(&mut self, view: &PlannedView, container: &str, files: &Files) -> Result<(), WriteError> {
        let at = absolute(&view.place, container, &self.target.ground);
        let (ground, group) = (self.target.ground, self.target.group);
        let volume = Path::new(VOLUMES).join(&view.volume);
        let volume = self.pod.existing(&volume).and_then(|found| {
            found.ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "the volume is not there any more"))
        });
        let volume = volume.map_err(fail(&ground.directory.join(VOLUMES).join(&view.volume)))?;
        let (root, path) = self.at(&view.place, container)?;
        let shown =
            root.beneath(&path, DIR_MODE).and_then(|shown| writer::mirror(&shown, &volume, files, group));
        shown.map_err(fail(&at))
    }

    /// Writes a volume anew, and what shows it.
    fn update(&mut self, name: &str, files: &Files, layout: &Layout) -> Result<(), WriteError> {
        let written = self.files(name, files)?;
        let mut result = Ok(());
        for (container, view) in layout.views.iter().filter(|(_, view)| view.volume == name) {
            if let Err(error) = self.show(view, container, files) {
                result = Err(error);
            }
        }
        for (place, _) in layout.homes.iter().filter(|(_, volume)| volume == name) {
            if let Err(error) = self.update_home(place, files, &written) {
                result = Err(error);
            }
        }
        result
    }

    /// The files of a volume that are in the home directory: each is replaced whole, not all at once.
    fn update_home(
        &mut self,
        place: &Place,
        files: &Files,
        written: &writer::Written,
    ) -> Result<(), WriteError> {
        let at = |path: &str| Place { root: Root::Home, path: place.path.join(path) };
        if written.changed {
            for (path, entry) in files {
                self.file(&at(path), "", entry)?;
            }
        }
        self.remove_home(place, &written.removed)
    }

    /// Removes the pod's own files that a volume does not have any more.
    fn remove_home(&mut self, place: &Place, removed: &[PathBuf]) -> Result<(), WriteError> {
        let list = self.target.ground.directory.join(directory::HOME_FILES);
        for gone in removed {
            let path = place.path.join(gone);
            let (root, _) = self.at(place, "")?;
            root.remove_if_own(&path, &list).map_err(fail(&self.target.ground.home.join(&path)))?;
        }
        Ok(())
    }

    /// The root that a place is beneath, and its path there.
    fn at(&mut self, place: &Place, container: &str) -> Result<(&files::Root, PathBuf), WriteError> {
        Ok(match place.root {
            Root::Container => (&self.pod, Path::new("containers").join(container).join(&place.path)),
            Root::Pod => (&self.pod, place.path.clone()),
            Root::Home => {
                if self.home.is_none() {
                    let home = self.target.ground.home;
                    self.home = Some(files::Root::open(home).map_err(fail(home))?);
                }
                (self.home.as_ref().unwrap_or(&self.pod), place.path.clone())
            }
            Root::Memory => return self.in_memory(place),
        })
    }

    fn in_memory(&mut self, place: &Place) -> Result<(&files::Root, PathBuf), WriteError> {
        let mut parts = place.path.components();
        let volume = parts.next().map(|part| part.as_os_str().to_string_lossy().into_owned());
        let rest = parts.as_path().to_owned();
        let volume = volume.unwrap_or_default();
        let at = match self.memory.get(&volume) {
            Some(at) => at.clone(),
            None => memory::make(self.target.uid, &volume, EMPTY_DIR_MODE)
                .map_err(fail(&self.target.ground.directory.join(VOLUMES).join(&volume)))?,
        };
        let root = files::Root::open(&at).map_err(fail(&at))?;
        self.open_memory = Some(root);
        Ok((self.open_memory.as_ref().unwrap_or(&self.pod), rest))
    }
}
