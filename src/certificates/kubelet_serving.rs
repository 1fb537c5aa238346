//! The serving certificate that the cluster signs, in the place of the self-signed one.
//!
//! [`keep`] never ends; it is to be spawned where no certificate was given by files.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use k8s_openapi::api::authentication::v1::SelfSubjectReview;
use kube::Api;
use kube::api::PostParams;

use super::renewal::{self, Plan, plan};
use super::request::{self, Issued, NODE_USER, RequestError, Signer, Wanted};
use super::serving::Serving;
use crate::node::api::{CallError, Kind, call};

/// How long one request is looked at: kube-controller-manager removes one that nobody answers after 24 h
/// (`pkg/controller/certificates/cleaner`), which ends the wait before this does.
const REQUEST_LIMIT: Duration = Duration::from_secs(25 * 3600);

/// Before the next request where one was turned down: who said no once will say it again.
const AFTER_REFUSAL: Duration = Duration::from_secs(3600);

/// Before the next request where the API server could not be reached.
const AFTER_TROUBLE: Duration = Duration::from_secs(60);

/// Keeps a certificate of `kubernetes.io/kubelet-serving` in `serving`, for the Node's name and addresses. The signer takes
/// requests of nodes alone, so with another identity it says once that the self-signed certificate stays, and ends.
///
/// `deadline` is the end as it is known at the time.
pub async fn keep(
    client: kube::Client,
    node: String,
    (names, ips): (Vec<String>, Vec<IpAddr>),
    serving: Arc<Serving>,
    deadline: impl Fn() -> Option<SystemTime> + Send + Sync,
) {
    match user(&client).await {
        Some(user) if user == format!("{NODE_USER}{node}") => {}
        Some(user) => {
            tracing::info!(
                node,
                user,
                "the Node's API serves with a self-signed certificate: only a node's own identity (TLS bootstrap) may \
                 ask the cluster for another"
            );
            return;
        }
        None => return,
    }
    let wanted = Wanted { signer: Signer::KubeletServing, node, names, ips };
    let mut said = false;
    loop {
        let seconds = request::expiration_seconds(deadline(), SystemTime::now());
        let issued = request::issue(&client, &wanted, seconds, REQUEST_LIMIT).await;
        match issued.and_then(|issued| Ok((issued.certified()?, issued))) {
            Ok((certified, issued)) => {
                said = false;
                let names = wanted.names.join(", ");
                tracing::info!(
                    node = wanted.node,
                    names,
                    "the Node's API serves with a certificate of the cluster"
                );
                serving.swap(certified);
                until_renewal(&issued, &deadline).await;
            }
            Err(error) => {
                if !said {
                    tracing::warn!(node = wanted.node, %error, "the serving certificate stays as it is");
                    said = true;
                }
                tokio::time::sleep(next_try(&error)).await;
            }
        }
    }
}

async fn until_renewal(issued: &Issued, deadline: &(impl Fn() -> Option<SystemTime> + Sync)) {
    let chance = renewal::chance();
    while let Plan::Wait(wait) = plan(issued.validity, deadline(), SystemTime::now(), chance) {
        tokio::time::sleep(wait).await;
    }
}

fn next_try(error: &RequestError) -> Duration {
    if error.is_passing() { AFTER_TROUBLE } else { AFTER_REFUSAL }
}

/// As whom the API server knows this credential; `None` where it does not say, which is said.
async fn user(client: &kube::Client) -> Option<String> {
    let reviews: Api<SelfSubjectReview> = Api::all(client.clone());
    loop {
        match call(reviews.create(&PostParams::default(), &SelfSubjectReview::default())).await {
            Ok(review) => return review.status?.user_info?.username,
            Err(error) if error.kind() == Kind::Passing => tokio::time::sleep(AFTER_TROUBLE).await,
            Err(error) => {
                said_no(&error);
                return None;
            }
        }
    }
}

fn said_no(error: &CallError) {
    tracing::info!(%error, "the Node's API serves with a self-signed certificate: the API server does not say who this is");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::certificates::pair::{A_YEAR, self_signed};
    use crate::certificates::stand_in::{refused, signing};
    use crate::cluster::stand_in::client_of;
    use serde_json::json;
    use std::sync::atomic::{AtomicU32, Ordering};

    #[tokio::test]
    async fn a_service_account_asks_for_nothing() {
        let asked = Arc::new(AtomicU32::new(0));
        let count = Arc::clone(&asked);
        let client = client_of(move |_, path, _| {
            if path.contains("selfsubjectreviews") {
                let user = json!({"username": "system:serviceaccount:jiriaf:jiriaf-pilot"});
                return (201, json!({"metadata": {}, "status": {"userInfo": user}}));
            }
            count.fetch_add(1, Ordering::Relaxed);
            refused()
        });
        let serving = Serving::new(self_signed(&["n".to_owned()], &[], A_YEAR).unwrap());
        keep(client, "n".to_owned(), (vec!["n".to_owned()], Vec::new()), serving, || None).await;
        assert_eq!(asked.load(Ordering::Relaxed), 0);
    }

    #[tokio::test]
    async fn a_node_that_may_not_ask_does_not_ask_again_soon() {
        let asked = Arc::new(AtomicU32::new(0));
        let count = Arc::clone(&asked);
        let client = client_of(move |_, path, _| {
            if path.contains("selfsubjectreviews") {
                return (201, json!({"metadata": {}, "status": {"userInfo": {"username": "system:node:n"}}}));
            }
            count.fetch_add(1, Ordering::Relaxed);
            refused()
        });
        let serving = Serving::new(self_signed(&["n".to_owned()], &[], A_YEAR).unwrap());
        let keeping = keep(client, "n".to_owned(), (vec!["n".to_owned()], Vec::new()), serving, || None);
        assert!(tokio::time::timeout(Duration::from_millis(300), keeping).await.is_err());
        assert_eq!(asked.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn a_refusal_is_tried_again_rarely_and_trouble_soon() {
        let call = |source| RequestError::Call { what: "create", signer: "s", source };
        assert_eq!(next_try(&call(CallError::NoAnswer)), AFTER_TROUBLE);
        let status = kube::core::Status { code: 403, ..kube::core::Status::failure("no", "Forbidden") };
        assert_eq!(next_try(&call(CallError::Answer(Box::new(status)))), AFTER_REFUSAL);
    }

    #[tokio::test]
    async fn what_the_cluster_signs_is_served() {
        let signing = signing(3600);
        let client = client_of(move |method, path, body| {
            if path.contains("selfsubjectreviews") {
                return (201, json!({"metadata": {}, "status": {"userInfo": {"username": "system:node:n"}}}));
            }
            signing(method, path, body)
        });
        let first = self_signed(&["n".to_owned()], &[], A_YEAR).unwrap();
        let before = first.cert[0].clone();
        let serving = Serving::new(first);
        let keeping =
            keep(client, "n".to_owned(), (vec!["n".to_owned()], Vec::new()), Arc::clone(&serving), || None);
        assert!(tokio::time::timeout(Duration::from_millis(300), keeping).await.is_err());
        assert_ne!(serving.current().cert[0], before);
    }
}
