//! One short file a subcommand: each composes the rooms below.

pub mod allocation;
pub mod check;
pub mod clean;
pub mod play;
pub mod run;
