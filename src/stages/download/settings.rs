//! `stages.download` of the pipeline file.

use std::sync::Arc;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::sync::Semaphore;

use super::Download;
use crate::error::Result;
use crate::messages::{Chunk, ExportFile};
use crate::stages::download::replay::Replay;
use crate::stages::{EdgeBytes, EdgeSpec, RunContext, Section, Stage, StageSpec, Stages};
use crate::telemetry;
use crate::values::{ByteSize, Findings, section};
use flow::{Receiver, Sender};

// Ten is the Python sync script's. A chunk of 1 MiB keeps a worker busy for milliseconds, so that edges of a few
// dozen chunks even out; much smaller ones would pay more for the edge than for the parsing.
section! {
    /// Files to bytes.
    pub struct DownloadSection {
        /// Files at the same time.
        #[schemars(range(min = 1, max = 256))]
        pub concurrency: usize = 10,
        /// Size of a chunk of lines.
        pub chunk: ByteSize = ByteSize(1 << 20),
        /// Number of times that a file that breaks off is read from its start.
        #[schemars(range(min = 1))]
        pub tries: usize = 5,
        /// Largest file, decompressed. A larger one fails its type.
        pub max_file: ByteSize = ByteSize(100 << 30),
        /// Treatment of a file with fewer resources than the manifest's `count`. Many servers count wrong.
        pub on_short_file: ShortFile = ShortFile::Report,
    }
}

/// Treatment of a file with fewer resources than the manifest's `count`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ShortFile {
    /// It is reported.
    #[default]
    Report,
    /// Its type fails.
    Fail,
}

impl Stage for Download {
    const SPEC: &'static StageSpec = &StageSpec {
        name: "download",
        summary: &["N at a time,", "whole lines"],
        input: Some(EdgeSpec { carries: "files", items: 1024, bytes: EdgeBytes::Fixed(4 << 20) }),
        shares: &[],
        rate: Some((telemetry::BYTES, "bytes")),
    };
    type Input = Arc<ExportFile>;
    type Output = Chunk;

    fn workers(stages: &Stages) -> usize {
        stages.download.concurrency.max(1)
    }

    fn spawn(run: &mut RunContext, files: Receiver<Arc<ExportFile>>, chunks: Sender<Chunk>) -> Result<()> {
        let span = tracing::Span::current();
        let settings = &run.stages.download;
        if let Some(replayed) = run.replayed.take() {
            let (chunks, merge, span) = (chunks.clone(), run.control.clone(), span.clone());
            let replay = Replay { replayed, chunks, merge, chunk_bytes: settings.chunk.bytes() };
            run.tasks.spawn_cpu("replay", move |handle| span.in_scope(|| replay.run(handle)));
        }
        let long_lines = Arc::new(Semaphore::new(1));
        for _ in 0..Self::workers(&run.stages) {
            let worker = Download {
                files: files.clone(),
                chunks: chunks.clone(),
                merge: run.control.clone(),
                origin: run.origin.clone(),
                settings: settings.clone(),
                max_line: run.stages.parse.max_line(run.memory.total()),
                long_lines: long_lines.clone(),
                log: run.log.clone(),
                counters: run.counters.clone(),
                stop: run.tasks.stop().clone(),
            };
            let span = span.clone();
            run.tasks.spawn_cpu("download", move |handle| span.in_scope(|| worker.run(handle)));
        }
        Ok(())
    }
}

impl Section for DownloadSection {
    fn check(&self, _memory: u64, found: &mut Findings) {
        let chunk = self.chunk.0;
        found.add_if(!(4096..=64 << 20).contains(&chunk), "chunk", "must be from 4KiB to 64MiB", None);
    }
}
