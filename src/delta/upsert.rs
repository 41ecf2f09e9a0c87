//! What a run brings for one type, merged into its table in one commit (DESIGN section 5).

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use arrow::datatypes::Schema;
use deltalake::DeltaTableError;
use deltalake::kernel::transaction::{CommitBuilder, CommitProperties, TransactionError};
use deltalake::kernel::{Action, Add, Remove, Transaction};
use deltalake::operations::create::CreateBuilder;
use deltalake::protocol::{DeltaOperation, SaveMode};
use futures::TryStreamExt;
use object_store::ObjectStoreExt;
use object_store::path::Path;
use roaring::RoaringTreemap;
use serde_json::{Value, json};

use super::absent::{self, Absent};
use super::adds::{loose_bounds, rewrite, staged_add};
use super::content::row_hashes;
use super::keys::{ByKey, DataFile, Match, find, rows, selection};
use super::order::{Verdict, judge};
use super::staging::StagedFile;
use super::table::{Table, TableSettings, delta_schema, storage};
use super::vectors;
use crate::error::{Error, ErrorKind, Result};

/// How often a match is made again when another writer committed in between.
pub(super) const MAX_ATTEMPTS: usize = 10;

/// The server's `transactionTime` as an application transaction of the table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Watermark {
    /// Pipeline and scope.
    pub app_id: String,
    /// Microseconds since the epoch.
    pub transaction_time: i64,
}

/// What a run brings for one type.
#[derive(Debug)]
pub struct Upsert {
    /// Staged files.
    pub files: Vec<StagedFile>,
    /// Keys of resources that are gone.
    pub deletions: Vec<u128>,
    /// Schema for a table that does not exist yet.
    pub schema: Arc<Schema>,
    /// Watermark to set; `None` leaves it.
    pub watermark: Option<Watermark>,
    /// Rewrites rows of equal version whose content differs.
    pub full_refresh: bool,
    /// What becomes of rows that the run does not bring.
    pub absent: Absent,
    /// For a table that does not exist yet.
    pub settings: TableSettings,
    /// Further members of the commit's info; `run` among them tells whose commit it is.
    pub info: BTreeMap<String, Value>,
    /// The run's id: names the files that a commit writes, so that a later run knows what a killed one left.
    pub run: String,
}

/// What a merge did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Merged {
    /// Resources that the table did not have.
    pub inserted: u64,
    /// Resources that replaced an older copy.
    pub updated: u64,
    /// Resources that were deleted.
    pub deleted: u64,
    /// Resources that the table has as new or newer, and copies within the run that lost.
    pub skipped: u64,
    /// The table's version after it.
    pub version: Option<u64>,
    /// Whether it made a commit.
    pub committed: bool,
    /// Bytes of data files and deletion vectors that the commit added.
    pub bytes_written: u64,
}

/// The outcome of a commit.
#[derive(Debug)]
pub enum Commit {
    /// It is in the table.
    Done(Merged),
    /// The commit failed in a way that leaves open whether it was made: its files must stay.
    Unknown {
        /// What went wrong.
        error: Error,
    },
    /// The table's watermark is newer than this export: nothing was changed.
    Stale {
        /// The table's `transactionTime`, microseconds since the epoch.
        table: i64,
    },
}

/// Rows to be marked, before any file is written.
#[derive(Default)]
struct Plan {
    merged: Merged,
    /// By data file of the table.
    gone: BTreeMap<usize, RoaringTreemap>,
    /// By staged file.
    staged_gone: Vec<RoaringTreemap>,
}

struct TargetFile {
    data: DataFile,
    rows: Option<u64>,
    add: Add,
    remove: Remove,
}

