//! A folder whose truth is in an object store: a private copy of it on this machine, what changes there, and the lock.
//!
//! Whoever works with the folder reads and writes the copy; [`Mirror::push`] makes what changed durable, before the next step
//! is taken. The copy goes with the process; one that a killed process leaves holds patient data and is private.

mod lock;

pub use lock::MirrorLock;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::future::Future;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, SystemTime};

use futures::{StreamExt, TryStreamExt};
use object_store::path::Path as ObjectPath;
use object_store::{ObjectStore, ObjectStoreExt, WriteMultipart};

use self::lock::Held;
use crate::error::{Context, Error, ErrorKind, Result};
use flow::locked;
use foundation::secure_fs::{new_beside, private_dir};

/// What of the folder is never in the store: what does not fit into memory, and goes with the run.
const SCRATCH: &str = "scratch";
/// The lock's object.
const LOCK: &str = "lock";
/// Objects that are there for a moment, for the store's time.
const CLOCK: &str = "clock-";
/// Files that name others: they go after what they name, and before it when it is removed.
const NAMES_OTHERS: &str = "index.json";
/// Objects that are read at the same time.
const AT_ONCE: usize = 16;
/// Bytes of a part of an object.
const PART: usize = 8 << 20;

/// The copies of this process, so that all its parts see the same.
static OPEN: Mutex<BTreeMap<String, Weak<Mirror>>> = Mutex::new(BTreeMap::new());

/// What a file of the copy was when it was last the object.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Known {
    tag: Option<String>,
    file: (u64, Option<SystemTime>, u64),
}

/// The folder.
pub struct Mirror {
    url: String,
    store: Arc<dyn ObjectStore>,
    copy: tempfile::TempDir,
    /// Its own, since those who write state do so where they cannot wait for a future.
    runtime: Option<tokio::runtime::Runtime>,
    known: Mutex<HashMap<String, Known>>,
    expiry: Duration,
    held: Mutex<Option<Arc<Held>>>,
    /// A lock was lost, and the copy is what it was then: nothing of it may be pushed before it is locked and pulled again.
    stale: AtomicBool,
}

impl std::fmt::Debug for Mirror {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "Mirror of {}", self.url)
    }
}

impl Drop for Mirror {
    fn drop(&mut self) {
        // It may be dropped where nothing may wait.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Mirror {
    /// The folder at `url`, whose store `open` gives: the copy that this process has of it, or a new one. A lock there is
    /// over `expiry` after its holder's last word.
    pub fn at(url: &str, expiry: Duration, open: impl FnOnce() -> Result<Arc<dyn ObjectStore>>) -> Result<Arc<Self>> {
        let mut opened = locked(&OPEN);
        if let Some(mirror) = opened.get(url).and_then(Weak::upgrade) {
            return Ok(mirror);
        }
        let mirror = Arc::new(Self::new(url, expiry, open()?)?);
        mirror.cancel()?;
        opened.retain(|_, mirror| mirror.strong_count() > 0);
        opened.insert(url.to_owned(), Arc::downgrade(&mirror));
        Ok(mirror)
    }

    fn new(url: &str, expiry: Duration, store: Arc<dyn ObjectStore>) -> Result<Self> {
        let failed = "the state cannot be cached on this machine";
        let copy = tempfile::Builder::new().prefix("fhirlake-").tempdir().context(ErrorKind::State, failed)?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("state")
            .enable_all()
            .build()
            .context(ErrorKind::State, failed)?;
        Ok(Self {
            url: url.trim_end_matches('/').to_owned(),
            store,
            copy,
            runtime: Some(runtime),
            known: Mutex::default(),
            expiry,
            held: Mutex::default(),
            stale: AtomicBool::new(false),
        })
    }

    /// The copy's folder.
    pub fn path(&self) -> &Path {
        self.copy.path()
    }

    /// Where a file or folder of the copy is for everybody else.
    pub fn place(&self, path: &Path) -> String {
        match path.strip_prefix(self.path()) {
            Ok(inside) if inside.as_os_str().is_empty() => self.url.clone(),
            Ok(inside) => format!("{}/{}", self.url, inside.display()),
            Err(_) => path.display().to_string(),
        }
    }

    fn failed(&self, what: &str, error: impl std::fmt::Display) -> Error {
        // Some stores' errors have the whole answer in them.
        let said: String = error.to_string().lines().next().unwrap_or_default().chars().take(300).collect();
        let said = said.split('?').next().unwrap_or_default().to_owned();
        Error::new(ErrorKind::State, format!("{} cannot be {what}: {said}", self.url))
    }

    /// Runs `work` where futures run, and waits for it.
    fn wait<T: Send + 'static>(&self, work: impl Future<Output = Result<T>> + Send + 'static) -> Result<T> {
        let gone = || Error::new(ErrorKind::Internal, "the state's worker thread ended");
        let (answer, answered) = std::sync::mpsc::sync_channel(1);
        let runtime = self.runtime.as_ref().ok_or_else(gone)?;
        runtime.spawn(async move {
            // Nobody waits any more when the process ends.
            let _ = answer.send(work.await);
        });
        answered.recv().map_err(|_| gone())?
    }

