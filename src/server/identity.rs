//! Who asks: a client certificate of the cluster's CA, or a bearer token that the API server knows. Source: kubelet's
//! `app/auth.go` (x509 first, then TokenReview), apiserver's `authentication/request/x509`.

use std::collections::BTreeMap;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use http::{HeaderMap, header};
use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec};
use kube::api::PostParams;
use rustls::RootCertStore;
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::ClientCertVerifier;
use tokio::sync::Semaphore;
use x509_cert::der::Decode as _;

/// How long a token that was known stays known: kubelet's authentication.webhook.cacheTTL.
const KNOWN: Duration = Duration::from_secs(120);

/// How long one that was not known is not asked for again: a kubelet's cache has one time for both (apiserver
/// `authenticatorfactory/delegating.go`).
const UNKNOWN: Duration = KNOWN;

/// How long a token that was known is asked about again before any that nobody has seen: those who scrape and follow come
/// more often, and a flood of made-up tokens does not shut them out.
const TRUSTED: Duration = Duration::from_secs(3600);

/// Tokens that are remembered; the oldest is forgotten for a new one.
const REMEMBERED: usize = 1024;

/// A token is some kilobytes; an API server takes no longer header.
const TOKEN_BYTES: usize = 16 * 1024;

/// Questions to the API server at once: any local user can make this Node ask.
const ASKING: usize = 8;

/// Tokens never seen before that the API server is asked about in a second, and at once after a quiet time: any local user
/// can send as many, and the questions share this Node's rate with its Lease and its pods' statuses.
const NEW_A_SECOND: f64 = 10.0;
const NEW_AT_ONCE: f64 = 20.0;

/// Longest wait for an answer of the API server.
pub(super) const ANSWER_LIMIT: Duration = Duration::from_secs(10);

/// Somebody whom the cluster knows.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct User {
    /// The name.
    pub name: String,
    /// The uid, where there is one.
    pub uid: Option<String>,
    /// The groups.
    pub groups: Vec<String>,
    /// More that an authenticator said.
    pub extra: BTreeMap<String, Vec<String>>,
}

/// Why nobody is known to ask.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unknown {
    /// Nothing was shown, or nothing that the cluster knows.
    #[error("Unauthorized")]
    Unauthorized,
    /// More tokens that were never seen come in than the API server is asked about.
    #[error("too many tokens that this Node has never seen; try again in a second")]
    TooMany,
    /// The API server could not be asked.
    #[error("the API server cannot say whose token this is: {0}")]
    Unavailable(String),
}

/// Finds out who asks.
pub struct Authenticator {
    certificates: Option<Arc<dyn ClientCertVerifier>>,
    client: kube::Client,
    tokens: Mutex<HashMap<[u8; 32], Remembered>>,
    asking: Semaphore,
    new: Mutex<Bucket>,
}

/// How many tokens may still be asked about now.
struct Bucket {
    left: f64,
    at: Instant,
}

impl Bucket {
    fn take(&mut self, now: Instant) -> bool {
        let refilled = now.duration_since(self.at).as_secs_f64() * NEW_A_SECOND;
        (self.left, self.at) = ((self.left + refilled).min(NEW_AT_ONCE), now);
        let enough = self.left >= 1.0;
        if enough {
            self.left -= 1.0;
        }
        enough
    }
}

struct Remembered {
    user: Option<User>,
    /// When the API server is asked again.
    until: Instant,
    /// When it is as if it had never been seen.
    forgotten: Instant,
}

