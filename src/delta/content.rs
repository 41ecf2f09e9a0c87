//! Whether two rows say the same, whichever columns their files have.

use arrow::array::{Array, ArrayRef, AsArray, RecordBatch};
use arrow::datatypes::{DataType, Decimal128Type, Int32Type, Int64Type, TimeUnit, TimestampMicrosecondType};
use twox_hash::XxHash3_128;

use super::table::storage;
use crate::error::{Error, ErrorKind, Result};

/// One hash a row over what is not null, by column name: a column that a file leaves out and a column of
/// nulls are the same.
pub(super) fn row_hashes(batch: &RecordBatch) -> Result<Vec<u128>> {
    let mut columns = Vec::with_capacity(batch.num_columns());
    for (field, column) in batch.schema().fields().iter().zip(batch.columns()) {
        columns.push((field.name().clone(), normal(column)?));
    }
    let mut hashes = Vec::with_capacity(batch.num_rows());
    let mut said = Vec::new();
    for row in 0..batch.num_rows() {
        said.clear();
        for (name, column) in &columns {
            if column.is_valid(row) {
                put(&mut said, name.as_bytes());
                say(column, row, &mut said)?;
            }
        }
        hashes.push(XxHash3_128::oneshot(&said));
    }
    Ok(hashes)
}

/// The types that other writers use for the same values, made one.
fn normal(column: &ArrayRef) -> Result<ArrayRef> {
    let to = match column.data_type() {
        DataType::Utf8View | DataType::LargeUtf8 => DataType::Utf8,
        DataType::BinaryView | DataType::LargeBinary => DataType::Binary,
        DataType::Timestamp(_, _) => DataType::Timestamp(TimeUnit::Microsecond, Some("UTC".into())),
        _ => return Ok(column.clone()),
    };
    arrow::compute::cast(column, &to).map_err(|error| storage(error, "a column cannot be compared"))
}

fn put(said: &mut Vec<u8>, bytes: &[u8]) {
    said.extend_from_slice(&(bytes.len() as u64).to_le_bytes());
    said.extend_from_slice(bytes);
}

/// Appends what a value says, unambiguously.
fn say(column: &ArrayRef, row: usize, said: &mut Vec<u8>) -> Result<()> {
    match column.data_type() {
        DataType::Boolean => said.push(column.as_boolean().value(row).into()),
        DataType::Int32 => said.extend_from_slice(&column.as_primitive::<Int32Type>().value(row).to_le_bytes()),
        DataType::Int64 => said.extend_from_slice(&column.as_primitive::<Int64Type>().value(row).to_le_bytes()),
        DataType::Decimal128(_, _) => {
            said.extend_from_slice(&column.as_primitive::<Decimal128Type>().value(row).to_le_bytes());
        }
        DataType::Timestamp(TimeUnit::Microsecond, _) => {
            said.extend_from_slice(&column.as_primitive::<TimestampMicrosecondType>().value(row).to_le_bytes());
        }
        DataType::Utf8 => put(said, column.as_string::<i32>().value(row).as_bytes()),
        DataType::Binary => put(said, column.as_binary::<i32>().value(row)),
        DataType::Struct(fields) => {
            let structs = column.as_struct();
            said.push(b'{');
            for (field, child) in fields.iter().zip(structs.columns()) {
                if child.is_valid(row) {
                    put(said, field.name().as_bytes());
                    say(&normal(child)?, row, said)?;
                }
            }
            said.push(b'}');
        }
        DataType::List(_) => say_items(&column.as_list::<i32>().value(row), said)?,
        DataType::Map(_, _) => {
            let entries = column.as_map().value(row);
            say_items(entries.column(0), said)?;
            say_items(entries.column(1), said)?;
        }
        other => {
            return Err(Error::new(ErrorKind::Table, format!("rows with a column of type {other} cannot be compared")));
        }
    }
    Ok(())
}

fn say_items(items: &ArrayRef, said: &mut Vec<u8>) -> Result<()> {
    let items = normal(items)?;
    said.extend_from_slice(&(items.len() as u64).to_le_bytes());
    for item in 0..items.len() {
        said.push(items.is_valid(item).into());
        if items.is_valid(item) {
            say(&items, item, said)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    use arrow::array::{Int32Array, StringArray};
    use arrow::datatypes::{Field, Schema};

    fn batch(columns: Vec<(&str, ArrayRef)>) -> RecordBatch {
        let fields: Vec<Field> =
            columns.iter().map(|(name, column)| Field::new(*name, column.data_type().clone(), true)).collect();
        let arrays = columns.into_iter().map(|(_, column)| column).collect();
        RecordBatch::try_new(Arc::new(Schema::new(fields)), arrays).unwrap()
    }

    #[test]
    fn a_column_of_nulls_and_a_column_left_out_are_the_same() {
        let ids: ArrayRef = Arc::new(StringArray::from(vec!["a", "b"]));
        let narrow = batch(vec![("id", ids.clone())]);
        let wide = batch(vec![("id", ids.clone()), ("n", Arc::new(Int32Array::from(vec![None, Some(1)])))]);
        let (narrow, wide) = (row_hashes(&narrow).unwrap(), row_hashes(&wide).unwrap());
        assert_eq!(narrow[0], wide[0]);
        assert_ne!(narrow[1], wide[1]);
        assert_ne!(narrow[0], narrow[1]);
    }
}
