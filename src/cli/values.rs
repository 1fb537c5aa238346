//! The values of flags and variables that stand for more than a text or a number, each read by a function of its own.
//!
//! What the API server would refuse is refused here, by its own rules: nothing is registered then. Blanks around a value
//! do not count, since lists in variables are written `a, b` too.

use std::fmt;
use std::time::Duration;

use crate::allocation::duration::{Walltime, parse_walltime};
use crate::drain;
use crate::node::labels::{LabelError, check_key, check_label, check_namespace};
use crate::pod::backoff;

/// A taint as written on the command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Taint {
    /// The taint's key.
    pub key: String,
    /// Its value, where there is one.
    pub value: Option<String>,
    /// NoSchedule, PreferNoSchedule or NoExecute.
    pub effect: String,
}

impl fmt::Display for Taint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.value {
            Some(value) => write!(f, "{}={value}:{}", self.key, self.effect),
            None => write!(f, "{}:{}", self.key, self.effect),
        }
    }
}

/// What is wrong with a value.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum ValueError {
    /// No key, or no `=` behind it.
    #[error("KEY=VALUE is wanted")]
    Pair,
    /// No taint.
    #[error("KEY[=VALUE]:EFFECT is wanted, EFFECT being NoSchedule, PreferNoSchedule or NoExecute")]
    Taint,
    /// No IP address.
    #[error("an IP address is wanted, such as 10.1.2.3")]
    Address,
    /// No variable's name.
    #[error("the name of an environment variable is wanted, without a value")]
    Variable,
    /// A key, a value or a name that the API server would refuse.
    #[error("{0}")]
    Label(#[from] LabelError),
}

/// `--log`.
pub(super) fn parse_log(text: &str) -> Result<String, String> {
    match text.parse::<tracing_subscriber::filter::Targets>() {
        Ok(_) => Ok(text.to_owned()),
        Err(error) => Err(format!("{error}; wanted: error, warn, info or debug")),
    }
}

pub(super) fn parse_duration(text: &str) -> Result<Duration, String> {
    match parse_walltime(text) {
        Ok(Walltime::Limit(duration)) => Ok(duration),
        Ok(Walltime::Zero) => Ok(Duration::ZERO),
        Err(error) => Err(error.to_string()),
    }
}

/// `--drain-before`.
pub(super) fn parse_drain(text: &str) -> Result<Duration, String> {
    let why = "containers are to end within it, and to be reported";
    at_least(text, drain::LEAST_DRAIN, why)
}

/// `--signal-lead`.
pub(super) fn parse_lead(text: &str) -> Result<Duration, String> {
    at_least(text, drain::LEAST_DRAIN, "it is all the time that the drain has")
}

/// `--kill-wait`.
pub(super) fn parse_kill_wait(text: &str) -> Result<Duration, String> {
    let why = "containers are to end within it, and to be reported";
    at_least(text, drain::LEAST_KILL_WAIT, why)
}

/// kubelet's own bounds (apis/config/validation, maxContainerRestartPeriod).
pub(super) fn parse_back_off(text: &str) -> Result<Duration, String> {
    let value = parse_duration(text)?;
    if value < Duration::from_secs(1) || value > backoff::LONGEST {
        return Err("from 1 s to 5 min are wanted, as of a kubelet".to_owned());
    }
    Ok(value)
}

fn at_least(text: &str, least: Duration, why: &str) -> Result<Duration, String> {
    let value = parse_duration(text)?;
    if value < least {
        return Err(format!("at least {} s are wanted: {why}", least.as_secs()));
    }
    Ok(value)
}

pub(super) fn parse_address(text: &str) -> Result<String, ValueError> {
    text.trim().parse::<std::net::IpAddr>().map(|ip| ip.to_string()).map_err(|_| ValueError::Address)
}

pub(super) fn parse_label(text: &str) -> Result<(String, String), ValueError> {
    let (key, value) = pair(text)?;
    check_label(&key, &value)?;
    Ok((key, value))
}

pub(super) fn parse_annotation(text: &str) -> Result<(String, String), ValueError> {
    let (key, value) = pair(text)?;
    // The API server looks at an annotation's key in lower case (apimachinery's ValidateAnnotations).
    check_key(&key.to_ascii_lowercase())?;
    Ok((key, value))
}

fn pair(text: &str) -> Result<(String, String), ValueError> {
    match text.split_once('=') {
        Some((key, value)) if !key.trim().is_empty() => Ok((key.trim().to_owned(), value.trim().to_owned())),
        _ => Err(ValueError::Pair),
    }
}

