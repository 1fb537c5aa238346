//! Names and label values that the API server accepts: job ids, constraints and host names come in forms that
//! it would refuse.
//!
//! The rules are those of `k8s.io/apimachinery/pkg/util/validation`: a label value has at most 63 bytes of
//! `[A-Za-z0-9._-]` and begins and ends with a letter or a digit; a DNS-1123 name has lower case only.

use thiserror::Error;

/// Longest label value in bytes (`LabelValueMaxLength`). A Node's name is held to it too, although the API
/// server allows 253: the name is also the value of the label `kubernetes.io/hostname`, and a longer one is
/// refused there.
pub const MAX_LABEL_VALUE: usize = 63;

/// Longest DNS-1123 subdomain in bytes (`DNS1123SubdomainMaxLength`): the prefix of a label's key.
const MAX_SUBDOMAIN: usize = 253;

/// Bytes of the hash that stands for what was cut off: 8 hexadecimal digits. Two names that differ only in the
/// cut part then collide once in four thousand million.
const HASH_LEN: usize = 8;

/// Why a name, a label or an annotation was refused.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum LabelError {
    /// A Node's name that the API server would refuse.
    #[error(
        "node name {name:?}: {why}; wanted is a DNS name of at most 63 bytes in lower-case letters, digits, '-' \
         and '.', such as mysite-4711-node1 (--node-name, NODENAME)"
    )]
    NodeName {
        /// The name as given.
        name: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// A key of a label or an annotation that the API server would refuse.
    #[error(
        "label or annotation key {key:?}: {why}; wanted is [prefix/]name, the prefix a DNS name, the name at most \
         63 bytes of letters, digits, '-', '_' and '.', beginning and ending with a letter or a digit"
    )]
    Key {
        /// The key as given.
        key: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// A namespace's name that the API server would refuse.
    #[error(
        "namespace {name:?}: {why}; wanted are at most 63 bytes of lower-case letters, digits and '-', beginning \
         and ending with a letter or a digit"
    )]
    Namespace {
        /// The name as given.
        name: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// A label's value that the API server would refuse.
    #[error(
        "label {key}={value:?}: {why}; wanted are at most 63 bytes of letters, digits, '-', '_' and '.', \
         beginning and ending with a letter or a digit, or nothing at all"
    )]
    Value {
        /// The label's key.
        key: String,
        /// The value as given.
        value: String,
        /// What is wrong with it.
        why: &'static str,
    },
}

/// Makes a label value out of any text: what is not allowed becomes `-`, ends are trimmed, and what is too
/// long is cut and marked with a hash. `gpu&hbm80g` becomes `gpu-hbm80g`, `45[3].pbshost` becomes
/// `45-3.pbshost`. The same text always gives the same value; a valid value is left as it is.
#[must_use]
pub fn label_value(raw: &str) -> String {
    shorten(&tidy(raw, |c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.')), raw, MAX_LABEL_VALUE)
}

/// What a Node's name is made of. See [`node_name`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct NameParts<'a> {
    /// The site, or the batch system's cluster name.
    pub site: &'a str,
    /// The batch system's job id, as it writes it (`4711`, `45[3].pbshost`). `None` without a batch system.
    pub job: Option<&'a str>,
    /// How often the job was requeued; 0 is its first run.
    pub restart: u32,
    /// This host's name. Only what comes before its first dot is used.
    pub host: &'a str,
    /// The task's number, where several tasks of a job share a name.
    pub task: Option<u32>,
}

/// The Node's name: `<site or cluster>-<job id>-<host>`, then `-<task>` and `-r<restart>` where they are there.
///
/// Always a valid DNS label of at most 63 bytes. A name that would be longer is cut in the middle: a hash of
/// all parts takes the cut text's place, and the end (task, restart) stays, so that two pilots, and two runs
/// of one job, never share a name.
#[must_use]
pub fn node_name(parts: &NameParts<'_>) -> String {
    let host = parts.host.split('.').next().unwrap_or_default();
    let pieces = [parts.site, parts.job.unwrap_or_default(), host];
    let whole = pieces.iter().map(|p| dns_part(p)).filter(|p| !p.is_empty()).collect::<Vec<_>>().join("-");
    let whole = if whole.is_empty() { "pilot".to_owned() } else { whole };
    let mut end = parts.task.map(|t| format!("-{t}")).unwrap_or_default();
    if parts.restart > 0 {
        end.push_str(&format!("-r{}", parts.restart));
    }
    // The end is at most "-4294967295-r4294967295", 23 bytes: room is always left for the rest.
    let room = MAX_LABEL_VALUE.saturating_sub(end.len());
    shorten(&whole, &pieces.join("\n"), room) + &end
}

/// Checks a Node's name that a user gave.
///
/// # Errors
/// [`LabelError::NodeName`], which says what is wanted.
pub fn check_node_name(name: &str) -> Result<(), LabelError> {
    let fault =
        if name.len() > MAX_LABEL_VALUE { Some("is longer than 63 bytes") } else { subdomain_fault(name) };
    fault.map_or(Ok(()), |why| Err(LabelError::NodeName { name: name.to_owned(), why }))
}

/// Checks the key of a label or an annotation that a user gave.
///
/// # Errors
/// [`LabelError::Key`], which says what is wanted.
pub fn check_key(key: &str) -> Result<(), LabelError> {
    let (prefix, name) = match key.split_once('/') {
        Some((prefix, name)) => (Some(prefix), name),
        None => (None, key),
    };
    let fault = match prefix {
        Some(p) if p.len() > MAX_SUBDOMAIN => Some("has a prefix longer than 253 bytes"),
        Some(p) => subdomain_fault(p).map(|_| "has a prefix that is no DNS name"),
        None => None,
    };
    let fault = fault.or(if name.is_empty() { Some("has no name") } else { qualified_fault(name) });
    fault.map_or(Ok(()), |why| Err(LabelError::Key { key: key.to_owned(), why }))
}

/// Checks a namespace's name that a user gave: a DNS-1123 label (`DNS1123LabelMaxLength` is 63, too).
///
/// # Errors
/// [`LabelError::Namespace`], which says what is wanted.
pub fn check_namespace(name: &str) -> Result<(), LabelError> {
    let fault = match subdomain_fault(name) {
        None if name.len() > MAX_LABEL_VALUE => Some("is longer than 63 bytes"),
        None if name.contains('.') => Some("holds a '.'"),
        fault => fault,
    };
    fault.map_or(Ok(()), |why| Err(LabelError::Namespace { name: name.to_owned(), why }))
}

/// Checks a label that a user gave.
///
/// # Errors
/// [`LabelError::Key`] or [`LabelError::Value`], which say what is wanted.
pub fn check_label(key: &str, value: &str) -> Result<(), LabelError> {
    check_key(key)?;
    let fault = if value.is_empty() { None } else { qualified_fault(value) };
    fault.map_or(Ok(()), |why| Err(LabelError::Value { key: key.to_owned(), value: value.to_owned(), why }))
}

/// What is wrong with a label's value or the name part of its key, if anything.
fn qualified_fault(text: &str) -> Option<&'static str> {
    if text.len() > MAX_LABEL_VALUE {
        Some("is longer than 63 bytes")
    } else if !text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.')) {
        Some("holds a character that is not allowed")
    } else if !ends_well(text) {
        Some("does not begin and end with a letter or a digit")
    } else {
        None
    }
}

