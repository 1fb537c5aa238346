//! An API server for tests: a function that answers.

use std::sync::Arc;

use http::Response;
use kube::client::Body;

use super::sending;

/// A client of an API server that is a function: method, path with query, and body make a status code and an answer.
pub(crate) fn client_of(
    answer: impl Fn(&str, &str, &str) -> (u16, serde_json::Value) + Send + Sync + 'static,
) -> kube::Client {
    let answer = Arc::new(answer);
    sending::client("default", move |request| {
        let answer = Arc::clone(&answer);
        async move {
            let (parts, body) = request.into_parts();
            let body = http_body_util::BodyExt::collect(body).await?.to_bytes();
            let body = String::from_utf8_lossy(&body).into_owned();
            let (code, answer) = answer(parts.method.as_str(), &parts.uri.to_string(), &body);
            let answer = Body::from(answer.to_string().into_bytes());
            Ok(Response::builder().status(code).body(answer).unwrap())
        }
    })
}
