//! `clean`.
use std::process::ExitCode;

use crate::cli::CleanArgs;

/// Runs `clean`.
#[must_use]
pub fn run(_args: &CleanArgs) -> ExitCode {
    ExitCode::from(2)
}
