//! A bound on a number of things.

/// How many of a number of lines or rows something may happen to.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Limit {
    /// So many.
    Number(u64),
    /// That share of them.
    Share(f64),
    /// So many, or that share of them where it is more.
    NumberOrShare(u64, f64),
}

impl Limit {
    /// How many of `all`.
    pub fn of(self, all: u64) -> u64 {
        match self {
            Limit::Number(number) => number,
            Limit::Share(share) => (all as f64 * share) as u64,
            Limit::NumberOrShare(number, share) => number.max((all as f64 * share) as u64),
        }
    }
}
