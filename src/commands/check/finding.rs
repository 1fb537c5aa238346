//! What was found, and how it is printed: one line each, for somebody with only the job's output file.

use std::fmt::Write as _;

/// How much of a value is shown: what a proxy answers instead of an API server may be a whole page.
const VALUE: usize = 400;

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verdict {
    /// Good.
    Ok,
    /// The pilot runs, and something about it is worth knowing.
    Warn,
    /// The pilot would not run.
    Fail,
}

impl Verdict {
    fn word(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warn => "warn",
            Self::Fail => "FAIL",
        }
    }
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// How bad it is.
    pub verdict: Verdict,
    /// What was looked at.
    pub thing: &'static str,
    /// What was found.
    pub value: String,
    /// The way out; empty where all is well or the value says it already.
    pub mend: String,
}

impl Finding {
    /// Good.
    pub fn ok(thing: &'static str, value: impl Into<String>) -> Self {
        Self { verdict: Verdict::Ok, thing, value: value.into(), mend: String::new() }
    }

    /// Worth knowing.
    pub fn warn(thing: &'static str, value: impl Into<String>, mend: impl Into<String>) -> Self {
        Self { verdict: Verdict::Warn, thing, value: value.into(), mend: mend.into() }
    }

    /// In the way.
    pub fn fail(thing: &'static str, value: impl Into<String>, mend: impl Into<String>) -> Self {
        Self { verdict: Verdict::Fail, thing, value: value.into(), mend: mend.into() }
    }
}

/// The whole table, and below it how many of each.
pub fn render(findings: &[Finding]) -> String {
    let width = findings.iter().map(|finding| finding.thing.len()).max().unwrap_or_default();
    let mut text = String::new();
    for finding in findings {
        let arrow = if finding.mend.is_empty() { "" } else { " -> " };
        let cut = finding.value.char_indices().nth(VALUE).map(|(at, _)| &finding.value[..at]);
        let value = cut.map_or_else(|| finding.value.clone(), |cut| format!("{cut}..."));
        let line =
            format!("{:<5} {:width$}  {value}{arrow}{}", finding.verdict.word(), finding.thing, finding.mend);
        // What an API server or the kernel says may hold line ends and worse.
        let line: String = line.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
        let _ = writeln!(text, "{}", line.trim_end());
    }
    let count = |verdict| findings.iter().filter(|finding| finding.verdict == verdict).count();
    let (ok, warn, fail) = (count(Verdict::Ok), count(Verdict::Warn), count(Verdict::Fail));
    let _ = writeln!(text, "\n{ok} ok, {warn} to know about, {fail} in the way");
    text
}

/// Whether a pilot would run.
pub fn passes(findings: &[Finding]) -> bool {
    findings.iter().all(|finding| finding.verdict != Verdict::Fail)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_cut_and_the_mend_still_shown() {
        let text = render(&[Finding::fail("API server", "\u{e9}".repeat(5_000), "start it")]);
        assert!(text.chars().count() < 500 && text.contains("... -> start it"), "{text}");
    }

    #[test]
    fn each_finding_is_one_line() {
        let findings = [
            Finding::ok("HOME", "/home/a"),
            Finding::fail("API server", "no\nanswer", "start it"),
            Finding::warn("clock", "3 s", ""),
        ];
        let text = render(&findings);
        assert_eq!(
            text,
            "ok    HOME        /home/a\nFAIL  API server  no answer -> start it\nwarn  clock       3 s\n\n\
             1 ok, 1 to know about, 1 in the way\n"
        );
        assert!(!passes(&findings));
        assert!(passes(&findings[2..]));
    }
}
