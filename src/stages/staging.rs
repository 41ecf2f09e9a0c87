//! What a run has staged, by type: files that are being written, files that are whole, deletions. And what of it is written
//! down, so that a run that is killed or fails does not let the next one download it again.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use object_store::path::Path;

use super::ledger::Ledger;
use super::outcome::TypeOutcome;
use crate::delta::{Deletions, StagedFile, StagingFile, Table, Tables};
use crate::error::{Error, ErrorKind, Result};
use crate::flow::compute;
use crate::messages::{EncodedBatch, ParsedChunk, ResourceType};
use crate::schema::{LayoutOptions, MAX_LOSS_PATHS, arrow_schema, layout_for};
use crate::staged::{CREATED_BY, ListedFile, StagedFolder, StagedParquet, StagedWork, said_of};

/// A type's staged rows.
#[derive(Default)]
pub(super) struct TypeStage {
    open: Option<StagingFile>,
    staged: Vec<StagedFile>,
    /// Files that are being merged.
    committing: Vec<StagedParquet>,
    deletions: Option<Deletions>,
    /// Commits that the run has begun to the type's table.
    pub commits: usize,
    pub outcome: TypeOutcome,
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

    async fn close_open(&mut self, table: &Table) -> Result<()> {
        if let Some(file) = self.open.take() {
            self.staged.push(file.close(table).await?);
        }
        Ok(())
    }

    /// Counts what rows bring with them.
    fn count(&mut self, name: &ResourceType, rows: u64, json_bytes: u64, losses: BTreeMap<String, u64>) {
        self.outcome.resources += rows;
        self.outcome.bytes += json_bytes;
        for (path, count) in losses {
            let not_held = &mut self.outcome.not_held;
            // Batches bring paths of their own: a server that invents members must not fill the report with them.
            let path = if not_held.len() < MAX_LOSS_PATHS || not_held.contains_key(&path) { path } else { format!("{name}.?") };
            *not_held.entry(path).or_default() += count;
        }
    }
}

/// Where and how often what is staged is written down.
#[derive(Debug, Clone)]
pub struct Keep {
    /// Where.
    pub folder: StagedFolder,
    /// At least so often.
    pub every: Duration,
    /// And after so many bytes of Parquet.
    pub bytes: u64,
}

/// How staging is set.
#[derive(Debug, Clone)]
pub struct StagingSettings {
    /// The run's id: names its files.
    pub run: String,
    /// Bytes at which a staged file is closed.
    pub target_file_bytes: u64,
    /// Files that may be open at the same time, before the largest is closed.
    pub max_open_files: usize,
    /// Bytes of memory that the keys of staged rows may take.
    pub keys_in_memory: usize,
    /// Folder for keys beyond that.
    pub scratch: PathBuf,
    /// Layout of tables that are created.
    pub layout: LayoutOptions,
    /// Whether a later run can go on with what is staged.
    pub keep: Option<Keep>,
}

/// All types' staged rows.
pub struct Staging {
    settings: StagingSettings,
    tables: Tables,
    opened: HashMap<ResourceType, Table>,
    types: BTreeMap<ResourceType, TypeStage>,
    /// What earlier runs staged, and is not yet taken up.
    again: StagedWork,
    /// Parquet files that earlier runs staged and merged.
    in_tables: Vec<StagedParquet>,
    /// Indexes of the export's files that earlier runs staged and that this one does not download.
    held: HashSet<u32>,
    /// Rows that those brought, by type.
    rows_held: BTreeMap<ResourceType, u64>,
    /// Indexes of files that are to be read again by the next run, since their rows are not where they should be.
    lost: HashSet<u32>,
    /// Rows by the index of the export's file that are in the tables.
    merged: HashMap<u32, u64>,
    /// Parquet files whose keys are written down.
    saved: HashSet<String>,
    files: usize,
    since: Instant,
    bytes_since: u64,
}

impl Staging {
    /// Nothing yet but what earlier runs staged, and of that, what they merged. Tables that are not `opened` are opened when
    /// their rows come.
    pub fn new(
        settings: StagingSettings,
        tables: Tables,
        opened: HashMap<ResourceType, Table>,
        (again, in_tables): (StagedWork, Vec<StagedParquet>),
    ) -> Self {
        let saved = again.files.iter().map(|file| file.path.clone()).collect();
        Self {
            settings,
            tables,
            opened,
            types: BTreeMap::new(),
            again,
            in_tables,
            held: HashSet::new(),
            rows_held: BTreeMap::new(),
            lost: HashSet::new(),
            merged: HashMap::new(),
            saved,
            files: 0,
            since: Instant::now(),
            bytes_since: 0,
        }
    }

