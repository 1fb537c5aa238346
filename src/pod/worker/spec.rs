//! What the supervisor of one container is told: its argument vector, environment, view and limits.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Container, Pod};

use super::network::kernel_name;
use super::prepare::Prepared;
use crate::container::{ContainerSpec, Limits, LogLimits, Stdio, View, ViewMount};
use crate::pod::command_line::argv;
use crate::pod::containers;
use crate::pod::context::Context;
use crate::pod::directory;
use crate::pod::environment::{
    Additions, ConfigError, ContainerEnv, EnvFiles, EnvInput, Facts, Objects, Skipped, container_env,
};
use crate::pod::images;
use crate::pod::network::Network;
use crate::pod::quantity;
use crate::pod::security::{self, Ids};
use crate::pod::share::{self, Share};
use crate::pod::volumes::{self, ImageError, MountProblem, PlannedMount, SubPathError};

/// How far a container is from being the kernel's first choice when memory runs out: farther up than the pilot and the
/// supervisors, which stay at what the job gave them (proc(5), oom_score_adj; raising needs no right).
const OOM_SCORE_ADJ: i32 = 500;

/// Why a container cannot start yet.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// Its image names no script.
    #[error("{0}")]
    Image(#[from] ImageError),
    /// Nor is it one of the pilot's table.
    #[error("{0}")]
    Missing(#[from] images::Missing),
    /// It is one, and yet there is nothing to start.
    #[error("{0}")]
    Run(#[from] images::RunError),
    /// Its environment or command line cannot be made.
    #[error("{0}")]
    Config(#[from] ConfigError),
    /// What it mounts is not there.
    #[error("{0}")]
    Mount(#[from] MountProblem),
}

impl SpecError {
    /// The reason of the waiting container.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Image(_) => ImageError::REASON,
            Self::Missing(missing) => missing.reason(),
            Self::Run(error) => error.reason(),
            Self::Config(_) | Self::Mount(_) => ConfigError::REASON,
        }
    }

    /// Whether an object that appears or changes could mend it.
    pub fn may_pass(&self) -> bool {
        match self {
            // The files come from ConfigMaps and Secrets; the names from the pod, whose change is seen.
            Self::Image(ImageError::NoFile { .. } | ImageError::NoScript { .. }) | Self::Config(_) => true,
            Self::Image(ImageError::NoMount { .. }) | Self::Missing(_) => false,
            Self::Run(error) => matches!(error, images::RunError::Config(_)),
            Self::Mount(problem) => problem.may_mend(),
        }
    }
}

/// What the container's mounts take of their volumes. Its environment is made only where one of them names a variable.
pub(super) fn sub_paths(
    context: &Context,
    pod: &Pod,
    container: &Container,
    made: &Made<'_>,
) -> Result<BTreeMap<usize, PathBuf>, SubPathError> {
    let mounts = container.volume_mounts.iter().flatten();
    let by_variable = mounts.filter_map(|mount| mount.sub_path_expr.as_ref()).any(|path| !path.is_empty());
    if !by_variable {
        return volumes::sub_paths(container, &|_| None);
    }
    let env = environment(context, pod, container, 0, made)
        .map_err(|error| SubPathError::Environment(error.to_string()))?;
    volumes::sub_paths(container, &|name| env.get_declared(name).map(ToOwned::to_owned))
}

/// What the supervisor of one container is told.
///
/// # Errors
/// When the container has no script, or its environment or command line cannot be made.
pub fn spec(
    context: &Context,
    pod: &Pod,
    name: &str,
    restart: u32,
    prepared: &Prepared,
) -> Result<(ContainerSpec, Vec<Skipped>), SpecError> {
    if let Some(problem) = prepared.problems.get(name) {
        return Err(problem.clone().into());
    }
    let (Some((_, container)), Some(script)) = (containers::find(pod, name), prepared.scripts.get(name))
    else {
        return Err(ConfigError::ContainerNotFound(name.to_owned()).into());
    };
    let container = container.as_ref();
    let image = container.image.as_deref().unwrap_or_default();
    let script = match script {
        // An image that is no volumeMount of the container's may be one of the pilot's table.
        Err(ImageError::NoMount { .. }) => {
            let mounts = container.volume_mounts.iter().flatten().map(|mount| mount.name.clone());
            Err(context.images.find(image, mounts)?)
        }
        script => Ok(script.clone()?),
    };
    let own = directory::container_dir(&prepared.directory, &container.name);
    let drain = *context.drain.borrow();
    let made = Made {
        objects: &prepared.objects,
        facts: &prepared.facts,
        services: &prepared.services,
        directory: &prepared.directory,
        network: prepared.network.as_ref(),
        share: &prepared.share,
    };
    let env = environment(context, pod, container, restart, &made)?;
    let (argv, vars, contained) = match script {
        Ok(script) => {
            let script = script.display().to_string();
            (argv(container, &script, &env, context.expand)?, env.vars, false)
        }
        Err(found) => {
            let binds = prepared.mounts.get(name).map(Vec::as_slice).unwrap_or_default();
            let run = images::run(&found, container, &env, binds)?;
            (run.argv, run.env, run.contained)
        }
    };
    let working_dir = match container.working_dir.as_deref().filter(|dir| !dir.is_empty() && !contained) {
        Some(dir) if Path::new(dir).is_absolute() => PathBuf::from(dir),
        Some(dir) => own.join(dir),
        None => own.clone(),
    };
    let view = prepared.network.as_ref().map(|network| {
        let uid = pod.metadata.uid.as_deref().unwrap_or_default();
        let message_path = container.termination_message_path.as_deref();
        let mounts = prepared.mounts.get(name).map(Vec::as_slice).unwrap_or_default();
        let us = security::Us::now();
        let ids = security::ids(pod, container, us);
        View {
            owner: Some(uid.to_owned()),
            ids: (ids != Ids { user: us.user, group: us.group }).then_some((ids.user, ids.group)),
            ..context.policy.isolation.view(
                view_mounts(&own, mounts),
                prepared.shown.clone(),
                message_path,
                network,
            )
        }
    });
    let spec = ContainerSpec {
        argv,
        env: vars,
        working_dir,
        log: directory::log_path(&prepared.directory, &container.name, restart),
        container_dir: own,
        log_limits: LogLimits::default(),
        session: context.policy.session,
        oom_score_adj: Some(OOM_SCORE_ADJ),
        open_files: context.policy.open_files,
        stop_signal: stop_signal(container),
        orphan_timeout: context.policy.orphan_timeout,
        drain_at: drain,
        grace: super::own_grace(pod),
        forward_output: context.output.is_some(),
        stdio: stdio(container),
        no_new_privs: security::no_new_privs(container),
        cpus: cpus(context, pod, name),
        cgroup: context.policy.delegation.as_ref().map(|delegation| {
            let uid = pod.metadata.uid.as_deref().unwrap_or_default();
            delegation.plan(&format!("{uid}.{name}.{restart}"), limits(container), &cpus(context, pod, name))
        }),
        view,
    };
    Ok((spec, env.skipped))
}

/// What asks the container to end (`lifecycle.stopSignal`), where that is named and is a signal of this system.
fn stop_signal(container: &Container) -> Option<i32> {
    let name = container.lifecycle.as_ref()?.stop_signal.as_deref()?;
    name.parse::<nix::sys::signal::Signal>().ok().map(|signal| signal as i32)
}

/// What a container may take.
fn limits(container: &Container) -> Limits {
    let limits = container.resources.as_ref().and_then(|resources| resources.limits.as_ref());
    let of = |name: &str| limits.and_then(|limits| limits.get(name)).filter(|quantity| quantity.0 != "0");
    Limits {
        memory: of("memory").and_then(|quantity| quantity::bytes(quantity).ok()?.try_into().ok()),
        cpu_millis: of("cpu").and_then(|quantity| quantity::cpu_millis(quantity).ok()?.try_into().ok()),
    }
}

/// The CPUs on which a container runs now.
pub(super) fn cpus(context: &Context, pod: &Pod, container: &str) -> Vec<usize> {
    let placement = context.shares.placement.borrow();
    placement.cpus(pod.metadata.uid.as_deref().unwrap_or_default(), container).to_vec()
}

/// What an environment is made of.
pub(super) struct Made<'a> {
    pub(super) objects: &'a Objects,
    pub(super) facts: &'a Facts,
    pub(super) services: &'a BTreeMap<String, String>,
    pub(super) directory: &'a Path,
    pub(super) network: Option<&'a Network>,
    pub(super) share: &'a Share,
}

/// The environment of one run of a container.
fn environment(
    context: &Context,
    pod: &Pod,
    container: &Container,
    restart: u32,
    made: &Made<'_>,
) -> Result<ContainerEnv, ConfigError> {
    let drain = *context.drain.borrow();
    let mark = format!(
        "{}/{}/{}/{restart}",
        context.identity.mark,
        pod.metadata.uid.as_deref().unwrap_or_default(),
        container.name
    );
    let own = directory::container_dir(made.directory, &container.name);
    let additions = Additions {
        pod_dir: made.directory.display().to_string(),
        termination_log: own.join(super::termination::FILE).display().to_string(),
        container_dir: own.display().to_string(),
        drain_time: drain.and_then(|at| Timestamp::try_from(at).ok()),
        hostname: made.network.map(kernel_name),
        share: share::variables(
            made.share.containers.get(&container.name),
            cpus(context, pod, &container.name).len(),
            &context.shares.devices,
            &context.inherited,
        ),
        mark,
    };
    container_env(&EnvInput {
        pod,
        container,
        objects: made.objects,
        facts: made.facts,
        inherited: &context.inherited,
        additions: &additions,
        expand: context.expand,
        services: made.services,
        files: &EnvFiles::read(container, |volume| made.directory.join("volumes").join(volume)),
    })
}

/// What a container sees at its absolute mountPaths. Its directory has the volumes anyway.
fn view_mounts(own: &Path, mounts: &[PlannedMount]) -> Vec<ViewMount> {
    let outside = mounts.iter().filter(|mount| !mount.target.starts_with(own));
    outside
        .map(|mount| ViewMount {
            source: mount.source.clone(),
            target: mount.target.clone(),
            read_only: mount.read_only,
            real: mount.real,
        })
        .collect()
}

/// What the container's program reads and writes.
fn stdio(container: &Container) -> Stdio {
    let (input, once) = (container.stdin.unwrap_or(false), container.stdin_once.unwrap_or(false));
    match container.tty {
        Some(true) => Stdio::Terminal { input, once },
        _ if input => Stdio::Input { once },
        _ => Stdio::Null,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_script_that_is_not_there_yet_is_looked_for_again_and_a_wrong_name_is_not() {
        let text = || "a".to_owned();
        let table = [
            (ImageError::NoFile { image: text(), mount: text(), file: text(), present: text() }, true),
            (ImageError::NoScript { image: text(), mount: text(), present: text() }, true),
            (ImageError::NoMount { image: text(), accepted: text() }, false),
        ];
        for (error, wanted) in table {
            let error = SpecError::from(error);
            assert_eq!(error.may_pass(), wanted, "{error}");
        }
    }
}
