//! What an isolated container takes for its host's name, and its /etc/hosts and /etc/resolv.conf, as a kubelet gives them.
//!
//! [`network`] decides for a pod; the container's view (`container::isolation`) carries it out. All pods have the host's
//! network, so the host's own entries stay in /etc/hosts: a kubelet's come first.

mod dns;

use std::path::{Path, PathBuf};

use k8s_openapi::api::core::v1::{HostAlias, Pod, PodSpec};

pub use self::dns::{RESOLV_CONF, is_wanted as wants_resolv_conf};
use crate::container::ViewFile;

/// Where a kubelet manages hosts (pkg/kubelet/kubelet_pods.go, `etcHostsPath`).
const HOSTS: &str = "/etc/hosts";

/// Names of the files in a container's directory, which are the pilot's there. The first is a kubelet's own
/// (kubelet_pods.go, `getEtcHostsPath`).
pub const FILES: [&str; 2] = ["etc-hosts", "etc-resolv.conf"];

/// What a kubelet's `clusterDomain` mostly is, and kubeadm's default: nothing tells a pilot its cluster's.
const CLUSTER_DOMAIN: &str = "cluster.local";

/// The longest hostname (kubelet_pods.go, `truncatePodHostnameIfNeeded`).
const HOSTNAME_MAX: usize = 63;

/// The longest that the kernel takes (pkg/kubelet/util/util.go, `GetNodenameForKernel`).
const FQDN_MAX: usize = 64;

/// The longest DNS name (apimachinery validation.go, `DNS1123SubdomainMaxLength`).
const SUBDOMAIN_MAX: usize = 253;

/// What the isolated containers of a pod get.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Network {
    /// The host's name as they see it, where that is not the host's own.
    pub hostname: Option<String>,
    /// /etc/hosts, and /etc/resolv.conf where the pod has a say in it.
    pub files: Vec<ViewFile>,
    /// What was left out, for events with the reason [`Network::REASON`].
    pub notes: Vec<String>,
}

impl Network {
    /// The reason of the events (pkg/kubelet/network/dns/dns.go).
    pub const REASON: &'static str = "DNSConfigForming";

    /// The files of a container that mounts volumes at these places: what it mounts itself stays.
    pub fn files_beside<'a>(&self, targets: impl Iterator<Item = &'a Path>) -> Vec<ViewFile> {
        let targets: Vec<&Path> = targets.collect();
        self.files.iter().filter(|file| !targets.contains(&file.target.as_path())).cloned().collect()
    }
}

/// Why a pod has no hostname. Only another Pod mends it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HostnameError {
    /// With its domain it is longer than the kernel takes.
    #[error(
        "failed to construct FQDN from pod hostname and cluster domain, FQDN {fqdn} is too long ({FQDN_MAX} characters is the \
         max, {} characters requested): give the pod a shorter spec.hostname or spec.subdomain, or leave setHostnameAsFQDN out",
        fqdn.len()
    )]
    Long {
        /// The whole name.
        fqdn: String,
    },
    /// A field that no API server lets through.
    #[error(
        "pod {field} {value:?} is not a valid DNS name: lower case letters, digits and '-' are wanted, a letter or digit first and last"
    )]
    Invalid {
        /// Which one.
        field: &'static str,
        /// What it is.
        value: String,
    },
}

/// What the isolated containers of a pod get. `ips` are the pod's addresses, `resolv_conf` is the host's.
///
/// # Errors
/// When the pod's hostname cannot be one.
pub fn network(pod: &Pod, ips: &[String], resolv_conf: &str) -> Result<Network, HostnameError> {
    let none = PodSpec::default();
    let spec = pod.spec.as_ref().unwrap_or(&none);
    let aliases = spec.host_aliases.as_deref().unwrap_or_default();
    let file = |name: &str, target: &str, (head, host, tail)| ViewFile {
        name: name.to_owned(),
        target: PathBuf::from(target),
        head,
        host,
        tail,
    };
    let [hosts, resolv] = FILES;
    let mut found = if spec.host_network == Some(true) {
        let content = node_hosts(aliases);
        Network { hostname: None, files: vec![file(hosts, HOSTS, content)], notes: Vec::new() }
    } else {
        let (name, domain) = hostname(pod, spec)?;
        let kernel = nodename(&name, &domain, spec.set_hostname_as_fqdn == Some(true))?;
        let content = managed_hosts(ips, &name, &domain, aliases);
        Network { hostname: Some(kernel), files: vec![file(hosts, HOSTS, content)], notes: Vec::new() }
    };
    if dns::is_wanted(spec) {
        let (text, notes) = dns::resolv_conf(spec, resolv_conf);
        found.files.push(file(resolv, RESOLV_CONF, (text, false, String::new())));
        found.notes = notes;
    }
    Ok(found)
}