    pub(super) fn of(&mut self, name: &ResourceType) -> &mut TypeStage {
        self.types.entry(name.clone()).or_default()
    }

    /// The types that something came of.
    pub(super) fn types(&self) -> impl Iterator<Item = (&ResourceType, bool)> {
        self.types.iter().map(|(name, stage)| (name, stage.deletions.is_some()))
    }

    /// The type's table, as it was when the run first looked at it.
    pub(super) async fn table(&mut self, name: &ResourceType) -> Result<Table> {
        if !self.opened.contains_key(name) {
            let table = self.tables.open(name).await?;
            table.check_writable()?;
            self.opened.insert(name.clone(), table);
        }
        Ok(self.opened[name].clone())
    }

    /// Adds ids that are gone.
    pub(super) async fn delete(&mut self, ids: Vec<(ResourceType, Box<str>)>) -> Result<()> {
        for (name, id) in ids {
            let deletions = &mut self.types.entry(name).or_default().deletions;
            deletions.get_or_insert_with(|| Deletions::new(&self.settings.scratch)).push(id)?;
        }
        self.keep_to_memory().await
    }

    /// Adds that an earlier run staged all rows of a file.
    pub(super) fn hold(&mut self, file: &ParsedChunk) {
        self.held.insert(file.file);
        for (name, rows) in &file.rows {
            *self.rows_held.entry(name.clone()).or_default() += rows;
        }
    }

    /// Adds rows.
    pub(super) async fn stage(&mut self, mut batch: EncodedBatch) -> Result<()> {
        let name = batch.resource_type.clone();
        let table = self.table(&name).await?;
        let stage = self.types.entry(name.clone()).or_default();
        stage.count(&name, batch.keys.len() as u64, batch.json_bytes, batch.losses.clone());
        if stage.open.as_ref().is_some_and(|file| !file.takes(&batch.filled)) {
            stage.close_open(&table).await?;
        }
        let file = match &mut stage.open {
            Some(file) => file,
            none => {
                self.files += 1;
                let path = Path::from(format!("part-{}-{:05}.zstd.parquet", self.settings.run, self.files));
                let filled = std::mem::take(&mut batch.filled);
                none.insert(StagingFile::create(&table, path, filled, &self.settings.scratch).await?)
            }
        };
        self.bytes_since += batch.parquet.len() as u64;
        file.append(batch).await?;
        if file.size() >= self.settings.target_file_bytes {
            stage.close_open(&table).await?;
        }
        // Open files share a budget: when it is spent, the largest is closed.
        while self.types.values().filter(|stage| stage.open.is_some()).count() > self.settings.max_open_files.max(1) {
            let open = self.types.iter_mut().filter(|(_, stage)| stage.open.is_some());
            let largest = open.max_by_key(|(_, stage)| stage.open.as_ref().map_or(0, StagingFile::size));
            let Some((name, stage)) = largest else { break };
            stage.close_open(&self.opened[name]).await?;
        }
        self.keep_to_memory().await
    }

