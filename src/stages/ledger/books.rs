//! The book of a file, and that of a type.

use std::sync::Arc;

use crate::messages::{ExportFile, FileKind, ParsedChunk};

#[derive(Debug)]
pub(super) struct FileBook {
    pub file: Arc<ExportFile>,
    /// Lines by the download's count; `None` until its end.
    pub lines: Option<u64>,
    pub parsed: ParsedChunk,
    pub failed: Option<String>,
}

impl FileBook {
    pub fn rows(&self) -> u64 {
        self.parsed.rows.iter().map(|row| row.1).sum()
    }
    pub fn unread(&self) -> bool {
        self.failed.is_some() || self.bad() > 0
    }
    pub fn bad(&self) -> u64 {
        self.parsed.bad.iter().map(|bad| bad.1).sum()
    }
    /// What is wrong with a file that has come to its end; whether it may be too short is the pipeline's to say.
    pub fn fault(&self, fails_short: bool) -> Option<String> {
        if self.is_something_else() {
            return Some("none of its lines is a resource: the server sent something else than NDJSON".to_owned());
        }
        let came = self.rows() + self.bad() + self.parsed.headers;
        let promised = self.file.count.unwrap_or(0);
        let is_short = fails_short && self.lines.is_some() && self.settled() && came < promised;
        is_short.then(|| format!("{}: the manifest promised {promised} resources, {came} came", self.file.name))
    }
    /// Whether a file of resources was read to its end, has none of its type, and every line of it is something else: a page, an
    /// array, an outcome. A resource that is broken is a bad line, however few others there are.
    fn is_something_else(&self) -> bool {
        let lines = self.parsed.lines - self.parsed.blank;
        let has_own = self.parsed.rows.iter().any(|(name, _)| Some(name) == self.file.declared.as_ref());
        self.file.kind == FileKind::Output
            && !self.file.replayed
            && self.lines == Some(self.parsed.lines)
            && lines > 0
            && self.parsed.foreign == lines
            && !has_own
    }
    pub fn settled(&self) -> bool {
        self.failed.is_some() || self.lines == Some(self.parsed.lines)
    }
    /// lines = rows + bad + blank + headers
    pub fn balances(&self) -> bool {
        self.parsed.lines == self.rows() + self.bad() + self.parsed.blank + self.parsed.headers
    }
}

#[derive(Debug, Default)]
pub(super) struct TypeBook {
    pub parsed: u64,
    pub staged: u64,
    /// Of both, rows that an earlier run staged: encode knows nothing of them.
    pub held: u64,
    pub bad: u64,
    /// Rows came in a file declared for another type.
    pub stray: bool,
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
