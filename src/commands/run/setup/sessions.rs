//! Under PBS: sessions that containers make are made known to the job, so that qdel and the walltime end them too, and what they
//! use is counted.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;

use crate::allocation::command::Program;
use crate::allocation::{Allocation, BatchSystem, Environment, find_pbs};
use crate::container::ForeignSessions;
use crate::pod::context::Context;

/// Between two looks: what PBS kills meanwhile the supervisors kill too, but for `qdel -W force`.
const LOOK: Duration = Duration::from_secs(1);

/// pbs_attach asks the MOM of its own host.
const ATTACH_LIMIT: Duration = Duration::from_secs(5);

/// How many are attached at a time; the others wait for the next look.
const AT_ONCE: usize = 16;

/// How often it is tried for one session.
const TRIES: u32 = 3;

/// Looks for such sessions while containers run. A pod in namespaces needs none: it ends with its first process, which is in the
/// job's session.
pub fn watch(allocation: &Allocation, env: &Environment, context: &Arc<Context>) {
    let pbs = matches!(allocation.batch, BatchSystem::Pbs | BatchSystem::Torque);
    let Some(job) = allocation.job_id.as_ref().filter(|_| pbs).map(|job| job.value.clone()) else { return };
    let Some(program) = find_pbs("pbs_attach", env) else {
        tracing::info!(
            "there is no pbs_attach: sessions that pods' scripts make are ended by the pilot, and PBS does not know of them"
        );
        return;
    };
    let (env, context) = (env.clone(), Arc::clone(context));
    tokio::spawn(async move {
        let own = nix::unistd::getsid(None).map_or(0, nix::unistd::Pid::as_raw);
        let (mut sessions, mut failed) = (ForeignSessions::default(), BTreeMap::<i32, u32>::new());
        let mut changes = context.roster.changes();
        loop {
            changes.mark_unchanged();
            let supervisors = supervisors(&context);
            if supervisors.is_empty() {
                failed.clear();
                if changes.changed().await.is_err() {
                    return;
                }
                continue;
            }
            let looking = tokio::task::spawn_blocking(move || {
                let new = sessions.look(&supervisors, own);
                (sessions, new)
            });
            let Ok((looked, new)) = looking.await else { return };
            sessions = looked;
            // A number is used again by another session some day.
            failed.retain(|session, _| {
                sessions.is_there(*session) || new.iter().any(|(other, _)| other == session)
            });
            new.iter().skip(AT_ONCE).for_each(|(session, _)| sessions.forget(*session));
            let attach = |(session, pid): (i32, i32)| {
                let program = Program::at(&program, &env).args(["-j", &job, "-p", &pid.to_string()]);
                async move { (session, program.run(ATTACH_LIMIT).await.and_then(|output| output.success())) }
            };
            for (session, answer) in join_all(new.into_iter().take(AT_ONCE).map(attach)).await {
                let Err(error) = answer else { continue };
                let tries = failed.entry(session).or_default();
                *tries += 1;
                if *tries < TRIES {
                    sessions.forget(session);
                } else {
                    tracing::warn!(session, %error, "a session that a pod made could not be made known to PBS: the pilot ends it, qdel -W force does not");
                }
            }
            tokio::time::sleep(LOOK).await;
        }
    });
}

/// The supervisors of containers that run in the host's namespaces.
fn supervisors(context: &Context) -> Vec<i32> {
    let pods = context.roster.all();
    let plain = pods.iter().filter(|view| !view.isolated);
    plain
        .flat_map(|view| view.containers.values().filter_map(|c| c.run.as_ref()).map(|run| run.supervisor))
        .collect()
}
