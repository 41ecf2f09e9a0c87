//! Chunks of whole lines → tapes, each resource routed by its own `resourceType`.

use std::sync::Arc;

use bytes::Bytes;
use tokio::runtime::Handle;

use crate::error::Result;
use crate::flow::{Board, Receiver, Sender};
use crate::messages::{
    Arrival, BadLine, BadLineSink, Chunk, Fact, FileKind, LineId, MergeInput, ParsedChunk, ParsedRow, ResourceType, RowKey, Rows,
    key_of,
};
use crate::schema::{EXCLUDED_TYPES, ISSUE_TYPES, Model, parse_instant};
use crate::tape::{Kind, Tape, Value, parse_value, spread, spread_at_most};
use crate::telemetry;

const TOO_LONG: &str = "the line is longer than max_line";

const SPREADS: &str =
    "its lists would take more than an eighth of memory as columns: one item fills what many others leave empty";

/// One parse worker; any number share `chunks`.
pub struct Parse {
    /// Where chunks come from.
    pub chunks: Receiver<Chunk>,
    /// Where rows go.
    pub rows: Sender<Rows>,
    /// Where counts and deletions go.
    pub merge: Sender<MergeInput>,
    /// Where bad lines go.
    pub bad_lines: BadLineSink,
    /// Longest line that is read.
    pub max_line: usize,
    /// Bytes that the columns of one resource may take.
    pub max_columns: usize,
    /// Counters.
    pub board: Board,
}

/// What one line is.
enum Line {
    Row(ResourceType, RowKey),
    Excluded(ResourceType),
    Header,
}

/// A resource type's shared name: the model's own, so that a hostile server cannot fill memory with names.
struct Names {
    known: Vec<ResourceType>,
}

impl Names {
    fn new() -> Self {
        let mut known: Vec<ResourceType> = Model::r4().resource_types().iter().map(|name| Arc::from(name.as_str())).collect();
        known.sort();
        Self { known }
    }
    fn get(&self, name: &[u8]) -> Option<&ResourceType> {
        let at = self.known.binary_search_by(|known| known.as_bytes().cmp(name)).ok()?;
        Some(&self.known[at])
    }
}

impl Parse {
    /// Parses until the edge closes.
    pub fn run(self, handle: &Handle) -> Result<()> {
        let parser = ChunkParser::new(self.max_line, self.bad_lines.clone()).with_columns(self.max_columns);
        while let Some(parcel) = handle.block_on(self.chunks.recv()) {
            let chunk: &Chunk = &parcel;
            let Parsed { rows, tally, deletions, outcomes } = parser.parse(chunk)?;
            self.bad_lines.deleted(&deletions)?;
            if !tally.bad.is_empty() || !deletions.is_empty() {
                self.bad_lines.sync()?;
            }
            for (severity, count) in outcomes {
                self.board.add(telemetry::OUTCOME_ISSUES, &severity, count);
            }
            if !rows.by_type.is_empty() {
                // The bytes now belong to the next edge's budget; holding both shares could never block
                // this worker alone for ever, but would halve what the edges hold.
                drop(parcel);
                if handle.block_on(self.rows.send(rows)).is_err() {
                    return Ok(());
                }
            }
            if !deletions.is_empty() && handle.block_on(self.merge.send(MergeInput::Deletions(deletions))).is_err() {
                return Ok(());
            }
            if handle.block_on(self.merge.send(MergeInput::Fact(Fact::Parsed(tally)))).is_err() {
                return Ok(());
            }
        }
        Ok(())
    }
}

/// What a chunk holds.
#[derive(Debug)]
pub struct Parsed {
    /// Its resources.
    pub rows: Rows,
    /// What became of its lines.
    pub tally: ParsedChunk,
    /// Ids that are gone.
    pub deletions: Vec<(ResourceType, Box<str>)>,
    /// Issues of OperationOutcomes, by severity and code.
    pub outcomes: Vec<(Arc<str>, u64)>,
}

/// Reads chunks: bytes in, tapes out, and nothing else.
pub struct ChunkParser {
    names: Names,
    max_line: usize,
    max_columns: usize,
    bad_lines: BadLineSink,
}

