use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};

use http::Response;
use serde_json::{Value, json};

use super::*;

/// An API server's answers: what is asked for, and the status and text of the answer. A watch without one stays open.
type Answers = Vec<(&'static str, u16, String)>;

const SHORT: Waits = Waits {
    first_list: Duration::from_millis(300),
    again: Duration::from_millis(10),
    most: Duration::from_millis(160),
    denied: Duration::from_millis(100),
};

struct Stand {
    services: Services,
    asked: Arc<Mutex<Vec<String>>>,
}

fn stand(namespaces: &[&str], answers: Answers) -> Stand {
    let asked = Arc::new(Mutex::new(Vec::new()));
    let (noted, left) = (Arc::clone(&asked), Arc::new(Mutex::new(VecDeque::from(answers))));
    let client = crate::cluster::sending::client("default", move |request: Request<Body>| {
        let uri = request.uri().to_string();
        noted.lock().unwrap().push(uri.clone());
        let mut left = left.lock().unwrap();
        let at = left.iter().position(|(wanted, ..)| uri.contains(wanted));
        let answer = at.and_then(|at| left.remove(at));
        async move {
            match answer {
                Some((_, code, text)) => {
                    Ok(Response::builder().status(code).body(Body::from(text.into_bytes())).unwrap())
                }
                None => std::future::pending().await,
            }
        }
    });
    let namespaces: Vec<String> = namespaces.iter().map(|name| (*name).to_owned()).collect();
    Stand { services: Services::waiting(client, &namespaces, SHORT), asked }
}

fn one(namespace: &str, name: &str, ip: &str) -> Value {
    json!({"metadata": {"name": name, "namespace": namespace, "resourceVersion": "7", "labels": {"a": "b"}},
        "spec": {"clusterIP": ip, "type": "ClusterIP", "ports": [{"port": 80, "protocol": "TCP", "targetPort": "x"}]},
        "status": {"loadBalancer": {}}})
}

fn list(version: &str, more: &str, items: &[Value]) -> String {
    json!({"kind": "ServiceList", "metadata": {"resourceVersion": version, "continue": more}, "items": items})
        .to_string()
}

fn event(kind: &str, object: Value) -> String {
    json!({"type": kind, "object": object}).to_string() + "\n"
}

/// The variables that name a host, as `NAME=value`.
async fn hosts(services: &Services, namespace: &str, links: bool) -> Vec<String> {
    let vars = services.variables(namespace, links).await;
    let hosts = vars.iter().filter_map(|(name, value)| Some((name.strip_suffix("_SERVICE_HOST")?, value)));
    hosts.map(|(name, value)| format!("{name}={value}")).collect()
}

async fn until(services: &Services, namespace: &str, wanted: &[&str]) {
    let same = async {
        while hosts(services, namespace, true).await != wanted {
            sleep(Duration::from_millis(5)).await;
        }
    };
    let reached = timeout(Duration::from_secs(10), same).await;
    assert!(reached.is_ok(), "{:?}, not {wanted:?}", hosts(services, namespace, true).await);
}

#[tokio::test]
async fn pages_are_read_to_the_end_and_nothing_is_asked_before_the_first_pod() {
    let items = [
        one("ns", "my-db", "10.0.0.2"),
        one("ns", "h", "None"),
        one("ns", "e", ""),
        one("nsx", "o", "1.1.1.2"),
    ];
    let stand = stand(
        &[],
        vec![
            ("continue=a%2Fb", 200, list("5", "", &items)),
            (
                "/api/v1/services?limit=100&continue=",
                200,
                list("", "a/b", &[one("default", "kubernetes", "10.0.0.1"), one("default", "x", "1.1.1.1")]),
            ),
        ],
    );
    sleep(Duration::from_millis(20)).await;
    assert!(stand.asked.lock().unwrap().is_empty());
    assert_eq!(hosts(&stand.services, "ns", true).await, ["KUBERNETES=10.0.0.1", "MY_DB=10.0.0.2"]);
    assert_eq!(hosts(&stand.services, "ns", false).await, ["KUBERNETES=10.0.0.1"]);
    assert_eq!(hosts(&stand.services, "default", true).await, ["KUBERNETES=10.0.0.1", "X=1.1.1.1"]);
    assert_eq!(hosts(&stand.services, "none", true).await, ["KUBERNETES=10.0.0.1"]);
    let vars = stand.services.variables("ns", true).await;
    assert_eq!(vars["MY_DB_PORT_80_TCP"], "tcp://10.0.0.2:80");
    sleep(Duration::from_millis(20)).await;
    let asked = stand.asked.lock().unwrap();
    assert!(
        asked.len() == 3 && asked[2].contains("watch=true") && asked[2].ends_with("resourceVersion=5"),
        "{asked:?}"
    );
}

#[tokio::test]
async fn a_watch_changes_what_pods_are_told_and_goes_on_from_where_it_was() {
    let mut bookmark = one("", "", "");
    bookmark["metadata"] = json!({"resourceVersion": "12"});
    let changes = event("ADDED", one("ns", "new", "10.0.0.3"))
        + &event("MODIFIED", one("ns", "old", "10.0.0.9"))
        + &event("DELETED", one("ns", "gone", "10.0.0.4"))
        + &event("MODIFIED", one("ns", "headless", "None"))
        + &event("BOOKMARK", bookmark);
    let too_old = json!({"kind": "Status", "code": 410, "reason": "Expired"});
    let stand = stand(
        &[],
        vec![
            (
                "limit",
                200,
                list(
                    "5",
                    "",
                    &[
                        one("ns", "old", "10.0.0.2"),
                        one("ns", "gone", "10.0.0.4"),
                        one("ns", "headless", "10.0.0.5"),
                    ],
                ),
            ),
            ("resourceVersion=5", 200, changes),
            ("resourceVersion=12", 200, event("ERROR", too_old)),
            ("limit", 200, list("20", "", &[one("ns", "again", "10.0.0.6")])),
        ],
    );
    let first = hosts(&stand.services, "ns", true).await;
    assert!(
        first.contains(&"GONE=10.0.0.4".to_owned()) || first.contains(&"NEW=10.0.0.3".to_owned()),
        "{first:?}"
    );
    until(&stand.services, "ns", &["NEW=10.0.0.3", "OLD=10.0.0.9"]).await;
    until(&stand.services, "ns", &["AGAIN=10.0.0.6"]).await;
}

#[tokio::test]
async fn namespaces_have_a_watch_each_and_the_api_servers_own_service_too() {
    assert_eq!(scopes(&[]), [Scope::All]);
    let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
    let of = |name: &str| Scope::Namespace(name.to_owned());
    assert_eq!(scopes(&names(&["b", "a", "b"])), [of("a"), of("b"), Scope::Kubernetes]);
    assert_eq!(scopes(&names(&["default"])), [of("default")]);
    assert_eq!(scopes(&names(&["1", "2", "3", "4", "5", "6", "7", "8", "9"])), [Scope::All]);
    let stand = stand(
        &["a"],
        vec![
            ("/namespaces/a/services?limit", 200, list("5", "", &[one("a", "x", "10.0.0.2")])),
            (
                "/namespaces/default/services?fieldSelector=metadata.name%3Dkubernetes&limit",
                200,
                list("5", "", &[one("default", "kubernetes", "10.0.0.1")]),
            ),
        ],
    );
    assert_eq!(hosts(&stand.services, "a", true).await, ["KUBERNETES=10.0.0.1", "X=10.0.0.2"]);
}

#[tokio::test]
async fn pods_wait_a_moment_for_a_silent_api_server_and_not_at_all_for_a_denial() {
    let silent = stand(&[], Vec::new());
    let start = Instant::now();
    assert!(silent.services.variables("ns", true).await.is_empty());
    assert!(start.elapsed() >= SHORT.first_list);
    // Only the first pods wait.
    let start = Instant::now();
    assert!(silent.services.variables("ns", true).await.is_empty());
    assert!(start.elapsed() < SHORT.first_list / 2);
    let denied = stand(
        &[],
        vec![("limit", 403, "{}".to_owned()), ("limit", 200, list("5", "", &[one("ns", "x", "10.0.0.2")]))],
    );
    let start = Instant::now();
    assert!(denied.services.variables("ns", true).await.is_empty());
    assert!(start.elapsed() < SHORT.denied);
    // A right that is granted later is noticed.
    until(&denied.services, "ns", &["X=10.0.0.2"]).await;
}

#[tokio::test]
async fn an_api_server_that_is_away_is_asked_less_and_less() {
    let calls = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&calls);
    let client = crate::cluster::sending::client("default", move |_: Request<Body>| {
        counted.fetch_add(1, Ordering::Relaxed);
        async { Ok(Response::builder().status(503).body(Body::empty()).unwrap()) }
    });
    let services = Services::waiting(client, &[], SHORT);
    assert!(services.variables("ns", true).await.is_empty());
    sleep(Duration::from_millis(700)).await;
    // After 10, 20, 40, 80 ms and then each 160 ms: about ten a second and not a hundred.
    let calls = calls.load(Ordering::Relaxed);
    assert!((3..=11).contains(&calls), "{calls}");
}

#[test]
fn no_more_are_kept_than_a_pilot_can_afford() {
    let mut known = BTreeMap::new();
    let service = || Service { ip: "10.0.0.1".into(), ports: Box::default() };
    for number in 0..=MOST_SERVICES {
        keep(&mut known, ("ns".into(), number.to_string().into()), service());
    }
    assert_eq!(known.len(), MOST_SERVICES);
    keep(&mut known, ("ns".into(), "0".into()), Service { ip: "10.0.0.2".into(), ports: Box::default() });
    assert_eq!(&*known[&("ns".into(), "0".into())].ip, "10.0.0.2");
}

#[tokio::test]
async fn play_knows_no_services() {
    assert!(Services::default().variables("ns", true).await.is_empty());
}
