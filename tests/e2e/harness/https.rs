//! HTTPS by hand, one request a connection, as any program on this host can send it: to a Node's own port and to
//! the API server. What a client library would put right or refuse can be sent too.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{ClientConfig, ClientConnection, DigitallySignedStruct, SignatureScheme, StreamOwned};

use super::{Pilot, api, bed, read};

/// Nothing that is asked takes longer, unless a test says so.
const ANSWER_LIMIT: Duration = Duration::from_secs(20);

/// A connection whose TLS handshake comes with the first byte.
pub type Connection = StreamOwned<ClientConnection, TcpStream>;

/// Where to ask, and with which certificate.
#[derive(Clone)]
pub struct Https {
    /// The server's address.
    pub address: SocketAddr,
    config: Arc<ClientConfig>,
    headers: Vec<(String, String)>,
}

/// An answer, its body without the framing.
#[derive(Debug)]
pub struct Answer {
    /// The HTTP status.
    pub status: u16,
    /// The head, without the body.
    pub head: String,
    /// The body.
    pub body: String,
}

impl Https {
    /// A pilot's own port at its Node's address, for nobody.
    pub fn node(pilot: &Pilot) -> Self {
        let node = api::cluster("nodes").get(&pilot.node).expect("the pilot's Node is there");
        let addresses = node["status"]["addresses"].as_array().unwrap();
        let internal = addresses.iter().find(|address| address["type"] == "InternalIP").unwrap();
        let port = node["status"]["daemonEndpoints"]["kubeletEndpoint"]["Port"].as_u64().unwrap();
        let ip = internal["address"].as_str().unwrap().parse().unwrap();
        Self::to(SocketAddr::new(ip, port.try_into().unwrap()), None)
    }

    /// The API server, as cluster-admin.
    pub fn api_server() -> Self {
        Self::to(bed().api_server().parse().unwrap(), None).as_admin()
    }

    /// A server that stands behind the API server, as cluster-admin.
    pub fn api_server_at(address: SocketAddr) -> Self {
        Self::to(address, None).as_admin()
    }

    fn to(address: SocketAddr, identity: Option<(&str, &str)>) -> Self {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(AnyServer));
        let config = match identity {
            None => builder.with_no_client_auth(),
            Some((certificate, key)) => {
                let chain = CertificateDer::pem_slice_iter(certificate.as_bytes());
                let chain = chain.collect::<Result<Vec<_>, _>>().unwrap();
                let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap();
                builder.with_client_auth_cert(chain, key).unwrap()
            }
        };
        Self { address, config: Arc::new(config), headers: Vec::new() }
    }

    /// With a client certificate and its key, as PEM.
    pub fn certificate(&self, certificate: &str, key: &str) -> Self {
        Self { headers: self.headers.clone(), ..Self::to(self.address, Some((certificate, key))) }
    }

    /// With the certificate of a cluster-admin, which the cluster's CA signed.
    pub fn as_admin(&self) -> Self {
        let pki = bed().admin_kubeconfig().with_file_name("pki");
        self.certificate(&read(&pki.join("admin.crt")), &read(&pki.join("admin.key")))
    }

    /// With a bearer token.
    pub fn token(&self, token: &str) -> Self {
        self.header("Authorization", &format!("Bearer {token}"))
    }

    /// With one header more in each request.
    pub fn header(&self, name: &str, value: &str) -> Self {
        let mut other = self.clone();
        other.headers.push((name.to_owned(), value.to_owned()));
        other
    }

    /// A request for WebSockets of this subprotocol.
    pub fn websocket(&self, protocol: &str) -> Self {
        self.header("Connection", "Upgrade")
            .header("Upgrade", "websocket")
            .header("Sec-WebSocket-Version", "13")
            .header("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ==")
            .header("Sec-WebSocket-Protocol", protocol)
    }

    /// A request for SPDY of this protocol.
    pub fn spdy(&self, protocol: &str) -> Self {
        self.header("Connection", "Upgrade")
            .header("Upgrade", "SPDY/3.1")
            .header("X-Stream-Protocol-Version", protocol)
    }

    /// A connection whose handshake has been done.
    pub fn connect(&self) -> std::io::Result<Connection> {
        let stream = TcpStream::connect(self.address)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(ANSWER_LIMIT))?;
        stream.set_write_timeout(Some(ANSWER_LIMIT))?;
        let name = ServerName::IpAddress(self.address.ip().into());
        let connection = ClientConnection::new(Arc::clone(&self.config), name).unwrap();
        let mut connection = StreamOwned::new(connection, stream);
        while connection.conn.is_handshaking() {
            connection.conn.complete_io(&mut connection.sock)?;
        }
        Ok(connection)
    }

    /// The head of a request as it is sent.
    pub fn head(&self, method: &str, path: &str) -> String {
        let upgrades = self.headers.iter().any(|(name, _)| name == "Connection");
        let mut head = format!("{method} {path} HTTP/1.1\r\nHost: {}\r\n", self.address);
        if !upgrades {
            head.push_str("Connection: close\r\n");
        }
        for (name, value) in &self.headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        head + "\r\n"
    }

    /// Asks, and leaves the answer to be read.
    pub fn open(&self, method: &str, path: &str) -> std::io::Result<Connection> {
        let mut connection = self.connect()?;
        connection.write_all(self.head(method, path).as_bytes())?;
        connection.flush()?;
        Ok(connection)
    }

    /// Asks, and reads the answer to its end; of one that upgrades the connection, the head.
    #[track_caller]
    pub fn ask(&self, method: &str, path: &str) -> Answer {
        self.try_raw(self.head(method, path).as_bytes())
            .unwrap_or_else(|error| panic!("{method} {path} of {}: {error}", self.address))
    }

    /// GET.
    #[track_caller]
    pub fn get(&self, path: &str) -> Answer {
        self.ask("GET", path)
    }

    /// GET of who may not listen yet.
    pub fn try_get(&self, path: &str) -> std::io::Result<Answer> {
        self.try_raw(self.head("GET", path).as_bytes())
    }

    /// Sends bytes, and reads the answer to its end.
    pub fn try_raw(&self, request: &[u8]) -> std::io::Result<Answer> {
        let mut connection = self.connect()?;
        // Who is refused before all is sent may still have an answer to read.
        let sent = connection.write_all(request).and_then(|()| connection.flush());
        let head = match read_head(&mut connection) {
            Ok(head) => head,
            Err(error) => return Err(sent.err().unwrap_or(error)),
        };
        let status = status(&head);
        let mut body = Vec::new();
        let lower = head.to_ascii_lowercase();
        let length =
            lower.split_once("content-length: ").and_then(|(_, rest)| rest.lines().next()?.parse().ok());
        if status != 101 {
            let mut rest = connection.take(length.unwrap_or(u64::MAX));
            ended(rest.read_to_end(&mut body))?;
        }
        if lower.contains("transfer-encoding: chunked") {
            body = dechunk(&body);
        }
        Ok(Answer { status, head, body: String::from_utf8_lossy(&body).into_owned() })
    }
}

