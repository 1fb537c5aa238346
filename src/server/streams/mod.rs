//! What kubectl exec, attach, cp and port-forward travel on: SPDY/3.1 and WebSockets, as a kubelet serves them.
//!
//! [`remote_command::negotiate`] and [`port_forward::negotiate`] judge a request; what they return answers it with 101
//! and then takes the upgraded connection (`accept`).
//!
//! Each connection is one task ([`drive`]) around one [`link::Link`], which holds what every stream has received and
//! what waits to be sent. Its rules, the same for both transports:
//!
//! - **Received.** A stream holds up to [`STREAM_BUFFER`]. When one is full nothing more is read from the connection
//!   (neither protocol has flow control that a client heeds), so its client is slowed down by TCP, and its other
//!   streams with it. They wait for [`Settings::stall`] at most: then the stream that nobody reads is reset, what still
//!   comes for it is thrown away, and the others go on. Every [`Settings::probe`] of such a wait a ping is sent, since a client
//!   that is gone is then only noticed by writing. A stream whose reader was dropped is never full.
//! - **Sent.** All streams together hold up to [`OUTBOX`]; a writer waits until there is room. Sending never waits
//!   for receiving. Answers to the client (pings, replies, resets) come on top, up to [`CONTROL_BACKLOG`]: a client that
//!   asks more without taking the answers is not read.
//! - **The end.** [`link::Link::close`] lets everything that was queued reach the client, says goodbye, and reads on for
//!   [`LINGER`], since closing a socket with unread bytes would destroy what the client has not taken yet. A client that
//!   takes nothing for [`DRAIN`] is left.

use std::time::Duration;

mod drive;
pub mod handshake;
mod link;
pub mod port_forward;
pub mod remote_command;
mod spdy;
mod stream;
mod websocket;

pub use stream::{Closed, DuplexStream, StreamReader, StreamWriter};

#[cfg(test)]
mod tests;

/// What one stream holds of what its reader has not taken: four times what Go's io.Copy sends at once.
pub const STREAM_BUFFER: usize = 128 * 1024;

/// What a connection holds of what is to be sent: enough that its task finds something each time it runs.
pub const OUTBOX: usize = 256 * 1024;

/// Most answers to the client that wait to be sent: some thousands of pings.
pub const CONTROL_BACKLOG: usize = 64 * 1024;

/// Most bytes of a stream in one frame or message: what Go's io.Copy sends, and the buffer of kubectl's WebSockets
/// (client-go transport/websocket DataBufferSize).
pub const CHUNK: usize = 32 * 1024;

/// How long a client may take to close its side after ours; kubectl needs one round trip.
pub const LINGER: Duration = Duration::from_secs(5);

/// How long a connection that is being closed may take to accept the next frame: 32 KiB in 30 s is a slow modem.
pub const DRAIN: Duration = Duration::from_secs(30);

/// Limits of one connection.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// How long the client may take to open the streams that belong together.
    pub creation: Duration,
    /// A connection on which nothing moves for this long is closed.
    pub idle: Duration,
    /// How long a stream that nobody reads may hold up the others of its connection.
    pub stall: Duration,
    /// How often a client that is not read because of that is asked whether it lives.
    pub probe: Duration,
    /// Most streams at once, those that only the client has not closed included.
    pub open: usize,
    /// Most streams in the life of the connection.
    pub total: u64,
}

/// cri-streaming remotecommand DefaultStreamCreationTimeout.
const CREATION: Duration = Duration::from_secs(30);

/// kubelet's streamingConnectionIdleTimeout (pkg/kubelet/apis/config/v1beta1/defaults.go).
const IDLE: Duration = Duration::from_secs(4 * 60 * 60);

/// A socket whose other end is gone tells at the second try.
const PROBE: Duration = Duration::from_secs(15);

impl Settings {
    /// For exec and attach. Standard input may be left unread for as long as a command likes (`sleep 3600; cat`), and
    /// there is no other stream that matters, so its stall is the idle time.
    pub const REMOTE_COMMAND: Self =
        Self { creation: CREATION, idle: IDLE, stall: IDLE, probe: PROBE, open: 16, total: 16 };

    /// For port-forward: 256 connections at once. The Node forwards no more than 200 of all clients, and only those and a
    /// few streams that wait for their other half hold anything ([`port_forward`]). A server in the pod that takes nothing
    /// for 30 s loses its connection, rather than all others.
    pub const PORT_FORWARD: Self = Self {
        creation: CREATION,
        idle: IDLE,
        stall: Duration::from_secs(30),
        probe: PROBE,
        open: 512,
        total: 1 << 20,
    };
}

/// Why a connection has ended.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Ended {
    /// This side has finished.
    #[error("finished")]
    Finished,
    /// The client said goodbye or closed the connection.
    #[error("the client closed the connection")]
    Gone,
    /// The connection broke.
    #[error("the connection broke: {0}")]
    Broken(String),
    /// The client does not keep to the protocol.
    #[error("the client broke the protocol: {0}")]
    Violation(&'static str),
    /// Nothing moved for [`Settings::idle`].
    #[error("nothing was sent or received for {}", humantime::format_duration(*.0))]
    Idle(Duration),
    /// The client took nothing while the connection was being closed.
    #[error("the client took nothing for {} while its connection was being closed", humantime::format_duration(*.0))]
    Stuck(Duration),
}

/// Why an upgraded connection could not be used, or what was to be sent did not arrive.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The connection has ended.
    #[error(transparent)]
    Ended(#[from] Ended),
    /// The client did not open what it asked for.
    #[error("the client did not open the stream {missing} within {}", humantime::format_duration(*.within))]
    Missing {
        /// The first stream that is missing.
        missing: &'static str,
        /// How long it had.
        within: Duration,
    },
    /// The client opened a stream twice.
    #[error("the client opened the stream {0} twice")]
    Twice(&'static str),
}
