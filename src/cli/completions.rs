//! `completions`: scripts by which shells complete commands and flags, made by clap_complete of clap's own arguments.

use std::io::Write as _;
use std::process::ExitCode;

use clap::ValueEnum;
use clap_complete::{Generator as _, shells};

/// A shell that completes flags: those that compute centres have. What clap_complete knows besides would be 11 kB more.
#[derive(Debug, Clone, Copy, ValueEnum, PartialEq, Eq)]
pub(super) enum Shell {
    /// bash.
    Bash,
    /// fish.
    Fish,
    /// zsh.
    Zsh,
}

/// Prints the script by which a shell completes flags.
pub(super) fn print(shell: Shell) -> ExitCode {
    let mut command = super::command();
    command.set_bin_name("jiriaf-pilot");
    command.build();
    let mut script = Vec::new();
    match shell {
        Shell::Bash => shells::Bash.generate(&command, &mut script),
        Shell::Fish => shells::Fish.generate(&command, &mut script),
        Shell::Zsh => shells::Zsh.generate(&command, &mut script),
    }
    if shell == Shell::Bash {
        // clap_complete 4.6 has two names for what a program with a `-` in its name completes, and so completes nothing.
        let text = String::from_utf8_lossy(&script).replace("jiriaf__subcmd__pilot", "jiriaf__pilot");
        script = text.into_bytes();
    }
    match std::io::stdout().lock().write_all(&script) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(1)
        }
    }
}
