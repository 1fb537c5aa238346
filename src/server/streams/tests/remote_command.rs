//! exec and attach over each protocol.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use futures::SinkExt;
use http::Method;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::time::{sleep, timeout};
use tokio_tungstenite::tungstenite::Message;

use super::client::{self, QUICK, SOON, SpdyClient, WsClient, channels, noise, receive, send};
use super::negotiation;
use crate::server::streams::remote_command::{Negotiated, RemoteCommand, Status, TerminalSize, negotiate};
use crate::server::streams::{Ended, Error, Settings};

const ALL: &str = "input=1&output=1&error=1";
const TTY: &str = "input=1&output=1&tty=1";

fn negotiated(pairs: &[(&str, &str)], query: &str) -> Negotiated {
    let headers = pairs.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap())).collect();
    negotiate(&Method::GET, &headers, Some(query)).unwrap()
}

/// What a client has opened.
struct Ids {
    error: u32,
    stdin: u32,
    stdout: u32,
    other: u32,
}

async fn spdy(
    protocol: &'static str,
    query: &str,
    settings: Settings,
) -> (SpdyClient<DuplexStream>, Ids, RemoteCommand) {
    let (near, far) = tokio::io::duplex(64 * 1024);
    let negotiated = negotiated(&negotiation::spdy(protocol), query);
    let session = tokio::spawn(negotiated.accept(near, settings));
    let mut client = SpdyClient::new(far);
    let other = if query == TTY { "resize" } else { "stderr" };
    let error = client.open(&[("streamtype", "error")]).await;
    let stdin = client.open(&[("streamtype", "stdin")]).await;
    let stdout = client.open(&[("streamtype", "stdout")]).await;
    let other = client.open(&[("streamtype", other)]).await;
    let session = timeout(SOON, session).await.unwrap().unwrap().unwrap();
    (client, Ids { error, stdin, stdout, other }, session)
}

async fn websocket(
    protocol: Option<&'static str>,
    query: &str,
    settings: Settings,
) -> (WsClient<DuplexStream>, RemoteCommand) {
    let (near, far) = tokio::io::duplex(64 * 1024);
    let negotiated = negotiated(&negotiation::websocket(protocol), query);
    let session = negotiated.accept(near, settings).await.unwrap();
    let mut client = client::websocket(far).await;
    let first = receive(&mut client).await.unwrap().into_data();
    let channel = if protocol.is_some_and(|name| name.contains("base64")) { &b"1"[..] } else { &[1] };
    assert_eq!(&first[..], channel, "an empty message on the lowest channel comes first");
    (client, session)
}

/// Writes back what it reads, then ends with this status: a command.
async fn echo(mut session: RemoteCommand, status: Status) {
    let (mut stdin, mut stdout) = (session.stdin.take().unwrap(), session.stdout.take().unwrap());
    tokio::io::copy(&mut stdin, &mut stdout).await.unwrap();
    session.status.send(status).await.unwrap();
}

const EXIT_3: &str = "{\"status\":\"Failure\",\"message\":\"command terminated with non-zero exit code: exit code 3\",\
    \"reason\":\"NonZeroExitCode\",\"details\":{\"causes\":[{\"reason\":\"ExitCode\",\"message\":\"3\"}]}}";

const BROKEN: &str = "{\"status\":\"Failure\",\"message\":\"Internal error occurred: it broke\",\"reason\":\"InternalError\",\
    \"code\":500}";

