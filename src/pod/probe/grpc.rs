//! A gRPC health check: one call of `grpc.health.v1.Health/Check` on a connection of its own, without TLS. Texts are those
//! of kubelet's `probe/grpc/grpc.go`.
//!
//! Written here and not with h2 or tonic: one call needs seven frames of HTTP/2 (RFC 9113), and the crate would be some
//! hundred kilobytes of each supervisor's binary.

use std::io;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout_at};

use super::hpack;
use super::prober::go_duration;
use crate::pod::handler::connect;
use crate::pod::handler::http::{KUBERNETES, bracketed};

/// What a connection begins with, then our settings: no dynamic table for headers (so none has to be kept), no pushes.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\
    \x00\x00\x0c\x04\x00\x00\x00\x00\x00\
    \x00\x01\x00\x00\x00\x00\
    \x00\x02\x00\x00\x00\x00";

/// The largest frame that either side may send unasked (SETTINGS_MAX_FRAME_SIZE).
const FRAME_BYTES: usize = 16_384;

/// An answer is a few bytes; a header block with an error's text some kilobytes (gRPC's own default for it is 8 KiB).
const ANSWER_BYTES: usize = 16 * 1024;

/// A service's name fits into one frame, with all that is around it.
const SERVICE_BYTES: usize = 16_000;

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const CONTINUATION: u8 = 9;

const END_STREAM: u8 = 1;
const ACK: u8 = 1;
const END_HEADERS: u8 = 4;
const PADDED: u8 = 8;
const PRIORITY: u8 = 32;

/// The codes of gRPC by number (google.golang.org/grpc/codes).
const CODES: [&str; 17] = [
    "OK",
    "Canceled",
    "Unknown",
    "InvalidArgument",
    "DeadlineExceeded",
    "NotFound",
    "AlreadyExists",
    "PermissionDenied",
    "ResourceExhausted",
    "FailedPrecondition",
    "Aborted",
    "OutOfRange",
    "Unimplemented",
    "Internal",
    "Unavailable",
    "DataLoss",
    "Unauthenticated",
];
const UNKNOWN: u32 = 2;
const DEADLINE_EXCEEDED: u32 = 4;
const UNIMPLEMENTED: u32 = 12;
const INTERNAL: u32 = 13;
const UNAVAILABLE: u32 = 14;

/// Why a call gave no answer.
#[derive(Debug, PartialEq, Eq)]
struct Status {
    code: u32,
    message: String,
}

impl Status {
    fn new(code: u32, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }
}

/// Whether the service says that it serves.
///
/// # Errors
/// When it does not, or does not answer: why, as a kubelet says it.
pub(super) async fn check(host: &str, port: u16, service: &str, timeout: Duration) -> Result<(), String> {
    let deadline = Instant::now() + timeout;
    let (address, limit) = (format!("{}:{port}", bracketed(host)), go_duration(timeout));
    if service.len() > SERVICE_BYTES {
        return Err(format!(
            "error: health rpc probe failed: the service's name is longer than {SERVICE_BYTES} bytes"
        ));
    }
    let mut connection = match timeout_at(deadline, Connection::open(host, port)).await {
        Ok(Ok(connection)) => connection,
        Ok(Err(error)) => return Err(format!("error: failed to connect service at {address:?}: {error}")),
        Err(_) => {
            return Err(format!(
                "timeout: failed to connect service {address:?} within {limit}: context deadline exceeded"
            ));
        }
    };
    let late = Status::new(DEADLINE_EXCEEDED, "");
    match timeout_at(deadline, connection.call(&address, service, timeout)).await.unwrap_or(Err(late)) {
        Ok(1) => Ok(()),
        Ok(status) => {
            let name = match status {
                0 => "UNKNOWN".to_owned(),
                2 => "NOT_SERVING".to_owned(),
                3 => "SERVICE_UNKNOWN".to_owned(),
                other => other.to_string(),
            };
            Err(format!("service unhealthy (responded with {name:?})"))
        }
        Err(Status { code: UNIMPLEMENTED, message }) => Err(format!(
            "error: this server does not implement the grpc health protocol (grpc.health.v1.Health): {message}"
        )),
        Err(Status { code: DEADLINE_EXCEEDED, .. }) => {
            Err(format!("timeout: health rpc did not complete within {limit}"))
        }
        Err(Status { code, message }) => {
            let name = usize::try_from(code).ok().and_then(|code| CODES.get(code));
            let name = name.map_or_else(|| format!("Code({code})"), |name| (*name).to_owned());
            Err(format!("error: health rpc probe failed: rpc error: code = {name} desc = {message}"))
        }
    }
}

struct Frame {
    kind: u8,
    flags: u8,
    stream: u32,
    payload: Vec<u8>,
}

struct Connection(BufReader<TcpStream>);

