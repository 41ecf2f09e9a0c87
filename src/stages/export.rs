//! The source: where a run's files come from.

use std::sync::Arc;
use std::time::Duration;

use object_store::ObjectStore;
use url::Url;

use crate::error::{Context, Error, ErrorKind, Result};
use crate::fhir::{Client, ExportRequest, Manifest, ManifestFile};
use crate::flow::{Board, Sender, Stop};
use crate::messages::{ExportEnd, ExportFile, Fact, FileKind, ManifestPage, MergeInput, ResourceType};
use crate::schema::{EXCLUDED_TYPES, Model};
use crate::telemetry;

/// One kick-off: types of equal watermark share it.
#[derive(Debug, Clone)]
pub struct Kickoff {
    /// What is asked.
    pub request: ExportRequest,
    /// The types that it answers for; empty where all were asked for.
    pub asked: Vec<ResourceType>,
    /// Types that have a table already, where all were asked for.
    pub known: Vec<ResourceType>,
}

/// Hears what must be remembered of an export before anything else happens.
pub type Remember = Arc<dyn Fn(&ExportNote) -> Result<()> + Send + Sync>;

/// What is remembered.
#[derive(Debug, Clone)]
pub enum ExportNote {
    /// The server accepted; its status URL.
    Accepted {
        /// Which export.
        export: usize,
        /// Where its status is asked for.
        status: Url,
    },
    /// The server is done; its `transactionTime`.
    Complete {
        /// Which export.
        export: usize,
        /// Microseconds since the epoch.
        transaction_time: i64,
        /// Files that the manifest lists.
        files: usize,
    },
}

/// Exports from a server.
pub struct ServerExport {
    /// The server.
    pub client: Client,
    /// Kick-offs, made one after the other: many servers have one slot.
    pub kickoffs: Vec<Kickoff>,
    /// How long a server may work.
    pub timeout: Option<Duration>,
    /// Index of the first file: those before it are the quarantine's.
    pub first_index: u32,
    /// Where files go.
    pub files: Sender<Arc<ExportFile>>,
    /// Where facts go.
    pub merge: Sender<MergeInput>,
    /// Hears of status URLs.
    pub remember: Remember,
    /// Shows the server's words on its progress.
    pub heard: Arc<dyn Fn(&str) + Send + Sync>,
    /// Counters.
    pub board: Board,
}

impl ServerExport {
    /// Makes each kick-off, waits for it and sends its files on.
    pub async fn run(self) -> Result<()> {
        let mut index = self.first_index;
        for (export, kickoff) in self.kickoffs.iter().enumerate() {
            let span = tracing::info_span!("export", export);
            let exported = tracing::Instrument::instrument(self.export(export, kickoff), span).await;
            let manifest = match exported {
                Ok(manifest) => manifest,
                // One refused export does not hold the others back; one alone is the run's end.
                Err(error) if self.kickoffs.len() > 1 && matches!(error.kind(), ErrorKind::Server | ErrorKind::Auth) => {
                    tracing::error!(%error, "the export failed; its types are left as they were");
                    let fact = Fact::ExportFailed { export, asked: kickoff.asked.clone(), why: error.to_string() };
                    if self.merge.send(MergeInput::Fact(fact)).await.is_err() {
                        return Ok(());
                    }
                    continue;
                }
                Err(error) => return Err(error),
            };
            if !self.pass_on(export, kickoff, &manifest, &mut index).await {
                return Ok(());
            }
        }
        Ok(())
    }

    async fn export(&self, export: usize, kickoff: &Kickoff) -> Result<Manifest> {
        let status = self.client.kick_off(&kickoff.request).await?;
        (self.remember)(&ExportNote::Accepted { export, status: status.clone() })?;
        tracing::info!(
            types = kickoff.asked.len(),
            incremental = kickoff.request.since.is_some(),
            "the server accepted the export"
        );
        let manifest = self.client.wait(&status, self.timeout, |words| (self.heard)(words)).await?;
        for finding in &manifest.findings {
            tracing::warn!(finding, "the manifest is not as it should be");
        }
        let files = manifest.output.len() + manifest.deleted.len() + manifest.outcomes.len();
        (self.remember)(&ExportNote::Complete { export, transaction_time: manifest.transaction_time, files })?;
        if files == 0 && kickoff.request.since.is_none() {
            tracing::warn!("the export is empty, though everything was asked for: check that the group or the types exist");
        }
        Ok(manifest)
    }

