//! `--isolation`: containers in namespaces of their own, on the real control plane.

use std::path::Path;
use std::process::Stdio;

use serde_json::{Value, json};

use crate::harness::{
    ALICE, Kubectl, Namespace, Options, PbsJob, Pilot, Way, as_user, container, pod_spec, read, run, seconds,
    wait_until,
};

fn isolated(label: &'static str) -> Pilot {
    Pilot::local(Options::new(label).arg("--isolation=namespaces"), 600)
}

fn exec(namespace: &Namespace, container: &str, script: &str) -> (i32, String) {
    let mut command = Way::default().kubectl(&namespace.name);
    command.args(["exec", "p", "-c", container, "--", "sh", "-c", script]).stdin(Stdio::null());
    let ended = Kubectl::run(&mut command, seconds(60));
    (ended.code, ended.text())
}

fn mount(container: &mut Value, name: &str, path: &str) {
    container["volumeMounts"].as_array_mut().unwrap().push(json!({"name": name, "mountPath": path}));
}

/// Whether a command line of this user's runs on this host.
fn runs(command_line: &str) -> bool {
    run(as_user(ALICE, "pgrep").args(["-U", ALICE, "-x", "-f", command_line])).success
}

#[test]
fn a_pods_volumes_are_at_their_absolute_paths_and_kubectl_exec_sees_them_too() {
    let namespace = Namespace::new("iso");
    let pilot = isolated("iso");
    let one = "set -e\ncat /etc/jiriaf-x/key /etc/jiriaf-s/word\ntest -s /var/run/secrets/kubernetes.io/serviceaccount/token\n\
               test -s /run/secrets/kubernetes.io/serviceaccount/ca.crt\necho from one >/jiriaf-data/word\n\
               echo -n why >/dev/termination-log\necho $$ >own-pid\n\
               trap 'echo ended >>/jiriaf-data/word; exit 9' TERM\nwhile :; do sleep 0.1; done\n";
    let two = "until grep -qs from /jiriaf-data/word; do sleep 0.05; done\ncat /tmp/word; ls -A /tmp\nexec sleep 3600\n";
    namespace.config_map("p", &[("run.sh", one)]);
    namespace.config_map("two", &[("run.sh", two)]);
    namespace.config_map("x", &[("key", "value\n")]);
    namespace.of("secrets").create(&json!({"metadata": {"name": "s"}, "stringData": {"word": "secret\n"}}));
    let (mut first, mut second) = (container("one", "p"), container("two", "two"));
    mount(&mut first, "x", "/etc/jiriaf-x");
    let mut spec = pod_spec("Never", &[first.clone(), second.clone()]);
    for (name, path) in [("s", "/etc/jiriaf-s"), ("data", "/jiriaf-data")] {
        mount(&mut first, name, path);
    }
    for path in ["/tmp", "/jiriaf-data"] {
        mount(&mut second, "data", path);
    }
    spec["containers"] = json!([first, second]);
    let volumes = spec["volumes"].as_array_mut().unwrap();
    volumes.push(json!({"name": "s", "secret": {"secretName": "s"}}));
    volumes.push(json!({"name": "data", "emptyDir": {}}));
    spec["automountServiceAccountToken"] = json!(true);
    spec["terminationGracePeriodSeconds"] = json!(20);
    namespace.pod_on(&pilot, "p", spec);
    namespace.wait_phase("p", "Running", seconds(30));
    let directory = pilot.pod_directory("p");
    let log = |name: &str| {
        std::fs::read_to_string(directory.join(format!("containers/{name}/logs/0.log"))).unwrap_or_default()
    };
    wait_until("both containers share the emptyDir", seconds(20), || log("two").contains("from one"));
    assert!(log("one").contains("stdout F value") && log("one").contains("secret"), "{}", log("one"));
    wait_until("it has its own process ids", seconds(20), || {
        std::fs::read_to_string(directory.join("containers/one/own-pid")).is_ok_and(|pid| pid == "2\n")
    });
    // From outside all is where it always was.
    assert_eq!(read(&directory.join("containers/one/termination-log")), "why");
    assert_eq!(read(&directory.join("containers/one/etc/jiriaf-x/key")), "value\n");
    assert_eq!(read(&directory.join("containers/two/jiriaf-data/word")), "from one\n");
    let group: i32 = read(&directory.join("containers/one/pgid")).trim().parse().unwrap();
    assert!(Path::new(&format!("/proc/{group}")).exists());
    assert!(!Path::new("/etc/jiriaf-x").exists() && !Path::new("/jiriaf-data").exists());

    let (code, text) =
        exec(&namespace, "one", "cat /etc/jiriaf-x/key; ps -e -o comm= | grep -c bash; exit 7");
    assert_eq!((code, text.contains("value\n1\n")), (7, true), "{text}");
    assert_eq!(exec(&namespace, "two", "cat /etc/jiriaf-x/key").0, 1, "another container's mount");
    // The log, too.
    let mut command = Way::default().kubectl(&namespace.name);
    let said = Kubectl::run(command.args(["logs", "p", "-c", "two"]), seconds(60));
    assert_eq!(said.text(), "from one\nword\n", "/tmp is the volume, and nothing of the host's");

    namespace.of("pods").delete("p", Some(20));
    namespace.wait_gone("p", seconds(30));
    wait_until("its directory goes too", seconds(10), || !directory.exists());
    let kept = pilot.home.join(".jiriaf-pilot");
    let list = || run(std::process::Command::new("find").arg(&kept)).stdout;
    wait_until("nothing but the logs is left", seconds(10), || {
        let listing = list();
        !listing.contains("/store") && !listing.contains("/.trash")
    });
    let listing = list();
    assert!(listing.contains(".one.0.log"), "{listing}");
    assert_eq!(pilot.kept_outcome("p")["name"], "p");
}

