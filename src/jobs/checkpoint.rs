//! What runs have staged and no table has yet: persisted, so that a run that is killed or fails does not let its successor
//! download it again.
//!
//! One file, `index.json`, says all of it and is replaced as a whole; beside it lie the keys of each staged Parquet file's
//! rows. A file of an export is *held* when every row of it is in a Parquet file that is closed, durable and listed here.
//! Row groups mix files, so a Parquet file may have rows of files that are not held: those do not count, since they come again.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::error::{Context, ErrorKind, Result};
use crate::messages::{ExportFile, ParsedChunk};
use crate::mirror::{Mirror, push};
use bulk_data_client::unsigned;
use foundation::fault_points::reached;
use foundation::secure_fs::{private_dir, write_atomically};

pub use delta_upsert::StagedParquet;

/// A file of an export, as its manifest listed it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointEntry {
    /// The export, by where its status is asked for.
    pub status: String,
    /// Hash of what the manifest says of it, its link but for a signature among that.
    pub said: String,
    /// [`ExportFile::index`]: its rows' keys have it.
    pub index: u32,
    /// What its lines were, where it is held.
    pub held: Option<ParsedChunk>,
}

/// All of it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Checkpoint {
    /// The program that staged it: another version may encode otherwise.
    pub created_by: String,
    /// The export files that the manifests listed.
    pub listed: Vec<CheckpointEntry>,
    /// The Parquet files.
    pub files: Vec<StagedParquet>,
    /// Parquet files that were merged: they need not be there any more.
    pub in_tables: Vec<StagedParquet>,
}

/// What this program writes into [`Checkpoint::created_by`]: its version, and that of this file's own shape.
const CREATED_BY: &str = concat!("fhirlake ", env!("CARGO_PKG_VERSION"), ", 2");

impl Checkpoint {
    /// Nothing, staged by this program.
    pub fn nothing() -> Self {
        Self { created_by: CREATED_BY.to_owned(), ..Self::default() }
    }

    /// An index that no file has, and none after it.
    pub fn next_index(&self) -> u32 {
        self.listed.iter().map(|file| file.index + 1).max().unwrap_or(0)
    }

    /// Files of exports that are held.
    pub fn held(&self) -> usize {
        self.listed.iter().filter(|file| file.held.is_some()).count()
    }

    /// Files of exports with an index in `gone` are not held: they must come again.
    pub fn release(&mut self, gone: &HashSet<u32>) {
        for file in self.listed.iter_mut().filter(|file| gone.contains(&file.index)) {
            file.held = None;
        }
        for file in self.files.iter_mut().chain(&mut self.in_tables) {
            file.by_file.retain(|index, _| !gone.contains(index));
        }
    }

    /// Takes the export files out that `ours` names, and the Parquet files that have rows of them; what is left is of other
    /// exports.
    pub fn split(&mut self, ours: impl Fn(&CheckpointEntry) -> bool) -> Checkpoint {
        let (ours, others) = std::mem::take(&mut self.listed).into_iter().partition(ours);
        let mut taken = Checkpoint { created_by: self.created_by.clone(), listed: ours, ..Checkpoint::default() };
        self.listed = others;
        let indexes: HashSet<u32> = taken.listed.iter().map(|file| file.index).collect();
        let is_ours = |file: &StagedParquet| file.by_file.keys().any(|index| indexes.contains(index));
        (taken.files, self.files) = std::mem::take(&mut self.files).into_iter().partition(is_ours);
        (taken.in_tables, self.in_tables) = std::mem::take(&mut self.in_tables).into_iter().partition(is_ours);
        // A file that has rows of both goes with ours: theirs come again.
        let both = taken.files.iter().flat_map(|file| file.by_file.keys()).filter(|index| !indexes.contains(index));
        self.release(&both.copied().collect());
        taken
    }

