//! The source: where a run's files come from.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use object_store::ObjectStore;
use url::Url;

use crate::error::{Context, Error, ErrorKind, Result};
use crate::fhir::{Client, ExportRequest, KickOff, Links, Manifest, ManifestFile, Poll};
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
    /// The export that an earlier run asked for with this very request.
    pub in_flight: Option<Accepted>,
}

/// An export that the server accepted.
#[derive(Debug, Clone)]
pub struct Accepted {
    /// Where its status is asked for.
    pub status: Url,
    /// Whether a poll's own status and the export's are apart.
    pub separate: bool,
    /// `transactionTime` of each type's table for this scope: a type whose table has the export's own was merged whole.
    pub tables: BTreeMap<ResourceType, i64>,
}

/// Hears what must be remembered of an export before anything else happens.
pub type Remember = Arc<dyn Fn(&ExportNote<'_>) -> Result<()> + Send + Sync>;

/// What is remembered.
#[derive(Debug)]
pub enum ExportNote<'a> {
    /// The server accepted; its status URL.
    Accepted {
        /// What was asked.
        kickoff: &'a Kickoff,
        /// Where its status is asked for.
        status: &'a Url,
        /// Whether a poll's own status and the export's are apart.
        separate: bool,
    },
    /// The manifest came.
    Complete {
        /// Where its status was asked for.
        status: &'a Url,
        /// Microseconds since the epoch.
        transaction_time: i64,
    },
    /// The server has no such export any more, or gave it up.
    Lost {
        /// Where its status was asked for.
        status: &'a Url,
    },
    /// The server asks to come back later.
    Later {
        /// How long it asks to wait, where it says.
        wait: Option<Duration>,
        /// Its words.
        why: &'a str,
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
    /// Newest `transactionTime` that a watermark may have: what changed after `_until` was not asked for.
    pub until: Option<i64>,
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
    /// Where links of files come from, should they end.
    pub links: Links,
    /// Counters.
    pub board: Board,
    /// The run's stop.
    pub stop: Stop,
}

/// Why an export ended early.
enum Ended {
    Failed(Error),
    /// The server knows no such export.
    Gone(Error),
    /// Nobody listens any more.
    Unheard,
}

impl From<Error> for Ended {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

impl ServerExport {
    /// Makes each kick-off, or goes on with what was asked for before, and sends its files on.
    pub async fn run(self) -> Result<()> {
        let mut index = self.first_index;
        for (export, kickoff) in self.kickoffs.iter().enumerate() {
            let span = tracing::info_span!("export", export);
            match tracing::Instrument::instrument(self.export(export, kickoff, &mut index), span).await {
                Ok(()) => {}
                Err(Ended::Unheard) => return Ok(()),
                // One refused export does not hold the others back; one alone is the run's end.
                Err(Ended::Failed(error) | Ended::Gone(error))
                    if self.kickoffs.len() > 1
                        && matches!(error.kind(), ErrorKind::Server | ErrorKind::Auth | ErrorKind::Throttled) =>
                {
                    tracing::error!(%error, "the export failed; its types are left as they were");
                    let fact = Fact::ExportFailed { export, asked: kickoff.asked.clone(), why: error.to_string() };
                    if self.merge.send(MergeInput::Fact(fact)).await.is_err() {
                        return Ok(());
                    }
                }
                Err(Ended::Failed(error) | Ended::Gone(error)) => return Err(error),
            }
        }
        Ok(())
    }

    async fn export(&self, export: usize, kickoff: &Kickoff, index: &mut u32) -> Result<(), Ended> {
        if let Some(accepted) = &kickoff.in_flight {
            tracing::info!("going on with the export that an earlier run asked for");
            match self.follow(export, kickoff, accepted, index).await {
                Err(Ended::Gone(error)) => {
                    tracing::warn!(%error, "the server no longer has the export; asking for it anew");
                    (self.remember)(&ExportNote::Lost { status: &accepted.status })?;
                }
                ended => return ended,
            }
        }
        let accepted = match self.client.kick_off(&kickoff.request).await? {
            KickOff::Accepted { status, separate } => Accepted { status, separate, tables: BTreeMap::new() },
            KickOff::Later { wait, why } => {
                (self.remember)(&ExportNote::Later { wait, why: &why })?;
                let asks = match wait {
                    Some(wait) => format!("it asks to wait for {} s", wait.as_secs()),
                    None => "it does not say for how long, so for an hour".to_owned(),
                };
                return Err(Error::new(ErrorKind::Throttled, format!("{why}; {asks}")).into());
            }
        };
        (self.remember)(&ExportNote::Accepted { kickoff, status: &accepted.status, separate: accepted.separate })?;
        tracing::info!(
            types = kickoff.asked.len(),
            incremental = kickoff.request.since.is_some(),
            "the server accepted the export"
        );
        self.follow(export, kickoff, &accepted, index).await.inspect_err(|ended| {
            if let Ended::Gone(_) = ended {
                let lost = (self.remember)(&ExportNote::Lost { status: &accepted.status });
                lost.unwrap_or_else(|error| tracing::warn!(%error, "that the export is gone could not be remembered"));
            }
        })
    }

    /// Polls until the export is done, page by page of its manifest, and sends files on as soon as they are final.
    async fn follow(&self, export: usize, kickoff: &Kickoff, accepted: &Accepted, index: &mut u32) -> Result<(), Ended> {
        let mut pages = vec![accepted.status.clone()];
        let mut passed = Passed { time: None, files: HashSet::new(), merged: Vec::new() };
        loop {
            let page = pages.len() - 1;
            let next = self.page(export, kickoff, accepted, &pages[page].clone(), page, &mut passed, index).await?;
            match next {
                None => break,
                Some(next) if pages.contains(&next) => {
                    return Err(Error::new(ErrorKind::Server, "the manifest's pages go round in a circle").into());
                }
                Some(_) if pages.len() >= MAX_PAGES => {
                    return Err(Error::new(ErrorKind::Server, format!("the manifest has more than {MAX_PAGES} pages")).into());
                }
                Some(next) => pages.push(next),
            }
        }
        if passed.files.is_empty() && kickoff.request.since.is_none() {
            tracing::warn!(
                types = %kickoff.asked.join(", "),
                "the export is empty, though everything was asked for: check that the group or the types exist"
            );
        }
        let time = passed.time.map(|time| self.until.map_or(time, |until| time.min(until)));
        let left = |names: &[ResourceType]| names.iter().filter(|name| !passed.merged.contains(name)).cloned().collect();
        let end = ExportEnd {
            export,
            asked: left(&kickoff.asked),
            known: left(&kickoff.known),
            transaction_time: time,
            full: kickoff.request.since.is_none(),
            merged: passed.merged.clone(),
        };
        self.tell(Fact::ExportEnd(end)).await
    }

    async fn tell(&self, fact: Fact) -> Result<(), Ended> {
        self.merge.send(MergeInput::Fact(fact)).await.map_err(|_| Ended::Unheard)
    }

    /// Polls one page until it is final or has a next one; that one.
    #[expect(clippy::too_many_arguments, reason = "what a page is of, and where its files go")]
    async fn page(
        &self,
        export: usize,
        kickoff: &Kickoff,
        accepted: &Accepted,
        url: &Url,
        page: usize,
        passed: &mut Passed,
        index: &mut u32,
    ) -> Result<Option<Url>, Ended> {
        let settings = self.client.settings();
        let began = tokio::time::Instant::now();
        let mut pause = settings.min_pause;
        let mut troubled: Option<tokio::time::Instant> = None;
        loop {
            let (wait, least) = match self.client.poll(url, accepted.separate).await? {
                Poll::Done(manifest) => {
                    self.pass_on(export, accepted, (url, page), &manifest, passed, index).await?;
                    return Ok(manifest.next);
                }
                Poll::Working { partial: Some(manifest), wait, .. } if kickoff.request.options.allow_partial_manifests => {
                    troubled = None;
                    (self.heard)("the first files are there");
                    self.pass_on(export, accepted, (url, page), &manifest, passed, index).await?;
                    if manifest.next.is_some() {
                        return Ok(manifest.next);
                    }
                    (wait, Duration::ZERO)
                }
                Poll::Working { progress, wait, .. } => {
                    troubled = None;
                    let words = progress.as_deref().unwrap_or("in progress");
                    tracing::debug!(progress = words, "the server is exporting");
                    (self.heard)(words);
                    (wait, Duration::ZERO)
                }
                Poll::Troubled { error, wait, throttled } => {
                    let since = *troubled.get_or_insert_with(tokio::time::Instant::now);
                    if !throttled && since.elapsed() > settings.retry_for {
                        return Err(error.into());
                    }
                    tracing::warn!(%error, "asking for the export's status again");
                    self.board.add(telemetry::RETRIES, &telemetry::NO_TYPE.into(), 1);
                    // Too often: not at once again, whatever it says.
                    (wait, if throttled { settings.min_pause } else { Duration::ZERO })
                }
                Poll::Gone(error) => return Err(Ended::Gone(error)),
            };
            let wait = wait.unwrap_or(pause).max(least).clamp(Duration::from_millis(50), settings.max_pause);
            pause = (pause * 2).min(settings.max_pause);
            if let Some(timeout) = self.timeout
                && began.elapsed() + wait > timeout
            {
                let why = format!("the export was not done within source.timeout ({} s)", timeout.as_secs());
                let error = Error::new(ErrorKind::Server, why);
                return Err(error.with_hint("run again: the next run goes on with this export; or raise source.timeout").into());
            }
            if self.stop.or(tokio::time::sleep(wait)).await.is_none() {
                return Err(Error::new(ErrorKind::Interrupted, "stopped while the server was exporting").into());
            }
        }
    }

    /// Sends on what a manifest lists and was not sent on before.
    async fn pass_on(
        &self,
        export: usize,
        accepted: &Accepted,
        (url, page): (&Url, usize),
        manifest: &Manifest,
        passed: &mut Passed,
        index: &mut u32,
    ) -> Result<(), Ended> {
        for finding in &manifest.findings {
            tracing::warn!(finding, "the manifest is not as it should be");
        }
        match passed.time {
            None => {
                passed.time = Some(manifest.transaction_time);
                (self.remember)(&ExportNote::Complete { status: &accepted.status, transaction_time: manifest.transaction_time })?;
                let time = self.until.map_or(manifest.transaction_time, |until| manifest.transaction_time.min(until));
                let merged = accepted.tables.iter().filter(|(_, table)| **table == time).map(|(name, _)| name.clone());
                passed.merged = merged.collect();
                if !passed.merged.is_empty() {
                    tracing::info!(types = %passed.merged.join(", "), "merged out of this export by an earlier run; left alone");
                }
            }
            // Only what every page covers is surely here.
            Some(time) if time != manifest.transaction_time => {
                tracing::warn!("the manifest's pages differ in their transactionTime; the oldest counts");
                passed.time = Some(time.min(manifest.transaction_time));
            }
            Some(_) => {}
        }
        self.links.page(export, page, url, accepted.separate, manifest).await;
        let lists = [
            (FileKind::Output, &manifest.output),
            (FileKind::Deleted, &manifest.deleted),
            (FileKind::Outcome, &manifest.outcomes),
        ];
        let listed = lists.into_iter().flat_map(|(kind, list)| list.iter().map(move |listed| (kind, listed)));
        let mut files = Vec::new();
        for (at, (kind, listed)) in listed.enumerate() {
            // A page that came again has the same files in the same places, perhaps by newer links.
            if !passed.files.insert((page, at)) {
                continue;
            }
            let file = export_file(*index, export, kind, listed, (manifest.requires_access_token, (page, at)));
            *index += 1;
            let merged = file.declared.as_ref().is_some_and(|name| passed.merged.contains(name));
            if !(merged && kind == FileKind::Output) {
                files.push(Arc::new(file));
            }
        }
        expect(&self.board, &files);
        // The books must know a file before its first line comes.
        self.tell(Fact::Page(ManifestPage { export, files: files.clone() })).await?;
        if send_all(&self.files, files).await { Ok(()) } else { Err(Ended::Unheard) }
    }
}

/// Pages of a manifest; each may have any number of files.
const MAX_PAGES: usize = 100_000;

/// What was sent on of an export.
struct Passed {
    time: Option<i64>,
    /// Pages and places of files.
    files: HashSet<(usize, usize)>,
    /// Types that an earlier run merged.
    merged: Vec<ResourceType>,
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

fn export_file(
    index: u32,
    export: usize,
    kind: FileKind,
    listed: &ManifestFile,
    (requires_access_token, place): (bool, (usize, usize)),
) -> ExportFile {
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
        place,
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
    /// Whether a type without a file was asked for all the same: what it has is absent.
    pub all_asked: bool,
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
                place: (0, 0),
            }));
        }
        expect(&self.board, &files);
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
        let end = ExportEnd { export: 0, asked, known: Vec::new(), transaction_time: None, full: true, merged: Vec::new() };
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
