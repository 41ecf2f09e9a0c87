//! Ids that were deleted while lines lay in quarantine: what such a line says of them is over, should it ever be read.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::backend::{Backend, LogFile};
use super::quarantine::{QuarantinedLine, lines, remove};
use crate::error::{Context, ErrorKind, Result};
use crate::messages::{Deletion, LineId};

/// An entry of the list.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum What {
    /// A resource was deleted: its type and id.
    Deleted(String, String),
    /// A line that was there already came again.
    Seen(String),
}

#[derive(Serialize, Deserialize)]
struct Entry {
    run: String,
    #[serde(flatten)]
    what: What,
}

/// The list's file.
pub(super) const NAME: &str = "quarantine/deleted.log";

fn put(list: &mut LogFile, run: &str, entries: impl Iterator<Item = What>) -> Result<()> {
    let mut bytes = Vec::new();
    for what in entries {
        let entry = Entry { run: run.to_owned(), what };
        serde_json::to_writer(&mut bytes, &entry).context(ErrorKind::Internal, "an id that was deleted")?;
        bytes.push(b'\n');
    }
    list.append(&bytes)
}

/// Adds what a run deletes.
pub(super) fn append(list: &mut LogFile, run: &str, ids: &[Deletion]) -> Result<()> {
    put(list, run, ids.iter().map(|gone| What::Deleted(gone.resource_type.to_string(), gone.id.to_string())))
}

/// Adds that a line came again: deletions before this run do not concern it.
pub(super) fn seen_again(list: &mut LogFile, run: &str, line: LineId) -> Result<()> {
    put(list, run, std::iter::once(What::Seen(line.to_string())))
}

/// Removes the lines whose resource was deleted by a later run than the last that brought them; how many. Lines that
/// are no JSON stay, since nobody knows whose they are; and with them what the list says since the oldest of them.
pub(super) fn remove_superseded(backend: &Arc<dyn Backend>) -> Result<u64> {
    let path = backend.local(NAME)?;
    let unreadable = "the quarantine cannot be read";
    let list = match File::open(&path) {
        Ok(list) => BufReader::new(list),
        Err(_) if !path.exists() => return Ok(0),
        Err(error) => return Err(error).context(ErrorKind::State, unreadable),
    };
    let mut oldest: Option<String> = None;
    for line in lines(backend) {
        let (run, line) = line?;
        if line.can_be_tried() && oldest.as_ref().is_none_or(|oldest| run < *oldest) {
            oldest = Some(run);
        }
    }
    // The last run that deleted each, or saw it again; runs are named by their time.
    let mut last: HashMap<What, String> = HashMap::new();
    for line in list.split(b'\n') {
        // A last line that a killed run did not finish: its deletions were not applied.
        let Ok(entry) = serde_json::from_slice::<Entry>(&line.context(ErrorKind::State, unreadable)?) else { continue };
        if oldest.as_ref().is_some_and(|oldest| entry.run > *oldest) {
            let known = last.entry(entry.what).or_default();
            if *known < entry.run {
                *known = entry.run;
            }
        }
    }
    let mut superseded = HashSet::new();
    for line in lines(backend) {
        let (run, line) = line?;
        let seen = last.get(&What::Seen(line.id().to_string())).filter(|seen| **seen > run).unwrap_or(&run);
        if let Some(deleted) = resource_of(&line).and_then(|resource| last.get(&resource))
            && deleted > seen
        {
            superseded.insert(line.id());
        }
    }
    let removed = remove(backend, &superseded)?;
    let failed = "the quarantine cannot be written";
    if oldest.is_none() || lines(backend).next().is_none() {
        backend.remove(&[NAME.to_owned()])?;
        return Ok(removed);
    }
    // Each once, so that a line that nobody can read does not let the list grow with every run.
    let mut bytes = Vec::new();
    for (what, run) in last {
        serde_json::to_writer(&mut bytes, &Entry { run, what }).context(ErrorKind::Internal, failed)?;
        bytes.push(b'\n');
    }
    backend.rewrite(NAME, &bytes)?;
    Ok(removed)
}

fn resource_of(line: &QuarantinedLine) -> Option<What> {
    #[derive(Deserialize)]
    struct Resource {
        #[serde(rename = "resourceType")]
        resource_type: String,
        id: String,
    }
    let resource: Resource = serde_json::from_slice(&line.bytes()).ok().filter(|_| line.can_be_tried())?;
    Some(What::Deleted(resource.resource_type, resource.id))
}
