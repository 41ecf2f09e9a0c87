//! Rows as JSON, as Spark's `toJSON` writes them: null members left out, a map's keys as texts, bytes in base64.
//! Arrow's own writer takes maps with text keys only, and ours are numbers.

use std::fmt::Write;

use arrow::array::{Array, ArrayRef, AsArray, RecordBatch};
use arrow::datatypes::DataType;
use arrow::error::ArrowError;
use arrow::util::display::array_value_to_string;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;

/// Appends one row as an object.
pub(super) fn write_row(batch: &RecordBatch, row: usize, out: &mut String) -> Result<(), ArrowError> {
    let schema = batch.schema();
    let names = schema.fields().iter().map(|field| field.name().as_str());
    write_members(names.zip(batch.columns()), row, out)
}

fn write_members<'a>(
    members: impl Iterator<Item = (&'a str, &'a ArrayRef)>,
    row: usize,
    out: &mut String,
) -> Result<(), ArrowError> {
    out.push('{');
    let mut first = true;
    for (name, column) in members.filter(|(_, column)| column.is_valid(row)) {
        if !std::mem::take(&mut first) {
            out.push(',');
        }
        write_text(name, out);
        out.push(':');
        write_value(column, row, out)?;
    }
    out.push('}');
    Ok(())
}

fn write_text(text: &str, out: &mut String) {
    // Writing a text as JSON cannot fail, nor can writing to a String.
    let _ = write!(out, "{}", serde_json::Value::from(text));
}

/// Appends one value.
pub(super) fn write_value(column: &ArrayRef, row: usize, out: &mut String) -> Result<(), ArrowError> {
    if column.is_null(row) {
        out.push_str("null");
        return Ok(());
    }
    match column.data_type() {
        DataType::Struct(fields) => {
            let columns = column.as_struct().columns();
            write_members(fields.iter().map(|field| field.name().as_str()).zip(columns), row, out)?;
        }
        DataType::List(_) => write_items(&column.as_list::<i32>().value(row), out)?,
        DataType::LargeList(_) => write_items(&column.as_list::<i64>().value(row), out)?,
        DataType::Map(_, _) => {
            let entries = column.as_map().value(row);
            out.push('{');
            for entry in 0..entries.len() {
                if entry > 0 {
                    out.push(',');
                }
                write_text(&array_value_to_string(entries.column(0), entry)?, out);
                out.push(':');
                write_value(entries.column(1), entry, out)?;
            }
            out.push('}');
        }
        DataType::Binary => write_text(&STANDARD.encode(column.as_binary::<i32>().value(row)), out),
        DataType::BinaryView => write_text(&STANDARD.encode(column.as_binary_view().value(row)), out),
        DataType::Boolean => out.push_str(if column.as_boolean().value(row) { "true" } else { "false" }),
        number if number.is_numeric() => {
            let text = array_value_to_string(column, row)?;
            // Floats that are no numbers have no place in JSON.
            out.push_str(if matches!(text.as_str(), "NaN" | "inf" | "-inf") { "null" } else { &text });
        }
        _ => write_text(&array_value_to_string(column, row)?, out),
    }
    Ok(())
}

fn write_items(items: &ArrayRef, out: &mut String) -> Result<(), ArrowError> {
    out.push('[');
    for item in 0..items.len() {
        if item > 0 {
            out.push(',');
        }
        write_value(items, item, out)?;
    }
    out.push(']');
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    use arrow::array::Int32Builder;
    use arrow::array::{Decimal128Array, Int32Array, MapBuilder, StringArray, StringBuilder};

    // Breaks if a map with number keys cannot be shown, or a decimal loses its digits.
    #[test]
    fn maps_decimals_and_nulls() {
        let mut map = MapBuilder::new(None, Int32Builder::new(), StringBuilder::new());
        map.keys().append_value(7);
        map.values().append_value("a\"b");
        map.append(true).unwrap();
        let decimal = Decimal128Array::from(vec![1_250_000]).with_precision_and_scale(32, 6).unwrap();
        let batch = RecordBatch::try_from_iter_with_nullable([
            ("m", Arc::new(map.finish()) as ArrayRef, true),
            ("d", Arc::new(decimal) as ArrayRef, true),
            ("n", Arc::new(Int32Array::from(vec![None])) as ArrayRef, true),
            ("s", Arc::new(StringArray::from(vec!["é"])) as ArrayRef, true),
        ])
        .unwrap();
        let mut text = String::new();
        write_row(&batch, 0, &mut text).unwrap();
        assert_eq!(text, r#"{"m":{"7":"a\"b"},"d":1.250000,"s":"é"}"#);
    }
}
