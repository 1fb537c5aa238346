//! References to variables in `command`, `args` and `env`: Kubernetes' `$(NAME)`, and what JIRIAF's pods
//! expect besides (`~/x`, `$NAME`, `${NAME}`).
//!
//! One pass from left to right; what a reference was replaced by is not looked at again. So `$$HOME` is
//! `$HOME`, by either set of rules.

/// Which references are replaced.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Expand {
    /// `$(NAME)`, and a leading `~` or `~/`, `$NAME` and `${NAME}` where NAME is set.
    #[default]
    Jiriaf,
    /// `$(NAME)` alone.
    Kubernetes,
}

/// The longest string that an expansion may make: Linux takes no longer argument or variable
/// (`MAX_ARG_STRLEN`, 32 pages). Without a limit thirty variables, each twice the one before, fill any memory.
pub const MOST_BYTES: usize = 128 * 1024;

/// An expansion that grew out of bounds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "with its variables replaced it is longer than {MOST_BYTES} bytes, more than Linux takes: put the text in a file"
)]
pub struct TooLong;

/// Where the values of references come from.
pub struct Values<'a> {
    /// What `$(NAME)` may name: the container's variables as the Pod declares them.
    pub declared: &'a dyn Fn(&str) -> Option<String>,
    /// What `$NAME` and `${NAME}` may name: the whole environment of the container.
    pub environment: &'a dyn Fn(&str) -> Option<String>,
    /// What a leading `~` stands for.
    pub home: Option<&'a str>,
}

/// Replaces the references in `text`. What names nothing stays as it is written.
///
/// The rules of `$(NAME)` and `$$` are those of kubelet's `third_party/forked/golang/expansion`.
///
/// # Errors
/// When the result is longer than [`MOST_BYTES`].
pub fn expand(text: &str, mode: Expand, values: &Values<'_>) -> Result<String, TooLong> {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    if mode == Expand::Jiriaf
        && let (Some(home), Some(after)) = (values.home, text.strip_prefix('~'))
        && (after.is_empty() || after.starts_with('/'))
    {
        out.push_str(home);
        rest = after;
    }
    while let Some(at) = rest.find('$') {
        out.push_str(&rest[..at]);
        let (value, length) = reference(&rest[at..], mode, values);
        match value {
            Some(value) => out.push_str(&value),
            None => out.push_str(&rest[at..at + length]),
        }
        rest = &rest[at + length..];
        if out.len() > MOST_BYTES {
            return Err(TooLong);
        }
    }
    out.push_str(rest);
    if out.len() > MOST_BYTES { Err(TooLong) } else { Ok(out) }
}

/// What the `$` at the start of `text` stands for, and how many bytes it takes; no value: as written.
fn reference(text: &str, mode: Expand, values: &Values<'_>) -> (Option<String>, usize) {
    let after = &text[1..];
    match after.as_bytes().first() {
        Some(b'$') => (Some("$".to_owned()), 2),
        Some(b'(') => match after.find(')') {
            Some(end) => ((values.declared)(&after[1..end]), end + 2),
            None => (None, 2),
        },
        Some(b'{') if mode == Expand::Jiriaf => {
            let name = name_at(&after[1..]);
            let closed = after[1 + name.len()..].starts_with('}');
            if name.is_empty() || !closed {
                return (None, 1);
            }
            ((values.environment)(name), name.len() + 3)
        }
        Some(_) if mode == Expand::Jiriaf => {
            let name = name_at(after);
            if name.is_empty() { (None, 1) } else { ((values.environment)(name), name.len() + 1) }
        }
        _ => (None, 1),
    }
}

