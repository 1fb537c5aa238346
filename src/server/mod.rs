//! The Node's own API, as a kubelet serves it.

pub mod streams;
