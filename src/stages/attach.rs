//! Attachments that resources only link to (Bulk Data 2.0, "Attachments"): fetched, and put beside the tables or into
//! the resource. Between parse and encode, where a pipeline asks for it.

mod content;
mod rewritten;
mod settings;

pub use self::settings::AttachmentsSection;
use parking_lot::Mutex;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use aws_lc_rs::digest;
use base64::Engine;
use futures::StreamExt;
use object_store::buffered::BufWriter;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt};
use tokio::io::AsyncWriteExt;
use tokio::sync::Semaphore;
use url::{Origin, Url};

use self::content::Content;
use self::rewritten::Gathered;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::messages::{ExportFile, ParsedRow, ResourceType, Rows};
use crate::telemetry;
use crate::values::Types;
use bulk_data_client::{Client, unsigned};
use fhir_arrow::for_each_attachment;
use fhir_arrow::tape::{Tape, Value, parse_value};
use flow::{Cancellation, Counters, Receiver, Sender};

/// Settings of attachments.
pub struct AttachSettings {
    /// Those of at most so many bytes are put into the resource as `data`; 0 for none.
    pub inline_up_to: u64,
    /// Larger ones stay links.
    pub max_size: u64,
    /// Resource types whose attachments are fetched.
    pub types: Types,
    /// Content types that are fetched, `application/pdf` or `image/*`; empty for all.
    pub content_types: Vec<String>,
    /// Origins beside the server's that are asked; `None` for any.
    pub origins: Option<Vec<Origin>>,
    /// Bytes of JSON that are sent on together.
    pub chunk_bytes: usize,
}

/// One worker; any number share `rows`.
pub struct Attach {
    /// Source of rows.
    pub rows: Receiver<Rows>,
    /// Their destination.
    pub attached: Sender<Rows>,
    /// The server.
    pub client: Client,
    /// The tables' folder.
    pub store: Arc<dyn ObjectStore>,
    /// Settings.
    pub settings: Arc<AttachSettings>,
    /// Attachments at the same time, of all workers.
    pub places: Arc<Semaphore>,
    /// Attachments that failed one after the other, of all workers.
    pub failures: Arc<AtomicU32>,
    /// Hosts of which was said that they are not asked.
    pub said: Arc<Mutex<HashSet<String>>>,
    /// Counters.
    pub counters: Counters,
    /// The run's cancellation.
    pub stop: Cancellation,
}

/// Folder for attachments in the tables' folder.
pub const ATTACHMENTS_FOLDER: &str = "attachments";
/// Time for which one attachment may be asked for and read before it is left a link.
const PATIENCE: Duration = Duration::from_secs(300);
/// After so many failures one after the other no more are asked for: the others' host would hold up the whole run.
const MAX_FAILURES: u32 = 20;
/// Attachments of one resource that ask for a place at the same time.
const AT_ONCE: usize = 64;
/// Bytes of a FHIR Binary that are read as JSON.
const MAX_BINARY: u64 = 64 << 20;

/// An attachment to be fetched.
struct Wanted {
    /// Its object's place on the tape.
    at: usize,
    url: Url,
    content_type: String,
    /// Its resource's description: its size in bytes, and the Base64 of its SHA-1.
    size: Option<u64>,
    hash: Option<String>,
    /// Its file, should it become one.
    path: Path,
    /// True if a file there is surely of the same copy.
    is_known: bool,
}

/// Its outcome.
enum Fetched {
    /// A file in the tables' folder.
    File(Path),
    /// The content itself.
    Inline(Vec<u8>),
}