/// The name that `text` begins with, as a shell reads it.
fn name_at(text: &str) -> &str {
    if text.as_bytes().first().is_none_or(u8::is_ascii_digit) {
        return "";
    }
    let end = text.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(text.len());
    &text[..end]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn expanded(text: &str, mode: Expand) -> String {
        let declared = |name: &str| match name {
            "A" => Some("one".to_owned()),
            "REF" => Some("$(A) $HOME ~".to_owned()),
            "EMPTY" => Some(String::new()),
            _ => None,
        };
        let environment = |name: &str| match name {
            "HOME" => Some("/home/u".to_owned()),
            name => declared(name),
        };
        let values = Values { declared: &declared, environment: &environment, home: Some("/home/u") };
        expand(text, mode, &values).expect("short enough")
    }

    #[test]
    fn kubernetes_references_follow_the_kubelet() {
        for (text, wanted) in [
            ("$(A)", "one"),
            ("-$(A)-$(A)-", "-one-one-"),
            ("$(EMPTY)|", "|"),
            ("$(MISSING)", "$(MISSING)"),
            ("$$(A)", "$(A)"),
            ("$$$(A)", "$one"),
            ("$$$$", "$$"),
            ("$(A", "$(A"),
            ("$(A $(A)", "$(A $(A)"),
            ("$()", "$()"),
            ("a$", "a$"),
            ("$", "$"),
            ("$((A))", "$((A))"),
            ("$(REF)", "$(A) $HOME ~"),
            ("a$ä$(A)", "a$äone"),
        ] {
            assert_eq!(expanded(text, Expand::Kubernetes), wanted, "{text}");
            assert_eq!(expanded(text, Expand::Jiriaf), wanted, "{text} under JIRIAF's rules");
        }
    }

    #[test]
    fn jiriaf_replaces_what_is_set_and_leaves_the_rest() {
        for (text, wanted) in [
            ("~", "/home/u"),
            ("~/x", "/home/u/x"),
            ("~x", "~x"),
            ("~root/x", "~root/x"),
            ("/bin:~/bin", "/bin:~/bin"),
            ("a ~/x", "a ~/x"),
            ("$HOME/x", "/home/u/x"),
            ("${HOME}x", "/home/ux"),
            ("$HOMEx", "$HOMEx"),
            ("a$A,b${A}", "aone,bone"),
            ("$MISSING ${MISSING}", "$MISSING ${MISSING}"),
            ("$1 $@ $# $? $* $- $!", "$1 $@ $# $? $* $- $!"),
            ("${A:-d}", "${A:-d}"),
            ("${A", "${A"),
            ("${}", "${}"),
            ("${1}", "${1}"),
            ("$(date)", "$(date)"),
            ("$(echo $A)", "$(echo $A)"),
            ("$$HOME", "$HOME"),
            ("$$", "$"),
            ("`A`", "`A`"),
        ] {
            assert_eq!(expanded(text, Expand::Jiriaf), wanted, "{text}");
        }
    }

    #[test]
    fn kubernetes_mode_leaves_jiriafs_references() {
        for text in ["~", "~/x", "$HOME", "${HOME}", "$A"] {
            assert_eq!(expanded(text, Expand::Kubernetes), text);
        }
    }

    #[test]
    fn without_a_home_a_tilde_stays() {
        let none = |_: &str| None;
        let values = Values { declared: &none, environment: &none, home: None };
        assert_eq!(expand("~/x", Expand::Jiriaf, &values), Ok("~/x".to_owned()));
    }

    #[test]
    fn growth_is_bounded() {
        let long = |_: &str| Some("x".repeat(64 * 1024));
        let values = Values { declared: &long, environment: &long, home: None };
        assert!(expand("$(A)$(A)", Expand::Kubernetes, &values).is_ok());
        assert_eq!(expand("$(A)$(A)$(A)", Expand::Kubernetes, &values), Err(TooLong));
    }

    proptest! {
        #[test]
        fn any_text_is_expanded(text in "[$(){}~A_1ä/ ]{0,30}|.{0,30}") {
            expanded(&text, Expand::Jiriaf);
            expanded(&text, Expand::Kubernetes);
        }

        #[test]
        fn text_without_references_stays(text in "[^$~]{0,40}") {
            prop_assert_eq!(expanded(&text, Expand::Jiriaf), text);
        }
    }
}
