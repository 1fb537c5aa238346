//! How much is in an emptyDir.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

/// Entries that are looked at: whoever makes more has used a disk's worth of inodes before bytes matter.
const MOST: usize = 1_000_000;

/// The bytes that a directory takes on its disk, as du(1) counts them and kubelet with it; no more than enough to say that
/// it is over `limit`. Links are not followed.
pub(super) fn used(path: &Path, limit: u64) -> u64 {
    // The directory of one in memory is reached by a link of ours.
    let Ok(root) = fs::canonicalize(path) else { return 0 };
    let mut bytes = 0;
    let mut left = MOST;
    let mut waiting = vec![root];
    // Files of several names count once.
    let mut seen = std::collections::HashSet::new();
    while let Some(directory) = waiting.pop() {
        for entry in fs::read_dir(&directory).into_iter().flatten().flatten() {
            let Ok(metadata) = entry.metadata() else { continue };
            if metadata.nlink() == 1 || metadata.is_dir() || seen.insert((metadata.dev(), metadata.ino())) {
                bytes += metadata.blocks().saturating_mul(512);
            }
            if metadata.is_dir() {
                waiting.push(entry.path());
            }
            left -= 1;
            if left == 0 || bytes > limit {
                return bytes;
            }
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_takes_room_is_counted_once_and_links_lead_nowhere() {
        let root = tempfile::tempdir().unwrap();
        let at = |name: &str| root.path().join(name);
        assert_eq!(used(&at("none"), u64::MAX), 0);
        fs::create_dir(at("d")).unwrap();
        let before = used(root.path(), u64::MAX);
        fs::write(at("d/a"), vec![1; 64 * 1024]).unwrap();
        let once = used(root.path(), u64::MAX);
        assert!(once >= before + 64 * 1024, "{before} {once}");
        fs::hard_link(at("d/a"), at("b")).unwrap();
        std::os::unix::fs::symlink("/usr", at("usr")).unwrap();
        let twice = used(root.path(), u64::MAX);
        assert!(twice < once + 32 * 1024, "{once} {twice}");
        assert!(used(root.path(), 1) > 1, "it stops once it is over");
    }
}
