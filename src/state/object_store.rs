//! A state in an object store: documents are read and put as objects, each put conditional on the version that was
//! read.
//!
//! Lines and keys, which grow or are large, are in local files, one private folder for each process;
//! [`Backend::publish`] puts them. The folder goes with the process; one that a killed process leaves holds patient
//! data and is private.

use parking_lot::Mutex;
use std::collections::{BTreeMap, HashMap};
use std::future::Future;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant, SystemTime};

use futures::stream::{StreamExt as _, TryStreamExt as _};
use object_store::path::Path as ObjectPath;
use object_store::{GetOptions, ObjectStore, ObjectStoreExt, PutMode, PutOptions, UpdateVersion, WriteMultipart};

use super::backend::{Backend, Protection, is_in};
use super::lease::Lease;
use super::local::files_below;
use super::object_lease::HeldLease;
use super::{LOCK, SCRATCH};
use crate::error::{Context, Error, ErrorKind, Result};
use foundation::secure_fs::{new_beside, private_dir};

/// Objects that are there for a moment, for the store's time.
pub(super) const CLOCK: &str = "clock-";
/// Objects that are removed at the same time.
const AT_ONCE: usize = 16;
/// Bytes of a part of an object.
const PART: usize = 8 << 20;
/// Time for which a document that was read is not read again by a process that does not hold the lease, such as one
/// that shows a status page. Who holds the lease is the only writer.
const FRESH: Duration = Duration::from_secs(60);
/// Time for which a put is repeated to which no answer came, and the pauses between two.
const RETRY_FOR: Duration = Duration::from_secs(120);
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LAST_PAUSE: Duration = Duration::from_secs(10);

/// The states of this process, so that all its parts share one lease and one copy of each file.
static OPEN: Mutex<BTreeMap<String, Weak<ObjectFolder>>> = Mutex::new(BTreeMap::new());

/// A document as it was last read or put.
#[derive(Debug, Clone)]
struct KnownDocument {
    content: Option<Vec<u8>>,
    version: Option<UpdateVersion>,
    read: Instant,
}

/// A local file as it was when it was last the object.
#[derive(Debug, Clone, PartialEq, Eq)]
struct KnownFile {
    tag: Option<String>,
    file: Fingerprint,
}

/// Length, time and number of a file, which change when it does.
type Fingerprint = (u64, Option<SystemTime>, u64);

/// A folder in an object store.
pub(super) struct ObjectFolder {
    pub(super) url: String,
    pub(super) store: Arc<dyn ObjectStore>,
    /// Local files.
    files: tempfile::TempDir,
    /// Its own, since those who write state do so where they cannot wait for a future.
    pub(super) runtime: Option<tokio::runtime::Runtime>,
    documents: Mutex<HashMap<String, KnownDocument>>,
    changes: Mutex<()>,
    known: Mutex<HashMap<String, KnownFile>>,
    /// Time after its last renewal at which a lease expires.
    pub(super) expiry: Duration,
    pub(super) held: Mutex<Option<Arc<HeldLease>>>,
    /// A lease was lost, and what this process knows is what it was then: nothing may be written before it is taken
    /// again.
    pub(super) stale: AtomicBool,
}

impl std::fmt::Debug for ObjectFolder {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "ObjectFolder at {}", self.url)
    }
}

