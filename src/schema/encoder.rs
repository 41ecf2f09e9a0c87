//! Resources on a tape → the columns of a layout.

use std::collections::BTreeMap;
use std::sync::Arc;

use arrow::array::RecordBatch;
use base64::Engine;
use base64::alphabet;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};

use super::columns::{Column, Filled, Structs};
use super::layout::{Field, Layout, Node, Source};
use super::scalars::{parse_decimal, parse_i32, parse_instant};
use crate::error::{Error, ErrorKind, Result};
use crate::tape::{Kind, Value};

/// Rows of one type, encoded.
#[derive(Debug)]
pub struct EncodedRows {
    /// The columns that are filled, in the layout's order.
    pub batch: RecordBatch,
    /// Which those are.
    pub filled: Filled,
}

/// Fills the columns of one layout. Memory follows what the rows hold.
#[derive(Debug)]
pub struct Encoder {
    layout: Arc<Layout>,
    root: Structs,
    rows: usize,
    json_bytes: usize,
    row: Row,
}

/// What is gathered while one row is encoded.
#[derive(Debug, Default)]
struct Row {
    next_fid: i32,
    /// `extension` arrays met: the `_fid` of the element that carries them and their place on the tape.
    extensions: Vec<(i32, usize)>,
    /// What could not be held, by path.
    losses: BTreeMap<String, u64>,
    path: String,
}

impl Row {
    fn lose(&mut self, path: &str, member: &[u8]) {
        self.path.clear();
        self.path.push_str(path);
        self.path.push('.');
        // A member's name comes from outside: only what looks like one of FHIR's is repeated in a report.
        match std::str::from_utf8(member) {
            Ok(name) if name.len() <= 64 && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_') => {
                self.path.push_str(name);
            }
            _ => self.path.push('?'),
        }
        match self.losses.get_mut(&self.path) {
            Some(count) => *count += 1,
            None => {
                self.losses.insert(self.path.clone(), 1);
            }
        }
    }
}

const BASE64: GeneralPurpose = GeneralPurpose::new(
    &alphabet::STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

impl Encoder {
    /// An empty encoder.
    pub fn new(layout: Arc<Layout>) -> Self {
        let root = Structs::new(layout.root.clone());
        Self { layout, root, rows: 0, json_bytes: 0, row: Row::default() }
    }

    /// Rows encoded and not yet finished.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Bytes of JSON that those rows came from: a measure of the memory that the columns take.
    pub fn json_bytes(&self) -> usize {
        self.json_bytes
    }

    /// Encodes one resource; `line` is its text. What cannot be held is counted, never an error: a row is
    /// never lost for one of its values.
    pub fn push(&mut self, resource: Value<'_>, line: &[u8]) {
        let slot = self.rows;
        self.row.next_fid = 0;
        self.row.extensions.clear();
        let row = &mut self.row;
        let version = resource.get(b"meta").and_then(|meta| meta.get(b"versionId")).and_then(|id| id.str_bytes());
        let full_id = FullId { resource_type: self.layout.resource_type.as_bytes(), version };
        if !put_group(row, &mut self.root, slot, resource, Some(&full_id)) {
            self.root.put(slot);
        }
        let group = self.root.group.clone();
        for (index, field) in group.fields.iter().enumerate() {
            match field.source {
                Source::Extensions if !row.extensions.is_empty() => {
                    put_extensions(row, self.root.child(index), slot, resource);
                }
                Source::Json => self.root.child(index).put_bytes(slot, &[line]),
                _ => {}
            }
        }
        self.rows += 1;
        self.json_bytes += line.len();
    }

    /// The rows so far as a record batch with the columns of `known`, which grows by what these rows fill;
    /// the encoder is empty again.
    pub fn finish(&mut self, known: &mut Filled) -> Result<EncodedRows> {
        let rows = std::mem::take(&mut self.rows);
        self.json_bytes = 0;
        let root = std::mem::replace(&mut self.root, Structs::new(self.layout.root.clone()));
        known.merge(&root.filled());
        let columns = root.finish(rows, known).map_err(|error| {
            Error::new(ErrorKind::Internal, format!("columns do not fit together: {error}"))
                .at(self.layout.resource_type.to_string())
        })?;
        Ok(EncodedRows { batch: RecordBatch::from(columns), filled: known.clone() })
    }

    /// What could not be held since the last call: count by path.
    pub fn take_losses(&mut self) -> BTreeMap<String, u64> {
        std::mem::take(&mut self.row.losses)
    }
}

/// What `id_versioned` is put together from.
struct FullId<'a> {
    resource_type: &'a [u8],
    version: Option<&'a [u8]>,
}

