//! A quantity's value and code → the canonical value and code that Pathling computes (`Ucum.getCanonical`).
//!
//! Pathling's library works with exact fractions and 38 digits, and its FHIRPath compares the stored canonical
//! values with those of literals, so 28 digits would not do: `72 '/min'` is 1.2 s⁻¹ and not 1.2000…024. The crate
//! reads the grammar and knows the units; its factors have 28 digits. The 49 units whose factor is no such decimal
//! (thirds, survey feet, π) stand here as fractions.

mod fractions;

use std::collections::HashMap;
use std::sync::Arc;

use crate::ucum::fractions::FRACTIONS;
use num_bigint::{BigInt, Sign};
use octofhir_ucum::{Case, Number, SpecialKind, UnitExpr, evaluate, lookup_unit, parse_expression};

/// A canonical quantity.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Canonical {
    /// Unscaled value and digits after the point; `None` where it has more than 38 digits before the point.
    pub value: Option<(i128, i32)>,
    /// Base units in alphabetical order: `g.m-1.s-2`; `1` for a mere number.
    pub code: Arc<str>,
}

/// Longest code that is looked at: UCUM's longest useful ones have some thirty characters and an annotation.
const MAX_CODE: usize = 512;
/// Codes remembered; an export has some hundred.
const MAX_KNOWN: usize = 4096;
/// Digits of decimal(38,0).
const DIGITS: u32 = 38;
/// Largest factor that is computed with, in bits: far beyond any unit of measure.
const MAX_BITS: u64 = 2048;

/// Units met so far.
#[derive(Debug, Default)]
pub(crate) struct Units {
    known: HashMap<Box<[u8]>, Option<Unit>>,
}

#[derive(Debug)]
struct Unit {
    code: Arc<str>,
    factor: Ratio,
    scale: Scale,
    /// The factor as mantissa × 10^exponent, where the unit is proper and its factor a short decimal.
    decimal: Option<(i64, i32)>,
}

/// Conversion of a value into a multiple of the factor.
#[derive(Debug)]
enum Scale {
    /// It is one.
    Ratio,
    /// `alpha × value + offset`: temperatures, in floats as Pathling's library adds them, or `36.7 'Cel'` in a query
    /// (there 309.84999999999997 K) would not equal the column.
    Offset(Ratio, f64),
    /// Through a function: levels, pH.
    Function(SpecialKind, f64),
}

#[derive(Debug, Clone)]
struct Ratio {
    num: BigInt,
    den: BigInt,
}

impl Units {
    /// The canonical form of the JSON number `value` in `code`. `None` where the code is not UCUM or has an arbitrary
    /// unit (`[iU]`), or the value is none of the unit's: Pathling gives null then.
    pub(crate) fn canonical(&mut self, value: &[u8], code: &[u8]) -> Option<Canonical> {
        if code.is_empty() || code.len() > MAX_CODE {
            return None;
        }
        if !self.known.contains_key(code) {
            if self.known.len() >= MAX_KNOWN {
                self.known.clear();
            }
            self.known.insert(code.into(), std::str::from_utf8(code).ok().and_then(Unit::read));
        }
        let unit = self.known.get(code)?.as_ref()?;
        let value = match unit.decimal.and_then(|factor| short(value, factor)) {
            Some(value) => Some(value),
            None => unit.long(value)?,
        };
        Some(Canonical { value, code: unit.code.clone() })
    }
}