#[tokio::test]
async fn spdy_echoes_ends_and_says_how_in_each_version() {
    let text = "command terminated with non-zero exit code: exit code 3";
    for (protocol, status, said) in [
        ("v4.channel.k8s.io", Status::Exit(3), EXIT_3),
        ("v4.channel.k8s.io", Status::Success, "{\"status\":\"Success\"}"),
        ("v4.channel.k8s.io", Status::Exit(0), "{\"status\":\"Success\"}"),
        ("v4.channel.k8s.io", Status::Failure("it broke".to_owned()), BROKEN),
        ("v3.channel.k8s.io", Status::Exit(3), text),
        ("v2.channel.k8s.io", Status::Exit(3), text),
        ("channel.k8s.io", Status::Failure("it broke".to_owned()), "Internal error occurred: it broke"),
        ("v2.channel.k8s.io", Status::Success, ""),
    ] {
        let (mut client, ids, session) = spdy(protocol, ALL, QUICK).await;
        let mut closed = session.closed.clone();
        let command = tokio::spawn(echo(session, status));
        client.data(ids.stdin, b"hello ", false).await;
        client.until(|seen| seen.stream(ids.stdout).data == b"hello ").await;
        client.data(ids.stdin, b"you", true).await;
        client.until(|seen| seen.eof).await;
        command.await.unwrap();
        client.look(|seen| {
            assert_eq!(seen.stream(ids.stdout).data, b"hello you");
            assert_eq!(String::from_utf8_lossy(&seen.stream(ids.error).data), said, "{protocol}");
            for id in [ids.error, ids.stdin, ids.stdout, ids.other] {
                assert!(
                    seen.stream(id).fin && seen.stream(id).reset.is_none(),
                    "stream {id} of {protocol} is finished"
                );
            }
            assert_eq!(seen.ends.last(), Some(&ids.error), "the status comes after all output");
            assert_eq!(seen.goaway, Some(0));
        });
        drop(client);
        assert_eq!(closed.wait().await, Ended::Finished);
    }
}

#[tokio::test]
async fn v1_of_spdy_ends_its_side_of_stdin_at_once() {
    let (client, ids, _session) = spdy("channel.k8s.io", ALL, QUICK).await;
    client.until(|seen| seen.stream(ids.stdin).fin).await;
    let (client, ids, _session) = spdy("v2.channel.k8s.io", ALL, QUICK).await;
    sleep(Duration::from_millis(20)).await;
    assert!(!client.look(|seen| seen.stream(ids.stdin).fin));
}

#[tokio::test]
async fn websockets_echo_and_say_how_it_ended_in_each_protocol() {
    for (protocol, said) in [
        (Some("v5.channel.k8s.io"), EXIT_3),
        (Some("v4.channel.k8s.io"), EXIT_3),
        (Some("channel.k8s.io"), "command terminated with non-zero exit code: exit code 3"),
        (None, "command terminated with non-zero exit code: exit code 3"),
    ] {
        let (mut client, mut session) = websocket(protocol, ALL, QUICK).await;
        send(&mut client, b"\0hello".to_vec()).await;
        let mut hello = [0; 5];
        session.stdin.as_mut().unwrap().read_exact(&mut hello).await.unwrap();
        session.stdout.as_mut().unwrap().write_all(&hello).await.unwrap();
        session.stderr.as_mut().unwrap().write_all(b"oh").await.unwrap();
        let status = tokio::spawn(session.status.send(Status::Exit(3)));
        let channels = channels(&mut client).await;
        status.await.unwrap().unwrap();
        assert_eq!(channels[&1], b"hello");
        assert_eq!(channels[&2], b"oh");
        assert_eq!(String::from_utf8_lossy(&channels[&3]), said, "{protocol:?}");
    }
}

#[tokio::test]
async fn base64_websockets_carry_text() {
    for (protocol, said) in [("v4.base64.channel.k8s.io", EXIT_3), ("base64.channel.k8s.io", "")] {
        let (mut client, mut session) = websocket(Some(protocol), ALL, QUICK).await;
        client.send(Message::text(format!("0{}", STANDARD.encode("hello")))).await.unwrap();
        let mut hello = [0; 5];
        session.stdin.as_mut().unwrap().read_exact(&mut hello).await.unwrap();
        session.stdout.as_mut().unwrap().write_all(&hello).await.unwrap();
        let status = if said.is_empty() { Status::Success } else { Status::Exit(3) };
        session.status.send(status).await.unwrap();
        let mut texts = Vec::new();
        while let Some(Message::Text(text)) = receive(&mut client).await {
            texts.push(text.to_string());
        }
        assert_eq!(texts[0], format!("1{}", STANDARD.encode("hello")));
        assert_eq!(
            texts.get(1).cloned().unwrap_or_default(),
            if said.is_empty() { String::new() } else { format!("3{}", STANDARD.encode(said)) }
        );
    }
}

