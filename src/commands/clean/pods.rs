//! The pod directories of dead pilots of this host. Nothing without our marker is touched, nothing of another host's.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::states::{self, Life};
use crate::commands::file_systems;
use crate::container::process;
use crate::pod::directory::{self, Marker};

/// Directories that are looked into for a marker: a home directory may hold more, and `clean` says so then.
const LOOKS: usize = 100_000;

/// A pod's directory.
#[derive(Debug)]
pub struct PodDirectory {
    /// Where it is.
    pub path: PathBuf,
    /// Whose it is.
    pub marker: Marker,
    /// Whether its pilot lives.
    pub life: Life,
}

/// What is known of the pilot in a marker.
#[derive(Debug, Clone)]
struct Signs {
    /// Whether the marker was made in this boot: then by this host, whatever it was called there.
    this_boot: bool,
    this_host: bool,
    pilot_lives: bool,
    /// The life of a state directory of its Node's name, where there is one.
    state: Option<Life>,
    network: Option<&'static str>,
}

fn judge(signs: &Signs) -> Life {
    match &signs.state {
        _ if signs.pilot_lives => Life::Live,
        Some(Life::Live) => Life::Live,
        Some(Life::Unknown(why)) => Life::Unknown(why.clone()),
        Some(Life::Dead) | None if signs.this_boot => Life::Dead,
        _ if !signs.this_host => Life::Unknown("another host's".to_owned()),
        // Hosts of two clusters may have one name and one home directory.
        _ => match signs.network {
            Some(kind) => {
                Life::Unknown(format!("on {kind}, and of another host of this name or of before a reboot"))
            }
            None => Life::Dead,
        },
    }
}

/// The pods' directories in `root`, in either layout, and whether all of it could be looked at. `pilots` are the lives of
/// the pilots whose state directories were found, `host` is this host's name.
///
/// # Errors
/// When the root cannot be read; none there is no error.
pub fn find(
    root: &Path,
    host: &str,
    pilots: &BTreeMap<String, Life>,
) -> io::Result<(Vec<PodDirectory>, bool)> {
    let boot = process::boot_id();
    let network = file_systems::network(root);
    let life = |marker: &Marker| {
        judge(&Signs {
            this_boot: !boot.is_empty() && marker.pilot.boot == boot,
            this_host: marker.host == host && host != "localhost",
            pilot_lives: states::is_alive(&marker.pilot),
            state: marker.node.as_ref().and_then(|node| pilots.get(node)).cloned(),
            network,
        })
    };
    let mut left = LOOKS;
    let mut found = Vec::new();
    for path in directories(root, &mut left)? {
        match directory::read_marker(&path) {
            Some(marker) if is_named(&path, &marker) => {
                found.push(PodDirectory { life: life(&marker), path, marker });
            }
            Some(_) => {}
            // `<pods-dir>/<namespace>/<pod name>`; a directory that cannot be read is no namespace of ours.
            None => {
                let namespace = path.file_name().map(ToOwned::to_owned).unwrap_or_default();
                for path in directories(&path, &mut left).unwrap_or_default() {
                    let marker = directory::read_marker(&path);
                    if let Some(marker) = marker.filter(|m| is_named(&path, m) && *m.namespace == *namespace)
                    {
                        found.push(PodDirectory { life: life(&marker), path, marker });
                    }
                }
            }
        }
    }
    // Files that are stored beside the logs (`--isolation`) go with their pod's directory; where somebody has removed that
    // alone, they are found by themselves.
    for path in stored(root, &mut left) {
        let marker = directory::read_marker(&path);
        if let Some(marker) = marker.filter(|marker| found.iter().all(|pod| pod.marker.uid != marker.uid)) {
            found.push(PodDirectory { life: life(&marker), path, marker });
        }
    }
    found.sort_by(|a, b| a.path.cmp(&b.path));
    Ok((found, left > 0))
}

fn stored(root: &Path, left: &mut usize) -> Vec<PathBuf> {
    let jobs = directories(&root.join(directory::KEPT), left).unwrap_or_default();
    let stores = jobs.iter().filter_map(|job| directories(&directory::store(job, ""), left).ok());
    stores.flatten().collect()
}

/// Whether a directory has a name that we would have given it: one that somebody has renamed or copied is theirs.
fn is_named(path: &Path, marker: &Marker) -> bool {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    name == marker.name || name == directory::suffixed(&marker.name, &marker.uid)
}

/// Directories of ours in `root` that may be a pod's or a namespace's: links and hidden ones are neither.
fn directories(root: &Path, left: &mut usize) -> io::Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(root) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut found = Vec::new();
    for entry in entries.flatten() {
        if *left == 0 {
            break;
        }
        let hidden = entry.file_name().as_encoded_bytes().starts_with(b".");
        // DirEntry's metadata does not follow links.
        if !hidden && entry.metadata().is_ok_and(|metadata| metadata.is_dir() && states::is_ours(&metadata)) {
            *left -= 1;
            found.push(entry.path());
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_dead_pilots_of_this_host_are_dead() {
        let dead =
            Signs { this_boot: true, this_host: true, pilot_lives: false, state: None, network: Some("NFS") };
        let unknown = |signs: Signs| matches!(judge(&signs), Life::Unknown(_));
        assert_eq!(judge(&dead), Life::Dead);
        assert_eq!(judge(&Signs { pilot_lives: true, ..dead.clone() }), Life::Live);
        assert_eq!(judge(&Signs { state: Some(Life::Live), ..dead.clone() }), Life::Live);
        assert!(unknown(Signs { state: Some(Life::Unknown(String::new())), ..dead.clone() }));
        assert!(unknown(Signs { this_boot: false, ..dead.clone() }), "hosts of one name");
        assert!(unknown(Signs { this_boot: false, this_host: false, network: None, ..dead.clone() }));
        assert_eq!(judge(&Signs { this_boot: false, network: None, ..dead.clone() }), Life::Dead, "rebooted");
    }
}