/// A pod's short name and its domain (kubelet_pods.go, `GeneratePodHostNameAndDomain`).
fn hostname(pod: &Pod, spec: &PodSpec) -> Result<(String, String), HostnameError> {
    let given = |text: &Option<String>| text.clone().filter(|text| !text.is_empty());
    let check = |field, value: &str, valid: bool| {
        let invalid = || HostnameError::Invalid { field, value: value.to_owned() };
        if valid { Ok(()) } else { Err(invalid()) }
    };
    if let Some(name) = &spec.hostname_override {
        let valid = name.len() <= SUBDOMAIN_MAX && name.split('.').all(is_label);
        check("hostnameOverride", name, valid)?;
        return Ok((truncated(name), String::new()));
    }
    let name = given(&spec.hostname);
    if let Some(name) = &name {
        check("hostname", name, is_label(name))?;
    }
    let name = name.or_else(|| pod.metadata.name.clone()).unwrap_or_default();
    let domain = match given(&spec.subdomain) {
        Some(subdomain) => {
            check("subdomain", &subdomain, is_label(&subdomain))?;
            let namespace = pod.metadata.namespace.as_deref().unwrap_or("default");
            format!("{subdomain}.{namespace}.svc.{CLUSTER_DOMAIN}")
        }
        None => String::new(),
    };
    Ok((truncated(&name), domain))
}

/// A part of a DNS name (apimachinery validation.go, `IsDNS1123Label`).
fn is_label(text: &str) -> bool {
    let inner = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let ends = |byte: Option<&u8>| byte.is_some_and(|byte| inner(*byte));
    let bytes = text.as_bytes();
    text.len() <= HOSTNAME_MAX
        && ends(bytes.first())
        && ends(bytes.last())
        && bytes.iter().all(|byte| inner(*byte) || *byte == b'-')
}

/// As `truncatePodHostnameIfNeeded` does it. Names are ASCII: those of pods are the API server's to check.
fn truncated(name: &str) -> String {
    if name.len() <= HOSTNAME_MAX {
        return name.to_owned();
    }
    let most = (0..=HOSTNAME_MAX).rev().find(|end| name.is_char_boundary(*end)).unwrap_or(0);
    name[..most].trim_end_matches(['-', '.']).to_owned()
}

/// What the kernel is told (pkg/kubelet/util/util.go, `GetNodenameForKernel`).
fn nodename(name: &str, domain: &str, as_fqdn: bool) -> Result<String, HostnameError> {
    if domain.is_empty() || !as_fqdn {
        return Ok(name.to_owned());
    }
    let fqdn = format!("{name}.{domain}");
    if fqdn.len() > FQDN_MAX { Err(HostnameError::Long { fqdn }) } else { Ok(fqdn) }
}

/// What comes before the host's own entries, whether these come, and what comes after them.
type Content = (String, bool, String);

/// Of a pod with a name of its own (kubelet_pods.go, `managedHostsFileContent`); the host's entries are ours.
fn managed_hosts(ips: &[String], name: &str, domain: &str, aliases: &[HostAlias]) -> Content {
    let mut text = String::from(
        "# Kubernetes-managed hosts file.\n\
         127.0.0.1\tlocalhost\n\
         ::1\tlocalhost ip6-localhost ip6-loopback\n\
         fe00::0\tip6-localnet\n\
         fe00::0\tip6-mcastprefix\n\
         fe00::1\tip6-allnodes\n\
         fe00::2\tip6-allrouters\n",
    );
    for ip in ips {
        let full = if domain.is_empty() { String::new() } else { format!("{name}.{domain}\t") };
        text.push_str(&format!("{ip}\t{full}{name}\n"));
    }
    text.push_str(&of_aliases(aliases));
    text.push_str("\n# Entries of the host.\n");
    (text, true, String::new())
}

/// Of a pod with `hostNetwork` (kubelet_pods.go, `nodeHostsFileContent`).
fn node_hosts(aliases: &[HostAlias]) -> Content {
    ("# Kubernetes-managed hosts file (host network).\n".to_owned(), true, of_aliases(aliases))
}

