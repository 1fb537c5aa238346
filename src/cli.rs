//! The command line, in one place: every flag, its environment variable, its default, and the check of its value.
//!
//! Start at [`main`]. A bad value is named with its flag and what is wanted, exit code 2, before anything is done.
//! [`values`] reads what stands for more than a text or a number, [`config`] the file of `--config`;
//! [`completions`] is for shells.

mod completions;
pub mod config;
mod values;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum};

use self::completions::Shell;
use self::config::Origins;
pub use self::values::Taint;
use self::values::{
    parse_address, parse_annotation, parse_back_off, parse_drain, parse_duration, parse_kill_wait,
    parse_label, parse_lead, parse_log, parse_namespace, parse_taint, parse_variable,
};
use crate::allocation::duration::{Walltime, parse_walltime};
use crate::commands;
use crate::guardian::{RESTARTED, SETTINGS};
use crate::pod::expansion::Expand;
use crate::pod::images::{self, Images};
use crate::pod::isolation::Mode;

/// What is logged where somebody reads it afterwards.
const NORMAL: &str = "info";

/// What is logged where somebody watches: their own output comes first.
const QUIET: &str = "warn";

/// A pilot job that makes a Slurm or PBS allocation a Kubernetes Node.
#[derive(Debug, Parser)]
#[command(name = "jiriaf-pilot", version, about, max_term_width = 110)]
struct Cli {
    /// What is logged: error, warn, info, debug, or per module as in tracing's filter syntax [default: info; for
    /// `play` and `check` warn].
    #[arg(long, global = true, env = "JIRIAF_LOG", value_parser = parse_log, value_name = "FILTER")]
    log: Option<String>,
    /// Settings in TOML: a key for each flag of `run` that neither the command line nor the environment sets
    /// (docs/examples/site.toml). Nobody but you and root may be able to write to it.
    #[arg(long, global = true, env = "JIRIAF_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,

    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Joins the cluster as a Node and runs its pods until the allocation ends.
    Run(Box<RunArgs>),
    /// The pilot itself, started by `run`'s guardian.
    #[command(hide = true)]
    Pilot(Box<RunArgs>),
    /// Runs the Pods and Jobs of Kubernetes manifests here and now, with no cluster and no batch system.
    ///
    /// A Pod that names no restartPolicy is run once (Never); one that says Always is restarted until Ctrl-C, as on a cluster.
    /// nodeSelector, affinity and tolerations are not looked at. The exit code is 0 when all Pods and Jobs succeed, else that
    /// of the first container that failed.
    Play(Box<PlayArgs>),
    /// Prints what the batch system granted, and where each fact was learnt.
    Allocation(AllocationArgs),
    /// Says what would go wrong, before the job is submitted or inside it, with the mend for each.
    Check(Box<RunArgs>),
    /// Removes what dead pilots of this user left on disk.
    Clean(CleanArgs),
    /// Prints a script that completes this program's flags, for a shell to read.
    Completions {
        /// The shell.
        #[arg(value_enum)]
        shell: Shell,
    },
}

/// How `allocation` prints.
#[derive(Debug, Clone, Copy, ValueEnum, PartialEq, Eq)]
pub enum Output {
    /// A table for people.
    Text,
    /// JSON for programs.
    Json,
}

/// How pod directories are laid out beneath the pods directory.
#[derive(Debug, Clone, Copy, ValueEnum, PartialEq, Eq)]
pub enum PodsLayout {
    /// `<pods-dir>/<pod name>`.
    Pod,
    /// `<pods-dir>/<namespace>/<pod name>`.
    Namespaced,
}

/// How variables in args and env are expanded.
#[derive(Debug, Clone, Copy, ValueEnum, PartialEq, Eq)]
pub enum ExpandArg {
    /// Kubernetes' `$(VAR)`, and besides a leading `~` and `$NAME` as JIRIAF's pods expect.
    Jiriaf,
    /// Kubernetes' `$(VAR)` alone.
    Kubernetes,
}

/// Which pods get namespaces of their own.
#[derive(Debug, Clone, Copy, ValueEnum, PartialEq, Eq)]
pub enum IsolationArg {
    /// None: pods run as the pilot does.
    None,
    /// All pods.
    Namespaces,
    /// Pods whose annotation jiriaf.isolation is `namespaces`.
    Annotation,
}

