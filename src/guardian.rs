//! The first process of `run`: takes the batch system's signals, restarts a crashed pilot.
