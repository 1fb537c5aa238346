//! Fields that want namespaces of the containers' own, or none.

use k8s_openapi::api::core::v1::{Pod, PodSpec};

use super::{Rejection, rejected};
use crate::pod::isolation::{ANNOTATION, Choice, Isolation, Mode};
use crate::pod::network::wants_resolv_conf;

/// Refuses what would be left out silently by the isolation that the pod gets.
pub(super) fn check(pod: &Pod, spec: &PodSpec, isolation: &Isolation) -> Result<(), Rejection> {
    let isolated = isolation.choose(pod.metadata.annotations.as_ref()) == Choice::Isolated;
    let (field, problem) = match field(spec, isolated) {
        None => return Ok(()),
        Some(field) if isolated => {
            (field, "wants to see the processes of others, and each container here sees its own alone")
        }
        Some(field) => (field, "wants containers with namespaces of their own, which this pod's do not have"),
    };
    let mend = match (isolated, isolation.mode, &isolation.problem) {
        (true, Mode::Annotation, _) => format!("take the annotation {ANNOTATION}: namespaces from the pod"),
        (true, ..) => "run the pod on a node whose pilot has no --isolation=namespaces".to_owned(),
        (false, _, Some(problem)) => {
            format!("run the pod on another node, since this host does not permit them ({problem})")
        }
        (false, Mode::Annotation, None) => format!("give the pod the annotation {ANNOTATION}: namespaces"),
        (false, ..) => format!(
            "start the pilot with --isolation=namespaces, or with --isolation=annotation and give the pod the annotation \
             {ANNOTATION}: namespaces"
        ),
    };
    rejected("UnsupportedPodSpec", format!("{field} {problem}: leave it out, or {mend}"))
}

fn field(spec: &PodSpec, isolated: bool) -> Option<&'static str> {
    let is = |value: Option<bool>| value == Some(true);
    let fields = if isolated {
        [
            (is(spec.host_pid), "spec.hostPID"),
            (is(spec.share_process_namespace), "spec.shareProcessNamespace"),
        ]
    } else {
        let has_aliases = spec.host_aliases.as_ref().is_some_and(|aliases| !aliases.is_empty());
        let dns =
            if spec.dns_policy.as_deref() == Some("None") { "spec.dnsPolicy None" } else { "spec.dnsConfig" };
        [(has_aliases, "spec.hostAliases"), (wants_resolv_conf(spec), dns)]
    };
    fields.into_iter().find_map(|(asked, field)| asked.then_some(field))
}
