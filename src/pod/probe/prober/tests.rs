use std::sync::Arc;

use bytes::Bytes;
use k8s_openapi::api::core::v1::EnvVar;
use serde_json::{Value, from_value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;

use super::super::tests::{answer, container};
use super::*;
use crate::container::StartError;
use crate::pod::session::{ExecEnd, Request};

/// Runs one probe of a container whose programs end as `ends` says.
async fn probe_with(
    probe: Value,
    container: &Container,
    timeout: Duration,
    mut program: impl FnMut(Vec<String>) -> (ExecEnd, &'static str),
) -> Outcome {
    let probe: Probe = from_value(probe).unwrap();
    let (run, mut requests) = RunHandle::new(1);
    let supervisor = async move {
        while let Some(request) = requests.recv().await {
            if let Request::Exec { argv, stdio, ended, .. } = request {
                let (end, output) = program(argv);
                let crate::container::ExecStdio::Pipes([_, out, _]) = stdio else { continue };
                std::io::Write::write_all(&mut std::fs::File::from(out), output.as_bytes()).unwrap();
                let _ = ended.send(end);
            }
        }
    };
    tokio::select! {
        outcome = super::run(container, &run, &probe, timeout) => outcome,
        () = supervisor => Outcome::Gone,
    }
}

async fn probe(value: Value) -> Outcome {
    probe_with(value, &container(json!({})), Duration::from_secs(5), |_| (Ok(0), "")).await
}

#[tokio::test]
async fn a_program_is_judged_by_its_exit_code() {
    let exec = json!({"exec": {"command": ["cat", "$(FILE)", "$(OTHER)", "$$(FILE)"]}});
    let container = container(json!({"env": [{"name": "FILE", "value": "/tmp/$(X)"}]}));
    let missing = || StartError::NotFound { program: "cat".to_owned() };
    let table: [(ExecEnd, &str, Outcome); 3] = [
        (Ok(0), "fine", Outcome::Success),
        (Ok(3), "not yet\n", Outcome::Failure("not yet\n".to_owned())),
        (Err(missing()), "", Outcome::Unknown(missing().to_string())),
    ];
    for (end, output, wanted) in table {
        let mut end = Some(end);
        let got = probe_with(exec.clone(), &container, Duration::from_secs(5), |argv| {
            assert_eq!(argv, ["cat", "/tmp/$(X)", "$(OTHER)", "$(FILE)"]);
            (end.take().unwrap(), output)
        });
        assert_eq!(got.await, wanted);
    }
}

#[tokio::test]
async fn a_program_that_is_too_slow_is_killed_and_a_failure() {
    let exec = Probe {
        exec: Some(ExecAction { command: Some(vec!["sleep".to_owned(), "9".to_owned()]) }),
        ..Probe::default()
    };
    let (run, mut requests) = RunHandle::new(1);
    let container = Container { env: Some(vec![EnvVar::default()]), ..Container::default() };
    let limit = Duration::from_millis(20);
    let got = super::run(&container, &run, &exec, limit).await;
    assert_eq!(got, Outcome::Failure("command timed out: \"sleep 9\" timed out after 0s".to_owned()));
    let Some(Request::Exec { id: started, .. }) = requests.recv().await else { panic!("no program") };
    let Some(Request::Signal { id, signal }) = requests.recv().await else { panic!("no signal") };
    assert_eq!((id, signal), (started, nix::sys::signal::Signal::SIGKILL));
    drop(requests);
    assert_eq!(super::run(&container, &run, &exec, limit).await, Outcome::Gone);
}

/// A server that answers each connection with the next text; what it was asked comes out.
async fn server(answers: Vec<String>) -> (u16, tokio::task::JoinHandle<Vec<String>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let serve = async move {
        let mut asked = Vec::new();
        for answer in answers {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut bytes = [0; 2048];
            let n = stream.read(&mut bytes).await.unwrap();
            asked.push(String::from_utf8_lossy(&bytes[..n]).into_owned());
            stream.write_all(answer.as_bytes()).await.unwrap();
        }
        asked
    };
    (port, tokio::spawn(serve))
}

#[tokio::test]
async fn an_http_probe_goes_by_the_status() {
    let table = [
        (answer("200 OK", "", "x"), Outcome::Success),
        (answer("204 No Content", "", ""), Outcome::Success),
        (
            answer("503 No", "", "secret"),
            Outcome::Failure("HTTP probe failed with statuscode: 503".to_owned()),
        ),
        (
            answer("302 Found", "Location: http://elsewhere/\r\n", "go"),
            Outcome::Warning("Probe terminated redirects, Response body: go".to_owned()),
        ),
        (
            answer("304 Not Modified", "", ""),
            Outcome::Warning("Probe terminated redirects, Response body: ".to_owned()),
        ),
        (answer("200 OK", "", &"x".repeat(100_000)), Outcome::Success),
    ];
    for (text, wanted) in table {
        let (port, asked) = server(vec![text]).await;
        let got = probe(json!({"httpGet": {"path": "healthz?x=1", "port": port,
            "httpHeaders": [{"name": "X-Own", "value": "v"}]}}));
        assert_eq!(got.await, wanted);
        let asked = asked.await.unwrap().remove(0).to_lowercase();
        assert!(asked.starts_with("get /healthz?x=1 http/1.1\r\n"), "{asked}");
        for header in
            ["user-agent: kube-probe/1.36", "accept: */*", "x-own: v", &format!("host: 127.0.0.1:{port}")]
        {
            assert!(asked.contains(&format!("\r\n{header}\r\n")), "{header} in {asked}");
        }
    }
}

#[tokio::test]
async fn a_probe_follows_redirects_on_its_own_host() {
    let to = |path: &str| answer("302 Found", &format!("Location: {path}\r\n"), "");
    let (port, asked) = server(vec![to("/b"), to("c?d"), answer("200 OK", "", "")]).await;
    assert_eq!(probe(json!({"httpGet": {"path": "/a", "port": port}})).await, Outcome::Success);
    let asked: Vec<_> =
        asked.await.unwrap().iter().map(|text| text.split(' ').nth(1).unwrap().to_owned()).collect();
    assert_eq!(asked, ["/a", "/b", "/c?d"]);
    let (port, _) = server(vec![to("/a"); 10]).await;
    let wanted = format!("Get \"http://127.0.0.1:{port}/a\": stopped after 10 redirects");
    assert_eq!(probe(json!({"httpGet": {"path": "/a", "port": port}})).await, Outcome::Failure(wanted));
}

#[tokio::test]
async fn headers_of_the_pod_win() {
    let (port, asked) = server(vec![answer("200 OK", "", "")]).await;
    let headers = json!([{"name": "Host", "value": "me.example"}, {"name": "User-Agent", "value": "mine"},
        {"name": "Accept", "value": ""}]);
    assert_eq!(probe(json!({"httpGet": {"port": port, "httpHeaders": headers}})).await, Outcome::Success);
    let asked = asked.await.unwrap().remove(0).to_lowercase();
    assert!(asked.contains("host: me.example\r\n") && asked.contains("user-agent: mine\r\n"), "{asked}");
    assert!(!asked.contains("accept") && !asked.contains("127.0.0.1"), "{asked}");
}

#[tokio::test]
async fn nobody_there_is_a_failure_and_a_bad_port_is_none() {
    let (port, over) = server(Vec::new()).await;
    over.await.unwrap();
    let refused = format!("dial tcp 127.0.0.1:{port}: connect: connection refused");
    let tcp = json!({"tcpSocket": {"port": port}});
    assert_eq!(probe(tcp).await, Outcome::Failure(refused.clone()));
    let get = format!("Get \"http://127.0.0.1:{port}/\": {refused}");
    assert_eq!(probe(json!({"httpGet": {"port": port}})).await, Outcome::Failure(get));
    let grpc = format!("error: failed to connect service at \"127.0.0.1:{port}\": {refused}");
    assert_eq!(probe(json!({"grpc": {"port": port}})).await, Outcome::Failure(grpc));
    for bad in [
        json!({"tcpSocket": {"port": "web"}}),
        json!({"httpGet": {"port": 0}}),
        json!({"grpc": {"port": 70_000}}),
        json!({}),
    ] {
        assert!(matches!(probe(bad.clone()).await, Outcome::Unknown(_)), "{bad}");
    }
}

#[tokio::test]
async fn a_silent_server_is_too_slow_and_a_connection_is_enough_for_tcp() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let named = container(json!({"ports": [{"name": "web", "containerPort": port}]}));
    let limit = Duration::from_millis(50);
    let probed = |probe| probe_with(probe, &named, limit, |_| (Ok(0), ""));
    assert_eq!(probed(json!({"tcpSocket": {"port": "web"}})).await, Outcome::Success);
    let Outcome::Failure(text) = probed(json!({"httpGet": {"port": "web"}})).await else { panic!() };
    assert!(
        text.ends_with("context deadline exceeded (Client.Timeout exceeded while awaiting headers)"),
        "{text}"
    );
    let Outcome::Failure(text) = probed(json!({"grpc": {"port": port}})).await else { panic!() };
    assert!(text.starts_with("timeout: failed to connect service"), "{text}");
}

#[tokio::test]
async fn https_is_not_verified() {
    let key = rcgen::generate_simple_self_signed(["other.example".to_owned()]).unwrap();
    let chain = vec![key.cert.der().clone()];
    let private = rustls::pki_types::PrivateKeyDer::try_from(key.signing_key.serialize_der()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(chain, private)
        .unwrap();
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        let (stream, _) = listener.accept().await.unwrap();
        let mut stream = acceptor.accept(stream).await.unwrap();
        let _ = stream.read(&mut [0; 2048]).await.unwrap();
        stream.write_all(answer("200 OK", "", "").as_bytes()).await.unwrap();
        stream.shutdown().await.unwrap();
    });
    assert_eq!(probe(json!({"httpGet": {"port": port, "scheme": "HTTPS"}})).await, Outcome::Success);
}

