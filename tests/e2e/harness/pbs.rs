//! A PBS job that a test plays: what the pilot asks `qstat`, the test answers.

use std::os::unix::fs::{PermissionsExt, chown};
use std::path::PathBuf;
use std::time::Duration;

use jiff::Timestamp;
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, User};

use super::host::{home, places};
use super::{ALICE, bed, read, unique};

/// How long PBS takes at most to send SIGTERM to all processes of a job's session.
const SWEEP: Duration = Duration::from_millis(15);

/// A job with a qstat (tests/pbs/qstat) of its own. Its files go at drop.
pub struct PbsJob {
    /// The value of PBS_JOBID.
    pub id: String,
    /// When it started, as ctime(3) has it in UTC: the pilot asks in UTC.
    start: String,
    directory: PathBuf,
}

impl PbsJob {
    /// A job that starts now, on so many (stand-in) hosts, with a walltime such as `00:05:00`.
    pub fn new(hosts: usize, walltime: &str) -> Self {
        let name = unique("pbs");
        let directory = home(ALICE).join(&name);
        std::fs::create_dir(&directory).unwrap();
        // qstat, as alice, writes its calls here.
        let alice = User::from_name(ALICE).unwrap().expect("tests/slurm/up makes the user");
        chown(&directory, Some(alice.uid.as_raw()), Some(alice.gid.as_raw())).unwrap();
        for program in ["qstat", "pbsdsh", "pbs_attach", "pbs_tmrsh"] {
            let copy = directory.join(program);
            std::fs::copy(bed().script("stand-ins").join(program), &copy).unwrap();
            std::fs::set_permissions(&copy, std::fs::Permissions::from_mode(0o755)).unwrap();
        }
        let now = Timestamp::now();
        let start = now.strftime("%a %b %e %H:%M:%S %Y").to_string();
        let job = Self { id: format!("{}.pbshost", std::process::id()), start, directory };
        job.write("stime", &now.as_second().to_string());
        job.walltime(walltime);
        let lines: String = (0..hosts).map(|number| format!("host{number}\n")).collect();
        job.write("nodefile", &lines);
        job
    }

    /// The walltime from now on, as after qalter.
    pub fn walltime(&self, walltime: &str) {
        self.write("walltime", walltime);
    }

    /// How qstat answers from now on: `json`, `broken-json`, `torque`, `unknown`, `finished`, `refused`, `hang`.
    pub fn mode(&self, mode: &str) {
        self.write("mode", mode);
    }

    /// qstat gives this recorded answer of a real server from now on, in both its forms, as that of this job: with its
    /// id, its start and this walltime.
    pub fn recorded(&self, name: &str, walltime: &str) {
        let recorded = |form: &str| read(&bed().fixture(&format!("pbs/{name}.{form}")));
        let (json, text) = (recorded("json"), recorded("txt"));
        let value = |begin: &str| {
            let line = text.lines().find_map(|line| line.trim_start().strip_prefix(begin));
            line.unwrap_or_else(|| panic!("no `{begin}` in {name}.txt")).to_owned()
        };
        let (id, start, granted) = (value("Job Id: "), value("stime = "), value("Resource_List.walltime = "));
        for (form, answer) in [("json", json), ("text", text)] {
            let answer = answer.replace(&id, &self.id).replace(&start, &self.start);
            let answer = answer
                .replace(&format!("\"walltime\":\t\"{granted}\""), &format!("\"walltime\":\t\"{walltime}\""))
                .replace(&format!("_List.walltime = {granted}"), &format!("_List.walltime = {walltime}"));
            self.write(&format!("answer.{form}"), &answer);
        }
        self.mode("recorded");
    }

    /// The arguments of each call of qstat so far.
    pub fn calls(&self) -> Vec<String> {
        let calls = std::fs::read_to_string(self.directory.join("calls")).unwrap_or_default();
        calls.lines().filter_map(|line| line.split_once(' ')).map(|(_, call)| call.to_owned()).collect()
    }

    /// Each call of pbs_attach so far: its arguments, and the session of its process.
    pub fn attached(&self) -> Vec<String> {
        let calls = std::fs::read_to_string(self.directory.join("attached")).unwrap_or_default();
        calls.lines().map(ToOwned::to_owned).collect()
    }

    /// What PBS gives a job's script, as far as a pilot looks at it.
    pub fn environment(&self) -> Vec<(String, String)> {
        let own = self.directory.to_str().unwrap();
        [
            ("PATH", format!("{own}:/usr/local/bin:/usr/bin:/bin")),
            ("PBS_JOBID", self.id.clone()),
            ("PBS_JOBNAME", "pilot".into()),
            ("PBS_QUEUE", "workq".into()),
            ("PBS_ENVIRONMENT", "PBS_BATCH".into()),
            ("PBS_JOBCOOKIE", "0123456789ABCDEF0123456789ABCDEF".into()),
            ("PBS_NODENUM", "0".into()),
            ("PBS_TASKNUM", "1".into()),
            ("PBS_O_HOST", "pbshost".into()),
            ("PBS_NODEFILE", format!("{own}/nodefile")),
            ("NCPUS", "1".into()),
            ("TMPDIR", "/tmp".into()),
        ]
        .map(|(name, value)| (name.to_owned(), value))
        .into()
    }

    /// Written whole: qstat may read it at any moment.
    fn write(&self, name: &str, text: &str) {
        let new = self.directory.join(format!("{name}.new"));
        std::fs::write(&new, text).unwrap();
        std::fs::rename(new, self.directory.join(name)).unwrap();
    }
}

impl Drop for PbsJob {
    fn drop(&mut self) {
        // A failed test's calls and answers are of use to whoever looks.
        if !std::thread::panicking() {
            let _ = std::fs::remove_dir_all(&self.directory);
        }
    }
}

/// As PBS does at qdel and at the walltime: SIGTERM to every process of the job's session, the deepest first,
/// and to those of the sessions of the tasks of pbsdsh and pbs_tmrsh.
pub fn terminate(session: i32) {
    let places = places();
    let starts_tasks = |name: &str| matches!(name, "pbsdsh" | "pbs_tmrsh");
    let is_pbsdsh = |pid: i32| {
        places.iter().any(|place| place.pid == pid && place.session == session && starts_tasks(&place.name))
    };
    let mut sessions = vec![session];
    sessions.extend(places.iter().filter(|place| is_pbsdsh(place.parent)).map(|place| place.session));
    let mut job: Vec<_> = places.iter().filter(|place| sessions.contains(&place.session)).collect();
    job.reverse();
    // As slowly as was measured: a container may have ended before its pilot hears anything.
    let pause = SWEEP / u32::try_from(job.len().max(1)).unwrap();
    for place in job {
        // It may have ended meanwhile.
        let _ = kill(Pid::from_raw(place.pid), Signal::SIGTERM);
        std::thread::sleep(pause);
    }
}