/// Encodes an object into the struct at `slot`; whether there was anything in it.
fn put_group(row: &mut Row, structs: &mut Structs, slot: usize, object: Value<'_>, full_id: Option<&FullId<'_>>) -> bool {
    let group = structs.group.clone();
    let fid = row.next_fid;
    if group.fid.is_some() {
        row.next_fid += 1;
    }
    let mut touched = false;
    let mut expected = 0;
    for (name, value) in object.entries() {
        let known = match group.members.get(expected) {
            Some(at) if group.fields[*at].name.as_bytes() == name => Some(expected),
            _ => group.by_name.get(name).copied(),
        };
        let Some(place) = known else {
            if name == b"extension" && group.fid.is_some() && value.kind() == Kind::Array {
                row.extensions.push((fid, value.index()));
                touched = true;
            } else if !(full_id.is_some() && name == b"resourceType") {
                row.lose(&group.path, name);
            }
            continue;
        };
        expected = place + 1;
        let index = group.members[place];
        touched |= put_member(row, structs, index, slot, name, value, full_id);
    }
    if touched {
        if let Some(index) = group.fid {
            structs.child(index).put_i32(slot, fid);
        }
        structs.put(slot);
    }
    touched
}

#[inline]
fn put_member(
    row: &mut Row,
    structs: &mut Structs,
    index: usize,
    slot: usize,
    name: &[u8],
    value: Value<'_>,
    full_id: Option<&FullId<'_>>,
) -> bool {
    let group = structs.group.clone();
    let field = &group.fields[index];
    let derived = group.derived[index];
    if structs.children[index].as_ref().is_some_and(|child| child.len() > slot) {
        // The member came twice. Readers differ on which counts; the first is kept and the other counted.
        row.lose(&group.path, name);
        return false;
    }
    if !field.repeats {
        if value.kind() == Kind::Null {
            return false;
        }
        let put = put_one(row, structs.child(index), field, slot, value);
        match put {
            Put::Nothing => return false,
            Put::Wrong => {
                row.lose(&group.path, name);
                return false;
            }
            Put::Value => {}
            Put::NoValueButScale(_) | Put::Decimal(_) => {}
        }
        if let Some(at) = derived {
            // Other ids of the resource's own (`ImplementationGuide.packageId`) have no type and version before them.
            let full_id = full_id.filter(|_| name == b"id");
            put_derived(structs.child(at), &group.fields[at], slot, value, put, full_id);
        }
        if let Put::NoValueButScale(_) = put {
            row.lose(&group.path, name);
        }
        return true;
    }
    if value.kind() != Kind::Array {
        if value.kind() != Kind::Null {
            row.lose(&group.path, name);
        }
        return false;
    }
    put_list(row, structs, index, slot, name, value, derived)
}

fn put_list(
    row: &mut Row,
    structs: &mut Structs,
    index: usize,
    slot: usize,
    name: &[u8],
    array: Value<'_>,
    derived: Option<usize>,
) -> bool {
    let group = structs.group.clone();
    let field = &group.fields[index];
    let Column::List(list) = structs.child(index) else { return false };
    let begin = list.begin(slot);
    let (mut end, mut touched, mut wrong) = (begin, false, 0);
    for item in array.items() {
        if item.kind() != Kind::Null {
            match put_one(row, &mut list.items, field, end, item) {
                Put::Nothing => {}
                Put::Wrong => wrong += 1,
                Put::NoValueButScale(_) => {
                    wrong += 1;
                    touched = true;
                }
                Put::Value | Put::Decimal(_) => touched = true,
            }
        }
        end += 1;
    }
    if touched {
        list.end(end);
    }
    for _ in 0..wrong {
        row.lose(&group.path, name);
    }
    if let (true, Some(at), Node::Decimal) = (touched, derived, &field.node)
        && let Column::List(scales) = structs.child(at)
    {
        let mut place = scales.begin(slot);
        for item in array.items() {
            if let Some(decimal) = item.number_text().and_then(parse_decimal) {
                scales.items.put_i32(place, decimal.scale);
            }
            place += 1;
        }
        scales.end(place);
    } else if let (true, Some(at)) = (touched, derived)
        && let Column::List(copies) = structs.child(at)
    {
        let mut place = copies.begin(slot);
        for item in array.items() {
            if let Some(text) = item.str_bytes() {
                copies.items.put_bytes(place, &[text]);
            }
            place += 1;
        }
        copies.end(place);
    }
    touched
}

