//! Detection as a whole: a batch system's environment, its stand-in commands, and made-up kernel files.

use std::time::UNIX_EPOCH;

use super::*;
use crate::allocation::pbs_text::tests::recorded;
use crate::allocation::stand_in::StandIn;

/// A host of 8 CPUs and 4 GiB, without cgroup limits.
fn settings(stand_in: &StandIn) -> DetectSettings {
    let proc = stand_in.path().join("proc");
    std::fs::create_dir_all(proc.join("self")).unwrap();
    std::fs::write(proc.join("self/status"), "Name:\tx\nCpus_allowed_list:\t0-7\n").unwrap();
    std::fs::write(proc.join("self/cgroup"), "0::/\n").unwrap();
    std::fs::write(proc.join("meminfo"), "MemTotal:  4194304 kB\n").unwrap();
    let nowhere = stand_in.path().join("nowhere");
    let roots = Roots { proc, cgroup: nowhere.clone(), dev: nowhere.clone(), sys: nowhere };
    DetectSettings { roots, ..DetectSettings::new(SystemTime::now()) }
}

#[test]
fn the_batch_system_is_told_by_its_variables() {
    let of = |pairs: &[(&str, &str)], cgroup| {
        BatchSystem::of(&Environment::from_pairs(pairs.iter().copied()), || cgroup)
    };
    let (slurm, pbs, torque) = (("SLURM_JOB_ID", "1"), ("PBS_JOBID", "1.x"), ("PBS_NUM_PPN", "60"));
    assert_eq!(of(&[], None), BatchSystem::None);
    assert_eq!(of(&[("SLURM_JOB_ID", "")], None), BatchSystem::None);
    assert_eq!(of(&[slurm], None), BatchSystem::Slurm);
    assert_eq!(of(&[("SLURM_JOBID", "1")], None), BatchSystem::Slurm);
    assert_eq!(of(&[pbs], None), BatchSystem::Pbs);
    assert_eq!(of(&[pbs, torque], None), BatchSystem::Torque);
    assert_eq!(of(&[slurm, pbs], None), BatchSystem::Slurm);
    assert_eq!(of(&[slurm, pbs], Some("slurm")), BatchSystem::Slurm);
    assert_eq!(of(&[slurm, pbs], Some("pbs")), BatchSystem::Pbs);
    assert_eq!(BatchSystem::Torque.label(), "pbs");
}

#[tokio::test]
async fn a_slurm_job_is_asked_only_where_its_environment_tells_no_end() {
    let stand_in = StandIn::new().script("squeue", "echo 7 UNLIMITED");
    let settings = settings(&stand_in);
    let end = ("SLURM_JOB_END_TIME", "4000000000");
    let env = stand_in.environment([("SLURM_JOB_ID", "7"), ("SLURM_CPUS_ON_NODE", "2"), end]);
    let allocation = detect(&env, &settings).await;
    assert_eq!(allocation.limit.source, "SLURM_JOB_END_TIME");
    assert_eq!(allocation.limit.value, TimeLimit::Ends(UNIX_EPOCH + Duration::from_secs(4_000_000_000)));
    assert!(!allocation.asked);
    assert_eq!(allocation.cpus.value, [0, 1]);

    let ask = DetectSettings { ask_always: true, ..settings.clone() };
    let allocation = detect(&env, &ask).await;
    assert_eq!((allocation.limit.value, allocation.asked), (TimeLimit::Unlimited, true));

    let old = stand_in.environment([("SLURM_JOB_ID", "7")]);
    assert_eq!(detect(&old, &settings).await.limit.source, "squeue %L");
}

#[tokio::test]
async fn a_squeue_that_is_absent_or_hangs_leaves_the_limit_unknown_with_the_reason() {
    let stand_in = StandIn::new();
    let mut settings = settings(&stand_in);
    let env = Environment::from_pairs([("PATH", "/nonexistent"), ("SLURM_JOB_ID", "7")]);
    let TimeLimit::Unknown(why) = detect(&env, &settings).await.limit.value else { panic!("known") };
    assert!(why.contains("squeue"), "{why}");

    stand_in.rewrite("squeue", "exec sleep 60");
    settings.command_limit = Duration::from_millis(300);
    let env = stand_in.environment([("SLURM_JOB_ID", "7")]);
    let TimeLimit::Unknown(why) = detect(&env, &settings).await.limit.value else { panic!("known") };
    assert!(why.contains("gave no answer in 0.3 s"), "{why}");
}

