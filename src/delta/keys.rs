//! Which rows of the table have the ids that a run brings.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, RecordBatch, StructArray};
use arrow::datatypes::{DataType, TimeUnit};
use futures::{Stream, StreamExt, TryStreamExt};
use object_store::ObjectStore;
use object_store::path::Path;
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::{RowSelection, RowSelector};
use parquet::arrow::async_reader::{ParquetRecordBatchStream, ParquetRecordBatchStreamBuilder};
use roaring::RoaringTreemap;

use super::reader::StoreReader;
use super::table::storage;
use crate::error::{Error, ErrorKind, Result};
use crate::messages::{Arrival, RowKey, key_of};

/// Hashes a key that is a hash already.
#[derive(Default)]
pub(super) struct Identity(u64);

impl Hasher for Identity {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = self.0.rotate_left(8) ^ u64::from(*byte);
        }
    }
    fn write_u128(&mut self, key: u128) {
        self.0 = key as u64;
    }
}

/// A map by key.
pub(super) type ByKey<T> = HashMap<u128, T, BuildHasherDefault<Identity>>;

/// A data file of the table at the snapshot that is merged into.
#[derive(Debug, Clone)]
pub(super) struct DataFile {
    pub path: Path,
    pub size: u64,
    /// Rows that are gone by its deletion vector.
    pub gone: RoaringTreemap,
}

/// A row of the table whose id the run brings.
#[derive(Debug, Clone, Copy)]
pub(super) struct Match {
    /// Index of the data file.
    pub file: usize,
    /// Row in the file.
    pub row: u64,
    /// Its key, and its rank as far as the table knows it; `arrival` is its place.
    pub key: RowKey,
}

async fn open(store: &Arc<dyn ObjectStore>, path: &Path, size: u64) -> Result<ParquetRecordBatchStreamBuilder<StoreReader>> {
    ParquetRecordBatchStreamBuilder::new(StoreReader::new(store, path, size))
        .await
        .map_err(|error| storage(error, &format!("{path} cannot be read")))
}

/// Leaf columns of the file by their dotted paths, list levels left out; paths that it lacks are passed over.
fn leaves(builder: &ParquetRecordBatchStreamBuilder<StoreReader>, wanted: &[&str]) -> Option<ProjectionMask> {
    let schema = builder.parquet_schema();
    let found = schema.columns().iter().enumerate().filter(|(_, column)| {
        let parts = column.path().parts().iter().map(String::as_str);
        let parts: Vec<&str> = parts.filter(|part| !matches!(*part, "list" | "element")).collect();
        wanted.contains(&parts.join(".").as_str())
    });
    let found: Vec<usize> = found.map(|(index, _)| index).collect();
    if found.is_empty() { None } else { Some(ProjectionMask::leaves(schema, found)) }
}

