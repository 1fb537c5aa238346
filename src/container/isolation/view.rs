//! What a container sees: the host's file system with its volumes at their places, and some directories hidden.
//!
//! All of it is bind mounts in a mount namespace of its own. A mount wants a place to be mounted at. Where that is not
//! there and cannot be made (`/etc/podinfo`, as an ordinary user), the nearest directory above it is covered with a tmpfs
//! in which each of its entries is mounted again or, a link, made again; then the place is made in it, and it becomes
//! read-only, as the directory was for this user. `/` is covered by becoming another root. (An overlay would do the same
//! with one mount, but unprivileged ones want Linux 5.11.)

use std::collections::BTreeSet;
use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::fs::{
    DirBuilderExt as _, FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _,
};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::Mode;
use nix::sys::statvfs::{FsFlags, statvfs};
use nix::unistd::{AccessFlags, access, fchdir, geteuid, pivot_root};

use super::super::protocol::{StartError, View, ViewFile};
use super::place::{Found, find};
use super::{TERMINATION_LOG, other};

/// Entries of a directory that is covered: each costs a mount. /dev and /etc have some hundred.
const MOST_ENTRIES: usize = 10_000;

/// What is taken of a file of the host's, as much as a kubelet takes of resolv.conf (pkg/kubelet/network/dns/dns.go,
/// maxResolvConfLength). A list of a cluster's hosts has some 100 bytes for each.
const HOST_FILE_BYTES: u64 = 10 << 20;

/// Where a new root may be put together: directories of every host, which are seen again afterwards.
const STAGING: [&str; 3] = ["/tmp", "/mnt", "/var"];

const NOTHING: Option<&str> = None;

/// Makes the view in this process' mount namespace. `directory` is the container's.
pub(in super::super) fn build(view: &View, directory: Option<&Path>) -> Result<(), StartError> {
    // What the host mounts from now on is seen here too, such as a home directory on its first use; never the reverse.
    mount(NOTHING, "/", NOTHING, MsFlags::MS_REC | MsFlags::MS_SLAVE, NOTHING)
        .map_err(|errno| other("separating the mounts", &errno.desc()))?;
    let mut builder = Builder::default();
    // All before anything is covered.
    let mut sources = Vec::new();
    for wanted in &view.mounts {
        let opened = Source::open(&wanted.source);
        let opened =
            if wanted.real { opened.and_then(|source| source.still_at(&wanted.source)) } else { opened };
        let source = opened.map_err(|error| {
            other(
                &format!("mounting at {}", wanted.target.display()),
                &format_args!("{}: {error}", wanted.source.display()),
            )
        })?;
        sources.push((source, wanted.target.as_path(), wanted.read_only));
    }
    if let (Some(path), Some(directory)) = (&view.termination_log, directory) {
        let file = new_termination_log(directory)
            .map_err(|error| other(&directory.join(TERMINATION_LOG).display().to_string(), &error))?;
        sources.push((file, path, false));
    }
    for (file, directory) in view.files.iter().filter_map(|file| Some((file, directory?))) {
        let source = new_view_file(directory, file).map_err(|error| {
            other(&format!("writing {} for {}", file.name, file.target.display()), &error)
        })?;
        sources.push((source, &file.target, false));
    }
    builder.hide(&view.hidden, &view.shown)?;
    for (source, target, read_only) in sources {
        builder.mount(&source, target, read_only)?;
    }
    builder.finish()
}

/// Something that is going to be mounted somewhere.
struct Source {
    file: OwnedFd,
    is_directory: bool,
}

impl Source {
    fn open(path: &Path) -> io::Result<Self> {
        let file = open(path, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty())?;
        let is_directory = File::from(file.try_clone()?).metadata()?.is_dir();
        Ok(Self { file, is_directory })
    }

    fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.file.as_raw_fd()))
    }

    /// This, if it is where it was found: a container of the pod's may have put a link on the way since.
    fn still_at(self, path: &Path) -> io::Result<Self> {
        let really = fs::read_link(self.path())?;
        if really == path {
            return Ok(self);
        }
        Err(io::Error::other(format!(
            "it leads to {} by now: something was put in its place",
            really.display()
        )))
    }
}

