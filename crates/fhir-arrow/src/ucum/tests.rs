//! Canonical values, compared with those of the reference library.

use super::*;

fn canonical(value: &str, code: &str) -> Option<(Option<(i128, i32)>, String)> {
    let found = Units::default().canonical(value.as_bytes(), code.as_bytes())?;
    Some((found.value, found.code.to_string()))
}

#[test]
fn as_pathlings_own_tests_expect() {
    assert_eq!(canonical("76", "kg"), Some((Some((76_000, 0)), "g".into())));
    assert_eq!(canonical("1", "mm"), Some((Some((1, 3)), "m".into())));
    assert_eq!(canonical("1.0", "mm"), Some((Some((1, 3)), "m".into())));
}

/// A line of the reference: value, code, then canonical code, unscaled value and scale, or `null`.
fn reference() -> Vec<Vec<&'static str>> {
    let lines: Vec<Vec<&str>> = include_str!("reference.tsv")
        .lines()
        .filter(|line| !line.starts_with('#'))
        .map(|line| line.split('\t').collect())
        .collect();
    assert!(lines.len() > 1_500);
    lines
}

// What Pathling's UCUM library says, for every unit of UCUM and hundreds of clinical codes. The numbers are compared,
// as Pathling compares them: it keeps zeros at the end of some (`1.20` of `72 /min`), ours have none.
#[test]
fn equals_the_reference() {
    let mut wrong = Vec::new();
    for line in reference() {
        let (value, code) = (line[0], line[1]);
        let ours = canonical(value, code);
        let same = match (&ours, line[2]) {
            (None, "null") => true,
            (Some((ours, our_code)), their_code) if our_code == their_code => match (ours, line[3]) {
                // Pathling's column holds no more than 38 digits either.
                (None, theirs) => theirs == "null" || theirs.len() > 38,
                (Some(ours), theirs) if theirs != "null" => {
                    same_number(*ours, (theirs.parse().unwrap(), line[4].parse().unwrap()), is_by_floats(code))
                }
                _ => false,
            },
            _ => false,
        };
        if !same && !DIFFERENCES.iter().any(|(known, _)| *known == code) {
            wrong.push(format!("{value} {code}: ours {ours:?}, reference {:?}", &line[2..]));
        }
    }
    assert!(wrong.is_empty(), "{} wrong:\n{}", wrong.len(), wrong.join("\n"));
}

/// Places in which the reference is not followed.
const DIFFERENCES: [(&str, &str); 5] = [
    ("Oe", "the reference inverts the oersted (`/[pi].A/m` is read left to right, UCUM §7.4)"),
    ("Gb", "defined by the oersted"),
    ("bit_s", "the reference squares where the definition says 2 to the power"),
    ("{}", "no UCUM: an annotation has at least one character (§6)"),
    ("{a}{b}", "no UCUM: a component has one annotation"),
];

/// Units whose values go through a function other than a sum, of which the reference keeps twenty places.
fn is_by_floats(code: &str) -> bool {
    Unit::read(code).is_some_and(|unit| matches!(unit.scale, Scale::Function(..)))
}

fn same_number(ours: (i128, i32), theirs: (i128, i32), floats: bool) -> bool {
    let (ours, theirs) = (Ratio::of(ours), Ratio::of(theirs));
    let (a, b) = (&ours.num * &theirs.den, &theirs.num * &ours.den);
    if !floats {
        return a == b;
    }
    // To a part in 10¹², or to the twenty places that the reference keeps.
    let difference = (&a - &b).magnitude().clone();
    let scaled = &difference * num_bigint::BigUint::from(10u64.pow(12));
    let places = difference * num_bigint::BigUint::from(10u64).pow(20);
    scaled <= *a.magnitude() || places <= (&ours.den * &theirs.den).magnitude() * 10u32
}

impl Ratio {
    fn plus(&self, other: &Ratio) -> Ratio {
        Ratio { num: &self.num * &other.den + &other.num * &self.den, den: &self.den * &other.den }
    }

    fn of((value, scale): (i128, i32)) -> Ratio {
        Ratio { num: value.into(), den: BigInt::from(10).pow(scale as u32) }
    }
}

// A new version of the crate must not bring a unit whose exact factor we do not have, nor may the table err.
#[test]
fn fractions_are_complete_and_agree_with_the_crate() {
    for unit in octofhir_ucum::get_all_units() {
        if unit.code == "%[slope]" {
            // The crate takes its definition `100tan(1 rad)` for radians; Pathling's library, and we, `deg` as its
            // function has it.
            continue;
        }
        let (digits, _) = unit.factor.to_integer_and_exponent();
        let ours = atom(unit.code, unit.factor).unwrap();
        let crates = number(unit.factor).unwrap();
        let difference = ours.times(&crates.power(-1).unwrap()).plus(&Ratio { num: (-1).into(), den: 1.into() });
        let bound = Ratio::ten(-26).unwrap();
        assert!(
            difference.num.magnitude() * bound.den.magnitude() <= difference.den.magnitude().clone(),
            "{}",
            unit.code
        );
        let listed = FRACTIONS.iter().any(|row| row.0 == unit.code);
        assert!(listed || digits.unsigned_abs() < 10u128.pow(27), "{} needs its exact fraction", unit.code);
    }
}

#[test]
fn short_and_long_agree() {
    for (value, code) in
        [("5.50", "mmol/L"), ("-0.001", "mg"), ("12345678.12345678", "km"), ("0", "kg"), ("100", "10*3/uL")]
    {
        let unit = Unit::read(code).unwrap();
        let short = short(value.as_bytes(), unit.decimal.unwrap()).unwrap();
        assert_eq!(unit.long(value.as_bytes()).unwrap(), Some(short), "{value} {code}");
    }
}

#[test]
fn hostile_codes_cost_nothing() {
    for code in
        ["m999999999", "10*99999", "(((((((((((((((((((((((((((((((((((((((((((((((((m", "Ym60.Ym60.Ym60", "\u{e9}", ""]
    {
        let _ = canonical("1", code);
    }
    assert_eq!(canonical("1e999999999", "kg"), None);
    assert_eq!(canonical(&"9".repeat(100_000), "kg"), None);
    assert_eq!(canonical(&"9".repeat(60), "kg"), Some((None, "g".into())));
}
