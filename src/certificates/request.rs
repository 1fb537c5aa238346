//! A certificate that the cluster signs: asked for by a CertificateSigningRequest, waited for, and taken.
//!
//! [`issue`] does all of it once; [`super::renewal::plan`] says when it is time for the next.

use std::fmt;
use std::net::IpAddr;
use std::time::{Duration, Instant, SystemTime};

use k8s_openapi::ByteString;
use k8s_openapi::api::certificates::v1::{CertificateSigningRequest, CertificateSigningRequestSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Api;
use kube::api::PostParams;
use rcgen::{CertificateParams, KeyPair};
use secrecy::{ExposeSecret as _, SecretString};

use super::pair::{self, CertificateError, Validity, alternative_names, subject};
use crate::node::api::{CallError, Kind, call};

/// The group of all nodes, as which a certificate's organization is read (`user.NodesGroup`).
const NODES: &str = "system:nodes";

/// What a node's user name begins with (`pkg/auth/nodeidentifier`).
pub const NODE_USER: &str = "system:node:";

/// The least that the API server takes as `expirationSeconds` (`pkg/apis/certificates/validation`).
const SHORTEST: Duration = Duration::from_secs(600);

/// How long a certificate should hold beyond the end that is known: clocks differ, and a limit may be prolonged.
const BEYOND: Duration = Duration::from_secs(3600);

/// First pause between two looks at a request. The controllers approve and sign within a second; later pauses grow with
/// the time that was waited, so that an approval is seen soon after it came and nobody is asked often for hours.
const FIRST_LOOK: Duration = Duration::from_millis(250);

/// Longest pause between two looks: a thousand pilots whose requests nobody approves ask three times a second.
const LONGEST_LOOK: Duration = Duration::from_secs(300);

/// How long nothing is said of a request that waits: what approves by itself has done it long before.
const QUIET: Duration = Duration::from_secs(20);

/// Who signs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Signer {
    /// What a Node's own API serves with. Nothing in Kubernetes approves it by itself.
    KubeletServing,
    /// By what a node is a client. kube-controller-manager approves it where the requester has the right.
    KubeletClient,
}

impl Signer {
    /// As the API calls it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::KubeletServing => "kubernetes.io/kubelet-serving",
            Self::KubeletClient => "kubernetes.io/kube-apiserver-client-kubelet",
        }
    }

    /// What the signer allows for a key of elliptic curves (`pkg/apis/certificates/helpers.go`).
    fn usages(self) -> Vec<String> {
        let purpose = if self == Self::KubeletServing { "server auth" } else { "client auth" };
        vec!["digital signature".to_owned(), purpose.to_owned()]
    }
}

/// What is asked for.
#[derive(Debug, Clone)]
pub struct Wanted {
    /// Who is to sign.
    pub signer: Signer,
    /// The Node.
    pub node: String,
    /// The host names that the Node serves at; none for a client.
    pub names: Vec<String>,
    /// The addresses that the Node serves at; none for a client.
    pub ips: Vec<IpAddr>,
}

/// A signed certificate and its key, both PEM.
pub struct Issued {
    /// The chain.
    pub chain: Vec<u8>,
    /// The key.
    pub key: SecretString,
    /// From when to when it holds.
    pub validity: Validity,
}

impl fmt::Debug for Issued {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Issued").field("validity", &self.validity).finish_non_exhaustive()
    }
}

impl Issued {
    /// As a server of rustls takes it, or a check that they belong together.
    ///
    /// # Errors
    /// When they do not.
    pub fn certified(&self) -> Result<rustls::sign::CertifiedKey, CertificateError> {
        let from = "from the cluster";
        pair::from_pem((from, &self.chain), (from, self.key.expose_secret().as_bytes()))
    }
}

