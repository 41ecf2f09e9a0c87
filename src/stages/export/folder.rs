//! The source, as a folder of NDJSON.

use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::sync::Arc;

use object_store::{ObjectStore, ObjectStoreExt};
use tokio_stream::StreamExt;
use url::Url;

use crate::error::{Context, Error, ErrorKind, Result};
use crate::messages::{
    ControlEvent, ExportEnd, ExportFile, FileKind, ManifestEntryId, ManifestPage, MergeInput, ResourceType,
};
use fhir_arrow::{EXCLUDED_TYPES, Model};
use flow::{Cancellation, Sender};

/// Files of a folder or object store of NDJSON.
pub struct FolderExport {
    /// A store with the folder as its root.
    pub store: Arc<dyn ObjectStore>,
    /// The folder's URL.
    pub url: Url,
    /// Types to take; empty for all. Of files whose names say no type, all lines are taken.
    pub types: Vec<ResourceType>,
    /// Paths in the store that hold what fhirlake writes itself.
    pub excluded: Vec<object_store::path::Path>,
    /// Hears which files are passed over, and why.
    pub passed_over: PassedOver,
    /// True if a type without a file was asked for all the same: what it has is absent.
    pub all_requested: bool,
    /// Index of the first file: those before it are the quarantine's.
    pub first_index: u32,
    /// Destination of files.
    pub files: Sender<Arc<ExportFile>>,
    /// Destination of control events.
    pub merge: Sender<MergeInput>,
    /// Ends the listing early.
    pub stop: Cancellation,
}

impl FolderExport {
    /// Lists the folder and those below it, and sends their files on.
    pub async fn run(self) -> Result<()> {
        let Some(found) = self.stop.or(self.list()).await else { return Ok(()) };
        let found = found?;
        let passed_over: BTreeMap<&str, usize> =
            self.passed_over.lock().iter().map(|(why, names)| (*why, names.len())).collect();
        for (why, files) in &passed_over {
            tracing::warn!(files, "files of the source folder are passed over: {why}");
        }
        if found.is_empty() {
            let others: Vec<String> = passed_over.iter().map(|(why, files)| format!("{files} {why}")).collect();
            let others =
                if others.is_empty() { String::new() } else { format!("; passed over: {}", others.join(", ")) };
            let of = if self.types.is_empty() { String::new() } else { format!(" of {}", self.types.join(", ")) };
            let why = format!(
                "source.url: {} has no NDJSON file{of} (*.ndjson, *.jsonl, also .gz or .zst){others}",
                place_of(&self.url)
            );
            return Err(Error::new(ErrorKind::Config, why)
                .with_hint("put the files there, or correct source.url or source.types"));
        }
        let mut files = Vec::with_capacity(found.len());
        for (index, Found { location, kind, declared }) in found.into_iter().enumerate() {
            let name = location.to_string();
            files.push(Arc::new(ExportFile {
                index: self.first_index + index as u32,
                export: 0,
                name,
                url: self.url.clone(),
                location: Some(location),
                kind,
                declared,
                count: None,
                requires_access_token: false,
                replayed: false,
                place: ManifestEntryId { page: 0, kind, at: index },
            }));
        }
        let outputs = || files.iter().filter(|file| file.kind == FileKind::Output);
        let mut requested: Vec<ResourceType> = outputs().filter_map(|file| file.declared.clone()).collect();
        let any_may_hold = outputs().any(|file| file.declared.is_none());
        for name in
            self.types.iter().filter(|name| !any_may_hold && !requested.contains(name)).cloned().collect::<Vec<_>>()
        {
            tracing::warn!(resource_type = %name, "the source folder has no file of the type");
            if self.all_requested {
                requested.push(name);
            }
        }
        // Such a file may hold each of them, and is read to its end before one of them commits.
        if any_may_hold && self.all_requested {
            requested.extend(self.types.iter().cloned());
        }
        requested.retain(|name| !EXCLUDED_TYPES.contains(&&**name));
        requested.sort();
        requested.dedup();
        let end = ExportEnd {
            export: 0,
            requested,
            all_types: self.types.is_empty(),
            known: Vec::new(),
            transaction_time: None,
            full: true,
            merged: Vec::new(),
        };
        let page = ControlEvent::Page(ManifestPage { export: 0, status: None, files: files.clone() });
        for fact in [page, ControlEvent::ExportEnd(end)] {
            if self.merge.send(MergeInput::ControlEvent(fact)).await.is_err() {
                return Ok(());
            }
        }
        // Nobody listens where the run is over; who ended it says why.
        let _ = self.files.send_all(files).await;
        Ok(())
    }
}

/// A file to be read.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Found {
    location: object_store::path::Path,
    /// True if it holds resources; what a Bulk Data client puts into the folders `deleted` and `error` does not.
    kind: FileKind,
    declared: Option<ResourceType>,
}

/// Files that are passed over, by the reason.
pub type PassedOver = Arc<Mutex<BTreeMap<&'static str, Vec<String>>>>;

/// Bytes of a file whose name says no type in which a resource must begin.
const PEEK: u64 = 64 << 10;

