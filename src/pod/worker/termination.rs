//! What a container leaves as its last word: its termination message, or the end of its log.
//!
//! Sources: `getTerminationMessage` and `readLastStringFromContainerLogs` (kuberuntime_container.go), the limits
//! (pkg/kubelet/container/runtime.go).

use std::fs::{self, OpenOptions};
use std::io::{Read as _, Seek as _, SeekFrom};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use k8s_openapi::api::core::v1::Container;
use nix::fcntl::OFlag;

use crate::container::log_reader::{Formatter, LogOptions, LogReader};
use crate::files;
use crate::pod::context::on_disk;

/// The file in a container's directory that is its termination message, wherever `terminationMessagePath` is: a
/// container without a view of its own cannot have one at `/dev/termination-log`.
pub const FILE: &str = "termination-log";

/// Most of a message (MaxContainerTerminationMessageLength): its end.
const MESSAGE_BYTES: u64 = 4096;

/// Most lines of a log in its place (MaxContainerTerminationMessageLogLines).
const LOG_LINES: u64 = 80;

/// Most bytes of a log in its place (MaxContainerTerminationMessageLogLength): its end.
const LOG_BYTES: usize = 2048;

/// A container's end is not held up by a file system that does not answer.
const READ_LIMIT: Duration = Duration::from_secs(2);

/// Where a container's last word is looked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LastWord {
    /// The first that is there counts.
    files: Vec<PathBuf>,
    /// The log that counts where the files say nothing and the container failed (`FallbackToLogsOnError`).
    log: Option<PathBuf>,
    /// Of an isolated pod: the directory, by name, beneath which all of that must lie. It may have put links there.
    owner: Option<String>,
}

impl LastWord {
    /// Where to look for that of a run whose directory is `directory` and whose log is `log`.
    #[must_use]
    pub fn of(container: &Container, directory: &Path, log: PathBuf) -> Self {
        let mut files = vec![directory.join(FILE)];
        // A volume's files are beneath the container's directory too, so a message in one is at its path there.
        let path = container.termination_message_path.as_deref().unwrap_or_default();
        let inner: PathBuf =
            Path::new(path).components().filter(|part| *part != Component::RootDir).collect();
        let plain = inner.components().all(|part| matches!(part, Component::Normal(_)));
        if plain && !inner.as_os_str().is_empty() {
            files.push(directory.join(inner));
        }
        let falls_back = container.termination_message_policy.as_deref() == Some("FallbackToLogsOnError");
        Self { files, log: falls_back.then_some(log), owner: None }
    }

    /// Reads and removes only what lies beneath a directory of this name.
    #[must_use]
    pub fn owned_by(self, owner: Option<String>) -> Self {
        Self { owner, ..self }
    }

    /// Forgets what an earlier run has left.
    pub async fn clear(&self) {
        let Self { files, owner, .. } = self.clone();
        let is_ours = move |file: &&PathBuf| files::leads_into(file, owner.as_deref());
        let removal =
            on_disk(move || files.iter().filter(is_ours).for_each(|file| drop(fs::remove_file(file))));
        let _ = tokio::time::timeout(READ_LIMIT, removal).await;
    }

    /// Reads it, after an end with `exit_code`; nothing where there is none, or none that can be read in time.
    pub async fn read(self, exit_code: i32) -> String {
        let reading = tokio::time::timeout(READ_LIMIT, on_disk(move || self.read_now(exit_code)));
        reading.await.ok().and_then(Result::ok).unwrap_or_default()
    }

    fn read_now(&self, exit_code: i32) -> String {
        let owner = self.owner.as_deref();
        let message = self.files.iter().find_map(|file| message(file, owner)).unwrap_or_default();
        match &self.log {
            Some(log) if message.is_empty() && exit_code != 0 => end_of_log(log, self.owner.clone()),
            _ => message,
        }
    }
}

