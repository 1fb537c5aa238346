//! The Node's own HTTPS API: a kubelet's.

pub mod metrics;
