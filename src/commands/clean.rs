//! `jiriaf-pilot clean`: removes what dead pilots of this user left on this host's disks and among its processes.
//!
//! Only what is surely a dead pilot's goes: state directories whose lock is free and whose guardian is gone, and pod
//! directories with our marker whose pilot ran on this host and is gone. Logs are kept as after a pod's deletion.

mod pods;
mod states;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, SystemTime};

use self::pods::PodDirectory;
use self::states::{Life, State};
use super::run::setup;
use crate::allocation::Environment;
use crate::cli::CleanArgs;
use crate::container::{end_marked, end_supervisors};
use crate::node::labels::label_value;
use crate::pod::directory;

/// What containers of a dead pilot get to end by themselves; their supervisors would give them no more than 60 s.
const GRACE: Duration = Duration::from_secs(5);

/// Files that are counted for the sum at the end: more take longer than the sum is worth.
const COUNTED: usize = 200_000;

/// Removes it, or only says what would go. The exit code is 0; 1 when something could not be removed, 2 when it is not
/// known where to look.
#[must_use]
pub fn run(args: &CleanArgs) -> ExitCode {
    let env = Environment::from_process();
    let given = match args.pods_dir.as_ref().map(|path| setup::by_variable(path, &env)).transpose() {
        Ok(given) => given,
        Err(error) => {
            eprintln!("error: {error}");
            return ExitCode::from(2);
        }
    };
    let Some(pods_dir) = given.or_else(|| env.filled("HOME").map(PathBuf::from)) else {
        eprintln!(
            "error: HOME is not set; set it, or name the pods' directory with --pods-dir (JIRIAF_PODS_DIR)"
        );
        return ExitCode::from(2);
    };
    let mut cleaner =
        Cleaner { dry_run: args.dry_run, now: SystemTime::now(), bytes: 0, things: 0, failed: false };
    let pilots = cleaner.states(&state_roots(args, &env));
    // As markers name the host.
    let host = env.filled("SLURMD_NODENAME").map_or_else(hostname, str::to_owned);
    cleaner.pods(&pods_dir, &host, &pilots);
    cleaner.kept(&pods_dir.join(directory::KEPT));
    cleaner.sum();
    if cleaner.failed { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

/// Where pilots may have kept their state: a job's TMPDIR is often another one than a login shell's.
fn state_roots(args: &CleanArgs, env: &Environment) -> Vec<PathBuf> {
    if let Some(named) = &args.state_dir {
        return vec![named.clone()];
    }
    let mut roots = vec![setup::default_state_dir(env), setup::default_state_dir(&Environment::default())];
    roots.dedup();
    roots
}

fn hostname() -> String {
    let name = nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok()).unwrap_or_default();
    name.split('.').next().unwrap_or_default().to_owned()
}

struct Cleaner {
    dry_run: bool,
    now: SystemTime,
    bytes: u64,
    things: usize,
    failed: bool,
}

impl Cleaner {
    /// Removes dead pilots' state; the lives of all that were found.
    fn states(&mut self, roots: &[PathBuf]) -> BTreeMap<String, Life> {
        let mut pilots = BTreeMap::new();
        for root in roots {
            let found = match states::find(root, self.now) {
                Ok(found) => found,
                Err(error) => {
                    self.fail("state directory", root, &error);
                    continue;
                }
            };
            for state in found {
                // Two roots may hold one name: what is not dead in one of them is not dead.
                let known: &mut Life = pilots.entry(state.name.clone()).or_insert(Life::Dead);
                if *known == Life::Dead {
                    known.clone_from(&state.life);
                }
                match &state.life {
                    Life::Live => println!("kept: {}: its pilot lives", state.path.display()),
                    Life::Unknown(why) => println!("kept: {}: {why}", state.path.display()),
                    Life::Dead => self.state(&state),
                }
            }
        }
        pilots
    }

    fn state(&mut self, state: &State) {
        let bytes = size(&state.path);
        if !self.dry_run {
            end_supervisors(&state.path.join("containers"), GRACE);
            for uid in state.pods() {
                self.end(&state.name, &uid);
            }
            if let Err(error) = fs::remove_dir_all(&state.path) {
                self.fail("state directory", &state.path, &error);
                return;
            }
        }
        self.gone(&format!("{}: state of pilot {}", state.path.display(), state.name), bytes);
    }

    /// Ends what is left of a pod. Its uid is nobody else's, whatever other pilots are called.
    fn end(&self, mark: &str, uid: &str) {
        let ended = end_marked(&format!("{mark}/{uid}"));
        if ended > 0 {
            println!("ended: {ended} processes of pod {uid} of pilot {mark}");
        }
    }

    fn pods(&mut self, root: &Path, host: &str, pilots: &BTreeMap<String, Life>) {
        match pods::find(root, host, pilots) {
            Ok((found, all)) => {
                for pod in found {
                    match &pod.life {
                        Life::Live => println!("kept: {}: its pilot lives", pod.path.display()),
                        Life::Unknown(why) => println!("kept: {}: {why}", pod.path.display()),
                        Life::Dead => self.pod(root, &pod),
                    }
                }
                if !all {
                    println!("{} holds too many directories; not all were looked at", root.display());
                }
            }
            Err(error) => self.fail("pods directory", root, &error),
        }
    }

    fn pod(&mut self, root: &Path, pod: &PodDirectory) {
        let marker = &pod.marker;
        let job = marker.job.as_deref().or(marker.node.as_deref()).unwrap_or("play");
        let kept = root.join(directory::KEPT).join(label_value(job));
        let files = directory::contents(&pod.path, &marker.uid, &kept);
        let stored = if files == pod.path { 0 } else { size(&files) };
        let bytes = size(&pod.path).saturating_add(stored);
        let mut logs = Vec::new();
        if !self.dry_run {
            if let Some(node) = &marker.node {
                self.end(node, &marker.uid);
            }
            let home = std::env::var_os("HOME").map(PathBuf::from);
            match directory::remove(&pod.path, &marker.uid, &kept, home.as_deref()) {
                Ok(kept) => logs = kept,
                Err(error) => {
                    self.fail("pod directory", &pod.path, &error.source);
                    return;
                }
            }
        }
        let what = format!("{}: pod {}/{}", pod.path.display(), marker.namespace, marker.name);
        let kept: u64 = logs.iter().map(|log| size(log)).sum();
        self.gone(&what, bytes.saturating_sub(kept));
        for log in logs {
            println!("  its log is now {}", log.display());
        }
    }

    /// Old logs, by the rules of every pilot.
    fn kept(&mut self, root: &Path) {
        for path in directory::superfluous(root, self.now) {
            let bytes = size(&path);
            if !self.dry_run
                && let Err(error) = fs::remove_file(&path)
            {
                self.fail("kept log", &path, &error);
                continue;
            }
            self.gone(&format!("{}: old log", path.display()), bytes);
            if let Some(job) = path.parent().filter(|_| !self.dry_run) {
                // Goes only when it is empty.
                let _ = fs::remove_dir(job);
            }
        }
    }

    fn gone(&mut self, what: &str, bytes: u64) {
        self.things += 1;
        self.bytes += bytes;
        let word = if self.dry_run { "would remove" } else { "removed" };
        println!("{word}: {what}, {} KiB", bytes.div_ceil(1024));
    }

    fn fail(&mut self, what: &str, path: &Path, error: &std::io::Error) {
        self.failed = true;
        eprintln!("error: {what} {}: {error}", path.display());
    }

    fn sum(&self) {
        let word = if self.dry_run { "would be removed" } else { "removed" };
        println!("{} things {word}, {} KiB", self.things, self.bytes.div_ceil(1024));
    }
}

/// What a file or a directory with all in it takes on the disk, in bytes; links are not followed.
fn size(path: &Path) -> u64 {
    let mut waiting = vec![path.to_owned()];
    let mut bytes = 0u64;
    let mut counted = 0;
    while let Some(path) = waiting.pop() {
        let Ok(metadata) = fs::symlink_metadata(&path) else { continue };
        counted += 1;
        if counted > COUNTED {
            break;
        }
        // stat(2): st_blocks counts 512 bytes each.
        bytes = bytes.saturating_add(metadata.blocks().saturating_mul(512));
        if metadata.is_dir() {
            waiting.extend(fs::read_dir(&path).into_iter().flatten().flatten().map(|entry| entry.path()));
        }
    }
    bytes
}
