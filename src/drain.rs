//! The end: cordon, drain, report, remove.
