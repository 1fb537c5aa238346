//! Slurm: what a job's environment says (srun(1), sbatch(1)), and squeue and scontrol.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::ask::{Answer, AskError, whole_seconds};
use super::command::Program;
use super::duration::{Fields, ParseError, parse_clock};
use super::environment::Environment;
use super::{Fact, Job, Task, TimeLimit};

/// A job without a time limit is given an end 365 days after its start (Slurm's job_end_time_reset), so an end this
/// far away is none.
const UNLIMITED: Duration = Duration::from_secs(364 * 86_400);

/// The most host names that a node list is expanded to: a typing error such as `n[0-999999999]` must not fill the memory.
const MAX_HOSTS: usize = 65_536;

/// The most components of a heterogeneous job that are looked through.
const MAX_COMPONENTS: u32 = 128;

/// An end is only taken for earlier than the limit when it differs by more than what rounding explains.
const ROUNDING: Duration = Duration::from_secs(5);

/// What `squeue -o %L` prints (squeue(1), TimeLeft).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TimeLeft {
    /// So much is left.
    Left(Duration),
    /// The job has no limit.
    Unlimited,
    /// The limit was not set yet.
    NotSet,
    /// The limit is over, or the job has none that can be computed.
    Invalid,
}

/// Reads `D-HH:MM:SS`, `HH:MM:SS`, `MM:SS`, UNLIMITED, NOT_SET or INVALID.
///
/// # Errors
/// Anything else.
pub fn parse_time_left(text: &str) -> Result<TimeLeft, ParseError> {
    match text.trim() {
        "UNLIMITED" => Ok(TimeLeft::Unlimited),
        "NOT_SET" => Ok(TimeLeft::NotSet),
        "INVALID" => Ok(TimeLeft::Invalid),
        clock => parse_clock(clock, Fields::Lenient)
            .map(TimeLeft::Left)
            .ok_or_else(|| ParseError::new(text, "a time left as squeue prints it (`1-02:03:04`)")),
    }
}

/// What squeue is asked for: the job's own id, the time left of its limit, and, for a preemption, its end, its start and
/// the time used.
const FORMAT: &str = "%A %L %e %S %M";

/// The fields after this job's id in squeue's answer. Arrays and heterogeneous jobs answer several lines, with
/// different limits.
fn line_of<'a>(answer: &'a str, job: &str) -> Option<Vec<&'a str>> {
    answer.lines().find_map(|line| {
        let mut fields = line.split_whitespace();
        (fields.next() == Some(job)).then(|| fields.collect())
    })
}

/// What is left until the job's end rather than its limit: `(end - start) - used`. A preemption with a GraceTime moves
/// the end alone and leaves %L as it was. Only differences count, since squeue prints local times without a zone.
fn left_until_end(fields: &[&str]) -> Option<Duration> {
    let [end, start, used] = fields else { return None };
    let moment = |text: &str| text.parse::<jiff::civil::DateTime>().ok();
    let total = moment(end)?.duration_since(moment(start)?);
    Some(Duration::try_from(total).ok()?.saturating_sub(parse_clock(used, Fields::Lenient)?))
}

/// Asks squeue how much time is left.
///
/// # Errors
/// See [`AskError`].
pub(super) async fn ask(env: &Environment, job: &str, limit: Duration) -> Result<Answer, AskError> {
    let asked = whole_seconds(SystemTime::now());
    let output = Program::find("squeue", env)
        .args(["-h", "-j", job, "-o", FORMAT])
        // Each of these changes what squeue answers, or whom it asks.
        .without(|name| {
            name.starts_with("SQUEUE_") || name == "SLURM_TIME_FORMAT" || name == "SLURM_CLUSTERS"
        })
        .run(limit)
        .await?
        .success()?;
    answer(&output.stdout, job, asked)
}

