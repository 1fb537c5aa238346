//! What `play` shows: the containers' lines, and on a terminal what runs and how much time is left.
//!
//! One thread writes: a terminal that takes nothing (Ctrl-S, a pager) then holds up the containers' output, as a pipe
//! would, but never the drain. [`Printer::start`] starts it.

use std::io::{self, IsTerminal, Write};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};

use crate::pod::context::OutputLine;

/// Lines that may wait for the terminal. More would only delay what holds a fast script back.
const WAITING: usize = 256;

/// What is to be shown.
#[derive(Debug)]
pub enum Show {
    /// A container's line.
    Line(OutputLine),
    /// The progress line as it is now.
    Progress(String),
    /// Text for standard output, such as the table. The progress line goes.
    Text(String),
    /// A remark for standard error.
    Remark(String),
}

/// Writes to the terminal.
pub struct Printer {
    /// Where to send what is to be shown.
    pub show: mpsc::Sender<Show>,
    /// Whether a progress line makes sense: standard error is a terminal.
    pub progress: bool,
    done: oneshot::Receiver<()>,
}

impl Printer {
    /// Starts the thread. Each line begins with its container's name, and with its pod's where there are `several`.
    ///
    /// # Errors
    /// When the thread cannot be started.
    pub fn start(several: bool) -> io::Result<Self> {
        let (show, mut shown) = mpsc::channel(WAITING);
        let (done_tx, done) = oneshot::channel();
        let progress = io::stderr().is_terminal();
        std::thread::Builder::new().name("terminal".to_owned()).spawn(move || {
            let mut screen =
                Screen { out: io::stdout(), err: io::stderr(), progress: String::new(), several };
            while let Some(what) = shown.blocking_recv() {
                // Whoever read is gone: the rest is in the logs, and the work goes on.
                let _ = screen.show(what);
            }
            let _ = screen.clear();
            let _ = done_tx.send(());
        })?;
        Ok(Self { show, progress, done })
    }

    /// Waits until all is written.
    pub async fn finish(self) {
        drop(self.show);
        let _ = self.done.await;
    }
}

struct Screen<O, E> {
    out: O,
    err: E,
    progress: String,
    several: bool,
}

impl<O: Write, E: Write> Screen<O, E> {
    fn show(&mut self, what: Show) -> io::Result<()> {
        match what {
            Show::Line(line) => {
                self.clear()?;
                let text = prefixed(&line, self.several);
                if line.stderr {
                    self.err.write_all(text.as_bytes())?;
                } else {
                    self.out.write_all(text.as_bytes())?;
                    self.out.flush()?;
                }
                self.draw()
            }
            Show::Progress(text) => {
                self.progress = text;
                self.draw()
            }
            Show::Text(text) => {
                self.clear()?;
                self.progress.clear();
                self.out.write_all(text.as_bytes())?;
                self.out.flush()
            }
            Show::Remark(text) => {
                self.clear()?;
                writeln!(self.err, "{text}")?;
                self.draw()
            }
        }
    }

    /// Takes the progress line off the screen.
    fn clear(&mut self) -> io::Result<()> {
        if self.progress.is_empty() {
            return Ok(());
        }
        self.err.write_all(b"\r\x1b[2K")?;
        self.err.flush()
    }

    /// Without line wrap (DECAWM), so that a long line stays one line, and with the cursor back at its beginning, so
    /// that a log line overwrites it.
    fn draw(&mut self) -> io::Result<()> {
        if self.progress.is_empty() {
            return Ok(());
        }
        write!(self.err, "\r\x1b[2K\x1b[?7l{}\x1b[?7h\r", self.progress)?;
        self.err.flush()
    }
}

fn prefixed(line: &OutputLine, several: bool) -> String {
    let OutputLine { pod, container, line, .. } = line;
    if several { format!("{pod}/{container} | {line}\n") } else { format!("{container} | {line}\n") }
}

/// What runs and how much time is left.
#[must_use]
pub fn progress(running: &[String], waiting: usize, ended: usize, left: Option<Duration>) -> String {
    /// More names than this do not fit on a line.
    const NAMED: usize = 4;
    let mut text = match running.len() {
        0 => "nothing runs".to_owned(),
        n if n <= NAMED => format!("running: {}", running.join(", ")),
        n => format!("running: {} and {} more", running[..NAMED].join(", "), n - NAMED),
    };
    if waiting > 0 {
        text.push_str(&format!("; {waiting} waiting"));
    }
    if ended > 0 {
        text.push_str(&format!("; {ended} ended"));
    }
    if let Some(left) = left {
        text.push_str(&format!("; {} left", humantime::format_duration(Duration::from_secs(left.as_secs()))));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(stderr: bool, text: &str) -> Show {
        Show::Line(OutputLine { pod: "p".into(), container: "c".into(), stderr, line: text.into() })
    }

    #[test]
    fn lines_go_where_they_came_from_and_the_progress_line_is_out_of_their_way() {
        let mut screen = Screen { out: Vec::new(), err: Vec::new(), progress: String::new(), several: true };
        screen.show(line(false, "a")).unwrap();
        screen.show(line(true, "b")).unwrap();
        assert_eq!((screen.out.as_slice(), screen.err.as_slice()), (&b"p/c | a\n"[..], &b"p/c | b\n"[..]));
        screen.several = false;
        screen.err.clear();
        screen.show(Show::Progress("running: p".into())).unwrap();
        screen.show(line(true, "d")).unwrap();
        let seen = String::from_utf8(screen.err.clone()).unwrap();
        assert!(seen.contains("running: p\x1b[?7h\r\r\x1b[2Kc | d\n\r\x1b[2K"), "{seen:?}");
        screen.show(Show::Text("table\n".into())).unwrap();
        assert!(screen.err.ends_with(b"\r\x1b[2K"), "the progress line is gone");
    }

    #[test]
    fn progress_says_what_runs_and_what_is_left() {
        let names: Vec<String> = (0..6).map(|n| format!("p{n}")).collect();
        assert_eq!(
            progress(&names[..2], 1, 3, Some(Duration::from_millis(61_500))),
            "running: p0, p1; 1 waiting; 3 ended; 1m 1s left"
        );
        assert_eq!(progress(&names, 0, 0, None), "running: p0, p1, p2, p3 and 2 more");
        assert_eq!(progress(&[], 0, 0, None), "nothing runs");
    }
}
