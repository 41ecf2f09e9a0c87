//! Resources on a tape → the columns of a layout.

pub(crate) mod attachments;
mod columns;
mod into_arrow;
mod scalars;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::Arc;

use arrow::array::RecordBatch;
use arrow::datatypes::SchemaRef;
use base64::Engine;
use base64::alphabet;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};

use crate::encode::columns::{Column, List, Structs};
use crate::encode::scalars::{parse_decimal, parse_i32};
use crate::layout::member_index::MemberKey;
use crate::layout::present_columns::{ColumnPruning, PresentColumns};
use crate::layout::{Field, Group, Layout, Node, Source};
use crate::model::Model;
use crate::tape::{Kind, Value};
use crate::ucum::Units;
use foundation::error::{Error, ErrorKind, Result};
use foundation::instant::parse_instant;

/// Rows of one type, encoded.
#[derive(Debug)]
pub struct EncodedRows {
    /// The columns that these rows fill, in the layout's order.
    pub batch: RecordBatch,
    /// All columns of the file that they are for; those that the batch lacks are null throughout.
    pub schema: SchemaRef,
    /// Which those are.
    pub filled: PresentColumns,
    /// Of each leaf column of the batch, in Parquet's order: whether readers filter by it.
    pub filtered: Vec<bool>,
}

/// Fills the columns of one layout. Memory follows what the rows hold.
#[derive(Debug)]
pub struct Encoder {
    layout: Arc<Layout>,
    root: Structs,
    rows: usize,
    json_bytes: usize,
    measured_at: usize,
    column_bytes: usize,
    row: Row,
    places: Places,
}

/// Fields of a resource that are put once its members are.
#[derive(Debug, Clone, Copy)]
struct Places {
    full_id: Option<usize>,
    extensions: Option<usize>,
    json: Option<usize>,
}

/// Revision of what the encoder makes of a line: one more wherever the same line gets other values in the same columns,
/// so that rows of an earlier revision are not taken for unchanged.
pub const ENCODER_REVISION: u32 = 1;

/// JSON after which the size of the columns is looked at again.
const MEASURE_EVERY: usize = 16 << 10;

/// State of the encoding of one row.
#[derive(Debug, Default)]
struct Row {
    next_fid: i32,
    /// `extension` arrays met: the `_fid` of the element that carries them and their place on the tape.
    extensions: Vec<(i32, usize)>,
    /// Places of the resource's own `id` and `meta` on the tape.
    id: Option<usize>,
    meta: Option<usize>,
    /// Unmapped values, by path.
    unmapped: BTreeMap<String, u64>,
    path: String,
    units: Units,
}

impl Row {
    #[cold]
    fn lose(&mut self, path: &str, member: &[u8]) {
        self.path.clear();
        self.path.push_str(path);
        self.path.push('.');
        // A member's name comes from outside: only what looks like one of FHIR's is repeated in a report.
        let looks_like_fhir = |name: &str| {
            let name = name.strip_prefix('_').unwrap_or(name);
            name.len() <= 40
                && name.starts_with(|c: char| c.is_ascii_lowercase())
                && name.bytes().all(|b| b.is_ascii_alphabetic())
        };
        match std::str::from_utf8(member) {
            Ok(name) if looks_like_fhir(name) || Model::r4().is_element_name(name) => self.path.push_str(name),
            _ => self.path.push('?'),
        }
        if let Some(count) = self.unmapped.get_mut(&self.path) {
            *count += 1;
            return;
        }
        if self.unmapped.len() >= MAX_UNMAPPED_PATHS {
            self.path.truncate(path.len() + 1);
            self.path.push('?');
        }
        *self.unmapped.entry(self.path.clone()).or_default() += 1;
    }
}

/// Paths of losses that are told apart for a type: far more than FHIR's own, far fewer than a server can invent.
pub const MAX_UNMAPPED_PATHS: usize = 1_000;

