//! What a container says: two pipes that never block, and their way into the log.

use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::Child;

use super::log::{Log, Output};
use super::peer::set_nonblocking;

/// One read: a pipe holds four times that by default (pipe(7)), and the supervisor is to stay small.
const READ_BYTES: usize = 16 * 1024;

/// What both pipes can hold when all that wrote to them is dead: 1 MiB each (/proc/sys/fs/pipe-max-size, pipe(7)).
const REST_BYTES: usize = 2 << 20;

/// A container's two pipes, or our end of its terminal, whose output is all standard output.
pub(super) struct Outputs {
    stdout: Option<File>,
    stderr: Option<File>,
}

/// What takes a container's output besides the log.
pub(super) trait Sink {
    /// What was read, as it was read.
    fn bytes(&mut self, output: Output, bytes: &[u8]);
    /// A line of it, without its end.
    fn line(&mut self, output: Output, line: &[u8]);
}

impl Outputs {
    pub(super) fn new(child: &mut Child) -> io::Result<Self> {
        let file = |pipe: OwnedFd| File::from(pipe);
        let stdout = child.stdout.take().map(OwnedFd::from).map(file);
        let stderr = child.stderr.take().map(OwnedFd::from).map(file);
        let outputs = Self { stdout, stderr };
        for output in [Output::Stdout, Output::Stderr] {
            if let Some(fd) = outputs.fd(output) {
                set_nonblocking(fd)?;
            }
        }
        Ok(outputs)
    }

    /// Our end of a terminal instead of pipes.
    pub(super) fn of_terminal(terminal: OwnedFd) -> io::Result<Self> {
        set_nonblocking(terminal.as_fd())?;
        Ok(Self { stdout: Some(File::from(terminal)), stderr: None })
    }

    /// The pipe, until its end was read.
    pub(super) fn fd(&self, output: Output) -> Option<BorrowedFd<'_>> {
        match output {
            Output::Stdout => self.stdout.as_ref().map(AsFd::as_fd),
            Output::Stderr => self.stderr.as_ref().map(AsFd::as_fd),
        }
    }

    /// Reads once; how many bytes there were. At its end a pipe is closed.
    pub(super) fn read(&mut self, output: Output, log: &mut Log, sink: &mut dyn Sink) -> usize {
        let mut bytes = [0; READ_BYTES];
        loop {
            let read = match output {
                Output::Stdout => self.stdout.as_mut().map(|pipe| pipe.read(&mut bytes)),
                Output::Stderr => self.stderr.as_mut().map(|pipe| pipe.read(&mut bytes)),
            };
            match read {
                Some(Ok(n)) if n > 0 => {
                    sink.bytes(output, &bytes[..n]);
                    log.take(output, &bytes[..n], |line| sink.line(output, line));
                    return n;
                }
                Some(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Some(Err(error)) if error.kind() == io::ErrorKind::WouldBlock => return 0,
                Some(Ok(_) | Err(_)) => {
                    self.close(output);
                    return 0;
                }
                None => return 0,
            }
        }
    }

    /// Reads what is left when the container is dead. What no signal ends may write for ever, so this has a bound.
    pub(super) fn read_rest(&mut self, log: &mut Log, sink: &mut dyn Sink) {
        let mut left = REST_BYTES;
        for output in [Output::Stdout, Output::Stderr] {
            while left > 0 {
                match self.read(output, log, sink) {
                    0 => break,
                    n => left = left.saturating_sub(n),
                }
            }
            log.close(output, |line| sink.line(output, line));
            self.close(output);
        }
    }

    fn close(&mut self, output: Output) {
        match output {
            Output::Stdout => self.stdout = None,
            Output::Stderr => self.stderr = None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Nobody;

    impl Sink for Nobody {
        fn bytes(&mut self, _: Output, _: &[u8]) {}
        fn line(&mut self, _: Output, _: &[u8]) {}
    }

    use crate::container::log::LogLimits;
    use std::process::{Command, Stdio};
    use std::time::{Duration, Instant};

    #[test]
    fn the_last_reads_end_although_somebody_writes_for_ever() {
        let mut child = Command::new("yes").stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut outputs = Outputs::new(&mut child).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let mut log = Log::new(dir.path().join("0.log"), LogLimits { bytes: 1 << 20, files: 2 });
        let mut bytes = 0;
        let begin = Instant::now();
        // The pipe may be empty for a moment, which would end the reading too early to prove anything.
        while bytes < READ_BYTES && begin.elapsed() < Duration::from_secs(5) {
            bytes += outputs.read(Output::Stdout, &mut log, &mut Nobody);
        }
        outputs.read_rest(&mut log, &mut Nobody);
        assert!(begin.elapsed() < Duration::from_secs(10));
        assert!(outputs.fd(Output::Stdout).is_none());
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
