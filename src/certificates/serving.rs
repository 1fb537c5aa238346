//! The certificate that the Node's own API serves with, which another may replace at run time.
//!
//! [`start`] begins with what there is and keeps it good; [`Serving`] is what a rustls server asks at each handshake.

use std::net::IpAddr;
use std::path::Path;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::SystemTime;

use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use tokio::sync::watch;

use super::files::{self, Files};
use super::kubelet_serving;
use super::pair::{A_YEAR, CertificateError, self_signed};

/// The certificate of these files (certificate, key), read again when they change; without files a self-signed one for the
/// names and addresses `reached_at` of the moment, which one of the cluster replaces where the cluster signs one.
/// `deadline` is the end as it is known at the time. To be called in a tokio runtime.
///
/// # Errors
/// When the files are no good, or a name cannot stand in a certificate.
pub fn start(
    client: kube::Client,
    node: &str,
    reached_at: watch::Receiver<Vec<String>>,
    given: Option<(&Path, &Path)>,
    deadline: impl Fn() -> Option<SystemTime> + Send + Sync + 'static,
) -> Result<Arc<Serving>, CertificateError> {
    if let Some((certificate, key)) = given {
        let (files, first) = Files::open(certificate, key)?;
        let serving = Serving::new(first);
        tokio::spawn(files::follow(files, Arc::clone(&serving)));
        return Ok(serving);
    }
    let (names, ips) = addresses(reached_at.borrow().iter().map(String::as_str));
    // Not the walltime: a limit may be prolonged, and the key is nowhere but in this process.
    let serving = Serving::new(self_signed(&names, &ips, A_YEAR)?);
    let kept = kubelet_serving::keep(client, node.to_owned(), reached_at, Arc::clone(&serving), deadline);
    tokio::spawn(kept);
    Ok(serving)
}

/// A Node's addresses as names and IP addresses, as kubelet sorts them for its certificate
/// (`pkg/kubelet/certificate/kubelet.go`).
#[must_use]
pub fn addresses<'a>(all: impl IntoIterator<Item = &'a str>) -> (Vec<String>, Vec<IpAddr>) {
    let (mut names, mut ips) = (Vec::new(), Vec::new());
    for address in all.into_iter().filter(|address| !address.is_empty()) {
        match address.parse() {
            Ok(ip) => ips.push(ip),
            Err(_) => names.push(address.to_owned()),
        }
    }
    (names, ips)
}

/// The certificate in use. Connections that are open keep theirs; the next handshake gets the newest.
#[derive(Debug)]
pub struct Serving {
    current: RwLock<Arc<CertifiedKey>>,
}

impl Serving {
    /// Begins with this certificate.
    #[must_use]
    pub fn new(first: CertifiedKey) -> Arc<Self> {
        Arc::new(Self { current: RwLock::new(Arc::new(first)) })
    }

    /// The certificate in use.
    #[must_use]
    pub fn current(&self) -> Arc<CertifiedKey> {
        Arc::clone(&self.current.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Puts another certificate in its place.
    pub fn swap(&self, next: CertifiedKey) {
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(next);
    }
}

impl ResolvesServerCert for Serving {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.current())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::certificates::pair::{A_YEAR, self_signed};
    use rustls::pki_types::{CertificateDer, ServerName};
    use rustls::{ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection};

    fn certificate(name: &str) -> CertifiedKey {
        self_signed(&[name.to_owned()], &["127.0.0.1".parse().unwrap()], A_YEAR).unwrap()
    }

    /// Shakes hands with a client that trusts one certificate and wants one name.
    fn handshake(
        server: &Arc<ServerConfig>,
        trusted: CertificateDer<'static>,
        name: &str,
    ) -> Result<(), rustls::Error> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut roots = RootCertStore::empty();
        roots.add(trusted).unwrap();
        let config = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
        let config = config.with_root_certificates(roots).with_no_client_auth();
        let name = ServerName::try_from(name.to_owned()).unwrap();
        let mut client = ClientConnection::new(Arc::new(config), name)?;
        let mut server = ServerConnection::new(Arc::clone(server))?;
        while client.is_handshaking() || server.is_handshaking() {
            let mut wire = Vec::new();
            client.write_tls(&mut wire).unwrap();
            server.read_tls(&mut wire.as_slice()).unwrap();
            server.process_new_packets()?;
            wire.clear();
            server.write_tls(&mut wire).unwrap();
            client.read_tls(&mut wire.as_slice()).unwrap();
            client.process_new_packets()?;
        }
        Ok(())
    }

    #[test]
    fn addresses_are_sorted_into_names_and_ips() {
        let (names, ips) = addresses(["host-1", "10.0.0.1", "", "::1"]);
        assert_eq!(names, ["host-1"]);
        assert_eq!(ips, ["10.0.0.1".parse::<IpAddr>().unwrap(), "::1".parse().unwrap()]);
    }

    #[test]
    fn the_next_handshake_gets_the_certificate_that_was_swapped_in() {
        let (first, second) = (certificate("one"), certificate("two"));
        let trusted = [first.cert[0].clone(), second.cert[0].clone()];
        let serving = Serving::new(first);
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config =
            ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
        let resolver: Arc<dyn ResolvesServerCert> = serving.clone();
        let config = Arc::new(config.with_no_client_auth().with_cert_resolver(resolver));
        handshake(&config, trusted[0].clone(), "one").unwrap();
        handshake(&config, trusted[0].clone(), "127.0.0.1").unwrap();
        assert!(handshake(&config, trusted[0].clone(), "other").is_err());
        serving.swap(second);
        handshake(&config, trusted[1].clone(), "two").unwrap();
        assert!(handshake(&config, trusted[0].clone(), "one").is_err());
    }
}