/// What became of one value.
#[derive(Clone, Copy)]
enum Put {
    Value,
    Decimal(i32),
    /// A decimal that is too large: its scale is kept.
    NoValueButScale(i32),
    /// An empty object.
    Nothing,
    /// Not of the column's type.
    Wrong,
}

#[inline]
fn put_one(row: &mut Row, column: &mut Column, field: &Field, slot: usize, value: Value<'_>) -> Put {
    let done = |put: bool| if put { Put::Value } else { Put::Wrong };
    match &field.node {
        Node::String => match value.str_bytes() {
            Some(text) => {
                column.put_bytes(slot, &[text]);
                Put::Value
            }
            None => Put::Wrong,
        },
        Node::Group(_) => match column {
            Column::Structs(structs) if value.kind() == Kind::Object => {
                if put_group(row, structs, slot, value, None) {
                    Put::Value
                } else {
                    Put::Nothing
                }
            }
            _ => Put::Wrong,
        },
        Node::Boolean => done(value.as_bool().map(|flag| column.put_bool(slot, flag)).is_some()),
        Node::Integer => done(value.number_text().and_then(parse_i32).map(|number| column.put_i32(slot, number)).is_some()),
        Node::Instant => done(value.str_bytes().and_then(parse_instant).map(|micros| column.put_i64(slot, micros)).is_some()),
        Node::Decimal => match value.number_text().and_then(parse_decimal) {
            Some(decimal) => match decimal.value {
                Some(number) => {
                    column.put_i128(slot, number);
                    Put::Decimal(decimal.scale)
                }
                None => Put::NoValueButScale(decimal.scale),
            },
            None => Put::Wrong,
        },
        Node::Binary => {
            let decoded = value.str_bytes().and_then(|text| {
                if text.iter().any(u8::is_ascii_whitespace) {
                    let text: Vec<u8> = text.iter().copied().filter(|b| !b.is_ascii_whitespace()).collect();
                    BASE64.decode(text).ok()
                } else {
                    BASE64.decode(text).ok()
                }
            });
            done(decoded.map(|bytes| column.put_bytes(slot, &[&bytes])).is_some())
        }
        Node::Unscaled | Node::Extensions(_) | Node::Foreign(_) => Put::Wrong,
    }
}

fn put_derived(column: &mut Column, field: &Field, slot: usize, value: Value<'_>, put: Put, full_id: Option<&FullId<'_>>) {
    match (field.source, put) {
        (Source::Scale, Put::Decimal(scale) | Put::NoValueButScale(scale)) => column.put_i32(slot, scale),
        (Source::Versioned, _) => {
            let id = value.str_bytes().unwrap_or_default();
            match full_id {
                Some(FullId { resource_type, version: Some(version) }) => {
                    column.put_bytes(slot, &[resource_type, b"/", id, b"/_history/", version]);
                }
                Some(FullId { resource_type, version: None }) => column.put_bytes(slot, &[resource_type, b"/", id]),
                None => column.put_bytes(slot, &[id]),
            }
        }
        _ => {}
    }
}

/// Encodes the extensions met in the row into the map at `slot`. An extension's own extensions are met on
/// the way and become further entries, under the `_fid` of the extension that carries them.
fn put_extensions(row: &mut Row, map: &mut Column, slot: usize, resource: Value<'_>) {
    let Column::Map { offsets, keys } = map else { return };
    offsets.begin(slot);
    let mut next = 0;
    while let Some((fid, index)) = row.extensions.get(next).copied() {
        next += 1;
        let Column::List(per_key) = &mut offsets.items else { return };
        let begin = per_key.begin(keys.len());
        let mut end = begin;
        for extension in resource.at(index).items() {
            let Column::Structs(structs) = &mut per_key.items else { return };
            if extension.kind() == Kind::Object && put_group(row, structs, end, extension, None) {
                end += 1;
            }
        }
        if end > begin {
            per_key.end(end);
            keys.push(fid);
        }
    }
    offsets.end(keys.len());
}
