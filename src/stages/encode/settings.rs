//! `stages.encode` of the pipeline file.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Encode, Shared};
use crate::error::Result;
use crate::messages::{MergeInput, Rows};
use crate::stages::{EdgeBytes, EdgeSpec, Memory, RunContext, Section, Share, Stage, StageSpec, Stages};
use crate::telemetry;
use crate::values::workers;
use crate::values::{ByteSize, Findings, section};
use fhir_arrow::{ColumnPruning, LayoutOptions, Model};
use flow::{Receiver, Sender};

section! {
    /// Resources to columns and pages.
    pub struct EncodeSection {
        /// Threads; 0 for as many as there are cores.
        #[schemars(range(max = 256))]
        pub workers: usize = 0,
        /// Columns `_fid` and `_extension` in tables that are created.
        pub extensions: bool = LayoutOptions::default().extensions,
        /// Depth to which a type may nest in itself.
        #[schemars(range(max = 10))]
        pub max_nesting_level: usize = LayoutOptions::default().max_nesting_level,
        /// Types that an open `value[x]` may have.
        pub open_types: Vec<String> = LayoutOptions::default().open_types,
        /// A column `_source` with each resource exactly as it came.
        pub source_json: bool = LayoutOptions::default().source_json,
        /// NDJSON that makes a row group.
        pub row_group: ByteSize = ByteSize(16 << 20),
        /// Which columns Parquet files have, of those that none of their rows fills.
        pub columns: FileColumns = FileColumns::Whole,
    }
}

/// Which columns Parquet files have, of those that none of their rows fills. Readers give null for what a file lacks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum FileColumns {
    /// A top-level column is there with all that is within it, or not at all: right with every reader.
    #[default]
    Whole,
    /// Only what a row fills, at every depth: smaller and faster. Spark before 4.1 reads such files wrong
    /// (SPARK-53535).
    Filled,
    /// Every column of the table.
    All,
}

impl EncodeSection {
    /// Returns the layout of tables that are created. With `add_columns`, tables that exist get the columns that they
    /// lack.
    pub fn layout(&self, add_columns: bool) -> LayoutOptions {
        LayoutOptions {
            extensions: self.extensions,
            max_nesting_level: self.max_nesting_level,
            open_types: self.open_types.clone(),
            source_json: self.source_json,
            add_columns,
        }
    }
}

impl From<FileColumns> for ColumnPruning {
    fn from(columns: FileColumns) -> Self {
        match columns {
            FileColumns::Whole => ColumnPruning::TopLevel,
            FileColumns::Filled => ColumnPruning::Nested,
            FileColumns::All => ColumnPruning::None,
        }
    }
}

/// JSON that open batches may stand for.
pub const OPEN_BATCHES: Share = Share { name: "open batches", percent: 32 };

impl EncodeSection {
    /// Returns the bytes of NDJSON at which a row group is closed. Each worker may close a batch while the others are
    /// open.
    pub fn row_group(&self, memory: &Memory) -> usize {
        self.row_group.bytes().min(memory.share(&OPEN_BATCHES) / (workers(self.workers) + 1))
    }
}

impl Stage for Encode {
    // Weights by what was measured: a byte of NDJSON weighs about 1.6 bytes with its tape, about one as columns, and a
    // fifth of that as pages; closing a batch needs its columns and pages at once.
    const SPEC: &'static StageSpec = &StageSpec {
        name: "encode",
        summary: &["Arrow columns,", "Parquet pages"],
        input: Some(EdgeSpec { carries: "rows", items: 256, bytes: EdgeBytes::Percent(18) }),
        shares: &[OPEN_BATCHES],
        rate: Some((telemetry::STAGED, "rows")),
    };
    type Input = Rows;
    type Output = MergeInput;

    fn workers(stages: &Stages) -> usize {
        workers(stages.encode.workers)
    }

    fn spawn(run: &mut RunContext, rows: Receiver<Rows>, merge: Sender<MergeInput>) -> Result<()> {
        let section = &run.stages.encode;
        let (row_group, budget) = (section.row_group(&run.memory), run.memory.share(&OPEN_BATCHES));
        let (columns, line_hashes) = (section.columns.into(), run.stages.parse.skip_unchanged);
        let shared = Shared::new(run.layouts.clone(), run.requests.clone(), row_group, budget, columns, line_hashes);
        for _ in 0..Self::workers(&run.stages) {
            let worker = Encode { rows: rows.clone(), merge: merge.clone(), shared: shared.clone() };
            let span = tracing::Span::current();
            run.tasks.spawn_cpu("encode", move |handle| span.in_scope(|| worker.run(handle)));
        }
        Ok(())
    }
}

impl Section for EncodeSection {
    fn check(&self, _memory: u64, found: &mut Findings) {
        for (index, name) in self.open_types.iter().enumerate() {
            let is_unknown = Model::r4().definition(name).is_none();
            found.add_if(is_unknown, &format!("open_types.{index}"), "not a data type of FHIR R4", None);
        }
        let row_group = self.row_group.0;
        found.add_if(!(1 << 16..=1 << 30).contains(&row_group), "row_group", "must be from 64KiB to 1GiB", None);
    }
}
