//! Which file systems other hosts may share: locks and boot ids say less there.

use std::path::Path;

/// Magic numbers of statfs(2) and of linux/magic.h, and for those that come with modules of their own (Lustre, GPFS,
/// BeeGFS, PanFS, OrangeFS) those that the modules' sources name.
const NETWORK: [(u32, &str); 14] = [
    (0x0000_6969, "NFS"),
    (0x0BD0_0BD0, "Lustre"),
    (0x4750_4653, "GPFS"),
    (0x1983_0326, "BeeGFS"),
    (0x00C3_6400, "CephFS"),
    (0x0000_517B, "SMB"),
    (0xFF53_4D42, "CIFS"),
    (0xFE53_4D42, "SMB2"),
    (0x5346_414F, "AFS"),
    (0x6B41_4653, "AFS"),
    (0x0102_1997, "9P"),
    (0xAAD7_AAEA, "PanFS"),
    (0x2003_0528, "OrangeFS"),
    (0x6573_5546, "FUSE"),
];

/// The name of the network file system that holds `path`; none for one of this host. FUSE may be either and counts.
#[must_use]
pub fn network(path: &Path) -> Option<&'static str> {
    let found = nix::sys::statfs::statfs(path).ok()?.filesystem_type();
    // The kernel's type is a long of either sign; the numbers have 32 bits.
    named(u32::try_from(i128::from(found.0) & 0xFFFF_FFFF).ok()?)
}

fn named(magic: u32) -> Option<&'static str> {
    NETWORK.iter().find(|(known, _)| *known == magic).map(|(_, name)| *name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn network_file_systems_are_told_from_local_ones() {
        assert_eq!(named(0x6969), Some("NFS"));
        assert_eq!(named(0xFF53_4D42), Some("CIFS"));
        // ext4, tmpfs, xfs.
        for local in [0xEF53, 0x0102_1994, 0x5846_5342] {
            assert_eq!(named(local), None, "{local:x}");
        }
        assert_eq!(network(Path::new("/proc")), None);
    }
}
