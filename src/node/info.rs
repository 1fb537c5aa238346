//! What the Node says of this host: nodeInfo, read from the host itself, and the address on which it is reached.

use std::fs::File;
use std::io::Read;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use k8s_openapi::api::core::v1::NodeSystemInfo;
use thiserror::Error;
use tokio::net::{UdpSocket, lookup_host};

/// What `status.nodeInfo.kubeletVersion` says: the Kubernetes whose kubelet behaviour this is, as SemVer
/// because kubeadm and the e2e suites parse it (kubeadm's upgrade policy: `ParseSemantic`).
pub const KUBELET_VERSION: &str = concat!("v1.36.0+jiriaf-pilot.", env!("CARGO_PKG_VERSION"));

/// What `status.nodeInfo.containerRuntimeVersion` says, in kubelet's form `<runtime>://<version>`.
pub const RUNTIME_VERSION: &str = concat!("jiriaf-pilot://", env!("CARGO_PKG_VERSION"));

/// No file read here is longer: os-release has some 500 bytes, the others one line.
const MAX_FILE: u64 = 16 * 1024;

/// How long the API server's name may take to resolve. A resolver gives up on a dead server after 5 s by
/// default (resolv.conf(5)); this leaves time for the second one.
const RESOLVE_LIMIT: Duration = Duration::from_secs(10);

/// An address of the block for documentation (RFC 5737): it is routed as any other, and nobody is there. No
/// packet is sent to it.
const ANYWHERE: &str = "192.0.2.1:9";

/// Why this host's address could not be found.
#[derive(Debug, Error)]
#[error(
    "cannot find this host's address on the route to the API server {server}: {source}; \
     name it with --advertise-address (VKUBELET_POD_IP)"
)]
pub struct AddressError {
    /// The API server as `host:port`.
    server: String,
    /// What failed.
    #[source]
    source: std::io::Error,
}

/// Reads nodeInfo from the files under `root` (`/` but for tests). What cannot be read is left empty, as
/// Kubernetes allows: the truth or nothing.
#[must_use]
pub fn node_info(root: &Path) -> NodeSystemInfo {
    let line = |path: &str| read_line(&root.join(path));
    let machine_id = line("etc/machine-id").or_else(|| line("var/lib/dbus/machine-id")).unwrap_or_default();
    NodeSystemInfo {
        // Only root may read the firmware's id; kubelet too falls back to the machine's.
        system_uuid: line("sys/class/dmi/id/product_uuid").unwrap_or_else(|| machine_id.clone()),
        machine_id,
        boot_id: line("proc/sys/kernel/random/boot_id").unwrap_or_default(),
        kernel_version: line("proc/sys/kernel/osrelease").unwrap_or_default(),
        os_image: os_image(root),
        container_runtime_version: RUNTIME_VERSION.to_owned(),
        kubelet_version: KUBELET_VERSION.to_owned(),
        operating_system: "linux".to_owned(),
        architecture: architecture(std::env::consts::ARCH).to_owned(),
        ..NodeSystemInfo::default()
    }
}

/// This host's address on the route to the API server, which is given as its name or address and its port. A
/// connected UDP socket knows it, and sends nothing.
///
/// Where the API server is on this very host, its route's address is a loopback one, which Kubernetes takes
/// neither for a Pod in an EndpointSlice nor from another host: then the address of the default route is
/// taken, if there is one.
///
/// # Errors
/// [`AddressError`] when the name does not resolve within 10 s or there is no route.
pub async fn advertise_address(host: &str, port: u16) -> Result<IpAddr, AddressError> {
    let server = if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") };
    let failed = |source| AddressError { server: server.clone(), source };
    let none = || std::io::Error::new(std::io::ErrorKind::NotFound, "the name has no address");
    let resolved = tokio::time::timeout(RESOLVE_LIMIT, lookup_host((host, port))).await;
    let addresses = resolved.map_err(|_| failed(std::io::ErrorKind::TimedOut.into()))?.map_err(failed)?;
    let mut problem = none();
    for address in addresses {
        match route_address(address).await {
            Ok(ip) if ip.is_loopback() => return Ok(default_route().await.unwrap_or(ip)),
            Ok(ip) => return Ok(ip),
            Err(err) => problem = err,
        }
    }
    Err(failed(problem))
}

