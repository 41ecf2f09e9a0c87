//! A state in an object store: documents are read and put as objects, each put conditional on the version that was
//! read.
//!
//! Lines and keys, which grow or are large, are in local files, one private folder for each process;
//! [`Backend::publish`] puts them. The folder goes with the process; one that a killed process leaves holds patient
//! data and is private.

use parking_lot::Mutex;
mod documents;
mod files;

use std::collections::{BTreeMap, HashMap};
use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use futures::stream::{StreamExt as _, TryStreamExt as _};
use object_store::path::Path as ObjectPath;
use object_store::{ObjectStore, ObjectStoreExt, UpdateVersion};

use self::documents::{Put, get_document, put_document};
use self::files::{Fetched, Fingerprint, fetch, fingerprint, local_path, put};
use super::backend::{Backend, Protection, is_in};
use super::lease::Lease;
use super::local::files_below;
use super::object_lease::HeldLease;
use super::{LOCK, SCRATCH};
use crate::error::{Context, Error, ErrorKind, Result};

/// Objects that are there for a moment, for the store's time.
pub(super) const CLOCK: &str = "clock-";
/// Objects that are removed at the same time.
const AT_ONCE: usize = 16;
/// Time for which a document that was read is not read again by a process that does not hold the lease, such as one
/// that shows a status page. Who holds the lease is the only writer.
const FRESH: Duration = Duration::from_secs(60);

/// The states of this process, so that all its parts share one lease and one copy of each file.
static OPEN: Mutex<BTreeMap<String, Weak<ObjectFolder>>> = Mutex::new(BTreeMap::new());

/// A document as it was last read or put.
#[derive(Debug, Clone)]
struct KnownDocument {
    content: Option<Vec<u8>>,
    version: Option<UpdateVersion>,
    read: Instant,
}

/// The documents that this process knows.
#[derive(Debug, Default)]
struct Documents {
    known: HashMap<String, KnownDocument>,
    /// Counts puts and removals: what was read before one may be older than it.
    puts: u64,
}

/// A local file as it was when it was last the object.
#[derive(Debug, Clone, PartialEq, Eq)]
struct KnownFile {
    tag: Option<String>,
    file: Fingerprint,
}

