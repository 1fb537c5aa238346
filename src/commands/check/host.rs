//! This host: the tools that are called, the port, and what the batch system granted.

use std::time::{Duration, SystemTime};

use super::finding::Finding;
use super::span;
use crate::allocation::{Allocation, BatchSystem, Deadline, Environment, TimeLimit, find_qstat};
use crate::cli::{IsolationArg, RunArgs};
use crate::commands::run::setup::take_port;
use crate::container;
use crate::drain;
use crate::pod::images::Images;

/// Less memory than this (bytes) holds the pilot and a few supervisors, and no work.
const LITTLE_MEMORY: u64 = 64 << 20;

/// The programs that the pilot or nearly every pod calls.
pub fn tools(env: &Environment, batch: BatchSystem, images: Option<&Images>) -> Vec<Finding> {
    let unknown = "the job's limit is not followed when it changes, and may not be known at all";
    let mut wanted = vec![("bash", env.find_program("bash"), "pods whose command is bash do not start")];
    if images.is_some_and(Images::want_apptainer) {
        let lack = "containers that the table of images runs by it do not start";
        wanted.push(("apptainer", env.find_program("apptainer"), lack));
    }
    match batch {
        BatchSystem::Slurm => {
            wanted.push(("squeue", env.find_program("squeue"), unknown));
            wanted.push(("scontrol", env.find_program("scontrol"), "KillWait is taken to be 30 s"));
        }
        BatchSystem::Pbs | BatchSystem::Torque => wanted.push(("qstat", find_qstat(env), unknown)),
        BatchSystem::None => {}
    }
    let found = |(name, path, lack): (&str, Option<std::path::PathBuf>, &str)| match path {
        Some(path) => Finding::ok("tools", path.display().to_string()),
        None => Finding::warn("tools", format!("{name} is not in PATH: {lack}"), "add its directory to PATH"),
    };
    wanted.into_iter().map(found).collect()
}

/// The port for the Node's own API.
pub fn port(args: &RunArgs) -> Finding {
    match take_port(args.port) {
        Ok(_) if args.port == 0 => Finding::ok("port", "any free one"),
        Ok(_) => Finding::ok("port", format!("{} is free", args.port)),
        Err(error) => Finding::fail("port", error.to_string(), ""),
    }
}

/// Whether pods can have namespaces of their own, where they are to.
pub async fn isolation(args: &RunArgs) -> Option<Finding> {
    if args.pods.isolation == IsolationArg::None {
        return None;
    }
    let tried = tokio::task::spawn_blocking(container::isolation::problem).await;
    Some(match tried.unwrap_or_else(|error| Some(error.to_string())) {
        None => Finding::ok("isolation", "user, mount, PID and UTS namespaces are permitted"),
        Some(problem) => Finding::warn(
            "isolation",
            format!("{problem}: pods run without it"),
            "ask for a host that permits unprivileged user namespaces, or leave --isolation out",
        ),
    })
}

/// What was granted, and whether it is enough.
pub fn allocation(
    args: &RunArgs,
    allocation: &Allocation,
    deadline: Option<&Deadline>,
    now: SystemTime,
) -> Vec<Finding> {
    let job = allocation.job_id.as_ref().map_or_else(
        || "no batch job here: what a job would have is not looked at".to_owned(),
        |job| format!("{} job {}", allocation.batch.label(), job.value),
    );
    let mut findings = vec![Finding::ok("allocation", format!("{job}, host {}", allocation.host))];
    findings.push(time(args, allocation, deadline, now));
    let (cpus, memory) = (allocation.cpus.value.len(), allocation.memory.value);
    let granted =
        format!("{cpus} CPUs, {} MiB of memory, {} GPUs", memory >> 20, allocation.gpus.value.len());
    findings.push(if cpus == 0 || memory == 0 {
        let value = format!("{granted}: not all could be learnt");
        Finding::warn(
            "allocation",
            value,
            "look at `jiriaf-pilot allocation`; pods that ask for it do not come",
        )
    } else if memory < LITTLE_MEMORY {
        Finding::warn("allocation", format!("{granted}: that is little memory"), "ask for more")
    } else {
        Finding::ok("allocation", granted)
    });
    findings
}

fn time(args: &RunArgs, allocation: &Allocation, deadline: Option<&Deadline>, now: SystemTime) -> Finding {
    let set = "ask for a time limit, or set --walltime (JIRIAF_WALLTIME)";
    match (deadline, &allocation.limit.value) {
        (Some(deadline), _) => {
            let left = deadline.at.duration_since(now).unwrap_or(Duration::ZERO);
            let value = format!("{} left by {}", span(left), deadline.source);
            match drain::suffices(left, args.cordon_before, args.drain_before, args.stagger) {
                Err(why) => Finding::fail("walltime", format!("{value}: {why}"), why.mend()),
                Ok(()) => Finding::ok("walltime", value),
            }
        }
        (None, TimeLimit::Unknown(reason)) => {
            Finding::warn("walltime", format!("the job's end cannot be learnt: {reason}"), set)
        }
        (None, _) if allocation.batch == BatchSystem::None => {
            Finding::ok("walltime", "no limit: the pilot runs until it is told to end")
        }
        (None, _) => Finding::ok("walltime", "the job has no limit"),
    }
}