#[test]
fn a_pod_has_its_own_hostname_hosts_and_names_as_on_a_kubelet() {
    let namespace = Namespace::new("isonet");
    let pilot = isolated("isonet");
    let host = read(Path::new("/proc/sys/kernel/hostname"));
    let hosts = read(Path::new("/etc/hosts"));
    let script =
        "uname -n; echo $HOSTNAME; cat /etc/hosts; echo ---; cat /etc/resolv.conf\nexec sleep 3600\n";
    let aliases = json!([{"ip": "123.45.67.89", "hostnames": ["foo", "bar"]}]);
    let create = |name: &str, says: Value, own_hosts: bool| {
        let mut container = container("c1", "run");
        if own_hosts {
            container["volumeMounts"]
                .as_array_mut()
                .unwrap()
                .push(json!({"name": "own", "mountPath": "/etc/hosts", "subPath": "hosts"}));
        }
        let mut spec = pod_spec("Never", &[container]);
        // As Kubernetes' own test of /etc/hosts compares them (test/e2e/common/node/kubelet_etc_hosts.go).
        let original = json!({"name": "original", "mountPath": "/etc/hosts-original"});
        spec["containers"][0]["volumeMounts"].as_array_mut().unwrap().push(original);
        let host_path = json!({"path": "/etc/hosts", "type": "FileOrCreate"});
        spec["volumes"].as_array_mut().unwrap().push(json!({"name": "original", "hostPath": host_path}));
        spec.as_object_mut().unwrap().extend(says.as_object().unwrap().clone());
        namespace.pod_on(&pilot, name, spec);
    };
    let log = |name: &str| {
        let path = pilot.pod_directory(name).join("containers/c1/logs/0.log");
        wait_until("it has said all", seconds(30), || {
            std::fs::read_to_string(&path)
                .is_ok_and(|text| text.contains("F nameserver") || text.ends_with("---\n"))
        });
        let text = read(&path);
        text.lines()
            .map(|line| line.splitn(4, ' ').nth(3).unwrap_or_default().to_owned() + "\n")
            .collect::<String>()
    };
    namespace.config_map("run", &[("run.sh", script)]);
    namespace.config_map("own", &[("hosts", "10.9.8.7 mine\n")]);
    // As a StatefulSet's pod, with names of its own.
    create(
        "p",
        json!({"hostname": "h-0", "subdomain": "s", "hostAliases": aliases, "dnsPolicy": "None",
            "dnsConfig": {"nameservers": ["10.0.0.53"], "searches": ["x.org"], "options": [{"name": "ndots", "value": "2"}]}}),
        false,
    );
    let pod = namespace.wait_phase("p", "Running", seconds(30));
    let ip = pod["status"]["podIP"].as_str().unwrap();
    let text = log("p");
    assert!(text.starts_with("h-0\nh-0\n# Kubernetes-managed hosts file.\n127.0.0.1\tlocalhost\n"), "{text}");
    for wanted in [
        &format!("\n{ip}\th-0.s.{}.svc.cluster.local\th-0\n", namespace.name),
        "\n# Entries added by HostAliases.\n123.45.67.89\tfoo\tbar\n",
        &format!("\n# Entries of the host.\n{}", hosts.trim_end()),
        "\n---\nsearch x.org\nnameserver 10.0.0.53\n",
    ] {
        assert!(text.contains(wanted), "{wanted:?} in {text}");
    }
    let asked =
        "uname -n; getent hosts foo | tr -s ' '; tail -n 1 /etc/resolv.conf; echo 9.9.9.9 more >>/etc/hosts";
    assert_eq!(exec(&namespace, "c1", asked), (0, "h-0\n123.45.67.89 foo bar\noptions ndots:2\n".to_owned()));
    assert_eq!(exec(&namespace, "c1", "cat /etc/hosts-original"), (0, hosts.clone()));
    assert!(read(&pilot.pod_directory("p").join("containers/c1/etc-hosts")).ends_with("9.9.9.9 more\n"));
    assert_eq!(read(Path::new("/etc/hosts")), hosts);
    // The host's name stays with the host's network, and what a container mounts itself stays.
    create("network", json!({"hostNetwork": true, "hostname": "h", "hostAliases": aliases}), false);
    create("own", json!({"dnsConfig": {"searches": ["x.org"]}}), true);
    for name in ["network", "own"] {
        namespace.wait_phase(name, "Running", seconds(30));
    }
    let text = log("network");
    let head = format!("{host}{host}# Kubernetes-managed hosts file (host network).\n{}", hosts.trim_end());
    assert!(text.starts_with(&head) && text.contains("123.45.67.89\tfoo\tbar\n---"), "{text}");
    let text = log("own");
    assert!(
        text.starts_with("own\nown\n10.9.8.7 mine\n---\n") && text.contains("x.org\nnameserver "),
        "{text}"
    );
    // Names that are too long for a kernel wait as on a kubelet, and are told.
    create("long", json!({"hostname": "h".repeat(50), "subdomain": "s", "setHostnameAsFQDN": true}), false);
    wait_until("an event says so", seconds(20), || {
        let events = namespace.events("long");
        events.iter().any(|(reason, text)| reason == "FailedCreatePodSandBox" && text.contains("is too long"))
    });
}

