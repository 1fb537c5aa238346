//! Files and directories of ours: private, atomic, and never outside the root that they belong to.
//!
//! [`private_dir`] and [`write_atomic`] are for the pilot's own state. [`Root`] is for what pods ask for: every path is
//! walked component by component without following a link, so that neither `..` nor a link leads out of the root. (What
//! openat2(2)'s RESOLVE_BENEATH and RESOLVE_NO_SYMLINKS do, on the old kernels of compute nodes too.)

mod links;

use std::ffi::OsStr;
use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, Write as _};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Component, Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag, openat, renameat};
use nix::sys::stat::{Mode, SFlag, fchmod, fstatat, mkdirat};
use nix::unistd::{UnlinkatFlags, symlinkat, unlinkat};

/// A directory that should be ours alone and is not.
#[derive(Debug, thiserror::Error)]
pub enum PrivateDirError {
    /// It cannot be made or looked at.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// The directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is there and somebody else could write to it or put it there.
    #[error(
        "{path}: {problem}; a directory of your own with mode 0700 is wanted: remove it or choose another place",
        path = path.display()
    )]
    NotPrivate {
        /// The directory.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
}

/// Makes a directory with mode 0700 whatever the umask, or makes sure that the one that is there is ours alone.
///
/// # Errors
/// When it cannot be made, is a link or no directory, belongs to somebody else, or lets others in.
pub fn private_dir(path: &Path) -> Result<(), PrivateDirError> {
    let io = |source| PrivateDirError::Io { path: path.to_owned(), source };
    match DirBuilder::new().mode(0o700).create(path) {
        Ok(()) => return fs::set_permissions(path, Permissions::from_mode(0o700)).map_err(io),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(io(error)),
    }
    let found = fs::symlink_metadata(path).map_err(io)?;
    let mine = nix::unistd::geteuid().as_raw();
    let problem = if found.file_type().is_symlink() {
        Some("it is a symbolic link".to_owned())
    } else if !found.is_dir() {
        Some("it is not a directory".to_owned())
    } else if found.uid() != mine {
        Some(format!("it belongs to user id {}, not to {mine}", found.uid()))
    } else if found.mode() & 0o077 != 0 {
        Some(format!("its mode {:04o} lets others in", found.mode() & 0o7777))
    } else {
        None
    };
    match problem {
        None => Ok(()),
        Some(problem) => Err(PrivateDirError::NotPrivate { path: path.to_owned(), problem }),
    }
}

/// Numbers temporary names, so that two writers in one process never share one.
static NEXT: AtomicU64 = AtomicU64::new(0);

fn temporary_name(name: &OsStr) -> String {
    format!(".{}.{}-{}", name.to_string_lossy(), std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}

/// Writes a file whole or not at all (a temporary file, then a rename), with exactly this mode.
///
/// # Errors
/// When it cannot be written; what was there before stays.
pub fn write_atomic(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    let name = path.file_name().ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
    let temporary = path.with_file_name(temporary_name(name));
    let written = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&temporary)
        .and_then(|mut file| {
            file.write_all(bytes)?;
            file.set_permissions(Permissions::from_mode(mode))
        })
        .and_then(|()| fs::rename(&temporary, path));
    if written.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    written
}

/// A uid as the name of a file or directory: one that came from a file or the API server is no path.
#[must_use]
pub fn uid_name(uid: &str) -> String {
    uid.chars().filter(|c| c.is_ascii_alphanumeric() || *c == '-').take(64).collect()
}

/// Whether an open file lies beneath a directory of this name, whatever links have led to it; without a name it may lie
/// anywhere.
#[must_use]
pub fn lies_in(file: &impl AsRawFd, name: Option<&str>) -> bool {
    let Some(name) = name else { return true };
    let path = fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()));
    path.is_ok_and(|path| path.iter().any(|part| part == name))
}

/// The same of the directory that a path's file is in now.
#[must_use]
pub fn leads_into(path: &Path, name: Option<&str>) -> bool {
    let Some(name) = name else { return true };
    let directory = path.parent().and_then(|directory| fs::canonicalize(directory).ok());
    directory.is_some_and(|path| path.iter().any(|part| part == name))
}

