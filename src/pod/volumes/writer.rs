//! A volume's files on disk, in the layout of a kubelet's AtomicWriter (`pkg/volume/util/atomic_writer.go`), so that an
//! update appears whole:
//!
//! ```text
//! <volume>/..2026_01_31_12_00_00.123456789/conf/a   the files
//! <volume>/..data   -> ..2026_01_31_12_00_00.123456789
//! <volume>/conf     -> ..data/conf
//! ```
//!
//! `..data` is replaced by one rename. Whoever holds the old directory open goes on reading from it.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::io;
use std::path::{Component, Path, PathBuf};

use jiff::Timestamp;
use jiff::tz::TimeZone;

use super::{Entry, Files};
use crate::files::Root;

/// The link to the directory that holds the files.
pub(super) const DATA: &str = "..data";
/// Its next form, until the rename.
const DATA_NEXT: &str = "..data_tmp";
/// Mode of the directories (atomic_writer.go, newTimestampDir).
const DIR_MODE: u32 = 0o755;
/// How a directory is called that holds files, `d` standing for a digit. A volume's file cannot have such a name
/// (`paths::file_path`).
const STAMP: &str = "..dddd_dd_dd_dd_dd_dd.ddddddddd";
/// Names that are tried: another writer would have to take the same nanosecond each time.
const NAMES: u32 = 8;

/// What a write has done.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Written {
    /// Whether anything of the files is new.
    pub changed: bool,
    /// Files that were there and are not any more.
    pub removed: Vec<PathBuf>,
}

/// Makes `volume` hold these files and no others. What holds them already is left as it is.
///
/// # Errors
/// When they cannot be written; what was there before is there still.
pub(super) fn write(volume: &Root, files: &Files, group: Option<u32>) -> io::Result<Written> {
    replace(volume, files, |old| holds(old, files), |new| fill(new, files, group))
}

/// Makes `view`, a directory in which a container sees a volume, hold the files that `volume` holds by now. They are the same
/// files (hard links), so that this costs no room, and so that the directory is whole in itself: it may be bound into an
/// image's file system.
///
/// # Errors
/// As [`write`]'s.
pub(super) fn mirror(view: &Root, volume: &Root, files: &Files, group: Option<u32>) -> io::Result<()> {
    let data = current(volume)?.map(|name| volume.existing(Path::new(&name))).transpose()?.flatten();
    let Some(data) = data else {
        return Err(io::Error::new(io::ErrorKind::NotFound, "the volume's files are not there any more"));
    };
    let same = |old: &Root| {
        files.iter().all(|(path, entry)| {
            let path = Path::new(path);
            old.is_same(path, &data) || old.holds(path, &entry.data, entry.mode)
        })
    };
    let link = |new: &Root| {
        make_directories(new, files, group)?;
        for (path, entry) in files {
            // Not on another file system, and not on all kinds of them.
            if new.link(Path::new(path), &data).is_err() {
                put(new, path, entry, group)?;
            }
        }
        Ok(())
    };
    replace(view, files, same, link).map(drop)
}

/// Puts a new directory of files in the place of the one that is there, unless that is the `same`.
fn replace(
    volume: &Root,
    files: &Files,
    same: impl Fn(&Root) -> bool,
    fill: impl Fn(&Root) -> io::Result<()>,
) -> io::Result<Written> {
    let old = match current(volume)? {
        Some(name) => volume.existing(Path::new(&name))?,
        None => None,
    };
    let mut written = Written { changed: true, removed: Vec::new() };
    if let Some(old) = &old {
        // More than that were never written here.
        let present = old.files(files.len().saturating_add(100_000))?;
        written.changed = present.as_ref().is_none_or(|present| present.len() != files.len()) || !same(old);
        written.removed = present
            .into_iter()
            .flatten()
            .filter(|path| path.to_str().is_none_or(|path| !files.contains_key(path)))
            .collect();
    }
    if !written.changed {
        show(volume, files)?;
        return Ok(written);
    }
    let (name, new) = new_directory(volume)?;
    let filled =
        fill(&new).and_then(|()| volume.relink_by(Path::new(&name), OsStr::new(DATA), OsStr::new(DATA_NEXT)));
    if let Err(error) = filled {
        let _ = volume.remove_tree(OsStr::new(&name));
        return Err(error);
    }
    let shown = show(volume, files);
    for left in volume.names()? {
        let text = left.to_string_lossy();
        if is_stamp(&text) && *text != *name && volume.is_dir(&left) {
            volume.remove_tree(&left)?;
        }
    }
    shown.map(|()| written)
}