impl From<IsolationArg> for Mode {
    fn from(arg: IsolationArg) -> Self {
        match arg {
            IsolationArg::None => Self::None,
            IsolationArg::Namespaces => Self::Namespaces,
            IsolationArg::Annotation => Self::Annotation,
        }
    }
}

impl From<ExpandArg> for Expand {
    fn from(arg: ExpandArg) -> Self {
        match arg {
            ExpandArg::Jiriaf => Self::Jiriaf,
            ExpandArg::Kubernetes => Self::Kubernetes,
        }
    }
}

/// Settings of `allocation`.
#[derive(Debug, Args)]
pub struct AllocationArgs {
    /// How to print.
    #[arg(short, long, value_enum, default_value = "text")]
    pub output: Output,
    /// Walltime as `run` would take it.
    #[arg(long, env = "JIRIAF_WALLTIME", value_parser = parse_walltime, value_name = "DURATION")]
    pub walltime: Option<Walltime>,
}

/// Settings of `clean`.
#[derive(Debug, Args)]
pub struct CleanArgs {
    /// Where pod directories are.
    #[arg(long, env = "JIRIAF_PODS_DIR", value_name = "DIR")]
    pub pods_dir: Option<PathBuf>,
    /// Where pilots keep their state.
    #[arg(long, env = "JIRIAF_STATE_DIR", value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
    /// Only say what would be removed.
    #[arg(long)]
    pub dry_run: bool,
}

/// Settings that `run` and `play` share: where pods live and how their scripts start.
#[derive(Debug, Clone, Args)]
pub struct PodArgs {
    /// How long the pilot lives, from its first start: seconds, `2h 30m`, `HH:MM:SS` or `D-HH:MM:SS`. The earlier of
    /// this and the batch system's limit counts. 0: no walltime and alivetime labels.
    #[arg(long, env = "JIRIAF_WALLTIME", value_parser = parse_walltime, value_name = "DURATION")]
    pub walltime: Option<Walltime>,
    /// Where pod directories are made [default: $HOME].
    #[arg(long, env = "JIRIAF_PODS_DIR", value_name = "DIR")]
    pub pods_dir: Option<PathBuf>,
    /// How pod directories are laid out.
    #[arg(long, env = "JIRIAF_PODS_LAYOUT", value_enum, default_value = "pod")]
    pub pods_layout: PodsLayout,
    /// Where the pilot keeps its state: a directory of its own (0700) on node-local storage
    /// [default: jiriaf-pilot-<uid> under $TMPDIR or /tmp].
    #[arg(long, env = "JIRIAF_STATE_DIR", value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
    /// Names of environment variables that pods get although they look secret or misleading.
    #[arg(long, env = "JIRIAF_PASS_ENV", value_delimiter = ',', value_parser = parse_variable, value_name = "NAME")]
    pub pass_env: Vec<String>,
    /// What is replaced in args and env values.
    #[arg(long, env = "JIRIAF_EXPAND", value_enum, default_value = "jiriaf")]
    pub expand: ExpandArg,
    /// The longest wait before a container that keeps failing starts again, 1 s to 5 min (a kubelet's
    /// crashLoopBackOff.maxContainerRestartPeriod).
    #[arg(long, env = "JIRIAF_CRASH_LOOP_BACK_OFF_MAX", value_parser = parse_back_off, default_value = "5m", value_name = "DURATION")]
    pub crash_loop_back_off_max: Duration,
    /// A table of images: what a container does whose image names none of its volumeMounts (docs/reference.md, Images).
    #[arg(long, env = "JIRIAF_IMAGES", value_parser = load_images, value_name = "FILE")]
    pub images: Option<Images>,
    /// Which pods get user, mount, PID and UTS namespaces of their own: volumes at their absolute paths, own process ids, nothing
    /// of other pods. setuid programs do not work in them.
    #[arg(long, env = "JIRIAF_ISOLATION", value_enum, default_value = "none")]
    pub isolation: IsolationArg,
}

