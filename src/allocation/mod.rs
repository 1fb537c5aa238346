//! What the batch system granted on this host. Knows nothing of Kubernetes.
