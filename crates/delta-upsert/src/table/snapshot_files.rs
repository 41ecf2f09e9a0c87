//! The table's data files at the snapshot that is merged into.

use deltalake::kernel::{Add, Remove};
use roaring::RoaringTreemap;
use serde_json::Value;

use crate::commit::deletion_vectors;
use crate::matching::keys::DataFile;
use crate::table::{Table, storage};
use foundation::error::Result;

/// A data file, as it is read and as the log names it.
pub(crate) struct TargetFile {
    pub data: DataFile,
    /// Rows by the log's statistics, those included that are gone.
    pub rows: Option<u64>,
    pub add: Add,
    pub remove: Remove,
}

/// All data files of `table`; none where it does not exist.
pub(crate) fn targets(table: &Table) -> Result<Vec<TargetFile>> {
    let Some(delta) = &table.delta else { return Ok(Vec::new()) };
    let snapshot = delta.snapshot().map_err(|error| storage(error, "no snapshot"))?;
    let mut targets = Vec::new();
    for view in snapshot.log_data().iter() {
        let gone = match view.deletion_vector_descriptor() {
            Some(descriptor) => deletion_vectors::read(table, &descriptor)?,
            None => RoaringTreemap::new(),
        };
        let stats = view.stats();
        let ids = stats.as_deref().map_or((None, None), id_range);
        let data = DataFile { path: view.object_store_path(), size: view.size() as u64, gone, ids };
        let rows = view.num_records().map(|rows| rows as u64);
        let add = Add {
            path: view.path().into_owned(),
            partition_values: view.partition_values_map(),
            size: view.size(),
            modification_time: view.modification_time(),
            data_change: true,
            stats,
            deletion_vector: view.deletion_vector_descriptor(),
            ..Add::default()
        };
        targets.push(TargetFile { data, rows, add, remove: view.remove_action(true) });
    }
    Ok(targets)
}

impl Table {
    /// Rows of the table by its log, those included that are gone; 0 where it does not say.
    pub fn rows_by_log(&self) -> u64 {
        let Some(snapshot) = self.delta.as_ref().and_then(|delta| delta.snapshot().ok()) else { return 0 };
        let files = snapshot.log_data();
        files.iter().filter_map(|file| file.num_records()).map(|rows| rows as u64).sum()
    }
}

/// Least and greatest `id` by a file's statistics.
fn id_range(stats: &str) -> (Option<String>, Option<String>) {
    let Ok(stats) = serde_json::from_str::<Value>(stats) else { return (None, None) };
    let text = |key: &str| stats.get(key)?.get("id")?.as_str().map(str::to_owned);
    (text("minValues"), text("maxValues"))
}
