//! Lines whose row the table has already: known by their bytes before they are parsed, or by their version after.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use parking_lot::Mutex;
use twox_hash::XxHash3_128;

use super::{Work, add};
use crate::error::Result;
use crate::messages::{
    FileKind, Layouts, LineIndexReport, ResourceType, RowKey, RowPosition, UnchangedBatch, UnchangedRow, key_of,
};
use delta_upsert::{IndexMemory, Known, LineHash, LineIndex, Table, Tables};
use fhir_arrow::{ENCODER_REVISION, EXCLUDED_TYPES, arrow_schema};

/// Of an incremental export, the index of a type is read once so many of its rows came as are this part of the table's:
/// most of what such an export brings has changed.
const WORTH_IT: u64 = 16;

/// Settings of [`KnownLines`].
pub struct KnownLinesSettings {
    /// Layouts of the run: rows of another are no rows of this one.
    pub layouts: Layouts,
    /// The tables' folder.
    pub tables: Tables,
    /// Tables that the run has looked at.
    pub opened: HashMap<ResourceType, Table>,
    /// Settings beside the layout that decide how a line is encoded.
    pub encoder: String,
    /// True if lines are looked up, and not only given their hashes.
    pub looks_up: bool,
    /// True if the run brings all that there is, so that an index is worth its reading from the first row on.
    pub is_full: bool,
    /// Memory that indexes may take.
    pub memory: IndexMemory,
    /// Folder for what does not fit.
    pub scratch: PathBuf,
}

/// Live rows of the tables, by which lines are known that did not change.
pub struct KnownLines {
    settings: KnownLinesSettings,
    types: Mutex<HashMap<ResourceType, Arc<TypeLines>>>,
}

/// Lines of one type.
pub(super) struct TypeLines {
    name: ResourceType,
    /// The number of what encodes its lines; `None` where its table cannot be written.
    encoder: Option<u64>,
    table: Mutex<Option<Table>>,
    /// Rows that are to come before the index is read.
    threshold: u64,
    seen: AtomicU64,
    index: OnceLock<Option<LineIndex>>,
}

impl KnownLines {
    /// Reads nothing yet.
    pub fn new(settings: KnownLinesSettings) -> Self {
        Self { settings, types: Mutex::default() }
    }

    /// Returns the lines of a type. May look at its table, once: other workers wait meanwhile.
    fn of(&self, name: &ResourceType) -> Arc<TypeLines> {
        let mut types = self.types.lock();
        if let Some(known) = types.get(name) {
            return known.clone();
        }
        let encoder = (self.settings.layouts)(name).ok().map(|layout| {
            let encodes = (ENCODER_REVISION, arrow_schema(&layout), &self.settings.encoder);
            XxHash3_128::oneshot(format!("{encodes:?}").as_bytes()) as u64
        });
        let open = || tokio::runtime::Handle::current().block_on(self.settings.tables.open(name)).ok();
        let table = match self.settings.looks_up {
            true => self.settings.opened.get(name).cloned().or_else(open),
            false => None,
        };
        let table = table.filter(|table| table.version().is_some());
        let rows = table.as_ref().map_or(0, Table::rows_by_log);
        let threshold = if self.settings.is_full { 0 } else { rows / WORTH_IT };
        let of_type = Arc::new(TypeLines {
            name: name.clone(),
            encoder,
            table: Mutex::new(table.filter(|_| rows > 0)),
            threshold,
            seen: AtomicU64::new(0),
            index: OnceLock::new(),
        });
        types.insert(name.clone(), of_type.clone());
        of_type
    }

    fn load(&self, of_type: &TypeLines) -> Option<LineIndex> {
        let table = of_type.table.lock().take()?;
        let (memory, scratch) = (&self.settings.memory, &self.settings.scratch);
        let loaded = tokio::runtime::Handle::current().block_on(LineIndex::load(&table, memory, scratch));
        match loaded {
            Ok(index) => {
                tracing::debug!(
                    resource_type = %of_type.name, rows = index.rows(), on_disk = index.is_on_disk(),
                    "looking unchanged lines up"
                );
                Some(index)
            }
            Err(error) => {
                tracing::warn!(
                    resource_type = %of_type.name, %error,
                    "unchanged lines cannot be looked up; each is encoded and compared"
                );
                None
            }
        }
    }

    /// The index of a type, where it is there or worth its reading. Who comes while another reads it, waits.
    fn index<'a>(&self, of_type: &'a TypeLines) -> Option<&'a LineIndex> {
        if of_type.encoder.is_none() || of_type.seen.fetch_add(1, Ordering::Relaxed) < of_type.threshold {
            return None;
        }
        of_type.index.get_or_init(|| self.load(of_type)).as_ref().filter(|index| !index.is_too_slow())
    }
}

impl LineIndexReport for KnownLines {
    fn report(&self) -> HashMap<ResourceType, &'static str> {
        let types = self.types.lock();
        let used = types.iter().filter_map(|(name, of_type)| {
            let index = of_type.index.get()?.as_ref()?;
            let how = match (index.is_on_disk(), index.is_too_slow()) {
                (false, _) => "memory",
                (true, false) => "disk",
                (true, true) => "too slow",
            };
            Some((name.clone(), how))
        });
        used.collect()
    }
}

/// A line that was looked up, in the index of its type.
pub(super) struct Looked {
    of_type: Arc<TypeLines>,
    hash: Option<LineHash>,
    known: Option<Known>,
}

impl Looked {
    /// Returns the hash that the row's file is to keep.
    pub(super) fn hash(&self) -> Option<LineHash> {
        self.hash
    }

    fn is_same_line(&self) -> bool {
        self.known.zip(self.hash).is_some_and(|(known, hash)| known.is_of(hash))
    }
}

