//! The `pgid` files, in which a container may name another process group as its own.
//!
//! JIRIAF's pods write the process group of a Docker container there. The files lie in the pods' directories and so often
//! on a file server: they are read by a thread of their own, at most one at a time, and a scrape that it keeps waiting
//! goes on with what was read before.

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::io::Read as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::fcntl::OFlag;

/// The file in a container's directory.
const PGID: &str = "pgid";

/// A number and a line feed.
const MAX_FILE: u64 = 32;

/// How long a scrape waits for the files after it has read /proc, during which they are read already: 100 of them on a
/// local disk take less than a millisecond, and the whole scrape may take 10.
const WAIT: Duration = Duration::from_millis(3);

type Named = BTreeMap<PathBuf, i32>;

/// What the `pgid` files named when they were last read.
#[derive(Debug, Default)]
pub struct PgidFiles {
    named: Arc<Mutex<Named>>,
    busy: Arc<AtomicBool>,
}

impl PgidFiles {
    /// Begins to read the files in these directories, unless that is still being done.
    pub(super) fn begin(&self, directories: &[PathBuf]) -> Option<Receiver<()>> {
        if directories.is_empty() || self.busy.swap(true, Ordering::AcqRel) {
            return None;
        }
        let (done, reading) = mpsc::channel();
        let (named, busy, directories) =
            (Arc::clone(&self.named), Arc::clone(&self.busy), directories.to_vec());
        let work = move || {
            let fresh: Named =
                directories.into_iter().filter_map(|d| read(&d).map(|group| (d, group))).collect();
            *lock(&named) = fresh;
            busy.store(false, Ordering::Release);
            let _ = done.send(());
        };
        if std::thread::Builder::new().name("pgid".to_owned()).spawn(work).is_ok() {
            return Some(reading);
        }
        // No thread to be had: what is known stays.
        self.busy.store(false, Ordering::Release);
        None
    }

    /// The groups that the files name, in the order of `directories`; what was known when it takes too long.
    pub(super) fn end(&self, reading: Option<Receiver<()>>, directories: &[PathBuf]) -> Vec<Option<i32>> {
        if let Some(reading) = reading {
            let _ = reading.recv_timeout(WAIT);
        }
        let named = lock(&self.named);
        directories.iter().map(|directory| named.get(directory).copied()).collect()
    }
}

fn lock(named: &Mutex<Named>) -> MutexGuard<'_, Named> {
    named.lock().unwrap_or_else(PoisonError::into_inner)
}

fn read(directory: &Path) -> Option<i32> {
    // It may be anything by now, a pipe too.
    let mut options = OpenOptions::new();
    let file = options.read(true).custom_flags(OFlag::O_NONBLOCK.bits()).open(directory.join(PGID)).ok()?;
    let mut text = String::new();
    file.take(MAX_FILE).read_to_string(&mut text).ok()?;
    parse(&text)
}

/// Reads the number of a group. 0 is the reader's own for some calls, and 1 is init's.
fn parse(text: &str) -> Option<i32> {
    text.trim().parse().ok().filter(|group| *group > 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_number_names_a_group() {
        assert_eq!(parse("4711\n"), Some(4711));
        assert_eq!(parse(" 4711 "), Some(4711));
        for bad in ["", "\n", "0", "1", "-5", "4711 4712", "99999999999", "x"] {
            assert_eq!(parse(bad), None, "{bad:?}");
        }
    }

    /// Whether the files name these groups in the end: the thread that reads them may wait for a processor.
    fn soon(pgids: &PgidFiles, directories: &[PathBuf], wanted: &[Option<i32>]) -> bool {
        (0..5000).any(|_| {
            std::thread::sleep(Duration::from_millis(1));
            pgids.end(pgids.begin(directories), directories) == wanted
        })
    }

    #[test]
    fn files_are_read_anew_each_time_and_nothing_holds_them_up() {
        let root = tempfile::tempdir().unwrap();
        let directories: Vec<PathBuf> = ["a", "b", "c"].iter().map(|name| root.path().join(name)).collect();
        directories.iter().for_each(|directory| std::fs::create_dir(directory).unwrap());
        std::fs::write(directories[0].join(PGID), "17\n").unwrap();
        // Nobody will ever write to this one.
        nix::unistd::mkfifo(&directories[1].join(PGID), nix::sys::stat::Mode::S_IRWXU).unwrap();
        let pgids = PgidFiles::default();
        let read = |wanted: [Option<i32>; 3]| soon(&pgids, &directories, &wanted);
        assert!(read([Some(17), None, None]));
        std::fs::write(directories[0].join(PGID), "18\n").unwrap();
        std::fs::write(directories[2].join(PGID), "19\n").unwrap();
        assert!(read([Some(18), None, Some(19)]));
    }

    #[test]
    fn a_reader_that_hangs_leaves_what_was_known() {
        let pgids = PgidFiles::default();
        lock(&pgids.named).insert("/nowhere".into(), 42);
        pgids.busy.store(true, Ordering::Release);
        let directories = [PathBuf::from("/nowhere")];
        assert!(pgids.begin(&directories).is_none(), "a second thread");
        assert_eq!(pgids.end(None, &directories), [Some(42)]);
        pgids.busy.store(false, Ordering::Release);
        assert!(soon(&pgids, &directories, &[None]));
    }
}