/// A run's message is its own.
fn new_termination_log(directory: &Path) -> io::Result<Source> {
    let path = directory.join(TERMINATION_LOG);
    make_anew(&path, 0o600)?;
    Source::open(&path)
}

/// Makes a file anew: what a program has put in its place is not followed.
fn make_anew(path: &Path, mode: u32) -> io::Result<File> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let file = OpenOptions::new().write(true).create_new(true).mode(mode).open(path)?;
    file.set_permissions(Permissions::from_mode(mode))?;
    Ok(file)
}

/// A file of its own for a container, which may write to it as in any other container (kubelet_pods.go, `ensureHostsFile`).
fn new_view_file(directory: &Path, wanted: &ViewFile) -> io::Result<Source> {
    let path = directory.join(&wanted.name);
    let mut file = make_anew(&path, 0o644)?;
    file.write_all(wanted.head.as_bytes())?;
    if wanted.host {
        match File::open(&wanted.target) {
            Ok(host) => drop(io::copy(&mut host.take(HOST_FILE_BYTES), &mut file)?),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    file.write_all(wanted.tail.as_bytes())?;
    Source::open(&path)
}

/// What was made until now.
#[derive(Default)]
struct Builder {
    /// Directories of our own tmpfs: there, anything can be made.
    ours: BTreeSet<PathBuf>,
    /// Where a tmpfs of ours is mounted, and how many volumes were mounted before it.
    covers: Vec<(PathBuf, usize)>,
    /// Where volumes are mounted, in that order.
    mounted: Vec<PathBuf>,
    /// Whether the host's root lies under ours.
    has_old_root: bool,
}

impl Builder {
    fn hide(&mut self, hidden: &[PathBuf], shown: &[PathBuf]) -> Result<(), StartError> {
        let shown: Vec<(PathBuf, Source)> = shown
            .iter()
            .filter_map(|path| fs::canonicalize(path).ok())
            .filter_map(|path| Source::open(&path).ok().map(|source| (path, source)))
            .collect();
        // One that lies in another is hidden with it. Where there is none, there is nothing to hide.
        let mut places: Vec<PathBuf> = hidden.iter().filter_map(|path| fs::canonicalize(path).ok()).collect();
        places.sort();
        places.dedup_by(|inner, outer| inner.starts_with(&*outer));
        for place in places {
            let failed =
                |problem: &dyn std::fmt::Display| other(&format!("hiding {}", place.display()), problem);
            self.cover(&place, 0o700).map_err(|error| failed(&error))?;
            for (path, source) in shown.iter().filter(|(path, _)| path.starts_with(&place)) {
                DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(|error| failed(&error))?;
                bind(&source.path(), path).map_err(|errno| failed(&errno.desc()))?;
                self.mounted.push(path.clone());
            }
        }
        Ok(())
    }

    /// Mounts one thing where it is wanted.
    fn mount(&mut self, source: &Source, target: &Path, read_only: bool) -> Result<(), StartError> {
        let failed =
            |problem: &dyn std::fmt::Display| other(&format!("mounting at {}", target.display()), problem);
        let place = self.place(target, source.is_directory).map_err(|error| failed(&error))?;
        bind(&source.path(), &place).map_err(|errno| failed(&errno.desc()))?;
        if read_only {
            make_read_only(&place).map_err(|errno| failed(&errno.desc()))?;
        }
        self.ours.remove(&place);
        self.mounted.push(place);
        Ok(())
    }

    /// Finds or makes the place of a mount.
    fn place(&mut self, target: &Path, directory: bool) -> io::Result<PathBuf> {
        let Found { there, missing } = find(target)?;
        let Some((last, above)) = missing.split_last() else {
            return match (fs::symlink_metadata(&there)?.is_dir(), directory) {
                (true, false) => Err(io::Error::other("a directory is there, and a file is to be mounted")),
                (false, true) => Err(io::Error::other("a file is there, and a directory is to be mounted")),
                _ => Ok(there),
            };
        };
        if !fs::symlink_metadata(&there)?.is_dir() {
            return Err(io::Error::other(format!("{} is no directory", there.display())));
        }
        if !self.may_make(&there) {
            self.cover_again(&there)?;
        }
        let mut ours = self.ours.contains(&there);
        let mut place = there;
        let mut make = |path: &Path, directory: bool| {
            let made = make_place(path, directory);
            match made {
                // The directory looks as if one could write to it, and its file system is read-only or full.
                Err(error) if !ours && error.kind() != io::ErrorKind::AlreadyExists => {
                    let parent = path.parent().unwrap_or(Path::new("/"));
                    self.cover_again(parent)?;
                    ours = true;
                    make_place(path, directory)
                }
                made => made,
            }?;
            if ours && directory {
                self.ours.insert(path.to_owned());
            }
            io::Result::Ok(())
        };
        for name in above {
            place.push(name);
            make(&place, true)?;
        }
        place.push(last);
        make(&place, directory)?;
        Ok(place)
    }

    /// Whether a place can be made in a directory: in ours, in a volume, or on the host where this user may write. What
    /// root alone may write to is left as it is, for root too.
    fn may_make(&self, directory: &Path) -> bool {
        if self.ours.contains(directory) {
            return true;
        }
        if access(directory, AccessFlags::W_OK).is_err() {
            return false;
        }
        let is_open = || fs::metadata(directory).is_ok_and(|found| found.mode() & 0o002 != 0);
        !geteuid().is_root() || is_open() || self.mounted.iter().any(|volume| directory.starts_with(volume))
    }

    /// Mounts an empty tmpfs over a directory.
    fn cover(&mut self, place: &Path, mode: u32) -> io::Result<()> {
        mount_tmpfs(place, mode)?;
        self.ours.insert(place.to_owned());
        self.covers.push((place.to_owned(), self.mounted.len()));
        Ok(())
    }

    /// Covers a directory with a tmpfs that has all its entries.
    fn cover_again(&mut self, directory: &Path) -> io::Result<()> {
        let below = Source::open(directory)?;
        let entries = entries(directory)?;
        let mode = fs::metadata(directory)?.mode() & 0o755;
        // Names from here are found in the directory that is covered, and quicker than by way of /proc: there may be hundreds.
        fchdir(&below.file)?;
        if directory != Path::new("/") {
            self.cover(directory, mode)?;
            for entry in &entries {
                again(entry, directory, None)?;
            }
            return Ok(());
        }
        let staging = STAGING
            .iter()
            .map(Path::new)
            .find(|path| fs::symlink_metadata(path).is_ok_and(|found| found.is_dir()));
        let staging =
            staging.ok_or_else(|| io::Error::other("neither /tmp nor /mnt nor /var is a directory"))?;
        let here = Source::open(staging)?;
        mount_tmpfs(staging, mode)?;
        let is_here = |entry: &&Entry| Path::new("/").join(&entry.name) == staging;
        // First, while the new root is empty: a copy of it comes along, being mounted there, and goes again.
        for entry in entries.iter().filter(is_here) {
            again(entry, staging, Some(here.path()))?;
            umount2(&staging.join(&entry.name), MntFlags::MNT_DETACH)?;
        }
        for entry in entries.iter().filter(|entry| !is_here(entry)) {
            again(entry, staging, None)?;
        }
        // pivot_root(2), "pivot_root(".", ".")": the old root lies under the same place, and is detached at the end, when
        // nothing is taken from it any more.
        std::env::set_current_dir(staging)?;
        pivot_root(".", ".")?;
        std::env::set_current_dir("/")?;
        self.has_old_root = true;
        self.ours.insert(PathBuf::from("/"));
        self.covers.push((PathBuf::from("/"), self.mounted.len()));
        Ok(())
    }

    fn finish(self) -> Result<(), StartError> {
        let failed =
            |path: &Path, errno: Errno| other(&format!("making {} read-only", path.display()), &errno.desc());
        // No working directory of ours leads out of the view.
        std::env::set_current_dir("/").map_err(|error| other("/", &error))?;
        if self.has_old_root {
            umount2(".", MntFlags::MNT_DETACH)
                .map_err(|errno| other("detaching the host's root", &errno.desc()))?;
        }
        for (place, before) in &self.covers {
            // One over which a volume was mounted, as at /tmp, is not seen any more.
            if !self.mounted[*before..].iter().any(|volume| place.starts_with(volume)) {
                make_read_only(place).map_err(|errno| failed(place, errno))?;
            }
        }
        Ok(())
    }
}

/// One entry of a directory that is covered.
struct Entry {
    name: std::ffi::OsString,
    kind: fs::FileType,
}

/// What is in a directory. Devices that this user can neither read nor write are left out: a host has a hundred consoles
/// and disks, and nothing could be done with them.
fn entries(directory: &Path) -> io::Result<Vec<Entry>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        // Told by the directory itself on nearly every file system: a file server that hangs is not asked.
        let Ok(kind) = entry.file_type() else { continue };
        if found.len() >= MOST_ENTRIES {
            return Err(io::Error::other(format!(
                "{} has more than {MOST_ENTRIES} entries, too many to be mounted again: choose a place that exists, or one \
                 in a smaller directory",
                directory.display()
            )));
        }
        let device = kind.is_char_device() || kind.is_block_device();
        let usable =
            || [AccessFlags::R_OK, AccessFlags::W_OK].iter().any(|how| access(&entry.path(), *how).is_ok());
        if !device || usable() {
            found.push(Entry { name: entry.file_name(), kind });
        }
    }
    Ok(found)
}

