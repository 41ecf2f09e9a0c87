//! Staged rows of a run, by type: files that are being written, files that are whole, deletions. And what of it is
//! written down, so that a run that is killed or fails does not let the next one download it again.

mod checkpoint;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use object_store::path::Path;

use super::ledger::Ledger;
use super::outcome::TypeOutcome;
use crate::error::{Error, ErrorKind, Result};
use crate::jobs::checkpoint::{Checkpoint, CheckpointStore, StagedParquet};
use crate::messages::{Deletion, EncodedBatch, FileRows, ParsedChunk, ResourceType, count_unmapped};
use delta_upsert::{Deletions, Incoming, StagedFile, StagingFile, Table, Tables, UnchangedBatch, UnchangedRows};
use fhir_arrow::{LayoutOptions, arrow_schema, layout_for};
use flow::compute;

/// A type's staged rows.
#[derive(Default)]
pub(super) struct TypeStage {
    open: Option<StagingFile>,
    staged: Incoming,
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
        let files = self.staged.files.iter().map(StagedFile::keys_memory);
        let unchanged = self.staged.unchanged.iter().map(UnchangedRows::keys_memory);
        files.chain(unchanged).sum::<usize>() + deletions
    }

    fn spill_keys(&mut self) -> Result<()> {
        if let Some(deletions) = &mut self.deletions {
            deletions.spill()?;
        }
        self.staged.unchanged.iter_mut().try_for_each(UnchangedRows::spill_keys)?;
        self.staged.files.iter_mut().try_for_each(StagedFile::spill_keys)
    }

    async fn close_open(&mut self, table: &Table) -> Result<()> {
        if let Some(file) = self.open.take() {
            self.staged.files.push(file.close(table).await?);
        }
        Ok(())
    }

    /// Counts what rows bring with them.
    fn count(&mut self, by_file: &BTreeMap<u32, FileRows>) {
        for of in by_file.values() {
            self.outcome.resources += of.rows;
            self.outcome.bytes += of.json_bytes;
            of.unmapped.iter().for_each(|(path, count)| count_unmapped(&mut self.outcome.unmapped, path, *count));
        }
    }
}

/// Place and interval of checkpoints.
#[derive(Debug, Clone)]
pub struct CheckpointPolicy {
    /// Place.
    pub folder: CheckpointStore,
    /// At least so often.
    pub every: Duration,
    /// And after so many bytes of Parquet.
    pub bytes: u64,
}

/// Settings of staging.
#[derive(Debug, Clone)]
pub struct StagingSettings {
    /// The run's id: names its files.
    pub run: String,
    /// Bytes at which a staged file is closed.
    pub target_file_bytes: u64,
    /// Bytes of memory that the footers of open files may take.
    pub footers: usize,
    /// Files that may be open at the same time, before the largest is closed.
    pub max_open_files: usize,
    /// Bytes of memory that the keys of staged rows may take.
    pub keys_in_memory: usize,
    /// Folder for keys beyond that.
    pub scratch: PathBuf,
    /// Layout of tables that are created.
    pub layout: LayoutOptions,
    /// True if a later run can resume what is staged.
    pub checkpoint: Option<CheckpointPolicy>,
}

/// Rows that earlier runs staged.
#[derive(Default)]
pub struct Earlier {
    /// Rows that wait to be merged, and those that were.
    pub ours: Checkpoint,
    /// Rows of exports that this run does not resume.
    pub others: Checkpoint,
}

/// All types' staged rows.
pub struct Staging {
    settings: StagingSettings,
    tables: Tables,
    opened: HashMap<ResourceType, Table>,
    types: BTreeMap<ResourceType, TypeStage>,
    /// Rows that earlier runs staged, and that are not yet resumed.
    again: Checkpoint,
    others: Checkpoint,
    /// Files that this run has merged.
    merged: Vec<StagedParquet>,
    /// By index, the export's files that earlier runs staged and that this one does not download: rows by type.
    held: HashMap<u32, Vec<(ResourceType, u64)>>,
    /// Indexes of files that the next run is to read again, since their rows are not where they should be.
    lost: HashSet<u32>,
    /// Rows that were handed over to be merged.
    handed: BTreeMap<ResourceType, u64>,
    /// Parquet files whose keys are persisted.
    saved: HashSet<String>,
    /// Parquet files that the list on disk names.
    listed: HashSet<String>,
    files: usize,
    /// Since when there is something that this list does not have, and the bytes of it.
    news_since: Option<Instant>,
    bytes_since: u64,
    /// Rows that encode still gathered when it was last written.
    unstaged: Vec<(ResourceType, u64)>,
}

impl Staging {
    /// Nothing yet but what earlier runs staged. Tables that are not `opened` are opened when their rows come.
    pub fn new(
        settings: StagingSettings,
        tables: Tables,
        opened: HashMap<ResourceType, Table>,
        earlier: Earlier,
    ) -> Self {
        let Earlier { ours: again, others } = earlier;
        let listed: HashSet<String> = again.files.iter().chain(&others.files).map(|file| file.path.clone()).collect();
        Self {
            settings,
            tables,
            opened,
            types: BTreeMap::new(),
            again,
            others,
            merged: Vec::new(),
            held: HashMap::new(),
            lost: HashSet::new(),
            handed: BTreeMap::new(),
            saved: listed.clone(),
            listed,
            files: 0,
            news_since: None,
            bytes_since: 0,
            unstaged: Vec::new(),
        }
    }

