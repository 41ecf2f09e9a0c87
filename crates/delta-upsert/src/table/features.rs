//! Which tables our commits may change: what a table's protocol, settings and columns ask of a writer.

use deltalake::kernel::{Metadata, Protocol, StructField};
use serde_json::{Value, json};

use crate::table::{Table, storage};
use foundation::error::{Context, Error, ErrorKind, Result};

/// Features that ask nothing of our commits, or nothing as long as no setting or column uses them: those are looked at
/// by themselves ([`unsupported_setting`], [`unsupported_column`]).
const KNOWN: [&str; 29] = [
    "allowColumnDefaults",
    "appendOnly",
    "changeDataFeed",
    "checkConstraints",
    "checkpointProtection",
    "collations",
    "collations-preview",
    "columnMapping",
    "coordinatedCommits-preview",
    "deletionVectors",
    "domainMetadata",
    "generatedColumns",
    "icebergCompatV1",
    "icebergCompatV2",
    "icebergCompatV3",
    "identityColumns",
    "inCommitTimestamp",
    "inCommitTimestamp-preview",
    "invariants",
    "materializePartitionColumns",
    "timestampNtz",
    "typeWidening",
    "typeWidening-preview",
    "v2Checkpoint",
    "vacuumProtocolCheck",
    "variantShredding",
    "variantShredding-preview",
    "variantType",
    "variantType-preview",
];

/// Features that ask something of every commit of a table that lists them, used or not (Delta protocol, "Row Tracking":
/// every add action gets a base row id), unless this setting takes that back.
const SUSPENDED: [(&str, &str); 2] =
    [("rowTracking", "delta.rowTrackingSuspended"), ("rowTracking-preview", "delta.rowTrackingSuspended")];

/// Features that a writer version without a list of features stands for (Delta protocol, "Supported Features").
const BY_VERSION: [(i32, &str); 7] = [
    (2, "appendOnly"),
    (2, "invariants"),
    (3, "checkConstraints"),
    (4, "changeDataFeed"),
    (4, "generatedColumns"),
    (5, "columnMapping"),
    (6, "identityColumns"),
];

impl Table {
    /// Refuses, before any work, a table with a feature that our commits would break, and names it.
    pub fn check_writable(&self) -> Result<()> {
        let Some(delta) = &self.delta else { return Ok(()) };
        let snapshot = delta.snapshot().map_err(|error| storage(error, "no snapshot"))?;
        let what = match unsupported(snapshot.protocol(), snapshot.metadata()) {
            Some(what) => Some(what),
            None => snapshot.schema().fields().find_map(|field| unsupported_column(field, "")),
        };
        let Some(what) = what else { return Ok(()) };
        Err(Error::new(ErrorKind::Table, format!("the table has {what}, which fhirlake does not write"))
            .at(self.resource_type.to_string()))
    }

    /// Returns true if the table has deletion vectors on.
    pub fn has_deletion_vectors(&self) -> bool {
        let on = |delta: &deltalake::DeltaTable| {
            let snapshot = delta.snapshot().ok()?;
            let setting = snapshot.metadata().configuration().get("delta.enableDeletionVectors")?;
            Some(
                setting.eq_ignore_ascii_case("true")
                    && features(snapshot.protocol()).iter().any(|feature| feature == "deletionVectors"),
            )
        };
        self.delta.as_ref().and_then(on).unwrap_or(false)
    }

    /// The protocol and metadata that turn deletion vectors on.
    pub(crate) fn with_deletion_vectors(&self) -> Result<Option<(Protocol, Metadata)>> {
        let Some(delta) = self.delta.as_ref().filter(|_| !self.has_deletion_vectors()) else { return Ok(None) };
        let snapshot = delta.snapshot().map_err(|error| storage(error, "no snapshot"))?;
        let protocol = snapshot.protocol();
        let failed = "deletion vectors cannot be turned on";
        // What an older version stood for must be listed from now on.
        let mut writer = features(protocol);
        writer.push("deletionVectors".into());
        let mut reader: Vec<String> =
            protocol.reader_features().into_iter().flatten().map(ToString::to_string).collect();
        if protocol.min_reader_version() == 2 {
            reader.push("columnMapping".into());
        }
        reader.push("deletionVectors".into());
        for list in [&mut writer, &mut reader] {
            list.sort_unstable();
            list.dedup();
        }
        let upgraded =
            json!({ "minReaderVersion": 3, "minWriterVersion": 7, "readerFeatures": reader, "writerFeatures": writer });
        let protocol = serde_json::from_value(upgraded).context(ErrorKind::Internal, failed)?;
        let mut metadata = serde_json::to_value(snapshot.metadata()).context(ErrorKind::Internal, failed)?;
        metadata["configuration"]["delta.enableDeletionVectors"] = Value::from("true");
        Ok(Some((protocol, serde_json::from_value(metadata).context(ErrorKind::Internal, failed)?)))
    }
}

