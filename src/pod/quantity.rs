//! Kubernetes quantities (`100m`, `1.5`, `2Gi`, `1e3`), read exactly.
//!
//! The rules are those of apimachinery's `pkg/api/resource/quantity.go`: nothing finer than a billionth
//! (what is finer is rounded away from zero), nothing larger than 2^63-1 (what is larger is cut to it).

use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

/// Billionths in one: the finest step of a quantity.
const NANO: i128 = 1_000_000_000;
/// The largest quantity that Kubernetes knows, 2^63-1, in billionths.
const LARGEST: i128 = i64::MAX as i128 * NANO;
/// More digits before the point than this are certainly more than 2^63-1 (19 digits), whatever the suffix,
/// and 10^30 still fits an i128.
const MOST_WHOLE_DIGITS: usize = 30;
/// As many digits behind the point are looked at one by one; of the rest only whether it is 0. Times 2^60
/// (`Ei`) they fit an i128.
const MOST_FRACTION_DIGITS: usize = 18;

/// A string that is no quantity.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "quantity {text:?} cannot be read ({problem}): wanted a number such as 2, 0.5, 100m, 512Mi, 2Gi, 1k or 1e3"
)]
pub struct QuantityError {
    /// The string as given, cut to 64 characters.
    pub text: String,
    /// What is wrong with it.
    pub problem: &'static str,
}

/// The exact value of a quantity, in billionths.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Amount(i128);

impl Amount {
    /// Nothing.
    pub const ZERO: Self = Self(0);

    /// So many whole units.
    #[must_use]
    pub fn of_units(units: i64) -> Self {
        Self(i128::from(units) * NANO)
    }

    /// So many thousandths.
    #[must_use]
    pub fn of_millis(millis: i64) -> Self {
        Self(i128::from(millis) * (NANO / 1_000))
    }

    /// In whole units, rounded away from zero, as Kubernetes' `Value()`.
    #[must_use]
    pub fn units(self) -> i64 {
        clamp(div_away(self.0, NANO))
    }

    /// In thousandths, rounded away from zero, as Kubernetes' `MilliValue()`.
    #[must_use]
    pub fn millis(self) -> i64 {
        clamp(div_away(self.0, NANO / 1_000))
    }

    /// Whether it is nothing.
    #[must_use]
    pub fn is_zero(self) -> bool {
        self.0 == 0
    }

    /// The sum, cut to the largest quantity.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        Self(self.0.saturating_add(other.0).clamp(-LARGEST, LARGEST))
    }
}

/// Reads a quantity.
///
/// # Errors
/// When `text` is not of the form that Kubernetes knows.
pub fn parse(text: &str) -> Result<Amount, QuantityError> {
    let bad = |problem| QuantityError { text: text.chars().take(64).collect(), problem };
    let (negative, rest) = match text.as_bytes().first() {
        None => return Err(bad("it is empty")),
        Some(b'-') => (true, &text[1..]),
        Some(b'+') => (false, &text[1..]),
        Some(_) => (false, text),
    };
    let end = rest.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(rest.len());
    let (number, suffix) = rest.split_at(end);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if fraction.contains('.') {
        return Err(bad("it has two points"));
    }
    if whole.is_empty() && fraction.is_empty() {
        return Err(bad("it does not begin with a number"));
    }
    let (exponent, binary) = suffix_of(suffix).map_err(bad)?;
    let digits: Vec<u8> = whole.bytes().chain(fraction.bytes()).map(|digit| digit - b'0').collect();
    let point = i64::try_from(whole.len()).unwrap_or(i64::MAX).saturating_add(exponent);
    let magnitude = magnitude(&digits, point, binary);
    Ok(Amount(if negative { -magnitude } else { magnitude }))
}

/// The value of `quantity` in thousandths of a CPU.
///
/// # Errors
/// When it cannot be read.
pub fn cpu_millis(quantity: &Quantity) -> Result<i64, QuantityError> {
    parse(&quantity.0).map(Amount::millis)
}

/// The value of `quantity` in bytes (or other whole units).
///
/// # Errors
/// When it cannot be read.
pub fn bytes(quantity: &Quantity) -> Result<i64, QuantityError> {
    parse(&quantity.0).map(Amount::units)
}

