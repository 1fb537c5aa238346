//! What a pod needs before its containers can start: its objects, its directory, its volumes, its scripts.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use futures::future::try_join_all;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Container, Pod, VolumeMount};

use crate::container::{ContainerSpec, LogLimits, Stdio, ViewMount};
use crate::files;
use crate::pod::api::{Api, ApiError, Token, TokenWish};
use crate::pod::command_line::argv;
use crate::pod::containers;
use crate::pod::context::{Context, Identity, on_disk};
use crate::pod::directory::{self, DirectoryError, Liveness, Marker, Occupant};
use crate::pod::environment::{
    Additions, ConfigError, EnvInput, Facts, Objects, Skipped, TokenRef, container_env, references,
};
use crate::pod::events::Kind;
use crate::pod::isolation::{self, Choice};
use crate::pod::volumes::{self, ContainerPlan, ImageError, Place, Root, VolumeError};

/// How far a container is from being the kernel's first choice when memory runs out: farther up than the pilot and the
/// supervisors, which stay at what the job gave them (proc(5), oom_score_adj; raising needs no right).
const OOM_SCORE_ADJ: i32 = 500;

/// Everything that the starts of a pod's containers need.
pub struct Prepared {
    /// The pod's directory.
    pub directory: PathBuf,
    /// What the environment and the volumes are made of.
    objects: Objects,
    facts: Facts,
    /// The containers' scripts, by their names.
    scripts: BTreeMap<String, Result<PathBuf, ImageError>>,
    /// What was left out, for an event.
    pub notes: Vec<String>,
    /// Whether its containers have namespaces of their own.
    isolated: bool,
}

/// Why a pod cannot start yet.
#[derive(Debug, thiserror::Error)]
pub enum PrepareError {
    /// An object could not be read.
    #[error("{what}: {source}")]
    Api {
        /// Which one.
        what: String,
        /// What the API server said.
        source: ApiError,
    },
    /// A volume cannot be set up.
    #[error("{0}")]
    Volume(#[from] VolumeError),
    /// The pod's directory cannot be had.
    #[error("{0}")]
    Directory(#[from] DirectoryError),
    /// A file of a volume cannot be written.
    #[error("{path}: {source}; make room or choose another place with --pods-dir", path = path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file of a volume would stand where somebody else's does.
    #[error(
        "{path}: {source}; remove it, or mount the volume at another place", path = path.display()
    )]
    Occupied {
        /// The file.
        path: PathBuf,
        /// What is there.
        source: io::Error,
    },
    /// The preparation was ended from outside.
    #[error("preparing the pod came to no end: {0}")]
    Aborted(String),
}

impl PrepareError {
    /// The event's reason, as kubelet names it.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Directory(_) | Self::Aborted(_) => "FailedCreatePodSandBox",
            Self::Api { .. } | Self::Volume(_) | Self::Write { .. } | Self::Occupied { .. } => {
                VolumeError::REASON
            }
        }
    }

    /// Whether anything but another Pod could mend it: an object that appears, a right, room on a disk.
    pub fn may_pass(&self) -> bool {
        match self {
            Self::Volume(error) => error.may_mend(),
            Self::Api { .. }
            | Self::Directory(_)
            | Self::Write { .. }
            | Self::Occupied { .. }
            | Self::Aborted(_) => true,
        }
    }
}

/// Why a container cannot start yet.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// Its image names no script.
    #[error("{0}")]
    Image(#[from] ImageError),
    /// Its environment or command line cannot be made.
    #[error("{0}")]
    Config(#[from] ConfigError),
}

impl SpecError {
    /// The reason of the waiting container.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Image(_) => ImageError::REASON,
            Self::Config(_) => ConfigError::REASON,
        }
    }

    /// Whether an object that appears or changes could mend it.
    pub fn may_pass(&self) -> bool {
        match self {
            // The files come from ConfigMaps and Secrets; the names from the pod, whose change is seen.
            Self::Image(ImageError::NoFile { .. } | ImageError::NoScript { .. }) | Self::Config(_) => true,
            Self::Image(ImageError::NoMount { .. }) => false,
        }
    }
}

