//! Instants with microseconds, as FHIR and Delta write them.

/// Reads a FHIR `instant`: microseconds since the epoch, what is finer cut off. `None` where it is not one
/// (R4 2.24.0.1: date, time to the second and offset are required).
pub fn parse_instant(text: &[u8]) -> Option<i64> {
    fn number(text: &[u8]) -> Option<i64> {
        text.iter().try_fold(0i64, |value, b| b.is_ascii_digit().then(|| value * 10 + i64::from(b - b'0')))
    }
    let at = |index: usize, byte: u8| text.get(index) == Some(&byte);
    if text.len() < 20 || !(at(4, b'-') && at(7, b'-') && at(10, b'T') && at(13, b':') && at(16, b':')) {
        return None;
    }
    let (year, month, day) = (number(&text[..4])?, number(&text[5..7])?, number(&text[8..10])?);
    let (hour, minute, second) = (number(&text[11..13])?, number(&text[14..16])?, number(&text[17..19])?);
    if hour > 23 || minute > 59 || second > 59 {
        return None;
    }
    let mut rest = &text[19..];
    let mut micros = 0;
    if let Some(fraction) = rest.strip_prefix(b".") {
        let digits = fraction.iter().take_while(|b| b.is_ascii_digit()).count();
        if digits == 0 {
            return None;
        }
        for digit in fraction[..digits].iter().chain(std::iter::repeat(&b'0')).take(6) {
            micros = micros * 10 + i64::from(digit - b'0');
        }
        rest = &fraction[digits..];
    }
    let offset_minutes = match rest {
        b"Z" => 0,
        [sign @ (b'+' | b'-'), h1, h2, b':', m1, m2] => {
            let (hours, minutes) = (number(&[*h1, *h2])?, number(&[*m1, *m2])?);
            if hours > 14 || minutes > 59 {
                return None;
            }
            (hours * 60 + minutes) * if *sign == b'-' { -1 } else { 1 }
        }
        _ => return None,
    };
    let date = chrono::NaiveDate::from_ymd_opt(year as i32, month as u32, day as u32)?;
    let days = i64::from(date.to_epoch_days());
    let seconds = days * 86_400 + hour * 3_600 + (minute - offset_minutes) * 60 + second;
    Some(seconds * 1_000_000 + micros)
}

/// An instant in microseconds since the epoch, as text.
pub fn instant_text(micros: i64) -> String {
    chrono::DateTime::from_timestamp_micros(micros)
        .map_or_else(|| micros.to_string(), |time| time.to_rfc3339_opts(chrono::SecondsFormat::AutoSi, true))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instants_with_any_offset_and_precision() {
        let zulu = parse_instant(b"2015-02-07T13:28:17.239Z").unwrap();
        assert_eq!(zulu, 1_423_315_697_239_000);
        assert_eq!(parse_instant(b"2015-02-07T13:28:17.239+02:00"), Some(zulu - 7_200_000_000));
        assert_eq!(parse_instant(b"2015-02-07T13:28:17.2391234567-05:30"), Some(zulu + 19_800_000_000 + 123));
        assert_eq!(parse_instant(b"1969-12-31T23:59:59Z"), Some(-1_000_000));
        for wrong in ["2015-02-07", "2015-02-30T00:00:00Z", "2015-02-07T13:28:17", "2015-02-07T25:00:00Z", "x"] {
            assert_eq!(parse_instant(wrong.as_bytes()), None, "{wrong}");
        }
    }
}
