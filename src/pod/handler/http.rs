//! An HTTP GET of a hook or a probe: no proxy, no certificate verified, one connection for one request. Sources: kubelet's
//! `probe/http/{http,request}.go`.

use std::fmt;
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Empty};
use hyper_util::rt::TokioIo;
use k8s_openapi::api::core::v1::{ContainerPort, HTTPGetAction, HTTPHeader};
use percent_encoding::{AsciiSet, CONTROLS, utf8_percent_encode};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{DigitallySignedStruct, SignatureScheme};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::TlsConnector;

use super::{HOST, connect, port};

/// What is read of an answer: as a kubelet (probe/http, maxRespBodyLength).
const BODY_BYTES: usize = 10 * 1024;

/// Requests that a chain of redirects may take (http.go, RedirectChecker).
const REDIRECTS: usize = 10;

/// The minor version in the user agent is that of the Kubernetes whose rules are kept.
pub(in crate::pod) const KUBERNETES: &str = "1.36";

/// What a request line cannot hold as it is; `%` stays, since a path may come escaped.
const UNSAFE: &AsciiSet =
    &CONTROLS.add(b' ').add(b'"').add(b'<').add(b'>').add(b'`').add(b'{').add(b'}').add(b'|');

/// Where a GET goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::pod) struct Target {
    https: bool,
    host: String,
    port: u16,
    /// Path and query, beginning with `/`, fit for a request line.
    path: String,
}

/// What came back.
#[derive(Debug)]
pub(in crate::pod) struct Answer {
    /// The last answer's status.
    pub status: http::StatusCode,
    /// The first 10 KiB of it.
    pub body: Vec<u8>,
}

/// Why nothing came back.
#[derive(Debug, thiserror::Error)]
pub(in crate::pod) enum GetError {
    /// The server is not there, or does not speak as it should: that is an answer too.
    #[error("{0}")]
    Failed(String),
    /// The request cannot be made, or its answer broke off: nothing is known of the server.
    #[error("{0}")]
    Unknown(String),
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.https { "https" } else { "http" };
        write!(f, "{scheme}://{}:{}{}", bracketed(&self.host), self.port, self.path)
    }
}

/// A host as an URL has it: an IPv6 address in brackets.
pub(in crate::pod) fn bracketed(host: &str) -> String {
    if host.contains(':') { format!("[{host}]") } else { host.to_owned() }
}

impl Target {
    /// What an httpGet action asks for.
    ///
    /// # Errors
    /// When its port is none.
    pub(in crate::pod) fn new(get: &HTTPGetAction, ports: &[ContainerPort]) -> Result<Self, String> {
        let host = get.host.as_deref().filter(|host| !host.is_empty()).unwrap_or(HOST);
        Ok(Self {
            https: get.scheme.as_deref().is_some_and(|scheme| scheme.eq_ignore_ascii_case("https")),
            host: host.to_owned(),
            port: port(&get.port, ports)?,
            path: request_path(get.path.as_deref().unwrap_or("/")),
        })
    }

    /// Asks once.
    ///
    /// # Errors
    /// When no answer came.
    pub(in crate::pod) async fn get(
        &self,
        purpose: &str,
        headers: &[HTTPHeader],
    ) -> Result<Answer, GetError> {
        self.exchange(purpose, headers).await.map(|(answer, _)| answer)
    }

    /// Asks, and goes where it is sent as long as that is the same host (http.go, RedirectChecker). An answer that still is
    /// a redirect leads to another host, or nowhere.
    ///
    /// # Errors
    /// When no answer came, or after ten redirects.
    pub(in crate::pod) async fn get_following(
        &self,
        purpose: &str,
        headers: &[HTTPHeader],
    ) -> Result<Answer, GetError> {
        let mut at = self.clone();
        for _ in 0..REDIRECTS {
            let (answer, location) = at.exchange(purpose, headers).await?;
            let follows = matches!(answer.status.as_u16(), 301 | 302 | 303 | 307 | 308);
            match location.filter(|_| follows).and_then(|location| at.resolve(&location)) {
                Some(next) if next.host == self.host => at = next,
                _ => return Ok(answer),
            }
        }
        Err(GetError::Failed(format!("Get \"{at}\": stopped after {REDIRECTS} redirects")))
    }

    async fn exchange(
        &self,
        purpose: &str,
        headers: &[HTTPHeader],
    ) -> Result<(Answer, Option<String>), GetError> {
        let request = self.request(purpose, headers).map_err(GetError::Unknown)?;
        let fail = |error: &dyn fmt::Display| GetError::Failed(format!("Get \"{self}\": {error}"));
        let stream = connect(&self.host, self.port).await.map_err(|error| fail(&error))?;
        if self.https {
            let name = ServerName::try_from(self.host.clone()).map_err(|error| fail(&error))?;
            let connector = unverified().map_err(GetError::Unknown)?;
            let stream = connector.connect(name, stream).await.map_err(|error| fail(&error))?;
            self.send(stream, request).await
        } else {
            self.send(stream, request).await
        }
    }

    fn request(&self, purpose: &str, headers: &[HTTPHeader]) -> Result<http::Request<Empty<Bytes>>, String> {
        let mut builder = http::Request::get(&self.path);
        let given = |wanted: &str| headers.iter().any(|header| header.name.eq_ignore_ascii_case(wanted));
        if !given("host") {
            builder = builder.header(http::header::HOST, format!("{}:{}", bracketed(&self.host), self.port));
        }
        if !given("user-agent") {
            builder = builder.header(http::header::USER_AGENT, format!("kube-{purpose}/{KUBERNETES}"));
        }
        if !given("accept") {
            builder = builder.header(http::header::ACCEPT, "*/*");
        }
        // One request is all that this connection is for.
        builder = builder.header(http::header::CONNECTION, "close");
        for header in headers {
            // An empty Accept takes the header away (request.go).
            if !(header.value.is_empty() && header.name.eq_ignore_ascii_case("accept")) {
                builder = builder.header(&header.name, &header.value);
            }
        }
        builder.body(Empty::new()).map_err(|error| format!("path {:?} and its headers: {error}", self.path))
    }

