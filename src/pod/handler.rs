//! What a pod's hooks do (core/v1 LifecycleHandler): run a program in the container, ask an HTTP server, open a
//! connection, wait. Source: kubelet's `lifecycle/handlers.go` and `util/ioutils`.

pub(super) mod http;

use std::io;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Container, ContainerPort, HTTPGetAction, LifecycleHandler, Pod};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use tokio::net::TcpStream;

use self::http::Target;
use super::containers;
use super::session::{RunHandle, run_to_end};

/// What a failed hook's message quotes of its program's output: as much as a probe's (prober.go, maxProbeMessageLength).
const OUTPUT_BYTES: usize = 1024;

/// Where a pod's own server is, where a hook or a probe names no host: pods have the host's network, and the Node's address
/// may be that of a login host.
pub(super) const HOST: &str = "127.0.0.1";

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
        Self::of(&container, container.lifecycle.as_ref()?.pre_stop.as_ref()?)
    }

    /// The postStart hook of the container of this name, where it has one.
    #[must_use]
    pub fn post_start(pod: &Pod, container: &str) -> Option<Self> {
        let (_, container) = containers::find(pod, container)?;
        Self::of(&container, container.lifecycle.as_ref()?.post_start.as_ref()?)
    }

    fn of(container: &Container, handler: &LifecycleHandler) -> Option<Self> {
        let ports = container.ports.clone().unwrap_or_default();
        Some(Self { handler: handler.clone(), ports })
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
            let port = port(&socket.port, &self.ports)?;
            return connect(&host, port).await.map(drop).map_err(|error| error.to_string());
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
pub(super) fn port(port: &IntOrString, named: &[ContainerPort]) -> Result<u16, String> {
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

/// Nobody answers there.
#[derive(Debug, thiserror::Error)]
#[error("dial tcp {host}:{port}: {}", reason(.source))]
pub(super) struct Unconnected {
    host: String,
    port: u16,
    source: io::Error,
}

/// As Go's errors say it, without the number: events of kubelets are searched for these words.
fn reason(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::ConnectionRefused => "connect: connection refused".to_owned(),
        io::ErrorKind::HostUnreachable => "connect: no route to host".to_owned(),
        io::ErrorKind::NetworkUnreachable => "connect: network is unreachable".to_owned(),
        _ => error.to_string(),
    }
}

pub(super) async fn connect(host: &str, port: u16) -> Result<TcpStream, Unconnected> {
    let fail = |source| Unconnected { host: http::bracketed(host), port, source };
    TcpStream::connect((host, port)).await.map_err(fail)
}

/// A GET that any answer answers well, whatever its status (lifecycle/handlers.go, runHTTPHandler).
async fn ask(get: &HTTPGetAction, ports: &[ContainerPort]) -> Result<(), String> {
    let target = Target::new(get, ports)?;
    let answer = target.get("lifecycle", get.http_headers.as_deref().unwrap_or_default()).await;
    answer.map(drop).map_err(|error| error.to_string())
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
        assert_eq!(result, Ok(()));
        let (result, _) = answer("").await;
        assert!(result.is_err());
    }
}
