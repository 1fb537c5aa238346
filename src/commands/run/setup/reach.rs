//! The way to the API server, and the Node at it.

use std::time::Duration;

use super::node::{facts, gpu_labels, node_config};
use super::{Begun, SetupError, api, tunnel};
use crate::allocation;
use crate::certificates;
use crate::cli::RunArgs;
use crate::cluster;
use crate::node::{NodeConfig, NodeHandle};
use crate::pilot_metrics::PilotMetrics;
use crate::pod::admission::NodeFacts;

/// The way to the API server.
pub struct Way {
    pub(super) client: kube::Client,
    pub(super) ip: String,
    pub(super) metrics: PilotMetrics,
}

/// The Node, registered.
pub struct Entered {
    pub(super) node: NodeHandle,
    pub(super) facts: NodeFacts,
    pub(super) api: api::Prepared,
}

/// How long the API server is tried. A pilot that has pods to lose does not give it up: whoever calls ends them in time.
fn patience(args: &RunArgs, begun: &Begun) -> Duration {
    if begun.has_pods() { Duration::MAX } else { args.startup_timeout }
}

/// Reaches the API server. Nothing of it is seen by anybody, so it may be broken off.
///
/// # Errors
/// When it cannot be reached, or refuses the credential.
pub async fn reach(args: &RunArgs, begun: &mut Begun) -> Result<Way, SetupError> {
    // nvidia-smi may take seconds, in which the API server is found.
    let (env, gpus) = (begun.env.clone(), begun.allocation.gpus.value.clone());
    let (way, models) = tokio::join!(way(args, begun), allocation::gpu_models(&env, &gpus));
    begun.models = models;
    way
}

async fn way(args: &RunArgs, begun: &mut Begun) -> Result<Way, SetupError> {
    let patience = patience(args, begun);
    let node_port = Some(api::port_of(&begun.listener)?);
    begun.holds.tunnels =
        tunnel::open(args, &mut begun.kube, node_port, &begun.state_dir, &begun.env).await?;
    tunnel::wait(begun.holds.tunnels.as_ref(), patience).await?;
    let kube = &begun.kube;
    let client = match &args.bootstrap_kubeconfig {
        None => kube.connect(patience).await?,
        Some(_) => {
            let (known, told) = (begun.deadline.clone(), begun.tracker.clone());
            let end = move || known.borrow().as_ref().map(|d| d.at);
            let expires = move |at| told.credential_expires(at);
            certificates::bootstrap::connect(kube, &begun.name, &begun.state_dir, patience, end, expires)
                .await?
        }
    };
    let ip = address(args, begun).await?;
    let metrics = PilotMetrics::new();
    Ok(Way { client: cluster::counting(client, metrics.clone()), ip, metrics })
}

/// The Node's address.
///
/// # Errors
/// When no route leads to the API server.
pub(super) async fn address(args: &RunArgs, begun: &Begun) -> Result<String, SetupError> {
    let far = begun.holds.tunnels.as_ref().and_then(tunnel::address);
    if let Some(ip) = args.advertise_address.clone().or(far) {
        return Ok(ip);
    }
    let (host, port) = begun.kube.host_port();
    let found = crate::node::info::advertise_address(&host, port).await;
    Ok(found.map_err(|error| SetupError::Host(error.to_string()))?.to_string())
}

/// The Node as it is to be registered.
pub(super) fn config(args: &RunArgs, begun: &Begun, ip: &str) -> NodeConfig {
    node_config(args, &begun.name, &begun.site, ip, &begun.allocation, &begun.state, &begun.places)
}

/// Registers the Node.
///
/// # Errors
/// When the API server refuses it; nothing is registered then.
pub async fn register(args: &RunArgs, begun: &Begun, way: &Way) -> Result<Entered, SetupError> {
    let mut config = config(args, begun, &way.ip);
    for (key, value) in gpu_labels(&begun.models) {
        config.labels.entry(key).or_insert(value);
    }
    config.daemon_port = Some(api::port_of(&begun.listener)?);
    config.declared_features = api::declared_features(&way.client).await;
    if let Some(tunnels) = &begun.holds.tunnels {
        tunnel::lead_to(&mut config, tunnels);
    }
    // By the login host where tunnels lead here, and from beside it in any case.
    let mut reached_at = vec![config.hostname.clone(), way.ip.clone(), begun.allocation.host.clone()];
    reached_at.dedup();
    let fixed_address = args.advertise_address.is_some();
    let reached_at = tunnel::reached_at(reached_at, begun.holds.tunnels.as_ref(), fixed_address);
    let listener = begun.listener.try_clone();
    let api = api::prepare(api::Parts {
        args,
        client: way.client.clone(),
        listener: listener.map_err(|error| SetupError::Host(format!("the Node's port: {error}")))?,
        authorities: &begun.authorities,
        node: &begun.name,
        reached_at,
        timing: begun.timing.clone(),
        deadline: begun.deadline.clone(),
    })?;
    let facts = facts(&config, args, &begun.isolation);
    let limit = patience(args, begun);
    let node = crate::node::register(way.client.clone(), config, begun.timing.clone(), limit).await?;
    Ok(Entered { node, facts, api })
}
