//! TLS bootstrap: from a bootstrap token to a node's own identity, `system:node:<node name>`.
//!
//! [`connect`] gives a client of that identity. Key and certificate stay in the pilot's state directory, so that a pilot
//! that is started again needs no new one, and are renewed while the pilot lives.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use secrecy::{ExposeSecret as _, SecretString};
use x509_cert::der::Decode as _;

use super::pair;
use super::renewal::{self, Plan, plan};
use super::request::{self, Issued, NODE_USER, RequestError, Signer, Wanted};
use super::switch::Switch;
use crate::cluster::{ClusterError, Kube};
use crate::files::write_atomic;

/// The file of key and certificate in the state directory.
const FILE: &str = "client.pem";

/// Where the key begins in that file.
const KEY: &str = "-----BEGIN PRIVATE KEY-----";

/// A kept certificate that ends sooner is not taken up: the pilot could hardly register with it.
const LEAST_LEFT: Duration = Duration::from_secs(300);

/// How long one request for a renewal is looked at. The controllers answer within a second.
const RENEWAL_LIMIT: Duration = Duration::from_secs(600);

/// Before the next try at a renewal that failed: a tenth of the shortest life of a certificate, 600 s.
const NEXT_TRY: Duration = Duration::from_secs(60);

/// X.520's common name, `id-at-commonName`.
const COMMON_NAME: &str = "2.5.4.3";

