//! Rows that a full export does not bring: deleted by `reconcile`, and with all others replaced by `overwrite`.

use futures::TryStreamExt;
use roaring::RoaringTreemap;

use super::keys::{ByKey, DataFile, ids};
use super::table::Table;
use crate::error::{Error, ErrorKind, Result};
use crate::messages::AtMost;

/// What becomes of rows that a run does not bring.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Absent {
    /// They stay.
    Stay,
    /// They are deleted, up to so many.
    Delete(AtMost),
    /// They are deleted, up to so many, and every other row is replaced by what the run brings, newer or not.
    Replace(AtMost),
}

/// Rows of a table's files, by file.
#[derive(Debug, Default)]
pub(super) struct Found {
    /// Live rows whose id the run does not bring.
    pub absent: Vec<RoaringTreemap>,
    /// How many rows there are, those included that are gone.
    pub rows: Vec<u64>,
    /// How many of all are live.
    pub live: u64,
}

/// Goes through the ids of all `files`; an error where more rows are absent than may be deleted.
pub(super) async fn find<T>(
    table: &Table,
    files: impl Iterator<Item = &DataFile>,
    brought: &ByKey<T>,
    most: AtMost,
) -> Result<Found> {
    let mut found = Found::default();
    for file in files {
        let (mut absent, mut rows) = (RoaringTreemap::new(), 0);
        let mut batches = Box::pin(ids(&table.store(), file).await?);
        while let Some(batch) = batches.try_next().await? {
            rows += batch.len() as u64;
            let missing = batch.into_iter().filter(|(_, key)| key.is_none_or(|key| !brought.contains_key(&key)));
            absent.extend(missing.map(|(row, _)| row));
        }
        found.absent.push(absent - &file.gone);
        found.rows.push(rows);
        found.live += rows - file.gone.len();
    }
    let absent: u64 = found.absent.iter().map(RoaringTreemap::len).sum();
    let (live, allowed) = (found.live, most.of(found.live));
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
