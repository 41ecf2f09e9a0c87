//! A Parquet file in the table's folder that its log does not know yet, written row group by row group.
//!
//! Rows become pages elsewhere, as the bytes of one row group in memory. What is written is those bytes, with the
//! offsets in their metadata shifted: so one writer keeps up with any number of encoders.

use object_store::ObjectStoreExt;
use object_store::buffered::BufWriter;
use object_store::path::Path;
use parquet::file::metadata::{
    ColumnChunkMetaData, FileMetaData, ParquetMetaData, ParquetMetaDataWriter, RowGroupMetaData,
};
use parquet::file::statistics::Statistics;
use tokio::io::AsyncWriteExt;

use crate::table::{Table, storage};
use foundation::error::{Context, Error, ErrorKind, Result};
use foundation::fault_points::reached;

const MAGIC: &[u8] = b"PAR1";
pub(crate) const CREATED_BY: &str = concat!("fhirlake ", env!("CARGO_PKG_VERSION"));

/// A file that is being written.
pub(crate) struct NewFile {
    writer: BufWriter,
    path: Path,
    offset: u64,
    row_groups: Vec<RowGroupMetaData>,
    /// True if its end was written, or was to be.
    ended: bool,
}

/// A file that is whole and durable.
pub(crate) struct Finished {
    pub path: Path,
    pub size: u64,
    pub rows: u64,
    /// Least and greatest `id`, where the row groups' statistics know.
    pub id_range: Option<(String, String)>,
    /// Rows without `id`, where the row groups' statistics know.
    pub id_nulls: Option<u64>,
}

impl NewFile {
    /// Begins a file at `path` in the table's folder.
    pub(crate) async fn create(table: &Table, path: Path) -> Result<Self> {
        table.make_folder()?;
        // The smallest part that every store takes; less where parts cost nothing.
        let part = if table.local().is_some() { 1 << 20 } else { 5 << 20 };
        let mut writer = BufWriter::with_capacity(table.store(), path.clone(), part);
        writer.write_all(MAGIC).await.map_err(|error| storage(error, &format!("{path} cannot be written")))?;
        Ok(Self { writer, path, offset: MAGIC.len() as u64, row_groups: Vec::new(), ended: false })
    }

    /// Bytes so far.
    pub(crate) fn size(&self) -> u64 {
        self.offset
    }

    /// Appends row groups, whose offsets count from the start of `bytes`. All of a file's have the same columns.
    pub(crate) async fn append(&mut self, bytes: &[u8], metadata: &ParquetMetaData) -> Result<()> {
        for group in metadata.row_groups() {
            let (from, until) = extent(group);
            let range = usize::try_from(from).ok().zip(usize::try_from(until).ok());
            let bytes = range.and_then(|(from, until)| bytes.get(from..until));
            let bytes =
                bytes.ok_or_else(|| Error::new(ErrorKind::Internal, "a row group lies outside of its bytes"))?;
            self.writer
                .write_all(bytes)
                .await
                .map_err(|error| storage(error, &format!("{} cannot be written", self.path)))?;
            let shift = self.offset as i64 - from as i64;
            let moved = moved(group, shift, self.row_groups.len())
                .context(ErrorKind::Internal, "a row group's metadata does not fit")?;
            self.row_groups.push(moved);
            self.offset += until - from;
        }
        Ok(())
    }

    /// Bytes of memory that its footer takes so far: a row group of a thousand columns is a megabyte of it.
    pub(crate) fn footer_memory(&self) -> usize {
        // Its encodings and statistics come on top of a column's own.
        let of_column = size_of::<ColumnChunkMetaData>() + 256;
        self.row_groups.iter().map(|group| group.num_columns() * of_column).sum()
    }

    /// Writes the footer and makes the file durable.
    pub(crate) async fn close(mut self, table: &Table) -> Result<Finished> {
        let failed = |error: &dyn std::fmt::Display| storage(error, &format!("{} cannot be finished", self.path));
        let Some(first) = self.row_groups.first() else {
            return Err(Error::new(ErrorKind::Internal, "a data file without rows"));
        };
        reached("before a data file is whole");
        let schema = first.schema_descr_ptr();
        let rows: i64 = self.row_groups.iter().map(RowGroupMetaData::num_rows).sum();
        let (id_range, id_nulls) = (id_range(&self.row_groups), id_nulls(&self.row_groups));
        let file = FileMetaData::new(1, rows, Some(CREATED_BY.to_owned()), None, schema, None);
        let metadata = ParquetMetaData::new(file, std::mem::take(&mut self.row_groups));
        let mut footer = Vec::new();
        // Offsets of a footer written apart would be wrong only for page indexes, which our files leave out.
        ParquetMetaDataWriter::new(&mut footer, &metadata).finish().map_err(|error| failed(&error))?;
        let written = async {
            self.writer.write_all(&footer).await?;
            self.ended = true;
            self.writer.shutdown().await
        };
        if let Err(error) = written.await {
            let error = failed(&error);
            let (ended, path) = (self.ended, self.path.clone());
            self.discard().await;
            if ended {
                remove(table, &path).await;
            }
            return Err(error);
        }
        if let Some(folder) = table.local() {
            sync_file(folder.join(self.path.as_ref())).await.map_err(|error| failed(&error))?;
        }
        reached("a data file is whole");
        Ok(Finished { path: self.path, size: self.offset + footer.len() as u64, rows: rows as u64, id_range, id_nulls })
    }

