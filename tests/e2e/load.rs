//! Many clients of the Node's API at once, and bad ones: each honest one gets all of its data, the pilot's memory
//! stays bounded and comes back, and no container loses a line.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{Shutdown, TcpStream};
use std::path::PathBuf;
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use crate::harness::https::{Https, dechunk, read_exec, read_head, read_message, status};
use crate::harness::{Namespace, Options, Pilot, bed, container, pod_spec, read, seconds, wait_until};

const PODS: usize = 16;
const FOLLOWERS: usize = 200;
const EXECS: usize = 50;
/// What each exec writes.
const EXEC_BYTES: usize = 1_000_000;

/// Loads, one after the other: what each leaves behind adds up.
const ROUNDS: usize = 2;

/// What the pilot may keep of loads that are over: pages of its heap in which a block is still in use, and connections
/// to the API server, kept for some time. Four loads left some 9 MB, the last of them nothing more. A leak of
/// 40 KiB for each client would be 10 MB a load; that of the buffers of one follower (three pieces of 256 KiB) 150 MB.
const KEPT: u64 = 12 << 20;

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
            .map(|index| (name(index % PODS), &server))
            .map(|(pod, server)| scope.spawn(move || exec(server, ns, &pod)))
            .collect();
        while !execs.iter().all(|exec| exec.is_finished()) {
            peak = peak.max(memory(pilot));
            thread::sleep(Duration::from_millis(100));
        }
        for index in 0..PODS {
            let stop = pilot.pod_directory(&name(index)).join("containers/c1/stop");
            std::fs::write(stop, "").unwrap();
        }
        followers.into_iter().chain(execs).for_each(|client| client.join().unwrap());
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

/// One program in a container, through the API server; all of its output arrives.
fn exec(server: &Https, namespace: &str, pod: &str) {
    let script = format!("head+-c+{EXEC_BYTES}+/dev/zero+%7C+tr+'%5C0'+x");
    let path = format!(
        "/api/v1/namespaces/{namespace}/pods/{pod}/exec?container=c1&stdout=true&command=bash&command=-c&command={}",
        script.replace('\'', "%27")
    );
    let mut connection = server.websocket("v5.channel.k8s.io").open("GET", &path).unwrap();
    connection.sock.set_read_timeout(Some(seconds(120))).unwrap();
    let head = read_head(&mut connection).unwrap();
    assert_eq!(status(&head), 101, "{head}");
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
    for round in 0..ROUNDS {
        let peak = load(&namespace, &pilot, round);
        assert!(peak < before + (100 << 20), "{peak} bytes at the most, from {before}");
        wait_memory(&pilot, before + KEPT);
        eprintln!("memory before {before}, peak {peak}, after {}", memory(&pilot));
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
    // A deaf follower holds three pieces of 256 KiB, and what TLS and its socket have taken.
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
