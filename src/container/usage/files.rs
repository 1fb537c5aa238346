//! What /proc says of one process (proc(5)), read with as few calls as it takes.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::Read as _;
use std::os::fd::OwnedFd;
use std::sync::OnceLock;
use std::time::Duration;

use nix::fcntl::{OFlag, open, openat};
use nix::sys::stat::Mode;
use nix::unistd::{SysconfVar, sysconf};

use crate::container::process;

/// The most that is read of one file: a list of children of a process with 100 000 of them.
const MAX_FILE: usize = 1 << 20;

/// Where reading begins: more than `stat` or `status` ever have, so that one read gives all of them.
const FIRST_READ: usize = 4096;

/// The smallest part in which the kernel gives out a list: a page of 4 KiB.
const LIST_PART: usize = 4096;

/// Facts of /proc/PID/stat; times in clock ticks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Stat {
    pub(super) zombie: bool,
    pub(super) parent: i32,
    pub(super) group: i32,
    pub(super) session: i32,
    pub(super) threads: u64,
    pub(super) start: u64,
    /// utime and stime.
    pub(super) own: u64,
    /// cutime and cstime: of children that were waited for, and of theirs.
    pub(super) ended: u64,
    /// Minor page faults, and those of ended children.
    pub(super) minor_faults: u64,
    pub(super) ended_minor_faults: u64,
    pub(super) major_faults: u64,
    pub(super) ended_major_faults: u64,
    /// Resident memory, in bytes.
    pub(super) resident: u64,
}

impl Stat {
    /// Reads the line. The command's name stands in parentheses and may hold any bytes, parentheses too, so fields count
    /// from the last one.
    pub(super) fn parse(line: &[u8]) -> Option<Self> {
        let name_end = line.iter().rposition(|byte| *byte == b')')?;
        let text = std::str::from_utf8(line.get(name_end + 1..)?).ok()?;
        let mut fields = [""; 22];
        let mut count = 0;
        for (place, field) in fields.iter_mut().zip(text.split_ascii_whitespace()) {
            *place = field;
            count += 1;
        }
        if count < fields.len() {
            return None;
        }
        // Field 3 of the manual page is fields[0]. Some are signed there, though never negative.
        let number = |index: usize| fields.get(index - 3)?.parse::<i64>().ok()?.try_into().ok();
        let number = |index| number(index).unwrap_or(0_u64);
        Some(Self {
            zombie: matches!(fields[0], "Z" | "X"),
            parent: fields[1].parse().ok()?,
            group: fields[2].parse().ok()?,
            session: fields[3].parse().ok()?,
            threads: number(20),
            start: fields[19].parse().ok()?,
            own: number(14) + number(15),
            ended: number(16) + number(17),
            minor_faults: number(10),
            ended_minor_faults: number(11),
            major_faults: number(12),
            ended_major_faults: number(13),
            resident: number(24) * page_size(),
        })
    }
}

/// Resident memory, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Memory {
    pub(super) anonymous: u64,
    pub(super) shared: u64,
    pub(super) files: u64,
    /// Of how many processes.
    pub(super) processes: u64,
}

impl Memory {
    /// Another process of the same container: what can be shared counts once.
    pub(super) fn add(&mut self, other: Option<Self>) {
        let Some(other) = other else { return };
        self.anonymous += other.anonymous;
        self.shared = self.shared.max(other.shared);
        self.files = self.files.max(other.files);
        self.processes += other.processes;
    }

    /// Reads /proc/PID/status; none where it does not divide the resident memory: kernels before 4.5, and zombies.
    fn parse_status(text: &[u8]) -> Option<Self> {
        // The name stands in the first line and may hold any bytes (line feeds are escaped), so it is skipped as bytes.
        let rest = text.iter().position(|byte| *byte == b'\n').and_then(|at| text.get(at..))?;
        let text = std::str::from_utf8(rest).ok()?;
        let after = |from: &str| text.find(from).and_then(|at| text.get(at + from.len()..));
        let kib = |rest: &str| rest.split_ascii_whitespace().next()?.parse::<u64>().ok().map(|n| n << 10);
        Some(Self {
            anonymous: kib(after("\nRssAnon:")?)?,
            files: kib(after("\nRssFile:")?)?,
            shared: kib(after("\nRssShmem:")?)?,
            processes: 1,
        })
    }

