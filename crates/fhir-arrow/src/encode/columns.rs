//! Columns that grow where values are, and nowhere else.
//!
//! A column is told the slot (row, or item of the enclosing list) that a value belongs to and fills the
//! slots before it with null. A column that is never told anything is never made, so a row costs what it
//! has and not what its type could have.

use std::sync::Arc;

use arrow::array::NullBufferBuilder;
use arrow::datatypes::DataType;

use crate::layout::{Field, Group, Node};

/// Size of a column in the batch before: the next one of its type is made that large at once, since growing
/// by doubling copies everything once more.
#[derive(Debug, Default)]
pub(crate) struct Sizes {
    slots: usize,
    bytes: usize,
    /// Of a struct's children by field, of a list's or map's items.
    children: Vec<Option<Box<Sizes>>>,
}

impl Sizes {
    fn slots(sizes: Option<&Sizes>) -> usize {
        // Batches differ a little.
        sizes.map_or(0, |sizes| sizes.slots + sizes.slots / 16)
    }
    fn child(&mut self, index: usize) -> Option<Box<Sizes>> {
        self.children.get_mut(index).and_then(Option::take)
    }
}

/// Values of one primitive type with their validity.
#[derive(Debug)]
pub(crate) struct Values<T> {
    pub values: Vec<T>,
    pub valid: NullBufferBuilder,
}

impl<T: Clone + Default> Values<T> {
    pub(crate) fn new(slots: usize) -> Self {
        Self { values: Vec::with_capacity(slots), valid: NullBufferBuilder::new(slots) }
    }
    #[cold]
    fn pad(&mut self, slot: usize) {
        if slot > self.values.len() {
            self.valid.append_n_nulls(slot - self.values.len());
            self.values.resize(slot, T::default());
        }
    }
    /// Takes the slot without a value; whether it was free.
    pub(crate) fn put_null(&mut self, slot: usize) -> bool {
        let free = slot >= self.values.len();
        if free {
            self.pad(slot + 1);
        }
        free
    }
    /// Returns true if the slot was free.
    #[inline]
    pub(crate) fn put(&mut self, slot: usize, value: T) -> bool {
        if slot != self.values.len() {
            if slot < self.values.len() {
                return false;
            }
            self.pad(slot);
        }
        self.values.push(value);
        self.valid.append_non_null();
        true
    }
}

/// Strings or bytes.
#[derive(Debug)]
pub(crate) struct Bytes {
    pub offsets: Vec<i32>,
    pub data: Vec<u8>,
    pub valid: NullBufferBuilder,
}

impl Bytes {
    fn new(sizes: Option<&Sizes>) -> Self {
        let slots = Sizes::slots(sizes);
        let mut offsets = Vec::with_capacity(slots + 1);
        offsets.push(0);
        let data = Vec::with_capacity(sizes.map_or(0, |sizes| sizes.bytes + sizes.bytes / 16));
        Self { offsets, data, valid: NullBufferBuilder::new(slots) }
    }
    fn len(&self) -> usize {
        self.offsets.len() - 1
    }
    #[cold]
    fn pad(&mut self, slot: usize) {
        if slot > self.len() {
            self.valid.append_n_nulls(slot - self.len());
            self.offsets.resize(slot + 1, self.data.len() as i32);
        }
    }
    /// Puts what `append` appends; whether the slot was free.
    #[inline]
    pub(crate) fn put(&mut self, slot: usize, append: impl FnOnce(&mut Vec<u8>)) -> bool {
        if slot != self.len() {
            if slot < self.len() {
                return false;
            }
            self.pad(slot);
        }
        append(&mut self.data);
        // A batch is closed long before 2 GiB: its open rows' JSON is watched, and no line is longer than 256 MiB.
        self.offsets.push(self.data.len() as i32);
        self.valid.append_non_null();
        true
    }
    /// Like [`Bytes::put`], for what may turn out unreadable half-way: `None`, and nothing is put.
    pub(crate) fn try_put(&mut self, slot: usize, append: impl FnOnce(&mut Vec<u8>) -> bool) -> Option<bool> {
        if slot < self.len() {
            return Some(false);
        }
        self.pad(slot);
        let before = self.data.len();
        if !append(&mut self.data) {
            self.data.truncate(before);
            return None;
        }
        self.offsets.push(self.data.len() as i32);
        self.valid.append_non_null();
        Some(true)
    }
}

