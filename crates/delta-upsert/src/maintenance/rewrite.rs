//! Rows that are read from data files → new data files, with the pages that the encoder itself makes.
//!
//! Most columns of a file hold nothing. Rows lose them as soon as they are read; whatever is done with the rows is done
//! with the columns that they fill, and the rest is put back as pages of nulls when a row group is made.

use parking_lot::Mutex;
use std::collections::HashSet;
use std::sync::Arc;

use arrow::array::{Array, AsArray, RecordBatch, StructArray};
use arrow::compute::concat_batches;
use arrow::datatypes::{SchemaRef, TimestampMicrosecondType};
use bytes::Bytes;
use deltalake::kernel::Add;
use object_store::path::Path;
use parquet::arrow::ArrowSchemaConverter;
use parquet::file::metadata::ParquetMetaData;

use crate::commit::add_actions::new_add;
use crate::matching::keys::{DataFile, OpenFile};
use crate::staging::new_file::{self, NewFile};
use crate::staging::page_encoder::PageEncoder;
use crate::table::schema_adapter::{adapt, narrow, union, whole};
use crate::table::{Table, storage};
use crate::unchanged::{LINE_HASH, with_line_hash};
use foundation::error::Result;

/// Rows of a row group, and bytes of their columns: as staged files have them, so that what a reader or a later match
/// leaves out is as fine.
pub(crate) const GROUP_ROWS: usize = 16 * 1024;
pub(crate) const GROUP_BYTES: usize = 16 << 20;

/// Form of the new files.
#[derive(Debug)]
pub(crate) struct Shape {
    /// The table's columns, with the hash of each row's text where an old file has it.
    table: SchemaRef,
    /// Those of the new files: what any of the old files has, whole.
    file: SchemaRef,
    /// Columns of which some old file has statistics, by their Parquet path.
    filtered: HashSet<String>,
    /// Rows of the old files, those included that are gone.
    pub rows: u64,
}

/// A row group in memory.
pub(crate) struct RowGroup {
    bytes: Bytes,
    metadata: ParquetMetaData,
    /// Least and greatest `meta.lastUpdated`.
    updated: Option<(i64, i64)>,
}

impl Shape {
    /// For files that hold the rows of `files`, which are of a table with the columns of `schema`.
    pub(crate) async fn of(table: &Table, schema: &SchemaRef, files: &[&DataFile]) -> Result<Self> {
        let (mut names, mut filtered, mut rows) = (HashSet::new(), HashSet::new(), 0);
        for file in files {
            let file = OpenFile::open(table, file).await?;
            names.extend(file.schema().fields().iter().map(|field| field.name().clone()));
            rows += file.rows();
            let columns = file.groups().iter().flat_map(|group| group.columns());
            let with_statistics = columns.filter(|column| column.statistics().is_some());
            filtered.extend(with_statistics.map(|column| column.column_path().string()));
        }
        filtered.insert("id".to_owned());
        // No column of the table, and as much a part of its rows.
        let table = match names.contains(LINE_HASH) {
            true => with_line_hash(schema),
            false => schema.clone(),
        };
        Ok(Self { file: Arc::new(whole(&table, &names)), table, filtered, rows })
    }

    /// Rows as the table has them, without the columns that none of them fills.
    pub(crate) fn fit(&self, batch: &RecordBatch) -> Result<RecordBatch> {
        let narrow = narrow(batch)?;
        let shape = union(&self.table, &[narrow.schema()]);
        adapt(&narrow, &Arc::new(shape))
    }

    /// Rows that were fitted, in one batch.
    pub(crate) fn join(&self, batches: &[RecordBatch]) -> Result<RecordBatch> {
        if let [one] = batches {
            return Ok(one.clone());
        }
        let schemas: Vec<SchemaRef> = batches.iter().map(RecordBatch::schema).collect();
        let shape = Arc::new(union(&self.table, &schemas));
        let batches = batches.iter().map(|batch| adapt(batch, &shape)).collect::<Result<Vec<_>>>()?;
        concat_batches(&shape, &batches).map_err(|error| storage(error, "record batches cannot be concatenated"))
    }

    /// Rows that were fitted, as a row group.
    pub(crate) fn encode(&self, batches: &[RecordBatch]) -> Result<RowGroup> {
        let batch = self.join(batches)?;
        let failed = |error| storage(error, "the columns cannot be written");
        let leaves = ArrowSchemaConverter::new().convert(&batch.schema()).map_err(failed)?;
        let filtered = leaves.columns().iter().map(|leaf| self.filtered.contains(&leaf.path().string()));
        let filtered: Vec<bool> = filtered.collect();
        let (bytes, metadata) = PageEncoder.encode(&batch, &self.file, &filtered)?;
        Ok(RowGroup { bytes, metadata, updated: updated(&batch) })
    }
}

/// Place of new files, and those that were begun: all of them go when the work fails.
pub(crate) struct Place<'a> {
    /// The table.
    pub table: &'a Table,
    /// The run's id, by which a later run knows what a killed one left.
    pub run: &'a str,
    /// Bytes from which on a file is closed and another begun.
    pub target: u64,
    started: Mutex<Vec<Path>>,
}

impl<'a> Place<'a> {
    /// For files of a run.
    pub(crate) fn new(table: &'a Table, run: &'a str, target: u64) -> Self {
        Self { table, run, target, started: Mutex::new(Vec::new()) }
    }

