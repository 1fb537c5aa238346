//! What a script finds in its environment and beside it.

use serde_json::json;

use crate::harness::{Namespace, Options, Pilot, api, container, pod_spec, read, seconds, wait_until};

#[test]
fn a_script_sees_what_env_and_env_from_name_and_nothing_of_the_pilots_secrets() {
    let namespace = Namespace::new("env");
    let options = Options::new("env").env("SITE_MODULE", "loaded").env("OTHER_TOKEN", "of-the-pilot");
    let pilot = Pilot::local(options, 600);
    namespace.of("configmaps").create(&json!({"metadata": {"name": "settings"},
        "data": {"color": "blue", "size": "large", "1.st-of-all": "odd"}}));
    namespace.of("secrets").create(&json!({"metadata": {"name": "keys"},
        "stringData": {"key": "s3cr3t", "other": "0ther"}}));
    namespace.config_map("p", &[("run.sh", "env -0 >seen; printf '%s\\n' \"$@\" >arguments\n")]);
    let mut sees = container("c1", "p");
    sees["args"] = json!(["$(COLOR)", "${KEY}", "$UNSET", "$$(COLOR)", "~/x"]);
    sees["resources"] = json!({"requests": {"memory": "64Mi"}, "limits": {"cpu": "1"}});
    sees["envFrom"] = json!([{"prefix": "CM_", "configMapRef": {"name": "settings"}},
        {"secretRef": {"name": "keys"}},
        {"configMapRef": {"name": "settings"}},
        {"configMapRef": {"name": "not-there", "optional": true}}]);
    sees["env"] = json!([
        {"name": "COLOR", "valueFrom": {"configMapKeyRef": {"name": "settings", "key": "color"}}},
        {"name": "KEY", "valueFrom": {"secretKeyRef": {"name": "keys", "key": "key"}}},
        {"name": "NONE", "valueFrom": {"secretKeyRef": {"name": "keys", "key": "no", "optional": true}}},
        {"name": "POD", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
        {"name": "NODE", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}},
        {"name": "TEAM", "valueFrom": {"fieldRef": {"fieldPath": "metadata.labels['team']"}}},
        {"name": "CPUS", "valueFrom": {"resourceFieldRef": {"resource": "limits.cpu"}}},
        {"name": "MIB", "valueFrom": {"resourceFieldRef": {"resource": "requests.memory", "divisor": "1Mi"}}},
        {"name": "BOTH", "value": "$(COLOR)-$(POD)"},
    ]);
    let mut spec = pod_spec("Never", &[sees]);
    pilot.place(&mut spec);
    namespace
        .of("pods")
        .create(&json!({"metadata": {"name": "p", "labels": {"team": "physics"}}, "spec": spec}));
    namespace.wait_phase("p", "Succeeded", seconds(30));

    let directory = pilot.pod_directory("p").join("containers/c1");
    let seen = read(&directory.join("seen"));
    let seen: Vec<&str> = seen.split('\0').collect();
    let node = format!("NODE={}", pilot.node);
    for wanted in [
        "COLOR=blue",
        "KEY=s3cr3t",
        "POD=p",
        &node,
        "TEAM=physics",
        "CPUS=1",
        "MIB=64",
        "BOTH=blue-p",
        "CM_color=blue",
        "CM_size=large",
        // Whatever a ConfigMap's key may be is a name (Kubernetes' relaxed validation); none is left out with an event.
        "CM_1.st-of-all=odd",
        "1.st-of-all=odd",
        "key=s3cr3t",
        "other=0ther",
        "SITE_MODULE=loaded",
    ] {
        assert!(seen.contains(&wanted), "{wanted} is not in {seen:#?}");
    }
    for name in ["KUBECONFIG", "JIRIAF_SITE", "OTHER_TOKEN", "NONE"] {
        assert!(seen.iter().all(|line| !line.starts_with(&format!("{name}="))), "{name} is in {seen:#?}");
    }
    for name in ["JIRIAF_POD_DIR", "JIRIAF_CONTAINER_DIR", "JIRIAF_DRAIN_TIME"] {
        assert!(seen.iter().any(|line| line.starts_with(&format!("{name}="))), "{name} is not in {seen:#?}");
    }
    wait_until("its events are there", seconds(10), || !namespace.events("p").is_empty());
    let reasons: Vec<String> = namespace.events("p").into_iter().map(|(reason, _)| reason).collect();
    assert!(!reasons.iter().any(|reason| reason == "InvalidEnvironmentVariableNames"), "{reasons:?}");
    let home = format!("{}/x", pilot.home.display());
    let arguments = read(&directory.join("arguments"));
    assert_eq!(arguments.lines().collect::<Vec<_>>(), ["blue", "s3cr3t", "$UNSET", "$(COLOR)", &home]);
}