    /// Whether anybody still listens.
    async fn pass_on(&self, export: usize, kickoff: &Kickoff, manifest: &Manifest, index: &mut u32) -> bool {
        let lists = [
            (FileKind::Output, &manifest.output),
            (FileKind::Deleted, &manifest.deleted),
            (FileKind::Outcome, &manifest.outcomes),
        ];
        let mut files = Vec::new();
        for (kind, list) in lists {
            for listed in list {
                files.push(Arc::new(export_file(*index, export, kind, listed, manifest.requires_access_token)));
                *index += 1;
            }
        }
        expect(&self.board, &files);
        let end = ExportEnd {
            export,
            asked: kickoff.asked.clone(),
            known: kickoff.known.clone(),
            transaction_time: Some(manifest.transaction_time),
            full: kickoff.request.since.is_none(),
        };
        let page = Fact::Page(ManifestPage { export, files: files.clone() });
        // The books must know a file before its first line comes.
        for fact in [page, Fact::ExportEnd(end)] {
            if self.merge.send(MergeInput::Fact(fact)).await.is_err() {
                return false;
            }
        }
        send_all(&self.files, files).await
    }
}

async fn send_all(edge: &Sender<Arc<ExportFile>>, files: Vec<Arc<ExportFile>>) -> bool {
    for file in files {
        if edge.send(file).await.is_err() {
            return false;
        }
    }
    true
}

fn expect(board: &Board, files: &[Arc<ExportFile>]) {
    for file in files.iter().filter(|file| file.kind == FileKind::Output) {
        let label = file.declared.clone().unwrap_or_else(|| telemetry::NO_TYPE.into());
        board.add(telemetry::FILES_EXPECTED, &label, 1);
        board.add(telemetry::RESOURCES_EXPECTED, &label, file.count.unwrap_or(0));
    }
}

fn export_file(index: u32, export: usize, kind: FileKind, listed: &ManifestFile, requires_access_token: bool) -> ExportFile {
    let last = listed.url.path_segments().and_then(|mut parts| parts.next_back()).unwrap_or("file");
    // A type is trusted as a name only where R4 has it: it becomes a folder.
    let declared = listed.resource_type.as_deref().filter(|name| Model::r4().is_resource_type(name));
    ExportFile {
        index,
        export,
        name: format!("{}#{index}:{last}", declared.unwrap_or("-")),
        url: listed.url.clone(),
        location: None,
        kind,
        declared: declared.map(Into::into),
        count: listed.count,
        requires_access_token,
        replayed: false,
    }
}

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
    /// Index of the first file: those before it are the quarantine's.
    pub first_index: u32,
    /// Where files go.
    pub files: Sender<Arc<ExportFile>>,
    /// Where facts go.
    pub merge: Sender<MergeInput>,
    /// Counters.
    pub board: Board,
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
            }));
        }
        expect(&self.board, &files);
        let mut asked: Vec<ResourceType> = files.iter().filter_map(|file| file.declared.clone()).collect();
        asked.retain(|name| !EXCLUDED_TYPES.contains(&&**name));
        asked.dedup();
        let end = ExportEnd { export: 0, asked, known: Vec::new(), transaction_time: None, full: true };
        let page = Fact::Page(ManifestPage { export: 0, files: files.clone() });
        for fact in [page, Fact::ExportEnd(end)] {
            if self.merge.send(MergeInput::Fact(fact)).await.is_err() {
                return Ok(());
            }
        }
        send_all(&self.files, files).await;
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
