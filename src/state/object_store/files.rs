//! Local files: fetched where they changed, and put as a whole.

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use futures::stream::TryStreamExt as _;
use object_store::path::Path as ObjectPath;
use object_store::{GetOptions, ObjectStore, ObjectStoreExt, WriteMultipart};

use crate::error::{Context, Error, ErrorKind, Result};
use foundation::secure_fs::{new_beside, private_dir};

/// Bytes of a part of an object.
pub(super) const PART: usize = 8 << 20;

/// Length, time and number of a file, which change when it does.
pub(super) type Fingerprint = (u64, Option<SystemTime>, u64);

/// Returns where the local file of an object is; a name that leads out of the folder is refused.
pub(super) fn local_path(folder: &Path, name: &str) -> Result<PathBuf> {
    let mut path = folder.to_path_buf();
    for part in name.split('/') {
        if part.is_empty() || part == "." || part == ".." || part.contains('\\') {
            return Err(Error::new(ErrorKind::State, format!("unexpected object {name} in the state folder")));
        }
        path.push(part);
    }
    Ok(path)
}

pub(super) fn fingerprint(path: &Path) -> Option<Fingerprint> {
    let meta = std::fs::metadata(path).ok()?;
    #[cfg(unix)]
    let number = std::os::unix::fs::MetadataExt::ino(&meta);
    #[cfg(not(unix))]
    let number = 0;
    Some((meta.len(), meta.modified().ok(), number))
}

/// Outcome of reading an object into a file.
pub(super) enum Fetched {
    Unchanged,
    Gone,
    New(Option<String>),
}

/// Reads an object into a file, unless it still has this tag.
pub(super) async fn fetch(
    store: &dyn ObjectStore,
    object: &ObjectPath,
    path: &Path,
    tag: Option<String>,
) -> Result<Fetched> {
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
pub(super) async fn put(store: &dyn ObjectStore, object: &ObjectPath, path: &Path) -> Result<Option<String>> {
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
