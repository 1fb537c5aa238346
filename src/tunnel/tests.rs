//! Tunnels through a real sshd on a loopback port.

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt as _;
use std::process::{Child, Command, Stdio};

use super::*;
use crate::allocation::command::is_ours;
use crate::allocation::stand_in::StandIn;
use crate::container::process;

const LIMIT: Duration = Duration::from_secs(20);

/// An sshd with a key, a port and files of its own, and an ssh whose configuration calls it `login`.
struct Login {
    directory: tempfile::TempDir,
    programs: StandIn,
    port: u16,
    sshd: Option<Child>,
}

impl Login {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path();
        for key in ["host", "key"] {
            let mut keygen = Command::new("ssh-keygen");
            keygen.args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(path.join(key));
            assert!(keygen.status().unwrap().success());
        }
        let port = free_port();
        let at = path.display();
        let host = std::fs::read_to_string(path.join("host.pub")).unwrap();
        let write = |name: &str, text: String| std::fs::write(path.join(name), text).unwrap();
        write("known_hosts", format!("[127.0.0.1]:{port} {host}"));
        // As docs/allocation-owner.md says: such a key is good for tunnels alone.
        let key = std::fs::read_to_string(path.join("key.pub")).unwrap();
        write("authorized", format!("restrict,port-forwarding {key}"));
        write(
            "sshd_config",
            format!(
                "Port {port}\nListenAddress 127.0.0.1\nHostKey {at}/host\nAuthorizedKeysFile {at}/authorized\nPidFile none\n\
                 UsePAM no\nStrictModes no\nGatewayPorts clientspecified\n"
            ),
        );
        // A user's configuration with all that must not disturb.
        write(
            "config",
            format!(
                "Host login\n HostName 127.0.0.1\n Port {port}\n UserKnownHostsFile {at}/known_hosts\n IdentityFile {at}/key\n \
                 IdentityAgent none\n LocalForward 1 127.0.0.1:1\n ControlMaster auto\n ControlPath {at}/shared\n \
                 ControlPersist yes\n LogLevel QUIET\n"
            ),
        );
        let programs = StandIn::new().script("ssh", &format!("exec /usr/bin/ssh -F {at}/config \"$@\""));
        let mut login = Self { directory, programs, port, sshd: None };
        login.start();
        login
    }

    fn start(&mut self) {
        // Where sshd, as root, locks its unprivileged part in. Others need no such directory.
        let _ = std::fs::create_dir_all("/run/sshd");
        let log = std::fs::File::create(self.directory.path().join("sshd.log")).unwrap();
        let sshd = Command::new("/usr/sbin/sshd")
            .args(["-D", "-e", "-f"])
            .arg(self.directory.path().join("sshd_config"))
            .stdin(Stdio::null())
            .stderr(log)
            .spawn();
        self.sshd = Some(sshd.expect("/usr/sbin/sshd cannot be started: apt-get install openssh-server"));
        for _ in 0..200 {
            if TcpStream::connect(("127.0.0.1", self.port)).is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        panic!("{}", std::fs::read_to_string(self.directory.path().join("sshd.log")).unwrap());
    }

    /// With all of its connections, as a login host that goes down.
    fn stop(&mut self) {
        if let Some(mut sshd) = self.sshd.take() {
            process::kill_tree(i32::try_from(sshd.id()).unwrap());
            sshd.wait().unwrap();
        }
    }

    async fn tunnels(&self, urls: &[&str], node_port: Option<u16>, api: u16) -> Tunnels {
        let settings = urls.iter().map(|url| url::parse(url).unwrap()).collect();
        let env = self.programs.environment([]);
        let api = ("127.0.0.1".to_owned(), api);
        let state =
            tempfile::Builder::new().prefix("state").tempdir_in(self.directory.path()).unwrap().keep();
        spawn(settings, node_port, api, &state, &env).await.unwrap()
    }
}

impl Drop for Login {
    fn drop(&mut self) {
        self.stop();
    }
}

fn free_port() -> u16 {
    TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap().port()
}

/// A server that answers with its own byte.
fn server(byte: u8) -> u16 {
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let _ = stream.write_all(&[byte]);
        }
    });
    port
}

/// The byte that is to be had at a port; none when the connection is refused or closed.
async fn byte_at(port: u16) -> Option<u8> {
    let asked = tokio::task::spawn_blocking(move || {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).ok()?;
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        let mut byte = [0];
        stream.read_exact(&mut byte).ok()?;
        Some(byte[0])
    });
    asked.await.unwrap()
}