#[test]
fn a_missing_key_keeps_the_container_waiting_until_it_is_there() {
    let namespace = Namespace::new("key");
    let pilot = Pilot::local(Options::new("key"), 600);
    namespace.config_map("settings", &[("other", "x")]);
    namespace.config_map("p", &[("run.sh", "[ \"$WANTED\" = late ]\n")]);
    let mut waits = container("c1", "p");
    waits["env"] =
        json!([{"name": "WANTED", "valueFrom": {"configMapKeyRef": {"name": "settings", "key": "wanted"}}}]);
    namespace.pod_on(&pilot, "p", pod_spec("Never", &[waits]));
    wait_until("kubelet's reason", seconds(20), || {
        let pod = namespace.pod("p").unwrap_or_default();
        pod["status"]["containerStatuses"][0]["state"]["waiting"]["reason"] == "CreateContainerConfigError"
    });
    namespace.of("configmaps").merge("settings", &json!({"data": {"wanted": "late"}}));
    namespace.wait_phase("p", "Succeeded", seconds(60));
}

/// A pod with the volume that the API server gives to every pod.
fn with_token(namespace: &Namespace, pilot: &Pilot, script: &str) {
    namespace.config_map("p", &[("run.sh", script)]);
    let mut spec = pod_spec("Never", &[container("c1", "p")]);
    spec.as_object_mut().unwrap().remove("automountServiceAccountToken");
    namespace.pod_on(pilot, "p", spec);
}

/// Where Kubernetes mounts it, below the container's directory.
const ACCOUNT: &str = "var/run/secrets/kubernetes.io/serviceaccount";

#[test]
fn a_pod_has_a_token_a_ca_and_its_namespace_where_kubernetes_mounts_them() {
    let namespace = Namespace::new("token");
    let pilot = Pilot::local(Options::new("token"), 600);
    with_token(&namespace, &pilot, &format!("cp {ACCOUNT}/* $JIRIAF_POD_DIR/\n"));
    namespace.wait_phase("p", "Succeeded", seconds(30));
    let directory = pilot.pod_directory("p");
    assert_eq!(read(&directory.join("namespace")), namespace.name);
    assert!(read(&directory.join("ca.crt")).starts_with("-----BEGIN CERTIFICATE-----"));
    let token = read(&directory.join("token"));
    assert_eq!(token.split('.').count(), 3, "a JWT");
}

#[test]
fn a_token_that_is_denied_is_left_out_and_an_event_says_so() {
    let namespace = Namespace::new("denied");
    // The rights of a site that gives no tokens: those of the workload role, less serviceaccounts/token.
    api::grouped("rbac.authorization.k8s.io/v1", &namespace.name, "rolebindings")
        .delete("jiriaf-pilot", None);
    api::grouped("rbac.authorization.k8s.io/v1", &namespace.name, "roles").create(&json!({
        "metadata": {"name": "no-tokens"},
        "rules": [{"apiGroups": [""], "resources": ["configmaps", "secrets"], "verbs": ["get"]}]}));
    api::grouped("rbac.authorization.k8s.io/v1", &namespace.name, "rolebindings").create(&json!({
        "metadata": {"name": "no-tokens"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "no-tokens"},
        "subjects": [{"kind": "ServiceAccount", "name": "jiriaf-pilot", "namespace": "jiriaf"}]}));
    let pilot = Pilot::local(Options::new("denied"), 600);
    with_token(&namespace, &pilot, &format!("[ ! -e {ACCOUNT}/token ] && [ -s {ACCOUNT}/ca.crt ]\n"));
    namespace.wait_phase("p", "Succeeded", seconds(30));
    wait_until("an event says so", seconds(10), || {
        namespace.events("p").iter().any(|(reason, message)| {
            reason == "FailedToRetrieveToken" && message.contains("serviceaccounts/token")
        })
    });
}

