//! Bad lines, kept whole with their place and reason. Holds patient data: private to the user.
//!
//! A line is kept once, however often it comes, until a later run can read it or somebody dismisses it.

use parking_lot::Mutex;
use std::collections::{BTreeMap, HashSet};
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};

use super::backend::{Backend, LogFile};
use super::deleted;
use super::server_messages::ServerMessages;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::messages::{
    BadLine, BadLines, Deletion, ExportFile, FileKind, LineId, ReplayedLine, ReplayedLines, ResourceType,
};
use foundation::fault_points::reached;

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
    /// The problem.
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
    /// Kind of the file that it came in, where not resources: `deleted` or `outcome`. Such a line is not retried: a
    /// deletion has no order, and might take what came back since.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kind: Option<String>,
}

impl QuarantinedLine {
    /// Its bytes.
    pub fn bytes(&self) -> Vec<u8> {
        match (&self.text, &self.base64) {
            (Some(text), _) => text.clone().into_bytes(),
            (None, Some(base64)) => STANDARD.decode(base64).unwrap_or_default(),
            (None, None) => Vec::new(),
        }
    }

    /// Returns its id.
    pub fn id(&self) -> LineId {
        LineId::of(&self.bytes())
    }

    /// Returns true if a later run can try it again.
    pub fn can_be_tried(&self) -> bool {
        self.full_length.is_none() && self.kind.is_none()
    }
}

/// The folder of the quarantine, with a file for each run.
pub(super) const FOLDER: &str = "quarantine";

/// Returns the name of a run's file.
pub(super) fn file_of(run: &str) -> String {
    format!("{FOLDER}/{run}.ndjson")
}

/// The quarantine of one run; its file is created with the first line.
#[derive(Debug)]
pub struct Quarantine {
    backend: Arc<dyn Backend>,
    run: String,
    quarantined: AtomicU64,
    messages: ServerMessages,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    file: Option<LogFile>,
    /// Lines that are in quarantine already, this run's or an earlier one's.
    known: HashSet<LineId>,
    /// True if there are lines of earlier runs, which deletions of this run may concern.
    earlier: bool,
    /// Log of those.
    deleted: Option<LogFile>,
}

/// Bad lines of a run that are logged one by one; of the rest there is only the count.
const LOGGED: u64 = 20;

impl Quarantine {
    /// Creates the quarantine of a run, beside those of earlier runs.
    pub(super) fn of_run(backend: &Arc<dyn Backend>, run: &str) -> Result<Self> {
        let mut known = HashSet::new();
        for line in lines(backend) {
            known.insert(line?.1.id());
        }
        let inner = Inner { file: None, earlier: !known.is_empty(), known, deleted: None };
        Ok(Self {
            backend: backend.clone(),
            run: run.to_owned(),
            quarantined: AtomicU64::new(0),
            messages: ServerMessages::of_run(backend, run),
            inner: Mutex::new(inner),
        })
    }

    /// Returns the list of what was deleted, where lines of earlier runs may be concerned.
    fn deleted_list<'a>(&self, inner: &'a mut Inner) -> Result<Option<&'a mut LogFile>> {
        if !inner.earlier {
            return Ok(None);
        }
        Ok(Some(match &mut inner.deleted {
            Some(list) => list,
            none => none.insert(LogFile::open(&self.backend, deleted::NAME)?),
        }))
    }
}

/// Returns the names of the quarantine's files, the oldest run's first.
fn files(backend: &Arc<dyn Backend>) -> Result<Vec<String>> {
    let mut names = backend.list(FOLDER)?;
    names.retain(|name| name.ends_with(".ndjson"));
    Ok(names)
}

/// The name of the run that a file is of.
fn run_of(name: &str) -> String {
    name.trim_start_matches(FOLDER).trim_start_matches('/').trim_end_matches(".ndjson").to_owned()
}

/// Opens a file of the quarantine; `None` where another run has taken its last line out.
fn open(backend: &Arc<dyn Backend>, name: &str) -> Result<Option<BufReader<File>>> {
    let path = backend.local(name)?;
    match File::open(&path) {
        Ok(file) => Ok(Some(BufReader::new(file))),
        Err(_) if !path.exists() => Ok(None),
        Err(error) => Err(error).context(ErrorKind::State, "the quarantine cannot be read"),
    }
}

/// Returns all lines of a quarantine, with the run that they came in; one file is open at a time.
pub(super) fn lines(
    backend: &Arc<dyn Backend>,
) -> impl Iterator<Item = Result<(String, QuarantinedLine)>> + Send + use<> {
    let backend = backend.clone();
    let (names, unlisted) = match files(&backend) {
        Ok(names) => (names, None),
        Err(error) => (Vec::new(), Some(Err(error))),
    };
    let lines = names.into_iter().flat_map(move |name| {
        let run = run_of(&name);
        let (read, failed) = match open(&backend, &name) {
            Ok(file) => (file, None),
            Err(error) => (None, Some(Err(error))),
        };
        let lines = read.into_iter().flat_map(|file| file.split(b'\n')).filter_map(move |line| {
            let line = match line.context(ErrorKind::State, "the quarantine cannot be read") {
                Ok(line) => line,
                Err(error) => return Some(Err(error)),
            };
            // A last line that a killed run did not finish: its type did not commit, so it comes again.
            serde_json::from_slice(&line).ok().map(|line| Ok((run.clone(), line)))
        });
        lines.chain(failed)
    });
    unlisted.into_iter().chain(lines)
}

