//! Pods that name container images, by a site's table. What is started for which entry is in tests/images.rs.

use std::os::unix::fs::PermissionsExt;

use serde_json::json;

use crate::harness::{
    Namespace, Options, Pilot, container, pod_spec, read, seconds, shared_directory, wait_until,
};

#[test]
fn pods_that_name_images_run_by_the_table_and_one_that_is_in_none_says_what_to_add() {
    let namespace = Namespace::new("images");
    let site = shared_directory();
    let path = |name: &str| site.path().join(name).to_str().unwrap().to_owned();
    // In Apptainer's place: it writes down what it is given, runs the rest, and sees the bind's source.
    std::fs::create_dir(path("bin")).unwrap();
    let apptainer = "#!/bin/bash\nprintf '%s\\n' \"$@\" >$JIRIAF_CONTAINER_DIR/given\nshift 6; exec \"$@\"\n";
    std::fs::write(path("bin/apptainer"), apptainer).unwrap();
    for (name, mode) in [("bin", 0o755), ("bin/apptainer", 0o755)] {
        std::fs::set_permissions(path(name), std::fs::Permissions::from_mode(mode)).unwrap();
    }
    let table =
        "images:\n- name: busybox\n- {name: quay.io/site/*, run: apptainer, image: '/i/{name}.sif'}\n";
    std::fs::write(path("images.yaml"), table).unwrap();
    let search = format!("{}:/usr/bin:/bin", path("bin"));
    let options = Options::new("images").env("JIRIAF_IMAGES", &path("images.yaml")).env("PATH", &search);
    let pilot = Pilot::local(options, 600);

    namespace.config_map("m", &[("f", "from the volume\n")]);
    let mut host = container("host", "m");
    host["image"] = json!("docker.io/library/busybox:1.36");
    host["command"] = json!(["sh", "-c", "cat job/f >seen; X=mine; echo \"$X $0\" >>seen", "$(WORD)"]);
    host["env"] = json!([{"name": "WORD", "value": "word"}]);
    let mut inside = container("inside", "m");
    inside["image"] = json!("quay.io/site/app:v1");
    inside["command"] = json!(["sh", "-c", "echo $APPTAINERENV_WORD >$JIRIAF_CONTAINER_DIR/seen"]);
    inside["env"] = json!([{"name": "WORD", "value": "handed on"}]);
    namespace.pod_on(&pilot, "p", pod_spec("Never", &[host, inside]));
    namespace.wait_phase("p", "Succeeded", seconds(30));
    let containers = pilot.pod_directory("p").join("containers");
    assert_eq!(read(&containers.join("host/seen")), "from the volume\nmine word\n");
    assert_eq!(read(&containers.join("inside/seen")), "handed on\n");
    let given = read(&containers.join("inside/given"));
    let given: Vec<&str> = given.lines().collect();
    let volume = pilot.pod_directory("p").join("volumes/m");
    let bind = format!("{}:{}/job:ro", volume.display(), containers.join("inside").display());
    assert_eq!(given[..6], ["exec", "--bind", &bind, "--pwd", "/", "/i/app.sif"]);

    let mut other = container("c1", "m");
    other["image"] = json!("quay.io/other/app:v1");
    namespace.pod_on(&pilot, "other", pod_spec("Never", &[other]));
    wait_until("it says what to add", seconds(30), || {
        let pod = namespace.pod("other").unwrap_or_default();
        let waiting = &pod["status"]["containerStatuses"][0]["state"]["waiting"];
        let message = waiting["message"].as_str().unwrap_or_default();
        waiting["reason"] == "ErrImageNeverPull"
            && message.contains("images.yaml")
            && message.contains("- {name: quay.io/other/app, run: host}")
    });
}
