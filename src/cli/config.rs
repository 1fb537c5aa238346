//! `--config`: a file that a site's staff keep. Its settings stand behind the command line and the environment, and before
//! the defaults: [`read`] reads and checks all of them, [`apply`] puts those that nothing goes before in the defaults' place.
//!
//! A key is a flag's name without its dashes; flags that may be given several times are lists, under the name that they
//! have in the program (`labels` for `--label`). What may be a key, of which type, and which values it takes is asked of
//! clap's own arguments: a new flag is a new key.

mod document;
mod judge;
mod trust;

use std::fmt;
use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use clap::parser::ValueSource;
use clap::{Arg, ArgMatches, Command};

use self::judge::Judge;

/// The largest file: some hundred settings with a page of comment each. Its settings are handed to the pilot in one
/// variable, of which Linux takes 128 KiB (`MAX_ARG_STRLEN`).
const MOST_BYTES: u64 = 64 * 1024;

/// How long they may be, handed on: with a margin to what Linux takes.
const MOST_HANDED: usize = 100 * 1024;

/// A setting of the file.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Setting {
    /// The argument, as clap knows it.
    id: String,
    /// Its key in the file.
    key: String,
    /// Its values, as they would stand on the command line.
    values: Vec<String>,
    /// Where it stands.
    line: usize,
}

/// A file's settings; all of them are good.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Config {
    path: PathBuf,
    settings: Vec<Setting>,
}

/// What is wrong with the file: a line each.
#[derive(Debug, PartialEq, Eq)]
struct ConfigError(Vec<String>);

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.join("\n"))
    }
}

impl std::error::Error for ConfigError {}

/// Where a setting comes from that is not its default.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Origin {
    /// The flag, without its dashes.
    pub flag: String,
    /// What it is set to, on one line.
    pub value: String,
    /// Where.
    pub place: Place,
    /// The line of the file that it goes before, if there is one.
    pub over: Option<usize>,
}

/// See [`Origin`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// The command line.
    CommandLine,
    /// This variable.
    Variable(String),
    /// This line of the file.
    Line(usize),
}

/// Where the settings of a command come from.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Origins {
    /// The file, where there is one.
    pub file: Option<PathBuf>,
    /// All settings that are not their default.
    pub settings: Vec<Origin>,
    /// Keys of the file with their lines that the command has no flag for.
    pub unused: Vec<(String, usize)>,
    /// What the file contributes, for a pilot that is not to read it again.
    handed: Vec<(String, Vec<String>)>,
}

impl Origins {
    /// The words for settings of the file that a text names by their flags: empty when there is none.
    #[must_use]
    pub fn note(&self, text: &str) -> String {
        let mut note = String::new();
        for origin in &self.settings {
            let flag = format!("--{}", origin.flag);
            let named = text.match_indices(&flag).any(|(at, _)| {
                !text[at + flag.len()..].starts_with(|next: char| next == '-' || next.is_ascii_alphanumeric())
            });
            if let (true, Place::Line(line), Some(file)) = (named, &origin.place, &self.file) {
                note.push_str(&format!(" ({flag} is set in {}, line {line})", file.display()));
            }
        }
        note
    }

    /// What a pilot is handed, so that it has the same settings after a crash whatever has become of the file.
    #[must_use]
    pub fn handed(&self) -> Option<String> {
        if self.handed.is_empty() { None } else { serde_json::to_string(&self.handed).ok() }
    }
}

/// The key of an argument in the file.
fn key_of(arg: &Arg) -> String {
    arg.get_id().as_str().replace('_', "-")
}

/// The arguments of `run` that may stand in a file: all that have a long flag, and `--log`.
fn arguments(root: &Command) -> impl Iterator<Item = &Arg> {
    let run = root.find_subcommand("run").into_iter().flat_map(Command::get_arguments);
    run.chain(root.get_arguments().filter(|arg| arg.get_id() == "log")).filter(|arg| arg.get_long().is_some())
}