/// What became of a preparation.
pub struct Attempt {
    /// The pod's directory, as soon as it has one.
    pub directory: Option<PathBuf>,
    /// Whether all is there; what is missing may be there at the next try.
    pub result: Result<Prepared, PrepareError>,
}

/// Reads the pod's objects and makes its directory and volumes.
pub async fn prepare(context: &Context, pod: &Pod, known: Option<PathBuf>) -> Attempt {
    let mut notes = Vec::new();
    let (objects, directory) =
        tokio::join!(read_objects(&context.api, pod, &mut notes), claim(context, pod, known));
    match (objects, directory) {
        (Ok(objects), Ok(directory)) => {
            let result = fill(context, pod, directory.clone(), objects, notes).await;
            Attempt { directory: Some(directory), result }
        }
        (Err(error), Ok(directory)) => Attempt { directory: Some(directory), result: Err(error) },
        (_, Err(error)) => Attempt { directory: None, result: Err(error) },
    }
}

/// Writes the volumes into the pod's directory and finds the scripts.
async fn fill(
    context: &Context,
    pod: &Pod,
    directory: PathBuf,
    objects: Objects,
    notes: Vec<String>,
) -> Result<Prepared, PrepareError> {
    let facts = Facts {
        node_name: context.identity.node.clone().unwrap_or_else(|| context.identity.host.clone()),
        pod_ips: vec![context.identity.ip.clone()],
        host_ips: vec![context.identity.ip.clone()],
        allocatable: context.allocatable.clone(),
    };
    let mut plans = volumes::plan(pod, &objects, &facts)?;
    let scripts = containers::of(pod)
        .zip(&mut plans)
        .map(|((_, container), plan)| {
            let place = volumes::script(&container, plan);
            let absolute = |place| absolute(&place, &directory, &container.name, &context.places.home);
            (container.name.clone(), place.map(absolute))
        })
        .collect();
    let choice = context.policy.isolation.choose(pod.metadata.annotations.as_ref());
    if let Choice::Instead(why) = &choice {
        context.events.record(pod, None, Kind::Warning, isolation::REASON, why);
    }
    let home = context.places.home.clone();
    let uid = pod.metadata.uid.as_deref().unwrap_or_default();
    let contents = directory::contents(&directory, uid, &context.places.kept);
    let target = directory.clone();
    let isolated = choice == Choice::Isolated;
    blocking(move || write_volumes(&target, &contents, &home, &plans)).await??;
    Ok(Prepared { directory, objects, facts, scripts, notes, isolated })
}

async fn read_objects(api: &Api, pod: &Pod, notes: &mut Vec<String>) -> Result<Objects, PrepareError> {
    let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
    let wanted = references(pod);
    let failed = |what: String| move |source| PrepareError::Api { what, source };
    let config_maps = try_join_all(wanted.config_maps.keys().map(|name| async move {
        let found = api.config_map(namespace, name).await;
        found
            .map(|found| found.map(|o| (name.clone(), o)))
            .map_err(failed(format!("configmap {namespace}/{name}")))
    }));
    let secrets = try_join_all(wanted.secrets.keys().map(|name| async move {
        let found = api.secret(namespace, name).await;
        found
            .map(|found| found.map(|o| (name.clone(), o)))
            .map_err(failed(format!("secret {namespace}/{name}")))
    }));
    let tokens = try_join_all(wanted.tokens.iter().map(|wish| read_token(api, pod, wish)));
    let (config_maps, secrets, tokens) = futures::try_join!(config_maps, secrets, tokens)?;
    let mut objects = Objects {
        config_maps: config_maps.into_iter().flatten().collect(),
        secrets: secrets.into_iter().flatten().collect(),
        ..Objects::default()
    };
    for (wish, token) in tokens {
        match token {
            Token::Granted(token) => {
                objects.tokens.insert(wish, token);
            }
            // In `play` nobody expects one.
            Token::Denied(_) if matches!(api, Api::Files(_)) => {}
            Token::Denied(why) => {
                notes.push(format!("the service account's token is left out of its volume: {why}"))
            }
        }
    }
    Ok(objects)
}