/// Why there is no signed certificate.
#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    /// The API server does not take the request, or cannot be asked.
    #[error("the API server does not do it ({what} a CertificateSigningRequest for {signer}): {source}")]
    Call {
        /// What was tried.
        what: &'static str,
        /// Who was to sign.
        signer: &'static str,
        /// What the API server said.
        #[source]
        source: CallError,
    },
    /// Somebody has said no, or the signer could not.
    #[error(
        "CertificateSigningRequest {name} for {signer} was {what}: {why}; `kubectl describe csr {name}` says who did it"
    )]
    Turned {
        /// The request.
        name: String,
        /// Who was to sign.
        signer: &'static str,
        /// Denied or failed.
        what: &'static str,
        /// In their own words.
        why: String,
    },
    /// Nobody has signed it in time.
    #[error("CertificateSigningRequest {name} for {signer} was not answered within {} s: {mend}", .waited.as_secs())]
    Unanswered {
        /// The request.
        name: String,
        /// Who was to sign.
        signer: &'static str,
        /// For how long it was looked at.
        waited: Duration,
        /// The way out.
        mend: String,
    },
    /// Key or certificate are no good.
    #[error(transparent)]
    Certificate(#[from] CertificateError),
}

impl RequestError {
    /// Whether the API server refuses this credential.
    #[must_use]
    pub fn is_forbidden(&self) -> bool {
        matches!(self, Self::Call { source, .. } if matches!(source.kind(), Kind::Forbidden | Kind::Unauthorized))
    }

    /// Whether it is the API server that could not be reached, so that the next try may soon go better.
    #[must_use]
    pub fn is_passing(&self) -> bool {
        matches!(self, Self::Call { source, .. } if source.kind() == Kind::Passing)
    }
}

/// For how long a certificate is asked for: the time that is left and somewhat more; the signer's own time where no end is
/// known.
#[must_use]
pub fn expiration_seconds(deadline: Option<SystemTime>, now: SystemTime) -> Option<i32> {
    let left = deadline?.duration_since(now).unwrap_or_default();
    let wanted = left.saturating_add(BEYOND).max(SHORTEST);
    Some(i32::try_from(wanted.as_secs()).unwrap_or(i32::MAX))
}

/// The request as it is posted, for this key.
fn object(
    wanted: &Wanted,
    key: &KeyPair,
    seconds: Option<i32>,
) -> Result<CertificateSigningRequest, CertificateError> {
    let made = |source| CertificateError::Made { names: wanted.names.join(", "), source };
    let mut params = CertificateParams::default();
    params.distinguished_name = subject(Some(NODES), &format!("{NODE_USER}{}", wanted.node));
    params.subject_alt_names = alternative_names(&wanted.names, &wanted.ips).map_err(made)?;
    let request = params.serialize_request(key).and_then(|request| request.pem()).map_err(made)?;
    Ok(CertificateSigningRequest {
        metadata: ObjectMeta { generate_name: Some("csr-".to_owned()), ..ObjectMeta::default() },
        spec: CertificateSigningRequestSpec {
            signer_name: wanted.signer.name().to_owned(),
            request: ByteString(request.into_bytes()),
            usages: Some(wanted.signer.usages()),
            expiration_seconds: seconds,
            ..CertificateSigningRequestSpec::default()
        },
        status: None,
    })
}

/// How far a request has come.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Verdict {
    /// Nobody has said anything.
    Pending,
    /// Approved, and not signed yet.
    Approved,
    /// The chain, PEM.
    Issued(Vec<u8>),
    /// Denied or failed, and why.
    Turned(&'static str, String),
}

fn verdict(request: &CertificateSigningRequest) -> Verdict {
    let Some(status) = &request.status else { return Verdict::Pending };
    let conditions = status.conditions.as_deref().unwrap_or_default();
    let with = |kind: &str| conditions.iter().find(|c| c.type_ == kind && c.status == "True");
    for (kind, what) in [("Denied", "denied"), ("Failed", "not signed")] {
        if let Some(condition) = with(kind) {
            let said = [condition.reason.as_deref(), condition.message.as_deref()];
            return Verdict::Turned(what, said.into_iter().flatten().collect::<Vec<_>>().join(": "));
        }
    }
    match &status.certificate {
        Some(ByteString(chain)) if !chain.is_empty() => Verdict::Issued(chain.clone()),
        _ if with("Approved").is_some() => Verdict::Approved,
        _ => Verdict::Pending,
    }
}

