//! What the credential may do: too little, and too much.
//!
//! Asked by SelfSubjectAccessReview, which every authenticated user may make (the ClusterRole system:basic-user).

use std::time::Duration;

use futures::StreamExt;
use k8s_openapi::api::authorization::v1::{
    FieldSelectorAttributes, ResourceAttributes, SelfSubjectAccessReview, SelfSubjectAccessReviewSpec,
};
use kube::api::PostParams;

use super::finding::{Finding, Verdict};
use crate::pod::services::MOST_WATCHES;

/// Longest wait for one review.
const LIMIT: Duration = Duration::from_secs(10);

/// Reviews at once: an API server gives a user few seats in its queues (API Priority and Fairness).
const AT_ONCE: usize = 8;

/// Namespaces that are asked about: each costs five reviews.
const NAMESPACES: usize = 50;

/// One right.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Right {
    verb: &'static str,
    group: &'static str,
    resource: &'static str,
    subresource: &'static str,
    /// Empty: everywhere.
    namespace: String,
    /// The Node's own name, where a node's identity is allowed no other.
    name: Option<String>,
    /// The pods of this Node alone, as the pilot asks for them.
    selector: Option<String>,
    /// What its lack means.
    lack: Verdict,
    /// What cannot be done without it.
    without: &'static str,
    /// The way out.
    mend: &'static str,
}

const GRANT: &str = "grant it as docs/cluster/ does";

/// Where nobody has said in which namespaces the work will be.
const GRANT_OR_NAME: &str =
    "bind the Role of docs/cluster/ in each workload namespace; name those with --namespaces to look at them";

impl Right {
    fn new(verb: &'static str, group: &'static str, resource: &'static str) -> Self {
        let (resource, subresource) = resource.split_once('/').unwrap_or((resource, ""));
        Self {
            verb,
            group,
            resource,
            subresource,
            namespace: String::new(),
            name: None,
            selector: None,
            lack: Verdict::Fail,
            without: "",
            mend: GRANT,
        }
    }

    fn without(mut self, lack: Verdict, without: &'static str) -> Self {
        (self.lack, self.without) = (lack, without);
        self
    }

    fn within(mut self, namespace: &str) -> Self {
        namespace.clone_into(&mut self.namespace);
        self
    }

    fn named(mut self, name: &str) -> Self {
        self.name = Some(name.to_owned());
        self
    }

    /// `get configmaps in default`.
    fn text(&self) -> String {
        let slash = if self.subresource.is_empty() { "" } else { "/" };
        let dot = if self.group.is_empty() || self.group == "*" { "" } else { "." };
        let group = if self.group == "*" { "" } else { self.group };
        let place = if self.namespace.is_empty() {
            " (cluster-wide)".to_owned()
        } else {
            format!(" in namespace {}", self.namespace)
        };
        format!("{} {}{dot}{group}{slash}{}{place}", self.verb, self.resource, self.subresource)
    }

    fn review(&self) -> SelfSubjectAccessReview {
        let filled = |text: &str| (!text.is_empty()).then(|| text.to_owned());
        let attributes = ResourceAttributes {
            verb: Some(self.verb.to_owned()),
            group: Some(self.group.to_owned()),
            resource: Some(self.resource.to_owned()),
            subresource: filled(self.subresource),
            namespace: filled(&self.namespace),
            name: self.name.clone(),
            field_selector: self
                .selector
                .clone()
                .map(|raw| FieldSelectorAttributes { raw_selector: Some(raw), requirements: None }),
            ..ResourceAttributes::default()
        };
        SelfSubjectAccessReview {
            spec: SelfSubjectAccessReviewSpec {
                resource_attributes: Some(attributes),
                ..SelfSubjectAccessReviewSpec::default()
            },
            ..SelfSubjectAccessReview::default()
        }
    }
}

