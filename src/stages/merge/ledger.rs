//! The ledger of a run: when is a type complete?
//!
//! A closed channel means "no more input", not "all input came". A type is complete when every file that
//! may hold it has reported its end and the counts agree: lines = rows + bad + blank + headers, and each
//! stage's rows equal the next one's.

mod file_progress;
mod findings;

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use self::file_progress::{FileProgress, TypeProgress, merge_count};
use crate::messages::{ControlEvent, ExportEnd, FileKind, Limit, ParsedChunk, ResourceType};
use fhir_arrow::EXCLUDED_TYPES;

/// The ledger.
#[derive(Debug)]
pub struct Ledger {
    files: BTreeMap<u32, FileProgress>,
    types: BTreeMap<ResourceType, TypeProgress>,
    ends: BTreeMap<usize, ExportEnd>,
    failed_exports: HashSet<usize>,
    /// Status URL of each export.
    statuses: BTreeMap<usize, Arc<str>>,
    /// Exports that the run has, those that were taken apart among them.
    exports: usize,
    max_bad_lines: Option<Limit>,
    /// Types that an earlier run merged out of an export of this one.
    merged: HashSet<ResourceType>,
    /// True if a type waits for every file, since rows that are not among those that come will be deleted.
    waits_for_all: bool,
    /// True if a file with fewer resources than the manifest promises fails.
    fails_short_files: bool,
    /// True if watermarks move whatever the server says of its export.
    ignores_errors: bool,
}

/// Progress of a type.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Completeness {
    /// Something is still to come.
    Open,
    /// All rows are parsed; encode still holds some: how many it was given.
    Parsed(u64),
    /// All rows are staged: it may commit.
    Complete,
    /// It must not commit.
    Failed(String),
    /// It did.
    Done,
}

impl Ledger {
    /// Books for a run of `exports` kick-offs. `max_bad_lines` of `None` allows any number.
    pub fn new(exports: usize, max_bad_lines: Option<Limit>) -> Self {
        Self {
            files: BTreeMap::new(),
            types: BTreeMap::new(),
            ends: BTreeMap::new(),
            failed_exports: HashSet::new(),
            statuses: BTreeMap::new(),
            exports,
            max_bad_lines,
            merged: HashSet::new(),
            waits_for_all: false,
            fails_short_files: false,
            ignores_errors: false,
        }
    }

    /// Lets watermarks move whatever the server says of its export.
    pub fn ignore_errors(mut self, ignore: bool) -> Self {
        self.ignores_errors = ignore;
        self
    }

    /// Lets files fail that have fewer resources than the manifest promises.
    pub fn fail_short_files(mut self, fail: bool) -> Self {
        self.fails_short_files = fail;
        self
    }

    /// Looks whether a file that has come to its end is one at all, and whether it is too short.
    fn judge(&mut self, index: u32) {
        if let Some(progress) = self.files.get_mut(&index).filter(|progress| progress.failed.is_none()) {
            progress.failed = progress.fault(self.fails_short_files, self.ignores_errors);
        }
    }

    /// Lets every type wait for every file: it must commit once, with all rows that any file holds of it.
    pub fn wait_for_all(mut self) -> Self {
        self.waits_for_all = true;
        self
    }

