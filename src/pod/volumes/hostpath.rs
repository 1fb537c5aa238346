//! hostPath: a path of the host's, and that it is what the Pod says it is.
//!
//! Source: `pkg/volume/hostpath/host_path.go` (`SetUp`, `checkTypeInternal`, `makeDir`, `makeFile`).

use std::fs::{self, DirBuilder, FileType, OpenOptions};
use std::os::unix::fs::{DirBuilderExt as _, FileTypeExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use k8s_openapi::api::core::v1::HostPathVolumeSource;

/// A path of the host's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostPath {
    /// Where, absolute.
    pub path: PathBuf,
    /// What it has to be; empty for anything.
    pub kind: String,
}

/// What a Pod asks for, or what is the matter with it.
pub(super) fn plan(from: &HostPathVolumeSource) -> Result<HostPath, String> {
    let (path, kind) = (from.path.as_str(), from.type_.clone().unwrap_or_default());
    if path.split('/').any(|part| part == "..") {
        return Err(format!("invalid HostPath `{path}`: must not contain '..'"));
    }
    if !path.starts_with('/') {
        return Err(format!("invalid HostPath `{path}`: it must be an absolute path of the host"));
    }
    Ok(HostPath { path: PathBuf::from(path), kind })
}

/// Makes sure that it is what the Pod says, and makes what the Pod wants made.
///
/// # Errors
/// A sentence that says what it is not, as a kubelet says it.
pub(super) fn check(host: &HostPath) -> Result<(), String> {
    let path = host.path.as_path();
    // As os.Stat follows links.
    let found = fs::metadata(path).map(|metadata| metadata.file_type()).ok();
    let is = |wanted: fn(&FileType) -> bool, name: &str| match &found {
        Some(kind) if wanted(kind) => Ok(()),
        _ => Err(format!("hostPath type check failed: {} is not a {name}", path.display())),
    };
    let failed = |error: std::io::Error| {
        format!("{} cannot be made: {error}; it is made as the allocation's owner", path.display())
    };
    match host.kind.as_str() {
        // What a container runtime makes of a path that is not there (containerd's spec_linux_opts.go, WithMounts).
        "" if found.is_none() => DirBuilder::new().recursive(true).mode(0o755).create(path).map_err(failed),
        "" => Ok(()),
        "DirectoryOrCreate" if found.is_none() => {
            DirBuilder::new().recursive(true).mode(0o755).create(path).map_err(failed)
        }
        "DirectoryOrCreate" | "Directory" => is(FileType::is_dir, "directory"),
        "FileOrCreate" if found.is_none() => make_file(path).map_err(failed),
        "FileOrCreate" | "File" => is(FileType::is_file, "file"),
        "Socket" => is(FileType::is_socket, "socket file"),
        "CharDevice" => is(FileType::is_char_device, "character device"),
        "BlockDevice" => is(FileType::is_block_device, "block device"),
        other => Err(format!("{other} is an invalid volume type")),
    }
}

fn make_file(path: &Path) -> std::io::Result<()> {
    OpenOptions::new().write(true).create(true).truncate(false).mode(0o644).open(path).map(drop)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn each_type_is_what_it_says() {
        let root = tempfile::tempdir().unwrap();
        let at = |name: &str| root.path().join(name);
        fs::create_dir(at("dir")).unwrap();
        fs::write(at("file"), "x").unwrap();
        let _socket = UnixListener::bind(at("socket")).unwrap();
        std::os::unix::fs::symlink(at("dir"), at("link")).unwrap();
        let null = Path::new("/dev/null").to_owned();
        let refused = |path: &Path, what: &str| {
            Err(format!("hostPath type check failed: {} is not a {what}", path.display()))
        };
        for (path, kind, wanted) in [
            (at("untyped/deep"), "", Ok(())),
            (at("dir"), "Directory", Ok(())),
            (at("link"), "Directory", Ok(())),
            (at("file"), "Directory", refused(&at("file"), "directory")),
            (at("none"), "Directory", refused(&at("none"), "directory")),
            (at("file"), "File", Ok(())),
            (at("dir"), "File", refused(&at("dir"), "file")),
            (at("socket"), "Socket", Ok(())),
            (at("file"), "Socket", refused(&at("file"), "socket file")),
            (null.clone(), "CharDevice", Ok(())),
            (at("file"), "CharDevice", refused(&at("file"), "character device")),
            (null.clone(), "BlockDevice", refused(&null, "block device")),
            (at("file"), "DirectoryOrCreate", refused(&at("file"), "directory")),
            (at("dir"), "FileOrCreate", refused(&at("dir"), "file")),
            (at("made/deep"), "DirectoryOrCreate", Ok(())),
            (at("made.txt"), "FileOrCreate", Ok(())),
            (at("file"), "FileOrCreate", Ok(())),
            (at("file"), "Pipe", Err("Pipe is an invalid volume type".to_owned())),
        ] {
            assert_eq!(check(&HostPath { path: path.clone(), kind: kind.to_owned() }), wanted, "{kind}");
        }
        assert!(at("untyped/deep").is_dir() && at("made/deep").is_dir() && at("made.txt").is_file());
        assert_eq!(fs::read_to_string(at("file")).unwrap(), "x");
        let error = check(&HostPath { path: at("file/x"), kind: "DirectoryOrCreate".to_owned() });
        assert!(error.unwrap_err().contains("cannot be made"));
    }

    #[test]
    fn a_path_is_absolute_and_has_no_dots() {
        let plan = |path: &str| plan(&HostPathVolumeSource { path: path.to_owned(), type_: None });
        assert_eq!(plan("/scratch/x").unwrap().path, Path::new("/scratch/x"));
        assert_eq!(plan("/a/../b").unwrap_err(), "invalid HostPath `/a/../b`: must not contain '..'");
        assert!(plan("a/b").unwrap_err().contains("absolute"));
    }
}