/// What a pilot asks of the API server. `namespaces` is `--namespaces`; without it the workload's namespaces are not
/// known, and `default` stands for them.
pub fn needed(node: &str, namespaces: &[String]) -> Vec<Right> {
    let node_right = |verb, resource, without| Right::new(verb, "", resource).without(Verdict::Fail, without);
    let mut rights = vec![
        node_right("create", "nodes", "the Node cannot be registered"),
        node_right("get", "nodes", "a Node of this name cannot be taken up").named(node),
        node_right("patch", "nodes", "labels and cordon cannot be set").named(node),
        node_right("delete", "nodes", "the Node stays behind at the end").named(node),
        node_right("watch", "nodes", "a Node that somebody deletes is not noticed").named(node),
        node_right("patch", "nodes/status", "the Node never becomes Ready").named(node),
    ];
    if let Some(watch) = rights.iter_mut().find(|right| right.verb == "watch") {
        watch.selector = Some(format!("metadata.name={node}"));
        watch.name = None;
    }
    for verb in ["create", "get", "update", "delete"] {
        let right = Right::new(verb, "coordination.k8s.io", "leases").within(crate::node::lease::NAMESPACE);
        let right = right.without(Verdict::Fail, "the Node shows no sign of life");
        rights.push(if verb == "create" { right } else { right.named(node) });
    }
    for verb in ["list", "watch"] {
        let mut right = Right::new(verb, "", "pods").without(Verdict::Fail, "pods are not seen");
        right.selector = Some(format!("spec.nodeName={node}"));
        rights.push(right);
    }
    for (verb, resource, without) in [
        ("get", "pods", "pods cannot be looked at again"),
        ("patch", "pods/status", "no pod's status can be reported"),
        ("delete", "pods", "deleted pods stay Terminating"),
    ] {
        rights.push(Right::new(verb, "", resource).without(Verdict::Fail, without));
    }
    for group in ["", "events.k8s.io"] {
        let right = Right::new("create", group, "events");
        rights.push(right.without(Verdict::Warn, "kubectl describe says less"));
    }
    for (group, resource, without) in [
        (
            "authentication.k8s.io",
            "tokenreviews",
            "the Node's API knows nobody by a token: no metrics-server, no Prometheus",
        ),
        (
            "authorization.k8s.io",
            "subjectaccessreviews",
            "the Node's API answers nobody: no kubectl logs, exec, top",
        ),
    ] {
        rights.push(Right::new("create", group, resource).without(Verdict::Warn, without));
    }
    rights.extend(services(namespaces));
    let assumed = ["default".to_owned()];
    let (namespaces, lack, mend) = if namespaces.is_empty() {
        (&assumed[..], Verdict::Warn, GRANT_OR_NAME)
    } else {
        (namespaces, Verdict::Fail, GRANT)
    };
    for namespace in namespaces.iter().take(NAMESPACES) {
        let within = |verb, resource| Right { mend, ..Right::new(verb, "", resource).within(namespace) };
        rights.push(within("get", "configmaps").without(lack, "pods there get no scripts"));
        rights.push(
            within("get", "secrets").without(Verdict::Warn, "pods there that use a Secret do not start"),
        );
        for resource in ["configmaps", "secrets"] {
            rights.push(within("watch", resource).without(
                Verdict::Warn,
                "changes reach the volumes of running pods there within a minute, not at once",
            ));
        }
        rights.push(
            within("create", "serviceaccounts/token")
                .without(Verdict::Warn, "pods there get no service account token"),
        );
    }
    rights
}

/// What the watches of Services want ([`crate::pod::services`]).
fn services(namespaces: &[String]) -> Vec<Right> {
    let right = |verb| {
        Right::new(verb, "", "services").without(Verdict::Warn, "containers get no variables for Services")
    };
    let verbs = ["list", "watch"].into_iter();
    if namespaces.is_empty() || namespaces.len() > MOST_WATCHES {
        return verbs.map(right).collect();
    }
    let everywhere = !namespaces.iter().any(|name| name == "default");
    let api_server = |verb| everywhere.then(|| right(verb).within("default").named("kubernetes"));
    verbs
        .flat_map(|verb| namespaces.iter().map(move |name| right(verb).within(name)).chain(api_server(verb)))
        .collect()
}

/// What a bootstrap token is for.
pub fn bootstrap() -> Vec<Right> {
    let group = "certificates.k8s.io";
    let mend = "grant it as docs/cluster/tls-bootstrap.yaml does";
    let right = |verb, resource| Right { mend, ..Right::new(verb, group, resource) };
    vec![
        right("create", "certificatesigningrequests")
            .without(Verdict::Fail, "no certificate can be asked for"),
        right("get", "certificatesigningrequests").without(Verdict::Fail, "the certificate cannot be taken"),
        right("create", "certificatesigningrequests/nodeclient")
            .without(Verdict::Warn, "somebody has to approve each pilot's request"),
    ]
}