impl Connection {
    /// Connects, and waits for the server's settings: before them nobody knows what speaks there.
    async fn open(host: &str, port: u16) -> Result<Self, String> {
        let stream = connect(host, port).await.map_err(|error| error.to_string())?;
        let mut connection = Self(BufReader::with_capacity(1024, stream));
        connection.0.write_all(PREFACE).await.map_err(|error| error.to_string())?;
        let fail = |error: io::Error| format!("error reading server preface: {error}");
        let first = connection.read().await.map_err(fail)?;
        if first.kind != SETTINGS || first.flags & ACK != 0 || first.stream != 0 {
            return Err("error reading server preface: it does not speak HTTP/2".to_owned());
        }
        connection.write(SETTINGS, ACK, 0, &[]).await.map_err(fail)?;
        Ok(connection)
    }

    async fn read(&mut self) -> io::Result<Frame> {
        let mut head = [0; 9];
        self.0.read_exact(&mut head).await?;
        let [a, b, c, kind, flags, s1, s2, s3, s4] = head;
        let length = u32::from_be_bytes([0, a, b, c]) as usize;
        if length > FRAME_BYTES {
            return Err(io::Error::other("a frame is larger than was agreed on; is this HTTP/2?"));
        }
        let mut payload = vec![0; length];
        self.0.read_exact(&mut payload).await?;
        let stream = u32::from_be_bytes([s1, s2, s3, s4]) & 0x7fff_ffff;
        Ok(Frame { kind, flags, stream, payload })
    }

    async fn write(&mut self, kind: u8, flags: u8, stream: u32, payload: &[u8]) -> io::Result<()> {
        self.0.write_all(&frame(kind, flags, stream, payload)).await
    }

    /// Asks for the service's health: the number of a ServingStatus.
    async fn call(&mut self, address: &str, service: &str, timeout: Duration) -> Result<u64, Status> {
        let broken =
            |error: io::Error| Status::new(UNAVAILABLE, format!("connection error: desc = \"{error}\""));
        self.0.write_all(&request(address, service, timeout)).await.map_err(broken)?;
        let (mut body, mut block) = (Vec::new(), Vec::new());
        let mut headers = Vec::new();
        let mut last = false;
        loop {
            let frame = self.read().await.map_err(broken)?;
            match (frame.kind, frame.stream) {
                (SETTINGS, _) if frame.flags & ACK == 0 => {
                    self.write(SETTINGS, ACK, 0, &[]).await.map_err(broken)?;
                }
                (PING, _) if frame.flags & ACK == 0 => {
                    self.write(PING, ACK, 0, &frame.payload).await.map_err(broken)?;
                }
                (GOAWAY, _) => {
                    let taken =
                        frame.payload.first_chunk::<4>().is_some_and(|id| u32::from_be_bytes(*id) >= 1);
                    if !taken {
                        return Err(Status::new(UNAVAILABLE, "the server is going away"));
                    }
                }
                (RST_STREAM, 1) => {
                    let code = frame.payload.first_chunk::<4>().map_or(0, |code| u32::from_be_bytes(*code));
                    let text = format!("stream terminated by RST_STREAM with error code: {code}");
                    return Err(Status::new(INTERNAL, text));
                }
                (DATA, 1) => {
                    body.extend_from_slice(content(&frame)?);
                    last |= frame.flags & END_STREAM != 0;
                }
                (HEADERS | CONTINUATION, 1) => {
                    block.extend_from_slice(content(&frame)?);
                    last |= frame.kind == HEADERS && frame.flags & END_STREAM != 0;
                    if frame.flags & END_HEADERS != 0 {
                        let read = hpack::read(&std::mem::take(&mut block));
                        headers.extend(read.map_err(|error| Status::new(INTERNAL, error.to_string()))?);
                    }
                }
                _ => {}
            }
            if body.len() + block.len() > ANSWER_BYTES || headers.len() > ANSWER_BYTES / 32 {
                return Err(Status::new(INTERNAL, "the answer is too long"));
            }
            if last && block.is_empty() {
                return answer(&headers, &body);
            }
        }
    }
}

/// What is in a frame of data or headers, without padding and priority.
fn content(frame: &Frame) -> Result<&[u8], Status> {
    let bad = || Status::new(INTERNAL, "a frame is shorter than its padding");
    let mut content = frame.payload.as_slice();
    if frame.kind != CONTINUATION && frame.flags & PADDED != 0 {
        let (padding, rest) = content.split_first().ok_or_else(bad)?;
        content = rest.get(..rest.len().wrapping_sub(usize::from(*padding))).ok_or_else(bad)?;
    }
    if frame.kind == HEADERS && frame.flags & PRIORITY != 0 {
        content = content.get(5..).ok_or_else(bad)?;
    }
    Ok(content)
}

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let [_, a, b, c] = (payload.len() as u32).to_be_bytes();
    let mut frame = vec![a, b, c, kind, flags];
    frame.extend_from_slice(&stream.to_be_bytes());
    frame.extend_from_slice(payload);
    frame
}

