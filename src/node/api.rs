//! One call to the API server: with a limit, and with what became of it sorted into a few kinds.

use std::future::Future;
use std::time::Duration;

use k8s_openapi::api::core::v1::Node;
use kube::core::Status;
use thiserror::Error;

/// Longest time that one call may take. kubelet takes the Lease's renewal interval, 10 s
/// (`pkg/kubelet/kubelet.go`); a watch aside, every call here is answered in milliseconds.
pub const CALL_LIMIT: Duration = Duration::from_secs(10);

/// Why a call to the API server brought nothing.
#[derive(Debug, Error)]
pub enum CallError {
    /// No answer within [`CALL_LIMIT`].
    #[error("no answer within {} s", CALL_LIMIT.as_secs())]
    NoAnswer,
    /// The API server answered with a refusal.
    #[error("{}", crate::cluster::explain_answer(.0))]
    Answer(#[source] Box<Status>),
    /// No connection, or an answer that makes no sense.
    #[error("{}", crate::cluster::causes(.0.as_ref()))]
    Transport(#[source] Box<kube::Error>),
}

/// What a failed call means for what to do next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// There is no such object (404).
    NotFound,
    /// There is such an object already (409 AlreadyExists).
    Exists,
    /// The object is another than was thought: its version or its uid (409 Conflict).
    Conflict,
    /// The credential lacks the right (403).
    Forbidden,
    /// The credential is not accepted (401).
    Unauthorized,
    /// The API server does not accept what was sent (other 4xx).
    Invalid,
    /// It may go better next time: no connection, no answer, overload, a server's fault.
    Passing,
}

impl CallError {
    /// What this failure means.
    #[must_use]
    pub fn kind(&self) -> Kind {
        match self {
            Self::NoAnswer | Self::Transport(_) => Kind::Passing,
            Self::Answer(status) => kind_of(status),
        }
    }

    /// What the API server said; empty where it did not answer.
    #[must_use]
    pub fn message(&self) -> &str {
        match self {
            Self::Answer(status) => &status.message,
            _ => "",
        }
    }
}

fn kind_of(status: &Status) -> Kind {
    match (status.code, status.reason.as_str()) {
        (404, _) => Kind::NotFound,
        (409, "AlreadyExists") => Kind::Exists,
        (409, _) => Kind::Conflict,
        (403, _) => Kind::Forbidden,
        (401, _) => Kind::Unauthorized,
        (408 | 429, _) => Kind::Passing,
        (400..=499, _) => Kind::Invalid,
        _ => Kind::Passing,
    }
}

/// Makes one call, within [`CALL_LIMIT`].
///
/// # Errors
/// [`CallError`], whose [`CallError::kind`] says what it means.
pub async fn call<T>(request: impl Future<Output = kube::Result<T>>) -> Result<T, CallError> {
    within(CALL_LIMIT, request).await
}

async fn within<T>(limit: Duration, request: impl Future<Output = kube::Result<T>>) -> Result<T, CallError> {
    match tokio::time::timeout(limit, request).await {
        Err(_) => Err(CallError::NoAnswer),
        Ok(Ok(done)) => Ok(done),
        Ok(Err(kube::Error::Api(status))) => Err(CallError::Answer(status)),
        Ok(Err(other)) => Err(CallError::Transport(Box::new(other))),
    }
}

/// The uid that the API server gave an object; never absent in what it answers.
pub(super) fn uid(node: &Node) -> String {
    node.metadata.uid.clone().unwrap_or_default()
}

/// Says once that something fails, and once that it works again: an API server that is away for an hour must
/// not fill a job's output file.
#[derive(Debug)]
pub struct Trouble {
    what: &'static str,
    failures: u32,
}

impl Trouble {
    /// Nothing has failed yet of `what`, words such as "renewing the Lease".
    #[must_use]
    pub fn new(what: &'static str) -> Self {
        Self { what, failures: 0 }
    }

    /// How many calls have failed in a row.
    #[must_use]
    pub fn failures(&self) -> u32 {
        self.failures
    }

    /// Notes a failure, and says so when it is the first in a row.
    pub fn failed(&mut self, node: &str, error: &CallError) {
        self.failures = self.failures.saturating_add(1);
        if self.failures == 1 {
            tracing::warn!(node, %error, "{} failed; it is tried again, and further failures are counted", self.what);
        } else {
            tracing::debug!(node, %error, failures = self.failures, "{} failed again", self.what);
        }
    }

    /// Notes a success, and says so when failures came before it.
    pub fn worked(&mut self, node: &str) {
        if self.failures > 0 {
            tracing::info!(node, failures = self.failures, "{} works again", self.what);
        }
        self.failures = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(code: u16, reason: &str) -> CallError {
        let status = Status { code, ..Status::failure("some words", reason) };
        CallError::Answer(Box::new(status))
    }

    #[test]
    fn answers_are_sorted() {
        for (code, reason, kind) in [
            (404, "NotFound", Kind::NotFound),
            (409, "AlreadyExists", Kind::Exists),
            (409, "Conflict", Kind::Conflict),
            (403, "Forbidden", Kind::Forbidden),
            (401, "Unauthorized", Kind::Unauthorized),
            (422, "Invalid", Kind::Invalid),
            (429, "TooManyRequests", Kind::Passing),
            (500, "InternalError", Kind::Passing),
            (503, "ServiceUnavailable", Kind::Passing),
        ] {
            assert_eq!(answer(code, reason).kind(), kind, "{code} {reason}");
        }
        assert_eq!(CallError::NoAnswer.kind(), Kind::Passing);
    }

    #[test]
    fn an_answer_is_shown_with_its_words_its_code_and_the_way_out() {
        assert_eq!(answer(422, "Invalid").to_string(), "some words (HTTP 422)");
        let refused = answer(403, "Forbidden").to_string();
        assert!(
            refused.starts_with("some words (HTTP 403)") && refused.contains("docs/cluster/"),
            "{refused}"
        );
    }

    #[tokio::test]
    async fn a_call_that_hangs_is_given_up() {
        let hung = within(Duration::from_millis(1), std::future::pending::<kube::Result<()>>()).await;
        assert!(matches!(hung, Err(CallError::NoAnswer)));
    }

    #[test]
    fn failures_are_counted_in_a_row() {
        let mut trouble = Trouble::new("a test");
        trouble.failed("n", &CallError::NoAnswer);
        trouble.failed("n", &CallError::NoAnswer);
        assert_eq!(trouble.failures(), 2);
        trouble.worked("n");
        assert_eq!(trouble.failures(), 0);
    }
}
