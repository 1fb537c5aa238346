//! exec and attach: standard streams, terminal sizes and an exit status between a client and a command.
//!
//! [`negotiate`] judges the request; [`Negotiated::accept`] makes a [`RemoteCommand`] of its upgraded connection.

use std::collections::VecDeque;
use std::sync::Arc;

use http::{HeaderMap, Method, Response};
use serde::Deserialize;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout_at};

use super::handshake::{self, Refusal};
use super::link::Link;
use super::spdy::{self, headers::Headers};
use super::websocket::{self, Channels, Coding};
use super::{Closed, DuplexStream, Ended, Error, Settings, StreamReader, StreamWriter};

mod status;

pub use status::Status;
use status::Style;

/// What SPDY clients may speak (cri-streaming remotecommand SupportedStreamingProtocols).
const SPDY_PROTOCOLS: &[&str] =
    &["v4.channel.k8s.io", "v3.channel.k8s.io", "v2.channel.k8s.io", "channel.k8s.io"];

/// What WebSocket clients may speak (cri-streaming remotecommand/websocket.go, and v5 by kubelet's translator).
const WEBSOCKET_PROTOCOLS: &[&str] = &[
    "v5.channel.k8s.io",
    "v4.channel.k8s.io",
    "v4.base64.channel.k8s.io",
    "channel.k8s.io",
    "base64.channel.k8s.io",
];

/// Channels of a WebSocket (apimachinery pkg/util/remotecommand). Standard streams have their descriptors' numbers.
const STDIN: u32 = 0;
const STDOUT: u32 = 1;
const STDERR: u32 = 2;
const ERROR: u32 = 3;
const RESIZE: u32 = 4;

/// The header that says what a SPDY stream is for, `streamType`, in small letters.
const STREAM_TYPE: &str = "streamtype";

/// Largest JSON text of a terminal's size.
const SIZE_BYTES: usize = 1024;

/// Sizes that wait for the command; of more, only the last counts.
const SIZES: usize = 4;

/// The streams that the client asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Streams {
    /// The command's standard input.
    pub stdin: bool,
    /// Its standard output.
    pub stdout: bool,
    /// Its standard error. Never with a terminal.
    pub stderr: bool,
    /// It gets a terminal.
    pub tty: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Transport {
    Spdy(&'static str),
    WebSocket { accept: String, protocol: Option<&'static str> },
}

/// A request that can be upgraded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Negotiated {
    /// What the client asks for.
    pub streams: Streams,
    transport: Transport,
}

/// Judges a request for exec or attach by its method, headers and query.
pub fn negotiate(method: &Method, headers: &HeaderMap, query: Option<&str>) -> Result<Negotiated, Refusal> {
    let streams = streams(query)?;
    if !handshake::wants_websocket(headers) {
        let protocol = handshake::spdy(method, headers, SPDY_PROTOCOLS)?;
        return Ok(Negotiated { streams, transport: Transport::Spdy(protocol) });
    }
    let (accept, wanted) = handshake::websocket(method, headers)?;
    let known = |name: &String| WEBSOCKET_PROTOCOLS.iter().copied().find(|known| known == name);
    let protocol = if wanted.is_empty() {
        None
    } else {
        // A kubelet prefers v5 wherever the client names it, and else follows the client's order.
        let v5 = WEBSOCKET_PROTOCOLS.iter().copied().take(1).find(|v5| wanted.iter().any(|name| name == v5));
        let protocol = v5.or_else(|| wanted.iter().find_map(known));
        Some(protocol.ok_or_else(|| handshake::unknown_subprotocols(&wanted, WEBSOCKET_PROTOCOLS))?)
    };
    Ok(Negotiated { streams, transport: Transport::WebSocket { accept, protocol } })
}

/// The streams that a query asks for (cri-streaming remotecommand NewOptions).
///
/// # Errors
/// When it asks for none.
pub fn streams(query: Option<&str>) -> Result<Streams, Refusal> {
    let asked = |name| {
        let values = handshake::query_values(query, name);
        values.first().is_some_and(|value| value == "1" || value == "true")
    };
    let tty = asked("tty");
    let streams =
        Streams { stdin: asked("input"), stdout: asked("output"), stderr: asked("error") && !tty, tty };
    if !streams.stdin && !streams.stdout && !streams.stderr {
        return Err(Refusal::bad_request("you must specify at least 1 of stdin, stdout, stderr"));
    }
    Ok(streams)
}

/// A terminal's size in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub struct TerminalSize {
    /// Columns.
    #[serde(rename = "Width", alias = "width", default)]
    pub width: u16,
    /// Rows.
    #[serde(rename = "Height", alias = "height", default)]
    pub height: u16,
}

