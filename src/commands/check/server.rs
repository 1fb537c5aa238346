//! The way to the API server, step by step, so that the step that fails is known: name, port, TLS, an answer; then the
//! clock, the rights, and whether the Node's name is free.

use std::net::SocketAddr;
use std::time::{Duration, SystemTime};

use k8s_openapi::api::authentication::v1::SelfSubjectReview;
use k8s_openapi::api::core::v1::Node;
use kube::api::{GetParams, PostParams};
use kube::client::Body;
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::finding::Finding;
use super::{clock, rights};
use crate::cluster::{Kube, causes};
use crate::node::object::INSTANCE;

/// Longest wait for a name: a resolver tries two servers for 5 s each by default (resolv.conf(5)).
const NAME_LIMIT: Duration = Duration::from_secs(12);

/// Longest wait for one address' port.
const PORT_LIMIT: Duration = Duration::from_secs(5);

/// Addresses that are tried.
const ADDRESSES: usize = 4;

/// Longest wait for one answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);

/// Longest wait for a client: a kubeconfig's credential program may ask somebody.
const CLIENT_LIMIT: Duration = Duration::from_secs(30);

/// What the credential is for.
#[derive(Debug, Clone, Copy)]
pub enum Wanted<'a> {
    /// All that a pilot does, in these namespaces.
    Pilot {
        /// `--namespaces`.
        namespaces: &'a [String],
    },
    /// To get a node's own certificate by TLS bootstrap.
    Certificate,
}

/// All of it; what comes after a failed step is not looked at, and a line says so.
pub async fn look(kube: &Kube, node: &str, wanted: Wanted<'_>) -> Vec<Finding> {
    let mut findings = Vec::new();
    let client = match reach(kube, &mut findings).await {
        Ok(client) => client,
        Err(finding) => {
            findings.push(finding);
            findings.push(Finding::warn("rights", "not looked at, for want of the API server", ""));
            return findings;
        }
    };
    let namespaces = match wanted {
        Wanted::Pilot { namespaces } => namespaces,
        Wanted::Certificate => {
            identity(&client, node, &mut findings).await;
            let answers = rights::ask(&client, rights::bootstrap()).await;
            findings.extend(rights::judge_needed(&answers, false));
            return findings;
        }
    };
    let is_node = identity(&client, node, &mut findings).await;
    let answers = rights::ask(&client, rights::needed(node, namespaces)).await;
    findings.extend(rights::judge_needed(&answers, is_node));
    let answers = rights::ask(&client, rights::excessive()).await;
    findings.extend(rights::judge_excessive(&answers));
    findings.push(name_is_free(&client, node).await);
    findings
}

async fn reach(kube: &Kube, findings: &mut Vec<Finding>) -> Result<kube::Client, Finding> {
    port(kube, findings).await?;
    let client = client(kube).await?;
    answer(kube, &client, findings).await?;
    Ok(client)
}

/// Host and port that are really connected to: a proxy's where there is one.
fn first_hop(kube: &Kube) -> (String, u16, &'static str) {
    if let Some(via) = kube.via() {
        return (via.ip().to_string(), via.port(), "way to the API server");
    }
    match &kube.config.proxy_url {
        Some(proxy) => {
            let default = if proxy.scheme_str() == Some("https") { 443 } else { 80 };
            (proxy.host().unwrap_or_default().to_owned(), proxy.port_u16().unwrap_or(default), "proxy")
        }
        None => {
            let (host, port) = kube.host_port();
            (host, port, "API server")
        }
    }
}

async fn port(kube: &Kube, findings: &mut Vec<Finding>) -> Result<(), Finding> {
    let (host, port, thing) = first_hop(kube);
    let resolver = "check the name in the kubeconfig, and /etc/resolv.conf and /etc/hosts of this host";
    let found = match timeout(NAME_LIMIT, tokio::net::lookup_host((host.as_str(), port))).await {
        Ok(Ok(found)) => found.take(ADDRESSES).collect::<Vec<SocketAddr>>(),
        Ok(Err(error)) => {
            return Err(Finding::fail(
                thing,
                format!("the name {host} is not known here: {error}"),
                resolver,
            ));
        }
        Err(_) => {
            let value = format!("the name {host} was not found within {} s", NAME_LIMIT.as_secs());
            return Err(Finding::fail(thing, value, resolver));
        }
    };
    let mut problem = "it has no address".to_owned();
    for address in found {
        problem = match timeout(PORT_LIMIT, TcpStream::connect(address)).await {
            Ok(Ok(_)) => {
                findings.push(Finding::ok(thing, format!("{host} takes connections at {address}")));
                return Ok(());
            }
            Ok(Err(error)) => format!("{address}: {error}"),
            Err(_) => format!("{address}: no answer within {} s, as by a firewall", PORT_LIMIT.as_secs()),
        };
    }
    let mend = "is it up? else ask the site to let this host connect there; compute nodes may need a proxy-url in the \
                kubeconfig";
    Err(Finding::fail(thing, problem, mend))
}