/// A directory beneath which pods' files are made.
#[derive(Debug)]
pub struct Root {
    directory: OwnedFd,
}

/// A list of files has a line for each file of a pod's volumes, and a pod's objects are some MiB at most.
const LIST_BYTES: u64 = 4 << 20;

const DIRECTORY: OFlag =
    OFlag::O_DIRECTORY.union(OFlag::O_NOFOLLOW).union(OFlag::O_CLOEXEC).union(OFlag::O_RDONLY);

impl Root {
    /// Opens the root itself, which may be reached through links.
    ///
    /// # Errors
    /// When it is no directory that can be read.
    pub fn open(path: &Path) -> io::Result<Self> {
        let flags = OFlag::O_DIRECTORY | OFlag::O_CLOEXEC | OFlag::O_RDONLY;
        Ok(Self { directory: openat(AT_FDCWD, path, flags, Mode::empty())? })
    }

    /// Makes a directory and those above it with exactly this mode; those that are there stay as they are.
    ///
    /// # Errors
    /// When a component is `..`, a link or no directory, or cannot be made.
    pub fn create_dir_all(&self, path: &Path, mode: u32) -> io::Result<()> {
        self.walk(path, Some(mode)).map(drop)
    }

    /// Writes a file, whole or not at all, with exactly this mode; what was there is replaced, a link too.
    ///
    /// # Errors
    /// When a component above it is `..`, a link or no directory, or it cannot be written.
    pub fn write(&self, path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
        let (parent, name) = self.parent(path)?;
        let temporary = temporary_name(name);
        let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let mut file =
            File::from(openat(&parent, temporary.as_str(), flags, Mode::from_bits_truncate(0o600))?);
        let written = file
            .write_all(bytes)
            .and_then(|()| Ok(fchmod(&file, Mode::from_bits_truncate(mode))?))
            .and_then(|()| Ok(renameat(&parent, temporary.as_str(), &parent, name)?));
        if written.is_err() {
            let _ = unlinkat(&parent, temporary.as_str(), UnlinkatFlags::NoRemoveDir);
        }
        written
    }

    /// Writes a file only where none is, or where `list` names it as one that was written by this function before. The
    /// list is written first, so that [`Root::remove_own`] finds whatever was made.
    ///
    /// # Errors
    /// As [`Root::write`]; [`io::ErrorKind::AlreadyExists`] for a file that somebody else wrote.
    pub fn write_own(&self, path: &Path, bytes: &[u8], mode: u32, list: &Path) -> io::Result<()> {
        let line = path.to_str().filter(|line| !line.contains('\n')).ok_or_else(|| {
            io::Error::new(io::ErrorKind::InvalidInput, "a name in UTF-8 without line ends is wanted")
        })?;
        let known = read_list(list)?;
        let ours = known.lines().any(|known| known == line);
        let (parent, name) = self.parent(path)?;
        if !ours {
            let occupied = || {
                let problem = "it is there already and was not written by this pod; it is never replaced";
                io::Error::new(io::ErrorKind::AlreadyExists, problem)
            };
            // Nothing of somebody else's comes onto the list, not even for a moment.
            if fstatat(&parent, name, AtFlags::AT_SYMLINK_NOFOLLOW).is_ok() {
                return Err(occupied());
            }
            write_atomic(list, format!("{known}{line}\n").as_bytes(), 0o600)?;
            let flags =
                OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
            if let Err(error) = openat(&parent, name, flags, Mode::from_bits_truncate(0o600)) {
                write_atomic(list, known.as_bytes(), 0o600)?;
                return Err(if error == Errno::EEXIST { occupied() } else { error.into() });
            }
        }
        self.write(path, bytes, mode)
    }

    /// Removes the files that [`Root::write_own`] has put on `list`. What is not there any more or is no regular file
    /// stays, and so do directories.
    ///
    /// # Errors
    /// When the list cannot be read or a file cannot be removed; the others are removed all the same.
    pub fn remove_own(&self, list: &Path) -> io::Result<()> {
        let mut result = Ok(());
        for line in read_list(list)?.lines() {
            if let Err(error) = self.remove_file(Path::new(line)) {
                result = Err(io::Error::new(error.kind(), format!("{line} in the home directory: {error}")));
            }
        }
        result
    }

