//! Clients, as kubectl would be.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress};
use futures::{SinkExt, StreamExt};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::sync::Notify;
use tokio::time::timeout;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::Role;

use crate::server::streams::Settings;
use crate::server::streams::spdy::headers::DICTIONARY;

/// Nothing in these tests takes as long.
pub const SOON: Duration = Duration::from_secs(20);

/// Settings that make rules visible in a test's time.
pub const QUICK: Settings = Settings {
    creation: Duration::from_millis(200),
    idle: Duration::from_secs(60),
    stall: Duration::from_millis(300),
    probe: Duration::from_millis(50),
    open: 128,
    total: 1000,
};

pub trait Io: AsyncRead + AsyncWrite + Unpin + Send + 'static {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send + 'static> Io for T {}

#[derive(Debug, Default, Clone)]
pub struct SeenStream {
    pub replied: bool,
    pub data: Vec<u8>,
    pub fin: bool,
    pub reset: Option<u32>,
    pub largest: usize,
}

#[derive(Debug, Default)]
pub struct Seen {
    pub streams: HashMap<u32, SeenStream>,
    /// Streams in the order of their ends.
    pub ends: Vec<u32>,
    pub pings: Vec<u32>,
    pub goaway: Option<u32>,
    pub eof: bool,
}

impl Seen {
    pub fn stream(&self, id: u32) -> SeenStream {
        self.streams.get(&id).cloned().unwrap_or_default()
    }
}

pub struct SpdyClient<IO> {
    writer: WriteHalf<IO>,
    zlib: Compress,
    next: u32,
    seen: Arc<(Mutex<Seen>, Notify)>,
    reader: Option<ReadHalf<IO>>,
}

pub fn compressor() -> Compress {
    let mut zlib = Compress::new(Compression::default(), true);
    zlib.set_dictionary(&DICTIONARY).unwrap();
    zlib
}

pub fn syn_stream(zlib: &mut Compress, id: u32, headers: &[(&str, &str)]) -> Vec<u8> {
    let mut block = (headers.len() as u32).to_be_bytes().to_vec();
    for (name, value) in headers {
        for text in [name, value] {
            block.extend((text.len() as u32).to_be_bytes());
            block.extend(text.as_bytes());
        }
    }
    let mut packed = Vec::with_capacity(block.len() + 1024);
    zlib.compress_vec(&block, &mut packed, FlushCompress::Sync).unwrap();
    let mut payload = id.to_be_bytes().to_vec();
    payload.extend([0; 6]);
    payload.extend(packed);
    control(1, 0, &payload)
}

pub fn control(kind: u16, flags: u8, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![0x80, 3];
    frame.extend(kind.to_be_bytes());
    frame.extend((u32::from(flags) << 24 | payload.len() as u32).to_be_bytes());
    frame.extend(payload);
    frame
}

pub fn data(id: u32, bytes: &[u8], fin: bool) -> Vec<u8> {
    let mut frame = id.to_be_bytes().to_vec();
    frame.extend((u32::from(fin) << 24 | bytes.len() as u32).to_be_bytes());
    frame.extend(bytes);
    frame
}

impl<IO: Io> SpdyClient<IO> {
    /// A client that reads all the time.
    pub fn new(io: IO) -> Self {
        let mut client = Self::stalled(io);
        client.read_on();
        client
    }

    /// A client that reads nothing yet.
    pub fn stalled(io: IO) -> Self {
        let (reader, writer) = tokio::io::split(io);
        Self { writer, zlib: compressor(), next: 1, seen: Arc::default(), reader: Some(reader) }
    }

    pub fn read_on(&mut self) {
        let reader = self.reader.take().unwrap();
        tokio::spawn(read(reader, self.seen.clone()));
    }

    pub async fn send(&mut self, bytes: &[u8]) {
        self.writer.write_all(bytes).await.unwrap();
    }

    pub async fn open(&mut self, headers: &[(&str, &str)]) -> u32 {
        let id = self.next;
        self.next += 2;
        let frame = syn_stream(&mut self.zlib, id, headers);
        self.send(&frame).await;
        id
    }

    pub async fn data(&mut self, id: u32, bytes: &[u8], fin: bool) {
        self.send(&data(id, bytes, fin)).await;
    }

    pub async fn ping(&mut self, id: u32) {
        self.send(&control(6, 0, &id.to_be_bytes())).await;
    }

    pub async fn until(&self, what: impl FnMut(&Seen) -> bool) {
        until(&self.seen, what).await;
    }

    pub fn look<T>(&self, what: impl FnOnce(&Seen) -> T) -> T {
        what(&self.seen.0.lock().unwrap())
    }

    pub fn watch(&self) -> Arc<(Mutex<Seen>, Notify)> {
        self.seen.clone()
    }
}

