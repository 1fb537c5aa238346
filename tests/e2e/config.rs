//! `--config`: a site's file, and what becomes of a pilot whose file changes under it.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::harness::{Namespace, Options, Pilot, seconds, unique, wait_for, wait_until};

#[test]
fn a_pilot_has_the_files_settings_and_keeps_them_through_crashes_whatever_becomes_of_the_file() {
    let namespace = Namespace::new("config");
    let directory = tempfile::tempdir().unwrap();
    // Alice reads it, and root keeps it.
    fs::set_permissions(directory.path(), Permissions::from_mode(0o755)).unwrap();
    let file = directory.path().join("site.toml");
    let name = unique("config-node");
    let settings = |name: &str, from: &str| {
        let text = format!(
            "node-name = \"{name}\"\nsite = \"file\"\nlabels = {{ \"test/from\" = \"{from}\" }}\nlog = \"debug\"\n\
             pods-dir = \"~/pods\"\nannotations = [\"test/words=one, two\"]\n"
        );
        fs::write(&file, text).unwrap();
    };
    settings(&name, "file");
    let options = Options::new("config").arg("--config").arg(file.to_str().unwrap());
    let pilot = Pilot::local(options, 600);
    let node = pilot.nodes()[0].clone();
    assert_eq!(node["metadata"]["name"], *name);
    assert_eq!(node["metadata"]["labels"]["test/from"], "file");
    assert_eq!(node["metadata"]["annotations"]["test/words"], "one, two");
    // The variable goes before the file.
    assert_eq!(node["metadata"]["labels"]["jiriaf.site"], *pilot.site);

    let go = pilot.home.join("go");
    let script = format!("until [ -e {} ]; do sleep 0.05; done\n", go.display());
    namespace.script_on(&pilot, "p", &script);
    namespace.wait_phase("p", "Running", seconds(30));
    assert!(pilot.home.join("pods/p").is_dir(), "the pod is in the file's pods directory");
    // Another name, no settings at all, no file: it was read once.
    let changes: [&dyn Fn(); 3] = [
        &|| settings("another-node", "changed"),
        &|| fs::write(&file, "walltime = \"soon\n").unwrap(),
        &|| fs::remove_file(&file).unwrap(),
    ];
    for change in changes {
        change();
        let [first] = pilot.stages("pilot")[..] else { panic!("one pilot was expected") };
        kill(Pid::from_raw(first), Signal::SIGKILL).unwrap();
        wait_for("another pilot", seconds(30), || {
            pilot.stages("pilot").first().copied().filter(|second| *second != first)
        });

        // Nobody else renews the Lease.
        let renewed = || pilot.lease().map(|lease| lease["spec"]["renewTime"].clone());
        let before = renewed();
        wait_until("it has its Node", seconds(30), || renewed().is_some_and(|now| Some(now) != before));
    }
    fs::write(&go, "").unwrap();
    let pod = namespace.wait_phase("p", "Succeeded", seconds(30));
    assert_eq!(pod["status"]["containerStatuses"][0]["restartCount"], 0, "{:#}", pod["status"]);
    let nodes = pilot.nodes();
    assert_eq!(nodes.len(), 1, "{nodes:#?}");
    assert_eq!(nodes[0]["metadata"]["name"], *name);
    assert_eq!(nodes[0]["metadata"]["labels"]["test/from"], "file");
}

#[test]
fn a_bad_file_ends_the_start_with_its_line_and_registers_nothing() {
    let directory = tempfile::tempdir().unwrap();
    fs::set_permissions(directory.path(), Permissions::from_mode(0o755)).unwrap();
    let file = directory.path().join("site.toml");
    fs::write(&file, "# a site\nwalltime = \"soon\"\nlable = 1\n").unwrap();
    let options = Options::new("config-bad").arg("--config").arg(file.to_str().unwrap());
    let mut pilot = Pilot::start_run(&options, &[]);
    assert_eq!(pilot.wait_exit(seconds(20)), Some(2));
    let output = pilot.output();
    for words in ["site.toml: line 2: walltime = \"soon\"", "site.toml: line 3: lable is no setting"] {
        assert!(output.contains(words), "{output}");
    }
    assert!(pilot.nodes().is_empty());
}