/// Settings of `play`.
#[derive(Debug, Args)]
pub struct PlayArgs {
    /// Manifests with Pods, Jobs and the ConfigMaps and Secrets that they use; `-` is standard input.
    #[arg(required = true, value_name = "FILE")]
    pub files: Vec<PathBuf>,
    /// Where pods live and how their scripts start.
    #[command(flatten)]
    pub pods: PodArgs,
}

/// Settings of `run` (and of `check`, which looks at what `run` would do).
#[derive(Debug, Clone, Args)]
pub struct RunArgs {
    /// Credentials for the API server [default: ~/.kube/config, else in-cluster].
    #[arg(long, env = "KUBECONFIG", value_name = "FILE")]
    pub kubeconfig: Option<PathBuf>,
    /// Gets a node's own identity by TLS bootstrap: a kubeconfig with a bootstrap token. It takes the place of --kubeconfig.
    #[arg(long, env = "JIRIAF_BOOTSTRAP_KUBECONFIG", value_name = "FILE")]
    pub bootstrap_kubeconfig: Option<PathBuf>,
    /// The Node's name: a DNS name of at most 63 bytes [default: <site or cluster>-<job id>-<host>].
    #[arg(long, env = "NODENAME", value_name = "NAME")]
    pub node_name: Option<String>,
    /// The Node's address [default: this host's address on the route to the API server].
    #[arg(long, env = "VKUBELET_POD_IP", value_parser = parse_address, value_name = "IP")]
    pub advertise_address: Option<String>,
    /// The port of the Node's own API (kubectl logs, exec, metrics); 0 takes a free one.
    #[arg(long, env = "KUBELET_PORT", default_value_t = 0, value_name = "PORT")]
    pub port: u16,
    /// A way through a firewall, kept open by OpenSSH: the API server is reached by it, and the Node's own port from
    /// there. Options as ?name=value&...: remote-port (0: sshd chooses), bind (*), api=0, ports=pods, identity, address.
    /// May be given several times; they stand in for each other.
    #[arg(
        long = "tunnel",
        env = "JIRIAF_TUNNEL",
        value_delimiter = ',',
        value_parser = crate::tunnel::url::parse,
        value_name = "ssh://[USER@]HOST[:PORT]"
    )]
    pub tunnels: Vec<crate::tunnel::Settings>,
    /// Certificates whose holders the Node's own API knows as users [default: the cluster's CA of the kubeconfig].
    #[arg(long, env = "JIRIAF_CLIENT_CA_FILE", value_name = "FILE")]
    pub client_ca_file: Option<PathBuf>,
    /// Lets anybody read /metrics/resource on the Node's own API, and nothing else.
    #[arg(long, env = "JIRIAF_ANONYMOUS_METRICS", value_parser = clap::builder::BoolishValueParser::new())]
    pub anonymous_metrics: bool,
    /// Serving certificate for the Node's own API.
    #[arg(long, env = "APISERVER_CERT_LOCATION", value_name = "FILE")]
    pub tls_cert_file: Option<PathBuf>,
    /// Key of the serving certificate.
    #[arg(long, env = "APISERVER_KEY_LOCATION", value_name = "FILE")]
    pub tls_private_key_file: Option<PathBuf>,
    /// The label jiriaf.nodetype [default: gpu where there are GPUs, else cpu].
    #[arg(long, env = "JIRIAF_NODETYPE", value_name = "TYPE")]
    pub node_type: Option<String>,
    /// The label jiriaf.site [default: the batch cluster's name].
    #[arg(long, env = "JIRIAF_SITE", value_name = "SITE")]
    pub site: Option<String>,
    /// A further label of the Node; may be given several times.
    #[arg(long = "label", env = "JIRIAF_LABELS", value_delimiter = ',', value_parser = parse_label, value_name = "KEY=VALUE")]
    pub labels: Vec<(String, String)>,
    /// A taint of the Node; the first one given replaces the default.
    #[arg(
        long = "taint",
        env = "JIRIAF_TAINTS",
        value_delimiter = ',',
        value_parser = parse_taint,
        value_name = "KEY[=VALUE]:EFFECT",
        default_value = "virtual-kubelet.io/provider=mock:NoSchedule"
    )]
    pub taints: Vec<Taint>,
    /// No taint: any pod may be scheduled here.
    #[arg(long)]
    pub no_taint: bool,
    /// A further annotation of the Node; may be given several times.
    #[arg(long = "annotation", env = "JIRIAF_ANNOTATIONS", value_delimiter = ',', value_parser = parse_annotation, value_name = "KEY=VALUE")]
    pub annotations: Vec<(String, String)>,
    /// Only pods of these namespaces are run; those of others are refused [default: all].
    #[arg(long, env = "JIRIAF_NAMESPACES", value_delimiter = ',', value_parser = parse_namespace, value_name = "NAMESPACE")]
    pub namespaces: Vec<String>,
    /// How long before the deadline no more pods are taken [default: 20 % of the time, 40 s to 120 s].
    #[arg(long, env = "JIRIAF_CORDON_BEFORE", value_parser = parse_duration, value_name = "DURATION")]
    pub cordon_before: Option<Duration>,
    /// How long before the deadline pods are ended; at least 5 s [default: 10 % of the time, 30 s to 60 s].
    #[arg(long, env = "JIRIAF_DRAIN_BEFORE", value_parser = parse_drain, value_name = "DURATION")]
    pub drain_before: Option<Duration>,
    /// Spreads the drains of a fleet: this pilot's cordon and drain come earlier by a part of it, which its Node's name
    /// decides. At most half of the time at the start.
    #[arg(long, env = "JIRIAF_STAGGER", value_parser = parse_duration, default_value = "0", value_name = "DURATION")]
    pub stagger: Duration,
    /// Ends the pilot, with exit code 0, when no pod has run for so long since the last one ended; 0: never.
    #[arg(long, env = "JIRIAF_IDLE_TIMEOUT", value_parser = parse_duration, default_value = "0", value_name = "DURATION")]
    pub idle_timeout: Duration,
    /// Ends the pilot, with exit code 0, when no pod has come for so long since its Node was registered; 0: never.
    #[arg(long, env = "JIRIAF_IDLE_TIMEOUT_FIRST", value_parser = parse_duration, default_value = "0", value_name = "DURATION")]
    pub idle_timeout_first: Duration,
    /// What the job script's --signal=B:USR1@N promises: that this signal (or USR2) comes this long before the end.
    #[arg(long, env = "JIRIAF_SIGNAL_LEAD", value_parser = parse_lead, value_name = "DURATION")]
    pub signal_lead: Option<Duration>,
    /// Between the batch system's SIGTERM and its SIGKILL [default: Slurm's KillWait less a margin; PBS: 8 s].
    #[arg(long, env = "JIRIAF_KILL_WAIT", value_parser = parse_kill_wait, value_name = "DURATION")]
    pub kill_wait: Option<Duration>,
    /// How long an API server that cannot be reached at the start is tried.
    #[arg(long, env = "JIRIAF_STARTUP_TIMEOUT", value_parser = parse_duration, default_value = "5m", value_name = "DURATION")]
    pub startup_timeout: Duration,
    /// Where pods live and how their scripts start.
    #[command(flatten)]
    pub pods: PodArgs,
}

