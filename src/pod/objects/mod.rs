//! The ConfigMaps, Secrets and tokens that a pod uses: read at its start, and known to have changed since.
//!
//! [`read`] asks the API server. [`Held`] is what one pod has read so far: which versions, its tokens, which are used until
//! it is time for others ([`token`]), and the objects themselves, for starts while nobody answers. [`watches`] tells when an
//! object has changed.

pub mod token;
pub mod watches;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use futures::future::try_join_all;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use self::token::HeldToken;
use self::watches::{Key, Kind, Version};
use super::api::{Api, ApiError, Token, TokenWish};
use super::containers;
use super::environment::{Objects, References, TokenRef};

/// What a pod has read so far.
#[derive(Debug, Default)]
pub struct Held {
    /// The version of each object that was read last.
    pub versions: BTreeMap<Key, Version>,
    /// Objects that never change any more.
    pub immutable: BTreeSet<Key>,
    /// Tokens.
    pub tokens: BTreeMap<TokenRef, HeldToken>,
    /// The objects as they were put to use last, where something of the pod may start again: a container that ends while
    /// the API server is away, or after an object was deleted, is started with these, as a kubelet does from its cache.
    pub last: Objects,
}

/// What is done when the API server does not answer for an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unanswered {
    /// It is an error: what is wanted is the object as it is now.
    Fails,
    /// The object as it was put to use last does too, where there is one.
    Last,
}

/// An object could not be read.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {source}")]
pub struct ReadError {
    /// Which one.
    pub what: String,
    /// What the API server said.
    pub source: ApiError,
}

/// What was read.
pub struct Read {
    /// The objects.
    pub objects: Objects,
    /// What of `wanted` was seen in which version. The caller notes them once they are put to use.
    pub versions: BTreeMap<Key, Version>,
    /// Tokens that were not given, and why.
    pub denied: Vec<String>,
}

impl Held {
    /// Notes what was put to use, and holds on to the objects if the pod may start something again: but for those that
    /// `but` names, whose volumes could not be made of what was read.
    pub fn note(&mut self, pod: &Pod, versions: BTreeMap<Key, Version>, objects: Objects, but: &References) {
        self.versions.extend(versions);
        if !may_start_again(pod) {
            return;
        }
        let Objects { mut config_maps, mut secrets, tokens } = objects;
        config_maps.retain(|name, _| !but.config_maps.contains_key(name));
        secrets.retain(|name, _| !but.secrets.contains_key(name));
        self.last.config_maps.extend(config_maps);
        self.last.secrets.extend(secrets);
        self.last.tokens.extend(tokens);
    }

    /// The tokens among `wanted` that should be asked for anew.
    pub fn due(&self, wanted: &BTreeSet<TokenRef>, now: Timestamp) -> bool {
        wanted.iter().filter_map(|token| self.tokens.get(token)).any(|held| held.is_due(now))
    }
}

/// Whether any of the pod's containers may start after others have, or a second time. What is read for one that may not is
/// not held on to: a ConfigMap may be 1 MiB.
fn may_start_again(pod: &Pod) -> bool {
    let Some(spec) = &pod.spec else { return false };
    let has_rules = containers::of(pod).any(|(kind, container)| {
        kind != containers::Kind::Main
            || container.restart_policy.is_some()
            || container.restart_policy_rules.is_some()
    });
    spec.restart_policy.as_deref() != Some("Never") || has_rules
}

