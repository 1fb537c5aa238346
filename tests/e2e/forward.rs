//! `kubectl port-forward`, and all that has streams by the older ways from kubectl to the Node.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, TcpStream};
use std::sync::Barrier;
use std::time::Duration;

use crate::exec::{attach_works, cp_works, exec_works, joined, noise, terminal_works};
use crate::harness::{ApiServer, Kubectl, Namespace, Options, Pilot, Way, seconds, wait_for, wait_until};

/// How long kubectl may take on a machine that is busy with other tests.
const SLOW: Duration = seconds(60);

/// A server that sends back what it gets, a process for each client, and leaves its port in the file `port`. A
/// connection whose first byte is `q` it answers and closes; one with `r` it breaks off. perl is on every Debian.
const ECHO: &str = r#"exec perl -MSocket -e '
    $SIG{CHLD} = "IGNORE";
    socket(S, PF_INET, SOCK_STREAM, 0) or die;
    bind(S, sockaddr_in(0, INADDR_LOOPBACK)) or die;
    listen(S, 128) or die;
    open(F, ">", "port.new"); print F +(sockaddr_in(getsockname(S)))[0]; close(F); rename("port.new", "port");
    sub serve {
        for ($n = 0; sysread(C, $b, 65536); $n++) {
            $last = $n == 0 && $b =~ /^([qr])/ ? $1 : "";
            return setsockopt(C, SOL_SOCKET, SO_LINGER, pack("ii", 1, 0)) if $last eq "r";
            for ($o = 0; $o < length($b);) { $o += syswrite(C, $b, length($b) - $o, $o); }
            return if $last eq "q";
        }
    }
    while (1) {
        accept(C, S) or next;
        if (fork() == 0) { close(S); serve(); close(C); exit 0; }
        close(C);
    }'
"#;

/// A pod with that server, and its port.
fn echo_pod(label: &'static str) -> (Namespace, Pilot, u16) {
    let namespace = Namespace::new(label);
    let pilot = Pilot::local(Options::new(label), 600);
    namespace.script_on(&pilot, "p", ECHO);
    namespace.wait_phase("p", "Running", seconds(30));
    let file = pilot.pod_directory("p").join("containers/c1/port");
    let port = wait_for("the server listens", SLOW, || std::fs::read_to_string(&file).ok()?.parse().ok());
    (namespace, pilot, port)
}

/// `kubectl port-forward` to these ports, and the local ones.
fn forward(way: &Way, namespace: &Namespace, ports: &[u16]) -> (Kubectl, Vec<u16>) {
    let mut command = way.kubectl(&namespace.name);
    command.args(["port-forward", "--address=127.0.0.1", "pod/p"]);
    let forwarding = Kubectl::start(command.args(ports.iter().map(|port| format!(":{port}"))));
    let local = wait_for("the forward is open", SLOW, || {
        let text = forwarding.text();
        let found: Vec<u16> = text
            .lines()
            .filter_map(|line| {
                line.strip_prefix("Forwarding from 127.0.0.1:")?.split(' ').next()?.parse().ok()
            })
            .collect();
        (found.len() == ports.len()).then_some(found)
    });
    (forwarding, local)
}

/// Sends so many bytes by as many connections as asked for, all open at once, and wants them back.
fn echo(port: u16, connections: usize, size: usize) {
    let all_open = Barrier::new(connections);
    std::thread::scope(|scope| {
        for n in 0..connections {
            let all_open = &all_open;
            scope.spawn(move || {
                let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
                stream.set_read_timeout(Some(SLOW)).unwrap();
                let mut first = [0];
                stream.write_all(b"x").unwrap();
                // Each waits for the others even when it failed: they would wait for ever.
                let answered = stream.read_exact(&mut first);
                all_open.wait();
                answered.unwrap_or_else(|error| panic!("connection {n}: {error}"));
                let bytes = noise(size, n as u64 + 1);
                let (mut out, sent) = (stream.try_clone().unwrap(), bytes.clone());
                let writer = scope.spawn(move || {
                    out.write_all(&sent).unwrap();
                    out.shutdown(Shutdown::Write).unwrap();
                });
                let mut back = Vec::new();
                stream.read_to_end(&mut back).unwrap_or_else(|error| panic!("connection {n}: {error}"));
                writer.join().unwrap();
                assert!(back == bytes, "connection {n}: {} of {size} bytes came back, or others", back.len());
            });
        }
    });
}

#[test]
fn fifty_connections_at_once_reach_a_server_in_the_pod() {
    let (namespace, _pilot, port) = echo_pod("forward");
    let (_forwarding, local) = forward(&Way::default(), &namespace, &[port]);
    echo(local[0], 50, 200_000);
    echo(local[0], 1, 5_000_000);
}

/// Whether a connection is given up by the other side, an end or a reset.
fn is_closed(port: u16) -> bool {
    let Ok(mut stream) = TcpStream::connect(("127.0.0.1", port)) else { return true };
    stream.set_read_timeout(Some(SLOW)).unwrap();
    !matches!(stream.read(&mut [0]), Ok(n) if n > 0)
}