/// A folder in an object store.
pub(super) struct ObjectFolder {
    pub(super) url: String,
    pub(super) store: Arc<dyn ObjectStore>,
    /// Local files.
    files: tempfile::TempDir,
    /// Its own, since those who write state do so where they cannot wait for a future.
    pub(super) runtime: Option<tokio::runtime::Runtime>,
    documents: Mutex<Documents>,
    changes: Mutex<()>,
    /// Locked while a document is put.
    puts: Mutex<()>,
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
            puts: Mutex::default(),
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
        let answer = || answered.recv().map_err(|_| gone())?;
        // A thread of the reactor that waits is replaced: whoever watches the run is answered meanwhile.
        match tokio::runtime::Handle::try_current().map(|handle| handle.runtime_flavor()) {
            Ok(tokio::runtime::RuntimeFlavor::MultiThread) => tokio::task::block_in_place(answer),
            _ => answer(),
        }
    }

    /// Forgets what this process knows: another may have written since. Reports stay, which hardly change.
    pub(super) fn forget(&self) -> Result<()> {
        self.documents.lock().known.clear();
        let mut known = self.known.lock();
        let is_report = |name: &str| name.starts_with("runs/");
        let files = files_below(self.files.path(), "");
        for name in files.iter().filter(|name| !name.starts_with(SCRATCH) && !is_report(name)) {
            let path = self.files.path().join(name);
            match std::fs::remove_file(&path) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(error).context(ErrorKind::State, format!("{} cannot be removed", path.display()));
                }
                _ => {}
            }
        }
        known.retain(|name, _| is_report(name));
        Ok(())
    }

    /// Returns the names of all files below `folder`, in their order.
    fn list_below(&self, folder: &str) -> Result<Vec<String>> {
        let (store, prefix) = (self.store.clone(), Some(ObjectPath::from(folder)).filter(|_| !folder.is_empty()));
        let listed = self.wait(async move {
            let names = store.list(prefix.as_ref()).map_ok(|object| object.location.to_string());
            names.try_collect::<Vec<String>>().await.context(ErrorKind::State, "the list")
        });
        let mut names = listed.map_err(|error| self.failed("cannot be listed", error))?;
        // What this process has written and not yet put.
        names.extend(files_below(&self.files.path().join(folder), folder));
        names.retain(|name| is_of_the_state(name));
        names.sort();
        names.dedup();
        Ok(names)
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

impl Backend for ObjectFolder {
    fn location(&self, name: &str) -> String {
        if name.is_empty() { self.url.clone() } else { format!("{}/{name}", self.url) }
    }

    fn create(&self) -> Result<()> {
        Ok(())
    }

    fn read(&self, name: &str) -> Result<Option<Vec<u8>>> {
        let puts = {
            let documents = self.documents.lock();
            if let Some(known) = documents.known.get(name)
                && (self.is_held() || known.read.elapsed() < FRESH)
            {
                return Ok(known.content.clone());
            }
            documents.puts
        };
        let known = self.fetch_document(name)?;
        let content = known.content.clone();
        let mut documents = self.documents.lock();
        // What was put meanwhile is newer.
        if documents.puts == puts {
            documents.known.insert(name.to_owned(), known);
        }
        Ok(content)
    }

    fn replace(&self, name: &str, content: &[u8], protection: Protection) -> Result<()> {
        // One after the other: what is known of a document is what was put last.
        let _puts = self.puts.lock();
        let held = self.held.lock().clone().filter(|_| protection == Protection::ByLease);
        if protection == Protection::ByLease {
            self.check()?;
        }
        let known = self.documents.lock().known.remove(name);
        let known = match known {
            None if held.is_some() => Some(self.fetch_document(name)?),
            known => known,
        };
        let (store, path, body) = (self.store.clone(), ObjectPath::from(name), content.to_vec());
        let put = match (held, known) {
            (Some(held), Some(known)) => {
                let (before, expiry) = ((known.content, known.version), self.expiry);
                self.wait(async move { put_document(&*store, &path, body, before, (&held, expiry)).await })
            }
            _ => self.wait(async move {
                let put = store.put(&path, body.into()).await.context(ErrorKind::State, "an object")?;
                Ok(Put::Done(Some(put.into())))
            }),
        };
        match put.map_err(|error| self.failed(&format!("{name} cannot be written"), error))? {
            Put::Done(version) => {
                let known = KnownDocument { content: Some(content.to_vec()), version, read: Instant::now() };
                let mut documents = self.documents.lock();
                documents.puts += 1;
                documents.known.insert(name.to_owned(), known);
                Ok(())
            }
            Put::Replaced => Err(self.lose_lease(name)),
            Put::LeaseEnded => {
                self.check()?;
                Err(self.lose_lease(name))
            }
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
        documents.puts += 1;
        for name in names {
            let gone = KnownDocument { content: None, version: None, read: Instant::now() };
            documents.known.insert(name.clone(), gone);
            known.remove(name);
            let _ = std::fs::remove_file(self.files.path().join(name));
        }
        Ok(())
    }

    fn remove_folder(&self, folder: &str) -> Result<()> {
        self.remove(&self.list_below(folder)?)
    }

    fn list(&self, folder: &str) -> Result<Vec<String>> {
        let mut names = self.list_below(folder)?;
        names.retain(|name| is_in(name, folder));
        Ok(names)
    }

    fn local(&self, name: &str) -> Result<PathBuf> {
        let path = local_path(self.files.path(), name)?;
        let mut known = self.known.lock();
        let here = fingerprint(&path);
        let tag = match (known.get(name), here) {
            // Written here and not yet put: it is ahead of the object.
            (of_object, Some(here)) if of_object.is_none_or(|of_object| of_object.file != here) => return Ok(path),
            (Some(_), Some(_)) if self.is_held() => return Ok(path),
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

/// Returns true for an object that is a file of the state.
fn is_of_the_state(name: &str) -> bool {
    let first = name.split('/').next().unwrap_or_default();
    first != SCRATCH && name != LOCK && !name.starts_with(CLOCK) && !name.ends_with(".new")
}

#[cfg(test)]
pub(super) mod tests;
