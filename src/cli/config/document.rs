//! A TOML document as the settings in it, each with its line: [`read`], pure.
//!
//! The lexer and the grammar are toml_parser's; what its events come to is decided here. Settings are few and flat, so a
//! table is no more than the beginning of its keys' paths: `[labels]` with `rack = "7"` in it is `labels.rack = "7"`.

use toml_parser::decoder::{IntegerRadix, ScalarKind};
use toml_parser::parser::{Event, EventKind, RecursionGuard, ValidateWhitespace, parse_document};
use toml_parser::{Expected, ParseError, Source, Span};

/// How deep lists and tables in braces may stand in each other: one level is wanted at most, and a limit keeps a file of
/// brackets from filling the stack.
const DEPTH: u32 = 8;

/// So many faults are told: somebody named the wrong file when there are more.
pub(super) const MOST_FAULTS: usize = 20;

/// So many settings are read: a table of labels may have many, and each is compared with all before it.
const MOST_ENTRIES: usize = 1000;

/// What a key is set to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Value {
    /// In quotes.
    Text(String),
    /// A whole decimal number, as it is written but for underscores.
    Number(String),
    /// `true` or `false`.
    Truth(bool),
    /// In square brackets.
    List(Vec<Value>),
    /// What no setting is, by its name.
    Other(&'static str),
}

/// One `key = value`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Entry {
    /// The line of the value's beginning.
    pub line: usize,
    /// The key's parts, those of the table it stands in before its own.
    pub path: Vec<String>,
    /// What it is set to.
    pub value: Value,
}

/// What is wrong with the document itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Fault {
    /// Where.
    pub line: usize,
    /// What, and what is wanted.
    pub problem: String,
}

/// Reads a document.
///
/// # Errors
/// What is wrong with it in the order of its lines, at most one fault a line: what follows the first is often its consequence.
/// And at most [`MOST_FAULTS`].
pub(super) fn read(text: &str) -> Result<Vec<Entry>, Vec<Fault>> {
    let source = Source::new(text);
    let tokens = source.lex().into_vec();
    let (mut events, mut errors) = (Vec::<Event>::new(), Vec::<ParseError>::new());
    {
        let mut valid = ValidateWhitespace::new(&mut events, source);
        let mut guarded = RecursionGuard::new(&mut valid, DEPTH);
        parse_document(&tokens, &mut guarded, &mut errors);
    }
    let mut reader =
        Reader { source, events: events.iter(), errors, faults: Vec::new(), entries: Vec::new() };
    reader.tables();
    let mut faults = reader.faults;
    faults.extend(reader.errors.iter().map(|error| fault(text, error)));
    // A key that is set twice, or once whole and once in parts.
    if let Some(entry) = reader.entries.get(MOST_ENTRIES) {
        let problem = format!("at most {MOST_ENTRIES} settings are wanted");
        return Err(vec![Fault { line: entry.line, problem }]);
    }
    for (at, entry) in reader.entries.iter().enumerate() {
        let same = |other: &&Entry| {
            let shared = other.path.len().min(entry.path.len());
            other.path[..shared] == entry.path[..shared]
        };
        if let Some(first) = reader.entries[..at].iter().find(same) {
            let problem = format!("{} is set already in line {}", entry.path.join("."), first.line);
            faults.push(Fault { line: entry.line, problem });
        }
    }
    if faults.is_empty() {
        return Ok(reader.entries);
    }
    Err(first_of_each_line(faults))
}

/// Takes out the lowest line again and again: a sort would be more of the binary, for what is hardly ever more than one.
fn first_of_each_line(mut faults: Vec<Fault>) -> Vec<Fault> {
    let mut first = Vec::new();
    while first.len() < MOST_FAULTS
        && let Some((at, _)) = faults.iter().enumerate().min_by_key(|(_, fault)| fault.line)
    {
        let fault = faults.remove(at);
        faults.retain(|other| other.line != fault.line);
        first.push(fault);
    }
    first
}

/// The line, counted from 1, in which a byte of the text is.
fn line_of(text: &str, at: usize) -> usize {
    1 + text.as_bytes().iter().take(at).filter(|byte| **byte == b'\n').count()
}

