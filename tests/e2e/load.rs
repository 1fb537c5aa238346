//! Many clients of the Node's API at once, and bad ones: each honest one gets all of its data, the pilot's memory
//! stays bounded and comes back, and no container loses a line.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{Shutdown, TcpStream};
use std::path::PathBuf;
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use crate::harness::https::{Connection, Https, dechunk, read_exec, read_head, read_message, say, status};
use crate::harness::spdy::{self, Spdy};
use crate::harness::{Namespace, Options, Pilot, bed, container, pod_spec, read, seconds, wait_until};

const PODS: usize = 16;
const FOLLOWERS: usize = 200;
const EXECS: usize = 50;
/// What each exec writes.
const EXEC_BYTES: usize = 1_000_000;

/// Loads, one after the other: what each leaves behind adds up.
const ROUNDS: usize = 2;

/// What the pilot may keep of loads that are over: pages of its heap in which a block is still in use, and connections
/// to the API server, kept for some time. Four loads left some 9 MB, the last of them nothing more.
const KEPT: u64 = 12 << 20;

/// What a load may leave beyond what the load before it left. A leak of 40 KiB for each client would be 10 MB; that of the
/// buffers of the followers (three pieces of 64 KiB each) 38 MB.
const ADDED: u64 = 1 << 20;

