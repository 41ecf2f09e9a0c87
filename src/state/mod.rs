//! What a pipeline remembers between runs: the lock, `state.json`, the run in flight, reports, quarantine.
//! All but the quarantine can be rebuilt from the tables.

mod deleted;
mod journal;
mod lock;
mod quarantine;
mod server_messages;
mod watermark;

pub use journal::{Journal, JournalEntry};
pub use lock::Lock;
pub use quarantine::{Quarantine, QuarantinedLine};
pub use watermark::StateFile;

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use chrono::{DateTime, Utc};

use crate::error::{Context, Error, ErrorKind, Result};
use crate::jobs::ExportJobs;
use crate::jobs::checkpoint::CheckpointStore;
use crate::messages::{LineId, ReplayedLines, ResourceType};
use crate::mirror::{Mirror, push};
use foundation::secure_fs::{private_dir, write_atomically};

/// The folder of a pipeline's state.
#[derive(Debug, Clone)]
pub struct StateFolder {
    folder: PathBuf,
    state_file: PathBuf,
    /// Where it is in an object store, and the folder this process's copy.
    mirror: Option<Arc<Mirror>>,
}

impl StateFolder {
    /// State in `folder`, or with `state_file` for its `state.json`. Makes nothing.
    pub fn at(folder: &Path, state_file: Option<&Path>) -> Self {
        let state_file = state_file.map_or_else(|| folder.join("state.json"), Path::to_path_buf);
        Self { folder: folder.to_path_buf(), state_file, mirror: None }
    }

    /// State in an object store.
    pub fn mirrored(mirror: Arc<Mirror>) -> Self {
        Self { mirror: Some(mirror.clone()), ..Self::at(mirror.path(), None) }
    }

    /// Makes the folder where it is not there, for its user only.
    pub fn make(&self) -> Result<()> {
        private_dir(&self.folder).map_err(|error| Error::new(ErrorKind::State, error.to_string()))
    }

    /// Makes what changed durable, wherever the state is.
    fn keep(&self) -> Result<()> {
        push(self.mirror.as_ref())
    }

    /// Fails once a lock in an object store that this process took is not its own any more.
    pub fn guard(&self) -> Arc<dyn Fn() -> Result<()> + Send + Sync> {
        let mirror = self.mirror.clone();
        Arc::new(move || mirror.as_ref().map_or(Ok(()), |mirror| mirror.check()))
    }

    /// A file or folder of it, as everybody else finds it.
    pub fn place(&self, path: &Path) -> String {
        self.mirror.as_ref().map_or_else(|| path.display().to_string(), |mirror| mirror.place(path))
    }

    /// Where quarantined lines of a run are, for messages; those of earlier runs where it has none.
    pub fn quarantine_place(&self, run: &str) -> String {
        let of_run = self.quarantine_folder().join(format!("{run}.ndjson"));
        self.place(if of_run.exists() { &of_run } else { of_run.parent().unwrap_or(&of_run) })
    }

    /// Where a run's report is, for messages.
    pub fn report_place(&self, run: &str) -> String {
        self.place(&self.folder.join("runs").join(format!("{run}.json")))
    }

    /// The folder, for messages.
    pub fn path(&self) -> &Path {
        &self.folder
    }

    /// What `state.json` says.
    pub fn remembered(&self) -> Result<StateFile> {
        StateFile::read(&self.state_file)
    }

    /// Replaces what `state.json` says, durably.
    pub fn remember(&self, remembered: &StateFile) -> Result<()> {
        remembered.write(&self.state_file)?;
        self.keep()
    }

    /// The state file.
    pub fn state_file(&self) -> &Path {
        &self.state_file
    }

    /// Takes the lock, or says who holds it.
    pub fn lock(&self) -> Result<Lock> {
        self.make()?;
        match &self.mirror {
            Some(mirror) => Ok(Lock::remote(mirror.lock(&lock::owner())?)),
            None => Lock::take(&self.folder.join("lock")),
        }
    }

    /// Who holds the lock, if anybody does. Changes nothing.
    pub fn lock_holder(&self) -> Option<String> {
        match &self.mirror {
            Some(mirror) => mirror.lock_holder(),
            None => Lock::holder(&self.folder.join("lock")),
        }
    }

    /// Folder for what does not fit into memory. It holds patient data, and goes with the next run at the latest.
    pub fn scratch(&self) -> PathBuf {
        self.folder.join("scratch")
    }

