//! A file system without room below the pods' directories.

use serde_json::Value;

use crate::harness::{Namespace, Options, Pilot, Tmpfs, seconds, wait_until};

#[test]
fn a_log_on_a_full_file_system_holds_nothing_up_and_its_loss_is_counted() {
    let namespace = Namespace::new("full");
    let disk = Tmpfs::new(512, "");
    let options = Options::new("full").env("JIRIAF_PODS_DIR", disk.path().to_str().unwrap());
    let mut pilot = Pilot::local(options, 600);
    // More output than there is room for, and a sign elsewhere that the script came to its end.
    let ended = pilot.home.join("ended");
    let script = format!("seq 1 200000\necho yes >{}\nexit 4\n", ended.display());
    namespace.script_on(&pilot, "p", &script);
    let pod = namespace.wait_phase("p", "Failed", seconds(30));
    assert_eq!(
        pod["status"]["containerStatuses"][0]["state"]["terminated"]["exitCode"], 4,
        "{:#}",
        pod["status"]
    );
    assert!(ended.exists());
    wait_until("an event counts the lines", seconds(10), || {
        namespace.events("p").iter().any(|(reason, message)| {
            reason == "LogLinesLost"
                && message.contains("No space left")
                && message
                    .split(' ')
                    .next()
                    .and_then(|count| count.parse::<u64>().ok())
                    .is_some_and(|count| count > 100_000)
        })
    });

    namespace.of("pods").delete("p", None);
    namespace.wait_gone("p", seconds(20));
    wait_until("its directory is gone", seconds(10), || !disk.path().join("p").exists());
    pilot.signal(nix::sys::signal::Signal::SIGTERM);
    assert_eq!(pilot.wait_exit(seconds(30)), Some(0), "{}", pilot.output());
    assert_eq!(pilot.nodes(), Vec::<Value>::new());
    let row = pilot.row("p");
    assert!(
        row.contains("exit 4, ") && row.contains(" log lines lost  "),
        "the table counts the lines too: {row}"
    );
}
