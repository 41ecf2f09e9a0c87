//! Columns that grow where values are, and nowhere else.
//!
//! A column is told the slot (row, or item of the enclosing list) that a value belongs to and fills the
//! slots before it with null. A column that is never told anything is never made, so a row costs what it
//! has and not what its type could have.

use std::sync::Arc;

use arrow::array::{
    Array, ArrayRef, BinaryArray, BooleanArray, BooleanBufferBuilder, Decimal128Array, Int32Array, ListArray, MapArray,
    NullBufferBuilder, StringArray, StructArray, TimestampMicrosecondArray, new_null_array,
};
use arrow::buffer::{Buffer, OffsetBuffer, ScalarBuffer};
use arrow::datatypes::{DataType, Field as ArrowField, Fields};
use arrow::error::ArrowError;

use super::arrow_schema::{UTC, list_type, map_type};
use super::layout::{Field, Group, Node};

/// Values of one primitive type with their validity.
#[derive(Debug)]
pub(super) struct Values<T> {
    values: Vec<T>,
    valid: NullBufferBuilder,
}

impl<T: Clone + Default> Values<T> {
    fn new() -> Self {
        Self { values: Vec::new(), valid: NullBufferBuilder::new(0) }
    }
    fn pad(&mut self, slot: usize) {
        if slot > self.values.len() {
            self.valid.append_n_nulls(slot - self.values.len());
            self.values.resize(slot, T::default());
        }
    }
    #[inline]
    fn put(&mut self, slot: usize, value: T) {
        self.pad(slot);
        self.values.push(value);
        self.valid.append_non_null();
    }
}

/// Strings or bytes.
#[derive(Debug)]
pub(super) struct Bytes {
    offsets: Vec<i32>,
    data: Vec<u8>,
    valid: NullBufferBuilder,
}

impl Bytes {
    fn new() -> Self {
        Self { offsets: vec![0], data: Vec::new(), valid: NullBufferBuilder::new(0) }
    }
    fn len(&self) -> usize {
        self.offsets.len() - 1
    }
    fn pad(&mut self, slot: usize) {
        if slot > self.len() {
            self.valid.append_n_nulls(slot - self.len());
            self.offsets.resize(slot + 1, self.data.len() as i32);
        }
    }
    #[inline]
    fn end_value(&mut self) {
        // A batch is closed long before 2 GiB: `Encoder::is_full` watches the bytes that came in.
        self.offsets.push(self.data.len() as i32);
        self.valid.append_non_null();
    }
    #[inline]
    fn put(&mut self, slot: usize, parts: &[&[u8]]) {
        self.pad(slot);
        for part in parts {
            self.data.extend_from_slice(part);
        }
        self.end_value();
    }
}

/// Repeated values: item slots by offsets.
#[derive(Debug)]
pub(super) struct List {
    offsets: Vec<i32>,
    valid: NullBufferBuilder,
    /// The items.
    pub items: Column,
}

impl List {
    fn len(&self) -> usize {
        self.offsets.len() - 1
    }
    fn pad(&mut self, slot: usize, ends: i32) {
        if slot > self.len() {
            self.valid.append_n_nulls(slot - self.len());
            self.offsets.resize(slot + 1, ends);
        }
    }
    /// Where the items of the list that `slot` is about to get begin.
    pub fn begin(&mut self, slot: usize) -> usize {
        let ends = self.offsets.last().copied().unwrap_or(0);
        self.pad(slot, ends);
        ends as usize
    }
    /// Ends the list begun last: its items end at item slot `end`.
    pub fn end(&mut self, end: usize) {
        self.offsets.push(end as i32);
        self.valid.append_non_null();
    }
}

/// A struct: its children are made when they are first filled.
#[derive(Debug)]
pub(super) struct Structs {
    /// What it is.
    pub group: Arc<Group>,
    len: usize,
    valid: NullBufferBuilder,
    /// Child columns, by the group's field.
    pub children: Vec<Option<Box<Column>>>,
}

impl Structs {
    pub fn new(group: Arc<Group>) -> Self {
        let children = (0..group.fields.len()).map(|_| None).collect();
        Self { group, len: 0, valid: NullBufferBuilder::new(0), children }
    }
    fn pad(&mut self, slot: usize) {
        if slot > self.len {
            self.valid.append_n_nulls(slot - self.len);
            self.len = slot;
        }
    }
    /// Marks the struct at `slot` as present.
    #[inline]
    pub fn put(&mut self, slot: usize) {
        self.pad(slot);
        self.valid.append_non_null();
        self.len += 1;
    }
    /// The child column of field `index`, made if it was not there.
    #[inline]
    pub fn child(&mut self, index: usize) -> &mut Column {
        let field = &self.group.fields[index];
        self.children[index].get_or_insert_with(|| Box::new(Column::new(field)))
    }
}

