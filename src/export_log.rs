//! The log of an export that Bulk Data clients share: `log.ndjson`, version 2 of the format that `bulk-data-client`
//! describes ("Bulk Data Export Log Items"). One line an event; URLs are without their query, which may hold a secret.

use parking_lot::Mutex;
use std::sync::Arc;

use chrono::{SecondsFormat, Utc};
use serde_json::{Value, json};

use crate::state::ExportLogFile;

/// A log, or none. Clones write to the same.
#[derive(Debug, Clone, Default)]
pub struct ExportLog {
    file: Option<Arc<Mutex<ExportLogFile>>>,
    run: String,
}

impl ExportLog {
    /// Returns the log of `run`, in this file.
    pub(crate) fn of_run(file: ExportLogFile, run: &str) -> Self {
        Self { file: Some(Arc::new(Mutex::new(file))), run: run.to_owned() }
    }

    /// Writes an event of the run's export number `export`.
    pub fn note(&self, export: usize, event: &str, detail: impl FnOnce() -> Value) {
        let Some(file) = &self.file else { return };
        let line = json!({
            "exportId": format!("{}-{export}", self.run),
            "timestamp": Utc::now().to_rfc3339_opts(SecondsFormat::Millis, true),
            "eventId": event,
            "eventDetail": detail(),
        });
        let mut file = file.lock();
        // A log that cannot be written is no reason to lose an export.
        if let Err(error) = file.append(format!("{line}\n").as_bytes()) {
            tracing::warn!(%error, event, "the export log could not be written");
        }
        // Those of polls and files may be many.
        if matches!(event, "kickoff" | "status_complete" | "export_complete") {
            drop(file);
            self.sync();
        }
    }

    /// Makes it durable. One that cannot be is no reason to lose an export.
    pub fn sync(&self) {
        if let Some(file) = &self.file
            && let Err(error) = file.lock().sync()
        {
            tracing::warn!(%error, "the export log could not be made durable");
        }
    }
}
