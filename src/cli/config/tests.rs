//! A file's settings against the command line's own arguments.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;

use clap::{ArgAction, CommandFactory, FromArgMatches};
use proptest::strategy::Strategy as _;

use super::*;
use crate::cli::{Cli, Command as Sub, RunArgs};

/// No variable of the test's own environment counts.
fn root() -> Command {
    let unset = |arg: Arg| arg.env(None::<&'static str>);
    Cli::command().mut_args(unset).mut_subcommands(|command| command.mut_args(unset))
}

fn variable(name: &str) -> Option<String> {
    match name {
        "HOME" => Some("/home/ada".to_owned()),
        "SCRATCH" => Some("/scratch/ada".to_owned()),
        _ => None,
    }
}

/// `run` with these arguments, over this text.
fn run_with(text: &str, arguments: &[&str]) -> (RunArgs, Origins) {
    let (settings, faults) = settings(text, &root(), &variable);
    assert!(faults.is_empty(), "{faults:?}");
    let config = Config { path: PathBuf::from("/etc/site.toml"), settings };
    let args: Vec<OsString> =
        ["jiriaf-pilot", "run"].iter().chain(arguments).map(|arg| OsString::from(*arg)).collect();
    let matches = root().try_get_matches_from(&args).unwrap();
    let (command, origins) = apply(root(), Some(&config), "run", matches.subcommand().unwrap().1);
    // What is handed on makes the same of it.
    let handed = origins.handed().map_or(root(), |handed| take(root(), "run", &handed));
    let parsed = [command, handed].map(|command| {
        match Cli::from_arg_matches(&command.try_get_matches_from(&args).unwrap()).unwrap().command {
            Sub::Run(args) => *args,
            other => panic!("{other:?}"),
        }
    });
    assert_eq!(format!("{:?}", parsed[0]), format!("{:?}", parsed[1]));
    let [parsed, _] = parsed;
    (parsed, origins)
}

fn faults(text: &str) -> Vec<String> {
    let (_, faults) = settings(text, &root(), &variable);
    faults.into_iter().map(|(line, problem)| format!("{line}: {problem}")).collect()
}

#[test]
fn a_file_gives_what_nothing_else_says() {
    let text = r#"
        site = "jlab"
        port = 10250
        walltime = "2h"
        drain-before = 45
        pods-dir = "$SCRATCH/pods"
        state-dir = "~/state"
        pods-layout = "namespaced"
        anonymous-metrics = true
        no-taint = false
        namespaces = ["a", "b"]
        labels = { "example.org/rack" = "7", row = "" }
        annotations = ["example.org/owner=Ada, room 3", "x=y"]
        tunnels = ["ssh://login.example.org?api=0"]
    "#;
    let (run, origins) = run_with(text, &[]);
    assert_eq!((run.site.as_deref(), run.port), (Some("jlab"), 10250));
    assert_eq!(run.drain_before.unwrap().as_secs(), 45);
    assert_eq!(run.pods.pods_dir.as_deref(), Some(Path::new("/scratch/ada/pods")));
    assert_eq!(run.pods.state_dir.as_deref(), Some(Path::new("/home/ada/state")));
    assert_eq!(run.pods.pods_layout, crate::cli::PodsLayout::Namespaced);
    assert!(run.anonymous_metrics && !run.no_taint);
    assert_eq!(run.namespaces, ["a", "b"]);
    let pairs = |pairs: &[(&str, &str)]| -> Vec<(String, String)> {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    };
    assert_eq!(run.labels, pairs(&[("example.org/rack", "7"), ("row", "")]));
    // A comma divides a list on the command line, and nothing in a file.
    assert_eq!(run.annotations, pairs(&[("example.org/owner", "Ada, room 3"), ("x", "y")]));
    assert_eq!(run.tunnels.len(), 1);
    // `false` is what is so anyway.
    assert_eq!(origins.settings.len(), 12, "{origins:?}");
    assert!(origins.unused.is_empty());
    // Nothing of it: the defaults.
    let (plain, origins) = run_with("# nothing\n", &[]);
    assert_eq!(format!("{plain:?}"), format!("{:?}", crate::cli::run_args(&[])));
    assert_eq!((origins.settings, origins.handed), (Vec::new(), Vec::new()));
}

#[test]
fn the_command_line_goes_before_the_file() {
    let text = "site = \"file\"\nlabels = [\"a=1\"]\ntaints = [\"a:NoExecute\"]\nanonymous-metrics = true\nport = 7\n";
    let (run, origins) = run_with(text, &["--site", "line", "--label", "b=2,c=3", "--no-taint"]);
    assert_eq!(run.site.as_deref(), Some("line"));
    assert_eq!(run.labels.len(), 2, "{:?}", run.labels);
    // Which goes before the taints wherever they come from.
    assert!(run.no_taint && run.anonymous_metrics);
    let origin = |flag: &str| origins.settings.iter().find(|origin| origin.flag == flag).unwrap();
    let wanted = |flag: &str, value: &str, place, over| Origin {
        flag: flag.to_owned(),
        value: value.to_owned(),
        place,
        over,
    };
    assert_eq!(origin("site"), &wanted("site", "line", Place::CommandLine, Some(1)));
    assert_eq!(origin("label"), &wanted("label", "b=2, c=3", Place::CommandLine, Some(2)));
    assert_eq!(origin("port"), &wanted("port", "7", Place::Line(5), None));
    assert_eq!(origin("anonymous-metrics"), &wanted("anonymous-metrics", "true", Place::Line(4), None));
    assert_eq!(origin("no-taint"), &wanted("no-taint", "true", Place::CommandLine, None));
    assert_eq!(origins.note("--site and --port are bad"), " (--port is set in /etc/site.toml, line 5)");
    assert_eq!(origins.note("--portable is bad"), "");
}

#[test]
fn what_is_said_by_another_flag_goes_before_the_file_too() {
    let text = "no-taint = true\nbootstrap-kubeconfig = \"/etc/bootstrap\"\n";
    let (run, _) = run_with(text, &[]);
    assert!(run.no_taint);
    assert_eq!(run.way_in(), Some(Path::new("/etc/bootstrap")));
    let (run, _) = run_with(text, &["--taint", "a:NoSchedule", "--kubeconfig", "/home/ada/own"]);
    assert!(!run.no_taint);
    assert_eq!(run.taints.len(), 1);
    assert_eq!(run.way_in(), Some(Path::new("/home/ada/own")));
}

#[test]
fn other_commands_take_what_they_know_and_name_the_rest() {
    let text = "site = \"jlab\"\npods-dir = \"/scratch\"\nlog = \"debug\"\n";
    let (settings, _) = settings(text, &root(), &variable);
    let config = Config { path: PathBuf::from("/etc/site.toml"), settings };
    let args = ["jiriaf-pilot", "clean", "--dry-run"];
    let matches = root().try_get_matches_from(args).unwrap();
    let (command, origins) = apply(root(), Some(&config), "clean", matches.subcommand().unwrap().1);
    assert_eq!(origins.unused, [("site".to_owned(), 1)]);
    let cli = Cli::from_arg_matches(&command.try_get_matches_from(args).unwrap()).unwrap();
    assert_eq!(cli.log.as_deref(), Some("debug"));
    let Sub::Clean(clean) = cli.command else { panic!("{:?}", cli.command) };
    assert_eq!(clean.pods_dir.as_deref(), Some(Path::new("/scratch")));
}

#[test]
fn what_the_flag_would_refuse_is_refused_with_its_line_and_what_is_wanted() {
    let long = format!("node-type = [\"{}\"]\n", "x".repeat(500));
    for (text, words) in [
        ("\n\nwalltime = \"soon\"\n", &["3: walltime = \"soon\"", "2h 30m"][..]),
        ("drain-before = 1\n", &["1: drain-before = \"1\"", "at least 5 s"]),
        ("port = 70000\n", &["port = \"70000\"", "65535"]),
        ("pods-layout = \"flat\"\n", &["pods-layout = \"flat\"", "pod, namespaced", "wanted"]),
        ("namespaces = [\"work\", \"Play\"]\n", &["namespaces = \"Play\"", "lower-case"]),
        ("labels = [\"a b=c\"]\n", &["labels = \"a b=c\"", "[prefix/]name"]),
        ("[labels]\nx = \"1\"\n\"a b\" = \"c\"\n", &["3: labels = \"a b=c\"", "[prefix/]name"]),
        ("annotations = [\"nothing\"]\n", &["annotations = \"nothing\"", "KEY=VALUE"]),
        ("log = \"pilot=loud\"\n", &["log = \"pilot=loud\"", "debug"]),
        ("images = \"/nonexistent/images.yaml\"\n", &["images = ", "No such file"]),
        ("kubeconfig = \"\"\n", &["kubeconfig = \"\"", "leave the key out"]),
        // Types.
        ("site = 7\n", &["site = 7", "text in quotes"]),
        ("walltime = 1.5\n", &["walltime = a number with a fraction", "whole number"]),
        ("port = 0x1f\n", &["port = a number that is not decimal"]),
        ("no-taint = \"yes\"\n", &["no-taint = \"yes\"", "no-taint = true is wanted"]),
        ("namespaces = \"a,b\"\n", &["namespaces = \"a,b\"", "a list"]),
        ("namespaces = [1]\n", &["namespaces = [1]", "a list"]),
        ("namespaces = { a = \"b\" }\n", &["namespaces.a = \"b\"", "a list"]),
        ("labels = { a.b = \"c\" }\n", &["labels.a.b = \"c\"", "a table"]),
        ("labels = { a = 1 }\n", &["labels.a = 1", "a table"]),
        ("site.name = \"a\"\n", &["site.name = \"a\"", "text in quotes"]),
        (&long, &["x…", "text in quotes"]),
        // Keys.
        ("walltme = \"2h\"\n", &["walltme is no setting", "`walltime`"]),
        ("label = [\"a=b\"]\n", &["label is no setting", "`labels`"]),
        ("Pods_Dir = \"/x\"\n", &["`pods-dir`"]),
        ("config = \"/etc/other.toml\"\n", &["config is no setting"]),
        ("help = true\n", &["help is no setting"]),
        ("dry-run = true\n", &["dry-run is no setting"]),
        ("\"a b\" = 1\n", &["a b is no setting", "jiriaf-pilot run"]),
        ("\"\" = 1\n", &["is no setting"]),
        ("\"-h\" = 1\n", &["-h is no setting"]),
        ("\"site=x\" = 1\n", &["site=x is no setting"]),
        // Paths.
        ("pods-dir = \"pods\"\n", &["pods-dir = \"pods\"", "from the root"]),
        ("pods-dir = \"$WORK/pods\"\n", &["pods-dir = \"$WORK/pods\"", "WORK is not set"]),
        ("pods-dir = \"~ada/pods\"\n", &["from the root"]),
    ] {
        let found = faults(text);
        let [fault] = found.as_slice() else { panic!("{text}: {found:?}") };
        assert!(words.iter().all(|word| fault.contains(word)), "{text}: {fault}");
        assert!(fault.len() < 400, "{fault}");
    }
    // All that is wrong is said at once.
    assert_eq!(faults("site = 7\nport = 70000\nfoo = 1\n").len(), 3);
}

#[test]
fn a_file_that_cannot_be_trusted_or_read_is_refused_by_its_name() {
    use std::os::unix::fs::PermissionsExt;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("site.toml");
    let said = |bytes: &[u8], mode: u32| {
        fs::write(&path, bytes).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        read(&path, &root()).map_err(|error| error.to_string())
    };
    assert_eq!(said(b"site = \"a\"\n", 0o644).unwrap().settings.len(), 1);
    for (bytes, mode, words) in [
        (&b"site = \"a\"\n"[..], 0o622, "0622"),
        (b"site = \"a\"\nwalltime = \"\xff\"\n", 0o600, "line 2 is no UTF-8"),
        (b"site = \"a\"\nwalltime = \"soon\"\n", 0o600, "site.toml: line 2: walltime"),
        (&vec![b'#'; 70_000], 0o600, "64 KiB"),
    ] {
        let error = said(bytes, mode).unwrap_err();
        assert!(error.contains(words) && error.contains("site.toml"), "{error}");
    }
    fs::remove_file(&path).unwrap();
    let error = read(&path, &root()).unwrap_err().to_string();
    assert!(error.contains("No such file") && error.starts_with("--config /"), "{error}");
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(300))]
    #[test]
    fn no_text_is_too_odd_to_be_judged(
        parts in proptest::collection::vec(
            proptest::prop_oneof![
                proptest::sample::select(vec![
                    "site", "labels", "port", "no-taint", "walltime", "pods-dir", " = ", "=", ".", "[", "]", "{", "}", ",",
                    "\n", "\r\n", "\"", "\"\"\"", "'", "#", "\\", "$HOME", "~", "true", "1", "-7", "0x1f", "1979-05-27", "[[",
                ])
                .prop_map(str::to_owned),
                ".{0,3}",
            ],
            0..40,
        )
    ) {
        let text = parts.concat();
        let lines = text.lines().count() + 1;
        let (_, faults) = settings(&text, &root(), &variable);
        proptest::prop_assert!(faults.iter().all(|(line, _)| (1..=lines).contains(line)), "{faults:?}");
    }
}