impl RunArgs {
    /// The kubeconfig that tells the way to the API server.
    #[must_use]
    pub fn way_in(&self) -> Option<&std::path::Path> {
        self.bootstrap_kubeconfig.as_deref().or(self.kubeconfig.as_deref())
    }
}

/// Runs the program: the small stages first, which never look at the rest of the command line, then the commands.
#[must_use]
pub fn main() -> ExitCode {
    let args: Vec<OsString> = std::env::args_os().collect();
    match args.get(1).and_then(|arg| arg.to_str()) {
        Some("supervise") => return crate::container::supervise(),
        Some("launch") => return crate::container::launch(),
        Some("init") => return crate::container::isolation::init(),
        Some("become") => return crate::container::become_program(),
        Some("try-namespaces") => return crate::container::isolation::try_namespaces(),
        _ => {}
    }
    let (cli, origins) = parse(&args);
    let log = cli.log.as_deref();
    match cli.command {
        // The guardian hands the same arguments to the pilot; parsing them here first makes a bad one cost nothing.
        Command::Run(run) => commands::run::guard(&run, args, &origins),
        Command::Pilot(run) => with_log(log.unwrap_or(NORMAL), || commands::run::pilot(*run)),
        Command::Play(play) => with_log(log.unwrap_or(QUIET), || commands::play::run(*play)),
        Command::Allocation(allocation) => with_log(log.unwrap_or(NORMAL), || {
            let walltime = match allocation.walltime {
                Some(Walltime::Limit(duration)) => Some(duration),
                Some(Walltime::Zero) | None => None,
            };
            block_on(commands::allocation::run(allocation.output == Output::Json, walltime))
        }),
        Command::Check(run) => with_log(log.unwrap_or(QUIET), || commands::check::run(*run, &origins)),
        Command::Clean(clean) => with_log(log.unwrap_or(NORMAL), || commands::clean::run(&clean)),
        Command::Completions { shell } => completions::print(shell),
    }
}

