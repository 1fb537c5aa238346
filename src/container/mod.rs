//! One container: command line, supervisor, process tree, log.
//!
//! [`Supervisors::spawn`] starts a supervisor, [`Supervisor::start`] gives it its container, [`Supervisor::next`] tells
//! what happens. [`supervise`] and [`launch`] are the stages that do it, processes of the same binary.

mod affinity;
mod cgroup;
mod client;
mod descriptors;
mod exec;
mod foreign;
pub mod isolation;
mod launch;
mod log;
pub mod log_reader;
pub mod log_watch;
mod output;
mod peer;
pub mod process;
mod protocol;
mod remains;
mod run;
mod sessions;
mod supervisor;
pub mod terminal;
pub mod usage;

pub use cgroup::{CgroupSpec, Delegation, Limits};
pub use client::{ExecStdio, Supervisor, Supervisors, SupervisorsError};
pub use foreign::ForeignSessions;
pub use launch::{become_program, launch};
pub use log::LogLimits;
pub use protocol::{
    ContainerId, ContainerSpec, End, Event, Session, StartError, Stdio, View, ViewFile, ViewMount,
};
pub use remains::{end_marked, end_supervisors, is_supervisor};
pub use supervisor::supervise;

/// The variable by which what is left of a container is found: `<mark>/<pod uid>/<container>/<restart count>`.
pub const MARK: &str = "JIRIAF_CONTAINER";
