//! subPath and subPathExpr: what of a volume is mounted, and that it stays in the volume.
//!
//! Sources: `makeMounts` (pkg/kubelet/kubelet_pods.go), `ExpandContainerVolumeMounts` (pkg/kubelet/container/helpers.go),
//! `pkg/volume/util/subpath` (nothing may leave the volume).

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};

use k8s_openapi::api::core::v1::VolumeMount;

use crate::files::Root;
use crate::pod::expansion::{self, Expand, Values};

/// Why a container's subPath cannot be used. The container waits with reason CreateContainerConfigError; the texts begin
/// as a kubelet's.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SubPathError {
    /// Variables of a subPathExpr that are not set or empty.
    #[error("missing value for {0}")]
    Missing(String),
    /// The environment itself cannot be made, or what it gives is too long.
    #[error("{0}")]
    Environment(String),
    /// An absolute path.
    #[error("error SubPath `{0}` must not be an absolute path")]
    Absolute(String),
    /// A path with `..`.
    #[error("unable to provision SubPath `{0}`: must not contain '..'")]
    Backsteps(String),
    /// It is not there and cannot be made.
    #[error(
        "failed to create subPath directory for volumeMount {mount:?} of container {container:?}: {problem}"
    )]
    Create {
        /// The volumeMount.
        mount: String,
        /// The container.
        container: String,
        /// Why.
        problem: String,
    },
    /// It leaves the volume, or cannot be looked at.
    #[error("failed to prepare subPath for volumeMount {mount:?} of container {container:?}: {problem}")]
    Prepare {
        /// The volumeMount.
        mount: String,
        /// The container.
        container: String,
        /// Why.
        problem: String,
    },
}

impl SubPathError {
    /// Whether anything but another Pod could mend it.
    #[must_use]
    pub fn may_mend(&self) -> bool {
        !matches!(self, Self::Absolute(_) | Self::Backsteps(_))
    }
}

/// What a mount takes of its volume, as a path of plain names; none where it takes all.
///
/// # Errors
/// When a variable is missing or the path leaves the volume.
pub fn sub_path(
    mount: &VolumeMount,
    value: &dyn Fn(&str) -> Option<String>,
) -> Result<Option<PathBuf>, SubPathError> {
    let set = |text: &Option<String>| text.clone().filter(|text| !text.is_empty());
    let path = match (set(&mount.sub_path_expr), set(&mount.sub_path)) {
        (Some(expression), _) => expand(&expression, value)?,
        (None, Some(path)) => path,
        (None, None) => return Ok(None),
    };
    if path.starts_with('/') {
        return Err(SubPathError::Absolute(path));
    }
    if path.split('/').any(|part| part == "..") {
        return Err(SubPathError::Backsteps(path));
    }
    let clean: PathBuf =
        Path::new(&path).components().filter(|part| matches!(part, Component::Normal(_))).collect();
    Ok(Some(clean).filter(|clean| !clean.as_os_str().is_empty()))
}

fn expand(expression: &str, value: &dyn Fn(&str) -> Option<String>) -> Result<String, SubPathError> {
    let missing = RefCell::new(BTreeSet::new());
    let declared = |name: &str| {
        let found = value(name).filter(|value| !value.is_empty());
        if found.is_none() {
            missing.borrow_mut().insert(name.to_owned());
        }
        found
    };
    let values = Values { declared: &declared, environment: &|_| None, home: None };
    let expanded = expansion::expand(expression, Expand::Kubernetes, &values)
        .map_err(|error| SubPathError::Environment(format!("subPathExpr: {error}")))?;
    let missing = missing.take();
    if missing.is_empty() {
        return Ok(expanded);
    }
    Err(SubPathError::Missing(missing.into_iter().collect::<Vec<_>>().join(", ")))
}

