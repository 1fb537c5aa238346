//! The search for a container's program, its execution, and words for why it was refused.
//!
//! Not execvp(3): that searches with the C library's own default, and runs a file that the kernel refuses through sh.

use std::ffi::CString;
use std::fs::File;
use std::io::Read as _;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::unistd::execve;

use super::protocol::StartError;

/// A script that was just written may still be open for writing in a process between fork and exec (ETXTBSY).
const BUSY_LIMIT: Duration = Duration::from_millis(200);

/// The search path where the container's environment has none: the shells' default.
const DEFAULT_PATH: &str = "/usr/local/bin:/usr/bin:/bin";

/// The kernel looks at no more of a script's first line (execve(2)).
const FIRST_LINE_BYTES: usize = 255;

/// Becomes the program; returns only when it cannot.
pub(super) fn exec(argv: &[String], env: &[(String, String)]) -> StartError {
    let Some(program) = argv.first() else { return StartError::NotFound { program: String::new() } };
    let arguments: Result<Vec<CString>, _> = argv.iter().map(|text| CString::new(text.as_str())).collect();
    let variables: Result<Vec<CString>, _> =
        env.iter().map(|(name, value)| CString::new(format!("{name}={value}"))).collect();
    let (Ok(arguments), Ok(variables)) = (arguments, variables) else {
        return StartError::Other {
            what: program.clone(),
            problem: "an argument or an environment variable holds a NUL character".to_owned(),
        };
    };
    let path = env.iter().rev().find(|(name, _)| name == "PATH").map_or(DEFAULT_PATH, |(_, value)| value);
    let mut refused = None;
    for candidate in candidates(program, path) {
        let Ok(file) = CString::new(candidate.as_str()) else { continue };
        match try_exec(&file, &arguments, &variables) {
            Errno::ENOENT | Errno::ENOTDIR if !Path::new(&candidate).exists() => {}
            // As execvp(3): what may not be run is passed over, and told when nothing else is found.
            Errno::EACCES if candidate != *program => refused = refused.or(Some(candidate)),
            errno => return explain(&candidate, errno),
        }
    }
    match refused {
        Some(candidate) => explain(&candidate, Errno::EACCES),
        None => StartError::NotFound { program: program.clone() },
    }
}

/// What a program's name may stand for, in order: as execvp(3).
fn candidates(program: &str, path: &str) -> Vec<String> {
    if program.is_empty() || program.contains('/') {
        return vec![program.to_owned()];
    }
    path.split(':').map(|dir| format!("{}/{program}", if dir.is_empty() { "." } else { dir })).collect()
}

fn try_exec(file: &CString, arguments: &[CString], variables: &[CString]) -> Errno {
    let start = Instant::now();
    loop {
        let Err(errno) = execve(file, arguments, variables);
        if errno != Errno::ETXTBSY || start.elapsed() > BUSY_LIMIT {
            return errno;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Why the kernel refused a file that is there (execve(2), ERRORS).
fn explain(file: &str, errno: Errno) -> StartError {
    let program = file.to_owned();
    match errno {
        Errno::ENOENT | Errno::ENOTDIR => {
            let mut head = Vec::new();
            let read = File::open(file).and_then(|f| f.take(FIRST_LINE_BYTES as u64).read_to_end(&mut head));
            let interpreter = read.ok().and_then(|_| interpreter(&head));
            StartError::Interpreter { program, problem: missing(interpreter.as_deref()) }
        }
        Errno::EACCES | Errno::EPERM => {
            StartError::NotExecutable { program, problem: errno.desc().to_owned() }
        }
        Errno::ENOEXEC => StartError::Format { program },
        Errno::E2BIG => StartError::Other {
            what: program,
            problem: "arguments and environment together are larger than the kernel takes (128 KiB for one, a quarter of \
                      the stack limit for all)"
                .to_owned(),
        },
        errno => StartError::Other { what: program, problem: errno.desc().to_owned() },
    }
}

fn missing(interpreter: Option<&str>) -> String {
    match interpreter {
        Some(name) if name.ends_with('\r') => format!(
            "its first line asks for {name:?}: the file has Windows line ends; remove the carriage returns"
        ),
        Some(name) => format!("its first line asks for {name}, which is not on this host"),
        None => "it is there, but its dynamic loader is not on this host".to_owned(),
    }
}

/// What the `#!` line at the beginning of a file names, without the blanks around it.
fn interpreter(head: &[u8]) -> Option<String> {
    let line = head.strip_prefix(b"#!")?.split(|byte| *byte == b'\n').next()?;
    let name = line.split(|byte| matches!(byte, b' ' | b'\t')).find(|word| !word.is_empty())?;
    Some(String::from_utf8_lossy(name).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_searched_for_as_execvp_does() {
        assert_eq!(candidates("./x", "/a:/b"), ["./x"]);
        assert_eq!(candidates("x", "/a::/b"), ["/a/x", "./x", "/b/x"]);
    }

    #[test]
    fn the_interpreter_is_read_from_the_first_line() {
        for (head, wanted) in [
            ("#! /bin/bash -e\nx", Some("/bin/bash")),
            ("#!/bin/bash\r\nx", Some("/bin/bash\r")),
            ("#!\n", None),
            ("echo", None),
        ] {
            assert_eq!(interpreter(head.as_bytes()).as_deref(), wanted, "{head:?}");
        }
    }

    #[test]
    fn a_program_that_cannot_run_is_explained() {
        for (errno, code) in
            [(Errno::ENOENT, 127), (Errno::EACCES, 126), (Errno::ENOEXEC, 126), (Errno::E2BIG, 128)]
        {
            assert_eq!(explain("/no/such", errno).exit_code(), code, "{errno}");
        }
    }
}
