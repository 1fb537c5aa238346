use k8s_openapi::api::core::v1::{Container, Pod};
use proptest::prelude::*;
use serde_json::{Value, from_value, json};
use std::sync::Arc;

use super::*;
use crate::pod::expansion::Expand;

fn objects() -> Objects {
    let mut objects = Objects::default();
    let config = json!({"data": {"A": "cm-a", "B": "cm-b", "no=name": "x", "x.y-z": "ok", "é": "x"}});
    objects.config_maps.insert("cm".to_owned(), from_value(config).map(Arc::new).unwrap());
    let home = json!({"data": {"T": "~/x $HOME"}});
    objects.config_maps.insert("home".to_owned(), from_value(home).map(Arc::new).unwrap());
    objects
        .config_maps
        .insert("nul".to_owned(), from_value(json!({"data": {"N": "a\u{0}b"}})).map(Arc::new).unwrap());
    objects.secrets.insert("s".to_owned(), from_value(json!({"data": {"A": "cy1h"}})).map(Arc::new).unwrap());
    objects
}

fn made(container: Value, expand: Expand) -> Result<ContainerEnv, ConfigError> {
    made_on(container, expand, None)
}

/// In a container that takes this for the host's name.
fn made_on(container: Value, expand: Expand, hostname: Option<&str>) -> Result<ContainerEnv, ConfigError> {
    let mut container = container;
    container["name"] = json!("c1");
    let pod: Pod = from_value(json!({
        "metadata": {"name": "p1", "namespace": "ns"}, "spec": {"containers": [container.clone()]},
    }))
    .unwrap();
    let container: Container = from_value(container).unwrap();
    let inherited = [("HOME", "/home/u"), ("PATH", "/bin"), ("SLURM_JOB_ID", "7")]
        .map(|(name, value)| (name.to_owned(), value.to_owned()));
    let additions = Additions {
        pod_dir: "/home/u/p1".to_owned(),
        container_dir: "/home/u/p1/containers/c1".to_owned(),
        termination_log: "/home/u/p1/containers/c1/termination-log".to_owned(),
        hostname: hostname.map(str::to_owned),
        drain_time: Some(jiff::Timestamp::from_second(1_700_000_000).unwrap()),
        share: vec![("OMP_NUM_THREADS".to_owned(), "4".to_owned())],
        mark: "n/u/c1/0".to_owned(),
    };
    container_env(&EnvInput {
        pod: &pod,
        container: &container,
        objects: &objects(),
        facts: &Facts::default(),
        inherited: &inherited,
        additions: &additions,
        expand,
        services: &[("KUBERNETES_SERVICE_HOST".to_owned(), "10.0.0.1".to_owned())].into(),
        files: &EnvFiles::default(),
    })
}

/// What the container's variables are beyond what every container has.
fn own(container: Value) -> Vec<(String, String)> {
    let env = made(container, Expand::Jiriaf).expect("made");
    env.declared
        .into_iter()
        .filter(|(name, _)| !name.starts_with("JIRIAF_") && !name.starts_with("KUBERNETES_"))
        .collect()
}

