//! A state in a folder of this machine: files are replaced by write, fsync and rename.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;

use super::backend::{Backend, Protection, is_in};
use super::lease::{FileLock, Lease};
use super::{LOCK, SCRATCH, STATE_FILE};
use crate::error::{Context, Error, ErrorKind, Result};
use foundation::secure_fs::{private_dir, write_atomically};

/// Locked while a document is changed, in whichever folder: parts of a process open the same one more than once.
static CHANGES: Mutex<()> = Mutex::new(());

/// A folder.
#[derive(Debug)]
pub(super) struct LocalFolder {
    folder: PathBuf,
    /// `state.json`, which may lie elsewhere.
    state_file: PathBuf,
}

impl LocalFolder {
    pub(super) fn new(folder: &Path, state_file: Option<&Path>) -> Self {
        let state_file = state_file.map_or_else(|| folder.join(STATE_FILE), Path::to_path_buf);
        Self { folder: folder.to_path_buf(), state_file }
    }

    fn path(&self, name: &str) -> PathBuf {
        if name == STATE_FILE { self.state_file.clone() } else { self.folder.join(name) }
    }
}

impl Backend for LocalFolder {
    fn location(&self, name: &str) -> String {
        if name.is_empty() { self.folder.display().to_string() } else { self.path(name).display().to_string() }
    }

    fn create(&self) -> Result<()> {
        private_dir(&self.folder).map_err(|error| Error::new(ErrorKind::State, error.to_string()))
    }

    fn is_missing(&self) -> bool {
        self.state_file.parent().is_some_and(|folder| !folder.as_os_str().is_empty() && !folder.exists())
    }

    fn read(&self, name: &str) -> Result<Option<Vec<u8>>> {
        match std::fs::read(self.path(name)) {
            Ok(content) => Ok(Some(content)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).context(ErrorKind::State, format!("{} cannot be read", self.location(name))),
        }
    }

    fn replace(&self, name: &str, content: &[u8], _protection: Protection) -> Result<()> {
        let path = self.path(name);
        if let Some(folder) = path.parent() {
            private_dir(folder)?;
        }
        write_atomically(&path, content)
    }

    fn remove(&self, names: &[String]) -> Result<()> {
        for name in names {
            match std::fs::remove_file(self.path(name)) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(error).context(ErrorKind::State, format!("{} cannot be removed", self.location(name)));
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn remove_folder(&self, folder: &str) -> Result<()> {
        match std::fs::remove_dir_all(self.folder.join(folder)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(error).context(ErrorKind::State, format!("{} cannot be removed", self.location(folder)))
            }
            _ => Ok(()),
        }
    }

    fn list(&self, folder: &str) -> Result<Vec<String>> {
        let mut names = files_below(&self.folder.join(folder), folder);
        names.retain(|name| is_in(name, folder));
        names.sort();
        Ok(names)
    }

    fn local(&self, name: &str) -> Result<PathBuf> {
        Ok(self.path(name))
    }

    fn publish(&self, _name: &str) -> Result<()> {
        Ok(())
    }

    fn changes(&self) -> &Mutex<()> {
        &CHANGES
    }

    fn acquire(self: Arc<Self>, owner: &str) -> Result<Lease> {
        self.create()?;
        FileLock::take(&self.folder.join(LOCK), owner).map(Lease::new)
    }

    fn holder(&self) -> Option<String> {
        FileLock::holder(&self.folder.join(LOCK))
    }

    fn check(&self) -> Result<()> {
        // The operating system takes a file lock away with the process, and not before.
        Ok(())
    }

    fn scratch(&self) -> PathBuf {
        self.folder.join(SCRATCH)
    }

    fn folder(&self) -> Option<&Path> {
        Some(&self.folder)
    }
}

/// The files below a local folder, named by `prefix` and their paths in it. A folder that does not exist has none.
pub(super) fn files_below(folder: &Path, prefix: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut look = vec![(folder.to_path_buf(), prefix.trim_end_matches('/').to_owned())];
    while let Some((folder, prefix)) = look.pop() {
        for entry in std::fs::read_dir(&folder).into_iter().flatten().flatten() {
            let Ok(name) = entry.file_name().into_string() else { continue };
            let name = if prefix.is_empty() { name } else { format!("{prefix}/{name}") };
            match entry.file_type() {
                Ok(kind) if kind.is_dir() => look.push((entry.path(), name)),
                Ok(_) => found.push(name),
                Err(_) => {}
            }
        }
    }
    found
}
