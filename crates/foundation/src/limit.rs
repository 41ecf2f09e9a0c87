//! A bound on a number of things.

use std::borrow::Cow;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};

/// Bound for a number of lines or rows. As text: `100`, or `0.5%`.
///
/// ```
/// use foundation::Limit;
///
/// assert_eq!(Limit::Percent(0.5).of(1_000), 5);
/// assert_eq!(Limit::CountOrPercent(100, 1.0).of(1_000), 100);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Written", into = "Written")]
pub enum Limit {
    /// A number of them.
    Count(u64),
    /// A share of them, from 0 to 100.
    Percent(f64),
    /// A number of them, or a share in percent where that is more. It cannot be written as text.
    CountOrPercent(u64, f64),
}

impl Limit {
    /// Returns how many of `all` it allows.
    pub fn of(self, all: u64) -> u64 {
        let share = |percent: f64| (all as f64 * percent / 100.0) as u64;
        match self {
            Limit::Count(count) => count,
            Limit::Percent(percent) => share(percent),
            Limit::CountOrPercent(count, percent) => count.max(share(percent)),
        }
    }
}

/// A limit as the pipeline file has it.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Written {
    Count(u64),
    Percent(String),
}

impl TryFrom<Written> for Limit {
    type Error = String;
    fn try_from(written: Written) -> Result<Self, String> {
        match written {
            Written::Count(count) => Ok(Limit::Count(count)),
            Written::Percent(text) => {
                let number = text.strip_suffix('%').and_then(|number| number.parse::<f64>().ok());
                let number = number.filter(|number| number.is_finite() && *number >= 0.0);
                number.map(Limit::Percent).ok_or_else(|| "not a share; write it as 1% or 0.5%".to_owned())
            }
        }
    }
}

impl From<Limit> for Written {
    fn from(limit: Limit) -> Self {
        match limit {
            Limit::Count(count) | Limit::CountOrPercent(count, _) => Written::Count(count),
            Limit::Percent(percent) => Written::Percent(format!("{percent}%")),
        }
    }
}

impl JsonSchema for Limit {
    fn schema_name() -> Cow<'static, str> {
        "Limit".into()
    }
    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "description": "A number of lines or rows, or a share of them.",
            "anyOf": [
                { "type": "integer", "format": "uint64", "minimum": 0, "description": "A number." },
                { "type": "string", "pattern": r"^\d+(\.\d+)?%$", "description": "A share, such as `0.5%`." },
            ],
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_and_shares() {
        assert_eq!(
            (Limit::Count(7).of(3), Limit::Percent(50.0).of(10), Limit::CountOrPercent(100, 1.0).of(20_000)),
            (7, 5, 200)
        );
        let limit = Limit::try_from(Written::Percent("0.5%".into())).unwrap();
        assert_eq!((limit, limit.of(1_000)), (Limit::Percent(0.5), 5));
        for wrong in ["5", "-1%", "x%", "%"] {
            assert!(Limit::try_from(Written::Percent(wrong.into())).is_err(), "{wrong}");
        }
    }
}