#[test]
fn what_this_pilots_isolation_cannot_give_a_pod_is_refused_by_name() {
    let namespace = Namespace::new("isorefuse");
    let (plain, isolated) = (Pilot::local(Options::new("isorefuse"), 600), isolated("isorefused"));
    namespace.config_map("run", &[("run.sh", "exit 0\n")]);
    let aliases = json!({"hostAliases": [{"ip": "1.2.3.4", "hostnames": ["a"]}]});
    let names = json!({"dnsPolicy": "None", "dnsConfig": {"nameservers": ["1.2.3.4"]}});
    for (pilot, name, says, words) in [
        (&plain, "aliases", aliases, ["spec.hostAliases", "--isolation=namespaces"]),
        (&plain, "names", names, ["spec.dnsPolicy None", "--isolation=namespaces"]),
        (&isolated, "pid", json!({"hostPID": true}), ["spec.hostPID", "leave it out"]),
        (
            &isolated,
            "share",
            json!({"shareProcessNamespace": true}),
            ["spec.shareProcessNamespace", "leave it out"],
        ),
    ] {
        let mut spec = pod_spec("Never", &[container("c1", "run")]);
        spec.as_object_mut().unwrap().extend(says.as_object().unwrap().clone());
        namespace.pod_on(pilot, name, spec);
        let status = &namespace.wait_phase(name, "Failed", seconds(30))["status"];
        let message = status["message"].as_str().unwrap();
        assert_eq!(status["reason"], "UnsupportedPodSpec", "{message}");
        assert!(words.iter().all(|word| message.contains(word)), "{message}");
    }
}