impl Drop for ObjectFolder {
    fn drop(&mut self) {
        // It may be dropped where nothing may wait.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl ObjectFolder {
    /// Returns the folder at `url`, whose store `open` gives: the one that this process has open, or a new one.
    pub(super) fn open(
        url: &str,
        expiry: Duration,
        open: impl FnOnce() -> Result<Arc<dyn ObjectStore>>,
    ) -> Result<Arc<Self>> {
        let mut opened = OPEN.lock();
        if let Some(folder) = opened.get(url).and_then(Weak::upgrade) {
            return Ok(folder);
        }
        let folder = Arc::new(Self::new(url, expiry, open()?)?);
        opened.retain(|_, folder| folder.strong_count() > 0);
        opened.insert(url.to_owned(), Arc::downgrade(&folder));
        Ok(folder)
    }

    pub(super) fn new(url: &str, expiry: Duration, store: Arc<dyn ObjectStore>) -> Result<Self> {
        let failed = "the state's local files cannot be created";
        let files = tempfile::Builder::new().prefix("fhirlake-").tempdir().context(ErrorKind::State, failed)?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("state")
            .enable_all()
            .build()
            .context(ErrorKind::State, failed)?;
        Ok(Self {
            url: url.trim_end_matches('/').to_owned(),
            store,
            files,
            runtime: Some(runtime),
            documents: Mutex::default(),
            changes: Mutex::default(),
            known: Mutex::default(),
            expiry,
            held: Mutex::default(),
            stale: AtomicBool::new(false),
        })
    }

    pub(super) fn failed(&self, what: &str, error: impl std::fmt::Display) -> Error {
        // Some stores' errors have the whole answer in them.
        let said: String = error.to_string().lines().next().unwrap_or_default().chars().take(300).collect();
        let said = said.split('?').next().unwrap_or_default().to_owned();
        Error::new(ErrorKind::State, format!("{}: {what}: {said}", self.url))
    }

    /// Runs `work` where futures run, and waits for it.
    pub(super) fn wait<T: Send + 'static>(&self, work: impl Future<Output = Result<T>> + Send + 'static) -> Result<T> {
        let gone = || Error::new(ErrorKind::Internal, "the state's worker thread ended");
        let (answer, answered) = std::sync::mpsc::sync_channel(1);
        let runtime = self.runtime.as_ref().ok_or_else(gone)?;
        runtime.spawn(async move {
            // Nobody waits any more when the process ends.
            let _ = answer.send(work.await);
        });
        answered.recv().map_err(|_| gone())?
    }

    /// Forgets what this process knows: another may have written since. Reports stay, which nobody changes.
    pub(super) fn forget(&self) -> Result<()> {
        self.documents.lock().clear();
        let mut known = self.known.lock();
        let files = files_below(self.files.path(), "");
        for name in files.iter().filter(|name| !name.starts_with(SCRATCH) && !is_immutable(name)) {
            let path = self.files.path().join(name);
            std::fs::remove_file(&path).context(ErrorKind::State, format!("{} cannot be removed", path.display()))?;
            known.remove(name);
        }
        known.retain(|name, _| is_immutable(name));
        Ok(())
    }

    /// Returns true while this process holds the lease, and so is the only writer.
    fn is_held(&self) -> bool {
        self.held.lock().as_ref().is_some_and(|held| held.is_ours(self.expiry))
    }

    /// Reads a document from the store.
    fn fetch_document(&self, name: &str) -> Result<KnownDocument> {
        let (store, path, read) = (self.store.clone(), ObjectPath::from(name), Instant::now());
        let got = self.wait(async move { get_document(&*store, &path).await });
        let (content, version) = got.map_err(|error| self.failed(&format!("{name} cannot be read"), error))?;
        Ok(KnownDocument { content, version, read })
    }

    /// Notes that another process has written although this one took the lease: it commits and writes nothing more.
    fn lose_lease(&self, name: &str) -> Error {
        if let Some(held) = self.held.lock().as_ref() {
            held.lose();
        }
        let what =
            format!("{}: another process has replaced it, so it holds the lease of this run", self.location(name));
        Error::new(ErrorKind::Locked, what)
    }
}

type Versioned = (Option<Vec<u8>>, Option<UpdateVersion>);

async fn get_document(store: &dyn ObjectStore, path: &ObjectPath) -> Result<Versioned> {
    match store.get(path).await {
        Ok(got) => {
            let version = UpdateVersion { e_tag: got.meta.e_tag.clone(), version: got.meta.version.clone() };
            Ok((Some(got.bytes().await.context(ErrorKind::State, "an object")?.to_vec()), Some(version)))
        }
        Err(object_store::Error::NotFound { .. }) => Ok((None, None)),
        Err(error) => Err(error).context(ErrorKind::State, "an object"),
    }
}