    /// Enters a fact.
    pub fn enter(&mut self, fact: ControlEvent) {
        match fact {
            ControlEvent::Page(page) => {
                self.statuses.extend(page.status.map(|status| (page.export, status)));
                for file in page.files {
                    if let Some(declared) = &file.declared
                        && file.kind == FileKind::Output
                        && !EXCLUDED_TYPES.contains(&&**declared)
                    {
                        self.types.entry(declared.clone()).or_default();
                    }
                    self.files.insert(file.index, FileProgress::of(file));
                }
            }
            ControlEvent::ExportEnd(end) => {
                // What is left of them, lines in other types' files and deletions, an earlier run has merged.
                self.merged.extend(end.merged.iter().cloned());
                for name in end.requested.iter().chain(&end.known) {
                    self.types.entry(name.clone()).or_default();
                }
                self.ends.insert(end.export, end);
            }
            ControlEvent::FileFinished(done) => {
                if let Some(progress) = self.files.get_mut(&done.file) {
                    progress.lines = Some(done.lines);
                }
                self.judge(done.file);
            }
            ControlEvent::FileResumed(held) => {
                if let Some(progress) = self.files.get_mut(&held.file) {
                    progress.lines = Some(held.lines);
                    for (name, rows) in &held.rows {
                        let progress = self.types.entry(name.clone()).or_default();
                        progress.staged += rows;
                        progress.held += rows;
                    }
                    self.parsed(*held);
                }
            }
            ControlEvent::FileFailed(index, why, status) => {
                if let Some(progress) = self.files.get_mut(&index) {
                    progress.failed = Some(why);
                    progress.is_gone = status == Some(410);
                }
            }
            ControlEvent::ExportBisected { export, parts } => {
                self.exports += parts;
                self.failed_exports.insert(export);
            }
            ControlEvent::ExportFailed { export, requested, why } => {
                for name in requested {
                    self.fail(&name, why.clone());
                }
                self.failed_exports.insert(export);
            }
            ControlEvent::TypeFailed(name, why) => self.fail(&name, why),
            ControlEvent::Parsed(chunk) => {
                let file = chunk.file;
                self.parsed(*chunk);
                self.judge(file);
            }
        }
    }

    fn parsed(&mut self, chunk: ParsedChunk) {
        let Some(progress) = self.files.get_mut(&chunk.file) else { return };
        let declared = progress.file.declared.clone();
        progress.parsed.lines += chunk.lines;
        progress.parsed.bytes += chunk.bytes;
        progress.parsed.foreign += chunk.foreign;
        progress.parsed.blank += chunk.blank;
        progress.parsed.headers += chunk.headers;
        progress.parsed.asides += chunk.asides;
        progress.parsed.unknown += chunk.unknown;
        progress.parsed.last = progress.parsed.last.max(chunk.last);
        let is_output = progress.file.kind == FileKind::Output;
        progress.parsed.errors += chunk.errors;
        progress.parsed.last_foreign = progress.parsed.last_foreign.max(chunk.last_foreign);
        for (concerned, count) in chunk.server_errors {
            merge_count(&mut progress.parsed.server_errors, concerned, count);
        }
        progress.parsed.replayed.extend(chunk.replayed);
        for (name, count) in chunk.deleted {
            let of_type = self.types.get_mut(&name).filter(|_| is_output && declared.as_ref() != Some(&name));
            // As rows that stray: it waits for every file, and commits again where it did.
            if let Some(of_type) = of_type {
                (of_type.unrequested, of_type.done) = (true, false);
            }
            merge_count(&mut progress.parsed.deleted, name, count);
        }
        for (name, rows) in chunk.rows {
            let unrequested = declared.as_ref().is_some_and(|declared| *declared != name);
            let of_type = self.types.entry(name.clone()).or_default();
            of_type.parsed += rows;
            of_type.unrequested |= unrequested;
            of_type.done = false;
            merge_count(&mut progress.parsed.rows, name, rows);
        }
        for (name, lines) in chunk.bad {
            if let Some(name) = &name {
                self.types.entry(name.clone()).or_default().bad += lines;
            }
            merge_count(&mut progress.parsed.bad, name, lines);
        }
        for (name, lines) in chunk.excluded {
            merge_count(&mut progress.parsed.excluded, name, lines);
        }
    }

    /// Enters rows that are staged.
    pub fn staged(&mut self, resource_type: &ResourceType, rows: u64) {
        self.types.entry(resource_type.clone()).or_default().staged += rows;
    }

    /// Enters rows that the table has already: they count as staged, and encode knows nothing of them.
    pub fn unchanged(&mut self, resource_type: &ResourceType, rows: u64) {
        let progress = self.types.entry(resource_type.clone()).or_default();
        progress.staged += rows;
        progress.held += rows;
    }

    /// Enters that a type was committed.
    pub fn committed(&mut self, resource_type: &ResourceType) {
        self.types.entry(resource_type.clone()).or_default().done = true;
    }

    /// Enters that a type failed for a reason of its own.
    pub fn fail(&mut self, resource_type: &ResourceType, why: String) {
        self.types.entry(resource_type.clone()).or_default().failed.get_or_insert(why);
    }

    /// Types that the ledger know of.
    pub fn types(&self) -> Vec<ResourceType> {
        self.types.keys().cloned().collect()
    }

