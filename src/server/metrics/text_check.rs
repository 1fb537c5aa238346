//! A strict reader of Prometheus's text format 0.0.4, for tests.

use std::collections::{BTreeMap, BTreeSet};

/// A line with a value.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Sample {
    pub(crate) name: String,
    pub(crate) labels: BTreeMap<String, String>,
    pub(crate) value: f64,
    pub(crate) millis: Option<i64>,
}

/// Reads the text line by line and fails at whatever the format forbids.
pub(crate) fn samples(text: &str) -> Vec<Sample> {
    assert!(text.is_empty() || text.ends_with('\n'), "the last line has no end");
    let mut samples: Vec<Sample> = Vec::new();
    let mut families: BTreeMap<String, String> = BTreeMap::new();
    let mut current = String::new();
    let mut helped = BTreeSet::new();
    let mut series = BTreeSet::new();
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            let name = rest.split(' ').next().unwrap();
            assert!(is_name(name) && helped.insert(name.to_owned()), "a second or bad HELP: {line}");
        } else if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').unwrap();
            assert!(is_name(name), "{line}");
            assert!(["counter", "gauge", "histogram", "summary", "untyped"].contains(&kind), "{line}");
            assert_eq!(families.insert(name.to_owned(), kind.to_owned()), None, "a second TYPE: {line}");
            current = name.to_owned();
        } else {
            let sample = sample(line);
            let suffix = sample.name.strip_prefix(current.as_str()).unwrap_or("?");
            let kind = families.get(&current).map(String::as_str);
            let fits = match kind {
                Some("histogram") => ["_bucket", "_sum", "_count"].contains(&suffix),
                Some("counter") => suffix.is_empty() && sample.value >= 0.0 && current.ends_with("_total"),
                _ => suffix.is_empty(),
            };
            assert!(fits, "not of the family {current} ({kind:?}) before it: {line}");
            let key = format!("{} {:?}", sample.name, sample.labels);
            assert!(series.insert(key), "twice: {line}");
            samples.push(sample);
        }
    }
    samples
}

fn is_name(name: &str) -> bool {
    let first = name.chars().next().is_some_and(|c| c.is_ascii_alphabetic() || c == '_');
    first && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
}

fn sample(line: &str) -> Sample {
    let end = line.find(['{', ' ']).unwrap_or_else(|| panic!("no value: {line}"));
    let (name, mut rest) = line.split_at(end);
    assert!(is_name(name), "{line}");
    let mut labels = BTreeMap::new();
    if let Some(inside) = rest.strip_prefix('{') {
        rest = inside;
        while !rest.starts_with('}') {
            let (label, after) = rest.split_once("=\"").unwrap_or_else(|| panic!("{line}"));
            assert!(is_name(label), "{line}");
            let (value, after) = quoted(after).unwrap_or_else(|| panic!("{line}"));
            assert_eq!(labels.insert(label.to_owned(), value), None, "{line}");
            rest = after.strip_prefix(',').unwrap_or(after);
            assert!(after.starts_with(',') || after.starts_with('}'), "{line}");
        }
        rest = &rest[1..];
    }
    let mut words = rest.strip_prefix(' ').unwrap_or_else(|| panic!("{line}")).split(' ');
    let value = words.next().unwrap().replace("+Inf", "inf").parse().unwrap_or_else(|_| panic!("{line}"));
    let millis = words.next().map(|word| word.parse().unwrap_or_else(|_| panic!("{line}")));
    assert_eq!(words.next(), None, "{line}");
    Sample { name: name.to_owned(), labels, value, millis }
}

/// What stands until the closing quote, and what comes after it.
fn quoted(text: &str) -> Option<(String, &str)> {
    let mut value = String::new();
    let mut chars = text.char_indices();
    while let Some((at, char)) = chars.next() {
        match char {
            '"' => return Some((value, &text[at + 1..])),
            '\\' => value.push(match chars.next()?.1 {
                'n' => '\n',
                escaped @ ('\\' | '"') => escaped,
                _ => return None,
            }),
            char => value.push(char),
        }
    }
    None
}

#[test]
fn what_the_format_forbids_is_refused() {
    let head = "# TYPE a gauge\n";
    assert_eq!(samples(&format!("{head}a{{x=\"y\"}} 1.5 17\na 2\n")).len(), 2);
    for bad in
        ["a 1", "a\n", "a{x=y} 1\n", "a 1\na 1\n", "b 1\n", "a{x=\"y} 1\n", "a x\n", "a 1 1.5\n", "a 1 1 1\n"]
    {
        let text = format!("{head}{bad}");
        assert!(std::panic::catch_unwind(|| samples(&text)).is_err(), "{text}");
    }
}
