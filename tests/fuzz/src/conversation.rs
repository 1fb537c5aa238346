//! Conversations with the Node's streams, in which the client's whole part is given: the readers of SPDY and WebSockets
//! take it, and a program or a server behind them does what it would do. [`remote_command`] and [`port_forward`] are the
//! two kinds; both panic when it does not end.
//!
//! The first byte of the input chooses transport and protocol; the rest is what the client sends once it has its 101.
//! tests/fuzz_seeds.rs holds the recorded conversations (seeds/) with the same two functions.

use std::time::Duration;

use http::{HeaderMap, HeaderName, HeaderValue, Method};
use jiriaf_pilot::server::streams::remote_command::{self, RemoteCommand, Status};
use jiriaf_pilot::server::streams::{Settings, port_forward};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};
use tokio::task::JoinSet;
use tokio::time::timeout;

/// Limits of a busy client in the time of a fuzzer: a stream that nobody reads is given up at once.
const SETTINGS: Settings = Settings {
    creation: Duration::from_millis(50),
    idle: Duration::from_secs(4),
    stall: Duration::from_millis(4),
    probe: Duration::from_millis(2),
    open: 16,
    total: 64,
};

/// No conversation takes longer, unless somebody waits for what never comes.
const LIMIT: Duration = Duration::from_secs(10);

/// What a socket holds on its way.
const WIRE: usize = 16 * 1024;

/// Most that a program reads; it leaves the rest.
const READ: u64 = 64 * 1024;

/// What an exec or attach is asked for by: the protocol, whether it is a WebSocket's, and the query.
const REMOTE_COMMANDS: [(&str, bool, &str); 8] = [
    ("v4.channel.k8s.io", false, "input=1&output=1&error=1"),
    ("v4.channel.k8s.io", false, "input=1&output=1&tty=1"),
    ("v2.channel.k8s.io", false, "output=1"),
    ("channel.k8s.io", false, "input=1&output=1"),
    ("v5.channel.k8s.io", true, "input=1&output=1&error=1"),
    ("v5.channel.k8s.io", true, "input=1&output=1&tty=1"),
    ("v4.base64.channel.k8s.io", true, "input=1&output=1"),
    ("channel.k8s.io", true, "output=1&error=1"),
];

/// The same of a port-forward.
const PORT_FORWARDS: [(&str, bool, &str); 4] = [
    ("portforward.k8s.io", false, ""),
    ("SPDY/3.1+portforward.k8s.io", true, ""),
    ("v4.channel.k8s.io", true, "port=80,81&port=8080"),
    ("v4.base64.channel.k8s.io", true, "port=80"),
];

/// What became of a conversation.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Heard {
    /// Whether the streams that were asked for came about; of a port-forward, how many connections.
    pub begun: usize,
    /// What the program read of its input; of a port-forward, what all servers did.
    pub input: Vec<u8>,
    /// Bytes that the client was sent.
    pub sent: usize,
}

fn headers(protocol: &'static str, websocket: bool) -> HeaderMap {
    let pairs: &[(&'static str, &'static str)] = if websocket {
        &[
            ("connection", "Upgrade"),
            ("upgrade", "websocket"),
            ("sec-websocket-version", "13"),
            ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="),
            ("sec-websocket-protocol", protocol),
        ]
    } else {
        &[("connection", "Upgrade"), ("upgrade", "SPDY/3.1"), ("x-stream-protocol-version", protocol)]
    };
    let pairs =
        pairs.iter().map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value)));
    pairs.collect()
}

/// Takes all and reads what comes, until the other side is done.
async fn client(mut far: DuplexStream, bytes: &[u8]) -> usize {
    let (mut reader, mut writer) = tokio::io::split(&mut far);
    let sending = async {
        let _ = writer.write_all(bytes).await;
        // What was sent is answered before the goodbye.
        for _ in 0..64 {
            tokio::task::yield_now().await;
        }
        let _ = writer.shutdown().await;
    };
    let reading = async {
        let (mut sent, mut buffer) = (0, vec![0; 8192]);
        while let Ok(n @ 1..) = reader.read(&mut buffer).await {
            sent += n;
        }
        sent
    };
    tokio::join!(sending, reading).1
}