impl Upsert {
    /// Matches, marks and commits; matches again when another writer was faster.
    pub async fn commit(&self, table: &mut Table) -> Result<Commit> {
        let started = Instant::now();
        for attempt in 1.. {
            if let Some(watermark) = &self.watermark
                && let Some(newest) = table.transaction(&watermark.app_id).await?
                && newest > watermark.transaction_time
            {
                return Ok(Commit::Stale { table: newest });
            }
            let targets = targets(table)?;
            let plan = self.plan(table, &targets).await?;
            match self.write(table, targets, plan, (started, attempt)).await? {
                Written::Done(merged) => return Ok(Commit::Done(merged)),
                Written::Unknown(error) => return Ok(Commit::Unknown { error }),
                Written::Conflict if attempt < MAX_ATTEMPTS => {
                    tracing::info!(resource_type = %table.resource_type, attempt, "another writer committed first; matching again");
                    table.refresh().await?;
                }
                Written::Conflict => break,
            }
        }
        Err(Error::new(ErrorKind::Table, format!("other writers committed first {MAX_ATTEMPTS} times in a row")))
    }

    async fn plan(&self, table: &Table, targets: &[TargetFile]) -> Result<Plan> {
        let mut plan = Plan { staged_gone: vec![RoaringTreemap::new(); self.files.len()], ..Plan::default() };
        // Among the run's own copies the newest wins.
        let rows = self.files.iter().map(|file| file.keys.len()).sum();
        let mut winners: ByKey<(u32, u32)> = ByKey::with_capacity_and_hasher(rows, Default::default());
        let key_at = |(file, row): (u32, u32)| &self.files[file as usize].keys[row as usize];
        for (file, staged) in self.files.iter().enumerate() {
            for (row, key) in staged.keys.iter().enumerate() {
                let candidate = (file as u32, row as u32);
                let Some(best) = winners.get_mut(&key.key) else {
                    winners.insert(key.key, candidate);
                    continue;
                };
                let newer = key.rank() > key_at(*best).rank();
                let loser = if newer { std::mem::replace(best, candidate) } else { candidate };
                plan.staged_gone[loser.0 as usize].insert(u64::from(loser.1));
                plan.merged.skipped += 1;
            }
        }
        if let Absent::Replace(most) = self.absent {
            let found = absent::find(table, targets.iter().map(|target| &target.data), &winners, most).await?;
            plan.merged.deleted = found.absent.iter().map(RoaringTreemap::len).sum();
            plan.merged.updated = found.live - plan.merged.deleted;
            plan.merged.inserted = (winners.len() as u64).saturating_sub(plan.merged.updated);
            for (index, rows) in found.rows.into_iter().enumerate() {
                plan.gone.entry(index).or_default().insert_range(0..rows);
            }
            return Ok(plan);
        }
        // An id that is both deleted and in the output is kept.
        let mut deletions: ByKey<bool> = ByKey::default();
        deletions.extend(self.deletions.iter().filter(|key| !winners.contains_key(key)).map(|key| (*key, false)));

        let mut matches: ByKey<Vec<Match>> = ByKey::default();
        if !(winners.is_empty() && deletions.is_empty()) {
            for (index, target) in targets.iter().enumerate() {
                let wanted = |key| winners.contains_key(&key) || deletions.contains_key(&key);
                for found in find(&table.store(), index, &target.data, wanted).await? {
                    matches.entry(found.key.key).or_default().push(found);
                }
            }
        }
        let mut undecided = Vec::new();
        for (key, copies) in &matches {
            let mark = |plan: &mut Plan, copy: &Match| {
                plan.gone.entry(copy.file).or_default().insert(copy.row);
            };
            let Some(winner) = winners.get(key).copied() else {
                copies.iter().for_each(|copy| mark(&mut plan, copy));
                plan.merged.deleted += 1;
                continue;
            };
            // A table may hold an id twice, by the recipe's doing: the best copy stays at most.
            let Some(best) = copies.iter().max_by_key(|copy| copy.key.rank()) else { continue };
            copies.iter().filter(|copy| (copy.file, copy.row) != (best.file, best.row)).for_each(|copy| mark(&mut plan, copy));
            let (file, row) = (winner.0 as usize, u64::from(winner.1));
            match judge(key_at(winner), &best.key, self.full_refresh) {
                Verdict::Newer => {
                    mark(&mut plan, best);
                    plan.merged.updated += 1;
                }
                Verdict::Older => {
                    plan.staged_gone[file].insert(row);
                    plan.merged.skipped += 1;
                }
                Verdict::Compare => undecided.push((file, row, *best)),
            }
        }
        plan.merged.inserted = (winners.len() - matches.keys().filter(|key| winners.contains_key(key)).count()) as u64;
        self.compare(table, targets, undecided, &mut plan).await?;
        if let Absent::Delete(most) = self.absent {
            let found = absent::find(table, targets.iter().map(|target| &target.data), &winners, most).await?;
            for (index, absent) in found.absent.into_iter().enumerate().filter(|(_, absent)| !absent.is_empty()) {
                // Those that the manifest deletes too were counted.
                let gone = plan.gone.entry(index).or_default();
                plan.merged.deleted += absent.len() - absent.intersection_len(gone);
                *gone |= absent;
            }
        }
        Ok(plan)
    }

