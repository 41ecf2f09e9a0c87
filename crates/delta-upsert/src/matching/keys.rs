//! Keys and ranks of rows, read from the table's files.

use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, RecordBatch, StructArray};
use arrow::datatypes::{DataType, FieldRef, Fields, Int64Type, Schema, SchemaRef, TimeUnit};
use object_store::path::Path;
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::{ArrowReaderMetadata, ArrowReaderOptions, RowSelection, RowSelector};
use parquet::arrow::async_reader::ParquetRecordBatchStreamBuilder;
use parquet::basic::Type;
use parquet::file::metadata::RowGroupMetaData;
use roaring::RoaringTreemap;
use tokio_stream::StreamExt;

use crate::row::{RowKey, RowPosition, key_of};
use crate::table::reader::{BATCH_BYTES, FileRows, LocalRows, StoreReader};
use crate::table::{Table, storage};
use crate::unchanged::{LINE_HASH, LineHash};
use foundation::error::{Error, ErrorKind, Result};

/// A data file of the table at the snapshot that is merged into.
#[derive(Debug, Clone)]
pub(crate) struct DataFile {
    pub path: Path,
    pub size: u64,
    /// Rows that are gone by its deletion vector.
    pub gone: RoaringTreemap,
    /// Least and greatest `id` by the log's statistics.
    pub ids: (Option<String>, Option<String>),
}

impl DataFile {
    /// A file of which nothing is known yet.
    pub(crate) fn new(path: &Path, size: u64) -> Self {
        Self { path: path.clone(), size, gone: RoaringTreemap::new(), ids: (None, None) }
    }
}

/// A file whose footer is read, once for all that is read of it.
pub(crate) struct OpenFile<'a> {
    reader: StoreReader,
    file: &'a DataFile,
    metadata: ArrowReaderMetadata,
}

impl<'a> OpenFile<'a> {
    pub(crate) async fn open(table: &Table, file: &'a DataFile) -> Result<Self> {
        let mut reader = StoreReader::new(table, &file.path, file.size);
        let failed = |error| storage(error, &format!("{} cannot be read", file.path));
        let mut metadata = ArrowReaderMetadata::load_async(&mut reader, options()).await.map_err(failed)?;
        // Spark's INT96 would come as nanoseconds, which reach from 1677 to 2262 only; Delta's timestamps are
        // microseconds.
        let instants = metadata.parquet_schema().columns().iter().map(|column| column.physical_type() == Type::INT96);
        if let Some(schema) = in_micros(metadata.schema().fields(), &mut instants.collect::<Vec<_>>().into_iter()) {
            let options = options().with_schema(Arc::new(Schema::new(schema)));
            metadata = ArrowReaderMetadata::try_new(metadata.metadata().clone(), options).map_err(failed)?;
        }
        Ok(Self { reader, file, metadata })
    }

    fn reader(&self) -> ParquetRecordBatchStreamBuilder<StoreReader> {
        ParquetRecordBatchStreamBuilder::new_with_metadata(self.reader.clone(), self.metadata.clone())
    }

    /// Its columns.
    pub(crate) fn schema(&self) -> &SchemaRef {
        self.metadata.schema()
    }

    /// Some rows, all columns, in their order; every row where none are named.
    pub(crate) fn read_rows(&self, rows: Option<RowSelection>) -> Result<FileRows> {
        let failed = |error| storage(error, &format!("{} cannot be read", self.file.path));
        let bytes: u64 = self.groups().iter().map(|group| group.total_byte_size().unsigned_abs()).sum();
        // A column of nulls has its offsets all the same, and there may be a thousand.
        let a_row = bytes / self.rows().max(1) + 1 + 5 * self.metadata.parquet_schema().num_columns() as u64;
        let at_once = (BATCH_BYTES / a_row).clamp(1, BATCH as u64) as usize;
        if let Some(file) = self.reader.local() {
            return Ok(FileRows::Local(LocalRows::new(file, self.metadata.clone(), rows, at_once).map_err(failed)?));
        }
        let mut builder = self.reader();
        if let Some(rows) = rows {
            builder = builder.with_row_selection(rows);
        }
        Ok(FileRows::Store(builder.with_batch_size(at_once).build().map_err(failed)?))
    }

