//! `stages.parse` of the pipeline file.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Parse;
use crate::error::Result;
use crate::messages::{Chunk, Rows};
use crate::stages::{EdgeBytes, EdgeSpec, RunContext, Section, Share, Stage, StageSpec, Stages};
use crate::telemetry;
use crate::values::workers;
use crate::values::{ByteSize, Findings, section};
use flow::{Receiver, Sender};
use foundation::Limit;

section! {
    /// Bytes to resources.
    pub struct ParseSection {
        /// Threads; 0 for as many as there are cores.
        #[schemars(range(max = 256))]
        pub workers: usize = 0,
        /// Treatment of a line that cannot be read.
        pub on_bad_line: Bad = Bad::Quarantine,
        /// Bad lines that a type may have before it fails: a number, or a share such as `1%`; `100%` allows any number.
        /// Without it a type fails that has more than 100 and more than 1 % of its lines.
        #[serde(skip_serializing_if = "Option::is_none")]
        pub max_bad_lines: Option<Limit> = None,
        /// Longest line; a longer one is a bad line. Without it: 64MiB, or an eighth of `memory` where that is less.
        #[serde(skip_serializing_if = "Option::is_none")]
        pub max_line: Option<ByteSize> = None,
        /// Skips a line whose row the table has already: of the same bytes, by a hash that data files keep beside each
        /// row (8 bytes, in a column of the Parquet file that is none of the table), or of the same version. `false`
        /// encodes and compares each line, and writes no hashes.
        pub skip_unchanged: bool = true,
    }
}

/// Treatment of a line that cannot be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Bad {
    /// It is kept in quarantine and the run goes on.
    #[default]
    Quarantine,
    /// It is kept in quarantine and its type fails.
    Fail,
}

/// The default of `max_bad_lines`: a few bad lines are a server's usual faults, many are another format.
const USUAL_BAD_LINES: Limit = Limit::CountOrPercent(100, 1.0);

/// The default of `max_line`, where memory is no reason for less.
const USUAL_MAX_LINE: usize = 64 << 20;

impl ParseSection {
    /// Returns the bytes of the longest line. Several of the usual limit would be more than a small `memory` has; a
    /// limit that is written out is meant.
    pub fn max_line(&self, memory: usize) -> usize {
        self.max_line.map_or(USUAL_MAX_LINE.min(memory / 8), ByteSize::bytes)
    }

    /// Returns how many bad lines a type may have.
    pub fn bad_lines(&self) -> Limit {
        match self.on_bad_line {
            Bad::Fail => Limit::Count(0),
            Bad::Quarantine => self.max_bad_lines.unwrap_or(USUAL_BAD_LINES),
        }
    }
}

/// Indexes of the tables' rows, by which unchanged lines are known; beyond it, they lie on disk.
pub const LINE_INDEX: Share = Share { name: "line index", percent: 8 };

impl Stage for Parse {
    const SPEC: &'static StageSpec = &StageSpec {
        name: "parse",
        summary: &["JSON tape,", "bad lines to", "quarantine"],
        input: Some(EdgeSpec { carries: "chunks", items: 256, bytes: EdgeBytes::Percent(14) }),
        shares: &[LINE_INDEX],
        rate: Some((telemetry::PARSED, "resources")),
    };
    type Input = Chunk;
    type Output = Rows;

    fn workers(stages: &Stages) -> usize {
        workers(stages.parse.workers)
    }

    fn spawn(run: &mut RunContext, chunks: Receiver<Chunk>, rows: Sender<Rows>) -> Result<()> {
        for _ in 0..Self::workers(&run.stages) {
            let worker = Parse {
                chunks: chunks.clone(),
                rows: rows.clone(),
                merge: run.control.clone(),
                bad_lines: run.bad_lines.clone(),
                max_line: run.stages.parse.max_line(run.memory.total()),
                // The columns of one resource.
                max_columns: run.memory.total() / 8,
                ignored_codes: run.ignored_codes.clone(),
                elements: run.elements.clone(),
                known: run.known.clone(),
                counters: run.counters.clone(),
            };
            let span = tracing::Span::current();
            run.tasks.spawn_cpu("parse", move |handle| span.in_scope(|| worker.run(handle)));
        }
        Ok(())
    }
}

impl Section for ParseSection {
    fn check(&self, _memory: u64, found: &mut Findings) {
        let too_many = matches!(self.max_bad_lines, Some(Limit::Percent(percent)) if percent > 100.0);
        found.add_if(too_many, "max_bad_lines", "more than 100%", None);
        found.add_if(self.max_line.is_some_and(|most| most.0 > 256 << 20), "max_line", "more than 256MiB", None);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_bounds_a_line_that_nobody_asked_for() {
        let mut section = ParseSection::default();
        assert_eq!((section.max_line(128 << 20) >> 20, section.max_line(4 << 30) >> 20), (16, 64));
        section.max_line = Some(ByteSize(64 << 20));
        assert_eq!(section.max_line(128 << 20) >> 20, 64);
    }
}
