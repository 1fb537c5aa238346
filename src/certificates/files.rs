//! Certificate files that somebody else renews: read again when they change.
//!
//! [`follow`] never ends; it is to be spawned where `--tls-cert-file` and `--tls-private-key-file` are given.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use super::pair::{self, CertificateError};
use super::serving::Serving;

/// Between two looks: kubelet's own (dynamiccertificates, FileRefreshDuration, 1 min). A watch would not see another
/// host's write on a shared file system.
const LOOK_EVERY: Duration = Duration::from_secs(60);

/// What tells two versions of a file apart: device, inode, length and time of change; `None` where there is no file.
type Version = Option<(u64, u64, u64, i64, i64)>;

fn version(path: &Path) -> Version {
    let found = std::fs::metadata(path).ok()?;
    Some((found.dev(), found.ino(), found.len(), found.mtime(), found.mtime_nsec()))
}

/// A certificate's file and its key's, as last read.
#[derive(Debug)]
pub struct Files {
    certificate: PathBuf,
    key: PathBuf,
    seen: (Version, Version),
}

impl Files {
    /// Reads both.
    ///
    /// # Errors
    /// As [`pair::from_files`].
    pub fn open(
        certificate: &Path,
        key: &Path,
    ) -> Result<(Self, rustls::sign::CertifiedKey), CertificateError> {
        // The versions before the content: a file that changes in between is then read once more.
        let seen = (version(certificate), version(key));
        let pair = pair::from_files(certificate, key)?;
        Ok((Self { certificate: certificate.to_owned(), key: key.to_owned(), seen }, pair))
    }

    /// Reads both again if one has changed. A pair of which only one half is new yet does not fit, and is said once:
    /// the next change is looked at again.
    fn look(&mut self, serving: &Serving) {
        let now = (version(&self.certificate), version(&self.key));
        if now == self.seen {
            return;
        }
        self.seen = now;
        match pair::from_files(&self.certificate, &self.key) {
            Ok(next) => {
                tracing::info!(file = %self.certificate.display(), "the serving certificate was read again");
                serving.swap(next);
            }
            Err(error) => {
                tracing::warn!(%error, "the serving certificate has changed and is no good; the last one stays")
            }
        }
    }
}

/// Looks at the files once a minute, for ever.
pub async fn follow(mut files: Files, serving: Arc<Serving>) {
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        let serving = Arc::clone(&serving);
        // A file system that hangs must hold up nobody else.
        let looked = tokio::task::spawn_blocking(move || {
            files.look(&serving);
            files
        });
        let Ok(back) = looked.await else { return };
        files = back;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(dir: &Path, name: &str) -> Vec<u8> {
        let made = rcgen::generate_simple_self_signed([name.to_owned()]).unwrap();
        crate::files::write_atomic(&dir.join("tls.crt"), made.cert.pem().as_bytes(), 0o644).unwrap();
        let key = made.signing_key.serialize_pem();
        crate::files::write_atomic(&dir.join("tls.key"), key.as_bytes(), 0o600).unwrap();
        made.cert.der().to_vec()
    }

    #[test]
    fn changed_files_are_read_again_and_bad_ones_change_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let (cert, key) = (dir.path().join("tls.crt"), dir.path().join("tls.key"));
        let first = write(dir.path(), "one");
        let (mut files, pair) = Files::open(&cert, &key).unwrap();
        let serving = Serving::new(pair);
        files.look(&serving);
        assert_eq!(serving.current().cert[0].as_ref(), first);
        let second = write(dir.path(), "two");
        files.look(&serving);
        assert_eq!(serving.current().cert[0].as_ref(), second);
        // One half of a new pair: the old pair serves until the other half is there.
        let before = std::fs::read(&key).unwrap();
        let third = write(dir.path(), "three");
        let new_key = std::fs::read(&key).unwrap();
        crate::files::write_atomic(&key, &before, 0o600).unwrap();
        files.look(&serving);
        assert_eq!(serving.current().cert[0].as_ref(), second);
        crate::files::write_atomic(&key, &new_key, 0o600).unwrap();
        files.look(&serving);
        assert_eq!(serving.current().cert[0].as_ref(), third);
        std::fs::remove_file(&cert).unwrap();
        files.look(&serving);
        assert_eq!(serving.current().cert[0].as_ref(), third);
    }
}
