//! The lease of a state in an object store: an object that is taken, renewed and released by conditional puts, and
//! judged by the store's own clock.

use parking_lot::Mutex;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime};

use object_store::path::Path as ObjectPath;
use object_store::{ObjectStore, ObjectStoreExt, PutMode, PutOptions, UpdateVersion};
use serde::{Deserialize, Serialize};

use super::LOCK;
use super::object_store::{CLOCK, ObjectFolder};
use crate::error::{Context, Error, ErrorKind, Result};

/// Content of the lease's object.
#[derive(Serialize, Deserialize)]
struct LeaseText {
    owner: String,
    /// Its holder's own, since two processes may have the same words for themselves.
    token: String,
    /// Released by its holder.
    #[serde(default)]
    free: bool,
    /// Another with every put: some stores' entity tags are the content's hash.
    turn: String,
}

/// A lease that this process took.
#[derive(Debug)]
pub(super) struct HeldLease {
    version: tokio::sync::Mutex<UpdateVersion>,
    /// By both clocks: one stands still while a machine sleeps, the other may be set.
    renewed: Mutex<(Instant, SystemTime)>,
    lost: AtomicBool,
    over: AtomicBool,
    owner: String,
    token: String,
}

impl HeldLease {
    /// Notes that another holds it.
    pub(super) fn lose(&self) {
        self.lost.store(true, Ordering::Release);
    }

    /// A holder that could not renew it in time must think it another's, whatever the store says.
    pub(super) fn is_ours(&self, expiry: Duration) -> bool {
        self.remaining(expiry).is_some()
    }

    /// Returns the time that the lease is held for without a renewal; `None` where it is not held.
    pub(super) fn remaining(&self, expiry: Duration) -> Option<Duration> {
        let (steady, wall) = *self.renewed.lock();
        let elapsed = steady.elapsed().max(wall.elapsed().unwrap_or_default());
        let left = expiry.mul_f64(0.75).checked_sub(elapsed).filter(|left| !left.is_zero());
        left.filter(|_| !self.lost.load(Ordering::Acquire))
    }
}

/// The lease of an [`ObjectFolder`]; released when dropped.
#[derive(Debug)]
pub(super) struct ObjectLease {
    folder: Arc<ObjectFolder>,
    held: Arc<HeldLease>,
}

fn text_of(owner: &str, token: &str, free: bool) -> Vec<u8> {
    let (owner, token, turn) = (owner.to_owned(), token.to_owned(), uuid::Uuid::new_v4().to_string());
    serde_json::to_vec(&LeaseText { owner, token, free, turn }).unwrap_or_default()
}

/// Returns what the lease's object says, its version, and how long ago by the store's own clock it was written. The age
/// of one that was released is not asked for.
async fn look(store: &dyn ObjectStore) -> Result<Option<(LeaseText, UpdateVersion, Duration)>> {
    let failed = "the lease";
    let got = match store.get(&ObjectPath::from(LOCK)).await {
        Ok(got) => got,
        Err(object_store::Error::NotFound { .. }) => return Ok(None),
        Err(error) => return Err(error).context(ErrorKind::State, failed),
    };
    let meta = got.meta.clone();
    let text = got.bytes().await.context(ErrorKind::State, failed)?;
    let text = serde_json::from_slice(&text).unwrap_or_else(|_| LeaseText {
        owner: "somebody".into(),
        token: String::new(),
        free: false,
        turn: String::new(),
    });
    let version = UpdateVersion { e_tag: meta.e_tag, version: meta.version };
    if text.free {
        return Ok(Some((text, version, Duration::ZERO)));
    }
    // Clocks of machines differ; a new object has the store's.
    let clock = ObjectPath::from(format!("{CLOCK}{}", uuid::Uuid::new_v4()));
    store.put(&clock, "now".into()).await.context(ErrorKind::State, failed)?;
    let now = store.head(&clock).await.context(ErrorKind::State, failed);
    // One that stays is only clutter.
    let _ = store.delete(&clock).await;
    let age = (now?.last_modified - meta.last_modified).to_std().unwrap_or_default();
    Ok(Some((text, version, age)))
}

impl ObjectFolder {
    /// Returns who holds the lease, if anybody does.
    pub(super) fn lock_holder(&self) -> Option<String> {
        let (store, expiry) = (self.store.clone(), self.expiry);
        let there = self.wait(async move { look(&*store).await }).ok()??;
        (!there.0.free && there.2 <= expiry + Duration::from_secs(1)).then_some(there.0.owner)
    }

