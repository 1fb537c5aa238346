//! PBS against the recorded answers of a real OpenPBS, and against what Torque is known to print.

use std::time::UNIX_EPOCH;

use super::*;
use crate::allocation::pbs_text::tests::{json, recorded};
use crate::allocation::stand_in::StandIn;
use proptest::prelude::*;

const LIMIT: Duration = Duration::from_secs(10);

fn at(text: &str) -> SystemTime {
    let timestamp: jiff::Timestamp = text.parse().unwrap();
    timestamp.into()
}

fn far() -> SystemTime {
    at("2030-01-01T00:00:00Z")
}

/// The end told by a recorded answer, asked long after it.
fn limit(name: &str, id: &str) -> TimeLimit {
    QstatJob(json(name, id)).answer(far(), far()).unwrap().limit
}

#[test]
fn the_end_is_the_start_and_the_walltime() {
    let table = [
        ("qstat-f-running.json", "0.pbshost", "2026-11-24T06:53:39Z"),
        ("qstat-f-after-qalter.json", "7.pbshost", "2026-11-24T07:03:07Z"),
        ("array/qstat-f-subjob.json", "45[3].pbshost", "2026-11-24T07:05:03Z"),
        ("array/qstat-t-f.json", "45[6].pbshost", "2026-11-24T07:05:03Z"),
        ("suspend/qstat-f-suspended.json", "11.pbshost", "2026-11-24T06:59:54Z"),
        ("rerun/qstat-f.json", "12.pbshost", "2026-11-24T07:00:58Z"),
        ("quirks/qstat-f.55.pbshost.json", "55.pbshost", "2026-11-24T07:03:00Z"),
        ("qstat-x-f-walltime.json", "", "2026-11-24T06:52:49Z"),
    ];
    for (name, id, end) in table {
        assert_eq!(limit(name, id), TimeLimit::Ends(at(end)), "{name}");
    }
}

#[test]
fn no_walltime_is_no_limit() {
    assert_eq!(limit("formats/qstat-f-no-walltime.json", "167.pbshost"), TimeLimit::Unlimited);
}

#[test]
fn every_recorded_walltime_and_size_is_read() {
    let recorded = recorded("formats/resource_list.txt");
    let values = |name: &str| -> Vec<String> {
        let key = format!("'{name}': '");
        let values = recorded.split(&key).skip(1).filter_map(|rest| rest.split('\'').next());
        values.map(str::to_owned).collect()
    };
    let seconds = |text: &String| parse_pbs_time(text).unwrap().as_secs();
    let walltimes: Vec<_> = values("walltime").iter().map(seconds).collect();
    assert_eq!(walltimes, [90, 90_061, 360_000, 360_000, 5400]);
    let sizes: Vec<_> = values("mem").iter().map(|text| parse_pbs_size(text).unwrap()).collect();
    assert_eq!(sizes, [2 << 30, 2 << 30, 1 << 20, 1 << 40]);
}

#[test]
fn a_job_that_does_not_run_has_no_end() {
    // Queued, held, held by a dependency, waiting for its time, deleted while it was queued.
    for (name, state) in
        [("f-Q", "Q"), ("f-H", "H"), ("f-D", "H"), ("f-W", "W"), ("x-f-deleted-while-queued", "F")]
    {
        let job = QstatJob(json(&format!("states/qstat-{name}.json"), ""));
        let error = job.answer(far(), far()).unwrap_err().to_string();
        assert!(error.contains(&format!("no start time (job state {state})")), "{name}: {error}");
    }
}

#[test]
fn a_job_that_was_deleted_is_told_all_of_its_walltime() {
    // Exit_status 271, and start and walltime as ever: why PBS is not asked once a SIGTERM has come.
    assert_eq!(limit("qstat-x-f-qdel.json", ""), TimeLimit::Ends(at("2026-11-24T06:55:09Z")));
}

