//! Rows of a run for one type, merged into its table in one commit (DESIGN section 5).

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::time::Instant;

use arrow::datatypes::SchemaRef;
use deltalake::kernel::{Action, Add, Remove, Transaction};
use deltalake::operations::create::CreateBuilder;
use deltalake::protocol::{DeltaOperation, SaveMode};
use object_store::ObjectStoreExt;
use object_store::path::Path;
use roaring::RoaringTreemap;
use serde_json::{Value, json};

use crate::commit::add_actions::{loose_bounds, staged_add};
use crate::commit::deletion_vectors;
use crate::commit::{self, Attempt};
use crate::maintenance::rewrite::{Place, RowRewriter, Shape};
use crate::matching::deletions::{Deletions, Scratch};
use crate::matching::keys::DataFile;
use crate::matching::not_matched::NotMatchedBySource;
use crate::matching::precedence::OrderRules;
use crate::matching::{Matching, MergePlan};
use crate::staging::StagedFile;
use crate::table::schema_evolution::{same_types, widen};
use crate::table::snapshot_files::{TargetFile, targets};
use crate::table::{Table, TableSettings, delta_schema};
use crate::unchanged::moved::{by_target, stage_moved};
use crate::unchanged::rows::UnchangedRows;
use flow::on_all_cores;
use foundation::error::{Error, ErrorKind, Result};
use foundation::fault_points::reached;

/// Number of matches when another writer committed in between.
pub(crate) const MAX_ATTEMPTS: usize = 10;

/// The server's `transactionTime` as an application transaction of the table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Watermark {
    /// Pipeline and scope.
    pub app_id: String,
    /// Microseconds since the epoch.
    pub transaction_time: i64,
    /// True if the run knows what was deleted until then: a full export only names what there is.
    pub knows_deletions: bool,
}

/// Application id of the time until which deletions are known, where that is another than the watermark: after a full
/// export over a table, what was deleted since the last incremental one is still to be asked for.
pub fn deletions_id(app_id: &str) -> String {
    format!("{app_id}|deletions")
}

/// Rows that a run brings for one type.
#[derive(Debug, Default)]
pub struct Incoming {
    /// Staged files.
    pub files: Vec<StagedFile>,
    /// Rows that the table has already.
    pub unchanged: Vec<UnchangedRows>,
}

/// Rows of a run for one type.
#[derive(Debug)]
pub struct Upsert {
    /// The rows.
    pub incoming: Incoming,
    /// Resources that are gone.
    pub deletions: Deletions,
    /// Columns of the rows: those of the table where it exists.
    pub schema: SchemaRef,
    /// True if the table gets those of them that it lacks.
    pub add_columns: bool,
    /// Watermark to set; `None` leaves it.
    pub watermark: Option<Watermark>,
    /// Order of its copies and the table's.
    pub order: OrderRules,
    /// Treatment of rows that the run does not bring.
    pub absent: NotMatchedBySource,
    /// For keys that do not fit into memory.
    pub scratch: Scratch,
    /// For a table that does not exist yet.
    pub settings: TableSettings,
    /// Further members of the commit's info; `run` among them tells whose commit it is.
    pub info: BTreeMap<String, Value>,
    /// The run's id: names the files that a commit writes, so that a later run knows what a killed one left.
    pub run: String,
    /// Commits that the run has made to the table already.
    pub earlier_commits: usize,
}

/// Counts of a merge.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Merged {
    /// Resources that the table did not have.
    pub inserted: u64,
    /// Resources that replaced an older copy.
    pub updated: u64,
    /// Resources that were deleted.
    pub deleted: u64,
    /// Of those, resources that a full export did not name.
    pub absent: u64,
    /// Resources that the table has as new or newer, and copies within the run that lost.
    pub skipped: u64,
    /// Of those, resources that were not encoded, since the table's row is of the same text or version.
    pub unchanged: u64,
    /// Of those, copies that were skipped since they lack the `lastUpdated` or `versionId` that the table's row has.
    pub undated: u64,
    /// The table's version after it.
    pub version: Option<u64>,
    /// True if it made a commit.
    pub committed: bool,
    /// Bytes of data files and deletion vectors that the commit added.
    pub bytes_written: u64,
}

/// Copies of resources that lost against others of the same run, by the index of the export's file that they came in.
pub type Copies = BTreeMap<u32, u64>;

