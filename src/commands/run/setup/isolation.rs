//! Whether pods can have namespaces of their own, and what is hidden from them.

use std::path::Path;

use crate::cli::PodArgs;
use crate::container;
use crate::pod::context::{Places, on_disk};
use crate::pod::directory;
use crate::pod::isolation::{Isolation, Mode};
use crate::pod::volumes;

/// What `--isolation` comes to on this host, which is tried once. Where it is not permitted everything works as without it.
pub(in crate::commands) async fn isolation(args: &PodArgs, places: &Places, state_dir: &Path) -> Isolation {
    let mode = Mode::from(args.isolation);
    if mode == Mode::None {
        return Isolation::default();
    }
    let problem =
        on_disk(container::isolation::problem).await.unwrap_or_else(|error| Some(error.to_string()));
    match &problem {
        Some(problem) => tracing::warn!(
            problem,
            "this host does not permit --isolation (JIRIAF_ISOLATION): pods run without it, with their volumes in their \
             directories alone"
        ),
        None => tracing::info!(?mode, "pods can have namespaces of their own"),
    }
    // What is not there cannot be hidden, and a later pod may make it.
    if problem.is_none()
        && let Err(error) = volumes::memory::prepare()
    {
        tracing::warn!(%error, "isolated pods may see the memory-backed volumes of others");
    }
    let mut hidden = vec![places.pods.join(directory::KEPT), state_dir.to_owned()];
    hidden.extend(volumes::memory::parents());
    hidden.dedup();
    // Other pilots of this user have theirs beside it.
    if args.state_dir.is_none() {
        hidden.extend(state_dir.parent().map(Path::to_owned));
    }
    Isolation { mode, problem, hidden }
}
