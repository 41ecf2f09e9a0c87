//! Rows that a full export does not bring: deleted by `reconcile`, and with all others replaced by `overwrite`.

use futures::TryStreamExt;
use roaring::RoaringTreemap;

use super::keys::{ByKey, DataFile, ids};
use super::table::Table;
use crate::error::{Error, ErrorKind, Result};

/// What becomes of rows that a run does not bring.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Absent {
    /// They stay.
    Stay,
    /// They are deleted, up to so many.
    Delete(MaxDeleted),
    /// They are deleted, up to so many, and every other row is replaced by what the run brings, newer or not.
    Replace(MaxDeleted),
}

/// How many rows of a table a run may delete for being absent.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum MaxDeleted {
    /// So many.
    Rows(u64),
    /// That share of the table's rows.
    Share(f64),
}

/// Rows of a table's files, by file.
#[derive(Debug, Default)]
pub(super) struct Found {
    /// Live rows whose id the run does not bring.
    pub absent: Vec<RoaringTreemap>,
    /// All live rows.
    pub live: Vec<RoaringTreemap>,
}

/// Goes through the ids of all `files`; an error where more rows are absent than may be deleted.
pub(super) async fn find<T>(
    table: &Table,
    files: impl Iterator<Item = &DataFile>,
    brought: &ByKey<T>,
    most: MaxDeleted,
) -> Result<Found> {
    let mut found = Found::default();
    for file in files {
        let (mut absent, mut live) = (RoaringTreemap::new(), RoaringTreemap::new());
        let mut batches = Box::pin(ids(&table.store(), file).await?);
        while let Some(batch) = batches.try_next().await? {
            for (row, key) in batch {
                if file.gone.contains(row) {
                    continue;
                }
                live.insert(row);
                if key.is_none_or(|key| !brought.contains_key(&key)) {
                    absent.insert(row);
                }
            }
        }
        found.absent.push(absent);
        found.live.push(live);
    }
    let count = |rows: &[RoaringTreemap]| rows.iter().map(RoaringTreemap::len).sum::<u64>();
    let (absent, live) = (count(&found.absent), count(&found.live));
    let allowed = match most {
        MaxDeleted::Rows(rows) => rows,
        MaxDeleted::Share(share) => (live as f64 * share) as u64,
    };
    if absent > allowed {
        return Err(Error::new(
            ErrorKind::Data,
            format!(
                "{absent} of the table's {live} rows are not in the export, and max_deleted allows {allowed}: nothing was changed; if they are gone from the server, raise stages.merge.max_deleted for one run"
            ),
        ));
    }
    Ok(found)
}
