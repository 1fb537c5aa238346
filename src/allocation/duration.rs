//! How batch systems and their users write durations and memory sizes.

use std::time::Duration;

/// The longest time that is taken for one: ten years. Longer ones are typing errors, and would overflow the clock.
const LONGEST: Duration = Duration::from_secs(10 * 365 * 86_400);

/// A text that is not what was wanted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{given}` is not {wanted}")]
pub struct ParseError {
    /// The text, cut to a length that fits a message.
    pub given: String,
    /// What was wanted.
    pub wanted: &'static str,
}

impl ParseError {
    pub(super) fn new(given: &str, wanted: &'static str) -> Self {
        Self { given: given.chars().take(60).collect(), wanted }
    }
}

/// What `--walltime` says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Walltime {
    /// `0`: no walltime and alivetime labels.
    Zero,
    /// The pilot's time, counted from its first start.
    Limit(Duration),
}

const WALLTIME: &str = "a walltime: wanted are seconds (`7200`), `2h 30m`, `HH:MM:SS` or `D-HH:MM:SS`, \
     at most ten years, or `0` for none";

/// Reads a walltime as people write it: seconds, `2h 30m`, `HH:MM:SS`, `MM:SS`, `D-HH:MM:SS` (also `D-HH` and
/// `D-HH:MM`, as in sbatch(1)).
///
/// # Errors
/// Anything else, minutes or seconds over 59 below a larger unit, and more than ten years.
pub fn parse_walltime(text: &str) -> Result<Walltime, ParseError> {
    let error = || ParseError::new(text, WALLTIME);
    let text = text.trim();
    let duration = if text.bytes().all(|b| b.is_ascii_digit() || b == b':' || b == b'-') {
        parse_clock(text, Fields::Strict).ok_or_else(error)?
    } else {
        humantime::parse_duration(text).map_err(|_| error())?
    };
    match duration {
        Duration::ZERO => Ok(Walltime::Zero),
        longer if longer > LONGEST => Err(error()),
        limit => Ok(Walltime::Limit(limit)),
    }
}

/// Whether minutes and seconds may exceed 59 below a larger unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fields {
    /// They may not: for what people write.
    Strict,
    /// They may: for what a batch system answers.
    Lenient,
}

/// Reads `[D-]HH:MM:SS`, `MM:SS` or `SS`; after `D-` the first field is hours (`D-HH`, `D-HH:MM`). At most ten years.
pub(super) fn parse_clock(text: &str, fields: Fields) -> Option<Duration> {
    let (days, clock) = match text.split_once('-') {
        Some((days, clock)) => (Some(number(days)?), clock),
        None => (None, text),
    };
    let parts = clock.split(':').map(number).collect::<Option<Vec<u64>>>()?;
    let (hours, minutes, seconds) = match (days, parts.as_slice()) {
        (_, &[h, m, s]) => (h, m, s),
        (None, &[m, s]) => (0, m, s),
        (None, &[s]) => (0, 0, s),
        (Some(_), &[h, m]) => (h, m, 0),
        (Some(_), &[h]) => (h, 0, 0),
        _ => return None,
    };
    if fields == Fields::Strict {
        let below_hours = days.is_some() || parts.len() == 3;
        let below_minutes = below_hours || parts.len() == 2;
        if (days.is_some() && hours > 23) || (below_hours && minutes > 59) || (below_minutes && seconds > 59)
        {
            return None;
        }
    }
    let hours = days.unwrap_or(0).checked_mul(24)?.checked_add(hours)?;
    let minutes = hours.checked_mul(60)?.checked_add(minutes)?;
    let total = Duration::from_secs(minutes.checked_mul(60)?.checked_add(seconds)?);
    (total <= LONGEST).then_some(total)
}

/// Digits only: `u64::from_str` would take a sign.
fn number(text: &str) -> Option<u64> {
    if text.is_empty() || !text.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    text.parse().ok()
}

/// Reads a walltime as PBS and Torque write it: seconds, or `[[H]HH:]MM:SS` with unbounded hours (pbs_resources(7B)).
pub(super) fn parse_pbs_time(text: &str) -> Option<Duration> {
    let text = text.trim();
    // A number that went through JSON may have grown a fraction, and a fraction of a second is none to rely on.
    let whole = text.split_once('.').map_or(text, |(whole, _)| whole);
    (!whole.contains('-')).then(|| parse_clock(whole, Fields::Lenient)).flatten()
}

/// Writes whole seconds as `HH:MM:SS`, or `D-HH:MM:SS` from one day on.
#[must_use]
pub fn format_clock(duration: Duration) -> String {
    let seconds = duration.as_secs();
    let (days, hours, minutes) = (seconds / 86_400, seconds / 3600 % 24, seconds / 60 % 60);
    let clock = format!("{hours:02}:{minutes:02}:{:02}", seconds % 60);
    if days > 0 { format!("{days}-{clock}") } else { clock }
}