fn run<T>(conversation: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
    let limited = async { timeout(LIMIT, conversation).await };
    match runtime.map(|runtime| runtime.block_on(limited)) {
        Ok(Ok(heard)) => heard,
        Ok(Err(_)) => panic!("the conversation does not end"),
        Err(error) => panic!("no runtime: {error}"),
    }
}

/// An exec: the program reads, writes that back and ends.
pub fn remote_command(input: &[u8]) -> Heard {
    let Some((choice, bytes)) = input.split_first() else { return Heard::default() };
    let (protocol, websocket, query) = REMOTE_COMMANDS[usize::from(*choice) % REMOTE_COMMANDS.len()];
    let headers = headers(protocol, websocket);
    let negotiated = remote_command::negotiate(&Method::GET, &headers, Some(query));
    run(async {
        let Ok(negotiated) = negotiated else { panic!("{protocol} is not taken") };
        let (near, far) = tokio::io::duplex(WIRE);
        let program = async {
            match negotiated.accept(near, SETTINGS).await {
                Ok(session) => Heard { begun: 1, input: program(session).await, sent: 0 },
                Err(_) => Heard::default(),
            }
        };
        let (heard, sent) = tokio::join!(program, client(far, bytes));
        Heard { sent, ..heard }
    })
}

async fn program(session: RemoteCommand) -> Vec<u8> {
    let RemoteCommand { stdin, stdout, stderr, mut resize, status, mut closed } = session;
    let mut input = Vec::new();
    if let Some(stdin) = stdin {
        let _ = stdin.take(READ).read_to_end(&mut input).await;
    }
    for mut output in [stdout, stderr].into_iter().flatten() {
        let _ = output.write_all(&input).await;
    }
    while resize.try_recv().is_ok() {}
    let _ = status.send(Status::Exit(3)).await;
    closed.wait().await;
    input
}

/// A port-forward: the server at an even port reads and writes that back, nobody listens at an odd one.
pub fn port_forward(input: &[u8]) -> Heard {
    let Some((choice, bytes)) = input.split_first() else { return Heard::default() };
    let (protocol, websocket, query) = PORT_FORWARDS[usize::from(*choice) % PORT_FORWARDS.len()];
    let headers = headers(protocol, websocket);
    let negotiated = port_forward::negotiate(&Method::GET, &headers, Some(query));
    run(async {
        let Ok(negotiated) = negotiated else { panic!("{protocol} is not taken") };
        let (near, far) = tokio::io::duplex(WIRE);
        let forwarding = async {
            let mut forwarding = negotiated.accept(near, SETTINGS).await;
            let (mut servers, mut heard) = (JoinSet::new(), Heard::default());
            while let Some(stream) = forwarding.streams.recv().await {
                heard.begun += 1;
                servers.spawn(server(stream));
            }
            while let Some(input) = servers.join_next().await {
                match input {
                    Ok(input) => heard.input.extend(input),
                    Err(error) => panic!("{error}"),
                }
            }
            forwarding.closed.wait().await;
            heard
        };
        let (heard, sent) = tokio::join!(forwarding, client(far, bytes));
        Heard { sent, ..heard }
    })
}

async fn server(stream: port_forward::ForwardedStream) -> Vec<u8> {
    let port_forward::ForwardedStream { port, mut data, error } = stream;
    let mut input = Vec::new();
    if port % 2 == 1 {
        let _ = error.fail("nobody listens").await;
        return input;
    }
    let read = (&mut data.reader).take(READ).read_to_end(&mut input).await;
    let _ = data.writer.write_all(&input).await;
    let _ = data.writer.shutdown().await;
    let _ = if read.is_ok() { error.finish().await } else { error.break_off().await };
    input
}