    pub(super) fn of(&mut self, name: &ResourceType) -> &mut TypeStage {
        self.types.entry(name.clone()).or_default()
    }

    /// The types that ids were deleted of.
    pub(super) fn with_deletions(&self) -> impl Iterator<Item = &ResourceType> {
        self.types.iter().filter(|(_, stage)| stage.deletions.is_some()).map(|(name, _)| name)
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
    pub(super) async fn delete(&mut self, ids: Vec<Deletion>) -> Result<()> {
        for Deletion { resource_type, id, version } in ids {
            let deletions = &mut self.types.entry(resource_type).or_default().deletions;
            deletions.get_or_insert_with(|| Deletions::new(&self.settings.scratch)).push(id, version)?;
        }
        self.keep_to_memory().await
    }

    /// Adds that an earlier run staged all rows of a file.
    pub(super) fn hold(&mut self, file: &ParsedChunk) {
        self.held.insert(file.file, file.rows.clone());
    }

    /// Something came that is not persisted: rows, or the end of a file that no row follows.
    pub(super) fn hear(&mut self) {
        self.news_since.get_or_insert_with(Instant::now);
    }

    /// Adds rows.
    pub(super) async fn stage(&mut self, batch: EncodedBatch) -> Result<()> {
        let name = batch.resource_type.clone();
        let table = self.table(&name).await?;
        self.hear();
        let stage = self.types.entry(name.clone()).or_default();
        stage.count(&batch.by_file);
        if stage.open.as_ref().is_some_and(|file| !file.takes(&batch.columns)) {
            stage.close_open(&table).await?;
        }
        let file = match &mut stage.open {
            Some(file) => file,
            none => {
                self.files += 1;
                let path = Path::from(format!("part-{}-{:05}.zstd.parquet", self.settings.run, self.files));
                none.insert(StagingFile::create(&table, path, batch.columns.clone(), &self.settings.scratch).await?)
            }
        };
        self.bytes_since += batch.parquet.len() as u64;
        file.append(batch).await?;
        if file.size() >= self.settings.target_file_bytes {
            stage.close_open(&table).await?;
        }
        // Open files share a budget: when it is spent, the largest is closed.
        while self.types.values().filter(|stage| stage.open.is_some()).count() > self.settings.max_open_files.max(1) {
            self.close_largest(StagingFile::size).await?;
        }
        let footer = |file: &StagingFile| file.footer_memory() as u64;
        while self.types.values().filter_map(|stage| stage.open.as_ref()).map(footer).sum::<u64>()
            > self.settings.footers as u64
        {
            self.close_largest(footer).await?;
        }
        self.keep_to_memory().await
    }

    /// Adds rows that the table has already.
    pub(super) async fn unchanged(&mut self, batch: &UnchangedBatch) -> Result<()> {
        self.hear();
        let stage = self.types.entry(batch.resource_type.clone()).or_default();
        if !stage.staged.unchanged.last().is_some_and(|rows| rows.takes(&batch.files)) {
            self.files += 1;
            let name = format!("unchanged-{}-{:05}", self.settings.run, self.files);
            stage.staged.unchanged.push(UnchangedRows::new(name, batch.files.clone(), &self.settings.scratch));
        }
        if let Some(rows) = stage.staged.unchanged.last_mut() {
            rows.add(batch)?;
        }
        stage.outcome.resources += batch.rows.len() as u64;
        stage.outcome.bytes += batch.json_bytes;
        self.keep_to_memory().await
    }

    async fn close_largest(&mut self, by: impl Fn(&StagingFile) -> u64) -> Result<()> {
        let open = self.types.iter_mut().filter(|(_, stage)| stage.open.is_some());
        match open.max_by_key(|(_, stage)| stage.open.as_ref().map_or(0, &by)) {
            Some((name, stage)) => stage.close_open(&self.opened[name]).await,
            None => Ok(()),
        }
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
                let result = keys.spill_keys();
                (keys, result)
            })
            .await?;
            *stage = kept;
            result?;
        }
        Ok(())
    }

    /// Hands over what is staged of a type, to be merged; what earlier runs staged of it among it. An error where that
    /// is not all that the ledger say: a type is never merged in part.
    pub(super) async fn take(&mut self, name: &ResourceType, ledger: &Ledger) -> Result<(Incoming, Option<Deletions>)> {
        let table = self.table(name).await?;
        self.of(name).close_open(&table).await?;
        let (ours, others) =
            std::mem::take(&mut self.again.files).into_iter().partition(|file| file.resource_type == *name);
        self.again.files = others;
        self.read_again(name, ours, &table, ledger).await?;
        let earlier =
            self.again.in_tables.iter().filter(|file| file.resource_type == *name).flat_map(|file| &file.by_file);
        let in_table: u64 = earlier.filter(|(index, _)| self.held.contains_key(index)).map(|(_, of)| of.rows).sum();
        let stage = self.types.entry(name.clone()).or_default();
        let handed = self.handed.entry(name.clone()).or_default();
        *handed += stage.staged.files.iter().map(StagedFile::rows_brought).sum::<u64>();
        *handed += stage.staged.unchanged.iter().map(UnchangedRows::rows).sum::<u64>();
        let (there, expected) = (*handed + in_table, ledger.staged_of(name).0);
        if there != expected {
            self.release(name);
            let why = format!("{expected} rows were staged, and {there} are there; nothing was merged");
            return Err(Error::new(ErrorKind::State, why).with_hint("run again: what is missing is downloaded again"));
        }
        // Notes are for what is persisted only.
        if self.settings.checkpoint.is_some() {
            let columns = columns_of(name, &self.settings.layout, &table)?;
            stage.committing.extend(stage.staged.files.iter().map(|file| file.note(&table, &columns)));
            stage.committing.extend(stage.staged.unchanged.iter().map(|rows| rows.note(&table, &columns)));
        }
        Ok((std::mem::take(&mut stage.staged), stage.deletions.take()))
    }

    /// Takes up what earlier runs staged of a type. Rows of files that come again do not count.
    async fn read_again(
        &mut self,
        name: &ResourceType,
        files: Vec<StagedParquet>,
        table: &Table,
        ledger: &Ledger,
    ) -> Result<()> {
        let Some(checkpoint) = self.settings.checkpoint.clone().filter(|_| !files.is_empty()) else { return Ok(()) };
        let known: HashSet<u32> = ledger.listed().map(|(file, ..)| file.index).collect();
        let held: Arc<HashSet<u32>> = Arc::new(self.held.keys().copied().collect());
        let mut files = files.into_iter();
        while let Some(file) = files.next() {
            // What an export brought that said nothing to this run is used up with the file.
            let gone = file.by_file.keys().filter(|index| !known.contains(index) && !held.contains(index));
            self.lost.extend(gone);
            if !file.by_file.keys().any(|index| held.contains(index)) {
                table.discard_staged([file.path.as_str()]).await;
                continue;
            }
            let (keys, held, noted) = (checkpoint.folder.keys_of(name, &file.path)?, held.clone(), file.clone());
            let read = compute(tracing::Span::current(), async move {
                let mut again = Incoming::default();
                match noted.is_unchanged() {
                    true => again.unchanged.push(UnchangedRows::again(&noted, &keys, &held)?),
                    false => again.files.push(StagedFile::again(noted, &keys, &held)?),
                }
                Ok::<_, Error>(again)
            });
            match read.await? {
                Ok(again) => {
                    let stage = self.types.entry(name.clone()).or_default();
                    again.files.iter().for_each(|file| stage.count(&file.by_file));
                    again.unchanged.iter().for_each(|rows| stage.count(&rows.by_file));
                    stage.staged.files.extend(again.files);
                    // Before those that still take rows.
                    stage.staged.unchanged.splice(0..0, again.unchanged);
                }
                Err(error) => {
                    self.spoilt(name, &error);
                    // The others of the type are still there, and so is this one where it was only not readable now.
                    self.again.files.extend(files);
                    match error.kind() {
                        ErrorKind::Data => table.discard_staged([file.path.as_str()]).await,
                        _ => self.again.files.push(file),
                    }
                    return Err(error.with_hint("run again: what cannot be used is downloaded again"));
                }
            }
        }
        Ok(())
    }

    /// Hears why a type was not merged: where what was staged is damaged, the next run reads its files again.
    pub(super) fn spoilt(&mut self, name: &ResourceType, error: &Error) {
        if error.kind() == ErrorKind::Data {
            self.release(name);
        }
    }

    /// The files that earlier runs staged rows of the type from are to come again.
    fn release(&mut self, name: &ResourceType) {
        let of_type =
            self.held.iter().filter(|(_, rows)| rows.iter().any(|(of, _)| of == name)).map(|(index, _)| *index);
        self.lost.extend(of_type);
    }

    /// Enters that the files that were handed over are in the table.
    pub(super) fn merged(&mut self, name: &ResourceType) {
        let committing = std::mem::take(&mut self.of(name).committing);
        self.merged.extend(committing);
        self.hear();
    }

    /// Takes back what was handed over and not merged.
    pub(super) fn put_back(&mut self, name: &ResourceType, rows: Incoming) {
        let stage = self.of(name);
        stage.committing.clear();
        stage.staged.files.extend(rows.files);
        stage.staged.unchanged.extend(rows.unchanged);
        self.hear();
    }
}

/// Returns the columns of a type's table, as a text that is the same for the same.
pub fn columns_of(name: &ResourceType, options: &LayoutOptions, table: &Table) -> Result<String> {
    let schema = arrow_schema(&layout_for(name, options, table.schema()?.as_ref())?);
    Ok(format!("{:032x}", twox_hash::XxHash3_128::oneshot(format!("{:?}", schema.fields()).as_bytes())))
}
