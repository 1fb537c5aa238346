//! The kubeconfig: whether it can be used, who else can read it, and how long it holds.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use super::finding::Finding;
use super::span;
use crate::allocation::Environment;
use crate::cluster::Kube;
use crate::drain::LEAST_TIME;

/// What the kubeconfig itself tells. `end` is the allocation's own end, where it is known.
pub fn look(kube: &Kube, env: &Environment, end: Option<SystemTime>, now: SystemTime) -> Vec<Finding> {
    let mut findings = vec![Finding::ok("kubeconfig", format!("{}, server {}", kube.source, kube.url()))];
    let auth = &kube.config.auth_info;
    let files = files_of(&kube.source, auth.client_key.as_deref(), auth.token_file.as_deref());
    findings.extend(files.iter().filter_map(|file| private(file)));
    if kube.config.accept_invalid_certs {
        findings.push(Finding::warn(
            "kubeconfig",
            "insecure-skip-tls-verify is set: whoever is on the way can take the credential",
            "put the cluster's certificate-authority-data there instead",
        ));
    }
    if let Some(command) = auth.exec.as_ref().and_then(|exec| exec.command.as_deref()) {
        let there = if command.contains('/') {
            Path::new(command).exists()
        } else {
            env.find_program(command).is_some()
        };
        if !there {
            findings.push(Finding::fail(
                "credential",
                format!("comes from the program {command}, which is not in PATH"),
                "install it on the compute nodes, or use a kubeconfig with a token",
            ));
        }
    }
    findings.push(judge_expiry(kube.expires, end, now));
    findings
}

/// The files that hold secrets.
fn files_of(source: &str, key: Option<&str>, token: Option<&str>) -> Vec<PathBuf> {
    let kubeconfigs = std::env::split_paths(source).filter(|path| path.is_file());
    kubeconfigs.chain([key, token].into_iter().flatten().map(PathBuf::from)).collect()
}

fn private(path: &Path) -> Option<Finding> {
    let metadata = match fs::metadata(path) {
        Ok(metadata) => metadata,
        Err(error) => {
            return Some(Finding::fail(
                "kubeconfig",
                format!("{}: {error}", path.display()),
                "make the file readable, or name another kubeconfig",
            ));
        }
    };
    judge_mode(path, metadata.permissions().mode(), metadata.uid(), nix::unistd::geteuid().as_raw())
}

fn judge_mode(path: &Path, mode: u32, owner: u32, own: u32) -> Option<Finding> {
    let path = path.display();
    if owner != own && owner != 0 {
        let value = format!("{path} belongs to user id {owner}, who can read and change it");
        return Some(Finding::warn("kubeconfig", value, "use a copy of your own, mode 0600"));
    }
    (mode & 0o077 != 0).then(|| {
        let value = format!("{path} has mode {:04o}: others can use the credential", mode & 0o7777);
        Finding::warn("kubeconfig", value, format!("chmod 600 {path}"))
    })
}

fn judge_expiry(expires: Option<SystemTime>, end: Option<SystemTime>, now: SystemTime) -> Finding {
    let Some(expires) = expires else {
        return Finding::ok("credential", "has no end, or is renewed by itself");
    };
    let left = expires.duration_since(now).unwrap_or(Duration::ZERO);
    let value = format!("expires in {}", span(left));
    let mend = "get one that lasts for the whole job, the wait in the queue included";
    if left < LEAST_TIME {
        return Finding::fail("credential", value, mend);
    }
    match end {
        Some(end) if expires < end => {
            let early = end.duration_since(expires).unwrap_or_default();
            let value = format!("{value}, {} before the allocation ends: the pilot drains then", span(early));
            Finding::warn("credential", value, mend)
        }
        Some(_) => Finding::ok("credential", format!("{value}, after the allocation's end")),
        None => Finding::ok("credential", format!("{value}; it must outlast the job")),
    }
}

#[cfg(test)]
mod tests {
    use super::super::finding::Verdict;
    use super::*;

    #[test]
    fn a_kubeconfig_that_others_can_read_is_told() {
        let path = Path::new("/home/a/config");
        let judged = |mode, owner| judge_mode(path, mode, owner, 1000).map(|finding| finding.verdict);
        assert_eq!(judged(0o100_600, 1000), None);
        assert_eq!(judged(0o100_400, 0), None);
        assert_eq!(judged(0o100_640, 1000), Some(Verdict::Warn));
        assert_eq!(judged(0o100_600, 1001), Some(Verdict::Warn));
        assert!(judge_mode(path, 0o100_644, 1000, 1000).unwrap().mend.contains("chmod 600 /home/a/config"));
    }

    #[test]
    fn a_credential_must_outlast_the_allocation() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000);
        let at = |s| Some(now + Duration::from_secs(s));
        for (expires, end, wanted) in [
            (None, at(3600), Verdict::Ok),
            (at(7200), at(3600), Verdict::Ok),
            (at(3600), at(7200), Verdict::Warn),
            (at(3600), None, Verdict::Ok),
            (at(30), None, Verdict::Fail),
            (Some(now - Duration::from_secs(1)), at(3600), Verdict::Fail),
        ] {
            assert_eq!(judge_expiry(expires, end, now).verdict, wanted, "{expires:?} {end:?}");
        }
    }
}
