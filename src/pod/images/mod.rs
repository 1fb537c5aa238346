//! A site's table of images (`--images`): what a container does whose `image` names none of its volumeMounts.
//!
//! [`load`] reads the table, [`Images::find`] looks an image up, and [`run`] says what is started in its place. A pilot has
//! no container runtime: an image's program is one of the host, or Apptainer runs it.

mod reference;
mod run;
mod table;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use k8s_openapi::api::core::v1::Container;

pub use self::reference::Reference;
pub use self::run::{Run, RunError, run};
use self::table::Entry;

/// A table is written by hand; one that is larger is another file.
const MOST_BYTES: u64 = 1 << 20;

/// The table of a pilot, which may have none.
#[derive(Debug, Clone, Default)]
pub struct Images(Option<Arc<Table>>);

#[derive(Debug)]
struct Table {
    file: PathBuf,
    entries: Vec<Entry>,
}

/// What an image is found to be.
#[derive(Debug)]
pub struct Found<'a> {
    reference: Reference,
    entry: &'a Entry,
}

/// Why an image is not run.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Missing {
    /// Nothing in the table is for it.
    #[error(
        "image {image:?} names none of the container's volumeMounts{}, and the table of images {file} has nothing for it: a container runs a script from one of its volumes (image: <volumeMount>, or <volumeMount>/<file>), or what the table says; the pilot's owner can add there, beneath `images:`, the line `- {{name: {name}, run: host}}`", known(.mounts), file = .file.display()
    )]
    NotInTable {
        /// The image as given.
        image: String,
        /// The names of the container's volumeMounts.
        mounts: Vec<String>,
        /// The table's file.
        file: PathBuf,
        /// The image's name without a tag, as a pattern for it.
        name: String,
    },
    /// There is no table.
    #[error(
        "image {image:?} names none of the container's volumeMounts{}: a container runs a script from one of its volumes (image: <volumeMount>, or <volumeMount>/<file>), or what a table of images says; the pilot's owner can give it one, --images FILE, with the line `images: [{{name: {name}, run: host}}]`", known(.mounts)
    )]
    NoTable {
        /// The image as given.
        image: String,
        /// The names of the container's volumeMounts.
        mounts: Vec<String>,
        /// The image's name without a tag, as a pattern for it.
        name: String,
    },
    /// It is no image's name either.
    #[error(
        "image {image:?} names none of the container's volumeMounts{}, and is no name of an image: {problem}", known(.mounts)
    )]
    NoImage {
        /// The image as given.
        image: String,
        /// The names of the container's volumeMounts.
        mounts: Vec<String>,
        /// What is wrong with it.
        problem: &'static str,
    },
}

impl Missing {
    /// The reason of the waiting container: as where an image is not there and never pulled (kubelet, images/types.go).
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::NotInTable { .. } | Self::NoTable { .. } => "ErrImageNeverPull",
            Self::NoImage { .. } => "InvalidImageName",
        }
    }
}

fn known(mounts: &[String]) -> String {
    if mounts.is_empty() { " (it has none)".to_owned() } else { format!(" ({})", mounts.join(", ")) }
}

impl Images {
    /// Whether Apptainer is wanted for any image.
    #[must_use]
    pub fn want_apptainer(&self) -> bool {
        self.0.iter().any(|table| table.entries.iter().any(|entry| entry.apptainer.is_some()))
    }

    /// What stands as imageID in the status of a container that runs by the table: Apptainer's image, or `host:` and the
    /// image whose place a program of the host takes. Empty where its image is a script's.
    #[must_use]
    pub fn id(&self, container: &Container) -> String {
        let image = container.image.as_deref().unwrap_or_default();
        let name = image.split('/').next().unwrap_or_default();
        if container.volume_mounts.iter().flatten().any(|mount| mount.name == name) {
            return String::new();
        }
        let Ok(Found { reference, entry }) = self.find(image, std::iter::empty()) else {
            return String::new();
        };
        match &entry.apptainer {
            Some(apptainer) => apptainer.image(&reference),
            None => format!("host:{}", reference.full()),
        }
    }

