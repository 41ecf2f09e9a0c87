//! The pipeline file as it is written: these structs are the YAML, its reference and its JSON Schema.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::schedule::{HealthSection, Schedule};
use super::source::SourceSection;
use super::values::{ByteSize, Span, Text, resource_types_schema};
use crate::messages::Limit;

/// A pipeline: one FHIR server (or folder of NDJSON), one folder of Delta tables.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PipelineFile {
    /// Version of this format: 1.
    #[schemars(range(min = 1, max = 1))]
    pub version: u32,
    /// The pipeline's name: part of the tables' watermarks, so keep it.
    #[schemars(length(min = 1))]
    pub name: String,
    /// Where resources come from.
    pub source: SourceSection,
    /// How each stage works.
    #[serde(default)]
    pub stages: Stages,
    /// Memory for what is under way: edges between stages and open batches.
    #[serde(default = "defaults::memory")]
    pub memory: ByteSize,
    /// Folder (or URL) of the tables: `<tables>/<Type>.parquet`.
    pub tables: Text,
    /// Folder (or URL) of the pipeline's state. Default: `.fhirlake/<name>` in the tables' folder.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state: Option<Text>,
    /// How long the lock of a state in an object store outlives a process that is gone. One that lives renews it five times
    /// as often. A folder's lock goes with its process.
    #[serde(default = "defaults::lock_expiry")]
    pub lock_expiry: Span,
    /// Tidies the tables' files after some runs.
    #[serde(default)]
    pub optimize: OptimizeSection,
    /// Removes old files after some runs.
    #[serde(default)]
    pub vacuum: VacuumSection,
    /// When `fhirlake serve` runs it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub schedule: Vec<Schedule>,
    /// When it is thought ill.
    #[serde(default)]
    pub health: HealthSection,
    /// Where traces, metrics and logs go.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub telemetry: Option<TelemetrySection>,
}

/// How each stage works.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Stages {
    /// Files to bytes.
    pub download: DownloadSection,
    /// Bytes to resources.
    pub parse: ParseSection,
    /// What resources link to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub attachments: Option<AttachmentsSection>,
    /// Resources to columns and pages.
    pub encode: EncodeSection,
    /// Pages to commits.
    pub merge: MergeSection,
}

/// Files to bytes.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct DownloadSection {
    /// Files at the same time.
    #[schemars(range(min = 1, max = 256))]
    pub concurrency: usize,
    /// Size of a chunk of lines.
    pub chunk: ByteSize,
    /// How often a file that breaks off is read from its start.
    #[schemars(range(min = 1))]
    pub tries: usize,
    /// Most that a file may have, unpacked: a server whose file never ends is cut off there, and its type fails.
    pub max_file: ByteSize,
    /// What it leads to when a file has fewer resources than the manifest's `count`: many servers count wrong.
    pub on_short_file: ShortFile,
}

/// What a file leads to that has fewer resources than the manifest promises.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ShortFile {
    /// It is reported.
    #[default]
    Report,
    /// Its type fails.
    Fail,
}

/// Bytes to resources.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ParseSection {
    /// Threads; 0 for as many as there are cores.
    #[schemars(range(max = 256))]
    pub workers: usize,
    /// What a line that cannot be read leads to.
    pub on_bad_line: Bad,
    /// How many bad lines a type may have before it fails: a number, or a share such as `1%`; `100%` allows any number. Without
    /// it a type fails that has more than 100 and more than 1 % of its lines.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_bad_lines: Option<MaxBad>,
    /// Longest line; a longer one is a bad line. Without it: 64MiB, or an eighth of `memory` where that is less.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_line: Option<ByteSize>,
}

/// What a line that cannot be read leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Bad {
    /// It is kept in quarantine and the run goes on.
    #[default]
    Quarantine,
    /// It is kept in quarantine and its type fails.
    Fail,
}

/// A number of lines or rows, or a share of them.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum MaxBad {
    /// So many.
    Lines(u64),
    /// A share, such as `0.5%`.
    Share(Percent),
}

