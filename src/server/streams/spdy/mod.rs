//! The server's side of SPDY/3.1, without flow control, as moby/spdystream speaks it.
//!
//! [`serve`] takes a connection and yields the streams that the client opens.

use std::future::poll_fn;
use std::io;
use std::sync::Arc;

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc;

use super::drive::{self, Received};
use super::link::{End, Framing, Kind, Link, Next};
use super::{DuplexStream, Settings};

pub mod frame;
pub mod headers;

use frame::{Control, HEAD, Head, Reset};
use headers::{COMPRESSED, EmptyBlocks, Headers, Inflater};

/// What is read from the connection at once.
const READ: usize = 64 * 1024;

/// Largest control frame: a header block and its stream's numbers.
const CONTROL: usize = COMPRESSED + 10;

/// A question's number; a server's are even (SPDY protocol draft 3.1, 2.6.5).
const PROBE_ID: u32 = 2;

/// A stream that the client has opened and that was accepted.
pub struct Incoming {
    /// Its number.
    pub id: u32,
    /// What it is for.
    pub headers: Headers,
    /// The stream.
    pub stream: DuplexStream,
}

/// Says whether a stream with these headers is wanted; one that is not is reset.
pub type Wanted = fn(&Headers) -> bool;

struct Spdy;

impl Framing for Spdy {
    fn data(&self, stream: u32, bytes: &[u8]) -> Bytes {
        frame::data(stream, false, bytes)
    }

    fn finish(&self, stream: u32) -> Option<Bytes> {
        Some(frame::data(stream, true, &[]))
    }

    fn reset(&self, stream: u32) -> Option<Bytes> {
        Some(frame::reset(stream, Reset::Cancel))
    }

    fn probe(&self) -> Bytes {
        frame::ping(PROBE_ID)
    }
}

/// Serves a connection in a task of its own. Streams that come while as many wait as the settings allow at once, or
/// after the receiver was dropped, are refused.
pub(super) fn serve<IO>(io: IO, settings: Settings, wanted: Wanted) -> (Arc<Link>, mpsc::Receiver<Incoming>)
where
    IO: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let link = Link::new(Spdy, settings);
    let (sender, incoming) = mpsc::channel(settings.open);
    let connection = link.clone();
    tokio::spawn(async move {
        let (input, output) = tokio::io::split(io);
        let mut reader = Reader {
            input,
            buffer: BytesMut::new(),
            link: connection.clone(),
            inflater: Inflater::default(),
            blocks: EmptyBlocks::default(),
            last: 0,
            opened: 0,
            wanted,
            incoming: sender,
        };
        drive::drive(connection.clone(), reader.run(), send(output, &connection)).await;
    });
    (link, incoming)
}

/// Sends what is queued until the link is closed.
async fn send<W: AsyncWrite + Unpin>(mut output: W, link: &Link) -> io::Result<()> {
    let mut unflushed = false;
    loop {
        match link.next() {
            Next::Unit(unit) => {
                output.write_all(&unit.bytes).await?;
                link.written(unit.kind, unit.bytes.len());
                unflushed = true;
            }
            Next::Empty if unflushed => {
                output.flush().await?;
                link.flushed();
                unflushed = false;
            }
            Next::Empty => poll_fn(|cx| link.poll_sendable(cx)).await,
            Next::Drained => {
                // The number of the last good stream would matter to who wants to open the others elsewhere.
                output.write_all(&frame::go_away(0, link.blames())).await?;
                output.flush().await?;
                link.flushed();
                return output.shutdown().await;
            }
        }
    }
}

struct Reader<R> {
    input: R,
    buffer: BytesMut,
    link: Arc<Link>,
    inflater: Inflater,
    blocks: EmptyBlocks,
    /// The last stream that the client opened.
    last: u32,
    opened: u64,
    wanted: Wanted,
    incoming: mpsc::Sender<Incoming>,
}