/// Reads and checks a file.
///
/// # Errors
/// All that is wrong with it: its line, its key, its value, what is wanted.
fn read(path: &Path, root: &Command) -> Result<Config, ConfigError> {
    let named = |problem: String| ConfigError(vec![format!("--config {}: {problem}", path.display())]);
    trust::only_ours(path).map_err(named)?;
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|file| file.take(MOST_BYTES + 1).read_to_end(&mut bytes))
        .map_err(|error| named(error.to_string()))?;
    if bytes.len() as u64 > MOST_BYTES {
        return Err(named(format!("it is larger than {} KiB", MOST_BYTES / 1024)));
    }
    let text = String::from_utf8(bytes).map_err(|error| {
        let good = &error.as_bytes()[..error.utf8_error().valid_up_to()];
        let line = 1 + good.iter().filter(|byte| **byte == b'\n').count();
        named(format!("line {line} is no UTF-8 text"))
    })?;
    let variable = |name: &str| std::env::var(name).ok();
    let (settings, faults) = settings(&text, root, &variable);
    if !faults.is_empty() {
        let lines = faults.into_iter().map(|(line, text)| format!("{}: line {line}: {text}", path.display()));
        return Err(ConfigError(lines.collect()));
    }
    let config = Config { path: std::path::absolute(path).unwrap_or_else(|_| path.to_owned()), settings };
    let length: usize = config.settings.iter().flat_map(|setting| &setting.values).map(String::len).sum();
    if length > MOST_HANDED / 2 {
        return Err(named(format!("its values are longer than {} KiB together", MOST_HANDED / 2048)));
    }
    Ok(config)
}

type Faults = Vec<(usize, String)>;

/// The settings of a text, and what is wrong with it. Pure, but for files that a flag's own check reads.
fn settings(text: &str, root: &Command, variable: &dyn Fn(&str) -> Option<String>) -> (Vec<Setting>, Faults) {
    let entries = match document::read(text) {
        Ok(entries) => entries,
        Err(faults) => {
            return (Vec::new(), faults.into_iter().map(|fault| (fault.line, fault.problem)).collect());
        }
    };
    let (mut settings, mut faults) = (Vec::<Setting>::new(), Faults::new());
    let mut judge = Judge::new(root);
    for entry in entries {
        if faults.len() == document::MOST_FAULTS {
            break;
        }
        let line = entry.line;
        match judge.setting(entry, variable) {
            Ok(Some(setting)) => match settings.iter_mut().find(|other| other.id == setting.id) {
                // The keys of one table.
                Some(other) => other.values.extend(setting.values),
                None => settings.push(setting),
            },
            Ok(None) => {}
            Err(problem) => faults.push((line, problem)),
        }
    }
    (settings, faults)
}

/// What in the file gives way, besides to its own flag: to say it by another flag is to say it as well. The variable
/// KUBECONFIG does not count: it is set for kubectl.
fn rival(id: &str, said: &dyn Fn(&str) -> Option<ValueSource>) -> bool {
    match id {
        "no_taint" => said("taints").is_some(),
        "bootstrap_kubeconfig" => said("kubeconfig") == Some(ValueSource::CommandLine),
        _ => false,
    }
}

/// Reads the file, if one is named, and applies it to the command of this name. What is wrong with it ends the program; what
/// the command makes no use of is said.
pub(super) fn settle(
    command: Command,
    file: Option<&Path>,
    name: &str,
    matches: &ArgMatches,
) -> (Command, Origins) {
    let config = match file.map(|file| read(file, &command)).transpose() {
        Ok(config) => config,
        Err(error) => {
            for line in error.to_string().lines() {
                eprintln!("error: {line}");
            }
            std::process::exit(2);
        }
    };
    let (command, origins) = apply(command, config.as_ref(), name, matches);
    if let (Some(file), false) = (&origins.file, origins.unused.is_empty()) {
        let keys: Vec<_> = origins.unused.iter().map(|(key, line)| format!("{key} (line {line})")).collect();
        eprintln!("note: `{name}` makes no use of these settings of {}: {}", file.display(), keys.join(", "));
    }
    (command, origins)
}