impl MaxBad {
    /// The limit that it stands for.
    pub fn limit(self) -> Limit {
        match self {
            MaxBad::Lines(number) => Limit::Number(number),
            MaxBad::Share(Percent(percent)) => Limit::Share(percent / 100.0),
        }
    }
}

/// A share, from 0 to 100: `0.5%`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Percent(pub f64);

impl TryFrom<String> for Percent {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        let number = text.strip_suffix('%').and_then(|number| number.parse::<f64>().ok());
        let number = number.filter(|number| number.is_finite() && *number >= 0.0);
        number.map(Self).ok_or_else(|| "not a share; write it as 1% or 0.5%".to_owned())
    }
}

impl From<Percent> for String {
    fn from(percent: Percent) -> Self {
        format!("{}%", percent.0)
    }
}

impl JsonSchema for Percent {
    fn inline_schema() -> bool {
        true
    }
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Percent".into()
    }
    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({ "type": "string", "pattern": r"^\d+(\.\d+)?%$" })
    }
}

/// Attachments that resources link to: fetched, and kept as files in `attachments` beside the tables, or in the resource.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct AttachmentsSection {
    /// Attachments of at most so many bytes become the `data` of their resource; larger ones, and all with 0, become files, and
    /// `url` their path from the tables' folder on.
    pub inline_up_to: ByteSize,
    /// Larger ones stay links.
    pub max_size: ByteSize,
    /// Resource types whose attachments are fetched; empty for all.
    pub types: Vec<String>,
    /// Content types that are fetched, `application/pdf` or `image/*`; empty for all.
    pub content_types: Vec<String>,
    /// Hosts beside the server's and the export files' that attachments are fetched from; `[any]` for all there are.
    pub origins: Vec<String>,
    /// Attachments at the same time.
    #[schemars(range(min = 1, max = 256))]
    pub concurrency: usize,
}

/// Resources to columns and pages.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct EncodeSection {
    /// Threads; 0 for as many as there are cores.
    #[schemars(range(max = 256))]
    pub workers: usize,
    /// Columns `_fid` and `_extension` in tables that are created.
    pub extensions: bool,
    /// How deep a type may nest in itself.
    #[schemars(range(max = 10))]
    pub max_nesting_level: usize,
    /// Types that an open `value[x]` may have.
    pub open_types: Vec<String>,
    /// A column `_source` with each resource exactly as it came.
    pub source_json: bool,
    /// NDJSON that makes a row group.
    pub row_group: ByteSize,
    /// Which columns Parquet files have, of those that none of their rows fills.
    pub columns: FileColumns,
}

/// Which columns Parquet files have, of those that none of their rows fills. Readers give null for what a file lacks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum FileColumns {
    /// A top-level column is there with all that is within it, or not at all: right with every reader.
    #[default]
    Whole,
    /// Only what a row fills, at every depth: smaller and faster. Spark before 4.1 reads such files wrong (SPARK-53535).
    Filled,
    /// Every column of the table.
    All,
}

/// Pages to commits.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct MergeSection {
    /// Tables that are matched and committed at the same time.
    #[schemars(range(min = 1, max = 64))]
    pub tables_at_once: usize,
    /// What becomes of rows that the export does not name.
    pub mode: Mode,
    /// How many rows of a table `reconcile` and `overwrite` may delete: a number, or a share such as `10%`. More fail the type.
    pub max_deleted: MaxBad,
    /// Size at which a Parquet file is closed.
    pub target_file: ByteSize,
    /// How often at least what is staged is closed and written down: a run that is killed is gone on with from there. Each
    /// time closes a file of each type.
    pub checkpoint: Span,
    /// Bytes of Parquet after which it is, if that is sooner.
    pub checkpoint_size: ByteSize,
    /// Deletion vectors in tables that are created.
    pub deletion_vectors: bool,
    /// Turns deletion vectors on in tables that exist and have them off. Raises their protocol: older readers cannot read
    /// them any more.
    pub upgrade_deletion_vectors: bool,
    /// What becomes of columns that an existing table lacks.
    pub schema_evolution: SchemaEvolution,
}

/// What becomes of columns that an existing table lacks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum SchemaEvolution {
    /// They are not written; what resources say in them is counted and reported.
    #[default]
    None,
    /// They are added to the table.
    AddColumns,
}

