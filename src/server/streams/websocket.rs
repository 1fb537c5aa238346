//! The server's side of WebSockets after the handshake: Kubernetes' channels, and a byte stream for what is tunnelled.
//!
//! [`serve_channels`] takes a connection whose messages begin with the number of a channel, [`Tunnel`] one whose
//! messages are pieces of one byte stream.

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::{Buf, BufMut, Bytes, BytesMut};
use futures::{Sink, SinkExt, Stream, StreamExt};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::timeout;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, Role, WebSocketConfig};
use tokio_tungstenite::tungstenite::{Error, Message, Utf8Bytes};

use super::drive::{self, FAREWELL, Received};
use super::link::{End, Framing, Kind, Link, Next};
use super::{CHUNK, Ended, Settings};

/// Largest message, and frame, of a client: kubectl sends 32 KiB. A client that sends a file as one message, which
/// Python's does with what it is given, may send 4 MiB; a kubelet takes 32 MiB (golang.org/x/net/websocket).
pub const MESSAGE: usize = 4 << 20;

/// The channel by which a client of v5 closes another one (apimachinery pkg/util/remotecommand StreamClose).
const CLOSE: u8 = 255;

/// Bytes after which what waits is written, and the size of reads.
const BUFFER: usize = 32 * 1024;

/// How a message of a channel protocol is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Coding {
    /// A byte for the channel, then bytes.
    Binary,
    /// A digit for the channel, then base64.
    Base64,
}

/// A channel protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Channels {
    /// How messages are written.
    pub coding: Coding,
    /// Whether the client can close a channel (v5).
    pub close: bool,
    /// How many channels there are.
    pub number: u8,
}

impl Framing for Channels {
    fn data(&self, stream: u32, bytes: &[u8]) -> Bytes {
        let mut message = BytesMut::with_capacity(1 + bytes.len());
        match self.coding {
            Coding::Binary => {
                message.put_u8(stream as u8);
                message.put_slice(bytes);
            }
            Coding::Base64 => {
                message.put_u8(b'0'.wrapping_add(stream as u8));
                message.put_slice(STANDARD.encode(bytes).as_bytes());
            }
        }
        message.freeze()
    }

    fn finish(&self, _: u32) -> Option<Bytes> {
        None
    }

    fn reset(&self, _: u32) -> Option<Bytes> {
        None
    }

    fn probe(&self) -> Bytes {
        Bytes::new()
    }
}

async fn socket<IO: AsyncRead + AsyncWrite + Unpin>(io: IO) -> WebSocketStream<IO> {
    let config = WebSocketConfig::default()
        .read_buffer_size(BUFFER)
        .write_buffer_size(BUFFER)
        // A full buffer is written before the next message is taken, so this is never reached.
        .max_write_buffer_size(BUFFER + 8 * CHUNK)
        .max_message_size(Some(MESSAGE))
        .max_frame_size(Some(MESSAGE));
    // Waits for nothing: the handshake is over.
    WebSocketStream::from_raw_socket(io, Role::Server, Some(config)).await
}

/// Serves a connection of channels in a task of its own. The channels that are in use are opened by number on the link.
pub(super) async fn serve_channels<IO>(io: IO, channels: Channels, settings: Settings) -> Arc<Link>
where
    IO: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let link = Link::new(channels, settings);
    let connection = link.clone();
    let (output, input) = socket(io).await.split();
    tokio::spawn(async move {
        let receive = receive(input, channels, &connection);
        let send = send(output, channels.coding, &connection);
        drive::drive(connection.clone(), receive, send).await;
    });
    link
}

/// Receives messages until the client leaves or breaks the protocol.
async fn receive<S>(mut input: S, channels: Channels, link: &Link) -> Received
where
    S: Stream<Item = Result<Message, Error>> + Unpin,
{
    loop {
        let message = match input.next().await {
            Some(Ok(message)) => message,
            Some(Err(error)) => return broken(error),
            None => return Received::gone(),
        };
        link.touch();
        let bytes = match message {
            Message::Text(text) => Bytes::from(text),
            Message::Binary(bytes) => bytes,
            Message::Close(_) => {
                // Asking for more sends the answer.
                let _ = timeout(FAREWELL, input.next()).await;
                return Received { why: Ended::Gone, clean: true };
            }
            Message::Ping(_) | Message::Pong(_) | Message::Frame(_) => continue,
        };
        if let Err(what) = take(&bytes, channels, link).await {
            return Received::violation(what);
        }
    }
}

