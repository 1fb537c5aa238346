//! What volumes are made of besides plain files: links that are replaced, trees that are compared and removed. All of it
//! beneath a [`Root`], without following a link.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{self, Read as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat, readlinkat, renameat};
use nix::sys::stat::{Mode, SFlag, fchmod, fstatat, mkdirat};
use nix::unistd::{Gid, UnlinkatFlags, fchown, linkat, symlinkat, unlinkat};

use super::{DIRECTORY, Root, temporary_name};

impl Root {
    /// A directory beneath this one as a root of its own; it and those above it are made with exactly this mode where they
    /// are not there.
    ///
    /// # Errors
    /// When a component is `..`, a link or no directory, or cannot be made.
    pub fn beneath(&self, path: &Path, mode: u32) -> io::Result<Self> {
        Ok(Self { directory: self.walk(path, Some(mode))? })
    }

    /// The same where it is there already; none where nothing is.
    ///
    /// # Errors
    /// When a component is `..`, a link or no directory.
    pub fn existing(&self, path: &Path) -> io::Result<Option<Self>> {
        match self.walk(path, None) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            found => Ok(Some(Self { directory: found? })),
        }
    }

    /// Makes a directory in this one; one that is there is an error.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn make_new(&self, name: &OsStr, mode: u32) -> io::Result<Self> {
        mkdirat(&self.directory, name, Mode::S_IRWXU)?;
        let made = openat(&self.directory, name, DIRECTORY, Mode::empty())?;
        fchmod(&made, Mode::from_bits_truncate(mode))?;
        Ok(Self { directory: made })
    }

    /// What the link of this name holds; none where no link is.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn read_link(&self, name: &OsStr) -> io::Result<Option<PathBuf>> {
        match readlinkat(&self.directory, name) {
            Ok(found) => Ok(Some(PathBuf::from(found))),
            Err(Errno::ENOENT | Errno::EINVAL) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Makes a symbolic link in this directory, in one step in the place of another link or file. One that holds the same
    /// stays.
    ///
    /// # Errors
    /// When a directory is in the way, or it cannot be made.
    pub fn relink(&self, target: &Path, name: &OsStr) -> io::Result<()> {
        if self.read_link(name)?.is_some_and(|found| found == target) {
            return Ok(());
        }
        let temporary = temporary_name(name);
        symlinkat(target, &self.directory, temporary.as_str())?;
        self.take_place(OsStr::new(&temporary), name)
    }

    /// As [`Root::relink`], by way of a link of this name: what is left of that is replaced.
    ///
    /// # Errors
    /// As there.
    pub fn relink_by(&self, target: &Path, name: &OsStr, by: &OsStr) -> io::Result<()> {
        match unlinkat(&self.directory, by, UnlinkatFlags::NoRemoveDir) {
            Ok(()) | Err(Errno::ENOENT) => {}
            Err(error) => return Err(error.into()),
        }
        symlinkat(target, &self.directory, by)?;
        self.take_place(by, name)
    }

    fn take_place(&self, temporary: &OsStr, name: &OsStr) -> io::Result<()> {
        let renamed = renameat(&self.directory, temporary, &self.directory, name);
        if renamed.is_err() {
            let _ = unlinkat(&self.directory, temporary, UnlinkatFlags::NoRemoveDir);
        }
        Ok(renamed?)
    }

    /// Removes the link of this name; anything else that bears it stays.
    ///
    /// # Errors
    /// When it cannot be removed.
    pub fn remove_link(&self, name: &OsStr) -> io::Result<()> {
        match self.read_link(name)? {
            Some(_) => Ok(unlinkat(&self.directory, name, UnlinkatFlags::NoRemoveDir)?),
            None => Ok(()),
        }
    }

    /// The names in this directory.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn names(&self) -> io::Result<Vec<OsString>> {
        fs::read_dir(self.path())?.map(|entry| Ok(entry?.file_name())).collect()
    }

    /// Whether a directory, and no link, bears this name.
    #[must_use]
    pub fn is_dir(&self, name: &OsStr) -> bool {
        fstatat(&self.directory, name, AtFlags::AT_SYMLINK_NOFOLLOW)
            .is_ok_and(|found| SFlag::from_bits_truncate(found.st_mode) & SFlag::S_IFMT == SFlag::S_IFDIR)
    }

    /// The paths of all that is beneath this directory and no directory itself, `most` of them at most: none where there
    /// are more.
    ///
    /// # Errors
    /// When a directory cannot be read.
    pub fn files(&self, most: usize) -> io::Result<Option<Vec<PathBuf>>> {
        let mut found = Vec::new();
        let mut waiting = vec![PathBuf::new()];
        // A directory is an entry too: without a bound on them empty ones would never end.
        let mut looked = 0;
        while let Some(path) = waiting.pop() {
            let Some(directory) = self.existing(&path)? else { continue };
            for entry in fs::read_dir(directory.path())? {
                let entry = entry?;
                looked += 1;
                if looked > most.saturating_mul(2).saturating_add(1024) {
                    return Ok(None);
                }
                let at = path.join(entry.file_name());
                if entry.file_type()?.is_dir() {
                    waiting.push(at);
                } else {
                    found.push(at);
                }
            }
        }
        Ok((found.len() <= most).then_some(found))
    }

    /// Whether a regular file of exactly this mode and these bytes is at `path`.
    #[must_use]
    pub fn holds(&self, path: &Path, bytes: &[u8], mode: u32) -> bool {
        let same = || -> io::Result<bool> {
            let (Some(above), Some(name)) = (path.parent(), path.file_name()) else { return Ok(false) };
            let above = self.walk(above, None)?;
            // O_NONBLOCK: a pipe that somebody put there would hold the open up.
            let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
            let mut file = fs::File::from(openat(&above, name, flags, Mode::empty())?);
            let metadata = file.metadata()?;
            if !metadata.is_file()
                || metadata.len() != bytes.len() as u64
                || metadata.permissions().mode() & 0o7777 != mode
            {
                return Ok(false);
            }
            let mut rest = bytes;
            let mut buffer = [0; 16 * 1024];
            loop {
                let n = file.read(&mut buffer)?;
                if n == 0 {
                    return Ok(rest.is_empty());
                }
                match rest.strip_prefix(&buffer[..n]) {
                    Some(left) => rest = left,
                    None => return Ok(false),
                }
            }
        };
        same().unwrap_or(false)
    }

    /// Whether the same file, and no link, is at `path` here and in the other root.
    #[must_use]
    pub fn is_same(&self, path: &Path, other: &Self) -> bool {
        let look = |root: &Self| -> io::Result<(u64, u64)> {
            let (Some(above), Some(name)) = (path.parent(), path.file_name()) else {
                return Err(super::leaves(path));
            };
            let found = fstatat(&root.walk(above, None)?, name, AtFlags::AT_SYMLINK_NOFOLLOW)?;
            Ok((found.st_dev, found.st_ino))
        };
        look(self).ok().is_some_and(|ours| look(other).is_ok_and(|theirs| ours == theirs))
    }

    /// Gives the file that is at `path` in the other root the same path here too (link(2)). Directories above it are made.
    ///
    /// # Errors
    /// When something is there, or the file system does not take it.
    pub fn link(&self, path: &Path, other: &Self) -> io::Result<()> {
        let (Some(above), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(super::leaves(path));
        };
        let (from, to) = (other.walk(above, None)?, self.walk(above, Some(0o755))?);
        Ok(linkat(&from, name, &to, name, AtFlags::empty())?)
    }

    /// Removes a tree in this directory. Links in it are removed, not followed.
    ///
    /// # Errors
    /// When something of it cannot be removed.
    pub fn remove_tree(&self, name: &OsStr) -> io::Result<()> {
        fs::remove_dir_all(self.path().join(name))
    }

    /// Removes the regular file at `path`; what is none, or not there, stays.
    ///
    /// # Errors
    /// When a component above it is `..` or a link, or it cannot be removed.
    pub fn remove(&self, path: &Path) -> io::Result<()> {
        self.remove_file(path)
    }

    /// Gives this directory to a group of the user's, so that what is made in it is the group's too (the set-group-ID bit).
    ///
    /// # Errors
    /// When the user is not in the group, or the directory not the user's.
    pub fn set_group(&self, group: u32) -> io::Result<()> {
        let found = fs::metadata(self.path())?;
        let mode = found.mode() & 0o7777;
        if found.gid() != group {
            fchown(&self.directory, None, Some(Gid::from_raw(group)))?;
        }
        // chown(2) may clear the bit.
        Ok(fchmod(&self.directory, Mode::from_bits_truncate(mode | 0o2000))?)
    }

    /// Gives a file to a group of the user's.
    ///
    /// # Errors
    /// When a component is `..` or a link, or the user is not in the group.
    pub fn set_file_group(&self, path: &Path, group: u32, mode: u32) -> io::Result<()> {
        let (Some(above), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(super::leaves(path));
        };
        let above = self.walk(above, None)?;
        // By a descriptor that wants no right to the file: its mode may be 0.
        let file = openat(&above, name, OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC, Mode::empty())?;
        let same = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
        std::os::unix::fs::chown(&same, None, Some(group))?;
        fs::set_permissions(&same, fs::Permissions::from_mode(mode))
    }

    /// The permission bits of this directory.
    ///
    /// # Errors
    /// When it cannot be looked at.
    pub fn mode(&self) -> io::Result<u32> {
        Ok(fs::metadata(self.path())?.mode() & 0o7777)
    }

    /// A path to this directory that does not depend on what stands at its place now (proc(5), /proc/pid/fd).
    fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.directory.as_raw_fd()))
    }
}