    /// What the export with this status URL listed, by what was said of each.
    pub fn of_export(&self, status: &str) -> HashMap<String, CheckpointEntry> {
        let mut found: HashMap<String, CheckpointEntry> = HashMap::new();
        let mut twice = HashSet::new();
        for file in self.listed.iter().filter(|file| file.status == status) {
            if found.insert(file.said.clone(), file.clone()).is_some() {
                twice.insert(file.said.clone());
            }
        }
        // Which of two alike is held cannot be told: both come again.
        for said in twice {
            found.entry(said).and_modify(|file| file.held = None);
        }
        found
    }
}

/// Hash of what a manifest says of a file, for [`CheckpointEntry::said`].
pub fn said_of(file: &ExportFile) -> String {
    let said = format!("{:?} {:?} {:?} {}", file.place.kind, file.declared, file.count, unsigned(&file.url));
    format!("{:032x}", twox_hash::XxHash3_128::oneshot(said.as_bytes()))
}

/// Where it is kept. Holds ids' hashes and statistics of rows: private.
#[derive(Debug, Clone)]
pub struct CheckpointStore {
    folder: PathBuf,
    mirror: Option<Arc<Mirror>>,
}

impl CheckpointStore {
    /// In `folder`, which need not exist, and may be the copy of a mirror.
    pub fn at(folder: PathBuf, mirror: Option<Arc<Mirror>>) -> Self {
        Self { folder, mirror }
    }

    fn keep(&self) -> Result<()> {
        push(self.mirror.as_ref())
    }

    fn index(&self) -> PathBuf {
        self.folder.join("index.json")
    }

    /// Where the keys of a staged Parquet file of a type are.
    pub fn keys_of(&self, resource_type: &str, path: &str) -> PathBuf {
        self.folder.join(format!("{resource_type}-{path}.keys"))
    }

    /// What is kept; `None` where nothing is. What another version of the program kept cannot be resumed, and comes
    /// back with its files only, to be removed.
    pub fn read(&self) -> Result<Option<Checkpoint>> {
        let unreadable = || format!("{} cannot be read", self.index().display());
        let text = match std::fs::read(self.index()) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).context(ErrorKind::State, unreadable()),
        };
        let mut work: Checkpoint = match serde_json::from_slice(&text) {
            Ok(work) => work,
            Err(error) => {
                tracing::warn!(%error, "the checkpoint is not readable; its files are downloaded again");
                return Ok(None);
            }
        };
        if work.created_by != CREATED_BY {
            tracing::warn!(created_by = work.created_by, "another version wrote the checkpoint; its files are downloaded again");
            work.listed.clear();
        }
        Ok(Some(work))
    }

    /// Replaces what is kept. Keys of files that are not named any more go.
    pub fn write(&self, work: &Checkpoint) -> Result<()> {
        private_dir(&self.folder)?;
        let text = serde_json::to_vec(work).context(ErrorKind::Internal, "what is staged")?;
        write_atomically(&self.index(), &text)?;
        let named: HashSet<PathBuf> = work.files.iter().map(|file| self.keys_of(&file.resource_type, &file.path)).collect();
        let entries = std::fs::read_dir(&self.folder).into_iter().flatten().flatten().map(|entry| entry.path());
        for stray in entries.filter(|path| path.extension().is_some_and(|ext| ext == "keys") && !named.contains(path)) {
            // What cannot be removed now is removed the next time, or with the folder.
            let _ = std::fs::remove_file(stray);
        }
        self.keep()
    }

    /// Forgets all of it.
    pub fn clear(&self) -> Result<()> {
        // Without the index there is nothing, whatever happens to the rest.
        for outcome in [std::fs::remove_file(self.index()), std::fs::remove_dir_all(&self.folder)] {
            match outcome {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(error).context(ErrorKind::State, format!("{} cannot be removed", self.folder.display()));
                }
                _ => {}
            }
        }
        reached("the checkpoint is removed");
        self.keep()
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.folder
    }
}
