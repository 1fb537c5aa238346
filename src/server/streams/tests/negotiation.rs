//! What is answered to a request.

use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode};

use crate::server::streams::handshake::Refusal;
use crate::server::streams::{port_forward, remote_command};

fn headers(pairs: &[(&str, &str)]) -> HeaderMap {
    let mut headers = HeaderMap::new();
    for (name, value) in pairs {
        headers.append(HeaderName::try_from(*name).unwrap(), HeaderValue::from_str(value).unwrap());
    }
    headers
}

fn exec(method: Method, pairs: &[(&str, &str)], query: &str) -> Result<remote_command::Negotiated, Refusal> {
    remote_command::negotiate(&method, &headers(pairs), Some(query))
}

pub const SPDY: [(&str, &str); 2] = [("Connection", "Upgrade"), ("Upgrade", "SPDY/3.1")];

pub fn spdy(protocols: &'static str) -> Vec<(&'static str, &'static str)> {
    let mut pairs = SPDY.to_vec();
    pairs.push(("X-Stream-Protocol-Version", protocols));
    pairs
}

pub fn websocket(protocols: Option<&'static str>) -> Vec<(&'static str, &'static str)> {
    let mut pairs = vec![
        ("Connection", "keep-alive, Upgrade"),
        ("Upgrade", "websocket"),
        ("Sec-WebSocket-Version", "13"),
        ("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ=="),
    ];
    pairs.extend(protocols.map(|names| ("Sec-WebSocket-Protocol", names)));
    pairs
}

#[test]
fn a_client_gets_its_first_protocol_that_is_known() {
    for (pairs, protocol) in [
        (spdy("v4.channel.k8s.io, v3.channel.k8s.io"), "v4.channel.k8s.io"),
        (spdy("v9.channel.k8s.io,v2.channel.k8s.io,v4.channel.k8s.io"), "v2.channel.k8s.io"),
        (spdy("channel.k8s.io"), "channel.k8s.io"),
        (websocket(Some("channel.k8s.io, v5.channel.k8s.io")), "v5.channel.k8s.io"),
        (websocket(Some("base64.channel.k8s.io, v4.channel.k8s.io")), "base64.channel.k8s.io"),
        (websocket(None), ""),
    ] {
        let get = exec(Method::GET, &pairs, "output=1").unwrap();
        assert_eq!(get.protocol(), protocol);
    }
    assert!(exec(Method::POST, &spdy("v4.channel.k8s.io"), "input=1").is_ok());
}

#[test]
fn a_several_times_repeated_protocol_header_counts_as_one() {
    let mut pairs = spdy("v9.channel.k8s.io");
    pairs.push(("X-Stream-Protocol-Version", "v3.channel.k8s.io"));
    assert_eq!(exec(Method::POST, &pairs, "input=1").unwrap().protocol(), "v3.channel.k8s.io");
}

#[test]
fn the_query_says_which_streams_are_wanted() {
    let asked =
        |query| exec(Method::POST, &spdy("v4.channel.k8s.io"), query).map(|negotiated| negotiated.streams);
    let streams = asked("command=ls&input=1&output=true&error=1").unwrap();
    assert!(streams.stdin && streams.stdout && streams.stderr && !streams.tty);
    let streams = asked("input=0&output=1&error=1&tty=1").unwrap();
    assert!(!streams.stdin && streams.stdout && !streams.stderr && streams.tty);
    for nothing in ["command=input", "tty=1&error=1", "input=yes", ""] {
        let refusal = asked(nothing).unwrap_err();
        assert_eq!(refusal.status, 400);
        assert_eq!(refusal.text, "you must specify at least 1 of stdin, stdout, stderr");
    }
}

