//! A pod's resolv.conf (pkg/kubelet/network/dns/dns.go). All policies but `None` are as `Default`, which is what a kubelet
//! without a cluster DNS makes of `ClusterFirst`, and of every pod on the host's network.

use k8s_openapi::api::core::v1::{PodDNSConfigOption, PodSpec};

use super::SUBDOMAIN_MAX;

/// The host's own, and where a container's appears.
pub const RESOLV_CONF: &str = "/etc/resolv.conf";

/// glibc's limit (pkg/apis/core/validation/validation.go, `MaxDNSNameservers`).
const NAMESERVERS_MAX: usize = 3;

/// Search domains (validation.go, `MaxDNSSearchPaths`).
const SEARCHES_MAX: usize = 32;

/// Their characters, with blanks between them (validation.go, `MaxDNSSearchListChars`).
const SEARCH_CHARS_MAX: usize = 2048;

/// The lists of a resolv.conf.
#[derive(Debug, Default, PartialEq, Eq)]
struct Config {
    nameservers: Vec<String>,
    searches: Vec<String>,
    /// `name` or `name:value`.
    options: Vec<String>,
}

/// Whether the pod has a say in its resolv.conf; else the host's own stays.
#[must_use]
pub fn is_wanted(spec: &PodSpec) -> bool {
    let says = spec.dns_config.as_ref().is_some_and(|config| {
        let lists = [&config.nameservers, &config.searches];
        lists.into_iter().flatten().any(|list| !list.is_empty())
            || config.options.as_ref().is_some_and(|options| !options.is_empty())
    });
    says || has_none(spec)
}

fn has_none(spec: &PodSpec) -> bool {
    spec.dns_policy.as_deref() == Some("None")
}

/// The file's text, and what was left out of it. `host` is the host's.
pub(super) fn resolv_conf(spec: &PodSpec, host: &str) -> (String, Vec<String>) {
    let mut made = if has_none(spec) { Config::default() } else { parse(host) };
    if let Some(config) = &spec.dns_config {
        append(&mut made.nameservers, config.nameservers.as_deref());
        append(&mut made.searches, config.searches.as_deref());
        for option in config.options.iter().flatten() {
            set_option(&mut made.options, option_text(option));
        }
    }
    let notes = fit(&mut made);
    (text(&made), notes)
}

/// Reads the host's (`parseResolvConf`): nameservers accumulate, the last `search` and the last of each option win.
fn parse(text: &str) -> Config {
    let mut found = Config::default();
    for line in text.lines().map(str::trim).filter(|line| !line.starts_with('#')) {
        let mut words = line.split_whitespace();
        match words.next() {
            Some("nameserver") => found.nameservers.extend(words.next().map(str::to_owned)),
            Some("search") => {
                let plain = words.filter(|word| *word != ".");
                found.searches =
                    plain.map(|word| word.strip_suffix('.').unwrap_or(word).to_owned()).collect();
            }
            Some("options") => words.for_each(|word| set_option(&mut found.options, word.to_owned())),
            _ => {}
        }
    }
    found
}

/// Adds what is not there yet (`appendDNSConfig`, `omitDuplicates`).
fn append(list: &mut Vec<String>, more: Option<&[String]>) {
    let all = std::mem::take(list).into_iter().chain(more.into_iter().flatten().cloned());
    for text in all {
        if !list.contains(&text) {
            list.push(text);
        }
    }
}

/// The later one of a name wins, in the earlier one's place (`mergeDNSOptions`, which has no order).
fn set_option(options: &mut Vec<String>, option: String) {
    fn name(option: &str) -> &str {
        option.split(':').next().unwrap_or_default()
    }
    match options.iter_mut().find(|old| name(old) == name(&option)) {
        Some(old) => *old = option,
        None => options.push(option),
    }
}

fn option_text(option: &PodDNSConfigOption) -> String {
    let name = option.name.clone().unwrap_or_default();
    match option.value.as_deref() {
        Some(value) if !value.is_empty() => format!("{name}:{value}"),
        _ => name,
    }
}

/// Leaves out what resolvers do not take (`formDNSConfigFitsLimits`), and says so in kubelet's words.
fn fit(made: &mut Config) -> Vec<String> {
    let mut notes = Vec::new();
    if made.nameservers.len() > NAMESERVERS_MAX {
        made.nameservers.truncate(NAMESERVERS_MAX);
        notes.push(format!(
            "Nameserver limits were exceeded, some nameservers have been omitted, the applied nameserver line is: {}",
            made.nameservers.join(" ")
        ));
    }
    let before = made.searches.len();
    made.searches.truncate(SEARCHES_MAX);
    // glibc 2.28 aborts at a longer one.
    made.searches.retain(|search| search.len() <= SUBDOMAIN_MAX);
    while made.searches.join(" ").len() > SEARCH_CHARS_MAX {
        made.searches.pop();
    }
    if made.searches.len() < before {
        notes.push(format!(
            "Search Line limits were exceeded, some search paths have been omitted, the applied search line is: {}",
            made.searches.join(" ")
        ));
    }
    notes
}

