//! The argument vector of a container: `command`, its script, `args`; by no shell.

use k8s_openapi::api::core::v1::Container;

use super::environment::{ConfigError, ContainerEnv};
use super::expansion::{self, Expand, Values};

/// The argument vector. Its first element is the program.
///
/// Without a `command` it is the script itself, whose `#!` line decides. A `command` of empty strings alone
/// (`[""]`, seen in JIRIAF's pods) is none. An empty string in `args` stays one empty argument.
/// `$(NAME)` is replaced in `command` and `args`; JIRIAF's `~`, `$NAME` and `${NAME}` in `args` alone.
///
/// # Errors
/// When an element grows out of bounds or holds a NUL byte.
pub fn argv(
    container: &Container,
    script: &str,
    env: &ContainerEnv,
    expand: Expand,
) -> Result<Vec<String>, ConfigError> {
    let command = container.command.as_deref().unwrap_or_default();
    let command = if command.iter().all(String::is_empty) { &[] } else { command };
    let mut argv = expand_all("command", command, env, Expand::Kubernetes)?;
    argv.push(script.to_owned());
    argv.extend(expand_all("args", container.args.as_deref().unwrap_or_default(), env, expand)?);
    Ok(argv)
}

/// Replaces the references in each of `texts`; `what` they are is for the message.
///
/// # Errors
/// When one grows out of bounds or holds a NUL byte.
pub fn expand_all(
    what: &str,
    texts: &[String],
    env: &ContainerEnv,
    mode: Expand,
) -> Result<Vec<String>, ConfigError> {
    let declared = |name: &str| env.get_declared(name).map(str::to_owned);
    let environment = |name: &str| env.get(name).map(str::to_owned);
    let values = Values { declared: &declared, environment: &environment, home: env.get("HOME") };
    texts
        .iter()
        .map(|text| {
            if text.contains('\0') {
                return Err(ConfigError::Nul(what.to_owned()));
            }
            expansion::expand(text, mode, &values)
                .map_err(|source| ConfigError::TooLong { what: what.to_owned(), source })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn env() -> ContainerEnv {
        let pairs = |pairs: &[(&str, &str)]| {
            pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
        };
        ContainerEnv {
            vars: pairs(&[("A", "one"), ("HOME", "/home/u"), ("SLURM_JOB_ID", "7")]),
            declared: pairs(&[("A", "one")]),
            skipped: Vec::new(),
        }
    }

    fn made(command: Option<&[&str]>, args: Option<&[&str]>, expand: Expand) -> Vec<String> {
        let list =
            |list: Option<&[&str]>| list.map(|list| list.iter().map(|text| (*text).to_owned()).collect());
        let container = Container { command: list(command), args: list(args), ..Container::default() };
        argv(&container, "/p/s.sh", &env(), expand).expect("short")
    }

    #[test]
    fn command_script_and_arguments_in_this_order() {
        type List = Option<&'static [&'static str]>;
        let cases: [(List, List, &[&str]); 11] = [
            (Some(&["bash"]), Some(&["300", "2"]), &["bash", "/p/s.sh", "300", "2"]),
            (None, None, &["/p/s.sh"]),
            (None, Some(&["a"]), &["/p/s.sh", "a"]),
            (Some(&[]), Some(&[]), &["/p/s.sh"]),
            (Some(&[""]), Some(&["a"]), &["/p/s.sh", "a"]),
            (Some(&["bash"]), Some(&[""]), &["bash", "/p/s.sh", ""]),
            (Some(&["bash", "-e"]), Some(&["a b; rm", "*"]), &["bash", "-e", "/p/s.sh", "a b; rm", "*"]),
            (
                Some(&["$(A)"]),
                Some(&["$(A)", "$A", "$(SLURM_JOB_ID)", "$SLURM_JOB_ID"]),
                &["one", "/p/s.sh", "one", "one", "$(SLURM_JOB_ID)", "7"],
            ),
            (Some(&["~/x", "$A"]), Some(&["~/x"]), &["~/x", "$A", "/p/s.sh", "/home/u/x"]),
            (None, Some(&["$1", "$@", "${A:-d}", "$(date)"]), &["/p/s.sh", "$1", "$@", "${A:-d}", "$(date)"]),
            (None, Some(&["$$A", "$NONE"]), &["/p/s.sh", "$A", "$NONE"]),
        ];
        for (command, args, wanted) in cases {
            assert_eq!(made(command, args, Expand::Jiriaf), wanted, "{command:?} {args:?}");
        }
    }

    #[test]
    fn kubernetes_mode_replaces_nothing_of_jiriafs() {
        assert_eq!(
            made(None, Some(&["~/x", "$A", "$(A)"]), Expand::Kubernetes),
            ["/p/s.sh", "~/x", "$A", "one"]
        );
    }

    proptest! {
        #[test]
        fn every_argument_stays_one_argument(args in prop::collection::vec(".{0,12}", 0..6)) {
            let texts: Vec<&str> = args.iter().map(String::as_str).collect();
            prop_assume!(!args.iter().any(|text| text.contains('\0')));
            prop_assert_eq!(made(Some(&["bash"]), Some(&texts), Expand::Jiriaf).len(), args.len() + 2);
        }
    }
}