fn fault(text: &str, error: &ParseError) -> Fault {
    let at = error.unexpected().or(error.context()).map_or(0, |span| span.start());
    let mut problem = error.description().to_owned();
    for (place, wanted) in error.expected().unwrap_or_default().iter().enumerate() {
        problem.push_str(if place == 0 { "; wanted: " } else { ", " });
        match wanted {
            Expected::Literal("\n") => problem.push_str("a new line"),
            Expected::Literal(literal) => {
                problem.push('`');
                problem.push_str(literal);
                problem.push('`');
            }
            Expected::Description(words) => problem.push_str(words),
            _ => {}
        }
    }
    Fault { line: line_of(text, at), problem }
}

/// Goes through the events once.
struct Reader<'a> {
    source: Source<'a>,
    events: std::slice::Iter<'a, Event>,
    errors: Vec<ParseError>,
    faults: Vec<Fault>,
    entries: Vec<Entry>,
}

impl<'a> Reader<'a> {
    /// The whole document: keys, and headers of tables.
    fn tables(&mut self) {
        let (mut table, mut path) = (Vec::new(), Vec::new());
        while let Some(event) = self.events.next() {
            match event.kind() {
                EventKind::StdTableOpen => table.clear(),
                EventKind::ArrayTableOpen => {
                    table.clear();
                    self.reject(event.span(), "no setting is a list of tables: [name] is wanted");
                }
                EventKind::StdTableClose | EventKind::ArrayTableClose => table.append(&mut path),
                EventKind::SimpleKey => path.push(self.key(event)),
                EventKind::KeyValSep => {
                    let whole = table.iter().cloned().chain(path.drain(..)).collect();
                    self.assign(whole);
                }
                _ => {}
            }
        }
    }

    /// The value behind a `=`.
    fn assign(&mut self, path: Vec<String>) {
        let Some(event) = self.significant() else { return };
        if event.kind() == EventKind::InlineTableOpen {
            return self.braces(&path);
        }
        let line = line_of(self.source.input(), event.span().start());
        if let Some(value) = self.value(event) {
            self.entries.push(Entry { line, path, value });
        }
    }

    /// What stands between braces.
    fn braces(&mut self, table: &[String]) {
        let mut path = table.to_vec();
        while let Some(event) = self.events.next() {
            match event.kind() {
                EventKind::SimpleKey => path.push(self.key(event)),
                EventKind::KeyValSep => {
                    let whole = std::mem::replace(&mut path, table.to_vec());
                    self.assign(whole);
                }
                EventKind::InlineTableClose => return,
                _ => {}
            }
        }
    }

    fn value(&mut self, event: &Event) -> Option<Value> {
        match event.kind() {
            EventKind::Scalar => Some(self.scalar(event)),
            EventKind::ArrayOpen => {
                let mut items = Vec::new();
                while let Some(event) = self.significant() {
                    match event.kind() {
                        EventKind::ArrayClose => break,
                        EventKind::InlineTableOpen => {
                            self.skip_braces();
                            items.push(Value::Other("a table"));
                        }
                        _ => items.extend(self.value(event)),
                    }
                }
                Some(Value::List(items))
            }
            _ => None,
        }
    }

    fn skip_braces(&mut self) {
        let mut depth = 1;
        while depth > 0
            && let Some(event) = self.events.next()
        {
            match event.kind() {
                EventKind::InlineTableOpen => depth += 1,
                EventKind::InlineTableClose => depth -= 1,
                _ => {}
            }
        }
    }

    fn scalar(&mut self, event: &Event) -> Value {
        let mut text = String::new();
        let Some(raw) = self.source.get(event) else { return Value::Other("nothing") };
        match raw.decode_scalar(&mut text, &mut self.errors) {
            ScalarKind::String => Value::Text(text),
            ScalarKind::Boolean(truth) => Value::Truth(truth),
            ScalarKind::Integer(IntegerRadix::Dec) => Value::Number(text),
            ScalarKind::Integer(_) => Value::Other("a number that is not decimal"),
            ScalarKind::Float => Value::Other("a number with a fraction"),
            ScalarKind::DateTime => Value::Other("a date"),
        }
    }

