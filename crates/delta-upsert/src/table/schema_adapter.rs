//! Rows of files with different columns, in one file: the columns that at least one of them has.

use std::collections::HashSet;
use std::sync::Arc;

use arrow::array::{
    Array, ArrayRef, AsArray, ListArray, MapArray, RecordBatch, RecordBatchOptions, StructArray, new_null_array,
};
use arrow::compute::CastOptions;
use arrow::datatypes::{DataType, Field, FieldRef, Fields, Schema, SchemaRef};

use crate::table::storage;
use foundation::error::{Error, ErrorKind, Result};

/// The columns of `table` that at least one of `files` has, in the table's order. Maps are whole: readers do not widen
/// the values of a map.
pub(crate) fn union(table: &Schema, files: &[SchemaRef]) -> Schema {
    let found: Vec<&Fields> = files.iter().map(|file| file.fields()).collect();
    Schema::new(union_fields(table.fields(), &found))
}

fn union_fields(table: &Fields, files: &[&Fields]) -> Fields {
    let field = |field: &FieldRef| {
        let found: Vec<&FieldRef> =
            files.iter().filter_map(|fields| fields.iter().find(|f| f.name() == field.name())).collect();
        union_field(field, &found)
    };
    table.iter().filter_map(field).collect()
}

fn union_field(table: &FieldRef, found: &[&FieldRef]) -> Option<FieldRef> {
    if found.is_empty() {
        return None;
    }
    let data_type = match table.data_type() {
        DataType::Struct(fields) => {
            let inner: Vec<&Fields> = found.iter().filter_map(|field| struct_fields(field)).collect();
            let fields = union_fields(fields, &inner);
            if fields.is_empty() {
                return None;
            }
            DataType::Struct(fields)
        }
        DataType::List(item) => {
            let items: Vec<&FieldRef> = found.iter().filter_map(|field| list_item(field)).collect();
            DataType::List(union_field(item, &items)?)
        }
        other => other.clone(),
    };
    Some(Arc::new(table.as_ref().clone().with_data_type(data_type)))
}

fn struct_fields(field: &FieldRef) -> Option<&Fields> {
    match field.data_type() {
        DataType::Struct(fields) => Some(fields),
        _ => None,
    }
}

fn list_item(field: &FieldRef) -> Option<&FieldRef> {
    match field.data_type() {
        DataType::List(item) | DataType::LargeList(item) => Some(item),
        _ => None,
    }
}

/// The columns of `table` of these names, whole.
pub(crate) fn whole(table: &Schema, names: &HashSet<String>) -> Schema {
    Schema::new(table.fields().iter().filter(|field| names.contains(field.name())).cloned().collect::<Vec<_>>())
}

/// `batch` without the columns, at every depth, that no row of it fills. Of a group that is there and empty one column
/// stays, to say so.
pub(crate) fn narrow(batch: &RecordBatch) -> Result<RecordBatch> {
    let schema = batch.schema();
    let (mut fields, mut columns) = (Vec::new(), Vec::new());
    for (field, column) in schema.fields().iter().zip(batch.columns()) {
        // A batch has a column, whatever its rows say.
        let column =
            if column.null_count() < column.len() || field.name() == "id" { narrowed(column)? } else { continue };
        fields.push(Arc::new(field.as_ref().clone().with_data_type(column.data_type().clone())));
        columns.push(column);
    }
    RecordBatch::try_new_with_options(
        Arc::new(Schema::new(fields)),
        columns,
        &RecordBatchOptions::new().with_row_count(Some(batch.num_rows())),
    )
    .map_err(|error| storage(error, "record batches cannot be concatenated"))
}

fn narrowed(column: &ArrayRef) -> Result<ArrayRef> {
    let failed = |error| storage(error, "a column cannot be read");
    let item =
        |of: &FieldRef, values: &ArrayRef| Arc::new(of.as_ref().clone().with_data_type(values.data_type().clone()));
    Ok(match column.data_type() {
        DataType::Struct(fields) => {
            let structs = column.as_struct();
            let filled = |column: &ArrayRef| column.null_count() < column.len();
            let some = structs.columns().iter().any(filled);
            let kept = fields.iter().zip(structs.columns()).enumerate();
            let kept = kept.filter(|(at, (_, child))| if some { filled(child) } else { *at == 0 });
            let kept = kept.map(|(_, (field, child))| {
                let child = narrowed(child)?;
                Ok((item(field, &child), child))
            });
            let (fields, children): (Vec<FieldRef>, Vec<ArrayRef>) =
                kept.collect::<Result<Vec<_>>>()?.into_iter().unzip();
            let nulls = structs.nulls().cloned();
            Arc::new(StructArray::try_new_with_length(fields.into(), children, nulls, column.len()).map_err(failed)?)
        }
        DataType::List(of) => {
            let lists = column.as_list::<i32>();
            let values = narrowed(lists.values())?;
            let nulls = lists.nulls().cloned();
            Arc::new(ListArray::try_new(item(of, &values), lists.offsets().clone(), values, nulls).map_err(failed)?)
        }
        // Readers do not widen the values of a map.
        _ => column.clone(),
    })
}