    /// Reads the rows that only their content can tell apart: equal ones are skipped.
    async fn compare(
        &self,
        table: &Table,
        targets: &[TargetFile],
        undecided: Vec<(usize, u64, Match)>,
        plan: &mut Plan,
    ) -> Result<()> {
        let mut by_staged: BTreeMap<usize, BTreeMap<u64, u128>> = BTreeMap::new();
        let mut by_target: BTreeMap<usize, BTreeMap<u64, u128>> = BTreeMap::new();
        for (file, row, best) in &undecided {
            by_staged.entry(*file).or_default().insert(*row, 0);
            by_target.entry(best.file).or_default().insert(best.row, 0);
        }
        for (file, wanted) in &mut by_staged {
            hash_rows(table, &self.files[*file].path, self.files[*file].size, wanted).await?;
        }
        for (file, wanted) in &mut by_target {
            hash_rows(table, &targets[*file].data.path, targets[*file].data.size, wanted).await?;
        }
        for (file, row, best) in undecided {
            if by_staged[&file][&row] == by_target[&best.file][&best.row] {
                plan.staged_gone[file].insert(row);
                plan.merged.skipped += 1;
            } else {
                plan.gone.entry(best.file).or_default().insert(best.row);
                plan.merged.updated += 1;
            }
        }
        Ok(())
    }

    /// Writes what the plan needs and commits. `begun` is when, and the number of the attempt.
    async fn write(&self, table: &mut Table, targets: Vec<TargetFile>, plan: Plan, begun: (Instant, usize)) -> Result<Written> {
        let mut merged = plan.merged;
        let with_vectors = if table.version().is_some() { table.has_deletion_vectors() } else { self.settings.deletion_vectors };
        let mut out = Actions::default();
        let mut marked: Vec<(Add, RoaringTreemap)> = Vec::new();
        for (index, gone) in &plan.gone {
            let target = &targets[*index];
            let all_gone = &target.data.gone | gone;
            out.removes.push(target.remove.clone());
            if target.rows == Some(all_gone.len()) {
                continue;
            }
            if with_vectors {
                marked.push((target.add.clone(), all_gone));
            } else {
                let add = rewrite(table, (&target.data.path, target.data.size), &all_gone, target.rows, &self.run).await?;
                out.new_files.push(Path::from(add.path.as_str()));
                out.adds.push(add);
            }
        }
        for (staged, gone) in self.files.iter().zip(&plan.staged_gone) {
            let total = staged.keys.len() as u64;
            if gone.len() == total {
                continue;
            }
            let add = staged_add(staged);
            if gone.is_empty() {
                merged.bytes_written += staged.size;
                out.adds.push(add);
            } else if with_vectors {
                merged.bytes_written += staged.size;
                marked.push((add, gone.clone()));
            } else {
                let add = rewrite(table, (&staged.path, staged.size), gone, Some(total), &self.run).await?;
                merged.bytes_written += add.size as u64;
                out.new_files.push(Path::from(add.path.as_str()));
                out.adds.push(add);
            }
        }
        if !marked.is_empty() {
            let (adds, vectors): (Vec<Add>, Vec<RoaringTreemap>) = marked.into_iter().unzip();
            out.vectors = vectors.len();
            let (descriptors, path) =
                vectors::write(table, vectors, vectors::file_id(&self.run, &table.resource_type, begun.1)).await?;
            out.new_files.push(path);
            for (mut add, descriptor) in adds.into_iter().zip(descriptors) {
                merged.bytes_written += descriptor.size_in_bytes as u64;
                add.stats = add.stats.map(|stats| loose_bounds(&stats));
                add.deletion_vector = Some(descriptor);
                out.adds.push(add);
            }
        }
        let outcome = self.commit_actions(table, &out, &mut merged, begun.0).await;
        let written = match outcome {
            Ok(true) => Written::Done(merged),
            Ok(false) => Written::Conflict,
            Err(error) => match self.find_own_commit(table, merged.version).await {
                // It was made; what failed came after it.
                Ok(Some(version)) => {
                    tracing::warn!(%error, version, "the commit was made, and something after it failed");
                    Written::Done(Merged { version: Some(version), committed: true, ..merged })
                }
                Ok(None) => {
                    out.discard(table).await;
                    return Err(error);
                }
                Err(_) => return Ok(Written::Unknown(error)),
            },
        };
        if !matches!(written, Written::Done(_)) {
            out.discard(table).await;
            return Ok(written);
        }
        for (staged, gone) in self.files.iter().zip(&plan.staged_gone) {
            if gone.len() == staged.keys.len() as u64 || !out.adds.iter().any(|add| add.path == staged.path.as_ref()) {
                staged.discard(table).await;
            }
        }
        Ok(written)
    }

