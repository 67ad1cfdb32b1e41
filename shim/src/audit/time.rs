//! Moments as RFC 3339 writes them, in UTC.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use time::{
    Date, OffsetDateTime, format_description::well_known::Rfc3339, macros::format_description,
};

/// 9999-12-31T23:59:59Z: the last second that four digits of a year can name.
const LAST: Duration = Duration::from_secs(253_402_300_799);

/// `2026-11-30T01:31:29.123456Z`: always as long, so that the order of texts is that of moments.
pub fn written(moment: SystemTime) -> String {
    let format =
        format_description!("[year]-[month]-[day]T[hour]:[minute]:[second].[subsecond digits:6]Z");
    let since = moment.duration_since(UNIX_EPOCH).unwrap_or_default();
    let moment = OffsetDateTime::UNIX_EPOCH + since.min(LAST);
    moment.format(format).expect("each of these has a name")
}

/// Reads a moment as a person writes it: RFC 3339, a date alone (its beginning, in UTC), or how
/// long ago: `90s`, `10m`, `2h`, `3d`.
pub fn read(text: &str, now: SystemTime) -> Option<SystemTime> {
    if let Some(ago) = ago(text) {
        return now.checked_sub(ago);
    }
    let moment = match text.split_once(['T', 't', ' ']) {
        Some(_) => OffsetDateTime::parse(text, &Rfc3339).ok()?,
        None => {
            let day = Date::parse(text, format_description!("[year]-[month]-[day]"));
            day.ok()?.midnight().assume_utc()
        }
    };
    let since = moment.unix_timestamp_nanos();
    // A file's order is that of microseconds.
    let micros = u64::try_from(since.div_euclid(1000)).ok()?;
    UNIX_EPOCH.checked_add(Duration::from_micros(micros))
}

fn ago(text: &str) -> Option<Duration> {
    let unit = match text.chars().last()? {
        's' => 1,
        'm' => 60,
        'h' => 60 * 60,
        'd' => 24 * 60 * 60,
        _ => return None,
    };
    let count: u64 = text[..text.len() - 1].parse().ok()?;
    count.checked_mul(unit).map(Duration::from_secs)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(secs: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(secs)
    }

    #[test]
    fn moments_are_written_as_date_writes_them() {
        // `date -u -d @N +%FT%TZ`
        for (secs, text) in [
            (0, "1970-01-01T00:00:00"),
            (951_782_400, "2000-02-29T00:00:00"),
            (1_078_012_799, "2004-02-28T23:59:59"),
            (1_796_002_289, "2026-11-30T01:31:29"),
            (4_107_542_400, "2100-03-01T00:00:00"),
            (253_402_300_799, "9999-12-31T23:59:59"),
        ] {
            assert_eq!(written(at(secs)), format!("{text}.000000Z"));
            assert_eq!(read(&format!("{text}Z"), at(0)), Some(at(secs)));
        }
        assert!(written(at(u64::MAX >> 2)).starts_with("9999-12-31T"));
    }

    #[test]
    fn what_is_written_is_read() {
        let mut moment = UNIX_EPOCH;
        while moment < at(8_000_000_000) {
            assert_eq!(read(&written(moment), at(0)), Some(moment));
            moment += Duration::from_micros(86_399_123_457 * 3);
        }
    }

    #[test]
    fn people_write_moments_in_several_ways() {
        let now = at(1_000_000);
        for (text, secs) in [
            ("90s", 1_000_000 - 90),
            ("2h", 1_000_000 - 7200),
            ("1d", 1_000_000 - 86_400),
            ("1970-01-02", 86_400),
            ("1970-01-02 03:00:00+02:00", 86_400 + 3600),
            ("1970-01-02T00:00:00.5-00:30", 86_400 + 1800),
        ] {
            let moment = read(text, now).unwrap_or_else(|| panic!("{text}"));
            assert_eq!(moment.duration_since(UNIX_EPOCH).unwrap().as_secs(), secs);
        }
    }

    #[test]
    fn nonsense_is_no_moment() {
        for text in [
            "",
            "h",
            "yesterday",
            "-1h",
            "99999999999999999999s",
            "18446744073709551615d",
            "9m9",
            "2026-02-29",
            "2026-13-01",
            "2026-00-10",
            "2026-1-1",
            "10000-01-01",
            "1969-12-31",
            "2026-01-01T24:00:00Z",
            "2026-01-01T00:00Z",
            "2026-01-01T00:00:00",
            "1970-01-01T00:00:00+01:00",
            "2026-01-01T00:00:00.Z",
            "2026-01-01T00:00:00.éZ",
            "2026-01-01T00:00:00+1:00",
            "é",
        ] {
            assert_eq!(read(text, at(1_000_000)), None, "{text}");
        }
    }
}
