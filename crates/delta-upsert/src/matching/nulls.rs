//! Columns of a row group that no row of it fills, made without looking at the rows again.
//!
//! Readers must find every column of a group that has any (Spark before 4.1 takes the group for null otherwise,
//! SPARK-53535), and FHIR's groups have hundreds that are null. Such a column says nothing but where the group above it
//! is: its repetition and definition levels are the group's own, and the same for all columns of the group that are
//! null. They are worked out and packed once a group, and copied for each of its columns.

use std::collections::HashMap;

use arrow::array::{Array, ArrayRef, AsArray, RecordBatch};
use arrow::datatypes::{DataType, Fields, SchemaRef};
use parquet::arrow::ArrowSchemaConverter;
use parquet::basic::{Compression, Encoding, ZstdLevel};
use parquet::errors::{ParquetError, Result};
use parquet::file::metadata::{ColumnChunkMetaData, RowGroupMetaData};
use parquet::schema::types::{ColumnDescPtr, SchemaDescriptor};

/// Places of the values of a group, by Parquet's levels (Dremel): one entry for each of its places.
struct Levels {
    repetition: Vec<u8>,
    definition: Vec<u8>,
    /// The place in the group's array; none where something above it is null or empty.
    slots: Vec<Option<u32>>,
    /// The greatest repetition level so far.
    max_repetition: u8,
    /// Pages of null, by the widths of the levels: whole, and how long they are unpacked.
    pages: HashMap<(u8, u8), (Vec<u8>, usize)>,
}

impl Levels {
    fn of_rows(rows: usize) -> Self {
        Self {
            repetition: vec![0; rows],
            definition: vec![0; rows],
            slots: (0..rows as u32).map(Some).collect(),
            max_repetition: 0,
            pages: HashMap::new(),
        }
    }

    /// Levels of what lies in a group; where the group is `optional`, one more where it is there.
    fn within(&self, optional: Option<&ArrayRef>) -> Self {
        let valid =
            |slot: &Option<u32>| slot.filter(|slot| optional.is_none_or(|array| array.is_valid(*slot as usize)));
        let slots: Vec<Option<u32>> = self.slots.iter().map(valid).collect();
        let one_more = u8::from(optional.is_some());
        let definition =
            self.definition.iter().zip(&slots).map(|(level, slot)| level + if slot.is_some() { one_more } else { 0 });
        let definition = definition.collect();
        Self {
            repetition: self.repetition.clone(),
            definition,
            slots,
            max_repetition: self.max_repetition,
            pages: HashMap::new(),
        }
    }

    /// Levels of the items of a repeated group: `offsets` are those of its lists.
    fn repeated(&self, offsets: &[i32]) -> Self {
        let most = self.slots.len() + offsets.last().map_or(0, |end| *end as usize);
        let (mut repetition, mut definition, mut slots) =
            (Vec::with_capacity(most), Vec::with_capacity(most), Vec::with_capacity(most));
        let level = self.max_repetition + 1;
        for ((slot, above), defined) in self.slots.iter().zip(&self.repetition).zip(&self.definition) {
            let items = slot.map_or(0..0, |slot| offsets[slot as usize]..offsets[slot as usize + 1]);
            if items.is_empty() {
                repetition.push(*above);
                definition.push(*defined);
                slots.push(None);
            }
            let mut above = *above;
            for item in items {
                repetition.push(above);
                definition.push(defined + 1);
                slots.push(Some(item as u32));
                above = level;
            }
        }
        Self { repetition, definition, slots, max_repetition: level, pages: HashMap::new() }
    }

