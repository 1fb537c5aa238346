//! Reads a container's log as [`log`](super::log) writes it: the rotated files from the oldest to the newest, then what is
//! still to come. [`LogReader`] gives raw entries; [`Formatter`] makes of them what `kubectl logs` shows.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use nix::fcntl::OFlag;

use crate::files;

/// One read: enough that a system call and a thread's turn cost little beside it, and more than the longest entry.
const READ_BYTES: usize = 64 * 1024;

/// Rotated files that are looked for: ten times kubelet's default of containerLogMaxFiles.
const FILES_MOST: u32 = 50;

/// A file moves at most once while it is opened, unless its writer does nothing but rotate.
const TRIES: usize = 8;

/// Which part of a log is wanted, and how: `kubectl logs`' own words (core/v1 PodLogOptions).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LogOptions {
    /// Only the last lines.
    pub tail: Option<u64>,
    /// Only what was written at this moment or later.
    pub since: Option<Timestamp>,
    /// Whether each line begins with its time stamp.
    pub timestamps: bool,
    /// Only the first bytes of what would be shown.
    pub limit_bytes: Option<u64>,
}

/// Makes what is shown of the log's entries.
#[derive(Debug)]
pub struct Formatter {
    since: Option<String>,
    timestamps: bool,
    left: Option<u64>,
    /// Lines that are passed over.
    skip: u64,
    /// An entry whose end has not been read.
    partial: Vec<u8>,
    /// Whether the next entry begins a line.
    begins: bool,
}

/// An entry of CRI's log format.
struct Entry<'a> {
    stamp: &'a [u8],
    whole: bool,
    text: &'a [u8],
}

impl Formatter {
    /// `skip` lines are passed over first: those that are before the tail.
    #[must_use]
    pub fn new(options: &LogOptions, skip: u64) -> Self {
        Self {
            since: options.since.map(|at| format!("{at:.9}")),
            timestamps: options.timestamps,
            left: options.limit_bytes,
            skip,
            partial: Vec::new(),
            begins: true,
        }
    }

    /// Whether as much has been shown as was asked for.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.left == Some(0)
    }

    /// Takes raw log, and appends what is shown of it.
    pub fn take(&mut self, mut bytes: &[u8], shown: &mut Vec<u8>) {
        if !self.partial.is_empty() {
            let Some(end) = memchr::memchr(b'\n', bytes) else {
                self.partial.extend_from_slice(bytes);
                return;
            };
            self.partial.extend_from_slice(&bytes[..end]);
            let entry = std::mem::take(&mut self.partial);
            self.entry(&entry, shown);
            bytes = &bytes[end + 1..];
        }
        while let Some(end) = memchr::memchr(b'\n', bytes) {
            self.entry(&bytes[..end], shown);
            bytes = &bytes[end + 1..];
        }
        self.partial.extend_from_slice(bytes);
    }

    fn entry(&mut self, line: &[u8], shown: &mut Vec<u8>) {
        // What is no entry was not written by us.
        let Some(entry) = parse(line) else { return };
        if self.skip > 0 {
            self.skip -= u64::from(entry.whole);
            return;
        }
        // Both are of one width and of UTC, so they compare as text.
        if self.since.as_ref().is_some_and(|since| entry.stamp < since.as_bytes()) {
            return;
        }
        let before = shown.len();
        if self.timestamps && self.begins {
            shown.extend_from_slice(entry.stamp);
            shown.push(b' ');
        }
        shown.extend_from_slice(entry.text);
        if entry.whole {
            shown.push(b'\n');
        }
        self.begins = entry.whole;
        if let Some(left) = &mut self.left {
            let fits = usize::try_from(*left).unwrap_or(usize::MAX);
            shown.truncate(before.saturating_add(fits));
            *left -= (shown.len() - before) as u64;
        }
    }
}