impl Attach {
    /// Fetches until the edge closes.
    pub async fn run(self) -> Result<()> {
        while let Some(parcel) = self.rows.recv().await {
            let mut rows = parcel.into_inner();
            let with = self.take_out(&mut rows);
            let (bytes, file) = (rows.bytes.clone(), rows.file.clone());
            let tape = match (with.is_empty(), rows.by_type.is_empty()) {
                (true, _) => Tape::default(),
                (false, true) => std::mem::take(&mut rows.tape),
                (false, false) => rows.tape.clone(),
            };
            // Those without go their way at once.
            if !rows.by_type.is_empty() && self.attached.send(rows).await.is_err() {
                return Ok(());
            }
            let mut gathered = Gathered::new(&file);
            for (name, row, wanted) in with {
                let Some(fetched) = self.fetch_all(&file, wanted).await else { return Ok(()) };
                gathered.add(&name, &row, tape.over(&bytes).value(row.root), &bytes[row.line.clone()], &fetched)?;
                if gathered.bytes.len() >= self.settings.chunk_bytes {
                    let full = std::mem::replace(&mut gathered, Gathered::new(&file));
                    if self.attached.send(full.rows()?).await.is_err() {
                        return Ok(());
                    }
                }
            }
            if !gathered.by_type.is_empty() && self.attached.send(gathered.rows()?).await.is_err() {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Takes the rows out that have attachments to be fetched.
    fn take_out(&self, rows: &mut Rows) -> Vec<(ResourceType, ParsedRow, Vec<Wanted>)> {
        let mut with = Vec::new();
        let document = rows.tape.over(&rows.bytes);
        for (name, of_type) in &mut rows.by_type {
            if !self.settings.types.contains(name) {
                continue;
            }
            for mut row in std::mem::take(of_type) {
                let root = row.root;
                let wanted = self.wanted(&rows.file, name, &mut row, document.value(root));
                if wanted.is_empty() { of_type.push(row) } else { with.push((name.clone(), row, wanted)) }
            }
        }
        rows.by_type.retain(|(_, of_type)| !of_type.is_empty());
        with
    }

    fn wanted(&self, file: &ExportFile, name: &ResourceType, row: &mut ParsedRow, resource: Value<'_>) -> Vec<Wanted> {
        let mut wanted: Vec<Wanted> = Vec::new();
        let mut number = 0;
        let key = row.key.key;
        for_each_attachment(name, resource, &mut |attachment| {
            number += 1;
            let text = |key: &[u8]| attachment.get(key).and_then(|value| value.as_str());
            let Some(link) = text(b"url").filter(|_| attachment.get(b"data").is_none()) else { return };
            let content_type = text(b"contentType").unwrap_or_default();
            // A link that is left now may be followed the next time.
            row.line_hash = None;
            // Absolute by the guide; a server's own may be relative to its base.
            let url = self.client.base().join(link).ok().filter(|url| self.may_ask(file, url) || self.say_left(url));
            let (Some(url), true) = (url, self.takes(content_type)) else {
                self.counters.add(telemetry::ATTACHMENTS, &"left".into(), 1);
                return;
            };
            // The same copy of a resource has its attachments in the same places, however often it comes.
            let said =
                |key: &[u8]| resource.get(b"meta").and_then(|meta| meta.get(key)).and_then(|value| value.as_str());
            let (version, updated) = (said(b"versionId"), said(b"lastUpdated"));
            let stated: Vec<_> = [b"hash".as_slice(), b"creation"].iter().map(|key| text(key)).collect();
            let copy = format!("{key:032x} {version:?} {updated:?} {number} {stated:?} {}", unsigned(&url));
            // Without any of them, what is behind the same link may be another by now.
            let is_known = version.is_some() || updated.is_some() || stated.iter().any(Option::is_some);
            let hash = twox_hash::XxHash3_128::oneshot(copy.as_bytes());
            let path = Path::from(format!("{ATTACHMENTS_FOLDER}/{name}/{hash:032x}.{}", extension(content_type)));
            let size =
                attachment.get(b"size").and_then(|size| std::str::from_utf8(size.number_text()?).ok()?.parse().ok());
            let (at, content_type) = (attachment.index(), content_type.to_owned());
            let hash = text(b"hash").map(str::to_owned);
            wanted.push(Wanted { at, url, content_type, size, hash, path, is_known });
        });
        wanted
    }

    /// Says once of a host that its attachments stay links; no.
    fn say_left(&self, url: &Url) -> bool {
        let host = url.origin().ascii_serialization();
        let mut said = self.said.lock();
        if said.len() < 100 && said.insert(host.clone()) {
            tracing::warn!(host, "attachments there stay links: stages.attachments.origins does not name the host");
        }
        false
    }

    /// Returns true if an attachment may be asked for: links come with the data, so they lead to known hosts only.
    fn may_ask(&self, file: &ExportFile, url: &Url) -> bool {
        let known = |origin: &Origin| *origin == self.client.base().origin() || *origin == file.url.origin();
        let named = |origin: &Origin| self.settings.origins.as_ref().is_none_or(|origins| origins.contains(origin));
        matches!(url.scheme(), "http" | "https") && (known(&url.origin()) || named(&url.origin()))
    }

    fn takes(&self, content_type: &str) -> bool {
        let bare = content_type.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
        let fits = |wanted: &String| match wanted.strip_suffix("/*") {
            Some(family) => bare.split('/').next() == Some(family),
            None => *wanted == bare,
        };
        self.settings.content_types.is_empty() || self.settings.content_types.iter().any(fits)
    }

    /// Returns a resource's attachments that could be read, by their places; `None` where the run is stopping.
    async fn fetch_all(&self, file: &ExportFile, wanted: Vec<Wanted>) -> Option<HashMap<usize, Fetched>> {
        let requested = wanted.into_iter().map(|wanted| async move {
            // The semaphore is never closed.
            let _place = self.places.acquire().await;
            let fetched = self.fetch(file, &wanted).await;
            (wanted.at, fetched)
        });
        let mut requested = tokio_stream::iter(requested).buffer_unordered(AT_ONCE);
        let mut done = HashMap::new();
        while let Some((at, fetched)) = requested.next().await {
            let label = match fetched {
                Ok(Some(fetched)) => {
                    self.failures.store(0, Ordering::Relaxed);
                    let label = if matches!(fetched, Fetched::File(_)) { "files" } else { "inline" };
                    done.insert(at, fetched);
                    label
                }
                Ok(None) => "left",
                // Not a row may go on that the stop has cut short: its type is brought by the next run.
                Err(_) if self.stop.is_cancelled() => return None,
                // Neither its link nor the server's words are logged: they may speak of the patient.
                Err(error) => {
                    let (status, kind) = (error.status(), error.kind());
                    // That one document is not there says nothing of the others.
                    let of_host = status.is_none_or(|status| status >= 500 || status == 429);
                    let row = u32::from(of_host) + self.failures.fetch_add(u32::from(of_host), Ordering::Relaxed);
                    if !of_host || row <= MAX_FAILURES {
                        tracing::warn!(file = %file.name, status, ?kind, "an attachment could not be fetched; it \
                            stays a link");
                    }
                    if of_host && row == MAX_FAILURES {
                        tracing::error!("{MAX_FAILURES} attachments failed in a row: this run requests no more");
                    }
                    "failed"
                }
            };
            self.counters.add(telemetry::ATTACHMENTS, &label.into(), 1);
        }
        Some(done)
    }

    /// Fetches one; `None` where it is left a link.
    async fn fetch(&self, file: &ExportFile, wanted: &Wanted) -> Result<Option<Fetched>> {
        // A file is put in place as a whole, so one that is there is the same copy's.
        if wanted.is_known && self.store.head(&wanted.path).await.is_ok() {
            return Ok(Some(Fetched::File(wanted.path.clone())));
        }
        if self.failures.load(Ordering::Relaxed) >= MAX_FAILURES {
            return Err(Error::new(ErrorKind::Network, format!("skipped: {MAX_FAILURES} earlier downloads failed")));
        }
        let work = tokio::time::timeout(PATIENCE, self.ask(file, wanted));
        let done = self.stop.or(work).await.ok_or_else(|| Error::new(ErrorKind::Interrupted, "stopped"))?;
        done.unwrap_or_else(|_| {
            Err(Error::new(ErrorKind::Network, format!("timed out after {} s", PATIENCE.as_secs())))
        })
    }

    async fn ask(&self, file: &ExportFile, wanted: &Wanted) -> Result<Option<Fetched>> {
        // F11: the token by the export's own rule. Of a quarantined line that is not known any more; origins are
        // checked.
        let with_token = file.requires_access_token || file.replayed;
        let response = self
            .client
            .open_attachment(&wanted.url, with_token, &wanted.content_type, &|to| self.may_ask(file, to))
            .await?;
        let said = response.headers().get("content-type").and_then(|text| text.to_str().ok()).unwrap_or_default();
        let is_binary = said.contains("fhir+json") && !wanted.content_type.contains("fhir+json");
        let limit = if is_binary { self.settings.max_size.min(MAX_BINARY) } else { self.settings.max_size };
        // What is packed for the way is unpacked; a file that is packed itself stays so.
        let mut body = Content::new(response);
        let mut head: Vec<u8> = Vec::new();
        let mut writer: Option<BufWriter> = None;
        let mut size = 0u64;
        let mut digest = digest::Context::new(&digest::SHA1_FOR_LEGACY_USE_ONLY);
        let in_memory = if is_binary { MAX_BINARY } else { self.settings.inline_up_to.max(1 << 16) };
        while let Some(piece) = body.next().await? {
            size += piece.len() as u64;
            if !is_binary {
                digest.update(&piece);
            }
            if size > limit {
                if let Some(mut writer) = writer {
                    // What it leaves behind has no name.
                    let _ = writer.abort().await;
                }
                return Ok(None);
            }
            if writer.is_none() && size <= in_memory {
                head.extend_from_slice(&piece);
                continue;
            }
            let writer = writer
                .get_or_insert_with(|| BufWriter::with_capacity(self.store.clone(), wanted.path.clone(), 5 << 20));
            let failed = "an attachment cannot be written";
            if !head.is_empty() {
                writer.write_all(&std::mem::take(&mut head)).await.context(ErrorKind::Storage, failed)?;
            }
            writer.write_all(&piece).await.context(ErrorKind::Storage, failed)?;
        }
        if let Some(mut writer) = writer {
            writer.shutdown().await.context(ErrorKind::Storage, "an attachment cannot be written")?;
            self.compare(file, wanted, size, digest);
            return Ok(Some(Fetched::File(wanted.path.clone())));
        }
        let content = if is_binary { data_of(&head)? } else { head };
        if is_binary {
            digest.update(&content);
        }
        self.compare(file, wanted, content.len() as u64, digest);
        if content.len() as u64 <= self.settings.inline_up_to {
            return Ok(Some(Fetched::Inline(content)));
        }
        self.store
            .put(&wanted.path, content.into())
            .await
            .context(ErrorKind::Storage, "an attachment cannot be written")?;
        Ok(Some(Fetched::File(wanted.path.clone())))
    }
}

impl Attach {
    /// Says where an attachment differs from its resource's size or hash. It is kept: servers are wrong in this more
    /// often than networks, whose own checks have passed by now.
    fn compare(&self, file: &ExportFile, wanted: &Wanted, size: u64, digest: digest::Context) {
        let hash = base64::engine::general_purpose::STANDARD.encode(digest.finish());
        let size_differs = wanted.size.is_some_and(|said| said != size);
        let hash_differs = wanted.hash.as_ref().is_some_and(|said| *said != hash);
        if size_differs || hash_differs {
            self.counters.add(telemetry::ATTACHMENTS, &"unlike".into(), 1);
            tracing::warn!(file = %file.name, size_differs, hash_differs, "an attachment differs from its resource's \
                size or hash");
        }
    }
}

/// The content of a FHIR Binary.
fn data_of(json: &[u8]) -> Result<Vec<u8>> {
    let mut tape = Tape::default();
    let failed = || Error::new(ErrorKind::Server, "the answer is neither the content nor a Binary");
    let root = parse_value(&mut tape, json, 0, json.len()).map_err(|_| failed())?;
    let document = tape.over(json);
    let binary = document.value(root);
    let is_binary = binary.get(b"resourceType").and_then(|name| name.str_bytes()) == Some(b"Binary");
    let data = binary.get(b"data").and_then(|data| data.str_bytes()).filter(|_| is_binary).ok_or_else(failed)?;
    base64::engine::general_purpose::STANDARD.decode(data).map_err(|_| failed())
}

/// The ending of files of a content type.
fn extension(content_type: &str) -> &'static str {
    match content_type.split(';').next().unwrap_or_default().trim() {
        "application/pdf" => "pdf",
        "text/plain" => "txt",
        "text/html" => "html",
        "text/rtf" | "application/rtf" => "rtf",
        "text/xml" | "application/xml" | "application/hl7-v3+xml" | "application/fhir+xml" => "xml",
        "application/json" | "application/fhir+json" => "json",
        "image/jpeg" | "image/jpg" => "jpg",
        "image/png" => "png",
        "image/tiff" => "tiff",
        "image/gif" => "gif",
        "application/dicom" => "dcm",
        "application/zip" => "zip",
        _ => "bin",
    }
}
