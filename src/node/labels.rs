//! Names and label values that Kubernetes accepts, made from what batch systems write.

/// A DNS label (RFC 1123), and what a Node's hostname label holds.
const NAME_BYTES: usize = 63;

/// Makes a valid label value: at most 63 letters, digits, `-`, `_` and `.`, beginning and ending with a letter or digit
/// (`gpu&hbm80g` becomes `gpu-hbm80g`, `45[3].pbshost` becomes `45-3-.pbshost`).
#[must_use]
pub fn label_value(raw: &str) -> String {
    let safe = |c: char| if c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.') { c } else { '-' };
    let text: String = raw.chars().map(safe).take(NAME_BYTES).collect();
    text.trim_matches(|c: char| !c.is_ascii_alphanumeric()).to_owned()
}

/// Makes one DNS label: lower case letters, digits and `-`.
fn dns_label(raw: &str) -> String {
    let safe = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' };
    let text: String = raw.chars().map(safe).collect();
    let mut label = String::new();
    for part in text.split('-').filter(|part| !part.is_empty()) {
        if !label.is_empty() {
            label.push('-');
        }
        label.push_str(part);
    }
    label
}

/// The Node's name: `<site>-<job>-<host>`, with `-r<n>` for the n-th requeue, which keeps the job's id.
#[must_use]
pub fn node_name(site: &str, job: Option<&str>, restart: u32, host: &str) -> String {
    let requeue = if restart > 0 { format!("r{restart}") } else { String::new() };
    let parts = [site, job.unwrap_or_default(), host, &requeue];
    let name = parts.map(dns_label).into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join("-");
    let whole = parts.join("\u{1}");
    shorten(if name.is_empty() { "node" } else { &name }, &whole)
}

/// Cuts a name to 63 bytes; what was cut is told apart by a checksum of all that the name was made of.
fn shorten(name: &str, whole: &str) -> String {
    if name.len() <= NAME_BYTES {
        return name.to_owned();
    }
    // FNV-1a: stable over versions and machines, unlike std's hasher.
    let hash =
        whole.bytes().fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193));
    let kept = &name[..NAME_BYTES - 9];
    format!("{}-{hash:08x}", kept.trim_end_matches('-'))
}

/// A name that no Node may have.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "a DNS name of at most 63 bytes is wanted: lower case letters, digits, '-' and '.', beginning and ending with a letter or digit"
)]
pub struct NodeNameError;

/// Checks a Node's name.
///
/// # Errors
/// When the API server would refuse it, or the hostname label could not hold it.
pub fn check_node_name(name: &str) -> Result<(), NodeNameError> {
    let part = |part: &str| {
        !part.is_empty()
            && part.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
            && !part.starts_with('-')
            && !part.ends_with('-')
    };
    if name.len() <= NAME_BYTES && name.split('.').all(part) { Ok(()) } else { Err(NodeNameError) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_batch_systems_write_becomes_valid() {
        assert_eq!(label_value("gpu&hbm80g"), "gpu-hbm80g");
        assert_eq!(label_value("45[3].pbshost"), "45-3-.pbshost");
        assert_eq!(label_value("[x]"), "x");
        assert_eq!(
            node_name("NERSC Perlmutter", Some("45[3].pbshost"), 0, "nid001"),
            "nersc-perlmutter-45-3-pbshost-nid001"
        );
        assert_eq!(node_name("s", Some("7"), 2, "n1"), "s-7-n1-r2");
        assert_eq!(node_name("", None, 0, ""), "node");
    }

    #[test]
    fn names_that_the_api_server_refuses_are_refused() {
        for good in ["a", "a-b.c", "0"] {
            assert_eq!(check_node_name(good), Ok(()), "{good}");
        }
        let long = "a".repeat(64);
        for bad in ["", "A", "a_b", "-a", "a-", "a..b", long.as_str()] {
            assert_eq!(check_node_name(bad), Err(NodeNameError), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn a_made_name_is_always_valid(site in ".{0,80}", job in ".{0,40}", restart in 0u32..5, host in ".{0,80}") {
            let name = node_name(&site, Some(&job), restart, &host);
            prop_assert_eq!(check_node_name(&name), Ok(()), "{}", name);
        }

        #[test]
        fn long_names_of_different_hosts_differ(a in "[a-z]{60}x", b in "[a-z]{60}y") {
            prop_assert_ne!(node_name(&a, Some("1"), 0, "n1"), node_name(&a, Some("1"), 0, "n2"));
            prop_assert_ne!(node_name(&a, None, 0, "n"), node_name(&b, None, 0, "n"));
        }
    }
}
