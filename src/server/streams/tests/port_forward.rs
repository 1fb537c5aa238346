//! port-forward over its three transports.

use std::time::Duration;

use http::Method;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::time::{sleep, timeout};

use super::client::{self, Io, QUICK, SOON, SpdyClient, channels, noise, receive, send};
use super::negotiation;
use crate::server::streams::port_forward::{Forwarding, negotiate};
use crate::server::streams::{Ended, Settings};

async fn accept<IO: Io>(pairs: &[(&str, &str)], query: &str, io: IO, settings: Settings) -> Forwarding {
    let headers = pairs.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap())).collect();
    negotiate(&Method::GET, &headers, Some(query)).unwrap().accept(io, settings).await
}

async fn spdy(settings: Settings) -> (SpdyClient<DuplexStream>, Forwarding) {
    let (near, far) = tokio::io::duplex(64 * 1024);
    let forwarding = accept(&negotiation::spdy("portforward.k8s.io"), "", near, settings).await;
    (SpdyClient::new(far), forwarding)
}

async fn open<IO: Io>(client: &mut SpdyClient<IO>, request: &str, port: &str) -> (u32, u32) {
    let headers = |kind| [("streamtype", kind), ("port", port), ("requestid", request)];
    let error = client.open(&headers("error")).await;
    client.data(error, b"", true).await;
    (error, client.open(&headers("data")).await)
}

/// A pod whose ports say what they get, and an odd one that fails.
async fn pod(mut forwarding: Forwarding) -> usize {
    let mut connections = 0;
    while let Some(stream) = forwarding.streams.recv().await {
        connections += 1;
        tokio::spawn(async move {
            if stream.port % 2 == 1 {
                stream.error.fail(&format!("nobody listens on {}", stream.port)).await.unwrap();
                return;
            }
            let (mut reader, mut writer) = (stream.data.reader, stream.data.writer);
            tokio::io::copy(&mut reader, &mut writer).await.unwrap();
            writer.shutdown().await.unwrap();
            stream.error.finish().await.unwrap();
        });
    }
    connections
}

/// Fifty connections that are open at the same time, one megabyte each.
async fn fifty<IO: Io>(mut client: SpdyClient<IO>) {
    let sent = noise(1 << 20);
    let mut opened = Vec::new();
    for request in 0..50 {
        opened.push(open(&mut client, &request.to_string(), "8080").await);
    }
    for (at, chunk) in sent.chunks(32 * 1024).enumerate() {
        for (_, data) in &opened {
            client.data(*data, chunk, (at + 1) * 32 * 1024 >= sent.len()).await;
        }
    }
    client
        .until(|seen| opened.iter().all(|(error, data)| seen.stream(*error).fin && seen.stream(*data).fin))
        .await;
    client.look(|seen| {
        for (error, data) in &opened {
            assert!(seen.streams[data].data == sent);
            assert_eq!(seen.streams[error].data, b"");
        }
    });
    client.send(&client::control(7, 0, &[0; 8])).await;
}

#[tokio::test]
async fn fifty_connections_at_once_by_spdy() {
    let (client, forwarding) = spdy(Settings::PORT_FORWARD).await;
    let mut closed = forwarding.closed.clone();
    let pod = tokio::spawn(pod(forwarding));
    fifty(client).await;
    assert_eq!(closed.wait().await, Ended::Gone);
    assert_eq!(pod.await.unwrap(), 50);
}

#[tokio::test]
async fn fifty_connections_at_once_by_spdy_in_a_websocket() {
    let (near, far) = tokio::io::duplex(64 * 1024);
    let pairs = negotiation::websocket(Some("SPDY/3.1+portforward.k8s.io"));
    let pod = tokio::spawn(pod(accept(&pairs, "", near, Settings::PORT_FORWARD).await));
    // The client's side of the tunnel: messages of odd sizes, which cut frames anywhere.
    let (mine, theirs) = tokio::io::duplex(64 * 1024);
    let (mut output, mut input) = futures::StreamExt::split(client::websocket(far).await);
    let (mut from, mut to) = tokio::io::split(theirs);
    tokio::spawn(async move {
        let mut buffer = vec![0; 7001];
        while let Ok(read @ 1..) = from.read(&mut buffer).await {
            let message = tokio_tungstenite::tungstenite::Message::binary(buffer[..read].to_vec());
            futures::SinkExt::send(&mut output, message).await.unwrap();
        }
    });
    tokio::spawn(async move {
        while let Some(Ok(message)) = futures::StreamExt::next(&mut input).await {
            to.write_all(&message.into_data()).await.unwrap();
        }
    });
    fifty(SpdyClient::new(mine)).await;
    assert_eq!(timeout(SOON, pod).await.unwrap().unwrap(), 50);
}