/// The selection of `rows` (ascending) out of a file.
pub(super) fn selection(rows: impl Iterator<Item = u64>) -> RowSelection {
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

/// All rows of a file with their keys, batch by batch; `None` for a row without id.
pub(super) async fn ids(
    store: &Arc<dyn ObjectStore>,
    file: &DataFile,
) -> Result<impl Stream<Item = Result<Vec<(u64, Option<u128>)>>> + use<>> {
    let builder = open(store, &file.path, file.size).await?;
    let total = builder.metadata().file_metadata().num_rows() as u64;
    let path = file.path.clone();
    let failed = move |error| storage(error, &format!("the ids of {path} cannot be read"));
    let Some(mask) = leaves(&builder, &["id"]) else {
        // A file without the column: no row of it has an id.
        let rows = (0..total).map(|row| (row, None)).collect();
        return Ok(futures::stream::iter([Ok(rows)]).left_stream());
    };
    let batches = builder.with_projection(mask).with_batch_size(64 * 1024).build().map_err(&failed)?;
    let mut next = 0u64;
    let keys = batches.map(move |batch| {
        let batch = batch.map_err(&failed)?;
        let mut keys = Vec::with_capacity(batch.num_rows());
        for_each_string(batch.column(0), |at, id| keys.push((next + at as u64, id.map(|id| key_of(id.as_bytes())))))?;
        next += batch.num_rows() as u64;
        Ok(keys)
    });
    Ok(keys.right_stream())
}

/// Reads the ids of `file` and returns the rows whose key `wanted` has, with their ranks.
pub(super) async fn find(
    store: &Arc<dyn ObjectStore>,
    index: usize,
    file: &DataFile,
    wanted: impl Fn(u128) -> bool,
) -> Result<Vec<Match>> {
    let mut batches = Box::pin(ids(store, file).await?);
    let mut found = Vec::new();
    while let Some(batch) = batches.try_next().await? {
        for (row, key) in batch {
            if let Some(key) = key.filter(|key| wanted(*key) && !file.gone.contains(row)) {
                found.push((row, key));
            }
        }
    }
    if found.is_empty() {
        return Ok(Vec::new());
    }
    let ranks = ranks(store, file, found.iter().map(|(row, _)| *row)).await?;
    let matches = found.iter().zip(ranks).map(|((row, key), rank)| Match {
        file: index,
        row: *row,
        key: RowKey { key: *key, arrival: Arrival::new(index as u32, *row), ..rank },
    });
    Ok(matches.collect())
}

/// `lastUpdated`, `versionId` and SUBSETTED of some rows, in their order.
async fn ranks(store: &Arc<dyn ObjectStore>, file: &DataFile, rows: impl Iterator<Item = u64>) -> Result<Vec<RowKey>> {
    let rows: Vec<u64> = rows.collect();
    let none =
        RowKey { key: 0, last_updated: RowKey::ABSENT, version: RowKey::ABSENT, arrival: Arrival::default(), subsetted: false };
    let builder = open(store, &file.path, file.size).await?;
    let Some(mask) = leaves(&builder, &["meta.lastUpdated", "meta.versionId", "meta.tag.code"]) else {
        return Ok(vec![none; rows.len()]);
    };
    let failed = |error| storage(error, &format!("the versions in {} cannot be read", file.path));
    let mut batches =
        builder.with_projection(mask).with_row_selection(selection(rows.iter().copied())).build().map_err(failed)?;
    let mut ranks = Vec::with_capacity(rows.len());
    while let Some(batch) = batches.try_next().await.map_err(failed)? {
        let from = ranks.len();
        ranks.resize(from + batch.num_rows(), none);
        read_ranks(&batch, &mut ranks[from..])?;
    }
    if ranks.len() != rows.len() {
        return Err(Error::new(ErrorKind::Storage, format!("{} gave other rows than asked for", file.path)));
    }
    Ok(ranks)
}

fn read_ranks(batch: &RecordBatch, ranks: &mut [RowKey]) -> Result<()> {
    let Some(meta) = batch.column_by_name("meta").and_then(|column| column.as_any().downcast_ref::<StructArray>()) else {
        return Ok(());
    };
    if let Some(updated) = meta.column_by_name("lastUpdated") {
        let micros = arrow::compute::cast(updated, &DataType::Timestamp(TimeUnit::Microsecond, Some("UTC".into())))
            .map_err(|error| storage(error, "meta.lastUpdated of the table is no timestamp"))?;
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

fn for_each_string(column: &ArrayRef, mut f: impl FnMut(usize, Option<&str>)) -> Result<()> {
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

/// Rows of a file, by its footer.
pub(super) async fn row_count(store: &Arc<dyn ObjectStore>, path: &Path, size: u64) -> Result<u64> {
    Ok(open(store, path, size).await?.metadata().file_metadata().num_rows() as u64)
}

/// Some rows of a file, all columns.
pub(super) async fn rows(
    store: &Arc<dyn ObjectStore>,
    path: &Path,
    size: u64,
    rows: RowSelection,
) -> Result<ParquetRecordBatchStream<StoreReader>> {
    open(store, path, size)
        .await?
        .with_row_selection(rows)
        .with_batch_size(1024)
        .build()
        .map_err(|error| storage(error, &format!("{path} cannot be read")))
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
            [RowSelector::select(2), RowSelector::skip(3), RowSelector::select(2), RowSelector::skip(2), RowSelector::select(1)]
        );
    }
}