/// What is wrong with a DNS-1123 subdomain, its length aside, if anything.
fn subdomain_fault(name: &str) -> Option<&'static str> {
    if name.is_empty() {
        Some("is empty")
    } else if name.bytes().any(|b| b.is_ascii_uppercase()) {
        Some("holds upper-case letters")
    } else if !name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.')) {
        Some("holds a character that is not allowed")
    } else if !name.split('.').all(ends_well) {
        Some("has a part that does not begin and end with a letter or a digit")
    } else {
        None
    }
}

fn ends_well(text: &str) -> bool {
    let sound = |b: Option<&u8>| b.is_some_and(u8::is_ascii_alphanumeric);
    sound(text.as_bytes().first()) && sound(text.as_bytes().last())
}

fn dns_part(raw: &str) -> String {
    tidy(&raw.to_ascii_lowercase(), |c| c.is_ascii_alphanumeric() || c == '-')
}

/// Turns every run of characters that are not allowed into one `-` (into nothing where a `-`, `_` or `.`
/// stands beside it), and trims the ends to a letter or a digit.
fn tidy(raw: &str, allowed: impl Fn(char) -> bool) -> String {
    let mut out = String::with_capacity(raw.len());
    let mut gap = false;
    for c in raw.chars() {
        if !allowed(c) {
            gap = true;
            continue;
        }
        if gap && c.is_ascii_alphanumeric() && out.ends_with(|l: char| l.is_ascii_alphanumeric()) {
            out.push('-');
        }
        gap = false;
        out.push(c);
    }
    out.trim_matches(|c: char| !c.is_ascii_alphanumeric()).to_owned()
}

/// Cuts an ASCII text to `room` bytes, its last nine a `-` and a hash of `whole`. A text that fits is left alone.
fn shorten(text: &str, whole: &str, room: usize) -> String {
    if text.len() <= room {
        return text.to_owned();
    }
    let head: String = text.chars().take(room.saturating_sub(HASH_LEN + 1)).collect();
    let head = head.trim_end_matches(|c: char| !c.is_ascii_alphanumeric());
    format!("{head}-{:08x}", stable_hash(whole))
}

