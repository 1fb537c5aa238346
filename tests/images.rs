//! `--images`, the real binary upon a table and a stand-in for Apptainer, which is first in PATH and tells what it is given.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

const TABLE: &str = "
images:
- name: busybox
  args: [sh]
- name: quay.io/site/*
  run: apptainer
  image: /images/{name}-{tag}.sif
  options: [--nv]
- {name: empty}
";

/// Prints its arguments, each on a line, the variables that it hands on, and what is in the directories it binds.
const APPTAINER: &str = r#"#!/bin/sh
for argument in "$@"; do echo "argument: $argument"; done
env | grep '^APPTAINERENV_[A-Z_]*WORD='
for argument in "$@"; do case $argument in /*:/etc/own*) cat "${argument%%:*}/f" ;; /*:/data) touch "${argument%%:*}/made" && ls "${argument%%:*}" ;; esac; done
exit 7
"#;

struct Site(tempfile::TempDir);

impl Site {
    fn new() -> Self {
        let site = Self(tempfile::tempdir().unwrap());
        let apptainer = site.write("bin/apptainer", APPTAINER);
        fs::set_permissions(apptainer, fs::Permissions::from_mode(0o755)).unwrap();
        site.write("images.yaml", TABLE);
        site
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, text).unwrap();
        path
    }

    fn pilot(&self, args: &[&str]) -> Output {
        let path = format!("{}:{}", self.path().join("bin").display(), std::env::var("PATH").unwrap());
        let mut command = Command::new(env!("CARGO_BIN_EXE_jiriaf-pilot"));
        command.args(args).env_clear().stdin(Stdio::null()).env("PATH", path);
        command.env("HOME", self.path()).env("TMPDIR", self.path()).current_dir(self.path());
        command.output().unwrap()
    }

    /// Plays one container; its exit code, its output and what the pilot said.
    fn play(&self, table: &[&str], container: &str, more: &str) -> (i32, String, String) {
        let manifest = format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: p1}}\nspec:\n  restartPolicy: Never\n  containers:\n  - {container}\n{more}"
        );
        self.write("pod.yaml", &manifest);
        let args = [&["play"], table, &["pod.yaml"]].concat();
        let output = self.pilot(&args);
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
    }
}

const WITH: &[&str] = &["--images", "images.yaml"];

#[test]
fn a_program_of_the_host_takes_an_images_place() {
    let site = Site::new();
    let container = r#"{name: c1, image: "docker.io/library/busybox:1.36", env: [{name: WORD, value: "a b"}],
      command: [sh, -c, 'WORD=mine; echo "$WORD, $(WORD), $1"'], args: [x, "$(WORD)"]}"#;
    let (code, out, err) = site.play(WITH, container, "");
    assert!(code == 0 && out.contains("mine, a b, a b"), "{code} {out} {err}");
    let (code, out, err) = site.play(WITH, "{name: c1, image: busybox, args: [echo, 'no entrypoint']}", "");
    assert!(code == 0 && out.contains("no entrypoint"), "{code} {out} {err}");
}

#[test]
fn a_script_of_the_same_name_comes_first() {
    let site = Site::new();
    let container = "{name: c1, image: busybox, volumeMounts: [{name: busybox, mountPath: /s}]}";
    let more = "  volumes: [{name: busybox, configMap: {name: m}}]
---
{apiVersion: v1, kind: ConfigMap, metadata: {name: m}, data: {run.sh: \"#!/bin/sh\\necho a script\\n\"}}
";
    let (code, out, err) = site.play(WITH, container, more);
    assert!(code == 0 && out.contains("a script"), "{code} {out} {err}");
}

#[test]
fn apptainer_gets_the_volumes_and_the_environment_and_no_secret_as_an_argument() {
    let site = Site::new();
    let container = r#"{name: c1, image: "quay.io/site/app:v1", command: [run, "$(WORD)"], args: [z], workingDir: /w,
      env: [{name: WORD, value: plain}, {name: SECRET_WORD, valueFrom: {secretKeyRef: {name: s, key: k}}}],
      volumeMounts: [{name: own, mountPath: /etc/own, readOnly: true}, {name: data, mountPath: /data}]}"#;
    let more = "  volumes: [{name: own, configMap: {name: m}}, {name: data, emptyDir: {}}]
---
{apiVersion: v1, kind: ConfigMap, metadata: {name: m}, data: {f: \"a file\\n\"}}
---
{apiVersion: v1, kind: Secret, metadata: {name: s}, stringData: {k: hush}}
";
    let (code, out, err) = site.play(WITH, container, more);
    assert_eq!(code, 7, "{out} {err}");
    let given: Vec<&str> =
        out.lines().filter_map(|line| line.split_once("argument: ").map(|(_, it)| it)).collect();
    let [exec, nv, b1, data, b2, own, tail @ ..] = given.as_slice() else { panic!("{out}") };
    assert_eq!([exec, nv, b1, b2], [&"exec", &"--nv", &"--bind", &"--bind"]);
    assert!(own.ends_with(":/etc/own:ro") && data.ends_with(":/data"), "{own} {data}");
    assert_eq!(tail, ["--pwd", "/w", "/images/app-v1.sif", "run", "plain", "z"]);
    for line in ["APPTAINERENV_WORD=plain", "APPTAINERENV_SECRET_WORD=hush", "a file", "made"] {
        assert!(out.lines().any(|said| said.ends_with(line)), "{line}: {out}");
    }
}

#[test]
fn what_is_in_no_table_says_how_to_add_it() {
    let site = Site::new();
    for (table, words) in [
        (WITH, &["ErrImageNeverPull", "images.yaml", "- {name: quay.io/else/x, run: host}"][..]),
        (&[], &["ErrImageNeverPull", "--images FILE", "name: quay.io/else/x"]),
    ] {
        let (code, out, err) = site.play(table, "{name: c1, image: 'quay.io/else/x:2'}", "");
        let said = format!("{out}{err}");
        assert_ne!(code, 0, "{said}");
        assert!(words.iter().all(|word| said.contains(word)), "{said}");
    }
    let (code, out, err) = site.play(WITH, "{name: c1, image: empty}", "");
    assert!(code != 0 && format!("{out}{err}").contains("no command specified"), "{code} {out} {err}");
}

#[test]
fn a_bad_table_is_named_with_its_line_before_anything_is_done() {
    let site = Site::new();
    site.write("images.yaml", "images:\n- name: a\n  colour: red\n");
    site.write("pod.yaml", "");
    for args in [
        &["play", "--images", "images.yaml", "pod.yaml"][..],
        &["run", "--images", "images.yaml"],
        &["check", "--images", "images.yaml"],
    ] {
        let output = site.pilot(args);
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert!(["--images", "colour", "line 3"].iter().all(|word| said.contains(word)), "{said}");
    }
}

#[test]
fn check_misses_apptainer_where_the_table_wants_it() {
    let site = Site::new();
    let said =
        |site: &Site| String::from_utf8(site.pilot(&["check", "--images", "images.yaml"]).stdout).unwrap();
    let there = site.path().join("bin/apptainer");
    assert!(said(&site).contains(there.to_str().unwrap()), "{}", said(&site));
    fs::remove_file(there).unwrap();
    assert!(said(&site).contains("apptainer is not in PATH"), "{}", said(&site));
}
