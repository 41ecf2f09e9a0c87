//! Row groups → staged files → one commit a table.
//!
//! Staging never waits for a commit; `tables_at_once` limits matching and committing only.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::stream::{FuturesUnordered, StreamExt};
use object_store::path::Path;
use serde_json::{Value, json};

use super::ledger::{Ledger, Standing};
pub use super::outcome::{MergeReport, TypeOutcome};
use crate::delta::{
    Absent, Commit, Deletions, Merged, Scratch, StagedFile, StagingFile, Table, TableSettings, Tables, Upsert, Watermark,
    commit_info,
};
use crate::error::{Error, ErrorKind, Result};
use crate::flow::{Board, Receiver, Stop, compute};
use crate::messages::{EncodedBatch, ExportEnd, FlushRequests, MergeInput, ResourceType, instant_text};
use crate::schema::{LayoutOptions, MAX_LOSS_PATHS, arrow_schema, layout_for};
use crate::telemetry;

/// How often merge looks whether a type is complete.
const SETTLE_EVERY: Duration = Duration::from_millis(15);

/// How merge is set.
#[derive(Debug, Clone)]
pub struct MergeSettings {
    /// Pipeline's name, for the commit's info and the watermark.
    pub pipeline: String,
    /// The run's id: names its files.
    pub run: String,
    /// Application id of the watermark: pipeline and scope.
    pub app_id: String,
    /// How many tables are matched and committed at the same time.
    pub tables_at_once: usize,
    /// Rows of equal version are compared and rewritten where they differ.
    pub full_refresh: bool,
    /// What becomes of rows that the run does not bring.
    pub absent: Absent,
    /// Bytes at which a staged file is closed.
    pub target_file_bytes: u64,
    /// Bytes that the open files' footers and buffers may take before the largest is closed.
    pub max_open_files: usize,
    /// Bytes of memory that the keys of staged rows may take.
    pub keys_in_memory: usize,
    /// Bytes of memory that matching one table may take.
    pub match_memory: usize,
    /// Folder for keys beyond that.
    pub scratch: PathBuf,
    /// Layout of tables that are created.
    pub layout: LayoutOptions,
    /// Setup of tables that are created.
    pub table: TableSettings,
    /// Kick-offs of the run.
    pub exports: usize,
    /// When the run began.
    pub began: Instant,
}

/// A type's staged rows.
#[derive(Default)]
struct TypeStage {
    open: Option<StagingFile>,
    staged: Vec<StagedFile>,
    deletions: Option<Deletions>,
    /// Commits that the run has begun to the type's table.
    commits: usize,
    outcome: TypeOutcome,
}

impl TypeStage {
    /// Bytes of memory that the keys of staged rows take.
    fn keys_memory(&self) -> usize {
        self.open.as_ref().map_or(0, StagingFile::keys_memory) + self.closed_keys_memory()
    }

    fn closed_keys_memory(&self) -> usize {
        let deletions = self.deletions.as_ref().map_or(0, Deletions::memory);
        self.staged.iter().map(StagedFile::keys_memory).sum::<usize>() + deletions
    }

    fn put_keys_on_disk(&mut self) -> Result<()> {
        if let Some(deletions) = &mut self.deletions {
            deletions.put_on_disk()?;
        }
        self.staged.iter_mut().try_for_each(StagedFile::put_keys_on_disk)
    }
}

/// The merge stage: one worker owns the books and all staged files.
pub struct Merge {
    /// Everything comes here.
    pub input: Receiver<MergeInput>,
    /// The tables.
    pub tables: Tables,
    /// Tables by type, as they were opened before the run; others are opened when their rows come.
    pub opened: HashMap<ResourceType, Table>,
    /// The books.
    pub ledger: Ledger,
    /// Asks encode for what it holds.
    pub requests: FlushRequests,
    /// Settings.
    pub settings: MergeSettings,
    /// Counters.
    pub board: Board,
    /// Whether the run was stopped.
    pub stop: Stop,
}

type Committed = (ResourceType, Result<Commit>, f64);