/// `<time stamp> <stream> <tag> <text>`.
fn parse(line: &[u8]) -> Option<Entry<'_>> {
    // As it is always written: a stamp of 30 bytes, `stdout` or `stderr`, one letter.
    if line.len() >= 40 && (line[30], line[37], line[39]) == (b' ', b' ', b' ') {
        return Some(Entry { stamp: &line[..30], whole: line[38] != b'P', text: &line[40..] });
    }
    let mut parts = line.splitn(4, |byte| *byte == b' ');
    let (stamp, _, tag) = (parts.next()?, parts.next()?, parts.next()?);
    Some(Entry { stamp, whole: tag != b"P", text: parts.next().unwrap_or_default() })
}

/// Where a log is read. It survives rotation, and reads nothing but files: a container can put anything in their place.
#[derive(Debug)]
pub struct LogReader {
    path: PathBuf,
    owner: Option<String>,
    current: Option<Current>,
    /// Where what was read last stands. Kept from one read to the next: a buffer of this size is the kernel's each time
    /// that it is made, and so are its pages.
    buffer: Vec<u8>,
}

/// The file that is read.
#[derive(Debug)]
struct Current {
    file: File,
    inode: u64,
    /// The end of the last whole entry that was read.
    offset: u64,
}

impl LogReader {
    /// A reader that begins with the oldest file of the log at `path`.
    #[must_use]
    pub fn new(path: PathBuf) -> Self {
        Self { path, owner: None, current: None, buffer: Vec::new() }
    }

    /// Reads only what lies beneath a directory of this name, whatever links the container has put in its log's way.
    #[must_use]
    pub fn owned_by(self, owner: Option<String>) -> Self {
        Self { owner, ..self }
    }

    /// The same, beginning with the file that has the first of the last `tail` lines, and how many lines of that file
    /// come before it.
    ///
    /// # Errors
    /// When a file that is there cannot be read.
    pub fn at_tail(mut self, tail: u64) -> io::Result<(Self, u64)> {
        let (mut wanted, mut skip) = (tail, 0);
        for (number, inode) in self.inodes()? {
            let Some(mut file) = self.open_inode(inode)? else { break };
            let (mut lines, mut open) = (0, false);
            while let Some(length) = file.read(&mut self.buffer)? {
                let entries = &self.buffer[..length];
                lines += count_lines(entries);
                let last =
                    entries.strip_suffix(b"\n").unwrap_or(entries).rsplit(|byte| *byte == b'\n').next();
                open = last.and_then(parse).is_some_and(|entry| !entry.whole);
            }
            // What stands at the end without a line end is a line too.
            lines += u64::from(open && number == 0);
            file.offset = 0;
            self.current = Some(file);
            skip = lines.saturating_sub(wanted);
            wanted = wanted.saturating_sub(lines);
            if wanted == 0 {
                break;
            }
        }
        Ok((self, skip))
    }

    /// Reads the next piece, of whole entries; none at the log's end, for now.
    ///
    /// # Errors
    /// When a file that is there cannot be read.
    pub fn read(&mut self) -> io::Result<Option<&[u8]>> {
        // Once around each file at the most: rotation cannot keep it from an end.
        for _ in 0..=FILES_MOST {
            let Some(current) = &mut self.current else {
                self.current = self.oldest()?;
                if self.current.is_none() {
                    return Ok(None);
                }
                continue;
            };
            if let Some(length) = current.read(&mut self.buffer)? {
                return Ok(Some(&self.buffer[..length]));
            }
            // The end of this file: a newer one follows when it was moved away.
            let Some(next) = self.newer()? else { return Ok(None) };
            // What was written between the last read and the rotation comes first.
            let last = self.current.as_mut().map(|current| current.read(&mut self.buffer));
            if let Some(length) = last.transpose()?.flatten() {
                return Ok(Some(&self.buffer[..length]));
            }
            self.current = Some(next);
        }
        Ok(None)
    }

    /// Gives the memory back that reading took, until the next read: hundreds of readers wait for a line.
    pub fn rest(&mut self) {
        self.buffer = Vec::new();
    }

    fn numbered(&self, n: u32) -> PathBuf {
        if n == 0 { self.path.clone() } else { PathBuf::from(format!("{}.{n}", self.path.display())) }
    }