/// Returns the entries that are damaged: their files, for messages, and the numbers of their lines. A last line without
/// a line feed is none: the run that wrote it was killed, its type did not commit, and the line comes again.
pub(super) fn damaged(backend: &Arc<dyn Backend>) -> Result<Vec<(String, u64)>> {
    let mut found = Vec::new();
    for name in files(backend)? {
        let Some(mut file) = open(backend, &name)? else { continue };
        let mut entry = Vec::new();
        for number in 1.. {
            entry.clear();
            let read = file.read_until(b'\n', &mut entry).context(ErrorKind::State, "the quarantine cannot be read")?;
            if read == 0 {
                break;
            }
            if entry.ends_with(b"\n") && serde_json::from_slice::<QuarantinedLine>(&entry).is_err() {
                found.push((backend.location(&name), number));
            }
        }
    }
    Ok(found)
}

/// Returns how many lines a later run can retry, by the type that their file declared.
pub(super) fn retryable(backend: &Arc<dyn Backend>) -> Result<BTreeMap<Option<ResourceType>, u64>> {
    let mut found: BTreeMap<Option<ResourceType>, u64> = BTreeMap::new();
    for line in lines(backend) {
        let (_, line) = line?;
        if line.can_be_tried() {
            *found.entry(line.resource_type.as_deref().map(ResourceType::from)).or_default() += 1;
        }
    }
    Ok(found)
}

/// Returns those lines.
pub(super) fn replayed(backend: &Arc<dyn Backend>) -> ReplayedLines {
    let lines = lines(backend).filter_map(|line| match line {
        Ok((_, line)) if line.can_be_tried() => Some(Ok(ReplayedLine {
            declared: line.resource_type.as_deref().map(ResourceType::from),
            bytes: line.bytes(),
        })),
        Ok(_) => None,
        Err(error) => Some(Err(error)),
    });
    Box::new(lines)
}

/// Removes lines; how many.
pub(super) fn remove(backend: &Arc<dyn Backend>, gone: &HashSet<LineId>) -> Result<u64> {
    let mut removed = 0;
    if gone.is_empty() {
        return Ok(removed);
    }
    for name in files(backend)? {
        let Some(file) = open(backend, &name)? else { continue };
        let (mut left, mut here) = (Vec::new(), 0);
        for line in file.split(b'\n') {
            let line = line.context(ErrorKind::State, "the quarantine cannot be read")?;
            match serde_json::from_slice::<QuarantinedLine>(&line) {
                Ok(parsed) if gone.contains(&parsed.id()) => here += 1,
                _ => {
                    left.extend_from_slice(&line);
                    left.push(b'\n');
                }
            }
        }
        if here == 0 {
            continue;
        }
        removed += here;
        if left.is_empty() {
            backend.remove(&[name])?;
            reached("a run's quarantine is removed");
        } else {
            backend.rewrite(&name, &left)?;
        }
    }
    Ok(removed)
}

/// Returns the lines that some ids, or their beginnings, name.
pub(super) fn find(backend: &Arc<dyn Backend>, ids: &[String]) -> Result<HashSet<LineId>> {
    let all: HashSet<LineId> = lines(backend).map(|line| line.map(|(_, line)| line.id())).collect::<Result<_>>()?;
    let mut found = HashSet::new();
    for id in ids {
        let named: Vec<LineId> =
            all.iter().filter(|line| line.to_string().starts_with(&id.to_lowercase())).copied().collect();
        match named.as_slice() {
            [one] => drop(found.insert(*one)),
            [] => return Err(Error::new(ErrorKind::Config, format!("no line in quarantine has the id {id}"))),
            several => {
                let several = several.len();
                return Err(Error::new(
                    ErrorKind::Config,
                    format!("{several} lines in quarantine have ids that begin with {id}"),
                ));
            }
        }
    }
    Ok(found)
}

impl BadLines for Quarantine {
    fn quarantine(&self, bad: &BadLine<'_>) -> Result<()> {
        let before = self.quarantined.fetch_add(1, Ordering::Relaxed);
        if before < LOGGED {
            tracing::warn!(file = %bad.file.name, line = bad.line, offset = bad.offset, reason = %bad.reason,
                "a line went to quarantine");
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
            kind: match bad.file.kind {
                FileKind::Output => None,
                FileKind::Deleted => Some("deleted".into()),
                FileKind::Outcome => Some("outcome".into()),
            },
        };
        let mut json = serde_json::to_vec(&kept).context(ErrorKind::Internal, "a quarantined line")?;
        json.push(b'\n');
        let mut inner = self.inner.lock();
        if !inner.known.insert(LineId::of(bad.bytes)) {
            // A deletion before this run is older than what the line says.
            return match self.deleted_list(&mut inner)? {
                Some(list) => deleted::seen_again(list, &self.run, LineId::of(bad.bytes)),
                None => Ok(()),
            };
        }
        let file = match &mut inner.file {
            Some(file) => file,
            none => none.insert(LogFile::open(&self.backend, &file_of(&self.run))?),
        };
        file.append(&json)?;
        reached("a line is quarantined");
        Ok(())
    }

    fn message(&self, file: &ExportFile, line: u64, bytes: &[u8]) -> Result<()> {
        self.messages.add(file, line, bytes)
    }

    fn deleted(&self, ids: &[Deletion]) -> Result<()> {
        let mut inner = self.inner.lock();
        if ids.is_empty() {
            return Ok(());
        }
        match self.deleted_list(&mut inner)? {
            Some(list) => deleted::append(list, &self.run, ids),
            None => Ok(()),
        }
    }

    fn sync(&self) -> Result<()> {
        let inner = self.inner.lock();
        reached("before the quarantine is synced");
        inner.file.iter().chain(&inner.deleted).try_for_each(LogFile::sync)?;
        self.messages.sync()
    }
}