#[test]
fn a_container_that_is_deleted_runs_its_trap_and_ends_with_its_code() {
    let namespace = Namespace::new("isotrap");
    let pilot = isolated("isotrap");
    let noted = pilot.home.join("noted");
    let script = format!(
        "trap 'echo trapped >{}; exit 9' TERM\n(setsid sleep 3645 &)\nwhile :; do sleep 0.1; done\n",
        noted.display()
    );
    namespace.script_on(&pilot, "p", &script);
    namespace.wait_phase("p", "Running", seconds(30));
    wait_until("its daemon runs", seconds(20), || runs("sleep 3645"));
    let begin = std::time::Instant::now();
    namespace.of("pods").delete("p", Some(30));
    namespace.wait_gone("p", seconds(20));
    assert!(begin.elapsed() < seconds(20), "it did not wait for the grace's end");
    assert_eq!(read(&noted), "trapped\n");
    assert!(!runs("sleep 3645"));
    let outcome = pilot.kept_outcome("p").to_string();
    assert!(outcome.contains("\"exitCode\":9") || outcome.contains("\"exit_code\":9"), "{outcome}");
}

#[test]
fn a_pod_that_daemonizes_ends_with_its_script_and_sees_nothing_of_another_pod() {
    let namespace = Namespace::new("isodaemon");
    let pilot = isolated("isodaemon");
    namespace.script_on(&pilot, "other", "echo secret >here\nexec sleep 3646\n");
    namespace.wait_phase("other", "Running", seconds(30));
    let other = pilot.pod_directory("other").join("containers/c1/here");
    wait_until("the other pod has a file", seconds(20), || other.exists());
    let script = format!(
        "setsid bash -c 'env -i nohup sleep 3647 >/dev/null 2>&1 &' &\nsleep 0.3\nls {0}/.jiriaf-pilot/*/store\n\
         cat {1} && echo seen\npgrep -f 'sleep 3646' && echo seen\nexit 5\n",
        pilot.home.display(),
        other.display()
    );
    let uid = namespace.script_on(&pilot, "p", &script)["metadata"]["uid"].as_str().unwrap().to_owned();
    let pod = namespace.wait_phase("p", "Failed", seconds(30));
    assert_eq!(pod["status"]["containerStatuses"][0]["state"]["terminated"]["exitCode"], 5, "{pod:#}");
    assert!(!runs("sleep 3647"));
    let log = read(&pilot.pod_directory("p").join("containers/c1/logs/0.log"));
    assert!(log.contains(&format!("stdout F {uid}\n")) && !log.contains("seen"), "{log}");
    assert_eq!(log.lines().count(), 2, "its own part of the store, and cat's complaint: {log}");
}

#[test]
fn links_of_a_pod_lead_the_pilot_to_no_other_pods_files() {
    let namespace = Namespace::new("links");
    let pilot = isolated("links");
    namespace.of("secrets").create(&json!({"metadata": {"name": "s"}, "stringData": {"word": "hidden"}}));
    namespace.config_map("q", &[("run.sh", "echo hidden; exec sleep 3600\n")]);
    let mut other = container("c1", "q");
    let mut spec = pod_spec("Never", &[other.clone()]);
    mount(&mut other, "s", "/etc/jiriaf-s");
    spec["containers"] = json!([other]);
    spec["volumes"].as_array_mut().unwrap().push(json!({"name": "s", "secret": {"secretName": "s"}}));
    namespace.pod_on(&pilot, "q", spec);
    namespace.wait_phase("q", "Running", seconds(30));
    let volumes = std::fs::read_link(pilot.pod_directory("q").join("volumes")).unwrap();
    let store = volumes.parent().unwrap().display();
    let log = volumes.parent().unwrap().join("containers/c1/logs/0.log");
    wait_until("it has said something", seconds(20), || {
        std::fs::read_to_string(&log).is_ok_and(|text| text.contains("hidden"))
    });
    assert_eq!(read(&volumes.join("s/word")), "hidden");
    let before = read(&log);

    let script = format!(
        "ln -sfn {store}/volumes/s/word \"$JIRIAF_TERMINATION_LOG\"\nmv logs aside\nln -s {store}/containers/c1/logs logs\n\
         echo more\nexit 1\n"
    );
    namespace.script_on(&pilot, "p", &script);
    let pod = namespace.wait_phase("p", "Failed", seconds(30));
    let end = &pod["status"]["containerStatuses"][0]["state"]["terminated"];
    assert_eq!((&end["exitCode"], &end["message"]), (&json!(1), &Value::Null), "{end:#}");
    let mut command = Way::default().kubectl(&namespace.name);
    let said = Kubectl::run(command.args(["logs", "p"]).stdin(Stdio::null()), seconds(60)).text();
    assert!(!said.contains("hidden"), "{said}");
    namespace.of("pods").delete("p", None);
    namespace.wait_gone("p", seconds(60));
    assert_eq!(read(&log), before, "its log is there, and has nothing of the other's");
}

