//! Messages on each edge, named by what has been done to the data, and the facts that travel with it.

use parking_lot::Mutex;
use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use url::Url;

use fhir_arrow::tape::Tape;
use fhir_arrow::{EXCLUDED_TYPES, Layout, Model};
use flow::ByteSized;

/// A FHIR resource type, `Patient`.
pub type ResourceType = Arc<str>;

/// Tells how unchanged lines of each type were looked up.
pub trait LineIndexReport: Send + Sync {
    /// By type: `memory`, or `disk` where memory did not suffice, or `too slow` where that disk was so slow that rows
    /// were encoded instead.
    fn report(&self) -> HashMap<ResourceType, &'static str>;
}

/// Gives the layout that a type's rows are written in; `Err` where its table cannot be written. May look at the table,
/// so it is asked from computing threads only.
pub type Layouts = Arc<dyn Fn(&ResourceType) -> crate::error::Result<Arc<Layout>> + Send + Sync>;

pub use delta_upsert::{
    EncodedBatch, FileRows, LineHash, RowKey, RowPosition, UnchangedBatch, UnchangedRow, count_unmapped, key_of,
};
pub use foundation::Limit;
pub use foundation::instant::instant_text;

/// Returns true if `name` is a resource type of R4 that has a table.
pub fn has_table(name: &str) -> bool {
    Model::r4().is_resource_type(name) && !EXCLUDED_TYPES.contains(&name)
}

/// The watermark that an export of this `transactionTime` gives: what changed after `_until` was not asked for.
pub fn watermark_of(transaction_time: i64, until: Option<i64>) -> i64 {
    until.map_or(transaction_time, |until| transaction_time.min(until))
}

/// Content of a file of an export.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FileKind {
    /// Resources, one a line.
    Output,
    /// Bundles whose DELETE entries name what is gone.
    Deleted,
    /// OperationOutcomes.
    Outcome,
}

/// Place of a file in a manifest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ManifestEntryId {
    /// The page.
    pub page: usize,
    /// The list on the page.
    pub kind: FileKind,
    /// The place in the list.
    pub at: usize,
}

/// A file of an export: from a server's manifest or a folder.
#[derive(Debug)]
pub struct ExportFile {
    /// Place in the run's manifests: the first part of a row's order of arrival.
    pub index: u32,
    /// Which of the run's exports it belongs to.
    pub export: usize,
    /// A name for logs and quarantine: no query string, no host.
    pub name: String,
    /// Its URL. May hold secrets in its query: never log it.
    pub url: Url,
    /// Its place in the store, for a file of a folder.
    pub location: Option<object_store::path::Path>,
    /// Its content.
    pub kind: FileKind,
    /// The type that the manifest or the file's name declares.
    pub declared: Option<ResourceType>,
    /// Number of resources that the manifest promises.
    pub count: Option<u64>,
    /// True if the request needs the access token.
    pub requires_access_token: bool,
    /// True if these are lines that an earlier run quarantined, retried.
    pub replayed: bool,
    /// Its place in the manifest; a newer link may be had there.
    pub place: ManifestEntryId,
}

impl ByteSized for ExportFile {
    fn weight(&self) -> usize {
        size_of::<ExportFile>() + self.name.len() + self.url.as_str().len()
    }
}

/// Whole lines of a file.
#[derive(Debug)]
pub struct Chunk {
    /// The file.
    pub file: Arc<ExportFile>,
    /// Number of the first line, from 1.
    pub first_line: u64,
    /// Bytes before it in the (uncompressed) file.
    pub offset: u64,
    /// The lines, with their ends.
    pub bytes: Bytes,
    /// Set where the chunk is the beginning of one line that is too long to be read: its full length.
    pub oversized: Option<u64>,
}

impl ByteSized for Chunk {
    fn weight(&self) -> usize {
        self.bytes.len() + size_of::<Chunk>()
    }
}

/// A resource of [`Rows`].
#[derive(Debug)]
pub struct ParsedRow {
    /// Its root on the tape.
    pub root: usize,
    /// Its line in the bytes.
    pub line: std::ops::Range<usize>,
    /// Its key and rank.
    pub key: RowKey,
    /// Bytes that it has grown by since it came, by its attachments.
    pub added: usize,
    /// Hash of its line; `None` where the row says more than its line does.
    pub line_hash: Option<LineHash>,
}

/// Parsed resources of one chunk.
#[derive(Debug)]
pub struct Rows {
    /// The file that they are from.
    pub file: Arc<ExportFile>,
    /// The lines.
    pub bytes: Bytes,
    /// Their tapes.
    pub tape: Tape,
    /// The resources, by type.
    pub by_type: Vec<(ResourceType, Vec<ParsedRow>)>,
}