/// Makes `directory` show these files: links to what its `..data` leads to, for the first component of each path. Of what is
/// there else only links of this kind go whose file is gone.
///
/// # Errors
/// When a directory is in the way, or a link cannot be made; the others are made all the same.
fn show(directory: &Root, files: &Files) -> io::Result<()> {
    let mut result = Ok(());
    let tops = tops(files);
    for top in &tops {
        if let Err(error) = directory.relink(&Path::new(DATA).join(top), OsStr::new(top)) {
            result = Err(io::Error::new(error.kind(), format!("{top}: {error}")));
        }
    }
    for name in directory.names()? {
        let ours = |target: PathBuf| target == Path::new(DATA).join(&name);
        if name.to_str().is_none_or(|name| !tops.contains(name))
            && directory.read_link(&name)?.is_some_and(ours)
        {
            directory.remove_link(&name)?;
        }
    }
    result
}

/// The names that a volume shows: the first component of each path.
pub(super) fn tops(files: &Files) -> BTreeSet<&str> {
    files.keys().map(|path| path.split('/').next().unwrap_or(path)).collect()
}

/// The directory that `..data` names, where it names one of ours: a script may have put anything there.
fn current(volume: &Root) -> io::Result<Option<String>> {
    let found = volume.read_link(OsStr::new(DATA))?;
    Ok(found.and_then(|target| {
        let mut components = target.components();
        match (components.next(), components.next()) {
            (Some(Component::Normal(name)), None) => {
                name.to_str().filter(|name| is_stamp(name)).map(ToOwned::to_owned)
            }
            _ => None,
        }
    }))
}

fn holds(old: &Root, files: &Files) -> bool {
    files.iter().all(|(path, entry)| old.holds(Path::new(path), &entry.data, entry.mode))
}

fn new_directory(volume: &Root) -> io::Result<(String, Root)> {
    let mut last = io::Error::from(io::ErrorKind::AlreadyExists);
    for _ in 0..NAMES {
        let name = stamp(Timestamp::now());
        match volume.make_new(OsStr::new(&name), DIR_MODE) {
            Ok(made) => return Ok((name, made)),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => last = error,
            Err(error) => return Err(error),
        }
    }
    Err(last)
}

/// `..2016_02_01_15_04_05.123456789`, in UTC.
fn stamp(now: Timestamp) -> String {
    let at = TimeZone::UTC.to_datetime(now);
    format!(
        "..{:04}_{:02}_{:02}_{:02}_{:02}_{:02}.{:09}",
        at.year(),
        at.month(),
        at.day(),
        at.hour(),
        at.minute(),
        at.second(),
        at.subsec_nanosecond()
    )
}

fn is_stamp(name: &str) -> bool {
    name.len() == STAMP.len()
        && name.bytes().zip(STAMP.bytes()).all(|(byte, wanted)| match wanted {
            b'd' => byte.is_ascii_digit(),
            wanted => byte == wanted,
        })
}

fn fill(new: &Root, files: &Files, group: Option<u32>) -> io::Result<()> {
    make_directories(new, files, group)?;
    files.iter().try_for_each(|(path, entry)| put(new, path, entry, group))
}