    /// Removes a file that [`Root::write_own`] has put on `list`; anything else stays.
    ///
    /// # Errors
    /// When the list cannot be read or the file cannot be removed.
    pub fn remove_if_own(&self, path: &Path, list: &Path) -> io::Result<()> {
        match path.to_str() {
            Some(line) if read_list(list)?.lines().any(|known| known == line) => self.remove_file(path),
            _ => Ok(()),
        }
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        let (Some(parent), Some(Component::Normal(name))) = (path.parent(), path.components().next_back())
        else {
            return Err(leaves(path));
        };
        let parent = match self.walk(parent, None) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            parent => parent?,
        };
        match fstatat(&parent, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
            Ok(found) if SFlag::from_bits_truncate(found.st_mode) & SFlag::S_IFMT == SFlag::S_IFREG => {
                Ok(unlinkat(&parent, name, UnlinkatFlags::NoRemoveDir)?)
            }
            Ok(_) | Err(Errno::ENOENT) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Makes a symbolic link; one that is there with the same target stays.
    ///
    /// # Errors
    /// When a component above it is `..`, a link or no directory, or something else stands there.
    pub fn symlink(&self, target: &Path, path: &Path) -> io::Result<()> {
        let (parent, name) = self.parent(path)?;
        match symlinkat(target, &parent, name) {
            Ok(()) => Ok(()),
            Err(Errno::EEXIST)
                if nix::fcntl::readlinkat(&parent, name).is_ok_and(|found| found == target) =>
            {
                Ok(())
            }
            Err(error) => Err(error.into()),
        }
    }

    /// The directory that holds `path`, made with mode 0755 where it is not there, and the last component.
    fn parent<'a>(&self, path: &'a Path) -> io::Result<(OwnedFd, &'a OsStr)> {
        match (path.parent(), path.components().next_back()) {
            (Some(parent), Some(Component::Normal(name))) => Ok((self.walk(parent, Some(0o755))?, name)),
            _ => Err(leaves(path)),
        }
    }

    fn walk(&self, path: &Path, make: Option<u32>) -> io::Result<OwnedFd> {
        let mut here = self.directory.try_clone()?;
        for component in path.components() {
            let Component::Normal(name) = component else {
                if component == Component::CurDir {
                    continue;
                }
                return Err(leaves(path));
            };
            if let Some(mode) = make {
                match mkdirat(&here, name, Mode::from_bits_truncate(0o700)) {
                    Ok(()) => {
                        let made = openat(&here, name, DIRECTORY, Mode::empty())?;
                        fchmod(&made, Mode::from_bits_truncate(mode))?;
                    }
                    Err(Errno::EEXIST) => {}
                    Err(error) => return Err(error.into()),
                }
            }
            here = openat(&here, name, DIRECTORY, Mode::empty()).map_err(|error| match error {
                Errno::ELOOP | Errno::ENOTDIR => io::Error::other(format!(
                    "{} is a link or no directory, and a path of a pod follows no links",
                    name.to_string_lossy()
                )),
                error => error.into(),
            })?;
        }
        Ok(here)
    }
}

/// The list of [`Root::write_own`]; empty where there is none yet.
fn read_list(list: &Path) -> io::Result<String> {
    match fs::symlink_metadata(list) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        Err(error) => Err(error),
        Ok(found) if found.is_file() && found.len() <= LIST_BYTES => fs::read_to_string(list),
        Ok(_) => Err(io::Error::other(format!(
            "{} is no list of files of at most {LIST_BYTES} bytes",
            list.display()
        ))),
    }
}

