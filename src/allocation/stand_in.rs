//! What stands in for a host in tests: small scripts for a batch system's programs, files for the kernel's.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use super::environment::Environment;
use super::resources::Roots;

/// A host whose kernel says that this process is in these cgroups (/proc/self/cgroup), and nothing else.
pub(crate) fn host(cgroup: &str) -> (tempfile::TempDir, Roots) {
    let directory = tempfile::tempdir().unwrap();
    let within = |name: &str| directory.path().join(name);
    let roots = Roots { proc: within("proc"), cgroup: within("cg"), dev: within("dev"), sys: within("sys") };
    std::fs::create_dir_all(roots.proc.join("self")).unwrap();
    std::fs::write(roots.proc.join("self/cgroup"), cgroup).unwrap();
    (directory, roots)
}

/// Writes a file of a cgroup's.
pub(crate) fn write_cgroup(roots: &Roots, file: &str, text: &str) {
    let file = roots.cgroup.join(file);
    std::fs::create_dir_all(file.parent().unwrap()).unwrap();
    std::fs::write(file, text).unwrap();
}

/// A temporary directory of scripts, first in the PATH of the environments that it makes.
pub(crate) struct StandIn(tempfile::TempDir);

impl StandIn {
    pub(crate) fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }

    /// Adds (or replaces) a shell script of this name.
    pub(crate) fn script(self, name: &str, body: &str) -> Self {
        self.rewrite(name, body);
        self
    }

    pub(crate) fn rewrite(&self, name: &str, body: &str) {
        let file = self.0.path().join(name);
        // Written by another process, so that no fork of a parallel test holds it open for writing when it is
        // executed (ETXTBSY).
        let mut shell = std::process::Command::new("sh")
            .args(["-c", "cat >\"$0.new\" && chmod 755 \"$0.new\" && mv \"$0.new\" \"$0\""])
            .arg(&file)
            .stdin(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let text = format!("#!/bin/sh\n{body}\n");
        std::io::Write::write_all(&mut shell.stdin.take().unwrap(), text.as_bytes()).unwrap();
        assert!(shell.wait().unwrap().success());
        assert_eq!(std::fs::metadata(file).unwrap().permissions().mode() & 0o777, 0o755);
    }

    /// An environment with these scripts first in PATH, and no configuration of a PBS that may be on this machine.
    pub(crate) fn environment<'a>(&self, pairs: impl IntoIterator<Item = (&'a str, &'a str)>) -> Environment {
        let path = format!("{}:/usr/bin:/bin", self.0.path().display());
        let base =
            [("PATH".to_owned(), path), ("PBS_CONF_FILE".to_owned(), "/nonexistent/pbs.conf".to_owned())];
        let pairs = pairs.into_iter().map(|(name, value)| (name.to_owned(), value.to_owned()));
        Environment::from_pairs(base.into_iter().chain(pairs))
    }
}
