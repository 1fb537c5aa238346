//! What callers hold of a connection: the halves of its streams, and when it ends.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::watch;

use super::Ended;
use super::link::Link;

/// Tells when a connection has ended, and why.
#[derive(Debug, Clone)]
pub struct Closed(watch::Receiver<Option<Ended>>);

impl Closed {
    pub(super) fn new(ended: watch::Receiver<Option<Ended>>) -> Self {
        Self(ended)
    }

    /// Waits for the end: the client is gone, or this side has finished and nothing is left to do.
    pub async fn wait(&mut self) -> Ended {
        match self.0.wait_for(Option::is_some).await {
            Ok(ended) => ended.clone().unwrap_or(Ended::Finished),
            Err(_) => Ended::Finished,
        }
    }

    /// The end, if it has come.
    pub fn now(&self) -> Option<Ended> {
        self.0.borrow().clone()
    }
}

/// What comes from the client on one stream. End of file: the client has closed its side. An error: the stream or the
/// connection was broken off. Dropped, it throws away what still comes.
pub struct StreamReader {
    link: Arc<Link>,
    id: u32,
}

impl StreamReader {
    pub(super) fn new(link: Arc<Link>, id: u32) -> Self {
        Self { link, id }
    }
}

impl AsyncRead for StreamReader {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.link.poll_read(cx, self.id, buf)
    }
}

impl Drop for StreamReader {
    fn drop(&mut self) {
        self.link.drop_reader(self.id);
    }
}

/// What goes to the client on one stream. A flush waits until the connection has taken all that was written.
/// Shut down or dropped, it tells the client that no more comes, where the protocol can.
pub struct StreamWriter {
    link: Arc<Link>,
    id: u32,
    /// The units that were queued when this one last queued something.
    mark: u64,
    finished: bool,
}

impl StreamWriter {
    pub(super) fn new(link: Arc<Link>, id: u32) -> Self {
        Self { link, id, mark: 0, finished: false }
    }

    /// The stream's number.
    pub(super) fn id(&self) -> u32 {
        self.id
    }

    /// Queues these bytes, however much waits, and that no more will come. A flush then waits for all of it.
    pub(super) fn send_last(&mut self, bytes: &[u8]) {
        self.mark = self.link.send_last(self.id, bytes);
    }
}

impl AsyncWrite for StreamWriter {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        this.link.poll_write(cx, this.id, buf, &mut this.mark)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.link.poll_flushed(cx, self.id, self.mark)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !std::mem::replace(&mut self.finished, true) {
            self.send_last(&[]);
        }
        self.poll_flush(cx)
    }
}

impl Drop for StreamWriter {
    fn drop(&mut self) {
        self.link.drop_writer(self.id);
    }
}

/// Both halves of a stream.
pub struct DuplexStream {
    /// What comes from the client.
    pub reader: StreamReader,
    /// What goes to it.
    pub writer: StreamWriter,
}

impl AsyncRead for DuplexStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.reader).poll_read(cx, buf)
    }
}

impl AsyncWrite for DuplexStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.writer).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.writer).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.writer).poll_shutdown(cx)
    }
}
