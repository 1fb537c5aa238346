//! One pod: source, admission, worker, environment, volumes, status, publisher.

pub mod admission;
pub mod api;
pub mod backoff;
pub mod command_line;
pub mod containers;
pub mod context;
pub mod directory;
pub mod environment;
pub mod events;
pub mod expansion;
pub mod handler;
#[cfg(test)]
mod hostile_tests;
pub mod images;
pub mod isolation;
pub mod manager;
pub mod network;
pub mod objects;
pub mod outcome;
pub mod ports;
pub mod pressure;
pub mod probe;
pub mod publisher;
pub mod quantity;
pub mod record;
pub mod roster;
pub mod security;
pub mod services;
pub mod session;
pub mod share;
pub mod source;
pub mod status;
pub mod volumes;
pub mod worker;
