//! Findings of the ledger at the end, and to whoever persists what is staged.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::file_progress::FileProgress;
use super::{Completeness, Ledger};
use crate::messages::{ExportEnd, ExportFile, FileKind, LineId, ParsedChunk, ResourceType};

impl Ledger {
    /// Why the watermark of a type must stay where it is, though what came of it is merged: the server says that it did
    /// not give all (an issue of severity error or fatal, in an error file or among the rows), or it cannot be known
    /// whether it did.
    pub fn watermark_hold(&self, resource_type: &ResourceType) -> Option<String> {
        if self.ignores_errors {
            return None;
        }
        let end = self.end_of(resource_type)?;
        let files =
            self.files.values().filter(|progress| progress.file.export == end.export && !progress.file.replayed);
        let reasons = files.filter_map(|progress| {
            let name = &progress.file.name;
            match progress.file.kind {
                FileKind::Outcome if progress.unread() => {
                    return Some(format!("the error file {name} could not be read"));
                }
                // What is deleted is said once, and a line in quarantine that says so is not retried.
                FileKind::Deleted if progress.bad() > 0 => {
                    return Some(format!("{} lines of the deletion file {name} could not be read", progress.bad()));
                }
                FileKind::Output
                    if progress.is_broken_off()
                        && self.concerns(progress.file.declared.as_ref(), resource_type, end) =>
                {
                    return Some(format!(
                        "file {name} ends with line {}, which is not a resource",
                        progress.parsed.last_foreign
                    ));
                }
                _ => {}
            }
            let errors = progress.parsed.server_errors.iter();
            let ours = errors.filter(|(concerned, _)| self.concerns(concerned.as_ref(), resource_type, end));
            let count: u64 = ours.map(|(_, count)| count).sum();
            (count > 0).then(|| format!("the server reports {count} errors of its export in {name}"))
        });
        reasons.into_iter().next()
    }

    /// Returns true if an error that concerns one type, or all, keeps the watermark of `resource_type`. One of a type
    /// that the export does not answer for, and that has no table whose watermark could stay, keeps all.
    fn concerns(&self, concerned: Option<&ResourceType>, resource_type: &ResourceType, end: &ExportEnd) -> bool {
        let Some(concerned) = concerned else { return true };
        let answers = |name: &ResourceType| {
            end.requested.contains(name)
                || end.merged.contains(name)
                || (end.all_types
                    && (end.known.contains(name) || self.types.get(name).is_some_and(|progress| progress.parsed > 0)))
        };
        concerned == resource_type || !answers(concerned)
    }

    /// Returns true if the type failed.
    pub fn has_failed(&self, resource_type: &ResourceType) -> bool {
        matches!(self.completeness(resource_type), Completeness::Failed(_))
    }

    /// Bad lines of the type.
    pub fn bad(&self, resource_type: &ResourceType) -> u64 {
        self.types.get(resource_type).map_or(0, |progress| progress.bad)
    }

    /// Returns true if the server tells of errors of the export, or its error files could not be read.
    pub fn has_errors(&self, export: usize) -> bool {
        let of_export =
            self.files.values().filter(|progress| progress.file.export == export && !progress.file.replayed);
        of_export.into_iter().any(|progress| progress.parsed.errors > 0 || progress.is_broken_off())
            || self.outcomes(export).any(FileProgress::unread)
    }

    fn outcomes(&self, export: usize) -> impl Iterator<Item = &FileProgress> {
        self.files
            .values()
            .filter(move |progress| progress.file.kind == FileKind::Outcome && progress.file.export == export)
    }

    /// Bad lines that are held against no type of their own: of deletion files, error files and excluded types.
    pub fn other_bad(&self) -> u64 {
        let bad = self.files.values().flat_map(|progress| &progress.parsed.bad);
        bad.filter(|(name, _)| name.is_none()).map(|(_, lines)| lines).sum()
    }

    /// Returns promised and received counts, where they differ: file, promised, came.
    pub fn count_findings(&self) -> Vec<(String, u64, u64)> {
        let differing = self.files.values().filter_map(|progress| {
            let (promised, came) = (progress.file.count?, progress.came());
            // Whether a server counts headers, and whether a bad line was to be a resource, nobody knows.
            let range = came - progress.bad()..=came + progress.parsed.asides;
            (progress.failed.is_none() && progress.lines.is_some() && !range.contains(&promised))
                .then(|| (progress.file.name.clone(), promised, came))
        });
        differing.collect()
    }