#[tokio::test]
async fn a_failure_is_told_and_breaks_only_its_own_connection() {
    let (mut client, forwarding) = spdy(QUICK).await;
    tokio::spawn(pod(forwarding));
    let good = open(&mut client, "0", "80").await;
    let bad = open(&mut client, "1", "81").await;
    client.until(|seen| seen.stream(bad.0).fin && seen.stream(bad.1).reset.is_some()).await;
    assert_eq!(client.look(|seen| seen.stream(bad.0).data), b"nobody listens on 81");
    client.data(bad.1, b"thrown away", true).await;
    client.data(good.1, b"hello", true).await;
    client.until(|seen| seen.stream(good.1).fin).await;
    assert_eq!(client.look(|seen| seen.stream(good.1).data), b"hello");
}

#[tokio::test]
async fn who_breaks_off_is_not_told_that_it_failed() {
    let (mut client, mut forwarding) = spdy(QUICK).await;
    let (error, data) = open(&mut client, "0", "80").await;
    let mut stream = forwarding.streams.recv().await.unwrap();
    client.send(&client::control(3, 0, &[data.to_be_bytes(), 5u32.to_be_bytes()].concat())).await;
    let broken = timeout(SOON, stream.data.read_u8()).await.unwrap().unwrap_err();
    drop(stream.data);
    stream.error.fail(&broken.to_string()).await.unwrap();
    client.until(|seen| seen.stream(error).fin).await;
    assert_eq!(client.look(|seen| seen.stream(error).data), b"");
}

#[tokio::test]
async fn a_connection_is_broken_off_without_a_word() {
    let (mut client, mut forwarding) = spdy(QUICK).await;
    let (error, data) = open(&mut client, "0", "80").await;
    let stream = timeout(SOON, forwarding.streams.recv()).await.unwrap().unwrap();
    stream.error.break_off().await.unwrap();
    client.until(|seen| seen.stream(error).fin && seen.stream(data).reset.is_some()).await;
    assert_eq!(client.look(|seen| seen.stream(error).data), b"");
}

#[tokio::test]
async fn streams_that_say_too_little_are_refused() {
    let (mut client, _forwarding) = spdy(QUICK).await;
    for headers in [
        &[("streamtype", "data"), ("port", "0")][..],
        &[("streamtype", "data"), ("port", "65536")],
        &[("streamtype", "data")],
        &[("streamtype", "stdin"), ("port", "80")],
        &[("streamtype", "data"), ("port", "80"), ("requestid", &"9".repeat(65))],
        &[],
    ] {
        let id = client.open(headers).await;
        client.until(|seen| seen.stream(id).reset == Some(3)).await;
    }
}

#[tokio::test]
async fn old_clients_name_no_request() {
    let (mut client, mut forwarding) = spdy(QUICK).await;
    client.open(&[("streamtype", "error"), ("port", "80")]).await;
    client.open(&[("streamtype", "data"), ("port", "80")]).await;
    let stream = timeout(SOON, forwarding.streams.recv()).await.unwrap().unwrap();
    assert_eq!(stream.port, 80);
}

#[tokio::test]
async fn a_half_that_waits_in_vain_is_told() {
    let (mut client, _forwarding) = spdy(QUICK).await;
    let headers = |kind| [("streamtype", kind), ("port", "80"), ("requestid", kind)];
    let error = client.open(&headers("error")).await;
    let data = client.open(&headers("data")).await;
    client.until(|seen| seen.stream(error).fin && seen.stream(data).reset.is_some()).await;
    assert_eq!(client.look(|seen| seen.stream(error).data), b"request error timed out waiting for streams");

    let error = client.open(&headers("error")).await;
    let twice = client.open(&headers("error")).await;
    client.until(|seen| seen.stream(error).fin && seen.stream(twice).reset.is_some()).await;
    let said = client.look(|seen| seen.stream(error).data);
    assert_eq!(said, b"error processing stream for request error: error stream already assigned");
}

#[tokio::test]
async fn streams_that_never_fit_together_hold_little() {
    let (mut client, mut forwarding) = spdy(Settings::PORT_FORWARD).await;
    // What is said on an error stream is held by nobody.
    for request in 0..20 {
        let error = client
            .open(&[("streamtype", "error"), ("port", "80"), ("requestid", &format!("e{request}"))])
            .await;
        client.data(error, &noise(300 * 1024), false).await;
    }
    // Of data streams without one, eight wait, as much as their buffers hold.
    let mut opened = Vec::new();
    for request in 0..40 {
        let data = client
            .open(&[("streamtype", "data"), ("port", "80"), ("requestid", &format!("d{request}"))])
            .await;
        client.data(data, &noise(128 * 1024), false).await;
        opened.push(data);
    }
    client.ping(3).await;
    client.until(|seen| seen.pings == [3]).await;
    client.until(|seen| opened.iter().filter(|id| seen.stream(**id).reset.is_some()).count() == 32).await;
    client.look(|seen| assert!(opened[..8].iter().all(|id| seen.stream(*id).reset.is_none())));
    // Who keeps to the rules is served beside them, and so are those that waited.
    let good = open(&mut client, "good", "80").await;
    client.data(good.1, b"hello", true).await;
    let mut stream = timeout(SOON, forwarding.streams.recv()).await.unwrap().unwrap();
    let mut hello = Vec::new();
    timeout(SOON, stream.data.read_to_end(&mut hello)).await.unwrap().unwrap();
    assert_eq!(hello, b"hello");
    client.open(&[("streamtype", "error"), ("port", "80"), ("requestid", "d0")]).await;
    let mut stream = timeout(SOON, forwarding.streams.recv()).await.unwrap().unwrap();
    let mut first = vec![0; 128 * 1024];
    timeout(SOON, stream.data.read_exact(&mut first)).await.unwrap().unwrap();
    assert!(first == noise(128 * 1024));
}