async fn read_token(api: &Api, pod: &Pod, wish: &TokenRef) -> Result<(TokenRef, Token), PrepareError> {
    let part = |text: &Option<String>| text.clone().unwrap_or_default();
    let account = pod.spec.as_ref().and_then(|spec| spec.service_account_name.clone());
    let request = TokenWish {
        service_account: account.filter(|name| !name.is_empty()).unwrap_or_else(|| "default".to_owned()),
        audience: wish.audience.clone(),
        expiration_seconds: Some(wish.expiration_seconds),
    };
    let meta = &pod.metadata;
    let token = api.token(&part(&meta.namespace), &part(&meta.name), &part(&meta.uid), &request).await;
    let what = || format!("token of service account {}", request.service_account);
    token.map(|token| (wish.clone(), token)).map_err(|source| PrepareError::Api { what: what(), source })
}

/// The pod's directory: the known one after a restart, else a new one.
async fn claim(context: &Context, pod: &Pod, known: Option<PathBuf>) -> Result<PathBuf, PrepareError> {
    let marker = marker(&context.identity, pod);
    if let Some(known) = known {
        let uid = marker.uid.clone();
        let ours = move || directory::read_marker(&known).filter(|m| m.uid == uid).map(|_| known);
        if let Some(known) = blocking(ours).await? {
            return Ok(known);
        }
    }
    let parent = context.places.parent(&marker.namespace);
    let plain = parent.join(&marker.name);
    let found = blocking(move || directory::look(&plain).unwrap_or(Occupant::None)).await?;
    let liveness = match &found {
        Occupant::Pod(other) if other.uid != marker.uid => liveness(context, other).await,
        _ => Liveness::Alive,
    };
    // Only what was asked about may be moved aside; another that came meanwhile counts as alive.
    let asked = match found {
        Occupant::Pod(other) => Some(other),
        _ => None,
    };
    let home = context.places.home.clone();
    // Where files of pods may have to be hidden from others, they lie in the kept directory.
    let store = context.policy.isolation.stores().then(|| context.places.kept.clone());
    Ok(blocking(move || claim_at(&parent, &marker, asked.as_deref(), liveness, &home, store.as_deref()))
        .await??)
}

