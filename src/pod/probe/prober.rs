//! One probe: a program in the container, an HTTP GET, a connection, a gRPC health check. Sources: kubelet's
//! `prober/prober.go` and `probe/{exec,http,tcp,grpc}`.

use std::time::Duration;

use k8s_openapi::api::core::v1::{Container, ExecAction, HTTPGetAction, Probe, TCPSocketAction};
use nix::sys::signal::Signal;

use super::grpc;
use crate::pod::expansion::{Expand, Values, expand};
use crate::pod::handler::http::{GetError, Target};
use crate::pod::handler::{HOST, connect, port};
use crate::pod::session::{RunHandle, run_or};

/// What is kept of a program's output: as a kubelet (probe/exec, maxReadLength).
const OUTPUT_BYTES: usize = 10 * 1024;

/// What a probe came to.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// All is well.
    Success,
    /// It counts as a success, and somebody should know.
    Warning(String),
    /// It is not well: why.
    Failure(String),
    /// The probe itself went wrong, so nothing is known.
    Unknown(String),
    /// The container has ended.
    Gone,
}

/// Probes once.
pub(super) async fn run(container: &Container, run: &RunHandle, probe: &Probe, timeout: Duration) -> Outcome {
    if let Some(exec) = &probe.exec {
        return program(container, run, exec, timeout).await;
    }
    let ports = container.ports.as_deref().unwrap_or_default();
    if let Some(get) = &probe.http_get {
        return match Target::new(get, ports) {
            Ok(target) => http_get(get, &target, timeout).await,
            Err(problem) => Outcome::Unknown(problem),
        };
    }
    if let Some(socket) = &probe.tcp_socket {
        return match port(&socket.port, ports) {
            Ok(port) => tcp_socket(socket, port, timeout).await,
            Err(problem) => Outcome::Unknown(problem),
        };
    }
    if let Some(grpc) = &probe.grpc {
        let Ok(port) = u16::try_from(grpc.port) else {
            return Outcome::Unknown(format!("invalid port number: {}", grpc.port));
        };
        let service = grpc.service.as_deref().unwrap_or_default();
        return match grpc::check(HOST, port, service, timeout).await {
            Ok(()) => Outcome::Success,
            Err(problem) => Outcome::Failure(problem),
        };
    }
    Outcome::Unknown(format!(
        "missing probe handler for {}: exec, httpGet, tcpSocket or grpc is wanted",
        container.name
    ))
}

async fn program(container: &Container, run: &RunHandle, exec: &ExecAction, timeout: Duration) -> Outcome {
    let argv = match command(container, exec) {
        Ok(argv) => argv,
        Err(problem) => return Outcome::Unknown(problem),
    };
    let text = argv.join(" ");
    // A program that is too slow is killed, as by a container runtime.
    match tokio::time::timeout(timeout, run_or(Signal::SIGKILL, run, argv, OUTPUT_BYTES)).await {
        Err(_) => {
            let limit = go_duration(timeout);
            Outcome::Failure(format!("command timed out: {text:?} timed out after {limit}"))
        }
        Ok(Err(_)) => Outcome::Gone,
        Ok(Ok((Ok(0), _))) => Outcome::Success,
        Ok(Ok((Ok(_), output))) => Outcome::Failure(String::from_utf8_lossy(&output).into_owned()),
        // What cannot be run says nothing about the container (probe/exec).
        Ok(Ok((Err(error), _))) => Outcome::Unknown(error.to_string()),
    }
}

/// `$(NAME)` in a probe's command names the values that stand in the container's `env` (container/helpers.go,
/// ExpandContainerCommandOnlyStatic).
fn command(container: &Container, exec: &ExecAction) -> Result<Vec<String>, String> {
    let declared = |name: &str| {
        let mut env = container.env.iter().flatten().rev();
        env.find(|var| var.name == name).map(|var| var.value.clone().unwrap_or_default())
    };
    let values = Values { declared: &declared, environment: &|_| None, home: None };
    let command = exec.command.iter().flatten();
    command.map(|part| expand(part, Expand::Kubernetes, &values).map_err(|error| error.to_string())).collect()
}

async fn http_get(get: &HTTPGetAction, target: &Target, timeout: Duration) -> Outcome {
    let headers = get.http_headers.as_deref().unwrap_or_default();
    let answer = match tokio::time::timeout(timeout, target.get_following("probe", headers)).await {
        Ok(Ok(answer)) => answer,
        Ok(Err(GetError::Failed(problem))) => return Outcome::Failure(problem),
        Ok(Err(GetError::Unknown(problem))) => return Outcome::Unknown(problem),
        Err(_) => {
            let why = "context deadline exceeded (Client.Timeout exceeded while awaiting headers)";
            return Outcome::Failure(format!("Get \"{target}\": {why}"));
        }
    };
    match answer.status.as_u16() {
        200..300 => Outcome::Success,
        300..400 => {
            let body = String::from_utf8_lossy(&answer.body);
            Outcome::Warning(format!("Probe terminated redirects, Response body: {body}"))
        }
        // Not the body: it may hold what only the pod's owner may read (kubernetes issue 99425).
        status => Outcome::Failure(format!("HTTP probe failed with statuscode: {status}")),
    }
}

async fn tcp_socket(socket: &TCPSocketAction, port: u16, timeout: Duration) -> Outcome {
    let host = socket.host.as_deref().filter(|host| !host.is_empty()).unwrap_or(HOST);
    match tokio::time::timeout(timeout, connect(host, port)).await {
        Ok(Ok(_)) => Outcome::Success,
        Ok(Err(error)) => Outcome::Failure(error.to_string()),
        Err(_) => Outcome::Failure(format!("dial tcp {host}:{port}: i/o timeout")),
    }
}

/// Whole seconds as Go prints a duration: `1m30s`.
pub(super) fn go_duration(duration: Duration) -> String {
    let seconds = duration.as_secs();
    let (hours, minutes, seconds) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    match (hours, minutes) {
        (0, 0) => format!("{seconds}s"),
        (0, _) => format!("{minutes}m{seconds}s"),
        _ => format!("{hours}h{minutes}m{seconds}s"),
    }
}

#[cfg(test)]
mod tests;
