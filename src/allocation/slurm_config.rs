//! KillWait, of Slurm's configuration: what passes between SIGTERM and SIGKILL.

use std::path::Path;
use std::time::Duration;

use super::ask::AskError;
use super::command::Program;
use super::environment::Environment;
use super::pbs::read_bounded;

/// Where a node has slurm.conf where SLURM_CONF does not say: as packages have it, and where slurmd keeps what slurmctld gave it
/// ("configless", slurm.conf(5)).
const FILES: [&str; 3] =
    ["/etc/slurm/slurm.conf", "/run/slurm/conf/slurm.conf", "/etc/slurm-llnl/slurm.conf"];

/// KillWait as this node's own slurm.conf has it, which is what its slurmd goes by. No question is needed then: all pilots of
/// a job would put it to slurmctld at the same moment.
pub(super) fn kill_wait_of_node(env: &Environment) -> Option<Duration> {
    let of = |file: &str| parse_kill_wait(&read_bounded(Path::new(file))?);
    match env.filled("SLURM_CONF") {
        Some(file) => of(file),
        None => FILES.into_iter().find_map(of),
    }
}

/// KillWait of `scontrol show config`: for a file that leaves it to an Include, or to the default.
///
/// # Errors
/// See [`AskError`].
pub(super) async fn ask_kill_wait(env: &Environment, limit: Duration) -> Result<Duration, AskError> {
    let output = Program::find("scontrol", env)
        .args(["show", "config"])
        .without(|name| name == "SLURM_CLUSTERS")
        .run(limit)
        .await?
        .success()?;
    parse_kill_wait(&output.stdout).ok_or_else(|| AskError::Unreadable {
        command: "scontrol show config",
        job: "(any)".to_owned(),
        what: "it has no line `KillWait = N sec`".to_owned(),
    })
}

/// Reads `KillWait                = 30 sec`, and `killwait=30 # seconds` of the file itself.
fn parse_kill_wait(config: &str) -> Option<Duration> {
    let value = config.lines().find_map(|line| {
        let (name, value) = line.split('#').next()?.split_once('=')?;
        name.trim().eq_ignore_ascii_case("KillWait").then(|| value.trim())
    })?;
    let seconds: u16 = value.strip_suffix("sec").unwrap_or(value).trim().parse().ok()?;
    // slurmd waits at least 5 s, whatever KillWait says (slurmd's req.c).
    Some(Duration::from_secs(seconds.max(5).into()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn kill_wait_is_read_from_the_configuration() {
        let config = "KillOnBadExit           = 0\nKillWait                = 30 sec\nLaunchType = x\n";
        assert_eq!(parse_kill_wait(config), Some(Duration::from_secs(30)));
        assert_eq!(parse_kill_wait("KillWait = 2 sec"), Some(Duration::from_secs(5)));
        let file = "ClusterName=x\n#KillWait=99\n# KillWait=98\n  killwait=60 # a site's own\nWaitTime=0\n";
        assert_eq!(parse_kill_wait(file), Some(Duration::from_secs(60)));
        assert_eq!(parse_kill_wait("KillWait = soon"), None);
        assert_eq!(parse_kill_wait("Include other.conf"), None);
        assert_eq!(parse_kill_wait(""), None);
    }

    #[test]
    fn a_nodes_own_file_is_read_where_slurm_conf_says() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "KillWait=45\n").unwrap();
        let of = |path: &str| kill_wait_of_node(&Environment::from_pairs([("SLURM_CONF", path)]));
        assert_eq!(of(file.path().to_str().unwrap()), Some(Duration::from_secs(45)));
        assert_eq!(of("/nonexistent"), None);
    }

    proptest! {
        #[test]
        fn no_configuration_makes_the_parser_panic(text in "[kilwaKW=# \\n0-9sec]{0,60}", any in ".{0,40}") {
            let _ = parse_kill_wait(&text);
            let _ = parse_kill_wait(&any);
        }
    }
}