    /// The end of the export that holds the type.
    pub fn end_of(&self, resource_type: &ResourceType) -> Option<&ExportEnd> {
        let requested = self.ends.values().find(|end| end.requested.contains(resource_type));
        // One whose types are all merged answers for no other: of those it brings strays, not their history.
        requested.or_else(|| self.ends.values().find(|end| end.all_types))
    }

    /// The oldest `transactionTime` of the exports that ended, microseconds since the epoch.
    pub fn transaction_time(&self) -> Option<i64> {
        self.ends.values().filter_map(|end| end.transaction_time).min()
    }

    /// Returns true if an export of the run answers for the type: one that only strayed into its files has no watermark
    /// of it.
    pub fn is_answered_for(&self, resource_type: &ResourceType) -> bool {
        self.is_merged(resource_type) || self.end_of(resource_type).is_some_and(|end| end.transaction_time.is_some())
    }

    /// Returns true if an earlier run merged the type out of this very export.
    pub fn is_merged(&self, resource_type: &ResourceType) -> bool {
        self.merged.contains(resource_type)
    }

    /// Returns the number of exports the run has.
    pub fn exports(&self) -> usize {
        self.exports
    }

    /// Returns true if each export has said its last.
    pub fn all_ended(&self) -> bool {
        self.ends.len() + self.failed_exports.len() >= self.exports
    }

    /// The type that a file is declared for.
    pub fn declared(&self, file: u32) -> Option<ResourceType> {
        self.files.get(&file)?.file.declared.clone()
    }

    /// Returns the progress of a type.
    pub fn completeness(&self, resource_type: &ResourceType) -> Completeness {
        let Some(progress) = self.types.get(resource_type) else { return Completeness::Open };
        if let Some(why) = &progress.failed {
            return Completeness::Failed(why.clone());
        }
        if progress.done && progress.parsed == progress.staged {
            return Completeness::Done;
        }
        if !self.all_ended() {
            return Completeness::Open;
        }
        // Rows that came in another type's file may come in any: such a type waits for all.
        let concerned = |progress: &&FileProgress| match progress.file.kind {
            FileKind::Deleted | FileKind::Outcome => true,
            FileKind::Output => {
                self.waits_for_all
                    || self.unrequested(resource_type)
                    || progress.file.declared.as_ref().is_none_or(|name| name == resource_type)
            }
        };
        let mut lines = 0;
        for file in self.files.values().filter(concerned) {
            if file.file.kind == FileKind::Outcome {
                // What it says can hold the watermark, so it is waited for; it cannot fail a type.
                if file.is_read() {
                    continue;
                }
                return Completeness::Open;
            }
            if let Some(why) = &file.failed {
                return Completeness::Failed(format!("file {}: {why}", file.file.name));
            }
            if !file.is_read() {
                return Completeness::Open;
            }
            if !file.counts_match() {
                return Completeness::Failed(format!("file {}: its counts do not balance", file.file.name));
            }
            if file.file.kind == FileKind::Output {
                lines += file.parsed.lines - file.parsed.blank - file.parsed.headers;
            }
            // Bad lines of a file that is of no one type are held against all that it concerns.
            let of_no_type = file.file.kind == FileKind::Deleted || file.file.declared.is_none();
            if let Some(most) = self.max_bad_lines
                && of_no_type
                && file.bad() - file.parsed.unknown > most.of(file.parsed.lines)
            {
                return Completeness::Failed(format!(
                    "file {}: {} bad lines, more than on_bad_line and max_bad_lines allow",
                    file.file.name,
                    file.bad()
                ));
            }
        }
        if let Some(most) = self.max_bad_lines
            && progress.bad > most.of(lines)
        {
            return Completeness::Failed(format!(
                "{} bad lines of {lines}, more than on_bad_line and max_bad_lines allow",
                progress.bad
            ));
        }
        if progress.staged < progress.parsed {
            Completeness::Parsed(progress.parsed - progress.held)
        } else {
            Completeness::Complete
        }
    }

    fn unrequested(&self, resource_type: &ResourceType) -> bool {
        self.types.get(resource_type).is_some_and(|progress| progress.unrequested)
    }
}

#[cfg(test)]
mod tests;