#[test]
fn the_first_seconds_of_a_job_tell_its_end_already() {
    // Substate 41: no session_id, no jobdir, no resources_used.
    let mut job = json("qstat-f-running.json", "0.pbshost");
    let count = job.attributes.len();
    job.attributes
        .retain(|name, _| !name.starts_with("resources_used") && name != "session_id" && name != "jobdir");
    assert!(job.attributes.len() + 5 < count, "the recorded job had them");
    let answer = QstatJob(job.clone()).answer(far(), far()).unwrap();
    assert_eq!(answer.limit, TimeLimit::Ends(at("2026-11-24T06:53:39Z")));
    assert_eq!(QstatJob(job).grant("pbshost", 0).cpus, Some(Fact::new(1, "qstat exec_vnode ncpus")));
}

#[test]
fn an_array_is_not_one_of_its_jobs() {
    let of = |id| match parse_json(&recorded("array/qstat-t-f.json"), id) {
        Json::Job(job) => job.id,
        other => panic!("{id}: {other:?}"),
    };
    for id in ["45[3].pbshost", "45[6].pbshost", "45[].pbshost"] {
        assert_eq!(of(id), id);
    }
    // The server's name may be another one, in full or not.
    assert_eq!(of("45[6].pbshost.site.edu"), "45[6].pbshost");
    assert_eq!(parse_json(&recorded("array/qstat-t-f.json"), "45[4].pbshost"), Json::NoJob);
    // Its own end is no job's.
    let parent = QstatJob(json("array/qstat-f-parent.json", "45[].pbshost"));
    assert_eq!(parent.get("job_state"), Some("B"));
}

#[test]
fn a_task_of_pbsdsh_knows_its_job_by_its_bare_environment_and_qstat() {
    let text = recorded("pbsdsh/dsh.o46");
    let bare = text.split("== pbsdsh env\n").nth(1).unwrap().split("rc=0").next().unwrap();
    let env = Environment::from_pairs(bare.lines().filter_map(|line| line.split_once('=')));
    for absent in ["USER", "LOGNAME", "SHELL", "PBS_NODEFILE"] {
        assert_eq!(env.get(absent), None, "{absent}");
    }
    assert!(!is_torque(&env));
    let qstat = QstatJob(json("qstat-f-running.json", "0.pbshost"));
    let job = describe(&env, "pbshost", Some(&qstat));
    assert_eq!(job.id.unwrap(), Fact::new("46.pbshost".to_owned(), "PBS_JOBID"));
    assert_eq!(job.hosts.unwrap(), Fact::new(vec!["pbshost".to_owned()], "qstat exec_host"));
    assert_eq!(job.task, Task { rank: 0, nodes: 1, tasks: 1, array: 1 });
    // Where no qstat answers either.
    let job = describe(&env, "pbshost", None);
    assert_eq!((job.hosts, job.cpus), (None, Some(Fact::new(1, "NCPUS"))));
}

#[test]
fn a_start_after_our_own_is_not_believed() {
    let job = QstatJob(json("qstat-f-running.json", "0.pbshost"));
    let begun = at("2026-11-24T06:40:00Z");
    assert_eq!(job.answer(far(), begun).unwrap().limit, TimeLimit::Ends(at("2026-11-24T06:45:00Z")));
}

#[test]
fn a_rerun_is_counted() {
    assert_eq!(QstatJob(json("rerun/qstat-f.json", "12.pbshost")).restart_count(), Some(1));
    assert_eq!(QstatJob(json("qstat-f-running.json", "0.pbshost")).restart_count(), Some(0));
}

#[test]
fn torque_tells_what_remains() {
    let text = "Job Id: 275.head\n    job_state = R\n    exec_host = n1/0+n1/1\n    \
        Resource_List.walltime = 10:00:00\n    start_time = Tue Nov 24 06:00:00 2026\n";
    let job = |text: &str| QstatJob(parse_text(text, "275.head").unwrap());
    let asked = at("2026-11-24T07:00:00Z");
    let answer = job(text).answer(asked, asked).unwrap();
    assert_eq!(answer.limit, TimeLimit::Ends(at("2026-11-24T16:00:00Z")));
    let answer = job(&format!("{text}    Walltime.Remaining = 60\n")).answer(asked, asked).unwrap();
    assert_eq!(answer.limit, TimeLimit::Ends(at("2026-11-24T07:01:00Z")));
    assert_eq!(answer.source, "qstat Walltime.Remaining");
}

