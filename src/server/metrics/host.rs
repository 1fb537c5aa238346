//! What only `/stats/summary` has: file system, logs, network and number of processes.
//!
//! [`Disk::read`] touches the pods' directories, which may lie on a file server that does not answer: it belongs on a
//! thread of its own, and not to be waited for without a limit. The rest reads /proc alone.

use std::fs;
use std::path::{Path, PathBuf};

use nix::sys::statvfs::statvfs;
use serde::Serialize;

/// Log files of one container that are looked at: 5 of the present run, and of some earlier ones.
const MAX_LOG_FILES: usize = 1000;

/// Sizes of the pods' file system, in bytes and inodes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct FileSystem {
    /// What this user may still fill.
    pub available: u64,
    /// All of it.
    pub capacity: u64,
    /// What is filled.
    pub used: u64,
    /// Inodes that this user may still have; file systems without a limit have 0 of 0.
    pub inodes_free: u64,
    /// All inodes.
    pub inodes: u64,
}

/// What lies on the pods' file system.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Disk {
    /// The file system of the pods' directory.
    pub file_system: Option<FileSystem>,
    /// The sizes of the logs of the containers that were asked for, in their order.
    pub log_bytes: Vec<Option<u64>>,
}

impl Disk {
    /// Reads the sizes; `logs` are the containers' log directories. Blocks for as long as the file system does.
    #[must_use]
    pub fn read(pods: &Path, logs: &[PathBuf]) -> Self {
        Self { file_system: file_system(pods), log_bytes: logs.iter().map(|path| log_bytes(path)).collect() }
    }
}

fn file_system(path: &Path) -> Option<FileSystem> {
    let found = statvfs(path).ok()?;
    // A fragment is what the counts count (statvfs(3)).
    let bytes = |blocks: u64| blocks.saturating_mul(found.fragment_size());
    Some(FileSystem {
        available: bytes(found.blocks_available()),
        capacity: bytes(found.blocks()),
        used: bytes(found.blocks().saturating_sub(found.blocks_free())),
        inodes_free: found.files_free(),
        inodes: found.files(),
    })
}

fn log_bytes(directory: &Path) -> Option<u64> {
    let files = fs::read_dir(directory).ok()?.take(MAX_LOG_FILES).flatten();
    Some(files.filter_map(|file| file.metadata().ok()).filter(fs::Metadata::is_file).map(|m| m.len()).sum())
}

/// What has passed through a network interface.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// Bytes received.
    pub rx_bytes: u64,
    /// Errors while receiving.
    pub rx_errors: u64,
    /// Bytes sent.
    pub tx_bytes: u64,
    /// Errors while sending.
    pub tx_errors: u64,
}

/// The host's network: every pod's is the same.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Network {
    /// The interface of the default route.
    pub default: Option<Interface>,
    /// All but the loopback's.
    pub interfaces: Vec<Interface>,
}

impl Network {
    /// Reads /proc/net of this process.
    #[must_use]
    pub fn read() -> Self {
        let text = |name| fs::read_to_string(format!("/proc/net/{name}")).unwrap_or_default();
        network(&text("dev"), &text("route"))
    }
}

fn network(dev: &str, route: &str) -> Network {
    let interfaces: Vec<_> = dev.lines().filter_map(interface).filter(|i| i.name != "lo").collect();
    let default = default_interface(route).and_then(|name| interfaces.iter().find(|i| i.name == name));
    Network { default: default.cloned(), interfaces }
}

/// Reads a line of /proc/net/dev (proc_pid_net(5)): the name, a colon, eight numbers of what was received, eight of what
/// was sent.
fn interface(line: &str) -> Option<Interface> {
    let (name, numbers) = line.split_once(':')?;
    let mut numbers = numbers.split_ascii_whitespace().map(|number| number.parse().ok());
    let (rx_bytes, rx_errors) = (numbers.next()??, numbers.nth(1)??);
    let (tx_bytes, tx_errors) = (numbers.nth(5)??, numbers.nth(1)??);
    Some(Interface { name: name.trim().to_owned(), rx_bytes, rx_errors, tx_bytes, tx_errors })
}