/// A taint's key and value have a label's form (validateNodeTaints, pkg/apis/core/validation).
pub(super) fn parse_taint(text: &str) -> Result<Taint, ValueError> {
    let (head, effect) = text.trim().rsplit_once(':').ok_or(ValueError::Taint)?;
    if !matches!(effect, "NoSchedule" | "PreferNoSchedule" | "NoExecute") || head.is_empty() {
        return Err(ValueError::Taint);
    }
    let (key, value) = head.split_once('=').map_or((head, None), |(key, value)| (key, Some(value)));
    check_label(key, value.unwrap_or_default())?;
    Ok(Taint { key: key.to_owned(), value: value.map(str::to_owned), effect: effect.to_owned() })
}

pub(super) fn parse_namespace(text: &str) -> Result<String, ValueError> {
    let name = text.trim();
    check_namespace(name)?;
    Ok(name.to_owned())
}

pub(super) fn parse_variable(text: &str) -> Result<String, ValueError> {
    let name = text.trim();
    if name.is_empty() || name.contains('=') { Err(ValueError::Variable) } else { Ok(name.to_owned()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn taints_are_read_as_kubectl_writes_them() {
        let taint = parse_taint("virtual-kubelet.io/provider=mock:NoSchedule").unwrap();
        assert_eq!(taint.key, "virtual-kubelet.io/provider");
        assert_eq!(taint.value.as_deref(), Some("mock"));
        assert_eq!(taint.effect, "NoSchedule");
        assert_eq!(parse_taint("a:NoExecute").unwrap().value, None);
        for text in ["virtual-kubelet.io/provider=mock:NoSchedule", "a:NoExecute", "a=:NoExecute"] {
            assert_eq!(parse_taint(text).unwrap().to_string(), text);
        }
        for bad in
            ["", ":NoSchedule", "a=b", "a=b:Never", "=b:NoSchedule", "a b:NoSchedule", "a=b c:NoSchedule"]
        {
            assert!(parse_taint(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_time_in_which_no_drain_can_be_done_is_refused() {
        let least = [(parse_drain as fn(&str) -> _, 5), (parse_lead, 5), (parse_kill_wait, 3)];
        for (parse, seconds) in least {
            assert_eq!(parse(&seconds.to_string()), Ok(Duration::from_secs(seconds)));
            for bad in ["0", "1s", &format!("{}s", seconds - 1)] {
                let error: Result<Duration, String> = parse(bad);
                assert!(
                    error.as_ref().is_err_and(|text| text.contains(&format!("{seconds} s"))),
                    "{error:?}"
                );
            }
        }
        assert_eq!(parse_duration("0"), Ok(Duration::ZERO));
        assert_eq!([parse_back_off("1"), parse_back_off("5m")], [1, 300].map(|s| Ok(Duration::from_secs(s))));
        assert!(parse_back_off("0").is_err() && parse_back_off("301").is_err());
    }

    #[test]
    fn what_the_api_server_would_refuse_is_refused_and_the_wanted_form_named() {
        for (error, words) in [
            (parse_label("a b=c").unwrap_err(), ["\"a b\"", "[prefix/]name"]),
            (parse_label("a=b c").unwrap_err(), ["\"b c\"", "at most 63 bytes"]),
            (parse_label("a").unwrap_err(), ["KEY=VALUE", "wanted"]),
            (parse_label(" =b").unwrap_err(), ["KEY=VALUE", "wanted"]),
            (parse_annotation("a b=any words").unwrap_err(), ["\"a b\"", "[prefix/]name"]),
            (parse_namespace("Work").unwrap_err(), ["\"Work\"", "lower-case"]),
            (parse_namespace("").unwrap_err(), ["is empty", "lower-case"]),
            (parse_namespace("a.b").unwrap_err(), ["\"a.b\"", "lower-case"]),
            (parse_variable("A=b").unwrap_err(), ["name", "without a value"]),
            (parse_variable(" ").unwrap_err(), ["name", "without a value"]),
            (parse_address("here").unwrap_err(), ["IP address", "10.1.2.3"]),
        ] {
            let text = error.to_string();
            assert!(words.iter().all(|word| text.contains(word)), "{text}");
        }
        // Kubernetes takes these.
        assert!(parse_annotation("Example.org/Owner=Ada Lovelace, room 3").is_ok());
        assert!(parse_label("Example.org/owner=ada").is_err());
        assert!(parse_label("a=").is_ok());
    }
}
