//! A second API server of the same cluster, with other flags.

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use super::{bed, read, run, seconds, wait_until};

/// A kube-apiserver on the test cluster's etcd and keys: what it serves are the same Nodes and pods. Ended at drop.
pub struct ApiServer {
    child: Child,
    directory: tempfile::TempDir,
}

impl ApiServer {
    /// Starts one with the flags of the cluster's own and these, and waits until it is ready.
    pub fn start(flags: &[&str]) -> Self {
        let cluster = bed().admin_kubeconfig().parent().unwrap().to_owned();
        let pid = read(&cluster.join("pid/kube-apiserver"));
        let pid = pid.split(' ').next().unwrap();
        let command_line = read(&PathBuf::from(format!("/proc/{pid}/cmdline")));
        let own = command_line.split_terminator('\0');
        let own = own.filter(|word| !word.starts_with("--secure-port="));
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();

        let directory = tempfile::tempdir().unwrap();
        let log = std::fs::File::create(directory.path().join("log")).unwrap();
        // It goes with this test's thread, even when that is killed.
        let child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "--"])
            .args(own)
            .arg(format!("--secure-port={port}"))
            .args(flags)
            .current_dir(cluster.join("pki"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        let mut server = Self { child, directory };
        let mut config: serde_json::Value = serde_json::from_str(&read(&bed().admin_kubeconfig())).unwrap();
        config["clusters"][0]["cluster"]["server"] = format!("https://127.0.0.1:{port}").into();
        std::fs::write(server.kubeconfig(), config.to_string()).unwrap();
        wait_until("the second API server is ready", seconds(120), || {
            let ended = server.child.try_wait().unwrap();
            assert!(ended.is_none(), "{ended:?}: {}", read(&server.directory.path().join("log")));
            let mut kubectl = bed().kubectl_within("default", 10);
            run(kubectl.arg("--kubeconfig").arg(server.kubeconfig()).args(["get", "--raw", "/readyz"]))
                .success
        });
        server
    }

    /// cluster-admin's kubeconfig for it.
    pub fn kubeconfig(&self) -> PathBuf {
        self.directory.path().join("kubeconfig")
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = read(&self.directory.path().join("log"));
            let lines: Vec<&str> = log.lines().collect();
            eprintln!(
                "--- the second API server ---\n{}",
                lines[lines.len().saturating_sub(20)..].join("\n")
            );
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