/// As container runtimes write it (containerd, `parseDNSOptions`).
fn text(made: &Config) -> String {
    let mut text = String::new();
    if !made.searches.is_empty() {
        text.push_str(&format!("search {}\n", made.searches.join(" ")));
    }
    for nameserver in &made.nameservers {
        text.push_str(&format!("nameserver {nameserver}\n"));
    }
    if !made.options.is_empty() {
        text.push_str(&format!("options {}\n", made.options.join(" ")));
    }
    text
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, from_value, json};

    use super::*;

    const HOST: &str = "# a comment\nsearch old.org\nnameserver 10.0.0.1 # first\n  nameserver 10.0.0.2\n\
                        search site.org. . lab.site.org\noptions timeout:2 rotate\noptions timeout:3\nnameserver\nsortlist x\n";

    fn spec(mut spec: Value) -> PodSpec {
        spec["containers"] = json!([]);
        from_value(spec).unwrap()
    }

    #[test]
    fn the_pods_lists_come_after_the_hosts_or_stand_alone() {
        let config = json!({"nameservers": ["1.1.1.1", "10.0.0.1"], "searches": ["lab.site.org", "x.org"],
            "options": [{"name": "rotate", "value": "1"}, {"name": "ndots", "value": "2"}, {"name": "edns0"}]});
        let merged = "search site.org lab.site.org x.org\nnameserver 10.0.0.1\nnameserver 10.0.0.2\nnameserver 1.1.1.1\n\
                      options timeout:3 rotate:1 ndots:2 edns0\n";
        for (policy, wanted) in [
            (json!("ClusterFirst"), merged),
            (json!("ClusterFirstWithHostNet"), merged),
            (json!("Default"), merged),
            (json!(null), merged),
            (
                json!("None"),
                "search lab.site.org x.org\nnameserver 1.1.1.1\nnameserver 10.0.0.1\noptions rotate:1 ndots:2 edns0\n",
            ),
        ] {
            let spec = spec(json!({"dnsPolicy": policy, "dnsConfig": config}));
            assert!(is_wanted(&spec));
            assert_eq!(resolv_conf(&spec, HOST), (wanted.to_owned(), vec![]), "{policy}");
        }
        assert_eq!(resolv_conf(&spec(json!({"dnsPolicy": "None"})), HOST), (String::new(), vec![]));
    }

    #[test]
    fn a_pod_that_says_nothing_keeps_the_hosts_file() {
        for (says, wanted) in [
            (json!({}), false),
            (json!({"dnsPolicy": "ClusterFirst"}), false),
            (json!({"dnsPolicy": "Default", "dnsConfig": {}}), false),
            (json!({"dnsConfig": {"searches": [], "nameservers": [], "options": []}}), false),
            (json!({"dnsPolicy": "None"}), true),
            (json!({"dnsConfig": {"nameservers": ["1.1.1.1"]}}), true),
            (json!({"dnsConfig": {"searches": ["x"]}}), true),
            (json!({"dnsConfig": {"options": [{"name": "x"}]}}), true),
        ] {
            assert_eq!(is_wanted(&spec(says.clone())), wanted, "{says}");
        }
    }

    #[test]
    fn what_is_too_much_is_left_out_and_told() {
        let many = |count: usize, length: usize| -> Vec<String> {
            (0..count).map(|n| format!("{n:0>length$}")).collect()
        };
        for (nameservers, searches, kept, told) in [
            (many(3, 7), many(32, 20), (3, 32), &[][..]),
            (many(4, 7), many(33, 20), (3, 32), &["Nameserver limits", "Search Line limits"]),
            (vec![], many(1, 254), (0, 0), &["Search Line limits"]),
            // 10 * 201 - 1 = 2009 characters fit, 11 * 201 - 1 do not.
            (vec![], many(12, 200), (0, 10), &["Search Line limits"]),
        ] {
            let config = json!({"nameservers": nameservers, "searches": searches});
            let (text, notes) = resolv_conf(&spec(json!({"dnsPolicy": "None", "dnsConfig": config})), "");
            let count = |word: &str| text.lines().filter(|line| line.starts_with(word)).count();
            let search = text.lines().find_map(|line| line.strip_prefix("search ")).unwrap_or_default();
            assert_eq!((count("nameserver"), search.split_whitespace().count()), kept, "{text}");
            assert_eq!(notes.len(), told.len());
            assert!(notes.iter().zip(told).all(|(note, word)| note.starts_with(word)), "{notes:?}");
        }
    }
}
