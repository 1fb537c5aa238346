//! `fileKeyRef`: variables from files that another container of the pod wrote into an emptyDir.
//!
//! Sources: kubelet's `util/env/env_util.go` (the files' form), `kubelet_pods.go`, makeEnvironmentVariables.

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::io::{self, Read as _};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;

use k8s_openapi::api::core::v1::Container;

use super::ConfigError;

/// More than all variables of a process may be on most systems (2 MiB with its arguments, execve(2)).
const MOST_BYTES: u64 = 1 << 20;

/// Longest line of such a file (Go's bufio.MaxScanTokenSize).
const LINE_BYTES: usize = 64 * 1024;

/// How long a file may take to be read. A file system that hangs holds the container up, and nobody else.
const LIMIT: Duration = Duration::from_millis(500);

/// What was read for the `fileKeyRef`s of one container: a file's text, or why there is none.
#[derive(Clone, Default)]
pub struct EnvFiles(BTreeMap<(String, String), Result<String, String>>);

impl EnvFiles {
    /// Reads the files that a container names; `volume` says where a volume is. Most containers name none, and cost nothing.
    pub fn read(container: &Container, volume: impl Fn(&str) -> PathBuf) -> Self {
        let sources = container.env.iter().flatten().filter_map(|var| var.value_from.as_ref());
        let wanted: BTreeMap<_, _> = sources
            .filter_map(|source| source.file_key_ref.as_ref())
            .map(|file| ((file.volume_name.clone(), file.path.clone()), volume(&file.volume_name)))
            .collect();
        if wanted.is_empty() {
            return Self::default();
        }
        // In a thread of its own, which is left behind where the file system hangs.
        let (read_tx, read) = mpsc::channel();
        std::thread::spawn(move || {
            for (key, volume) in wanted {
                let text = read_file(&volume, Path::new(&key.1));
                let text = text.map_err(|error| format!("{}: {error}", volume.join(&key.1).display()));
                if read_tx.send((key, text)).is_err() {
                    return;
                }
            }
        });
        let mut files = BTreeMap::new();
        // What is not there in time is missed below, and tried again with the container.
        while let Ok((key, text)) = read.recv_timeout(LIMIT) {
            files.insert(key, text);
        }
        Self(files)
    }

    /// The value of a key; none where it is optional and not there.
    pub(super) fn value(
        &self,
        volume: &str,
        path: &str,
        key: &str,
        optional: bool,
    ) -> Result<Option<String>, ConfigError> {
        let late =
            || Err(format!("volume {volume:?}, {path:?} was not read within {} ms", LIMIT.as_millis()));
        let text = self.0.get(&(volume.to_owned(), path.to_owned())).cloned().unwrap_or_else(late);
        let found = text.and_then(|text| parse(&text, key)).map_err(ConfigError::EnvFile)?;
        // An empty value is none, as at a kubelet.
        match found.filter(|value| !value.is_empty()) {
            None if !optional => {
                Err(ConfigError::EnvFileKey { key: key.to_owned(), file: format!("{volume}/{path}") })
            }
            found => Ok(found),
        }
    }
}

/// A regular file within the volume, links within it followed.
fn read_file(volume: &Path, path: &Path) -> io::Result<String> {
    let volume = fs::canonicalize(volume)?;
    let file = fs::canonicalize(volume.join(path))?;
    if !file.starts_with(&volume) {
        return Err(io::Error::other("it leads out of its volume"));
    }
    // A pipe that nobody writes to would be waited for.
    let flags = nix::fcntl::OFlag::O_NONBLOCK | nix::fcntl::OFlag::O_NOFOLLOW;
    let file = OpenOptions::new().read(true).custom_flags(flags.bits()).open(file)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("it is no regular file"));
    }
    let mut bytes = Vec::new();
    file.take(MOST_BYTES + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MOST_BYTES {
        return Err(io::Error::other(format!("it is larger than {MOST_BYTES} bytes")));
    }
    String::from_utf8(bytes).map_err(|_| io::Error::other("it is not UTF-8 text"))
}

const BLANKS: [char; 2] = [' ', '\t'];

/// The value of `key` in the text of a file; what comes after it is not looked at.
///
/// Lines are `NAME='value'`: a value may go over several lines, knows no escapes, and only a comment may follow it.
fn parse(text: &str, key: &str) -> Result<Option<String>, String> {
    let bad = |line: usize, problem: &str| {
        Err(format!("invalid environment variable format at line {line}: {problem}"))
    };
    let mut lines = text.lines().enumerate().map(|(at, line)| (at + 1, line));
    while let Some((number, line)) = lines.next() {
        let line = short(number, line)?.trim_start_matches(BLANKS);
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let Some((name, value)) = line.split_once('=') else { return bad(number, "missing '='") };
        if name.trim_end_matches(BLANKS).is_empty() {
            return bad(number, "empty variable name");
        }
        if name.ends_with(BLANKS) {
            return bad(number, "whitespace before '=' is not allowed");
        }
        if value.starts_with(BLANKS) {
            // A shell takes that for an empty value.
            if name == key {
                return Ok(Some(String::new()));
            }
            continue;
        }
        let Some(mut rest) = value.strip_prefix('\'') else {
            return bad(number, "value must be enclosed in single quotes");
        };
        let mut whole = String::new();
        let mut at = number;
        let after = loop {
            if let Some((end, after)) = rest.split_once('\'') {
                whole.push_str(end);
                break after.trim_start_matches(BLANKS);
            }
            whole.push_str(rest);
            whole.push('\n');
            let Some((next, line)) = lines.next() else {
                return Err(format!(
                    "invalid environment variable format starting at line {number}: unclosed single quote"
                ));
            };
            (at, rest) = (next, short(next, line)?);
        };
        if !after.is_empty() && !after.starts_with('#') {
            return bad(at, "unexpected content after closing quote");
        }
        if name == key {
            return Ok(Some(whole));
        }
    }
    Ok(None)
}