/// Puts the file's settings in the place of defaults, where neither the command line nor the environment says anything, in
/// the command of this name. Also where all settings come from.
fn apply(command: Command, config: Option<&Config>, name: &str, matches: &ArgMatches) -> (Command, Origins) {
    let ids: Vec<String> = command
        .find_subcommand(name)
        .into_iter()
        .flat_map(Command::get_arguments)
        .map(|arg| arg.get_id().as_str().to_owned())
        .chain(["log".to_owned()])
        .collect();
    let said = |id: &str| -> Option<ValueSource> {
        let known = ids.iter().any(|known| known == id);
        known
            .then(|| matches.value_source(id))
            .flatten()
            .filter(|source| *source != ValueSource::DefaultValue)
    };
    let mut origins = Origins { file: config.map(|config| config.path.clone()), ..Origins::default() };
    for setting in config.iter().flat_map(|config| &config.settings) {
        if !ids.contains(&setting.id) {
            origins.unused.push((setting.key.clone(), setting.line));
        } else if said(&setting.id).is_none() && !rival(&setting.id, &said) {
            origins.handed.push((setting.id.clone(), setting.values.clone()));
        }
    }
    let of_command = command.find_subcommand(name).into_iter().flat_map(Command::get_arguments);
    let global = command.get_arguments().filter(|arg| arg.get_id() == "log");
    for arg in of_command.chain(global) {
        let (id, Some(long)) = (arg.get_id().as_str(), arg.get_long()) else { continue };
        let in_file = config.iter().flat_map(|config| &config.settings).find(|setting| setting.id == id);
        let applied = origins.handed.iter().find(|(handed, _)| handed == id);
        let (values, place, over) = match (said(id), applied, in_file) {
            (Some(source), _, in_file) => {
                let raw = matches.get_raw(id).into_iter().flatten();
                let values = raw.map(|value| value.to_string_lossy().into_owned()).collect::<Vec<_>>();
                let variable = arg.get_env().filter(|_| source == ValueSource::EnvVariable);
                let place = variable
                    .map_or(Place::CommandLine, |name| Place::Variable(name.to_string_lossy().into_owned()));
                (values, place, in_file.map(|setting| setting.line))
            }
            (None, Some((_, values)), Some(setting)) => (values.clone(), Place::Line(setting.line), None),
            _ => continue,
        };
        // A flag that takes no value has none there.
        let value = if values.is_empty() { "true".to_owned() } else { values.join(", ") };
        origins.settings.push(Origin { flag: long.to_owned(), value, place, over });
    }
    (with(command, name, &origins.handed), origins)
}

/// Applies what a pilot was handed ([`Origins::handed`]).
pub(super) fn take(command: Command, name: &str, handed: &str) -> Command {
    match serde_json::from_str::<Vec<(String, Vec<String>)>>(handed) {
        Ok(settings) => with(command, name, &settings),
        // It is written by this same program. A pilot that was started again has pods, so it goes on.
        Err(error) => {
            eprintln!("warning: the settings of the file of --config are lost: {error}");
            command
        }
    }
}

fn with(mut command: Command, name: &str, settings: &[(String, Vec<String>)]) -> Command {
    for (id, values) in settings {
        // For the rest of the process's life: clap keeps texts of the program itself only.
        let values: Vec<&'static str> = values
            .iter()
            .map(|value| -> &'static str { Box::leak(value.clone().into_boxed_str()) })
            .collect();
        // A comma in the file's list is a part of its value.
        let set = |arg: Arg| arg.value_delimiter(None::<char>).default_values(values);
        let has = |command: &Command| command.get_arguments().any(|arg| arg.get_id() == id.as_str());
        if has(&command) {
            command = command.mut_arg(id, set);
        } else if command.find_subcommand(name).is_some_and(has) {
            command = command.mut_subcommand(name, |command| command.mut_arg(id, set));
        }
    }
    command
}

#[cfg(test)]
mod tests;
