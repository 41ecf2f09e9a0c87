//! Rows that are read from data files → a new data file, streamed.

use std::collections::HashSet;

use arrow::array::{Array, AsArray, RecordBatch, StructArray};
use arrow::datatypes::{SchemaRef, TimestampMicrosecondType};
use deltalake::kernel::Add;
use futures::{Stream, StreamExt};
use object_store::ObjectStoreExt;
use object_store::buffered::BufWriter;
use object_store::path::Path;
use parquet::arrow::AsyncArrowWriter;
use parquet::arrow::arrow_writer::ArrowWriterOptions;
use parquet::file::metadata::RowGroupMetaData;
use parquet::file::properties::EnabledStatistics;
use parquet::schema::types::ColumnPath;

use super::adds::new_add;
use super::pages::usual_properties;
use super::staging::{id_range, sync_file};
use super::table::{Table, storage};
use crate::error::Result;

/// Rows of a row group, and bytes of it: as staged files have them, so that what a reader or a later match leaves out
/// is as fine.
const GROUP_ROWS: usize = 16 * 1024;
const GROUP_BYTES: usize = 8 << 20;

/// A data file that is being written.
pub(super) struct DataWriter {
    writer: AsyncArrowWriter<BufWriter>,
    path: Path,
    rows_in_group: usize,
    updated: Option<(i64, i64)>,
}

impl DataWriter {
    /// Begins a file of a run. `filtered` are the columns, by their Parquet path, of which statistics are kept.
    pub async fn create(table: &Table, run: &str, schema: &SchemaRef, filtered: &HashSet<String>) -> Result<Self> {
        let path = Path::from(format!("part-{run}-{}.zstd.parquet", uuid::Uuid::new_v4()));
        let writer = BufWriter::new(table.store(), path.clone());
        let id = ColumnPath::from("id");
        let mut properties = usual_properties()
            .set_column_statistics_enabled(id.clone(), EnabledStatistics::Chunk)
            .set_column_bloom_filter_enabled(id.clone(), true)
            .set_column_dictionary_enabled(id.clone(), false)
            .set_column_bloom_filter_max_ndv(id, GROUP_ROWS as u64);
        for column in filtered {
            let column = ColumnPath::new(column.split('.').map(str::to_owned).collect());
            properties = properties.set_column_statistics_enabled(column, EnabledStatistics::Chunk);
        }
        let options = ArrowWriterOptions::new().with_properties(properties.build()).with_skip_arrow_metadata(true);
        let writer = AsyncArrowWriter::try_new_with_options(writer, schema.clone(), options)
            .map_err(|error| storage(error, &format!("{path} cannot be written")))?;
        Ok(Self { writer, path, rows_in_group: 0, updated: None })
    }

    /// Bytes so far.
    pub fn size(&self) -> u64 {
        (self.writer.bytes_written() + self.writer.in_progress_size()) as u64
    }

    /// Appends rows.
    pub async fn write(&mut self, batch: &RecordBatch) -> Result<()> {
        let failed = |error| storage(error, "a data file cannot be written");
        self.updated = updated(batch, self.updated);
        self.writer.write(batch).await.map_err(failed)?;
        self.rows_in_group += batch.num_rows();
        if self.rows_in_group >= GROUP_ROWS || self.writer.in_progress_size() > GROUP_BYTES {
            self.writer.flush().await.map_err(failed)?;
            self.rows_in_group = 0;
        }
        Ok(())
    }

    /// Finishes the file and makes it durable.
    pub async fn close(mut self, table: &Table) -> Result<Add> {
        let failed = |error: &dyn std::fmt::Display| storage(error, &format!("{} cannot be finished", self.path));
        let metadata = self.writer.finish().await.map_err(|error| failed(&error))?;
        if let Some(folder) = table.local() {
            sync_file(folder.join(self.path.as_ref())).await.map_err(|error| failed(&error))?;
        }
        let size = table.store().head(&self.path).await.map_err(|error| failed(&error))?.size;
        let groups = metadata.row_groups();
        let rows = metadata.file_metadata().num_rows() as u64;
        Ok(new_add(&self.path, size, rows, id_range(groups).zip(id_nulls(groups)), self.updated))
    }

    /// Gives the file up.
    pub async fn discard(self) {
        // What stays behind, nothing refers to: vacuum takes it.
        let _ = self.writer.into_inner().abort().await;
    }

    /// Writes all of `batches` and finishes the file, or gives it up.
    pub async fn write_all(mut self, table: &Table, batches: impl Stream<Item = Result<RecordBatch>>) -> Result<Add> {
        let mut batches = std::pin::pin!(batches);
        while let Some(batch) = batches.next().await {
            let written = match batch {
                Ok(batch) => self.write(&batch).await,
                Err(error) => Err(error),
            };
            if let Err(error) = written {
                self.discard().await;
                return Err(error);
            }
        }
        self.close(table).await
    }
}

/// Rows without `id`.
fn id_nulls(groups: &[RowGroupMetaData]) -> Option<u64> {
    let nulls = groups.iter().map(|group| {
        let id = group.columns().iter().find(|column| column.column_path().string() == "id")?;
        id.statistics()?.null_count_opt()
    });
    nulls.sum()
}

/// Least and greatest `meta.lastUpdated`, those of `batch` included; `i64::MIN` for a row without.
fn updated(batch: &RecordBatch, before: Option<(i64, i64)>) -> Option<(i64, i64)> {
    let meta = batch.column_by_name("meta").and_then(|meta| meta.as_any().downcast_ref::<StructArray>());
    let times = meta.and_then(|meta| meta.column_by_name("lastUpdated")?.as_primitive_opt::<TimestampMicrosecondType>());
    let time = |row: usize| match (meta, times) {
        (Some(meta), Some(times)) if meta.is_valid(row) && times.is_valid(row) => times.value(row),
        _ => i64::MIN,
    };
    (0..batch.num_rows()).map(time).fold(before, |range, time| {
        let (first, last) = range.unwrap_or((time, time));
        Some((first.min(time), last.max(time)))
    })
}