/// The command line as its users see it, without what is the program's own: what completions and man pages are made of.
#[must_use]
pub fn command() -> clap::Command {
    let whole = Cli::command();
    let shown = whole.get_subcommands().filter(|command| !command.is_hide_set()).cloned();
    clap::Command::new("jiriaf-pilot")
        .version(env!("CARGO_PKG_VERSION"))
        .about(whole.get_about().cloned().unwrap_or_default())
        .args(whole.get_arguments().cloned())
        .subcommands(shown)
        .subcommand_required(true)
}

/// Parses the command line. A variable that is set and empty counts as not set: start scripts export such. A file's
/// settings are put in the place of the defaults, once it is known which of them something goes before.
fn parse(args: &[OsString]) -> (Cli, Origins) {
    let unset = |arg: clap::Arg| match arg.get_env() {
        Some(name) if std::env::var_os(name).is_some_and(|value| value.is_empty()) => {
            arg.env(None::<&'static str>)
        }
        _ => arg,
    };
    let mut command = Cli::command().mut_args(unset).mut_subcommands(|command| command.mut_args(unset));
    // A pilot has what its guardian has read, also when it is started again: the file may be another one by then, or gone,
    // and with another Node's name its pods would be lost.
    if let Ok(held) = std::env::var(SETTINGS) {
        command = config::take(command, "pilot", &held);
    }
    let matches = command.clone().get_matches_from(args);
    let cli = from_matches(&matches);
    let (Some((name, sub)), false) =
        (matches.subcommand(), matches!(cli.command, Command::Pilot(_) | Command::Completions { .. }))
    else {
        return (cli, Origins::default());
    };
    let (command, origins) = config::settle(command, cli.config.as_deref(), name, sub);
    let cli = if cli.config.is_some() { from_matches(&command.get_matches_from(args)) } else { cli };
    (cli, origins)
}

fn from_matches(matches: &clap::ArgMatches) -> Cli {
    match Cli::from_arg_matches(matches) {
        Ok(cli) => cli,
        Err(error) => error.exit(),
    }
}

/// Reads `--images`. A pilot that was started again after a crash has containers to take up, whatever has become of the
/// file since.
fn load_images(file: &str) -> Result<Images, String> {
    images::load(file).or_else(|error| match std::env::var_os(RESTARTED) {
        None => Err(error),
        Some(_) => {
            eprintln!("warning: invalid value '{file}' for '--images': {error}; no image is run by it");
            Ok(Images::default())
        }
    })
}

/// Runs a command that waits for others, on one thread.
fn block_on(command: impl Future<Output = ExitCode>) -> ExitCode {
    match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime.block_on(command),
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(1)
        }
    }
}

/// Sets the log up on standard error, then runs the command.
fn with_log(filter: &str, command: impl FnOnce() -> ExitCode) -> ExitCode {
    use std::io::IsTerminal;
    use tracing_subscriber::layer::SubscriberExt as _;
    use tracing_subscriber::util::SubscriberInitExt as _;
    // The libraries' own complaints come without a context; what concerns a user is said by the pilot.
    let quiet = if filter.contains("debug") || filter.contains("trace") {
        ""
    } else {
        ",kube_client=off,kube_runtime=off,tower=off"
    };
    // Not EnvFilter, whose regular expressions nobody here needs: they are half a megabyte of every process.
    let filter = match format!("{filter}{quiet}").parse::<tracing_subscriber::filter::Targets>() {
        Ok(filter) => filter,
        Err(error) => {
            eprintln!(
                "error: invalid value '{filter}' for '--log': {error}; wanted: error, warn, info or debug"
            );
            return ExitCode::from(2);
        }
    };
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false)
        // Without this, a log that cannot be written (a full disk, a terminal that is gone) would end the pilot.
        .log_internal_errors(false);
    tracing_subscriber::registry().with(lines).with(filter).init();
    command()
}