/// A pod that writes its environment down; what it saw, by name.
fn environment_of(namespace: &Namespace, pilot: &Pilot, name: &str, links: bool) -> Vec<String> {
    let mut sees = container("c1", "script");
    sees["env"] = json!([{"name": "URL", "value": "tcp://$(DB_MAIN_SERVICE_HOST):$(DB_MAIN_SERVICE_PORT_WIRE)"},
        {"name": "DB_MAIN_PORT_5432_TCP_ADDR", "value": "mine"}]);
    let mut spec = pod_spec("Never", &[sees]);
    spec["enableServiceLinks"] = json!(links);
    namespace.pod_on(pilot, name, spec);
    namespace.wait_phase(name, "Succeeded", seconds(30));
    let seen = read(&pilot.pod_directory(name).join("containers/c1/seen"));
    seen.split('\0').map(str::to_owned).collect()
}

#[test]
fn a_container_is_told_of_the_services_of_its_namespace() {
    let namespace = Namespace::new("services");
    let pilot = Pilot::local(Options::new("services").env("KUBERNETES_SERVICE_HOST", "of-the-pilot"), 600);
    let service = |name: &str, more: serde_json::Value| {
        let mut spec = json!({"ports": [{"name": "wire", "port": 5432, "protocol": "TCP"}]});
        spec.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        namespace.of("services").create(&json!({"metadata": {"name": name}, "spec": spec}))
    };
    let made = service("db-main", json!({}));
    service("headless", json!({"clusterIP": "None"}));
    namespace.config_map("script", &[("run.sh", "env -0 >seen\n")]);
    let ip = made["spec"]["clusterIP"].as_str().unwrap();
    let api_server = api::namespaced("default", "services").get("kubernetes").unwrap();
    let host = format!("KUBERNETES_SERVICE_HOST={}", api_server["spec"]["clusterIP"].as_str().unwrap());

    let seen = environment_of(&namespace, &pilot, "p1", true);
    for wanted in [
        format!("DB_MAIN_SERVICE_HOST={ip}"),
        "DB_MAIN_SERVICE_PORT=5432".to_owned(),
        "DB_MAIN_SERVICE_PORT_WIRE=5432".to_owned(),
        format!("DB_MAIN_PORT=tcp://{ip}:5432"),
        format!("DB_MAIN_PORT_5432_TCP=tcp://{ip}:5432"),
        "DB_MAIN_PORT_5432_TCP_PROTO=tcp".to_owned(),
        // The pod's own come first.
        "DB_MAIN_PORT_5432_TCP_ADDR=mine".to_owned(),
        format!("URL=tcp://{ip}:5432"),
        host.clone(),
    ] {
        assert!(seen.contains(&wanted), "{wanted} is not in {seen:#?}");
    }
    assert!(!seen.iter().any(|line| line.starts_with("HEADLESS_")), "{seen:#?}");

    let seen = environment_of(&namespace, &pilot, "p2", false);
    assert!(seen.contains(&host), "{seen:#?}");
    assert!(!seen.iter().any(|line| line.starts_with("DB_MAIN_SERVICE")), "{seen:#?}");
    // A kubelet's $(NAME) stays where it names nothing.
    assert!(seen.iter().any(|line| line.starts_with("URL=tcp://$(DB_MAIN_SERVICE_HOST)")), "{seen:#?}");

    // What comes and goes later is known too.
    service("later", json!({}));
    namespace.of("services").delete("db-main", None);
    let mut number = 2;
    wait_until("a pod is told of the new Service and not of the old one", seconds(60), || {
        number += 1;
        let seen = environment_of(&namespace, &pilot, &format!("p{number}"), true);
        let has = |name: &str| seen.iter().any(|line| line.starts_with(name));
        has("LATER_SERVICE_HOST=") && !has("DB_MAIN_SERVICE_HOST=")
    });
}

