//! Row groups → staged files → one commit a table.
//!
//! Staging never waits for a commit; `tables_at_once` limits matching and committing only.

pub mod ledger;
mod outcome;
mod settings;
mod staging;

pub use self::settings::{KEYS, MATCHING, MERGE, MergeSection, Mode, SchemaEvolution};
use std::collections::{BTreeMap, HashSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::stream::FuturesUnordered;
use serde_json::{Value, json};
use tokio_stream::StreamExt;

use self::ledger::{Completeness, Ledger};
pub use self::outcome::{MergeReport, STOPPED, TypeOutcome};
pub use self::staging::{CheckpointPolicy, Earlier, Staging, StagingSettings, columns_of};
use crate::error::{Advice, Error, ErrorKind, Result};
use crate::jobs::{ExportEvent, ExportEventSink};
use crate::messages::{
    ControlEvent, ExportEnd, FileKind, FlushRequests, LineIndexReport, MergeInput, ParsedChunk, ResourceType,
    instant_text,
};
use crate::telemetry;
use delta_upsert::{
    Commit, Copies, Deletions, Incoming, Merged, NotMatchedBySource, OrderRules, Scratch, TableSettings, Upsert,
    Watermark, commit_info,
};
use fhir_arrow::{LayoutOptions, arrow_schema, layout_for};
use flow::{Cancellation, Counters, Receiver, compute};

/// Interval at which merge looks whether a type is complete.
const SETTLE_EVERY: Duration = Duration::from_millis(15);

/// Settings of merge.
#[derive(Debug, Clone)]
pub struct MergeSettings {
    /// Pipeline's name, for the commit's info and the watermark.
    pub pipeline: String,
    /// The run's id: names its files.
    pub run: String,
    /// Application id of the watermark: pipeline and scope.
    pub app_id: String,
    /// Number of tables are matched and committed at the same time.
    pub tables_at_once: usize,
    /// Order of copies and those of the tables.
    pub order: OrderRules,
    /// Treatment of rows that the run does not bring.
    pub absent: NotMatchedBySource,
    /// Bytes of memory that matching one table may take.
    pub match_memory: usize,
    /// Folder for keys beyond that.
    pub scratch: PathBuf,
    /// Layout of tables that are created.
    pub layout: LayoutOptions,
    /// Setup of tables that are created.
    pub table: TableSettings,
    /// Time at which the run began.
    pub began: Instant,
}

/// Rows that encode still gathers are waited for so long before what is staged is persisted without them.
const FLUSH_FOR: Duration = Duration::from_secs(30);

/// The merge stage: one worker owns the ledger and all staged files.
pub struct Merge {
    /// Everything comes here.
    pub input: Receiver<MergeInput>,
    /// Staged rows.
    pub staging: Staging,
    /// The books.
    pub ledger: Ledger,
    /// Asks encode for what it holds.
    pub requests: FlushRequests,
    /// Settings.
    pub settings: MergeSettings,
    /// Hears of types whose files hold rows of others.
    pub events: ExportEventSink,
    /// Rows of the tables, by which parse knows unchanged lines.
    pub known: Option<Arc<dyn LineIndexReport>>,
    /// Counters.
    pub counters: Counters,
    /// True if the run was stopped.
    pub stop: Cancellation,
}

/// A commit's outcome: the type, what became of it, what was surely not merged, seconds.
type Committed = (ResourceType, Result<Commit>, Option<Incoming>, f64);

/// Rows of each type that are to be staged before what is staged is persisted, and since when they are waited for.
type Flush = (BTreeMap<ResourceType, u64>, Instant);

impl Merge {
    /// Stages, and commits each type as it is complete, until the input ends.
    pub async fn run(mut self, done: tokio::sync::oneshot::Sender<MergeReport>) -> Result<()> {
        let mut ready: Vec<ResourceType> = Vec::new();
        let mut committing: FuturesUnordered<futures::future::BoxFuture<'static, Committed>> = FuturesUnordered::new();
        let mut in_flight: HashSet<ResourceType> = HashSet::new();
        let mut outcome = Ok(());
        let mut flush: Option<Flush> = None;
        let mut open = true;
        // Looking whether a type is complete goes through all files, so it is done now and then, not at every message:
        // an export may have twenty thousand files, and each of them several messages.
        let mut tick = tokio::time::interval(SETTLE_EVERY);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut settled = Instant::now();
        loop {
            // Strays may make a type commit again: not before its first commit is through.
            while committing.len() < self.settings.tables_at_once.max(1)
                && let Some(at) = ready.iter().position(|name| !in_flight.contains(name))
            {
                let name = ready.swap_remove(at);
                match self.commit_of(&name).await {
                    Ok(work) => {
                        in_flight.insert(name);
                        committing.push(work);
                    }
                    Err(error) => self.failed(&name, &error),
                }
            }
            if !open && committing.is_empty() && ready.is_empty() {
                break;
            }
            tokio::select! {
                input = self.input.recv(), if open => match input {
                    Some(parcel) => {
                        let input = parcel.into_inner();
                        if let Err(error) = self.take(input).await {
                            // Staging cannot go on (a full disk): the run ends, and nothing more is merged. The
                            // cancellation is pulled by whom this error is returned to, so that it is the run's cause.
                            outcome = Err(error);
                            open = false;
                            ready.clear();
                        }
                    }
                    None => open = false,
                },
                Some((name, result, left, seconds)) = committing.next() => {
                    in_flight.remove(&name);
                    self.record(&name, result, left, seconds);
                }
                _ = tick.tick() => {}
            }
            if outcome.is_ok() && (!open || settled.elapsed() >= SETTLE_EVERY) {
                self.settle(&mut ready);
                if open {
                    self.write_checkpoint(&mut flush).await;
                }
                settled = Instant::now();
            }
        }
        let report = self.close().await;
        // The pipeline may be gone already, when it failed elsewhere.
        let _ = done.send(report);
        outcome
    }

    /// Finds types that can commit or fail now, and asks encode for the rest of those that are parsed.
    fn settle(&mut self, ready: &mut Vec<ResourceType>) {
        if !self.ledger.all_ended() {
            return;
        }
        // Deletions may concern types that no file names.
        for name in self.staging.with_deletions() {
            self.ledger.staged(name, 0);
        }
        for name in self.ledger.types() {
            match self.ledger.completeness(&name) {
                Completeness::Parsed(rows) => self.requests.request(&name, rows),
                Completeness::Complete => {
                    self.ledger.committed(&name);
                    ready.push(name);
                }
                Completeness::Open | Completeness::Failed(_) | Completeness::Done => {}
            }
        }
    }

    /// Asks encode for its rows where it is time, and persists what is staged once that has come.
    async fn write_checkpoint(&mut self, flush: &mut Option<Flush>) {
        match flush {
            None if self.staging.is_due() => {
                let unstaged = self.ledger.unstaged();
                unstaged.iter().for_each(|(name, rows)| self.requests.request(name, *rows));
                *flush = Some((unstaged.into_iter().collect(), Instant::now()));
            }
            None => {}
            Some((unstaged, since)) => {
                unstaged.retain(|name, rows| {
                    let waits = self.ledger.staged_of(name).1 < *rows && !self.ledger.has_failed(name);
                    if !waits {
                        self.requests.withdraw(name);
                    }
                    waits
                });
                if !unstaged.is_empty() && since.elapsed() < FLUSH_FOR {
                    return;
                }
                unstaged.keys().for_each(|name| self.requests.withdraw(name));
                *flush = None;
                for (name, error) in self.staging.write_checkpoint(&self.ledger).await {
                    self.failed(&name, &error);
                }
            }
        }
    }

    async fn take(&mut self, input: MergeInput) -> Result<()> {
        match input {
            MergeInput::ControlEvent(fact) => {
                if matches!(fact, ControlEvent::Parsed(_) | ControlEvent::FileFinished(_)) {
                    self.staging.hear();
                }
                self.count(&fact);
                self.ledger.enter(fact);
                Ok(())
            }
            MergeInput::Deletions(ids) => self.staging.delete(ids).await,
            MergeInput::Unchanged(batch) => {
                let (name, rows) = (batch.resource_type.clone(), batch.rows.len() as u64);
                self.staging.unchanged(&batch).await.map_err(|error| error.at(name.to_string()))?;
                self.ledger.unchanged(&name, rows);
                self.counters.add(telemetry::STAGED, &name, rows);
                self.counters.add(telemetry::UNCHANGED, &name, rows);
                Ok(())
            }
            MergeInput::Batch(batch) => {
                let (name, rows) = (batch.resource_type.clone(), batch.keys.len() as u64);
                self.staging.stage(*batch).await.map_err(|error| error.at(name.to_string()))?;
                self.ledger.staged(&name, rows);
                self.counters.add(telemetry::STAGED, &name, rows);
                Ok(())
            }
        }
    }

    /// Counts the files that are to come, and those that need not come again.
    fn count(&mut self, fact: &ControlEvent) {
        let none = || telemetry::NO_TYPE.into();
        match fact {
            ControlEvent::Page(page) => {
                for file in page.files.iter().filter(|file| file.kind == FileKind::Output && !file.replayed) {
                    let label = file.declared.clone().unwrap_or_else(none);
                    self.counters.add(telemetry::FILES_EXPECTED, &label, 1);
                    self.counters.add(telemetry::RESOURCES_EXPECTED, &label, file.count.unwrap_or(0));
                }
            }
            ControlEvent::FileResumed(held) => {
                self.staging.hold(held);
                let label = self.ledger.declared(held.file).unwrap_or_else(none);
                self.counters.add(telemetry::FILES, &label, 1);
                count_lines(&self.counters, &label, held);
                for (name, rows) in &held.rows {
                    self.counters.add(telemetry::STAGED, name, *rows);
                }
            }
            ControlEvent::Parsed(chunk) => {
                let label = self.ledger.declared(chunk.file).unwrap_or_else(none);
                count_lines(&self.counters, &label, chunk);
            }
            _ => {}
        }
    }

    /// The work of committing a type, to be polled with the others'.
    async fn commit_of(&mut self, name: &ResourceType) -> Result<futures::future::BoxFuture<'static, Committed>> {
        let mut table = self.staging.table(name).await?;
        if self.staging.of(name).commits > 0 {
            table.refresh().await?;
        }
        self.staging.of(name).commits += 1;
        let earlier_commits = self.staging.of(name).commits - 1;
        if self.ledger.is_mixed(name) {
            (self.events)(&ExportEvent::UnrequestedType { resource_type: name })?;
        }
        let end = self.ledger.end_of(name);
        let hold = self.ledger.watermark_hold(name).filter(|_| end.is_some_and(|end| end.transaction_time.is_some()));
        let watermark = end.filter(|_| hold.is_none()).and_then(|end| {
            let knows_deletions = !end.full || self.settings.absent != NotMatchedBySource::Keep;
            let app_id = self.settings.app_id.clone();
            Some(Watermark { app_id, transaction_time: end.transaction_time?, knows_deletions })
        });
        // What comes of a type that was merged before is a part of it only: it takes nothing away.
        let merged = self.ledger.is_merged(name);
        let absent = if merged { NotMatchedBySource::Keep } else { self.settings.absent };
        if absent != NotMatchedBySource::Keep && table.version().is_some() {
            self.may_delete_absent(name, end)?;
        }
        let layout = layout_for(name, &self.settings.layout, table.schema()?.as_ref())?;
        let (incoming, deletions) = self.staging.take(name, &self.ledger).await?;
        let deletions = deletions.filter(|_| !merged);
        let deletions = deletions.unwrap_or_else(|| Deletions::new(&self.settings.scratch));
        // A deletion for a type with no table is no error, and no reason for one. A type that was asked
        // for gets its table though nothing came.
        let requested = end.is_some_and(|end| end.requested.contains(name));
        if table.version().is_none() && incoming.files.is_empty() && !requested {
            let name = name.clone();
            return Ok(Box::pin(async move { (name, Ok(Commit::Done(Merged::default(), Copies::new())), None, 0.0) }));
        }
        let mut upsert = Upsert {
            incoming,
            deletions,
            schema: Arc::new(arrow_schema(&layout)),
            add_columns: self.settings.layout.add_columns,
            watermark,
            order: self.settings.order,
            absent,
            scratch: Scratch { folder: self.settings.scratch.clone(), memory: self.settings.match_memory },
            settings: self.settings.table.clone(),
            info: info(&self.settings, end),
            run: self.settings.run.clone(),
            earlier_commits,
        };
        let name = name.clone();
        let span = tracing::info_span!("commit", resource_type = %name);
        Ok(Box::pin(async move {
            let started = Instant::now();
            let done = compute(span, async move {
                let result = upsert.commit(&mut table).await;
                let is_open = !matches!(result, Ok(Commit::Done(..) | Commit::Unknown { .. }));
                (result, is_open.then_some(upsert.incoming))
            });
            let (result, left) = done.await.unwrap_or_else(|error| (Err(error), None));
            (name, result, left, started.elapsed().as_secs_f64())
        }))
    }

    /// Rows may be deleted for being absent only where it is certain that the export names all there are.
    fn may_delete_absent(&self, name: &ResourceType, end: Option<&ExportEnd>) -> Result<()> {
        let bad = self.ledger.bad(name);
        let why = match end {
            Some(end) if !end.full => "the export is not a full one".to_owned(),
            Some(end) if self.ledger.has_errors(end.export) => "the server reports errors of its export".to_owned(),
            None => "the export did not say its last".to_owned(),
            _ if bad > 0 => format!("{bad} lines could not be read"),
            _ if self.ledger.rows_of_export(name) == 0 => "the export brings no resource of the type".to_owned(),
            _ => return Ok(()),
        };
        let why = format!("rows not in the export would be deleted, but {why}; the table is unchanged");
        Err(Error::new(ErrorKind::Data, why)
            .with_hint("mend the export, or run once with --set stages.merge.mode=merge"))
    }

    fn record(&mut self, name: &ResourceType, result: Result<Commit>, left: Option<Incoming>, seconds: f64) {
        let began = self.settings.began;
        let stage = self.staging.of(name);
        stage.outcome.merge_seconds += seconds;
        stage.outcome.seconds = began.elapsed().as_secs_f64();
        match (&result, left) {
            (Ok(Commit::Done(..)), _) => self.staging.merged(name),
            (_, Some(left)) => self.staging.put_back(name, left),
            // Its files may be in the table: they stay where they are.
            (_, None) => {}
        }
        if let Err(error) = &result {
            self.staging.spoilt(name, error);
        }
        match result {
            Ok(Commit::Done(merged, copies)) => {
                self.count_copies(name, &copies);
                let rows = merged.inserted + merged.updated + merged.skipped;
                self.counters.add(telemetry::COMMITTED, name, rows);
                let outcome = &mut self.staging.of(name).outcome;
                outcome.inserted += merged.inserted;
                outcome.updated += merged.updated;
                outcome.deleted += merged.deleted;
                outcome.skipped += merged.skipped;
                outcome.unchanged += merged.unchanged;
                outcome.undated += merged.undated;
                outcome.bytes_written += merged.bytes_written;
                outcome.committed |= merged.committed;
                outcome.version = merged.version.or(outcome.version);
                tracing::info!(
                    resource_type = %name, version = merged.version, inserted = merged.inserted,
                    updated = merged.updated,
                    deleted = merged.deleted, skipped = merged.skipped, unchanged = merged.unchanged, seconds,
                    "{}", if merged.committed { "committed" } else { "nothing to commit" }
                );
            }
            Ok(Commit::Unknown { error }) => {
                let why = format!("{error}; the outcome of the commit is unknown, so its files are kept");
                self.failed(name, &Error::new(error.kind(), why));
            }
            Ok(Commit::Stale { table }) => {
                let error = Error::new(
                    ErrorKind::Table,
                    format!(
                        "the export's transactionTime is older than the table's ({}); it was not merged",
                        instant_text(table)
                    ),
                );
                self.failed(name, &error);
            }
            Err(error) => self.failed(name, &error),
        }
    }

    /// Reports resources that came more than once, where they are many: a server may write the same rows into several
    /// files.
    fn count_copies(&mut self, name: &ResourceType, copies: &Copies) {
        let of = &mut self.staging.of(name).outcome.copies;
        for (file, count) in copies {
            let file = self.ledger.file_name(*file).unwrap_or("a file").to_owned();
            *of.entry(file).or_default() += count;
        }
    }

    fn failed(&mut self, name: &ResourceType, error: &Error) {
        tracing::error!(resource_type = %name, %error, hint = error.advice(), "the type failed");
        self.staging.of(name).outcome.error.get_or_insert(error.to_string());
        self.ledger.fail(name, error.to_string());
    }

    /// Removes what was staged and not merged, or leaves it to the next run, and draws up the report.
    async fn close(mut self) -> MergeReport {
        let unfinished = self.ledger.unfinished();
        let mut all = self.ledger.all_ended() && self.ledger.types().iter().all(|name| !unfinished.contains(name));
        for name in self.ledger.types() {
            let known = self.staging.of(&name).outcome.error.is_some();
            all &= !known;
            if let Completeness::Failed(why) = self.ledger.completeness(&name) {
                all = false;
                let hint = match (why.contains("bad lines"), why.starts_with("file ")) {
                    (true, _) => ErrorKind::Data.advice(),
                    (_, true) => "run again once the file is complete; its table is unchanged",
                    (_, false) => "the type is as it was; the words above say why it did not come",
                };
                if !known {
                    self.failed(&name, &Error::new(ErrorKind::Data, why).with_hint(hint));
                }
            } else if unfinished.contains(&name) && !known {
                let why = if self.stop.is_requested() { STOPPED } else { "its export did not come to its end" };
                self.staging.of(&name).outcome.error = Some(why.to_owned());
            }
        }
        let outcomes = self.staging.end(&self.ledger, !all).await;
        let transaction_time = self.ledger.transaction_time();
        let looked_up = self.known.as_ref().map(|known| known.report()).unwrap_or_default();
        let types = outcomes.into_iter().map(|(name, mut outcome)| {
            outcome.files = self.ledger.files_of(&name);
            outcome.quarantined = self.ledger.bad(&name);
            outcome.answered_for = self.ledger.is_answered_for(&name);
            outcome.watermark_hold = self.ledger.watermark_hold(&name).filter(|_| outcome.error.is_none());
            outcome.line_index = looked_up.get(&name).map(|how| (*how).to_owned());
            report_copies(&self.counters, &name, &mut outcome);
            (name.to_string(), outcome)
        });
        let types: BTreeMap<String, TypeOutcome> = types.collect();
        let mut held = self.ledger.types();
        held.retain(|name| self.ledger.watermark_hold(name).is_some());
        MergeReport {
            types,
            exports: self.ledger.exports(),
            count_findings: self.ledger.count_findings(),
            files_failed: self.ledger.files_failed(),
            files_gone: self.ledger.all_failed_are_gone(),
            whole: self.ledger.all_ended(),
            other_bad: self.ledger.other_bad(),
            replayed: self.ledger.replayed(),
            held,
            transaction_time,
        }
    }
}