    /// A page of nulls of a column whose greatest levels are these, and how long it is unpacked.
    fn page(&mut self, column: &ColumnDescPtr) -> Result<&(Vec<u8>, usize)> {
        let width = |level: i16| (16 - (level as u16).leading_zeros()) as u8;
        let widths = (width(column.max_rep_level()), width(column.max_def_level()));
        if !self.pages.contains_key(&widths) {
            let mut levels = Vec::new();
            for (values, width) in [(&self.repetition, widths.0), (&self.definition, widths.1)] {
                if width > 0 {
                    let start = levels.len();
                    levels.extend_from_slice(&[0; 4]);
                    pack(values, width, &mut levels);
                    let length = (levels.len() - start - 4) as u32;
                    levels[start..start + 4].copy_from_slice(&length.to_le_bytes());
                }
            }
            let packed = zstd::bulk::compress(&levels, 1).map_err(|error| ParquetError::External(error.into()))?;
            let mut page = page_header(levels.len(), packed.len(), self.slots.len());
            let unpacked = page.len() + levels.len();
            page.extend_from_slice(&packed);
            self.pages.insert(widths, (page, unpacked));
        }
        self.pages.get(&widths).ok_or_else(|| ParquetError::General("a page that was just made".into()))
    }
}

/// Parquet's hybrid of runs and bit-packed groups of eight (Parquet format, "RLE").
fn pack(values: &[u8], width: u8, out: &mut Vec<u8>) {
    fn varint(mut number: usize, out: &mut Vec<u8>) {
        while number >= 0x80 {
            out.push(number as u8 | 0x80);
            number >>= 7;
        }
        out.push(number as u8);
    }
    let run_at = |at: usize| values[at..].iter().take_while(|value| **value == values[at]).count();
    let mut at = 0;
    while at < values.len() {
        let run = run_at(at);
        if run >= 8 {
            varint(run << 1, out);
            out.push(values[at]);
            at += run;
            continue;
        }
        // Groups of eight until a run begins at the start of one; only the last may be short.
        let start = at;
        while at < values.len()
            && (at == start || values[at..].len() < 8 || values[at..at + 8].iter().any(|v| *v != values[at]))
        {
            at = (at + 8).min(values.len());
        }
        let groups = (at - start).div_ceil(8);
        varint(groups << 1 | 1, out);
        for group in values[start..at].chunks(8) {
            let mut bits = 0u64;
            for (place, value) in group.iter().enumerate() {
                bits |= u64::from(*value) << (place * usize::from(width));
            }
            out.extend_from_slice(&bits.to_le_bytes()[..usize::from(width)]);
        }
    }
}

/// The header of a data page of version 1 in Thrift's compact protocol (Parquet format, `PageHeader`).
fn page_header(unpacked: usize, packed: usize, values: usize) -> Vec<u8> {
    fn i32_field(number: usize, out: &mut Vec<u8>) {
        // A field that follows the one before by one, of type i32: zigzag, then seven bits a byte.
        out.push(0x15);
        let mut zigzag = (number as u64) << 1;
        while zigzag >= 0x80 {
            out.push(zigzag as u8 | 0x80);
            zigzag >>= 7;
        }
        out.push(zigzag as u8);
    }
    let mut out = Vec::with_capacity(32);
    i32_field(0, &mut out); // type: DATA_PAGE
    i32_field(unpacked, &mut out);
    i32_field(packed, &mut out);
    out.push(0x2c); // field 5, a struct: data_page_header
    i32_field(values, &mut out);
    i32_field(0, &mut out); // encoding: PLAIN
    i32_field(3, &mut out); // definition levels: RLE
    i32_field(3, &mut out); // repetition levels: RLE
    out.extend_from_slice(&[0, 0]);
    out
}

/// Puts the columns of `file` that `batch` lacks into a row group.
struct Completion<'a> {
    columns: Vec<ColumnDescPtr>,
    /// Columns that the rows fill, as they were written.
    written: std::vec::IntoIter<ColumnChunkMetaData>,
    bytes: &'a mut Vec<u8>,
    done: Vec<ColumnChunkMetaData>,
}

