//! Makes the man pages, one for the program and one for each subcommand: `cargo run --example man -- DIR`.

use std::path::PathBuf;
use std::process::ExitCode;

fn main() -> ExitCode {
    let Some(directory) = std::env::args_os().nth(1).map(PathBuf::from) else {
        eprintln!("usage: cargo run --example man -- DIR");
        return ExitCode::from(2);
    };
    // The pages are the subcommands' help; one of `help` would say nothing more.
    let command = jiriaf_pilot::cli::command().disable_help_subcommand(true);
    let made =
        std::fs::create_dir_all(&directory).and_then(|()| clap_mangen::generate_to(command, &directory));
    match made {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}: {error}", directory.display());
            ExitCode::from(1)
        }
    }
}
