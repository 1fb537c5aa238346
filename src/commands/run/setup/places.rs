//! What a pilot takes on its host: its directories, the lock on its name.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};

use super::SetupError;
use crate::allocation::Environment;
use crate::cli::{PodArgs, PodsLayout};
use crate::files;
use crate::node;
use crate::pod::context::Places;
use crate::pod::directory;

pub(in crate::commands) fn place(
    what: &'static str,
    path: &Path,
    problem: &dyn std::fmt::Display,
    mend: &'static str,
) -> SetupError {
    SetupError::Place { what, path: path.to_owned(), problem: problem.to_string(), mend }
}

/// The default state directory: node-local, one a user.
#[must_use]
pub fn default_state_dir(env: &Environment) -> PathBuf {
    let tmp = env.get("TMPDIR").filter(|dir| Path::new(dir).is_dir()).unwrap_or("/tmp").to_owned();
    Path::new(&tmp).join(format!("jiriaf-pilot-{}", nix::unistd::getuid()))
}

/// Makes a directory that is ours alone.
pub(in crate::commands) fn private(what: &'static str, path: &Path) -> Result<(), SetupError> {
    if let Some(parent) = path.parent() {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(parent)
            .map_err(|error| place(what, parent, &error, "choose another place with --state-dir"))?;
    }
    files::private_dir(path)
        .map_err(|error| place(what, path, &error, "choose another place with --state-dir"))
}

/// Takes the lock that says that the owner of a state directory lives, until it is dropped; `clean` goes by it.
pub(in crate::commands) fn take_lock(state_dir: &Path) -> Result<Flock<File>, SetupError> {
    let path = state_dir.join("lock");
    let mend =
        "another pilot on this host has this Node's name; give this one another with --node-name (NODENAME)";
    let open = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(&path);
    let file = open.map_err(|error| place("lock", &path, &error, "choose another place with --state-dir"))?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock)
        .map_err(|(_, error)| place("lock", &path, &format!("held by another process ({error})"), mend))
}

/// A path that may begin with a variable: what a batch system makes for each job (TMPDIR, SLURM_TMPDIR, PBS_JOBDIR) is known to the
/// job alone, while the setting may come from a site's file, through which no shell goes.
pub(in crate::commands) fn by_variable(path: &Path, env: &Environment) -> Result<PathBuf, SetupError> {
    let text = path.to_string_lossy();
    let Some(rest) = text.strip_prefix('$') else { return Ok(path.to_owned()) };
    let (name, below) = rest.split_once('/').unwrap_or((rest, ""));
    let name = name.strip_prefix('{').and_then(|name| name.strip_suffix('}')).unwrap_or(name);
    match env.filled(name) {
        Some(value) => Ok(Path::new(value).join(below)),
        None => Err(SetupError::Setting(format!(
            "--pods-dir (JIRIAF_PODS_DIR) is {text:?}, and {name} is not set in this job: name another variable, or a path"
        ))),
    }
}

/// The places of pods; the pods directory is made and written to, so that a full or read-only one is known at once.
pub(in crate::commands) fn places(
    args: &PodArgs,
    env: &Environment,
    job: Option<&str>,
    name: &str,
) -> Result<Places, SetupError> {
    let home = env.get("HOME").map(PathBuf::from).ok_or_else(|| {
        SetupError::Setting("HOME is not set; set it to your home directory (pods see it too)".to_owned())
    })?;
    let pods = match &args.pods_dir {
        Some(path) => by_variable(path, env)?,
        None => home.clone(),
    };
    let mend = "make room or permit writing there, or choose another place with --pods-dir (JIRIAF_PODS_DIR)";
    let fail = |error: io::Error| place("pods directory", &pods, &error, mend);
    fs::DirBuilder::new().recursive(true).mode(0o700).create(&pods).map_err(fail)?;
    let pods = fs::canonicalize(&pods).map_err(fail)?;
    let kept_root = pods.join(directory::KEPT);
    let kept = kept_root.join(node::labels::label_value(job.unwrap_or(name)));
    directory::make_kept(&kept).map_err(fail)?;
    let probe = kept.join(format!(".probe-{}", std::process::id()));
    fs::write(&probe, [0u8; 4096]).map_err(fail)?;
    fs::remove_file(&probe).map_err(fail)?;
    Ok(Places { pods, namespaced: args.pods_layout == PodsLayout::Namespaced, kept, home })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pods_directory_may_begin_with_a_variable_of_the_job() {
        let env = Environment::from_pairs([("SLURM_TMPDIR", "/scratch/7"), ("EMPTY", "")]);
        let path = |text: &str| by_variable(Path::new(text), &env).map_err(|error| error.to_string());
        for (text, wanted) in [
            ("/plain/$x", "/plain/$x"),
            ("relative", "relative"),
            ("$SLURM_TMPDIR", "/scratch/7/"),
            ("$SLURM_TMPDIR/pods", "/scratch/7/pods"),
            ("${SLURM_TMPDIR}/a/b", "/scratch/7/a/b"),
        ] {
            assert_eq!(path(text).unwrap(), Path::new(wanted), "{text}");
        }
        for text in ["$PBS_JOBDIR/pods", "$EMPTY/pods", "$"] {
            let error = path(text).unwrap_err();
            assert!(error.contains("--pods-dir") && error.contains("is not set"), "{error}");
        }
    }
}
