//! Lines that earlier runs quarantined, retried: a newer version may read them.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use tokio::runtime::Handle;

use crate::error::Result;
use crate::messages::{Chunk, ControlEvent, ExportFile, FileFinished, ManifestPage, MergeInput, ReplayedLines};
use flow::Sender;

/// Lines out of quarantine.
pub struct Replayed {
    /// A file for each type that lines were declared for.
    pub files: Vec<Arc<ExportFile>>,
    /// The lines.
    pub lines: ReplayedLines,
}

/// Reads the quarantine as if it were files of the export, the oldest of them.
pub struct Replay {
    /// Input.
    pub replayed: Replayed,
    /// Their destination.
    pub chunks: Sender<Chunk>,
    /// Destination of control events.
    pub merge: Sender<MergeInput>,
    /// Bytes of a chunk.
    pub chunk_bytes: usize,
}

/// State of a file.
#[derive(Default)]
struct Open {
    bytes: Vec<u8>,
    /// Lines before those, and all.
    sent: u64,
    lines: u64,
}

impl Replay {
    /// Sends all lines on.
    pub fn run(self, handle: &Handle) -> Result<()> {
        let Replayed { files, lines } = self.replayed;
        // `usize::MAX`: no export of this run's.
        let page = ManifestPage { export: usize::MAX, status: None, files: files.clone() };
        if handle.block_on(self.merge.send(MergeInput::ControlEvent(ControlEvent::Page(page)))).is_err() {
            return Ok(());
        }
        let mut open: BTreeMap<u32, Open> = files.iter().map(|file| (file.index, Open::default())).collect();
        for line in lines {
            let line = line?;
            let Some(file) = files.iter().find(|file| file.declared == line.declared) else { continue };
            let Some(gathered) = open.get_mut(&file.index) else { continue };
            gathered.bytes.extend_from_slice(&line.bytes);
            gathered.bytes.push(b'\n');
            gathered.lines += 1;
            if gathered.bytes.len() >= self.chunk_bytes
                && handle.block_on(self.chunks.send(gathered.chunk(file))).is_err()
            {
                return Ok(());
            }
        }
        for file in &files {
            let Some(gathered) = open.get_mut(&file.index) else { continue };
            if !gathered.bytes.is_empty() && handle.block_on(self.chunks.send(gathered.chunk(file))).is_err() {
                return Ok(());
            }
            let done = ControlEvent::FileFinished(FileFinished { file: file.index, lines: gathered.lines });
            if handle.block_on(self.merge.send(MergeInput::ControlEvent(done))).is_err() {
                return Ok(());
            }
        }
        Ok(())
    }
}

impl Open {
    fn chunk(&mut self, file: &Arc<ExportFile>) -> Chunk {
        let first_line = self.sent + 1;
        self.sent = self.lines;
        let bytes = Bytes::from(std::mem::take(&mut self.bytes));
        Chunk { file: file.clone(), first_line, offset: 0, bytes, oversized: None }
    }
}