/// What a gRPC server says: headers, a message, trailers.
struct Said {
    status: u16,
    message: Option<&'static [u8]>,
    trailers: Vec<(&'static str, &'static str)>,
}

/// A server made of h2's half, which answers one health check.
async fn grpc_server(said: Said) -> (u16, tokio::task::JoinHandle<(http::request::Parts, Vec<u8>)>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let serve = async move {
        let (stream, _) = listener.accept().await.unwrap();
        let mut connection = h2::server::handshake(stream).await.unwrap();
        let (request, mut respond) = connection.accept().await.unwrap().unwrap();
        let driver = tokio::spawn(async move { while connection.accept().await.is_some() {} });
        let (parts, mut body) = request.into_parts();
        let mut asked = Vec::new();
        while let Some(data) = body.data().await {
            asked.extend_from_slice(&data.unwrap());
        }
        let headers = said.trailers.iter().map(|(name, value)| {
            (http::HeaderName::from_static(name), http::HeaderValue::from_static(value))
        });
        let mut response = http::Response::builder().status(said.status).body(()).unwrap();
        if let Some(message) = said.message {
            response.headers_mut().insert("content-type", "application/grpc".parse().unwrap());
            let mut stream = respond.send_response(response, false).unwrap();
            stream.send_data(Bytes::from_static(message), false).unwrap();
            stream.send_trailers(headers.collect()).unwrap();
        } else {
            response.headers_mut().extend(headers);
            respond.send_response(response, true).unwrap();
        }
        let _ = driver.await;
        (parts, asked)
    };
    (port, tokio::spawn(serve))
}

