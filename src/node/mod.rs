//! This pilot as a Kubernetes Node: registration, status, lease, alivetime.
//!
//! [`register`] makes or adopts the Node and gives a [`NodeHandle`]; its [`NodeHandle::spawn_upkeep`] keeps the
//! Node true until [`NodeHandle::remove`]. What is written is decided by pure functions: [`alivetime`] when and
//! which countdown, [`object`] and [`status`] the Node and its patches, [`identity`] whose a Node is.

pub mod alivetime;
pub mod api;
pub mod error;
pub mod handle;
pub mod identity;
pub mod info;
pub mod labels;
pub mod leader;
pub mod lease;
pub mod object;
pub mod registration;
mod shared;
pub mod spread;
pub mod status;
mod upkeep;

pub use alivetime::Timing;
pub use error::NodeError;
pub use handle::{NodeHandle, Removal};
pub use object::{Capacity, NodeConfig};
pub use registration::register;
pub use shared::NodeState;
pub use status::{Endpoint, Further, Health};
