//! The state of a pipeline between runs: typed, versioned documents, the lease, the journal, reports and quarantine.
//!
//! [`StateStore`] is the same for a folder of this machine (write, fsync, rename) and for an object store (conditional
//! puts). All but the quarantine and the export jobs can be rebuilt from the tables.
//!
//! ```text
//! state.json                 last_sync_time, as the Python sync script has it; watermarks     StateFile
//! exports.json               export jobs in flight, rate limits, rejected types               jobs::ExportJobs
//! staged/index.json, *.keys  what is staged and not yet merged                                jobs::checkpoint
//! schedule.json              when each schedule last had its run                              ScheduleTimes
//! journal.ndjson             the run in flight                                                Journal
//! runs/RUN.json              reports                     export-logs/, server-messages/, quarantine/RUN.ndjson
//! lock                       the lease
//! ```

mod backend;
mod deleted;
mod document;
mod journal;
mod lease;
mod local;
mod object_lease;
mod object_store;
mod quarantine;
mod server_messages;
mod state_file;

pub use document::{Document, OnDamage};
pub use journal::{Journal, JournalEntry};
pub use lease::Lease;
pub use quarantine::{Quarantine, QuarantinedLine};
pub use state_file::StateFile;

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, Utc};
use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};

use self::backend::{Backend, LogFile, Protection};
use self::local::LocalFolder;
use self::object_store::ObjectFolder;
use crate::error::{Context, ErrorKind, Result};
use crate::messages::{LineId, ReplayedLines, ResourceType};

/// The file of [`StateFile`].
const STATE_FILE: &str = "state.json";
/// The file of the lease.
const LOCK: &str = "lock";
/// The folder for what does not fit into memory, which goes with the run.
const SCRATCH: &str = "scratch";
/// The folder of reports.
const REPORTS: &str = "runs";
/// Folders of which the files of the newest runs stay.
const BY_RUN: [&str; 3] = [REPORTS, "export-logs", "server-messages"];
/// Number of runs.
const RUNS_KEPT: usize = 100;

/// The state of a pipeline.
#[derive(Debug, Clone)]
pub struct StateStore {
    backend: Arc<dyn Backend>,
}

/// Time at which each schedule last had its run.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ScheduleTimes {
    /// Times, by the schedule's text.
    #[serde(flatten)]
    pub times: BTreeMap<String, DateTime<Utc>>,
    /// Written by [`Document`].
    #[serde(default, skip_serializing, rename = "version")]
    _version: IgnoredAny,
}

impl FromIterator<(String, DateTime<Utc>)> for ScheduleTimes {
    fn from_iter<T: IntoIterator<Item = (String, DateTime<Utc>)>>(times: T) -> Self {
        Self { times: times.into_iter().collect(), _version: IgnoredAny }
    }
}

impl Document for ScheduleTimes {
    const NAME: &'static str = "schedule.json";
    const IS_LEASED: bool = false;
    // No reason never to run again.
    const ON_DAMAGE: OnDamage = OnDamage::Rebuild("the schedule's times are not readable; counting from now");
}

impl StateStore {
    /// Returns the state in `folder`, or with `state_file` for its `state.json`. Creates nothing.
    pub fn local(folder: &Path, state_file: Option<&Path>) -> Self {
        Self { backend: Arc::new(LocalFolder::new(folder, state_file)) }
    }

    /// Returns the state at `url` of an object store that `open` connects to. A lease there expires after `expiry`.
    pub fn object(
        url: &str,
        expiry: Duration,
        open: impl FnOnce() -> Result<Arc<dyn ::object_store::ObjectStore>>,
    ) -> Result<Self> {
        Ok(Self { backend: ObjectFolder::open(url, expiry, open)? })
    }

    /// Creates its folder where it is missing, readable by the owner only.
    pub fn create(&self) -> Result<()> {
        self.backend.create()
    }

    /// Returns its folder, where it is one of this machine.
    pub fn folder(&self) -> Option<&Path> {
        self.backend.folder()
    }

    /// Returns true if the folder of its `state.json` does not exist.
    pub fn is_missing(&self) -> bool {
        self.backend.is_missing()
    }

    /// Returns where it is, for messages.
    pub fn location(&self) -> String {
        self.backend.location("")
    }

    /// Reads a document; an empty one where it does not exist.
    pub fn read<D: Document + Default>(&self) -> Result<D> {
        self.read_if_exists().map(Option::unwrap_or_default)
    }