/// The settings that these arguments of `run` make.
#[cfg(test)]
pub(crate) fn run_args(arguments: &[&str]) -> RunArgs {
    match Cli::try_parse_from(["jiriaf-pilot", "run"].iter().chain(arguments)).map(|cli| cli.command) {
        Ok(Command::Run(args)) => *args,
        other => panic!("{other:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_bad_value_is_refused_and_named() {
        for (args, named) in [
            (vec!["jiriaf-pilot", "run", "--walltime", "soon"], "--walltime"),
            (vec!["jiriaf-pilot", "run", "--advertise-address", "here"], "--advertise-address"),
            (vec!["jiriaf-pilot", "run", "--label", "a=b c"], "--label"),
            (vec!["jiriaf-pilot", "run", "--label", "a b=c"], "--label"),
            (vec!["jiriaf-pilot", "run", "--annotation", "a b=c"], "--annotation"),
            (vec!["jiriaf-pilot", "run", "--taint", "a b:NoSchedule"], "--taint"),
            (vec!["jiriaf-pilot", "run", "--namespaces", "work,Play"], "--namespaces"),
            (vec!["jiriaf-pilot", "run", "--pass-env", "A=b"], "--pass-env"),
            (vec!["jiriaf-pilot", "run", "--drain-before", "1s"], "--drain-before"),
            (vec!["jiriaf-pilot", "run", "--signal-lead", "0"], "--signal-lead"),
            (vec!["jiriaf-pilot", "run", "--stagger", "much"], "--stagger"),
            (vec!["jiriaf-pilot", "run", "--idle-timeout", "soon"], "--idle-timeout"),
            (vec!["jiriaf-pilot", "run", "--idle-timeout-first", "never"], "--idle-timeout-first"),
            (vec!["jiriaf-pilot", "run", "--kill-wait", "2"], "--kill-wait"),
            (vec!["jiriaf-pilot", "run", "--port", "70000"], "--port"),
            (vec!["jiriaf-pilot", "run", "--tunnel", "ssh://login?colour=red"], "--tunnel"),
            (vec!["jiriaf-pilot", "run", "--images", "/nonexistent"], "--images"),
            (vec!["jiriaf-pilot", "play", "--images", "Cargo.toml", "x"], "--images"),
            (vec!["jiriaf-pilot", "check", "--images", "Cargo.toml"], "--images"),
            (vec!["jiriaf-pilot", "run", "--isolation", "all"], "--isolation"),
            (vec!["jiriaf-pilot", "run", "--bogus"], "--bogus"),
        ] {
            let error = Cli::try_parse_from(args).unwrap_err();
            assert_eq!(error.exit_code(), 2);
            assert!(error.to_string().contains(named), "{error}");
        }
    }

    #[test]
    fn blanks_around_the_parts_of_a_list_do_not_count() {
        let args = [
            ["--namespaces", "a, b"],
            ["--pass-env", " A ,B_TOKEN"],
            ["--label", "x=1, y = 2"],
            ["--annotation", "x/n=1, y =some words"],
            ["--taint", "a=b:NoSchedule, c:NoExecute"],
        ];
        let run = run_args(args.as_flattened());
        let pairs = |pairs: &[(&str, &str)]| -> Vec<(String, String)> {
            pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
        };
        assert_eq!(run.namespaces, ["a", "b"]);
        assert_eq!(run.pods.pass_env, ["A", "B_TOKEN"]);
        assert_eq!(run.labels, pairs(&[("x", "1"), ("y", "2")]));
        assert_eq!(run.annotations, pairs(&[("x/n", "1"), ("y", "some words")]));
        let taints: Vec<_> = run.taints.iter().map(ToString::to_string).collect();
        assert_eq!(taints, ["a=b:NoSchedule", "c:NoExecute"]);
    }
}
