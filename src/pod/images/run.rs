//! What is started in an image's place: an argument vector, an environment.

use std::path::Path;

use k8s_openapi::api::core::v1::Container;

use super::Found;
use crate::pod::command_line::expand_all;
use crate::pod::environment::{ConfigError, ContainerEnv, Vars};
use crate::pod::expansion::Expand;
use crate::pod::volumes::PlannedMount;

/// What is started.
#[derive(Clone, PartialEq, Eq)]
pub struct Run {
    /// Program and arguments.
    pub argv: Vec<String>,
    /// Its whole environment.
    pub env: Vars,
    /// Whether workingDir is a directory inside of the image, and none of the host.
    pub contained: bool,
}

/// Why nothing can be started.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RunError {
    /// Neither the pod nor the table names a program.
    #[error(
        "no command specified: image {image} has neither `entrypoint` nor `args` in the pilot's table of images; give the container a `command`"
    )]
    Nothing {
        /// The image.
        image: String,
    },
    /// Apptainer takes a bind as one text with separators.
    #[error("a volume is to be mounted from {source} to {target}: Apptainer cannot mount paths that hold `,` or `:`", source = .0.source.display(), target = .0.target.display())]
    Path(PlannedMount),
    /// A reference to a variable cannot be replaced.
    #[error("{0}")]
    Config(#[from] ConfigError),
}

impl RunError {
    /// The reason of the waiting container (kuberuntime_container.go).
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Nothing { .. } | Self::Path(_) => "CreateContainerError",
            Self::Config(_) => ConfigError::REASON,
        }
    }
}

/// What to start for a container whose image was found.
///
/// The pod's `command` takes the place of the entrypoint, and its `args` that of the image's, as everywhere in Kubernetes;
/// `$(NAME)` is replaced in both, and nothing else: such a pod was not written for JIRIAF.
///
/// # Errors
/// When there is nothing to run, or it cannot be written down.
pub fn run(
    found: &Found<'_>,
    container: &Container,
    env: &ContainerEnv,
    binds: &[PlannedMount],
) -> Result<Run, RunError> {
    let entry = found.entry;
    let command = container.command.as_deref().unwrap_or_default();
    let args = container.args.as_deref().unwrap_or_default();
    let own = |what, texts: &[String]| expand_all(what, texts, env, Expand::Kubernetes);
    let (command, given) = (own("command", command)?, own("args", args)?);
    let program = if command.is_empty() { entry.entrypoint.clone() } else { command.clone() };
    // Docker drops the image's arguments where the program is another.
    let args = if command.is_empty() && given.is_empty() { entry.args.clone() } else { given };
    let has_program = !program.is_empty();
    let rest = program.into_iter().chain(args);
    match &entry.apptainer {
        None => {
            let argv: Vec<String> = rest.collect();
            if argv.first().is_none_or(String::is_empty) {
                return Err(RunError::Nothing { image: found.reference.full() });
            }
            Ok(Run { argv, env: env.vars.clone(), contained: false })
        }
        Some(apptainer) => {
            let image = apptainer.image(&found.reference);
            let dir = container.working_dir.as_deref().filter(|dir| !dir.is_empty()).unwrap_or("/");
            let dir = Path::new("/").join(dir).display().to_string();
            let verb = if has_program { "exec" } else { "run" };
            let mut argv = vec!["apptainer".to_owned(), verb.to_owned()];
            argv.extend(apptainer.options.iter().cloned());
            for bind in binds {
                argv.extend(["--bind".to_owned(), bind_text(bind)?]);
            }
            argv.extend(["--pwd".to_owned(), dir, image]);
            argv.extend(rest);
            Ok(Run { argv, env: inner(env), contained: true })
        }
    }
}

/// The environment of Apptainer, which hands on what bears its prefix: the pod's variables win over the image's, and no
/// value stands in an argument list.
fn inner(env: &ContainerEnv) -> Vars {
    let mut vars = env.vars.clone();
    vars.extend(env.declared.iter().map(|(name, value)| (format!("APPTAINERENV_{name}"), value.clone())));
    vars.sort_unstable();
    vars
}

fn bind_text(bind: &PlannedMount) -> Result<String, RunError> {
    let (source, target) = (bind.source.display().to_string(), bind.target.display().to_string());
    if [&source, &target].iter().any(|path| path.contains([',', ':'])) {
        return Err(RunError::Path(bind.clone()));
    }
    Ok(format!("{source}:{target}{}", if bind.read_only { ":ro" } else { "" }))
}

#[cfg(test)]
mod tests {
    use super::super::{Images, parse};
    use super::*;

