//! `--config`: a file that a site's staff keep. Its settings stand behind the command line and the environment, and before
//! the defaults: [`read`] reads and checks all of them, [`apply`] puts those that nothing goes before in the defaults' place.
//!
//! A key is a flag's name without its dashes; flags that may be given several times are lists, under the name that they
//! have in the program (`labels` for `--label`). What may be a key, of which type, and which values it takes is asked of
//! clap's own arguments: a new flag is a new key.

mod document;
mod trust;

use std::cell::RefCell;
use std::fmt;
use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Command};

use self::document::{Entry, Value};
use crate::pod::expansion::{Expand, Values, expand};

/// The largest file: some hundred settings with a page of comment each. Its settings are handed to the pilot in one
/// variable, of which Linux takes 128 KiB (`MAX_ARG_STRLEN`).
const MOST_BYTES: u64 = 64 * 1024;

/// How long they may be, handed on: with a margin to what Linux takes.
const MOST_HANDED: usize = 100 * 1024;

/// The longest path (PATH_MAX), so that variables in it cannot make it grow out of bounds.
const MOST_PATH: usize = 4096;

/// So much of a value is shown.
const SHOWN: usize = 80;

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
pub struct Config {
    path: PathBuf,
    settings: Vec<Setting>,
}

/// What is wrong with the file: a line each.
#[derive(Debug, PartialEq, Eq)]
pub struct ConfigError(Vec<String>);

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
pub fn read(path: &Path, root: &Command) -> Result<Config, ConfigError> {
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

/// How a setting is written in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    Truth,
    Text,
    Number,
    Path,
    List,
    Pairs,
}

impl Form {
    fn of(arg: &Arg) -> Self {
        let name = arg.get_value_names().and_then(<[_]>::first).map_or("", |name| name.as_str());
        match (arg.get_action(), name) {
            (ArgAction::SetTrue, _) => Self::Truth,
            (ArgAction::Append, "KEY=VALUE") => Self::Pairs,
            (ArgAction::Append, _) => Self::List,
            (_, "FILE" | "DIR") => Self::Path,
            (_, "DURATION" | "PORT") => Self::Number,
            _ => Self::Text,
        }
    }

    fn wanted(self, key: &str) -> String {
        match self {
            Self::Truth => format!("{key} = true"),
            Self::Text | Self::Path => format!("a text in quotes, {key} = \"…\""),
            Self::Number => format!("a whole number or a text in quotes, {key} = \"…\""),
            Self::List => format!("a list of texts in quotes, {key} = [\"…\", \"…\"]"),
            Self::Pairs => {
                format!("a list, {key} = [\"KEY=VALUE\"], or a table, {key} = {{ KEY = \"VALUE\" }}")
            }
        }
    }
}

/// Judges settings by clap's own arguments.
struct Judge<'a> {
    root: &'a Command,
    /// `run` without variables and without commas between values, to judge one value at a time.
    run: Command,
}