/// Why there is no identity.
#[derive(Debug, thiserror::Error)]
pub enum BootstrapError {
    /// The API server cannot be reached, or refuses the bootstrap token.
    #[error(transparent)]
    Cluster(#[from] ClusterError),
    /// There is no certificate.
    #[error(
        "TLS bootstrap with {source_name}: {source}; docs/cluster/tls-bootstrap.yaml has the rights that it needs"
    )]
    Request {
        /// The bootstrap kubeconfig.
        source_name: String,
        /// Why.
        #[source]
        source: Box<RequestError>,
    },
    /// It cannot be kept.
    #[error("{path}: {source}; choose another place with --state-dir", path = path.display())]
    Keep {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl BootstrapError {
    /// Whether the API server, or who approves, has refused.
    #[must_use]
    pub fn is_refusal(&self) -> bool {
        match self {
            Self::Cluster(error) => matches!(error, ClusterError::Refused { .. }),
            Self::Request { source, .. } => {
                source.is_forbidden() || matches!(**source, RequestError::Turned { .. })
            }
            Self::Keep { .. } => false,
        }
    }
}

/// A client as `system:node:<node>`, tried for `limit`. `kube` is the bootstrap kubeconfig; its credential is used only
/// where no kept certificate is. The certificate is renewed for as long as the runtime runs; where that fails, `expires` is
/// told when the certificate ends, and `None` when a renewal has worked again.
///
/// # Errors
/// When the API server never answered or refused, nobody signed, or the certificate cannot be kept.
pub async fn connect(
    kube: &Kube,
    node: &str,
    state_dir: &Path,
    limit: Duration,
    deadline: impl Fn() -> Option<SystemTime> + Send + 'static,
    expires: impl Fn(Option<SystemTime>) + Send + 'static,
) -> Result<kube::Client, BootstrapError> {
    let started = Instant::now();
    let file = state_dir.join(FILE);
    let wanted =
        Wanted { signer: Signer::KubeletClient, node: node.to_owned(), names: Vec::new(), ips: Vec::new() };
    if let Some(kept) = kept(&file, node, SystemTime::now()) {
        match identity(kube, node, &kept).connect(limit).await {
            Ok(client) => {
                tracing::info!(node, "the node's own certificate is the one that was kept");
                return Ok(keep(kube.clone(), wanted, file, kept, client, deadline, expires));
            }
            // A certificate of another cluster, or of a CA that was replaced since.
            Err(ClusterError::Refused { code: 401, .. }) => {
                tracing::warn!(
                    node,
                    "the API server does not take the kept certificate; another is asked for"
                );
            }
            Err(error) => return Err(error.into()),
        }
    }
    let client = kube.connect(limit.saturating_sub(started.elapsed())).await?;
    let seconds = request::expiration_seconds(deadline(), SystemTime::now());
    let left = limit.saturating_sub(started.elapsed());
    let issued = request::issue(&client, &wanted, seconds, left).await.map_err(|source| {
        BootstrapError::Request { source_name: kube.source.clone(), source: Box::new(source) }
    })?;
    store(&file, &issued).map_err(|source| BootstrapError::Keep { path: file.clone(), source })?;
    tracing::info!(node, "TLS bootstrap: the cluster has signed the node's own certificate");
    let left = limit.saturating_sub(started.elapsed());
    let client = identity(kube, node, &issued).connect(left).await?;
    Ok(keep(kube.clone(), wanted, file, issued, client, deadline, expires))
}

/// The way in as the node itself, by the certificate of an earlier start; without any contact.
#[must_use]
pub fn kept_kube(kube: &Kube, node: &str, state_dir: &Path) -> Option<Kube> {
    kept(&state_dir.join(FILE), node, SystemTime::now()).map(|kept| identity(kube, node, &kept))
}

fn identity(kube: &Kube, node: &str, issued: &Issued) -> Kube {
    kube.with_certificate(&format!("certificate of {NODE_USER}{node}"), &issued.chain, &issued.key)
}

/// Hands out a client and keeps it good.
fn keep(
    kube: Kube,
    wanted: Wanted,
    file: PathBuf,
    issued: Issued,
    client: kube::Client,
    deadline: impl Fn() -> Option<SystemTime> + Send + 'static,
    expires: impl Fn(Option<SystemTime>) + Send + 'static,
) -> kube::Client {
    let switch = Switch::new(client);
    let out = switch.client();
    tokio::spawn(renew(kube, wanted, file, issued, switch, deadline, expires));
    out
}

/// Renews for ever: by the identity itself, which the right `selfnodeclient` is for.
async fn renew(
    kube: Kube,
    wanted: Wanted,
    file: PathBuf,
    mut issued: Issued,
    switch: Switch,
    deadline: impl Fn() -> Option<SystemTime>,
    expires: impl Fn(Option<SystemTime>),
) {
    let client = switch.client();
    let mut chance = renewal::chance();
    let mut failed = false;
    loop {
        if let Plan::Wait(wait) = plan(issued.validity, deadline(), SystemTime::now(), chance) {
            tokio::time::sleep(wait).await;
            continue;
        }
        let seconds = request::expiration_seconds(deadline(), SystemTime::now());
        let next = match request::issue(&client, &wanted, seconds, RENEWAL_LIMIT).await {
            Ok(next) => identity(&kube, &wanted.node, &next)
                .client()
                .map(|client| (next, client))
                .map_err(|error| error.to_string()),
            Err(error) => Err(error.to_string()),
        };
        match next {
            Ok((next, client)) => {
                if let Err(error) = store(&file, &next) {
                    tracing::warn!(file = %file.display(), %error, "the renewed certificate cannot be kept for a restart");
                }
                switch.swap(client);
                tracing::info!(node = wanted.node, "the node's own certificate was renewed");
                (issued, chance, failed) = (next, renewal::chance(), false);
                expires(None);
            }
            Err(error) => {
                if !failed {
                    tracing::warn!(
                        node = wanted.node,
                        error,
                        "the node's own certificate could not be renewed, so its end is a deadline now; it is tried again"
                    );
                    failed = true;
                }
                expires(Some(issued.validity.until));
                tokio::time::sleep(NEXT_TRY).await;
            }
        }
    }
}

fn store(file: &Path, issued: &Issued) -> io::Result<()> {
    let mut text = issued.chain.clone();
    if !text.ends_with(b"\n") {
        text.push(b'\n');
    }
    text.extend_from_slice(issued.key.expose_secret().as_bytes());
    write_atomic(file, &text, 0o600)
}

/// The certificate of an earlier start, if it is for this node and holds long enough.
fn kept(file: &Path, node: &str, now: SystemTime) -> Option<Issued> {
    let text = fs::read(file).ok()?;
    let problem = match read(text, node, now) {
        Ok(issued) => return Some(issued),
        Err(problem) => problem,
    };
    tracing::info!(file = %file.display(), problem, "the kept certificate is not used; another is asked for");
    None
}

fn read(text: Vec<u8>, node: &str, now: SystemTime) -> Result<Issued, String> {
    let name = FILE;
    let certified = pair::from_pem((name, &text), (name, &text)).map_err(|error| error.to_string())?;
    let first = certified.cert.first().ok_or("no certificate in it")?;
    let certificate = x509_cert::Certificate::from_der(first).map_err(|error| error.to_string())?;
    let wanted = format!("{NODE_USER}{node}");
    let names = certificate.tbs_certificate.subject.0.iter().flat_map(|names| names.0.iter());
    let mut common = names.filter(|name| name.oid.to_string() == COMMON_NAME);
    if !common.any(|name| name.value.value() == wanted.as_bytes()) {
        return Err(format!("it is not for {wanted}"));
    }
    let validity = pair::validity(first).ok_or("it says not how long it holds")?;
    if validity.until < now + LEAST_LEFT {
        return Err("it has expired, or is about to".to_owned());
    }
    // The certificates come first, the key after them: as it was stored.
    let text = String::from_utf8(text).map_err(|error| error.to_string())?;
    let (chain, key) = text.split_at(text.find(KEY).ok_or("no key in it")?);
    Ok(Issued { chain: chain.as_bytes().to_vec(), key: SecretString::from(key), validity })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::certificates::pair::subject;
    use crate::certificates::stand_in::{refused, signing};
    use crate::cluster::stand_in::client_of;
    use rcgen::{CertificateParams, KeyPair};
    use std::os::unix::fs::PermissionsExt as _;
    use std::sync::{Arc, Mutex};

    fn issued(user: &str, seconds: u64) -> Issued {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.distinguished_name = subject(Some("system:nodes"), user);
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
        params.not_after = rcgen::date_time_ymd(1970, 1, 1) + (now + Duration::from_secs(seconds));
        let certificate = params.self_signed(&key).unwrap();
        let validity = pair::validity(certificate.der()).unwrap();
        Issued {
            chain: certificate.pem().into_bytes(),
            key: SecretString::from(key.serialize_pem()),
            validity,
        }
    }

    #[test]
    fn a_kept_certificate_is_taken_up_while_it_holds_and_only_for_its_node() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join(FILE);
        let now = SystemTime::now();
        assert!(kept(&file, "n1", now).is_none());
        let one = issued("system:node:n1", 3600);
        store(&file, &one).unwrap();
        assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o7777, 0o600);
        let again = kept(&file, "n1", now).unwrap();
        assert_eq!(again.validity, one.validity);
        assert_eq!(again.key.expose_secret(), one.key.expose_secret());
        assert!(kept(&file, "n2", now).is_none());
        assert!(kept(&file, "n1", now + Duration::from_secs(3400)).is_none());
        fs::write(&file, "rubbish").unwrap();
        assert!(kept(&file, "n1", now).is_none());
    }

    fn kube() -> Kube {
        let config = kube::Config::new("https://127.0.0.1:1".parse().unwrap());
        Kube::new("bootstrap.kubeconfig", config)
    }

    /// Renews what is about to expire for a moment, and returns what was told of the credential's end.
    async fn renewed(client: kube::Client, file: &Path, issued: Issued) -> Vec<Option<SystemTime>> {
        let wanted = Wanted {
            signer: Signer::KubeletClient,
            node: "n1".to_owned(),
            names: Vec::new(),
            ips: Vec::new(),
        };
        let told = Arc::new(Mutex::new(Vec::new()));
        let tell = Arc::clone(&told);
        let expires = move |at| tell.lock().unwrap().push(at);
        let work = renew(kube(), wanted, file.to_owned(), issued, Switch::new(client), || None, expires);
        let _ = tokio::time::timeout(Duration::from_millis(400), work).await;
        let told = told.lock().unwrap();
        told.clone()
    }

    #[tokio::test]
    async fn a_certificate_is_renewed_and_kept_before_it_expires() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join(FILE);
        // Since 1975, so this is past 70 % of its life.
        let old = issued("system:node:n1", 600);
        let told = renewed(client_of(signing(7200)), &file, old).await;
        assert_eq!(told, [None]);
        let text = fs::read(&file).unwrap();
        let new = pair::from_pem((FILE, &text), (FILE, &text)).unwrap();
        let validity = pair::validity(&new.cert[0]).unwrap();
        assert!(validity.until > SystemTime::now() + Duration::from_secs(7000));
    }

    #[tokio::test]
    async fn a_certificate_that_cannot_be_renewed_makes_its_end_a_deadline() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join(FILE);
        let old = issued("system:node:n1", 600);
        let until = old.validity.until;
        assert_eq!(renewed(client_of(|_, _, _| refused()), &file, old).await, [Some(until)]);
        assert!(!file.exists());
    }
}
