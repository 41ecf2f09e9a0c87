//! Chunks of whole lines → tapes, each resource routed by its own `resourceType`.

mod deletions;
mod known_lines;
mod output_line;
mod server_errors;
mod settings;

pub use self::settings::{Bad, LINE_INDEX, ParseSection};
use std::sync::Arc;

use bytes::Bytes;
use tokio::runtime::Handle;

use self::deletions::{NOT_DELETIONS, deletions};
pub use self::known_lines::{KnownLines, KnownLinesSettings};
use self::known_lines::{Looked, TypeLines};
use self::output_line::output;
use self::server_errors::Said;
use crate::error::Result;
use crate::messages::{
    BadLine, BadLineSink, Chunk, ControlEvent, Deletion, FileKind, LineId, MergeInput, ParsedChunk, ParsedRow,
    ResourceType, RowKey, RowPosition, Rows, UnchangedBatch,
};
use crate::telemetry;
use fhir_arrow::tape::{Kind, Tape, Value, expanded_size, expanded_size_limit, parse_value};
use fhir_arrow::{EXCLUDED_TYPES, Model};
use flow::{Counters, Receiver, Sender};

const TOO_LONG: &str = "the line is longer than max_line";

const UNKNOWN_TYPE: &str = "resourceType is not one of FHIR R4";

const SPREADS: &str =
    "its lists need more than an eighth of `memory` as columns: one item fills fields that many others leave empty";

/// One parse worker; any number share `chunks`.
pub struct Parse {
    /// Source of chunks.
    pub chunks: Receiver<Chunk>,
    /// Destination of rows.
    pub rows: Sender<Rows>,
    /// Destination of counts and deletions.
    pub merge: Sender<MergeInput>,
    /// Destination of bad lines.
    pub bad_lines: BadLineSink,
    /// Longest line that is read.
    pub max_line: usize,
    /// Bytes that the columns of one resource may take.
    pub max_columns: usize,
    /// Codes of issues that hold no watermark.
    pub ignored_codes: Arc<[String]>,
    /// Elements that resources are asked to be cut down to: `id`, or `Patient.id`.
    pub elements: Arc<[String]>,
    /// Rows of the tables, by which unchanged lines are known; `None` where each line is to be encoded.
    pub known: Option<Arc<KnownLines>>,
    /// Counters.
    pub counters: Counters,
}

/// Kind of one line.
enum Line {
    Row(ResourceType, RowKey),
    /// A resource that the server marks as deleted.
    SoftDeleted(ResourceType, RowKey),
    Excluded(ResourceType),
    /// No resource, and nothing that a manifest counts: a `Parameters` header.
    Header,
    /// The server's words on its export.
    ServerMessage,
    /// A Bundle of deletions.
    Deletions,
}

/// A resource type's shared name: the model's own, so that a hostile server cannot fill memory with names.
struct Names {
    known: Vec<ResourceType>,
}

impl Names {
    fn new() -> Self {
        let mut known: Vec<ResourceType> =
            Model::r4().resource_types().iter().map(|name| Arc::from(name.as_str())).collect();
        known.sort();
        Self { known }
    }
    fn get(&self, name: &[u8]) -> Option<&ResourceType> {
        let at = self.known.binary_search_by(|known| known.as_bytes().cmp(name)).ok()?;
        Some(&self.known[at])
    }
}

/// Rows without the tag, of types that are cut down: HAPI sends whole resources. Others cut down and do not say so.
const NOT_CUT_DOWN: &str =
    "resources without SUBSETTED though source.elements is set: the server ignores it, or does not say so";

