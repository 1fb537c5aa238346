//! The serving certificate that the cluster signs, in the place of the self-signed one.
//!
//! [`keep`] never ends; it is to be spawned where no certificate was given by files.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use k8s_openapi::api::authentication::v1::SelfSubjectReview;
use kube::Api;
use kube::api::PostParams;
use tokio::sync::watch;

use super::renewal::{self, Plan, plan};
use super::request::{self, Issued, NODE_USER, RequestError, Signer, Wanted};
use super::serving::{Serving, addresses};
use crate::node::api::{CallError, Kind, call};

/// How long one request is looked at: kube-controller-manager removes one that nobody answers after 24 h
/// (`pkg/controller/certificates/cleaner`), which ends the wait before this does.
const REQUEST_LIMIT: Duration = Duration::from_secs(25 * 3600);

/// Before the next request where one was turned down: who said no once will say it again.
const AFTER_REFUSAL: Duration = Duration::from_secs(3600);

/// Before the next request where the API server could not be reached.
const AFTER_TROUBLE: Duration = Duration::from_secs(60);

/// Keeps a certificate of `kubernetes.io/kubelet-serving` in `serving`, for the names and addresses `reached_at`: when they
/// change another one is asked for, as by a kubelet whose addresses change. The signer takes requests of nodes alone, so
/// with another identity it says once that the self-signed certificate stays, and ends.
///
/// `deadline` is the end as it is known at the time.
pub async fn keep(
    client: kube::Client,
    node: String,
    mut reached_at: watch::Receiver<Vec<String>>,
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
    let mut said = false;
    loop {
        let (names, ips) = addresses(reached_at.borrow_and_update().iter().map(String::as_str));
        let wanted = Wanted { signer: Signer::KubeletServing, node: node.clone(), names, ips };
        let seconds = request::expiration_seconds(deadline(), SystemTime::now());
        let issued = tokio::select! {
            issued = request::issue(&client, &wanted, seconds, REQUEST_LIMIT) => issued,
            // Whoever approves it now approves what is of no use any more.
            () = changed(&mut reached_at) => continue,
        };
        match issued.and_then(|issued| Ok((issued.certified()?, issued))) {
            Ok((certified, issued)) => {
                said = false;
                let ips = wanted.ips.iter().map(ToString::to_string);
                let names = wanted.names.iter().cloned().chain(ips).collect::<Vec<_>>().join(", ");
                tracing::info!(node, names, "the Node's API serves with a certificate of the cluster");
                serving.swap(certified);
                tokio::select! {
                    () = until_renewal(&issued, &deadline) => {}
                    () = changed(&mut reached_at) => {}
                }
            }
            Err(error) => {
                if !said {
                    tracing::warn!(node, %error, "the serving certificate stays as it is");
                    said = true;
                }
                tokio::select! {
                    () = tokio::time::sleep(next_try(&error)) => {}
                    () = changed(&mut reached_at) => {}
                }
            }
        }
    }
}

