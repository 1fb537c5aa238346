//! What `--tunnel` says: `ssh://[user@]host[:port][?option=value&…]`.
//!
//! Start at [`parse`]. Nothing of it may be taken by ssh for an option or by its configuration for a pattern, so names are
//! of letters, digits and a few signs.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::SystemTime;

use super::Status;

/// One tunnel, as set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// Who logs in there; else as ssh's configuration says.
    pub user: Option<String>,
    /// The login host, or its name in ssh's configuration.
    pub host: String,
    /// The port of its sshd; else as ssh's configuration says.
    pub port: Option<u16>,
    /// The port wanted at the far side for the Node's own; 0: sshd chooses.
    pub remote_port: u16,
    /// The address of the login host at which ports are opened.
    pub bind: String,
    /// Whether the API server is reached through it.
    pub api: bool,
    /// Whether ports that pods declare are forwarded.
    pub pod_ports: bool,
    /// The file of the private key; else as ssh's configuration says.
    pub identity: Option<String>,
    /// The address at which others reach the login host; else that of its name.
    pub address: Option<IpAddr>,
}

impl Settings {
    /// The URL without options.
    #[must_use]
    pub fn name(&self) -> String {
        let user = self.user.as_ref().map_or_else(String::new, |user| format!("{user}@"));
        let host = if self.host.contains(':') { format!("[{}]", self.host) } else { self.host.clone() };
        let port = self.port.map_or_else(String::new, |port| format!(":{port}"));
        format!("ssh://{user}{host}{port}")
    }

    /// How it is before anything was tried.
    pub(super) fn at_first(&self) -> Status {
        Status {
            name: self.name(),
            up: false,
            since: SystemTime::now(),
            far_host: self.host.clone(),
            far_address: self.address.or_else(|| self.host.parse().ok()),
            far_port: None,
            problem: None,
            ports: BTreeMap::new(),
        }
    }
}

/// What is wrong with a tunnel's URL.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum UrlError {
    /// Another scheme, or none.
    #[error("ssh://[user@]host[:port][?option=value&…] is wanted")]
    Scheme,
    /// A password.
    #[error(
        "a password cannot be given; a key without a passphrase, an agent, or host based authentication is wanted"
    )]
    Password,
    /// A user's name that is no good.
    #[error("user {0:?}: letters, digits and . _ - + are wanted, not beginning with -")]
    User(String),
    /// A host's name that is no good.
    #[error("host {0:?}: a host name, an address, or [an IPv6 address] is wanted")]
    Host(String),
    /// A port that is none.
    #[error("port {0:?}: a number from 1 to 65535 is wanted")]
    Port(String),
    /// A path behind the host.
    #[error("nothing but options may follow the host, as in ssh://user@login?remote-port=0; there is {0:?}")]
    Path(String),
    /// An option that does not exist.
    #[error("option {0:?}: there are remote-port, bind, api, ports, identity and address")]
    Unknown(String),
    /// An option given twice.
    #[error("option {0} is given twice")]
    Twice(String),
    /// An option's value.
    #[error("option {name}={value}: {wanted} is wanted")]
    Value {
        /// The option.
        name: &'static str,
        /// What was given.
        value: String,
        /// What is wanted.
        wanted: &'static str,
    },
}