#[test]
fn times_of_ctime_are_read() {
    assert_eq!(parse_ctime("Fri Jul  1 14:42:57 2022"), Some(at("2022-07-01T14:42:57Z")));
    for text in
        ["", "Fri Jul  1 14:42:57", "Fri Jux 1 14:42:57 2022", "Fri Jul 41 14:42:57 2022", "1 2 3 4 5"]
    {
        assert_eq!(parse_ctime(text), None, "{text}");
    }
}

#[test]
fn what_was_granted_on_this_host_is_counted_and_no_more() {
    let grant = |exec_host: &str, exec_vnode: &str, extra: &[(&str, &str)], name: &str, number| {
        let pairs = [("exec_host", exec_host), ("exec_vnode", exec_vnode)];
        let attributes = pairs.iter().chain(extra).map(|(n, v)| ((*n).to_owned(), (*v).to_owned())).collect();
        let grant = QstatJob(Described { id: String::new(), attributes }).grant(name, number);
        (grant.cpus.map(|fact| fact.value), grant.memory.map(|fact| fact.value))
    };
    let two = ("a/0*4+b/0*2+b/1", "(v1:ncpus=4:mem=8gb)+(v2:ncpus=2:mem=1gb)+(v2:ncpus=1:mem=1gb:ngpus=1)");
    assert_eq!(grant(two.0, two.1, &[], "a.site.edu", 1), (Some(4), Some(8 << 30)));
    // The host's own name is not the batch system's: its number counts.
    assert_eq!(grant(two.0, two.1, &[], "other", 1), (Some(3), Some(2 << 30)));
    // A chunk over two vnodes of a host.
    assert_eq!(grant("a/0*2", "(x:ncpus=1:mem=1gb+y:ncpus=1)", &[], "a", 0), (Some(2), Some(1 << 30)));
    // No memory in a chunk: what the job has in all is this host's only when there is no other.
    let total = [("Resource_List.mem", "4gb"), ("Resource_List.ncpus", "9")];
    assert_eq!(grant("a/0", "(x:ncpus=1)", &total, "a", 0), (Some(1), Some(4 << 30)));
    assert_eq!(grant("a/0+b/0", "(x:ncpus=1)+(y:ncpus=1)", &total, "a", 0), (Some(1), None));
    // Torque has no exec_vnode.
    assert_eq!(grant("a/0+a/1", "", &total, "a", 0), (Some(9), Some(4 << 30)));
    assert_eq!(grant("", "", &[], "a", 0), (None, None));
}

#[test]
fn the_job_is_described_from_its_environment_and_qstat() {
    let node_file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(node_file.path(), "n1\nn1\nn2\n").unwrap();
    let env = Environment::from_pairs([
        ("PBS_JOBID", "45[3].pbshost.site.edu"),
        ("PBS_ARRAY_ID", "45[].pbshost"),
        ("PBS_ARRAY_INDEX", "3"),
        ("PBS_NODEFILE", node_file.path().to_str().unwrap()),
        ("PBS_NODENUM", "1"),
        ("PBS_TASKNUM", "00000002"),
        ("NCPUS", "2"),
    ]);
    let job = describe(&env, "n2", None);
    assert_eq!(job.id.unwrap().value, "45[3].pbshost.site.edu");
    assert_eq!(job.array.unwrap().value, "45[].pbshost 3");
    assert_eq!(job.cluster.unwrap().value, "pbshost");
    assert_eq!(job.hosts.unwrap().value, ["n1", "n2"]);
    assert_eq!(job.task, Task { rank: 1, nodes: 2, tasks: 2, array: 1 });
    assert_eq!(job.cpus.unwrap(), Fact::new(2, "NCPUS"));

    let qstat = QstatJob(json("rerun/qstat-f.json", "12.pbshost"));
    let job = describe(&env, "n2", Some(&qstat));
    assert_eq!(job.restart_count, 1);
    assert_eq!(job.cpus.unwrap(), Fact::new(1, "qstat exec_vnode ncpus"));
    assert_eq!(job.memory, [Fact::new(512_000 << 10, "qstat exec_vnode mem")]);
}

