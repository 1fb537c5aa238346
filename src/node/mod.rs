//! This pilot as a Kubernetes Node: registration, status, lease, alivetime.