/// Says of a type that many of its resources came more than once; of few, nothing: an export is no snapshot.
fn report_copies(counters: &Counters, name: &ResourceType, outcome: &mut TypeOutcome) {
    let copies: u64 = outcome.copies.values().sum();
    if copies < LEAST_COPIES || copies * 10 < outcome.resources {
        outcome.copies.clear();
        return;
    }
    let files: Vec<&str> = outcome.copies.keys().take(SHOWN_FILES).map(String::as_str).collect();
    tracing::warn!(
        resource_type = %name, copies, resources = outcome.resources, files = files.join(", "),
        of_files = outcome.copies.len(),
        "the server sent duplicate resources"
    );
    counters.add(telemetry::DEVIATIONS, &"the same resources came more than once".into(), copies);
}

/// Copies of resources within a run below which nothing is said, and files that are named in a log.
const LEAST_COPIES: u64 = 10;
const SHOWN_FILES: usize = 8;

/// Counts what a file's lines were.
fn count_lines(counters: &Counters, declared: &ResourceType, lines: &ParsedChunk) {
    for (name, rows) in &lines.rows {
        counters.add(telemetry::PARSED, name, *rows);
    }
    for (name, count) in &lines.excluded {
        counters.add(telemetry::EXCLUDED, name, *count);
    }
    for (name, count) in &lines.bad {
        counters.add(telemetry::BAD_LINES, name.as_ref().unwrap_or(&telemetry::NO_TYPE.into()), *count);
    }
    counters.add(telemetry::BYTES, declared, lines.bytes);
}

fn info(settings: &MergeSettings, end: Option<&ExportEnd>) -> BTreeMap<String, Value> {
    let mut info = commit_info(&settings.pipeline, &settings.run);
    if let Some(time) = end.and_then(|end| end.transaction_time) {
        info.insert("transactionTime".to_owned(), json!(instant_text(time)));
    }
    info
}
