//! jiriaf-pilot joins batch systems and Kubernetes: inside a Slurm or PBS allocation it registers the
//! host as a Node, runs the pods bound to it as process trees, and is gone before the walltime ends.
//!
//! The rooms of the house, upper ones first; each knows only those below it (docs/architecture.md).

pub mod cli;
pub mod commands;
pub mod guardian;

pub mod server;

pub mod certificates;
pub mod drain;
pub mod idle;
pub mod node;
pub mod pod;

pub mod container;

pub mod tunnel;

pub mod allocation;

pub mod cluster;
pub mod files;
pub mod pilot_metrics;
