//! Writing down what is staged, for a run that resumes it.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::PathBuf;

use super::super::ledger::Ledger;
use super::super::outcome::TypeOutcome;
use super::{CheckpointPolicy, Staging, columns_of};
use crate::error::{Error, Result};
use crate::jobs::checkpoint::{Checkpoint, CheckpointEntry, StagedParquet, said_of};
use crate::messages::{ParsedChunk, ResourceType};
use flow::compute;

/// Outcome of a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum CheckpointOutcome {
    /// It is on disk.
    Done,
    /// There is nothing.
    Nothing,
    /// The previous checkpoint stands.
    Failed,
}

impl Staging {
    /// Returns true if it is time to persist what is staged.
    pub(in super::super) fn is_due(&self) -> bool {
        let (Some(since), Some(policy)) = (self.news_since, &self.settings.checkpoint) else { return false };
        self.bytes_since >= policy.bytes || since.elapsed() >= policy.every
    }

    /// Closes what is open and persists what is staged. Types whose files cannot be closed have lost rows: they come
    /// back, to fail. That nothing can be persisted is no reason to end a run.
    pub(in super::super) async fn write_checkpoint(&mut self, ledger: &Ledger) -> Vec<(ResourceType, Error)> {
        self.write(ledger, false).await.1
    }

    /// `last` at the run's end, when what is written is for another run: files whose lines failed their type are then
    /// better read again.
    async fn write(&mut self, ledger: &Ledger, last: bool) -> (CheckpointOutcome, Vec<(ResourceType, Error)>) {
        let Some(policy) = self.settings.checkpoint.clone() else { return (CheckpointOutcome::Nothing, Vec::new()) };
        (self.news_since, self.bytes_since) = (None, 0);
        // What encode still gathers would otherwise wait for rows that follow, and none may. Once: it may not come for
        // long.
        let unstaged = std::mem::replace(&mut self.unstaged, ledger.unstaged());
        if !self.unstaged.is_empty() && self.unstaged != unstaged {
            self.hear();
        }
        let mut failed = Vec::new();
        for (name, stage) in &mut self.types {
            if let Some(table) = self.opened.get(name)
                && let Err(error) = stage.close_open(table).await
            {
                failed.push((name.clone(), error));
            }
        }
        let written = async {
            let files = self.save_keys(&policy).await?;
            self.write_list(&policy, ledger, files, last).await
        };
        let outcome = written.await.unwrap_or_else(|error| {
            tracing::warn!(%error, "the checkpoint could not be persisted; the previous one remains");
            self.hear();
            CheckpointOutcome::Failed
        });
        (outcome, failed)
    }

    /// Writes the keys down of files that are whole; the files.
    async fn save_keys(&mut self, policy: &CheckpointPolicy) -> Result<Vec<StagedParquet>> {
        let mut files = Vec::new();
        for (name, stage) in &mut self.types {
            let Some(table) = self.opened.get(name) else { continue };
            files.extend(stage.committing.iter().filter(|file| self.saved.contains(&file.path)).cloned());
            if stage.staged.files.is_empty() && stage.staged.unchanged.is_empty() {
                continue;
            }
            let columns = columns_of(name, &self.settings.layout, table)?;
            let of_files = stage.staged.files.iter().map(|file| file.note(table, &columns));
            let of_rows = stage.staged.unchanged.iter().map(|rows| rows.note(table, &columns));
            let notes: Vec<StagedParquet> = of_files.chain(of_rows).collect();
            let keys: Vec<PathBuf> =
                notes.iter().map(|file| policy.folder.keys_of(name, &file.path)).collect::<Result<_>>()?;
            let mut staged = std::mem::take(&mut stage.staged);
            let (kept, result) = compute(tracing::Span::current(), async move {
                let (of_files, of_rows) = keys.split_at(staged.files.len());
                let files = staged.files.iter_mut().zip(of_files);
                let rows = staged.unchanged.iter_mut().zip(of_rows);
                let result = files.into_iter().try_for_each(|(file, keys)| file.save_keys(keys));
                let result = result.and_then(|()| rows.into_iter().try_for_each(|(rows, keys)| rows.save_keys(keys)));
                (staged, result)
            })
            .await?;
            stage.staged = kept;
            result?;
            for file in notes.iter().filter(|file| !self.saved.contains(&file.path)) {
                policy.folder.publish_keys(name, &file.path)?;
            }
            table.sync_folder();
            self.saved.extend(notes.iter().map(|file| file.path.clone()));
            files.extend(notes);
        }
        Ok(files)
    }