/// Reads what is `wanted` for `pod`. Tokens that are held and need no other yet are not asked for.
///
/// # Errors
/// When the API server does not answer or refuses, but for a token: one that holds still goes on.
pub async fn read(
    api: &Api,
    pod: &Pod,
    wanted: &References,
    held: &mut Held,
    unanswered: Unanswered,
    now: Timestamp,
) -> Result<Read, ReadError> {
    let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
    let last = &held.last;
    let config_maps = try_join_all(wanted.config_maps.keys().map(|name| async move {
        let found = api.config_map(namespace, name).await.map(|found| found.map(Arc::new));
        let what = || format!("configmap {namespace}/{name}");
        answer(found, last.config_maps.get(name), unanswered, what).map(|found| (name, found))
    }));
    let secrets = try_join_all(wanted.secrets.keys().map(|name| async move {
        let found = api.secret(namespace, name).await.map(|found| found.map(Arc::new));
        let what = || format!("secret {namespace}/{name}");
        answer(found, last.secrets.get(name), unanswered, what).map(|found| (name, found))
    }));
    let ask = wanted.tokens.iter().filter(|token| held.tokens.get(token).is_none_or(|held| held.is_due(now)));
    let tokens = futures::future::join_all(ask.map(|wish| read_token(api, pod, wish)));
    let (config_maps, secrets, tokens) =
        futures::try_join!(config_maps, secrets, async { Ok::<_, ReadError>(tokens.await) })?;

    let mut read = Read { objects: Objects::default(), versions: BTreeMap::new(), denied: Vec::new() };
    let mut note = |kind, name: &str, meta: Option<(&ObjectMeta, Option<bool>)>| {
        let key = Key { kind, namespace: namespace.to_owned(), name: name.to_owned() };
        let version = match meta {
            Some((meta, _)) => Version::At(meta.resource_version.clone().unwrap_or_default()),
            None => Version::Absent,
        };
        if meta.is_some_and(|(_, immutable)| immutable == Some(true)) {
            held.immutable.insert(key.clone());
        }
        read.versions.insert(key, version);
    };
    for (name, found) in &config_maps {
        note(Kind::ConfigMap, name, found.as_ref().map(|found| (&found.metadata, found.immutable)));
    }
    for (name, found) in &secrets {
        note(Kind::Secret, name, found.as_ref().map(|found| (&found.metadata, found.immutable)));
    }
    read.objects.config_maps =
        config_maps.into_iter().filter_map(|(name, found)| Some((name.clone(), found?))).collect();
    read.objects.secrets =
        secrets.into_iter().filter_map(|(name, found)| Some((name.clone(), found?))).collect();
    for (wish, answer) in tokens {
        take_token(&wish, answer, held, now, api, &mut read.denied)?;
    }
    for wish in &wanted.tokens {
        if let Some(held) = held.tokens.get(wish) {
            read.objects.tokens.insert(wish.clone(), held.token.clone());
        }
    }
    Ok(read)
}

/// What is known of an object.
fn answer<T>(
    answer: Result<Option<Arc<T>>, ApiError>,
    last: Option<&Arc<T>>,
    unanswered: Unanswered,
    what: impl Fn() -> String,
) -> Result<Option<Arc<T>>, ReadError> {
    answer.or_else(|source| match last.filter(|_| unanswered == Unanswered::Last) {
        Some(last) => {
            tracing::warn!(what = what(), error = %source, "it cannot be read; what was read last is used");
            Ok(Some(Arc::clone(last)))
        }
        None => Err(ReadError { what: what(), source }),
    })
}

/// What becomes of an answer. As in a kubelet (token_manager.go), a token that could not be renewed is used while it holds.
fn take_token(
    wish: &TokenRef,
    answer: Result<Token, ReadError>,
    held: &mut Held,
    now: Timestamp,
    api: &Api,
    denied: &mut Vec<String>,
) -> Result<(), ReadError> {
    let old = held.tokens.get_mut(wish);
    match (answer, old) {
        (Ok(Token::Granted { token, expires, life }), _) => {
            held.tokens.insert(wish.clone(), HeldToken::new(token, expires, life, now));
        }
        (Ok(Token::Denied(why)), Some(old)) if !old.is_expired(now) => {
            old.try_later(now);
            tracing::warn!(%why, "a service account's token could not be renewed; it is tried again");
        }
        // Also one that has expired: it is in its volume already, and holds no container up.
        (Err(error), Some(old)) => {
            old.try_later(now);
            tracing::warn!(%error, "a service account's token could not be renewed; it is tried again");
        }
        // In `play` nobody expects one.
        (Ok(Token::Denied(_)), _) if matches!(api, Api::Files(_)) => {}
        (Ok(Token::Denied(why)), _) => {
            denied.push(format!("the service account's token is left out of its volume: {why}"));
        }
        (Err(error), None) => return Err(error),
    }
    Ok(())
}

