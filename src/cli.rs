//! The command line, in one place.

/// Runs the program: parses the command line and hands over to one of the commands.
#[must_use]
pub fn main() -> std::process::ExitCode {
    std::process::ExitCode::SUCCESS
}