    fn inode(&self, n: u32) -> io::Result<Option<u64>> {
        match std::fs::symlink_metadata(self.numbered(n)) {
            Ok(found) => Ok(Some(found.ino())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The inodes of the files, by number, from the newest on. A name may be missing in the middle of a rotation, and after it
    /// the newest, which is made with the next line; two in a row are the end.
    fn inodes(&self) -> io::Result<Vec<(u32, u64)>> {
        let (mut found, mut missing) = (Vec::new(), 0);
        for n in 0..FILES_MOST {
            match self.inode(n)? {
                Some(inode) => {
                    // In a rotation files move to higher numbers: one may be seen twice, none is passed over.
                    found.retain(|(_, seen)| *seen != inode);
                    found.push((n, inode));
                    missing = 0;
                }
                None => missing += 1,
            }
            if missing > 1 {
                break;
            }
        }
        Ok(found)
    }

    /// Opens a file that is known by its inode, whatever number it has by now.
    fn open_inode(&self, wanted: u64) -> io::Result<Option<Current>> {
        for _ in 0..TRIES {
            let Some((n, _)) = self.inodes()?.into_iter().find(|(_, inode)| *inode == wanted) else {
                return Ok(None);
            };
            if let Some(file) =
                open(&self.numbered(n), self.owner.as_deref())?.filter(|file| file.inode == wanted)
            {
                return Ok(Some(file));
            }
        }
        Ok(None)
    }

    fn oldest(&self) -> io::Result<Option<Current>> {
        self.inodes()?.last().map_or(Ok(None), |(_, inode)| self.open_inode(*inode))
    }

    /// The file that follows the one that is read; none when that is the current one.
    fn newer(&self) -> io::Result<Option<Current>> {
        let Some(own) = self.current.as_ref().map(|current| current.inode) else { return Ok(None) };
        let all = self.inodes()?;
        match all.iter().position(|(_, inode)| *inode == own) {
            Some(0) => Ok(None),
            Some(place) => self.open_inode(all[place - 1].1),
            // Ours has been removed: what follows is the oldest that is left.
            None => self.oldest(),
        }
    }
}

impl Current {
    /// The next whole entries, at the buffer's beginning: their length.
    fn read(&mut self, buffer: &mut Vec<u8>) -> io::Result<Option<usize>> {
        // A file that could not be moved away was emptied. What is cut off after a failed write ends with an entry.
        if self.file.metadata()?.len() < self.offset {
            self.offset = 0;
        }
        buffer.resize(READ_BYTES, 0);
        let mut read = 0;
        while read < buffer.len() {
            match self.file.read_at(&mut buffer[read..], self.offset + read as u64) {
                Ok(0) => break,
                Ok(n) => read += n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        match memchr::memrchr(b'\n', &buffer[..read]) {
            Some(end) => {
                self.offset += end as u64 + 1;
                Ok(Some(end + 1))
            }
            // No entry is so long: it was not written by us.
            None if read == READ_BYTES => {
                self.offset += read as u64;
                Ok(Some(0))
            }
            None => Ok(None),
        }
    }
}

/// Opens a file of a log; none when there is none of this name.
fn open(path: &Path, owner: Option<&str>) -> io::Result<Option<Current>> {
    let flags = OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK;
    match OpenOptions::new().read(true).custom_flags(flags.bits()).open(path) {
        Ok(file) => {
            let found = file.metadata()?;
            if !found.is_file() {
                return Err(io::Error::other("it is no file any more"));
            }
            if !files::lies_in(&file, owner) {
                return Err(io::Error::other("a link leads out of the pod's own directory"));
            }
            Ok(Some(Current { inode: found.ino(), file, offset: 0 }))
        }
        // It has just been moved; the next look finds it.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// How many whole lines these entries have.
fn count_lines(entries: &[u8]) -> u64 {
    let lines =
        entries.split(|byte| *byte == b'\n').filter_map(|line| parse(&line[..line.len().min(HEAD_BYTES)]));
    lines.filter(|entry| entry.whole).count() as u64
}

/// Time stamp, stream and tag of an entry: 30 + 1 + 6 + 1 + 1.
const HEAD_BYTES: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::container::log::{Log, LogLimits, Output};
    use std::time::Duration;

    fn show(options: &LogOptions, skip: u64, raw: &str) -> String {
        let mut formatter = Formatter::new(options, skip);
        let mut shown = Vec::new();
        // In pieces of any size.
        for piece in raw.as_bytes().chunks(7) {
            formatter.take(piece, &mut shown);
        }
        String::from_utf8(shown).unwrap()
    }

    const RAW: &str = "2026-01-01T00:00:01.000000000Z stdout F one\n\
        2026-01-01T00:00:02.000000000Z stderr P tw\n\
        2026-01-01T00:00:02.000000001Z stderr F o\n\
        2026-01-01T00:00:03.000000000Z stdout F \n\
        2026-01-01T00:00:04.000000000Z stdout F a  b\n";

    #[test]
    fn entries_are_shown_as_the_container_wrote_them() {
        assert_eq!(show(&LogOptions::default(), 0, RAW), "one\ntwo\n\na  b\n");
        assert_eq!(show(&LogOptions::default(), 2, RAW), "\na  b\n");
        let timestamps = LogOptions { timestamps: true, ..Default::default() };
        assert_eq!(
            show(&timestamps, 1, RAW),
            "2026-01-01T00:00:02.000000000Z two\n2026-01-01T00:00:03.000000000Z \n2026-01-01T00:00:04.000000000Z a  b\n"
        );
        let since = LogOptions { since: Some("2026-01-01T00:00:03Z".parse().unwrap()), ..Default::default() };
        assert_eq!(show(&since, 0, RAW), "\na  b\n");
        let limit = LogOptions { limit_bytes: Some(6), ..Default::default() };
        assert_eq!(show(&limit, 0, RAW), "one\ntw");
        assert_eq!(show(&LogOptions { limit_bytes: Some(0), ..Default::default() }, 0, RAW), "");
    }

    fn write(log: &mut Log, from: u32, to: u32) {
        for n in from..to {
            log.take(Output::Stdout, format!("line {n}\n").as_bytes(), |_| {});
        }
    }

    fn wait_for(path: &Path, text: &str) {
        let end = std::time::Instant::now() + Duration::from_secs(10);
        while !std::fs::read_to_string(path).unwrap_or_default().contains(text) {
            assert!(std::time::Instant::now() < end, "{text} in {}", path.display());
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn a_reader_survives_rotation_and_loses_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.log");
        let mut log = Log::new(path.clone(), LogLimits { bytes: 4000, files: 10 });
        let mut reader = LogReader::new(path.clone());
        let mut formatter = Formatter::new(&LogOptions::default(), 0);
        let mut shown = Vec::new();
        assert!(reader.read().unwrap().is_none());
        for round in 0..5 {
            let (from, to) = (round * 150, (round + 1) * 150);
            write(&mut log, from, to);
            wait_for(&path, &format!("line {}\n", to - 1));
            while let Some(bytes) = reader.read().unwrap() {
                formatter.take(bytes, &mut shown);
            }
        }
        let wanted: String = (0..750).map(|n| format!("line {n}\n")).collect();
        assert_eq!(String::from_utf8(shown).unwrap(), wanted);
        assert!(dir.path().join("0.log.3").exists());
        let tail = |lines: u64| {
            let (mut reader, skip) = LogReader::new(path.clone()).at_tail(lines).unwrap();
            let mut formatter = Formatter::new(&LogOptions::default(), skip);
            let mut shown = Vec::new();
            while let Some(bytes) = reader.read().unwrap() {
                formatter.take(bytes, &mut shown);
            }
            String::from_utf8(shown).unwrap()
        };
        assert_eq!(tail(2), "line 748\nline 749\n");
        assert_eq!(tail(200), (550..750).map(|n| format!("line {n}\n")).collect::<String>());
        assert_eq!((tail(0), tail(9999)), (String::new(), wanted));
    }

    #[test]
    fn a_last_line_without_an_end_is_shown_as_it_was_written_and_counts() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.log");
        let mut log = Log::new(path.clone(), LogLimits::default());
        log.take(Output::Stdout, b"one\ntwo\nrest", |_| {});
        log.close(Output::Stdout, |_| {});
        let _ = log.finish(Duration::from_secs(10));
        for (tail, wanted) in [(1, "rest"), (2, "two\nrest"), (9, "one\ntwo\nrest")] {
            let (mut reader, skip) = LogReader::new(path.clone()).at_tail(tail).unwrap();
            let mut shown = Vec::new();
            let mut formatter = Formatter::new(&LogOptions::default(), skip);
            while let Some(bytes) = reader.read().unwrap() {
                formatter.take(bytes, &mut shown);
            }
            assert_eq!(String::from_utf8(shown).unwrap(), wanted, "--tail={tail}");
        }
    }

    #[test]
    fn a_reader_beside_a_writer_that_rotates_all_the_time_gets_each_line_once() {
        let dir = tempfile::tempdir().unwrap();
        for run in 0..20 {
            let path = dir.path().join(format!("{run}.log"));
            // No file is removed, and each holds some twenty lines.
            let mut log = Log::new(path.clone(), LogLimits { bytes: 1000, files: FILES_MOST });
            let writer = std::thread::spawn(move || {
                write(&mut log, 0, 900);
                log.finish(Duration::from_secs(10))
            });
            let (mut reader, mut shown) = (LogReader::new(path), Vec::new());
            let mut formatter = Formatter::new(&LogOptions::default(), 0);
            loop {
                let over = writer.is_finished();
                while let Some(bytes) = reader.read().unwrap() {
                    formatter.take(bytes, &mut shown);
                }
                if over {
                    break;
                }
            }
            assert_eq!(writer.join().unwrap().lost, 0);
            let wanted: String = (0..900).map(|n| format!("line {n}\n")).collect();
            assert!(String::from_utf8(shown).unwrap() == wanted, "run {run}");
        }
    }

    #[test]
    fn a_long_line_counts_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.log");
        let mut log = Log::new(path.clone(), LogLimits::default());
        log.take(Output::Stdout, &[b'x'; 50_000], |_| {});
        log.take(Output::Stdout, b"\nend\n", |_| {});
        assert_eq!(log.finish(Duration::from_secs(5)).lost, 0);
        let (_, skip) = LogReader::new(path).at_tail(1).unwrap();
        assert_eq!(skip, 1);
    }

    #[test]
    fn what_is_cut_off_after_a_failed_write_is_neither_shown_nor_shown_twice() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.log");
        let line = |n: u32| format!("2026-01-01T00:00:00.000000000Z stdout F line {n}\n");
        let mut reader = LogReader::new(path.clone());
        std::fs::write(&path, format!("{}{}", line(1), &line(2)[..40])).unwrap();
        assert_eq!(reader.read().unwrap().unwrap(), line(1).as_bytes());
        std::fs::write(&path, line(1)).unwrap();
        assert_eq!(reader.read().unwrap(), None);
        std::fs::write(&path, format!("{}{}", line(1), line(3))).unwrap();
        assert_eq!(reader.read().unwrap().unwrap(), line(3).as_bytes());
    }

    #[test]
    fn what_a_container_puts_in_the_place_of_its_log_holds_nobody_up() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.log");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(LogReader::new(path.clone()).read().is_err());
        std::fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink("/dev/zero", &path).unwrap();
        assert!(LogReader::new(path.clone()).read().is_err());
        std::fs::remove_file(&path).unwrap();
        // No line end anywhere: nothing is kept.
        std::fs::write(&path, vec![b'x'; 1 << 20]).unwrap();
        let mut reader = LogReader::new(path);
        while let Some(bytes) = reader.read().unwrap() {
            assert!(bytes.is_empty());
        }
    }
}
