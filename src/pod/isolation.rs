//! Which pods run in namespaces of their own, and what is hidden from them.

use std::collections::BTreeMap;
use std::path::PathBuf;

use k8s_openapi::api::core::v1::Pod;

use super::network::Network;
use crate::container::{View, ViewMount};

/// The annotation by which a pod chooses, where the pilot lets it.
pub const ANNOTATION: &str = "jiriaf.isolation";

/// The event's reason when a pod does not get what it asked for.
pub const REASON: &str = "IsolationUnavailable";

/// The default of `terminationMessagePath` (pkg/apis/core/types.go, `TerminationMessagePathDefault`); the API server
/// fills it in, `play` does not.
const TERMINATION_MESSAGE_PATH: &str = "/dev/termination-log";

/// What `--isolation` says.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Mode {
    /// No pod is isolated.
    #[default]
    None,
    /// All are.
    Namespaces,
    /// Those that ask for it.
    Annotation,
}

/// How this pilot isolates pods.
#[derive(Debug, Clone, Default)]
pub struct Isolation {
    /// What was asked for.
    pub mode: Mode,
    /// Why this host does not permit it, where it does not.
    pub problem: Option<String>,
    /// Directories that an isolated pod does not see.
    pub hidden: Vec<PathBuf>,
}

/// What a pod gets.
#[derive(Debug, PartialEq, Eq)]
pub enum Choice {
    /// It runs as the pilot does.
    Plain,
    /// It has namespaces of its own.
    Isolated,
    /// It runs as the pilot does, although it asked for something else; told in an event.
    Instead(String),
}

impl Isolation {
    /// Whether pods' files are stored where they can be hidden: those of pods that are not isolated too.
    #[must_use]
    pub fn stores(&self) -> bool {
        self.mode != Mode::None && self.problem.is_none()
    }

    /// What a pod with these annotations gets.
    #[must_use]
    pub fn choose(&self, annotations: Option<&BTreeMap<String, String>>) -> Choice {
        let asked = annotations.and_then(|all| all.get(ANNOTATION)).map(String::as_str);
        let wanted = match (self.mode, asked) {
            // The pilot's log has said why all of them are not.
            (Mode::Namespaces, _) if self.problem.is_some() => asked == Some("namespaces"),
            (Mode::Namespaces, _) => return Choice::Isolated,
            (_, None | Some("none")) => return Choice::Plain,
            (_, Some("namespaces")) => true,
            (_, Some(other)) => {
                return Choice::Instead(format!(
                    "the annotation {ANNOTATION} is {other:?}: \"namespaces\" or \"none\" is wanted; the pod runs without \
                     isolation"
                ));
            }
        };
        match (&self.problem, self.mode) {
            _ if !wanted => Choice::Plain,
            (_, Mode::None) => Choice::Instead(format!(
                "the pod asks for {ANNOTATION}=namespaces, which this pilot does not allow (--isolation annotation): it runs \
                 without isolation"
            )),
            (Some(problem), _) => Choice::Instead(format!(
                "the pod asks for {ANNOTATION}=namespaces, which this host does not permit ({problem}): it runs without \
                 isolation"
            )),
            (None, _) => Choice::Isolated,
        }
    }

    /// Whether this pod has namespaces of its own.
    #[must_use]
    pub fn isolates(&self, pod: &Pod) -> bool {
        self.choose(pod.metadata.annotations.as_ref()) == Choice::Isolated
    }

    /// What a container of an isolated pod sees. `shown` is what it keeps of what is hidden: its pod's own part.
    #[must_use]
    pub fn view(
        &self,
        mounts: Vec<ViewMount>,
        shown: Vec<PathBuf>,
        message_path: Option<&str>,
        network: &Network,
    ) -> View {
        let path = message_path.filter(|path| !path.is_empty()).unwrap_or(TERMINATION_MESSAGE_PATH);
        View {
            hostname: network.hostname.clone(),
            files: network.files_beside(mounts.iter().map(|mount| mount.target.as_path())),
            mounts,
            hidden: self.hidden.clone(),
            shown,
            // One that is relative lies in the container's directory anyway.
            termination_log: Some(PathBuf::from(path)).filter(|path| path.is_absolute()),
            ids: None,
            owner: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_gets_what_the_pilot_allows_and_the_host_permits() {
        let isolation = |mode, problem: Option<&str>| Isolation {
            mode,
            problem: problem.map(str::to_owned),
            hidden: Vec::new(),
        };
        // mode, problem, annotation; isolated, and a word of the event.
        let table = [
            (Mode::None, None, None, false, ""),
            (Mode::None, None, Some("none"), false, ""),
            (Mode::None, None, Some("namespaces"), false, "does not allow"),
            (Mode::Annotation, None, None, false, ""),
            (Mode::Annotation, None, Some("none"), false, ""),
            (Mode::Annotation, None, Some("namespaces"), true, ""),
            (Mode::Annotation, None, Some("all"), false, "\"all\""),
            (Mode::Annotation, Some("EPERM"), Some("namespaces"), false, "EPERM"),
            (Mode::Annotation, Some("EPERM"), None, false, ""),
            (Mode::Namespaces, None, None, true, ""),
            (Mode::Namespaces, None, Some("none"), true, ""),
            (Mode::Namespaces, Some("EPERM"), None, false, ""),
            (Mode::Namespaces, Some("EPERM"), Some("namespaces"), false, "EPERM"),
        ];
        for (mode, problem, asked, isolated, word) in table {
            let annotations = asked.map(|asked| [(ANNOTATION.to_owned(), asked.to_owned())].into());
            let got = isolation(mode, problem).choose(annotations.as_ref());
            let right = match &got {
                Choice::Plain => !isolated && word.is_empty(),
                Choice::Isolated => isolated,
                Choice::Instead(text) => !isolated && !word.is_empty() && text.contains(word),
            };
            assert!(right, "{mode:?} {problem:?} {asked:?}: {got:?}");
        }
        assert!(isolation(Mode::Annotation, None).stores());
        assert!(!isolation(Mode::Namespaces, Some("EPERM")).stores());
        assert!(!isolation(Mode::None, None).stores());
    }

    #[test]
    fn the_termination_message_has_kubernetes_default_place() {
        let network = Network { hostname: None, files: Vec::new(), notes: Vec::new() };
        let view = |path| Isolation::default().view(Vec::new(), Vec::new(), path, &network).termination_log;
        assert_eq!(view(None), Some("/dev/termination-log".into()));
        assert_eq!(view(Some("/tmp/x")), Some("/tmp/x".into()));
        assert_eq!(view(Some("x")), None);
    }
}