/// `value` × `factor` in machine integers, where they hold it.
fn short(value: &[u8], (mantissa, exponent): (i64, i32)) -> Option<(i128, i32)> {
    let (negative, digits) = match value {
        [b'-', rest @ ..] => (true, rest),
        rest => (false, rest),
    };
    if digits.len() > 18 {
        return None;
    }
    let (mut unscaled, mut scale) = (0i64, None);
    for digit in digits {
        match digit {
            b'0'..=b'9' => {
                unscaled = unscaled * 10 + i64::from(digit - b'0');
                scale = scale.map(|scale| scale + 1);
            }
            b'.' => scale = Some(0),
            _ => return None,
        }
    }
    let unscaled = if negative { -unscaled } else { unscaled };
    let mut scale = scale.unwrap_or(0) - exponent;
    let mut product = i128::from(unscaled) * i128::from(mantissa);
    if product == 0 {
        return Some((0, 0));
    }
    while scale > 0 {
        // 64-bit division where it will do: most values are that small.
        let (quotient, rest) = match i64::try_from(product) {
            Ok(small) => (i128::from(small / 10), i128::from(small % 10)),
            Err(_) => (product / 10, product % 10),
        };
        if rest != 0 {
            break;
        }
        (product, scale) = (quotient, scale - 1);
    }
    if scale < 0 {
        product = product.checked_mul(10i128.checked_pow(scale.unsigned_abs())?)?;
        scale = 0;
    }
    (product.unsigned_abs() < 10u128.pow(DIGITS)).then_some((product, scale))
}

impl Unit {
    fn read(code: &str) -> Option<Unit> {
        let expression = parse_expression(code).ok()?;
        let term = evaluate(&expression).ok()?;
        if !term.arbitrary.is_empty() {
            return None;
        }
        let bases = octofhir_ucum::Dimension::BASE_UNITS.into_iter().zip(term.dim.0).filter(|(_, power)| *power != 0);
        let mut bases: Vec<(&str, i8)> = bases.collect();
        bases.sort_unstable();
        // As Pathling's library prints them: a plus before a power.
        let printed: Vec<String> = bases
            .iter()
            .map(|(base, power)| if *power == 1 { (*base).into() } else { format!("{base}{power:+}") })
            .collect();
        let code = if printed.is_empty() { "1".into() } else { printed.join(".").into() };
        let (factor, scale) = match term.special {
            None => (exact(&expression)?, Scale::Ratio),
            Some(special) => {
                let kind = special.unit.special;
                let offset = match kind {
                    SpecialKind::Celsius => Some(273.15),
                    SpecialKind::Fahrenheit => Some(459.67),
                    SpecialKind::Reaumur => Some(218.52),
                    _ => None,
                };
                let scale = match offset {
                    Some(offset) => Scale::Offset(number(special.scale)?, offset),
                    None => Scale::Function(kind, special.scale.to_f64()),
                };
                (atom(special.unit.code, special.unit.factor)?, scale)
            }
        };
        let decimal = matches!(scale, Scale::Ratio).then(|| factor.decimal()).flatten();
        Some(Unit { code, factor, scale, decimal })
    }

    /// Any value, with as many digits as it takes. The outer `None`: the value is none of the unit's.
    fn long(&self, value: &[u8]) -> Option<Option<(i128, i32)>> {
        let value = match &self.scale {
            Scale::Ratio => Ratio::read(value)?,
            Scale::Offset(alpha, offset) => {
                let sum = Ratio::read(value)?.times(alpha).float()? + offset;
                let kelvins = Ratio::read(format!("{sum:e}").as_bytes())?.times(&self.factor);
                // The library keeps twenty places of a float, and as many digits of the product.
                let digits = |value: f64| value.abs().log10().floor() as i64;
                let places = if sum == 0.0 { 20 } else { 20 + digits(sum) - digits(kelvins.float()?) };
                return Some(kelvins.rounded_to(u32::try_from(places).ok()?));
            }
            Scale::Function(kind, alpha) => {
                let proper = inverse(*kind, float(value)? * alpha)?;
                Ratio::read(format!("{proper:e}").as_bytes())?
            }
        };
        Some(value.times(&self.factor).rounded())
    }
}

fn float(value: &[u8]) -> Option<f64> {
    let value: f64 = std::str::from_utf8(value).ok()?.parse().ok()?;
    value.is_finite().then_some(value)
}

