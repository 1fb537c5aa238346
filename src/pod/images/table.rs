//! The file of `--images`: YAML, read whole, each mistake with its line.

use serde::Deserialize;
use serde_saphyr::Spanned;

use super::reference::{Pattern, Reference};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    images: Vec<Row>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Row {
    name: Spanned<String>,
    #[serde(default)]
    run: How,
    #[serde(default)]
    entrypoint: Vec<String>,
    #[serde(default)]
    args: Vec<String>,
    image: Option<String>,
    options: Option<Vec<String>>,
}

#[derive(Deserialize, Default, PartialEq, Clone, Copy)]
#[serde(rename_all = "lowercase")]
enum How {
    #[default]
    Host,
    Apptainer,
}

/// What is done for the images that a pattern matches.
#[derive(Debug)]
pub(super) struct Entry {
    pub pattern: Pattern,
    /// Program and first arguments, where the pod gives no `command`.
    pub entrypoint: Vec<String>,
    /// Arguments, where the pod gives neither `command` nor `args`; without an entrypoint, program and arguments.
    pub args: Vec<String>,
    /// How Apptainer runs it; else it is a program of the host.
    pub apptainer: Option<Apptainer>,
}

#[derive(Debug)]
pub(super) struct Apptainer {
    /// The image, with what is to be filled in.
    pub image: String,
    pub options: Vec<String>,
}

impl Apptainer {
    /// What Apptainer is told to run. No part of a name can hold a brace ([`Reference::parse`]).
    pub(super) fn image(&self, reference: &Reference) -> String {
        let image = self.image.replace("{image}", &reference.full());
        image.replace("{name}", reference.short()).replace("{tag}", reference.tag())
    }
}

/// What `image` is where it is left out.
const PULLED: &str = "docker://{image}";

pub(super) fn parse(text: &str) -> Result<Vec<Entry>, String> {
    let file: File = serde_saphyr::from_str(text).map_err(|error| {
        let text = error.to_string();
        text.strip_prefix("error: ").unwrap_or(&text).to_owned()
    })?;
    let mut entries: Vec<(u64, Entry)> = Vec::new();
    for row in file.images {
        let line = row.name.referenced.line();
        let name = row.name.value.clone();
        let entry = entry(row).map_err(|problem| format!("line {line}, name {name:?}: {problem}"))?;
        if let Some((first, _)) = entries.iter().find(|(_, other)| other.pattern == entry.pattern) {
            return Err(format!(
                "line {line}, name {name:?}: line {first} is for the same images, and the first one counts; remove either"
            ));
        }
        entries.push((line, entry));
    }
    Ok(entries.into_iter().map(|(_, entry)| entry).collect())
}

fn entry(row: Row) -> Result<Entry, String> {
    let pattern = Pattern::parse(&row.name.value)?;
    let nul = |texts: &[String]| texts.iter().any(|text| text.contains('\0'));
    if nul(&row.entrypoint) || nul(&row.args) || row.options.as_deref().is_some_and(nul) {
        return Err("a NUL byte cannot be in an argument".to_owned());
    }
    if row.entrypoint.first().is_some_and(String::is_empty) {
        return Err("entrypoint begins with a program, and its first element is empty".to_owned());
    }
    let apptainer = match row.run {
        How::Host if row.image.is_some() || row.options.is_some() => {
            return Err("image and options are for `run: apptainer`".to_owned());
        }
        How::Host => None,
        How::Apptainer => {
            let image = row.image.unwrap_or_else(|| PULLED.to_owned());
            check(&image)?;
            Some(Apptainer { image, options: row.options.unwrap_or_default() })
        }
    };
    Ok(Entry { pattern, entrypoint: row.entrypoint, args: row.args, apptainer })
}

/// What is in braces must be known, and the whole can be no option.
fn check(image: &str) -> Result<(), String> {
    if image.is_empty() || image.starts_with('-') || image.contains('\0') {
        return Err(format!("image {image:?}: a path or an URL such as {PULLED} is wanted"));
    }
    let mut rest = image;
    while let Some(open) = rest.find('{') {
        let after = &rest[open + 1..];
        let close = after.find('}').unwrap_or(after.len());
        if !matches!(&after[..close], "image" | "name" | "tag") || close == after.len() {
            return Err(format!("image {image:?}: of braces there are {{image}}, {{name}} and {{tag}}"));
        }
        rest = &after[close + 1..];
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mistake_is_told_with_its_line() {
        let table = [
            ("images:\n- name: a\n  colour: red\n", &["line 3", "colour"][..]),
            ("image:\n- name: a\n", &["line 1", "image"]),
            ("images:\n- name: a\n- run: host\n", &["line 3", "name"]),
            ("images:\n- name: a\n  run: docker\n", &["line 3", "docker", "apptainer"]),
            ("images:\n- name: a\n\n- name: 'b['\n", &["line 4", "b[", "]"]),
            (
                "images:\n- name: a\n- {name: docker.io/library/a, run: host}\n",
                &["line 3", "line 2", "remove"],
            ),
            ("images:\n- name: a\n  image: b\n", &["line 2", "apptainer"]),
            (
                "images:\n- name: a\n  run: apptainer\n  image: '/x/{nam}.sif'\n",
                &["line 2", "{nam}", "{name}"],
            ),
            ("images:\n- name: a\n  run: apptainer\n  image: '/x/{name'\n", &["{tag}"]),
            ("images:\n- name: a\n  run: apptainer\n  image: --help\n", &["--help"]),
            ("images:\n- name: a\n  entrypoint: sh\n", &["line 3"]),
            ("images:\n- name: a\n  entrypoint: ['', x]\n", &["line 2", "entrypoint"]),
            ("images: [\n", &["line"]),
            ("", &["line 1"]),
        ];
        for (text, words) in table {
            let error = parse(text).unwrap_err();
            for word in words {
                assert!(error.contains(word), "{text:?}: {word} in {error}");
            }
        }
    }

    #[test]
    fn what_is_left_out_has_its_default() {
        let entries = parse("images:\n- name: a\n- {name: b, run: apptainer}\n").unwrap();
        assert!(entries[0].apptainer.is_none() && entries[0].entrypoint.is_empty());
        assert_eq!(entries[1].apptainer.as_ref().unwrap().image, "docker://{image}");
        assert!(parse("images: []").unwrap().is_empty());
    }
}
