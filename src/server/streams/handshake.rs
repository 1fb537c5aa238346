//! The HTTP side of an upgrade: what the client asks for, and the answers of a kubelet to what cannot be.
//!
//! Every function here is pure.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use http::header::{
    CONNECTION, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY,
    SEC_WEBSOCKET_PROTOCOL, SEC_WEBSOCKET_VERSION, UPGRADE,
};
use http::{Method, Response, StatusCode};

/// What a SPDY client may speak (streaming pkg/httpstream HeaderProtocolVersion).
pub const PROTOCOL_VERSION: HeaderName = HeaderName::from_static("x-stream-protocol-version");

/// What the node can speak, in a refusal (streaming pkg/httpstream HeaderAcceptedProtocolVersions).
pub const ACCEPTED_VERSIONS: HeaderName = HeaderName::from_static("x-accepted-stream-protocol-versions");

/// The name of SPDY in an Upgrade header (streaming pkg/httpstream/spdy HeaderSpdy31).
const SPDY: &str = "SPDY/3.1";

/// What a server appends to a client's key (RFC 6455, 1.3).
const WEBSOCKET_GUID: &str = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11";

/// A request that is not upgraded: the answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// The HTTP status.
    pub status: StatusCode,
    /// The body, for people.
    pub text: String,
    /// Headers that say more.
    pub headers: Vec<(HeaderName, &'static str)>,
}

impl Refusal {
    pub(super) fn new(status: StatusCode, text: impl Into<String>) -> Self {
        Self { status, text: text.into(), headers: Vec::new() }
    }

    pub(super) fn bad_request(text: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, text)
    }

    /// The answer as HTTP.
    pub fn response<B: From<String>>(self) -> Response<B> {
        let mut response = Response::new(B::from(self.text));
        *response.status_mut() = self.status;
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
        for (name, value) in self.headers {
            headers.append(name, HeaderValue::from_static(value));
        }
        response
    }
}

/// Whether the client wants a WebSocket.
pub(super) fn wants_websocket(headers: &HeaderMap) -> bool {
    let upgrade = headers.get(UPGRADE).and_then(|value| value.to_str().ok());
    upgrade.is_some_and(|value| value.trim().eq_ignore_ascii_case("websocket")) && wants_upgrade(headers)
}

/// Whether the client wants an upgrade at all.
fn wants_upgrade(headers: &HeaderMap) -> bool {
    values(headers, &CONNECTION).iter().any(|value| value.eq_ignore_ascii_case("upgrade"))
}

/// The comma-separated values of a header, however many lines it has.
pub(super) fn values(headers: &HeaderMap, name: &HeaderName) -> Vec<String> {
    let lines = headers.get_all(name).iter().filter_map(|value| value.to_str().ok());
    lines
        .flat_map(|line| line.split(','))
        .map(|value| value.trim().to_owned())
        .filter(|v| !v.is_empty())
        .collect()
}

/// The protocol of a SPDY upgrade: the client's first that is `supported`.
pub(super) fn spdy(
    method: &Method,
    headers: &HeaderMap,
    supported: &'static [&'static str],
) -> Result<&'static str, Refusal> {
    if !matches!(*method, Method::GET | Method::POST) {
        return Err(Refusal::new(StatusCode::METHOD_NOT_ALLOWED, "Method Not Allowed"));
    }
    if !wants_upgrade(headers) {
        return Err(Refusal::bad_request("Upgrade request required"));
    }
    if !headers.contains_key(&PROTOCOL_VERSION) {
        let number = headers.keys_len();
        return Err(Refusal::bad_request(format!(
            "unable to upgrade: header X-Stream-Protocol-Version does not exist in request with {number} headers"
        )));
    }
    let protocol = choose(&values(headers, &PROTOCOL_VERSION), supported)?;
    let upgrade = values(headers, &UPGRADE);
    if !upgrade.iter().any(|value| value.eq_ignore_ascii_case(SPDY)) {
        // A kubelet prints the request's headers here. They hold the client's token.
        return Err(Refusal::bad_request("unable to upgrade: missing upgrade headers in request"));
    }
    Ok(protocol)
}

