//! The end of a pod that somebody deletes, and of what its scripts left behind.

use serde_json::Value;

use crate::harness::{ApiProxy, Namespace, Options, Pilot, container, pod_spec, read, seconds, wait_until};

#[test]
fn a_trap_on_sigterm_runs_to_its_end_within_the_grace() {
    let namespace = Namespace::new("trap");
    let pilot = Pilot::local(Options::new("trap"), 600);
    let done = pilot.home.join("done");
    let script = format!("trap 'sleep 2; echo yes >{}; exit 0' TERM\nsleep 600 &\nwait\n", done.display());
    namespace.script_on(&pilot, "p", &script);
    namespace.wait_phase("p", "Running", seconds(30));
    namespace.of("pods").delete("p", Some(20));
    namespace.wait_gone("p", seconds(20));
    assert_eq!(read(&done), "yes\n");
}

#[test]
fn a_container_that_ignores_sigterm_is_gone_at_the_end_of_the_grace() {
    let namespace = Namespace::new("ignores");
    let pilot = Pilot::local(Options::new("ignores"), 600);
    namespace.script_on(&pilot, "p", "trap '' TERM\nsleep 3611 & wait\nsleep 3612\n");
    let sleeps = || pilot.processes().iter().filter(|(_, line)| line.starts_with("sleep 361")).count();
    wait_until("the script sleeps", seconds(30), || sleeps() == 1);
    namespace.wait_phase("p", "Running", seconds(10));
    namespace.of("pods").delete("p", Some(3));
    namespace.wait_gone("p", seconds(15));
    assert_eq!(sleeps(), 0);
}

#[test]
fn a_script_that_daemonizes_leaves_nothing_behind() {
    let namespace = Namespace::new("daemon");
    let pilot = Pilot::local(Options::new("daemon"), 600);
    // A session of its own, a double fork, closed descriptors; and the script itself ends at once.
    let script = "(setsid sh -c 'exec </dev/null >/dev/null 2>&1; (trap \"\" TERM HUP; sleep 3621) & exit' &)\n\
                  until pgrep -u \"$(id -u)\" -f '^sleep 3621' >/dev/null; do sleep 0.1; done\n";
    namespace.script_on(&pilot, "p", script);
    namespace.wait_phase("p", "Succeeded", seconds(30));
    let left: Vec<_> =
        pilot.processes().into_iter().filter(|(_, line)| line.starts_with("sleep 3621")).collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn a_forced_deletion_kills_too() {
    let namespace = Namespace::new("forced");
    let pilot = Pilot::local(Options::new("forced"), 600);
    namespace.script_on(&pilot, "p", "trap '' TERM\n(setsid sleep 3661 &)\nwhile :; do sleep 0.2; done\n");
    namespace.wait_phase("p", "Running", seconds(30));
    let sleeps = || pilot.processes().iter().filter(|(_, line)| line.starts_with("sleep 3661")).count();
    wait_until("the script sleeps", seconds(10), || sleeps() == 1);
    namespace.of("pods").delete("p", Some(0));
    wait_until("nothing is left of it", seconds(20), || {
        sleeps() == 0 && pilot.stages("supervise").is_empty()
    });
    wait_until("nor its directory", seconds(10), || !pilot.pod_directory("p").exists());
    // The name is free again.
    namespace.wait_gone("p", seconds(5));
    namespace.pod_on(&pilot, "p", pod_spec("Never", &[container("c1", "p")]));
    wait_until("the next of this name has the plain path", seconds(20), || pilot.pod_directory("p").exists());
}

#[test]
fn a_pod_that_was_made_again_while_the_first_of_its_name_ends_is_not_deleted_with_it() {
    let namespace = Namespace::new("again");
    let proxy = ApiProxy::start();
    let pilot = Pilot::local(Options { server: Some(proxy.url()), ..Options::new("again") }, 600);
    let go = pilot.home.join("go");
    let script = format!(
        "trap 'echo >{0}.trap; until [ -e {0} ]; do sleep 0.1; done; exit 0' TERM\nsleep 1000 & wait\n",
        go.display()
    );
    namespace.script_on(&pilot, "p", &script);
    let uid = |pod: &Value| pod["metadata"]["uid"].as_str().unwrap().to_owned();
    let first = uid(&namespace.wait_phase("p", "Running", seconds(30)));
    namespace.of("pods").delete("p", Some(60));
    wait_until("the first is ending", seconds(20), || go.with_extension("trap").exists());

    // While the pilot hears nothing, another takes the name; then the first ends, and is to be deleted.
    proxy.cut();
    namespace.of("pods").delete("p", Some(0));
    namespace.wait_gone("p", seconds(10));
    let second = uid(&namespace.pod_on(&pilot, "p", pod_spec("Never", &[container("c1", "p")])));
    assert_ne!(first, second);
    std::fs::write(&go, "").unwrap();
    wait_until("the first has ended", seconds(20), || pilot.stages("supervise").is_empty());
    proxy.restore();

    let pod = namespace.wait_phase("p", "Running", seconds(60));
    wait_until("nothing of the first is left", seconds(30), || {
        pilot.stages("supervise").len() == 1 && !pilot.home.join(format!("p.{}", &first[..8])).exists()
    });
    let now = namespace.pod("p").expect("the second is there");
    assert_eq!((uid(&pod), uid(&now)), (second.clone(), second));
    assert_eq!(now["metadata"]["deletionTimestamp"], Value::Null, "{:#}", now["metadata"]);
    assert_eq!(now["status"]["phase"], "Running", "{:#}", now["status"]);
    assert_eq!(now["status"]["containerStatuses"][0]["restartCount"], 0, "{:#}", now["status"]);
}