impl Parse {
    /// Parses until the edge closes.
    pub fn run(self, handle: &Handle) -> Result<()> {
        let parser = ChunkParser::new(self.max_line, self.bad_lines.clone())
            .with_columns(self.max_columns)
            .with_ignored_codes(self.ignored_codes.clone())
            .with_elements(self.elements.clone())
            .with_known(self.known.clone());
        while let Some(parcel) = handle.block_on(self.chunks.recv()) {
            let chunk: &Chunk = &parcel;
            let Parsed { rows, unchanged, tally, deletions, outcomes, not_deletions, not_cut_down, is_kept } =
                parser.parse(chunk)?;
            self.bad_lines.deleted(&deletions)?;
            if is_kept || !deletions.is_empty() {
                self.bad_lines.sync()?;
            }
            if not_deletions > 0 {
                self.counters.add(telemetry::DEVIATIONS, &NOT_DELETIONS.into(), not_deletions);
            }
            if not_cut_down > 0 {
                self.counters.add(telemetry::DEVIATIONS, &NOT_CUT_DOWN.into(), not_cut_down);
            }
            for (severity, count) in outcomes {
                self.counters.add(telemetry::OUTCOME_ISSUES, &severity, count);
            }
            if !rows.by_type.is_empty() {
                // The bytes now belong to the next edge's budget; holding both shares could never block
                // this worker alone for ever, but would halve what the edges hold.
                drop(parcel);
                if handle.block_on(self.rows.send(rows)).is_err() {
                    return Ok(());
                }
            }
            for batch in unchanged {
                if handle.block_on(self.merge.send(MergeInput::Unchanged(Box::new(batch)))).is_err() {
                    return Ok(());
                }
            }
            if !deletions.is_empty() && handle.block_on(self.merge.send(MergeInput::Deletions(deletions))).is_err() {
                return Ok(());
            }
            if handle.block_on(self.merge.send(MergeInput::ControlEvent(ControlEvent::Parsed(tally.into())))).is_err() {
                return Ok(());
            }
        }
        Ok(())
    }
}

/// Content of a chunk.
#[derive(Debug)]
pub struct Parsed {
    /// Its resources that are to be encoded.
    pub rows: Rows,
    /// Those that the tables have already.
    pub unchanged: Vec<UnchangedBatch>,
    /// Counts of its lines.
    pub tally: ParsedChunk,
    /// Ids that are gone.
    pub deletions: Vec<Deletion>,
    /// Issues of OperationOutcomes, by severity and code.
    pub outcomes: Vec<(Arc<str>, u64)>,
    /// Entries of deletion Bundles that are not a DELETE.
    pub not_deletions: u64,
    /// Resources without SUBSETTED, of types that are asked to be cut down (K12).
    pub not_cut_down: u64,
    /// True if a line was kept: in quarantine, or among the server's messages.
    pub is_kept: bool,
}

/// Reads chunks: bytes in, tapes out, and nothing else.
pub struct ChunkParser {
    names: Names,
    max_line: usize,
    max_columns: usize,
    ignored_codes: Arc<[String]>,
    elements: Arc<[String]>,
    known: Option<Arc<KnownLines>>,
    bad_lines: BadLineSink,
}

impl ChunkParser {
    /// A parser that reads lines of at most `max_line` bytes and hands what it cannot read to `bad_lines`.
    pub fn new(max_line: usize, bad_lines: BadLineSink) -> Self {
        Self {
            names: Names::new(),
            max_line,
            max_columns: usize::MAX,
            ignored_codes: Arc::default(),
            elements: Arc::default(),
            known: None,
            bad_lines,
        }
    }

    /// Lets issues of these codes hold no watermark.
    pub fn with_ignored_codes(mut self, codes: Arc<[String]>) -> Self {
        self.ignored_codes = codes;
        self
    }

    /// Counts resources that were not cut down to these elements.
    pub fn with_elements(mut self, elements: Arc<[String]>) -> Self {
        self.elements = elements;
        self
    }

    /// Knows lines whose row the table has already.
    pub fn with_known(mut self, known: Option<Arc<KnownLines>>) -> Self {
        self.known = known;
        self
    }

    /// Takes a line for bad whose columns would take more than so many bytes.
    pub fn with_columns(mut self, max_columns: usize) -> Self {
        self.max_columns = max_columns;
        self
    }

