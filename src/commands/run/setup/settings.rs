//! What is wrong with the settings as a whole; the command line has looked at each value by itself.

use super::SetupError;
use super::api::authorities_in;
use crate::certificates;
use crate::cli::RunArgs;
use crate::node::labels::check_node_name;

/// The checks that need neither network nor batch system; also made before the guardian starts anything.
///
/// # Errors
/// When a setting is no good: its flag, its value, and what is wanted.
pub(in crate::commands) fn check_settings(args: &RunArgs) -> Result<(), SetupError> {
    if let Some(name) = args.node_name.as_deref() {
        check_node_name(name).map_err(|error| SetupError::Setting(error.to_string()))?;
    }
    // The API server takes one taint of a key and an effect (validateNodeTaints, pkg/apis/core/validation).
    for (at, taint) in args.taints.iter().enumerate() {
        if let Some(other) =
            args.taints[..at].iter().find(|other| (&other.key, &other.effect) == (&taint.key, &taint.effect))
        {
            return Err(SetupError::Setting(format!(
                "invalid values '{other}' and '{taint}' for '--taint': of a key and an effect one taint is wanted"
            )));
        }
    }
    if let (Some(cordon), Some(drain)) = (args.cordon_before, args.drain_before)
        && cordon < drain
    {
        return Err(SetupError::Setting(format!(
            "invalid value '{}s' for '--cordon-before' (JIRIAF_CORDON_BEFORE): a pilot that ends its pods takes no more; at \
             least the {} s of --drain-before are wanted",
            cordon.as_secs(),
            drain.as_secs()
        )));
    }
    match (&args.tls_cert_file, &args.tls_private_key_file) {
        (None, None) => {}
        (Some(certificate), Some(key)) => {
            certificates::pair::from_files(certificate, key).map_err(|error| {
                SetupError::Setting(format!(
                    "invalid values for '--tls-cert-file' and '--tls-private-key-file': {error}"
                ))
            })?;
        }
        _ => {
            return Err(SetupError::Setting(
                "--tls-cert-file and --tls-private-key-file are given together or not at all".to_owned(),
            ));
        }
    }
    if let Some(file) = &args.client_ca_file {
        authorities_in(file)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::run_args;

    #[test]
    fn settings_that_do_not_go_together_are_named_with_what_is_wanted() {
        let table: [(&[&str], &[&str]); 5] = [
            (&["--node-name", "Not_A_Name"], &["Not_A_Name", "--node-name", "lower-case"]),
            (&["--taint", "a=1:NoSchedule,b:NoSchedule,a=2:NoSchedule"], &["a=1:", "a=2:", "--taint"]),
            (&["--cordon-before", "20s", "--drain-before", "1m"], &["'20s'", "--cordon-before", "60 s"]),
            (&["--tls-cert-file", "/dev/null"], &["--tls-private-key-file", "together"]),
            (
                &["--tls-cert-file", "/nonexistent", "--tls-private-key-file", "/dev/null"],
                &["/nonexistent", "--tls-cert-file", "PEM"],
            ),
        ];
        for (arguments, words) in table {
            let error = check_settings(&run_args(arguments)).unwrap_err();
            let text = error.to_string();
            assert_eq!(error.exit_code(), 2, "{text}");
            assert!(words.iter().all(|word| text.contains(word)), "{arguments:?}: {text}");
        }
        for good in [
            &["--taint", "a=1:NoSchedule,a=1:NoExecute"],
            // Alone, it is never less than the drain.
            &["--cordon-before", "20s"],
            &["--drain-before", "5m"],
        ] {
            assert!(check_settings(&run_args(good)).is_ok(), "{good:?}");
        }
    }
}
