//! What of the host goes into [`network`]: its resolv.conf and its name.

use std::io::{self, Read as _};
use std::path::Path;

use k8s_openapi::api::core::v1::Pod;

use super::prepare::{PrepareError, blocking};
use crate::pod::environment::Facts;
use crate::pod::network::{self, Network};

/// What is read of a resolv.conf: three nameservers and a search list of 2048 characters are all that counts.
const RESOLV_CONF_BYTES: u64 = 64 * 1024;

/// What the pod's containers get in namespaces of their own.
pub(super) async fn of_pod(pod: &Pod, facts: &Facts) -> Result<Network, PrepareError> {
    let mut host = String::new();
    if pod.spec.as_ref().is_some_and(network::wants_resolv_conf) {
        let path = Path::new(network::RESOLV_CONF);
        host = blocking(|| read_host_file(path))
            .await?
            .map_err(|source| PrepareError::Read { path: path.to_owned(), source })?;
    }
    Ok(network::network(pod, &facts.pod_ips, &host)?)
}

/// One that is not there is empty.
fn read_host_file(path: &Path) -> io::Result<String> {
    let mut bytes = Vec::new();
    match std::fs::File::open(path) {
        Ok(file) => drop(file.take(RESOLV_CONF_BYTES).read_to_end(&mut bytes)?),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// The host's name as the pod's containers see it.
pub(super) fn kernel_name(network: &Network) -> String {
    let own = || nix::unistd::gethostname().unwrap_or_default().to_string_lossy().into_owned();
    network.hostname.clone().unwrap_or_else(own)
}