#[tokio::test]
async fn a_connection_that_nobody_reads_holds_up_the_others_only_for_a_while() {
    let (mut client, mut forwarding) = spdy(QUICK).await;
    let stuck = open(&mut client, "stuck", "80").await;
    let other = open(&mut client, "other", "80").await;
    let mut held = forwarding.streams.recv().await.unwrap();
    tokio::spawn(pod(forwarding));
    client.data(stuck.1, &noise(300 * 1024), false).await;
    client.data(other.1, b"hello", true).await;
    client.until(|seen| seen.stream(other.1).fin && seen.stream(stuck.1).reset == Some(5)).await;
    assert_eq!(client.look(|seen| seen.stream(other.1).data), b"hello");
    let broken = timeout(SOON, held.data.read_u8()).await.unwrap().unwrap_err();
    assert_eq!(broken.kind(), std::io::ErrorKind::ConnectionReset);
}

#[tokio::test]
async fn a_connection_that_is_dropped_takes_up_no_room() {
    let (mut client, mut forwarding) = spdy(QUICK).await;
    let dropped = open(&mut client, "dropped", "80").await;
    let stream = forwarding.streams.recv().await.unwrap();
    drop(stream);
    client.until(|seen| seen.stream(dropped.1).fin).await;
    client.data(dropped.1, &noise(1 << 20), true).await;
    client.ping(3).await;
    client.until(|seen| seen.pings == [3]).await;
}

#[tokio::test]
async fn there_are_limits_to_streams_at_once_and_ever() {
    let (mut client, forwarding) = spdy(Settings { open: 8, total: 20, ..QUICK }).await;
    let mut closed = forwarding.closed.clone();
    tokio::spawn(pod(forwarding));
    let mut opened = Vec::new();
    for request in 0..4 {
        opened.push(open(&mut client, &request.to_string(), "80").await);
    }
    let more = client.open(&[("streamtype", "error"), ("port", "80")]).await;
    client.until(|seen| seen.stream(more).reset == Some(3)).await;
    for (_, data) in &opened {
        client.data(*data, b"", true).await;
    }
    client
        .until(|seen| opened.iter().all(|(error, data)| seen.stream(*error).fin && seen.stream(*data).fin))
        .await;
    let next = client.open(&[("streamtype", "error"), ("port", "80")]).await;
    client.until(|seen| seen.stream(next).replied).await;
    for _ in 0..12 {
        client.open(&[("streamtype", "error"), ("port", "80")]).await;
    }
    assert_eq!(timeout(SOON, closed.wait()).await.unwrap(), Ended::Violation("too many streams"));
    client.until(|seen| seen.goaway == Some(1) && seen.eof).await;
}

#[tokio::test]
async fn who_drops_the_receiver_ends_the_forwarding() {
    let (client, forwarding) = spdy(QUICK).await;
    drop(forwarding);
    client.until(|seen| seen.goaway == Some(0) && seen.eof).await;
}

#[tokio::test]
async fn ports_are_channels_of_an_old_websocket() {
    let (near, far) = tokio::io::duplex(64 * 1024);
    let pairs = negotiation::websocket(Some("v4.channel.k8s.io"));
    let forwarding = accept(&pairs, "port=80,81&port=8080", near, QUICK).await;
    let mut client = client::websocket(far).await;
    let mut ports = Vec::new();
    for _ in 0..6 {
        ports.push(receive(&mut client).await.unwrap().into_data().to_vec());
    }
    let expected: [[u8; 3]; 6] =
        [[0, 80, 0], [1, 80, 0], [2, 81, 0], [3, 81, 0], [4, 0x90, 0x1f], [5, 0x90, 0x1f]];
    assert_eq!(ports, expected);
    let mut forwarding = forwarding;
    let mut streams = Vec::new();
    while let Ok(stream) = forwarding.streams.try_recv() {
        streams.push(stream);
    }
    send(&mut client, b"\x04hello".to_vec()).await;
    let mut hello = [0; 5];
    let mut last = streams.pop().unwrap();
    last.data.read_exact(&mut hello).await.unwrap();
    last.data.write_all(&hello).await.unwrap();
    for stream in streams {
        stream.error.fail("nobody listens").await.unwrap();
    }
    sleep(Duration::from_millis(20)).await;
    drop(last);
    let channels = timeout(SOON, channels(&mut client)).await.unwrap();
    assert_eq!(channels[&4], b"hello");
    assert_eq!((&channels[&1][..], &channels[&3][..]), (&b"nobody listens"[..], &b"nobody listens"[..]));
}
