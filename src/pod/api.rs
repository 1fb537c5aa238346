//! What the pod room asks of the world outside: objects, statuses, deletion.
//!
//! [`Api`] is the one difference between `run` and `play`: a cluster answers, or the manifests on the command line.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::authentication::v1::{BoundObjectReference, TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::{ConfigMap, Pod, PodStatus, Secret, ServiceAccount};
use k8s_openapi::serde_json::Value;
use k8s_openapi::serde_json::json;
use kube::api::{DeleteParams, Patch, PatchParams, PostParams, Preconditions};
use tokio::sync::{Semaphore, mpsc, watch};

use super::objects::watches::{self, Watches};

/// Longest wait for one call. An API server that is alive answers in milliseconds; its own request timeout is 60 s, but
/// a drain has less than that.
pub const CALL_LIMIT: Duration = Duration::from_secs(10);

/// The same while the pilot drains: an API server that comes back in the last seconds is tried again in time.
const DRAINING_LIMIT: Duration = Duration::from_secs(2);

/// Calls under way at once. Each may cost a TLS connection; more than this only makes the API server slower.
const CALLS_AT_ONCE: usize = 16;

/// Where objects come from and statuses go.
#[derive(Clone)]
pub enum Api {
    /// An API server.
    Cluster(Cluster),
    /// Manifests; statuses go to whoever prints them.
    Files(Files),
}

/// An API server, with a bound on calls at once.
#[derive(Clone)]
pub struct Cluster {
    client: kube::Client,
    calls: Arc<Semaphore>,
    draining: watch::Receiver<bool>,
    watches: Arc<Watches>,
}

/// The objects of manifests.
#[derive(Clone)]
pub struct Files {
    config_maps: Arc<BTreeMap<(String, String), ConfigMap>>,
    secrets: Arc<BTreeMap<(String, String), Secret>>,
    statuses: mpsc::Sender<(String, PodStatus)>,
}

impl Files {
    /// Objects by namespace and name; statuses are sent with their pod's uid.
    #[must_use]
    pub fn new(
        config_maps: impl IntoIterator<Item = ConfigMap>,
        secrets: impl IntoIterator<Item = Secret>,
        statuses: mpsc::Sender<(String, PodStatus)>,
    ) -> Self {
        let key = |meta: &k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta| {
            (meta.namespace.clone().unwrap_or_default(), meta.name.clone().unwrap_or_default())
        };
        Self {
            config_maps: Arc::new(config_maps.into_iter().map(|o| (key(&o.metadata), o)).collect()),
            secrets: Arc::new(secrets.into_iter().map(|o| (key(&o.metadata), o)).collect()),
            statuses,
        }
    }
}

/// Why a call came to nothing.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    /// The API server refused or could not be reached.
    #[error("{}", crate::cluster::explain(.0))]
    Kube(#[from] kube::Error),
    /// No answer in time.
    #[error("the API server did not answer within {0} s")]
    TimedOut(u64),
}

impl ApiError {
    /// The HTTP status code of a refusal.
    #[must_use]
    pub fn code(&self) -> Option<u16> {
        match self {
            Self::Kube(kube::Error::Api(status)) => Some(status.code),
            _ => None,
        }
    }
}

/// What became of a status that was sent.
#[derive(Debug)]
pub enum Patched {
    /// The API server has it.
    Acknowledged(Box<Pod>),
    /// The pod, or the pod of this uid, is no more.
    Gone,
}

/// A service account's token, or why there is none.
#[derive(Debug)]
pub enum Token {
    /// The token.
    Granted {
        /// It.
        token: String,
        /// Until when it holds; none where the answer does not say.
        expires: Option<Timestamp>,
        /// For how many seconds it was given.
        life: i64,
    },
    /// The credential may not ask for it.
    Denied(String),
}

/// What a TokenRequest asks for.
#[derive(Debug, Clone)]
pub struct TokenWish {
    /// The service account.
    pub service_account: String,
    /// For whom the token is; the API server's own audience when none is named.
    pub audience: Option<String>,
    /// How long it holds, in seconds.
    pub expiration_seconds: Option<i64>,
}