    /// The rows that are not gone.
    pub(crate) fn live_rows(&self) -> Result<FileRows> {
        let gone = &self.file.gone;
        self.read_rows((!gone.is_empty()).then(|| selection((0..self.rows()).filter(|row| !gone.contains(*row)))))
    }

    /// Returns the number of rows that are not gone.
    pub(crate) fn live(&self) -> u64 {
        self.rows().saturating_sub(self.file.gone.len())
    }

    /// Its row groups.
    pub(crate) fn groups(&self) -> &[RowGroupMetaData] {
        self.metadata.metadata().row_groups()
    }

    /// Leaf columns by their dotted paths, list levels left out; paths that the file lacks are passed over.
    fn leaves(&self, wanted: &[&str]) -> Option<ProjectionMask> {
        let schema = self.metadata.parquet_schema();
        let found = schema.columns().iter().enumerate().filter(|(_, column)| {
            let parts = column.path().parts().iter().map(String::as_str);
            let parts: Vec<&str> = parts.filter(|part| !matches!(*part, "list" | "element")).collect();
            wanted.contains(&parts.join(".").as_str())
        });
        let found: Vec<usize> = found.map(|(index, _)| index).collect();
        if found.is_empty() { None } else { Some(ProjectionMask::leaves(schema, found)) }
    }

    /// Rows of the file, those included that are gone.
    pub(crate) fn rows(&self) -> u64 {
        self.groups().iter().map(|group| group.num_rows() as u64).sum()
    }

    /// Goes through the rows, those included that are gone, with their keys (`None` for a row without id), row groups
    /// that can have none of `ids` left out.
    pub(crate) async fn for_each_id(&self, ids: Option<&Ids>, mut each: impl FnMut(u64, Option<u128>)) -> Result<()> {
        let groups = match ids {
            Some(ids) => self.groups_with(ids).await?,
            None => (0..self.groups().len()).collect(),
        };
        let mut places = Places::new(self.groups(), &groups);
        let Some(mask) = self.leaves(&["id"]) else {
            // A file without the column: no row of it has an id.
            (0..self.rows()).for_each(|row| each(row, None));
            return Ok(());
        };
        let failed = |error| storage(error, &format!("the ids of {} cannot be read", self.file.path));
        let builder = self.reader().with_projection(mask).with_row_groups(groups).with_batch_size(BATCH);
        let mut batches = builder.build().map_err(failed)?;
        while let Some(batch) = batches.try_next().await.map_err(failed)? {
            for_each_string(batch.column(0), |_, id| each(places.next(), id.map(|id| key_of(id.as_bytes()))))?;
        }
        Ok(())
    }

    /// Goes through the ids of all rows, those included that are gone.
    pub(crate) async fn for_each_id_text(&self, mut each: impl FnMut(Option<&str>)) -> Result<()> {
        let Some(mask) = self.leaves(&["id"]) else { return Ok(()) };
        let failed = |error| storage(error, &format!("the ids of {} cannot be read", self.file.path));
        let mut batches = self.reader().with_projection(mask).with_batch_size(BATCH).build().map_err(failed)?;
        while let Some(batch) = batches.try_next().await.map_err(failed)? {
            for_each_string(batch.column(0), |_, id| each(id))?;
        }
        Ok(())
    }

    /// Goes through the live rows, or those of them that are `wanted`, with their keys and ranks.
    pub(crate) async fn for_each_ranked(
        &self,
        wanted: Option<&RoaringTreemap>,
        mut each: impl FnMut(u64, Option<RowKey>) -> Result<()>,
    ) -> Result<()> {
        let rows: &mut (dyn Iterator<Item = u64> + Send) = match wanted {
            Some(wanted) if wanted.is_empty() => return Ok(()),
            Some(wanted) => &mut wanted.iter(),
            None => &mut (0..self.rows()),
        };
        let mut live = rows.map(|row| (row, !self.file.gone.contains(row)));
        let Some(mask) = self.leaves(&["id", RANK[0], RANK[1], RANK[2]]) else {
            return live.filter(|(_, live)| *live).try_for_each(|(row, _)| each(row, None));
        };
        let failed = |error| storage(error, &format!("the ids and versions in {} cannot be read", self.file.path));
        let mut builder = self.reader().with_projection(mask).with_batch_size(BATCH);
        if let Some(wanted) = wanted {
            builder = builder.with_row_selection(selection(wanted.iter()));
        }
        let mut batches = builder.build().map_err(failed)?;
        while let Some(batch) = batches.try_next().await.map_err(failed)? {
            for (key, (row, live)) in row_keys(&batch)?.into_iter().zip(&mut live) {
                if live {
                    each(row, key)?;
                }
            }
        }
        Ok(())
    }

