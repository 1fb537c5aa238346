//! `play`.
use std::process::ExitCode;

use crate::cli::PlayArgs;

/// Runs `play`.
#[must_use]
pub fn run(_args: PlayArgs) -> ExitCode {
    ExitCode::from(2)
}