    async fn commit_actions(&self, table: &mut Table, out: &Actions, merged: &mut Merged, started: Instant) -> Result<bool> {
        let known = match &self.watermark {
            Some(watermark) => table.transaction(&watermark.app_id).await? == Some(watermark.transaction_time),
            None => true,
        };
        merged.version = table.version();
        if out.adds.is_empty() && out.removes.is_empty() && known && table.version().is_some() {
            return Ok(true);
        }
        let transactions = self.watermark.iter().map(|watermark| {
            let now = chrono::Utc::now().timestamp_millis();
            Transaction::new_with_last_update(&watermark.app_id, watermark.transaction_time, Some(now))
        });
        let mut info: Vec<(String, Value)> = self.info.clone().into_iter().collect();
        info.push(("operationMetrics".into(), self.metrics(out, merged, started)));
        let properties = CommitProperties::default()
            .with_metadata(info)
            .with_max_retries(0)
            // Made apart, after the commit: their failure must not look like the commit's.
            .with_create_checkpoint(false)
            .with_cleanup_expired_logs(Some(false))
            .with_application_transactions(transactions.collect());
        let adds = out.adds.iter().cloned().map(Action::Add);
        let done = if let Some(delta) = &table.delta {
            let snapshot = delta.snapshot().map_err(|error| storage(error, "no snapshot"))?;
            let operation = DeltaOperation::Merge {
                predicate: None,
                merge_predicate: Some("target.id = source.id".into()),
                matched_predicates: vec![],
                not_matched_predicates: vec![],
                not_matched_by_source_predicates: vec![],
            };
            CommitBuilder::from(properties)
                .with_actions(out.removes.iter().cloned().map(Action::Remove).chain(adds).collect())
                .build(Some(snapshot), table.log_store.clone(), operation)
                .await
                .map(|commit| Some(commit.version()))
        } else {
            table.make_folder()?;
            CreateBuilder::new()
                .with_log_store(table.log_store.clone())
                .with_save_mode(SaveMode::ErrorIfExists)
                .with_columns(delta_schema(&self.schema)?.fields().cloned())
                .with_configuration(self.settings.configuration())
                .with_actions(adds)
                .with_commit_properties(properties)
                .await
                .map(|table| table.version())
        };
        match done {
            Ok(version) => {
                merged.version = version;
                merged.committed = true;
                table.checkpoint(version).await;
                Ok(true)
            }
            Err(
                DeltaTableError::VersionAlreadyExists(_)
                | DeltaTableError::Transaction {
                    source: TransactionError::CommitConflict(_) | TransactionError::MaxCommitAttempts(_),
                },
            ) => Ok(false),
            Err(error) => {
                // Two that create the same table: the loser merges into the winner's.
                if table.version().is_none() && table.log_store.is_delta_table_location().await.unwrap_or(false) {
                    return Ok(false);
                }
                Err(storage(error, "the commit failed"))
            }
        }
    }

