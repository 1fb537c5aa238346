//! Clients that lie: random bytes, and valid frames that were damaged. Nothing panics, waits or grows.

use std::time::Duration;

use proptest::prelude::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;

use super::client::{QUICK, SOON, compressor, control, data, syn_stream};
use crate::server::streams::link::Link;
use crate::server::streams::spdy;
use crate::server::streams::websocket::{Channels, Coding, serve_channels};
use crate::server::streams::{CONTROL_BACKLOG, Ended, OUTBOX, STREAM_BUFFER, Settings};

const SETTINGS: Settings = Settings { open: 4, total: 50, stall: Duration::from_millis(5), ..QUICK };

/// What the limits of [`SETTINGS`] add up to.
const HELD: usize = 4 * STREAM_BUFFER + OUTBOX + CONTROL_BACKLOG + (64 << 10);

/// Sends these bytes, reads what comes, and leaves. The link must end soon and have held little all the time.
async fn feed(far: tokio::io::DuplexStream, link: std::sync::Arc<Link>, bytes: &[u8]) -> Ended {
    let mut answer = vec![0; 8192];
    let (mut reader, mut writer) = tokio::io::split(far);
    let feed = async {
        for chunk in bytes.chunks(1 << 14) {
            let mut chunk = chunk;
            while !chunk.is_empty() {
                tokio::select! {
                    written = writer.write(chunk) => match written {
                        Ok(written) => chunk = &chunk[written..],
                        Err(_) => return,
                    },
                    read = reader.read(&mut answer) => if !matches!(read, Ok(1..)) { return },
                }
            }
            assert!(link.held() <= HELD, "{} bytes are held", link.held());
        }
        // What was sent is looked at before the goodbye.
        for _ in 0..50 {
            tokio::task::yield_now().await;
        }
    };
    timeout(SOON, feed).await.expect("it takes all or breaks off");
    assert!(link.held() <= HELD, "{} bytes are held", link.held());
    drop((reader, writer));
    timeout(SOON, link.closed().wait()).await.expect("it ends")
}

async fn feed_spdy(bytes: &[u8]) -> Ended {
    let (near, far) = tokio::io::duplex(1 << 14);
    let (link, mut incoming) = spdy::serve(near, SETTINGS, |headers| headers.get("refuse").is_none());
    tokio::spawn(async move {
        let mut kept = Vec::new();
        while let Some(stream) = incoming.recv().await {
            // Every second one is left unread.
            if stream.id % 4 == 1 {
                kept.push(stream);
            }
        }
    });
    feed(far, link, bytes).await
}

async fn feed_websocket(bytes: &[u8], coding: Coding, close: bool) -> Ended {
    let (near, far) = tokio::io::duplex(1 << 14);
    let link = serve_channels(near, Channels { coding, close, number: 5 }, SETTINGS).await;
    let _stdin = link.open(0);
    feed(far, link, bytes).await
}

fn run<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap().block_on(future)
}

/// A frame of a client, and now and then of a bad one.
#[derive(Debug, Clone)]
enum Frame {
    Open(u32, String, String),
    Data(u32, usize, bool),
    Control(u16, u8, Vec<u8>),
    Raw(Vec<u8>),
}

fn frame() -> impl Strategy<Value = Frame> {
    let id = prop_oneof![8 => 1u32..12, 1 => any::<u32>()];
    prop_oneof![
        4 => (1u32..30, "[a-z]{0,9}", "[ -~]{0,40}").prop_map(|(id, name, value)| Frame::Open(id, name, value)),
        4 => (id, 0usize..200_000, any::<bool>()).prop_map(|(id, size, fin)| Frame::Data(id, size, fin)),
        2 => (0u16..12, any::<u8>(), prop::collection::vec(any::<u8>(), 0..64))
            .prop_map(|(kind, flags, payload)| Frame::Control(kind, flags, payload)),
        1 => prop::collection::vec(any::<u8>(), 0..40).prop_map(Frame::Raw),
    ]
}

fn encode(frames: &[Frame]) -> Vec<u8> {
    let mut zlib = compressor();
    let mut bytes = Vec::new();
    for frame in frames {
        bytes.extend(match frame {
            Frame::Open(id, name, value) => syn_stream(&mut zlib, *id, &[(name, value)]),
            Frame::Data(id, size, fin) => data(*id, &vec![b'x'; *size], *fin),
            Frame::Control(kind, flags, payload) => control(*kind, *flags, payload),
            Frame::Raw(bytes) => bytes.clone(),
        });
    }
    bytes
}

/// A masked frame of a WebSocket client.
pub fn message(opcode: u8, fin: bool, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![u8::from(fin) << 7 | opcode & 0x7f];
    match payload.len() {
        length @ 0..126 => frame.push(0x80 | length as u8),
        length @ 126..65536 => {
            frame.push(0xfe);
            frame.extend((length as u16).to_be_bytes());
        }
        length => {
            frame.push(0xff);
            frame.extend((length as u64).to_be_bytes());
        }
    }
    frame.extend([0; 4]);
    frame.extend(payload);
    frame
}

/// What a test has time for; PROPTEST_CASES=100000 is for a longer run.
const CASES: u32 = 96;

