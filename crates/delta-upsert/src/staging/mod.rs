//! Rows that arrive, in Parquet files in the table's folder that its log does not know yet.

pub(crate) mod key_file;
pub(crate) mod new_file;
pub(crate) mod page_encoder;
pub(crate) mod spill;

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use arrow::datatypes::SchemaRef;
use object_store::ObjectStoreExt;
use object_store::path::Path;
use roaring::RoaringTreemap;
use serde::{Deserialize, Serialize};
use tokio_stream::StreamExt;

use crate::maintenance::vacuum::data_path;
use crate::row::{EncodedBatch, FileRows};
use crate::staging::key_file::KeyFile;
use crate::staging::new_file::NewFile;
use crate::staging::spill::{Arrived, KeyAt, Spill};
use crate::table::{Table, storage};
use crate::unchanged::IndexedFile;
use foundation::error::{Error, ErrorKind, Result};
use foundation::fault_points::reached;

/// A Parquet file that is whole and that no table's log names.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StagedParquet {
    /// Its type.
    pub resource_type: Arc<str>,
    /// Path in the table's folder.
    pub path: String,
    /// Bytes.
    pub size: u64,
    /// Rows, those included that do not count.
    pub rows: u64,
    /// Its rows by export file ([`RowPosition::file`](crate::RowPosition::file)).
    #[serde(default)]
    pub by_file: BTreeMap<u32, FileRows>,
    /// Least and greatest `lastUpdated`.
    pub updated: Option<(i64, i64)>,
    /// Least and greatest `id`, where the file's statistics know.
    pub id_range: Option<(String, String)>,
    /// The table's columns at that time: the rows fit no other.
    pub columns: String,
    /// Empty for a Parquet file. Else there is none: its rows are unchanged rows of these data files of the table.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub unchanged_in: Vec<IndexedFile>,
}

impl StagedParquet {
    /// Returns true if it stands for rows that the table has already: there is no Parquet file of it.
    pub fn is_unchanged(&self) -> bool {
        !self.unchanged_in.is_empty()
    }
}

/// A file that is being written.
pub struct StagingFile {
    file: NewFile,
    columns: SchemaRef,
    keys: Spill<KeyAt>,
    /// Least and greatest `lastUpdated`.
    updated: Option<(i64, i64)>,
    by_file: BTreeMap<u32, FileRows>,
}

/// A file that is whole and not committed.
#[derive(Debug)]
pub struct StagedFile {
    /// Path in the table's folder.
    pub path: Path,
    /// Its size in bytes.
    pub size: u64,
    /// Its rows.
    pub rows: u64,
    /// Keys of its rows.
    pub(crate) keys: Keys<KeyAt>,
    /// Least and greatest `lastUpdated`, absent ones the least.
    pub(crate) updated: Option<(i64, i64)>,
    /// Least and greatest `id`, where the file's statistics know.
    pub id_range: Option<(String, String)>,
    /// Rows that do not count: they come again.
    pub(crate) void: RoaringTreemap,
    /// Its rows by export file, without those in `void`.
    pub by_file: BTreeMap<u32, FileRows>,
    /// An earlier run's record of it, where that staged it.
    pub(crate) noted: Option<StagedParquet>,
}

/// Records of the rows that a run brings.
#[derive(Debug)]
pub(crate) enum Keys<T> {
    /// In memory, and on disk as long as the process lives.
    Fresh(Spill<T>),
    /// Written down.
    Kept(KeyFile<T>),
}

impl<T: Arrived> Keys<T> {
    /// Rows that count.
    pub(crate) fn rows(&self) -> u64 {
        match self {
            Keys::Fresh(keys) => keys.rows(),
            Keys::Kept(keys) => keys.rows(),
        }
    }

    /// Goes through those of some partitions.
    pub(crate) fn read(&self, partitions: std::ops::Range<usize>, each: impl FnMut(T) -> Result<()>) -> Result<()> {
        match self {
            Keys::Fresh(keys) => keys.read(partitions, each),
            Keys::Kept(keys) => keys.read(partitions, each),
        }
    }

