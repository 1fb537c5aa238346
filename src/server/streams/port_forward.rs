//! port-forward: connections of the client's machine to ports of a pod, many through one upgraded connection.
//!
//! [`negotiate`] judges the request; [`Negotiated::accept`] yields a [`ForwardedStream`] for each connection.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use http::{HeaderMap, Method, Response};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};

use super::handshake::{self, Refusal};
use super::link::Link;
use super::spdy::{self, headers::Headers};
use super::websocket::{self, Channels, Coding, Tunnel};
use super::{Closed, DuplexStream, Ended, Error, Settings, StreamReader, StreamWriter};

/// What SPDY clients may speak (cri-streaming portforward ProtocolV1Name).
const SPDY_PROTOCOLS: &[&str] = &["portforward.k8s.io"];

/// The same through a WebSocket (apimachinery pkg/util/portforward WebsocketsSPDYTunnelingPortForwardV1).
const TUNNEL_PROTOCOLS: &[&str] = &["SPDY/3.1+portforward.k8s.io"];

/// WebSockets whose channels are the connections (cri-streaming portforward/websocket.go).
const CHANNEL_PROTOCOLS: &[&str] = &["v4.channel.k8s.io", "v4.base64.channel.k8s.io"];

/// Most ports of a WebSocket of channels, two channels each: the last channel of base64 is then still a character of
/// ASCII.
const PORTS: usize = 32;

/// Most data streams that wait for their error stream. Each may fill its buffer, and streams that never fit together would
/// fill 512 of them: 64 MiB for half a minute. Clients open the error stream first (client-go tools/portforward
/// portforward.go handleConnection), so that no data stream of theirs waits.
const UNPAIRED: usize = 8;

/// Longest name of a request, of which one is kept for each stream that waits: clients count (0, 1, 2, …).
const REQUEST_ID_BYTES: usize = 64;

/// Connections that wait for being taken.
const WAITING: usize = 64;

/// Most characters of a message about what went wrong.
const MESSAGE: usize = 8 * 1024;

/// Headers of a stream, in small letters (cri-streaming portforward/constants.go).
const PORT: &str = "port";
const STREAM_TYPE: &str = "streamtype";
const REQUEST_ID: &str = "requestid";