/// The proper value of a value on a special scale (UCUM §21 to §23); `None` outside of the function's domain.
fn inverse(kind: SpecialKind, value: f64) -> Option<f64> {
    let proper = match kind {
        SpecialKind::Lg => 10f64.powf(value),
        SpecialKind::LgTimes2 => 10f64.powf(value / 2.0),
        SpecialKind::Ln => value.exp(),
        SpecialKind::Ld => value.exp2(),
        SpecialKind::PH | SpecialKind::HpX => 10f64.powf(-value),
        SpecialKind::HpC => 100f64.powf(-value),
        SpecialKind::HpM => 1000f64.powf(-value),
        SpecialKind::HpQ => 50_000f64.powf(-value),
        SpecialKind::TanTimes100 => (value / 100.0).atan(),
        SpecialKind::Sqrt if value >= 0.0 => value * value,
        _ => return None,
    };
    proper.is_finite().then_some(proper)
}

/// Digits of π: as many as UCUM gives.
const PI: &[u8] = b"3.1415926535897932384626433832795028841971693993751058209749445923";

/// The exact factor of a unit atom, of which the crate has `factor`.
fn atom(code: &str, factor: Number) -> Option<Ratio> {
    match FRACTIONS.iter().find(|row| row.0 == code) {
        Some((_, num, den, power)) => {
            let fraction = Ratio { num: (*num).into(), den: (*den).into() };
            Some(fraction.times(&Ratio::read(PI)?.power(*power)?))
        }
        None => number(factor),
    }
}

fn number(number: Number) -> Option<Ratio> {
    let (digits, exponent) = number.to_integer_and_exponent();
    Some(Ratio { num: digits.into(), den: 1.into() }.times(&Ratio::ten(exponent.into())?))
}

/// The exact factor of a term of proper units.
fn exact(term: &UnitExpr) -> Option<Ratio> {
    match term {
        UnitExpr::Symbol(symbol) => {
            let (prefix, unit) = lookup_unit(symbol, Case::Sensitive)?;
            let factor = atom(unit.code, unit.factor)?;
            match prefix {
                Some(prefix) => Some(factor.times(&number(prefix.factor)?)),
                None => Some(factor),
            }
        }
        UnitExpr::Numeric(value) => number(*value),
        UnitExpr::Annotation(_) => Some(Ratio::one()),
        UnitExpr::Annotated(inner, _) => exact(inner),
        UnitExpr::Power(base, power) => exact(base)?.power(*power),
        UnitExpr::Product(factors) => {
            factors.iter().try_fold(Ratio::one(), |product, factor| product.bounded(&exact(factor)?))
        }
        UnitExpr::Quotient(over, under) => exact(over)?.bounded(&exact(under)?.power(-1)?),
        UnitExpr::Reciprocal(inner) => exact(inner)?.power(-1),
    }
}

impl Ratio {
    fn one() -> Self {
        Self { num: 1.into(), den: 1.into() }
    }

    fn bits(&self) -> u64 {
        self.num.bits().max(self.den.bits())
    }

    fn times(&self, other: &Ratio) -> Ratio {
        Ratio { num: &self.num * &other.num, den: &self.den * &other.den }
    }

    fn bounded(&self, other: &Ratio) -> Option<Ratio> {
        (self.bits() + other.bits() <= MAX_BITS).then(|| self.times(other))
    }

    fn power(&self, power: i32) -> Option<Ratio> {
        let times = power.unsigned_abs();
        if self.bits().checked_mul(times.into())? > MAX_BITS {
            return None;
        }
        let (num, den) = (self.num.pow(times), self.den.pow(times));
        match power {
            0.. => Some(Ratio { num, den }),
            _ if num.sign() == Sign::NoSign => None,
            _ if num.sign() == Sign::Minus => Some(Ratio { num: -den, den: -num }),
            _ => Some(Ratio { num: den, den: num }),
        }
    }

    /// 10^`power`.
    fn ten(power: i64) -> Option<Ratio> {
        Ratio { num: 10.into(), den: 1.into() }.power(i32::try_from(power).ok()?)
    }

