//! Equality of rows, whichever columns their files have and whoever wrote them.
//!
//! A difference in form only is none: a canonical quantity of 25 at scale 2 and of 25e36 at scale 38; a `_scale` beyond
//! the six places that the decimal has; the numbers that link an element to its extensions (`_fid`), which Pathling
//! draws at random. So two writers of one table do not rewrite each other's rows.

use std::collections::HashMap;

use arrow::array::{Array, ArrayRef, AsArray, Int32Array, RecordBatch};
use arrow::datatypes::{DataType, Decimal128Type, Field, Int32Type, Int64Type, TimeUnit, TimestampMicrosecondType};
use twox_hash::XxHash3_128;

use crate::table::storage;
use crate::unchanged::LINE_HASH;
use foundation::error::{Error, ErrorKind, Result};

/// Places after the point that a decimal column has: beyond them `_scale` says nothing of the value that is there.
const PLACES: i32 = 6;

/// Depth to which extensions of extensions are followed; in a row whose numbers lead round in a circle, too.
const MAX_DEPTH: usize = 32;

/// One hash a row over what is not null, by column name: a column that a file leaves out and a column of
/// nulls are the same.
pub(crate) fn row_hashes(batch: &RecordBatch) -> Result<Vec<u128>> {
    let mut columns = Vec::with_capacity(batch.num_columns());
    let mut extensions = None;
    for (field, column) in batch.schema().fields().iter().zip(batch.columns()) {
        // It says where a row came from, not what the row says.
        if field.name() == LINE_HASH {
            continue;
        }
        if let ("_extension", DataType::Map(_, _)) = (field.name().as_str(), field.data_type()) {
            extensions = Some(column.clone());
            continue;
        }
        columns.push((field.clone(), normal(column)?));
    }
    let mut hashes = Vec::with_capacity(batch.num_rows());
    let mut content = Content { said: Vec::new(), extensions: HashMap::new(), depth: 0 };
    for row in 0..batch.num_rows() {
        content.said.clear();
        content.read_extensions(extensions.as_ref(), row)?;
        for (field, column) in &columns {
            content.field(field, column, row)?;
        }
        hashes.push(XxHash3_128::oneshot(&content.said));
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

/// Meaning of one row, unambiguously.
struct Content {
    said: Vec<u8>,
    /// The row's extensions, by the `_fid` of the element that has them.
    extensions: HashMap<i32, ArrayRef>,
    depth: usize,
}

impl Content {
    /// Reads the map of a row's extensions.
    fn read_extensions(&mut self, column: Option<&ArrayRef>, row: usize) -> Result<()> {
        self.extensions.clear();
        let Some(column) = column.filter(|column| column.is_valid(row)) else { return Ok(()) };
        let entries = column.as_map().value(row);
        let keys: Option<&Int32Array> = entries.column(0).as_primitive_opt::<Int32Type>();
        let lists = entries.column(1).as_list_opt::<i32>();
        let (Some(keys), Some(lists)) = (keys, lists) else {
            return Err(Error::new(
                ErrorKind::Table,
                "rows whose _extension is not a map from int to a list cannot be compared",
            ));
        };
        for entry in (0..entries.len()).filter(|entry| lists.is_valid(*entry)) {
            self.extensions.insert(keys.value(entry), lists.value(entry));
        }
        Ok(())
    }

    /// Appends a member of a struct, with its name, where it says anything.
    fn field(&mut self, field: &Field, column: &ArrayRef, row: usize) -> Result<()> {
        if column.is_null(row) {
            return Ok(());
        }
        if let ("_fid", DataType::Int32) = (field.name().as_str(), column.data_type()) {
            let list = self.extensions.get(&column.as_primitive::<Int32Type>().value(row)).cloned();
            let Some(list) = list.filter(|_| self.depth < MAX_DEPTH) else { return Ok(()) };
            put(&mut self.said, b"_extension");
            self.depth += 1;
            let done = self.items(&list, false);
            self.depth -= 1;
            return done;
        }
        let before = self.said.len();
        put(&mut self.said, field.name().as_bytes());
        let start = self.said.len();
        let is_scale = field.name().ends_with("_scale");
        match column.data_type() {
            DataType::Int32 if is_scale => self.scale(column.as_primitive::<Int32Type>().value(row)),
            DataType::List(_) if is_scale => self.items(&column.as_list::<i32>().value(row), true)?,
            DataType::Struct(_) if field.name() == "_value_canonicalized" => self.canonical(column, row)?,
            _ => self.say(column, row)?,
        }
        // Pathling writes a struct of nulls for a canonical value that its decimal does not hold; it says what none
        // says.
        if matches!(column.data_type(), DataType::Struct(_)) && matches!(&self.said[start..], b"" | b"{}") {
            self.said.truncate(before);
        }
        Ok(())
    }

    fn scale(&mut self, scale: i32) {
        self.said.extend_from_slice(&scale.min(PLACES).to_le_bytes());
    }

    /// Appends a canonical quantity: an unscaled number and its scale, of which many pairs are one number.
    fn canonical(&mut self, column: &ArrayRef, row: usize) -> Result<()> {
        let structs = column.as_struct();
        let value = structs.column_by_name("value").and_then(|value| value.as_primitive_opt::<Decimal128Type>());
        let scale = structs.column_by_name("scale").and_then(|scale| scale.as_primitive_opt::<Int32Type>());
        let (Some(value), Some(scale)) = (value, scale) else { return self.say(column, row) };
        if value.is_null(row) {
            return Ok(());
        }
        let (mut number, mut places) = (value.value(row), if scale.is_valid(row) { scale.value(row) } else { 0 });
        while number != 0 && number % 10 == 0 {
            (number, places) = (number / 10, places.saturating_sub(1));
        }
        if number == 0 {
            places = 0;
        }
        self.said.extend_from_slice(&number.to_le_bytes());
        self.said.extend_from_slice(&places.to_le_bytes());
        Ok(())
    }

    fn say(&mut self, column: &ArrayRef, row: usize) -> Result<()> {
        let said = &mut self.said;
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
                self.said.push(b'{');
                for (field, child) in fields.iter().zip(column.as_struct().columns()) {
                    if child.is_valid(row) {
                        self.field(field, &normal(child)?, row)?;
                    }
                }
                self.said.push(b'}');
            }
            DataType::List(_) => self.items(&column.as_list::<i32>().value(row), false)?,
            DataType::Map(_, _) => {
                let entries = column.as_map().value(row);
                self.items(entries.column(0), false)?;
                self.items(entries.column(1), false)?;
            }
            other => {
                return Err(Error::new(
                    ErrorKind::Table,
                    format!("rows with a column of type {other} cannot be compared"),
                ));
            }
        }
        Ok(())
    }

    /// Appends the items of a list; `scales` says that they are scales of decimals.
    fn items(&mut self, items: &ArrayRef, scales: bool) -> Result<()> {
        let items = normal(items)?;
        self.said.extend_from_slice(&(items.len() as u64).to_le_bytes());
        for item in 0..items.len() {
            self.said.push(items.is_valid(item).into());
            match (items.is_valid(item), scales, items.as_primitive_opt::<Int32Type>()) {
                (false, ..) => {}
                (true, true, Some(numbers)) => self.scale(numbers.value(item)),
                (true, ..) => self.say(&items, item)?,
            }
        }
        Ok(())
    }
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

    // Breaks if a row differs from itself since other text said the same, or since one file has no hashes.
    #[test]
    fn the_text_that_a_row_came_from_is_no_part_of_it() {
        let ids: ArrayRef = Arc::new(StringArray::from(vec!["a"]));
        let hash = |hash: i64| -> ArrayRef { Arc::new(arrow::array::Int64Array::from(vec![hash])) };
        let none = row_hashes(&batch(vec![("id", ids.clone())])).unwrap();
        for number in [1, 2] {
            assert_eq!(row_hashes(&batch(vec![("id", ids.clone()), (LINE_HASH, hash(number))])).unwrap(), none);
        }
    }

    fn structs(fields: Vec<(&str, ArrayRef)>) -> ArrayRef {
        let fields: Vec<_> = fields
            .into_iter()
            .map(|(name, array)| (Arc::new(Field::new(name, array.data_type().clone(), true)), array))
            .collect();
        Arc::new(arrow::array::StructArray::from(fields))
    }

    fn quantities(values: &[(i128, i32)]) -> Vec<u128> {
        let numbers = arrow::array::Decimal128Array::from_iter_values(values.iter().map(|value| value.0));
        let numbers: ArrayRef = Arc::new(numbers.with_precision_and_scale(38, 0).unwrap());
        let scales: ArrayRef = Arc::new(Int32Array::from_iter_values(values.iter().map(|value| value.1)));
        row_hashes(&batch(vec![("_value_canonicalized", structs(vec![("value", numbers), ("scale", scales)]))]))
            .unwrap()
    }

    // Breaks if a number that is written in another form counts as another, or two numbers as one.
    #[test]
    fn canonical_values_are_compared_as_numbers() {
        let same = quantities(&[(25, 2), (25 * 10i128.pow(36), 38), (250, 3), (2500, 4)]);
        assert!(same.iter().all(|hash| *hash == same[0]));
        let zeros = quantities(&[(0, 0), (0, 38)]);
        assert_eq!(zeros[0], zeros[1]);
        let other = quantities(&[(25, 2), (25, 3), (-25, 2), (26, 2), (0, 0)]);
        assert_eq!(other.iter().collect::<std::collections::HashSet<_>>().len(), 5);
    }

    // Breaks if a struct in which nothing stands is taken for something, as Pathling writes one for an overflow.
    #[test]
    fn a_struct_of_nulls_says_nothing() {
        let ids: ArrayRef = Arc::new(StringArray::from(vec!["a"]));
        let number: ArrayRef =
            Arc::new(arrow::array::Decimal128Array::from(vec![None]).with_precision_and_scale(38, 0).unwrap());
        let scale: ArrayRef = Arc::new(Int32Array::from(vec![None]));
        let inner = structs(vec![("value", number.clone()), ("scale", scale.clone())]);
        let none = row_hashes(&batch(vec![("id", ids.clone())])).unwrap();
        for name in ["_value_canonicalized", "other"] {
            assert_eq!(row_hashes(&batch(vec![("id", ids.clone()), (name, inner.clone())])).unwrap(), none, "{name}");
        }
        let nested = structs(vec![("_value_canonicalized", inner)]);
        assert_eq!(row_hashes(&batch(vec![("id", ids.clone()), ("valueQuantity", nested)])).unwrap(), none);
        let one = structs(vec![("value", Arc::new(Int32Array::from(vec![Some(0)])) as ArrayRef)]);
        assert_ne!(row_hashes(&batch(vec![("id", ids), ("other", one)])).unwrap(), none);
    }

    #[test]
    fn scales_beyond_what_the_decimal_holds_say_nothing() {
        let scales =
            |values: Vec<i32>| row_hashes(&batch(vec![("value_scale", Arc::new(Int32Array::from(values)))])).unwrap();
        let hashes = scales(vec![6, 7, 19, 5]);
        assert!(hashes[0] == hashes[1] && hashes[1] == hashes[2] && hashes[2] != hashes[3]);
    }

    // Breaks if the numbers that link elements to extensions make rows differ, or if another extension does not.
    #[test]
    fn extensions_are_compared_by_what_they_say() {
        use arrow::array::{Int32Builder, ListBuilder, MapBuilder, StringBuilder};
        let row = |fid: i32, key: i32, url: &str| {
            let mut map = MapBuilder::new(None, Int32Builder::new(), ListBuilder::new(StringBuilder::new()));
            map.keys().append_value(key);
            map.values().values().append_value(url);
            map.values().append(true);
            map.append(true).unwrap();
            let columns: Vec<(&str, ArrayRef)> =
                vec![("_fid", Arc::new(Int32Array::from(vec![fid]))), ("_extension", Arc::new(map.finish()))];
            row_hashes(&batch(columns)).unwrap()[0]
        };
        assert_eq!(row(0, 0, "a"), row(-77, -77, "a"));
        assert_ne!(row(0, 0, "a"), row(0, 0, "b"));
        // Nothing refers to it.
        assert_ne!(row(0, 0, "a"), row(0, 1, "a"));
        assert_eq!(row(0, 1, "a"), row(5, 6, "b"));
    }
}