/// `batch` with the columns of `schema`: null for what it lacks, and without what `schema` lacks.
pub fn adapt(batch: &RecordBatch, schema: &SchemaRef) -> Result<RecordBatch> {
    let rows = batch.num_rows();
    let columns = schema.fields().iter().map(|field| adapt_column(batch.column_by_name(field.name()), field, rows));
    let columns = columns.collect::<Result<Vec<_>>>()?;
    RecordBatch::try_new_with_options(schema.clone(), columns, &RecordBatchOptions::new().with_row_count(Some(rows)))
        .map_err(|error| storage(error, "rows do not fit the table's columns"))
}

fn adapt_column(column: Option<&ArrayRef>, field: &Field, rows: usize) -> Result<ArrayRef> {
    let Some(column) = column else { return Ok(new_null_array(field.data_type(), rows)) };
    if column.data_type() == field.data_type() {
        return Ok(column.clone());
    }
    let failed = |error| storage(error, &format!("column {} does not fit the table's", field.name()));
    let wrong =
        || Error::new(ErrorKind::Table, format!("column {} of a file is not a {}", field.name(), field.data_type()));
    Ok(match field.data_type() {
        DataType::Struct(fields) => {
            let structs = column.as_struct_opt().ok_or_else(wrong)?;
            let children =
                fields.iter().map(|field| adapt_column(structs.column_by_name(field.name()), field, column.len()));
            let children = children.collect::<Result<Vec<_>>>()?;
            let nulls = structs.nulls().cloned();
            Arc::new(StructArray::try_new_with_length(fields.clone(), children, nulls, column.len()).map_err(failed)?)
        }
        DataType::List(item) => {
            let lists = column.as_list_opt::<i32>().ok_or_else(wrong)?;
            let values = adapt_column(Some(lists.values()), item, lists.values().len())?;
            Arc::new(
                ListArray::try_new(item.clone(), lists.offsets().clone(), values, lists.nulls().cloned())
                    .map_err(failed)?,
            )
        }
        DataType::Map(entries, sorted) => {
            let maps = column.as_map_opt().ok_or_else(wrong)?;
            let DataType::Struct(fields) = entries.data_type() else { return Err(wrong()) };
            // The key and the value, whatever the file calls them.
            let children = fields.iter().zip(maps.entries().columns());
            let children = children.map(|(field, child)| adapt_column(Some(child), field, child.len()));
            let children = children.collect::<Result<Vec<_>>>()?;
            let items = StructArray::try_new(fields.clone(), children, None).map_err(failed)?;
            let maps =
                MapArray::try_new(entries.clone(), maps.offsets().clone(), items, maps.nulls().cloned(), *sorted);
            Arc::new(maps.map_err(failed)?)
        }
        // A value that does not fit is an error, never a null.
        leaf => arrow::compute::cast_with_options(column, leaf, &CastOptions { safe: false, ..CastOptions::default() })
            .map_err(failed)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use fhir_arrow::{Layout, LayoutOptions, arrow_schema};

    fn field(name: &str, data_type: DataType) -> FieldRef {
        Arc::new(Field::new(name, data_type, true))
    }

    // Breaks if a value moves to another column, or if a null list becomes an empty one.
    #[test]
    fn rows_keep_their_values_and_get_null_for_the_rest() {
        let table = arrow_schema(&Layout::pathling("Patient", &LayoutOptions::default()).unwrap());
        let read = |json: &str, fields: &[FieldRef]| {
            let schema = Arc::new(Schema::new(fields.to_vec()));
            let mut decoder = arrow::json::ReaderBuilder::new(schema).build_decoder().unwrap();
            decoder.decode(json.as_bytes()).unwrap();
            decoder.flush().unwrap().unwrap()
        };
        let text = || DataType::Utf8;
        let name = |fields: Vec<FieldRef>| {
            let item = Arc::new(Field::new("element", DataType::Struct(fields.into()), true));
            field("name", DataType::List(item))
        };
        let one = read(
            r#"{"id":"a","name":[{"family":"A"},null]}{"id":"b"}{"id":"c","name":[]}"#,
            &[field("id", text()), name(vec![field("family", text())])],
        );
        let two = read(
            r#"{"name":[{"text":"B"}],"gender":"x","id":"d","ours":"not theirs"}"#,
            &[name(vec![field("text", text())]), field("gender", text()), field("id", text()), field("ours", text())],
        );
        let both = Arc::new(union(&table, &[one.schema(), two.schema()]));
        let names: Vec<&String> = both.fields().iter().map(|field| field.name()).collect();
        assert_eq!(names, ["id", "name", "gender"], "the table's order");
        let batches = [adapt(&one, &both).unwrap(), adapt(&two, &both).unwrap()];
        let mut json = Vec::new();
        let mut writer = arrow::json::LineDelimitedWriter::new(&mut json);
        writer.write_batches(&batches.iter().collect::<Vec<_>>()).unwrap();
        drop(writer);
        let lines = String::from_utf8(json).unwrap();
        let lines: Vec<&str> = lines.lines().collect();
        assert_eq!(
            lines,
            [
                r#"{"id":"a","name":[{"family":"A"},null]}"#,
                r#"{"id":"b"}"#,
                r#"{"id":"c","name":[]}"#,
                r#"{"id":"d","name":[{"text":"B"}],"gender":"x"}"#
            ]
        );
    }
}
