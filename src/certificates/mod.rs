//! The Node's certificates: the one that its own API serves with, and the one by which it is a client.
//!
//! [`pair::self_signed`] and [`pair::from_files`] make what a [`Serving`] offers; [`files::follow`] puts a new one in
//! its place at run time.
// Until it is wired.
#![allow(dead_code)]

pub mod files;
pub mod pair;
pub mod serving;

pub use pair::CertificateError;
pub use serving::Serving;
