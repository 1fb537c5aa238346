//! The API server as the tests see it: JSON in, JSON out, as cluster-admin. Polling with kubectl would take
//! more of the two cores than all that is tested.

use std::time::Duration;

use kube::api::{DeleteParams, GetParams, ListParams, Patch, PatchParams, PostParams, Preconditions};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};
use serde_json::Value;

use super::bed;

/// A collection of objects: `/api/v1/namespaces/<ns>/pods`, `/api/v1/nodes`.
pub struct Collection(String);

/// Objects of a namespace in the core group: `namespaced("default", "pods")`.
pub fn namespaced(namespace: &str, resource: &str) -> Collection {
    Collection(format!("/api/v1/namespaces/{namespace}/{resource}"))
}

/// Objects without a namespace in the core group: `cluster("nodes")`.
pub fn cluster(resource: &str) -> Collection {
    Collection(format!("/api/v1/{resource}"))
}

/// Objects of any group: `grouped("batch/v1", "default", "jobs")`.
pub fn grouped(group_version: &str, namespace: &str, resource: &str) -> Collection {
    Collection(format!("/apis/{group_version}/namespaces/{namespace}/{resource}"))
}

/// Objects without a namespace in any group: `cluster_grouped("storage.k8s.io/v1", "storageclasses")`.
pub fn cluster_grouped(group_version: &str, resource: &str) -> Collection {
    Collection(format!("/apis/{group_version}/{resource}"))
}

impl Collection {
    /// The object, or None when there is none of this name.
    pub fn get(&self, name: &str) -> Option<Value> {
        found(request(self.core().get(name, &GetParams::default()).unwrap()))
    }

    /// The objects that a label selector picks; all for an empty one.
    pub fn list(&self, labels: &str) -> Vec<Value> {
        let list = request(self.core().list(&ListParams::default().labels(labels)).unwrap());
        list.unwrap_or_else(|error| panic!("list {} by {labels}: {error}", self.0))["items"]
            .as_array()
            .cloned()
            .unwrap_or_default()
    }

    /// Creates the object; a refusal is the test's failure.
    pub fn create(&self, object: &Value) -> Value {
        self.try_create(object).unwrap_or_else(|error| panic!("create in {}: {error}\n{object:#}", self.0))
    }

    /// Creates the object, or says why not.
    pub fn try_create(&self, object: &Value) -> Result<Value, kube::Error> {
        let body = serde_json::to_vec(object).unwrap();
        request(self.core().create(&PostParams::default(), body).unwrap())
    }

    /// Merges `patch` into the object (RFC 7386).
    pub fn merge(&self, name: &str, patch: &Value) -> Value {
        let patch = Patch::Merge(patch);
        request(self.core().patch(name, &PatchParams::default(), &patch).unwrap())
            .unwrap_or_else(|error| panic!("patch {} in {}: {error}", name, self.0))
    }

    /// Merges `patch` into the object's status as another user, or says why not.
    pub fn try_merge_status_as(&self, user: &str, name: &str, patch: &Value) -> Result<Value, kube::Error> {
        let patch = Patch::Merge(patch);
        let mut asked =
            self.core().patch_subresource("status", name, &PatchParams::default(), &patch).unwrap();
        asked.headers_mut().insert("Impersonate-User", user.parse().unwrap());
        request(asked)
    }

    /// Asks for the object's deletion, with the object's own grace or another; no such object is fine.
    pub fn delete(&self, name: &str, grace_seconds: Option<u32>) {
        let mut parameters = DeleteParams::background();
        parameters.grace_period_seconds = grace_seconds;
        let answer = request(self.core().delete(name, &parameters).unwrap());
        found(answer);
    }

    /// As `delete`, but only the object of this uid.
    pub fn delete_uid(&self, name: &str, uid: &str) {
        let preconditions = Preconditions { uid: Some(uid.into()), resource_version: None };
        let parameters = DeleteParams::background().preconditions(preconditions);
        found(request(self.core().delete(name, &parameters).unwrap()));
    }

    fn core(&self) -> kube::core::Request {
        kube::core::Request::new(self.0.clone())
    }
}

/// The value, or None for 404.
fn found(answer: Result<Value, kube::Error>) -> Option<Value> {
    match answer {
        Ok(value) => Some(value),
        Err(kube::Error::Api(status)) if status.code == 404 => None,
        Err(error) => panic!("the API server: {error}"),
    }
}

fn request(request: http::Request<Vec<u8>>) -> Result<Value, kube::Error> {
    thread_local! {
        // A runtime and a connection for each test's thread: the crate's runtime is a one-threaded one.
        static API: (tokio::runtime::Runtime, Client) = connect();
    }
    API.with(|(runtime, client)| runtime.block_on(async { client.request::<Value>(request).await }))
}

fn connect() -> (tokio::runtime::Runtime, Client) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let client = runtime.block_on(async {
        let kubeconfig = Kubeconfig::read_from(bed().admin_kubeconfig()).unwrap();
        let mut config =
            Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await.unwrap();
        // Nothing that a test asks takes long; a busy machine may.
        config.read_timeout = Some(Duration::from_secs(20));
        Client::try_from(config).unwrap()
    });
    (runtime, client)
}
