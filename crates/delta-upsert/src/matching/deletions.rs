//! Ids that the server says are gone.

use std::path::{Path, PathBuf};

use crate::row::{RowKey, RowPosition, key_of};
use crate::staging::spill::{KeyAt, Spill};
use foundation::error::Result;

/// Memory and, beyond it, disk for keys.
#[derive(Debug, Clone)]
pub struct Scratch {
    /// Folder of files without names.
    pub folder: PathBuf,
    /// Bytes of memory that matching one table may take.
    pub memory: usize,
}

/// Ids that are gone.
#[derive(Debug)]
pub struct Deletions {
    pub(crate) keys: Spill<KeyAt>,
    /// The ids themselves, as long as they are few.
    pub(crate) ids: Option<Vec<Box<str>>>,
}

impl Deletions {
    /// None yet.
    pub fn new(folder: &Path) -> Self {
        Self { keys: Spill::new(folder, usize::MAX), ids: Some(Vec::new()) }
    }

    /// Adds an id, with the version of the resource that says so where one does.
    pub fn push(&mut self, id: Box<str>, version: Option<RowKey>) -> Result<()> {
        let key = version.unwrap_or(RowKey {
            key: key_of(id.as_bytes()),
            last_updated: RowKey::ABSENT,
            version: RowKey::ABSENT,
            arrival: RowPosition::default(),
            subsetted: false,
            replayed: false,
        });
        self.ids = self.ids.take().filter(|ids| ids.len() < MAX_IDS);
        if let Some(ids) = &mut self.ids {
            ids.push(id);
        }
        self.keys.push(KeyAt::new(key, u32::from(version.is_some()), 0))
    }

    /// The version of a resource that says that it is gone, of an entry that has one.
    pub(crate) fn version_of(entry: &KeyAt) -> Option<RowKey> {
        (entry.file == 1).then(|| entry.row_key())
    }

    /// Returns true if there are none.
    pub fn is_empty(&self) -> bool {
        self.keys.rows() == 0
    }

    /// Bytes that they take of memory.
    pub fn memory(&self) -> usize {
        self.keys.memory() + self.ids.iter().flatten().map(|id| id.len() + 32).sum::<usize>()
    }

    /// Puts them on disk.
    pub fn spill(&mut self) -> Result<()> {
        self.ids = None;
        self.keys.spill()
    }
}

/// Ids up to which statistics are asked before a file's ids are read. With more, hardly a row group can be left out.
pub(crate) const MAX_IDS: usize = 100_000;