fn claim_at(
    parent: &Path,
    marker: &Marker,
    asked: Option<&Marker>,
    liveness: Liveness,
    home: &Path,
    store: Option<&Path>,
) -> Result<PathBuf, DirectoryError> {
    let answer = |other: &Marker| if Some(other) == asked { liveness } else { Liveness::Alive };
    let claimed = directory::claim(parent, marker, answer)?;
    if let Some(kept) = store {
        directory::keep_in_store(&claimed, marker, kept)
            .map_err(|source| DirectoryError { path: directory::store(kept, &marker.uid), source })?;
    }
    // A pod whose pilot died has left its files in the home directory too, where they would be in the way of this one's.
    if let Some(gone) = asked.filter(|_| liveness == Liveness::Gone) {
        let aside = parent.join(directory::suffixed(&gone.name, &gone.uid));
        if directory::read_marker(&aside).is_some_and(|found| found.uid == gone.uid)
            && let Err(error) = directory::remove_home_files(&aside, home)
        {
            tracing::warn!(path = %aside.display(), %error, "files of a pod that is gone could not be removed");
        }
    }
    Ok(claimed)
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, PrepareError> {
    on_disk(work).await.map_err(|error| PrepareError::Aborted(error.to_string()))
}

fn marker(identity: &Identity, pod: &Pod) -> Marker {
    let part = |text: &Option<String>| text.clone().unwrap_or_default();
    Marker {
        uid: part(&pod.metadata.uid),
        namespace: part(&pod.metadata.namespace),
        name: part(&pod.metadata.name),
        job: identity.job.clone(),
        host: identity.host.clone(),
        node: identity.node.clone(),
        cluster: identity.cluster.clone(),
        pilot: identity.process.clone(),
    }
}

/// Whether the pod of another directory may still be alive.
async fn liveness(context: &Context, other: &Marker) -> Liveness {
    if directory::is_of_cluster(other, context.identity.cluster.as_deref()) {
        return match context.api.pod(&other.namespace, &other.name, &other.uid).await {
            Ok(None) => Liveness::Gone,
            // Alive, or nobody can say.
            Ok(Some(_)) | Err(_) => Liveness::Alive,
        };
    }
    let start = crate::container::process::start_time(other.pilot.pid);
    directory::process_liveness(other, &context.identity.host, &context.identity.process.boot, start)
}

fn absolute(place: &Place, directory: &Path, container: &str, home: &Path) -> PathBuf {
    let root = match place.root {
        Root::Container => container_dir(directory, container),
        Root::Pod => directory.to_owned(),
        Root::Home => home.to_owned(),
    };
    root.join(&place.path)
}

fn container_dir(directory: &Path, container: &str) -> PathBuf {
    directory.join("containers").join(container)
}

/// Writes what was planned. Nothing leaves its root, by no `..` and no link; `contents` is where our own links to the
/// pod's files lead ([`directory::contents`]).
fn write_volumes(
    directory: &Path,
    contents: &Path,
    home: &Path,
    plans: &[ContainerPlan],
) -> Result<(), PrepareError> {
    let fail = |path: &Path| {
        let path = path.to_owned();
        move |source: io::Error| match source.kind() {
            io::ErrorKind::AlreadyExists => PrepareError::Occupied { path, source },
            _ => PrepareError::Write { path, source },
        }
    };
    let pod = files::Root::open(contents).map_err(fail(contents))?;
    let list = directory.join(directory::HOME_FILES);
    let mut home_root = None;
    for plan in plans {
        let own = Path::new("containers").join(&plan.container);
        pod.create_dir_all(&own.join("logs"), 0o700).map_err(fail(&directory.join(&own)))?;
        // Every place is beneath the pod's directory or the home directory.
        let beneath = |place: &Place| match place.root {
            Root::Container => own.join(&place.path),
            Root::Pod | Root::Home => place.path.clone(),
        };
        for dir in &plan.dirs {
            let at = absolute(&dir.place, directory, &plan.container, home);
            let root = root_for(dir.place.root, &pod, &mut home_root, home)?;
            root.create_dir_all(&beneath(&dir.place), dir.mode).map_err(fail(&at))?;
        }
        for link in &plan.links {
            let at = absolute(&link.place, directory, &plan.container, home);
            let root = root_for(link.place.root, &pod, &mut home_root, home)?;
            root.symlink(&link.target, &beneath(&link.place)).map_err(fail(&at))?;
        }
        for file in &plan.files {
            let at = absolute(&file.place, directory, &plan.container, home);
            let root = root_for(file.place.root, &pod, &mut home_root, home)?;
            let path = beneath(&file.place);
            if file.place.root == Root::Home {
                root.write_own(&path, &file.data, file.mode, &list).map_err(fail(&at))?;
            } else {
                root.write(&path, &file.data, file.mode).map_err(fail(&at))?;
            }
        }
    }
    Ok(())
}

fn root_for<'a>(
    root: Root,
    pod: &'a files::Root,
    home_root: &'a mut Option<files::Root>,
    home: &Path,
) -> Result<&'a files::Root, PrepareError> {
    if root != Root::Home {
        return Ok(pod);
    }
    if home_root.is_none() {
        let opened = files::Root::open(home);
        *home_root = Some(opened.map_err(|source| PrepareError::Write { path: home.to_owned(), source })?);
    }
    Ok(home_root.as_ref().unwrap_or(pod))
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
    let (Some((_, container)), Some(script)) = (containers::find(pod, name), prepared.scripts.get(name))
    else {
        return Err(ConfigError::ContainerNotFound(name.to_owned()).into());
    };
    let container = container.as_ref();
    let script = script.clone()?;
    let own = container_dir(&prepared.directory, &container.name);
    let drain = *context.drain.borrow();
    let mark = format!(
        "{}/{}/{}/{restart}",
        context.identity.mark,
        pod.metadata.uid.as_deref().unwrap_or_default(),
        container.name
    );
    let additions = Additions {
        pod_dir: prepared.directory.display().to_string(),
        container_dir: own.display().to_string(),
        drain_time: drain.and_then(|at| Timestamp::try_from(at).ok()),
        mark,
    };
    let env = container_env(&EnvInput {
        pod,
        container,
        objects: &prepared.objects,
        facts: &prepared.facts,
        inherited: &context.inherited,
        additions: &additions,
        expand: context.expand,
    })?;
    let argv = argv(container, &script.display().to_string(), &env, context.expand)?;
    let working_dir = match container.working_dir.as_deref().filter(|dir| !dir.is_empty()) {
        Some(dir) if Path::new(dir).is_absolute() => PathBuf::from(dir),
        Some(dir) => own.join(dir),
        None => own.clone(),
    };
    let view = prepared.isolated.then(|| {
        let uid = pod.metadata.uid.as_deref().unwrap_or_default();
        let shown = vec![
            directory::contents(&prepared.directory, uid, &context.places.kept),
            isolation::memory_root().join(uid),
        ];
        let message_path = container.termination_message_path.as_deref();
        context.policy.isolation.view(view_mounts(&own, container), shown, message_path)
    });
    let spec = ContainerSpec {
        argv,
        env: env.vars,
        working_dir,
        log: own.join("logs").join(format!("{restart}.log")),
        container_dir: own,
        log_limits: LogLimits::default(),
        session: context.policy.session,
        oom_score_adj: Some(OOM_SCORE_ADJ),
        open_files: context.policy.open_files,
        orphan_timeout: context.policy.orphan_timeout,
        drain_at: drain,
        grace: super::own_grace(pod),
        forward_output: context.output.is_some(),
        stdio: stdio(container),
        view,
    };
    Ok((spec, env.skipped))
}