    /// Keys of staged rows beyond the budget go to disk: those of closed files first, then of the file that has most,
    /// which is closed.
    async fn keep_to_memory(&mut self) -> Result<()> {
        while self.types.values().map(TypeStage::keys_memory).sum::<usize>() > self.settings.keys_in_memory {
            let Some((name, stage)) = self.types.iter_mut().max_by_key(|(_, stage)| stage.keys_memory()) else { break };
            if stage.closed_keys_memory() == 0 && stage.open.is_some() {
                stage.close_open(&self.opened[name]).await?;
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

    /// Hands over what is staged of a type, to be merged; what earlier runs staged of it among it.
    /// All of it must be there, unless an earlier run `merged` the type.
    pub(super) async fn take(&mut self, name: &ResourceType, merged: bool) -> Result<(Vec<StagedFile>, Option<Deletions>)> {
        let table = self.table(name).await?;
        self.of(name).close_open(&table).await?;
        let (ours, others) = std::mem::take(&mut self.again.files).into_iter().partition(|file| file.resource_type == *name);
        self.again.files = others;
        let ours: Vec<StagedParquet> = ours;
        let paths: HashSet<String> = ours.iter().map(|file| file.path.clone()).collect();
        let found = self.read_again(name, ours, &table).await;
        let expected = self.rows_held.remove(name).unwrap_or(0);
        if !merged && !found.as_ref().is_ok_and(|found| *found == expected) {
            // Nothing may be lost: the next run reads the files again.
            self.lost.extend(&self.held);
            let stage = self.types.entry(name.clone()).or_default();
            stage.staged.retain(|file| !paths.contains(file.path.as_ref()));
            table.discard_staged(paths.iter().map(String::as_str)).await;
            let error = Error::new(ErrorKind::State, "what an earlier run staged is not whole");
            return Err(found.err().unwrap_or(error).with_hint("run again: its files are then downloaded again"));
        }
        let columns = columns_of(name, &self.settings.layout, &table)?;
        let stage = self.types.entry(name.clone()).or_default();
        stage.committing.extend(stage.staged.iter().map(|file| file.note(&table, &columns)));
        Ok((std::mem::take(&mut stage.staged), stage.deletions.take()))
    }

    /// Takes up what earlier runs staged of a type. Rows of files that come again do not count. How many rows there are, here
    /// and in the table.
    async fn read_again(&mut self, name: &ResourceType, files: Vec<StagedParquet>, table: &Table) -> Result<u64> {
        let in_table = self.in_tables.iter().filter(|file| file.resource_type == *name).flat_map(|file| &file.rows_of);
        let mut found = in_table.filter(|(index, _)| self.held.contains(index)).map(|(_, rows)| rows).sum();
        for file in files {
            if !file.rows_of.keys().any(|index| self.held.contains(index)) {
                table.discard_staged([file.path.as_str()]).await;
                continue;
            }
            let Some(keep) = &self.settings.keep else { continue };
            let (keys, scratch) = (keep.folder.keys_of(name, &file.path), self.settings.scratch.clone());
            let (held, indexes) = (self.held.clone(), file.rows_of.keys().copied().collect::<HashSet<u32>>());
            let read = compute(tracing::Span::current(), async move {
                StagedFile::again(file, &keys, &scratch, |index| held.contains(&index) && indexes.contains(&index))
            });
            let file = read.await??;
            found += file.rows_brought();
            let stage = self.types.entry(name.clone()).or_default();
            stage.count(name, file.rows_brought(), file.brought.json_bytes, file.brought.not_held.clone());
            stage.staged.push(file);
        }
        Ok(found)
    }

    /// Enters what became of the files that were handed over: they are in the table, or came back.
    pub(super) fn merged(&mut self, name: &ResourceType) {
        let stage = self.types.entry(name.clone()).or_default();
        for file in stage.committing.drain(..) {
            for (index, rows) in file.rows_of {
                *self.merged.entry(index).or_default() += rows;
            }
        }
    }

    /// Takes back what was handed over and not merged.
    pub(super) fn put_back(&mut self, name: &ResourceType, files: Vec<StagedFile>) {
        let stage = self.of(name);
        stage.committing.clear();
        stage.staged.extend(files);
    }

    /// Whether it is time to write down what is staged.
    pub(super) fn is_due(&self) -> bool {
        let due = |keep: &Keep| self.bytes_since >= keep.bytes || self.since.elapsed() >= keep.every;
        self.bytes_since > 0 && self.settings.keep.as_ref().is_some_and(due)
    }

    /// Closes what is open and writes down what is staged. `last` at the run's end, when what is written is for another run:
    /// files whose lines failed their type are then better read again. Whether there is anything.
    pub(super) async fn write_down(&mut self, ledger: &Ledger, last: bool) -> Result<bool> {
        let Some(keep) = self.settings.keep.clone() else { return Ok(false) };
        let mut files = Vec::new();
        for (name, stage) in &mut self.types {
            let Some(table) = self.opened.get(name) else { continue };
            stage.close_open(table).await?;
            files.extend(stage.committing.iter().filter(|file| self.saved.contains(&file.path)).cloned());
            if stage.staged.is_empty() {
                continue;
            }
            let columns = columns_of(name, &self.settings.layout, table)?;
            let notes: Vec<StagedParquet> = stage.staged.iter().map(|file| file.note(table, &columns)).collect();
            let keys: Vec<_> = notes.iter().map(|file| (keep.folder.keys_of(name, &file.path), file.path.clone())).collect();
            let (staged, saved) = (std::mem::take(&mut stage.staged), self.saved.clone());
            crate::private::private_dir(keep.folder.path())?;
            let (kept, result) = compute(tracing::Span::current(), async move {
                let mut unsaved = staged.iter().zip(&keys).filter(|(_, (_, path))| !saved.contains(path));
                let result = unsaved.try_for_each(|(file, (keys, _))| file.save_keys(keys));
                (staged, result)
            })
            .await?;
            stage.staged = kept;
            result?;
            table.sync_folder();
            self.saved.extend(notes.iter().map(|file| file.path.clone()));
            files.extend(notes);
        }
        let listed = self.listed(ledger, &files, last);
        let known: HashSet<u32> = ledger.listed().map(|(file, ..)| file.index).collect();
        for file in &self.again.files {
            let mut file = file.clone();
            // Those that come again are in other files now.
            file.rows_of.retain(|index, _| !known.contains(index) || self.held.contains(index));
            files.push(file);
        }
        if last {
            let held: HashSet<u32> = listed.iter().filter(|file| file.held.is_some()).map(|file| file.index).collect();
            let (useful, useless): (Vec<_>, Vec<_>) =
                files.into_iter().partition(|file| file.rows_of.keys().any(|index| held.contains(index)));
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
        let work = StagedWork { created_by: CREATED_BY.to_owned(), listed, files };
        self.since = Instant::now();
        self.bytes_since = 0;
        if last && work.files.is_empty() {
            keep.folder.clear()?;
            return Ok(false);
        }
        keep.folder.write(&work)?;
        tracing::info!(files = work.held(), parquet_files = work.files.len(), "what is staged is written down");
        Ok(true)
    }

    /// The export's files, and which of them are held by the Parquet files that are written down and the tables.
    fn listed(&self, ledger: &Ledger, files: &[StagedParquet], last: bool) -> Vec<ListedFile> {
        let mut rows = self.merged.clone();
        for (index, count) in files.iter().flat_map(|file| &file.rows_of) {
            *rows.entry(*index).or_default() += count;
        }
        let mut known = HashSet::new();
        let mut listed: Vec<ListedFile> = Vec::new();
        for (file, status, tally) in ledger.listed() {
            let all = |tally: &&ParsedChunk| {
                let brought: u64 = tally.rows.iter().map(|row| row.1).sum();
                self.held.contains(&file.index) || rows.get(&file.index).copied().unwrap_or(0) == brought
            };
            let spoilt = |tally: &ParsedChunk| {
                last && !tally.bad.is_empty() && file.declared.as_ref().is_some_and(|name| ledger.has_failed(name))
            };
            known.insert(file.index);
            listed.push(ListedFile {
                status: status.to_string(),
                place: file.place,
                said: said_of(file),
                index: file.index,
                held: tally.filter(all).filter(|tally| !spoilt(tally) && !self.lost.contains(&tally.file)).cloned(),
            });
        }
        listed.extend(self.again.listed.iter().filter(|file| !known.contains(&file.index)).cloned());
        listed
    }

    /// Ends it. What is staged and not merged is written down for the next run where that is to `keep`, else removed.
    pub(super) async fn end(mut self, ledger: &Ledger, keep: bool) -> BTreeMap<ResourceType, TypeOutcome> {
        let kept = keep
            && self.write_down(ledger, true).await.unwrap_or_else(|error| {
                tracing::warn!(%error, "what is staged could not be written down; it is removed and will be downloaded again");
                false
            });
        if !kept {
            self.remove().await;
        }
        self.types.into_iter().map(|(name, stage)| (name, stage.outcome)).collect()
    }

    async fn remove(&mut self) {
        for file in std::mem::take(&mut self.again.files) {
            if let Ok(table) = self.table(&file.resource_type).await {
                table.discard_staged([file.path.as_str()]).await;
                table.remove_empty_folder();
            }
        }
        if let Some(keep) = &self.settings.keep
            && let Err(error) = keep.folder.clear()
        {
            tracing::warn!(%error, "what was written down of staged files stays until the next run");
        }
        for (name, stage) in &mut self.types {
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
    }
}

/// What the columns of a type's table are, as a text that is the same for the same.
pub fn columns_of(name: &ResourceType, options: &LayoutOptions, table: &Table) -> Result<String> {
    let schema = arrow_schema(&layout_for(name, options, table.schema()?.as_ref())?);
    Ok(format!("{:032x}", twox_hash::XxHash3_128::oneshot(format!("{:?}", schema.fields()).as_bytes())))
}