/// A client's session.
pub struct RemoteCommand {
    /// What the client types, where it was asked for. It ends when the client closes it.
    pub stdin: Option<StreamReader>,
    /// What the client is shown, where it was asked for.
    pub stdout: Option<StreamWriter>,
    /// The same for standard error.
    pub stderr: Option<StreamWriter>,
    /// The sizes of the client's terminal; the first one comes at once. It ends at once without a terminal.
    pub resize: mpsc::Receiver<TerminalSize>,
    /// Ends the session.
    pub status: StatusSender,
    /// Tells when the client is gone.
    pub closed: Closed,
}

impl Negotiated {
    /// What carries it, for logs.
    pub fn transport(&self) -> &'static str {
        match self.transport {
            Transport::Spdy(_) => "SPDY",
            Transport::WebSocket { .. } => "WebSocket",
        }
    }

    /// The protocol, for logs.
    pub fn protocol(&self) -> &'static str {
        match self.transport {
            Transport::Spdy(protocol) => protocol,
            Transport::WebSocket { protocol, .. } => protocol.unwrap_or_default(),
        }
    }

    /// The answer that upgrades the connection.
    pub fn response<B: Default>(&self) -> Response<B> {
        match &self.transport {
            Transport::Spdy(protocol) => handshake::spdy_response(protocol),
            Transport::WebSocket { accept, protocol } => handshake::websocket_response(accept, *protocol),
        }
    }

    /// Takes the upgraded connection, and waits until the client has opened what it asked for.
    pub async fn accept<IO>(self, io: IO, settings: Settings) -> Result<RemoteCommand, Error>
    where
        IO: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        match self.transport {
            Transport::Spdy(protocol) => accept_spdy(io, protocol, self.streams, settings).await,
            Transport::WebSocket { protocol, .. } => {
                Ok(accept_websocket(io, protocol.unwrap_or_default(), self.streams, settings).await)
            }
        }
    }
}

async fn accept_websocket<IO>(io: IO, protocol: &str, streams: Streams, settings: Settings) -> RemoteCommand
where
    IO: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let coding = if protocol.contains("base64.") { Coding::Base64 } else { Coding::Binary };
    let close = protocol.starts_with("v5.");
    let style = if close || protocol.starts_with("v4.") { Style::Json } else { Style::Text };
    let link = websocket::serve_channels(io, Channels { coding, close, number: 5 }, settings).await;
    let write = |wanted: bool, channel| wanted.then(|| link.open(channel).1);
    let stdin = streams.stdin.then(|| link.open(STDIN));
    let (stdout, stderr) = (write(streams.stdout, STDOUT), write(streams.stderr, STDERR));
    let error = link.open(ERROR).1;
    let resize = streams.tty.then(|| link.open(RESIZE).0);
    // The lowest channel that can be written says that the connection stands (cri-streaming remotecommand/websocket.go).
    let first = [(streams.stdout, STDOUT), (streams.stderr, STDERR), (true, ERROR)];
    if let Some((_, channel)) = first.iter().find(|(open, _)| *open) {
        link.push_data(*channel, &[]);
    }
    session(link, stdin.map(|(reader, _)| reader), stdout, stderr, resize, error, style)
}

async fn accept_spdy<IO>(
    io: IO,
    protocol: &str,
    streams: Streams,
    settings: Settings,
) -> Result<RemoteCommand, Error>
where
    IO: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (link, mut incoming) = spdy::serve(io, settings, |headers| kind(headers).is_some());
    let resizes = protocol.starts_with("v4.") || protocol.starts_with("v3.");
    let mut wanted = [
        ("error", true, None),
        ("stdin", streams.stdin, None),
        ("stdout", streams.stdout, None),
        ("stderr", streams.stderr, None),
        ("resize", streams.tty && resizes, None),
    ];
    let collected = collect(&link, &mut incoming, &mut wanted, settings).await;
    if let Err(error) = collected {
        link.close();
        return Err(error);
    }
    let [error, stdin, stdout, stderr, resize] = wanted.map(|(_, _, stream)| stream);
    let Some(error) = error else {
        return Err(Error::Missing { missing: "error", within: settings.creation });
    };
    let style = if protocol.starts_with("v4.") { Style::Json } else { Style::Text };
    let write = |stream: Option<DuplexStream>| stream.map(|stream| stream.writer);
    // What these could send ends with the command: a client takes the end of stdin's for the end of the session.
    let mut silent = Vec::new();
    let mut read = |stream: Option<DuplexStream>| {
        let DuplexStream { reader, writer } = stream?;
        silent.push(writer);
        Some(reader)
    };
    let (stdin, resize) = (read(stdin), read(resize));
    if protocol == "channel.k8s.io" {
        // A client of v1 waits for it before it does anything (cri-streaming remotecommand/httpstream.go).
        silent.clear();
    }
    let mut session = session(link, stdin, write(stdout), write(stderr), resize, error.writer, style);
    session.status.silent = silent;
    Ok(session)
}

