//! What ssh is told and what it says: argument vectors and answers, made of and read from values.
//!
//! The connection is a master ([`master`]) that forwards nothing by itself. Everything is asked of it through its control
//! socket ([`control`]), one by one: so each forward has an answer, the port that sshd chose among it, and one can be
//! added or taken back while the others go on (ssh(1), `-O`).

use super::url::Settings;

/// How often ssh asks whether the far side is there, in seconds, and how many times in vain. The product must stay below
/// the 40 s for which a Node's Lease holds: then a way that broke silently is mended before the Node is given up.
const ALIVE: (u32, u32) = (10, 3);

/// How long ssh tries to connect, in seconds: as long as a client of the API server does, and some for the key exchange.
pub const CONNECT_SECONDS: u32 = 15;

/// What starts ssh: a shell that does nothing but end it when its own standard input ends, which it does whatever the
/// pilot dies of. ssh and what it starts (a ProxyJump) ignore the signals that PBS sends to every process of a job: the
/// drain after them needs the tunnel. ssh keeps an ignored signal ignored (clientloop.c, `client_loop`).
const KEEP: &str = r#"trap '' TERM INT HUP QUIT
"$@" </dev/null & ssh=$!
exec 2>/dev/null
read -r _
kill -9 "$ssh""#;

/// Settings of the connection that hold whatever ssh's configuration says. Whom to trust (known_hosts,
/// StrictHostKeyChecking), keys, jumps and proxies stay the user's.
const OPTIONS: [&str; 14] = [
    // Nobody is there to answer a question.
    "BatchMode=yes",
    "ConnectionAttempts=1",
    // A master of our own: one that the user has open would end with it.
    "ControlMaster=yes",
    "ControlPersist=no",
    // Forwards of the configuration are not ours; ours are asked for one by one, and a refused one counts as it says.
    "ClearAllForwardings=yes",
    "ExitOnForwardFailure=yes",
    "ForwardAgent=no",
    "ForwardX11=no",
    "Tunnel=no",
    "PermitLocalCommand=no",
    // The socket of a dead tunnel is in the way of the next; ours alone may connect.
    "StreamLocalBindUnlink=yes",
    "StreamLocalBindMask=0177",
    // The reason of an end is said at this level (clientloop.c, `server_alive_check`).
    "LogLevel=INFO",
    "TCPKeepAlive=yes",
];

/// The name of a tunnel's control socket. Names are relative to the directory in which ssh is started: the path of a
/// socket has 107 bytes at most (unix(7)), of which ssh takes 17 for a name of its own.
#[must_use]
pub fn control_socket(index: usize) -> String {
    format!("{index}.control")
}

/// The name of the socket that leads through a tunnel to the API server.
#[must_use]
pub fn api_socket(index: usize) -> String {
    format!("{index}.api")
}

/// The arguments of `/bin/sh` that start the connection and keep it while standard input is open.
#[must_use]
pub fn master(program: &str, settings: &Settings, index: usize) -> Vec<String> {
    let mut args: Vec<String> =
        ["-c", KEEP, "jiriaf-tunnel", program, "-N", "-T", "-S"].map(str::to_owned).into();
    args.push(control_socket(index));
    let alive = [
        format!("ServerAliveInterval={}", ALIVE.0),
        format!("ServerAliveCountMax={}", ALIVE.1),
        format!("ConnectTimeout={CONNECT_SECONDS}"),
    ];
    for option in OPTIONS.into_iter().map(str::to_owned).chain(alive) {
        args.extend(["-o".to_owned(), option]);
    }
    if let Some(identity) = &settings.identity {
        // Without IdentitiesOnly an agent's keys come first, and sshd gives up after six (MaxAuthTries).
        args.extend(["-o", "IdentitiesOnly=yes", "-i", identity].map(str::to_owned));
    }
    args.extend(destination(settings));
    args
}

/// Port, user and host, with the host behind `--`.
fn destination(settings: &Settings) -> Vec<String> {
    let mut args = Vec::new();
    if let Some(port) = settings.port {
        args.extend(["-p".to_owned(), port.to_string()]);
    }
    if let Some(user) = &settings.user {
        args.extend(["-l".to_owned(), user.clone()]);
    }
    args.extend(["--".to_owned(), settings.host.clone()]);
    args
}

