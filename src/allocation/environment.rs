//! The environment variables that this process was given, as a value that tests can make.

use std::collections::BTreeMap;
use std::fmt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// Where programs are looked for when there is no PATH: what POSIX shells use.
const DEFAULT_PATH: &str = "/usr/local/bin:/usr/bin:/bin";

/// The environment of a process. Everything in this room reads variables through it, and starts programs with it.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Environment(BTreeMap<String, String>);

impl Environment {
    /// The environment of this process. A variable whose name is not UTF-8 is left out; a value that is not gets
    /// replacement characters.
    #[must_use]
    pub fn from_process() -> Self {
        let pairs = std::env::vars_os().filter_map(|(name, value)| {
            Some((name.into_string().ok()?, value.to_string_lossy().into_owned()))
        });
        Self(pairs.collect())
    }

    /// An environment of these pairs; of two with one name the later holds.
    pub fn from_pairs<N: Into<String>, V: Into<String>>(pairs: impl IntoIterator<Item = (N, V)>) -> Self {
        Self(pairs.into_iter().map(|(name, value)| (name.into(), value.into())).collect())
    }

    /// The value of a variable, which may be empty.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str)
    }

    /// The value of a variable, without blanks around it, when there is anything in it.
    #[must_use]
    pub fn filled(&self, name: &str) -> Option<&str> {
        self.get(name).map(str::trim).filter(|value| !value.is_empty())
    }

    /// The value of a variable as a number; absent when it is not one.
    #[must_use]
    pub fn number<T: std::str::FromStr>(&self, name: &str) -> Option<T> {
        self.filled(name)?.parse().ok()
    }

    /// All variables, in name order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(name, value)| (name.as_str(), value.as_str()))
    }

    /// The program of this name in the directories of PATH, which must be absolute: a file that can be executed.
    #[must_use]
    pub fn find_program(&self, name: &str) -> Option<PathBuf> {
        find_in(self.filled("PATH").unwrap_or(DEFAULT_PATH), name)
    }
}

/// The first executable file called `name` in the absolute directories of `path`, which are separated by colons.
pub(super) fn find_in(path: &str, name: &str) -> Option<PathBuf> {
    path.split(':')
        .filter(|directory| directory.starts_with('/'))
        .map(|directory| Path::new(directory).join(name))
        .find(|candidate| is_program(candidate))
}

/// Whether there is a file here that somebody may execute.
pub(super) fn is_program(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

impl fmt::Debug for Environment {
    /// Names alone: values may be secret (SLURM_JWT, PBS_JOBCOOKIE).
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.0.keys()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_variable_is_as_good_as_none() {
        let env = Environment::from_pairs([("A", " "), ("B", " 7 "), ("C", "x")]);
        assert_eq!(env.filled("A"), None);
        assert_eq!(env.number::<u32>("B"), Some(7));
        assert_eq!(env.number::<u32>("C"), None);
    }

    #[test]
    fn debug_shows_no_values() {
        let env = Environment::from_pairs([("SLURM_JWT", "very-secret")]);
        assert!(!format!("{env:?}").contains("very-secret"));
    }

    #[test]
    fn programs_come_from_this_path_and_must_be_executable() {
        let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        for (directory, mode) in [(&one, 0o644), (&two, 0o755)] {
            let file = directory.path().join("squeue");
            std::fs::write(&file, "").unwrap();
            std::fs::set_permissions(&file, std::fs::Permissions::from_mode(mode)).unwrap();
        }
        let path = format!("relative:{}:{}", one.path().display(), two.path().display());
        let env = Environment::from_pairs([("PATH", path)]);
        assert_eq!(env.find_program("squeue"), Some(two.path().join("squeue")));
        assert_eq!(env.find_program("no-such-program"), None);
    }
}
