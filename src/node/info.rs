//! What a Node says of its host: nodeInfo and addresses. Truthful, from the kernel's files.

use std::fs;
use std::io;
use std::net::SocketAddr;

use k8s_openapi::api::core::v1::NodeSystemInfo;

/// The Kubernetes version whose kubelet this pilot behaves as. Tools parse it as SemVer.
pub const KUBERNETES: &str = "1.36.0";

/// This host's nodeInfo.
#[must_use]
pub fn system_info() -> NodeSystemInfo {
    let read = |path: &str| fs::read_to_string(path).map(|text| text.trim().to_owned()).unwrap_or_default();
    let machine_id = read("/etc/machine-id");
    // Readable by root alone on most hosts; kubelet falls back to the machine id too.
    let uuid = read("/sys/class/dmi/id/product_uuid");
    let version = env!("CARGO_PKG_VERSION");
    NodeSystemInfo {
        architecture: "amd64".to_owned(),
        boot_id: read("/proc/sys/kernel/random/boot_id"),
        container_runtime_version: format!("jiriaf-pilot://{version}"),
        kernel_version: read("/proc/sys/kernel/osrelease"),
        kube_proxy_version: String::new(),
        kubelet_version: format!("v{KUBERNETES}+jiriaf-pilot.{version}"),
        operating_system: "linux".to_owned(),
        os_image: pretty_name(&read("/etc/os-release")).unwrap_or_else(|| "Linux".to_owned()),
        system_uuid: if uuid.is_empty() { machine_id.clone() } else { uuid },
        machine_id,
        ..NodeSystemInfo::default()
    }
}

/// PRETTY_NAME of os-release(5).
fn pretty_name(os_release: &str) -> Option<String> {
    let value = os_release.lines().find_map(|line| line.strip_prefix("PRETTY_NAME="))?;
    Some(value.trim_matches(['"', '\'']).to_owned())
}

/// This host's address on the route to `host`. No packet is sent: connecting a UDP socket only chooses a route.
///
/// # Errors
/// When the name is unknown or no route leads there.
pub async fn advertise_address(host: &str, port: u16) -> io::Result<String> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    let addresses: Vec<SocketAddr> = tokio::net::lookup_host((host, port)).await?.collect();
    for address in addresses {
        let any = if address.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        let socket = tokio::net::UdpSocket::bind(any).await?;
        match socket.connect(address).await {
            Ok(()) => return Ok(socket.local_addr()?.ip().to_string()),
            Err(error) => last = error,
        }
    }
    Err(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_distributions_name_is_read() {
        assert_eq!(
            pretty_name("ID=x\nPRETTY_NAME=\"Debian GNU/Linux 12\"\n").as_deref(),
            Some("Debian GNU/Linux 12")
        );
        assert_eq!(pretty_name(""), None);
    }

    #[tokio::test]
    async fn the_way_to_loopback_is_loopback() {
        assert_eq!(advertise_address("127.0.0.1", 9).await.unwrap(), "127.0.0.1");
    }
}