/// What a container sees at its absolute mountPaths: what lies at the same paths in its directory. Outer ones first.
fn view_mounts(own: &Path, container: &Container) -> Vec<ViewMount> {
    let absolute = |mount: &VolumeMount| {
        let beneath = Path::new(&mount.mount_path).strip_prefix("/").ok()?;
        // The root itself would hide the host.
        beneath.components().next()?;
        Some(ViewMount {
            source: own.join(beneath),
            target: Path::new("/").join(beneath),
            read_only: mount.read_only.unwrap_or(false),
        })
    };
    let mut mounts: Vec<_> = container.volume_mounts.iter().flatten().filter_map(absolute).collect();
    mounts.sort_by_key(|mount| mount.target.components().count());
    mounts
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
    fn what_only_another_pod_could_mend_is_not_tried_again() {
        let text = || "a".to_owned();
        let (container, mount, path, problem) = (text(), text(), text(), text());
        let full = || io::Error::from(io::ErrorKind::StorageFull);
        let table = [
            (VolumeError::NotFound { volume: text(), kind: "secret", name: text() }.into(), true),
            (VolumeError::Content { volume: text(), problem: text() }.into(), true),
            (VolumeError::Kind { volume: text(), kind: text() }.into(), false),
            (VolumeError::Mount { container, mount, path, problem }.into(), false),
            (PrepareError::Write { path: PathBuf::new(), source: full() }, true),
            (PrepareError::Occupied { path: PathBuf::new(), source: full() }, true),
            (PrepareError::Aborted(text()), true),
        ];
        for (error, wanted) in table {
            let error: PrepareError = error;
            assert_eq!(error.may_pass(), wanted, "{error}");
        }
    }

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
