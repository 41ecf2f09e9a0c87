//! The book of a file, and that of a type.

use std::sync::Arc;

use crate::messages::{ExportFile, FileKind, ParsedChunk};

#[derive(Debug)]
pub(super) struct FileProgress {
    pub file: Arc<ExportFile>,
    /// Lines by the download's count; `None` until its end.
    pub lines: Option<u64>,
    pub parsed: ParsedChunk,
    pub failed: Option<String>,
    /// True if the server says that it is there no more, and will not be.
    pub is_gone: bool,
}

impl FileProgress {
    pub(crate) fn of(file: Arc<ExportFile>) -> Self {
        let parsed = ParsedChunk { file: file.index, ..ParsedChunk::default() };
        Self { file, lines: None, parsed, failed: None, is_gone: false }
    }
    pub(crate) fn rows(&self) -> u64 {
        self.parsed.rows.iter().map(|row| row.1).sum()
    }
    pub(crate) fn unread(&self) -> bool {
        self.failed.is_some() || self.bad() > 0
    }
    pub(crate) fn bad(&self) -> u64 {
        self.parsed.bad.iter().map(|bad| bad.1).sum()
    }
    /// Resources that came, read or not, as a manifest counts them.
    pub(crate) fn came(&self) -> u64 {
        self.rows() + self.bad() + self.parsed.headers - self.parsed.asides
    }
    /// Returns the problem of a file that has come to its end; whether it may be too short is the pipeline's to say.
    pub(crate) fn fault(&self, fails_short: bool, ignores_errors: bool) -> Option<String> {
        if self.is_not_an_export_file(ignores_errors) {
            let what = match self.file.kind {
                FileKind::Deleted => "deletion Bundles",
                _ => "NDJSON resources",
            };
            let lines = self.parsed.lines - self.parsed.blank;
            if self.file.kind == FileKind::Output && self.parsed.errors > 0 && self.parsed.headers == lines {
                return Some("not an export file: it holds nothing but the server's error".to_owned());
            }
            return Some(format!("not an export file: none of its {lines} lines could be read as {what}"));
        }
        let (came, promised) = (self.came(), self.file.count.unwrap_or(0));
        let is_short = fails_short && self.lines.is_some() && self.is_read() && came < promised;
        is_short
            .then(|| format!("{}: the manifest has count {promised}, the file has {came} resources", self.file.name))
    }
    /// Returns true if a file was read to its end, is not empty, and has nothing that its kind of file holds: no line
    /// of it could be read, or each is something else than a resource of its type, such as a page, an array or an
    /// outcome.
    fn is_not_an_export_file(&self, ignores_errors: bool) -> bool {
        let (parsed, lines) = (&self.parsed, self.parsed.lines - self.parsed.blank);
        if self.file.replayed || self.lines != Some(parsed.lines) || lines == 0 {
            return false;
        }
        let deleted: u64 = parsed.deleted.iter().map(|of| of.1).sum();
        match self.file.kind {
            // The server's messages, which nobody wants to hear of.
            FileKind::Output if ignores_errors && parsed.headers == lines => false,
            // Resources, though of a later FHIR: in quarantine they wait for a version that has a table for them.
            FileKind::Output if parsed.unknown > 0 && parsed.foreign == 0 => false,
            FileKind::Output => {
                let has_own = parsed.rows.iter().any(|(name, _)| Some(name) == self.file.declared.as_ref());
                // A file of warnings only, or of headers, is no fault.
                let held: u64 = parsed.server_errors.iter().map(|error| error.1).sum();
                let is_readable = self.rows() + parsed.headers > 0 && (held == 0 || self.rows() + deleted > 0);
                !is_readable || (parsed.foreign == lines && !has_own)
            }
            FileKind::Deleted => parsed.headers + deleted == 0,
            FileKind::Outcome => false,
        }
    }
    /// Returns true if the file's last line is nothing that a server writes before the end of what it has.
    pub(crate) fn is_broken_off(&self) -> bool {
        self.parsed.last_foreign > 0 && self.is_read() && self.parsed.last == self.parsed.last_foreign
    }
    pub(crate) fn is_read(&self) -> bool {
        self.failed.is_some() || self.lines == Some(self.parsed.lines)
    }
    /// lines = rows + bad + blank + headers
    pub(crate) fn counts_match(&self) -> bool {
        self.parsed.lines == self.rows() + self.bad() + self.parsed.blank + self.parsed.headers
    }
}

#[derive(Debug, Default)]
pub(super) struct TypeProgress {
    pub parsed: u64,
    pub staged: u64,
    /// Of both, rows that an earlier run staged or the table has already: encode knows nothing of them.
    pub held: u64,
    pub bad: u64,
    /// Rows came in a file declared for another type.
    pub unrequested: bool,
    pub failed: Option<String>,
    /// Committed; strays may open it again at the end.
    pub done: bool,
}

pub(super) fn merge_count<K: PartialEq>(counts: &mut Vec<(K, u64)>, key: K, by: u64) {
    match counts.iter_mut().find(|(known, _)| *known == key) {
        Some((_, count)) => *count += by,
        None => counts.push((key, by)),
    }
}