/// Reads a size as PBS writes it, in bytes: a number and one of b, kb, mb, gb, tb, pb (powers of 1024), or the same
/// with `w` for words of 8 bytes; no suffix is bytes (pbs_resources(7B), "size").
pub(super) fn parse_pbs_size(text: &str) -> Option<u64> {
    let text = text.trim().to_ascii_lowercase();
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (value, suffix) = (number(text.get(..digits)?)?, text.get(digits..)?);
    let (scale, unit) = match suffix.as_bytes() {
        [] => (0, b'b'),
        &[unit] => (0, unit),
        &[b'k', unit] => (1, unit),
        &[b'm', unit] => (2, unit),
        &[b'g', unit] => (3, unit),
        &[b't', unit] => (4, unit),
        &[b'p', unit] => (5, unit),
        _ => return None,
    };
    let unit = match unit {
        b'b' => 1,
        b'w' => 8,
        _ => return None,
    };
    value.checked_mul(1024u64.checked_pow(scale)?)?.checked_mul(unit)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn walltimes_are_read_in_every_form() {
        let table = [
            ("7200", 7200),
            (" 90 ", 90),
            ("2h 30m", 9000),
            ("2h30m", 9000),
            ("1 day", 86_400),
            ("01:30:00", 5400),
            ("100:00:00", 360_000),
            ("02:30", 150),
            ("1-02:03:04", 93_784),
            ("2-12", 216_000),
            ("2-12:30", 217_800),
        ];
        for (text, seconds) in table {
            assert_eq!(parse_walltime(text), Ok(Walltime::Limit(Duration::from_secs(seconds))), "{text}");
        }
        for text in ["0", "00:00:00", "0s", "0-00:00:00"] {
            assert_eq!(parse_walltime(text), Ok(Walltime::Zero), "{text}");
        }
    }

    #[test]
    fn what_is_no_walltime_is_refused_by_name() {
        let bad = [
            "",
            "-",
            ":",
            "-5",
            "+5",
            "1:75:00",
            "1:00:61",
            "1-24:00:00",
            "1:2:3:4",
            "1-1-1",
            "abc",
            "2x",
            "1.5",
            "11 years",
            "99999999999999999999",
            "99999999:00:00",
            "UNLIMITED",
        ];
        for text in bad {
            let error = parse_walltime(text).unwrap_err();
            assert!(error.to_string().contains(&format!("`{text}`")), "{error}");
            assert!(error.to_string().contains("HH:MM:SS"), "{error}");
        }
    }

    #[test]
    fn pbs_times_have_unbounded_hours_and_no_days() {
        let table = [
            ("00:05:00", Some(300)),
            ("25:01:01", Some(90_061)),
            ("100:00:00", Some(360_000)),
            ("90", Some(90)),
            ("90.0", Some(90)),
            ("00:90:00", Some(5400)),
            ("1-00:00:00", None),
            ("", None),
            ("soon", None),
        ];
        for (text, seconds) in table {
            assert_eq!(parse_pbs_time(text), seconds.map(Duration::from_secs), "{text}");
        }
    }

    #[test]
    fn pbs_sizes_are_powers_of_1024() {
        let table = [
            ("500mb", Some(500 << 20)),
            ("2gb", Some(2 << 30)),
            ("1048576b", Some(1 << 20)),
            ("512000kb", Some(512_000 << 10)),
            ("1tb", Some(1 << 40)),
            ("1PB", Some(1 << 50)),
            ("4kw", Some(32 << 10)),
            ("77", Some(77)),
            ("", None),
            ("mb", None),
            ("5xb", None),
            ("5m", None),
            ("99999999999pb", None),
        ];
        for (text, bytes) in table {
            assert_eq!(parse_pbs_size(text), bytes, "{text}");
        }
    }

    proptest! {
        #[test]
        fn no_text_makes_a_parser_panic(text in ".{0,40}") {
            let _ = parse_walltime(&text);
            let _ = parse_pbs_time(&text);
            let _ = parse_pbs_size(&text);
        }

        #[test]
        fn nothing_like_a_duration_makes_a_parser_panic(text in "[0-9:.\\- dhmskgtpbw]{0,40}") {
            let _ = parse_walltime(&text);
            let _ = parse_pbs_time(&text);
            let _ = parse_pbs_size(&text);
        }

        #[test]
        fn what_is_written_is_read_back(seconds in 1..=LONGEST.as_secs()) {
            let duration = Duration::from_secs(seconds);
            prop_assert_eq!(parse_walltime(&format_clock(duration)), Ok(Walltime::Limit(duration)));
            prop_assert_eq!(parse_walltime(&seconds.to_string()), Ok(Walltime::Limit(duration)));
            let human = humantime::format_duration(duration).to_string();
            prop_assert_eq!(parse_walltime(&human), Ok(Walltime::Limit(duration)));
            let hours = format!("{}:{:02}:{:02}", seconds / 3600, seconds / 60 % 60, seconds % 60);
            prop_assert_eq!(parse_pbs_time(&hours), Some(duration));
        }
    }
}
