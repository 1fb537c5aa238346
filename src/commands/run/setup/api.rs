//! The Node's own HTTPS API, put together.

use std::net::TcpListener;
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use tokio::sync::watch;

use super::SetupError;
use crate::allocation::{Allocation, Deadline};
use crate::certificates;
use crate::cli::RunArgs;
use crate::cluster::Kube;
use crate::node::Timing;
use crate::pod::context::Context;
use crate::server::identity::Authenticator;
use crate::server::rights::Authorizer;
use crate::server::{self, About, Pages, Server};

/// The first API server that upgrades to WebSockets up to the Node (KEP-4006; kube_features.go,
/// ExtendWebSocketsToKubelet). Older ones clear what a Node declares, or do not know the field.
const WEBSOCKETS_SINCE: (u32, u32) = (1, 36);

/// What the Node declares to such an API server.
const WEBSOCKETS: &str = "ExtendWebSocketsToKubelet";

/// A CA file holds some certificates of a kilobyte or two.
const CA_BYTES: u64 = 1 << 20;

/// Takes the port of the Node's own API; nobody is answered on it yet.
///
/// # Errors
/// When it is taken.
pub(in crate::commands) fn take_port(port: u16) -> Result<TcpListener, SetupError> {
    server::bind(port).map_err(|error| {
        // The same words with every C library.
        let problem = error.raw_os_error().map(|code| nix::errno::Errno::from_raw(code).desc());
        let problem = problem.map_or_else(|| error.to_string(), str::to_owned);
        SetupError::Host(format!(
            "port {port} of --port (KUBELET_PORT) cannot be taken: {problem}; name a free port, or 0 for any"
        ))
    })
}

/// The port that was taken.
pub(super) fn port_of(listener: &TcpListener) -> Result<u16, SetupError> {
    let address = listener.local_addr();
    address
        .map(|address| address.port())
        .map_err(|error| SetupError::Host(format!("the Node's port: {error}")))
}

/// The certificates whose holders are known: of `--client-ca-file`, else of the cluster as the kubeconfig names it.
///
/// # Errors
/// When the file holds none.
pub(super) fn client_authorities(
    file: Option<&Path>,
    kube: &Kube,
) -> Result<Vec<CertificateDer<'static>>, SetupError> {
    match file {
        Some(file) => authorities_in(file),
        None => {
            let known = kube.config.root_cert.clone().unwrap_or_default();
            Ok(known.into_iter().map(CertificateDer::from).collect())
        }
    }
}

/// The certificates in `--client-ca-file`.
///
/// # Errors
/// When the file cannot be read, or holds none.
pub(super) fn authorities_in(file: &Path) -> Result<Vec<CertificateDer<'static>>, SetupError> {
    let wrong = |problem: String| {
        SetupError::Setting(format!(
            "invalid value '{}' for '--client-ca-file': {problem}; a readable file of PEM certificates is wanted",
            file.display()
        ))
    };
    let size = std::fs::metadata(file).map_err(|error| wrong(error.to_string()))?.len();
    if size > CA_BYTES {
        return Err(wrong(format!("it has {size} bytes")));
    }
    let pem = std::fs::read(file).map_err(|error| wrong(error.to_string()))?;
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
    match found {
        Ok(found) if !found.is_empty() => Ok(found),
        Ok(_) => Err(wrong("it holds no certificate".to_owned())),
        Err(error) => Err(wrong(error.to_string())),
    }
}

/// What the Node declares: only what this API server knows.
pub(super) async fn declared_features(client: &kube::Client) -> Vec<String> {
    let Ok(version) = client.apiserver_version().await else { return Vec::new() };
    if knows_websockets(&version.major, &version.minor) { vec![WEBSOCKETS.to_owned()] } else { Vec::new() }
}

/// Whether an API server of this version speaks WebSockets to Nodes. Some write `36+`.
fn knows_websockets(major: &str, minor: &str) -> bool {
    let number = |text: &str| {
        let digits: String = text.chars().take_while(char::is_ascii_digit).collect();
        digits.parse::<u32>().ok()
    };
    match (number(major), number(minor)) {
        (Some(major), Some(minor)) => (major, minor) >= WEBSOCKETS_SINCE,
        _ => false,
    }
}

/// What is known before the Node is registered.
pub(super) struct Parts<'a> {
    pub args: &'a RunArgs,
    pub client: kube::Client,
    pub listener: TcpListener,
    pub authorities: &'a [CertificateDer<'static>],
    pub node: &'a str,
    /// The names and addresses by which the Node is reached, as they are known at the time.
    pub reached_at: watch::Receiver<Vec<String>>,
    pub timing: watch::Receiver<Option<Timing>>,
    pub deadline: watch::Receiver<Option<Deadline>>,
}

/// An API of which nothing can fail any more.
pub(super) struct Prepared {
    listener: tokio::net::TcpListener,
    tls: Arc<rustls::ServerConfig>,
    authenticator: Authenticator,
    authorizer: Authorizer,
    anonymous_metrics: bool,
    node: String,
    timing: watch::Receiver<Option<Timing>>,
    deadline: watch::Receiver<Option<Deadline>>,
}

/// Puts together what can be wrong.
///
/// # Errors
/// When a certificate that was given is no good.
pub(super) fn prepare(parts: Parts<'_>) -> Result<Prepared, SetupError> {
    let Parts { args, client, listener, authorities, node, reached_at, timing, deadline } = parts;
    let host = |error: String| SetupError::Host(format!("the Node's own API: {error}"));
    let given = args.tls_cert_file.as_deref().zip(args.tls_private_key_file.as_deref());
    let known = timing.clone();
    let end = move || known.borrow().as_ref().map(|t| t.deadline);
    let serving = certificates::serving::start(client.clone(), node, reached_at, given, end)?;
    Ok(Prepared {
        listener: tokio::net::TcpListener::from_std(listener).map_err(|error| host(error.to_string()))?,
        tls: server::tls::config(serving).map_err(|error| host(error.to_string()))?,
        authenticator: Authenticator::new(authorities, client.clone()).map_err(|problem| {
            host(format!("the certificates by which clients are known (--client-ca-file, else the kubeconfig's): {problem}"))
        })?,
        authorizer: Authorizer::new(client, node.to_owned()),
        anonymous_metrics: args.anonymous_metrics,
        node: node.to_owned(),
        timing,
        deadline,
    })
}

impl Prepared {
    /// Begins to answer.
    pub(super) fn serve(self, context: &Context, allocation: &Allocation, site: &str) {
        let about = About {
            node: self.node,
            site: site.to_owned(),
            batch: allocation.batch.label().to_owned(),
            job: allocation.job_id.as_ref().map(|job| job.value.clone()),
            host: allocation.host.clone(),
            pods: context.places.pods.clone(),
            memory: allocation.memory.value,
            cpus: allocation.cpus.value.len(),
            started_at: SystemTime::now(),
            timing: self.timing,
            deadline: self.deadline,
        };
        let pages = Pages::new(about, context.metrics.clone());
        let roster = Arc::clone(&context.roster);
        let server = Server::new(roster, self.authenticator, self.authorizer, self.anonymous_metrics, pages);
        tokio::spawn(server::serve(self.listener, self.tls, Arc::new(server)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_api_server_that_is_new_enough_is_told_of_websockets() {
        for (major, minor, wanted) in [
            ("1", "36", true),
            ("1", "36+", true),
            ("1", "40", true),
            ("2", "0", true),
            ("1", "35", false),
            ("1", "9", false),
            ("", "", false),
        ] {
            assert_eq!(knows_websockets(major, minor), wanted, "{major}.{minor}");
        }
    }
}
