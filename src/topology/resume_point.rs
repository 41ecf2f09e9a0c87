//! Rows that earlier runs staged and no table has yet: looked through before a run resumes it.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use super::prepare::Prepared;
use crate::error::{Error, Result};
use crate::jobs;
use crate::jobs::ExportJobs;
use crate::jobs::checkpoint::{Checkpoint, CheckpointEntry, CheckpointStore, StagedParquet};
use crate::messages::{ResourceType, watermark_of};
use crate::stages::merge::{CheckpointPolicy, Earlier, columns_of};
use crate::state::StateStore;
use delta_upsert::StagedFileState;

/// Rows and exports that a run resumes.
#[derive(Default)]
pub(super) struct ResumePoint {
    /// Rows that earlier runs staged.
    pub earlier: Earlier,
    /// Index of the first file that no earlier run has listed.
    pub first_index: u32,
    /// Checkpoint of the run itself.
    pub checkpoint: Option<CheckpointPolicy>,
}

/// Looks through what earlier runs staged of the exports that are resumed, and tells the kick-offs of it. What belongs
/// to no export any more is removed.
pub(super) async fn resume_point(
    state: &StateStore,
    staged: Option<Checkpoint>,
    prepared: &mut Prepared,
) -> Result<ResumePoint> {
    let folder = CheckpointStore::of(state);
    let exports = state.read::<ExportJobs>()?.jobs;
    let mut others = staged.unwrap_or_default();
    let first_index = others.next_index();
    let accepted: Vec<_> = prepared.kickoffs.iter().filter_map(|kickoff| kickoff.in_flight.as_ref()).collect();
    let resumed: HashSet<String> = accepted.iter().map(|accepted| accepted.status.to_string()).collect();
    let mut ours = others.split(|file| resumed.contains(&file.status));
    // Of what a later run may resume, nothing is touched.
    let alive = |file: &CheckpointEntry| {
        let export = exports.iter().find(|export| export.status == file.status);
        export.is_some_and(|export| jobs::can_be_resumed(export, &prepared.app_id))
    };
    let alive = others.split(alive);
    let (dead, others) = (others, alive);
    // Types that were merged whole, whatever became of their files.
    let mut merged: HashSet<ResourceType> = HashSet::new();
    for accepted in accepted {
        let export = exports.iter().find(|export| export.status == accepted.status.as_str());
        if let Some(time) = export.and_then(|export| export.state.transaction_time()) {
            merged.extend(accepted.merged(watermark_of(time, prepared.until)).cloned());
        }
    }
    look_through(&folder, &mut ours, &merged, prepared).await?;
    discard(dead.files, prepared).await;
    for kickoff in &mut prepared.kickoffs {
        if let Some(accepted) = &mut kickoff.in_flight {
            accepted.staged = Arc::new(ours.of_export(accepted.status.as_str()));
        }
    }
    let checkpoint = CheckpointPolicy {
        folder,
        every: prepared.plan.stages.merge.checkpoint.0,
        bytes: prepared.plan.stages.merge.checkpoint_size.0,
    };
    Ok(ResumePoint { earlier: Earlier { ours, others }, first_index, checkpoint: Some(checkpoint) })
}

/// Leaves in `work` what waits to be merged, and what is in the tables already. What can be neither is to be downloaded
/// again.
async fn look_through(
    folder: &CheckpointStore,
    work: &mut Checkpoint,
    merged: &HashSet<ResourceType>,
    prepared: &Prepared,
) -> Result<()> {
    // Without a watermark, which rows of a table are of this export is not known to what deletes rows: they come again.
    let (in_tables, mut lost): (Vec<_>, Vec<_>) =
        std::mem::take(&mut work.in_tables).into_iter().partition(|file| merged.contains(&file.resource_type));
    work.in_tables = in_tables;
    let mut useless = Vec::new();
    for (name, files) in by_type(std::mem::take(&mut work.files)) {
        let found = async {
            let table = match prepared.opened.get(&name) {
                Some(table) => table.clone(),
                None => prepared.tables.open(&name).await?,
            };
            Ok::<_, Error>((
                columns_of(&name, &prepared.plan.layout(), &table)?,
                table.staged_file_states(&files).await?,
            ))
        };
        let (columns, staged_file_states) = match found.await {
            Ok(found) => found,
            Err(error) => {
                tracing::warn!(resource_type = %name, %error, "staged files cannot be checked; they are downloaded \
                    again");
                lost.extend(files);
                continue;
            }
        };
        for (file, file_state) in files.into_iter().zip(staged_file_states) {
            let has_keys = file_state == StagedFileState::Pending && folder.keys_of(&name, &file.path)?.is_file();
            match file_state {
                StagedFileState::Merged if merged.contains(&name) => work.in_tables.push(file),
                StagedFileState::Merged => lost.push(file),
                StagedFileState::Pending if file.columns == columns && has_keys => work.files.push(file),
                StagedFileState::Pending | StagedFileState::Missing => {
                    tracing::warn!(file = file.path, resource_type = %name, "staged rows cannot be used; they are \
                        downloaded again");
                    useless.push(file.clone());
                    lost.push(file);
                }
            }
        }
    }
    work.release(&lost.iter().flat_map(|file| file.by_file.keys().copied()).collect());
    let held: HashSet<u32> = work.listed.iter().filter(|file| file.held.is_some()).map(|file| file.index).collect();
    for file in work.files.iter_mut().chain(&mut work.in_tables) {
        file.by_file.retain(|index, _| held.contains(index));
    }
    let (files, empty): (Vec<_>, Vec<_>) =
        std::mem::take(&mut work.files).into_iter().partition(|file| !file.by_file.is_empty());
    work.files = files;
    useless.extend(empty);
    discard(useless, prepared).await;
    Ok(())
}

fn by_type(files: Vec<StagedParquet>) -> BTreeMap<ResourceType, Vec<StagedParquet>> {
    let mut by_type: BTreeMap<ResourceType, Vec<StagedParquet>> = BTreeMap::new();
    for file in files {
        by_type.entry(file.resource_type.clone()).or_default().push(file);
    }
    by_type
}

/// Removes staged files that nothing needs any more; those that a table names stay.
async fn discard(files: Vec<StagedParquet>, prepared: &Prepared) {
    for (name, files) in by_type(files) {
        let Ok(table) = prepared.tables.open(&name).await else { continue };
        let Ok(staged_file_states) = table.staged_file_states(&files).await else { continue };
        let waiting =
            files.iter().zip(staged_file_states).filter(|(_, file_state)| *file_state == StagedFileState::Pending);
        table.discard_staged(waiting.map(|(file, _)| file.path.as_str())).await;
        table.remove_empty_folder();
    }
}