impl Work<'_> {
    /// Looks a line up by its first bytes, before it is parsed. Only of the type that its file declares, since others
    /// may be the server's messages.
    pub(super) fn look_up_line(&mut self, bytes: &Bytes, line: &std::ops::Range<usize>) -> Result<Option<Looked>> {
        let file = &self.chunk.file;
        // Which elements a resource has is known only once it is parsed.
        if !self.elements.is_empty() || file.kind != FileKind::Output || file.replayed {
            return Ok(None);
        }
        let Some(declared) = file.declared.clone().filter(|name| !EXCLUDED_TYPES.contains(&&**name)) else {
            return Ok(None);
        };
        match first_members(&bytes[line.clone()]) {
            Some((name, key)) if name == declared.as_bytes() => self.look_up(&declared, key, &bytes[line.clone()]),
            _ => Ok(None),
        }
    }

    /// Looks a line up by its type and the key of its id; `None` where no line is.
    pub(super) fn look_up(&mut self, name: &ResourceType, key: u128, line: &[u8]) -> Result<Option<Looked>> {
        let Some(known) = self.known else { return Ok(None) };
        let of_type = match self.lines.iter().find(|of_type| of_type.name == *name) {
            Some(of_type) => of_type.clone(),
            None => {
                let of_type = known.of(name);
                self.lines.push(of_type.clone());
                of_type
            }
        };
        let hash = of_type.encoder.map(|encoder| LineHash::of(line, encoder));
        // A line out of quarantine is matched with the export's own rows first.
        let index = if self.chunk.file.replayed { None } else { known.index(&of_type) };
        let known = index.map(|index| index.get(key)).transpose()?.flatten();
        Ok(Some(Looked { of_type, hash, known }))
    }

    /// Takes a line whose row the table has: of the same bytes or, once that is parsed, of the same version.
    pub(super) fn takes_unchanged(
        &mut self,
        looked: Option<&Looked>,
        version: Option<&RowKey>,
        line: &std::ops::Range<usize>,
    ) -> bool {
        let Some(looked) = looked else { return false };
        let is_version = looked.known.zip(version).is_some_and(|(known, row)| known.is_version(row));
        let index = looked.of_type.index.get().and_then(Option::as_ref);
        let (Some(known), Some(index)) = (looked.known, index) else { return false };
        if !is_version && !looked.is_same_line() {
            return false;
        }
        let name = &looked.of_type.name;
        let arrival = RowPosition::new(self.chunk.file.index, self.number());
        let row = UnchangedRow { place: known.place(), arrival };
        add(&mut self.tally.rows, name.clone());
        let at = self.unchanged.iter().position(|batch| batch.resource_type == *name).unwrap_or_else(|| {
            let (resource_type, files) = (name.clone(), index.files().clone());
            self.unchanged.push(UnchangedBatch { resource_type, files, rows: Vec::new(), json_bytes: 0 });
            self.unchanged.len() - 1
        });
        let batch = &mut self.unchanged[at];
        batch.rows.push(row);
        batch.json_bytes += line.len() as u64;
        true
    }
}

/// Reads the type and the key of the id of a line that begins with them, in either order, as nearly all lines do;
/// `None` where only a parser can tell.
fn first_members(line: &[u8]) -> Option<(&[u8], u128)> {
    let mut rest = Rest(line);
    rest.token(b'{')?;
    let (mut resource_type, mut id) = (None, None);
    for _ in 0..2 {
        let name = rest.text()?;
        rest.token(b':')?;
        match name {
            b"resourceType" => resource_type = Some(rest.text()?),
            b"id" => id = Some(rest.text()?),
            _ => return None,
        }
        if let (Some(resource_type), Some(id)) = (resource_type, id) {
            return (!id.is_empty()).then(|| (resource_type, key_of(id)));
        }
        rest.token(b',')?;
    }
    None
}

struct Rest<'a>(&'a [u8]);

impl<'a> Rest<'a> {
    fn token(&mut self, token: u8) -> Option<()> {
        self.0 = self.0.trim_ascii_start().strip_prefix(&[token])?;
        Some(())
    }

    /// A string without escapes.
    fn text(&mut self) -> Option<&'a [u8]> {
        self.token(b'"')?;
        let end = memchr::memchr2(b'"', b'\\', self.0)?;
        let (text, rest) = self.0.split_at(end);
        self.0 = rest.strip_prefix(b"\"")?;
        Some(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // Breaks if the id of something else is taken for the resource's, or if a line as servers write it is not seen.
    #[test]
    fn the_first_members_of_a_line() {
        let found = |line: &str| first_members(line.as_bytes()).map(|(name, key)| (name.to_vec(), key));
        let patient = Some((b"Patient".to_vec(), key_of(b"a-1")));
        for line in [
            r#"{"resourceType":"Patient","id":"a-1","meta":{}}"#,
            r#"{ "id" : "a-1" , "resourceType" : "Patient" }"#,
            "{\t\"resourceType\": \"Patient\", \"id\": \"a-1\"}",
        ] {
            assert_eq!(found(line), patient, "{line}");
        }
        for line in [
            r#"{"resourceType":"Patient","meta":{"id":"a-1"}}"#,
            r#"{"resourceType":"Patient","resourceType":"Patient","id":"a-1"}"#,
            r#"{"resourceType":"Patient","id":"a\u002d1"}"#,
            r#"{"resourceType":"Patient","id":""}"#,
            r#"{"resourceType":"Patient","id":7}"#,
            r#"{"resourceType":"Patient"}"#,
            r#"{"resourceType":"Patient","id":"a-1"#,
            r#"["resourceType","id"]"#,
            "",
        ] {
            assert_eq!(found(line), None, "{line}");
        }
    }
}
