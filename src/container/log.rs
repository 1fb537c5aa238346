//! A container's log: CRI's format, rotated, written by a thread of its own so that a file system that is full or hangs
//! never holds the container up. What cannot be written is dropped and counted.
//!
//! Format: `<RFC 3339 with nanoseconds, UTC> stdout|stderr F|P <text>`; P marks a part of a line: one that is longer than
//! 16 KiB, or what has no line end at the output's end
//! (kubelet's design-proposals/node/kubelet-cri-logging.md; containerd's default of max_container_log_line_size).

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use serde::{Deserialize, Serialize};

use crate::files;

/// Longest line in one entry.
const LINE_BYTES: usize = 16 * 1024;

/// What may wait for the writer: enough for a burst, little enough for hundreds of containers.
const QUEUE_BYTES: usize = 256 * 1024;

/// One write(2): progress is seen that often.
const PIECE_BYTES: usize = 64 * 1024;

/// Runs of a container whose logs are kept beside each other. A kubelet keeps one beside the current
/// (MaximumDeadContainersPerContainer); a few more cost little, and say how a crash loop began to change.
const RUNS: u32 = 5;

/// A writer without progress for so long is hung.
const HUNG: Duration = Duration::from_secs(1);

/// The writer's stack: it calls nothing deep.
const STACK_BYTES: usize = 64 * 1024;

/// How large a log grows and how many of it are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogLimits {
    /// Bytes of one file.
    pub bytes: u64,
    /// Files in all.
    pub files: u32,
}

impl Default for LogLimits {
    /// kubelet's own: containerLogMaxSize 10Mi, containerLogMaxFiles 5.
    fn default() -> Self {
        Self { bytes: 10 << 20, files: 5 }
    }
}

/// Which of a container's outputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Output {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

impl Output {
    fn name(self) -> &'static str {
        match self {
            Self::Stdout => "stdout",
            Self::Stderr => "stderr",
        }
    }
}

#[derive(Default)]
struct Queue {
    /// Whole entries that wait.
    entries: Vec<u8>,
    /// How many entries are being written.
    writing: u64,
    closed: bool,
    idle: bool,
    progress: Option<Instant>,
    lost: u64,
    error: Option<String>,
}

#[derive(Default)]
struct Shared {
    queue: Mutex<Queue>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        // A writer that panicked aborts the process, so a poisoned lock still holds good data.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The log of one run of a container.
pub struct Log {
    path: PathBuf,
    owner: Option<String>,
    limits: LogLimits,
    shared: Arc<Shared>,
    writing: bool,
    partial: [Vec<u8>; 2],
}

/// What became of the log.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LogResult {
    /// Lines that were not written.
    pub lost: u64,
    /// Why.
    pub error: Option<String>,
}

impl Log {
    /// A log at `path`; nothing is opened before the first output.
    #[must_use]
    pub fn new(path: PathBuf, limits: LogLimits) -> Self {
        Self {
            path,
            owner: None,
            limits,
            shared: Arc::default(),
            writing: false,
            partial: [Vec::new(), Vec::new()],
        }
    }

    /// Writes only beneath a directory of this name, whatever links the container has put in the log's way.
    #[must_use]
    pub fn owned_by(self, owner: Option<String>) -> Self {
        Self { owner, ..self }
    }

    /// Whether more output should be read now. False while the writer is busy, but true again when it hangs: the output
    /// is dropped then.
    #[must_use]
    pub fn has_room(&self) -> bool {
        let queue = self.shared.lock();
        queue.entries.len() < QUEUE_BYTES || hung(&queue)
    }

    /// Takes output. `line` is called for each line that is complete.
    pub fn take(&mut self, output: Output, bytes: &[u8], mut line: impl FnMut(&[u8])) {
        let stamp = now();
        let mut entries = Vec::new();
        let mut lines = 0;
        let partial = &mut self.partial[output as usize];
        for piece in bytes.split_inclusive(|byte| *byte == b'\n') {
            partial.extend_from_slice(piece);
            // The line's end is no part of the line.
            while partial.strip_suffix(b"\n").unwrap_or(partial).len() > LINE_BYTES {
                entry(&mut entries, &stamp, output, 'P', &partial[..LINE_BYTES]);
                line(&partial[..LINE_BYTES]);
                lines += 1;
                partial.drain(..LINE_BYTES);
            }
            if partial.last() == Some(&b'\n') {
                partial.pop();
                entry(&mut entries, &stamp, output, 'F', partial);
                line(partial);
                lines += 1;
                partial.clear();
            }
        }
        self.push(&entries, lines);
    }