    /// The name of a file, for messages.
    pub fn file_name(&self, index: u32) -> Option<&str> {
        self.files.get(&index).map(|progress| progress.file.name.as_str())
    }

    /// Files that could not be read to their end, or were too short.
    pub fn files_failed(&self) -> u64 {
        self.files.values().filter(|progress| progress.failed.is_some() && !progress.file.replayed).count() as u64
    }

    /// Returns true if there are files that could not be read, and the server says of each of them that it is gone for
    /// good.
    pub fn all_failed_are_gone(&self) -> bool {
        let mut failed =
            self.files.values().filter(|progress| progress.failed.is_some() && !progress.file.replayed).peekable();
        failed.peek().is_some() && failed.all(|progress| progress.is_gone)
    }

    /// Output files by declared type.
    pub fn files_of(&self, resource_type: &ResourceType) -> u64 {
        let files =
            self.files.values().filter(|progress| progress.file.kind == FileKind::Output && !progress.file.replayed);
        files
            .filter(|progress| {
                progress.parsed.rows.iter().any(|row| row.0 == *resource_type)
                    || progress.file.declared.as_ref() == Some(resource_type)
            })
            .count() as u64
    }

    /// Rows of the type that the export itself brought.
    pub fn rows_of_export(&self, resource_type: &ResourceType) -> u64 {
        let files = self.files.values().filter(|progress| !progress.file.replayed);
        files
            .flat_map(|progress| &progress.parsed.rows)
            .filter(|(name, _)| name == resource_type)
            .map(|(_, rows)| rows)
            .sum()
    }

    /// Files that exports of a server listed, where their export's status is asked for, and what their lines were, once
    /// all of them are parsed and accounted for.
    pub fn listed(&self) -> impl Iterator<Item = (&ExportFile, &Arc<str>, Option<&ParsedChunk>)> {
        self.files.values().filter_map(|progress| {
            let status = self.statuses.get(&progress.file.export)?;
            // What the server marks as deleted is not among the rows that are staged: such a file is read again.
            let whole = progress.failed.is_none()
                && progress.is_read()
                && progress.counts_match()
                && progress.parsed.deleted.is_empty();
            Some((
                &*progress.file,
                status,
                Some(&progress.parsed).filter(|_| whole && progress.file.kind == FileKind::Output),
            ))
        })
    }

    /// Returns true if files that are declared for the type hold rows of others.
    pub fn is_mixed(&self, resource_type: &ResourceType) -> bool {
        let mut ours = self.files.values().filter(|progress| progress.file.declared.as_ref() == Some(resource_type));
        ours.any(|progress| progress.parsed.rows.iter().any(|(name, _)| name != resource_type))
    }

    /// Types of which not all rows that are parsed are staged, and that can still be merged: the rows that encode was
    /// given.
    pub fn unstaged(&self) -> Vec<(ResourceType, u64)> {
        let unstaged =
            self.types.iter().filter(|(_, progress)| progress.failed.is_none() && progress.staged < progress.parsed);
        unstaged.map(|(name, progress)| (name.clone(), progress.parsed.saturating_sub(progress.held))).collect()
    }

    /// Rows of the type that are staged so far, and how many of them encode brought.
    pub fn staged_of(&self, resource_type: &ResourceType) -> (u64, u64) {
        self.types.get(resource_type).map_or((0, 0), |progress| (progress.staged, progress.staged - progress.held))
    }

    /// Lines out of quarantine that were read, and whose type was committed.
    pub fn replayed(&self) -> Vec<LineId> {
        let read = self.files.values().flat_map(|progress| &progress.parsed.replayed);
        read.filter(|(_, name)| self.completeness(name) == Completeness::Done).map(|(line, _)| *line).collect()
    }

    /// Types that still wait for something, of a run that ended early.
    pub fn unfinished(&self) -> BTreeSet<ResourceType> {
        let open = self
            .types
            .keys()
            .filter(|name| !matches!(self.completeness(name), Completeness::Done | Completeness::Failed(_)));
        open.cloned().collect()
    }
}