    /// Reads /proc/PID/statm, which holds mapped files and shmem as one number. None for a zombie, which has no memory.
    fn parse_statm(text: &[u8], page: u64) -> Option<Self> {
        let text = std::str::from_utf8(text).ok()?;
        let mut fields = text.split_ascii_whitespace().skip(1).map(|field| field.parse::<u64>().ok());
        let (resident, shared) = (fields.next()??, fields.next()??);
        (resident > 0).then(|| Self {
            anonymous: resident.saturating_sub(shared) * page,
            shared: 0,
            files: shared * page,
            processes: 1,
        })
    }
}

/// The directory of a process: of this one, even when it has ended and its number is used again.
pub(super) struct Opened {
    pid: i32,
    directory: OwnedFd,
}

impl Opened {
    /// None when there is no such process.
    pub(super) fn new(pid: i32) -> Option<Self> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let directory = open(format!("/proc/{pid}").as_str(), flags, Mode::empty()).ok()?;
        Some(Self { pid, directory })
    }

    fn open(&self, name: &str) -> Option<File> {
        openat(&self.directory, name, OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty()).ok().map(File::from)
    }
}

/// What fits with room to spare was all of it, where the kernel makes a file whole at the first read.
fn is_short(length: usize, buffer: usize) -> bool {
    length < buffer
}

/// A list is given out in parts of a page (seq_file), none of which ends before there is no room for a number more.
fn is_end_of_list(length: usize, _buffer: usize) -> bool {
    length + 32 <= LIST_PART
}

/// Reads files of /proc, with one buffer for all of them. It serves one scrape.
#[derive(Default)]
pub(super) struct Files {
    buffer: Vec<u8>,
    /// The children of every process, once they were needed.
    families: Option<HashMap<i32, Vec<i32>>>,
}

impl Files {
    /// Reads a file that was just opened. One that is made whole at the first read has no more than that.
    fn read(&mut self, mut file: File, is_whole: impl Fn(usize, usize) -> bool) -> Option<&[u8]> {
        self.buffer.resize(self.buffer.len().max(FIRST_READ), 0);
        let mut length = 0;
        loop {
            let read = file.read(self.buffer.get_mut(length..)?).ok()?;
            length += read;
            if read == 0 || is_whole(length, self.buffer.len()) || length >= MAX_FILE {
                return self.buffer.get(..length);
            }
            if length == self.buffer.len() {
                self.buffer.resize(length * 2, 0);
            }
        }
    }

    /// Facts of one process by its number; none when there is no such process, or none that may be seen.
    pub(super) fn stat(&mut self, pid: i32) -> Option<Stat> {
        Stat::parse(self.read(File::open(format!("/proc/{pid}/stat")).ok()?, is_short)?)
    }

    /// Facts of a process of which more is read.
    pub(super) fn stat_of(&mut self, process: &Opened) -> Option<Stat> {
        Stat::parse(self.read(process.open("stat")?, is_short)?)
    }

    /// None for a zombie too.
    pub(super) fn memory_of(&mut self, process: &Opened) -> Option<Memory> {
        let status = process.open("status").and_then(|file| self.read(file, is_short));
        if let Some(memory) = status.and_then(Memory::parse_status) {
            return Some(memory);
        }
        Memory::parse_statm(self.read(process.open("statm")?, is_short)?, page_size())
    }

    /// Adds the children of a process, of all its threads; false where the kernel does not tell.
    pub(super) fn children_of(&mut self, process: &Opened, threads: u64, found: &mut Vec<i32>) -> bool {
        if threads <= 1 {
            return self.children_of_thread(process, process.pid, found);
        }
        let Ok(tasks) = std::fs::read_dir(format!("/proc/{}/task", process.pid)) else { return false };
        let tasks = tasks.flatten().filter_map(|task| task.file_name().to_str()?.parse().ok());
        let mut told = false;
        for task in tasks {
            told |= self.children_of_thread(process, task, found);
        }
        told
    }

    /// The same by a look at all processes, for where the kernel does not tell.
    pub(super) fn children_by_parent(&mut self, pid: i32) -> Vec<i32> {
        let families = match self.families.take() {
            Some(families) => families,
            None => {
                let mut families: HashMap<i32, Vec<i32>> = HashMap::new();
                for pid in process::all() {
                    if let Some(stat) = self.stat(pid) {
                        families.entry(stat.parent).or_default().push(pid);
                    }
                }
                families
            }
        };
        self.families.insert(families).get(&pid).cloned().unwrap_or_default()
    }

