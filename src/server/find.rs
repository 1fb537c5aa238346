//! Finds what a request names, or says in a kubelet's words why not.

use std::sync::Arc;

use http::{Response, StatusCode};

use super::body::{Answer, text};
use super::route::PodPath;
use crate::pod::roster::{PodView, Roster};
use crate::pod::session::RunHandle;

/// An answer that says no.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Refused {
    /// The HTTP status.
    pub status: StatusCode,
    /// Why, for people.
    pub message: String,
}

impl Refused {
    /// An answer that says no.
    #[must_use]
    pub fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self { status, message: message.into() }
    }

    /// As what is sent.
    #[must_use]
    pub fn response(self) -> Response<Answer> {
        text(self.status, format!("{}\n", self.message))
    }
}

/// The pod that a path names.
///
/// # Errors
/// 404 when there is none.
pub fn pod(roster: &Roster, path: &PodPath) -> Result<Arc<PodView>, Refused> {
    let found = match &path.uid {
        Some(uid) => roster.get(uid).filter(|view| {
            let meta = &view.pod.metadata;
            meta.namespace.as_deref() == Some(&path.namespace) && meta.name.as_deref() == Some(&path.name)
        }),
        None => roster.find(&path.namespace, &path.name),
    };
    found.ok_or_else(|| {
        Refused::new(StatusCode::NOT_FOUND, format!("pod {}_{} does not exist", path.name, path.namespace))
    })
}

/// Whether a pod has such a container.
///
/// # Errors
/// 404 when it has not.
pub fn container(view: &PodView, name: &str) -> Result<(), Refused> {
    let spec = view.pod.spec.as_ref();
    if spec.is_some_and(|spec| spec.containers.iter().any(|container| container.name == name)) {
        return Ok(());
    }
    let pod = view.pod.metadata.name.as_deref().unwrap_or_default();
    Err(Refused::new(StatusCode::NOT_FOUND, format!("container {name:?} not found in pod {pod:?}")))
}

/// The run of a container, to be joined.
///
/// # Errors
/// 404 when the pod has no such container, 400 when that does not run.
pub fn run(view: &PodView, name: &str) -> Result<RunHandle, Refused> {
    container(view, name)?;
    let running = |c: &crate::pod::roster::ContainerView| {
        c.run.clone().filter(|_| matches!(c.state, crate::pod::status::State::Running { .. }))
    };
    view.containers.get(name).and_then(running).ok_or_else(|| {
        let pod = view.pod.metadata.name.as_deref().unwrap_or_default();
        Refused::new(StatusCode::BAD_REQUEST, format!("container {name:?} in pod {pod:?} is not running"))
    })
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
