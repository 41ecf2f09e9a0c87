//! What a server says of its own export, kept word by word. It may name patients: readable by the owner only.

use std::fs::File;
use std::io::Write;
use std::path::PathBuf;
use std::sync::Mutex;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::Serialize;

use crate::error::{Context, ErrorKind, Result};
use crate::messages::ExportFile;
use foundation::secure_fs::{private_append, private_dir};

/// Bytes of messages that are kept of one run: a server may complain of each of a million patients.
const MOST: u64 = 64 << 20;

/// The server's messages of one run; their file is made with the first.
#[derive(Debug)]
pub(super) struct ServerMessages {
    path: PathBuf,
    written: Mutex<Option<(File, u64)>>,
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
    pub(crate) fn at(path: PathBuf) -> Self {
        Self { path, written: Mutex::new(None) }
    }

    /// Appends a message, with its place.
    pub(crate) fn add(&self, file: &ExportFile, line: u64, bytes: &[u8]) -> Result<()> {
        let text = std::str::from_utf8(bytes).ok();
        let message = Message { file: &file.name, line, text, base64: text.is_none().then(|| STANDARD.encode(bytes)) };
        let mut json = serde_json::to_vec(&message).context(ErrorKind::Internal, "a server's message")?;
        json.push(b'\n');
        let mut written = flow::locked(&self.written);
        let (to, length) = match &mut *written {
            Some(open) => open,
            none => {
                if let Some(folder) = self.path.parent() {
                    private_dir(folder)?;
                }
                none.insert((private_append(&self.path)?, 0))
            }
        };
        if *length >= MOST {
            return Ok(());
        }
        *length += json.len() as u64;
        if *length >= MOST {
            tracing::warn!(bytes = *length, "too many server messages; the rest of this run's are dropped");
        }
        to.write_all(&json).context(ErrorKind::State, format!("{} cannot be written", self.path.display()))
    }

    /// Makes them durable.
    pub(crate) fn sync(&self) -> Result<()> {
        let written = flow::locked(&self.written);
        let synced = written.as_ref().map_or(Ok(()), |(file, _)| file.sync_all());
        synced.context(ErrorKind::State, format!("{} cannot be synced", self.path.display()))
    }
}