/// Repeated values: item slots by offsets.
#[derive(Debug)]
pub(crate) struct List {
    pub offsets: Vec<i32>,
    pub valid: NullBufferBuilder,
    /// The items.
    pub items: Column,
}

impl List {
    pub(crate) fn len(&self) -> usize {
        self.offsets.len() - 1
    }
    /// Items so far, those included that end a list and are null, which the items' column was not told.
    fn end_of_items(&self) -> usize {
        self.offsets.last().copied().unwrap_or(0) as usize
    }
    fn pad(&mut self, slot: usize) {
        if slot > self.len() {
            self.valid.append_n_nulls(slot - self.len());
            self.offsets.resize(slot + 1, self.end_of_items() as i32);
        }
    }
    /// Returns the index at which the items of the list of `slot` begin.
    #[inline]
    pub(crate) fn begin(&mut self, slot: usize) -> usize {
        self.pad(slot);
        self.end_of_items()
    }
    /// Ends the list begun last: its items end at item slot `end`.
    #[inline]
    pub(crate) fn end(&mut self, end: usize) {
        self.offsets.push(end as i32);
        self.valid.append_non_null();
    }
}

/// A struct: its children are made when they are first filled.
#[derive(Debug)]
pub(crate) struct Structs {
    /// Its kind.
    pub group: Arc<Group>,
    len: usize,
    pub valid: NullBufferBuilder,
    /// Child columns, by the group's field.
    pub children: Vec<Option<Box<Column>>>,
    sizes: Option<Box<Sizes>>,
    /// Which member came after each, last time: place plus one of the one before, 0 for the first.
    pub followers: Vec<u16>,
}

impl Structs {
    /// No rows; `sizes` of the batch before.
    pub(crate) fn new(group: Arc<Group>, sizes: Option<Box<Sizes>>) -> Self {
        let children = (0..group.fields.len()).map(|_| None).collect();
        let followers = (0..=group.members.len()).map(|place| place as u16).collect();
        let valid = NullBufferBuilder::new(Sizes::slots(sizes.as_deref()));
        Self { group, len: 0, valid, children, sizes, followers }
    }
    /// Slots that were told something.
    #[inline]
    pub(crate) fn len(&self) -> usize {
        self.len
    }
    pub(crate) fn pad(&mut self, slot: usize) {
        if slot > self.len {
            self.valid.append_n_nulls(slot - self.len);
            self.len = slot;
        }
    }
    /// Marks the struct at `slot` as present.
    #[inline]
    pub(crate) fn put(&mut self, slot: usize) {
        self.pad(slot);
        self.valid.append_non_null();
        self.len += 1;
    }
    /// The child column of field `index`, made if it was not there.
    #[inline]
    pub(crate) fn child(&mut self, index: usize) -> &mut Column {
        let Self { group, children, sizes, .. } = self;
        children[index].get_or_insert_with(|| Self::make(group, sizes, index))
    }
    #[cold]
    fn make(group: &Group, sizes: &mut Option<Box<Sizes>>, index: usize) -> Box<Column> {
        let sizes = sizes.as_mut().and_then(|sizes| sizes.child(index));
        Box::new(Column::new(&group.fields[index], sizes))
    }
    /// About the bytes that it and its children take as arrays of `len` slots, and while they are written as pages of
    /// `levels` levels.
    pub(crate) fn bytes(&self, len: usize, levels: usize) -> usize {
        len / 8 + self.children.iter().flatten().map(|child| child.bytes(len, levels)).sum::<usize>()
    }
    /// Returns the size of it and its children.
    pub(crate) fn sizes(&self) -> Sizes {
        let children = self.children.iter().map(|child| child.as_ref().map(|child| Box::new(child.sizes())));
        Sizes { slots: self.len, bytes: 0, children: children.collect() }
    }
}

/// Any column.
#[derive(Debug)]
pub(crate) enum Column {
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

/// Definition and repetition level.
const LEVEL: usize = 4;

impl Column {
    /// An empty column of a field; `sizes` of the batch before.
    pub(crate) fn new(field: &Field, mut sizes: Option<Box<Sizes>>) -> Self {
        let mut inner = || sizes.as_mut().and_then(|sizes| sizes.child(0));
        if let Node::Extensions(group) = &field.node {
            let mut per_key = inner();
            let values = per_key.as_mut().and_then(|sizes| sizes.child(0));
            let structs = Column::Structs(Structs::new(group.clone(), values));
            let per_key = Column::List(Box::new(List::of(structs, per_key.as_deref())));
            let keys = Vec::with_capacity(sizes.as_ref().map_or(0, |sizes| sizes.bytes));
            return Column::Map { offsets: Box::new(List::of(per_key, sizes.as_deref())), keys };
        }
        if field.repeats {
            let items = Self::single(&field.node, inner());
            return Column::List(Box::new(List::of(items, sizes.as_deref())));
        }
        Self::single(&field.node, sizes)
    }

