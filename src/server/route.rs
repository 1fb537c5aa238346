//! The kubelet's routes: [`route`] reads a path, [`attributes`] says which right it wants. Sources: kubelet's `server.go`
//! and `server/auth.go`.

use http::Method;

/// A pod as a path names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodPath {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its uid, where the path has it.
    pub uid: Option<String>,
}

/// What a path asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Route {
    /// `GET /`: a page for a person.
    Page,
    /// `/healthz`.
    Health,
    /// `/pods`.
    Pods,
    /// `/runningpods/`.
    RunningPods,
    /// `/configz`.
    Config,
    /// `/stats/summary`.
    Summary,
    /// `/metrics`.
    Metrics,
    /// `/metrics/resource`.
    ResourceMetrics,
    /// `/metrics/probes`.
    ProbeMetrics,
    /// `/containerLogs/…`.
    Logs(PodPath, String),
    /// `/exec/…`.
    Exec(PodPath, String),
    /// `/attach/…`.
    Attach(PodPath, String),
    /// `/run/…`.
    Run(PodPath, String),
    /// `/portForward/…`.
    PortForward(PodPath),
}

/// Reads a path. Names in it never hold what would have to be encoded, so an encoded one names nothing.
#[must_use]
pub fn route(path: &str) -> Option<Route> {
    let parts: Vec<&str> = path.trim_matches('/').split('/').collect();
    if parts.iter().any(|part| part.is_empty()) && parts.len() > 1 {
        return None;
    }
    let pod = |namespace: &str, name: &str, uid: Option<&&str>| PodPath {
        namespace: namespace.to_owned(),
        name: name.to_owned(),
        uid: uid.map(|uid| (*uid).to_owned()),
    };
    let in_container = |make: fn(PodPath, String) -> Route| match parts.as_slice() {
        [_, namespace, name, container] => Some(make(pod(namespace, name, None), (*container).to_owned())),
        [_, namespace, name, uid, container] => {
            Some(make(pod(namespace, name, Some(uid)), (*container).to_owned()))
        }
        _ => None,
    };
    match parts.as_slice() {
        [""] => Some(Route::Page),
        ["healthz"] | ["healthz", "ping" | "log" | "syncloop"] => Some(Route::Health),
        ["pods"] => Some(Route::Pods),
        ["runningpods"] => Some(Route::RunningPods),
        ["configz"] => Some(Route::Config),
        ["stats", "summary"] => Some(Route::Summary),
        ["metrics"] => Some(Route::Metrics),
        ["metrics", "resource"] => Some(Route::ResourceMetrics),
        ["metrics", "probes"] => Some(Route::ProbeMetrics),
        ["containerLogs", namespace, name, container] => {
            Some(Route::Logs(pod(namespace, name, None), (*container).to_owned()))
        }
        ["exec", ..] => in_container(Route::Exec),
        ["attach", ..] => in_container(Route::Attach),
        ["run", ..] => in_container(Route::Run),
        ["portForward", namespace, name] => Some(Route::PortForward(pod(namespace, name, None))),
        ["portForward", namespace, name, uid] => Some(Route::PortForward(pod(namespace, name, Some(uid)))),
        _ => None,
    }
}

impl Route {
    /// The route's name, for logs and metrics: bounded, whatever is asked for.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Page => "page",
            Self::Health => "healthz",
            Self::Pods => "pods",
            Self::RunningPods => "runningpods",
            Self::Config => "configz",
            Self::Summary => "stats/summary",
            Self::Metrics => "metrics",
            Self::ResourceMetrics => "metrics/resource",
            Self::ProbeMetrics => "metrics/probes",
            Self::Logs(..) => "containerLogs",
            Self::Exec(..) => "exec",
            Self::Attach(..) => "attach",
            Self::Run(..) => "run",
            Self::PortForward(..) => "portForward",
        }
    }

    /// Whether the route takes this method.
    #[must_use]
    pub fn takes(&self, method: &Method) -> bool {
        match self {
            Self::Exec(..) | Self::Attach(..) | Self::PortForward(..) => {
                matches!(*method, Method::GET | Method::POST)
            }
            Self::Run(..) => *method == Method::POST,
            _ => matches!(*method, Method::GET | Method::HEAD),
        }
    }
}