/// 32-bit FNV-1a. std's hasher is seeded anew in each process and may change with Rust; a name must not.
fn stable_hash(text: &str) -> u32 {
    text.bytes().fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn name(site: &str, job: Option<&str>, restart: u32, host: &str) -> String {
        node_name(&NameParts { site, job, restart, host, task: None })
    }

    #[test]
    fn label_values_of_batch_systems_become_valid() {
        for (raw, want) in [
            ("gpu&hbm80g", "gpu-hbm80g"),
            ("45[3].pbshost", "45-3.pbshost"),
            ("45[3]", "45-3"),
            ("4711", "4711"),
            ("mylin", "mylin"),
            ("a_b.c-D", "a_b.c-D"),
            ("", ""),
            ("[]", ""),
            ("-x-", "x"),
            ("(haswell|knl)&ssd", "haswell-knl-ssd"),
            ("größe", "gr-e"),
        ] {
            assert_eq!(label_value(raw), want, "{raw:?}");
        }
    }

    #[test]
    fn a_long_label_value_is_cut_and_stays_distinct() {
        let a = label_value(&"x".repeat(64));
        let b = label_value(&"x".repeat(65));
        assert_eq!(a.len(), 63);
        assert_ne!(a, b);
        assert_eq!(label_value(&"x".repeat(63)), "x".repeat(63));
    }

    #[test]
    fn node_names_are_dns_labels() {
        assert_eq!(name("mylin", Some("4711"), 0, "nid001.site.gov"), "mylin-4711-nid001");
        assert_eq!(name("mylin", Some("4711"), 2, "nid001"), "mylin-4711-nid001-r2");
        assert_eq!(name("My_Site", Some("45[3].pbshost"), 0, "Node1"), "my-site-45-3-pbshost-node1");
        assert_eq!(name("lab", None, 0, "host"), "lab-host");
        assert_eq!(name("", None, 0, ""), "pilot");
        let parts = NameParts { site: "s", job: Some("1"), restart: 1, host: "h", task: Some(3) };
        assert_eq!(node_name(&parts), "s-1-h-3-r1");
    }

    #[test]
    fn a_cut_node_name_differs_by_host_and_by_requeue() {
        let site = "a-very-long-site-name-indeed-that-somebody-thought-of";
        let names = [
            name(site, Some("123456789"), 0, "nid000001"),
            name(site, Some("123456789"), 0, "nid000002"),
            name(site, Some("123456789"), 1, "nid000001"),
            name(site, Some("123456789"), 11, "nid000001"),
        ];
        for (i, n) in names.iter().enumerate() {
            assert_eq!(check_node_name(n), Ok(()));
            assert!(names[..i].iter().all(|o| o != n), "{n} twice");
        }
        assert!(names[3].ends_with("-r11"));
    }

    #[test]
    fn the_hash_is_stable() {
        assert_eq!(stable_hash(""), 0x811c_9dc5);
        assert_eq!(stable_hash("a"), 0xe40c_292c);
        assert_eq!(stable_hash("foobar"), 0xbf9c_f968);
    }

    #[test]
    fn wrong_node_names_are_named() {
        for bad in ["", "Upper", "under_score", "-x", "x-", "a..b", "a.-b", &"x".repeat(64), "a b", "ä"] {
            let text = check_node_name(bad).unwrap_err().to_string();
            assert!(text.contains(&format!("{bad:?}")) && text.contains("NODENAME"), "{text}");
        }
        for good in ["a", "a.b", "mylin-4711-nid1", &"x".repeat(63)] {
            assert_eq!(check_node_name(good), Ok(()));
        }
    }

    #[test]
    fn namespaces_are_dns_labels() {
        for good in ["a", "kube-system", "4u", &"x".repeat(63)] {
            assert_eq!(check_namespace(good), Ok(()));
        }
        for bad in ["", " b", "Work", "a_b", "a.b", "-a", "a-", &"x".repeat(64)] {
            let text = check_namespace(bad).unwrap_err().to_string();
            assert!(text.contains(&format!("{bad:?}")), "{text}");
        }
    }

    #[test]
    fn labels_are_checked_as_the_api_server_does() {
        for (key, value) in [("a", ""), ("x.y/Z_1", "V.1"), ("jiriaf.site", "mylin")] {
            assert_eq!(check_label(key, value), Ok(()));
        }
        for (key, value) in [
            ("", "v"),
            ("/a", "v"),
            ("a/", "v"),
            ("a/b/c", "v"),
            ("Up/a", "v"),
            ("a", "v v"),
            ("a", "-v"),
            ("_a", "v"),
        ] {
            assert!(check_label(key, value).is_err(), "{key}={value}");
        }
        assert!(check_label("a", &"v".repeat(64)).is_err());
    }

    proptest! {
        #[test]
        fn any_text_becomes_a_valid_label_value(raw in any::<String>()) {
            let value = label_value(&raw);
            prop_assert_eq!(check_label("k", &value), Ok(()));
            prop_assert_eq!(label_value(&value), value);
        }

        #[test]
        fn a_valid_label_value_is_left_alone(value in "[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?") {
            prop_assert_eq!(label_value(&value), value);
        }

        #[test]
        fn any_parts_make_a_valid_node_name(
            site in any::<String>(), job in any::<Option<String>>(), restart in any::<u32>(),
            host in any::<String>(), task in any::<Option<u32>>(),
        ) {
            let made = node_name(&NameParts { site: &site, job: job.as_deref(), restart, host: &host, task });
            prop_assert_eq!(check_node_name(&made), Ok(()));
            prop_assert!(!made.contains('.'));
        }
    }
}
