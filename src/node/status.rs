//! The Node's conditions, with kubelet's types, reasons, messages and order.
//!
//! Source of all texts: Kubernetes v1.36, `pkg/kubelet/nodestatus/setters.go`.

use std::time::Duration;

use k8s_openapi::api::core::v1::NodeCondition;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;

use super::spread::Part;

/// The status is written this often at least although nothing changed: kubelet's nodeStatusReportFrequency
/// (`pkg/kubelet/apis/config/v1beta1/defaults.go`).
pub const STATUS_EVERY: Duration = Duration::from_secs(300);

/// From this age on, the status goes along with a write of the label, which comes once a minute: one write
/// instead of two. Where there is no label, each Node has an age of its own between the two.
pub const STATUS_ALONG: Duration = Duration::from_secs(240);

/// How this Node is. The default is a Node in good health.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Health {
    /// The allocation's memory runs out: the scheduler sends no more BestEffort pods.
    pub memory_pressure: bool,
    /// The disk of the pods' directories runs full.
    pub disk_pressure: bool,
    /// Process ids run out.
    pub pid_pressure: bool,
    /// Why the Node takes no pods; `None` while it is ready.
    pub not_ready: Option<NotReady>,
    /// Conditions that a kubelet does not have.
    pub further: Vec<Further>,
    /// Where the Node's own API is reached, where that is another place than the Node was made with and may change.
    pub endpoint: Option<Endpoint>,
    /// How many CPUs there are, where these are others than the Node was made with.
    pub cpus: Option<usize>,
}

/// A condition that a kubelet does not have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Further {
    /// Its type.
    pub kind: &'static str,
    /// Whether it holds.
    pub holds: bool,
    /// One word in CamelCase.
    pub reason: &'static str,
    /// For people.
    pub message: String,
}

/// Where the Node's own API is reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// The Node's address; `None` leaves it as it was made.
    pub ip: Option<String>,
    /// The port; `None` while there is none: nobody is to dial it then.
    pub port: Option<u16>,
}

/// Why a Node is not ready.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NotReady {
    /// One word in CamelCase; kubelet's own is `KubeletNotReady`.
    pub reason: String,
    /// For people; kubelet's own at its end is `node is shutting down`.
    pub message: String,
}

/// The conditions as they are to be written: MemoryPressure, DiskPressure, PIDPressure, those of our own, Ready last
/// (what reads them in order expects Ready to sum up the others). `before` are the conditions as the API server has them:
/// what did not change keeps its time of transition.
#[must_use]
pub fn conditions(before: &[NodeCondition], health: &Health, now: Timestamp) -> Vec<NodeCondition> {
    let pressure = |kind: &str, on: bool, bad: (&str, &str), good: (&str, &str)| {
        let (status, (reason, message)) = if on { ("True", bad) } else { ("False", good) };
        condition(before, kind, status, reason, message, now)
    };
    let ready = match &health.not_ready {
        None => condition(before, "Ready", "True", "KubeletReady", "kubelet is posting ready status", now),
        Some(why) => condition(before, "Ready", "False", &why.reason, &why.message, now),
    };
    let mut all = vec![
        pressure(
            "MemoryPressure",
            health.memory_pressure,
            ("KubeletHasInsufficientMemory", "kubelet has insufficient memory available"),
            ("KubeletHasSufficientMemory", "kubelet has sufficient memory available"),
        ),
        pressure(
            "DiskPressure",
            health.disk_pressure,
            ("KubeletHasDiskPressure", "kubelet has disk pressure"),
            ("KubeletHasNoDiskPressure", "kubelet has no disk pressure"),
        ),
        pressure(
            "PIDPressure",
            health.pid_pressure,
            ("KubeletHasInsufficientPID", "kubelet has insufficient PID available"),
            ("KubeletHasSufficientPID", "kubelet has sufficient PID available"),
        ),
    ];
    all.extend(health.further.iter().map(|further| {
        let status = if further.holds { "True" } else { "False" };
        condition(before, further.kind, status, further.reason, &further.message, now)
    }));
    all.push(ready);
    all
}

fn condition(
    before: &[NodeCondition],
    kind: &str,
    status: &str,
    reason: &str,
    message: &str,
    now: Timestamp,
) -> NodeCondition {
    let kept = before.iter().find(|c| c.type_ == kind && c.status == status);
    NodeCondition {
        type_: kind.to_owned(),
        status: status.to_owned(),
        reason: Some(reason.to_owned()),
        message: Some(message.to_owned()),
        last_heartbeat_time: Some(Time(now)),
        last_transition_time: kept.and_then(|c| c.last_transition_time.clone()).or(Some(Time(now))),
    }
}

