//! Columns → Parquet pages: a row group in memory.

use arrow::array::{Array, ArrayRef, AsArray, RecordBatch};
use arrow::datatypes::{DataType, SchemaRef, TimestampMicrosecondType};
use bytes::Bytes;
use parquet::arrow::ArrowSchemaConverter;
use parquet::arrow::arrow_writer::{ArrowWriter, ArrowWriterOptions};
use parquet::basic::{Compression, Encoding, ZstdLevel};
use parquet::file::metadata::ParquetMetaData;
use parquet::file::properties::{BloomFilterPosition, EnabledStatistics, WriterProperties, WriterPropertiesBuilder};
use parquet::schema::types::{ColumnPath, SchemaDescriptor};

use crate::matching::nulls;
use crate::staging::new_file::{CREATED_BY, extent};
use crate::unchanged::LINE_HASH;
use foundation::error::{Error, ErrorKind, Result};

/// Turns record batches into the bytes of row groups.
#[derive(Debug, Clone, Default)]
pub struct PageEncoder;

/// Returns the settings that all data files have in common; statistics and bloom filters are asked for column by
/// column.
fn usual_properties() -> WriterPropertiesBuilder {
    WriterProperties::builder()
        .set_created_by(CREATED_BY.to_owned())
        .set_compression(Compression::ZSTD(ZstdLevel::default()))
        .set_statistics_enabled(EnabledStatistics::None)
        .set_offset_index_disabled(true)
        .set_bloom_filter_position(BloomFilterPosition::AfterRowGroup)
        .set_max_row_group_row_count(None)
}

/// The footer's and the writer's part of each column costs more than an empty column's data, so settings
/// are made only for the columns that are there. `filtered` says of each leaf whether readers filter by it.
fn properties(schema: &SchemaDescriptor, batch: &RecordBatch, filtered: &[bool]) -> WriterProperties {
    let mut builder = usual_properties();
    let mut arrays = Vec::with_capacity(schema.num_columns());
    batch.columns().iter().for_each(|column| leaves(column, &mut arrays));
    for (leaf, column) in schema.columns().iter().enumerate() {
        if filtered.get(leaf).is_some_and(|filtered| *filtered) {
            builder = builder.set_column_statistics_enabled(column.path().clone(), EnabledStatistics::Chunk);
        }
        if arrays.get(leaf).is_some_and(hardly_repeats) {
            builder = builder.set_column_dictionary_enabled(column.path().clone(), false);
        }
    }
    // Hashes neither repeat nor shrink.
    let hash = ColumnPath::from(LINE_HASH);
    builder = builder
        .set_column_dictionary_enabled(hash.clone(), false)
        .set_column_encoding(hash.clone(), Encoding::PLAIN)
        .set_column_compression(hash, Compression::UNCOMPRESSED);
    let id = ColumnPath::from("id");
    builder
        .set_column_bloom_filter_enabled(id.clone(), true)
        .set_column_bloom_filter_max_ndv(id, batch.num_rows() as u64)
        .build()
}

/// The arrays of the leaves, in the order of Parquet's columns.
fn leaves(array: &ArrayRef, out: &mut Vec<ArrayRef>) {
    match array.data_type() {
        DataType::Struct(_) => array.as_struct().columns().iter().for_each(|child| leaves(child, out)),
        DataType::List(_) => leaves(array.as_list::<i32>().values(), out),
        DataType::Map(_, _) => array.as_map().entries().columns().iter().for_each(|child| leaves(child, out)),
        _ => out.push(array.clone()),
    }
}

/// Blocks of values that are looked at, and values in each: neighbours, since that is where FHIR's values repeat.
const BLOCKS: usize = 16;
const BLOCK: usize = 64;

/// Returns true if values are nearly all different (ids, instants, narratives): a dictionary of them would be work and
/// bytes for nothing. The same values give the same answer.
fn hardly_repeats(array: &ArrayRef) -> bool {
    let hash_at: &dyn Fn(usize) -> u64 = match array.data_type() {
        DataType::Utf8 => &|at| hash(array.as_string::<i32>().value(at).as_bytes()),
        DataType::Binary => &|at| hash(array.as_binary::<i32>().value(at)),
        DataType::Timestamp(_, _) => &|at| mix(array.as_primitive::<TimestampMicrosecondType>().value(at) as u64),
        _ => return false,
    };
    let mut seen = vec![0u64; 2 * BLOCKS * BLOCK];
    let (values, mut looked_at, mut repeated) = (array.len(), 0usize, 0usize);
    for block in 0..BLOCKS {
        let start = values / BLOCKS * block;
        for at in (start..start + BLOCK.min(values / BLOCKS)).filter(|at| array.is_valid(*at)) {
            // 0 stands for an empty place.
            let hash = hash_at(at) | 1;
            let mut place = (hash >> 32) as usize % seen.len();
            while seen[place] != 0 && seen[place] != hash {
                place = (place + 1) % seen.len();
            }
            looked_at += 1;
            repeated += usize::from(seen[place] == hash);
            seen[place] = hash;
        }
    }
    // Of n values out of many more different ones, d, about n²/2d meet one that was there before (as birthdays do).
    // Where that says that the whole column has each value less than twice, a dictionary saves nothing.
    let different = (looked_at * looked_at) as f64 / (2.0 * repeated.max(1) as f64);
    looked_at >= BLOCK && repeated * 4 < looked_at && different * 2.0 > (values - array.null_count()) as f64
}

fn hash(bytes: &[u8]) -> u64 {
    twox_hash::XxHash3_128::oneshot(bytes) as u64
}

fn mix(value: u64) -> u64 {
    value.wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

impl PageEncoder {
    /// One batch as a row group in memory, and its metadata. The row group has the columns of `file`; those that the
    /// batch lacks are null. `filtered` has an entry for each leaf column of the batch: whether readers filter by it,
    /// so that statistics of it are worth their place in a footer that may describe a thousand others.
    pub fn encode(&self, batch: &RecordBatch, file: &SchemaRef, filtered: &[bool]) -> Result<(Bytes, ParquetMetaData)> {
        let failed = |error| Error::new(ErrorKind::Internal, format!("a record batch cannot be written: {error}"));
        let schema = ArrowSchemaConverter::new().convert(&batch.schema()).map_err(failed)?;
        let options = ArrowWriterOptions::new()
            .with_properties(properties(&schema, batch, filtered))
            .with_parquet_schema(schema)
            .with_skip_arrow_metadata(true);
        let mut bytes = Vec::with_capacity(batch.get_array_memory_size() / 4);
        let mut writer = ArrowWriter::try_new_with_options(&mut bytes, batch.schema(), options).map_err(failed)?;
        writer.write(batch).map_err(failed)?;
        let metadata = writer.close().map_err(failed)?;
        let group = metadata.row_groups().first().ok_or_else(|| Error::new(ErrorKind::Internal, "no row group"))?;
        // What comes behind the columns is the footer of a file that this is not going to be.
        bytes.truncate(usize::try_from(extent(group).1).unwrap_or(usize::MAX));
        let group = nulls::complete(batch, group, file, &mut bytes).map_err(failed)?;
        Ok((bytes.into(), ParquetMetaData::new(metadata.file_metadata().clone(), vec![group])))
    }
}