/// The status of a head.
pub fn status(head: &str) -> u16 {
    let word = head.split(' ').nth(1).unwrap_or_default();
    word.parse().unwrap_or_else(|_| panic!("no HTTP answer: {head:?}"))
}

/// Reads the head of an answer, and not a byte more.
pub fn read_head(connection: &mut impl Read) -> std::io::Result<String> {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        if connection.read(&mut byte)? == 0 {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        head.push(byte[0]);
        assert!(head.len() < 64 * 1024, "a head without an end");
    }
    Ok(String::from_utf8_lossy(&head).into_owned())
}

/// Not every server says good-bye in TLS before it closes.
fn ended(read: std::io::Result<usize>) -> std::io::Result<()> {
    match read {
        Err(error) if !matches!(error.kind(), ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset) => {
            Err(error)
        }
        _ => Ok(()),
    }
}

/// A chunked body's bytes.
pub fn dechunk(mut body: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    while let Some(end) = body.windows(2).position(|pair| pair == b"\r\n") {
        let size = std::str::from_utf8(&body[..end]).ok();
        let size = size.and_then(|size| usize::from_str_radix(size.trim(), 16).ok()).unwrap_or(0);
        let data = &body[end + 2..];
        if size == 0 || data.len() < size {
            bytes.extend_from_slice(&data[..size.min(data.len())]);
            break;
        }
        bytes.extend_from_slice(&data[..size]);
        body = data.get(size + 2..).unwrap_or_default();
    }
    bytes
}

/// One message of a WebSocket server: the opcode and the payload (RFC 6455, 5.2). A server does not mask.
pub fn read_message(connection: &mut impl Read) -> std::io::Result<(u8, Vec<u8>)> {
    let mut two = [0; 2];
    connection.read_exact(&mut two)?;
    let length = match two[1] & 0x7f {
        126 => {
            let mut length = [0; 2];
            connection.read_exact(&mut length)?;
            u64::from(u16::from_be_bytes(length))
        }
        127 => {
            let mut length = [0; 8];
            connection.read_exact(&mut length)?;
            u64::from_be_bytes(length)
        }
        length => u64::from(length),
    };
    let mut payload = vec![0; usize::try_from(length).unwrap()];
    connection.read_exact(&mut payload)?;
    Ok((two[0] & 0x0f, payload))
}

/// A short message of a WebSocket client: bytes for a channel, masked with zeros.
pub fn say(connection: &mut impl Write, channel: u8, bytes: &[u8]) -> std::io::Result<()> {
    let length = u8::try_from(bytes.len() + 1).ok().filter(|length| *length < 126).expect("a short message");
    let head = [0x82, 0x80 | length, 0, 0, 0, 0, channel];
    connection.write_all(&[&head, bytes].concat())?;
    connection.flush()
}

/// What an exec by WebSocket (v5.channel.k8s.io) gave: its output, and the status as JSON.
pub fn read_exec(connection: &mut impl Read) -> std::io::Result<(Vec<u8>, serde_json::Value)> {
    let mut output = Vec::new();
    loop {
        let (opcode, payload) = read_message(connection)?;
        // Binary messages: a channel and what goes over it. All else is of no matter here, but for a good-bye.
        match (opcode, payload.split_first()) {
            (2, Some((1, bytes))) => output.extend_from_slice(bytes),
            (2, Some((3, status))) if !status.is_empty() => {
                return Ok((output, serde_json::from_slice(status).unwrap()));
            }
            (8, _) => return Err(ErrorKind::UnexpectedEof.into()),
            _ => {}
        }
    }
}

/// The Node's certificate is its own, until somebody signs one: who it is, is no part of these tests.
#[derive(Debug)]
struct AnyServer;

impl ServerCertVerifier for AnyServer {
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