/// What squeue's answer means, when it was asked at `asked` (whole seconds).
fn answer(stdout: &str, job: &str, asked: SystemTime) -> Result<Answer, AskError> {
    let fields = line_of(stdout, job);
    let Some((left, rest)) = fields.as_deref().and_then(|fields| fields.split_first()) else {
        let reason = match stdout.lines().next() {
            Some(line) => format!("its first line is `{}`", line.chars().take(80).collect::<String>()),
            None => "it answers nothing".to_owned(),
        };
        return Err(AskError::NotKnown { command: "squeue", job: job.to_owned(), reason });
    };
    let unreadable = |what| AskError::Unreadable { command: "squeue", job: job.to_owned(), what };
    let (left, source) = match parse_time_left(left).map_err(|error| unreadable(error.to_string()))? {
        TimeLeft::Left(left) => match left_until_end(rest) {
            Some(sooner) if sooner + ROUNDING < left => {
                (sooner, "squeue %e, earlier than the limit: preempted")
            }
            _ => (left, "squeue %L"),
        },
        TimeLeft::Unlimited => {
            return Ok(Answer { limit: TimeLimit::Unlimited, source: "squeue %L".to_owned() });
        }
        TimeLeft::NotSet | TimeLeft::Invalid => {
            let answer = (*left).to_owned();
            return Err(AskError::NoLimit { command: "squeue", job: job.to_owned(), answer });
        }
    };
    let end = asked.checked_add(left).ok_or_else(|| unreadable(format!("{} s are left", left.as_secs())))?;
    Ok(Answer { limit: TimeLimit::Ends(end), source: source.to_owned() })
}

/// The limit that the environment tells: Slurm 23.02 and later write SLURM_JOB_END_TIME when the step is launched
/// and never again, so it holds at the start alone.
pub(super) fn limit_from_environment(env: &Environment) -> Option<Answer> {
    let end: u64 = env.number("SLURM_JOB_END_TIME")?;
    let source = "SLURM_JOB_END_TIME".to_owned();
    let unlimited = match env.number::<u64>("SLURM_JOB_START_TIME") {
        Some(start) => end.saturating_sub(start) >= UNLIMITED.as_secs(),
        None => false,
    };
    if unlimited {
        return Some(Answer { limit: TimeLimit::Unlimited, source });
    }
    // An end of 0 is none, and one that the clock cannot hold is none either.
    let end = epoch(end).filter(|end| *end > UNIX_EPOCH)?;
    Some(Answer { limit: TimeLimit::Ends(end), source })
}

fn epoch(seconds: u64) -> Option<SystemTime> {
    // The year 9999: later ones are no times, and could not be printed.
    (seconds < 253_402_300_800).then(|| UNIX_EPOCH + Duration::from_secs(seconds))
}

/// The id of the heterogeneous job's component that this host belongs to. A step over several components tells all of its
/// tasks the first one's SLURM_JOB_ID, and each component has a time limit of its own.
pub(super) fn component(env: &Environment) -> Option<String> {
    let size: u32 = env.number("SLURM_HET_SIZE")?;
    let host = env.filled("SLURMD_NODENAME")?;
    let group = (0..size.min(MAX_COMPONENTS)).find(|group| {
        let hosts = env.filled(&format!("SLURM_JOB_NODELIST_HET_GROUP_{group}")).and_then(expand_hosts);
        hosts.is_some_and(|hosts| hosts.iter().any(|name| name == host))
    })?;
    env.filled(&format!("SLURM_JOB_ID_HET_GROUP_{group}")).map(str::to_owned)
}