/// The arguments of ssh that print its configuration for this host, the host's real name among it.
#[must_use]
pub fn resolve(settings: &Settings) -> Vec<String> {
    let mut args = vec!["-G".to_owned()];
    args.extend(destination(settings));
    args
}

/// What is asked of a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ask<'a> {
    /// A port of the far side shall lead to a port of this host.
    Remote {
        /// The far side's address.
        bind: &'a str,
        /// The far side's port; 0: sshd chooses.
        far: u16,
        /// This host's port.
        port: u16,
    },
    /// Takes the same back.
    Cancel {
        /// As it was asked for.
        bind: &'a str,
        /// As it was asked for, 0 included.
        far: u16,
        /// This host's port.
        port: u16,
    },
    /// The socket [`api_socket`] shall lead to a host and port as the far side knows them.
    Api {
        /// The host.
        host: &'a str,
        /// Its port.
        port: u16,
    },
}

/// The arguments of ssh that ask this of a connection.
#[must_use]
pub fn control(index: usize, ask: &Ask<'_>) -> Vec<String> {
    let bracketed = |host: &str| if host.contains(':') { format!("[{host}]") } else { host.to_owned() };
    let remote = |bind: &str, far: u16, port: u16| format!("{}:{far}:127.0.0.1:{port}", bracketed(bind));
    let (command, direction, spec) = match ask {
        Ask::Remote { bind, far, port } => ("forward", "-R", remote(bind, *far, *port)),
        Ask::Cancel { bind, far, port } => ("cancel", "-R", remote(bind, *far, *port)),
        Ask::Api { host, port } => {
            // Without a slash ssh takes it for a port.
            ("forward", "-L", format!("./{}:{}:{port}", api_socket(index), bracketed(host)))
        }
    };
    // The user's configuration may hold forwards for any host, which would be asked for too.
    let args =
        ["-F", "/dev/null", "-S", &control_socket(index), "-O", command, direction, &spec, "--", "tunnel"];
    args.map(str::to_owned).into()
}

/// The port that sshd chose: what ssh prints when asked for port 0.
#[must_use]
pub fn allocated_port(stdout: &str) -> Option<u16> {
    stdout.split_ascii_whitespace().next()?.parse().ok().filter(|port| *port != 0)
}

/// The host's real name out of `ssh -G`.
#[must_use]
pub fn host_name(stdout: &str) -> Option<&str> {
    let mut values = stdout.lines().filter_map(|line| line.strip_prefix("hostname "));
    values.next().map(str::trim).filter(|name| !name.is_empty())
}

/// How much of a line goes into a message.
const MAX_LINE: usize = 300;

/// A line of ssh's standard error that may say why it ends, fit for a message: without what a login host's banner may do
/// to a terminal. Lines that never do are left out.
#[must_use]
pub fn telling(line: &str) -> Option<String> {
    let text: String = line.chars().filter(|c| !c.is_control()).take(MAX_LINE).collect();
    let text = text.trim();
    // News of the host keys, of weak key exchange, and of single forwards, which have an answer of their own.
    let idle = ["Warning: Permanently added", "**", "mux_", "muxclient:", "Allocated port "];
    (!text.is_empty() && !idle.iter().any(|prefix| text.starts_with(prefix))).then(|| text.to_owned())
}

/// Why ssh refused what it was asked: the first line that says more than that it did.
#[must_use]
pub fn refusal(stderr: &str) -> String {
    let line = stderr.lines().map(str::trim).find(|line| !line.is_empty()).unwrap_or("ssh said nothing");
    let text = line.strip_prefix("mux_client_forward: forwarding request failed: ").unwrap_or(line);
    text.chars().filter(|c| !c.is_control()).take(MAX_LINE).collect()
}

#[cfg(test)]
mod tests {
    use super::super::url::parse;
    use super::*;

