//! Both ends of each protocol in one process.

mod client;
mod hostile;
mod negotiation;
mod port_forward;
mod remote_command;
mod seeds;
