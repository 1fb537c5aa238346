//! The places that a pilot writes to: there or to be made, writable, private where they must be, with room.

use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::statvfs::{FsFlags, statvfs};

use super::finding::Finding;
use crate::commands::file_systems;

/// Longest wait for a file system: one that hangs (NFS, Lustre) hangs for as long as its server does.
const LIMIT: Duration = Duration::from_secs(15);

/// Written and removed again: a quota that is used up shows when blocks are written, not when a file is made.
const PROBE: usize = 1 << 20;

/// Less room than this (bytes) is soon full: one container's logs may take 50 MiB (10 MiB x 5).
const LITTLE_ROOM: u64 = 200 << 20;

/// Fewer inodes than this are soon used up: a pod takes some dozens.
const FEW_INODES: u64 = 2_000;

/// What a directory is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// Pods' directories.
    Pods,
    /// The pilot's own state.
    State,
}

impl Purpose {
    fn thing(self) -> &'static str {
        match self {
            Self::Pods => "pods directory",
            Self::State => "state directory",
        }
    }

    fn elsewhere(self) -> &'static str {
        match self {
            Self::Pods => "choose another place with --pods-dir (JIRIAF_PODS_DIR)",
            Self::State => "choose another place with --state-dir (JIRIAF_STATE_DIR)",
        }
    }
}

/// What there is.
#[derive(Debug, Clone)]
struct Facts {
    path: PathBuf,
    /// The directory itself, or the nearest one above it, in which it would be made.
    base: PathBuf,
    is_directory: bool,
    is_link: bool,
    owner: u32,
    mode: u32,
    free: u64,
    /// None where the file system counts none.
    inodes: Option<u64>,
    no_exec: bool,
    network: Option<&'static str>,
    write: Result<(), String>,
}

/// Looks at a directory as it is now; it is not made.
pub async fn look(path: PathBuf, purpose: Purpose) -> Vec<Finding> {
    let shown = path.display().to_string();
    let looked = tokio::task::spawn_blocking(move || facts(&path));
    match tokio::time::timeout(LIMIT, looked).await {
        Ok(Ok(Ok(facts))) => judge(&facts, purpose, nix::unistd::geteuid().as_raw()),
        Ok(Ok(Err(error))) => {
            vec![Finding::fail(purpose.thing(), format!("{shown}: {error}"), purpose.elsewhere())]
        }
        Ok(Err(error)) => {
            vec![Finding::fail(purpose.thing(), format!("{shown}: {error}"), purpose.elsewhere())]
        }
        Err(_) => {
            let value = format!("{shown}: no answer within {} s; the file system hangs", LIMIT.as_secs());
            vec![Finding::fail(purpose.thing(), value, purpose.elsewhere())]
        }
    }
}

fn facts(path: &Path) -> io::Result<Facts> {
    let path = std::path::absolute(path)?;
    let own = match fs::symlink_metadata(&path) {
        Ok(own) => Some(own),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(error),
    };
    let base = path.ancestors().find(|base| base.exists()).unwrap_or(Path::new("/")).to_owned();
    let metadata = fs::metadata(&base)?;
    let room = statvfs(&base)?;
    Ok(Facts {
        is_directory: metadata.is_dir(),
        is_link: own.is_some_and(|own| own.is_symlink()),
        owner: metadata.uid(),
        mode: metadata.mode() & 0o7777,
        free: room.blocks_available().saturating_mul(room.fragment_size()),
        inodes: (room.files() > 0).then(|| room.files_available()),
        no_exec: room.flags().contains(FsFlags::ST_NOEXEC),
        network: file_systems::network(&base),
        write: if metadata.is_dir() { probe(&base).map_err(|error| error.to_string()) } else { Ok(()) },
        path,
        base,
    })
}

/// Writes 1 MiB, to the disk, and removes it again.
fn probe(directory: &Path) -> io::Result<()> {
    let path = directory.join(format!(".jiriaf-pilot-check-{}", std::process::id()));
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path)?;
    // Not all zeros: some file systems store none of those.
    let written = file.write_all(&[0x5A; PROBE]).and_then(|()| file.sync_all());
    let removed = fs::remove_file(&path);
    written.and(removed)
}

