//! What the books have to say at the end, and to whoever writes down what is staged.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::books::FileBook;
use super::{Ledger, Standing};
use crate::messages::{ExportFile, FileKind, LineId, ParsedChunk, ResourceType};

impl Ledger {
    /// Whether the export's own error files keep its watermark where it is: they tell of fatal issues, or could not be
    /// read.
    pub fn holds_watermark(&self, export: usize) -> bool {
        self.outcomes(export).any(|book| book.parsed.fatal > 0 || book.unread())
    }

    /// Whether the export's own error files tell of errors, or could not be read.
    pub fn has_errors(&self, export: usize) -> bool {
        self.outcomes(export).any(|book| book.parsed.errors > 0 || book.unread())
    }

    fn outcomes(&self, export: usize) -> impl Iterator<Item = &FileBook> {
        self.files.values().filter(move |book| book.file.kind == FileKind::Outcome && book.file.export == export)
    }

    /// Bad lines that are held against no type of their own: of deletion files, error files and excluded types.
    pub fn other_bad(&self) -> u64 {
        let bad = self.files.values().flat_map(|book| &book.parsed.bad);
        bad.filter(|(name, _)| name.is_none()).map(|(_, lines)| lines).sum()
    }

    /// What the manifest promised and what came, where they differ: file, promised, came.
    pub fn count_findings(&self) -> Vec<(String, u64, u64)> {
        let differing = self.files.values().filter_map(|book| {
            let (promised, came) = (book.file.count?, book.rows() + book.bad() + book.parsed.headers);
            (book.failed.is_none() && book.lines.is_some() && promised != came).then(|| (book.file.name.clone(), promised, came))
        });
        differing.collect()
    }

    /// Files that could not be read to their end, or were too short.
    pub fn files_failed(&self) -> u64 {
        self.files.values().filter(|book| book.failed.is_some() && !book.file.replayed).count() as u64
    }

    /// Output files by declared type.
    pub fn files_of(&self, resource_type: &ResourceType) -> u64 {
        let files = self.files.values().filter(|book| book.file.kind == FileKind::Output && !book.file.replayed);
        files
            .filter(|book| {
                book.parsed.rows.iter().any(|row| row.0 == *resource_type) || book.file.declared.as_ref() == Some(resource_type)
            })
            .count() as u64
    }

    /// Rows of the type that the export itself brought.
    pub fn rows_of_export(&self, resource_type: &ResourceType) -> u64 {
        let files = self.files.values().filter(|book| !book.file.replayed);
        files.flat_map(|book| &book.parsed.rows).filter(|(name, _)| name == resource_type).map(|(_, rows)| rows).sum()
    }

    /// Files that exports of a server listed, where their export's status is asked for, and what their lines were, once all
    /// of them are parsed and accounted for.
    pub fn listed(&self) -> impl Iterator<Item = (&ExportFile, &Arc<str>, Option<&ParsedChunk>)> {
        self.files.values().filter_map(|book| {
            let status = self.statuses.get(&book.file.export)?;
            let whole = book.failed.is_none() && book.settled() && book.balances();
            Some((&*book.file, status, Some(&book.parsed).filter(|_| whole && book.file.kind == FileKind::Output)))
        })
    }

    /// Whether files that are declared for the type hold rows of others.
    pub fn is_mixed(&self, resource_type: &ResourceType) -> bool {
        let mut ours = self.files.values().filter(|book| book.file.declared.as_ref() == Some(resource_type));
        ours.any(|book| book.parsed.rows.iter().any(|(name, _)| name != resource_type))
    }

    /// Types of which not all rows that are parsed are staged, and that can still be merged: the rows that encode was given.
    pub fn behind(&self) -> Vec<(ResourceType, u64)> {
        let behind = self.types.iter().filter(|(_, book)| book.failed.is_none() && book.staged < book.parsed);
        behind.map(|(name, book)| (name.clone(), book.parsed - book.held)).collect()
    }

    /// Rows of the type that are staged so far, and how many of them encode brought.
    pub fn staged_of(&self, resource_type: &ResourceType) -> (u64, u64) {
        self.types.get(resource_type).map_or((0, 0), |book| (book.staged, book.staged - book.held))
    }

    /// Lines out of quarantine that were read, and whose type was committed.
    pub fn replayed(&self) -> Vec<LineId> {
        let read = self.files.values().flat_map(|book| &book.parsed.replayed);
        read.filter(|(_, name)| self.standing(name) == Standing::Done).map(|(line, _)| *line).collect()
    }

    /// Types that still wait for something, of a run that ended early.
    pub fn unfinished(&self) -> BTreeSet<ResourceType> {
        let open = self.types.keys().filter(|name| !matches!(self.standing(name), Standing::Done | Standing::Failed(_)));
        open.cloned().collect()
    }
}