#[test]
fn torque_is_told_by_its_variables() {
    assert!(is_torque(&Environment::from_pairs([("PBS_WALLTIME", "3600"), ("PBS_NUM_PPN", "4")])));
    assert!(
        !is_torque(&Environment::from_pairs([("PBS_WALLTIME", "3600")])),
        "a wrapper in front of PBS sets it too"
    );
    assert!(!is_torque(&Environment::from_pairs([("PBS_JOBID", "1"), ("NCPUS", "2")])));
    let env = Environment::from_pairs([("PBS_WALLTIME", "3600")]);
    let answer = limit_from_environment(&env, UNIX_EPOCH).unwrap();
    assert_eq!(answer.limit, TimeLimit::Ends(UNIX_EPOCH + Duration::from_secs(3600)));
}

/// A qstat that serves `name.json` for `-F json`, `name.txt` otherwise, and insists on UTC.
fn qstat(stand_in: &StandIn, json: &str, text: &str, code: i32) {
    for (name, content) in [("json", json), ("txt", text)] {
        std::fs::write(stand_in.path().join(name), content).unwrap();
    }
    let body = format!(
        r#"[ "$TZ" = UTC ] || exit 9
        echo "qstat: as recorded" >&2
        cd "$(dirname "$0")"
        case "$*" in "-f -F json "*) cat json;; "-f "*) cat txt;; *) exit 2;; esac
        exit {code}"#
    );
    stand_in.rewrite("qstat", &body);
}

#[tokio::test]
async fn broken_json_falls_back_to_text() {
    let (running, text) = (recorded("qstat-f-running.json"), recorded("qstat-f-running.txt"));
    // What older releases print for `foo=005` in a job's environment.
    let broken = running.replace("\"PBS_O_LANG\":\t\"C.UTF-8\"", "\"foo\":\t005");
    assert_ne!(broken, running);
    for json in [broken.as_str(), &running[..700], "", "usage: qstat [-f]"] {
        let stand_in = StandIn::new();
        qstat(&stand_in, json, &text, 0);
        let (job, asked) = ask(&stand_in.environment([]), "0.pbshost", false, LIMIT).await.unwrap();
        let answer = job.answer(asked, far()).unwrap();
        assert_eq!(answer.limit, TimeLimit::Ends(at("2026-11-24T06:53:39Z")));
    }
}

#[tokio::test]
async fn a_job_that_qstat_does_not_know_is_an_error_with_its_reason() {
    let running = recorded("qstat-f-running.json");
    let without = running.split(",\n\t\"Jobs\"").next().unwrap().to_owned() + "\n}\n";
    for code in [153, 35, 255] {
        let stand_in = StandIn::new();
        // The text must not be asked for: it would not know more.
        qstat(&stand_in, &without, &recorded("qstat-f-running.txt"), code);
        let error = ask(&stand_in.environment([]), "0.pbshost", false, LIMIT).await.unwrap_err();
        assert!(matches!(error, AskError::NotKnown { .. }), "{error}");
        assert!(error.to_string().contains("qstat: as recorded"), "{error}");
    }
}

#[tokio::test]
async fn a_server_that_is_down_is_told_from_a_job_that_is_gone() {
    // What qstat said each second, while its server was stopped and started again: rc 255, and JSON without a job.
    let all = recorded("serverdown/in-job-poll.txt");
    let down: Vec<&str> = all.lines().filter(|line| line.contains(" rc=255 ")).collect();
    assert!(down.len() > 10, "{} lines", down.len());
    let without = "{\n\t\"timestamp\":\t1795504126,\n\t\"pbs_server\":\t\"pbshost\"\n}\n";
    for line in [down[0], down[1]] {
        let said = line.split(" took=").nth(1).unwrap().split_once(' ').unwrap().1.split('{').next().unwrap();
        let stand_in = StandIn::new();
        stand_in.rewrite("qstat", &format!("echo '{}' >&2; printf '%s' '{without}'; exit 255", said.trim()));
        let error = ask(&stand_in.environment([]), "150.pbshost", false, LIMIT).await.unwrap_err();
        let error = error.to_string();
        assert!(error.contains("cannot connect to server pbshost"), "{error}");
    }
}