    /// Takes what stands without a line end at an output's end.
    pub fn close(&mut self, output: Output, mut line: impl FnMut(&[u8])) {
        let partial = std::mem::take(&mut self.partial[output as usize]);
        if !partial.is_empty() {
            let mut entries = Vec::new();
            // As a container runtime marks it: whoever reads the log adds no line end that the container never wrote.
            entry(&mut entries, &now(), output, 'P', &partial);
            line(&partial);
            self.push(&entries, 1);
        }
    }

    fn push(&mut self, entries: &[u8], lines: u64) {
        if entries.is_empty() {
            return;
        }
        if !self.writing {
            self.start_writer();
        }
        let mut queue = self.shared.lock();
        if queue.entries.len() >= QUEUE_BYTES && hung(&queue) || !self.writing {
            queue.lost += lines;
            queue.error.get_or_insert_with(|| "the file system does not answer".to_owned());
        } else {
            queue.entries.extend_from_slice(entries);
            queue.idle = false;
            queue.progress.get_or_insert_with(Instant::now);
            self.shared.changed.notify_all();
        }
    }

    fn start_writer(&mut self) {
        let (path, owner) = (self.path.clone(), self.owner.clone());
        let (limits, shared) = (self.limits, Arc::clone(&self.shared));
        let thread = std::thread::Builder::new().name("log".to_owned()).stack_size(STACK_BYTES);
        match thread
            .spawn(move || write_all(&shared, &mut Files { path, owner, limits, file: None, size: 0 }))
        {
            Ok(_) => self.writing = true,
            Err(error) => self.shared.lock().error = Some(error.to_string()),
        }
    }

