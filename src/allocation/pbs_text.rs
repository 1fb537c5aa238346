//! The two forms in which qstat describes a job, both read into the same flat attributes: `Resource_List.walltime`,
//! `stime`. What the attributes mean is told in `pbs`.

use std::collections::BTreeMap;

use serde_json::Value;

/// A job as qstat describes it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Described {
    /// Its id, as this server writes it.
    pub(super) id: String,
    /// Its attributes, resources with their list's name before them.
    pub(super) attributes: BTreeMap<String, String>,
}

/// What there is in an answer that should be JSON.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Json {
    /// It is none: older releases print invalid JSON for some environments, and Torque prints its usage.
    Broken(String),
    /// It is, but has no job: unknown, finished, or a server that cannot be reached.
    NoJob,
    /// A job.
    Job(Described),
}

/// Reads the answer of `qstat -f -F json`.
///
/// Every value that looks like JSON becomes that type in there (a job's `"0123"` becomes 123), so types are not
/// relied upon. Each job's id is its key; the wanted one is taken, or the only one.
pub(super) fn parse_json(text: &str, wanted: &str) -> Json {
    let answer: Value = match serde_json::from_str(text) {
        Ok(answer) => answer,
        Err(error) => return Json::Broken(error.to_string()),
    };
    let Value::Object(answer) = answer else { return Json::Broken("it is no object".to_owned()) };
    let Some(Value::Object(jobs)) = answer.get("Jobs") else { return Json::NoJob };
    let jobs = jobs.iter().filter_map(|(id, job)| Some((id.as_str(), job.as_object()?)));
    let Some((id, job)) = choose(jobs.collect(), wanted) else { return Json::NoJob };

    let mut attributes = BTreeMap::new();
    for (name, value) in job {
        match value {
            Value::Object(members) => {
                for (member, value) in members {
                    insert(&mut attributes, format!("{name}.{member}"), value);
                }
            }
            value => insert(&mut attributes, name.clone(), value),
        }
    }
    Json::Job(Described { id: id.to_owned(), attributes })
}

/// Keeps a value as text; what is neither text, number nor truth value is nothing that is asked for here.
fn insert(attributes: &mut BTreeMap<String, String>, name: String, value: &Value) {
    let text = match value {
        Value::String(text) => text.clone(),
        Value::Number(number) => number.to_string(),
        Value::Bool(truth) => truth.to_string(),
        Value::Null | Value::Array(_) | Value::Object(_) => return,
    };
    attributes.insert(name, text);
}

/// Reads the answer of `qstat -f`: `Job Id: ID`, then one attribute a line, `    name = value`. A long value goes on
/// in lines that begin with a tab; one with a newline in it goes on at the beginning of a line.
pub(super) fn parse_text(text: &str, wanted: &str) -> Option<Described> {
    let mut jobs: Vec<(&str, BTreeMap<String, String>)> = Vec::new();
    let mut last: Option<String> = None;
    for line in text.lines() {
        if let Some(id) = line.strip_prefix("Job Id:") {
            jobs.push((id.trim(), BTreeMap::new()));
            last = None;
            continue;
        }
        let Some((_, attributes)) = jobs.last_mut() else { continue };
        let attribute = line.strip_prefix("    ").and_then(|line| line.split_once(" = "));
        match attribute {
            // The first holds: values that users choose (Variable_List) come after what is asked for here, and a
            // line break in one of them must not pass for another attribute.
            Some((name, value)) if !attributes.contains_key(name) => {
                attributes.insert(name.to_owned(), value.to_owned());
                last = Some(name.to_owned());
            }
            Some(_) => last = None,
            None => {
                if let Some(value) = last.as_ref().and_then(|name| attributes.get_mut(name)) {
                    value.push_str(line.strip_prefix('\t').unwrap_or(line));
                }
            }
        }
    }
    let (id, attributes) = choose(jobs, wanted)?;
    Some(Described { id: id.to_owned(), attributes })
}