/// The call: headers, then one message.
fn request(address: &str, service: &str, timeout: Duration) -> Vec<u8> {
    let mut block = Vec::new();
    // At most eight digits (gRPC over HTTP2, Timeout).
    let timeout = format!("{}S", timeout.as_secs().clamp(1, 99_999_999));
    let agent = format!("kube-probe/{KUBERNETES}");
    for (name, value) in [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", "/grpc.health.v1.Health/Check"),
        (":authority", address),
        ("content-type", "application/grpc"),
        ("user-agent", &agent),
        ("te", "trailers"),
        ("grpc-timeout", &timeout),
    ] {
        hpack::write(&mut block, name, value);
    }
    let mut all = frame(HEADERS, END_HEADERS, 1, &block);
    all.extend(frame(DATA, END_STREAM, 1, &message(service)));
    all
}

/// A HealthCheckRequest (field 1: the service's name) after its five bytes of length.
fn message(service: &str) -> Vec<u8> {
    let mut proto = Vec::new();
    if !service.is_empty() {
        proto.push(0x0a);
        let mut length = service.len();
        while length >= 128 {
            proto.push((length % 128) as u8 | 128);
            length /= 128;
        }
        proto.push(length as u8);
        proto.extend_from_slice(service.as_bytes());
    }
    let mut message = vec![0];
    message.extend_from_slice(&(proto.len() as u32).to_be_bytes());
    message.extend(proto);
    message
}

fn answer(headers: &[hpack::Header], body: &[u8]) -> Result<u64, Status> {
    let find = |wanted: &str| {
        let found = headers.iter().rev().find(|(name, _)| name == wanted.as_bytes());
        found.map(|(_, value)| String::from_utf8_lossy(value).into_owned())
    };
    let Some(code) = find("grpc-status") else {
        let status = find(":status").unwrap_or_default();
        // grpc/internal/transport/http_util.go, HTTPStatusConvTab.
        let code = match status.as_str() {
            "400" => INTERNAL,
            "401" => 16,
            "403" => 7,
            "404" => UNIMPLEMENTED,
            "429" | "502" | "503" | "504" => UNAVAILABLE,
            _ => UNKNOWN,
        };
        return Err(Status::new(code, format!("unexpected HTTP status code received from server: {status}")));
    };
    match code.parse() {
        Ok(0) => {}
        Ok(code) => {
            let text = find("grpc-message").unwrap_or_default();
            let text = percent_encoding::percent_decode_str(&text).decode_utf8_lossy().into_owned();
            return Err(Status::new(code, text));
        }
        Err(_) => return Err(Status::new(INTERNAL, format!("its grpc-status is {code:?}"))),
    }
    let unreadable = || Status::new(INTERNAL, "its answer is no HealthCheckResponse");
    let (head, rest) = body.split_first_chunk::<5>().ok_or_else(unreadable)?;
    let length = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize;
    let proto = rest.get(..length).filter(|_| head[0] == 0).ok_or_else(unreadable)?;
    serving_status(proto).ok_or_else(unreadable)
}

/// Field 1 of a HealthCheckResponse; what is left out is 0.
fn serving_status(mut proto: &[u8]) -> Option<u64> {
    let mut status = 0;
    while !proto.is_empty() {
        let tag = varint(&mut proto)?;
        match tag & 7 {
            0 => {
                let value = varint(&mut proto)?;
                if tag >> 3 == 1 {
                    status = value;
                }
            }
            1 => proto = proto.get(8..)?,
            2 => {
                let length = usize::try_from(varint(&mut proto)?).ok()?;
                proto = proto.get(length..)?;
            }
            5 => proto = proto.get(4..)?,
            _ => return None,
        }
    }
    Some(status)
}

fn varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0u64;
    for shift in (0..64).step_by(7) {
        let (byte, rest) = bytes.split_first()?;
        *bytes = rest;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_read_whatever_else_is_in_it() {
        let table: [(&[u8], Option<u64>); 6] = [
            (&[], Some(0)),
            (&[8, 1], Some(1)),
            (&[8, 2], Some(2)),
            (&[0x12, 2, 8, 1, 8, 3, 0x25, 0, 0, 0, 0], Some(3)),
            (&[8], None),
            (&[0x12, 9], None),
        ];
        for (proto, wanted) in table {
            assert_eq!(serving_status(proto), wanted, "{proto:?}");
        }
    }

    #[test]
    fn a_long_service_is_framed_as_protobuf_wants_it() {
        assert_eq!(message(""), [0, 0, 0, 0, 0]);
        assert_eq!(message("ab"), [0, 0, 0, 0, 4, 10, 2, b'a', b'b']);
        assert_eq!(&message(&"x".repeat(300))[..8], [0, 0, 0, 1, 47, 10, 172, 2]);
    }
}