const BASE64: GeneralPurpose = GeneralPurpose::new(
    &alphabet::STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

impl Encoder {
    /// An empty encoder.
    pub fn new(layout: Arc<Layout>) -> Self {
        let root = Structs::new(layout.root.clone(), None);
        let place = |fits: &dyn Fn(&Field) -> bool| layout.root.fields.iter().position(fits);
        let places = Places {
            full_id: place(&|field| field.source == Source::Versioned && field.name == "id_versioned"),
            extensions: place(&|field| field.source == Source::Extensions),
            json: place(&|field| field.source == Source::Json),
        };
        Self { layout, root, rows: 0, json_bytes: 0, measured_at: 0, column_bytes: 0, row: Row::default(), places }
    }

    /// Returns the column that it fills.
    pub fn layout(&self) -> &Arc<Layout> {
        &self.layout
    }

    /// Rows encoded and not yet finished.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Bytes of JSON that those rows came from: a measure of the memory that the columns take.
    pub fn json_bytes(&self) -> usize {
        self.json_bytes
    }

    /// Bytes that the rows will take as columns, about. Rows that fill many columns beside many that fill none cost
    /// far more than their JSON: what is null takes its place too. Looked at every 16 KiB of JSON.
    pub fn column_bytes(&mut self) -> usize {
        if self.json_bytes >= self.measured_at + MEASURE_EVERY {
            self.measured_at = self.json_bytes;
            self.column_bytes = self.root.bytes(self.rows, self.rows);
        }
        self.column_bytes
    }

    /// Returns its weight beside others: its JSON, or its columns where those are far more than the usual once or twice
    /// of it.
    pub fn weight(&self) -> usize {
        self.json_bytes.max(self.column_bytes / 2)
    }

    /// Adds to the measure what a resource has grown by since its line came.
    pub fn weigh(&mut self, added: usize) {
        self.json_bytes += added;
    }

    /// Encodes one resource; `line` is its text. What cannot be held is counted, never an error: a row is
    /// never lost for one of its values.
    pub fn push(&mut self, resource: Value<'_>, line: &[u8]) {
        let slot = self.rows;
        let Self { layout, root, row, places, .. } = self;
        let group = &*layout.root;
        row.next_fid = 0;
        row.extensions.clear();
        (row.id, row.meta) = (None, None);
        if !put_group::<true>(row, group, root, slot, resource) {
            root.put(slot);
        }
        if let Some(index) = places.full_id {
            put_full_id(row, root.child(index), slot, resource, &layout.resource_type);
        }
        if let Some(index) = places.extensions
            && let Node::Extensions(inner) = &group.fields[index].node
        {
            put_extensions(row, inner, root.child(index), slot, resource);
        }
        if let Some(index) = places.json {
            root.child(index).put_bytes(slot, &[line]);
        }
        self.rows += 1;
        self.json_bytes += line.len();
    }

    /// The rows so far as a record batch with the columns of `known`, which grows by what these rows fill and by what
    /// `columns` asks for; the encoder is empty again.
    pub fn finish(&mut self, known: &mut PresentColumns, columns: ColumnPruning) -> Result<EncodedRows> {
        let rows = std::mem::take(&mut self.rows);
        (self.json_bytes, self.measured_at, self.column_bytes) = (0, 0, 0);
        let next = Structs::new(self.layout.root.clone(), Some(Box::new(self.root.sizes())));
        let root = std::mem::replace(&mut self.root, next);
        known.merge(&root.filled());
        let here = root.made(known);
        known.complete(&self.layout.root, columns);
        let batch = root.finish(rows, &here).map_err(|error| {
            Error::new(ErrorKind::Internal, format!("columns do not fit together: {error}"))
                .at(self.layout.resource_type.to_string())
        })?;
        let filtered = here.filtered(&self.layout.root);
        let schema = Arc::new(known.schema(&self.layout.root));
        Ok(EncodedRows { batch: RecordBatch::from(batch), schema, filled: known.clone(), filtered })
    }

    /// Returns the unmapped values since the last call: count by path.
    pub fn take_unmapped(&mut self) -> BTreeMap<String, u64> {
        std::mem::take(&mut self.row.unmapped)
    }
}

/// `id_versioned` as HAPI prints an id in full: `Patient/p1/_history/3`, or `Patient/p1` without a version.
fn put_full_id(row: &Row, column: &mut Column, slot: usize, resource: Value<'_>, resource_type: &str) {
    let text = |place: Option<usize>| place.and_then(|place| resource.at(place).str_bytes());
    let Some(id) = text(row.id) else { return };
    let version = row.meta.and_then(|meta| resource.at(meta).get(b"versionId")).and_then(|version| version.str_bytes());
    match version {
        Some(version) => column.put_bytes(slot, &[resource_type.as_bytes(), b"/", id, b"/_history/", version]),
        None => column.put_bytes(slot, &[resource_type.as_bytes(), b"/", id]),
    }
}

/// Encodes an object into the struct at `slot`; whether there was anything in it. `ROOT` for the resource itself.
fn put_group<const ROOT: bool>(
    row: &mut Row,
    group: &Group,
    structs: &mut Structs,
    slot: usize,
    object: Value<'_>,
) -> bool {
    let fid = row.next_fid;
    if group.fid.is_some() {
        row.next_fid += 1;
    }
    let mut touched = false;
    let mut has_extensions = false;
    let mut last = 0;
    for (name, value) in object.entries() {
        let key = MemberKey::new(name);
        let guess = usize::from(structs.followers[last]);
        let place = if group.names.is(guess, key) {
            guess
        } else if let Some(place) = group.names.find(key) {
            structs.followers[last] = place as u16;
            place
        } else {
            if name == b"extension" && group.fid.is_some() && value.kind() == Kind::Array && !has_extensions {
                has_extensions = note_extensions(row, group, fid, value);
                touched |= has_extensions;
            } else if !(ROOT && name == b"resourceType") {
                row.lose(&group.path, name);
            }
            continue;
        };
        last = place + 1;
        if ROOT {
            match name {
                b"id" => row.id = row.id.or(Some(value.index())),
                b"meta" => row.meta = row.meta.or(Some(value.index())),
                _ => {}
            }
        }
        touched |= put_member::<ROOT>(row, group, structs, group.members[place], slot, value);
    }
    if touched {
        if let Some(fields) = group.canonical {
            put_canonical(row, structs, fields, slot, object);
        }
        if let Some(index) = group.fid {
            structs.child(index).put_i32(slot, fid);
        }
        structs.put(slot);
    }
    touched
}

/// Notes an element's extensions, which are encoded when the rest of the row is; whether there are any. What is no
/// extension in the array is lost.
fn note_extensions(row: &mut Row, group: &Group, fid: i32, array: Value<'_>) -> bool {
    let mut any = false;
    for item in array.items() {
        match item.kind() {
            Kind::Object => any |= item.entries().next().is_some(),
            Kind::Null => {}
            _ => row.lose(&group.path, b"extension"),
        }
    }
    if any {
        row.extensions.push((fid, array.index()));
    }
    any
}

#[inline]
fn put_member<const ROOT: bool>(
    row: &mut Row,
    group: &Group,
    structs: &mut Structs,
    index: usize,
    slot: usize,
    value: Value<'_>,
) -> bool {
    if value.kind() == Kind::Null {
        return false;
    }
    let field = &group.fields[index];
    let derived = group.derived[index];
    let column = structs.child(index);
    let put = match column {
        Column::List(list) => {
            if list.len() > slot {
                Put::Twice
            } else if value.kind() == Kind::Array {
                return put_list(row, group, structs, index, slot, value);
            } else {
                Put::Wrong
            }
        }
        column => put_one(row, field, column, slot, value),
    };
    match put {
        Put::Value => {
            if let Some(at) = derived
                && !(ROOT && field.name == "id")
                && let Some(text) = value.str_bytes()
            {
                structs.child(at).put_bytes(slot, &[text]);
            }
            true
        }
        Put::Decimal { scale, held } => {
            if let Some(at) = derived {
                structs.child(at).put_i32(slot, scale);
            }
            if !held {
                row.lose(&group.path, field.name.as_bytes());
            }
            true
        }
        Put::Nothing => false,
        // The member came twice: readers differ on which counts; the first is kept and the other counted.
        Put::Wrong | Put::Twice => {
            row.lose(&group.path, field.name.as_bytes());
            false
        }
    }
}

fn put_list(row: &mut Row, group: &Group, structs: &mut Structs, index: usize, slot: usize, array: Value<'_>) -> bool {
    let field = &group.fields[index];
    let Column::List(list) = structs.child(index) else { return false };
    let begin = list.begin(slot);
    let (mut end, mut touched, mut lost) = (begin, false, 0);
    for item in array.items() {
        if item.kind() != Kind::Null {
            match put_one(row, field, &mut list.items, end, item) {
                Put::Value | Put::Decimal { held: true, .. } => touched = true,
                Put::Decimal { held: false, .. } => {
                    lost += 1;
                    touched = true;
                }
                Put::Wrong | Put::Twice => lost += 1,
                Put::Nothing => {}
            }
        }
        end += 1;
    }
    if touched {
        list.end(end);
    }
    for _ in 0..lost {
        row.lose(&group.path, field.name.as_bytes());
    }
    if let (true, Some(at)) = (touched, group.derived[index])
        && let Column::List(derived) = structs.child(at)
    {
        put_derived_list(derived, &field.node, slot, array);
    }
    touched
}

/// The list beside a list of decimals or ids: scales, or the ids again.
fn put_derived_list(list: &mut List, node: &Node, slot: usize, array: Value<'_>) {
    let mut place = list.begin(slot);
    for item in array.items() {
        if matches!(node, Node::Decimal) {
            if let Some(decimal) = item.number_text().and_then(parse_decimal) {
                list.items.put_i32(place, decimal.scale);
            }
        } else if let Some(text) = item.str_bytes() {
            list.items.put_bytes(place, &[text]);
        }
        place += 1;
    }
    list.end(place);
}

/// Outcome of one value.
#[derive(Clone, Copy)]
enum Put {
    Value,
    /// A decimal with its scale; not held where it has too many digits: then its scale is kept all the same.
    Decimal {
        scale: i32,
        held: bool,
    },
    /// An empty object.
    Nothing,
    /// Not of the column's type.
    Wrong,
    /// The slot has a value already.
    Twice,
}

#[inline]
fn put_one(row: &mut Row, field: &Field, column: &mut Column, slot: usize, value: Value<'_>) -> Put {
    let put = match column {
        Column::String(bytes) => value.text().map(|text| bytes.put(slot, |data| text.append_to(data))),
        Column::Structs(structs) => {
            let Node::Group(group) = &field.node else { return Put::Wrong };
            if value.kind() != Kind::Object {
                return Put::Wrong;
            }
            if structs.len() > slot {
                return Put::Twice;
            }
            return if put_group::<false>(row, group, structs, slot, value) { Put::Value } else { Put::Nothing };
        }
        Column::Boolean(values) => value.as_bool().map(|flag| values.put(slot, flag)),
        Column::Integer(values) => value.number_text().and_then(parse_i32).map(|number| values.put(slot, number)),
        Column::Instant(values) => value.str_bytes().and_then(parse_instant).map(|micros| values.put(slot, micros)),
        Column::Decimal(values, _) => {
            let Some(decimal) = value.number_text().and_then(parse_decimal) else { return Put::Wrong };
            let put = match decimal.value {
                Some(number) => values.put(slot, number),
                None => values.put_null(slot),
            };
            return if put { Put::Decimal { scale: decimal.scale, held: decimal.exact } } else { Put::Twice };
        }
        Column::Binary(bytes) => {
            // Into the column at once: it may be hundreds of megabytes.
            let Some(text) = value.str_bytes() else { return Put::Wrong };
            let mut text = Cow::Borrowed(text);
            if text.iter().any(u8::is_ascii_whitespace) {
                text.to_mut().retain(|b| !b.is_ascii_whitespace());
            }
            bytes.try_put(slot, |data| BASE64.decode_vec(&text, data).is_ok())
        }
        Column::List(_) | Column::Map { .. } => None,
    };
    match put {
        Some(true) => Put::Value,
        Some(false) => Put::Twice,
        None => Put::Wrong,
    }
}

/// The canonical value and code of a Quantity (`QuantitySupport.scala`): whatever its `system` says.
fn put_canonical(row: &mut Row, structs: &mut Structs, fields: (usize, usize), slot: usize, quantity: Value<'_>) {
    // Those that the columns have: the first of their type, should a member come twice.
    let (mut value, mut code) = (None, None);
    for (name, member) in quantity.entries() {
        match name {
            b"value" => value = value.or(member.number_text()),
            b"code" => code = code.or(member.str_bytes()),
            _ => {}
        }
    }
    let (Some(value), Some(code)) = (value, code) else { return };
    let Some(canonical) = row.units.canonical(value, code) else { return };
    structs.child(fields.1).put_bytes(slot, &[canonical.code.as_bytes()]);
    if let (Some((unscaled, scale)), Column::Structs(inner)) = (canonical.value, structs.child(fields.0)) {
        // `value` and `scale`, in the order that the layout gives them.
        let places = ["value", "scale"].map(|name| inner.group.fields.iter().position(|field| field.name == name));
        if let [Some(at_value), Some(at_scale)] = places {
            inner.child(at_value).put_i128(slot, unscaled);
            inner.child(at_scale).put_i32(slot, scale);
            inner.put(slot);
        }
    }
}

/// Encodes the extensions met in the row into the map at `slot`. An extension's own extensions are met on
/// the way and become further entries, under the `_fid` of the extension that carries them.
fn put_extensions(row: &mut Row, group: &Group, map: &mut Column, slot: usize, resource: Value<'_>) {
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
            if extension.kind() == Kind::Object && put_group::<false>(row, group, structs, end, extension) {
                end += 1;
            }
        }
        if end > begin {
            per_key.end(end);
            keys.push(fid);
        }
    }
    // A resource without extensions has an empty map, as Pathling writes it: its decoder fails on null.
    offsets.end(keys.len());
}