fn make_directories(new: &Root, files: &Files, group: Option<u32>) -> io::Result<()> {
    if let Some(group) = group {
        // Directories that are made in it are the group's too, by the bit.
        new.set_group(group)?;
    }
    let set_group = if group.is_some() { 0o2000 } else { 0 };
    let above = files.keys().filter_map(|path| Path::new(path).parent());
    for above in above.filter(|above| !above.as_os_str().is_empty()).collect::<BTreeSet<_>>() {
        new.create_dir_all(above, DIR_MODE | set_group)?;
    }
    Ok(())
}

fn put(new: &Root, path: &str, entry: &Entry, group: Option<u32>) -> io::Result<()> {
    let path = Path::new(path);
    new.write(path, &entry.data, entry.mode)?;
    group.map_or(Ok(()), |group| new.set_file_group(path, group, entry.mode))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{MetadataExt as _, symlink};
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    fn files(entries: &[(&str, &str, u32)]) -> Files {
        let entry = |data: &str, mode| Entry { data: data.as_bytes().to_vec(), mode };
        entries.iter().map(|(path, data, mode)| ((*path).to_owned(), entry(data, *mode))).collect()
    }

    fn names(directory: &Path) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(directory)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    fn target(link: &Path) -> String {
        fs::read_link(link).unwrap().into_os_string().into_string().unwrap()
    }

    #[test]
    fn the_layout_is_the_atomic_writers() {
        let volume = tempfile::tempdir().unwrap();
        let root = Root::open(volume.path()).unwrap();
        let wanted = files(&[("a", "1", 0o640), ("sub/b", "2", 0o400), ("sub/deep/c", "3", 0o755)]);
        assert!(write(&root, &wanted, None).unwrap().changed);
        let stamped = target(&volume.path().join("..data"));
        assert!(stamped.starts_with("..20") && stamped.len() == 31, "{stamped}");
        assert_eq!(names(volume.path()), [stamped.as_str(), "..data", "a", "sub"]);
        assert_eq!(target(&volume.path().join("a")), "..data/a");
        assert_eq!(target(&volume.path().join("sub")), "..data/sub");
        for (path, data, mode) in [("a", "1", 0o640), ("sub/b", "2", 0o400), ("sub/deep/c", "3", 0o755)] {
            assert_eq!(fs::read_to_string(volume.path().join(path)).unwrap(), data);
            assert_eq!(fs::metadata(volume.path().join(path)).unwrap().mode() & 0o7777, mode, "{path}");
        }
    }

    #[test]
    fn what_is_there_already_is_not_written_again() {
        let volume = tempfile::tempdir().unwrap();
        let root = Root::open(volume.path()).unwrap();
        let wanted = files(&[("a", "1", 0o644), ("sub/b", "2", 0o644)]);
        write(&root, &wanted, None).unwrap();
        let before =
            (target(&volume.path().join("..data")), fs::metadata(volume.path()).unwrap().ctime_nsec());
        assert_eq!(write(&root, &wanted, None).unwrap(), Written::default());
        let after =
            (target(&volume.path().join("..data")), fs::metadata(volume.path()).unwrap().ctime_nsec());
        assert_eq!(before, after, "not even a link was touched");
        // A link that somebody took away is made again, without new files.
        fs::remove_file(volume.path().join("a")).unwrap();
        assert!(!write(&root, &wanted, None).unwrap().changed);
        assert_eq!(fs::read_to_string(volume.path().join("a")).unwrap(), "1");
        for other in [
            files(&[("a", "1", 0o644), ("sub/b", "3", 0o644)]),
            files(&[("a", "1", 0o600), ("sub/b", "3", 0o644)]),
            files(&[("a", "1", 0o600)]),
            files(&[]),
        ] {
            assert!(write(&root, &other, None).unwrap().changed, "{other:?}");
        }
    }

    #[test]
    fn a_write_that_fails_leaves_what_was_there() {
        let volume = tempfile::tempdir().unwrap();
        let root = Root::open(volume.path()).unwrap();
        write(&root, &files(&[("a", "1", 0o644)]), None).unwrap();
        let before = names(volume.path());
        // A file cannot be a directory too.
        assert!(write(&root, &files(&[("a", "2", 0o644), ("a/b", "2", 0o644)]), None).is_err());
        assert_eq!(names(volume.path()), before);
        assert_eq!(fs::read_to_string(volume.path().join("a")).unwrap(), "1");
    }

    #[test]
    fn names_that_are_gone_go_and_what_is_not_ours_stays() {
        let volume = tempfile::tempdir().unwrap();
        let root = Root::open(volume.path()).unwrap();
        write(&root, &files(&[("a", "1", 0o644), ("sub/b", "2", 0o644)]), None).unwrap();
        fs::write(volume.path().join("own"), "mine").unwrap();
        symlink("/etc", volume.path().join("etc")).unwrap();
        fs::create_dir(volume.path().join("..2000_01_01_00_00_00.123456789")).unwrap();
        fs::create_dir(volume.path().join("..2000_own")).unwrap();
        symlink("nowhere", volume.path().join("..data_tmp")).unwrap();
        let written = write(&root, &files(&[("c", "3", 0o644)]), None).unwrap();
        assert_eq!(written.removed.len(), 2, "{written:?}");
        let stamped = target(&volume.path().join("..data"));
        assert_eq!(names(volume.path()), ["..2000_own", stamped.as_str(), "..data", "c", "etc", "own"]);
    }

    #[test]
    fn a_link_of_somebody_elses_in_the_place_of_ours_leads_nowhere() {
        let (volume, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        fs::write(outside.path().join("victim"), "safe").unwrap();
        let root = Root::open(volume.path()).unwrap();
        symlink(outside.path(), volume.path().join("..data")).unwrap();
        symlink(outside.path().join("victim"), volume.path().join("a")).unwrap();
        write(&root, &files(&[("a", "1", 0o644)]), None).unwrap();
        assert_eq!(fs::read_to_string(volume.path().join("a")).unwrap(), "1");
        assert_eq!(fs::read_to_string(outside.path().join("victim")).unwrap(), "safe");
        assert_eq!(names(outside.path()), ["victim"]);
    }

    #[test]
    fn readers_see_all_of_an_update_or_nothing() {
        let volume = tempfile::tempdir().unwrap();
        let root = Root::open(volume.path()).unwrap();
        let version = |n: u32| {
            let text = format!("{n}").repeat(5000);
            files(&[("a", &text, 0o644), ("b", &text, 0o644)])
        };
        write(&root, &version(0), None).unwrap();
        let over = Arc::new(AtomicBool::new(false));
        let reader = std::thread::spawn({
            let (path, over) = (volume.path().to_owned(), Arc::clone(&over));
            move || {
                let mut seen = BTreeSet::new();
                while !over.load(Ordering::Relaxed) {
                    // One directory, held: what `..data` led to then. It may be removed meanwhile, but never mixed.
                    let Ok(at) = fs::canonicalize(path.join("..data")) else { continue };
                    let (a, b) = (fs::read_to_string(at.join("a")), fs::read_to_string(at.join("b")));
                    if let (Ok(a), Ok(b)) = (a, b) {
                        assert_eq!(a, b);
                        assert!(a.len() == 5000 && a.bytes().all(|byte| byte == a.as_bytes()[0]));
                        seen.insert(a);
                    }
                }
                seen.len()
            }
        });
        for n in 1..300 {
            write(&root, &version(n % 10), None).unwrap();
        }
        over.store(true, Ordering::Relaxed);
        assert!(reader.join().unwrap() > 1, "the reader saw updates");
    }

    #[test]
    fn a_view_is_whole_in_itself_takes_no_room_and_follows() {
        let (volume, view) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (root, shown) = (Root::open(volume.path()).unwrap(), Root::open(view.path()).unwrap());
        let mut wanted = files(&[("a", "1", 0o644), ("sub/b", "2", 0o640)]);
        assert!(mirror(&shown, &root, &wanted, None).is_err(), "nothing is there yet");
        write(&root, &wanted, None).unwrap();
        mirror(&shown, &root, &wanted, None).unwrap();
        fs::write(view.path().join("result"), "mine").unwrap();
        let inode = |directory: &Path, path: &str| fs::metadata(directory.join(path)).unwrap().ino();
        for path in ["a", "sub/b"] {
            assert_eq!(inode(view.path(), path), inode(volume.path(), path), "{path}");
            let real = fs::canonicalize(view.path().join(path)).unwrap();
            assert!(real.starts_with(fs::canonicalize(view.path()).unwrap()), "{path} leads nowhere else");
        }
        let before = target(&view.path().join("..data"));
        mirror(&shown, &root, &wanted, None).unwrap();
        assert_eq!(target(&view.path().join("..data")), before, "nothing was written again");

        wanted = files(&[("a", "3", 0o644), ("c", "4", 0o644)]);
        write(&root, &wanted, None).unwrap();
        assert_eq!(fs::read_to_string(view.path().join("a")).unwrap(), "1", "the old ones are whole still");
        mirror(&shown, &root, &wanted, None).unwrap();
        let stamped = target(&view.path().join("..data"));
        assert_eq!(names(view.path()), [stamped.as_str(), "..data", "a", "c", "result"]);
        assert_eq!(fs::read_to_string(view.path().join("a")).unwrap(), "3");
        // A directory of the script's own in the way is an error, and the others are shown.
        fs::create_dir(view.path().join("d")).unwrap();
        wanted = files(&[("d", "5", 0o644), ("e", "6", 0o644)]);
        write(&root, &wanted, None).unwrap();
        assert!(mirror(&shown, &root, &wanted, None).unwrap_err().to_string().starts_with("d: "));
        let stamped = target(&view.path().join("..data"));
        assert_eq!(names(view.path()), [stamped.as_str(), "..data", "d", "e", "result"]);
    }

    #[test]
    fn a_view_on_another_file_system_has_copies() {
        let (volume, view) = (tempfile::tempdir().unwrap(), tempfile::tempdir_in("/dev/shm").unwrap());
        let (root, shown) = (Root::open(volume.path()).unwrap(), Root::open(view.path()).unwrap());
        let wanted = files(&[("sub/b", "2", 0o640)]);
        write(&root, &wanted, None).unwrap();
        mirror(&shown, &root, &wanted, None).unwrap();
        let before = target(&view.path().join("..data"));
        mirror(&shown, &root, &wanted, None).unwrap();
        assert_eq!(target(&view.path().join("..data")), before);
        assert_eq!(fs::read_to_string(view.path().join("sub/b")).unwrap(), "2");
        assert_eq!(fs::metadata(view.path().join("sub/b")).unwrap().mode() & 0o7777, 0o640);
    }

    #[test]
    fn a_group_of_the_users_gets_the_files() {
        let volume = tempfile::tempdir().unwrap();
        let root = Root::open(volume.path()).unwrap();
        let group = nix::unistd::getegid().as_raw();
        let wanted = files(&[("sub/b", "2", 0o440)]);
        write(&root, &wanted, Some(group)).unwrap();
        let file = fs::metadata(volume.path().join("sub/b")).unwrap();
        assert_eq!((file.gid(), file.mode() & 0o7777), (group, 0o440));
        let above = fs::metadata(volume.path().join("sub")).unwrap();
        assert_eq!((above.gid(), above.mode() & 0o7777), (group, 0o2755));
        assert!(!write(&root, &wanted, Some(group)).unwrap().changed);
    }
}