    /// Reads one chunk; fails only where a bad line cannot be kept.
    pub fn parse(&self, chunk: &Chunk) -> Result<Parsed> {
        let mut work = Work {
            chunk,
            names: &self.names,
            max_line: self.max_line,
            max_columns: self.max_columns,
            bad_lines: &self.bad_lines,
            said: Said { names: &self.names, ignored_codes: &self.ignored_codes, issues: Vec::new() },
            tape: Tape::default(),
            by_type: Vec::new(),
            known: self.known.as_deref(),
            lines: Vec::new(),
            unchanged: Vec::new(),
            elements: &self.elements,
            tally: ParsedChunk { file: chunk.file.index, bytes: chunk.bytes.len() as u64, ..ParsedChunk::default() },
            deletions: Vec::new(),
            not_deletions: 0,
            not_cut_down: 0,
            is_kept: false,
        };
        work.chunk()?;
        let Work { said, tape, by_type, unchanged, tally, deletions, not_deletions, not_cut_down, is_kept, .. } = work;
        Ok(Parsed {
            rows: Rows { file: chunk.file.clone(), bytes: chunk.bytes.clone(), tape, by_type },
            unchanged,
            tally,
            deletions,
            outcomes: said.issues,
            not_deletions,
            not_cut_down,
            is_kept,
        })
    }
}

/// The work on one chunk.
struct Work<'a> {
    chunk: &'a Chunk,
    names: &'a Names,
    max_line: usize,
    max_columns: usize,
    bad_lines: &'a BadLineSink,
    said: Said<'a>,
    tape: Tape,
    by_type: Vec<(ResourceType, Vec<ParsedRow>)>,
    known: Option<&'a KnownLines>,
    lines: Vec<Arc<TypeLines>>,
    unchanged: Vec<UnchangedBatch>,
    elements: &'a [String],
    tally: ParsedChunk,
    deletions: Vec<Deletion>,
    not_deletions: u64,
    not_cut_down: u64,
    is_kept: bool,
}

fn add<K: PartialEq>(counts: &mut Vec<(K, u64)>, key: K) {
    add_many(counts, key, 1);
}

fn add_many<K: PartialEq>(counts: &mut Vec<(K, u64)>, key: K, by: u64) {
    match counts.iter_mut().find(|(known, _)| *known == key) {
        Some((_, count)) => *count += by,
        None => counts.push((key, by)),
    }
}

fn type_of(value: Value<'_>) -> Option<&str> {
    value.get(b"resourceType").and_then(|name| name.as_str())
}