    async fn write_list(
        &mut self,
        policy: &CheckpointPolicy,
        ledger: &Ledger,
        mut files: Vec<StagedParquet>,
        last: bool,
    ) -> Result<CheckpointOutcome> {
        let known: HashSet<u32> = ledger.listed().map(|(file, ..)| file.index).collect();
        for file in &self.again.files {
            let mut file = file.clone();
            // Those that come again are in other files now.
            file.by_file.retain(|index, _| !known.contains(index) || self.held.contains_key(index));
            files.push(file);
        }
        let in_tables: Vec<StagedParquet> = self.again.in_tables.iter().chain(&self.merged).cloned().collect();
        let listed = self.list(ledger, files.iter().chain(&in_tables), last);
        if last {
            let held: HashSet<u32> = listed.iter().filter(|file| file.held.is_some()).map(|file| file.index).collect();
            let (useful, useless): (Vec<_>, Vec<_>) =
                files.into_iter().partition(|file| file.by_file.keys().any(|index| held.contains(index)));
            files = useful;
            // What a commit may have named must stay.
            let uncertain: HashSet<String> =
                self.types.values().flat_map(|stage| &stage.committing).map(|file| file.path.clone()).collect();
            for file in useless.iter().filter(|file| !uncertain.contains(&file.path)) {
                let table = self.table(&file.resource_type).await?;
                table.discard_staged([file.path.as_str()]).await;
                table.remove_empty_folder();
            }
        }
        let empty = last && files.is_empty();
        let work = match empty {
            true => Checkpoint::empty(),
            false => Checkpoint { listed, files, in_tables, ..Checkpoint::empty() },
        };
        let (held, parquet_files) = (work.held(), work.files.len());
        self.put_list(policy, work)?;
        if empty {
            return Ok(CheckpointOutcome::Nothing);
        }
        if parquet_files > 0 {
            tracing::info!(files = held, parquet_files, "checkpoint persisted");
        }
        Ok(CheckpointOutcome::Done)
    }

    /// Writes the list, and what belongs to other exports with it.
    fn put_list(&mut self, policy: &CheckpointPolicy, mut work: Checkpoint) -> Result<()> {
        work.listed.extend(self.others.listed.iter().cloned());
        work.files.extend(self.others.files.iter().cloned());
        work.in_tables.extend(self.others.in_tables.iter().cloned());
        if work.files.is_empty() && work.listed.is_empty() {
            policy.folder.clear()
        } else {
            policy.folder.write(&work)
        }?;
        // Not before: where the list could not be written, files that are only on this one would be nobody's.
        self.listed = work.files.iter().map(|file| file.path.clone()).collect();
        Ok(())
    }

    /// The export's files, and which of them are held by the Parquet files that are persisted and the tables.
    fn list<'a>(
        &self,
        ledger: &Ledger,
        files: impl Iterator<Item = &'a StagedParquet>,
        last: bool,
    ) -> Vec<CheckpointEntry> {
        let mut rows: HashMap<u32, u64> = HashMap::new();
        for (index, of) in files.flat_map(|file| &file.by_file) {
            *rows.entry(*index).or_default() += of.rows;
        }
        let failed: HashSet<ResourceType> = match last {
            true => ledger.types().into_iter().filter(|name| ledger.has_failed(name)).collect(),
            false => HashSet::new(),
        };
        let mut known = HashSet::new();
        let mut listed: Vec<CheckpointEntry> = Vec::new();
        for (file, status, tally) in ledger.listed() {
            let all = |tally: &&ParsedChunk| {
                let brought: u64 = tally.rows.iter().map(|row| row.1).sum();
                self.held.contains_key(&file.index) || rows.get(&file.index).copied().unwrap_or(0) == brought
            };
            // Bad lines may be what failed the type; of a file of no one type, any type.
            let spoilt = |tally: &&ParsedChunk| {
                let may_have_failed = file.declared.as_ref().map_or(!failed.is_empty(), |name| failed.contains(name));
                !tally.bad.is_empty() && may_have_failed
            };
            known.insert(file.index);
            listed.push(CheckpointEntry {
                status: status.to_string(),
                said: said_of(file),
                index: file.index,
                held: tally.filter(all).filter(|tally| !spoilt(tally)).cloned(),
            });
        }
        listed.extend(self.again.listed.iter().filter(|file| !known.contains(&file.index)).cloned());
        for file in listed.iter_mut().filter(|file| self.lost.contains(&file.index)) {
            file.held = None;
        }
        listed
    }

    /// Ends it. What is staged and not merged is persisted for the next run where `keep` says so, else removed.
    pub(in super::super) async fn end(mut self, ledger: &Ledger, keep: bool) -> BTreeMap<ResourceType, TypeOutcome> {
        let written = if keep { self.write(ledger, true).await.0 } else { CheckpointOutcome::Nothing };
        match written {
            CheckpointOutcome::Done => {}
            CheckpointOutcome::Nothing => {
                if let Some(policy) = self.settings.checkpoint.clone() {
                    self.put_list(&policy, Checkpoint::empty()).unwrap_or_else(|error| {
                        tracing::warn!(%error, "the checkpoint could not be removed; the next run removes it");
                    });
                }
                self.remove(&HashSet::new()).await;
            }
            CheckpointOutcome::Failed => {
                let listed = std::mem::take(&mut self.listed);
                self.remove(&listed).await;
            }
        }
        self.types.into_iter().map(|(name, stage)| (name, stage.outcome)).collect()
    }

    /// Removes what is staged, but for the files that `stay`.
    async fn remove(&mut self, stay: &HashSet<String>) {
        for file in std::mem::take(&mut self.again.files).into_iter().filter(|file| !stay.contains(&file.path)) {
            if let Ok(table) = self.table(&file.resource_type).await {
                table.discard_staged([file.path.as_str()]).await;
                table.remove_empty_folder();
            }
        }
        for (name, stage) in &mut self.types {
            if let Some(file) = stage.open.take() {
                file.discard().await;
            }
            if let Some(table) = self.opened.get(name) {
                stage.staged.unchanged.clear();
                for file in stage.staged.files.drain(..).filter(|file| !stay.contains(file.path.as_ref())) {
                    file.discard(table).await;
                }
                table.remove_empty_folder();
            }
        }
    }
}