/// Puts a document where it still is what `before` says; `None` where it is not. A store's client does not repeat a put
/// with a condition, since it cannot know whether the first one counted: reading it back tells.
async fn put_document(
    store: &dyn ObjectStore,
    path: &ObjectPath,
    content: Vec<u8>,
    before: Versioned,
) -> Result<Option<UpdateVersion>> {
    let mut pause = FIRST_PAUSE;
    let began = Instant::now();
    let mut before = before;
    loop {
        let mode = before.1.clone().map_or(PutMode::Create, PutMode::Update);
        let options = PutOptions { mode, ..PutOptions::default() };
        let error = match store.put_opts(path, content.clone().into(), options).await {
            Ok(put) => return Ok(Some(put.into())),
            Err(error) => error,
        };
        let is_refused =
            matches!(error, object_store::Error::AlreadyExists { .. } | object_store::Error::Precondition { .. });
        match get_document(store, path).await {
            Ok((Some(there), version)) if there == content => return Ok(version),
            // Stores may give an object another version without another content.
            Ok((there, version)) if there == before.0 => before = (there, version),
            Ok(_) => return Ok(None),
            Err(unread) if is_refused => return Err(unread),
            Err(_) => {}
        }
        if began.elapsed() > RETRY_FOR {
            return Err(error).context(ErrorKind::State, "an object");
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LAST_PAUSE);
    }
}

impl Backend for ObjectFolder {
    fn location(&self, name: &str) -> String {
        if name.is_empty() { self.url.clone() } else { format!("{}/{name}", self.url) }
    }

    fn create(&self) -> Result<()> {
        Ok(())
    }

    fn read(&self, name: &str) -> Result<Option<Vec<u8>>> {
        // Locked until the answer is known: what was put meanwhile must not be taken for older than it is.
        let mut documents = self.documents.lock();
        if let Some(known) = documents.get(name)
            && (self.is_held() || known.read.elapsed() < FRESH)
        {
            return Ok(known.content.clone());
        }
        let known = self.fetch_document(name)?;
        let content = known.content.clone();
        documents.insert(name.to_owned(), known);
        Ok(content)
    }

    fn replace(&self, name: &str, content: &[u8], protection: Protection) -> Result<()> {
        // Locked first: what is true of the lease is true of the put.
        let mut documents = self.documents.lock();
        let is_leased = self.held.lock().is_some();
        if protection == Protection::ByLease {
            self.check()?;
        }
        let (store, path, content) = (self.store.clone(), ObjectPath::from(name), content.to_vec());
        let body = content.clone();
        let put = if protection == Protection::ByLease && is_leased {
            let known = match documents.remove(name) {
                Some(known) => known,
                None => self.fetch_document(name)?,
            };
            let before = (known.content, known.version);
            self.wait(async move { put_document(&*store, &path, body, before).await })
        } else {
            documents.remove(name);
            let put = async move { store.put(&path, body.into()).await.context(ErrorKind::State, "an object") };
            self.wait(async move { put.await.map(|put| Some(UpdateVersion::from(put))) })
        };
        match put.map_err(|error| self.failed(&format!("{name} cannot be written"), error))? {
            version @ Some(_) => {
                let known = KnownDocument { content: Some(content), version, read: Instant::now() };
                documents.insert(name.to_owned(), known);
                Ok(())
            }
            None => Err(self.lose_lease(name)),
        }
    }

