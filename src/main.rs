//! The command line of jiriaf-pilot.

fn main() -> std::process::ExitCode {
    jiriaf_pilot::cli::main()
}