fn judge(facts: &Facts, purpose: Purpose, own: u32) -> Vec<Finding> {
    let (thing, elsewhere) = (purpose.thing(), purpose.elsewhere());
    let path = facts.path.display();
    let fail = |problem: &str| vec![Finding::fail(thing, format!("{path} {problem}"), elsewhere)];
    let there = facts.base == facts.path;
    if !facts.is_directory {
        return fail(&format!("cannot be: {} is no directory", facts.base.display()));
    }
    if let Err(problem) = &facts.write {
        let value = format!("{path}: 1 MiB cannot be written in {}: {problem}", facts.base.display());
        let mend = format!("make room (quota?) or permit writing there, or {elsewhere}");
        return vec![Finding::fail(thing, value, mend)];
    }
    let mut findings = Vec::new();
    match purpose {
        Purpose::State if facts.is_link => return fail("is a symbolic link"),
        Purpose::State if there && facts.owner != own => {
            return fail(&format!("belongs to user id {}", facts.owner));
        }
        Purpose::State if there && facts.mode & 0o077 != 0 => {
            let value = format!("{path} has mode {:04o}, which lets others in", facts.mode);
            return vec![Finding::fail(thing, value, format!("chmod 700 {path}, or {elsewhere}"))];
        }
        Purpose::Pods if there && facts.owner != own => findings.push(Finding::warn(
            thing,
            format!("{path} belongs to user id {}, who can move pods' directories", facts.owner),
            elsewhere,
        )),
        // The sticky bit (01000) lets nobody move what is another's.
        Purpose::Pods if there && facts.mode & 0o022 != 0 && facts.mode & 0o1000 == 0 => {
            let value = format!("{path} has mode {:04o}: others can move pods' directories", facts.mode);
            findings.push(Finding::warn(thing, value, format!("chmod go-w {path}")));
        }
        _ => {}
    }
    if facts.free < LITTLE_ROOM {
        let value = format!("{path} has {} MiB of room", facts.free >> 20);
        findings.push(Finding::warn(thing, value, format!("make room, or {elsewhere}")));
    }
    if let Some(inodes) = facts.inodes.filter(|inodes| *inodes < FEW_INODES) {
        let value = format!("{path} has room for {inodes} more files");
        findings.push(Finding::warn(thing, value, format!("remove some, or {elsewhere}")));
    }
    match (purpose, facts.network) {
        (Purpose::State, Some(kind)) => findings.push(Finding::warn(
            thing,
            format!("{path} is on {kind}: slow, and locks may not hold there"),
            "choose a directory of the host's own disk with --state-dir (JIRIAF_STATE_DIR)",
        )),
        (Purpose::Pods, _) if facts.no_exec => findings.push(Finding::warn(
            thing,
            format!("{path} is mounted noexec: scripts of containers without a command do not start"),
            format!("give such containers a command, or {elsewhere}"),
        )),
        _ => {}
    }
    let state = if there { "writable" } else { "not there yet; can be made" };
    let network = facts.network.map_or_else(String::new, |kind| format!(" on {kind}"));
    findings
        .insert(0, Finding::ok(thing, format!("{path}, {state}, {} GiB of room{network}", facts.free >> 30)));
    findings
}

#[cfg(test)]
mod tests {
    use super::super::finding::Verdict;
    use super::*;

    fn good() -> Facts {
        Facts {
            path: PathBuf::from("/d/x"),
            base: PathBuf::from("/d/x"),
            is_directory: true,
            is_link: false,
            owner: 1000,
            mode: 0o700,
            free: 10 << 30,
            inodes: Some(1_000_000),
            no_exec: false,
            network: None,
            write: Ok(()),
        }
    }

    fn worst(facts: &Facts, purpose: Purpose) -> Verdict {
        judge(facts, purpose, 1000).iter().map(|finding| finding.verdict).max().unwrap()
    }

    #[test]
    fn directories_are_judged_by_their_purpose() {
        use Verdict::{Fail, Ok as Good, Warn};
        type Change = fn(&mut Facts);
        let cases: [(&str, Change, Verdict, Verdict); 9] = [
            ("good", |_| {}, Good, Good),
            ("not writable", |f| f.write = Err("EDQUOT".to_owned()), Fail, Fail),
            ("another's", |f| f.owner = 7, Warn, Fail),
            ("open to others", |f| f.mode = 0o775, Warn, Fail),
            ("link", |f| f.is_link = true, Good, Fail),
            ("full soon", |f| f.free = 1 << 20, Warn, Warn),
            ("inodes", |f| f.inodes = Some(3), Warn, Warn),
            ("network", |f| f.network = Some("NFS"), Good, Warn),
            ("noexec", |f| f.no_exec = true, Warn, Good),
        ];
        for (name, change, pods, state) in cases {
            let mut facts = good();
            change(&mut facts);
            assert_eq!(
                (worst(&facts, Purpose::Pods), worst(&facts, Purpose::State)),
                (pods, state),
                "{name}"
            );
        }
        let file = Facts { is_directory: false, ..good() };
        assert_eq!(worst(&file, Purpose::Pods), Fail);
        // What is above a directory that is not there yet may be anybody's.
        let parent = Facts { base: PathBuf::from("/d"), owner: 0, mode: 0o1777, ..good() };
        assert_eq!((worst(&parent, Purpose::Pods), worst(&parent, Purpose::State)), (Good, Good));
    }

    #[test]
    fn looking_leaves_nothing_behind() {
        let root = tempfile::tempdir().unwrap();
        let found = facts(&root.path().join("a/b")).unwrap();
        assert_eq!(found.base, root.path());
        assert_eq!(found.write, Ok(()));
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);
    }
}
