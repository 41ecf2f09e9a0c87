//! Documents: read with their version, and put where they still have it.

use std::time::Duration;

use object_store::path::Path as ObjectPath;
use object_store::{ObjectStore, ObjectStoreExt, PutMode, PutOptions, UpdateVersion};

use super::super::object_lease::HeldLease;
use crate::error::{Context, ErrorKind, Result};

/// Pauses between two puts of a document where no answer came.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LAST_PAUSE: Duration = Duration::from_secs(10);

/// A document's content and version.
pub(super) type Versioned = (Option<Vec<u8>>, Option<UpdateVersion>);

/// Reads a document with its version; `(None, None)` where it does not exist.
pub(super) async fn get_document(store: &dyn ObjectStore, path: &ObjectPath) -> Result<Versioned> {
    match store.get(path).await {
        Ok(got) => {
            let version = UpdateVersion { e_tag: got.meta.e_tag.clone(), version: got.meta.version.clone() };
            Ok((Some(got.bytes().await.context(ErrorKind::State, "an object")?.to_vec()), Some(version)))
        }
        Err(object_store::Error::NotFound { .. }) => Ok((None, None)),
        Err(error) => Err(error).context(ErrorKind::State, "an object"),
    }
}

/// Outcome of a put under a lease.
pub(super) enum Put {
    Done(Option<UpdateVersion>),
    /// Another has replaced the document.
    Replaced,
    /// The lease ended first.
    LeaseEnded,
}

/// Returns true for an error that another try would have too.
fn is_permanent(error: &object_store::Error) -> bool {
    use object_store::Error;
    matches!(
        error,
        Error::PermissionDenied { .. }
            | Error::Unauthenticated { .. }
            | Error::NotImplemented { .. }
            | Error::NotSupported { .. }
            | Error::InvalidPath { .. }
    )
}

/// Puts a document where it still is what `before` says, as long as the lease is held. A store's client does not repeat
/// a put with a condition, since it cannot know whether the first one counted: reading it back tells.
pub(super) async fn put_document(
    store: &dyn ObjectStore,
    path: &ObjectPath,
    content: Vec<u8>,
    before: Versioned,
    (held, expiry): (&HeldLease, Duration),
) -> Result<Put> {
    let (mut pause, mut before) = (FIRST_PAUSE, before);
    // Nothing is sent after the lease has ended, and nothing that was sent before is waited for.
    while let Some(left) = held.remaining(expiry) {
        let mode = before.1.clone().map_or(PutMode::Create, PutMode::Update);
        let options = PutOptions { mode, ..PutOptions::default() };
        let put = tokio::time::timeout(left, store.put_opts(path, content.clone().into(), options)).await;
        let is_refused = match put {
            Ok(Ok(put)) => return Ok(Put::Done(Some(put.into()))),
            Ok(Err(object_store::Error::AlreadyExists { .. } | object_store::Error::Precondition { .. })) => true,
            Ok(Err(error)) if is_permanent(&error) => return Err(error).context(ErrorKind::State, "an object"),
            Ok(Err(_)) => false,
            Err(_) => break,
        };
        let Some(left) = held.remaining(expiry) else { break };
        match tokio::time::timeout(left, get_document(store, path)).await {
            Ok(Ok((Some(there), version))) if there == content => return Ok(Put::Done(version)),
            // Stores may give an object another version without another content.
            Ok(Ok((there, version))) if there == before.0 => before = (there, version),
            Ok(Ok(_)) => return Ok(Put::Replaced),
            Ok(Err(unread)) if is_refused => return Err(unread),
            Ok(Err(_)) => {}
            Err(_) => break,
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LAST_PAUSE);
    }
    Ok(Put::LeaseEnded)
}
