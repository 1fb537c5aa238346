//! The Node's certificates: the one that its own API serves with, and the one by which it is a client.
//!
//! [`pair::self_signed`] and [`files::Files::open`] make what a [`Serving`] offers; [`files::follow`] and
//! [`kubelet_serving::keep`] put another in its place at run time. [`bootstrap::connect`] gets a node's own identity.

pub mod bootstrap;
pub mod files;
pub mod kubelet_serving;
pub mod pair;
pub mod renewal;
pub mod request;
pub mod serving;
pub mod switch;

#[cfg(test)]
mod stand_in;

pub use bootstrap::BootstrapError;
pub use pair::CertificateError;
pub use serving::Serving;
