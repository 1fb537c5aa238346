//! What a pod's hooks do (core/v1 LifecycleHandler): run a program in the container, ask an HTTP server, open a
//! connection, wait. Source: kubelet's `lifecycle/handlers.go` and `util/ioutils`.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Empty};
use hyper_util::rt::TokioIo;
use k8s_openapi::api::core::v1::{ContainerPort, HTTPGetAction, LifecycleHandler, Pod};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{DigitallySignedStruct, SignatureScheme};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;

use super::containers;
use super::session::{RunHandle, run_to_end};

/// What a failed hook's message quotes of its program's output: as much as a probe's (prober.go, maxProbeMessageLength).
const OUTPUT_BYTES: usize = 1024;

/// What is read of an HTTP answer: as a kubelet (util/ioutils, maxRespBodyLength).
const BODY_BYTES: usize = 10 * 1024;

/// Where a pod's own server is, where a hook names no host: pods have the host's network, and the Node's address may be
/// that of a login host.
const HOST: &str = "127.0.0.1";

/// A hook of a container.
#[derive(Debug, Clone, PartialEq)]
pub struct Hook {
    handler: LifecycleHandler,
    ports: Vec<ContainerPort>,
}

impl Hook {
    /// The preStop hook of the container of this name, where it has one.
    #[must_use]
    pub fn pre_stop(pod: &Pod, container: &str) -> Option<Self> {
        let (_, container) = containers::find(pod, container)?;
        let handler = container.lifecycle.as_ref()?.pre_stop.clone()?;
        let ports = container.ports.clone().unwrap_or_default();
        Some(Self { handler, ports })
    }

    /// The postStart hook of the container of this name, where it has one.
    #[must_use]
    pub fn post_start(pod: &Pod, container: &str) -> Option<Self> {
        let (_, container) = containers::find(pod, container)?;
        let handler = container.lifecycle.as_ref()?.post_start.clone()?;
        let ports = container.ports.clone().unwrap_or_default();
        Some(Self { handler, ports })
    }

    /// Runs the hook in or against a container that runs.
    ///
    /// # Errors
    /// When it fails: why.
    pub async fn run(self, container: RunHandle) -> Result<(), String> {
        let LifecycleHandler { exec, http_get, sleep, tcp_socket } = self.handler;
        if let Some(exec) = exec {
            return run_program(&container, exec.command.unwrap_or_default()).await;
        }
        if let Some(get) = http_get {
            return ask(&get, &self.ports).await;
        }
        if let Some(sleep) = sleep {
            tokio::time::sleep(Duration::from_secs(u64::try_from(sleep.seconds).unwrap_or(0))).await;
            return Ok(());
        }
        if let Some(socket) = tcp_socket {
            let host = socket.host.filter(|host| !host.is_empty()).unwrap_or_else(|| HOST.to_owned());
            return connect(&host, port(&socket.port, &self.ports)?).await.map(drop);
        }
        Err("it names nothing to do: exec, httpGet, tcpSocket or sleep is wanted".to_owned())
    }
}

async fn run_program(container: &RunHandle, argv: Vec<String>) -> Result<(), String> {
    let (end, output) = run_to_end(container, argv, OUTPUT_BYTES).await.map_err(|e| e.to_string())?;
    match end {
        Ok(0) => Ok(()),
        Ok(code) => Err(format!(
            "its command ended with exit code {code}: {}",
            String::from_utf8_lossy(&output).trim()
        )),
        Err(error) => Err(error.to_string()),
    }
}

/// A port by its number or by its name among the container's ports.
fn port(port: &IntOrString, named: &[ContainerPort]) -> Result<u16, String> {
    let number = match port {
        IntOrString::Int(number) => Some(*number),
        IntOrString::String(name) => match named.iter().find(|p| p.name.as_deref() == Some(name)) {
            Some(port) => Some(port.container_port),
            None => name.parse().ok(),
        },
    };
    number.and_then(|number| u16::try_from(number).ok()).filter(|number| *number > 0).ok_or_else(|| {
        format!(
            "port {port:?} is neither a number from 1 to 65535 nor the name of one of the container's ports"
        )
    })
}

async fn connect(host: &str, port: u16) -> Result<TcpStream, String> {
    TcpStream::connect((host, port)).await.map_err(|error| format!("{host}:{port}: {error}"))
}