    /// Gives the file up.
    pub(crate) async fn discard(mut self) {
        // One that has ended, well or not, must not be asked again: the writer panics. Nobody refers to the file; what
        // cannot be removed now, the next run's start or vacuum removes.
        if !self.ended {
            let _ = self.writer.abort().await;
        }
    }
}

/// Removes a file that no version names.
pub(crate) async fn remove(table: &Table, path: &Path) {
    if let Err(error) = table.store().delete(path).await
        && !matches!(error, object_store::Error::NotFound { .. })
    {
        tracing::warn!(file = %path, %error, "a file that was not committed could not be removed; vacuum will");
    }
}

pub(crate) async fn sync_file(path: std::path::PathBuf) -> std::io::Result<()> {
    let file = tokio::fs::File::open(path).await?;
    file.sync_all().await
}

/// First byte and end of a row group, its bloom filters included.
pub(crate) fn extent(group: &RowGroupMetaData) -> (u64, u64) {
    let mut from = u64::MAX;
    let mut until = 0;
    for column in group.columns() {
        let (start, length) = column.byte_range();
        from = from.min(start);
        until = until.max(start + length);
        if let (Some(at), Some(length)) = (column.bloom_filter_offset(), column.bloom_filter_length()) {
            until = until.max(at as u64 + length as u64);
        }
    }
    (from.min(until), until)
}

fn moved(group: &RowGroupMetaData, shift: i64, ordinal: usize) -> parquet::errors::Result<RowGroupMetaData> {
    let mut builder = RowGroupMetaData::builder(group.schema_descr_ptr())
        .set_num_rows(group.num_rows())
        .set_total_byte_size(group.total_byte_size())
        .set_file_offset(group.file_offset().unwrap_or(0) + shift);
    // An ordinal is 16 bits wide; a file with more row groups leaves it out.
    if let Ok(ordinal) = i16::try_from(ordinal) {
        builder = builder.set_ordinal(ordinal);
    }
    for column in group.columns() {
        let moved = column
            .clone()
            .into_builder()
            .set_data_page_offset(column.data_page_offset() + shift)
            .set_dictionary_page_offset(column.dictionary_page_offset().map(|at| at + shift))
            .set_bloom_filter_offset(column.bloom_filter_offset().map(|at| at + shift))
            .set_column_index_offset(None)
            .set_column_index_length(None)
            .set_offset_index_offset(None)
            .set_offset_index_length(None)
            .build()?;
        builder = builder.add_column_metadata(moved);
    }
    builder.build()
}

/// Least and greatest `id` by the row groups' statistics, where those are exact and short enough for the log.
pub(crate) fn id_range(groups: &[RowGroupMetaData]) -> Option<(String, String)> {
    let mut range: Option<(String, String)> = None;
    for group in groups {
        let Statistics::ByteArray(statistics) = id_statistics(group)? else { return None };
        if !statistics.min_is_exact() || !statistics.max_is_exact() {
            return None;
        }
        let text = |bytes: Option<&parquet::data_type::ByteArray>| {
            bytes.and_then(|bytes| bytes.as_utf8().ok()).map(str::to_owned)
        };
        let (min, max) = (text(statistics.min_opt())?, text(statistics.max_opt())?);
        range = Some(match range {
            None => (min, max),
            Some((least, greatest)) => (least.min(min), greatest.max(max)),
        });
    }
    range.filter(|(min, max)| min.len() <= 128 && max.len() <= 128)
}

fn id_nulls(groups: &[RowGroupMetaData]) -> Option<u64> {
    groups.iter().map(|group| id_statistics(group)?.null_count_opt()).sum()
}

fn id_statistics(group: &RowGroupMetaData) -> Option<&Statistics> {
    group.columns().iter().find(|column| column.column_path().string() == "id")?.statistics()
}