impl ByteSized for Rows {
    fn weight(&self) -> usize {
        let rows: usize = self.by_type.iter().map(|(_, rows)| rows.capacity()).sum();
        self.bytes.len() + self.tape.heap() + rows * size_of::<ParsedRow>()
    }
}

/// A resource that the server says is gone.
#[derive(Debug, Clone)]
pub struct Deletion {
    /// Its type.
    pub resource_type: ResourceType,
    /// Its logical id.
    pub id: Box<str>,
    /// The version that says so, where the server marks the resource as deleted; an entry of a `deleted` file has none.
    pub version: Option<RowKey>,
}

/// Input of merge.
#[derive(Debug)]
pub enum MergeInput {
    /// Rows to stage.
    Batch(Box<EncodedBatch>),
    /// Rows that the table has already.
    Unchanged(Box<UnchangedBatch>),
    /// Ids that are gone.
    Deletions(Vec<Deletion>),
    /// A fact for the ledger.
    ControlEvent(ControlEvent),
}

impl ByteSized for MergeInput {
    fn weight(&self) -> usize {
        match self {
            MergeInput::Batch(batch) => {
                batch.parquet.len() + batch.metadata.memory_size() + batch.keys.len() * size_of::<RowKey>()
            }
            MergeInput::Unchanged(batch) => size_of::<UnchangedBatch>() + batch.rows.len() * size_of::<UnchangedRow>(),
            MergeInput::Deletions(ids) => {
                ids.len() * size_of::<Deletion>() + ids.iter().map(|deletion| deletion.id.len()).sum::<usize>()
            }
            MergeInput::ControlEvent(_) => size_of::<ControlEvent>(),
        }
    }
}

/// A page of a manifest, or one batch of a folder's files.
#[derive(Debug)]
pub struct ManifestPage {
    /// Which export.
    pub export: usize,
    /// URL of its status, which names it to later runs. May hold a secret.
    pub status: Option<Arc<str>>,
    /// Files that it lists.
    pub files: Vec<Arc<ExportFile>>,
}

/// The last that an export says of itself.
#[derive(Debug, Clone)]
pub struct ExportEnd {
    /// Which export.
    pub export: usize,
    /// Types that were asked for by name, without those that are merged.
    pub requested: Vec<ResourceType>,
    /// True if all types were asked for, and none by name.
    pub all_types: bool,
    /// Types that have a table already, where all were asked for: their watermark moves though nothing came.
    pub known: Vec<ResourceType>,
    /// The server's `transactionTime`, microseconds since the epoch; `None` for a folder.
    pub transaction_time: Option<i64>,
    /// True if it was a full export: no `since`.
    pub full: bool,
    /// Types that an earlier run merged out of this very export: they are left alone.
    pub merged: Vec<ResourceType>,
}

/// A file was read to its end.
#[derive(Debug, Clone)]
pub struct FileFinished {
    /// [`ExportFile::index`].
    pub file: u32,
    /// Lines that it has, blank ones included.
    pub lines: u64,
}

/// Counts of the lines of one chunk: lines = rows + bad + blank + headers.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ParsedChunk {
    /// [`ExportFile::index`].
    pub file: u32,
    /// All lines.
    pub lines: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Resources, by type.
    pub rows: Vec<(ResourceType, u64)>,
    /// Lines that could not be read, by the type that they are held against.
    pub bad: Vec<(Option<ResourceType>, u64)>,
    /// Lines, bad or not, that are no resources of the file's type, nor broken ones: a page, an array, an outcome, a
    /// Bundle.
    #[serde(default)]
    pub foreign: u64,
    /// Blank lines.
    pub blank: u64,
    /// Lines that are no rows of a table: headers, deletion bundles, excluded types.
    pub headers: u64,
    /// Of those, lines of types that the layout excludes.
    pub excluded: Vec<(ResourceType, u64)>,
    /// Of the headers, lines that are no resources, which no manifest counts: `Parameters` headers and the server's
    /// messages.
    #[serde(default)]
    pub asides: u64,
    /// Deletions by type: soft-deleted resources, which are headers, and DELETE entries of a deletion file.
    #[serde(default)]
    pub deleted: Vec<(ResourceType, u64)>,
    /// Of the bad lines, resources of types that FHIR R4 does not have.
    #[serde(default)]
    pub unknown: u64,
    /// Issues of severity fatal or error, and error objects.
    pub errors: u64,
    /// Of those, the ones that are not ignored, by the type that each concerns; `None` for all types of the export.
    #[serde(default)]
    pub server_errors: Vec<(Option<ResourceType>, u64)>,
    /// Number of the last line that is not blank.
    #[serde(default)]
    pub last: u64,
    /// Number of the last line that no server writes before its last: text that is no resource, or a part of one. 0 for
    /// none.
    #[serde(default)]
    pub last_foreign: u64,
    /// Lines out of quarantine that could be read, and the type of each.
    #[serde(skip)]
    pub replayed: Vec<(LineId, ResourceType)>,
}