/// Any column.
#[derive(Debug)]
pub(super) enum Column {
    Boolean(Values<bool>),
    Integer(Values<i32>),
    Decimal(Values<i128>, DataType),
    Instant(Values<i64>),
    String(Bytes),
    Binary(Bytes),
    Structs(Structs),
    List(Box<List>),
    /// `_extension`: keys beside a list of lists of structs.
    Map {
        offsets: Box<List>,
        keys: Vec<i32>,
    },
}

impl Column {
    pub fn new(field: &Field) -> Self {
        if let Node::Extensions(group) = &field.node {
            let per_key = Column::list(Column::Structs(Structs::new(group.clone())));
            return Column::Map { offsets: Box::new(List::of(per_key)), keys: Vec::new() };
        }
        let item = Self::single(&field.node);
        if field.repeats { Self::list(item) } else { item }
    }

    fn list(items: Column) -> Self {
        Column::List(Box::new(List::of(items)))
    }

    fn single(node: &Node) -> Self {
        match node {
            Node::Boolean => Column::Boolean(Values::new()),
            Node::Integer => Column::Integer(Values::new()),
            Node::Decimal | Node::Unscaled => Column::Decimal(Values::new(), node.data_type()),
            Node::Instant => Column::Instant(Values::new()),
            Node::Binary => Column::Binary(Bytes::new()),
            Node::Group(group) | Node::Extensions(group) => Column::Structs(Structs::new(group.clone())),
            // Foreign columns are never filled.
            Node::String | Node::Foreign(_) => Column::String(Bytes::new()),
        }
    }

    /// Slots that were told a value or passed over.
    pub fn len(&self) -> usize {
        match self {
            Column::Boolean(values) => values.values.len(),
            Column::Integer(values) => values.values.len(),
            Column::Decimal(values, _) => values.values.len(),
            Column::Instant(values) => values.values.len(),
            Column::String(bytes) | Column::Binary(bytes) => bytes.len(),
            Column::Structs(structs) => structs.len,
            Column::List(list) => list.len(),
            Column::Map { offsets, .. } => offsets.len(),
        }
    }

    pub fn put_bool(&mut self, slot: usize, value: bool) {
        if let Column::Boolean(values) = self {
            values.put(slot, value);
        }
    }
    pub fn put_i32(&mut self, slot: usize, value: i32) {
        if let Column::Integer(values) = self {
            values.put(slot, value);
        }
    }
    pub fn put_i64(&mut self, slot: usize, value: i64) {
        if let Column::Instant(values) = self {
            values.put(slot, value);
        }
    }
    pub fn put_i128(&mut self, slot: usize, value: i128) {
        if let Column::Decimal(values, _) = self {
            values.put(slot, value);
        }
    }
    /// A string or bytes, put together from parts.
    #[inline]
    pub fn put_bytes(&mut self, slot: usize, parts: &[&[u8]]) {
        if let Column::String(bytes) | Column::Binary(bytes) = self {
            bytes.put(slot, parts);
        }
    }

    fn pad(&mut self, slot: usize) {
        match self {
            Column::Boolean(values) => values.pad(slot),
            Column::Integer(values) => values.pad(slot),
            Column::Decimal(values, _) => values.pad(slot),
            Column::Instant(values) => values.pad(slot),
            Column::String(bytes) | Column::Binary(bytes) => bytes.pad(slot),
            Column::Structs(structs) => structs.pad(slot),
            Column::List(list) => {
                let ends = list.items.len() as i32;
                list.pad(slot, ends);
            }
            Column::Map { offsets, keys } => {
                let ends = keys.len() as i32;
                offsets.pad(slot, ends);
            }
        }
    }