#[test]
fn a_connection_that_either_side_breaks_off_takes_no_other_with_it() {
    let (namespace, _pilot, port) = echo_pod("broken");
    let (mut forwarding, local) = forward(&Way::default(), &namespace, &[port]);
    let open = |first: &[u8]| {
        let mut stream = TcpStream::connect(("127.0.0.1", local[0])).unwrap();
        stream.set_read_timeout(Some(SLOW)).unwrap();
        stream.write_all(first).unwrap();
        stream
    };
    let answer = |stream: &mut TcpStream| {
        let mut byte = [0];
        stream
            .read(&mut byte)
            .map_or_else(|error| error.to_string(), |n| String::from_utf8_lossy(&byte[..n]).into())
    };
    let mut stays = open(b"x");
    assert_eq!(answer(&mut stays), "x");
    // The server has said all, as one of HTTP/1.0 has: the client still holds its side open.
    let mut closed = open(b"q");
    assert_eq!((answer(&mut closed), answer(&mut closed)), ("q".to_owned(), String::new()));
    // The server is killed, or does not want any more.
    let mut reset = open(b"r");
    answer(&mut reset);
    // The client is.
    let mut leaves = open(b"x");
    assert_eq!(answer(&mut leaves), "x");
    rustix::net::sockopt::set_socket_linger(&leaves, Some(Duration::ZERO)).unwrap();
    leaves.write_all(&[b'x'; 100_000]).unwrap();
    drop(leaves);
    wait_until("all four are known to kubectl", SLOW, || {
        forwarding.text().matches("Handling connection").count() == 4
    });
    echo(local[0], 20, 10_000);
    stays.write_all(b"y").unwrap();
    assert_eq!(answer(&mut stays), "y");
    assert!(!forwarding.errors().contains("error occurred forwarding"), "{}", forwarding.errors());
    forwarding.close_input();
}

#[test]
fn a_port_on_which_nobody_listens_is_told() {
    let (namespace, _pilot, port) = echo_pod("nobody");
    // Port 1 (tcpmux) has nobody.
    let (mut forwarding, local) = forward(&Way::default(), &namespace, &[port, 1]);
    echo(local[0], 1, 1000);
    assert!(is_closed(local[1]));
    // kubectl itself ends at the first error that it is told.
    let ended = forwarding.wait_end(SLOW);
    assert!(
        ended.code != 0 && ended.stderr.contains("port 1 of this pod's host: Connection refused"),
        "{}",
        ended.said()
    );
    let (_forwarding, local) = forward(&Way::default(), &namespace, &[port]);
    echo(local[0], 1, 1000);
}

#[test]
fn a_forward_ends_with_its_pod() {
    let (namespace, _pilot, port) = echo_pod("forward-end");
    let (mut forwarding, local) = forward(&Way::default(), &namespace, &[port]);
    echo(local[0], 1, 1000);
    namespace.of("pods").delete("p", Some(1));
    namespace.wait_gone("p", seconds(30));
    // kubectl itself notices it with the next connection, at the latest.
    wait_until("no connection is forwarded any more", SLOW, || is_closed(local[0]));
    let ended = forwarding.wait_end(SLOW);
    assert!(ended.stderr.contains("lost connection to pod"), "{}", ended.said());
}

/// exec, cp and port-forward by one way.
fn all_works(way: &Way, label: &'static str) -> String {
    let (namespace, pilot, port) = echo_pod(label);
    exec_works(way, &namespace, 3_000_000);
    terminal_works(way, &namespace, &pilot);
    attach_works(way, &namespace, &pilot);
    cp_works(way, &namespace, &pilot, 5_000_000);
    let (_forwarding, local) = forward(way, &namespace, &[port]);
    echo(local[0], 50, 20_000);
    pilot.output()
}

#[test]
fn a_kubectl_without_websockets_has_it_all_by_spdy() {
    let environment =
        vec![("KUBECTL_REMOTE_COMMAND_WEBSOCKETS", "false"), ("KUBECTL_PORT_FORWARD_WEBSOCKETS", "false")];
    let output = all_works(&Way { environment, ..Way::default() }, "spdy");
    // From kubectl to the API server; the rest of the way is the same as without.
    assert!(joined(&output, "attach", "SPDY", "v4.channel.k8s.io") > 0, "{output}");
}

#[test]
fn an_api_server_without_websockets_to_kubelets_has_it_all_by_spdy() {
    let server = ApiServer::start(&["--feature-gates=ExtendWebSocketsToKubelet=false"]);
    let way = Way { kubeconfig: Some(server.kubeconfig()), ..Way::default() };
    let output = all_works(&way, "old-server");
    for action in ["exec", "attach"] {
        assert!(joined(&output, action, "SPDY", "v4.channel.k8s.io") > 0, "{action}: {output}");
        assert_eq!(joined(&output, action, "WebSocket", "v5.channel.k8s.io"), 0, "{action}: {output}");
    }
    assert!(
        output.contains("a user forwards ports") && output.contains("protocol=\"portforward.k8s.io\""),
        "{output}"
    );
}
