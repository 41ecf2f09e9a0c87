//! The pipeline file as it is written: these structs are the YAML, its reference and its JSON Schema.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::schedule::{HealthSection, Schedule};
use super::source::SourceSection;
use crate::stages::Stages;
use crate::values::{ByteSize, Span, Text, Types};
use foundation::Limit;

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
    /// Source of resources.
    pub source: SourceSection,
    /// Settings of each stage.
    #[serde(default)]
    pub stages: Stages,
    /// Memory budget: edges between stages, open batches, keys and matching.
    #[serde(default = "defaults::memory")]
    pub memory: ByteSize,
    /// Folder (or URL) of the tables: `<tables>/<Type>.parquet`. A relative path is taken from the folder in which
    /// fhirlake is started, not from that of this file.
    pub tables: Text,
    /// Folder (or URL) of the pipeline's state. Default: `.fhirlake/<name>` in the tables' folder.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state: Option<Text>,
    /// Time for which the lease of a state in an object store outlives a process that is gone. One that lives renews it
    /// five times as often. A folder's lock goes with its process.
    #[serde(default = "defaults::lock_expiry")]
    pub lock_expiry: Span,
    /// Compacts the tables' files after some runs.
    #[serde(default)]
    pub optimize: OptimizeSection,
    /// Removes old files after some runs.
    #[serde(default)]
    pub vacuum: VacuumSection,
    /// Times at which `fhirlake serve` runs it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub schedule: Vec<Schedule>,
    /// Bounds of health checks.
    #[serde(default)]
    pub health: HealthSection,
    /// Receivers of traces, metrics and logs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub telemetry: Option<TelemetrySection>,
}

/// Compacts small files and purges deleted rows.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct OptimizeSection {
    /// After so many successful runs; 0 for never.
    pub after: u64,
    /// Resource types; empty for all that have a table.
    pub types: Types,
    /// Sorts rows by id, so that a later run reads less of a table that it changes little of. Rewrites the
    /// whole table.
    pub cluster: bool,
    /// Rows of a file, or the share of them, that are deleted by a deletion vector, from which it is rewritten.
    pub min_deleted: Limit,
}

/// Removes files that no version of a table names any more.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct VacuumSection {
    /// After so many successful runs; 0 for never.
    pub after: u64,
    /// Age of files that older versions name. Default: the table's own setting, a week where it has none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub retention: Option<Span>,
}

impl Default for OptimizeSection {
    fn default() -> Self {
        // Five in a hundred is Spark's own.
        Self { after: 0, types: Types::All, cluster: false, min_deleted: Limit::Percent(5.0) }
    }
}

/// Receivers of traces, metrics and logs. The standard `OTEL_*` variables do the same, and win.
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

/// The JSON Schema of the pipeline file, for editors and for our own checks.
pub fn pipeline_json_schema() -> serde_json::Value {
    let schema =
        schemars::generate::SchemaSettings::draft2020_12().into_generator().into_root_schema_for::<PipelineFile>();
    schema.to_value()
}