pub async fn until(seen: &(Mutex<Seen>, Notify), mut what: impl FnMut(&Seen) -> bool) {
    let wait = async {
        loop {
            let notified = seen.1.notified();
            if what(&seen.0.lock().unwrap()) {
                return;
            }
            notified.await;
        }
    };
    if timeout(SOON, wait).await.is_err() {
        let seen = seen.0.lock().unwrap();
        let sizes: Vec<_> = seen.streams.iter().map(|(id, s)| (id, s.data.len(), s.fin, s.reset)).collect();
        panic!(
            "waited in vain; streams {sizes:?}, pings {:?}, goaway {:?}, eof {}",
            seen.pings, seen.goaway, seen.eof
        );
    }
}

async fn read<R: AsyncRead + Unpin>(mut reader: R, seen: Arc<(Mutex<Seen>, Notify)>) {
    let mut zlib = Decompress::new(true);
    loop {
        let mut head = [0; 8];
        if reader.read_exact(&mut head).await.is_err() {
            seen.0.lock().unwrap().eof = true;
            seen.1.notify_waiters();
            return;
        }
        let first = u32::from_be_bytes(head[..4].try_into().unwrap());
        let second = u32::from_be_bytes(head[4..].try_into().unwrap());
        let mut payload = vec![0; (second & 0xff_ffff) as usize];
        if reader.read_exact(&mut payload).await.is_err() {
            continue;
        }
        let word = |at: usize| u32::from_be_bytes(payload[at..at + 4].try_into().unwrap());
        let mut seen_now = seen.0.lock().unwrap();
        if first >> 31 == 0 {
            let stream = seen_now.streams.entry(first).or_default();
            assert!(stream.replied && !stream.fin && stream.reset.is_none(), "data out of place on {first}");
            stream.data.extend(&payload);
            stream.largest = stream.largest.max(payload.len());
            if second >> 24 == 1 {
                stream.fin = true;
                seen_now.ends.push(first);
            }
        } else {
            assert_eq!(first >> 16, 0x8003, "the version");
            match first & 0xffff {
                2 => {
                    let mut out = [0; 64];
                    let before = zlib.total_out();
                    if let Err(error) = zlib.decompress(&payload[4..], &mut out, FlushDecompress::Sync) {
                        assert!(error.needs_dictionary().is_some());
                        zlib.set_dictionary(&DICTIONARY).unwrap();
                        let read = zlib.total_in() as usize;
                        zlib.decompress(&payload[4 + read..], &mut out, FlushDecompress::Sync).unwrap();
                    }
                    assert_eq!((zlib.total_out() - before, &out[..4]), (4, &[0; 4][..]));
                    seen_now.streams.entry(word(0)).or_default().replied = true;
                }
                3 => {
                    seen_now.streams.entry(word(0)).or_default().reset = Some(word(4));
                    seen_now.ends.push(word(0));
                }
                6 => seen_now.pings.push(word(0)),
                7 => seen_now.goaway = Some(word(4)),
                kind => panic!("frame of kind {kind}"),
            }
        }
        drop(seen_now);
        seen.1.notify_waiters();
    }
}

pub type WsClient<IO> = WebSocketStream<IO>;

pub async fn websocket<IO: Io>(io: IO) -> WsClient<IO> {
    WebSocketStream::from_raw_socket(io, Role::Client, None).await
}

pub async fn send<IO: Io>(client: &mut WsClient<IO>, bytes: Vec<u8>) {
    timeout(SOON, client.send(Message::Binary(bytes.into()))).await.unwrap().unwrap();
}

/// The next message that is no ping.
pub async fn receive<IO: Io>(client: &mut WsClient<IO>) -> Option<Message> {
    loop {
        match timeout(SOON, client.next()).await.expect("a message soon") {
            Some(Ok(Message::Ping(_) | Message::Pong(_))) => {}
            Some(Ok(message)) => return Some(message),
            Some(Err(error)) => panic!("{error}"),
            None => return None,
        }
    }
}

/// What came on each channel, until the server says goodbye.
pub async fn channels<IO: Io>(client: &mut WsClient<IO>) -> HashMap<u8, Vec<u8>> {
    let mut channels: HashMap<u8, Vec<u8>> = HashMap::new();
    loop {
        match receive(client).await {
            Some(Message::Close(close)) => {
                assert_eq!(u16::from(close.unwrap().code), 1000);
                assert!(receive(client).await.is_none());
                return channels;
            }
            Some(message) => {
                let bytes = message.into_data();
                channels.entry(bytes[0]).or_default().extend(&bytes[1..]);
            }
            None => panic!("no goodbye"),
        }
    }
}

/// Bytes that are not all the same.
pub fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_u32;
    let step = |_| {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state as u8
    };
    (0..length).map(step).collect()
}
