//! `--tunnel`: whether ssh gets there without a question, and through it to the API server.

use std::path::PathBuf;
use std::time::Duration;

use super::finding::Finding;
use crate::allocation::Environment;
use crate::cli::RunArgs;
use crate::cluster::Kube;
use crate::commands::run::setup::{instance, open_tunnels};
use crate::tunnel::{Status, Tunnels};

/// How long the tunnels may take: what one connection may.
const LIMIT: Duration = Duration::from_secs(35);

/// Tunnels that are only looked at. They and their directory go when this is dropped.
pub struct Looked {
    _tunnels: Tunnels,
    _directory: Directory,
}

/// Starts the tunnels and leads the way to the API server through them, as `run` does.
pub async fn look(args: &RunArgs, kube: &mut Kube, env: &Environment) -> (Option<Looked>, Vec<Finding>) {
    let fail = |problem: String| (None, vec![Finding::fail("tunnel", problem, "")]);
    let directory = match Directory::new() {
        Ok(directory) => directory,
        Err(problem) => return fail(problem),
    };
    let tunnels = match open_tunnels(args, kube, None, &directory.0, env).await {
        Ok(Some(tunnels)) => tunnels,
        Ok(None) => return (None, Vec::new()),
        Err(error) => return fail(error.to_string()),
    };
    let mut statuses = tunnels.statuses();
    let settled = statuses.wait_for(|all| all.iter().all(|status| status.up || status.problem.is_some()));
    let _ = tokio::time::timeout(LIMIT, settled).await;
    let findings = {
        let statuses = tunnels.statuses();
        let all = statuses.borrow();
        // The pilot needs one that leads to the API server, or none where none does.
        let (carriers, needed) = (tunnels.settings(), tunnels.api().is_some());
        let enough = !needed || all.iter().zip(carriers).any(|(status, settings)| status.up && settings.api);
        all.iter().map(|status| finding(status, enough)).collect()
    };
    (Some(Looked { _tunnels: tunnels, _directory: directory }), findings)
}

fn finding(status: &Status, enough: bool) -> Finding {
    if status.up {
        let address = status.far_address.map_or_else(|| "address unknown".to_owned(), |ip| ip.to_string());
        return Finding::ok("tunnel", format!("{} ({}, {address})", status.describe(), status.far_host));
    }
    let mend = "`ssh -o BatchMode=yes` from this host to there must work without a question";
    if enough {
        return Finding::warn("tunnel", status.describe(), mend);
    }
    Finding::fail("tunnel", status.describe(), mend)
}

/// A directory for sockets, on the node's own disk.
struct Directory(PathBuf);

impl Directory {
    fn new() -> Result<Self, String> {
        let path = std::env::temp_dir().join(format!("jiriaf-pilot-check-{}", instance()));
        crate::files::private_dir(&path).map_err(|error| error.to_string())?;
        Ok(Self(path))
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