/// Adds to `bytes`, in which the columns of `group` lie that `batch` has, those that `file` has beside them.
pub(crate) fn complete(
    batch: &RecordBatch,
    group: &RowGroupMetaData,
    file: &SchemaRef,
    bytes: &mut Vec<u8>,
) -> Result<RowGroupMetaData> {
    let schema = std::sync::Arc::new(ArrowSchemaConverter::new().convert(file)?);
    let mut completion = Completion {
        columns: SchemaDescriptor::columns(&schema).to_vec(),
        written: group.columns().to_vec().into_iter(),
        bytes,
        done: Vec::new(),
    };
    let mut rows = Levels::of_rows(batch.num_rows());
    let here = |name: &str| batch.column_by_name(name).cloned();
    completion.fields(file.fields(), &here, &mut rows)?;
    let mut builder = RowGroupMetaData::builder(schema).set_num_rows(group.num_rows());
    builder = builder.set_total_byte_size(completion.done.iter().map(ColumnChunkMetaData::uncompressed_size).sum());
    if let Some(offset) = group.file_offset() {
        builder = builder.set_file_offset(offset);
    }
    builder.set_column_metadata(completion.done).build()
}

impl Completion<'_> {
    fn fields(&mut self, file: &Fields, here: &dyn Fn(&str) -> Option<ArrayRef>, levels: &mut Levels) -> Result<()> {
        for field in file {
            match here(field.name()) {
                Some(array) => self.array(field.data_type(), field.is_nullable(), &array, levels)?,
                None => self.nulls(field.data_type(), levels)?,
            }
        }
        Ok(())
    }

    /// The columns of an array that is there, those added that it lacks.
    fn array(&mut self, file: &DataType, nullable: bool, array: &ArrayRef, levels: &Levels) -> Result<()> {
        if same_leaves(file, array.data_type()) {
            for _ in 0..leaves(file) {
                let written =
                    self.written.next().ok_or_else(|| ParquetError::General("a column was not written".into()))?;
                self.done.push(written);
            }
            return Ok(());
        }
        let mut own = levels.within(nullable.then_some(array));
        match file {
            DataType::Struct(fields) => {
                let structs = array.as_struct();
                self.fields(fields, &|name| structs.column_by_name(name).cloned(), &mut own)
            }
            DataType::List(item) => {
                let lists = array.as_list::<i32>();
                let items = own.repeated(lists.offsets());
                self.array(item.data_type(), item.is_nullable(), lists.values(), &items)
            }
            DataType::Map(entries, _) => {
                let maps = array.as_map();
                let DataType::Struct(fields) = entries.data_type() else {
                    return Err(ParquetError::General("a map without entries".into()));
                };
                let items = own.repeated(maps.offsets());
                for (field, column) in fields.iter().zip(maps.entries().columns()) {
                    self.array(field.data_type(), field.is_nullable(), column, &items)?;
                }
                Ok(())
            }
            other => Err(ParquetError::General(format!("a column of type {other} differs from the file's"))),
        }
    }

    /// The columns of something that no row has.
    fn nulls(&mut self, file: &DataType, levels: &mut Levels) -> Result<()> {
        for _ in 0..leaves(file) {
            let column = self.columns.get(self.done.len()).cloned();
            let column = column.ok_or_else(|| ParquetError::General("more columns than the file has".into()))?;
            let values = levels.slots.len() as i64;
            let (page, unpacked) = levels.page(&column)?;
            let offset = self.bytes.len() as i64;
            let chunk = ColumnChunkMetaData::builder(column)
                .set_encodings(vec![Encoding::PLAIN, Encoding::RLE])
                .set_compression(Compression::ZSTD(ZstdLevel::default()))
                .set_num_values(values)
                .set_total_compressed_size(page.len() as i64)
                .set_total_uncompressed_size(*unpacked as i64)
                .set_data_page_offset(offset)
                .build()?;
            self.bytes.extend_from_slice(page);
            self.done.push(chunk);
        }
        Ok(())
    }
}

fn leaves(data_type: &DataType) -> usize {
    match data_type {
        DataType::Struct(fields) => fields.iter().map(|field| leaves(field.data_type())).sum(),
        DataType::List(item) | DataType::Map(item, _) => leaves(item.data_type()),
        _ => 1,
    }
}

/// Returns true if an array has all the columns of the file's type, which are in the same order.
fn same_leaves(file: &DataType, array: &DataType) -> bool {
    leaves(file) == leaves(array)
}
