//! What earlier runs staged and no table has yet: looked through before a run goes on with it.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use super::prepare::Prepared;
use crate::delta::Fate;
use crate::error::Result;
use crate::messages::ResourceType;
use crate::staged::{StagedFolder, StagedParquet, StagedWork};
use crate::stages::merge::{Keep, columns_of};
use crate::state::StateFolder;

/// What a run goes on with.
#[derive(Default)]
pub(super) struct TakenUp {
    /// What waits to be merged.
    pub work: StagedWork,
    /// What was merged before the run that staged it ended.
    pub in_tables: Vec<StagedParquet>,
    /// Where the run writes down what it stages itself.
    pub keep: Option<Keep>,
}

/// Looks through what earlier runs staged of the exports that are gone on with, and tells the kick-offs of it. What belongs
/// to no export any more is removed.
pub(super) async fn take_up(state: &StateFolder, staged: Option<StagedWork>, prepared: &mut Prepared) -> Result<TakenUp> {
    let folder = state.staged();
    let exports = state.exports()?.in_flight;
    let accepted = prepared.kickoffs.iter().filter_map(|kickoff| kickoff.in_flight.as_ref());
    let going_on: HashSet<String> = accepted.clone().map(|accepted| accepted.status.to_string()).collect();
    let mut work = staged.unwrap_or_default();
    let is_ours = work.listed.iter().any(|file| going_on.contains(&file.status));
    let is_others = work.listed.iter().any(|file| exports.iter().any(|export| export.status == file.status));
    if is_others && !is_ours {
        // Of an export that this run does not ask for; one that does will go on with it.
        tracing::info!("what is staged of another export in flight is left alone");
        return Ok(TakenUp::default());
    }
    // Types that were merged whole, whatever became of their files.
    let mut merged: HashSet<ResourceType> = HashSet::new();
    for accepted in accepted {
        let export = exports.iter().find(|export| export.status == accepted.status.as_str());
        if let Some(time) = export.and_then(|export| export.transaction_time) {
            let time = prepared.until(time);
            merged.extend(accepted.tables.iter().filter(|(_, table)| **table == time).map(|(name, _)| name.clone()));
        }
    }
    work.listed.retain(|file| going_on.contains(&file.status));
    let in_tables = look_through(&folder, &mut work, &merged, prepared).await?;
    for kickoff in &mut prepared.kickoffs {
        if let Some(accepted) = &mut kickoff.in_flight {
            accepted.staged = Arc::new(work.of_export(accepted.status.as_str()));
        }
    }
    if work.held() > 0 {
        tracing::info!(files = work.held(), parquet_files = work.files.len(), "going on with what an earlier run staged");
    }
    let keep = Keep { folder, every: prepared.plan.checkpoint.0, bytes: prepared.plan.checkpoint.1 };
    Ok(TakenUp { work, in_tables, keep: Some(keep) })
}

/// Leaves in `work` what waits to be merged; what is in the tables already.
async fn look_through(
    folder: &StagedFolder,
    work: &mut StagedWork,
    merged: &HashSet<ResourceType>,
    prepared: &Prepared,
) -> Result<Vec<StagedParquet>> {
    let mut by_type: BTreeMap<ResourceType, Vec<StagedParquet>> = BTreeMap::new();
    for file in std::mem::take(&mut work.files) {
        by_type.entry(file.resource_type.clone()).or_default().push(file);
    }
    let (mut in_tables, mut lost) = (Vec::new(), HashSet::new());
    for (name, files) in &by_type {
        let table = match prepared.opened.get(name) {
            Some(table) => table.clone(),
            None => prepared.tables.open(name).await?,
        };
        let columns = columns_of(name, &prepared.plan.layout, &table)?;
        let fates = table.fates(files).await?;
        for (file, fate) in files.iter().zip(fates) {
            let keys = folder.keys_of(name, &file.path);
            match fate {
                Fate::Merged => in_tables.push(file.clone()),
                Fate::Waits if file.columns == columns && keys.is_file() => work.files.push(file.clone()),
                Fate::Waits | Fate::Gone if !merged.contains(name) => {
                    tracing::warn!(file = file.path, resource_type = %name, "staged rows cannot be used; they are downloaded again");
                    lost.extend(file.rows_of.keys().copied());
                    table.discard_staged([file.path.as_str()]).await;
                }
                Fate::Waits | Fate::Gone => table.discard_staged([file.path.as_str()]).await,
            }
        }
    }
    let held: HashSet<u32> = work.listed.iter().filter(|file| file.held.is_some()).map(|file| file.index).collect();
    work.release(&lost);
    for file in &mut work.files {
        file.rows_of.retain(|index, _| held.contains(index) && !lost.contains(index));
    }
    let (files, useless): (Vec<_>, Vec<_>) =
        std::mem::take(&mut work.files).into_iter().partition(|file| !file.rows_of.is_empty());
    work.files = files;
    for file in useless {
        if let Ok(table) = prepared.tables.open(&file.resource_type).await {
            table.discard_staged([file.path.as_str()]).await;
            table.remove_empty_folder();
        }
    }
    Ok(in_tables)
}