/// The outcome of a commit.
#[derive(Debug)]
pub enum Commit {
    /// It is in the table.
    Done(Merged, Copies),
    /// The commit failed in a way that leaves open whether it was made: its files must stay.
    Unknown {
        /// Error.
        error: Error,
    },
    /// The table's watermark is newer than this export: nothing was changed.
    Stale {
        /// The table's `transactionTime`, microseconds since the epoch.
        table: i64,
    },
}

impl Upsert {
    /// Matches, marks and commits; matches again when another writer was faster.
    pub async fn commit(&mut self, table: &mut Table) -> Result<Commit> {
        let started = Instant::now();
        for attempt in 1.. {
            if let Some(watermark) = &self.watermark
                && let Some(newest) = table.transaction(&watermark.app_id).await?
                && newest > watermark.transaction_time
            {
                return Ok(Commit::Stale { table: newest });
            }
            if self.settings.upgrade {
                table.turn_on_deletion_vectors(&self.info).await?;
            }
            if self.add_columns {
                table.add_columns(&self.schema, &self.info).await?;
            }
            // The snapshot may be another than the one that the rows were laid out for.
            self.check_fits(table)?;
            let targets = targets(table)?;
            let place = (&*self.run, &self.scratch);
            let moved = stage_moved(table, &self.schema, &targets, &mut self.incoming.unchanged, place).await?;
            self.incoming.files.extend(moved);
            let unchanged = by_target(&targets, &self.incoming.unchanged);
            let mut plan = self.matching(table, &targets, &unchanged).plan().await?;
            let copies = std::mem::take(&mut plan.copies);
            match self.write(table, targets, plan, (started, attempt)).await? {
                Written::Done(merged) => return Ok(Commit::Done(merged, copies)),
                Written::Unknown(error) => return Ok(Commit::Unknown { error }),
                Written::Conflict if attempt < MAX_ATTEMPTS => {
                    tracing::info!(resource_type = %table.resource_type, attempt, "another writer committed first; \
                        matching again");
                }
                Written::Conflict => break,
            }
        }
        Err(Error::new(ErrorKind::Table, format!("other writers committed first {MAX_ATTEMPTS} times in a row")))
    }

    /// Returns true if the staged rows still fit a table that another writer has changed.
    fn check_fits(&self, table: &Table) -> Result<()> {
        table.check_writable()?;
        let Some(now) = table.schema()? else { return Ok(()) };
        // What another writer adds, our rows have null in.
        let lacks = !self.add_columns && widen(&now, &self.schema).is_some();
        if lacks || !same_types(now.fields(), self.schema.fields()) {
            return Err(Error::new(
                ErrorKind::Table,
                "another writer changed the table's columns during the run; nothing was merged: run again",
            ));
        }
        Ok(())
    }