impl Authenticator {
    /// Takes certificates of `roots`, and tokens that the API server knows.
    ///
    /// # Errors
    /// When there is no certificate among `roots` that can be used.
    pub fn new(roots: &[CertificateDer<'static>], client: kube::Client) -> Result<Self, String> {
        let certificates = if roots.is_empty() { None } else { Some(verifier(roots)?) };
        Ok(Self {
            certificates,
            client,
            tokens: Mutex::default(),
            asking: Semaphore::new(ASKING),
            new: Mutex::new(Bucket { left: NEW_AT_ONCE, at: Instant::now() }),
        })
    }

    fn tokens(&self) -> MutexGuard<'_, HashMap<[u8; 32], Remembered>> {
        self.tokens.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Who asks. `chain` is what the client showed in the TLS handshake, which it has proved to own the key of.
    ///
    /// # Errors
    /// When nobody is known to ask.
    pub async fn authenticate(
        &self,
        chain: &[CertificateDer<'static>],
        headers: &HeaderMap,
    ) -> Result<User, Unknown> {
        if let Some(user) = self.by_certificate(chain) {
            return Ok(user);
        }
        match bearer(headers) {
            Some(token) => self.by_token(token, Instant::now()).await,
            None => Err(Unknown::Unauthorized),
        }
    }

    fn by_certificate(&self, chain: &[CertificateDer<'static>]) -> Option<User> {
        let (first, rest) = chain.split_first()?;
        let verifier = self.certificates.as_ref()?;
        verifier.verify_client_cert(first, rest, UnixTime::now()).ok()?;
        user_of_certificate(first)
    }

    async fn by_token(&self, token: &str, now: Instant) -> Result<User, Unknown> {
        let key = digest(token);
        let trusted = {
            let tokens = self.tokens();
            let remembered = tokens.get(&key).filter(|r| r.forgotten > now);
            if let Some(fresh) = remembered.filter(|r| r.until > now) {
                return fresh.user.clone().ok_or(Unknown::Unauthorized);
            }
            remembered.is_some_and(|r| r.user.is_some())
        };
        if !trusted && !self.new.lock().unwrap_or_else(PoisonError::into_inner).take(now) {
            return Err(Unknown::TooMany);
        }
        let user = self.review(token).await?;
        self.remember(key, user.clone(), now);
        user.ok_or(Unknown::Unauthorized)
    }

    fn remember(&self, key: [u8; 32], user: Option<User>, now: Instant) {
        let (until, forgotten) =
            if user.is_some() { (now + KNOWN, now + TRUSTED) } else { (now + UNKNOWN, now + UNKNOWN) };
        let mut tokens = self.tokens();
        if tokens.len() >= REMEMBERED {
            tokens.retain(|_, r| r.forgotten > now);
        }
        if tokens.len() >= REMEMBERED {
            // A flood of tokens that nobody knows must not push out those that are known.
            let victim = tokens.iter().min_by_key(|(_, r)| (r.user.is_some(), r.until)).map(|(key, _)| *key);
            victim.and_then(|key| tokens.remove(&key));
        }
        tokens.insert(key, Remembered { user, until, forgotten });
    }

    async fn review(&self, token: &str) -> Result<Option<User>, Unknown> {
        let unavailable = |error: &dyn std::fmt::Display| Unknown::Unavailable(error.to_string());
        let _permit = self.asking.acquire().await.map_err(|e| unavailable(&e))?;
        let api: kube::Api<TokenReview> = kube::Api::all(self.client.clone());
        let spec = TokenReviewSpec { token: token.to_owned(), audiences: None };
        let review = TokenReview { spec, ..TokenReview::default() };
        let parameters = PostParams::default();
        let answer = tokio::time::timeout(ANSWER_LIMIT, api.create(&parameters, &review))
            .await
            .map_err(|_| unavailable(&format!("no answer within {} s", ANSWER_LIMIT.as_secs())))?
            .map_err(|error| unavailable(&crate::cluster::explain(&error)))?;
        let status = answer.status.unwrap_or_default();
        if status.authenticated != Some(true) {
            return Ok(None);
        }
        Ok(status.user.map(|user| User {
            name: user.username.unwrap_or_default(),
            uid: user.uid.filter(|uid| !uid.is_empty()),
            groups: user.groups.unwrap_or_default(),
            extra: user.extra.unwrap_or_default(),
        }))
    }
}

fn verifier(roots: &[CertificateDer<'static>]) -> Result<Arc<dyn ClientCertVerifier>, String> {
    let mut store = RootCertStore::empty();
    let (good, bad) = store.add_parsable_certificates(roots.iter().cloned());
    if good == 0 {
        return Err(format!("none of its {bad} certificates can be used"));
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    WebPkiClientVerifier::builder_with_provider(Arc::new(store), provider)
        .build()
        .map_err(|error| error.to_string())
}

/// The common name is the user, each organization a group.
fn user_of_certificate(certificate: &CertificateDer<'_>) -> Option<User> {
    const COMMON_NAME: &str = "2.5.4.3";
    const ORGANIZATION: &str = "2.5.4.10";
    let certificate = x509_cert::Certificate::from_der(certificate).ok()?;
    let subject = &certificate.tbs_certificate.subject;
    let values = |oid: &str| -> Vec<String> {
        let attributes = subject.0.iter().flat_map(|name| name.0.iter());
        let wanted = attributes.filter(|attribute| attribute.oid.to_string() == oid);
        wanted.filter_map(|a| std::str::from_utf8(a.value.value()).ok()).map(str::to_owned).collect()
    };
    let name = values(COMMON_NAME).pop().filter(|name| !name.is_empty())?;
    let mut groups = values(ORGANIZATION);
    groups.push("system:authenticated".to_owned());
    Some(User { name, groups, ..User::default() })
}

/// The token of `Authorization: Bearer …` (RFC 6750).
fn bearer(headers: &HeaderMap) -> Option<&str> {
    let value = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
    let (scheme, token) = value.trim().split_once(' ')?;
    let token = token.trim();
    let good = scheme.eq_ignore_ascii_case("bearer") && !token.is_empty() && token.len() <= TOKEN_BYTES;
    good.then_some(token)
}

fn digest(token: &str) -> [u8; 32] {
    let digest = ring::digest::digest(&ring::digest::SHA256, token.as_bytes());
    let mut key = [0; 32];
    key.copy_from_slice(digest.as_ref());
    key
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::cluster::stand_in::client_of;
    use http::HeaderValue;

    #[test]
    fn a_bearer_token_is_read_and_nothing_else_is() {
        let with = |value: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::AUTHORIZATION, HeaderValue::from_str(value).unwrap());
            bearer(&headers).map(str::to_owned)
        };
        assert_eq!(with("Bearer abc"), Some("abc".to_owned()));
        assert_eq!(with("bearer  abc "), Some("abc".to_owned()));
        for bad in ["Bearer", "Bearer ", "Basic abc", "abc"] {
            assert_eq!(with(bad), None, "{bad}");
        }
        assert_eq!(with(&format!("Bearer {}", "x".repeat(TOKEN_BYTES + 1))), None);
        assert_eq!(bearer(&HeaderMap::new()), None);
    }

    /// Who knows tokens that begin with `good`, and how often it was asked.
    fn api_server() -> (Authenticator, Arc<AtomicUsize>) {
        let asked = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&asked);
        let client = client_of(move |_, path, body| {
            assert_eq!(path, "/apis/authentication.k8s.io/v1/tokenreviews?");
            counted.fetch_add(1, Ordering::Relaxed);
            let mut review: serde_json::Value = serde_json::from_str(body).unwrap();
            let token = review["spec"]["token"].as_str().unwrap().to_owned();
            review["status"] = if token.starts_with("good") {
                serde_json::json!({"authenticated": true, "user": {"username": token, "groups": ["g"]}})
            } else {
                serde_json::json!({"authenticated": false})
            };
            (201, review)
        });
        (Authenticator::new(&[], client).unwrap(), asked)
    }

    #[tokio::test]
    async fn a_token_is_asked_about_once_in_two_minutes_known_or_not() {
        let (authenticator, asked) = api_server();
        let begin = Instant::now();
        let at = |seconds: u64| begin + Duration::from_secs(seconds);
        for second in [0, 60, 119] {
            let user = authenticator.by_token("good", at(second)).await.unwrap();
            assert_eq!((user.name.as_str(), user.groups), ("good", vec!["g".to_owned()]));
            assert_eq!(authenticator.by_token("bad", at(second)).await, Err(Unknown::Unauthorized));
        }
        assert_eq!(asked.load(Ordering::Relaxed), 2);
        authenticator.by_token("good", at(121)).await.unwrap();
        let _ = authenticator.by_token("bad", at(121)).await;
        assert_eq!(asked.load(Ordering::Relaxed), 4);
    }

    #[tokio::test]
    async fn a_flood_of_made_up_tokens_is_slowed_down_and_shuts_nobody_out() {
        let (authenticator, asked) = api_server();
        let begin = Instant::now();
        authenticator.by_token("good", begin).await.unwrap();
        let mut turned_away = 0;
        for number in 0..2000 {
            let answer = authenticator.by_token(&format!("bad{number}"), begin).await;
            turned_away += usize::from(answer == Err(Unknown::TooMany));
        }
        // Twenty at once, one of them the good one.
        assert_eq!((asked.load(Ordering::Relaxed), turned_away), (20, 2000 - 19));
        // The bucket is empty; who was known before is asked about all the same, for an hour.
        let later = begin + KNOWN + Duration::from_millis(1);
        for number in 0..2000 {
            let _ = authenticator.by_token(&format!("worse{number}"), later).await;
        }
        assert_eq!(authenticator.by_token("worse", later).await, Err(Unknown::TooMany));
        assert_eq!(authenticator.by_token("good-but-new", later).await, Err(Unknown::TooMany));
        authenticator.by_token("good", later).await.unwrap();
        // Ten a second.
        let next = later + Duration::from_secs(1);
        let mut asked_about = 0;
        for number in 0..50 {
            let answer = authenticator.by_token(&format!("worst{number}"), next).await;
            asked_about += usize::from(answer == Err(Unknown::Unauthorized));
        }
        assert_eq!(asked_about, 10);
        let hours_later = next + TRUSTED + Duration::from_secs(1);
        for number in 0..20 {
            let _ = authenticator.by_token(&format!("other{number}"), hours_later).await;
        }
        assert_eq!(authenticator.by_token("good", hours_later).await, Err(Unknown::TooMany));
    }

    #[tokio::test]
    async fn tokens_that_nobody_knows_push_out_each_other_and_none_that_is_known() {
        let (authenticator, asked) = api_server();
        let begin = Instant::now();
        authenticator.remember(digest("good"), Some(User::default()), begin);
        for number in 0..2 * REMEMBERED {
            authenticator.remember(digest(&format!("bad{number}")), None, begin);
        }
        assert_eq!(authenticator.tokens().len(), REMEMBERED);
        authenticator.by_token("good", begin).await.unwrap();
        assert_eq!(asked.load(Ordering::Relaxed), 0);
    }

    fn certificate(
        issuer: &rcgen::Issuer<'_, rcgen::KeyPair>,
        name: &str,
        groups: &[&str],
    ) -> CertificateDer<'static> {
        let mut params = rcgen::CertificateParams::new(Vec::new()).unwrap();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        for group in groups {
            params.distinguished_name.push(rcgen::DnType::OrganizationName, *group);
        }
        params.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ClientAuth];
        let key = rcgen::KeyPair::generate().unwrap();
        params.signed_by(&key, issuer).unwrap().der().clone()
    }

