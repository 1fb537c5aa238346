//! An API server that is reached through a login host's sshd and in no other way.

use std::io::Read as _;
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, User};
use serde_json::{Value, json};

use crate::certificates;
use crate::harness::{
    ALICE, BOB, Namespace, Options, Pilot, as_user, bed, condition, run, seconds, shared_directory, unique,
    wait_for, wait_until,
};

/// A name of the test control plane's certificate that nobody on this host knows; the login host does.
const API_HOST: &str = "kubernetes.default.svc";

/// A login host: an sshd with keys, a port and an /etc/hosts of its own; and an ssh that knows it as `login`.
struct Login {
    directory: PathBuf,
    address: &'static str,
    port: u16,
    sshd: Option<Child>,
}

impl Login {
    fn new() -> Self {
        Self::at("127.0.0.1")
    }

    /// One with another loopback address.
    fn at(address: &'static str) -> Self {
        // Not in a directory that only root enters: alice's ssh reads there.
        let directory = PathBuf::from("/tmp").join(unique("jiriaf-test-login"));
        std::fs::create_dir(&directory).unwrap();
        let port = free_port();
        let at = directory.display();
        for key in ["host", "key"] {
            let mut keygen = Command::new("ssh-keygen");
            keygen.args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(directory.join(key));
            assert!(run(&mut keygen).success);
        }
        let read = |name: &str| std::fs::read_to_string(directory.join(name)).unwrap();
        let write = |name: &str, text: String| std::fs::write(directory.join(name), text).unwrap();
        write("known_hosts", format!("[{address}]:{port} {}", read("host.pub")));
        write("authorized", read("key.pub"));
        write("hosts", format!("127.0.0.1 localhost {API_HOST}\n"));
        write(
            "sshd_config",
            format!(
                "Port {port}\nListenAddress {address}\nHostKey {at}/host\nAuthorizedKeysFile {at}/authorized\nPidFile none\n\
                 UsePAM no\nStrictModes no\nPermitRootLogin prohibit-password\nGatewayPorts clientspecified\n"
            ),
        );
        write("ssh", format!("#!/bin/sh\nexec /usr/bin/ssh -F {at}/config \"$@\"\n"));
        let mut login = Self { directory: directory.clone(), address, port, sshd: None };
        write("config", login.host("login"));
        let mode = |name: &str, mode| {
            std::fs::set_permissions(directory.join(name), std::fs::Permissions::from_mode(mode)).unwrap();
        };
        mode("ssh", 0o755);
        mode("config", 0o644);
        let alice = User::from_name(ALICE).unwrap().unwrap();
        chown(directory.join("key"), Some(alice.uid.as_raw()), None).unwrap();
        login.start();
        login
    }

    /// How ssh's configuration describes it under a name.
    fn host(&self, name: &str) -> String {
        let (address, port, at) = (self.address, self.port, self.directory.display());
        format!(
            "Host {name}\n HostName {address}\n Port {port}\n User root\n UserKnownHostsFile {at}/known_hosts\n \
             IdentityFile {at}/key\n"
        )
    }

    /// Its ssh knows another one under this name.
    fn knows(&self, other: &Self, name: &str) {
        let file = self.directory.join("config");
        let text = std::fs::read_to_string(&file).unwrap();
        std::fs::write(file, text + &other.host(name)).unwrap();
    }

    fn start(&mut self) {
        let _ = std::fs::create_dir_all("/run/sshd");
        let at = self.directory.display();
        let script = format!(
            "mount --bind {at}/hosts /etc/hosts && exec /usr/sbin/sshd -D -e -f {at}/sshd_config 2>>{at}/log"
        );
        let sshd =
            Command::new("unshare").args(["--mount", "sh", "-c", &script]).stdin(Stdio::null()).spawn();
        self.sshd = Some(sshd.unwrap());
        let address = (self.address, self.port);
        wait_until("sshd listens", seconds(10), || TcpStream::connect(address).is_ok());
    }

    /// Goes down with its connections.
    fn stop(&mut self) {
        if let Some(mut sshd) = self.sshd.take() {
            run(Command::new("pkill").args(["-KILL", "-P", &sshd.id().to_string()]));
            sshd.kill().unwrap();
            sshd.wait().unwrap();
        }
    }

    /// With its ssh.
    fn ssh(&self, label: &'static str) -> Options {
        Options::new(label).env("PATH", &format!("{}:/usr/local/bin:/usr/bin:/bin", self.directory.display()))
    }

    /// With its ssh, and an API server that nobody else knows.
    fn options(&self, label: &'static str) -> Options {
        let port = bed().api_server().rsplit_once(':').unwrap().1.to_owned();
        let mut options = self.ssh(label);
        options.server = Some(format!("https://{API_HOST}:{port}"));
        options
    }
}