/// The job with the wanted id, or the only one: its suffix may differ from what the job's environment says.
fn choose<'a, T>(mut jobs: Vec<(&'a str, T)>, wanted: &str) -> Option<(&'a str, T)> {
    let number = |id: &str| id.split('.').next().unwrap_or(id).to_owned();
    let exact = jobs.iter().position(|(id, _)| *id == wanted);
    let at = exact.or_else(|| jobs.iter().position(|(id, _)| number(id) == number(wanted)));
    match at {
        Some(at) => Some(jobs.swap_remove(at)),
        None if jobs.len() == 1 => jobs.pop(),
        None => None,
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A recorded answer.
    pub(crate) fn recorded(name: &str) -> String {
        let path = format!("{}/tests/fixtures/pbs/{name}", env!("CARGO_MANIFEST_DIR"));
        String::from_utf8_lossy(&std::fs::read(&path).unwrap_or_else(|e| panic!("{path}: {e}"))).into_owned()
    }

    pub(crate) fn json(name: &str, id: &str) -> Described {
        match parse_json(&recorded(name), id) {
            Json::Job(job) => job,
            other => panic!("{name}: {other:?}"),
        }
    }

    #[test]
    fn both_forms_say_the_same_of_a_job() {
        for (name, id) in [
            ("qstat-f-running", "0.pbshost"),
            ("states/qstat-f-R", "50.pbshost"),
            ("states/qstat-f-Q", "47.pbshost"),
            ("rerun/qstat-f", "12.pbshost"),
            ("quirks/qstat-f.55.pbshost", "55.pbshost"),
            ("qstat-x-f-walltime", "only"),
        ] {
            let json = json(&format!("{name}.json"), id);
            let text = parse_text(&recorded(&format!("{name}.txt")), id).unwrap();
            assert_eq!(json.id, text.id, "{name}");
            for attribute in [
                "stime",
                "job_state",
                "run_count",
                "exec_vnode",
                "exec_host",
                "Resource_List.walltime",
                "Resource_List.mem",
                "Resource_List.ncpus",
            ] {
                assert_eq!(
                    json.attributes.get(attribute),
                    text.attributes.get(attribute),
                    "{name}: {attribute}"
                );
            }
        }
    }

    #[test]
    fn a_long_value_goes_on_after_a_tab_and_after_a_line_break() {
        let text = recorded("quirks/qstat-f.55.pbshost.txt");
        let variables = &parse_text(&text, "55.pbshost").unwrap().attributes["Variable_List"];
        assert!(variables.contains("PBS_O_LANG=C.UTF-8,PBS_O_LOGNAME=hpcuser"), "{variables}");
        assert!(variables.contains("NL=line1line2,COMMA"), "{variables}");
    }

    #[test]
    fn a_users_variable_cannot_pass_for_an_attribute() {
        let forged = recorded("qstat-f-running.txt")
            .replace("PBS_O_HOST=pbshost\n", "X=\n    Resource_List.walltime = 99:00:00\n");
        assert_eq!(parse_text(&forged, "0").unwrap().attributes["Resource_List.walltime"], "00:05:00");
    }

    #[test]
    fn of_several_jobs_the_wanted_one_is_taken() {
        let all = recorded("array/qstat-t-f.json");
        for id in ["45[3].pbshost", "45[9]", "45[6].other.suffix"] {
            let Json::Job(job) = parse_json(&all, id) else { panic!("{id}") };
            assert_eq!(job.id.split('.').next(), id.split('.').next());
        }
        assert_eq!(parse_json(&all, "46[3].pbshost"), Json::NoJob);
        // The only one, whatever its name.
        assert_eq!(json("array/qstat-f-subjob.json", "7").id, "45[3].pbshost");
    }

    #[test]
    fn valid_json_without_jobs_is_no_job_and_a_cut_answer_is_broken() {
        let running = recorded("qstat-f-running.json");
        let without = running.split(",\n\t\"Jobs\"").next().unwrap().to_owned() + "\n}\n";
        assert_eq!(parse_json(&without, "0.pbshost"), Json::NoJob);
        for at in 1..running.trim_end().len() {
            assert!(matches!(parse_json(&running[..at], "0.pbshost"), Json::Broken(_)), "cut at {at}");
        }
    }

    #[test]
    fn values_of_any_type_are_read() {
        let job = json("quirks/qstat-f.55.pbshost.json", "55.pbshost");
        assert_eq!(job.attributes["Variable_List.NUM"], "123");
        assert_eq!(job.attributes["Variable_List.BOOL"], "true");
        assert!(!job.attributes.contains_key("Variable_List.NUL"));
        assert_eq!(job.attributes["Resource_List.walltime"], "00:01:00");
    }

    proptest! {
        #[test]
        fn no_text_makes_a_parser_panic(text in "(?s).{0,200}", at in 0usize..1800, byte: u8) {
            parse_json(&text, "0.pbshost");
            parse_text(&text, "0.pbshost");
            for name in ["qstat-f-running.json", "quirks/qstat-f.55.pbshost.txt"] {
                let mut bytes = recorded(name).into_bytes();
                bytes[at % 1700] = byte;
                let text = String::from_utf8_lossy(&bytes);
                parse_json(&text, "0.pbshost");
                parse_text(&text, "0.pbshost");
            }
        }
    }
}