    /// The version that this run committed after `before`, found in the log.
    async fn find_own_commit(&self, table: &mut Table, before: Option<u64>) -> Result<Option<u64>> {
        table.refresh().await?;
        let Some(delta) = &table.delta else { return Ok(None) };
        let newest = table.version().unwrap_or(0);
        let newer = newest - before.map_or(0, |version| version.min(newest)) + u64::from(before.is_none());
        let mut history = delta.history(Some(usize::try_from(newer).unwrap_or(usize::MAX)));
        let mut version = newest;
        while let Some(info) = history.try_next().await.map_err(|error| storage(error, "the log cannot be read"))? {
            if info.info.get("run").and_then(Value::as_str) == Some(self.run.as_str()) {
                return Ok(Some(version));
            }
            version = version.saturating_sub(1);
        }
        Ok(None)
    }

    /// Operation metrics by the names of Spark's own merge.
    fn metrics(&self, out: &Actions, merged: &Merged, started: Instant) -> Value {
        let sources: usize = self.files.iter().map(|file| file.keys.len()).sum();
        json!({
            "numSourceRows": sources.to_string(),
            "numTargetRowsInserted": merged.inserted.to_string(),
            "numTargetRowsUpdated": merged.updated.to_string(),
            "numTargetRowsDeleted": merged.deleted.to_string(),
            "numOutputRows": (merged.inserted + merged.updated).to_string(),
            "numTargetFilesAdded": (out.adds.len() - out.vectors).to_string(),
            "numTargetFilesRemoved": out.removes.len().to_string(),
            "numTargetDeletionVectorsAdded": out.vectors.to_string(),
            "numTargetBytesAdded": merged.bytes_written.to_string(),
            "executionTimeMs": started.elapsed().as_millis().to_string(),
        })
    }
}

/// What became of an attempt.
enum Written {
    Done(Merged),
    /// Another writer was faster.
    Conflict,
    Unknown(Error),
}

impl Actions {
    /// Removes the files that were written for this commit alone.
    async fn discard(&self, table: &Table) {
        for path in &self.new_files {
            // Unreferenced; what stays behind, vacuum takes.
            let _ = table.store().delete(path).await;
        }
    }
}

#[derive(Default)]
struct Actions {
    removes: Vec<Remove>,
    adds: Vec<Add>,
    /// How many of the adds carry a new deletion vector.
    vectors: usize,
    /// Files written for this commit alone.
    new_files: Vec<Path>,
}

fn targets(table: &Table) -> Result<Vec<TargetFile>> {
    let Some(delta) = &table.delta else { return Ok(Vec::new()) };
    let snapshot = delta.snapshot().map_err(|error| storage(error, "no snapshot"))?;
    let mut targets = Vec::new();
    for view in snapshot.log_data().iter() {
        let gone = match view.deletion_vector_descriptor() {
            Some(descriptor) => vectors::read(table, &descriptor)?,
            None => RoaringTreemap::new(),
        };
        let data = DataFile { path: view.object_store_path(), size: view.size() as u64, gone };
        let rows = view.num_records().map(|rows| rows as u64);
        let add = Add {
            path: view.path().into_owned(),
            partition_values: view.partition_values_map(),
            size: view.size(),
            modification_time: view.modification_time(),
            data_change: true,
            stats: view.stats(),
            deletion_vector: view.deletion_vector_descriptor(),
            ..Add::default()
        };
        targets.push(TargetFile { data, rows, add, remove: view.remove_action(true) });
    }
    Ok(targets)
}

/// Fills in the content hash of each wanted row of a file.
async fn hash_rows(table: &Table, path: &Path, size: u64, wanted: &mut BTreeMap<u64, u128>) -> Result<()> {
    let mut batches = rows(&table.store(), path, size, selection(wanted.keys().copied())).await?;
    let mut places = wanted.values_mut();
    while let Some(batch) = batches.try_next().await.map_err(|error| storage(error, &format!("{path} cannot be read")))? {
        for (hash, place) in row_hashes(&batch)?.into_iter().zip(&mut places) {
            *place = hash;
        }
    }
    Ok(())
}