/// What no pilot should have: every pod of a pilot can read what the pilot can.
pub fn excessive() -> Vec<Right> {
    let dangerous = |verb, resource| {
        Right::new(verb, "", resource)
            .without(Verdict::Warn, "as good as cluster-admin for every pod that runs here")
    };
    vec![
        Right::new("*", "*", "*").without(Verdict::Warn, "cluster-admin for every pod that runs here"),
        dangerous("get", "secrets"),
        dangerous("list", "secrets"),
        dangerous("create", "serviceaccounts/token"),
    ]
}

/// Asks about each right, a few at a time; answers in the same order.
pub async fn ask(client: &kube::Client, rights: Vec<Right>) -> Vec<(Right, Result<bool, String>)> {
    let reviews: kube::Api<SelfSubjectAccessReview> = kube::Api::all(client.clone());
    let reviews = &reviews;
    futures::stream::iter(rights)
        .map(|right| async move {
            let params = PostParams::default();
            let review = right.review();
            let answer = match tokio::time::timeout(LIMIT, reviews.create(&params, &review)).await {
                Ok(Ok(review)) => Ok(review.status.is_some_and(|status| status.allowed)),
                Ok(Err(error)) => Err(crate::cluster::causes(&error)),
                Err(_) => Err(format!("no answer within {} s", LIMIT.as_secs())),
            };
            (right, answer)
        })
        .buffered(AT_ONCE)
        .collect()
        .await
}

/// What is missing. A node's identity (the group system:nodes) is allowed objects of its own pods one by one, which no
/// review without their names can tell: what it seems to lack below namespaces is no more than a warning.
pub fn judge_needed(answers: &[(Right, Result<bool, String>)], is_node: bool) -> Vec<Finding> {
    let mut findings = unasked(answers);
    let denied = answers.iter().filter(|(_, answer)| *answer == Ok(false));
    for (right, _) in denied {
        let per_object = is_node && right.resource != "nodes" && right.name.is_none();
        let left_behind = is_node && right.resource == "nodes" && right.verb == "delete";
        let (verdict, mend) = if per_object {
            (Verdict::Warn, "a node's identity is allowed this for its own pods alone; see docs/cluster/")
        } else if left_behind {
            (Verdict::Warn, "no node's identity may; let docs/cluster/sweeper.yaml remove such Nodes")
        } else {
            (right.lack, right.mend)
        };
        findings.push(Finding {
            verdict,
            thing: "rights",
            value: format!("may not {}: {}", right.text(), right.without),
            mend: mend.to_owned(),
        });
    }
    if findings.is_empty() {
        findings.push(Finding::ok("rights", format!("all {} that a pilot needs", answers.len())));
    }
    findings
}

/// What is too much.
pub fn judge_excessive(answers: &[(Right, Result<bool, String>)]) -> Vec<Finding> {
    let mut findings = unasked(answers);
    let allowed: Vec<&Right> =
        answers.iter().filter(|(_, answer)| *answer == Ok(true)).map(|(right, _)| right).collect();
    // Who may do everything may do the rest of the list too.
    let everything = allowed.iter().position(|right| right.verb == "*");
    let shown = everything.map_or(&allowed[..], |at| &allowed[at..=at]);
    for right in shown {
        findings.push(Finding::warn(
            "rights",
            format!("may {}: {}", right.text(), right.without),
            "use a ServiceAccount with the rights of docs/cluster/, Secrets and tokens by Role in each workload namespace",
        ));
    }
    if findings.is_empty() {
        findings.push(Finding::ok("rights", "none that would be too much"));
    }
    findings
}