    /// The text of a JSON number; `None` for one with more than some thousand digits.
    fn read(text: &[u8]) -> Option<Ratio> {
        let text = std::str::from_utf8(text).ok().filter(|text| text.len() < 1200)?;
        let (mantissa, exponent) = match text.split_once(['e', 'E']) {
            Some((mantissa, exponent)) => (mantissa, exponent.parse::<i32>().ok()?),
            None => (text, 0),
        };
        let (integer, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
        let digits: BigInt = format!("{integer}{fraction}").parse().ok()?;
        if digits.sign() == Sign::NoSign {
            return Some(Ratio { num: 0.into(), den: 1.into() });
        }
        Some(Ratio { num: digits, den: 1.into() }.times(&Ratio::ten(i64::from(exponent) - fraction.len() as i64)?))
    }

    /// As mantissa × 10^exponent, where that is exact and the mantissa short.
    fn decimal(&self) -> Option<(i64, i32)> {
        let (mut num, mut den, mut exponent) = (self.num.clone(), self.den.clone(), 0i32);
        let common = gcd(num.clone(), den.clone());
        (num, den) = (num / &common, den / common);
        // What is left below is a power of two times one of five: a power of ten once the rarer is made up for.
        for (prime, partner) in [(2u32, 5u32), (5, 2)] {
            while (&den % prime).sign() == Sign::NoSign {
                (den, num, exponent) = (den / prime, num * partner, exponent.checked_sub(1)?);
            }
        }
        if den != BigInt::from(1) {
            return None;
        }
        while num.sign() != Sign::NoSign && (&num % 10u32).sign() == Sign::NoSign {
            (num, exponent) = (num / 10u32, exponent + 1);
        }
        Some((i64::try_from(num).ok()?, exponent))
    }

    /// The nearest float.
    fn float(&self) -> Option<f64> {
        let den = self.den.to_string();
        // As it was written, where it is a decimal.
        if den.trim_end_matches('0') == "1" {
            return float(format!("{}e-{}", self.num, den.len() - 1).as_bytes());
        }
        let (unscaled, scale) = self.rounded()?;
        float(format!("{unscaled}e-{scale}").as_bytes())
    }

    /// Like [`Ratio::rounded`], with at most `places` digits after the point.
    fn rounded_to(&self, places: u32) -> Option<(i128, i32)> {
        let shift = BigInt::from(10).pow(places);
        let shifted = Ratio { num: &self.num * &shift, den: self.den.clone() };
        let doubled: BigInt = shifted.num.magnitude().clone().into();
        let den: BigInt = shifted.den.magnitude().clone().into();
        let whole = (doubled * 2u32 + &den) / (&den * 2u32);
        let whole = if self.num.sign() == Sign::Minus { -whole } else { whole };
        Ratio { num: whole, den: shift }.rounded()
    }

    /// At most 38 digits, rounded half up, without zeros at the end; `None` for more before the point.
    fn rounded(&self) -> Option<(i128, i32)> {
        if self.num.sign() == Sign::NoSign {
            return Some((0, 0));
        }
        let (negative, num) = (self.num.sign() == Sign::Minus, self.num.magnitude());
        let den = self.den.magnitude();
        let limit = num_bigint::BigUint::from(10u32).pow(DIGITS);
        // Digits before the point, give or take one: the loops below settle it.
        let mut scale =
            (f64::from(DIGITS) - (num.bits() as f64 - den.bits() as f64) * std::f64::consts::LOG10_2) as i64 + 1;
        loop {
            if scale < 0 {
                return None;
            }
            let shift = num_bigint::BigUint::from(10u32).pow(u32::try_from(scale).ok()?);
            let shifted = num * shift;
            let (mut quotient, rest) = (&shifted / den, &shifted % den);
            if rest * 2u32 >= *den {
                quotient += 1u32;
            }
            if quotient >= limit {
                scale -= 1;
                continue;
            }
            let mut value = u128::try_from(quotient).ok()?;
            while scale > 0 && value != 0 && value.is_multiple_of(10) {
                (value, scale) = (value / 10, scale - 1);
            }
            if value == 0 {
                scale = 0;
            }
            let value = i128::try_from(value).ok()?;
            return Some((if negative { -value } else { value }, i32::try_from(scale).ok()?));
        }
    }
}

fn gcd(mut a: BigInt, mut b: BigInt) -> BigInt {
    while b.sign() != Sign::NoSign {
        (a, b) = (b.clone(), a % b);
    }
    a
}

#[cfg(test)]
mod tests;