impl Drop for Login {
    fn drop(&mut self) {
        self.stop();
        if !std::thread::panicking() {
            let _ = std::fs::remove_dir_all(&self.directory);
        }
    }
}

fn free_port() -> u16 {
    TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap().port()
}

fn node(pilot: &Pilot) -> Value {
    pilot.nodes().into_iter().next().expect("the Node is there")
}

#[test]
fn a_pilot_behind_a_firewall_works_through_its_login_host() {
    let namespace = Namespace::new("tunnel");
    let mut login = Login::new();
    // The second leads nowhere, and the Node says so.
    let own = free_port();
    let options = login
        .options("tunnel")
        .arg("--tunnel=ssh://login?ports=pods,ssh://nobody@127.0.0.1:1?api=0")
        .arg(&format!("--port={own}"));
    let mut pilot = Pilot::local(options, 600);
    let down = wait_for("the Node says that a tunnel is down", seconds(20), || {
        let condition = condition(&node(&pilot), "TunnelDown");
        let known = condition["message"].as_str().is_some_and(|text| text.contains("Connection refused"));
        known.then_some(condition)
    });
    assert_eq!(
        (&down["status"], &down["reason"]),
        (&json!("True"), &json!("SomeTunnelsAreDown")),
        "{down:#}"
    );
    // The login host's address, not this one's.
    let addresses = node(&pilot)["status"]["addresses"].clone();
    assert_eq!(addresses[0], json!({"type": "InternalIP", "address": "127.0.0.1"}));

    let port = free_port();
    let serve = format!(
        "echo serving\nexec perl -MIO::Socket::INET -e '$s = IO::Socket::INET->new(LocalAddr => \"127.0.0.1\", LocalPort => {port}, \
         Listen => 9, ReuseAddr => 1) or die $!; while ($c = $s->accept) {{ print $c \"from the pod\"; close $c }}'\n"
    );
    namespace.config_map("p", &[("run.sh", &serve)]);
    let spec = json!({
        "restartPolicy": "Never", "terminationGracePeriodSeconds": 1,
        "containers": [{"name": "c1", "image": "p", "command": ["bash"], "ports": [{"containerPort": port}],
            "volumeMounts": [{"name": "p", "mountPath": "job"}]}],
        "volumes": [{"name": "p", "configMap": {"name": "p"}}],
    });
    namespace.pod_on(&pilot, "p", spec);
    let far = |but: Option<&str>| {
        wait_for("the pod says where its port is reached", seconds(60), || {
            let pod = namespace.pod("p").unwrap();
            let told = pod["metadata"]["annotations"][format!("jiriaf.tunnel/{port}")].as_str()?.to_owned();
            let mut text = String::new();
            TcpStream::connect(&told).ok()?.read_to_string(&mut text).ok()?;
            (Some(told.as_str()) != but && text == "from the pod").then_some(told)
        })
    };
    let first = far(None);
    // kubectl reaches the Node by the port that the login host has given, not by its own.
    let logs = || {
        let given = node(&pilot)["status"]["daemonEndpoints"]["kubeletEndpoint"]["Port"].clone();
        assert_ne!(given, json!(own));
        let output = bed().kubectl(&["-n", &namespace.name, "logs", "p"]);
        output.success && output.text.contains("serving")
    };
    wait_until("kubectl logs goes through the tunnel", seconds(20), logs);
    let before = node(&pilot);

    // A login host that is rebooted.
    login.stop();
    login.start();
    assert_ne!(far(Some(&first)), first);
    assert_eq!(node(&pilot)["metadata"]["uid"], before["metadata"]["uid"]);
    wait_until("kubectl logs goes through the tunnel again", seconds(60), logs);

    // The end is told through the tunnel too, and nothing stays.
    pilot.signal(Signal::SIGTERM);
    assert_eq!(pilot.wait_exit(seconds(30)), Some(0));
    assert_eq!(pilot.nodes(), Vec::<Value>::new());
    assert_eq!(pilot.processes(), Vec::<(i32, String)>::new());
}

/// The ports of 127.0.0.1 at which a process listens.
fn listens_at(pid: i32) -> Vec<u16> {
    let sockets: Vec<PathBuf> = std::fs::read_dir(format!("/proc/{pid}/fd"))
        .unwrap()
        .filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok())
        .collect();
    let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
    let ports = table.lines().skip(1).filter_map(|line| {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        let port = fields[1].strip_prefix("0100007F:")?;
        let own = sockets.contains(&PathBuf::from(format!("socket:[{}]", fields[9])));
        (own && fields[3] == "0A").then(|| u16::from_str_radix(port, 16).unwrap())
    });
    ports.collect()
}