impl Work<'_> {
    fn chunk(&mut self) -> Result<()> {
        let bytes: Bytes = self.chunk.bytes.clone();
        if let Some(length) = self.chunk.oversized {
            (self.tally.lines, self.tally.last) = (1, self.chunk.first_line);
            self.breaks_off();
            return self.bad(0..bytes.len(), TOO_LONG.into(), length);
        }
        // Most chunks are UTF-8 as a whole; the lines of one that is not are looked at one by one.
        let all_utf8 = simdutf8::basic::from_utf8(&bytes).is_ok();
        let mut start = 0;
        while start < bytes.len() {
            let end = memchr::memchr(b'\n', &bytes[start..]).map_or(bytes.len(), |at| start + at);
            self.tally.lines += 1;
            let line = trim(&bytes, start..end);
            if line.is_empty() {
                self.tally.blank += 1;
                start = end + 1;
                continue;
            }
            self.tally.last = self.number();
            if line.len() > self.max_line {
                self.breaks_off();
                self.bad(line.clone(), TOO_LONG.into(), line.len() as u64)?;
            } else if !all_utf8 && simdutf8::basic::from_utf8(&bytes[line.clone()]).is_err() {
                self.breaks_off();
                self.bad(line.clone(), "not UTF-8".into(), line.len() as u64)?;
            } else {
                self.line(&bytes, line)?;
            }
            start = end + 1;
        }
        Ok(())
    }

    fn line(&mut self, bytes: &Bytes, line: std::ops::Range<usize>) -> Result<()> {
        let looked = self.look_up_line(bytes, &line)?;
        if self.takes_unchanged(looked.as_ref(), None, &line) {
            return Ok(());
        }
        let before = self.tape.len();
        let root = match parse_value(&mut self.tape, bytes, line.start, line.end) {
            Ok(root) => root,
            Err(fault) => return self.not_json(bytes, line, &fault.to_string()),
        };
        let nodes = self.tape.len() - before;
        let document = self.tape.over(bytes);
        let value = document.value(root);
        let declared = self.chunk.file.declared.as_deref();
        let meant = match self.chunk.file.kind {
            FileKind::Output => match output(self.names, value) {
                // Nearly every line is of its file's own type, and need not be looked at again.
                Ok(Line::Row(name, key)) if Some(&*name) == declared => Ok(Line::Row(name, key)),
                // K18: the header of a block, in files that are organised by instances.
                Ok(Line::Excluded(name)) if &*name == "Parameters" && declared != Some("Parameters") => {
                    Ok(Line::Header)
                }
                meant => self.said.message(&self.chunk.file, value, &mut self.tally).map_or(meant, Ok),
            },
            FileKind::Deleted => {
                let before = self.deletions.len();
                let meant = deletions(self.names, value, &mut self.deletions, &mut self.not_deletions);
                self.deletions[before..]
                    .iter()
                    .for_each(|gone| add(&mut self.tally.deleted, gone.resource_type.clone()));
                meant.map(|()| Line::Deletions)
            }
            FileKind::Outcome if type_of(value) == Some("OperationOutcome") => {
                self.said.outcome(&self.chunk.file, value, &mut self.tally);
                Ok(Line::ServerMessage)
            }
            FileKind::Outcome => Err("not an OperationOutcome, in a file of errors"),
        };
        // A Bundle in place of resources of another type is the server's word instead of them.
        let is_page = self.chunk.file.kind == FileKind::Output
            && type_of(value) == Some("Bundle")
            && declared.is_some_and(|declared| declared != "Bundle");
        self.tally.foreign += u64::from(is_page && meant.is_ok());
        // Few are large enough to be looked at.
        let spreads = || expanded_size_limit(nodes) > self.max_columns && expanded_size(value) > self.max_columns;
        match meant {
            Ok(Line::Row(..)) if spreads() => self.bad(line.clone(), SPREADS.into(), line.len() as u64),
            Ok(Line::Row(resource_type, key)) => self.row(bytes, (resource_type, key), root, line, looked),
            Ok(Line::SoftDeleted(resource_type, key)) => {
                self.tally.headers += 1;
                add(&mut self.tally.deleted, resource_type.clone());
                let arrival = RowPosition::new(self.chunk.file.index, self.number());
                let id = value.get(b"id").and_then(|id| id.as_str()).unwrap_or_default().into();
                self.deletions.push(Deletion { resource_type, id, version: Some(RowKey { arrival, ..key }) });
                Ok(())
            }
            Ok(Line::Excluded(resource_type)) => {
                self.tally.headers += 1;
                add(&mut self.tally.excluded, resource_type);
                Ok(())
            }
            Ok(Line::Deletions) => {
                self.tally.headers += 1;
                Ok(())
            }
            Ok(Line::Header) => {
                self.tally.headers += 1;
                self.tally.asides += 1;
                Ok(())
            }
            Ok(Line::ServerMessage) => {
                self.tally.headers += 1;
                self.tally.asides += 1;
                self.is_kept = true;
                self.bad_lines.message(&self.chunk.file, self.number(), &bytes[line])
            }
            Err(reason) => {
                let is_foreign = value.kind() != Kind::Object || type_of(value).is_none() || is_page;
                self.tally.foreign += u64::from(is_foreign);
                if is_foreign {
                    self.breaks_off();
                }
                self.bad(line.clone(), reason.into(), line.len() as u64)
            }
        }
    }

    /// Keeps a line that is not JSON.
    fn not_json(&mut self, bytes: &Bytes, line: std::ops::Range<usize>, fault: &str) -> Result<()> {
        // A page, an array or one resource over many lines; from a server, any text: it is no resource that is broken.
        let of_server = self.chunk.file.location.is_none();
        let is_foreign = match bytes[line.start] {
            b'{' => line.len() == 1,
            b'<' | b'[' => true,
            _ => of_server,
        };
        self.tally.foreign += u64::from(is_foreign);
        // The server may have written it in place of what was to come: where nothing comes behind it, it did.
        self.breaks_off();
        self.bad(line.clone(), format!("not JSON: {fault}"), line.len() as u64)
    }

    /// Adds a resource, which may have been looked up by its first bytes.
    fn row(
        &mut self,
        bytes: &Bytes,
        (resource_type, key): (ResourceType, RowKey),
        root: usize,
        line: std::ops::Range<usize>,
        looked: Option<Looked>,
    ) -> Result<()> {
        let arrival = RowPosition::new(self.chunk.file.index, self.number());
        let replayed = self.chunk.file.replayed;
        if replayed {
            self.tally.replayed.push((LineId::of(&bytes[line.clone()]), resource_type.clone()));
        } else if !key.subsetted && is_cut(self.elements, &resource_type) {
            self.not_cut_down += 1;
        }
        let looked = match looked {
            Some(looked) => Some(looked),
            None => self.look_up(&resource_type, key.key, &bytes[line.clone()])?,
        };
        if self.takes_unchanged(looked.as_ref(), Some(&key), &line) {
            return Ok(());
        }
        let line_hash = looked.and_then(|looked| looked.hash());
        let row = ParsedRow { root, line, key: RowKey { arrival, replayed, ..key }, added: 0, line_hash };
        match self.by_type.iter_mut().find(|(known, _)| *known == resource_type) {
            Some((_, rows)) => rows.push(row),
            None => self.by_type.push((resource_type.clone(), vec![row])),
        }
        add(&mut self.tally.rows, resource_type);
        Ok(())
    }

    /// The line's number in its file.
    fn number(&self) -> u64 {
        self.chunk.first_line + self.tally.lines - 1
    }

    /// Notes that the line is nothing that a server writes before its last one.
    fn breaks_off(&mut self) {
        let file = &self.chunk.file;
        if file.kind == FileKind::Output && file.location.is_none() && !file.replayed {
            self.tally.last_foreign = self.number();
        }
    }

    fn bad(&mut self, line: std::ops::Range<usize>, reason: String, full_length: u64) -> Result<()> {
        if self.chunk.file.replayed {
            // It stays where it is, and was held against its type by the run that it came in.
            self.tally.headers += 1;
            return Ok(());
        }
        self.tally.unknown += u64::from(reason == UNKNOWN_TYPE);
        let bytes = &self.chunk.bytes[line.clone()];
        let bad = BadLine {
            file: &self.chunk.file,
            line: self.number(),
            offset: self.chunk.offset + line.start as u64,
            reason,
            bytes,
            full_length,
        };
        self.bad_lines.quarantine(&bad)?;
        self.is_kept = true;
        // Held against the type that the file declares, where that is one with a table.
        let declared = self.chunk.file.declared.clone().filter(|_| self.chunk.file.kind == FileKind::Output);
        add(&mut self.tally.bad, declared.filter(|name| !EXCLUDED_TYPES.contains(&&**name)));
        Ok(())
    }
}

/// Returns true if resources of a type are asked to be cut down to elements: `id`, or `Patient.id`.
fn is_cut(elements: &[String], name: &str) -> bool {
    elements.iter().any(|element| element.split_once('.').is_none_or(|(of, _)| of == name))
}

/// The line without white space around it (a CR before the LF among it).
fn trim(bytes: &[u8], line: std::ops::Range<usize>) -> std::ops::Range<usize> {
    let (mut start, mut end) = (line.start, line.end);
    while start < end && bytes[start].is_ascii_whitespace() {
        start += 1;
    }
    while end > start && bytes[end - 1].is_ascii_whitespace() {
        end -= 1;
    }
    start..end
}