/// Writer features, those included that a version without a list stands for.
fn features(protocol: &Protocol) -> Vec<String> {
    match protocol.writer_features() {
        Some(features) => features.iter().map(ToString::to_string).collect(),
        None => {
            let version = protocol.min_writer_version();
            BY_VERSION.iter().filter(|(since, _)| *since <= version).map(|(_, feature)| (*feature).to_owned()).collect()
        }
    }
}

fn unsupported(protocol: &Protocol, metadata: &Metadata) -> Option<String> {
    let settings = metadata.configuration();
    let is_on = |key: &str| settings.get(key).is_some_and(|value| value.eq_ignore_ascii_case("true"));
    let is_known = |feature: &String| {
        let suspended = SUSPENDED.iter().find(|(name, _)| name == feature);
        KNOWN.contains(&feature.as_str()) || suspended.is_some_and(|(_, setting)| is_on(setting))
    };
    if let Some(feature) = features(protocol).into_iter().find(|feature| !is_known(feature)) {
        return Some(format!("the feature {feature}"));
    }
    if protocol.writer_features().is_none() && protocol.min_writer_version() > 6 {
        return Some(format!("writer version {}", protocol.min_writer_version()));
    }
    if !metadata.partition_columns().is_empty() {
        return Some("partition columns".into());
    }
    let mut used: Vec<_> = settings.iter().filter(|(key, value)| unsupported_setting(key, value)).collect();
    used.sort();
    used.first().map(|(key, value)| format!("the setting {key}={value}"))
}

/// Returns true if a setting turns on what asks something of a commit that we do not do.
fn unsupported_setting(key: &str, value: &str) -> bool {
    match key {
        "delta.appendOnly"
        | "delta.enableChangeDataFeed"
        | "delta.enableRowTracking"
        | "delta.enableInCommitTimestamps"
        | "delta.enableIcebergCompatV1"
        | "delta.enableIcebergCompatV2"
        | "delta.enableIcebergCompatV3" => value.eq_ignore_ascii_case("true"),
        "delta.columnMapping.mode" => !value.eq_ignore_ascii_case("none"),
        // Commits before this version keep their checkpoints; 0 asks for nothing.
        "delta.requireCheckpointProtectionBeforeVersion" => value.trim() != "0",
        key => key.starts_with("delta.constraints.") || key.starts_with("delta.coordinatedCommits."),
    }
}

/// Returns the feature of a column, or of one within it, that fhirlake does not write.
fn unsupported_column(field: &StructField, within: &str) -> Option<String> {
    use deltalake::kernel::DataType;
    fn inner(data_type: &DataType, path: &str) -> Option<String> {
        match data_type {
            DataType::Struct(fields) => fields.fields().find_map(|field| unsupported_column(field, path)),
            DataType::Array(items) => inner(items.element_type(), path),
            DataType::Map(entries) => inner(entries.key_type(), path).or_else(|| inner(entries.value_type(), path)),
            DataType::Variant(_) => Some(format!("the column {path} of type variant")),
            DataType::Primitive(_) => None,
        }
    }
    let path = if within.is_empty() { field.name().clone() } else { format!("{within}.{}", field.name()) };
    let asks = |key: &str| {
        // What lists a type change has files of a narrower type; a default is for columns that a writer leaves out.
        let asks = [
            "delta.generationExpression",
            "delta.invariants",
            "delta.identity.",
            "delta.columnMapping.",
            "delta.typeChanges",
            "CURRENT_DEFAULT",
            "__COLLATIONS",
        ];
        asks.iter().any(|prefix| key.starts_with(prefix))
    };
    let mut keys: Vec<&String> = field.metadata().keys().filter(|key| asks(key)).collect();
    keys.sort();
    if let Some(key) = keys.first() {
        return Some(format!("the column {path} with {key}"));
    }
    if !field.is_nullable() && path != "id" {
        return Some(format!("the column {path} that must not be null"));
    }
    inner(field.data_type(), &path)
}
