//! A client whose credential is replaced while others hold it.
//!
//! [`Switch::client`] is what is handed out; [`Switch::swap`] changes what its next requests are sent by.

use std::sync::{Arc, PoisonError, RwLock};

use crate::cluster::sending;

/// The client behind the clients. A request that is under way, such as a watch, ends where it began.
#[derive(Clone)]
pub struct Switch {
    current: Arc<RwLock<kube::Client>>,
}

impl Switch {
    /// Begins with this client.
    #[must_use]
    pub fn new(first: kube::Client) -> Self {
        Self { current: Arc::new(RwLock::new(first)) }
    }

    /// A client that follows the swaps. To be called in a tokio runtime.
    #[must_use]
    pub fn client(&self) -> kube::Client {
        let (switch, namespace) = (self.clone(), self.current().default_namespace().to_owned());
        sending::client(&namespace, move |request| {
            let client = switch.current();
            async move { client.send(request).await }
        })
    }

    /// Sends what comes from now on by another client.
    pub fn swap(&self, next: kube::Client) {
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = next;
    }

    fn current(&self) -> kube::Client {
        self.current.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use crate::cluster::stand_in::client_of;

    #[tokio::test]
    async fn the_next_request_goes_by_the_client_that_was_swapped_in() {
        let version = |minor: &'static str| {
            client_of(move |_, _, _| {
                let text = |value: &str| serde_json::Value::from(value);
                let mut answer: serde_json::Map<String, serde_json::Value> = [
                    "major",
                    "gitVersion",
                    "gitCommit",
                    "gitTreeState",
                    "buildDate",
                    "goVersion",
                    "compiler",
                    "platform",
                ]
                .into_iter()
                .map(|field| (field.to_owned(), text("1")))
                .collect();
                answer.insert("minor".to_owned(), text(minor));
                (200, answer.into())
            })
        };
        let switch = Switch::new(version("33"));
        let client = switch.client();
        assert_eq!(client.apiserver_version().await.unwrap().minor, "33");
        switch.swap(version("36"));
        assert_eq!(client.apiserver_version().await.unwrap().minor, "36");
    }

    #[tokio::test]
    async fn a_refusal_comes_through_as_it_is() {
        let refusing = client_of(|_, _, _| {
            let status = serde_json::json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
                "message": "no", "reason": "Forbidden", "code": 403});
            (403, status)
        });
        let nodes: kube::Api<k8s_openapi::api::core::v1::Node> =
            kube::Api::all(Switch::new(refusing).client());
        match nodes.get("n").await {
            Err(kube::Error::Api(status)) => assert_eq!((status.code, status.message.as_str()), (403, "no")),
            other => panic!("{other:?}"),
        }
    }
}