    /// The processes of each of the groups in `wanted`, without those in `known`, which need no look.
    pub(super) fn groups(&mut self, wanted: &HashSet<i32>, known: &HashSet<i32>) -> HashMap<i32, Vec<i32>> {
        let mut found: HashMap<i32, Vec<i32>> = HashMap::new();
        for pid in process::all().into_iter().filter(|pid| !known.contains(pid)) {
            let group = self.stat(pid).map(|stat| stat.group).filter(|group| wanted.contains(group));
            if let Some(group) = group {
                found.entry(group).or_default().push(pid);
            }
        }
        found
    }

    fn children_of_thread(&mut self, process: &Opened, task: i32, found: &mut Vec<i32>) -> bool {
        let file = process.open(&format!("task/{task}/children"));
        let Some(list) = file.and_then(|file| self.read(file, is_end_of_list)) else { return false };
        let list = std::str::from_utf8(list).unwrap_or_default();
        found.extend(list.split_ascii_whitespace().filter_map(|pid| pid.parse::<i32>().ok()));
        true
    }
}

fn page_size() -> u64 {
    static SIZE: OnceLock<u64> = OnceLock::new();
    *SIZE.get_or_init(|| configured(SysconfVar::PAGE_SIZE).unwrap_or(4096))
}

/// Clock ticks as time.
pub(super) fn ticks(count: u64) -> Duration {
    static PER_SECOND: OnceLock<u64> = OnceLock::new();
    // 100 on every Linux that a compute node has (time(7), USER_HZ).
    let per_second = *PER_SECOND.get_or_init(|| configured(SysconfVar::CLK_TCK).unwrap_or(100));
    Duration::from_secs(count / per_second)
        + Duration::from_nanos(count % per_second * 1_000_000_000 / per_second)
}