    fn single(node: &Node, sizes: Option<Box<Sizes>>) -> Self {
        let slots = Sizes::slots(sizes.as_deref());
        match node {
            Node::Boolean => Column::Boolean(Values::new(slots)),
            Node::Integer => Column::Integer(Values::new(slots)),
            Node::Decimal | Node::Unscaled => Column::Decimal(Values::new(slots), node.data_type()),
            Node::Instant => Column::Instant(Values::new(slots)),
            Node::Binary => Column::Binary(Bytes::new(sizes.as_deref())),
            Node::Group(group) | Node::Extensions(group) => Column::Structs(Structs::new(group.clone(), sizes)),
            // Foreign columns are never filled.
            Node::String | Node::Foreign(_) => Column::String(Bytes::new(sizes.as_deref())),
        }
    }

    fn bytes(&self, len: usize, levels: usize) -> usize {
        let places = match self {
            Column::Boolean(_) => len,
            Column::Integer(_) => len * 4,
            Column::Decimal(_, _) => len * 16,
            Column::Instant(_) => len * 8,
            Column::String(bytes) | Column::Binary(bytes) => len * 4 + bytes.data.len(),
            Column::Structs(structs) => return structs.bytes(len, levels),
            // Where a list is empty there is a level all the same, of each column within it.
            Column::List(list) => {
                let items = list.end_of_items();
                return len * 4 + list.items.bytes(items, levels + items);
            }
            Column::Map { offsets, keys } => {
                let keys = keys.len();
                return len * 4 + keys * 4 + offsets.items.bytes(keys, levels + keys);
            }
        };
        places + levels * LEVEL
    }

    fn sizes(&self) -> Sizes {
        let (bytes, children) = match self {
            Column::String(bytes) | Column::Binary(bytes) => (bytes.data.len(), Vec::new()),
            Column::Structs(structs) => return structs.sizes(),
            Column::List(list) => (0, vec![Some(Box::new(list.items.sizes()))]),
            // The keys stand in for bytes.
            Column::Map { offsets, keys } => (keys.len(), vec![Some(Box::new(offsets.items.sizes()))]),
            _ => (0, Vec::new()),
        };
        Sizes { slots: self.len(), bytes, children }
    }

    /// Slots that were told a value or passed over.
    pub(crate) fn len(&self) -> usize {
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

    #[inline]
    pub(crate) fn put_i32(&mut self, slot: usize, value: i32) {
        if let Column::Integer(values) = self {
            values.put(slot, value);
        }
    }
    #[inline]
    pub(crate) fn put_i128(&mut self, slot: usize, value: i128) {
        if let Column::Decimal(values, _) = self {
            values.put(slot, value);
        }
    }
    /// A string, put together from parts.
    #[inline]
    pub(crate) fn put_bytes(&mut self, slot: usize, parts: &[&[u8]]) {
        if let Column::String(bytes) = self {
            bytes.put(slot, |data| parts.iter().for_each(|part| data.extend_from_slice(part)));
        }
    }

    pub(crate) fn pad(&mut self, slot: usize) {
        match self {
            Column::Boolean(values) => values.pad(slot),
            Column::Integer(values) => values.pad(slot),
            Column::Decimal(values, _) => values.pad(slot),
            Column::Instant(values) => values.pad(slot),
            Column::String(bytes) | Column::Binary(bytes) => bytes.pad(slot),
            Column::Structs(structs) => structs.pad(slot),
            Column::List(list) => list.pad(slot),
            Column::Map { offsets, .. } => offsets.pad(slot),
        }
    }
}

impl List {
    fn of(items: Column, sizes: Option<&Sizes>) -> Self {
        let slots = Sizes::slots(sizes);
        let mut offsets = Vec::with_capacity(slots + 1);
        offsets.push(0);
        Self { offsets, valid: NullBufferBuilder::new(slots), items }
    }
}
