//! Bad lines, kept whole with their place and reason. Holds patient data: private to the user.

use std::fs::File;
use std::io::{BufRead, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};

use crate::error::{Context, ErrorKind, Result};
use crate::messages::{BadLine, BadLines};
use crate::private::{private_append, private_dir};

/// A line in quarantine, as its file holds it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct QuarantinedLine {
    /// The file that it came in.
    pub file: String,
    /// Its number, from 1.
    pub line: u64,
    /// Bytes before it in the (uncompressed) file.
    pub offset: u64,
    /// The type that the file declares.
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    pub resource_type: Option<String>,
    /// What is wrong.
    pub reason: String,
    /// Its bytes, where they are text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
    /// Its bytes in base64, where they are not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub base64: Option<String>,
    /// Its full length, where only its beginning is kept because it is longer than `max_line`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub full_length: Option<u64>,
}

/// The quarantine of one run; its file is made with the first line.
#[derive(Debug)]
pub struct Quarantine {
    path: PathBuf,
    file: Mutex<Option<File>>,
    kept: AtomicU64,
}

/// Bad lines of a run that are logged one by one; of the rest there is only the count.
const LOGGED: u64 = 20;

impl Quarantine {
    pub(super) fn at(path: PathBuf) -> Self {
        Self { path, file: Mutex::new(None), kept: AtomicU64::new(0) }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn count(folder: &Path) -> u64 {
        let files = std::fs::read_dir(folder).into_iter().flatten().flatten();
        let files = files.filter_map(|entry| File::open(entry.path()).ok());
        files.map(|file| std::io::BufReader::new(file).split(b'\n').map_while(std::result::Result::ok).count() as u64).sum()
    }
}

impl BadLines for Quarantine {
    fn keep(&self, bad: &BadLine<'_>) -> Result<()> {
        let before = self.kept.fetch_add(1, Ordering::Relaxed);
        if before < LOGGED {
            tracing::warn!(file = %bad.file.name, line = bad.line, offset = bad.offset, reason = %bad.reason, "a line went to quarantine");
        } else if before == LOGGED {
            tracing::warn!("more lines went to quarantine; the rest is only counted");
        }
        let text = std::str::from_utf8(bad.bytes).ok().map(str::to_owned);
        let kept = QuarantinedLine {
            file: bad.file.name.clone(),
            line: bad.line,
            offset: bad.offset,
            resource_type: bad.file.declared.as_ref().map(ToString::to_string),
            reason: bad.reason.clone(),
            base64: text.is_none().then(|| STANDARD.encode(bad.bytes)),
            text,
            full_length: (bad.full_length != bad.bytes.len() as u64).then_some(bad.full_length),
        };
        let mut json = serde_json::to_vec(&kept).context(ErrorKind::Internal, "a quarantined line")?;
        json.push(b'\n');
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        let file = match &mut *file {
            Some(file) => file,
            none => {
                if let Some(folder) = self.path.parent() {
                    private_dir(folder)?;
                }
                none.insert(private_append(&self.path)?)
            }
        };
        file.write_all(&json).context(ErrorKind::State, "the quarantine cannot be written")
    }

    fn sync(&self) -> Result<()> {
        match &*self.file.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(file) => file.sync_all().context(ErrorKind::State, "the quarantine cannot be synced"),
            None => Ok(()),
        }
    }
}