    fn remove(&self, names: &[String]) -> Result<()> {
        if names.is_empty() {
            return Ok(());
        }
        self.check()?;
        let (store, paths) =
            (self.store.clone(), names.iter().map(|name| ObjectPath::from(name.as_str())).collect::<Vec<_>>());
        let removed = self.wait(async move {
            let removals = paths.into_iter().map(|path| {
                let store = store.clone();
                async move {
                    match store.delete(&path).await {
                        Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
                        Err(error) => Err(error).context(ErrorKind::State, "an object"),
                    }
                }
            });
            tokio_stream::iter(removals).buffer_unordered(AT_ONCE).try_collect::<Vec<()>>().await
        });
        removed.map_err(|error| self.failed("an object cannot be removed", error))?;
        let (mut documents, mut known) = (self.documents.lock(), self.known.lock());
        for name in names {
            documents.insert(name.clone(), KnownDocument { content: None, version: None, read: Instant::now() });
            known.remove(name);
            let _ = std::fs::remove_file(self.files.path().join(name));
        }
        Ok(())
    }

    fn list(&self, folder: &str) -> Result<Vec<String>> {
        let (store, prefix) = (self.store.clone(), Some(ObjectPath::from(folder)).filter(|_| !folder.is_empty()));
        let listed = self.wait(async move {
            let names = store.list(prefix.as_ref()).map_ok(|object| object.location.to_string());
            names.try_collect::<Vec<String>>().await.context(ErrorKind::State, "the list")
        });
        let mut names = listed.map_err(|error| self.failed("cannot be listed", error))?;
        // What this process has written and not yet put.
        names.extend(files_below(&self.files.path().join(folder), folder));
        names.retain(|name| is_of_the_state(name) && is_in(name, folder));
        names.sort();
        names.dedup();
        Ok(names)
    }

    fn local(&self, name: &str) -> Result<PathBuf> {
        let path = local_path(self.files.path(), name)?;
        let mut known = self.known.lock();
        let here = fingerprint(&path);
        let tag = match (known.get(name), here) {
            // Written here and not yet put: it is ahead of the object.
            (of_object, Some(here)) if of_object.is_none_or(|of_object| of_object.file != here) => return Ok(path),
            (Some(_), Some(_)) if self.is_held() || is_immutable(name) => return Ok(path),
            (Some(of_object), Some(_)) => of_object.tag.clone(),
            // Read anew, also where somebody has removed the local file.
            (_, None) | (None, _) => None,
        };
        let (store, object, to) = (self.store.clone(), ObjectPath::from(name), path.clone());
        let fetched = self.wait(async move { fetch(&*store, &object, &to, tag).await });
        match fetched.map_err(|error| self.failed(&format!("{name} cannot be read"), error))? {
            Fetched::Unchanged => {}
            Fetched::Gone => {
                known.remove(name);
                let _ = std::fs::remove_file(&path);
            }
            Fetched::New(tag) => {
                if let Some(file) = fingerprint(&path) {
                    known.insert(name.to_owned(), KnownFile { tag, file });
                }
            }
        }
        Ok(path)
    }

    fn publish(&self, name: &str) -> Result<()> {
        self.check()?;
        let path = local_path(self.files.path(), name)?;
        let mut known = self.known.lock();
        let gone = || Error::new(ErrorKind::State, format!("{} is gone from this machine", path.display()));
        let file = fingerprint(&path).ok_or_else(gone)?;
        if known.get(name).is_some_and(|known| known.file == file) {
            return Ok(());
        }
        let (store, object) = (self.store.clone(), ObjectPath::from(name));
        let put = self.wait(async move { put(&*store, &object, &path).await });
        let tag = put.map_err(|error| self.failed(&format!("{name} cannot be written"), error))?;
        known.insert(name.to_owned(), KnownFile { tag, file });
        Ok(())
    }

    fn changes(&self) -> &Mutex<()> {
        &self.changes
    }

    fn acquire(self: Arc<Self>, owner: &str) -> Result<Lease> {
        self.lock(owner).map(Lease::new)
    }

    fn holder(&self) -> Option<String> {
        self.lock_holder()
    }

    fn check(&self) -> Result<()> {
        let lost = |held: &Arc<HeldLease>| !held.is_ours(self.expiry);
        match self.stale.load(Ordering::Acquire) || self.held.lock().as_ref().is_some_and(lost) {
            true => Err(Error::new(
                ErrorKind::Locked,
                format!("{} is not locked by this run any more: its lease could not be renewed in time", self.url),
            )),
            false => Ok(()),
        }
    }