#[tokio::test]
async fn a_hung_server_and_an_absent_qstat_are_answers_soon() {
    let stand_in = StandIn::new().script("qstat", "exec sleep 60");
    let began = std::time::Instant::now();
    let short = Duration::from_millis(300);
    let error = ask(&stand_in.environment([]), "0.pbshost", false, short).await.unwrap_err();
    assert!(
        matches!(error, AskError::Command(_)) && error.to_string().contains("no answer in 0.3 s"),
        "{error}"
    );
    // It is not asked for text as well: it would hang as long again.
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());

    // As on many compute nodes.
    let env = Environment::from_pairs([
        ("PATH", "/nonexistent/a"),
        ("PBS_O_PATH", "/nonexistent/b"),
        ("PBS_CONF_FILE", "/nonexistent/pbs.conf"),
    ]);
    let error = ask(&env, "0.pbshost", false, LIMIT).await.unwrap_err().to_string();
    for place in ["/nonexistent/a", "/nonexistent/b", "/nonexistent/pbs.conf", "qstat"] {
        assert!(error.contains(place), "{error}");
    }
}

#[tokio::test]
async fn torque_is_not_asked_for_json() {
    let stand_in = StandIn::new();
    qstat(&stand_in, &recorded("qstat-f-running.json"), "", 153);
    let error = ask(&stand_in.environment([]), "0.pbshost", true, LIMIT).await.unwrap_err();
    assert!(error.to_string().contains("qstat: as recorded"), "{error}");
}

#[tokio::test]
async fn the_qstat_of_pbs_conf_comes_before_that_of_path() {
    let (wrapper, own) = (StandIn::new(), tempfile::tempdir().unwrap());
    qstat(&wrapper, "", "", 1);
    let bin = own.path().join("bin");
    std::fs::create_dir(&bin).unwrap();
    let conf = own.path().join("pbs.conf");
    std::fs::write(&conf, format!("PBS_SERVER=x\nPBS_EXEC={}\n", own.path().display())).unwrap();
    let env = wrapper.environment([("PBS_CONF_FILE", conf.to_str().unwrap())]);
    assert_eq!(find_qstat(&env), Some(wrapper.path().join("qstat")), "an installation without qstat");
    std::fs::copy(wrapper.path().join("qstat"), bin.join("qstat")).unwrap();
    assert_eq!(find_qstat(&env), Some(bin.join("qstat")));

    let path = wrapper.path().to_str().unwrap();
    let only =
        Environment::from_pairs([("PATH", "/nonexistent"), ("PBS_O_PATH", path), ("PBS_CONF_FILE", "/x")]);
    assert_eq!(find_qstat(&only), Some(wrapper.path().join("qstat")));
}

proptest! {
    #[test]
    fn no_answer_makes_a_reader_panic(
        text in "[0-9:a-z()+*/.=]{0,60}", value in "[0-9:.]{0,24}", time in "[A-Z][a-z]{2} [A-Z][a-z]{2} [0-9: ]{0,20}",
    ) {
        parse_exec_vnode(&text);
        parse_ctime(&time);
        let attributes = [("exec_host", &text), ("exec_vnode", &text), ("stime", &time), ("run_count", &value),
            ("Resource_List.walltime", &value), ("Walltime.Remaining", &value)];
        for skipped in 0..attributes.len() {
            let attributes = attributes.iter().enumerate().filter(|(i, _)| *i != skipped)
                .map(|(_, (n, v))| ((*n).to_owned(), (*v).clone())).collect();
            let job = QstatJob(Described { id: String::new(), attributes });
            let _ = job.answer(far(), far());
            let _ = job.grant("a", 0);
            let _ = job.restart_count();
        }
    }
}