impl Cluster {
    /// Talks to the API server through `client`. `draining` turns true when time is short.
    #[must_use]
    pub fn new(client: kube::Client, draining: watch::Receiver<bool>) -> Self {
        let watches = Arc::new(Watches::new(client.clone(), watches::MOST));
        Self { client, calls: Arc::new(Semaphore::new(CALLS_AT_ONCE)), draining, watches }
    }

    /// With no more than so many watches at once.
    #[must_use]
    pub fn with_watches(mut self, most: usize) -> Self {
        self.watches = Arc::new(Watches::new(self.client.clone(), most));
        self
    }

    async fn call<T>(&self, request: impl Future<Output = Result<T, kube::Error>>) -> Result<T, ApiError> {
        // The semaphore is never closed, so a missing permit only means one more call at once.
        let _permit = self.calls.acquire().await.ok();
        let limit = if *self.draining.borrow() { DRAINING_LIMIT } else { CALL_LIMIT };
        let answer = tokio::time::timeout(limit, request).await;
        answer.map_err(|_| ApiError::TimedOut(limit.as_secs()))?.map_err(ApiError::from)
    }

    fn pods(&self, namespace: &str) -> kube::Api<Pod> {
        kube::Api::namespaced(self.client.clone(), namespace)
    }
}

impl Api {
    /// Tells when ConfigMaps and Secrets change; none where they never do.
    #[must_use]
    pub fn watches(&self) -> Option<&Watches> {
        match self {
            Self::Cluster(cluster) => Some(&cluster.watches),
            Self::Files(_) => None,
        }
    }

    /// Reads one ConfigMap by name.
    ///
    /// # Errors
    /// When the API server does not answer or refuses.
    pub async fn config_map(&self, namespace: &str, name: &str) -> Result<Option<ConfigMap>, ApiError> {
        match self {
            Self::Cluster(cluster) => {
                let api: kube::Api<ConfigMap> = kube::Api::namespaced(cluster.client.clone(), namespace);
                cluster.call(api.get_opt(name)).await
            }
            Self::Files(files) => {
                Ok(files.config_maps.get(&(namespace.to_owned(), name.to_owned())).cloned())
            }
        }
    }

    /// Reads one Secret by name.
    ///
    /// # Errors
    /// When the API server does not answer or refuses.
    pub async fn secret(&self, namespace: &str, name: &str) -> Result<Option<Secret>, ApiError> {
        match self {
            Self::Cluster(cluster) => {
                let api: kube::Api<Secret> = kube::Api::namespaced(cluster.client.clone(), namespace);
                cluster.call(api.get_opt(name)).await
            }
            Self::Files(files) => Ok(files.secrets.get(&(namespace.to_owned(), name.to_owned())).cloned()),
        }
    }

    /// Asks for a token of the pod's service account, bound to the pod.
    ///
    /// # Errors
    /// When the API server does not answer or refuses otherwise than by 403.
    pub async fn token(
        &self,
        namespace: &str,
        pod: &str,
        uid: &str,
        wish: &TokenWish,
    ) -> Result<Token, ApiError> {
        let Self::Cluster(cluster) = self else {
            return Ok(Token::Denied("there is no cluster to ask for a token".to_owned()));
        };
        let api: kube::Api<ServiceAccount> = kube::Api::namespaced(cluster.client.clone(), namespace);
        let request = TokenRequest {
            spec: Some(TokenRequestSpec {
                audiences: Some(wish.audience.iter().cloned().collect()),
                expiration_seconds: wish.expiration_seconds,
                bound_object_ref: Some(BoundObjectReference {
                    api_version: Some("v1".to_owned()),
                    kind: Some("Pod".to_owned()),
                    name: Some(pod.to_owned()),
                    uid: Some(uid.to_owned()),
                }),
            }),
            ..TokenRequest::default()
        };
        let params = PostParams::default();
        match cluster.call(api.create_token_request(&wish.service_account, &params, &request)).await {
            Ok(answer) => {
                let life = answer.spec.as_ref().and_then(|spec| spec.expiration_seconds);
                let life = life.or(wish.expiration_seconds).unwrap_or_default();
                let status = answer.status.unwrap_or_default();
                let expires = status.expiration_timestamp.map(|at| at.0);
                Ok(match status.token {
                    Some(token) => Token::Granted { token, expires, life },
                    None => Token::Denied("the API server's answer holds no token".to_owned()),
                })
            }
            Err(error) if error.code() == Some(403) => Ok(Token::Denied(error.to_string())),
            Err(error) => Err(error),
        }
    }

