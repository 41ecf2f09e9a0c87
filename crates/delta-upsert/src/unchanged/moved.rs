//! Rows that were unchanged when they came, and are not where they were any more: another writer changed the table
//! during the run.

use std::collections::BTreeMap;
use std::sync::Arc;

use arrow::datatypes::SchemaRef;
use object_store::path::Path;
use roaring::RoaringTreemap;

use crate::maintenance::rewrite::{Place, RowRewriter, Shape};
use crate::matching::deletions::Scratch;
use crate::matching::keys::{DataFile, OpenFile};
use crate::row::{FileRows, RowKey};
use crate::staging::spill::{KeyAt, Spill};
use crate::staging::{Keys, StagedFile};
use crate::table::Table;
use crate::table::snapshot_files::TargetFile;
use crate::unchanged::rows::UnchangedRows;
use foundation::error::{Context, Error, ErrorKind, Result};

/// Stages the rows that are not where `unchanged` found them, out of the files that they were in, which stay where
/// they are until a vacuum: what becomes of them in the table as it is now is for the match to say, as of any row.
pub(crate) async fn stage_moved(
    table: &Table,
    schema: &SchemaRef,
    targets: &[TargetFile],
    unchanged: &mut [UnchangedRows],
    (run, scratch): (&str, &Scratch),
) -> Result<Vec<StagedFile>> {
    let mut staged = Vec::new();
    for rows in unchanged {
        for (file, index, moved) in rows.take_moved(targets) {
            let path = Path::parse(&file.path).context(ErrorKind::Internal, "a data file's path")?;
            let mut old = DataFile::new(&path, file.size);
            let gone = |error: Error| {
                Error::new(
                    ErrorKind::Table,
                    format!(
                        "another writer replaced {} during the run and removed it, with {} rows that the export did \
                         not change ({error}); nothing was merged",
                        file.path,
                        moved.len()
                    ),
                )
                .with_hint("run again: rows are looked up in the table as it is then")
            };
            let open = OpenFile::open(table, &old).await.map_err(gone)?;
            let mut all = RoaringTreemap::new();
            all.insert_range(0..open.rows());
            // The arrivals of rows in the order in which they are copied.
            let arrivals = rows.arrivals(index, &moved)?;
            let (mut arrivals, mut keys) = (arrivals.into_iter(), Vec::with_capacity(moved.len() as usize));
            open.for_each_ranked(Some(&moved), |_, key| {
                let arrival = arrivals.next().unwrap_or_default();
                keys.extend(key.map(|key| RowKey { arrival, ..key }));
                Ok(())
            })
            .await?;
            drop(open);
            old.gone = all - &moved;
            let place = Place::new(table, run, u64::MAX);
            let copied = async {
                let shape = Shape::of(table, schema, &[&old]).await?;
                RowRewriter::of(&place, &shape, &[&old]).await
            };
            let adds = match copied.await {
                Ok(adds) => adds,
                Err(error) => {
                    place.discard().await;
                    return Err(gone(error));
                }
            };
            let [add] = &adds[..] else {
                place.discard().await;
                return Err(Error::new(ErrorKind::Internal, "rows of one file became several"));
            };
            if keys.len() as u64 != moved.len() {
                place.discard().await;
                return Err(gone(Error::new(ErrorKind::Data, "a row of it has no id")));
            }
            let mut spill = Spill::new(&scratch.folder, usize::MAX);
            let mut by_file: BTreeMap<u32, FileRows> = BTreeMap::new();
            let mut updated: Option<(i64, i64)> = None;
            for (row, key) in keys.into_iter().enumerate() {
                by_file.entry(key.arrival.file()).or_default().rows += 1;
                rows.hand_over(key.arrival);
                let (first, last) = updated.unwrap_or((key.last_updated, key.last_updated));
                updated = Some((first.min(key.last_updated), last.max(key.last_updated)));
                spill.push(KeyAt::new(key, 0, row as u32))?;
            }
            tracing::info!(
                resource_type = %table.resource_type, file = file.path, rows = moved.len(),
                "another writer replaced rows during the run that the export did not change; matching them again"
            );
            staged.push(StagedFile {
                path: Path::from(add.path.as_str()),
                size: add.size as u64,
                rows: spill.rows(),
                keys: Keys::Fresh(spill),
                updated,
                id_range: None,
                void: RoaringTreemap::new(),
                by_file,
                noted: None,
            });
        }
    }
    Ok(staged)
}

/// Rows that are unchanged, by file of the table.
pub(crate) fn by_target(targets: &[TargetFile], unchanged: &[UnchangedRows]) -> Vec<RoaringTreemap> {
    let mut found = vec![RoaringTreemap::new(); targets.len()];
    let at: std::collections::HashMap<Arc<str>, usize> =
        targets.iter().enumerate().map(|(at, target)| (Arc::from(target.data.path.as_ref()), at)).collect();
    for (file, rows) in unchanged.iter().flat_map(UnchangedRows::places) {
        if let Some(at) = at.get(file.path.as_str()) {
            found[*at] |= rows;
        }
    }
    found
}
