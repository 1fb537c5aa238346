//! Whether an entry of the file is a setting of `run`, and what: [`Judge`] asks clap's own arguments.

use std::cell::RefCell;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Arg, ArgAction, Command};

use super::document::{Entry, Value};
use super::{Setting, arguments, key_of};
use crate::pod::expansion::{Expand, Values, expand};

/// So much of a value is shown.
const SHOWN: usize = 80;

/// The longest path (PATH_MAX), so that variables in it cannot make it grow out of bounds.
const MOST_PATH: usize = 4096;

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
pub(super) struct Judge<'a> {
    root: &'a Command,
    /// `run` without variables and without commas between values, to judge one value at a time.
    run: Command,
}

impl<'a> Judge<'a> {
    pub(super) fn new(root: &'a Command) -> Self {
        let run = root.find_subcommand("run").cloned().unwrap_or_default();
        let run = run
            .args(root.get_arguments().filter(|arg| arg.get_id() == "log"))
            .mut_args(|arg| arg.env(None::<&'static str>).value_delimiter(None::<char>))
            .no_binary_name(true);
        Self { root, run }
    }

    /// The setting that an entry is; none where it says what is so anyway.
    pub(super) fn setting(
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