impl<'a> Judge<'a> {
    fn new(root: &'a Command) -> Self {
        let run = root.find_subcommand("run").cloned().unwrap_or_default();
        let run = run
            .args(root.get_arguments().filter(|arg| arg.get_id() == "log"))
            .mut_args(|arg| arg.env(None::<&'static str>).value_delimiter(None::<char>))
            .no_binary_name(true);
        Self { root, run }
    }

    /// The setting that an entry is; none where it says what is so anyway.
    fn setting(
        &mut self,
        entry: Entry,
        variable: &dyn Fn(&str) -> Option<String>,
    ) -> Result<Option<Setting>, String> {
        let key = entry.path.first().cloned().unwrap_or_default();
        let Some(arg) = arguments(self.root).find(|arg| key_of(arg) == key) else {
            return Err(self.unknown(&key));
        };
        let (form, id) = (Form::of(arg), arg.get_id().as_str().to_owned());
        let long = arg.get_long().unwrap_or_default().to_owned();
        let wrong = |value: &Value| format!("{key} = {}: {} is wanted", shown(value), form.wanted(&key));
        let values = match (form, &entry.path[1..], entry.value) {
            (Form::Truth, [], Value::Truth(truth)) => {
                return Ok(truth.then(|| Setting {
                    id,
                    key: key.clone(),
                    values: vec!["true".to_owned()],
                    line: entry.line,
                }));
            }
            (Form::Pairs, [name], Value::Text(text)) => vec![format!("{name}={text}")],
            (Form::List | Form::Pairs, [], Value::List(items)) => {
                let texts = items.into_iter().map(|item| match item {
                    Value::Text(text) => Ok(text),
                    other => Err(wrong(&Value::List(vec![other]))),
                });
                texts.collect::<Result<_, _>>()?
            }
            (Form::Path, [], Value::Text(text)) => {
                vec![absolute(&text, variable).map_err(|problem| format!("{key} = {text:?}: {problem}"))?]
            }
            (Form::Text | Form::Number, [], Value::Text(text)) | (Form::Number, [], Value::Number(text)) => {
                vec![text]
            }
            (_, [], value) => return Err(wrong(&value)),
            (_, _, value) => {
                let whole = entry.path.join(".");
                return Err(format!("{whole} = {}: {} is wanted", shown(&value), form.wanted(&key)));
            }
        };
        for value in &values {
            if let Some(problem) = self.refused(&long, value) {
                return Err(format!("{key} = {}: {problem}", cut(&format!("{value:?}"))));
            }
        }
        // An empty list takes nothing away: the default stays.
        Ok((!values.is_empty()).then_some(Setting { id, key, values, line: entry.line }))
    }

    /// What the flag itself has against a value.
    fn refused(&mut self, long: &str, value: &str) -> Option<String> {
        let error = self.run.try_get_matches_from_mut([format!("--{long}={value}")]).err()?;
        if error.kind() == ErrorKind::MissingRequiredArgument {
            return None;
        }
        if let Some(source) = std::error::Error::source(&error) {
            return Some(source.to_string());
        }
        match error.get(ContextKind::ValidValue) {
            Some(ContextValue::Strings(valid)) if !valid.is_empty() => {
                Some(format!("one of {} is wanted", valid.join(", ")))
            }
            _ if value.is_empty() => Some("a value is wanted; leave the key out for the default".to_owned()),
            _ => error.to_string().lines().next().map(str::to_owned),
        }
    }

    /// A key that is none, and what was perhaps meant.
    fn unknown(&mut self, key: &str) -> String {
        let plain = key.trim_start_matches('-').replace('_', "-").to_ascii_lowercase();
        let by_name = |name: &str| {
            arguments(self.root).find(|arg| key_of(arg) == name || arg.get_long() == Some(name)).map(key_of)
        };
        let meant = by_name(&plain).or_else(|| {
            // clap's own guess.
            let error = self.run.try_get_matches_from_mut([format!("--{plain}=x")]).err()?;
            let guess = match error.get(ContextKind::SuggestedArg) {
                Some(ContextValue::String(guess)) => guess.clone(),
                Some(ContextValue::Strings(guesses)) => guesses.first()?.clone(),
                _ => return None,
            };
            let name = guess.trim_start_matches('-');
            arguments(self.root).find(|arg| arg.get_long() == Some(name)).map(key_of)
        });
        let hint = match meant {
            Some(meant) => format!("is `{meant}` meant?"),
            None => "a flag of `jiriaf-pilot run` is wanted, without its dashes".to_owned(),
        };
        format!("{} is no setting: {hint}", cut(key))
    }
}

/// A path with `~` and variables replaced. A relative one would lead somewhere else from each directory.
fn absolute(text: &str, variable: &dyn Fn(&str) -> Option<String>) -> Result<String, String> {
    let unset = RefCell::new(Vec::new());
    let look = |name: &str| {
        let value = variable(name).filter(|value| !value.is_empty());
        if value.is_none() {
            unset.borrow_mut().push(name.to_owned());
        }
        value
    };
    let home = variable("HOME").filter(|home| !home.is_empty());
    let values = Values { declared: &|_| None, environment: &look, home: home.as_deref() };
    let path = expand(text, Expand::Jiriaf, &values).map_err(|error| error.to_string())?;
    if let Some(name) = unset.borrow().first() {
        return Err(format!("the variable {name} is not set"));
    }
    if path.len() > MOST_PATH {
        return Err(format!("it is longer than {MOST_PATH} bytes"));
    }
    if !path.is_empty() && !path.starts_with('/') {
        return Err("a path from the root is wanted, or one that begins with ~/ or a variable".to_owned());
    }
    Ok(path)
}

fn shown(value: &Value) -> String {
    cut(&match value {
        Value::Text(text) => format!("{text:?}"),
        Value::Number(number) => number.clone(),
        Value::Truth(truth) => truth.to_string(),
        Value::List(items) => {
            format!("[{}]", items.iter().map(shown).collect::<Vec<_>>().join(", "))
        }
        Value::Other(kind) => (*kind).to_owned(),
    })
}

fn cut(text: &str) -> String {
    match text.char_indices().nth(SHOWN) {
        Some((at, _)) => format!("{}…", &text[..at]),
        None => text.to_owned(),
    }
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

/// Puts the file's settings in the place of defaults, where neither the command line nor the environment says anything, in
/// the command of this name. Also where all settings come from.
pub fn apply(
    command: Command,
    config: Option<&Config>,
    name: &str,
    matches: &ArgMatches,
) -> (Command, Origins) {
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
pub fn take(command: Command, name: &str, handed: &str) -> Command {
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