    fn env() -> ContainerEnv {
        let pairs = |pairs: &[(&str, &str)]| {
            pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
        };
        ContainerEnv {
            vars: pairs(&[("A", "one"), ("HOME", "/home/u"), ("PATH", "/bin")]),
            declared: pairs(&[("A", "one")]),
            skipped: Vec::new(),
        }
    }

    fn table(text: &str) -> Images {
        parse(Path::new("t"), text).unwrap()
    }

    fn list(texts: &[&str]) -> Vec<String> {
        texts.iter().map(|text| (*text).to_owned()).collect()
    }

    fn made(
        images: &Images,
        command: &[&str],
        args: &[&str],
        binds: &[PlannedMount],
    ) -> Result<Run, RunError> {
        let container =
            Container { command: Some(list(command)), args: Some(list(args)), ..Container::default() };
        let found = images.find("quay.io/org/app:v1", std::iter::empty()).unwrap();
        run(&found, &container, &env(), binds)
    }

    #[test]
    fn command_and_args_take_the_images_place() {
        type List = &'static [&'static str];
        let images = table("images: [{name: '**', entrypoint: [sh, -e], args: [x, '$(A)']}]");
        let table: [(List, List, List); 5] = [
            (&[], &[], &["sh", "-e", "x", "$(A)"]),
            (&[], &["y", "$(A) $A ~ $$(A)"], &["sh", "-e", "y", "one $A ~ $(A)"]),
            (&["p"], &[], &["p"]),
            (&["$(A)"], &["q"], &["one", "q"]),
            (&["p"], &[""], &["p", ""]),
        ];
        for (command, args, wanted) in table {
            let run = made(&images, command, args, &[]).unwrap();
            assert_eq!(run.argv, wanted, "{command:?} {args:?}");
            assert_eq!(run.env, env().vars);
        }
    }

    #[test]
    fn without_an_entrypoint_the_arguments_are_the_program() {
        let images = table("images: [{name: '**', args: [sh]}]");
        assert_eq!(made(&images, &[], &[], &[]).unwrap().argv, ["sh"]);
        assert_eq!(made(&images, &[], &["sleep", "9"], &[]).unwrap().argv, ["sleep", "9"]);
    }

    #[test]
    fn nothing_to_run_is_told() {
        let images = table("images: [{name: '**'}]");
        for (command, args) in [(&[][..], &[][..]), (&[], &[""]), (&[""], &[])] {
            let error = made(&images, command, args, &[]).err().unwrap();
            assert_eq!(error.reason(), "CreateContainerError");
            assert!(error.to_string().contains("no command specified: image quay.io/org/app:v1"), "{error}");
        }
    }

    #[test]
    fn apptainer_gets_binds_and_the_pods_variables() {
        let images = table(
            "images: [{name: '**', run: apptainer, image: '/sif/{name}-{tag}.sif', options: [--nv], args: [d]}]",
        );
        let bind = |source: &str, target: &str, read_only| PlannedMount {
            source: source.into(),
            target: target.into(),
            read_only,
            real: false,
        };
        let binds = [bind("/p/volumes/v", "/data", false), bind("/p/c/etc", "/etc/x", true)];
        let head = |verb| {
            list(&[
                "apptainer",
                verb,
                "--nv",
                "--bind",
                "/p/volumes/v:/data",
                "--bind",
                "/p/c/etc:/etc/x:ro",
                "--pwd",
                "/",
                "/sif/app-v1.sif",
            ])
        };
        for (command, args, verb, tail) in [
            (&["p"][..], &["q"][..], "exec", &["p", "q"][..]),
            (&[], &["q"], "run", &["q"]),
            (&[], &[], "run", &["d"]),
        ] {
            let run = made(&images, command, args, &binds).unwrap();
            let wanted: Vec<String> = head(verb).into_iter().chain(list(tail)).collect();
            assert_eq!(run.argv, wanted);
            let names: Vec<&str> = run.env.iter().map(|(name, _)| name.as_str()).collect();
            assert_eq!(names, ["A", "APPTAINERENV_A", "HOME", "PATH"]);
        }
        let error = made(&images, &["p"], &[], &[bind("/p/a,b", "/x", false)]).err().unwrap();
        assert!(error.to_string().contains("/p/a,b"), "{error}");
        let pulled = table("images: [{name: '**', run: apptainer, entrypoint: [e]}]");
        let run = made(&pulled, &[], &[], &[]).unwrap();
        assert_eq!(run.argv, ["apptainer", "exec", "--pwd", "/", "docker://quay.io/org/app:v1", "e"]);
    }
}