async fn until(tunnels: &Tunnels, holds: impl Fn(&Status) -> bool) -> Status {
    let mut statuses = tunnels.statuses();
    let found = tokio::time::timeout(LIMIT, statuses.wait_for(|all| holds(&all[0]))).await;
    match found {
        Ok(all) => all.unwrap()[0].clone(),
        Err(_) => panic!("waited in vain: {:?}", tunnels.statuses().borrow()),
    }
}

/// The process that serves a tunnel: what holds its control socket's directory as its working directory.
fn processes_in(login: &Login) -> Vec<i32> {
    let at = login.directory.path();
    let inside = |pid: &i32| {
        std::fs::read_link(format!("/proc/{pid}/cwd")).is_ok_and(|cwd| cwd.starts_with(at))
            && process::stat(*pid).is_some_and(|stat| stat.state != 'Z')
    };
    process::all().into_iter().filter(inside).collect()
}

async fn none_left(login: &Login) {
    for _ in 0..200 {
        if processes_in(login).is_empty() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("{:?}", processes_in(login).into_iter().map(process::describe).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_byte_reaches_this_host_by_a_far_port_that_sshd_chose() {
    let login = Login::new();
    let tunnels = login.tunnels(&["ssh://login"], Some(server(b'n')), server(b'a')).await;
    let status = until(&tunnels, |s| s.up).await;
    assert_eq!(byte_at(status.far_port.unwrap()).await, Some(b'n'));
    assert_eq!(byte_at(tunnels.api().unwrap().port()).await, Some(b'a'));
    // The name in ssh's configuration is resolved.
    assert_eq!((status.far_host.as_str(), status.far_address), ("127.0.0.1", Some([127, 0, 0, 1].into())));
    assert_eq!(status.problem, None);
    tunnels.wait(Duration::from_secs(1)).await.unwrap();
    // Nobody else of this host gets at the sockets.
    for entry in std::fs::read_dir(tunnel_directory(&login)).unwrap().flatten() {
        assert_eq!(entry.metadata().unwrap().permissions().mode() & 0o077, 0, "{entry:?}");
    }
    // The connection that the user's configuration shares is not ours to use.
    assert!(!login.directory.path().join("shared").exists());
}

fn tunnel_directory(login: &Login) -> PathBuf {
    let pid = processes_in(login)[0];
    std::fs::read_link(format!("/proc/{pid}/cwd")).unwrap()
}

#[tokio::test]
async fn a_login_host_that_goes_down_is_told_and_used_again_when_it_is_back() {
    let mut login = Login::new();
    let tunnels = login.tunnels(&["ssh://login"], Some(server(b'n')), server(b'a')).await;
    let api = tunnels.api().unwrap();
    let first = until(&tunnels, |s| s.up).await;
    login.stop();
    let down = until(&tunnels, |s| !s.up).await;
    assert!(down.since > first.since && down.far_port.is_none() && down.problem.is_some(), "{down:?}");
    until(&tunnels, |s| s.problem.as_deref().is_some_and(|p| p.contains("Connection refused"))).await;
    login.start();
    let back = until(&tunnels, |s| s.up).await;
    assert!(back.since > down.since && back.problem.is_none(), "{back:?}");
    assert_eq!(byte_at(back.far_port.unwrap()).await, Some(b'n'));
    assert_eq!((tunnels.api().unwrap(), byte_at(api.port()).await), (api, Some(b'a')));
}

#[tokio::test]
async fn ports_of_pods_come_and_go_while_the_tunnel_stays() {
    let login = Login::new();
    let tunnels = login.tunnels(&["ssh://login?ports=pods"], Some(server(b'n')), 1).await;
    let node = until(&tunnels, |s| s.up).await;
    let (one, two) = (server(b'1'), server(b'2'));
    let wanted = tunnels.ports();
    wanted.send_replace(BTreeSet::from([one, two]));
    let status = until(&tunnels, |s| s.ports.len() == 2).await;
    assert_eq!(byte_at(status.ports[&one]).await, Some(b'1'));
    assert_eq!(byte_at(status.ports[&two]).await, Some(b'2'));
    wanted.send_replace(BTreeSet::from([two]));
    let left = until(&tunnels, |s| s.ports.len() == 1).await;
    assert_eq!(byte_at(status.ports[&one]).await, None);
    assert_eq!(byte_at(left.ports[&two]).await, Some(b'2'));
    assert_eq!((left.since, left.far_port), (node.since, node.far_port), "it was started anew");
}

#[tokio::test]
async fn a_far_port_that_is_taken_keeps_the_tunnel_down_until_it_is_free() {
    let login = Login::new();
    let taken = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let port = taken.local_addr().unwrap().port();
    let url = format!("ssh://login?bind=127.0.0.1&remote-port={port}");
    let tunnels = login.tunnels(&[&url], Some(server(b'n')), 1).await;
    let down = until(&tunnels, |s| s.problem.is_some()).await;
    let problem = down.problem.unwrap();
    assert!(problem.contains(&format!("port {port} at 127.0.0.1")), "{problem}");
    let error = tunnels.wait(Duration::from_millis(50)).await.unwrap_err().to_string();
    assert!(error.contains("ssh://login") && error.contains(&port.to_string()), "{error}");
    drop(taken);
    assert_eq!(until(&tunnels, |s| s.up).await.far_port, Some(port));
    assert_eq!(byte_at(port).await, Some(b'n'));
}

#[tokio::test]
async fn a_host_key_that_nobody_knows_is_refused() {
    let login = Login::new();
    std::fs::write(login.directory.path().join("known_hosts"), "").unwrap();
    let tunnels = login.tunnels(&["ssh://login"], None, 1).await;
    let down = until(&tunnels, |s| s.problem.is_some()).await;
    assert_eq!(down.problem.as_deref(), Some("Host key verification failed."));
}

#[tokio::test]
async fn one_tunnel_stands_in_for_another_on_the_way_to_the_api_server() {
    let (mut one, other) = (Login::new(), Login::new());
    // Both are called `login`, so the second goes by its parts.
    let at = other.directory.path().display();
    std::fs::copy(other.directory.path().join("known_hosts"), one.directory.path().join("other")).unwrap();
    let config = one.directory.path().join("config");
    let text = std::fs::read_to_string(&config).unwrap();
    let more = format!(
        "Host other\n HostName 127.0.0.1\n Port {}\n UserKnownHostsFile {at}/known_hosts\n IdentityFile {at}/key\n",
        other.port
    );
    std::fs::write(&config, text + &more).unwrap();
    let tunnels = one.tunnels(&["ssh://login", "ssh://other"], None, server(b'a')).await;
    let mut statuses = tunnels.statuses();
    statuses.wait_for(|all| all.iter().all(|s| s.up)).await.unwrap();
    one.stop();
    until(&tunnels, |s| !s.up).await;
    assert_eq!(byte_at(tunnels.api().unwrap().port()).await, Some(b'a'));
}

#[tokio::test]
async fn ssh_is_known_as_a_child_of_ours_and_ends_with_the_tunnels() {
    let login = Login::new();
    let tunnels = login.tunnels(&["ssh://login"], None, 1).await;
    until(&tunnels, |s| s.up).await;
    let own = nix::unistd::getpid().as_raw();
    let found = processes_in(&login);
    let child = found.iter().find(|pid| process::stat(**pid).is_some_and(|s| s.parent == own)).unwrap();
    assert!(is_ours(*child));
    drop(tunnels);
    none_left(&login).await;
}

/// What a pilot leaves that was killed by SIGKILL: its end of a pipe is closed, and nothing else happens.
#[tokio::test]
async fn ssh_outlives_the_signals_of_pbs_and_not_the_end_of_its_pipe() {
    let login = Login::new();
    let args = ssh::master("ssh", &url::parse("ssh://login?api=0").unwrap(), 0);
    let mut command = Command::new("/bin/sh");
    command
        .args(args)
        .current_dir(login.directory.path())
        .env("PATH", login.programs.environment([]).get("PATH").unwrap());
    let mut shell = command.stdin(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let control = login.directory.path().join(ssh::control_socket(0));
    while !control.exists() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let both = processes_in(&login);
    assert_eq!(both.len(), 2, "{both:?}");
    for pid in &both {
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(*pid), nix::sys::signal::Signal::SIGTERM).unwrap();
    }
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(processes_in(&login), both);
    drop(shell.stdin.take());
    none_left(&login).await;
    shell.wait().unwrap();
}

#[tokio::test]
async fn without_ssh_there_are_no_tunnels() {
    let directory = tempfile::tempdir().unwrap();
    let env = Environment::from_pairs([("PATH", "/nonexistent")]);
    let api = ("127.0.0.1".to_owned(), 1);
    let settings = vec![url::parse("ssh://login").unwrap()];
    let error = spawn(settings, None, api, directory.path(), &env).await.unwrap_err().to_string();
    assert!(error.contains("/nonexistent") && error.contains("--tunnel"), "{error}");
}
