//! Who may: the API server is asked by SubjectAccessReview, as a kubelet does in webhook mode. Source: kubelet's
//! `server/auth.go`, `app/auth.go`; the times are its defaults.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use k8s_openapi::api::authorization::v1::{ResourceAttributes, SubjectAccessReview, SubjectAccessReviewSpec};
use kube::api::PostParams;
use tokio::sync::Semaphore;

use super::identity::{ANSWER_LIMIT, User};
use super::route::Attributes;

/// How long a permission is remembered: authorization.webhook.cacheAuthorizedTTL.
const ALLOWED: Duration = Duration::from_secs(300);

/// How long a refusal is remembered: authorization.webhook.cacheUnauthorizedTTL.
const DENIED: Duration = Duration::from_secs(30);

/// Answers that are remembered.
const REMEMBERED: usize = 1024;

/// Questions to the API server at once.
const ASKING: usize = 8;

/// Asks who may do what with this Node.
pub struct Authorizer {
    client: kube::Client,
    node: String,
    answers: Mutex<HashMap<Question, (Instant, bool)>>,
    asking: Semaphore,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Question {
    user: User,
    verb: &'static str,
    subresource: &'static str,
}

impl Authorizer {
    /// For the Node of this name.
    #[must_use]
    pub fn new(client: kube::Client, node: String) -> Self {
        Self { client, node, answers: Mutex::default(), asking: Semaphore::new(ASKING) }
    }

    fn answers(&self) -> MutexGuard<'_, HashMap<Question, (Instant, bool)>> {
        self.answers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a user has a right; of several subresources one will do.
    ///
    /// # Errors
    /// When the API server cannot be asked.
    pub async fn may(&self, user: &User, wanted: &Attributes) -> Result<bool, String> {
        for subresource in wanted.subresources {
            let question = Question { user: user.clone(), verb: wanted.verb, subresource };
            if self.ask(question, Instant::now()).await? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    async fn ask(&self, question: Question, now: Instant) -> Result<bool, String> {
        if let Some((_, allowed)) = self.answers().get(&question).filter(|(until, _)| *until > now) {
            return Ok(*allowed);
        }
        let ask = async {
            let _permit = self.asking.acquire().await.map_err(|error| error.to_string())?;
            let api: kube::Api<SubjectAccessReview> = kube::Api::all(self.client.clone());
            let answer = api.create(&PostParams::default(), &self.review(&question)).await;
            answer.map_err(|error| crate::cluster::explain(&error))
        };
        let answer = tokio::time::timeout(ANSWER_LIMIT, ask)
            .await
            .map_err(|_| format!("no answer within {} s", ANSWER_LIMIT.as_secs()))??;
        let allowed = answer.status.is_some_and(|status| status.allowed && status.denied != Some(true));
        let mut answers = self.answers();
        if answers.len() >= REMEMBERED {
            answers.retain(|_, (until, _)| *until > now);
        }
        if answers.len() >= REMEMBERED {
            answers.clear();
        }
        answers.insert(question, (now + if allowed { ALLOWED } else { DENIED }, allowed));
        Ok(allowed)
    }

    fn review(&self, question: &Question) -> SubjectAccessReview {
        let user = &question.user;
        SubjectAccessReview {
            spec: SubjectAccessReviewSpec {
                user: Some(user.name.clone()),
                uid: user.uid.clone(),
                groups: Some(user.groups.clone()),
                extra: (!user.extra.is_empty()).then(|| user.extra.clone()),
                resource_attributes: Some(ResourceAttributes {
                    verb: Some(question.verb.to_owned()),
                    version: Some("v1".to_owned()),
                    resource: Some("nodes".to_owned()),
                    subresource: Some(question.subresource.to_owned()),
                    name: Some(self.node.clone()),
                    ..ResourceAttributes::default()
                }),
                non_resource_attributes: None,
            },
            ..SubjectAccessReview::default()
        }
    }
}

/// A kubelet's words for a refusal.
#[must_use]
pub fn forbidden(user: &User, wanted: &Attributes) -> String {
    format!(
        "Forbidden (user={}, verb={}, resource=nodes, subresource(s)=[{}])",
        user.name,
        wanted.verb,
        wanted.subresources.join(" ")
    )
}

/// A kubelet's words where the API server could not be asked.
#[must_use]
pub fn authorization_error(user: &User, wanted: &Attributes) -> String {
    let subresource = wanted.subresources.first().copied().unwrap_or_default();
    format!(
        "Authorization error (user={}, verb={}, resource=nodes, subresource={subresource})",
        user.name, wanted.verb
    )
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::cluster::stand_in::client_of;

    #[tokio::test]
    async fn a_permission_is_remembered_for_five_minutes_and_a_refusal_for_half_a_one() {
        let asked = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&asked);
        let client = client_of(move |_, path, body| {
            assert_eq!(path, "/apis/authorization.k8s.io/v1/subjectaccessreviews?");
            counted.fetch_add(1, Ordering::Relaxed);
            let mut review: serde_json::Value = serde_json::from_str(body).unwrap();
            let asked = &review["spec"]["resourceAttributes"];
            assert_eq!((asked["resource"].as_str(), asked["name"].as_str()), (Some("nodes"), Some("n1")));
            let allowed = review["spec"]["user"] == "alice";
            review["status"] = serde_json::json!({"allowed": allowed});
            (201, review)
        });
        let authorizer = Authorizer::new(client, "n1".to_owned());
        let begin = Instant::now();
        let ask = async |name: &str, seconds: u64| {
            let user = User { name: name.to_owned(), ..User::default() };
            let question = Question { user, verb: "get", subresource: "metrics" };
            authorizer.ask(question, begin + Duration::from_secs(seconds)).await.unwrap()
        };
        for second in [0, 29] {
            assert!(ask("alice", second).await);
            assert!(!ask("eve", second).await);
        }
        assert_eq!(asked.load(Ordering::Relaxed), 2);
        assert!(!ask("eve", 31).await);
        assert_eq!(asked.load(Ordering::Relaxed), 3);
        assert!(ask("alice", 299).await);
        assert_eq!(asked.load(Ordering::Relaxed), 3);
        assert!(ask("alice", 301).await);
        assert_eq!(asked.load(Ordering::Relaxed), 4);
    }

    #[test]
    fn a_refusal_says_who_lacks_what() {
        let user = User { name: "eve".to_owned(), ..User::default() };
        let wanted = Attributes { verb: "get", subresources: &["pods", "proxy"] };
        assert_eq!(
            forbidden(&user, &wanted),
            "Forbidden (user=eve, verb=get, resource=nodes, subresource(s)=[pods proxy])"
        );
    }
}
