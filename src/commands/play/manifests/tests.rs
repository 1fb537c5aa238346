use super::*;

fn read_text(text: &str) -> Result<Manifests, ManifestError> {
    let mut count = 0;
    read(&[Source { name: "a.yaml".to_owned(), text: text.to_owned() }], || {
        count += 1;
        format!("{count:08}-uid")
    })
}

const POD: &str =
    "apiVersion: v1\nkind: Pod\nmetadata: {name: p1}\nspec: {containers: [{name: c1, image: i}]}\n";

fn pod(spec: &str) -> String {
    format!("apiVersion: v1\nkind: Pod\nmetadata: {{name: p1}}\nspec:\n{spec}")
}

#[test]
fn documents_of_all_kinds_are_read() {
    let text = format!(
        "# a comment alone\n---\n{POD}---\napiVersion: v1\nkind: Secret\nmetadata: {{name: s}}\ndata: {{a: eA==, b: eQ==}}\nstringData: {{b: z}}\n\
         ---\nkind: Service\napiVersion: v1\nmetadata: {{name: web}}\n---\n---\nkind: List\napiVersion: v1\nitems:\n- kind: ConfigMap\n  apiVersion: v1\n  metadata: {{name: m}}\n  data: {{k: v}}\n"
    );
    let all = read_text(&text).unwrap();
    assert_eq!(all.pods[0].metadata.namespace.as_deref(), Some("default"));
    assert_eq!(all.pods[0].metadata.uid.as_deref(), Some("00000001-uid"));
    let data = all.secrets[0].data.as_ref().unwrap();
    assert_eq!((data["a"].0.as_slice(), data["b"].0.as_slice()), (&b"x"[..], &b"z"[..]));
    assert_eq!(all.config_maps[0].metadata.name.as_deref(), Some("m"));
    assert_eq!(all.ignored, ["Service web"]);
}

#[test]
fn what_does_not_parse_is_named_with_its_document_and_the_files_line() {
    let error = read_text(&format!("{POD}---\nkind: [\n")).unwrap_err().to_string();
    assert!(error.starts_with("a.yaml, document 2: "), "{error}");
    assert!(error.contains("line 6") || error.contains("line 7") || error.contains(":7:"), "{error}");
}

#[test]
fn what_the_api_server_would_refuse_is_refused() {
    let container = "  containers: [{name: c1, image: i}]\n";
    for (text, wanted) in [
        ("metadata: {name: a}\n".to_owned(), "no `kind`"),
        (POD.replace("p1", "../p1"), "name \"../p1\""),
        (POD.replace("{name: p1}", "{name: p1, namespace: a/b}"), "namespace \"a/b\""),
        (POD.replace("{name: p1}", "{}"), "no metadata.name"),
        (POD.replace("name: c1", "name: ../c"), "container name"),
        ("kind: ConfigMap\nmetadata: {name: m}\nbinaryData: {a/b: eA==}\n".to_owned(), "the key \"a/b\""),
        ("kind: Secret\nmetadata: {name: s}\nstringData: {..x: z}\n".to_owned(), "the key \"..x\""),
        (POD.replace("image: i", "args: [300]"), "args[0] must be text"),
        (POD.replace("image: i", "env: [{name: A, value: true}]"), "env[0].value must be text"),
        (POD.replace("image: i", "args: 300"), "document 1"),
        (pod("  containers: []\n"), "no container"),
        (pod(&format!("  restartPolicy: Often\n{container}")), "restartPolicy \"Often\""),
        (format!("{POD}---\n{POD}"), "two Pods default/p1"),
        (pod(&format!("{container}  volumes: [{{name: v, configMap: {{name: m}}}}]\n")), "wants the ConfigMap default/m"),
        (pod("  containers: [{name: c1, envFrom: [{secretRef: {name: s}}]}]\n"), "wants the Secret default/s"),
        ("kind: ConfigMap\napiVersion: v1\nmetadata: {name: m}\n".to_owned(), "neither a Pod nor a Job"),
        ("".to_owned(), "neither a Pod nor a Job"),
        ("kind: Job\napiVersion: batch/v1\nmetadata: {name: j}\nspec: {template: {spec: {containers: [{name: c}]}}}\n".to_owned(), "restartPolicy Never or OnFailure"),
    ] {
        let error = read_text(&text).unwrap_err().to_string();
        assert!(error.contains(wanted), "{wanted}: {error}");
    }
}

#[test]
fn what_is_optional_may_be_missing_and_quantities_may_be_numbers() {
    let text = pod(
        "  containers: [{name: c1, resources: {requests: {cpu: 1}}}]\n  volumes: [{name: v, secret: {secretName: s, optional: true}}]\n",
    );
    let all = read_text(&text).unwrap();
    let requests =
        all.pods[0].spec.as_ref().unwrap().containers[0].resources.as_ref().unwrap().requests.as_ref();
    assert_eq!(requests.unwrap()["cpu"].0, "1");
    let indented = text.lines().map(|line| format!("  {line}\n")).collect::<String>();
    let list = format!("kind: List\nitems:\n-\n{indented}");
    assert_eq!(read_text(&list).unwrap().pods.len(), 1);
}
