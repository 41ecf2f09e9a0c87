//! Removes files that no version within the retention names.

use std::collections::{BTreeMap, HashSet};
use std::time::Duration;

use buoyant_kernel as delta_kernel;
use chrono::{DateTime, TimeDelta, Utc};
use delta_kernel::actions::deletion_vector::DeletionVectorDescriptor as KernelDescriptor;
use deltalake::kernel::DeletionVectorDescriptor;
use deltalake::protocol::DeltaOperation;
use deltalake::table::config::TablePropertiesExt;
use object_store::path::Path;
use object_store::{ObjectMeta, ObjectStore, ObjectStoreExt};
use serde_json::{Value, json};
use tokio_stream::StreamExt;

use crate::staging::StagedParquet;
use crate::table::{Table, storage};
use foundation::error::{Error, ErrorKind, Result};
use foundation::fault_points::reached;

/// Settings of `vacuum`.
#[derive(Debug, Clone)]
pub struct VacuumSettings {
    /// Time for which files stay after the last version that names them; `None` for the table's own setting, a week by
    /// default.
    pub retention: Option<Duration>,
    /// True if a retention below the table's own is allowed.
    pub below_the_tables: bool,
    /// True if files are removed, or only named.
    pub delete: bool,
    /// Files that runs have staged and resume: they stay.
    pub staged: Vec<StagedParquet>,
    /// Further members of the commits' info.
    pub info: BTreeMap<String, Value>,
}

/// Files that vacuum found.
#[derive(Debug, Clone, Default, serde::Serialize)]
pub struct Vacuumed {
    /// Files that no version within the retention names, by their path in the table's folder.
    pub files: Vec<String>,
    /// Their bytes.
    pub bytes: u64,
    /// True if they were removed.
    pub deleted: bool,
}

/// A file that no version names may belong to a run that has not committed yet: it stays so long, whatever the
/// retention.
const UNCOMMITTED: TimeDelta = TimeDelta::days(1);

impl Table {
    /// Finds files that no version within the retention names, and removes them if asked to.
    pub async fn vacuum(&mut self, settings: &VacuumSettings) -> Result<Vacuumed> {
        let Some(delta) = &self.delta else { return Ok(Vacuumed::default()) };
        let snapshot = delta.snapshot().map_err(|error| storage(error, "no snapshot"))?;
        let own = snapshot.table_config().deleted_file_retention_duration();
        let retention = settings.retention.unwrap_or(own);
        if retention < own && !settings.below_the_tables {
            return Err(Error::new(
                ErrorKind::Config,
                format!(
                    "a retention of {} h is below the table's own of {} h: readers of older versions, and writers \
                        that have not committed, would lose files",
                    retention.as_secs() / 3600,
                    own.as_secs() / 3600
                ),
            )
            .at(self.resource_type.to_string()));
        }
        let back = TimeDelta::from_std(retention).ok().and_then(|back| Utc::now().checked_sub_signed(back));
        let until = back.unwrap_or(DateTime::<Utc>::MIN_UTC);
        let named = self.named(until).await?;
        let ours = settings.staged.iter().filter(|file| file.resource_type == self.resource_type);
        let staged: HashSet<Path> = ours.map(|file| Path::from(file.path.as_str())).collect();
        let store = self.store();
        let mut listed = store.list(None);
        let mut due: Vec<ObjectMeta> = Vec::new();
        while let Some(file) = listed.try_next().await.map_err(|error| storage(error, "the table cannot be listed"))? {
            let path = &file.location;
            let hidden = path.parts().any(|part| part.as_ref().starts_with(['_', '.']));
            let since = if named.ever.contains(path) { until } else { until.min(Utc::now() - UNCOMMITTED) };
            let old = file.last_modified < since;
            if !hidden && old && !named.kept.contains(path) && !staged.contains(path) {
                due.push(file);
            }
        }
        drop(listed);
        due.sort_by(|a, b| a.location.cmp(&b.location));
        let found = Vacuumed {
            files: due.iter().map(|file| file.location.to_string()).collect(),
            bytes: due.iter().map(|file| file.size).sum(),
            deleted: settings.delete,
        };
        if settings.delete && !due.is_empty() {
            let begin = DeltaOperation::VacuumStart {
                retention_check_enabled: !settings.below_the_tables,
                specified_retention_millis: settings.retention.map(|retention| retention.as_millis() as i64),
                default_retention_millis: own.as_millis() as i64,
            };
            let metrics = json!({ "numFilesToDelete": due.len(), "sizeOfDataToDelete": found.bytes });
            self.note(settings, begin, metrics).await?;
            let paths = Box::pin(tokio_stream::iter(due.into_iter().map(|file| Ok(file.location))));
            reached("before files are vacuumed");
            let mut deleted = store.delete_stream(paths);
            let mut count = 0u64;
            while let Some(file) = deleted.next().await {
                match file {
                    Ok(_) | Err(object_store::Error::NotFound { .. }) => {
                        reached("a file is vacuumed");
                        count += 1;
                    }
                    Err(error) => return Err(storage(error, "a file cannot be removed")),
                }
            }
            reached("files are vacuumed");
            let end = DeltaOperation::VacuumEnd { status: "COMPLETED".into() };
            self.note(settings, end, json!({ "numDeletedFiles": count, "numVacuumedDirectories": 0 })).await?;
        }
        Ok(found)
    }

