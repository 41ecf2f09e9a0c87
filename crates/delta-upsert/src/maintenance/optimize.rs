//! Maintenance of a table's files: small ones together, marked rows away, rows in the order of their ids.
//!
//! A query's answers do not change: the commit says so (`dataChange: false`), rows keep their values, and files are
//! exchanged in one commit or not at all.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use arrow::datatypes::DataType;
use deltalake::kernel::{Action, Add};
use deltalake::protocol::DeltaOperation;
use serde_json::{Value, json};

use crate::commit::{self, Attempt};
use crate::maintenance::cluster::sorted;
use crate::maintenance::rewrite::{Place, RowRewriter, Shape};
use crate::matching::deletions::Scratch;
use crate::matching::keys::{DataFile, OpenFile};
use crate::staging::new_file::id_range;
use crate::table::Table;
use crate::table::snapshot_files::{TargetFile, targets};
use flow::on_all_cores;
use foundation::Limit;
use foundation::error::{Error, ErrorKind, Result};

/// Settings of `optimize`.
#[derive(Debug, Clone)]
pub struct OptimizeSettings {
    /// Bytes that a file should have.
    pub target_file_bytes: u64,
    /// Rows of a file, or the share of them, that are marked as deleted from which it is rewritten.
    pub min_deleted: Limit,
    /// True if rows are laid out in the order of their ids, so that a later match reads less.
    pub cluster: bool,
    /// Memory for sorting, and a folder for what does not fit.
    pub scratch: Scratch,
    /// The run's id: names its files.
    pub run: String,
    /// Further members of the commit's info.
    pub info: BTreeMap<String, Value>,
}

/// Counts of `optimize`.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize)]
pub struct Optimized {
    /// Files that were exchanged.
    pub files_removed: u64,
    /// Files that stand for them.
    pub files_added: u64,
    /// Bytes of the one and the other.
    pub bytes_removed: u64,
    /// See `bytes_removed`.
    pub bytes_added: u64,
    /// Rows that were marked as deleted and are no longer in any file.
    pub rows_purged: u64,
    /// The table's version, where it was changed.
    pub version: Option<u64>,
}

/// Number of attempts when other writers changed the files in between.
const MAX_ATTEMPTS: usize = 3;

impl Table {
    /// Compacts, purges and, if asked to, clusters the table's files.
    pub async fn optimize(&mut self, settings: &OptimizeSettings) -> Result<Optimized> {
        for _ in 0..MAX_ATTEMPTS {
            let targets = targets(self)?;
            let groups = groups(self, &targets, settings).await?;
            if groups.is_empty() {
                return Ok(Optimized::default());
            }
            let mut work = Work { settings, started: Instant::now(), adds: Vec::new() };
            // The table is changed by the commit, and read until then.
            let before = self.clone();
            let place = Place::new(&before, &settings.run, settings.target_file_bytes);
            let done = match work.write(&place, &groups).await {
                Ok(()) => work.commit(self, &groups).await,
                Err(error) => Err(error),
            };
            match done {
                Ok(Attempt::Done(version)) => return Ok(Optimized { version, ..work.done(&groups) }),
                Ok(Attempt::Unknown(error)) => return Err(error),
                failed => {
                    place.discard().await;
                    failed?;
                }
            }
            tracing::info!(resource_type = %self.resource_type, "another writer changed the files; optimizing again");
        }
        Err(Error::new(ErrorKind::Table, format!("other writers changed the files {MAX_ATTEMPTS} times in a row")))
    }
}

/// Files that become one another: each group is read together and written together.
async fn groups<'a>(
    table: &Table,
    targets: &'a [TargetFile],
    settings: &OptimizeSettings,
) -> Result<Vec<Vec<&'a TargetFile>>> {
    let dirty = |file: &TargetFile| {
        let gone = file.data.gone.len();
        gone > 0 && file.rows.is_none_or(|rows| gone >= settings.min_deleted.of(rows))
    };
    let small = |file: &TargetFile| file.data.size < settings.target_file_bytes / 2;
    if settings.cluster {
        let id = table.schema()?.and_then(|schema| Some(schema.field_with_name("id").ok()?.data_type().clone()));
        if id != Some(DataType::Utf8) {
            let why = "rows cannot be sorted by id: the table has no string column `id`";
            return Err(Error::new(ErrorKind::Table, why));
        }
        let smalls = targets.iter().filter(|file| small(file)).count();
        if targets.iter().any(dirty) || smalls > 1 || !is_clustered(table, targets).await? {
            return Ok(vec![targets.iter().collect()]);
        }
        return Ok(Vec::new());
    }
    let mut groups: Vec<Vec<&TargetFile>> = Vec::new();
    let mut size = u64::MAX;
    for file in targets.iter().filter(|file| small(file) || dirty(file)) {
        // Neighbours in the log stay neighbours.
        if size.saturating_add(file.data.size) > settings.target_file_bytes {
            groups.push(Vec::new());
            size = 0;
        }
        size += file.data.size;
        if let Some(group) = groups.last_mut() {
            group.push(file);
        }
    }
    groups.retain(|group| group.len() > 1 || group.iter().any(|file| dirty(file)));
    Ok(groups)
}

