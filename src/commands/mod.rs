//! One short file a subcommand: each composes the rooms below.

pub mod allocation;
pub mod check;
pub mod clean;
mod file_systems;
pub mod play;
pub mod run;
