//! Data files as add actions, and their statistics.

use deltalake::kernel::Add;
use object_store::path::Path;
use serde_json::{Value, json};

use crate::row::RowKey;
use crate::staging::StagedFile;

/// The add action of a new file of `rows` rows. `ids` are the least and greatest `id` and the number of rows without
/// one, `updated` the least and greatest `meta.lastUpdated`, where they are known.
pub(crate) fn new_add(
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
            chrono::DateTime::from_timestamp_millis(millis)
                .map(|time| time.to_rfc3339_opts(chrono::SecondsFormat::Millis, true))
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

pub(crate) fn staged_add(staged: &StagedFile) -> Add {
    let ids = staged.id_range.clone().map(|range| (range, 0));
    new_add(&staged.path, staged.size, staged.rows, ids, staged.updated)
}

/// Statistics of a file some of whose rows are gone: still bounds, no longer tight ones.
pub(crate) fn loose_bounds(stats: &str) -> String {
    match serde_json::from_str::<Value>(stats) {
        Ok(Value::Object(mut members)) => {
            members.insert("tightBounds".into(), false.into());
            Value::Object(members).to_string()
        }
        _ => stats.to_owned(),
    }
}
