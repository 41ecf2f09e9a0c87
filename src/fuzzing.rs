//! Targets of the fuzzers (`fuzz/`), and the tests over the fuzzers' corpora. Each takes any bytes, and must not panic,
//! hang, or hold more than the bytes warrant; what it asserts must hold of every input.

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::{Arc, LazyLock};

use bytes::Bytes;
use url::Url;

use crate::error::Result;
use crate::jobs::ExportJobs;
use crate::jobs::checkpoint::CheckpointStore;
use crate::messages::{BadLine, BadLines, Chunk, Deletion, ExportFile, FileKind, ManifestEntryId, ResourceType};
use crate::stages::parse::ChunkParser;
use crate::state::{ScheduleTimes, StateFile, StateStore};
use bulk_data_client::{Manifest, parse_retry_after, unsigned};
use delta_upsert::{PageEncoder, read_vector};
use fhir_arrow::{ColumnPruning, Encoder, Layout, LayoutOptions, Model, PresentColumns};

/// A target: its name, and what it does with bytes.
pub type Target = (&'static str, fn(&[u8]));

/// All of them.
pub const TARGETS: &[Target] = &[
    ("ndjson", ndjson),
    ("manifest", manifest),
    ("answers", answers),
    ("pipeline_file", pipeline_file),
    ("state", state),
    ("deletion_vector", deletion_vector),
    ("unpack", unpack),
];

struct Passed;

impl BadLines for Passed {
    fn quarantine(&self, bad: &BadLine<'_>) -> Result<()> {
        // A reason is shown: it must have nothing of the line, and fit one.
        assert!(bad.reason.len() < 400 && !bad.reason.chars().any(char::is_control), "{:?}", bad.reason);
        Ok(())
    }
    fn message(&self, _: &ExportFile, _: u64, _: &[u8]) -> Result<()> {
        Ok(())
    }
    fn deleted(&self, _: &[Deletion]) -> Result<()> {
        Ok(())
    }
    fn sync(&self) -> Result<()> {
        Ok(())
    }
}

fn chunk(kind: FileKind, bytes: &[u8], first_line: u64) -> Option<Chunk> {
    let file = ExportFile {
        index: 1,
        export: 0,
        name: "fuzz".into(),
        url: Url::parse("file:///fuzz").ok()?,
        location: None,
        kind,
        declared: None,
        count: None,
        requires_access_token: false,
        replayed: false,
        place: ManifestEntryId { page: 0, kind, at: 0 },
    };
    Some(Chunk { file: Arc::new(file), first_line, offset: 0, bytes: Bytes::copy_from_slice(bytes), oversized: None })
}

thread_local! {
    /// Layouts are made once: there are megabytes of columns.
    static LAYOUTS: RefCell<HashMap<ResourceType, Arc<Layout>>> = RefCell::default();
}

fn layout(name: &ResourceType) -> Option<Arc<Layout>> {
    LAYOUTS.with_borrow_mut(|layouts| {
        if let Some(layout) = layouts.get(name) {
            return Some(layout.clone());
        }
        let layout = Arc::new(Layout::pathling(name, &LayoutOptions::default())?);
        layouts.insert(name.clone(), layout.clone());
        Some(layout)
    })
}

/// Rows by type: their JSON.
type RowsByType = Vec<(ResourceType, Vec<Vec<u8>>)>;

fn rows_of(parser: &ChunkParser, chunk: &Chunk, into: &mut RowsByType, encode: bool) -> Result<u64> {
    let parsed = parser.parse(chunk)?;
    let tally = &parsed.tally;
    let rows: u64 = tally.rows.iter().map(|(_, count)| count).sum();
    let bad: u64 = tally.bad.iter().map(|(_, count)| count).sum();
    assert_eq!(tally.lines, rows + bad + tally.blank + tally.headers, "each line is one of them");
    let document = parsed.rows.tape.over(&parsed.rows.bytes);
    for (name, resources) in &parsed.rows.by_type {
        let bytes = resources.iter().map(|row| parsed.rows.bytes[row.line.clone()].to_vec());
        match into.iter_mut().find(|(known, _)| known == name) {
            Some((_, known)) => known.extend(bytes),
            None => into.push((name.clone(), bytes.collect())),
        }
        let Some(layout) = layout(name).filter(|_| encode) else { continue };
        let mut encoder = Encoder::new(layout);
        for row in resources {
            encoder.push(document.value(row.root), &parsed.rows.bytes[row.line.clone()]);
        }
        let encoded = encoder.finish(&mut PresentColumns::default(), ColumnPruning::default())?;
        assert_eq!(encoded.batch.num_rows(), resources.len(), "a row for each resource");
        PageEncoder.encode(&encoded.batch, &encoded.schema, &encoded.filtered)?;
    }
    Ok(tally.lines)
}

/// NDJSON, of which the first byte says what kind of file it is in and whether its type is put before each line: parsed
/// whole and in two pieces, which must give the same rows, and encoded.
pub fn ndjson(data: &[u8]) {
    let Some((choice, rest)) = data.split_first() else { return };
    let kind = [FileKind::Output, FileKind::Output, FileKind::Output, FileKind::Deleted, FileKind::Outcome]
        [usize::from(*choice) % 5];
    let types = Model::r4().resource_types();
    let mut bytes = Vec::new();
    match (kind, rest.split_first()) {
        // Of a known type: else most of the time goes into names of types.
        (FileKind::Output, Some((number, rest))) if choice % 2 == 0 => {
            let name = &types[usize::from(*number) % types.len()];
            for line in rest.split(|byte| *byte == b'\n') {
                bytes.extend_from_slice(format!("{{\"resourceType\":\"{name}\",\"id\":\"i\",").as_bytes());
                bytes.extend_from_slice(line.strip_prefix(b"{").unwrap_or(line));
                bytes.push(b'\n');
            }
        }
        _ => bytes.extend_from_slice(rest),
    }
    // Low, so that lists are measured too.
    let parser = ChunkParser::new(1 << 16, Arc::new(Passed)).with_columns(1 << 16);
    let (mut whole, mut pieces) = (RowsByType::new(), RowsByType::new());
    let Some(all) = chunk(kind, &bytes, 1) else { return };
    let outcome = rows_of(&parser, &all, &mut whole, true);
    assert!(outcome.is_ok(), "what can be parsed can be encoded: {outcome:?}");
    let middle = bytes.len() / 2;
    let cut = bytes[middle..].iter().position(|byte| *byte == b'\n').map_or(bytes.len(), |at| middle + at + 1);
    let (Some(first), Some(second)) = (chunk(kind, &bytes[..cut], 1), chunk(kind, &bytes[cut..], 1)) else { return };
    let lines = rows_of(&parser, &first, &mut pieces, false).unwrap_or(0)
        + rows_of(&parser, &second, &mut pieces, false).unwrap_or(0);
    assert_eq!(outcome.unwrap_or(0), lines, "lines of the pieces");
    whole.sort();
    pieces.sort();
    assert_eq!(whole, pieces, "the same rows, however the bytes are cut");
}

/// A manifest.
pub fn manifest(data: &[u8]) {
    let Ok(status) = Url::parse("https://h.example/fhir/status/1") else { return };
    Manifest::read_partial(data, &status);
    if let Ok(manifest) = Manifest::read(data, &status) {
        let _ = manifest.check_time(None);
        let links = manifest.output.iter().chain(&manifest.deleted).chain(&manifest.outcomes).map(|file| &file.url);
        for url in links.chain(&manifest.next) {
            assert!(matches!(url.scheme(), "http" | "https"), "only web addresses are asked for");
            unsigned(url);
        }
    }
}

/// `Retry-After`, links, and the words of a refusal.
pub fn answers(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let now = std::time::SystemTime::now();
    parse_retry_after(&text, now);
    let words = bulk_data_client::server_words(data);
    assert!(words.chars().count() <= 500 && !words.chars().any(char::is_control), "{words:?}");
    if let Ok(url) = Url::parse(&text) {
        unsigned(&url);
        let shown = bulk_data_client::shown(&url);
        assert!(shown.chars().count() <= 301 && !shown.contains('?'), "{shown}");
    }
}

/// A pipeline file: every problem has its place.
pub fn pipeline_file(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Err(problems) = crate::config::read_pipeline(text, &[]) {
        assert!(!problems.is_empty(), "a refusal without a reason");
        for problem in problems {
            assert!(problem.place.0 > 0 && !problem.to_string().is_empty(), "{problem:?}");
        }
    }
}

/// The files of a state, one after the other: what a disk releases that is damaged.
pub fn state(data: &[u8]) {
    static FOLDER: LazyLock<Option<tempfile::TempDir>> = LazyLock::new(|| tempfile::tempdir().ok());
    let Some(folder) = FOLDER.as_ref().map(tempfile::TempDir::path) else { return };
    let state = StateStore::local(folder, None);
    let Some((choice, rest)) = data.split_first() else { return };
    let put = |name: &str| {
        let path = folder.join(name);
        let _ = path.parent().map(std::fs::create_dir_all);
        std::fs::write(path, rest).is_ok()
    };
    match choice % 6 {
        0 if put("journal.ndjson") => drop(state.journal().unfinished()),
        1 if put("exports.json") => drop(state.read::<ExportJobs>()),
        2 if put("state.json") => drop(state.read::<StateFile>()),
        3 if put("staged/index.json") => drop(CheckpointStore::of(&state).read()),
        4 if put("schedule.json") => drop(state.read::<ScheduleTimes>()),
        5 if put("quarantine/20250101T000000000Z-abcdef.ndjson") => {
            for line in state.quarantined().flatten() {
                line.1.bytes();
                line.1.id();
            }
            drop(state.retryable());
            drop(state.remove_superseded());
        }
        _ => {}
    }
}

/// A deletion vector as a table of somebody else's has it, in a file or in the log.
pub fn deletion_vector(data: &[u8]) {
    if let Ok(rows) = read_vector(data) {
        assert!(rows.len() <= 1 << 40 || data.len() > 16, "more rows than the bytes can say");
    }
}

/// Bytes that are packed; the first says how the server calls them.
pub fn unpack(data: &[u8]) {
    let Some((choice, packed)) = data.split_first() else { return };
    let encoding = ["", "gzip", "deflate", "identity", "br"][usize::from(*choice) % 5];
    let Ok(mut unpack) = bulk_data_client::content_encoding::Unpack::of(encoding, packed) else { return };
    let mut left = 64usize << 20;
    let mut sink = |bytes: &[u8]| {
        assert!(bytes.len() <= 32 << 20, "{} bytes at once", bytes.len());
        left = left.checked_sub(bytes.len()).ok_or(())?;
        Ok(())
    };
    for piece in packed.chunks(7) {
        if unpack.push(piece, &mut sink, |_| ()).is_err() {
            return;
        }
    }
    let _ = unpack.end(&mut sink, |_| ());
}