/// Memory of the pilot and its guardian, in bytes: the proportional set size without the pages of files. Those of the
/// binary itself are the kernel's to keep or not, and in a debug build they are most. Only root sees it.
fn memory(pilot: &Pilot) -> u64 {
    let mut pids = pilot.stages("pilot");
    pids.extend(pilot.stages("run"));
    assert_eq!(pids.len(), 2, "a guardian and a pilot: {pids:?}");
    let sizes = pids.iter().map(|pid| {
        let text = read(&PathBuf::from(format!("/proc/{pid}/smaps_rollup")));
        let line = text.lines().find_map(|line| line.strip_prefix("Pss_Anon:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
    });
    sizes.sum()
}

/// Waits until the pilot's memory is not more than this.
#[track_caller]
fn wait_memory(pilot: &Pilot, most: u64) {
    let start = Instant::now();
    while memory(pilot) > most {
        assert!(start.elapsed() < seconds(40), "{} bytes of memory, at most {most} wanted", memory(pilot));
        thread::sleep(Duration::from_millis(500));
    }
}

/// The pilot's memory when it has not become less for a while.
fn settled_memory(pilot: &Pilot) -> u64 {
    let (mut least, mut since) = (u64::MAX, Instant::now());
    while since.elapsed() < seconds(5) {
        let now = memory(pilot);
        // A page or two come and go.
        if now + (64 << 10) < least {
            since = Instant::now();
        }
        least = least.min(now);
        thread::sleep(Duration::from_millis(500));
    }
    least
}

/// Numbered lines until a file `stop` is there, and how many they are.
const COUNTER: &str =
    "n=0\nuntil [ -e stop ]; do n=$((n+1)); echo \"line $n\"; sleep 0.1; done\necho \"all $n\"\n";

/// Fails unless the text is all lines of a [`COUNTER`].
#[track_caller]
fn assert_whole(text: &str, who: &str) {
    let lines: Vec<&str> = text.lines().collect();
    let count = lines.len() - 1;
    assert_eq!(*lines.last().unwrap(), format!("all {count}"), "{who}");
    for (index, line) in lines[..count].iter().enumerate() {
        assert_eq!(*line, format!("line {}", index + 1), "{who}");
    }
}

/// Followers and execs at once on pods of their own; returns the most memory that was seen meanwhile.
fn load(namespace: &Namespace, pilot: &Pilot, round: usize) -> u64 {
    let name = |index: usize| format!("r{round}p{index}");
    for index in 0..PODS {
        namespace.pod_on(pilot, &name(index), pod_spec("Never", &[container("c1", "counter")]));
    }
    for index in 0..PODS {
        namespace.wait_phase(&name(index), "Running", seconds(60));
    }
    let (ns, node, server) = (namespace.name.as_str(), Https::node(pilot).as_admin(), Https::api_server());
    let begun = Barrier::new(FOLLOWERS + 1);
    let (ready, go) = (Barrier::new(EXECS + 1), Barrier::new(EXECS + 1));
    let mut peak = 0;
    thread::scope(|scope| {
        let followers: Vec<_> = (0..FOLLOWERS)
            .map(|index| {
                let (node, server, begun, pod) = (&node, &server, &begun, name(index % PODS));
                scope.spawn(move || {
                    // By both ways in.
                    let (whom, path) = match index % 2 {
                        0 => (node, format!("/containerLogs/{ns}/{pod}/c1?follow=true")),
                        _ => (server, format!("/api/v1/namespaces/{ns}/pods/{pod}/log?follow=true")),
                    };
                    let begin = || {
                        let mut connection = whom.open("GET", &path)?;
                        connection.sock.set_read_timeout(Some(seconds(120)))?;
                        read_head(&mut connection).map(|head| (connection, head))
                    };
                    let beginning = begin();
                    // One that failed must not keep all others waiting.
                    begun.wait();
                    let (mut connection, head) = beginning.unwrap_or_else(|error| panic!("{path}: {error}"));
                    assert_eq!(status(&head), 200, "{head}");
                    let mut text = Vec::new();
                    // Not every server says good-bye in TLS.
                    let _ = connection.read_to_end(&mut text);
                    assert_whole(&String::from_utf8_lossy(&dechunk(&text)), &path);
                })
            })
            .collect();
        begun.wait();
        let execs: Vec<_> = (0..EXECS)
            .map(|index| (name(index % PODS), &server, &ready, &go))
            .map(|(pod, server, ready, go)| scope.spawn(move || exec(server, ns, &pod, ready, go)))
            .collect();
        ready.wait();
        let running = pilot.processes().into_iter().filter(|(_, line)| line.contains("echo ready")).count();
        peak = peak.max(memory(pilot));
        go.wait();
        while !execs.iter().all(|exec| exec.is_finished()) {
            peak = peak.max(memory(pilot));
            thread::sleep(Duration::from_millis(20));
        }
        for index in 0..PODS {
            let stop = pilot.pod_directory(&name(index)).join("containers/c1/stop");
            std::fs::write(stop, "").unwrap();
        }
        followers.into_iter().chain(execs).for_each(|client| client.join().unwrap());
        assert_eq!(running, EXECS, "programs at the same time");
    });
    for index in 0..PODS {
        namespace.wait_phase(&name(index), "Succeeded", seconds(60));
        let log = bed().kubectl(&["-n", ns, "logs", &name(index)]).stdout;
        assert_whole(&log, &format!("the log of {}", name(index)));
        namespace.of("pods").delete(&name(index), None);
    }
    // Supervisor, bash and sleep of each pod are gone; what exec started is too.
    wait_until("nothing is left but guardian and pilot", seconds(30), || pilot.processes().len() == 2);
    peak
}

/// One program in a container, through the API server. When it runs it waits for all others, and then all write at once;
/// all of its output arrives.
fn exec(server: &Https, namespace: &str, pod: &str, ready: &Barrier, go: &Barrier) {
    let script = format!("echo+ready%3Bread+go%3Bhead+-c+{EXEC_BYTES}+/dev/zero+%7C+tr+%27%5C0%27+x");
    let path = format!(
        "/api/v1/namespaces/{namespace}/pods/{pod}/exec?container=c1&stdin=true&stdout=true&command=bash&command=-c&command={script}"
    );
    let begin = || -> std::io::Result<Connection> {
        let mut connection = server.websocket("v5.channel.k8s.io").open("GET", &path)?;
        connection.sock.set_read_timeout(Some(seconds(120)))?;
        let head = read_head(&mut connection)?;
        if status(&head) != 101 {
            return Err(std::io::Error::other(head));
        }
        let mut said: Vec<u8> = Vec::new();
        while said != b"ready\n" {
            match read_message(&mut connection)? {
                (2, message) if message.first() == Some(&1) => said.extend(&message[1..]),
                (8, _) => return Err(ErrorKind::UnexpectedEof.into()),
                _ => {}
            }
        }
        Ok(connection)
    };
    let beginning = begin();
    // One that failed must not keep all others waiting.
    ready.wait();
    go.wait();
    let mut connection = beginning.unwrap_or_else(|error| panic!("{path}: {error}"));
    say(&mut connection, 0, b"go\n").unwrap();
    let (output, end) = read_exec(&mut connection).unwrap();
    assert_eq!(end["status"], "Success", "{end}");
    assert!(output.len() == EXEC_BYTES && output.iter().all(|byte| *byte == b'x'), "{}", output.len());
}

#[test]
fn two_hundred_followers_and_fifty_execs_at_once_get_their_data_and_leave_nothing() {
    let namespace = Namespace::new("load");
    let pilot = Pilot::local(Options::new("load"), 900);
    namespace.config_map("counter", &[("run.sh", COUNTER)]);
    let before = memory(&pilot);
    let mut most = before + KEPT;
    for round in 0..ROUNDS {
        let peak = load(&namespace, &pilot, round);
        assert!(peak < before + (100 << 20), "{peak} bytes at the most, from {before}");
        wait_memory(&pilot, most);
        let after = settled_memory(&pilot);
        eprintln!("memory before {before}, peak {peak}, after {after}");
        most = after + ADDED;
    }
}

#[test]
fn slow_half_closed_and_lying_clients_cost_bounded_memory_and_no_container_its_output() {
    let namespace = Namespace::new("liars");
    let pilot = Pilot::local(Options::new("liars"), 900);
    namespace.script_on(&pilot, "p", COUNTER);
    // Some 60 MB as fast as it can, once somebody looks on.
    let script = "until [ -e go ]; do sleep 0.05; done\nyes 'a line that nobody reads' | head -n 2200000\ntouch done\nexec sleep 600\n";
    namespace.script_on(&pilot, "fast", script);
    for pod in ["p", "fast"] {
        namespace.wait_phase(pod, "Running", seconds(30));
    }
    let (ns, node) = (namespace.name.as_str(), Https::node(&pilot));
    let admin = node.as_admin();
    assert_eq!(admin.get("/healthz").status, 200);
    let before = memory(&pilot);

    // Never a byte of a handshake; half a handshake; a handshake and no request; half of a request.
    let mut silent: Vec<TcpStream> = (0..100).map(|_| TcpStream::connect(node.address).unwrap()).collect();
    for stream in &mut silent[..50] {
        stream.write_all(b"\x16\x03\x01\x02\x00\x01").unwrap();
    }
    let idle: Vec<_> = (0..50).map(|_| node.connect().unwrap()).collect();
    let half: Vec<_> = (0..50)
        .map(|_| {
            let mut connection = node.connect().unwrap();
            connection.write_all(b"GET /pods HTTP/1.1\r\nHost: x\r\nX-").unwrap();
            connection
        })
        .collect();
    // Followers that never read, of a container that writes as fast as it can.
    let deaf: Vec<_> = (0..20)
        .map(|_| admin.open("GET", &format!("/containerLogs/{ns}/fast/c1?follow=true")).unwrap())
        .collect();
    let fast = pilot.pod_directory("fast").join("containers/c1");
    std::fs::write(fast.join("go"), "").unwrap();

    // Upgraded connections that send garbage, that end their half, that go away at once.
    let sleep = format!("/exec/{ns}/p/c1?command=sleep&command=500&output=1&input=1");
    let joined = || {
        let mut connection = admin.websocket("v5.channel.k8s.io").open("GET", &sleep).unwrap();
        assert_eq!(status(&read_head(&mut connection).unwrap()), 101);
        connection
    };
    for lie in 0..12 {
        let mut connection = joined();
        match lie % 4 {
            // No frame; a frame of 2^62 bytes; one that is not masked.
            0 => connection.write_all(&[0xff; 4096]).unwrap(),
            1 => connection.write_all(&[0x82, 0xff, 0x40, 0, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4]).unwrap(),
            2 => connection.sock.shutdown(Shutdown::Write).unwrap(),
            _ => drop(connection),
        }
    }
    let mut connection = joined();
    connection.write_all(&[0x82, 0x01, 0x00]).unwrap();
    connection.flush().unwrap();
    // It is told, or left.
    while let Ok((opcode, _)) = read_message(&mut connection) {
        if opcode == 8 {
            break;
        }
    }
    wait_until("what the liars started is gone", seconds(30), || {
        let running = pilot.processes().into_iter().filter(|(_, line)| line.contains("sleep 500"));
        running.count() == 0
    });

    // Meanwhile others are served, soon.
    let start = Instant::now();
    assert_eq!(admin.get("/pods").status, 200);
    let log = admin.get(&format!("/containerLogs/{ns}/p/c1?tailLines=1"));
    assert!(log.body.starts_with("line "), "{}", log.body);
    assert!(start.elapsed() < seconds(5), "{:?}", start.elapsed());
    wait_until("the fast container was not held up", seconds(60), || fast.join("done").exists());
    // A deaf follower holds three pieces of 64 KiB, and what TLS and its socket have taken.
    assert!(memory(&pilot) < before + (40 << 20), "{} from {before}", memory(&pilot));

    // Who has said nothing for long is shown the door.
    for stream in &mut silent {
        stream.set_read_timeout(Some(seconds(20))).unwrap();
        let end = stream.read_to_end(&mut Vec::new());
        // An end, an alert, a reset: but no wait.
        let stays = end.is_err_and(|error| error.kind() == ErrorKind::WouldBlock);
        assert!(!stays, "a silent client may stay");
    }
    drop((silent, idle, half, deaf));
    std::fs::write(pilot.pod_directory("p").join("containers/c1/stop"), "").unwrap();
    namespace.wait_phase("p", "Succeeded", seconds(30));
    assert_whole(&admin.get(&format!("/containerLogs/{ns}/p/c1")).body, "the log of p");
    eprintln!("memory before {before}, after {}", memory(&pilot));
    wait_memory(&pilot, before + KEPT);
}

/// Clients that take nothing, each by WebSocket and by SPDY.
const DEAF: usize = 5;

/// Clients of port-forward whose streams never fit together.
const UNPAIRING: usize = 10;

/// What a container writes while clients that take nothing are attached to it: some 9 MB, more than what lies on the way
/// to a client (a pipe of 1 MiB, the sockets' buffers).
const LINES: usize = 150_000;

/// An upgraded connection.
fn upgraded(whom: &Https, path: &str) -> Connection {
    let mut connection = whom.open("GET", path).unwrap();
    let head = read_head(&mut connection).unwrap();
    assert_eq!(status(&head), 101, "{head}");
    connection
}

/// The frames that open the streams of an exec or attach by SPDY.
fn streams(kinds: &[&str]) -> Vec<u8> {
    let mut client = Spdy::default();
    kinds.iter().flat_map(|kind| client.open(&[("streamtype", kind)]).1).collect()
}

#[test]
fn lying_spdy_clients_and_deaf_ones_cost_bounded_memory_and_no_container_its_output() {
    let namespace = Namespace::new("deaf");
    let pilot = Pilot::local(Options::new("deaf"), 900);
    namespace.script_on(&pilot, "p", COUNTER);
    let script = format!(
        "until [ -e go ]; do sleep 0.05; done\nseq -f 'line %.0f of a text that nobody who is attached reads' {LINES}\n\
         touch done\nexec sleep 600\n"
    );
    namespace.script_on(&pilot, "fast", &script);
    for pod in ["p", "fast"] {
        namespace.wait_phase(pod, "Running", seconds(30));
    }
    let (ns, admin) = (namespace.name.as_str(), Https::node(&pilot).as_admin());
    assert_eq!(admin.get("/healthz").status, 200);
    let before = memory(&pilot);
    let (websocket, by_spdy) = (admin.websocket("v5.channel.k8s.io"), admin.spdy("v4.channel.k8s.io"));

    // SPDY that is none, a control frame of 16 MiB, a header block that is no zlib, streams that never come, a half of the
    // connection that is closed, a client that goes.
    let sleep = format!("/exec/{ns}/p/c1?command=sleep&command=501&output=1&input=1");
    let kinds = ["error", "stdin", "stdout"];
    let mut quiet = Vec::new();
    for lie in 0..12 {
        let mut connection = upgraded(&by_spdy, &sleep);
        match lie % 6 {
            0 => connection.write_all(&[0x55; 4096]).unwrap(),
            1 => connection.write_all(&[0x80, 3, 0, 1, 0, 0xff, 0xff, 0xff]).unwrap(),
            2 => connection.write_all(&[streams(&kinds), spdy::control(1, &[0xff; 64])].concat()).unwrap(),
            3 => connection.write_all(&streams(&kinds[..1])).unwrap(),
            4 => {
                connection.write_all(&streams(&kinds)).unwrap();
                connection.sock.shutdown(Shutdown::Write).unwrap();
            }
            _ => {
                connection.write_all(&streams(&kinds)).unwrap();
                drop(connection);
                continue;
            }
        }
        let _ = connection.flush();
        quiet.push(connection);
    }
    // Data streams that have no error stream, each with all that its buffer would hold: 80 MiB.
    let forward = admin.spdy("portforward.k8s.io");
    let bytes = vec![b'x'; 128 << 10];
    for _ in 0..UNPAIRING {
        let (mut connection, mut client) =
            (upgraded(&forward, &format!("/portForward/{ns}/p")), Spdy::default());
        for request in 0..64 {
            let headers = [("streamtype", "data"), ("port", "80"), ("requestid", &request.to_string())];
            let (id, frame) = client.open(&headers);
            connection.write_all(&frame).unwrap();
            connection.write_all(&spdy::data(id, &bytes)).unwrap();
        }
        connection.flush().unwrap();
        quiet.push(connection);
    }
    // Programs that write without an end to clients that take nothing, and clients that look on and do not.
    let yes = format!("/exec/{ns}/p/c1?command=yes&output=1");
    let watch = format!("/attach/{ns}/fast/c1?output=1&error=1");
    for _ in 0..DEAF {
        quiet.push(upgraded(&websocket, &yes));
        quiet.push(upgraded(&websocket, &watch));
        for (path, kinds) in [(&yes, &["error", "stdout"][..]), (&watch, &["error", "stdout", "stderr"])] {
            let mut connection = upgraded(&by_spdy, path);
            connection.write_all(&streams(kinds)).unwrap();
            connection.flush().unwrap();
            quiet.push(connection);
        }
    }
    wait_until("the programs run", seconds(30), || {
        pilot.processes().iter().filter(|(_, line)| line.trim_end() == "yes").count() == 2 * DEAF
    });
    let fast = pilot.pod_directory("fast").join("containers/c1");
    std::fs::write(fast.join("go"), "").unwrap();
    wait_until("the container was not held up", seconds(60), || fast.join("done").exists());
    let start = Instant::now();
    assert_eq!(admin.get("/pods").status, 200);
    assert!(start.elapsed() < seconds(5), "{:?}", start.elapsed());
    // Ten times a megabyte, and what twenty deaf clients hold: an outbox of 256 KiB, a read of 64 KiB for each output.
    let now = memory(&pilot);
    eprintln!("memory before {before}, with all of them {now}");
    assert!(now < before + (32 << 20), "{now} from {before}");
    let log = admin.get(&format!("/containerLogs/{ns}/fast/c1")).body;
    let whole = log.lines().enumerate().all(|(at, line)| line.starts_with(&format!("line {} of", at + 1)));
    assert!(whole && log.lines().count() == LINES, "{} lines", log.lines().count());

    drop(quiet);
    wait_until("what they started is gone", seconds(45), || {
        let left = |line: &str| line.contains("sleep 501") || line.trim_end() == "yes";
        !pilot.processes().iter().any(|(_, line)| left(line))
    });
    std::fs::write(pilot.pod_directory("p").join("containers/c1/stop"), "").unwrap();
    namespace.wait_phase("p", "Succeeded", seconds(30));
    assert_whole(&admin.get(&format!("/containerLogs/{ns}/p/c1")).body, "the log of p");
    wait_memory(&pilot, before + KEPT);
}