/// The place of `sub` in the volume at `base`. What is not there is made as a directory of the volume's own
/// mode. Links in the volume are followed as long as they stay in it.
///
/// # Errors
/// When it leaves the volume, or cannot be made or looked at.
pub(super) fn resolve(
    base: &Path,
    sub: &Path,
    mount: &str,
    container: &str,
) -> Result<PathBuf, SubPathError> {
    let named = || (mount.to_owned(), container.to_owned());
    let prepare = |problem: String| {
        let (mount, container) = named();
        SubPathError::Prepare { mount, container, problem }
    };
    let path = base.join(sub);
    let root = Root::open(base).map_err(|error| prepare(format!("{}: {error}", base.display())))?;
    match fs::metadata(&path) {
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            root.mode().and_then(|mode| root.create_dir_all(sub, mode)).map_err(|error| {
                let (mount, container) = named();
                SubPathError::Create { mount, container, problem: error.to_string() }
            })?;
        }
        Err(error) => return Err(prepare(error.to_string())),
    }
    let whole = fs::canonicalize(base).map_err(|error| prepare(error.to_string()))?;
    let found = fs::canonicalize(&path).map_err(|error| prepare(error.to_string()))?;
    if found.starts_with(&whole) {
        return Ok(found);
    }
    Err(prepare(format!(
        "{} leads out of the volume: take the link away, or name what is in it",
        sub.display()
    )))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use proptest::prelude::*;

    use super::*;

    fn mount(path: Option<&str>, expression: Option<&str>) -> VolumeMount {
        VolumeMount {
            sub_path: path.map(ToOwned::to_owned),
            sub_path_expr: expression.map(ToOwned::to_owned),
            ..VolumeMount::default()
        }
    }

    fn value(name: &str) -> Option<String> {
        match name {
            "POD" => Some("p1".to_owned()),
            "EMPTY" => Some(String::new()),
            "ROOT" => Some("/".to_owned()),
            "UP" => Some("..".to_owned()),
            _ => None,
        }
    }

    #[test]
    fn sub_paths_are_the_kubelets() {
        for (path, expression, wanted) in [
            (None, None, Ok(None)),
            (Some(""), None, Ok(None)),
            (Some("."), None, Ok(None)),
            (Some("a"), None, Ok(Some("a"))),
            (Some("./a//b/"), None, Ok(Some("a/b"))),
            (Some("$(POD)"), None, Ok(Some("$(POD)"))),
            (Some("a..b"), None, Ok(Some("a..b"))),
            (Some("/a"), None, Err("error SubPath `/a` must not be an absolute path")),
            (Some(".."), None, Err("unable to provision SubPath `..`: must not contain '..'")),
            (Some("a/../b"), None, Err("unable to provision SubPath `a/../b`: must not contain '..'")),
            (None, Some("logs/$(POD)/x"), Ok(Some("logs/p1/x"))),
            (None, Some("$$(POD)"), Ok(Some("$(POD)"))),
            (None, Some("$(EMPTY)$(GONE)"), Err("missing value for EMPTY, GONE")),
            (None, Some("$(ROOT)etc"), Err("error SubPath `/etc` must not be an absolute path")),
            (None, Some("$(UP)/x"), Err("unable to provision SubPath `../x`: must not contain '..'")),
        ] {
            let got = sub_path(&mount(path, expression), &value);
            let got = got.map_err(|error| error.to_string());
            assert_eq!(got, wanted.map(|path| path.map(PathBuf::from)).map_err(str::to_owned));
        }
    }

    #[test]
    fn nothing_is_reached_or_made_outside_of_the_volume() {
        let (volume, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let base = fs::canonicalize(volume.path()).unwrap();
        fs::create_dir(base.join("real")).unwrap();
        fs::write(base.join("file"), "x").unwrap();
        symlink("real", base.join("inside")).unwrap();
        symlink(outside.path(), base.join("out")).unwrap();
        symlink("/nowhere/at/all", base.join("dangling")).unwrap();
        let got = |sub: &str| resolve(&base, Path::new(sub), "v", "c1");
        for (sub, wanted) in
            [("real", "real"), ("file", "file"), ("inside", "real"), ("new/deep", "new/deep")]
        {
            assert_eq!(got(sub), Ok(base.join(wanted)), "{sub}");
        }
        for sub in ["out", "out/new", "inside/new/../../..", "dangling", "dangling/x", "file/x"] {
            let error = got(sub).expect_err(sub).to_string();
            assert!(
                error.starts_with("failed to prepare subPath for volumeMount \"v\" of container \"c1\"")
                    || error
                        .starts_with("failed to create subPath directory for volumeMount \"v\" of container"),
                "{error}"
            );
        }
        assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 0);
    }

    proptest! {
        #[test]
        fn no_sub_path_ever_leaves_its_volume(text in "[./$()AUP]{0,12}|.{0,20}") {
            for mount in [mount(Some(&text), None), mount(None, Some(&text))] {
                if let Ok(Some(path)) = sub_path(&mount, &value) {
                    prop_assert!(path.components().all(|part| matches!(part, Component::Normal(_))));
                }
            }
        }
    }
}
