//! One short file a subcommand: each composes the rooms below.

pub mod allocation;
