//! The text of `/metrics/probes`: how the probes of containers went.

use std::sync::Arc;

use super::text::{Quoted, Text};
use crate::pod::roster::PodView;

/// A kubelet's counter (prober_manager.go, ProberResults).
const NAME: &str = "prober_probe_total";

/// The text; a pod is in it for as long as this Node has it.
#[must_use]
pub fn render(pods: &[Arc<PodView>]) -> String {
    let mut text = Text::default();
    text.family(NAME, "counter", "Liveness, readiness and startup probes of containers by result.");
    for view in pods {
        let of = |value: &Option<String>| value.clone().unwrap_or_default();
        let meta = &view.pod.metadata;
        let (namespace, pod, uid) = (of(&meta.namespace), of(&meta.name), of(&meta.uid));
        let (namespace, pod, uid) = (Quoted(&namespace), Quoted(&pod), Quoted(&uid));
        for (name, container) in &view.containers {
            let container_name = Quoted(name);
            for (kind, result, count) in container.probed.counted() {
                text.write(format_args!(
                    "{NAME}{{container={container_name},namespace={namespace},pod={pod},pod_uid={uid},\
                     probe_type=\"{kind}\",result=\"{result}\"}}"
                ));
                text.value(&count, None);
            }
        }
    }
    text.into_string()
}

#[cfg(test)]
mod tests {
    use super::super::text_check;
    use super::*;
    use crate::pod::probe::Tally;
    use crate::pod::roster::ContainerView;
    use crate::pod::status::State;

    #[test]
    fn each_kind_and_result_is_a_sample() {
        let pod = serde_json::json!({"metadata": {"name": "p", "namespace": "n", "uid": "u"}});
        let state = State::Waiting { reason: String::new(), message: String::new() };
        let probed = Arc::new(Tally::example());
        let container = ContainerView { state, last: None, restart: 0, run: None, probed };
        let view = PodView {
            pod: serde_json::from_value(pod).unwrap(),
            admitted: jiff::Timestamp::UNIX_EPOCH,
            directory: None,
            isolated: false,
            containers: [("c".to_owned(), container)].into(),
        };
        let text = render(&[Arc::new(view)]);
        let samples = text_check::samples(&text);
        let found: Vec<_> = samples.iter().map(|s| (s.labels["probe_type"].as_str(), s.value)).collect();
        assert_eq!(found, [("Liveness", 2.0), ("Readiness", 1.0)]);
        let wanted = "prober_probe_total{container=\"c\",namespace=\"n\",pod=\"p\",pod_uid=\"u\",\
                      probe_type=\"Liveness\",result=\"successful\"} 2\n";
        assert!(text.contains(wanted), "{text}");
        assert!(text_check::samples(&render(&[])).is_empty());
    }
}