#[derive(Debug, Clone, PartialEq, Eq)]
enum Transport {
    Spdy(&'static str),
    Tunnel { accept: String, protocol: &'static str },
    Channels { accept: String, protocol: Option<&'static str>, ports: Vec<u16> },
}

/// A request that can be upgraded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Negotiated {
    transport: Transport,
}

/// Judges a request by its method, headers and query.
pub fn negotiate(method: &Method, headers: &HeaderMap, query: Option<&str>) -> Result<Negotiated, Refusal> {
    if !handshake::wants_websocket(headers) {
        let protocol = handshake::spdy(method, headers, SPDY_PROTOCOLS)?;
        return Ok(Negotiated { transport: Transport::Spdy(protocol) });
    }
    let wanted = handshake::values(headers, &http::header::SEC_WEBSOCKET_PROTOCOL);
    if wanted.iter().any(|name| name.starts_with("SPDY/3.1+") && name.ends_with(".k8s.io")) {
        let (accept, wanted) = handshake::websocket(method, headers)?;
        let protocol = handshake::choose(&wanted, TUNNEL_PROTOCOLS)?;
        return Ok(Negotiated { transport: Transport::Tunnel { accept, protocol } });
    }
    let ports = ports(query)?;
    let (accept, wanted) = handshake::websocket(method, headers)?;
    let known = |name: &String| CHANNEL_PROTOCOLS.iter().copied().find(|known| known == name);
    let protocol = wanted.iter().find_map(known);
    if protocol.is_none() && !wanted.is_empty() {
        return Err(handshake::unknown_subprotocols(&wanted, CHANNEL_PROTOCOLS));
    }
    Ok(Negotiated { transport: Transport::Channels { accept, protocol, ports } })
}

/// The ports that a query names (cri-streaming portforward NewV4Options).
fn ports(query: Option<&str>) -> Result<Vec<u16>, Refusal> {
    let values = handshake::query_values(query, PORT);
    if values.is_empty() {
        return Err(Refusal::bad_request("query parameter \"port\" is required"));
    }
    let mut ports = Vec::new();
    for value in &values {
        if value.is_empty() {
            return Err(Refusal::bad_request("query parameter \"port\" cannot be empty"));
        }
        for port in value.split(',') {
            match port.parse() {
                Ok(0) => return Err(Refusal::bad_request(format!("port {value:?} must be > 0"))),
                Ok(port) => ports.push(port),
                Err(error) => {
                    return Err(Refusal::bad_request(format!(
                        "unable to parse {value:?} as a port: {error}"
                    )));
                }
            }
        }
    }
    if ports.len() > PORTS {
        let text = format!("{} ports are asked for, at most {PORTS} can be forwarded at once", ports.len());
        return Err(Refusal::bad_request(text));
    }
    Ok(ports)
}

/// One connection to a port of the pod.
pub struct ForwardedStream {
    /// The port.
    pub port: u16,
    /// The connection's bytes. Copy both ways, and shut down or drop it at the end.
    pub data: DuplexStream,
    /// Says what went wrong.
    pub error: ErrorSender,
}

/// Where the client reads what went wrong with its connection. Dropped, it says that nothing did.
pub struct ErrorSender {
    link: Arc<Link>,
    data: u32,
    /// The client has broken its connection off.
    broken_off: Arc<AtomicBool>,
    writer: StreamWriter,
    /// Ends a WebSocket of channels with its last connection.
    _last: Option<Arc<CloseAtLast>>,
}

impl ErrorSender {
    /// Says what went wrong and breaks the connection off: that nobody listens on the port, say. kubectl ends all of
    /// its forwarding at a word here (client-go tools/portforward handleConnection), so an end of the connection that
    /// is the program's own affair is better passed on in silence. Where the client broke off itself, which kubectl
    /// does at the end of many a good connection, nothing is said.
    pub async fn fail(mut self, why: &str) -> Result<(), Error> {
        if self.broken_off.load(Ordering::Relaxed) {
            return self.finish().await;
        }
        let why: String = why.chars().take(MESSAGE).collect();
        self.writer.send_last(why.as_bytes());
        self.link.reset(self.data);
        self.flush().await
    }

    /// Breaks the connection off without a word: at the first one kubectl would end all of its connections, and it
    /// resets a stream itself as soon as the server has closed its side (client-go portforward.go handleConnection).
    pub async fn break_off(mut self) -> Result<(), Error> {
        self.writer.send_last(&[]);
        self.link.reset(self.data);
        self.flush().await
    }

    /// Says that nothing went wrong, once everything was written.
    pub async fn finish(mut self) -> Result<(), Error> {
        self.writer.send_last(&[]);
        self.flush().await
    }

    async fn flush(&mut self) -> Result<(), Error> {
        let flushed = self.writer.flush().await;
        flushed.map_err(|_| self.link.closed().now().unwrap_or(Ended::Gone).into())
    }
}

struct CloseAtLast(Arc<Link>);

impl Drop for CloseAtLast {
    fn drop(&mut self) {
        self.0.close();
    }
}

/// The connections of one client.
pub struct Forwarding {
    /// New connections. Dropped, it ends the forwarding, and with it what is still open.
    pub streams: mpsc::Receiver<ForwardedStream>,
    /// Tells when the client is gone.
    pub closed: Closed,
}

impl Negotiated {
    /// What carries it, for logs.
    pub fn transport(&self) -> &'static str {
        match self.transport {
            Transport::Spdy(_) => "SPDY",
            Transport::Tunnel { .. } | Transport::Channels { .. } => "WebSocket",
        }
    }

    /// The protocol, for logs.
    pub fn protocol(&self) -> &'static str {
        match self.transport {
            Transport::Spdy(protocol) | Transport::Tunnel { protocol, .. } => protocol,
            Transport::Channels { protocol, .. } => protocol.unwrap_or_default(),
        }
    }

    /// The answer that upgrades the connection.
    pub fn response<B: Default>(&self) -> Response<B> {
        match &self.transport {
            Transport::Spdy(protocol) => handshake::spdy_response(protocol),
            Transport::Tunnel { accept, protocol } => handshake::websocket_response(accept, Some(protocol)),
            Transport::Channels { accept, protocol, .. } => handshake::websocket_response(accept, *protocol),
        }
    }

    /// Takes the upgraded connection.
    pub async fn accept<IO>(self, io: IO, settings: Settings) -> Forwarding
    where
        IO: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        match self.transport {
            Transport::Spdy(_) => forward_spdy(io, settings),
            Transport::Tunnel { .. } => forward_spdy(Tunnel::new(io).await, settings),
            Transport::Channels { protocol, ports, .. } => {
                forward_channels(io, protocol.unwrap_or_default(), &ports, settings).await
            }
        }
    }
}

async fn forward_channels<IO>(io: IO, protocol: &str, ports: &[u16], settings: Settings) -> Forwarding
where
    IO: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let coding = if protocol.contains("base64.") { Coding::Base64 } else { Coding::Binary };
    let number = 2 * ports.len() as u8;
    let link = websocket::serve_channels(io, Channels { coding, close: false, number }, settings).await;
    let (sender, streams) = mpsc::channel(ports.len().max(1));
    let last = Arc::new(CloseAtLast(link.clone()));
    for (port, data) in ports.iter().copied().zip((0..).step_by(2)) {
        let (reader, writer) = link.open(data);
        let error = link.open(data + 1).1;
        link.push_data(data, &port.to_le_bytes());
        link.push_data(data + 1, &port.to_le_bytes());
        let broken_off = link.broken_off(data);
        let error =
            ErrorSender { link: link.clone(), data, broken_off, writer: error, _last: Some(last.clone()) };
        let _ = sender.try_send(ForwardedStream { port, data: DuplexStream { reader, writer }, error });
    }
    Forwarding { streams, closed: link.closed() }
}

