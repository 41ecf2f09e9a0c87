//! The run in flight, one JSON object a line, each durable before the next step is taken.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::backend::{Backend, Protection};
use crate::error::{Context, ErrorKind, Result};
use foundation::fault_points::reached;

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
    backend: Arc<dyn Backend>,
}

const NAME: &str = "journal.ndjson";

impl Journal {
    pub(super) fn of(backend: Arc<dyn Backend>) -> Self {
        Self { backend }
    }

    /// Adds a step and makes it durable. Steps of runs that ended are forgotten.
    pub fn write(&self, entry: JournalEntry) -> Result<()> {
        let mut steps = self.unfinished()?;
        steps.push(entry);
        let mut text = Vec::new();
        for step in &steps {
            serde_json::to_writer(&mut text, step).context(ErrorKind::Internal, "a journal entry")?;
            text.push(b'\n');
        }
        reached("before the journal");
        self.backend.replace(NAME, &text, Protection::ByLease)?;
        reached("the journal is written");
        Ok(())
    }

    /// Returns the steps of the run that was in flight when its process ended; nothing where the last run ended itself.
    /// A last line that the process did not finish writing is passed over.
    pub fn unfinished(&self) -> Result<Vec<JournalEntry>> {
        let text = self.backend.read(NAME)?.unwrap_or_default();
        let lines = text.split(|byte| *byte == b'\n');
        let steps: Vec<JournalEntry> = lines.filter_map(|line| serde_json::from_slice(line).ok()).collect();
        // Runs that ended, well or not, are behind their own word.
        let after = steps.iter().rposition(|step| matches!(step, JournalEntry::Ended { .. })).map_or(0, |at| at + 1);
        Ok(steps.into_iter().skip(after).collect())
    }

    /// Forgets the steps of runs that are over.
    pub fn clear(&self) -> Result<()> {
        self.backend.remove(&[NAME.to_owned()])?;
        reached("the journal is cleared");
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::super::StateStore;
    use super::*;

    #[test]
    fn a_run_that_was_killed_is_remembered_and_one_that_ended_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let journal = StateStore::local(folder.path(), None).journal();
        assert!(journal.unfinished().unwrap().is_empty());
        let began = JournalEntry::Began { run: "r1".into(), types: vec!["Patient".into()] };
        journal.write(began.clone()).unwrap();
        std::fs::OpenOptions::new()
            .append(true)
            .open(folder.path().join(NAME))
            .unwrap()
            .write_all(b"{\"step\":\"acc")
            .unwrap();
        assert_eq!(journal.unfinished().unwrap(), std::slice::from_ref(&began));
        // What follows a line that was cut is not lost with it.
        let next = JournalEntry::Began { run: "r1b".into(), types: vec![] };
        journal.write(next.clone()).unwrap();
        assert_eq!(journal.unfinished().unwrap(), [began, next]);
        journal.clear().unwrap();
        journal.write(JournalEntry::Ended { run: "r1".into() }).unwrap();
        assert!(journal.unfinished().unwrap().is_empty());
        // A run that failed stays in the journal; the killed one is the one after it.
        let second = JournalEntry::Began { run: "r2".into(), types: vec![] };
        journal.write(second.clone()).unwrap();
        assert_eq!(journal.unfinished().unwrap(), [second]);
    }
}
