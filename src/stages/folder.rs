//! The source, as a folder of NDJSON.

use std::sync::Arc;

use object_store::ObjectStore;
use url::Url;

use crate::error::{Context, Error, ErrorKind, Result};
use crate::flow::{Sender, Stop};
use crate::messages::{ExportEnd, ExportFile, Fact, FileKind, FilePlace, ManifestPage, MergeInput, ResourceType};
use crate::schema::{EXCLUDED_TYPES, Model};

/// Files of a folder or object store of NDJSON.
pub struct FolderExport {
    /// The store.
    pub store: Arc<dyn ObjectStore>,
    /// The folder in it.
    pub folder: object_store::path::Path,
    /// The folder's URL.
    pub url: Url,
    /// Types to take; empty for all.
    pub types: Vec<ResourceType>,
    /// Whether a type without a file was asked for all the same: what it has is absent.
    pub all_asked: bool,
    /// Index of the first file: those before it are the quarantine's.
    pub first_index: u32,
    /// Where files go.
    pub files: Sender<Arc<ExportFile>>,
    /// Where facts go.
    pub merge: Sender<MergeInput>,
    /// Ends the listing early.
    pub stop: Stop,
}

impl FolderExport {
    /// Lists the folder and sends its files on.
    pub async fn run(self) -> Result<()> {
        // One level only: what lies in folders below is none of ours, nor is it an error.
        let listing = match self.stop.or(self.store.list_with_delimiter(Some(&self.folder))).await {
            Some(listing) => listing.context(ErrorKind::Storage, "the source folder cannot be listed")?,
            None => return Ok(()),
        };
        let mut names: Vec<(object_store::path::Path, ResourceType)> = Vec::new();
        for object in listing.objects {
            let Some(file_name) = object.location.filename() else { continue };
            let Some(resource_type) = type_of_file(file_name) else {
                if file_name.contains(".ndjson") {
                    tracing::warn!(file = file_name, "not [Type].ndjson or [Type].[tag].ndjson of an R4 type; passed over");
                }
                continue;
            };
            if self.types.is_empty() || self.types.contains(&resource_type) {
                names.push((object.location, resource_type));
            }
        }
        // The order of arrival must not hang on the store's order of listing.
        names.sort();
        if names.is_empty() {
            return Err(Error::new(
                ErrorKind::Storage,
                "the source folder has no file [Type].ndjson or [Type].[tag].ndjson (plain, .gz or .zst) of the wanted types",
            ));
        }
        let mut files = Vec::with_capacity(names.len());
        for (index, (location, resource_type)) in names.into_iter().enumerate() {
            let name = location.filename().unwrap_or("file").to_owned();
            files.push(Arc::new(ExportFile {
                index: self.first_index + index as u32,
                export: 0,
                name,
                url: self.url.clone(),
                location: Some(location),
                kind: FileKind::Output,
                declared: Some(resource_type),
                count: None,
                requires_access_token: false,
                replayed: false,
                place: FilePlace { page: 0, kind: FileKind::Output, at: index },
            }));
        }
        let mut asked: Vec<ResourceType> = files.iter().filter_map(|file| file.declared.clone()).collect();
        for name in self.types.iter().filter(|name| !files.iter().any(|file| file.declared.as_ref() == Some(*name))) {
            tracing::warn!(resource_type = %name, "the source folder has no file of the type");
            if self.all_asked {
                asked.push(name.clone());
            }
        }
        asked.retain(|name| !EXCLUDED_TYPES.contains(&&**name));
        asked.sort();
        asked.dedup();
        let end = ExportEnd {
            export: 0,
            asked,
            all_types: false,
            known: Vec::new(),
            transaction_time: None,
            full: true,
            merged: Vec::new(),
        };
        let page = Fact::Page(ManifestPage { export: 0, status: None, files: files.clone() });
        for fact in [page, Fact::ExportEnd(end)] {
            if self.merge.send(MergeInput::Fact(fact)).await.is_err() {
                return Ok(());
            }
        }
        // Nobody listens where the run is over; who ended it says why.
        let _ = self.files.send_all(files).await;
        Ok(())
    }
}

/// The type of `[Type].ndjson` or `[Type].[tag].ndjson`, with `.gz` or `.zst` behind it or not.
fn type_of_file(name: &str) -> Option<ResourceType> {
    let stem = name.strip_suffix(".gz").or_else(|| name.strip_suffix(".zst")).unwrap_or(name);
    let stem = stem.strip_suffix(".ndjson")?;
    let resource_type = stem.split_once('.').map_or(stem, |(name, _)| name);
    Model::r4().is_resource_type(resource_type).then(|| resource_type.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_files() {
        for (name, expected) in [
            ("Patient.ndjson", Some("Patient")),
            ("Patient.000.ndjson", Some("Patient")),
            ("Observation.a.b.ndjson.gz", Some("Observation")),
            ("Condition.ndjson.zst", Some("Condition")),
            ("patient.ndjson", None),
            ("Patient.json", None),
            ("log.ndjson", None),
        ] {
            assert_eq!(type_of_file(name).as_deref(), expected, "{name}");
        }
    }
}
