//! The way to the API server: kubeconfig, credentials and when they expire, the first contact.
//!
//! [`Kube::load`] reads the kubeconfig without any network; [`Kube::connect`] tries until the API server answers.

mod connecting;
mod counting;
pub mod sending;

pub use counting::counting;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use kube::config::{AuthInfo, KubeConfigOptions, Kubeconfig};
use secrecy::{ExposeSecret as _, SecretString};
use x509_cert::der::Decode;

/// Longest wait for a connection; a firewall that drops packets answers never.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);

/// Longest wait for one answer at the start.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);

/// First wait between tries at the start; doubled up to [`RETRY_MOST`].
const RETRY_FIRST: Duration = Duration::from_millis(500);

/// Longest wait between tries at the start.
const RETRY_MOST: Duration = Duration::from_secs(15);

/// A kubeconfig holds some kilobytes.
const KUBECONFIG_BYTES: u64 = 4 << 20;

/// The API server as the kubeconfig describes it.
#[derive(Debug, Clone)]
pub struct Kube {
    /// Where the configuration was found.
    pub source: String,
    /// kube's own configuration.
    pub config: kube::Config,
    /// When the credential expires, where it cannot be renewed.
    pub expires: Option<SystemTime>,
    /// An address of this host that leads to the API server: the end of a tunnel.
    via: Option<SocketAddr>,
}

/// Why there is no way to the API server.
#[derive(Debug, thiserror::Error)]
pub enum ClusterError {
    /// The kubeconfig cannot be read or does not say what is needed.
    #[error(
        "kubeconfig {source_name}: {problem}; name a readable kubeconfig with --kubeconfig or KUBECONFIG"
    )]
    Kubeconfig {
        /// The file, or what else was tried.
        source_name: String,
        /// What is wrong.
        problem: String,
    },
    /// The credential has expired.
    #[error("kubeconfig {source_name}: its credential expired at {at}; get a new one and submit again")]
    Expired {
        /// The file.
        source_name: String,
        /// When, RFC 3339.
        at: String,
    },
    /// The API server does not answer.
    #[error(
        "API server {url} cannot be reached ({problem}), tried for {tried} s; is it up, and reachable from this \
         host? `jiriaf-pilot check` looks closer"
    )]
    Unreachable {
        /// Its address.
        url: String,
        /// What the last try said.
        problem: String,
        /// Seconds that were spent.
        tried: u64,
    },
    /// The API server refuses the credential.
    #[error(
        "API server {url} refuses the credential in {source_name} (HTTP {code}: {message}); it needs the rights of \
         docs/cluster/"
    )]
    Refused {
        /// Its address.
        url: String,
        /// The kubeconfig.
        source_name: String,
        /// The HTTP status code.
        code: u16,
        /// The API server's own words.
        message: String,
    },
}

impl Kube {
    /// Reads the kubeconfig: the given file, else `~/.kube/config`, else the in-cluster configuration.
    ///
    /// # Errors
    /// When it cannot be read, names no server, or holds a credential that has expired.
    pub async fn load(file: Option<&Path>, home: Option<&Path>) -> Result<Self, ClusterError> {
        let default = home.map(|home| home.join(".kube/config")).filter(|path| path.exists());
        let (source, config, auth) = match file.map(Path::to_path_buf).or(default) {
            Some(path) => from_file(&path).await?,
            None => {
                let config = kube::Config::incluster().map_err(|error| ClusterError::Kubeconfig {
                    source_name: "~/.kube/config".to_owned(),
                    problem: format!("not there, and this is no pod of a cluster ({error})"),
                })?;
                let auth = config.auth_info.clone();
                ("the in-cluster configuration".to_owned(), config, auth)
            }
        };
        let expires = expiry(&auth);
        if let Some(at) = expires.filter(|at| *at <= SystemTime::now()) {
            let at = jiff::Timestamp::try_from(at).map(|t| t.to_string()).unwrap_or_default();
            return Err(ClusterError::Expired { source_name: source, at });
        }
        let mut config = config;
        config.connect_timeout = Some(CONNECT_LIMIT);
        Ok(Self { source, config, expires, via: None })
    }

    /// The API server of a configuration whose credential does not expire.
    #[must_use]
    pub fn new(source: &str, config: kube::Config) -> Self {
        Self { source: source.to_owned(), config, expires: None, via: None }
    }

    /// The API server's address.
    #[must_use]
    pub fn url(&self) -> String {
        self.config.cluster_url.to_string().trim_end_matches('/').to_owned()
    }

    /// The API server's host and port.
    #[must_use]
    pub fn host_port(&self) -> (String, u16) {
        let url = &self.config.cluster_url;
        let port = url.port_u16().unwrap_or(if url.scheme_str() == Some("http") { 80 } else { 443 });
        (url.host().unwrap_or_default().trim_matches(['[', ']']).to_owned(), port)
    }

