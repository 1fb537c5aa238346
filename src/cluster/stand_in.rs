//! An API server for tests: a function that answers.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use http::{Request, Response};
use kube::client::Body;
use tower_service::Service;

type Answer = Arc<dyn Fn(&str, &str, &str) -> (u16, serde_json::Value) + Send + Sync>;

/// An API server that is a function: method, path with query, and body make a status code and an answer.
#[derive(Clone)]
struct Server(Answer);

impl Service<Request<Body>> for Server {
    type Response = Response<Body>;
    type Error = kube::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, kube::Error>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), kube::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let answer = Arc::clone(&self.0);
        Box::pin(async move {
            let (parts, body) = request.into_parts();
            let body = http_body_util::BodyExt::collect(body).await?.to_bytes();
            let body = String::from_utf8_lossy(&body).into_owned();
            let (code, answer) = answer(parts.method.as_str(), &parts.uri.to_string(), &body);
            let answer = Body::from(answer.to_string().into_bytes());
            Ok(Response::builder().status(code).body(answer).unwrap())
        })
    }
}

/// A client of an API server that is a function.
pub(crate) fn client_of(
    answer: impl Fn(&str, &str, &str) -> (u16, serde_json::Value) + Send + Sync + 'static,
) -> kube::Client {
    kube::Client::new(Server(Arc::new(answer)), "default")
}
