//! Reads a container's log as [`log`](super::log) writes it: the rotated files from the oldest to the newest, then what is
//! still to come. [`LogReader`] gives raw entries; [`Formatter`] makes of them what `kubectl logs` shows.

use std::fs::File;
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use jiff::Timestamp;

/// One read: enough that a system call and a thread's turn cost little beside it.
const READ_BYTES: usize = 256 * 1024;

/// Rotated files that are looked for: ten times kubelet's default of containerLogMaxFiles.
const FILES_MOST: u32 = 50;

/// How often a file that follows is looked for when rotations come between: each takes as long as it takes to write a file.
const TRIES: usize = 16;

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
            let Some(end) = bytes.iter().position(|byte| *byte == b'\n') else {
                self.partial.extend_from_slice(bytes);
                return;
            };
            self.partial.extend_from_slice(&bytes[..end]);
            let entry = std::mem::take(&mut self.partial);
            self.entry(&entry, shown);
            bytes = &bytes[end + 1..];
        }
        while let Some(end) = bytes.iter().position(|byte| *byte == b'\n') {
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
    let mut parts = line.splitn(4, |byte| *byte == b' ');
    let (stamp, _, tag) = (parts.next()?, parts.next()?, parts.next()?);
    Some(Entry { stamp, whole: tag != b"P", text: parts.next().unwrap_or_default() })
}

/// Where a log is read. It survives rotation.
#[derive(Debug)]
pub struct LogReader {
    path: PathBuf,
    file: Option<File>,
    inode: u64,
    offset: u64,
}

impl LogReader {
    /// A reader that begins with the oldest file of the log at `path`.
    #[must_use]
    pub fn new(path: PathBuf) -> Self {
        Self { path, file: None, inode: 0, offset: 0 }
    }

    /// The log's current file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Reads the next piece; none at the log's end, for now.
    ///
    /// # Errors
    /// When a file that is there cannot be read.
    pub fn read(&mut self) -> io::Result<Option<Vec<u8>>> {
        // Once around each file at the most: rotation cannot keep it from an end.
        for _ in 0..=FILES_MOST {
            if let Some(bytes) = self.read_here()? {
                return Ok(Some(bytes));
            }
            // The end of this file: a newer one follows when it was moved away.
            let Some((file, inode)) = self.open_next()? else { return Ok(None) };
            // What was written between the last read and the rotation comes first.
            if let Some(bytes) = self.read_here()? {
                return Ok(Some(bytes));
            }
            (self.file, self.inode, self.offset) = (Some(file), inode, 0);
        }
        Ok(None)
    }

    fn read_here(&mut self) -> io::Result<Option<Vec<u8>>> {
        let Some(file) = &mut self.file else { return Ok(None) };
        // A file that could not be moved away was emptied.
        if file.metadata()?.len() < self.offset {
            file.seek(SeekFrom::Start(0))?;
            self.offset = 0;
        }
        let mut bytes = Vec::with_capacity(READ_BYTES);
        file.take(READ_BYTES as u64).read_to_end(&mut bytes)?;
        self.offset += bytes.len() as u64;
        Ok((!bytes.is_empty()).then_some(bytes))
    }

    /// The file that follows, with its inode; none when there is none yet.
    fn open_next(&self) -> io::Result<Option<(File, u64)>> {
        for _ in 0..TRIES {
            let Some((path, _)) = self.next()? else { return Ok(None) };
            let file = match File::open(path) {
                Ok(file) => file,
                // It has just been moved.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(error),
            };
            let inode = file.metadata()?.ino();
            // Another one has its name when a rotation came between.
            if self.next()?.is_some_and(|(_, next)| next == inode) {
                return Ok(Some((file, inode)));
            }
        }
        Ok(None)
    }

    /// Where the file that follows the one that is read is now, and its inode: the oldest at the beginning, and when ours
    /// has been removed. Files are looked for from the newest on, and move the same way in a rotation, the oldest first: so
    /// none is passed over.
    fn next(&self) -> io::Result<Option<(PathBuf, u64)>> {
        let mut newer = None;
        let mut missing = 0;
        for n in 0..FILES_MOST {
            let path = self.numbered(n);
            match std::fs::metadata(&path) {
                Ok(found) if self.file.is_some() && found.ino() == self.inode => return Ok(newer),
                Ok(found) => (newer, missing) = (Some((path, found.ino())), 0),
                // One is missing during a rotation, and after it the newest, which is made with the next line.
                Err(error) if error.kind() == io::ErrorKind::NotFound && missing < 2 => missing += 1,
                Err(error) if error.kind() == io::ErrorKind::NotFound => break,
                Err(error) => return Err(error),
            }
        }
        Ok(newer)
    }

    fn numbered(&self, n: u32) -> PathBuf {
        if n == 0 { self.path.clone() } else { PathBuf::from(format!("{}.{n}", self.path.display())) }
    }
}

/// How many whole lines the log has now.
///
/// # Errors
/// When a file that is there cannot be read.
pub fn count_lines(path: &Path) -> io::Result<u64> {
    let mut reader = LogReader::new(path.to_owned());
    // An entry longer than what is kept of it here is a part of a line, and its tag stands at the beginning.
    let (mut lines, mut head) = (0, Vec::with_capacity(HEAD_BYTES));
    while let Some(bytes) = reader.read()? {
        for byte in bytes {
            if byte == b'\n' {
                lines += u64::from(parse(&head).is_some_and(|entry| entry.whole));
                head.clear();
            } else if head.len() < HEAD_BYTES {
                head.push(byte);
            }
        }
    }
    Ok(lines)
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
                formatter.take(&bytes, &mut shown);
            }
        }
        let wanted: String = (0..750).map(|n| format!("line {n}\n")).collect();
        assert_eq!(String::from_utf8(shown).unwrap(), wanted);
        assert!(dir.path().join("0.log.3").exists());
        // A new reader begins with the oldest.
        assert_eq!(count_lines(&path).unwrap(), 750);
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
                    formatter.take(&bytes, &mut shown);
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
        assert_eq!(count_lines(&path).unwrap(), 2);
    }
}