async fn default_route() -> Option<IpAddr> {
    let ip = route_address(ANYWHERE.parse().ok()?).await.ok()?;
    (!ip.is_loopback() && !ip.is_unspecified()).then_some(ip)
}

async fn route_address(to: SocketAddr) -> std::io::Result<IpAddr> {
    let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let socket = UdpSocket::bind(any).await?;
    socket.connect(to).await?;
    Ok(socket.local_addr()?.ip().to_canonical())
}

/// The name that Kubernetes and Go have for an architecture that Rust calls `arch`.
fn architecture(arch: &str) -> &str {
    match arch {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        "powerpc64" => "ppc64le", // The only 64-bit POWER that runs in today's sites is little-endian.
        other => other,
    }
}

fn os_image(root: &Path) -> String {
    let text = read(&root.join("etc/os-release")).or_else(|| read(&root.join("usr/lib/os-release")));
    text.as_deref().and_then(pretty_name).unwrap_or_else(|| "Linux".to_owned())
}

/// PRETTY_NAME out of os-release(5): shell-like assignments, the value perhaps in quotes.
fn pretty_name(text: &str) -> Option<String> {
    let value = text.lines().find_map(|line| line.trim().strip_prefix("PRETTY_NAME="))?.trim();
    let quoted = |q: char| value.strip_prefix(q).and_then(|v| v.strip_suffix(q));
    let value = quoted('"').or_else(|| quoted('\'')).unwrap_or(value);
    (!value.is_empty()).then(|| value.replace('\\', ""))
}

fn read(path: &Path) -> Option<String> {
    let mut text = String::new();
    File::open(path).ok()?.take(MAX_FILE).read_to_string(&mut text).ok()?;
    Some(text)
}

fn read_line(path: &Path) -> Option<String> {
    let text = read(path)?;
    let line = text.lines().next()?.trim();
    (!line.is_empty()).then(|| line.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn write(root: &Path, path: &str, text: &str) {
        let path = root.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    #[test]
    fn node_info_is_the_hosts() {
        let root = tempfile::tempdir().unwrap();
        write(root.path(), "etc/machine-id", "0123abcd\n");
        write(root.path(), "proc/sys/kernel/random/boot_id", "b-o-o-t\n");
        write(root.path(), "proc/sys/kernel/osrelease", "6.1.0-40-amd64\n");
        write(root.path(), "etc/os-release", "NAME=x\nPRETTY_NAME=\"Debian GNU/Linux 12 (bookworm)\"\n");
        let info = node_info(root.path());
        assert_eq!(info.machine_id, "0123abcd");
        assert_eq!(info.system_uuid, "0123abcd", "the firmware's id is not readable");
        assert_eq!(info.boot_id, "b-o-o-t");
        assert_eq!(info.kernel_version, "6.1.0-40-amd64");
        assert_eq!(info.os_image, "Debian GNU/Linux 12 (bookworm)");
        assert_eq!(info.operating_system, "linux");
        write(root.path(), "sys/class/dmi/id/product_uuid", "firm-ware\n");
        assert_eq!(node_info(root.path()).system_uuid, "firm-ware");
    }

    #[test]
    fn a_bare_host_gives_an_empty_but_whole_node_info() {
        let root = tempfile::tempdir().unwrap();
        let info = node_info(root.path());
        assert_eq!((info.machine_id.as_str(), info.os_image.as_str()), ("", "Linux"));
        assert!(info.kubelet_version.starts_with("v1.36.0+jiriaf-pilot.0."));
        assert!(info.container_runtime_version.starts_with("jiriaf-pilot://0."));
    }

    #[test]
    fn pretty_names_are_unquoted() {
        for (text, want) in [
            ("PRETTY_NAME='A B'", Some("A B")),
            ("PRETTY_NAME=plain", Some("plain")),
            ("PRETTY_NAME=\"\"", None),
            ("NAME=x", None),
            ("PRETTY_NAME=\"half", Some("\"half")),
        ] {
            assert_eq!(pretty_name(text).as_deref(), want, "{text}");
        }
    }

    #[tokio::test]
    async fn the_address_on_a_route_is_found_and_a_bad_server_named() {
        let ip = advertise_address("127.0.0.1", 6443).await.unwrap();
        assert!(!ip.is_unspecified());
        let text = advertise_address("no such host", 6443).await.unwrap_err().to_string();
        assert!(text.contains("no such host:6443") && text.contains("--advertise-address"), "{text}");
    }
}
