//! Leftovers of earlier runs: lines in quarantine, to be retried, and what a run that was killed had staged.

use std::sync::Arc;

use url::Url;

use super::RunPlan;
use crate::error::{Context, ErrorKind, Result};
use crate::jobs::checkpoint::Checkpoint;
use crate::messages::{ExportFile, FileKind, ManifestEntryId};
use crate::stages::download::replay::Replayed;
use crate::state::{Journal, JournalEntry, StateStore};
use delta_upsert::Tables;
use fhir_arrow::Model;

/// The lines in quarantine of the types that the pipeline has, as the oldest files of the run.
pub(super) fn replay(plan: &RunPlan, state: &StateStore) -> Result<Option<Replayed>> {
    let superseded = state.remove_superseded()?;
    if superseded > 0 {
        tracing::info!(lines = superseded, "lines left quarantine: what they are about was deleted since");
    }
    for (file, line) in state.damaged_quarantine()? {
        tracing::warn!(file, line, "an entry of the quarantine is damaged: it is not retried, and stays as it is");
    }
    let mut files = Vec::new();
    for (declared, lines) in state.retryable()? {
        if declared.as_deref().is_some_and(|name| !plan.types().contains(name)) {
            continue;
        }
        tracing::info!(resource_type = declared.as_deref().unwrap_or("-"), lines, "retrying quarantined lines");
        files.push(Arc::new(ExportFile {
            index: files.len() as u32,
            export: usize::MAX,
            name: format!("quarantine of {}", declared.as_deref().unwrap_or("no type")),
            url: Url::parse("quarantine:").context(ErrorKind::Internal, "a URL")?,
            location: None,
            kind: FileKind::Output,
            declared,
            count: None,
            requires_access_token: false,
            replayed: true,
            place: ManifestEntryId { page: 0, kind: FileKind::Output, at: files.len() },
        }));
    }
    if files.is_empty() {
        return Ok(None);
    }
    Ok(Some(Replayed { files, lines: state.replayed_lines() }))
}

/// Removes what a run left that was killed: staged files that no table's log names, and that are not persisted to be
/// gone on with.
pub(super) async fn clean_up(journal: &Journal, tables: &Tables, staged: Option<&Checkpoint>) -> Result<()> {
    let steps = journal.unfinished()?;
    let runs = steps.iter().filter_map(|step| match step {
        JournalEntry::Began { run, .. } => Some(run.as_str()),
        JournalEntry::Ended { .. } => None,
    });
    let runs: Vec<&str> = runs.collect();
    if runs.is_empty() {
        return Ok(());
    }
    let (mut removed, mut left) = (0, false);
    for name in tables.existing_folders(|name| Model::r4().is_resource_type(name)).await? {
        match tables.open(&name).await {
            Ok(table) => {
                for run in &runs {
                    removed += table.remove_orphans(run, staged.map_or(&[], |staged| staged.files.as_slice())).await?;
                }
                table.remove_empty_folder();
            }
            // Not this run's to judge: whoever needs the table will say so.
            Err(error) => {
                tracing::warn!(resource_type = %name, %error, "what the last run left of the type stays until the \
                    next");
                left = true;
            }
        }
    }
    tracing::info!(
        runs = runs.join(", "),
        removed,
        "the last run was interrupted; files that its checkpoint does not list were removed"
    );
    if left { Ok(()) } else { journal.clear() }
}