/// Reads one tunnel's URL.
///
/// # Errors
/// Which part is no good, and what is wanted.
pub fn parse(text: &str) -> Result<Settings, UrlError> {
    let rest = text.trim().strip_prefix("ssh://").ok_or(UrlError::Scheme)?;
    let (authority, query) = rest.split_once('?').unwrap_or((rest, ""));
    let (authority, path) = authority.split_at(authority.find('/').unwrap_or(authority.len()));
    if !matches!(path, "" | "/") {
        return Err(UrlError::Path(path.to_owned()));
    }
    let (user, place) = match authority.rsplit_once('@') {
        Some((user, _)) if user.contains(':') => return Err(UrlError::Password),
        Some((user, place)) => (Some(user.to_owned()), place),
        None => (None, authority),
    };
    if let Some(bad) = user.as_ref().filter(|user| !is_name(user, "._-+")) {
        return Err(UrlError::User(bad.clone()));
    }
    let (host, port) = host_port(place)?;
    let mut options = options(query)?;
    let mut take = |name: &'static str| options.remove(name);
    let settings = Settings {
        user,
        host,
        port,
        remote_port: take("remote-port").map_or(Ok(0), |v| {
            v.parse().map_err(|_| {
                wrong("remote-port", &v, "a port of the far side, or 0 for one that sshd chooses,")
            })
        })?,
        bind: take("bind").map_or_else(|| Ok("*".to_owned()), |v| bind(&v))?,
        api: take("api").map_or(Ok(true), |v| match v.as_str() {
            "1" => Ok(true),
            "0" => Ok(false),
            _ => Err(wrong("api", &v, "1 (the API server is reached through the tunnel) or 0")),
        })?,
        pod_ports: take("ports").map_or(Ok(false), |v| match v.as_str() {
            "pods" => Ok(true),
            "node" => Ok(false),
            _ => Err(wrong("ports", &v, "pods (their containerPorts are forwarded too) or node")),
        })?,
        identity: take("identity").map(|v| identity(&v)).transpose()?,
        address: take("address")
            .map(|v| v.parse().map_err(|_| wrong("address", &v, "an IP address")))
            .transpose()?,
    };
    match options.into_keys().next() {
        Some(unknown) => Err(UrlError::Unknown(unknown)),
        None => Ok(settings),
    }
}

fn wrong(name: &'static str, value: &str, wanted: &'static str) -> UrlError {
    UrlError::Value { name, value: value.to_owned(), wanted }
}

/// Letters, digits and `signs`, not beginning with `-`, which ssh would take for an option.
fn is_name(text: &str, signs: &str) -> bool {
    !text.is_empty()
        && !text.starts_with('-')
        && text.len() <= 255
        && text.chars().all(|c| c.is_ascii_alphanumeric() || signs.contains(c))
}

fn host_port(place: &str) -> Result<(String, Option<u16>), UrlError> {
    let bad = || UrlError::Host(place.to_owned());
    let (host, port) = match place.strip_prefix('[') {
        Some(inner) => {
            let (host, after) = inner.split_once(']').ok_or_else(bad)?;
            host.parse::<std::net::Ipv6Addr>().map_err(|_| bad())?;
            let port = match after {
                "" => None,
                _ => Some(after.strip_prefix(':').ok_or_else(bad)?),
            };
            (host, port)
        }
        None => {
            let (host, port) = match place.split_once(':') {
                Some((host, port)) => (host, Some(port)),
                None => (place, None),
            };
            if !is_name(host, "._-") {
                return Err(UrlError::Host(host.to_owned()));
            }
            (host, port)
        }
    };
    let port = port.map(|port| match port.parse() {
        Ok(number) if number != 0 => Ok(number),
        _ => Err(UrlError::Port(port.to_owned())),
    });
    Ok((host.to_owned(), port.transpose()?))
}

fn bind(value: &str) -> Result<String, UrlError> {
    let plain = value.trim_start_matches('[').trim_end_matches(']');
    if value == "*" || plain.parse::<IpAddr>().is_ok() || is_name(value, "._-") {
        return Ok(plain.to_owned());
    }
    Err(wrong("bind", value, "* (every address of the login host), one of its addresses, or localhost"))
}

fn identity(value: &str) -> Result<String, UrlError> {
    let whole = value.starts_with('/') || value.starts_with("~/");
    // ssh replaces %x and splits at blanks and quotes.
    let plain =
        !value.chars().any(|c| matches!(c, '%' | '"' | '\'' | '\\') || c.is_whitespace() || c.is_control());
    if whole && plain {
        return Ok(value.to_owned());
    }
    Err(wrong("identity", value, "the whole path of a private key's file, without blanks, quotes, \\ and %,"))
}