#[tokio::test]
async fn v5_closes_stdin_and_v4_only_with_the_connection() {
    let (mut client, mut session) = websocket(Some("v5.channel.k8s.io"), ALL, QUICK).await;
    send(&mut client, b"\0all".to_vec()).await;
    send(&mut client, vec![255, 0]).await;
    let mut text = String::new();
    timeout(SOON, session.stdin.as_mut().unwrap().read_to_string(&mut text)).await.unwrap().unwrap();
    assert_eq!(text, "all");
    assert_eq!(session.closed.now(), None, "the rest of the session goes on");

    let (mut client, mut session) = websocket(Some("v4.channel.k8s.io"), ALL, QUICK).await;
    send(&mut client, b"\0all".to_vec()).await;
    send(&mut client, vec![255, 0]).await;
    let mut stdin = session.stdin.take().unwrap();
    let mut text = String::new();
    assert!(timeout(Duration::from_millis(50), stdin.read_to_string(&mut text)).await.is_err());
    client.close(None).await.unwrap();
    timeout(SOON, stdin.read_to_string(&mut text)).await.unwrap().unwrap();
    assert_eq!(timeout(SOON, session.closed.wait()).await.unwrap(), Ended::Gone);
}

#[tokio::test]
async fn a_lost_connection_is_an_error_of_stdin_and_not_its_end() {
    let (client, _, mut session) = spdy("v4.channel.k8s.io", ALL, QUICK).await;
    drop(client);
    let (mut client, mut lost) = websocket(Some("v5.channel.k8s.io"), ALL, QUICK).await;
    client.get_mut().shutdown().await.unwrap();
    drop(client);
    for session in [&mut session, &mut lost] {
        // The test's client still holds its reading half.
        let _ = timeout(Duration::from_millis(10), session.closed.wait()).await;
    }
    let read = timeout(SOON, lost.stdin.unwrap().read_u8()).await.unwrap();
    assert_eq!(read.unwrap_err().kind(), std::io::ErrorKind::ConnectionReset);
}

#[tokio::test]
async fn goodbye_and_resets_of_a_spdy_client_are_seen() {
    let (mut client, ids, mut session) = spdy("v4.channel.k8s.io", ALL, QUICK).await;
    client.send(&client::control(3, 0, &[ids.stdout.to_be_bytes(), 5u32.to_be_bytes()].concat())).await;
    let mut stdout = session.stdout.take().unwrap();
    let write = async {
        while stdout.write_all(b"x").await.is_ok() {
            sleep(Duration::from_millis(1)).await;
        }
    };
    timeout(SOON, write).await.unwrap();
    client.send(&client::control(7, 0, &[0; 8])).await;
    assert_eq!(timeout(SOON, session.closed.wait()).await.unwrap(), Ended::Gone);
    assert!(session.stderr.unwrap().write_all(b"x").await.is_err());
    assert_eq!(session.status.send(Status::Success).await, Err(Error::Ended(Ended::Gone)));
}

#[tokio::test]
async fn sizes_of_the_terminal_arrive_in_order_and_the_last_always() {
    let size = |width| TerminalSize { width, height: 24 };
    let (mut client, ids, mut session) = spdy("v4.channel.k8s.io", TTY, QUICK).await;
    client.data(ids.other, b"{\"Width\":80,\"Hei", false).await;
    client.data(ids.other, b"ght\":24}\n{\"Width\":81,\"Height\":24}", false).await;
    assert_eq!(session.resize.recv().await, Some(size(80)));
    assert_eq!(session.resize.recv().await, Some(size(81)));
    for width in 100..400 {
        client.data(ids.other, format!("{{\"Width\":{width},\"Height\":24}}\n").as_bytes(), false).await;
    }
    client.ping(9).await;
    client.until(|seen| seen.pings == [9]).await;
    client.data(ids.other, b"", true).await;
    let mut last = None;
    while let Some(size) = timeout(SOON, session.resize.recv()).await.unwrap() {
        last = Some(size);
    }
    assert_eq!(last, Some(size(399)));

    let (mut client, mut session) = websocket(Some("v5.channel.k8s.io"), TTY, QUICK).await;
    send(&mut client, b"\x04{\"Width\":80,\"Height\":24}".to_vec()).await;
    assert_eq!(session.resize.recv().await, Some(size(80)));
    let (_client, mut session) = websocket(Some("v5.channel.k8s.io"), ALL, QUICK).await;
    assert_eq!(session.resize.recv().await, None, "no terminal, no sizes");
}