impl Merge {
    /// Stages, and commits each type as it is complete, until the input ends.
    pub async fn run(mut self, done: tokio::sync::oneshot::Sender<MergeReport>) -> Result<()> {
        let mut stages: BTreeMap<ResourceType, TypeStage> = BTreeMap::new();
        let mut ready: Vec<ResourceType> = Vec::new();
        let mut committing: FuturesUnordered<futures::future::BoxFuture<'static, Committed>> = FuturesUnordered::new();
        let mut in_flight: HashSet<ResourceType> = HashSet::new();
        let mut outcome = Ok(());
        let mut files = 0usize;
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
                let stage = stages.entry(name.clone()).or_default();
                match self.commit_of(&name, stage).await {
                    Ok(work) => {
                        in_flight.insert(name);
                        committing.push(work);
                    }
                    Err(error) => self.failed(&name, stage, &error),
                }
            }
            if !open && committing.is_empty() && ready.is_empty() {
                break;
            }
            tokio::select! {
                input = self.input.recv(), if open => match input {
                    Some(parcel) => {
                        let input = parcel.into_inner();
                        if let Err(error) = self.take(input, &mut stages, &mut files).await {
                            // Staging cannot go on (a full disk): the run ends, its files are removed.
                            outcome = Err(error);
                            open = false;
                            self.stop.pull();
                        }
                    }
                    None => open = false,
                },
                Some((name, result, seconds)) = committing.next() => {
                    in_flight.remove(&name);
                    let stage = stages.entry(name.clone()).or_default();
                    self.record(&name, stage, result, seconds);
                }
                _ = tick.tick() => {}
            }
            if outcome.is_ok() && (!open || settled.elapsed() >= SETTLE_EVERY) {
                self.settle(&stages, &mut ready);
                settled = Instant::now();
            }
        }
        let report = self.close(stages).await;
        // The pipeline may be gone already, when it failed elsewhere.
        let _ = done.send(report);
        outcome
    }

    /// Finds types that can commit or fail now, and asks encode for the rest of those that are parsed.
    fn settle(&mut self, stages: &BTreeMap<ResourceType, TypeStage>, ready: &mut Vec<ResourceType>) {
        if !self.ledger.all_ended() {
            return;
        }
        // Deletions may concern types that no file names.
        for (name, stage) in stages {
            if stage.deletions.is_some() {
                self.ledger.staged(name, 0);
            }
        }
        for name in self.ledger.types() {
            match self.ledger.standing(&name) {
                Standing::Parsed(rows) => self.requests.request(&name, rows),
                Standing::Complete => {
                    self.ledger.committed(&name);
                    ready.push(name);
                }
                Standing::Open | Standing::Failed(_) | Standing::Done => {}
            }
        }
    }

    async fn take(&mut self, input: MergeInput, stages: &mut BTreeMap<ResourceType, TypeStage>, files: &mut usize) -> Result<()> {
        match input {
            MergeInput::Fact(fact) => self.ledger.enter(fact),
            MergeInput::Deletions(ids) => {
                for (name, id) in ids {
                    let deletions = &mut stages.entry(name).or_default().deletions;
                    deletions.get_or_insert_with(|| Deletions::new(&self.settings.scratch)).push(id)?;
                }
                self.keep_to_memory(stages).await?;
            }
            MergeInput::Batch(batch) => {
                let name = batch.resource_type.clone();
                self.stage(*batch, stages, files).await.map_err(|error| error.at(name.to_string()))?;
            }
        }
        Ok(())
    }

    async fn stage(
        &mut self,
        mut batch: EncodedBatch,
        stages: &mut BTreeMap<ResourceType, TypeStage>,
        files: &mut usize,
    ) -> Result<()> {
        let name = batch.resource_type.clone();
        self.table(&name).await?;
        let table = &self.opened[&name];
        let rows = batch.keys.len() as u64;
        let stage = stages.entry(name.clone()).or_default();
        stage.outcome.resources += rows;
        stage.outcome.bytes += batch.json_bytes;
        for (path, count) in std::mem::take(&mut batch.losses) {
            let not_held = &mut stage.outcome.not_held;
            // Batches bring paths of their own: a server that invents members must not fill the report with them.
            let path = if not_held.len() < MAX_LOSS_PATHS || not_held.contains_key(&path) { path } else { format!("{name}.?") };
            *not_held.entry(path).or_default() += count;
        }
        if let Some(full) = stage.open.take_if(|file| !file.takes(&batch.filled)) {
            stage.staged.push(full.close(table).await?);
        }
        let file = match &mut stage.open {
            Some(file) => file,
            none => {
                *files += 1;
                let path = Path::from(format!("part-{}-{files:05}.zstd.parquet", self.settings.run));
                none.insert(StagingFile::create(table, path, batch.filled.clone(), &self.settings.scratch).await?)
            }
        };
        file.append(batch).await?;
        let is_full = file.size() >= self.settings.target_file_bytes;
        if is_full && let Some(file) = stage.open.take() {
            stage.staged.push(file.close(table).await?);
        }
        self.ledger.staged(&name, rows);
        self.board.add(telemetry::STAGED, &name, rows);
        // Open files share a budget: when it is spent, the largest is closed.
        while stages.values().filter(|stage| stage.open.is_some()).count() > self.settings.max_open_files.max(1) {
            let open = stages.iter_mut().filter(|(_, stage)| stage.open.is_some());
            let largest = open.max_by_key(|(_, stage)| stage.open.as_ref().map_or(0, StagingFile::size));
            let Some((name, stage)) = largest else { break };
            let Some(file) = stage.open.take() else { break };
            stage.staged.push(file.close(&self.opened[name]).await?);
        }
        self.keep_to_memory(stages).await
    }

    /// Keys of staged rows beyond the budget go to disk: those of closed files first, then of the file that has most,
    /// which is closed.
    async fn keep_to_memory(&mut self, stages: &mut BTreeMap<ResourceType, TypeStage>) -> Result<()> {
        while stages.values().map(TypeStage::keys_memory).sum::<usize>() > self.settings.keys_in_memory {
            let Some((name, stage)) = stages.iter_mut().max_by_key(|(_, stage)| stage.keys_memory()) else { break };
            if stage.closed_keys_memory() == 0
                && let Some(file) = stage.open.take()
            {
                stage.staged.push(file.close(&self.opened[name]).await?);
            }
            let mut keys = std::mem::take(stage);
            let (kept, result) = compute(tracing::Span::current(), async move {
                let result = keys.put_keys_on_disk();
                (keys, result)
            })
            .await?;
            *stage = kept;
            result?;
        }
        Ok(())
    }

    /// Makes sure that the type's table is opened.
    async fn table(&mut self, name: &ResourceType) -> Result<()> {
        if !self.opened.contains_key(name) {
            let table = self.tables.open(name).await?;
            table.check_writable()?;
            self.opened.insert(name.clone(), table);
        }
        Ok(())
    }

    /// The work of committing a type, to be polled with the others'.
    async fn commit_of(
        &mut self,
        name: &ResourceType,
        stage: &mut TypeStage,
    ) -> Result<futures::future::BoxFuture<'static, Committed>> {
        self.table(name).await?;
        let mut table = self.opened[name].clone();
        if stage.commits > 0 {
            table.refresh().await?;
        }
        stage.commits += 1;
        if let Some(file) = stage.open.take() {
            stage.staged.push(file.close(&table).await?);
        }
        let end = self.ledger.end_of(name);
        let watermark = end
            .filter(|end| !self.ledger.holds_watermark(end.export))
            .and_then(|end| end.transaction_time)
            .map(|transaction_time| Watermark { app_id: self.settings.app_id.clone(), transaction_time });
        // What comes of a type that was merged before is a part of it only: it takes nothing away.
        let merged = self.ledger.is_merged(name);
        let absent = if merged { Absent::Stay } else { self.settings.absent };
        if absent != Absent::Stay && table.version().is_some() {
            self.may_delete_absent(name, end)?;
        }
        let files = std::mem::take(&mut stage.staged);
        let deletions = stage.deletions.take().filter(|_| !merged);
        let deletions = deletions.unwrap_or_else(|| Deletions::new(&self.settings.scratch));
        // A deletion for a type with no table is no error, and no reason for one. A type that was asked
        // for gets its table though nothing came.
        let asked = end.is_some_and(|end| end.asked.contains(name));
        if table.version().is_none() && files.is_empty() && !asked {
            let name = name.clone();
            return Ok(Box::pin(async move { (name, Ok(Commit::Done(Merged::default())), 0.0) }));
        }
        let layout = layout_for(name, &self.settings.layout, table.schema()?.as_ref())?;
        let upsert = Upsert {
            files,
            deletions,
            schema: Arc::new(arrow_schema(&layout)),
            add_columns: self.settings.layout.add_columns,
            watermark,
            full_refresh: self.settings.full_refresh,
            absent,
            scratch: Scratch { folder: self.settings.scratch.clone(), memory: self.settings.match_memory },
            settings: self.settings.table.clone(),
            info: info(&self.settings, end),
            run: self.settings.run.clone(),
            earlier_commits: stage.commits - 1,
        };
        let name = name.clone();
        let span = tracing::info_span!("commit", resource_type = %name);
        Ok(Box::pin(async move {
            let started = Instant::now();
            let result = compute(span, async move {
                let result = upsert.commit(&mut table).await;
                if !matches!(result, Ok(Commit::Done(_) | Commit::Unknown { .. })) {
                    for file in &upsert.files {
                        file.discard(&table).await;
                    }
                }
                result
            })
            .await
            .and_then(|result| result);
            (name, result, started.elapsed().as_secs_f64())
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
        let why = format!("what the export does not name would be deleted, but {why}; nothing was changed");
        Err(Error::new(ErrorKind::Data, why).with_hint("mend the export, or run once with --set stages.merge.mode=merge"))
    }

    fn record(&mut self, name: &ResourceType, stage: &mut TypeStage, result: Result<Commit>, seconds: f64) {
        stage.outcome.merge_seconds += seconds;
        stage.outcome.seconds = self.settings.began.elapsed().as_secs_f64();
        match result {
            Ok(Commit::Done(merged)) => {
                let outcome = &mut stage.outcome;
                outcome.inserted += merged.inserted;
                outcome.updated += merged.updated;
                outcome.deleted += merged.deleted;
                outcome.skipped += merged.skipped;
                outcome.bytes_written += merged.bytes_written;
                outcome.committed |= merged.committed;
                outcome.version = merged.version.or(outcome.version);
                tracing::info!(
                    resource_type = %name, version = merged.version, inserted = merged.inserted, updated = merged.updated,
                    deleted = merged.deleted, skipped = merged.skipped, seconds,
                    "{}", if merged.committed { "committed" } else { "nothing to commit" }
                );
            }
            Ok(Commit::Unknown { error }) => {
                let why = format!("{error}; whether the commit was made could not be found out, so its files are kept");
                self.failed(name, stage, &Error::new(error.kind(), why));
            }
            Ok(Commit::Stale { table }) => {
                let error = Error::new(
                    ErrorKind::Table,
                    format!(
                        "the export's transactionTime is older than the table's ({}); it was not merged",
                        instant_text(table)
                    ),
                );
                self.failed(name, stage, &error);
            }
            Err(error) => self.failed(name, stage, &error),
        }
    }

    fn failed(&mut self, name: &ResourceType, stage: &mut TypeStage, error: &Error) {
        tracing::error!(resource_type = %name, %error, hint = error.hint(), "the type failed");
        stage.outcome.error.get_or_insert(error.to_string());
        self.ledger.fail(name, error.to_string());
    }

    /// Removes what was staged and not committed, and draws up the report.
    async fn close(mut self, mut stages: BTreeMap<ResourceType, TypeStage>) -> MergeReport {
        let unfinished = self.ledger.unfinished();
        for name in self.ledger.types() {
            let stage = stages.entry(name.clone()).or_default();
            if let Standing::Failed(why) = self.ledger.standing(&name)
                && stage.outcome.error.is_none()
            {
                let about_lines = why.contains("bad lines");
                let error = Error::new(ErrorKind::Data, why);
                let hint = "run again once the file is whole; its type is as it was";
                self.failed(&name, stage, &if about_lines { error } else { error.with_hint(hint) });
            } else if unfinished.contains(&name) && stage.outcome.error.is_none() {
                let why = if self.stop.is_pulled() { "stopped before all of it came" } else { "not all of it came" };
                stage.outcome.error = Some(why.to_owned());
            }
        }
        for (name, stage) in &mut stages {
            if let Some(file) = stage.open.take() {
                file.discard().await;
            }
            if let Some(table) = self.opened.get(name) {
                for file in stage.staged.drain(..) {
                    file.discard(table).await;
                }
                table.remove_empty_folder();
            }
        }
        let transaction_time = self.ledger.types().iter().filter_map(|name| self.ledger.end_of(name)?.transaction_time).min();
        let types = stages.into_iter().map(|(name, mut stage)| {
            stage.outcome.files = self.ledger.files_of(&name);
            stage.outcome.quarantined = self.ledger.bad(&name);
            (name.to_string(), stage.outcome)
        });
        let watermark_held = (0..self.settings.exports).any(|export| self.ledger.holds_watermark(export));
        MergeReport {
            types: types.collect(),
            count_findings: self.ledger.count_findings(),
            whole: self.ledger.all_ended(),
            other_bad: self.ledger.other_bad(),
            replayed: self.ledger.replayed(),
            watermark_held,
            transaction_time,
        }
    }
}

fn info(settings: &MergeSettings, end: Option<&ExportEnd>) -> BTreeMap<String, Value> {
    let mut info = commit_info(&settings.pipeline, &settings.run);
    if let Some(time) = end.and_then(|end| end.transaction_time) {
        info.insert("transactionTime".to_owned(), json!(instant_text(time)));
    }
    info
}