impl<R: AsyncRead + Unpin> Reader<R> {
    /// Reads frames until the client leaves or breaks the protocol.
    async fn run(&mut self) -> Received {
        loop {
            match self.frame().await {
                Ok(()) => self.link.touch(),
                Err(received) => return received,
            }
        }
    }

    async fn frame(&mut self) -> Result<(), Received> {
        self.fill(HEAD).await?;
        let Some(head) = self.buffer.first_chunk() else { return Err(Received::gone()) };
        let head = Head::parse(head).map_err(Received::violation)?;
        self.buffer.advance(HEAD);
        match head {
            Head::Data { stream, fin, length } => self.data(stream, fin, length).await,
            Head::Control { length, .. } if length > CONTROL => {
                Err(Received::violation("a control frame is too large"))
            }
            Head::Control { kind, flags, length } => {
                self.fill(length).await?;
                let payload = self.buffer.split_to(length);
                let control =
                    Control::parse(kind, flags, &payload, &mut self.inflater).map_err(Received::violation)?;
                poll_fn(|cx| self.link.poll_answerable(cx)).await;
                self.control(control)
            }
        }
    }

    /// Data goes on as it comes, however large its frame is.
    async fn data(&mut self, stream: u32, fin: bool, mut left: usize) -> Result<(), Received> {
        while left > 0 {
            self.fill(1).await?;
            let piece = left.min(self.buffer.len());
            drive::deliver(&self.link, stream, self.buffer.get(..piece).unwrap_or_default()).await;
            self.buffer.advance(piece);
            left -= piece;
        }
        if fin {
            self.link.received_all(stream, End::Finished);
        }
        Ok(())
    }

    fn control(&mut self, control: Control) -> Result<(), Received> {
        match control {
            Control::Open { stream, headers, fin, unidirectional } => {
                self.open(stream, headers, fin, unidirectional)?
            }
            Control::Reset(stream) => self.link.received_all(stream, End::Reset),
            Control::More { stream, fin: true } => self.link.received_all(stream, End::Finished),
            // An even number is the answer to a question of ours.
            Control::Ping(id) if id % 2 == 1 => self.link.push(Kind::Control, frame::ping(id)),
            Control::GoAway => return Err(Received::gone()),
            Control::More { .. } | Control::Ping(_) | Control::Nothing => {}
        }
        Ok(())
    }

    fn open(
        &mut self,
        stream: u32,
        headers: Headers,
        fin: bool,
        unidirectional: bool,
    ) -> Result<(), Received> {
        if stream.is_multiple_of(2) || stream <= self.last || stream >> 31 != 0 {
            return Err(Received::violation("a stream's number is not a client's next one"));
        }
        self.last = stream;
        self.opened += 1;
        let settings = self.link.settings();
        if self.opened > settings.total {
            return Err(Received::violation("too many streams"));
        }
        if self.link.open_streams() >= settings.open {
            self.link.push(Kind::Control, frame::reset(stream, Reset::Refused));
            return Ok(());
        }
        let (true, Ok(place)) = ((self.wanted)(&headers), self.incoming.try_reserve()) else {
            self.link.push(Kind::Control, frame::reset(stream, Reset::Refused));
            return Ok(());
        };
        self.link.push(Kind::Control, frame::reply(stream, &self.blocks.next()));
        let (reader, writer) = self.link.open(stream);
        if fin {
            self.link.received_all(stream, End::Finished);
        }
        if unidirectional {
            self.link.mute(stream);
        }
        place.send(Incoming { id: stream, headers, stream: DuplexStream { reader, writer } });
        Ok(())
    }

    /// Reads until the buffer holds this many bytes.
    async fn fill(&mut self, wanted: usize) -> Result<(), Received> {
        while self.buffer.len() < wanted {
            if self.buffer.capacity() - self.buffer.len() < READ / 2 {
                self.buffer.reserve(READ - self.buffer.len().min(READ / 2));
            }
            if self.input.read_buf(&mut self.buffer).await? == 0 {
                return Err(Received::gone());
            }
        }
        Ok(())
    }
}