fn config() -> ProptestConfig {
    let set = std::env::var_os("PROPTEST_CASES").is_some();
    let config = ProptestConfig { failure_persistence: None, ..ProptestConfig::default() };
    // The default has read the variable.
    ProptestConfig { cases: if set { config.cases } else { CASES }, ..config }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn any_bytes_end_a_spdy_connection_in_good_order(bytes in prop::collection::vec(any::<u8>(), 0..4096)) {
        run(feed_spdy(&bytes));
    }

    #[test]
    fn damaged_spdy_frames_do_no_harm(
        frames in prop::collection::vec(frame(), 1..12),
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..3),
        cut in any::<prop::sample::Index>(),
        cuts in any::<bool>(),
    ) {
        let mut bytes = encode(&frames);
        for (at, byte) in damage {
            if !bytes.is_empty() {
                let at = at.index(bytes.len());
                bytes[at] = byte;
            }
        }
        if cuts && !bytes.is_empty() {
            bytes.truncate(cut.index(bytes.len()));
        }
        run(feed_spdy(&bytes));
    }

    #[test]
    fn any_bytes_end_a_websocket_in_good_order(
        bytes in prop::collection::vec(any::<u8>(), 0..4096), base64 in any::<bool>(), close in any::<bool>(),
    ) {
        let coding = if base64 { Coding::Base64 } else { Coding::Binary };
        run(feed_websocket(&bytes, coding, close));
    }

    #[test]
    fn damaged_websocket_messages_do_no_harm(
        messages in prop::collection::vec((0u8..16, any::<bool>(), any::<u8>(), 0usize..70_000), 1..12),
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..3),
        base64 in any::<bool>(), close in any::<bool>(),
    ) {
        let mut bytes = Vec::new();
        for (opcode, fin, first, length) in messages {
            let mut payload = vec![b'A'; length];
            payload.insert(0, first % 6);
            bytes.extend(message(opcode, fin, &payload));
        }
        for (at, byte) in damage {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        let coding = if base64 { Coding::Base64 } else { Coding::Binary };
        run(feed_websocket(&bytes, coding, close));
    }
}

#[test]
fn what_spdy_forbids_is_named() {
    let mut large = control(1, 0, &[]);
    large[5..8].copy_from_slice(&[0, 0xff, 0xff]);
    let mut version = control(6, 0, &[0; 4]);
    version[1] = 2;
    let opened =
        |ids: &[u32]| ids.iter().map(|id| Frame::Open(*id, "a".into(), "b".into())).collect::<Vec<_>>();
    for (bytes, what) in [
        (large, "a control frame is too large"),
        (version, "a frame of another version than SPDY/3"),
        (data(0, b"x", false), "data of stream 0"),
        (control(6, 0, &[]), "a frame is too short"),
        (control(1, 0, &[0; 10]), "a header block is shorter than its headers"),
        (encode(&opened(&[1, 1])), "a stream's number is not a client's next one"),
        (encode(&opened(&[2])), "a stream's number is not a client's next one"),
    ] {
        assert_eq!(run(feed_spdy(&bytes)), Ended::Violation(what));
    }
    let settings = [control(4, 1, &[0; 12]), control(9, 0, &[0; 8]), control(77, 0, &[1; 3])].concat();
    assert_eq!(run(feed_spdy(&settings)), Ended::Gone, "what needs no answer is read over");
}

#[test]
fn what_websockets_forbid_is_named() {
    let binary = |bytes: &[u8]| run(feed_websocket(bytes, Coding::Binary, true));
    assert_eq!(
        binary(&message(2, true, &[255, 9])),
        Ended::Violation("a channel that is not there is closed")
    );
    assert_eq!(
        binary(&message(2, true, &[255])),
        Ended::Violation("a close signal does not name one channel")
    );
    let mut large = message(2, true, &[0; 70_000]);
    large[2..10].copy_from_slice(&u64::MAX.to_be_bytes());
    assert_eq!(binary(&large), Ended::Violation("a message is too large"));
    let half = message(2, false, &vec![0; 3 << 20]);
    let more = message(0, false, &vec![0; 3 << 20]);
    assert_eq!(binary(&[half, more].concat()), Ended::Violation("a message is too large"));
    let mut unmasked = message(2, true, b"\0hello");
    unmasked[1] &= 0x7f;
    assert_eq!(binary(&unmasked), Ended::Violation("these are no WebSocket frames"));
    let base64 = |bytes: &[u8]| run(feed_websocket(bytes, Coding::Base64, false));
    assert_eq!(base64(&message(1, true, b"0????")), Ended::Violation("a message is not base64"));
}

#[test]
fn a_flood_of_pings_without_reading_is_not_read_on() {
    run(async {
        let (near, mut far) = tokio::io::duplex(1 << 10);
        let (link, _incoming) = spdy::serve(near, SETTINGS, |_| true);
        let pings = control(6, 0, &1u32.to_be_bytes()).repeat(100);
        let mut sent = 0;
        while sent < (4 << 20) && timeout(Duration::from_millis(100), far.write_all(&pings)).await.is_ok() {
            sent += pings.len();
        }
        assert_eq!(link.closed().now(), None, "it waits");
        assert!(link.held() <= CONTROL_BACKLOG + 4096, "{} bytes are held", link.held());
        assert!(sent < 2 * CONTROL_BACKLOG + (256 << 10), "{sent} bytes were taken");
    });
}

#[test]
fn a_header_bomb_ends_the_connection() {
    let bomb = "x".repeat(8 << 20);
    let frame = {
        let mut zlib = compressor();
        let mut block = [1u32.to_be_bytes(), 1u32.to_be_bytes()].concat();
        block.push(b'a');
        block.extend((bomb.len() as u32).to_be_bytes());
        block.extend(bomb.as_bytes());
        let mut packed = Vec::with_capacity(block.len());
        zlib.compress_vec(&block, &mut packed, flate2::FlushCompress::Sync).unwrap();
        let mut payload = [1u32.to_be_bytes().to_vec(), vec![0; 6]].concat();
        payload.extend(packed);
        control(1, 0, &payload)
    };
    assert!(frame.len() < 16 << 10);
    assert_eq!(run(feed_spdy(&frame)), Ended::Violation("a header block is too large"));
}