impl ChunkParser {
    /// A parser that reads lines of at most `max_line` bytes and hands what it cannot read to `bad_lines`.
    pub fn new(max_line: usize, bad_lines: BadLineSink) -> Self {
        Self { names: Names::new(), max_line, max_columns: usize::MAX, bad_lines }
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
            tape: Tape::default(),
            by_type: Vec::new(),
            tally: ParsedChunk { file: chunk.file.index, bytes: chunk.bytes.len() as u64, ..ParsedChunk::default() },
            deletions: Vec::new(),
            outcomes: Vec::new(),
        };
        work.chunk()?;
        let Work { tape, by_type, tally, deletions, outcomes, .. } = work;
        Ok(Parsed {
            rows: Rows { file: chunk.file.clone(), bytes: chunk.bytes.clone(), tape, by_type },
            tally,
            deletions,
            outcomes,
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
    tape: Tape,
    by_type: Vec<(ResourceType, Vec<ParsedRow>)>,
    tally: ParsedChunk,
    deletions: Vec<(ResourceType, Box<str>)>,
    outcomes: Vec<(Arc<str>, u64)>,
}

fn add<K: PartialEq>(counts: &mut Vec<(K, u64)>, key: K) {
    match counts.iter_mut().find(|(known, _)| *known == key) {
        Some((_, count)) => *count += 1,
        None => counts.push((key, 1)),
    }
}

impl Work<'_> {
    fn chunk(&mut self) -> Result<()> {
        let bytes: Bytes = self.chunk.bytes.clone();
        if let Some(length) = self.chunk.oversized {
            self.tally.lines = 1;
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
            } else if line.len() > self.max_line {
                self.bad(line.clone(), TOO_LONG.into(), line.len() as u64)?;
            } else if !all_utf8 && simdutf8::basic::from_utf8(&bytes[line.clone()]).is_err() {
                self.bad(line.clone(), "not UTF-8".into(), line.len() as u64)?;
            } else {
                self.line(&bytes, line)?;
            }
            start = end + 1;
        }
        Ok(())
    }

    fn line(&mut self, bytes: &Bytes, line: std::ops::Range<usize>) -> Result<()> {
        let before = self.tape.len();
        let root = match parse_value(&mut self.tape, bytes, line.start, line.end) {
            Ok(root) => root,
            Err(fault) => {
                // A page, an array or one resource over many lines; from a server, any text: it is no resource that is broken.
                let of_server = self.chunk.file.location.is_none();
                let is_foreign = match bytes[line.start] {
                    b'{' => line.len() == 1,
                    b'<' | b'[' => true,
                    _ => of_server,
                };
                self.tally.foreign += u64::from(is_foreign);
                return self.bad(line.clone(), format!("not JSON: {fault}"), line.len() as u64);
            }
        };
        let nodes = self.tape.len() - before;
        let document = self.tape.over(bytes);
        let value = document.value(root);
        let meant = match self.chunk.file.kind {
            FileKind::Output => output(self.names, value),
            FileKind::Deleted => deletions(self.names, value, &mut self.deletions).map(|()| Line::Header),
            FileKind::Outcome => {
                let (fatal, errors) = outcome_issues(value, &mut self.outcomes);
                self.tally.fatal += fatal;
                self.tally.errors += errors;
                Ok(Line::Header)
            }
        };
        let declared = self.chunk.file.declared.as_deref();
        // Nearly every line is of its file's own type, and need not be looked at again.
        let is_own = matches!(&meant, Ok(Line::Row(name, _)) if Some(&**name) == declared);
        let is_word = !is_own && self.chunk.file.kind == FileKind::Output && is_word_on_something_else(value, declared);
        self.tally.foreign += u64::from(is_word && meant.is_ok());
        // Few are large enough to be looked at.
        let spreads = || spread_at_most(nodes) > self.max_columns && spread(value) > self.max_columns;
        match meant {
            Ok(Line::Row(..)) if spreads() => self.bad(line.clone(), SPREADS.into(), line.len() as u64),
            Ok(Line::Row(resource_type, key)) => {
                let arrival = Arrival::new(self.chunk.file.index, self.chunk.first_line + self.tally.lines - 1);
                let replayed = self.chunk.file.replayed;
                if replayed {
                    self.tally.replayed.push((LineId::of(&bytes[line.clone()]), resource_type.clone()));
                }
                let row = ParsedRow { root, line, key: RowKey { arrival, replayed, ..key }, added: 0 };
                match self.by_type.iter_mut().find(|(known, _)| *known == resource_type) {
                    Some((_, rows)) => rows.push(row),
                    None => self.by_type.push((resource_type.clone(), vec![row])),
                }
                add(&mut self.tally.rows, resource_type);
                Ok(())
            }
            Ok(Line::Excluded(resource_type)) => {
                self.tally.headers += 1;
                add(&mut self.tally.excluded, resource_type);
                Ok(())
            }
            Ok(Line::Header) => {
                self.tally.headers += 1;
                Ok(())
            }
            Err(reason) => {
                let has_type = value.get(b"resourceType").is_some();
                self.tally.foreign += u64::from(value.kind() != Kind::Object || !has_type || is_word);
                self.bad(line.clone(), reason.into(), line.len() as u64)
            }
        }
    }