    fn next_path(&self) -> Path {
        let path = Path::from(format!("part-{}-{}.zstd.parquet", self.run, uuid::Uuid::new_v4()));
        self.started.lock().push(path.clone());
        path
    }

    /// The files that were begun.
    pub(crate) fn started(self) -> Vec<Path> {
        self.started.into_inner()
    }

    /// Removes the files that were begun.
    pub(crate) async fn discard(self) {
        let table = self.table;
        for path in self.started() {
            new_file::remove(table, &path).await;
        }
    }
}

/// New files, one after the other.
pub(crate) struct RowRewriter<'a> {
    place: &'a Place<'a>,
    shape: &'a Shape,
    /// Rows that are not yet in a row group, and the bytes of their columns.
    pending: (Vec<RecordBatch>, usize),
    open: Option<NewFile>,
    updated: Option<(i64, i64)>,
    adds: Vec<Add>,
}

impl<'a> RowRewriter<'a> {
    /// Nothing yet.
    pub(crate) fn new(place: &'a Place<'a>, shape: &'a Shape) -> Self {
        Self { place, shape, pending: Default::default(), open: None, updated: None, adds: Vec::new() }
    }

    /// The live rows of a file, in their order.
    async fn copy(&mut self, file: &DataFile) -> Result<()> {
        let open = OpenFile::open(self.place.table, file).await?;
        let mut rows = open.live_rows()?;
        while let Some(batch) = rows.next().await? {
            let batch = self.shape.fit(&batch)?;
            self.pending.1 += bytes_of(&batch);
            self.pending.0.push(batch);
            if self.pending.1 >= GROUP_BYTES
                || self.pending.0.iter().map(RecordBatch::num_rows).sum::<usize>() >= GROUP_ROWS
            {
                self.flush().await?;
            }
        }
        Ok(())
    }

    async fn flush(&mut self) -> Result<()> {
        let (batches, _) = std::mem::take(&mut self.pending);
        if batches.is_empty() {
            return Ok(());
        }
        self.append(self.shape.encode(&batches)?).await
    }

    /// Appends a row group.
    async fn append(&mut self, group: RowGroup) -> Result<()> {
        let file = match &mut self.open {
            Some(file) => file,
            None => self.open.insert(NewFile::create(self.place.table, self.place.next_path()).await?),
        };
        file.append(&group.bytes, &group.metadata).await?;
        self.updated = match (self.updated, group.updated) {
            (Some(ours), Some(theirs)) => Some((ours.0.min(theirs.0), ours.1.max(theirs.1))),
            (ours, theirs) => ours.or(theirs),
        };
        if file.size() >= self.place.target {
            self.close().await?;
        }
        Ok(())
    }

    /// Appends row groups.
    pub(crate) async fn append_all(&mut self, groups: impl Iterator<Item = RowGroup>) -> Result<()> {
        for group in groups {
            self.append(group).await?;
        }
        Ok(())
    }

    async fn close(&mut self) -> Result<()> {
        let Some(file) = self.open.take() else { return Ok(()) };
        let done = file.close(self.place.table).await?;
        let ids = done.id_range.zip(done.id_nulls);
        self.adds.push(new_add(&done.path, done.size, done.rows, ids, self.updated.take()));
        Ok(())
    }

    /// The add actions of the files, once `work` has written all rows.
    pub(crate) async fn finish(mut self, work: Result<()>) -> Result<Vec<Add>> {
        let work = match work {
            Ok(()) => self.flush().await,
            failed => failed,
        };
        match work {
            Ok(()) => self.close().await?,
            Err(error) => {
                if let Some(file) = self.open.take() {
                    file.discard().await;
                }
                return Err(error);
            }
        }
        Ok(self.adds)
    }

    /// Copies the live rows of some files.
    pub(crate) async fn of(place: &'a Place<'a>, shape: &'a Shape, files: &[&DataFile]) -> Result<Vec<Add>> {
        let mut copies = Self::new(place, shape);
        let mut work = Ok(());
        for file in files {
            work = copies.copy(file).await;
            if work.is_err() {
                break;
            }
        }
        copies.finish(work).await
    }
}

/// Bytes of a batch's columns, what they share with others counted for what is theirs.
pub(crate) fn bytes_of(batch: &RecordBatch) -> usize {
    let sizes = batch.columns().iter().map(|column| column.to_data().get_slice_memory_size());
    // What cannot be told is rare, and counted as it is held.
    sizes.map(|size| size.unwrap_or_default()).sum()
}

/// Least and greatest `meta.lastUpdated`; `i64::MIN` for a row without.
fn updated(batch: &RecordBatch) -> Option<(i64, i64)> {
    let meta = batch.column_by_name("meta").and_then(|meta| meta.as_any().downcast_ref::<StructArray>());
    let times =
        meta.and_then(|meta| meta.column_by_name("lastUpdated")?.as_primitive_opt::<TimestampMicrosecondType>());
    let time = |row: usize| match (meta, times) {
        (Some(meta), Some(times)) if meta.is_valid(row) && times.is_valid(row) => times.value(row),
        _ => i64::MIN,
    };
    let times = (0..batch.num_rows()).map(time).map(|time| (time, time));
    times.reduce(|ours, theirs| (ours.0.min(theirs.0), ours.1.max(theirs.1)))
}
