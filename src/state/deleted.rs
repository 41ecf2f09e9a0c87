//! Ids that were deleted while lines lay in quarantine: what such a line says of them is over, should it ever be read.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::quarantine::{QuarantinedLine, lines, remove};
use crate::error::{Context, ErrorKind, Result};
use crate::messages::ResourceType;
use crate::private::{private_append, private_dir};

#[derive(Serialize, Deserialize)]
struct Deleted {
    run: String,
    #[serde(rename = "type")]
    resource_type: String,
    id: String,
}

fn file_of(quarantine: &Path) -> PathBuf {
    quarantine.join("deleted.log")
}

/// Opens the list of a quarantine for appending.
pub(super) fn open(quarantine: &Path) -> Result<File> {
    private_dir(quarantine)?;
    private_append(&file_of(quarantine))
}

/// Adds what a run deletes.
pub(super) fn append(list: &mut File, run: &str, ids: &[(ResourceType, Box<str>)]) -> Result<()> {
    let mut bytes = Vec::new();
    for (resource_type, id) in ids {
        let deleted = Deleted { run: run.to_owned(), resource_type: resource_type.to_string(), id: id.to_string() };
        serde_json::to_writer(&mut bytes, &deleted).context(ErrorKind::Internal, "an id that was deleted")?;
        bytes.push(b'\n');
    }
    list.write_all(&bytes).context(ErrorKind::State, "the quarantine cannot be written")
}

/// Takes the lines out whose resource was deleted by a later run than the one that brought them; how many. Lines that
/// are no JSON stay, since nobody knows whose they are; and with them the list.
pub(super) fn remove_superseded(quarantine: &Path) -> Result<u64> {
    let path = file_of(quarantine);
    let list = match File::open(&path) {
        Ok(list) => BufReader::new(list),
        Err(_) if !path.exists() => return Ok(0),
        Err(error) => return Err(error).context(ErrorKind::State, "the quarantine cannot be read"),
    };
    // The last run that deleted each; runs are named by their time.
    let mut gone: HashMap<(String, String), String> = HashMap::new();
    for line in list.split(b'\n') {
        let line = line.context(ErrorKind::State, "the quarantine cannot be read")?;
        // A last line that a killed run did not finish: its deletions were not applied.
        let Ok(deleted) = serde_json::from_slice::<Deleted>(&line) else { continue };
        let last = gone.entry((deleted.resource_type, deleted.id)).or_default();
        if *last < deleted.run {
            *last = deleted.run;
        }
    }
    let (mut superseded, mut others) = (HashSet::new(), false);
    for line in lines(quarantine) {
        let (run, line) = line?;
        match resource_of(&line).and_then(|resource| gone.get(&resource)) {
            Some(deleted_by) if *deleted_by > run => drop(superseded.insert(line.id())),
            _ => others = true,
        }
    }
    let removed = remove(quarantine, &superseded)?;
    if !others {
        std::fs::remove_file(&path).context(ErrorKind::State, "the quarantine cannot be written")?;
    }
    Ok(removed)
}

fn resource_of(line: &QuarantinedLine) -> Option<(String, String)> {
    #[derive(Deserialize)]
    struct Resource {
        #[serde(rename = "resourceType")]
        resource_type: String,
        id: String,
    }
    let resource: Resource = serde_json::from_slice(&line.bytes()).ok().filter(|_| line.can_be_tried())?;
    Some((resource.resource_type, resource.id))
}
