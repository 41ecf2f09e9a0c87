//! `stages.merge` of the pipeline file.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::stages::{EdgeBytes, EdgeSpec, Section, Share, StageSpec};
use crate::telemetry;
use crate::values::{ByteSize, Findings, Span, section};
use delta_upsert::NotMatchedBySource;
use foundation::Limit;

section! {
    /// Pages to commits.
    pub struct MergeSection {
        /// Tables that are matched and committed at the same time.
        #[schemars(range(min = 1, max = 64))]
        pub tables_at_once: usize = 2,
        /// Treatment of rows that the export does not contain.
        pub mode: Mode = Mode::Merge,
        /// Rows of a table that `reconcile` and `overwrite` may delete: a number, or a share such as `10%`. More fail
        /// the type.
        pub max_deleted: Limit = Limit::Percent(10.0),
        /// Size at which a Parquet file is closed.
        pub target_file: ByteSize = ByteSize(128 << 20),
        /// Longest time between checkpoints, from which the next run resumes. Each checkpoint closes a file of each
        /// type.
        pub checkpoint: Span = Span(std::time::Duration::from_secs(300)),
        /// Bytes of Parquet after which a checkpoint is persisted, if that is sooner.
        pub checkpoint_size: ByteSize = ByteSize(1 << 30),
        /// Deletion vectors in tables that are created.
        pub deletion_vectors: bool = true,
        /// Turns deletion vectors on in tables that exist and have them off. Raises their protocol: older readers
        /// cannot read them any more.
        pub upgrade_deletion_vectors: bool = false,
        /// Treatment of columns that an existing table lacks.
        pub schema_evolution: SchemaEvolution = SchemaEvolution::None,
    }
}

/// Treatment of columns that an existing table lacks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum SchemaEvolution {
    /// They are not written; what resources say in them is counted and reported.
    #[default]
    None,
    /// They are added to the table.
    AddColumns,
}

/// Treatment of rows that the export does not contain.
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

impl MergeSection {
    /// Returns what happens to rows that a full export does not name.
    pub fn not_matched(&self) -> NotMatchedBySource {
        match self.mode {
            Mode::Merge => NotMatchedBySource::Keep,
            Mode::Reconcile => NotMatchedBySource::Delete(self.max_deleted),
            Mode::Overwrite => NotMatchedBySource::Overwrite(self.max_deleted),
        }
    }

    /// Returns true if tables that exist get the columns that they lack.
    pub fn adds_columns(&self) -> bool {
        self.schema_evolution == SchemaEvolution::AddColumns
    }
}

/// Keys of staged rows; beyond it they are spilled.
pub const KEYS: Share = Share { name: "keys", percent: 9 };
/// Matching, of all tables at once together; beyond it, by partitions of the key space.
pub const MATCHING: Share = Share { name: "matching", percent: 10 };

/// Declaration of the merge stage.
pub const MERGE: &StageSpec = &StageSpec {
    name: "merge",
    summary: &["staged Parquet,", "key match, one", "commit a table"],
    input: Some(EdgeSpec { carries: "batches", items: 1024, bytes: EdgeBytes::Percent(9) }),
    shares: &[KEYS, MATCHING],
    rate: Some((telemetry::COMMITTED, "rows")),
};

impl Section for MergeSection {
    fn check(&self, _memory: u64, found: &mut Findings) {
        let too_many = matches!(self.max_deleted, Limit::Percent(percent) if percent > 100.0);
        found.add_if(too_many, "max_deleted", "more than 100%", None);
        found.add_if(self.target_file.0 < 1 << 20, "target_file", "less than 1MiB", None);
    }
}
