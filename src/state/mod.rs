//! What a pipeline remembers between runs: the lock, `state.json`, the run in flight, reports, quarantine.
//! All but the quarantine can be rebuilt from the tables.

mod journal;
mod lock;
mod quarantine;
mod watermark;

pub use journal::{Journal, JournalEntry};
pub use lock::Lock;
pub use quarantine::{Quarantine, QuarantinedLine};
pub use watermark::StateFile;

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use crate::error::{Context, ErrorKind, Result};

/// The folder of a pipeline's state.
#[derive(Debug, Clone)]
pub struct StateFolder {
    folder: PathBuf,
    state_file: PathBuf,
}

impl StateFolder {
    /// State in `folder`, or with `state_file` for its `state.json`.
    pub fn open(folder: &Path, state_file: Option<&Path>) -> Result<Self> {
        private_dir(folder)?;
        let state_file = state_file.map_or_else(|| folder.join("state.json"), Path::to_path_buf);
        Ok(Self { folder: folder.to_path_buf(), state_file })
    }

    /// The folder, for messages.
    pub fn path(&self) -> &Path {
        &self.folder
    }

    /// The state file.
    pub fn state_file(&self) -> &Path {
        &self.state_file
    }

    /// Takes the lock, or says who holds it.
    pub fn lock(&self) -> Result<Lock> {
        Lock::take(&self.folder.join("lock"))
    }

    /// The journal of the run in flight.
    pub fn journal(&self) -> Journal {
        Journal::at(self.folder.join("journal.ndjson"))
    }

    /// Where the run's bad lines go.
    pub fn quarantine(&self, run: &str) -> Quarantine {
        Quarantine::at(self.folder.join("quarantine").join(format!("{run}.ndjson")))
    }

    /// How many lines are in quarantine, all runs together.
    pub fn quarantined(&self) -> u64 {
        Quarantine::count(&self.folder.join("quarantine"))
    }

    /// Keeps a run's report; the newest hundred stay.
    pub fn save_report(&self, run: &str, report: &serde_json::Value) -> Result<()> {
        let folder = self.folder.join("runs");
        private_dir(&folder)?;
        write_atomically(&folder.join(format!("{run}.json")), format!("{report:#}\n").as_bytes())?;
        let mut runs = reports(&folder);
        runs.sort();
        for old in runs.iter().rev().skip(100) {
            // A report that cannot be removed is only clutter.
            let _ = std::fs::remove_file(old);
        }
        Ok(())
    }

    /// The newest run's report.
    pub fn last_report(&self) -> Option<serde_json::Value> {
        let newest = reports(&self.folder.join("runs")).into_iter().max()?;
        serde_json::from_slice(&std::fs::read(newest).ok()?).ok()
    }
}

fn reports(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    entries.filter(|path| path.extension().is_some_and(|ext| ext == "json")).collect()
}

/// A folder that only the user can read: it holds patient data.
pub(crate) fn private_dir(path: &Path) -> Result<()> {
    let mut builder = std::fs::DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.create(path).context(ErrorKind::State, format!("{} cannot be made", path.display()))
}

/// A file that only the user can read, for appending.
pub(crate) fn private_append(path: &Path) -> Result<File> {
    let mut options = std::fs::OpenOptions::new();
    options.create(true).append(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options.open(path).context(ErrorKind::State, format!("{} cannot be written", path.display()))
}

/// Replaces a file by its whole new content, or not at all, whenever the machine stops.
pub(crate) fn write_atomically(path: &Path, content: &[u8]) -> Result<()> {
    let failed = || format!("{} cannot be written", path.display());
    let mut beside = path.as_os_str().to_owned();
    beside.push(".new");
    let beside = PathBuf::from(beside);
    // What a killed run left would keep its own permissions.
    let _ = std::fs::remove_file(&beside);
    let mut file = private_append(&beside)?;
    file.write_all(content).context(ErrorKind::State, failed())?;
    file.sync_all().context(ErrorKind::State, failed())?;
    std::fs::rename(&beside, path).context(ErrorKind::State, failed())?;
    if let Some(folder) = path.parent().and_then(|folder| File::open(folder).ok()) {
        // The rename itself; a file system that cannot sync a folder has done what it can.
        let _ = folder.sync_all();
    }
    Ok(())
}
