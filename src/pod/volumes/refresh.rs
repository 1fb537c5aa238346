//! Volumes of files made true again: read what they come to now, write it, let all who see them follow.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{DownwardAPIVolumeFile, Pod, Volume};

use super::write::Target;
use super::{ContainerPlan, Content, Contents, Ground, Place, PlannedView, Root, Script, script, write};
use crate::pod::context::{Context, on_disk};
use crate::pod::directory;
use crate::pod::environment::{References, volume_references};
use crate::pod::objects::watches::{Key, Kind};
use crate::pod::objects::{self, Held, Read, Unanswered};
use crate::pod::security;

/// Who sees which volume: what the plans of a pod's containers come to, without what is in the files.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Layout {
    /// Views, each with its container.
    pub views: Vec<(String, PlannedView)>,
    /// Directories in the home directory, each with its volume.
    pub homes: Vec<(Place, String)>,
    /// Files that are containers' scripts, by volume and name.
    pub scripts: BTreeSet<(String, String)>,
}

impl Layout {
    /// Of these plans.
    #[must_use]
    pub fn of<'a>(plans: &[ContainerPlan], scripts: impl Iterator<Item = &'a Script>) -> Self {
        let mut layout = Self {
            scripts: scripts.filter_map(|script| script.follows.clone()).collect(),
            ..Self::default()
        };
        for plan in plans {
            for view in &plan.views {
                if view.place.root == Root::Home {
                    layout.homes.push((view.place.clone(), view.volume.clone()));
                } else {
                    layout.views.push((plan.container.clone(), view.clone()));
                }
            }
        }
        layout.homes.sort();
        layout.homes.dedup();
        layout
    }

    /// Volumes that somebody sees and that follow what they are made of.
    pub(super) fn followed(&self) -> BTreeSet<&str> {
        let views = self.views.iter().map(|(_, view)| view.volume.as_str());
        views.chain(self.homes.iter().map(|(_, volume)| volume.as_str())).collect()
    }
}

/// What of these references is told by watches.
pub(super) fn keys(references: &References, namespace: &str) -> Vec<Key> {
    let key = |kind| move |name: &String| Key { kind, namespace: namespace.to_owned(), name: name.clone() };
    let config_maps = references.config_maps.keys().map(key(Kind::ConfigMap));
    config_maps.chain(references.secrets.keys().map(key(Kind::Secret))).collect()
}

/// Whether a volume tells of labels or annotations.
pub(super) fn tells_of_metadata(volume: &Volume) -> bool {
    let of = |items: &Option<Vec<DownwardAPIVolumeFile>>| {
        items.iter().flatten().filter_map(|item| item.field_ref.as_ref()).any(|field| {
            field.field_path.starts_with("metadata.labels")
                || field.field_path.starts_with("metadata.annotations")
        })
    };
    volume.downward_api.as_ref().is_some_and(|source| of(&source.items))
        || volume.projected.as_ref().is_some_and(|projected| {
            projected
                .sources
                .iter()
                .flatten()
                .any(|source| source.downward_api.as_ref().is_some_and(|d| of(&d.items)))
        })
}

/// What could not be made true.
#[derive(Debug, Default)]
pub(super) struct Refreshed {
    /// What is missing or in the way, in kubelet's words.
    pub complaints: Vec<String>,
    /// Whether trying again may help, without anything else having changed.
    pub again: bool,
}

/// Reads what a volume is made of.
pub(super) async fn read(
    context: &Context,
    pod: &Pod,
    name: &str,
    held: &mut Held,
) -> Result<Read, Refreshed> {
    let wanted = volume_references(volume(pod, name));
    let read = objects::read(&context.api, pod, &wanted, held, Unanswered::Fails, Timestamp::now()).await;
    read.map_err(|error| Refreshed { complaints: vec![error.to_string()], again: true })
}

fn volume<'a>(pod: &'a Pod, name: &str) -> Option<&'a Volume> {
    pod.spec.as_ref()?.volumes.iter().flatten().find(|volume| volume.name == name)
}

/// Makes a volume true by what was read.
pub(super) async fn apply(
    context: &Context,
    pod: &Pod,
    directory: &Path,
    layout: &Layout,
    name: &str,
    read: Read,
    held: &mut Held,
) -> Refreshed {
    let mut done = Refreshed::default();
    let facts = context.facts();
    let (mut contents, mut not_made) = (Contents::new(), References::default());
    if let Some(volume) = volume(pod, name) {
        match super::content(volume, pod, &read.objects, &facts) {
            Ok(content) => {
                contents.insert(volume.name.clone(), content);
            }
            // As in a kubelet the files stay as they are.
            Err(error) => {
                done.complaints.push(error.to_string());
                not_made = volume_references([volume]);
            }
        }
    }
    for (volume, name) in &layout.scripts {
        if let Some(Content::Files(files)) = contents.get_mut(volume)
            && let Some(entry) = files.get_mut(name)
        {
            entry.mode |= script::executable(entry.mode);
        }
    }
    let (directory, home) = (directory.to_owned(), context.places.home.clone());
    let (uid, group) = (pod.metadata.uid.clone().unwrap_or_default(), security::fs_group(pod));
    let layout = layout.clone();
    let kept = context.places.kept.clone();
    let written = on_disk(move || {
        let ground = Ground { directory: &directory, home: &home };
        let beneath = directory::contents(&directory, &uid, &kept);
        write::update(&Target { ground, contents: &beneath, uid: &uid, group }, &contents, &layout)
    });
    match written.await {
        Ok(failed) => {
            done.again = !failed.is_empty();
            for (volume, error) in failed {
                done.complaints.push(format!("MountVolume.SetUp failed for volume {volume:?} : {error}"));
            }
        }
        Err(error) => {
            done.again = true;
            done.complaints.push(error.to_string());
        }
    }
    if !done.again {
        held.note(pod, read.versions, read.objects, &not_made);
    }
    done
}

/// The tokens and objects of each volume that is followed.
pub(super) fn followed<'a>(pod: &'a Pod, layout: &Layout) -> BTreeMap<&'a str, (&'a Volume, References)> {
    let seen = layout.followed();
    let volumes = pod.spec.iter().flat_map(|spec| spec.volumes.iter().flatten());
    volumes
        .filter(|volume| seen.contains(volume.name.as_str()))
        .map(|volume| (volume.name.as_str(), (volume, volume_references([volume]))))
        .collect()
}