    /// Writes them into a file, durably; they are read there from then on.
    pub(crate) fn save(&mut self, path: &std::path::Path) -> Result<()> {
        if let Keys::Fresh(keys) = self {
            *self = Keys::Kept(KeyFile::save(keys, path)?);
            reached("keys are saved");
        }
        Ok(())
    }

    /// Bytes of memory that they take.
    pub(crate) fn memory(&self) -> usize {
        match self {
            Keys::Fresh(keys) => keys.memory(),
            Keys::Kept(_) => 0,
        }
    }

    /// Puts them on disk.
    pub(crate) fn spill(&mut self) -> Result<()> {
        match self {
            Keys::Fresh(keys) => keys.spill(),
            Keys::Kept(_) => Ok(()),
        }
    }
}

/// State of a file that an earlier run staged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StagedFileState {
    /// It waits to be merged.
    Pending,
    /// A version of the table names it, or did.
    Merged,
    /// It is not there as it was.
    Missing,
}

impl StagingFile {
    /// Begins a file at `path` in the table's folder for row groups with these columns. Keys of its rows that
    /// are spilled go into the folder `scratch`.
    pub async fn create(table: &Table, path: Path, columns: SchemaRef, scratch: &std::path::Path) -> Result<Self> {
        let file = NewFile::create(table, path).await?;
        let keys = Spill::new(scratch, usize::MAX);
        Ok(Self { file, columns, keys, updated: None, by_file: BTreeMap::new() })
    }

    /// Returns true if row groups with these columns fit into the file: all of a file's have the same.
    pub fn takes(&self, columns: &SchemaRef) -> bool {
        self.columns == *columns
    }

    /// Bytes of memory that the keys of its rows take.
    pub fn keys_memory(&self) -> usize {
        self.keys.memory()
    }

    /// Bytes of memory that its footer takes.
    pub fn footer_memory(&self) -> usize {
        self.file.footer_memory()
    }

    /// Bytes so far.
    pub fn size(&self) -> u64 {
        self.file.size()
    }

    /// Appends a batch's row group.
    pub async fn append(&mut self, batch: EncodedBatch) -> Result<()> {
        self.file.append(&batch.parquet, &batch.metadata).await?;
        for (index, more) in &batch.by_file {
            self.by_file.entry(*index).or_default().add(more);
        }
        for key in batch.keys {
            let (first, last) = self.updated.unwrap_or((key.last_updated, key.last_updated));
            self.updated = Some((first.min(key.last_updated), last.max(key.last_updated)));
            let row = self.keys.rows();
            let row = u32::try_from(row).ok().filter(|_| row < KeyAt::MAX_ROWS);
            let row = row.ok_or_else(|| Error::new(ErrorKind::Internal, "a staged file with a billion rows"))?;
            self.keys.push(KeyAt::new(key, 0, row))?;
        }
        Ok(())
    }

    /// Writes the footer and makes the file durable.
    pub async fn close(self, table: &Table) -> Result<StagedFile> {
        let file = self.file.close(table).await?;
        let rows = self.keys.rows();
        Ok(StagedFile {
            path: file.path,
            size: file.size,
            rows,
            keys: Keys::Fresh(self.keys),
            updated: self.updated,
            id_range: file.id_range,
            void: RoaringTreemap::new(),
            by_file: self.by_file,
            noted: None,
        })
    }

    /// Gives the file up.
    pub async fn discard(self) {
        self.file.discard().await;
    }
}

impl StagedFile {
    /// A file that an earlier run staged, with its keys in the file `keys`. Of its rows count those from the export's
    /// files with the indexes `held`. An error of kind `Data` says that the keys are not what was written.
    pub fn again(staged: StagedParquet, keys: &std::path::Path, held: &HashSet<u32>) -> Result<Self> {
        let mut kept: KeyFile<KeyAt> = KeyFile::open(keys)?;
        let mut void = RoaringTreemap::new();
        let mut by_file = staged.by_file.clone();
        by_file.retain(|index, _| held.contains(index));
        let counted: u64 = by_file.values().map(|of| of.rows).sum();
        if counted != staged.rows {
            kept.count_only(by_file.keys().copied().collect(), |key| void.extend([key.row()]))?;
        }
        if kept.rows() != counted || kept.rows() + void.len() != staged.rows {
            return Err(Error::new(
                ErrorKind::Data,
                format!("{}: key file does not match its Parquet file", keys.display()),
            ));
        }
        Ok(Self {
            path: Path::from(staged.path.as_str()),
            size: staged.size,
            rows: staged.rows,
            keys: Keys::Kept(kept),
            updated: staged.updated,
            id_range: staged.id_range.clone(),
            void,
            by_file,
            noted: Some(staged),
        })
    }