#[tokio::test]
async fn ten_megabytes_go_both_ways_intact_by_spdy() {
    let sent = noise(10 << 20);
    let (mut client, ids, session) = spdy("v4.channel.k8s.io", ALL, QUICK).await;
    let command = tokio::spawn(echo(session, Status::Success));
    for chunk in sent.chunks(40_000) {
        client.data(ids.stdin, chunk, false).await;
    }
    client.data(ids.stdin, b"", true).await;
    client.until(|seen| seen.eof).await;
    command.await.unwrap();
    client.look(|seen| {
        assert!(seen.streams[&ids.stdout].data == sent);
        assert!(seen.streams[&ids.stdout].largest <= 32 * 1024);
    });
}

#[tokio::test]
async fn ten_megabytes_go_both_ways_intact_by_websocket() {
    let sent = noise(10 << 20);
    let (client, session) = websocket(Some("v5.channel.k8s.io"), ALL, QUICK).await;
    let command = tokio::spawn(echo(session, Status::Success));
    let (mut output, mut input) = futures::StreamExt::split(client);
    let sending = sent.clone();
    tokio::spawn(async move {
        for chunk in sending.chunks(700_000) {
            let message = [&[0][..], chunk].concat();
            output.send(Message::Binary(message.into())).await.unwrap();
        }
        output.send(Message::Binary(vec![255, 0].into())).await.unwrap();
    });
    let mut came: Vec<u8> = Vec::new();
    while let Some(Ok(message)) = futures::StreamExt::next(&mut input).await {
        match message {
            Message::Binary(bytes) if bytes[0] == 1 => came.extend(&bytes[1..]),
            Message::Binary(bytes) => assert_eq!(&bytes[..], b"\x03{\"status\":\"Success\"}"),
            _ => break,
        }
    }
    assert!(came == sent);
    command.await.unwrap();
}

#[tokio::test]
async fn a_slow_client_gets_the_last_byte_and_the_status() {
    let sent = noise(200 * 1024);
    let (near, far) = tokio::io::duplex(1024);
    let session =
        tokio::spawn(negotiated(&negotiation::spdy("v4.channel.k8s.io"), "output=1").accept(near, QUICK));
    let mut client = SpdyClient::stalled(far);
    let error = client.open(&[("streamtype", "error")]).await;
    let stdout = client.open(&[("streamtype", "stdout")]).await;
    let mut session = session.await.unwrap().unwrap();
    session.stdout.as_mut().unwrap().write_all(&sent).await.unwrap();
    let status = tokio::spawn(session.status.send(Status::Exit(3)));
    sleep(Duration::from_millis(50)).await;
    assert!(!status.is_finished(), "it waits for the client");
    client.read_on();
    client.until(|seen| seen.eof).await;
    status.await.unwrap().unwrap();
    client.look(|seen| {
        assert!(seen.streams[&stdout].data == sent);
        assert_eq!(String::from_utf8_lossy(&seen.streams[&error].data), EXIT_3);
    });
}

#[tokio::test]
async fn a_session_that_is_dropped_does_not_look_like_success() {
    let (client, ids, session) = spdy("v4.channel.k8s.io", ALL, QUICK).await;
    drop(session);
    client.until(|seen| seen.eof).await;
    let said = client.look(|seen| String::from_utf8_lossy(&seen.streams[&ids.error].data).into_owned());
    assert!(said.contains("Internal error occurred: the session was broken off"), "{said}");
}

#[tokio::test]
async fn a_client_that_opens_too_little_or_the_same_twice_is_refused() {
    for (second, wanted) in [
        ("stdin", Error::Missing { missing: "stdout", within: QUICK.creation }),
        ("error", Error::Twice("error")),
        ("cheese", Error::Missing { missing: "stdout", within: QUICK.creation }),
    ] {
        let (near, far) = tokio::io::duplex(4096);
        let session =
            tokio::spawn(negotiated(&negotiation::spdy("v4.channel.k8s.io"), "output=1").accept(near, QUICK));
        let mut client = SpdyClient::new(far);
        client.open(&[("streamtype", "error")]).await;
        let second = client.open(&[("streamtype", second)]).await;
        assert_eq!(timeout(SOON, session).await.unwrap().unwrap().err(), Some(wanted));
        client
            .until(|seen| seen.eof && (seen.stream(second).replied || seen.stream(second).reset == Some(3)))
            .await;
    }
}