/// Tidies a table's files: small ones together, marked rows away.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct OptimizeSection {
    /// After so many successful runs; 0 for never.
    pub after: u64,
    /// Resource types; empty for all that have a table.
    #[schemars(schema_with = "resource_types_schema")]
    pub types: Vec<String>,
    /// Rows in the order of their ids, so that a later run reads less of a table that it changes little of. Writes the
    /// whole table anew.
    pub cluster: bool,
    /// Rows of a file, or the share of them, that are marked as gone from which it is written anew.
    pub min_deleted: MaxBad,
}

/// Removes files that no version of a table names any more.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct VacuumSection {
    /// After so many successful runs; 0 for never.
    pub after: u64,
    /// How long files stay that older versions name. Default: the table's own setting, a week where it has none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub retention: Option<Span>,
}

impl Default for OptimizeSection {
    fn default() -> Self {
        // Five in a hundred is Spark's own.
        Self { after: 0, types: Vec::new(), cluster: false, min_deleted: MaxBad::Share(Percent(5.0)) }
    }
}

/// What becomes of rows that the export does not name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// They stay.
    #[default]
    Merge,
    /// They are deleted; only after a full export.
    Reconcile,
    /// They are deleted, and all others replaced by the export's copies, newer or not; only after a full export.
    Overwrite,
}

/// Where traces, metrics and logs go. The standard `OTEL_*` variables do the same, and win.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TelemetrySection {
    /// An OTLP receiver: `http://collector:4317` is spoken to by gRPC, any other port by HTTP with Protobuf;
    /// `OTEL_EXPORTER_OTLP_PROTOCOL` says otherwise.
    pub otlp: Text,
}

mod defaults {
    use super::{ByteSize, Span};

    pub(crate) fn memory() -> ByteSize {
        ByteSize(512 << 20)
    }

    pub(crate) fn lock_expiry() -> Span {
        Span(std::time::Duration::from_secs(60))
    }
}

impl Default for DownloadSection {
    fn default() -> Self {
        // Ten is the recipe's. A chunk of 1 MiB keeps a worker busy for milliseconds, so that edges of a few
        // dozen chunks even out; much smaller ones would pay more for the edge than for the parsing.
        Self {
            concurrency: 10,
            chunk: ByteSize(1 << 20),
            tries: 5,
            max_file: ByteSize(100 << 30),
            on_short_file: ShortFile::Report,
        }
    }
}

impl Default for ParseSection {
    fn default() -> Self {
        Self { workers: 0, on_bad_line: Bad::Quarantine, max_bad_lines: None, max_line: None }
    }
}

impl Default for EncodeSection {
    fn default() -> Self {
        let layout = fhir_arrow::LayoutOptions::default();
        Self {
            workers: 0,
            extensions: layout.extensions,
            max_nesting_level: layout.max_nesting_level,
            open_types: layout.open_types,
            source_json: layout.source_json,
            row_group: ByteSize(16 << 20),
            columns: FileColumns::Whole,
        }
    }
}

impl Default for AttachmentsSection {
    fn default() -> Self {
        Self {
            inline_up_to: ByteSize(0),
            max_size: ByteSize(1 << 30),
            types: Vec::new(),
            content_types: Vec::new(),
            origins: Vec::new(),
            concurrency: 10,
        }
    }
}

impl Default for MergeSection {
    fn default() -> Self {
        Self {
            tables_at_once: 2,
            mode: Mode::Merge,
            max_deleted: MaxBad::Share(Percent(10.0)),
            target_file: ByteSize(128 << 20),
            checkpoint: Span(std::time::Duration::from_secs(300)),
            checkpoint_size: ByteSize(1 << 30),
            deletion_vectors: true,
            upgrade_deletion_vectors: false,
            schema_evolution: SchemaEvolution::None,
        }
    }
}

/// The JSON Schema of the pipeline file, for editors and for our own checks.
pub fn pipeline_json_schema() -> serde_json::Value {
    let schema = schemars::generate::SchemaSettings::draft2020_12().into_generator().into_root_schema_for::<PipelineFile>();
    schema.to_value()
}