    fn authority() -> (CertificateDer<'static>, rcgen::Issuer<'static, rcgen::KeyPair>) {
        let mut params = rcgen::CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let key = rcgen::KeyPair::generate().unwrap();
        let certificate = params.self_signed(&key).unwrap();
        (certificate.der().clone(), rcgen::Issuer::new(params, key))
    }

    #[tokio::test]
    async fn only_certificates_of_the_cluster_are_taken() {
        let (ca, issuer) = authority();
        let (_, stranger) = authority();
        let config = kube::Config::new("http://127.0.0.1:1".parse().unwrap());
        let client = kube::Client::try_from(config).unwrap();
        let authenticator = Authenticator::new(&[ca], client).unwrap();
        let good = certificate(&issuer, "kube-apiserver", &["system:masters"]);
        let user = authenticator.by_certificate(&[good]).unwrap();
        assert_eq!(user.name, "kube-apiserver");
        assert_eq!(user.groups, ["system:masters", "system:authenticated"]);
        let forged = certificate(&stranger, "kube-apiserver", &["system:masters"]);
        assert_eq!(authenticator.by_certificate(std::slice::from_ref(&forged)), None);
        let unknown = authenticator.authenticate(&[forged], &HeaderMap::new()).await;
        assert_eq!(unknown, Err(Unknown::Unauthorized));
    }
}