/// Reviews that failed: the first stands for all, they fail alike.
fn unasked(answers: &[(Right, Result<bool, String>)]) -> Vec<Finding> {
    let mut failed = answers.iter().filter_map(|(right, answer)| Some((right, answer.as_ref().err()?)));
    let Some((right, error)) = failed.next() else { return Vec::new() };
    let others = failed.count();
    vec![Finding::warn(
        "rights",
        format!("{} (and {others} more) cannot be asked about: {error}", right.text()),
        "let the credential create selfsubjectaccessreviews (the ClusterRole system:basic-user)",
    )]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answered(rights: Vec<Right>, allowed: impl Fn(&Right) -> bool) -> Vec<(Right, Result<bool, String>)> {
        rights.into_iter().map(|right| (right.clone(), Ok(allowed(&right)))).collect()
    }

    #[test]
    fn what_a_pilot_needs_is_in_the_way_when_it_lacks() {
        let rights = needed("n1", &[]);
        let all = judge_needed(&answered(rights.clone(), |_| true), false);
        assert_eq!(all.len(), 1);
        assert_eq!(all[0].verdict, Verdict::Ok);
        let none = judge_needed(&answered(rights.clone(), |right| right.resource != "nodes"), false);
        assert_eq!(none.len(), 6);
        assert!(none.iter().all(|finding| finding.verdict == Verdict::Fail));
        let events = judge_needed(&answered(rights, |right| right.resource != "events"), false);
        assert!(events.iter().all(|finding| finding.verdict == Verdict::Warn));
    }

    #[test]
    fn a_namespace_that_is_named_must_give_its_scripts() {
        let lack = |namespaces: &[String]| {
            let answers = answered(needed("n1", namespaces), |right| right.resource != "configmaps");
            judge_needed(&answers, false)
        };
        assert_eq!(lack(&[])[0].verdict, Verdict::Warn);
        let named = lack(&["a".to_owned(), "b".to_owned()]);
        let failed: Vec<_> = named.iter().filter(|finding| finding.verdict == Verdict::Fail).collect();
        assert_eq!((named.len(), failed.len()), (4, 2));
        assert!(failed[1].value.contains("get configmaps in namespace b"), "{}", failed[1].value);
        assert!(named[1].value.contains("watch configmaps in namespace a"), "{}", named[1].value);
    }

    #[test]
    fn services_are_wanted_where_they_are_watched() {
        let lack = |namespaces: &[&str]| -> Vec<String> {
            let namespaces: Vec<String> = namespaces.iter().map(|name| (*name).to_owned()).collect();
            let answers = answered(needed("n1", &namespaces), |right| right.resource != "services");
            let findings = judge_needed(&answers, false);
            assert!(findings.iter().all(|finding| finding.verdict == Verdict::Warn));
            findings
                .into_iter()
                .filter_map(|finding| Some(finding.value.split_once(": ")?.0.to_owned()))
                .collect()
        };
        assert_eq!(
            lack(&[]),
            ["may not list services (cluster-wide)", "may not watch services (cluster-wide)"]
        );
        assert_eq!(
            lack(&["a"])[..2],
            ["may not list services in namespace a", "may not list services in namespace default"]
        );
        assert_eq!(lack(&["default"]).len(), 2);
        assert_eq!(
            lack(&["1", "2", "3", "4", "5", "6", "7", "8", "9"])[0],
            "may not list services (cluster-wide)"
        );
    }

    #[test]
    fn a_nodes_identity_is_allowed_objects_one_by_one() {
        let answers = answered(needed("n1", &["a".to_owned()]), |right| right.resource != "configmaps");
        assert_eq!(judge_needed(&answers, true)[0].verdict, Verdict::Warn);
        let answers =
            answered(needed("n1", &[]), |right| right.verb != "delete" || right.resource != "nodes");
        let left = judge_needed(&answers, true);
        assert!(left[0].verdict == Verdict::Warn && left[0].mend.contains("sweeper"), "{}", left[0].mend);
        assert_eq!(judge_needed(&answers, false)[0].verdict, Verdict::Fail);
    }

    #[test]
    fn a_bootstrap_token_needs_no_more_than_certificates() {
        let nobody_approves =
            judge_needed(&answered(bootstrap(), |right| right.subresource.is_empty()), false);
        assert_eq!((nobody_approves.len(), nobody_approves[0].verdict), (1, Verdict::Warn));
        let none = judge_needed(&answered(bootstrap(), |_| false), false);
        assert_eq!(none[0].verdict, Verdict::Fail);
        assert!(none[0].mend.contains("tls-bootstrap.yaml"));
    }

    #[test]
    fn too_much_is_said_once() {
        let admin = judge_excessive(&answered(excessive(), |_| true));
        assert_eq!(admin.len(), 1);
        assert!(admin[0].value.contains("cluster-admin"));
        let secrets = judge_excessive(&answered(excessive(), |right| right.resource == "secrets"));
        assert_eq!(secrets.len(), 2);
        assert!(secrets[0].value.contains("get secrets (cluster-wide)"), "{}", secrets[0].value);
        assert_eq!(judge_excessive(&answered(excessive(), |_| false))[0].verdict, Verdict::Ok);
    }

    #[test]
    fn a_review_that_failed_is_no_denial() {
        let answers: Vec<_> =
            needed("n1", &[]).into_iter().map(|right| (right, Err("down".to_owned()))).collect();
        let findings = judge_needed(&answers, false);
        assert_eq!(findings.len(), 1);
        assert_eq!(findings[0].verdict, Verdict::Warn);
    }
}