    /// Reads a document; `None` where it does not exist.
    pub fn read_if_exists<D: Document>(&self) -> Result<Option<D>> {
        match self.backend.read(D::NAME)? {
            Some(text) => document::decode(&text, &self.backend.location(D::NAME)),
            None => Ok(None),
        }
    }

    /// Replaces a document; durable when it returns.
    pub fn write<D: Document>(&self, document: &D) -> Result<()> {
        let protection = if D::IS_LEASED { Protection::ByLease } else { Protection::None };
        self.backend.replace(D::NAME, &document::encode(document)?, protection)
    }

    /// Changes a document; durable when it returns. What is not changed is not written.
    pub fn change<D: Document + Default + Clone + PartialEq>(&self, change: impl FnOnce(&mut D)) -> Result<()> {
        let _changes = self.backend.changes().lock();
        let before: D = self.read()?;
        let mut after = before.clone();
        change(&mut after);
        if after == before { Ok(()) } else { self.write(&after) }
    }

    /// Removes a document.
    pub fn remove<D: Document>(&self) -> Result<()> {
        self.backend.remove(&[D::NAME.to_owned()])
    }

    /// Returns the names of files below a folder of the state.
    pub(crate) fn list(&self, folder: &str) -> Result<Vec<String>> {
        self.backend.list(folder)
    }

    /// Removes files by their names.
    pub(crate) fn remove_files(&self, names: &[String]) -> Result<()> {
        self.backend.remove(names)
    }

    /// Removes a folder of the state with all that is below it.
    pub(crate) fn remove_folder(&self, folder: &str) -> Result<()> {
        self.backend.remove_folder(folder)
    }

    /// Returns a local file with the content of `name`; a new one is durable once it is synced and published.
    pub(crate) fn local_file(&self, name: &str) -> Result<PathBuf> {
        self.backend.local(name)
    }

    /// Makes a local file durable, wherever the state is.
    pub(crate) fn publish(&self, name: &str) -> Result<()> {
        self.backend.publish(name)
    }

    /// Takes the lease, or says who holds it.
    pub fn acquire_lease(&self) -> Result<Lease> {
        self.backend.clone().acquire(&lease::owner())
    }

    /// Returns who holds the lease, if anybody does. Changes nothing.
    pub fn lease_holder(&self) -> Option<String> {
        self.backend.holder()
    }

    /// Returns a check that fails once this process took the lease and lost it.
    pub fn guard(&self) -> Arc<dyn Fn() -> Result<()> + Send + Sync> {
        let backend = self.backend.clone();
        Arc::new(move || backend.check())
    }

