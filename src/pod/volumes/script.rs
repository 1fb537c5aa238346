//! Which of a container's files is its script: `image` names one of its volumeMounts.

use k8s_openapi::api::core::v1::Container;

use super::{By, ContainerPlan, Content, Contents, Place};

/// Parts of names that a script of several files does not have: certificates and keys lie beside it (as JIRIAF
/// has it, so that `monkey.sh` is none either).
const NO_SCRIPT: [&str; 3] = ["crt", "key", "pem"];

/// Why a container has no script. It waits with reason [`ImageError::REASON`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ImageError {
    /// `image` names none of the volumeMounts.
    #[error(
        "image {image:?} names none of the container's volumeMounts: a container runs a script from one of its volumes, so image must be one of {accepted}, or such a name, a slash and a file in it"
    )]
    NoMount {
        /// The image as given.
        image: String,
        /// What would be accepted.
        accepted: String,
    },
    /// The volume has no such file.
    #[error("image {image:?}: volumeMount {mount:?} has no file {file:?}: it has {present}")]
    NoFile {
        /// The image as given.
        image: String,
        /// The volumeMount.
        mount: String,
        /// The file that was wanted.
        file: String,
        /// What is there.
        present: String,
    },
    /// The volume has no file that could be a script.
    #[error(
        "image {image:?}: volumeMount {mount:?} has no file that could be the script: it has {present}, and names holding crt, key or pem are left out; name the file as image: {mount}/<file>"
    )]
    NoScript {
        /// The image as given.
        image: String,
        /// The volumeMount.
        mount: String,
        /// What is there.
        present: String,
    },
}

impl ImageError {
    /// The reason of a container that waits because of this.
    pub const REASON: &'static str = "ErrImageNeverPull";
}

/// Chooses the script of `container` among the planned files and makes it executable, in its volume, for whoever may read
/// it.
///
/// The volume's only file is the script. Of several, `image: <volumeMount>/<file>` picks one; else it is the
/// last in name order, those left out whose name holds `crt`, `key` or `pem`.
///
/// # Errors
/// When there is none; the message says what would be accepted.
pub fn script(
    container: &Container,
    plan: &ContainerPlan,
    contents: &mut Contents,
) -> Result<Script, ImageError> {
    let image = container.image.as_deref().unwrap_or_default();
    let mounts = container.volume_mounts.as_deref().unwrap_or_default();
    // The name of a volume holds no slash.
    let (name, wanted) = match image.split_once('/') {
        Some((name, file)) => (name, Some(file)),
        None => (image, None),
    };
    let Some(mount) = mounts.iter().position(|mount| mount.name == name && !name.is_empty()) else {
        let names: Vec<&str> = mounts
            .iter()
            .map(|mount| mount.name.as_str())
            .filter(|name| !name.starts_with("kube-api-access-"))
            .collect();
        let accepted = if names.is_empty() {
            "(the container has no volumeMounts)".to_owned()
        } else {
            names.join(", ")
        };
        return Err(ImageError::NoMount { image: image.to_owned(), accepted });
    };
    let mut files: Vec<(&str, usize)> = plan
        .files
        .iter()
        .enumerate()
        .filter(|(_, file)| file.mount == mount)
        .map(|(index, file)| (file.name.as_str(), index))
        .collect();
    files.sort_unstable();
    let present = || {
        let names: Vec<&str> = files.iter().map(|(name, _)| *name).collect();
        if names.is_empty() { "no files".to_owned() } else { names.join(", ") }
    };
    let chosen = match (wanted, files.as_slice()) {
        (Some(wanted), files) => {
            files.iter().find(|(name, _)| *name == wanted).ok_or_else(|| ImageError::NoFile {
                image: image.to_owned(),
                mount: name.to_owned(),
                file: wanted.to_owned(),
                present: present(),
            })?
        }
        (None, [only]) => only,
        (None, files) => files
            .iter()
            .rev()
            .find(|(name, _)| !NO_SCRIPT.iter().any(|part| name.contains(part)))
            .ok_or_else(|| ImageError::NoScript {
                image: image.to_owned(),
                mount: name.to_owned(),
                present: present(),
            })?,
    };
    // `chosen` is an index into these files, so there is one.
    let Some(file) = plan.files.get(chosen.1) else {
        return Err(ImageError::NoMount { image: image.to_owned(), accepted: String::new() });
    };
    if let Some(Content::Files(files)) = contents.get_mut(&file.volume)
        && let Some(entry) = files.get_mut(&file.name)
    {
        entry.mode |= executable(entry.mode);
    }
    let follows = (file.by != By::Copy).then(|| (file.volume.clone(), file.name.clone()));
    Ok(Script { place: file.place.clone(), follows })
}

/// The bits that make a file executable for whoever may read it.
pub(super) fn executable(mode: u32) -> u32 {
    (mode & 0o444) >> 2
}

/// A container's script.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Script {
    /// Where the container sees it.
    pub place: Place,
    /// Volume and file, where it follows them.
    pub follows: Option<(String, String)>,
}
