//! One pod: source, admission, worker, environment, volumes, status, publisher.

pub mod admission;
pub mod backoff;
pub mod command_line;
pub mod environment;
pub mod expansion;
pub mod quantity;
pub mod status;
pub mod volumes;
