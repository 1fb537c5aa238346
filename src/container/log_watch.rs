//! Tells when a log grows. All followers share one inotify(7) instance, of which a user has 128 by default.

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use tokio::io::AsyncReadExt as _;
use tokio::net::unix::pipe;
use tokio::runtime::Handle;
use tokio::sync::watch;

/// How often a log is looked at where inotify is not to be had (its limits are used up).
const POLL: Duration = Duration::from_millis(40);

/// And where it is: for what it does not tell, such as another host's writes to a shared file system.
const LOOK: Duration = Duration::from_secs(5);

/// How often a watch is added again because others were removed at the same moment; then the log is polled.
const TRIES: u32 = 8;

/// Some hundred events at once.
const EVENTS_BYTES: usize = 16 * 1024;

/// Tells followers when their log's directory changes.
pub struct LogWatch {
    shared: Mutex<Shared>,
    runtime: Handle,
}

#[derive(Default)]
struct Shared {
    inotify: Option<Arc<OwnedFd>>,
    /// By directory.
    watched: HashMap<PathBuf, Weak<Watched>>,
    by_descriptor: HashMap<i32, Weak<Watched>>,
    /// Watches that were removed until now.
    removed: u64,
}

struct Watched {
    descriptor: i32,
    changes: watch::Sender<u64>,
    inotify: Arc<OwnedFd>,
    owner: Weak<LogWatch>,
}

impl Drop for Watched {
    fn drop(&mut self) {
        let Some(owner) = self.owner.upgrade() else { return };
        let mut shared = owner.lock();
        // The kernel gives a directory that is watched the same descriptor again: it may be another's by now.
        let entry = shared.by_descriptor.get(&self.descriptor);
        if entry.is_some_and(|entry| std::ptr::eq(entry.as_ptr(), self)) {
            shared.by_descriptor.remove(&self.descriptor);
            shared.removed += 1;
            // A directory that is gone has no watch any more.
            let _ = inotify::remove_watch(&*self.inotify, self.descriptor);
        }
    }
}

/// One follower's view of a directory.
pub struct LogChanges {
    watched: Option<(Arc<Watched>, watch::Receiver<u64>)>,
}

impl LogWatch {
    fn lock(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// To be called in a tokio runtime.
    #[must_use]
    pub fn new() -> Arc<Self> {
        Arc::new(Self { shared: Mutex::default(), runtime: Handle::current() })
    }

    /// Follows the directory of a log. It may be held up by a file system that hangs.
    pub fn follow(self: &Arc<Self>, directory: &Path) -> LogChanges {
        match self.watched(directory) {
            Ok(watched) => {
                let changes = watched.changes.subscribe();
                LogChanges { watched: Some((watched, changes)) }
            }
            Err(error) => {
                tracing::debug!(%error, path = %directory.display(), "inotify is not to be had; the log is polled");
                LogChanges { watched: None }
            }
        }
    }

    fn watched(self: &Arc<Self>, directory: &Path) -> io::Result<Arc<Watched>> {
        let wanted = WatchFlags::MODIFY | WatchFlags::CREATE | WatchFlags::MOVED_TO;
        for _ in 0..TRIES {
            let removed = {
                let shared = self.lock();
                if let Some(watched) = shared.watched.get(directory).and_then(Weak::upgrade) {
                    return Ok(watched);
                }
                shared.removed
            };
            let inotify = self.inotify()?;
            // Not with the lock held: a file system that hangs must not hold up those who are told.
            let descriptor = inotify::add_watch(&*inotify, directory, wanted)?;
            let mut shared = self.lock();
            if shared.removed != removed {
                // What was removed in between may have been this directory's watch.
                continue;
            }
            // Another follower may have been quicker; the kernel gives both the same watch.
            if let Some(watched) = shared.watched.get(directory).and_then(Weak::upgrade) {
                return Ok(watched);
            }
            let owner = Arc::downgrade(self);
            let watched = Arc::new(Watched { descriptor, changes: watch::Sender::new(0), inotify, owner });
            shared.watched.retain(|_, watched| watched.strong_count() > 0);
            shared.watched.insert(directory.to_owned(), Arc::downgrade(&watched));
            shared.by_descriptor.insert(descriptor, Arc::downgrade(&watched));
            return Ok(watched);
        }
        Err(io::Error::other(format!("watches were removed {TRIES} times while one was to be added")))
    }

    fn inotify(self: &Arc<Self>) -> io::Result<Arc<OwnedFd>> {
        let mut shared = self.lock();
        if let Some(inotify) = &shared.inotify {
            return Ok(Arc::clone(inotify));
        }
        let new = Arc::new(inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC)?);
        let _runtime = self.runtime.enter();
        // It is read as a pipe is.
        let events = pipe::Receiver::from_owned_fd_unchecked(new.try_clone()?)?;
        shared.inotify = Some(Arc::clone(&new));
        self.runtime.spawn(tell(Arc::downgrade(self), events));
        Ok(new)
    }
}