/// A number of bytes as Kubernetes writes it (BinarySI): in the largest unit in which it is whole.
#[must_use]
pub fn binary(bytes: u64) -> String {
    let units = [("Ti", 40), ("Gi", 30), ("Mi", 20), ("Ki", 10)];
    let whole = units.iter().find(|(_, shift)| bytes > 0 && bytes.trailing_zeros() >= *shift);
    whole.map_or_else(|| bytes.to_string(), |(unit, shift)| format!("{}{unit}", bytes >> shift))
}

/// `value / divisor`, rounded up, as a resourceFieldRef wants it (kubelet's `pkg/api/v1/resource/helpers.go`):
/// CPUs are divided in thousandths, all else in whole units. A divisor of 0 means 1.
#[must_use]
pub fn divided(resource: &str, value: Amount, divisor: Amount) -> i64 {
    let divisor = if divisor.is_zero() { Amount::of_units(1) } else { divisor };
    let (value, divisor) =
        if resource == "cpu" { (value.millis(), divisor.millis()) } else { (value.units(), divisor.units()) };
    let (value, divisor) = (i128::from(value), i128::from(divisor));
    let quotient = value.div_euclid(divisor);
    clamp(if value.rem_euclid(divisor) == 0 || divisor < 0 { quotient } else { quotient + 1 })
}

/// The decimal exponent and the binary shift of a suffix.
fn suffix_of(suffix: &str) -> Result<(i64, u32), &'static str> {
    Ok(match suffix {
        "" => (0, 0),
        "n" => (-9, 0),
        "u" => (-6, 0),
        "m" => (-3, 0),
        "k" => (3, 0),
        "M" => (6, 0),
        "G" => (9, 0),
        "T" => (12, 0),
        "P" => (15, 0),
        "E" => (18, 0),
        "Ki" => (0, 10),
        "Mi" => (0, 20),
        "Gi" => (0, 30),
        "Ti" => (0, 40),
        "Pi" => (0, 50),
        "Ei" => (0, 60),
        _ => {
            let exponent = suffix.strip_prefix(['e', 'E']).ok_or("its suffix is unknown")?;
            let exponent: i32 = exponent.parse().map_err(|_| "its exponent is no whole number")?;
            (i64::from(exponent), 0)
        }
    })
}

/// The value of decimal `digits` whose point stands after the `point`th (which may lie outside of them),
/// times 2^`binary`, in billionths.
fn magnitude(digits: &[u8], point: i64, binary: u32) -> i128 {
    let first = digits.iter().position(|digit| *digit != 0);
    let Some(first) = first else { return 0 };
    // Where the point stands, counted from the first digit that is not 0.
    let point = point.saturating_sub(i64::try_from(first).unwrap_or(i64::MAX));
    let digits = &digits[first..];
    let whole_digits = usize::try_from(point).unwrap_or(0);
    if whole_digits > MOST_WHOLE_DIGITS {
        return LARGEST;
    }
    let digit = |at: usize| i128::from(digits.get(at).copied().unwrap_or(0));
    let whole = (0..whole_digits).fold(0_i128, |sum, at| sum * 10 + digit(at));

    // Zeros between the point and the first digit.
    let gap = usize::try_from(point.saturating_neg()).unwrap_or(0);
    let taken = MOST_FRACTION_DIGITS.saturating_sub(gap);
    let fraction_digits = digits.get(whole_digits..).unwrap_or(&[]);
    let mut fraction = 0_i128;
    let mut unit = 10_i128.pow(u32::try_from(MOST_FRACTION_DIGITS.min(gap)).unwrap_or(0));
    for value in fraction_digits.iter().take(taken) {
        fraction = fraction * 10 + i128::from(*value);
        unit *= 10;
    }
    let finer = fraction_digits.iter().skip(taken).any(|digit| *digit != 0);

    let scale = 1_i128 << binary;
    let Some(whole) = whole.checked_mul(scale).and_then(|whole| whole.checked_mul(NANO)) else {
        return LARGEST;
    };
    let fraction = fraction * scale;
    let nanos = (fraction / unit) * NANO + div_away((fraction % unit) * NANO + i128::from(finer), unit);
    whole.saturating_add(nanos).min(LARGEST)
}

/// `value / by` (positive), rounded away from zero.
fn div_away(value: i128, by: i128) -> i128 {
    let quotient = value / by;
    if value % by == 0 { quotient } else { quotient + value.signum() }
}