    fn key(&mut self, event: &Event) -> String {
        let mut key = String::new();
        if let Some(raw) = self.source.get(event) {
            raw.decode_key(&mut key, &mut self.errors);
        }
        key
    }

    /// The next event that is more than what stands between values.
    fn significant(&mut self) -> Option<&'a Event> {
        self.events.find(|event| {
            !matches!(
                event.kind(),
                EventKind::Whitespace | EventKind::Comment | EventKind::Newline | EventKind::ValueSep
            )
        })
    }

    fn reject(&mut self, span: Span, problem: &str) {
        let line = line_of(self.source.input(), span.start());
        self.faults.push(Fault { line, problem: problem.to_owned() });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(line: usize, path: &[&str], value: Value) -> Entry {
        Entry { line, path: path.iter().map(|part| (*part).to_owned()).collect(), value }
    }

    fn text(text: &str) -> Value {
        Value::Text(text.to_owned())
    }

    #[test]
    fn a_document_is_its_settings_with_their_lines() {
        let document = "# a site\nsite = \"jlab\" # its name\nport = 10_250\nno-taint = true\n\
                        namespaces = [\n  'a', # one\n  \"b\",\n]\nlabels.rack = '7'\n\n\
                        [annotations]\n\"example.org/owner\" = \"\"\"\nA, \\u0042\"\"\"\nx = {y = 1.5, z = [{}, 0x1f]}\n";
        let list = Value::List(vec![text("a"), text("b")]);
        let odd = Value::List(vec![Value::Other("a table"), Value::Other("a number that is not decimal")]);
        let wanted = [
            entry(2, &["site"], text("jlab")),
            entry(3, &["port"], Value::Number("10250".to_owned())),
            entry(4, &["no-taint"], Value::Truth(true)),
            entry(5, &["namespaces"], list),
            entry(9, &["labels", "rack"], text("7")),
            entry(12, &["annotations", "example.org/owner"], text("A, B")),
            entry(14, &["annotations", "x", "y"], Value::Other("a number with a fraction")),
            entry(14, &["annotations", "x", "z"], odd),
        ];
        assert_eq!(read(document).unwrap(), wanted);
        assert_eq!(read("labels = {}\n[annotations]\n"), Ok(Vec::new()));
    }

    #[test]
    fn what_is_no_toml_is_named_with_its_line() {
        let deep = "x = ".to_owned() + &"[".repeat(50_000);
        for (document, line, words) in [
            ("site = \"a\"\nwalltime\n", 2, "`=`"),
            ("site = \"a\"\n\nwalltime = soon\n", 3, "value"),
            ("site = \"a\n", 1, "\""),
            ("a = \"b\\q\"\n", 1, "escape"),
            ("a = 1\nb = 2\na = 3\n", 3, "a is set already in line 1"),
            ("labels = [\"a=b\"]\n[labels]\nc = \"d\"\n", 3, "labels.c is set already in line 1"),
            ("[[labels]]\na = \"b\"\n", 1, "list of tables"),
            ("[labels\na = \"b\"\n", 1, "`]`"),
            ("a = \"b\u{7}\"\n", 1, "string"),
            (&deep, 1, "recurs"),
        ] {
            let faults = read(document).unwrap_err();
            assert!(
                faults.iter().any(|fault| fault.line == line && fault.problem.contains(words)),
                "{line} {words}: {faults:?}"
            );
        }
        let many = read(&"x\n".repeat(100)).unwrap_err();
        assert_eq!(many.iter().map(|fault| fault.line).collect::<Vec<_>>(), (1..=20).collect::<Vec<_>>());
        let most: String = (0..1001).map(|number| format!("a{number} = 1\n")).collect();
        assert_eq!(read(&most).unwrap_err()[0].line, 1001);
        let two = read("a = \nb\nc = 1\nd = x y\n").unwrap_err();
        assert_eq!(two.iter().map(|fault| fault.line).collect::<Vec<_>>(), [1, 2, 4], "{two:?}");
    }
}
