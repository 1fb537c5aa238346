//! `--config` and `completions` from outside, where there is no cluster.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};

fn pilot(root: &Path, arguments: &[&str], environment: &[(&str, &str)]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_jiriaf-pilot"))
        .args(arguments)
        .env_clear()
        .env("PATH", "/usr/bin:/bin")
        .env("HOME", root)
        .env("JIRIAF_STATE_DIR", root.join("state"))
        .envs(environment.iter().copied())
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

fn words(output: &Output) -> String {
    [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text).into_owned()).concat()
}

/// A file of this text in a directory of its own.
fn file(root: &Path, text: &str) -> String {
    let path = root.join("site.toml");
    fs::write(&path, text).unwrap();
    fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
    path.to_str().unwrap().to_owned()
}

#[test]
fn check_says_which_setting_comes_from_where() {
    let root = tempfile::tempdir().unwrap();
    let text = "site = \"file\"\nnode-type = \"fast\"\nport = 0\nstate-dir = \"~/other\"\nanonymous-metrics = true\n";
    let file = file(root.path(), text);
    let environment = [("JIRIAF_CONFIG", file.as_str()), ("JIRIAF_NODETYPE", "slow"), ("JIRIAF_SITE", "")];
    let output = pilot(root.path(), &["check", "--port", "1"], &environment);
    let said = words(&output);
    for line in [
        // A variable that is set and empty says nothing.
        format!("site = file ({file}, line 1)"),
        format!("node-type = slow (JIRIAF_NODETYPE, over {file}, line 2)"),
        format!("port = 1 (the command line, over {file}, line 3)"),
        format!("anonymous-metrics = true ({file}, line 5)"),
    ] {
        assert!(said.contains(&line), "{line}\n{said}");
    }
    assert_eq!(output.status.code(), Some(1), "there is no cluster: {said}");
}

#[test]
fn a_bad_file_is_exit_2_with_file_line_key_and_value_before_anything_is_done() {
    let root = tempfile::tempdir().unwrap();
    let bad = file(root.path(), "site = \"a\"\n\nwalltime = \"soon\"\nlabel = [\"a=b\"]\n");
    for command in ["run", "check", "clean", "allocation"] {
        let output = pilot(root.path(), &[command, "--config", &bad], &[]);
        let said = words(&output);
        assert_eq!(output.status.code(), Some(2), "{command}: {said}");
        assert!(said.contains("site.toml: line 3: walltime = \"soon\""), "{command}: {said}");
        assert!(said.contains("site.toml: line 4: label is no setting: is `labels` meant?"), "{said}");
    }
    assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1, "nothing is made");
    // Settings that do not go together are named with the file too.
    let both = file(root.path(), "cordon-before = 20\n");
    let output = pilot(root.path(), &["run", "--config", &both, "--drain-before", "1m"], &[]);
    let said = words(&output);
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(said.contains(&format!("(--cordon-before is set in {both}, line 1)")), "{said}");
    assert_eq!(pilot(root.path(), &["run", "--config", "/nonexistent"], &[]).status.code(), Some(2));
}

#[test]
fn a_file_that_others_may_write_is_refused() {
    let root = tempfile::tempdir().unwrap();
    let file = file(root.path(), "site = \"a\"\n");
    for (path, mode) in [(Path::new(&file), 0o664), (root.path(), 0o777)] {
        let before = fs::metadata(path).unwrap().permissions();
        fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
        let output = pilot(root.path(), &["check", "--config", &file], &[]);
        let said = words(&output);
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert!(said.contains(&format!("{mode:04o}")) && said.contains("chmod go-w"), "{said}");
        fs::set_permissions(path, before).unwrap();
    }
}

#[test]
fn other_commands_take_their_settings_from_it_and_name_those_that_they_do_not() {
    let root = tempfile::tempdir().unwrap();
    let file = file(root.path(), "site = \"a\"\npods-dir = \"~/elsewhere\"\nwalltime = \"2h\"\n");
    let manifest = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/examples/first-pod.yaml");
    let output = pilot(root.path(), &["play", "--config", &file, manifest], &[]);
    let said = words(&output);
    assert!(output.status.success(), "{said}");
    assert!(
        said.contains("`play` makes no use of these settings") && said.contains("site (line 1)"),
        "{said}"
    );
    assert!(!said.contains("walltime (line"), "{said}");
    assert!(root.path().join("elsewhere/.jiriaf-pilot").is_dir(), "{said}");
    let output = pilot(root.path(), &["allocation", "--config", &file], &[]);
    assert!(String::from_utf8_lossy(&output.stdout).contains("walltime"), "{}", words(&output));
    let output = pilot(root.path(), &["clean", "--dry-run", "--config", &file], &[]);
    assert!(words(&output).contains("walltime (line 3)"), "{}", words(&output));
}

#[test]
fn completions_are_scripts_that_know_the_flags() {
    let root = tempfile::tempdir().unwrap();
    // A file that is no good keeps nobody from his completions.
    let environment = [("JIRIAF_CONFIG", "/nonexistent")];
    for (shell, flag) in [("bash", "--signal-lead"), ("zsh", "--signal-lead"), ("fish", "signal-lead")] {
        let output = pilot(root.path(), &["completions", shell], &environment);
        let script = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success(), "{shell}");
        assert!(script.contains(flag) && script.contains("completions"), "{shell}: {script}");
    }
    let script = pilot(root.path(), &["completions", "bash"], &[]).stdout;
    let path = root.path().join("completions.bash");
    fs::write(&path, script).unwrap();
    assert!(Command::new("bash").arg("-n").arg(&path).status().unwrap().success());
    // It completes, as bash would ask it.
    let ask = r#"source "$1"; COMP_WORDS=(jiriaf-pilot run --signal-l); COMP_CWORD=2
        found=$(complete -p jiriaf-pilot) && found=${found#*-F } && "${found%% *}" jiriaf-pilot --signal-l run
        echo "${COMPREPLY[*]}""#;
    let output = Command::new("bash").args(["-c", ask, "bash"]).arg(&path).output().unwrap();
    assert_eq!(words(&output).trim(), "--signal-lead");
    assert_eq!(pilot(root.path(), &["completions", "tcsh"], &[]).status.code(), Some(2));
}