async fn tell(watch: Weak<LogWatch>, mut events: pipe::Receiver) {
    let mut bytes = vec![0; EVENTS_BYTES];
    while let Ok(n) = events.read(&mut bytes).await {
        let Some(watch) = watch.upgrade() else { return };
        let told: Vec<_> = {
            let shared = watch.lock();
            let by_descriptor = |wd| shared.by_descriptor.get(&wd).and_then(Weak::upgrade);
            descriptors(&bytes[..n]).into_iter().filter_map(by_descriptor).collect()
        };
        // Not with the lock held: whoever lets go of the last of one removes it.
        for watched in told {
            watched.changes.send_modify(|n| *n = n.wrapping_add(1));
        }
    }
}

/// The watches that events are of. An event: descriptor, mask, cookie and the length of the name that follows, each of
/// four bytes (inotify(7), struct inotify_event).
fn descriptors(mut bytes: &[u8]) -> Vec<i32> {
    let mut found = Vec::new();
    while let Some((head, rest)) = bytes.split_first_chunk::<16>() {
        let number = |at: usize| [head[at], head[at + 1], head[at + 2], head[at + 3]];
        let descriptor = i32::from_ne_bytes(number(0));
        if found.last() != Some(&descriptor) {
            found.push(descriptor);
        }
        let name = usize::try_from(u32::from_ne_bytes(number(12))).unwrap_or(usize::MAX);
        bytes = rest.get(name..).unwrap_or_default();
    }
    found
}

impl LogChanges {
    /// Waits until the log may have grown; cancel safe.
    pub async fn changed(&mut self) {
        let Some((_, changes)) = &mut self.watched else {
            tokio::time::sleep(POLL).await;
            return;
        };
        let _ = tokio::time::timeout(LOOK, changes.changed()).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn followers_of_one_directory_share_a_watch_and_are_told_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let all = LogWatch::new();
        let mut one = all.follow(dir.path());
        let mut two = all.follow(dir.path());
        assert_eq!(all.lock().by_descriptor.len(), 1);
        let start = tokio::time::Instant::now();
        std::fs::write(dir.path().join("0.log"), "x").unwrap();
        one.changed().await;
        two.changed().await;
        assert!(start.elapsed() < LOOK / 2);
        drop((one, two));
        let other = tempfile::tempdir().unwrap();
        let _three = all.follow(other.path());
        assert_eq!(all.lock().watched.len(), 1);
        assert_eq!(all.lock().by_descriptor.len(), 1);
    }

    #[tokio::test]
    async fn the_watch_of_one_that_goes_is_not_taken_from_one_that_comes() {
        let dir = tempfile::tempdir().unwrap();
        let all = LogWatch::new();
        let old = all.follow(dir.path());
        let (old, _) = old.watched.unwrap();
        let (descriptor, inotify) = (old.descriptor, Arc::clone(&old.inotify));
        // As where the new one was added after nobody held the old one, and before that was removed.
        let new = Arc::new(Watched {
            descriptor,
            changes: watch::Sender::new(0),
            inotify,
            owner: Arc::downgrade(&all),
        });
        all.lock().by_descriptor.insert(descriptor, Arc::downgrade(&new));
        drop(old);
        let mut changes = LogChanges { watched: Some((Arc::clone(&new), new.changes.subscribe())) };
        let start = tokio::time::Instant::now();
        std::fs::write(dir.path().join("0.log"), "x").unwrap();
        changes.changed().await;
        assert!(start.elapsed() < LOOK / 2);
    }
}
