//! How far this host's clock is from the API server's.
//!
//! The deadline is this host's time, a token's end and a Lease's age are the API server's.

use std::time::{Duration, SystemTime};

use super::finding::Finding;

/// More than this is worth knowing: alivetime may be promised to within 2 s (it never overstates by more).
const WARN: Duration = Duration::from_secs(2);

/// More than this takes most of a Lease's 40 s: the Node would look dead, or alive when it is not.
const FAIL: Duration = Duration::from_secs(30);

/// By how much the clocks differ at least, whatever the answer's way took.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Skew {
    /// They may be the same.
    None,
    /// This host's clock is behind the API server's.
    Behind(Duration),
    /// This host's clock is ahead of it.
    Ahead(Duration),
}

/// From when a request was sent and its answer came by this host's clock, and the answer's `Date`, which is a whole second
/// within which the answer was made (RFC 9110, 6.6.1).
pub fn skew(sent: SystemTime, received: SystemTime, date: SystemTime) -> Skew {
    let date_end = date + Duration::from_secs(1);
    if let Ok(behind) = date.duration_since(received)
        && !behind.is_zero()
    {
        return Skew::Behind(behind);
    }
    match sent.duration_since(date_end) {
        Ok(ahead) if !ahead.is_zero() => Skew::Ahead(ahead),
        _ => Skew::None,
    }
}

/// Reads a `Date` header.
pub fn parse_date(text: &str) -> Option<SystemTime> {
    jiff::fmt::rfc2822::DateTimeParser::new().parse_timestamp(text).ok().map(SystemTime::from)
}

/// What the skew means.
pub fn judge(skew: Skew) -> Finding {
    let (by, word) = match skew {
        Skew::None => return Finding::ok("clock", "agrees with the API server's"),
        Skew::Behind(by) => (by, "behind"),
        Skew::Ahead(by) => (by, "ahead of"),
    };
    let value = format!("{:.1} s {word} the API server's", by.as_secs_f64());
    let mend = "ask who runs the host (or the cluster) for a clock that NTP keeps";
    if by > FAIL {
        Finding::fail("clock", value, mend)
    } else if by > WARN {
        Finding::warn("clock", value, mend)
    } else {
        Finding::ok("clock", value)
    }
}

#[cfg(test)]
mod tests {
    use super::super::finding::Verdict;
    use super::*;

    #[test]
    fn only_what_the_way_does_not_explain_is_skew() {
        let at = |ms: u64| SystemTime::UNIX_EPOCH + Duration::from_millis(1_000_000_000 + ms);
        for (sent, received, date, wanted) in [
            (500, 600, 0, Skew::None),
            (990, 3_000, 1_000, Skew::None),
            (1_500, 1_600, 0, Skew::Ahead(Duration::from_millis(500))),
            (100, 200, 5_000, Skew::Behind(Duration::from_millis(4_800))),
            (40_000, 40_100, 1_000, Skew::Ahead(Duration::from_millis(38_000))),
        ] {
            assert_eq!(skew(at(sent), at(received), at(date)), wanted, "{sent} {received} {date}");
        }
    }

    #[test]
    fn skew_is_judged_by_what_it_breaks() {
        let verdict = |s| judge(Skew::Ahead(Duration::from_secs(s))).verdict;
        assert_eq!([verdict(1), verdict(3), verdict(31)], [Verdict::Ok, Verdict::Warn, Verdict::Fail]);
    }

    #[test]
    fn http_dates_are_read() {
        let date = parse_date("Sun, 06 Nov 1994 08:49:37 GMT").unwrap();
        assert_eq!(date, SystemTime::UNIX_EPOCH + Duration::from_secs(784_111_777));
        assert_eq!(parse_date("yesterday"), None);
    }
}
