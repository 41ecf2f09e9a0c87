//! Files → chunks of whole lines: HTTP or a store, plain, gzip or zstd.
//!
//! Each worker has a thread of its own, since it unpacks; it waits for the network on the reactor.

mod lines;
pub mod replay;
mod settings;

pub use self::settings::{DownloadSection, ShortFile};
use std::io::{ErrorKind as IoErrorKind, Read};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use object_store::{GetResultPayload, ObjectStore, ObjectStoreExt};
use reqwest::header::HeaderValue;
use serde_json::json;
use tokio::runtime::Handle;
use tokio::sync::Semaphore;
use tokio_stream::{Stream, StreamExt};
use url::Url;

use self::lines::Lines;
use crate::error::{Error, ErrorKind, Result};
use crate::export_log::ExportLog;
use crate::messages::{Chunk, ControlEvent, ExportFile, FileFinished, FileKind, ManifestEntryId, MergeInput};
use crate::telemetry;
use bulk_data_client::content_encoding::Unpack;
use bulk_data_client::{Client, LinkPlace, Links, Resume, is_whole, shown};
use flow::{Cancellation, Counters, Receiver, Sender};

/// Bytes that are read of a local file at once: below the size from which the allocator maps and unmaps memory.
const LOCAL_READ: usize = 64 << 10;

/// Origin of files.
#[derive(Clone)]
pub enum Origin {
    /// A FHIR server and whoever it sends us to, and where newer links come from.
    Server(Box<Client>, Links),
    /// A folder of NDJSON.
    Store(Arc<dyn ObjectStore>),
}

/// One download worker; any number share `files`.
pub struct Download {
    /// Source of files.
    pub files: Receiver<Arc<ExportFile>>,
    /// Destination of chunks.
    pub chunks: Sender<Chunk>,
    /// Destination of control events.
    pub merge: Sender<MergeInput>,
    /// Settings of reading files.
    pub origin: Origin,
    /// Longest line that is read.
    pub max_line: usize,
    /// `stages.download`. A line that is longer than a chunk makes a longer chunk.
    pub settings: DownloadSection,
    /// The log that Bulk Data clients share.
    pub log: ExportLog,
    /// Counters.
    pub counters: Counters,
    /// The run's cancellation: this stage is part of the source.
    pub stop: Cancellation,
    /// One permit: of lines that are long, one is gathered at a time.
    pub long_lines: Arc<Semaphore>,
}

/// Pause before a file that broke off is asked for again; doubled with each try that gets no further.
const FIRST_PAUSE: Duration = Duration::from_millis(100);

/// A server that gives less than so many bytes in so long keeps a place for nothing.
const SLOW_WINDOW: Duration = Duration::from_secs(600);
const SLOW_BYTES: u64 = 64 << 10;

/// Why a file ended early.
enum Broken {
    /// It may work the next time.
    Again(Error),
    /// It will not.
    Never(Error),
    /// The run is stopping, or nobody listens.
    Stopped,
}