/// Makes an entry of the working directory anew in `directory`: a link as a link, all else as a mount of it, of `instead`
/// where that is given.
fn again(entry: &Entry, directory: &Path, instead: Option<PathBuf>) -> io::Result<()> {
    let (source, target) = (PathBuf::from(&entry.name), directory.join(&entry.name));
    if entry.kind.is_symlink() {
        return match fs::read_link(&source) {
            Ok(link) => std::os::unix::fs::symlink(link, target),
            // It went meanwhile.
            Err(_) => Ok(()),
        };
    }
    make_place(&target, entry.kind.is_dir())?;
    if bind(&instead.unwrap_or(source), &target).is_err() {
        // It went meanwhile, or is a mount that does not answer. As on the host, there is nothing to be had of it.
        let _ = if entry.kind.is_dir() { fs::remove_dir(&target) } else { fs::remove_file(&target) };
    }
    Ok(())
}

/// An empty directory or file for a mount, with the modes that they have in a container.
fn make_place(path: &Path, directory: bool) -> io::Result<()> {
    if directory {
        DirBuilder::new().mode(0o755).create(path)
    } else {
        OpenOptions::new().write(true).create_new(true).mode(0o644).open(path).map(drop)
    }
}

fn mount_tmpfs(place: &Path, mode: u32) -> io::Result<()> {
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount(Some("tmpfs"), place, Some("tmpfs"), flags, Some("mode=0700"))?;
    fs::set_permissions(place, Permissions::from_mode(mode))
}

/// With what is mounted in it: a mount that the kernel has locked is never without its own.
fn bind(source: &Path, target: &Path) -> nix::Result<()> {
    mount(Some(source), target, NOTHING, MsFlags::MS_BIND | MsFlags::MS_REC, NOTHING)
}

/// The flags that the mount has must be given again, since the kernel has locked them (mount_namespaces(7)); those of
/// access times stay where none is named (mount(2)).
fn make_read_only(place: &Path) -> nix::Result<()> {
    let has = statvfs(place)?.flags();
    let mut flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY;
    for (found, flag) in [
        (FsFlags::ST_NOSUID, MsFlags::MS_NOSUID),
        (FsFlags::ST_NODEV, MsFlags::MS_NODEV),
        (FsFlags::ST_NOEXEC, MsFlags::MS_NOEXEC),
    ] {
        flags.set(flag, has.contains(found));
    }
    mount(NOTHING, place, NOTHING, flags, NOTHING)
}