/// The client's first protocol that is supported.
pub(super) fn choose(wanted: &[String], supported: &'static [&'static str]) -> Result<&'static str, Refusal> {
    if wanted.is_empty() {
        return Err(Refusal::bad_request(
            "unable to upgrade: header X-Stream-Protocol-Version contains [], but no valid protocols",
        ));
    }
    let known = |protocol: &String| supported.iter().copied().find(|name| name == protocol);
    wanted.iter().find_map(known).ok_or_else(|| Refusal {
        status: StatusCode::FORBIDDEN,
        text: format!(
            "unable to upgrade: unable to negotiate protocol: client supports [{}], server accepts [{}]",
            wanted.join(" "),
            supported.join(" ")
        ),
        headers: supported.iter().map(|name| (ACCEPTED_VERSIONS, *name)).collect(),
    })
}

/// A WebSocket's key and the subprotocols that the client would speak.
pub(super) fn websocket(method: &Method, headers: &HeaderMap) -> Result<(String, Vec<String>), Refusal> {
    if method != Method::GET {
        return Err(Refusal::new(StatusCode::METHOD_NOT_ALLOWED, "bad method: a WebSocket begins with GET"));
    }
    let text = |name| headers.get(name).and_then(|value: &HeaderValue| value.to_str().ok()).map(str::trim);
    let Some(key) = text(SEC_WEBSOCKET_KEY).filter(|key| !key.is_empty()) else {
        return Err(Refusal::bad_request("mismatch challenge/response: Sec-WebSocket-Key is missing"));
    };
    if text(SEC_WEBSOCKET_VERSION) != Some("13") {
        return Err(Refusal {
            headers: vec![(SEC_WEBSOCKET_VERSION, "13")],
            ..Refusal::bad_request("missing or bad WebSocket Version: it must be 13")
        });
    }
    Ok((accept_key(key), values(headers, &SEC_WEBSOCKET_PROTOCOL)))
}

/// No subprotocol of a WebSocket is known.
pub(super) fn unknown_subprotocols(wanted: &[String], supported: &[&str]) -> Refusal {
    let text = format!(
        "requested protocol(s) are not supported: [{}]; supports [{}]",
        wanted.join(" "),
        supported.join(" ")
    );
    Refusal::new(StatusCode::FORBIDDEN, text)
}

/// The proof that a server has read a client's key (RFC 6455, 4.2.2). SHA-1 protects nothing here.
fn accept_key(key: &str) -> String {
    let digest = ring::digest::digest(
        &ring::digest::SHA1_FOR_LEGACY_USE_ONLY,
        format!("{key}{WEBSOCKET_GUID}").as_bytes(),
    );
    STANDARD.encode(digest)
}

/// The 101 of a SPDY upgrade.
pub(super) fn spdy_response<B: Default>(protocol: &'static str) -> Response<B> {
    let mut response = Response::new(B::default());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let headers = response.headers_mut();
    headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    headers.insert(UPGRADE, HeaderValue::from_static(SPDY));
    headers.insert(PROTOCOL_VERSION, HeaderValue::from_static(protocol));
    response
}

/// The 101 of a WebSocket.
pub(super) fn websocket_response<B: Default>(accept: &str, protocol: Option<&'static str>) -> Response<B> {
    let mut response = Response::new(B::default());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let headers = response.headers_mut();
    headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    headers.insert(UPGRADE, HeaderValue::from_static("websocket"));
    if let Ok(accept) = HeaderValue::from_str(accept) {
        headers.insert(SEC_WEBSOCKET_ACCEPT, accept);
    }
    if let Some(protocol) = protocol {
        headers.insert(SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(protocol));
    }
    response
}

/// The values of a query parameter, in order.
pub(super) fn query_values(query: Option<&str>, name: &str) -> Vec<String> {
    let pairs = query.unwrap_or_default().split('&').filter(|pair| pair.contains('='));
    let pairs = pairs.flat_map(|pair| form_urlencoded::parse(pair.as_bytes()));
    pairs.filter(|(key, _)| key == name).map(|(_, value)| value.into_owned()).collect()
}