impl Download {
    /// Downloads until the edge closes or the run is stopped.
    pub fn run(self, handle: &Handle) -> Result<()> {
        while let Some(parcel) = handle.block_on(self.files.recv()) {
            if self.stop.is_cancelled() {
                return Ok(());
            }
            let file: &Arc<ExportFile> = &parcel;
            let span = tracing::info_span!("file", file = %file.name);
            let _entered = span.enter();
            let note = |event: &str, detail: &dyn Fn(String) -> serde_json::Value| {
                self.log.note(file.export, event, || detail(shown(&file.url)));
            };
            let (kind, declared) = (item_type(file.kind), file.declared.as_deref());
            note("download_request", &|url| json!({ "fileUrl": url, "itemType": kind, "resourceType": declared }));
            let fact = match self.file(handle, file) {
                Ok((lines, bytes)) => {
                    note(
                        "download_complete",
                        &|url| json!({ "fileUrl": url, "resourceCount": lines, "fileSize": bytes }),
                    );
                    if file.kind == FileKind::Output {
                        let label = file.declared.clone().unwrap_or_else(|| telemetry::NO_TYPE.into());
                        self.counters.add(telemetry::FILES, &label, 1);
                    }
                    tracing::debug!(lines, "the file was read to its end");
                    ControlEvent::FileFinished(FileFinished { file: file.index, lines })
                }
                Err(Broken::Stopped) => return Ok(()),
                Err(Broken::Again(error) | Broken::Never(error)) => {
                    note("download_error", &|url| {
                        json!({ "fileUrl": url, "code": error.status(), "message": error.to_string(),
                            "body": null })
                    });
                    tracing::error!(%error, "the file could not be read; its type is left as it was");
                    ControlEvent::FileFailed(file.index, error.to_string(), error.status())
                }
            };
            if handle.block_on(self.merge.send(MergeInput::ControlEvent(fact))).is_err() {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Reads a file to its end, and again from its start where it broke off; what was passed on already is
    /// passed over then, once it has proved to be the same. Its lines, and its bytes as they are unpacked.
    fn file(&self, handle: &Handle, file: &Arc<ExportFile>) -> Result<(u64, u64), Broken> {
        let mut lines = Lines::new(self, handle, file.clone());
        let mut reading = Reading { url: file.url.clone(), renewed: false, validator: None, so_far: None, reached: 0 };
        let mut tried = 0;
        loop {
            // However many workers there are, the server may be able to serve fewer.
            let place = match &self.origin {
                Origin::Server(client, _) => {
                    Some(handle.block_on(self.stop.or(client.pace().enter())).ok_or(Broken::Stopped)?)
                }
                Origin::Store(_) => None,
            };
            let outcome = self.once(handle, file, &mut reading, &mut lines);
            // Nobody may wait for a place with what those who have one wait for.
            lines.pause();
            drop(place);
            match outcome {
                Ok(()) => {
                    lines.end()?;
                    if let Origin::Server(client, _) = &self.origin {
                        client.pace().increase();
                    }
                    return Ok((lines.lines, lines.read));
                }
                Err(Broken::Again(error)) if tried + 1 < self.settings.tries || reading.got_on(lines.read) => {
                    // What got on may go on for as long as it does: some proxies end each connection after a time.
                    tried = if reading.got_on(lines.read) { 0 } else { tried + 1 };
                    // A link of one use, or of a minute: each that got on may be followed by another.
                    reading.renewed &= !reading.got_on(lines.read);
                    reading.reached = reading.reached.max(lines.read);
                    let from = reading.so_far.as_ref().map_or(0, |so_far| so_far.resume.from);
                    let pause = FIRST_PAUSE * (1 << tried.min(6));
                    if handle.block_on(self.stop.or(tokio::time::sleep(pause))).is_none() {
                        return Err(Broken::Stopped);
                    }
                    tracing::warn!(%error, tried, from, "the connection closed early; resuming the download");
                    self.counters.add(telemetry::RETRIES, &telemetry::NO_TYPE.into(), 1);
                    if let Origin::Server(client, _) = &self.origin {
                        client.pace().decrease();
                    }
                }
                Err(broken) => return Err(broken),
            }
        }
    }

    fn once(
        &self,
        handle: &Handle,
        file: &ExportFile,
        reading: &mut Reading,
        lines: &mut Lines<'_>,
    ) -> Result<(), Broken> {
        let (mut body, encoding, validator) = handle.block_on(self.open(file, reading))?;
        // Where the server goes on in the file, so do we; else what was passed on is passed over.
        let (mut unpack, mut got, mut head) = match reading.so_far.take() {
            Some(so_far) if validator.is_none() => (so_far.unpack, so_far.resume.from, so_far.head),
            _ => {
                lines.again();
                (None, 0, Vec::new())
            }
        };
        let validator = validator.unwrap_or_else(|| reading.validator.clone());
        reading.validator.clone_from(&validator);
        let (mut window, mut before) = (tokio::time::Instant::now(), got);
        let broken = loop {
            if window.elapsed() > SLOW_WINDOW {
                if got - before < SLOW_BYTES {
                    let why =
                        format!("the server gave {} bytes in {} minutes", got - before, SLOW_WINDOW.as_secs() / 60);
                    return Err(Broken::Never(Error::new(ErrorKind::Network, why)));
                }
                (window, before) = (tokio::time::Instant::now(), got);
            }
            let Some(bytes) = handle.block_on(self.stop.or(body.next())).ok_or(Broken::Stopped)? else { break None };
            let bytes = match bytes {
                Ok(bytes) => bytes,
                Err(error) => break Some(error),
            };
            if bytes.is_empty() {
                continue;
            }
            got += bytes.len() as u64;
            if let Some(unpack) = &mut unpack {
                let pushed = tokio::time::Instant::now();
                unpack.push(&bytes, |bytes| lines.push(bytes), packed_wrong)?;
                if pushed.elapsed() > Duration::from_secs(1) {
                    // The time was ours, not the server's.
                    (window, before) = (tokio::time::Instant::now(), got);
                }
                continue;
            }
            // How it is packed is told by its first bytes, which may come one by one.
            head.extend_from_slice(&bytes);
            if head.len() >= 4 {
                let unpack = unpack.insert(Unpack::of(&encoding, &head).map_err(Broken::Never)?);
                unpack.push(&head, |bytes| lines.push(bytes), packed_wrong)?;
            }
        };
        if let Some(error) = broken {
            if let Some(validator) = validator.filter(|_| got > 0) {
                reading.so_far = Some(SoFar { resume: Resume { from: got, validator }, unpack, head });
            }
            return Err(Broken::Again(error));
        }
        if unpack.is_none() && !head.is_empty() {
            let unpack = unpack.insert(Unpack::of(&encoding, &head).map_err(Broken::Never)?);
            unpack.push(&head, |bytes| lines.push(bytes), packed_wrong)?;
        }
        tracing::trace!(bytes = got, "the body ended");
        match unpack {
            Some(unpack) => unpack.end(|bytes| lines.push(bytes), packed_wrong),
            None => Ok(()),
        }
    }

    /// The body, how it is packed, and what a later request can go on by: nothing of that where the body itself goes
    /// on.
    async fn open(
        &self,
        file: &ExportFile,
        reading: &mut Reading,
    ) -> Result<(Body, String, Option<Option<HeaderValue>>), Broken> {
        match &self.origin {
            Origin::Server(client, links) => {
                let mut resume = reading.so_far.as_ref().map(|so_far| so_far.resume.clone());
                let response = loop {
                    match client.open_file(&reading.url, file.requires_access_token, resume.as_ref()).await {
                        Ok(response) if is_whole(&response) => break response,
                        Ok(response) if resume.as_ref().is_some_and(|resume| resume.is_taken_up_by(&response)) => {
                            break response;
                        }
                        // Another part than we asked for: from the beginning, then.
                        Ok(_) if resume.is_some() => (resume, reading.so_far) = (None, None),
                        Ok(response) => {
                            let why = format!("the server answered {} without the complete file", response.status());
                            return Err(Broken::Never(Error::new(ErrorKind::Server, why)));
                        }
                        Err(error) if error.kind() == ErrorKind::Interrupted => return Err(Broken::Stopped),
                        // There is nothing after what we have, or the file is another: read again, it shows.
                        Err(error) if error.status() == Some(416) && resume.is_some() => {
                            (resume, reading.so_far) = (None, None);
                        }
                        // F7: a link may end before its file is read; the manifest has newer ones, once.
                        Err(error) if !reading.renewed && link_may_have_ended(&error) => {
                            reading.renewed = true;
                            let ManifestEntryId { page, kind, at } = file.place;
                            let place = LinkPlace { export: file.export, page, list: kind as usize, file: at };
                            match links.refreshed(client, place, &reading.url).await {
                                Ok(fresh) => reading.url = fresh,
                                Err(why) => {
                                    tracing::debug!(%why, "no newer link");
                                    return Err(Broken::Never(error));
                                }
                            }
                        }
                        Err(error) => return Err(Broken::Never(error)),
                    }
                };
                let promised = file.count.unwrap_or(0);
                if response.status().as_u16() == 204 && promised > 0 {
                    let why =
                        format!("the server answered 204 No Content, and the manifest promised {promised} resources");
                    return Err(Broken::Never(Error::new(ErrorKind::Server, why)));
                }
                let encoding = response.headers().get("content-encoding").and_then(|text| text.to_str().ok());
                let encoding = encoding.unwrap_or_default().to_ascii_lowercase();
                if Unpack::is_unknown(&encoding) {
                    self.counters.add(telemetry::DEVIATIONS, &"a file has an unknown Content-Encoding".into(), 1);
                }
                let goes_on = resume.as_ref().is_some_and(|resume| resume.is_taken_up_by(&response));
                let validator = (!goes_on).then(|| Resume::validator(&response));
                let body = response.bytes_stream().map(|bytes| {
                    bytes.map_err(|error| {
                        Error::new(ErrorKind::Network, format!("connection closed early: {}", error.without_url()))
                    })
                });
                Ok((Body::Stream(Box::pin(body)), encoding, validator))
            }
            Origin::Store(store) => {
                let path = file.location.clone().unwrap_or_default();
                let failed = |error: object_store::Error| {
                    Error::new(ErrorKind::Storage, format!("{} cannot be read: {error}", file.name))
                };
                let got = store.get(&path).await.map_err(|error| Broken::Never(failed(error)))?;
                let name = file.name.clone();
                let end = got.range.end;
                if let GetResultPayload::File(local, _) = got.payload {
                    return Ok((Body::Local(local.take(end), name), String::new(), Some(None)));
                }
                let body = got.into_stream().map(move |bytes| {
                    bytes.map_err(|error| Error::new(ErrorKind::Storage, format!("{name} cannot be read: {error}")))
                });
                Ok((Body::Stream(Box::pin(body)), String::new(), Some(None)))
            }
        }
    }
}

/// Returns the export log's name for a list of the manifest.
fn item_type(kind: FileKind) -> &'static str {
    match kind {
        FileKind::Output => "output",
        FileKind::Deleted => "deleted",
        FileKind::Outcome => "error",
    }
}

fn packed_wrong(error: std::io::Error) -> Broken {
    Broken::Again(Error::new(ErrorKind::Server, format!("the file cannot be unpacked: {error}")))
}

/// Returns true if an error may only say that a link has ended: the store that it leads to forbids it, or no longer has
/// it.
fn link_may_have_ended(error: &Error) -> bool {
    matches!(error.status(), Some(401 | 403 | 404 | 410))
}

/// Progress of a file, over its tries.
struct Reading {
    /// Its link, which may be a newer one than the manifest's first.
    url: Url,
    renewed: bool,
    validator: Option<HeaderValue>,
    so_far: Option<SoFar>,
    /// Bytes that an earlier try had reached.
    reached: u64,
}

impl Reading {
    /// Returns true if the last try got further than those before it.
    fn got_on(&self, read: u64) -> bool {
        read > self.reached
    }
}

/// State of a file that broke off and can be resumed.
struct SoFar {
    resume: Resume,
    unpack: Option<Unpack>,
    head: Vec<u8>,
}

/// The bytes of a file as they come.
enum Body {
    Stream(Pin<Box<dyn Stream<Item = Result<Bytes>> + Send>>),
    /// Read on this thread, which may block: the store's own stream hands each 8 KiB to another thread and back.
    Local(std::io::Take<std::fs::File>, String),
}

impl Body {
    async fn next(&mut self) -> Option<Result<Bytes>> {
        match self {
            Body::Stream(stream) => stream.next().await,
            Body::Local(file, name) => {
                let mut buffer = vec![0; LOCAL_READ];
                let read = loop {
                    match file.read(&mut buffer) {
                        Err(error) if error.kind() == IoErrorKind::Interrupted => {}
                        read => break read,
                    }
                };
                match read {
                    Ok(0) => None,
                    Ok(read) => {
                        buffer.truncate(read);
                        Some(Ok(buffer.into()))
                    }
                    Err(error) => Some(Err(Error::new(ErrorKind::Storage, format!("{name} cannot be read: {error}")))),
                }
            }
        }
    }
}