    #[test]
    fn the_connection_asks_nobody_and_shares_nothing() {
        let settings = parse("ssh://alice@login:2222?identity=/home/alice/.ssh/pilot").unwrap();
        let args = master("/usr/bin/ssh", &settings, 3);
        assert_eq!(&args[2..8], ["jiriaf-tunnel", "/usr/bin/ssh", "-N", "-T", "-S", "3.control"]);
        let tail = [
            "-o",
            "IdentitiesOnly=yes",
            "-i",
            "/home/alice/.ssh/pilot",
            "-p",
            "2222",
            "-l",
            "alice",
            "--",
            "login",
        ];
        assert_eq!(&args[args.len() - tail.len()..], tail);
        for option in [
            "BatchMode=yes",
            "ServerAliveInterval=10",
            "ServerAliveCountMax=3",
            "ConnectTimeout=15",
            "ExitOnForwardFailure=yes",
            "ForwardAgent=no",
            "ForwardX11=no",
            "ClearAllForwardings=yes",
            "ControlPersist=no",
        ] {
            let at =
                args.iter().position(|arg| arg == option).unwrap_or_else(|| panic!("{option}: {args:?}"));
            assert_eq!(args[at - 1], "-o");
        }
        // Whom to trust is the user's to say.
        assert!(!args.iter().any(|arg| arg.contains("HostKey") || arg.contains("KnownHosts")));
        let bare = master("ssh", &parse("ssh://login").unwrap(), 0);
        assert_eq!(&bare[bare.len() - 2..], ["--", "login"]);
        assert!(!bare.iter().any(|arg| ["-p", "-l", "-i"].contains(&arg.as_str())), "{bare:?}");
    }

    #[test]
    fn forwards_are_asked_for_as_ssh_writes_them() {
        let spec = |ask: &Ask<'_>| control(1, ask)[5..8].join(" ");
        assert_eq!(spec(&Ask::Remote { bind: "*", far: 0, port: 10250 }), "forward -R *:0:127.0.0.1:10250");
        assert_eq!(
            spec(&Ask::Remote { bind: "::1", far: 31000, port: 1 }),
            "forward -R [::1]:31000:127.0.0.1:1"
        );
        assert_eq!(spec(&Ask::Cancel { bind: "*", far: 0, port: 80 }), "cancel -R *:0:127.0.0.1:80");
        assert_eq!(spec(&Ask::Api { host: "api.site", port: 6443 }), "forward -L ./1.api:api.site:6443");
        assert_eq!(
            spec(&Ask::Api { host: "2001:db8::1", port: 443 }),
            "forward -L ./1.api:[2001:db8::1]:443"
        );
        assert_eq!(
            control(1, &Ask::Api { host: "a", port: 1 })[..5],
            ["-F", "/dev/null", "-S", "1.control", "-O"]
        );
    }

    #[test]
    fn the_chosen_port_is_read() {
        assert_eq!(allocated_port("38553\n"), Some(38553));
        for bad in ["", "0\n", "port\n", "70000\n"] {
            assert_eq!(allocated_port(bad), None, "{bad}");
        }
    }

    #[test]
    fn the_real_name_of_a_host_is_read() {
        assert_eq!(host_name("user alice\nhostname login1.site.org\nport 22\n"), Some("login1.site.org"));
        assert_eq!(host_name("user alice\n"), None);
    }

    #[test]
    fn what_says_why_ssh_ends_is_kept_and_the_rest_is_not() {
        // As OpenSSH 9.2 writes them.
        for line in [
            "alice@login: Permission denied (publickey).",
            "ssh: connect to host login port 22: Connection refused",
            "Host key verification failed.",
            "Timeout, server login not responding.",
        ] {
            assert_eq!(telling(&format!("{line}\r\n")).as_deref(), Some(line));
        }
        for line in [
            "",
            "\r\n",
            "Warning: Permanently added '[127.0.0.1]:22622' (ED25519) to the list of known hosts.",
            "** WARNING: connection is not using a post-quantum key exchange algorithm.",
            "Allocated port 38553 for remote forward to 127.0.0.1:10250",
            "mux_confirm_remote_forward: remote port forwarding failed for listen port 46017",
        ] {
            assert_eq!(telling(line), None, "{line}");
        }
        assert_eq!(telling("\u{1b}[2Jwelcome\u{7}").as_deref(), Some("[2Jwelcome"));
        assert_eq!(telling(&"x".repeat(9999)).unwrap().len(), MAX_LINE);
    }

    #[test]
    fn a_refused_forward_is_told_in_sshs_words() {
        let said = "mux_client_forward: forwarding request failed: remote port forwarding failed for listen port 46017\n\
                    muxclient: master forward request failed\n";
        assert_eq!(refusal(said), "remote port forwarding failed for listen port 46017");
        assert_eq!(refusal("Control socket connect(0.control): No such file or directory\n").len(), 60);
        assert_eq!(refusal(""), "ssh said nothing");
    }
}