fn short(number: usize, line: &str) -> Result<&str, String> {
    if line.len() < LINE_BYTES {
        Ok(line)
    } else {
        Err(format!("line {number} is longer than {LINE_BYTES} bytes"))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{from_value, json};

    use super::*;

    /// The cases of env_util_test.go, and what a shell would make of them.
    #[test]
    fn files_are_read_as_a_kubelet_reads_them() {
        type Wanted = Result<Option<&'static str>, &'static str>;
        let table: [(&str, &str, Wanted); 26] = [
            ("   K='v1'\n\t\tL='v2'\nM='v3'\n", "L", Ok(Some("v2"))),
            ("# c\n\nK='foo'\n   # d\n \t\nL='bar'\n", "L", Ok(Some("bar"))),
            ("K = 'v1'\nL='v2'\n", "L", Err("at line 1: whitespace before '=' is not allowed")),
            ("K='foo'\n", "L", Ok(None)),
            ("K='foo#no'\n", "K", Ok(Some("foo#no"))),
            ("K ='foo'\n", "K", Err("whitespace before")),
            ("K='   foo bar   '\n", "K", Ok(Some("   foo bar   "))),
            ("K=''\n", "K", Ok(Some(""))),
            ("='foo'\nK='x'", "K", Err("at line 1: empty variable name")),
            ("K='a=b=c'\n", "K", Ok(Some("a=b=c"))),
            ("K='a'\nL='b' # c\n", "L", Ok(Some("b"))),
            ("K='$V ${V} $(V)'", "K", Ok(Some("$V ${V} $(V)"))),
            ("K='a'\nBAD\nL='b'\n", "L", Err("at line 2: missing '='")),
            ("K='a'\nL=bar\n", "L", Err("at line 2: value must be enclosed in single quotes")),
            ("K=\"a\"\n", "K", Err("single quotes")),
            ("K='a''b'", "K", Err("unexpected content after closing quote")),
            ("K='a'\nL='bar\nM='c'\n", "L", Err("at line 3: unexpected content")),
            ("K='a'x", "K", Err("unexpected content")),
            (r"K='a\nb\t\'", "K", Ok(Some(r"a\nb\t\"))),
            ("K='one\n  two\n\nthree'\nL='x'\n", "K", Ok(Some("one\n  two\n\nthree"))),
            ("K='one\ntwo'\nL='x'\n", "L", Ok(Some("x"))),
            ("L='x\ny", "L", Err("starting at line 1: unclosed single quote")),
            ("K=  'v'\nL='x'\n", "K", Ok(Some(""))),
            ("K=  v\nL='x'\n", "L", Ok(Some("x"))),
            ("K='a'\r\nL='b'\r\n", "L", Ok(Some("b"))),
            // The rest is not looked at.
            ("K='a'\nBAD\n", "K", Ok(Some("a"))),
        ];
        for (text, key, wanted) in table {
            let got = parse(text, key);
            match wanted {
                Ok(value) => assert_eq!(got, Ok(value.map(str::to_owned)), "{text:?}"),
                Err(word) => assert!(got.clone().unwrap_err().contains(word), "{text:?}: {got:?}"),
            }
        }
        assert!(parse(&format!("K='{}'", "x".repeat(LINE_BYTES)), "K").unwrap_err().contains("longer"));
    }

    #[test]
    fn only_files_of_the_volume_are_read() {
        let root = tempfile::tempdir().unwrap();
        let volume = root.path().join("v");
        fs::create_dir(&volume).unwrap();
        fs::write(volume.join("env"), "K='v'\nE=''\n").unwrap();
        fs::write(root.path().join("out"), "K='secret'\n").unwrap();
        std::os::unix::fs::symlink("env", volume.join("in")).unwrap();
        std::os::unix::fs::symlink("../out", volume.join("out")).unwrap();
        nix::unistd::mkfifo(&volume.join("pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        let file = fs::File::create(volume.join("large")).unwrap();
        file.set_len(MOST_BYTES + 1).unwrap();
        let key = |path: &str| json!({"name": path, "valueFrom": {"fileKeyRef": {"volumeName": "v", "path": path, "key": "K"}}});
        let names = ["env", "in", "out", "pipe", "large", "none", "."];
        let env: Vec<_> = names.iter().map(|path| key(path)).collect();
        let container: Container = from_value(json!({"name": "c", "env": env})).unwrap();
        let files = EnvFiles::read(&container, |name| root.path().join(name));
        let value = |path: &str, key: &str, optional| files.value("v", path, key, optional);
        let found = Ok(Some("v".to_owned()));
        assert_eq!([value("env", "K", false), value("in", "K", true)], [found.clone(), found]);
        assert_eq!([value("env", "none", true), value("env", "E", true)], [Ok(None), Ok(None)]);
        let missing = value("env", "E", false).unwrap_err().to_string();
        assert_eq!(missing, "environment variable key \"E\" not found in file \"v/env\"");
        for (path, word) in [
            ("out", "out of its volume"),
            ("pipe", "no regular file"),
            ("large", "larger"),
            ("none", "No such file"),
            (".", "no regular file"),
            ("unread", "was not read"),
        ] {
            // Optional is about the key: a file that cannot be read is an error all the same.
            let error = value(path, "K", true).unwrap_err().to_string();
            assert!(error.starts_with("couldn't parse env file") && error.contains(word), "{error}");
        }
    }
}
