//! What `play` says of its work: the progress line, the table, and hints.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::time::SystemTime;

use super::setup::Stage;
use super::terminal::{self, Printer, Show};
use super::work::Work;
use crate::pod::directory;
use crate::pod::outcome::{self, Outcome};

/// A shell's exit code for a program that is not there (POSIX, XCU 2.8.2).
const NOT_FOUND: i32 = 127;

/// Draws the progress line anew, where there is one and the terminal takes it.
pub fn progress(work: &Work, stage: &Stage, printer: &Printer) {
    if !printer.progress {
        return;
    }
    let left = stage.timing.borrow().as_ref().map(|t| t.deadline);
    let left = left.map(|at| at.duration_since(SystemTime::now()).unwrap_or_default());
    let text = terminal::progress(&work.running(), work.waiting(), work.ended(), left);
    let _ = printer.show.try_send(Show::Progress(text));
}

/// The table and the hints.
pub async fn result(work: &Work, stage: &Stage, printer: &Printer) {
    let kept = &stage.context.places.kept;
    let mut outcomes = work.outcomes();
    outcomes.iter_mut().for_each(|outcome| with_kept_logs(outcome, kept));
    let mut text = outcome::table(&outcomes);
    if text.is_empty() {
        text.push_str("No pods ran.\n");
    }
    if work.forgotten() > 0 {
        let _ = writeln!(text, "… and {} before them: see {}", work.forgotten(), kept.display());
    }
    let _ = printer.show.send(Show::Text(text)).await;
    for hint in hints(&outcomes, |pod, container| work.missing_program(pod, container)) {
        let _ = printer.show.send(Show::Remark(hint)).await;
    }
}

/// The directory of a pod that has ended is gone; its logs are kept elsewhere.
fn with_kept_logs(outcome: &mut Outcome, kept: &std::path::Path) {
    let name = directory::kept_name(&outcome.namespace, &outcome.name, &outcome.uid);
    for container in &mut outcome.containers {
        let Some(file) = container.log.file_name() else { continue };
        let log = kept.join(format!("{name}.{}.{}", container.name, file.display()));
        if !container.log.exists() {
            container.log = log;
        }
    }
}

/// What somebody should know who reads the table.
fn hints<'a>(
    outcomes: &'a [Outcome],
    missing: impl Fn(&'a str, &'a str) -> Option<&'a str>,
) -> BTreeSet<String> {
    let mut hints = BTreeSet::new();
    for outcome in outcomes {
        if outcome.containers.is_empty()
            && let Some(message) = &outcome.message
        {
            hints.insert(format!("hint: {}: {message}", outcome.name));
        }
        for container in outcome.containers.iter().filter(|c| c.exit_code == Some(NOT_FOUND)) {
            let which = missing(&outcome.name, &container.name).map(|name| format!(": {name}"));
            hints.insert(format!(
                "hint: {}/{}: exit 127: a program that the script calls is not installed on this host{}",
                outcome.name,
                container.name,
                which.unwrap_or_default()
            ));
        }
    }
    hints
}

/// The program that a shell says it has not found: `bash: line 2: stress: command not found`, `sh: 1: stress: not found`.
pub fn not_found(line: &str) -> Option<&str> {
    let head = line
        .trim_end()
        .strip_suffix(": command not found")
        .or_else(|| line.trim_end().strip_suffix(": not found"))?;
    head.rsplit(": ").next().filter(|name| !name.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shells_name_what_they_have_not_found() {
        for (line, wanted) in [
            ("/home/a/p1/stress.sh: line 2: stress: command not found", Some("stress")),
            ("sh: 1: stress: not found", Some("stress")),
            ("stress: command not found", Some("stress")),
            ("the file was not found", None),
            (": command not found", None),
        ] {
            assert_eq!(not_found(line), wanted, "{line}");
        }
    }
}