#[tokio::test]
async fn a_client_that_does_not_read_is_still_heard_and_costs_little() {
    let (near, far) = tokio::io::duplex(1024);
    let session = tokio::spawn(
        negotiated(&negotiation::spdy("v4.channel.k8s.io"), "input=1&output=1").accept(near, QUICK),
    );
    let mut client = SpdyClient::stalled(far);
    client.open(&[("streamtype", "error")]).await;
    let stdin = client.open(&[("streamtype", "stdin")]).await;
    client.open(&[("streamtype", "stdout")]).await;
    let mut session = session.await.unwrap().unwrap();
    let mut stdout = session.stdout.take().unwrap();
    let written = Arc::new(AtomicUsize::new(0));
    let counter = written.clone();
    tokio::spawn(async move {
        while counter.load(Relaxed) < (4 << 20) {
            counter.fetch_add(stdout.write(&[b'x'; 10_000]).await.unwrap(), Relaxed);
        }
    });
    sleep(Duration::from_millis(50)).await;
    let held = written.load(Relaxed);
    assert!((256 * 1024..300 * 1024).contains(&held), "{held} bytes");
    client.data(stdin, b"stop", false).await;
    let mut stop = [0; 4];
    timeout(SOON, session.stdin.as_mut().unwrap().read_exact(&mut stop)).await.unwrap().unwrap();
    assert_eq!(&stop, b"stop");
}

#[tokio::test]
async fn a_command_that_does_not_read_still_writes_and_loses_no_input() {
    let patient = Settings { stall: SOON, ..QUICK };
    let (mut client, ids, mut session) = spdy("v4.channel.k8s.io", ALL, patient).await;
    let sent = noise(600 * 1024);
    let seen = client.watch();
    let sending = sent.clone();
    let sender = tokio::spawn(async move {
        client.data(ids.stdin, &sending, true).await;
        client.ping(7).await;
        client
    });
    sleep(Duration::from_millis(120)).await;
    assert!(!sender.is_finished(), "the client is slowed down");
    session.stdout.as_mut().unwrap().write_all(b"working").await.unwrap();
    // The server's question whether it still lives comes through as well.
    client::until(&seen, |seen| seen.stream(ids.stdout).data == b"working" && seen.pings.contains(&2)).await;
    let mut came: Vec<u8> = Vec::new();
    timeout(SOON, session.stdin.as_mut().unwrap().read_to_end(&mut came)).await.unwrap().unwrap();
    assert!(came == sent);
    client::until(&seen, |seen| seen.pings.contains(&7)).await;
}

#[tokio::test]
async fn a_client_that_dies_before_a_full_stdin_is_noticed() {
    let patient = Settings { stall: SOON, ..QUICK };
    for spdy in [true, false] {
        let (near, far) = tokio::io::duplex(64 * 1024);
        let pairs = if spdy {
            negotiation::spdy("v4.channel.k8s.io")
        } else {
            negotiation::websocket(Some("v5.channel.k8s.io"))
        };
        let session = tokio::spawn(negotiated(&pairs, "input=1").accept(near, patient));
        let mut far = far;
        if spdy {
            let mut zlib = client::compressor();
            for (id, kind) in [(1, "error"), (3, "stdin")] {
                far.write_all(&client::syn_stream(&mut zlib, id, &[("streamtype", kind)])).await.unwrap();
            }
            far.write_all(&client::data(3, &[0; 150 * 1024], false)).await.unwrap();
        } else {
            let mut client = client::websocket(far).await;
            send(&mut client, vec![0; 150 * 1024]).await;
            far = client.into_inner();
        }
        let mut session = session.await.unwrap().unwrap();
        sleep(Duration::from_millis(20)).await;
        drop(far);
        let ended = timeout(SOON, session.closed.wait()).await.unwrap();
        assert!(matches!(ended, Ended::Gone | Ended::Broken(_)), "{ended:?}");
    }
}

#[tokio::test]
async fn an_idle_connection_is_closed() {
    let idle = Settings { idle: Duration::from_millis(60), ..QUICK };
    let (mut client, mut session) = websocket(Some("v5.channel.k8s.io"), ALL, idle).await;
    for _ in 0..4 {
        sleep(Duration::from_millis(30)).await;
        client.send(Message::Ping(Default::default())).await.unwrap();
    }
    assert_eq!(session.closed.now(), None, "pings keep it");
    assert_eq!(timeout(SOON, session.closed.wait()).await.unwrap(), Ended::Idle(idle.idle));
}