    fn matching<'a>(
        &'a self,
        table: &'a Table,
        targets: &'a [TargetFile],
        unchanged: &'a [RoaringTreemap],
    ) -> Matching<'a> {
        Matching {
            table,
            targets,
            files: &self.incoming.files,
            unchanged: (unchanged, &self.incoming.unchanged),
            deletions: &self.deletions,
            order: self.order,
            absent: self.absent,
            scratch: &self.scratch,
        }
    }

    /// Writes what the marks need and commits. `begun` is when, and the number of the attempt.
    async fn write(
        &self,
        table: &mut Table,
        targets: Vec<TargetFile>,
        plan: MergePlan,
        started: (Instant, usize),
    ) -> Result<Written> {
        let mut merged = plan.merged;
        let mut out = Actions::default();
        let attempt = match self.prepare(table, &targets, &plan, started.1, (&mut merged, &mut out)).await {
            Ok(()) => self.commit_actions(table, &out, &mut merged, started.0).await,
            Err(error) => Err(error),
        };
        match attempt {
            Ok(Attempt::Done(version)) => merged.version = version,
            Ok(Attempt::Unknown(error)) => return Ok(Written::Unknown(error)),
            failed => {
                out.discard(table).await;
                return failed.map(|_| Written::Conflict);
            }
        }
        let held: HashSet<&Path> = targets.iter().map(|target| &target.data.path).collect();
        for (staged, gone) in self.incoming.files.iter().zip(&plan.staged_gone) {
            // A commit that was thought to have failed may have named it after all.
            if held.contains(&staged.path) {
                continue;
            }
            if gone.len() == staged.rows || !out.adds.iter().any(|add| add.path == staged.path.as_ref()) {
                staged.discard(table).await;
            }
        }
        Ok(Written::Done(merged))
    }

    /// Writes the files that the marks need: deletion vectors, or copies without the rows that go.
    async fn prepare(
        &self,
        table: &Table,
        targets: &[TargetFile],
        plan: &MergePlan,
        attempt: usize,
        (merged, out): (&mut Merged, &mut Actions),
    ) -> Result<()> {
        let with_vectors =
            if table.version().is_some() { table.has_deletion_vectors() } else { self.settings.deletion_vectors };
        let mut marked: Vec<(Add, RoaringTreemap)> = Vec::new();
        let mut rewritten = Vec::new();
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
                out.copied += target.rows.unwrap_or_default().saturating_sub(all_gone.len());
                rewritten.push(DataFile { gone: all_gone, ..target.data.clone() });
            }
        }
        for (staged, gone) in self.incoming.files.iter().zip(&plan.staged_gone) {
            let total = staged.rows;
            if gone.len() == total {
                continue;
            }
            let add = staged_add(staged);
            if gone.is_empty() {
                merged.bytes_written += staged.size;
                out.adds.push(add);
            } else if with_vectors {
                merged.bytes_written += staged.size;
                out.staged_vectors += 1;
                marked.push((add, gone.clone()));
            } else {
                rewritten.push(DataFile { gone: gone.clone(), ..DataFile::new(&staged.path, staged.size) });
            }
        }
        if !rewritten.is_empty() {
            // A table that does not exist yet will have the columns that came.
            let schema = table.schema()?.map_or_else(|| self.schema.clone(), Arc::new);
            let place = Place::new(table, &self.run, u64::MAX);
            let adds = without_gone(&place, &schema, &rewritten);
            out.new_files.extend(place.started());
            for add in adds? {
                merged.bytes_written += add.size as u64;
                out.adds.push(add);
            }
        }
        if !marked.is_empty() {
            let (adds, vectors): (Vec<Add>, Vec<RoaringTreemap>) = marked.into_iter().unzip();
            let (descriptors, path) = deletion_vectors::write(
                table,
                vectors,
                deletion_vectors::file_id(
                    &self.run,
                    &table.resource_type,
                    self.earlier_commits * MAX_ATTEMPTS + attempt,
                ),
            )
            .await?;
            out.new_files.push(path);
            for (mut add, descriptor) in adds.into_iter().zip(descriptors) {
                merged.bytes_written += descriptor.size_in_bytes as u64;
                add.stats = add.stats.map(|stats| loose_bounds(&stats));
                add.deletion_vector = Some(descriptor);
                out.adds.push(add);
            }
        }
        Ok(())
    }

    /// A commit must name no file that is not there: a vacuum of others may have taken one for a stray.
    async fn check_files(&self, table: &Table, out: &Actions) -> Result<()> {
        let store = table.store();
        let known: HashSet<&str> = out.removes.iter().map(|remove| remove.path.as_str()).collect();
        for add in out.adds.iter().filter(|add| !known.contains(add.path.as_str())) {
            let path = Path::from(add.path.as_str());
            let gone = |why: String| {
                Error::new(ErrorKind::Storage, format!("{path}, which this run wrote, {why}; nothing was merged"))
            };
            let size = store.head(&path).await.map_err(|error| gone(format!("cannot be found: {error}")))?.size;
            if size != add.size as u64 {
                return Err(gone(format!("has {size} bytes, not {}", add.size)));
            }
        }
        // The files' names, before the log names them.
        table.sync_folder();
        Ok(())
    }

    async fn commit_actions(
        &self,
        table: &mut Table,
        out: &Actions,
        merged: &mut Merged,
        started: Instant,
    ) -> Result<Attempt> {
        let before = match &self.watermark {
            Some(watermark) => table.transaction(&watermark.app_id).await?,
            None => None,
        };
        let known = self.watermark.as_ref().is_none_or(|watermark| before == Some(watermark.transaction_time));
        if out.adds.is_empty() && out.removes.is_empty() && known && table.version().is_some() {
            return Ok(Attempt::Done(table.version()));
        }
        self.check_files(table, out).await?;
        merged.committed = true;
        let now = chrono::Utc::now().timestamp_millis();
        let mut transactions = Vec::new();
        if let Some(watermark) = &self.watermark {
            let id = deletions_id(&watermark.app_id);
            let until = match (watermark.knows_deletions, table.transaction(&id).await?) {
                (true, Some(_)) => Some(watermark.transaction_time),
                (false, None) => before,
                (true, None) | (false, Some(_)) => None,
            };
            transactions.push(Transaction::new_with_last_update(
                &watermark.app_id,
                watermark.transaction_time,
                Some(now),
            ));
            transactions.extend(until.map(|until| Transaction::new_with_last_update(id, until, Some(now))));
        }
        let mut info = self.info.clone();
        info.insert("operationMetrics".into(), self.metrics(out, merged, started));
        let adds = out.adds.iter().cloned().map(Action::Add);
        if table.delta.is_some() {
            let operation = DeltaOperation::Merge {
                predicate: None,
                merge_predicate: Some("target.id = source.id".into()),
                matched_predicates: vec![],
                not_matched_predicates: vec![],
                not_matched_by_source_predicates: vec![],
            };
            let actions = out.removes.iter().cloned().map(Action::Remove).chain(adds).collect();
            return commit::attempt(table, actions, &info, transactions, operation).await;
        }
        (table.guard)()?;
        table.make_folder()?;
        reached("before a table is made");
        let created = CreateBuilder::new()
            .with_log_store(table.log_store.clone())
            .with_save_mode(SaveMode::ErrorIfExists)
            .with_columns(delta_schema(&self.schema)?.fields().cloned())
            .with_configuration(self.settings.configuration())
            .with_actions(adds)
            .with_commit_properties(commit::properties(&info, transactions))
            .await;
        reached("a table is made");
        match created {
            Ok(created) => Ok(Attempt::Done(created.version())),
            Err(error) => commit::after_error(table, &info, None, error).await,
        }
    }

    /// Operation metrics by the names of Spark's own merge. As there, a file whose rows are marked is neither removed
    /// nor added: its deletion vector is.
    fn metrics(&self, out: &Actions, merged: &Merged, started: Instant) -> Value {
        let staged: u64 = self.incoming.files.iter().map(StagedFile::rows_brought).sum();
        let sources = staged + merged.unchanged;
        let added: HashSet<&str> = out.adds.iter().map(|add| add.path.as_str()).collect();
        let (marked, removed): (Vec<&Remove>, Vec<&Remove>) =
            out.removes.iter().partition(|remove| added.contains(remove.path.as_str()));
        let had_vector = |removes: &[&Remove]| removes.iter().filter(|remove| remove.deletion_vector.is_some()).count();
        let updated_vectors = had_vector(&marked);
        let bytes_removed: i64 = removed.iter().filter_map(|remove| remove.size).sum();
        let by_source = merged.absent.min(merged.deleted);
        let number = |number: u64| Value::from(number.to_string());
        json!({
            "numSourceRows": number(sources),
            "numTargetRowsCopied": number(out.copied),
            "numTargetRowsInserted": number(merged.inserted),
            "numTargetRowsUpdated": number(merged.updated),
            "numTargetRowsMatchedUpdated": number(merged.updated),
            "numTargetRowsNotMatchedBySourceUpdated": number(0),
            "numTargetRowsDeleted": number(merged.deleted),
            "numTargetRowsMatchedDeleted": number(merged.deleted - by_source),
            "numTargetRowsNotMatchedBySourceDeleted": number(by_source),
            "numOutputRows": number(merged.inserted + merged.updated + out.copied),
            "numTargetFilesAdded": number((out.adds.len() - marked.len()) as u64),
            "numTargetFilesRemoved": number(removed.len() as u64),
            "numTargetBytesAdded": number(merged.bytes_written),
            "numTargetBytesRemoved": number(bytes_removed.unsigned_abs()),
            "numTargetChangeFilesAdded": number(0),
            "numTargetDeletionVectorsAdded": number((marked.len() - updated_vectors + out.staged_vectors) as u64),
            "numTargetDeletionVectorsUpdated": number(updated_vectors as u64),
            "numTargetDeletionVectorsRemoved": number(had_vector(&removed) as u64),
            "executionTimeMs": number(started.elapsed().as_millis() as u64),
        })
    }
}

/// Copies of files without the rows that are gone, in their order, each with the columns of its own.
fn without_gone(place: &Place<'_>, schema: &SchemaRef, files: &[DataFile]) -> Result<Vec<Add>> {
    let handle = tokio::runtime::Handle::current();
    let adds = on_all_cores(files, |_, file| {
        handle.block_on(async {
            let shape = Shape::of(place.table, schema, &[file]).await?;
            RowRewriter::of(place, &shape, &[file]).await
        })
    });
    Ok(adds?.into_iter().flatten().collect())
}

/// Outcome of an attempt.
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
    /// Number of of the run's own files carry a deletion vector.
    staged_vectors: usize,
    /// Rows that were copied into rewritten files.
    copied: u64,
    /// Files written for this commit alone.
    new_files: Vec<Path>,
}