#[test]
fn refusals_are_those_of_a_kubelet() {
    let refused = |method, pairs: &[(&str, &str)]| exec(method, pairs, "output=1").unwrap_err();
    let refusal = refused(Method::POST, &[]);
    assert_eq!(
        (refusal.status, refusal.text.as_str()),
        (StatusCode::BAD_REQUEST, "Upgrade request required")
    );
    let refusal = refused(Method::POST, &SPDY);
    assert_eq!(refusal.status, 400);
    assert!(refusal.text.starts_with("unable to upgrade: header X-Stream-Protocol-Version does not exist"));
    assert_eq!(refused(Method::POST, &spdy(" , ")).status, 400);

    let refusal = refused(Method::POST, &spdy("v9.channel.k8s.io"));
    assert_eq!(
        refusal.text,
        "unable to upgrade: unable to negotiate protocol: client supports [v9.channel.k8s.io], server accepts \
         [v4.channel.k8s.io v3.channel.k8s.io v2.channel.k8s.io channel.k8s.io]"
    );
    let response = refusal.response::<String>();
    assert_eq!(response.status(), 403);
    assert_eq!(response.headers().get_all("X-Accepted-Stream-Protocol-Versions").iter().count(), 4);

    let mut other = spdy("v4.channel.k8s.io");
    other[1] = ("Upgrade", "h2c");
    other.push(("Authorization", "Bearer hidden"));
    let refusal = refused(Method::POST, &other);
    assert_eq!(refusal.status, 400);
    assert!(!refusal.text.contains("hidden"), "a token is not echoed");

    assert_eq!(refused(Method::PUT, &spdy("v4.channel.k8s.io")).status, 405);
    assert_eq!(refused(Method::POST, &websocket(Some("v5.channel.k8s.io"))).status, 405);
    assert_eq!(refused(Method::GET, &websocket(Some("v6.channel.k8s.io"))).status, 403);
    let keyless: Vec<_> = websocket(None).into_iter().filter(|pair| pair.0 != "Sec-WebSocket-Key").collect();
    assert_eq!(refused(Method::GET, &keyless).status, 400);
    let old: Vec<_> =
        websocket(None).into_iter().map(|pair| if pair.1 == "13" { (pair.0, "8") } else { pair }).collect();
    let response = refused(Method::GET, &old).response::<String>();
    assert_eq!(
        (response.status(), response.headers()["Sec-WebSocket-Version"].to_str().unwrap()),
        (StatusCode::BAD_REQUEST, "13")
    );
}

#[test]
fn the_upgrade_proves_that_the_key_was_read() {
    let response =
        exec(Method::GET, &websocket(Some("v4.channel.k8s.io")), "output=1").unwrap().response::<String>();
    assert_eq!(response.status(), 101);
    // The example of RFC 6455, 1.3.
    assert_eq!(response.headers()["Sec-WebSocket-Accept"], "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
    assert_eq!(response.headers()["Sec-WebSocket-Protocol"], "v4.channel.k8s.io");
    let response = exec(Method::GET, &websocket(None), "output=1").unwrap().response::<String>();
    assert!(!response.headers().contains_key("Sec-WebSocket-Protocol"));
    let response = exec(Method::POST, &spdy("v4.channel.k8s.io"), "output=1").unwrap().response::<String>();
    assert_eq!(response.headers()["Upgrade"], "SPDY/3.1");
    assert_eq!(response.headers()["Connection"], "Upgrade");
    assert_eq!(response.headers()["X-Stream-Protocol-Version"], "v4.channel.k8s.io");
}

fn forward(pairs: &[(&str, &str)], query: Option<&str>) -> Result<port_forward::Negotiated, Refusal> {
    port_forward::negotiate(&Method::GET, &headers(pairs), query)
}

#[test]
fn port_forward_is_negotiated_in_its_three_forms() {
    assert_eq!(forward(&spdy("portforward.k8s.io"), None).unwrap().protocol(), "portforward.k8s.io");
    assert_eq!(forward(&spdy("v4.channel.k8s.io"), None).unwrap_err().status, 403);
    let tunnel = forward(&websocket(Some("SPDY/3.1+portforward.k8s.io")), None).unwrap();
    let response = tunnel.response::<String>();
    assert_eq!(response.headers()["Sec-WebSocket-Protocol"], "SPDY/3.1+portforward.k8s.io");
    assert_eq!(forward(&websocket(Some("SPDY/3.1+v2.portforward.k8s.io")), None).unwrap_err().status, 403);
    let channels = forward(&websocket(Some("v4.channel.k8s.io")), Some("port=80%2C443&port=8080")).unwrap();
    assert_eq!(channels.protocol(), "v4.channel.k8s.io");
}

#[test]
fn ports_of_a_query_are_checked() {
    for (query, text) in [
        (None, "query parameter \"port\" is required"),
        (Some("port="), "query parameter \"port\" cannot be empty"),
        (Some("port=0"), "port \"0\" must be > 0"),
        (Some("port=80,http"), "unable to parse \"80,http\" as a port: invalid digit found in string"),
        (Some("port=65536"), "unable to parse \"65536\" as a port: number too large to fit in target type"),
    ] {
        let refusal = forward(&websocket(None), query).unwrap_err();
        assert_eq!((refusal.status, refusal.text.as_str()), (StatusCode::BAD_REQUEST, text));
    }
    let many = format!("port={}", vec!["1"; 33].join(","));
    assert_eq!(forward(&websocket(None), Some(&many)).unwrap_err().status, 400);
}
