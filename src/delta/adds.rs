//! Data files as add actions: their statistics, and copies without some of their rows.

use std::collections::HashSet;

use deltalake::kernel::Add;
use futures::TryStreamExt;
use object_store::path::Path;
use parquet::file::metadata::RowGroupMetaData;
use roaring::RoaringTreemap;
use serde_json::{Value, json};

use super::keys::{DataFile, OpenFile, selection};
use super::staging::StagedFile;
use super::table::{Table, storage};
use super::writer::DataWriter;
use crate::error::Result;
use crate::messages::RowKey;

/// The add action of a new file of `rows` rows. `ids` are the least and greatest `id` and the number of rows without one,
/// `updated` the least and greatest `meta.lastUpdated`, where they are known.
pub(super) fn new_add(
    path: &Path,
    size: u64,
    rows: u64,
    ids: Option<((String, String), u64)>,
    updated: Option<(i64, i64)>,
) -> Add {
    let mut stats = json!({ "numRecords": rows, "tightBounds": true });
    let (mut min, mut max) = (json!({}), json!({}));
    if let Some(((least, greatest), nulls)) = ids {
        min["id"] = json!(least);
        max["id"] = json!(greatest);
        stats["nullCount"] = json!({ "id": nulls });
    }
    if let Some((first, last)) = updated
        && first != RowKey::ABSENT
    {
        // The log keeps milliseconds: the greatest is rounded up, so that no reader skips a row.
        let text = |millis: i64| {
            chrono::DateTime::from_timestamp_millis(millis).map(|time| time.to_rfc3339_opts(chrono::SecondsFormat::Millis, true))
        };
        if let (Some(first), Some(last)) = (text(first.div_euclid(1000)), text(last.div_euclid(1000) + 1)) {
            min["meta"] = json!({ "lastUpdated": first });
            max["meta"] = json!({ "lastUpdated": last });
        }
    }
    stats["minValues"] = min;
    stats["maxValues"] = max;
    Add {
        path: path.to_string(),
        size: size as i64,
        modification_time: chrono::Utc::now().timestamp_millis(),
        data_change: true,
        stats: Some(stats.to_string()),
        ..Add::default()
    }
}

pub(super) fn staged_add(staged: &StagedFile) -> Add {
    let ids = staged.id_range.clone().map(|range| (range, 0));
    new_add(&staged.path, staged.size, staged.rows, ids, staged.updated)
}

/// Statistics of a file some of whose rows are gone: still bounds, no longer tight ones.
pub(super) fn loose_bounds(stats: &str) -> String {
    match serde_json::from_str::<Value>(stats) {
        Ok(Value::Object(mut members)) => {
            members.insert("tightBounds".into(), false.into());
            Value::Object(members).to_string()
        }
        _ => stats.to_owned(),
    }
}

/// A copy of `file` without the rows that are gone, in their order, streamed.
pub(super) async fn rewrite(table: &Table, file: &DataFile, gone: &RoaringTreemap, run: &str) -> Result<Add> {
    let open = OpenFile::open(table, file).await?;
    let batches = open.batches(selection((0..open.rows()).filter(|row| !gone.contains(*row))))?;
    let batches = batches.map_err(|error| storage(error, &format!("{} cannot be read", file.path)));
    let writer = DataWriter::create(table, run, open.schema(), &filtered(open.groups())).await?;
    writer.write_all(table, batches).await
}

/// The columns that have statistics in some row group.
pub(super) fn filtered(groups: &[RowGroupMetaData]) -> HashSet<String> {
    let columns = groups.iter().flat_map(|group| group.columns());
    columns.filter(|column| column.statistics().is_some()).map(|column| column.column_path().string()).collect()
}