    /// The same API server by another credential: a client certificate and its key, both PEM.
    #[must_use]
    pub fn with_certificate(&self, source: &str, chain: &[u8], key: &SecretString) -> Self {
        let base64 = &base64::engine::general_purpose::STANDARD;
        let key = base64.encode(key.expose_secret());
        let mut config = self.config.clone();
        config.auth_info = AuthInfo {
            client_certificate_data: Some(base64.encode(chain)),
            client_key_data: Some(SecretString::from(key)),
            ..AuthInfo::default()
        };
        let expires = expiry(&config.auth_info);
        Self { source: format!("{source} ({})", self.source), config, expires, via: self.via }
    }

    /// From here on the API server is reached by this address. It keeps its own name: that is what its certificate is
    /// checked for, and what [`Self::url`] says.
    pub fn lead_through(&mut self, via: SocketAddr) {
        self.via = Some(via);
    }

    /// The address that [`Self::lead_through`] was given.
    #[must_use]
    pub fn via(&self) -> Option<SocketAddr> {
        self.via
    }

    /// kube's configuration as it is used.
    fn effective(&self) -> kube::Config {
        let mut config = self.config.clone();
        if let Some(via) = self.via {
            config.tls_server_name.get_or_insert_with(|| self.host_port().0);
            // A proxy leads out of the host, and the tunnel begins in it.
            config.proxy_url = None;
            config.cluster_url = through(&config.cluster_url, via);
        }
        config
    }

    /// A client, without any contact yet.
    ///
    /// # Errors
    /// When certificates or keys of the kubeconfig are no good.
    pub fn client(&self) -> Result<kube::Client, ClusterError> {
        connecting::client(&self.effective()).map_err(|error| ClusterError::Kubeconfig {
            source_name: self.source.clone(),
            problem: error.to_string(),
        })
    }

    /// A client for an API server that has answered and taken the credential; tried for `limit`.
    ///
    /// # Errors
    /// When it never answered, or refused the credential (which is not tried again).
    pub async fn connect(&self, limit: Duration) -> Result<kube::Client, ClusterError> {
        let client = self.client()?;
        let start = tokio::time::Instant::now();
        let mut delay = RETRY_FIRST;
        loop {
            let problem = match tokio::time::timeout(ANSWER_LIMIT, client.apiserver_version()).await {
                Ok(Ok(version)) => {
                    tracing::info!(url = self.url(), version = version.git_version, "API server answers");
                    return Ok(client);
                }
                Ok(Err(kube::Error::Api(status))) if matches!(status.code, 401 | 403) => {
                    return Err(ClusterError::Refused {
                        url: self.url(),
                        source_name: self.source.clone(),
                        code: status.code,
                        message: status.message.clone(),
                    });
                }
                Ok(Err(error)) => explain(&error),
                Err(_) => format!("no answer within {} s", ANSWER_LIMIT.as_secs()),
            };
            if start.elapsed() + delay > limit {
                let tried = start.elapsed().as_secs();
                return Err(ClusterError::Unreachable { url: self.url(), problem, tried });
            }
            tracing::warn!(url = self.url(), problem, retry_in = ?delay, "API server does not answer");
            tokio::time::sleep(delay).await;
            delay = (delay * 2).min(RETRY_MOST);
        }
    }
}

/// The URL with this host and port in place of its own.
fn through(url: &http::Uri, via: SocketAddr) -> http::Uri {
    let mut parts = url.clone().into_parts();
    parts.authority = http::uri::Authority::try_from(via.to_string()).ok().or(parts.authority);
    http::Uri::from_parts(parts).unwrap_or_else(|_| url.clone())
}

async fn from_file(path: &Path) -> Result<(String, kube::Config, AuthInfo), ClusterError> {
    let source_name = path.display().to_string();
    let wrong = |problem: String| ClusterError::Kubeconfig { source_name: source_name.clone(), problem };
    // KUBECONFIG may name several files, joined by colons, as for kubectl.
    let mut merged: Option<Kubeconfig> = None;
    for part in std::env::split_paths(path.as_os_str()).filter(|part| !part.as_os_str().is_empty()) {
        let size = std::fs::metadata(&part).map_err(|e| wrong(format!("{}: {e}", part.display())))?.len();
        if size > KUBECONFIG_BYTES {
            return Err(wrong(format!("{} is larger than {KUBECONFIG_BYTES} bytes", part.display())));
        }
        let next = Kubeconfig::read_from(&part).map_err(|e| wrong(causes(&e)))?;
        merged = Some(match merged {
            None => next,
            Some(before) => before.merge(next).map_err(|e| wrong(causes(&e)))?,
        });
    }
    let kubeconfig = merged.ok_or_else(|| wrong("it names no file".to_owned()))?;
    let config = kube::Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default())
        .await
        .map_err(|e| wrong(causes(&e)))?;
    let auth = config.auth_info.clone();
    Ok((source_name, config, auth))
}