/// What somebody can do about a request that waits.
fn mend(name: &str, verdict: &Verdict) -> String {
    if *verdict == Verdict::Approved {
        "it is approved and not signed; does kube-controller-manager have --cluster-signing-cert-file?"
            .to_owned()
    } else {
        format!("somebody has to approve it: kubectl certificate approve {name}")
    }
}

/// Asks for a certificate with a new key and waits for it, at most for `limit`. What may pass is tried again.
///
/// # Errors
/// [`RequestError`]; a request that was not answered stays, until Kubernetes removes it after a day.
pub async fn issue(
    client: &kube::Client,
    wanted: &Wanted,
    seconds: Option<i32>,
    limit: Duration,
) -> Result<Issued, RequestError> {
    let signer = wanted.signer.name();
    let requests: Api<CertificateSigningRequest> = Api::all(client.clone());
    let key = KeyPair::generate()
        .map_err(|source| CertificateError::Made { names: wanted.node.clone(), source })?;
    let object = object(wanted, &key, seconds)?;
    let started = Instant::now();
    let mut request = loop {
        match call(requests.create(&PostParams::default(), &object)).await {
            Ok(request) => break request,
            Err(error) if error.kind() == Kind::Passing && started.elapsed() < limit => {
                tokio::time::sleep(pause(started.elapsed())).await;
            }
            Err(source) => return Err(RequestError::Call { what: "create", signer, source }),
        }
    };
    let name = request.metadata.name.clone().unwrap_or_default();
    let created = Instant::now();
    let mut said = false;
    loop {
        let verdict = verdict(&request);
        match &verdict {
            Verdict::Issued(chain) => return taken(chain.clone(), &key),
            Verdict::Turned(what, why) => {
                return Err(RequestError::Turned { name, signer, what, why: why.clone() });
            }
            Verdict::Pending | Verdict::Approved => {}
        }
        let mend = mend(&name, &verdict);
        if !said && created.elapsed() >= QUIET {
            said = true;
            tracing::warn!(request = name, signer, "a certificate is waited for: {mend}");
        }
        if started.elapsed() >= limit {
            return Err(RequestError::Unanswered { name, signer, waited: created.elapsed(), mend });
        }
        let rest = limit.saturating_sub(started.elapsed());
        tokio::time::sleep(pause(created.elapsed()).min(rest)).await;
        match call(requests.get(&name)).await {
            Ok(newer) => request = newer,
            Err(error) if error.kind() == Kind::Passing => {}
            Err(source) => return Err(RequestError::Call { what: "get", signer, source }),
        }
    }
}

/// The pause after so much time.
fn pause(waited: Duration) -> Duration {
    (waited / 2).clamp(FIRST_LOOK, LONGEST_LOOK)
}