/// The example with the `#` before each setting taken away.
fn example() -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/examples/site.toml");
    let text = fs::read_to_string(path).unwrap();
    // A comment has a blank behind its sign, a setting has none.
    let line = |line: &str| {
        let setting = line.strip_prefix('#').filter(|rest| !rest.is_empty() && !rest.starts_with([' ', '#']));
        format!("{}\n", setting.unwrap_or(line))
    };
    text.lines().map(line).collect()
}

#[test]
fn the_example_names_every_setting_with_its_default_and_nothing_else() {
    let root = root();
    // The files that it names are not there.
    let text =
        example().replace("images = \"/etc/jiriaf/images.yaml\"", "images = \"docs/examples/images.yaml\"");
    let images = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/examples/images.yaml");
    let text = text.replace("\"docs/examples/images.yaml\"", &format!("{images:?}"));
    let everything = |name: &str| variable(name).or_else(|| Some(format!("/{name}")));
    let (settings, faults) = settings(&text, &root, &everything);
    assert!(faults.is_empty(), "{faults:?}");
    let entries = document::read(&text).unwrap();
    let keys: BTreeSet<String> = entries.iter().map(|entry| entry.path[0].clone()).collect();
    let wanted: BTreeSet<String> = arguments(&root).map(key_of).collect();
    assert_eq!(keys, wanted, "docs/examples/site.toml against the flags of run");
    // A default that the flag has is the one that stands there.
    for arg in arguments(&root) {
        let defaults: Vec<_> =
            arg.get_default_values().iter().map(|value| value.to_string_lossy().into_owned()).collect();
        if defaults.is_empty() || matches!(arg.get_action(), ArgAction::SetTrue) {
            continue;
        }
        let there = settings.iter().find(|setting| setting.id == arg.get_id().as_str()).unwrap();
        assert_eq!(there.values, defaults, "{}", there.key);
    }
}

#[test]
fn a_key_is_a_flags_name() {
    for arg in arguments(&root()) {
        let (key, long) = (key_of(arg), arg.get_long().unwrap().to_owned());
        let plural = matches!(arg.get_action(), ArgAction::Append) && key == format!("{long}s");
        assert!(key == long || plural, "{key} {long}");
    }
}

#[test]
fn the_reference_names_every_flag_and_variable() {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/reference.md");
    let page = fs::read_to_string(page).unwrap();
    let root = Cli::command();
    let all = root.get_subcommands().flat_map(Command::get_arguments).chain(root.get_arguments());
    for arg in all {
        if let Some(long) = arg.get_long() {
            let short = arg.get_short().map(|short| format!("[-{short} "));
            let named = short.is_some_and(|short| page.contains(&short));
            assert!(named || page.contains(&format!("--{long}")), "--{long}");
        }
        if let Some(name) = arg.get_env().and_then(|name| name.to_str()) {
            assert!(page.contains(name), "{name}");
        }
    }
}
