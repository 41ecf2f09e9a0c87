//! The log of an export that Bulk Data clients share: `log.ndjson`, version 2 of the format that `bulk-data-client` describes
//! ("Bulk Data Export Log Items"). One line an event; URLs are without their query, which may hold a secret.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::{Arc, Mutex};

use chrono::{SecondsFormat, Utc};
use serde_json::{Value, json};

use crate::error::{Context, ErrorKind, Result};
use foundation::secure_fs::{private_dir, private_new};

/// A log, or none. Clones write to the same.
#[derive(Debug, Clone, Default)]
pub struct ExportLog {
    file: Option<Arc<Mutex<File>>>,
    run: String,
}

impl ExportLog {
    /// A log of `run` in a new file, private to the user.
    pub fn at(path: &Path, run: &str) -> Result<Self> {
        if let Some(folder) = path.parent() {
            private_dir(folder)?;
        }
        private_new(path, b"")?;
        let file = File::options().append(true).open(path);
        let file = file.context(ErrorKind::State, format!("{} cannot be written", path.display()))?;
        Ok(Self { file: Some(Arc::new(Mutex::new(file))), run: run.to_owned() })
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
        let mut file = flow::locked(file);
        // A log that cannot be written is no reason to lose an export.
        if let Err(error) = file.write_all(format!("{line}\n").as_bytes()) {
            tracing::warn!(%error, event, "the export log could not be written");
        }
    }
}