    /// Waits until all is written, at most `limit`, and says what was lost.
    #[must_use]
    pub fn finish(&mut self, limit: Duration) -> LogResult {
        let end = Instant::now() + limit;
        let mut queue = self.shared.lock();
        queue.closed = true;
        self.shared.changed.notify_all();
        while self.writing && !queue.idle {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                queue.lost += queue.writing + count(&queue.entries);
                queue.error.get_or_insert_with(|| "the file system does not answer".to_owned());
                break;
            }
            queue = self.shared.changed.wait_timeout(queue, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        LogResult { lost: queue.lost, error: queue.error.clone() }
    }
}

fn hung(queue: &Queue) -> bool {
    queue.progress.is_some_and(|since| since.elapsed() > HUNG)
}

fn now() -> String {
    jiff::Timestamp::try_from(SystemTime::now()).map_or_else(|_| String::new(), |t| format!("{t:.9}"))
}

fn entry(entries: &mut Vec<u8>, stamp: &str, output: Output, tag: char, text: &[u8]) {
    let _ = write!(entries, "{stamp} {} {tag} ", output.name());
    entries.extend_from_slice(text);
    entries.push(b'\n');
}

fn write_all(shared: &Shared, files: &mut Files) {
    let mut told = 0;
    loop {
        let mut queue = shared.lock();
        while queue.entries.is_empty() {
            queue.idle = true;
            queue.progress = None;
            shared.changed.notify_all();
            if queue.closed {
                return;
            }
            queue = shared.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
        queue.idle = false;
        queue.progress = Some(Instant::now());
        let size = whole_entries(&queue.entries, PIECE_BYTES);
        let rest = queue.entries.split_off(size);
        let entries = std::mem::replace(&mut queue.entries, rest);
        let lines = count(&entries);
        queue.writing = lines;
        let (lost, error) = (queue.lost, queue.error.clone());
        drop(queue);
        let mut result = Ok(());
        if lost > told {
            let mut notice = Vec::new();
            let text = format!("[jiriaf-pilot: {} lines lost: {}]", lost - told, error.unwrap_or_default());
            entry(&mut notice, &now(), Output::Stderr, 'F', text.as_bytes());
            result = files.append(&notice);
            if result.is_ok() {
                told = lost;
            }
        }
        let result = result.and_then(|()| files.append(&entries));
        let mut queue = shared.lock();
        queue.writing = 0;
        if let Err(error) = result {
            queue.lost += lines;
            queue.error = Some(error.to_string());
        }
    }
}

/// The files of a log.
struct Files {
    path: PathBuf,
    owner: Option<String>,
    limits: LogLimits,
    file: Option<File>,
    size: u64,
}

impl Files {
    /// Writes whole entries, into as many files as their size wants.
    fn append(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            if self.file.is_none() {
                let file = open(&self.path, self.owner.as_deref())?;
                let found = file.metadata()?;
                self.size = found.len();
                // A device or a pipe is never moved away: somebody else's it is, and endless.
                if !found.is_file() {
                    self.limits.bytes = u64::MAX;
                }
                self.file = Some(file);
            }
            let left = self.limits.bytes.saturating_sub(self.size);
            let fits = bytes.len() as u64 <= left;
            let first = whole_entries(bytes, usize::try_from(left).unwrap_or(usize::MAX));
            if !fits && self.size > 0 && first as u64 > left {
                self.rotate();
                continue;
            }
            let (now, later) = bytes.split_at(first);
            self.write(now)?;
            bytes = later;
        }
        Ok(())
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        let Some(file) = &mut self.file else { return Ok(()) };
        if let Err(error) = file.write_all(bytes) {
            // Half a line would confuse every reader.
            let _ = file.set_len(self.size);
            self.file = None;
            return Err(error);
        }
        self.size += bytes.len() as u64;
        Ok(())
    }

    /// `n.log` becomes `n.log.1`, that becomes `n.log.2`, and the oldest goes.
    fn rotate(&mut self) {
        let numbered = |n: u32| PathBuf::from(format!("{}.{n}", self.path.display()));
        let ours = files::leads_into(&self.path, self.owner.as_deref());
        for n in (1..self.limits.files.saturating_sub(1)).rev().filter(|_| ours) {
            let _ = fs::rename(numbered(n), numbered(n + 1));
        }
        let moved = ours && self.limits.files > 1 && fs::rename(&self.path, numbered(1)).is_ok();
        // What cannot be moved is emptied: a log must not outgrow its limit.
        if !moved && let Some(file) = &self.file {
            let _ = file.set_len(0);
        }
        self.file = None;
        self.size = 0;
    }
}

/// Entries end with a line end and hold no other.
fn count(entries: &[u8]) -> u64 {
    entries.iter().filter(|byte| **byte == b'\n').count() as u64
}

/// How many bytes of `entries` come to at most `limit` without cutting an entry; at least one entry.
fn whole_entries(entries: &[u8], limit: usize) -> usize {
    if entries.len() <= limit {
        return entries.len();
    }
    let within = entries.get(..limit).and_then(|e| e.iter().rposition(|byte| *byte == b'\n'));
    let end = within.or_else(|| entries.iter().position(|byte| *byte == b'\n'));
    end.map_or(entries.len(), |end| end + 1)
}

/// Opens a log for appending, readable by its owner alone. Its directory is made anew where the container removed it.
///
/// # Errors
/// When it cannot be opened.
pub fn open(path: &Path, owner: Option<&str>) -> io::Result<File> {
    let open = || {
        let file = OpenOptions::new().append(true).create(true).mode(0o600).open(path)?;
        if !files::lies_in(&file, owner) {
            return Err(io::Error::other(format!("{} leads out of the pod's own directory", path.display())));
        }
        Ok(file)
    };
    match open() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            if let Some(parent) = path.parent() {
                DirBuilder::new().mode(0o700).recursive(true).create(parent)?;
            }
            open()
        }
        result => result,
    }
}