    /// Returns a local folder for what does not fit into memory. It holds patient data, and goes with the next run at
    /// the latest.
    pub fn scratch(&self) -> PathBuf {
        self.backend.scratch()
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

    /// Returns the journal of the run in flight.
    pub fn journal(&self) -> Journal {
        Journal::of(self.backend.clone())
    }

    /// Creates the quarantine of a run, where its bad lines go.
    pub fn quarantine(&self, run: &str) -> Result<Quarantine> {
        Quarantine::of_run(&self.backend, run)
    }

    /// Returns where quarantined lines of a run are, for messages; those of earlier runs where it has none.
    pub fn quarantine_location(&self, run: &str) -> String {
        let of_run = quarantine::file_of(run);
        let exists = self.backend.local(&of_run).is_ok_and(|file| file.exists());
        self.backend.location(if exists { &of_run } else { quarantine::FOLDER })
    }

    /// Returns all lines in quarantine, with the run that each came in.
    pub fn quarantined(&self) -> impl Iterator<Item = Result<(String, QuarantinedLine)>> + Send + use<> {
        quarantine::lines(&self.backend)
    }

    /// Returns the entries of the quarantine that are damaged: file and line of each.
    pub fn damaged_quarantine(&self) -> Result<Vec<(String, u64)>> {
        quarantine::damaged(&self.backend)
    }

    /// Returns the number of lines in quarantine.
    pub fn quarantined_lines(&self) -> Result<u64> {
        self.quarantined().try_fold(0, |lines, line| line.map(|_| lines + 1))
    }

    /// Returns how many lines a run can retry, by the type that their file declared.
    pub fn retryable(&self) -> Result<BTreeMap<Option<ResourceType>, u64>> {
        quarantine::retryable(&self.backend)
    }

    /// Returns those lines.
    pub fn replayed_lines(&self) -> ReplayedLines {
        quarantine::replayed(&self.backend)
    }

    /// Removes the lines whose resource was deleted since they came; how many.
    pub fn remove_superseded(&self) -> Result<u64> {
        deleted::remove_superseded(&self.backend)
    }

    /// Removes lines from quarantine; how many.
    pub fn remove_quarantined(&self, lines: &HashSet<LineId>) -> Result<u64> {
        quarantine::remove(&self.backend, lines)
    }

    /// Removes the lines of some types that earlier runs than `run` quarantined; how many.
    pub fn remove_quarantined_of(&self, run: &str, of_type: impl Fn(&str) -> bool) -> Result<u64> {
        let mut lines = HashSet::new();
        for line in self.quarantined() {
            let (since, line) = line?;
            if *since < *run && line.can_be_tried() && line.resource_type.as_deref().is_some_and(&of_type) {
                lines.insert(line.id());
            }
        }
        self.remove_quarantined(&lines)
    }

    /// Returns the quarantined lines that some ids, or their beginnings, name.
    pub fn find_quarantined(&self, ids: &[String]) -> Result<HashSet<LineId>> {
        quarantine::find(&self.backend, ids)
    }

    /// Returns where the server's messages about its export of a run are, for messages; `None` where it sent none.
    pub fn server_messages_location(&self, run: &str) -> Option<String> {
        let name = server_messages::file_of(run);
        let exists = self.backend.local(&name).is_ok_and(|file| file.exists());
        exists.then(|| self.backend.location(&name))
    }

    /// Opens the export log of a run.
    pub(crate) fn export_log(&self, run: &str) -> Result<ExportLogFile> {
        LogFile::open(&self.backend, &format!("export-logs/{run}.ndjson")).map(ExportLogFile)
    }

    /// Returns where a run's report is, for messages.
    pub fn report_location(&self, run: &str) -> String {
        self.backend.location(&report_of(run))
    }

    /// Persists a run's report, a document of its own in the folder [`Document::NAME`]. Reports and logs of the newest
    /// hundred runs stay.
    pub fn save_report<R: Document>(&self, run: &str, report: &R) -> Result<()> {
        self.backend.replace(&report_of(run), &document::encode(report)?, Protection::None)?;
        if let Err(error) = self.remove_old_runs() {
            tracing::warn!(%error, "reports of old runs could not be removed; the next run retries");
        }
        Ok(())
    }

    fn remove_old_runs(&self) -> Result<()> {
        let names = self.report_names()?;
        let Some(oldest) = names.len().checked_sub(RUNS_KEPT).and_then(|first| names.get(first)) else { return Ok(()) };
        let oldest = run_of(oldest);
        let mut old = Vec::new();
        for folder in BY_RUN {
            old.extend(self.backend.list(folder)?.into_iter().filter(|name| run_of(name) < oldest));
        }
        self.backend.remove(&old)
    }

    fn report_names(&self) -> Result<Vec<String>> {
        let mut names = self.backend.list(REPORTS)?;
        names.retain(|name| name.ends_with(".json"));
        Ok(names)
    }

    /// Returns the reports of the newest runs, the newest first. One that cannot be read is left out.
    pub fn reports<R: Document>(&self) -> Result<impl Iterator<Item = R> + use<R>> {
        let (names, backend) = (self.report_names()?, self.backend.clone());
        Ok(names.into_iter().rev().filter_map(move |name| {
            let text = std::fs::read(backend.local(&name).ok()?).ok()?;
            document::decode(&text, &backend.location(&name)).ok()?
        }))
    }

    /// Returns true if a run has left a report, or may have.
    pub fn has_report(&self, run: &str) -> bool {
        self.backend.local(&report_of(run)).map_or(true, |file| file.exists())
    }
}

/// The export log of a run.
#[derive(Debug)]
pub(crate) struct ExportLogFile(LogFile);

impl ExportLogFile {
    /// Appends a line, which ends with a line feed.
    pub(crate) fn append(&mut self, line: &[u8]) -> Result<()> {
        self.0.append(line)
    }

    /// Makes it durable.
    pub(crate) fn sync(&self) -> Result<()> {
        self.0.sync()
    }
}

fn report_of(run: &str) -> String {
    format!("{REPORTS}/{run}.json")
}

/// The run that a file is named after.
fn run_of(name: &str) -> &str {
    let file = name.rsplit('/').next().unwrap_or(name);
    file.split('.').next().unwrap_or(file)
}
