//! The pages of a manifest: each file that was not sent on before becomes an [`ExportFile`].

use std::collections::HashSet;
use std::sync::Arc;

use url::Url;

use super::{Ended, ServerExport};
use crate::jobs::checkpoint::said_of;
use crate::jobs::{ExportEvent, ExportHandle};
use crate::messages::{ControlEvent, ExportFile, FileKind, ManifestEntryId, ManifestPage, ResourceType, watermark_of};
use crate::telemetry;
use bulk_data_client::{Manifest, ManifestFile};
use fhir_arrow::Model;
use foundation::fault_points::reached;

/// Index of the first file that a manifest lists: those below are lines out of quarantine, a file for each type. It is
/// always the same, so that a file's rows keep their order of arrival from run to run.
pub const FIRST_INDEX: u32 = 256;

/// Letters of a file's URL that its name has.
const MAX_NAME: usize = 120;

/// Files of an export that were sent on.
pub(super) struct Passed {
    pub(super) time: Option<i64>,
    pub(super) files: usize,
    /// Entries that name no file, by their page.
    pub(super) unusable: HashSet<(usize, String)>,
    /// Indexes of files that an earlier run listed: a file that two pages list has its own the second time.
    pub(super) known: HashSet<u32>,
    /// Types that an earlier run merged.
    pub(super) merged: Vec<ResourceType>,
}

pub(super) fn export_file(
    index: u32,
    export: usize,
    listed: &ManifestFile,
    requires_access_token: bool,
    place: ManifestEntryId,
) -> ExportFile {
    let last = listed.url.path_segments().and_then(|mut parts| parts.next_back()).unwrap_or("file");
    // It is in every line of a log that is about the file.
    let last = last.get(..MAX_NAME).unwrap_or(last);
    // A type is trusted as a name only where R4 has it: it becomes a folder.
    let declared = listed.resource_type.as_deref().filter(|name| Model::r4().is_resource_type(name));
    ExportFile {
        index,
        export,
        name: format!("{}#{}:{last}", declared.unwrap_or("-"), index - FIRST_INDEX),
        url: listed.url.clone(),
        location: None,
        // The server's messages, wherever it lists them.
        kind: if declared == Some("OperationOutcome") { FileKind::Outcome } else { place.kind },
        declared: declared.map(Into::into),
        count: listed.count,
        requires_access_token,
        replayed: false,
        place,
    }
}

impl ServerExport {
    /// Sends on what a manifest lists and was not sent on before.
    pub(super) async fn pass_on(
        &self,
        export: usize,
        accepted: &ExportHandle,
        (url, page): (&Url, usize),
        manifest: &Manifest,
        passed: &mut Passed,
        index: &mut u32,
    ) -> Result<(), Ended> {
        self.log_page(export, manifest);
        for finding in &manifest.findings {
            tracing::warn!(finding, "the manifest is not as it should be");
            self.counters.add(telemetry::DEVIATIONS, &finding.as_str().into(), 1);
        }
        match passed.time {
            None => {
                reached("the manifest is read");
                passed.time = Some(manifest.transaction_time);
                (self.remember)(&ExportEvent::Complete {
                    status: &accepted.status,
                    transaction_time: manifest.transaction_time,
                })?;
                passed.merged = accepted.merged(watermark_of(manifest.transaction_time, self.until)).cloned().collect();
                if !passed.merged.is_empty() {
                    tracing::info!(types = %passed.merged.join(", "), "merged out of this export, or a newer one, by \
                        an earlier run; left alone");
                }
            }
            // Only what every page covers is surely here.
            Some(time) if time != manifest.transaction_time => {
                tracing::warn!("the manifest's pages differ in their transactionTime; the oldest counts");
                self.counters.add(telemetry::DEVIATIONS, &"pages of a manifest differ in transactionTime".into(), 1);
                passed.time = Some(time.min(manifest.transaction_time));
            }
            Some(_) => {}
        }
        self.invalid_entries(export, accepted, manifest, page, passed, index).await?;
        // A page that came again may list more, in any place; what it listed before has the place that it had then.
        let fresh = self.links.page(export, page, url, accepted.separate, manifest).await;
        let (mut files, mut held) = (Vec::new(), Vec::new());
        let mut unknown_types = 0;
        for (list, at, listed) in fresh {
            let kind = [FileKind::Output, FileKind::Deleted, FileKind::Outcome][list];
            let place = ManifestEntryId { page, kind, at };
            passed.files += 1;
            if listed.resource_type.as_deref().is_some_and(|name| !Model::r4().is_resource_type(name)) {
                unknown_types += 1;
                self.counters.add(telemetry::DEVIATIONS, &"a file's type is not one of FHIR R4".into(), 1);
            }
            let file = export_file(*index, export, listed, manifest.requires_access_token, place);
            if file.kind != kind {
                self.counters.add(telemetry::DEVIATIONS, &"OperationOutcomes are listed as output".into(), 1);
            }
            // The same file keeps its index, which its rows are known by.
            let known = accepted.staged.get(&said_of(&file)).filter(|known| passed.known.insert(known.index));
            let file = match known {
                Some(known) => export_file(known.index, export, listed, manifest.requires_access_token, place),
                None => {
                    *index += 1;
                    file
                }
            };
            let merged = |name: &ResourceType| passed.merged.contains(name) && !accepted.mixed_types.contains(name);
            if kind == FileKind::Output && file.declared.as_ref().is_some_and(merged) {
                continue;
            }
            held.extend(known.and_then(|known| known.held.clone()));
            files.push(Arc::new(file));
        }
        if unknown_types > 0 {
            tracing::warn!(
                files = unknown_types,
                "the manifest declares types that FHIR R4 does not have; lines are routed by their own resourceType"
            );
        }
        // The books must know a file before its first line comes.
        let status = Some(accepted.status.as_str().into());
        self.tell(ControlEvent::Page(ManifestPage { export, status, files: files.clone() })).await?;
        if !held.is_empty() {
            tracing::info!(files = held.len(), "staged by an earlier run; not downloaded again");
            let indexes: HashSet<u32> = held.iter().map(|held| held.file).collect();
            files.retain(|file| !indexes.contains(&file.index));
        }
        for held in held {
            self.tell(ControlEvent::FileResumed(held.into())).await?;
        }
        self.files.send_all(files).await.map_err(|_| Ended::Unheard)
    }
}