fn forward_spdy<IO>(io: IO, settings: Settings) -> Forwarding
where
    IO: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (link, incoming) = spdy::serve(io, settings, |headers| describe(headers).is_some());
    let (sender, streams) = mpsc::channel(WAITING);
    let closed = link.closed();
    tokio::spawn(pair(link, incoming, sender, settings));
    Forwarding { streams, closed }
}

/// What one stream is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Data,
    Error,
}

/// The port and the role of a stream, if it has both and its request has a name of no more than [`REQUEST_ID_BYTES`].
fn describe(headers: &Headers) -> Option<(u16, Role)> {
    if headers.get(REQUEST_ID).is_some_and(|id| id.len() > REQUEST_ID_BYTES) {
        return None;
    }
    let port = headers.get(PORT)?.parse().ok().filter(|port| *port > 0)?;
    match headers.get(STREAM_TYPE)? {
        "data" => Some((port, Role::Data)),
        "error" => Some((port, Role::Error)),
        _ => None,
    }
}

/// The request that a stream belongs to. Old clients name none: their data stream follows its error stream
/// (cri-streaming portforward/httpstream.go requestID).
fn request_id(headers: &Headers, role: Role, stream: u32) -> String {
    match (headers.get(REQUEST_ID), role) {
        (Some(id), _) if !id.is_empty() => id.to_owned(),
        (_, Role::Error) => stream.to_string(),
        (_, Role::Data) => stream.saturating_sub(2).to_string(),
    }
}

/// One stream of a connection that waits for the other.
struct Half {
    role: Role,
    port: u16,
    id: u32,
    /// None of an error stream: what a client says on it is thrown away.
    reader: Option<StreamReader>,
    writer: StreamWriter,
    until: Instant,
}

/// Puts data and error streams together. There are never more halves than open streams; an error stream that waits holds
/// nothing, and of data streams no more than [`UNPAIRED`] wait.
async fn pair(
    link: Arc<Link>,
    mut incoming: mpsc::Receiver<spdy::Incoming>,
    sender: mpsc::Sender<ForwardedStream>,
    settings: Settings,
) {
    let mut halves: HashMap<String, Half> = HashMap::new();
    loop {
        let until = halves.values().map(|half| half.until).min();
        let opened = tokio::select! {
            opened = incoming.recv() => opened,
            () = sender.closed() => break,
            () = sleep_until(until.unwrap_or_else(Instant::now)), if until.is_some() => {
                let now = Instant::now();
                for (id, half) in halves.extract_if(|_, half| half.until <= now) {
                    give_up(&link, half, &format!("request {id} timed out waiting for streams"));
                }
                continue;
            }
        };
        let Some(stream) = opened else { return };
        let Some((port, role)) = describe(&stream.headers) else { continue };
        let request = request_id(&stream.headers, role, stream.id);
        let DuplexStream { reader, writer } = stream.stream;
        let reader = (role == Role::Data).then_some(reader);
        let until = Instant::now() + settings.creation;
        let half = Half { role, port, id: stream.id, reader, writer, until };
        let waiting = halves.values().filter(|half| half.role == Role::Data).count();
        match halves.entry(request) {
            Entry::Vacant(_) if role == Role::Data && waiting >= UNPAIRED => {
                tracing::debug!(port, "too many data streams without an error stream: one is reset");
                link.reset(half.id);
            }
            Entry::Vacant(place) => {
                place.insert(half);
            }
            Entry::Occupied(place) if place.get().role == role => {
                let name = if role == Role::Data { "data" } else { "error" };
                let why = format!(
                    "error processing stream for request {}: {name} stream already assigned",
                    place.key()
                );
                link.reset(half.id);
                give_up(&link, place.remove(), &why);
            }
            Entry::Occupied(place) => {
                let other = place.remove();
                let (data, error) = if role == Role::Data { (half, other) } else { (other, half) };
                hand_over(&link, &sender, data, error.writer);
            }
        }
    }
    link.close();
}

fn hand_over(link: &Arc<Link>, sender: &mpsc::Sender<ForwardedStream>, data: Half, error: StreamWriter) {
    let Half { port, id, reader: Some(reader), writer, .. } = data else { return };
    let broken_off = link.broken_off(id);
    let error = ErrorSender { link: link.clone(), data: id, broken_off, writer: error, _last: None };
    let forwarded = ForwardedStream { port, data: DuplexStream { reader, writer }, error };
    if let Err(refused) = sender.try_send(forwarded) {
        let mut refused = refused.into_inner();
        refused.error.writer.send_last(b"too many connections wait to be forwarded");
        link.reset(id);
    }
}

/// Says on the stream that is there that the other one will not be waited for.
fn give_up(link: &Link, mut half: Half, why: &str) {
    match half.role {
        Role::Error => half.writer.send_last(why.as_bytes()),
        Role::Data => link.reset(half.id),
    }
}