/// What a stream is for, if it is known.
fn kind(headers: &Headers) -> Option<&'static str> {
    let kind = headers.get(STREAM_TYPE)?;
    ["error", "stdin", "stdout", "stderr", "resize"].into_iter().find(|known| *known == kind)
}

/// What a stream is for, whether it is wanted, and the stream once it is there.
type Slot = (&'static str, bool, Option<DuplexStream>);

/// Waits until the client has opened all streams that are wanted; others are accepted and left alone.
async fn collect(
    link: &Link,
    incoming: &mut mpsc::Receiver<spdy::Incoming>,
    slots: &mut [Slot],
    settings: Settings,
) -> Result<(), Error> {
    let deadline = Instant::now() + settings.creation;
    while let Some(missing) =
        slots.iter().find(|(_, wanted, stream)| *wanted && stream.is_none()).map(|slot| slot.0)
    {
        let opened = timeout_at(deadline, incoming.recv()).await;
        let Ok(opened) = opened else { return Err(Error::Missing { missing, within: settings.creation }) };
        let Some(opened) = opened else { return Err(link.closed().wait().await.into()) };
        let slot = slots.iter_mut().find(|slot| Some(slot.0) == kind(&opened.headers));
        if let Some((name, true, stream)) = slot
            && stream.replace(opened.stream).is_some()
        {
            return Err(Error::Twice(name));
        }
    }
    Ok(())
}

fn session(
    link: Arc<Link>,
    stdin: Option<StreamReader>,
    stdout: Option<StreamWriter>,
    stderr: Option<StreamWriter>,
    resize: Option<StreamReader>,
    error: StreamWriter,
    style: Style,
) -> RemoteCommand {
    let (sender, sizes) = mpsc::channel(SIZES);
    if let Some(resize) = resize {
        tokio::spawn(forward_sizes(resize, sender));
    }
    let outputs = [&stdout, &stderr].into_iter().flatten().map(StreamWriter::id).collect();
    let closed = link.closed();
    let status = StatusSender { link, outputs, silent: Vec::new(), error, style, sent: false };
    RemoteCommand { stdin, stdout, stderr, resize: sizes, status, closed }
}

/// Passes sizes on. A command that does not take them gets the last one when it does.
async fn forward_sizes(mut resize: StreamReader, sender: mpsc::Sender<TerminalSize>) {
    let mut text = Vec::new();
    let mut last = None;
    loop {
        let read = tokio::select! {
            permit = sender.reserve(), if last.is_some() => {
                let Ok(permit) = permit else { return };
                if let Some(size) = last.take() {
                    permit.send(size);
                }
                continue;
            }
            () = sender.closed() => return,
            read = resize.read_buf(&mut text) => read,
        };
        if !matches!(read, Ok(1..)) {
            break;
        }
        let Ok(sizes) = parse_sizes(&mut text) else { break };
        for size in sizes {
            match sender.try_send(size) {
                Ok(()) => last = None,
                Err(_) => last = Some(size),
            }
        }
    }
    if let Some(size) = last {
        let _ = sender.send(size).await;
    }
}

/// Takes all whole sizes from the front of `text`; an error when it can be no size.
fn parse_sizes(text: &mut Vec<u8>) -> Result<VecDeque<TerminalSize>, ()> {
    let mut values = serde_json::Deserializer::from_slice(text).into_iter();
    let mut sizes = VecDeque::new();
    loop {
        match values.next() {
            Some(Ok(size)) => sizes.push_back(size),
            Some(Err(error)) if !error.is_eof() => return Err(()),
            Some(Err(_)) | None => break,
        }
    }
    let read = values.byte_offset();
    text.drain(..read);
    if text.len() > SIZE_BYTES { Err(()) } else { Ok(sizes) }
}

/// Ends a session by saying how its command ended. Dropped before, it says that the session was broken off: a client
/// takes no status for success.
pub struct StatusSender {
    link: Arc<Link>,
    outputs: Vec<u32>,
    silent: Vec<StreamWriter>,
    error: StreamWriter,
    style: Style,
    sent: bool,
}

impl StatusSender {
    /// Sends the status after all that was written before, closes every stream and then the connection, and waits until
    /// all of it is on its way.
    pub async fn send(mut self, status: Status) -> Result<(), Error> {
        self.finish(&status);
        let flushed = self.error.flush().await;
        flushed.map_err(|_| self.link.closed().now().unwrap_or(Ended::Gone).into())
    }

    fn finish(&mut self, status: &Status) {
        self.sent = true;
        for output in &self.outputs {
            self.link.finish(*output);
        }
        self.silent.clear();
        self.error.send_last(status.render(self.style).unwrap_or_default().as_bytes());
        self.link.close();
    }
}

impl Drop for StatusSender {
    fn drop(&mut self) {
        if !self.sent {
            self.finish(&Status::Failure("the session was broken off".to_owned()));
        }
    }
}