    /// Takes the lease, or says who holds it, and forgets what this process knew of the state. Every step is a
    /// conditional put: of two that try, one has it.
    pub(super) fn lock(self: &Arc<Self>, owner: &str) -> Result<ObjectLease> {
        let (store, owner, url, expiry) = (self.store.clone(), owner.to_owned(), &self.url, self.expiry);
        let began = Instant::now();
        let token = uuid::Uuid::new_v4().to_string();
        let text = text_of(&owner, &token, false);
        let taken = self.wait(async move {
            let mode = match look(&*store).await? {
                None => PutMode::Create,
                // A second more, since some stores' times have no parts of one.
                Some((there, version, age)) if there.free || age > expiry + Duration::from_secs(1) => {
                    if !there.free {
                        tracing::warn!(owner = there.owner, "the lease expired; taking it over");
                    }
                    PutMode::Update(version)
                }
                Some((there, ..)) => return Ok(Err(there.owner)),
            };
            let options = PutOptions { mode, ..PutOptions::default() };
            match store.put_opts(&ObjectPath::from(LOCK), text.into(), options).await {
                Ok(put) => Ok(Ok(UpdateVersion::from(put))),
                Err(object_store::Error::AlreadyExists { .. } | object_store::Error::Precondition { .. }) => {
                    Ok(Err("one that came at the same time".to_owned()))
                }
                Err(error) => Err(error).context(ErrorKind::State, "the lease"),
            }
        });
        let version = taken.map_err(|error| self.failed("the lease cannot be taken", error))?.map_err(|holder| {
            let free = format!("an abandoned lease expires after {} s", expiry.as_secs());
            Error::new(ErrorKind::Locked, format!("another run holds this pipeline ({holder}): {url}/{LOCK}; {free}"))
        })?;
        let held = Arc::new(HeldLease {
            version: tokio::sync::Mutex::new(version),
            renewed: Mutex::new((began, SystemTime::now())),
            lost: AtomicBool::new(false),
            over: AtomicBool::new(false),
            owner,
            token,
        });
        *self.held.lock() = Some(held.clone());
        let (store, renewing) = (self.store.clone(), held.clone());
        if let Some(runtime) = &self.runtime {
            runtime.spawn(async move { renew(&*store, &renewing, expiry).await });
        }
        // From here on dropping it releases it.
        let lease = ObjectLease { folder: self.clone(), held };
        self.forget()?;
        self.stale.store(false, Ordering::Release);
        Ok(lease)
    }
}

/// Renewals of a lease within its expiry (`lock_expiry` says so to users).
const RENEWALS: u32 = 5;

/// Renews a lease until it is released or lost.
async fn renew(store: &dyn ObjectStore, held: &HeldLease, expiry: Duration) {
    loop {
        tokio::time::sleep(expiry / RENEWALS).await;
        if held.over.load(Ordering::Acquire) {
            return;
        }
        let began = Instant::now();
        let mut version = held.version.lock().await;
        let options = PutOptions { mode: PutMode::Update(version.clone()), ..PutOptions::default() };
        match store.put_opts(&ObjectPath::from(LOCK), text_of(&held.owner, &held.token, false).into(), options).await {
            Ok(put) => {
                *version = put.into();
                *held.renewed.lock() = (began, SystemTime::now());
            }
            Err(object_store::Error::Precondition { .. } | object_store::Error::NotFound { .. }) => {
                // An answer that was lost, and the put retried: then it is still ours.
                match look(store).await {
                    Ok(Some((text, newest, _))) if text.token == held.token && !text.free => *version = newest,
                    Ok(_) => {
                        tracing::error!("another process took the lease of the state; nothing more is committed");
                        held.lost.store(true, Ordering::Release);
                        return;
                    }
                    Err(error) => tracing::warn!(%error, "the lease could not be read"),
                }
            }
            Err(error) => tracing::warn!(%error, "the lease could not be renewed; trying again"),
        }
    }
}

impl Drop for ObjectLease {
    fn drop(&mut self) {
        self.held.over.store(true, Ordering::Release);
        if !self.held.is_ours(self.folder.expiry) {
            self.folder.stale.store(true, Ordering::Release);
        }
        *self.folder.held.lock() = None;
        let (store, held) = (self.folder.store.clone(), self.held.clone());
        // Conditional too: another's lease is not ours to release.
        let given = self.folder.wait(async move {
            let version = held.version.lock().await.clone();
            let options = PutOptions { mode: PutMode::Update(version), ..PutOptions::default() };
            let put =
                store.put_opts(&ObjectPath::from(LOCK), text_of(&held.owner, &held.token, true).into(), options).await;
            put.map(drop).context(ErrorKind::State, "the lease")
        });
        if let Err(error) = given {
            tracing::warn!(%error, "the lease could not be released; it expires by itself");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::backend::{Backend, Protection};
    use super::super::object_store::tests::folder;
    use super::*;

    // Breaks if two hold the lease, or one that lost it goes on.
    #[test]
    fn one_holder_and_one_that_lost_it_knows() {
        let store: Arc<dyn ObjectStore> = Arc::new(object_store::memory::InMemory::new());
        let (one, other) = (folder(&store, 2_000), folder(&store, 2_000));
        let lock = one.lock("one").unwrap();
        let refused = other.lock("other").unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Locked);
        assert!(refused.to_string().contains("(one)"), "{refused}");
        assert_eq!(other.lock_holder().as_deref(), Some("one"));
        // Renewed for longer than it would live alone.
        std::thread::sleep(Duration::from_millis(3_500));
        other.lock("other").unwrap_err();
        one.check().unwrap();
        drop(lock);
        assert_eq!(other.lock_holder(), None);
        let taken = other.lock("other").unwrap();
        // Its process is stopped for longer than the lock lives, and a third takes it over.
        taken.held.over.store(true, Ordering::Release);
        std::thread::sleep(Duration::from_millis(3_300));
        let third = one.lock("third").unwrap();
        assert_eq!(other.check().unwrap_err().kind(), ErrorKind::Locked);
        assert_eq!(other.replace("state.json", b"old", Protection::ByLease).unwrap_err().kind(), ErrorKind::Locked);
        drop(taken);
        let local = other.local("journal.ndjson").unwrap();
        std::fs::write(local, b"old").unwrap();
        assert_eq!(
            other.publish("journal.ndjson").unwrap_err().kind(),
            ErrorKind::Locked,
            "what it has is another's now"
        );
        assert_eq!(other.lock_holder().as_deref(), Some("third"));
        drop(third);
    }
}