/// News of stages for merge, so that it knows when a type is complete.
#[derive(Debug)]
pub enum ControlEvent {
    /// Files to expect.
    Page(ManifestPage),
    /// No more pages of this export.
    ExportEnd(ExportEnd),
    /// A file was read to its end.
    FileFinished(FileFinished),
    /// An earlier run read the file to its end and staged all of its rows; what its lines were.
    FileResumed(Box<ParsedChunk>),
    /// A file could not be read; its types fail. With the status of the server's answer, where it refused it.
    FileFailed(u32, String, Option<u16>),
    /// A kick-off was refused and taken apart: in the place of this export there are others.
    ExportBisected {
        /// Which export.
        export: usize,
        /// Number of others.
        parts: usize,
    },
    /// An export failed: its types fail.
    ExportFailed {
        /// Which export.
        export: usize,
        /// The types that it was asked for.
        requested: Vec<ResourceType>,
        /// Why.
        why: String,
    },
    /// A type cannot be written.
    TypeFailed(ResourceType, String),
    /// A chunk was parsed.
    Parsed(Box<ParsedChunk>),
}

/// Merge's request that encode hands over what it still gathers of a type, once it has seen so many of the
/// type's rows. State, not a channel: the request runs against the data's way, and a channel would close a
/// circle of bounded edges.
#[derive(Debug, Clone)]
pub struct FlushRequests {
    rows: Arc<Mutex<HashMap<ResourceType, u64>>>,
    changed: watch::Sender<u64>,
}

impl Default for FlushRequests {
    fn default() -> Self {
        Self { rows: Arc::default(), changed: watch::Sender::new(0) }
    }
}

impl FlushRequests {
    /// Asks for the first `rows` rows of the run's `resource_type`.
    pub fn request(&self, resource_type: &ResourceType, rows: u64) {
        let mut wanted = self.rows.lock();
        if wanted.insert(resource_type.clone(), rows) != Some(rows) {
            drop(wanted);
            self.changed.send_modify(|version| *version += 1);
        }
    }
    /// The requests so far.
    pub fn wanted(&self) -> HashMap<ResourceType, u64> {
        self.rows.lock().clone()
    }
    /// Takes a request back: what is gathered from now on can wait again.
    pub fn withdraw(&self, resource_type: &ResourceType) {
        self.rows.lock().remove(resource_type);
    }
    /// Sees every later request.
    pub fn watch(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }
}

/// A line that could not be read. Holds patient data: only the quarantine may see it.
#[derive(Debug)]
pub struct BadLine<'a> {
    /// Its file.
    pub file: &'a ExportFile,
    /// Its number, from 1.
    pub line: u64,
    /// Bytes before it in the (uncompressed) file.
    pub offset: u64,
    /// The problem; says nothing of its content.
    pub reason: String,
    /// Its bytes, without the line's end.
    pub bytes: &'a [u8],
    /// Its full length, where it was too long to be kept whole.
    pub full_length: u64,
}

/// A hash of a quarantined line's bytes: the same line is kept once, however often it comes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LineId(pub u128);

impl LineId {
    /// The id of a line without its end.
    pub fn of(line: &[u8]) -> Self {
        Self(twox_hash::XxHash3_128::oneshot(line))
    }
}

impl std::fmt::Display for LineId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

/// A line that an earlier run quarantined, to be retried.
#[derive(Debug)]
pub struct ReplayedLine {
    /// The type that its file declared.
    pub declared: Option<ResourceType>,
    /// Its bytes, without the line's end.
    pub bytes: Vec<u8>,
}

/// Lines to be retried, one after the other.
pub type ReplayedLines = Box<dyn Iterator<Item = crate::error::Result<ReplayedLine>> + Send>;

/// Destination of bad lines.
pub trait BadLines: Send + Sync {
    /// Keeps a line.
    fn quarantine(&self, bad: &BadLine<'_>) -> crate::error::Result<()>;
    /// Keeps what the server says of its own export: it may name patients, so it is never logged.
    fn message(&self, file: &ExportFile, line: u64, bytes: &[u8]) -> crate::error::Result<()>;
    /// Hears which ids the server says are gone: what lines in quarantine say of them is over.
    fn deleted(&self, ids: &[Deletion]) -> crate::error::Result<()>;
    /// Makes what was kept durable: before the ledger hear of it, so before its type can commit.
    fn sync(&self) -> crate::error::Result<()>;
}

/// Shared by the parse workers.
pub type BadLineSink = Arc<dyn BadLines>;
