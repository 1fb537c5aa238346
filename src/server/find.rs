//! Finds what a request names, or says in a kubelet's words why not (kubelet's `server.go`, `kubelet_pods.go`); each of
//! its handlers has words of its own.

use std::sync::Arc;

use http::header::{HeaderName, HeaderValue};
use http::{Response, StatusCode};

use super::body::{Answer, text};
use super::route::PodPath;
use super::streams::handshake::Refusal;
use crate::pod::containers;
use crate::pod::roster::{PodView, Roster};
use crate::pod::session::RunHandle;

/// An answer that says no.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Refused {
    /// The HTTP status.
    pub status: StatusCode,
    /// Why, for people: a kubelet's words.
    pub message: String,
    /// What else is worth to know of it, for the pilot's own log.
    pub detail: String,
    /// Headers that say more.
    pub headers: Vec<(HeaderName, &'static str)>,
}

impl Refused {
    /// An answer that says no.
    #[must_use]
    pub fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self { status, message: message.into(), detail: String::new(), headers: Vec::new() }
    }

    /// With what only the log says.
    #[must_use]
    pub fn because(self, detail: impl Into<String>) -> Self {
        Self { detail: detail.into(), ..self }
    }

    /// As what is sent.
    #[must_use]
    pub fn response(self) -> Response<Answer> {
        let mut response = text(self.status, format!("{}\n", self.message));
        for (name, value) in self.headers {
            response.headers_mut().append(name, HeaderValue::from_static(value));
        }
        response
    }
}

impl From<Refusal> for Refused {
    fn from(refusal: Refusal) -> Self {
        Self { headers: refusal.headers, ..Self::new(refusal.status, refusal.text) }
    }
}

/// The pod that a path names, or nothing.
fn named(roster: &Roster, path: &PodPath) -> Option<Arc<PodView>> {
    match &path.uid {
        Some(uid) => roster.get(uid).filter(|view| {
            let meta = &view.pod.metadata;
            meta.namespace.as_deref() == Some(&path.namespace) && meta.name.as_deref() == Some(&path.name)
        }),
        None => roster.find(&path.namespace, &path.name),
    }
}

/// Whether there is a pod of this name, whatever its uid.
fn named_so(roster: &Roster, path: &PodPath) -> bool {
    roster.find(&path.namespace, &path.name).is_some()
}

/// The pod whose container's log is wanted.
///
/// # Errors
/// 404 when there is no such pod, or no such container in it.
pub fn logged(roster: &Roster, path: &PodPath, container: &str) -> Result<Arc<PodView>, Refused> {
    let missing = |message| Refused::new(StatusCode::NOT_FOUND, message);
    let name = &path.name;
    let view = named(roster, path).ok_or_else(|| missing(format!("pod {name:?} does not exist")))?;
    if has(&view, container) {
        return Ok(view);
    }
    Err(missing(format!("container {container:?} not found in pod {name:?}")))
}

/// The pod to join, or to forward ports to.
///
/// # Errors
/// 404 when there is none, or another one by this name.
pub fn joined(roster: &Roster, path: &PodPath) -> Result<Arc<PodView>, Refused> {
    named(roster, path).ok_or_else(|| {
        let message = if named_so(roster, path) { "pod not found" } else { "pod does not exist" };
        Refused::new(StatusCode::NOT_FOUND, message).because(format!("pod {}/{}", path.namespace, path.name))
    })
}

/// The run of a container, to be joined. A kubelet looks among the containers that run, so the answer is the same for one
/// that has ended and one that never was; the log tells them apart.
///
/// # Errors
/// 404 when there is no such pod, 500 when no such container runs in it.
pub fn run(roster: &Roster, path: &PodPath, container: &str, attach: bool) -> Result<RunHandle, Refused> {
    let missing = |detail| {
        let message = if attach {
            format!("container {container} not found in pod {}_{}", path.name, path.namespace)
        } else {
            format!("container not found ({container:?})")
        };
        Refused::new(StatusCode::INTERNAL_SERVER_ERROR, message).because(detail)
    };
    if path.uid.is_some() && named(roster, path).is_none() && named_so(roster, path) {
        return Err(missing("the pod of this name has another uid"));
    }
    let view = joined(roster, path)?;
    let running = |c: &crate::pod::roster::ContainerView| c.run.clone().filter(|_| c.state.is_running());
    view.containers.get(container).and_then(running).ok_or_else(|| {
        missing(if has(&view, container) { "it does not run" } else { "the pod has no such container" })
    })
}

fn has(view: &PodView, container: &str) -> bool {
    containers::find(&view.pod, container).is_some()
}

/// Names and values of a query, decoded (`application/x-www-form-urlencoded`).
pub fn query(query: Option<&str>) -> impl Iterator<Item = (String, String)> + '_ {
    form_urlencoded::parse(query.unwrap_or_default().as_bytes()).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_query_is_decoded() {
        let pairs: Vec<_> = query(Some("command=sh&command=-c&command=a%20%26+b%zz&x&=y")).collect();
        let pair = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        assert_eq!(
            pairs,
            [
                pair("command", "sh"),
                pair("command", "-c"),
                pair("command", "a & b%zz"),
                pair("x", ""),
                pair("", "y")
            ]
        );
        assert_eq!(query(None).count(), 0);
    }
}
