//! Rows that a full export does not bring: deleted by `reconcile`, and with all others replaced by `overwrite`.

use foundation::Limit;
use foundation::error::{Error, ErrorKind, Result};

/// Treatment of rows that a run does not bring.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum NotMatchedBySource {
    /// They stay.
    Keep,
    /// They are deleted, up to so many.
    Delete(Limit),
    /// They are deleted, up to so many, and every other row is replaced by what the run brings, newer or not.
    Overwrite(Limit),
}

impl NotMatchedBySource {
    /// An error where more of a table's `live` rows are absent than may be deleted.
    pub(crate) fn check(self, absent: u64, live: u64) -> Result<()> {
        let allowed = match self {
            NotMatchedBySource::Keep => return Ok(()),
            NotMatchedBySource::Delete(most) | NotMatchedBySource::Overwrite(most) => most.of(live),
        };
        if absent <= allowed {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::Data,
            format!(
                "{absent} of the table's {live} rows are not in the export, and max_deleted allows {allowed}: nothing \
                    was changed"
            ),
        )
        .with_hint("if they are gone from the server, run once with --set stages.merge.max_deleted=…"))
    }
}