fn clamp(value: i128) -> i64 {
    i64::try_from(value).unwrap_or(if value < 0 { i64::MIN } else { i64::MAX })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn quantities_have_their_exact_value() {
        for (text, millis, units) in [
            ("0", 0, 0),
            ("1", 1_000, 1),
            ("100m", 100, 1),
            ("1.5", 1_500, 2),
            ("+1.5", 1_500, 2),
            (".5", 500, 1),
            ("5.", 5_000, 5),
            ("-1.5", -1_500, -2),
            ("2Gi", 2_147_483_648_000, 2_147_483_648),
            ("1.5Gi", 1_610_612_736_000, 1_610_612_736),
            ("0.1Ki", 102_400, 103),
            ("5Ki", 5_120_000, 5_120),
            ("1e3", 1_000_000, 1_000),
            ("1E3", 1_000_000, 1_000),
            ("12e-1", 1_200, 2),
            ("1E", i64::MAX, 1_000_000_000_000_000_000),
            ("128974848", 128_974_848_000, 128_974_848),
            ("1k", 1_000_000, 1_000),
            ("1n", 1, 1),
            ("1u", 1, 1),
            ("0.0001n", 1, 1),
            ("0000000000000000000000000000000000000000000002", 2_000, 2),
            ("1.0000000000000000000000000000000000000000000", 1_000, 1),
            ("1.0000000000000000000000000000000000000000001", 1_001, 2),
            ("100Ei", i64::MAX, i64::MAX),
            ("1e99", i64::MAX, i64::MAX),
            ("0e99", 0, 0),
            ("1e-99", 1, 1),
            ("-100Ei", i64::MIN + 1, i64::MIN + 1),
            ("99999999999999999999999999999999999999999999999", i64::MAX, i64::MAX),
        ] {
            let amount = parse(text).expect(text);
            // The cut at 2^63-1 units leaves the thousandths of a negative one at the i64's own end.
            let wanted = if millis == i64::MIN + 1 { i64::MIN } else { millis };
            assert_eq!((amount.millis(), amount.units()), (wanted, units), "{text}");
        }
    }

    #[test]
    fn what_is_no_quantity_is_refused() {
        for text in [
            "", "-", ".", "x", "1x", "1 ", " 1", "1.2.3", "1ki", "1KI", "1mi", "1e", "1e1.5", "1ee3", "1-",
            "--1", "0x10", "1_000", "١", "1Ki3", "e3", "Ki",
        ] {
            assert!(parse(text).is_err(), "{text:?} was taken");
        }
    }

    #[test]
    fn a_divided_resource_is_rounded_up() {
        for (resource, value, divisor, wanted) in [
            ("cpu", "250m", "1", 1),
            ("cpu", "250m", "1m", 250),
            ("cpu", "1500m", "0", 2),
            ("memory", "64Mi", "1Mi", 64),
            ("memory", "65Mi", "64Mi", 2),
            ("memory", "1", "1Gi", 1),
            ("memory", "0", "1Gi", 0),
            ("ephemeral-storage", "1Gi", "0", 1_073_741_824),
        ] {
            let (value, divisor) = (parse(value).unwrap(), parse(divisor).unwrap());
            assert_eq!(divided(resource, value, divisor), wanted, "{resource} {value:?} {divisor:?}");
        }
    }

    proptest! {
        #[test]
        fn nothing_makes_the_parser_panic(text in "[-+]?[0-9.]{0,60}[eEkKmMnuGi]{0,2}[-+]?[0-9]{0,12}") {
            let _ = parse(&text);
        }

        #[test]
        fn any_string_is_read_or_refused(text in ".{0,40}") {
            let _ = parse(&text);
        }

        #[test]
        fn whole_numbers_and_thousandths_come_back(value in -1_000_000_000_000_i64..1_000_000_000_000) {
            prop_assert_eq!(parse(&value.to_string()).unwrap().units(), value);
            prop_assert_eq!(parse(&format!("{value}m")).unwrap().millis(), value);
        }

        #[test]
        fn dividing_rounds_up_by_less_than_one(value in 0_i64..1 << 40, divisor in 1_i64..1 << 20) {
            let got = divided("memory", Amount::of_units(value), Amount::of_units(divisor));
            prop_assert!(got * divisor >= value && (got - 1) * divisor < value || (got, value) == (0, 0));
        }
    }
}