/// Whether the Node controller has given this Node up: it sets Ready to Unknown when the Lease lapses, and only
/// a status of the node's own takes that back (a renewed Lease alone does not:
/// `pkg/controller/nodelifecycle/node_lifecycle_controller.go`).
#[must_use]
pub fn given_up(conditions: &[NodeCondition]) -> bool {
    conditions.iter().any(|c| c.type_ == "Ready" && c.status == "Unknown")
}

/// Whether a status of this age is written anew although it says the same.
#[must_use]
pub fn is_old(age: Duration, label_due: bool, part: Part) -> bool {
    age >= part.between(STATUS_ALONG, STATUS_EVERY) || (label_due && age >= STATUS_ALONG)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn time(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    #[test]
    fn a_healthy_node_has_kubelets_conditions_ready_last() {
        let made = conditions(&[], &Health::default(), time(5));
        let short: Vec<_> = made
            .iter()
            .map(|c| (c.type_.as_str(), c.status.as_str(), c.reason.as_deref().unwrap()))
            .collect();
        assert_eq!(
            short,
            [
                ("MemoryPressure", "False", "KubeletHasSufficientMemory"),
                ("DiskPressure", "False", "KubeletHasNoDiskPressure"),
                ("PIDPressure", "False", "KubeletHasSufficientPID"),
                ("Ready", "True", "KubeletReady"),
            ]
        );
        assert!(made.iter().all(|c| c.last_transition_time == Some(Time(time(5)))));
    }

    #[test]
    fn pressure_is_said() {
        let health =
            Health { memory_pressure: true, disk_pressure: true, pid_pressure: true, ..Health::default() };
        let made = conditions(&[], &health, time(5));
        assert!(made[..3].iter().all(|c| c.status == "True"));
        assert_eq!(made[2].reason.as_deref(), Some("KubeletHasInsufficientPID"));
    }

    #[test]
    fn the_transition_time_moves_only_with_the_status() {
        let first = conditions(&[], &Health::default(), time(5));
        let why = NotReady { reason: "KubeletNotReady".into(), message: "node is shutting down".into() };
        let ending = Health { not_ready: Some(why), ..Health::default() };
        let second = conditions(&first, &ending, time(9));
        assert_eq!(second[0].last_transition_time, Some(Time(time(5))));
        assert_eq!(second[0].last_heartbeat_time, Some(Time(time(9))));
        assert_eq!(second[3].last_transition_time, Some(Time(time(9))));
        assert_eq!(second[3].message.as_deref(), Some("node is shutting down"));
        assert_eq!(conditions(&second, &ending, time(12))[3].last_transition_time, Some(Time(time(9))));
    }

    #[test]
    fn further_conditions_stand_before_ready_and_keep_their_time() {
        let down = |holds, message: &str| Health {
            further: vec![Further { kind: "TunnelDown", holds, reason: "R", message: message.into() }],
            ..Health::default()
        };
        let first = conditions(&[], &down(true, "a"), time(5));
        let kinds: Vec<_> = first.iter().map(|c| c.type_.as_str()).collect();
        assert_eq!(kinds, ["MemoryPressure", "DiskPressure", "PIDPressure", "TunnelDown", "Ready"]);
        assert_eq!(first[3].status, "True");
        let second = conditions(&first, &down(true, "b"), time(9));
        assert_eq!(second[3].last_transition_time, Some(Time(time(5))));
        assert_eq!(second[3].message.as_deref(), Some("b"));
        assert_eq!(
            conditions(&second, &down(false, ""), time(12))[3].last_transition_time,
            Some(Time(time(12)))
        );
    }

    #[test]
    fn each_node_has_an_age_of_its_own_at_which_its_status_is_written_anew() {
        let secs = Duration::from_secs;
        for (age, label_due, part, want) in [
            (239, true, Part::NONE, false),
            (240, true, Part::ALL, true),
            (240, false, Part::NONE, true),
            (299, false, Part::ALL, false),
            (300, false, Part::ALL, true),
        ] {
            assert_eq!(is_old(secs(age), label_due, part), want, "{age} {label_due} {part:?}");
        }
    }

    #[test]
    fn only_unknown_means_given_up() {
        let mut made = conditions(&[], &Health::default(), time(5));
        assert!(!given_up(&made));
        made[3].status = "Unknown".into();
        assert!(given_up(&made));
        assert!(!given_up(&[]));
    }
}
