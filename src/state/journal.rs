//! The run in flight, one JSON object a line, each durable before the next step is taken.

use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::error::{Context, ErrorKind, Result};
use crate::mirror::{Mirror, push};
use foundation::fault_points::reached;
use foundation::secure_fs::private_append;

/// A step of a run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "step", rename_all = "kebab-case")]
pub enum JournalEntry {
    /// A run began; its staged files are named after it.
    Began {
        /// The run's id.
        run: String,
        /// The types that it asks for.
        types: Vec<String>,
    },
    /// The run ended; everything of it is committed, removed, or persisted to be resumed.
    Ended {
        /// The run's id.
        run: String,
    },
}

/// The journal's file.
#[derive(Debug, Clone)]
pub struct Journal {
    path: PathBuf,
    mirror: Option<Arc<Mirror>>,
}

impl Journal {
    pub(super) fn at(path: PathBuf, mirror: Option<Arc<Mirror>>) -> Self {
        Self { path, mirror }
    }

    fn keep(&self) -> Result<()> {
        push(self.mirror.as_ref())
    }

    /// Appends a step and makes it durable.
    pub fn write(&self, entry: &JournalEntry) -> Result<()> {
        let mut line = serde_json::to_vec(entry).context(ErrorKind::Internal, "a journal entry")?;
        line.push(b'\n');
        reached("before the journal");
        let mut file = private_append(&self.path)?;
        file.write_all(&line).context(ErrorKind::State, "the journal cannot be written")?;
        file.sync_data().context(ErrorKind::State, "the journal cannot be synced")?;
        reached("the journal is written");
        self.keep()
    }

    /// The steps of the run that was in flight when its process ended; nothing where the last run ended itself.
    /// A last line that the process did not finish writing is passed over.
    pub fn unfinished(&self) -> Result<Vec<JournalEntry>> {
        let text = match std::fs::read_to_string(&self.path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error).context(ErrorKind::State, "the journal cannot be read"),
        };
        let steps: Vec<JournalEntry> = text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
        // Runs that ended, well or not, are behind their own word.
        let after = steps.iter().rposition(|step| matches!(step, JournalEntry::Ended { .. })).map_or(0, |at| at + 1);
        Ok(steps.into_iter().skip(after).collect())
    }

    /// Forgets the steps of runs that are over.
    pub fn clear(&self) -> Result<()> {
        match std::fs::remove_file(&self.path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(error).context(ErrorKind::State, "the journal cannot be cleared")
            }
            _ => {
                reached("the journal is cleared");
                self.keep()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_that_was_killed_is_remembered_and_one_that_ended_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let journal = Journal::at(folder.path().join("journal.ndjson"), None);
        assert!(journal.unfinished().unwrap().is_empty());
        let began = JournalEntry::Began { run: "r1".into(), types: vec!["Patient".into()] };
        journal.write(&began).unwrap();
        std::fs::OpenOptions::new().append(true).open(&journal.path).unwrap().write_all(b"{\"step\":\"acc").unwrap();
        assert_eq!(journal.unfinished().unwrap(), [began]);
        journal.clear().unwrap();
        journal.write(&JournalEntry::Ended { run: "r1".into() }).unwrap();
        assert!(journal.unfinished().unwrap().is_empty());
        // A run that failed stays in the journal; the killed one is the one after it.
        let second = JournalEntry::Began { run: "r2".into(), types: vec![] };
        journal.write(&second).unwrap();
        assert_eq!(journal.unfinished().unwrap(), [second]);
    }
}
