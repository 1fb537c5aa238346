//! A client whose requests go through a function: [`client`].

use std::pin::Pin;
use std::task::{Context, Poll};

use http::{Request, Response};
use kube::client::Body;
use tower_service::Service;

type Answering = Pin<Box<dyn Future<Output = Result<Response<Body>, kube::Error>> + Send>>;

/// A client for which `send` answers each request. To be called in a tokio runtime.
#[must_use]
pub fn client<F: Future<Output = Result<Response<Body>, kube::Error>> + Send + 'static>(
    namespace: &str,
    send: impl Fn(Request<Body>) -> F + Clone + Send + 'static,
) -> kube::Client {
    kube::Client::new(Sending(send), namespace)
}

#[derive(Clone)]
struct Sending<S>(S);

impl<F, S> Service<Request<Body>> for Sending<S>
where
    F: Future<Output = Result<Response<Body>, kube::Error>> + Send + 'static,
    S: Fn(Request<Body>) -> F,
{
    type Response = Response<Body>;
    type Error = kube::Error;
    type Future = Answering;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), kube::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Answering {
        Box::pin((self.0)(request))
    }
}