fn options(query: &str) -> Result<BTreeMap<String, String>, UrlError> {
    let mut found = BTreeMap::new();
    for part in query.split('&').filter(|part| !part.is_empty()) {
        let (name, value) = part.split_once('=').unwrap_or((part, ""));
        if found.insert(name.to_owned(), decoded(value)).is_some() {
            return Err(UrlError::Twice(name.to_owned()));
        }
    }
    Ok(found)
}

/// Replaces `%2C` and the like (RFC 3986); what is no such triple stays.
fn decoded(text: &str) -> String {
    percent_encoding::percent_decode_str(text).decode_utf8_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bare_host_is_enough() {
        let got = parse("ssh://login").unwrap();
        let want = Settings {
            user: None,
            host: "login".into(),
            port: None,
            remote_port: 0,
            bind: "*".into(),
            api: true,
            pod_ports: false,
            identity: None,
            address: None,
        };
        assert_eq!(got, want);
        assert_eq!(parse("ssh://login/").unwrap(), want);
        assert_eq!(got.name(), "ssh://login");
    }

    #[test]
    fn every_part_is_read() {
        let url = "ssh://alice@login1.site.org:2222?remote-port=31000&bind=localhost&api=0&ports=pods\
                   &identity=/home/alice/.ssh/a%2Cb&address=198.51.100.7";
        let got = parse(url).unwrap();
        assert_eq!(got.name(), "ssh://alice@login1.site.org:2222");
        assert_eq!(
            (got.remote_port, got.bind.as_str(), got.api, got.pod_ports),
            (31000, "localhost", false, true)
        );
        assert_eq!(got.identity.as_deref(), Some("/home/alice/.ssh/a,b"));
        assert_eq!(got.address, Some([198, 51, 100, 7].into()));
        let six = parse("ssh://[2001:db8::1]:22?bind=::1").unwrap();
        assert_eq!((six.host.as_str(), six.bind.as_str()), ("2001:db8::1", "::1"));
        assert_eq!(six.name(), "ssh://[2001:db8::1]:22");
    }

    #[test]
    fn what_is_wrong_is_named_with_what_is_wanted() {
        for (url, said) in [
            ("login", "ssh://[user@]host"),
            ("http://login", "ssh://[user@]host"),
            ("ssh://", "host \"\""),
            ("ssh://alice:secret@login", "password"),
            ("ssh://-oProxyCommand=x@login", "user"),
            ("ssh://alice@-oProxyCommand=x", "host"),
            ("ssh://a b", "host"),
            ("ssh://login:0", "port \"0\""),
            ("ssh://login:ssh", "port \"ssh\""),
            ("ssh://login:", "port \"\""),
            ("ssh://[::1", "host"),
            ("ssh://[::1]22", "host"),
            ("ssh://login/home", "\"/home\""),
            ("ssh://login?remote-port=70000", "remote-port=70000"),
            ("ssh://login?api=yes", "api=yes"),
            ("ssh://login?ports=all", "ports=all"),
            ("ssh://login?bind=a:1", "bind=a:1"),
            ("ssh://login?identity=key", "identity=key"),
            ("ssh://login?identity=/a%20b", "identity=/a b"),
            ("ssh://login?identity=/a%25h", "identity=/a%h"),
            ("ssh://login?address=login", "address=login"),
            ("ssh://login?colour=red", "colour"),
            ("ssh://login?api=1&api=0", "twice"),
        ] {
            let error = parse(url).unwrap_err().to_string();
            assert!(error.contains(said), "{url}: {error}");
        }
    }

    #[test]
    fn a_password_is_not_repeated() {
        assert!(!parse("ssh://alice:secret@login").unwrap_err().to_string().contains("secret"));
    }

    proptest::proptest! {
        #[test]
        fn any_text_is_read_or_refused(text in ".{0,80}") {
            if let Ok(settings) = parse(&format!("ssh://{text}")) {
                proptest::prop_assert!(!settings.host.starts_with('-') && !settings.host.is_empty());
            }
        }
    }
}