    fn scratch(&self) -> PathBuf {
        self.files.path().join(SCRATCH)
    }

    fn folder(&self) -> Option<&Path> {
        None
    }
}

/// Returns true for a file that is written once.
fn is_immutable(name: &str) -> bool {
    name.starts_with("runs/")
}

/// Returns true for an object that is a file of the state.
fn is_of_the_state(name: &str) -> bool {
    let first = name.split('/').next().unwrap_or_default();
    first != SCRATCH && name != LOCK && !name.starts_with(CLOCK) && !name.ends_with(".new")
}

/// Returns where the local file of an object is; a name that leads out of the folder is refused.
fn local_path(folder: &Path, name: &str) -> Result<PathBuf> {
    let mut path = folder.to_path_buf();
    for part in name.split('/') {
        if part.is_empty() || part == "." || part == ".." || part.contains('\\') {
            return Err(Error::new(ErrorKind::State, format!("unexpected object {name} in the state folder")));
        }
        path.push(part);
    }
    Ok(path)
}

fn fingerprint(path: &Path) -> Option<Fingerprint> {
    let meta = std::fs::metadata(path).ok()?;
    #[cfg(unix)]
    let number = std::os::unix::fs::MetadataExt::ino(&meta);
    #[cfg(not(unix))]
    let number = 0;
    Some((meta.len(), meta.modified().ok(), number))
}

/// Outcome of reading an object into a file.
enum Fetched {
    Unchanged,
    Gone,
    New(Option<String>),
}

/// Reads an object into a file, unless it still has this tag.
async fn fetch(store: &dyn ObjectStore, object: &ObjectPath, path: &Path, tag: Option<String>) -> Result<Fetched> {
    let unread = "an object";
    let options = GetOptions { if_none_match: tag, ..GetOptions::default() };
    let got = match store.get_opts(object, options).await {
        Ok(got) => got,
        Err(object_store::Error::NotModified { .. }) => return Ok(Fetched::Unchanged),
        Err(object_store::Error::NotFound { .. }) => return Ok(Fetched::Gone),
        Err(error) => return Err(error).context(ErrorKind::State, unread),
    };
    let tag = got.meta.e_tag.clone();
    if let Some(folder) = path.parent() {
        private_dir(folder)?;
    }
    let (beside, mut file) = new_beside(path)?;
    let mut bytes = got.into_stream();
    while let Some(part) = bytes.try_next().await.context(ErrorKind::State, unread)? {
        file.write_all(&part).context(ErrorKind::State, "the local file")?;
    }
    std::fs::rename(&beside, path).context(ErrorKind::State, "the local file")?;
    Ok(Fetched::New(tag))
}

/// Writes a file into an object; its tag.
async fn put(store: &dyn ObjectStore, object: &ObjectPath, path: &Path) -> Result<Option<String>> {
    let failed = "an object";
    let mut file = std::fs::File::open(path).context(ErrorKind::State, "the local file")?;
    let mut part = Vec::new();
    let mut next = |part: &mut Vec<u8>| {
        part.clear();
        (&mut file).take(PART as u64).read_to_end(part).context(ErrorKind::State, "the local file")
    };
    if next(&mut part)? < PART {
        let put = store.put(object, part.into()).await.context(ErrorKind::State, failed)?;
        return Ok(put.e_tag);
    }
    let upload = store.put_multipart(object).await.context(ErrorKind::State, failed)?;
    let mut upload = WriteMultipart::new_with_chunk_size(upload, PART);
    while !part.is_empty() {
        upload.wait_for_capacity(2).await.context(ErrorKind::State, failed)?;
        upload.write(&part);
        next(&mut part)?;
    }
    Ok(upload.finish().await.context(ErrorKind::State, failed)?.e_tag)
}

#[cfg(test)]
pub(super) mod tests;