/// The interface of the best route to everywhere, of /proc/net/route: name, destination, gateway, flags, reference count,
/// use, metric, mask.
fn default_interface(route: &str) -> Option<&str> {
    let routes = route.lines().filter_map(|line| {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        let [name, destination, _, _, _, _, metric, mask, ..] = fields[..] else { return None };
        (destination == "00000000" && mask == "00000000").then_some((metric.parse::<u64>().ok()?, name))
    });
    routes.min().map(|(_, name)| name)
}

/// How many processes and threads there may be, and are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Processes {
    /// The most.
    pub most: Option<u64>,
    /// Those that are there.
    pub now: Option<u64>,
}

impl Processes {
    /// Reads /proc.
    #[must_use]
    pub fn read() -> Self {
        let text = |name: &str| fs::read_to_string(format!("/proc/{name}")).unwrap_or_default();
        processes(&text("sys/kernel/pid_max"), &text("sys/kernel/threads-max"), &text("loadavg"))
    }
}

/// The lower limit of the two counts; how many there are stands in `loadavg` after a slash.
fn processes(pid_max: &str, threads_max: &str, loadavg: &str) -> Processes {
    let number = |text: &str| text.trim().parse::<u64>().ok();
    let most = [number(pid_max), number(threads_max)].into_iter().flatten().min();
    let now = loadavg.split_ascii_whitespace().nth(3).and_then(|field| number(field.split_once('/')?.1));
    Processes { most, now }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const DEV: &str = "\
Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed
    lo: 6117936   22334    0    0    0     0          0         0  6117936   22334    0    0    0     0       0          0
  eth0:78901     120    3    0    0     0          0         0    45678     110    4    0    0     0       0          0
  ib0: 11 1 0 0 0 0 0 0 22 1 0 0 0 0 0 0
";

    const ROUTE: &str = "\
Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT
ib0\t00000000\t0100000A\t0003\t0\t0\t200\t00000000\t0\t0\t0
eth0\t00000000\t0100000A\t0003\t0\t0\t100\t00000000\t0\t0\t0
eth0\t0000000A\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0
";

    #[test]
    fn the_interface_of_the_default_route_is_found() {
        let found = network(DEV, ROUTE);
        let eth0 =
            Interface { name: "eth0".into(), rx_bytes: 78901, rx_errors: 3, tx_bytes: 45678, tx_errors: 4 };
        assert_eq!(found.default, Some(eth0));
        assert_eq!(found.interfaces.iter().map(|i| i.name.as_str()).collect::<Vec<_>>(), ["eth0", "ib0"]);
        assert_eq!(network(DEV, "").default, None);
    }

    #[test]
    fn the_lower_of_two_limits_counts() {
        let found = processes("32768\n", "188000\n", "0.05 0.10 0.08 2/345 6789\n");
        assert_eq!(found, Processes { most: Some(32768), now: Some(345) });
        assert_eq!(processes("", "", ""), Processes::default());
    }

    #[test]
    fn sizes_are_those_of_the_files() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("0.log"), [0; 1000]).unwrap();
        std::fs::write(directory.path().join("0.log.1"), [0; 24]).unwrap();
        std::fs::create_dir(directory.path().join("x")).unwrap();
        let disk = Disk::read(directory.path(), &[directory.path().into(), "/nowhere".into()]);
        assert_eq!(disk.log_bytes, [Some(1024), None]);
        let found = disk.file_system.unwrap();
        assert!(found.used <= found.capacity && found.available <= found.capacity, "{found:?}");
        assert!(found.capacity > 0);
    }

    proptest! {
        #[test]
        fn no_file_makes_a_parser_panic(text in "(?s).{0,200}", lines in "([a-z0-9]{0,9}:?[0-9 \t/.]{0,60}\n){0,4}") {
            for text in [&text, &lines] {
                network(text, text);
                processes(text, text, text);
            }
        }
    }
}