    /// What the table says of an image. `mounts` are the names of the container's volumeMounts, for the message.
    ///
    /// # Errors
    /// When there is no table, or nothing in it for this image.
    pub fn find(&self, image: &str, mounts: impl Iterator<Item = String>) -> Result<Found<'_>, Missing> {
        let text = || image.to_owned();
        // The token's volume is nobody's script.
        let mounts = mounts.filter(|name| !name.starts_with("kube-api-access-"));
        let reference = match Reference::parse(image) {
            Ok(reference) => reference,
            Err(problem) => {
                return Err(Missing::NoImage { image: text(), mounts: mounts.collect(), problem });
            }
        };
        let name = || reference.familiar().to_owned();
        let Some(table) = &self.0 else {
            return Err(Missing::NoTable { image: text(), mounts: mounts.collect(), name: name() });
        };
        match table.entries.iter().find(|entry| entry.pattern.matches(&reference)) {
            Some(entry) => Ok(Found { reference, entry }),
            None => {
                let (name, file) = (name(), table.file.clone());
                Err(Missing::NotInTable { image: text(), mounts: mounts.collect(), file, name })
            }
        }
    }
}

/// Reads a table.
///
/// # Errors
/// What is wrong with it, with the line.
pub fn load(file: &str) -> Result<Images, String> {
    let path = Path::new(file);
    let size = std::fs::metadata(path).map_err(|error| error.to_string())?.len();
    if size > MOST_BYTES {
        return Err(format!("it has {size} bytes, and a table of images at most {MOST_BYTES}"));
    }
    let text = std::fs::read_to_string(path).map_err(|error| error.to_string())?;
    parse(path, &text)
}

fn parse(file: &Path, text: &str) -> Result<Images, String> {
    let entries = table::parse(text)?;
    let file = std::path::absolute(file).unwrap_or_else(|_| file.to_owned());
    Ok(Images(Some(Arc::new(Table { file, entries }))))
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::VolumeMount;

    use super::*;

    fn missing(images: &Images, image: &str) -> Missing {
        images.find(image, ["a", "kube-api-access-x"].map(str::to_owned).into_iter()).unwrap_err()
    }

    #[test]
    fn what_is_in_neither_says_how_to_add_it() {
        let table = parse(Path::new("/etc/images.yaml"), "images: [{name: bash}]").unwrap();
        for (images, image, reason, words) in [
            (
                &table,
                "quay.io/x/y:1",
                "ErrImageNeverPull",
                "/etc/images.yaml `- {name: quay.io/x/y, run: host}` (a):",
            ),
            (
                &table,
                "docker.io/library/busybox@sha256:00112233445566778899aabbccddeeff",
                "ErrImageNeverPull",
                "{name: busybox,",
            ),
            (
                &Images::default(),
                "busybox",
                "ErrImageNeverPull",
                "--images `images: [{name: busybox, run: host}]`",
            ),
            (&table, "A B", "InvalidImageName", "no name of an image"),
            (&table, "", "InvalidImageName", "(a)"),
        ] {
            let error = missing(images, image);
            assert_eq!(error.reason(), reason, "{error}");
            let text = error.to_string();
            for word in words.split(' ') {
                assert!(text.contains(word.trim_end_matches(':')), "{word}: {text}");
            }
        }
    }

    #[test]
    fn an_image_id_says_what_runs_in_its_place() {
        let text = "images: [{name: bash}, {name: '**', run: apptainer, image: '/i/{name}.sif'}]";
        let images = parse(Path::new("t"), text).unwrap();
        let id = |image: &str, mount: &str| {
            let mount = VolumeMount { name: mount.to_owned(), ..VolumeMount::default() };
            let image = Some(image.to_owned());
            images.id(&Container { image, volume_mounts: Some(vec![mount]), ..Container::default() })
        };
        assert!(images.want_apptainer() && !Images::default().want_apptainer());
        assert_eq!(id("bash", "v"), "host:docker.io/library/bash:latest");
        assert_eq!(id("quay.io/o/app:1", "v"), "/i/app.sif");
        // Its own script comes first.
        assert_eq!([id("bash", "bash"), id("bash/run.sh", "bash"), id("A B", "v")], ["", "", ""]);
    }

    #[test]
    fn a_file_that_is_not_there_or_too_large_is_refused() {
        assert!(load("/nonexistent/images.yaml").unwrap_err().contains("No such file"));
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(MOST_BYTES + 1).unwrap();
        assert!(load(file.path().to_str().unwrap()).unwrap_err().contains("at most"));
    }

    #[test]
    fn the_example_is_a_table() {
        let images = load(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/examples/images.yaml")).unwrap();
        for image in ["busybox", "busybox:1.36", "docker.io/library/bash:5", "alpine"] {
            assert!(images.find(image, std::iter::empty()).is_ok(), "{image}");
        }
    }
}