    /// Goes through the live rows with their keys, ranks, and the hash of the text that each came from, where the file
    /// has it.
    pub(crate) async fn for_each_line(
        &self,
        mut each: impl FnMut(u64, Option<RowKey>, Option<LineHash>) -> Result<()>,
    ) -> Result<()> {
        let mut live = (0..self.rows()).map(|row| (row, !self.file.gone.contains(row)));
        // Without versionId, versions cannot be compared.
        let has_versions = self.leaves(&[RANK[1]]).is_some();
        let wanted = ["id", LINE_HASH, RANK[0], RANK[1], RANK[2]];
        let Some(mask) = self.leaves(if has_versions { &wanted } else { &wanted[..2] }) else { return Ok(()) };
        let failed = |error| storage(error, &format!("the ids and line hashes in {} cannot be read", self.file.path));
        let builder = self.reader().with_projection(mask).with_batch_size(BATCH);
        let mut batches = builder.build().map_err(failed)?;
        while let Some(batch) = batches.try_next().await.map_err(failed)? {
            let lines = batch.column_by_name(LINE_HASH).and_then(|lines| lines.as_primitive_opt::<Int64Type>());
            let line = |at: usize| {
                lines.filter(|lines| lines.is_valid(at)).and_then(|lines| LineHash::from_bits(lines.value(at)))
            };
            for (at, (key, (row, live))) in row_keys(&batch)?.into_iter().zip(&mut live).enumerate() {
                if live {
                    each(row, key, line(at))?;
                }
            }
        }
        Ok(())
    }

    /// `lastUpdated`, `versionId` and SUBSETTED of some rows, in their order.
    pub(crate) async fn ranks(&self, rows: &[u64]) -> Result<Vec<RowKey>> {
        let file = self.file;
        let Some(mask) = self.leaves(&RANK) else {
            return Ok(vec![NO_RANK; rows.len()]);
        };
        let failed = |error| storage(error, &format!("the versions in {} cannot be read", file.path));
        let builder = self.reader().with_projection(mask).with_row_selection(selection(rows.iter().copied()));
        let mut batches = builder.build().map_err(failed)?;
        let mut ranks = Vec::with_capacity(rows.len());
        while let Some(batch) = batches.try_next().await.map_err(failed)? {
            let from = ranks.len();
            ranks.resize(from + batch.num_rows(), NO_RANK);
            read_ranks(&batch, &mut ranks[from..])?;
        }
        if ranks.len() != rows.len() {
            return Err(Error::new(ErrorKind::Storage, format!("{} returned other rows than requested", file.path)));
        }
        Ok(ranks)
    }

    /// Row groups that may hold one of `ids`, by statistics and, where few ids are in their range, bloom filter.
    async fn groups_with(&self, ids: &Ids) -> Result<Vec<usize>> {
        let Some(column) =
            self.metadata.parquet_schema().columns().iter().position(|column| column.path().string() == "id")
        else {
            return Ok(Vec::new());
        };
        let mut bloom_reader = None;
        let mut found = Vec::new();
        for (at, group) in self.groups().iter().enumerate() {
            let chunk = group.column(column);
            let statistics = chunk.statistics().filter(|statistics| !statistics.is_min_max_deprecated());
            let text =
                |bytes: Option<&'_ [u8]>| bytes.and_then(|bytes| std::str::from_utf8(bytes).ok()).map(str::to_owned);
            let least = text(statistics.and_then(|statistics| statistics.min_bytes_opt()));
            let greatest = text(statistics.and_then(|statistics| statistics.max_bytes_opt()));
            let candidates = ids.between(least.as_deref(), greatest.as_deref());
            if candidates.is_empty() {
                continue;
            }
            if candidates.len() <= MAX_PROBES && chunk.bloom_filter_offset().is_some() {
                let reader = bloom_reader.get_or_insert_with(|| self.reader());
                let bloom = reader.get_row_group_column_bloom_filter(at, column).await;
                let bloom = bloom
                    .map_err(|error| storage(error, &format!("a bloom filter of {} cannot be read", self.file.path)))?;
                if bloom.is_some_and(|bloom| !candidates.iter().any(|id| bloom.check(&**id))) {
                    continue;
                }
            }
            found.push(at);
        }
        Ok(found)
    }
}