/// Returns true if no id can be in two row groups, by their statistics.
async fn is_clustered(table: &Table, targets: &[TargetFile]) -> Result<bool> {
    let mut ranges = Vec::new();
    for target in targets {
        let file = OpenFile::open(table, &target.data).await?;
        for group in file.groups() {
            let Some(range) = id_range(std::slice::from_ref(group)) else { return Ok(false) };
            ranges.push(range);
        }
    }
    ranges.sort_unstable();
    Ok(ranges.windows(2).all(|pair| pair[0].1 <= pair[1].0))
}

struct Work<'a> {
    settings: &'a OptimizeSettings,
    started: Instant,
    adds: Vec<Add>,
}

impl Work<'_> {
    /// Writes the files of all groups, a group on each core.
    async fn write(&mut self, place: &Place<'_>, groups: &[Vec<&TargetFile>]) -> Result<()> {
        let Some(schema) = place.table.schema()?.map(Arc::new) else { return Ok(()) };
        let handle = tokio::runtime::Handle::current();
        let files: Vec<Vec<&DataFile>> =
            groups.iter().map(|group| group.iter().map(|target| &target.data).collect()).collect();
        if self.settings.cluster {
            for files in files {
                let shape = Shape::of(place.table, &schema, &files).await?;
                self.adds.extend(sorted(place, &shape, &files, &self.settings.scratch).await?);
            }
        } else {
            let adds = on_all_cores(&files, |_, files| {
                handle.block_on(async {
                    let shape = Shape::of(place.table, &schema, files).await?;
                    RowRewriter::of(place, &shape, files).await
                })
            })?;
            self.adds.extend(adds.into_iter().flatten());
        }
        // Queries find what they found before.
        self.adds.iter_mut().for_each(|add| add.data_change = false);
        Ok(())
    }

    /// Returns the counts, without the version.
    fn done(&self, groups: &[Vec<&TargetFile>]) -> Optimized {
        let files = || groups.iter().flatten();
        Optimized {
            files_removed: files().count() as u64,
            files_added: self.adds.len() as u64,
            bytes_removed: files().map(|file| file.data.size).sum(),
            bytes_added: self.adds.iter().map(|add| add.size as u64).sum(),
            rows_purged: files().map(|file| file.data.gone.len()).sum(),
            version: None,
        }
    }

    /// Exchanges the files; a conflict is that another writer changed some of them.
    async fn commit(&self, table: &mut Table, groups: &[Vec<&TargetFile>]) -> Result<Attempt> {
        let files = || groups.iter().flatten();
        let done = self.done(groups);
        let metrics = json!({
            "numAddedFiles": done.files_added.to_string(),
            "numRemovedFiles": done.files_removed.to_string(),
            "numAddedBytes": done.bytes_added.to_string(),
            "numRemovedBytes": done.bytes_removed.to_string(),
            "numDeletionVectorsRemoved": files().filter(|file| file.add.deletion_vector.is_some()).count().to_string(),
            "executionTimeMs": self.started.elapsed().as_millis().to_string(),
        });
        let mut info = self.settings.info.clone();
        info.insert("operationMetrics".into(), metrics);
        let removes =
            files().map(|file| Action::Remove(deltalake::kernel::Remove { data_change: false, ..file.remove.clone() }));
        let actions: Vec<Action> = removes.chain(self.adds.iter().cloned().map(Action::Add)).collect();
        let operation =
            DeltaOperation::Optimize { predicate: None, target_size: self.settings.target_file_bytes as i64 };
        for _ in 0..crate::commit::upsert::MAX_ATTEMPTS {
            match commit::attempt(table, actions.clone(), &info, Vec::new(), operation.clone()).await? {
                // Others may have added rows; the files that are exchanged must be as they were read.
                Attempt::Conflict => {
                    table.check_writable()?;
                    let now = targets(table)?;
                    let same = |file: &TargetFile| {
                        now.iter().any(|now| {
                            now.add.path == file.add.path && now.add.deletion_vector == file.add.deletion_vector
                        })
                    };
                    if !files().all(|file| same(file)) {
                        break;
                    }
                }
                done => return Ok(done),
            }
        }
        Ok(Attempt::Conflict)
    }
}
