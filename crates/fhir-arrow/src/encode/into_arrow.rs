//! Columns that grew → Arrow arrays.

use std::sync::Arc;

use arrow::array::{
    Array, ArrayRef, BinaryArray, BooleanArray, BooleanBufferBuilder, Decimal128Array, Int32Array, ListArray, MapArray,
    StringArray, StructArray, TimestampMicrosecondArray, new_null_array,
};
use arrow::buffer::{Buffer, OffsetBuffer, ScalarBuffer};
use arrow::datatypes::{DataType, Field as ArrowField, Fields};
use arrow::error::ArrowError;

use crate::encode::columns::{Column, List, Structs, Values};
use crate::layout::arrow_schema::{UTC, list_type, map_type};
use crate::layout::present_columns::{PresentColumns, filled_type};

impl Column {
    /// The column as an Arrow array of `len` slots.
    fn finish(mut self, len: usize, filled: &PresentColumns) -> Result<ArrayRef, ArrowError> {
        self.pad(len);
        Ok(match self {
            Column::Boolean(mut values) => {
                let mut bits = BooleanBufferBuilder::new(len);
                bits.append_slice(&values.values);
                Arc::new(BooleanArray::new(bits.finish(), values.valid.finish()))
            }
            Column::Integer(mut values) => Arc::new(Int32Array::try_new(values.values.into(), values.valid.finish())?),
            Column::Decimal(mut values, data_type) => Arc::new(
                Decimal128Array::try_new(values.values.into(), values.valid.finish())?.with_data_type(data_type),
            ),
            Column::Instant(mut values) => Arc::new(
                TimestampMicrosecondArray::try_new(values.values.into(), values.valid.finish())?.with_timezone(UTC),
            ),
            Column::String(mut bytes) => {
                let offsets = OffsetBuffer::new(ScalarBuffer::from(bytes.offsets));
                let data = Buffer::from_vec(bytes.data);
                // Checks UTF-8 once more, at memory speed: worth it before bytes go to disk for years.
                Arc::new(StringArray::try_new(offsets, data, bytes.valid.finish())?)
            }
            Column::Binary(mut bytes) => {
                let offsets = OffsetBuffer::new(ScalarBuffer::from(bytes.offsets));
                Arc::new(BinaryArray::try_new(offsets, Buffer::from_vec(bytes.data), bytes.valid.finish())?)
            }
            Column::Structs(structs) => Arc::new(structs.finish(len, filled)?),
            Column::List(list) => Arc::new(list.finish(filled)?),
            Column::Map { offsets, keys } => {
                let mut offsets = offsets;
                let entries = keys.len();
                let values = std::mem::replace(&mut offsets.items, Column::Integer(Values::new(0)));
                let values = values.finish(entries, filled)?;
                let DataType::Map(entry_field, _) = map_type(list_item(values.data_type())) else {
                    return Err(ArrowError::SchemaError("a map type is not a map".into()));
                };
                let DataType::Struct(entry_fields) = entry_field.data_type().clone() else {
                    return Err(ArrowError::SchemaError("a map's entries are not a struct".into()));
                };
                let keys: ArrayRef = Arc::new(Int32Array::from(keys));
                let entries = StructArray::try_new(entry_fields, vec![keys, values], None)?;
                let ends = OffsetBuffer::new(ScalarBuffer::from(offsets.offsets));
                Arc::new(MapArray::try_new(entry_field, ends, entries, offsets.valid.finish(), false)?)
            }
        })
    }
}

fn list_item(list: &DataType) -> DataType {
    match list {
        DataType::List(item) => item.data_type().clone(),
        other => other.clone(),
    }
}

impl List {
    fn finish(mut self, filled: &PresentColumns) -> Result<ListArray, ArrowError> {
        let items_len = self.offsets.last().copied().unwrap_or(0) as usize;
        let items = self.items.finish(items_len, filled)?;
        let DataType::List(item_field) = list_type(items.data_type().clone()) else {
            return Err(ArrowError::SchemaError("a list type is not a list".into()));
        };
        let offsets = OffsetBuffer::new(ScalarBuffer::from(self.offsets));
        ListArray::try_new(item_field, offsets, items, self.valid.finish())
    }
}

impl Structs {
    /// Which fields were filled, at every depth.
    pub(crate) fn filled(&self) -> PresentColumns {
        let children = self.children.iter().enumerate();
        let children = children
            .filter_map(|(index, child)| Some((index, child.as_deref().filter(|child| child.has_values())?.filled())));
        PresentColumns { children: children.collect() }
    }

    /// Those of the columns of `known` that have a place here. The others are null throughout.
    pub(crate) fn made(&self, known: &PresentColumns) -> PresentColumns {
        let children = known.children.iter();
        let children =
            children.filter_map(|(index, inner)| Some((*index, self.children.get(*index)?.as_deref()?.made(inner)?)));
        PresentColumns { children: children.collect() }
    }

    /// The struct array of `len` slots with the columns of `filled`, which holds at least what was filled here.
    pub(crate) fn finish(mut self, len: usize, filled: &PresentColumns) -> Result<StructArray, ArrowError> {
        self.pad(len);
        let mut fields: Vec<ArrowField> = Vec::with_capacity(filled.children.len());
        let mut arrays: Vec<ArrayRef> = Vec::with_capacity(filled.children.len());
        for (index, inner) in &filled.children {
            let array = match self.children[*index].take() {
                Some(column) => column.finish(len, inner)?,
                None => new_null_array(&filled_type(&self.group.fields[*index], inner), len),
            };
            fields.push(ArrowField::new(&self.group.fields[*index].name, array.data_type().clone(), true));
            arrays.push(array);
        }
        StructArray::try_new_with_length(Fields::from(fields), arrays, self.valid.finish(), len)
    }
}

impl Column {
    /// Returns true if any slot has a value: a column may have been made for one that turned out not to be of its type.
    fn has_values(&self) -> bool {
        match self {
            Column::List(list) => list.items.has_values(),
            Column::Map { offsets, .. } => offsets.len() > 0,
            column => column.len() > 0,
        }
    }

    fn filled(&self) -> PresentColumns {
        match self {
            Column::Structs(structs) => structs.filled(),
            Column::List(list) => list.items.filled(),
            Column::Map { offsets, .. } => match &offsets.items {
                Column::List(per_key) => per_key.items.filled(),
                _ => PresentColumns::default(),
            },
            _ => PresentColumns::default(),
        }
    }

    /// See [`Structs::made`].
    fn made(&self, known: &PresentColumns) -> Option<PresentColumns> {
        let (inner, is_map) = match self {
            Column::List(list) => (&list.items, false),
            Column::Map { offsets, .. } => match &offsets.items {
                Column::List(per_key) => (&per_key.items, true),
                _ => return None,
            },
            column => (column, false),
        };
        let Column::Structs(structs) = inner else { return Some(PresentColumns::default()) };
        let made = structs.made(known);
        match (made.children.is_empty(), is_map) {
            (false, _) => Some(made),
            // No file can hold a group of nothing. An empty map says something, so it has its first column.
            (true, true) => Some(PresentColumns { children: vec![(0, PresentColumns::default())] }),
            (true, false) => None,
        }
    }
}
