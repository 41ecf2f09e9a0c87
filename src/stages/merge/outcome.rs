//! Merge's report at the end of a run.

use std::collections::BTreeMap;

use crate::jobs::OfServer;
use crate::messages::{LineId, ResourceType};

/// Why a type is not whole whose run was stopped.
pub const STOPPED: &str = "stopped before all of it came";

/// Outcome of a type.
#[derive(Debug, Clone, Default, serde::Serialize, serde::Deserialize, schemars::JsonSchema)]
#[serde(default)]
pub struct TypeOutcome {
    /// Files that held it.
    pub files: u64,
    /// Resources that came.
    pub resources: u64,
    /// Bytes of NDJSON that they came from.
    pub bytes: u64,
    /// Resources that the table did not have.
    pub inserted: u64,
    /// Resources that replaced an older copy.
    pub updated: u64,
    /// Resources that were deleted.
    pub deleted: u64,
    /// Resources that the table has as new or newer.
    pub skipped: u64,
    /// Of those, resources that were not encoded, since the table's row is of the same line or the same version.
    #[serde(skip_serializing_if = "is_zero")]
    pub unchanged: u64,
    /// Place where unchanged lines were looked up: `memory`; `disk`, where the share of `memory` did not suffice; or
    /// `too slow`, a disk that cost more than encoding. Absent where none were.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub line_index: Option<String>,
    /// Of the skipped, resources of a folder without the `meta.lastUpdated` (or any order) that the table's row has:
    /// nothing says that they are newer.
    #[serde(skip_serializing_if = "is_zero")]
    pub undated: u64,
    /// Bad lines.
    pub quarantined: u64,
    /// The table's version after the run.
    pub version: Option<u64>,
    /// True if the run committed to it.
    pub committed: bool,
    /// Bytes that the commit added.
    pub bytes_written: u64,
    /// Seconds that matching and committing took.
    pub merge_seconds: f64,
    /// Seconds from the run's start to the end of the type's commit.
    pub seconds: f64,
    /// True if an export of the run was asked for it: others only strayed into its files.
    #[serde(skip)]
    pub answered_for: bool,
    /// Why it failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// Why its watermark was not advanced, though what came of it was merged.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub watermark_hold: Option<String>,
    /// Resources that came more than once, by the file of each copy that lost; empty where they are few.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub copies: BTreeMap<String, u64>,
    /// Unmapped values, by path.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    #[serde(rename = "not_held")]
    pub unmapped: BTreeMap<String, u64>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks for it")]
fn is_zero(number: &u64) -> bool {
    *number == 0
}

impl TypeOutcome {
    /// This and what a later run did, as one.
    pub fn merge(self, after: Self) -> Self {
        let mut unmapped = self.unmapped;
        after.unmapped.into_iter().for_each(|(path, count)| *unmapped.entry(path).or_default() += count);
        Self {
            files: self.files + after.files,
            resources: self.resources + after.resources,
            bytes: self.bytes + after.bytes,
            inserted: self.inserted + after.inserted,
            updated: self.updated + after.updated,
            deleted: self.deleted + after.deleted,
            skipped: self.skipped + after.skipped,
            unchanged: self.unchanged + after.unchanged,
            line_index: after.line_index.or(self.line_index),
            undated: self.undated + after.undated,
            quarantined: self.quarantined + after.quarantined,
            version: after.version.or(self.version),
            committed: self.committed || after.committed,
            answered_for: self.answered_for || after.answered_for,
            bytes_written: self.bytes_written + after.bytes_written,
            merge_seconds: self.merge_seconds + after.merge_seconds,
            seconds: self.seconds + after.seconds,
            error: after.error,
            watermark_hold: after.watermark_hold,
            copies: self.copies.into_iter().chain(after.copies).collect(),
            unmapped,
        }
    }
}

/// Merge's report at the end.
#[derive(Debug, Default)]
pub struct MergeReport {
    /// By type.
    pub types: BTreeMap<String, TypeOutcome>,
    /// Number of exports of the run.
    pub exports: usize,
    /// Manifest counts that differ from what came: file, promised, came.
    pub count_findings: Vec<(String, u64, u64)>,
    /// True if every export said its last.
    pub whole: bool,
    /// Bad lines that belong to no table.
    pub other_bad: u64,
    /// Files that could not be read to their end.
    pub files_failed: u64,
    /// True if the server says of each of those that it is gone for good.
    pub files_gone: bool,
    /// Lines out of quarantine that are in a table now, or that it has newer.
    pub replayed: Vec<LineId>,
    /// Types whose watermark is held back by the server's own word on its export.
    pub held: Vec<ResourceType>,
    /// `transactionTime` of the exports that ended, microseconds since the epoch; the oldest.
    pub transaction_time: Option<i64>,
}

impl MergeReport {
    /// Returns what the server did not give.
    pub(crate) fn of_server(&self) -> OfServer {
        match (self.files_failed > 0, self.files_gone) {
            (false, _) => OfServer::Nothing,
            (true, false) => OfServer::FilesFailed,
            (true, true) => OfServer::FilesGone,
        }
    }
}
