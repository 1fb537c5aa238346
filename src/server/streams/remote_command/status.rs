//! How a command ended, as its client reads it.

use serde::Serialize;

/// Most characters of a message; the rest is cut.
const MESSAGE: usize = 8 * 1024;

/// How a command ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Status {
    /// With exit code 0, or what was attached to has ended.
    Success,
    /// With this exit code.
    Exit(u8),
    /// It could not be run, or its end is not known.
    Failure(String),
}

/// How a protocol writes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Style {
    /// A metav1.Status: since v4.
    Json,
    /// Only what went wrong, for people.
    Text,
}

/// The fields of a metav1.Status that a kubelet sends (cri-streaming remotecommand/status.go).
#[derive(Serialize)]
struct MetaStatus<'a> {
    status: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    message: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    reason: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    details: Option<Details>,
    #[serde(skip_serializing_if = "Option::is_none")]
    code: Option<u16>,
}

#[derive(Serialize)]
struct Details {
    causes: [Cause; 1],
}

#[derive(Serialize)]
struct Cause {
    reason: &'static str,
    message: String,
}

impl Status {
    /// What goes on the error stream, if anything.
    pub(super) fn render(&self, style: Style) -> Option<String> {
        let message = match self {
            Self::Success | Self::Exit(0) => String::new(),
            Self::Exit(code) => format!("command terminated with non-zero exit code: exit code {code}"),
            Self::Failure(why) => {
                let why: String = why.chars().take(MESSAGE).collect();
                format!("Internal error occurred: {why}")
            }
        };
        if style == Style::Text {
            return (!message.is_empty()).then_some(message);
        }
        let message = message.as_str();
        let status = match self {
            Self::Success | Self::Exit(0) => {
                MetaStatus { status: "Success", message, reason: "", details: None, code: None }
            }
            Self::Exit(code) => {
                let causes = [Cause { reason: "ExitCode", message: code.to_string() }];
                let details = Some(Details { causes });
                MetaStatus { status: "Failure", message, reason: "NonZeroExitCode", details, code: None }
            }
            Self::Failure(_) => MetaStatus {
                status: "Failure",
                message,
                reason: "InternalError",
                details: None,
                code: Some(500),
            },
        };
        serde_json::to_string(&status).ok()
    }
}