/// The right that a request wants: `verb` on `nodes/<subresource>` of this Node; of several subresources one will do.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Attributes {
    /// The verb.
    pub verb: &'static str,
    /// The subresources, the narrowest first.
    pub subresources: &'static [&'static str],
}

/// Which right a request wants. A kubelet lets `get nodes/proxy` run commands through WebSockets; here they want `create`
/// whatever the method.
#[must_use]
pub fn attributes(method: &Method, path: &str) -> Attributes {
    let first = path.trim_matches('/').split('/').next().unwrap_or_default();
    let subresources: &[&str] = match first {
        "stats" => &["stats"],
        "metrics" => &["metrics"],
        "logs" => &["log"],
        "checkpoint" => &["checkpoint"],
        "pods" | "runningpods" => &["pods", "proxy"],
        "healthz" => &["healthz", "proxy"],
        "configz" => &["configz", "proxy"],
        _ => &["proxy"],
    };
    let verb = match first {
        "exec" | "attach" | "run" | "portForward" => "create",
        _ => match *method {
            Method::POST => "create",
            Method::GET | Method::HEAD => "get",
            Method::PUT => "update",
            Method::PATCH => "patch",
            Method::DELETE => "delete",
            // No role names such a verb.
            _ => "unknown",
        },
    };
    Attributes { verb, subresources }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_read_as_a_kubelet_reads_them() {
        let pod = |uid: Option<&str>| PodPath {
            namespace: "ns".into(),
            name: "p".into(),
            uid: uid.map(str::to_owned),
        };
        for (path, wanted) in [
            ("/", Some(Route::Page)),
            ("/healthz", Some(Route::Health)),
            ("/healthz/syncloop", Some(Route::Health)),
            ("/pods", Some(Route::Pods)),
            ("/runningpods/", Some(Route::RunningPods)),
            ("/metrics/resource", Some(Route::ResourceMetrics)),
            ("/metrics/cadvisor", None),
            ("/containerLogs/ns/p/c", Some(Route::Logs(pod(None), "c".into()))),
            ("/exec/ns/p/c", Some(Route::Exec(pod(None), "c".into()))),
            ("/exec/ns/p/u/c", Some(Route::Exec(pod(Some("u")), "c".into()))),
            ("/run/ns/p/u/c", Some(Route::Run(pod(Some("u")), "c".into()))),
            ("/portForward/ns/p", Some(Route::PortForward(pod(None)))),
            ("/portForward/ns/p/u", Some(Route::PortForward(pod(Some("u"))))),
            ("/exec/ns/p", None),
            ("/exec//p/c", None),
            ("/containerLogs/ns/p/c/d", None),
            ("/debug/pprof", None),
        ] {
            assert_eq!(route(path), wanted, "{path}");
        }
    }

    #[test]
    fn running_something_wants_create_whatever_the_method() {
        for path in ["/exec/ns/p/c", "/attach/ns/p/c", "/run/ns/p/c", "/portForward/ns/p"] {
            let wanted = Attributes { verb: "create", subresources: &["proxy"] };
            assert_eq!(attributes(&Method::GET, path), wanted, "{path}");
        }
        let get = |path: &str| attributes(&Method::GET, path);
        assert_eq!(get("/containerLogs/ns/p/c"), Attributes { verb: "get", subresources: &["proxy"] });
        assert_eq!(get("/metrics/resource"), Attributes { verb: "get", subresources: &["metrics"] });
        assert_eq!(get("/stats/summary"), Attributes { verb: "get", subresources: &["stats"] });
        assert_eq!(get("/pods"), Attributes { verb: "get", subresources: &["pods", "proxy"] });
        assert_eq!(attributes(&Method::DELETE, "/").verb, "delete");
    }
}
