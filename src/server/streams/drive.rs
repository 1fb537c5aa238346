//! A connection's task: receives and sends side by side, watches over both, and ends the connection in good order.
//!
//! [`drive`] is what is spawned.

use std::future::poll_fn;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::link::Link;
use super::{DRAIN, Ended, LINGER};

/// How long a client that leaves or broke the protocol may take to accept our last word.
pub(super) const FAREWELL: Duration = Duration::from_secs(1);

/// What became of receiving: why it ended, and whether the client said goodbye as its protocol wants it.
#[derive(Debug, Clone)]
pub(super) struct Received {
    /// Why.
    pub why: Ended,
    /// Whether what was received is whole.
    pub clean: bool,
}

impl Received {
    pub(super) fn gone() -> Self {
        Self { why: Ended::Gone, clean: false }
    }

    pub(super) fn violation(what: &'static str) -> Self {
        Self { why: Ended::Violation(what), clean: false }
    }
}

impl From<std::io::Error> for Received {
    fn from(error: std::io::Error) -> Self {
        let why = match error.kind() {
            std::io::ErrorKind::UnexpectedEof => Ended::Gone,
            _ => Ended::Broken(error.to_string()),
        };
        Self { why, clean: false }
    }
}

/// Ends the link of a task that is dropped, so that no stream waits for it.
struct Guard(Arc<Link>);

impl Drop for Guard {
    fn drop(&mut self) {
        self.0.end(Ended::Broken("its task was dropped".to_owned()), false);
    }
}

/// Runs a connection to its end. `receive` ends when the client is gone, `send` when everything was sent after
/// [`Link::close`].
pub(super) async fn drive(
    link: Arc<Link>,
    receive: impl Future<Output = Received>,
    send: impl Future<Output = std::io::Result<()>>,
) {
    let guard = Guard(link.clone());
    tokio::pin!(receive, send);
    tokio::select! {
        received = &mut receive => {
            let last_words = link.is_closing();
            let violation = matches!(received.why, Ended::Violation(_));
            if violation {
                link.blame();
            }
            link.close();
            if last_words {
                // It may have closed only its own side, as soon as it knew that the end was near.
                tokio::select! {
                    _ = &mut send => link.end(Ended::Finished, true),
                    why = watch(&link) => link.end(why, false),
                }
            } else if violation {
                let _ = timeout(FAREWELL, &mut send).await;
            }
            link.end(received.why, received.clean);
        }
        sent = &mut send => match sent {
            Ok(()) => {
                let _ = timeout(LINGER, &mut receive).await;
                link.end(Ended::Finished, true);
            }
            Err(error) => link.end(Received::from(error).why, false),
        },
        why = watch(&link) => link.end(why, false),
    }
    drop(guard);
}

/// Resolves when nothing moves for too long.
async fn watch(link: &Link) -> Ended {
    let idle = link.settings().idle;
    while !link.is_closing() {
        let until = link.active() + idle;
        if until <= Instant::now() {
            return Ended::Idle(idle);
        }
        tokio::select! {
            () = sleep_until(until) => {}
            () = link.closing() => {}
        }
    }
    loop {
        let before = link.progress();
        sleep(DRAIN).await;
        if link.progress() == before {
            return Ended::Stuck(DRAIN);
        }
    }
}

/// Gives a stream bytes from the client, and waits for its reader by the rules of the parent module.
pub(super) async fn deliver(link: &Link, stream: u32, mut bytes: &[u8]) {
    let first = link.settings().probe.min(link.settings().stall);
    while !bytes.is_empty() {
        let taken = match timeout(first, poll_fn(|cx| link.poll_deliver(cx, stream, bytes))).await {
            Ok(taken) => taken,
            Err(_) => stalled(link, stream, bytes).await,
        };
        bytes = bytes.get(taken..).unwrap_or_default();
        link.touch();
    }
}

/// A reader has taken nothing for a while.
async fn stalled(link: &Link, stream: u32, bytes: &[u8]) -> usize {
    let settings = link.settings();
    let limit = Instant::now() + settings.stall.saturating_sub(settings.probe);
    loop {
        if limit <= Instant::now() {
            tracing::info!(stream, "a stream that nobody reads is reset, since it holds up its connection");
            link.reset(stream);
            return bytes.len();
        }
        link.probe();
        let wait = settings.probe.min(limit - Instant::now());
        if let Ok(taken) = timeout(wait, poll_fn(|cx| link.poll_deliver(cx, stream, bytes))).await {
            return taken;
        }
    }
}
