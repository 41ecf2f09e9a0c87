//! Rows that runs have staged and no table has yet: persisted, so that a run that is killed or fails does not let its
//! successor download it again.
//!
//! One document, `index.json`, says all of it and is replaced as a whole; beside it lie the keys of each staged Parquet
//! file's rows. A file of an export is *held* when every row of it is in a Parquet file that is closed, durable and
//! listed here. Row groups mix files, so a Parquet file may have rows of files that are not held: those do not count,
//! since they come again.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::messages::{ExportFile, ParsedChunk};
use crate::state::{Document, OnDamage, StateStore};
use bulk_data_client::unsigned;
use foundation::fault_points::reached;

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
    /// Counts of its lines, where it is held.
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

/// The program's entry in [`Checkpoint::created_by`]: its version, and that of this file's own shape.
const CREATED_BY: &str = concat!("fhirlake ", env!("CARGO_PKG_VERSION"), ", 2");

impl Checkpoint {
    /// Nothing, staged by this program.
    pub fn empty() -> Self {
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

    /// Takes the export files out that `ours` names, and the Parquet files that have rows of them; what is left is of
    /// other exports.
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

    /// Returns the files that the export with this status URL listed, by what was said of each.
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

impl Document for Checkpoint {
    const NAME: &'static str = "staged/index.json";
    const ON_DAMAGE: OnDamage = OnDamage::Rebuild("the checkpoint is not readable; its files are downloaded again");
}

/// The folder of the checkpoint in the state.
const FOLDER: &str = "staged";

/// The checkpoint of a pipeline, with the keys of its files. Holds ids' hashes and statistics of rows: private.
#[derive(Debug, Clone)]
pub struct CheckpointStore {
    state: StateStore,
}

impl CheckpointStore {
    /// Returns that of a state.
    pub fn of(state: &StateStore) -> Self {
        Self { state: state.clone() }
    }

    fn keys_name(resource_type: &str, path: &str) -> String {
        format!("{FOLDER}/{resource_type}-{path}.keys")
    }

    /// Returns the local file of the keys of a staged Parquet file; it does not exist where there are none.
    pub fn keys_of(&self, resource_type: &str, path: &str) -> Result<PathBuf> {
        self.state.local_file(&Self::keys_name(resource_type, path))
    }

    /// Makes keys durable that were written into their local file.
    pub fn publish_keys(&self, resource_type: &str, path: &str) -> Result<()> {
        self.state.publish(&Self::keys_name(resource_type, path))
    }

    /// Reads the checkpoint; `None` where there is none. That of another version of the program cannot be resumed, and
    /// comes with its files only, to be removed.
    pub fn read(&self) -> Result<Option<Checkpoint>> {
        let mut work: Option<Checkpoint> = self.state.read_if_exists()?;
        if let Some(work) = work.as_mut().filter(|work| work.created_by != CREATED_BY) {
            tracing::warn!(
                created_by = work.created_by,
                "another version wrote the checkpoint; its files are downloaded again"
            );
            work.listed.clear();
        }
        Ok(work)
    }

    /// Replaces the checkpoint. Keys of files that it does not name are removed.
    pub fn write(&self, work: &Checkpoint) -> Result<()> {
        self.state.write(work)?;
        let named: HashSet<String> =
            work.files.iter().map(|file| Self::keys_name(&file.resource_type, &file.path)).collect();
        // Those that cannot be removed now are removed with a later checkpoint.
        let removed = self.state.list(FOLDER).and_then(|mut names| {
            names.retain(|name| name.ends_with(".keys") && !named.contains(name));
            self.state.remove_files(&names)
        });
        if let Err(error) = removed {
            tracing::debug!(%error, "keys that no checkpoint names could not be removed");
        }
        Ok(())
    }

    /// Removes the checkpoint.
    pub fn clear(&self) -> Result<()> {
        // First: without it there is nothing, whatever happens to the keys.
        self.state.remove::<Checkpoint>()?;
        self.state.remove_folder(FOLDER)?;
        reached("the checkpoint is removed");
        Ok(())
    }
}
