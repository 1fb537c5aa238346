//! One container: command line, supervisor, process tree, log.