    /// Sends a status, as a strategic merge patch whose `metadata.uid` is the precondition.
    ///
    /// # Errors
    /// When the API server does not answer or refuses.
    pub async fn patch_status(
        &self,
        pod: &Pod,
        patch: &Value,
        status: &PodStatus,
    ) -> Result<Patched, ApiError> {
        let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
        let name = pod.metadata.name.as_deref().unwrap_or_default();
        match self {
            Self::Cluster(cluster) => {
                let api = cluster.pods(namespace);
                let answer = cluster
                    .call(api.patch_status(name, &PatchParams::default(), &Patch::Strategic(patch)))
                    .await;
                match answer {
                    Ok(pod) => Ok(Patched::Acknowledged(Box::new(pod))),
                    // 409 is the uid precondition: another pod of the same name stands there.
                    Err(error) if matches!(error.code(), Some(404 | 409)) => Ok(Patched::Gone),
                    Err(error) => Err(error),
                }
            }
            Self::Files(files) => {
                let uid = pod.metadata.uid.clone().unwrap_or_default();
                // A receiver that is gone has printed its last line; there is nobody left to tell.
                let _ = files.statuses.send((uid, status.clone())).await;
                let mut pod = pod.clone();
                pod.status = Some(status.clone());
                Ok(Patched::Acknowledged(Box::new(pod)))
            }
        }
    }

    /// Sets annotations of a pod, or takes them out (`None`), if it still is the one of this uid. One that is gone is no
    /// error. It goes to the status, which takes annotations too (`pkg/registry/core/pod/strategy.go`): the right to
    /// patch pods would be the right to change what they run.
    ///
    /// # Errors
    /// When the API server does not answer or refuses.
    pub async fn annotate(
        &self,
        namespace: &str,
        name: &str,
        uid: &str,
        annotations: &BTreeMap<String, Option<String>>,
    ) -> Result<(), ApiError> {
        let Self::Cluster(cluster) = self else { return Ok(()) };
        let patch = json!({"metadata": {"uid": uid, "annotations": annotations}});
        let api = cluster.pods(namespace);
        match cluster.call(api.patch_status(name, &PatchParams::default(), &Patch::Merge(&patch))).await {
            Ok(_) => Ok(()),
            Err(error) if matches!(error.code(), Some(404 | 409)) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Removes a pod that has ended (grace 0), if it still is the one of this uid. One that is gone is no error.
    ///
    /// # Errors
    /// When the API server does not answer or refuses.
    pub async fn delete(&self, namespace: &str, name: &str, uid: &str) -> Result<(), ApiError> {
        let Self::Cluster(cluster) = self else { return Ok(()) };
        let params = DeleteParams {
            grace_period_seconds: Some(0),
            preconditions: Some(Preconditions { uid: Some(uid.to_owned()), ..Preconditions::default() }),
            ..DeleteParams::default()
        };
        match cluster.call(cluster.pods(namespace).delete(name, &params)).await {
            Ok(_) => Ok(()),
            Err(error) if matches!(error.code(), Some(404 | 409)) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// The pod as the API server has it, if it still is the one of this uid.
    ///
    /// # Errors
    /// When the API server does not answer or refuses.
    pub async fn pod(&self, namespace: &str, name: &str, uid: &str) -> Result<Option<Pod>, ApiError> {
        let Self::Cluster(cluster) = self else { return Ok(None) };
        let found = cluster.call(cluster.pods(namespace).get_opt(name)).await?;
        Ok(found.filter(|pod| pod.metadata.uid.as_deref() == Some(uid)))
    }
}