#[tokio::test]
async fn a_pbs_job_gets_what_qstat_says_of_this_host() {
    let stand_in = StandIn::new();
    std::fs::write(stand_in.path().join("answer"), recorded("qstat-f-running.json")).unwrap();
    stand_in.rewrite("qstat", "cat \"$(dirname \"$0\")/answer\"");
    let settings = settings(&stand_in);
    let env = stand_in.environment([("PBS_JOBID", "0.pbshost"), ("PBS_NODENUM", "0"), ("NCPUS", "1")]);
    let allocation = detect(&env, &settings).await;
    assert_eq!(allocation.batch, BatchSystem::Pbs);
    // The recorded start lies in the past or, by this host's clock, after our own: never a later end than ours.
    let TimeLimit::Ends(end) = allocation.limit.value else { panic!("{:?}", allocation.limit) };
    assert!(end <= settings.first_start + Duration::from_secs(300));
    assert_eq!(allocation.cpus.value, [0]);
    assert_eq!(allocation.memory, Fact::new(512_000 << 10, "qstat exec_vnode mem"));
    assert_eq!(allocation.hosts.unwrap().value, ["pbshost"]);
    assert_eq!(allocation.cluster.unwrap().value, "pbshost");
}

#[tokio::test]
async fn torque_without_qstat_counts_from_the_first_start() {
    let stand_in = StandIn::new().script("qstat", "echo no server >&2; exit 1");
    let settings = settings(&stand_in);
    let env = stand_in.environment([("PBS_JOBID", "7.head"), ("PBS_WALLTIME", "600"), ("PBS_NUM_PPN", "4")]);
    let allocation = detect(&env, &settings).await;
    let end = settings.first_start + Duration::from_secs(600);
    assert_eq!((allocation.limit.value, allocation.asked), (TimeLimit::Ends(end), false));
    assert_eq!(allocation.cpus.value.len(), 4);
}

#[tokio::test]
async fn without_a_batch_system_there_is_no_limit_and_all_of_the_mask() {
    let stand_in = StandIn::new();
    let allocation = detect(&stand_in.environment([]), &settings(&stand_in)).await;
    assert_eq!(allocation.batch, BatchSystem::None);
    assert_eq!(allocation.limit.value, TimeLimit::Unlimited);
    assert_eq!(allocation.cpus.value.len(), 8);
    assert_eq!(allocation.memory.value, 4 << 30);
    assert!(!allocation.host.is_empty() && !allocation.host.contains('.'));
}

#[tokio::test]
async fn kill_wait_is_what_slurm_says_less_a_margin() {
    let config = "echo 'KillOnBadExit = 0'; echo 'KillWait                = 30 sec'";
    let stand_in = StandIn::new().script("scontrol", config);
    let env = stand_in.environment([("SLURM_CONF", "/nonexistent/slurm.conf")]);
    let seconds = async |batch| kill_wait(&env, batch).await.value.as_secs();
    assert_eq!(seconds(BatchSystem::Slurm).await, 27);
    assert_eq!(seconds(BatchSystem::Pbs).await, 8);
    assert_eq!(seconds(BatchSystem::Torque).await, 8);
    assert_eq!(seconds(BatchSystem::None).await, 25);
    stand_in.rewrite("scontrol", "exit 1");
    assert_eq!(seconds(BatchSystem::Slurm).await, 25);
    // This node's own file says it: nobody is asked.
    std::fs::write(stand_in.path().join("slurm.conf"), "KillWait=60\n").unwrap();
    let conf = stand_in.path().join("slurm.conf");
    let env = stand_in.environment([("SLURM_CONF", conf.to_str().unwrap())]);
    assert_eq!(kill_wait(&env, BatchSystem::Slurm).await.value.as_secs(), 54);
    for (wait, left) in [(5, 3), (30, 27), (300, 270), (1, 0)] {
        assert_eq!(less_margin(Duration::from_secs(wait)), Duration::from_secs(left));
    }
}