    /// Brings the copy up to what the store has.
    pub fn cancel(&self) -> Result<()> {
        let mut known = locked(&self.known);
        let (store, folder) = (self.store.clone(), self.path().to_path_buf());
        let before = known.clone();
        let now = self.wait(async move {
            let objects: Vec<_> = store.list(None).try_collect().await.context(ErrorKind::State, "the list")?;
            let objects = objects.into_iter().filter(|object| is_of_the_folder(object.location.as_ref()));
            let work = objects.map(|object| {
                let (store, folder, before) = (store.clone(), folder.clone(), before.get(object.location.as_ref()).cloned());
                async move {
                    let name = object.location.to_string();
                    let path = place_in(&folder, &name)?;
                    if let Some(before) = before
                        && before.tag.is_some()
                        && before.tag == object.e_tag
                        && fingerprint(&path).is_some_and(|file| file == before.file)
                    {
                        return Ok(Some((name, before)));
                    }
                    fetch(&*store, &object.location, &path).await.map(|known| known.map(|known| (name, known)))
                }
            });
            let found: Vec<Option<(String, Known)>> = futures::stream::iter(work).buffer_unordered(AT_ONCE).try_collect().await?;
            Ok(found.into_iter().flatten().collect::<HashMap<_, _>>())
        });
        let now = now.map_err(|error| self.failed("read", error))?;
        for name in files_of(self.path()) {
            if !now.contains_key(&name) {
                // Gone from the store.
                let _ = std::fs::remove_file(self.path().join(name));
            }
        }
        *known = now;
        Ok(())
    }

    /// Puts what changed in the copy into the store; durable when it returns. Fails where a lock that was ours is not any more.
    pub fn push(&self) -> Result<()> {
        self.check()?;
        let mut known = locked(&self.known);
        let here = files_of(self.path());
        let changed = |name: &String| {
            fingerprint(&self.path().join(name)).filter(|file| known.get(name).is_none_or(|known| known.file != *file))
        };
        let mut puts: Vec<_> = here.iter().filter_map(|name| Some((name.clone(), changed(name)?))).collect();
        puts.sort_by_key(|(name, _)| name.ends_with(NAMES_OTHERS));
        let mut gone: Vec<String> = known.keys().filter(|name| !here.contains(*name)).cloned().collect();
        gone.sort_by_key(|name| !name.ends_with(NAMES_OTHERS));
        for (name, file) in puts {
            let (store, path, object) = (self.store.clone(), self.path().join(&name), ObjectPath::from(name.as_str()));
            let tag = self.wait(async move { put(&*store, &object, &path).await });
            let tag = tag.map_err(|error| self.failed("written", error))?;
            known.insert(name, Known { tag, file });
        }
        for name in gone {
            let (store, object) = (self.store.clone(), ObjectPath::from(name.as_str()));
            let removed = self.wait(async move {
                match store.delete(&object).await {
                    Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
                    Err(error) => Err(error).context(ErrorKind::State, "an object"),
                }
            });
            removed.map_err(|error| self.failed("written", error))?;
            known.remove(&name);
        }
        Ok(())
    }

    /// Fails where this process took the lock and does not hold it any more.
    pub fn check(&self) -> Result<()> {
        let lost = |held: &Arc<Held>| !held.is_ours(self.expiry);
        match self.stale.load(Ordering::Acquire) || locked(&self.held).as_ref().is_some_and(lost) {
            true => Err(Error::new(
                ErrorKind::Locked,
                format!("{} is not locked by this run any more: its lock could not be renewed in time", self.url),
            )),
            false => Ok(()),
        }
    }
}

/// Makes what changed durable where there is a mirror; without one the folder itself is.
pub fn push(mirror: Option<&Arc<Mirror>>) -> Result<()> {
    mirror.map_or(Ok(()), |mirror| mirror.push())
}

/// Whether an object is one that the copy has.
fn is_of_the_folder(name: &str) -> bool {
    let first = name.split('/').next().unwrap_or_default();
    first != SCRATCH && name != LOCK && !name.starts_with(CLOCK) && !name.ends_with(".new")
}

/// Where an object of this name is in the copy; a name that leads out of it is refused.
fn place_in(folder: &Path, name: &str) -> Result<PathBuf> {
    let mut path = folder.to_path_buf();
    for part in name.split('/') {
        if part.is_empty() || part == "." || part == ".." || part.contains('\\') {
            return Err(Error::new(ErrorKind::State, "unexpected object name in the state folder"));
        }
        path.push(part);
    }
    Ok(path)
}

