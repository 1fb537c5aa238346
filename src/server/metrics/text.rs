//! Prometheus's text format.
//!
//! Written by hand: prometheus-client's encoders write no time stamps, and metrics-server measures CPU rates between them.

use std::fmt::Write as _;
use std::time::{Duration, SystemTime};

/// Prometheus's text format 0.0.4, as it grows.
#[derive(Default)]
pub(super) struct Text(String);

impl Text {
    pub(super) fn with_capacity(bytes: usize) -> Self {
        Self(String::with_capacity(bytes))
    }

    pub(super) fn into_string(self) -> String {
        self.0
    }

    pub(super) fn push(&mut self, text: &str) {
        self.0.push_str(text);
    }

    // Writing to a String cannot fail.
    pub(super) fn write(&mut self, arguments: std::fmt::Arguments<'_>) {
        let _ = self.0.write_fmt(arguments);
    }

    pub(super) fn family(&mut self, name: &str, kind: &str, help: &str) {
        self.write(format_args!("# HELP {name} {help}\n# TYPE {name} {kind}\n"));
    }

    /// The end of a sample; its time stamp is in milliseconds.
    pub(super) fn value(&mut self, value: &dyn std::fmt::Display, at: Option<SystemTime>) {
        match at {
            Some(at) => self.write(format_args!(" {value} {}\n", since_epoch(at).as_millis())),
            None => self.write(format_args!(" {value}\n")),
        }
    }
}

/// A label's value. Kubernetes' names need no escapes; nothing here depends on that.
#[derive(Clone, Copy)]
pub(super) struct Quoted<'a>(pub(super) &'a str);

impl std::fmt::Display for Quoted<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_char('"')?;
        for char in self.0.chars() {
            match char {
                '\\' => f.write_str("\\\\")?,
                '"' => f.write_str("\\\"")?,
                '\n' => f.write_str("\\n")?,
                char => f.write_char(char)?,
            }
        }
        f.write_char('"')
    }
}

/// For time stamps.
pub(super) fn since_epoch(at: SystemTime) -> Duration {
    at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default()
}
