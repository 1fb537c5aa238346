//! Sessions that containers make. PBS tracks and kills a job by its sessions, so what does setsid(2) leaves the job, unless it is
//! made known (pbs_attach(8)).

use std::collections::BTreeSet;

use super::usage::weight::Scales;

/// The most sessions that are remembered: a script that makes more is not worth the memory, and its processes end with its
/// container as all others.
const REMEMBERED: usize = 10_000;

/// The sessions below supervisors that are not the pilot's own.
#[derive(Debug, Default)]
pub struct ForeignSessions {
    known: BTreeSet<i32>,
}

impl ForeignSessions {
    /// Those that have come since the last look: a session's number, and one of its processes. `own` is the pilot's.
    pub fn look(&mut self, supervisors: &[i32], own: i32) -> Vec<(i32, i32)> {
        let (mut there, mut new) = (BTreeSet::new(), Vec::new());
        let mut scales = Scales::default();
        for supervisor in supervisors {
            for (pid, session) in scales.sessions(*supervisor) {
                if session == own || session == 0 || !there.insert(session) {
                    continue;
                }
                if !self.known.contains(&session) && self.known.len() < REMEMBERED {
                    new.push((session, pid));
                }
            }
        }
        // A number is used again by another session some day.
        self.known = there;
        new
    }

    /// Whether it was there at the last look.
    #[must_use]
    pub fn is_there(&self, session: i32) -> bool {
        self.known.contains(&session)
    }

    /// It could not be made known: it is new again.
    pub fn forget(&mut self, session: i32) {
        self.known.remove(&session);
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn a_new_session_is_told_once() {
        // Below a process of our own, as below a supervisor.
        let script = "setsid sleep 600 & sleep 600 & wait";
        let mut outer = Command::new("bash")
            .args(["-c", script])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let pid = i32::try_from(outer.id()).unwrap();
        let own = nix::unistd::getsid(None).unwrap().as_raw();
        let mut sessions = ForeignSessions::default();
        let mut found = Vec::new();
        for _ in 0..100 {
            found = sessions.look(&[pid], own);
            if !found.is_empty() {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
        let again = sessions.look(&[pid], own);
        if let Some((session, _)) = found.first() {
            sessions.forget(*session);
        }
        let forgotten = sessions.look(&[pid], own);
        crate::container::process::kill_tree(pid);
        let _ = outer.wait();
        assert_eq!((found.len(), again.len(), forgotten.len()), (1, 0, 1), "{found:?}");
        assert_eq!(found[0].0, found[0].1, "its first process");
    }
}
