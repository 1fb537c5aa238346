//! What follows from a container's end.

/// What follows from a container's end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// Nothing: it stays ended.
    Stay,
    /// It is started again.
    Restart,
}

/// Kubernetes' restartPolicy: Always (the default), OnFailure or Never.
#[must_use]
pub fn after_end(restart_policy: Option<&str>, exit_code: i32) -> Next {
    match restart_policy {
        Some("Never") => Next::Stay,
        Some("OnFailure") if exit_code == 0 => Next::Stay,
        _ => Next::Restart,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn restart_policies_are_kubernetes_own() {
        for (policy, code, next) in [
            (None, 0, Next::Restart),
            (Some("Always"), 0, Next::Restart),
            (Some("Always"), 7, Next::Restart),
            (Some("OnFailure"), 0, Next::Stay),
            (Some("OnFailure"), 1, Next::Restart),
            (Some("Never"), 0, Next::Stay),
            (Some("Never"), 137, Next::Stay),
        ] {
            assert_eq!(after_end(policy, code), next, "{policy:?} {code}");
        }
    }
}
