//! Place of a state: the part that a folder and an object store share.

use std::fmt::Debug;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;

use super::lease::Lease;
use crate::error::{Context, ErrorKind, Result};
use foundation::secure_fs::{private_append, write_atomically};

/// Protection of a document against other processes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Protection {
    /// It is written by the holder of the lease, and by nobody who has lost it.
    ByLease,
    /// It may be written by anybody, at any time.
    None,
}

/// Returns true if `name` is directly in `folder`.
pub(super) fn is_in(name: &str, folder: &str) -> bool {
    let rest =
        if folder.is_empty() { Some(name) } else { name.strip_prefix(folder).and_then(|rest| rest.strip_prefix('/')) };
    rest.is_some_and(|rest| !rest.contains('/'))
}

/// A place for the files of a state. Names are relative, with `/` between their parts.
///
/// Documents are small: they are read and replaced as a whole. Lines and keys may be large: they are in a local file,
/// which [`Backend::publish`] makes durable.
pub(super) trait Backend: Debug + Send + Sync {
    /// Returns where `name` is, for messages and for other machines; the state itself where `name` is empty.
    fn location(&self, name: &str) -> String;

    /// Creates the place where it is missing, readable by the owner only.
    fn create(&self) -> Result<()>;

    /// Returns true if the place of `state.json` does not exist: a disk is not mounted, or somebody took it away.
    fn is_missing(&self) -> bool {
        false
    }

    /// Returns the content of a document, `None` where it does not exist.
    fn read(&self, name: &str) -> Result<Option<Vec<u8>>>;

    /// Replaces a document by its whole new content or not at all; durable when it returns. Fails with
    /// [`ErrorKind::Locked`] where the lease was lost, unless it is not protected by it.
    fn replace(&self, name: &str, content: &[u8], protection: Protection) -> Result<()>;

    /// Removes files; those that do not exist are passed over.
    fn remove(&self, names: &[String]) -> Result<()>;

    /// Removes a folder with all that is below it; one that does not exist is passed over.
    fn remove_folder(&self, folder: &str) -> Result<()>;

    /// Returns the names of the files directly in `folder`, in their order.
    fn list(&self, folder: &str) -> Result<Vec<String>>;

    /// Returns a local file with the content of `name`, up to date; it does not exist where `name` does not.
    fn local(&self, name: &str) -> Result<PathBuf>;

    /// Makes the local file of `name` durable; its content is synced already.
    fn publish(&self, name: &str) -> Result<()>;

    /// Replaces the local file of `name` as a whole, durably.
    fn rewrite(&self, name: &str, content: &[u8]) -> Result<()> {
        write_atomically(&self.local(name)?, content)?;
        self.publish(name)
    }

    /// Returns what is locked while a document is read, changed and written.
    fn changes(&self) -> &Mutex<()>;

    /// Takes the lease, or says who holds it.
    fn acquire(self: Arc<Self>, owner: &str) -> Result<Lease>;

    /// Returns who holds the lease, if anybody does. Changes nothing.
    fn holder(&self) -> Option<String>;

    /// Fails once this process took the lease and lost it.
    fn check(&self) -> Result<()>;

    /// Returns a local folder for what the process needs no longer than it lives. It need not exist.
    fn scratch(&self) -> PathBuf;

    /// Returns the folder of the state where it is one.
    fn folder(&self) -> Option<&Path>;
}

/// A file that grows by whole lines.
#[derive(Debug)]
pub(super) struct LogFile {
    name: String,
    file: File,
    backend: Arc<dyn Backend>,
}

impl LogFile {
    /// Opens `name` for appending, and creates it where it does not exist.
    pub(super) fn open(backend: &Arc<dyn Backend>, name: &str) -> Result<Self> {
        let path = backend.local(name)?;
        if let Some(folder) = path.parent() {
            foundation::secure_fs::private_dir(folder)?;
        }
        Ok(Self { name: name.to_owned(), file: private_append(&path)?, backend: backend.clone() })
    }

    /// Appends `lines`, each with its line feed. Durable after [`LogFile::sync`].
    pub(super) fn append(&mut self, lines: &[u8]) -> Result<()> {
        self.file
            .write_all(lines)
            .context(ErrorKind::State, format!("{} cannot be written", self.backend.location(&self.name)))
    }

    /// Makes what was appended durable.
    pub(super) fn sync(&self) -> Result<()> {
        let synced = self.file.sync_all();
        synced.context(ErrorKind::State, format!("{} cannot be synced", self.backend.location(&self.name)))?;
        self.backend.publish(&self.name)
    }
}