#[test]
fn other_users_of_the_host_have_no_part_in_the_way_to_the_api_server() {
    let namespace = Namespace::new("private-way");
    let mut login = Login::new();
    let pilot = Pilot::local(login.options("private-way").arg("--tunnel=ssh://login"), 600);
    let [process] = pilot.stages("pilot")[..] else { panic!("one pilot was expected") };
    let [port] = listens_at(process)[..] else { panic!("one port was expected") };
    let url = format!("https://127.0.0.1:{port}/version");
    let version = |user: &str| {
        let mut curl = as_user(user, "curl");
        run(curl.args(["--silent", "--show-error", "--insecure", "--max-time", "20", &url]))
    };
    let ours = version(ALICE);
    assert!(ours.text.contains("gitVersion"), "{}", ours.text);
    let theirs = version(BOB);
    assert!(!theirs.success && theirs.stdout.is_empty(), "{}", theirs.text);
    wait_until("the pilot says that somebody tried", seconds(10), || {
        pilot.output().contains("a connection to this host's end of the tunnels was closed")
    });

    // Three hundred that say nothing: each would be led to the API server, which waits for half a minute.
    let hold = format!(
        "use IO::Socket::INET; my @all = map {{ IO::Socket::INET->new(PeerAddr => '127.0.0.1', PeerPort => {port}) }} 1..300; \
         $| = 1; print scalar(@all), \"\\n\"; sleep 60"
    );
    let mut bob = as_user(BOB, "perl").args(["-e", &hold]).stdout(Stdio::piped()).spawn().unwrap();
    let mut said = [0; 4];
    bob.stdout.as_mut().unwrap().read_exact(&mut said).unwrap();
    assert_eq!(&said, b"300\n");
    // The pilot must connect anew, and works on.
    login.stop();
    login.start();
    wait_until("the tunnel is up again", seconds(60), || {
        condition(&node(&pilot), "TunnelDown")["status"] == "False"
            && pilot.output().matches("the tunnel is up").count() == 2
    });
    namespace.script_on(&pilot, "p", "exit 0\n");
    namespace.wait_phase("p", "Succeeded", seconds(15));
    assert!(bob.try_wait().unwrap().is_none(), "bob's connections were not held");
    // timeout(1) hands it on.
    kill(Pid::from_raw(bob.id().try_into().unwrap()), Signal::SIGTERM).unwrap();
    bob.wait().unwrap();
}

#[test]
fn a_node_that_moves_to_another_login_host_is_still_known_by_its_certificate() {
    let (_, token) = certificates::bootstrap_token();
    let directory = shared_directory();
    let file = certificates::kubeconfig(directory.path(), &token);
    let (mut one, other) = (Login::new(), Login::at("127.0.0.2"));
    one.knows(&other, "other");
    let options = one.ssh("two-logins").env("JIRIAF_BOOTSTRAP_KUBECONFIG", &file);
    let pilot = Pilot::local(options.arg("--tunnel=ssh://login?api=0,ssh://other?api=0"), 600);
    let namespace = Namespace::new("two-logins");
    namespace.script_on(&pilot, "p", "echo served\n");
    namespace.wait_phase("p", "Succeeded", seconds(30));
    let strict = certificates::strict_api_server();
    let served = || {
        let logs = certificates::logs_by(&strict, &namespace.name, "p");
        logs.success && logs.text.contains("served")
    };
    let address = || node(&pilot)["status"]["addresses"][0]["address"].clone();
    wait_until("both tunnels are up", seconds(30), || {
        pilot.output().matches("the tunnel is up").count() == 2
    });
    wait_until("the Node is at the first", seconds(30), || address() == json!("127.0.0.1"));
    certificates::approve_until(&pilot, "the API server knows the Node", served);
    one.stop();
    wait_until("the Node is at the second", seconds(60), || address() == json!("127.0.0.2"));
    certificates::approve_until(&pilot, "the API server knows it there too", served);
    // Nobody had to approve anything when it moved.
    assert_eq!(pilot.output().matches("serves with a certificate of the cluster").count(), 1);
}

#[test]
fn a_login_host_that_does_not_let_the_pilot_in_is_named() {
    let login = Login::new();
    std::fs::write(login.directory.join("authorized"), "").unwrap();
    let options = login.options("nologin").arg("--tunnel=ssh://login").arg("--startup-timeout=3s");
    let mut pilot = Pilot::start_local(&options, 600);
    assert_eq!(pilot.wait_exit(seconds(30)), Some(1));
    let output = pilot.output();
    assert!(output.contains("ssh://login") && output.contains("Permission denied"), "{output}");
    assert_eq!(pilot.nodes(), Vec::<Value>::new());
}