fn taken(chain: Vec<u8>, key: &KeyPair) -> Result<Issued, RequestError> {
    let key = SecretString::from(key.serialize_pem());
    let nothing = Validity { from: SystemTime::UNIX_EPOCH, until: SystemTime::UNIX_EPOCH };
    let issued = Issued { chain, key, validity: nothing };
    let certified = issued.certified()?;
    let validity = certified.cert.first().and_then(|first| pair::validity(first)).unwrap_or(nothing);
    Ok(Issued { validity, ..issued })
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::api::certificates::v1::{
        CertificateSigningRequestCondition, CertificateSigningRequestStatus,
    };

    fn wanted(signer: Signer) -> Wanted {
        let (names, ips) = match signer {
            Signer::KubeletServing => (vec!["host-1".to_owned()], vec!["10.0.0.1".parse().unwrap()]),
            Signer::KubeletClient => (Vec::new(), Vec::new()),
        };
        Wanted { signer, node: "site-1-host".to_owned(), names, ips }
    }

    #[test]
    fn a_request_is_as_its_signer_wants_it() {
        let key = KeyPair::generate().unwrap();
        for (signer, purpose) in
            [(Signer::KubeletServing, "server auth"), (Signer::KubeletClient, "client auth")]
        {
            let object = object(&wanted(signer), &key, Some(700)).unwrap();
            assert_eq!(object.spec.signer_name, signer.name());
            assert_eq!(object.spec.usages.unwrap(), ["digital signature", purpose]);
            assert_eq!(object.spec.expiration_seconds, Some(700));
            assert_eq!(object.metadata.generate_name.as_deref(), Some("csr-"));
            assert!(object.spec.request.0.starts_with(b"-----BEGIN CERTIFICATE REQUEST-----"));
        }
    }

    fn answered(kinds: &[&str], certificate: &[u8]) -> CertificateSigningRequest {
        let condition = |kind: &&str| CertificateSigningRequestCondition {
            type_: (*kind).to_owned(),
            status: "True".to_owned(),
            reason: Some("Because".to_owned()),
            message: Some("of reasons".to_owned()),
            ..CertificateSigningRequestCondition::default()
        };
        CertificateSigningRequest {
            status: Some(CertificateSigningRequestStatus {
                conditions: Some(kinds.iter().map(condition).collect()),
                certificate: (!certificate.is_empty()).then(|| ByteString(certificate.to_vec())),
            }),
            ..CertificateSigningRequest::default()
        }
    }

    #[test]
    fn a_request_is_read_as_its_status_stands() {
        assert_eq!(verdict(&CertificateSigningRequest::default()), Verdict::Pending);
        assert_eq!(verdict(&answered(&[], b"")), Verdict::Pending);
        assert_eq!(verdict(&answered(&["Approved"], b"")), Verdict::Approved);
        assert_eq!(verdict(&answered(&["Approved"], b"pem")), Verdict::Issued(b"pem".to_vec()));
        assert_eq!(
            verdict(&answered(&["Denied"], b"")),
            Verdict::Turned("denied", "Because: of reasons".to_owned())
        );
        let failed = verdict(&answered(&["Approved", "Failed"], b""));
        assert_eq!(failed, Verdict::Turned("not signed", "Because: of reasons".to_owned()));
    }

    #[test]
    fn a_certificate_is_asked_for_until_an_hour_after_the_end() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000);
        let after = |seconds| Some(now + Duration::from_secs(seconds));
        assert_eq!(expiration_seconds(None, now), None);
        assert_eq!(expiration_seconds(after(7200), now), Some(10_800));
        assert_eq!(expiration_seconds(Some(now - Duration::from_secs(1)), now), Some(3600));
        assert_eq!(expiration_seconds(after(1 << 40), now), Some(i32::MAX));
    }

    #[test]
    fn looks_grow_rarer_with_the_wait() {
        let s = Duration::from_secs;
        assert_eq!(pause(Duration::ZERO), FIRST_LOOK);
        assert_eq!(pause(s(10)), s(5));
        assert_eq!(pause(s(86_400)), s(300));
    }

    #[test]
    fn a_chain_that_is_not_for_the_key_is_not_taken() {
        let other = rcgen::generate_simple_self_signed(["x".to_owned()]).unwrap();
        let key = KeyPair::generate().unwrap();
        assert!(taken(other.cert.pem().into_bytes(), &key).is_err());
        let own = taken(other.cert.pem().into_bytes(), &other.signing_key).unwrap();
        assert!(own.validity.until > SystemTime::now());
        assert!(!format!("{own:?}").contains("PRIVATE"));
    }
}