/// Takes one message.
async fn take(message: &[u8], channels: Channels, link: &Link) -> Result<(), &'static str> {
    let Some((channel, bytes)) = message.split_first() else { return Ok(()) };
    if channels.close && *channel == CLOSE {
        return match bytes {
            [closed] if *closed < channels.number => {
                link.received_all(u32::from(*closed), End::Finished);
                Ok(())
            }
            [_] => Err("a channel that is not there is closed"),
            _ => Err("a close signal does not name one channel"),
        };
    }
    match channels.coding {
        Coding::Binary => drive::deliver(link, u32::from(*channel), bytes).await,
        Coding::Base64 => {
            let bytes = STANDARD.decode(bytes.trim_ascii()).map_err(|_| "a message is not base64")?;
            drive::deliver(link, u32::from(channel.wrapping_sub(b'0')), &bytes).await;
        }
    }
    Ok(())
}

fn broken(error: Error) -> Received {
    use tokio_tungstenite::tungstenite::error::ProtocolError::ResetWithoutClosingHandshake;
    match error {
        Error::Io(error) => error.into(),
        Error::Capacity(_) => Received::violation("a message is too large"),
        Error::Protocol(ResetWithoutClosingHandshake) => Received::gone(),
        Error::ConnectionClosed | Error::AlreadyClosed => Received::gone(),
        _ => Received::violation("these are no WebSocket frames"),
    }
}

/// Sends what is queued until the link is closed.
async fn send<S>(mut output: S, coding: Coding, link: &Link) -> io::Result<()>
where
    S: Sink<Message, Error = Error> + Unpin,
{
    let mut unflushed = false;
    loop {
        match link.next() {
            Next::Unit(unit) => {
                let length = unit.bytes.len();
                let message = match (unit.kind, coding) {
                    (Kind::Probe, _) => Message::Ping(unit.bytes),
                    (_, Coding::Binary) => Message::Binary(unit.bytes),
                    (_, Coding::Base64) => {
                        Message::Text(Utf8Bytes::try_from(unit.bytes).map_err(io::Error::other)?)
                    }
                };
                output.feed(message).await.map_err(io_error)?;
                link.written(unit.kind, length);
                unflushed = true;
            }
            Next::Empty if unflushed => {
                output.flush().await.map_err(io_error)?;
                link.flushed();
                unflushed = false;
            }
            Next::Empty => poll_fn(|cx| link.poll_sendable(cx)).await,
            Next::Drained => {
                let code = if link.blames() { CloseCode::Protocol } else { CloseCode::Normal };
                let goodbye = CloseFrame { code, reason: Utf8Bytes::default() };
                output.send(Message::Close(Some(goodbye))).await.map_err(io_error)?;
                link.flushed();
                return Ok(());
            }
        }
    }
}

fn io_error(error: Error) -> io::Error {
    match error {
        Error::Io(error) => error,
        Error::ConnectionClosed | Error::AlreadyClosed => io::ErrorKind::UnexpectedEof.into(),
        error => io::Error::other(error),
    }
}

/// A WebSocket as one byte stream: what SPDY is tunnelled through.
pub struct Tunnel<IO> {
    socket: WebSocketStream<IO>,
    message: Bytes,
}

impl<IO: AsyncRead + AsyncWrite + Unpin> Tunnel<IO> {
    /// A tunnel through an upgraded connection.
    pub async fn new(io: IO) -> Self {
        Self { socket: socket(io).await, message: Bytes::new() }
    }
}

impl<IO: AsyncRead + AsyncWrite + Unpin> AsyncRead for Tunnel<IO> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        while self.message.is_empty() {
            match ready!(self.socket.poll_next_unpin(cx)) {
                Some(Ok(Message::Binary(bytes))) => self.message = bytes,
                Some(Ok(Message::Text(_))) => {
                    return Poll::Ready(Err(io::Error::other("the tunnel carries a text message")));
                }
                Some(Ok(_)) => {}
                Some(Err(error)) => return Poll::Ready(Err(io_error(error))),
                None => return Poll::Ready(Ok(())),
            }
        }
        let taken = self.message.len().min(buf.remaining());
        buf.put_slice(self.message.get(..taken).unwrap_or_default());
        self.message.advance(taken);
        Poll::Ready(Ok(()))
    }
}

impl<IO: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Tunnel<IO> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        ready!(self.socket.poll_ready_unpin(cx)).map_err(io_error)?;
        // A frame of SPDY, its head included, stays one message.
        let bytes = buf.get(..2 * CHUNK).unwrap_or(buf);
        self.socket.start_send_unpin(Message::Binary(Bytes::copy_from_slice(bytes))).map_err(io_error)?;
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.socket.poll_flush_unpin(cx).map_err(io_error)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.socket.poll_close_unpin(cx).map_err(io_error)
    }
}