/// A GET that any status from 200 to 399 answers well.
async fn ask(get: &HTTPGetAction, ports: &[ContainerPort]) -> Result<(), String> {
    let host = get.host.as_deref().filter(|host| !host.is_empty()).unwrap_or(HOST);
    let port = port(&get.port, ports)?;
    let stream = connect(host, port).await?;
    let request = request(get, host, port)?;
    let status = if get.scheme.as_deref() == Some("HTTPS") {
        let name = ServerName::try_from(host.to_owned()).map_err(|error| format!("{host}: {error}"))?;
        let config = tokio_rustls::TlsConnector::from(Arc::new(unverified()?));
        let stream = config.connect(name, stream).await.map_err(|error| format!("{host}:{port}: {error}"))?;
        send(stream, request).await
    } else {
        send(stream, request).await
    };
    match status {
        Ok(status) if status.is_success() || status.is_redirection() => Ok(()),
        Ok(status) => Err(format!("HTTP {status} from {host}:{port}")),
        Err(error) => Err(format!("{host}:{port}: {error}")),
    }
}

fn request(get: &HTTPGetAction, host: &str, port: u16) -> Result<http::Request<Empty<Bytes>>, String> {
    let path = get.path.as_deref().unwrap_or("/");
    let path = if path.starts_with('/') { path.to_owned() } else { format!("/{path}") };
    let mut builder = http::Request::get(&path);
    let mut named = false;
    for header in get.http_headers.iter().flatten() {
        named |= header.name.eq_ignore_ascii_case("host");
        builder = builder.header(&header.name, &header.value);
    }
    if !named {
        builder = builder.header(http::header::HOST, format!("{host}:{port}"));
    }
    builder.body(Empty::new()).map_err(|error| format!("path {path:?} and its headers: {error}"))
}

async fn send(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    request: http::Request<Empty<Bytes>>,
) -> Result<http::StatusCode, hyper::Error> {
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let exchange = async {
        let mut response = sender.send_request(request).await?;
        let mut read = 0;
        while let Some(frame) = response.frame().await {
            read += frame?.data_ref().map_or(0, Bytes::len);
            if read > BODY_BYTES {
                break;
            }
        }
        Ok(response.status())
    };
    tokio::pin!(connection);
    tokio::select! {
        status = exchange => status,
        // It ends with the exchange, or the exchange fails for it.
        Err(error) = &mut connection => Err(error),
    }
}

/// A kubelet does not verify the certificate of a pod's own server (probe/http, InsecureSkipVerify).
fn unverified() -> Result<rustls::ClientConfig, String> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(AnyCertificate));
    Ok(config.with_no_client_auth())
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
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;

    fn ports() -> Vec<ContainerPort> {
        vec![ContainerPort { container_port: 8080, name: Some("web".to_owned()), ..Default::default() }]
    }

    #[test]
    fn a_port_is_a_number_or_a_containers_name_for_one() {
        assert_eq!(port(&IntOrString::Int(80), &ports()), Ok(80));
        assert_eq!(port(&IntOrString::String("web".to_owned()), &ports()), Ok(8080));
        assert_eq!(port(&IntOrString::String("81".to_owned()), &ports()), Ok(81));
        for bad in [IntOrString::Int(0), IntOrString::Int(70000), IntOrString::String("other".to_owned())] {
            assert!(port(&bad, &ports()).is_err(), "{bad:?}");
        }
    }

    async fn answer(text: &'static str) -> (Result<(), String>, String) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let get = HTTPGetAction {
            path: Some("stop?now".to_owned()),
            port: IntOrString::Int(i32::from(listener.local_addr().unwrap().port())),
            ..Default::default()
        };
        let server = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut asked = [0; 512];
            let n = stream.read(&mut asked).await.unwrap();
            stream.write_all(text.as_bytes()).await.unwrap();
            String::from_utf8_lossy(&asked[..n]).into_owned()
        };
        tokio::join!(ask(&get, &[]), server)
    }

    #[tokio::test]
    async fn an_http_hook_goes_by_the_answers_status() {
        let (result, asked) = answer("HTTP/1.1 204 No Content\r\n\r\n").await;
        assert_eq!(result, Ok(()));
        assert!(asked.starts_with("GET /stop?now HTTP/1.1\r\n"), "{asked}");
        let (result, _) = answer("HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n").await;
        assert!(result.unwrap_err().contains("500"));
        let (result, _) = answer("").await;
        assert!(result.is_err());
    }
}