fn of_aliases(aliases: &[HostAlias]) -> String {
    if aliases.is_empty() {
        return String::new();
    }
    let mut text = String::from("\n# Entries added by HostAliases.\n");
    for alias in aliases {
        let names = alias.hostnames.as_deref().unwrap_or_default().join("\t");
        text.push_str(&format!("{}\t{names}\n", alias.ip));
    }
    text
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, from_value, json};

    use super::*;

    fn pod(name: &str, spec: Value) -> Pod {
        let mut spec = spec;
        spec["containers"] = json!([]);
        from_value(json!({"metadata": {"name": name, "namespace": "ns"}, "spec": spec})).unwrap()
    }

    fn made(name: &str, spec: Value) -> Result<Network, HostnameError> {
        network(&pod(name, spec), &["10.0.0.7".to_owned(), "fd00::7".to_owned()], "nameserver 1.2.3.4\n")
    }

    #[test]
    fn a_pod_has_the_hostname_that_a_kubelet_gives_it() {
        let long = format!("{}-.{}", "a".repeat(61), "b".repeat(20));
        let table = [
            ("p", json!({}), Some("p"), "\tp\n"),
            ("p", json!({"hostname": "h"}), Some("h"), "\th\n"),
            ("p", json!({"hostname": ""}), Some("p"), "\tp\n"),
            ("p", json!({"subdomain": "s"}), Some("p"), "\tp.s.ns.svc.cluster.local\tp\n"),
            (
                "p",
                json!({"hostname": "h", "subdomain": "s", "setHostnameAsFQDN": true}),
                Some("h.s.ns.svc.cluster.local"),
                "\th.s.ns.svc.cluster.local\th\n",
            ),
            ("p", json!({"setHostnameAsFQDN": true}), Some("p"), "\tp\n"),
            (
                "p",
                json!({"hostnameOverride": "o.x", "hostname": "h", "subdomain": "s"}),
                Some("o.x"),
                "\to.x\n",
            ),
            // 63 characters, and then no hyphen or dot at the end.
            (&long, json!({}), Some(&long[..61]), &format!("\t{}\n", &long[..61])),
            ("p", json!({"hostNetwork": true, "hostname": "h"}), None, "(host network).\n"),
        ];
        for (name, spec, hostname, line) in table {
            let made = made(name, spec.clone()).unwrap();
            assert_eq!(made.hostname.as_deref(), hostname, "{spec}");
            let hosts = &made.files[0].head;
            assert!(hosts.contains(line), "{spec}: {hosts}");
            let has_ips =
                hosts.contains(&format!("10.0.0.7{line}")) && hosts.contains(&format!("fd00::7{line}"));
            assert_eq!(has_ips, hostname.is_some(), "{spec}: {hosts}");
            assert_eq!(made.files.len(), 1, "{spec}: no file for names");
        }
    }

    #[test]
    fn what_can_be_no_hostname_is_told() {
        // With "h." before and ".ns.svc.cluster.local" after it.
        let as_fqdn = |length: usize| json!({"hostname": "h", "subdomain": "s".repeat(length - 23), "setHostnameAsFQDN": true});
        let longest = made("p", as_fqdn(64)).unwrap().hostname;
        assert_eq!(longest.map(|name| name.len()), Some(64));
        let table = [
            (as_fqdn(65), ["is too long", "65 characters requested"]),
            (json!({"hostname": "a.b"}), ["hostname", "\"a.b\""]),
            (json!({"hostname": "a\nb"}), ["hostname", "not a valid"]),
            (json!({"hostname": "-a"}), ["hostname", "\"-a\""]),
            (json!({"subdomain": "A"}), ["subdomain", "\"A\""]),
            (json!({"hostnameOverride": "a..b"}), ["hostnameOverride", "\"a..b\""]),
        ];
        for (spec, wanted) in table {
            let error = made("p", spec.clone()).unwrap_err().to_string();
            assert!(wanted.iter().all(|word| error.contains(word)), "{spec}: {error}");
        }
        // Nothing is made of them where the host's name stays.
        assert!(made("p", json!({"hostNetwork": true, "subdomain": "A"})).is_ok());
    }

    #[test]
    fn hosts_are_a_kubelets_and_then_the_hosts_own() {
        let aliases = json!([{"ip": "123.45.67.89", "hostnames": ["foo", "bar"]}, {"ip": "fd00::1", "hostnames": ["x"]}]);
        let entries = "\n# Entries added by HostAliases.\n123.45.67.89\tfoo\tbar\nfd00::1\tx\n";
        let own = &made("p", json!({"hostAliases": aliases})).unwrap().files[0];
        let wanted = format!(
            "# Kubernetes-managed hosts file.\n127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n\
             fe00::0\tip6-localnet\nfe00::0\tip6-mcastprefix\nfe00::1\tip6-allnodes\nfe00::2\tip6-allrouters\n\
             10.0.0.7\tp\nfd00::7\tp\n{entries}\n# Entries of the host.\n"
        );
        assert_eq!((own.head.as_str(), own.host, own.tail.as_str()), (wanted.as_str(), true, ""));
        assert_eq!((own.name.as_str(), own.target.as_path()), ("etc-hosts", Path::new("/etc/hosts")));
        let hosts = &made("p", json!({"hostAliases": aliases, "hostNetwork": true})).unwrap().files[0];
        let wanted = ("# Kubernetes-managed hosts file (host network).\n", true, entries);
        assert_eq!((hosts.head.as_str(), hosts.host, hosts.tail.as_str()), wanted);
    }

    #[test]
    fn what_a_container_mounts_itself_stays() {
        let made = made("p", json!({"dnsConfig": {"searches": ["x.org"]}})).unwrap();
        let names = |targets: &[&str]| -> Vec<String> {
            made.files_beside(targets.iter().map(Path::new)).into_iter().map(|file| file.name).collect()
        };
        assert_eq!(names(&["/etc", "/etc/hosts-original"]), FILES);
        assert_eq!(names(&["/etc/hosts"]), FILES[1..]);
        assert_eq!(names(&["/etc/resolv.conf/"]), FILES[..1]);
        assert_eq!(made.files[1].head, "search x.org\nnameserver 1.2.3.4\n");
    }
}