#[tokio::test]
async fn a_grpc_probe_goes_by_the_serving_status() {
    let ok = || vec![("grpc-status", "0")];
    let failed = |text: &str| Outcome::Failure(text.to_owned());
    let table: Vec<(Said, Outcome)> = vec![
        (Said { status: 200, message: Some(&[0, 0, 0, 0, 2, 8, 1]), trailers: ok() }, Outcome::Success),
        (
            Said { status: 200, message: Some(&[0, 0, 0, 0, 2, 8, 2]), trailers: ok() },
            failed("service unhealthy (responded with \"NOT_SERVING\")"),
        ),
        (
            Said { status: 200, message: Some(&[0, 0, 0, 0, 0]), trailers: ok() },
            failed("service unhealthy (responded with \"UNKNOWN\")"),
        ),
        (
            Said {
                status: 200,
                message: None,
                trailers: vec![
                    ("grpc-status", "12"),
                    ("grpc-message", "unknown service grpc.health.v1.Health"),
                ],
            },
            failed(
                "error: this server does not implement the grpc health protocol (grpc.health.v1.Health): unknown service grpc.health.v1.Health",
            ),
        ),
        (
            Said {
                status: 200,
                message: None,
                trailers: vec![("grpc-status", "5"), ("grpc-message", "unknown service%3A s1")],
            },
            failed("error: health rpc probe failed: rpc error: code = NotFound desc = unknown service: s1"),
        ),
        (
            Said { status: 503, message: None, trailers: Vec::new() },
            failed(
                "error: health rpc probe failed: rpc error: code = Unavailable desc = unexpected HTTP status code received from server: 503",
            ),
        ),
    ];
    for (said, wanted) in table {
        let (port, asked) = grpc_server(said).await;
        assert_eq!(probe(json!({"grpc": {"port": port, "service": "s1"}})).await, wanted);
        let (parts, body) = asked.await.unwrap();
        assert_eq!(parts.uri.to_string(), format!("http://127.0.0.1:{port}/grpc.health.v1.Health/Check"));
        assert_eq!(
            (&parts.headers["user-agent"], &parts.headers["te"]),
            (&"kube-probe/1.36".parse().unwrap(), &"trailers".parse().unwrap())
        );
        assert_eq!(body, [0, 0, 0, 0, 4, 10, 2, b's', b'1']);
    }
}

#[tokio::test]
async fn a_server_of_another_protocol_fails_a_grpc_probe() {
    let (port, _) = server(vec!["HTTP/1.1 400 Bad Request\r\n\r\n".to_owned()]).await;
    let Outcome::Failure(text) = probe(json!({"grpc": {"port": port}})).await else { panic!() };
    assert!(text.contains("failed to connect service") && text.contains("server preface"), "{text}");
}