    async fn send(
        &self,
        stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
        request: http::Request<Empty<Bytes>>,
    ) -> Result<(Answer, Option<String>), GetError> {
        let fail = |error: hyper::Error| GetError::Failed(format!("Get \"{self}\": {error}"));
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(fail)?;
        let exchange = async {
            let mut response = sender.send_request(request).await.map_err(fail)?;
            let mut body = Vec::new();
            while let Some(frame) = response.frame().await {
                let frame = frame.map_err(|error| GetError::Unknown(format!("Get \"{self}\": {error}")))?;
                if let Some(data) = frame.data_ref() {
                    let room = (BODY_BYTES - body.len()).min(data.len());
                    body.extend_from_slice(&data[..room]);
                    if body.len() == BODY_BYTES {
                        break;
                    }
                }
            }
            let location = response.headers().get(http::header::LOCATION);
            let location = location.and_then(|value| value.to_str().ok()).map(str::to_owned);
            Ok((Answer { status: response.status(), body }, location))
        };
        tokio::pin!(connection);
        tokio::pin!(exchange);
        tokio::select! {
            biased;
            answer = &mut exchange => answer,
            // With its end the exchange has all that it will get, or fails for it.
            result = &mut connection => match result {
                Ok(()) => exchange.await,
                Err(error) => Err(fail(error)),
            },
        }
    }

    /// Where a Location header leads from here; none when it is no URL of HTTP.
    fn resolve(&self, location: &str) -> Option<Self> {
        let absolute = |https: bool, rest: &str| {
            let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
            let authority: http::uri::Authority = rest[..end].parse().ok()?;
            let host = authority.host().trim_start_matches('[').trim_end_matches(']').to_owned();
            let port = authority.port_u16().unwrap_or(if https { 443 } else { 80 });
            Some(Self { https, host, port, path: request_path(&rest[end..]) })
        };
        if let Some(rest) = strip_scheme(location, "http://") {
            return absolute(false, rest);
        }
        if let Some(rest) = strip_scheme(location, "https://") {
            return absolute(true, rest);
        }
        if let Some(rest) = location.strip_prefix("//") {
            return absolute(self.https, rest);
        }
        if location.split(['/', '?', '#']).next().is_some_and(|first| first.contains(':')) {
            return None;
        }
        let here = self.path.split('?').next().unwrap_or("/");
        let path = match location.bytes().next() {
            None => self.path.clone(),
            Some(b'/') => location.to_owned(),
            Some(b'?') => format!("{here}{location}"),
            Some(_) => format!("{}/{location}", here.rsplit_once('/').map_or("", |(parent, _)| parent)),
        };
        Some(Self { path: request_path(&path), ..self.clone() })
    }
}

fn strip_scheme<'a>(location: &'a str, scheme: &str) -> Option<&'a str> {
    let (head, rest) = location.split_at_checked(scheme.len())?;
    head.eq_ignore_ascii_case(scheme).then_some(rest)
}

/// A path and query as a request line has them: without a fragment, beginning with `/`.
fn request_path(path: &str) -> String {
    let path = path.split('#').next().unwrap_or_default();
    let slash = if path.starts_with('/') { "" } else { "/" };
    format!("{slash}{}", utf8_percent_encode(path, UNSAFE))
}

/// A kubelet does not verify the certificate of a pod's own server (probe/http, InsecureSkipVerify). Made once: it is some
/// ten kilobytes, and a hundred pods may probe every second.
fn unverified() -> Result<TlsConnector, String> {
    static CONNECTOR: OnceLock<Result<TlsConnector, String>> = OnceLock::new();
    let make = || {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| error.to_string())?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(AnyCertificate))
            .with_no_client_auth();
        Ok(TlsConnector::from(Arc::new(config)))
    };
    CONNECTOR.get_or_init(make).clone()
}

#[derive(Debug)]
struct AnyCertificate;

impl ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        rustls::crypto::ring::default_provider().signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(text: &str) -> Target {
        let here = Target { https: false, host: "h".to_owned(), port: 80, path: "/a/b?q".to_owned() };
        here.resolve(text).unwrap()
    }

    #[test]
    fn a_redirect_leads_where_a_browser_would_go() {
        let table = [
            ("/x?y#z", "http://h:80/x?y"),
            ("c", "http://h:80/a/c"),
            ("?r", "http://h:80/a/b?r"),
            ("", "http://h:80/a/b?q"),
            ("//other/x", "http://other:80/x"),
            ("HTTPS://h:8443", "https://h:8443/"),
            ("https://h", "https://h:443/"),
            ("http://[::1]:81?q", "http://[::1]:81/?q"),
        ];
        for (location, wanted) in table {
            assert_eq!(target(location).to_string(), wanted, "{location}");
        }
        let here = target("/");
        assert_eq!(here.resolve("ftp://h/x"), None);
        assert_eq!(here.resolve("mailto:me"), None);
    }

    #[test]
    fn a_path_is_made_fit_for_a_request_line() {
        let table = [("", "/"), ("x", "/x"), ("/a b", "/a%20b"), ("/%41?é", "/%41?%C3%A9"), ("/x#f", "/x")];
        for (path, wanted) in table {
            assert_eq!(request_path(path), wanted, "{path}");
        }
    }
}