/// When a credential that nobody renews expires: that of a client certificate, or of a token that is written into the
/// kubeconfig. Token files and exec plugins are read anew.
fn expiry(auth: &AuthInfo) -> Option<SystemTime> {
    if auth.exec.is_some() || auth.token_file.is_some() || auth.auth_provider.is_some() {
        return None;
    }
    let certificate = match (&auth.client_certificate_data, &auth.client_certificate) {
        (Some(data), _) => base64::engine::general_purpose::STANDARD.decode(data).ok(),
        (None, Some(path)) => std::fs::read(PathBuf::from(path)).ok(),
        (None, None) => None,
    };
    let token = auth.token.as_ref().and_then(|token| token_expiry(token.expose_secret()));
    [certificate.as_deref().and_then(certificate_expiry), token].into_iter().flatten().min()
}

/// The end of validity of the first certificate of a PEM file.
fn certificate_expiry(pem: &[u8]) -> Option<SystemTime> {
    let chain = x509_cert::Certificate::load_pem_chain(pem)
        .or_else(|_| x509_cert::Certificate::from_der(pem).map(|one| vec![one]))
        .ok()?;
    Some(chain.first()?.tbs_certificate.validity.not_after.to_system_time())
}

/// The `exp` claim of a JWT (RFC 7519); other tokens say nothing of their end.
fn token_expiry(token: &str) -> Option<SystemTime> {
    let payload = URL_SAFE_NO_PAD.decode(token.split('.').nth(1)?).ok()?;
    let claims: serde_json::Value = serde_json::from_slice(&payload).ok()?;
    let seconds = claims.get("exp")?.as_u64()?;
    SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(seconds))
}

/// An error of the API server in its own words, else with what caused it.
#[must_use]
pub fn explain(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) => explain_answer(status),
        other => causes(other),
    }
}

/// A refusal in the API server's own words, with the way out where a right is missing.
#[must_use]
pub fn explain_answer(status: &kube::core::Status) -> String {
    let mend = match status.code {
        401 | 403 => "; the credential needs the rights of docs/cluster/",
        _ => "",
    };
    format!("{} (HTTP {}){mend}", status.message, status.code)
}

/// An error with what caused it: `ServiceError: client error (Connect): Connection refused`.
#[must_use]
pub fn causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let next = cause.to_string();
        if !text.contains(&next) {
            text = format!("{text}: {next}");
        }
        source = cause.source();
    }
    text
}

#[cfg(test)]
pub(crate) mod stand_in;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tokens_end_is_its_exp_claim() {
        let payload = URL_SAFE_NO_PAD.encode(br#"{"sub":"x","exp":1700000000}"#);
        let token = format!("e30.{payload}.sig");
        assert_eq!(token_expiry(&token), Some(SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000)));
        for opaque in ["", "abc", "a.b.c", "e30.e30.x"] {
            assert_eq!(token_expiry(opaque), None, "{opaque}");
        }
    }

    #[test]
    fn a_tunnel_changes_the_address_and_not_the_name() {
        let mut config = kube::Config::new("https://api.site.org:6443/k8s/".parse().unwrap());
        config.proxy_url = Some("http://proxy:3128".parse().unwrap());
        let mut kube = Kube { source: String::new(), config, expires: None, via: None };
        kube.lead_through("127.0.0.1:40123".parse().unwrap());
        let config = kube.effective();
        assert_eq!(config.cluster_url.to_string(), "https://127.0.0.1:40123/k8s/");
        assert_eq!(config.tls_server_name.as_deref(), Some("api.site.org"));
        assert!(config.proxy_url.is_none());
        assert_eq!((kube.url().as_str(), kube.host_port().1), ("https://api.site.org:6443/k8s", 6443));
        // What the kubeconfig says of the name holds.
        kube.config.tls_server_name = Some("kubernetes".to_owned());
        assert_eq!(kube.effective().tls_server_name.as_deref(), Some("kubernetes"));
    }

    #[tokio::test]
    async fn an_unreadable_kubeconfig_is_named() {
        let error = Kube::load(Some(Path::new("/nonexistent/config")), None).await.unwrap_err();
        assert!(error.to_string().contains("/nonexistent/config"), "{error}");
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config");
        std::fs::write(&path, "clusters: [").unwrap();
        let error = Kube::load(Some(&path), None).await.unwrap_err();
        assert!(
            error.to_string().contains("config") && error.to_string().contains("--kubeconfig"),
            "{error}"
        );
    }
}