#[test]
fn a_variable_comes_from_a_file_that_another_container_writes() {
    let namespace = Namespace::new("env-file");
    let pilot = Pilot::local(Options::new("env-file"), 600);
    let key = |name: &str, optional: bool| {
        json!({"name": name, "valueFrom": {"fileKeyRef":
            {"volumeName": "shared", "path": "made/env", "key": name, "optional": optional}}})
    };
    let mount = json!({"name": "shared", "mountPath": "shared"});
    let with_shared = |mut container: serde_json::Value| {
        container["volumeMounts"].as_array_mut().unwrap().push(mount.clone());
        container
    };
    namespace.config_map("writes", &[("run.sh", "mkdir shared/made; while [ ! -e go ]; do sleep 0.1; done\nprintf \"# ours\\nNAME='a \\$HOME\\nb' # c\\n\" >shared/new; mv shared/new shared/made/env\n")]);
    namespace.config_map("reads", &[("run.sh", "printf %s \"$NAME\" >seen; [ -z \"${NONE+x}\" ]\n")]);
    let mut reads = with_shared(container("reads", "reads"));
    reads["env"] = json!([key("NAME", false), key("NONE", true)]);
    let mut spec = pod_spec("Never", &[with_shared(container("writes", "writes")), reads]);
    for volume in spec["volumes"].as_array_mut().unwrap() {
        if volume["name"] == "shared" {
            *volume = json!({"name": "shared", "emptyDir": {}});
        }
    }
    namespace.pod_on(&pilot, "p", spec);
    let waiting = wait_until_waiting(&namespace, "p", "reads");
    assert!(waiting.starts_with("couldn't parse env file"), "{waiting}");
    let containers = pilot.pod_directory("p").join("containers");
    std::fs::write(containers.join("writes/go"), "").unwrap();
    namespace.wait_phase("p", "Succeeded", seconds(60));
    assert_eq!(read(&containers.join("reads/seen")), "a $HOME\nb");
}

#[test]
fn a_variable_comes_from_a_file_that_an_init_container_wrote() {
    let namespace = Namespace::new("env-init");
    let pilot = Pilot::local(Options::new("env-init"), 600);
    let script = "echo \"NAME='from init'\" >$JIRIAF_CONTAINER_DIR/shared/env\n";
    namespace.config_map("writes", &[("run.sh", script)]);
    namespace.config_map("reads", &[("run.sh", "printf %s \"$NAME, $1\" >seen\n")]);
    let with_shared = |name: &str| {
        let mut made = container(name, name);
        let mount = json!({"name": "shared", "mountPath": "shared"});
        made["volumeMounts"].as_array_mut().unwrap().push(mount);
        made
    };
    let mut reads = with_shared("reads");
    reads["args"] = json!(["$(NAME)"]);
    reads["env"] = json!([{"name": "NAME", "valueFrom": {"fileKeyRef":
        {"volumeName": "shared", "path": "env", "key": "NAME"}}}]);
    let mut spec = pod_spec("Never", &[reads]);
    spec["initContainers"] = json!([with_shared("writes")]);
    let volumes = spec["volumes"].as_array_mut().unwrap();
    volumes.retain(|volume| volume["name"] != "shared");
    volumes.push(json!({"name": "shared", "emptyDir": {}}));
    volumes.push(json!({"name": "writes", "configMap": {"name": "writes"}}));
    namespace.pod_on(&pilot, "p", spec);
    namespace.wait_phase("p", "Succeeded", seconds(30));
    let seen = pilot.pod_directory("p").join("containers/reads/seen");
    assert_eq!(read(&seen), "from init, from init");
}

/// The message of a container that waits with CreateContainerConfigError.
fn wait_until_waiting(namespace: &Namespace, pod: &str, container: &str) -> String {
    let mut message = String::new();
    wait_until("the container waits", seconds(30), || {
        let pod = namespace.pod(pod).unwrap_or_default();
        let statuses = pod["status"]["containerStatuses"].as_array().cloned().unwrap_or_default();
        let status = statuses.iter().find(|status| status["name"] == container);
        let waiting = status.map(|status| status["state"]["waiting"].clone()).unwrap_or_default();
        message = waiting["message"].as_str().unwrap_or_default().to_owned();
        waiting["reason"] == "CreateContainerConfigError"
    });
    message
}