    /// Files that must stay: of the newest version, and of every version that was the newest after `until`.
    pub(crate) async fn named(&self, until: DateTime<Utc>) -> Result<Named> {
        let mut named = Named::default();
        let Some(delta) = &self.delta else { return Ok(named) };
        let failed = |error| storage(error, "the table's log cannot be read");
        let snapshot = delta.snapshot().map_err(failed)?;
        for file in snapshot.log_data().iter() {
            named.kept.insert(file.object_store_path());
            if let Some(vector) = file.deletion_vector_descriptor() {
                named.kept.extend(self.vector_path(vector)?);
            }
        }
        let mut tombstones = snapshot.all_tombstones(self.log_store.as_ref());
        while let Some(tombstone) = tombstones.try_next().await.map_err(failed)? {
            let path = data_path(tombstone.path().as_ref());
            if tombstone.deletion_timestamp().is_none_or(|time| time >= until.timestamp_millis()) {
                named.kept.insert(path.clone());
            }
            named.ever.insert(path);
        }
        drop(tombstones);
        // The kernel does not tell which vectors its tombstones had: the commits do, as long as they are there. A
        // commit is written when its files cease to be the newest's, so those before `until` do not count.
        let store = self.store();
        let mut log = store.list(Some(&Path::from("_delta_log")));
        let unreadable = |error: &dyn std::fmt::Display| storage(error, "the table's log cannot be read");
        while let Some(commit) = log.try_next().await.map_err(|error| unreadable(&error))? {
            if commit.location.extension() != Some("json") {
                continue;
            }
            // Others may have committed since the snapshot was read.
            let version = commit.location.filename().and_then(|name| name.strip_suffix(".json")?.parse::<u64>().ok());
            let recent = commit.last_modified >= until || version.is_none_or(|version| Some(version) > self.version());
            let text = store.get(&commit.location).await.map_err(|error| unreadable(&error))?;
            let text = text.bytes().await.map_err(|error| unreadable(&error))?;
            for line in text.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
                let line: LogLine = serde_json::from_slice(line).map_err(|error| unreadable(&error))?;
                for file in line.add.into_iter().chain(line.remove) {
                    let mut paths = vec![data_path(&file.path)];
                    if let Some(vector) = file.deletion_vector {
                        paths.extend(self.vector_path(vector)?);
                    }
                    if recent {
                        named.kept.extend(paths.iter().cloned());
                    }
                    named.ever.extend(paths);
                }
            }
        }
        Ok(named)
    }

    /// Returns the path of a vector's file in the table's folder; `None` for one that is inline or elsewhere.
    fn vector_path(&self, vector: DeletionVectorDescriptor) -> Result<Option<Path>> {
        let failed = |error: delta_kernel::Error| storage(error, "a deletion vector's place cannot be read");
        let root = self.log_store.root_url();
        let place = KernelDescriptor::try_from(vector).map_err(failed)?.absolute_path(root).map_err(failed)?;
        let relative = place.and_then(|place| root.make_relative(&place)).filter(|path| !path.starts_with("../"));
        Ok(relative.and_then(|path| Path::from_url_path(path).ok()))
    }

    /// A commit that only tells of the vacuum.
    async fn note(&mut self, settings: &VacuumSettings, operation: DeltaOperation, metrics: Value) -> Result<()> {
        let mut info = settings.info.clone();
        info.insert("operationMetrics".into(), metrics);
        for _ in 0..crate::commit::upsert::MAX_ATTEMPTS {
            if self.change(Vec::new(), &info, operation.clone()).await? {
                return Ok(());
            }
        }
        Err(Error::new(ErrorKind::Table, "other writers committed first in each attempt"))
    }
}

/// Files that the table's log names.
#[derive(Default)]
pub(crate) struct Named {
    /// Files that must stay.
    kept: HashSet<Path>,
    /// Files that some version named, so that they are not those of a run that has not committed.
    ever: HashSet<Path>,
}

impl Named {
    /// Returns true if some version names, or named, the file.
    pub(crate) fn has(&self, path: &Path) -> bool {
        self.kept.contains(path) || self.ever.contains(path)
    }
}

/// File actions of a line of the log.
#[derive(serde::Deserialize)]
struct LogLine {
    add: Option<LogFile>,
    remove: Option<LogFile>,
}

#[derive(serde::Deserialize)]
#[serde(rename_all = "camelCase")]
struct LogFile {
    path: String,
    deletion_vector: Option<DeletionVectorDescriptor>,
}

/// A path as the log writes it, percent-encoded.
pub(crate) fn data_path(path: &str) -> Path {
    Path::from_url_path(path).unwrap_or_else(|_| Path::from(path))
}