    fn bad(&mut self, line: std::ops::Range<usize>, reason: String, full_length: u64) -> Result<()> {
        if self.chunk.file.replayed {
            // It stays where it is, and was held against its type by the run that it came in.
            self.tally.headers += 1;
            return Ok(());
        }
        let bytes = &self.chunk.bytes[line.clone()];
        let bad = BadLine {
            file: &self.chunk.file,
            line: self.chunk.first_line + self.tally.lines - 1,
            offset: self.chunk.offset + line.start as u64,
            reason,
            bytes,
            full_length,
        };
        self.bad_lines.keep(&bad)?;
        // Held against the type that the file declares, where that is one with a table.
        let declared = self.chunk.file.declared.clone().filter(|_| self.chunk.file.kind == FileKind::Output);
        add(&mut self.tally.bad, declared.filter(|name| !EXCLUDED_TYPES.contains(&&**name)));
        Ok(())
    }
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

/// A line of an output file.
fn output(names: &Names, value: Value<'_>) -> Result<Line, &'static str> {
    if value.kind() != Kind::Object {
        return Err("not a JSON object");
    }
    let (mut resource_type, mut id, mut meta) = (None, None, None);
    for (name, member) in value.entries() {
        match name {
            b"resourceType" => resource_type = resource_type.or(Some(member)),
            b"id" => id = id.or(Some(member)),
            b"meta" => meta = meta.or(Some(member)),
            _ => continue,
        }
        if resource_type.is_some() && id.is_some() && meta.is_some() {
            break;
        }
    }
    let resource_type = resource_type.ok_or("no resourceType")?.str_bytes().ok_or("resourceType is not a string")?;
    let resource_type = names.get(resource_type).ok_or("resourceType is not one of FHIR R4")?.clone();
    if EXCLUDED_TYPES.contains(&&*resource_type) {
        return Ok(Line::Excluded(resource_type));
    }
    let id = id.ok_or("no id")?.str_bytes().ok_or("id is not a string")?;
    if id.is_empty() {
        return Err("id is empty");
    }
    let mut key = RowKey {
        key: key_of(id),
        last_updated: RowKey::ABSENT,
        version: RowKey::ABSENT,
        arrival: Arrival::default(),
        subsetted: false,
        replayed: false,
    };
    if let Some(meta) = meta {
        rank(meta, &mut key);
    }
    Ok(Line::Row(resource_type, key))
}

fn rank(meta: Value<'_>, key: &mut RowKey) {
    for (name, member) in meta.entries() {
        match name {
            b"lastUpdated" => {
                key.last_updated = member.str_bytes().and_then(parse_instant).unwrap_or(RowKey::ABSENT);
            }
            b"versionId" => {
                let number = member.as_str().and_then(|text| text.parse::<i64>().ok()).filter(|number| *number >= 0);
                key.version = number.unwrap_or(RowKey::ABSENT);
            }
            b"tag" => {
                // K12: the server marks a resource that `_elements` cut down.
                key.subsetted =
                    member.items().any(|tag| tag.get(b"code").and_then(|code| code.str_bytes()) == Some(b"SUBSETTED"));
            }
            _ => {}
        }
    }
}

/// A line of a `deleted` file: a transaction Bundle with one or more DELETE entries (Bulk Data 2.0,
/// "Deleted Output"); entries with other methods are none of ours.
fn deletions(names: &Names, value: Value<'_>, out: &mut Vec<(ResourceType, Box<str>)>) -> Result<(), &'static str> {
    if value.get(b"resourceType").and_then(|name| name.str_bytes()) != Some(b"Bundle") {
        return Err("not a Bundle, in a file of deletions");
    }
    // A line of which some entries cannot be read goes to quarantine, and what can be read of it is applied: deletions are
    // not tried again.
    let (mut wrong, mut others) = (Ok(()), 0u64);
    for entry in value.get(b"entry").iter().flat_map(Value::items) {
        let Some(request) = entry.get(b"request") else { continue };
        if request.get(b"method").and_then(|method| method.str_bytes()) != Some(b"DELETE") {
            others += 1;
            continue;
        }
        match deletion(names, request) {
            Ok(found) => out.push(found),
            Err(why) => wrong = wrong.and(Err(why)),
        }
    }
    if others > 0 {
        tracing::debug!(entries = others, "entries of a deletion bundle that are no DELETE are passed over");
    }
    wrong
}

/// Whether a line of a file that was declared for another type is the server's word instead of it: an outcome that tells of an
/// error, or a Bundle.
fn is_word_on_something_else(value: Value<'_>, declared: Option<&str>) -> bool {
    let named = value.get(b"resourceType").and_then(|name| name.as_str());
    match named.filter(|name| declared.is_some_and(|declared| declared != *name)) {
        Some("OperationOutcome") => {
            let (_, errors) = outcome_issues(value, &mut Vec::new());
            errors > 0
        }
        Some("Bundle") => true,
        _ => false,
    }
}

/// What a DELETE entry takes away: `Type/id`, behind a base or not, with a version behind it or not.
fn deletion(names: &Names, request: Value<'_>) -> Result<(ResourceType, Box<str>), &'static str> {
    let url = request.get(b"url").and_then(|url| url.as_str()).ok_or("a DELETE without a url")?;
    let url = url.split_once("/_history/").map_or(url, |(resource, _)| resource);
    let mut parts = url.rsplit('/');
    let (id, name) = (parts.next().unwrap_or_default(), parts.next().ok_or("a DELETE whose url is not Type/id")?);
    let resource_type = names.get(name.as_bytes()).ok_or("a DELETE of a type that is not one of FHIR R4")?;
    if id.is_empty() {
        return Err("a DELETE without an id");
    }
    Ok((resource_type.clone(), id.into()))
}

/// Counts the issues of an OperationOutcome by severity and code; how many were fatal, and how many fatal or errors.
fn outcome_issues(value: Value<'_>, out: &mut Vec<(Arc<str>, u64)>) -> (u64, u64) {
    let (mut fatal, mut errors) = (0, 0);
    for issue in value.get(b"issue").iter().flat_map(Value::items) {
        let severity = match issue.get(b"severity").and_then(|severity| severity.str_bytes()) {
            Some(b"fatal") => "fatal",
            Some(b"error") => "error",
            Some(b"warning") => "warning",
            _ => "information",
        };
        fatal += u64::from(severity == "fatal");
        errors += u64::from(matches!(severity, "fatal" | "error"));
        // A code of FHIR's (IssueType), or none: what else stands there might be anything, and any number of things.
        let code = issue.get(b"code").and_then(|code| code.as_str()).unwrap_or_default();
        add(out, if ISSUE_TYPES.contains(&code) { format!("{severity} {code}") } else { severity.to_owned() }.into());
    }
    (fatal, errors)
}