    /// Returns the record that it takes to read it [again](Self::again). `columns` says what the table's were.
    pub fn note(&self, table: &Table, columns: &str) -> StagedParquet {
        if let Some(noted) = &self.noted {
            return StagedParquet { by_file: self.by_file.clone(), ..noted.clone() };
        }
        StagedParquet {
            resource_type: table.resource_type.clone(),
            path: self.path.to_string(),
            size: self.size,
            rows: self.rows,
            by_file: self.by_file.clone(),
            updated: self.updated,
            id_range: self.id_range.clone(),
            columns: columns.to_owned(),
            unchanged_in: Vec::new(),
        }
    }

    /// Rows that count.
    pub fn rows_brought(&self) -> u64 {
        self.keys.rows()
    }

    /// Writes the keys of its rows into a file, durably; they are read there from then on.
    pub fn save_keys(&mut self, path: &std::path::Path) -> Result<()> {
        self.keys.save(path)
    }

    /// Bytes of memory that the keys of its rows take.
    pub fn keys_memory(&self) -> usize {
        self.keys.memory()
    }

    /// Puts the keys of its rows on disk.
    pub fn spill_keys(&mut self) -> Result<()> {
        self.keys.spill()
    }

    /// Removes the file.
    pub async fn discard(&self, table: &Table) {
        new_file::remove(table, &self.path).await;
    }
}

impl Table {
    /// Returns the states of files that an earlier run staged. One that a version named and a later one removed so long
    /// ago that the table does not know it any more waits, for all that can be told; its rows then lose against the
    /// table's.
    pub async fn staged_file_states(&self, staged: &[StagedParquet]) -> Result<Vec<StagedFileState>> {
        let mut named: HashSet<Path> = HashSet::new();
        if let Some(delta) = &self.delta {
            let failed = |error| storage(error, "the table's log cannot be read");
            let snapshot = delta.snapshot().map_err(failed)?;
            named.extend(snapshot.log_data().iter().map(|file| file.object_store_path()));
            let mut tombstones = snapshot.all_tombstones(self.log_store.as_ref());
            while let Some(tombstone) = tombstones.try_next().await.map_err(failed)? {
                named.insert(data_path(tombstone.path().as_ref()));
            }
        }
        let store = self.store();
        let mut staged_file_states = Vec::with_capacity(staged.len());
        for file in staged {
            if file.is_unchanged() {
                // The commit checks that its rows are still in the table.
                staged_file_states.push(StagedFileState::Pending);
                continue;
            }
            let path = Path::from(file.path.as_str());
            staged_file_states.push(match store.head(&path).await {
                _ if named.contains(&path) => StagedFileState::Merged,
                Ok(found) if found.size == file.size => StagedFileState::Pending,
                Ok(_) | Err(object_store::Error::NotFound { .. }) => StagedFileState::Missing,
                Err(error) => return Err(storage(error, &format!("{path} cannot be read"))),
            });
        }
        Ok(staged_file_states)
    }

    /// Makes the names of new files durable, where they are in a local folder.
    pub fn sync_folder(&self) {
        if let Some(folder) = self.local() {
            // A file system that cannot sync a folder has done what it can.
            let _ = std::fs::File::open(folder).and_then(|folder| folder.sync_all());
        }
    }

    /// Removes staged files that nothing needs any more.
    pub async fn discard_staged(&self, paths: impl IntoIterator<Item = &str>) {
        for path in paths {
            new_file::remove(self, &Path::from(path)).await;
        }
    }
}
