//! `jiriaf-pilot check` from outside, where there is no cluster: it says so and leaves nothing behind.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs::{self, Permissions};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

struct Said {
    code: Option<i32>,
    text: String,
}

impl Said {
    /// The line about `thing` that holds `words`.
    #[track_caller]
    fn line(&self, verdict: &str, thing: &str, words: &str) {
        let found = self.text.lines().any(|line| {
            let rest = line.strip_prefix(verdict).map(str::trim_start);
            rest.is_some_and(|rest| rest.starts_with(thing) && rest.contains(words))
        });
        assert!(found, "no line `{verdict} {thing} … {words}` in\n{}", self.text);
    }
}

fn check(root: &Path, more: &[&str]) -> Said {
    let output = Command::new(env!("CARGO_BIN_EXE_jiriaf-pilot"))
        .arg("check")
        .args(more)
        .env_clear()
        .env("PATH", "/usr/bin:/bin")
        .env("HOME", root.join("home"))
        .env("JIRIAF_STATE_DIR", root.join("state"))
        .output()
        .unwrap();
    let text = [output.stdout, output.stderr].map(|text| String::from_utf8(text).unwrap()).concat();
    Said { code: output.status.code(), text }
}

fn kubeconfig(root: &Path, server: &str) {
    let config = serde_json::json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "c",
        "clusters": [{"name": "c", "cluster": {"server": server}}],
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        "users": [{"name": "u", "user": {"token": "very-secret"}}],
    });
    fs::create_dir_all(root.join("home/.kube")).unwrap();
    let path = root.join("home/.kube/config");
    fs::write(&path, config.to_string()).unwrap();
    fs::set_permissions(path, Permissions::from_mode(0o644)).unwrap();
}

/// A port of this host on which nobody listens.
fn closed_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

#[test]
fn an_api_server_that_is_down_is_named_with_all_else_that_is_wrong() {
    let root = tempfile::tempdir().unwrap();
    let server = format!("https://127.0.0.1:{}", closed_port());
    kubeconfig(root.path(), &server);
    let taken = TcpListener::bind("0.0.0.0:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let said = check(root.path(), &["--walltime", "10", "--port", &port]);
    assert_eq!(said.code, Some(1), "{}", said.text);
    said.line("FAIL", "API server", "Connection refused");
    said.line("FAIL", "walltime", "10s left");
    said.line("FAIL", "port", &port);
    said.line("warn", "kubeconfig", "chmod 600");
    said.line("ok", "kubeconfig", &server);
    said.line("ok", "pods directory", "writable");
    assert!(!said.text.contains("very-secret"), "{}", said.text);
}

#[test]
fn nothing_is_left_behind() {
    let root = tempfile::tempdir().unwrap();
    fs::create_dir(root.path().join("home")).unwrap();
    let said = check(root.path(), &[]);
    assert_eq!(said.code, Some(1), "{}", said.text);
    said.line("FAIL", "kubeconfig", "--kubeconfig");
    assert_eq!(fs::read_dir(root.path().join("home")).unwrap().count(), 0);
    assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1);
}

#[test]
fn a_bad_setting_is_a_failure_with_its_flag() {
    let root = tempfile::tempdir().unwrap();
    fs::create_dir(root.path().join("home")).unwrap();
    check(root.path(), &["--node-name", "Bad_Name"]).line("FAIL", "settings", "--node-name");
    let short = check(root.path(), &["--walltime", "300", "--drain-before", "300"]);
    short.line("FAIL", "walltime", "--drain-before=300s");
    assert_eq!(check(root.path(), &["--walltime", "soon"]).code, Some(2), "as for run");
}

#[test]
fn certificate_files_are_read_and_a_pair_that_does_not_fit_is_a_failure() {
    let root = tempfile::tempdir().unwrap();
    fs::create_dir(root.path().join("home")).unwrap();
    let file = |name: &str, text: &str| {
        let path = root.path().join(name);
        fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let made = |name: &str| rcgen::generate_simple_self_signed([name.to_owned()]).unwrap();
    let (one, other) = (made("n1"), made("n2"));
    let certificate = file("tls.crt", &one.cert.pem());
    let key = file("tls.key", &one.signing_key.serialize_pem());
    let strange = file("strange.key", &other.signing_key.serialize_pem());
    let nothing = file("nothing.crt", "no PEM in here\n");
    let pair = |certificate: &str, key: &str| {
        check(root.path(), &["--tls-cert-file", certificate, "--tls-private-key-file", key])
    };

    pair(&certificate, &key).line("ok", "settings", "jiriaf-pilot");
    pair(&certificate, &strange).line("FAIL", "settings", "strange.key");
    pair(&certificate, &strange).line("FAIL", "settings", "--tls-private-key-file");
    pair(&nothing, &key).line("FAIL", "settings", "no certificate in it");
    pair("/nonexistent/tls.crt", &key).line("FAIL", "settings", "/nonexistent/tls.crt: No such file");
    check(root.path(), &["--tls-cert-file", &certificate]).line("FAIL", "settings", "together");

    check(root.path(), &["--client-ca-file", &certificate]).line("ok", "settings", "jiriaf-pilot");
    check(root.path(), &["--client-ca-file", &nothing]).line("FAIL", "settings", "--client-ca-file");
    check(root.path(), &["--client-ca-file", &key]).line("FAIL", "settings", "holds no certificate");
}

#[test]
fn a_pilot_with_certificate_files_that_are_no_good_does_not_start() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("ca.crt");
    fs::write(&path, "no PEM in here\n").unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_jiriaf-pilot"))
        .args(["run", "--client-ca-file", path.to_str().unwrap()])
        .env_clear()
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{text}");
    assert!(text.starts_with("error: invalid value") && text.contains("--client-ca-file"), "{text}");
}