async fn client(kube: &Kube) -> Result<kube::Client, Finding> {
    let of = kube.clone();
    // A credential program is waited for without any limit in there.
    let made = timeout(CLIENT_LIMIT, tokio::task::spawn_blocking(move || of.client())).await;
    match made {
        Ok(Ok(Ok(client))) => Ok(client),
        Ok(Ok(Err(error))) => Err(Finding::fail("credential", error.to_string(), "")),
        Ok(Err(error)) => Err(Finding::fail("credential", error.to_string(), "")),
        Err(_) => Err(Finding::fail(
            "credential",
            format!("the kubeconfig's credential program gave no answer within {} s", CLIENT_LIMIT.as_secs()),
            "use a kubeconfig with a token: nobody can answer a question in a batch job",
        )),
    }
}

async fn answer(kube: &Kube, client: &kube::Client, findings: &mut Vec<Finding>) -> Result<(), Finding> {
    let wrong = |error: &dyn std::error::Error| {
        let text = causes(error);
        let mend = if text.to_lowercase().contains("certificate") {
            "the kubeconfig's certificate-authority-data must be the cluster's, and the server's name in its certificate"
        } else {
            "is this an API server, and is it up? look at its /readyz"
        };
        Finding::fail("API server", format!("{}: {text}", kube.url()), mend)
    };
    let request = kube::core::Request::new("").get("version", &GetParams::default());
    let request = request.map_err(|error| wrong(&error))?.map(Body::from);
    let sent = SystemTime::now();
    let response = timeout(ANSWER_LIMIT, client.send(request)).await;
    let received = SystemTime::now();
    let response = match response {
        Ok(response) => response.map_err(|error| wrong(&error))?,
        Err(_) => {
            let value = format!("{}: no answer within {} s", kube.url(), ANSWER_LIMIT.as_secs());
            return Err(Finding::fail("API server", value, "is it overloaded? look at its /readyz"));
        }
    };
    let status = response.status().as_u16();
    let date = response.headers().get("date").and_then(|date| date.to_str().ok()).and_then(clock::parse_date);
    let clock = match date {
        Some(date) => clock::judge(clock::skew(sent, received, date)),
        None => Finding::warn("clock", "the API server's answers name no time", "compare the clocks by hand"),
    };
    match status {
        200..=299 => {}
        401 | 403 => {
            findings.push(clock);
            let value = format!("{} refuses the credential of {} (HTTP {status})", kube.url(), kube.source);
            return Err(Finding::fail("credential", value, "get a new one; docs/cluster/ says how"));
        }
        _ => {
            let value = format!("{} answers HTTP {status}", kube.url());
            return Err(Finding::fail("API server", value, "is this an API server? look at its /readyz"));
        }
    }
    let version = match timeout(ANSWER_LIMIT, client.apiserver_version()).await {
        Ok(Ok(version)) => version.git_version,
        Ok(Err(error)) => return Err(wrong(&error)),
        Err(_) => "an unknown version".to_owned(),
    };
    let took = received.duration_since(sent).unwrap_or_default().as_millis();
    findings.push(Finding::ok("API server", format!("answers as {version}, the first time in {took} ms")));
    findings.push(clock);
    Ok(())
}

/// Who the API server takes us for; whether that is a node's identity.
async fn identity(client: &kube::Client, node: &str, findings: &mut Vec<Finding>) -> bool {
    let reviews: kube::Api<SelfSubjectReview> = kube::Api::all(client.clone());
    let (params, review) = (PostParams::default(), SelfSubjectReview::default());
    let answer = timeout(ANSWER_LIMIT, reviews.create(&params, &review)).await;
    // Who may not ask (an API server before 1.28 has no such review) loses nothing but this line.
    let Some(user) = answer.ok().and_then(Result::ok).and_then(|r| r.status).and_then(|s| s.user_info) else {
        return false;
    };
    let name = user.username.unwrap_or_default();
    let is_node = user.groups.unwrap_or_default().iter().any(|group| group == "system:nodes");
    let own = format!("system:node:{node}");
    findings.push(if is_node && name != own {
        Finding::fail(
            "credential",
            format!("is that of {name}, which may be no Node but its own"),
            format!(
                "set --node-name (NODENAME) to match, or use the credential of {own} or a ServiceAccount's"
            ),
        )
    } else {
        Finding::ok("credential", format!("is that of {name}"))
    });
    is_node
}

async fn name_is_free(client: &kube::Client, name: &str) -> Finding {
    let nodes: kube::Api<Node> = kube::Api::all(client.clone());
    let mend = "choose another name with --node-name (NODENAME)";
    match timeout(ANSWER_LIMIT, nodes.get_opt(name)).await {
        Ok(Ok(None)) => Finding::ok("node name", format!("{name} is free")),
        Ok(Ok(Some(found))) => {
            if !found.metadata.annotations.unwrap_or_default().contains_key(INSTANCE) {
                return Finding::fail("node name", format!("{name} is a Node that no pilot made"), mend);
            }
            let job = found.metadata.labels.unwrap_or_default().remove("jiriaf.jobid");
            let job = job.map_or_else(String::new, |job| format!(" of job {job}"));
            let value = format!("{name} is the Node of a pilot{job} that lives or was killed");
            Finding::warn("node name", value, format!("if it lives, {mend}; else it is taken over"))
        }
        Ok(Err(error)) => Finding::warn("node name", format!("{name}: {}", causes(&error)), ""),
        Err(_) => {
            Finding::warn("node name", format!("{name}: no answer within {} s", ANSWER_LIMIT.as_secs()), "")
        }
    }
}
