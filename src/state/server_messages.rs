//! A server's messages about its own export, kept word by word. It may name patients: readable by the owner only.

use parking_lot::Mutex;
use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::Serialize;

use super::backend::{Backend, LogFile};
use crate::error::{Context, ErrorKind, Result};
use crate::messages::ExportFile;

/// Bytes of messages that are kept of one run: a server may complain of each of a million patients.
const MOST: u64 = 64 << 20;

/// The server's messages of one run; their file is made with the first.
#[derive(Debug)]
pub(super) struct ServerMessages {
    backend: Arc<dyn Backend>,
    name: String,
    written: Mutex<Option<(LogFile, u64)>>,
}

/// Returns the name of a run's file.
pub(super) fn file_of(run: &str) -> String {
    format!("server-messages/{run}.ndjson")
}

/// A line of the file.
#[derive(Serialize)]
struct Message<'a> {
    file: &'a str,
    line: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    text: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    base64: Option<String>,
}

impl ServerMessages {
    pub(super) fn of_run(backend: &Arc<dyn Backend>, run: &str) -> Self {
        Self { backend: backend.clone(), name: file_of(run), written: Mutex::new(None) }
    }

    /// Appends a message, with its place.
    pub(super) fn add(&self, file: &ExportFile, line: u64, bytes: &[u8]) -> Result<()> {
        let text = std::str::from_utf8(bytes).ok();
        let message = Message { file: &file.name, line, text, base64: text.is_none().then(|| STANDARD.encode(bytes)) };
        let mut json = serde_json::to_vec(&message).context(ErrorKind::Internal, "a server's message")?;
        json.push(b'\n');
        let mut written = self.written.lock();
        let (to, length) = match &mut *written {
            Some(open) => open,
            none => none.insert((LogFile::open(&self.backend, &self.name)?, 0)),
        };
        if *length >= MOST {
            return Ok(());
        }
        *length += json.len() as u64;
        if *length >= MOST {
            tracing::warn!(bytes = *length, "too many server messages; the rest of this run's are dropped");
        }
        to.append(&json)
    }

    /// Makes them durable.
    pub(super) fn sync(&self) -> Result<()> {
        let written = self.written.lock();
        written.as_ref().map_or(Ok(()), |(file, _)| file.sync())
    }
}