fn configured(variable: SysconfVar) -> Option<u64> {
    sysconf(variable).ok()??.try_into().ok().filter(|value| *value > 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const STAT: &[u8] =
        b"4711 (a) (\xff) S) R 4700 4701 4702 34816 4701 4194304 1201 5302 7 9 123 45 678 90 20 0 3 0 \
        201394 3133440 395 18446744073709551615 1 1 0 0 0 0 0 0 0 0 0 0 17 0 0 0 0 0 0 0 0 0 0 0 0 0 0\n";

    const STATUS: &[u8] = b"Name:\tRssAnon: 7 \xff kB\nUmask:\t0022\nState:\tS (sleeping)\nVmHWM:\t    1580 kB\n\
        VmRSS:\t    1580 kB\nRssAnon:\t     136 kB\nRssFile:\t    1420 kB\nRssShmem:\t      24 kB\nVmData:\t 360 kB\n";

    #[test]
    fn a_line_of_stat_is_read_whatever_the_name() {
        let stat = Stat::parse(STAT).unwrap();
        let wanted = Stat {
            zombie: false,
            parent: 4700,
            group: 4701,
            session: 4702,
            threads: 3,
            start: 201_394,
            own: 168,
            ended: 768,
            minor_faults: 1201,
            ended_minor_faults: 5302,
            major_faults: 7,
            ended_major_faults: 9,
            resident: 395 * page_size(),
        };
        assert_eq!(stat, wanted);
        for bad in [
            &b""[..],
            b"1 (x",
            b"1 (x)",
            b"1 (x) R 1 2 3",
            b"1 (x) R a b c 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 1",
        ] {
            assert_eq!(Stat::parse(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn memory_is_divided_as_the_kernel_divides_it() {
        let memory = Memory::parse_status(STATUS).unwrap();
        let wanted = Memory { anonymous: 136 << 10, shared: 24 << 10, files: 1420 << 10, processes: 1 };
        assert_eq!(memory, wanted);
        // A zombie, and a kernel of 2013.
        assert_eq!(Memory::parse_status(b"Name:\tx\nState:\tZ (zombie)\n"), None);
        assert_eq!(Memory::parse_status(b"Name:\tx\nVmRSS:\t 1580 kB\n"), None);
        let memory = Memory::parse_statm(b"765 423 395 5 0 123 0\n", 4096).unwrap();
        assert_eq!(memory, Memory { anonymous: 28 * 4096, shared: 0, files: 395 * 4096, processes: 1 });
        assert_eq!(Memory::parse_statm(b"0 0 0 0 0 0 0\n", 4096), None);
    }

    #[test]
    fn shared_memory_counts_once() {
        let mut sum = Memory::default();
        for (anonymous, shared, files) in [(10, 500, 30), (20, 400, 40)] {
            sum.add(Some(Memory { anonymous, shared, files, processes: 1 }));
        }
        sum.add(None);
        assert_eq!(sum, Memory { anonymous: 30, shared: 500, files: 40, processes: 2 });
    }

    #[test]
    fn this_process_is_read() {
        let mut files = Files::default();
        let pid = nix::unistd::getpid().as_raw();
        assert_eq!(files.stat(pid).unwrap().parent, nix::unistd::getppid().as_raw());
        let opened = Opened::new(pid).unwrap();
        assert_eq!(files.stat_of(&opened).unwrap().start, files.stat(pid).unwrap().start);
        // As the kernel's own older file has it, within what changes meanwhile.
        let statm = std::fs::read(format!("/proc/{pid}/statm")).unwrap();
        let older = Memory::parse_statm(&statm, page_size()).unwrap();
        let anonymous = files.memory_of(&opened).unwrap().anonymous;
        assert!(anonymous > 0 && older.anonymous.abs_diff(anonymous) < 8 << 20);
        assert_eq!(files.stat(i32::MAX), None);
        assert!(Opened::new(i32::MAX).is_none());
    }

    #[test]
    fn a_look_at_all_processes_finds_children_and_groups() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let own = nix::unistd::getpid().as_raw();
        let mut files = Files::default();
        let mut found = Vec::new();
        assert!(
            files.children_of(&Opened::new(own).unwrap(), 2, &mut found) && found.contains(&pid),
            "{found:?}"
        );
        assert!(files.children_by_parent(own).contains(&pid));
        assert_eq!(files.children_by_parent(pid), [0; 0]);
        let group = nix::unistd::getpgrp().as_raw();
        let groups = files.groups(&[group].into(), &[own].into());
        assert!(groups[&group].contains(&pid) && !groups[&group].contains(&own), "{groups:?}");
        assert_eq!(groups.len(), 1);
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn a_file_of_any_length_is_read() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("x");
        let mut files = Files::default();
        for text in ["12345 ".repeat(20_000), "short".to_owned(), "x".repeat(FIRST_READ)] {
            std::fs::write(&path, &text).unwrap();
            for is_whole in [is_short, is_end_of_list] {
                assert_eq!(files.read(File::open(&path).unwrap(), is_whole), Some(text.as_bytes()));
            }
        }
    }

    #[test]
    fn a_long_list_of_children_is_read_to_its_end() {
        // Each has 5 bytes at least, so that a page is not enough.
        let script = "for i in $(seq 1000); do sleep 60 & done; echo; wait";
        let mut child = std::process::Command::new("bash");
        child.args(["-c", script]).stdout(std::process::Stdio::piped());
        let mut child = std::os::unix::process::CommandExt::process_group(&mut child, 0).spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let mut line = [0];
        child.stdout.as_mut().unwrap().read_exact(&mut line).unwrap();
        let mut found = Vec::new();
        let told = Files::default().children_of(&Opened::new(pid).unwrap(), 1, &mut found);
        let group = nix::unistd::Pid::from_raw(pid);
        nix::sys::signal::killpg(group, nix::sys::signal::Signal::SIGKILL).unwrap();
        child.wait().unwrap();
        assert!(told);
        assert_eq!(found.len(), 1000);
    }

    #[test]
    fn ticks_become_time() {
        let second = configured(SysconfVar::CLK_TCK).unwrap();
        assert_eq!(ticks(second * 3), Duration::from_secs(3));
        assert!(ticks(1) > Duration::ZERO);
    }

    proptest! {
        #[test]
        fn no_text_makes_a_parser_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300), text in "[0-9 ()RZ:A-Za-z\n-]{0,200}") {
            for bytes in [&bytes[..], text.as_bytes()] {
                let _ = Stat::parse(bytes);
                let _ = Memory::parse_status(bytes);
                let _ = Memory::parse_statm(bytes, 4096);
            }
        }
    }
}