/// The end of a file. A container may have put anything there: what is no regular file is none, and is not waited for.
fn message(path: &Path, owner: Option<&str>) -> Option<String> {
    let mut file = OpenOptions::new().read(true).custom_flags(OFlag::O_NONBLOCK.bits()).open(path).ok()?;
    let found = file.metadata().ok().filter(fs::Metadata::is_file)?;
    if !files::lies_in(&file, owner) {
        return None;
    }
    let begin = found.len().saturating_sub(MESSAGE_BYTES);
    file.seek(SeekFrom::Start(begin)).ok()?;
    let mut bytes = Vec::new();
    file.take(MESSAGE_BYTES).read_to_end(&mut bytes).ok()?;
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

fn end_of_log(path: &Path, owner: Option<String>) -> String {
    let reader = LogReader::new(path.to_owned()).owned_by(owner);
    let Ok((mut reader, skip)) = reader.at_tail(LOG_LINES) else { return String::new() };
    let mut formatter = Formatter::new(&LogOptions::default(), skip);
    let mut shown = Vec::new();
    while let Ok(Some(bytes)) = reader.read() {
        formatter.take(bytes, &mut shown);
        // The lines may be long: no more is kept than will be shown.
        let surplus = shown.len().saturating_sub(LOG_BYTES);
        shown.drain(..surplus);
    }
    String::from_utf8_lossy(&shown).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn container(policy: &str, path: &str) -> Container {
        Container {
            termination_message_path: Some(path.to_owned()),
            termination_message_policy: Some(policy.to_owned()),
            ..Container::default()
        }
    }

    fn entry(line: &str) -> String {
        format!("2026-01-01T00:00:00.000000000Z stdout F {line}\n")
    }

    #[tokio::test]
    async fn the_file_is_the_message_and_the_log_stands_in_only_for_a_failure() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.log");
        fs::write(&path, (0..100).map(|n| entry(&format!("line {n}"))).collect::<String>()).unwrap();
        let word =
            |policy| LastWord::of(&container(policy, "/dev/termination-log"), dir.path(), path.clone());
        let (file, fallback) = (|| word("File"), || word("FallbackToLogsOnError"));
        assert_eq!(file().read(7).await, "");
        assert_eq!(fallback().read(0).await, "");
        let wanted: String = (20..100).map(|n| format!("line {n}\n")).collect();
        assert_eq!(fallback().read(7).await, wanted);

        fs::write(dir.path().join(FILE), "x".repeat(5000) + "the end").unwrap();
        let message = fallback().read(7).await;
        assert_eq!(message.len(), 4096);
        assert!(message.ends_with("xthe end"));
        file().clear().await;
        assert_eq!(file().read(7).await, "");
    }

    #[tokio::test]
    async fn a_message_in_a_volume_is_found_and_nothing_outside() {
        let dir = tempfile::tempdir().unwrap();
        let own = dir.path().join("c");
        fs::create_dir_all(own.join("data")).unwrap();
        fs::write(own.join("data/word"), "bye").unwrap();
        fs::write(dir.path().join("outside"), "secret").unwrap();
        let read = |path: &str| LastWord::of(&container("File", path), &own, PathBuf::new()).read(0);
        assert_eq!(read("/data/word").await, "bye");
        assert_eq!(read("/../outside").await, "");
        assert_eq!(read("").await, "");
        // Neither a directory nor a pipe that nobody writes to holds anybody up.
        assert_eq!(read("/data").await, "");
        nix::unistd::mkfifo(&own.join("pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert_eq!(read("/pipe").await, "");
    }

    #[tokio::test]
    async fn of_long_lines_the_end_is_shown() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.log");
        let part = entry(&"y".repeat(16_000)).replace(" F ", " P ");
        fs::write(&path, part.repeat(6) + &entry("") + &entry("last")).unwrap();
        let word = LastWord::of(&container("FallbackToLogsOnError", ""), dir.path(), path);
        let message = word.read(1).await;
        assert_eq!(message.len(), 2048);
        assert!(message.ends_with("y\nlast\n"));
    }
}