/// What the environment says of the job, its time limit aside.
pub(super) fn describe(env: &Environment) -> Job {
    let fact = |name: &str| env.filled(name).map(|value| Fact::new(value.to_owned(), name));
    let array = env.filled("SLURM_ARRAY_JOB_ID").zip(env.filled("SLURM_ARRAY_TASK_ID"));
    let node_list = ["SLURM_JOB_NODELIST", "SLURM_NODELIST"]
        .into_iter()
        .find_map(|name| Some(Fact::new(expand_hosts(env.filled(name)?)?, name)));
    let count = |names: &[&str]| names.iter().find_map(|name| env.number::<u32>(name)).unwrap_or(1);
    let on_node: Option<usize> = env.number("SLURM_CPUS_ON_NODE").filter(|cpus| *cpus > 0);
    let on_node_gpus: Option<u64> = env.number("SLURM_GPUS_ON_NODE");
    // MiB, of each allocated CPU or GPU where the name says so (sbatch(1)); 0 stands for the whole node.
    let memory = [
        ("SLURM_MEM_PER_NODE", Some(1), "SLURM_MEM_PER_NODE"),
        ("SLURM_MEM_PER_CPU", on_node.map(|cpus| cpus as u64), "SLURM_MEM_PER_CPU x SLURM_CPUS_ON_NODE"),
        ("SLURM_MEM_PER_GPU", on_node_gpus, "SLURM_MEM_PER_GPU x SLURM_GPUS_ON_NODE"),
    ];
    let memory = memory.into_iter().filter_map(|(name, count, source)| {
        let mib = env.number::<u64>(name)?.checked_mul(count?)?;
        Some(Fact::new(mib.checked_mul(1 << 20)?, source))
    });
    let gpus =
        on_node_gpus.and_then(|count| Some(Fact::new(usize::try_from(count).ok()?, "SLURM_GPUS_ON_NODE")));
    Job {
        gpus,
        id: fact("SLURM_JOB_ID").or_else(|| fact("SLURM_JOBID")),
        array: array.map(|(job, index)| {
            Fact::new(format!("{job}_{index}"), "SLURM_ARRAY_JOB_ID, SLURM_ARRAY_TASK_ID")
        }),
        restart_count: env.number("SLURM_RESTART_COUNT").unwrap_or(0),
        cluster: fact("SLURM_CLUSTER_NAME"),
        // Several slurmd may share a host (and its host name): the node's name is Slurm's own for it.
        host: env.filled("SLURMD_NODENAME").map(str::to_owned),
        task: Task {
            rank: env.number("SLURM_PROCID").unwrap_or(0),
            nodes: count(&["SLURM_STEP_NUM_NODES", "SLURM_JOB_NUM_NODES", "SLURM_NNODES"]),
            // Of a step of srun alone: a batch script is one task, whatever the job's SLURM_NTASKS says.
            tasks: count(&["SLURM_STEP_NUM_TASKS"]),
            array: count(&["SLURM_ARRAY_TASK_COUNT"]).max(1),
        },
        hosts: node_list,
        started: env
            .number("SLURM_JOB_START_TIME")
            .and_then(epoch)
            .map(|start| Fact::new(start, "SLURM_JOB_START_TIME")),
        cpus: on_node.map(|cpus| Fact::new(cpus, "SLURM_CPUS_ON_NODE")),
        memory: memory.collect(),
    }
}

/// Expands a node list as Slurm writes it: `gpu5,node[01-03,7],r[1-2]n[1-4]` (scontrol(1), "show hostnames").
/// Absent when it cannot be read or stands for more than 65,536 hosts.
#[must_use]
pub fn expand_hosts(list: &str) -> Option<Vec<String>> {
    let mut hosts = Vec::new();
    for expression in split_outside_brackets(list)? {
        hosts.extend(expand_one(expression, MAX_HOSTS - hosts.len())?);
    }
    (!hosts.is_empty()).then_some(hosts)
}

/// The parts between commas that are not in brackets; absent when brackets do not match.
fn split_outside_brackets(list: &str) -> Option<Vec<&str>> {
    let (mut parts, mut open, mut from) = (Vec::new(), false, 0);
    for (at, c) in list.char_indices() {
        match c {
            '[' if !open => open = true,
            ']' if open => open = false,
            '[' | ']' => return None,
            ',' if !open => {
                parts.push(list.get(from..at)?);
                from = at + 1;
            }
            _ => {}
        }
    }
    parts.push(list.get(from..)?);
    (!open && parts.iter().all(|part| !part.is_empty())).then_some(parts)
}

/// The hosts of one expression such as `r[1-2]n[01-04]`, at most `room`.
fn expand_one(expression: &str, room: usize) -> Option<Vec<String>> {
    let mut hosts = vec![String::new()];
    let mut rest = expression;
    while let Some((literal, bracketed)) = rest.split_once('[') {
        let (ranges, after) = bracketed.split_once(']')?;
        let numbers = expand_ranges(ranges, room)?;
        if numbers.len().checked_mul(hosts.len())? > room {
            return None;
        }
        hosts = hosts
            .iter()
            .flat_map(|host| numbers.iter().map(move |number| format!("{host}{literal}{number}")))
            .collect();
        rest = after;
    }
    for host in &mut hosts {
        host.push_str(rest);
    }
    (hosts.len() <= room).then_some(hosts)
}

