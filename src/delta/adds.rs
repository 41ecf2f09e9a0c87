//! Data files as add actions: their statistics, and copies without some of their rows.

use deltalake::kernel::Add;
use futures::TryStreamExt;
use object_store::ObjectStoreExt;
use object_store::path::Path;
use roaring::RoaringTreemap;
use serde_json::{Value, json};

use super::keys::{rows, selection};
use super::staging::StagedFile;
use super::table::{Table, storage};
use crate::error::Result;
use crate::messages::RowKey;

fn new_add(path: &Path, size: u64, stats: Value) -> Add {
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
    let mut stats = json!({ "numRecords": staged.rows, "tightBounds": true });
    let (mut min, mut max) = (json!({}), json!({}));
    if let Some((least, greatest)) = &staged.id_range {
        min["id"] = json!(least);
        max["id"] = json!(greatest);
        stats["nullCount"] = json!({ "id": 0 });
    }
    if let Some((first, last)) = staged.updated
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
    new_add(&staged.path, staged.size, stats)
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

/// A copy of the file at `path`, `size` bytes long, without the rows that are gone, in their order, streamed.
pub(super) async fn rewrite(
    table: &Table,
    (path, size): (&Path, u64),
    gone: &RoaringTreemap,
    total: Option<u64>,
    run: &str,
) -> Result<Add> {
    use parquet::arrow::AsyncArrowWriter;
    use parquet::file::properties::WriterProperties;
    let failed = |error: &dyn std::fmt::Display| storage(error, &format!("{path} cannot be rewritten"));
    let total = match total {
        Some(total) => total,
        None => super::keys::row_count(&table.store(), path, size).await?,
    };
    let kept = (0..total).filter(|row| !gone.contains(*row));
    let mut batches = rows(&table.store(), path, size, selection(kept)).await?;
    let new_path = Path::from(format!("part-{run}-{}.zstd.parquet", uuid::Uuid::new_v4()));
    let writer = object_store::buffered::BufWriter::new(table.store(), new_path.clone());
    let properties = WriterProperties::builder()
        .set_compression(parquet::basic::Compression::ZSTD(Default::default()))
        .set_statistics_enabled(parquet::file::properties::EnabledStatistics::None)
        .set_offset_index_disabled(true)
        .build();
    let options =
        parquet::arrow::arrow_writer::ArrowWriterOptions::new().with_properties(properties).with_skip_arrow_metadata(true);
    let mut writer =
        AsyncArrowWriter::try_new_with_options(writer, batches.schema().clone(), options).map_err(|error| failed(&error))?;
    while let Some(batch) = batches.try_next().await.map_err(|error| failed(&error))? {
        writer.write(&batch).await.map_err(|error| failed(&error))?;
        if writer.in_progress_size() > 32 << 20 {
            writer.flush().await.map_err(|error| failed(&error))?;
        }
    }
    let written = writer.close().await.map_err(|error| failed(&error))?;
    let head = table.store().head(&new_path).await.map_err(|error| failed(&error))?;
    let stats = json!({ "numRecords": written.file_metadata().num_rows() });
    Ok(new_add(&new_path, head.size, stats))
}