/// Waits until the Node is reached by other names or addresses; for ever where nothing can change them.
async fn changed(reached_at: &mut watch::Receiver<Vec<String>>) {
    if reached_at.changed().await.is_err() {
        std::future::pending().await
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

    type ReachedAt = (watch::Sender<Vec<String>>, watch::Receiver<Vec<String>>);

    fn reached_at(all: &[&str]) -> ReachedAt {
        watch::channel(all.iter().map(|one| (*one).to_owned()).collect())
    }

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
        keep(client, "n".to_owned(), reached_at(&["n"]).1, serving, || None).await;
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
        let keeping = keep(client, "n".to_owned(), reached_at(&["n"]).1, serving, || None);
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
        let keeping = keep(client, "n".to_owned(), reached_at(&["n"]).1, Arc::clone(&serving), || None);
        assert!(tokio::time::timeout(Duration::from_millis(300), keeping).await.is_err());
        assert_ne!(serving.current().cert[0], before);
    }

    /// The names and addresses that a request is for.
    fn asked_for(body: &str) -> Vec<String> {
        use x509_cert::der::{Decode as _, DecodePem as _};
        use x509_cert::ext::Extensions;
        use x509_cert::ext::pkix::SubjectAltName;
        use x509_cert::ext::pkix::name::GeneralName;
        let request: serde_json::Value = serde_json::from_str(body).unwrap();
        let pem: k8s_openapi::ByteString =
            serde_json::from_value(request["spec"]["request"].clone()).unwrap();
        let asked = x509_cert::request::CertReq::from_pem(&pem.0).unwrap();
        let extensions = asked.info.attributes.get(0).unwrap().values.get(0).unwrap();
        let extensions: Extensions = extensions.decode_as().unwrap();
        let SubjectAltName(names) = SubjectAltName::from_der(extensions[0].extn_value.as_bytes()).unwrap();
        let text = |name: &GeneralName| match name {
            GeneralName::DnsName(name) => name.to_string(),
            GeneralName::IpAddress(ip) => {
                std::net::Ipv4Addr::from(<[u8; 4]>::try_from(ip.as_bytes()).unwrap()).to_string()
            }
            other => panic!("{other:?}"),
        };
        names.iter().map(text).collect()
    }

    #[tokio::test]
    async fn an_address_that_comes_later_is_asked_for_too() {
        let signing = signing(3600);
        let (told, asked) = std::sync::mpsc::channel();
        let client = client_of(move |method, path, body| {
            if path.contains("selfsubjectreviews") {
                return (201, json!({"metadata": {}, "status": {"userInfo": {"username": "system:node:n"}}}));
            }
            told.send(asked_for(body)).unwrap();
            signing(method, path, body)
        });
        let serving = Serving::new(self_signed(&["n".to_owned()], &[], A_YEAR).unwrap());
        let (sender, receiver) = reached_at(&["n", "198.51.100.7"]);
        tokio::spawn(keep(client, "n".to_owned(), receiver, Arc::clone(&serving), || None));
        let swapped = async |before: &rustls::pki_types::CertificateDer<'static>| {
            while serving.current().cert[0] == *before {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            serving.current().cert[0].clone()
        };
        let soon = Duration::from_secs(10);
        let before = serving.current().cert[0].clone();
        let first = tokio::time::timeout(soon, swapped(&before)).await.unwrap();
        assert_eq!(asked.recv_timeout(soon).unwrap(), ["n", "198.51.100.7"]);
        sender.send_modify(|all| all.push("203.0.113.9".to_owned()));
        tokio::time::timeout(soon, swapped(&first)).await.unwrap();
        assert_eq!(asked.recv_timeout(soon).unwrap(), ["n", "198.51.100.7", "203.0.113.9"]);
    }

    #[tokio::test]
    async fn a_request_that_waits_for_approval_is_made_anew_for_another_address() {
        let (told, asked) = std::sync::mpsc::channel();
        let client = client_of(move |method, path, body| {
            if path.contains("selfsubjectreviews") {
                return (201, json!({"metadata": {}, "status": {"userInfo": {"username": "system:node:n"}}}));
            }
            if method == "POST" {
                told.send(asked_for(body)).unwrap();
            }
            let spec = json!({"request": "", "signerName": "s", "usages": []});
            (200, json!({"metadata": {"name": "csr-1"}, "spec": spec}))
        });
        let serving = Serving::new(self_signed(&["n".to_owned()], &[], A_YEAR).unwrap());
        let (sender, receiver) = reached_at(&["n"]);
        let keeping = keep(client, "n".to_owned(), receiver, serving, || None);
        let changing = async {
            let next = async || {
                loop {
                    if let Ok(names) = asked.try_recv() {
                        return names;
                    }
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            };
            assert_eq!(next().await, ["n"]);
            sender.send_replace(vec!["n".to_owned(), "203.0.113.9".to_owned()]);
            assert_eq!(next().await, ["n", "203.0.113.9"]);
        };
        tokio::time::timeout(Duration::from_secs(10), async {
            tokio::select! { () = keeping => {}, () = changing => {} }
        })
        .await
        .unwrap();
    }
}
