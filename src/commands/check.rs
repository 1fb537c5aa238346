//! `jiriaf-pilot check`: says what would go wrong, before the job is submitted or inside it, with the mend for each.
//!
//! It takes `run`'s settings and looks at what `run` would do with them, by `run`'s own functions. Nothing is registered
//! and nothing is left behind. Every wait has a limit.

mod clock;
mod credentials;
mod directories;
mod finding;
mod host;
mod rights;
mod server;
mod tunnel;

use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, SystemTime};

use self::directories::Purpose;
use self::finding::{Finding, passes, render};
use super::run::setup;
use crate::allocation::duration::Walltime;
use crate::allocation::{self, DetectSettings, Environment, TrackerSettings, first_deadline};
use crate::cli::RunArgs;
use crate::cli::config::{Origin, Origins, Place};
use crate::cluster::Kube;

/// Prints what was found; the exit code is 0 when nothing is in the way of a pilot, else 1.
#[must_use]
pub fn run(args: RunArgs, origins: &Origins) -> ExitCode {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("error: {error}");
            return ExitCode::FAILURE;
        }
    };
    let findings = runtime.block_on(look(&args, origins));
    // A file system or a credential program that hangs may hold a blocking thread for ever.
    runtime.shutdown_background();
    let printed = std::io::stdout().lock().write_all(render(&findings).as_bytes());
    if printed.is_ok() && passes(&findings) { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

async fn look(args: &RunArgs, origins: &Origins) -> Vec<Finding> {
    let env = Environment::from_process();
    let now = SystemTime::now();
    let mut findings = vec![match setup::check_settings(args) {
        Ok(()) => Finding::ok("settings", format!("jiriaf-pilot {}", env!("CARGO_PKG_VERSION"))),
        Err(error) => {
            let error = error.to_string();
            Finding::fail("settings", format!("{error}{}", origins.note(&error)), "")
        }
    }];
    findings.extend(origins.settings.iter().map(|origin| setting(origin, origins)));

    let granted =
        allocation::detect(&env, &DetectSettings { ask_always: true, ..DetectSettings::new(now) }).await;
    let walltime = match args.pods.walltime {
        Some(Walltime::Limit(duration)) => Some(duration),
        Some(Walltime::Zero) | None => None,
    };
    let end = first_deadline(&granted, &TrackerSettings { walltime, ..TrackerSettings::new(now) }, now);
    let name = setup::node_name(args, &setup::site(args, &granted), &granted).unwrap_or_else(|error| {
        findings.push(Finding::fail("settings", error.to_string(), ""));
        args.node_name.clone().unwrap_or_default()
    });
    findings.extend(host::allocation(args, &granted, end.as_ref(), now));
    findings.extend(host::tools(&env, granted.batch, args.pods.images.as_ref()));
    findings.push(host::port(args));
    findings.extend(host::isolation(args).await);

    let home = env.filled("HOME").map(PathBuf::from);
    let given = args.pods.pods_dir.as_ref().map(|path| setup::by_variable(path, &env)).transpose();
    let given = given.unwrap_or_else(|error| {
        // What a batch system makes for each job is not there before.
        findings.push(Finding::warn("pods directory", error.to_string(), "look again within the job"));
        None
    });
    match given.or_else(|| home.clone()) {
        Some(pods) => findings.extend(directories::look(pods, Purpose::Pods).await),
        None => findings.push(Finding::warn("pods directory", "not looked at, for want of HOME", "")),
    }
    if home.is_none() {
        let mend = "set it to your home directory (pods see it too)";
        findings.push(Finding::fail("HOME", "is not set", mend));
    }
    let state = args.pods.state_dir.clone().unwrap_or_else(|| setup::default_state_dir(&env));
    findings.extend(directories::look(state, Purpose::State).await);

    match Kube::load(args.way_in(), home.as_deref()).await {
        Ok(mut kube) => {
            let (_tunnels, found) = tunnel::look(args, &mut kube, &env).await;
            findings.extend(found);
            let wanted = match &args.bootstrap_kubeconfig {
                Some(_) => server::Wanted::Certificate,
                None => server::Wanted::Pilot { namespaces: &args.namespaces },
            };
            findings.extend(credentials::look(&kube, &env, end.map(|end| end.at), now));
            findings.extend(server::look(&kube, &name, wanted).await);
        }
        Err(error) => {
            let text = error.to_string();
            let text = text.strip_prefix("kubeconfig ").unwrap_or(&text);
            findings.push(Finding::fail("kubeconfig", text, ""));
            findings.push(Finding::warn(
                "API server",
                "neither it nor the rights were looked at, for want of a kubeconfig",
                "",
            ));
        }
    }
    findings
}

/// What a setting is, and where that is said.
fn setting(origin: &Origin, origins: &Origins) -> Finding {
    let file = origins.file.as_deref().unwrap_or_else(|| std::path::Path::new("")).display();
    let place = match &origin.place {
        Place::CommandLine => "the command line".to_owned(),
        Place::Variable(name) => name.clone(),
        Place::Line(line) => format!("{file}, line {line}"),
    };
    let over = origin.over.map(|line| format!(", over {file}, line {line}")).unwrap_or_default();
    Finding::ok("setting", format!("{} = {} ({place}{over})", origin.flag, origin.value))
}

/// A time span for people: whole seconds, and no more than the two largest units.
fn span(duration: Duration) -> String {
    let text = humantime::format_duration(Duration::from_secs(duration.as_secs())).to_string();
    text.split(' ').take(2).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_are_short() {
        assert_eq!(span(Duration::from_millis(93_784_500)), "1day 2h");
        assert_eq!(span(Duration::from_millis(500)), "0s");
    }
}