/// Passes over other writers' Arrow types (large lists, views): Parquet's own types are Delta's.
fn options() -> ArrowReaderOptions {
    ArrowReaderOptions::new().with_skip_arrow_metadata(true)
}

/// The columns with timestamps of microseconds, where some are of twelve bytes; `int96` says so of each leaf column.
/// Other nanoseconds are numbers of nanoseconds, and are cast where they are used.
fn in_micros(fields: &Fields, int96: &mut impl Iterator<Item = bool>) -> Option<Fields> {
    fn field(of: &FieldRef, int96: &mut impl Iterator<Item = bool>) -> Option<FieldRef> {
        let data_type = match of.data_type() {
            DataType::Struct(fields) => DataType::Struct(in_micros(fields, int96)?),
            DataType::List(item) => DataType::List(field(item, int96)?),
            DataType::Map(entries, sorted) => DataType::Map(field(entries, int96)?, *sorted),
            // It says nothing of a zone; Spark means UTC.
            _ if int96.next() == Some(true) => DataType::Timestamp(TimeUnit::Microsecond, Some("UTC".into())),
            _ => return None,
        };
        Some(Arc::new(of.as_ref().clone().with_data_type(data_type)))
    }
    let changed: Vec<Option<FieldRef>> = fields.iter().map(|of| field(of, int96)).collect();
    let some = changed.iter().any(Option::is_some);
    some.then(|| {
        changed.into_iter().zip(fields).map(|(changed, field)| changed.unwrap_or_else(|| field.clone())).collect()
    })
}

/// Ids in the range of a row group up to which its bloom filter is asked: each may be there by the filter's mistake,
/// one in a hundred, and reading the ids themselves costs only some times as much.
const MAX_PROBES: usize = 64;

/// The ids that a run brings, in order: what the statistics of files can be compared with.
#[derive(Debug)]
pub(crate) struct Ids(Vec<Box<str>>);

impl Ids {
    pub(crate) fn new(mut ids: Vec<Box<str>>) -> Self {
        ids.sort_unstable();
        Self(ids)
    }

    /// Those from `least` to `greatest`, both included; statistics may be cut, never so that they exclude a value.
    pub(crate) fn between(&self, least: Option<&str>, greatest: Option<&str>) -> &[Box<str>] {
        let from = least.map_or(0, |least| self.0.partition_point(|id| &**id < least));
        let until = greatest.map_or(self.0.len(), |greatest| self.0.partition_point(|id| &**id <= greatest));
        self.0.get(from..until).unwrap_or_default()
    }
}

/// The selection of `rows` (ascending) out of a file.
pub(crate) fn selection(rows: impl Iterator<Item = u64>) -> RowSelection {
    let mut selectors: Vec<RowSelector> = Vec::new();
    let mut next = 0u64;
    for row in rows {
        if row > next {
            selectors.push(RowSelector::skip((row - next) as usize));
        }
        match selectors.last_mut() {
            Some(last) if !last.skip => last.row_count += 1,
            _ => selectors.push(RowSelector::select(1)),
        }
        next = row + 1;
    }
    RowSelection::from(selectors)
}

/// Rows of a batch.
const BATCH: usize = 16 * 1024;

/// The rows of some row groups, one after the other.
struct Places {
    ranges: std::vec::IntoIter<std::ops::Range<u64>>,
    now: std::ops::Range<u64>,
}

impl Places {
    fn new(all: &[RowGroupMetaData], wanted: &[usize]) -> Self {
        let mut start = 0;
        let starts: Vec<std::ops::Range<u64>> = all
            .iter()
            .map(|group| {
                let range = start..start + group.num_rows() as u64;
                start = range.end;
                range
            })
            .collect();
        let ranges: Vec<_> = wanted.iter().filter_map(|at| starts.get(*at).cloned()).collect();
        Self { ranges: ranges.into_iter(), now: 0..0 }
    }