    /// Removes what a killed process left there.
    pub fn clear_scratch(&self) -> Result<()> {
        match std::fs::remove_dir_all(self.scratch()) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(error).context(ErrorKind::State, format!("{} cannot be removed", self.scratch().display()))
            }
            _ => Ok(()),
        }
    }

    /// The journal of the run in flight.
    pub fn journal(&self) -> Journal {
        Journal::at(self.folder.join("journal.ndjson"), self.mirror.clone())
    }

    /// What runs have staged and no table has yet.
    pub fn staged(&self) -> CheckpointStore {
        CheckpointStore::at(self.folder.join("staged"), self.mirror.clone())
    }

    /// Exports in flight, and when the server may be asked again.
    pub fn exports(&self) -> Result<ExportJobs> {
        ExportJobs::read(&self.folder.join("exports.json"))
    }

    /// Changes what is remembered of exports, durably.
    pub fn change_exports(&self, change: impl FnOnce(&mut ExportJobs)) -> Result<()> {
        let mut exports = self.exports()?;
        let before = exports.clone();
        change(&mut exports);
        if exports == before {
            return Ok(());
        }
        private_dir(&self.folder)?;
        exports.write(&self.folder.join("exports.json"))?;
        self.keep()
    }

    /// Where the run's bad lines go.
    pub fn quarantine(&self, run: &str) -> Result<Quarantine> {
        let messages = numbered(&self.folder.join("server-messages"), run);
        Quarantine::of_run(self.quarantine_folder().join(format!("{run}.ndjson")), messages, self.mirror.clone())
    }

    /// Where the words are that the server said of its own export in a run, for messages; `None` where it said none.
    pub fn server_messages_place(&self, run: &str) -> Option<String> {
        let path = self.folder.join("server-messages").join(format!("{run}.ndjson"));
        path.exists().then(|| self.place(&path))
    }

    /// All lines in quarantine, with the run that each came in.
    pub fn quarantined(&self) -> impl Iterator<Item = Result<(String, QuarantinedLine)>> + Send + use<> {
        quarantine::lines(&self.quarantine_folder())
    }

    /// How many lines a run can retry, by the type that their file declared.
    pub fn to_be_tried(&self) -> Result<BTreeMap<Option<ResourceType>, u64>> {
        quarantine::to_be_tried(&self.quarantine_folder())
    }

    /// Takes the lines out whose resource was deleted since they came; how many.
    pub fn remove_superseded(&self) -> Result<u64> {
        let removed = deleted::remove_superseded(&self.quarantine_folder())?;
        self.keep().map(|()| removed)
    }

    /// Those lines.
    pub fn replayed_lines(&self) -> ReplayedLines {
        quarantine::kept(&self.quarantine_folder())
    }

    /// Takes lines out of quarantine; how many.
    pub fn remove_quarantined(&self, gone: &HashSet<LineId>) -> Result<u64> {
        let removed = quarantine::remove(&self.quarantine_folder(), gone)?;
        self.keep().map(|()| removed)
    }

    /// Takes the lines out that earlier runs than `run` kept of some types; how many.
    pub fn remove_quarantined_of(&self, run: &str, of_type: impl Fn(&str) -> bool) -> Result<u64> {
        let mut gone = HashSet::new();
        for line in self.quarantined() {
            let (since, line) = line?;
            if *since < *run && line.can_be_tried() && line.resource_type.as_deref().is_some_and(&of_type) {
                gone.insert(line.id());
            }
        }
        self.remove_quarantined(&gone)
    }

    /// The quarantined lines that some ids, or their beginnings, name.
    pub fn find_quarantined(&self, ids: &[String]) -> Result<HashSet<LineId>> {
        quarantine::find(&self.quarantine_folder(), ids)
    }

    /// Where the export log of a run goes; the newest hundred stay.
    pub fn export_log(&self, run: &str) -> PathBuf {
        numbered(&self.folder.join("export-logs"), run)
    }

    fn quarantine_folder(&self) -> PathBuf {
        self.folder.join("quarantine")
    }

    /// Persists a run's report; the newest hundred stay.
    pub fn save_report(&self, run: &str, report: &impl serde::Serialize) -> Result<()> {
        let report = serde_json::to_value(report).context(ErrorKind::Internal, "the report")?;
        let folder = self.folder.join("runs");
        private_dir(&folder)?;
        write_atomically(&folder.join(format!("{run}.json")), format!("{report:#}\n").as_bytes())?;
        let mut runs = reports(&folder);
        runs.sort();
        for old in runs.iter().rev().skip(100) {
            // A report that cannot be removed is only clutter.
            let _ = std::fs::remove_file(old);
        }
        self.keep()
    }

    /// Reports of the newest runs, the newest first. What cannot be read is left out.
    pub fn reports<R: serde::de::DeserializeOwned>(&self, most: usize) -> Vec<R> {
        let mut runs = reports(&self.folder.join("runs"));
        runs.sort();
        let newest = runs.iter().rev().take(most);
        newest.filter_map(|path| serde_json::from_slice(&std::fs::read(path).ok()?).ok()).collect()
    }

    /// Whether a run has left a report.
    pub fn has_report(&self, run: &str) -> bool {
        self.folder.join("runs").join(format!("{run}.json")).exists()
    }

    /// When each schedule last had its run.
    pub fn schedule_times(&self) -> Result<BTreeMap<String, DateTime<Utc>>> {
        let path = self.folder.join("schedule.json");
        match std::fs::read(&path) {
            // No reason never to run again.
            Ok(text) => Ok(serde_json::from_slice(&text).unwrap_or_else(|error| {
                tracing::warn!(%error, path = %path.display(), "the schedule's times are not readable; counting from now");
                BTreeMap::new()
            })),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(BTreeMap::new()),
            Err(error) => Err(error).context(ErrorKind::State, format!("{} cannot be read", path.display())),
        }
    }

    /// Remembers when each schedule last had its run.
    pub fn set_schedule_times(&self, times: &BTreeMap<String, DateTime<Utc>>) -> Result<()> {
        self.make()?;
        let text = serde_json::to_vec_pretty(times).context(ErrorKind::Internal, "the schedule's times")?;
        write_atomically(&self.folder.join("schedule.json"), &text)?;
        self.keep()
    }
}

/// A run's file of lines in a folder of which the newest hundred stay.
fn numbered(folder: &Path, run: &str) -> PathBuf {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    let mut files: Vec<PathBuf> = entries.filter(|path| path.extension().is_some_and(|ext| ext == "ndjson")).collect();
    files.sort();
    for old in files.iter().rev().skip(99) {
        // One that cannot be removed is only clutter.
        let _ = std::fs::remove_file(old);
    }
    folder.join(format!("{run}.ndjson"))
}

fn reports(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    entries.filter(|path| path.extension().is_some_and(|ext| ext == "json")).collect()
}
