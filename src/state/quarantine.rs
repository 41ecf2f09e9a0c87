//! Bad lines, kept whole with their place and reason. Holds patient data: private to the user.
//!
//! A line is kept once, however often it comes, until a later run can read it or somebody dismisses it.

use std::collections::{BTreeMap, HashSet};
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};

use super::deleted;
use super::server_messages::ServerMessages;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::messages::{BadLine, BadLines, Deletion, ExportFile, FileKind, LineId, ReplayedLine, ReplayedLines, ResourceType};
use crate::mirror::{Mirror, push};
use foundation::fault_points::reached;
use foundation::secure_fs::{private_append, private_dir, write_atomically};

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
    /// What kind of file it came in, where not resources: `deleted` or `outcome`. Such a line is not retried: a
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

    /// What it is named by.
    pub fn id(&self) -> LineId {
        LineId::of(&self.bytes())
    }

    /// Whether a later run can try it again.
    pub fn can_be_tried(&self) -> bool {
        self.full_length.is_none() && self.kind.is_none()
    }
}

/// The quarantine of one run; its file is made with the first line.
#[derive(Debug)]
pub struct Quarantine {
    path: PathBuf,
    kept: AtomicU64,
    mirror: Option<Arc<Mirror>>,
    messages: ServerMessages,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    file: Option<File>,
    /// Lines that are in quarantine already, this run's or an earlier one's.
    known: HashSet<LineId>,
    /// Whether there are lines of earlier runs, which deletions of this run may concern.
    earlier: bool,
    /// Where those are remembered.
    deleted: Option<File>,
}

/// Bad lines of a run that are logged one by one; of the rest there is only the count.
const LOGGED: u64 = 20;

impl Quarantine {
    /// The quarantine of a run whose file is `path`, beside the files of earlier runs; the server's messages go to `messages`.
    pub(super) fn of_run(path: PathBuf, messages: PathBuf, mirror: Option<Arc<Mirror>>) -> Result<Self> {
        let mut known = HashSet::new();
        for line in path.parent().into_iter().flat_map(lines) {
            known.insert(line?.1.id());
        }
        let inner = Inner { file: None, earlier: !known.is_empty(), known, deleted: None };
        let messages = ServerMessages::at(messages);
        Ok(Self { path, kept: AtomicU64::new(0), mirror, messages, inner: Mutex::new(inner) })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Quarantine {
    /// The list of what was deleted, where lines of earlier runs may be concerned, and the run's id.
    fn list<'a>(&'a self, inner: &'a mut Inner) -> Result<Option<(&'a mut File, &'a str)>> {
        let run = self.path.file_stem().and_then(|run| run.to_str());
        let (true, Some(folder), Some(run)) = (inner.earlier, self.path.parent(), run) else { return Ok(None) };
        let list = match &mut inner.deleted {
            Some(list) => list,
            none => none.insert(deleted::open(folder)?),
        };
        Ok(Some((list, run)))
    }
}

/// The files of a quarantine, the oldest run's first.
fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    let mut files: Vec<PathBuf> =
        entries.filter(|path| path.extension().is_some_and(|extension| extension == "ndjson")).collect();
    files.sort();
    files
}

/// All lines of a quarantine, with the run that they came in; one file is open at a time.
pub(super) fn lines(folder: &Path) -> impl Iterator<Item = Result<(String, QuarantinedLine)>> + Send + use<> {
    let unreadable = "the quarantine cannot be read";
    files(folder).into_iter().flat_map(move |path| {
        let run = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let (read, failed) = match File::open(&path).context(ErrorKind::State, unreadable) {
            Ok(file) => (Some(BufReader::new(file).split(b'\n')), None),
            // Another run has taken its last line out.
            Err(_) if !path.exists() => (None, None),
            Err(error) => (None, Some(Err(error))),
        };
        let lines = read.into_iter().flatten().filter_map(move |line| {
            let line = match line.context(ErrorKind::State, unreadable) {
                Ok(line) => line,
                Err(error) => return Some(Err(error)),
            };
            // A last line that a killed run did not finish: its type did not commit, so it comes again.
            serde_json::from_slice(&line).ok().map(|line| Ok((run.clone(), line)))
        });
        lines.chain(failed)
    })
}