/// Removes the log of the run that is [`RUNS`] before the one of this log: each start of a container removes one, so that
/// one that is restarted for days has no more than that many.
pub fn forget_old(path: &Path, files: u32, owner: Option<&str>) {
    if !files::leads_into(path, owner) {
        return;
    }
    let run = path.file_stem().and_then(|stem| stem.to_str()).and_then(|stem| stem.parse::<u32>().ok());
    let Some(old) = run.and_then(|run| run.checked_sub(RUNS)) else { return };
    let old = path.with_file_name(format!("{old}.log"));
    let _ = fs::remove_file(&old);
    for n in 1..files {
        let _ = fs::remove_file(format!("{}.{n}", old.display()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_of_an_owner_is_not_written_through_a_link_to_anothers() {
        let root = tempfile::tempdir().unwrap();
        let others = root.path().join("u-2/logs");
        let ours = root.path().join("u-1/logs");
        fs::create_dir_all(&others).unwrap();
        fs::create_dir_all(ours.parent().unwrap()).unwrap();
        fs::write(others.join("0.log"), "theirs").unwrap();
        fs::write(others.join("7.log"), "").unwrap();
        std::os::unix::fs::symlink(&others, &ours).unwrap();
        let error = open(&ours.join("7.log"), Some("u-1")).unwrap_err();
        assert!(error.to_string().contains("leads out of the pod's own directory"), "{error}");
        forget_old(&ours.join("5.log"), 5, Some("u-1"));
        let mut files = Files {
            path: ours.join("0.log"),
            owner: Some("u-1".to_owned()),
            limits: LogLimits::default(),
            file: None,
            size: 0,
        };
        files.rotate();
        assert!(files.append(b"line\n").is_err());
        assert_eq!(fs::read_to_string(others.join("0.log")).unwrap(), "theirs");
        fs::remove_file(&ours).unwrap();
        assert!(open(&ours.join("7.log"), Some("u-1")).is_ok());
    }

    #[test]
    fn a_container_that_is_restarted_for_days_keeps_the_logs_of_its_last_runs() {
        let dir = tempfile::tempdir().unwrap();
        let log = |run: u32| dir.path().join(format!("{run}.log"));
        for run in 0..12 {
            fs::write(log(run), "x").unwrap();
            fs::write(dir.path().join(format!("{run}.log.1")), "x").unwrap();
            forget_old(&log(run), 5, None);
        }
        let kept: Vec<bool> = (0..12).map(|run| log(run).exists()).collect();
        assert_eq!(kept.iter().filter(|kept| **kept).count(), RUNS as usize);
        assert!(kept[11] && !kept[1] && !dir.path().join("1.log.1").exists());
    }

    fn texts(path: &Path) -> Vec<String> {
        let all = fs::read_to_string(path).unwrap();
        all.lines().map(|line| line.splitn(4, ' ').skip(1).collect::<Vec<_>>().join(" ")).collect()
    }

    #[test]
    fn lines_come_out_in_order_in_cris_format() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.log");
        let mut log = Log::new(path.clone(), LogLimits::default());
        let mut seen = Vec::new();
        log.take(Output::Stdout, b"one\ntw", |l| seen.push(l.to_vec()));
        log.take(Output::Stderr, b"err\n", |l| seen.push(l.to_vec()));
        log.take(Output::Stdout, b"o\nrest", |l| seen.push(l.to_vec()));
        log.close(Output::Stdout, |l| seen.push(l.to_vec()));
        assert_eq!(log.finish(HUNG), LogResult::default());
        assert_eq!(texts(&path), ["stdout F one", "stderr F err", "stdout F two", "stdout P rest"]);
        assert_eq!(seen, [&b"one"[..], b"err", b"two", b"rest"]);
        let first = fs::read_to_string(&path).unwrap();
        let stamp = first.split(' ').next().unwrap();
        assert_eq!(stamp.len(), "2016-10-06T00:17:09.669794202Z".len(), "{stamp}");
    }

    #[test]
    fn a_long_line_comes_in_parts() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.log");
        let mut log = Log::new(path.clone(), LogLimits::default());
        let mut line = vec![b'x'; LINE_BYTES + 10];
        line.push(b'\n');
        log.take(Output::Stdout, &line, |_| {});
        assert_eq!(log.finish(HUNG).lost, 0);
        let got = texts(&path);
        assert_eq!(got.len(), 2);
        assert!(got[0].starts_with("stdout P x") && got[1] == format!("stdout F {}", "x".repeat(10)));
    }

    #[test]
    fn a_line_of_just_the_limit_is_whole() {
        let dir = tempfile::tempdir().unwrap();
        for (length, wanted) in
            [(LINE_BYTES - 1, 1), (LINE_BYTES, 1), (LINE_BYTES + 1, 2), (2 * LINE_BYTES, 2)]
        {
            let mut line = vec![b'x'; length];
            line.push(b'\n');
            for size in [1000, LINE_BYTES, 100_000] {
                let path = dir.path().join(format!("{length}-{size}.log"));
                let mut log = Log::new(path.clone(), LogLimits::default());
                line.chunks(size).for_each(|chunk| log.take(Output::Stdout, chunk, |_| {}));
                assert_eq!(log.finish(HUNG).lost, 0);
                let got = texts(&path);
                assert_eq!(got.len(), wanted, "{length} in chunks of {size}");
                assert!(got.last().unwrap().starts_with("stdout F x"));
            }
        }
    }

    #[test]
    fn rotation_cuts_no_entry_and_no_file_outgrows_its_limit() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("logs/0.log");
        let mut files =
            Files { path, owner: None, limits: LogLimits { bytes: 100, files: 3 }, file: None, size: 0 };
        let all: String = (0..50).map(|n| format!("entry number {n:02}\nshort\n")).collect();
        files.append(all.as_bytes()).unwrap();
        let left: Vec<String> = fs::read_dir(dir.path().join("logs"))
            .unwrap()
            .map(|e| fs::read_to_string(e.unwrap().path()).unwrap())
            .collect();
        assert_eq!(left.len(), 3);
        assert!(left.iter().all(|text| text.len() <= 100 && text.ends_with('\n')), "{left:?}");
        assert!(left.iter().any(|text| text.ends_with("entry number 49\nshort\n")));
    }

    #[test]
    fn after_a_failure_the_log_goes_on_and_says_what_is_missing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.log");
        fs::create_dir(&path).unwrap();
        let mut log = Log::new(path.clone(), LogLimits::default());
        log.take(Output::Stdout, b"a\nb\n", |_| {});
        while !log.shared.lock().idle {
            std::thread::sleep(Duration::from_millis(1));
        }
        fs::remove_dir(&path).unwrap();
        log.take(Output::Stdout, b"c\n", |_| {});
        assert_eq!(log.finish(HUNG).lost, 2);
        let got = texts(&path);
        assert_eq!(got.len(), 2, "{got:?}");
        assert!(got[0].starts_with("stderr F [jiriaf-pilot: 2 lines lost: "), "{got:?}");
        assert_eq!(got[1], "stdout F c");
    }

    #[test]
    fn a_log_is_rotated_and_only_so_many_are_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.log");
        let mut files =
            Files { path, owner: None, limits: LogLimits { bytes: 100, files: 3 }, file: None, size: 0 };
        for n in 0..20 {
            files.append(format!("{n:>40}\n").as_bytes()).unwrap();
        }
        let mut names: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, ["0.log", "0.log.1", "0.log.2"]);
        assert!(fs::read_to_string(dir.path().join("0.log")).unwrap().contains("19"));
    }

    #[test]
    fn what_is_no_file_is_never_moved_away() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("device");
        std::os::unix::fs::symlink("/dev/zero", &path).unwrap();
        let limits = LogLimits { bytes: 10, files: 3 };
        let mut files = Files { path: path.clone(), owner: None, limits, file: None, size: 0 };
        for _ in 0..5 {
            files.append(b"more than ten bytes\n").unwrap();
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn what_a_full_disk_does_not_take_is_counted_and_said() {
        let mut log = Log::new(PathBuf::from("/dev/full"), LogLimits::default());
        log.take(Output::Stdout, b"a\nb\nc\n", |_| {});
        let result = log.finish(Duration::from_secs(5));
        assert_eq!(result.lost, 3);
        assert!(result.error.unwrap().contains("No space left"));
    }
}
