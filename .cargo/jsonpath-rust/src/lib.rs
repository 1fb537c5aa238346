//! Stands in for the crate of this name in kube's dependencies (`[patch.crates-io]` in Cargo.toml).
//!
//! kube reads with it where an `auth-provider` of a kubeconfig (`token-key`, `expiry-key`) says that a token is in the
//! output of a command: a path of plain names, `$.credential.access_token`. For that the whole engine, with the parser
//! generator and the regular expressions that it needs, would be a twentieth of the binary and of the pilot's memory.

use std::fmt;

use serde_json::Value;

/// A path that is more than names.
#[derive(Debug)]
pub struct PathError(String);

impl fmt::Display for PathError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "JSON path {:?}: only names are understood, as in $.credential.access_token", self.0)
    }
}

impl std::error::Error for PathError {}

/// Values that are found by a path.
pub trait JsonPath {
    /// The value at `path`, if there is one.
    ///
    /// # Errors
    /// When the path is more than names between dots.
    fn query(&self, path: &str) -> Result<Vec<&Self>, PathError>;
}

impl JsonPath for Value {
    fn query(&self, path: &str) -> Result<Vec<&Self>, PathError> {
        let names = path.strip_prefix('$').unwrap_or(path);
        let mut found = Some(self);
        for name in names.split('.').skip(1) {
            if name.is_empty() || name.contains(['[', ']', '*', '?', '\'', '"']) {
                return Err(PathError(path.to_owned()));
            }
            found = found.and_then(|value| value.get(name));
        }
        Ok(found.into_iter().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn names_lead_to_values_and_nothing_else_is_guessed() {
        let value = json!({"credential": {"access_token": "t"}});
        assert_eq!(value.query("$.credential.access_token").unwrap(), [&json!("t")]);
        assert_eq!(value.query(".credential.access_token").unwrap(), [&json!("t")]);
        assert!(value.query("$.credential.none").unwrap().is_empty());
        for bad in ["$..access_token", "$.credential[0]", "$.*"] {
            assert!(value.query(bad).unwrap_err().to_string().contains(bad));
        }
    }
}
