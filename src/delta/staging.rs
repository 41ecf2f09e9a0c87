//! Rows that arrive, in Parquet files in the table's folder that its log does not know yet.

use object_store::path::Path;

use super::new_file::{self, NewFile};
use super::spill::{KeyAt, Spill};
use super::table::Table;
use crate::error::{Error, ErrorKind, Result};
use crate::messages::EncodedBatch;
use crate::schema::Filled;

/// A file that is being written.
pub struct StagingFile {
    file: NewFile,
    filled: Filled,
    keys: Spill<KeyAt>,
    /// Least and greatest `lastUpdated`.
    updated: Option<(i64, i64)>,
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
    pub(super) keys: Spill<KeyAt>,
    /// Least and greatest `lastUpdated`, absent ones the least.
    pub(super) updated: Option<(i64, i64)>,
    /// Least and greatest `id`, where the file's statistics know.
    pub id_range: Option<(String, String)>,
}

impl StagingFile {
    /// Begins a file at `path` in the table's folder for row groups with the columns of `filled`. Keys of its rows that
    /// are put on disk go into the folder `scratch`.
    pub async fn create(table: &Table, path: Path, filled: Filled, scratch: &std::path::Path) -> Result<Self> {
        let file = NewFile::create(table, path).await?;
        Ok(Self { file, filled, keys: Spill::new(scratch, usize::MAX), updated: None })
    }

    /// Whether row groups with the columns of `filled` fit into the file: all of a file's have the same.
    pub fn takes(&self, filled: &Filled) -> bool {
        self.filled == *filled
    }

    /// Bytes of memory that the keys of its rows take.
    pub fn keys_memory(&self) -> usize {
        self.keys.memory()
    }

    /// Bytes so far.
    pub fn size(&self) -> u64 {
        self.file.size()
    }

    /// Appends a batch's row group.
    pub async fn append(&mut self, batch: EncodedBatch) -> Result<()> {
        self.file.append(&batch.parquet, &batch.metadata).await?;
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
        Ok(StagedFile { path: file.path, size: file.size, rows, keys: self.keys, updated: self.updated, id_range: file.id_range })
    }

    /// Gives the file up.
    pub async fn discard(self) {
        self.file.discard().await;
    }
}

impl StagedFile {
    /// Bytes of memory that the keys of its rows take.
    pub fn keys_memory(&self) -> usize {
        self.keys.memory()
    }

    /// Puts the keys of its rows on disk.
    pub fn put_keys_on_disk(&mut self) -> Result<()> {
        self.keys.put_on_disk()
    }

    /// Removes the file.
    pub async fn discard(&self, table: &Table) {
        new_file::remove(table, &self.path).await;
    }
}
