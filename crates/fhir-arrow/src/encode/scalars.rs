//! FHIR primitives → Arrow values.

/// A decimal as the table holds it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Decimal {
    /// The value times 10⁶, rounded half up; `None` where it has more than 26 integer digits.
    pub value: Option<i128>,
    /// Digits after the point as written, exponent applied; never negative.
    pub scale: i32,
    /// True if the value is all that was written.
    pub exact: bool,
}

/// Places after the point that the table keeps.
const PLACES: i64 = 6;
/// decimal(32,6) has room for this many digits before the point.
const INTEGER_DIGITS: i64 = 26;

/// Reads the text of a JSON number. `None` only where it is not one.
pub(crate) fn parse_decimal(text: &[u8]) -> Option<Decimal> {
    let (negative, unsigned) = match text.strip_prefix(b"-") {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let (mantissa, exponent) = match unsigned.iter().position(|b| matches!(b, b'e' | b'E')) {
        Some(at) => (&unsigned[..at], parse_exponent(&unsigned[at + 1..])?),
        None => (unsigned, 0),
    };
    let (integer, fraction) = match mantissa.iter().position(|b| *b == b'.') {
        Some(at) => (&mantissa[..at], &mantissa[at + 1..]),
        None => (mantissa, &[][..]),
    };
    if integer.is_empty() && fraction.is_empty() {
        return None;
    }
    let mut digits = integer.iter().chain(fraction).copied();
    let leading_zeros = digits.clone().take_while(|b| *b == b'0').count() as i64;
    if digits.clone().any(|b| !b.is_ascii_digit()) {
        return None;
    }
    let scale = (fraction.len() as i64).saturating_sub(exponent).clamp(0, i32::MAX as i64) as i32;
    let all = (integer.len() + fraction.len()) as i64;
    if leading_zeros == all {
        return Some(Decimal { value: Some(0), scale, exact: true });
    }
    // Digits before the point, those of the leading zeros not counted.
    let before_point = (integer.len() as i64).saturating_add(exponent) - leading_zeros;
    if before_point > INTEGER_DIGITS {
        return Some(Decimal { value: None, scale, exact: false });
    }
    let kept = before_point + PLACES;
    if kept < 0 {
        return Some(Decimal { value: Some(0), scale, exact: false });
    }
    let mut significant = digits.by_ref().skip(leading_zeros as usize);
    let mut value: i128 = 0;
    for _ in 0..kept {
        value = value * 10 + i128::from(significant.next().unwrap_or(b'0') - b'0');
    }
    let next = significant.next().unwrap_or(b'0');
    let exact = next == b'0' && significant.all(|digit| digit == b'0');
    if next >= b'5' {
        value += 1;
    }
    if value >= 10i128.pow((INTEGER_DIGITS + PLACES) as u32) {
        return Some(Decimal { value: None, scale, exact: false });
    }
    Some(Decimal { value: Some(if negative { -value } else { value }), scale, exact })
}

fn parse_exponent(text: &[u8]) -> Option<i64> {
    let (negative, digits) = match text.first()? {
        b'-' => (true, &text[1..]),
        b'+' => (false, &text[1..]),
        _ => (false, text),
    };
    let mut value: i64 = 0;
    for digit in digits {
        // Saturates far beyond any exponent that changes the result.
        value = value.saturating_mul(10).saturating_add(i64::from(digit.wrapping_sub(b'0'))).min(1 << 40);
    }
    Some(if negative { -value } else { value })
}

/// Reads the text of a JSON number that must be a whole one within 32 bits.
pub(crate) fn parse_i32(text: &[u8]) -> Option<i32> {
    std::str::from_utf8(text).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decimal(text: &str) -> (Option<i128>, i32) {
        let read = parse_decimal(text.as_bytes()).unwrap();
        (read.value, read.scale)
    }

    #[test]
    fn decimals_as_written() {
        assert_eq!(decimal("1.00"), (Some(1_000_000), 2));
        assert_eq!(decimal("-0.5"), (Some(-500_000), 1));
        assert_eq!(decimal("1E3"), (Some(1_000_000_000), 0));
        assert_eq!(decimal("1E-22"), (Some(0), 22));
        assert_eq!(decimal("5e-7"), (Some(1), 7));
        assert_eq!(decimal("4e-7"), (Some(0), 7));
        assert_eq!(decimal("0.0000005"), (Some(1), 7));
        assert_eq!(decimal("-0.0000005"), (Some(-1), 7));
        assert_eq!(decimal("1.2345675"), (Some(1_234_568), 7));
        assert_eq!(decimal("0e400"), (Some(0), 0));
        for (text, exact) in [
            ("1.2345670", true),
            ("1.2345671", false),
            ("4e-7", false),
            ("1e-9", false),
            ("0.000", true),
            ("1e30", false),
        ] {
            assert_eq!(parse_decimal(text.as_bytes()).unwrap().exact, exact, "{text}");
        }
        assert_eq!(decimal("12345678901234567890123456"), (Some(12_345_678_901_234_567_890_123_456_000_000), 0));
        assert_eq!(decimal("123456789012345678901234567"), (None, 0));
        assert_eq!(decimal("99999999999999999999999999.9999999"), (None, 7));
        assert_eq!(decimal("1e99999999999999999999"), (None, 0));
        assert_eq!(decimal(&format!("0.{}", "1".repeat(1_000_000))).0, Some(111_111));
    }
}