/// Lines that a later run can retry, by the type that their file declared; how many of each.
pub(super) fn to_be_tried(folder: &Path) -> Result<BTreeMap<Option<ResourceType>, u64>> {
    let mut found: BTreeMap<Option<ResourceType>, u64> = BTreeMap::new();
    for line in lines(folder) {
        let (_, line) = line?;
        if line.can_be_tried() {
            *found.entry(line.resource_type.as_deref().map(ResourceType::from)).or_default() += 1;
        }
    }
    Ok(found)
}

/// Those lines.
pub(super) fn kept(folder: &Path) -> ReplayedLines {
    let lines = lines(folder).filter_map(|line| match line {
        Ok((_, line)) if line.can_be_tried() => {
            Some(Ok(ReplayedLine { declared: line.resource_type.as_deref().map(ResourceType::from), bytes: line.bytes() }))
        }
        Ok(_) => None,
        Err(error) => Some(Err(error)),
    });
    Box::new(lines)
}

/// Takes lines out; how many.
pub(super) fn remove(folder: &Path, gone: &HashSet<LineId>) -> Result<u64> {
    let mut removed = 0;
    if gone.is_empty() {
        return Ok(removed);
    }
    for path in files(folder) {
        let file = File::open(&path).context(ErrorKind::State, "the quarantine cannot be read")?;
        let (mut kept, mut here) = (Vec::new(), 0);
        for line in BufReader::new(file).split(b'\n') {
            let line = line.context(ErrorKind::State, "the quarantine cannot be read")?;
            match serde_json::from_slice::<QuarantinedLine>(&line) {
                Ok(parsed) if gone.contains(&parsed.id()) => here += 1,
                _ => {
                    kept.extend_from_slice(&line);
                    kept.push(b'\n');
                }
            }
        }
        if here == 0 {
            continue;
        }
        removed += here;
        if kept.is_empty() {
            std::fs::remove_file(&path).context(ErrorKind::State, "the quarantine cannot be written")?;
            reached("a run's quarantine is removed");
        } else {
            write_atomically(&path, &kept)?;
        }
    }
    Ok(removed)
}

/// The lines that some ids, or their beginnings, name.
pub(super) fn find(folder: &Path, ids: &[String]) -> Result<HashSet<LineId>> {
    let all: HashSet<LineId> = lines(folder).map(|line| line.map(|(_, line)| line.id())).collect::<Result<_>>()?;
    let mut found = HashSet::new();
    for id in ids {
        let named: Vec<LineId> = all.iter().filter(|line| line.to_string().starts_with(&id.to_lowercase())).copied().collect();
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
            kind: match bad.file.kind {
                FileKind::Output => None,
                FileKind::Deleted => Some("deleted".into()),
                FileKind::Outcome => Some("outcome".into()),
            },
        };
        let mut json = serde_json::to_vec(&kept).context(ErrorKind::Internal, "a quarantined line")?;
        json.push(b'\n');
        let mut inner = flow::locked(&self.inner);
        if !inner.known.insert(LineId::of(bad.bytes)) {
            // A deletion before this run is older than what the line says.
            return match self.list(&mut inner)? {
                Some((list, run)) => deleted::seen_again(list, run, LineId::of(bad.bytes)),
                None => Ok(()),
            };
        }
        let file = match &mut inner.file {
            Some(file) => file,
            none => {
                if let Some(folder) = self.path.parent() {
                    private_dir(folder)?;
                }
                none.insert(private_append(&self.path)?)
            }
        };
        file.write_all(&json).context(ErrorKind::State, "the quarantine cannot be written")?;
        reached("a line is quarantined");
        Ok(())
    }

    fn message(&self, file: &ExportFile, line: u64, bytes: &[u8]) -> Result<()> {
        self.messages.add(file, line, bytes)
    }

    fn deleted(&self, ids: &[Deletion]) -> Result<()> {
        let mut inner = flow::locked(&self.inner);
        if ids.is_empty() {
            return Ok(());
        }
        match self.list(&mut inner)? {
            Some((list, run)) => deleted::append(list, run, ids),
            None => Ok(()),
        }
    }

    fn sync(&self) -> Result<()> {
        let inner = flow::locked(&self.inner);
        reached("before the quarantine is synced");
        let mut files = inner.file.iter().chain(&inner.deleted);
        files.try_for_each(|file| file.sync_all().context(ErrorKind::State, "the quarantine cannot be synced"))?;
        self.messages.sync()?;
        push(self.mirror.as_ref())
    }
}