#[test]
fn a_pod_chooses_where_the_pilot_lets_it() {
    let namespace = Namespace::new("isoask");
    let pilot = Pilot::local(Options::new("isoask").arg("--isolation=annotation"), 600);
    let script = "test -e /etc/jiriaf-x/key && echo isolated\necho $$\nexit 0\n";
    namespace.config_map("x", &[("key", "value\n")]);
    namespace.config_map("run", &[("run.sh", script)]);
    let ask = |pilot: &Pilot, name: &str, value: Option<&str>| {
        let mut container = container("c1", "run");
        mount(&mut container, "x", "/etc/jiriaf-x");
        let mut spec = pod_spec("Never", &[container]);
        pilot.place(&mut spec);
        let annotations = value.map_or(json!({}), |value| json!({"jiriaf.isolation": value}));
        namespace
            .of("pods")
            .create(&json!({"metadata": {"name": name, "annotations": annotations}, "spec": spec}));
        namespace.wait_phase(name, "Succeeded", seconds(30));
        read(&pilot.pod_directory(name).join("containers/c1/logs/0.log"))
    };
    let is_isolated = |log: &str| log.contains("F isolated") && log.ends_with(" F 2\n");
    assert!(is_isolated(&ask(&pilot, "yes", Some("namespaces"))));
    for (name, value) in [("no", Some("none")), ("silent", None)] {
        assert!(!ask(&pilot, name, value).contains("isolated"), "{name}");
    }
    drop(pilot);
    // Without the setting nothing is different, but that a pod that asks is told.
    let plain = Pilot::local(Options::new("isoplain"), 600);
    assert!(!ask(&plain, "plain", Some("namespaces")).contains("isolated"));
    wait_until("an event says so", seconds(20), || {
        let events = namespace.events("plain");
        events.iter().any(|(reason, text)| reason == "IsolationUnavailable" && text.contains("--isolation"))
    });
    let directory = plain.pod_directory("plain");
    assert!(std::fs::symlink_metadata(directory.join("containers")).unwrap().is_dir());
    assert!(!directory.join("containers/c1/termination-log").exists());
}

#[test]
fn on_pbs_what_starts_a_session_dies_too() {
    let namespace = Namespace::new("isopbs");
    let job = PbsJob::new(1, "00:10:00");
    let mut options = Options::new("isopbs");
    options.environment.push(("JIRIAF_ISOLATION".into(), "namespaces".into()));
    let mut pilot = Pilot::pbs(options, &job);
    namespace.script_on(&pilot, "p", "setsid sleep 3648 &\nexec sleep 3649\n");
    namespace.wait_phase("p", "Running", seconds(30));
    wait_until("both run", seconds(20), || runs("sleep 3648") && runs("sleep 3649"));
    assert_eq!(pilot.sessions("sleep 3649"), [pilot.session()], "the container is in the job's session");
    pilot.qdel();
    pilot.wait_exit(seconds(60));
    assert!(!runs("sleep 3648") && !runs("sleep 3649"));
}

#[test]
fn a_pilot_that_crashes_finds_its_isolated_containers() {
    let namespace = Namespace::new("isocrash");
    let pilot = isolated("isocrash");
    namespace.script_on(&pilot, "p", "until [ -e go ]; do sleep 0.05; done\nexit 6\n");
    namespace.wait_phase("p", "Running", seconds(30));
    let old = pilot.stages("pilot");
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(old[0]), nix::sys::signal::Signal::SIGKILL).unwrap();
    wait_until("another pilot is there", seconds(30), || {
        let now = pilot.stages("pilot");
        !now.is_empty() && now != old
    });
    let go = pilot.pod_directory("p").join("containers/c1/go");
    assert!(run(as_user(ALICE, "touch").arg(&go)).success);
    let pod = namespace.wait_phase("p", "Failed", seconds(60));
    let status = &pod["status"]["containerStatuses"][0];
    assert_eq!((&status["state"]["terminated"]["exitCode"], &status["restartCount"]), (&json!(6), &json!(0)));
}