    /// The column as an Arrow array of `len` slots.
    fn finish(mut self, len: usize, filled: &Filled) -> Result<ArrayRef, ArrowError> {
        self.pad(len);
        Ok(match self {
            Column::Boolean(mut values) => {
                let mut bits = BooleanBufferBuilder::new(len);
                bits.append_slice(&values.values);
                Arc::new(BooleanArray::new(bits.finish(), values.valid.finish()))
            }
            Column::Integer(mut values) => Arc::new(Int32Array::try_new(values.values.into(), values.valid.finish())?),
            Column::Decimal(mut values, data_type) => {
                Arc::new(Decimal128Array::try_new(values.values.into(), values.valid.finish())?.with_data_type(data_type))
            }
            Column::Instant(mut values) => {
                Arc::new(TimestampMicrosecondArray::try_new(values.values.into(), values.valid.finish())?.with_timezone(UTC))
            }
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
                let values = std::mem::replace(&mut offsets.items, Column::Integer(Values::new()));
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
    fn of(items: Column) -> Self {
        Self { offsets: vec![0], valid: NullBufferBuilder::new(0), items }
    }

    fn finish(mut self, filled: &Filled) -> Result<ListArray, ArrowError> {
        let items_len = self.offsets.last().copied().unwrap_or(0) as usize;
        let items = self.items.finish(items_len, filled)?;
        let DataType::List(item_field) = list_type(items.data_type().clone()) else {
            return Err(ArrowError::SchemaError("a list type is not a list".into()));
        };
        let offsets = OffsetBuffer::new(ScalarBuffer::from(self.offsets));
        ListArray::try_new(item_field, offsets, items, self.valid.finish())
    }
}

/// Which columns of a layout hold anything, as a tree beside the layout's. Rows that were encoded apart
/// are written with the union, so that they fit into one file.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Filled {
    children: Vec<(usize, Filled)>,
}

impl Filled {
    /// Every field of `group`, at every depth.
    fn all(group: &Group) -> Self {
        let below = |field: &Field| match &field.node {
            Node::Group(group) | Node::Extensions(group) => Self::all(group),
            _ => Self::default(),
        };
        Self { children: group.fields.iter().map(below).enumerate().collect() }
    }

    /// Adds what `other` has; whether anything was new.
    pub fn merge(&mut self, other: &Filled) -> bool {
        let mut grew = false;
        for (index, theirs) in &other.children {
            match self.children.binary_search_by_key(index, |child| child.0) {
                Ok(at) => grew |= self.children[at].1.merge(theirs),
                Err(at) => {
                    self.children.insert(at, (*index, theirs.clone()));
                    grew = true;
                }
            }
        }
        grew
    }
}

impl Structs {
    /// Which fields were filled, at every depth.
    pub fn filled(&self) -> Filled {
        let children = self.children.iter().enumerate();
        let children =
            children.filter_map(|(index, child)| Some((index, child.as_deref().filter(|child| child.has_values())?.filled())));
        Filled { children: children.collect() }
    }

    /// The struct array of `len` slots with the columns of `filled`, which holds at least what was filled here.
    pub fn finish(mut self, len: usize, filled: &Filled) -> Result<StructArray, ArrowError> {
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
    /// Whether any slot has a value: a column may have been made for one that turned out not to be of its type.
    fn has_values(&self) -> bool {
        match self {
            Column::List(list) => list.items.has_values(),
            Column::Map { keys, .. } => !keys.is_empty(),
            column => column.len() > 0,
        }
    }

    fn filled(&self) -> Filled {
        match self {
            Column::Structs(structs) => structs.filled(),
            Column::List(list) => list.items.filled(),
            // DataFusion adapts structs and lists whose files lack fields to the table's type, but not maps
            // ("Cannot cast column"), so the values of the map are always written whole.
            Column::Map { offsets, .. } => match &offsets.items {
                Column::List(per_key) => match &per_key.items {
                    Column::Structs(structs) => Filled::all(&structs.group),
                    _ => Filled::default(),
                },
                _ => Filled::default(),
            },
            _ => Filled::default(),
        }
    }
}

/// The Arrow type of `field` with only the columns of `filled`.
fn filled_type(field: &Field, filled: &Filled) -> DataType {
    let structs = |group: &Group| {
        let fields = filled.children.iter().map(|(index, inner)| {
            let field = &group.fields[*index];
            ArrowField::new(&field.name, filled_type(field, inner), true)
        });
        DataType::Struct(fields.collect())
    };
    let single = match &field.node {
        Node::Group(group) => structs(group),
        Node::Extensions(group) => return map_type(structs(group)),
        leaf => leaf.data_type(),
    };
    if field.repeats { list_type(single) } else { single }
}