impl FolderExport {
    /// The files to be read, in the order of their paths: the order of arrival must not hang on the store's order of
    /// listing.
    async fn list(&self) -> Result<Vec<Found>> {
        let failed = "the source folder cannot be listed";
        let mut listing = self.store.list(None);
        let mut found = Vec::new();
        while let Some(object) = listing.next().await {
            let object = object.context(ErrorKind::Storage, failed)?;
            if self.excluded.iter().any(|excluded| object.location.prefix_matches(excluded)) {
                continue;
            }
            match self.judge(&object).await? {
                Ok(file) => found.push(file),
                Err(None) => {}
                Err(Some(why)) => {
                    let name = object.location.to_string();
                    self.passed_over.lock().entry(why).or_default().push(name);
                }
            }
        }
        found.sort();
        Ok(found)
    }

    /// Returns true if a file is to be read; else why it is passed over, where it looks like one.
    async fn judge(
        &self,
        object: &object_store::ObjectMeta,
    ) -> Result<std::result::Result<Found, Option<&'static str>>> {
        let name = object.location.to_string();
        let mut parts: Vec<&str> = name.split('/').collect();
        let Some(file) = parts.pop() else { return Ok(Err(None)) };
        let lower = file.to_ascii_lowercase();
        let is_hidden = parts.iter().chain([&file]).any(|part| part.starts_with(['.', '_']));
        let Some(ending) =
            [".ndjson", ".jsonl"].iter().filter_map(|ending| Some(lower.rfind(ending)? + ending.len())).max()
        else {
            // Data may have other names than those of NDJSON; files that are no data lie in folders too.
            let is_data = [".json", ".gz", ".zst", ".zip"].iter().any(|ending| lower.ends_with(ending));
            let is_told = !is_hidden && (is_data || type_named(file).is_some());
            return Ok(Err(is_told.then_some("not NDJSON by their names")));
        };
        if is_hidden {
            return Ok(Err(Some("hidden files")));
        }
        if !matches!(&lower[ending..], "" | ".gz" | ".gzip" | ".zst" | ".zstd")
            && !lower[ending..].trim_start_matches('.').chars().all(|digit| digit.is_ascii_digit())
        {
            return Ok(Err(Some("not NDJSON by their names")));
        }
        if file == "log.ndjson" {
            return Ok(Err(Some("the log of a Bulk Data client")));
        }
        let declared = type_named(&file[..ending]).or_else(|| parts.last().and_then(|folder| type_named(folder)));
        let of_client = |folder: &str, name: &str| parts.last() == Some(&folder) && declared.as_deref() == Some(name);
        let kind = match () {
            // Nothing says whether the resource came back since, or in another folder of these.
            () if of_client("deleted", "Bundle") => {
                return Ok(Err(Some("deletions: a folder does not say what is newer")));
            }
            () if of_client("error", "OperationOutcome") => FileKind::Outcome,
            () => FileKind::Output,
        };
        let is_wanted = |name: &ResourceType| self.types.is_empty() || self.types.contains(name);
        match &declared {
            Some(name) if kind == FileKind::Output && !is_wanted(name) => {
                return Ok(Err(Some("types that are not asked for")));
            }
            None if lower.len() == ending && !self.has_resource(object).await? => {
                return Ok(Err(Some("no resourceType in the first 64 KiB")));
            }
            _ => {}
        }
        Ok(Ok(Found { location: object.location.clone(), kind, declared }))
    }

    /// Returns true if a file begins like one of resources, or is packed.
    async fn has_resource(&self, object: &object_store::ObjectMeta) -> Result<bool> {
        if object.size == 0 {
            return Ok(false);
        }
        let read = self.store.get_range(&object.location, 0..object.size.min(PEEK)).await;
        let head = read.context(ErrorKind::Storage, format!("{} cannot be read", object.location))?;
        let is_packed = head.starts_with(&[0x1f, 0x8b]) || head.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]);
        Ok(is_packed || memchr::memmem::find(&head, b"\"resourceType\"").is_some())
    }
}

/// The folder of a `file:` URL as a path, decoded, and any other URL as it is, for messages.
pub fn place_of(url: &Url) -> String {
    url.to_file_path().map_or_else(|()| url.to_string(), |path| path.display().to_string())
}

/// The first type that a name holds as a word of its own: `1.Patient.ndjson`, `Patient-001.ndjson`.
fn type_named(name: &str) -> Option<ResourceType> {
    let mut words = name.split(|letter: char| !letter.is_ascii_alphanumeric());
    words.find(|word| Model::r4().is_resource_type(word)).map(Into::into)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_files() {
        for (name, expected) in [
            ("Patient", Some("Patient")),
            ("Patient.000", Some("Patient")),
            ("1.Patient", Some("Patient")),
            ("Observation.a.b", Some("Observation")),
            ("Condition-001", Some("Condition")),
            ("MedicationRequest_2024_01", Some("MedicationRequest")),
            ("patient", None),
            ("PatientList", None),
            ("log", None),
        ] {
            assert_eq!(type_named(name).as_deref(), expected, "{name}");
        }
    }
}