fn leaves(path: &Path) -> io::Error {
    let problem =
        format!("{} would leave its root; a relative path of plain names is wanted", path.display());
    io::Error::new(io::ErrorKind::InvalidInput, problem)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn mode(path: &Path) -> u32 {
        fs::symlink_metadata(path).unwrap().permissions().mode() & 0o7777
    }

    #[test]
    fn a_private_directory_is_ours_alone() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("state");
        private_dir(&path).unwrap();
        assert_eq!(mode(&path), 0o700);
        private_dir(&path).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o750)).unwrap();
        assert!(private_dir(&path).unwrap_err().to_string().contains("0750"));
        let link = root.path().join("link");
        symlink("/", &link).unwrap();
        assert!(private_dir(&link).unwrap_err().to_string().contains("link"));
    }

    #[test]
    fn a_write_replaces_whole_files_and_leaves_no_other() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("a");
        write_atomic(&path, b"one", 0o600).unwrap();
        write_atomic(&path, b"two", 0o640).unwrap();
        assert_eq!((fs::read(&path).unwrap(), mode(&path)), (b"two".to_vec(), 0o640));
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1);
    }

    #[test]
    fn nothing_leaves_its_root() {
        let outside = tempfile::tempdir().unwrap();
        let directory = tempfile::tempdir().unwrap();
        let root = Root::open(directory.path()).unwrap();
        symlink(outside.path(), directory.path().join("out")).unwrap();
        for bad in ["../x", "a/../../x", "/etc/x", "out/x", "", ".."] {
            assert!(root.write(Path::new(bad), b"x", 0o644).is_err(), "{bad}");
        }
        assert!(root.create_dir_all(Path::new("out/sub"), 0o755).is_err());
        assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 0);
        // A link in the place of the file itself is replaced, not followed.
        let victim = outside.path().join("victim");
        fs::write(&victim, "safe").unwrap();
        symlink(&victim, directory.path().join("file")).unwrap();
        root.write(Path::new("file"), b"x", 0o644).unwrap();
        assert_eq!(fs::read_to_string(&victim).unwrap(), "safe");
    }

    #[test]
    fn modes_are_exact_whatever_the_umask() {
        let directory = tempfile::tempdir().unwrap();
        let root = Root::open(directory.path()).unwrap();
        root.create_dir_all(Path::new("a/b"), 0o777).unwrap();
        root.write(Path::new("a/b/f"), b"x", 0o666).unwrap();
        assert_eq!(mode(&directory.path().join("a/b")), 0o777);
        assert_eq!(mode(&directory.path().join("a/b/f")), 0o666);
    }

    #[test]
    fn a_file_of_somebody_elses_in_the_home_directory_stays() {
        let home = tempfile::tempdir().unwrap();
        let list = home.path().join(".list");
        let root = Root::open(home.path()).unwrap();
        fs::write(home.path().join("thesis"), "mine").unwrap();
        let error = root.write_own(Path::new("thesis"), b"x", 0o644, &list).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(fs::read_to_string(home.path().join("thesis")).unwrap(), "mine");
        root.write_own(Path::new("new"), b"1", 0o644, &list).unwrap();
        root.write_own(Path::new("new"), b"2", 0o644, &list).unwrap();
        assert_eq!(fs::read_to_string(home.path().join("new")).unwrap(), "2");
    }

    #[test]
    fn only_regular_files_on_the_list_are_removed() {
        let home = tempfile::tempdir().unwrap();
        let outside = tempfile::tempdir().unwrap();
        let list = home.path().join(".list");
        let root = Root::open(home.path()).unwrap();
        fs::write(home.path().join("thesis"), "mine").unwrap();
        fs::write(outside.path().join("f"), "mine").unwrap();
        assert!(root.write_own(Path::new("thesis"), b"x", 0o644, &list).is_err());
        assert!(!list.exists(), "what is somebody else's is not on the list");
        for name in ["a/f", "gone", "link"] {
            root.write_own(Path::new(name), b"x", 0o600, &list).unwrap();
        }
        fs::remove_file(home.path().join("gone")).unwrap();
        fs::remove_file(home.path().join("link")).unwrap();
        symlink(outside.path().join("f"), home.path().join("link")).unwrap();
        root.remove_own(&list).unwrap();
        assert!(!home.path().join("a/f").exists());
        assert!(fs::symlink_metadata(home.path().join("link")).is_ok());
        fs::write(&list, "../x\n/etc/x\n").unwrap();
        assert!(root.remove_own(&list).is_err());
        assert!(home.path().join("thesis").exists() && outside.path().join("f").exists());
    }
}