fn pairs(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
    pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

fn names(pilot: &[&str], pass: &[&str]) -> Vec<String> {
    let pilot = pilot.iter().map(|name| ((*name).to_owned(), "v".to_owned()));
    let pass: Vec<String> = pass.iter().map(|name| (*name).to_owned()).collect();
    inherited(pilot, &pass).into_iter().map(|(name, _)| name).collect()
}

#[test]
fn what_is_secret_or_would_mislead_is_dropped() {
    let dropped = [
        "KUBECONFIG",
        "JIRIAF_WALLTIME",
        "JIRIAF_CONTAINER",
        "APISERVER_CERT_LOCATION",
        "KUBELET_PORT",
        "VKUBELET_POD_IP",
        "SLURM_JWT",
        "SSH_AUTH_SOCK",
        "PBS_JOBCOOKIE",
        "GITHUB_TOKEN",
        "MY_SECRET",
        "AWS_SECRET_KEY",
        "DB_PASSWORD",
        "PMI_RANK",
        "PMIX_NAMESPACE",
        "SLURM_CPU_BIND",
        "SLURM_CPU_BIND_LIST",
        "SLURM_MEM_PER_NODE",
        "SLURM_MEM_PER_CPU",
    ];
    assert_eq!(names(&dropped, &[]), Vec::<String>::new());
    for name in dropped {
        assert_eq!(names(&dropped, &[name]), [name], "--pass-env {name}");
    }
}

#[test]
fn modules_slurm_and_the_users_own_stay() {
    let kept = [
        "HOME",
        "KRB5CCNAME",
        "LOADEDMODULES",
        "PASSWORD",
        "PATH",
        "PBS_JOBID",
        "SLURM_CPUS_ON_NODE",
        "SLURM_JOB_ID",
        "TOKEN",
        "TOKENS_A",
        "XPMI_A",
    ];
    assert_eq!(names(&kept, &[]), kept);
}

#[test]
fn the_pilots_variables_stay_and_ours_are_added() {
    let env = made(json!({"env": [{"name": "PATH", "value": "/mine"}]}), Expand::Jiriaf).unwrap();
    let vars: Vars = env.vars.iter().filter(|(name, _)| !name.starts_with("KUBERNETES_")).cloned().collect();
    assert_eq!(
        vars,
        pairs(&[
            ("HOME", "/home/u"),
            ("JIRIAF_CONTAINER", "n/u/c1/0"),
            ("JIRIAF_CONTAINER_DIR", "/home/u/p1/containers/c1"),
            ("JIRIAF_DRAIN_TIME", "1700000000"),
            ("JIRIAF_POD_DIR", "/home/u/p1"),
            ("JIRIAF_TERMINATION_LOG", "/home/u/p1/containers/c1/termination-log"),
            // Of the container's share; the pod's own would win.
            ("OMP_NUM_THREADS", "4"),
            ("PATH", "/mine"),
            ("SLURM_JOB_ID", "7"),
        ])
    );
    assert_eq!((env.get("PATH"), env.get("NONE")), (Some("/mine"), None));
    assert_eq!(env.get_declared("HOME"), None, "inherited, not declared");
    let own = made(json!({"env": [{"name": "OMP_NUM_THREADS", "value": "1"}]}), Expand::Jiriaf).unwrap();
    assert_eq!(own.get("OMP_NUM_THREADS"), Some("1"));
}

#[test]
fn hostname_is_a_runtimes_variable_that_a_pod_may_set() {
    let container =
        json!({"env": [{"name": "A", "value": "$(HOSTNAME)"}, {"name": "B", "value": "$HOSTNAME"}]});
    let env = made_on(container, Expand::Jiriaf, Some("p-0")).unwrap();
    let all = [env.get("HOSTNAME"), env.get("A"), env.get("B"), env.get_declared("HOSTNAME")];
    assert_eq!(all, [Some("p-0"), Some("$(HOSTNAME)"), Some("p-0"), None]);
    let container = json!({"env": [{"name": "HOSTNAME", "value": "mine"}]});
    assert_eq!(made_on(container, Expand::Jiriaf, Some("p-0")).unwrap().get("HOSTNAME"), Some("mine"));
    assert_eq!(made(json!({}), Expand::Jiriaf).unwrap().get("HOSTNAME"), None);
}

#[test]
fn values_are_never_shown() {
    let env = made(json!({"envFrom": [{"secretRef": {"name": "s"}}]}), Expand::Jiriaf).unwrap();
    assert_eq!(env.get("A"), Some("s-a"));
    let shown = format!("{env:?} {:?}", objects());
    assert!(!shown.contains("s-a") && !shown.contains("cm-b") && !shown.contains("115"), "{shown}");
}

#[test]
fn a_pod_cannot_take_the_mark_away() {
    let env = made(json!({"env": [{"name": "JIRIAF_CONTAINER", "value": "x"}]}), Expand::Jiriaf).unwrap();
    assert_eq!(env.get("JIRIAF_CONTAINER"), Some("n/u/c1/0"));
}

#[test]
fn env_from_is_read_in_order_and_bad_names_are_reported() {
    assert_eq!(
        own(json!({"envFrom": [{"configMapRef": {"name": "cm"}}, {"secretRef": {"name": "s"}}]})),
        pairs(&[("A", "s-a"), ("B", "cm-b"), ("x.y-z", "ok")])
    );
    assert_eq!(
        own(json!({
            "envFrom": [{"prefix": "P_", "configMapRef": {"name": "cm"}},
                {"configMapRef": {"name": "gone", "optional": true}},
                {"secretRef": {"name": "gone", "optional": true}}],
            "env": [{"name": "P_A", "value": "env"}],
        })),
        pairs(&[("P_A", "env"), ("P_B", "cm-b"), ("P_x.y-z", "ok")])
    );
    let env = made(json!({"envFrom": [{"configMapRef": {"name": "cm"}}]}), Expand::Jiriaf).unwrap();
    let told: Vec<String> = env.skipped.iter().map(ToString::to_string).collect();
    assert_eq!(
        told,
        [
            "Keys [no=name, é] from the EnvFrom configMap ns/cm were skipped since they are considered invalid environment \
          variable names."
        ]
    );
    assert_eq!(made(json!({"envFrom": [{"secretRef": {"name": "s"}}]}), Expand::Jiriaf).unwrap().skipped, []);
}

#[test]
fn values_are_expanded_against_what_is_set_so_far() {
    let env = json!({"envFrom": [{"configMapRef": {"name": "cm"}}], "env": [
        {"name": "C", "value": "$(A)-$(D)-$$(A)"},
        {"name": "D", "value": "later"},
        {"name": "E", "value": "$(D) $(HOME) $HOME ${D} $NONE"},
        {"name": "F", "value": "~/x"},
        {"name": "G", "value": "$(JIRIAF_POD_DIR)/y"},
        {"name": "H"},
    ]});
    assert_eq!(
        own(env.clone()),
        pairs(&[
            ("A", "cm-a"),
            ("B", "cm-b"),
            ("C", "cm-a-$(D)-$(A)"),
            ("D", "later"),
            ("E", "later $(HOME) /home/u later $NONE"),
            ("F", "/home/u/x"),
            ("G", "/home/u/p1/y"),
            ("H", ""),
            ("x.y-z", "ok"),
        ])
    );
    let plain = made(env, Expand::Kubernetes).unwrap();
    assert_eq!(plain.get("E"), Some("later $(HOME) $HOME ${D} $NONE"));
    assert_eq!(plain.get("F"), Some("~/x"));
}

#[test]
fn what_comes_from_objects_is_not_expanded() {
    let from = json!({"envFrom": [{"configMapRef": {"name": "home"}}], "env": [
        {"name": "U", "valueFrom": {"configMapKeyRef": {"name": "home", "key": "T"}}}]});
    assert_eq!(own(from), pairs(&[("T", "~/x $HOME"), ("U", "~/x $HOME")]));
}

#[test]
fn value_from_finds_keys_fields_and_resources() {
    assert_eq!(
        own(json!({"env": [
            {"name": "A", "valueFrom": {"configMapKeyRef": {"name": "cm", "key": "B"}}},
            {"name": "B", "valueFrom": {"secretKeyRef": {"name": "s", "key": "A"}}},
            {"name": "C", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
            {"name": "D", "valueFrom": {"resourceFieldRef": {"resource": "limits.cpu"}}},
            {"name": "E", "valueFrom": {"configMapKeyRef": {"name": "cm", "key": "no", "optional": true}}},
            {"name": "F", "valueFrom": {"secretKeyRef": {"name": "no", "key": "k", "optional": true}}},
            {"name": "G", "value": "$(A)"},
        ]})),
        pairs(&[("A", "cm-b"), ("B", "s-a"), ("C", "p1"), ("D", "0"), ("G", "cm-b")])
    );
}

#[test]
fn what_is_missing_is_said_in_the_kubelets_words() {
    for (container, wanted) in [
        (json!({"envFrom": [{"configMapRef": {"name": "x"}}]}), "configmap \"x\" not found"),
        (json!({"envFrom": [{"secretRef": {"name": "x"}}]}), "secret \"x\" not found"),
        (
            json!({"env": [{"name": "A", "valueFrom": {"configMapKeyRef": {"name": "x", "key": "k"}}}]}),
            "configmap \"x\" not found",
        ),
        (
            json!({"env": [{"name": "A", "valueFrom": {"configMapKeyRef": {"name": "cm", "key": "k"}}}]}),
            "couldn't find key k in ConfigMap ns/cm",
        ),
        (
            json!({"env": [{"name": "A", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}]}),
            "couldn't find key k in Secret ns/s",
        ),
        (
            json!({"env": [{"name": "A", "valueFrom": {"fieldRef": {"fieldPath": "status.phase"}}}]}),
            "unsupported fieldPath: status.phase",
        ),
        (
            json!({"envFrom": [{"configMapRef": {"name": "nul"}}]}),
            "variable N holds a NUL byte, which no process can be given: put such data in a file",
        ),
    ] {
        let got = made(container.clone(), Expand::Jiriaf).map(|_| ()).map_err(|error| error.to_string());
        assert_eq!(got, Err(wanted.to_owned()), "{container}");
    }
}

#[test]
fn variables_that_double_each_other_do_not_fill_the_memory() {
    let mut env = vec![json!({"name": "V0", "value": "x"})];
    for index in 1..60 {
        env.push(json!({"name": format!("V{index}"), "value": format!("$(V{0})$(V{0})", index - 1)}));
    }
    let error = made(json!({"env": env}), Expand::Jiriaf).unwrap_err();
    assert!(error.to_string().starts_with("variable V18: "), "{error}");
}

proptest! {
    #[test]
    fn any_environment_is_made_or_refused(vars in prop::collection::vec(("[A-C]{1,2}", ".{0,10}"), 0..8)) {
        let env: Vec<Value> = vars.iter().map(|(name, value)| json!({"name": name, "value": value})).collect();
        if let Ok(made) = made(json!({"env": env}), Expand::Jiriaf) {
            let names: Vec<&str> = made.vars.iter().map(|(name, _)| name.as_str()).collect();
            prop_assert!(names.windows(2).all(|pair| pair[0] < pair[1]), "each once, in order");
            prop_assert!(made.vars.iter().all(|(_, value)| !value.contains('\0')));
        }
    }
}

#[test]
fn services_come_last_and_can_be_named() {
    let env = made(
        json!({"env": [
            {"name": "URL", "value": "https://$(KUBERNETES_SERVICE_HOST)/ $KUBERNETES_SERVICE_HOST"},
            {"name": "KUBERNETES_SERVICE_HOST", "value": "mine"},
            {"name": "AFTER", "value": "$(KUBERNETES_SERVICE_HOST)"},
        ]}),
        Expand::Jiriaf,
    )
    .unwrap();
    assert_eq!(env.get_declared("URL"), Some("https://10.0.0.1/ 10.0.0.1"));
    assert_eq!([env.get("KUBERNETES_SERVICE_HOST"), env.get("AFTER")], [Some("mine"); 2]);
    let env = made(json!({}), Expand::Kubernetes).unwrap();
    // $(NAME) in command and args may name it too.
    assert_eq!(env.get_declared("KUBERNETES_SERVICE_HOST"), Some("10.0.0.1"));
    assert_eq!(env.get("KUBERNETES_SERVICE_HOST"), Some("10.0.0.1"));
}