    fn next(&mut self) -> u64 {
        loop {
            if let Some(row) = self.now.next() {
                return row;
            }
            // More rows than the footer says there are: a place that no file has.
            self.now = self.ranges.next().unwrap_or(u64::MAX - 1..u64::MAX);
        }
    }
}

/// Columns that say how a row ranks among its copies.
const RANK: [&str; 3] = ["meta.lastUpdated", "meta.versionId", "meta.tag.code"];

const NO_RANK: RowKey = RowKey {
    key: 0,
    last_updated: RowKey::ABSENT,
    version: RowKey::ABSENT,
    arrival: RowPosition::from_bits(0),
    subsetted: false,
    replayed: false,
};

/// The ids in a file, for files that are small.
pub(crate) async fn all_ids(table: &Table, path: &Path, size: u64) -> Result<Vec<Box<str>>> {
    let file = DataFile::new(path, size);
    let mut found = Vec::new();
    OpenFile::open(table, &file).await?.for_each_id_text(|id| found.extend(id.map(Box::from))).await?;
    Ok(found)
}

/// Keys and ranks of the rows of a batch; `None` for a row without id.
fn row_keys(batch: &RecordBatch) -> Result<Vec<Option<RowKey>>> {
    let mut ranks = vec![NO_RANK; batch.num_rows()];
    read_ranks(batch, &mut ranks)?;
    let mut keys = vec![None; batch.num_rows()];
    if let Some(ids) = batch.column_by_name("id") {
        for_each_string(ids, |at, id| {
            keys[at] = id.map(|id| RowKey { key: key_of(id.as_bytes()), ..ranks[at] });
        })?;
    }
    Ok(keys)
}

fn read_ranks(batch: &RecordBatch, ranks: &mut [RowKey]) -> Result<()> {
    let Some(meta) = batch.column_by_name("meta").and_then(|column| column.as_any().downcast_ref::<StructArray>())
    else {
        return Ok(());
    };
    if let Some(updated) = meta.column_by_name("lastUpdated") {
        let micros = arrow::compute::cast(updated, &DataType::Timestamp(TimeUnit::Microsecond, Some("UTC".into())))
            .map_err(|error| storage(error, "meta.lastUpdated of the table is not a timestamp"))?;
        let micros = micros.as_primitive::<arrow::datatypes::TimestampMicrosecondType>();
        for (at, rank) in ranks.iter_mut().enumerate() {
            if micros.is_valid(at) && meta.is_valid(at) {
                rank.last_updated = micros.value(at);
            }
        }
    }
    if let Some(versions) = meta.column_by_name("versionId") {
        for_each_string(versions, |at, text| {
            if let Some(number) = text.and_then(|text| text.parse::<i64>().ok()).filter(|number| *number >= 0) {
                ranks[at].version = number;
            }
        })?;
    }
    if let Some(tags) = meta.column_by_name("tag").and_then(|column| column.as_list_opt::<i32>()) {
        for (at, rank) in ranks.iter_mut().enumerate().filter(|(at, _)| tags.is_valid(*at)) {
            let tags = tags.value(at);
            let codes = tags.as_any().downcast_ref::<StructArray>().and_then(|tags| tags.column_by_name("code"));
            if let Some(codes) = codes {
                for_each_string(codes, |_, code| rank.subsetted |= code == Some("SUBSETTED"))?;
            }
        }
    }
    Ok(())
}

pub(crate) fn for_each_string(column: &ArrayRef, mut f: impl FnMut(usize, Option<&str>)) -> Result<()> {
    let column = match column.data_type() {
        DataType::Utf8 => column.clone(),
        _ => arrow::compute::cast(column, &DataType::Utf8)
            .map_err(|error| storage(error, "a column of strings has another type"))?,
    };
    for (at, text) in column.as_string::<i32>().iter().enumerate() {
        f(at, text);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_selection_of_scattered_rows() {
        let selection = selection([0u64, 1, 5, 6, 9].into_iter());
        let selectors: Vec<RowSelector> = selection.into();
        assert_eq!(
            selectors,
            [
                RowSelector::select(2),
                RowSelector::skip(3),
                RowSelector::select(2),
                RowSelector::skip(2),
                RowSelector::select(1)
            ]
        );
    }
}
