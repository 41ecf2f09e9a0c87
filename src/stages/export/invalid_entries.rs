//! Entries of a manifest that name no file.

use std::sync::Arc;

use super::pages::{Passed, export_file};
use super::{Ended, ServerExport};
use crate::jobs::ExportHandle;
use crate::messages::{ControlEvent, FileKind, ManifestEntryId, ManifestPage};
use bulk_data_client::{Manifest, ManifestFile};

impl ServerExport {
    /// Files that cannot be asked for fail their types, and no others; each once, however often its page comes.
    pub(super) async fn invalid_entries(
        &self,
        export: usize,
        accepted: &ExportHandle,
        manifest: &Manifest,
        page: usize,
        passed: &mut Passed,
        index: &mut u32,
    ) -> Result<(), Ended> {
        for (at, unusable) in manifest.unusable.iter().enumerate() {
            if !passed.unusable.insert((page, unusable.why.clone())) {
                continue;
            }
            let kind = [FileKind::Output, FileKind::Deleted, FileKind::Outcome][unusable.list.min(2)];
            let place = ManifestEntryId { page, kind, at: usize::MAX - at };
            let listed = ManifestFile {
                resource_type: unusable.resource_type.clone(),
                url: accepted.status.clone(),
                count: None,
            };
            let file = export_file(*index, export, &listed, false, place);
            let (number, name) = (file.index, file.name.clone());
            *index += 1;
            tracing::error!(
                file = name,
                why = unusable.why,
                "an entry of the manifest is not a file that can be requested"
            );
            let status = Some(accepted.status.as_str().into());
            self.tell(ControlEvent::Page(ManifestPage { export, status, files: vec![Arc::new(file)] })).await?;
            self.tell(ControlEvent::FileFailed(number, unusable.why.clone(), None)).await?;
        }
        Ok(())
    }
}