/// Length, time and number of a file, which change when it does.
fn fingerprint(path: &Path) -> Option<(u64, Option<SystemTime>, u64)> {
    let meta = std::fs::metadata(path).ok()?;
    #[cfg(unix)]
    let number = std::os::unix::fs::MetadataExt::ino(&meta);
    #[cfg(not(unix))]
    let number = 0;
    Some((meta.len(), meta.modified().ok(), number))
}

/// The files of a folder by their paths in it, `/` between parts.
fn files_of(folder: &Path) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let mut look = vec![(folder.to_path_buf(), String::new())];
    while let Some((folder, prefix)) = look.pop() {
        for entry in std::fs::read_dir(&folder).into_iter().flatten().flatten() {
            let Ok(name) = entry.file_name().into_string() else { continue };
            let name = format!("{prefix}{name}");
            if !is_of_the_folder(&name) {
                continue;
            }
            match entry.file_type() {
                Ok(kind) if kind.is_dir() => look.push((entry.path(), format!("{name}/"))),
                Ok(_) => drop(found.insert(name)),
                Err(_) => {}
            }
        }
    }
    found
}

/// Reads an object into a file; nothing where it is gone meanwhile.
async fn fetch(store: &dyn ObjectStore, object: &ObjectPath, path: &Path) -> Result<Option<Known>> {
    let unread = "an object";
    let got = match store.get(object).await {
        Ok(got) => got,
        Err(object_store::Error::NotFound { .. }) => return Ok(None),
        Err(error) => return Err(error).context(ErrorKind::State, unread),
    };
    let tag = got.meta.e_tag.clone();
    if let Some(folder) = path.parent() {
        private_dir(folder)?;
    }
    let (beside, mut file) = new_beside(path)?;
    let mut bytes = got.into_stream();
    while let Some(part) = bytes.try_next().await.context(ErrorKind::State, unread)? {
        file.write_all(&part).context(ErrorKind::State, "the copy")?;
    }
    std::fs::rename(&beside, path).context(ErrorKind::State, "the copy")?;
    Ok(fingerprint(path).map(|file| Known { tag, file }))
}

/// Writes a file into an object; its tag.
async fn put(store: &dyn ObjectStore, object: &ObjectPath, path: &Path) -> Result<Option<String>> {
    let failed = "an object";
    let mut file = std::fs::File::open(path).context(ErrorKind::State, "the copy")?;
    let mut part = Vec::new();
    let mut next = |part: &mut Vec<u8>| {
        part.clear();
        (&mut file).take(PART as u64).read_to_end(part).context(ErrorKind::State, "the copy")
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
mod tests {
    use super::*;

    pub(super) fn mirror(store: &Arc<dyn ObjectStore>, expiry: u64) -> Arc<Mirror> {
        let mirror = Arc::new(Mirror::new("s3://lake/state", Duration::from_millis(expiry), store.clone()).unwrap());
        mirror.cancel().unwrap();
        mirror
    }

    // Breaks if a change, a removal or a big file is not in the store when the push is done, or scratch is.
    #[test]
    fn what_one_writes_another_reads() {
        let store: Arc<dyn ObjectStore> = Arc::new(object_store::memory::InMemory::new());
        let (one, other) = (mirror(&store, 60_000), mirror(&store, 60_000));
        std::fs::create_dir_all(one.path().join("staged")).unwrap();
        std::fs::create_dir_all(one.path().join("scratch")).unwrap();
        let big: Vec<u8> = (0..PART * 2 + 77).map(|at| (at % 251) as u8).collect();
        for (name, bytes) in [("staged/a.keys", &big[..]), ("staged/index.json", b"{}"), ("scratch/x", b"x"), ("j", b"1")] {
            std::fs::write(one.path().join(name), bytes).unwrap();
        }
        one.push().unwrap();
        other.cancel().unwrap();
        assert_eq!(std::fs::read(other.path().join("staged/a.keys")).unwrap(), big);
        assert!(!other.path().join("scratch").exists());
        std::fs::write(one.path().join("j"), b"12").unwrap();
        std::fs::remove_file(one.path().join("staged/a.keys")).unwrap();
        one.push().unwrap();
        other.cancel().unwrap();
        assert_eq!(std::fs::read(other.path().join("j")).unwrap(), b"12");
        assert_eq!(files_of(other.path()), BTreeSet::from(["j".to_owned(), "staged/index.json".to_owned()]));
        assert_eq!(one.place(&one.path().join("runs/r.json")), "s3://lake/state/runs/r.json");
    }
}