/// The numbers of `01-03,7`, each as wide as its range's first; at most `room`.
fn expand_ranges(ranges: &str, room: usize) -> Option<Vec<String>> {
    let mut numbers = Vec::new();
    for range in ranges.split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        if [first, last].iter().any(|number| !number.bytes().all(|b| b.is_ascii_digit())) {
            return None;
        }
        let width = first.len();
        let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
        if last < first || last - first >= room.saturating_sub(numbers.len()) {
            return None;
        }
        numbers.extend((first..=last).map(|number| format!("{number:0width$}")));
    }
    Some(numbers)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::allocation::stand_in::StandIn;
    use proptest::prelude::*;

    const LIMIT: Duration = Duration::from_secs(10);

    fn at(seconds: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(seconds)
    }

    #[test]
    fn times_left_are_read_as_squeue_prints_them() {
        let left = |seconds| Ok(TimeLeft::Left(Duration::from_secs(seconds)));
        let table = [
            ("1-02:03:04", left(93_784)),
            ("02:03:04", left(7384)),
            ("27:23", left(1643)),
            ("0:00", left(0)),
            ("UNLIMITED", Ok(TimeLeft::Unlimited)),
            (" NOT_SET ", Ok(TimeLeft::NotSet)),
            ("INVALID", Ok(TimeLeft::Invalid)),
        ];
        for (text, expected) in table {
            assert_eq!(parse_time_left(text), expected, "{text}");
        }
        for text in ["", "unlimited", "-5:00", "1-", "N/A", "2026-11-24T06:00:00"] {
            assert!(parse_time_left(text).is_err(), "{text}");
        }
    }

    #[test]
    fn each_part_of_a_heterogeneous_job_is_a_job_of_its_own() {
        // As Slurm 22.05 gives them to the tasks of `srun --het-group=0,1`.
        let of = |host: &str| {
            component(&Environment::from_pairs([
                ("SLURM_JOB_ID", "116440"),
                ("SLURM_HET_SIZE", "2"),
                ("SLURM_JOB_NODELIST", "n[1-3]"),
                ("SLURM_JOB_ID_HET_GROUP_0", "116440"),
                ("SLURM_JOB_ID_HET_GROUP_1", "116441"),
                ("SLURM_JOB_NODELIST_HET_GROUP_0", "n1"),
                ("SLURM_JOB_NODELIST_HET_GROUP_1", "n[2-3]"),
                ("SLURMD_NODENAME", host),
            ]))
        };
        assert_eq!(of("n1").as_deref(), Some("116440"));
        assert_eq!(of("n3").as_deref(), Some("116441"));
        assert_eq!(of("n4"), None);
        let plain = [("SLURM_JOB_ID", "7"), ("SLURMD_NODENAME", "n1")];
        assert_eq!(component(&Environment::from_pairs(plain)), None);
        let endless = [("SLURM_HET_SIZE", "4294967295"), ("SLURMD_NODENAME", "n1")];
        assert_eq!(component(&Environment::from_pairs(endless)), None);
    }

    #[test]
    fn the_line_of_this_job_counts_and_no_other() {
        let array = "121 10:00\n120 05:00\n122 UNLIMITED\n";
        let ends = |seconds| Answer { limit: TimeLimit::Ends(at(seconds)), source: "squeue %L".to_owned() };
        assert_eq!(answer(array, "120", at(1000)).unwrap(), ends(1300));
        assert_eq!(answer(array, "121", at(1000)).unwrap(), ends(1600));
        assert_eq!(answer(array, "122", at(1000)).unwrap().limit, TimeLimit::Unlimited);
        assert!(matches!(answer(array, "12", at(1000)), Err(AskError::NotKnown { .. })));
        assert!(matches!(answer("", "12", at(1000)), Err(AskError::NotKnown { .. })));
        assert!(matches!(answer("12 NOT_SET", "12", at(1000)), Err(AskError::NoLimit { .. })));
        assert!(matches!(answer("12 INVALID", "12", at(1000)), Err(AskError::NoLimit { .. })));
        assert!(matches!(answer("12 soon", "12", at(1000)), Err(AskError::Unreadable { .. })));
    }

    #[test]
    fn a_preemption_ends_the_job_before_its_limit() {
        let ends = |line: &str| match answer(line, "5", at(1000)).unwrap() {
            Answer { limit: TimeLimit::Ends(end), source } => {
                (end.duration_since(at(1000)).unwrap().as_secs(), source.contains("preempted"))
            }
            other => panic!("{other:?}"),
        };
        let table = [
            // As Slurm 22.05 answered: a limit of an hour, preempted with a GraceTime of 100 s.
            ("5 59:49 2026-11-24T11:05:37 2026-11-24T11:03:50 0:11", (96, true)),
            // The same without a preemption, and after a suspension, which moves the end.
            ("5 59:49 2026-11-24T12:03:50 2026-11-24T11:03:50 0:11", (3589, false)),
            ("5 59:49 2026-11-24T12:13:50 2026-11-24T11:03:50 0:11", (3589, false)),
            ("5 59:49 2026-11-24T12:03:48 2026-11-24T11:03:50 0:11", (3589, false)),
            // An end that is over.
            ("5 59:49 2026-11-24T11:04:00 2026-11-24T11:03:50 0:11", (0, true)),
            // What cannot be read does not count.
            ("5 59:49 N/A 2026-11-24T11:03:50 0:11", (3589, false)),
            ("5 59:49 Tue 24 N/A", (3589, false)),
            ("5 59:49 2026-11-24T10:04:00 2026-11-24T11:03:50 0:11", (3589, false)),
            ("5 59:49", (3589, false)),
        ];
        for (line, expected) in table {
            assert_eq!(ends(line), expected, "{line}");
        }
        let unlimited = "5 UNLIMITED NONE 2026-11-24T11:03:50 0:11";
        assert_eq!(answer(unlimited, "5", at(0)).unwrap().limit, TimeLimit::Unlimited);
    }

    #[tokio::test]
    async fn squeue_is_asked_without_what_would_change_its_answer() {
        let stand_in = StandIn::new().script(
            "squeue",
            r#"[ "$*" = "-h -j 7 -o %A %L %e %S %M" ] || { echo "$*" >&2; exit 1; }
            [ -z "$SQUEUE_FORMAT$SQUEUE_STATES$SLURM_TIME_FORMAT$SLURM_CLUSTERS" ] || exit 2
            [ "$SLURM_CONF" = /etc/other.conf ] || exit 3
            echo "7 30:00""#,
        );
        let env = stand_in.environment([
            ("SQUEUE_FORMAT", "%i"),
            ("SQUEUE_STATES", "PD"),
            ("SLURM_TIME_FORMAT", "%s"),
            ("SLURM_CLUSTERS", "other"),
            ("SLURM_CONF", "/etc/other.conf"),
        ]);
        let before = SystemTime::now();
        let TimeLimit::Ends(end) = ask(&env, "7", LIMIT).await.unwrap().limit else { panic!("no end") };
        let left = end.duration_since(before).unwrap();
        assert!(left <= Duration::from_secs(1801) && left > Duration::from_secs(1790), "{left:?}");
    }

    #[tokio::test]
    async fn a_dead_slurmctld_is_an_error_with_its_reason() {
        let body = "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1";
        let env = StandIn::new().script("squeue", body);
        let error = ask(&env.environment([]), "7", LIMIT).await.unwrap_err().to_string();
        assert!(error.contains("Unable to contact slurm controller"), "{error}");
    }

    #[test]
    fn the_end_of_the_environment_is_taken_unless_it_stands_for_none() {
        let limit = |pairs: &[(&str, &str)]| {
            limit_from_environment(&Environment::from_pairs(pairs.iter().copied())).map(|answer| answer.limit)
        };
        let (start, end) = ("SLURM_JOB_START_TIME", "SLURM_JOB_END_TIME");
        assert_eq!(limit(&[]), None);
        assert_eq!(limit(&[(start, "1000"), (end, "4600")]), Some(TimeLimit::Ends(at(4600))));
        assert_eq!(limit(&[(end, "4600")]), Some(TimeLimit::Ends(at(4600))));
        assert_eq!(limit(&[(start, "1000"), (end, "31537000")]), Some(TimeLimit::Unlimited));
        assert_eq!(limit(&[(end, "0")]), None);
        assert_eq!(limit(&[(end, "18446744073709551615")]), None);
        assert_eq!(limit(&[(end, "Unknown")]), None);
    }

    #[test]
    fn a_batch_script_is_one_task_whatever_the_job_asked_for() {
        let env = Environment::from_pairs([
            ("SLURM_JOB_ID", "121"),
            ("SLURM_ARRAY_JOB_ID", "120"),
            ("SLURM_ARRAY_TASK_ID", "3"),
            ("SLURM_RESTART_COUNT", "2"),
            ("SLURM_CLUSTER_NAME", "hpc"),
            ("SLURM_JOB_NODELIST", "n[1-2]"),
            ("SLURM_JOB_NUM_NODES", "2"),
            ("SLURM_NTASKS", "8"),
            ("SLURM_PROCID", "0"),
            ("SLURMD_NODENAME", "n1"),
            ("SLURM_CPUS_ON_NODE", "4"),
            ("SLURM_MEM_PER_CPU", "1000"),
        ]);
        let job = describe(&env);
        assert_eq!(job.id.unwrap().value, "121");
        assert_eq!(job.array.unwrap().value, "120_3");
        assert_eq!(job.restart_count, 2);
        assert_eq!(job.task, Task { rank: 0, nodes: 2, tasks: 1, array: 1 });
        assert_eq!(job.host.as_deref(), Some("n1"));
        assert_eq!(job.hosts.unwrap().value, ["n1", "n2"]);
        assert_eq!(job.cpus.unwrap().value, 4);
        assert_eq!(job.memory[0].value, 4000 << 20);
    }

    #[test]
    fn memory_is_that_of_the_node_or_of_each_cpu_or_gpu() {
        let granted = |pairs: &[(&str, &str)]| {
            let memory = describe(&Environment::from_pairs(pairs.iter().copied())).memory;
            memory.into_iter().map(|fact| (fact.value >> 20, fact.source)).collect::<Vec<_>>()
        };
        let cpus = ("SLURM_CPUS_ON_NODE", "4");
        let gpus = ("SLURM_GPUS_ON_NODE", "2");
        let of = |mib, source: &str| vec![(mib, source.to_owned())];
        assert_eq!(granted(&[("SLURM_MEM_PER_NODE", "3000"), cpus]), of(3000, "SLURM_MEM_PER_NODE"));
        let each = "SLURM_MEM_PER_CPU x SLURM_CPUS_ON_NODE";
        assert_eq!(granted(&[("SLURM_MEM_PER_CPU", "1000"), cpus, gpus]), of(4000, each));
        let each = "SLURM_MEM_PER_GPU x SLURM_GPUS_ON_NODE";
        assert_eq!(granted(&[("SLURM_MEM_PER_GPU", "5000"), cpus, gpus]), of(10_000, each));
        assert_eq!(granted(&[("SLURM_MEM_PER_GPU", "5000"), cpus]), []);
        assert_eq!(granted(&[("SLURM_MEM_PER_NODE", "18446744073709551615")]), []);
    }

    #[test]
    fn node_lists_are_expanded() {
        let table = [
            ("gpu5", Some("gpu5")),
            ("a,b", Some("a b")),
            ("node[01-03,7],gpu5", Some("node01 node02 node03 node7 gpu5")),
            ("r[1-2]n[09-10]x", Some("r1n09x r1n10x r2n09x r2n10x")),
            ("n[8-11]", Some("n8 n9 n10 n11")),
            ("", None),
            ("n[1-2", None),
            ("n1-2]", None),
            ("n[]", None),
            ("n[2-1]", None),
            ("n[a-b]", None),
            ("n[[1]]", None),
            ("n[0-999999999]", None),
            ("n[0-999]m[0-999]", None),
        ];
        for (list, hosts) in table {
            let hosts = hosts.map(|hosts| hosts.split(' ').map(str::to_owned).collect::<Vec<_>>());
            assert_eq!(expand_hosts(list), hosts, "{list}");
        }
    }

    proptest! {
        #[test]
        fn no_answer_makes_a_parser_panic(
            text in "[0-9A-Z:\\-\\[\\], \\n]{0,60}", any in ".{0,40}",
            line in "1 [0-9:-]{1,9} [0-9]{1,5}-[0-9]{2}-[0-9]{2}T[0-9:]{8} -?[0-9]{4,6}-1[0-2]-0[1-9]T1[0-9]:00:00 [0-9:-]{1,12}",
        ) {
            let _ = answer(&line, "1", UNIX_EPOCH);
            for text in [&text, &any] {
                let _ = parse_time_left(text);
                let _ = answer(text, "1", UNIX_EPOCH);
                let _ = expand_hosts(text);
            }
        }

        #[test]
        fn a_time_left_is_read_back(seconds in 0u64..100 * 86_400) {
            let left = Duration::from_secs(seconds);
            prop_assert_eq!(parse_time_left(&super::super::duration::format_clock(left)), Ok(TimeLeft::Left(left)));
        }
    }
}