async fn read_token(api: &Api, pod: &Pod, wish: &TokenRef) -> (TokenRef, Result<Token, ReadError>) {
    let part = |text: &Option<String>| text.clone().unwrap_or_default();
    let account = pod.spec.as_ref().and_then(|spec| spec.service_account_name.clone());
    let request = TokenWish {
        service_account: account.filter(|name| !name.is_empty()).unwrap_or_else(|| "default".to_owned()),
        audience: wish.audience.clone(),
        expiration_seconds: Some(wish.expiration_seconds),
    };
    let meta = &pod.metadata;
    let token = api.token(&part(&meta.namespace), &part(&meta.name), &part(&meta.uid), &request).await;
    let what = format!("token of service account {}", request.service_account);
    (wish.clone(), token.map_err(|source| ReadError { what, source }))
}

/// A number in 0..1 that differs each time.
fn chance() -> f64 {
    use std::hash::{BuildHasher as _, Hasher as _, RandomState};
    // std seeds each RandomState anew: enough chance for a jitter, without a crate for it.
    let bits = u32::try_from(RandomState::new().build_hasher().finish() >> 32).unwrap_or_default();
    f64::from(bits) / f64::from(u32::MAX)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::time::Duration;

    use serde_json::{from_value, json};
    use tokio::sync::watch;

    use super::*;
    use crate::cluster::stand_in::client_of;
    use crate::pod::api::Cluster;

    fn wish() -> TokenRef {
        TokenRef { audience: None, expiration_seconds: 600 }
    }

    #[tokio::test]
    async fn a_token_is_asked_for_again_when_it_is_time_and_is_used_while_it_holds() {
        let (asked, now) = (Arc::new(AtomicU32::new(0)), Timestamp::now());
        let count = Arc::clone(&asked);
        let client = client_of(move |method, path, _| {
            assert_eq!(
                (method, path.split('?').next()),
                ("POST", Some("/api/v1/namespaces/ns/serviceaccounts/default/token"))
            );
            let number = count.fetch_add(1, Ordering::Relaxed);
            if number == 1 {
                return (
                    500,
                    json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
                    "message": "not now", "reason": "InternalError", "code": 500}),
                );
            }
            (
                201,
                json!({"kind": "TokenRequest", "apiVersion": "authentication.k8s.io/v1", "metadata": {},
                "spec": {"audiences": ["a"], "expirationSeconds": 600},
                "status": {"token": format!("t{number}"), "expirationTimestamp": now + Duration::from_secs(600)}}),
            )
        });
        let api = Api::Cluster(Cluster::new(client, watch::channel(false).1));
        let pod: Pod = from_value(json!({"metadata": {"name": "p", "namespace": "ns", "uid": "u"}})).unwrap();
        let wanted = References { tokens: [wish()].into(), ..References::default() };
        let mut held = Held::default();
        for (age, wanted_token, calls) in
            [(0, "t0", 1), (300, "t0", 1), (500, "t0", 2), (510, "t0", 2), (540, "t2", 3)]
        {
            let at = now + Duration::from_secs(age);
            let read = read(&api, &pod, &wanted, &mut held, Unanswered::Fails, at).await.unwrap();
            assert_eq!(read.objects.tokens[&wish()], wanted_token, "{age}");
            assert_eq!(asked.load(Ordering::Relaxed), calls, "{age}");
        }
    }
}
