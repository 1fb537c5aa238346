//! The pilot from outside: a real control plane, a real Slurm, ordinary users. Start it with
//! `tests/run --e2e [filter]`, which brings up both.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // a test's failure is its panic

#[allow(dead_code, unused_imports)] // it serves tests that come and go
mod harness;

mod access;
mod admission;
mod bad_input;
mod certificates;
mod cgroup;
mod check;
mod config;
mod containers;
mod containers_again;
mod cordon;
mod crash;
mod crash_random;
mod deletion;
mod drain;
mod ending;
mod environment;
mod exec;
mod forward;
mod full_disk;
mod grant;
mod health;
mod hooks;
mod identity;
mod idle;
mod images;
mod isolation;
mod jobs;
mod load;
mod logs;
mod memory;
mod metrics;
mod objects_gone;
mod pbs;
mod privacy;
mod probes;
mod reference;
mod restarts;
mod scripts;
mod seed;
mod shares;
mod signals;
mod status;
mod tunnel;
mod volumes;
mod volumes_kept;
mod volumes_kinds;
mod walltime;
mod walltime_policy;
